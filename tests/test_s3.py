"""A results folder in a bucket, against a real server of the S3 protocol on loopback."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("boto3")
pytest.importorskip("moto.server")

import boto3
from botocore.awsrequest import AWSResponse
from moto.server import ThreadedMotoServer

from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.results.beside import STORED
from orchestrator.results.journal import Journal
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.results.table import CentralTable
from orchestrator.storage import lock as locking
from orchestrator.storage import s3
from orchestrator.storage.base import Missing, StoreError
from orchestrator.storage.open import open_store
from orchestrator.storage.s3 import S3Store
from tests.engine import VOLATILE, Watch, placeless, rows, spec_of
from tests.engine import run as run_here
from tests.faulty import KINDS, FaultyProxy
from tests.histories import check_readers, random_history
from tests.processes import Command, Fork, fork, forks
from tests.shards import (
    commit_steps,
    comparable,
    contents,
    finish,
    gather_shards,
    make_manifest,
    publish_keys,
    run_shard,
    undisturbed,
)
from tests.waiting import output_of, wait_for
from workers.types import EditSweepError

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**VARIABLES, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="lab")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def where(endpoint: str, tmp_path: Path) -> str:
    return f"s3://lab/{tmp_path.name}/r"


@pytest.fixture
def store(where: str) -> S3Store:
    found = open_store(where)
    assert isinstance(found, S3Store)
    return found


def start(target: Any, *arguments: Any) -> Fork:
    """Run a function of :mod:`tests.shards` in a process that knows the server."""
    return fork(target, *arguments, environment={k: v for k, v in os.environ.items() if k.startswith("AWS_")})


def test_the_verbs(store: S3Store, where: str) -> None:
    assert store.list("") == [] and not store.exists("")
    assert store.publish_new("f/x", b"12")
    assert not store.publish_new("f/x", b"other")
    assert store.publish_new("f/y/z", b"1")
    assert store.read("f/x") == b"12"
    store.replace("f/x", b"123")
    with store.open("f/x") as file:
        assert file.read() == b"123"
    assert [(e.key, e.name, e.folder, e.size) for e in store.list("f")] == [
        ("f/x", "x", False, 3),
        ("f/y", "y", True, 0),
    ]
    assert store.exists("f") and store.exists("f/x") and store.exists("f/y")
    assert not store.exists("f/xx") and not store.exists("g")
    store.delete("f/x")
    store.delete("f/x")
    store.delete_folder("f")
    store.delete_folder("f")
    store.sync("f")
    store.tidy("f")
    assert store.list("f") == [] and not store.exists("f")
    for action in (store.read, store.open):
        with pytest.raises(Missing, match=f"{where}/f/x: no such object"):
            action("f/x")
    with pytest.raises(ValueError, match="not a key"):
        store.read("../x")
    with pytest.raises(ValueError, match="whole results folder"):
        store.delete_folder("")


def test_more_than_one_page(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that lists a hundred objects at a time, not a thousand."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")
    assert s3._DELETE_BATCH <= 1000  # the protocol's limit
    monkeypatch.setattr(s3, "_DELETE_BATCH", 100)
    for number in range(215):
        store.replace(f"f/{number:05d}", b"")
    page = boto3.client("s3").list_objects_v2(Bucket="lab", Prefix=store._key("f"))
    assert page["IsTruncated"] and page["KeyCount"] == 100
    assert [entry.name for entry in store.list("f")] == [f"{number:05d}" for number in range(215)]
    store.delete_folder("f")
    assert store.list("f") == []


def test_large_objects_are_read_in_part(store: S3Store) -> None:
    data = os.urandom(9 << 20)
    store.replace("big", data)
    with store.open("big") as file:
        file.seek(-10, 2)
        assert file.read() == data[-10:]
        file.seek(5 << 20)
        assert file.read(7) == data[5 << 20 :][:7]


@pytest.mark.parametrize("text", ["s3://", "s3://lab", "s3:///x", "s3://lab/a//b", "s3://lab/x?region=y"])
def test_addresses_of_no_use(text: str) -> None:
    with pytest.raises(EditSweepError, match=r"s3://"):
        open_store(text)


def test_what_is_wrong_is_said(store: S3Store, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"cannot write s3://nowhere/r/.*: no such bucket"):
        open_store("s3://nowhere/r").publish_new("x", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"cannot read s3://lab/r/x: .*http://127.0.0.1:1"):
        open_store("s3://lab/r").read("x")


def test_a_service_that_ignores_the_condition_is_refused(where: str) -> None:
    store = S3Store(where)
    store._client.meta.events.register(
        "before-send.s3.PutObject", lambda request, **_: request.headers.__delitem__("If-None-Match")
    )
    with pytest.raises(StoreError, match="ignores `If-None-Match"):
        store.publish_new("x", b"1")
    assert S3Store(where).list("lock") == []


def test_an_answer_that_got_lost(where: str, store: S3Store) -> None:
    """The object is written, the reply is an error, the SDK tries again and is told that the name
    is taken."""
    losing = S3Store(where)
    losing.probe()
    lost: list[str] = []

    def lose(request: Any, **_: Any) -> AWSResponse | None:
        if lost:
            return None
        lost.append(request.url)
        store.replace("x", b"mine")
        return AWSResponse(request.url, 500, {}, _Empty())

    losing._client.meta.events.register("before-send.s3.PutObject", lose)
    assert losing.publish_new("x", b"mine")
    assert len(lost) == 1
    lost.clear()
    assert not losing.publish_new("x", b"another's")


class _Empty:
    def stream(self, **_: Any) -> Iterator[bytes]:
        return iter(())


def test_publishing_at_once_has_one_winner(store: S3Store, where: str) -> None:
    barrier, answer = forks().Barrier(2), forks().SimpleQueue()
    runs = [start(publish_keys, where, me, 20, barrier, answer) for me in "ab"]
    won = dict(answer.get() for _ in runs)
    for run in runs:
        output_of(run)
    for me, keys in won.items():
        assert all(store.read(f"race/{key}") == me.encode() * 1000 for key in keys)
    assert sorted(key for keys in won.values() for key in keys) == list(range(20))


def test_killed_at_any_moment_and_gathered_the_table_is_the_same(
    tmp_path: Path, store: S3Store, where: str
) -> None:
    manifests = [make_manifest(f"s{i}", cell=f"c{i}", groups=2) for i in range(3)]
    expected = undisturbed(tmp_path / "clean", *manifests)
    journal = Journal(store)
    journal.begin(manifests[0])
    commit_steps(journal.claim("s0", "r0"), 2)
    marker = tmp_path / "go"
    process = start(run_shard, where, manifests[0].model_dump_json(), 1, str(marker))
    wait_for(Path(f"{marker}.reached").exists, process)
    assert journal.progress("s0").attempts == 2
    process.kill()
    output_of(process)
    finish(journal, *manifests)
    process = start(gather_shards, where, [[m.shard_id] for m in manifests])
    while process.poll() is None:
        assert contents(CentralTable(store), journal) == expected
    assert process.returncode == 0, output_of(process)
    assert journal.shard_ids() == []
    assert contents(CentralTable(store)) == expected
    data = bytearray(store.read("table/000002.parquet"))
    data[1000] ^= 1
    store.replace("table/000002.parquet", bytes(data))
    assert CentralTable(store).verify() == [2]
    assert store.exists("table/bad/000002.parquet")


def test_one_driver_at_a_time(store: S3Store) -> None:
    with locking.acquire(store, "r1", print), pytest.raises(locking.Locked, match="in use by another"):
        locking.acquire(store, "r2", print)
    with locking.acquire(store, "r3", print) as lock:
        lock.check()


def command_line(*arguments: str) -> None:
    main(arguments)


def call(code: int, *arguments: str) -> str:
    """Run the command line to its end with exit code ``code``; all that it said."""
    process = start(command_line, *arguments)
    said = output_of(process)
    assert process.returncode == code, said
    return said


def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less between two tries, and for a reply."""
    monkeypatch.setattr(s3, "_PAUSES", (0.001, 0.01))
    monkeypatch.setattr(s3, "_TIMEOUTS", {"connect_timeout": 5, "read_timeout": 0.25})


