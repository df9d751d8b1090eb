"""The same table from either engine, at any number of actors, after any interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from orchestrator.engine import local, worker
from orchestrator.engine.causes import Cause
from orchestrator.engine.folder import ResultsError
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.engine.worker import StepReport
from orchestrator.results.forget import forget, look_up
from orchestrator.results.journal import Journal, Superseded
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Missing, StoreError
from orchestrator.storage.local import LocalStore
from tests.engine import RAW, ROOT, TWELVE, Stop, Watch, every_row, placeless, rows, run, spec_of
from tests.processes import Command, Fork, fork
from tests.waiting import PATIENCE_SECONDS, finished, output_of, stop, wait_for
from workers.scoring import forward
from workers.types import EditSweepError, SpecError


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reference") / "r"
    outcome = run(folder)
    assert outcome.exit_code == 0
    assert outcome.unfinished == ()
    return rows(folder)


ONE_LANE = {**RAW["engine"], "lanes": 1}
"""Cells that are planned at another time share other prefixes, and have other neighbours: bits are
theirs with one lane only."""


@pytest.fixture(scope="module")
def one_lane(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one_lane") / "r"
    assert run(folder, engine=ONE_LANE).exit_code == 0
    return rows(folder)


# --- the local engine -----------------------------------------------------------------------


def test_every_row_once(reference: list[dict[str, Any]]) -> None:
    assert len(reference) == 2 * 2 * 2 * 6 * 2  # methods, T, seeds, edits, moments
    final = [r for r in reference if r["scored"] == "final"]
    assert {r["edits_applied"] for r in final if r["T"] == 3} == {3}


def test_running_again_runs_nothing(tmp_path: Path) -> None:
    small = {"methods": ["ft"], "grid": {"T": [3], "seeds": [0]}}
    first = run(tmp_path / "r", **small)
    before = rows(tmp_path / "r")
    assert 0 < first.safety.journal_seconds < first.safety.actor_seconds
    assert 0 < first.safety.gather_seconds < first.safety.wall_seconds
    (info,) = (tmp_path / "r" / "runs").glob("*/run.json")
    assert json.loads(info.read_text())["value"]["safety"] == dataclasses.asdict(first.safety)
    watch = Watch()
    again = run(tmp_path / "r", watch, **small)
    assert again.plan.shards == ()
    assert again.safety.journal_seconds == again.safety.actor_seconds == 0
    assert watch.steps == []
    more = run(tmp_path / "r", watch, methods=["ft"], grid={"T": [3], "seeds": [0, 1]})
    assert {cell.seed for shard in more.plan.shards for cell in more.plan.manifest(shard).job.cells} == {1}
    after = rows(tmp_path / "r")
    assert [r for r in after if r["seed"] == 0] == before
    assert len(after) == 2 * len(before)


def test_killed_at_any_step_the_table_is_the_same(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    """Every run dies after a few steps; with other lanes from the third run on, what has begun
    keeps its composition."""
    runs = 0
    while True:
        runs += 1
        left = [4]

        def kill(step: StepReport, left: list[int] = left) -> None:
            left[0] -= step.edits > 0
            if left[0] == 0:
                raise Stop

        try:
            outcome = run(tmp_path / "r", Watch(kill))
        except Stop:
            continue
        assert outcome.exit_code == 0
        break
    assert runs > 4
    assert rows(tmp_path / "r") == reference


def test_first_ctrl_c_commits_and_leaves(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    def interrupt(step: StepReport) -> None:
        if step.edits:
            signal.raise_signal(signal.SIGINT)

    outcome = run(tmp_path / "r", Watch(interrupt))
    assert outcome.interrupted
    assert outcome.exit_code == 130
    assert 0 < len(rows(tmp_path / "r")) < len(reference)
    assert run(tmp_path / "r").exit_code == 0
    assert rows(tmp_path / "r") == reference


def test_a_cell_that_raises_fails_alone_and_runs_again_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]]
) -> None:
    from workers.methods.grace import GRACE

    def broken(*_: object) -> None:
        raise FloatingPointError("[bold]out of luck[/bold]")

    with monkeypatch.context() as patch:
        patch.setattr(GRACE, "edit", broken)
        watch = Watch()
        outcome = run(tmp_path / "r", watch)
    assert outcome.exit_code == 1
    algorithms = {c.cell_id: outcome.plan.variants[c.variant].label for c in outcome.plan.cells}
    assert {algorithms[cell] for cell in outcome.unfinished} == {"grace"}
    assert not any("launching it again" in warning for warning in watch.warnings)  # it would only raise again
    assert {failure["kind"] for failure in outcome.failed_groups} == {"FloatingPointError"}
    finished = [row for row in reference if row["algorithm"] == "ft"]
    assert rows(tmp_path / "r") == finished
    again = run(tmp_path / "r")  # what failed is left alone
    assert (again.exit_code, again.plan.shards) == (1, ())
    status = read_status(str(tmp_path / "r"))
    assert {(cell["method"], cell["T"], cell["seed"]) for cell in status["failed_cells"]} == {
        ("grace", T, seed) for T in (1, 3) for seed in (0, 1)
    }
    failure = status["failed_cells"][0]["failures"][0]
    assert (failure["attempts"], failure["step"], failure["kind"]) == (
        1,
        "group 0, edit 0",
        "FloatingPointError",
    )
    log = Path(failure["log"]).read_text()
    assert "out of luck" in log and "Traceback" in log
    outcome = run_sweep(spec_of(), LocalStore(tmp_path / "r"), run_local, Watch(), retry_failed=True)
    assert outcome.exit_code == 0
    assert placeless(rows(tmp_path / "r")) == placeless(reference)
    assert read_status(str(tmp_path / "r"))["failed_cells"] == []


def test_one_group_that_raises_leaves_the_others_of_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]]
) -> None:
    from workers.methods.ft import FT

    edit = FT.edit
    bad = next(
        row["case_id"] for row in reference if (row["algorithm"], row["T"], row["group"]) == ("ft", 3, 1)
    )

    def picky(self: Any, overlay: Any, lanes: Any) -> Any:
        if len(lanes[0].requests) and any(
            request.case_id == bad for lane in lanes for request in lane.requests
        ):
            raise ValueError("not this one")
        return edit(self, overlay, lanes)

    only = {
        "methods": RAW["methods"][:1],
        "grid": {"T": [3], "seeds": [0, 1]},
        "engine": {**RAW["engine"], "lanes": 1},
    }
    with monkeypatch.context() as patch:
        patch.setattr(FT, "edit", picky)
        outcome = run(tmp_path / "r", **only)
    done = {(row["seed"], row["group"]) for row in rows(tmp_path / "r")}
    failed = {(failure["cell_id"], failure["group"]) for failure in outcome.failed_groups}
    assert len(done) + len(failed) == 4
    assert 1 <= len(failed) <= 2  # the request is once in every seed's order


@pytest.mark.slow
def test_only_some_cells(tmp_path: Path, one_lane: list[dict[str, Any]]) -> None:
    store = LocalStore(tmp_path / "r")
    outcome = run_sweep(
        spec_of(engine=ONE_LANE), store, run_local, Watch(), only=["method=grace,T=3", "T=3,seed=1"]
    )
    assert outcome.exit_code == 0
    found = rows(tmp_path / "r")
    assert {(r["method"], r["T"], r["seed"]) for r in found} == {
        ("grace", 3, 0),
        ("grace", 3, 1),
        ("ft", 3, 1),
    }
    with pytest.raises(SpecError, match=r"--only 'method=gracee' fits no cell; there are method: ft, grace"):
        run_sweep(spec_of(), store, run_local, Watch(), only=["method=gracee"])
    with pytest.raises(SpecError, match=r"'methd' is unknown; valid are: method, algorithm, T, seed, cell"):
        run_sweep(spec_of(), store, run_local, Watch(), only=["methd=ft"])
    assert run(tmp_path / "r", engine=ONE_LANE).exit_code == 0
    assert placeless(rows(tmp_path / "r")) == placeless(one_lane)


def test_forgotten_cells_are_gone_and_come_back_when_asked_for(
    tmp_path: Path, one_lane: list[dict[str, Any]]
) -> None:
    def kill(step: StepReport) -> None:
        if step.edits and len({s.shard_id for s in watch.steps}) == 2:
            raise Stop

    watch = Watch(kill)
    with pytest.raises(Stop):
        run(tmp_path / "r", watch, engine=ONE_LANE)
    results = open_results(tmp_path / "r")
    (under_way,) = results.journal.begun().values()
    run(tmp_path / "r", grid={"T": [1], "seeds": [0]}, engine=ONE_LANE)  # some of it enters the table
    cells = {cell.cell_id for cell in under_way.job.cells}
    before = every_row(tmp_path / "r")
    found = look_up(results, [f"cell={next(iter(cells))[:8]}", "method=grace,T=1"])
    said: list[str] = []
    removed = forget(results, found, said.append)
    after = every_row(tmp_path / "r")
    assert after == [row for row in before if row["cell_id"] not in found.limits]
    assert removed == found.rows <= len(before) - len(after)
    assert not found.limits.keys() & results.central.done().keys()
    assert forget(results, look_up(results, ["method=grace,T=1"]), said.append) == 0
    assert run(tmp_path / "r", engine=ONE_LANE).exit_code == 0
    assert placeless(rows(tmp_path / "r")) == placeless(one_lane)


@pytest.mark.parametrize("times", [1, 9])
def test_memory_that_runs_out_in_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]], times: int
) -> None:
    """An edit's batch is never split: the shard is launched again, after a pause, and continues
    where it was."""
    from workers.methods.grace import GRACE

    edit, left, waits = GRACE.edit, [times], []

    def short(self: Any, overlay: Any, lanes: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return edit(self, overlay, lanes)

    with monkeypatch.context() as patch:
        patch.setattr(GRACE, "edit", short)
        patch.setattr(worker.time, "sleep", waits.append)
        watch = Watch()
        outcome = run(tmp_path / "r", watch, engine={**RAW["engine"], "max_failures": 3})
    assert any(
        "OutOfMemoryError" in warning and "launching it again" in warning for warning in watch.warnings
    )
    assert waits[:3] == [1.0, 2.0, 4.0][: min(times, 3)]
    if times == 1:
        assert outcome.exit_code == 0
    else:
        assert outcome.exit_code == 1
        error = next(iter(outcome.errors.values()))
        assert (error.kind, error.attempts) == ("OutOfMemoryError", 4)
        assert "Traceback" in Path(error.log).read_text()
        (first, *_) = read_status(str(tmp_path / "r"))["failed_cells"]
        assert (first["failures"][0]["attempts"], first["failures"][0]["kind"]) == (4, "OutOfMemoryError")
        assert run(tmp_path / "r").exit_code == 0  # the machine's fault, so the same command tries again
    assert rows(tmp_path / "r") == reference


def test_memory_that_runs_out_in_scoring_splits_the_batch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]]
) -> None:
    """A device that holds eight sequences at a time."""
    both = forward.both_replies

    def limited(base: Any, overlay: Any, batch: Any, *rest: Any) -> Any:
        if len(batch) > 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return both(base, overlay, batch, *rest)

    assert {row["score_splits"] for row in reference} == {0}
    monkeypatch.setattr(forward, "both_replies", limited)
    assert run(tmp_path / "r").exit_code == 0
    found = rows(tmp_path / "r")
    assert max(row["score_splits"] for row in found) >= 1
    for row, whole in zip(found, reference, strict=True):
        for name, value in whole.items():
            if name != "score_splits":
                assert row[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), (
                    name
                )


def test_ctrl_c_waits_ten_seconds_for_the_step_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]]
) -> None:
    from workers.methods.ft import FT

    def endless(self: Any, overlay: Any, lanes: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        if again:
            signal.raise_signal(signal.SIGINT)
        threading.Event().wait(PATIENCE_SECONDS)

    assert local.LEAVE_SECONDS == 10
    for again in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(FT, "edit", endless)
            patch.setattr(local, "LEAVE_SECONDS", PATIENCE_SECONDS if again else 0.3)
            outcome = run(tmp_path / "r")
        assert outcome.interrupted and outcome.exit_code == 130
        assert rows(tmp_path / "r") == []
    assert run(tmp_path / "r").exit_code == 0
    assert rows(tmp_path / "r") == reference


@pytest.mark.slow
def test_settings_may_change_between_runs(tmp_path: Path) -> None:
    """A shard that has begun is continued as it was planned, under other lanes; what is new is cut
    by the new settings."""

    def kill(step: StepReport) -> None:
        if step.edits:
            raise Stop

    small = {"methods": ["ft"], "dataset": TWELVE, "grid": {"T": [3], "seeds": [0, 1]}}
    with pytest.raises(Stop):
        run(tmp_path / "r", Watch(kill), **small)
    begun = set(Journal(LocalStore(tmp_path / "r")).begun())
    outcome = run(tmp_path / "r", **small, engine={"lanes": 3, "shard_edits": 6, "step_edits": 6})
    assert outcome.exit_code == 0
    lanes = {(row["shard_id"] in begun, row["lanes"]) for row in rows(tmp_path / "r")}
    assert len(begun) == 1
    assert lanes == {
        (True, 2),
        (False, 2),
        (False, 3),
        (False, 1),
    }  # of seed 0 two groups were left, of seed 1 four


def test_other_sweep_other_scoring_other_folder(tmp_path: Path) -> None:
    small = {"methods": ["ft"], "grid": {"T": [6], "seeds": [0]}}
    run(tmp_path / "r", **small)
    with pytest.raises(ResultsError, match="'engine', not of 'other'"):
        run(tmp_path / "r", name="other", **small)
    with pytest.raises(ResultsError, match=r"scoring.*generated: False there, True here"):
        run(tmp_path / "r", **{**small, "scoring": {"generated": True}})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ResultsError, match=r"cat\.jpg"):
        run(tmp_path / "photos", **small)
    (tmp_path / "file").touch()
    with pytest.raises(EditSweepError, match="file"):
        run(tmp_path / "file", **small)


# --- one driver per folder ------------------------------------------------------------------


def test_second_driver_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    said: list[str] = []
    with locking.acquire(store, "r1", said.append):
        assert locking.owner(store) is not None
        with pytest.raises(locking.Locked, match=f"process {os.getpid()} on .*run r1"):
            locking.acquire(store, "r2", said.append)
    assert locking.owner(store) is None
    with locking.acquire(store, "r3", said.append):
        pass
    assert said == []


def test_a_dead_owner_is_succeeded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    code = (
        "import os, sys; from orchestrator.storage import lock; from orchestrator.storage.local import "
        "LocalStore\n"
        "lock.acquire(LocalStore(sys.argv[1]), 'dead', print).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    said: list[str] = []
    with locking.acquire(store, "r2", said.append) as lock:
        assert lock.number == 2
    assert len(said) == 1
    assert "taking over" in said[0]


def test_an_owner_elsewhere_is_watched_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(locking.Owner, "alive_here", lambda self: None)
    with locking.acquire(store, "r1", said.append, beat_seconds=0.05) as first:
        with pytest.raises(locking.Locked):
            locking.acquire(store, "r2", said.append, silent_seconds=PATIENCE_SECONDS)
        first._stop.set()  # the owner hangs
        assert first._thread is not None
        first._thread.join()
        with locking.acquire(store, "r3", said.append, silent_seconds=0.3) as second:
            first._stop.clear()  # and wakes up
            waker = threading.Thread(target=first._run_heartbeat)
            waker.start()
            waker.join(PATIENCE_SECONDS)
            assert first.lost
            with pytest.raises(locking.LockLost):
                first.check()
            second.check()
    assert locking.owner(store) is None


def test_an_owner_whose_claim_is_gone_has_lost_it(tmp_path: Path) -> None:
    """Its successor has come, finished and tidied up while it slept."""
    store = LocalStore(tmp_path)
    with locking.acquire(store, "r1", print) as lock:
        lock.check()
        store.delete_folder("lock")
        lock._seen -= 2 * lock.beat_seconds + 1
        with pytest.raises(locking.LockLost):
            lock.check()
    assert store.list("lock") == []


def test_a_stopped_owner_is_watched_and_told_when_it_wakes(tmp_path: Path) -> None:
    """SIGSTOP, takeover, SIGCONT: its very next check notices, before its heartbeat has had time
    to."""
    code = (
        "import sys; from orchestrator.storage import lock; from orchestrator.storage.local import "
        "LocalStore\n"
        "with lock.acquire(LocalStore(sys.argv[1]), 'slow', print) as held:\n"
        "    held.beat_seconds = 0.1; print('held', flush=True)\n"
        "    sys.stdin.readline()\n"  # stopped while it waits
        "    try: held.check()\n"
        "    except lock.LockLost as error: print('told:', error, flush=True); sys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "held\n"
    store = LocalStore(tmp_path)
    with pytest.raises(locking.Locked):
        locking.acquire(store, "r2", print)
    stop(process.pid)
    said: list[str] = []
    with locking.acquire(store, "r2", said.append, silent_seconds=0.5) as lock:
        assert "watching its heartbeat" in said[0] and "taking over" in said[1]
        process.stdin.write("go on\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        text = output_of(process)
        assert process.returncode == 7
        assert text.startswith("told: another `editsweep run` took this results folder over")
        lock.check()


@pytest.mark.slow
def test_a_driver_stopped_across_a_takeover_changes_nothing(
    tmp_path: Path, larger: list[dict[str, Any]]
) -> None:
    spec, folder = spec_file(tmp_path, **LARGER), tmp_path / "r"
    process = fork(main_with_quick_lock, "run", str(spec), "--results", str(folder), "--engine", "local")
    wait_for(lambda: committed(folder) >= 2, process)
    stop(process.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking.acquire, "__defaults__", QUICK_LOCK)
        watch = Watch()

        def wake(step: StepReport) -> None:
            if len(watch.steps) == 4:
                process.send_signal(signal.SIGCONT)

        watch.on_step = wake
        outcome = run(folder, watch, **LARGER)
    assert any("taking over" in warning for warning in watch.warnings)
    text = output_of(process)
    assert process.returncode == 2, text
    assert "took this results folder over" in text
    # before it looked, the old driver may have claimed the shard at hand, or begun one that the
    # new driver has finished meanwhile
    assert outcome.exit_code in (0, 1)
    assert run(folder, **LARGER).exit_code == 0
    assert rows(folder) == larger
    assert not list(folder.glob("parts/*"))


# --- storage that fails ---------------------------------------------------------------------


def test_storage_that_fails_in_mid_run_ends_it_clearly_and_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: list[dict[str, Any]]
) -> None:
    """Every write fails from some moment on, half of its bytes written; the next run fails, too,
    for another reason."""
    temporary, state = LocalStore._temporary, {"left": 0, "error": 0}

    @contextlib.contextmanager
    def failing(self: LocalStore, path: Path, data: bytes) -> Iterator[Path]:
        state["left"] -= 1
        if state["left"] < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / ".tmp-half").write_bytes(data[: len(data) // 2])
            raise OSError(state["error"], os.strerror(state["error"]))
        with temporary(self, path, data) as found:
            yield found

    # a lock cannot be released then, and the process that held it is this one
    monkeypatch.setattr(locking.Owner, "alive_here", lambda self: False)
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_temporary", failing)
        patch.setattr(worker, "BACKOFF_SECONDS", 0.01)
        for writes, error, words in (
            (8, errno.ENOSPC, "the disk is full"),  # when the first artifact is built
            (13, errno.EROFS, "read-only"),
            (15, errno.EACCES, "permission denied"),
            (17, errno.ENOSPC, "the disk is full"),
        ):
            state |= {"left": writes, "error": error}
            with pytest.raises(
                EditSweepError, match=rf"cannot write {tmp_path}.*{words}.*run the same command again"
            ):
                run(tmp_path / "r")
            kept.append(len(rows(tmp_path / "r")))
    assert kept == sorted(kept) and 0 == kept[0] < kept[-1] < len(reference)
    assert run(tmp_path / "r").exit_code == 0
    assert rows(tmp_path / "r") == reference


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_full_disk(
    tmp_path: Path, home: dict[str, str], reference: list[dict[str, Any]], engine: str
) -> None:
    """A small file system, which is made larger afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")

    def start() -> Command | Fork:
        spec, folder = spec_file(tmp_path), disk / "r"
        return launch_local(spec, folder) if engine == "local" else launch(spec, folder, home)

    try:
        (disk / "ballast").write_bytes(b"x" * (150 << 10))
        process = start()
        text = output_of(process)
        assert process.returncode == 2, text
        assert "the disk is full; repair it and run the same command again" in text
        assert "Traceback" not in text
        kept = len(rows(disk / "r"))
        assert kept < len(reference)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        process = start()
        text = output_of(process)
        assert process.returncode == 0, text
        assert rows(disk / "r") == reference
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert rows(disk / "r") == reference  # reading needs no writing
        if engine == "ray":
            return  # a driver that cannot take the lock never comes to its engine
        process = start()
        text = output_of(process)
        assert process.returncode == 2, text
        assert "read-only" in text
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# --- Ray ------------------------------------------------------------------------------------

