"""Content-addressed store of shared inputs: statistics, context templates, trained networks.

An artifact's key is the hash of its recipe, so it is computed once and used by every shard, method
and sweep that needs it. The data file is written first, then a small file with its checksum. The
artifact exists once both files do. This module treats artifacts as bytes and does not need torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.results.records import tell_foreign
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Damaged, Missing, Store, StoreError, Unreadable, put_aside
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, sha256_of, unseal_json
from workers.artifacts.base import Stopped
from workers.types import JSON, EditSweepError

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
"""Polling interval while another process builds the artifact."""


class ArtifactFailed(EditSweepError):
    """An artifact could not be built in this run. Every shard that needs it fails with the same
    cause, without another try."""


class Spec(Protocol):
    """Identity of an artifact (:class:`workers.artifacts.base.ArtifactSpec`)."""

    @property
    def kind(self) -> str: ...

    @property
    def key(self) -> str: ...


class ArtifactStore:
    """The ``artifacts/`` folder.

    >>> data = ArtifactStore(store).get_or_build(spec, run_id, build)   # doctest: +SKIP

    The process that builds an artifact holds a lock on it (:mod:`orchestrator.storage.lock`). Other
    processes that need the artifact wait; one of them takes over if the builder dies. If two
    processes build it nevertheless (one was wrongly considered dead), the bytes that are stored
    first stay, and both use them. Every method may raise
    :class:`~orchestrator.storage.base.StoreError`.
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()

    def has(self, spec: Spec) -> bool:
        """Return whether the artifact exists. Its bytes are not verified."""
        return self.store.exists(self.paths.artifact_info(spec.kind, spec.key)) and self.store.exists(
            self.paths.artifact(spec.kind, spec.key)
        )

    def get(self, spec: Spec) -> bytes | None:
        """The verified bytes; None if the artifact does not exist. A damaged artifact is moved to
        ``artifacts/bad`` and counts as missing."""
        key = self.paths.artifact(spec.kind, spec.key)
        info_key = self.paths.artifact_info(spec.kind, spec.key)
        data = b""
        try:
            info = unseal_json(self.store.read(info_key), self.store.where(info_key), "data")
            data = self.store.read(key)
            if info["data"] != sha256_of(data):
                raise Damaged(f"{self.store.where(key)}: checksum does not match its contents")
        except Missing:
            return None
        except Damaged as error:
            aside = self.paths.artifact_aside(spec.kind, spec.key, sha256_of(data))
            log.warning("%s; moved to %s, it will be computed again", error, self.store.where(aside))
            put_aside(self.store, info_key, f"{aside.removesuffix('.safetensors')}.json")
            put_aside(self.store, key, aside)
            return None
        return data

    def put(self, spec: Spec, data: bytes) -> bytes:
        """Store the artifact unless it exists. Return the stored bytes, which may differ from
        ``data`` if another process stored first: use those."""
        key = self.paths.artifact(spec.kind, spec.key)
        info_key = self.paths.artifact_info(spec.kind, spec.key)
        while True:
            stored = data if self.store.publish_new(key, data) else None
            if stored is None:
                if self.store.exists(info_key) and (found := self.get(spec)) is not None:
                    return found
                # Another builder has written the data but not the checksum file, and may have
                # died. The data file is complete, so write its checksum file here.
                try:
                    stored = self.store.read(key)
                except Missing:
                    continue
                except Unreadable:
                    put_aside(self.store, key, self.paths.artifact_aside(spec.kind, spec.key, sha256_of()))
                    continue
            info = {"kind": spec.kind, "key": spec.key, "bytes": len(stored), "data": sha256_of(stored)}
            self.store.publish_new(info_key, seal_json(info))
            if (found := self.get(spec)) is not None:
                return found

    def sizes(self, kind: str) -> dict[str, int]:
        """Key -> size in bytes of every finished artifact of a kind. The contents are not
        verified."""
        listed = self.store.list(self.paths.artifacts_of(kind))
        entries = {entry.name: entry.size for entry in listed if not entry.folder}
        found = {}
        for name, size in entries.items():
            key, _, ending = name.rpartition(".")
            if ending == "safetensors" and f"{key}.json" in entries:
                found[key] = size
        return found

    def get_or_build(self, spec: Spec, run_id: str, build: Callable[[Unfinished], bytes]) -> bytes:
        """The stored artifact. If it is missing, it is built here, or this call waits for the
        process that builds it.

        ``build`` receives the state that an earlier builder saved. Its exception is recorded and
        raised; later calls of the same run raise :class:`ArtifactFailed`.
        """
        waits_since: float | None = None
        while True:
            data = self.get(spec)
            if data is not None:
                return data
            if (failure := self.failure(spec, run_id)) is not None:
                raise ArtifactFailed(f"{spec.kind} artifact {spec.key[:8]} could not be built: {failure}")
            try:
                now = time.monotonic()
                lock = locking.acquire(
                    self.store,
                    run_id,
                    say=log.info,
                    paths=self.paths.building_claim(spec.kind, spec.key),
                    watch=waits_since is not None and now - waits_since > locking.SILENT_SECONDS,
                )
            except locking.Locked:
                waits_since = now if waits_since is None else waits_since
                time.sleep(WAIT_SECONDS)
                continue
            try:
                with lock:
                    data = self.get(spec)  # another process may have finished it just before
                    if data is None:
                        self.store.delete(self.paths.building_error(spec.kind, spec.key))
                        data = self.put(spec, build(Unfinished(self.store, self.paths, spec, lock.check)))
            except locking.LockLost:
                continue
            except (Stopped, StoreError):
                raise  # the artifact itself did not fail
            except Exception as error:
                self.record_failure(spec, run_id, f"{type(error).__name__}: {error}")
                raise
            self.store.delete_folder(self.paths.building(spec.kind, spec.key))
            return data

    def failure(self, spec: Spec, run_id: str) -> str | None:
        """The error message of the build that failed in this run; None if no build failed."""
        key = self.paths.building_error(spec.kind, spec.key)
        try:
            found = unseal_json(self.store.read(key), self.store.where(key), "run_id", "message")
        except (Missing, Damaged):
            return None
        return str(found["message"]) if found["run_id"] == run_id else None

    def record_failure(self, spec: Spec, run_id: str, message: str) -> None:
        self.store.replace(
            self.paths.building_error(spec.kind, spec.key),
            seal_json({"run_id": run_id, "message": message[:2000]}),
        )

    def unfinished(self) -> list[dict[str, JSON]]:
        """Return the unfinished artifacts: kind, key, and the progress at the last save.

        Folders of artifacts that are finished by now are ignored.
        """
        found = []
        for entry in self.store.list(self.paths.artifacts_unfinished):
            kind, _, key = entry.name.rpartition("-")
            if not (entry.folder and self.paths.is_name(kind) and self.paths.is_name(key)):
                tell_foreign(self.store, self.paths.artifacts_unfinished, [entry])
                continue
            if self.store.exists(self.paths.artifact_info(kind, key)):
                continue
            path = self.paths.building_progress(kind, key)
            try:
                progress = unseal_json(self.store.read(path), self.store.where(path), "done", "total", "what")
            except (Missing, Damaged):
                progress = {"done": 0, "total": 0, "what": ""}
            found.append({"kind": kind, "key": key, **progress})
        return found


