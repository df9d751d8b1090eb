"""MELO: the database's rules, which block a row gets, and the hyperparameter file of EasyEdit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import golden_requests, random_model
from workers.job import ScoreConfig
from workers.methods import load_config
from workers.methods.base import LaneEdit
from workers.methods.melo import MELO, NO_BLOCK, MELOConfig, _Database
from workers.model.base import model_shape
from workers.model.batch import collate
from workers.model.config import ModelConfig
from workers.model.overlay import LaneState
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import EditRequest, SpecError

REQUESTS = golden_requests(8)
ELSEWHERE = ModelConfig(name="some/other-model")


def prepared(**changes: Any) -> MELO:
    values = {"key_layer": 0, "layers": (1, 2), "radius": 1e-3, "lr": 5e-2, "num_iter": 15, **changes}
    return MELO.prepare(random_model("llama"), MELOConfig.model_validate(values), {})


def edit(editor: MELO, overlay: Any, *requests: EditRequest, position: int = 0) -> Any:
    (outcome,) = editor.edit(overlay, [LaneEdit(requests, RandomStreams("melo", {}, 0, 0, position))])
    return outcome


def at(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_rules_of_the_database() -> None:
    database = _Database(2, torch.zeros(()))
    assert database.find(at(0, 0)[None]) == [NO_BLOCK]
    assert database.place(at(0, 0), (5,), 0, 1.0) == "add"
    assert database.find(torch.stack([at(0, 1), at(0, 1.01)])) == [0, NO_BLOCK]
    assert database.place(at(0, 2.5), (5,), 1, 1.0) == "add"  # the same label, but too far
    # the same label and near: one cluster around both, and each of its points keeps its block
    assert database.place(at(1.5, 0), (5,), 2, 1.0) == "update"
    assert database.centres_CO[0].tolist() == [0.75, 0]
    assert database.clusters[0].radius == 1.0
    assert database.find(torch.stack([at(0.1, 0), at(1.4, 0), at(0, 2.5)])) == [0, 2, 1]
    # another label and near: both scopes reach half-way, and what fell out of the old one is
    # forgotten
    assert database.place(at(0.75, 1), (5, 6), 3, 1.0) == "split"
    assert [c.radius for c in database.clusters] == [0.5, 1.0, 0.5]
    assert database.find(torch.stack([at(0.75, 0.9), at(0.1, 0), at(0.75, 0.1)])) == [3, NO_BLOCK, NO_BLOCK]
    assert [c.label for c in database.clusters] == [(5,), (5,), (5, 6)]


def test_a_later_edit_of_one_prompt_takes_over() -> None:
    database = _Database(2, torch.zeros(()))
    database.place(at(0, 0), (5,), 0, 1.0)
    assert database.place(at(0, 1e-5), (6,), 1, 1.0) == "replace"
    assert database.find(at(0, 0)[None]) == [1] and len(database.clusters) == 1


def test_a_block_answers_for_its_own_prompt_and_nobody_else() -> None:
    editor = prepared()
    base, overlay = editor.base, editor.new_overlay(1)
    for i, request in enumerate(REQUESTS[:3]):
        assert edit(editor, overlay, request, position=i).details["rules"] == ["add"]
    assert overlay.blocks(0) == 3
    encoded = [base.encoder.pair(r.prompt, r.target_new) for r in REQUESTS[:6]]
    rows = collate(encoded, [0] * 6, base.encoder.pad_id)
    plain = base.hidden_states(rows)
    with overlay.installed(rows):
        changed = base.hidden_states(rows)
    differs = (changed - plain).abs().amax((1, 2))
    assert (differs[:3] > 0.1).all() and not differs[3:].any()
    # the query is the prompt's: another continuation of an edited prompt takes the same block, the
    # words alone do not
    found = score(base, overlay, [Item(0, r) for r in REQUESTS[:3]], ScoreConfig())
    assert all(f["reliability_token"] == 1 for f in found)
    whole = f"{REQUESTS[0].prompt} {REQUESTS[0].target_new}"
    longer = score(
        base, overlay, [Item(0, replace(REQUESTS[0], prompt=whole))], ScoreConfig(generated=False)
    )[0]
    assert longer["target_logprob"] == longer["target_logprob_base"]


def test_a_later_edit_leaves_earlier_blocks_alone() -> None:
    editor = prepared()
    overlay = editor.new_overlay(1)
    edit(editor, overlay, REQUESTS[0])
    before = overlay.state(0)
    edit(editor, overlay, REQUESTS[1], position=1)
    after = overlay.state(0)
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name][: tensor.shape[0]], tensor)
    assert after.tensors["keys"].shape[0] == 2


def test_a_batch_is_one_block() -> None:
    editor = prepared(num_iter=30)
    overlay = editor.new_overlay(1)
    outcome = edit(editor, overlay, *REQUESTS[:3])
    assert outcome.details == {"rules": ["add"] * 3, "clusters": 3}
    assert overlay.blocks(0) == 1
    found = score(editor.base, overlay, [Item(0, r) for r in REQUESTS[:3]], ScoreConfig(generated=False))
    assert all(f["target_logprob"] > f["target_logprob_base"] + 1 for f in found)


def test_a_snapshot_is_a_copy_and_a_pristine_one_empties_a_lane() -> None:
    editor = prepared()
    overlay = editor.new_overlay(1)
    edit(editor, overlay, REQUESTS[0])
    state = overlay.state(0)
    again = editor.new_overlay(1)
    again.load_state(0, state)
    edit(editor, again, REQUESTS[1], position=1)
    assert state.tensors["keys"].shape[0] == 1 and len(state.meta["clusters"]) == 1
    again.load_state(0, LaneState())
    assert again.state(0) == LaneState() and again.blocks(0) == 0


def test_check() -> None:
    shape = model_shape(ModelConfig(name="embedded"))
    MELOConfig(key_layer=3, layers=(4, 5)).check(shape)
    with pytest.raises(SpecError, match=r"layers: 3 is not after key_layer=3.*4 to 5"):
        MELOConfig(key_layer=3, layers=(3, 5)).check(shape)
    with pytest.raises(SpecError, match="key_layer: layer 9 is out of range"):
        MELOConfig(key_layer=9, layers=(10,)).check(shape)


YAML = """
alg_name: MELO
model_name: ./hugging_cache/gpt2-xl
model_parallel: false
device: 1
max_length: 512
task: hall
lora_task_type: CAUSAL_LM
check_dir: null
grace:
  name: grace
  num_iter: 50
  init_radius: 0.5
  dist_fn: euc
  replacement: replace_prompt
  expand_mode: moving_avg
  key_id: -1
  num_edit_per_block: 4
  num_block: 350
  num_rank_per_block: 2
  edit_lr: 0.001
