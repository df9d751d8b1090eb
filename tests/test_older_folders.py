"""Results folders that an earlier version wrote are read, continued, extended and tried again.

The folders lie in `tests/data/folders`; its README says how they were made. They were written on
another machine, so their numbers are compared with new ones within tolerances. Bit for bit are
compared: what was written with what is read back, and rows that the same test run has computed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.run_state import Outcome
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.spec import load_spec
from orchestrator.results.columns import COLUMNS, KEY, VARYING
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage.local import LocalStore
from orchestrator.storage.lock import acquire
from tests.engine import Watch

FOLDERS = Path(__file__).parent / "data" / "folders"
NAMES = ("failed", "finished", "killed", "stopped", "superseded")

Key = tuple[Any, ...]
Row = dict[str, Any]
Rows = dict[Key, Row]

PLANNED = {"shard_id", "lanes"}
"""Columns that another way of cutting the same cells into shards may change."""

SHARES = {c.name for c in COLUMNS if c.unit == "0..1"} | {"fluency", "fluency_base"}
"""Scores that jump where two logits are nearly equal."""

OF_THE_BASE = {c.name for c in COLUMNS if c.name.endswith("_base") or c.name.startswith("locality_")}
"""Scores for which the folder may already hold the base model's replies."""

TOLERANCE = 2e-3
"""A smaller instruction set moves these numbers by up to 7e-5; a state that is lost moves them by
0.1 and more."""


@pytest.fixture(scope="module")
def this_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How a lock names the machine the tests run on."""
    folder = tmp_path_factory.mktemp("lock")
    with acquire(LocalStore(folder), "r", say=print):
        claim = json.loads(next(folder.glob("lock/*.json")).read_text())
    return {key: claim[key] for key in ("host", "space")}


@pytest.fixture
def older(tmp_path: Path, this_machine: Mapping[str, str]) -> Callable[[str], Path]:
    """Copies a folder. Its last driver, now dead, ran on this machine: one elsewhere is watched for
    half a minute."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(FOLDERS / name, folder)
        for path in folder.rglob("*.json"):
            if path.parent.name in ("lock", "claim"):
                path.write_text(json.dumps(json.loads(path.read_text()) | this_machine))
        return folder

    return copy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Rows, int]]:
    """The rows that a new folder gets in one run of today's code, and how many edits were made."""

    def made(name: str, *overrides: str) -> tuple[Rows, int]:
        folder = tmp_path_factory.mktemp("undisturbed") / name
        _, watch = run(name, folder, *overrides)
        return rows(folder), edits(watch)

    return made


def run(name: str, folder: Path, *overrides: str, retry_failed: bool = False) -> tuple[Outcome, Watch]:
    spec, watch = load_spec(FOLDERS / f"{name}.yaml", overrides), Watch()
    return run_sweep(spec, LocalStore(folder), run_local, watch, retry_failed=retry_failed), watch


def edits(watch: Watch) -> int:
    return sum(step.edits for step in watch.steps)


def by_key(found: Iterable[Row]) -> Rows:
    found = list(found)
    keyed = {tuple(row[name] for name in KEY): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def rows(folder: Path) -> Rows:
    """Every row that the folder holds, superseded ones too."""
    return by_key(open_results(folder).table(superseded=True).drop_columns("superseded").to_pylist())


def written(folder: Path) -> Rows:
    """The rows as they stand in the files, read without editsweep."""
    files = [*folder.glob("table/*.parquet"), *folder.glob("parts/*/*/*.parquet")]
    return by_key(pa.concat_tables([pq.ParquetFile(file).read() for file in sorted(files)]).to_pylist())


def only(found: Rows, columns: Iterable[str]) -> Rows:
    """Some columns; floats as text that tells every bit."""
    names = list(columns)
    return {
        key: {name: row[name].hex() if isinstance(row[name], float) else row[name] for name in names}
        for key, row in found.items()
    }


def check_kept(found: Rows, before: Rows) -> None:
    """Every old row is still there with every bit, its times and its run included."""
    columns = next(iter(before.values())).keys()
    assert only({key: found[key] for key in before}, columns) == only(before, columns)


def check_alike(found: Rows, expected: Rows, columns: Iterable[str]) -> None:
    """The same rows, whichever processors computed them.

    Numbers agree within a tolerance; a score that counts right tokens may differ in one of twenty,
    because it jumps where rounding decides between two tokens.
    """
    assert found.keys() == expected.keys()
    counted, differing = 0, []
    for key, row in found.items():
        for name in set(columns) - VARYING - PLANNED - {"details"}:
            value, other = row[name], expected[key][name]
            if name in SHARES and value is not None and other is not None:
                counted += 1
                if value != pytest.approx(other, abs=TOLERANCE, nan_ok=True):
                    differing.append((key, name, value, other))
            elif isinstance(value, float) and isinstance(other, float):
                assert value == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), (key, name)
            else:
                assert value == other, (key, name)
    assert len(differing) <= counted / 20, differing


