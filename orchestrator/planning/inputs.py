"""SweepSpec -> cells -> shards and steps, in launch order.

    plan = make_plan(spec, Progress())
    for shard in plan.shards:               # longest first
        manifest = plan.manifest(shard)     # everything an actor needs, as JSON

A plan is cheap: shards are kept as ranges of groups, hashes of common parts are taken once, and no weights are loaded.
Only launching a shard writes its ranges out into a :class:`~workers.job.StreamJob`.

Plans only ever grow: groups that are in the table, or that belong to a shard which has begun, are subtracted, and what
is left is cut into new shards. So a shard's composition never changes, whatever happens to the spec in the meantime.

Which lanes share a wave decides bits, which waves share a shard does not. Waves therefore follow from the spec and from
what is left alone, and removing whole waves leaves the others as they were; shards are cut between waves only, by the
spec and by work (never by the clock or the size of a cluster). What was measured decides the order of launch.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from orchestrator.memory import CPU_MEMORY_GB, GIB, TEMPLATE_TOKENS, USABLE, Memory, estimate, lane_edits
from orchestrator.results.manifest import ShardManifest
from orchestrator.schedule import Clock, Simulation, Timing, calibrate, simulate, wave_work
from orchestrator.spec import DatasetSpec, MethodSpec, SweepSpec
from workers.artifacts import BASE_SCORES, ArtifactSpec
from workers.data import (
    count_conflicts,
    count_cut_cases,
    count_duplicates,
    count_edited_locality,
    find_overlap,
    load_dataset,
    order_requests,
)
from workers.data.text import read_held_out
from workers.job import (
    SCORING_PROTOCOL,
    Frozen,
    Lane,
    Rollback,
    ScoreConfig,
    Share,
    StreamCell,
    StreamJob,
    cut_steps,
    expected_rows,
    schedule_of,
)
from workers.models import (
    EMBEDDED,
    ModelConfig,
    ModelFingerprint,
    ModelShape,
    fingerprint_model,
    has_chat_template,
    model_shape,
)
from workers.types import JSON, Dataset, EditRequest, SpecError

if TYPE_CHECKING:
    from workers.pretrain import TrainingSource

Member = TypeVar("Member")

SCHEMA = 1
"""Version of what enters a cell id. Raising it makes every result stale."""

TAIL = 0.1
"""A shard of several waves takes at most this share of the sweep's lower bound, so that the last ones end close together."""

OFFENDERS_SHOWN = 20
"""How many requests that are both trained on and edited one error message lists."""

EMBEDDED_WORLD = "tinyworld"

UNKNOWN_ACTORS = 64
"""The number of actors for which the tail is cut short where the spec names none (``engine.max_actors``)."""


class Variant(Frozen):
    """One method with its settings resolved: what a label of the spec stands for."""

    label: str
    algorithm: str
    version: int
    config: dict[str, Any]
    hparams_id: str
    whole_group: bool = Field(False, description="one call edits all requests of a group, whatever the grid says")

    def batch_size(self, T: int, asked: int) -> int:
        """Requests of one call at this T, where the grid asks for ``asked``."""
        return T if self.whole_group else asked


class Common(Frozen):
    """What all shards of one plan share."""

    sweep: str
    model: ModelConfig
    model_fingerprint: str
    tokenizer_fingerprint: str
    dataset: DatasetSpec
    dataset_name: str
    dataset_fingerprint: str
    rollback: Rollback
    batch_size: int = Field(description="what the grid says; a variant that edits whole groups goes by T")
    score: ScoreConfig
    chat_template: bool
    threads: int
    cache_bytes: int = 0
    step_edits: int
    training_overlap: int | None = Field(
        None, description="edited requests that networks were trained on too; null: none may be, or nothing is trained"
    )


class Task(Frozen):
    """What a shard's worker needs beside its job; stands in the manifest as JSON."""

    common: Common
    variant: Variant
    artifacts: tuple[ArtifactSpec, ...] = ()
    edits: int
    expected_rows: int
    retry: int = 0
    gpu_memory_gb: float | None = Field(None, description="what the spec declared when lanes were chosen; GPU only")

    @classmethod
    def of(cls, manifest: ShardManifest) -> Task:
        return cls.model_validate(manifest.task)

    def artifact_specs(self) -> dict[str, ArtifactSpec]:
        return {spec.key: spec for spec in self.artifacts}


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid, with its groups 0 .. groups-1."""

    cell_id: str
    variant: int
    T: int
    seed: int
    groups: int
    batch_size: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """Groups ``start .. stop`` (exclusive) of cells that share waves: one, or several seeds of one variant and T.

    Its lanes may report to cells of other T as well, seeds in the same order. With rollback to ``riders``: per smaller T the
    cells whose groups start at the same requests. Without it a run is one wave, and ``also`` holds the other cells' groups.
    """

    cells: tuple[int, ...]
    start: int
    stop: int
    also: tuple[Run, ...] = ()
    riders: tuple[tuple[int, ...], ...] = ()

    @property
    def shares(self) -> tuple[Run, ...]:
        return (self, *self.also)

    @property
    def served(self) -> Iterator[tuple[int, ...]]:
        """The cells of each T its lanes report to."""
        yield from (share.cells for share in self.shares)
        yield from self.riders

    def __len__(self) -> int:
        """Groups of each of its cells."""
        return self.stop - self.start

    def continued_by(self, other: Run) -> bool:
        """Whether ``other`` is the rest of a longer run that this one is the beginning of."""
        return (
            (self.cells, self.riders, self.stop) == (other.cells, other.riders, other.start)
            and not self.also
            and not other.also
        )


Span = tuple[int, int, tuple[int, ...]]
"""Groups ``start .. stop`` (exclusive) of a cell, and the smaller T of which a group starts where each of them does."""


@dataclass(frozen=True, slots=True)
class Chain:
    """All that cells sharing waves have left, ascending: waves are filled across its gaps. Without rollback it is one run.

    ``riders``: by T, the cells whose groups ride along, seeds in the same order.
    """

    cells: tuple[int, ...]
    spans: tuple[Span, ...]
    also: tuple[Run, ...] = ()
    riders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def runs(self) -> Iterator[Run]:
        along = {sizes: tuple(self.riders[T] for T in sizes) for sizes in {sizes for *_, sizes in self.spans}}
        for start, stop, sizes in self.spans:
            yield Run(self.cells, start, stop, self.also, along[sizes])


def _step(width: int, seeds: int) -> int:
    """How many groups of each of ``seeds`` cells one wave of at most ``width`` lanes holds."""
    return max(1, width // seeds)


def _chains(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """A shard's runs, those together whose waves go on from one to the next."""
    for _, chain in groupby(runs, key=lambda run: run.cells):
        yield list(chain)


