"""One truth for every reader: which rows count, what is missing, and how certain a mean is."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from orchestrator.cli import console
from orchestrator.cli.main import main
from orchestrator.cli.summary import show_summary
from orchestrator.results import diff as comparing
from orchestrator.results import report
from orchestrator.results.cells import CELL_VIEW
from orchestrator.results.cells import docs as cell_docs
from orchestrator.results.forget import forget, look_up_superseded
from orchestrator.results.live import Live
from orchestrator.results.query import QueryError, open_results
from orchestrator.results.spread import FEW_UNITS, spread
from orchestrator.results.table import CentralTable
from tests.engine import Watch, run
from tests.histories import (
    FT,
    SMALL,
    check_readers,
    means_of,
    random_history,
    told_by_pandas,
    told_by_sql,
)
from workers.types import EditSweepError

OTHER: dict[str, Any] = {**SMALL, "methods": [{"method": "ft", "hparams": {"num_steps": 2}}]}
SMALLER: dict[str, Any] = {**SMALL, "dataset": {"kind": "tinyworld", "edits": 3}}
FEWER_SEEDS: dict[str, Any] = {**SMALL, "grid": {"T": [1, 3], "seeds": [0]}}
FEWER_T: dict[str, Any] = {**SMALL, "grid": {"T": [1], "seeds": [0, 1]}}


LAST = {
    "small": SMALL,
    "other": OTHER,
    "smaller": SMALLER,
    "fewer seeds": FEWER_SEEDS,
    "fewer T": FEWER_T,
}


@dataclass(frozen=True)
class Asked:
    """The last plan of a folder whose first one was :data:`SMALL`, and a folder of that plan
    alone."""

    last: dict[str, Any]
    folder: Path
    fresh: Path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "r"
    assert run(folder, **SMALL).exit_code == 0
    return folder


@pytest.fixture(scope="module", params=LAST)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, first: Path) -> Asked:
    last, parent = LAST[request.param], tmp_path_factory.mktemp("asked")
    folder, fresh = shutil.copytree(first, parent / "r"), parent / "fresh"
    assert run(folder, **last).exit_code == run(fresh, **last).exit_code == 0
    return Asked(last, folder, fresh)


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rows_that_the_last_plan_does_not_ask_for_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Asked, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr("orchestrator.results.query._IN_MEMORY_BYTES", 0)
    last, fresh = asked.last, asked.fresh
    folder = shutil.copytree(asked.folder, tmp_path / "r")
    results, expected = open_results(folder), means_of(fresh)
    assert told_by_sql(results) == pytest.approx(expected, abs=1e-12)
    assert told_by_pandas(results) == pytest.approx(expected, abs=1e-12)
    rows = {(row["method"], row["T"]): row for row in report.summary(results)}
    assert rows.keys() == expected.keys()
    assert all(row["edits"] == row["asked"] and not report.footnotes([row]) for row in rows.values())
    count = len(open_results(fresh).table())
    assert results.table().num_rows == count == results.sql("SELECT count(*) AS n FROM edits")["n"][0].as_py()
    # everything is there, and says that it does not count
    whole = CentralTable(results.store).scan(results.journal).num_rows
    everything = results.table(superseded=True)
    assert everything.num_rows == whole >= count
    assert everything["superseded"].to_pylist().count(True) == whole - count
    (counted,) = results.sql(
        "SELECT count(*) AS n, count(*) FILTER (superseded) AS old FROM edits_all"
    ).to_pylist()
    assert counted == {"n": whole, "old": whole - count}
    assert results.table(["seed"]).column_names == ["seed"]
    assert results.table(["seed"], superseded=True).column_names == ["seed", "superseded"]
    # and goes when it is told to
    found = look_up_superseded(results)
    assert found.rows == whole - count
    assert forget(results, found, lambda _: None) == whole - count
    left = open_results(folder)
    assert left.table(superseded=True).num_rows == count
    assert told_by_sql(left, "edits_all") == pytest.approx(expected, abs=1e-12)
    assert look_up_superseded(left).limits == {}
    assert run(folder, **last).plan.shards == ()
    # what was forgotten is made again when it is asked for
    if last is SMALLER:
        assert run(folder, **SMALL).exit_code == 0
        assert open_results(folder).table().num_rows == whole


def test_a_folder_without_a_plan_counts_every_row() -> None:
    rows = pa.table({"cell_id": ["a", "b"], "group": pa.array([0, 7], pa.int32())})
    live = Live.of_plan({}, [])
    assert live.rows(rows) == rows and live.superseded(rows).to_pylist() == [False, False]
    live = Live({"b": 7})
    assert live.superseded(rows).to_pylist() == [True, True]
    assert live.cover([("b", 7)]) and not live.cover([("b", 8)]) and not live.cover([("a", 1)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(s, marks=pytest.mark.long) for s in range(2, 12))]
)
def test_any_history_gives_the_means_of_a_fresh_folder(tmp_path: Path, seed: int) -> None:
    spec, _ = random_history(str(tmp_path / "r"), random.Random(seed), tmp_path)
    check_readers(str(tmp_path / "r"), spec, tmp_path / "fresh")


# --- what is missing ------------------------------------------------------------------------


def test_a_mean_over_some_of_the_edits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from workers.methods.ft import FT as method
    from workers.methods.grace import GRACE

    edit = method.edit

    def half(self: Any, overlay: Any, lanes: Any) -> Any:
        if len(lanes[0].requests[0].prompt) % 2:
            raise FloatingPointError("no unrelated prompt")
        return edit(self, overlay, lanes)

    def never(*_: object) -> None:
        raise ValueError("nothing works")

    sweep = {**SMALL, "methods": [FT, {"method": "grace", "hparams": {"n_iter": 2}}]}
    with monkeypatch.context() as patch:
        patch.setattr(method, "edit", half)
        patch.setattr(GRACE, "edit", never)
        assert run(tmp_path / "r", **sweep).exit_code == 1
    results = open_results(tmp_path / "r")
    rows = {(row["method"], row["T"]): row for row in report.summary(results)}
    assert set(rows) == {("ft", 1), ("ft", 3), ("grace", 1), ("grace", 3)}
    one = rows["ft", 1]
    assert 0 < one["edits"] < one["asked"] == 12
    assert one["failed"] == one["asked"] - one["edits"]
    assert one["causes"] == {"FloatingPointError: no unrelated prompt": one["failed"]}
    none = rows["grace", 3]
    assert (none["edits"], none["asked"], none["failed"]) == (0, 12, 4)
    assert none["reliability_exact"] is None
    text = report.markdown(list(rows.values()))
    assert f"| ft | 1 | 2 | {one['edits']}/12 * |" in text and "| grace | 3 | 2 | 0/12 * | - |" in text
    notes = "\n".join(report.footnotes(list(rows.values())))
    assert f"ft T=1: {one['failed']} of 12 edits have no result, so the means are of the others" in notes
    assert "grace T=3: 12 of 12 edits have no result; 4 groups failed: 4 x ValueError: nothing works" in notes

    def call(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return int(str(ended.value.code)), b"".join(capfdbinary.readouterr()).decode()

    code, said = call("report", tmp_path / "r", "--require-complete")
    assert code == 1 and "nothing works" in said and "lack results" in said
    assert call("report", tmp_path / "r")[0] == 0
    code, said = call("report", tmp_path / "r", "--format", "json", "--require-complete")
    assert code == 1 and json.loads(said[: said.rindex("]") + 1])[0]["asked"] == 12
    again = run(tmp_path / "r", watch := Watch(), **sweep)
    assert again.plan.shards == () and watch.steps == []
    opening = console.begin_line(again.plan)
    assert "all done" not in opening
    assert "groups failed before and are left alone (--retry-failed runs them again)" in opening


# --- how certain a mean is ------------------------------------------------------------------


def test_the_spread_of_a_mean() -> None:
    ones = np.ones(4)
    found = spread(np.array([1.0, 0.0, 1.0, 1.0]), ones, np.array([0, 0, 1, 1]))
    assert found.mean == 0.75
    assert found.sd == pytest.approx(0.5 / 2**0.5)
    assert found.low is None and found.high is None  # four units are too few
    one_seed = spread(np.ones(8), np.ones(8), np.zeros(8))
    assert (one_seed.sd, one_seed.low, one_seed.high) == (None, 1.0, 1.0)
    nothing = spread(np.zeros(3), np.zeros(3), np.arange(3))
    assert (nothing.mean, nothing.sd, nothing.low) == (None, None, None)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 60 units, about 190; groups that answer alike make it wider."""
    rng, held, wide = np.random.default_rng(1), 0, []
    for _ in range(200):
        counts = np.full(60, 5.0)
        sums = counts * (rng.random(60) < 0.3)  # the five requests of a unit share their fate
        found = spread(sums, counts, np.zeros(60))
        assert found.low is not None and found.high is not None
        held += found.low <= 0.3 <= found.high
        wide.append(found.high - found.low)
    assert 178 <= held <= 199
    assert 0.18 < np.mean(wide) < 0.28  # 2 * 1.96 * sqrt(.21 / 60) = .232, not .104 as of 300 requests


