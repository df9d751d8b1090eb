"""GRACE against the recorded codebooks, losses and greedy-generation scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.parity import common
from tests.small import golden_requests
from workers.methods.base import LaneEdit
from workers.methods.grace import GRACE, Codebook, GRACEConfig
from workers.model.base import BaseModel
from workers.model.batch import Encoded, collate
from workers.rng import RandomStreams
from workers.types import SpecError

pytestmark = pytest.mark.numeric


def config_of(short: str, hparams: dict[str, Any]) -> GRACEConfig:
    return GRACEConfig.model_validate(GRACEConfig.from_easyedit(hparams, short))


@dataclass(frozen=True)
class Replayed(RandomStreams):
    """Hands out the one recorded random stream instead of derived ones."""

    stream: torch.Generator = field(default_factory=torch.Generator)

    def generator(self, purpose: str) -> torch.Generator:
        return self.stream


@pytest.mark.parametrize("short", ["llama", "gpt2"])
def test_ten_edits_in_a_row(short: str) -> None:
    """Keys, radii, losses and values, from the starting values that the recorded run drew."""
    recorded, expected = common.meta(short)["grace_10edits"], common.core(short, "grace_10edits")
    base = common.model(short)
    editor = GRACE(base, config_of(short, recorded["hparams"]), {})
    overlay = editor.new_overlay(1)
    stream = torch.Generator().manual_seed(recorded["seed"])
    for i, request in enumerate(golden_requests()[:10]):
        streams = Replayed("grace", {}, 0, 0, i, stream)
        (outcome,) = editor.edit(overlay, [LaneEdit((request,), streams)])
        for _ in range(editor.config.n_iter - 1):  # the public code draws at every forward and uses the first
            torch.rand(128, generator=stream)
        last = recorded["losses_per_edit"][i][-1]
        assert outcome.loss == pytest.approx(last, rel=1e-2)
    assert common.relative_error(overlay.keys_LJI[0, :10], expected["keys"]) <= 1e-3
    assert common.relative_error(overlay.radii_LJ[0, :10, None], expected["epsilons"]) <= 1e-3
    assert common.relative_error(overlay.values_LJO[0, :10], expected["values"]) <= 1e-2


@pytest.mark.parametrize("short", ["llama", "gpt2"])
def test_first_loss(short: str) -> None:
    recorded = common.meta(short)["grace_10edits"]
    config = config_of(short, recorded["hparams"]).model_copy(update={"n_iter": 1})
    editor = GRACE(common.model(short), config, {})
    stream = torch.Generator().manual_seed(recorded["seed"])
    for i, request in enumerate(golden_requests()[:10]):
        (outcome,) = editor.edit(
            editor.new_overlay(1), [LaneEdit((request,), Replayed("grace", {}, 0, 0, i, stream))]
        )
        assert outcome.loss == pytest.approx(recorded["losses_per_edit"][i][0], rel=1e-3)
        for _ in range(24):
            torch.rand(128, generator=stream)


@torch.no_grad()
def greedy(
    base: BaseModel, overlay: Codebook | None, probes: Sequence[tuple[int, str, str]]
) -> list[list[int]]:
    """As many tokens as the target has, generated from the prompt alone. Probes: (lane, prompt,
    target)."""
    pairs = [base.encoder.pair(prompt, target) for _, prompt, target in probes]
    lanes = [lane for lane, _, _ in probes]
    said: list[list[int]] = [[] for _ in probes]
    for _ in range(max(len(p.target) for p in pairs)):
        encoded = [
            Encoded((*p.ids[: p.prompt_len], *s), p.prompt_len) for p, s in zip(pairs, said, strict=True)
        ]
        rows = collate(encoded, lanes, base.encoder.pad_id)
        if overlay is None:
            hidden = base.hidden_states(rows)
        else:
            with overlay.installed(rows):
                hidden = base.hidden_states(rows)
        for s, token in zip(said, base.logits(hidden[:, -1]).argmax(-1).tolist(), strict=True):
            s.append(token)
    return [s[: len(p.target)] for s, p in zip(said, pairs, strict=True)]


def share(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(b)


@pytest.mark.parametrize(
    ("short", "T", "seeds"),
    [
        ("gpt2", 1, 5),
        ("llama", 1, 5),
        ("llama", 10, 5),
        pytest.param("llama", 100, 2, marks=pytest.mark.slow),
        pytest.param("llama", 100, 5, marks=pytest.mark.long),
    ],
)
def test_scores(short: str, T: int, seeds: int) -> None:
    """Mean over seeds of the greedy token scores within 0.05 of the record."""
    record = common.record(short, "GRACE", T)
    base, groups = common.model(short), record["n_groups"]
    editor = GRACE(base, config_of(short, record["hparams"]), {})
    requests = golden_requests()
    cells = [(seed, group) for seed in range(seeds) for group in range(groups)]
    overlay = editor.new_overlay(len(cells))
    for position in range(T):
        edits = [
            LaneEdit((requests[g * T + position],), RandomStreams("grace", {}, seed, g * T, position))
            for seed, g in cells
        ]
        editor.edit(overlay, edits)
    members = [(lane, requests[g * T + i]) for lane, (_, g) in enumerate(cells) for i in range(T)]
    targets = [base.encoder.pair(r.prompt, r.target_new).target for _, r in members]
    for name, texts in (
        ("rewrite_acc", [(lane, r.prompt, r.target_new) for lane, r in members]),
        ("rephrase_acc", [(lane, r.rephrases[0], r.target_new) for lane, r in members]),
    ):
        said = greedy(base, overlay, texts)
        mean = sum(map(share, said, targets)) / len(members)
        assert mean == pytest.approx(record[name], abs=0.05), name
    near = [(lane, r.locality[0].prompt, r.locality[0].target) for lane, r in members]
    mean = sum(map(share, greedy(base, overlay, near), greedy(base, None, near))) / len(members)
    assert mean == pytest.approx(record["locality_acc"], abs=0.05)


# --- the rules of the codebook ---


def edit_one(editor: GRACE, overlay: Codebook, prompt: str, target: str, position: int) -> dict[str, Any]:
    request = golden_requests()[0]
    changed = type(request)("x", prompt, prompt.split(maxsplit=1)[0], target)
    (outcome,) = editor.edit(overlay, [LaneEdit((changed,), RandomStreams("grace", {}, 0, 0, position))])
    return outcome.details


PROMPT, OTHER = "The profession of Brewen Morwick is", "The profession of Jinwen Orlski is"


def test_rules_on_overlapping_edits() -> None:
    """Expand, keep, split and replace; an edit is answered right after each."""
    base = common.model("llama")
    editor = GRACE(base, GRACEConfig(layer=4, eps=30.0, n_iter=25), {})
    overlay = editor.new_overlay(1)
    assert edit_one(editor, overlay, PROMPT, "clock maker", 0) == {"rule": "add", "keys": 1}
    assert edit_one(editor, overlay, PROMPT, "clock maker", 1) == {"rule": "keep", "keys": 1}
    before = float(overlay.radii_LJ[0, 0])
    assert edit_one(editor, overlay, PROMPT, "baker", 2) == {"rule": "replace", "keys": 1}
    assert float(overlay.radii_LJ[0, 0]) == before
    assert greedy(base, overlay, [(0, PROMPT, "baker")])[0] == list(base.encoder.pair(PROMPT, "baker").target)
    assert edit_one(editor, overlay, OTHER, "pilot", 3) == {"rule": "split", "keys": 2}
    distance = float((overlay.keys_LJI[0, 0] - overlay.keys_LJI[0, 1]).norm())
    assert overlay.radii_LJ[0, :2].tolist() == pytest.approx([distance / 2] * 2, rel=1e-5)
    for prompt, target in ((PROMPT, "baker"), (OTHER, "pilot")):
        assert greedy(base, overlay, [(0, prompt, target)])[0] == list(
            base.encoder.pair(prompt, target).target
        )


@pytest.mark.parametrize("expand", ["coverage", "moving_average"])
@pytest.mark.parametrize("train", [True, False])
def test_expand(expand: str, train: bool) -> None:
    base = common.model("llama")
    hparams = {"layer": 4, "eps": 1.0, "n_iter": 5, "eps_expand": expand, "train_matched": train}
    editor = GRACE(base, GRACEConfig.model_validate(hparams), {})
    overlay = editor.new_overlay(1)
    edit_one(editor, overlay, PROMPT, "baker", 0)
    overlay.radii_LJ[0, 0] = 25.0
    key, value = overlay.keys_LJI[0, 0].clone(), overlay.values_LJO[0, 0].clone()
    other = editor.new_overlay(1)
    edit_one(editor, other, OTHER, "baker", 1)
    distance = float((other.keys_LJI[0, 0] - key).norm())
    overlay.radii_LJ[0, 0] = distance - 0.5
    assert edit_one(editor, overlay, OTHER, "baker", 1) == {"rule": "expand", "keys": 1}
    assert float(overlay.radii_LJ[0, 0]) == pytest.approx(distance, rel=1e-5)
    moved = float((overlay.keys_LJI[0, 0] - key).norm())
    assert moved == pytest.approx(distance / 2 if expand == "moving_average" else 0.0, rel=1e-4, abs=1e-6)
    assert torch.equal(overlay.values_LJO[0, 0], value) is not train


@pytest.mark.parametrize("replacement", ["replace_last", "replace_all", "replace_prompt"])
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_replacements_and_starts(replacement: str, start: str) -> None:
    base = common.model("gpt2")
    hparams = {"layer": 4, "eps": 1.0, "n_iter": 25, "replacement": replacement, "val_init": start}
    editor = GRACE(base, GRACEConfig.model_validate(hparams), {})
    overlay = editor.new_overlay(1)
    (outcome,) = editor.edit(
        overlay, [LaneEdit((golden_requests()[0],), RandomStreams("grace", {}, 0, 0, 0))]
    )
    assert outcome.loss is not None
    assert outcome.loss < 0.5
    saved = overlay.state(0)
    fresh = editor.new_overlay(2)
    fresh.load_state(1, saved)
    assert all(torch.equal(fresh.state(1).tensors[k], v) for k, v in saved.tensors.items())
    assert fresh.state(0).tensors == {}


# --- EasyEdit's files ---

LLAMA = {
    "alg_name": "GRACE",
    "model_name": "./hugging_cache/llama-2-7b",
    "device": 1,
    "inner_params": ["model.layers[27].mlp.down_proj.weight"],
    "edit_lr": 1.0,
    "n_iter": 50,
    "eps": 1.0,
    "dist_fn": "euc",
    "val_init": "cold",
    "val_train": "sgd",
    "val_reg": "None",
    "reg": "early_stop",
    "replacement": "replace_last",
    "eps_expand": "coverage",
    "num_pert": 8,
    "dropout": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "layer", "module", "n_iter"),
    [
        ({}, 27, "mlp.down_proj", 50),
        ({"inner_params": ["transformer.h[35].mlp.c_fc.weight"], "n_iter": 200}, 35, "mlp.c_fc", 200),
        ({"inner_params": ["transformer.h[25].mlp.fc_out.weight"], "n_iter": 200}, 25, "mlp.fc_out", 200),
        ({"inner_params": ["language_model.model.layers[18].mlp.down_proj.weight"]}, 18, "mlp.down_proj", 50),
    ],
)
def test_easyedit_files(changes: dict[str, Any], layer: int, module: str, n_iter: int) -> None:
    config = config_of("file", {**LLAMA, **changes})
    assert (config.layer, config.module, config.n_iter, config.lr, config.eps) == (
        layer,
        module,
        n_iter,
        1.0,
        1.0,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("dist_fn", "cos"), ("val_train", "adv"), ("dropout", 0.1), ("alg_name", "WISE"), ("colour", 1)],
)
def test_easyedit_refusals(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=key):
        config_of("file", {**LLAMA, key: value})
