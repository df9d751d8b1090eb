"""Columns that scoring fills."""

from __future__ import annotations

import math

from workers.scoring.probes import KINDS, PROTOCOLS, Answer, EncodedProbe, Text
from workers.types import EditRequest

_EXP_LIMIT = 709.0


def exp(value: float) -> float:
    """Infinity where Python's own would raise."""
    return math.exp(value) if value < _EXP_LIMIT else math.inf


class ItemScores:
    """Gathers the probes of one item."""

    def __init__(self, request: EditRequest) -> None:
        self.request = request
        self.values: dict[str, list[float]] = {}
        self.extra: dict[str, float] = {}
        self.splits = 0

    def add(self, probe: EncodedProbe, before: Answer, after: Answer, before_text: Text, after_text: Text) -> None:
        target = probe.scored
        if probe.kind == "ood":
            for suffix, answer in (("", after), ("_base", before)):
                hits = answer.hits(target)
                self.values.setdefault(f"ood_token{suffix}", []).append(sum(hits) / len(hits))
                self.values.setdefault(f"ood_confident{suffix}", []).append(answer.confident)
            return
        if probe.kind == "locality":
            said = before.argmax[: len(target)]
            self._note("locality", "", after.hits(said), after_text.text is not None and after_text == before_text)
            return
        for suffix, answer, text in (("", after, after_text), ("_base", before, before_text)):
            self._note(probe.kind, suffix, answer.hits(target), text.natural and text.text in probe.wanted)
        if probe.kind == "reliability":
            self.extra = {
                "target_logprob": after.logprob,
                "target_logprob_base": before.logprob,
                "min_margin": after.margin,
            }
            if self.request.passage:
                self.extra |= {"perplexity": exp(-after.logprob), "perplexity_base": exp(-before.logprob)}

    def _note(self, kind: str, suffix: str, hits: list[bool], generated: bool) -> None:
        token = sum(hits) / len(hits)
        for protocol, value in zip(PROTOCOLS, (token, float(all(hits)), float(generated)), strict=True):
            self.values.setdefault(f"{kind}_{protocol}{suffix}", []).append(value)

    def scores(self, generated: bool) -> dict[str, float | None]:
        """Every score column; None where the request has no such probe (or nothing was generated)."""
        out: dict[str, float | None] = {}
        for name in SCORE_COLUMNS:
            values = self.values.get(name)
            kept = values and (generated or "generated" not in name)
            out[name] = sum(values) / len(values) if values and kept else None
        for name in ANY_COLUMNS:
            values = self.values.get(name.replace("_any", "")) if self.request.any_of else None
            kept = values and (generated or "generated" not in name)
            out[name] = max(values) if values and kept else None
        for name in OOD_COLUMNS:
            values = self.values.get(name)
            out[name] = sum(values) / len(values) if values else None
        for name in EXTRA_COLUMNS:
            value = self.extra.get(name)
            out[name] = value if value is not None and math.isfinite(value) else None
        out["score_splits"] = self.splits
        return out


SCORE_COLUMNS: tuple[str, ...] = tuple(
    f"{kind}_{protocol}{suffix}"
    for suffix in ("", "_base")
    for kind in KINDS
    for protocol in PROTOCOLS
    if not (suffix and kind == "locality")
)
ANY_COLUMNS = tuple(
    f"portability_any_{protocol}{suffix}" for suffix in ("", "_base") for protocol in ("exact", "generated")
)
OOD_COLUMNS = ("ood_token", "ood_confident", "ood_token_base", "ood_confident_base")
EXTRA_COLUMNS = ("target_logprob", "target_logprob_base", "min_margin", "perplexity", "perplexity_base")
