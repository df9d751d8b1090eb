"""What a disk must have been told before a result counts, and what is believed of it afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.journal import Journal
from orchestrator.results.table import CentralTable
from orchestrator.storage.base import StoreError
from orchestrator.storage.local import LocalStore
from tests.shards import commit_steps, contents, finish, make_manifest, undisturbed


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


class Calls:
    """Everything that the real operating system was asked to make durable or to give a name, in
    order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, Any]] = []
        for name in ("fsync", "link", "replace"):
            self._watch(monkeypatch, name, getattr(os, name))

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str, real: Any) -> None:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if name == "fsync":
                place = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
                self.made.append(
                    ("folder" if place.is_dir() else "file", place if place.is_dir() else place.read_bytes())
                )
            else:
                self.made.append((name, Path(args[1])))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, noted)


@pytest.mark.parametrize("verb", ["publish_new", "replace"])
def test_the_bytes_are_durable_before_the_name_and_the_name_before_the_verb_returns(
    store: LocalStore, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish_new("folder/other", b"so that the folder is there")
    calls, folder = Calls(monkeypatch), store.root / "folder"
    getattr(store, verb)("folder/x", b"all of it")
    named = {"publish_new": "link", "replace": "replace"}[verb]
    assert calls.made == [("file", b"all of it"), (named, folder / "x"), ("folder", folder)]


def test_a_name_may_become_durable_with_the_next_one(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish_new("folder/other", b"so that the folder is there")
    calls, folder = Calls(monkeypatch), store.root / "folder"
    store.replace("folder/x", b"all of it", settle=False)
    assert calls.made == [("file", b"all of it"), ("replace", folder / "x")]


def test_folders_that_are_made_are_durable_before_what_is_in_them(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, root = Calls(monkeypatch), store.root
    store.publish_new("a/b/x", b"all of it")
    before_the_link = calls.made[: calls.made.index(("link", root / "a" / "b" / "x"))]
    assert [place for kind, place in before_the_link if kind == "folder"] == [root.parent, root, root / "a"]


def test_deletions_become_durable_when_asked(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish_new("folder/x", b"")
    calls = Calls(monkeypatch)
    store.sync("folder")
    assert calls.made == [("folder", store.root / "folder")]


def test_a_link_that_was_made_although_the_reply_says_exists(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS the reply to a link can get lost; the client asks again and is told that the name is
    taken, by itself."""
    link = os.link

    def reply_lost(source: Any, target: Any, **kwargs: Any) -> None:
        link(source, target, **kwargs)
        link(source, target, **kwargs)  # the same request again: the real system raises FileExistsError

    monkeypatch.setattr(os, "link", reply_lost)
    assert store.publish_new("table/000001.parquet", b"ours") is True
    assert not store.publish_new("table/000001.parquet", b"theirs")  # here the name is another's
    monkeypatch.undo()
    assert not store.publish_new("table/000001.parquet", b"ours")  # the same bytes, yet another file
    assert store.read("table/000001.parquet") == b"ours"
    assert os.listdir(store.root / "table") == ["000001.parquet"]
    assert os.stat(store.root / "table" / "000001.parquet").st_nlink == 1


class _Unreliable(LocalStore):
    """A disk that reports success and keeps other bytes than it was given, of one folder."""

    folder = "table/"
    spoil = staticmethod(lambda data: data[:-40] + bytes(40))

    def publish_new(self, key: str, data: bytes) -> bool:
        return super().publish_new(key, self.spoil(data) if key.startswith(self.folder) else data)


def test_what_the_disk_made_of_a_table_file_is_read_before_the_parts_go(
    store: LocalStore, tmp_path: Path
) -> None:
    manifest = make_manifest("s0", T=2, groups=2)
    expected = undisturbed(tmp_path / "clean", manifest)
    finish(Journal(store), manifest)
    unreliable = _Unreliable(store.root)
    with pytest.raises(StoreError, match="what was read back differs from what was written"):
        CentralTable(unreliable).gather(Journal(unreliable))
    journal, table = Journal(store), CentralTable(store)
    assert journal.shard_ids() == ["s0"] and journal.progress("s0").finished
    assert table.shards() == {}
    assert table.gather(journal).shards == ("s0",)
    assert contents(table) == expected


def test_a_whole_table_file_with_other_rows_is_not_what_was_written(
    store: LocalStore, tmp_path: Path
) -> None:
    """Every checksum is right, but it is another file: what a cache that mixes up two names
    gives."""
    ours, other = make_manifest("s0", T=2, groups=2), make_manifest("s0", T=2, groups=2, cell="other")
    elsewhere = LocalStore(tmp_path / "elsewhere")
    finish(Journal(elsewhere), other)
    CentralTable(elsewhere).gather(Journal(elsewhere))
    mixed_up = _Unreliable(store.root)
    mixed_up.spoil = lambda _: elsewhere.read("table/000001.parquet")  # type: ignore[method-assign]
    finish(Journal(store), ours)
    with pytest.raises(StoreError, match="holds other rows than were written"):
        CentralTable(mixed_up).gather(Journal(mixed_up))
    assert Journal(store).progress("s0").finished


class _Full(LocalStore):
    """A disk that has room for the edit state and none for the part after it."""

    full = False

    def publish_new(self, key: str, data: bytes) -> bool:
        if self.full and key.endswith(".parquet"):
            raise StoreError("write", self.where(key), "the disk is full")
        return super().publish_new(key, data)


def test_states_that_dead_attempts_left_are_removed(store: LocalStore) -> None:
    manifest = make_manifest(T=20, groups=1, seeds=(0,), step_edits=2)
    full = _Full(store.root)
    journal = Journal(full)
    journal.begin(manifest)

    def states() -> list[str]:
        return sorted(
            path.relative_to(store.root / "parts" / "s0").as_posix()
            for path in store.root.rglob("*.safetensors")
        )

    for number in (1, 2, 3):
        full.full = False
        attempt = journal.claim("s0", "r1")
        assert attempt.number == number
        commit_steps(attempt, 2)
        kept = states()
        assert len(kept) == 2 and all(name.startswith(f"{number:04}/") for name in kept)
        full.full = True
        with pytest.raises(StoreError, match="the disk is full"):
            commit_steps(attempt, 1)
        assert len(states()) == 3  # the third belongs to no part
    full.full = False
    journal.claim("s0", "r1")
    assert states() == kept
