"""RLEdit: MALMEN's networks, trained on sequences of edits that accumulate in one model.

Li et al., Reinforced Lifelong Editing for Language Models, ICML 2025, arXiv 2502.05759. Networks
trained on edits of the pristine model are applied to a different model at each later edit of a
sequence. RLEdit trains them on such models: the edited weights are the state of a decision process,
a weight change is the action, the networks are a deterministic policy, and the reward is the
negative loss of an edit. One trajectory edits chunks of requests ``c_1, c_2, ...`` one after
another, ``W_t = W_{t-1} + D_t``; with ``D_t`` the change by MALMEN's networks and normal equation
for ``c_t`` at ``W_{t-1}``, the loss of step t is

    ``sum_{i<k} m^i (-log p_t(y | x' in c_{t-i}) + cloc KL(p_{t-1} || p_t on x_loc in c_{t-i})) + r |D_t|^2``

which includes earlier chunks (memory backtracking, ``k`` = ``back_depth``, ``m`` =
``time_decay``) and keeps the change small. The losses of all steps, without discount, give one Adam
step. Gradients flow from the loss of step t through ``D_t`` into the networks, not through
``W_{t-1}`` into earlier changes: the state is a constant.

An edit is the same as in MALMEN. With ``statistics: lifelong`` the running mean and deviation that
normalise the networks' inputs are also updated by a lane's edits: each lane has its own, as part of
its overlay, and a rollback drops them.

Differences from public code (the authors'), all deliberate. Only the paper's abstract was
available: the objective follows the authors' code, and equations are not numbered.

1. ``r |D_t|^2`` has a gradient. In the public code the change is computed without gradients, so
   that ``reg_coef`` has no effect.
2. The gradient is clipped once, at the end of the trajectory. The public code clips the accumulated
   gradient after each step, so that the share of early steps is scaled down repeatedly.
3. The loss of a trajectory is the mean over its steps (the factor affects the clipping, not Adam),
   and that of a chunk the mean over its requests. The public code adds up mini-batches of means
   over all answer tokens.
4. Networks and normal equation are those of MALMEN here, with its differences: float64 and the
   smaller of two forms, one pass of autograd, prompt or rephrase drawn (``train_on``), a separate
   learning rate for the step sizes (``lr_lr``), exact variances.
5. A trajectory may have any number of requests, and training may have many trajectories. The public
   configuration is one trajectory of 400 chunks, hence one Adam step of 1e-5: its networks stay
   almost the identity, and it learns mainly the statistics.
6. Statistics start from the trained ones in each lane. The public code has one copy, which its
   validation changes permanently.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.artifacts.pretrain import TrainingSchedule
from workers.methods.base import MethodConfig
from workers.methods.easyedit import IGNORED
from workers.methods.families.hypernet import (
    Factors,
    Hypernet,
    HypernetConfig,
    HypernetMethod,
    Pair,
    Questions,
    add,
    fit_keys,
    fitted,
    gradient_factors,
    hypernet_sites,
    question_of,
    site_shapes,
    squared_norm,
    token_choice,
)
from workers.methods.families.hypernet_training import HypernetTrainer, Judge, Objective, Sentences
from workers.model.base import BaseModel
from workers.model.config import ModelShape
from workers.model.overlay import DenseOverlay, LaneState
from workers.types import JSON, EditRequest


class RLEditConfig(HypernetConfig):
    """Hyperparameters of RLEdit."""

    rank: int = Field(1024, ge=1, description="rank of the networks' maps")
    n_blocks: int = Field(4, ge=1, description="blocks of a network")
    tokens: Literal["answer", "all"] = Field(
        "answer",
        description="answer: keys are the tokens that predict the answer; all: every token of the request",
    )
    statistics: Literal["lifelong", "trained"] = Field(
        "lifelong",
        description="lifelong: the normalisation goes on learning from a lane's edits; trained: it stays",
    )
    edit_size: int = Field(20, ge=1, description="requests of one edit of a training trajectory")
    time_decay: float = Field(
        0.95, ge=0, le=1, description="weight of a chunk in the loss, for each later edit"
    )
    back_depth: int = Field(
        10, ge=1, description="chunks that a step's loss asks for, the present one included"
    )
    lr: float = Field(1e-6, gt=0, description="first value of the learned step sizes")
    meta_lr: float = Field(1e-5, gt=0, description="Adam's step size for networks and lambda")
    lr_lr: float = Field(1e-5, gt=0, description="Adam's step size for the learned step sizes")
    loc_coef: float = Field(0.6, ge=0, description="weight of what has to stay in the training loss")
    reg_coef: float = Field(
        1e-4, ge=0, description="weight of the change's squared norm in the training loss"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of a trajectory's gradient")
    train_on: Literal["rephrase", "prompt"] = Field(
        "rephrase",
        description="rephrase: prompt or a rephrase asks for the new answer; prompt: the prompt only",
    )
    schedule: TrainingSchedule = Field(
        TrainingSchedule(steps=1, batch_size=8000), description="number of trajectories, and requests of each"
    )

    method: ClassVar[str] = "rledit"
    learnt: ClassVar[tuple[str, ...]] = (
        *("layers", "modules", "rank", "n_blocks", "tokens", "edit_size", "time_decay", "back_depth"),
        *("lr", "meta_lr", "lr_lr", "loc_coef", "reg_coef", "max_grad_norm", "train_on"),
    )
    alg_names: ClassVar[tuple[str, ...]] = ("RLEdit",)
    easyedit_keys: ClassVar[Mapping[str, str]] = (
        MappingProxyType(  # of the authors' own file: EasyEdit has none
            {
                **dict.fromkeys(
                    ("name", "cache_dir", "save_checkpoint", "load_checkpoint", "n_test", "full_curve"),
                    IGNORED,
                ),
                "batch_size": IGNORED,  # requests of one forward
                "token": "tokens",
                "n_epochs": "n_epochs",
            }
        )
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "tokens" in out:
            out["tokens"] = token_choice(out["tokens"], source)
        if "meta_lr" in out:
            out["lr_lr"] = out["meta_lr"]  # the public code has one learning rate for both
        if "n_epochs" in out:
            out["schedule"] = {"steps": out.pop("n_epochs"), "batch_size": 8000}  # 400 edits of 20 requests
        return out

    @property
    def blocks(self) -> int:
        return self.n_blocks

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        statistics = sum(
            16 * (out + in_features)
            for out, in_features in set(site_shapes(shape, self.layers, self.modules))
        )
        return statistics + super().overlay_bytes(shape, edits)


class RLEditOverlay(DenseOverlay):
    """Dense replacements of the edited maps, and each lane's running statistics by shape of map."""

    def __init__(self, net: Hypernet, base: BaseModel, config: RLEditConfig, lanes: int) -> None:
        super().__init__(hypernet_sites(base, config.layers, config.modules), lanes, base.master_dtype)
        self._trained = net.scale
        self.scales = [copy.deepcopy(dict(net.scale)) for _ in range(lanes)]

    def tensors(self, lane: int) -> dict[str, Tensor]:
        found = super().tensors(lane)
        if found:  # a pristine lane has the trained statistics
            for shape, statistics in self.scales[lane].items():
                found.update({f"{name}/{shape}": t for name, t in statistics.named_buffers()})
        return found

    def load_state(self, lane: int, state: LaneState) -> None:
        super().load_state(lane, state)
        for shape, statistics in self.scales[lane].items():
            for name, trained in self._trained[shape].named_buffers():
                statistics.get_buffer(name).copy_(state.tensors.get(f"{name}/{shape}", trained))


