"""Artifacts: expensive inputs computed once and shared by every stream that needs them. Free of torch at import.

A method says what it needs as :class:`ArtifactSpec` (data); the engine looks the key up in its store, has a session build
what is missing, and hands the finished :class:`ArtifactData` to the streams. Half-built ones are never visible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers.job import Frozen
from workers.types import JSON

if TYPE_CHECKING:
    from torch import Tensor

ARTIFACT_VERSION = 1


class ArtifactSpec(Frozen):
    """A kind (which builder) and the whole recipe: everything the content depends on, fingerprints included.

    ``name`` is what the asking method (or artifact) calls it; it is no part of the key. ``needs`` are artifacts that it is
    made of: they are built first, and their keys are part of its own.
    """

    name: str
    kind: str
    recipe: dict[str, Any]
    needs: tuple[ArtifactSpec, ...] = ()

    @property
    def key(self) -> str:
        """Content address: equal recipes share one artifact, any difference makes another."""
        content: dict[str, JSON] = {"kind": self.kind, "recipe": self.recipe, "version": ARTIFACT_VERSION}
        if self.needs:
            content["needs"] = {spec.name: spec.key for spec in self.needs}
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ArtifactData:
    """The finished product: tensors and a JSON value."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, JSON] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        tensors = {name: t.contiguous().cpu() for name, t in self.tensors.items()}
        return save(tensors, metadata={"editsweep": json.dumps(self.meta, sort_keys=True)})

    @classmethod
    def from_bytes(cls, blob: bytes) -> ArtifactData:
        from safetensors.torch import load

        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        return cls(load(blob), json.loads(header["__metadata__"]["editsweep"]))


def _nothing(done: int, total: int, what: str) -> None:
    """Nobody is watching."""


@dataclass
class Workbench:
    """What a builder finds beside the model: the artifacts it needs, someone to tell, and a place for unfinished work.

    This one keeps unfinished work in memory; the engine's is durable. What :meth:`save` was last given is what :meth:`load`
    returns in the next attempt, until the artifact is finished.
    """

    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    progress: Callable[[int, int, str], None] = _nothing
    """Told ``(done, total, what)`` now and then."""
    unfinished: bytes | None = None

    def load(self) -> bytes | None:
        return self.unfinished

    def save(self, data: bytes) -> None:
        self.unfinished = data
