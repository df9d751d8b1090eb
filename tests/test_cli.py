"""The command line: what it prints, where it goes, how it ends."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator.cli import reading
from orchestrator.cli.console import Output, duration, safety_line, size
from orchestrator.cli.main import main
from orchestrator.engine.run_state import Safety
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.spec import parse_spec
from orchestrator.results.query import open_results
from orchestrator.storage.local import LocalStore
from tests.processes import fork
from tests.waiting import finished, output_of, wait_for

ROOT = Path(__file__).resolve().parent.parent
RAW: dict[str, Any] = {
    "name": "cli",
    "model": {"name": "embedded", "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 4},
    "grid": {"T": [1, 4], "seeds": [0]},
    "methods": [{"method": "ft", "label": "ft-3", "hparams": {"num_steps": 3}}],
    "scoring": {"generated": False},
}

Result = tuple[int, str, str]


@pytest.fixture
def call(capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capfdbinary.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out.decode(), err.decode()

    return run


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "cli.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path


@pytest.fixture(scope="module")
def results(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "r"
    with pytest.raises(SystemExit) as ended:
        main(["run", str(spec), "--engine", "local", "--results", str(folder)])
    assert ended.value.code == 0
    return folder


def fails(result: Result, code: int, words: Sequence[str]) -> None:
    assert result[0] == code, result
    for word in words:
        assert word in result[2], result[2]
    assert "Traceback" not in result[1] + result[2]


# --- plan and run ---------------------------------------------------------------------------


def test_plan_runs_and_writes_nothing(
    call: Any, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("plan", spec)
    assert code == 0
    for word in (
        "2 cells",
        "2 shards",
        "7 edits",
        "edits shared between T: 1 more",
        "ft-3",
        "memory/lane",
        "4 of 1000 requests of tinyworld",
        "results/cli",
    ):
        assert word in out
    assert list(tmp_path.iterdir()) == []


def test_plan_simulates_actors_and_learns_from_what_was_measured(
    call: Any, spec: Path, results: Path
) -> None:
    code, out, _ = call("plan", spec, "--actors", 3, "--results", results / "none")
    assert code == 0
    for word in (
        "schedule: 3 actors",
        "lower bound",
        "total/3",
        "ratio 1.",
        "CPU-hours",
        "nothing has been measured",
        "peak",
    ):
        assert word in out
    assert "schedule:" not in call("plan", spec, "--results", results / "none")[1]
    more = call("plan", spec, "--results", results, "--set", "grid.T=[1,2]", "--set", "engine.max_actors=2")[
        1
    ]
    for word in (
        "schedule: 2 actors",
        "of 1 (method, T) left, 0 were measured in this folder, 1 follow their method's",
    ):
        assert word in " ".join(more.split())
    fails(call("plan", spec, "--actors", 0), 2, ["--actors", "greater than or equal to 1"])


def test_plan_subtracts_what_is_done(call: Any, spec: Path, results: Path) -> None:
    assert "2 cells: all done" in call("plan", spec, "--results", results)[1]
    assert "4 edits to make" in call("plan", spec, "--results", results, "--set", "grid.T=[1,2]")[1]


def test_run_prints_the_summary_and_what_to_do_next(call: Any, spec: Path, results: Path) -> None:
    code, out, err = call("run", spec, "--engine", "local", "--results", results)
    assert code == 0
    assert "all done" in err
    assert "safety" not in err  # nothing was run
    for word in (
        "reliability",
        "right after the edit",
        "all 2 cells finished",
        "editsweep query",
        "editsweep status",
    ):
        assert word in out


def test_a_changed_hyperparameter_makes_new_cells_and_the_summary_shows_those(
    call: Any, spec: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    base = ("run", spec, "--engine", "local", "--results", folder, "--set", "grid.T=[4]")
    assert call(*base)[0] == 0
    code, out, _ = call(*base, "--set", "methods.0.hparams.num_steps=2")
    assert code == 0
    assert "the cell finished" in out
    count = "SELECT count(DISTINCT cell_id) AS n, count(DISTINCT hparams_id) AS h FROM edits"
    assert json.loads(call("query", folder, count, "--format", "json")[1]) == {"n": 1, "h": 1}
    assert json.loads(call("query", folder, f"{count}_all", "--format", "json")[1]) == {"n": 2, "h": 2}
    (line,) = [line.split() for line in call("report", folder)[1].splitlines() if "ft-3" in line]
    assert line[1:4] == ["4", "1", "4/4"]  # T, cells, done / asked


def test_the_summary_can_be_drawn(call: Any, results: Path, tmp_path: Path) -> None:
    picture = tmp_path / "summary.png"
    assert call("report", results, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    fails(call("report", results, "--plot", tmp_path / "x.gif"), 2, ["x.gif", ".png, .pdf, .svg"])
    fails(call("report", results, "--plot", tmp_path / "no" / "x.png"), 2, ["no folder"])


def test_default_results_folder(
    call: Any, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call("run", spec, "--engine", "local", "--set", "grid.T=[4]")
    assert code == 0
    assert re.search(
        r"safety: journal \d+\.\d s of \d+ actor-seconds, gather \d+\.\d s of \d+ s: \d+\.\d%\n", err
    )
    assert (tmp_path / "results" / "cli" / "sweep.json").is_file()


def test_a_failed_cell_is_named(
    call: Any, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.methods.ft import FT

    def broken(*_: object) -> None:
        raise FloatingPointError("[bold]out of luck[/bold]")

    monkeypatch.setattr(FT, "edit", broken)
    code, _, err = call(
        "run", spec, "--engine", "local", "--results", tmp_path / "r", "--set", "engine.max_failures=1"
    )
    assert code == 1
    for word in (
        "2 of 2 cells",
        "first: ft-3 T=",
        "group 0, edit 0",
        " 5 x FloatingPointError: [bold]out of luck[/bold]",  # four groups of T=1, one of T=4
    ):
        assert word in err
    assert err.rstrip().endswith("--retry-failed")
    status = json.loads(call("status", tmp_path / "r", "--json")[1])
    assert status["finished"] == 0
    shown = call("status", tmp_path / "r")[1]
    for cell in status["failed_cells"]:
        for failure in cell["failures"]:
            assert (failure["kind"], failure["message"]) == ("FloatingPointError", "[bold]out of luck[/bold]")
            assert "out of luck" in Path(failure["log"]).read_text()
    first = status["failed_cells"][0]["failures"][0]["log"]
    assert first.rpartition("/")[2] in shown.replace("\n", "").replace(" ", "")
    assert [line for line in shown.splitlines() if line.split()[:2] == ["5", "FloatingPointError:"]]
    assert "FloatingPointError: [bold]out of luck[/bold]" in " ".join(shown.split())
    monkeypatch.undo()
    again = ("run", spec, "--engine", "local", "--results", tmp_path / "r")
    fails(call(*again), 1, ["2 of 2 cells are not finished"])
    assert "groups failed before" in call("plan", spec, "--results", tmp_path / "r")[1]
    assert call(*again, "--retry-failed", "--only", "T=4")[0] == 0
    assert call(*again, "--retry-failed")[0] == 0


def test_forget_asks_first(
    call: Any, spec: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(results, folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out, err = call("forget", folder, "--cells", "T=4")
    assert code == 1
    assert "ft-3 T=4 seed=0" in out and "1 cell with 8 rows" in out
    assert "nothing was removed" in err
    assert pq.read_table(folder / "table" / "000001.parquet").num_rows == 16
    assert "removed: 1 cell, 8 rows" in call("forget", folder, "--cells", "T=4", "--yes")[1]
    assert "1 of 2 cells finished" in call("status", folder)[1]
    fails(call("forget", folder, "--cells", "T=5", "--yes"), 2, ["T=5", "there are T: 1, 4"])
    assert call("forget", folder, "--yes")[0] == 2
    assert call("run", spec, "--engine", "local", "--results", folder)[0] == 0
    assert "2 of 2 cells finished" in call("status", folder)[1]


def test_a_bug_leaves_its_traceback_in_the_logs(
    call: Any, spec: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.engine import sweep as execute

    def bug(*_: object, **__: object) -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr(execute, "run_sweep", bug)
    result = call("run", spec, "--engine", "local", "--results", results)
    fails(result, 1, ["this is a bug in editsweep", "KeyError"])
    path = Path(result[2].rsplit(" ", 1)[1].strip())
    assert path.parent == results / "logs"
    assert "nobody expected this" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "grid.T=[3]"], ["grid.T", "3 does not divide dataset.edits=4", "2 and 4"]),
        (["--set", "dataset.edits=5000", "--set", "grid.T=1"], ["dataset.edits", "5000", "1000"]),
        (["--set", "gird=1"], ["gird", "did you mean 'grid'"]),
        (["--set", "methods=[ice]"], ["ice", "choices: ft, "]),
        (["--set", "model.trust_remote_code=true"], ["trust_remote_code", "--trust-remote-code"]),
        (["--engine", "cloud"], ["cloud", "ray", "local"]),
        (["--max-actors", "0"], ["max-actors"]),
    ],
)
def test_bad_input(call: Any, spec: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    fails(call("run", spec, "--results", tmp_path / "r", "--engine", "local", *arguments), 2, words)
    assert not (tmp_path / "r").exists()


def test_missing_spec_and_malformed_record(call: Any, tmp_path: Path) -> None:
    fails(call("run", tmp_path / "no.yaml"), 2, ["no.yaml", "no such spec file"])
    (tmp_path / "data.jsonl").write_text('{"case_id": "1"}\n')
    bad = {**RAW, "dataset": {"kind": "jsonl", "path": "data.jsonl", "edits": 4}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    fails(call("plan", tmp_path / "bad.yaml"), 2, [str(tmp_path / "data.jsonl"), "prompt"])


def test_unknown_model_type(call: Any, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 10}))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    fails(call("plan", spec, "--set", f"model.name={tmp_path / 'm'}"), 2, ["bert", "llama"])


def test_folder_of_another_sweep(call: Any, spec: Path, results: Path) -> None:
    result = call("run", spec, "--engine", "local", "--results", results, "--set", "name=other")
    fails(result, 2, ["'cli'", "'other'", "--results"])


@pytest.mark.slow
def test_no_write_permission(spec: Path, tmp_path: Path) -> None:
    """In a process of its own, which gives up root's right to write anywhere."""
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    process = fork(_as_anyone, "run", str(spec), "--engine", "local", "--results", str(shut / "r"))
    said = output_of(process)
    assert process.returncode == 2, said
    assert "permission denied" in said.lower()
    assert str(shut) in said.replace("\n", "")
    assert "Traceback" not in said
    assert not any(shut.iterdir())


