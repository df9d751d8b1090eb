"""Everything that planning reads from disk, read once; and facts about it that the planner asks
for.

inputs = read_inputs(spec)         # data set, model files, hyperparameter files, corpora, training data
plan = Planner(inputs).plan(...)   # reads nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from workers.data.scripts import count_repeated_subjects, count_subjects_inside_words, joiner_of
from workers.job import ScoreConfig
from workers.model.config import EMBEDDED, ModelFingerprint, ModelShape, fingerprint_model, has_chat_template
from workers.scoring.registry import SCORES
from workers.types import Dataset, EditRequest, SpecError

if TYPE_CHECKING:
    from workers.artifacts.base import ArtifactSpec
    from workers.artifacts.pretrain import TrainingSource
    from workers.methods.base import MethodConfig


OFFENDERS_SHOWN = 20
"""Requests, both trained on and edited, that one error message lists."""

EMBEDDED_WORLD = "tinyworld"


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    return load_dataset(
        spec.kind, spec.path, spec.train_path, spec.on_bad_record, spec.joiner, spec.target_field
    )


def read_training(spec: SweepSpec) -> tuple[TrainingSource, tuple[EditRequest, ...]] | None:
    """Read the training data of networks; None if the spec names none and the data set brings
    none."""
    from workers.artifacts.pretrain import training_source

    told, dataset = spec.training, spec.dataset
    shards = told.shards or None
    if told.kind is not None:
        return training_source(
            told.kind, told.path, shards, told.on_bad_record, dataset.joiner, told.target_field
        )
    if dataset.kind == EMBEDDED_WORLD or spec.model.name == EMBEDDED:
        return training_source(EMBEDDED_WORLD, None, shards, joiner=dataset.joiner)
    if (
        dataset.kind == "zsre" and dataset.train_path is not None
    ):  # other kinds take mere sentences from there
        return training_source(
            dataset.kind,
            dataset.train_path,
            shards,
            dataset.on_bad_record,
            dataset.joiner,
            dataset.target_field,
        )
    return None


@dataclass(frozen=True)
class MethodInputs:
    """One entry of the spec's ``methods`` with its hyperparameters resolved."""

    config: MethodConfig
    artifacts: Mapping[int, tuple[ArtifactSpec, ...]]
    """The artifacts that are built before its edits, for each seed that is an experiment of its
    own."""


@dataclass(frozen=True)
class Inputs:
    """All that a plan depends on beside a results folder's contents."""

    spec: SweepSpec
    dataset: Dataset
    fingerprint: ModelFingerprint
    shape: ModelShape
    methods: tuple[MethodInputs, ...]
    """In the order of ``spec.methods``."""
    trained_on: tuple[EditRequest, ...] | None = None
    """The requests that networks learn from; None if no method trains any."""


def read_inputs(spec: SweepSpec, dataset: Dataset | None = None) -> Inputs:
    """Read what a sweep names: each file once, and no weights into memory. ``dataset``: the spec's,
    where it was read before.

    Raises :class:`SpecError`, ``DataError`` or ``ModelError`` if something is missing, unusable or
    smaller than asked for.
    """
    # Importing these brings torch, which a worker that reads a data set's file has not always
    # loaded yet.
    from workers.artifacts.stats import CorpusHashes
    from workers.methods import get_method, load_config
    from workers.methods.base import ArtifactContext
    from workers.model.base import check_chat_template, model_shape

    data = dataset or load_spec_dataset(spec.dataset)
    if spec.dataset.edits > len(data.requests):
        raise SpecError(
            f"dataset.edits: {spec.dataset.edits} edits asked for, but the data set {data.name!r} has "
            f"{len(data.requests)}; the largest valid value is {len(data.requests)}"
        )
    fingerprint = fingerprint_model(spec.model)
    if spec.chat_template and not has_chat_template(spec.model):
        raise SpecError(
            f"chat_template: true, but the tokenizer of {spec.model.name!r} has no chat template; "
            "set chat_template: false, or give an instruct model"
        )
    if spec.chat_template:
        check_chat_template(spec.model, spec.template)
    SCORES.check(spec.scoring)
    shape = model_shape(spec.model)
    training: tuple[TrainingSource, tuple[EditRequest, ...]] | None = None
    corpora = CorpusHashes()
    methods = []
    for method in spec.methods:
        try:
            kind = get_method(method.method)
            config = load_config(
                method.method,
                method.hparams,
                method.hparams_file,
                spec.model,
                method.protocol or spec.protocol,
            )
            config.check(shape)
        except SpecError as e:
            raise SpecError(f"methods: {method.label}: {e}") from None
        if kind.needs_pretraining and training is None:
            training = read_training(spec)
        source = training[0] if training is not None and kind.needs_pretraining else None
        contexts = {
            seed: ArtifactContext(fingerprint, spec.model, seed, source, corpora)
            for seed in distinct_seeds(spec, config.uses_seed)
        }
        artifacts = {seed: config.artifacts(context) for seed, context in contexts.items()}
        methods.append(MethodInputs(config, artifacts))
    return Inputs(spec, data, fingerprint, shape, tuple(methods), None if training is None else training[1])


def distinct_seeds(spec: SweepSpec, uses_seed: bool) -> tuple[int, ...]:
    """The grid's seeds; the first alone where nothing is drawn at random, neither by the method nor
    in the requests' order."""
    several = uses_seed or spec.dataset.order == "shuffle"
    return spec.grid.seeds if several else spec.grid.seeds[:1]


def count_overlap(spec: SweepSpec, data: Dataset, training: Sequence[EditRequest]) -> int:
    """Count the requests that are both trained on and edited under any seed. Raises
    :class:`SpecError` listing them."""
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
            f"training: {len(found)} of its {len(training)} requests are edited by the sweep, which would "
            f"be judged on what "
            f"it has seen:\n{shown}{more}\nremove them from the training data, or set "
            f"training.allow_overlap: true, which "
            "every row will say"
        )
    return len(found)


def longest_tokens(data: Dataset, score: ScoreConfig) -> int:
    """A bound on a sequence's tokens: three characters make at least one, and templates may stand
    before a prompt."""
    longest = 0
    for request in data.requests:
        longest = max([longest, *map(len, request.ood)])
        targets = [request.target_new, *(p.target for p in (*request.locality, *request.portability))]
        prompts = [
            request.prompt,
            *request.rephrases,
            *(p.prompt for p in (*request.locality, *request.portability)),
        ]
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
        (
            count_repeated_subjects(chosen),
            "prompts hold their subject more than once: where tokens of the subject are read, the last one's",
        ),
        (count_subjects_inside_words(chosen), "prompts hold their subject only as a part of a longer word"),
        (
            sum(joiner_of(request, request.prompt) == "" for request in chosen),
            "prompts are followed by their answer without a space (dataset.joiner)",
        ),
    )
    notes = [
        f"{spec.dataset.edits} of {len(data.requests)} requests of {data.name}, order: {spec.dataset.order}"
    ]
    notes += [f"{count} {what}" for count, what in counts if count]
    if data.notes.get("skipped"):
        notes.append(f"{data.notes['skipped']} records of the file were skipped as unusable")
    if spec.grid.rollback == "group":
        for T in spec.grid.T:
            if cut := count_cut_cases(chosen, T):
                notes.append(
                    f"T={T}: {cut} cases of several edits are cut by a group's border; their portability "
                    f"lacks an edit"
                )
    return tuple(notes)
