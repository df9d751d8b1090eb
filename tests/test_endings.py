"""How a run ends that is ended from outside, what is left of it, and who could reach it meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine import RAW, ROOT
from tests.processes import Command, fork
from tests.test_engine import committed, main, spec_file
from tests.waiting import output_of, wait_for

ENDLESS: dict[str, Any] = {
    "methods": [{"method": "ft", "hparams": {"num_steps": 10**6, "lr": 1e-9}}],
    "grid": {"T": 6},
    "engine": {**RAW["engine"], "step_edits": 1000},
}
"""A sweep whose first step would never end."""

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0000001",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-0002",
    "AWS_SESSION_TOKEN": "planted-session-0003",
    "HF_TOKEN": "hf_planted0004",
    "WANDB_API_KEY": "planted-wandb-0005",
}


def family(pid: int) -> list[psutil.Process]:
    """A process and everything it has started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def listening(pid: int) -> Iterator[tuple[str, str]]:
    """Who of a family listens on TCP, and on which address."""
    for process in family(pid):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield process.name(), connection.laddr.ip
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def working(folder: Path) -> list[Path]:
    return list(folder.glob("parts/*/*/attempt.json"))


def endless(tmp_path: Path, home: dict[str, str], *more: str) -> tuple[Command, Path]:
    """A run under Ray that has come to its first step."""
    folder = tmp_path / "r"
    words = ["run", str(spec_file(tmp_path, **ENDLESS)), "--results", str(folder), "--max-actors", "1", *more]
    process = Command([sys.executable, "-m", "orchestrator.cli", *words], home)
    wait_for(lambda: working(folder), process)
    return process, folder


def left_in(home: dict[str, str]) -> list[str]:
    """What is left in the temporary folder, but for the caches of libraries."""
    return [
        name for name in os.listdir(home["TMPDIR"]) if name != "h" and not name.startswith("torchinductor")
    ]


@pytest.mark.slow
def test_a_run_under_ray_is_private_and_ends_in_one_line(tmp_path: Path, home: dict[str, str]) -> None:
    """Ports, modes, credentials, and SIGTERM: one start of Ray for all of them."""
    home = {**home, **SECRETS}
    process, folder = endless(tmp_path, home)

    found = set(listening(process.pid))
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert {address for _, address in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found

    (private,) = [Path(home["TMPDIR"]) / name for name in left_in(home)]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "token").stat().st_mode) == 0o600
    assert len((private / "token").read_text()) == 64
    assert not (Path(home["HOME"]) / ".ray").exists()

    # the workers have the credentials, which they inherited ...
    workers = [p for p in family(process.pid) if p.name().startswith("ray::") and "Agent" not in p.name()]
    assert any(p.environ().get("HF_TOKEN") == SECRETS["HF_TOKEN"] for p in workers)
    # ... and no file has, neither Ray's nor ours
    files = [path for place in (private, folder) for path in place.rglob("*") if path.is_file()]
    assert any(path.name == "runtime_env_agent.log" for path in files)
    for path in files:
        data = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in data], path

    process.send_signal(signal.SIGTERM)
    text = output_of(process)
    assert process.returncode == 143, text
    assert text.count("ended by SIGTERM; run the same command again to continue") == 1
    for unwanted in ("Traceback", "***", "core_worker", "C++"):
        assert unwanted not in text
    assert left_in(home) == []
    assert not any(secret in text for secret in SECRETS.values())
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not [name for name, secret in SECRETS.items() if secret.encode() in path.read_bytes()], path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gcs_server", "Ray's control process (GCS) has died (by SIGKILL)"),
        pytest.param("raylet", "Ray's raylet has died (by SIGKILL)", marks=pytest.mark.long),
    ],
)
def test_a_lost_ray_is_told_in_our_words(tmp_path: Path, home: dict[str, str], name: str, words: str) -> None:
    process, folder = endless(tmp_path, home)
    (victim,) = [p for p in family(process.pid) if p.name() == name]
    victim.kill()
    text = output_of(process)
    assert process.returncode == 2, text
    assert text.count(words) == 1 and "Run the same command again to continue" in text
    assert "Traceback" not in text and "state-dump" not in text
    assert list((folder / "logs").glob("ray-lost-*"))
    wait_for(lambda: left_in(home) == [])


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_left_of_a_driver_that_was_killed(tmp_path: Path, home: dict[str, str]) -> None:
    process, _ = endless(tmp_path, home)
    assert left_in(home)
    process.kill()
    output_of(process)
    wait_for(lambda: left_in(home) == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_local_run(tmp_path: Path, number: signal.Signals) -> None:
    """What is committed is kept, and the exit code is the signal's."""
    folder = tmp_path / "r"
    spec = spec_file(tmp_path, grid={"T": 1}, dataset={"kind": "tinyworld", "edits": 1000})
    process = fork(main, "run", str(spec), "--results", str(folder), "--engine", "local")
    wait_for(lambda: committed(folder) >= 1, process)
    process.send_signal(number)
    text = output_of(process)
    assert process.returncode == 128 + number, text
    assert text.count(f"ended by {number.name}; run the same command again to continue") == 1
    assert "Traceback" not in text and committed(folder) >= 1


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    """As under ``nohup``."""
    code = (
        "import os, signal\n"
        "from orchestrator.engine.endings import ended_by_signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with ended_by_signal(print):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('still here')\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('not here')\n"
        "    except SystemExit as ended:\n"
        "        raise RuntimeError('a library put this in its place') from ended\n"
    )
    process = Command([sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)})
    text = output_of(process)
    assert "still here" in text and "not here" not in text
    assert "ended by SIGTERM" in text and process.returncode == 143, text


def test_a_cluster_that_no_longer_answers_is_lost(tmp_path: Path) -> None:
    """By address, where the processes are another's: several refusals in a row, of either of them."""
    from orchestrator.engine.ray_engine import loss

    class Node:
        def __init__(self, gcs: socket.socket, raylet: socket.socket) -> None:
            self.gcs_address = "{}:{}".format(*gcs.getsockname())
            self.raylet_socket_name = raylet.getsockname()

    for lost in ("GCS", "raylet"):
        gcs, raylet = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
        raylet.bind(str(tmp_path / lost))
        raylet.listen()
        look = loss._look_at_addresses(Node(gcs, raylet))
        assert look() is None
        (gcs if lost == "GCS" else raylet).close()
        assert [look() for _ in range(loss.REFUSALS - 1)] == [None] * (loss.REFUSALS - 1)
        found = look()
        assert found is not None and lost in found and "no longer answers" in found
        gcs.close()
        raylet.close()


def test_the_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's sockets fit into it, nobody else reads it, and it goes with whatever is in it."""
    from orchestrator.engine.ray_engine.private import LONGEST_PLACE, private_folder

    longest = "/" + "x" * (LONGEST_PLACE - 1)
    session = "session_2026-11-28_18-40-37_670768_4194304"  # the largest process id
    socket_path = f"{longest}/editsweep-abcdefgh/ray/{session}/sockets/plasma_store"
    assert len(socket_path) <= 107
    for place, inside in ((tmp_path / ("long" * 10), Path("/tmp")), (Path("/tmp"), Path("/tmp"))):
        place.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        with private_folder() as folder:
            assert folder.parent == inside and len(folder.name) == len("editsweep-abcdefgh")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "a" / "b").mkdir(parents=True)
        assert not folder.exists()
