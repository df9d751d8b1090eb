"""Cells remember the code that made them: what counts as a change, whom it touches, what runs say
and what they redo."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import workers
from orchestrator.engine.local import run_local
from orchestrator.engine.run_state import Outcome
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.spec import load_spec
from orchestrator.results import code
from orchestrator.results.code import CellCode, CodeBook, code_of, outdated
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage.local import LocalStore
from tests.engine import RAW, Stop, Watch, placeless, rows, run, spec_of
from workers.methods import REGISTRY

FT = "workers/methods/ft.py"
FOLDERS = Path(__file__).parent / "data" / "folders"
LEFT_OUT = re.compile(
    r"workers\.(kernels|data(?!\.scripts)|inputs|methods\.easyedit|scoring\.registry)(\..*)?|workers|workers\.methods"
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the source files of ``workers``, which counts as the code that runs."""
    root = tmp_path / "sources"
    for path in Path(str(workers.__file__)).parent.rglob("*.py"):
        copy = root / path.relative_to(Path(str(workers.__file__)).parent.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(code, "workers", SimpleNamespace(__file__=str(root / "workers" / "__init__.py")))
    return root


def change(sources: Path, path: str = FT, text: str = "\nCHANGED = 1\n") -> None:
    with (sources / path).open("a") as file:
        file.write(text)


# --- what counts as a change ----------------------------------------------------------------

BEFORE = '''"""Doc."""

from dataclasses import dataclass


@dataclass
class A:
    """Doc."""

    x: int = 1
    """Of a field."""


def f(a: float, b: float) -> list[float]:
    """Doc."""
    # why
    total = a + 2.0 * b
    assert total, "text"
    return [total, a]
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ('"""Doc."""\n\nfrom', '"""Another."""\n\nfrom', False),
        ('class A:\n    """Doc."""', 'class A:\n    """Another,\n    longer."""', False),
        ('    """Of a field."""\n', "", False),
        ('list[float]:\n    """Doc."""\n', "list[float]:\n", False),
        ("    # why\n", "    # because\n\n", False),
        ("total = a + 2.0 * b", "total = (\n        a + (2.0 * b)\n    )", False),
        ("[total, a]", "[\n        total,\n        a,\n    ]", False),
        ('"text"', "'text'", False),
        ("2.0 * b", "3.0 * b", True),
        ("2.0 * b", "2 * b", True),
        ("2.0 * b", "True * b", True),
        ("a + 2.0", "a - 2.0", True),
        ("[total, a]", "[a, total]", True),
        ("[total, a]", "[total], a", True),
        ("[total, a]", "(total, a)", True),
        ("return [total, a]", "total = [total, a]", True),
        ('"text"', '"another"', True),
        ("x: int = 1", "x: int", True),
        ("x: int = 1", "x: int = None", True),
        ("@dataclass\n", "", True),
        ("b: float)", "*, b: float)", True),
        ("    assert", "    if a:\n        b = a\n    assert", True),
        ("return [total, a]", "return [total, a][0]", True),
        ("return [total, a]", "return None", True),
        ("return [total, a]", "return", True),
    ],
)
def test_syntax_counts_and_comments_docstrings_and_layout_do_not(
    old: str, new: str, counts: bool, sources: Path
) -> None:
    assert BEFORE.count(old) == 1
    path = "workers/rng.py"
    (sources / path).write_text(BEFORE)
    first = code_of("ft", sources)
    (sources / path).write_text(BEFORE.replace(old, new))
    second = code_of("ft", sources)
    assert (first[path] != second[path]) is counts
    assert {k: v for k, v in first.items() if k != path} == {k: v for k, v in second.items() if k != path}


@pytest.mark.parametrize(
    "path", ["workers/kernels/matmul.py", "workers/data/zsre.py", "workers/methods/easyedit.py"]
)
def test_kernels_and_readers_do_not_count(path: str, sources: Path) -> None:
    before = code_of("ft", sources)
    change(sources, path)
    assert code_of("ft", sources) == before


def test_how_texts_are_joined_counts(sources: Path) -> None:
    before = code_of("ft", sources)
    change(sources, "workers/data/scripts.py")
    assert {path for path, tree in code_of("ft", sources).items() if before[path] != tree} == {
        "workers/data/scripts.py"
    }


def test_a_method_that_is_defined_elsewhere_has_the_code_of_its_own_package(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By import path and by file, in a package and alone. Nothing of it runs."""
    lab = tmp_path / "elsewhere" / "edit_lab"
    (lab / "methods").mkdir(parents=True)
    (lab / "__init__.py").write_text('"""Our methods."""\nfrom . import common\n')
    (lab / "methods" / "__init__.py").write_text("raise RuntimeError('nothing runs')\n")
    (lab / "common.py").write_text("import numpy\nSCALE = 2.0\n")
    (lab / "unused.py").write_text("X = 1\n")
    mine = lab / "methods" / "mine.py"
    mine.write_text("from ..common import SCALE\nfrom workers.methods.base import Method\n# why\n")
    own = {"edit_lab/__init__.py", "edit_lab/common.py", "edit_lab/methods/__init__.py"}
    monkeypatch.syspath_prepend(str(lab.parent))
    found = code_of("edit_lab.methods.mine", sources)
    assert {path for path in found if not path.startswith("workers/")} == {*own, "edit_lab/methods/mine.py"}
    assert "workers/methods/base.py" in found and "workers/stream.py" in found
    assert "workers/methods/ft.py" not in found
    assert code_of(str(mine), sources) == found
    assert "edit_lab" not in sys.modules

    mine.write_text(mine.read_text().replace("# why", "# because"))
    assert code_of(str(mine), sources) == found
    (lab / "common.py").write_text("import numpy\nSCALE = 3.0\n")
    changed = code_of(str(mine), sources)
    assert {path for path in found if found[path] != changed[path]} == {"edit_lab/common.py"}
    change(sources, "workers/rng.py")
    assert code_of(str(mine), sources)["workers/rng.py"] != changed["workers/rng.py"]

    alone = tmp_path / "alone.py"
    alone.write_text("import beside\nfrom workers.methods.base import Method\n")
    (tmp_path / "beside.py").write_text("X = 1\n")
    assert {path for path in code_of(str(alone), sources) if "/" not in path} == {"alone.py"}
    for missing in ("edit_lab.methods.theirs", "no_such_lab.methods", str(tmp_path / "none.py")):
        with pytest.raises(ValueError, match=r"module '.*' (has no source|cannot be found)"):
            code_of(missing, sources)


def test_a_method_or_a_score_more_changes_no_other_methods_code(sources: Path) -> None:
    book, today = CodeBook({}), "workers.methods.ft"
    before = code_of("ft", sources)
    book.work("cell", book.today(today), 0)
    registry = sources / "workers/methods/__init__.py"
    registry.write_text(registry.read_text().replace('"ft":', '"new": "workers.methods.new:New",\n"ft":'))
    (sources / "workers/methods/new.py").write_text("from workers.rng import canonical\n")
    assert code_of("ft", sources) == before
    assert "workers/methods/new.py" in code_of("new", sources)
    (sources / "workers/scoring/new.py").write_text("NEW = 1\n")
    change(sources, "workers/scoring/registry.py", "\nfrom workers.scoring.new import NEW\n")
    assert CodeBook(stored(book)).compare({"cell": {0}}) == {"cell": CellCode(groups=1)}


def test_a_method_depends_on_its_own_file_and_on_no_other_methods(sources: Path) -> None:
    change(sources, "workers/methods/memit.py")
    for name in ("ft", "rome", "memit", "memit-mass"):
        changed = code_of(name, sources).items() - code_of(name, ROOT).items()
        assert {path for path, _ in changed} == (
            {"workers/methods/memit.py"} if name.startswith("memit") else set()
        )


ROOT = Path(str(workers.__file__)).parent.parent


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="'fft' is not in the registry; choices: ft, "):
        code_of("fft")


def test_whatever_a_method_imports_when_it_runs_counts() -> None:
    """Against Python's own account of what was imported. A session can build every kind of
    artifact; a method imports the builders of its own."""
    stream = re.findall(r"^from (workers\S+) import", (ROOT / "workers/stream.py").read_text(), re.MULTILINE)
    assert "workers.session" in stream and len(stream) > 10
    program = (
        "import json, sys\nfrom importlib import import_module\nloaded = {}\n"
        f"for module in {sorted({*stream} - {'workers.session'})!r}:\n    import_module(module)\n"
        "common = {n for n in sys.modules if n.startswith('workers')}\n"
        f"for name, target in {dict(REGISTRY)!r}.items():\n"
        "    before = set(sys.modules)\n"
        "    import_module(target.split(':')[0])\n"
        "    loaded[name] = sorted(n for n in set(sys.modules) - before if n.startswith('workers'))\n"
        "print(json.dumps([sorted(common), loaded]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    common, loaded = json.loads(done.stdout)
    for name, added in loaded.items():
        files = {
            path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in code_of(name)
        }
        needed = {
            m for m in {*common, *added, "workers.session", "workers.stream"} if not LEFT_OUT.fullmatch(m)
        }
        empty = {m for m in needed if (ROOT / m.replace(".", "/") / "__init__.py").exists()}
        assert needed - empty <= files, name
        assert not [m for m in files if LEFT_OUT.fullmatch(m)]


def test_no_torch_and_below_a_third_of_a_second_for_all_methods() -> None:
    program = (
        "import sys, time\nfrom orchestrator.results.code import CodeBook\nbest = 9.0\n"
        "for _ in range(5):\n    began, book = time.process_time(), CodeBook({})\n"
        f"    for module in {sorted({t.split(':')[0] for t in REGISTRY.values()})!r}:\n"
        "        book.today(module)\n"
        "    best = min(best, time.process_time() - began)\n"
        "print('torch' in sys.modules, best)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    torch, seconds = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 0.5, "0.2 s on an idle processor; two programs on one core take longer"


# --- the record of a cell -------------------------------------------------------------------


def stored(book: CodeBook) -> dict[str, Any]:
    """The book as plan.json holds it, for the next one."""
    cells = {cell_id: {"code": codes} for cell_id, codes in book.cells.items()}
    return dict(json.loads(json.dumps({"codes": book.to_json(), "cells": cells})))


def test_groups_are_counted_by_the_code_that_made_them(sources: Path) -> None:
    value: dict[str, Any] = {}

    def work(groups: int) -> None:
        nonlocal value
        book = CodeBook(value)
        book.work("cell", book.today("workers.methods.ft"), groups)
        value = stored(book)

    def found(groups: int) -> CellCode:
        return CodeBook(value).compare({"cell": range(groups)})["cell"]

    work(0)
    assert found(4) == CellCode(groups=4) and found(4).state == "same"
    change(sources)
    assert found(4) == CellCode(4, other=4, files=(FT,)) and found(4).state == "other"
    work(4)
    assert found(10) == CellCode(10, other=4, files=(FT,)) and found(10).state == "mixed"
    work(7)  # the same code again
    assert found(10) == CellCode(10, other=4, files=(FT,))
    change(sources, "workers/rng.py")
    assert found(10) == CellCode(10, other=10, files=(FT, "workers/rng.py"))
    work(10)
    assert found(12) == CellCode(12, other=10, files=(FT, "workers/rng.py"))
    (sources / "workers/rng.py").unlink()
    assert found(12).other == 12, "a file that is gone differs"
    work(0)  # all its rows were removed
    assert found(12) == CellCode(groups=12)


def test_code_that_came_and_made_nothing_leaves_no_mark(sources: Path) -> None:
    book = CodeBook({})
    original = (sources / FT).read_text()
    book.work("cell", book.today("workers.methods.ft"), 0)
    change(sources)
    changed = CodeBook(stored(book))
    changed.work("cell", changed.today("workers.methods.ft"), 3)
    assert len(changed.cells["cell"]) == 2
    (sources / FT).write_text(original)
    again = CodeBook(stored(changed))
    again.work("cell", again.today("workers.methods.ft"), 3)
    assert again.compare({"cell": range(5)})["cell"] == CellCode(groups=5)


def test_groups_whose_code_was_not_recorded_are_unknown() -> None:
    book = CodeBook({"cells": {"old": {}, "lost": {"code": [["gone", 0]]}}})
    assert book.compare({"old": {0, 1}, "lost": {0}, "empty": set()}) == {
        "old": CellCode(2, unknown=2),
        "lost": CellCode(1, unknown=1),
    }
    book.work("old", book.today("workers.methods.ft"), 2)
    assert book.compare({"old": range(5)}) == {"old": CellCode(5, unknown=2)}
    assert book.compare({"old": range(5)})["old"].state == "unknown"


# --- runs -----------------------------------------------------------------------------------


def cells_of(folder: Path, method: str) -> set[str]:
    planned, _ = open_results(folder).plan()
    return {cell_id for cell_id, cell in planned.items() if cell["method"] == method}


def redo(folder: Path, **changes: Any) -> tuple[Outcome, Watch]:
    watch = Watch()
    store = LocalStore(folder)
    return run_sweep(spec_of(**changes), store, run_local, watch, redo_outdated=True), watch


def states(folder: Path) -> dict[str, str]:
    return {cell["cell_id"]: cell["code"] for cell in read_status(str(folder))["cells"]}


def test_changed_code_is_said_and_redone_when_asked(sources: Path, tmp_path: Path) -> None:
    folder, watch = tmp_path / "r", Watch()
    run(folder, watch)
    assert not watch.warnings and outdated(open_results(folder)) == {}
    before = rows(folder)
    ids = {row["cell_id"] for row in before}
    ft = cells_of(folder, "ft")
    assert set(states(folder).values()) == {"same"} and len(ft) == 4 and len(ids) == 8

    change(sources)
    change(sources, "workers/methods/grace.py", '\n"""A text."""\n# a comment\n')
    outcome = run(folder, watch := Watch())
    assert not outcome.plan.shards and rows(folder) == before, "unasked, nothing is run again"
    (warning,) = watch.warnings
    assert f"4 of 8 cells were made by other code than today's; files that differ: {FT};" in warning
    assert "--redo-outdated" in warning
    assert outdated(open_results(folder)) == dict.fromkeys(ft, (FT,))
    status = read_status(str(folder))
    assert {c["cell_id"] for c in status["cells"] if c["code_differs"] == [FT]} == ft
    assert all(
        c["groups_by_other_code"] == (c["groups"] if c["cell_id"] in ft else 0) for c in status["cells"]
    )

    outcome, watch = redo(folder)
    assert not watch.warnings and outcome.exit_code == 0
    assert sum(step.edits for step in watch.steps) == sum(s.edits for s in outcome.plan.shards) > 0
    assert set().union(*map(outcome.plan.cell_ids, outcome.plan.shards)) == ft
    (note,) = [n for n in watch.notes if "run again from the start" in n]
    count = sum(row["cell_id"] in ft for row in before)
    assert f"their {count} rows were removed" in note
    assert placeless(rows(folder)) == placeless(before), "every row once: the code that ran was the same"
    assert set(states(folder).values()) == {"same"} and outdated(open_results(folder)) == {}
    outcome, watch = redo(folder)
    assert not outcome.plan.shards and not watch.warnings


def test_only_the_cells_that_are_asked_for_are_redone(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    run(folder)
    change(sources, "workers/stream.py")
    outcome = run_sweep(
        spec_of(), LocalStore(folder), run_local, Watch(), only=["method=ft,T=3"], redo_outdated=True
    )
    redone = set().union(*map(outcome.plan.cell_ids, outcome.plan.shards))
    assert len(redone) == 2
    assert {cell for cell, state in states(folder).items() if state == "same"} == redone
    assert {cell for cell, state in states(folder).items() if state == "other"} == {*states(folder)} - redone


def test_a_redo_says_which_artifacts_it_uses_again(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    changes: dict[str, Any] = {
        "methods": [{"method": "rome", "hparams": {"v_num_grad_steps": 2, "samples": 2000}}],
        "dataset": {"kind": "tinyworld", "edits": 1},
        "grid": {"T": [1], "seeds": [0]},
    }
    run(folder, **changes)
    change(sources, "workers/artifacts/stats.py")
    _, watch = redo(folder, **changes)
    (warning,) = watch.warnings
    assert "2 artifacts were built before and are used again (" in warning
    assert "second_moment" in warning and "templates" in warning and str(folder / "artifacts") in warning


def held_on_disk(folder: Path) -> dict[str, set[int]]:
    """Groups with any row in the files, read by pyarrow alone."""
    held: dict[str, set[int]] = {}
    for path in [*folder.glob("table/*.parquet"), *folder.glob("parts/*/*/*.parquet")]:
        for row in pq.ParquetFile(path).read(columns=["cell_id", "group"]).to_pylist():
            held.setdefault(row["cell_id"], set()).add(row["group"])
    return held


@pytest.mark.parametrize("rollback", ["group", "never"])
@pytest.mark.slow
def test_a_cell_of_two_codes_says_so_and_is_redone_as_a_whole(
    rollback: str, sources: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "methods": RAW["methods"][:1],
        "dataset": {"kind": "tinyworld", "edits": 12},
        "grid": {"T": [1, 3], "seeds": [0], "rollback": rollback},
        "engine": {**RAW["engine"], "lanes": 1, "step_edits": 1},
    }
    folder, whole = tmp_path / "r", tmp_path / "whole"
    run(whole, **changes)
    left = 5

    def stop(step: Any) -> None:
        nonlocal left
        left -= step.edits > 0
        if left == 0:
            raise Stop

    with pytest.raises(Stop):
        run(folder, Watch(stop), **changes)
    held = held_on_disk(folder)
    assert held
    change(sources)
    run(folder, watch := Watch(), **changes)
    assert any(f"files that differ: {FT}; " in w and "groups of both" in w for w in watch.warnings)
    assert placeless(rows(folder)) == placeless(rows(whole))
    cells = {cell["cell_id"]: cell for cell in read_status(str(folder))["cells"]}
    groups = {cell_id: cell["groups_by_other_code"] for cell_id, cell in cells.items()}
    assert {cell_id: count for cell_id, count in groups.items() if count} == {
        cell_id: len(found) for cell_id, found in held.items()
    }
    assert "mixed" in {cell["code"] for cell in cells.values()}
    _, watch = redo(folder, **changes)
    assert set(states(folder).values()) == {"same"}
    assert placeless(rows(folder)) == placeless(rows(whole))


@pytest.mark.slow
def test_a_redo_that_is_killed_is_finished_by_any_later_run(sources: Path, tmp_path: Path) -> None:
    folder, changes = tmp_path / "r", {"methods": RAW["methods"][:1]}
    run(folder, **changes)
    before = rows(folder)
    change(sources)

    def stop(step: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run_sweep(spec_of(**changes), LocalStore(folder), run_local, Watch(stop), redo_outdated=True)
    assert len(rows(folder)) < len(before)
    run(folder, watch := Watch(), **changes)
    assert not watch.warnings and set(states(folder).values()) == {"same"}
    assert placeless(rows(folder)) == placeless(before)


def test_more_edits_by_other_code_make_a_cell_of_both(sources: Path, tmp_path: Path) -> None:
    folder, methods = tmp_path / "r", {"methods": RAW["methods"][:1]}
    run(folder, **methods)
    change(sources)
    run(folder, **methods, dataset={"kind": "tinyworld", "edits": 12})
    for cell in read_status(str(folder))["cells"]:
        assert (cell["code"], cell["groups_by_other_code"]) == ("mixed", cell["groups"] // 2)


def test_failures_are_of_the_code_that_failed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.methods.ft import FT as Method

    folder, methods = tmp_path / "r", {"methods": RAW["methods"][:1]}

    def broken(*_: object) -> None:
        raise FloatingPointError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Method, "edit", broken)
        assert run(folder, **methods).exit_code == 1
    change(sources)
    outcome = run(folder, **methods)
    assert outcome.exit_code == 1 and set(states(folder).values()) == {"other"}
    outcome, _ = redo(folder, **methods)
    assert outcome.exit_code == 0 and set(states(folder).values()) == {"same"}


def test_folders_written_before_say_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "finished"
    shutil.copytree(FOLDERS / "finished", folder)
    assert set(states(folder).values()) == {"unknown"} and outdated(open_results(folder)) == {}
    before = rows(folder)
    spec = load_spec(FOLDERS / "finished.yaml", ())
    outcome = run_sweep(spec, LocalStore(folder), run_local, watch := Watch(), redo_outdated=True)
    assert not outcome.plan.shards and rows(folder) == before, "what is not known to differ stays"
    assert any("were made by code that was not recorded" in note for note in watch.notes)
    assert set(states(folder).values()) == {"unknown"}


def test_ids_do_not_depend_on_the_code(sources: Path, tmp_path: Path) -> None:
    small = {"methods": RAW["methods"][:1], "grid": {"T": [3], "seeds": [0]}}
    run(tmp_path / "a", **small)
    change(sources)
    run(tmp_path / "b", **small)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


# --- the command line -----------------------------------------------------------------------


def test_the_command_line_says_it(call: Any, sources: Path, tmp_path: Path) -> None:
    spec, folder = tmp_path / "s.yaml", tmp_path / "r"
    raw = {**RAW, "dataset": {"kind": "tinyworld", "edits": 3}, "grid": {"T": [1, 3], "seeds": [0]}}
    spec.write_text(yaml.safe_dump(raw))
    command = ("run", spec, "--engine", "local", "--results", folder)
    assert call(*command)[0] == 0
    code_, out, _ = call("status", folder)
    assert code_ == 0 and "other code" not in out
    change(sources)
    said = f"2 of 4 cells were made by other code than today's; files that differ: {FT}"
    assert said in call("status", folder)[1]
    assert said in call("plan", spec, "--results", folder)[2]
    code_, _, err = call(*command)
    assert code_ == 0 and said in err and "all done" in err
    code_, out, err = call(*command, "--redo-outdated")
    assert code_ == 0 and "run again from the start" in err and "all 4 cells finished" in out
    assert "other code" not in call("status", folder)[1]
