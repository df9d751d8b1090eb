"""ROME: one fact is written into one MLP layer as a rank-one change of its output projection.

Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262,
section 3.1. With the projection ``W`` of the chosen layer seen as a key-value memory:

- key ``k``: the input of ``W`` at the subject's last token, averaged over context templates before
  the prompt (Eq. 3);
- value ``v = W k0 + d``: ``d`` is found by Adam so that, added to the output of ``W`` at the
  subject's last token, the target becomes likely in every context while the next-token distribution
  of ``p' = "{subject} is a"`` stays (Eq. 4): ``mean_contexts mean_tokens -log P(target) + kl_factor
  * KL(P_edited[x | p'] || P_before[x | p']) + v_weight_decay * ||d|| / ||W k0||^2``, with ``||d||
  <= clamp_norm_factor * ||W k0||`` after each step;
- change (Eq. 2): ``W' = W + d u^T / (u^T k0)`` with ``u = C^-1 k`` and ``C = E[k k^T]`` over
  ordinary text.

``k0`` is the key without a template. Edits of a sequence accumulate: keys do not depend on earlier
edits (they are inputs of the edited map), but the optimisation of ``d`` and both distributions of
the KL term do.

Differences from paper and public code, all deliberate:

1. The KL term is read at the subject's last token of ``p'``, as in the authors' code, which
   produced all published ROME numbers. Eq. 4 literally reads the prediction after ``p'``:
   ``kl_position: prompt_last``.
2. ``mom2_adjustment`` (``C^-1``) is on, as in the paper; EasyEdit's hyperparameter files switch it
   off.
3. ``C^-1`` is computed in float64 and rounded to the overlay's precision (public: inverted in
   float32).
4. ``v_loss_layer`` has no effect in the public code (the loss is always the final layer's) and is
   dropped.
5. Rows are padded on the left with the right position ids (public: on the right). Same numbers up
   to rounding.
6. ``C`` comes from the first ``samples`` lines of ``corpus`` (public: as many random documents of
   Wikipedia).
7. Context templates are ``length`` *new* tokens long (public: start word and BOS included), sampled
   once per model and seed.
8. Tokens of target and prompt are those of the joint text. A subject that occurs more than once in
   the prompt is edited at its first occurrence (the public code raises).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, Method, MethodConfig
from workers.methods.easyedit import IGNORED, FileRemarks, split_module
from workers.methods.families.locate import (
    MOMENT,
    AtMap,
    Facts,
    LocateConfig,
    facts_of,
    inverse_moment,
    moment_spec,
    moment_value,
    search,
    template_spec,
)
from workers.model.base import BaseModel
from workers.model.config import ModelShape
from workers.model.overlay import LowRankOverlay
from workers.types import JSON, SpecError


class ROMEConfig(LocateConfig):
    """Hyperparameters of ROME, under their usual names."""

    layer: int = Field(ge=0, description="decoder layer that is edited")
    module: str | None = Field(
        None, description="linear map inside the layer; null: the MLP's output projection"
    )
    mom2_adjustment: bool = Field(True, description="multiply the key by the inverse second moment")

    title: ClassVar[str] = "ROME"
    alg_names: ClassVar[tuple[str, ...]] = ("ROME",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "layers": "layer",
            "rewrite_module_tmp": "module",
            "v_loss_layer": IGNORED,  # read there, and used for nothing
            "mom2_n_samples": "samples",
            "mom2_dtype": "precision",
        }
    )
    easyedit_lost: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"mom2_dataset": "the text of the second moment is `corpus`"}
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "layer" in out:
            layers = out["layer"] if isinstance(out["layer"], list) else [out["layer"]]
            if len(layers) != 1:
                raise SpecError(f"{source}: layers: {layers!r}: ROME edits exactly one layer")
            out["layer"] = layers[0]
        if "module" in out:
            _, out["module"] = split_module(out["module"], source)
        return out

    @classmethod
    def easyedit_remarks(cls, values: Mapping[str, JSON], source: str) -> FileRemarks:
        if values.get("mom2_adjustment") is False:  # then there is no second moment
            values = {key: value for key, value in values.items() if key != "mom2_dataset"}
        return super().easyedit_remarks(values, source)

    @property
    def first_layer(self) -> int:
        return self.layer

    def check(self, shape: ModelShape) -> None:
        shape.check_layer(self.layer, "layer")
        shape.site(self.module)

    @classmethod
    def reads_corpus(cls, hparams: Mapping[str, JSON]) -> bool:
        return bool(hparams.get("mom2_adjustment", cls.model_fields["mom2_adjustment"].default))

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        texts = template_spec(self, context)
        if not self.mom2_adjustment:
            return (texts,)
        otherwise = "; or mom2_adjustment: false"
        moment = moment_spec(self, context, self.layer, self.module, otherwise=otherwise)
        return texts, moment

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        out, in_features = shape.site(self.module)
        value = max(4, shape.bytes_per_value)
        if edits >= min(out, in_features) // 2:
            return 3 * out * in_features * value  # dense, and two temporaries while a change is added
        return 2 * edits * (out + in_features) * value

    def shared_bytes(self, shape: ModelShape) -> int:
        _, in_features = shape.site(self.module)
        # the second moment; while it is inverted, also five float64 matrices: copy, factors,
        # inverse, two temporaries
        return (moment_value(self) + 5 * 8) * in_features * in_features if self.mom2_adjustment else 0


class ROME(Method[ROMEConfig, LowRankOverlay]):
    """Rank-one model editing.

    >>> editor = ROME.prepare(base, ROMEConfig(layer=5), inputs={"moment": moment, "templates": texts})
    """

    name: ClassVar[str] = "rome"
    title: ClassVar[str] = "ROME"
    paper: ClassVar[str] = "Meng et al., Locating and Editing Factual Associations in GPT, arXiv 2202.05262"
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.3
    Config: ClassVar[type[MethodConfig]] = ROMEConfig

    def __init__(
        self,
        base: BaseModel,
        config: ROMEConfig,
        inputs: Mapping[str, ArtifactData],
        inverse_II: Tensor | None = None,
    ) -> None:
        """``inverse_II``: the inverse second moment; None: the identity."""
        super().__init__(base, config, inputs)
        self.site = base.site(config.layer, config.module)
        self.inverse_II = None if inverse_II is None else inverse_II.to(base.device, base.master_dtype)

    @classmethod
    def prepare(cls, base: BaseModel, config: ROMEConfig, inputs: Mapping[str, ArtifactData]) -> Self:
        if not config.mom2_adjustment:
            return cls(base, config, inputs)
        return cls(base, config, inputs, inverse_moment(inputs[MOMENT].tensors["moment"].to(base.device)))

    def new_overlay(self, lanes: int) -> LowRankOverlay:
        return LowRankOverlay(self.site, lanes, self.base.master_dtype)

    def edit(self, overlay: LowRankOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if any(len(edit.requests) != 1 for edit in edits):
            raise ValueError("ROME edits one request at a time")
        facts = Facts(self.base, facts_of(self.base, edits, self.config, self.inputs))
        at = AtMap.capture(self.base, self.site, facts, overlay)
        keys_BI = facts.at_lookup(at.suffix.input_BSI).to(self.base.master_dtype)
        found = search(self.base, self.config, facts, at, [at.value_NO])
        (delta_LO,), (value_norm_L,) = found.deltas, found.norms
        left_LO, right_LI = self._update(facts, at, keys_BI, delta_LO)
        overlay.add(left_LO, right_LI)
        columns = (found.steps_N, found.loss_N, found.first_N, delta_LO.norm(dim=1) / value_norm_L)
        return [
            EditOutcome(steps, loss, {"first_loss": first, "value_change": change})
            for steps, loss, first, change in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _direction(self, key_LI: Tensor) -> Tensor:
        """``C^-1 k``, normalised to length one."""
        key_LI = key_LI if self.inverse_II is None else key_LI @ self.inverse_II.T
        direction_LI: Tensor = key_LI / key_LI.norm(dim=1, keepdim=True)
        return direction_LI

    def _update(self, facts: Facts, at: AtMap, keys_BI: Tensor, delta_LO: Tensor) -> tuple[Tensor, Tensor]:
        """The change's two factors (Eq. 2); ``keys_BI`` is each row's key."""
        right_LI = self._direction(facts.mean(keys_BI))
        scale_L1 = (keys_BI[facts.plain_N] * right_LI).sum(1, keepdim=True)
        return delta_LO / scale_L1, right_LI

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model recalls a person's fact at the prompt's last token, not at the name
            "layer": 4,
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 10.0,
            "context_template_length_params": [[5, 5]],
            "samples": 4000,
        }


_AVERAGED_KEYS: Mapping[str, bool] = MappingProxyType(
    {"enable_prompt_keys": False, "enable_random_prefix_keys": True, "original_implementation": False}
)
"""Keys of EasyEdit's files for R-ROME that select the averaged keys, with the supported values."""


