"""DEFER against the recorded parameters, losses and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity import common
from tests.small import golden_requests
from workers.job import ScoreConfig
from workers.methods.base import LaneEdit
from workers.methods.defer import DEFER, DEFERConfig, Deferral
from workers.model.overlay import LaneState
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import SpecError

pytestmark = pytest.mark.numeric


def config_of(hparams: dict[str, Any]) -> DEFERConfig:
    return DEFERConfig.model_validate({**DEFERConfig.from_easyedit(hparams, "record"), "query": "row"})


def recorded_state(tensors: dict[str, torch.Tensor], when: str) -> LaneState:
    return LaneState(
        {
            "gate": tensors[f"{when}.defer.weight"],
            "gate_bias": tensors[f"{when}.defer.bias"],
            "map": tensors[f"{when}.predict_values.weight"],
            "map_bias": tensors[f"{when}.predict_values.bias"],
        }
    )


def test_three_edits_in_a_row() -> None:
    """Losses and parameters, from the parameters that the recorded run began with."""
    recorded, tensors = common.meta("llama")["defer_3edits"], common.core("llama", "defer_3edits")
    editor = DEFER(common.model("llama"), config_of(recorded["hparams"]), {})
    overlay = editor.new_overlay(1)
    overlay.load_state(0, recorded_state(tensors, "init"))
    for position, request in enumerate(golden_requests()[:3]):
        (outcome,) = editor.edit(overlay, [LaneEdit((request,), RandomStreams("defer", {}, 0, 0, position))])
        losses = recorded["losses"][position]
        assert outcome.details["first_loss"] == pytest.approx(losses[0], rel=1e-3 if position == 0 else 1e-2)
        assert outcome.loss == pytest.approx(losses[-1], rel=1e-2)
    found, expected = overlay.state(0).tensors, recorded_state(tensors, "after3").tensors
    for name, value in expected.items():
        assert common.relative_error(found[name], value) <= 1e-2, name


@pytest.mark.parametrize(
    ("T", "seeds"),
    [
        (1, 8),
        pytest.param(10, 8, marks=pytest.mark.slow),
        pytest.param(100, 8, marks=pytest.mark.long),
    ],
)
def test_scores(T: int, seeds: int) -> None:
    """The recorded mean is one that one more seed might give."""
    record = common.record("llama", "DEFER", T)
    editor = DEFER(common.model("llama"), config_of(record["hparams"]), {})
    groups, requests = record["n_groups"], golden_requests()
    cells = [(seed, group) for seed in range(seeds) for group in range(groups)]
    overlay = editor.new_overlay(len(cells))
    for position in range(T):
        edits = [
            LaneEdit((requests[g * T + position],), RandomStreams("defer", {}, seed, g * T, position))
            for seed, g in cells
        ]
        editor.edit(overlay, edits)
    items = [Item(lane, requests[g * T + i]) for lane, (_, g) in enumerate(cells) for i in range(T)]
    found = score(editor.base, overlay, items, ScoreConfig(generated=False))
    n = groups * T
    for _, name, column in common.PAIRS:
        values = [sum(float(s[column] or 0) for s in found[i : i + n]) / n for i in range(0, len(found), n)]
        common.check_seeds(values, record[name], name)


def test_the_answer_does_not_leak_into_the_decision() -> None:
    """By default gate and map read the prompt alone: two rows that differ in the target get the
    same decision."""
    base = common.model("llama")
    editor = DEFER(base, DEFERConfig(layer=4, lr=1e-2, n_iter=5), {})
    overlay = editor.new_overlay(1)
    request = golden_requests()[0]
    editor.edit(overlay, [LaneEdit((request,), RandomStreams("defer", {}, 0, 0, 0))])
    public = Deferral(overlay.sites[0], 1, torch.float32, DEFERConfig(layer=4, query="row"))
    public.load_state(0, overlay.state(0))
    from workers.model.batch import collate

    gates = {}
    for kind, which in (("prompt", overlay), ("row", public)):
        rows = collate([base.encoder.pair(request.prompt, t) for t in ("clock maker", "pilot")], [0, 0], 0)
        caught: list[torch.Tensor] = []
        handle = which.sites[0].module.register_forward_pre_hook(
            lambda _, args, to=caught: to.append(args[0])
        )
        base.hidden_states(rows)
        handle.remove()
        gates[kind] = which.answer(which.query_of(caught[0], rows), rows)[0].tolist()
    assert gates["prompt"][0] == pytest.approx(gates["prompt"][1], rel=1e-5)
    assert gates["row"][0] != pytest.approx(gates["row"][1], rel=1e-3)


LLAMA = {
    "alg_name": "DEFER",
    "model_name": "meta-llama/Llama-2-7b-hf",
    "device": 0,
    "inner_params": ["model.layers[27].mlp.down_proj.weight"],
    "edit_lr": 7e-5,
    "n_iter": 100,
    "threshold": 0.5,
}


def test_easyedit_files() -> None:
    config = DEFERConfig.model_validate(DEFERConfig.from_easyedit(LLAMA, "file"))
    assert (config.layer, config.module, config.lr, config.n_iter) == (27, "mlp.down_proj", 7e-5, 100)
    assert config.query == "prompt"


@pytest.mark.parametrize(("key", "value"), [("alg_name", "WISE"), ("inner_params", []), ("colour", 1)])
def test_easyedit_refusals(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=key):
        config_of({**LLAMA, key: value})
