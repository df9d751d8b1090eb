"""Real processes, started at once or as a command, that a test can kill, stop, wake and listen to.

    process = fork(learner.main, "run", str(spec), "--engine", "local", environment={"LEARNER_HOLD": ...})
    wait_for(lambda: progress_of(folder) >= 5, process)
    process.kill()
    text = output_of(process)

A fork is a copy of a server process that has imported everything already: it takes no time to
start, where an interpreter that imports PyTorch and Transformers anew takes seconds.
:class:`Command` is the interpreter started anew.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    "boto3",
    "pandas",  # Arrow imports it on first use
    "orchestrator.cli.calls",
    "orchestrator.engine.local",
    "orchestrator.engine.sweep",
    "tests.learner",
    "tests.shards",
    "transformers.models.llama.modeling_llama",
    "workers.session",
    "workers.stream",
]


def forks() -> Any:
    """Return the multiprocessing context whose processes start quickly and cleanly: no threads of
    this process are copied.

    Their environment is that of the first call, whichever test made it. Barriers and queues of
    processes come from here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class _Heard:
    """A process whose standard output and error are one text, which can be read while it runs."""

    pid: int

    def __init__(self) -> None:
        self._output = tempfile.NamedTemporaryFile(prefix="said-")  # noqa: SIM115 (removed with this object)

    def said(self) -> str:
        """Return what the process has written so far."""
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)


class Fork(_Heard):
    """A function that runs in a copy of the server process."""

    def __init__(
        self, target: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str]
    ) -> None:
        super().__init__()
        self._process = forks().Process(
            target=_call, args=(target, arguments, dict(environment), self._output.name)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        found: int | None = self._process.exitcode
        return found

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, *, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.said(), None


def fork(target: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> Fork:
    """Run ``target(*arguments)``, a function of a module, in a process of its own; ``environment``
    is added to its own."""
    return Fork(target, arguments, environment or {})


class Command(_Heard):
    """A command, in a session of its own so that the signals a test sends reach nothing else."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        super().__init__()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def communicate(self, *, timeout: float | None = None) -> tuple[str, None]:
        self._process.wait(timeout)
        return self.said(), None


def _call(
    target: Callable[..., None], arguments: tuple[str, ...], environment: Mapping[str, str], output: str
) -> None:
    os.setsid()
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update(environment)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    target(*arguments)
