"""Editing several layers at once: a value is sought at the last of them, and what is missing there is spread over all
(MEMIT, Meng et al., arXiv 2210.07229; AlphaEdit, arXiv 2410.02355).

>>> outcomes = spread(base, overlay, edits, config, inputs, sites, solve)

For each request ``z = h + d``: ``h`` is the output of the last edited layer at the lookup token of the bare prompt, ``d`` the
vector that the search of :mod:`workers.locate` finds there. Then, from the first layer to the last: the keys of all requests
are read off the model as it is now, and so is the present ``h``; ``solve`` writes ``(z - h) / (layers still to come)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from workers.artifacts import ArtifactData, ArtifactSpec
from workers.locate import AtMap, Facts, LocateConfig, chunked, facts_of, layer_list, moment_name, moment_spec, search
from workers.locate import observe as observed
from workers.methods.base import IGNORED, EditOutcome, LaneEdit, split_module
from workers.models import BaseModel, ModelConfig, ModelFingerprint, ModelShape, Site
from workers.overlay import LowRankOverlay
from workers.types import JSON

SOLVE_BYTES = 1 << 30
"""Temporaries of the closed forms: as many lanes at once as stay below this."""

Solve = Callable[[Site, Tensor, Tensor], None]
"""Writes into a site: keys (L, I, N) and residuals (L, O, N), the latter as this layer's share."""


class SpreadConfig(LocateConfig):
    """Hyperparameters of methods that edit several layers, under the names the field uses."""

    layers: tuple[int, ...] = Field(min_length=1, description="decoder layers that are edited, ascending")
    module: str | None = Field(None, description="linear map inside the layers; null: the MLP's output projection")
    context_template_length_params: tuple[tuple[int, int], ...] = Field(
        ((10, 5),), description="[length in tokens, how many templates] pairs; a multiple of five each"
    )
    key_average: Literal["halves", "contexts"] = Field(
        "halves",
        description="average of a key: the bare prompt one half and the templates the other, as in the authors' code; "
        "or all contexts alike",
    )

    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "rewrite_module_tmp": "module",
            "layer_selection": IGNORED,  # nothing reads it
            "v_loss_layer": IGNORED,
            "mom2_adjustment": IGNORED,  # nothing reads it
            "mom2_dataset": IGNORED,  # ours is a text file: ``corpus``
            "mom2_n_samples": "samples",
            "mom2_dtype": "precision",
        }
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"{list(layers)}: layers must be ascending, each once, 0 or more")
        return layers

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "layers" in out:
            out["layers"] = layer_list(out)
        if "module" in out:
            _, out["module"] = split_module(str(out["module"]), source)
        return out

    @property
    def bare_share(self) -> float | None:
        return 0.5 if self.key_average == "halves" else None


def sites_of(base: BaseModel, config: SpreadConfig) -> list[Site]:
    return [base.site(layer, config.module) for layer in config.layers]


def moment_specs(
    config: SpreadConfig, fingerprint: ModelFingerprint, model: ModelConfig, title: str
) -> list[ArtifactSpec]:
    """The second moment of every edited layer, of the pristine model."""
    return [
        moment_spec(config, fingerprint, model, layer, config.module, moment_name(layer), title)
        for layer in config.layers
    ]


def check(config: SpreadConfig, shape: ModelShape) -> None:
    for layer in config.layers:
        shape.check_layer(layer, "layers")
    shape.site(config.module)


def factor_bytes(config: SpreadConfig, shape: ModelShape, edits: int) -> int:
    """A lane's factors after ``edits`` edits, and the temporaries while they grow."""
    out, into = shape.site(config.module)
    value = max(4, shape.bytes_per_value)
    if edits >= min(out, into) // 2:
        return (len(config.layers) + 2) * out * into * value
    return (len(config.layers) + 1) * edits * (out + into) * value


def by_lane(facts_NX: Tensor, lanes: int) -> Tensor:
    """Vectors of the facts as columns of their lanes, (L, X, N / L)."""
    return facts_NX.view(lanes, -1, facts_NX.shape[1]).transpose(1, 2)


def spread(
    base: BaseModel,
    overlay: LowRankOverlay,
    edits: Sequence[LaneEdit],
    config: SpreadConfig,
    inputs: Mapping[str, ArtifactData],
    solve: Solve,
) -> list[EditOutcome]:
    """Edit each lane's requests together. Every lane must bring equally many."""
    lanes, top = overlay.lanes, config.layers[-1]
    counts = {len(edit.requests) for edit in edits}
    if len(counts) != 1:
        raise ValueError(f"lanes bring {sorted(counts)} requests; they edit in lockstep")
    facts = facts_of(base, edits, config, inputs)
    value_site = base.site(top)  # adding to the MLP's answer is adding to the layer's
    wanted, found = [], []
    for part in chunked(facts, lanes):
        batch = Facts(base, part)
        at = AtMap.capture(base, value_site, batch, overlay)
        result = search(base, config, batch, at, [at.layer_NO])
        wanted.append(at.layer_NO + result.deltas[0])
        change_N = result.deltas[0].norm(dim=1) / result.norms[0]
        found.append(torch.stack([result.steps_N.to(change_N), result.loss_N, result.first_N, change_N]).double())
    z_NO = torch.cat(wanted)
    for i, site in enumerate(overlay.sites):
        (keys_NI,), (now_NO,) = observed(base, overlay, facts, [site], [base.layers[top]], config.bare_share)
        residual_NO = (z_NO - now_NO).double() / (len(overlay.sites) - i)
        solve(site, by_lane(keys_NI.double(), lanes), by_lane(residual_NO, lanes))
    figures_FLN = torch.cat(found, dim=1).view(4, lanes, -1)
    steps_L, means_FL = figures_FLN[0].amax(1), figures_FLN[1:].mean(2)
    return [
        EditOutcome(int(steps), loss, {"first_loss": first, "value_change": change})
        for steps, (loss, first, change) in zip(steps_L.tolist(), means_FL.T.tolist(), strict=True)
    ]
