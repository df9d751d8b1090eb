"""The verbs of the store, against a real file system and real processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.storage.base import Damaged, Missing, StoreError, put_aside
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, unseal_json, unseal_line
from tests.processes import fork, forks
from tests.shards import publish_beyond_limit, publish_keys, publish_unprivileged
from tests.waiting import output_of
from workers.types import EditSweepError, Frozen


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


def test_publish_new_never_overwrites(store: LocalStore) -> None:
    assert store.publish_new("a/b/one", b"first")
    assert not store.publish_new("a/b/one", b"second")
    assert store.read("a/b/one") == b"first"
    store.replace("a/b/one", b"third")
    assert store.read("a/b/one") == b"third"
    assert os.listdir(store.root / "a" / "b") == ["one"]  # no temporary file is left


def test_list_read_delete(store: LocalStore) -> None:
    assert store.list("nothing") == []
    assert not store.exists("f/x")
    store.publish_new("f/x", b"12")
    store.publish_new("f/y/z", b"1")
    (store.root / "f" / ".tmp-left-by-a-crash").write_bytes(b"half")
    assert [(e.key, e.name, e.folder, e.size) for e in store.list("f")] == [
        ("f/x", "x", False, 2),
        ("f/y", "y", True, 0),
    ]
    with store.open("f/x") as file:
        assert file.read() == b"12"
    store.tidy("f", older_than_s=-1)
    store.delete("f/x")
    store.delete("f/x")
    store.delete_folder("f/y")
    store.delete_folder("f/y")
    store.sync("f")
    store.sync("gone")
    assert os.listdir(store.root / "f") == []
    with pytest.raises(Missing, match="f/x: no such file"):
        store.read("f/x")
    with pytest.raises(Missing):
        store.open("f/x")


def test_tidy_spares_young_files(store: LocalStore) -> None:
    store.publish_new("f/x", b"")
    (store.root / "f" / ".tmp-in-flight").write_bytes(b"half")
    store.tidy("f")
    assert (store.root / "f" / ".tmp-in-flight").exists()


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "."])
def test_keys_stay_inside(store: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.read(key)


def test_refuses_to_delete_everything(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="whole results folder"):
        store.delete_folder("")


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\n", "x" * 201])
def test_path_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        ResultsPaths().shard(name)


def test_paths_read_their_own_names() -> None:
    paths = ResultsPaths()
    assert paths.step(paths.part("s", 3, 5, 70).rpartition("/")[2]) == (5, 70)
    assert paths.table_number(paths.table_file(12).rpartition("/")[2]) == 12
    assert paths.attempt_number(paths.attempt("s", 12345).rpartition("/")[2]) == 12345
    for name in ("bad", "manifest.json", "1-2.parquet", "x.pkl"):
        assert paths.step(name) is None
        assert paths.table_number(name) is None
        assert paths.attempt_number(name) is None


def test_a_path_that_is_a_file(store: LocalStore) -> None:
    store.publish_new("f", b"")
    with pytest.raises(StoreError, match=r"f/x.*(not a folder|exists|a file)"):
        store.publish_new("f/x", b"")


def test_no_permission_is_told_clearly(tmp_path_factory: pytest.TempPathFactory) -> None:
    # a folder that another user can reach, unlike pytest's own
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o555)
        answer = forks().SimpleQueue()
        output_of(fork(publish_unprivileged, str(folder), answer))
        name, message = answer.get()
        assert name == "StoreError"
        assert str(folder) in message
        assert "permission denied" in message
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_write_that_fails_half_way_leaves_nothing(store: LocalStore) -> None:
    answer = forks().SimpleQueue()
    output_of(fork(publish_beyond_limit, str(store.root), answer))
    name, message = answer.get()
    assert name == "StoreError"
    assert "table/big" in message
    assert "too large" in message
    assert os.listdir(store.root / "table") == []


def test_publishing_at_once_has_one_winner(store: LocalStore) -> None:
    barrier, answer = forks().Barrier(3), forks().SimpleQueue()
    runs = [fork(publish_keys, str(store.root), me, 40, barrier, answer) for me in "abc"]
    won = dict(answer.get() for _ in runs)
    for run in runs:
        output_of(run)
    assert sorted(key for keys in won.values() for key in keys) == list(range(40))
    for me, keys in won.items():
        assert all(store.read(f"race/{key}") == me.encode() * 1000 for key in keys)


@given(
    st.dictionaries(
        st.text(), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    ),
    st.booleans(),
)
def test_sealed_json_round_trip(value: dict[str, object], line: bool) -> None:
    assert unseal_json(seal_json(value, line), "x") == value
    assert json.loads(seal_json(value, line)) == json.loads(seal_json(value))
    assert (b"\n" in seal_json(value, line)) is not line
    text = unseal_line(seal_json(value, line))
    assert (None if text is None else json.loads(text)) == (value if line else None)


@given(st.data(), st.booleans())
def test_sealed_json_notices_any_change_of_meaning(data: st.DataObject, line: bool) -> None:
    value = {"chain": [[1, 0, 40]], "from": 40, "shard_id": "s0"}
    sealed = bytearray(seal_json(value, line))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert unseal_json(bytes(sealed), "the-file") == value  # a changed blank changes nothing
    except Damaged as error:
        assert "the-file" in str(error)
    assert unseal_line(bytes(sealed)) is None
    with pytest.raises(Damaged):
        unseal_json(bytes(seal_json(value, line)[:at]), "the-file")


def test_put_aside(store: LocalStore) -> None:
    store.publish_new("t/1", b"bad")
    put_aside(store, "t/1", "t/bad/1", instead=b"empty")
    assert (store.read("t/1"), store.read("t/bad/1")) == (b"empty", b"bad")
    put_aside(store, "t/1", "t/bad/2")
    assert not store.exists("t/1")
    put_aside(store, "t/1", "t/bad/3")
    assert not store.exists("t/bad/3")


# -- artifacts


class Spec(Frozen):
    kind: str = "moments"
    key: str = "0a1b"


def test_artifacts_first_builder_wins(store: LocalStore) -> None:
    artifacts = ArtifactStore(store)
    assert not artifacts.has(Spec())
    assert artifacts.get(Spec()) is None
    assert artifacts.get_or_build(Spec(), "r1", lambda work: b"first") == b"first"
    assert artifacts.has(Spec())
    assert artifacts.put(Spec(), b"second") == b"first"
    assert artifacts.get_or_build(Spec(), "r1", lambda work: pytest.fail("built twice")) == b"first"


def test_artifact_without_marker_is_invisible_and_can_be_completed(store: LocalStore) -> None:
    artifacts = ArtifactStore(store)
    store.publish_new(ResultsPaths().artifact("moments", "0a1b"), b"by a builder that died")
    assert not artifacts.has(Spec())
    assert artifacts.get(Spec()) is None
    assert artifacts.put(Spec(), b"mine") == b"by a builder that died"
    assert artifacts.get(Spec()) == b"by a builder that died"


@pytest.mark.parametrize("which", ["artifact", "artifact_info"])
def test_damaged_artifact_is_built_again(
    store: LocalStore, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    artifacts = ArtifactStore(store)
    artifacts.put(Spec(), b"good")
    path = store.root / getattr(ResultsPaths(), which)("moments", "0a1b")
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    assert artifacts.get(Spec()) is None
    assert "0a1b" in caplog.text
    assert artifacts.get_or_build(Spec(), "r1", lambda work: b"again") == b"again"
    assert artifacts.get(Spec()) == b"again"


def test_what_a_builder_left_beside_a_finished_artifact_is_not_under_way(store: LocalStore) -> None:
    artifacts = ArtifactStore(store)
    store.replace(ResultsPaths().building_state("moments", "0a1b"), b"half")
    assert [found["key"] for found in artifacts.unfinished()] == ["0a1b"]
    artifacts.put(Spec(), b"whole")
    assert artifacts.unfinished() == []


@pytest.mark.parametrize("text", ["gs://lab/r", "S3://lab/r", "file:///tmp/r"])
def test_other_schemes_are_refused(text: str) -> None:
    """They are no folders, either: ``gs:`` would be made beside the spec."""
    with pytest.raises(EditSweepError, match=rf"^{text}: no storage is known for .*give a folder, or s3://$"):
        open_store(text)
