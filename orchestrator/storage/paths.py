"""Every path of a results folder. No other module joins path strings.

All values are keys: POSIX strings relative to the results folder. A
:class:`~orchestrator.storage.base.Store` maps a key to a file or to an object of a bucket. ::

    sweep.json                                  which sweep this folder belongs to
    plan.json                                   cell id -> definition and the code that made it; cells of the last plan
    plan.copy.json                              the same once more, for when plan.json is damaged
    bad/                                        damaged files of the two, moved here
    lock/<number>.json, <number>.beat           owner of the folder (the highest number), and its heartbeat
    runs/<run_id>/spec.yaml, run.json           one call of ``editsweep run``
    parts/<shard>/manifest.json                 composition of the shard; written before its first attempt
    parts/<shard>/<attempt>/attempt.json        worker of the attempt, and the step it continues from
    parts/<shard>/<attempt>/<from>-<to>.parquet rows of one committed step
    parts/<shard>/<attempt>/<to>.safetensors    edit state after that step
    parts/<shard>/<attempt>/error.json          the exception that ended the attempt, if any
    parts/<shard>/bad/                          damaged files, moved here
    table/<number>.parquet                      the central table
    table/bad/                                  damaged table files, moved here
    requests/<data set>-<hash>.parquet          the texts of requests that cells edit
    requests/bad/                               damaged files of requests, moved here
    artifacts/<kind>/<key>.safetensors, .json   shared inputs and their checksums
    artifacts/unfinished/<kind>-<key>/          an artifact under construction: state, progress, owner
    logs/shard-<shard>-<attempt>.log            tracebacks of an attempt; other logs have other names
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")
_STEP = re.compile(r"(\d{8})-(\d{8})\.parquet")
_NUMBER = re.compile(r"\d{6}")
_SHARD_LOG = re.compile(r"shard-(.+)-(\d{4,})\.log")


def _name(value: str) -> str:
    """Refuse a name that leads out of the results folder (``..``, separators) or is hidden (a
    leading dot)."""
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} cannot be a file name: letters and digits, then also . _ = + -, at most 200"
        )
    return value


@dataclass(frozen=True, slots=True)
class ResultsPaths:
    """Keys of a results folder. Stateless: one instance can serve every folder.

    >>> ResultsPaths().part("s1", 2, 0, 40)
    'parts/s1/0002/00000000-00000040.parquet'
    """

    sweep: str = "sweep.json"
    plan: str = "plan.json"
    plan_copy: str = "plan.copy.json"
    bad: str = "bad"
    lock: str = "lock"
    runs: str = "runs"
    parts: str = "parts"
    table: str = "table"
    table_bad: str = "table/bad"
    requests: str = "requests"
    artifacts: str = "artifacts"
    artifacts_bad: str = "artifacts/bad"
    artifacts_unfinished: str = "artifacts/unfinished"
    logs: str = "logs"

    def aside(self, key: str) -> str:
        """Key to which a damaged file of the folder itself is moved."""
        return f"{self.bad}/{key}"

    @staticmethod
    def is_name(name: str) -> bool:
        """Return whether a name in a folder may be one of ours (``@eaDir`` and ``.snapshot`` are
        not)."""
        return _NAME.fullmatch(name) is not None

    def run(self, run_id: str) -> str:
        return f"{self.runs}/{_name(run_id)}"

    def run_spec(self, run_id: str) -> str:
        return f"{self.run(run_id)}/spec.yaml"

    def run_info(self, run_id: str) -> str:
        return f"{self.run(run_id)}/run.json"

    def lock_claim(self, number: int) -> str:
        return f"{self.lock}/{number:08d}.json"

    def lock_beat(self, number: int) -> str:
        return f"{self.lock}/{number:08d}.beat"

    def log(self, name: str) -> str:
        return f"{self.logs}/{_name(name)}.log"

    def shard_log(self, shard_id: str, attempt: int) -> str:
        return self.log(f"shard-{shard_id}-{attempt:04d}")

    @staticmethod
    def log_of_shard(name: str) -> tuple[str, int] | None:
        """Shard and attempt of a log's file name; None for any other name."""
        match = _SHARD_LOG.fullmatch(name)
        return (match[1], int(match[2])) if match else None

    def shard(self, shard_id: str) -> str:
        return f"{self.parts}/{_name(shard_id)}"

    def manifest(self, shard_id: str) -> str:
        return f"{self.shard(shard_id)}/manifest.json"

    def shard_bad(self, shard_id: str, key: str) -> str:
        """Key to which a damaged file ``key`` of a shard is moved. The folders in ``key`` become
        part of the file name."""
        return f"{self.shard(shard_id)}/bad/" + key.removeprefix(self.shard(shard_id) + "/").replace("/", "-")

    def attempt(self, shard_id: str, attempt: int) -> str:
        return f"{self.shard(shard_id)}/{attempt:04d}"

    def attempt_info(self, shard_id: str, attempt: int) -> str:
        return f"{self.attempt(shard_id, attempt)}/attempt.json"

    def error(self, shard_id: str, attempt: int) -> str:
        return f"{self.attempt(shard_id, attempt)}/error.json"

    def part(self, shard_id: str, attempt: int, start: int, stop: int) -> str:
        return f"{self.attempt(shard_id, attempt)}/{start:08d}-{stop:08d}.parquet"

    def checkpoint(self, shard_id: str, attempt: int, stop: int) -> str:
        return f"{self.attempt(shard_id, attempt)}/{stop:08d}.safetensors"

    def table_file(self, number: int) -> str:
        return f"{self.table}/{number:06d}.parquet"

    def table_aside(self, number: int) -> str:
        return f"{self.table_bad}/{number:06d}.parquet"

    def requests_file(self, fingerprint: str, digest: str) -> str:
        """Key of the requests with this content."""
        return f"{self.requests}/{_name(f'{fingerprint[:16]}-{digest[:16]}')}.parquet"

    def requests_aside(self, name: str) -> str:
        return f"{self.requests}/bad/{_name(name)}"

    def artifacts_of(self, kind: str) -> str:
        return f"{self.artifacts}/{_name(kind)}"

    def artifact(self, kind: str, key: str) -> str:
        return f"{self.artifacts_of(kind)}/{_name(key)}.safetensors"

    def artifact_info(self, kind: str, key: str) -> str:
        return f"{self.artifacts_of(kind)}/{_name(key)}.json"

    def artifact_aside(self, kind: str, key: str, digest: str) -> str:
        return f"{self.artifacts_bad}/{_name(kind)}-{_name(key)}-{digest[:8]}.safetensors"

    def building(self, kind: str, key: str) -> str:
        return f"{self.artifacts_unfinished}/{_name(kind)}-{_name(key)}"

    def building_state(self, kind: str, key: str) -> str:
        return f"{self.building(kind, key)}/state"

    def building_progress(self, kind: str, key: str) -> str:
        return f"{self.building(kind, key)}/progress.json"

    def building_error(self, kind: str, key: str) -> str:
        return f"{self.building(kind, key)}/error.json"

    def building_claim(self, kind: str, key: str) -> ResultsPaths:
        """The same keys, but with a separate lock for one artifact."""
        return replace(self, lock=f"{self.building(kind, key)}/claim")

    @staticmethod
    def attempt_number(name: str) -> int | None:
        """Attempt number of a folder name under a shard; None for any other name."""
        return int(name) if name.isdecimal() and len(name) >= 4 else None

    @staticmethod
    def step(name: str) -> tuple[int, int] | None:
        """Ticks ``(from, to)`` of a part's file name; None for any other name."""
        match = _STEP.fullmatch(name)
        return (int(match[1]), int(match[2])) if match else None

    @staticmethod
    def table_number(name: str) -> int | None:
        """The number of a table file's name; None for any other name."""
        stem, dot, ext = name.rpartition(".")
        return int(stem) if dot and ext == "parquet" and _NUMBER.fullmatch(stem) else None
