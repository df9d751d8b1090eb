"""Read everything that planning needs from disk, once; and derive counts and notes from it.

inputs = read_inputs(spec)         # data set, model files, hyperparameter files, corpora, training data
plan = Planner(inputs).plan(...)   # reads nothing
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.planning.checks import (
    Measured,
    Problems,
    Shortfall,
    all_at_once,
    batch_problems,
    find_crowded,
    find_shortfalls,
    generation_warnings,
    impossible_cells,
    long_continuation,
    long_texts,
    training_shortfalls,
)
from orchestrator.planning.hparams_files import FileFindings, compare
from orchestrator.planning.memory import TEMPLATE_TOKENS, lane_edits
from orchestrator.planning.places import Found, find_file, find_network
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
from workers.data.needs import UNRELATED, Need
from workers.data.scripts import count_repeated_subjects, count_subjects_inside_words, joiner_of
from workers.inputs import counted
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
from workers.types import DataError, Dataset, EditRequest, EditSweepError, ModelError, SpecError

if TYPE_CHECKING:
    from workers.artifacts.base import ArtifactSpec
    from workers.artifacts.pretrain import TrainingSource
    from workers.methods.base import MethodConfig
    from workers.model.batch import Encoder


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
    overlap: int = 0
    """Requests that networks are trained on and that the sweep edits."""
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
    from workers.model.base import load_encoder, model_shape

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
    shape: ModelShape | None = None
    if data is not None:  # a model is not fetched for a sweep whose data cannot be read
        with problems.collected():
            fingerprint = _fingerprint(spec)
            shape = model_shape(spec.model)
    encoder: Encoder | None = None
    if shape is not None:
        with problems.collected():
            encoder = load_encoder(spec.model, spec.chat_template, spec.template)
    reader = _MethodReader(spec, fingerprint, shape, encoder, problems)
    configs = {number: reader.config(number) for number in range(len(spec.methods))}
    methods = [reader.read(number, config, file) for number, (config, file) in configs.items() if config]
    loaded = {number: config for number, (config, _) in configs.items() if config is not None}
    reader.check_corpora()
    problems += batch_problems(spec)
    warnings, overlap = reader.remarks, 0
    if reader.trained_on is not None:
        needs = {spec.methods[number].label: config.training_needs for number, config in loaded.items()}
        errors, some = training_shortfalls(needs, reader.trained_on)
        problems += errors
        warnings += some
        if data is not None:
            with problems.collected():
                overlap = count_overlap(spec, data, reader.trained_on)
    shortfalls: tuple[Shortfall, ...] = ()
    if data is not None:
        shortfalls = _shortfalls(spec, data, shape, encoder, loaded)
    if encoder is not None and shape is not None and shape.context is not None:
        if reader.trained_on is not None:
            texts = _long_training(encoder, reader.trained_on, shape.context)
            problems += long_texts(texts, shape.context, "training")
        if data is not None:
            too_long, tight = _check_texts(spec, data, shape.context, encoder, loaded.values())
            problems += too_long
            warnings += tight
    if problems:
        raise all_at_once([*problems, *impossible_cells(shortfalls)])
    assert data is not None and fingerprint is not None and shape is not None
    asks_for_day = spec.chat_template and encoder is not None and encoder.asks_for_day
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
        overlap,
        shortfalls,
        tuple(warnings),
        asks_for_day,
    )


def _shortfalls(
    spec: SweepSpec,
    data: Dataset,
    shape: ModelShape | None,
    encoder: Encoder | None,
    configs: Mapping[int, MethodConfig],
) -> tuple[Shortfall, ...]:
    """Requests without what the methods need, and those that do not fit behind a group's facts."""
    seeds = {number: distinct_seeds(spec, config.uses_seed) for number, config in configs.items()}
    needs = {number: config.needs for number, config in configs.items()}
    if shape is None or encoder is None:
        return find_shortfalls(spec, needs, seeds, data, _may_be_edited(spec, data))
    located = Need(
        "the chat template changes the prompt, so that the tokens of its subject cannot be located",
        lambda request: encoder.can_locate(request.prompt),
    )
    for number, config in configs.items():
        needs[number] += config.token_needs(encoder, shape)
        if spec.chat_template and config.reads_subject:
            needs[number] += (located,)
    beyond = _generated_beyond(spec.scoring)

    @cache
    def longest(index: int) -> int:
        return max(
            count_tokens(encoder, prompt, answer) + (0 if answer is None else beyond)
            for _, prompt, answer in request_texts(data.requests[index])
        )

    before = {n: config.before for n, config in configs.items() if config.before(data.requests[:1])}
    return find_shortfalls(spec, needs, seeds, data, _may_be_edited(spec, data)) + find_crowded(
        spec, before, seeds, data, shape.context, lambda text: len(encoder.text(text)), longest
    )


