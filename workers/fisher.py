"""The diagonal of the Fisher information of linear maps: how much the model's own text depends on each weight.

``F_i = E_x[(d log P(x) / d W_i)^2]``, the mean over texts ``x`` of a corpus of the squared gradient of the text's mean
log-probability per token (Kirkpatrick et al., arXiv 1612.00796; the "empirical" Fisher, whose labels are the text's own).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.artifacts import ArtifactData, Workbench
from workers.losses import TargetTokens
from workers.rows import Encoded, collate
from workers.stats import corpus_path
from workers.types import JSON, DataError

if TYPE_CHECKING:
    from workers.models import BaseModel, Site

KIND = "fisher_diagonal"


def build_fisher(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Recipe: corpus (path or 'embedded'), samples, layer, module, precision. Gives ``fisher_OI``, how many texts."""
    site = base.site(recipe["layer"], recipe["module"])
    total_OI = torch.zeros(site.shape, dtype=getattr(torch, recipe["precision"]), device=base.device)
    count = 0
    for ids in _texts(base, recipe["corpus"], recipe["samples"]):
        total_OI += gradient(base, site, ids).to(total_OI.dtype).square()
        count += 1
        bench.progress(count, recipe["samples"], "texts")
    if not count:
        raise DataError(f"corpus: {recipe['corpus']}: holds no text of two tokens or more")
    return ArtifactData({"fisher": total_OI / count}, {"texts": count})


def gradient(base: BaseModel, site: Site, ids: tuple[int, ...]) -> Tensor:
    """The gradient of a text's mean ``-log P`` per token with respect to the map's weight, (O, I)."""
    rows = collate([Encoded(ids[:-1], len(ids) - 1)], [0], base.encoder.pad_id, base.device)
    places = [(0, j, token, 1 / (len(ids) - 1)) for j, token in enumerate(ids[1:])]
    targets = TargetTokens.of(rows, places, 1)
    caught: list[tuple[Tensor, Tensor]] = []

    def probe(_: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        shift = torch.zeros_like(out, requires_grad=True)
        caught.append((args[0].detach(), shift))
        return out + shift

    handle = site.module.register_forward_hook(probe)
    try:
        with torch.enable_grad():
            loss = targets.nll(base, base.hidden_states(rows)[targets.reads]).sum()
    finally:
        handle.remove()
    ((input_BSI, shift_BSO),) = caught
    (grad_BSO,) = torch.autograd.grad(loss, shift_BSO)
    return grad_BSO[0].T.to(base.master_dtype) @ input_BSI[0].to(base.master_dtype)


def _texts(base: BaseModel, corpus: str, samples: int) -> Iterator[tuple[int, ...]]:
    """Token ids of the first ``samples`` lines that have a token to predict."""
    path = corpus_path(corpus)
    limit = int(getattr(base.model.config, "max_position_embeddings", 0) or 1024)
    try:
        with path.open(encoding="utf-8") as file:
            texts = (base.encoder.text(line.strip())[:limit] for line in file if line.strip())
            yield from islice((ids for ids in texts if len(ids) > 1), samples)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"corpus: {path}: cannot be read as UTF-8 text ({error})") from None
