"""A session: one loaded base model and the caches reused between streams. An actor keeps one for
its lifetime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Self

import torch

from workers.artifacts.base import ArtifactData, ArtifactSpec, Workbench
from workers.artifacts.fisher import KIND as FISHER
from workers.artifacts.fisher import build_fisher
from workers.artifacts.pretrain import PRETRAINED, TRAINING, build_pretrained, build_training
from workers.artifacts.stats import KIND as SECOND_MOMENT
from workers.artifacts.stats import NULL_SPACE, build_null_space, build_second_moment
from workers.artifacts.templates import KIND as TEMPLATES
from workers.artifacts.templates import build_templates
from workers.kernels.bundle import Kernels
from workers.kernels.process import fix_numerics, keep_freed_memory
from workers.methods import get_method
from workers.model.base import BaseModel
from workers.model.config import ModelConfig
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.types import JSON, ModelError

BUILDERS: Mapping[str, Callable[[BaseModel, dict[str, JSON], Workbench], ArtifactData]] = MappingProxyType(
    {
        FISHER: build_fisher,
        SECOND_MOMENT: build_second_moment,
        NULL_SPACE: build_null_space,
        TEMPLATES: build_templates,
        TRAINING: build_training,
        PRETRAINED: build_pretrained,
    }
)


class Session:
    """Owns the base model of this process.

    >>> session = Session.open(ModelConfig(name="embedded"))
    >>> data = session.build(spec, Workbench())
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.base_answers = BaseAnswers()
        self.prefixes = Prefixes()

    @classmethod
    def open(cls, config: ModelConfig, threads: int = 1) -> Self:
        """Load the model and choose its kernels.

        Sets what the bits of a result depend on: thread count, no TF32, deterministic kernels.
        """
        torch.set_num_threads(threads)
        fix_numerics()
        keep_freed_memory()
        return cls(with_kernels(BaseModel.load(config)))

    def build(self, spec: ArtifactSpec, bench: Workbench) -> ArtifactData:
        """Compute an artifact from its recipe and the artifacts it needs, which ``bench.inputs``
        holds.

        Raises :class:`ModelError` for a kind without a builder.
        """
        return _build(self.base, spec, bench)


def with_kernels(base: BaseModel) -> BaseModel:
    """Give the model the kernels that are fastest on its device. Returns the same object."""
    base.kernels = Kernels.for_model(base.model, base.config.compile)
    return base


def build_inputs(base: BaseModel, specs: Sequence[ArtifactSpec]) -> dict[str, ArtifactData]:
    """Build the artifacts that a method needs, without a cache. Returns them by the method's
    names."""
    return {spec.name: _build(base, spec, Workbench(build_inputs(base, spec.needs))) for spec in specs}


def _build(base: BaseModel, spec: ArtifactSpec, bench: Workbench) -> ArtifactData:
    builder = BUILDERS.get(spec.kind)
    if builder is None:
        raise ModelError(f"artifact kind {spec.kind!r} is unknown; choices: {', '.join(sorted(BUILDERS))}")
    bench.trainer_of = lambda name: get_method(name).trainer
    data = builder(base, {**spec.where, **spec.recipe}, bench)
    return replace(data, made_as={"kind": spec.kind, "key": spec.key, "recipe": spec.recipe})