def _as_anyone(*arguments: str) -> None:
    """Run the command line without the capabilities that let root pass over file permissions
    (capset(2))."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, the lower and the upper half
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.capset(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "capset")
    main(arguments)


# --- reading results ------------------------------------------------------------------------


def test_status(call: Any, results: Path) -> None:
    code, out, _ = call("status", results)
    assert code == 0
    assert "2 of 2 cells finished; no run is active" in out
    found = json.loads(call("status", results, "--json")[1])
    assert [cell["T"] for cell in found["cells"]] == [1, 4]
    assert all(cell["done"] == cell["groups"] for cell in found["cells"])
    fails(call("status", results / "nowhere"), 2, ["nowhere", "not a results folder"])


def test_status_of_many_cells_lists_some(call: Any, tmp_path: Path) -> None:
    raw = {**RAW, "grid": {"T": [1], "seeds": list(range(120))}}
    outcome = run_sweep(
        parse_spec(yaml.safe_dump(raw), "many", Path("/")),
        LocalStore(tmp_path / "r"),
        lambda run_state, actors: None,
        Output().view(),
    )
    assert len(outcome.unfinished) == 120
    code, out, _ = call("status", tmp_path / "r")
    assert code == 0
    assert "0 of 120 cells finished" in out
    assert sum(cell_id in out for cell_id in outcome.unfinished) == 100
    assert "and 20 more cells that are not finished: --json lists all" in out
    assert len(json.loads(call("status", tmp_path / "r", "--json")[1])["cells"]) == 120


QUESTION = "SELECT method, T, count(*) AS n FROM edits GROUP BY ALL ORDER BY T"


def test_query_formats(call: Any, results: Path) -> None:
    code, out, _ = call("query", results, QUESTION)
    assert code == 0
    assert re.search(r"ft-3\s+1\s+8", out)
    rows = list(csv.DictReader(io.StringIO(call("query", results, QUESTION, "--format", "csv")[1])))
    assert [(row["T"], row["n"]) for row in rows] == [("1", "8"), ("4", "8")]
    lines = call("query", results, QUESTION, "--format", "json")[1].splitlines()
    assert [json.loads(line)["n"] for line in lines] == [8, 8]


def test_query_parquet_and_limit(results: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "query", str(results), QUESTION, "--format", "parquet"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert pq.read_table(io.BytesIO(done.stdout)).num_rows == 2


def test_query_limit_and_errors(call: Any, results: Path) -> None:
    _, out, err = call("query", results, "SELECT case_id FROM edits", "--limit", "3")
    assert len([line for line in out.splitlines() if line.strip()]) == 2 + 3
    assert "3 of 16 rows" in err
    fails(call("query", results, "SELECT nothing FROM edits"), 2, ["nothing"])
    fails(call("query", results, "SELECT * FROM read_csv('/etc/passwd')"), 2, [])


ENDLESS = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r"
STUBBORN = "SELECT " + " + ".join(
    ["length(repeat(chr(9000), 200000000))"] * 100
)  # a minute without a look at a signal


def test_a_query_is_stopped_and_its_answer_is_bounded(call: Any, results: Path) -> None:
    fails(call("query", results, ENDLESS, "--time-limit", "0.5"), 2, ["longer than 0.5 s"])
    many = "SELECT a.case_id FROM edits a, edits b, edits c, edits d, edits e"
    _, out, err = call("query", results, many, "--limit", "3")
    assert len(out.splitlines()) < 10
    assert "3 of 1048576 rows" in err
    _, out, _ = call("query", results, "SELECT repeat('x', 100000) AS long")
    assert "(100000 characters)" in out
    assert len(out) < 3000


def test_a_query_that_does_not_listen_is_ended(results: Path) -> None:
    process = fork(_impatient, "query", str(results), STUBBORN, "--time-limit", "0.2")
    said = output_of(process)
    assert process.returncode == 2, said
    assert "ended by force after 1 s" in said


def _impatient(*arguments: str) -> None:
    reading._FORCE_SECONDS = 0.5
    main(arguments)


def test_text_is_never_markup(call: Any, results: Path) -> None:
    _, out, _ = call("query", results, "SELECT '[red]x[/red] [link=http://e]' AS t, chr(27) || '[31m' AS e")
    assert "[red]x[/red] [link=http://e]" in out
    assert "\x1b" not in out
    assert r"\x1b[31m" in out


def test_report(call: Any, results: Path) -> None:
    code, out, _ = call("report", results, "--format", "markdown")
    assert code == 0
    assert out.startswith("| method | T |")
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 4
    assert "ft-3" in call("report", results)[1]


def test_methods_help_and_version(call: Any) -> None:
    out = call("methods")[1]
    for word in ("wise", "grace", "rome", "ft", "needs pretraining", "batch edits", "arXiv"):
        assert word in out
    (line,) = (line for line in out.splitlines() if line.startswith(" ft "))
    assert line.rstrip().endswith("constraint_around, public_bos")  # what `protocol: easyedit` changes
    assert "editsweep" in call("--version")[1]
    code, out, _ = call("--help")
    assert code == 0
    for command in ("plan", "run", "status", "query", "report", "methods"):
        assert command in out
    assert call("frobnicate")[0] == 2


INTERRUPTED_AT_AN_IMPORT = """
import os, runpy, signal, sys
class Now:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Now())
sys.argv = ["editsweep", "methods"]
{start}
"""


@pytest.mark.parametrize("name", ["typer", "pydantic"])
@pytest.mark.parametrize(
    "start",
    [
        "from orchestrator.cli.main import main; sys.exit(main())",
        "runpy.run_module('orchestrator.cli', run_name='__main__')",
        "runpy.run_module('editsweep', run_name='__main__')",
    ],
    ids=["script", "module", "package"],
)
def test_ctrl_c_while_it_starts_is_one_line(start: str, name: str) -> None:
    code = INTERRUPTED_AT_AN_IMPORT.format(name=name, start=start)
    done = finished([sys.executable, "-c", code], cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_later_is_one_line(call: Any, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("orchestrator.cli.reading.read_status", interrupted)
    assert call("status", results) == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_pipe_is_as_wide_as_columns_asks(call: Any, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = "SELECT * FROM edits LIMIT 1"
    few = "SELECT method, T, seed, scored, dataset, model FROM edits LIMIT 1"
    assert "1 of 1" not in call("query", results, few)[1]
    monkeypatch.setenv("COLUMNS", "30")
    assert "1 of 1" in call("query", results, few)[1]
    monkeypatch.setenv("COLUMNS", "2000")
    assert "1 of 1" not in call("query", results, wide)[1]
    for nonsense in ("", "0", "wide", "-3"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert "1 of 1" not in call("query", results, few)[1]


def test_a_binary_answer_is_not_written_to_a_terminal(results: Path) -> None:
    master, slave = pty.openpty()
    question = ("query", str(results), "SELECT 1 FROM edits", "--format", "parquet")
    environment = {"TERM": "xterm", "COLUMNS": "200", "TERMINAL": os.ttyname(slave)}
    process = fork(_on_a_terminal, *question, environment=environment)
    wait_for(lambda: process.poll() is not None)
    said = os.read(master, 4096)
    os.close(slave)
    os.close(master)
    assert process.returncode == 2
    assert b"--format parquet: the answer is binary" in said and b"> answer.parquet" in said
    assert b"PAR1" not in said


def test_reading_is_light(results: Path) -> None:
    code = (
        "import sys; from orchestrator.cli.main import main\n"
        "for command, *rest in (['status'], ['query', 'SELECT 1 FROM edits'], ['report']):\n"
        "    try: main([command, sys.argv[1], *rest])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "    heavy = {'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)\n"
        "    assert not heavy, f'{command} imported {heavy}'"
    )
    done = finished([sys.executable, "-c", code, results], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_open_results_agrees(results: Path) -> None:
    assert open_results(results).sql(QUESTION).to_pydict()["n"] == [8, 8]


def test_live_view_on_a_terminal(spec: Path, tmp_path: Path) -> None:
    """On a pseudo-terminal the view is drawn with escape codes, and the summary still comes."""
    master, slave = pty.openpty()
    command = ("run", str(spec), "--engine", "local", "--results", str(tmp_path / "r"))
    environment = {"TERM": "xterm", "COLUMNS": "120", "TERMINAL": os.ttyname(slave)}
    process = fork(_on_a_terminal, *command, environment=environment)
    seen = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 4096)
    os.close(slave)
    os.close(master)  # a process that still had it as its terminal would be ended by this
    assert output_of(process) == "" and process.returncode == 0, seen
    assert b"editsweep status" in seen
    assert b"\x1b[" in seen
    assert b"ft-3 T=1/4" in seen
    assert b"all 2 cells finished" in seen


def _on_a_terminal(*arguments: str) -> None:
    terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    main(arguments)


def test_units() -> None:
    assert [duration(s) for s in (5, 200, 9000)] == ["5 s", "3 min", "2.5 h"]
    told = safety_line(Safety(journal_seconds=0.8, actor_seconds=80, gather_seconds=0.25, wall_seconds=50))
    assert told == "safety: journal 0.8 s of 80 actor-seconds, gather 0.2 s of 50 s: 1.5%"
    assert [size(b) for b in (5, 2048, 3 << 30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
