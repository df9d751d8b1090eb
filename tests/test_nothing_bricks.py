"""No folder is bricked and nobody waits for ever: the lock, foreign names, foreign table files, the
service of a bucket."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.results.journal import Journal
from orchestrator.results.query import open_results
from orchestrator.results.records import Identity
from orchestrator.results.status import read_status
from orchestrator.results.table import CentralTable
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Damaged, Unreadable
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from tests.engine import Watch, placeless, rows, run
from tests.shards import contents, finish, make_manifest, undisturbed
from tests.waiting import finished
from workers.types import EditSweepError

PATHS = ResultsPaths()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


# --- the lock


def _claim_of_the_dead(store: LocalStore, number: int) -> None:
    """A claim of a process of this machine that has ended."""
    owner = {
        "owner": "x",
        "run_id": "dead",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "space": locking._pid_namespace(),
        "started": 0.0,
    }
    store.replace(PATHS.lock_claim(number), json.dumps(owner).encode())


class _Slow(LocalStore):
    """Lets ``meanwhile`` happen right before its first claim is published."""

    def __init__(self, root: Path, meanwhile: Callable[[], None]) -> None:
        super().__init__(root)
        self.meanwhile: Callable[[], None] | None = meanwhile

    def publish_new(self, key: str, data: bytes) -> bool:
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().publish_new(key, data)


def test_three_observers_of_one_dead_owner_leave_one(store: LocalStore) -> None:
    """B sees that claim 1 is dead, and sleeps. A takes claim 2 and ends; C takes claim 3 and removes
    the others. When B wakes, claim 2 is free."""
    _claim_of_the_dead(store, 1)
    held: list[locking.Lock] = []

    def meanwhile() -> None:
        with locking.acquire(store, "a", print) as a:
            assert a.number == 2
        held.append(locking.acquire(store, "c", print).__enter__())

    with pytest.raises(locking.Locked, match="run c"):
        locking.acquire(_Slow(store.root, meanwhile), "b", print)
    (c,) = held
    assert c.number == 3
    c._check_owner()
    c.check()
    assert [entry.name for entry in store.list("lock")] == ["00000003.json"]
    c.__exit__(None, None, None)
    with locking.acquire(store, "d", print) as d:
        assert d.number == 4


def test_one_of_two_observers_that_publish_in_order_owns(store: LocalStore) -> None:
    """B is overtaken by A, which is still there: B is told of A."""
    _claim_of_the_dead(store, 1)
    held: list[locking.Lock] = []
    slow = _Slow(store.root, lambda: held.append(locking.acquire(store, "a", print).__enter__()))
    with pytest.raises(locking.Locked, match="run a"):
        locking.acquire(slow, "b", print)
    held[0].check()
    held[0].__exit__(None, None, None)


# --- files of another folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[LocalStore, LocalStore]:
    """Two folders of one sweep, each with a table file of a shard of its own."""
    stores = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "two")
    for number, store in enumerate(stores):
        store.publish_new(PATHS.sweep, Identity.new("demo", {}).to_bytes())
        finish(Journal(store), make_manifest("s0", cell=f"c{number}"))
        CentralTable(store).gather(Journal(store))
    return stores


def test_a_table_file_of_another_folder_is_put_aside(
    two: tuple[LocalStore, LocalStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, other = two
    copied = other.read("table/000001.parquet")
    ours.replace("table/000001.parquet", copied)
    assert CentralTable(ours).scan().num_rows == 0
    assert "a file of another results folder" in caplog.text
    assert CentralTable(ours).verify() == [1]
    assert ours.read("table/bad/000001.parquet") == copied
    finish(Journal(ours), make_manifest("s0", cell="c0"))
    CentralTable(ours).gather(Journal(ours))
    expected = undisturbed(tmp_path / "clean", make_manifest("s0", cell="c0"))
    assert contents(CentralTable(ours)) == expected


def test_a_table_file_without_a_seal_is_read(two: tuple[LocalStore, LocalStore], tmp_path: Path) -> None:
    """Files of earlier versions name no folder."""
    ours, _ = two
    old = LocalStore(tmp_path / "old")
    finish(Journal(old), make_manifest("s0", cell="c0"))
    CentralTable(old).gather(Journal(old))
    assert CentralTable(old).seals() == [None]
    ours.replace("table/000001.parquet", old.read("table/000001.parquet"))
    assert CentralTable(ours).verify() == []
    assert CentralTable(ours).scan().equals(CentralTable(old).scan())


# --- names that are not ours

FOREIGN = ("@eaDir", ".snapshot", "a b", ".DS_Store", "lost+found", "Thumbs.db", "~$x")
SMALL = {
    "dataset": {"kind": "tinyworld", "edits": 4},
    "grid": {"T": [4], "seeds": [0]},
    "methods": [{"method": "ft", "hparams": {"num_steps": 1}}],
    "engine": {"step_edits": 1},
}


def test_what_is_not_ours_is_ignored_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders and files that storage and desktops make, in every folder of a results folder."""
    from tests.engine import Stop

    def stop(step: object) -> None:
        if getattr(step, "edits", 0):
            raise Stop

    folder, clean = tmp_path / "r", tmp_path / "clean"
    run(clean, **SMALL)
    folder.mkdir()
    for name in FOREIGN[:3]:
        if " " not in name:
            (folder / name).mkdir()
    with pytest.raises(Stop):
        run(folder, Watch(stop), **SMALL)
    for place in [folder, *[path for path in folder.rglob("*") if path.is_dir()]]:
        for name in FOREIGN:
            there = place / name
            if not there.exists():
                (there.write_bytes(b"x") if "." in name[1:] else there.mkdir())
    (folder / "artifacts" / "unfinished").mkdir(parents=True)
    (folder / "artifacts" / "unfinished" / "@eaDir").mkdir()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "orchestrator"):
        status = read_status(str(folder))
        assert [shard["committed"] for shard in status["shards"]] == [1]
        assert open_results(folder).sql("SELECT count(*) AS n FROM edits")["n"].to_pylist() == [1]
    assert "parts: not written by editsweep, ignored: " in caplog.text and "'@eaDir'" in caplog.text
    assert run(folder, **SMALL).unfinished == ()
    assert placeless(rows(folder)) == placeless(rows(clean))
    left = [path for path in folder.rglob("@eaDir") if path.parent.name in ("table", "parts", "lock", "runs")]
    assert len(left) >= 3  # it is left alone


