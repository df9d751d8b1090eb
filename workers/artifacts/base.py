"""Artifacts: expensive inputs computed once and shared by every stream that needs them. Importing
this module does not import torch.

A method describes what it needs as :class:`ArtifactSpec` (data). The engine looks the key up in its
store, has a session build what is missing, and passes the finished :class:`ArtifactData` to the
streams. Unfinished artifacts are never visible.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from workers.types import JSON, DataError, Frozen, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from workers.types import Dataset

ARTIFACT_VERSION = 1

_HEADER_BYTES = 100_000_000
"""The format's own limit."""


class ArtifactSpec(Frozen):
    """A kind (which builder) and the whole recipe: everything the content depends on, fingerprints
    included.

    ``name``: the name used by the method (or artifact) that needs it. ``where``: the paths of the
    files that the recipe names by fingerprint. Neither is part of the key. ``needs``: the artifacts
    it is built from; they are built first, and their keys are part of its key.
    """

    name: str
    kind: str
    recipe: dict[str, Any]
    where: dict[str, Any] = {}
    needs: tuple[ArtifactSpec, ...] = ()

    @property
    def key(self) -> str:
        """Content address: equal recipes share one artifact, different recipes do not."""
        content: dict[str, JSON] = {"kind": self.kind, "recipe": self.recipe, "version": ARTIFACT_VERSION}
        if self.needs:
            content["needs"] = {spec.name: spec.key for spec in self.needs}
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ArtifactData:
    """A finished artifact: tensors and a JSON value. ``made_as``: the kind, recipe and key it was
    built from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, JSON] = field(default_factory=dict)
    made_as: dict[str, JSON] | None = None

    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        tensors = {name: t.contiguous().cpu() for name, t in self.tensors.items()}
        # only one entry: safetensors does not keep the order of several, and equal artifacts must
        # have equal bytes
        text = json.dumps({"meta": self.meta, "made_as": self.made_as}, sort_keys=True)
        return save(tensors, metadata={"editsweep": text})

    @classmethod
    def from_bytes(cls, blob: bytes) -> ArtifactData:
        from safetensors.torch import load

        length = int.from_bytes(blob[:8], "little")
        header = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["editsweep"])
        if header.keys() != {"meta", "made_as"}:  # an early file, without made_as
            return cls(load(blob), header)
        return cls(load(blob), header["meta"], header["made_as"])

    @staticmethod
    def read_meta(file: BinaryIO) -> dict[str, JSON]:
        """The JSON value alone; the tensors are not read. Raises ``ValueError`` or ``KeyError`` if
        the file is none of ours."""
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        told = json.loads(json.loads(file.read(length))["__metadata__"]["editsweep"])
        meta: dict[str, JSON] = told["meta"] if told.keys() == {"meta", "made_as"} else told
        return meta

    def check_made_as(self, spec: ArtifactSpec, source: str) -> None:
        """Raise :class:`ModelError` if the artifact was built from another recipe than ``spec``.
        ``source``: its file, for the message."""
        made = self.made_as or {}
        if made.get("key") == spec.key:
            return
        ours, theirs = json.loads(json.dumps(spec.recipe)), made.get("recipe", {})
        different = sorted(key for key in {*ours, *theirs} if key not in ours or ours[key] != theirs.get(key))
        if not made:
            what = "it does not say what it was made as"
        elif made.get("kind") != spec.kind:
            what = f"it is of kind {made.get('kind')!r}"
        elif "model" in different:
            what = (
                f"it was made for another model ({theirs.get('model')}, the sweep's is {ours.get('model')})"
            )
        else:
            what = f"it was made by another recipe ({', '.join(different) or 'of other artifacts'} differ)"
        raise ModelError(
            f"{source}: not the {spec.kind} artifact that is needed here: {what}; remove the file"
        )


def in_order(
    specs: Iterable[ArtifactSpec], present: Callable[[ArtifactSpec], bool] | None = None
) -> list[ArtifactSpec]:
    """Topological order: each artifact once, after those it needs. Artifacts that are ``present``
    are left out, with those that only they need."""
    found: dict[str, ArtifactSpec] = {}

    def add(spec: ArtifactSpec) -> None:
        if spec.key not in found and not (present and present(spec)):
            for need in spec.needs:
                add(need)
            found[spec.key] = spec

    for spec in specs:
        add(spec)
    return list(found.values())


def _no_progress(done: int, total: int, what: str) -> None:
    """No-op progress callback."""


def _read_dataset(source: Mapping[str, JSON], fingerprint: str) -> Dataset:
    """Read a data set from its file. Raises :class:`DataError` if its fingerprint differs."""
    from pathlib import Path

    from workers.data import load_dataset

    path, train_path = (
        None if source[name] is None else Path(source[name]) for name in ("path", "train_path")
    )
    data = load_dataset(source["kind"], path, train_path, source["on_bad_record"])
    if data.fingerprint != fingerprint:
        raise DataError(
            f"the data set {source['kind']} ({path or 'embedded'}) is not the one that was planned with"
        )
    return data


class Stopped(Exception):
    """Raised when a builder stops early, after saving its unfinished work."""


def _no_trainer(method: str) -> Callable[..., Any]:
    raise LookupError(f"no trainer of {method}: training needs a session, which knows the methods")


@dataclass
class Workbench:
    """The environment of a builder: needed artifacts, progress callback, storage for unfinished
    work.

    This class keeps unfinished work in memory; the engine's subclass is durable. :meth:`load`
    returns the last saved data in the next attempt, until the artifact is finished. The times of
    saving change no bit of the result.
    """

    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    progress: Callable[[int, int, str], None] = _no_progress
    """Called from time to time with ``(done, total, what)``."""
    unfinished: bytes | None = None
    save_seconds: float = 30.0
    """Least time between two saves, in seconds; or 20 times the duration of a save, if that is
    longer."""
    stopping: Callable[[], bool] = bool
    dataset: Callable[[Mapping[str, JSON], str], Dataset] = _read_dataset
    """Loads the data set of a source (kind, paths) and raises if its fingerprint differs."""
    trainer_of: Callable[[str], Callable[..., Any]] = _no_trainer
    """Returns a method's ``trainer(base, hparams, generator)`` by the method's name; set by the
    session."""
    _saved: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def load(self) -> bytes | None:
        return self.unfinished

    def save(self, data: bytes) -> None:
        self.unfinished = data

    def keep(self, state: Callable[[], bytes]) -> None:
        """Save ``state()`` if enough time has passed; called between two steps. Raises
        :class:`Stopped` after saving if the builder must stop."""
        stopping = self.stopping()
        began = time.monotonic()
        if not stopping and began - self._saved < max(self.save_seconds, 20 * self._took):
            return
        self.save(state())
        self._saved = time.monotonic()
        self._took = self._saved - began
        if stopping:
            raise Stopped
