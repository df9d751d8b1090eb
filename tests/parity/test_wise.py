"""WISE against the recorded gradients, weights, losses and scores, with the public code's faults
switched on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.parity import common
from tests.rounding import rounded_model
from tests.small import build_inputs, golden_model, golden_requests
from workers.artifacts.base import ArtifactData
from workers.inner_loop.optim import LaneOptimizer
from workers.job import ScoreConfig
from workers.methods.base import LaneEdit
from workers.methods.wise.config import WISEConfig
from workers.methods.wise.memories import SideMemories
from workers.methods.wise.merging import merge_deltas, slerp
from workers.methods.wise.method import WISE
from workers.model.base import BaseModel
from workers.model.batch import Encoder
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import DataError, SpecError

pytestmark = pytest.mark.numeric

PUBLIC = WISEConfig.easyedit_values
HPARAMS = {"layer": 4, "lr": 0.3, "n_iter": 8, "alpha": 0.2, "beta": 0.8, "gamma": 0.4}


def config_of(source: str, hparams: dict[str, Any], **more: Any) -> WISEConfig:
    return WISEConfig.model_validate({**WISEConfig.from_easyedit(hparams, source), **more})


def templates(texts: Sequence[str]) -> dict[str, ArtifactData]:
    return {"templates": ArtifactData(meta={"templates": list(texts)})}


class PublicEncoder(Encoder):
    """Pads with the end-of-sequence token, as the public code sets its tokenizers up."""

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.eos_token_id)


@cache
def public_base(short: str, copy: int = 0) -> BaseModel:
    """The golden model as the records ran it. Public routing averages over padding, so that what
    stands there counts: the padding token, and fully masked rows, whose attention output is zero in
    PyTorch's fused attention and not in eager."""
    if copy:
        return rounded_model(public_base(short), copy)
    torch.set_num_threads(1)
    base = golden_model(common.MODELS[short])
    base.model.config._attn_implementation = "sdpa"
    return base.with_encoder(PublicEncoder(base.tokenizer))


class Masked(WISE):
    """Every side memory gets the recorded mask."""

    mask_OI: Tensor

    def draw_mask(self, edit: LaneEdit) -> Tensor:
        return 1.0 - self.mask_OI


def public_request0(base: BaseModel, n_iter: int) -> tuple[Masked, SideMemories, LaneEdit]:
    recorded = common.meta("llama")["wise_req0"]
    config = config_of("wise_req0", {**recorded["hparams"], "n_iter": n_iter}, **PUBLIC)
    editor = Masked(base, config, templates(recorded["templates"]))
    editor.mask_OI = common.core("llama", "wise_req0")["weight_mask_u8"].float()
    return (
        editor,
        editor.new_overlay(1),
        LaneEdit((golden_requests()[0],), RandomStreams("wise", {}, 0, 0, 0), editor.inputs),
    )


