"""The pretraining stage: networks that learn to edit, trained once and shared as artifacts.

A method that needs it brings a :class:`Trainer` (its loss and its optimiser); the stage brings the order of the requests,
checkpoints, progress and the retention of what earlier data taught.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from workers.artifacts import ArtifactData
from workers.job import Frozen
from workers.types import EditRequest


class TrainingSource(Frozen):
    """Requests that networks learn from; never those that a sweep edits."""

    kind: str
    path: str | None = None
    fingerprint: str


class Trainer(ABC):
    """One method's training. Everything that a later step depends on is in :meth:`state`."""

    @abstractmethod
    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        """One optimiser step on these requests; figures worth showing (``loss`` at least). ``generator`` is for this step."""

    @abstractmethod
    def state(self) -> ArtifactData:
        """Weights, optimiser and statistics: restored into a fresh trainer, training continues bit-identically."""

    @abstractmethod
    def load_state(self, state: ArtifactData) -> None:
        """Restore what :meth:`state` gave."""

    @abstractmethod
    def product(self) -> ArtifactData:
        """What edits need of it, the finished artifact."""