@pytest.mark.parametrize(
    "kind", ["all", "body cut", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)]
)
def test_what_may_pass_is_tried_again(
    endpoint: str, where: str, store: S3Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb, with 60 of 100 requests failing in one way, and in all ways."""
    hasty(monkeypatch)
    monkeypatch.setattr(s3, "_READ_WHOLE_BYTES", 1000)
    data = os.urandom(30_000)
    with FaultyProxy(endpoint, 0.6, seed=1, kinds=KINDS if kind == "all" else (kind,)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        faulty = S3Store(where)
        assert faulty.publish_new("f/x", data)
        assert not faulty.publish_new("f/x", b"another's")
        assert faulty.read("f/x") == data
        with faulty.open("f/x") as file:
            file.seek(-5, 2)
            assert file.read() == data[-5:]
        faulty.replace("f/y", b"1")
        assert [entry.name for entry in faulty.list("f")] == ["x", "y"]
        faulty.move("f/x", "g/x", instead=b"")
        assert faulty.read("g/x") == data and faulty.read("f/x") == b"" and faulty.exists("g")
        with pytest.raises(Missing):
            faulty.read("f/none")
        faulty.delete("f/x")
        faulty.delete_folder("g")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert [entry.key for entry in store.list("")] == ["f"] + ["lock"] * store.exists("lock")
    assert proxy.faults and set(proxy.faults) <= set(KINDS)


def test_a_service_that_does_not_recover_ends_the_request(
    endpoint: str, where: str, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty(monkeypatch)
    store.replace("x", b"1")
    monkeypatch.setattr(s3, "PATIENCE_SECONDS", 0.1)
    with FaultyProxy(endpoint, 1.0, seed=1, kinds=("503", "body cut")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with pytest.raises(StoreError, match=rf"cannot read {where}/x: .*\(\d+ tries\)"):
            S3Store(where).read("x")
    assert proxy.requests > 1


@pytest.mark.slow
def test_a_sweep_over_a_service_of_which_most_requests_fail(
    endpoint: str, where: str, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 of 100 requests, of the driver and of the worker: the rows are those of an undisturbed
    run."""
    hasty(monkeypatch)
    small: dict[str, Any] = {
        "dataset": {"kind": "tinyworld", "edits": 2},
        "grid": {"T": [1, 2], "seeds": [0]},
        "methods": [{"method": "ft", "hparams": {"num_steps": 1}}],
    }
    run_here(tmp_path / "clean", **small)
    kinds = tuple(kind for kind in KINDS if kind != "time-out")  # which cost time
    with FaultyProxy(endpoint, 0.6, seed=2, kinds=kinds) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        outcome = run_sweep(spec_of(**small), S3Store(where), run_local, Watch())
        assert outcome.unfinished == ()
        assert read_status(where)["finished"] == 2
    assert proxy.faults.keys() == set(kinds)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    there = open_results(where).table().to_pylist()
    assert placeless([{key: row[key] for key in row.keys() - VOLATILE} for row in there]) == placeless(
        rows(tmp_path / "clean")
    )


@pytest.mark.slow
def test_a_whole_sweep(where: str, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "s.yaml"
    spec.write_text(
        yaml.safe_dump(
            {
                "name": "bucket",
                "model": {"name": "embedded", "device": "cpu"},
                "dataset": {"kind": "tinyworld", "edits": 12},
                "grid": {"T": [1, 6], "seeds": [0]},
                "methods": [{"method": "rome", "hparams": {"v_num_grad_steps": 2}}],
                "scoring": {"generated": False},
                "engine": {"lanes": 2, "shard_edits": 6, "step_edits": 2},
            }
        )
    )
    run = ["run", str(spec), "--engine", "local", "--results"]
    call(0, *run, str(tmp_path / "local"))
    process = Command([sys.executable, "-m", "orchestrator.cli", *run, where], os.environ)
    journal = Journal(store)
    wait_for(lambda: any(store.list(f"parts/{shard}/0001") for shard in journal.shard_ids()), process)
    process.kill()
    output_of(process)
    assert "taking over" in call(0, *run, where)
    here, there = open_results(str(tmp_path / "local")), open_results(where)
    for of in STORED.values():
        found = comparable(here.table(of=of.name), of)
        assert found.num_rows and found == comparable(there.table(of=of.name), of), of.name
    monkeypatch.setattr("orchestrator.results.query._IN_MEMORY_BYTES", 0)
    assert there.sql("select count(*) as n from edits")["n"].to_pylist() == [48]
    assert there.sql("select count(*) as n from outputs")["n"].to_pylist() == [
        there.table(of="outputs").num_rows
    ]
    status = json.loads(call(0, "status", where, "--json"))
    assert (status["finished"], status["running"]) == (2, None)
    assert "removed: 1 cell, 24 rows" in call(0, "forget", where, "--cells", "T=6", "--yes")
    assert there.sql("select count(*) as n from edits")["n"].to_pylist() == [24]
    assert "s3://lab/none/r is not a results folder" in call(2, "status", "s3://lab/none/r")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [100, *(pytest.param(s, marks=pytest.mark.long) for s in range(101, 110))])
def test_any_history_in_a_bucket_gives_the_means_of_a_fresh_folder(
    where: str, tmp_path: Path, seed: int
) -> None:
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    spec, _ = random_history(where, random.Random(seed), tmp_path, aws)
    check_readers(where, spec, tmp_path / "fresh")


def test_a_folder_under_a_table_files_name_is_in_nobodys_way(store: S3Store) -> None:
    """Tools leave objects whose keys begin with another key and a slash."""
    store.replace("table/000001.parquet/x", b"mine")
    finish(Journal(store), make_manifest("s0"))
    table = CentralTable(store)
    assert table.gather(Journal(store)).files == (1,)
    finish(Journal(store), make_manifest("s1", cell="other"))
    assert table.gather(Journal(store)).files == (2,)
    assert set(CentralTable(store).shards()) == {"s0", "s1"}
    assert CentralTable(store).verify() == []
