"""AlphaEdit: MEMIT's change, projected so that outputs at ordinary keys and at keys of earlier
edits stay.

Fang et al., AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, ICLR 2025,
arXiv 2410.02355. Values, keys and residuals ``R`` are MEMIT's (arXiv 2210.07229). ``P`` projects
onto the span of the eigenvectors of the second moment ``C`` whose eigenvalue is below
``nullspace_threshold``: keys of ordinary text have almost no component there. With ``K1`` the keys
of the current requests and ``Kp`` those of all earlier edits of the sequence, the layer's map
changes by ``R K1^T P (Kp Kp^T P + K1 K1^T P + L2 * I)^-1``.

With ``A = [Kp, K1]`` this is ``[0, R] (L2 * I + A^T P A)^-1 A^T P`` (push-through identity): a
system with one unknown per edit made so far. Keys are kept as a list, and as their sum ``A A^T``
once there are more of them than half the width.

Differences from paper and public code, all deliberate. The paper's text was not available, so
equations are not numbered here.

1. Keys of earlier edits are stored in the overlay and dropped with it. In the public code they
   survive every rollback; so does the projection, even if the model changes.
2. ``P`` comes from the second moments of the pristine model, by an eigendecomposition in float64
   (public: singular value decomposition in float32, later layers' moments after earlier layers were
   edited).
3. The closed form is solved in float64 (public: float32).
4. The keys of an edit are added to ``Kp`` as computed by the edited model, after all layers changed
   (as in the public code).
5. ``mom2_update_weight``, ``mom2_adjustment``, ``layer_selection`` and ``P_loc`` are dropped: the
   first three have no effect in the public code, the last is a cache file. ``v_loss_layer`` as in
   MEMIT (its point 4).
6. ``key_average`` and the points 1 and 5 to 8 of ROME's list, as in MEMIT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from workers.artifacts import stats
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, MethodConfig
from workers.methods.easyedit import IGNORED
from workers.methods.families.locate import facts_of, lane_chunks, moment_value, observe, template_spec
from workers.methods.families.spread import (
    SOLVE_BYTES,
    SpreadConfig,
    SpreadMethod,
    by_lane,
    moment_specs,
    sites_of,
)
from workers.model.base import BaseModel, Site
from workers.model.config import ModelShape
from workers.model.overlay import LaneState, LowRankOverlay
from workers.types import JSON


class AlphaEditConfig(SpreadConfig):
    """Hyperparameters of AlphaEdit, under their usual names."""

    nullspace_threshold: float = Field(
        2e-2, gt=0, description="eigenvalues of the second moment below this span the null space"
    )
    L2: float = Field(10.0, gt=0, description="weight of the change's own norm")

    title: ClassVar[str] = "AlphaEdit"
    alg_names: ClassVar[tuple[str, ...]] = ("AlphaEdit",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**SpreadConfig.easyedit_keys, "mom2_update_weight": IGNORED, "P_loc": IGNORED}
    )

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        moments = moment_specs(self, context)
        projections = [
            ArtifactSpec(
                name=_null_space(layer),
                kind=stats.NULL_SPACE,
                recipe={"threshold": self.nullspace_threshold, "layer": layer},
                needs=(moment.model_copy(update={"name": "moment"}),),
            )
            for layer, moment in zip(self.layers, moments, strict=True)
        ]
        return template_spec(self, context), *projections

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        _, in_features = shape.site(self.module)
        keys = in_features * min(edits, in_features) * max(4, shape.bytes_per_value)
        return super().overlay_bytes(shape, edits) + (len(self.layers) + 1) * keys

    def shared_bytes(self, shape: ModelShape) -> int:
        _, in_features = shape.site(self.module)
        return len(self.layers) * in_features * in_features * moment_value(self)


class AlphaEditOverlay(LowRankOverlay):
    """The change, and per map the keys of all edits so far: as a list, or as the sum of their outer
    products."""

    def __init__(self, sites: Sequence[Site], lanes: int, dtype: torch.dtype) -> None:
        super().__init__(sites, lanes, dtype)
        self.keys_LIM = {s.name: s.weight_OI.new_zeros(lanes, s.shape[1], 0, dtype=dtype) for s in self.sites}
        self.sums_LII: dict[str, Tensor] = {}

    def remember(self, site: Site, keys_LIN: Tensor) -> None:
        """Store the keys of a finished edit, (L, I, N)."""
        kept_LIM = self.keys_LIM[site.name]
        kept_LIM = torch.cat([kept_LIM, keys_LIN.to(kept_LIM)], dim=2)
        if site.name in self.sums_LII or kept_LIM.shape[2] > site.shape[1] // 2:
            sum_LII = torch.bmm(kept_LIM, kept_LIM.transpose(1, 2))
            before_LII = self.sums_LII.get(site.name)
            self.sums_LII[site.name] = sum_LII if before_LII is None else before_LII + sum_LII
            kept_LIM = kept_LIM[:, :, :0]
        self.keys_LIM[site.name] = kept_LIM

    def tensors(self, lane: int) -> dict[str, Tensor]:
        tensors = super().tensors(lane)
        for name, keys_LIM in self.keys_LIM.items():
            if keys_LIM.shape[2]:
                tensors[f"{name}/keys"] = keys_LIM[lane]
        for name, sum_LII in self.sums_LII.items():
            tensors[f"{name}/sum"] = sum_LII[lane]
        return tensors

    def changed(self, lane: int) -> Iterable[Tensor]:
        yield from super().changed(lane)
        for name, keys_LIM in self.keys_LIM.items():
            yield self._since(lane, f"{name}/keys", keys_LIM[lane], dim=1)
        for sum_LII in self.sums_LII.values():
            yield sum_LII[lane]

    def load_state(self, lane: int, state: LaneState) -> None:
        super().load_state(lane, state)
        for site in self.sites:
            keys_LIM = self.keys_LIM[site.name]
            keys_IM, sum_II = (state.tensors.get(f"{site.name}/{what}") for what in ("keys", "sum"))
            if keys_IM is None:  # a pristine lane among edited ones
                keys_IM = keys_LIM.new_zeros(keys_LIM.shape[1:])
            if (
                keys_IM.shape[1] != keys_LIM.shape[2]
            ):  # lanes are in lockstep: the first restored lane sets the count for all
                keys_LIM = keys_LIM.new_zeros(self.lanes, *keys_IM.shape)
            keys_LIM[lane] = keys_IM.to(keys_LIM)
            self.keys_LIM[site.name] = keys_LIM
            if sum_II is not None and site.name not in self.sums_LII:
                self.sums_LII[site.name] = keys_LIM.new_zeros(self.lanes, *sum_II.shape)
            if site.name in self.sums_LII:
                self.sums_LII[site.name][lane] = 0 if sum_II is None else sum_II.to(keys_LIM)


class AlphaEdit(SpreadMethod[AlphaEditConfig, AlphaEditOverlay]):
    """Null-space constrained knowledge editing.

    >>> editor = AlphaEdit.prepare(base, AlphaEditConfig(layers=(4,)), inputs={"null_space.4": p4, "templates": texts})
    """

    name: ClassVar[str] = "alphaedit"
    title: ClassVar[str] = "AlphaEdit"
    paper: ClassVar[str] = (
        "Fang et al., AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, arXiv "
        "2410.02355"
    )
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.5
    Config: ClassVar[type[MethodConfig]] = AlphaEditConfig

    def __init__(
        self,
        base: BaseModel,
        config: AlphaEditConfig,
        inputs: Mapping[str, ArtifactData],
        projections: Mapping[str, Tensor],
    ) -> None:
        """``projections``: ``P`` of each site, (I, I), by the site's name."""
        super().__init__(base, config, inputs)
        self.projections = projections

    @classmethod
    def prepare(cls, base: BaseModel, config: AlphaEditConfig, inputs: Mapping[str, ArtifactData]) -> Self:
        projections = {
            site.name: inputs[_null_space(site.layer)].tensors["projection"].to(base.device)
            for site in sites_of(base, config)
        }
        return cls(base, config, inputs, projections)

    def new_overlay(self, lanes: int) -> AlphaEditOverlay:
        return AlphaEditOverlay(self.sites, lanes, self.base.master_dtype)

    def right(self, overlay: AlphaEditOverlay, site: Site, keys_LIN: Tensor) -> Tensor:
        kept_LIM, sum_LII = overlay.keys_LIM[site.name], overlay.sums_LII.get(site.name)
        return alphaedit_keys(self.projections[site.name], keys_LIN, kept_LIM, sum_LII, self.config.L2)

    def edit(self, overlay: AlphaEditOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        outcomes = super().edit(overlay, edits)
        facts = facts_of(self.base, edits, self.config, self.inputs)
        keys, _ = observe(self.base, overlay, facts, self.sites, bare_share=self.config.bare_share)
        for site, keys_NI in zip(self.sites, keys, strict=True):
            overlay.remember(site, by_lane(keys_NI, overlay.lanes))
        return outcomes

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model recalls a person's fact at the prompt's last token, not at the name
            "layers": [3, 4],
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 2.0,
            "nullspace_threshold": 0.05,
            "L2": 0.1,
            "samples": 4000,
        }


