"""Notice that Ray itself is gone: its control process (GCS), or this node's raylet.

Ray's own library notices it after a minute, and then ends the driver with a C++ stack.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from orchestrator.engine.ray_engine.preflight import ClusterError
from orchestrator.engine.run_state import RunState
from workers.types import EditSweepError

LOOK_SECONDS = 1.0
"""Pause between two looks."""

LEAVE_SECONDS = 8.0
"""Seconds after which the process ends by force: the main thread may wait in Ray's library for the
control process, where no signal reaches it."""

REFUSALS = 5
"""A cluster's control process counts as gone after so many refused connections in a row."""

_TAIL = 20_000
"""Bytes of each of Ray's logs that are kept."""


@contextlib.contextmanager
def noticing_loss(run_state: RunState, local: bool) -> Iterator[None]:
    """Raise :class:`ClusterError` in here when Ray is gone. ``local``: this run has started it."""
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path())
    look = _look_at_processes(node) if local else _look_at_addresses(node)
    lost: list[str] = []
    leaving = threading.Event()
    main = threading.main_thread()
    in_main = threading.current_thread() is main

    def watch() -> None:
        since = 0.0
        while not leaving.wait(LOOK_SECONDS):
            found = None if lost else look()
            if found is not None:
                lost.append(found)
                since = time.monotonic()
                _keep_logs(run_state, logs)
                if local:  # what waits for an answer of the others gets an error now
                    node.kill_all_processes(check_alive=False, allow_graceful=False)
            if lost and in_main and main.ident is not None:
                signal.pthread_kill(main.ident, signal.SIGUSR2)  # again, if a library caught the last one
            if lost and time.monotonic() - since > LEAVE_SECONDS:
                run_state.view.warn(_told(lost[0], run_state))
                os._exit(2)

    def handle(number: int, frame: FrameType | None) -> None:
        if lost and not leaving.is_set():
            raise ClusterError(_told(lost[0], run_state))

    before = signal.signal(signal.SIGUSR2, handle) if in_main else None
    watcher = threading.Thread(target=watch, name="noticing-loss", daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if lost and not isinstance(error, (SystemExit, ClusterError)):
            raise ClusterError(_told(lost[0], run_state)) from None  # a library has wrapped ours
        raise
    finally:
        leaving.set()
        watcher.join()
        if in_main:
            signal.signal(signal.SIGUSR2, before)


def _told(what: str, run_state: RunState) -> str:
    last_words = run_state.store.where(run_state.paths.log(f"ray-lost-{run_state.run_id}"))
    return (
        f"{what}, so nothing can be run any more; everything committed is kept. Run the same command again "
        f"to continue; Ray's last words are in {last_words}"
    )


def _look_at_processes(node: Any) -> Callable[[], str | None]:
    """A look at the processes of a Ray that this process has started."""
    names = {"gcs_server": "Ray's control process (GCS) has died", "raylet": "Ray's raylet has died"}
    watched = [
        (info.process, text) for kind, text in names.items() for info in node.all_processes.get(kind, ())
    ]

    def look() -> str | None:
        for process, text in watched:
            code = process.poll()
            if code is not None:
                return f"{text} ({f'by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})"
        return None

    return look


def _look_at_addresses(node: Any) -> Callable[[], str | None]:
    """A look at a cluster: whether its control process, and the raylet of this node, still accept
    connections."""
    host, _, port = str(node.gcs_address).rpartition(":")
    address = (host.strip("[]"), int(port))
    refused = {"gcs": 0, "raylet": 0}

    def look() -> str | None:
        for name, answers in (("gcs", _listens(address)), ("raylet", _listens(node.raylet_socket_name))):
            refused[name] = 0 if answers else refused[name] + 1
        if refused["gcs"] >= REFUSALS:
            return f"Ray's control process (GCS) at {node.gcs_address} no longer answers"
        if refused["raylet"] >= REFUSALS:
            return "the raylet of this node no longer answers"
        return None

    return look


def _listens(address: tuple[str, int] | str) -> bool:
    try:
        if isinstance(address, str):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(2.0)
                probe.connect(address)
        else:
            socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True


def _keep_logs(run_state: RunState, logs: Path) -> None:
    """Keep the ends of Ray's own logs, whose folder goes with the run."""
    parts = []
    for name in ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out"):
        with contextlib.suppress(OSError):
            parts.append(f"--- {name}\n{(logs / name).read_bytes()[-_TAIL:].decode(errors='replace')}\n")
    with contextlib.suppress(EditSweepError):
        run_state.store.replace(run_state.paths.log(f"ray-lost-{run_state.run_id}"), "".join(parts).encode())
