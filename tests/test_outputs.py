"""What stands beside the rows: what the models wrote, what is measured once per group, the
requests."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.planning.inputs import load_spec_dataset
from orchestrator.planning.plan import make_plan
from orchestrator.results import diff
from orchestrator.results.beside import COMMITTED, GROUPS, OUTPUTS, REQUESTS, STORED
from orchestrator.results.columns import COLUMNS, EDITS, VARYING
from orchestrator.results.forget import forget, look_up_superseded
from orchestrator.results.journal import Journal
from orchestrator.results.query import QueryError, Results, open_results
from orchestrator.results.requests import read_requests, write_requests
from orchestrator.results.show import show
from orchestrator.results.table import CentralTable
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json
from tests.engine import ROOT, run, run_in_pieces, spec_of
from tests.shards import STATS, beside_of, commit_steps, finish, make_manifest, run_steps
from workers.scoring import outputs as scoring_outputs
from workers.scoring.registry import SCORES
from workers.types import Dataset, EditRequest, EditSweepError, Probe

FT = {"method": "ft", "hparams": {"num_steps": 3}}
SMALL: dict[str, Any] = {
    "methods": [FT],
    "grid": {"T": [1, 3], "seeds": [0]},
    "engine": {"lanes": 2, "shard_edits": 6, "step_edits": 2, "max_failures": 1},
    "scoring": {"keep_outputs": "all"},
}
"""Of the sweep of tests/engine.py: six requests at T=1 and T=3, with generation."""

PATHS = ResultsPaths()
PLACE = ("cell_id", "group", "position", "scored", "edits_applied")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep") / "r"
    assert run(root, **SMALL).exit_code == 0
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return open_results(folder)


def rows_of(results: Results, of: str, superseded: bool = False) -> list[dict[str, Any]]:
    """A table's rows without what differs between two runs."""
    rows = results.table(superseded=superseded, of=of).to_pylist()
    kept = [{name: value for name, value in row.items() if name not in VARYING} for row in rows]
    return sorted(kept, key=lambda row: [str(row[name]) for name in STORED[of].key])


# --- what is in them ------------------------------------------------------------------------


