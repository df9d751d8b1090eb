"""Base-model scores as artifacts: computed once for all methods that score the same batches, and no bit is another one."""

from __future__ import annotations

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import build_artifacts, run_sweep
from orchestrator.engine.worker import Bench
from orchestrator.planning.plan import Progress, make_plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.planning.work import base_scores_of
from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.storage.local import LocalStore
from tests.engine import Watch, rows
from tests.processes import fork
from tests.small import golden_requests, random_model
from tests.waiting import output_of
from workers.artifacts import base_scores as basescores
from workers.artifacts.base import BASE_SCORES, ArtifactData, ArtifactSpec
from workers.artifacts.base_scores import BaseScores
from workers.job import Lane, ScoreConfig, StreamCell, StreamJob, schedule_of
from workers.model.base import BaseModel
from workers.model.config import EMBEDDED, ModelConfig
from workers.model.overlay import DenseOverlay
from workers.scoring import fluency
from workers.scoring import score as scoring
from workers.scoring.cache import BaseAnswers, digest
from workers.scoring.probes import Answer, Item, Reply, Text
from workers.scoring.score import ask_base, score
from workers.timeline import timeline

FT: dict[str, Any] = {"method": "ft", "hparams": {"num_steps": 2}}
GRACE: dict[str, Any] = {"method": "grace", "hparams": {"n_iter": 2}}
RAW: dict[str, Any] = {
    "name": "both",
    "model": {"name": EMBEDDED, "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 6},
    "grid": {"T": [1, 3], "seeds": [0, 1]},
    "methods": [FT, GRACE],
    "scoring": {"fluency_tokens": 2, "tokens_per_batch": 200},
    "engine": {"lanes": 6, "lanes_across_seeds": True, "shard_edits": 6, "step_edits": 3, "checkpoint_seconds": 0},
}


def spec_of(**changes: Any) -> SweepSpec:
    return parse_spec(yaml.safe_dump({**RAW, **changes}), "b.yaml", Path("/"))


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"artifacts/{BASE_SCORES}/*.safetensors"))


class Calls:
    """How often the base model itself answered a scoring batch, and wrote texts for `fluency`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.replies = self.entropies = 0
        self.read_reply, self._entropies = scoring.read_reply, fluency._entropies
        patch.setattr(scoring, "read_reply", self.reply)
        patch.setattr(fluency, "_entropies", self.write)

    def reply(self, base: BaseModel, overlay: Any, *rest: Any) -> Any:
        self.replies += overlay is None
        return self.read_reply(base, overlay, *rest)

    def write(self, base: BaseModel, overlay: Any, *rest: Any) -> Any:
        self.entropies += overlay is None
        return self._entropies(base, overlay, *rest)

    def take(self) -> tuple[int, int]:
        found = (self.replies, self.entropies)
        self.replies = self.entropies = 0
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the sweep one method at a time, so that every shard asks the base model itself: what is added later finds
    nobody to share with."""
    folder = tmp_path_factory.mktemp("alone")
    one_by_one(folder)
    found = rows(folder)
    assert {row["fluency_base"] is None for row in found} == {True, False}
    return found


def one_by_one(folder: Path, **changes: Any) -> None:
    assert run_sweep(spec_of(methods=[GRACE], **changes), LocalStore(folder), run_local, Watch()).exit_code == 0
    assert run_sweep(spec_of(**changes), LocalStore(folder), run_local, Watch()).exit_code == 0
    assert not stored(folder)


# --- in the engine ---------------------------------------------------------------------------------------------------


def test_shards_ask_the_base_model_nothing_and_rows_keep_their_bits(
    tmp_path: Path, alone: list[dict[str, Any]], calls: Calls
) -> None:
    watch = Watch()
    states, _ = build_artifacts(spec_of(), LocalStore(tmp_path), run_local, watch)
    assert [(state.spec.kind, state.state) for state in states] == [(BASE_SCORES, "built")] * 3  # two of T=1
    assert [note for note in watch.notes if BASE_SCORES in note] == [f"artifacts built: 3 {BASE_SCORES}"]
    replies, entropies = calls.take()
    assert replies > 4 and entropies > 2
    assert run_sweep(spec_of(), LocalStore(tmp_path), run_local, Watch()).exit_code == 0
    assert calls.take() == (0, 0)
    assert rows(tmp_path) == alone
    states, _ = build_artifacts(spec_of(), LocalStore(tmp_path), run_local, Watch())
    assert not states  # nothing is left that could use them


