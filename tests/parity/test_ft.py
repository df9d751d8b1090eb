"""FT-L and FT-M against the recorded numbers, and the hyperparameter files of EasyEdit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import (
    ELSEWHERE,
    check_record,
    core,
    lane_edits,
    meta,
    model,
    record,
    relative_error,
    run_groups,
)
from workers.methods import load_config
from workers.methods.ft import FT, FTConfig
from workers.model.base import model_shape
from workers.model.overlay import Overlay
from workers.types import SpecError

pytestmark = pytest.mark.numeric

METHODS = {"FT-L": "prompt_last", "FT-M": "target_new"}
PUBLIC = {"public_bos": True}


def prepared(short: str, method: str, copy: int = 0, **changes: Any) -> FT:
    hparams = {
        "layers": (3,),
        "lr": 1e-3,
        "num_steps": 25,
        "objective": METHODS[method],
        "deviations": PUBLIC,
        **changes,
    }
    return FT.prepare(model(short, copy), FTConfig.model_validate(hparams), {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("short", ["llama", "gpt2"])
def test_weight_change_and_losses_of_one_edit(short: str, method: str) -> None:
    name = {"FT-L": "ftl_req0", "FT-M": "ftm_req0"}[method]
    editor = prepared(short, method)
    overlay, ((outcome,),) = run_groups(editor, 1, 1)
    (site,) = overlay.sites
    change = overlay.state(0).tensors[site.name] - site.weight_OI
    (recorded,) = core(short, name).values()
    assert relative_error(change, recorded.T if site.transposed else recorded) <= 1e-3
    losses = meta(short)[name]["losses"]
    assert outcome.iterations == len(losses) == 25
    assert outcome.details["first_loss"] == pytest.approx(losses[0], rel=1e-3)
    assert outcome.loss == pytest.approx(losses[-1], rel=1e-2)
    _, ((early,),) = run_groups(prepared(short, method, num_steps=8), 1, 1)
    assert early.loss == pytest.approx(losses[7], rel=1e-2)


RECORDS = [
    ("llama", "FT-L", 1),
    ("llama", "FT-L", 10),
    ("llama", "FT-M", 1),
    ("llama", "FT-M", 10),
    pytest.param("llama", "FT-M", 100, marks=pytest.mark.long),
    ("gpt2", "FT-L", 1),
    ("gpt2", "FT-L", 10),
    ("gpt2", "FT-M", 1),
]


@pytest.mark.parametrize(("short", "method", "T"), RECORDS)
def test_scores(short: str, method: str, T: int) -> None:
    expected = record(short, method, T)

    def replay(copy: int) -> tuple[FT, Overlay]:
        editor = prepared(short, method, copy)
        return editor, run_groups(editor, T, expected["n_groups"])[0]

    check_record(expected, replay, norms=0.1 if T == 100 else 1e-2)


def test_bos_is_a_target_only_on_request() -> None:
    first = meta("llama")["ftl_req0"]["losses"][0]
    (((public,),), ((ours,),)) = (
        run_groups(prepared("llama", "FT-L", deviations={"public_bos": bos}), 1, 1)[1]
        for bos in (True, False)
    )
    assert public.details["first_loss"] == pytest.approx(first, rel=1e-3)
    assert ours.details["first_loss"] < 0.9 * first


def test_the_box_stands_around_the_pristine_weights() -> None:
    bound = 1e-3
    largest = {}
    for around in ("base", "edit"):
        editor = prepared("gpt2", "FT-M", norm_constraint=bound, constraint_around=around, num_steps=3)
        overlay, _ = run_groups(editor, 3, 1)
        (site,) = overlay.sites
        largest[around] = float((overlay.state(0).tensors[site.name] - site.weight_OI).abs().max())
    assert largest["base"] <= bound * (1 + 1e-4)
    assert bound * 1.5 < largest["edit"] <= 3 * bound * (1 + 1e-4)


def test_a_batch_is_one_loss() -> None:
    editor = prepared("gpt2", "FT-M", num_steps=1)
    both = [edit.requests[0] for edit in lane_edits(editor, range(2), 1, 0, {})]
    overlay = editor.new_overlay(2)
    (first, _) = alone = editor.edit(overlay, lane_edits(editor, range(2), 1, 0, {}))
    template = lane_edits(editor, [0], 1, 0, {})[0]
    (joint,) = editor.edit(editor.new_overlay(1), [type(template)(tuple(both), template.streams)])
    assert first.loss is not None and alone[1].loss is not None
    assert joint.loss == pytest.approx((first.loss + alone[1].loss) / 2, rel=1e-5)


def test_a_learned_request_stops_at_once() -> None:
    editor = prepared("gpt2", "FT-M", num_steps=60, lr=5e-3)
    overlay = editor.new_overlay(1)
    edits = lane_edits(editor, [4], 1, 0, {})
    (first,) = editor.edit(overlay, edits)
    assert first.iterations < 60 and first.loss is not None and first.loss < 1e-2
    before = overlay.state(0)
    (again,) = editor.edit(overlay, edits)
    assert again.iterations == 0
    assert all(torch.equal(t, overlay.state(0).tensors[name]) for name, t in before.tensors.items())


# --- hyperparameter files ---

YAML = """
alg_name: "{alg}"
model_name: "./hugging_cache/any"
device: 0

