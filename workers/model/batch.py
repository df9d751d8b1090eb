"""Batches of token sequences, with the data that a forward pass needs about each row.

>>> encoder = Encoder(tokenizer)
>>> batch = collate([encoder.pair("The capital of France is", "Paris")], lanes=[0], pad_id=0)
>>> batch.prompt_end_B          # position of the last prompt token: GRACE's key, where ROME's loss starts
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

from workers.model.chat import Chat, Renderer, chat, parse_day, renderer
from workers.types import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence: ``ids[:prompt_len]`` is the prompt, the rest the target (possibly empty).

    ``clean`` says that the prompt's own tokens are a prefix of the joint ones. Where they are not,
    the border was found by the characters that each token stands for.
    """

    ids: tuple[int, ...]
    prompt_len: int
    clean: bool = True

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.prompt_len :]


_ANCHORS = ("\n", "a", ".", "1", "|", "。")
"""Texts after which a continuation is tokenised where the prompt's last token would swallow it."""

DAY = "date"
"""The variable of a template that gives its ``strftime_now`` a day."""

_DAYS = (date(1999, 1, 2), date(2030, 12, 31))
"""Two days that differ in everything that a template may write of one."""

_CHATS_KEPT = 4096

_ASKED, _SAID = "kwqz", "zqxj"
"""Words that stand for a question and an answer in a chat: no template holds them."""


