"""LoRA: low-rank adapters trained on the request itself.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685: a product of two
thin matrices is added to a frozen map ``W``, ``W' x = W x + (lora_alpha / rank) B A x``. ``A``
starts at random and ``B`` at zero, so that a new adapter changes nothing. As an editing baseline,
both are trained by Adam on the mean over the target's tokens of ``-log P(target_j | prompt,
target_<j)``, for ``num_steps`` steps, at every layer.

A sequence keeps training the same adapters, and Adam's state is reset at every edit (both as in the
public code). The only random numbers are ``A`` at a lane's first edit and, with ``lora_dropout``,
masks while training.

Differences from paper and public code (EasyEdit), all deliberate:

1. ``A`` is uniform within ``1 / sqrt(in)``, as in the paper's published code and PEFT; the paper's
   text says Gaussian.
2. A batch's loss is the mean of its requests' means; the public code takes the mean over all target
   tokens, so that long targets weigh more, and splits the requests of a call into batches with one
   step each.
3. Dropout is used only in training. The public code never leaves training mode, so its scores are
   random.
4. ``lora_type: adalora``, used by most public files, is rejected. Under that name the public code
   runs neither AdaLoRA (arXiv 2303.10512), since it never calls the rank allocation, nor LoRA: it
   trains a product with a diagonal between its factors, with PEFT's initial rank (12) for every
   value of ``rank``.
5. Only weights get adapters. ``kl_factor`` and ``norm_constraint`` are in every public file, but no
   code reads them; only 0 and false are accepted.

The paper's text was not available: its initialisation of ``A`` in point 1 is from memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from workers.inner_loop.descend import WholeBatch, descend
from workers.inner_loop.finetune import collate_requests, with_target
from workers.inner_loop.optim import Adam
from workers.methods.base import MOST_STEPS, EditOutcome, LaneEdit, Layers, Method, MethodConfig
from workers.methods.easyedit import IGNORED
from workers.methods.families.adapter import (
    AdapterOverlay,
    Dropout,
    adapter_bytes,
    resolve_sites,
    target_paths,
)
from workers.model.architectures import architecture
from workers.model.config import ModelShape
from workers.model.replay import capture, replay
from workers.types import JSON, SpecError


class LoRAConfig(MethodConfig):
    """Hyperparameters of LoRA."""

    layers: Layers = Field((), description="decoder layers that get adapters; none named: all")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="maps inside a layer, by their last name or whole path; null: query and value",
    )
    rank: int = Field(8, ge=1, le=65_536, description="columns of B and rows of A")
    lora_alpha: float = Field(32.0, gt=0, description="the change is scaled by lora_alpha / rank")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an adapter's inputs dropped while training"
    )
    num_steps: int = Field(30, ge=1, le=MOST_STEPS, description="optimiser steps of one edit")
    lr: float = Field(5e-3, gt=0, description="Adam's step size")
    weight_decay: float = Field(0.0, ge=0, description="L2 decay added to the gradient")

    alg_names: ClassVar[tuple[str, ...]] = ("LoRA",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        dict.fromkeys(("kl_factor", "norm_constraint", "lora_type"), IGNORED)
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        if values.get("kl_factor") not in (None, 0) or values.get("norm_constraint"):
            raise SpecError(
                f"{source}: kl_factor, norm_constraint: have no effect in LoRA; expected 0 and false"
            )
        kind = values.get("lora_type", "lora")
        if kind != "lora":
            more = ": what EasyEdit runs under that name is another method, of rank 12 whatever rank says" * (
                kind == "adalora"
            )
            raise SpecError(
                f"{source}: lora_type: {kind!r} is not supported{more}; write lora_type: lora for LoRA of "
                f"the file's rank"
            )
        return super().from_easyedit(values, source)

    @property
    def first_layer(self) -> int:
        return min(self.layers, default=0)

    def check(self, shape: ModelShape) -> None:
        for layer in self.layers:
            shape.check_layer(layer, "layers")
        for path in target_paths(architecture(shape.model_type), self.target_modules):
            shape.site(path)

    @property
    def uses_seed(self) -> bool:
        return True

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        paths = target_paths(architecture(shape.model_type), self.target_modules)
        copies = 4 + 1  # factors, gradients, two moments; temporaries of one step
        return copies * adapter_bytes(shape, paths, len(self.layers) or shape.layers, self.rank)


class LoRA(Method[LoRAConfig, AdapterOverlay]):
    """Low-rank adapters.

    >>> editor = LoRA.prepare(base, LoRAConfig(target_modules=("q_proj", "v_proj")), inputs={})
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 4.0
    Config: ClassVar[type[MethodConfig]] = LoRAConfig

    def new_overlay(self, lanes: int) -> AdapterOverlay:
        config, base = self.config, self.base
        layers = sorted(config.layers) or range(len(base.layers))
        sites = resolve_sites(base, layers, target_paths(base.arch, config.target_modules))
        return AdapterOverlay(sites, lanes, config.rank, config.lora_alpha / config.rank, base.master_dtype)

    def edit(self, overlay: AdapterOverlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        config, base = self.config, self.base
        for lane, edit in enumerate(edits):
            overlay.start(lane, edit.streams)
        batch, targets = collate_requests(base, [edit.requests for edit in edits], with_target)
        prefix = capture(base, batch, overlay.first_layer)
        factors = overlay.factors

        def losses() -> Tensor:
            with overlay.installed(batch):
                return targets.nll(base, replay(base, prefix)[targets.reads])

        if config.lora_dropout:
            overlay.dropout = Dropout(config.lora_dropout, [edit.streams for edit in edits])
        try:
            optimizer = Adam(factors, config.lr, config.weight_decay)
            found = descend(WholeBatch(factors, losses), optimizer, config.num_steps)
        finally:
            overlay.dropout = None
        return [
            EditOutcome(count, loss, {"first_loss": first})
            for count, loss, first in zip(
                found.steps_L.tolist(), found.loss_L.tolist(), found.first_L.tolist(), strict=True
            )
        ]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {"rank": 8, "lora_alpha": 32.0, "lr": 1e-3, "num_steps": 30}