@pytest.mark.parametrize("what", ["folder", "link", "pipe"])
def test_what_stands_under_a_table_files_name_is_put_aside(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "r"
    folder.joinpath("table").mkdir(parents=True)
    wrong = folder / "table" / "000001.parquet"
    {
        "folder": wrong.mkdir,
        "link": lambda: wrong.symlink_to(tmp_path / "nowhere"),
        "pipe": lambda: os.mkfifo(wrong),
    }[what]()
    (folder / "lock").mkdir()
    LocalStore(folder).publish_new(PATHS.sweep, Identity.new("engine", {}).to_bytes())
    store = LocalStore(folder)
    with pytest.raises(Unreadable, match=r"000001\.parquet"):
        store.read("table/000001.parquet")
    finish(Journal(store), make_manifest("s0"))
    gathered = CentralTable(store).gather(Journal(store))
    assert gathered.files == ((1,) if what == "folder" else (2,))
    assert [entry.name for entry in store.list("table/bad")] == ["000001.parquet"]
    assert CentralTable(store).verify() == []


def test_an_unreadable_object_is_damaged_and_says_why(store: LocalStore) -> None:
    (store.root / "x").mkdir(parents=True)
    with pytest.raises(Damaged, match=r"cannot read .*/x: it is a folder, not a file"):
        store.read("x")
    store.replace("x", b"ours")
    assert store.read("x") == b"ours"
    assert [entry.folder for entry in store.list("") if entry.name.endswith(".aside")] == [True]


def test_a_file_that_is_put_aside_twice_is_kept_twice(store: LocalStore) -> None:
    for text in (b"first", b"second"):
        store.replace("table/000001.parquet", text)
        assert CentralTable(store).verify() == [1]
    assert store.read("table/bad/000001.parquet") == b"first"
    assert store.read("table/bad/000001.parquet.2") == b"second"


def test_a_table_file_that_was_deleted_is_missed_once(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in ("s0", "s1"):
        finish(Journal(store), make_manifest(shard, cell=shard))
        CentralTable(store).gather(Journal(store))
    store.delete("table/000001.parquet")
    CentralTable(store).scan()
    assert "000001.parquet: missing; its rows are lacking" in caplog.text
    CentralTable(store).verify()
    caplog.clear()
    CentralTable(store).scan()
    assert not caplog.text


# --- a log that cannot be written


def test_no_result_depends_on_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group fails, and its traceback cannot be written: that is no failure of the storage."""
    from orchestrator.storage.base import StoreError
    from workers.methods.ft import FT

    def fail(*_: object) -> None:
        raise ValueError("no")

    replace = LocalStore.replace

    def refuse(self: LocalStore, key: str, data: bytes, settle: bool = True) -> None:
        if key.startswith("logs/"):
            raise StoreError("write", key, "permission denied")
        replace(self, key, data, settle)

    monkeypatch.setattr(FT, "edit", fail)
    monkeypatch.setattr(LocalStore, "replace", refuse)
    outcome = run(tmp_path / "r", **SMALL)
    assert [failure["message"] for failure in outcome.failed_groups] == ["no"] and not outcome.errors


def test_a_bug_is_told_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("orchestrator.cli.reading.read_status", fail)
    code, _, said = call("status", tmp_path)
    assert code == 1 and "ZeroDivisionError: a bug" in said and "the traceback:" in said


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), (">&- 2>&-", 0), ("<&-", 0), (">/dev/full", 2)]
)
def test_standard_output_that_is_closed_or_full(redirection: str, code: int, tmp_path: Path) -> None:
    LocalStore(tmp_path).publish_new(PATHS.sweep, Identity.new("demo", {}).to_bytes())
    command = f"{sys.executable} -m orchestrator.cli status {tmp_path} {redirection}"
    ended = finished(["sh", "-c", command])
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr and "bug" not in ended.stderr
    assert ("cannot write to standard output: No space left" in ended.stderr) == (code == 2)


# --- files that a spec names

SECRET = "root:$6$salt$SECRET:19000:0:99999:7:::\n"


def _read_as(what: str, path: Path) -> None:
    from orchestrator.planning.spec import load_spec
    from workers.artifacts.stats import corpus_fingerprint
    from workers.data import load_dataset
    from workers.data.text import read_held_out
    from workers.methods.easyedit import read_hparams

    readers: dict[str, Callable[[Path], object]] = {
        "spec": load_spec,
        "hparams_file": read_hparams,
        "corpus": lambda path: corpus_fingerprint(str(path)),
        "ability text": read_held_out,
        "zsre": lambda path: load_dataset("zsre", path),
        "jsonl": lambda path: load_dataset("jsonl", path),
    }
    readers[what](path)


@pytest.mark.parametrize("what", ["spec", "hparams_file", "corpus", "ability text", "zsre", "jsonl"])
def test_only_regular_files_are_read_and_none_is_shown(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(EditSweepError, match=str(path)) as refused:
            _read_as(what, path)
        assert "expected a" in str(refused.value)
    if what in ("corpus", "ability text"):
        return  # any text is one
    for text in (SECRET, f"- {SECRET}", f'["{SECRET.strip()}"', SECRET * 3):
        (tmp_path / "shadow").write_text(text)
        with pytest.raises(EditSweepError) as refused:
            _read_as(what, tmp_path / "shadow")
        assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("what", ["spec", "hparams_file"])
def test_a_files_size_is_looked_at_before_it_is_read(what: str, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EditSweepError, match="too large, it may have at most 1048576 bytes"):
        _read_as(what, tmp_path / "large")


def test_a_claim_whose_release_failed_binds_nobody(store: LocalStore) -> None:
    """The process goes on, in a notebook for instance, and holds nothing any more."""
    with locking.acquire(store, "a", print) as a, pytest.raises(locking.Locked):
        locking.acquire(store, "b", print)
    store.delete(PATHS.lock_beat(a.number))  # as if it had not been released
    with locking.acquire(store, "b", print) as b:
        assert b.number == 2
        said: list[str] = []
        # a process that is there, and beats no more
        b._stop.set()
        b._thread.join()  # type: ignore[union-attr]
        with locking.acquire(store, "c", said.append, silent_seconds=0.2, watch=True) as c:
            assert c.number == 3