def _waves(runs: Sequence[Run], width: int) -> Iterator[list[tuple[Run, int]]]:
    """The waves of a shard's runs with at most ``width`` lanes: whole groups of all cells, each with the run it is of."""
    for chain in _chains(runs):
        groups = [(run, group) for run in chain for group in range(run.start, run.stop)]
        step = _step(width, len(chain[0].cells))
        for low in range(0, len(groups), step):
            yield groups[low : low + step]


@dataclass(frozen=True, slots=True)
class Shard:
    """A unit of scheduling. ``runs`` is empty for one that has begun: its manifest is in the journal.

    ``T`` is the largest one it serves of those that the spec asks for.
    ``width`` is how many lanes a wave may have, ``lanes`` how many the widest one has. ``cost``: estimated seconds of the
    whole shard, of which the share ``committed`` is durable already.
    """

    shard_id: str
    variant: int
    T: int
    runs: tuple[Run, ...]
    width: int
    lanes: int
    edits: int
    cost: float
    begun: bool = False
    retry: int = 0
    committed: float = 0.0

    @property
    def seconds_left(self) -> float:
        return self.cost * (1 - self.committed)


@dataclass(frozen=True, slots=True)
class Spent:
    """What the edits of one shard have taken so far."""

    shard_id: str
    cells: tuple[str, ...]
    edits: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """What a results folder already holds.

    ``done``: per cell the groups whose rows are complete in the table. ``begun``: manifests of shards that are not in
    the table yet. ``used``: ids of shards that may not be used again. ``spent``: time of shards in the table and under way.
    ``given_up``: per cell the groups that failed and are not to be run again.
    """

    done: Mapping[str, Collection[int]] = field(default_factory=dict)
    given_up: Mapping[str, Collection[int]] = field(default_factory=dict)
    begun: Sequence[ShardManifest] = ()
    used: Collection[str] = ()
    spent: Sequence[Spent] = ()


@dataclass(frozen=True)
class Plan:
    """Cells, what is left to run, and what the user should know about it."""

    spec: SweepSpec
    common: Common
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    shards: tuple[Shard, ...]
    done_groups: Mapping[str, int]
    artifacts: Mapping[str, ArtifactSpec]
    cell_artifacts: Mapping[tuple[int, int], tuple[tuple[str, str], ...]]
    """For each variant and seed, what the method calls an artifact and the artifact's key."""
    widths: Mapping[tuple[int, int], int]
    """For each variant and T, how many lanes a wave may have: the spec's number, or what `auto` came to."""
    memory: Mapping[tuple[int, int], Memory]
    weight_bytes: int
    clock: Clock = field(default_factory=Clock)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    begun: Mapping[str, ShardManifest] = field(default_factory=dict)
    left_out: Collection[str] = frozenset()
    """Cells of the spec that this run does not ask for (``--only``)."""

    @property
    def asked(self) -> tuple[Cell, ...]:
        """The cells this run is to finish."""
        return tuple(cell for cell in self.cells if cell.cell_id not in self.left_out)

    @property
    def edits(self) -> int:
        """Edits of all cells, done or not."""
        return sum(cell.groups * cell.T for cell in self.cells)

    @property
    def edits_left(self) -> int:
        return sum(shard.edits for shard in self.shards)

    @property
    def edits_shared(self) -> int:
        """Edits that would be made as well, if every cell had lanes of its own."""
        return sum(map(self._edits_apart, self.shards)) - self.edits_left

    def _edits_apart(self, shard: Shard) -> int:
        continued = self.spec.grid.rollback == "never"
        if shard.begun:
            job = self.begun[shard.shard_id].job
            shares = [share for wave in job.waves for lane in wave for share in lane.shares]
            return sum(job.T_of(share) * (share.stop_group if continued else 1) for share in shares)
        if continued:
            return sum(len(o.cells) * o.stop * self.cells[o.cells[0]].T for run in shard.runs for o in run.shares)
        return sum(len(run) * len(c) * self.cells[c[0]].T for run in shard.runs for c in run.served)

    @property
    def lanes(self) -> int:
        """The widest lockstep of any shard that is left."""
        return max((shard.lanes for shard in self.shards), default=0)

    def peak_bytes(self, variant: int) -> int:
        """Estimated peak memory of an actor that runs any shard of a variant that is left."""
        return max(
            (self.memory[variant, s.T].peak(s.lanes) for s in self.shards if s.variant == variant),
            default=self.weight_bytes,
        )

    def simulate(self, actors: int) -> Simulation:
        """What is left, in launch order, on so many actors (artifacts and start-up not counted)."""
        return simulate([shard.seconds_left for shard in self.shards], actors)

    def cell_ids(self, shard: Shard) -> tuple[str, ...]:
        """The cells a shard serves."""
        if shard.begun:
            return tuple(cell.cell_id for cell in self.begun[shard.shard_id].job.cells)
        return tuple(self.cells[i].cell_id for i in _members(shard))

    def group_sizes(self, shard: Shard) -> tuple[int, ...]:
        """Every T a shard serves, ascending."""
        if shard.begun:
            job = self.begun[shard.shard_id].job
            return tuple(sorted({cell.T or job.T for cell in job.cells}))
        return tuple(sorted({self.cells[i].T for i in _members(shard)}))

    def artifact_keys(self, shard: Shard) -> tuple[str, ...]:
        """The artifacts a shard needs, in the order its cells need them."""
        if shard.begun:
            return tuple(Task.of(self.begun[shard.shard_id]).artifact_specs())
        seeds = dict.fromkeys(self.cells[i].seed for i in _members(shard))
        return tuple(dict.fromkeys(key for seed in seeds for _, key in self.cell_artifacts[shard.variant, seed]))

    def schedules(self) -> list[tuple[Shard, ...]]:
        """The shards that are left, by what they score: those of one tuple ask the base model the same questions.

        One that has begun is alone here: its job says what it scores, see :meth:`base_scores`.
        """
        found: dict[object, list[Shard]] = {}
        waves = self.common.rollback == "group"
        for shard in self.shards:
            scored = tuple(
                (
                    min(sum(map(len, chain)), _step(shard.width, len(chain[0].cells))) if waves else 1,
                    tuple(self.cells[i].seed for i in chain[0].cells),
                    *(
                        (
                            *((share.start, share.stop, self.cells[share.cells[0]].T) for share in run.shares),
                            *(self.cells[riders[0]].T for riders in run.riders),
                        )
                        for run in chain
                    ),
                )
                for chain in _chains(shard.runs)
            )
            whole = self.variants[shard.variant].whole_group
            key = shard.shard_id if shard.begun else (shard.T, whole, scored)
            found.setdefault(key, []).append(shard)
        return [tuple(shards) for shards in found.values()]

    def base_scores(self) -> list[ArtifactSpec]:
        """The base model's replies that at least two of the shards that are left can use; one shard makes its own.

        A shard needs no name for them: what its job scores says where they are (:func:`base_scores_of`).
        """
        schedules = self.schedules()
        begun = {(shard.T, shard.lanes, shard.edits) for shard in self.shards if shard.begun}
        users: dict[str, int] = {}
        found: dict[str, ArtifactSpec] = {}
        for shards in schedules:
            first = shards[0]
            if len(shards) > 1 or (first.T, first.lanes, first.edits) in begun:
                spec = base_scores_of(self.common, self.manifest(first).job)
                users[spec.key] = users.get(spec.key, 0) + len(shards)
                found[spec.key] = spec
        return [spec for key, spec in found.items() if users[key] > 1]

    def manifest(self, shard: Shard) -> ShardManifest:
        """Write a shard's ranges out into the job its actor executes."""
        if shard.begun:
            return self.begun[shard.shard_id]
        return expand(
            self.common,
            self.variants[shard.variant],
            shard,
            self.cells,
            {self.cells[i].seed: self.cell_artifacts[shard.variant, self.cells[i].seed] for i in _members(shard)},
            tuple(self.artifacts[key] for key in self.artifact_keys(shard)),
            self.spec.engine.gpu_memory_gb if self.spec.on_gpu else None,
        )


