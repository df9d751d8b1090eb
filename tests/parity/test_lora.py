"""LoRA against the recorded numbers, and the hyperparameter files of EasyEdit."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import (
    ELSEWHERE,
    PAIRS,
    check_seeds,
    final_scores,
    lane_edits,
    model,
    record,
    run_groups,
)
from workers.methods import load_config
from workers.methods.lora import LoRA, LoRAConfig
from workers.model.base import model_shape
from workers.types import SpecError

pytestmark = pytest.mark.numeric


def prepared(short: str = "llama", **changes: Any) -> LoRA:
    values = {
        "target_modules": ("q_proj", "v_proj"),
        "rank": 8,
        "lora_alpha": 32,
        "num_steps": 30,
        "lr": 5e-3,
        **changes,
    }
    return LoRA.prepare(model(short), LoRAConfig.model_validate(values), {})


@pytest.mark.parametrize(
    ("T", "seeds"),
    [
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(10, 8, marks=pytest.mark.long),
    ],
)
def test_scores(T: int, seeds: int) -> None:
    expected = record("llama", "LoRA", T)
    assert (
        expected["hparams"]["target_modules"] == ["q_proj", "v_proj"]
        and expected["hparams"]["lora_dropout"] == 0
    )
    editor, groups = prepared(), expected["n_groups"]
    means: dict[str, list[float]] = {column: [] for _, _, column in PAIRS}
    for seed in range(seeds):
        overlay, _ = run_groups(editor, T, groups, seed=seed)
        scores = final_scores(editor, overlay, T, groups)
        for column, found in means.items():
            found.append(statistics.mean(float(s[column] or 0) for s in scores))
    for _, mean_name, column in PAIRS:
        check_seeds(means[column], expected[mean_name], column)


def test_a_fresh_adapter_is_random_in_one_factor_and_changes_nothing() -> None:
    editor = prepared()
    overlay = editor.new_overlay(1)
    (edit,) = lane_edits(editor, [0], 1, 0, {})
    overlay.start(0, edit.streams)
    state = overlay.state(0).tensors
    assert len(state) == 2 * 2 * 6  # query and value, A and B, of six layers
    for name, factor in state.items():
        if name.endswith(".B"):
            assert not factor.any()
        else:
            assert factor.abs().max() <= 128**-0.5 and factor.std() == pytest.approx(
                (3 * 128) ** -0.5, rel=0.1
            )
    assert overlay.delta_norm(0) == 0
    other = editor.new_overlay(1)
    (second,) = lane_edits(editor, [0], 1, 0, {}, seed=1)
    other.start(0, second.streams)
    assert all(not torch.equal(state[n], t) for n, t in other.state(0).tensors.items() if n.endswith(".A"))


def test_a_sequence_goes_on_with_its_adapters() -> None:
    editor = prepared(num_steps=3)
    overlay = editor.new_overlay(1)
    states = []
    for position in range(2):
        editor.edit(overlay, lane_edits(editor, [0], 2, position, {}))
        states.append(overlay.state(0).tensors)
    # three steps of Adam move a number by 3 * lr at most: the second edit started from the first
    # one's end
    moved = [float((states[1][name] - states[0][name]).abs().max()) for name in states[0]]
    assert 0 < max(moved) <= 3 * 5e-3 * 1.1
    change, weights = 0.0, 0.0
    for site in overlay.sites:
        change += float(overlay.delta(site, 0).square().sum())
        weights += float(site.weight_OI.square().sum())
    assert overlay.delta_norm(0) == pytest.approx(math.sqrt(change / weights), rel=1e-4)


def test_dropout_is_for_training_only() -> None:
    first = [run_groups(prepared(num_steps=1, lora_dropout=rate), 1, 1)[1][0][0].loss for rate in (0.0, 0.5)]
    assert first[0] == first[1]  # B is zero in the first step, whatever is dropped
    editor = prepared(num_steps=4, lora_dropout=0.5)
    overlay, ((outcome,),) = run_groups(editor, 1, 1)
    ((plain,),) = run_groups(prepared(num_steps=4), 1, 1)[1]
    assert outcome.loss != plain.loss and overlay.dropout is None
    assert final_scores(editor, overlay, 1, 1) == final_scores(editor, overlay, 1, 1)


# --- hyperparameter files ---

YAML = """
alg_name: "LoRA"
model_name: "./hugging_cache/llama-2-7b"
device: 1

lora_type: "lora"
layers: []
num_steps: 70
batch_size: 1
max_length: 30
lr: 5e-3
weight_decay: 0
kl_factor: 0
rank: 8
lora_alpha: 32
lora_dropout: 0.1
norm_constraint: false
target_modules: ["q_proj", "v_proj"]
model_parallel: false
"""


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(YAML)
    assert load_config("lora", {}, path, ELSEWHERE) == LoRAConfig(
        target_modules=("q_proj", "v_proj"), rank=8, lora_alpha=32, lora_dropout=0.1, num_steps=70, lr=5e-3
    )


@pytest.mark.parametrize(
    ("text", "replacement", "said"),
    [
        ("kl_factor: 0", "kl_factor: 0.1", "have no effect in LoRA"),
        ('"lora"\nlayers', '"dora"\nlayers', "lora_type: 'dora' is not supported"),
        (
            '"lora"\nlayers',
            '"adalora"\nlayers',
            "lora_type: 'adalora' is not supported.*of rank 12.*write lora_type: lora",
        ),
        ("rank: 8", "rank: 0", "rank"),
        ("layers: []", "layers: [3, 3]", "distinct"),
        ("lora_alpha", "lora_beta", "lora_beta: has no meaning"),
    ],
)
def test_easyedit_file_errors(tmp_path: Path, text: str, replacement: str, said: str) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(YAML.replace(text, replacement))
    with pytest.raises(SpecError, match=said):
        load_config("lora", {}, path, ELSEWHERE)


def test_check_names_layer_and_module() -> None:
    shape = model_shape(model("gpt2").config)
    LoRAConfig(target_modules=("c_attn", "mlp.c_proj")).check(shape)
    with pytest.raises(SpecError, match=r"target_modules: 'q_proj' is no linear map.*choices: attn\.c_attn"):
        LoRAConfig(target_modules=("q_proj",)).check(shape)
    with pytest.raises(SpecError, match="layer 6 is out of range"):
        LoRAConfig(layers=(6,)).check(shape)
    assert LoRAConfig(rank=4).overlay_bytes(shape, 10) == 5 * 6 * 4 * (128 + 384) * 4
    # a name may mean two maps: the attention's and the MLP's
    both = LoRA.prepare(model("gpt2"), LoRAConfig(target_modules=("c_proj",), layers=(2,)), {}).new_overlay(1)
    assert [site.name for site in both.sites] == ["transformer.h.2.attn.c_proj", "transformer.h.2.mlp.c_proj"]
