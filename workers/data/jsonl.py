"""Our own format for custom data sets: one JSON object per line with the fields of EditRequest.

    {"prompt": "The capital of Freedonia is", "subject": "Freedonia", "target_new": "Glorious City",
     "ground_truth": "Fredville", "rephrases": ["Freedonia's capital is"],
     "locality": [{"prompt": "The capital of Sylvania is", "target": "Strakos"}], "portability": [],
     "unrelated": "Bread rises because yeast makes gas."}

``prompt``, ``subject`` and ``target_new`` are required. ``case_id`` is the line number unless
given. Unknown keys are rejected, so that misspelt keys are found.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, Field

from workers.data.layouts import check_layout
from workers.data.records import (
    CaseId,
    Draft,
    Entry,
    OnBadRecord,
    ProbeRecord,
    Record,
    Text,
    build_dataset,
    parse_drafts,
    read_json_lines,
    subject_as_in,
    validate,
)
from workers.types import Dataset, EditRequest


class JsonlRecord(Record):
    model_config = ConfigDict(extra="forbid")

    case_id: CaseId | None = None
    prompt: Text
    subject: Text
    target_new: Text
    ground_truth: Text | None = None
    rephrases: list[Text] = Field(default_factory=list)
    locality: list[ProbeRecord] = Field(default_factory=list)
    portability: list[ProbeRecord] = Field(default_factory=list)
    unrelated: Text | None = None


def load(path: Path, on_bad_record: OnBadRecord = "error") -> Dataset:
    """Requests in file order. The data set has the file's name, which the results table shows."""
    entries = read_json_lines(path)
    check_layout(path, "jsonl", entries, reads=("jsonl",))
    drafts = parse_drafts(path, entries, _parse, on_bad_record, unit="line")
    return build_dataset(path.stem, path, drafts)


def _parse(entry: Entry) -> Draft:
    record = validate(JsonlRecord, entry.value)
    return Draft(
        EditRequest(
            case_id=record.case_id or str(entry.number),
            prompt=record.prompt,
            subject=subject_as_in(record.prompt, record.subject),
            target_new=record.target_new,
            ground_truth=record.ground_truth,
            rephrases=tuple(record.rephrases),
            locality=tuple(probe.probe() for probe in record.locality),
            portability=tuple(probe.probe() for probe in record.portability),
            unrelated=record.unrelated,
        )
    )
