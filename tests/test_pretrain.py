"""The pretraining stage: what it trains on in which order, what it forgets, and that no
interruption changes a bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.learner import Decoder, LearnerConfig, registered
from tests.small import random_model
from workers.artifacts.base import ArtifactData, ArtifactSpec, Stopped, Workbench
from workers.artifacts.pretrain import PRETRAINED, TRAINING, TrainingSchedule, TrainingSource, training_source
from workers.data import load_training
from workers.methods.base import ArtifactContext
from workers.model.base import BaseModel
from workers.model.config import ModelFingerprint
from workers.rng import derive_generator
from workers.session import Session
from workers.types import DataError, EditRequest, ModelError, SpecError

FINGERPRINT = ModelFingerprint("model", "tokenizer")
REQUESTS = load_training("tinyworld").requests


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    return random_model("llama")


def write(path: Path, requests: Sequence[EditRequest]) -> Path:
    keep = ("case_id", "prompt", "subject", "target_new", "ground_truth", "rephrases")
    lines = [json.dumps({name: getattr(r, name) for name in keep}) for r in requests]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def spec_of(
    base: BaseModel, training: TrainingSource | None, config: LearnerConfig | None = None
) -> ArtifactSpec:
    config = config or LearnerConfig(layers=(1,))
    (spec,) = config.artifacts(ArtifactContext(FINGERPRINT, base.config, 0, training))
    return spec


def build(
    base: BaseModel, spec: ArtifactSpec, bench: Callable[[ArtifactSpec], Workbench] = lambda spec: Workbench()
) -> ArtifactData:
    """Through the bytes that a store would hold."""
    work = bench(spec)
    work.inputs = {need.name: build(base, need, bench) for need in spec.needs}
    return ArtifactData.from_bytes(Session(base).build(spec, work).to_bytes())


# --- the recipe -----------------------------------------------------------------------------


def test_the_key_is_what_the_bits_depend_on(base: BaseModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", REQUESTS[:40])
    training, used = training_source("jsonl", path, (16, 16))
    assert [r.case_id for r in used] == [r.case_id for r in REQUESTS[:32]]
    spec = spec_of(base, training)
    (second,) = spec.needs
    (first,) = second.needs
    assert (spec.kind, second.kind, first.kind, first.needs) == (PRETRAINED, TRAINING, TRAINING, ())
    moved, _ = training_source("jsonl", write(tmp_path / "b.jsonl", REQUESTS[:40]), (16, 16))
    assert spec_of(base, moved).key == spec.key  # the same requests under another name
    more, _ = training_source("jsonl", path, (16, 16, 8))
    (third,) = spec_of(base, more).needs
    assert third.needs[0].key == second.key  # a new data shard continues from the artifact there is
    other, _ = training_source("jsonl", write(tmp_path / "c.jsonl", REQUESTS[1:41]), (16, 16))
    assert spec_of(base, other).needs[0].needs[0].key != first.key
    for change in ({"width": 8}, {"schedule": TrainingSchedule(steps=61, batch_size=8)}):
        assert spec_of(base, training, LearnerConfig(layers=(1,), **change)).key != spec.key  # type: ignore[arg-type]
    assert (
        spec_of(base, training, LearnerConfig(layers=(1,), num_steps=3)).key == spec.key
    )  # edits, not training
    (elsewhere,) = LearnerConfig(layers=(1,)).artifacts(
        ArtifactContext(ModelFingerprint("m2", "tokenizer"), base.config, 0, training)
    )
    assert elsewhere.key != spec.key


def test_a_training_set_is_needed_and_large_enough(base: BaseModel) -> None:
    with pytest.raises(SpecError, match=r"training: required, because learner learns"):
        spec_of(base, None)
    with pytest.raises(SpecError, match=r"training\.shards: \[3000, 300\] are 3300 requests .* has 3200"):
        training_source("tinyworld", shards=(3000, 300))


def test_a_file_that_changed_since_is_noticed(base: BaseModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", REQUESTS[:16])
    training, _ = training_source("jsonl", path)
    write(path, REQUESTS[1:17])
    with pytest.raises(DataError, match=r"a\.jsonl: requests 0 to 16 are not the ones"):
        build(base, spec_of(base, training))


# --- what is trained on ---------------------------------------------------------------------


def test_every_request_once_an_epoch_and_its_share_of_replay(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        Decoder, "step", lambda self, rs, g: seen.append([r.case_id for r in rs]) or {"loss": 0.0}
    )
    monkeypatch.setattr(Decoder, "state", lambda self: ArtifactData())
    monkeypatch.setattr(Decoder, "load_state", lambda self, state: None)
    training, _ = training_source("tinyworld", shards=(12, 12))
    config = LearnerConfig(
        layers=(1,), schedule=TrainingSchedule(steps=12, batch_size=3, replay=0.25, buffer=5)
    )
    state = build(base, spec_of(base, training, config).needs[0])
    first, second = seen[:12], seen[12:]
    ids = [r.case_id for r in REQUESTS[:24]]
    flat = [i for batch in first for i in batch]
    for epoch in range(3):
        assert sorted(flat[12 * epoch : 12 * epoch + 12]) == ids[:12]
    assert flat[:12] != flat[12:24]
    old = [[i for i in batch if i in ids[:12]] for batch in second]
    assert sum(map(len, old)) == 9  # a quarter of 36, spread evenly
    assert {len(batch) for batch in second} == {3} and {len(o) for o in old} == {0, 1}
    assert len({i for o in old for i in o}) <= 5  # the buffer's size
    fresh = [i for batch in second for i in batch if i in ids[12:]]
    assert sorted(fresh[:12]) == ids[12:] and len(fresh) == 27
    kept = {value["case_id"] for _, value in state.meta["buffer"]}
    assert len(kept) == 5 and kept & set(ids[12:]) and kept & set(ids[:12])
    assert (state.meta["shards"], state.meta["requests"], state.meta["steps"]) == (2, 24, 24)


@pytest.mark.slow
def test_without_replay_the_first_shard_is_forgotten(base: BaseModel, tmp_path: Path) -> None:
    """Shards that contradict nothing: other subjects, and other targets by far."""
    first = [r for r in REQUESTS if "academy" in r.subject][:24]
    second = [r for r in REQUESTS if "guild" in r.subject][:24]
    training, _ = training_source("jsonl", write(tmp_path / "a.jsonl", [*first, *second]), (24, 24))
    found = {}
    for replay in (0.0, 0.5):
        schedule = TrainingSchedule(steps=150, batch_size=8, replay=replay)
        spec = spec_of(base, training, LearnerConfig(layers=(1,), train_lr=1e-2, schedule=schedule))
        for name, wanted in (("before", spec.needs[0].needs[0]), ("after", spec.needs[0])):
            decoder = Decoder(base, {"width": 64, "lr": 1e-2}, derive_generator("any"))
            state = build(base, wanted)
            decoder.load_state(ArtifactData(state.tensors, state.meta["trainer"]))
            found[replay, name] = (decoder.accuracy(first), decoder.accuracy(second))
    assert found[0.0, "before"] == found[0.5, "before"]
    learnt = found[0.0, "before"][0]
    assert learnt > 0.5
    assert found[0.0, "after"][0] < 0.5 * learnt  # forgotten
    assert found[0.5, "after"][0] > 0.9 * learnt  # remembered
    assert found[0.5, "after"][1] > 0.9 * found[0.0, "after"][1]  # and the new ones are learnt all the same


# --- interruptions --------------------------------------------------------------------------


def test_neither_interruptions_nor_how_often_it_saves_change_a_bit(base: BaseModel) -> None:
    training, _ = training_source("tinyworld", shards=(16, 16))
    config = LearnerConfig(layers=(1,), schedule=TrainingSchedule(steps=20, batch_size=4))
    spec = spec_of(base, training, config)
    whole = {s.key: build(base, s).to_bytes() for s in (spec, spec.needs[0])}
    often = build(base, spec, lambda spec: Workbench(save_seconds=0))
    assert often.to_bytes() == whole[spec.key]

    saved: dict[str, bytes | None] = {}
    starts: list[int] = []

    def torn(spec: ArtifactSpec) -> Workbench:
        told: list[int] = []

        def progress(done: int, total: int, what: str) -> None:
            if not told:
                starts.append(done)
            told.append(done)

        class Bench(Workbench):
            def save(self, data: bytes) -> None:
                saved[spec.key] = data

        return Bench(
            unfinished=saved.get(spec.key),
            progress=progress,
            stopping=lambda: len(told) == 7,
            save_seconds=1e9,
        )

    for _ in range(20):
        try:
            pieces = build(base, spec.needs[0], torn)
            break
        except Stopped:
            continue
    assert starts.count(8) and starts.count(15)  # each attempt went on where the last one stopped
    assert pieces.to_bytes() == whole[spec.needs[0].key]


def test_a_loss_that_is_not_finite_ends_it(base: BaseModel) -> None:
    training, _ = training_source("tinyworld", shards=(16,))
    with pytest.raises(
        ModelError, match=r"pretraining of learner, data shard 1: step \d+ gave .*lower the learning rate"
    ):
        build(base, spec_of(base, training, LearnerConfig(layers=(1,), train_lr=1e30)))


def test_the_product_says_what_it_is(base: BaseModel) -> None:
    training, _ = training_source("tinyworld", shards=(16, 8))
    spec = spec_of(base, training)
    data = build(base, spec)
    assert set(data.tensors) == {"weight.0", "weight.1"} and data.meta["layers"] == 2
    told = data.meta["pretraining"]
    assert (told["shards"], told["requests"], told["steps"]) == (2, 24, 120)
    assert len(told["log"]) == 20 and told["log"][-1]["step"] == 60
    data.check_made_as(spec, "x")
    (other,) = LearnerConfig(layers=(1,)).artifacts(
        ArtifactContext(ModelFingerprint("another", "tokenizer"), base.config, 0, training)
    )
    with pytest.raises(
        ModelError, match=r"x: not the pretrained artifact .* another model \(model, .* another\)"
    ):
        data.check_made_as(other, "x")
    with pytest.raises(ModelError, match="another recipe"):
        data.check_made_as(spec.model_copy(update={"recipe": {**spec.recipe, "seed": 1}}), "x")
    with pytest.raises(ModelError, match="kind 'pretrained'"):
        data.check_made_as(spec.needs[0], "x")
    with pytest.raises(ModelError, match="does not say what it was made as"):
        replace(data, made_as=None).check_made_as(spec, "x")
