"""A method whose networks are really trained, as small as can be: FT that first learns a decoder
nobody asks for.

    with registered(): ...                                  # the registry knows it as "learner"
    python -m tests.learner run spec.yaml --engine local    # the command line with it
    python -m tests.learner build FOLDER SPEC [BEAT SILENT] # one artifact, as an actor would; shows the steps it took

With LEARNER_HOLD=N:PATH in the environment, a training waits after its N-th step in this process
until PATH exists (:func:`tests.waiting.hold`), so that a test can act at a place it knows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.waiting import hold
from workers import methods
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import Trainer, TrainingSchedule, pretrained
from workers.methods.base import ArtifactContext, MethodConfig
from workers.methods.ft import FT, FTConfig
from workers.model.base import BaseModel
from workers.model.batch import collate
from workers.model.config import ModelConfig
from workers.types import JSON, EditRequest


class Decoder(Trainer):
    """Two layers learn a request's first target token from the model's state at the end of its
    prompt."""

    def __init__(self, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> None:
        self.base = base
        sizes = (base.hidden, hparams["width"], base.model.config.vocab_size)
        self.weights = [
            (torch.randn(out, size, generator=generator) / size**0.5).requires_grad_(True)
            for size, out in itertools.pairwise(sizes)
        ]
        self.optimizer = torch.optim.Adam(self.weights, lr=hparams["lr"])
        self.steps_here = 0

    def logits(self, requests: Sequence[EditRequest]) -> Tensor:
        encoder = self.base.encoder
        pairs = [encoder.pair(r.prompt, r.target_new) for r in requests]
        rows = collate(pairs, [0] * len(pairs), encoder.pad_id, self.base.device)
        with torch.no_grad():
            hidden_BD = self.base.hidden_states(rows)[torch.arange(rows.size), rows.prompt_end_B]
        return (hidden_BD @ self.weights[0].T).relu() @ self.weights[1].T

    def targets(self, requests: Sequence[EditRequest]) -> Tensor:
        return torch.tensor([self.base.encoder.pair(r.prompt, r.target_new).target[0] for r in requests])

    def accuracy(self, requests: Sequence[EditRequest]) -> float:
        return float((self.logits(requests).argmax(-1) == self.targets(requests)).float().mean())

    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        number, _, marker = os.environ.get("LEARNER_HOLD", "").partition(":")
        if marker and self.steps_here == int(number):
            hold(Path(marker))
        self.steps_here += 1
        logits_BV = self.logits(requests)
        logits_BV = logits_BV + 0.01 * torch.randn(logits_BV.shape, generator=generator)
        loss = nn.functional.cross_entropy(logits_BV, self.targets(requests))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {"loss": loss.item()}

    def state(self) -> ArtifactData:
        tensors = {f"weight.{i}": w.detach() for i, w in enumerate(self.weights)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        return ArtifactData(tensors)

    def load_state(self, state: ArtifactData) -> None:
        for i, weight in enumerate(self.weights):
            weight.data.copy_(state.tensors[f"weight.{i}"])
        whole = self.optimizer.state_dict()
        names = ("step", "exp_avg", "exp_avg_sq")
        whole["state"] = {
            i: {n: state.tensors[f"adam.{i}.{n}"] for n in names} for i in range(len(self.weights))
        }
        self.optimizer.load_state_dict(whole)

    def product(self) -> ArtifactData:
        return ArtifactData({f"weight.{i}": w.detach() for i, w in enumerate(self.weights)}, {"layers": 2})


class LearnerConfig(FTConfig):
    width: int = 64
    train_lr: float = 3e-3
    schedule: TrainingSchedule = TrainingSchedule(steps=60, batch_size=8)

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        hparams = {"width": self.width, "lr": self.train_lr}
        return (
            pretrained(
                "learner", hparams, self.schedule, context.fingerprint, context.model, context.training
            ),
        )


class Learner(FT):
    name: ClassVar[str] = "learner"
    title: ClassVar[str] = "Learner"
    needs_pretraining: ClassVar[bool] = True
    Config: ClassVar[type[MethodConfig]] = LearnerConfig

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> Decoder:
        return Decoder(base, hparams, generator)


def register() -> None:
    """For good, in this process."""
    methods.REGISTRY = MappingProxyType({**methods.REGISTRY, "learner": "tests.learner:Learner"})


@contextlib.contextmanager
def registered() -> Iterator[None]:
    before = methods.REGISTRY
    register()
    try:
        yield
    finally:
        methods.REGISTRY = before


def build(folder: str, spec: str, beat_seconds: str = "5", silent_seconds: str = "30") -> None:
    """Build an artifact; the last line of the output lists the steps that were taken.

    ``beat_seconds`` are those of its own claim, ``silent_seconds`` make another's heartbeat count
    as stopped.
    """
    from orchestrator.engine.worker import Worker
    from orchestrator.storage import lock

    lock.acquire.__defaults__ = (None, float(beat_seconds), float(silent_seconds))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    steps: list[int] = []
    worker = Worker(folder, "run", save_seconds=0)
    worker.build(
        ArtifactSpec.model_validate_json(spec),
        ModelConfig(device="cpu"),
        1,
        lambda done, total, what: steps.append(done),
    )
    sys.stdout.write(json.dumps(steps) + "\n")


def main(*arguments: str) -> None:
    register()
    if arguments[0] == "build":
        build(*arguments[1:])
    else:
        from orchestrator.cli.main import main

        main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