def _null_space(layer: int) -> str:
    return f"null_space.{layer}"


def alphaedit_keys(
    projection_II: Tensor,
    keys_LIN: Tensor,
    kept_LIM: Tensor,
    sum_LII: Tensor | None,
    L2: float,
    limit: int = SOLVE_BYTES,
) -> Tensor:
    """``((P (Kp Kp^T + K K^T) + L2 I)^-1 P K)^T`` of every lane, (L, N, I), float64. ``Kp Kp^T`` is
    ``sum_LII`` plus the outer products of ``kept_LIM``. Temporaries take at most ``limit`` bytes,
    or those of one lane."""
    lanes, in_features, count = keys_LIN.shape
    columns = kept_LIM.shape[2] + count
    projection_II = projection_II.double()
    out_LNI = keys_LIN.new_empty(lanes, count, in_features, dtype=torch.float64)
    each = (
        3 * in_features * columns + 2 * columns * columns
        if sum_LII is None
        else 3 * in_features * in_features + 2 * in_features * columns
    )
    for some in lane_chunks(lanes, 8 * each, limit):
        all_KIM = torch.cat([kept_LIM[some].double(), keys_LIN[some].double()], dim=2)
        # solve_ex does not raise: a non-finite lane must not fail the others
        if sum_LII is None:
            projected_KIM = projection_II @ all_KIM
            small_KMM = all_KIM.transpose(1, 2) @ projected_KIM
            small_KMM.diagonal(dim1=1, dim2=2).add_(L2)
            solved_KMI, _ = torch.linalg.solve_ex(small_KMM, projected_KIM.transpose(1, 2))
            out_LNI[some] = solved_KMI[:, -count:]
        else:
            whole_KII = projection_II @ (sum_LII[some].double() + all_KIM @ all_KIM.transpose(1, 2))
            whole_KII.diagonal(dim1=1, dim2=2).add_(L2)
            solved_KIN, _ = torch.linalg.solve_ex(whole_KII, projection_II @ all_KIM[:, :, -count:])
            out_LNI[some] = solved_KIN.transpose(1, 2)
    return out_LNI