layers: {layers}
num_steps: 25
batch_size: 1
max_length: 40
lr: 5e-4
weight_decay: 0
kl_factor: 0
norm_constraint: {norm}

objective_optimization: "prompt_last"
rewrite_module_tmp: "{module}"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
attn_module_tmp: "model.layers.{{}}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
model_parallel: false
"""


def written(folder: Path, **values: Any) -> Path:
    values = {
        "alg": "FT",
        "layers": [21],
        "norm": "false",
        "module": "model.layers.{}.mlp.down_proj.weight",
        **values,
    }
    path = folder / "ft.yaml"
    path.write_text(YAML.format(**values))
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(
            {}, {"layers": (21,), "module": "mlp.down_proj", "norm_constraint": None}, id="llama-7b"
        ),
        pytest.param({"norm": "5e-5"}, {"norm_constraint": 5e-5}, id="mistral-7b"),
        pytest.param(
            {"layers": [0], "norm": "5e-4", "module": "transformer.h.{}.mlp.c_proj"},
            {"layers": (0,), "module": "mlp.c_proj", "norm_constraint": 5e-4},
            id="gpt2-xl",
        ),
        pytest.param({"layers": [0, 31]}, {"layers": (0, 31)}, id="internlm-7b"),
    ],
)
def test_easyedit_file(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = load_config("ft", {}, written(tmp_path, **values), ELSEWHERE).model_dump()
    assert {**config, **expected} == config
    assert (config["lr"], config["num_steps"], config["objective"]) == (5e-4, 25, "prompt_last")


def test_easyedit_file_can_be_overridden(tmp_path: Path) -> None:
    config = load_config(
        "ft", {"objective": "target_new", "num_steps": 3}, written(tmp_path), ELSEWHERE
    ).model_dump()
    assert (config["objective"], config["num_steps"]) == ("target_new", 3)


@pytest.mark.parametrize(
    ("text", "replacement", "said"),
    [
        (
            "prompt_last",
            "promptz_last",
            r"objective.*'promptz_last'",
        ),  # chatglm4-9b.yaml is published like this
        ("kl_factor: 0", "kl_factor: 0.1", "kl_factor: 0.1 has no effect"),
        ("weight_decay: 0", "weight_decay: 0\nbeams: 4", "beams: has no meaning for this method"),
        ('"FT"', '"ROME"', "alg_name: 'ROME' is another method"),
        ("norm_constraint: false", "norm_constraint: true", "norm_constraint"),
        ("[21]", "[]", "layers"),
    ],
)
def test_easyedit_file_errors(tmp_path: Path, text: str, replacement: str, said: str) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace(text, replacement))
    with pytest.raises(SpecError, match=said):
        load_config("ft", {}, path, ELSEWHERE)


def test_check_names_layer_and_module() -> None:
    shape = model_shape(model("gpt2").config)
    FTConfig(layers=(0, 5)).check(shape)
    with pytest.raises(SpecError, match="layer 6 is out of range; the model has layers 0 to 5"):
        FTConfig(layers=(0, 6)).check(shape)
    with pytest.raises(SpecError, match=r"mlp\.down_proj.*choices: .*mlp\.c_proj"):
        FTConfig(layers=(0,), module="mlp.down_proj").check(shape)
    assert FTConfig(layers=(0, 5)).overlay_bytes(shape, 10) == 2 * 128 * 512 * 4 * 6
