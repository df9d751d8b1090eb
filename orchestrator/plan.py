"""SweepSpec -> cells -> shards and steps, in launch order.

    plan = make_plan(spec, Progress())
    for shard in plan.shards:               # longest first
        manifest = plan.manifest(shard)     # everything an actor needs, as JSON

A plan is cheap: shards are kept as ranges of groups, hashes of common parts are taken once, and no weights are loaded.
Only launching a shard writes its ranges out into a :class:`~workers.job.StreamJob`.

Plans only ever grow: groups that are in the table, or that belong to a shard which has begun, are subtracted, and what
is left is cut into new shards. So a shard's composition never changes, whatever happens to the spec in the meantime.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.journal import ShardManifest
from orchestrator.spec import DatasetSpec, MethodSpec, SweepSpec
from workers.artifacts import ArtifactSpec
from workers.data import count_conflicts, count_duplicates, count_edited_locality, load_dataset, order_requests
from workers.job import Frozen, Lane, Rollback, ScoreConfig, StreamCell, StreamJob, cut_steps, expected_rows
from workers.models import ModelConfig, ModelFingerprint, ModelShape, fingerprint_model, model_shape
from workers.types import JSON, Dataset, EditRequest, SpecError

SCHEMA = 1
"""Version of what enters a cell id. Raising it makes every result stale."""

GIB = 1 << 30


class Variant(Frozen):
    """One method with its settings resolved: what a label of the spec stands for."""

    label: str
    algorithm: str
    version: int
    config: dict[str, Any]
    hparams_id: str


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
    batch_size: int
    score: ScoreConfig
    chat_template: bool
    threads: int
    step_edits: int


class Task(Frozen):
    """What a shard's worker needs beside its job; stands in the manifest as JSON."""

    common: Common
    variant: Variant
    artifacts: tuple[ArtifactSpec, ...] = ()
    edits: int
    expected_rows: int
    retry: int = 0

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


@dataclass(frozen=True, slots=True)
class Run:
    """Groups ``start .. stop`` (exclusive) of one cell."""

    cell: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """A unit of scheduling. ``runs`` is empty for one that has begun: its manifest is in the journal."""

    shard_id: str
    variant: int
    T: int
    runs: tuple[Run, ...]
    lanes: int
    edits: int
    cost: float
    begun: bool = False
    retry: int = 0


@dataclass(frozen=True)
class Progress:
    """What a results folder already holds.

    ``done``: per cell the groups whose rows are complete in the table. ``begun``: manifests of shards that are not in
    the table yet. ``used``: ids of shards that may not be used again.
    """

    done: Mapping[str, Collection[int]] = field(default_factory=dict)
    begun: Sequence[ShardManifest] = ()
    used: Collection[str] = ()


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
    lane_bytes: tuple[int, ...]
    weight_bytes: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    begun: Mapping[str, ShardManifest] = field(default_factory=dict)

    @property
    def edits(self) -> int:
        """Edits of all cells, done or not."""
        return sum(cell.groups * cell.T for cell in self.cells)

    @property
    def edits_left(self) -> int:
        return sum(shard.edits for shard in self.shards)

    @property
    def lanes(self) -> int:
        """The widest lockstep of any shard that is left."""
        return max((shard.lanes for shard in self.shards), default=0)

    def artifact_keys(self, shard: Shard) -> tuple[str, ...]:
        """The artifacts a shard needs, in the order its cells need them."""
        if shard.begun:
            return tuple(Task.of(self.begun[shard.shard_id]).artifact_specs())
        cells = dict.fromkeys(self.cells[run.cell].seed for run in shard.runs)
        return tuple(dict.fromkeys(key for seed in cells for _, key in self.cell_artifacts[shard.variant, seed]))

    def manifest(self, shard: Shard) -> ShardManifest:
        """Write a shard's ranges out into the job its actor executes."""
        if shard.begun:
            return self.begun[shard.shard_id]
        return expand(
            self.common,
            self.variants[shard.variant],
            shard,
            self.cells,
            {
                self.cells[run.cell].seed: self.cell_artifacts[shard.variant, self.cells[run.cell].seed]
                for run in shard.runs
            },
            tuple(self.artifacts[key] for key in self.artifact_keys(shard)),
        )


