"""SERAC against the recorded tensors, scope probabilities and scores, with the trained weights of
the golden set."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity import common
from tests.rounding import rounded_tensors
from tests.small import GOLDEN, golden_requests
from workers.artifacts.base import ArtifactData
from workers.methods.base import LaneEdit
from workers.methods.serac import SERAC, SERACConfig, mixed, scope_of
from workers.model.batch import collate
from workers.model.config import ModelShape
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.types import DataError, ModelError, SpecError

pytestmark = pytest.mark.numeric

FOLDER = GOLDEN / "pretrained"
PUBLIC: dict[str, Any] = {"mixing": "soft", "reads": "row", "edit_view": "public"}


@cache
def recorded() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "serac_llama_reph.json").read_text()))


@cache
def product() -> ArtifactData:
    tensors = load_file(FOLDER / "serac_llama_reph.safetensors")
    assert float(tensors["scale"]) == 1
    return ArtifactData({name.replace("replacement.", "counterfactual."): t for name, t in tensors.items()})


def editor_of(copy: int = 0, **hparams: Any) -> SERAC:
    config = SERACConfig(
        classifier=str(FOLDER / "serac_llama_tiny-distilbert"),
        counterfactual=str(FOLDER / "serac_llama_tiny-llama-cf"),
        **hparams,
    )
    networks = product()
    return SERAC(
        common.model("llama", copy),
        config,
        {"pretrained": ArtifactData(rounded_tensors(networks.tensors, copy), networks.meta)},
    )


def remember(editor: SERAC, count: int) -> Any:
    overlay = editor.new_overlay(1)
    for position, request in enumerate(golden_requests()[:count]):
        editor.edit(overlay, [LaneEdit((request,), RandomStreams("serac", {}, 0, 0, position))])
    return overlay


def test_core_of_request_0() -> None:
    expected = load_file(FOLDER / "serac_llama_reph_core_req0.safetensors")
    editor = editor_of(**PUBLIC)
    base, networks, request = editor.base, editor.networks, golden_requests()[0]
    overlay = remember(editor, 1)
    text = f"{request.prompt} {request.target_new}"
    assert (
        networks.classifier_tokenizer(overlay.view(text))["input_ids"] == expected["cls_ctx_ids"][0].tolist()
    )
    ids = networks.with_edit(text, text)
    assert list(ids) == expected["rep_input_ids"][0].tolist()
    with torch.no_grad():
        asked = networks.embed([text])
        (said,) = networks.answer_logits([ids[:1]], [ids[1:]])
    assert common.relative_error(overlay.embeds_JD[0], expected["ctx_embed"]) <= 1e-4
    assert common.relative_error(asked, expected["test_embed"]) <= 1e-4
    assert common.relative_error(scope_of(overlay.embeds_JD[0], asked)[0], expected["sim"]) <= 1e-4
    assert common.relative_error(said, expected["rep_logits"][0]) <= 1e-4
    pair = base.encoder.pair(request.prompt, request.target_new)
    rows = collate([pair], [0], base.encoder.pad_id)
    columns = list(range(pair.prompt_len - 1, len(pair.ids)))
    hidden = overlay.hidden_states(base, rows)[0]
    assert common.relative_error(base.logits(hidden), expected["base_logits"][0]) <= 1e-4
    found = overlay.logits(base, hidden[columns], rows, [0] * len(columns), columns)
    assert common.relative_error(found, expected["mixture_logits"][0, columns]) <= 1e-4
    everywhere = [
        mixed(b, c, float(expected["sim"]))
        for b, c in zip(base.logits(hidden), said[-len(pair.ids) :], strict=True)
    ]
    assert common.relative_error(torch.stack(everywhere), expected["mixture_logits"][0]) <= 1e-4


@pytest.mark.parametrize("mode", ["T1", "T10_accumulate"])
def test_scope_probabilities(mode: str) -> None:
    """Of the scored text and of the prompt alone; which edit of the memory is nearest."""
    editor = editor_of(**PUBLIC)
    requests = golden_requests()
    whole = remember(editor, 10)
    for told in (r for r in recorded()["scope_requests_0_9"] if r["mode"] == mode):
        request = requests[told["case_id"]]
        overlay = whole
        if mode == "T1":
            overlay = editor.new_overlay(1)
            overlay.add([[request]])
        probes = {
            "rewrite": (request.prompt, request.target_new),
            "rephrase": (request.rephrases[0], request.target_new),
            "locality": (request.locality[0].prompt, request.locality[0].target),
        }
        for name, (prompt, target) in probes.items():
            (text, alone), (place, _) = overlay.scopes([0, 0], [f"{prompt} {target}", prompt])
            assert text == pytest.approx(told[name]["prob_eval_text"], rel=1e-3, abs=1e-5), (
                told["case_id"],
                name,
            )
            assert alone == pytest.approx(told[name]["prob_prompt_only"], rel=1e-3, abs=1e-5), (
                told["case_id"],
                name,
            )
            assert place == told[name]["cache_index"]


@pytest.mark.parametrize(
    ("record", "T", "accumulate"),
    [("1", 1, True), ("10", 10, False), ("SERAC-accumulate_T10", 10, True)],
)
def test_scores(record: str, T: int, accumulate: bool) -> None:
    """The shipped public code keeps the last edit of a sequence only; a record with an accumulating
    cache is beside it."""
    told = recorded()
    expected = {**told["records"], **told["records_not_shipped"]}[record]

    def replay(copy: int) -> tuple[SERAC, Overlay]:
        editor = editor_of(copy, **PUBLIC, accumulate=accumulate)
        return editor, common.run_groups(editor, T, expected["n_groups"])[0]

    common.check_record(expected, replay, norms=None)


def test_the_paper_switches_by_the_prompt() -> None:
    """By default a row is answered by one model alone; below the threshold by the base, to the
    bit."""
    editor = editor_of()
    overlay = remember(editor, 1)
    base, request = editor.base, golden_requests()[0]
    probes = [(request.prompt, request.target_new), (request.locality[0].prompt, request.locality[0].target)]
    pairs = [base.encoder.pair(*probe) for probe in probes]
    rows = collate(pairs, [0, 0], base.encoder.pad_id)
    places = [
        (r, rows.offsets[r] + c) for r, p in enumerate(pairs) for c in range(p.prompt_len - 1, len(p.ids))
    ]
    row, column = [list(x) for x in zip(*places, strict=True)]
    hidden = base.hidden_states(rows)[row, column]
    before, after = base.logits(hidden), overlay.logits(base, hidden, rows, row, column)
    scope, _ = overlay.scopes([0, 0], [prompt for prompt, _ in probes])
    assert scope[1] < 0.5
    outside = [p for p, r in enumerate(row) if r == 1]
    assert torch.equal(before[outside], after[outside])
    (alone,) = editor.networks.answer_logits(
        [editor.networks.with_edit(overlay.texts[0][0], request.prompt)], [pairs[0].target]
    )
    inside = [p for p, r in enumerate(row) if r == 0]
    expected = alone if scope[0] >= 0.5 else before[inside]
    assert torch.allclose(after[inside], expected, atol=1e-4)
    certain = editor_of(threshold=1e-6)
    overlay = remember(certain, 1)
    assert torch.allclose(overlay.logits(base, hidden, rows, row, column)[inside], alone, atol=1e-4)


def test_lanes_see_their_own_memory_only() -> None:
    editor = editor_of()
    overlay = editor.new_overlay(2)
    request = golden_requests()[0]
    overlay.add([[request], []])
    scope, place = overlay.scopes([0, 1], [request.prompt, request.prompt])
    assert place == [0, -1]
    assert scope[0] > scope[1] == 0


def test_wrong_weights_and_long_edits() -> None:
    tensors = dict(product().tensors)
    name = "classifier.embeddings.LayerNorm.bias"
    config = editor_of().config
    for broken in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: torch.zeros(3)}):
        with pytest.raises(ModelError, match=name):
            SERAC(common.model("llama"), config, {"pretrained": ArtifactData(broken)})
    networks = editor_of().networks
    with pytest.raises(DataError, match="at most 128"):
        networks.answer_logits([tuple(range(5, 200))], [(5,)])


def test_a_large_base_needs_a_small_model() -> None:
    shape = ModelShape("llama", 32, 4096, 32000, 7_000_000_000, 2, {})
    with pytest.raises(SpecError, match=r"counterfactual: null.*7,000,000,000"):
        SERACConfig().check(shape)
    SERACConfig(counterfactual="some/folder").check(shape)


LLAMA = {
    "alg_name": "SERAC",
    "archive": "./results/models/SERAC/llama-2-7b",
    "model_class": "LlamaForCausalLM",
    "small_name": "./hugging_cache/llama-160m",
    "cls_name": "./hugging_cache/distilbert-base-cased",
    "cls_class": "AutoModel",
    "inner_params": [],
    "lr": 1e-5,
    "edit_lr": 1e-2,
    "cedit": 0.1,
    "dropout": 0.0,
    "supervised": False,
    "cross_attend": False,
    "cos": False,
    "square": True,
    "dist_heads": 1,
    "lora": None,
    "accumulate_bs": 10,
    "max_iters": 10000,
    "grad_clip": 100.0,
}


def test_easyedit_files() -> None:
    config = SERACConfig.model_validate(SERACConfig.from_easyedit(LLAMA, "file"))
    assert (config.classifier, config.counterfactual) == (LLAMA["cls_name"], LLAMA["small_name"])
    assert (config.lr, config.schedule.steps, config.schedule.batch_size) == (1e-5, 1000, 10)


@pytest.mark.parametrize(
    ("key", "value"),
    [("cos", True), ("cross_attend", True), ("dist_heads", 2), ("alg_name", "MEND"), ("colour", 1)],
)
def test_easyedit_refusals(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=key):
        SERACConfig.from_easyedit({**LLAMA, key: value}, "file")
