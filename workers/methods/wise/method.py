"""WISE: a side memory of one linear map, trained on the edits and selected by activation routing.

Wang et al., WISE: Rethinking the Knowledge Memory for Lifelong Model Editing, arXiv 2405.14768. The
side memory is a copy ``W'`` of an MLP output projection ``W``; here its change ``D = W' - W`` is
stored and trained. Section 2.3:

- routing (Eq. 4-5): ``act(x) = |A(x) D|_2``, where ``A(x)`` is the map's input, averaged over the
  tokens of the row's prompt; the row uses the side memory if ``act(x)`` reaches the threshold, else
  ``W``. The threshold is the smallest ``act`` of the memory's own edits (times ``act_ratio``);
- loss (Eq. 5-6): ``-log P(target | prompt)`` averaged over the target's tokens and over context
  templates, plus the margin ``max(0, act(x_i) - alpha) + max(0, beta - act(x_e)) + max(0, gamma -
  (act(x_e) - act(x_i)))`` averaged over the rows ``x_e`` of an edit, with ``x_i`` the request's
  unrelated sentence. Batches: the mean over the requests;
- sharding: the gradient is masked by a random mask (share ``mask_ratio``) drawn once per side
  memory; SGD; each weight stays within ``norm_constraint`` of ``W``. A lane stops once its loss is
  below 0.02 and changed by less than 1e-4.

**When memories are saved and merged**: at the end of the edit that completes ``save_freq`` edits in
the current side memory, it is saved and a new one begins (``D = 0``, new mask); once there are
``merge_freq / save_freq`` saved memories, they are merged at the end of the same edit. A forward
pass never saves or merges. With ``retrieve: true`` (WISE-Retrieve) each merge adds one memory. With
``retrieve: false`` (WISE-Merge) there is one merged memory: later merges include it with weight
0.6, and the new ones share 0.4, as in the public code. Until they are merged, saved memories and
the current side memory all take part in routing, so that every edit has an effect.

**Which memory a row uses**: of the memories whose threshold the row's activation reaches, the one
with the largest activation; ``W`` if there is none. WISE-Retrieve has a threshold per memory,
WISE-Merge a single one: the smallest activation of all edits.

Differences from paper and public code, all deliberate. ``protocol: easyedit`` turns on all
switches, ``deviations`` single ones:

1. Routing and margin use the prompt's real tokens. The public code averages over prompt, target and
   padding (golden README, fault 11), so that teacher forcing leaks the answer into the routing:
   ``routing: all_tokens``.
2. ``act`` is the norm of ``A(x) D``. The public code passes both outputs of the map through the
   MLP's activation function first, ``|s(A(x) W') - s(A(x) W)|``: ``activation: public``. The
   published margins were used with that form.
3. The margin is averaged over all rows of an edit; the public code averages each term over the rows
   that violate it, which gives the last violating rows more weight: ``public_margin``.
4. The target loss is divided by the number of target tokens; the public code's mask starts one
   token early, so it divides by one more (fault 6): ``public_loss_mask``.
5. Weight decay acts only inside the mask, so that a memory changes only its own shard. The public
   optimiser decays every weight, and TIES then averages an edit with the decay of another memory:
   ``public_decay``.
6. Every sequence has true position ids; the public code counts padding columns:
   ``public_positions``.
7. Dropping at random in ``dare_linear`` rescales by ``1 / density``, as in DARE (arXiv 2311.03099);
   the public code does not: ``public_dare``. ``linear`` and ``slerp`` merge all saved memories; the
   public code reads only the first.
8. The threshold is measured on the final weights of an edit; the public code measures before the
   last step. There, the current side memory also blocks saved ones when it fails its own threshold.
9. Scoring never saves or merges (fault 6), there is no module-level state (fault 5), batches of
   edits are supported (the public code treats a batch as one request), and edits are counted by
   request.
10. Not implemented: ``replay`` (appendix B.3), the public code's subject masks (used there when the
    unrelated sentence is part of the prompt) and its top-token routing beyond 100 tokens.

The paper's text was not available: numbers of equations and algorithms are from memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from workers.data.needs import UNRELATED
from workers.data.scripts import joiner_of
from workers.inner_loop.descend import DivisibleProblem, descend
from workers.inner_loop.losses import TargetTokens
from workers.inner_loop.suffix import Suffix
from workers.methods.base import EditOutcome, LaneEdit, Method, MethodConfig, as_float
from workers.methods.wise.config import WISEConfig
from workers.methods.wise.memories import SideMemories
from workers.methods.wise.optim import MaskedSGD
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch, Encoded, collate
from workers.types import JSON, EditRequest

STOP_LOSS, STOP_CHANGE = 0.02, 1e-4
"""Early stopping, as in the public code."""


class WISE(Method[WISEConfig, SideMemories]):
    """Side memories with activation routing.

    >>> editor = WISE.prepare(base, WISEConfig(layer=4, retrieve=False), inputs={"templates": templates})
    """

    name: ClassVar[str] = "wise"
    title: ClassVar[str] = "WISE"
    paper: ClassVar[str] = "Wang et al., WISE, NeurIPS 2024, arXiv 2405.14768"
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 2.2
    Config: ClassVar[type[MethodConfig]] = WISEConfig

    @property
    def site(self) -> Site:
        """The map that gets the side memory."""
        return self.base.site(self.config.layer, self.config.module)

    def new_overlay(self, lanes: int) -> SideMemories:
        return SideMemories(self.base, self.site, lanes, self.config)

    def edit(self, overlay: SideMemories, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        config = self.config
        in_one_pass = MaskedSGD.in_one_pass(config, self.base.compiled)
        with ThreadPoolExecutor(self._threads) as pool:
            # a mask of a 7B model takes 0.3 s: masks of all lanes are drawn in parallel, while the
            # batch is prepared
            drawn = [pool.submit(self._begin, overlay, lane, edit) for lane, edit in enumerate(edits)]
            problem = _Problem.of(
                self.base, overlay, edits, [self._templates(edit) for edit in edits], in_one_pass
            )
            for mask in drawn:
                mask.result()
        mask_LOI = torch.stack([mask for mask in overlay.masks_OI if mask is not None])
        optimizer = MaskedSGD(
            config, self.site.weight_OI, mask_LOI, problem, self.base.compiled if in_one_pass else None
        )
        found = descend(problem, optimizer, config.n_iter, pool=self.base.pool)
        with torch.no_grad():
            activations = problem.activations()
        outcomes = []
        for lane, (edit, count) in enumerate(zip(edits, found.steps_L.tolist(), strict=True)):
            overlay.finish(lane, activations[lane], edit.streams.generator("merge"))
            details: dict[str, JSON] = {
                "activation": min(activations[lane]),
                "memories": len(overlay.saved[lane]),
            }
            outcomes.append(EditOutcome(count, as_float(found.loss_L[lane]), details))
        return outcomes

    @property
    def _threads(self) -> int:
        """Number of masks that are drawn in parallel; with a GPU the CPU is idle."""
        return (os.cpu_count() or 1) if self.base.device.type == "cuda" else 1

    def _begin(self, overlay: SideMemories, lane: int, edit: LaneEdit) -> None:
        """Give a lane's side memory its mask if it is new."""
        if not overlay.edits[lane]:
            overlay.begin(lane, self.draw_mask(edit))

    def draw_mask(self, edit: LaneEdit) -> Tensor:
        """Uniform numbers that determine a new side memory's mask, (O, I)."""
        return torch.rand(self.site.shape, generator=edit.streams.generator("mask"))

    def _templates(self, edit: LaneEdit) -> list[str]:
        data = edit.inputs.get("templates") or self.inputs["templates"]
        return [str(text) for text in data.meta["templates"]]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            "layer": 4,
            "lr": 0.1,
            "n_iter": 20,
            # this map is small: at 0.2 the edits of one memory overwrite each other
            "mask_ratio": 0.5,
            "alpha": 4.0,
            "beta": 8.0,
            "gamma": 3.0,
            "act_ratio": 0.7,
            "save_freq": 25,
            "merge_freq": 50,
            "context_template_length_params": [[5, 5]],
        }


