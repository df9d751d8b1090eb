"""The central table: each shard exactly once, whoever gathers, reads, dies or damages files
meanwhile."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from orchestrator.results.beside import STORED
from orchestrator.results.beside import docs as all_docs
from orchestrator.results.columns import (
    COLUMNS,
    KEY,
    TableError,
    docs,
    has_duplicates,
    no_rows,
    schema,
    sort_rows,
)
from orchestrator.results.contents import expected_contents
from orchestrator.results.journal import Journal
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.parquet import decode, encode
from orchestrator.results.table import CentralTable, count_done
from orchestrator.storage.base import Damaged, Entry
from orchestrator.storage.local import LocalStore
from tests.processes import fork, forks
from tests.shards import (
    commit_steps,
    contents,
    finish,
    gather_shards,
    make_manifest,
    run_steps,
    undisturbed,
)
from tests.waiting import output_of
from workers.job import Lane, Share
from workers.timeline import cut_steps, expected_rows


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


@pytest.fixture
def journal(store: LocalStore) -> Journal:
    return Journal(store)


def small(count: int) -> list[ShardManifest]:
    return [make_manifest(f"s{i:02}", T=2, groups=2, cell=f"c{i:02}", step_edits=100) for i in range(count)]


def keys(table: pa.Table) -> list[tuple[object, ...]]:
    return sorted(zip(*(table[name].to_pylist() for name in KEY), strict=True))


def test_columns_are_the_schema() -> None:
    assert schema().names == [c.name for c in COLUMNS]
    assert len(set(schema().names)) == len(COLUMNS)
    assert "locality_token_base" not in schema().names  # 1 by definition
    for c in COLUMNS:
        assert f"| `{c.name}` |" in docs()
        assert c.meaning
        assert schema().field(c.name).nullable == c.nullable
    page = (Path(__file__).parent.parent / "docs" / "columns.md").read_text()
    assert page.endswith(all_docs()), (
        "docs/columns.md is made from the declarations: write them into it again"
    )


@pytest.mark.parametrize(
    "manifest",
    [
        make_manifest(),
        make_manifest(T=10, score_at=(3, 5)),
        make_manifest(T=1, groups=5),
        make_manifest(T=4, batch_size=4),
        make_manifest(T=4, batch_size=2),
        make_manifest(T=6, groups=3, score_at=(2, 3, 6), also_T=(4, 3, 1)),
        make_manifest(T=6, groups=3, first_group=1, batch_size=2, also_T=(4, 2)),
        make_manifest(T=5, groups=3, first_group=2, rollback="never", score_at=(15, 25)),
        make_manifest(T=6, groups=2, rollback="never", score_at=(5, 6, 12), also_T=(1, 3, 12)),
        make_manifest(
            T=6, groups=2, first_group=2, rollback="never", score_at=(6, 15), also_T=(2, 12), batch_size=2
        ),
    ],
)
def test_expected_contents_match_the_job(manifest: ShardManifest) -> None:
    expected = expected_contents(manifest.job, ())
    assert sum(expected.rows.values()) == expected_rows(manifest.job)
    assert sum(len(rows) for _, _, rows, _, _ in run_steps(manifest)) == expected_rows(manifest.job)
    assert not any(expected.failed.values())


def test_every_changed_byte_is_noticed() -> None:
    rows = no_rows()
    data = encode(rows, {"version": 1, "kind": "part"})
    assert data == encode(rows, {"version": 1, "kind": "part"})
    assert decode(data, "x")[1] == {"version": 1, "kind": "part"}
    chance = random.Random(3)
    for _ in range(300):
        bad = bytearray(data)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        with pytest.raises(Damaged, match="the-file"):
            decode(bytes(bad), "the-file")
        with pytest.raises(Damaged, match="the-file"):
            decode(data[: chance.randrange(len(data))], "the-file")


def test_gather_moves_finished_shards_once(tmp_path: Path, store: LocalStore, journal: Journal) -> None:
    manifests = small(4)
    finish(journal, *manifests[:3])
    journal.begin(manifests[3])
    commit_steps(journal.claim("s03", "r1"), 0)
    table = CentralTable(store)
    gathered = table.gather(journal)
    assert (gathered.files, gathered.shards) == ((1,), ("s00", "s01", "s02"))
    assert gathered.rows == table.scan().num_rows == sum(expected_rows(m.job) for m in manifests[:3])
    assert journal.shard_ids() == ["s03"]
    assert table.gather(journal).files == ()
    assert table.done() == {f"c{i:02}-{seed}": {0, 1} for i in range(3) for seed in (0, 1)}
    shard = table.shards()["s01"]
    assert (shard.file, shard.attempts, shard.edits) == (1, 1, 2)
    finish(journal, manifests[3])
    assert table.gather(journal, ["s03", "never-heard-of"]).files == (2,)
    assert contents(table) == undisturbed(tmp_path / "clean", *manifests)
    rows = decode((store.root / "table" / "000001.parquet").read_bytes(), "")[0]
    assert rows == sort_rows(rows)


def test_a_gather_that_died_before_dropping_parts(
    tmp_path: Path, store: LocalStore, journal: Journal
) -> None:
    manifests = small(3)
    finish(journal, *manifests)
    shutil.copytree(store.root / "parts", tmp_path / "parts")
    table = CentralTable(store)
    table.gather(journal)
    rows = contents(table)
    shutil.copytree(tmp_path / "parts", store.root / "parts", dirs_exist_ok=True)
    assert contents(table, journal) == rows
    (store.root / "parts" / "s01" / "manifest.json").unlink()  # or while dropping them
    assert contents(table, journal) == rows
    assert table.gather(journal).files == ()
    assert journal.shard_ids() == []


def test_gatherers_at_once_and_killed_never_lose_or_double(tmp_path: Path) -> None:
    """Pairs of gatherers, of which most are killed after some files; so many tables that some were
    killed at work."""
    manifests = small(24)
    expected = undisturbed(tmp_path / "clean", *manifests)
    names = [[m.shard_id] for m in manifests]
    chance = random.Random(1)
    kills = tables = 0
    while not kills:
        tables += 1
        store = LocalStore(tmp_path / f"r{tables}")
        journal = Journal(store)
        finish(journal, *manifests)
        for round_ in range(6):
            barrier = forks().Barrier(2)
            order = names if round_ % 2 else names[::-1]
            runs = [fork(gather_shards, str(store.root), o, barrier) for o in (names, order)]
            if round_ < 5:
                goal = 3 * round_ + chance.randrange(3)
                while runs[0].poll() is None and len(list(store.root.glob("table/*.parquet"))) < goal:
                    time.sleep(0.001)
                for run in runs:
                    kills += run.poll() is None
                    run.kill()
            for run in runs:
                output_of(run)
        table = CentralTable(store)
        listed = [shard.shard_id for file in table._files() for shard in file.shards]
        assert sorted(listed) == [m.shard_id for m in manifests]
        assert journal.shard_ids() == []
        assert contents(table) == expected


class _Overtaken(LocalStore):
    """Lets another gatherer finish right after the ``when``-th listing of the table was taken."""

    def __init__(self, root: Path, when: int, shard: str) -> None:
        super().__init__(root)
        self.when, self.shard = when, shard

    def list(self, folder: str) -> list[Entry]:
        entries = super().list(folder)
        if folder == "table":
            self.when -= 1
            if self.when == 0:
                other = LocalStore(self.root)
                assert CentralTable(other).gather(Journal(other), [self.shard]).shards == (self.shard,)
        return entries


@pytest.mark.parametrize("when", [1, 2])  # what is dropped at once; what the new file is written above
def test_a_gatherer_overtaken_at_any_listing_lists_nothing_twice(
    tmp_path: Path, store: LocalStore, journal: Journal, when: int
) -> None:
    manifests = small(2)
    finish(journal, *manifests)
    slow = _Overtaken(store.root, when, "s00")
    CentralTable(slow).gather(Journal(slow))
    table = CentralTable(store)
    listed = [shard.shard_id for file in table._files() for shard in file.shards]
    assert slow.when <= 0
    assert sorted(listed) == ["s00", "s01"]
    assert contents(table) == undisturbed(tmp_path / "clean", *manifests)


class _Hiding(LocalStore):
    """Between its first two listings of the table two files appear, and the second listing misses
    the earlier one."""

    def __init__(self, root: Path, copy: Path) -> None:
        super().__init__(root)
        self.copy, self.listings = copy, 0

    def list(self, folder: str) -> list[Entry]:
        entries = super().list(folder)
        if folder != "table":
            return entries
        self.listings += 1
        if self.listings == 1:
            other = LocalStore(self.root)
            for shard in ("s00", "s01"):
                CentralTable(other).gather(Journal(other), [shard])
            shutil.copytree(
                self.copy, self.root / "parts", dirs_exist_ok=True
            )  # it died before it dropped them
        elif self.listings == 2:
            return [entry for entry in entries if entry.name != "000001.parquet"]
        return entries


def test_a_file_that_a_listing_missed_is_looked_for(
    store: LocalStore, journal: Journal, tmp_path: Path
) -> None:
    """A folder may be listed while files appear: the later one is seen and the earlier one is
    not."""
    finish(journal, *small(3))
    shutil.copytree(store.root / "parts", tmp_path / "parts")
    hiding = _Hiding(store.root, tmp_path / "parts")
    gathered = CentralTable(hiding).gather(Journal(hiding))
    assert hiding.listings == 3
    assert (gathered.files, gathered.shards) == ((3,), ("s02",))
    listed = [shard.shard_id for file in CentralTable(store)._files() for shard in file.shards]
    assert listed == ["s00", "s01", "s02"]


def test_readers_see_every_row_exactly_once_while_gathering(store: LocalStore, journal: Journal) -> None:
    manifests = small(20)
    finish(journal, *manifests)
    expected = keys(CentralTable(store).scan(journal))
    permits = forks().Semaphore(0)
    process = fork(gather_shards, str(store.root), [[m.shard_id] for m in manifests], None, permits)
    while process.poll() is None:
        permits.release()  # the next shard is gathered while this one reads
        assert keys(CentralTable(store).scan(journal)) == expected
    assert process.returncode == 0, output_of(process)
    assert journal.shard_ids() == []
    assert keys(CentralTable(store).scan(journal)) == expected


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_bad_table_file_is_put_aside_and_its_shards_run_again(
    tmp_path: Path, store: LocalStore, journal: Journal, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifests = small(4)
    expected = undisturbed(tmp_path / "clean", *manifests)
    table = CentralTable(store)
    for manifest in manifests[:3]:
        finish(journal, manifest)
        table.gather(journal)
    path = store.root / "table" / "000002.parquet"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes((store.root / "table" / "000001.parquet").read_bytes())

    table = CentralTable(store)
    assert table.verify() == [2]
    assert "000002.parquet" in caplog.text
    assert (store.root / "table" / "bad" / "000002.parquet").exists()
    assert table.verify() == []
    assert set(table.shards()) == set(CentralTable(store).shards()) == {"s00", "s02"}
    assert duckdb.sql(f"select count(distinct shard_id) from '{store.root}/table/*.parquet'").fetchall() == [
        (2,)
    ]
    finish(journal, manifests[1], manifests[3])
    assert table.gather(journal).files == (4,)  # the number of the bad file is never used again
    assert contents(table) == expected


def test_a_bad_file_met_by_a_gatherer_or_a_reader(
    store: LocalStore, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    finish(journal, *small(2))
    CentralTable(store).gather(journal, ["s00"])
    (store.root / "table" / "000001.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert CentralTable(store).scan(journal)["shard_id"].unique().to_pylist() == ["s01"]
    assert not (store.root / "table" / "bad").exists()  # readers change nothing
    assert CentralTable(store).gather(journal).files == (2,)
    assert (store.root / "table" / "bad" / "000001.parquet").exists()
    assert set(CentralTable(store).shards()) == {"s01"}


def test_failures_are_listed_and_can_be_run_again(store: LocalStore, journal: Journal) -> None:
    finish(journal, make_manifest(), fail=("cell-1", 2))
    table = CentralTable(store)
    assert table.gather(journal).refused is None
    assert table.done() == {"cell-0": {0, 1, 2, 3}, "cell-1": {0, 1, 3}}
    assert table.given_up() == {"cell-1": {2}}
    (failure,) = table.failed()
    assert (failure["cell_id"], failure["group"], failure["shard_id"], failure["attempts"]) == (
        "cell-1",
        2,
        "s0",
        1,
    )

    retry = make_manifest("s1", groups=1, first_group=2, seeds=(1,))
    finish(journal, retry)
    assert table.gather(journal).refused is None
    assert table.failed() == []
    assert table.given_up() == {}
    assert not has_duplicates(sort_rows(table.scan()))
    assert table.scan().num_rows == expected_rows(make_manifest().job)


def test_a_continual_lane_that_failed_is_continued(
    tmp_path: Path, store: LocalStore, journal: Journal
) -> None:
    whole = make_manifest(T=4, groups=4, seeds=(0,), rollback="never", score_at=(4, 8, 12, 16))
    expected = undisturbed(tmp_path / "clean", whole)
    finish(journal, whole, fail=("cell-0", 2))
    table = CentralTable(store)
    assert table.gather(journal).refused is None
    assert table.done() == {"cell-0": {0, 1}}
    assert table.given_up() == {"cell-0": {2, 3}}
    rest = make_manifest(
        "s1", T=4, groups=2, first_group=2, seeds=(0,), rollback="never", score_at=(4, 8, 12, 16)
    )
    finish(journal, rest)
    assert table.gather(journal).refused is None
    for name, rows in contents(table).items():
        assert rows.select(list(STORED[name].key)) == expected[name].select(list(STORED[name].key))


def scores(tables: dict[str, pa.Table]) -> list[tuple[object, ...]]:
    """What a stream reports, of every table, whichever shard it came from."""
    numbers = {"edits": ("case_id", "reliability_token", "details"), "outputs": ("text",)}
    return sorted(
        (
            row
            for name, table in tables.items()
            for names in [(*STORED[name].key, "T", *numbers.get(name, ("edits_applied", "delta_norm")))]
            for row in zip(*(table[column].to_pylist() for column in names), strict=True)
        ),
        key=str,
    )


def test_one_stream_for_many_T_fills_every_cell_as_streams_of_their_own_do(tmp_path: Path) -> None:
    """Also after a failure in mid-lane: each cell keeps the groups that were whole, and a later
    shard runs the rest."""
    score_at = (5, 12, 24)

    def alone(T: int, seed: int) -> ShardManifest:
        cell = make_manifest(T=T, groups=24 // T, seeds=(seed,), rollback="never", score_at=score_at)
        raw = cell.model_dump(mode="json")
        text = json.dumps(raw).replace(
            f'"cell-{seed}"', f'"cell-{seed}-T{T}"' if T != 12 else f'"cell-{seed}"'
        )
        return ShardManifest.model_validate({**json.loads(text), "shard_id": f"T{T}-{seed}"})

    expected = scores(
        undisturbed(tmp_path / "alone", *(alone(T, seed) for T in (1, 4, 12, 24) for seed in (0, 1)))
    )
    shared = make_manifest(T=12, groups=2, rollback="never", score_at=score_at, also_T=(1, 4, 24))
    assert scores(undisturbed(tmp_path / "shared", shared)) == expected

    store = LocalStore(tmp_path / "failed")
    journal, table = Journal(store), CentralTable(store)
    finish(journal, shared, fail=("cell-1", 1))  # at edit 18 of seed 1
    assert table.gather(journal).refused is None
    done = table.done()
    assert {cell: len(groups) for cell, groups in done.items() if "-0" in cell} == {
        "cell-0": 2,
        "cell-0-T1": 24,
        "cell-0-T4": 6,
        "cell-0-T24": 1,
    }
    assert (done["cell-1"], done["cell-1-T1"], done["cell-1-T4"]) == ({0}, set(range(18)), set(range(4)))
    assert "cell-1-T24" not in done
    assert table.given_up()["cell-1-T24"] == {0}
    kept = scores(contents(table))
    assert set(kept) < set(expected)
    starts = {"cell-1": 1, "cell-1-T1": 18, "cell-1-T4": 4, "cell-1-T24": 0}
    cells = tuple(cell for cell in shared.job.cells if cell.seed == 1)
    first, *also = (
        Share(cell=i, group=starts[c.cell_id], stop_group=24 // (c.T or 12)) for i, c in enumerate(cells)
    )
    lane = Lane(**first.model_dump(), also=tuple(also))
    job = shared.job.model_copy(update={"cells": cells, "waves": ((lane,),)})
    columns = {cell: shared.columns[cell] for cell in starts}
    finish(journal, ShardManifest(shard_id="rest", job=job, bounds=cut_steps(job, 4), columns=columns))
    assert table.gather(journal).refused is None
    assert scores(contents(table)) == expected
    assert table.given_up() == {}


def test_a_lane_that_serves_smaller_T_fills_their_cells_as_lanes_of_their_own_do(tmp_path: Path) -> None:
    """Also after a failure in mid-group: what was complete stays, and a later shard runs the
    rest."""
    score_at = (2, 5)

    def alone(T: int, groups: Sequence[int]) -> list[ShardManifest]:
        name = "cell-%d" if T == 12 else f"cell-%d-T{T}"
        found = []
        for group in groups:
            made = make_manifest(f"{T}-{group}", T=T, groups=1, first_group=group, score_at=score_at)
            text = (
                made.model_dump_json()
                .replace('"cell-0"', f'"{name % 0}"')
                .replace('"cell-1"', f'"{name % 1}"')
            )
            found.append(ShardManifest.model_validate_json(text))
        return found

    served = {
        12: (0, 1),
        8: (0,),
        4: (0, 3),
        1: (0, 12),
    }  # T=8's second group starts within the first of T=12
    expected = scores(
        undisturbed(tmp_path / "alone", *(m for T, groups in served.items() for m in alone(T, groups)))
    )
    shared = make_manifest(T=12, groups=2, score_at=score_at, also_T=(8, 4, 1))
    assert scores(undisturbed(tmp_path / "shared", shared)) == expected

    store = LocalStore(tmp_path / "failed")
    journal, table = Journal(store), CentralTable(store)
    finish(journal, shared, fail=("cell-1", 0))  # at its seventh edit
    assert table.gather(journal).refused is None
    assert table.given_up() == {"cell-1": {0}, "cell-1-T8": {0}}
    done = table.done()
    assert (done["cell-0-T8"], done["cell-1"], done["cell-1-T4"], done["cell-1-T1"]) == (
        {0},
        {1},
        {0, 3},
        {0, 12},
    )
    kept = scores(contents(table))
    assert set(kept) < set(expected)
    retry = make_manifest("retry", T=12, groups=1, seeds=(1,), score_at=score_at, also_T=(8,))
    finish(journal, retry)
    assert table.gather(journal).refused is None
    assert scores(contents(table)) == expected
    assert table.given_up() == {}


def test_rows_that_are_not_the_plan_are_refused(store: LocalStore, journal: Journal) -> None:
    short, twice, other = (
        make_manifest("short"),
        make_manifest("twice", cell="b"),
        make_manifest("other", cell="c"),
    )
    for manifest in (short, twice):
        journal.begin(manifest)
        attempt = journal.claim(manifest.shard_id, "r1")
        for start, stop, rows, failures, state in run_steps(manifest):
            if manifest is short and start == 0:
                rows.pop()
            elif manifest is twice and start == 0:
                rows[1] = rows[0]
            attempt.commit(
                start, stop, rows, failures, state, {"edits": 1, "edit_seconds": 0, "score_seconds": 0}
            )
    finish(journal, other)
    table = CentralTable(store)
    gathered = table.gather(journal)
    assert gathered.shards == ("other",)
    assert gathered.refused is not None
    assert "asks for rows per cell" in gathered.refused["short"]
    assert gathered.refused["twice"]
    assert set(journal.shard_ids()) == {"short", "twice"}  # nothing is thrown away
    finish(journal, make_manifest("again", cell="c"))
    assert "in the table already" in (table.gather(journal, ["again"]).refused or {})["again"]


def test_columns_can_be_chosen(store: LocalStore, journal: Journal) -> None:
    finish(journal, *small(2))
    table = CentralTable(store)
    table.gather(journal, ["s00"])
    rows = table.scan(journal, ["seed", "cell_id"])
    assert rows.column_names == ["seed", "cell_id"]
    assert set(rows["cell_id"].to_pylist()) == {"c00-0", "c00-1", "c01-0", "c01-1"}
    with pytest.raises(TableError, match=r"unknown columns.*nothing.*valid are.*cell_id"):
        table.scan(journal, ["nothing"])


def test_plain_tools_read_the_files(store: LocalStore, journal: Journal) -> None:
    finish(journal, *small(2))
    table = CentralTable(store)
    table.gather(journal, ["s00"])
    table.gather(journal, ["s01"])
    rows = table.scan().num_rows
    folder = store.root / "table"
    assert len(pd.read_parquet(folder)) == rows
    assert len(pl.read_parquet(folder / "*.parquet")) == rows
    assert duckdb.sql(f"select count(*) from read_parquet('{folder}/*.parquet')").fetchall() == [(rows,)]
    assert pl.read_parquet(folder / "*.parquet")["T"].dtype == pl.Int32


def test_groups_of_a_larger_sweep_do_not_count() -> None:
    assert [count_done(done, 3) for done in (set(), {0, 2}, {0, 1, 2}, {0, 2, 3, 7})] == [0, 2, 3, 2]
