"""A run's private folder, and a local Ray that only this user reaches.

A local Ray listens on loopback. Its token, its logs and its sockets lie in the run's folder, which
is created with mode 0700 and is gone after the run, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.tune.execution import class_cache

from orchestrator.planning.runtime_env import is_secret

LONGEST_PLACE = 20
"""The longest name of a temporary folder, in bytes, in which Ray's sockets can lie: a socket's whole
path has at most 107 bytes, of which Ray's own part takes 64 and this run's folder 23. In a longer
one's stead, /tmp is taken."""

_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

_TIDY = """
import os, shutil, sys, time
sys.stdin.buffer.read()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.lexists(sys.argv[1]):
        break
    time.sleep(0.1)
"""
"""The program that removes the folder of a run whose process is gone. Ray's processes may write for
a moment longer, so it tries again for ten seconds."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that nobody else can read. It is removed at the end, by a second process if this
    one is killed."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > LONGEST_PLACE:
        place = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="editsweep-", dir=place))
    tidier = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TIDY, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        assert tidier.stdin is not None
        with contextlib.suppress(OSError):
            tidier.stdin.close()
        tidier.wait()


@contextlib.contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Have Ray read its token from a new file in ``folder`` while it starts and runs. Nobody else can
    read that file, and no other Ray knows its token."""
    path = folder / "token"
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(file, secrets.token_hex(32).encode())
    finally:
        os.close(file)
    before = {name: os.environ.pop(name, None) for name in _TOKEN_VARIABLES}
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)  # without a mode, a local Ray turns tokens on itself
    _forget_token()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_token()


def _forget_token() -> None:
    """Have Ray's library read the token anew: it keeps the first one that it has read."""
    library: Any = ray._raylet
    library.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def credentials_stay() -> Iterator[None]:
    """Keep Tune from putting AWS keys of the driver's environment into the ``runtime_env`` of its
    actors, which Ray writes into its logs. Actors inherit them, or have those of their machine."""
    tune: Any = class_cache
    before = tune.ENV_VARS_TO_PROPAGATE
    tune.ENV_VARS_TO_PROPAGATE = {name for name in before if not is_secret(name)}
    try:
        yield
    finally:
        tune.ENV_VARS_TO_PROPAGATE = before


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have a Ray that is started inside listen on loopback only.

    ``ray.init`` has no option for it: it replaces 127.0.0.1 by the machine's address, but on systems
    where Ray forms no clusters. This is the switch that it asks there.
    """
    switch: Any = ray._private.ray_constants
    before = switch.ENABLE_RAY_CLUSTER
    switch.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        switch.ENABLE_RAY_CLUSTER = before