@dataclass(frozen=True)
class _Tokens:
    """The N tokens of a batch without padding, rows ascending. With templates of several lengths,
    about a third of a batch is padding."""

    input_NI: Tensor
    output_NO: Tensor
    """Input and output of the map."""
    ends: tuple[int, ...]
    """Per lane, the index after its last token."""
    averaged_BS: Tensor
    """The positions whose activations are averaged."""
    place_N: Tensor
    """Each token's index in the flattened batch."""
    row_N: Tensor
    share_N: Tensor
    """Each token's weight in its row's mean."""

    @classmethod
    def of(cls, suffix: Suffix, averaged_BS: Tensor) -> Self:
        batch = suffix.batch
        used_BS = averaged_BS | batch.attention_mask_BS.bool()
        place_N = torch.nonzero(used_BS.flatten())[:, 0]
        row_N = place_N // used_BS.shape[1]
        count_B = used_BS.sum(1).cumsum(0).tolist()
        share_BS = averaged_BS / averaged_BS.sum(1, keepdim=True).clamp_min(1)
        return cls(
            suffix.input_BSI.flatten(0, 1)[place_N],
            suffix.output_BSO.flatten(0, 1)[place_N],
            tuple(count_B[stop - 1] for _, _, stop in batch.segments),
            averaged_BS,
            place_N,
            row_N,
            share_BS.flatten()[place_N],
        )

    def spread(self, value_NO: Tensor) -> Tensor:
        """The values at their positions of the batch, (B, S, O); zero in the padding."""
        flat = value_NO.new_zeros(self.averaged_BS.numel(), value_NO.shape[1])
        return flat.index_copy(0, self.place_N, value_NO).view(*self.averaged_BS.shape, -1)

    def mean(self, value_N: Tensor) -> Tensor:
        """Mean over each row's averaged tokens, (B,)."""
        weighted_N = value_N * self.share_N.to(value_N.dtype)
        return value_N.new_zeros(len(self.averaged_BS)).index_add(0, self.row_N, weighted_N)


