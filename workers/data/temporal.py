"""Temporal: facts about entities that emerged after a model was trained, with real text about them;
WISE's layout.

Source: Wang et al., "WISE" (2024), out-of-distribution experiment. A record:

    {"prompt": ..., "subject": ..., "target_new": text to learn, "ood_rephrase": real text about the same subject,
     "locality_prompt": ..., "locality_ground_truth": ...}

``ood_rephrase`` is a separate text, not a question with the target as its answer: it is scored
token by token (columns ``ood_*``). Unrelated sentences come from ``train_path``
(``temporal-train.json``), else from other records.
"""

from __future__ import annotations

from pathlib import Path

from workers.data.hallucination import HallucinationRecord, parse_locality
from workers.data.layouts import check_layout
from workers.data.records import (
    Draft,
    Entry,
    OnBadRecord,
    Text,
    build_with_train,
    parse_drafts,
    read_json_list,
    subject_as_in,
    validate,
)
from workers.types import Dataset, EditRequest, Probe


class TemporalRecord(HallucinationRecord):
    ood_rephrase: Text


def load(path: Path, train_path: Path | None = None, on_bad_record: OnBadRecord = "error") -> Dataset:
    """Requests in file order."""
    entries = read_json_list(path)
    check_layout(path, "temporal", entries, reads=("temporal",))
    drafts = parse_drafts(path, entries, _parse, on_bad_record)
    return build_with_train("temporal", path, drafts, train_path, parse_locality, on_bad_record)


def _parse(entry: Entry) -> Draft:
    record = validate(TemporalRecord, entry.value)
    return Draft(
        EditRequest(
            case_id=str(entry.number - 1),
            prompt=record.prompt,
            subject=subject_as_in(record.prompt, record.subject),
            target_new=record.target_new,
            locality=(Probe(record.locality_prompt, record.locality_ground_truth),),
            passage=True,
            ood=(record.ood_rephrase,),
        )
    )