def _appended(tokenizer: Any, probe: Sequence[int]) -> int:
    """Count the tokens that a tokenizer adds after a text, whatever they are. ``probe``: its ids of
    "a"."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = [i for i in range(len(probe) - len(bare) + 1) if list(probe[i : i + len(bare)]) == list(bare)]
    if not bare or not starts:
        raise DataError(
            "the model's tokenizer writes a text otherwise with its special tokens than without them "
            f"('a' becomes {list(probe)} and {list(bare)}), so that texts cannot be joined"
        )
    return len(probe) - starts[0] - len(bare)


class Encoder:
    """Turns texts into token ids, with or without a chat template. Holds no state beyond the
    tokenizer.

    Tokens are located by counting those of a text's beginning where these are the first tokens of
    the whole text too, and otherwise by the characters that the tokenizer says each token covers.
    ``template`` holds the variables of the chat template. ``renderer``: None is the one that the
    whole process shares.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: bool = False,
        template: Mapping[str, Any] | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._template = dict(template or {})
        self._day = parse_day(self._template.get(DAY))
        self._renderer = renderer
        self._chats: dict[str, str] = {}
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise DataError("chat_template: true, but the model's tokenizer has no chat template")
        probe = tokenizer("a")["input_ids"]
        # calling the backend of a fast tokenizer takes a fifth of the time of the transformers
        # wrapper
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if backend is not None and backend.encode("a").ids == probe else None
        self._tail = _appended(tokenizer, probe)
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
        return self._ids(self._chat(prompt) if self.chat_template else prompt)

    def pair(self, prompt: str, target: str, joiner: str = " ") -> Encoded:
        """``prompt + joiner + target``, tokenised jointly. In a chat, what the template itself puts
        before an answer joins them.

        Where one token would hold the prompt's end and the target's beginning, both are tokenised
        apart: it is the prompt's own tokens that a model is asked with.
        """
        head = self._chat(prompt) if self.chat_template else prompt
        if self.chat_template:
            joiner = self._joiner
        prompt_ids, whole = self._ids(head), f"{head}{joiner}{target}"
        ids = self._ids(whole)
        found = Encoded(ids, len(prompt_ids))
        if ids[: len(prompt_ids)] != prompt_ids:
            border = self._border(whole, ids, len(head), len(head) + len(joiner))
            if border is None:
                found = Encoded(
                    (*prompt_ids, *self._continuation(f"{joiner}{target}", prompt)), len(prompt_ids)
                )
            else:
                found = Encoded(ids, border, clean=False)
        if not found.target:
            raise DataError(f"target {target!r} adds no token after prompt {prompt!r}")
        return found

    def tokens_until(self, prompt: str, stop: int) -> int:
        """Count the tokens of :meth:`prompt` up to the one that holds the last character before
        ``stop``, a place in the text."""
        whole, start = self._located(prompt) if self.chat_template else (prompt, 0)
        ids, part = self._ids(whole), self._ids(whole[: start + stop])
        if ids[: len(part)] == part:
            return len(part)
        spans = self._spans(whole)
        if spans is not None:
            return max(i for i, (first, _) in enumerate(spans) if first < start + stop) + 1
        return self._covering(ids, part, whole)

    # --- characters and tokens ---

    def _ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it is given to the model: the template of a chat writes all special
        tokens itself."""
        if self.chat_template:
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self.text(text)

    def _spans(self, text: str, special: bool | None = None) -> list[tuple[int, int]] | None:
        """The characters (first, one past last) that each token of :meth:`_ids` stands for; None if
        the tokenizer cannot tell."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        special = not self.chat_template if special is None else special
        spans = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return [(first, stop) for first, stop in spans[: len(spans) - (self._tail if special else 0)]]

    def _border(self, text: str, ids: tuple[int, ...], end: int, begin: int) -> int | None:
        """Count the tokens of a prompt that ends at character ``end`` and whose answer begins at
        ``begin``; None if one token holds characters of both."""
        spans = self._spans(text)
        if spans is None:
            place = self._covering(ids, self._ids(text[:end]), text)
            said = self.tokenizer.decode(ids[place:], clean_up_tokenization_spaces=False)
            return place if text[begin:].strip() in said else None
        place = next((i for i, (_, stop) in enumerate(spans) if stop > end), len(spans))
        if place < len(spans) and spans[place][0] < end:
            return place + 1 if spans[place][1] <= begin else None
        return place

    def _covering(self, ids: tuple[int, ...], part: tuple[int, ...], text: str) -> int:
        """The fewest of ``ids`` whose text begins with that of ``part``, for tokenizers that do not
        say where their tokens stand."""

        def said(some: tuple[int, ...]) -> str:
            return str(self.tokenizer.decode(some, clean_up_tokenization_spaces=False))

        goal = said(part)
        for count in range(1, len(ids) + 1):
            if said(ids[:count]).startswith(goal):
                return count
        raise DataError(f"the tokens of {text!r} cannot be located: the tokenizer gives no offsets")

    def _continuation(self, text: str, prompt: str) -> tuple[int, ...]:
        """Ids of a text that goes on after another one, whose last token it does not touch."""
        for anchor in _ANCHORS:
            whole = anchor + text
            ids = tuple(self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
            spans = self._spans(whole, special=False)
            if spans is None:
                alone = tuple(self.tokenizer(anchor, add_special_tokens=False)["input_ids"])
                if alone and ids[: len(alone)] == alone:
                    return ids[len(alone) :]
                continue
            place = next((i for i, (_, stop) in enumerate(spans) if stop > 1), len(spans))
            if 0 < place < len(spans) and spans[place][0] >= 1:
                return ids[place:]
        raise DataError(f"the answer {text!r} cannot be tokenised apart from its prompt {prompt!r}")

    # --- chats ---

    def _located(self, prompt: str) -> tuple[str, int]:
        """The chat that asks ``prompt``, and where the prompt stands in it."""
        whole = self._chat(prompt)
        start = self._chat(_ASKED).find(_ASKED)
        if start < 0 or whole[start : start + len(prompt)] != prompt:
            start = whole.rfind(prompt)
        if start < 0:
            raise DataError(
                f"the chat template changes the prompt {prompt!r}, so its tokens cannot be located"
            )
        return whole, start

    def prepare(self, prompts: Iterable[str]) -> None:
        """Render the chats of many prompts together, which takes a third of the time."""
        if not self.chat_template:
            return
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._chats]
        if missing:
            if len(self._chats) + len(missing) > _CHATS_KEPT:
                self._chats.clear()
            texts = self._render([chat(prompt) for prompt in missing])
            self._chats.update(zip(missing, texts, strict=True))

    def _chat(self, prompt: str) -> str:
        if prompt not in self._chats:
            self.prepare([prompt])
        return self._chats[prompt]

    @property
    def asks_for_day(self) -> bool:
        """True if the template would write the day of the run into a prompt, and no day is given. It
        is rendered without a clock, and says something else there."""
        if not self.chat_template or self._day is not None or not self._names("strftime_now"):
            return False
        asked = [chat(_ASKED), chat(_ASKED, _SAID)]
        return any(self._render(asked, day) != self._render(asked) for day in _DAYS)

    def _chat_joiner(self) -> str:
        """The white space that the template writes between the start of the assistant's turn and
        what it says. Raises :class:`DataError` if it writes anything else there, as templates of
        thinking models do, or begins the turn in another way than where it asks for one."""
        has_clock = self._names("strftime_now")
        unread = [n for n in self._template if not self._names(n) and not (n == DAY and has_clock)]
        if unread:
            raise DataError(f"template: the model's chat template never reads {', '.join(unread)}; remove it")
        if DAY in self._template and self._day is None and not self._names(DAY):
            raise DataError(
                f"template.{DAY}: {self._template[DAY]!r} is no day; give it as year, month and day, for "
                "example 2024-07-26"
            )
        asked = self._chat(_ASKED)
        (answered,) = self._render([chat(_ASKED, _SAID)])
        at = answered.rfind(_SAID)
        before = answered[: max(at, 0)]
        between = before[len(asked) :] if before.startswith(asked) else ""
        if before.startswith(asked) and not between.strip():
            return between
        if at >= 0 and before.rstrip() == asked.rstrip():
            return ""  # they differ by white space alone
        if at < 0:
            raise DataError("chat_template: true, but the model's chat template leaves the answer out")
        hint = "use a template without it, or set chat_template: false"
        if self._names("enable_thinking") and self._template.get("enable_thinking") is not False:
            hint = "set `template: {enable_thinking: false}` for answers without thinking"
        raise DataError(
            f"chat_template: true, but the model's chat template asks for an answer with {asked[-60:]!r} "
            f"and puts the assistant's words after {before[-60:]!r}: {hint}"
        )

    def _names(self, name: str) -> bool:
        """Return whether the template's text holds a name."""
        return re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.get_chat_template())) is not None

    def _render(self, chats: Sequence[Chat], day: date | None = None) -> list[str]:
        return (self._renderer or renderer()).render(
            str(self.tokenizer.get_chat_template()),
            {**self.tokenizer.special_tokens_map, **self._template},
            chats,
            name=str(getattr(self.tokenizer, "name_or_path", "") or "the tokenizer"),
            day=day or self._day,
        )


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
