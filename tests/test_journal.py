"""A shard's progress survives kills, races, zombies and damaged files, with the same rows in the
end."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from orchestrator.results.columns import CELL_COLUMNS, TableError
from orchestrator.results.journal import Journal, JournalError, Superseded
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.table import CentralTable
from orchestrator.storage import local as store_module
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from tests.processes import fork, forks
from tests.shards import (
    STATS,
    claim_attempts,
    commit_steps,
    contents,
    finish,
    make_manifest,
    run_shard,
    run_steps,
    undisturbed,
)
from tests.waiting import output_of, stop, wait_for
from workers.types import EditSweepError

PATHS = ResultsPaths()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


@pytest.fixture
def journal(store: LocalStore) -> Journal:
    return Journal(store)


def result(store: LocalStore) -> object:
    """The final table of a folder, in comparable form."""
    table, journal = CentralTable(store), Journal(store)
    gathered = table.gather(journal)
    assert not gathered.refused
    assert journal.shard_ids() == []
    return contents(table)


def files(store: LocalStore, pattern: str) -> list[Path]:
    return sorted(store.root.glob(pattern))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x10
    path.write_bytes(data)


def test_manifest_round_trip_and_checks() -> None:
    manifest = make_manifest()
    assert ShardManifest.model_validate_json(manifest.model_dump_json()) == manifest
    with pytest.raises(ValueError, match="last tick"):
        ShardManifest(**{**dict(manifest), "bounds": manifest.bounds[:-1]})
    with pytest.raises(ValueError, match="cells of the job"):
        ShardManifest(**{**dict(manifest), "columns": {}})
    with pytest.raises(ValueError, match=sorted(CELL_COLUMNS)[0]):
        ShardManifest(**{**dict(manifest), "columns": {cell: {} for cell in manifest.columns}})


def test_begin_is_idempotent_and_keeps_the_composition(journal: Journal) -> None:
    manifest = make_manifest()
    journal.begin(manifest)
    journal.begin(manifest)
    assert journal.begun() == {"s0": manifest}
    with pytest.raises(JournalError, match="another composition"):
        journal.begin(make_manifest(groups=2))
    with pytest.raises(JournalError, match="has not begun"):
        journal.claim("unknown", "r1")


def test_progress_counts_what_is_durable(journal: Journal) -> None:
    manifest = make_manifest()
    journal.begin(manifest)
    progress = journal.progress("s0")
    assert (progress.committed, progress.attempts, progress.finished, progress.error) == (0, 0, False, None)
    attempt = journal.claim("s0", "r1", {"host": "h", "pid": 1})
    assert (attempt.number, attempt.position, attempt.state) == (1, 0, None)
    commit_steps(attempt, 2)
    progress = journal.progress("s0")
    assert progress.committed == manifest.bounds[1] == attempt.position
    assert (progress.ticks, progress.edits, progress.edit_seconds) == (manifest.bounds[-1], 4, 2.0)
    assert progress.rows == journal.committed_rows("s0").num_rows > 0
    assert progress.commit_seconds > 0
    assert attempt.commit_seconds > progress.commit_seconds
    assert journal.finished() == []
    commit_steps(journal.claim("s0", "r2"))
    assert journal.progress("s0").finished
    assert journal.finished() == ["s0"]
    assert journal.claim("s0", "r3").finished


def test_a_new_attempt_continues_exactly(tmp_path: Path, store: LocalStore, journal: Journal) -> None:
    manifest = make_manifest(T=10, score_at=(5,))
    journal.begin(manifest)
    attempts = 0
    while not journal.progress("s0").finished:
        commit_steps(journal.claim("s0", "r1"), 1)
        attempts += 1
        # two edit states at most, however many attempts there were
        assert len(files(store, "parts/s0/*/*.safetensors")) <= 2
    assert attempts == len(manifest.bounds)
    assert result(store) == undisturbed(tmp_path / "clean", manifest)


def test_continual_lanes_continue_exactly(tmp_path: Path, store: LocalStore, journal: Journal) -> None:
    manifest = make_manifest(T=5, groups=3, first_group=1, rollback="never", score_at=(10, 15))
    journal.begin(manifest)
    while not journal.progress("s0").finished:
        commit_steps(journal.claim("s0", "r1"), 3)
    assert result(store) == undisturbed(tmp_path / "clean", manifest)


@pytest.mark.parametrize("also_T", [(), pytest.param((16, 10, 1), marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, also_T: tuple[int, ...]) -> None:
    """Each process is killed after a random number of commits, or it was quicker; so many shards
    that five were killed."""
    manifest = make_manifest(T=40, groups=4, step_edits=2, score_at=(6,), also_T=also_T)
    expected = undisturbed(tmp_path / "clean", manifest)
    chance = random.Random(7)
    kills = rounds = 0
    while kills < 5:
        rounds += 1
        store = LocalStore(tmp_path / f"r{rounds}")
        journal = Journal(store)
        journal.begin(manifest)
        committed = killed = 0
        while committed < manifest.bounds[-1]:
            process = fork(run_shard, str(store.root), manifest.model_dump_json())
            goal = committed + chance.randrange(1, manifest.bounds[-1] // 6)
            while process.poll() is None and journal.progress("s0").committed < goal:
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.005))
            killed += process.poll() is None
            process.kill()
            output_of(process)
            committed = journal.progress("s0").committed
        assert len(files(store, "parts/s0/*/.tmp-*")) <= killed
        assert result(store) == expected
        kills += killed


def test_two_claimers_never_share_an_attempt(store: LocalStore, journal: Journal) -> None:
    journal.begin(make_manifest())
    barrier, answer = forks().Barrier(2), forks().SimpleQueue()
    runs = [fork(claim_attempts, str(store.root), "s0", 15, barrier, answer) for _ in range(2)]
    numbers = [number for _ in runs for number in answer.get()]
    for run in runs:
        output_of(run)
    assert sorted(numbers) == list(range(1, 31))


def test_a_replaced_attempt_is_told(journal: Journal) -> None:
    journal.begin(make_manifest())
    old = journal.claim("s0", "r1")
    commit_steps(old, 1)
    journal.claim("s0", "r2")
    with pytest.raises(Superseded):
        commit_steps(old, 1)


def test_what_a_zombie_writes_does_not_count(tmp_path: Path, store: LocalStore, journal: Journal) -> None:
    manifest = make_manifest(T=10)
    journal.begin(manifest)
    zombie = journal.claim("s0", "r1")
    commit_steps(zombie, 2)
    # the zombie checks, is paused, is replaced, and then writes its next two parts
    shutil.copytree(store.root, tmp_path / "zombie")
    commit_steps(
        dataclasses.replace(zombie, store=LocalStore(tmp_path / "zombie"), _kept=list(zombie._kept)), 2
    )
    new = journal.claim("s0", "r2")
    commit_steps(new, 1)
    shutil.copytree(
        tmp_path / "zombie" / "parts" / "s0" / "0001",
        store.root / "parts" / "s0" / "0001",
        dirs_exist_ok=True,
    )
    assert journal.progress("s0").committed == new.position
    commit_steps(journal.claim("s0", "r3"))
    assert result(store) == undisturbed(tmp_path / "clean", manifest)


def test_a_process_stopped_and_replaced_changes_nothing(
    tmp_path: Path, store: LocalStore, journal: Journal
) -> None:
    """SIGSTOP in the middle, replaced, finished, gathered, SIGCONT: the table stays as it is and
    the next gather tidies."""
    manifest = make_manifest(groups=6, step_edits=2)
    expected = undisturbed(tmp_path / "clean", manifest)
    for gather_first in (False, True):
        marker = tmp_path / f"go-{gather_first}"
        process = fork(run_shard, str(store.root), manifest.model_dump_json(), 2, str(marker))
        wait_for(Path(f"{marker}.reached").exists, process)
        stop(process.pid)
        finish(journal, manifest)
        if gather_first:
            CentralTable(store).gather(journal)
        marker.touch()
        process.send_signal(signal.SIGCONT)
        output_of(process)
        assert contents(CentralTable(store), journal) == expected
        CentralTable(store).gather(journal)
        assert contents(CentralTable(store), journal) == expected
        assert journal.shard_ids() == []
        shutil.rmtree(store.root / "table")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "delete"])
def test_a_damaged_part_is_done_again(
    tmp_path: Path, store: LocalStore, journal: Journal, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest(T=10, step_edits=4)
    expected = undisturbed(tmp_path / "clean", manifest)
    chance = random.Random(damage)
    journal.begin(manifest)
    finish(journal, make_manifest("s1", T=10, step_edits=4, cell="other"))
    commit_steps(journal.claim("s0", "r1"), len(manifest.bounds) - 2)
    for _ in range(3):
        chain = journal._chain("s0", journal._attempts("s0"))
        part = store.root / journal._part_key("s0", chance.choice(chain))
        data = part.read_bytes()
        if damage == "flip":
            flip(part, chance.randrange(len(data)))
        elif damage == "truncate":
            part.write_bytes(data[: chance.randrange(len(data))])
        elif damage == "empty":
            part.write_bytes(b"")
        elif damage == "foreign":
            part.write_bytes((store.root / "parts" / "s1" / "0001" / part.name).read_bytes())
        else:
            part.unlink()
        caplog.clear()
        attempt = journal.claim("s0", "r2")
        named = part.name in caplog.text
        assert named or damage == "delete"
        commit_steps(attempt, 2)
    journal.drop("s1")
    commit_steps(journal.claim("s0", "r3"))
    assert result(store) == expected


def test_state_and_part_are_durable_when_a_commit_returns(
    store: LocalStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is durable once its folder was synced with the name in it."""
    synced: dict[Path, set[str]] = {}
    sync = store_module._sync_folder

    def noting(folder: Path) -> None:
        synced[folder] = {path.name for path in folder.iterdir()}
        sync(folder)

    monkeypatch.setattr(store_module, "_sync_folder", noting)
    journal.begin(make_manifest(T=10))
    attempt = journal.claim("s0", "r1")
    for steps in (1, 2, 3):
        commit_steps(attempt, 1)
        there = [path for path in files(store, "parts/s0/0001/*") if not path.name.startswith(".")]
        assert len(there) == 1 + steps + min(steps, 2)  # attempt, parts, the two newest states
        assert {path.name for path in there} <= synced[there[0].parent]