LARGER: dict[str, Any] = {"dataset": TWELVE, "grid": {"T": [1, 6], "seeds": [0, 1]}}
"""Time enough for what is done to the processes that run it."""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("larger") / "r"
    assert run(folder, **LARGER).exit_code == 0
    return rows(folder)


def launch(spec: Path, folder: Path, home: dict[str, str], *more: str) -> Command:
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(spec), "--results", str(folder), *more]
    return Command(command, home)


def launch_local(spec: Path, folder: Path) -> Fork:
    return fork(main, "run", str(spec), "--results", str(folder), "--engine", "local")


QUICK_LOCK = (None, 0.2, 1.0)
"""Heartbeat and silence of a lock: as in earnest, who is silent has missed more than two beats."""


def main_with_quick_lock(*arguments: str) -> None:
    locking.acquire.__defaults__ = QUICK_LOCK
    main(*arguments)


def main(*arguments: str) -> None:
    from orchestrator.cli import main as command_line

    command_line.main(arguments)


def spec_file(folder: Path, **changes: Any) -> Path:
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump({**RAW, **changes}))
    return path


def shard_pids(folder: Path) -> list[int]:
    """Living processes that have claimed a shard of this folder which is not in the table yet."""
    found = set()
    for path in folder.glob("parts/*/*/attempt.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.add(int(json.loads(path.read_text())["value"]["worker"]["pid"]))
    return sorted(pid for pid in found if psutil.pid_exists(pid))


def committed(folder: Path) -> int:
    return len(list(folder.glob("parts/*/*/*.parquet")))


@pytest.mark.slow
def test_ray_equals_local_at_one_and_two_actors(
    tmp_path: Path, home: dict[str, str], reference: list[dict[str, Any]]
) -> None:
    for actors in ("1", "2"):
        process = launch(spec_file(tmp_path), tmp_path / actors, home, "--max-actors", actors)
        text = output_of(process)
        assert process.returncode == 0, text
        assert rows(tmp_path / actors) == reference
        assert "all 8 cells finished" in text
    assert not list((tmp_path / "2" / "logs").glob("ray-*/"))


@pytest.mark.slow
def test_ray_survives_a_killed_worker_and_ctrl_c(
    tmp_path: Path, home: dict[str, str], larger: list[dict[str, Any]]
) -> None:
    """A killed driver is one of the faults of tests/chaos."""
    spec, folder = spec_file(tmp_path, **LARGER), tmp_path / "r"
    process = launch(spec, folder, home, "--max-actors", "2")
    wait_for(lambda: committed(folder) >= 2, process)
    os.kill(wait_for(lambda: shard_pids(folder), process)[0], signal.SIGKILL)
    before = committed(folder)
    wait_for(lambda: committed(folder) > before + 1, process)
    process.send_signal(signal.SIGINT)
    text = output_of(process)
    assert process.returncode == 130, text
    assert "launching it again (try 2)" in text
    assert "continue with:" in text
    assert "Traceback" not in text
    assert 0 < len(rows(folder)) < len(larger)
    # the second run finishes
    process = launch(spec, folder, home)
    text = output_of(process)
    assert process.returncode == 0, text
    assert rows(folder) == larger
    assert not list(folder.glob("parts/*"))


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ray_does_not_wait_for_a_step_without_end(tmp_path: Path, home: dict[str, str], presses: int) -> None:
    """After the first Ctrl-C it waits some seconds, after the second not at all: here the step
    would never end."""
    setup = tmp_path / "runtime-env.yaml"
    setup.write_text("worker_process_setup_hook: tests.engine.mark_edits\n")
    endless = spec_file(
        tmp_path,
        methods=[{"method": "ft", "hparams": {"num_steps": 10**6, "lr": 1e-9}}],
        grid={"T": 6},
        engine={**RAW["engine"], "step_edits": 1000},
    )
    folder, mark = tmp_path / "r", tmp_path / "edits"
    environment = {**home, "EDITS_MARK": str(mark)}
    if presses == 2:
        environment["TUNE_FORCE_TRIAL_CLEANUP_S"] = "600"  # the first would wait longer than the test
    process = launch(endless, folder, environment, "--max-actors", "1", "--runtime-env", str(setup))
    wait_for(mark.exists, process)
    for press in range(presses):
        process.send_signal(signal.SIGINT)
        wait_for(lambda press=press: press or "stopping: " in process.said(), process)
    text = output_of(process)
    assert process.returncode == 130, text
    assert "run the same command again" in text or "continue with:" in text
    assert "Traceback" not in text
    assert committed(folder) == 0


def test_a_trial_ends_where_trying_again_would_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.engine.ray_engine.causes import TaskFailed
    from orchestrator.engine.ray_engine.trial import ShardTrial

    def step(error: Exception) -> dict[str, Any]:
        trial = ShardTrial.__new__(ShardTrial)

        def steps() -> Iterator[StepReport]:
            raise error
            yield

        trial._steps = steps()
        return trial.step()

    failed = {"kind": "ValueError", "message": "no", "storage": False}
    assert step(ValueError("no")) == {"done": True, "report": None, "failed": failed}
    for error in (OSError("no"), Superseded("no"), StoreError("write", "x", "no"), MemoryError()):
        with pytest.raises(TaskFailed) as caught:
            step(error)
        assert pickle.loads(pickle.dumps(caught.value)).cause == Cause.of(error)


def test_a_storage_fault_is_known_by_its_type() -> None:
    class Unusual(StoreError):
        """As stores may define for themselves."""

    full = StoreError("write", "x", "the disk is full")
    assert Cause.of(full) == Cause("StoreError", "cannot write x: the disk is full", storage=True)
    assert Cause.of(Unusual("write", "x", "no")).storage
    assert not Cause.of(
        Missing("read", "x", "no such file")
    ).storage  # another shard's objects may well be there
    assert not Cause.of(EditSweepError("StoreError: this is but a text")).storage
    for error in (full, Missing("read", "x", "no such file")):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), found.path, found.cause) == (
            type(error),
            str(error),
            "x",
            error.cause,
        )


