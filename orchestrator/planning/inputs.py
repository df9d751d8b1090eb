"""Data sets, training data and models as the planner reads them from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.planning.memory import TEMPLATE_TOKENS
from orchestrator.planning.spec import DatasetSpec, SweepSpec
from workers.data import (
    count_conflicts,
    count_cut_cases,
    count_duplicates,
    count_edited_locality,
    find_overlap,
    load_dataset,
    order_requests,
)
from workers.job import ScoreConfig
from workers.model.config import EMBEDDED
from workers.scoring.registry import SCORES
from workers.types import Dataset, EditRequest, SpecError

if TYPE_CHECKING:
    from workers.artifacts.pretrain import TrainingSource


OFFENDERS_SHOWN = 20
"""Requests, both trained on and edited, that one error message lists."""

EMBEDDED_WORLD = "tinyworld"


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    return load_dataset(spec.kind, spec.path, spec.train_path, spec.on_bad_record)


def read_training(spec: SweepSpec) -> tuple[TrainingSource, tuple[EditRequest, ...]] | None:
    """Read the training data of networks; None if the spec names none and the data set brings none."""
    from workers.artifacts.pretrain import training_source

    told, dataset = spec.training, spec.dataset
    shards = told.shards or None
    if told.kind is not None:
        return training_source(told.kind, told.path, shards, told.on_bad_record)
    if dataset.kind == EMBEDDED_WORLD or spec.model.name == EMBEDDED:
        return training_source(EMBEDDED_WORLD, None, shards)
    if dataset.kind == "zsre" and dataset.train_path is not None:  # other kinds take mere sentences from there
        return training_source(dataset.kind, dataset.train_path, shards, dataset.on_bad_record)
    return None


def count_overlap(spec: SweepSpec, data: Dataset, training: Sequence[EditRequest]) -> int:
    """Count the requests that are both trained on and edited under any seed. Raises :class:`SpecError` listing them."""
    edited: set[int] = set()
    for seed in spec.grid.seeds:
        edited.update(order_requests(data, spec.dataset.order, seed)[: spec.dataset.edits])
        if len(edited) == len(data.requests):
            break
    found = find_overlap(training, [data.requests[i] for i in sorted(edited)])
    if found and not spec.training.allow_overlap:
        shown = "\n".join(f"  {offender}" for offender in found[:OFFENDERS_SHOWN])
        more = f"\n  ... and {len(found) - OFFENDERS_SHOWN} more" if len(found) > OFFENDERS_SHOWN else ""
        raise SpecError(
            f"training: {len(found)} of its {len(training)} requests are edited by the sweep, which would be judged on what "
            f"it has seen:\n{shown}{more}\nremove them from the training data, or set training.allow_overlap: true, which "
            "every row will say"
        )
    return len(found)


def longest_tokens(data: Dataset, score: ScoreConfig) -> int:
    """A bound on a sequence's tokens: three characters make at least one, and templates may stand before a prompt."""
    longest = 0
    for request in data.requests:
        longest = max([longest, *map(len, request.ood)])
        targets = [request.target_new, *(p.target for p in (*request.locality, *request.portability))]
        prompts = [request.prompt, *request.rephrases, *(p.prompt for p in (*request.locality, *request.portability))]
        longest = max(longest, max(map(len, prompts)) + max(map(len, targets)), len(request.unrelated or ""))
    return SCORES.longest(score, longest // 3 + TEMPLATE_TOKENS)


def dataset_notes(spec: SweepSpec, data: Dataset) -> tuple[str, ...]:
    """Notes and warnings about the requests that will be edited (those of the first seed)."""
    order = order_requests(data, spec.dataset.order, spec.grid.seeds[0])
    chosen: list[EditRequest] = [data.requests[i] for i in order[: spec.dataset.edits]]
    counts = (
        (count_duplicates(chosen), "requests repeat the prompt of an earlier one"),
        (count_conflicts(chosen), "requests contradict another one (same prompt, or subject and relation)"),
        (count_edited_locality(chosen), "locality probes are themselves edited"),
    )
    notes = [f"{spec.dataset.edits} of {len(data.requests)} requests of {data.name}, order: {spec.dataset.order}"]
    notes += [f"{count} {what}" for count, what in counts if count]
    if data.notes.get("skipped"):
        notes.append(f"{data.notes['skipped']} records of the file were skipped as unusable")
    if spec.grid.rollback == "group":
        for T in spec.grid.T:
            if cut := count_cut_cases(chosen, T):
                notes.append(
                    f"T={T}: {cut} cases of several edits are cut by a group's border; their portability lacks an edit"
                )
    return tuple(notes)
