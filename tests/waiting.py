"""Waiting for what other processes do: always for a condition, never for a time.

    wait_for(lambda: committed(folder) >= 2, process)     # fails at once if the process ends before that
    text = output_of(process)                             # its output, once it has ended
    ran = finished([sys.executable, "-c", code])          # runs a command to its end

How fast the machine is decides how long a test takes, never how it ends: the one limit here is
reached only by what hangs. It is shorter than pytest's own limit (``timeout`` in pyproject.toml),
because it can show what the process said.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

PATIENCE_SECONDS = 600.0


class Process(Protocol):
    """``subprocess.Popen``, or a fork of :mod:`tests.processes`."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[Any, Any]: ...


def wait_for(condition: Callable[[], Any], process: Process | None = None) -> Any:
    """Return the first true value of ``condition``. The end of ``process`` before that is a
    failure, and shows its output."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        ended = process is not None and process.poll() is not None
        found = condition()
        if found:
            return found
        assert not ended, process and process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("waited too long")


def output_of(process: Process) -> str:
    """Return what the process wrote until its end. One that hangs is killed and fails the test."""
    try:
        return str(process.communicate(timeout=PATIENCE_SECONDS)[0])
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"the process did not end: {process.communicate()[0]}") from None


def finished(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit code and its output, as text."""
    options = {"capture_output": True, "text": True, "timeout": PATIENCE_SECONDS, **options}
    return subprocess.run([str(word) for word in command], check=False, **options)


def stopped(pid: int) -> bool:
    """Tell whether a process that was sent SIGSTOP has stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stop(pid: int) -> None:
    """Send SIGSTOP and wait until the process has stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: stopped(pid))


def hold(marker: Path) -> None:
    """Say that this point is reached (``<marker>.reached``) and wait until ``marker`` exists."""
    Path(f"{marker}.reached").touch()
    while not marker.exists():
        time.sleep(0.01)