@pytest.mark.slow
def test_what_a_ray_worker_raises_keeps_its_cause(tmp_path: Path, home: dict[str, str]) -> None:
    code = """
import sys
import ray
from ray import tune
from orchestrator.engine.causes import Cause
from orchestrator.engine.ray_engine.causes import TaskFailed, cause_of
from orchestrator.engine.ray_engine.run import _cause
from orchestrator.storage.base import StoreError

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")

@ray.remote(max_retries=0)
def fail(how):
    error = Odd(1, 2) if how == "odd" else StoreError("write", "x", "the disk is full")
    if how == "lost":
        import os; os._exit(1)
    if how == "plain":
        raise error
    raise TaskFailed(Cause.of(error)) from error

class Trial(tune.Trainable):
    def step(self):
        error = StoreError("write", "x", "the disk is full")
        raise TaskFailed(Cause.of(error)) from error

class Told(tune.Callback):
    causes = []
    def on_trial_recover(self, iteration, trials, trial, **info):
        self.causes.append(_cause(trial))
    on_trial_error = on_trial_recover

def cause(how):
    try:
        ray.get(fail.remote(how))
    except ray.exceptions.RayError as error:
        return cause_of(error)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
full = Cause("StoreError", "cannot write x: the disk is full", storage=True)
assert cause("storage") == cause("plain") == full, (cause("storage"), cause("plain"))
assert cause("odd").message == "1 and 2" and not cause("odd").storage, cause("odd")
lost = cause("lost")
assert lost.kind == "WorkerCrashedError" and lost.message and not lost.storage, lost
retried = tune.FailureConfig(max_failures=1)
config = tune.RunConfig(storage_path=sys.argv[1], failure_config=retried, callbacks=[Told()], verbose=0)
tune.Tuner(Trial, run_config=config).fit()
assert Told.causes == [full, full], Told.causes
"""
    ran = finished([sys.executable, "-c", code, tmp_path], env=home)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
