"""MEMIT: many facts are written at once, each into several MLP layers.

Meng et al., Mass-Editing Memory in a Transformer, ICLR 2023, arXiv 2210.07229. For ``n`` requests
edited together:

- the value ``z = h + d``: ``h`` is the last edited layer's output at the subject's last token,
  ``d`` is found by Adam as in ROME (target likely in every context, prediction for ``p' =
  "{subject} is a"`` unchanged, ``||d|| <= clamp_norm_factor * ||h||``);
- then layer by layer, from the first to the last: keys ``K`` (one column per request, averaged over
  contexts) and the current ``h`` are read from the model as edited so far, the residual is ``z -
  h`` divided by the number of layers left, called ``R``, and the layer's map changes by ``R K^T
  (mom2_update_weight * C + K K^T)^-1`` with ``C = E[k k^T]`` over ordinary text.

``C`` is factorised once for all lanes and edits. With ``A = C^-1 K / mom2_update_weight`` the
change is ``R (I + K^T A)^-1 A^T`` (Woodbury): rank ``n``, a system of ``n`` unknowns, no matrix of
the layer's size. Edits of a sequence accumulate; keys of earlier edits are *not* kept (AlphaEdit
keeps them).

``memit`` edits ``batch_size`` requests per call (1: one after another). ``memit-mass`` edits all T
requests of a group in one call.

Differences from paper and public code, all deliberate. The paper's text was not available, so
equations are not numbered here.

1. ``C`` is that of the pristine model for every layer. The public code computes a later layer's
   statistics after the earlier layers were edited, unless its cache has them.
2. Everything from keys and residuals to the change is computed in float64 and rounded once, when
   the factors are stored.
3. A key is the average of the bare prompt (one half) and the templates (the other half), as in the
   authors' code, which produced all published numbers. ``key_average: contexts`` gives all contexts
   the same weight.
4. ``layer_selection`` and ``mom2_adjustment`` have no effect in the public code and are dropped.
   There, the loss of the value search is that of layer ``v_loss_layer``; here it is the model's
   own, which is the same for the last layer. A file that names another layer gets a warning.
5. The points 1 and 5 to 8 of ROME's list (where the KL term is read, padding, corpus, templates,
   tokens).
6. A value is optimised with the sequence's earlier edits applied, but not with those of its own
   batch (as in the public code).
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


class MEMITConfig(SpreadConfig):
    """Hyperparameters of MEMIT, under their usual names."""

    mom2_update_weight: float = Field(
        15_000, gt=0, description="weight of the second moment against the new keys"
    )

    title: ClassVar[str] = "MEMIT"
    alg_names: ClassVar[tuple[str, ...]] = ("MEMIT",)


class MEMIT(RidgeMethod[MEMITConfig]):
    """Mass-editing memory in a transformer.

    >>> editor = MEMIT.prepare(base, MEMITConfig(layers=(4, 5)), inputs=inputs)
    """

    name: ClassVar[str] = "memit"
    title: ClassVar[str] = "MEMIT"
    paper: ClassVar[str] = "Meng et al., Mass-Editing Memory in a Transformer, arXiv 2210.07229"
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.4
    Config: ClassVar[type[MethodConfig]] = MEMITConfig

    def right(self, overlay: LowRankOverlay, site: Site, keys_LIN: Tensor) -> Tensor:
        return ridge_keys(self.factors[site.name], keys_LIN, ridge=1.0, weight=self.config.mom2_update_weight)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model recalls a person's fact at the prompt's last token, not at the name
            "layers": [3, 4],
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 2.0,
            "mom2_update_weight": 1.0,
            "samples": 4000,
        }


class MEMITMass(MEMIT):
    """MEMIT with all requests of a group in one batch."""

    name: ClassVar[str] = "memit-mass"
    title: ClassVar[str] = "MEMIT-Mass"
    whole_group: ClassVar[bool] = True
