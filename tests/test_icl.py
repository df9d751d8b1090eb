"""In-context edits: what the model reads, and where it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import parse_spec
from tests.small import golden_requests, random_model
from workers.job import ScoreConfig
from workers.methods import load_config
from workers.methods.base import LaneEdit
from workers.methods.icl import ICL, ICLConfig
from workers.methods.none import NoEdit, NoEditConfig
from workers.model.base import model_shape
from workers.model.batch import Encoded, collate
from workers.model.config import ModelConfig
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import DataError, SpecError

REQUESTS = golden_requests(20)
DRAWS = RandomStreams("icl", {}, 0, 0, 0)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_row_is_the_text_with_its_lanes_facts(arch: str) -> None:
    base = random_model(arch, torch.float64)
    editor = ICL(base, ICLConfig(), {})
    overlay = editor.new_overlay(3)
    overlay.add(base, 0, REQUESTS[:1])
    overlay.add(base, 1, REQUESTS[1:3])
    request = REQUESTS[5]
    pair = base.encoder.pair(request.prompt, request.target_new)
    short = base.encoder.pair("A cat", "sat")
    rows = collate([pair, short, pair, pair], [0, 0, 1, 2], base.encoder.pad_id)
    hidden = overlay.hidden_states(base, rows)
    assert hidden.shape[:2] == rows.input_ids_BS.shape
    facts = [f"New Fact: {r.prompt} {r.target_new}\n" for r in REQUESTS[:3]]
    texts = {0: facts[0] + "Prompt: ", 2: facts[1] + facts[2] + "Prompt: ", 3: ""}
    for row, before in texts.items():
        text = f"{before}{request.prompt} {request.target_new}"
        ids = base.encoder.text(text)
        alone = base.hidden_states(collate([Encoded(ids, 1)], [0], base.encoder.pad_id))[0]
        count = len(pair.target) + 1  # from the last prompt token on
        assert torch.allclose(hidden[row, -count:], alone[-count:], atol=1e-9), row


def test_facts_stay_until_the_rollback_and_disturb_locality() -> None:
    base = random_model("llama", max_position_embeddings=512)
    editor = ICL(base, ICLConfig(), {})
    overlay = editor.new_overlay(1)
    lengths = []
    for request in REQUESTS[:4]:
        (outcome,) = editor.edit(overlay, [LaneEdit((request,), DRAWS)])
        lengths.append(outcome.details["context_tokens"])
    assert lengths == sorted(set(lengths))
    found = score(base, overlay, [Item(0, r) for r in REQUESTS[:4]], ScoreConfig())
    assert sum(float(s["locality_token"] or 0) for s in found) < 4
    assert editor.new_overlay(1).state(0).tensors == {}
    assert all(s["target_logprob"] != s["target_logprob_base"] for s in found)


def test_too_many_facts() -> None:
    base = random_model("llama")
    editor = ICL(base, ICLConfig(), {})
    overlay = editor.new_overlay(1)
    with pytest.raises(
        DataError, match=r"request \d+: 20 facts .* context length is 128; choose a smaller T"
    ):
        editor.edit(overlay, [LaneEdit(tuple(REQUESTS), DRAWS)])
    overlay = editor.new_overlay(1)
    overlay.add(base, 0, REQUESTS[:5])
    with pytest.raises(DataError, match="the probe"):
        overlay.hidden_states(base, collate([base.encoder.pair("a very long story " * 12, "x")], [0], 0))
    shape = model_shape(ModelConfig())
    assert shape.context == 128
    ICLConfig().check_edits(shape, 16)
    with pytest.raises(SpecError, match=r"17 facts .* context length of 128"):
        ICLConfig().check_edits(shape, 17)


@pytest.mark.parametrize(("grid", "edits"), [("{T: [1, 100]}", 100), ("{T: [1], rollback: never}", 100)])
def test_the_planner_refuses_what_cannot_fit(tmp_path: Path, grid: str, edits: int) -> None:
    text = f"{{name: g, model: {{name: embedded}}, dataset: {{kind: tinyworld, edits: {edits}}}, grid: {grid}, methods: [icl]}}"  # noqa: E501
    with pytest.raises(SpecError, match=r"icl: grid\.T: \d+: 100 facts before every prompt do not fit"):
        make_plan(parse_spec(text, "g.yaml", tmp_path))
    make_plan(parse_spec(text.replace("100", "2"), "g.yaml", tmp_path))


def test_easyedit_files() -> None:
    assert ICLConfig.from_easyedit({"alg_name": "IKE", "use_icl_examples": False, "k": 16}, "f") == {}
    with pytest.raises(SpecError, match="k: 16"):
        ICLConfig.from_easyedit({"alg_name": "IKE", "k": 16}, "f")


def test_no_edit_is_the_base_in_every_column() -> None:
    base = random_model("llama")
    editor = NoEdit(base, NoEditConfig(), {})
    overlay = editor.new_overlay(1)
    editor.edit(overlay, [LaneEdit((REQUESTS[0],), DRAWS)])
    found = score(base, overlay, [Item(0, r) for r in REQUESTS[:3]], ScoreConfig())
    for scores in found:
        for name, value in scores.items():
            if name.startswith("locality"):
                assert value == (None if "group_mean" in name else 1), "these probes have no named groups"
            elif f"{name}_base" in scores:
                assert value == scores[f"{name}_base"], name
    assert load_config("none", {}, None, ModelConfig()) == NoEditConfig()
