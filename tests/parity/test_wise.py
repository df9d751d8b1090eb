"""WISE against the recorded gradients, weights, losses and scores, with the public code's faults switched on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.parity import common
from tests.small import build_inputs, golden_model, golden_requests
from workers.artifacts import ArtifactData
from workers.job import ScoreConfig
from workers.methods.base import LaneEdit
from workers.methods.wise import PUBLIC, WISE, SideMemories, WISEConfig, merge_deltas, slerp
from workers.models import BaseModel
from workers.optim import LaneOptimizer
from workers.rng import Draws
from workers.rows import Encoder
from workers.scoring import Item, score
from workers.types import DataError, SpecError

SEEDS = range(5)
HPARAMS = {"layer": 4, "lr": 0.3, "n_iter": 8, "alpha": 0.2, "beta": 0.8, "gamma": 0.4}


def config_of(source: str, hparams: dict[str, Any], **more: Any) -> WISEConfig:
    return WISEConfig.model_validate({**WISEConfig.from_easyedit(hparams, source), **more})


def templates(texts: Sequence[str]) -> dict[str, ArtifactData]:
    return {"templates": ArtifactData(meta={"templates": list(texts)})}


class PublicEncoder(Encoder):
    """Pads with the end-of-sequence token, as the public code sets its tokenizers up."""

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.eos_token_id)


@cache
def public_base(short: str) -> BaseModel:
    """The golden model as the records ran it. Public routing averages over padding, so that what stands there counts: the
    padding token, and fully masked rows, whose attention output is zero in PyTorch's fused attention and not in eager."""
    torch.set_num_threads(1)
    base = golden_model(common.MODELS[short])
    base.model.config._attn_implementation = "sdpa"
    return base.with_encoder(PublicEncoder(base.tokenizer))


class Masked(WISE):
    """Every side memory gets the recorded mask."""

    mask_OI: Tensor

    def draw_mask(self, edit: LaneEdit) -> Tensor:
        return 1.0 - self.mask_OI


def public_request0(base: BaseModel, n_iter: int) -> tuple[Masked, SideMemories, LaneEdit]:
    recorded = common.meta("llama")["wise_req0"]
    config = config_of("wise_req0", {**recorded["hparams"], "n_iter": n_iter}, **PUBLIC)
    editor = Masked(base, config, templates(recorded["templates"]))
    editor.mask_OI = common.core("llama", "wise_req0")["weight_mask_u8"].float()
    return editor, editor.new_overlay(1), LaneEdit((golden_requests()[0],), Draws("wise", {}, 0, 0, 0), editor.inputs)


def test_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked gradients of the first two iterations, the side weight, and the losses."""
    base = public_base("llama")
    recorded, expected = common.meta("llama")["wise_req0"], common.core("llama", "wise_req0")
    gradients: list[Tensor] = []
    step = LaneOptimizer.step

    def watched(self: LaneOptimizer, active_L: Tensor) -> None:
        gradients.append(self.params[0].grad[0].clone())  # type: ignore[index]
        step(self, active_L)

    monkeypatch.setattr(LaneOptimizer, "step", watched)
    weight_OI = base.site(4).weight_OI
    for n_iter in (1, 2, 3, 10, 20):
        gradients.clear()
        editor, overlay, edit = public_request0(base, n_iter)
        (outcome,) = editor.edit(overlay, [edit])
        assert outcome.iterations == n_iter
        total = recorded["ft_loss"][n_iter - 1] + recorded["act_loss"][n_iter - 1]
        assert outcome.loss == pytest.approx(total, rel=1e-3 if n_iter == 1 else 1e-2)
        for i, gradient_OI in enumerate(gradients[:2]):
            masked_OI = gradient_OI * editor.mask_OI
            assert common.relative_error(masked_OI, expected[f"masked_grad_iter{i}"]) <= 1e-3
        if n_iter in (2, 20):
            name = "new_weight_iter1" if n_iter == 2 else "new_weight_after"
            side_OI = weight_OI + overlay.delta_LOI[0]
            assert common.relative_error(side_OI, expected[name]) <= 1e-3
            assert common.relative_error(overlay.delta_LOI[0], expected[name] - weight_OI) <= 1e-2
    assert overlay.activation[0] == pytest.approx(recorded["min_act"], rel=1e-2)


def edited(editor: WISE, T: int, groups: int, seeds: Sequence[int] = SEEDS) -> SideMemories:
    """Every (seed, group) a lane, seeds outermost."""
    requests = golden_requests()
    cells = [(seed, group) for seed in seeds for group in range(groups)]
    overlay = editor.new_overlay(len(cells))
    config = editor.config.model_dump(mode="json")
    for position in range(T):
        edits = [
            LaneEdit((requests[g * T + position],), Draws("wise", config, seed, g * T, position)) for seed, g in cells
        ]
        editor.edit(overlay, edits)
    return overlay


def check_scores(base: BaseModel, overlay: SideMemories, record: Mapping[str, Any]) -> None:
    """Means over the seeds within 0.05 of the record, or two standard errors."""
    requests, T, groups = golden_requests(), record["T"], record["n_groups"]
    items = [Item(lane, requests[lane % groups * T + i]) for lane in range(overlay.lanes) for i in range(T)]
    found = score(base, overlay, items, ScoreConfig(generated=False))
    n = groups * T
    for _, name, column in common.PAIRS:
        values = [
            sum(float(s[column] or 0) for s in found[i : i + n]) / n for i in range(0, len(found), n)
        ]
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        print(name, round(mean, 3), "+-", round(error, 3), "recorded", record[name])
        assert abs(mean - record[name]) <= max(0.05, 2 * error) + 1e-6, (name, values, record[name])


@pytest.mark.parametrize(
    ("short", "T"),
    [("llama", 1), ("gpt2", 1), ("llama", 10), pytest.param("llama", 100, marks=pytest.mark.slow)],
)
def test_scores(short: str, T: int) -> None:
    """Five seeds. Up to the first merge WISE-Merge trains what WISE-Retrieve trains, so one run serves both records."""
    record = common.record(short, "WISE", T)
    base = public_base(short)
    config, inputs = config_of("WISE", record["hparams"], **PUBLIC), templates(record["context_templates"])
    overlay = edited(WISE(base, config, inputs), T, record["n_groups"])
    check_scores(base, overlay, record)
    if short == "llama" and T <= 10:
        record = common.record(short, "WISE-merge", T)
        merge = WISE(base, config_of("WISE-merge", record["hparams"], **PUBLIC), inputs).new_overlay(overlay.lanes)
        for lane in range(overlay.lanes):
            merge.load_state(lane, overlay.state(lane))
        check_scores(base, merge, record)
