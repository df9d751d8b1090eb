"""Editing of several layers: a value is optimised at the last of them, and the residual is spread
over all (MEMIT, Meng et al., arXiv 2210.07229; EMMET, PMET and AlphaEdit after it).

>>> class Mine(RidgeMethod[MyConfig]):  # sites, overlay, second moments and edit are inherited
...     def right(self, overlay, site, keys_LIN):
...         return ridge_keys(self.factors[site.name], keys_LIN, ridge=1.0)

For each request ``z = h + d``: ``h`` is the output of the last edited layer at the lookup token of
the bare prompt, ``d`` the vector that the search of :mod:`workers.methods.families.locate` finds
there. Then, from the first layer to the last: the keys ``K`` of all requests and the current ``h``
are read from the model as edited so far; the layer's map changes by the residual ``(z - h) /
(number of layers left, this one included)`` times a right factor. The methods differ in this
factor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, Method
from workers.methods.easyedit import IGNORED, split_module
from workers.methods.families.locate import (
    AtMap,
    Factor,
    Facts,
    Found,
    LocateConfig,
    chunked,
    facts_of,
    lane_chunks,
    layer_list,
    moment_name,
    moment_spec,
    moment_value,
    observe,
    search,
    template_spec,
)
from workers.model.base import BaseModel, Site
from workers.model.config import ModelShape
from workers.model.overlay import LowRankOverlay
from workers.types import JSON

SOLVE_BYTES = 1 << 30
"""Maximum bytes of temporaries of the closed forms; lanes are solved in chunks of this size."""


class SpreadConfig(LocateConfig):
    """Hyperparameters of methods that edit several layers, under their usual names."""

    layers: tuple[int, ...] = Field(min_length=1, description="decoder layers that are edited, ascending")
    module: str | None = Field(
        None, description="linear map inside the layers; null: the MLP's output projection"
    )
    context_template_length_params: tuple[tuple[int, int], ...] = Field(
        ((10, 5),), description="[length in tokens, how many templates] pairs; a multiple of five each"
    )
    key_average: Literal["halves", "contexts"] = Field(
        "halves",
        description="average of a key: the bare prompt one half and the templates the other, as in the "
        "authors' code; "
        "or all contexts alike",
    )

    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "rewrite_module_tmp": "module",
            "layer_selection": IGNORED,  # nothing reads it
            "mom2_adjustment": IGNORED,  # nothing reads it
            "mom2_n_samples": "samples",
            "mom2_dtype": "precision",
        }
    )
    easyedit_lost: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "mom2_dataset": "the text of the second moment is `corpus`",
            "v_loss_layer": "the loss is the model's",
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
            _, out["module"] = split_module(out["module"], source)
        return out

    @property
    def bare_share(self) -> float | None:
        return 0.5 if self.key_average == "halves" else None

    @property
    def first_layer(self) -> int:
        return min(self.layers)

    def check(self, shape: ModelShape) -> None:
        for layer in self.layers:
            shape.check_layer(layer, "layers")
        shape.site(self.module)

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        return template_spec(self, context), *moment_specs(self, context)

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        """A lane's factors after ``edits`` edits, and the temporaries while one is added."""
        out, in_features = shape.site(self.module)
        value = max(4, shape.bytes_per_value)
        if edits >= min(out, in_features) // 2:
            return (len(self.layers) + 2) * out * in_features * value
        return (len(self.layers) + 1) * edits * (out + in_features) * value

    def shared_bytes(self, shape: ModelShape) -> int:
        _, in_features = shape.site(self.module)
        # second moments, and their factors in float64; while the last is factorised, also a float64
        # copy and a temporary
        return (len(self.layers) * (moment_value(self) + 8) + 2 * 8) * in_features * in_features


def sites_of(base: BaseModel, config: SpreadConfig) -> list[Site]:
    return [base.site(layer, config.module) for layer in config.layers]


def moment_specs(config: SpreadConfig, context: ArtifactContext) -> list[ArtifactSpec]:
    """The second moments of the edited layers, of the pristine model."""
    return [moment_spec(config, context, layer, config.module, moment_name(layer)) for layer in config.layers]


def check_lockstep(edits: Sequence[LaneEdit]) -> None:
    """Raise ValueError if lanes have different numbers of requests: their vectors are stacked."""
    counts = {len(edit.requests) for edit in edits}
    if len(counts) != 1:
        raise ValueError(f"lanes bring {sorted(counts)} requests; they edit in lockstep")


def by_lane(facts_NX: Tensor, lanes: int) -> Tensor:
    """Vectors of the facts as columns of their lanes, (L, X, N / L)."""
    return facts_NX.view(lanes, -1, facts_NX.shape[1]).transpose(1, 2)


