"""Random histories of a sweep: changed, extended, shrunk, failed, forgotten, killed in the middle.

    spec, killed = random_history("s3://lab/x/r", random.Random(3), tmp_path, environment={"AWS_...": ...})
    check_end("s3://lab/x/r", spec, tmp_path / "fresh", killed)

A kill is one of a process with SIGKILL, between two commits of a shard: shards are under way then.
What a run of the last spec in a fresh folder gives is computed from its Parquet files by pyarrow
alone.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.engine.local import run_local
from orchestrator.engine.run_state import Outcome
from orchestrator.engine.sweep import run_sweep
from orchestrator.results import diff as comparing
from orchestrator.results import report
from orchestrator.results.forget import forget, look_up_superseded
from orchestrator.results.query import Results, open_results
from orchestrator.storage.open import open_store
from tests.engine import Stop, Watch, spec_of
from tests.processes import fork
from tests.waiting import hold, output_of, wait_for

FT = {"method": "ft", "hparams": {"num_steps": 3}}
ONE_LANE = {"lanes": 1, "shard_edits": 6, "step_edits": 2, "max_failures": 1}
"""Then rows have the same bits whichever others are run beside them."""

SMALL: dict[str, Any] = {"methods": [FT], "grid": {"T": [1, 3], "seeds": [0, 1]}, "engine": ONE_LANE}
"""Of the sweep of tests/engine.py: 24 final rows."""

CHANGES: tuple[Mapping[str, Any], ...] = (
    {"methods": [{"method": "ft", "hparams": {"num_steps": 2}}]},
    {"methods": [FT]},
    {"dataset": {"kind": "tinyworld", "edits": 6}},
    {"dataset": {"kind": "tinyworld", "edits": 3}},
    {"grid": {"T": [1, 3], "seeds": [1, 2]}},
    {"grid": {"T": [3], "seeds": [0, 1]}},
    {"methods": [FT, {"method": "grace", "hparams": {"n_iter": 2}}]},
)
FATES = ("whole", "whole", "killed", "stopped", "fails", "forgotten")

MEAN = (
    "SELECT method, T, avg(target_logprob) AS mean FROM {} WHERE scored = 'final' GROUP BY ALL ORDER BY ALL"
)
Means = dict[tuple[str, int], float]


def run_at(where: str, watch: Watch | None = None, retry: bool = False, **changes: Any) -> Outcome:
    """Run the sweep in a folder or a bucket."""
    return run_sweep(spec_of(**changes), open_store(where), run_local, watch or Watch(), retry_failed=retry)


def run_and_hold(where: str, changes: str, steps: int, marker: str) -> None:
    """Run the sweep in this process until so many steps with edits are committed; then wait."""
    run_at(where, Watch(_after(steps, lambda: hold(Path(marker)))), **json.loads(changes))


def _after(steps: int, act: Callable[[], None]) -> Callable[[Any], None]:
    left = steps

    def count(step: Any) -> None:
        nonlocal left
        left -= step.edits > 0
        if left == 0:
            act()

    return count


def random_history(
    where: str, rng: random.Random, scratch: Path, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Five runs with random changes and fates. Returns the changes of the last one, and the fates."""
    spec: dict[str, Any] = dict(SMALL)
    fates = []
    for number in range(5):
        spec = {**spec, **rng.choice(CHANGES)}
        fates.append(rng.choice(FATES))
        if fates[-1] == "killed":
            _kill(where, spec, rng.randrange(1, 4), scratch / f"kill-{number}", environment)
        elif fates[-1] == "stopped":
            try:
                run_at(where, Watch(_after(rng.randrange(1, 4), _stop)), **spec)
            except Stop:
                continue
        elif fates[-1] == "fails":
            _fail_sometimes(where, spec, rng.randrange(3))
        else:
            run_at(where, **spec)
            if fates[-1] == "forgotten":
                results = open_results(where)
                forget(results, look_up_superseded(results), lambda _: None)
    return spec, fates


def _stop() -> None:
    raise Stop


def _kill(
    where: str, spec: Mapping[str, Any], steps: int, marker: Path, environment: Mapping[str, str] | None
) -> None:
    process = fork(run_and_hold, where, json.dumps(spec), steps, str(marker), environment=environment)
    reached = Path(f"{marker}.reached")
    wait_for(lambda: reached.exists() or process.poll() is not None)
    process.kill()
    said = output_of(process)
    assert reached.exists() or process.returncode == 0, said


def _fail_sometimes(where: str, spec: Mapping[str, Any], unlucky: int) -> None:
    """Run the sweep with an FT that fails on about a third of the requests."""
    from workers.methods.ft import FT as method

    edit = method.edit

    def sometimes(self: Any, overlay: Any, lanes: Any) -> Any:
        if len(lanes[0].requests[0].prompt) % 3 == unlucky:
            raise FloatingPointError("out of luck")
        return edit(self, overlay, lanes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "edit", sometimes)
        run_at(where, **spec)


# --- what the readers say -------------------------------------------------------------------


def final_rows(folder: Path) -> list[dict[str, Any]]:
    """Final rows of a folder that holds one sweep's rows alone, by pyarrow and nothing else."""
    return [
        row
        for path in sorted(folder.glob("table/*.parquet"))
        for row in pq.ParquetFile(path).read().to_pylist()
        if row["scored"] == "final"
    ]


def mean_by_method_and_T(rows: list[dict[str, Any]]) -> Means:
    values: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        values[row["method"], row["T"]].append(row["target_logprob"])
    return {key: sum(found) / len(found) for key, found in sorted(values.items())}


def means_of(folder: Path) -> Means:
    return mean_by_method_and_T(final_rows(folder))


def told_by_sql(results: Results, view: str = "edits") -> Means:
    return {(r["method"], r["T"]): r["mean"] for r in results.sql(MEAN.format(view)).to_pylist()}


def told_by_pandas(results: Results) -> Means:
    frame = results.to_pandas(["method", "T", "scored", "target_logprob"])
    final = frame[frame["scored"] == "final"]
    return {
        key: float(value) for key, value in final.groupby(["method", "T"])["target_logprob"].mean().items()
    }


def check_readers(where: str, spec: Mapping[str, Any], fresh: Path) -> None:
    """Run the last spec in a fresh folder. All readers of the other one give its means over the rows
    that are there, and over all of them once they are made; and nothing else differs."""
    assert run_at(str(fresh), **spec).exit_code == 0
    results = open_results(where)
    key = ("cell_id", "group", "position")
    there = [
        tuple(row[name] for name in key)
        for row in results.table([*key, "scored"]).to_pylist()
        if row["scored"] == "final"
    ]
    assert len(set(there)) == len(there)
    rows = {tuple(row[name] for name in key): row for row in final_rows(fresh)}
    so_far = mean_by_method_and_T([rows[place] for place in there])
    assert told_by_sql(results) == pytest.approx(so_far, abs=1e-12)
    assert told_by_pandas(results) == pytest.approx(so_far, abs=1e-12)

    assert run_at(where, retry=True, **spec).exit_code == 0
    results, expected = open_results(where), means_of(fresh)
    assert told_by_sql(results) == pytest.approx(expected, abs=1e-12)
    assert told_by_pandas(results) == pytest.approx(expected, abs=1e-12)
    summary = report.summary(results)
    assert [(row["method"], row["T"]) for row in summary] == list(expected)
    undisturbed = report.summary(open_results(fresh))
    assert [{**row, "causes": None} for row in summary] == [{**row, "causes": None} for row in undisturbed]
    assert comparing.compare(results, open_results(fresh), ["shard_id"]).same
