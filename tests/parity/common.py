"""What the parity tests share: the golden records, a run of recorded groups as lanes, and the tolerances.

Groups are independent, so all groups of a record run at once, one lane each. The tolerances are those of the golden README.
"""

from __future__ import annotations

import copy
import json
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.small import GOLDEN, golden_model, golden_requests
from workers.artifacts.base import ArtifactData, Workbench
from workers.artifacts.stats import build_second_moment
from workers.job import ScoreConfig
from workers.methods.base import EditOutcome, LaneEdit, Method
from workers.model.base import BaseModel
from workers.model.config import ModelConfig
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score

ELSEWHERE = ModelConfig(name="some/other-model")
"""A model that is not here and for which no hyperparameters are tuned."""

MODELS = {"llama": "tiny-llama", "gpt2": "tiny-gpt2"}

Scores = list[dict[str, float | None]]


@cache
def model(short: str) -> BaseModel:
    """``llama`` or ``gpt2`` in float32 on one thread, as the records were made."""
    torch.set_num_threads(1)
    return golden_model(MODELS[short])


@cache
def record(short: str, method: str, T: int) -> Mapping[str, Any]:
    """One record of the reference."""
    records = json.loads((GOLDEN / "reference.json").read_text())["records"]
    (found,) = (r for r in records if (r["model"], r["method"], r["T"]) == (MODELS[short], method, T))
    return dict(found)


@cache
def meta(short: str) -> Mapping[str, Any]:
    """Losses, templates and hyperparameters that belong to the core tensors."""
    (path,) = (GOLDEN / "core").glob(f"{short}_meta_*ROME*.json")
    return dict(json.loads(path.read_text()))


def templates(recorded: Sequence[Any]) -> dict[str, ArtifactData]:
    """Recorded context templates, kind by kind, as our artifact."""
    texts = [text for kind in recorded for text in ([kind] if isinstance(kind, str) else kind)]
    return {"templates": ArtifactData(meta={"templates": texts})}


@cache
def moment(short: str, layer: int) -> ArtifactData:
    """The second moment of the lines that the records used: 4000 random ones, drawn by the standard generator with seed 1."""
    lines = (GOLDEN / "corpus.txt").read_text().splitlines()
    random.Random(1).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(lines))
        recipe = {"corpus": str(corpus), "samples": 4000, "layer": layer, "module": None, "precision": "float32"}
        return build_second_moment(model(short), recipe, Workbench())


def first_ten(inputs: Mapping[str, ArtifactData]) -> list[LaneEdit]:
    """Ten requests in one call of one lane, as the recorded batches."""
    return [LaneEdit(tuple(golden_requests(10)), RandomStreams("memit", {}, 0, 0, 0), inputs)]


def core(short: str, name: str) -> dict[str, Tensor]:
    """Tensors of one deterministic core."""
    return load_file(GOLDEN / "core" / f"{short}_{name}.safetensors")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


FEW, COPIES = 5, 12
STUDENT = MappingProxyType({1: 0.0, FEW: 2.8, COPIES: 2.2})
"""How many standard errors one run more lies from the mean of so many runs at most, 19 times of 20 (Student's t)."""


def rounded_copies(base: BaseModel, count: int) -> list[BaseModel]:
    """The model, and ``count - 1`` copies of it with half of the weights moved to a neighbouring float.

    A record is one float32 run on one processor. Where a long optimisation amplifies rounding, two correct runs differ, too;
    these copies tell by how much.
    """
    copies = [base]
    for seed in range(1, count):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(base.model)
        for parameter in model.parameters():
            chance = torch.rand(parameter.shape, generator=generator)
            toward = torch.full_like(parameter, math.inf) * (chance < 0.25).float().sub(0.5).sign()
            parameter.data = torch.where(chance < 0.5, torch.nextafter(parameter.data, toward), parameter.data)
        copies.append(BaseModel(model, base.tokenizer, base.config).with_encoder(base.encoder))
    return copies


MEMIT_RECORDED: Mapping[str, Any] = {
    "layers": [0, 1],
    "v_num_grad_steps": 15,
    "v_lr": 1.0,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_update_weight": 100.0,
}
"""Recorded hyperparameters of MEMIT, which AlphaEdit's records share."""

