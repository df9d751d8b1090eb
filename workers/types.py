"""Plain data that streams exchange. Does not import torch, so that the planner and the readers can
import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

JSON = Any
"""A value that survives ``json.dumps`` and ``json.loads`` unchanged."""

ProtocolName = Literal["paper", "easyedit"]
"""The source that a method follows where paper and public code differ and the spec says nothing."""


class EditSweepError(Exception):
    """Base of every error whose message is meant for the user: shown without a traceback, exit code
    2."""


class SpecError(EditSweepError):
    """A sweep spec or method config is wrong; the message names file, field, value and the valid
    choices."""


class DataError(EditSweepError):
    """A data file is wrong; the message names file, record number and field."""


class ModelError(EditSweepError):
    """A model cannot be used: unknown architecture, missing files, a layer out of range, too
    large."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and the answer expected after it.

    ``aliases`` are other ways to write the answer: greedy generation may give any of them.
    ``group``: the name that the data set gives this kind of probe; a label, which makes no other
    probe of it.
    """

    prompt: str
    target: str
    aliases: tuple[str, ...] = ()
    group: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to change, and the probes that judge the change.

    ``prompt`` must contain ``subject`` (the ROME family looks its tokens up). ``unrelated`` is a
    sentence about something else, which WISE's margin loss needs. Texts carry no leading or
    trailing white space.

    ``passage``: the target is running text, judged by its perplexity. ``ood``: texts about the
    subject from other sources, scored token by token. ``any_of``: the portability probes are
    phrasings of one question, and one right answer is enough. ``needs``: the number of requests
    directly before this one (in file order) that belong to the same case; the portability probes
    ask about all of them.
    ``joiner``: the text between every prompt of the request and its answer; None: by the script of
    each prompt (:func:`workers.data.scripts.joiner_after`).
    """

    case_id: str
    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    unrelated: str | None = None
    passage: bool = False
    ood: tuple[str, ...] = ()
    any_of: bool = False
    needs: int = 0
    joiner: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """An ordered list of requests with the fingerprint that enters every cell id."""

    name: str
    requests: tuple[EditRequest, ...]
    fingerprint: str
    notes: dict[str, JSON] = field(default_factory=dict)


class Frozen(BaseModel):
    """Base of config objects: immutable, rejects unknown keys, unchanged by a round trip through
    JSON. No number is infinite or NaN, which JSON cannot represent."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Written(Frozen):
    """Base of settings that people write. Pydantic alone would read ``true`` as 1 and the text
    ``"2"`` as 2; here a number is written as a number."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        scalars, entries = _types_of(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, (list, tuple)):
            for entry in value:
                _check_number(entry, entries)
        else:
            _check_number(value, scalars)
        return value


def _types_of(annotation: object) -> tuple[set[object], set[object]]:
    """The types of a field's values, and those of the entries where a value is a list."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _types_of(arguments[0])
    if origin in (Union, UnionType):
        found = [_types_of(one) for one in arguments]
        return set().union(*(scalars for scalars, _ in found)), set().union(*(each for _, each in found))
    if origin in (tuple, list):
        return set(), set().union(*(_types_of(one)[0] for one in arguments if one is not ...))
    return {annotation}, set()


def _check_number(value: object, types: set[object]) -> None:
    """Raise ValueError for a bool, or a text that reads as a number, where only numbers are
    valid."""
    numbers = types - {NoneType}
    if not numbers or not numbers <= {int, float} or not isinstance(value, (bool, str)):
        return
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return  # pydantic refuses it, and names the entry
    what = "a number" if float in numbers else "a whole number"
    raise ValueError(f"expected {what}, found {value!r}")