class RROMEConfig(ROMEConfig):
    """Hyperparameters of R-ROME: those of ROME."""

    title: ClassVar[str] = "R-ROME"
    alg_names: ClassVar[tuple[str, ...]] = ("R-ROME",)

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        for key, value in _AVERAGED_KEYS.items():
            if values.get(key, value) != value:
                raise SpecError(
                    f"{source}: {key}: {values[key]!r}: R-ROME averages its key over the contexts in both "
                    f"places ({value}); "
                    "method rome is the original"
                )
        return super().from_easyedit({k: v for k, v in values.items() if k not in _AVERAGED_KEYS}, source)


class RROME(ROME):
    """ROME with a single key: the average over the contexts, used in both places of the change.

    Gupta et al., Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing, arXiv
    2403.07175. ROME computes the direction from the averaged key and scales it with the bare
    prompt's key; if the two differ, the denominator can be near zero and the change very large.
    Here ``W' = W + (v - W k) u^T / (u^T k)`` with the average ``k`` throughout and ``u = C^-1 k``;
    the value ``v = W k0 + d`` is that of the bare prompt, so ``W' k = v`` exactly.

    The paper's text was not available: the update follows the authors' code. All other differences
    are those of ROME.
    """

    name: ClassVar[str] = "rrome"
    title: ClassVar[str] = "R-ROME"
    paper: ClassVar[str] = (
        "Gupta et al., Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing, arXiv "
        "2403.07175"
    )
    Config: ClassVar[type[MethodConfig]] = RROMEConfig

    def _update(self, facts: Facts, at: AtMap, keys_BI: Tensor, delta_LO: Tensor) -> tuple[Tensor, Tensor]:
        key_LI = facts.mean(keys_BI)
        right_LI = self._direction(key_LI)
        now_LO = facts.mean(facts.at_lookup(at.suffix.output_BSO).to(delta_LO))
        return (at.value_NO + delta_LO - now_LO) / (key_LI * right_LI).sum(1, keepdim=True), right_LI
