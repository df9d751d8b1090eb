"""Artifacts in the engine: each built once by one process, continued after any death, never used
unless whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from orchestrator.cli import console
from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.engine.worker import Worker
from orchestrator.planning.inputs import read_training
from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.artifact_store import ArtifactFailed, ArtifactStore
from orchestrator.results.query import open_results
from orchestrator.results.status import read_status
from orchestrator.storage import lock as locking
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from tests import learner
from tests.engine import Watch
from tests.learner import registered
from tests.processes import Command, Fork, fork
from tests.waiting import output_of, stop, wait_for
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.data import find_overlap, load_training, tinyworld
from workers.model.config import EMBEDDED, ModelConfig
from workers.types import EditRequest, EditSweepError, ModelError, SpecError

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
LEARNER: dict[str, Any] = {
    "method": "learner",
    "hparams": {"layers": [3], "num_steps": 2, "schedule": {"steps": STEPS, "batch_size": 4}},
}
RAW: dict[str, Any] = {
    "name": "learn",
    "model": {"name": EMBEDDED, "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 4},
    "grid": {"T": [1, 4], "seeds": [0]},
    "training": {"shards": [40, 40]},
    "methods": [LEARNER],
    "scoring": {"generated": False},
    "engine": {"checkpoint_seconds": 0, "max_failures": 1, "shard_edits": 4},
}


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with registered():
        yield


def spec_of(**changes: Any) -> SweepSpec:
    return parse_spec(yaml.safe_dump({**RAW, **changes}), "e.yaml", Path("/"))


def artifact_of(**changes: Any) -> ArtifactSpec:
    """The trained networks that the sweep needs."""
    (found,) = make_plan(spec_of(**changes)).artifacts.values()
    return found


def launch(*arguments: str, hold: str = "") -> Fork:
    return fork(learner.main, *arguments, environment={"LEARNER_HOLD": hold} if hold else None)


def launch_ray(*arguments: str, environment: dict[str, str], hold: str) -> Command:
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LEARNER_HOLD": hold}
    return Command([sys.executable, "-m", "tests.learner", *arguments], {**environment, **more})


def progress_of(folder: Path) -> int:
    return max((found["done"] for found in ArtifactStore(LocalStore(folder)).unfinished()), default=0)


def reached(marker: Path) -> bool:
    """Whether a builder waits at the place where ``marker`` holds it."""
    return Path(f"{marker}.reached").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("artifacts/*/*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "r"
    with registered():
        watch = Watch()
        assert run_sweep(spec_of(), LocalStore(folder), run_local, watch).exit_code == 0
    assert [total for _, _, total, _ in watch.artifact_steps] == [STEPS] * 2 * STEPS
    found = files(folder)
    assert len(found) == 3
    return found


def test_the_plain_console_tells_how_far_a_training_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)  # say everything, however soon it follows
    said = io.StringIO()
    view = console.RunView(Console(file=said, width=200))
    assert run_sweep(spec_of(), LocalStore(tmp_path), run_local, view).exit_code == 0
    lines = said.getvalue().splitlines()
    told = [line.partition(" building ")[2] for line in lines if " building " in line]
    assert len(told) == 2 * STEPS
    assert all(line.startswith("training ") for line in told)
    assert f" {(STEPS // 2) / STEPS:.0%} (" in told[STEPS // 2 - 1]
    assert " building " not in lines[-1]


# --- interruptions --------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_mid_training_and_run_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    path, folder, marker = tmp_path / "e.yaml", tmp_path / "r", tmp_path / "go"
    path.write_text(yaml.safe_dump(RAW))
    command = ("run", str(path), "--results", str(folder), "--engine", "local")
    process = launch(*command, hold=f"{STEPS // 2}:{marker}")
    wait_for(lambda: reached(marker), process)
    process.kill()
    output_of(process)
    saved = progress_of(folder)
    assert 0 < saved <= STEPS // 2  # it does not save faster than it works
    assert not files(folder)  # a half-built one is nowhere to be found
    (unfinished,) = read_status(folder)["artifacts"]
    assert (unfinished["kind"], unfinished["done"], unfinished["total"]) == ("training", saved, STEPS)
    watch = Watch()
    assert run_sweep(spec_of(), LocalStore(folder), run_local, watch).exit_code == 0
    assert watch.artifact_steps[0][1] == saved + 1
    assert files(folder) == undisturbed
    assert not list(folder.glob("artifacts/unfinished/*"))


def test_ctrl_c_saves_and_leaves(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    path, folder, marker = tmp_path / "e.yaml", tmp_path / "r", tmp_path / "go"
    # nothing is saved but for Ctrl-C
    path.write_text(yaml.safe_dump({**RAW, "engine": {"checkpoint_seconds": 1000}}))
    command = ("artifacts", str(path), "--results", str(folder), "--engine", "local")
    process = launch(*command, hold=f"7:{marker}")
    wait_for(lambda: reached(marker), process)
    assert progress_of(folder) == 0
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping: " in process.said(), process)
    marker.touch()
    text = output_of(process)
    assert process.returncode == 130, text
    assert progress_of(folder) == 8  # the step at hand was finished
    assert "not begun" in text and "unfinished, " in text
    process = launch(*command)
    text = output_of(process)
    assert process.returncode == 0, text
    assert text.count(" built") >= 3
    assert files(folder) == undisturbed
    assert not list(folder.glob("parts/*"))


def test_damaged_unfinished_work_is_started_again(
    tmp_path: Path, undisturbed: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    wanted = artifact_of().needs[0].needs[0]
    state = tmp_path / ResultsPaths().building_state(wanted.kind, wanted.key)
    state.parent.mkdir(parents=True)
    for junk in (b"", b"x" * 30, b"0" * 64 + b"not a checkpoint"):
        state.write_bytes(junk)
        steps: list[int] = []

        def tell(
            done: int, total: int, what: str, steps: list[int] = steps, last: int = 3 if junk else STEPS
        ) -> None:
            steps.append(done)
            if done == last < STEPS:
                raise KeyboardInterrupt

        worker = Worker(str(tmp_path), "r1", save_seconds=1000)
        with contextlib.suppress(KeyboardInterrupt):
            worker.build(wanted, spec_of().model, 1, tell)
        assert steps[0] == 1 and "is damaged" in caplog.text
        caplog.clear()
        for name, data in files(tmp_path).items():
            assert undisturbed[name] == data
        shutil.rmtree(tmp_path / "artifacts" / "training", ignore_errors=True)
        state.parent.mkdir(parents=True, exist_ok=True)


def test_a_new_data_shard_continues_from_the_networks_there_are(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    run_sweep(spec_of(training={"shards": [40]}), LocalStore(tmp_path), run_local, Watch())
    watch = Watch()
    run_sweep(spec_of(), LocalStore(tmp_path), run_local, watch)
    assert {what.partition(", loss")[0] for *_, what in watch.artifact_steps} == {"learner, data shard 2"}
    assert undisturbed.items() <= files(tmp_path).items()  # as if it had been trained on both in one go
    rows = open_results(tmp_path).table(superseded=True)
    assert len(rows.column("cell_id").unique()) == 4  # other networks, other cells


# --- one builder ----------------------------------------------------------------------------


def steps_of(process: Fork) -> list[int]:
    """The steps that a builder took, told in its last line."""
    text = output_of(process)
    assert process.returncode == 0, text
    found: list[int] = json.loads(text.splitlines()[-1])
    return found


def test_two_processes_that_need_one_artifact_build_it_once(tmp_path: Path) -> None:
    wanted, marker = artifact_of().needs[0].needs[0].model_dump_json(), tmp_path / "go"
    first = launch("build", str(tmp_path), wanted, hold=f"{STEPS // 2}:{marker}")
    wait_for(lambda: reached(marker), first)
    second = launch("build", str(tmp_path), wanted)
    third = launch("build", str(tmp_path), wanted)
    marker.touch()
    assert [steps_of(process) for process in (first, second, third)] == [list(range(1, STEPS + 1)), [], []]


@pytest.mark.slow
def test_a_dead_builder_is_succeeded(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    wanted, marker = artifact_of().needs[0].needs[0], tmp_path / "go"
    first = launch("build", str(tmp_path), wanted.model_dump_json(), hold=f"5:{marker}")
    wait_for(lambda: reached(marker), first)
    progress = progress_of(tmp_path)
    stop(first.pid)  # does not answer, yet lives: it is waited for
    second = launch("build", str(tmp_path), wanted.model_dump_json(), "5", "3")
    wait_for(lambda: "watching its heartbeat" in second.said(), second)
    first.kill()
    assert steps_of(second) == list(range(progress + 1, STEPS + 1))
    assert files(tmp_path)[f"{wanted.key}.safetensors"] == undisturbed[f"{wanted.key}.safetensors"]


def test_a_builder_stopped_while_its_successor_builds_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """It wakes up when its successor has finished and taken every claim away: it must not take that
    for its own."""
    wanted, marker, beat = artifact_of().needs[0].needs[0], tmp_path / "go", 0.2
    first = launch("build", str(tmp_path), wanted.model_dump_json(), str(beat), hold=f"5:{marker}")
    wait_for(lambda: reached(marker), first)
    stop(first.pid)
    stopped = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking.acquire, "__defaults__", (None, locking.BEAT_SECONDS, 0.5))
        Worker(str(tmp_path), "run", save_seconds=0).build(wanted, ModelConfig(device="cpu"), 1)
    assert not list(tmp_path.glob("artifacts/unfinished/*"))
    wait_for(
        lambda: time.monotonic() > stopped + 3 * beat
    )  # so long that it looks at its claim before it does anything
    marker.touch()
    first.send_signal(signal.SIGCONT)
    assert steps_of(first) == [1, 2, 3, 4, 5, 6]  # it stops at once and uses what is there
    assert not list(tmp_path.glob("artifacts/unfinished/*"))
    assert files(tmp_path)[f"{wanted.key}.safetensors"] == undisturbed[f"{wanted.key}.safetensors"]


def test_what_cannot_be_built_is_tried_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Counting(learner.Decoder):
        def __init__(self, *args: Any) -> None:
            tried.append(1)
            super().__init__(*args)

    monkeypatch.setattr(learner, "Decoder", Counting)
    diverges = {**LEARNER, "hparams": {**LEARNER["hparams"], "train_lr": 1e30}}
    changes = {"methods": [diverges, {"method": "ft", "hparams": {"layers": [3], "num_steps": 2}}]}
    watch = Watch()
    outcome = run_sweep(spec_of(**changes), LocalStore(tmp_path), run_local, watch)
    assert len(tried) == 1
    assert len(outcome.unfinished) == 2  # FT's cells are done
    assert {error.kind for error in outcome.errors.values()} == {ArtifactFailed.__name__}
    assert all(
        "training artifact" in e.message and "learning rate" in e.message for e in outcome.errors.values()
    )
    assert sum("failed" in text and "artifact" in text and "training" in text for text in watch.warnings) >= 2
    run_sweep(spec_of(**changes), LocalStore(tmp_path), run_local, Watch())
    assert len(tried) == 2  # another run tries again


def test_another_models_networks_are_refused(tmp_path: Path) -> None:
    wanted = artifact_of()
    other = wanted.model_copy(update={"recipe": {**wanted.recipe, "model": "another-model"}})
    made_as = {"kind": other.kind, "key": other.key, "recipe": other.recipe}
    store = ArtifactStore(LocalStore(tmp_path))
    store.put(wanted, ArtifactData(made_as=made_as).to_bytes())  # under the name of ours
    with pytest.raises(
        ModelError, match=r"pretrained artifact .* another model \(another-model, the sweep's is"
    ):
        Worker(str(tmp_path), "r1").build(wanted, spec_of().model, 1)


# --- the command line -----------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_artifacts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "e.yaml", tmp_path / "r"
    path.write_text(yaml.safe_dump(RAW))
    command = ("artifacts", str(path), "--results", str(folder), "--engine", "local")
    assert call(*command) == 0
    text = capsys.readouterr().out
    assert text.count("training") == 2 and text.count("pretrained") == 1 and text.count("built") == 3
    assert "KiB" in text and artifact_of().key in text
    assert not list(folder.glob("parts/*"))
    for file in folder.glob("artifacts/training/*"):
        file.unlink()  # what went into the networks is not needed any more
    assert call(*command) == 0
    text = capsys.readouterr().out
    assert text.count("not needed") == 2 and text.count("present") == 1
    assert call("run", *command[1:]) == 0
    assert len(list(folder.glob("artifacts/*/*.safetensors"))) == 1
    assert (
        call(
            "artifacts", str(path), "--results", str(folder), "--engine", "local", "--set", "methods=[grace]"
        )
        == 0
    )
    assert "no method of this sweep needs an artifact" in capsys.readouterr().out


# --- training data --------------------------------------------------------------------------


def write(path: Path, requests: list[EditRequest]) -> Path:
    keep = ("case_id", "prompt", "subject", "target_new", "ground_truth", "rephrases")
    path.write_text("".join(json.dumps({name: getattr(r, name) for name in keep}) + "\n" for r in requests))
    return path


def test_training_on_what_is_edited_is_refused_and_on_request_recorded(tmp_path: Path) -> None:
    edits = list(tinyworld.load_requests("edit"))[:6]
    fine = list(load_training("tinyworld").requests)[:10]
    same_prompt = replace(edits[0], case_id="a", subject="x", target_new="y", rephrases=(), ground_truth=None)
    same_relation = replace(
        edits[1], case_id="b", prompt=edits[1].rephrases[0], rephrases=(), ground_truth=None
    )
    path = write(
        tmp_path / "t.jsonl", [*fine, replace(same_prompt, subject=edits[0].prompt[:4]), same_relation]
    )
    changes: dict[str, Any] = {
        "dataset": {"kind": "tinyworld", "edits": 4, "order": "file"},
        "training": {"kind": "jsonl", "path": str(path)},
    }
    with pytest.raises(SpecError) as refused:
        make_plan(spec_of(**changes))
    text = str(refused.value)
    assert "2 of its 12 requests are edited by the sweep" in text
    for words in (edits[0].prompt, edits[0].case_id, "same prompt", "  a: ", "  b: ", edits[1].rephrases[0]):
        assert words in text
    make_plan(spec_of(**changes, methods=["ft"]))  # nothing is trained
    changes["training"]["allow_overlap"] = True
    run_sweep(spec_of(**changes), LocalStore(tmp_path / "r"), run_local, Watch())
    assert set(open_results(tmp_path / "r").table().column("training_overlap").to_pylist()) == {2}
    changes["training"]["path"] = str(write(tmp_path / "t2.jsonl", fine))
    run_sweep(spec_of(**changes), LocalStore(tmp_path / "r2"), run_local, Watch())
    assert set(open_results(tmp_path / "r2").table().column("training_overlap").to_pylist()) == {0}
    changes["training"]["allow_overlap"] = False
    run_sweep(spec_of(**changes), LocalStore(tmp_path / "r3"), run_local, Watch())
    assert set(open_results(tmp_path / "r3").table().column("training_overlap").to_pylist()) == {None}


def test_what_counts_as_the_same_relation() -> None:
    def request(prompt: str, subject: str, *rephrases: str, truth: str | None = None) -> EditRequest:
        return EditRequest(prompt, prompt, subject, "new", truth, rephrases)

    edits = [
        request("Who is the mother of Ada?", "Ada", "Ada's mother is"),
        request("Bob plays the", "Bob", truth="lute"),
        request("The mother's name of Cid is", "Cid", "Cid's mother is"),
    ]
    cases = {
        "Who is  the mother of ada?": ("ada", "same prompt"),
        "The mother's name of Ada is": ("Ada", "same subject and relation"),  # through Cid's phrasings
        "Ada's mother is": ("Ada", "same prompt"),
        "The father's name of Ada is": ("Ada", None),
        "Who is the mother of Eve?": ("Eve", None),
    }
    for prompt, (subject, why) in cases.items():
        found = find_overlap([request(prompt, subject)], edits)
        assert [overlap.why for overlap in found] == ([] if why is None else [why]), prompt
    assert find_overlap([request("On stage Bob has a", "Bob", truth="lute")], edits)[0].why.endswith(
        "known answer"
    )
    assert not find_overlap([request("On stage Bob has a", "Bob", truth="harp")], edits)


def test_the_embedded_worlds_splits_share_nothing() -> None:
    train = load_training("tinyworld").requests
    for split in ("edit", "tune"):
        assert not find_overlap(train, tinyworld.load_requests(split))  # type: ignore[arg-type]
    assert len(find_overlap(train, train)) == len(train)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"path": "/x.json"}}, "kind: required with path"),
        ({"training": {"shards": [0]}}, "at least 1 request, not 0"),
        ({"training": {"shards": [4000]}}, "training.shards: [4000] are 4000 requests together"),
        ({"training": {"kind": "jsonl", "path": "/nowhere.jsonl"}}, "/nowhere.jsonl: no such file"),
        ({"training": {"kind": "jsonl"}}, "`path` is missing"),
        ({"training": {"kind": "webtext"}}, "training.kind: 'webtext' is not valid"),
    ],
)
def test_bad_training_sections(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EditSweepError) as refused:
        make_plan(spec_of(**changes))
    assert words in str(refused.value)


def test_zsre_trains_on_its_training_file_and_other_sets_must_name_one(tmp_path: Path) -> None:
    record = {"rephrase": "r", "alt": "new", "answers": ["old"], "loc": "nq question: q", "loc_ans": "a"}
    both = []
    for name, people in (("eval", "ABCD"), ("train", "EFGHI")):
        rows = [
            {**record, "subject": s, "src": f"Who taught {s}?", "rephrase": f"{s}'s teacher?"} for s in people
        ]
        both.append(tmp_path / f"{name}.json")
        both[-1].write_text(json.dumps(rows))
    model = {"name": str(ROOT / "tests/golden/models/tiny-llama"), "device": "cpu"}
    dataset = {"kind": "zsre", "path": str(both[0]), "train_path": str(both[1]), "edits": 4}
    spec = spec_of(model=model, dataset=dataset, training={})
    found = read_training(spec)
    assert found is not None
    source, requests = found
    assert source.path == str(both[1]) and [r.subject for r in requests] == list("EFGHI")
    assert any("5 requests to train on" in note for note in make_plan(spec).notes)
    with pytest.raises(SpecError, match=r"training: required, because learner learns from data"):
        make_plan(spec_of(model=model, dataset={**dataset, "train_path": None}, training={}))


# --- Ray ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_trains_once_and_survives_a_killed_builder(
    tmp_path: Path,
    home: dict[str, str],
    undisturbed: dict[str, bytes],
) -> None:
    path, folder, first, second = tmp_path / "e.yaml", tmp_path / "r", tmp_path / "first", tmp_path / "second"
    path.write_text(yaml.safe_dump(RAW))
    setup = tmp_path / "setup.yaml"
    setup.write_text("worker_process_setup_hook: tests.learner.register\n")
    command = ("run", str(path), "--results", str(folder), "--max-actors", "2", "--runtime-env", str(setup))
    process = launch_ray(*command, environment=home, hold=f"3:{first}")
    wait_for(lambda: reached(first), process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "are being saved" in process.said(), process)
    first.touch()
    text = output_of(process)
    assert process.returncode == 130, text
    before = progress_of(folder)
    assert 3 <= before < STEPS
    process = launch_ray(*command, environment=home, hold=f"4:{second}")
    wait_for(lambda: reached(second), process)
    assert before < progress_of(folder) <= before + 4
    (claim,) = folder.glob("artifacts/unfinished/*/claim/*.json")
    builder = int(json.loads(claim.read_text())["pid"])
    second.touch()
    os.kill(builder, signal.SIGKILL)
    text = output_of(process)
    assert process.returncode == 0, text
    assert text.count("built: ") == 3 and "failed" not in text.replace("0 failed", "")
    assert files(folder) == undisturbed
