"""Second-moment statistics of a layer's inputs, ``C = E[k k^T]``, called covariance in the ROME
family.

A corpus is a text file, one document per line, or a ``.jsonl`` file whose lines are texts or
objects with a ``text``. Every real token of the first ``samples`` documents contributes one outer
product; a document is cut at the model's context length. The file is streamed: unfinished work is
only the sums so far and the place in the file. Source: Meng et al., ROME, arXiv 2202.05262, section
3.1 and appendix E.1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from workers.artifacts.base import ArtifactData, ArtifactSpec, Workbench
from workers.inputs import open_file, reason
from workers.model.batch import Encoded, Encoder, collate
from workers.model.config import context_length
from workers.types import JSON, DataError, SpecError

if TYPE_CHECKING:
    from workers.model.base import BaseModel
    from workers.model.config import ModelConfig, ModelFingerprint

KIND = "second_moment"
NULL_SPACE = "null_space"
_DEFAULT_POSITIONS = 1024
"""Tokens read of a document, where the model does not say how many it reads."""

_ROWS = 64
_TOKENS = 16_384
"""Maximum documents and padded tokens of one forward. Both influence the bits of the result."""


def corpus_path(corpus: str) -> Path:
    """The file of a corpus; ``embedded`` means the text of the embedded world."""
    if corpus == "embedded":
        from workers.data.tinyworld import corpus_path as embedded

        return embedded()
    return Path(os.path.expanduser(corpus))  # leaves "~name" unchanged if there is no such user


def corpus_fingerprint(corpus: str) -> str:
    """Content hash of the corpus file. Raises :class:`DataError` if it cannot be read."""
    path = corpus_path(corpus)
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except (OSError, ValueError) as error:
        raise DataError(f"corpus: {path}: {reason(error)}; give the path of a text or JSONL file") from None


class CorpusHashes(dict[str, str]):
    """Content hashes of corpora; each file is read once, on first use."""

    def __missing__(self, corpus: str) -> str:
        self[corpus] = corpus_fingerprint(corpus)
        return self[corpus]


def corpus_of(corpus: str | None, model: ModelConfig, title: str, what: str, how_much: str) -> str:
    """The corpus of a method's config. None means the embedded model's own text.

    ``title``, ``what`` and ``how_much`` are words for the message. Raises :class:`SpecError` for
    None with any other model.
    """
    if corpus is not None:
        return corpus
    if model.name != "embedded":
        raise SpecError(
            f"corpus: {title} needs a text or JSONL file for the {what} of {model.name!r} ({how_much})"
        )
    return "embedded"


def corpus_recipe(corpus: str, hashes: CorpusHashes) -> dict[str, JSON]:
    """The part of an artifact's key that identifies a corpus: its content, not its path (and the
    name ``embedded``, which early keys contain). The path goes into :attr:`ArtifactSpec.where`."""
    written_as = corpus_format(corpus)
    return {
        **({"corpus": corpus} if corpus == "embedded" else {}),
        "corpus_hash": hashes[corpus],
        **({} if written_as == "text" else {"corpus_format": written_as}),
    }


def second_moment(
    name: str,
    fingerprint: ModelFingerprint,
    model: ModelConfig,
    corpus: str,
    samples: int,
    layer: int,
    module: str | None,
    precision: Literal["float32", "float64"],
    hashes: CorpusHashes | None = None,
) -> ArtifactSpec:
    """The statistics of one linear map's inputs over ``samples`` documents of ``corpus`` (a path,
    or ``embedded``)."""
    return ArtifactSpec(
        name=name,
        kind=KIND,
        recipe={
            "model": fingerprint.model,
            "tokenizer": fingerprint.tokenizer,
            "dtype": model.dtype,
            **corpus_recipe(corpus, CorpusHashes() if hashes is None else hashes),
            "samples": samples,
            "layer": layer,
            "module": module,
            "precision": precision,
        },
        where={"corpus": corpus},
    )


def corpus_format(corpus: str) -> Literal["text", "jsonl"]:
    return "jsonl" if corpus_path(corpus).suffix.lower() in (".jsonl", ".ndjson") else "text"


def check_corpus(
    corpus: str, wanted: Collection[tuple[int, int]], encoder: Encoder, context: int | None
) -> Iterator[DataError]:
    """The errors in which :func:`build_second_moment` would end: a line that cannot be read, or too
    few tokens. ``wanted``: the samples and the number of inputs of each statistics; the corpus is
    read once for all. ``context``: the model's."""
    limit, widest = context or _DEFAULT_POSITIONS, max(width for _, width in wanted)
    counts = [0]
    try:
        for text, _ in documents(corpus, Place(), max(samples for samples, _ in wanted)):
            if counts[-1] <= widest:  # then only the lines are read
                counts.append(counts[-1] + len(encoder.text(text)[:limit]))
    except DataError as error:
        yield error
        return
    for samples, width in sorted(wanted):
        count = counts[min(samples, len(counts) - 1)]
        if count <= width:
            yield _too_short(corpus, count, width)


def _too_short(corpus: str, count: int, width: int) -> DataError:
    return DataError(
        f"corpus: {corpus}: only {count} tokens for {width} x {width} statistics, so they are singular; give "
        "a longer text or more samples"
    )


