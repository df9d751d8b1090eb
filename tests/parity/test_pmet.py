"""PMET against the recorded numbers, its search for two vectors, and the hyperparameter files of
EasyEdit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import (
    ELSEWHERE,
    check_record,
    lane_edits,
    model,
    moment,
    record,
    relative_error,
    run_groups,
    templates,
)
from workers.methods import load_config
from workers.methods.families.locate import Facts, facts_of
from workers.methods.pmet import PMET, PMETConfig, _AtLayer
from workers.model.overlay import Overlay
from workers.types import SpecError

pytestmark = pytest.mark.numeric

RECORDED = {
    "layers": [0, 1],
    "v_num_grad_steps": 15,
    "v_lr": 1.0,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 10,
    "kl_factor": 0.0625,
    "mom2_update_weight": 100.0,
    "deviations": {"public_target": True},
}


def prepared(copy: int = 0, **changes: Any) -> PMET:
    config = PMETConfig.model_validate({**RECORDED, **changes})
    inputs = {
        **templates(record("llama", "PMET-rightpad", 1)["context_templates"]),
        **{f"moment.{layer}": moment("llama", layer, copy) for layer in config.layers},
    }
    return PMET.prepare(model("llama", copy), config, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 10])
def test_scores(T: int) -> None:
    """Layer by layer with a square root: both layers' recorded norms have to come out."""
    expected = record("llama", "PMET-rightpad", T)

    def replay(copy: int) -> tuple[PMET, Overlay]:
        editor = prepared(copy)
        return editor, run_groups(editor, T, expected["n_groups"])[0]

    check_record(
        expected, replay, norms=1e-3 if T == 1 else 2e-2
    )  # ten edits amplify rounding to a hundredth


def test_gradients_of_two_vectors() -> None:
    """The loss moves as its gradients say, at attention and MLP alike, also for some of the facts
    under an edited overlay."""
    editor = prepared(deviations={"public_target": False})
    overlay = editor.new_overlay(2)
    editor.edit(overlay, lane_edits(editor, [0, 1], 1, 0, {}))
    edits = [
        replace(
            edit, requests=tuple(lane_edits(editor, [lane + 2 * i], 1, 0, {})[0].requests[0] for i in (1, 2))
        )
        for lane, edit in enumerate(lane_edits(editor, [0, 1], 1, 0, {}))
    ]
    facts = Facts(editor.base, facts_of(editor.base, edits, editor.config, editor.inputs))
    at = _AtLayer.capture(editor.base, editor.sites[-1], facts, overlay)
    generator = torch.Generator().manual_seed(3)
    deltas = [0.1 * torch.randn(value.shape, generator=generator) for value in at.values]
    for delta in deltas:
        delta.requires_grad_(True)
    count = len(facts.targets.row_P)
    whole_K = facts.targets.nll(editor.base, at.hidden(deltas)[:count])
    grads = torch.autograd.grad(whole_K.sum(), deltas)
    assert all(float(grad.norm(dim=1).min()) > 0 for grad in grads)
    kept = [0, 3]  # one fact of each lane
    batch, row_B = at.batch.part(kept)
    targets, read_P = facts.targets.part(kept, row_B)
    some = at.part(row_B, batch, read_P)
    assert [lane for lane, _, _ in some.lane_batch.segments] == [0, 1]
    part_K = targets.nll(editor.base, some.hidden([delta[kept] for delta in deltas])).detach()
    assert relative_error(part_K, whole_K.detach()[kept]) <= 1e-5
    for delta, grad in zip(deltas, grads, strict=True):
        step = 1e-2 * grad / grad.norm()
        moved = [d.detach() + step if d is delta else d.detach() for d in deltas]
        back = [d.detach() - step if d is delta else d.detach() for d in deltas]
        rise = facts.targets.nll(editor.base, at.hidden(moved)[:count]).sum()
        fall = facts.targets.nll(editor.base, at.hidden(back)[:count]).sum()
        assert float(rise - fall) == pytest.approx(2e-2 * float(grad.norm()), rel=2e-2)


def test_a_batch_is_every_request_of_the_lane() -> None:
    """Three requests in one call: their order does not matter, and each adds a rank to both
    layers."""
    editor = prepared(v_num_grad_steps=4, deviations={"public_target": False})
    (edit,) = lane_edits(editor, [0], 1, 0, {})
    requests = tuple(lane_edits(editor, [g], 1, 0, {})[0].requests[0] for g in range(3))
    overlay = editor.new_overlay(2)
    outcomes = editor.edit(
        overlay, [replace(edit, requests=requests), replace(edit, requests=requests[::-1])]
    )
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-4)
    for site in editor.sites:
        assert relative_error(overlay.delta(1, site), overlay.delta(0, site)) <= 1e-3
        assert overlay.part_of(site).rank == 3


YAML = """
alg_name: "PMET"
model_name: "./hugging_cache/any"
stats_dir: "./data/stats"
device: 0
layers: [4, 5, 6, 7, 8]
clamp_norm_factor: 1
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 0.5
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
rewrite_module_tmps: ["model.layers.{}.mlp.down_proj"]
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp.down_proj"
attn_module_tmp: "model.layers.{}.self_attn.o_proj"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
nll_loss_factor: 1
"""


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "pmet.yaml"
    path.write_text(YAML)
    elsewhere = ELSEWHERE
    config = load_config("pmet", {}, path, elsewhere)
    assert config == PMETConfig(layers=(4, 5, 6, 7, 8), module="mlp.down_proj")
    path.write_text(YAML.replace('["model', '["model.layers.{}.self_attn.o_proj", "model'))
    with pytest.raises(SpecError, match=r"rewrite_module_tmps: .*PMET writes one map here"):
        load_config("pmet", {}, path, elsewhere)