MEMIT_YAML = """
alg_name: "{alg}"
model_name: "./hugging_cache/any"
stats_dir: "./data/stats"
device: 0
layers: {layers}
clamp_norm_factor: 0.75
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 0.5
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 20000
rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
attn_module_tmp: "model.layers.{{}}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
"""
"""An EasyEdit file of the family."""


def lane_edits(
    editor: Method[Any, Any],
    groups: Sequence[int],
    T: int,
    position: int,
    inputs: Mapping[str, ArtifactData],
    seed: int = 0,
) -> list[LaneEdit]:
    """Edit ``position`` of every group."""
    requests = golden_requests()
    config = editor.config.model_dump(mode="json")
    return [
        LaneEdit((requests[g * T + position],), RandomStreams(editor.name, config, seed, g * T, position), inputs)
        for g in groups
    ]


def run_groups(
    editor: Method[Any, Any], T: int, groups: int, inputs: Mapping[str, ArtifactData] | None = None, seed: int = 0
) -> tuple[Overlay, list[list[EditOutcome]]]:
    """Edit ``groups`` groups of T requests, one lane each. Outcomes by position, then by lane."""
    overlay = editor.new_overlay(groups)
    outcomes = [
        editor.edit(overlay, lane_edits(editor, range(groups), T, position, inputs or {}, seed))
        for position in range(T)
    ]
    return overlay, outcomes


def final_scores(editor: Method[Any, Any], overlay: Overlay, T: int, groups: int) -> Scores:
    """All requests of all groups, scored on the final state of their group, in file order."""
    requests = golden_requests()
    items = [Item(g, requests[g * T + i]) for g in range(groups) for i in range(T)]
    return score(editor.base, overlay, items, ScoreConfig(generated=False, rows_per_batch=64))


PAIRS = (
    ("rewrite", "rewrite_acc", "reliability_token"),
    ("rephrase", "rephrase_acc", "generalization_token"),
    ("locality", "locality_acc", "locality_token"),
)


def check_scores(runs: Scores | Sequence[Scores], expected: Mapping[str, Any]) -> None:
    """Assert the README's tolerances of methods without randomness.

    ``runs``: one run, or several that differ by rounding alone (:func:`rounded_copies`). Of several, the requests on which
    they agree are compared one by one, and they have to be most of all; the recorded mean has to be one that one run more
    might have.
    """
    several: Sequence[Scores] = [runs] if isinstance(runs[0], dict) else runs  # type: ignore[list-item, assignment]
    n = len(expected["per_request"])
    for per_request, mean_name, column in PAIRS:
        ours = [[float(s[column] or 0) for s in scores] for scores in several]
        theirs = [r[per_request] for r in expected["per_request"]]
        agreed = [i for i in range(n) if all(abs(run[i] - ours[0][i]) <= 1e-6 for run in ours)]
        differing = sum(abs(ours[0][i] - theirs[i]) > 1e-6 for i in agreed)
        means = [sum(run) / n for run in ours]
        error = statistics.stdev(means) * math.sqrt(1 + 1 / len(means)) if len(means) > 1 else 0.0
        bound = 0.05 if expected["T"] == 100 else max(0.02, 1 / n)
        said = (per_request, means, expected[mean_name], f"{differing} of {len(agreed)} of {n} differ")
        assert abs(statistics.mean(means) - expected[mean_name]) <= max(bound, STUDENT[len(means)] * error) + 1e-6, said
        if expected["T"] < 100:
            assert len(agreed) >= 0.6 * n, said
            assert differing <= max(1, 0.05 * n), said


def delta_norms(overlay: Any, lane: int) -> dict[str, float]:
    """Frobenius norm of each changed tensor of one lane, by the recorded names."""
    out = {}
    for site in overlay.sites:
        if hasattr(overlay, "delta"):
            change = overlay.delta(lane, site)
        else:
            change = overlay.weights_LOI[site.name][lane] - site.weight_OI
        out[f"{site.name}.weight"] = float(change.norm())
    return out


def check_norms(overlay: Any, expected: Mapping[str, Any], tolerance: float = 0.1) -> float:
    """Every recorded delta norm within ``tolerance``; returns the largest relative difference."""
    worst = 0.0
    for lane, recorded in enumerate(expected["delta_fro_per_group"]):
        for name, value in delta_norms(overlay, lane).items():
            worst = max(worst, abs(value / recorded[name] - 1))
    assert worst <= tolerance, worst
    return worst
