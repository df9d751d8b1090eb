"""DEFER: a scope classifier and a small trained map that replaces one linear map of the base in
scope.

The baseline of that name in Hartvigsen et al., Aging with GRACE, arXiv 2211.11031, which describes
it as a simpler SERAC. A linear map ``W`` gets a gate ``g(q) = sigmoid(a q + b)`` and a map
``P(q) = V q + c``, where ``q`` is the input of ``W`` at one token of the row. A row with ``g(q) >=
threshold`` gets ``P(q)`` at all its tokens; every other row is unchanged. An edit trains ``a, b, V,
c`` together by Adam (reset for each edit) on the mean over the target's tokens of ``-log P(target_j
| prompt, target_<j)``, with the soft output ``g P(q) + (1 - g) W x`` so that the gate gets
gradients. There are no training examples out of scope, so locality is poor at small T, also in the
golden records.

Differences from paper and public code, all deliberate:

1. ``q`` is the input at the last *prompt* token, so that the decision is the same for scoring and
   for generation. The public code takes the last token of its input. In training and in scoring
   this is the last token of the answer, so that the answer leaks into gate and map (``query:
   row``).
2. The parameters are drawn once per lane, at its first edit, from that edit's own generator
   (uniform in +-1/sqrt(in), the initialisation of the public code's linear layers). The public code
   draws from the global generator.
3. A lane without edits computes the base's output; a rollback drops gate and map. The
   public code raises on its rollback (golden README, fault 4).

The paper's text was not available, its description is from memory; numbers are checked against
records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.data.scripts import joiner_of
from workers.inner_loop.descend import WholeBatch, descend
from workers.inner_loop.losses import TargetTokens
from workers.inner_loop.optim import Adam
from workers.inner_loop.suffix import Suffix
from workers.methods.base import MOST_STEPS, EditOutcome, LaneEdit, Method, MethodConfig
from workers.methods.easyedit import take_inner_param
from workers.model.base import Site
from workers.model.batch import Batch, Encoded, collate
from workers.model.config import ModelShape
from workers.model.overlay import LaneState, Overlay, lane_linear
from workers.types import JSON

Query = Literal["prompt", "row"]


class DEFERConfig(MethodConfig):
    """Hyperparameters of DEFER."""

    layer: int = Field(ge=0, description="decoder layer that gets gate and map")
    module: str | None = Field(
        None, description="linear map inside the layer; null: the MLP's output projection"
    )
    lr: float = Field(7e-5, gt=0, description="Adam's step size")
    n_iter: int = Field(100, ge=1, le=MOST_STEPS, description="optimiser steps of one edit")
    threshold: float = Field(
        0.5, ge=0, le=1, description="least gate at which a row is answered by the small map"
    )
    query: Query = Field(
        "prompt",
        description="the token gate and map read: the last of the prompt, or of the whole row (public code)",
    )

    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType({"query": "row"})
    alg_names: ClassVar[tuple[str, ...]] = ("DEFER",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({"edit_lr": "lr", "inner_params": "module"})

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        take_inner_param(out, source)
        return out

    @property
    def first_layer(self) -> int:
        return self.layer

    def check(self, shape: ModelShape) -> None:
        shape.check_layer(self.layer, "layer")
        shape.site(self.module)

    @property
    def uses_seed(self) -> bool:
        return True

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        out, in_features = shape.site(self.module)
        copies = 4 + 2  # parameters, gradient, two moments; temporaries of one step
        return (out * in_features + out + in_features + 1) * max(4, shape.bytes_per_value) * copies


class Deferral(Overlay):
    """Per lane a gate and a map; lanes that were never edited compute the base's output."""

    def __init__(self, site: Site, lanes: int, dtype: torch.dtype, config: DEFERConfig) -> None:
        super().__init__([site], lanes)
        out, in_features = site.shape
        device = site.weight_OI.device
        self.threshold, self.query = config.threshold, config.query
        self.gate_L1I = torch.zeros(lanes, 1, in_features, dtype=dtype, device=device)
        self.gate_bias_L1 = torch.zeros(lanes, 1, dtype=dtype, device=device)
        self.map_LOI = torch.zeros(lanes, out, in_features, dtype=dtype, device=device)
        self.map_bias_LO = torch.zeros(lanes, out, dtype=dtype, device=device)
        self.edited = [False] * lanes

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            "gate": self.gate_L1I,
            "gate_bias": self.gate_bias_L1,
            "map": self.map_LOI,
            "map_bias": self.map_bias_LO,
        }

    def query_of(self, x_BSI: Tensor, batch: Batch) -> Tensor:
        """Input of gate and map for each row, (B, I)."""
        row_B = torch.arange(x_BSI.shape[0], device=x_BSI.device)
        if self.query == "prompt":
            return x_BSI[row_B, batch.prompt_end_B]
        columns_S = torch.arange(x_BSI.shape[1], device=x_BSI.device)
        return x_BSI[row_B, (columns_S * batch.attention_mask_BS).argmax(1)]

    def answer(self, query_BI: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gate, (B,), and the map's output, (B, O), for each row's query."""
        query_B1I = query_BI.to(self.map_LOI.dtype)[:, None]
        gate_B = lane_linear(query_B1I, self.gate_L1I, batch)[:, 0, 0] + self.gate_bias_L1[batch.lane_B, 0]
        value_BO = lane_linear(query_B1I, self.map_LOI, batch)[:, 0] + self.map_bias_LO[batch.lane_B]
        return torch.sigmoid(gate_B), value_BO

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        out_BSO = site.base_output(x_BSI)
        if not any(self.edited[lane] for lane, _, _ in batch.segments):
            return out_BSO
        gate_B, value_BO = self.answer(self.query_of(x_BSI, batch), batch)
        edited_L = torch.tensor(self.edited, device=gate_B.device)
        deferred_B = (gate_B >= self.threshold) & edited_L[batch.lane_B]
        return torch.where(deferred_B[:, None, None], value_BO.to(out_BSO.dtype)[:, None], out_BSO)

    def start(self, lane: int, generator: torch.Generator) -> None:
        """Draw a lane's initial parameters."""
        bound = self.map_LOI.shape[2] ** -0.5
        for tensor in self.parameters.values():
            drawn = torch.rand(
                tensor.shape[1:], generator=generator
            )  # drawn on the CPU: equal on every device
            tensor[lane] = ((2 * drawn - 1) * bound).to(tensor)
        self.edited[lane] = True

    def tensors(self, lane: int) -> dict[str, Tensor]:
        if not self.edited[lane]:
            return {}
        return {name: tensor[lane] for name, tensor in self.parameters.items()}

    def load_state(self, lane: int, state: LaneState) -> None:
        self.edited[lane] = bool(state.tensors)
        for name, tensor in self.parameters.items():
            tensor[lane] = state.tensors[name].to(tensor) if state.tensors else 0

    def delta_norm(self, lane: int) -> float | None:
        return None


class DEFER(Method[DEFERConfig, Deferral]):
    """A gate and a map beside one linear map.

    >>> editor = DEFER.prepare(base, DEFERConfig(layer=4, lr=1e-2), inputs={})
    """

    name: ClassVar[str] = "defer"
    title: ClassVar[str] = "DEFER"
    paper: ClassVar[str] = (
        "Hartvigsen et al., Aging with GRACE, NeurIPS 2023, arXiv 2211.11031 (its baseline Defer)"
    )
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 0.6
    Config: ClassVar[type[MethodConfig]] = DEFERConfig

    def new_overlay(self, lanes: int) -> Deferral:
        site = self.base.site(self.config.layer, self.config.module)
        return Deferral(site, lanes, self.base.master_dtype, self.config)

    def edit(self, overlay: Deferral, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        batch, targets = self._batch(edits)
        suffix = Suffix.capture(self.base, overlay.sites[0], batch, targets.reads)
        for lane, edit in enumerate(edits):
            if not overlay.edited[lane]:
                overlay.start(lane, edit.streams.generator("start"))
        query_BI = overlay.query_of(suffix.input_BSI, batch)
        parameters = list(overlay.parameters.values())

        def losses() -> Tensor:
            gate_B, value_BO = overlay.answer(query_BI, batch)
            gate_B11 = gate_B[:, None, None]
            mixed_BSO = gate_B11 * value_BO[:, None] + (1 - gate_B11) * suffix.output_BSO
            return targets.nll(self.base, suffix.hidden(mixed_BSO.to(suffix.output_BSO.dtype)))

        found = descend(WholeBatch(parameters, losses), Adam(parameters, self.config.lr), self.config.n_iter)
        with torch.no_grad():
            gates = overlay.answer(query_BI, batch)[0].tolist()
        return [
            EditOutcome(count, loss, {"first_loss": first, "gate": gate})
            for count, loss, first, gate in zip(
                found.steps_L.tolist(), found.loss_L.tolist(), found.first_L.tolist(), gates, strict=True
            )
        ]

    def _batch(self, edits: Sequence[LaneEdit]) -> tuple[Batch, TargetTokens]:
        """One row per lane, and the positions of its loss."""
        pairs = []
        for edit in edits:
            (request,) = edit.requests  # one request per edit (batch_edits is False)
            joiner = joiner_of(request, request.prompt)
            pairs.append(self.base.encoder.pair(request.prompt, request.target_new, joiner))
        cut = None if self.config.query == "row" else -1  # the last token predicts nothing that is scored
        encoded = [Encoded(pair.ids[:cut], pair.prompt_len) for pair in pairs]
        batch = collate(encoded, range(len(pairs)), self.base.encoder.pad_id, self.base.device)
        places = [
            (lane, pair.prompt_len - 1 + j, token, 1 / len(pair.target))
            for lane, pair in enumerate(pairs)
            for j, token in enumerate(pair.target)
        ]
        return batch, TargetTokens.of(batch, places, len(pairs))

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {"layer": 4, "lr": 1e-3, "n_iter": 60}