def base_scores_of(common: Common, job: StreamJob) -> ArtifactSpec:
    """What the base model says to a job's scoring batches: the same for every method that scores the same ones."""
    schedule = schedule_of(job).model_dump_json()
    return ArtifactSpec(
        name=BASE_SCORES,
        kind=BASE_SCORES,
        recipe={
            "model": common.model_fingerprint,
            "tokenizer": common.tokenizer_fingerprint,
            "dtype": common.model.dtype,
            "dataset": common.dataset_fingerprint,
            "order": common.dataset.order,
            "schedule": hashlib.sha256(schedule.encode()).hexdigest(),
            "protocol": SCORING_PROTOCOL,
        },
        where={"job": schedule, "source": common.dataset.model_dump(mode="json")},
    )


def expand(
    common: Common,
    variant: Variant,
    shard: Shard,
    cells: Sequence[Cell],
    names: Mapping[int, tuple[tuple[str, str], ...]],
    artifacts: tuple[ArtifactSpec, ...],
    gpu_memory_gb: float | None,
) -> ShardManifest:
    """The manifest of a new shard: a pure function of its composition. ``names``: per seed, name and key of artifacts."""
    index = {cell: i for i, cell in enumerate(_members(shard))}
    if common.rollback == "group":
        waves = tuple(
            tuple(
                Lane(
                    cell=index[cell],
                    group=group,
                    stop_group=group + 1,
                    also=tuple(_ride(index, cells, riders[i], group * shard.T) for riders in run.riders),
                )
                for run, group in wave
                for i, cell in enumerate(run.cells)
            )
            for wave in _waves(shard.runs, shard.width)
        )
    else:
        waves = tuple(
            tuple(
                Lane(
                    cell=index[cell],
                    group=run.start,
                    stop_group=run.stop,
                    also=tuple(
                        Share(cell=index[other.cells[i]], group=other.start, stop_group=other.stop)
                        for other in run.also
                    ),
                )
                for i, cell in enumerate(run.cells)
            )
            for run in shard.runs
        )
    first = cells[next(iter(index))]  # all cells of a shard have one batch size: that of its variant and T
    job = StreamJob(
        method=variant.algorithm,
        config=variant.config,
        cells=tuple(
            StreamCell(
                cell_id=cells[c].cell_id,
                seed=cells[c].seed,
                T=None if cells[c].T == shard.T else cells[c].T,
                artifacts=dict(names[cells[c].seed]),
            )
            for c in index
        ),
        T=shard.T,
        batch_size=first.batch_size,
        whole_group=variant.whole_group,
        rollback=common.rollback,
        waves=waves,
        score=common.score,
        chat_template=common.chat_template,
    )
    task = Task(
        common=common,
        variant=variant,
        artifacts=artifacts,
        edits=shard.edits,
        expected_rows=expected_rows(job),
        retry=shard.retry,
        gpu_memory_gb=gpu_memory_gb,
    )
    return ShardManifest(
        shard_id=shard.shard_id,
        job=job,
        bounds=cut_steps(job, common.step_edits),
        columns={cells[c].cell_id: cell_columns(common, variant, cells[c]) for c in index},
        task=task.model_dump(mode="json"),
    )


def _ride(index: Mapping[int, int], cells: Sequence[Cell], cell: int, first: int) -> Share:
    """The group of ``cell`` that starts at request ``first``, as part of a job whose cells ``index`` numbers."""
    group = first // cells[cell].T
    return Share(cell=index[cell], group=group, stop_group=group + 1)


def _members(shard: Shard) -> tuple[int, ...]:
    """Numbers of the cells a new shard serves, in the order of its runs."""
    return tuple(dict.fromkeys(cell for run in shard.runs for served in run.served for cell in served))


def cell_columns(common: Common, variant: Variant, cell: Cell) -> dict[str, JSON]:
    """The columns that are the same in every row of a cell."""
    return {
        "sweep": common.sweep,
        "model": common.model.name,
        "dataset": common.dataset_name,
        "method": variant.label,
        "algorithm": variant.algorithm,
        "hparams_id": variant.hparams_id,
        "T": cell.T,
        "seed": cell.seed,
        "batch_size": cell.batch_size,
        "rollback": common.rollback,
        "training_overlap": common.training_overlap,
    }


# --- planning --------------------------------------------------------------------------------------------------------


def make_plan(spec: SweepSpec, progress: Progress | None = None, dataset: Dataset | None = None) -> Plan:
    """Plan a sweep, leaving out what is done. Reads the data set and hashes the model's files; loads no weights."""
    return Planner(spec, dataset).plan(progress or Progress())


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python does not search for cycles of garbage: a large plan is a million small objects that stay, and looking
    through them again and again takes a quarter of the time."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