def test_many_units_have_the_same_interval_as_few() -> None:
    rng = np.random.default_rng(0)
    sums, counts = rng.random(FEW_UNITS) * 3, np.full(FEW_UNITS, 3.0)
    few = spread(sums, counts, np.zeros(FEW_UNITS))
    many = spread(np.append(sums, 1.5), np.append(counts, 3.0), np.zeros(FEW_UNITS + 1))
    assert few.low is not None and many.low is not None
    assert abs(few.low - many.low) < 0.001


def test_groups_vary_and_requests_of_a_group_do_not(tmp_path: Path) -> None:
    sweep = {**SMALL, "dataset": {"kind": "tinyworld", "edits": 6}, "grid": {"T": [1, 6], "seeds": [0, 1]}}
    assert run(tmp_path / "r", **sweep).exit_code == 0
    rows = {row["T"]: row for row in report.summary(open_results(tmp_path / "r"))}
    assert rows[1]["locality_token_low"] is not None  # twelve groups of one
    assert rows[6]["locality_token_low"] is None and rows[6]["locality_token_sd"] is not None
    assert "[n/a]" in report.cells([rows[6]])[0][-1]


# --- the cells ------------------------------------------------------------------------------


def test_a_folder_explains_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.methods.ft import FT as method

    edit = method.edit

    def last(self: Any, overlay: Any, lanes: Any) -> Any:
        if self.config.num_steps == 2 and len(lanes[0].requests[0].prompt) % 2:
            raise FloatingPointError("it's 'no' luck")
        return edit(self, overlay, lanes)

    with monkeypatch.context() as patch:
        patch.setattr(method, "edit", last)
        run(tmp_path / "r", **SMALL)
        run(tmp_path / "r", **{**OTHER, "grid": {"T": [1], "seeds": [0]}})
    results = open_results(tmp_path / "r")
    cells = results.sql(
        "SELECT *, hparams->>'num_steps' AS steps FROM cells ORDER BY superseded, T, seed"
    ).to_pylist()
    assert [(c["steps"], c["T"], c["seed"], c["superseded"]) for c in cells] == [
        ("2", 1, 0, False),
        *(("3", T, seed, True) for T in (1, 3) for seed in (0, 1)),
    ]
    now, *old = cells
    assert now["asked"] == 6 == now["done"] + now["failed"] and now["failed"] > 0
    assert now["cause"] == "FloatingPointError: it's 'no' luck"
    assert all(
        (c["asked"], c["failed"], c["cause"]) == (0, 0, None) and c["done"] == 6 // c["T"] for c in old
    )
    joined = results.sql(
        "SELECT count(*) AS n FROM edits JOIN cells USING (cell_id) WHERE scored = 'final' AND NOT superseded"
    )
    assert joined["n"].to_pylist() == [now["done"]]
    described = {row["column_name"]: row["column_type"] for row in results.sql("DESCRIBE cells").to_pylist()}
    assert described == {c.name: c.type for c in CELL_VIEW}
    both = open_results(tmp_path / "r", tmp_path / "r2") if run(tmp_path / "r2", **SMALL) else None
    assert both is not None
    assert both.sql("SELECT results, count(*) AS n FROM cells GROUP BY ALL ORDER BY ALL")[
        "n"
    ].to_pylist() == [5, 4]


