"""A shard's durable progress: attempts, parts, checkpoints. Shards are resumed from this record
alone.

Every launch of a shard creates a new *attempt* and writes only into the attempt's folder. A step is
committed when its part appears (a sealed Parquet file with the step's rows). The edit state after
the step is written before the part, which contains the state's hash. The attempt's own file lists
the parts of earlier attempts that it continues; together they are the shard's *chain*. A worker
that was wrongly considered dead may go on writing parts, but they are not in the newest attempt's
chain and are ignored. States are bytes: this module is independent of torch and Ray.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from orchestrator.results.beside import COMMITTED
from orchestrator.results.columns import EDITS, Declaration, TableError, no_rows, rows_to_table
from orchestrator.results.contents import complete_rows
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.parquet import VERSION, check_seal, decode, decode_beside, encode, read_footer
from orchestrator.results.records import tell_foreign
from orchestrator.storage.base import Damaged, Missing, Store, put_aside
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, sha256_of, unseal_json
from workers.types import JSON, EditSweepError

log = logging.getLogger(__name__)

_CHECKPOINTS_KEPT = 2
_ATTEMPT_FIELDS = ("shard_id", "attempt", "from", "chain")
_FAILURE_FIELDS = frozenset({"cell_id", "group", "position", "kind", "message"})
_NOTHING: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({})


class JournalError(EditSweepError):
    """Wrong use of the journal: an unknown shard, a second composition for the same shard id, or a
    step out of order."""


class Superseded(JournalError):
    """A newer attempt has taken the shard over. Whatever this attempt writes is ignored, so the
    worker stops without reporting a failure."""


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of a shard: ``committed`` of ``ticks`` ticks are durable. Counts and seconds are
    sums over the newest attempt's chain.

    ``failures``: groups that failed (cell_id, group, position, kind, message). ``error``: the
    exception of the newest attempt, if it raised. ``commit_seconds`` leaves out the last step.
    """

    shard_id: str
    ticks: int
    committed: int = 0
    attempts: int = 0
    rows: int = 0
    edits: int = 0
    edit_seconds: float = 0.0
    score_seconds: float = 0.0
    commit_seconds: float = 0.0
    failures: tuple[dict[str, JSON], ...] = ()
    error: dict[str, JSON] | None = None

    @property
    def finished(self) -> bool:
        return self.committed == self.ticks


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A finished shard with all its rows, and those of the tables beside the central one, by name.
    The checksums of all its parts were verified. ``whole``: the tables beside that every part knew;
    an earlier version, which may have run some of the steps, knew none."""

    manifest: ShardManifest
    progress: ShardProgress
    rows: pa.Table
    beside: Mapping[str, pa.Table] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @property
    def shard_id(self) -> str:
        return self.manifest.shard_id


@dataclass(frozen=True, slots=True)
class _Step:
    """One part of a chain."""

    attempt: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over a chain up to and including one part. Each part stores them in its footer, so
    progress is read from the last footer alone."""

    rows: int = 0
    edits: int = 0
    edit_seconds: float = 0.0
    score_seconds: float = 0.0
    commit_seconds: float = 0.0
    failures: tuple[dict[str, JSON], ...] = ()

    def to_json(self) -> dict[str, JSON]:
        return {name: getattr(self, name) for name in self.__slots__} | {"failures": list(self.failures)}

    @classmethod
    def from_json(cls, value: Mapping[str, JSON]) -> _Totals:
        return cls(**{**value, "failures": tuple(value["failures"])})


