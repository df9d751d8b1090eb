"""Every file that a sweep leaves in its results folder, damaged in every way.

The files are found by a walk through a finished and a half done folder, so a new kind of file is
covered without a change here. Each case damages one file in a copy, asks `status` and `query`, runs
the sweep to its end and once more. ``python -m tests.test_every_file`` prints as a table what every
damage to one file of each kind did; ``--all`` tries every file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage import local
from tests.engine import Stop, Watch, placeless, rows, run, stop_after

Row = dict[str, Any]

FT: dict[str, Any] = {"method": "ft", "hparams": {"num_steps": 2}}
ROME: dict[str, Any] = {
    "method": "rome",
    "hparams": {"v_num_grad_steps": 1, "samples": 200, "precision": "float64"},
}
SWEEP: dict[str, Any] = {
    "dataset": {"kind": "tinyworld", "edits": 4},
    "grid": {"T": [1], "seeds": [0]},
    "methods": [FT],
    "engine": {"lanes": 2, "shard_edits": 4, "step_edits": 1, "checkpoint_seconds": 0, "max_failures": 1},
}
LATER: dict[str, Any] = {
    **SWEEP,
    "grid": {"T": [1, 4], "seeds": [0]},
    "methods": [FT, {**FT, "label": "ft2", "hparams": {"num_steps": 1}}, ROME],
}


@dataclass(frozen=True)
class State:
    """A results folder to damage, the sweep it is of, the rows that it answers with as it is, and
    those of the finished sweep."""

    name: str
    folder: Path
    sweep: Mapping[str, Any]
    present: list[Row]
    finished: list[Row]


def _release_nothing(folder: Path) -> None:
    """Let the lock be that of a process that has ended: this one still runs."""
    for claim in (folder / "lock").glob("*.json"):
        owner = json.loads(claim.read_text())
        claim.write_text(json.dumps({**owner, "started": 0.0}, sort_keys=True))


@contextlib.contextmanager
def _first_edit_raises() -> Iterator[None]:
    from workers.methods.ft import FT as Method

    edit = Method.edit
    left = 1

    def once(self: Any, overlay: Any, lanes: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "a bad moment")
        return edit(self, overlay, lanes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "edit", once)
        yield


class _StopInArtifact(Watch):
    """Ends the process, as a kill would, when the second moment is being computed and was saved."""

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None:
        if "inputs of layer" in what and done > total // 2:
            raise Stop


def prepare(folder: Path) -> list[State]:
    """A finished folder, made by two runs; and one whose third run was stopped in the middle of a
    group, after a failure, and whose fourth was stopped in the middle of an artifact."""
    done, half, end = folder / "finished", folder / "half done", folder / "end"
    more = {"dataset": {"kind": "tinyworld", "edits": 2}, "grid": {"T": [1], "seeds": [0, 1]}}
    assert run(done, **{**SWEEP, **more}).unfinished == ()  # seed 1 is superseded by the next plan
    assert run(done, **SWEEP).unfinished == ()
    _release_nothing(done)
    shutil.copytree(done, half)
    two = {**LATER, "methods": LATER["methods"][:2]}
    with pytest.raises(Stop), _first_edit_raises():
        run(half, Watch(stop_after(1)), **two)
    with pytest.raises(Stop):
        run(half, Watch(stop_after(1)), **two)
    with pytest.raises(Stop):
        run(half, _StopInArtifact(), **LATER)
    _release_nothing(half)
    shutil.copytree(half, end)
    assert run(end, **LATER).unfinished == ()
    # the artifacts of the end, as a finished folder has them
    shutil.copytree(end / "artifacts", done / "artifacts")
    finished = placeless(rows(end))
    return [
        State("finished", done, SWEEP, _rows(done), _rows(done)),
        State("half done", half, LATER, _rows(half), finished),
    ]


def _rows(folder: Path) -> list[Row]:
    return placeless(rows(folder))


# --- damages


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def _swap(path: Path, rng: random.Random) -> None:
    """Exchange it with a file of the same ending: in its folder, or the nearest there is."""
    root = next(parent for parent in path.parents if (parent / "lock").is_dir())
    others = [p for p in sorted(root.rglob("*")) if p.is_file() and p != path]
    alike = [p for p in others if p.suffix == path.suffix] or others
    other = max(alike, key=lambda p: (len(os.path.commonpath([p, path])), rng.random()))
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def _to_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("of somebody else")


def _to_link(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "one bit flipped": _flip,
    "cut": _cut,
    "emptied": lambda path, _: path.write_bytes(b""),
    "deleted": lambda path, _: path.unlink(),
    "swapped with a sibling": _swap,
    "replaced by a folder": _to_folder,
    "replaced by a link to nothing": _to_link,
    "no permission": lambda path, _: None,
    "I/O error": lambda path, _: None,
}
INJECTED = {"no permission": errno.EACCES, "I/O error": errno.EIO}


@contextlib.contextmanager
def unreadable(path: Path, number: int | None, held: Path) -> Iterator[None]:
    """Let this very file, whatever its name, raise an error of the operating system when the store
    opens it. ``held``: another name for it, so that no later file gets its inode."""
    if number is None:
        yield
        return
    os.link(path, held)
    inode, open_file = path.stat().st_ino, local._open_file

    def fail(opened: Path) -> Any:
        if opened.exists() and opened.stat().st_ino == inode:
            raise OSError(number, os.strerror(number))
        return open_file(opened)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_open_file", fail)
        patch.setattr(local, "READ_PAUSES", (0.0,))
        yield
    held.unlink()


# --- one case


class _Said(logging.Handler):
    """What the packages warn of."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def take(self) -> list[str]:
        found, self.texts = list(dict.fromkeys(self.texts)), []
        return found


