"""Recognition of a file's kind by the keys of its records.

The layouts of the field overlap: a Hallucination file has every key that zsRE's loader needs of
EasyEdit's layout, and would be edited and scored as if its passages were answers. So each loader
first says which layouts it reads; a file in which most records are of another is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from workers.data.records import Entry, WrongKind

SEEN = 200
"""Records looked at."""

PASSAGE_WORDS = 8
"""From this many words on (median) a target is a sentence and not an answer: zsRE's have three,
Hallucination's twenty."""

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
"""Layout -> (the kind to name in a spec, the keys it is known by)."""


def layout_of(values: Sequence[Any]) -> str | None:
    """The layout of most of the records; None where nothing is typical enough to tell."""
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
    """Refuse a file that is clearly of another kind; one that shows no kind goes on, and its
    records say what is wrong."""
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
