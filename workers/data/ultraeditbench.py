"""UltraEditBench: two million edits of facts from Wikidata, one file.

Source: Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language
Models", arXiv 2505.14679. A record:

    {"case_id": ..., "prompt": question, "subject": ..., "ans": answer, "rephrase_prompt": ...,
     "loc": ..., "loc_ans": ...}

The answer may be called ``alt``, as in MEND's zsRE; a record with both names its target by
``dataset.target_field``. Rephrasing and locality question may be missing (null, NaN or empty).
"""

from __future__ import annotations

from pathlib import Path

from workers.data.layouts import check_layout
from workers.data.records import (
    CaseId,
    Draft,
    Entry,
    OnBadRecord,
    Record,
    TargetField,
    Text,
    TextOrNone,
    build_dataset,
    locality_of,
    parse_drafts,
    read_json_list,
    subject_as_in,
    validate,
    with_target,
)
from workers.types import Dataset, EditRequest, Probe


class UltraEditBenchRecord(Record):
    case_id: CaseId | None = None
    prompt: Text
    subject: Text
    ans: Text
    rephrase_prompt: TextOrNone = None
    loc: TextOrNone = None
    loc_ans: TextOrNone = None


def load(
    path: Path, on_bad_record: OnBadRecord = "error", target_field: TargetField | None = None
) -> Dataset:
    """Requests in file order; unrelated sentences from the locality questions of other records."""
    entries = read_json_list(path)
    check_layout(path, "ultraeditbench", entries, reads=("ultraeditbench",))
    drafts = parse_drafts(path, entries, lambda entry: _parse(entry, target_field), on_bad_record)
    return build_dataset("ultraeditbench", path, drafts, locality_of(drafts))


def _parse(entry: Entry, target_field: TargetField | None) -> Draft:
    record = validate(UltraEditBenchRecord, with_target(entry.value, "ans", target_field))
    locality = () if record.loc is None or record.loc_ans is None else (Probe(record.loc, record.loc_ans),)
    return Draft(
        EditRequest(
            case_id=record.case_id or str(entry.number - 1),
            prompt=record.prompt,
            subject=subject_as_in(record.prompt, record.subject),
            target_new=record.ans,
            rephrases=() if record.rephrase_prompt is None else (record.rephrase_prompt,),
            locality=locality,
        ),
        unanswered=int(record.loc is not None and record.loc_ans is None),
    )