def test_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked gradients of the first two iterations, the side weight after the first, and the losses
    up to the sixteenth.

    The losses of rounded copies differ by 2e-4 up to the tenth iteration and by 2e-3 up to the
    sixteenth.
    """
    base = public_base("llama")
    recorded, expected = common.meta("llama")["wise_req0"], common.core("llama", "wise_req0")
    gradients: list[Tensor] = []
    step = LaneOptimizer.step

    def watched(self: LaneOptimizer, active_L: Tensor, moving: Sequence[int] | None = None) -> None:
        gradients.append(self.params[0].grad[0].clone())  # type: ignore[index]
        step(self, active_L, moving)

    monkeypatch.setattr(LaneOptimizer, "step", watched)
    weight_OI = base.site(4).weight_OI
    for n_iter in (1, 2, 10, 16):
        gradients.clear()
        editor, overlay, edit = public_request0(base, n_iter)
        (outcome,) = editor.edit(overlay, [edit])
        assert outcome.iterations == n_iter
        total = recorded["ft_loss"][n_iter - 1] + recorded["act_loss"][n_iter - 1]
        assert outcome.loss == pytest.approx(total, rel=1e-3 if n_iter <= 10 else 1e-2)
        for i, gradient_OI in enumerate(gradients[:2]):
            masked_OI = gradient_OI * editor.mask_OI
            assert common.relative_error(masked_OI, expected[f"masked_grad_iter{i}"]) <= 1e-3
        if n_iter == 1:
            changed_OI = expected["new_weight_iter1"] - weight_OI
            assert common.relative_error(overlay.delta_LOI[0], changed_OI) <= 1e-3


def test_core_after_twenty_iterations() -> None:
    """The recorded side weight and loss are those of a correct run, as far as these are determined.

    From about the seventeenth iteration on rounding decides which margins are violated: runs whose
    base weights differ in the last bit end up to 0.04 apart in the weight and 0.06 in the loss, and
    so do processors. The weight has changed by 0.91.
    """
    recorded, expected = common.meta("llama")["wise_req0"], common.core("llama", "wise_req0")
    total = recorded["ft_loss"][19] + recorded["act_loss"][19]
    for copy in range(common.FEW):
        base = public_base("llama", copy)
        editor, overlay, edit = public_request0(base, 20)
        (outcome,) = editor.edit(overlay, [edit])
        assert outcome.iterations == 20
        weight_OI = base.site(4).weight_OI + overlay.delta_LOI[0]
        assert common.relative_error(weight_OI, expected["new_weight_after"]) <= 0.1
        assert outcome.loss == pytest.approx(total, rel=0.15)
        # ours is measured after the last step, the recorded one before it
        assert overlay.activation[0] == pytest.approx(recorded["min_act"], rel=0.1)


def edited(editor: WISE, T: int, groups: int, seeds: Sequence[int]) -> SideMemories:
    """Every (seed, group) a lane, seeds outermost."""
    requests = golden_requests()
    cells = [(seed, group) for seed in seeds for group in range(groups)]
    overlay = editor.new_overlay(len(cells))
    config = editor.config.model_dump(mode="json")
    for position in range(T):
        edits = [
            LaneEdit((requests[g * T + position],), RandomStreams("wise", config, seed, g * T, position))
            for seed, g in cells
        ]
        editor.edit(overlay, edits)
    return overlay


def scores_of(base: BaseModel, overlay: SideMemories, T: int, groups: int) -> common.Scores:
    requests = golden_requests()
    items = [Item(lane, requests[lane % groups * T + i]) for lane in range(overlay.lanes) for i in range(T)]
    return score(base, overlay, items, ScoreConfig(generated=False))


class RecordedStep(WISE):
    """Masks drawn as in the recorded runs: one NumPy stream per group."""

    T: int
    streams: dict[int, np.random.RandomState]

    def draw_mask(self, edit: LaneEdit) -> Tensor:
        site = self.base.site(self.config.layer)
        out, in_features = site.shape
        group = edit.streams.first // self.T
        stream = self.streams.setdefault(group, np.random.RandomState(1000 + group))
        ratio = self.config.mask_ratio
        mask = torch.from_numpy(stream.choice([1, 0], size=out * in_features, p=[ratio, 1 - ratio])).float()
        return 1 - (mask.view(in_features, out).T if site.transposed else mask.view(out, in_features))


@pytest.mark.parametrize(
    ("short", "T"),
    [("llama", 1), ("gpt2", 1), ("llama", 10), pytest.param("llama", 100, marks=pytest.mark.long)],
)
def test_scores_with_the_recorded_masks(short: str, T: int) -> None:
    """With every draw replayed, the tolerances of methods without randomness apply.

    Up to the first merge WISE-Merge trains what WISE-Retrieve trains, so one run serves both
    records.
    """
    record = common.record(short, "WISE", T)
    groups = record["n_groups"]
    config, inputs = config_of("WISE", record["hparams"], **PUBLIC), templates(record["context_templates"])
    whole = [
        {"all": math.sqrt(sum(value**2 for value in norms.values()))}
        for norms in record["delta_fro_per_group"]
    ]

    @cache
    def memories(copy: int) -> SideMemories:
        editor = RecordedStep(public_base(short, copy), config, inputs)
        editor.T, editor.streams = T, {}
        return edited(editor, T, groups, [0])

    def retrieved(copy: int) -> common.Run:
        base, overlay = public_base(short, copy), memories(copy)
        norm = float(base.site(4).weight_OI.norm())
        norms = [{"all": float(overlay.delta_norm(lane) or 0) * norm} for lane in range(groups)]
        return common.Run(scores_of(base, overlay, T, groups), norms)

    def merged_later(copy: int) -> common.Run:
        base, overlay = public_base(short, copy), memories(copy)
        merge = WISE(base, config_of("WISE-merge", later["hparams"], **PUBLIC), inputs).new_overlay(groups)
        for lane in range(groups):
            merge.load_state(lane, overlay.state(lane))
        return common.Run(scores_of(base, merge, T, groups))

    common.check_runs({**record, "delta_fro_per_group": whole}, retrieved, 0.1 if T == 100 else 0.02)
    if short == "llama" and T <= 10:
        later = common.record(short, "WISE-merge", T)
        common.check_runs(later, merged_later)


@pytest.mark.parametrize(
    ("short", "T", "seeds"),
    [
        pytest.param("llama", 1, 5, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, 5, marks=pytest.mark.slow),
        pytest.param("llama", 10, 5, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, 20, marks=pytest.mark.long),
        pytest.param("llama", 10, 20, marks=pytest.mark.long),
    ],
)
def test_scores_with_our_masks(short: str, T: int, seeds: int) -> None:
    """The recorded mean is one that one more seed might give.

    Records of 15 and 20 requests scatter by 0.03 to 0.05 from seed to seed, which five seeds hardly
    tell: twenty are long.
    """
    record = common.record(short, "WISE", T)
    base, groups = public_base(short), record["n_groups"]
    n = groups * T
    config, inputs = config_of("WISE", record["hparams"], **PUBLIC), templates(record["context_templates"])
    found: common.Scores = []
    for first in range(0, seeds, 5):
        lanes = edited(WISE(base, config, inputs), T, groups, range(first, first + 5))
        found += scores_of(base, lanes, T, groups)
    for _, name, column in common.PAIRS:
        values = [sum(float(s[column] or 0) for s in found[i : i + n]) / n for i in range(0, len(found), n)]
        assert len(values) == seeds
        common.check_seeds(values, record[name], name, scatter=0.04 if seeds == 5 else 0.018)


# --- when memories are saved and merged ---


def edit_all(
    editor: WISE, overlay: SideMemories, start: int, stop: int, batch: int = 1
) -> list[dict[str, Any]]:
    requests = golden_requests()
    config = editor.config.model_dump(mode="json")
    details = []
    for position in range(start, stop, batch):
        members = tuple(requests[position : position + batch])
        (outcome,) = editor.edit(overlay, [LaneEdit(members, RandomStreams("wise", config, 0, 0, position))])
        details.append(outcome.details)
    return details


@pytest.fixture(scope="module")
def texts() -> dict[str, ArtifactData]:
    return templates(["{}", "You found a river and a {}"])


@pytest.mark.parametrize("retrieve", [True, False])
def test_saving_and_merging(texts: dict[str, ArtifactData], retrieve: bool) -> None:
    """Saved every 2 edits, merged every 4; a snapshot in the middle of a memory goes on bit for
    bit."""
    hparams = {**HPARAMS, "save_freq": 2, "merge_freq": 4, "retrieve": retrieve}
    editor = WISE(common.model("llama"), WISEConfig.model_validate(hparams), texts)
    overlay = editor.new_overlay(1)
    kept = [(len(overlay.saved[0]), overlay.edits[0])]
    for position in range(9):
        edit_all(editor, overlay, position, position + 1)
        kept.append((len(overlay.saved[0]), overlay.edits[0]))
        if position == 4:
            saved = overlay.state(0)
    two = 2 if retrieve else 1
    assert kept == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 0), (1, 1), (2, 0), (2, 1), (two, 0), (two, 1)]
    assert [m.merged for m in overlay.saved[0]] == [True] * two
    again = editor.new_overlay(1)
    again.load_state(0, saved)
    edit_all(editor, again, 5, 9)
    ours, theirs = overlay.state(0), again.state(0)
    assert ours.meta == theirs.meta
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[k], theirs.tensors[k]) for k in ours.tensors)
    before = overlay.state(0)
    score(editor.base, overlay, [Item(0, r) for r in golden_requests()[:9]], ScoreConfig())
    assert all(torch.equal(before.tensors[k], v) for k, v in overlay.state(0).tensors.items())
    assert overlay.delta_norm(0)


@pytest.mark.parametrize(
    "rule", ["ties", "magnitude_norm", "magnitude", "sign", "dare_ties", "dare_linear", "linear", "slerp"]
)
def test_merge_rules(rule: str, texts: dict[str, ArtifactData]) -> None:
    """Every rule gives a finite, repeatable memory; random ones draw from the edit's generator."""
    hparams = {**HPARAMS, "n_iter": 3, "save_freq": 1, "merge_freq": 2, "merge_alg": rule, "retrieve": False}
    editor = WISE(common.model("llama"), WISEConfig.model_validate(hparams), texts)
    first, second = editor.new_overlay(1), editor.new_overlay(1)
    for overlay in (first, second):
        edit_all(editor, overlay, 0, 4)
    (a,), (b,) = first.saved[0], second.saved[0]
    assert torch.equal(a.delta_OI, b.delta_OI)
    assert torch.isfinite(a.delta_OI).all()
    assert a.delta_OI.norm() > 0