def _check_texts(
    spec: SweepSpec, data: Dataset, context: int, encoder: Encoder, configs: Collection[MethodConfig]
) -> tuple[list[EditSweepError], tuple[str, ...]]:
    """Errors and warnings for texts of requests, with what methods and scores put before and behind
    them, that are longer than the model's context."""
    templates = max((config.template_tokens for config in configs), default=0)
    reads_unrelated = any(UNRELATED in config.needs for config in configs)
    texts = measure_texts(spec, data, context, encoder, reads_unrelated, templates)
    errors = [*long_texts(texts, context), *_long_continuations(spec, data, context, encoder)]
    return errors, generation_warnings(texts, context, _generated_beyond(spec.scoring))


def _fingerprint(spec: SweepSpec) -> ModelFingerprint:
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
    return fingerprint


class _MethodReader:
    """Reads the files of the spec's methods, and collects what is wrong with them. Without a
    fingerprint and a shape, only the hyperparameters are checked."""

    def __init__(
        self,
        spec: SweepSpec,
        fingerprint: ModelFingerprint | None,
        shape: ModelShape | None,
        encoder: Encoder | None,
        problems: Problems,
    ) -> None:
        from workers.artifacts import fisher, stats

        self.spec = spec
        self.fingerprint = fingerprint
        self.shape = shape
        self.encoder = encoder
        self.problems = problems
        self.remarks: list[str] = []
        """Which place was taken, where a name may stand for several."""
        self.trained_on: tuple[EditRequest, ...] | None = None
        self._source: TrainingSource | None = None
        self._training: Literal["not read", "read", "faulty"] = "not read"
        self._corpora = stats.CorpusHashes()
        self._wanted: dict[str, dict[str, set[tuple[int, int]]]] = {stats.KIND: {}, fisher.KIND: {}}
        """Kind of statistics -> corpus -> samples and inputs of each."""

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
            config = self._located(number, config)
            if self.spec.chat_template:
                with self.problems.collected(f"methods: {method.label}: "):
                    kind.check_chat()
            if self.shape is not None:
                if remarks is not None:
                    file = compare(self.spec, number, remarks, self.shape, kind.whole_group)
                config.check(self.shape)
                self._check_sizes(number, config, self.shape)
            return config, file
        return None, None

    def _check_sizes(self, number: int, config: MethodConfig, shape: ModelShape) -> None:
        """Whether the lanes can hold as many edits, and the model reads context templates so long."""
        label, rollback, edits = (
            self.spec.methods[number].label,
            self.spec.grid.rollback,
            self.spec.dataset.edits,
        )
        if shape.context is not None and config.template_tokens >= shape.context:
            raise SpecError(
                f"context_template_length_params: templates of {config.template_tokens} tokens, but the model "
                f"reads at most {shape.context}"
            )
        for T in self.spec.sizes(number):
            with self.problems.collected(f"methods: {label}: grid.T: {T}: "):
                config.check_edits(shape, lane_edits(rollback, T, edits))

    def _located(self, number: int, config: MethodConfig) -> MethodConfig:
        """The config with the places of the files and folders that it names; those that are nowhere
        are problems."""
        label, base = self.spec.methods[number].label, self.spec.base
        places: dict[str, str] = {}
        for field, name in config.files.items():
            with self.problems.collected():
                found = find_file(name, base, f"methods: {label}: {field}")
                self._keep(places, field, found)
                if found.looked_at:
                    raise SpecError(f"methods: {label}: {field}: {name!r} does not exist{_looked_at(found)}")
        for field, name in config.networks.items():
            with self.problems.collected():
                found = find_network(name, base, f"methods: {label}: {field}")
                self._keep(places, field, found)
                try:
                    require_model(found.name, f"methods: {label}: {field}")
                except ModelError as error:
                    raise ModelError(f"{error}{_looked_at(found)}") from error
        return config.located(places)

    def _keep(self, places: dict[str, str], field: str, found: Found) -> None:
        places[field] = found.name
        if found.remark is not None:
            self.remarks.append(found.remark)

    def read(self, number: int, config: MethodConfig, file: FileFindings | None) -> MethodInputs:
        """The method's artifacts, without those that cannot be made."""
        from workers.methods import get_method
        from workers.methods.base import ArtifactContext

        method = self.spec.methods[number]
        if self.encoder is not None:
            wrong = config.check_networks(self.encoder)
            self.problems += [SpecError(f"methods: {method.label}: {text}") for text in wrong]
        artifacts: dict[int, tuple[ArtifactSpec, ...]] = {}
        source = None
        if get_method(method.method).needs_pretraining:
            source = self._read_training()
            if self._training == "faulty":  # that is reported, and what follows from it is not
                return MethodInputs(config, artifacts, file)
        if any(not os.path.isfile(config.place(field)) for field in config.files):
            return MethodInputs(config, artifacts, file)  # that is reported
        with self.problems.collected():
            for seed in distinct_seeds(self.spec, config.uses_seed):
                if self.fingerprint is None or self.shape is None:
                    break
                context = ArtifactContext(self.fingerprint, self.spec.model, seed, source, self._corpora)
                artifacts[seed] = config.artifacts(context)
            if artifacts:  # seeds differ in their templates alone
                self._note_corpora(next(iter(artifacts.values())))
        return MethodInputs(config, artifacts, file)

    def _note_corpora(self, specs: Sequence[ArtifactSpec]) -> None:
        """Note the statistics that are made from each corpus."""
        assert self.shape is not None
        for spec in specs:
            self._note_corpora(spec.needs)
            corpus = str(spec.where.get("corpus"))
            if spec.kind in self._wanted and corpus != EMBEDDED:
                wanted = self._wanted[spec.kind].setdefault(corpus, set())
                wanted.add((spec.recipe["samples"], self.shape.site(spec.recipe["module"])[1]))

    def check_corpora(self) -> None:
        """Whether the statistics can be made from their corpora, each of which is read once."""
        from workers.artifacts import fisher, stats

        if self.encoder is None or self.shape is None:
            return
        for corpus, wanted in self._wanted[stats.KIND].items():
            self.problems += stats.check_corpus(corpus, wanted, self.encoder, self.shape.context)
        for corpus, wanted in self._wanted[fisher.KIND].items():
            with self.problems.collected():
                fisher.check_corpus(corpus, max(samples for samples, _ in wanted), self.encoder)

    def _read_training(self) -> TrainingSource | None:
        if self._training == "not read":
            self._training = "faulty"
            with self.problems.collected():
                found = read_training(self.spec)
                self._training = "read"
                if found is not None:
                    self._source, self.trained_on = found
        return self._source