@dataclass(frozen=True)
class _Problem(DivisibleProblem):
    """The lanes of one batch. Per request, its rows are the prompt in every context template, then
    the unrelated sentence."""

    base: BaseModel
    delta_KOI: Tensor
    working_KOI: Tensor | None
    """A copy of the changes in the base's precision, if the forward uses it."""
    overlay: SideMemories
    suffix: Suffix
    targets: TargetTokens
    tokens: _Tokens
    row_E: Tensor
    """Each edit row's index in the batch."""
    owner_E: Tensor
    """Each edit row's request."""
    unrelated_G: Tensor
    """Each request's row with the unrelated sentence."""
    lane_G: Tensor
    share_G: Tensor
    """Each request's weight: one over the number of its lane's requests."""
    sizes: tuple[int, ...]
    """Requests of each lane."""

    @classmethod
    def of(
        cls,
        base: BaseModel,
        overlay: SideMemories,
        edits: Sequence[LaneEdit],
        templates: Sequence[Sequence[str]],
        in_one_pass: bool,
    ) -> Self:
        """``in_one_pass``: the optimiser updates working copies."""
        config, device = overlay.config, base.device
        encoded: list[Encoded] = []
        lanes: list[int] = []
        owner_E: list[int] = []
        row_E: list[int] = []
        unrelated_G: list[int] = []
        lane_G: list[int] = []
        places: list[tuple[int, int, int, float]] = []
        for lane, edit in enumerate(edits):
            for request in edit.requests:
                joiner = joiner_of(request, request.prompt)
                pairs = [
                    base.encoder.pair(t.replace("{}", request.prompt), request.target_new, joiner)
                    for t in templates[lane]
                ]
                for pair in pairs:
                    count = len(pair.target)
                    share = 1 / (
                        (count + int(config.deviations.public_loss_mask)) * len(pairs) * len(edit.requests)
                    )
                    places += [
                        (len(encoded), pair.prompt_len - 1 + j, t, share) for j, t in enumerate(pair.target)
                    ]
                    row_E.append(len(encoded))
                    owner_E.append(len(lane_G))
                    # the last token predicts nothing that is scored; only public routing reads it
                    encoded.append(
                        pair if config.routing == "all_tokens" else Encoded(pair.ids[:-1], pair.prompt_len)
                    )
                unrelated_G.append(len(encoded))
                encoded.append(_unrelated(base, request))
                lane_G.append(lane)
                lanes += [lane] * (len(pairs) + 1)
        batch = collate(encoded, lanes, base.encoder.pad_id, device)
        token_BS = batch.prompt_mask_BS
        if config.deviations.public_positions or config.routing == "all_tokens":
            column_BS = _own_columns(encoded, batch)
            if config.deviations.public_positions:
                batch = replace(batch, position_ids_BS=column_BS.clamp_min(0))
            if config.routing == "all_tokens":
                token_BS = column_BS >= 0
        targets = TargetTokens.of(batch, places, len(edits))
        sizes = tuple(len(edit.requests) for edit in edits)
        share_G = torch.tensor([1 / sizes[lane] for lane in lane_G], dtype=base.master_dtype, device=device)
        suffix = Suffix.capture(base, overlay.sites[0], batch, targets.reads)
        delta_LOI = overlay.delta_LOI
        return cls(
            base,
            delta_LOI,
            delta_LOI.to(base.dtype) if in_one_pass and base.dtype != delta_LOI.dtype else None,
            overlay,
            suffix,
            targets,
            _Tokens.of(suffix, token_BS),
            torch.tensor(row_E, device=device),
            torch.tensor(owner_E, device=device),
            torch.tensor(unrelated_G, device=device),
            torch.tensor(lane_G, device=device),
            share_G,
            sizes,
        )

    @property
    def params(self) -> list[Tensor]:
        return [self.delta_KOI]

    @property
    def working(self) -> list[Tensor]:
        return [] if self.working_KOI is None else [self.working_KOI]

    def losses(self) -> tuple[Tensor, Tensor]:
        """Target loss and margin of each lane, and where they are finite, (K,) each."""
        tokens, suffix = self.tokens, self.suffix
        delta_KOI = self.delta_KOI if self.working_KOI is None else self.working_KOI
        change_NO = self.overlay.change(delta_KOI, tokens.input_NI, tokens.ends)
        nll_K = self.targets.nll(self.base, suffix.hidden(suffix.output_BSO + tokens.spread(change_NO)))
        loss_K = nll_K + self._margin(self._activation(change_NO))
        return loss_K, torch.isfinite(loss_K)

    def unfinished(self, now_K: Tensor, before_K: Tensor) -> Tensor:
        return ~(((now_K - before_K).abs() <= STOP_CHANGE) & (now_K <= STOP_LOSS))

    def _activation(self, change_NO: Tensor) -> Tensor:
        """Each row's routing activation, (B,)."""
        return self.tokens.mean(self.overlay.strength(self.tokens.output_NO, change_NO))

    def _margin(self, activation_B: Tensor) -> Tensor:
        """The margin loss of each lane, (K,): the mean over its requests."""
        config = self.overlay.config
        outside_G = activation_B[self.unrelated_G]
        inside_E = activation_B[self.row_E]
        loss_G = (
            (outside_G - config.alpha).relu()
            + self._mean(config.beta - inside_E)
            + self._mean(config.gamma - (inside_E - outside_G[self.owner_E]))
        )
        return loss_G.new_zeros(len(self.sizes)).index_add(0, self.lane_G, loss_G * self.share_G)

    def _mean(self, excess_E: Tensor) -> Tensor:
        """Mean hinge over each request's rows, (G,)."""
        public = self.overlay.config.deviations.public_margin
        counted_E = (excess_E > 0 if public else torch.ones_like(excess_E)).to(excess_E.dtype)
        return self._sum(excess_E.relu()) / self._sum(counted_E).clamp_min(1)

    def _sum(self, value_E: Tensor) -> Tensor:
        return value_E.new_zeros(len(self.lane_G)).index_add(0, self.owner_E, value_E)

    def activations(self) -> list[list[float]]:
        """Per lane, for each request the mean activation of its rows."""
        change_NO = self.overlay.change(self.delta_KOI, self.tokens.input_NI, self.tokens.ends)
        activation_E = self._activation(change_NO)[self.row_E]
        mean_G = (self._sum(activation_E) / self._sum(torch.ones_like(activation_E))).tolist()
        at, out = 0, []
        for size in self.sizes:
            out.append(mean_G[at : at + size])
            at += size
        return out

    def part(self, kept: Sequence[int]) -> Self:
        lanes = list(kept)
        batch, row_B = self.suffix.batch.part(lanes)
        targets, read_P = self.targets.part(lanes, row_B)
        device = self.row_E.device
        index_B = torch.tensor(row_B, device=device)
        place_B = torch.zeros(self.suffix.batch.size, dtype=torch.long, device=device)
        place_B[index_B] = torch.arange(len(row_B), device=device)
        lane_L = torch.full((len(self.sizes),), -1, dtype=torch.long, device=device)
        lane_L[lanes] = torch.arange(len(lanes), device=device)
        keep_G = torch.nonzero(lane_L[self.lane_G] >= 0)[:, 0]
        request_G = torch.full((len(self.lane_G),), -1, dtype=torch.long, device=device)
        request_G[keep_G] = torch.arange(len(keep_G), device=device)
        keep_E = torch.nonzero(request_G[self.owner_E] >= 0)[:, 0]
        suffix = self.suffix.part(row_B, batch, read_P)
        return type(self)(
            self.base,
            self.delta_KOI[lanes],
            None if self.working_KOI is None else self.working_KOI[lanes],
            self.overlay,
            suffix,
            targets,
            _Tokens.of(suffix, self.tokens.averaged_BS[index_B]),
            place_B[self.row_E[keep_E]],
            request_G[self.owner_E[keep_E]],
            place_B[self.unrelated_G[keep_G]],
            lane_L[self.lane_G[keep_G]],
            self.share_G[keep_G],
            tuple(self.sizes[lane] for lane in lanes),
        )


def _own_columns(encoded: Sequence[Encoded], batch: Batch) -> Tensor:
    """Column indices as in a batch of the lane alone, (B, S): negative in padding that only other
    lanes need."""
    total = batch.input_ids_BS.shape[1]
    widths = [max(len(e.ids) for e in encoded[a:b]) for _, a, b in batch.segments for _ in range(a, b)]
    gap_B = total - torch.tensor(widths, device=batch.lane_B.device)
    return torch.arange(total, device=batch.lane_B.device)[None] - gap_B[:, None]


def _unrelated(base: BaseModel, request: EditRequest) -> Encoded:
    UNRELATED.check(request)
    assert request.unrelated is not None
    ids = base.encoder.prompt(request.unrelated)  # with the chat template, if the prompts have it
    return Encoded(ids, len(ids))
