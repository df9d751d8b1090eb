"""A worker's instructions: the common part of a plan, variants, cells and a shard's task.

Actors import this module, never the planner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from orchestrator.planning.spec import DatasetSpec
from orchestrator.results.manifest import ShardManifest
from workers.artifacts.base import ArtifactSpec
from workers.job import Rollback, ScoreConfig
from workers.model.config import ModelConfig
from workers.types import JSON, Frozen


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
    """The part that all shards of one plan share."""

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
    """A shard's instructions beside its job; stands in the manifest as JSON."""

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
