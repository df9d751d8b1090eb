"""The registry of scores. A new score needs its own file and one line here. Importing it does not
import torch.

>>> [column.name for column in SCORES.columns][:3]
['reliability_token', 'reliability_exact', 'reliability_generated']
>>> SCORES.read({"fluency_tokens": 8}).model_extra["fluency_top_k"]
5
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from workers.job import ScoreConfig
from workers.scoring.ability import ABILITY
from workers.scoring.accuracy import ACCURACY
from workers.scoring.any_of import ANY_OF
from workers.scoring.declare import GroupEndScore, RequestScore, ScoreColumn, Settings
from workers.scoring.fluency import FLUENCY
from workers.scoring.group_means import GROUP_MEANS
from workers.scoring.out_of_distribution import OUT_OF_DISTRIBUTION
from workers.scoring.target import LOGPROB, MARGIN, PERPLEXITY
from workers.types import JSON, SpecError


@dataclass(frozen=True)
class Registry:
    """All scores of a table, line by line. The columns of a line are adjacent: those of the edited
    model, then those of the unedited model."""

    lines: tuple[tuple[RequestScore | GroupEndScore, ...], ...]

    @property
    def _all(self) -> tuple[RequestScore | GroupEndScore, ...]:
        return tuple(score for line in self.lines for score in line)

    @property
    def request(self) -> tuple[RequestScore, ...]:
        return tuple(score for score in self._all if isinstance(score, RequestScore))

    @property
    def group_end(self) -> tuple[GroupEndScore, ...]:
        return tuple(score for score in self._all if isinstance(score, GroupEndScore))

    @property
    def columns(self) -> tuple[ScoreColumn, ...]:
        """Every column that scoring fills, in the order of the table."""
        return tuple(
            column
            for line in self.lines
            for of_base in (False, True)
            for score in line
            for column in score.columns
            if column.of_base == of_base
        )

    def with_line(self, *scores: RequestScore | GroupEndScore) -> Registry:
        """A registry with one more line."""
        return Registry((*self.lines, scores))

    # --- settings ---

    def settings(self, config: ScoreConfig) -> tuple[Settings, ...]:
        """The settings of each score. Raises :class:`SpecError` for a key that no score has."""
        unknown = sorted((config.model_extra or {}).keys() - set(self._keys))
        if unknown:
            raise SpecError(
                f"scoring: unknown keys {', '.join(unknown)}; valid keys: {', '.join(self._valid)}"
            )
        return tuple(score.read(config) for score in self._all)

    def read(self, values: Mapping[str, Any]) -> ScoreConfig:
        """Read the section ``scoring`` of a spec, checked and completed with defaults.

        Raises :class:`pydantic.ValidationError` that names every key which is wrong, as the user
        wrote it.
        """
        errors = [_unknown(key, values[key], self._valid) for key in values if key not in self._valid]
        found: dict[str, JSON] = {}
        parts: list[tuple[type[BaseModel], tuple[str, ...]]] = [
            (ScoreConfig, tuple(ScoreConfig.model_fields))
        ]
        parts += [(score.settings, score.settings.spec_keys()) for score in self._all]
        for model, keys in parts:
            try:
                part = model.model_validate({key: values[key] for key in keys if key in values})
            except ValidationError as error:
                errors += [
                    InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {}))
                    for e in error.errors(include_url=False)
                ]
            else:
                found |= part.model_dump(mode="json", by_alias=True)
        if errors:
            raise ValidationError.from_exception_data("ScoreConfig", errors)
        return ScoreConfig.model_validate(found)

    @property
    def path_keys(self) -> tuple[str, ...]:
        """The keys whose values are paths of files."""
        return tuple(key for score in self._all for key in score.settings.path_keys())

    def check(self, config: ScoreConfig) -> None:
        """Raise DataError if a file that a setting names cannot be used."""
        for settings in self.settings(config):
            settings.check()

    def longest(self, config: ScoreConfig, tokens: int) -> int:
        """Tokens of the longest sequence of scoring, if the longest of the requests has ``tokens``
        tokens."""
        return max([tokens, *(settings.longest(tokens) for settings in self.settings(config))])

    def continued(self, config: ScoreConfig) -> int:
        """Tokens by which prompts are continued at most, beyond the answers to them."""
        return max(settings.continued for settings in self.settings(config))

    def identity(self, config: ScoreConfig) -> dict[str, JSON]:
        """The settings that change the numbers in the table; stored in the results folder.

        Disabled options are left out. Raises DataError if a file whose content is part of the
        identity cannot be read.
        """
        found = config.identity()
        for settings in self.settings(config):
            found |= settings.identity()
        return found

    def shard_key(self, config: ScoreConfig) -> dict[str, JSON]:
        """The settings that enter a shard's id, batch sizes included. Settings of single scores
        enter only if they are not at their defaults."""
        found = config.core()
        for settings in self.settings(config):
            found |= settings.changed()
        return found

    @property
    def _keys(self) -> tuple[str, ...]:
        return tuple(key for score in self._all for key in score.settings.spec_keys())

    @property
    def _valid(self) -> tuple[str, ...]:
        return (*ScoreConfig.model_fields, *self._keys)


def _unknown(key: str, value: object, valid: tuple[str, ...]) -> InitErrorDetails:
    close = difflib.get_close_matches(str(key), valid, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    # the text is a value and not the template, where braces have a meaning
    problem = PydanticCustomError(
        "value_error", "{text}", {"text": f"unknown key {key!r}{hint}; valid keys: {', '.join(valid)}"}
    )
    return InitErrorDetails(type=problem, loc=(str(key),), input=value)


SCORES = Registry(
    (
        (ACCURACY,),
        (LOGPROB,),
        (MARGIN,),
        (ANY_OF, OUT_OF_DISTRIBUTION, PERPLEXITY, FLUENCY, ABILITY),
        (GROUP_MEANS,),
    )
)
"""The scores of the central table. A new score gets a line of its own at the end, so that columns
keep their order."""