def merged(rule: str, deltas: Sequence[Sequence[float]], density: float = 1.0, **more: Any) -> list[float]:
    config = WISEConfig.model_validate({**HPARAMS, "merge_alg": rule, "density": density, **more})
    tensors = [torch.tensor([d], dtype=torch.float64) for d in deltas]
    generator = torch.Generator().manual_seed(0)
    site = common.model("llama").site(4)
    return [
        float(x) for x in merge_deltas(config, site, tensors, [1 / len(deltas)] * len(deltas), generator)[0]
    ]


def test_merge_arithmetic() -> None:
    a, b = [4.0, -2.0, 0.0, 1.0], [2.0, 3.0, 5.0, -0.5]
    assert merged("linear", [a, b]) == pytest.approx([3.0, 0.5, 2.5, 0.25])
    assert merged("ties", [a, b]) == pytest.approx([3.0, 3.0, 5.0, 1.0])
    # half of each is kept: (4, -2, 0, 0) and (0, 3, 5, 0); in the second place 3 outvotes -2
    assert merged("ties", [a, b], density=0.5) == pytest.approx([4.0, 3.0, 5.0, 0.0])
    assert merged("sign", [a, b]) == merged("ties", [a, b])
    assert merged("magnitude", [a, b], density=0.5) == pytest.approx([2.0, 0.5, 2.5, 0.0])
    assert merged("magnitude_norm", [a, b], density=0.5) == pytest.approx([2.0, 0.5, 2.5, 0.0])
    long = [[1.0] * 4000]
    assert sum(merged("dare_linear", long, density=0.5)) == pytest.approx(4000, rel=0.1)
    assert sum(merged("dare_linear", long, density=0.5, deviations={"public_dare": True})) == pytest.approx(
        2000, rel=0.1
    )