class RLEdit(HypernetMethod[RLEditConfig, RLEditOverlay]):
    """All requests of a call in one least-squares fit per map, by networks trained on sequences of
    edits.

    >>> editor = RLEdit.prepare(base, RLEditConfig(layers=(4, 5), rank=64), {"pretrained": trained})
    """

    name: ClassVar[str] = "rledit"
    title: ClassVar[str] = "RLEdit"
    paper: ClassVar[str] = (
        "Li et al., Reinforced Lifelong Editing for Language Models, ICML 2025, arXiv 2502.05759"
    )
    version: ClassVar[int] = 1
    Config: ClassVar[type[MethodConfig]] = RLEditConfig

    @classmethod
    def network(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None
    ) -> Hypernet:
        shapes = [site.shape for site in hypernet_sites(base, hparams["layers"], hparams["modules"])]
        return Hypernet(shapes, hparams["rank"], hparams["n_blocks"], hparams["lr"], "outside", generator)

    def new_overlay(self, lanes: int) -> RLEditOverlay:
        return RLEditOverlay(self.net, self.base, self.config, lanes)

    def changes(self, factors: Sequence[Factors], overlay: RLEditOverlay) -> list[Pair]:
        keys = fit_keys(factors, self.config.tokens)
        scales = overlay.scales if self.config.statistics == "lifelong" else None
        for lane, scale in enumerate(scales or ()):  # statistics are updated before the edit is normalised
            self.net.learn_scale([kept.lane(lane) for kept in keys], scale)
        return fitted(self.net, keys, scales)

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            "layers": [4, 5],
            "rank": 64,
            "n_blocks": 2,
            "edit_size": 1,
            "back_depth": 5,
            "lr": 1e-2,
            "meta_lr": 3e-4,
            "lr_lr": 1e-3,
            "loc_coef": 1.2,
            "reg_coef": 1e-3,
            "schedule": {"steps": 100, "batch_size": 30},
        }

    @classmethod
    def trainer(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator
    ) -> RLEditTrainer:
        return RLEditTrainer(base, hparams, generator)


