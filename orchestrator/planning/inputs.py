"""Read everything that planning needs from disk, once; and derive counts and notes from it.

inputs = read_inputs(spec)         # data set, model files, hyperparameter files, corpora, training data
plan = Planner(inputs).plan(...)   # reads nothing
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.planning.checks import (
    Measured,
    Problems,
    Shortfall,
    all_at_once,
    find_shortfalls,
    generation_warnings,
    impossible_cells,
    long_texts,
    training_shortfalls,
)
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
from workers.data.needs import UNRELATED
from workers.data.scripts import count_repeated_subjects, count_subjects_inside_words, joiner_of
from workers.job import ScoreConfig
from workers.model.config import (
    EMBEDDED,
    ModelFingerprint,
    ModelShape,
    fingerprint_model,
    has_chat_template,
    require_model,
)
from workers.scoring.lengths import count_tokens, request_texts
from workers.scoring.registry import SCORES
from workers.types import DataError, Dataset, EditRequest, ModelError, SpecError

if TYPE_CHECKING:
    from workers.artifacts.base import ArtifactSpec
    from workers.artifacts.pretrain import TrainingSource
    from workers.methods.base import MethodConfig


OFFENDERS_SHOWN = 20
"""An error message lists at most so many requests that are both trained on and edited."""

EMBEDDED_WORLD = "tinyworld"


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    with naming_field("dataset", {"path": spec.path, "train_path": spec.train_path}):
        return load_dataset(
            spec.kind, spec.path, spec.train_path, spec.on_bad_record, spec.joiner, spec.target_field
        )


@contextmanager
def naming_field(section: str, files: Mapping[str, Path | None]) -> Iterator[None]:
    """Prefix the field of the spec to the messages of faults in data files. ``files``: key under
    ``section`` -> its file."""
    try:
        yield
    except DataError as error:
        message = str(error)
        named = [key for key, path in files.items() if message.startswith((f"{path}:", f"{path},"))]
        missing = [key for key in files if f"`{key}` is missing" in message]
        field = ".".join((section, *(named or missing)[:1]))
        raise DataError(f"{field}: {message}") from None


def read_training(spec: SweepSpec) -> tuple[TrainingSource, tuple[EditRequest, ...]] | None:
    """Read the data that networks are trained on: the spec's, or else the data set's own. None if
    neither has any."""
    from workers.artifacts.pretrain import training_source

    training, dataset = spec.training, spec.dataset
    shards = training.shards or None
    if training.kind is not None:
        with naming_field("training", {"path": training.path}):
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
        with naming_field("dataset", {"train_path": dataset.train_path}):
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
    shortfalls: tuple[Shortfall, ...] = ()
    """Requests without what a method needs, per cell."""
    warnings: tuple[str, ...] = ()
    asks_for_day: bool = False
    """The chat template asks for the day of the run, which it is not told."""


def read_inputs(spec: SweepSpec, dataset: Dataset | None = None) -> Inputs:
    """Read all files that a sweep names, each once. The model's weights are not loaded.
    ``dataset``: the spec's data set, if the caller has read it already.

    Raises :class:`SpecError`, ``DataError`` or ``ModelError`` if something is missing, unusable or
    smaller than asked for. The error lists all problems that were found.
    """
    # These imports load torch, which a worker that only reads the data set does not need.
    from workers.model.base import model_shape

    problems = Problems()
    data: Dataset | None = None
    with problems.collected():
        data = dataset or load_spec_dataset(spec.dataset)
        if spec.dataset.edits > len(data.requests):
            raise SpecError(
                f"dataset.edits: {spec.dataset.edits} edits asked for, but the data set {data.name!r} has "
                f"{len(data.requests)}; the largest valid value is {len(data.requests)}"
            )
    with problems.collected():
        SCORES.check(spec.scoring)
    fingerprint: ModelFingerprint | None = None
    asks_for_day = False
    shape: ModelShape | None = None
    if data is not None:  # a model is not fetched for a sweep whose data cannot be read
        with problems.collected():
            fingerprint, asks_for_day = _fingerprint(spec)
            shape = model_shape(spec.model)
    reader = _MethodReader(spec, fingerprint, shape, problems)
    configs = {number: reader.config(number) for number in range(len(spec.methods))}
    methods = [reader.read(number, config, file) for number, (config, file) in configs.items() if config]
    loaded = {number: config for number, (config, _) in configs.items() if config is not None}
    warnings: list[str] = []
    shortfalls: tuple[Shortfall, ...] = ()
    if data is not None:
        shortfalls = find_shortfalls(
            spec,
            {number: config.needs for number, config in loaded.items()},
            {number: distinct_seeds(spec, config.uses_seed) for number, config in loaded.items()},
            data,
        )
    if reader.trained_on is not None:
        needs = {spec.methods[number].label: config.training_needs for number, config in loaded.items()}
        errors, some = training_shortfalls(needs, reader.trained_on)
        problems += errors
        warnings += some
    if data is not None and shape is not None:
        with problems.collected():
            texts = measure_texts(
                spec, data, shape.context, any(UNRELATED in c.needs for c in loaded.values())
            )
            problems += long_texts(texts, shape.context)
            warnings += generation_warnings(texts, shape.context, _generated_beyond(spec.scoring))
    if problems:
        raise all_at_once([*problems, *impossible_cells(shortfalls)])
    assert data is not None and fingerprint is not None and shape is not None
    if asks_for_day:
        warnings.append(
            "the chat template asks for today's date, and is not told it: prompts would depend on the day of "
            "the run; give it a day with `template: {date: 2024-07-26}`"
        )
    return Inputs(
        spec,
        data,
        fingerprint,
        shape,
        tuple(methods),
        reader.trained_on,
        shortfalls,
        tuple(warnings),
        asks_for_day,
    )


def _fingerprint(spec: SweepSpec) -> tuple[ModelFingerprint, bool]:
    """The model's fingerprint, and whether its chat template asks for the day of the run."""
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
        from workers.model.base import check_chat_template

        return fingerprint, check_chat_template(spec.model, spec.template)
    return fingerprint, False


