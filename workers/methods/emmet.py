"""EMMET: MEMIT's batched edit with ROME's constraint, that every new key is answered by its new value.

Gupta et al., A Unified Framework for Model Editing, arXiv 2403.14236: ROME and MEMIT minimise the same two terms, the change of
answers to ordinary keys and the error at the new keys; ROME holds the second at zero for one fact, MEMIT weighs it for many.
EMMET holds it at zero for a whole batch. For the requests of a call,

- values are sought at the last edited layer, keys and residuals ``R = (z - h) / (layers still to come)`` are read off the model
  as it is now, layer by layer, all as in MEMIT (:mod:`workers.spread`);
- a layer's map changes by ``R (K^T C^-1 K)^-1 K^T C^-1``, ``C = E[k k^T]`` over ordinary text. With ``A = C^-1 K`` that is
  ``R D^-1 A^T``, ``D = K^T A``: rank n for n requests, and ``C`` is factorised once for all lanes and edits.

With one request, one layer and ``emmet_lambda: 0`` this is ROME's change for the averaged key.

Differences from paper and public code, all deliberate. The paper's text was not at hand: equations are not numbered here.

1. ``D`` gets ``emmet_lambda`` added on its diagonal, as in the authors' code, because requests with nearly the same key make
   it singular. ``C`` is first multiplied by ``mom2_update_weight``, which cancels where ``emmet_lambda`` is 0 and otherwise
   scales ``D`` against it: large weights make small edits. Public files hold the value that goes with that scale.
2. ``D`` that is singular all the same (``emmet_lambda: 0`` and one key twice in a batch) fails its lane. The public code takes
   the pseudo-inverse in that case.
3. Points 1, 2, 3, 5 and 6 of MEMIT's list.
4. ``layer_selection``, ``v_loss_layer`` and ``mom2_adjustment`` have no effect in the public code and are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from workers import spread
from workers.artifacts import ArtifactData, ArtifactSpec
from workers.locate import Factor, moment_name, template_spec
from workers.methods.base import EditOutcome, LaneEdit, Method
from workers.models import BaseModel, ModelConfig, ModelFingerprint, ModelShape, Site
from workers.overlay import LowRankOverlay, Overlay
from workers.pretrain import TrainingSource
from workers.ridge import ridge_keys
from workers.types import JSON


class EMMETConfig(spread.SpreadConfig):
    """Hyperparameters of EMMET, under the names the field uses."""

    mom2_update_weight: float = Field(1.0, gt=0, description="the second moment is multiplied by this")
    emmet_lambda: float = Field(
        0.1, ge=0, description="added to the diagonal of K^T C^-1 K against ill-conditioned batches"
    )
    update_norm_lambda: float = Field(0.0, ge=0, description="added to the diagonal of C: bounds the change's norm")

    alg_names: ClassVar[tuple[str, ...]] = ("EMMET",)


class EMMET(Method[EMMETConfig]):
    """Equality-constrained mass editing.

    >>> editor = EMMET.prepare(base, EMMETConfig(layers=(5,)), inputs={"moment.5": moment, "templates": texts})
    """

    name: ClassVar[str] = "emmet"
    title: ClassVar[str] = "EMMET"
    paper: ClassVar[str] = "Gupta et al., A Unified Framework for Model Editing, arXiv 2403.14236"
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 1.4
    Config: ClassVar[type[EMMETConfig]] = EMMETConfig

    def __init__(
        self,
        base: BaseModel,
        config: EMMETConfig,
        inputs: Mapping[str, ArtifactData],
        factors: Mapping[str, Factor],
    ) -> None:
        """``factors``: the factorised, weighted second moment of each site, by the site's name."""
        super().__init__(base, config, inputs)
        self.sites = spread.sites_of(base, config)
        self.factors = factors

    @classmethod
    def prepare(cls, base: BaseModel, config: EMMETConfig, inputs: Mapping[str, ArtifactData]) -> Self:
        factors = {}
        for site in spread.sites_of(base, config):
            moment_II = inputs[moment_name(site.layer)].tensors["moment"].to(base.device, torch.float64)
            moment_II = moment_II * config.mom2_update_weight
            moment_II.diagonal().add_(config.update_norm_lambda)
            factors[site.name] = Factor.of(moment_II, site.layer)
        return cls(base, config, inputs, factors)

    def new_overlay(self, lanes: int) -> LowRankOverlay:
        return LowRankOverlay(self.sites, lanes, self.base.master_dtype)

    def edit(self, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if not isinstance(overlay, LowRankOverlay):
            raise TypeError(f"EMMET edits a LowRankOverlay, not a {type(overlay).__name__}")

        def write(site: Site, keys_LIN: Tensor, residual_LON: Tensor) -> None:
            right_LNI = ridge_keys(self.factors[site.name], keys_LIN, self.config.emmet_lambda)
            overlay.add(residual_LON, right_LNI, site)

        return spread.spread(self.base, overlay, edits, self.config, self.inputs, write)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model reads a person's fact at the prompt's last token, not at the name
            "layers": [4],
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 2.0,
            "samples": 4000,
        }

    @classmethod
    def check(cls, config: Any, shape: ModelShape) -> None:
        spread.check(config, shape)

    @classmethod
    def artifacts(
        cls,
        config: Any,
        fingerprint: ModelFingerprint,
        model: ModelConfig,
        seed: int,
        training: TrainingSource | None = None,
    ) -> tuple[ArtifactSpec, ...]:
        return (
            template_spec(config, fingerprint, model, seed),
            *spread.moment_specs(config, fingerprint, model, cls.title),
        )

    @classmethod
    def uses_seed(cls, config: Any) -> bool:
        return bool(config.context_template_length_params)

    @classmethod
    def overlay_bytes(cls, config: Any, shape: ModelShape, edits: int) -> int:
        return spread.factor_bytes(config, shape, edits)
