"""Failures are grouped by cause, whichever request each of them names."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from orchestrator.cli.console import LiveView, RunView
from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.spec import load_spec
from orchestrator.results.causes import by_cause, cause_of
from orchestrator.results.query import open_results
from orchestrator.results.report import summary
from orchestrator.storage.local import LocalStore


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("DataError: case 1: no sentence", "DataError: case q-17/b: no sentence", True),
        ("DataError: case 1: prompt 'a b' lacks 'c'", "DataError: case 2: prompt \"it's\" lacks 'd'", True),
        ("ValueError: 12 tokens, at most 8", "ValueError: 1,024 tokens, at most 8", True),
        ("ValueError: nan\nmore", "ValueError: nan\nother", True),
        ("DataError: case 1: no sentence", "DataError: case 1: no subject", False),
        ("DataError: no sentence", "ValueError: no sentence", False),
    ],
)
def test_the_cause_of_a_message(one: str, other: str, same: bool) -> None:
    assert (cause_of(one) == cause_of(other)) is same


def test_counts_are_summed_by_cause() -> None:
    found = by_cause({"E: case 1: a": 1, "E: case 2: a": 3, "E: case 3: b": 2, "": 1})
    assert found == {"E: case 2: a": 4, "E: case 3: b": 2, "": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A spec of six requests, of which four have no unrelated sentence."""
    lines = [
        {
            "prompt": f"The harbour of Quellmar {i} lies in",
            "subject": f"Quellmar {i}",
            "target_new": "Ostvale",
            **({"unrelated": "Rain falls in autumn."} if i in (1, 4) else {}),
        }
        for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = {
        "name": "s",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "jsonl", "path": "data.jsonl", "edits": 6},
        "grid": {"T": [1]},
        "methods": ["wise"],
        "engine": {"lanes": 1, "step_edits": 1},
        "scoring": {"generated": False},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


@pytest.mark.parametrize("kind", [RunView, LiveView])
def test_a_run_shows_one_line_per_cause(kind: type[RunView], folder: Path) -> None:
    text = io.StringIO()
    view = kind(Console(file=text, width=200, force_terminal=kind is LiveView))
    run_sweep(load_spec(folder / "s.yaml"), LocalStore(folder / "r"), run_local, view)
    assert [count for _, count in view.causes.values()] == [4]
    last = [line for line in text.getvalue().splitlines() if "failed: " in line][-1]
    assert "failed: 4 x DataError: case" in last and "no unrelated sentence" in last


def test_every_reader_groups_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "s.yaml"), "--engine", "local", "--results", str(folder / "r")])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "warning: wise: 4 of 6 requests (first request 1, case '1')" in said
    assert said.count("first: wise T=1") == 1 and "\n  4 x DataError: case" in said
    with pytest.raises(SystemExit):
        main(["status", str(folder / "r")])
    assert capsys.readouterr().out.count("no unrelated sentence") == 1
    results = open_results(str(folder / "r"))
    [row] = summary(results)
    assert list(row["causes"].values()) == [4]
    assert results.sql("SELECT failed, cause FROM cells")["failed"].to_pylist() == [4]