class _MethodReader:
    """Reads the files of the spec's methods, and collects what is wrong with them. Without a
    fingerprint and a shape, only the hyperparameters are checked."""

    def __init__(
        self,
        spec: SweepSpec,
        fingerprint: ModelFingerprint | None,
        shape: ModelShape | None,
        problems: Problems,
    ) -> None:
        from workers.artifacts.stats import CorpusHashes

        self.spec = spec
        self.fingerprint = fingerprint
        self.shape = shape
        self.problems = problems
        self.trained_on: tuple[EditRequest, ...] | None = None
        self._source: TrainingSource | None = None
        self._training: Literal["not read", "read", "faulty"] = "not read"
        self._corpora = CorpusHashes()

    def config(self, number: int) -> tuple[MethodConfig | None, FileFindings | None]:
        """The method's config and the comparison of its file; None if its hyperparameters are
        wrong."""
        from workers.methods import get_method, load_method

        method = self.spec.methods[number]
        file = None
        with self.problems.collected(f"methods: {method.label}: "):
            kind = get_method(method.method)
            config, remarks = load_method(
                method.method,
                method.hparams,
                method.hparams_file,
                self.spec.model,
                method.protocol or self.spec.protocol,
            )
            if self.shape is not None:
                if remarks is not None:
                    file = compare(self.spec, number, remarks, self.shape, kind.whole_group)
                config.check(self.shape)
            return config, file
        return None, None

    def read(self, number: int, config: MethodConfig, file: FileFindings | None) -> MethodInputs:
        """The method's artifacts, without those that cannot be made."""
        from workers.methods import get_method
        from workers.methods.base import ArtifactContext

        method = self.spec.methods[number]
        for field, name in config.networks.items():
            with self.problems.collected():
                require_model(name, f"methods: {method.label}: {field}")
        artifacts: dict[int, tuple[ArtifactSpec, ...]] = {}
        source = None
        if get_method(method.method).needs_pretraining:
            source = self._read_training()
            if self._training == "faulty":  # that is reported, and what follows from it is not
                return MethodInputs(config, artifacts, file)
        with self.problems.collected():
            for seed in distinct_seeds(self.spec, config.uses_seed):
                if self.fingerprint is None:
                    break
                context = ArtifactContext(self.fingerprint, self.spec.model, seed, source, self._corpora)
                artifacts[seed] = config.artifacts(context)
        return MethodInputs(config, artifacts, file)

    def _read_training(self) -> TrainingSource | None:
        if self._training == "not read":
            self._training = "faulty"
            with self.problems.collected():
                found = read_training(self.spec)
                self._training = "read"
                if found is not None:
                    self._source, self.trained_on = found
        return self._source


