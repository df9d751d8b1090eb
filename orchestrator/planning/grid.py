"""The grid: the cells that a spec asks for, and their ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.planning.inputs import read_training
from orchestrator.planning.memory import CPU_MEMORY_GB, GIB, USABLE, MemoryEstimate, estimate, lane_edits
from orchestrator.planning.spec import MethodSpec, SweepSpec
from orchestrator.planning.work import Cell, Common, Variant
from workers.artifacts.base import ArtifactSpec
from workers.model.config import ModelFingerprint, ModelShape
from workers.types import JSON, EditRequest, SpecError

if TYPE_CHECKING:
    from workers.artifacts.pretrain import TrainingSource


SCHEMA = 1
"""Version of what enters a cell id. Raising it makes every result stale."""


class Grid:
    """Resolves the spec's methods and enumerates cells; collects artifacts, sizes and warnings."""

    def __init__(
        self, spec: SweepSpec, common: Common, fingerprint: ModelFingerprint, shape: ModelShape, tokens: int
    ) -> None:
        self.spec = spec
        self.tokens = tokens
        self.variants: list[Variant] = []
        self.costs: list[float] = []
        self.widths: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], MemoryEstimate] = {}
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
        from workers.methods.base import ArtifactContext

        try:
            kind = get_method(method.method)
            config = load_config(
                method.method,
                method.hparams,
                method.hparams_file,
                self.spec.model,
                method.protocol or self.spec.protocol,
            )
            config.check(shape)
        except SpecError as e:
            raise SpecError(f"methods: {method.label}: {e}") from None
        resolved = config.model_dump(mode="json")
        hparams_id = digest([method.method, kind.version, resolved])[:8]
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
                config.check_edits(shape, edits)
            except SpecError as e:
                raise SpecError(f"methods: {method.label}: grid.T: {T}: {e}") from None
            need = estimate(
                shape,
                config,
                edits=edits,
                batch_size=variant.batch_size(T, self.spec.grid.batch_size),
                score=self.spec.scoring,
                tokens=self.tokens,
                cache_bytes=self.spec.engine.cache_bytes,
                on_gpu=self.spec.on_gpu,
            )
            self.memory[number, T] = need
            self.widths[number, T] = self._lanes(method.label, T, need)
        self._seeds.append(self._distinct_seeds(method.label, uses_seed=config.uses_seed))
        body = {**shared, "method": method.method, "version": kind.version, "config": resolved}
        if kind.needs_pretraining and self.training is None:
            self.training = read_training(self.spec)
        source = self.training[0] if self.training is not None and kind.needs_pretraining else None
        if kind.whole_group:
            body["batch_size"] = None  # it is T, which every cell id has; what the grid says changes nothing
        for seed in self._seeds[number]:
            specs = config.artifacts(ArtifactContext(fingerprint, self.spec.model, seed, source))
            keys = tuple((artifact.name, artifact.key) for artifact in specs)
            self.artifacts.update({key: artifact for (_, key), artifact in zip(keys, specs, strict=True)})
            self.keys[number, seed] = keys
        # Hashed once per set of artifacts: ten thousand seeds of one method share it.
        digests: dict[tuple[tuple[str, str], ...], str] = {}
        for seed in self._seeds[number]:
            keys = self.keys[number, seed]
            if keys not in digests:
                digests[keys] = digest({**body, "artifacts": sorted(keys)})
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

    def _lanes(self, label: str, T: int, need: MemoryEstimate) -> int:
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


def digest(value: JSON) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