class Planner:
    """Checks a spec against its data set, model and methods, and enumerates its cells; then plans as often as asked.

    >>> planner = Planner(spec)                         # raises SpecError before anything is written  # doctest: +SKIP
    >>> plan = planner.plan(Progress())                                                                # doctest: +SKIP
    """

    def __init__(self, spec: SweepSpec, dataset: Dataset | None = None) -> None:
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
        if spec.scoring.ability_text is not None:
            read_held_out(spec.scoring.ability_text)
        self.shape = model_shape(spec.model)
        self.spec = spec
        self.common = Common(
            sweep=spec.name,
            model=spec.model,
            model_fingerprint=fingerprint.model,
            tokenizer_fingerprint=fingerprint.tokenizer,
            dataset=spec.dataset,
            dataset_name=data.name,
            dataset_fingerprint=data.fingerprint,
            rollback=spec.grid.rollback,
            batch_size=spec.grid.batch_size,
            score=spec.scoring,
            chat_template=spec.chat_template,
            threads=spec.engine.threads,
            cache_bytes=spec.engine.cache_bytes,
            step_edits=spec.engine.step_edits,
        )
        self.notes = _dataset_notes(spec, data)
        self.grid = _Grid(spec, self.common, fingerprint, self.shape, _longest_tokens(data, spec.scoring))
        self.cells = self.grid.cells()
        if self.grid.training is not None:
            found = _overlap(spec, data, self.grid.training[1])
            self.notes += (f"{len(self.grid.training[1])} requests to train on, {found} of them edited by the sweep",)
            if spec.training.allow_overlap:
                self.common = self.common.model_copy(update={"training_overlap": found})

    def described(self) -> list[dict[str, JSON]]:
        """Every cell as :func:`orchestrator.results.select.select` wants it."""
        return [
            {
                "cell_id": cell.cell_id,
                "method": self.grid.variants[cell.variant].label,
                "algorithm": self.grid.variants[cell.variant].algorithm,
                "T": cell.T,
                "seed": cell.seed,
            }
            for cell in self.cells
        ]

    @_uncollected()
    def plan(self, progress: Progress, only: Collection[str] | None = None) -> Plan:
        """What is left of the cells ``only`` (ids; None: of all). The others stay as they are."""
        grid, cells = self.grid, self.cells
        left_out = frozenset() if only is None else frozenset(c.cell_id for c in cells if c.cell_id not in only)
        effort = Effort(self.spec, cells, grid.variants, grid.costs, grid.widths)
        clock = calibrate(_timings(progress, cells, effort))
        shards = _begun(progress, [cell for cell in cells if cell.cell_id not in left_out], effort, clock)
        left = [
            [] if c.cell_id in left_out else gaps for c, gaps in zip(cells, _subtract(cells, progress), strict=True)
        ]
        new = _cut(self.spec, cells, left, effort, progress.used)
        new = (replace(shard, cost=clock.seconds(shard.variant, shard.T, shard.cost)) for shard in new)
        shards += sorted(new, key=lambda s: (-s.cost, -s.T))
        needed = dict(grid.artifacts)
        for manifest in progress.begun:
            needed.update(Task.of(manifest).artifact_specs())
        return Plan(
            spec=self.spec,
            common=self.common,
            variants=tuple(grid.variants),
            cells=tuple(cells),
            shards=tuple(shards),
            done_groups={
                c.cell_id: sum(g < c.groups for g in progress.done[c.cell_id]) if c.cell_id in progress.done else 0
                for c in cells
            },
            artifacts=needed,
            cell_artifacts=grid.keys,
            widths=dict(grid.widths),
            memory=dict(grid.memory),
            weight_bytes=self.shape.weight_bytes,
            clock=clock,
            notes=self.notes,
            warnings=tuple(grid.warnings),
            begun={m.shard_id: m for m in progress.begun},
            left_out=left_out,
        )


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    return load_dataset(spec.kind, spec.path, spec.train_path, spec.on_bad_record)


def _training(spec: SweepSpec) -> tuple[TrainingSource, tuple[EditRequest, ...]] | None:
    """Where networks are to learn; None if the spec does not say and nothing is at hand."""
    from workers.pretrain import training_source

    told, dataset = spec.training, spec.dataset
    shards = told.shards or None
    if told.kind is not None:
        return training_source(told.kind, told.path, shards, told.on_bad_record)
    if dataset.kind == EMBEDDED_WORLD or spec.model.name == EMBEDDED:
        return training_source(EMBEDDED_WORLD, None, shards)
    if dataset.kind == "zsre" and dataset.train_path is not None:  # other kinds take mere sentences from there
        return training_source(dataset.kind, dataset.train_path, shards, dataset.on_bad_record)
    return None


def _overlap(spec: SweepSpec, data: Dataset, training: Sequence[EditRequest]) -> int:
    """How many requests are both trained on and edited under any seed. Raises :class:`SpecError` listing them."""
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