def build_second_moment(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Build the second moment, (I, I), and the token count. Recipe: corpus (path or 'embedded'),
    samples, layer, module, precision."""
    site = base.site(recipe["layer"], recipe["module"])
    dtype = getattr(torch, recipe["precision"])
    width = site.shape[1]
    limit = positions(base)
    samples, layer = recipe["samples"], recipe["layer"]
    place = Place()
    total_II = torch.zeros(width, width, dtype=dtype, device=base.device)
    count = 0
    unfinished = bench.load()
    if unfinished is not None:
        state = ArtifactData.from_bytes(unfinished)
        place, count = Place(**state.meta["place"]), state.meta["tokens"]
        total_II += state.tensors["total"].to(base.device)

    def so_far() -> bytes:
        return ArtifactData({"total": total_II}, {"place": vars(place), "tokens": count}).to_bytes()

    for batch, behind in _batches(base, recipe["corpus"], place, samples, limit):
        keys_NI = layer_inputs(base, batch, site.module).to(dtype)
        total_II += keys_NI.T @ keys_NI
        count, place = count + keys_NI.shape[0], behind
        bench.progress(place.documents, samples, f"inputs of layer {layer}")
        bench.keep(so_far)
    if count <= width:
        raise _too_short(recipe["corpus"], count, width)
    moment_II = total_II / count
    return ArtifactData({"moment": moment_II}, {"tokens": count, "condition": condition(moment_II)})


def condition(moment_II: Tensor) -> float | None:
    """Condition of a second moment, to three digits: its largest eigenvalue over its smallest. None
    if the smallest is not positive or cannot be found, so that nothing is known of the inverse."""
    wide_II = moment_II.to(torch.float64)
    if not bool(torch.isfinite(wide_II).all()):
        return None
    try:
        values_I = torch.linalg.eigvalsh(wide_II)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    smallest, largest = float(values_I[0]), float(values_I[-1])
    if smallest <= 0 or math.isinf(ratio := largest / smallest):
        return None
    return float(f"{ratio:.3g}")


def build_null_space(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Build the projection, (I, I), onto the eigenvectors with an eigenvalue below the threshold,
    and their number (AlphaEdit, arXiv 2410.02355). Recipe: threshold, layer (for messages); needs
    ``moment``."""
    moment_II = bench.inputs["moment"].tensors["moment"]
    threshold, layer = recipe["threshold"], recipe["layer"]
    wide_II = moment_II.to(base.device, torch.float64)
    if not bool(torch.isfinite(wide_II).all()):
        raise DataError(
            f"corpus: the second moment of layer {layer} is not finite; give another text or fewer samples"
        )
    values_I, vectors_II = torch.linalg.eigh((wide_II + wide_II.T) / 2)
    basis_IR = vectors_II[:, values_I < threshold]
    if not basis_IR.shape[1]:
        raise DataError(
            f"nullspace_threshold: {threshold}: no eigenvalue of the second moment of layer {layer} is "
            f"below it "
            f"(they reach from {float(values_I[0]):.3g} to {float(values_I[-1]):.3g}), so no edit is possible"
        )
    return ArtifactData(
        {"projection": (basis_IR @ basis_IR.T).to(moment_II.dtype)}, {"rank": basis_IR.shape[1]}
    )


def positions(base: BaseModel) -> int:
    """Maximum tokens read of a document: the model's context length."""
    return context_length(base.model.config) or _DEFAULT_POSITIONS


class _Enough(Exception):
    """Raised when the wanted layer has its input, to skip the rest of the forward."""


@torch.no_grad()
def layer_inputs(base: BaseModel, encoded: list[Encoded], module: nn.Module) -> Tensor:
    """Inputs of ``module`` at every real token of the batch, (N, I). Layers after the module are
    not run."""
    batch = collate(encoded, [0] * len(encoded), base.encoder.pad_id, base.device)
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Enough

    handle = module.register_forward_pre_hook(catch)
    try:
        base.hidden_states(batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return caught[0][batch.attention_mask_BS.bool()]


@dataclass(frozen=True)
class Place:
    """Position in a corpus: bytes and lines read, and the documents found in them."""

    offset: int = 0
    lines: int = 0
    documents: int = 0


def documents(corpus: str, start: Place, samples: int = sys.maxsize) -> Iterator[tuple[str, Place]]:
    """Documents from ``start`` on, up to ``samples`` in the whole file, each with the place after
    it.

    Raises :class:`DataError` that names the file and the malformed line.
    """
    path, jsonl = corpus_path(corpus), corpus_format(corpus) == "jsonl"
    offset, lines, found = start.offset, start.lines, start.documents
    try:
        with open_file(path) as file:
            file.seek(offset)
            while found < samples and (line := file.readline()):
                offset, lines = offset + len(line), lines + 1
                try:
                    text = line.decode("utf-8-sig" if lines == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"corpus: {path}, line {lines}: cannot be read as UTF-8 text ({error})"
                    ) from None
                if text and jsonl:
                    text = _text_of(text, f"corpus: {path}, line {lines}")
                if text:
                    found += 1
                    yield text, Place(offset, lines, found)
    except OSError as error:
        raise DataError(f"corpus: {path}: {error.strerror or error}") from None


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{where}: field `text`: expected a text, or the line to be one; got another value")
    return text.strip()


def _batches(
    base: BaseModel, corpus: str, start: Place, samples: int, limit: int
) -> Iterator[tuple[list[Encoded], Place]]:
    """Batches of documents in the file's order, each with the place after its last document."""
    batch: list[Encoded] = []
    longest, behind = 0, start
    for text, place in documents(corpus, start, samples):
        ids = base.encoder.text(text)[:limit]
        if batch and (len(batch) == _ROWS or max(longest, len(ids)) * (len(batch) + 1) > _TOKENS):
            yield batch, behind
            batch, longest = [], 0
        batch.append(Encoded(ids, len(ids)))
        longest, behind = max(longest, len(ids)), place
    if batch:
        yield batch, behind
