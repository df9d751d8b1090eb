"""MALMEN: many requests in one change, the least-squares fit of what a trained network wants to change for each token.

Tan et al., Massive Editing for Large Language Models via Meta Learning, ICLR 2024, arXiv 2311.04661. For every map the requests
of a batch give keys ``u_n`` (what enters the map) and gradients ``d_n`` (of the loss, by its answer) at the tokens that predict
the answers. A network gives another pair ``(u~_n, d~_n)``, and the value of key ``u_n`` is to move by

    ``v_n = -a (u~_n . u_n) d~_n``        with a learned step size ``a`` per map.

A sum of rank-one changes would let them disturb each other. The change is the one that fits all of them best (normal equation):

    ``min_S sum_n |S u_n - v_n|^2 + l |S|^2,    S = V U^T (U U^T + l I)^-1``     with columns ``v_n``, ``u_n``

and a learned ``l > 0`` per map (its logarithm is learned, starting at 0). Networks and training are MEND's, but for the place of
scale and shift, for batches of ``schedule.batch_size`` requests as one edit, and for gradients that flow through the normal
equation.

Requests of one call are one fit; a later call fits on top, at the edited weights.

Differences from paper and public code (the authors'; EasyEdit's is derived from it), all deliberate:

1. The normal equation is solved in float64, in the smaller of its two forms (tokens or inputs). Public: float32, inputs.
2. Training differentiates through the solution in one pass. The authors' code finds the same gradient in two passes, for memory.
3. The loss of a batch is the sum of its requests' mean token losses, so that a request's factors are what they are alone. The
   authors' code takes the mean over all answer tokens of a mini-batch; the normalisation makes up for such a factor.
4. The training loss asks by the prompt or a rephrase, drawn; ``train_on: prompt`` by the prompt only. Public: a rephrase, always.
5. ``lr_lr`` moves the step sizes. Public: ``meta_lr`` moves everything.
6. The running statistics take a training batch in before it is normalised, as the public code does; they never take in an edit
   (the authors' code updates them when it validates, too).

The paper's equation numbers were not checked against its text, and there are no recorded numbers to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from workers.artifacts import ArtifactData, ArtifactSpec
from workers.hypernet import (
    Factors,
    Hypernet,
    Objective,
    Pair,
    SingleEditTrainer,
    edit_by_fit,
    fit_keys,
    fitted,
    hypernet_sites,
    site_shapes,
    split_inner_params,
    token_choice,
)
from workers.methods.base import IGNORED, EditOutcome, LaneEdit, Method, MethodConfig, split_module
from workers.models import BaseModel, ModelConfig, ModelFingerprint, ModelShape
from workers.overlay import DenseOverlay, Overlay
from workers.pretrain import PRETRAINED, Schedule, TrainingSource, pretrained
from workers.types import JSON, EditRequest, SpecError

_HPARAMS = (
    *("layers", "modules", "rank", "n_blocks", "tokens"),
    *("lr", "meta_lr", "lr_lr", "gen_coef", "loc_coef", "max_grad_norm", "train_on"),
)


class MALMENConfig(MethodConfig):
    """Hyperparameters of MALMEN."""

    layers: tuple[int, ...] = Field(min_length=1, description="decoder layers whose maps are edited")
    modules: tuple[str, ...] = Field((), description="linear maps inside each layer; none: the MLP's output projection")
    rank: int = Field(1920, ge=1, description="rank of the networks' maps")
    n_blocks: int = Field(2, ge=1, description="blocks of a network")
    tokens: Literal["answer", "all"] = Field(
        "answer", description="answer: keys are the tokens that predict the answer; all: every token of the request"
    )
    lr: float = Field(1e-6, gt=0, description="first value of the learned step sizes")
    meta_lr: float = Field(1e-5, gt=0, description="Adam's step size for networks and lambda")
    lr_lr: float = Field(1e-5, gt=0, description="Adam's step size for the learned step sizes")
    gen_coef: float = Field(1.0, ge=0, description="weight of the edited answer in the training loss")
    loc_coef: float = Field(1.0, ge=0, description="weight of what has to stay in the training loss")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of a training gradient")
    train_on: Literal["rephrase", "prompt"] = Field(
        "rephrase", description="rephrase: prompt or a rephrase asks for the new answer; prompt: the prompt only"
    )
    schedule: Schedule = Field(
        Schedule(steps=10_000, batch_size=32), description="length of the training; its batches are edited as one"
    )

    alg_names: ClassVar[tuple[str, ...]] = ("MALMEN",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **dict.fromkeys(
                (
                    *("archive", "model_class", "seed", "silent", "max_epochs", "log_interval", "eval_log_interval"),
                    *(
                        "final_eval",
                        "val_interval",
                        "early_stop_patience",
                        "early_stop_key",
                        "eval_only",
                        "debug",
                        "save",
                    ),
                    *(
                        "val_batch_size",
                        "val_steps",
                        "editor_batch_size",
                        "half",
                        "opt",
                        "alg",
                        "model_save_pt",
                        "verbose",
                    ),
                ),
                IGNORED,
            ),
            **{key: key for key in ("inner_params", "n_edits", "max_iters", "dropout", "train_base", "no_grad_layers")},
            "token": "tokens",
        }
    )

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError("layers must be distinct and not negative")
        return layers

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        for key in ("dropout", "train_base", "no_grad_layers"):
            if out.pop(key, None):
                raise SpecError(f"{source}: {key}: {values[key]!r} is a variant that is not here; expected it off")
        if "inner_params" in out:
            out["layers"], out["modules"] = split_inner_params(out.pop("inner_params"), split_module, source)
        if "tokens" in out:
            out["tokens"] = token_choice(out["tokens"], source)
        if "meta_lr" in out:
            out["lr_lr"] = out["meta_lr"]  # one step size for both there
        out["schedule"] = {"steps": out.pop("max_iters", 10_000), "batch_size": out.pop("n_edits", 32)}
        return out


class MALMEN(Method[MALMENConfig]):
    """All requests of a call in one least-squares fit per map.

    >>> editor = MALMEN.prepare(base, MALMENConfig(layers=(4, 5), rank=64), {"pretrained": trained})
    """

    name: ClassVar[str] = "malmen"
    title: ClassVar[str] = "MALMEN"
    paper: ClassVar[str] = "Tan et al., Massive Editing for LLMs via Meta Learning, ICLR 2024, arXiv 2311.04661"
    version: ClassVar[int] = 1
    needs_pretraining: ClassVar[bool] = True
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.1
    Config: ClassVar[type[MethodConfig]] = MALMENConfig

    def __init__(self, base: BaseModel, config: MALMENConfig, inputs: Mapping[str, ArtifactData]) -> None:
        super().__init__(base, config, inputs)
        self.sites = hypernet_sites(base, config.layers, config.modules)
        self.net = _network(base, config.model_dump(mode="json"), None).of_precision(base)
        self.net.restore(inputs[PRETRAINED].tensors)
        self.net.requires_grad_(False)

    def new_overlay(self, lanes: int) -> DenseOverlay:
        return DenseOverlay(self.sites, lanes, self.base.master_dtype)

    def edit(self, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if not isinstance(overlay, DenseOverlay):
            raise TypeError(f"MALMEN edits a DenseOverlay, not a {type(overlay).__name__}")
        losses = edit_by_fit(self.base, self.net, overlay, [edit.requests for edit in edits], self.config.tokens)
        return [EditOutcome(1, loss) for loss in losses]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            "layers": [4, 5],
            "rank": 64,
            "lr": 1e-2,
            "meta_lr": 3e-4,
            "lr_lr": 1e-3,
            "schedule": {"steps": 300, "batch_size": 10},
        }

    @classmethod
    def check(cls, config: Any, shape: ModelShape) -> None:
        site_shapes(shape, config.layers, config.modules)

    @classmethod
    def artifacts(
        cls,
        config: Any,
        fingerprint: ModelFingerprint,
        model: ModelConfig,
        seed: int,
        training: TrainingSource | None = None,
    ) -> tuple[ArtifactSpec, ...]:
        values = config.model_dump(mode="json")
        hparams = {key: values[key] for key in _HPARAMS}
        return (pretrained(cls, hparams, config.schedule, fingerprint, model, training),)

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> MALMENTrainer:
        trainer = MALMENTrainer(
            base,
            hypernet_sites(base, hparams["layers"], hparams["modules"]),
            _network(base, hparams, generator),
            Objective(hparams["gen_coef"], hparams["loc_coef"], hparams["train_on"]),
            hparams["meta_lr"],
            hparams["lr_lr"],
            hparams["max_grad_norm"],
        )
        trainer.tokens = hparams["tokens"]
        return trainer

    @classmethod
    def overlay_bytes(cls, config: Any, shape: ModelShape, edits: int) -> int:
        copies = 3  # weight, its change, one temporary
        sizes = sum(out * into for out, into in site_shapes(shape, config.layers, config.modules))
        return copies * sizes * max(4, shape.bytes_per_value)


class MALMENTrainer(SingleEditTrainer):
    """The requests of a step are one edit."""

    tokens: str = "answer"

    def lanes(self, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        return [list(requests)]

    def chosen(self, factors: Sequence[Factors]) -> list[Factors]:
        return fit_keys(factors, self.tokens)

    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        return fitted(self.net, factors)


def _network(base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None) -> Hypernet:
    sites = hypernet_sites(base, hparams["layers"], hparams["modules"])
    shapes = [site.shape for site in sites]
    return Hypernet(shapes, hparams["rank"], hparams["n_blocks"], hparams["lr"], "outside", generator)