def test_ray_builds_artifacts_first(tmp_path: Path, home: dict[str, str]) -> None:
    spec = spec_file(
        tmp_path,
        methods=["ft", {"method": "rome", "hparams": {"v_num_grad_steps": 2, "samples": 100}}],
        grid={"T": [6], "seeds": [0]},
    )
    process = launch(spec, tmp_path / "r", home)
    text = output_of(process)
    assert process.returncode == 0, text
    assert "artifact 1/" in text
    assert list((tmp_path / "r" / "artifacts").glob("*/*.safetensors"))


@pytest.mark.slow
def test_ray_address_that_does_not_answer(tmp_path: Path, home: dict[str, str]) -> None:
    process = launch(spec_file(tmp_path, ray={"address": "127.0.0.1:1"}), tmp_path / "r", home)
    text = output_of(process)
    assert process.returncode == 2, text
    assert "127.0.0.1:1 does not answer" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_port_that_is_not_ray(tmp_path: Path, home: dict[str, str]) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        spec = spec_file(tmp_path, ray={"address": address, "connect_seconds": 8})
        process = launch(spec, tmp_path / "r", home)
        text = output_of(process)
    assert process.returncode == 2, text
    assert "did not answer as a Ray cluster" in text or "cannot be used" in text


@pytest.mark.slow
def test_resources_no_node_has(tmp_path: Path, home: dict[str, str]) -> None:
    spec = spec_file(tmp_path, engine={"resources": {"cpu": 512}})
    process = launch(spec, tmp_path / "r", home)
    text = output_of(process)
    assert process.returncode == 2, text
    assert "an actor needs 512 cpu" in text
