"""No edit: the baseline of every table.

Reliability, generalisation and portability are those of the base model, locality is exactly 1 in
every protocol. A method that scores no higher has no effect. Scores above 0 show which targets the
base model already knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from workers.methods.base import EditOutcome, LaneEdit, Method, MethodConfig
from workers.model.overlay import LaneState, SitelessOverlay


class NoEditConfig(MethodConfig):
    """No hyperparameters."""

    alg_names: ClassVar[tuple[str, ...]] = ()
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})


class Nothing(SitelessOverlay):
    """An overlay without any change; scoring uses the base model's answers."""

    @property
    def inert(self) -> bool:
        return True

    def tensors(self, lane: int) -> dict[str, Tensor]:
        return {}

    def load_state(self, lane: int, state: LaneState) -> None:
        """No-op: there is no state."""


class NoEdit(Method[NoEditConfig, Nothing]):
    """Leaves the base model as it is.

    >>> editor = NoEdit.prepare(base, NoEditConfig(), inputs={})
    """

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no edit"
    paper: ClassVar[str] = "the unedited base model"
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.01
    Config: ClassVar[type[MethodConfig]] = NoEditConfig

    def new_overlay(self, lanes: int) -> Nothing:
        return Nothing(lanes)

    def edit(self, overlay: Nothing, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        return [EditOutcome(0, None) for _ in edits]
