"""Plan a sweep: SweepSpec -> cells -> shards and steps, in launch order.

    plan = make_plan(spec, Progress())
    for shard in plan.shards:               # longest first
        manifest = plan.manifest(shard)     # everything an actor needs, as JSON

A plan is a pure function of its inputs (:mod:`orchestrator.planning.inputs`) and of the progress in
a results folder. A shard is stored as ranges of groups; only when it is launched, the ranges are
expanded into a :class:`~workers.job.StreamJob`.

Groups that are in the table, or that belong to a shard which has begun, are subtracted. The rest is
cut into new shards. So the composition of a shard that has begun never changes, even if the spec
does.

Which lanes share a wave affects the rounding of results; which waves share a shard does not. Waves
therefore depend only on the spec and on the groups that are left, and finishing whole waves does
not change the other waves. Shards consist of whole waves; their size depends on the spec and on
estimated work, never on measured time or the size of a cluster. Measured times determine the order
of launch.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

from orchestrator.planning.checks import all_at_once, impossible_cells, shortfall_warnings
from orchestrator.planning.grid import Grid, digest
from orchestrator.planning.inputs import Inputs, count_overlap, dataset_notes, longest_tokens, read_inputs
from orchestrator.planning.makespan import Clock, Simulation, Timing, calibrate, simulate
from orchestrator.planning.memory import MemoryEstimate
from orchestrator.planning.packing import (
    Effort,
    Ranges,
    collect_chains,
    lower_bound,
    pack,
)
from orchestrator.planning.spec import SweepSpec
from orchestrator.planning.work import Cell, Common, GroupRange, Shard, Task, Variant, Work, members
from orchestrator.results.manifest import ShardManifest
from workers.artifacts.base import ArtifactSpec
from workers.data.scripts import joiner_mark, subject_mark
from workers.scoring.registry import SCORES
from workers.types import JSON, Dataset


@dataclass(frozen=True, slots=True)
class Spent:
    """Measured time of a shard's committed edits."""

    shard_id: str
    cells: tuple[str, ...]
    edits: int
    seconds: float
    committed: int = 0
    """Ticks that are durable, of a shard under way."""


@dataclass(frozen=True)
class Progress:
    """Progress in a results folder.

    ``done``: cell id -> groups whose rows are complete in the table. ``begun``: manifests of shards
    that have begun and are not in the table yet. ``used``: shard ids that must not be used again.
    ``spent``: times of the shards in the table and of those in ``begun``. ``given_up``: cell id ->
    groups that failed and are not run again.
    """

    done: Mapping[str, Collection[int]] = field(default_factory=dict)
    given_up: Mapping[str, Collection[int]] = field(default_factory=dict)
    begun: Sequence[ShardManifest] = ()
    used: Collection[str] = ()
    spent: Sequence[Spent] = ()


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, the shards that are left to run, and notes for the user."""

    spec: SweepSpec
    common: Common
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    shards: tuple[Shard, ...]
    done_groups: Mapping[str, int]
    failed_groups: Mapping[str, int]
    """Groups that failed in an earlier run and are left alone, of cells that have any."""
    artifacts: Mapping[str, ArtifactSpec]
    cell_artifacts: Mapping[tuple[int, int], tuple[tuple[str, str], ...]]
    """(variant, seed) -> pairs of the method's name for an artifact and the artifact's key."""
    widths: Mapping[tuple[int, int], int]
    """(variant, T) -> largest number of lanes of a wave: the spec's, or the result of `auto`."""
    memory: Mapping[tuple[int, int], MemoryEstimate]
    weight_bytes: int
    clock: Clock = field(default_factory=Clock)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    begun: Mapping[str, ShardManifest] = field(default_factory=dict)
    left_out: Collection[str] = frozenset()
    """Ids of the spec's cells that this run leaves out (``--only``)."""

    @property
    def asked(self) -> tuple[Cell, ...]:
        """The cells that this run must finish."""
        return tuple(cell for cell in self.cells if cell.cell_id not in self.left_out)

    @property
    def edits(self) -> int:
        """Number of edits of all cells, done or not."""
        return sum(cell.groups * cell.T for cell in self.cells)

    @property
    def edits_left(self) -> int:
        return sum(shard.edits for shard in self.shards)

    @property
    def edits_shared(self) -> int:
        """Number of edits saved by lanes that serve several cells, in the shards that are left."""
        return sum(map(self._edits_unshared, self.shards)) - self.edits_left

    def _edits_unshared(self, shard: Shard) -> int:
        """Number of edits of a shard if each of its cells had its own lanes."""
        continued = self.spec.grid.rollback == "never"
        if shard.begun:
            job = self.begun[shard.shard_id].job
            shares = [share for wave in job.waves for lane in wave for share in lane.shares]
            return sum(job.T_of(share) * (share.stop_group if continued else 1) for share in shares)
        if continued:
            return sum(
                len(o.cells) * o.stop * self.cells[o.cells[0]].T for run in shard.runs for o in run.shares
            )
        return sum(len(run) * len(c) * self.cells[c[0]].T for run in shard.runs for c in run.served)

    @property
    def lanes(self) -> int:
        """Largest number of lanes in a wave of the shards that are left."""
        return max((shard.lanes for shard in self.shards), default=0)

    def peak_bytes(self, variant: int) -> int:
        """Estimated peak memory (bytes) of an actor that runs the remaining shards of a variant."""
        return max(
            (self.memory[variant, s.T].peak(s.lanes) for s in self.shards if s.variant == variant),
            default=self.weight_bytes,
        )

    def simulate(self, actors: int) -> Simulation:
        """Simulate the remaining shards, in launch order, on ``actors`` actors. Start-up and the
        construction of artifacts are not included."""
        return simulate([shard.seconds_left for shard in self.shards], actors)

    def cell_ids(self, shard: Shard) -> tuple[str, ...]:
        """Ids of the cells that a shard serves."""
        if shard.begun:
            return tuple(cell.cell_id for cell in self.begun[shard.shard_id].job.cells)
        return tuple(self.cells[i].cell_id for i in members(shard))

    def group_sizes(self, shard: Shard) -> tuple[int, ...]:
        """All T of the cells that a shard serves, ascending."""
        if shard.begun:
            job = self.begun[shard.shard_id].job
            return tuple(sorted({cell.T or job.T for cell in job.cells}))
        return tuple(sorted({self.cells[i].T for i in members(shard)}))

    @property
    def work(self) -> Work:
        """The part of the plan that actors need."""
        return Work(
            common=self.common,
            variants=self.variants,
            cells=self.cells,
            shards=self.shards,
            artifacts=self.artifacts,
            cell_artifacts=self.cell_artifacts,
            begun=self.begun,
            gpu_memory_gb=self.spec.engine.gpu_memory_gb if self.spec.on_gpu else None,
        )

    def artifact_keys(self, shard: Shard) -> tuple[str, ...]:
        """Keys of the artifacts that a shard needs, in the order of its cells."""
        return self.work.artifact_keys(shard)

    def manifest(self, shard: Shard) -> ShardManifest:
        """Build the manifest of a shard (see :meth:`Work.manifest`)."""
        return self.work.manifest(shard)


