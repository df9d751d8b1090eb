"""The same table from either engine, at any number of actors, after any interruption."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator import lock as locking
from orchestrator.execute import Outcome, ResultsError, StepReport, View, run_sweep
from orchestrator.journal import Journal
from orchestrator.local import run_local
from orchestrator.plan import Plan, Shard
from orchestrator.query import open_results
from orchestrator.spec import RaySpec, SweepSpec, parse_spec
from orchestrator.store import LocalStore
from workers.models import EMBEDDED
from workers.types import EditSweepError

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = {"edit_seconds", "score_seconds", "peak_memory_bytes", "run_id", "attempt"}
RAW: dict[str, Any] = {
    "name": "engine",
    "model": {"name": EMBEDDED, "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 12},
    "grid": {"T": [1, 6], "seeds": [0, 1]},
    "methods": [{"method": "ft", "hparams": {"num_steps": 4}}, {"method": "grace", "hparams": {"n_iter": 4}}],
    "scoring": {"generated": False},
    "engine": {"lanes": 2, "shard_edits": 12, "step_edits": 3, "max_failures": 1},
}


class Watch:
    """A view that remembers; ``on_step`` may interfere."""

    def __init__(self, on_step: Callable[[StepReport], None] | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[StepReport] = []
        self.artifact_steps: list[tuple[str, int, int, str]] = []
        self.on_step = on_step

    def begin(self, plan: Plan) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None:
        self.artifact_steps.append((title, done, total, what))

    def artifact_ended(self, title: str) -> None: ...

    def shard_started(self, shard: Shard, title: str) -> None: ...

    def shard_step(self, step: StepReport) -> None:
        self.steps.append(step)
        if self.on_step:
            self.on_step(step)

    def shard_ended(self, shard_id: str, ok: bool) -> None: ...

    def end(self) -> None: ...


def spec_of(**changes: Any) -> SweepSpec:
    return parse_spec(yaml.safe_dump({**RAW, **changes}), "e.yaml", Path("/"))


def run(folder: Path, watch: View | None = None, **changes: Any) -> Outcome:
    return run_sweep(spec_of(**changes), LocalStore(folder), run_local, watch or Watch())


def rows(folder: Path) -> list[dict[str, Any]]:
    found = open_results(folder).table().to_pylist()
    found.sort(key=lambda r: (r["cell_id"], r["group"], r["position"], r["scored"], r["edits_applied"]))
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in found]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reference") / "r"
    outcome = run(folder)
    assert outcome.exit_code == 0
    assert outcome.unfinished == ()
    return rows(folder)


# --- the local engine ------------------------------------------------------------------------------------------------


def test_every_row_once(reference: list[dict[str, Any]]) -> None:
    assert len(reference) == 2 * 2 * 2 * 12 * 2  # methods, T, seeds, edits, moments
    final = [r for r in reference if r["scored"] == "final"]
    assert {r["edits_applied"] for r in final if r["T"] == 6} == {6}


def test_running_again_runs_nothing(tmp_path: Path) -> None:
    small = {"methods": ["ft"], "grid": {"T": [6], "seeds": [0]}}
    run(tmp_path / "r", **small)
    before = rows(tmp_path / "r")
    watch = Watch()
    assert run(tmp_path / "r", watch, **small).plan.shards == ()
    assert watch.steps == []
    more = run(tmp_path / "r", watch, methods=["ft"], grid={"T": [6], "seeds": [0, 1]})
    assert {cell.seed for shard in more.plan.shards for cell in more.plan.manifest(shard).job.cells} == {1}
    after = rows(tmp_path / "r")
    assert [r for r in after if r["seed"] == 0] == before
    assert len(after) == 2 * len(before)


class Stop(BaseException):
    """Ends the process's work as a kill would, as far as Python code can tell."""


