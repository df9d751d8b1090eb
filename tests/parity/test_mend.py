"""MEND against the recorded numbers: trained weights of the public code, replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.common import (
    GOLDEN,
    check_record,
    lane_edits,
    model,
    relative_error,
    run_groups,
)
from tests.rounding import rounded_tensors
from workers.artifacts.base import ArtifactData
from workers.methods import load_config
from workers.methods.base import ArtifactContext
from workers.methods.families.hypernet import Questions, gradient_factors
from workers.methods.mend import MEND, MENDConfig, MENDDeviations
from workers.model.base import model_shape
from workers.model.config import ModelConfig, ModelFingerprint
from workers.model.overlay import Overlay
from workers.types import SpecError

pytestmark = pytest.mark.numeric

VARIANTS = ("mend_llama", "mend_llama_nobos")
CONFIG = MENDConfig(layers=(4, 5), rank=64)


@cache
def told(variant: str) -> Mapping[str, Any]:
    return dict(json.loads((GOLDEN / "pretrained" / f"{variant}.json").read_text()))


def recorded(variant: str) -> dict[str, Tensor]:
    """The weights as our artifact holds them. The public code adds its change, so its step sizes
    have the other sign."""
    theirs = load_file(GOLDEN / "pretrained" / f"{variant}.safetensors")
    old, new = "mend.(512, 128)", "512x128"
    count = theirs[f"{old}.k"].double().reshape(())
    out = {
        "rate_S": -theirs["edit_lrs"],
        "damping_S": torch.zeros(2),
        f"statistics.{new}.count": count,
        f"statistics.{new}.mean_F": torch.cat([theirs[f"{old}.u_mean"], theirs[f"{old}.v_mean"]]).double(),
        f"statistics.{new}.squares_F": torch.cat([theirs[f"{old}.u_s"], theirs[f"{old}.v_s"]]).double(),
    }
    names = {
        "up_FR": "u",
        "down_RF": "v",
        "bias_F": "bias",
        "scale_MF": "mode_scale.weight",
        "shift_MF": "mode_shift.weight",
    }
    for layer in range(2):
        for ours, name in names.items():
            out[f"blocks.{new}.{layer}.{ours}"] = theirs[f"{old}.mlp.layers.{layer}.{name}"]
    return out


def prepared(variant: str, copy: int = 0) -> MEND:
    config = CONFIG.model_copy(
        update={"deviations": MENDDeviations(public_bos=not told(variant)["label_bos_masked"])}
    )
    networks = rounded_tensors(recorded(variant), copy)
    return MEND.prepare(model("llama", copy), config, {"pretrained": ArtifactData(networks)})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_one_edit(variant: str) -> None:
    expected = load_file(GOLDEN / "pretrained" / f"{variant}_core_req0.safetensors")
    editor = prepared(variant)
    (edit,) = lane_edits(editor, [0], 1, 0, {})
    request = edit.requests[0]
    questions = Questions.of(
        editor.base, [[(request.prompt, request.target_new)]], editor.config.deviations.public_bos
    )
    assert torch.equal(questions.batch.input_ids_BS, expected["input_ids"])
    factors, loss_L = gradient_factors(editor.base, editor.sites, questions)
    assert float(loss_L[0]) == pytest.approx(float(expected["edit_loss"]), rel=1e-5)
    overlay = editor.new_overlay(1)
    (outcome,) = editor.edit(overlay, [edit])
    assert outcome.loss == pytest.approx(float(expected["edit_loss"]), rel=1e-5)
    for place, (site, found) in enumerate(zip(editor.sites, factors, strict=True)):
        name = f"{site.name}.weight"
        kept_N = found.kept_LN[0]
        assert kept_N.tolist() == expected[f"{name}.nz_mask"].bool().tolist()
        normal_MF = editor.net.statistics["512x128"](
            torch.cat([found.key_LNI[0], found.grad_LNO[0]], 1)[kept_N]
        )
        key_LNI, grad_LNO = editor.net(place, found)
        change_OI = overlay.weights_LOI[site.name][0] - site.weight_OI
        for value, what in (
            (found.key_LNI[0], "x_raw"),
            (found.grad_LNO[0], "delta_raw"),
            (normal_MF[:, :512], "x_norm"),
            (normal_MF[:, 512:], "delta_norm"),
            (key_LNI[0][kept_N], "out_x"),
            (grad_LNO[0][kept_N], "out_delta"),
            (change_OI, "delta_W"),
        ):
            assert relative_error(value, expected[f"{name}.{what}"]) <= 1e-4, (name, what)
    with torch.no_grad(), overlay.installed(questions.batch):
        logits_BSV = editor.base.logits(editor.base.hidden_states(questions.batch))
    assert relative_error(logits_BSV, expected["post_logits"]) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("T", [1, 2, 3, 10])
def test_scores(variant: str, T: int) -> None:
    expected = told(variant)["records"][str(T)]

    def replay(copy: int) -> tuple[MEND, Overlay]:
        editor = prepared(variant, copy)
        return editor, run_groups(editor, T, expected["n_groups"])[0]

    check_record(expected, replay, norms=1e-3 if T == 1 else 1e-2)


def test_requests_of_a_batch_are_edits_at_the_same_weights() -> None:
    editor = prepared("mend_llama_nobos")
    edits = lane_edits(editor, range(3), 1, 0, {})
    alone = editor.new_overlay(3)
    editor.edit(alone, edits)
    together = editor.new_overlay(1)
    whole = tuple(edit.requests[0] for edit in edits)
    editor.edit(together, [type(edits[0])(whole, edits[0].streams)])
    for site in editor.sites:
        changes_OI = (alone.weights_LOI[site.name] - site.weight_OI).sum(0)
        assert relative_error(together.weights_LOI[site.name][0] - site.weight_OI, changes_OI) <= 1e-4


# --- hyperparameter files ---

YAML = """
archive: ./results/models/MEND/llama-2-7b-ZsRE
alg_name: "MEND"
device: 1
model_name: ./hugging_cache/llama-2-7b
model_class: LlamaForCausalLM
inner_params:
- model.layers.30.mlp.gate_proj.weight
- model.layers.30.mlp.down_proj.weight
- model.layers.31.mlp.gate_proj.weight
- {last}
lr: 1e-6
edit_lr: 1e-4
lr_lr: 1e-4
lr_scale: 1.0
seed: 42
cedit: 0.1
cloc: 1.0
cbase: 1.0
dropout: 0.0
train_base: False
no_grad_layers: null
one_sided: {one_sided}
n_hidden: 1
hidden_dim: null
init: id
norm: True
combine: True
x_only: False
delta_only: False
act: relu
rank: 1920
mlp_class: IDMLP
shared: True
batch_size: 1
max_iters: 100000
accumulate_bs: 10
opt: Adam
grad_clip: 100.
"""


def written(folder: Path, **values: Any) -> Path:
    path = folder / "mend.yaml"
    path.write_text(
        YAML.format(**{"last": "model.layers.31.mlp.down_proj.weight", "one_sided": False, **values})
    )
    return path


def test_easyedit_file(tmp_path: Path) -> None:
    config = load_config("mend", {}, written(tmp_path), ModelConfig(name="some/model"))
    assert isinstance(config, MENDConfig)
    assert (config.layers, config.modules) == ((30, 31), ("mlp.gate_proj", "mlp.down_proj"))
    assert (config.schedule.steps, config.schedule.batch_size, config.edit_lr, config.rank) == (
        10_000,
        10,
        1e-4,
        1920,
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"last": "model.layers.31.mlp.up_proj.weight"}, "inner_params: .*the same modules"),
        ({"one_sided": True}, "one_sided: True is a variant"),
    ],
)
def test_easyedit_file_errors(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        load_config("mend", {}, written(tmp_path, **values), ModelConfig(name="some/model"))


def test_check_and_training_are_asked_for() -> None:
    shape = model_shape(model("llama").config)
    CONFIG.check(shape)
    with pytest.raises(SpecError, match="layers: layer 9 is out of range"):
        MENDConfig(layers=(9,)).check(shape)
    with pytest.raises(SpecError, match="training: required, because mend learns"):
        CONFIG.artifacts(ArtifactContext(ModelFingerprint("m", "t"), ModelConfig(), 0))
    assert CONFIG.overlay_bytes(shape, 10) == 3 * 2 * 128 * 512 * 4