class RLEditTrainer(HypernetTrainer):
    """Trainer where the requests of a step are one trajectory of edits with ``edit_size`` requests
    each."""

    def __init__(self, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> None:
        super().__init__(
            base,
            hypernet_sites(base, hparams["layers"], hparams["modules"]),
            RLEdit.network(base, hparams, generator),
            Objective(1.0, hparams["loc_coef"], hparams["train_on"]),
            hparams["meta_lr"],
            hparams["lr_lr"],
            hparams["max_grad_norm"],
        )
        self.tokens = hparams["tokens"]
        self.edit_size = hparams["edit_size"]
        self.time_decay = hparams["time_decay"]
        self.back_depth = hparams["back_depth"]
        self.reg_coef = hparams["reg_coef"]

    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        chunks = [requests[i : i + self.edit_size] for i in range(0, len(requests), self.edit_size)]
        overlay = DenseOverlay(self.sites, 1, self.base.master_dtype)  # the model that accumulates the edits
        asked: deque[Sentences] = deque(maxlen=self.back_depth)
        totals = dict.fromkeys(("loss", "nll", "kl", "change"), 0.0)
        self._optimizer.zero_grad()
        for chunk in chunks:
            asked.appendleft(Sentences.draw(self.base, chunk, self.objective, generator))
            for name, value in self._edit(overlay, chunk, asked, 1 / len(chunks)).items():
                totals[name] += value / len(chunks)
        return self.update(totals)

    def _edit(
        self, overlay: DenseOverlay, chunk: Sequence[EditRequest], asked: Sequence[Sentences], share: float
    ) -> dict[str, float]:
        """Make one edit of the trajectory and add its gradient to the networks'. ``asked``:
        sentences of the latest chunks, newest first."""
        base, objective = self.base, self.objective
        found, _ = gradient_factors(
            base, self.sites, Questions.of(base, [list(map(question_of, chunk))]), overlay
        )
        factors = fit_keys(found, self.tokens)
        self.net.learn_scale(factors)
        weighted = [(past, self.time_decay**age / len(past.asking)) for age, past in enumerate(asked)]
        judge = Judge.of(base, [weighted], self.sites[0].layer)
        with torch.enable_grad():
            changes = fitted(self.net, factors)
            nll, kl = judge.losses(base, self.sites, changes, overlay)
            size = torch.stack([squared_norm(pair) for pair in changes]).sum()
            loss = objective.cedit * nll + objective.cloc * kl + self.reg_coef * size
            (share * loss).backward()
        add(overlay, [(left_LNO.detach(), right_LNI.detach()) for left_LNO, right_LNI in changes])
        figures = {"loss": loss, "nll": nll, "kl": kl, "change": size}
        return {name: float(value.detach()) for name, value in figures.items()}