# --- texts ----------------------------------------------------------------------------------

MOST_TOKENS_PER_BYTE = 11
"""A tokenizer makes at most one token of a byte, after it has normalised the text; normalisation to
NFKC makes a UTF-8 text at most 11 times as long. Shorter texts need no tokenizer to fit."""


def measure_texts(
    spec: SweepSpec, data: Dataset, context: int | None, unrelated: bool = False
) -> tuple[Measured, ...]:
    """The texts of the requests to edit that fill the model's context, or nearly so, in tokens.
    ``unrelated``: a method reads the field of that name.

    Each text is tokenised once. Raises ``ModelError`` if the model's tokenizer cannot be loaded.
    """
    from workers.model.base import load_encoder

    encoder = load_encoder(spec.model, spec.chat_template, spec.template)
    if context is None:
        return ()
    beyond = _generated_beyond(spec.scoring)
    around = count_tokens(encoder, "a", " a")
    edited = _may_be_edited(spec, data)
    kept = []
    known: dict[tuple[str, str | None], int] = {}
    for index in edited:
        request = data.requests[index]
        texts = [
            (field, prompt, answer)
            for field, prompt, answer in request_texts(request, unrelated)
            if MOST_TOKENS_PER_BYTE * (_bytes(prompt, answer) + 1) + around + beyond > context
        ]
        encoder.prepare(prompt for _, prompt, answer in texts if answer is not None)
        for field, prompt, answer in texts:
            if (prompt, answer) not in known:
                known[prompt, answer] = count_tokens(encoder, prompt, answer)
            tokens = known[prompt, answer]
            if tokens + (0 if answer is None else beyond) > context:
                kept.append(Measured(index, request.case_id, field, tokens))
    return _only_edited(spec, data, kept)


def _bytes(prompt: str, answer: str | None) -> int:
    return len(prompt.encode()) + len((answer or "").encode())


def _generated_beyond(score: ScoreConfig) -> int:
    """Tokens by which the longest input of greedy generation may be longer than prompt and answer."""
    return score.extra_tokens - 1 if score.generated else 0


def _may_be_edited(spec: SweepSpec, data: Dataset) -> Iterable[int]:
    """Indices of the requests that the sweep edits under any seed, and possibly more."""
    edits, seeds = spec.dataset.edits, spec.grid.seeds
    if spec.dataset.order == "file":
        return order_requests(data, "file", 0)[:edits]
    if edits * len(seeds) >= len(data.requests):
        return range(len(data.requests))
    return sorted({i for seed in seeds for i in order_requests(data, spec.dataset.order, seed)[:edits]})


def _only_edited(spec: SweepSpec, data: Dataset, texts: Sequence[Measured]) -> tuple[Measured, ...]:
    """The texts of requests that the sweep edits under some seed."""
    waiting, found = {text.record for text in texts}, set[int]()
    for seed in spec.grid.seeds:
        if not waiting:
            break
        found |= waiting.intersection(order_requests(data, spec.dataset.order, seed)[: spec.dataset.edits])
        waiting -= found
    return tuple(text for text in texts if text.record in found)


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
