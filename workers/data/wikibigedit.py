"""WikiBigEdit: half a million real changes of Wikidata in eight time steps, one file each.

Source: Thede et al., "Understanding the Limits of Lifelong Knowledge Editing in LLMs", arXiv
2503.05683. A record:

    {"tag": "new" or "update", "subject": ..., "update": question, "ans": answer, "rephrase": ..., "personas": ...,
     "mhop": second-hop question, "mhop_ans": ..., "loc": ..., "loc_ans": ...}

Everything but subject, question and answer may be missing (null, NaN or empty). ``personas`` is the
same question in a persona's words, with the same answer: a rephrasing here, while EasyEdit lists it
under portability.
"""

from __future__ import annotations

from pathlib import Path

from workers.data.layouts import check_layout
from workers.data.records import (
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


class WikiBigEditRecord(Record):
    subject: Text
    update: Text
    ans: Text
    rephrase: TextOrNone = None
    personas: TextOrNone = None
    mhop: TextOrNone = None
    mhop_ans: TextOrNone = None
    loc: TextOrNone = None
    loc_ans: TextOrNone = None


def load(
    path: Path, on_bad_record: OnBadRecord = "error", target_field: TargetField | None = None
) -> Dataset:
    """Requests in file order; unrelated sentences from the locality questions of other records."""
    entries = read_json_list(path)
    check_layout(path, "wikibigedit", entries, reads=("wikibigedit",))
    drafts = parse_drafts(path, entries, lambda entry: _parse(entry, target_field), on_bad_record)
    return build_dataset("wikibigedit", path, drafts, locality_of(drafts))


def _parse(entry: Entry, target_field: TargetField | None) -> Draft:
    record = validate(WikiBigEditRecord, with_target(entry.value, "ans", target_field))
    locality, unanswered = _probe(record.loc, record.loc_ans)
    portability, no_hop = _probe(record.mhop, record.mhop_ans)
    return Draft(
        EditRequest(
            case_id=str(entry.number - 1),
            prompt=record.update,
            subject=subject_as_in(record.update, record.subject),
            target_new=record.ans,
            rephrases=tuple(text for text in (record.rephrase, record.personas) if text is not None),
            locality=locality,
            portability=portability,
        ),
        unanswered=unanswered + no_hop,
    )


def _probe(prompt: str | None, answer: str | None) -> tuple[tuple[Probe, ...], int]:
    """The probe, if there is one, and the number of probes left out for lack of an answer."""
    if prompt is None:
        return (), 0
    return ((Probe(prompt, answer),), 0) if answer is not None else ((), 1)
