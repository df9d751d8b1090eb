"""EasyEdit's own record layout, in which zsRE, CounterFact and the KnowEdit sets are also
published.

Two variants with different fields for the probes are read:

- flat: ``rephrase_prompt`` (or ``rephrase``), ``locality_prompt``, ``locality_ground_truth``;
- grouped: ``locality`` and ``portability`` hold lists of ``{prompt, ground_truth}`` by category,
  where a prompt is a text or a list (its
  first entry is used), and a ground truth is nested in one or two lists of accepted answers.

A probe keeps its category's name. Grouped probes without an answer are left out and counted, because
they cannot be scored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from workers.data.records import BadRecord, CaseId, Draft, Entry, Record, Text, subject_as_in, validate
from workers.types import EditRequest, Probe


def _first(value: object) -> object:
    """The first of arbitrarily nested accepted answers."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


def _first_or_none(value: object) -> object:
    first = _first(value)
    return None if first in ([], None) or (isinstance(first, str) and not first.strip()) else first


def _listed(value: object) -> object:
    """A text as a list of one; nothing (null, or an empty text) as an empty list."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else value


def _grouped(value: object) -> object:
    """Groups of probes by name; nothing (null, or an empty list) as no groups, and as an empty
    group."""
    if value is None or value == []:
        return {}
    if not isinstance(value, dict):
        return value
    return {name: [] if probes is None else probes for name, probes in value.items()}


FirstText = Annotated[Text, BeforeValidator(_first)]
FirstTextOrNone = Annotated[Text | None, BeforeValidator(_first_or_none)]


class GroupedProbe(Record):
    prompt: FirstText
    ground_truth: FirstTextOrNone


Groups = Annotated[dict[str, list[GroupedProbe]], BeforeValidator(_grouped)]


class EasyEditRecord(Record):
    case_id: CaseId | None = None
    subject: Text
    prompt: Text
    target_new: FirstText
    ground_truth: FirstTextOrNone = None
    rephrase_prompt: Annotated[list[Text], BeforeValidator(_listed)] = Field(default_factory=list)
    rephrase: Annotated[list[Text], BeforeValidator(_listed)] = Field(default_factory=list)
    locality_prompt: Text | None = None
    locality_ground_truth: FirstTextOrNone = None
    locality: Groups = Field(default_factory=dict)
    portability: Groups = Field(default_factory=dict)


def is_easyedit(raw: object) -> bool:
    """Return whether a raw record is in this layout rather than in MEND's or ROME's."""
    return isinstance(raw, dict) and "prompt" in raw and not {"src", "requested_rewrite"} & raw.keys()


def parse(entry: Entry) -> Draft:
    record = validate(EasyEditRecord, entry.value)
    locality, locality_dropped = _probes(record.locality)
    portability, portability_dropped = _probes(record.portability)
    if (record.locality_prompt is None) != (record.locality_ground_truth is None):
        raise BadRecord("locality_prompt", "expected together with `locality_ground_truth`, or neither")
    if record.locality_prompt is not None and record.locality_ground_truth is not None:
        locality = (Probe(record.locality_prompt, record.locality_ground_truth), *locality)
    request = EditRequest(
        case_id=record.case_id or str(entry.number - 1),
        prompt=record.prompt,
        subject=subject_as_in(record.prompt, record.subject),
        target_new=record.target_new,
        ground_truth=record.ground_truth,
        rephrases=tuple(dict.fromkeys((*record.rephrase_prompt, *record.rephrase))),
        locality=locality,
        portability=portability,
    )
    return Draft(request, unanswered=locality_dropped + portability_dropped)


def _probes(categories: dict[str, list[GroupedProbe]]) -> tuple[tuple[Probe, ...], int]:
    probes = [(name, probe) for name, category in categories.items() for probe in category]
    answered = tuple(
        Probe(probe.prompt, probe.ground_truth, group=name)
        for name, probe in probes
        if probe.ground_truth is not None
    )
    return answered, len(probes) - len(answered)