def test_slerp() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.allclose(slerp(x, y, 0.0), x)
    assert torch.allclose(slerp(x, y, 1.0), y)
    assert torch.allclose(slerp(x, y, 0.5), torch.tensor([math.sqrt(0.5), 2 * math.sqrt(0.5)]))
    assert torch.allclose(slerp(x, 3 * x, 0.5), 2 * x)


# --- batches, lanes, inputs ---


def test_batch(texts: dict[str, ArtifactData]) -> None:
    """A batch is one edit of all its requests; each has its own margin and counts towards
    saving."""
    hparams = {**HPARAMS, "n_iter": 20, "save_freq": 4, "merge_freq": 8}
    editor = WISE(common.model("llama"), WISEConfig.model_validate(hparams), texts)
    overlay = editor.new_overlay(1)
    edit_all(editor, overlay, 0, 4, batch=4)
    assert len(overlay.saved[0]) == 1
    found = score(
        editor.base, overlay, [Item(0, r) for r in golden_requests()[:4]], ScoreConfig(generated=False)
    )
    assert sum(float(s["reliability_token"] or 0) for s in found) > sum(
        float(s["reliability_token_base"] or 0) for s in found
    )


@pytest.mark.parametrize("public", [False, True])
def test_lanes_are_independent(public: bool) -> None:
    """In float64, lanes of different lengths and batch sizes equal each lane alone."""
    base = golden_model("tiny-gpt2", torch.float64)
    hparams = {**HPARAMS, "n_iter": 4, **(PUBLIC if public else {})}
    editor = WISE(base, WISEConfig.model_validate(hparams), {})
    requests = golden_requests()
    starts = ["{}", "You found a river and a window near the harbour. {}", "Yes, {}"]
    edits = [
        LaneEdit((requests[i],), RandomStreams("wise", {}, 0, i, 0), templates(starts[: 1 + i % 3]))
        for i in range(8)
    ]
    together = editor.new_overlay(8)
    editor.edit(together, edits)
    for lane, edit in enumerate(edits):
        alone = editor.new_overlay(1)
        editor.edit(alone, [edit])
        assert common.relative_error(together.delta_LOI[lane], alone.delta_LOI[0]) <= 1e-6
        assert together.activation[lane] == pytest.approx(alone.activation[0], rel=1e-9)


