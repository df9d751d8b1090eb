"""UltraEdit against the recorded numbers, its statistics, and the hyperparameter files of
EasyEdit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.parity.common import (
    ELSEWHERE,
    check_record,
    golden_requests,
    model,
    record,
    relative_error,
)
from workers.methods import load_config
from workers.methods.base import EditOutcome, LaneEdit
from workers.methods.ultraedit import EPS, UltraEdit, UltraEditConfig, UltraEditOverlay
from workers.model.base import model_shape
from workers.rng import RandomStreams
from workers.types import SpecError

pytestmark = pytest.mark.numeric

MODULES = {"mlp.gate_proj": (1, 2), "mlp.up_proj": (3, 4)}
PUBLIC = {
    "modules": MODULES,
    "lr": 0.01,
    "token": "mask",
    "statistics": "turn",
    "deviations": {"public_labels": True, "public_variance": True},
}
REQUESTS = golden_requests()


def prepared(copy: int = 0, **config: Any) -> UltraEdit:
    return UltraEdit.prepare(
        model("llama", copy), UltraEditConfig.model_validate({"modules": MODULES, **config}), {}
    )


def turn(editor: UltraEdit, overlay: UltraEditOverlay, starts: list[int], size: int) -> list[EditOutcome]:
    """One turn of ``size`` requests in each lane."""
    config = editor.config.model_dump(mode="json")
    return editor.edit(
        overlay,
        [
            LaneEdit(tuple(REQUESTS[a : a + size]), RandomStreams(editor.name, config, 0, a, 0))
            for a in starts
        ],
    )


@pytest.mark.parametrize("T", [1, 10, 100])
def test_scores(T: int) -> None:
    """Requests came ten to a turn."""
    expected = record("llama", "UltraEdit", T)
    groups, size = expected["n_groups"], min(T, 10)

    def replay(copy: int) -> tuple[UltraEdit, UltraEditOverlay]:
        editor = prepared(copy, **PUBLIC)
        overlay = editor.new_overlay(groups)
        for start in range(0, T, size):
            turn(editor, overlay, [g * T + start for g in range(groups)], size)
        return editor, overlay

    check_record(expected, replay, norms=1e-3)


@pytest.mark.parametrize("token", ["ans", "mask"])
def test_statistics_are_those_of_all_tokens_at_once(token: str) -> None:
    """Three turns of two requests: Welford's rule gives mean and deviation of all features
    together."""
    editor = prepared(
        token=token, lr=1e-30
    )  # the weights stay, so that the features of six requests are comparable
    few, one = editor.new_overlay(1), editor.new_overlay(1)
    for start in (0, 2, 4):
        turn(editor, few, [start], 2)
    turn(editor, one, [0], 6)
    for shape, statistics in one.statistics.items():
        mine = few.statistics[shape]
        assert torch.equal(mine.count_L1, statistics.count_L1) and int(mine.count_L1) > 6
        # float32 inputs from batches of two and of six: rounded copies differ by up to 3e-7
        width = model("llama").hidden  # gradients depend on how many requests share a mean, inputs do not
        assert relative_error(mine.mean_LF[:, :width], statistics.mean_LF[:, :width]) <= 1e-5
        assert relative_error(mine.square_LF[:, :width], statistics.square_LF[:, :width]) <= 1e-5


@pytest.mark.parametrize("size", [2, 20])
def test_the_change_is_the_ridge_solution(size: int) -> None:
    """``(H^T H + I) dW^T = H^T V``, solved in the smaller of its two forms (20 requests have more
    tokens than inputs)."""
    editor = prepared(token="mask", lr=0.01)
    overlay = editor.new_overlay(1)
    part = editor._features(overlay, [REQUESTS[:size]])
    features = part.by_site[0]
    statistics = overlay.statistics["512x128"]
    statistics.update(features, public=False)
    keys_JI, grads_KO = features.keys_LJI[0], features.grads_LJO[0]
    assert (keys_JI.shape[0] > keys_JI.shape[1]) == (size == 20)
    z_KF = torch.cat([keys_JI, grads_KO], 1)
    normal_KF = (z_KF - z_KF.mean(0)) / (z_KF.std(0) + EPS)
    values_KO = -0.01 * normal_KF[:, :128].square().sum(1, keepdim=True) * normal_KF[:, 128:]
    left_II = keys_JI.T @ keys_JI + torch.eye(128, dtype=torch.float64)
    expected_OI = torch.linalg.solve(left_II, keys_JI.T @ values_KO).T
    assert relative_error(editor._change(features, statistics)[0], expected_OI) <= 1e-6


def test_gradients_are_those_of_the_loss() -> None:
    """``G^T H`` summed over all tokens is the loss's gradient with respect to the map's weight."""
    editor = prepared(token="mask")
    overlay = editor.new_overlay(1)
    part = editor._features(overlay, [REQUESTS[:3]])
    base = editor.base
    pairs = [base.encoder.pair(r.prompt, r.target_new) for r in REQUESTS[:3]]
    weight = editor.base.site(3, "mlp.up_proj").module.weight
    weight.requires_grad_(True)
    try:
        logits = [base.model(torch.tensor([pair.ids])).logits[0] for pair in pairs]
        losses = [
            torch.nn.functional.cross_entropy(
                x[p.prompt_len - 1 : -1], torch.tensor(p.target), reduction="sum"
            )
            for x, p in zip(logits, pairs, strict=True)
        ]
        loss = torch.stack(losses).sum() / sum(len(pair.target) for pair in pairs)
        (expected_OI,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(False)
    features = part.by_site[2]
    assert float(part.loss_L) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert relative_error(features.grads_LJO[0].T @ features.keys_LJI[0], expected_OI) <= 1e-4


def test_lanes_with_batches() -> None:
    """Four requests in each of three lanes, two to a backward: every lane is what it is alone."""
    editor = prepared(requests_per_backward=2, lr=0.01)
    together = editor.new_overlay(3)
    for step in (0, 4):
        turn(editor, together, [0 + step, 10 + step, 20 + step], 4)
    alone = editor.new_overlay(1)
    for step in (0, 4):
        (outcome,) = turn(editor, alone, [10 + step], 4)
    assert outcome.iterations == 1 and outcome.details["tokens"] >= 4
    for name, tensor in alone.state(0).tensors.items():
        assert relative_error(together.state(1).tensors[name], tensor) <= 1e-4, name


def test_a_rollback_drops_the_statistics() -> None:
    editor = prepared()
    overlay = editor.new_overlay(2)
    turn(editor, overlay, [0, 10], 3)
    counts = overlay.statistics["512x128"].count_L1
    assert (counts > 0).all()
    overlay.load_state(1, editor.new_overlay(1).state(0))
    assert float(counts[0]) > 0 and float(counts[1]) == 0
    assert not editor.new_overlay(1).state(0).tensors


# --- hyperparameter files ---

YAML = """
alg_name: "ULTRAEDIT"
device: 0
model_name: your/path/Llama3-8b-instruct
model_class: AutoModelForCausalLM
tokenizer_class: AutoTokenizer
tokenizer_name: your/path/Llama3-8b-instruct
inner_params:
- model.layers.11.mlp.gate_proj
- model.layers.12.mlp.gate_proj
- model.layers.18.mlp.up_proj
dropout: 0.0
no_grad_layers: null
lr: 1e-6
token: mask
batch_size: 100
batch_size_once: 10
editor_batch_size: 1024
silent: False
half: true
model_parallel: false
results_dir: ./results
"""


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "ultraedit.yaml"
    path.write_text(YAML)
    config = load_config("ultraedit", {}, path, ELSEWHERE).model_dump()
    assert config == {
        **UltraEditConfig(modules={"mlp.gate_proj": (11, 12), "mlp.up_proj": (18,)}).model_dump(),
        "token": "mask",
        "lr": 1e-6,
    }
    path.write_text(YAML.replace("model.layers.18.", "model.layers.{}."))
    with pytest.raises(SpecError, match=r"inner_params: 'model.layers.\{\}.mlp.up_proj' names no layer"):
        load_config("ultraedit", {}, path, ELSEWHERE)


def test_check_names_layer_and_module() -> None:
    shape = model_shape(model("llama").config)
    UltraEditConfig(modules=MODULES).check(shape)
    with pytest.raises(SpecError, match=r"modules\.mlp\.up_proj: layer 6 is out of range"):
        UltraEditConfig(modules={"mlp.up_proj": (6,)}).check(shape)
    with pytest.raises(SpecError, match=r"'mlp\.c_fc' is not a linear map"):
        UltraEditConfig(modules={"mlp.c_fc": (0,)}).check(shape)
    with pytest.raises(ValidationError, match="distinct and not negative"):
        UltraEditConfig(modules={"mlp.up_proj": (1, 1)})
    assert UltraEditConfig(modules=MODULES).overlay_bytes(shape, 5) == (4 * 4 + 2 * 8) * 128 * 512
