"""The part of a plan that workers need: variants, cells and shards; conversion of a shard into the
job that an actor runs.

    work = plan.work                          # small: a shard is a few ranges of groups
    manifest = work.manifest(work.shards[0])  # in the actor: everything it needs, as JSON

Actors import this module but not the planner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pydantic import Field

from orchestrator.planning.spec import DatasetSpec
from orchestrator.results.manifest import ShardManifest
from workers.artifacts.base import ArtifactSpec
from workers.job import Lane, Rollback, ScoreConfig, Share, StreamCell, StreamJob
from workers.model.config import ModelConfig
from workers.timeline import cut_steps, expected_rows
from workers.types import JSON, Frozen


class Variant(Frozen):
    """A method with resolved hyperparameters: one entry of the spec's ``methods``."""

    label: str
    algorithm: str
    version: int
    config: dict[str, Any]
    hparams_id: str
    whole_group: bool = Field(
        False, description="one call edits all requests of a group; grid.batch_size is not used"
    )

    own_batch_size: int | None = Field(
        None, description="the variant's own ``batch_size``, where it is not the grid's"
    )

    def batch_size(self, T: int, asked: int) -> int:
        """Number of requests edited in one call at this T. ``asked``: the grid's ``batch_size``."""
        return T if self.whole_group else self.own_batch_size or asked


class Common(Frozen):
    """Settings that all shards of a plan share."""

    sweep: str
    model: ModelConfig
    model_fingerprint: str
    tokenizer_fingerprint: str
    dataset: DatasetSpec
    dataset_name: str
    dataset_fingerprint: str
    joiner_mark: str = Field(
        "",
        description="hash of what joins prompts and answers; empty: one space, in texts written with spaces",
    )
    subject_mark: str = Field(
        "", description="hash of the subjects' places; empty: each is the first and only whole word"
    )
    clock_mark: str = Field(
        "", description="not empty: the chat template asks for the day of the run, which it is not told"
    )
    rollback: Rollback
    batch_size: int = Field(description="grid.batch_size; a variant that edits whole groups uses T instead")
    score: ScoreConfig
    chat_template: bool
    template: dict[str, Any] = Field(default_factory=dict, description="variables of the chat template")
    threads: int
    cache_bytes: int = 0
    step_edits: int
    training_overlap: int | None = Field(
        None,
        description="number of edited requests that networks were also trained on; null: no overlap is "
        "allowed, or no network is trained",
    )


class Task(Frozen):
    """The worker's inputs for a shard besides its job; JSON in the manifest."""

    common: Common
    variant: Variant
    artifacts: tuple[ArtifactSpec, ...] = ()
    edits: int
    expected_rows: int
    retry: int = 0
    gpu_memory_gb: float | None = Field(
        None, description="engine.gpu_memory_gb when the number of lanes was chosen; GPU only"
    )

    @classmethod
    def of(cls, manifest: ShardManifest) -> Task:
        return cls.model_validate(manifest.task)

    def artifact_specs(self) -> dict[str, ArtifactSpec]:
        return {spec.key: spec for spec in self.artifacts}


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid (variant, T, seed). Its groups are 0 .. ``groups`` - 1. ``variant`` is
    an index into the plan's variants."""

    cell_id: str
    variant: int
    T: int
    seed: int
    groups: int
    batch_size: int = 1


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


# --- shards ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupRange:
    """Groups ``start .. stop`` (exclusive) of the cells ``cells``, which share waves. Cells are
    indices into the plan's cells: one cell, or several seeds of one variant and T.

    The lanes may also produce rows for cells of other T, with the seeds in the same order. With
    rollback these are ``riders``: for each smaller T, the cells with groups that start at the same
    requests. Without rollback a range is one wave, and ``also`` holds the groups of the other
    cells.
    """

    cells: tuple[int, ...]
    start: int
    stop: int
    also: tuple[GroupRange, ...] = ()
    riders: tuple[tuple[int, ...], ...] = ()

    @property
    def shares(self) -> tuple[GroupRange, ...]:
        return (self, *self.also)

    @property
    def served(self) -> Iterator[tuple[int, ...]]:
        """For each T, the cells that its lanes produce rows for."""
        yield from (share.cells for share in self.shares)
        yield from self.riders

    def __len__(self) -> int:
        """Number of groups of each cell."""
        return self.stop - self.start

    def continued_by(self, other: GroupRange) -> bool:
        """Return whether ``other`` continues this range."""
        return (
            (self.cells, self.riders, self.stop) == (other.cells, other.riders, other.start)
            and not self.also
            and not other.also
        )


