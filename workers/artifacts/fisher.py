"""The diagonal of the Fisher information of linear maps: how strongly the log-probability of text
depends on each weight.

``F_i = E_x[(d log P(x) / d W_i)^2]``, the mean over texts ``x`` of a corpus of the squared gradient
of the text's mean log-probability per token (Kirkpatrick et al., arXiv 1612.00796; the "empirical"
Fisher, with the text's own tokens as labels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.artifacts.base import ArtifactData, Workbench
from workers.artifacts.stats import Place, documents, positions
from workers.inner_loop.losses import TargetTokens
from workers.model.batch import Encoded, Encoder, collate
from workers.types import JSON, DataError

if TYPE_CHECKING:
    from workers.model.base import BaseModel, Site

KIND = "fisher_diagonal"


def build_fisher(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Build the diagonal, (O, I), and the number of texts used.

    Recipe: corpus (path or 'embedded'), samples, layer, module, precision. Texts of one token
    predict nothing and are skipped.
    """
    site = base.site(recipe["layer"], recipe["module"])
    total_OI = torch.zeros(site.shape, dtype=getattr(torch, recipe["precision"]), device=base.device)
    samples, limit = recipe["samples"], positions(base)
    place, count = Place(), 0
    unfinished = bench.load()
    if unfinished is not None:
        state = ArtifactData.from_bytes(unfinished)
        place, count = Place(**state.meta["place"]), state.meta["texts"]
        total_OI += state.tensors["total"].to(base.device)

    def so_far() -> bytes:
        return ArtifactData({"total": total_OI}, {"place": vars(place), "texts": count}).to_bytes()

    for text, behind in documents(recipe["corpus"], place):
        if count == samples:
            break
        place = behind
        ids = base.encoder.text(text)[:limit]
        if len(ids) > 1:
            total_OI += gradient(base, site, ids).to(total_OI.dtype).square()
            count += 1
            bench.progress(count, samples, "texts")
            bench.keep(so_far)
    if not count:
        raise _no_text(recipe["corpus"])
    return ArtifactData({"fisher": total_OI / count}, {"texts": count})


def check_corpus(corpus: str, samples: int, encoder: Encoder) -> None:
    """Raise the :class:`DataError` in which :func:`build_fisher` would end: a line that cannot be
    read, or no text to predict."""
    found = False
    for text, place in documents(corpus, Place()):
        if found and place.documents > samples:
            break
        found = found or len(encoder.text(text)) > 1
    if not found:
        raise _no_text(corpus)


def _no_text(corpus: str) -> DataError:
    return DataError(f"corpus: {corpus}: holds no text of two tokens or more")


def gradient(base: BaseModel, site: Site, ids: tuple[int, ...]) -> Tensor:
    """The gradient of a text's mean ``-log P`` per token with respect to the map's weight, (O,
    I)."""
    batch = collate([Encoded(ids[:-1], len(ids) - 1)], [0], base.encoder.pad_id, base.device)
    places = [(0, j, token, 1 / (len(ids) - 1)) for j, token in enumerate(ids[1:])]
    targets = TargetTokens.of(batch, places, 1)
    caught: list[tuple[Tensor, Tensor]] = []

    def probe(_: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        shift = torch.zeros_like(out, requires_grad=True)
        caught.append((args[0].detach(), shift))
        return out + shift

    handle = site.module.register_forward_hook(probe)
    try:
        with torch.enable_grad():
            loss = targets.nll(base, base.hidden_states(batch)[targets.reads]).sum()
    finally:
        handle.remove()
    ((input_BSI, shift_BSO),) = caught
    (grad_BSO,) = torch.autograd.grad(loss, shift_BSO)
    return grad_BSO[0].T.to(base.master_dtype) @ input_BSI[0].to(base.master_dtype)
