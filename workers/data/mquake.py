"""MQuAKE (CF and T): cases of one to four edits, scored by multi-hop questions.

Source: Zhong et al., "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop
Questions" (2023), arXiv 2305.14795. A record:

    {"case_id": 1, "requested_rewrite": [{"prompt": "{} is a citizen of", "subject": ..., "question": ...,
     "target_new": {"str": ...}, "target_true": {"str": ...}}, ...], "questions": [three phrasings],
     "new_answer": ..., "new_answer_alias": [...], "single_hops": [...], "new_single_hops": [...]}

Each rewrite is a separate request; its question is its rephrasing. The multi-hop questions need all
edits of the case, so they belong to its last request (case id ``12/2`` is the second request of
case 12). Every order keeps the requests of a case adjacent; `plan` counts the cases that a group
border splits. (EasyEdit joins the prompts of a case into one instead.) ``portability_any_*`` is the
published score: one right answer to any of the questions is enough, and greedy generation may give
an alias. ``portability_*`` is the mean over the questions. There is no locality; unrelated
sentences come from single hops that no edit changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from workers.data.layouts import check_layout
from workers.data.records import (
    BadRecord,
    CaseId,
    Draft,
    Entry,
    OnBadRecord,
    Parsed,
    Record,
    Text,
    build_dataset,
    parse_records,
    read_json_list,
    short,
    validate,
)
from workers.types import Dataset, EditRequest, Probe

SLOT = "{}"


class Answer(Record):
    text: Annotated[Text, Field(alias="str")]


class Rewrite(Record):
    prompt: Text
    subject: Text
    question: Text
    target_new: Answer
    target_true: Answer | None = None


class Hop(Record):
    question: Text
    answer: Text


def _without_blanks(value: object) -> object:
    return [text for text in value if text != ""] if isinstance(value, list) else value


class MquakeRecord(Record):
    case_id: CaseId | None = None
    requested_rewrite: Annotated[list[Rewrite], Field(min_length=1)]
    questions: Annotated[list[Text], Field(min_length=1)]
    new_answer: Text
    new_answer_alias: Annotated[list[Text], BeforeValidator(_without_blanks)] = Field(default_factory=list)
    single_hops: list[Hop] = Field(default_factory=list)
    new_single_hops: list[Hop] = Field(default_factory=list)


def load(path: Path, on_bad_record: OnBadRecord = "error") -> Dataset:
    """The requests of all cases, in file order."""
    entries = read_json_list(path)
    check_layout(path, "mquake", entries, reads=("mquake",))
    first_with: dict[str, int] = {}

    def parse(entry: Entry) -> tuple[str, MquakeRecord]:
        record = validate(MquakeRecord, entry.value)
        for i, rewrite in enumerate(record.requested_rewrite):
            if rewrite.prompt.count(SLOT) != 1:
                field = f"requested_rewrite.{i}.prompt"
                raise BadRecord(
                    field, f"expected one {SLOT} where the subject goes; got {short(rewrite.prompt)}"
                )
        case = record.case_id or str(entry.number)
        earlier = first_with.setdefault(case, entry.number)
        if earlier != entry.number:
            raise BadRecord("case_id", f"{short(case)} is taken by record {earlier}; expected unique ids")
        return case, record

    cases = parse_records(path, entries, parse, on_bad_record)
    drafts = Parsed(
        tuple(Draft(request) for case, record in cases.items for request in _requests(case, record)),
        cases.skipped,
    )
    return build_dataset("mquake", path, drafts, _unchanged(cases), {"cases": len(cases.items)})


def _requests(case: str, record: MquakeRecord) -> list[EditRequest]:
    questions = tuple(
        Probe(question, record.new_answer, tuple(record.new_answer_alias)) for question in record.questions
    )
    last = len(record.requested_rewrite) - 1
    return [
        EditRequest(
            case_id=f"{case}/{i + 1}",
            prompt=rewrite.prompt.replace(SLOT, rewrite.subject),
            subject=rewrite.subject,
            target_new=rewrite.target_new.text,
            ground_truth=None if rewrite.target_true is None else rewrite.target_true.text,
            rephrases=(rewrite.question,),
            portability=questions if i == last else (),
            any_of=i == last,
            needs=last if i == last else 0,
        )
        for i, rewrite in enumerate(record.requested_rewrite)
    ]


def _unchanged(cases: Parsed[tuple[str, MquakeRecord]]) -> list[Probe]:
    """Single hops of all cases that stay true and whose question is not that of an edit."""
    edited = {rewrite.question for _, record in cases.items for rewrite in record.requested_rewrite}
    kept = []
    for _, record in cases.items:
        after = {(hop.question, hop.answer) for hop in record.new_single_hops}
        kept += [
            Probe(hop.question, hop.answer)
            for hop in record.single_hops
            if (hop.question, hop.answer) in after and hop.question not in edited
        ]
    return kept
