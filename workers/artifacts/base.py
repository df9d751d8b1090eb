"""Artifacts: expensive inputs computed once and shared by every stream that needs them. Free of
torch at import.

A method says what it needs as :class:`ArtifactSpec` (data); the engine looks the key up in its
store, has a session build what is missing, and hands the finished :class:`ArtifactData` to the
streams. Half-built ones are never visible.
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

    ``name`` is what the asking method (or artifact) calls it and ``where`` says where its builder
    finds what the recipe names by fingerprint (paths): neither is part of the key. ``needs`` are
    artifacts that it is made of: they are built first, and their keys are part of its own.
    """

    name: str
    kind: str
    recipe: dict[str, Any]
    where: dict[str, Any] = {}
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
    """The finished product: tensors and a JSON value. ``made_as``: the kind, recipe and key it was
    built by."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, JSON] = field(default_factory=dict)
    made_as: dict[str, JSON] | None = None

    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        tensors = {name: t.contiguous().cpu() for name, t in self.tensors.items()}
        # one entry only: safetensors writes several in an order of its own, and equal artifacts are
        # to have equal bytes
        text = json.dumps({"meta": self.meta, "made_as": self.made_as}, sort_keys=True)
        return save(tensors, metadata={"editsweep": text})

    @classmethod
    def from_bytes(cls, blob: bytes) -> ArtifactData:
        from safetensors.torch import load

        length = int.from_bytes(blob[:8], "little")
        told = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["editsweep"])
        if told.keys() != {"meta", "made_as"}:  # an early file: it did not say what it was made as
            return cls(load(blob), told)
        return cls(load(blob), told["meta"], told["made_as"])

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
        """Refuse what was built by another recipe, whatever name it lies under. Raises
        :class:`ModelError`."""
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
    """Each once, what it needs before it; those that are ``present`` left out, with what only they
    need."""
    found: dict[str, ArtifactSpec] = {}

    def add(spec: ArtifactSpec) -> None:
        if spec.key not in found and not (present and present(spec)):
            for need in spec.needs:
                add(need)
            found[spec.key] = spec

    for spec in specs:
        add(spec)
    return list(found.values())


def _nothing(done: int, total: int, what: str) -> None:
    """No-op progress callback."""


def _read_dataset(source: Mapping[str, JSON], fingerprint: str) -> Dataset:
    """Reads it from its file."""
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
    """A builder was asked to stop; what it had is saved."""


def _no_trainer(method: str) -> Callable[..., Any]:
    raise LookupError(f"no trainer of {method}: training needs a session, which knows the methods")


@dataclass
class Workbench:
    """A builder's surroundings: the artifacts it needs, a progress callback, and a place for
    unfinished work.

    This one keeps unfinished work in memory; the engine's is durable. What :meth:`save` was last
    given is what :meth:`load` returns in the next attempt, until the artifact is finished. When
    work is saved changes no bit of the result.
    """

    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    progress: Callable[[int, int, str], None] = _nothing
    """Told ``(done, total, what)`` now and then."""
    unfinished: bytes | None = None
    save_seconds: float = 30.0
    """Time between two savings, at least; twenty times as long as a saving takes, if that is
    longer."""
    stopping: Callable[[], bool] = bool
    dataset: Callable[[Mapping[str, JSON], str], Dataset] = _read_dataset
    """The data set of this kind, path and so on; refused if its fingerprint is another one."""
    trainer_of: Callable[[str], Callable[..., Any]] = _no_trainer
    """A method's own ``trainer(base, hparams, generator)``, by the method's name; the session lends
    it."""
    _saved: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def load(self) -> bytes | None:
        return self.unfinished

    def save(self, data: bytes) -> None:
        self.unfinished = data

    def keep(self, state: Callable[[], bytes]) -> None:
        """Called between two steps: saves ``state()`` if it is time to. Raises :class:`Stopped` if
        work is to end here."""
        stopping = self.stopping()
        began = time.monotonic()
        if not stopping and began - self._saved < max(self.save_seconds, 20 * self._took):
            return
        self.save(state())
        self._saved = time.monotonic()
        self._took = self._saved - began
        if stopping:
            raise Stopped
