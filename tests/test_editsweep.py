"""The Python interface: a real small sweep is planned, run and read through it."""

from __future__ import annotations

import doctest
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import editsweep
from tests.engine import RAW, ROOT, VOLATILE, Watch
from tests.waiting import finished


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    raw: dict[str, Any] = {
        **RAW,
        "name": "tiny",
        "dataset": {"kind": "tinyworld", "edits": 2},
        "grid": {"T": [1, 2], "seeds": [0]},
        "methods": [{"method": "ft", "hparams": {"num_steps": 2}}],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def rows(folder: str | Path) -> list[dict[str, Any]]:
    found = editsweep.open_results(folder).table().drop_columns(sorted(VOLATILE)).to_pylist()
    return sorted(found, key=json.dumps)


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return finished([sys.executable, *arguments], cwd=folder, env=environment)


def test_the_example_in_the_packages_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    monkeypatch.chdir(tmp_path)
    tried = doctest.testmod(editsweep)
    assert tried.attempted >= 7
    assert tried.failed == 0
    assert (tmp_path / "results" / "ft" / "sweep.json").exists()


def test_the_example_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    monkeypatch.chdir(tmp_path)
    tried = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert tried.attempted >= 9
    assert tried.failed == 0


def test_the_page_names_every_argument() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for function in (editsweep.plan, editsweep.run):
        for name in inspect.signature(function).parameters:
            assert f"| `{name}` |" in page, name


def test_several_folders_are_one_table(spec_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        editsweep.run(spec_file, tmp_path / name, engine="local", only=["T=2"])
    both = editsweep.open_results(tmp_path / "one", tmp_path / "two").table()
    assert set(both.column("results").to_pylist()) == {str(tmp_path / "one"), str(tmp_path / "two")}


def test_plan_run_and_read(spec_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    before = editsweep.plan(spec_file, folder)
    assert (len(before.cells), before.edits_left) == (2, 3)  # T=2 makes the first edit for both
    assert not folder.exists()
    watch = Watch()
    outcome = editsweep.run(spec_file, folder, engine="local", view=watch)
    assert isinstance(outcome, editsweep.Outcome)
    assert (outcome.exit_code, outcome.unfinished, dict(outcome.errors)) == (0, (), {})
    assert outcome.folder == str(folder)
    assert watch.steps
    assert len(rows(outcome.folder)) > 0
    assert editsweep.plan(str(spec_file), str(folder)).shards == ()
    assert editsweep.plan(spec_file, folder, overrides=["grid.seeds=[0,1]"]).edits_left == 3
    again = Watch()
    assert editsweep.run(spec_file, folder, engine="local", view=again).exit_code == 0
    assert again.steps == []


@pytest.mark.slow
def test_the_command_gives_the_same_rows(spec_file: Path, tmp_path: Path) -> None:
    ran = python(
        "-m", "editsweep", "run", spec_file.name, "--results", "cli", "--engine", "local", folder=tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    outcome = editsweep.run(spec_file, tmp_path / "api", engine="local")
    assert rows(outcome.folder) == rows(tmp_path / "cli")


def test_a_part_of_the_cells_then_the_rest(spec_file: Path, tmp_path: Path) -> None:
    first = editsweep.run(spec_file, tmp_path / "r", engine="local", only=["T=2"])
    assert {row["T"] for row in rows(first.folder)} == {2}
    assert [cell.T for cell in editsweep.plan(spec_file, first.folder, only=["T=1"]).asked] == [1]
    assert {row["T"] for row in rows(editsweep.run(spec_file, first.folder, engine="local").folder)} == {1, 2}


def test_a_spec_that_was_read_before(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = editsweep.plan(spec_file, tmp_path / "none").spec
    assert isinstance(spec, editsweep.SweepSpec)
    changed = editsweep.plan(
        spec, tmp_path / "none", overrides=["grid.T=[2]", "methods=[{method: ft, label: a}]"]
    )
    assert (changed.spec.grid.T, changed.variants[0].label) == ((2,), "a")
    assert changed.spec.model_copy(update={"grid": spec.grid, "methods": spec.methods}) == spec
    monkeypatch.chdir(tmp_path)
    editsweep.run(spec, engine="local")
    assert len(rows("results/tiny")) > 0, "the folder of a sweep for which none is named"
    assert editsweep.plan(spec).shards == ()


def test_progress_goes_to_the_log(spec_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="editsweep"):
        editsweep.run(spec_file, tmp_path / "r", engine="local")
    told = [(record.levelname, record.message) for record in caplog.records if record.name == "editsweep"]
    assert told[0][0] == "INFO"
    assert re.fullmatch(r"2 cells, \d shards, 3 edits to make", told[0][1])
    assert any(level == "DEBUG" and "tick" in text for level, text in told)
    assert told[-1][1].endswith(": finished")


def test_mistakes_are_one_kind_of_error_that_names_the_spec(spec_file: Path, tmp_path: Path) -> None:
    for wrong, says in (
        (["grid.T=[3]"], "grid.T: 3 is larger"),
        (["dataset.edits=100000", "grid.T=[1]"], "100000 edits asked for"),
        (["model.trust_remote_code=true"], "say so trust_remote_code=True"),
    ):
        with pytest.raises(editsweep.EditSweepError, match=says) as caught:
            editsweep.plan(spec_file, tmp_path / "r", overrides=wrong)
        assert str(caught.value).startswith(str(spec_file))
    spec = editsweep.plan(spec_file, tmp_path / "r").spec
    with pytest.raises(editsweep.EditSweepError, match=r"the sweep 'tiny'.*: 100000 edits asked for"):
        editsweep.run(spec, tmp_path / "r", overrides=["dataset.edits=100000", "grid.T=[1]"])
    with pytest.raises(editsweep.EditSweepError, match="not a results folder"):
        editsweep.open_results(tmp_path / "nowhere")
    with pytest.raises(AttributeError, match="no attribute 'sweep'"):
        editsweep.sweep  # noqa: B018


def test_importing_it_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import editsweep\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - "
        "set(sys.stdlib_module_names)\n"
        "assert new == {'editsweep'}, new\n"
        "assert editsweep.EditSweepError.__module__ == 'workers.types'\n"
        "assert all(hasattr(editsweep, name) for name in editsweep.__all__)\n"
        "assert 'ray' not in sys.modules\n"
    )
    ran = python("-c", code, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_users_type_checkers_see_the_types(tmp_path: Path) -> None:
    assert all((ROOT / package / "py.typed").exists() for package in ("editsweep", "orchestrator", "workers"))
    ran = python("-m", "editsweep", "--version", folder=tmp_path)
    assert (ran.returncode, ran.stdout.partition(" ")[0]) == (0, "editsweep")
