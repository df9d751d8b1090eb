"""SERAC's training: it learns, and an interruption leaves the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.small import random_model
from workers.artifacts.base import ArtifactData
from workers.artifacts.pretrain import TrainingSchedule, training_source
from workers.data.tinyworld import load_requests
from workers.job import ScoreConfig
from workers.methods.base import ArtifactContext, LaneEdit
from workers.methods.serac import SERAC, SERACConfig, SERACTrainer
from workers.model.base import BaseModel
from workers.model.config import ModelConfig, ModelFingerprint
from workers.rng import RandomStreams, derive_generator
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.session import build_inputs
from workers.types import SpecError

HPARAMS: dict[str, Any] = {"classifier": None, "counterfactual": None, "lr": 1e-3, "grad_clip": 100.0}


def trainer_of(base: BaseModel) -> SERACTrainer:
    made = SERAC.trainer(base, HPARAMS, derive_generator("start"))
    assert isinstance(made, SERACTrainer)
    return made


def steps(trainer: SERACTrainer, start: int, stop: int) -> list[dict[str, float]]:
    requests = load_requests("train")
    return [
        trainer.step(requests[4 * i : 4 * i + 4], derive_generator("step", i)) for i in range(start, stop)
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_continued_training_is_bit_identical(arch: str) -> None:
    base = random_model(arch)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    whole = trainer_of(base)
    figures = steps(whole, 0, 6)
    first = trainer_of(base)
    assert steps(first, 0, 3) == figures[:3]
    saved = ArtifactData.from_bytes(first.state().to_bytes())
    again = trainer_of(random_model(arch))
    again.load_state(saved)
    assert steps(again, 3, 6) == figures[3:]
    ours, theirs = whole.state().tensors, again.state().tensors
    assert ours.keys() == theirs.keys() and any(name.startswith("adam.exp_avg_sq.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


@pytest.mark.slow
def test_it_learns_the_embedded_world() -> None:
    """Some hundred steps: both losses fall, and edits of people it has not seen are answered."""
    base = BaseModel.load(ModelConfig(device="cpu"))
    config = SERACConfig(lr=5e-4, schedule=TrainingSchedule(steps=300, batch_size=8))
    source, _ = training_source("tinyworld", shards=(1600,))
    specs = config.artifacts(ArtifactContext(ModelFingerprint("m", "t"), base.config, 0, source))
    inputs = build_inputs(base, specs)
    log = inputs["pretrained"].meta["pretraining"]["log"]
    assert log[-1]["scope_loss"] < 0.5 * log[0]["scope_loss"]
    assert log[-1]["answer_loss"] < 0.5 * log[0]["answer_loss"]
    editor = SERAC(base, config, inputs)
    requests = load_requests("tune")[:20]
    overlay = editor.new_overlay(20)
    editor.edit(
        overlay, [LaneEdit((r,), RandomStreams("serac", {}, 0, i, 0)) for i, r in enumerate(requests)]
    )
    found = score(base, overlay, [Item(i, r) for i, r in enumerate(requests)], ScoreConfig(generated=False))
    reliability, base_reliability, locality = (
        sum(float(s[name] or 0) for s in found) / len(found)
        for name in ("reliability_token", "reliability_token_base", "locality_token")
    )
    assert reliability > base_reliability + 0.4
    assert locality > 0.8


def test_what_training_depends_on() -> None:
    """Settings of the edit share the trained networks; settings of the training do not. Without a
    training set: refused."""
    source, _ = training_source("tinyworld", shards=(16,))

    def key(**hparams: Any) -> str:
        (spec,) = SERACConfig(**hparams).artifacts(
            ArtifactContext(ModelFingerprint("m", "t"), ModelConfig(), 0, source)
        )
        return spec.key

    assert key() == key(threshold=0.3, mixing="soft", reads="row", accumulate=False)
    assert len({key(), key(lr=1e-4), key(classifier="x"), key(schedule={"steps": 3})}) == 4
    with pytest.raises(SpecError, match="training: required"):
        SERACConfig().artifacts(ArtifactContext(ModelFingerprint("m", "t"), ModelConfig(), 0, None))