def expand(
    common: Common,
    variant: Variant,
    shard: Shard,
    cells: Sequence[Cell],
    names: Mapping[int, tuple[tuple[str, str], ...]],
    artifacts: tuple[ArtifactSpec, ...],
) -> ShardManifest:
    """The manifest of a new shard: a pure function of its composition. ``names``: per seed, name and key of artifacts."""
    index = {cell: i for i, cell in enumerate(dict.fromkeys(run.cell for run in shard.runs))}
    if common.rollback == "group":
        lanes = [
            Lane(cell=index[r.cell], group=g, stop_group=g + 1) for r in shard.runs for g in range(r.start, r.stop)
        ]
        waves = tuple(tuple(lanes[i : i + shard.lanes]) for i in range(0, len(lanes), shard.lanes))
    else:
        waves = (tuple(Lane(cell=index[r.cell], group=r.start, stop_group=r.stop) for r in shard.runs),)
    job = StreamJob(
        method=variant.algorithm,
        config=variant.config,
        cells=tuple(
            StreamCell(cell_id=cells[c].cell_id, seed=cells[c].seed, artifacts=dict(names[cells[c].seed]))
            for c in index
        ),
        T=shard.T,
        batch_size=common.batch_size,
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
    )
    return ShardManifest(
        shard_id=shard.shard_id,
        job=job,
        bounds=cut_steps(job, common.step_edits),
        columns={cells[c].cell_id: cell_columns(common, variant, cells[c]) for c in index},
        task=task.model_dump(mode="json"),
    )


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
        "batch_size": common.batch_size,
        "rollback": common.rollback,
    }


# --- planning --------------------------------------------------------------------------------------------------------


def make_plan(spec: SweepSpec, progress: Progress | None = None, dataset: Dataset | None = None) -> Plan:
    """Plan a sweep, leaving out what is done. Reads the data set and hashes the model's files; loads no weights."""
    return Planner(spec, dataset).plan(progress or Progress())


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
            step_edits=spec.engine.step_edits,
        )
        self.notes = _dataset_notes(spec, data)
        self.grid = _Grid(spec, self.common, fingerprint, self.shape)
        self.cells = self.grid.cells()

    def plan(self, progress: Progress) -> Plan:
        grid, cells = self.grid, self.cells
        left = _subtract(cells, progress)
        shards = _begun(progress, cells, grid.costs)
        new = _cut(self.spec, cells, left, grid.costs, progress.used)
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
            lane_bytes=tuple(grid.lane_bytes),
            weight_bytes=self.shape.weight_bytes,
            notes=self.notes,
            warnings=tuple(grid.warnings),
            begun={m.shard_id: m for m in progress.begun},
        )


def load_spec_dataset(spec: DatasetSpec) -> Dataset:
    return load_dataset(spec.kind, spec.path, spec.train_path, spec.on_bad_record)


class _Grid:
    """Resolves the spec's methods and enumerates cells; collects artifacts, sizes and warnings."""

    def __init__(self, spec: SweepSpec, common: Common, fingerprint: ModelFingerprint, shape: ModelShape) -> None:
        self.spec = spec
        self.variants: list[Variant] = []
        self.costs: list[float] = []
        self.lane_bytes: list[int] = []
        self.artifacts: dict[str, ArtifactSpec] = {}
        self.keys: dict[tuple[int, int], tuple[tuple[str, str], ...]] = {}
        self.warnings: list[str] = []
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
        if self.spec.grid.batch_size > 1 and not kind.batch_edits:
            raise SpecError(
                f"grid.batch_size: {self.spec.grid.batch_size}, but {method.label} ({method.method}) edits one request "
                "at a time; the valid value is 1"
            )
        resolved = config.model_dump(mode="json")
        hparams_id = _digest([method.method, kind.version, resolved])[:8]
        number = len(self.variants)
        for other in self.variants:
            if (other.algorithm, other.hparams_id) == (method.method, hparams_id):
                raise SpecError(f"methods: {other.label!r} and {method.label!r} have the same settings; remove one")
        self.variants.append(
            Variant(
                label=method.label,
                algorithm=method.method,
                version=kind.version,
                config=resolved,
                hparams_id=hparams_id,
            )
        )
        self.costs.append(float(kind.relative_cost))
        self.lane_bytes.append(int(kind.overlay_bytes(config, shape, max(self.spec.grid.T))))
        self._seeds.append(self._distinct_seeds(method.label, uses_seed=kind.uses_seed(config)))
        body = {**shared, "method": method.method, "version": kind.version, "config": resolved}
        for seed in self._seeds[number]:
            specs = kind.artifacts(config, fingerprint, self.spec.model, seed)
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
            )
            for v in range(len(self.variants))
            for T in self.spec.grid.T
            for seed in self._seeds[v]
        ]


def _subtract(cells: Sequence[Cell], progress: Progress) -> list[list[tuple[int, int]]]:
    """Per cell, the ranges of groups that are neither in the table nor owned by a shard that has begun."""
    taken: dict[str, set[int]] = {cell_id: set(groups) for cell_id, groups in progress.done.items()}
    for manifest in progress.begun:
        for wave in manifest.job.waves:
            for lane in wave:
                cell_id = manifest.job.cells[lane.cell].cell_id
                taken.setdefault(cell_id, set()).update(range(lane.group, lane.stop_group))
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


