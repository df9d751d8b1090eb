"""KnowEdit's files: WikiData recent, WikiData counterfact, ZsRE and WikiBio.

Source: Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", arXiv
2401.01286. The first three have EasyEdit's grouped layout:

    {"subject": ..., "prompt": ..., "target_new": ..., "ground_truth": ...,
     "portability": {"Reasoning" | "Subject_Aliasing" | "Logical_Generalization":
                     [{"prompt": ..., "ground_truth": [[...]]}]},
     "locality": {"Relation_Specificity" | "Forgetfulness": [...]}}

A request's portability is the mean over the probes of all its groups; its
``portability_group_mean`` is the mean of its groups' means, as published
(:mod:`workers.scoring.group_means`). WikiBio writes ``concept``, ``text`` and ``labels`` for
subject, prompt and target, and its targets are passages, scored by their perplexity. ConvSent and
Sanitation change no facts and are not read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from workers.data import easyedit
from workers.data.layouts import EASYEDIT, WIKIBIO, check_layout
from workers.data.records import (
    Draft,
    Entry,
    OnBadRecord,
    build_dataset,
    locality_of,
    parse_drafts,
    read_json_list,
)
from workers.types import Dataset

NAMES = {"concept": "subject", "text": "prompt", "labels": "target_new"}
"""WikiBio's field name -> the name in the other files."""


def load(path: Path, on_bad_record: OnBadRecord = "error") -> Dataset:
    """Requests in file order; unrelated sentences from the locality probes of other records."""
    entries = read_json_list(path)
    check_layout(path, "knowedit", entries, reads=("knowedit", WIKIBIO, EASYEDIT))
    drafts = parse_drafts(path, entries, _parse, on_bad_record)
    return build_dataset("knowedit", path, drafts, locality_of(drafts))


def _parse(entry: Entry) -> Draft:
    raw: Any = entry.value
    if not isinstance(raw, dict) or "text" not in raw or "prompt" in raw:
        return easyedit.parse(entry)
    renamed = {NAMES.get(name, name): value for name, value in raw.items()}
    subject, prompt = renamed.get("subject"), renamed["prompt"]
    if (
        isinstance(subject, str)
        and isinstance(prompt, str)
        and subject.replace("_", " ").casefold() in prompt.casefold()
    ):
        renamed["subject"] = subject.replace("_", " ")  # some concepts are spelt like page titles
    draft = easyedit.parse(Entry(entry.number, renamed))
    return replace(draft, request=replace(draft.request, passage=True))
