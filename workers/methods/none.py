"""No edit at all: the floor of every table.

Reliability, generalisation and portability are the base model's own, locality is exactly 1 in every
protocol, and an edit costs nothing. A method that is not above this row has not edited anything; a
base model that knows some of the targets already shows here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from workers.methods.base import EditOutcome, LaneEdit, Method, MethodConfig
from workers.model.overlay import LaneState, SitelessOverlay


class NoEditConfig(MethodConfig):
    """Nothing to set."""

    alg_names: ClassVar[tuple[str, ...]] = ()
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})


class Nothing(SitelessOverlay):
    """Adds nothing; scoring takes the base model's answers for it."""

    @property
    def inert(self) -> bool:
        return True

    def state(self, lane: int) -> LaneState:
        return LaneState()

    def load_state(self, lane: int, state: LaneState) -> None:
        """There is nothing to restore."""


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