def test_unrelated_sentence_is_needed(texts: dict[str, ArtifactData]) -> None:
    editor = WISE(common.model("llama"), WISEConfig.model_validate(HPARAMS), texts)
    request = golden_requests()[0]
    bare = type(request)("case-7", request.prompt, request.subject, request.target_new)
    with pytest.raises(DataError, match="case-7"):
        editor.edit(editor.new_overlay(1), [LaneEdit((bare,), RandomStreams("wise", {}, 0, 0, 0))])


def test_templates_are_the_recorded_ones() -> None:
    """Greedy continuations of the five starts, as the public code samples them."""
    base = common.model("llama")
    built = build_inputs(base, "wise", WISEConfig.model_validate(HPARAMS))["templates"].meta["templates"]
    recorded = common.meta("llama")["wise_req0"]["templates"]
    same = sum(a.split() == b.split() for a, b in zip(built, recorded, strict=True))
    assert same == len(recorded), (built, recorded)


# --- EasyEdit's files ---

LLAMA = {
    "alg_name": "WISE",
    "model_name": "./hugging_cache/llama-2-7b",
    "device": 1,
    "mask_ratio": 0.2,
    "edit_lr": 1.0,
    "n_iter": 70,
    "norm_constraint": 1.0,
    "act_margin": [5.0, 20.0, 10.0],
    "act_ratio": 0.88,
    "save_freq": 500,
    "merge_freq": 1000,
    "merge_alg": "ties",
    "objective_optimization": "only_label",
    "inner_params": ["model.layers[27].mlp.down_proj.weight"],
    "densities": 0.53,
    "weights": 1.0,
    "retrieve": True,
    "replay": False,
    "model_parallel": False,
}


@pytest.mark.parametrize(
    ("changes", "layer", "module", "margin"),
    [
        ({}, 27, "mlp.down_proj", (5.0, 20.0, 10.0)),
        (
            {"inner_params": ["transformer.h[21].mlp.fc_out.weight"], "act_margin": [15.0, 40.0, 20.0]},
            21,
            "mlp.fc_out",
            (15.0, 40.0, 20.0),
        ),
        (
            {"inner_params": ["transformer.h[8].mlp.c_fc.weight"], "n_iter": 40},
            8,
            "mlp.c_fc",
            (5.0, 20.0, 10.0),
        ),
        (
            {
                "inner_params": ["model.layers[29].mlp.down_proj.weight"],
                "act_margin": [2.0, 20.0, 10.0],
                "use_chat_template": True,
                "edit_lr": 0.9,
            },
            29,
            "mlp.down_proj",
            (2.0, 20.0, 10.0),
        ),
    ],
)
def test_easyedit_files(
    changes: dict[str, Any], layer: int, module: str, margin: tuple[float, float, float]
) -> None:
    config = config_of("file", {**LLAMA, **changes})
    assert (config.layer, config.module) == (layer, module)
    assert (config.alpha, config.beta, config.gamma) == margin
    assert (config.merge_weight, config.density, config.retrieve) == (1.0, 0.53, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("objective_optimization", "all"),
        ("act_margin", [1.0]),
        ("inner_params", "x"),
        ("alg_name", "ROME"),
        ("hue", 1),
    ],
)
def test_easyedit_refusals(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=key):
        config_of("file", {**LLAMA, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("replay", True), ("merge_freq", 750), ("merge_alg", "mean"), ("mask_ratio", 0), ("layer", -1)],
)
def test_config_refusals(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        WISEConfig.model_validate({**HPARAMS, "save_freq": 500, key: value})
