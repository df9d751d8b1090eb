"""MEND: a trained network maps the gradient of one request to a weight change that edits the fact
and keeps other predictions.

Mitchell et al., Fast Model Editing at Scale, ICLR 2022, arXiv 2110.11309. The gradient of the
request's loss with respect to a weight ``W`` is ``sum_n d_n u_n^T`` over tokens ``n``, with ``u_n``
the map's input and ``d_n`` the gradient of its output. The network maps each pair to a new pair
``(u~_n, d~_n)``, and

    ``W' = W - a sum_n d~_n u~_n^T``    with a learned step size ``a`` per map.

The network (two residual blocks of low rank, identity at first, shared by maps of one shape with a
scale and a shift for each) takes the pair, normalised by running statistics of the training. It is
trained on ``cedit * -log p'(y | x') + cloc * KL(p(. | x_loc) || p'(. | x_loc))``, where ``x'`` is
an equivalent of the edited sentence. Gradients do not flow into its inputs.

A later edit of a sequence takes its gradient at the edited weights; its change is added to them.
Changes of the requests of one batch are computed at the same weights and added up.

Differences from paper and public code (EasyEdit; golden README, point 12), all deliberate:

1. ``x'`` is drawn from the prompt and the rephrases of a request, as the paper's equivalence set.
   EasyEdit's trainer never uses a rephrase: ``train_on: prompt``.
2. A positive ``edit_lr`` descends, as in the paper's formula. EasyEdit adds the change, so that the
   ``1e-4`` of its files ascends at first.
3. The running statistics are part of the state: continued training continues them. EasyEdit resets
   them.
4. ``lr_lr`` is the step size of the learned step sizes. In EasyEdit it has no effect (``lr`` is
   used for them).
5. The answer's tokens are those of the joint text. EasyEdit's labels begin with BOS if the
   tokenizer adds one: ``deviations: {public_bos: true}``.
6. The loss of a batch is the sum of its requests' losses, so that a request has the same factors as
   alone; padding is never a target. EasyEdit takes the mean over all label tokens, padding
   included.
7. The requests of a training step are separate edits, in one batch (EasyEdit: ``accumulate_bs``
   edits one after another); their tokens enter the statistics together, before any of them is
   normalised.

The paper's equation numbers were not checked against its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field

from workers.artifacts.pretrain import TrainingSchedule
from workers.methods.base import Deviations, MethodConfig
from workers.methods.easyedit import IGNORED, TRAINER_KEYS, TRAINER_LOST, TRAINER_OFF, take_count
from workers.methods.families.hypernet import (
    Factors,
    Hypernet,
    HypernetConfig,
    HypernetMethod,
    Pair,
    Question,
    Questions,
    hypernet_sites,
)
from workers.methods.families.hypernet_training import Objective, SingleEditTrainer
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay
from workers.types import JSON, EditRequest, SpecError


class MENDDeviations(Deviations):
    """Switches to the public code."""

    public_bos: bool = Field(False, description="a BOS token of the answer alone is a target (public code)")


class MENDConfig(HypernetConfig):
    """Hyperparameters of MEND."""

    n_hidden: int = Field(1, ge=0, le=100, description="hidden layers of a network, which has one block more")
    edit_lr: float = Field(1e-4, description="first value of the learned step sizes; positive descends")
    lr: float = Field(1e-6, gt=0, description="Adam's step size for the networks")
    lr_lr: float = Field(1e-4, gt=0, description="Adam's step size for the learned step sizes")
    cedit: float = Field(0.1, ge=0, description="weight of the edited answer in the training loss")
    cloc: float = Field(1.0, ge=0, description="weight of what has to stay in the training loss")
    grad_clip: float = Field(100.0, gt=0, description="largest norm of a training gradient")
    train_on: Literal["rephrase", "prompt"] = Field(
        "rephrase",
        description="rephrase: prompt or a rephrase asks for the new answer (paper); prompt: public code",
    )
    deviations: MENDDeviations = Field(
        MENDDeviations(), description="single switches to the public code, for parity tests"
    )
    schedule: TrainingSchedule = Field(
        TrainingSchedule(steps=10_000, batch_size=10), description="length and batches of the training"
    )

    method: ClassVar[str] = "mend"
    learnt: ClassVar[tuple[str, ...]] = (
        *("layers", "modules", "rank", "n_hidden", "deviations"),
        *("edit_lr", "lr", "lr_lr", "cedit", "cloc", "grad_clip", "train_on"),
    )
    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType(
        {"train_on": "prompt", "deviations": {"public_bos": True}}
    )
    alg_names: ClassVar[tuple[str, ...]] = ("MEND",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **TRAINER_KEYS,
            **dict.fromkeys(("cbase", "hidden_dim", "max_output_length"), IGNORED),
            "inner_params": "inner_params",
            "accumulate_bs": "accumulate_bs",
            "max_iters": "max_iters",
            **{
                key: key
                for key in ("dropout", "train_base", "no_grad_layers", "one_sided", "x_only", "delta_only")
            },
            **{key: key for key in ("init", "norm", "combine", "mlp_class", "shared")},
        }
    )
    easyedit_off: ClassVar[Mapping[str, tuple[JSON, ...]]] = MappingProxyType(
        {**TRAINER_OFF, "lr_scale": (1, 1.0), "act": ("relu",)}
    )
    easyedit_lost: ClassVar[Mapping[str, str]] = TRAINER_LOST
    _only: ClassVar[Mapping[str, tuple[JSON, ...]]] = MappingProxyType(
        {
            "dropout": (0, 0.0),
            "train_base": (False,),
            "no_grad_layers": (None,),
            "one_sided": (False,),
            "x_only": (False,),
            "delta_only": (False,),
            "init": ("id",),
            "norm": (True,),
            "combine": (True,),
            "mlp_class": ("IDMLP",),
            "shared": (True,),
        }
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        for key, allowed in cls._only.items():
            value = out.pop(key, allowed[0])
            if value not in allowed:
                raise SpecError(
                    f"{source}: {key}: {value!r} is a variant that is not here; expected {allowed[0]!r}"
                )
        together = take_count(out, "accumulate_bs", 10, source)
        iterations = take_count(out, "max_iters", 100_000, source)
        out["schedule"] = {"steps": max(1, iterations // together), "batch_size": together}
        return out

    @property
    def blocks(self) -> int:
        return self.n_hidden + 1


class MEND(HypernetMethod[MENDConfig, DenseOverlay]):
    """MEND; the changes of the requests of a call are added up.

    >>> editor = MEND.prepare(base, MENDConfig(layers=(4, 5), rank=64), {"pretrained": trained})
    """

    name: ClassVar[str] = "mend"
    title: ClassVar[str] = "MEND"
    paper: ClassVar[str] = "Mitchell et al., Fast Model Editing at Scale, ICLR 2022, arXiv 2110.11309"
    version: ClassVar[int] = 1
    Config: ClassVar[type[MethodConfig]] = MENDConfig

    @classmethod
    def network(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None
    ) -> Hypernet:
        shapes = [site.shape for site in hypernet_sites(base, hparams["layers"], hparams["modules"])]
        return Hypernet(
            shapes, hparams["rank"], hparams["n_hidden"] + 1, hparams["edit_lr"], "inside", generator
        )

    def questions(self, lanes: Sequence[Sequence[Question]]) -> Questions:
        return Questions.of(self.base, lanes, self.config.deviations.public_bos)

    def new_overlay(self, lanes: int) -> DenseOverlay:
        return DenseOverlay(self.sites, lanes, self.base.master_dtype)

    def changes(self, factors: Sequence[Factors], overlay: DenseOverlay) -> list[Pair]:
        return _changes(self.net, factors)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            "layers": [4, 5],
            "rank": 64,
            "edit_lr": 3e-4,
            "lr": 3e-5,
            "lr_lr": 1e-5,
            "cedit": 0.3,
            "schedule": {"steps": 300, "batch_size": 8},
        }

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> MENDTrainer:
        return MENDTrainer(
            base,
            hypernet_sites(base, hparams["layers"], hparams["modules"]),
            cls.network(base, hparams, generator),
            Objective(hparams["cedit"], hparams["cloc"], hparams["train_on"], hparams["public_bos"]),
            hparams["lr"],
            hparams["lr_lr"],
            hparams["grad_clip"],
        )


class MENDTrainer(SingleEditTrainer):
    """Trainer where each request is a separate edit."""

    def lanes(self, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        return [[request] for request in requests]

    def chosen(self, factors: Sequence[Factors]) -> list[Factors]:
        return list(factors)

    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        return _changes(self.net, factors)


def _changes(net: Hypernet, factors: Sequence[Factors]) -> list[Pair]:
    """``-a sum_n d~_n u~_n^T`` as its factors."""
    changes = []
    for place, found in enumerate(factors):
        key_LNI, grad_LNO = net(place, found)
        changes.append((-net.rate_S[place] * grad_LNO, key_LNI))
    return changes
