"""A small sweep to run, a view that remembers, and what else tests of the engines share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from orchestrator.engine.local import run_local
from orchestrator.engine.run_state import Outcome, View
from orchestrator.engine.sweep import run_sweep
from orchestrator.engine.worker import StepReport
from orchestrator.planning.plan import Plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.planning.work import Shard
from orchestrator.results.query import open_results
from orchestrator.storage.local import LocalStore
from workers.model.config import EMBEDDED

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = {"edit_seconds", "score_seconds", "peak_memory_bytes", "run_id", "attempt"}
RAW: dict[str, Any] = {
    "name": "engine",
    "model": {"name": EMBEDDED, "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 6},
    "grid": {"T": [1, 3], "seeds": [0, 1]},
    "methods": [{"method": "ft", "hparams": {"num_steps": 3}}, {"method": "grace", "hparams": {"n_iter": 3}}],
    "scoring": {"generated": False},
    "engine": {"lanes": 2, "shard_edits": 6, "step_edits": 2, "max_failures": 1},
}
TWELVE = {"kind": "tinyworld", "edits": 12}


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
    """The rows that the last plan asks for."""
    return _stable(open_results(folder).table())


def every_row(folder: Path) -> list[dict[str, Any]]:
    """The same with the rows that it no longer asks for."""
    return _stable(open_results(folder).table(superseded=True).drop_columns("superseded"))


def _stable(table: pa.Table) -> list[dict[str, Any]]:
    found = _in_order(table.to_pylist())
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in found]


def placeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the shard: in another plan a group is part of another one."""
    return [{key: value for key, value in row.items() if key != "shard_id"} for row in _in_order(found)]


def _in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(
        found, key=lambda r: (r["cell_id"], r["group"], r["position"], r["scored"], r["edits_applied"])
    )


class Stop(BaseException):
    """Ends the process's work as a kill would, as far as Python code can tell."""


def stop_after(steps: int) -> Callable[[StepReport], None]:
    """What to do on each step, so that the work ends after ``steps`` steps with edits."""
    left = steps

    def count(step: StepReport) -> None:
        nonlocal left
        left -= step.edits > 0
        if left == 0:
            raise Stop

    return count


def run_in_pieces(folder: Path, steps: int, **changes: Any) -> tuple[Outcome, int]:
    """Run a sweep that is killed whenever ``steps`` steps with edits were made; the end of it, and
    how often that was."""
    killed = 0
    while True:
        try:
            return run(folder, Watch(stop_after(steps)), **changes), killed
        except Stop:
            killed += 1


def mark_edits() -> None:
    """Let this process touch the file that EDITS_MARK in its environment names whenever an edit of
    FT begins."""
    from workers.methods.ft import FT

    edit = FT.edit

    def marked(self: Any, overlay: Any, lanes: Any) -> Any:
        Path(os.environ["EDITS_MARK"]).touch()
        return edit(self, overlay, lanes)

    FT.edit = marked  # type: ignore[method-assign]