def test_killed_at_any_step_the_table_is_the_same(tmp_path: Path, reference: list[dict[str, Any]]) -> None:
    """Every run dies after a few steps; with other lanes from the third run on, what has begun keeps its composition."""
    runs = 0
    while True:
        runs += 1
        left = [5]

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


def test_a_shard_that_raises_is_tried_again_and_fails_alone(
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
    error = next(iter(outcome.errors.values()))
    assert (error.kind, error.attempts) == ("FloatingPointError", 2)
    assert Path(error.log).is_file()
    assert "out of luck" in Path(error.log).read_text()
    assert run(tmp_path / "r").exit_code == 0
    assert rows(tmp_path / "r") == reference


def test_settings_may_change_between_runs(tmp_path: Path) -> None:
    """A shard that has begun is continued as it was planned, under other lanes; what is new is cut by the new settings."""

    def kill(step: StepReport) -> None:
        if step.edits:
            raise Stop

    small = {"methods": ["ft"], "grid": {"T": [3], "seeds": [0, 1]}}
    with pytest.raises(Stop):
        run(tmp_path / "r", Watch(kill), **small)
    begun = set(Journal(LocalStore(tmp_path / "r")).begun())
    outcome = run(tmp_path / "r", **small, engine={"lanes": 3, "shard_edits": 6, "step_edits": 6})
    assert outcome.exit_code == 0
    lanes = {(row["shard_id"] in begun, row["lanes"]) for row in rows(tmp_path / "r")}
    assert len(begun) == 1
    assert lanes == {(True, 2), (False, 2), (False, 3), (False, 1)}  # of seed 0 two groups were left, of seed 1 four


def test_other_sweep_other_scoring_other_folder(tmp_path: Path) -> None:
    small = {"methods": ["ft"], "grid": {"T": [12], "seeds": [0]}}
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


# --- one driver per folder -------------------------------------------------------------------------------------------


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
        "import os, sys; from orchestrator import lock; from orchestrator.store import LocalStore\n"
        "lock.acquire(LocalStore(sys.argv[1]), 'dead', print).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    said: list[str] = []
    with locking.acquire(store, "r2", said.append) as lock:
        assert lock.number == 2
    assert len(said) == 1
    assert "taking over" in said[0]


def test_an_owner_elsewhere_is_watched_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(locking.Owner, "alive_here", lambda self: None)
    with locking.acquire(store, "r1", said.append, beat_seconds=0.05) as first:
        with pytest.raises(locking.Locked):
            locking.acquire(store, "r2", said.append, silent_seconds=5)
        first._stop.set()  # the owner hangs
        assert first._thread is not None
        first._thread.join()
        with locking.acquire(store, "r3", said.append, silent_seconds=0.3) as second:
            first._stop.clear()  # and wakes up
            waker = threading.Thread(target=first._keep)
            waker.start()
            waker.join(5)
            assert first.lost
            with pytest.raises(locking.LockLost):
                first.check()
            second.check()
    assert locking.owner(store) is None


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    """Ray's files in a folder of their own; short, because socket paths are."""
    folder = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
    inside = {"HOME": str(folder / "h"), "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
    (folder / "h").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    yield {**environment, **inside, "PYTHONPATH": str(ROOT)}
    shutil.rmtree(folder, ignore_errors=True)


def launch(spec: Path, folder: Path, home: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(spec), "--results", str(folder), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def spec_file(folder: Path, **changes: Any) -> Path:
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump({**RAW, **changes}))
    return path


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("waited too long")


def shard_pids(folder: Path) -> list[int]:
    """Living processes that have claimed a shard of this folder which is not in the table yet."""
    found = set()
    for path in folder.glob("parts/*/*/attempt.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.add(int(json.loads(path.read_text())["value"]["worker"]["pid"]))
    return sorted(pid for pid in found if psutil.pid_exists(pid))


def committed(folder: Path) -> int:
    return len(list(folder.glob("parts/*/*/*.parquet")))


def run_ids(folder: Path) -> set[str]:
    """Runs that have claimed a shard which is not in the table yet."""
    found = set()
    for path in folder.glob("parts/*/*/attempt.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.add(json.loads(path.read_text())["value"]["run_id"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_equals_local_at_one_and_two_actors(
    tmp_path: Path, home: dict[str, str], reference: list[dict[str, Any]]
) -> None:
    for actors in ("1", "2"):
        process = launch(spec_file(tmp_path), tmp_path / actors, home, "--max-actors", actors)
        text, _ = process.communicate(timeout=280)
        assert process.returncode == 0, text
        assert rows(tmp_path / actors) == reference
        assert "all 8 cells finished" in text
    assert not list((tmp_path / "2" / "logs").glob("ray-*/"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_survives_killed_workers_ctrl_c_and_a_killed_driver(
    tmp_path: Path, home: dict[str, str], reference: list[dict[str, Any]]
) -> None:
    spec, folder = spec_file(tmp_path), tmp_path / "r"
    # a worker is killed, then the driver itself
    process = launch(spec, folder, home, "--max-actors", "2")
    wait_for(lambda: committed(folder) >= 2, process)
    os.kill(wait_for(lambda: shard_pids(folder), process)[0], signal.SIGKILL)
    before = committed(folder)
    wait_for(lambda: committed(folder) > before + 1, process)
    process.kill()
    text, _ = process.communicate()
    assert "launching it again (try 2)" in text
    assert "Traceback" not in text
    deadline = time.monotonic() + 30
    while shard_pids(folder) and time.monotonic() < deadline:  # Ray's processes follow their driver
        time.sleep(0.2)
    partial = len(rows(folder)) if (folder / "sweep.json").exists() else 0
    assert 0 < partial < len(reference)
    # the second run takes the lock over, and is interrupted
    old = run_ids(folder)
    process = launch(spec, folder, home)
    wait_for(lambda: run_ids(folder) - old, process)
    before = committed(folder)
    wait_for(lambda: committed(folder) > before, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "taking over" in text
    assert "continue with:" in text
    # the third finishes
    process = launch(spec, folder, home)
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    assert rows(folder) == reference
    assert not list(folder.glob("parts/*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_builds_artifacts_first(tmp_path: Path, home: dict[str, str]) -> None:
    spec = spec_file(
        tmp_path,
        methods=["ft", {"method": "rome", "hparams": {"v_num_grad_steps": 2}}],
        grid={"T": [12], "seeds": [0]},
    )
    process = launch(spec, tmp_path / "r", home)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert "artifact 1/" in text
    assert list((tmp_path / "r" / "artifacts").glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("address", "words"), [("ray://h:10001", "Ray Client is not supported"), ("somewhere", "not host:port or auto")]
)
def test_ray_addresses_of_no_use(address: str, words: str) -> None:
    from orchestrator.driver import ClusterError, _answers

    with pytest.raises(ClusterError, match=words):
        _answers(RaySpec(address=address))


@pytest.mark.slow
def test_ray_address_that_does_not_answer(tmp_path: Path, home: dict[str, str]) -> None:
    began = time.monotonic()
    process = launch(spec_file(tmp_path, ray={"address": "127.0.0.1:1"}), tmp_path / "r", home)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert "127.0.0.1:1 does not answer" in text
    assert "Traceback" not in text
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_port_that_is_not_ray(tmp_path: Path, home: dict[str, str]) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        spec = spec_file(tmp_path, ray={"address": address, "connect_seconds": 8})
        process = launch(spec, tmp_path / "r", home)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert "did not answer as a Ray cluster" in text or "cannot be used" in text


@pytest.mark.slow
def test_resources_no_node_has(tmp_path: Path, home: dict[str, str]) -> None:
    spec = spec_file(tmp_path, engine={"resources": {"cpu": 512}})
    process = launch(spec, tmp_path / "r", home)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert "an actor needs 512 cpu" in text