def groups_per_wave(width: int, seeds: int) -> int:
    """Number of groups of each of ``seeds`` cells in one wave of at most ``width`` lanes."""
    return max(1, width // seeds)


def split_chains(runs: Sequence[GroupRange]) -> Iterator[list[GroupRange]]:
    """Split a shard's ranges into chains: consecutive ranges of the same cells. A wave may contain
    groups of several ranges of a chain, but never of two chains."""
    for _, chain in groupby(runs, key=lambda run: run.cells):
        yield list(chain)


def split_waves(runs: Sequence[GroupRange], width: int) -> Iterator[list[tuple[GroupRange, int]]]:
    """Split a shard's ranges into waves of at most ``width`` lanes. A wave is a list of (range,
    group); each stands for one lane per cell of the range."""
    for chain in split_chains(runs):
        groups = [(run, group) for run in chain for group in range(run.start, run.stop)]
        step = groups_per_wave(width, len(chain[0].cells))
        for low in range(0, len(groups), step):
            yield groups[low : low + step]


@dataclass(frozen=True, slots=True)
class Shard:
    """A unit of scheduling. ``runs`` is empty for a shard that has begun: its manifest is in the
    journal.

    ``T``: the largest T of its cells that the spec contains. ``width``: largest number of lanes
    that a wave may have. ``lanes``: number of lanes of its widest wave. ``edits``: edits of all
    lanes. ``cost``: estimated seconds of the whole shard. ``committed``: the fraction of its edits
    that is durable already. ``retry``: how often a shard of the same composition ran before.
    """

    shard_id: str
    variant: int
    T: int
    runs: tuple[GroupRange, ...]
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


@dataclass(frozen=True)
class Work:
    """The shards of a plan, and the data from which their manifests are built."""

    common: Common
    variants: Sequence[Variant]
    cells: Sequence[Cell]
    shards: Sequence[Shard]
    artifacts: Mapping[str, ArtifactSpec]
    cell_artifacts: Mapping[tuple[int, int], tuple[tuple[str, str], ...]]
    """(variant, seed) -> pairs of the method's name for an artifact and the artifact's key."""
    begun: Mapping[str, ShardManifest]
    gpu_memory_gb: float | None = None

    def artifact_keys(self, shard: Shard) -> tuple[str, ...]:
        """Keys of the artifacts that a shard needs, in the order of its cells."""
        if shard.begun:
            return tuple(Task.of(self.begun[shard.shard_id]).artifact_specs())
        seeds = dict.fromkeys(self.cells[i].seed for i in members(shard))
        return tuple(
            dict.fromkeys(key for seed in seeds for _, key in self.cell_artifacts[shard.variant, seed])
        )

    def manifest(self, shard: Shard) -> ShardManifest:
        """Build the manifest of a shard: its ranges of groups become lanes of a
        :class:`~workers.job.StreamJob`."""
        if shard.begun:
            return self.begun[shard.shard_id]
        return _expand(
            self.common,
            self.variants[shard.variant],
            shard,
            self.cells,
            {
                self.cells[i].seed: self.cell_artifacts[shard.variant, self.cells[i].seed]
                for i in members(shard)
            },
            tuple(self.artifacts[key] for key in self.artifact_keys(shard)),
            self.gpu_memory_gb,
        )


def _expand(
    common: Common,
    variant: Variant,
    shard: Shard,
    cells: Sequence[Cell],
    names: Mapping[int, tuple[tuple[str, str], ...]],
    artifacts: tuple[ArtifactSpec, ...],
    gpu_memory_gb: float | None,
) -> ShardManifest:
    """Build the manifest of a new shard; a pure function of its composition. ``names``: seed ->
    names and keys of artifacts."""
    index = {cell: i for i, cell in enumerate(members(shard))}
    if common.rollback == "group":
        waves = tuple(
            tuple(
                Lane(
                    cell=index[cell],
                    group=group,
                    stop_group=group + 1,
                    also=tuple(
                        _rider_share(index, cells, riders[i], group * shard.T) for riders in run.riders
                    ),
                )
                for run, group in wave
                for i, cell in enumerate(run.cells)
            )
            for wave in split_waves(shard.runs, shard.width)
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
    first = cells[next(iter(index))]  # all cells of a shard have the same batch size
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
        template=common.template,
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


def _rider_share(index: Mapping[int, int], cells: Sequence[Cell], cell: int, first: int) -> Share:
    """The group of ``cell`` that starts at request ``first``. ``index``: plan's cell -> number of
    the cell in the job."""
    group = first // cells[cell].T
    return Share(cell=index[cell], group=group, stop_group=group + 1)


def members(shard: Shard) -> tuple[int, ...]:
    """Indices of the cells that a new shard serves, in the order of its ranges."""
    return tuple(dict.fromkeys(cell for run in shard.runs for served in run.served for cell in served))
