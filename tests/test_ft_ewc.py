"""FT-EWC: the Fisher information it is held by, and what the penalty does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import GOLDEN, build_inputs, golden_requests, random_model
from workers.artifacts.base import Stopped, Workbench
from workers.artifacts.fisher import KIND, build_fisher
from workers.methods import get_method
from workers.methods.base import ArtifactContext, LaneEdit, Method
from workers.methods.ft import FTConfig
from workers.methods.ft_ewc import FTEWC, FTEWCConfig
from workers.model.base import BaseModel
from workers.model.config import ModelConfig, ModelFingerprint
from workers.rng import RandomStreams
from workers.types import DataError, SpecError

pytestmark = pytest.mark.numeric

CORPUS = str(GOLDEN / "corpus.txt")
REQUESTS = golden_requests(6)


def config(**changes: Any) -> FTEWCConfig:
    values = {"layers": (1,), "lr": 1e-2, "num_steps": 8, "samples": 12, "corpus": CORPUS, **changes}
    return FTEWCConfig.model_validate(values)


def edited(
    base: BaseModel, settings: Any, name: str = "ft-ewc", edits: int = 2
) -> tuple[Method[Any, Any], torch.Tensor, Any]:
    """The change of the trained map after some edits, and the last outcome."""
    editor = get_method(name).prepare(base, settings, build_inputs(base, name, settings))
    overlay = editor.new_overlay(1)
    for i in range(edits):
        (outcome,) = editor.edit(overlay, [LaneEdit((REQUESTS[i],), RandomStreams(name, {}, 0, 0, i))])
    (site,) = overlay.sites
    return editor, overlay.state(0).tensors[site.name] - site.weight_OI, outcome


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients(arch: str) -> None:
    base = random_model(arch, torch.float64)
    recipe = {"corpus": CORPUS, "samples": 5, "layer": 1, "module": None, "precision": "float64"}
    data = build_fisher(base, recipe, Workbench())
    site = base.site(1)
    lines = [line for line in Path(CORPUS).read_text().splitlines() if line.strip()][:5]
    weight = site.module.weight
    total = torch.zeros_like(site.weight_OI)
    try:
        weight.requires_grad_(True)
        for line in lines:  # by the model's own loss, one text at a time
            ids = torch.tensor([base.encoder.text(line.strip())])
            (grad,) = torch.autograd.grad(base.model(input_ids=ids, labels=ids).loss, weight)
            total += (grad.T if site.transposed else grad).square()
    finally:
        weight.requires_grad_(False)
    # transformers' loss is float32; where the gradient's terms cancel, its rounding is that of the
    # terms
    smallest = 1e-7 * float(total.max())
    torch.testing.assert_close(data.tensors["fisher"], total / 5, rtol=1e-5, atol=smallest)
    assert data.meta["texts"] == 5
    assert float(data.tensors["fisher"].max()) > 0


def test_it_goes_on_where_it_was_stopped_with_the_same_bits(tmp_path: Path) -> None:
    base, path = random_model("llama"), tmp_path / "texts.jsonl"
    texts = ["", *Path(CORPUS).read_text().splitlines()[:12]]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe = {"corpus": str(path), "samples": 9, "layer": 1, "module": None, "precision": "float32"}
    whole = build_fisher(base, recipe, Workbench())
    done: list[int] = []
    bench = Workbench(progress=lambda n, *_: done.append(n), stopping=lambda: len(done) in (3, 7))
    for _ in range(2):
        with pytest.raises(Stopped):
            build_fisher(base, recipe, bench)
    parts = build_fisher(base, recipe, bench)
    assert done == list(range(1, 10)) and parts.to_bytes() == whole.to_bytes()


def test_without_stiffness_it_is_fine_tuning() -> None:
    base = random_model("llama")
    _, plain, _ = edited(base, FTConfig(layers=(1,), lr=1e-2, num_steps=8), "ft")
    _, same, _ = edited(base, config(ew_lambda=0))
    assert torch.equal(plain, same)


def test_weights_that_the_text_depends_on_move_less_and_the_more_so_the_stiffer() -> None:
    base = random_model("llama")
    held = []
    for stiffness in (0, 100, 10_000):
        editor, change, outcome = edited(base, config(ew_lambda=stiffness, num_steps=20), edits=3)
        assert isinstance(editor, FTEWC)
        fisher = editor.inputs["fisher_1"].tensors["fisher"]
        held.append(float((fisher * change.square()).sum()))
        assert outcome.details["penalty"] == pytest.approx(stiffness / 2 * held[-1], rel=1e-4)
    assert held[0] > 2 * held[1] > 4 * held[2]


def test_a_penalty_has_its_gradient_and_lanes_their_own() -> None:
    base = random_model("gpt2", torch.float64)
    settings = config(layers=(0, 2), ew_lambda=7.0)
    editor = FTEWC.prepare(base, settings, build_inputs(base, "ft-ewc", settings))
    generator = torch.Generator().manual_seed(0)
    weights = []
    for site in editor.new_overlay(1).sites:
        shift = torch.randn(3, *site.shape, generator=generator, dtype=torch.float64)
        weights.append((site.weight_OI + shift).requires_grad_(True))
    held_K = editor.penalty(weights)
    grads = torch.autograd.grad(held_K[1], weights)
    for layer, site, weight, grad in zip((0, 2), editor.new_overlay(1).sites, weights, grads, strict=True):
        fisher = editor.inputs[f"fisher_{layer}"].tensors["fisher"].double()
        torch.testing.assert_close(grad[1], 7 * fisher * (weight[1].detach() - site.weight_OI))
        assert not grad[0].any() and not grad[2].any()


def test_what_is_asked_for(tmp_path: Path) -> None:
    fingerprint, model = ModelFingerprint("m", "t"), ModelConfig(name="some/other-model")
    specs = config(layers=(1, 2)).artifacts(ArtifactContext(fingerprint, model, seed=0))
    assert [(s.name, s.kind) for s in specs] == [("fisher_1", KIND), ("fisher_2", KIND)]
    keys = {s.key for s in specs}
    assert len(keys) == 2
    assert {
        s.key for s in config(layers=(1, 2), lr=1.0).artifacts(ArtifactContext(fingerprint, model, seed=5))
    } == keys
    for other in (config(samples=13), config(precision="float64"), config(module="mlp.up_proj")):
        assert not {s.key for s in other.artifacts(ArtifactContext(fingerprint, model, seed=0))} & keys
    assert (
        not {s.key for s in config().artifacts(ArtifactContext(ModelFingerprint("n", "t"), model, seed=0))}
        & keys
    )
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(Path(CORPUS).read_bytes())
    specs = config(layers=(1, 2), corpus=str(moved)).artifacts(ArtifactContext(fingerprint, model, seed=0))
    assert {s.key for s in specs} == keys and specs[0].where == {"corpus": str(moved)}
    with pytest.raises(SpecError, match="corpus: FT-EWC needs a text or JSONL file for the Fisher"):
        config(corpus=None).artifacts(ArtifactContext(fingerprint, model, seed=0))


def test_a_text_too_short(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    recipe = {"corpus": str(empty), "samples": 5, "layer": 1, "module": None, "precision": "float32"}
    with pytest.raises(DataError, match="holds no text"):
        build_fisher(random_model("llama"), recipe, Workbench())
