"""Versions, code and memory of the machine that a worker runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from pathlib import Path

import orchestrator
import workers
from orchestrator.storage.sealed import sha256_of
from workers.model.config import ModelConfig
from workers.types import JSON, ModelError

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "pydantic")
"""Packages whose versions a result may depend on. They must be equal on every node."""


GIB = 1 << 30


def this_process() -> dict[str, JSON]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def versions() -> dict[str, str]:
    """Versions that must be equal on every node: Python, :data:`PACKAGES`, and the digest of this
    code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return {**found, "editsweep": code_digest()}


def code_digest() -> str:
    """Hash of the source files of ``orchestrator`` and ``workers``. Nodes with equal digests run
    the same code."""
    text = []
    for package in (orchestrator, workers):
        folder = Path(str(package.__file__)).parent
        text += [f"{p.relative_to(folder)}:{sha256_of(p.read_bytes())}" for p in sorted(folder.rglob("*.py"))]
    return sha256_of("\n".join(text).encode())[:12]


def check_device(model: ModelConfig, where: str) -> None:
    """Raise :class:`ModelError` if the model is asked to be on a GPU and torch finds none. ``where``:
    the machine's name in the message."""
    if model.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise ModelError(f"{where}: model.device is cuda, but torch finds no GPU there")


def check_memory(model: ModelConfig, weight_bytes: int, gpu: float, memory_gb: float, where: str) -> None:
    """Raise :class:`ModelError`, with the sizes, if the model does not fit into this machine's
    memory. ``where``: the machine's name in the message."""
    if model.device != "cpu" and (gpu or model.device == "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ModelError(f"{where}: model.device is {model.device}, but torch finds no GPU there")
        free = torch.cuda.get_device_properties(0).total_memory * (min(gpu, 1.0) or 1.0)
        if weight_bytes > free:
            raise ModelError(
                f"{where}: the weights of {model.name} take {weight_bytes / GIB:.1f} GiB in {model.dtype}, "
                f"but an actor has "
                f"{free / GIB:.1f} GiB of GPU memory; use a smaller dtype, a larger GPU, or "
                f"engine.resources.gpu: 1"
            )
        return
    import psutil

    needed = memory_gb * GIB or 2 * weight_bytes
    available = psutil.virtual_memory().available
    if needed > available:
        raise ModelError(
            f"{where}: an actor needs about {needed / GIB:.1f} GiB of memory for {model.name}, "
            f"{available / GIB:.1f} GiB are "
            "available"
        )


def check_declared(shard_id: str, declared_gb: float | None, present: int | None) -> None:
    """Raise :class:`ModelError` if the number of lanes was chosen for a larger GPU than this one.

    ``declared_gb``: GiB that the spec declared. ``present``: bytes of this GPU, None without one. A
    GPU may report up to 5% less than its nominal size.
    """
    if declared_gb is None or present is None or present >= 0.95 * declared_gb * GIB:
        return
    raise ModelError(
        f"shard {shard_id} was planned for GPUs with engine.gpu_memory_gb: {declared_gb:g}, but the GPU "
        f"here has "
        f"{present / GIB:.1f} GiB. A shard that has begun keeps its lanes: continue it on a GPU of "
        f"{declared_gb:g} GiB. "
        f"Shards that have not begun are planned anew for this GPU by running again with "
        f"--set engine.gpu_memory_gb={int(present / GIB)} (with engine.lanes: auto) or with fewer "
        f"engine.lanes"
    )


def gpu_bytes(model: ModelConfig) -> int | None:
    """Bytes of memory of the GPU that this process edits on; None for a CPU."""
    if model.device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