# --- planning -------------------------------------------------------------------------------


def make_plan(spec: SweepSpec, progress: Progress | None = None, dataset: Dataset | None = None) -> Plan:
    """Read a sweep's inputs (:func:`read_inputs`) and plan its unfinished part."""
    return Planner(read_inputs(spec, dataset)).plan(progress or Progress())


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Switch the garbage collector off. A plan of 10,000 cells has a million objects, none of which
    is garbage; the collector took 0.7 of 4.2 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Planner:
    """Checks a spec against its data set, model and methods, and enumerates its cells. Its
    :meth:`plan` may then be called several times.

    >>> planner = Planner(read_inputs(spec))  # raises SpecError before anything is written  # doctest: +SKIP
    >>> plan = planner.plan(Progress())  # doctest: +SKIP

    Reads no file: :func:`~orchestrator.planning.inputs.read_inputs` has read them all.
    """

    def __init__(self, inputs: Inputs) -> None:
        spec, data = inputs.spec, inputs.dataset
        self.shape = inputs.shape
        self.spec = spec
        self.common = Common(
            sweep=spec.name,
            model=spec.model,
            model_fingerprint=inputs.fingerprint.model,
            tokenizer_fingerprint=inputs.fingerprint.tokenizer,
            dataset=spec.dataset,
            dataset_name=data.name,
            dataset_fingerprint=data.fingerprint,
            joiner_mark=joiner_mark(data.requests),
            subject_mark=subject_mark(data.requests),
            clock_mark="none" if inputs.asks_for_day else "",
            rollback=spec.grid.rollback,
            batch_size=spec.grid.batch_size,
            score=spec.scoring,
            chat_template=spec.chat_template,
            template=spec.template,
            threads=spec.engine.threads,
            cache_bytes=spec.engine.cache_bytes,
            step_edits=spec.engine.step_edits,
        )
        self.inputs_warnings = inputs.warnings
        self.shortfalls = inputs.shortfalls
        self.notes = dataset_notes(spec, data)
        self.grid = Grid(spec, self.common, inputs.methods, self.shape, longest_tokens(data, spec.scoring))
        self.cells = self.grid.cells()
        if inputs.trained_on is not None:
            found = count_overlap(spec, data, inputs.trained_on)
            self.notes += (
                f"{len(inputs.trained_on)} requests to train on, {found} of them edited by the sweep",
            )
            if spec.training.allow_overlap:
                self.common = self.common.model_copy(update={"training_overlap": found})

    def described(self) -> list[dict[str, JSON]]:
        """The cells in the form that :func:`orchestrator.results.select.select` needs."""
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

    def check(self, only: Collection[str] | None = None) -> tuple[str, ...]:
        """Warnings about groups of the cells ``only`` (ids; None: all cells) that will fail for what
        their requests lack. Raises :class:`SpecError` for cells of which no group can be edited."""
        if not self.shortfalls:
            return ()
        asked = {(c.variant, c.T, c.seed) for c in self.cells if only is None or c.cell_id in only}
        found = [short for short in self.shortfalls if (short.variant, short.T, short.seed) in asked]
        if problems := impossible_cells(found):
            raise all_at_once(problems)
        return shortfall_warnings(found)

    @_garbage_collection_off()
    def plan(self, progress: Progress, only: Collection[str] | None = None) -> Plan:
        """Plan the unfinished part of the cells ``only`` (ids; None: all cells)."""
        grid, cells = self.grid, self.cells
        left_out = (
            frozenset() if only is None else frozenset(c.cell_id for c in cells if c.cell_id not in only)
        )
        effort = Effort(self.spec, cells, grid.variants, grid.costs, grid.widths)
        clock = calibrate(_timings(progress, cells, effort))
        shards = _begun_shards(
            progress, [cell for cell in cells if cell.cell_id not in left_out], effort, clock
        )
        left = [
            [] if c.cell_id in left_out else gaps
            for c, gaps in zip(cells, _groups_left(cells, progress), strict=True)
        ]
        new = _cut_shards(self.spec, cells, left, effort, progress.used)
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
                c.cell_id: sum(g < c.groups for g in progress.done[c.cell_id])
                if c.cell_id in progress.done
                else 0
                for c in cells
            },
            failed_groups={
                c.cell_id: count
                for c in cells
                if (count := sum(group < c.groups for group in progress.given_up.get(c.cell_id, ())))
            },
            artifacts=needed,
            cell_artifacts=grid.keys,
            widths=dict(grid.widths),
            memory=dict(grid.memory),
            weight_bytes=self.shape.weight_bytes,
            clock=clock,
            notes=self.notes,
            warnings=(*grid.warnings, *self.inputs_warnings, *self.check(only)),
            begun={m.shard_id: m for m in progress.begun},
            left_out=left_out,
        )


