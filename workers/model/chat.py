"""Chats rendered by a model's chat template, in a process of its own.

>>> renderer().render(template, {"bos_token": "<s>"}, [chat("Who?")], name="my-model")
['<s>[user] Who?\\n[assistant]']

A template comes with the model's folder. What it may take of processor time, memory and characters
is limited, and it has no clock: prompts would otherwise depend on the day of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from workers.model import render_chats
from workers.types import DataError

Chat = tuple[Sequence[Mapping[str, str]], bool]
"""Messages with ``role`` and ``content``, and whether the assistant's turn is begun after them."""


@dataclass(frozen=True)
class Limits:
    """The most that one batch may take. ``characters``: of one chat, besides eight times its
    messages' own."""

    cpu_seconds: int = 20
    memory_bytes: int = 512 << 20
    characters: int = 200_000


BATCH = 256
"""Chats that are rendered together at most."""


def chat(question: str, answer: str | None = None) -> Chat:
    """A chat of one question, with its answer or up to where the answer begins."""
    asked = {"role": "user", "content": question}
    if answer is None:
        return [asked], True
    return [asked, {"role": "assistant", "content": answer}], False


def parse_day(value: object) -> date | None:
    """The day that a text such as ``2024-07-26`` names; None if it names none."""
    try:
        return date.fromisoformat(value) if isinstance(value, str) and len(value) == 10 else None
    except ValueError:
        return None


class Renderer:
    """Renders chats in one child process, which is started at the first call and ends with this one.
    A batch that breaks a limit ends the child; the next call starts another."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], Any] | None = None

    def render(
        self,
        template: str,
        variables: Mapping[str, Any],
        chats: Sequence[Chat],
        name: str,
        day: date | None = None,
    ) -> list[str]:
        """The text of each chat. ``name``: the template's, for messages. ``day``: what a template's
        ``strftime_now`` says; None: the template has no such function.

        Raises :class:`DataError` if the template fails or breaks a limit.
        """
        asked = {"template": template, "variables": dict(variables), "day": day and day.isoformat()}
        texts: list[str] = []
        with self._lock:
            for at in range(0, len(chats), BATCH):
                texts += self._ask({**asked, "chats": list(chats[at : at + BATCH])}, name)
        return texts

    def _ask(self, asked: Mapping[str, Any], name: str) -> list[str]:
        child = self._running()
        assert child.stdin is not None and child.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asked).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise DataError(_failed(name, self._why_ended()))
        answer = json.loads(line)
        if "texts" in answer:
            found: list[str] = answer["texts"]
            return found
        problem, kind = answer["problem"], answer["kind"]
        if kind == "UndefinedError" and "strftime_now" in problem:
            raise DataError(
                f"chat_template: true, but the chat template of {name} asks for today's date, so that prompts "
                "would depend on the day of the run; give it a day: `template: {date: 2024-07-26}`"
            )
        if kind == "MemoryError":
            problem = f"it takes more than {self.limits.memory_bytes >> 20} MiB of memory"
        raise DataError(_failed(name, problem or kind))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner == os.getpid():
            return self._child
        limits = self.limits
        self._child = subprocess.Popen(
            [sys.executable, "-P", render_chats.__file__]
            + [str(limit) for limit in (limits.memory_bytes, limits.cpu_seconds, limits.characters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        self._owner = os.getpid()
        self._stop = weakref.finalize(self, _end, self._child)
        return self._child

    def _why_ended(self) -> str:
        child, self._child = self._child, None
        assert child is not None and self._stop is not None
        code = child.wait()
        self._stop()
        if code == -signal.SIGXCPU:
            return f"it takes more than {self.limits.cpu_seconds} seconds of processor time"
        if code < 0:
            return f"its process ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


@cache
def renderer() -> Renderer:
    """The renderer that all encoders of this process share."""
    return Renderer()


def _failed(name: str, problem: str) -> str:
    return f"chat_template: true, but {name}: the chat template fails: {problem}"


def _end(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _environment() -> dict[str, str]:
    """The child's environment: where its modules are, and no credentials."""
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": "/",
        "HF_HUB_OFFLINE": "1",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
