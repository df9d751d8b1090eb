"""The benchmarks run (at sizes whose figures mean nothing), and one that fails does not take the
others with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import finished

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.slow

JUDGED = {"engine": 2, "memory": 3, "plan": 3, "resume": 4, "rollback": 4, "state": 3, "table": 2}
"""How many targets each judges."""

LONG = {"engine", "memory", "plan", "resume", "table"}


def python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home)}
    return finished([sys.executable, *arguments], env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in sorted(JUDGED)]
)
def test_a_benchmark_runs_and_judges_its_targets(name: str, tmp_path: Path) -> None:
    out = tmp_path / "targets.jsonl"
    done = python(str(BENCHMARKS / f"bench_{name}.py"), "--smoke", "--out", str(out), home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == JUDGED[name]
    assert done.stdout.count("\nPASS ") + done.stdout.count("\nSHORT") == len(lines)
    for line in lines:
        met = line["measured"] <= line["goal"] if line["sign"] == "<=" else line["measured"] >= line["goal"]
        assert line["verdict"] == ("PASS" if met else "SHORT")


def test_all_can_be_imported(tmp_path: Path) -> None:
    """A name that has moved is noticed here, for those that run in `make test-long` only."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"for n in {names}: importlib.import_module(n)"
    )
    done = python("-c", code, home=tmp_path)
    assert len(names) > 10 and done.returncode == 0, done.stderr[-2000:]


def test_a_benchmark_without_targets_tells_its_ratios(tmp_path: Path) -> None:
    done = python(str(BENCHMARKS / "bench_products.py"), "--smoke", home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\(\d+\.\d\dx\)$", done.stdout, re.MULTILINE)


def test_the_gpu_benchmark_runs_without_a_gpu_and_without_ray(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv = ['bench_gpu.py', '--smoke']\n"
        "import bench_gpu; bench_gpu.main()\n"
        "assert not {'ray', 'orchestrator', 'duckdb'} & set(sys.modules)"
    )
    done = python("-c", code, home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    for name in ("common.py", "run.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    (tmp_path / "bench_a.py").write_text("raise RuntimeError('broken')\n")
    (tmp_path / "bench_b.py").write_text(
        "from common import Report, parser\n"
        "report = Report('bench_b', parser(__doc__).parse_args())\n"
        "report.at_least('speed', 5.0, 4.0, 'x')\n"
        "report.at_most('cost', 5.0, 4.0, 'ms', 'a note')\n"
        "report.close()\n"
    )
    done = python(str(tmp_path / "run.py"), home=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-3:] == [
        "PASS   speed  5 x  (>= 4 x)",
        "SHORT  cost  5 ms  (<= 4 ms)  [a note]",
        "FAILED bench_a.py ended with exit code 1",
    ]
    done = python(str(tmp_path / "run.py"), "b", home=tmp_path)
    assert done.returncode == 0  # a target that is missed is a measurement
    assert python(str(tmp_path / "run.py"), "c", home=tmp_path).returncode == 2
    (tmp_path / "bench_a.py").unlink()
    (tmp_path / "bench_b.py").rename(tmp_path / "bench_memory.py")
    done = python(str(tmp_path / "run.py"), "--total", "3", home=tmp_path)
    assert done.stdout.splitlines()[-1] == 'LEFT   memory: no time was left; make bench BENCH="memory"'
    assert "speed" in python(str(tmp_path / "run.py"), "--total", "3", "memory", home=tmp_path).stdout
