"""Questions to a results folder, the lock around SQL, and how quickly a question can be asked."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import open_results
from orchestrator.results.query import _FEW_VALUES, QueryError, Results, write
from orchestrator.results.table import CentralTable
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from tests.shards import commit_steps, finish, make_manifest
from workers.types import EditSweepError

SECRET = pa.table({"secret": [1]})  # a Python variable that a replacement scan would find


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One shard in the table, one finished, one running."""
    root = tmp_path_factory.mktemp("results")
    store = LocalStore(root)
    store.publish_new(ResultsPaths().sweep, b"{}")
    opened = open_results(root)
    finish(opened.journal, make_manifest("s0", cell="a", step_edits=50))
    CentralTable(store).gather(opened.journal)
    finish(opened.journal, make_manifest("s1", cell="b", step_edits=50))
    opened.journal.begin(make_manifest("s2", cell="c"))
    commit_steps(opened.journal.claim("s2", "r1"), 2)
    return opened


def test_table_sql_and_pandas_agree(results: Results) -> None:
    rows = results.table()
    assert set(rows["shard_id"].to_pylist()) == {"s0", "s1", "s2"}
    assert results.sql("select count(*) as n from edits")["n"].to_pylist() == [rows.num_rows]
    frame = results.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == rows.num_rows
    answer = results.sql("from edits select cell_id, avg(reliability_token) as r group by all order by all")
    mean = frame.groupby("cell_id")["reliability_token"].mean()
    assert answer["cell_id"].to_pylist() == list(mean.index)
    assert all(math.isclose(a, b) for a, b in zip(answer["r"].to_pylist(), mean, strict=True))


