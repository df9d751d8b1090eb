"""Batches of token sequences, with the data that a forward pass needs about each row.

>>> encoder = Encoder(tokenizer)
>>> batch = collate([encoder.pair("The capital of France is", "Paris")], lanes=[0], pad_id=0)
>>> batch.prompt_end_B          # position of the last prompt token: GRACE's key, where ROME's loss starts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.types import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence: ``ids[:prompt_len]`` is the prompt, the rest the target (possibly empty).

    ``clean``: the prompt's own tokens are a prefix of the joint tokens. Where a tokenizer merges
    across the border, ``prompt_len`` is the number of the prompt's own tokens, as in EasyEdit.
    """

    ids: tuple[int, ...]
    prompt_len: int
    clean: bool = True

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.prompt_len :]


class Encoder:
    """Turns texts into token ids, with or without a chat template. Holds no state beyond the
    tokenizer."""

    def __init__(self, tokenizer: Any, chat_template: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError("chat_template: true, but the model's tokenizer has no chat template")
        probe = tokenizer("a")["input_ids"]
        # calling the backend of a fast tokenizer takes a fifth of the time of the transformers
        # wrapper
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if backend is not None and backend.encode("a").ids == probe else None
        self._tail = 1 if probe and probe[-1] == tokenizer.eos_token_id and len(probe) > 1 else 0
        self._joiner = self._chat_joiner() if chat_template else " "

    @property
    def pad_id(self) -> int:
        """Id of the padding token. Padding is masked everywhere, so any id is fine if the tokenizer
        defines none."""
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        return 0

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of a plain text, with the tokenizer's own beginning-of-sequence token and no end
        token."""
        if self._backend is not None:
            ids = self._backend.encode(text).ids
        else:
            ids = self.tokenizer(text, verbose=False)["input_ids"]  # a long text is cut up later: no warning
        return tuple(ids[: len(ids) - self._tail])

    def prompt(self, prompt: str) -> tuple[int, ...]:
        if not self.chat_template:
            return self.text(prompt)
        return tuple(self.tokenizer(self._chat(prompt), add_special_tokens=False)["input_ids"])

    def pair(self, prompt: str, target: str) -> Encoded:
        """``prompt + " " + target``, tokenised jointly. With a chat template, the white space that
        the template puts before an answer takes the place of the space."""
        prompt_ids = self.prompt(prompt)
        if self.chat_template:
            ids = tuple(
                self.tokenizer(self._chat(prompt) + self._joiner + target, add_special_tokens=False)[
                    "input_ids"
                ]
            )
        else:
            ids = self.text(f"{prompt}{self._joiner}{target}")
        if len(ids) <= len(prompt_ids):
            raise DataError(f"target {target!r} adds no token after prompt {prompt!r}")
        return Encoded(ids, len(prompt_ids), ids[: len(prompt_ids)] == prompt_ids)

    def tokens_until(self, prompt: str, stop: int) -> int:
        """Count the tokens of :meth:`prompt` up to the text's character ``stop`` (that part
        tokenised alone)."""
        if not self.chat_template:
            return len(self.text(prompt[:stop]))
        whole = self._chat(prompt)
        start = whole.rfind(prompt)
        if start < 0:
            raise DataError(
                f"the chat template changes the prompt {prompt!r}, so its tokens cannot be located"
            )
        return len(self.tokenizer(whole[: start + stop], add_special_tokens=False)["input_ids"])

    def _chat(self, prompt: str) -> str:
        return self._render([{"role": "user", "content": prompt}], add_generation_prompt=True)

    def _chat_joiner(self) -> str:
        """The white space that the template writes between the start of the assistant's turn and
        its text."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        asked, answered = self._chat("a"), self._render(messages, add_generation_prompt=False)
        if not answered.startswith(asked):
            return ""
        said = answered[len(asked) :]
        return said[: len(said) - len(said.lstrip())]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=False
                )
            )
        except TemplateError as error:
            raise DataError(
                f"chat_template: true, but the tokenizer's chat template fails: {error}"
            ) from None


