"""EMMET against the recorded numbers, its constraint, and the hyperparameter files of EasyEdit."""

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
from workers.methods.emmet import EMMET, EMMETConfig
from workers.methods.families.locate import Factor, facts_of, observe
from workers.methods.families.spread import by_lane, ridge_keys
from workers.model.overlay import Overlay

pytestmark = pytest.mark.numeric

RECORDED = {
    "layers": [0],
    "v_num_grad_steps": 15,
    "v_lr": 1.0,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_update_weight": 100.0,
    "emmet_lambda": 0.1,
}


def prepared(copy: int = 0, **changes: Any) -> EMMET:
    config = EMMETConfig.model_validate({**RECORDED, **changes})
    inputs = {
        **templates(record("llama", "EMMET", 1)["context_templates"]),
        **{f"moment.{layer}": moment("llama", layer, copy) for layer in config.layers},
    }
    return EMMET.prepare(model("llama", copy), config, inputs)


def test_scores() -> None:
    expected = record("llama", "EMMET", 1)

    def replay(copy: int) -> tuple[EMMET, Overlay]:
        editor = prepared(copy)
        return editor, run_groups(editor, 1, expected["n_groups"])[0]

    check_record(expected, replay)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_a_batch_is_answered_by_its_values(layers: list[int]) -> None:
    """With nothing on the diagonal the last layer's keys get exactly the residual that is left."""
    editor = prepared(layers=layers, emmet_lambda=0.0, v_num_grad_steps=5)
    (first,) = lane_edits(editor, [0], 1, 0, {})
    requests = tuple(lane_edits(editor, [g], 1, 0, {})[0].requests[0] for g in range(4))
    batch = [replace(first, requests=requests), replace(first, requests=requests[::-1])]
    overlay = editor.new_overlay(2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    add = overlay.add

    def noting(left: torch.Tensor, right: torch.Tensor, site: Any = None) -> None:
        facts = facts_of(editor.base, batch, editor.config, editor.inputs)
        (keys_NI,), _ = observe(editor.base, overlay, facts, [site], bare_share=0.5)
        seen.append((left @ right @ by_lane(keys_NI.double(), 2), left))
        add(left, right, site)

    overlay.add = noting  # type: ignore[method-assign]
    outcomes = editor.edit(overlay, batch)
    assert len(seen) == len(layers) and len(outcomes) == 2
    for answered_LON, residual_LON in seen:
        assert relative_error(answered_LON, residual_LON) <= 1e-6
    for site in editor.sites:  # the order of a batch does not matter
        assert relative_error(overlay.delta(1, site), overlay.delta(0, site)) <= 1e-4
        assert overlay.part_of(site).rank == 4


def test_closed_form_in_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    keys_LIN = torch.randn(3, 16, 2, generator=generator, dtype=torch.float64)
    sample_NI = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    moment_II = sample_NI.T @ sample_NI
    found = ridge_keys(Factor.of(moment_II, 0), keys_LIN, 0.1, limit=1)
    inverse_II = moment_II.inverse()
    for keys_IN, right_NI in zip(keys_LIN, found, strict=True):
        small_NN = keys_IN.T @ inverse_II @ keys_IN + 0.1 * torch.eye(2, dtype=torch.float64)
        assert relative_error(right_NI, small_NN.inverse() @ keys_IN.T @ inverse_II) <= 1e-9


YAML = """
layers: [5]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 100000
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
update_norm_lambda: 0
emmet_lambda: 0.1
model_parallel: false
stats_dir: "./data/stats"
device: 4
model_name: "./hugging_cache/any"
alg_name: "EMMET"
"""


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "emmet.yaml"
    path.write_text(YAML)
    config = load_config("emmet", {}, path, ELSEWHERE)
    expected = EMMETConfig(layers=(5,), module="mlp.down_proj", v_num_grad_steps=25, mom2_update_weight=1e5)
    assert config == expected
