"""SweepSpec -> cells -> shards and steps, in launch order.

    plan = make_plan(spec, Progress())
    for shard in plan.shards:               # longest first
        manifest = plan.manifest(shard)     # everything an actor needs, as JSON

A plan is a pure function of its inputs (:mod:`orchestrator.planning.inputs`) and of what a results
folder holds. It is cheap: shards are kept as ranges of groups, and hashes of common parts are taken
once. Only launching a shard writes its ranges out into a :class:`~workers.job.StreamJob`.

Plans only ever grow: groups that are in the table, or that belong to a shard which has begun, are
subtracted, and what is left is cut into new shards. So a shard's composition never changes,
whatever happens to the spec in the meantime.

Which lanes share a wave decides bits, which waves share a shard does not. Waves therefore follow
from the spec and from what is left alone, and removing whole waves leaves the others as they were;
shards are cut between waves only, by the spec and by work (never by the clock or the size of a
cluster). What was measured decides the order of launch.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

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
from workers.scoring.registry import SCORES
from workers.types import JSON, Dataset


@dataclass(frozen=True, slots=True)
class Spent:
    """Time that the edits of one shard have taken so far."""

    shard_id: str
    cells: tuple[str, ...]
    edits: int
    seconds: float
    committed: int = 0
    """Ticks that are durable, of a shard under way."""


@dataclass(frozen=True)
class Progress:
    """Finished work in a results folder.

    ``done``: per cell the groups whose rows are complete in the table. ``begun``: manifests of
    shards that are not in the table yet. ``used``: ids of shards that may not be used again.
    ``spent``: time of shards in the table and under way. ``given_up``: per cell the groups that
    failed and are not to be run again.
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
    """For each variant and T, how many lanes a wave may have: the spec's number, or what `auto`
    came to."""
    memory: Mapping[tuple[int, int], MemoryEstimate]
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
            return sum(
                len(o.cells) * o.stop * self.cells[o.cells[0]].T for run in shard.runs for o in run.shares
            )
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
        """Simulate the shards that are left, in launch order, on so many actors (artifacts and
        start-up not counted)."""
        return simulate([shard.seconds_left for shard in self.shards], actors)

    def cell_ids(self, shard: Shard) -> tuple[str, ...]:
        """The cells a shard serves."""
        if shard.begun:
            return tuple(cell.cell_id for cell in self.begun[shard.shard_id].job.cells)
        return tuple(self.cells[i].cell_id for i in members(shard))

    def group_sizes(self, shard: Shard) -> tuple[int, ...]:
        """Every T a shard serves, ascending."""
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
        """The artifacts a shard needs, in the order its cells need them."""
        return self.work.artifact_keys(shard)

    def manifest(self, shard: Shard) -> ShardManifest:
        """Write a shard's ranges out into the job its actor executes."""
        return self.work.manifest(shard)


# --- planning -------------------------------------------------------------------------------


def make_plan(spec: SweepSpec, progress: Progress | None = None, dataset: Dataset | None = None) -> Plan:
    """Read what a sweep's plan depends on (:func:`read_inputs`) and plan it, leaving out what is
    done."""
    return Planner(read_inputs(spec, dataset)).plan(progress or Progress())


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Collecting garbage among a plan's million objects, which all stay, took 0.7 of 4.2 s for
    10,000 cells."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Planner:
    """Checks a spec against its data set, model and methods, and enumerates its cells; then plans
    as often as asked.

    >>> planner = Planner(read_inputs(spec))  # raises SpecError before anything is written  # doctest: +SKIP
    >>> plan = planner.plan(Progress())  # doctest: +SKIP

    Reads no file: the data set, the model's files and all others were read by
    :func:`~orchestrator.planning.inputs.read_inputs`.
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
            rollback=spec.grid.rollback,
            batch_size=spec.grid.batch_size,
            score=spec.scoring,
            chat_template=spec.chat_template,
            threads=spec.engine.threads,
            cache_bytes=spec.engine.cache_bytes,
            step_edits=spec.engine.step_edits,
        )
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

    @_garbage_collection_off()
    def plan(self, progress: Progress, only: Collection[str] | None = None) -> Plan:
        """Plan the rest of the cells ``only`` (ids; None: all cells). The others stay as they
        are."""
        grid, cells = self.grid, self.cells
        left_out = (
            frozenset() if only is None else frozenset(c.cell_id for c in cells if c.cell_id not in only)
        )
        effort = Effort(self.spec, cells, grid.variants, grid.costs, grid.widths)
        clock = calibrate(_timings(progress, cells, effort))
        shards = _begun(progress, [cell for cell in cells if cell.cell_id not in left_out], effort, clock)
        left = [
            [] if c.cell_id in left_out else gaps
            for c, gaps in zip(cells, _subtract(cells, progress), strict=True)
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
                c.cell_id: sum(g < c.groups for g in progress.done[c.cell_id])
                if c.cell_id in progress.done
                else 0
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


def _subtract(cells: Sequence[Cell], progress: Progress) -> list[list[tuple[int, int]]]:
    """Per cell, the ranges of groups that are neither in the table, nor given up, nor owned by a
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
    """Times of the folder's shards whose cells are in this plan."""
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
    """New shards, ``cost`` being their work: of one variant and one T each, because a wave runs the
    same code in lockstep."""
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
            while (
                shard_id in used
            ):  # it ran before and some of its groups failed: a fresh try is a fresh shard
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
    """The part of a range that enters its shard's id. ``ids``: those of cells, by their places in
    the plan."""
    ranges = "&".join(f"{ids(share.cells)}/{share.start}-{share.stop}" for share in run.shares)
    return "^".join((ranges, *map(ids, run.riders)))


def _shard_id(composition: str, retry: int) -> str:
    return hashlib.sha256(f"{composition}#{retry}".encode()).hexdigest()[:16]
