"""The grid: the cells that a spec asks for, and their ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from orchestrator.planning.hparams_files import warnings_of_files
from orchestrator.planning.inputs import MethodInputs
from orchestrator.planning.memory import CPU_MEMORY_GB, GIB, USABLE, MemoryEstimate, estimate, lane_edits
from orchestrator.planning.spec import MethodSpec, SweepSpec
from orchestrator.planning.work import Cell, Common, Variant
from workers.artifacts.base import ArtifactSpec
from workers.model.config import ModelShape
from workers.types import JSON, SpecError

SCHEMA = 1
"""Version of the content of a cell id. To raise it changes all cell ids, so that every earlier
result must be run again."""


def _unreached_marks(spec: SweepSpec) -> list[str]:
    """A warning if groups end before some of the marks of ``scoring.score_at``."""
    sizes = [T for variant in range(len(spec.methods)) for T in spec.sizes(variant)]
    most, field = (
        (spec.dataset.edits, "dataset.edits") if spec.grid.rollback == "never" else (max(sizes), "grid.T")
    )
    marks = [str(mark) for mark in spec.scoring.score_at if mark > most]
    if not marks:
        return []
    return [
        f"scoring.score_at: {', '.join(marks)} is never reached: no state has more than {most} edits ({field})"
    ]


class Grid:
    """Resolves the spec's methods and enumerates their cells. Also collects artifacts, memory
    estimates, numbers of lanes, and warnings."""

    def __init__(
        self, spec: SweepSpec, common: Common, methods: Sequence[MethodInputs], shape: ModelShape, tokens: int
    ) -> None:
        self.spec = spec
        self.tokens = tokens
        self.variants: list[Variant] = []
        self.costs: list[float] = []
        self.widths: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], MemoryEstimate] = {}
        self.artifacts: dict[str, ArtifactSpec] = {}
        self.keys: dict[tuple[int, int], tuple[tuple[str, str], ...]] = {}
        self.warnings: list[str] = list(spec.remarks)
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
            "rollback": common.rollback,
        }
        # what came later stands in an id only where it changes a number
        later = {"template": common.template, "joiner": common.joiner_mark, "clock": common.clock_mark}
        shared |= {name: value for name, value in later.items() if value}
        self._subjects = {"subject": common.subject_mark} if common.subject_mark else {}
        for method, found in zip(spec.methods, methods, strict=True):
            self._resolve(method, found, shared, shape)
        self.warnings += _unreached_marks(spec)
        self.warnings += warnings_of_files(spec, [found.file for found in methods])
        self._check_batches()

    def _resolve(
        self, method: MethodSpec, found: MethodInputs, shared: Mapping[str, JSON], shape: ModelShape
    ) -> None:
        # Importing the methods imports torch, which is not needed to parse a spec or to read a
        # manifest.
        from workers.methods import get_method

        kind, config = get_method(method.method), found.config
        resolved = config.model_dump(mode="json")
        hparams_id = digest([method.method, kind.version, resolved])[:8]
        number = len(self.variants)
        size, _ = self.spec.batch_size(number)
        for i, other in enumerate(self.variants):
            batches_alike = kind.whole_group or self.spec.batch_size(i)[0] == size
            if (other.algorithm, other.hparams_id) == (method.method, hparams_id) and batches_alike:
                raise SpecError(
                    f"methods: {other.label!r} and {method.label!r} have the same settings; remove one"
                )
        variant = Variant(
            label=method.label,
            algorithm=method.method,
            version=kind.version,
            config=resolved,
            hparams_id=hparams_id,
            whole_group=kind.whole_group,
            own_batch_size=None if size == self.spec.grid.batch_size else size,
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
        seeds = tuple(found.artifacts)
        self._seeds.append(seeds)
        if len(seeds) < len(self.spec.grid.seeds):
            self.warnings.append(
                f"{method.label} draws nothing at random and the order is the file's, so seeds "
                f"{', '.join(map(str, self.spec.grid.seeds))} are the same experiment; it runs once, as "
                f"seed {seeds[0]}"
            )
        body = {
            **shared,
            "batch_size": size,
            "method": method.method,
            "version": kind.version,
            "config": resolved,
        }
        if config.reads_subject:
            body |= self._subjects
        if kind.whole_group:
            body["batch_size"] = None  # it is T, which is in the cell id; the grid's value is not used
        for seed, specs in found.artifacts.items():
            keys = tuple((artifact.name, artifact.key) for artifact in specs)
            self.artifacts.update({key: artifact for (_, key), artifact in zip(keys, specs, strict=True)})
            self.keys[number, seed] = keys
        # One digest per set of artifacts, because thousands of seeds may have the same set.
        digests: dict[tuple[tuple[str, str], ...], str] = {}
        for seed in self._seeds[number]:
            keys = self.keys[number, seed]
            if keys not in digests:
                digests[keys] = digest({**body, "artifacts": sorted(keys)})
            self._digests[number, seed] = digests[keys]

    def _check_batches(self) -> None:
        """Raise :class:`SpecError` if a method of the sweep does not support the batch size. The
        message names all such methods, and the methods that support it."""
        from workers.methods import get_method, method_names

        def able(name: str) -> bool:
            kind = get_method(name)
            return kind.batch_edits or kind.whole_group

        unable: dict[tuple[int, str], list[str]] = {}
        for i, v in enumerate(self.variants):
            if self.spec.batch_size(i)[0] > 1 and not able(v.algorithm):
                label = v.label if v.label == v.algorithm else f"{v.label} ({v.algorithm})"
                unable.setdefault(self.spec.batch_size(i), []).append(label)
        for (size, name), labels in unable.items():
            raise SpecError(
                f"{name}: {size}, but {', '.join(labels)} can edit only one request at a time; set it to 1, "
                f"give each variant its own `batch_size`, or keep to methods that "
                f"edit several in one call: {', '.join(filter(able, method_names()))}"
            )

    def _lanes(self, label: str, T: int, need: MemoryEstimate) -> int:
        """The spec's number of lanes; for ``auto`` as many as fit into the declared memory."""
        engine = self.spec.engine
        if engine.lanes != "auto":
            return engine.lanes
        if engine.gpu_memory_gb is not None and self.spec.on_gpu:
            field_name, declared = (
                "engine.gpu_memory_gb",
                engine.gpu_memory_gb * min(engine.resources.gpu or 1.0, 1.0),
            )
        else:
            weights = 2 * need.weights / GIB
            field_name = "engine.resources.memory_gb"
            declared = engine.resources.memory_gb or max(CPU_MEMORY_GB, weights)
        lanes = need.lanes_within(USABLE * declared * GIB)
        if not lanes:
            raise SpecError(
                f"{field_name}: an actor has {declared:g} GiB, but {label} at T={T} needs about "
                f"{need.peak(1) / GIB:.1f} GiB "
                f"for one lane ({need.weights / GIB:.1f} of weights, {need.overlay / GIB:.1f} of overlay, "
                f"{need.shared / GIB:.1f} that lanes share, the rest activations) "
                f"and {1 - USABLE:.0%} are kept free; declare more, use a smaller dtype, or set "
                f"engine.lanes: 1 to try"
            )
        return lanes

    def cells(self) -> list[Cell]:
        n = self.spec.dataset.edits
        return [
            Cell(
                cell_id=hashlib.sha256(f"{self._digests[v, seed]}:T={T}:seed={seed}".encode()).hexdigest()[
                    :16
                ],
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