def test_a_folder_without_cells_has_none(tmp_path: Path) -> None:
    from orchestrator.storage.local import LocalStore
    from orchestrator.storage.paths import ResultsPaths

    LocalStore(tmp_path).publish_new(ResultsPaths().sweep, b"{}")
    assert open_results(tmp_path).sql("SELECT * FROM cells").column_names == [c.name for c in CELL_VIEW]
    assert open_results(tmp_path).sql("SELECT count(*) AS n FROM cells")["n"].to_pylist() == [0]


def test_the_page_lists_the_columns_of_cells() -> None:
    page = (Path(__file__).parents[1] / "docs" / "querying.md").read_text()
    assert cell_docs() in page, "docs/querying.md: write orchestrator.results.cells.docs() into it again"


# --- several folders ------------------------------------------------------------------------


def test_several_folders_are_one_table(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    names = [str(tmp_path / name) for name in ("a", "it's b")]
    for name, changes in zip(names, (SMALL, FEWER_T), strict=True):
        assert run(Path(name), **changes).exit_code == 0
    both = open_results(*names)
    apart = [open_results(name).table().num_rows for name in names]
    assert both.table().num_rows == sum(apart)
    counted = both.sql("SELECT results, count(*) AS n FROM edits GROUP BY ALL ORDER BY ALL").to_pylist()
    assert counted == [{"results": name, "n": n} for name, n in sorted(zip(names, apart, strict=True))]
    assert both.table().column_names[0] == both.table(superseded=True).column_names[0] == "results"
    rows = report.summary(both)
    assert [(row["results"], row["T"]) for row in rows] == [(names[0], 1), (names[0], 3), (names[1], 1)]
    assert rows[2]["reliability_exact"] == report.summary(open_results(names[1]))[0]["reliability_exact"]
    with pytest.raises(SystemExit) as ended:
        main(["query", *names, "SELECT DISTINCT results FROM edits_all", "--format", "csv"])
    assert ended.value.code == 0
    assert capfdbinary.readouterr().out.decode().count("/") > 2
    with pytest.raises(EditSweepError, match="given twice"):
        open_results(names[0], names[0] + "/")
    with pytest.raises(QueryError, match="edits_all"):
        both.sql("SELECT * FROM other")


# --- two folders compared -------------------------------------------------------------------


def test_the_difference_of_two_folders(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    assert run(one, **SMALL).exit_code == run(two, **SMALL).exit_code == run(three, **OTHER).exit_code == 0

    def call(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["diff", *map(str, words)])
        return int(str(ended.value.code)), b"".join(capfdbinary.readouterr()).decode()

    code, said = call(one, two)
    assert code == 0 and "the same: " in said
    found = comparing.compare(open_results(one), open_results(three))
    assert not found.same and [len(cell_ids) for cell_ids in found.only] == [4, 4]
    assert found.rows == 0 and all(found.rows_only)
    assert any(score == "target_logprob" for _, _, score in found.means)
    code, said = call(one, three)
    assert code == 1 and "4 cells are in" in said
    # one changed value
    (path,) = (two / "table").glob("*.parquet")
    results = open_results(two)
    (file,) = results.central._files()
    table = results.central.read_file(file)
    at = table.column_names.index("target_logprob")
    values = table["target_logprob"].to_pylist()
    values[3] += 0.25
    changed = table.set_column(at, table.schema.field(at), pa.array(values, pa.float64()))
    from orchestrator.results.parquet import encode
    from orchestrator.results.table import table_meta

    path.write_bytes(encode(changed, table_meta(1, file.shards, changed.num_rows)))
    found = comparing.compare(open_results(one), open_results(two))
    assert found.columns == {"target_logprob": comparing.ColumnDifference(1, 0.25)}
    code, said = call(one, two)
    assert code == 1 and "target_logprob" in said and "0.25" in said
    assert call(one, two, "--ignore", "target_logprob")[0] == 0
    code, said = call(one, two, "--json")
    assert code == 1 and json.loads(said)["columns"]["target_logprob"] == {"rows": 1, "largest": 0.25}
    code, said = call(one, two, "--ignore", "nonsense")
    assert code == 2 and "unknown columns ['nonsense']" in said


# --- what a terminal shows ------------------------------------------------------------------


def shown(width: int, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    out = console.Output()
    out.answers = Console(file=io.StringIO(), width=width)
    out.table("", header, rows)
    file = out.answers.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_table_that_does_not_fit_is_shown_row_by_row() -> None:
    header, row = tuple(f"column_{i}" for i in range(69)), tuple(f"value_{i}" for i in range(69))
    text = shown(80, header, [row, row])
    lines = text.splitlines()
    assert sum(line.startswith("column_") for line in lines) == 138
    assert lines[0].startswith("1 of 2 -") and lines[1].split() == ["column_0", "value_0"]
    assert all(word in text for word in (*header, *row))
    small = shown(80, ("method", "T"), [("wise", "10")])
    assert "method" in small.splitlines()[1] and "1 of" not in small


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_no_word_of_the_summary_is_broken(tmp_path_factory: pytest.TempPathFactory, width: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "summary"
    if not folder.exists():
        assert run(folder, **{**SMALL, "methods": [{**FT, "label": "wise-retrieve-x"}]}).exit_code == 0
    out = console.Output()
    out.answers = Console(file=io.StringIO(), width=width)
    rows = show_summary(out, open_results(folder))
    file = out.answers.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert "wise-retrieve-x" in text and "12/12" in text
    assert all(f"{row['reliability_exact']:.2f}" in text for row in rows)
    table = text.partition("Means over")[0]
    assert max(map(len, table.splitlines())) <= width