def test_what_is_gone_or_damaged_is_computed_in_place(
    tmp_path: Path, alone: list[dict[str, Any]], calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    build_artifacts(spec_of(), LocalStore(tmp_path), run_local, Watch())
    first, second, _ = stored(tmp_path)
    first.write_bytes(first.read_bytes()[:-20])

    def steal(step: Any) -> None:
        second.unlink(missing_ok=True)

    calls.take()
    with caplog.at_level(logging.WARNING):
        assert run_sweep(spec_of(), LocalStore(tmp_path), run_local, Watch(steal)).exit_code == 0
    assert "checksum does not match" in caplog.text and "put aside as" in caplog.text
    assert len(list((tmp_path / "artifacts" / "bad").iterdir())) == 1
    assert calls.take()[0]
    assert rows(tmp_path) == alone


def test_what_another_processor_said_is_not_used(tmp_path: Path, alone: list[dict[str, Any]], calls: Calls) -> None:
    states, _ = build_artifacts(spec_of(), LocalStore(tmp_path), run_local, Watch())
    built = calls.take()
    for path in stored(tmp_path):
        made = ArtifactData.from_bytes(path.read_bytes())
        made.meta["made_on"] = {**made.meta["made_on"], "processor": "another"}
        path.unlink()
        path.with_suffix(".json").unlink()
        (spec,) = [state.spec for state in states if state.spec.key == path.stem]
        ArtifactStore(LocalStore(tmp_path)).put(spec, made.to_bytes())
    assert run_sweep(spec_of(), LocalStore(tmp_path), run_local, Watch()).exit_code == 0
    assert calls.take() == built  # both methods ran in this process, which keeps what it has heard
    assert rows(tmp_path) == alone


def test_a_failed_build_fails_no_shard(
    tmp_path: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(basescores, "ask_base", broken)
    watch = Watch()
    assert run_sweep(spec_of(), LocalStore(tmp_path), run_local, watch).exit_code == 0
    assert sum(BASE_SCORES in text and "ValueError: no" in text for text in watch.warnings) == 3
    assert rows(tmp_path) == alone


def build_and_die(folder: str, spec: str) -> None:
    def tell(done: int, total: int, what: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Bench(folder, "r0", save_seconds=0).build(
        ArtifactSpec.model_validate_json(spec), ModelConfig(device="cpu"), 1, tell
    )


def test_killed_while_building_and_run_again(tmp_path: Path) -> None:
    spec, *_ = make_plan(spec_of()).base_scores()
    killed = fork(build_and_die, str(tmp_path / "r"), spec.model_dump_json())
    output_of(killed)
    assert killed.returncode == -signal.SIGKILL
    assert not stored(tmp_path / "r")
    (unfinished,) = ArtifactStore(LocalStore(tmp_path / "r")).unfinished()
    assert (unfinished["kind"], unfinished["key"]) == (BASE_SCORES, spec.key)
    assert 0 < unfinished["done"] < 3
    told: list[int] = []
    Bench(str(tmp_path / "whole"), "r1").build(spec, spec_of().model, 1)
    Bench(str(tmp_path / "r"), "r1").build(spec, spec_of().model, 1, lambda done, total, what: told.append(done))
    assert told[0] == unfinished["done"] + 1
    assert stored(tmp_path / "r")[0].read_bytes() == stored(tmp_path / "whole")[0].read_bytes()


def test_the_command_tells_them_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "b.yaml", tmp_path / "r"
    path.write_text(yaml.safe_dump(RAW))

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        return capsys.readouterr().out

    text = call("plan", str(path), "--results", str(folder))
    assert "what 6 of 6 shards score are computed once for 3 schedules that several share" in text
    command = ("artifacts", str(path), "--results", str(folder), "--engine", "local")
    (line,) = [line for line in call(*command).splitlines() if BASE_SCORES in line]
    assert "3 of them" in line and "KiB" in line and line.rstrip().endswith("built")
    (line,) = [line for line in call(*command).splitlines() if BASE_SCORES in line]
    assert "3 of them" in line and line.rstrip().endswith("present")


# --- who shares with whom --------------------------------------------------------------------------------------------


def keys_of(**changes: Any) -> list[str]:
    return [spec.key for spec in make_plan(spec_of(**changes)).base_scores()]


def test_the_key_is_what_is_scored_and_nothing_else() -> None:
    keys = keys_of()
    assert len(set(keys)) == 3
    others = [{**FT, "hparams": {"num_steps": 3}, "label": "b"}, {"method": "none"}]
    assert keys_of(methods=others) == keys
    assert keys_of(name="another", methods=[FT, GRACE, *others]) == keys
    assert keys_of(engine={**RAW["engine"], "step_edits": 6, "threads": 2}) == keys
    for changes in (
        {"grid": {"T": [1, 3], "seeds": [0, 2]}},
        {"grid": {"T": [2, 6], "seeds": [0, 1]}},
        {"grid": {"T": [2, 6], "seeds": [0, 1], "batch_size": 2}, "methods": [FT, others[0]]},
        {"scoring": {**RAW["scoring"], "tokens_per_batch": 201}},
        {"scoring": {**RAW["scoring"], "generated": False}},
        {"dataset": {**RAW["dataset"], "order": "file"}, "methods": [FT, others[0]]},
        {"model": {**RAW["model"], "dtype": "float64"}},
        {"engine": {**RAW["engine"], "lanes": 2}},
    ):
        found = keys_of(**changes)
        assert found and not set(found) & set(keys), changes


def test_recipes_follow_model_and_data() -> None:
    plan = make_plan(spec_of())
    job = plan.manifest(plan.shards[0]).job
    key = base_scores_of(plan.common, job).key
    for name in ("model_fingerprint", "tokenizer_fingerprint", "dataset_fingerprint"):
        assert base_scores_of(plan.common.model_copy(update={name: "x"}), job).key != key


def test_shards_that_have_begun_count() -> None:
    plan = make_plan(spec_of())
    keys = {spec.key for spec in plan.base_scores()}
    begun = plan.manifest(plan.shards[0])
    again = make_plan(spec_of(), Progress(begun=[begun]))
    assert [shard.begun for shard in again.shards] == [True] + [False] * 5
    assert {spec.key for spec in again.base_scores()} == keys
    done = {cell.cell_id: range(cell.groups) for cell in plan.cells if plan.variants[cell.variant].label == "ft"}
    assert not make_plan(spec_of(), Progress(done=done)).base_scores()


def test_without_rollback_one_stream_for_all_T(tmp_path: Path, calls: Calls) -> None:
    changes = {"grid": {"T": [1, 3], "seeds": [0], "rollback": "never"}}
    (spec,) = make_plan(spec_of(**changes)).base_scores()
    run_sweep(spec_of(**changes), LocalStore(tmp_path / "r"), run_local, Watch())
    assert [path.stem for path in stored(tmp_path / "r")] == [spec.key]
    made = calls.take()
    Bench(str(tmp_path / "again"), "r").build(spec, spec_of().model, 1)
    assert calls.take() == made
    one_by_one(tmp_path / "alone", **changes)
    assert rows(tmp_path / "r") == rows(tmp_path / "alone")


def test_what_this_process_has_heard_is_not_asked_again(tmp_path: Path, calls: Calls) -> None:
    """Schedules that were cut at different places have batches in common."""
    spec, *_ = make_plan(spec_of()).base_scores()
    bench = Bench(str(tmp_path / "a"), "r")
    bench.build(spec, spec_of().model, 1)
    assert calls.take()[0]
    (path,) = stored(tmp_path / "a")
    data = path.read_bytes()
    path.unlink()
    path.with_suffix(".json").unlink()
    bench.build(spec, spec_of().model, 1)
    assert calls.take() == (0, 0) and path.read_bytes() == data


# --- in a stream -----------------------------------------------------------------------------------------------------


def test_replies_come_back_bit_by_bit() -> None:
    base = random_model("llama")
    kept = BaseAnswers(budget=9)
    odd = Reply(
        (Answer((1, 2, 3), -0.1, 1e-300, 1 / 3), Answer((7,), -math.inf, math.inf, 0.0)),
        (Text("", natural=True), Text("ein Straßenname\n\ud800", natural=False)),
    )
    nothing = Reply((Answer((5, 5), -1.5, 0.0, 1.0),), (Text(None, natural=False),))
    kept.put(("a",), odd)
    kept.put(("b",), nothing)
    kept.numbers.put(("c",), (None, 0.1, None))
    data = basescores._pack(base, None, kept, 3)
    found = BaseScores.open(type(data).from_bytes(data.to_bytes()), base)
    assert found is not None
    assert [found.reply(digest((name,))) for name in "abc"] == [odd, nothing, None]
    assert [found.numbers(digest((name,))) for name in "bc"] == [None, (None, 0.1, None)]
    empty = BaseScores.open(basescores._pack(base, None, BaseAnswers(), 0), base)
    assert empty is not None and empty.reply(digest(("a",))) is None


def test_what_is_not_among_them_is_asked(calls: Calls) -> None:
    """A lane that failed is no longer scored, and batches are others without it."""
    base, config = random_model("llama"), ScoreConfig(tokens_per_batch=300)
    site = base.site(1)
    overlay = DenseOverlay([site], 2, torch.float32)
    overlay.weights_LOI[site.name][1] *= 1.5
    items = [Item(i % 2, request) for i, request in enumerate(golden_requests(12))]
    kept = BaseAnswers(budget=999)
    ask_base(base, items, config, kept)
    asked, _ = calls.take()
    known = BaseScores.open(basescores._pack(base, None, kept, 1), base)
    answers = BaseAnswers()
    answers.know(known)
    whole = score(base, overlay, items, config, answers)
    assert calls.take() == (0, 0) and answers.given == asked and not answers.misses
    assert whole == score(base, overlay, items, config)
    calls.take()
    some = score(base, overlay, items[::2], config, answers)
    assert calls.take()[0] == answers.misses > 0
    assert some == score(base, overlay, items[::2], config)
    answers.know(None)
    calls.take()
    score(base, overlay, items, config, answers)
    assert calls.take()[0] == asked  # nothing of it has stayed


def test_a_batch_that_memory_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = random_model("llama"), ScoreConfig(tokens_per_batch=300)
    items = [Item(0, request) for request in golden_requests(12)]
    whole, part = BaseAnswers(budget=999), BaseAnswers(budget=999)
    ask_base(base, items, config, whole)
    real, count = scoring.read_reply, iter(range(99))

    def failing(*arguments: Any) -> Reply:
        if next(count) == 1:
            raise MemoryError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(scoring, "read_reply", failing)
    ask_base(base, items, config, part)
    assert len(list(part.items())) == len(list(whole.items())) - 1
    assert dict(part.items()).items() <= dict(whole.items()).items()


def test_a_schedule_is_a_job_without_its_method() -> None:
    cells = tuple(StreamCell(cell_id=f"c{seed}", seed=seed, artifacts={"x": "y"}) for seed in (0, 1))
    waves = ((Lane(cell=0, group=0, stop_group=1), Lane(cell=1, group=0, stop_group=1)),)
    job = StreamJob(method="ft", config={"lr": 1}, cells=cells, T=4, waves=waves)
    score_config = ScoreConfig(ability_text=Path("/a"), ability_tokens=9)
    other = job.model_copy(update={"method": "rome", "config": {}, "score": score_config})
    assert schedule_of(job) == schedule_of(other)
    assert timeline(schedule_of(job)) == timeline(job)
    again = StreamJob.model_validate_json(schedule_of(job).model_dump_json())
    assert again == schedule_of(job)
