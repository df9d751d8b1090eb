"""ICL: the new facts are put before every prompt. No weight changes, no training.

After Zheng et al., Can We Edit Factual Knowledge by In-Context Learning?, arXiv 2305.12740 (IKE).
In a lane with the facts ``f_1 ... f_T`` (each ``prompt + " " + target_new``), the model reads a row
with the prompt ``prompt`` as

    New Fact: f_1
    ...
    New Fact: f_T
    Prompt: <prompt>

and the target is scored or generated after that. With T = 1 this is IKE without demonstrations.

In the evaluation protocol, all facts since the last rollback are put before *every* prompt of the
lane, also before locality prompts (the method does not know whether a fact concerns a prompt).
Locality therefore measures how much unrelated facts disturb the model. The facts and the prompt
must fit into the model's context: ``plan`` rejects T (or, with ``rollback: never``, N) that cannot
fit, and an edit or a probe that is too long raises :class:`DataError` with the context length. Text
is never truncated.

Differences from paper and public code, all deliberate:

1. Zero-shot: no demonstrations (``k: 0``). IKE retrieves 16 to 32 solved examples of three kinds
   (copy, update, retain) from a training set by sentence embeddings; the public code also runs
   without them if ``use_icl_examples`` is off.
2. Several facts in one context. The paper edits one fact at a time.
3. The public code scores each edit with only its own fact in the context, for any number of edits,
   so that its sequential results are those of T = 1. Here all facts stay in the context until the
   rollback.
4. A second edit of the same prompt does not remove the first: the context has both facts, the later
   one last.

The paper's text was not available: the wording of facts and prompt is that of the public code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.data.scripts import joiner_of, statement
from workers.methods.base import EditOutcome, LaneEdit, Method, MethodConfig
from workers.methods.easyedit import IGNORED
from workers.model.base import BaseModel
from workers.model.batch import Batch, Encoded, collate
from workers.model.config import ModelShape, context_length
from workers.model.overlay import LaneState, SitelessOverlay
from workers.types import JSON, DataError, EditRequest, SpecError

_FACT = "New Fact: {}\n"
_PROMPT = "Prompt: "

FEWEST_TOKENS = 8
"""Least tokens of a fact ("New Fact:", a subject, a relation, an object, a new line), used by
``plan``."""

_TOKENS_AT_ONCE = 2**14
"""Maximum padded tokens of one forward (or one row): contexts make rows much longer than the
scoring batches were planned for."""


class ICLConfig(MethodConfig):
    """Hyperparameters of in-context editing."""

    k: Literal[0] = Field(0, description="demonstrations before the facts; only 0 (zero-shot) is implemented")

    alg_names: ClassVar[tuple[str, ...]] = ("IKE",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"sentence_model_name": IGNORED, "use_icl_examples": IGNORED}
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        if values.get("use_icl_examples") is not False and values.get("k", 0) != 0:
            raise SpecError(
                f"{source}: k: {values['k']!r} demonstrations are not supported; expected 0, or "
                f"use_icl_examples: false"
            )
        return super().from_easyedit({name: v for name, v in values.items() if name != "k"}, source)

    def check_edits(self, shape: ModelShape, edits: int) -> None:
        if shape.context is not None and edits * FEWEST_TOKENS > shape.context:
            raise SpecError(
                f"{edits} facts before every prompt do not fit into the model's context length of "
                f"{shape.context} tokens "
                f"(a fact takes {FEWEST_TOKENS} or more); at most {shape.context // FEWEST_TOKENS}, with "
                f"rollback: group"
            )

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        context = shape.context or edits * 4 * FEWEST_TOKENS
        return context * shape.hidden * max(4, shape.bytes_per_value)  # one row with its context, in scoring


class Facts(SitelessOverlay):
    """The current facts of each lane, in the order of the edits, and the tokens of their text."""

    def __init__(self, base: BaseModel, lanes: int) -> None:
        super().__init__(lanes)
        self.facts: list[tuple[str, ...]] = [()] * lanes
        self.tokens: list[Tensor] = [torch.zeros(0, dtype=torch.int32)] * lanes
        self._context = context_length(base.model.config)

    @property
    def replays(self) -> bool:
        return False  # the input tokens change

    def before(self, lane: int) -> str:
        """The text before every prompt of a lane."""
        return "".join(_FACT.format(fact) for fact in self.facts[lane]) + _PROMPT if self.facts[lane] else ""

    def add(self, base: BaseModel, lane: int, requests: Sequence[EditRequest]) -> None:
        """Add facts to a lane. Raises :class:`DataError` if they do not fit into the context."""
        self.facts[lane] += tuple(statement(r) for r in requests)
        ids = base.encoder.text(self.before(lane))
        self.tokens[lane] = torch.tensor(ids, dtype=torch.int32)
        for request in requests:
            joiner = joiner_of(request, request.prompt)
            pair = base.encoder.pair(request.prompt, request.target_new, joiner)
            self._check(len(ids) + len(pair.ids), lane, f"request {request.case_id}")

    def _check(self, length: int, lane: int, what: str) -> None:
        if self._context is not None and length > self._context:
            raise DataError(
                f"icl: {what}: {len(self.facts[lane])} facts and the prompt are {length} tokens, "
                f"but the model's context length is {self._context}; choose a smaller T"
            )

    def hidden_states(self, base: BaseModel, batch: Batch) -> Tensor:
        asked = {lane for lane, _, _ in batch.segments}
        if not any(self.facts[lane] for lane in asked):
            return base.hidden_states(batch)
        width = batch.input_ids_BS.shape[1]
        encoded = self._with_facts(base, batch)
        lane_B = batch.lane_B.tolist()
        parts: list[Tensor] = []
        start = 0
        while start < len(encoded):
            stop, longest = start, 0
            while stop < len(encoded):
                longest = max(longest, len(encoded[stop].ids))
                if stop > start and (stop - start + 1) * longest > _TOKENS_AT_ONCE:
                    break
                stop += 1
            part = collate(encoded[start:stop], lane_B[start:stop], base.encoder.pad_id, base.device)
            hidden_RSD = base.hidden_states(part)[:, -width:]
            short = width - hidden_RSD.shape[1]  # a part without facts may be narrower
            parts.append(torch.nn.functional.pad(hidden_RSD, (0, 0, short, 0)) if short > 0 else hidden_RSD)
            start = stop
        return torch.cat(parts)

    def _with_facts(self, base: BaseModel, batch: Batch) -> list[Encoded]:
        """Each row with its lane's facts before the prompt. Columns after the prompt are aligned at
        the right."""
        encoded = []
        for ids, real, end, lane in zip(
            batch.input_ids_BS.tolist(),
            batch.attention_mask_BS.bool().tolist(),
            batch.prompt_end_B.tolist(),
            batch.lane_B.tolist(),
            strict=True,
        ):
            prompt = tuple(t for t, r in zip(ids[: end + 1], real[: end + 1], strict=True) if r)
            rest = tuple(t for t, r in zip(ids[end + 1 :], real[end + 1 :], strict=True) if r)
            if self.facts[lane]:
                text = base.tokenizer.decode(
                    prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                prompt = base.encoder.text(self.before(lane) + text)
                self._check(len(prompt) + len(rest), lane, f"the probe {text!r}")
            encoded.append(Encoded((*prompt, *rest), len(prompt)))
        return encoded

    def tensors(self, lane: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[lane]} if self.facts[lane] else {}

    def meta(self, lane: int) -> dict[str, JSON]:
        return {"facts": list(self.facts[lane])} if self.facts[lane] else {}

    def load_state(self, lane: int, state: LaneState) -> None:
        self.facts[lane] = tuple(state.meta.get("facts", ()))
        self.tokens[lane] = state.tensors.get("tokens", torch.zeros(0, dtype=torch.int32)).clone()


class ICL(Method[ICLConfig, Facts]):
    """In-context editing.

    >>> editor = ICL.prepare(base, ICLConfig(), inputs={})
    """

    name: ClassVar[str] = "icl"
    title: ClassVar[str] = "ICL"
    paper: ClassVar[str] = (
        "Zheng et al., Can We Edit Factual Knowledge by In-Context Learning?, EMNLP 2023, arXiv 2305.12740"
    )
    version: ClassVar[int] = 1
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.1
    Config: ClassVar[type[MethodConfig]] = ICLConfig

    def new_overlay(self, lanes: int) -> Facts:
        if self.base.encoder.chat_template:
            raise SpecError(
                "icl: model.chat_template: true is not supported (facts would stand before the first turn)"
            )
        return Facts(self.base, lanes)

    def edit(self, overlay: Facts, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        for lane, edit in enumerate(edits):
            overlay.add(self.base, lane, edit.requests)
        return [EditOutcome(0, None, {"context_tokens": len(tokens)}) for tokens in overlay.tokens]
