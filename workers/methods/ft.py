"""FT: fine-tuning of a few linear maps on the request itself, with an optional box around the
starting weights.

The weights ``W`` of the chosen maps minimise, by Adam with early stopping,

- ``target_new`` (FT-M): the mean over the target's tokens of ``-log P(target_j | prompt,
  target_<j)``;
- ``prompt_last`` (FT-L): the mean over the target's tokens of ``-log P(target_j | prompt)``, every
  token scored at the last prompt position, as in the code published with ROME (its "FT"/"FT+L"
  baselines);

after every step ``W`` is clamped to ``W0 - c <= W <= W0 + c`` if ``norm_constraint`` is ``c``: the
projection onto the L-infinity ball of Zhu et al., Modifying Memories in Transformer Models, arXiv
2012.00363 (constrained fine-tuning). The names FT-L and FT-M are those of Zhang et al., arXiv
2401.01286.

Differences from paper and public code, all deliberate:

1. ``W0`` is the pristine weight, as in Zhu et al., for the whole sequence of edits. The public code
   clamps around the weight before each edit, so that a sequence of T edits may drift by ``T * c``:
   ``constraint_around: edit``.
2. Target tokens are those of ``prompt + " " + target`` tokenised jointly. The public FT-L tokenises
   the target alone: a tokenizer that adds BOS then makes BOS a target (golden README, fault 7):
   ``deviations: {public_bos: true}``.
3. Padding is never a target (the public FT-L scores padding tokens in batches).
4. Only the weight is trained. Where a public YAML names a module without ``.weight`` (gpt2-xl,
   gpt-j), the public code trains its bias too.
5. ``kl_factor`` is in every public YAML, but no code reads it; only 0 is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from workers.data.scripts import joiner_of
from workers.inner_loop.finetune import Example, fine_tune, with_target
from workers.inner_loop.optim import Box
from workers.methods.base import MOST_STEPS, Deviations, EditOutcome, LaneEdit, Layers, Method, MethodConfig
from workers.methods.easyedit import IGNORED, split_module
from workers.model.base import BaseModel
from workers.model.batch import Encoded
from workers.model.config import ModelShape
from workers.model.overlay import DenseOverlay
from workers.types import JSON, EditRequest, SpecError

_CHOOSE_OBJECTIVE = (
    "EasyEdit's files do, and the code for which files without it were written (ROME's and AlphaEdit's "
    "repositories) is FT-L; give `objective` under hparams, or `objective_optimization` in the file: "
    "'prompt_last' (FT-L) or 'target_new' (FT-M)"
)


class FTDeviations(Deviations):
    """Switches to the public code."""

    public_bos: bool = Field(
        False, description="prompt_last: tokenise the target alone, BOS included (public code)"
    )


class FTConfig(MethodConfig):
    """Hyperparameters of FT-L and FT-M."""

    layers: Layers = Field(min_length=1, description="decoder layers whose map is trained")
    module: str | None = Field(
        None, description="linear map inside the layer; null: the MLP's output projection"
    )
    objective: Literal["target_new", "prompt_last"] = Field(
        "target_new",
        description="target_new: FT-M; prompt_last: FT-L, every token at the last prompt position",
    )
    num_steps: int = Field(25, ge=1, le=MOST_STEPS, description="optimiser steps at most")
    lr: float = Field(5e-4, gt=0, description="Adam's step size")
    weight_decay: float = Field(0.0, ge=0, description="L2 decay added to the gradient")
    norm_constraint: float | None = Field(
        None, gt=0, description="largest change of one weight; null: no constraint"
    )
    constraint_around: Literal["base", "edit"] = Field(
        "base",
        description="base: the pristine weight (paper); edit: the weight before each edit (public code)",
    )
    deviations: FTDeviations = Field(
        FTDeviations(), description="single switches to the public code, for parity tests"
    )

    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType(
        {"constraint_around": "edit", "deviations": {"public_bos": True}}
    )
    alg_names: ClassVar[tuple[str, ...]] = ("FT",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"objective_optimization": "objective", "rewrite_module_tmp": "module", "kl_factor": IGNORED}
    )
    easyedit_required: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType(
        {
            "objective": (
                "objective_optimization",
                _CHOOSE_OBJECTIVE,
            )
        }
    )

    @field_validator("norm_constraint", mode="before")
    @classmethod
    def _no_bool(cls, value: JSON) -> JSON:
        if isinstance(value, bool):
            raise ValueError("expected a number or null")
        return value

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        if values.get("kl_factor") not in (None, 0):
            raise SpecError(f"{source}: kl_factor: {values['kl_factor']!r} has no effect in FT; expected 0")
        out = super().from_easyedit(values, source)
        if out.get("norm_constraint") is False:
            out["norm_constraint"] = None
        if "module" in out:
            _, out["module"] = split_module(out["module"], source)
        return out

    @property
    def first_layer(self) -> int:
        return min(self.layers)

    def check(self, shape: ModelShape) -> None:
        for layer in self.layers:
            shape.check_layer(layer, "layers")
        shape.site(self.module)

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        out, in_features = shape.site(self.module)
        copies = 4 + 2  # weight, gradient, two moments; temporaries of one step
        return len(self.layers) * out * in_features * max(4, shape.bytes_per_value) * copies


class FT(Method[FTConfig, DenseOverlay]):
    """Fine-tuning, lane by lane on one shared forward and backward.

    >>> editor = FT.prepare(base, FTConfig(layers=(3,), objective="prompt_last"), inputs={})
    """

    name: ClassVar[str] = "ft"
    title: ClassVar[str] = "FT"
    paper: ClassVar[str] = "Zhu et al., Modifying Memories in Transformer Models, arXiv 2012.00363"
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    Config: ClassVar[type[MethodConfig]] = FTConfig

    def new_overlay(self, lanes: int) -> DenseOverlay:
        sites = [self.base.site(layer, self.config.module) for layer in self.config.layers]
        return DenseOverlay(sites, lanes, self.base.master_dtype)

    def edit(self, overlay: DenseOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        config = self.config
        found = fine_tune(
            self.base,
            overlay,
            [edit.requests for edit in edits],
            self._example,
            num_steps=config.num_steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
            boxes=self._boxes(overlay),
        )
        return [
            EditOutcome(count, loss, {"first_loss": first})
            for count, loss, first in zip(
                found.steps_L.tolist(), found.loss_L.tolist(), found.first_L.tolist(), strict=True
            )
        ]

    def _example(self, base: BaseModel, request: EditRequest) -> Example:
        """The sequence to run and the target tokens to score."""
        if self.config.objective == "target_new":
            return with_target(base, request)
        joiner = joiner_of(request, request.prompt)
        # raises if the target adds no token
        pair = base.encoder.pair(request.prompt, request.target_new, joiner)
        prompt = base.encoder.prompt(request.prompt)
        alone = f"{joiner}{request.target_new}"
        target = base.encoder.text(alone) if self.config.deviations.public_bos else pair.target
        return Example(Encoded(prompt, len(prompt)), target, len(prompt) - 1, step=0)

    def _boxes(self, overlay: DenseOverlay) -> list[Box]:
        """Limits of each trained map; empty without a constraint."""
        bound = self.config.norm_constraint
        if bound is None:
            return []
        if self.config.constraint_around == "edit":
            return [Box(w.clone(), bound) for w in overlay.weights_LOI.values()]
        return [Box(site.weight_OI, bound) for site in overlay.sites]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {"layers": [3], "objective": "target_new", "lr": 1e-3, "num_steps": 25}