def _looked_at(found: Found) -> str:
    """The end of a message, where a name was looked for in several places."""
    return f"; looked at: {', '.join(found.looked_at)}" if len(found.looked_at) > 1 else ""


# --- texts ----------------------------------------------------------------------------------

MOST_TOKENS_PER_BYTE = 11
"""A tokenizer makes at most one token of a byte, after it has normalised the text; normalisation to
NFKC makes a UTF-8 text at most 11 times as long. Shorter texts need no tokenizer to fit."""


def measure_texts(
    spec: SweepSpec,
    data: Dataset,
    context: int | None,
    encoder: Encoder,
    unrelated: bool = False,
    templates: int = 0,
) -> tuple[Measured, ...]:
    """The texts of the requests to edit that fill the model's context, or nearly so, in tokens.
    ``unrelated``: a method reads the field of that name. ``templates``: tokens of the longest
    context template, which stands before the prompts of edits.

    Each text is tokenised once.
    """
    if context is None:
        return ()
    beyond = _generated_beyond(spec.scoring)
    around = count_tokens(encoder, "a", " a")
    edited = _may_be_edited(spec, data)
    kept = []
    known: dict[tuple[str, str | None], int] = {}
    for index in edited:
        request = data.requests[index]
        texts = []
        for field, prompt, answer in request_texts(request, unrelated):
            size = len(prompt.encode()) + len((answer or "").encode())
            template = templates if field == "prompt" else 0
            if MOST_TOKENS_PER_BYTE * (size + 1) + around + max(beyond, template) > context:
                texts.append((field, prompt, answer, template))
        encoder.prepare(prompt for _, prompt, answer, _ in texts if answer is not None)
        for field, prompt, answer, template in texts:
            if (prompt, answer) not in known:
                known[prompt, answer] = count_tokens(encoder, prompt, answer)
            tokens = known[prompt, answer]
            if tokens <= context < tokens + template:
                kept.append(Measured(index, request.case_id, field, tokens + template, template))
            elif tokens + (0 if answer is None else beyond) > context:
                kept.append(Measured(index, request.case_id, field, tokens))
    return _only_edited(spec, data, kept)