def columns_of(before: Rows) -> set[str]:
    """The columns that the older version wrote: what was added since is null in its rows."""
    return set(next(iter(before.values())))


# --- reading --------------------------------------------------------------------------------

CELLS = {  # finished, all; rows; cells that failed
    "failed": (0, 3, 4, {"ft", "ft-diverges", "grace"}),
    "finished": (6, 6, 48, set()),
    "killed": (0, 4, 2, set()),
    "stopped": (0, 4, 18, set()),
    "superseded": (1, 1, 17, set()),
}
SHARDS = {  # of what is under way: method -> committed ticks, all, attempts
    "failed": [("grace", 0, 3, 2), ("grace", 0, 3, 2)],
    "finished": [],
    "killed": [("ft", 1, 15, 1)],
    "stopped": [("grace", 2, 5, 1), ("lora", 3, 5, 2)],
    "superseded": [("wise", 1, 5, 1)],
}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read(
    name: str, older: Callable[[str], Path], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = older(name)

    def ask(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([arguments[0], str(folder), *arguments[1:]])
        out, err = capfdbinary.readouterr()
        assert ended.value.code == 0, err.decode()
        return out.decode()

    def files() -> dict[Path, str]:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    before, contents = written(folder), files()
    finished, cells, count, failed = CELLS[name]
    status = json.loads(ask("status", "--json"))
    assert (status["finished"], len(status["cells"]), status["running"]) == (finished, cells, None)
    assert {cell["method"] for cell in status["failed_cells"]} == failed
    under_way = [(*s["methods"], s["committed"], s["ticks"], s["attempts"]) for s in status["shards"]]
    assert sorted(under_way) == SHARDS[name]
    assert f"{finished} of {cells} cells finished" in ask("status")

    found = rows(folder)
    assert found.keys() == before.keys()
    assert len(found) == count
    check_kept(found, before)

    for view in ("outputs_all", "requests_all"):
        assert json.loads(ask("query", f"SELECT count(*) AS n FROM {view}", "--format", "json")) == {"n": 0}
    groups = open_results(folder).table(of="groups").to_pylist()
    assert all(row["failed"] and row["cause"] for row in groups)
    assert ({row["method"] for row in groups} - {"grace"}) == (failed - {"grace"})

    current = {cell["cell_id"]: cell for cell in status["cells"]}
    live = [row for row in before.values() if row["cell_id"] in current]
    for view, expected in (("edits_all", list(before.values())), ("edits", live)):
        question = f"SELECT method, count(*) AS n, avg(target_logprob) AS mean FROM {view} GROUP BY ALL"
        answer = [json.loads(line) for line in ask("query", question, "--format", "json").splitlines()]
        assert {line["method"] for line in answer} == {row["method"] for row in expected}
        for line in answer:
            values = [row["target_logprob"] for row in expected if row["method"] == line["method"]]
            assert (line["n"], line["mean"]) == (len(values), pytest.approx(sum(values) / len(values)))

    shown = {(cell["method"], cell["T"]) for cell in current.values()}  # without any row, too
    lines = [
        [word.strip() for word in line.split("|")]
        for line in ask("report", "--format", "markdown").splitlines()
    ]
    assert {(line[1], int(line[2])) for line in lines if len(line) > 3 and line[2].isdigit()} == shown
    assert files() == contents


@pytest.mark.parametrize("name", ["finished", "superseded"])
def test_what_is_finished_is_not_run_again(name: str, older: Callable[[str], Path]) -> None:
    folder = older(name)
    before = written(folder)
    outcome, watch = run(name, folder)
    assert (outcome.exit_code, outcome.plan.shards, watch.steps) == (0, (), [])
    check_kept(rows(folder), before)
    assert len(rows(folder)) == len(before)


# --- continuing -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_what_is_half_done_continues(
    name: str, older: Callable[[str], Path], undisturbed: Callable[..., tuple[Rows, int]]
) -> None:
    folder = older(name)
    before = written(folder)
    status = read_status(str(folder))
    outcome, watch = run(name, folder)
    assert (outcome.exit_code, outcome.unfinished) == (0, ())
    for shard in status["shards"]:
        first = next(step for step in watch.steps if step.shard_id == shard["shard_id"])
        assert (first.tick, first.edits) == (shard["committed"], 0)  # it goes on from there
    begun = [(artifact["kind"], artifact["done"], artifact["total"]) for artifact in status["artifacts"]]
    assert begun == ([("second_moment", 64, 200)] if name == "killed" else [])
    for kind, done, total in begun:
        told = [step[1] for step in watch.artifact_steps if step[0].startswith(kind) and step[2] == total]
        assert told[0] > done  # so does what was being built
    assert read_status(str(folder))["artifacts"] == []
    found = rows(folder)
    check_kept(found, before)
    check_alike(found, undisturbed(name)[0], columns_of(before))
    check_beside(folder, found, before)


def check_beside(folder: Path, found: Rows, before: Rows) -> None:
    """What earlier versions did not write is there for the rows that are new, and for them alone."""
    results = open_results(folder)
    final = {key for key in found.keys() - before.keys() if key[KEY.index("scored")] == "final"}
    outputs = {tuple(row[name] for name in KEY) for row in results.table(of="outputs").to_pylist()}
    assert outputs == final != set()
    groups = [(row["cell_id"], row["group"]) for row in results.table(of="groups").to_pylist()]
    assert len(groups) == len(set(groups)) > 0
    assert set(groups) <= {(key[0], key[1]) for key in final}
    cases = {row["case_id"] for row in found.values()}
    requests = results.table(of="requests").to_pylist()
    assert len(requests) == len({row["case_id"] for row in requests})
    assert {row["case_id"] for row in requests} == cases


# --- extending ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "alone"),
    [
        ("finished", "grid.seeds=[0,1]", "grid.seeds=[1]"),
        ("finished", "dataset.edits=6", "dataset.edits=6"),
        pytest.param("killed", "dataset.edits=12", "dataset.edits=12", marks=pytest.mark.slow),
    ],
)
def test_it_is_extended(
    name: str,
    more: str,
    alone: str,
    older: Callable[[str], Path],
    undisturbed: Callable[..., tuple[Rows, int]],
) -> None:
    """``alone`` asks a new folder for what ``more`` adds to the old one, or for more than that."""
    folder = older(name)
    before = written(folder)
    outcome, watch = run(name, folder, more)
    assert (outcome.exit_code, outcome.unfinished) == (0, ())
    found = rows(folder)
    check_kept(found, before)
    check_beside(folder, found, before)
    new = {key: row for key, row in found.items() if key not in before}
    expected, made = undisturbed(name, alone)
    assert new.keys() == expected.keys() - before.keys()
    check_alike(new, {key: expected[key] for key in new}, columns_of(before))
    if name == "finished":
        # nothing that these rows depend on was there before: one lane, and methods without
        # artifacts
        ours = {key for key, row in new.items() if row["algorithm"] in ("ft", "grace")}
        same = columns_of(before) - VARYING - PLANNED - OF_THE_BASE
        assert ours
        assert only({key: new[key] for key in ours}, same) == only({key: expected[key] for key in ours}, same)
        kept = {(key[0], key[1]): row["T"] for key, row in before.items()}
        added = {(key[0], key[1]): row["T"] for key, row in new.items()}
        assert not kept.keys() & added.keys()
        assert edits(watch) <= min(made, sum(added.values()))


