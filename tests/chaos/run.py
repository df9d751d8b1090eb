"""Faults on purpose: kill, pause, remove and damage, run again, compare with an undisturbed run.

    python -m tests.chaos.run [--short] [--seed N] [--keep FOLDER]

Real processes under a real Ray, real files. Every sweep here is the same one; each gets a folder of
its own and a series of faults, then runs to its end, and its tables (the rows, what the models
wrote, the groups and the requests) must be the undisturbed ones in every column but times, memory
and which run and attempt wrote a row. After every death of a driver the rows there are must already
be right. What is done is drawn from the seed; when it happens
depends on the machine. The last line counts; exit code 1 if anything is lost, duplicated or
different.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.results.beside import STORED
from orchestrator.results.columns import VARYING
from orchestrator.results.query import open_results
from tests.waiting import PATIENCE_SECONDS, stop, wait_for

LOG = logging.getLogger("chaos")
ROOT = Path(__file__).resolve().parent.parent.parent

QUICK: dict[str, dict[str, Any]] = {
    "ft": {"num_steps": 6},
    "ft-ewc": {"num_steps": 4},
    "rome": {"v_num_grad_steps": 4},
    "rrome": {"v_num_grad_steps": 4},
    "memit": {"v_num_grad_steps": 4},
    "alphaedit": {"v_num_grad_steps": 4},
    "emmet": {"v_num_grad_steps": 4},
    "pmet": {"v_num_grad_steps": 3},
    "grace": {"n_iter": 6},
    "lora": {"num_steps": 4},
    "melo": {"num_iter": 4},
    "defer": {"n_iter": 4},
    "ultraedit": {},
    "simie": {},
    "mend": {"schedule": {"steps": 6, "batch_size": 4}},
    "malmen": {"schedule": {"steps": 6, "batch_size": 4}},
    "rledit": {"edit_size": 2, "schedule": {"steps": 3, "batch_size": 4}},
    "serac": {"schedule": {"steps": 6, "batch_size": 4}},
}
"""Every method whose edits leave a state behind, with few steps: what is tested is what becomes of
the state."""

WISE = {"n_iter": 4, "save_freq": 8, "merge_freq": 16}
SHORT_TOO = ("ft", "rome", "grace")
FEW = ("ft", "grace", "lora", "mend")
"""For the short form: weights, a codebook, an adapter and a trained network; WISE's memories
besides."""


def sweep(edits: int, names: Collection[str]) -> dict[str, Any]:
    """One group of many commits for every method, so that most faults fall into its middle; T=1 for
    some, too."""
    methods: list[dict[str, Any]] = [
        {"method": name, "hparams": hparams, "T": [1, edits] if name in SHORT_TOO else [edits]}
        for name, hparams in QUICK.items()
        if name in names
    ]
    methods += [
        {"method": "wise", "label": f"wise-{retrieve}", "hparams": {**WISE, "retrieve": retrieve}}
        for retrieve in (True, False)
    ]
    return {
        "name": "chaos",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": edits},
        "grid": {"T": [1, edits], "seeds": [0]},
        "methods": methods,
        "scoring": {"generated": False, "keep_outputs": "all"},
        "engine": {"lanes": 4, "shard_edits": 12, "step_edits": 4, "max_failures": 1000, "max_actors": 2},
    }


ELSEWHERE = (
    "import sys; from orchestrator.cli import main; from orchestrator.storage import lock\n"
    "lock.Owner.alive_here = lambda self: None\nmain.main(sys.argv[1:])"
)
"""The command line as on another machine: it cannot look the owner's process up and has to watch
its heartbeat."""


@dataclass(frozen=True)
class Wanted:
    """How many faults of each kind, in sweeps of which methods and of so many edits a cell."""

    actors: int
    drivers: int
    nodes: int
    pauses: int
    damages: int
    edits: int
    methods: Collection[str]


LONG = Wanted(actors=50, drivers=15, nodes=5, pauses=5, damages=10, edits=24, methods=QUICK)
SHORT = Wanted(actors=3, drivers=1, nodes=1, pauses=1, damages=2, edits=12, methods=FEW)


@dataclass
class Verdict:
    """What all comparisons found."""

    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    different: int = 0


Batch = dict[tuple[Any, ...], dict[str, Any]]


class Chaos:
    """One session: the undisturbed rows, and the faults."""

    def __init__(self, root: Path, seed: int, wanted: Wanted) -> None:
        self.root = root
        self.rng = random.Random(seed)
        self.verdict = Verdict()
        self.spec = root / "chaos.yaml"
        self.spec.write_text(yaml.safe_dump(sweep(wanted.edits, wanted.methods)))
        (root / "h").mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        inside = {
            "HOME": str(root / "h"),
            "TMPDIR": str(root),
            "RAY_TMPDIR": str(root),
            "OMP_NUM_THREADS": "1",
        }
        self.environment = {**clean, **inside, "PYTHONPATH": str(ROOT)}
        self.folders = 0
        began = time.monotonic()
        calm = self.folder()
        if self.finish(self.launch(calm, "local")):
            raise RuntimeError("the undisturbed run failed; see said.txt")
        self.expected, doubled = rows(calm)
        counts = Counter(str(table) for table, *_ in self.expected)
        assert counts.keys() == STORED.keys() and not doubled
        found = ", ".join(f"{count} of {table}" for table, count in counts.items())
        LOG.info("undisturbed: rows %s in %.0f s", found, time.monotonic() - began)

    # --- processes ---

    def folder(self) -> Path:
        self.folders += 1
        return self.root / f"r{self.folders}"

    def launch(self, folder: Path, engine: str, *more: str, elsewhere: bool = False) -> subprocess.Popen[str]:
        start = ["-c", ELSEWHERE] if elsewhere else ["-m", "orchestrator.cli"]
        command = [
            sys.executable,
            *start,
            "run",
            str(self.spec),
            "--results",
            str(folder),
            "--engine",
            engine,
            *more,
        ]
        with (self.root / "said.txt").open("a") as said:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=said,
                stderr=said,
                text=True,
                start_new_session=True,
            )

    def finish(self, process: subprocess.Popen[str]) -> int:
        """Wait for the end; a run that does not end is a failure of its own."""
        try:
            return process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            end(process)
            raise RuntimeError(
                f"a run did not end within {PATIENCE_SECONDS:.0f} seconds; see said.txt"
            ) from None

    def complete(self, folder: Path, engine: str = "local", *more: str, tries: int = 4) -> None:
        """Run again until everything is done, then compare everything."""
        for _ in range(tries):
            code = self.finish(self.launch(folder, engine, *more))
            if code == 0:
                break
        else:
            LOG.info("  not complete after %d runs (exit code %d)", tries, code)
        self.compare(folder, complete=True)

    def until(self, process: subprocess.Popen[str], what: Callable[[], bool]) -> bool:
        """Wait for ``what``; False if the run ended before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None:
            if what():
                return True
            if time.monotonic() > deadline:
                end(process)
                raise RuntimeError(f"nothing moved for {PATIENCE_SECONDS:.0f} seconds; see said.txt")
            time.sleep(0.02)
        return False

    def progress(self, process: subprocess.Popen[str], folder: Path, commits: int) -> bool:
        """Wait for so many more commits of the run, then a random moment more."""
        seen = marks(folder)
        moved = self.until(process, lambda: len(marks(folder) - seen) >= commits)
        time.sleep(self.rng.uniform(0, 0.4))
        return moved and process.poll() is None

    def under_way(self, commits: int, engine: str, *more: str) -> tuple[Path, subprocess.Popen[str]]:
        """Start the sweep in a new folder and wait for so many commits.

        On a busy machine a run may end before this process has its turn; then another is started.
        """
        while True:
            folder = self.folder()
            process = self.launch(folder, engine, *more)
            if self.progress(process, folder, commits):
                return folder, process
            if self.finish(process):
                raise RuntimeError("a run failed before anything was done to it; see said.txt")
            self.compare(folder, complete=True)
            commits = max(1, commits // 2)

    # --- comparing ---

    def compare(self, folder: Path, complete: bool) -> None:
        """Add to the verdict what this folder's tables have too little, too much or wrong."""
        found, doubled = rows(folder) if (folder / "sweep.json").exists() else ({}, 0)
        different = sum(self.expected.get(key) != row for key, row in found.items())
        lost = len(self.expected.keys() - found.keys()) if complete else 0
        self.verdict.lost += lost
        self.verdict.doubled += doubled
        self.verdict.different += different
        if complete or lost or doubled or different:
            LOG.info("  %d rows: %d lost, %d doubled, %d different", len(found), lost, doubled, different)

    def fault(self, kind: str, text: str) -> None:
        self.verdict.faults[kind] += 1
        LOG.info("  %s %d: %s", kind, self.verdict.faults[kind], text)

    # --- the faults ---

    def kills(self, actors: int, drivers: int) -> None:
        """Workers and drivers killed at random moments under Ray, until both counts are reached."""
        left = Counter(actor=actors, driver=drivers)
        while left.total() > 0:
            folder = self.folder()
            LOG.info("sweep %s: kills of actors and drivers", folder.name)
            done = False
            while not done:
                process = self.launch(folder, "ray")
                quota = self.rng.randint(1, 5)
                while quota and left["actor"] > 0 and self.progress(process, folder, self.rng.randint(1, 2)):
                    pids = workers(folder)
                    if pids:
                        pid = self.rng.choice(pids)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            self.fault("actor", f"worker {pid} killed")
                            left["actor"] -= 1
                            quota -= 1
                if left["driver"] > 0 and self.progress(process, folder, self.rng.randint(0, 2)):
                    process.kill()
                    process.wait()
                    self.fault("driver", f"driver {process.pid} killed")
                    left["driver"] -= 1
                    calm(folder)
                    self.compare(folder, complete=False)
                else:
                    done = self.finish(process) == 0
            self.compare(folder, complete=True)

    def nodes(self, count: int, pauses: int) -> None:
        """The second of two nodes is removed, or falls silent and wakes up as a zombie."""
        with self._stage() as (address, order):
            for i in range(count + pauses):
                pause = i >= count
                folder, process = self.under_way(
                    self.rng.randint(2, 6), "ray", "--set", f"ray.address={address}"
                )
                LOG.info("sweep %s: a node %s", folder.name, "is paused and wakes" if pause else "is removed")
                if pause:
                    order("pause")
                    self.progress(process, folder, self.rng.randint(3, 8))  # the other node goes on
                    order("mourn")
                    order("wake")
                    self.fault("pause", "a node and its workers stopped, declared dead, awake again")
                else:
                    order("remove")
                    self.fault("node", "removed")
                self.finish(process)
                order("renew")
                self.complete(folder)

    @contextlib.contextmanager
    def _stage(self) -> Iterator[tuple[str, Callable[[str], None]]]:
        with (self.root / "stage.txt").open("a") as said:
            stage = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.stage"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            )
        assert stage.stdin is not None and stage.stdout is not None
        stdin, stdout = stage.stdin, stage.stdout

        def answer(word: str) -> str:
            for line in stdout:
                if line.startswith(word):
                    return line.removeprefix(word).strip()
            raise RuntimeError("the cluster's process ended; see stage.txt")

        def order(word: str) -> None:
            stdin.write(f"{word}\n")
            stdin.flush()
            answer("done")

        try:
            yield answer("address"), order
            stdin.close()
            stage.wait(PATIENCE_SECONDS)
        finally:
            end(stage)

    def sleepers(self, count: int) -> None:
        """A driver stops in its tracks, another takes the folder over and finishes, the first wakes
        up."""
        for _ in range(count):
            folder, first = self.under_way(self.rng.randint(2, 12), "local")
            LOG.info("sweep %s: a paused driver", folder.name)
            stop(first.pid)
            second = self.launch(folder, "local", elsewhere=True)
            if self.rng.random() < 0.5:  # wakes when the other has just begun
                seen = marks(folder)
                self.until(second, partial(_moved, folder, seen))
                first.send_signal(signal.SIGCONT)
                self.finish(second)
            else:
                self.finish(second)
                first.send_signal(signal.SIGCONT)
            self.fault("pause", "a driver stopped, succeeded by another, awake again")
            self.finish(first)
            self.complete(folder)

    def damage(self, count: int) -> None:
        """Files are cut short or have a bit flipped between runs."""
        left = count
        while left > 0:
            folder = self.folder()
            LOG.info("sweep %s: damaged files", folder.name)
            for _ in range(min(left, self.rng.randint(1, 3))):
                process = self.launch(folder, "local")
                if self.progress(process, folder, self.rng.randint(2, 16)):
                    process.kill()
                process.wait()
                if self._spoil(folder):
                    left -= 1
            self.complete(folder)

    def _spoil(self, folder: Path) -> bool:
        files = [
            *folder.glob("parts/*/*/*.parquet"),
            *folder.glob("parts/*/*/*.safetensors"),
            *folder.glob("table/*.parquet"),
        ]
        if not files:
            return False
        path = self.rng.choice(sorted(files))
        data = bytearray(path.read_bytes())
        at = self.rng.randrange(len(data))
        if self.rng.random() < 0.5:
            path.write_bytes(data[:at])
            what = f"cut to {at} of {len(data)} bytes"
        else:
            data[at] ^= 1 << self.rng.randrange(8)
            path.write_bytes(data)
            what = f"a bit of byte {at} flipped"
        self.fault("damage", f"{path.relative_to(folder)} {what}")
        return True


# --- looking at a folder --------------------------------------------------------------------


def rows(folder: Path) -> tuple[Batch, int]:
    """The rows of every table by table and key, without what may differ, and how many keys came
    twice or more."""
    found: Batch = {}
    doubled = 0
    results = open_results(folder)
    for of in STORED.values():
        names = [column.name for column in of.columns if column.name not in VARYING]
        for row in results.table(names, of=of.name).to_pylist():
            key = (of.name, *(row[name] for name in of.key))
            doubled += key in found
            found[key] = row
    return found, doubled


def marks(folder: Path) -> set[str]:
    """Commits there are: parts of shards under way and files of the table."""
    return {str(path) for path in (*folder.glob("parts/*/*/*.parquet"), *folder.glob("table/*.parquet"))}


def _moved(folder: Path, seen: set[str]) -> bool:
    return bool(marks(folder) - seen)


def workers(folder: Path) -> list[int]:
    """Living processes that claimed a shard which is still under way."""
    found = set()
    for path in folder.glob("parts/*/*/attempt.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.add(int(json.loads(path.read_text())["value"]["worker"]["pid"]))
    return sorted(pid for pid in found if psutil.pid_exists(pid))


def calm(folder: Path) -> None:
    """Wait until a killed driver's workers have followed it."""
    wait_for(lambda: not workers(folder))


def end(process: subprocess.Popen[str]) -> None:
    """Nothing of the process's session stays."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few faults of each kind, about two minutes")
    parser.add_argument("--seed", type=int, help="what is done (default: drawn, and printed)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave everything in this new folder")
    parser.add_argument(
        "--only", choices=["kills", "nodes", "sleepers", "damage"], nargs="+", help="some of the faults"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    seed = random.SystemRandom().randrange(1 << 31) if args.seed is None else args.seed
    LOG.info("seed %d", seed)
    if args.keep:
        args.keep.mkdir(parents=True)
    # short: socket paths are bounded
    root = args.keep.resolve() if args.keep else Path(tempfile.mkdtemp(prefix="es-", dir="/tmp"))
    wanted = SHORT if args.short else LONG
    chaos = Chaos(root, seed, wanted)
    asleep = (wanted.pauses + 1) // 2
    parts: dict[str, Callable[[], None]] = {
        "kills": lambda: chaos.kills(wanted.actors, wanted.drivers),
        "nodes": lambda: chaos.nodes(wanted.nodes, wanted.pauses - asleep),
        "sleepers": lambda: chaos.sleepers(asleep),
        "damage": lambda: chaos.damage(wanted.damages),
    }
    began = time.monotonic()
    for name, part in parts.items():
        if not args.only or name in args.only:
            part()
    if not args.keep:
        shutil.rmtree(root, ignore_errors=True)
    found = chaos.verdict
    LOG.info(
        "%s; %.1f minutes",
        ", ".join(f"{kind} {n}" for kind, n in found.faults.items()),
        (time.monotonic() - began) / 60,
    )
    LOG.info(
        "faults %d, rows lost %d, duplicated %d, different %d",
        *(found.faults.total(), found.lost, found.doubled, found.different),
    )
    return 1 if found.lost or found.doubled or found.different else 0


if __name__ == "__main__":
    sys.exit(main())