def figures_of(found: Found, which: int = 0) -> Tensor:
    """Steps, loss, first loss, and norm of the ``which``-th vector relative to its value, per fact,
    (4, N)."""
    change_N = found.deltas[which].norm(dim=1) / found.norms[which]
    return torch.stack([found.steps_N.to(change_N), found.loss_N, found.first_N, change_N]).double()


def outcomes_of(figures: Sequence[Tensor], lanes: int) -> list[EditOutcome]:
    """The outcome of each lane: the maximum of its facts' steps, and the means of the other
    figures."""
    figures_FLN = torch.cat(list(figures), dim=1).view(4, lanes, -1)
    steps_L, means_FL = figures_FLN[0].amax(1), figures_FLN[1:].mean(2)
    return [
        EditOutcome(int(steps), loss, {"first_loss": first, "value_change": change})
        for steps, (loss, first, change) in zip(steps_L.tolist(), means_FL.T.tolist(), strict=True)
    ]


def ridge_keys(
    factor: Factor, keys_LIN: Tensor, ridge: float, weight: float = 1.0, limit: int = SOLVE_BYTES
) -> Tensor:
    """``(A^T K + ridge)^-1 A^T`` with ``A = C^-1 K / weight``, of every lane, (L, N, I), float64.

    With ``ridge`` 1 this is ``K^T (weight * C + K K^T)^-1`` (Woodbury), with 0 the left inverse of
    K with the least effect on ordinary keys. Temporaries take at most ``limit`` bytes, or those of
    one lane.
    """
    lanes, in_features, count = keys_LIN.shape
    out_LNI = keys_LIN.new_empty(lanes, count, in_features)
    for some in lane_chunks(lanes, 8 * (3 * in_features * count + 2 * count * count), limit):
        keys_KIN = keys_LIN[some]
        solved_KIN = factor.solve(keys_KIN) / weight
        small_KNN = keys_KIN.transpose(1, 2) @ solved_KIN
        small_KNN.diagonal(dim1=1, dim2=2).add_(ridge)
        # does not raise: a singular or non-finite lane must not fail the others
        out_LNI[some], _ = torch.linalg.solve_ex(small_KNN, solved_KIN.transpose(1, 2))
    return out_LNI


C = TypeVar("C", bound=SpreadConfig)
OverlayT = TypeVar("OverlayT", bound=LowRankOverlay)


class SpreadMethod(Method[C, OverlayT]):
    """A method that edits several layers. Subclasses compute the right factor of a change."""

    batch_edits: ClassVar[bool] = True

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        super().__init__(base, config, inputs)
        self.sites = sites_of(base, config)

    @abstractmethod
    def right(self, overlay: OverlayT, site: Site, keys_LIN: Tensor) -> Tensor:
        """The right factor of a map's change, (L, N, I), from the requests' keys. The left factor
        is the residuals."""

    def edit(self, overlay: OverlayT, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        check_lockstep(edits)
        base, config, lanes, top = self.base, self.config, overlay.lanes, self.config.layers[-1]
        facts = facts_of(base, edits, config, self.inputs)
        value_site = base.site(top)  # adding to the MLP's output equals adding to the layer's
        wanted, figures = [], []
        for chunk in chunked(facts, lanes):
            part = Facts(base, chunk)
            at = AtMap.capture(base, value_site, part, overlay)
            found = search(base, config, part, at, [at.layer_NO])
            wanted.append(at.layer_NO + found.deltas[0])
            figures.append(figures_of(found))
        z_NO = torch.cat(wanted)
        for i, site in enumerate(self.sites):
            (keys_NI,), (now_NO,) = observe(
                base, overlay, facts, [site], [base.layers[top]], config.bare_share
            )
            residual_NO = (z_NO - now_NO).double() / (len(self.sites) - i)
            right_LNI = self.right(overlay, site, by_lane(keys_NI.double(), lanes))
            overlay.add(by_lane(residual_NO, lanes), right_LNI, site)
        return outcomes_of(figures, lanes)


class RidgeMethod(SpreadMethod[C, LowRankOverlay]):
    """A method whose right factor uses the second moment of each site, factorised once for all
    lanes and edits."""

    def __init__(
        self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData], factors: Mapping[str, Factor]
    ) -> None:
        """``factors``: by the site's name."""
        super().__init__(base, config, inputs)
        self.factors = factors

    @classmethod
    def prepare(cls, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> Self:
        factors = {}
        for site in sites_of(base, config):
            moment_II = inputs[moment_name(site.layer)].tensors["moment"].to(base.device, torch.float64)
            factors[site.name] = Factor.of(cls.weighted(config, moment_II), site.layer)
        return cls(base, config, inputs, factors)

    def new_overlay(self, lanes: int) -> LowRankOverlay:
        return LowRankOverlay(self.sites, lanes, self.base.master_dtype)

    @classmethod
    def weighted(cls, config: C, moment_II: Tensor) -> Tensor:
        """Return the matrix that is factorised, given the second moment in float64."""
        return moment_II
