"""Second-moment statistics of a layer's inputs, ``C = E[k k^T]``: what the ROME family calls the covariance.

The text is cut into lines (documents); every real token of the first ``samples`` lines contributes one outer product.
Source: Meng et al., ROME, arXiv 2202.05262, section 3.1 and appendix E.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workers.artifacts import ArtifactData, Workbench
from workers.rows import Encoded, collate
from workers.types import JSON, DataError

if TYPE_CHECKING:
    from workers.models import BaseModel

KIND = "second_moment"
NULL_SPACE = "null_space"
_ROWS = 64


def corpus_path(corpus: str) -> Path:
    """``embedded`` means the embedded world's own text."""
    if corpus == "embedded":
        from workers.data.tinyworld import corpus_path as embedded

        return embedded()
    return Path(corpus).expanduser()


def corpus_fingerprint(corpus: str) -> str:
    """Content hash of the corpus file. Raises :class:`DataError` if it cannot be read."""
    path = corpus_path(corpus)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise DataError(f"corpus: {path}: {error.strerror or error}; give the path of a plain text file") from None


def build_second_moment(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Recipe: corpus (path or 'embedded'), samples, layer, module, precision. Gives ``moment_II`` and the token count."""
    site = base.site(recipe["layer"], recipe["module"])
    dtype = getattr(torch, recipe["precision"])
    width = site.shape[1]
    limit = int(getattr(base.model.config, "max_position_embeddings", 0) or 1024)
    total_II = torch.zeros(width, width, dtype=dtype, device=base.device)
    count = 0
    for batch in _batches(base, corpus_path(recipe["corpus"]), recipe["samples"], limit):
        keys_NI = layer_inputs(base, batch, site.module)
        keys_NI = keys_NI.to(dtype)
        total_II += keys_NI.T @ keys_NI
        count += keys_NI.shape[0]
    if count <= width:
        raise DataError(
            f"corpus: {recipe['corpus']}: only {count} tokens for {width} x {width} statistics, so they are singular; "
            "give a longer text or more samples"
        )
    return ArtifactData({"moment": total_II / count}, {"tokens": count})


def build_null_space(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Recipe: threshold, layer (named in errors); needs ``moment``. The projection onto the eigenvectors whose eigenvalue is
    below the threshold, and how many they are (AlphaEdit, arXiv 2410.02355)."""
    moment_II = bench.inputs["moment"].tensors["moment"]
    threshold, layer = recipe["threshold"], recipe["layer"]
    wide_II = moment_II.to(base.device, torch.float64)
    if not bool(torch.isfinite(wide_II).all()):
        raise DataError(f"corpus: the second moment of layer {layer} is not finite; give another text or fewer samples")
    values_I, vectors_II = torch.linalg.eigh((wide_II + wide_II.T) / 2)
    basis_IR = vectors_II[:, values_I < threshold]
    if not basis_IR.shape[1]:
        raise DataError(
            f"nullspace_threshold: {threshold}: no eigenvalue of the second moment of layer {layer} is below it "
            f"(they reach from {float(values_I[0]):.3g} to {float(values_I[-1]):.3g}), so no edit is possible"
        )
    return ArtifactData({"projection": (basis_IR @ basis_IR.T).to(moment_II.dtype)}, {"rank": basis_IR.shape[1]})


@torch.no_grad()
def layer_inputs(base: BaseModel, encoded: list[Encoded], module: nn.Module) -> Tensor:
    """Inputs of ``module`` at every real token of the batch, (tokens, I)."""
    rows = collate(encoded, [0] * len(encoded), base.encoder.pad_id, base.device)
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        base.hidden_states(rows)
    finally:
        handle.remove()
    return caught[0][rows.attention_mask_BS.bool()]


def _batches(base: BaseModel, path: Path, samples: int, limit: int) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    try:
        with path.open(encoding="utf-8") as file:
            lines = (line.strip() for line in file)
            for i, line in enumerate(line for line in lines if line):
                if i >= samples:
                    break
                ids = base.encoder.text(line)[:limit]
                batch.append(Encoded(ids, len(ids)))
                if len(batch) == _ROWS:
                    yield batch
                    batch = []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"corpus: {path}: cannot be read as UTF-8 text ({error})") from None
    if batch:
        yield batch
