"""zsRE, the question-answering data set of relation extraction, in the format published with MEND.

Source: Levy et al., "Zero-Shot Relation Extraction via Reading Comprehension" (2017); edits,
rephrasings and locality questions from Mitchell et al., "Fast Model Editing at Scale" (2022). A
record:

    {"subject": ..., "src": question, "pred": ..., "rephrase": ..., "alt": new answer, "answers": [old answer, ...],
     "loc": "nq question: ...", "loc_ans": ..., "cond": ...}

The locality question keeps its ``nq question:`` prefix and gets no question mark, as for the
published numbers. Files in EasyEdit's layout are read too. Case ids are positions in the file,
counted from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from workers.data import easyedit
from workers.data.layouts import EASYEDIT, check_layout
from workers.data.records import (
    Draft,
    Entry,
    OnBadRecord,
    Record,
    TargetField,
    Text,
    build_with_train,
    parse_drafts,
    read_json_list,
    subject_as_in,
    validate,
    with_target,
)
from workers.types import Dataset, EditRequest, Probe


class LocalityRecord(Record):
    """The fields of a training record that are used."""

    loc: Text
    loc_ans: Text


class PortabilityRecord(Record):
    """The second hop that EasyEdit adds to some zsRE files."""

    question: Annotated[Text, Field(alias="New Question")]
    answer: Annotated[Text, Field(alias="New Answer")]


class ZsreRecord(LocalityRecord):
    subject: Text
    src: Text
    rephrase: Text
    alt: Text
    answers: Annotated[list[Text], Field(min_length=1)]
    portability: PortabilityRecord | None = None


def load(
    path: Path,
    train_path: Path | None = None,
    on_bad_record: OnBadRecord = "error",
    target_field: TargetField | None = None,
) -> Dataset:
    """Requests in file order; unrelated sentences from ``train_path``, else from other records of
    the same file."""
    entries = read_json_list(path)
    check_layout(path, "zsre", entries, reads=("zsre", EASYEDIT, "knowedit"))
    drafts = parse_drafts(path, entries, lambda entry: _parse(entry, target_field), on_bad_record)
    return build_with_train("zsre", path, drafts, train_path, _parse_locality, on_bad_record)


def _parse(entry: Entry, target_field: TargetField | None) -> Draft:
    if easyedit.is_easyedit(entry.value):
        return easyedit.parse(entry)
    record = validate(ZsreRecord, with_target(entry.value, "alt", target_field))
    hop = record.portability
    return Draft(
        EditRequest(
            case_id=str(entry.number - 1),
            prompt=record.src,
            subject=subject_as_in(record.src, record.subject),
            target_new=record.alt,
            ground_truth=record.answers[0],
            rephrases=(record.rephrase,),
            locality=(Probe(record.loc, record.loc_ans),),
            portability=() if hop is None else (Probe(hop.question, hop.answer),),
        )
    )


def _parse_locality(entry: Entry) -> Probe:
    record = validate(LocalityRecord, entry.value)
    return Probe(record.loc, record.loc_ans)