class _Grid:
    """Resolves the spec's methods and enumerates cells; collects artifacts, sizes and warnings."""

    def __init__(
        self, spec: SweepSpec, common: Common, fingerprint: ModelFingerprint, shape: ModelShape, tokens: int
    ) -> None:
        self.spec = spec
        self.tokens = tokens
        self.variants: list[Variant] = []
        self.costs: list[float] = []
        self.widths: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], Memory] = {}
        self.artifacts: dict[str, ArtifactSpec] = {}
        self.keys: dict[tuple[int, int], tuple[tuple[str, str], ...]] = {}
        self.warnings: list[str] = []
        self.training: tuple[TrainingSource, tuple[EditRequest, ...]] | None = None
        self._seeds: list[tuple[int, ...]] = []
        self._digests: dict[tuple[int, int], str] = {}
        shared = {
            "schema": SCHEMA,
            "model": common.model_fingerprint,
            "tokenizer": common.tokenizer_fingerprint,
            "dataset": common.dataset_fingerprint,
            "order": common.dataset.order,
            "dtype": common.model.dtype,
            "chat_template": common.chat_template,
            "batch_size": common.batch_size,
            "rollback": common.rollback,
        }
        for method in spec.methods:
            self._resolve(method, shared, fingerprint, shape)
        self._check_batches()

    def _resolve(
        self, method: MethodSpec, shared: Mapping[str, JSON], fingerprint: ModelFingerprint, shape: ModelShape
    ) -> None:
        # Importing the methods brings torch, which parsing a spec or reading a manifest does not need.
        from workers.methods import get_method, load_config

        try:
            kind = get_method(method.method)
            config = load_config(method.method, method.hparams, method.hparams_file, self.spec.model)
            kind.check(config, shape)
        except SpecError as e:
            raise SpecError(f"methods: {method.label}: {e}") from None
        resolved = config.model_dump(mode="json")
        hparams_id = _digest([method.method, kind.version, resolved])[:8]
        number = len(self.variants)
        for other in self.variants:
            if (other.algorithm, other.hparams_id) == (method.method, hparams_id):
                raise SpecError(f"methods: {other.label!r} and {method.label!r} have the same settings; remove one")
        variant = Variant(
            label=method.label,
            algorithm=method.method,
            version=kind.version,
            config=resolved,
            hparams_id=hparams_id,
            whole_group=kind.whole_group,
        )
        self.variants.append(variant)
        self.costs.append(float(kind.relative_cost))
        for T in self.spec.sizes(number):
            edits = lane_edits(self.spec.grid.rollback, T, self.spec.dataset.edits)
            try:
                kind.check_edits(config, shape, edits)
            except SpecError as e:
                raise SpecError(f"methods: {method.label}: grid.T: {T}: {e}") from None
            overlay = kind.overlay_bytes(config, shape, edits)
            need = estimate(
                shape,
                resolved,
                overlay_bytes=int(overlay),
                batch_size=variant.batch_size(T, self.spec.grid.batch_size),
                score=self.spec.scoring,
                tokens=self.tokens,
                cache_bytes=self.spec.engine.cache_bytes,
                shared_bytes=kind.shared_bytes(config, shape),
                on_gpu=self.spec.on_gpu,
            )
            self.memory[number, T] = need
            self.widths[number, T] = self._lanes(method.label, T, need)
        self._seeds.append(self._distinct_seeds(method.label, uses_seed=kind.uses_seed(config)))
        body = {**shared, "method": method.method, "version": kind.version, "config": resolved}
        if kind.needs_pretraining and self.training is None:
            self.training = _training(self.spec)
        source = self.training[0] if self.training is not None and kind.needs_pretraining else None
        if kind.whole_group:
            body["batch_size"] = None  # it is T, which every cell id has; what the grid says changes nothing
        for seed in self._seeds[number]:
            specs = kind.artifacts(config, fingerprint, self.spec.model, seed, source)
            keys = tuple((artifact.name, artifact.key) for artifact in specs)
            self.artifacts.update({key: artifact for (_, key), artifact in zip(keys, specs, strict=True)})
            self.keys[number, seed] = keys
        # Hashed once per set of artifacts: ten thousand seeds of one method share it.
        digests: dict[tuple[tuple[str, str], ...], str] = {}
        for seed in self._seeds[number]:
            keys = self.keys[number, seed]
            if keys not in digests:
                digests[keys] = _digest({**body, "artifacts": sorted(keys)})
            self._digests[number, seed] = digests[keys]

    def _check_batches(self) -> None:
        """Refuse a batch size that a method of the sweep cannot edit, naming all of them and those that can."""
        from workers.methods import get_method, method_names

        def able(name: str) -> bool:
            kind = get_method(name)
            return kind.batch_edits or kind.whole_group

        size = self.spec.grid.batch_size
        unable = [v for v in self.variants if not able(v.algorithm)]
        if size > 1 and unable:
            named = ", ".join(v.label if v.label == v.algorithm else f"{v.label} ({v.algorithm})" for v in unable)
            raise SpecError(
                f"grid.batch_size: {size}, but {named} can edit only one request at a time; set it to 1, or keep to methods that "
                f"edit several in one call: {', '.join(filter(able, method_names()))}"
            )

    def _lanes(self, label: str, T: int, need: Memory) -> int:
        """The spec's number of lanes, or as many as the declared memory holds."""
        engine = self.spec.engine
        if engine.lanes != "auto":
            return engine.lanes
        if engine.gpu_memory_gb is not None and self.spec.on_gpu:
            field_name, declared = "engine.gpu_memory_gb", engine.gpu_memory_gb * min(engine.resources.gpu or 1.0, 1.0)
        else:
            weights = 2 * need.weights / GIB
            field_name = "engine.resources.memory_gb"
            declared = engine.resources.memory_gb or max(CPU_MEMORY_GB, weights)
        lanes = need.lanes_within(USABLE * declared * GIB)
        if not lanes:
            raise SpecError(
                f"{field_name}: an actor has {declared:g} GiB, but {label} at T={T} needs about {need.peak(1) / GIB:.1f} GiB "
                f"for one lane ({need.weights / GIB:.1f} of weights, {need.overlay / GIB:.1f} of overlay, "
                f"{need.shared / GIB:.1f} that lanes share, the rest activations) "
                f"and {1 - USABLE:.0%} are kept free; declare more, use a smaller dtype, or set engine.lanes: 1 to try"
            )
        return lanes

    def _distinct_seeds(self, label: str, uses_seed: bool) -> tuple[int, ...]:
        seeds = self.spec.grid.seeds
        if uses_seed or self.spec.dataset.order == "shuffle" or len(seeds) == 1:
            return seeds
        self.warnings.append(
            f"{label} draws nothing at random and the order is the file's, so seeds {', '.join(map(str, seeds))} are "
            f"the same experiment; it runs once, as seed {seeds[0]}"
        )
        return seeds[:1]

    def cells(self) -> list[Cell]:
        n = self.spec.dataset.edits
        return [
            Cell(
                cell_id=hashlib.sha256(f"{self._digests[v, seed]}:T={T}:seed={seed}".encode()).hexdigest()[:16],
                variant=v,
                T=T,
                seed=seed,
                groups=n // T,
                batch_size=self.variants[v].batch_size(T, self.spec.grid.batch_size),
            )
            for v in range(len(self.variants))
            for T in self.spec.sizes(v)
            for seed in self._seeds[v]
        ]


def _subtract(cells: Sequence[Cell], progress: Progress) -> list[list[tuple[int, int]]]:
    """Per cell, the ranges of groups that are neither in the table, nor given up, nor owned by a shard that has begun."""
    taken: dict[str, set[int]] = {cell_id: set(groups) for cell_id, groups in progress.done.items()}
    for cell_id, groups in progress.given_up.items():
        taken.setdefault(cell_id, set()).update(groups)
    for manifest in progress.begun:
        for wave in manifest.job.waves:
            for lane in wave:
                for share in lane.shares:
                    cell_id = manifest.job.cells[share.cell].cell_id
                    taken.setdefault(cell_id, set()).update(range(share.group, share.stop_group))
    return [list(_gaps(taken.get(cell.cell_id), cell.groups)) for cell in cells]


