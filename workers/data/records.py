"""Common part of all loaders: reading a file, validating its records one by one, and checks of
lists of requests.

A loader is a *parse* function from one raw JSON value to a :class:`Draft`; this module calls it for
every record, turns each error into one message with file, record number, field and value, and
finishes the data set:

    drafts = parse_drafts(path, read_json_list(path), parse, on_bad_record)
    return build_dataset("counterfact", path, drafts, locality_of(drafts))
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from workers.data.scripts import joiner_after
from workers.inputs import kind_of, read_file, reason
from workers.types import JSON, DataError, Dataset, EditRequest, Probe

OnBadRecord = Literal["error", "skip"]
TargetField = Literal["ans", "alt"]
"""The fields by which the field's files call a new answer."""
Order = Literal["file", "shuffle"]

MAX_DATA_BYTES = 4 << 30
"""Maximum size of a data file, which is held in memory as a whole."""

OFFENDERS_SHOWN = 3
"""Bad records that one error message describes; the others are counted."""

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound=BaseModel)


# --- one record -----------------------------------------------------------------------------


class BadRecord(Exception):
    """One record cannot be used. It becomes part of a DataError or a skipped record; no caller
    outside this package gets it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field `{field}`: {problem}" if field else problem)


class AmbiguousTarget(BadRecord):
    """A record that can be read in two ways. The file is refused, whatever is done with bad
    records: the choice is the spec's."""