# --- trying again ---------------------------------------------------------------------------


def test_what_failed_is_tried_again_when_asked(
    older: Callable[[str], Path], undisturbed: Callable[..., tuple[Rows, int]]
) -> None:
    folder = older("failed")
    before = written(folder)
    methods = {cell["cell_id"]: cell["method"] for cell in read_status(str(folder))["cells"]}
    # the shards that found no memory go on; the groups that failed are left alone
    outcome, _ = run("failed", folder)
    assert outcome.exit_code == 1
    assert sorted(methods[cell] for cell in outcome.unfinished) == ["ft", "ft-diverges"]
    assert sorted((methods[f["cell_id"]], f["group"], f["kind"]) for f in outcome.failed_groups) == [
        ("ft", 1, "FloatingPointError"),
        ("ft-diverges", 0, "diverged"),
        ("ft-diverges", 1, "diverged"),
    ]
    between = rows(folder)
    check_kept(between, before)
    outcome, _ = run("failed", folder, retry_failed=True)
    assert outcome.exit_code == 1
    assert [methods[cell] for cell in outcome.unfinished] == ["ft-diverges"]
    assert {(methods[f["cell_id"]], f["kind"]) for f in outcome.failed_groups} == {
        ("ft-diverges", "diverged")
    }
    found = rows(folder)
    check_kept(found, between)
    check_alike(found, undisturbed("failed")[0], columns_of(before))


# --- changed hyperparameters ----------------------------------------------------------------


def test_going_back_to_superseded_hyperparameters(
    older: Callable[[str], Path], undisturbed: Callable[..., tuple[Rows, int]]
) -> None:
    folder = older("superseded")
    before = written(folder)
    (shard,) = read_status(str(folder))["shards"]
    outcome, watch = run("superseded", folder, "methods.0.hparams.n_iter=3")
    assert (outcome.exit_code, watch.steps) == (0, [])  # these were finished
    outcome, watch = run("superseded", folder, "methods.0.hparams.n_iter=4")
    assert outcome.exit_code == 0
    assert {step.shard_id for step in watch.steps} == {shard["shard_id"]}
    assert edits(watch) == 3  # of four
    found = rows(folder)
    check_kept(found, before)
    (cell,) = shard["cells"]
    continued = {key: row for key, row in found.items() if row["cell_id"] == cell}
    expected, _ = undisturbed("superseded", "methods.0.hparams.n_iter=4")
    check_alike(continued, expected, columns_of(before))