class Journal:
    """All shards of a results folder.

    >>> journal = Journal(LocalStore("results/demo"))                            # doctest: +SKIP
    >>> journal.begin(manifest)                                                  # doctest: +SKIP
    >>> attempt = journal.claim(manifest.shard_id, run_id="r7")                  # doctest: +SKIP
    >>> for step in stream.run(manifest.bounds, attempt.position, attempt.state):  # doctest: +SKIP
    ...     attempt.commit(step.start, step.stop, step.rows, failures, step.state, stats)

    Every method may raise :class:`~orchestrator.storage.base.StoreError`.
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()

    # -- shards

    def begin(self, manifest: ShardManifest) -> None:
        """Write the manifest. Nothing happens if the same manifest exists.

        Raises :class:`JournalError` if the shard has another manifest: parts of the two
        compositions could not be distinguished.
        """
        key = self.paths.manifest(manifest.shard_id)
        data = seal_json({"version": VERSION, "manifest": manifest.model_dump(mode="json")})
        while not self.store.publish_new(key, data):
            try:
                if self.manifest(manifest.shard_id) != manifest:
                    where = self.store.where(key)
                    raise JournalError(
                        f"shard {manifest.shard_id} has begun with another composition ({where})"
                    )
                return
            except Missing:
                continue
            except Damaged as error:
                self._move_aside(manifest.shard_id, key, error)

    def shard_ids(self) -> list[str]:
        """Every shard that has a folder."""
        entries = self.store.list(self.paths.parts)
        mine = [entry for entry in entries if entry.folder and self.paths.is_name(entry.name)]
        tell_foreign(self.store, self.paths.parts, [entry for entry in entries if entry not in mine])
        return [entry.name for entry in mine]

    def begun(self) -> dict[str, ShardManifest]:
        """Shard id -> manifest of the shards that have begun and are not in the table yet.

        A shard with a damaged manifest is left out with a warning and counts as not begun.
        :meth:`begin` with the same composition makes its progress valid again.
        """
        found = {}
        for shard_id in self.shard_ids():
            try:
                found[shard_id] = self.manifest(shard_id)
            except Missing:
                continue
            except Damaged as error:
                log.warning("%s; the shard counts as not begun", error)
        return found

    def manifest(self, shard_id: str) -> ShardManifest:
        """Raises :class:`~orchestrator.storage.base.Missing` or
        :class:`~orchestrator.storage.base.Damaged`."""
        key = self.paths.manifest(shard_id)
        value = unseal_json(self.store.read(key), self.store.where(key), "manifest")
        try:
            manifest = ShardManifest.model_validate(value.get("manifest"))
        except ValidationError as error:
            raise Damaged(
                f"{self.store.where(key)}: not a manifest this editsweep understands: {error}"
            ) from error
        if manifest.shard_id != shard_id:
            raise Damaged(f"{self.store.where(key)}: belongs to shard {manifest.shard_id}")
        return manifest

    def put_aside_damaged(self) -> None:
        """Put aside the manifests that cannot be read. Their shards count as not begun, and
        :meth:`begin` with the same composition makes their progress valid again. For the folder's
        owner."""
        for shard_id in self.shard_ids():
            try:
                self.manifest(shard_id)
            except Missing:
                self.tell_if_lost(shard_id)
            except Damaged as error:
                self._move_aside(shard_id, self.paths.manifest(shard_id), error)

    def tell_if_lost(self, shard_id: str) -> None:
        """Say that a shard which is not in the table has lost its manifest, if it has."""
        key = self.paths.manifest(shard_id)
        if not self.store.exists(key) and self._chain(shard_id, self._attempts(shard_id)):
            log.warning("%s: missing; the shard counts as not begun", self.store.where(key))

    def finished(self) -> list[str]:
        """Shards that are finished and wait to be gathered."""
        return [shard_id for shard_id, manifest in self.begun().items() if self._progress(manifest).finished]

    def drop(self, *shard_ids: str) -> None:
        """Delete shards with all their parts. Called after the table lists them."""
        for shard_id in shard_ids:
            self.store.delete_folder(self.paths.shard(shard_id))
        if shard_ids:
            self.store.sync(self.paths.parts)

    # -- progress

    def progress(self, shard_id: str) -> ShardProgress:
        """Progress from file names and the last part's footer. No checksum of a whole part is
        verified; :meth:`claim` and :meth:`load` do that.

        Raises :class:`~orchestrator.storage.base.Missing` if the shard has not begun.
        """
        return self._progress(self.manifest(shard_id))

    def _progress(self, manifest: ShardManifest) -> ShardProgress:
        shard_id = manifest.shard_id
        attempts = self._attempts(shard_id)
        chain = self._chain(shard_id, attempts)
        totals = _Totals()
        while chain:
            key = self._part_key(shard_id, chain[-1])
            try:
                with self.store.open(key) as file:
                    meta, _ = read_footer(file, self.store.where(key))
                totals = _Totals.from_json(meta["so_far"])
                break
            except (Damaged, Missing) as error:
                log.warning("%s; the step counts as not committed", error)
                chain.pop()
        return ShardProgress(
            shard_id=shard_id,
            ticks=manifest.bounds[-1],
            committed=chain[-1].stop if chain else 0,
            attempts=max(attempts, default=0),
            rows=totals.rows,
            edits=totals.edits,
            edit_seconds=totals.edit_seconds,
            score_seconds=totals.score_seconds,
            commit_seconds=totals.commit_seconds,
            failures=totals.failures,
            error=self._error(shard_id, max(attempts, default=0)),
        )

    def committed_rows(self, shard_id: str, of: Declaration = EDITS) -> pa.Table:
        """Rows committed so far, without those of failed groups; of the central table, or of one
        beside it. Writes nothing.

        Raises :class:`~orchestrator.storage.base.Missing` if the shard is gathered during the call;
        its rows are then in the table.
        """
        chain = self._chain(shard_id, self._attempts(shard_id))
        try:
            manifest = self.manifest(shard_id)
        except Damaged as error:
            log.warning("%s; the rows of its shard are left out", error)
            return no_rows(of)
        except Missing:
            if self.store.exists(self.paths.shard(shard_id)):
                # Lost, or what remains of a deletion that is under way or was interrupted: then the
                # table, which is read next, has the rows.
                return no_rows(of)
            raise
        pieces = [no_rows(of)]
        totals = _Totals()
        for step in chain:
            try:
                meta, data = self._read_part(shard_id, step)
                pieces.append(_rows_of(data, self._part_key(shard_id, step), of))
            except Damaged as error:
                log.warning("%s; this step and what follows are left out", error)
                break
            except Missing as error:
                if not self.store.exists(self.paths.manifest(shard_id)):
                    raise
                log.warning("%s; this step and what follows are left out", error)
                break
            totals = _Totals.from_json(meta["so_far"])
        return complete_rows(pa.concat_tables(pieces), manifest.job, totals.failures)

    def load(self, shard_id: str) -> FinishedShard | None:
        """Read and verify a finished shard; None if it is not finished. Damaged parts are moved to
        its ``bad`` folder first, and make it unfinished."""
        manifest = self.manifest(shard_id)
        chain = self._verify(shard_id, self._chain(shard_id, self._attempts(shard_id)))
        if not chain or chain[-1][0].stop != manifest.bounds[-1]:
            return None
        name = self.paths.shard(shard_id)
        rows = pa.concat_tables([decode(data, name)[0] for _, _, data in chain])
        beside, whole = {}, set(COMMITTED)
        for of in COMMITTED.values():
            found = [decode_beside(data, name, of) for _, _, data in chain]
            beside[of.name] = pa.concat_tables(
                [no_rows(of), *(table for table in found if table is not None)]
            )
            whole -= {of.name} if None in found else set()
        return FinishedShard(manifest, self._progress(manifest), rows, beside, frozenset(whole))

    # -- attempts

    def claim(self, shard_id: str, run_id: str, worker: Mapping[str, JSON] | None = None) -> Attempt:
        """Start the next attempt of a shard. If two workers call this at the same time, each gets a
        number of its own, and the higher number owns the shard.

        The attempt continues after the last part whose rows and edit state are undamaged. Only the
        two newest edit states are kept; if both are damaged, it continues after the last part that
        needs no state because the lanes had no edits. ``worker`` (host, pid, ...) is stored for
        ``status``. Raises :class:`JournalError` if the shard has not begun.
        """
        try:
            manifest = self.manifest(shard_id)
        except Missing as error:
            raise JournalError(f"shard {shard_id} has not begun: {error}") from error
        while True:
            attempts = self._attempts(shard_id)
            number = max(attempts, default=0) + 1
            chain = [
                (step, meta) for step, meta, _ in self._verify(shard_id, self._chain(shard_id, attempts))
            ]
            state = None
            while chain:
                step, meta = chain[-1]
                if meta["checkpoint"] is None:
                    break
                try:
                    state = self._read_checkpoint(shard_id, step, meta["checkpoint"])
                    break
                except (Damaged, Missing) as error:
                    log.warning("%s; continuing from the state before", error)
                    if isinstance(error, Damaged):
                        self._move_aside(
                            shard_id, self.paths.checkpoint(shard_id, step.attempt, step.stop), error
                        )
                    chain.pop()
            steps = [step for step, _ in chain]
            start = steps[-1].stop if steps else 0
            info = {
                "version": VERSION,
                "shard_id": shard_id,
                "attempt": number,
                "from": start,
                "chain": _compress(steps),
                "run_id": run_id,
                "worker": dict(worker or {}),
            }
            if self.store.publish_new(self.paths.attempt_info(shard_id, number), seal_json(info)):
                break
        kept = [step for step, meta in chain if meta["checkpoint"] is not None][-_CHECKPOINTS_KEPT:]
        self._drop_checkpoints(shard_id, attempts, kept)
        totals = _Totals.from_json(chain[-1][1]["so_far"]) if chain else _Totals()
        return Attempt(self.store, self.paths, manifest, number, run_id, start, state, totals, kept)

    def stalled(self, shard_id: str, run_id: str) -> int:
        """Count the attempts of a run that started from the shard's present position, hence
        committed nothing."""
        attempts = self._attempts(shard_id)
        chain = self._chain(shard_id, attempts)
        position = chain[-1].stop if chain else 0
        count = 0
        for number in attempts:
            key = self.paths.attempt_info(shard_id, number)
            try:
                info = unseal_json(self.store.read(key), self.store.where(key), "run_id", "from")
                count += (info.get("run_id"), info.get("from")) == (run_id, position)
            except (Missing, Damaged):
                continue
        return count

    def record_error(self, shard_id: str, attempt: int, error: Mapping[str, JSON]) -> None:
        """Store the exception that ended an attempt (class, message, path of the log, ...) for
        ``status``."""
        self.store.replace(self.paths.error(shard_id, attempt), seal_json(error))

    def errors(self, shard_id: str) -> dict[int, dict[str, JSON]]:
        """Attempt number -> the error given to :meth:`record_error`."""
        found = {number: self._error(shard_id, number) for number in self._attempts(shard_id)}
        return {number: error for number, error in found.items() if error is not None}

    def _error(self, shard_id: str, attempt: int) -> dict[str, JSON] | None:
        key = self.paths.error(shard_id, attempt)
        try:
            return unseal_json(self.store.read(key), self.store.where(key), "kind", "message")
        except Missing:
            return None
        except Damaged as error:
            log.warning("%s; the attempt's error is unknown", error)
            return {"kind": "unknown", "message": str(error)}

    # -- the chain of parts

    def _attempts(self, shard_id: str) -> list[int]:
        return attempt_numbers(self.store, self.paths, shard_id)

    def _part_key(self, shard_id: str, step: _Step) -> str:
        return self.paths.part(shard_id, step.attempt, step.start, step.stop)

    def _chain(self, shard_id: str, attempts: Sequence[int]) -> list[_Step]:
        """The valid parts by their file names: those that the newest attempt continues, then its
        own. Ends at the first gap. Nothing is verified."""
        for number in reversed(attempts):
            key = self.paths.attempt_info(shard_id, number)
            try:
                info = unseal_json(self.store.read(key), self.store.where(key), *_ATTEMPT_FIELDS)
                if (info["shard_id"], info["attempt"]) != (shard_id, number):
                    raise Damaged(f"{self.store.where(key)}: belongs to another attempt or shard")
                spans = [(int(a), int(start), int(stop)) for a, start, stop in info["chain"]]
                begin = int(info["from"])
            except Missing:
                continue  # an empty folder: the claim was interrupted
            except Damaged as error:
                log.warning("%s; the attempt does not count", error)
                continue
            chain: list[_Step] = []
            for attempt, start, stop in [*spans, (number, begin, None)]:
                if (chain[-1].stop if chain else 0) != start:
                    break
                chain.extend(self._consecutive_parts(shard_id, attempt, start, stop))
            return chain
        return []

    def _consecutive_parts(self, shard_id: str, attempt: int, start: int, stop: int | None) -> list[_Step]:
        """Consecutive parts of one attempt from tick ``start`` to ``stop`` (None: to the last)."""
        by_start = {}
        for entry in self.store.list(self.paths.attempt(shard_id, attempt)):
            step = self.paths.step(entry.name)
            if step is not None:
                by_start[step[0]] = step[1]
        run = []
        while start in by_start and start != stop:
            run.append(_Step(attempt, start, by_start[start]))
            start = by_start[start]
        return run

    def _verify(self, shard_id: str, chain: Sequence[_Step]) -> list[tuple[_Step, dict[str, JSON], bytes]]:
        """The longest undamaged beginning of a chain, with metadata and bytes. The first damaged
        part is moved to the shard's ``bad`` folder."""
        sound = []
        for step in chain:
            try:
                sound.append((step, *self._read_part(shard_id, step)))
            except Missing:
                break
            except Damaged as error:
                self._move_aside(shard_id, self._part_key(shard_id, step), error)
                break
        return sound

    def _read_part(self, shard_id: str, step: _Step) -> tuple[dict[str, JSON], bytes]:
        """Metadata and bytes of a part, both verified."""
        key = self._part_key(shard_id, step)
        name = self.store.where(key)
        data = self.store.read(key)
        check_seal(data, name)
        meta, rows = read_footer(io.BytesIO(data), name)
        found = (
            meta.get("kind"),
            meta.get("shard_id"),
            meta.get("attempt"),
            meta.get("start"),
            meta.get("stop"),
        )
        if found != ("part", shard_id, step.attempt, step.start, step.stop) or meta.get("rows") != rows:
            raise Damaged(f"{name}: a foreign file: its metadata is {found} with {meta.get('rows')} rows")
        return meta, data

    def _read_checkpoint(self, shard_id: str, step: _Step, digest: str) -> bytes:
        key = self.paths.checkpoint(shard_id, step.attempt, step.stop)
        state = self.store.read(key)
        if sha256_of(state) != digest:
            raise Damaged(f"{self.store.where(key)}: checksum differs from the one its part names")
        return state

    def _move_aside(self, shard_id: str, key: str, error: Damaged) -> None:
        aside = self.paths.shard_bad(shard_id, key)
        log.warning("%s; moved to %s", error, self.store.where(aside))
        put_aside(self.store, key, aside)

    def _drop_checkpoints(self, shard_id: str, attempts: Sequence[int], kept: Sequence[_Step]) -> None:
        """Delete the edit states of earlier attempts, except those of the steps ``kept``."""
        keep = {self.paths.checkpoint(shard_id, step.attempt, step.stop) for step in kept}
        for number in attempts:
            for entry in self.store.list(self.paths.attempt(shard_id, number)):
                if entry.name.endswith(".safetensors") and entry.key not in keep:
                    self.store.delete(entry.key)