class WrongKind(DataError):
    """No record of a file can be used, so that it may be of another kind. ``looks_like``: the kinds
    that its keys suggest."""

    def __init__(self, message: str, looks_like: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.looks_like = tuple(looks_like)


def _text(value: str) -> str:
    """Strip a text. Raises ValueError for what a tokenizer or the results table cannot hold."""
    stripped = value.strip()
    if not stripped:
        raise ValueError("expected a text that is not empty")
    try:
        stripped.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected valid Unicode text, found half of a surrogate pair") from None
    return stripped


def _id(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Text = Annotated[str, AfterValidator(_text)]
CaseId = Annotated[str, BeforeValidator(_id), AfterValidator(_text)]


class Record(BaseModel):
    """Base of the record models. Unknown keys are ignored in public files and rejected in our own
    JSONL."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)


def short(value: object) -> str:
    """A value for an error message: escaped, on one line, about 60 characters at most."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 60
    shortener.maxlist = shortener.maxdict = 3
    shortener.maxlevel = 2
    return shortener.repr(value)


_EXPECTED = {
    "string_type": "expected a text",
    "string_unicode": "expected valid Unicode text",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "too_short": "expected at least one entry",
}


def validate(model: type[RecordT], raw: object) -> RecordT:
    """Validate one raw JSON value. Raises BadRecord with the path of the first wrong field."""
    if not isinstance(raw, dict):
        raise BadRecord(
            "", f"expected an object with the keys {', '.join(model.model_fields)}; got {short(raw)}"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        fault = failure.errors(include_url=False, include_context=True)[0]
        field = ".".join(str(step) for step in fault["loc"])
        got = short(fault["input"])
        if fault["type"] == "missing":
            raise BadRecord(field, f"is missing (the record has {short(sorted(map(str, raw)))})") from None
        if fault["type"] == "extra_forbidden":
            known = model if len(fault["loc"]) == 1 else ProbeRecord
            raise BadRecord(field, f"unknown key; valid keys: {', '.join(known.model_fields)}") from None
        if fault["type"] == "value_error":
            raise BadRecord(field, f"{fault['msg'].removeprefix('Value error, ')}; got {got}") from None
        raise BadRecord(field, f"{_EXPECTED.get(fault['type'], fault['msg'])}; got {got}") from None


def _blank(value: object) -> object:
    """None for the values that stand for nothing: null, NaN, an empty text."""
    nothing = (isinstance(value, float) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip()
    )
    return None if nothing else value


TextOrNone = Annotated[Text | None, BeforeValidator(_blank)]


def with_target(raw: JSON, own: TargetField, chosen: TargetField | None) -> JSON:
    """The raw record with its target under the name ``own``, by which the reader knows it.

    ``chosen``: the field that `dataset.target_field` names. A record that has both and is not told
    which one is refused: nothing in it says which of them is the new answer.
    """
    if not isinstance(raw, dict):
        return raw
    given = [name for name in get_args(TargetField) if _blank(raw.get(name)) is not None]
    if chosen is None:
        if len(given) > 1:
            raise AmbiguousTarget(
                " and ".join(given),
                f"either may be the target (got {short(raw[given[0]])} and {short(raw[given[1]])}); say which "
                f"with `dataset.target_field: {given[0]}` or `dataset.target_field: {given[1]}`",
            )
        return raw
    if chosen not in raw:
        raise BadRecord(
            chosen,
            f"is missing, and dataset.target_field names it (the record has {short(sorted(map(str, raw)))})",
        )
    return {**raw, own: raw[chosen]}


class ProbeRecord(Record):
    """A probe in our own JSONL."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    target: Text

    def probe(self) -> Probe:
        return Probe(self.prompt, self.target)


def subject_as_in(prompt: str, subject: str, field: str = "subject") -> str:
    """The subject as spelt in the prompt, which the ROME family needs to find its tokens.

    An exact occurrence comes first; otherwise one that differs only in upper and lower case and
    consists of whole words ("Ian" is not found inside "Asian"). Raises BadRecord if there is none.
    """
    if subject in prompt:
        return subject
    match = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE)
    if match is None:
        raise BadRecord(
            field, f"{short(subject)} does not occur in the prompt {short(prompt)}, where it must stand"
        )
    return match.group()


# --- one file -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A raw JSON value and its number in the file. ``fault``: the reason if there is no value (a
    line that is not JSON)."""

    number: int
    value: JSON
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """Result of reading a file: the usable records, and the numbers of skipped ones."""

    items: tuple[T, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """A request that may still lack its unrelated sentence, and the number of its probes that were
    dropped for lack of an answer."""

    request: EditRequest
    unanswered: int = 0


def read_text(path: Path) -> str:
    """The file as text. A UTF-8 byte order mark is dropped. Raises DataError for any other
    encoding."""
    try:
        data = read_file(path, MAX_DATA_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, expected a file") from None
    except (OSError, ValueError) as failure:
        raise DataError(f"{path}: cannot be read: {reason(failure)}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        start = failure.start
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}: expected UTF-8 text, found byte 0x{data[start]:02x} at offset {start} (line {line})"
        ) from None


def _parse_json(text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> JSON:
    """``json.loads``, where every failure is a ValueError with a short message."""
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as failure:
        raise ValueError(f"{failure.msg} at line {failure.lineno}, column {failure.colno}") from None


def read_json_list(path: Path) -> list[Entry]:
    """A file that is one JSON list; entries are numbered from 1."""
    text = read_text(path)
    try:
        value = _parse_json(text)
    except ValueError as failure:
        if "Extra data" in str(failure):  # as in a file of one JSON object per line
            raise WrongKind(f"{path}: not valid JSON: {failure}", ("jsonl",)) from None
        raise DataError(f"{path}: not valid JSON: {failure}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a JSON list of records, got {kind_of(value)}")
    if not value:
        raise DataError(f"{path}: the list of records is empty")
    return [Entry(number, item) for number, item in enumerate(value, start=1)]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {short(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return seen


def read_json_lines(path: Path) -> list[Entry]:
    """A file with one JSON value per line, numbered by line; blank lines are skipped."""
    entries = []
    # not str.splitlines, which also splits at U+2028, a character that JSON allows inside a text
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entries.append(Entry(number, _parse_json(line, _unique_keys)))
        except ValueError as failure:
            entries.append(Entry(number, None, f"not valid JSON: {failure}"))
    if not entries:
        raise DataError(f"{path}: the file has no records")
    return entries


def parse_records(
    path: Path,
    entries: Sequence[Entry],
    parse: Callable[[Entry], T],
    on_bad_record: OnBadRecord,
    unit: Literal["record", "line"] = "record",
) -> Parsed[T]:
    """Parse every entry. Bad ones raise DataError, or are skipped and listed."""
    items: list[T] = []
    bad: list[tuple[int, str]] = []
    ambiguous: list[str] = []
    for entry in entries:
        try:
            if entry.fault is not None:
                raise BadRecord("", entry.fault)
            items.append(parse(entry))
        except AmbiguousTarget as failure:
            ambiguous.append(f"{path}, {unit} {entry.number}: {failure}")
        except BadRecord as failure:
            bad.append((entry.number, str(failure)))
    if ambiguous:
        more = f" ({len(ambiguous)} of {len(entries)} {unit}s have both)" if len(ambiguous) > 1 else ""
        raise DataError(f"{ambiguous[0]}{more}")
    if bad and (on_bad_record == "error" or not items):
        _refuse_records(path, len(entries), bad, unit, can_skip=bool(items))
    return Parsed(tuple(items), tuple(number for number, _ in bad))


def parse_drafts(
    path: Path,
    entries: Sequence[Entry],
    parse: Callable[[Entry], Draft],
    on_bad_record: OnBadRecord,
    unit: Literal["record", "line"] = "record",
) -> Parsed[Draft]:
    """Parse the records of a data set; a record with the case id of an earlier one is bad."""
    first_with: dict[str, int] = {}

    def parse_unique(entry: Entry) -> Draft:
        draft = parse(entry)
        case_id = draft.request.case_id
        earlier = first_with.setdefault(case_id, entry.number)
        if earlier != entry.number:
            raise BadRecord("case_id", f"{short(case_id)} is taken by {unit} {earlier}; expected unique ids")
        return draft

    return parse_records(path, entries, parse_unique, on_bad_record, unit)


def locality_of(drafts: Parsed[Draft]) -> list[Probe]:
    """All locality probes of a file: the default source of unrelated sentences."""
    return [probe for draft in drafts.items for probe in draft.request.locality]


def _refuse_records(
    path: Path, total: int, bad: list[tuple[int, str]], unit: str, can_skip: bool
) -> NoReturn:
    shown = [f"{path}, {unit} {number}: {problem}" for number, problem in bad[:OFFENDERS_SHOWN]]
    if len(bad) > OFFENDERS_SHOWN:
        shown.append(f"... and {len(bad) - OFFENDERS_SHOWN} more")
    if can_skip:
        shown.append(
            f"{len(bad)} of {total} {unit}s cannot be used; "
            "mend the file, or set `on_bad_record: skip` to leave them out"
        )
    else:
        shown.append(f"none of the {total} {unit}s can be used: is this the right kind of file?")
        raise WrongKind("\n".join(shown))
    raise DataError("\n".join(shown))


# --- one data set ---------------------------------------------------------------------------


def build_dataset(
    name: str,
    path: Path,
    drafts: Parsed[Draft],
    pool: Sequence[Probe] | None = None,
    notes: dict[str, JSON] | None = None,
) -> Dataset:
    """Build a data set: unrelated sentences drawn from ``pool`` (if given), fingerprint, notes."""
    requests = tuple(draft.request for draft in drafts.items)
    if pool is not None:
        requests = with_unrelated(requests, pool)
    return Dataset(
        name=name,
        requests=requests,
        fingerprint=fingerprint(requests),
        notes={
            "path": str(path),
            "skipped": len(drafts.skipped),
            "skipped_records": list(drafts.skipped),
            "probes_without_answer": sum(draft.unanswered for draft in drafts.items),
            "without_unrelated": sum(request.unrelated is None for request in requests),
            **(notes or {}),
        },
    )


def build_with_train(
    name: str,
    path: Path,
    drafts: Parsed[Draft],
    train_path: Path | None,
    parse: Callable[[Entry], Probe],
    on_bad_record: OnBadRecord,
) -> Dataset:
    """A data set whose unrelated sentences come from a training file, or from other records if
    there is none."""
    if train_path is None:
        return build_dataset(name, path, drafts, locality_of(drafts))
    train = parse_records(train_path, read_json_list(train_path), parse, on_bad_record)
    notes: dict[str, JSON] = {"train_path": str(train_path), "train_skipped": len(train.skipped)}
    return build_dataset(name, path, drafts, train.items, notes)


def with_unrelated(requests: Sequence[EditRequest], pool: Sequence[Probe]) -> tuple[EditRequest, ...]:
    """Give every request a sentence (question and answer) about something else, written as its
    language is: with a space between the two, or without.

    The choice is a hash of the request's position, so it depends only on the files. A sentence is
    never taken if its question is one of the request's own locality probes, or is edited anywhere
    in the list: WISE's margin loss would then train on a probe that scores it, or on a fact that
    changes.
    """
    edited = {request.prompt for request in requests}
    sentences = {
        probe.prompt: f"{probe.prompt}{joiner_after(probe.prompt)}{probe.target}"
        for probe in pool
        if probe.prompt not in edited
    }
    questions = list(sentences)
    finished = []
    for index, request in enumerate(requests):
        own = {probe.prompt for probe in request.locality}
        start = _integer("unrelated", index)
        # questions are distinct, so one of the first len(own) + 1 is not one of the request's own
        tries = (
            questions[(start + step) % len(questions)] for step in range(min(len(own) + 1, len(questions)))
        )
        chosen = next((question for question in tries if question not in own), None)
        finished.append(replace(request, unrelated=None if chosen is None else sentences[chosen]))
    return tuple(finished)


def _integer(*parts: str | int) -> int:
    """A large integer that depends only on the parts, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest())


def _request_json(request: EditRequest) -> JSON:
    """A request as JSON. Fields added in later versions are left out if not set, so that earlier
    fingerprints stay valid."""
    later = {
        "passage": request.passage,
        "ood": list(request.ood),
        "any_of": request.any_of,
        "needs": request.needs,
    }
    said = {} if request.joiner is None else {"joiner": request.joiner}
    return (
        {name: value for name, value in later.items() if value}
        | said
        | {
            "case_id": request.case_id,
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "rephrases": list(request.rephrases),
            "locality": [_probe_json(probe) for probe in request.locality],
            "portability": [_probe_json(probe) for probe in request.portability],
            "unrelated": request.unrelated,
        }
    )


def _probe_json(probe: Probe) -> JSON:
    aliases = {"aliases": list(probe.aliases)} if probe.aliases else {}
    return {"prompt": probe.prompt, "target": probe.target} | aliases


def fingerprint(requests: Iterable[EditRequest]) -> str:
    """SHA-256 (hex) of the canonical JSON of a list of requests: keys sorted, no spaces, ASCII
    escapes."""
    rows = [_request_json(request) for request in requests]
    canonical = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def order_requests(dataset: Dataset, order: Order, seed: int) -> tuple[int, ...]:
    """The order of a cell's requests: a permutation of record indices.

    The whole data set is shuffled and a sweep takes the first N, so a larger N keeps the edits that
    are already done. Requests of one case (:attr:`EditRequest.needs`) stay adjacent and in order.
    """
    cases: list[list[int]] = []
    for index, request in enumerate(dataset.requests):
        case = [index]
        while len(case) <= request.needs and cases:
            case = cases.pop() + case
        cases.append(case)
    if order == "shuffle":
        random.Random(_integer("order", seed, dataset.fingerprint)).shuffle(cases)
    elif order != "file":
        raise DataError(f"order: {order!r} is not valid; choose file or shuffle")
    return tuple(index for case in cases for index in case)


# --- checks for warnings of `plan` ----------------------------------------------------------


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def count_duplicates(requests: Iterable[EditRequest]) -> int:
    """Number of requests whose prompt occurred before."""
    prompts = [request.prompt for request in requests]
    return len(prompts) - len(set(prompts))


def count_conflicts(requests: Iterable[EditRequest]) -> int:
    """Number of requests whose target differs from that of an earlier request about the same fact.

    The same fact means the same prompt, or the same subject in the same phrasing (the prompt
    without the subject). Prompts, subjects and targets are compared without case and runs of
    spaces.
    """
    earlier: dict[tuple[str, str], set[str]] = {}
    conflicts = 0
    for request in requests:
        subject, prompt, target = (
            _normal(request.subject),
            _normal(request.prompt),
            _normal(request.target_new),
        )
        keys = [("", prompt), (subject, _normal(prompt.replace(subject, " {} ")))]
        if any(earlier.get(key, set()) - {target} for key in keys):
            conflicts += 1
        for key in keys:
            earlier.setdefault(key, set()).add(target)
    return conflicts


def count_cut_cases(requests: Sequence[EditRequest], T: int) -> int:
    """Number of requests whose portability needs edits of their case that are not in the same group
    of T."""
    return sum(request.needs > position % T for position, request in enumerate(requests))


def count_edited_locality(requests: Sequence[EditRequest]) -> int:
    """Number of locality probes whose prompt is edited in this list, so that their answers *should*
    change."""
    edited = {request.prompt for request in requests}
    return sum(probe.prompt in edited for request in requests for probe in request.locality)


# --- overlap of a training set with an edit set ---------------------------------------------


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training request about an edited fact, the first such edit, and the criterion."""

    trained: EditRequest
    edited: EditRequest
    why: str

    def __str__(self) -> str:
        return (
            f"{self.trained.case_id}: {short(self.trained.prompt)} is edited as {self.edited.case_id}: "
            f"{short(self.edited.prompt)} ({self.why})"
        )


def find_overlap(training: Sequence[EditRequest], edits: Sequence[EditRequest]) -> list[Overlap]:
    """Training requests about a fact that is edited too: same prompt, or same subject and relation.

    Public files do not name relations consistently, or at all. Here two phrasings (a prompt or
    rephrase without its subject) belong to one relation if a request of either list uses both,
    directly or through other phrasings. Requests about one subject with the same known answer are
    also taken as one relation.
    """
    relations = _Relations()
    for request in (*edits, *training):
        relations.join(_phrasings(request))
    seen: dict[tuple[str, str, str], EditRequest] = {}

    def keys(request: EditRequest) -> Iterator[tuple[str, str, str]]:
        for text in (request.prompt, *request.rephrases):
            yield "same prompt", "", _normal(text)
        subject = _normal(request.subject)
        for phrasing in _phrasings(request):
            yield "same subject and relation", subject, relations.of(phrasing)
        if request.ground_truth is not None:
            yield "same subject and known answer", subject, _normal(request.ground_truth)

    for request in edits:
        for key in keys(request):
            seen.setdefault(key, request)
    found = []
    for request in training:
        met = next((key for key in keys(request) if key in seen), None)
        if met is not None:
            found.append(Overlap(request, seen[met], met[0]))
    return found


def _phrasings(request: EditRequest) -> list[str]:
    """The request's prompt and rephrases without the subject; texts that lack it are left out."""
    subject = _normal(request.subject)
    texts = [_normal(text) for text in (request.prompt, *request.rephrases)]
    return [_normal(text.replace(subject, " {} ")) for text in texts if subject and subject in text]


class _Relations:
    """Union-find over phrasings: those that occur together belong to one relation."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def of(self, phrasing: str) -> str:
        """The representative phrasing of a phrasing's relation."""
        path = []
        while (above := self._above.get(phrasing, phrasing)) != phrasing:
            path.append(phrasing)
            phrasing = above
        self._above.update(dict.fromkeys(path, phrasing))
        return phrasing

    def join(self, phrasings: Sequence[str]) -> None:
        for phrasing in phrasings[1:]:
            self._above[self.of(phrasing)] = self.of(phrasings[0])