def _groups_left(cells: Sequence[Cell], progress: Progress) -> list[list[tuple[int, int]]]:
    """Per cell, the ranges of groups that are left: not in the table, not given up, and not in a
    shard that has begun."""
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
    """Half-open ranges of the numbers 0 .. ``groups`` - 1 that are not in ``taken``."""
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


def _timings(progress: Progress, cells: Sequence[Cell], effort: Effort) -> Iterator[Timing]:
    """Measured times of the folder's shards that serve cells of this plan."""
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


def _begun_shards(progress: Progress, cells: Sequence[Cell], effort: Effort, clock: Clock) -> list[Shard]:
    """Shards that have begun and serve a cell of this plan. They are launched first, so that their
    progress is used."""
    wanted = {cell.cell_id: cell for cell in cells}
    committed = {spent.shard_id: spent.edits for spent in progress.spent}
    shards = []
    for manifest in progress.begun:
        served = [wanted[c.cell_id] for c in manifest.job.cells if c.cell_id in wanted]
        if not served:
            continue  # none of its cells is in this plan
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


def _cut_shards(
    spec: SweepSpec,
    cells: Sequence[Cell],
    left: Sequence[Ranges],
    effort: Effort,
    used: Collection[str],
) -> Iterator[Shard]:
    """Cut the groups that are left into new shards. Their ``cost`` is still in units of work.

    A shard has one variant and one T, because the lanes of a wave run the same code in lockstep.
    """
    engine = [spec.engine.threads, spec.engine.step_edits]
    common = digest([SCORES.shard_key(spec.scoring), *engine, spec.grid.rollback])
    whole = collect_chains(spec, cells, [[(0, cell.groups)] for cell in cells], effort)
    most_work = lower_bound(whole, effort)

    @cache
    def ids(numbers: tuple[int, ...]) -> str:
        return "+".join(cells[i].cell_id for i in numbers)

    for (variant, T), chains in collect_chains(spec, cells, left, effort).items():
        width = effort.widths[variant, T]
        for piece in pack(variant, T, chains, effort, most_work):
            composition = f"{common}:{width}:" + ",".join(_composition(run, ids) for run in piece.runs)
            retry = 0
            shard_id = _shard_id(composition, retry)
            # A used id means that the same shard ran before and its groups failed. Another try
            # needs another id.
            while shard_id in used:
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


def _composition(run: GroupRange, ids: Callable[[tuple[int, ...]], str]) -> str:
    """Text of a range that enters its shard's id. ``ids``: indices of cells -> text of their
    ids."""
    ranges = "&".join(f"{ids(share.cells)}/{share.start}-{share.stop}" for share in run.shares)
    return "^".join((ranges, *map(ids, run.riders)))


def _shard_id(composition: str, retry: int) -> str:
    return hashlib.sha256(f"{composition}#{retry}".encode()).hexdigest()[:16]