def _rows_of(data: bytes, name: str, of: Declaration) -> pa.Table:
    """A part's rows of one table."""
    found = decode(data, name)[0] if of is EDITS else decode_beside(data, name, of)
    return no_rows(of) if found is None else found


def attempt_numbers(store: Store, paths: ResultsPaths, shard_id: str) -> list[int]:
    """The attempts of a shard, ascending."""
    numbers = [
        paths.attempt_number(entry.name) for entry in store.list(paths.shard(shard_id)) if entry.folder
    ]
    return sorted(number for number in numbers if number is not None)


def _compress(steps: Sequence[_Step]) -> list[list[int]]:
    """[attempt, from, to] of each sequence of parts of one attempt. The number of entries depends
    on the number of attempts, not of parts."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][0] == step.attempt:
            spans[-1][2] = step.stop
        else:
            spans.append([step.attempt, step.start, step.stop])
    return spans


@dataclass(slots=True)
class Attempt:
    """One launch of a shard, made by :meth:`Journal.claim`.

    The stream continues from the tick ``position`` with the edit state ``state``. Every commit
    advances ``position``. ``commit_seconds`` is the time spent in :meth:`commit` so far.
    """

    store: Store = field(repr=False)
    paths: ResultsPaths = field(repr=False)
    manifest: ShardManifest = field(repr=False)
    number: int
    run_id: str
    position: int
    state: bytes | None = field(repr=False)
    _totals: _Totals = field(repr=False)
    _kept: list[_Step] = field(repr=False)
    commit_seconds: float = 0.0
    _uncounted_seconds: float = field(default=0.0, repr=False)

    @property
    def shard_id(self) -> str:
        return self.manifest.shard_id

    @property
    def finished(self) -> bool:
        return self.position == self.manifest.bounds[-1]

    def commit(
        self,
        start: int,
        stop: int,
        rows: Sequence[Mapping[str, Any]],
        failures: Sequence[Mapping[str, JSON]],
        state: bytes | None,
        stats: Mapping[str, float],
        beside: Mapping[str, Sequence[Mapping[str, Any]]] = _NOTHING,
    ) -> None:
        """Write the step ``start .. stop`` (ticks) durably.

        ``rows``: rows of the stream; the columns of cell and attempt are added here. ``failures``:
        dicts with cell_id, group, position, kind, message. ``state``: the edit state after the
        step, None if the lanes have no edits. ``stats``: edits, edit_seconds, score_seconds.
        ``beside``: rows of the tables :data:`~orchestrator.results.beside.COMMITTED`, by name. After
        a :class:`~orchestrator.storage.base.StoreError` the same commit may be repeated. Raises
        :class:`Superseded`, and :class:`JournalError` for a step that does not follow the last one.
        """
        began = time.perf_counter()
        if start != self.position or stop <= start or stop not in self.manifest.bounds:
            raise JournalError(
                f"shard {self.shard_id} is at tick {self.position}: cannot commit step {start}..{stop}"
            )
        if max(attempt_numbers(self.store, self.paths, self.shard_id), default=0) > self.number:
            raise Superseded(f"shard {self.shard_id}: attempt {self.number} was replaced by a newer one")
        table = self._table(rows, EDITS)
        others = {name: self._table(found, COMMITTED[name]) for name, found in beside.items()}
        totals = self._add(table.num_rows, failures, stats)
        digest = None
        if state is not None:
            digest = sha256_of(state)
            # The file's name becomes durable with its part, which is published into the same
            # folder next.
            self.store.replace(self.paths.checkpoint(self.shard_id, self.number, stop), state, settle=False)
        meta: dict[str, JSON] = {
            "version": VERSION,
            "kind": "part",
            "shard_id": self.shard_id,
            "attempt": self.number,
            "start": start,
            "stop": stop,
            "rows": table.num_rows,
            "checkpoint": digest,
            "so_far": totals.to_json(),
        }
        key = self.paths.part(self.shard_id, self.number, start, stop)
        data = encode(table, meta, "snappy", others)
        # Only this attempt uses the name. It exists if an earlier try of this commit succeeded
        # but reported an error.
        if not self.store.publish_new(key, data) and self.store.read(key) != data:
            raise JournalError(
                f"{self.store.where(key)} has other contents: two workers share attempt {self.number}"
            )
        self.position, self._totals, self.state = stop, totals, None
        if state is not None:
            self._kept.append(_Step(self.number, start, stop))
        while len(self._kept) > _CHECKPOINTS_KEPT:
            old = self._kept.pop(0)
            self.store.delete(self.paths.checkpoint(self.shard_id, old.attempt, old.stop))
        self._uncounted_seconds = time.perf_counter() - began
        self.commit_seconds += self._uncounted_seconds

    def _table(self, rows: Sequence[Mapping[str, Any]], of: Declaration) -> pa.Table:
        mine = {"shard_id": self.shard_id, "run_id": self.run_id, "attempt": self.number}
        mine = {name: value for name, value in mine.items() if name in of.of("attempt")}
        mine |= dict.fromkeys(of.of("reader"))
        given, by_cell = of.of("stream"), of.of("cell")
        known = {
            cell_id: {name: columns[name] for name in by_cell} | mine
            for cell_id, columns in self.manifest.columns.items()
        }
        full = []
        for row in rows:
            if row.keys() != given:
                unknown, missing = sorted(row.keys() - given), sorted(given - row.keys())
                raise TableError(
                    f"a row of the stream ({of.name}) has unknown columns {unknown}, missing columns {missing}"
                )
            if row["cell_id"] not in known:
                raise TableError(f"a row of cell {row['cell_id']}, which is not in shard {self.shard_id}")
            full.append({**row, **known[row["cell_id"]]})
        return rows_to_table(full, of.columns)

    def _add(self, rows: int, failures: Sequence[Mapping[str, JSON]], stats: Mapping[str, float]) -> _Totals:
        if stats.keys() != {"edits", "edit_seconds", "score_seconds"}:
            raise JournalError(f"stats must be edits, edit_seconds, score_seconds; got {sorted(stats)}")
        for failure in failures:
            if failure.keys() != _FAILURE_FIELDS:
                raise JournalError(
                    f"a failure must have the fields {sorted(_FAILURE_FIELDS)}; got {sorted(failure)}"
                )
        before = self._totals
        return _Totals(
            rows=before.rows + rows,
            edits=before.edits + int(stats["edits"]),
            edit_seconds=before.edit_seconds + stats["edit_seconds"],
            score_seconds=before.score_seconds + stats["score_seconds"],
            commit_seconds=before.commit_seconds + self._uncounted_seconds,
            failures=before.failures + tuple(dict(failure) for failure in failures),
        )
