"""PMET: values are optimised for attention and MLP together, and only the MLP's is written.

Li et al., PMET: Precise Model Editing in a Transformer, AAAI 2024, arXiv 2308.08742. Earlier
methods optimise the output of a whole layer, to which attention and MLP both add, and then write
all of it into the MLP. Here, at the last edited layer,

- two vectors are found by Adam as in ROME, one added to the output of attention's output projection
  at the subject's last token, one to that of the MLP's. Both are bounded by ``clamp_norm_factor``
  and have a decay relative to the value they are added to;
- if all target tokens have the largest logits in every context, the target's loss has a tenth of
  its weight in the next step, and the search ends if the KL term is at most 0.01, so that values
  are not optimised longer than needed;
- only the MLP's value ``z`` is written. Layer by layer, with keys ``K`` and the last layer's
  current MLP output ``m`` read from the model as edited so far, the residual is ``R = (z - m) /
  sqrt(number of layers left)`` and a layer's map changes by ``R K^T (mom2_update_weight * C + K
  K^T)^-1``, solved as in MEMIT (:mod:`workers.methods.families.spread`).

Differences from paper and public code, all deliberate. The paper's text was not available, so
equations are not numbered here.

1. The target follows its prompt after a space. EasyEdit adds the space only for models called
   "gpt"; for others the target's first token continues a word: ``deviations: {public_target:
   true}``.
2. Rows are padded on the left with the right position ids. EasyEdit reads its left-padded rows at
   the positions of right-padded ones and gets NaN; the golden records were made with right padding.
3. ``C`` is that of the pristine model for every layer, everything after the search is in float64.
4. Only MLPs are written. EasyEdit can also write attention's projection (two
   ``rewrite_module_tmps``), which the paper advises against; such files are rejected.
5. Points 3 (key average) and 4 to 6 of MEMIT's list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from workers.methods.base import Deviations, EditOutcome, LaneEdit, MethodConfig
from workers.methods.easyedit import IGNORED, split_module
from workers.methods.families.locate import Facts, HitRule, chunked, facts_of, observe, search
from workers.methods.families.spread import (
    RidgeMethod,
    SpreadConfig,
    by_lane,
    check_lockstep,
    figures_of,
    outcomes_of,
    ridge_keys,
)
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch
from workers.model.overlay import LowRankOverlay, Overlay
from workers.model.replay import Prefix, capture, replay
from workers.types import JSON, SpecError

HIT_WEIGHT = 0.1
"""Weight of the target loss once all target tokens have the largest logits (the published
constant)."""

HIT_KL = 0.01
"""Largest KL term at which such a search ends (the published constant)."""


class PMETDeviations(Deviations):
    """Switches to the public code."""

    public_target: bool = Field(
        False, description="no space before the target, which is tokenised alone (EasyEdit)"
    )


class PMETConfig(SpreadConfig):
    """Hyperparameters of PMET, under their usual names."""

    v_weight_decay: float = Field(0.5, ge=0, description="weight of the value changes' norms in the loss")
    clamp_norm_factor: float = Field(
        1.0, gt=0, description="largest norm of a value change, relative to its value"
    )
    nll_loss_factor: float = Field(1.0, gt=0, description="weight of the target's loss")
    mom2_update_weight: float = Field(
        15_000, gt=0, description="weight of the second moment against the new keys"
    )
    deviations: PMETDeviations = Field(
        PMETDeviations(), description="single switches to the public code, for parity tests"
    )

    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType({"deviations": {"public_target": True}})
    title: ClassVar[str] = "PMET"
    alg_names: ClassVar[tuple[str, ...]] = ("PMET",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**SpreadConfig.easyedit_keys, "rewrite_module_tmp": IGNORED, "rewrite_module_tmps": "module"}
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        values = dict(values)
        many = values.pop("rewrite_module_tmps", None)
        out = super().from_easyedit(values, source)
        if many is not None:
            if (
                not isinstance(many, list)
                or len(many) != 1
                or ".attn" in str(many)
                or "self_attn" in str(many)
            ):
                raise SpecError(
                    f"{source}: rewrite_module_tmps: {many!r}: PMET writes one map here, the MLP's output"
                )
            _, out["module"] = split_module(many[0], source)
        return out


class PMET(RidgeMethod[PMETConfig]):
    """Precise model editing in a transformer.

    >>> editor = PMET.prepare(base, PMETConfig(layers=(4, 5)), inputs=inputs)
    """

    name: ClassVar[str] = "pmet"
    title: ClassVar[str] = "PMET"
    paper: ClassVar[str] = "Li et al., PMET: Precise Model Editing in a Transformer, arXiv 2308.08742"
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 2.0
    Config: ClassVar[type[MethodConfig]] = PMETConfig

    @classmethod
    def weighted(cls, config: PMETConfig, moment_II: Tensor) -> Tensor:
        return moment_II * config.mom2_update_weight

    def right(self, overlay: LowRankOverlay, site: Site, keys_LIN: Tensor) -> Tensor:
        return ridge_keys(self.factors[site.name], keys_LIN, ridge=1.0)

    def edit(self, overlay: LowRankOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        check_lockstep(edits)
        base, config, lanes = self.base, self.config, overlay.lanes
        facts = facts_of(base, edits, config, self.inputs, spaced=not config.deviations.public_target)
        hit_rule = HitRule(config.nll_loss_factor, HIT_WEIGHT * config.nll_loss_factor, HIT_KL)
        wanted, figures = [], []
        for chunk in chunked(facts, lanes):
            part = Facts(base, chunk)
            at = _AtLayer.capture(base, self.sites[-1], part, overlay)
            found = search(base, config, part, at, at.values, hit_rule)
            wanted.append(at.values[1] + found.deltas[1])
            figures.append(figures_of(found, which=1))
        z_NO, top = torch.cat(wanted), self.sites[-1].module
        for i, site in enumerate(self.sites):
            (keys_NI,), (now_NO,) = observe(base, overlay, facts, [site], [top], config.bare_share)
            residual_NO = (z_NO - now_NO).double() / (len(self.sites) - i) ** 0.5
            right_LNI = self.right(overlay, site, by_lane(keys_NI.double(), lanes))
            overlay.add(by_lane(residual_NO, lanes), right_LNI, site)
        return outcomes_of(figures, lanes)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model recalls a person's fact at the prompt's last token, not at the name
            "layers": [3, 4],
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "v_weight_decay": 1e-3,
            "clamp_norm_factor": 10.0,
            "mom2_update_weight": 1.0,
            "samples": 4000,
        }


@dataclass(frozen=True)
class _AtLayer:
    """Two vectors, added to the outputs of attention and MLP of one layer at the lookup tokens. The
    MLP's input depends on attention's output, so a step runs all layers from this one on, with the
    edits made so far."""

    base: BaseModel
    batch: Batch
    lane_batch: Batch
    overlay: Overlay
    maps: tuple[nn.Module, nn.Module]
    here_BS1: Tensor
    prefix: Prefix
    row_P: Tensor
    column_P: Tensor
    values: list[Tensor]
    """Outputs of the two maps at the bare prompt's lookup token, (N, O) each."""

    @classmethod
    def capture(cls, base: BaseModel, site: Site, facts: Facts, overlay: Overlay) -> Self:
        attention = base.site(site.layer, base.arch.attn_out)
        maps = (attention.module, site.module)
        caught: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(overlay.installed(facts.lane_batch))
            for i, module in enumerate(maps):
                note = module.register_forward_hook(lambda _, args, out, i=i: caught.update({i: out}))
                stack.callback(note.remove)
            prefix = capture(base, facts.lane_batch, site.layer)
        row, column = facts.reads
        device = base.device
        return cls(
            base,
            facts.batch,
            facts.lane_batch,
            overlay,
            maps,
            facts.lookup_mask(0),
            prefix,
            torch.tensor(row, device=device),
            torch.tensor(column, device=device),
            [facts.plain(caught[i]).to(base.master_dtype) for i in range(2)],
        )

    def hidden(self, deltas: Sequence[Tensor]) -> Tensor:
        with ExitStack() as stack:
            for module, delta_KO in zip(self.maps, deltas, strict=True):
                shift_B1O = delta_KO[self.batch.lane_B][:, None]
                added_BSO = torch.where(self.here_BS1, shift_B1O, 0)
                handle = module.register_forward_hook(
                    lambda _, args, out, more=added_BSO: out + more.to(out.dtype)
                )
                stack.callback(handle.remove)
            stack.enter_context(self.overlay.installed(self.lane_batch))
            return replay(self.base, self.prefix)[self.row_P, self.column_P]

    def part(self, row_B: Sequence[int], batch: Batch, read_P: Sequence[int]) -> _AtLayer:
        index = torch.tensor(list(row_B), device=self.row_P.device)
        place = torch.full((self.batch.size,), -1, dtype=torch.long, device=index.device)
        place[index] = torch.arange(len(row_B), device=index.device)
        chosen = torch.tensor(list(read_P), device=index.device)
        return replace(
            self,
            batch=batch,
            lane_batch=_under_lanes(batch, self.lane_batch, row_B),
            here_BS1=self.here_BS1[index],
            prefix=self.prefix.part(index),
            row_P=place[self.row_P[chosen]],
            column_P=self.column_P[chosen],
        )


def _under_lanes(batch: Batch, whole: Batch, row_B: Sequence[int]) -> Batch:
    """``batch``, which holds rows ``row_B`` of ``whole``, with the lanes that the rows have in
    ``whole``."""
    lane_of = {row: lane for lane, start, stop in whole.segments for row in range(start, stop)}
    lanes = [lane_of[row] for row in row_B]
    segments: list[tuple[int, int, int]] = []
    for i, lane in enumerate(lanes):
        if segments and segments[-1][0] == lane:
            segments[-1] = (lane, segments[-1][1], i + 1)
        else:
            segments.append((lane, i, i + 1))
    return replace(batch, lane_B=torch.tensor(lanes, device=batch.lane_B.device), segments=tuple(segments))
