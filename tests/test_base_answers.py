"""The base model's replies, kept by a process: asked once, and no bit is another one. Folders of
versions that stored them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import build_artifacts, run_sweep
from orchestrator.engine.worker import Worker
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.artifact_store import ArtifactStore, Unfinished
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from tests.engine import Watch, rows
from tests.small import golden_requests, random_model
from workers.artifacts.base import ArtifactSpec
from workers.job import ScoreConfig
from workers.model.base import BaseModel
from workers.model.config import EMBEDDED
from workers.model.overlay import DenseOverlay
from workers.scoring import fluency, forward
from workers.scoring.cache import BaseAnswers
from workers.scoring.probes import Item
from workers.scoring.score import score

FT: dict[str, Any] = {"method": "ft", "hparams": {"num_steps": 2}}
GRACE: dict[str, Any] = {"method": "grace", "hparams": {"n_iter": 2}}
RAW: dict[str, Any] = {
    "name": "both",
    "model": {"name": EMBEDDED, "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 6},
    "grid": {"T": [1, 3], "seeds": [0, 1]},
    "methods": [FT, GRACE],
    "scoring": {"fluency_tokens": 2, "tokens_per_batch": 200},
    "engine": {
        "lanes": 6,
        "lanes_across_seeds": True,
        "shard_edits": 6,
        "step_edits": 3,
        "checkpoint_seconds": 0,
    },
}


def spec_of(**changes: Any) -> SweepSpec:
    return parse_spec(yaml.safe_dump({**RAW, **changes}), "b.yaml", Path("/"))


class Calls:
    """How often the base model itself answered a scoring batch, and wrote texts for `fluency`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.replies = self.entropies = 0
        self.read_reply, self._entropies = forward.read_reply, fluency._entropies
        patch.setattr(forward, "read_reply", self.reply)
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
    """Rows of the sweep where every shard asks the base model itself: each has a session that has
    heard nothing."""
    folder, run = tmp_path_factory.mktemp("alone"), Worker.run
    with pytest.MonkeyPatch.context() as patch:

        def forgetful(self: Worker, manifest: Any) -> Any:
            self.session(spec_of().model, 1).base_answers = BaseAnswers()
            return run(self, manifest)

        patch.setattr(Worker, "run", forgetful)
        assert run_sweep(spec_of(), LocalStore(folder), run_local, Watch()).exit_code == 0
    found = rows(folder)
    assert {row["fluency_base"] is None for row in found} == {True, False}
    return found


@pytest.mark.slow
def test_a_process_asks_once_and_rows_keep_their_bits(
    tmp_path: Path, alone: list[dict[str, Any]], calls: Calls
) -> None:
    assert (
        run_sweep(spec_of(methods=[GRACE]), LocalStore(tmp_path / "one"), run_local, Watch()).exit_code == 0
    )
    asked = calls.take()
    assert min(asked) > 0
    assert run_sweep(spec_of(), LocalStore(tmp_path / "both"), run_local, Watch()).exit_code == 0
    assert calls.take() == asked  # the second method's shards score the batches of the first one's
    assert rows(tmp_path / "both") == alone


def test_what_is_not_among_them_is_asked(calls: Calls) -> None:
    """A lane that failed is no longer scored, and batches are others without it."""
    base, config = random_model("llama"), ScoreConfig(tokens_per_batch=300)
    site = base.site(1)
    overlay = DenseOverlay([site], 2, torch.float32)
    overlay.weights_LOI[site.name][1] *= 1.5
    items = [Item(i % 2, request) for i, request in enumerate(golden_requests(12))]
    answers = BaseAnswers()
    whole = score(base, overlay, items, config, answers)
    assert calls.take()[0] == answers.misses > 0
    assert whole == score(base, overlay, items, config, answers)
    assert calls.take() == (0, 0) and answers.hits == answers.misses
    assert whole == score(base, overlay, items, config)
    calls.take()
    known = answers.misses
    some = score(base, overlay, items[::2], config, answers)
    assert calls.take()[0] == answers.misses - known > 0
    assert some == score(base, overlay, items[::2], config)


def test_a_folder_with_stored_replies_is_read_and_continued(
    tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    """Versions up to November 2026 stored the replies as artifacts, finished ones and half-built
    ones; nothing reads them."""
    store = LocalStore(tmp_path)
    assert run_sweep(spec_of(methods=[GRACE]), store, run_local, Watch()).exit_code == 0
    artifacts = ArtifactStore(store)
    finished, begun = (ArtifactSpec(name="base-scores", kind="base-scores", recipe={"n": n}) for n in (1, 2))
    artifacts.put(finished, b"replies")
    Unfinished(store, ResultsPaths(), begun, lambda: None).save(b"some replies")
    assert [found["kind"] for found in read_status(str(tmp_path))["artifacts"]] == ["base-scores"]
    states, _ = build_artifacts(spec_of(), store, run_local, Watch())
    assert not states
    watch = Watch()
    assert run_sweep(spec_of(), store, run_local, watch).exit_code == 0
    assert not watch.warnings
    assert rows(tmp_path) == alone
    assert open_results(str(tmp_path)).sql("select count(*) as n from edits").to_pylist() == [
        {"n": len(alone)}
    ]
    assert artifacts.get(finished) == b"replies"