@dataclass
class Outcome:
    """What one damage did. ``wrong``: what must not happen."""

    state: str
    file: str
    damage: str
    status: str
    query: str
    run: str
    wrong: list[str]


def kind_of(name: str) -> str:
    """``parts/3f2a/0002/attempt.json`` -> ``parts/*/*/attempt.json``"""
    parts = [re.sub(r"^[^.]*\d[^.]*", "*", part) for part in name.split("/")]
    return "/".join(parts)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _key(row: Row) -> str:
    return repr(sorted(row.items()))


def damaged(state: State, name: str, damage: str, scratch: Path) -> Outcome:
    """Damage one file of a copy, and ask everything of it."""
    rng = random.Random(f"{name} {damage}")
    folder = scratch / "copy"
    shutil.copytree(state.folder, folder)
    said = _Said()
    logger = logging.getLogger("orchestrator")
    logger.addHandler(said)
    found = Outcome(state.name, kind_of(name), damage, "", "", "", [])
    allowed = {_key(row) for row in state.finished}
    try:
        DAMAGES[damage](folder / name, rng)
        with unreadable(folder / name, INJECTED.get(damage), scratch / "held"):
            found.status = _ask_status(state, folder, said, found)
            found.query = _ask_query(state, folder, said, found, allowed)
            found.run = _run_to_the_end(state, folder, said, found, allowed)
    finally:
        logger.removeHandler(said)
        shutil.rmtree(folder)
    return found


def _ask_status(state: State, folder: Path, said: _Said, found: Outcome) -> str:
    try:
        status = read_status(str(folder))
    except Exception as error:
        found.wrong.append(f"status: {type(error).__name__}: {error}")
        return "fails"
    if status["sweep"] not in ("engine", None) or status["running"]:
        found.wrong.append(f"status: {status['sweep']}, {status['running']}")
    return _told(said.take())


def _ask_query(state: State, folder: Path, said: _Said, found: Outcome, allowed: set[str]) -> str:
    try:
        answer = _rows(folder)
        count = open_results(folder).sql("SELECT count(*) AS n FROM edits")["n"].to_pylist()[0]
    except Exception as error:
        found.wrong.append(f"query: {type(error).__name__}: {error}")
        return "fails"
    keys = [_key(row) for row in answer]
    told = said.take()
    if len(set(keys)) != len(keys) or not set(keys) <= allowed or count != len(keys):
        found.wrong.append(f"query: {len(keys)} rows, {len(set(keys) - allowed)} wrong, SQL counts {count}")
    if len(keys) < len(state.present) and not told and found.damage != "deleted":
        found.wrong.append(f"query: {len(keys)} of {len(state.present)} rows, and nothing is said")
    return f"{len(keys)} of {len(state.present)} rows; {_told(told)}"