class Unfinished:
    """Saved state of an artifact under construction. A damaged state counts as none."""

    def __init__(self, store: Store, paths: ResultsPaths, spec: Spec, check: Callable[[], None]) -> None:
        self.store, self.paths, self.spec, self.check = store, paths, spec, check
        self.progress: tuple[int, int, str] = (0, 0, "")
        """Last progress of the builder (done, total, text); saved with the state."""

    def load(self) -> bytes | None:
        key = self.paths.building_state(self.spec.kind, self.spec.key)
        try:
            whole = self.store.read(key)
        except Missing:
            return None
        except Damaged as error:
            log.warning("%s; the artifact is built from the start", error)
            self._put_aside(key)
            return None
        digest, data = whole[:64], whole[64:]
        if sha256_of(data).encode() != digest:
            log.warning("%s is damaged; the artifact is built from the start", self.store.where(key))
            self._put_aside(key)
            return None
        return data

    def _put_aside(self, key: str) -> None:
        """Make room for what is saved next; it goes with the folder when the artifact is built."""
        put_aside(self.store, key, f"{key}.bad")

    def save(self, data: bytes) -> None:
        """Raises :class:`~orchestrator.storage.lock.LockLost` if another process has taken over the
        construction."""
        self.check()
        spec = self.spec
        self.store.replace(self.paths.building_state(spec.kind, spec.key), sha256_of(data).encode() + data)
        done, total, what = self.progress
        self.store.replace(
            self.paths.building_progress(spec.kind, spec.key),
            seal_json({"done": done, "total": total, "what": what}),
        )
