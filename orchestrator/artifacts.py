"""Content-addressed store of shared inputs: statistics, base-model scores, context templates, trained networks.

An artifact's key is the hash of its recipe, so it is computed once and used by every shard, method and sweep that needs
it. The data file is followed by a small file with its checksum; only then does the artifact exist.
Knows nothing of torch: an artifact is bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from orchestrator.paths import ResultsPaths
from orchestrator.store import Damaged, Missing, Store, put_aside, seal_json, sha256_of, unseal_json

log = logging.getLogger(__name__)


class Spec(Protocol):
    """What identifies an artifact (:class:`workers.artifacts.ArtifactSpec`)."""

    @property
    def kind(self) -> str: ...

    @property
    def key(self) -> str: ...


class ArtifactStore:
    """The ``artifacts/`` folder.

    >>> data = ArtifactStore(store).get_or_build(spec, lambda: session.build(spec).to_bytes())   # doctest: +SKIP

    Two processes may build the same artifact at once: the first one's bytes stay, both use them. Every verb may raise
    :class:`~orchestrator.store.StoreError`.
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()

    def has(self, spec: Spec) -> bool:
        """Whether the artifact exists. Its bytes are not verified."""
        return self.store.exists(self.paths.artifact_info(spec.kind, spec.key)) and self.store.exists(
            self.paths.artifact(spec.kind, spec.key)
        )

    def get(self, spec: Spec) -> bytes | None:
        """The verified bytes; None if the artifact does not exist. A damaged one is put aside and does not exist."""
        key = self.paths.artifact(spec.kind, spec.key)
        info_key = self.paths.artifact_info(spec.kind, spec.key)
        try:
            info = self.store.read(info_key)
            data = self.store.read(key)
        except Missing:
            return None
        try:
            if unseal_json(info, self.store.where(info_key)).get("data") != sha256_of(data):
                raise Damaged(f"{self.store.where(key)}: checksum does not match its contents")
        except Damaged as error:
            aside = self.paths.artifact_aside(spec.kind, spec.key, sha256_of(data))
            log.warning("%s; put aside as %s, it will be built again", error, self.store.where(aside))
            self.store.delete(info_key)
            put_aside(self.store, key, aside)
            return None
        return data

    def put(self, spec: Spec, data: bytes) -> bytes:
        """Stores the artifact unless it exists. Returns the bytes that everyone will read: use those, not ``data``."""
        key = self.paths.artifact(spec.kind, spec.key)
        info_key = self.paths.artifact_info(spec.kind, spec.key)
        while True:
            stored = data if self.store.publish_new(key, data) else None
            if stored is None:
                if self.store.exists(info_key) and (found := self.get(spec)) is not None:
                    return found
                # another builder is between its two files, or died there: its data are whole, so finish for it
                try:
                    stored = self.store.read(key)
                except Missing:
                    continue
            info = {"kind": spec.kind, "key": spec.key, "bytes": len(stored), "data": sha256_of(stored)}
            self.store.publish_new(info_key, seal_json(info))
            if (found := self.get(spec)) is not None:
                return found

    def get_or_build(self, spec: Spec, build: Callable[[], bytes]) -> bytes:
        """The stored artifact, built first if need be."""
        data = self.get(spec)
        return self.put(spec, build()) if data is None else data
