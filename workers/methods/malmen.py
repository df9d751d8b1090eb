"""MALMEN: many requests in one change, the least-squares fit to the changes that a trained network
gives for each token.

Tan et al., Massive Editing for Large Language Models via Meta Learning, ICLR 2024, arXiv
2311.04661. For every map the requests of a batch give keys ``u_n`` (inputs of the map) and
gradients ``d_n`` (of the loss with respect to its output) at the tokens that predict the answers. A
network maps them to a new pair ``(u~_n, d~_n)``, and the output for key ``u_n`` should change by

    ``v_n = -a (u~_n . u_n) d~_n``        with a learned step size ``a`` per map.

In a sum of rank-one changes they would interfere. The change is the best fit to all of them (normal
equation):

    ``min_S sum_n |S u_n - v_n|^2 + l |S|^2,    S = V U^T (U U^T + l I)^-1``     with columns ``v_n``, ``u_n``

and a learned ``l > 0`` per map (its logarithm is learned, starting at 0). Networks and training are
those of MEND, except for the place of scale and shift, batches of ``schedule.batch_size`` requests
as one edit, and gradients that flow through the normal equation.

Requests of one call are one fit; a later call adds its own fit, computed at the edited weights.

Differences from paper and public code (the authors'; EasyEdit's is derived from it), all
deliberate:

1. The normal equation is solved in float64, in the smaller of its two forms (tokens or inputs).
   Public: float32, inputs.
2. Training differentiates through the solution in one pass. The authors' code computes the same
   gradient in two passes, to save memory.
3. The loss of a batch is the sum of its requests' mean token losses, so that a request has the same
   factors as alone. The authors' code takes the mean over all answer tokens of a mini-batch; the
   normalisation removes such a factor.
4. The training loss uses the prompt or a rephrase, drawn at random; with ``train_on: prompt``, only
   the prompt. Public: always a rephrase.
5. ``lr_lr`` is the learning rate of the step sizes. Public: ``meta_lr`` is used for everything.
6. The running statistics are updated with a training batch before it is normalised, as in the
   public code; edits never update them (the authors' code also updates them in validation).

The paper's equation numbers were not checked against its text, and there are no recorded results of
the public code to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field

from workers.artifacts.pretrain import TrainingSchedule
from workers.methods.base import MethodConfig
from workers.methods.easyedit import IGNORED, TRAINER_KEYS, TRAINER_LOST, TRAINER_OFF
from workers.methods.families.hypernet import (
    Factors,
    Hypernet,
    HypernetConfig,
    HypernetMethod,
    Pair,
    fit_keys,
    fitted,
    hypernet_sites,
    token_choice,
)
from workers.methods.families.hypernet_training import Objective, SingleEditTrainer
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay
from workers.types import JSON, EditRequest, SpecError


class MALMENConfig(HypernetConfig):
    """Hyperparameters of MALMEN."""

    n_blocks: int = Field(2, ge=1, le=100, description="blocks of a network")
    tokens: Literal["answer", "all"] = Field(
        "answer",
        description="answer: keys are the tokens that predict the answer; all: every token of the request",
    )
    lr: float = Field(1e-6, gt=0, description="first value of the learned step sizes")
    meta_lr: float = Field(1e-5, gt=0, description="Adam's step size for networks and lambda")
    lr_lr: float = Field(1e-5, gt=0, description="Adam's step size for the learned step sizes")
    gen_coef: float = Field(1.0, ge=0, description="weight of the edited answer in the training loss")
    loc_coef: float = Field(1.0, ge=0, description="weight of what has to stay in the training loss")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of a training gradient")
    train_on: Literal["rephrase", "prompt"] = Field(
        "rephrase",
        description="rephrase: prompt or a rephrase asks for the new answer; prompt: the prompt only",
    )
    schedule: TrainingSchedule = Field(
        TrainingSchedule(steps=10_000, batch_size=32),
        description="length of the training; its batches are edited as one",
    )

    method: ClassVar[str] = "malmen"
    learnt: ClassVar[tuple[str, ...]] = (
        *("layers", "modules", "rank", "n_blocks", "tokens"),
        *("lr", "meta_lr", "lr_lr", "gen_coef", "loc_coef", "max_grad_norm", "train_on"),
    )
    alg_names: ClassVar[tuple[str, ...]] = ("MALMEN",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **TRAINER_KEYS,
            "editor_batch_size": IGNORED,
            **{
                key: key
                for key in ("inner_params", "n_edits", "max_iters", "dropout", "train_base", "no_grad_layers")
            },
            "token": "tokens",
        }
    )
    easyedit_off: ClassVar[Mapping[str, tuple[JSON, ...]]] = TRAINER_OFF
    easyedit_lost: ClassVar[Mapping[str, str]] = TRAINER_LOST

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        for key in ("dropout", "train_base", "no_grad_layers"):
            if out.pop(key, None):
                raise SpecError(
                    f"{source}: {key}: {values[key]!r} is a variant that is not here; expected it off"
                )
        if "tokens" in out:
            out["tokens"] = token_choice(out["tokens"], source)
        if "meta_lr" in out:
            out["lr_lr"] = out["meta_lr"]  # the public code has one learning rate for both
        out["schedule"] = {"steps": out.pop("max_iters", 10_000), "batch_size": out.pop("n_edits", 32)}
        return out

    @property
    def blocks(self) -> int:
        return self.n_blocks


class MALMEN(HypernetMethod[MALMENConfig, DenseOverlay]):
    """All requests of a call in one least-squares fit per map.

    >>> editor = MALMEN.prepare(base, MALMENConfig(layers=(4, 5), rank=64), {"pretrained": trained})
    """

    name: ClassVar[str] = "malmen"
    title: ClassVar[str] = "MALMEN"
    paper: ClassVar[str] = (
        "Tan et al., Massive Editing for LLMs via Meta Learning, ICLR 2024, arXiv 2311.04661"
    )
    version: ClassVar[int] = 1
    Config: ClassVar[type[MethodConfig]] = MALMENConfig

    @classmethod
    def network(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None
    ) -> Hypernet:
        shapes = [site.shape for site in hypernet_sites(base, hparams["layers"], hparams["modules"])]
        return Hypernet(shapes, hparams["rank"], hparams["n_blocks"], hparams["lr"], "outside", generator)

    def new_overlay(self, lanes: int) -> DenseOverlay:
        return DenseOverlay(self.sites, lanes, self.base.master_dtype)

    def changes(self, factors: Sequence[Factors], overlay: DenseOverlay) -> list[Pair]:
        return fitted(self.net, fit_keys(factors, self.config.tokens))

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
    def trainer(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator
    ) -> MALMENTrainer:
        trainer = MALMENTrainer(
            base,
            hypernet_sites(base, hparams["layers"], hparams["modules"]),
            cls.network(base, hparams, generator),
            Objective(hparams["gen_coef"], hparams["loc_coef"], hparams["train_on"]),
            hparams["meta_lr"],
            hparams["lr_lr"],
            hparams["max_grad_norm"],
        )
        trainer.tokens = hparams["tokens"]
        return trainer


class MALMENTrainer(SingleEditTrainer):
    """Trainer where the requests of a step are one edit."""

    tokens: str = "answer"

    def lanes(self, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        return [list(requests)]

    def chosen(self, factors: Sequence[Factors]) -> list[Factors]:
        return fit_keys(factors, self.tokens)

    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        return fitted(self.net, factors)
