"""Recognition of a file's kind by the keys of its records.

Public layouts overlap: a Hallucination file has every key that zsRE's loader needs of EasyEdit's
layout, and its passages would be edited and scored as answers. So each loader first states the
layouts it reads; a file with most records in another layout is rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from workers.data.records import Entry, WrongKind

SEEN = 200
"""Number of records that are checked."""

PASSAGE_WORDS = 8
"""Targets of at least this many words (median) are sentences, not answers: zsRE has 3,
Hallucination 20."""

EASYEDIT = "EasyEdit's layout of zsre or counterfact"
WIKIBIO = "knowedit's WikiBio"

KINDS: Mapping[str, tuple[str, str]] = {
    "zsre": ("zsre", "src and alt"),
    "counterfact": ("counterfact", "an object requested_rewrite"),
    "mquake": ("mquake", "a list requested_rewrite"),
    "wikibigedit": ("wikibigedit", "update and ans"),
    "temporal": ("temporal", "ood_rephrase"),
    "hallucination": ("hallucination", "prompt, target_new and locality_prompt with sentences for targets"),
    "knowedit": ("knowedit", "grouped locality or portability"),
    WIKIBIO: ("knowedit", "text and labels"),
    EASYEDIT: ("zsre or counterfact", "prompt, target_new and rephrase_prompt"),
    "ultraeditbench": ("ultraeditbench", "prompt and ans"),
    "jsonl": ("jsonl", "the fields of our own format"),
}
"""Layout -> (the kind to name in a spec, the keys that identify it)."""


def layout_of(values: Sequence[Any]) -> str | None:
    """The layout of most of the records; None if it is not clear."""
    records = [value for value in values[:SEEN] if isinstance(value, dict)]
    counts = Counter(found for record in records if (found := _layout(record)) is not None)
    if not counts:
        return None
    layout, count = counts.most_common(1)[0]
    if 2 * count <= len(values[:SEEN]):
        return None
    if layout == "flat":
        targets = [str(record.get("target_new")) for record in records if _layout(record) == "flat"]
        return "hallucination" if median(len(target.split()) for target in targets) >= PASSAGE_WORDS else None
    return layout


def _layout(record: dict[str, Any]) -> str | None:
    keys = record.keys()
    if {"src", "alt"} <= keys:
        return "zsre"
    rewrite = record.get("requested_rewrite")
    if isinstance(rewrite, list):
        return "mquake"
    if isinstance(rewrite, dict):
        return "counterfact"
    if {"update", "ans"} <= keys:
        return "wikibigedit"
    if "ood_rephrase" in keys:
        return "temporal"
    grouped = any(isinstance(record.get(key), dict) for key in ("locality", "portability"))
    if {"text", "labels"} <= keys:
        return WIKIBIO
    if not {"prompt", "target_new"} <= keys:
        return "ultraeditbench" if {"prompt", "subject"} <= keys and {"ans", "alt"} & keys else None
    if grouped:
        return "knowedit"
    if {"rephrases", "unrelated"} & keys or any(
        isinstance(record.get(key), list) and record[key] for key in ("locality", "portability")
    ):
        return "jsonl"
    if "rephrase_prompt" in keys:
        return EASYEDIT
    return "flat" if "locality_prompt" in keys else None


def check_layout(path: Path, kind: str, entries: Sequence[Entry], reads: Sequence[str]) -> None:
    """Raise DataError for a file that is clearly of another kind. A file of unclear kind passes;
    its records are validated later."""
    found = layout_of([entry.value for entry in entries])
    if found is None or found in reads:
        return
    name, keys = KINDS[found]
    raise WrongKind(
        f"{path}: none of the {len(entries)} records can be used: is this the right kind of file? It looks "
        f"like "
        f"{found} (its records have {keys}), not like {kind}",
        name.split(" or "),
    )