@dataclass(frozen=True)
class Batch:
    """A padded batch. Rows of one lane are adjacent, lanes ascending.

    ``prompt_end_B`` is the index of the last prompt token inside the padded row; ``prompt_mask_BS``
    marks the real prompt tokens. ``segments`` lists (lane, first row, one past last row).
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_ids_BS: Tensor
    prompt_mask_BS: Tensor
    prompt_end_B: Tensor
    lane_B: Tensor
    segments: tuple[tuple[int, int, int], ...]
    offsets: tuple[int, ...]
    """Index of each row's first real token (0 with right padding)."""

    @property
    def size(self) -> int:
        return int(self.input_ids_BS.shape[0])

    def even(self, lanes: int) -> bool:
        """Return whether lanes 0..lanes-1 have equally many rows, so that one batched product is
        enough."""
        return len(self.segments) == lanes and all(
            stop - start == self.segments[0][2] for _, start, stop in self.segments
        )

    def part(self, lanes: Sequence[int]) -> tuple[Batch, list[int]]:
        """The rows of some lanes (ascending), renumbered 0, 1, ..., and the rows' indices in this
        batch."""
        spans = {lane: (start, stop) for lane, start, stop in self.segments}
        kept: list[int] = []
        segments: list[tuple[int, int, int]] = []
        for i, lane in enumerate(lanes):
            start, stop = spans[lane]
            segments.append((i, len(kept), len(kept) + stop - start))
            kept += range(start, stop)
        index = torch.tensor(kept, device=self.lane_B.device)
        lane_B = torch.tensor([i for i, a, b in segments for _ in range(a, b)], device=self.lane_B.device)
        return (
            Batch(
                input_ids_BS=self.input_ids_BS[index],
                attention_mask_BS=self.attention_mask_BS[index],
                position_ids_BS=self.position_ids_BS[index],
                prompt_mask_BS=self.prompt_mask_BS[index],
                prompt_end_B=self.prompt_end_B[index],
                lane_B=lane_B,
                segments=tuple(segments),
                offsets=tuple(self.offsets[b] for b in kept),
            ),
            kept,
        )


def collate(
    encoded: Sequence[Encoded],
    lanes: Sequence[int],
    pad_id: int,
    device: torch.device | str = "cpu",
    side: str = "left",
    public_positions: bool = False,
) -> Batch:
    """Pad to the longest. ``lanes`` must ascend. ``side='right'`` and ``public_positions`` exist
    for parity with public code.

    position_ids count real tokens from 0; ``public_positions`` counts columns instead, padding
    included.
    """
    if list(lanes) != sorted(lanes):
        raise ValueError("rows of one lane must stand together, lanes ascending")
    width = max(len(e.ids) for e in encoded)
    ids, mask, prompt, end, offsets = [], [], [], [], []
    for e in encoded:
        n, gap = len(e.ids), width - len(e.ids)
        left, right = (gap, 0) if side == "left" else (0, gap)
        ids.append([pad_id] * left + list(e.ids) + [pad_id] * right)
        mask.append([0] * left + [1] * n + [0] * right)
        prompt.append([0] * left + [1] * e.prompt_len + [0] * (n - e.prompt_len) + [0] * right)
        end.append(left + e.prompt_len - 1)
        offsets.append(left)
    segments: list[tuple[int, int, int]] = []
    for i, lane in enumerate(lanes):
        if segments and segments[-1][0] == lane:
            segments[-1] = (lane, segments[-1][1], i + 1)
        else:
            segments.append((lane, i, i + 1))
    mask_BS = torch.tensor(mask, device=device)
    position_BS = (mask_BS.cumsum(1) - 1).clamp_min(0)
    if public_positions:
        position_BS = torch.arange(width, device=device).expand(len(encoded), width).contiguous()
    return Batch(
        input_ids_BS=torch.tensor(ids, device=device),
        attention_mask_BS=mask_BS,
        position_ids_BS=position_BS,
        prompt_mask_BS=torch.tensor(prompt, dtype=torch.bool, device=device),
        prompt_end_B=torch.tensor(end, device=device),
        lane_B=torch.tensor(list(lanes), device=device),
        segments=tuple(segments),
        offsets=tuple(offsets),
    )