def _begun(progress: Progress, cells: Sequence[Cell], costs: Sequence[float]) -> list[Shard]:
    """Shards under way that serve a cell of this plan. They go first: their work is half done."""
    wanted = {cell.cell_id: cell for cell in cells}
    shards = []
    for manifest in progress.begun:
        cell = next((wanted[c.cell_id] for c in manifest.job.cells if c.cell_id in wanted), None)
        if cell is None:
            continue  # of a cell that the spec no longer asks for: it stays as it is
        edits = Task.of(manifest).edits
        shards.append(
            Shard(
                shard_id=manifest.shard_id,
                variant=cell.variant,
                T=manifest.job.T,
                runs=(),
                lanes=max(len(wave) for wave in manifest.job.waves),
                edits=edits,
                cost=edits * costs[cell.variant],
                begun=True,
            )
        )
    return sorted(shards, key=lambda s: -s.cost)


def _cut(
    spec: SweepSpec,
    cells: Sequence[Cell],
    left: Sequence[Sequence[tuple[int, int]]],
    costs: Sequence[float],
    used: Collection[str],
) -> Iterator[Shard]:
    """New shards: of one variant and one T each, because the lanes of a wave run the same code in lockstep."""
    families: dict[tuple[int, int], list[Run]] = {}
    for i, (cell, ranges) in enumerate(zip(cells, left, strict=True)):
        families.setdefault((cell.variant, cell.T), []).extend(Run(i, a, b) for a, b in ranges)
    engine = [spec.engine.threads, spec.engine.step_edits]
    common = _digest([spec.scoring.model_dump(mode="json"), *engine, spec.grid.rollback])
    for (variant, T), runs in families.items():
        pieces = _by_group(spec, T, runs) if spec.grid.rollback == "group" else _continued(spec, T, runs)
        for piece, lanes in pieces:
            if spec.grid.rollback == "group":
                edits = T * sum(len(run) for run in piece)
            else:
                edits = T * sum(run.stop for run in piece)
            composition = f"{common}:{lanes}:" + ",".join(f"{cells[r.cell].cell_id}/{r.start}-{r.stop}" for r in piece)
            retry = 0
            shard_id = _shard_id(composition, retry)
            while shard_id in used:  # it ran before and some of its groups failed: a fresh try is a fresh shard
                retry += 1
                shard_id = _shard_id(composition, retry)
            yield Shard(
                shard_id=shard_id,
                variant=variant,
                T=T,
                runs=tuple(piece),
                lanes=lanes,
                edits=edits,
                cost=edits * costs[variant],
                retry=retry,
            )


def _by_group(spec: SweepSpec, T: int, runs: Sequence[Run]) -> Iterator[tuple[list[Run], int]]:
    """Cut groups into shards of about ``shard_edits`` edits, of even sizes, with full waves where there is a choice."""
    total = sum(len(run) for run in runs)
    if not total:
        return
    most = max(1, spec.engine.shard_edits // T)
    lanes = min(spec.engine.lanes, most)
    pieces = -(-total // most)
    size = -(-total // pieces)
    if size > lanes:
        size = min(-(-size // lanes) * lanes, max(lanes, most // lanes * lanes))
    piece: list[Run] = []
    room = size
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            piece.append(Run(run.cell, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield piece, min(lanes, size)
                piece, room = [], size
    if piece:
        yield piece, min(lanes, size - room)


def _continued(spec: SweepSpec, T: int, runs: Sequence[Run]) -> Iterator[tuple[list[Run], int]]:
    """Without rollback a cell is one lane; lanes that cover the same groups may share a shard."""
    alike: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.start, run.stop), []).append(run)
    for (_, stop), members in alike.items():
        size = max(1, min(spec.engine.lanes, spec.engine.shard_edits // (stop * T)))
        for i in range(0, len(members), size):
            piece = members[i : i + size]
            yield piece, len(piece)


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
    return tuple(notes)


def _digest(value: JSON) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _shard_id(composition: str, retry: int) -> str:
    return hashlib.sha256(f"{composition}#{retry}".encode()).hexdigest()[:16]


def requests_of(manifest: ShardManifest, dataset: Dataset) -> list[list[EditRequest]]:
    """Per cell of the job, its requests in the order its seed gives, as many as the job edits."""
    order = Task.of(manifest).common.dataset.order
    need = [0] * len(manifest.job.cells)
    for wave in manifest.job.waves:
        for lane in wave:
            need[lane.cell] = max(need[lane.cell], lane.stop_group * manifest.job.T)
    return [
        [dataset.requests[i] for i in order_requests(dataset, order, cell.seed)[:n]]
        for cell, n in zip(manifest.job.cells, need, strict=True)
    ]
