"""EMMET: MEMIT's batched edit with ROME's constraint that every new key gives exactly its new
value.

Gupta et al., A Unified Framework for Model Editing, arXiv 2403.14236: ROME and MEMIT minimise the
same two terms, the change of outputs at ordinary keys and the error at the new keys. ROME
constrains the second to zero for one fact, MEMIT weights it for many facts, EMMET constrains it to
zero for a whole batch. For the requests of a call,

- values are optimised at the last edited layer; keys and residuals ``R = (z - h) / (number of
  layers left)`` are read from the model as edited so far, layer by layer, all as in MEMIT
  (:mod:`workers.methods.families.spread`);
- a layer's map changes by ``R (K^T C^-1 K)^-1 K^T C^-1``, ``C = E[k k^T]`` over ordinary text. With
  ``A = C^-1 K`` that is ``R D^-1 A^T``, ``D = K^T A``: rank n for n requests, and ``C`` is
  factorised once for all lanes and edits.

With one request, one layer and ``emmet_lambda: 0`` this is ROME's change for the averaged key.

Differences from paper and public code, all deliberate. The paper's text was not available, so
equations are not numbered here.

1. ``D`` gets ``emmet_lambda`` added on its diagonal, as in the authors' code, because requests with
   nearly the same key make it singular. ``C`` is first multiplied by ``mom2_update_weight``. The
   factor cancels if ``emmet_lambda`` is 0; otherwise it scales ``D`` relative to ``emmet_lambda``:
   large weights give small edits. Public files contain values for this scale.
2. If ``D`` is still singular (``emmet_lambda: 0`` and one key twice in a batch), its lane fails.
   The public code takes the pseudo-inverse in that case.
3. Points 1, 2, 3, 5 and 6 of MEMIT's list.
4. ``layer_selection`` and ``mom2_adjustment`` have no effect in the public code and are dropped;
   ``v_loss_layer`` as in MEMIT (its point 4).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from workers.methods.base import MethodConfig
from workers.methods.families.spread import RidgeMethod, SpreadConfig, ridge_keys
from workers.model.base import Site
from workers.model.overlay import LowRankOverlay
from workers.types import JSON


class EMMETConfig(SpreadConfig):
    """Hyperparameters of EMMET, under their usual names."""

    mom2_update_weight: float = Field(1.0, gt=0, description="the second moment is multiplied by this")
    emmet_lambda: float = Field(
        0.1, ge=0, description="added to the diagonal of K^T C^-1 K against ill-conditioned batches"
    )
    update_norm_lambda: float = Field(
        0.0, ge=0, description="added to the diagonal of C: bounds the change's norm"
    )

    title: ClassVar[str] = "EMMET"
    alg_names: ClassVar[tuple[str, ...]] = ("EMMET",)


class EMMET(RidgeMethod[EMMETConfig]):
    """Equality-constrained mass editing.

    >>> editor = EMMET.prepare(base, EMMETConfig(layers=(5,)), inputs={"moment.5": moment, "templates": texts})
    """

    name: ClassVar[str] = "emmet"
    title: ClassVar[str] = "EMMET"
    paper: ClassVar[str] = "Gupta et al., A Unified Framework for Model Editing, arXiv 2403.14236"
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.4
    Config: ClassVar[type[MethodConfig]] = EMMETConfig

    @classmethod
    def weighted(cls, config: EMMETConfig, moment_II: Tensor) -> Tensor:
        weighted_II = moment_II * config.mom2_update_weight
        weighted_II.diagonal().add_(config.update_norm_lambda)
        return weighted_II

    def right(self, overlay: LowRankOverlay, site: Site, keys_LIN: Tensor) -> Tensor:
        return ridge_keys(self.factors[site.name], keys_LIN, ridge=self.config.emmet_lambda)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model recalls a person's fact at the prompt's last token, not at the name
            "layers": [4],
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 2.0,
            "samples": 4000,
        }
