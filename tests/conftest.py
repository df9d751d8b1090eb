"""Fixtures of several files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.engine import ROOT

# no verdict of the clock: neither of an example's time nor of the time to draw one
settings.register_profile("editsweep", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("editsweep")

# the readline of the process that starts pytest's workers sets these, and tables would be as wide
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    """Ray's files in a folder of their own; short, because socket paths are."""
    folder = Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
    inside = {"HOME": str(folder / "h"), "TMPDIR": str(folder), "RAY_TMPDIR": str(folder)}
    (folder / "h").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    yield {**environment, **inside, "PYTHONPATH": str(ROOT)}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, standard output, standard error."""
    from orchestrator.cli.main import main

    def run_command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run_command
