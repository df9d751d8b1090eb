"""Configuration of WISE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workers.artifacts.base import ArtifactSpec
from workers.artifacts.templates import KIND as TEMPLATES
from workers.data.needs import UNRELATED, Need
from workers.methods.base import MOST_STEPS, ArtifactContext, Deviations, MethodConfig
from workers.methods.easyedit import IGNORED, take_inner_param
from workers.model.config import ModelShape
from workers.types import JSON, SpecError

MergeRule = Literal[
    "ties", "magnitude_norm", "magnitude", "sign", "dare_ties", "dare_linear", "linear", "slerp"
]

MERGED_SHARE = 0.6
"""Weight of the already merged memory in a later merge of WISE-Merge (the public code's
constant)."""

TEMPLATE_STARTS = ("I", "You", "Because", "Yes", "Q: ")


class WISEDeviations(Deviations):
    """Switches to the public code, beside ``routing`` and ``activation``."""

    public_margin: bool = Field(False, description="parity: average margin terms over violating rows only")
    public_loss_mask: bool = Field(False, description="parity: divide the target loss by one token more")
    public_decay: bool = Field(False, description="parity: decay weights outside the mask, too")
    public_positions: bool = Field(
        False, description="parity: position ids count padding columns while editing"
    )
    public_dare: bool = Field(False, description="parity: dare_linear does not rescale")


class WISEConfig(MethodConfig):
    """Hyperparameters of WISE-Merge and WISE-Retrieve."""

    layer: int = Field(ge=0, description="decoder layer that gets the side memory")
    module: str | None = Field(
        None, description="linear map inside the layer; null: the MLP's output projection"
    )
    lr: float = Field(1.0, gt=0, description="step size of gradient descent")
    n_iter: int = Field(70, ge=1, le=MOST_STEPS, description="optimiser steps of one edit at most")
    weight_decay: float = Field(
        1e-5, ge=0, description="L2 decay added to the gradient (the public code's constant)"
    )
    mask_ratio: float = Field(0.2, gt=0, le=1, description="share of weights a side memory may change")
    norm_constraint: float | None = Field(
        1.0, gt=0, description="largest change of a single weight; null: unconstrained"
    )
    alpha: float = Field(5.0, ge=0, description="margin: activation an unrelated sentence may reach")
    beta: float = Field(20.0, ge=0, description="margin: activation an edit has to reach")
    gamma: float = Field(10.0, ge=0, description="margin: least distance between the two")
    act_ratio: float = Field(
        0.88, gt=0, description="threshold as a share of the smallest activation of the edits"
    )
    retrieve: bool = Field(True, description="true: WISE-Retrieve, several memories; false: WISE-Merge, one")
    save_freq: int = Field(500, ge=1, description="edits after which a side memory is saved")
    merge_freq: int = Field(1000, ge=1, description="edits after which the saved memories are merged")
    merge_alg: MergeRule = Field("ties", description="how memories are merged")
    merge_weight: float = Field(1.0, gt=0, description="weight of the merged change, shared by the memories")
    density: float = Field(0.53, gt=0, le=1, description="share of a change that trimming keeps")
    context_template_length_params: tuple[tuple[int, int], ...] = Field(
        ((5, 5), (10, 5)), description="[length in tokens, how many templates] pairs; five templates each"
    )
    replay: bool = Field(
        False, description="replaying earlier edits (appendix B.3): not supported, must be false"
    )
    routing: Literal["prompt", "all_tokens"] = Field(
        "prompt", description="tokens whose activations are averaged"
    )
    activation: Literal["difference", "public"] = Field(
        "difference", description="|A(x)D|, or behind the MLP's function"
    )
    deviations: WISEDeviations = Field(
        WISEDeviations(), description="single switches to the public code, for parity tests"
    )

    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType(
        {
            "routing": "all_tokens",
            "activation": "public",
            "deviations": dict.fromkeys(WISEDeviations.model_fields, True),
        }
    )
    alg_names: ClassVar[tuple[str, ...]] = ("WISE",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "edit_lr": "lr",
            "inner_params": "module",
            "weights": "merge_weight",
            "densities": "density",
            "hidden_act": IGNORED,  # read from the model
        }
    )
    easyedit_lost: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"sequential_edit": "how many edits follow one another is the grid's T"}
    )

    @field_validator("context_template_length_params")
    @classmethod
    def _fives(cls, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for length, count in pairs:
            if length < 1 or count != len(TEMPLATE_STARTS):
                raise ValueError(
                    f"[{length}, {count}]: needs a length of 1 or more and {len(TEMPLATE_STARTS)} "
                    f"templates, one for each "
                    "first word: they are written greedily, so more would be repetitions"
                )
        return pairs

    @field_validator("replay")
    @classmethod
    def _no_replay(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "replaying earlier edits (appendix B.3 of the paper) is not supported; choices: false"
            )
        return value

    @model_validator(mode="after")
    def _whole_merges(self) -> Self:
        if self.merge_freq % self.save_freq:
            raise ValueError(f"merge_freq {self.merge_freq} must be a multiple of save_freq {self.save_freq}")
        return self

    @property
    def memories_per_merge(self) -> int:
        return self.merge_freq // self.save_freq

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        rest = dict(values)
        objective = rest.pop("objective_optimization", "only_label")
        if objective != "only_label":
            raise SpecError(
                f"{source}: objective_optimization: {objective!r} is not supported; choices: 'only_label'"
            )
        margin = rest.pop("act_margin", None)
        out = super().from_easyedit(rest, source)
        if margin is not None:
            if not isinstance(margin, list) or len(margin) != 3:
                raise SpecError(f"{source}: act_margin: expected [alpha, beta, gamma], found {margin!r}")
            out["alpha"], out["beta"], out["gamma"] = margin
        take_inner_param(out, source)
        return out

    @property
    def first_layer(self) -> int:
        return self.layer

    @property
    def template_tokens(self) -> int:
        return max((length for length, _ in self.context_template_length_params), default=0)

    @property
    def rows_per_edit(self) -> int:
        return 2 + sum(count for _, count in self.context_template_length_params)

    def check(self, shape: ModelShape) -> None:
        shape.check_layer(self.layer, "layer")
        shape.site(self.module)

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        """The context templates. They are generated greedily, so all seeds share them."""
        recipe: dict[str, JSON] = {
            **context.model_recipe,
            "starts": list(TEMPLATE_STARTS),
            "lengths": [
                [n, count // len(TEMPLATE_STARTS)] for n, count in self.context_template_length_params
            ],
            "joiner": " ",
            "top_k": 0,
            "seed": 0,
        }
        return (ArtifactSpec(name="templates", kind=TEMPLATES, recipe=recipe),)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (UNRELATED,)

    @property
    def uses_seed(self) -> bool:
        return True

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        out, in_features = shape.site(self.module)
        size = out * in_features * max(4, shape.bytes_per_value)
        waiting = min(self.memories_per_merge - 1, edits // self.save_freq)
        merged = edits // self.merge_freq if self.retrieve else min(1, edits // self.merge_freq)
        # change, gradient, two temporaries of a step, the mask as bytes, and the saved memories
        return int(size * (4 + waiting + merged) + out * in_features)
