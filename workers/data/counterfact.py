"""CounterFact, in the format published with ROME.

Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022). A record:

    {"case_id": 0, "requested_rewrite": {"prompt": "The mother tongue of {} is", "subject": ..., "relation_id": ...,
     "target_new": {"str": ...}, "target_true": {"str": ...}}, "paraphrase_prompts": [...],
     "neighborhood_prompts": [...], ...}

The neighbourhood prompts are about other subjects with the same old answer, which is their expected
answer. Those of other records also give the unrelated sentences. Files in EasyEdit's layout are
read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from workers.data import easyedit
from workers.data.layouts import EASYEDIT, check_layout
from workers.data.records import (
    BadRecord,
    CaseId,
    Draft,
    Entry,
    OnBadRecord,
    Record,
    Text,
    build_dataset,
    locality_of,
    parse_drafts,
    read_json_list,
    short,
    validate,
)
from workers.types import Dataset, EditRequest, Probe

SLOT = "{}"


class Answer(Record):
    text: Annotated[Text, Field(alias="str")]


class RequestedRewrite(Record):
    prompt: Text
    subject: Text
    target_new: Answer
    target_true: Answer


class CounterFactRecord(Record):
    case_id: CaseId
    requested_rewrite: RequestedRewrite
    paraphrase_prompts: list[Text]
    neighborhood_prompts: list[Text]


def load(path: Path, on_bad_record: OnBadRecord = "error") -> Dataset:
    """Requests in file order; unrelated sentences from the neighbourhood of other records."""
    entries = read_json_list(path)
    check_layout(path, "counterfact", entries, reads=("counterfact", EASYEDIT, "knowedit"))
    drafts = parse_drafts(path, entries, _parse, on_bad_record)
    return build_dataset("counterfact", path, drafts, locality_of(drafts))


def _parse(entry: Entry) -> Draft:
    if easyedit.is_easyedit(entry.value):
        return easyedit.parse(entry)
    record = validate(CounterFactRecord, entry.value)
    rewrite = record.requested_rewrite
    if rewrite.prompt.count(SLOT) != 1:
        raise BadRecord(
            "requested_rewrite.prompt",
            f"expected one {SLOT} where the subject goes; got {short(rewrite.prompt)}",
        )
    truth = rewrite.target_true.text
    return Draft(
        EditRequest(
            case_id=record.case_id,
            prompt=rewrite.prompt.replace(SLOT, rewrite.subject),
            subject=rewrite.subject,
            target_new=rewrite.target_new.text,
            ground_truth=truth,
            rephrases=tuple(record.paraphrase_prompts),
            locality=tuple(Probe(prompt, truth) for prompt in record.neighborhood_prompts),
        )
    )
