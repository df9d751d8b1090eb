"""Tokens of each text of a request, as scoring and editing give it to the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from workers.data.scripts import joiner_of
from workers.types import DataError, EditRequest

if TYPE_CHECKING:
    from workers.model.batch import Encoder


def request_texts(request: EditRequest, unrelated: bool = False) -> Iterator[tuple[str, str, str | None]]:
    """The texts that a model reads: field of the request, prompt, answer with what joins it to the
    prompt (None: a text without an answer). ``unrelated``: the unrelated sentence too, which only
    some methods read."""
    pairs = [("prompt", request.prompt, request.target_new)]
    pairs += [(f"rephrases[{i}]", text, request.target_new) for i, text in enumerate(request.rephrases)]
    for name, probes in (("locality", request.locality), ("portability", request.portability)):
        pairs += [(f"{name}[{i}]", probe.prompt, probe.target) for i, probe in enumerate(probes)]
    for field, prompt, answer in pairs:
        yield field, prompt, f"{joiner_of(request, prompt)}{answer}"
    for i, text in enumerate(request.ood):
        yield f"ood[{i}]", text, None
    if unrelated and request.unrelated is not None:
        yield "unrelated", request.unrelated, None


def count_tokens(encoder: Encoder, prompt: str, answer: str | None) -> int:
    """Tokens of a prompt with its answer as :func:`request_texts` gives them, special tokens and
    chat template included. A text without an answer has no chat template."""
    if answer is None:
        return len(encoder.text(prompt))
    if not encoder.chat_template:
        return len(encoder.text(prompt + answer))  # one call instead of two: the border is not asked for
    try:
        return len(encoder.pair(prompt, answer.strip()).ids)
    except DataError:  # an answer without a token, which scoring reports
        return len(encoder.prompt(prompt))
