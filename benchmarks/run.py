"""The benchmarks of this folder, one after another; ends with one line per target. ``make bench``
calls it.

    python benchmarks/run.py                    # with --quick, those that fit into twenty minutes
    python benchmarks/run.py table plan         # these
    python benchmarks/run.py --full             # all, with more repeats: hours

Each runs in a process of its own with one torch thread and has ``--minutes`` of its own. One that
fails or takes longer is told, the others go on; then the exit code is 1. A target that is missed
(SHORT) is a measurement, not a failure. What is last in line is left out, and told, where the
machine is so slow that the time is up before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import LOG, verdict

HERE = Path(__file__).resolve().parent
LAST = ("products", "memory", "resume")
"""Begin after all others, in this order, and only if it is likely that they end in time."""
LEAST_MINUTES = 3.0
"""One of those is not begun with less than this left."""


def run(script: Path, arguments: Sequence[str], minutes: float | None) -> str:
    """Run one benchmark, at most so long; what went wrong, or nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], env=environment, cwd=HERE.parent, start_new_session=True
    )
    try:
        code = process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        return f"took longer than {minutes:g} minutes"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the actors it may have started
            process.wait()
    return f"ended with exit code {code}" if code else ""


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="*", help="without bench_ and .py (default: all)")
    made.add_argument(
        "--full", action="store_true", help="without --quick: more repeats, however long it takes"
    )
    made.add_argument(
        "--minutes", type=float, help="at most this long for each (default: 8; with --full no limit)"
    )
    made.add_argument(
        "--total", type=float, default=20.0, help="minutes to fit into, where none is named (default: 20)"
    )
    args = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    known = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    unknown = [name for name in args.names if name not in known]
    if unknown:
        LOG.error("unknown benchmarks %s; choices: %s", ", ".join(unknown), ", ".join(known))
        return 2
    in_line = sorted(known, key=lambda name: LAST.index(name) if name in LAST else -1)
    chosen = {name: known[name] for name in args.names or in_line}
    minutes = args.minutes if args.minutes is not None or args.full else 8.0
    began = time.perf_counter()
    latest = began + 60 * (args.total - LEAST_MINUTES)
    failed: dict[str, str] = {}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "targets.jsonl"
        for name, script in chosen.items():
            if name in LAST and time.perf_counter() > latest and not (args.names or args.full):
                left_out.append(name)
                continue
            clock = time.perf_counter()
            problem = run(script, [*([] if args.full else ["--quick"]), "--out", str(out)], minutes)
            if problem:
                failed[name] = problem
            LOG.info(
                "# %s: %.0f s%s\n",
                script.name,
                time.perf_counter() - clock,
                f", {problem}" if problem else "",
            )
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    LOG.info("# targets, after %.1f minutes", (time.perf_counter() - began) / 60)
    for line in lines:
        LOG.info("%s", verdict(line))
    if left_out:
        LOG.info(
            'LEFT   %s: no time was left; make bench BENCH="%s"', ", ".join(left_out), " ".join(left_out)
        )
    for name, problem in failed.items():
        LOG.info("FAILED %s %s", known[name].name, problem)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
