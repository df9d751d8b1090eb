"""Read everything that planning needs from disk, once; and derive counts and notes from it.

inputs = read_inputs(spec)         # data set, model files, hyperparameter files, corpora, training data
plan = Planner(inputs).plan(...)   # reads nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.planning.hparams_files import FileFindings, compare
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
from workers.types import Dataset, EditRequest, ModelError, SpecError

if TYPE_CHECKING:
    from workers.artifacts.base import ArtifactSpec
    from workers.artifacts.pretrain import TrainingSource
    from workers.methods.base import MethodConfig


OFFENDERS_SHOWN = 20
"""An error message lists at most so many requests that are both trained on and edited."""

EMBEDDED_WORLD = "tinyworld"


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    return load_dataset(
        spec.kind, spec.path, spec.train_path, spec.on_bad_record, spec.joiner, spec.target_field
    )


def read_training(spec: SweepSpec) -> tuple[TrainingSource, tuple[EditRequest, ...]] | None:
    """Read the data that networks are trained on: the spec's, or else the data set's own. None if
    neither has any."""
    from workers.artifacts.pretrain import training_source

    training, dataset = spec.training, spec.dataset
    shards = training.shards or None
    if training.kind is not None:
        return training_source(
            training.kind,
            training.path,
            shards,
            training.on_bad_record,
            dataset.joiner,
            training.target_field,
        )
    if dataset.kind == EMBEDDED_WORLD or spec.model.name == EMBEDDED:
        return training_source(EMBEDDED_WORLD, None, shards, joiner=dataset.joiner)
    # Other kinds use train_path only for unrelated sentences.
    if dataset.kind == "zsre" and dataset.train_path is not None:
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
    """Seed -> artifacts that the edits need. Only for seeds that give different results (see
    :func:`distinct_seeds`)."""
    file: FileFindings | None = None
    """Comparison of its ``hparams_file`` with the sweep; None without a file."""


@dataclass(frozen=True)
class Inputs:
    """Everything a plan depends on, except the contents of the results folder."""

    spec: SweepSpec
    dataset: Dataset
    fingerprint: ModelFingerprint
    shape: ModelShape
    methods: tuple[MethodInputs, ...]
    """In the order of ``spec.methods``."""
    trained_on: tuple[EditRequest, ...] | None = None
    """The requests that networks are trained on; None if no method trains a network."""


def read_inputs(spec: SweepSpec, dataset: Dataset | None = None) -> Inputs:
    """Read all files that a sweep names, each once. The model's weights are not loaded.
    ``dataset``: the spec's data set, if the caller has read it already.

    Raises :class:`SpecError`, ``DataError`` or ``ModelError`` if something is missing, unusable or
    smaller than asked for.
    """
    # These imports load torch, which a worker that only reads the data set does not need.
    from workers.artifacts.stats import CorpusHashes
    from workers.methods import get_method, load_method
    from workers.methods.base import ArtifactContext
    from workers.model.base import check_chat_template, model_shape

    data = dataset or load_spec_dataset(spec.dataset)
    if spec.dataset.edits > len(data.requests):
        raise SpecError(
            f"dataset.edits: {spec.dataset.edits} edits asked for, but the data set {data.name!r} has "
            f"{len(data.requests)}; the largest valid value is {len(data.requests)}"
        )
    try:
        fingerprint = fingerprint_model(spec.model)
    except ModelError as e:
        places = f"; looked at: {', '.join(spec.looked_at)}" if spec.looked_at else ""
        raise ModelError(f"{e}{places}") from e
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
    for number, method in enumerate(spec.methods):
        file = None
        try:
            kind = get_method(method.method)
            config, remarks = load_method(
                method.method,
                method.hparams,
                method.hparams_file,
                spec.model,
                method.protocol or spec.protocol,
            )
            if remarks is not None:
                file = compare(spec, number, remarks, shape, kind.whole_group)
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
        methods.append(MethodInputs(config, artifacts, file))
    return Inputs(spec, data, fingerprint, shape, tuple(methods), None if training is None else training[1])


def distinct_seeds(spec: SweepSpec, uses_seed: bool) -> tuple[int, ...]:
    """The grid's seeds; only the first one if neither the method nor the order of requests is
    random."""
    several = uses_seed or spec.dataset.order == "shuffle"
    return spec.grid.seeds if several else spec.grid.seeds[:1]


def count_overlap(spec: SweepSpec, data: Dataset, training: Sequence[EditRequest]) -> int:
    """Count the training requests that the sweep edits under any seed.

    Raises :class:`SpecError` with a list of them, unless the spec allows the overlap.
    """
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
            f"training: {len(found)} of its {len(training)} requests are edited by the sweep, so that "
            f"methods would be evaluated on "
            f"their training data:\n{shown}{more}\nremove them from the training data, or set "
            f"training.allow_overlap: true, which "
            "every row then records"
        )
    return len(found)


def longest_tokens(data: Dataset, score: ScoreConfig) -> int:
    """Estimated upper bound of a sequence's length in tokens: one token per three characters, plus
    the template before the prompt."""
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