def _gaps(taken: Collection[int] | None, groups: int) -> Iterator[tuple[int, int]]:
    if not taken:
        yield 0, groups
        return
    start = 0
    for group in sorted(g for g in taken if 0 <= g < groups):
        if group > start:
            yield start, group
        start = group + 1
    if start < groups:
        yield start, groups


@dataclass(frozen=True, slots=True)
class Waves:
    """``count`` waves that are alike, one after another in a chain. Each takes ``groups`` groups of every cell."""

    count: int
    groups: int
    lanes: int
    edits: int
    work: float


@dataclass(frozen=True)
class Effort:
    """How much work waves are: a function of the spec and the methods alone (see :mod:`orchestrator.schedule`)."""

    spec: SweepSpec
    cells: Sequence[Cell]
    variants: Sequence[Variant]
    costs: Sequence[float]
    widths: Mapping[tuple[int, int], int]
    """The number of lanes a wave of this variant and T may have."""

    _known: dict[tuple[object, ...], tuple[Waves, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Waves of chains of one shape, of which a sweep has few."""

    def waves(self, variant: int, T: int, chain: Chain) -> tuple[Waves, ...]:
        """A chain's waves in order: full ones, then what remains."""
        if self.spec.grid.rollback == "never":
            return tuple(self._continued(variant, run) for run in chain.runs())
        key = (variant, T, len(chain.cells), chain.spans)
        if key not in self._known:
            alike: list[Waves] = []
            for wave in self._filled(*key):
                if alike and replace(alike[-1], count=wave.count) == wave:
                    alike[-1] = replace(wave, count=alike[-1].count + wave.count)
                else:
                    alike.append(wave)
            self._known[key] = tuple(alike)
        return self._known[key]

    def _continued(self, variant: int, run: Run) -> Waves:
        """Of lanes that each start at the very first request."""
        Ts = [self.cells[share.cells[0]].T for share in run.shares]
        spans = [(share.stop * T, share.start * T) for share, T in zip(run.shares, Ts, strict=True)]
        end, lanes = max(end for end, _ in spans), len(run.cells)
        return Waves(1, len(run), lanes, lanes * end, self._work(variant, lanes, end, self._scored(variant, spans, Ts)))

    def _filled(self, variant: int, T: int, seeds: int, spans: Sequence[Span]) -> Iterator[Waves]:
        """Full waves and what remains, of as many cells as ``seeds``."""
        step = _step(self.widths[variant, T], seeds)
        parts: list[tuple[int, tuple[int, ...]]] = []
        room = step
        for start, stop, sizes in spans:
            left = stop - start
            while left:
                if not parts and left >= step:  # as many waves as this run fills alone
                    yield self._wave(variant, T, seeds, [(step, sizes)], left // step)
                    left %= step
                    continue
                taken = min(left, room)
                parts.append((taken, sizes))
                left, room = left - taken, room - taken
                if not room:
                    yield self._wave(variant, T, seeds, parts, 1)
                    parts, room = [], step
        if parts:
            yield self._wave(variant, T, seeds, parts, 1)

    def _wave(
        self, variant: int, T: int, seeds: int, parts: Sequence[tuple[int, tuple[int, ...]]], count: int
    ) -> Waves:
        groups = sum(n for n, _ in parts)
        lanes = groups * seeds
        scored = sum(n * self._of_group(variant, (T, *sizes)) for n, sizes in parts) / groups
        return Waves(count, groups, lanes, lanes * T, self._work(variant, lanes, T, scored))

    def of_manifest(self, variant: int, manifest: ShardManifest) -> float:
        """Work of a whole shard that has begun, whose lanes may differ from today's."""
        job, total = manifest.job, 0.0
        for wave in job.waves:
            if job.rollback == "group":
                end = job.T
                scored = sum(self._of_group(variant, [job.T_of(s) for s in lane.shares]) for lane in wave) / len(wave)
            else:
                Ts = [job.T_of(share) for share in wave[0].shares]
                spans = [(s.stop_group * T, s.group * T) for s, T in zip(wave[0].shares, Ts, strict=True)]
                end, scored = max(end for end, _ in spans), self._scored(variant, spans, Ts)
            total += self._work(variant, len(wave), end, scored)
        return total

    def of_edits(self, cells: Sequence[Cell], edits: int) -> float:
        """About how much work a finished shard was, of which only its cells and the edits it made are known."""
        variant, Ts = cells[0].variant, sorted({cell.T for cell in cells})
        if self.spec.grid.rollback == "never":
            lanes = len({cell.seed for cell in cells})
            end = edits // lanes
            return self._work(variant, lanes, end, self._scored(variant, [(end, 0)] * len(Ts), Ts))
        T = Ts[-1]
        lanes = max(1, min(self.widths[variant, T], edits // T))
        return self._work(variant, lanes, T, self._of_group(variant, Ts)) * edits / (T * lanes)

    def _of_group(self, variant: int, Ts: Sequence[int]) -> int:
        """Requests that a lane scores which makes one group of the largest T and reports to one of each of ``Ts``."""
        return self._scored(variant, [(T, 0) for T in Ts], Ts)

    def _scored(self, variant: int, spans: Sequence[tuple[int, int]], Ts: Sequence[int]) -> int:
        """Requests that a lane scores: each span (end, begin) in groups of its T."""
        score, kind = self.spec.scoring, self.variants[variant]
        immediate = score.immediate and not kind.whole_group
        scored = max(end - begin for end, begin in spans) if immediate else 0  # once for all T
        for (end, begin), T in zip(spans, Ts, strict=True):
            if (
                T > kind.batch_size(T, self.spec.grid.batch_size) or not immediate
            ):  # otherwise one forward for both moments
                scored += end - begin
            scored += sum(mark for mark in score.score_at if begin < mark <= end)
        return scored

    def _work(self, variant: int, lanes: int, edits: int, scored: float) -> float:
        return wave_work(self.costs[variant], edits, scored, lanes, self.spec.on_gpu)


def _timings(progress: Progress, cells: Sequence[Cell], effort: Effort) -> Iterator[Timing]:
    """What the folder's shards took, as far as this plan knows their cells."""
    known = {cell.cell_id: cell for cell in cells}
    begun = {manifest.shard_id: manifest for manifest in progress.begun}
    for spent in progress.spent:
        of_shard = [known[c] for c in spent.cells if c in known]
        if not of_shard:
            continue
        variant, T = of_shard[0].variant, max(cell.T for cell in of_shard)
        manifest = begun.get(spent.shard_id)
        if manifest is None:
            work = effort.of_edits(of_shard, spent.edits)
        else:
            work = effort.of_manifest(variant, manifest) * spent.edits / Task.of(manifest).edits
        yield Timing(variant, T, work, spent.seconds)


def _begun(progress: Progress, cells: Sequence[Cell], effort: Effort, clock: Clock) -> list[Shard]:
    """Shards under way that serve a cell of this plan. They go first: their work is half done."""
    wanted = {cell.cell_id: cell for cell in cells}
    committed = {spent.shard_id: spent.edits for spent in progress.spent}
    shards = []
    for manifest in progress.begun:
        served = [wanted[c.cell_id] for c in manifest.job.cells if c.cell_id in wanted]
        if not served:
            continue  # of cells that the spec no longer asks for: it stays as it is
        variant, T = served[0].variant, max(cell.T for cell in served)
        edits = Task.of(manifest).edits
        lanes = max(len(wave) for wave in manifest.job.waves)
        shards.append(
            Shard(
                shard_id=manifest.shard_id,
                variant=variant,
                T=T,
                runs=(),
                width=lanes,
                lanes=lanes,
                edits=edits,
                cost=clock.seconds(variant, T, effort.of_manifest(variant, manifest)),
                begun=True,
                committed=min(1.0, committed.get(manifest.shard_id, 0) / edits),
            )
        )
    return sorted(shards, key=lambda s: -s.seconds_left)


def _cut(
    spec: SweepSpec,
    cells: Sequence[Cell],
    left: Sequence[Ranges],
    effort: Effort,
    used: Collection[str],
) -> Iterator[Shard]:
    """New shards, ``cost`` being their work: of one variant and one T each, because a wave runs the same code in lockstep."""
    engine = [spec.engine.threads, spec.engine.step_edits]
    common = _digest([_scoring_key(spec.scoring), *engine, spec.grid.rollback])
    whole = _families(spec, cells, [[(0, cell.groups)] for cell in cells], effort)
    most_work = TAIL * _lower_bound(whole, effort)

    @cache
    def ids(numbers: tuple[int, ...]) -> str:
        return "+".join(cells[i].cell_id for i in numbers)

    for (variant, T), chains in _families(spec, cells, left, effort).items():
        width = effort.widths[variant, T]
        for piece in _pack(variant, T, chains, effort, most_work):
            composition = f"{common}:{width}:" + ",".join(_composition(run, ids) for run in piece.runs)
            retry = 0
            shard_id = _shard_id(composition, retry)
            while shard_id in used:  # it ran before and some of its groups failed: a fresh try is a fresh shard
                retry += 1
                shard_id = _shard_id(composition, retry)
            yield Shard(
                shard_id=shard_id,
                variant=variant,
                T=T,
                runs=tuple(piece.runs),
                width=width,
                lanes=piece.lanes,
                edits=piece.edits,
                cost=piece.work,
                retry=retry,
            )


def _composition(run: Run, ids: Callable[[tuple[int, ...]], str]) -> str:
    """What of a run enters its shard's id. ``ids``: those of cells, by their places in the plan."""
    ranges = "&".join(f"{ids(share.cells)}/{share.start}-{share.stop}" for share in run.shares)
    return "^".join((ranges, *map(ids, run.riders)))


Ranges = Sequence[tuple[int, int]]
"""Groups as half-open ranges, ascending."""


def _families(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> dict[tuple[int, int], list[Chain]]:
    """Per variant and T, what is left as chains: of one cell each, or of seeds that have the same groups left."""
    if spec.grid.rollback == "never":
        return _streams(spec, cells, left, effort)
    at = {(cell.variant, cell.T, cell.seed): i for i, cell in enumerate(cells)}
    own = _without_prefixes(spec, cells, left, effort)
    alike: dict[tuple[int, int], dict[tuple[object, ...], list[int]]] = {}
    for i, (cell, spans) in enumerate(zip(cells, own, strict=True)):
        family = alike.setdefault((cell.variant, cell.T), {})
        if spans:
            family.setdefault((spans,) if spec.engine.lanes_across_seeds else (spans, i), []).append(i)

    def chain(variant: int, team: tuple[int, ...]) -> Chain:
        spans = own[team[0]]
        sizes = {T for *_, sizes in spans for T in sizes}
        return Chain(team, spans, riders={T: tuple(at[variant, T, cells[i].seed] for i in team) for T in sizes})

    return {
        (variant, T): [
            chain(variant, team) for members in family.values() for team in _even(members, effort.widths[variant, T])
        ]
        for (variant, T), family in alike.items()
    }


def _without_prefixes(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> list[tuple[Span, ...]]:
    """Per cell, what needs lanes of its own: of the groups left that start at one request, those of the largest T.

    What rides with a lane is decided by what is left when the lane is planned, and leaves with it: running whole waves first
    changes nothing for the others. A variant that edits whole groups makes other edits at every T and shares nothing.
    """
    streams: dict[tuple[int, int], list[int]] = {}
    for i, cell in enumerate(cells):
        streams.setdefault((cell.variant, cell.seed), []).append(i)
    own: list[tuple[Span, ...]] = [()] * len(cells)
    known: dict[tuple[object, ...], list[tuple[Span, ...]]] = {}  # most variants and seeds have the same groups left
    for (variant, _), numbers in streams.items():
        share = spec.engine.share_prefixes and not effort.variants[variant].whole_group
        numbers.sort(key=lambda i: -cells[i].T)
        wanted = tuple((cells[i].T, tuple(left[i])) for i in numbers)
        if (share, wanted) not in known:
            known[share, wanted] = list(_ridden(wanted, share))
        for i, spans in zip(numbers, known[share, wanted], strict=True):
            own[i] = spans
    return own


def _ridden(wanted: Sequence[tuple[int, Ranges]], share: bool) -> Iterator[tuple[Span, ...]]:
    """For each T (descending, with its groups that are left) the groups of its own lanes."""
    if not share:
        yield from (tuple((start, stop, ()) for start, stop in ranges) for _, ranges in wanted)
        return
    sizes: dict[int, tuple[int, ...]] = {}  # by first request: the T of groups that start there, the lane's first
    for T, ranges in wanted:
        for group in (group for start, stop in ranges for group in range(start, stop)):
            sizes[group * T] = (*sizes.get(group * T, ()), T)
    for T, ranges in wanted:
        spans: list[Span] = []
        for group in (group for start, stop in ranges for group in range(start, stop)):
            lane, *riders = sizes[group * T]
            if lane != T:
                continue
            if spans and spans[-1][1:] == (group, tuple(riders)):
                spans[-1] = (spans[-1][0], group + 1, tuple(riders))
            else:
                spans.append((group, group + 1, tuple(riders)))
        yield tuple(spans)


def _streams(
    spec: SweepSpec, cells: Sequence[Cell], left: Sequence[Ranges], effort: Effort
) -> dict[tuple[int, int], list[Chain]]:
    """Without rollback T only says when to score: one lane per variant and seed makes the edits for every T that is left.

    A variant that edits whole groups makes other edits at every T, and has a lane for each. Runs stand under the largest T
    they serve.
    """
    lanes: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for i, (cell, ranges) in enumerate(zip(cells, left, strict=True)):
        own = cell.T if effort.variants[cell.variant].whole_group else 0
        for start, stop in ranges:
            lanes.setdefault((cell.variant, own, cell.seed), []).append((i, start, stop))
    alike: dict[tuple[object, ...], list[list[tuple[int, int, int]]]] = {}
    for (variant, _, seed), shares in lanes.items():
        shares.sort(key=lambda share: (-cells[share[0]].T, share[1]))
        shape = tuple((cells[i].T, start, stop) for i, start, stop in shares)
        key = (variant, shape) if spec.engine.lanes_across_seeds else (variant, shape, seed)
        alike.setdefault(key, []).append(shares)
    chains: dict[tuple[int, int], list[Chain]] = {}
    for members in alike.values():
        first = cells[members[0][0][0]]
        for team in _even(members, effort.widths[first.variant, first.T]):
            # share by share: the cell of each lane, and the groups, which are the same in all of them
            parts = [Run(tuple(i for i, _, _ in part), *part[0][1:]) for part in zip(*team, strict=True)]
            lane = parts[0]
            chain = Chain(lane.cells, ((lane.start, lane.stop, ()),), also=tuple(parts[1:]))
            chains.setdefault((first.variant, first.T), []).append(chain)
    return chains


def _even(members: Sequence[Member], most: int) -> Iterator[tuple[Member, ...]]:
    """As few teams of at most ``most`` as there can be, of even sizes: dropping some leaves the others as they were."""
    teams = -(-len(members) // most)
    size, larger = divmod(len(members), teams)
    start = 0
    for team in range(teams):
        stop = start + size + (team < larger)
        yield tuple(members[start:stop])
        start = stop


def _lower_bound(families: Mapping[tuple[int, int], Sequence[Chain]], effort: Effort) -> float:
    """Work below which no schedule of the whole sweep ends: its longest wave, or an even share of everything."""
    longest = total = 0.0
    for (variant, T), chains in families.items():
        for chain in chains:
            for wave in effort.waves(variant, T, chain):
                longest = max(longest, wave.work)
                total += wave.work * wave.count
    return max(longest, total / (effort.spec.engine.max_actors or UNKNOWN_ACTORS))


@dataclass
class _Piece:
    """A shard being filled."""

    runs: list[Run] = field(default_factory=list)
    edits: int = 0
    work: float = 0.0
    lanes: int = 0

    def add(self, runs: Iterable[Run], edits: int, work: float, lanes: int) -> None:
        for run in runs:
            if self.runs and self.runs[-1].continued_by(run):
                self.runs[-1] = replace(self.runs[-1], stop=run.stop)
            else:
                self.runs.append(run)
        self.edits += edits
        self.work += work
        self.lanes = max(self.lanes, lanes)


def _pack(variant: int, T: int, chains: Sequence[Chain], effort: Effort, most_work: float) -> Iterator[_Piece]:
    """Fill shards with whole waves, in order, up to ``shard_edits`` and ``most_work``.

    The limit on work gives way to ``step_edits``: what is shorter than the time between two commits is not worth a launch.
    """
    engine = effort.spec.engine
    piece = _Piece()
    for chain in chains:
        rest = deque(chain.runs())
        for wave in effort.waves(variant, T, chain):
            waves = wave.count
            while waves:
                by_work = max((most_work - piece.work) / wave.work, -(-(engine.step_edits - piece.edits) // wave.edits))
                fit = min(waves, (engine.shard_edits - piece.edits) // wave.edits, int(by_work))
                if fit < 1 and piece.runs:
                    yield piece
                    piece = _Piece()
                    continue
                fit = max(1, fit)  # a single wave is taken whatever its size
                piece.add(_take(rest, fit * wave.groups), fit * wave.edits, fit * wave.work, wave.lanes)
                waves -= fit
    if piece.runs:
        yield piece


def _take(rest: deque[Run], groups: int) -> Iterator[Run]:
    """The next so many groups of each cell of a chain."""
    while groups:
        run = rest.popleft()
        if len(run) > groups:
            middle = run.start + groups
            rest.appendleft(replace(run, start=middle))
            run = replace(run, stop=middle)
        groups -= len(run)
        yield run


def _longest_tokens(data: Dataset, score: ScoreConfig) -> int:
    """A bound on a sequence's tokens: three characters make at least one, and templates may stand before a prompt."""
    longest = 0
    for request in data.requests:
        longest = max([longest, *map(len, request.ood)])
        targets = [request.target_new, *(p.target for p in (*request.locality, *request.portability))]
        prompts = [request.prompt, *request.rephrases, *(p.prompt for p in (*request.locality, *request.portability))]
        longest = max(longest, max(map(len, prompts)) + max(map(len, targets)), len(request.unrelated or ""))
    window = score.ability_window if score.ability_text is not None else 0
    return max(longest // 3 + TEMPLATE_TOKENS + score.fluency_tokens, window)


def _dataset_notes(spec: SweepSpec, data: Dataset) -> tuple[str, ...]:
    """What a reader of the results should know about the requests that will be edited (those of the first seed)."""
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


def _scoring_key(score: ScoreConfig) -> Mapping[str, JSON]:
    """What of the scoring settings enters a shard's id. Those that came later count only where they are set."""
    later = {"fluency_tokens", "fluency_top_k", "ability_text", "ability_tokens", "ability_window"}
    values: dict[str, JSON] = score.model_dump(mode="json")
    defaults = ScoreConfig().model_dump(mode="json")
    return {name: value for name, value in values.items() if name not in later or value != defaults[name]}


def _digest(value: JSON) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _shard_id(composition: str, retry: int) -> str:
    return hashlib.sha256(f"{composition}#{retry}".encode()).hexdigest()[:16]