model:
  name: ./hugging_cache/gpt2-xl
  fan_in_fan_out: True
  target_modules:
    - transformer.h.36.mlp.c_fc
    - transformer.h.37.mlp.c_fc
  grace_layer: transformer.h.35.mlp.c_fc
lora:
  cls_name: ./hugging_cache/distilbert-base-cased
  lora_r: 64
  lora_alpha: 64
  lora_dropout: 0.0
"""


def test_easyedit_file(tmp_path: Path) -> None:
    path = tmp_path / "melo.yaml"
    path.write_text(YAML)
    assert load_config("melo", {}, path, ELSEWHERE) == MELOConfig(
        layers=(36, 37), module="mlp.c_fc", key_layer=35, key_module="mlp.c_fc", rank=2, scale=350, radius=0.5
    )
    assert load_config("melo", {"scale": 1.0}, path, ELSEWHERE).model_dump()["scale"] == 1


@pytest.mark.parametrize(
    ("text", "replacement", "said"),
    [
        ("dist_fn: euc", "dist_fn: cos", r"grace\.dist_fn: 'cos' is not supported; choices: 'euc'"),
        ("  edit_lr: 0.001\n", "", "edit_lr: this key is required"),
        ("h.37.mlp.c_fc", "h.37.mlp.c_proj", "target_modules: expected one map"),
        ("task: hall", "tusk: hall", "tusk: has no meaning"),
        ("alg_name: MELO", "alg_name: GRACE", "alg_name: 'GRACE' is another method"),
        ("lora:\n", "lora: 3\nother:\n", "other: has no meaning"),
    ],
)
def test_easyedit_file_errors(tmp_path: Path, text: str, replacement: str, said: str) -> None:
    assert text in YAML
    path = tmp_path / "melo.yaml"
    path.write_text(YAML.replace(text, replacement))
    with pytest.raises(SpecError, match=said):
        load_config("melo", {}, path, ELSEWHERE)