def _run_to_the_end(state: State, folder: Path, said: _Said, found: Outcome, allowed: set[str]) -> str:
    watch = Watch()
    try:
        outcome = run(folder, watch, **state.sweep)
        answer = [_key(row) for row in _rows(folder)]
        told = [*said.take(), *watch.warnings]
        again = run(folder, Watch(), **state.sweep)
    except Exception as error:
        found.wrong.append(f"run: {type(error).__name__}: {error}")
        return "fails"
    if outcome.unfinished or len(answer) != len(allowed) or set(answer) != allowed:
        found.wrong.append(f"run: unfinished {outcome.unfinished}, {len(answer)} rows of {len(allowed)}")
    if again.plan.shards:
        found.wrong.append("run: something was left for the next run")
    if repeated := [text for text in said.take() if "moved to" in text]:
        found.wrong.append(f"run: told again: {repeated}")
    edits = sum(step.edits for step in watch.steps)
    return f"the rows, {edits} edits made; {_told(told)}"


def _told(texts: list[str]) -> str:
    """What was said, by kind."""
    words = {
        "moved to": "put aside",
        "left out": "left out",
        "instead": "copy read",
        "does not count": "not counted",
        "not committed": "not counted",
        "not begun": "not begun",
        "is unknown": "unknown",
        "name is": "name from the spec",
        "taking": "lock taken over",
        "state before": "state before",
        "from the start": "from the start",
        "missing": "missing",
        "cannot be read": "unread",
    }
    found = dict.fromkeys(
        next((word for mark, word in words.items() if mark in text), text[:60]) for text in texts
    )
    return ", ".join(found) or "as before"


# --- the matrix


def cases(states: list[State]) -> list[tuple[State, str, str]]:
    """Every damage of every file."""
    return [
        (state, name, damage) for state in states for name in files_of(state.folder) for damage in DAMAGES
    ]


def drawn(states: list[State], damages: int, kinds: int | None = None) -> list[tuple[State, str, str]]:
    """Some damages of one file of each kind, or of some kinds, drawn from a fixed seed."""
    rng = random.Random(20261128)
    of_kind: dict[tuple[str, str], list[tuple[State, str]]] = {}
    for state in states:
        for name in files_of(state.folder):
            of_kind.setdefault((state.name, kind_of(name)), []).append((state, name))
    chosen = list(of_kind) if kinds is None else rng.sample(list(of_kind), kinds)
    found = []
    for kind in chosen:
        state, name = rng.choice(of_kind[kind])
        found += [(state, name, damage) for damage in rng.sample(list(DAMAGES), damages)]
    return found


def as_table(outcomes: list[Outcome]) -> str:
    """A markdown table: each kind of file with each damage; files of one kind that fared alike are
    one line."""
    lines = [
        "| folder | file | damage | `status` | `query` | `run` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        cells = (o.state, f"`{o.file}`", o.damage, o.status, o.query, o.run, *o.wrong)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(dict.fromkeys(lines)) + "\n"


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[State]:
    return prepare(tmp_path_factory.mktemp("prepared"))


def test_the_folders_hold_every_kind_of_file(states: list[State]) -> None:
    found = {kind_of(name) for state in states for name in files_of(state.folder)}
    for kind in (
        "sweep.json",
        "plan.json",
        "lock/*.json",
        "lock/*.beat",
        "runs/*/run.json",
        "runs/*/spec.yaml",
        "parts/*/manifest.json",
        "parts/*/*/attempt.json",
        "parts/*/*/error.json",
        "parts/*/*/*.parquet",
        "parts/*/*/*.safetensors",
        "table/*.parquet",
        "logs/*.log",
    ):
        assert kind in found, found
    assert any(kind.startswith("artifacts/unfinished/") for kind in found), found


@pytest.mark.parametrize(
    "share",
    [
        "a few",
        pytest.param("three of each kind", marks=pytest.mark.slow),
        pytest.param("all", marks=pytest.mark.long),
    ],
)
def test_no_damage_of_any_file_stops_a_sweep(states: list[State], share: str, tmp_path: Path) -> None:
    """A case takes a second, for two runs of a sweep; all of them take minutes."""
    chosen = {"a few": drawn(states, 1, 6), "three of each kind": drawn(states, 3), "all": cases(states)}[
        share
    ]
    outcomes = [damaged(*case, tmp_path) for case in chosen]
    (tmp_path / "table.md").write_text(as_table(outcomes))
    assert not [o for o in outcomes if o.wrong], as_table([o for o in outcomes if o.wrong])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        states = prepare(Path(folder))
        chosen = cases(states) if "--all" in sys.argv else drawn(states, len(DAMAGES))
        outcomes = [damaged(*case, Path(folder)) for case in chosen]
    sys.stdout.write(as_table(outcomes))
    wrong = sum(bool(o.wrong) for o in outcomes)
    sys.stdout.write(f"\n{len(outcomes)} damages, {wrong} of them wrong\n")


if __name__ == "__main__":
    main()