def test_damage_found_while_gathering(tmp_path: Path, store: LocalStore, journal: Journal) -> None:
    manifests = [make_manifest("s0"), make_manifest("s1", cell="other")]
    expected = undisturbed(tmp_path / "clean", *manifests)
    finish(journal, *manifests)
    flip(files(store, "parts/s1/0001/*.parquet")[1], 700)
    gathered = CentralTable(store).gather(journal)
    assert (gathered.shards, gathered.again, gathered.refused) == (("s0",), ("s1",), None)
    assert not journal.progress("s1").finished
    assert len(files(store, "parts/s1/bad/*")) == 1
    commit_steps(journal.claim("s1", "r2"))
    assert result(store) == expected


def test_bad_checkpoints_go_back_step_by_step(
    tmp_path: Path, store: LocalStore, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest(T=20, groups=2, seeds=(0,), step_edits=4)
    wave_end = next(stop for _, stop, _, _, state in run_steps(manifest) if state is None)
    steps_of_wave = manifest.bounds.index(wave_end) + 1
    expected = undisturbed(tmp_path / "clean", manifest)
    journal.begin(manifest)
    commit_steps(journal.claim("s0", "r1"), steps_of_wave + 4)
    previous, newest = files(store, "parts/s0/*/*.safetensors")
    reached = journal.progress("s0").committed

    flip(newest, 5)
    attempt = journal.claim("s0", "r2")
    assert wave_end < attempt.position < reached
    assert newest.name in caplog.text
    assert attempt.state == previous.read_bytes()

    previous.write_bytes(previous.read_bytes()[:-1])
    attempt = journal.claim("s0", "r3")
    assert (attempt.position, attempt.state) == (wave_end, None)
    assert journal.progress("s0").committed == wave_end
    commit_steps(attempt)
    assert result(store) == expected


@pytest.mark.parametrize("name", ["attempt.json", "manifest.json"])
def test_damaged_small_files(
    tmp_path: Path, store: LocalStore, journal: Journal, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest(T=10)
    expected = undisturbed(tmp_path / "clean", manifest)
    journal.begin(manifest)
    commit_steps(journal.claim("s0", "r1"), 3)
    commit_steps(journal.claim("s0", "r1"), 2)
    flip(files(store, f"parts/s0/**/{name}")[-1], 60)
    journal.begin(manifest)
    assert journal.begun() == {"s0": manifest}
    attempt = journal.claim("s0", "r1")
    assert name in caplog.text
    assert attempt.number == 3
    # without its chain nothing tells where the newest attempt stood; what remains is where the
    # lanes were pristine
    assert attempt.position == (0 if name == "attempt.json" else manifest.bounds[4])
    commit_steps(attempt)
    assert result(store) == expected


def test_a_damaged_manifest_is_no_reason_to_stop(store: LocalStore, journal: Journal) -> None:
    finish(journal, make_manifest("s0"), make_manifest("s1", cell="other"))
    flip(files(store, "parts/s0/manifest.json")[0], 90)
    assert set(journal.begun()) == {"s1"}
    assert journal.finished() == ["s1"]
    assert CentralTable(store).scan(journal).num_rows == journal.progress("s1").rows


def test_planted_files_are_not_read(store: LocalStore, journal: Journal) -> None:
    journal.begin(make_manifest())
    attempt = journal.claim("s0", "r1")
    folder = store.root / "parts" / "s0" / "0001"
    (folder / "00000000-00000004.pkl").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "state.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    commit_steps(attempt, 1)
    assert journal.progress("s0").committed == attempt.position


def test_a_commit_must_follow_the_last(journal: Journal) -> None:
    manifest = make_manifest()
    journal.begin(manifest)
    attempt = journal.claim("s0", "r1")
    first, second, *_ = run_steps(manifest)
    with pytest.raises(JournalError, match="at tick 0"):
        attempt.commit(*second, STATS)
    with pytest.raises(JournalError, match="cannot commit"):
        attempt.commit(first[0], first[1] + 1, *first[2:], STATS)
    attempt.commit(*first, STATS)
    with pytest.raises(JournalError, match="cannot commit"):
        attempt.commit(*first, STATS)


def test_wrong_rows_are_refused_and_nothing_is_committed(journal: Journal) -> None:
    manifest = make_manifest()
    journal.begin(manifest)
    attempt = journal.claim("s0", "r1")
    start, stop, rows, failures, state = next(run_steps(manifest))
    wrong = [
        ({k: v for k, v in rows[0].items() if k != "loss"}, "missing columns.*loss"),
        ({**rows[0], "extra": 1}, "unknown columns.*extra"),
        ({**rows[0], "cell_id": "foreign"}, "not in shard"),
        ({**rows[0], "group": None}, "group must not be null"),
        ({**rows[0], "position": 1.5}, "column position"),
        ({**rows[0], "reliability_token": "high"}, "column reliability_token"),
    ]
    for row, message in wrong:
        with pytest.raises(TableError, match=message):
            attempt.commit(start, stop, [row], failures, state, STATS)
    with pytest.raises(JournalError, match="stats must be"):
        attempt.commit(start, stop, rows, failures, state, {"edits": 1})
    with pytest.raises(JournalError, match="a failure must have"):
        attempt.commit(start, stop, rows, [{"cell_id": "x"}], state, STATS)
    assert journal.progress("s0").committed == 0
    attempt.commit(start, stop, rows, failures, state, STATS)
    assert journal.progress("s0").committed == stop


def test_a_commit_whose_success_was_not_reported_may_be_repeated(store: LocalStore, journal: Journal) -> None:
    manifest = make_manifest()
    journal.begin(manifest)
    attempt = journal.claim("s0", "r1")
    again = dataclasses.replace(attempt, _kept=[])
    step = next(run_steps(manifest))
    attempt.commit(*step, STATS)
    again.commit(*step, STATS)
    other = dataclasses.replace(attempt, position=0, _kept=[])
    with pytest.raises(JournalError, match="two workers share attempt"):
        other.commit(step[0], step[1], step[2][:-1], *step[3:], STATS)
    assert issubclass(JournalError, EditSweepError)


def test_errors_are_kept_per_attempt(journal: Journal) -> None:
    journal.begin(make_manifest())
    for number in (1, 2):
        assert journal.claim("s0", "r1").number == number
        journal.record_error(
            "s0", number, {"kind": "RuntimeError", "message": f"number {number}", "log": "logs/x.log"}
        )
    assert journal.errors("s0")[1]["message"] == "number 1"
    error = journal.progress("s0").error
    assert error is not None
    assert error["message"] == "number 2"
    journal.claim("s0", "r1")
    assert journal.progress("s0").error is None


def test_failed_groups_keep_no_rows(journal: Journal) -> None:
    manifest = make_manifest()
    finish(journal, manifest, fail=("cell-1", 2))
    progress = journal.progress("s0")
    assert progress.finished
    assert [(f["cell_id"], f["group"]) for f in progress.failures] == [("cell-1", 2)]
    rows = journal.committed_rows("s0")
    pairs = set(zip(rows["cell_id"].to_pylist(), rows["group"].to_pylist(), strict=True))
    assert pairs == {(f"cell-{s}", g) for s in (0, 1) for g in range(4)} - {("cell-1", 2)}