def _long_training(encoder: Encoder, requests: Sequence[EditRequest], context: int | None) -> list[Measured]:
    """The texts that networks are trained on and that are longer than the model's context."""
    if context is None:
        return []
    found = []
    for index, request in enumerate(requests):
        for field, prompt, answer in request_texts(replace(request, portability=(), ood=()), unrelated=True):
            if len(prompt.encode()) + len((answer or "").encode()) >= context:
                tokens = count_tokens(encoder, prompt, answer)
                if tokens > context:
                    found.append(Measured(index, request.case_id, field, tokens))
    return found


def _long_continuations(spec: SweepSpec, data: Dataset, context: int, encoder: Encoder) -> list[SpecError]:
    """An error if what is written after a prompt for fluency may pass the model's context."""
    tokens = SCORES.continued(spec.scoring)
    if not tokens:
        return []
    prompts = []
    for index in _may_be_edited(spec, data):
        request = data.requests[index]
        prompts.append(Measured(index, request.case_id, "prompt", len(encoder.prompt(request.prompt))))
    longest = max(_only_edited(spec, data, prompts), key=lambda text: text.tokens)
    return long_continuation(tokens, longest, context)


def _generated_beyond(score: ScoreConfig) -> int:
    """Tokens by which the longest input of greedy generation may be longer than prompt and answer."""
    return score.extra_tokens - 1 if score.generated else 0


def _may_be_edited(spec: SweepSpec, data: Dataset) -> Collection[int]:
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


def _verb(count: int, plural: str) -> str:
    return plural if count > 1 else {"are": "is"}.get(plural, f"{plural}s")


def dataset_notes(spec: SweepSpec, data: Dataset) -> tuple[str, ...]:
    """Notes and warnings about the requests that will be edited (those of the first seed)."""
    order = order_requests(data, spec.dataset.order, spec.grid.seeds[0])
    chosen: list[EditRequest] = [data.requests[i] for i in order[: spec.dataset.edits]]
    joined = sum(joiner_of(request, request.prompt) == "" for request in chosen)
    counts = (
        (count_duplicates(chosen), "request", "repeat", "the prompt of an earlier one"),
        (
            count_conflicts(chosen),
            "request",
            "contradict",
            "another one (same prompt, or subject and relation)",
        ),
        (count_edited_locality(chosen), "locality probe", "are", "edited, too"),
        (
            count_repeated_subjects(chosen),
            "prompt",
            "hold",
            "the subject more than once: where tokens of the subject are read, the last one's",
        ),
        (
            count_subjects_inside_words(chosen),
            "prompt",
            "hold",
            "the subject only as a part of a longer word",
        ),
        (joined, "prompt", "are", "followed by the answer without a space (dataset.joiner)"),
    )
    notes = [
        f"{spec.dataset.edits} of {len(data.requests)} requests of {data.name}, order: {spec.dataset.order}"
    ]
    notes += [
        f"{counted(count, thing)} {_verb(count, verb)} {what}" for count, thing, verb, what in counts if count
    ]
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