def test_outputs_and_scores_say_the_same(results: Results) -> None:
    """The mean of ``correct`` over the questions of a kind is the score of that kind."""
    found: dict[tuple[Any, ...], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in results.table(of="outputs").to_pylist():
        place = tuple(row[name] for name in PLACE)
        name = f"{row['probe']}_{'exact' if row['how'] == 'teacher_forced' else 'generated'}"
        found[place][name].append(row["correct"])
        found[place][f"{name}_base"].append(row["correct_base"])
    rows = results.table().to_pylist()
    assert found.keys() == {tuple(row[name] for name in PLACE) for row in rows}
    compared = 0
    for row in rows:
        for name, values in found[tuple(row[name] for name in PLACE)].items():
            if name in row:  # the unedited model has no locality score: it is 1
                compared += 1
                assert sum(values) / len(values) == pytest.approx(row[name], abs=1e-12), name
            else:
                assert name.startswith("locality") and all(values)
    assert compared > len(rows) * 12


def test_texts_are_what_was_written(results: Results) -> None:
    """A right answer is the target; the unedited model's answer is what locality expects."""
    targets = {row["case_id"]: row["target"] for row in results.table(of="requests").to_pylist()}
    kinds = set()
    for row in results.table(of="outputs").to_pylist():
        kinds.add((row["probe"], row["how"]))
        assert (row["ending"] is None) == (row["how"] == "teacher_forced")
        assert row["ending"] in (None, "natural", "cut", "dropped")
        if row["probe"] in ("reliability", "generalization"):
            if row["correct"]:
                assert row["text"].rstrip(".") == targets[row["case_id"]]
            elif row["how"] == "teacher_forced":
                assert row["text"] != targets[row["case_id"]]
        if row["probe"] == "locality" and row["how"] == "teacher_forced":
            assert row["correct"] == (row["text"] == row["text_base"])
        if row["correct"] and row["how"] == "generated":
            assert row["ending"] == "natural"
    assert kinds == {
        (probe, how)
        for probe in ("reliability", "generalization", "locality", "portability")
        for how in ("teacher_forced", "generated")
    }


def test_groups_are_measured_once(results: Results) -> None:
    """Seconds are the sums of the rows', sizes those of the final rows."""
    groups = {(row["cell_id"], row["group"]): row for row in results.table(of="groups").to_pylist()}
    edits = results.to_pandas()
    final = edits[edits["scored"] == "final"]
    assert len(groups) == 6 + 2 and set(zip(final["cell_id"], final["group"], strict=True)) == set(groups)
    for (cell_id, group), rows in final.groupby(["cell_id", "group"]):
        row = groups[cell_id, group]
        assert not row["failed"] and row["cause"] is None
        assert row["edit_seconds"] == pytest.approx(rows["edit_seconds"].sum())
        assert row["iterations"] == rows["iterations"].sum() == 3 * len(rows)
        assert {row["delta_norm"]} == set(rows["delta_norm"])
        assert {row["overlay_bytes"]} == set(rows["overlay_bytes"])
        assert {(row["T"], row["method"])} == set(zip(rows["T"], rows["method"], strict=True))
        # one forward gives both rows of T=1
        scored = edits[(edits["cell_id"] == cell_id) & (edits["group"] == group)]
        once = scored if row["T"] > 1 else scored[scored["scored"] == "final"]
        assert row["score_seconds"] == pytest.approx(once["score_seconds"].sum())


def test_groups_hold_the_scores_of_a_whole_state(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The market of the village opens at noon. The fiddle society plays until the evening.")
    scoring = {"generated": False, "ability_text": str(text)}
    assert (
        run(tmp_path / "r", **{**SMALL, "scoring": scoring, "grid": {"T": [3], "seeds": [0]}}).exit_code == 0
    )
    results = open_results(tmp_path / "r")
    joined = results.sql(
        "SELECT g.ability_perplexity AS one, e.ability_perplexity AS other, g.ability_perplexity_base AS base "
        "FROM groups g JOIN edits e USING (cell_id, \"group\") WHERE scored = 'final'"
    ).to_pylist()
    assert len(joined) == 6 and all(row["one"] == row["other"] > 1 and row["base"] > 1 for row in joined)
    assert {c.name for c in GROUPS.columns} >= {c.name for c in SCORES.columns if c.score.per_group}


def test_requests_are_the_data_sets(results: Results) -> None:
    data = load_spec_dataset(spec_of(**SMALL).dataset)
    known = {request.case_id: request for request in data.requests}
    rows = results.table(of="requests").to_pylist()
    assert {row["case_id"] for row in rows} == set(results.table(["case_id"])["case_id"].to_pylist())
    for row in rows:
        request = known[row["case_id"]]
        assert (row["dataset"], row["dataset_fingerprint"]) == (data.name, data.fingerprint)
        probes = {
            kind: tuple(
                Probe(p["prompt"], p["target"], tuple(p["aliases"]))
                for p in row["probes"]
                if p["probe"] == kind
            )
            for kind in ("locality", "portability")
        }
        assert request == EditRequest(
            row["case_id"],
            row["prompt"],
            row["subject"],
            row["target"],
            row["ground_truth"],
            tuple(row["rephrases"]),
            probes["locality"],
            probes["portability"],
            unrelated=row["unrelated"],
            passage=row["passage"],
            any_of=row["any_of"],
            needs=row["needs"],
            joiner=row["joiner"],
        )


# --- what is kept ---------------------------------------------------------------------------


def test_what_is_kept_changes_no_identity_and_no_row(
    tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_outputs, "FIRST", 4)
    every = rows_of(results, "outputs")
    order = {cell["T"]: cell["cell_id"] for cell in results.table(of="cells").to_pylist()}
    kept: dict[str, list[dict[str, Any]]] = {}
    for keep in ("first", "none", "failures"):
        changes = {**SMALL, "scoring": {"keep_outputs": keep}}
        assert run(tmp_path / keep, **changes).exit_code == 0
        found = open_results(tmp_path / keep)
        assert diff.compare(results, found).same  # cells, shards and rows
        kept[keep] = rows_of(found, "outputs")
        assert rows_of(found, "groups") == rows_of(results, "groups")
    assert kept["none"] == []
    assert kept["failures"] == [row for row in every if not row["correct"]] != []
    assert {row["scored"] for row in kept["failures"]} == {"immediate", "final"}
    first = [
        row for row in every if row["scored"] == "final" and row["group"] * row["T"] + row["position"] < 4
    ]
    assert kept["first"] == first and {row["cell_id"] for row in first} == set(order.values())


def test_the_setting_is_part_of_no_identity() -> None:
    plain = SCORES.read({})
    assert plain.keep_outputs == "first"
    plans = [
        make_plan(spec_of(**SMALL)),
        make_plan(spec_of(**{**SMALL, "scoring": {"keep_outputs": "none"}})),
    ]
    assert len({tuple(cell.cell_id for cell in plan.cells) for plan in plans}) == 1
    assert len({tuple(shard.shard_id for shard in plan.shards) for plan in plans}) == 1
    for keep in ("first", "none", "failures", "all"):
        config = SCORES.read({"keep_outputs": keep})
        assert SCORES.identity(config) == SCORES.identity(plain)
        assert SCORES.shard_key(config) == SCORES.shard_key(plain)
    with pytest.raises(EditSweepError, match=r"(?s)scoring.keep_outputs.*some.*first.*none.*failures.*all"):
        spec_of(**{**SMALL, "scoring": {"keep_outputs": "some"}})


def test_the_setting_may_change_between_runs(tmp_path: Path, results: Results) -> None:
    small = {**SMALL, "scoring": {"keep_outputs": "none"}, "dataset": {"kind": "tinyworld", "edits": 3}}
    assert run(tmp_path / "r", **small).exit_code == 0
    assert run(tmp_path / "r", **SMALL).exit_code == 0
    later = open_results(tmp_path / "r")
    assert {row["group"] * row["T"] + row["position"] for row in rows_of(later, "outputs")} == {3, 4, 5}
    assert len(rows_of(later, "requests")) == len(rows_of(results, "requests")) == 6
    assert len(list((tmp_path / "r" / "requests").glob("*.parquet"))) == 2  # what was missing


# --- what survives --------------------------------------------------------------------------


def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path: Path, results: Results) -> None:
    outcome, killed = run_in_pieces(tmp_path / "r", 1, **SMALL)
    assert outcome.exit_code == 0 and killed >= 4
    again = open_results(tmp_path / "r")
    for of in STORED:
        assert rows_of(again, of) == rows_of(results, of) != [], of


def test_unfinished_shards_are_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.publish_new("sweep.json", b"{}")
    results = open_results(tmp_path)
    results.journal.begin(make_manifest())
    commit_steps(results.journal.claim("s0", "r1"), 7)
    counts = {of: results.table(of=of).num_rows for of in COMMITTED}
    assert all(counts.values())
    assert {of: results.sql(f"SELECT count(*) AS n FROM {of}")["n"][0].as_py() for of in COMMITTED} == counts
    commit_steps(results.journal.claim("s0", "r1"))
    whole = {of: results.table(of=of).num_rows for of in COMMITTED}
    assert CentralTable(store).gather(results.journal).refused is None
    assert {of: results.table(of=of).num_rows for of in COMMITTED} == whole
    assert all(whole[of] > counts[of] for of in COMMITTED)


def test_a_shard_that_lost_a_group_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A part of an earlier version has no such rows; one of today's that lacks them is wrong."""
    for name in ("old", "lost"):
        store = LocalStore(tmp_path / name)
        journal, manifest = Journal(store), make_manifest()
        journal.begin(manifest)
        attempt = journal.claim("s0", "r1")
        lost = False
        for start, stop, rows, failures, state in run_steps(manifest):
            others = beside_of(manifest, rows)
            if not lost and others["groups"]:
                lost, others["groups"] = True, []
            given = [others] if lost or name == "lost" else []
            attempt.commit(start, stop, rows, failures, state, STATS, *given)
        refused = name == "lost"
        gathered = CentralTable(store).gather(journal)
        assert bool(gathered.refused) == refused
        if refused:
            assert "its rows of groups lack" in caplog.text
        else:
            left = {row["group"] for row in CentralTable(store).scan(of=GROUPS).to_pylist()}
            assert left < {row["group"] for row in CentralTable(store).scan().to_pylist()}


def test_groups_that_failed_have_a_row(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.publish_new("sweep.json", b"{}")
    planned = {f"cell-{seed}": {"groups": 4, "method": "ft", "T": 6, "seed": seed} for seed in (0, 1)}
    store.publish_new("plan.json", seal_json({"cells": planned, "current": list(planned)}))
    results = open_results(tmp_path)
    finish(results.journal, make_manifest(), fail=("cell-1", 2))
    expected = [("cell-1", "ft", 6, 1, 2, "nan: loss is nan", None)]
    question = 'SELECT cell_id, method, T, seed, "group", cause, edit_seconds FROM groups WHERE failed'
    for _ in ("under way", "gathered"):
        assert [tuple(row.values()) for row in results.sql(question).to_pylist()] == expected
        assert results.table(of="groups").num_rows == 8
        assert all(row["group"] != 2 or row["cell_id"] != "cell-1" for row in rows_of(results, "outputs"))
        CentralTable(store).gather(results.journal)
    finish(results.journal, make_manifest("s1", groups=1, first_group=2, seeds=(1,), cell="cell"))
    results.journal.begin(make_manifest("s1", groups=1, first_group=2, seeds=(1,), cell="cell"))
    assert results.sql(question).num_rows == 0 and results.table(of="groups").num_rows == 8


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """A bit of the rows behind the table's own is part of the same seal."""
    store = LocalStore(tmp_path)
    journal = Journal(store)
    finish(journal, make_manifest())
    table = CentralTable(store)
    table.gather(journal)
    (file,) = table._files()
    path = tmp_path / file.key
    data = path.read_bytes()
    for of in COMMITTED:
        at, size, rows = file.places[of]
        assert rows and size
        path.write_bytes(
            data[: at + size // 2] + bytes([data[at + size // 2] ^ 1]) + data[at + size // 2 + 1 :]
        )
        assert CentralTable(store).verify() == [1]
        assert CentralTable(store).scan(of=STORED[of]).num_rows == 0
        path.write_bytes(data)
    assert CentralTable(store).verify() == []


def test_damaged_requests_are_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, results: Results
) -> None:
    data = Dataset("d", (EditRequest("a", "P", "S", "T"), EditRequest("b", "P", "S", "T")), "f" * 64)
    store = LocalStore(tmp_path)
    assert write_requests(data, [0], store, PATHS) == 1
    assert write_requests(data, [1, 0], store, PATHS) == 1
    assert write_requests(data, [1, 0], store, PATHS) == 0
    assert read_requests(store, PATHS)["case_id"].to_pylist() in (["a", "b"], ["b", "a"])
    first = sorted(tmp_path.glob("requests/*.parquet"))[0]
    first.write_bytes(first.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert read_requests(store, PATHS).num_rows == 1
    assert first.name in caplog.text
    assert write_requests(data, [1, 0], store, PATHS) == 1
    assert sorted(read_requests(store, PATHS)["case_id"].to_pylist()) == ["a", "b"]
    assert [path.name for path in tmp_path.glob("requests/bad/*")] == [first.name]


# --- which rows count, where they are read ---------------------------------------------------


@pytest.mark.parametrize("scanned", [False, True])
def test_the_same_rows_count_in_every_table(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, scanned: bool
) -> None:
    """Rows of another definition, and of groups beyond a smaller N, are superseded."""
    import shutil

    if scanned:
        monkeypatch.setattr("orchestrator.results.query._IN_MEMORY_BYTES", 0)
    root = tmp_path / "r"
    shutil.copytree(folder, root)
    smaller = {**SMALL, "dataset": {"kind": "tinyworld", "edits": 3}}
    assert run(root, **smaller).exit_code == 0
    results = open_results(root)
    for of in (*COMMITTED, "edits"):
        everything = results.table(superseded=True, of=of)
        live = results.table(of=of)
        old = everything["superseded"].to_pylist().count(True)
        assert live.num_rows == everything.num_rows - old > 0 and old > 0
        (counted,) = results.sql(
            f"SELECT count(*) AS n, count(*) FILTER (superseded) AS old FROM {of}_all"
        ).to_pylist()
        assert counted == {"n": everything.num_rows, "old": old}
        names = ", ".join(f'"{c.name}"' for c in STORED[of].columns)
        asked = results.sql(f"SELECT {names} FROM {of}").to_pylist()
        assert sorted(map(str, asked)) == sorted(map(str, live.to_pylist()))
    assert len({row["case_id"] for row in rows_of(results, "outputs")}) == 3
    assert results.table(of="requests").num_rows == 6  # of the same data set
    found = look_up_superseded(results)
    forget(results, found, lambda _: None)
    left = open_results(root)
    for of in COMMITTED:
        assert rows_of(left, of, superseded=True) == [
            {**row, "superseded": False} for row in rows_of(results, of)
        ]


def test_requests_of_another_data_set_are_superseded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.publish_new("sweep.json", b"{}")
    for mark in "ab":
        data = Dataset("d", (EditRequest("case", f"Prompt {mark}", "S", "T"),), mark * 64)
        write_requests(data, [0], store, PATHS)
    cells = {mark: {"groups": 1, "config": {}, "dataset_fingerprint": mark * 64} for mark in "ab"}
    store.publish_new("plan.json", seal_json({"cells": cells, "current": ["b"]}))
    results = open_results(tmp_path)
    assert results.table(["prompt"], of="requests").to_pylist() == [{"prompt": "Prompt b"}]
    assert results.sql("SELECT prompt FROM requests").to_pylist() == [{"prompt": "Prompt b"}]
    asked = results.sql("SELECT prompt, superseded FROM requests_all ORDER BY ALL").to_pylist()
    assert asked == [
        {"prompt": "Prompt a", "superseded": True},
        {"prompt": "Prompt b", "superseded": False},
    ]


def test_several_folders_are_one_table_each(folder: Path, tmp_path: Path, results: Results) -> None:
    other = tmp_path / "other"
    changes = {
        **SMALL,
        "methods": [{"method": "ft", "hparams": {"num_steps": 2}}],
        "grid": {"T": [3], "seeds": [0]},
    }
    assert run(other, **changes).exit_code == 0
    both = open_results(folder, other)
    for of in (*STORED, "cells"):
        apart = [open_results(one).table(of=of).num_rows for one in (folder, other)]
        table = both.table(of=of)
        assert table.column_names[0] == "results"
        assert [table["results"].to_pylist().count(str(one)) for one in (folder, other)] == apart
        assert both.sql(f"SELECT count(*) AS n FROM {of}")["n"].to_pylist() == [sum(apart)]
    joined = both.sql(
        "SELECT count(*) AS n FROM outputs JOIN requests USING (results, case_id) "
        "JOIN cells USING (results, cell_id)"
    )
    assert joined["n"].to_pylist() == [both.table(of="outputs").num_rows]


def test_other_readers_see_the_rows_of_the_table(folder: Path, results: Results) -> None:
    (path,) = (folder / "table").glob("*.parquet")
    names = [c.name for c in COLUMNS]
    for frame in (pd.read_parquet(path), pl.read_parquet(path), pq.read_table(path)):
        found = list(frame.column_names if isinstance(frame, pa.Table) else frame.columns)
        assert (found, len(frame)) == (names, len(results.table()))
    (requests,) = (folder / "requests").glob("*.parquet")
    assert list(pl.read_parquet(requests).columns) == [c.name for c in REQUESTS.columns]


def test_questions_to_an_earlier_versions_columns_can_be_asked(results: Results) -> None:
    older = pq.read_schema(next((ROOT / "tests/data/folders/finished/table").glob("*.parquet")))
    names = ", ".join(f'"{name}"' for name in older.names)
    assert results.sql(f"SELECT {names} FROM edits").num_rows == results.table().num_rows


def test_columns_and_tables_that_do_not_exist(results: Results) -> None:
    assert results.table(["text"], of="outputs").column_names == ["text"]
    assert results.to_pandas(["delta_norm"], superseded=True, of="groups").columns.to_list() == [
        "delta_norm",
        "superseded",
    ]
    with pytest.raises(QueryError, match="no table 'answers'; the tables are edits, outputs"):
        results.table(of="answers")
    with pytest.raises(EditSweepError, match=r"unknown columns \['prompt'\]; valid are: cell_id.*text_base"):
        results.table(["prompt"], of="outputs")
    with pytest.raises(QueryError, match=r"(?s)prompts.*Columns of outputs: cell_id.*text_base"):
        results.sql("SELECT prompts FROM outputs")


def test_declarations_name_their_keys() -> None:
    for of in STORED.values():
        names = [c.name for c in of.columns]
        assert len(set(names)) == len(names) and set(of.key) <= set(names)
        assert all(c.meaning for c in of.columns)
    assert EDITS.name == "edits" and OUTPUTS.of("attempt") == frozenset()


# --- one request ----------------------------------------------------------------------------


def test_one_request_is_shown_whole(
    results: Results, folder: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    case = results.table(of="requests")["case_id"].to_pylist()[0]
    found = show(results, case)
    outputs = [row for row in results.table(of="outputs").to_pylist() if row["case_id"] == case]
    assert sum(len(answer["outputs"]) for answer in found["answers"]) == len(outputs)
    assert {(answer["T"], answer["scored"]) for answer in found["answers"]} == {
        (T, scored) for T in (1, 3) for scored in ("immediate", "final")
    }
    request = found["request"]
    assert [q["prompt"] for q in found["questions"]] == [
        request["prompt"],
        *request["rephrases"],
        *(probe["prompt"] for probe in request["probes"]),
    ]
    code, said, _ = call("show", folder, case)
    assert code == 0
    for text in (request["prompt"], request["subject"], request["target"], request["ground_truth"]):
        assert text in said
    assert all(row["text"] in said for row in outputs)
    assert "ft T=3 seed=0: final, after 3 edits" in said
    code, said, _ = call("show", folder, case, "-T", 3, "--method", "ft", "--seed", 0)
    assert code == 0 and "ft T=1" not in said
    code, said, _ = call("show", folder, case, "--format", "json")
    assert code == 0 and json.loads(said) == found


def test_unknown_requests_and_filters(
    folder: Path, results: Results, call: Callable[..., tuple[int, str, str]]
) -> None:
    case = results.table(of="requests")["case_id"].to_pylist()[0]
    code, _, said = call("show", folder, case + "0")
    assert code == 2 and f"has no request '{case}0'; similar ids: {case}" in said
    code, _, said = call("show", folder, "?")
    assert code == 2 and "the first of its ids" in said
    code, _, said = call("show", folder, "it's")
    assert code == 2 and "has no request" in said
    code, _, said = call("show", folder, case, "--method", "rome")
    assert code == 2 and "there are method: ft" in said


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_texts_and_no_controls(tmp_path: Path, width: int) -> None:
    """Also where nothing was kept, and for a request that is not in every cell."""
    store = LocalStore(tmp_path)
    store.publish_new("sweep.json", b"{}")
    bad = "bell\x07 \x1b[31mred\x1b[0m\nnext"
    write_requests(Dataset("d", (EditRequest("case-3", bad, "S", "T"),), "a" * 64), [0], store, PATHS)
    cell = {
        "groups": 4,
        "config": {},
        "method": "ft",
        "algorithm": "ft",
        "T": 6,
        "dataset_fingerprint": "a" * 64,
    }
    planned = {f"cell-{seed}": {**cell, "seed": seed} for seed in (0, 1)}
    planned["other"] = {**cell, "seed": 7}
    store.publish_new("plan.json", seal_json({"cells": planned, "current": list(planned)}))
    finish(Journal(store), make_manifest())
    environment = {"COLUMNS": str(width), "PYTHONPATH": str(ROOT), "PATH": "", "TERM": "dumb"}
    script = "import sys; sys.stdout.isatty = lambda: True\nfrom orchestrator.cli.main import main\nmain(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, "show", str(tmp_path), "case-3"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x07" not in done.stdout and "\\x07" in done.stdout and "\\nnext" in done.stdout
    assert "[31mred" in done.stdout.replace("\x1b", "")
    assert max(map(len, done.stdout.splitlines())) <= width
    assert "ft T=6 seed=7: no result of this request yet" in done.stdout
