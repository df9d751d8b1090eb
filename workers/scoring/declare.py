"""Declarations of scores: the columns they fill, when they are measured and what they need.
Importing it does not import torch.

A score is one file of this folder, which holds its declaration, its settings and its measurement,
and one line of :data:`workers.scoring.registry.SCORES`. The stream's rows, the table's columns,
their documentation and the settings that identify a sweep's scoring follow from the declaration. A
measurement imports torch in its functions: readers of results import the declarations without it.

>>> def measure(request, asked, settings):
...     return {"words": float(len(request.target_new.split()))}
>>> WORDS = RequestScore(scores=(Score("words", "words of the target", base=False),), measure=measure)
>>> [column.name for column in WORDS.columns]
['words']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import ConfigDict

from workers.types import JSON, EditRequest, Written

if TYPE_CHECKING:
    from workers.job import ScoreConfig
    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay
    from workers.scoring.cache import BaseAnswers, Prefixes
    from workers.scoring.probes import Asked, Item, Kind

V = TypeVar("V")

When = Literal["every moment", "not in immediate rows", "in final rows only"]
MOMENTS: Mapping[When, frozenset[str]] = MappingProxyType(
    {
        "every moment": frozenset({"immediate", "checkpoint", "final"}),
        "not in immediate rows": frozenset({"checkpoint", "final"}),
        "in final rows only": frozenset({"final"}),
    }
)
"""The kinds of rows (column ``scored``) that hold a score."""


@dataclass(frozen=True, slots=True)
class Score:
    """One score: a column of the table, and another one for the unedited model if ``base``.

    ``probe``: the kind of probe that the request must have. ``setting``: the key of ``scoring``
    that must be on. Otherwise, and in rows of other moments than ``when``, the value is null.
    ``per_group``: measured once per group; the table ``groups`` has it too.
    """

    name: str
    meaning: str
    unit: str = ""
    type: Literal["string", "int32", "int64", "double"] = "double"
    when: When = "every moment"
    probe: Kind | None = None
    setting: str = ""
    base: bool = True
    per_group: bool = False


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """One column that a score fills: on the edited model, or on the unedited one (``of_base``)."""

    score: Score
    of_base: bool
    default_off: bool

    @property
    def name(self) -> str:
        return f"{self.score.name}_base" if self.of_base else self.score.name

    @property
    def meaning(self) -> str:
        parts = [self.score.meaning]
        if self.score.when != "every moment":
            parts.append(f"; {self.score.when}")
        if self.default_off:
            parts.append(", and off unless the spec asks for it")
        if self.of_base:
            parts.append("; the unedited model")
        return "".join(parts)

    def held_by(self, scored: str) -> bool:
        """Return whether rows of this moment hold a value."""
        return scored in MOMENTS[self.score.when]


class Settings(Written):
    """The settings of one score. The alias of a field is its key in the spec, under ``scoring``."""

    model_config = ConfigDict(populate_by_name=True)

    @property
    def on(self) -> bool:
        """True if the score is measured."""
        return True

    def identity(self) -> dict[str, JSON]:
        """The settings that decide the score's values. Empty for a disabled score, so that folders
        written before the score existed stay usable. Raises DataError if a file whose content is
        part of the identity cannot be read."""
        return self.model_dump(mode="json", by_alias=True) if self.on else {}

    def changed(self) -> dict[str, JSON]:
        """The settings that are not at their defaults, as they are written in the spec."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def check(self) -> None:
        """Raise DataError if a file named in the settings cannot be used."""

    def longest(self, tokens: int) -> int:
        """Tokens of the score's longest sequence, if the longest of the requests has ``tokens``
        tokens."""
        return tokens

    @property
    def continued(self) -> int:
        """Tokens by which the score continues each edit prompt."""
        return 0

    @classmethod
    def spec_keys(cls) -> tuple[str, ...]:
        """The keys under ``scoring`` that a spec may give."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def path_keys(cls) -> tuple[str, ...]:
        """The keys whose values are paths of files."""
        fields = cls.model_fields.items()
        return tuple(f.alias or name for name, f in fields if Path in (f.annotation, *get_args(f.annotation)))


class NoSettings(Settings):
    """The settings of a score that has none."""


@dataclass(frozen=True, kw_only=True)
class _Declared:
    scores: tuple[Score, ...]
    settings: type[Settings] = NoSettings

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        """The columns of the edited model, then those of the unedited model."""
        off = not self.settings().on
        edited = [ScoreColumn(score, of_base=False, default_off=off) for score in self.scores]
        return (
            *edited,
            *(ScoreColumn(score, of_base=True, default_off=off) for score in self.scores if score.base),
        )

    def read(self, config: ScoreConfig) -> Settings:
        """The score's settings, taken from ``config``."""
        given = config.model_extra or {}
        return self.settings.model_validate(
            {key: given[key] for key in self.settings.spec_keys() if key in given}
        )


@dataclass(frozen=True, kw_only=True)
class RequestScore(_Declared):
    """Scores of one request, computed from both models' replies to its probes.

    ``measure(request, asked, settings)`` returns values by column; a column that it leaves out is
    null.
    """

    measure: Callable[[EditRequest, Sequence[Asked], Any], Mapping[str, float | None]]

    def of(
        self, request: EditRequest, asked: Sequence[Asked], config: ScoreConfig, settings: Settings
    ) -> dict[str, float | None]:
        """The value of every column; null if it is switched off, not finite, or without its
        probes."""
        values = self.measure(request, asked, settings) if settings.on else {}
        kinds = {one.probe.kind for one in asked}
        found: dict[str, float | None] = {}
        for column in self.columns:
            score, value = column.score, values.get(column.name)
            off = bool(score.setting) and not getattr(config, score.setting)
            absent = score.probe is not None and score.probe not in kinds
            found[column.name] = None if off or absent or value is None or not math.isfinite(value) else value
        return found


@dataclass(frozen=True)
class State:
    """The input of a group-end score: the lanes of a wave after ``edits`` edits.

    ``items``: the requests that are scored, lane by lane. ``lanes``: all lanes that have not
    failed.
    """

    base: BaseModel
    overlay: Overlay
    edits: int
    lanes: Sequence[int]
    items: Sequence[Item]
    answers: BaseAnswers
    prefixes: Prefixes
    kept: dict[int, Any]

    def once(self, compute: Callable[[], V]) -> V:
        """The result of ``compute()``, computed once per number of edits of the wave."""
        if self.edits not in self.kept:
            value = compute()
            self.kept.clear()
            self.kept[self.edits] = value
        found: V = self.kept[self.edits]
        return found


Measure = Callable[[State], Sequence[Mapping[str, float | None]]]
"""One mapping per item of the state: values by column."""


@dataclass(frozen=True, kw_only=True)
class GroupEndScore(_Declared):
    """Scores that are measured on a lane's state and not computed from replies to probes, usually
    at a group's end.

    ``begin(base, config, settings)`` is called once per stream, if the settings say that the score
    is measured.
    """

    begin: Callable[[BaseModel, ScoreConfig, Any], Measure]

    def wanted_at(self, scored: str) -> bool:
        """Return whether rows of this moment hold one of its scores."""
        return any(scored in MOMENTS[score.when] for score in self.scores)
