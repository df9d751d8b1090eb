"""Artifacts: expensive inputs computed once and shared by every stream that needs them. Free of torch at import.

A method says what it needs as :class:`ArtifactSpec` (data); the engine looks the key up in its store, has a session build
what is missing, and hands the finished :class:`ArtifactData` to the streams. Half-built ones are never visible.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers.job import Frozen
from workers.types import JSON

if TYPE_CHECKING:
    from torch import Tensor

ARTIFACT_VERSION = 1


class ArtifactSpec(Frozen):
    """A kind (which builder) and the whole recipe: everything the content depends on, fingerprints included.

    ``name`` is what the asking method calls it; it is no part of the key.
    """

    name: str
    kind: str
    recipe: dict[str, Any]

    @property
    def key(self) -> str:
        """Content address: equal recipes share one artifact, any difference makes another."""
        text = json.dumps(
            {"kind": self.kind, "recipe": self.recipe, "version": ARTIFACT_VERSION}, sort_keys=True, allow_nan=False
        )
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
