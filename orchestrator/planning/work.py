"""The part of a plan that goes to workers: variants, cells, shards, and how a shard becomes the job
that an actor runs.

    work = plan.work                          # small: a shard is a few ranges of groups
    manifest = work.manifest(work.shards[0])  # in the actor: everything it needs, as JSON

Actors import this module, never the planner.
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
    """One method with its settings resolved: what a label of the spec stands for."""

    label: str
    algorithm: str
    version: int
    config: dict[str, Any]
    hparams_id: str
    whole_group: bool = Field(
        False, description="one call edits all requests of a group, whatever the grid says"
    )

    def batch_size(self, T: int, asked: int) -> int:
        """Requests of one call at this T, where the grid asks for ``asked``."""
        return T if self.whole_group else asked


class Common(Frozen):
    """The part that all shards of one plan share."""

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
    rollback: Rollback
    batch_size: int = Field(description="what the grid says; a variant that edits whole groups goes by T")
    score: ScoreConfig
    chat_template: bool
    template: dict[str, Any] = Field(default_factory=dict, description="variables of the chat template")
    threads: int
    cache_bytes: int = 0
    step_edits: int
    training_overlap: int | None = Field(
        None,
        description="edited requests that networks were trained on too; null: none may be, or nothing is "
        "trained",
    )


class Task(Frozen):
    """A shard's instructions beside its job; stands in the manifest as JSON."""

    common: Common
    variant: Variant
    artifacts: tuple[ArtifactSpec, ...] = ()
    edits: int
    expected_rows: int
    retry: int = 0
    gpu_memory_gb: float | None = Field(
        None, description="what the spec declared when lanes were chosen; GPU only"
    )

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
    """Groups ``start .. stop`` (exclusive) of cells that share waves: one, or several seeds of one
    variant and T.

    Its lanes may report to cells of other T as well, seeds in the same order. With rollback to
    ``riders``: per smaller T the cells whose groups start at the same requests. Without it a run is
    one wave, and ``also`` holds the other cells' groups.
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
        """The cells of each T its lanes report to."""
        yield from (share.cells for share in self.shares)
        yield from self.riders

    def __len__(self) -> int:
        """Groups of each of its cells."""
        return self.stop - self.start

    def continued_by(self, other: GroupRange) -> bool:
        """Return whether ``other`` continues this range."""
        return (
            (self.cells, self.riders, self.stop) == (other.cells, other.riders, other.start)
            and not self.also
            and not other.also
        )


def groups_per_wave(width: int, seeds: int) -> int:
    """Return the number of groups of each of ``seeds`` cells in one wave of at most ``width``
    lanes."""
    return max(1, width // seeds)


def split_chains(runs: Sequence[GroupRange]) -> Iterator[list[GroupRange]]:
    """A shard's runs, those together whose waves go on from one to the next."""
    for _, chain in groupby(runs, key=lambda run: run.cells):
        yield list(chain)


def split_waves(runs: Sequence[GroupRange], width: int) -> Iterator[list[tuple[GroupRange, int]]]:
    """The waves of a shard's runs with at most ``width`` lanes: whole groups of all cells, each
    with the run it is of."""
    for chain in split_chains(runs):
        groups = [(run, group) for run in chain for group in range(run.start, run.stop)]
        step = groups_per_wave(width, len(chain[0].cells))
        for low in range(0, len(groups), step):
            yield groups[low : low + step]


@dataclass(frozen=True, slots=True)
class Shard:
    """A unit of scheduling. ``runs`` is empty for one that has begun: its manifest is in the
    journal.

    ``T`` is the largest one it serves of those that the spec asks for. ``width`` is how many lanes
    a wave may have, ``lanes`` how many the widest one has. ``cost``: estimated seconds of the whole
    shard, of which the share ``committed`` is durable already.
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
    """All shards of a plan, and the parts that their manifests are made of."""

    common: Common
    variants: Sequence[Variant]
    cells: Sequence[Cell]
    shards: Sequence[Shard]
    artifacts: Mapping[str, ArtifactSpec]
    cell_artifacts: Mapping[tuple[int, int], tuple[tuple[str, str], ...]]
    """For each variant and seed, what the method calls an artifact and the artifact's key."""
    begun: Mapping[str, ShardManifest]
    gpu_memory_gb: float | None = None

    def artifact_keys(self, shard: Shard) -> tuple[str, ...]:
        """The artifacts a shard needs, in the order its cells need them."""
        if shard.begun:
            return tuple(Task.of(self.begun[shard.shard_id]).artifact_specs())
        seeds = dict.fromkeys(self.cells[i].seed for i in members(shard))
        return tuple(
            dict.fromkeys(key for seed in seeds for _, key in self.cell_artifacts[shard.variant, seed])
        )

    def manifest(self, shard: Shard) -> ShardManifest:
        """Write a shard's ranges out into the job its actor executes."""
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
    """The manifest of a new shard: a pure function of its composition. ``names``: per seed, name
    and key of artifacts."""
    index = {cell: i for i, cell in enumerate(members(shard))}
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


def _ride(index: Mapping[int, int], cells: Sequence[Cell], cell: int, first: int) -> Share:
    """The group of ``cell`` that starts at request ``first``, as part of a job whose cells
    ``index`` numbers."""
    group = first // cells[cell].T
    return Share(cell=index[cell], group=group, stop_group=group + 1)


def members(shard: Shard) -> tuple[int, ...]:
    """Numbers of the cells a new shard serves, in the order of its runs."""
    return tuple(dict.fromkeys(cell for run in shard.runs for served in run.served for cell in served))
