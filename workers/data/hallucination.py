"""Hallucination: passages that a language model got wrong, with the corrected sentence as the edit;
WISE's layout.

Source: Manakul et al., "SelfCheckGPT" (2023), whose passages are about entries of WikiBio; edits
from Hartvigsen et al., "Aging with GRACE" (2023); the file layout from Wang et al., "WISE" (2024).
A record:

    {"prompt": "This is a Wikipedia passage about ...", "subject": ..., "target_new": corrected sentence,
     "locality_prompt": ..., "locality_ground_truth": ...}

The prompt holds the passage so far and the target is its next sentence: running text, scored by its
perplexity. There are no rephrasings. Unrelated sentences come from ``train_path``
(``hallucination-train.json``), else from other records.
"""

from __future__ import annotations

from pathlib import Path

from workers.data.layouts import check_layout
from workers.data.records import (
    Draft,
    Entry,
    OnBadRecord,
    Record,
    Text,
    build_with_train,
    parse_drafts,
    read_json_list,
    subject_as_in,
    validate,
)
from workers.types import Dataset, EditRequest, Probe


class LocalityRecord(Record):
    """The fields of a training record that are used."""

    locality_prompt: Text
    locality_ground_truth: Text


class HallucinationRecord(LocalityRecord):
    prompt: Text
    subject: Text
    target_new: Text


def load(path: Path, train_path: Path | None = None, on_bad_record: OnBadRecord = "error") -> Dataset:
    """Requests in file order."""
    entries = read_json_list(path)
    check_layout(path, "hallucination", entries, reads=("hallucination",))
    drafts = parse_drafts(path, entries, _parse, on_bad_record)
    return build_with_train("hallucination", path, drafts, train_path, parse_locality, on_bad_record)


def _parse(entry: Entry) -> Draft:
    record = validate(HallucinationRecord, entry.value)
    return Draft(
        EditRequest(
            case_id=str(entry.number - 1),
            prompt=record.prompt,
            subject=subject_as_in(record.prompt, record.subject),
            target_new=record.target_new,
            locality=(Probe(record.locality_prompt, record.locality_ground_truth),),
            passage=True,
        )
    )


def parse_locality(entry: Entry) -> Probe:
    """An unrelated sentence of a training file."""
    record = validate(LocalityRecord, entry.value)
    return Probe(record.locality_prompt, record.locality_ground_truth)