def test_large_tables_are_scanned_not_loaded(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ", ".join(sorted(_FEW_VALUES))
    queries = (
        "select cell_id, scored, count(*) as n from edits where T = 6 group by all order by all",
        (
            f"select {few}, count(*) as n from edits where method = 'ft' and rollback <> 'x' group by all "
            "order by all"
        ),
        "select * from edits where scored in ('edit', 'group') and device is not null order by all",
        "select distinct method from edits where method like 'f%' or method > 'z'",
        "describe edits",
    )
    small = [results.sql(query) for query in queries]
    assert sum(answer.num_rows > 0 for answer in small) >= 3
    monkeypatch.setattr("orchestrator.results.query._IN_MEMORY_BYTES", 0)
    assert [results.sql(query) for query in queries] == small
    refuses_everything(results)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_bad_file_is_left_out_with_a_warning(
    tmp_path: Path, scanned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    LocalStore(tmp_path).publish_new(ResultsPaths().sweep, b"{}")
    opened = open_results(tmp_path)
    if scanned:
        monkeypatch.setattr("orchestrator.results.query._IN_MEMORY_BYTES", 0)
    for name in ("s0", "s1", "s2"):
        finish(opened.journal, make_manifest(name, cell=name))
        CentralTable(opened.store).gather(opened.journal)
    first, second, third = sorted((tmp_path / "table").glob("*.parquet"))
    question = "select shard_id, count(*) as n from edits group by all order by all"
    whole = opened.sql(question)
    assert whole["shard_id"].to_pylist() == ["s0", "s1", "s2"]
    second.write_bytes(first.read_bytes())  # a copy would be counted twice
    third.write_bytes(third.read_bytes()[:-20])
    assert open_results(tmp_path).sql(question) == whole.slice(0, 1)
    assert f"{second}: a foreign file, or one that was renamed" in caplog.text
    assert f"{third}: " in caplog.text
    first.write_bytes(third.read_bytes())
    assert open_results(tmp_path).sql(question).num_rows == 0


def test_an_empty_folder_answers(tmp_path: Path) -> None:
    LocalStore(tmp_path).publish_new(ResultsPaths().sweep, b"{}")
    opened = open_results(tmp_path)
    assert opened.table().num_rows == 0
    assert opened.sql("select count(*) as n from edits")["n"].to_pylist() == [0]


def test_not_a_results_folder(tmp_path: Path) -> None:
    with pytest.raises(EditSweepError, match=f"{tmp_path}/x is not a results folder: no such folder"):
        open_results(tmp_path / "x")
    with pytest.raises(EditSweepError, match=r"not a results folder: it has no sweep\.json"):
        open_results(tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(EditSweepError, match="it is a file"):
        open_results(str(tmp_path / "f"))


def test_errors_name_the_valid_columns(results: Results) -> None:
    with pytest.raises(QueryError, match=r"(?s)relaibility.*Columns of edits:.*reliability_exact"):
        results.sql("select relaibility from edits")
    with pytest.raises(QueryError, match=r"The tables are edits, .* edits_all"):
        results.sql("select 1 from edit")
    with pytest.raises(QueryError, match="yntax error"):
        results.sql("selec 1")
    with pytest.raises(QueryError, match="one statement at a time, not 0"):
        results.sql(" ")


FORBIDDEN = [
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('/etc/passwd')",
    "select * from '/etc/passwd'",
    "select * from 'results.parquet'",
    "select * from glob('/etc/*')",
    "select * from read_csv('https://example.com/x.csv')",
    "select * from read_parquet('s3://bucket/x.parquet')",
    "explain analyze copy edits to '{folder}/x.csv'",
    "copy edits to '{folder}/x.csv'",
    "copy (select 1) to '{folder}/x.parquet' (format parquet)",
    "export database '{folder}/x'",
    "import database '{folder}/x'",
    "attach '{folder}/x.db'",
    "install httpfs",
    "load httpfs",
    "load '{folder}/x.duckdb_extension'",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "reset lock_configuration",
    "set python_enable_replacements = true",
    "set memory_limit = '1TB'",
    "pragma enable_profiling",
    "call pragma_version()",
    "create table x as select 1",
    "create secret (type s3)",
    "drop view edits",
    "insert into edits values (1)",
    "update edits set T = 1",
    "delete from edits",
    "select 1; drop view edits",
    "select * from SECRET",
    "select * from secret",
    "select * from frame",
]


def refuses_everything(results: Results) -> None:
    frame = pd.DataFrame({"secret": [1]})
    folder = results.store.where()
    before = sorted(Path(folder).rglob("*"))
    for query in FORBIDDEN:
        with pytest.raises(QueryError):
            pytest.fail(f"{query} gave {results.sql(query.format(folder=folder))}, {len(frame)}")
    assert sorted(Path(folder).rglob("*")) == before


def test_sql_is_locked_down(results: Results) -> None:
    refuses_everything(results)


def test_a_query_without_end_is_stopped(results: Results) -> None:
    endless = "with recursive r(i) as (select 1 union all select i + 1 from r) select count(*) from r"
    with pytest.raises(QueryError, match=r"longer than 0\.2 s"):
        results.sql(endless, time_limit=0.2)
    assert results.sql("select 1 as one", time_limit=None)["one"].to_pylist() == [1]


def test_written_formats_are_read_back(results: Results) -> None:
    answer = results.sql(
        "select cell_id, 0.5 as half, null as nothing, 'nan'::double as nan, [1, 2] as list, 'a,\"b\"\nc' "
        "as text "
        "from edits group by all order by all"
    )
    streams = {name: io.BytesIO() for name in ("csv", "json", "parquet")}
    for name, stream in streams.items():
        write(answer, name, stream)
        stream.seek(0)
    frame = pl.read_csv(streams["csv"])
    assert frame["cell_id"].to_list() == answer["cell_id"].to_pylist()
    assert frame["list"][0] == "[1, 2]"
    assert frame["text"][0] == 'a,"b"\nc'
    lines = [json.loads(line) for line in streams["json"].read().splitlines()]
    assert lines[0] == {
        "cell_id": answer["cell_id"][0].as_py(), "half": 0.5, "nothing": None, "nan": None, "list": [1, 2],
        "text": 'a,"b"\nc',
    }  # fmt: skip
    assert pq.read_table(streams["parquet"]).num_rows == answer.num_rows
    with pytest.raises(QueryError, match=r"'xlsx'; valid are: csv, json, parquet"):
        write(answer, "xlsx", io.BytesIO())


def test_importing_is_light(results: Results) -> None:
    code = (
        "import sys\n"
        "import orchestrator\n"
        "assert 'pyarrow' not in sys.modules\n"
        "import orchestrator.results.query\n"
        "assert len(sys.modules) < 500, len(sys.modules)\n"  # PyTorch alone has a thousand
        f"r = orchestrator.open_results({results.store.where()!r})\n"
        "r.central.shards(), r.journal.finished()\n"
        "assert 'duckdb' not in sys.modules\n"
        "assert r.sql('select count(*) as n from edits')['n'][0].as_py() > 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'pandas', 'pyarrow.dataset'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 700, len(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_module_of_results_loads_torch() -> None:
    """What declares the columns of scores stands in the files that measure them, whose other half
    needs torch."""
    code = (
        "import importlib, pkgutil, sys\n"
        "import orchestrator.results, orchestrator.storage\n"
        "for package in (orchestrator.results, orchestrator.storage):\n"
        "    for found in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "assert 'workers.scoring.fluency' in sys.modules\n"
        "heavy = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
