"""Shared parts of the parity tests: the golden records, a run of recorded groups as lanes, and the
tolerances.

Groups are independent, so all groups of a record run at once, one lane each.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.rounding import rounded_model, rounded_tensors
from tests.small import GOLDEN, golden_model, golden_requests
from workers.artifacts.base import ArtifactData, Workbench
from workers.artifacts.stats import build_second_moment
from workers.job import ScoreConfig
from workers.methods.base import EditOutcome, LaneEdit, Method
from workers.methods.families.locate import inverse_moment
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
def model(short: str, copy: int = 0) -> BaseModel:
    """``llama`` or ``gpt2`` in float32 on one thread, as the records were made, or a rounded copy
    of it."""
    torch.set_num_threads(1)
    return rounded_model(model(short), copy) if copy else golden_model(MODELS[short])


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
def moment(
    short: str, layer: int, copy: int = 0, order: int | None = None, precision: str = "float32"
) -> ArtifactData:
    """The second moment of the lines that the records used: 4000 random ones, drawn by the standard
    generator with seed 1.

    A rounded copy of the model has its own, and adds the lines up in an order of its own (``order``
    sets another): the rounding of a sum of floats depends on both, and the inverse of the moment
    amplifies it.
    """
    order = copy if order is None else order
    lines = (GOLDEN / "corpus.txt").read_text().splitlines()
    random.Random(1).shuffle(lines)
    lines = lines[:4000]
    if order:
        random.Random(1 + order).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(lines))
        recipe = {
            "corpus": str(corpus),
            "samples": 4000,
            "layer": layer,
            "module": None,
            "precision": precision,
        }
        return build_second_moment(model(short, copy), recipe, Workbench())


def inverse(short: str, copy: int = 0, own: bool = False) -> Tensor:
    """The recorded inverse second moment of layer 0 that ROME's records used. A rounded copy has
    that of its own statistics, and the model itself has it too where ``own`` statistics are asked
    for."""
    if copy or own:
        return inverse_moment(moment(short, 0, copy).tensors["moment"])
    return core(short, "rome_req0")["inv_cov"]


def first_ten(inputs: Mapping[str, ArtifactData]) -> list[LaneEdit]:
    """Ten requests in one call of one lane, as the recorded batches."""
    return [LaneEdit(tuple(golden_requests(10)), RandomStreams("memit", {}, 0, 0, 0), inputs)]


def core(short: str, name: str, copy: int = 0) -> dict[str, Tensor]:
    """Tensors of one deterministic core, or a rounded copy of them."""
    return rounded_tensors(load_file(GOLDEN / "core" / f"{short}_{name}.safetensors"), copy)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


FEW, COPIES = 5, 12
"""Rounded copies (the model itself is one of them) that are run where rounding matters, and that
``make test-long`` runs."""

STUDENT = MappingProxyType({1: 0.0, 3: 4.3, 4: 3.2, FEW: 2.8, 8: 2.4, COPIES: 2.2, 20: 2.1})
"""The standard errors that one run more lies from the mean of so many runs at most, 19 times of 20
(Student's t)."""

NORMAL = 2.6
"""The same where the standard deviation is known, 99 times of 100."""


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
        LaneEdit(
            (requests[g * T + position],), RandomStreams(editor.name, config, seed, g * T, position), inputs
        )
        for g in groups
    ]


def run_groups(
    editor: Method[Any, Any],
    T: int,
    groups: int,
    inputs: Mapping[str, ArtifactData] | None = None,
    seed: int = 0,
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


@dataclass(frozen=True)
class Run:
    """The result of a record's edits on one copy of the model: scores by request, and norms of the
    changes by group."""

    scores: Scores
    norms: Sequence[Mapping[str, float]] = ()


def check_record(
    expected: Mapping[str, Any],
    replay: Callable[[int], tuple[Method[Any], Overlay]],
    norms: float | None = 1e-2,
    copies: int = 1,
) -> None:
    """Assert that a record is one of the results that a correct run may have, on this processor.

    ``replay(copy)`` makes the record's edits with rounded copy ``copy`` of the model and of its
    statistics. ``norms`` is the relative tolerance of the changes' norms (None: not compared). See
    :func:`check_runs` for ``copies``.
    """

    def run(copy: int) -> Run:
        editor, overlay = replay(copy)
        T, groups = expected["T"], expected["n_groups"]
        changes = [] if norms is None else [delta_norms(overlay, lane) for lane in range(groups)]
        return Run(final_scores(editor, overlay, T, groups), changes)

    check_runs(expected, run, norms, copies)


def check_runs(
    expected: Mapping[str, Any], run: Callable[[int], Run], norms: float | None = None, copies: int = 1
) -> None:
    """Assert the tolerances of methods without randomness, of one run or of several that differ by
    rounding alone.

    Where one run leaves them, rounded copies tell whether rounding alone can explain it: long
    optimisations and singular statistics amplify it, and an answer changes where two tokens are
    nearly as likely. ``copies``: how many to run in any case.
    """
    runs = [run(copy) for copy in range(copies)]
    misfit = _misfit(runs, expected, norms)
    if misfit and len(runs) < FEW:
        warnings.warn(f"one run is not enough, {FEW} rounded copies decide: {misfit}", stacklevel=3)
        runs += [run(copy) for copy in range(len(runs), FEW)]
        misfit = _misfit(runs, expected, norms)
    assert not misfit, misfit


def check_scores(runs: Scores | Sequence[Scores], expected: Mapping[str, Any]) -> None:
    """Assert the tolerances of scores for one run, or for several that differ by rounding alone."""
    several: Sequence[Scores] = [runs] if isinstance(runs[0], dict) else runs  # type: ignore[list-item, assignment]
    misfit = _misfit([Run(scores) for scores in several], expected, None)
    assert not misfit, misfit


def check_seeds(values: Sequence[float], recorded: float, name: str, scatter: float = 0.018) -> None:
    """Assert that a recorded mean of a method with randomness is one that one seed more might give.

    ``scatter``: the standard deviation that many seeds have at least. A few may happen to be more
    alike, and which ones are depends on the processor.
    """
    error = max(STUDENT[len(values)] * statistics.stdev(values), NORMAL * scatter)
    bound = error * math.sqrt(1 + 1 / len(values)) + 1e-6
    assert abs(statistics.mean(values) - recorded) <= bound, (name, values, recorded)


def _misfit(runs: Sequence[Run], expected: Mapping[str, Any], norms: float | None) -> str:
    """Return the first tolerance that the runs leave, in words; empty if none.

    Requests on which all runs agree are compared one by one, and they have to be most of all; the
    recorded mean has to be one that one run more might have, or lie between those of the runs.
    """
    n = len(expected["per_request"])
    for per_request, mean_name, column in PAIRS:
        ours = [[float(s[column] or 0) for s in run.scores] for run in runs]
        theirs = [r[per_request] for r in expected["per_request"]]
        agreed = [i for i in range(n) if all(abs(values[i] - ours[0][i]) <= 1e-6 for values in ours)]
        differing = sum(abs(ours[0][i] - theirs[i]) > 1e-6 for i in agreed)
        means = [sum(values) / n for values in ours]
        error = statistics.stdev(means) * math.sqrt(1 + 1 / len(means)) if len(means) > 1 else 0.0
        bound = max(0.05 if expected["T"] == 100 else max(0.02, 1 / n), STUDENT[len(means)] * error) + 1e-6
        recorded = expected[mean_name]
        good = abs(statistics.mean(means) - recorded) <= bound or min(means) <= recorded <= max(means)
        if expected["T"] < 100:
            good = good and len(agreed) >= 0.6 * n and differing <= max(1, 0.05 * n)
        if not good:
            return (
                f"{per_request}: means {means}, recorded {expected[mean_name]}, tolerance {bound:.3g}; "
                f"of {n} requests the runs agree on {len(agreed)}, of which {differing} differ from the "
                f"record"
            )
    if norms is not None:
        apart = norms_apart(runs[0].norms, expected["delta_fro_per_group"])
        spread = max((norms_apart(run.norms, runs[0].norms) for run in runs[1:]), default=0.0)
        if apart > max(norms, 2 * spread):
            return f"norms: {apart:.3g} from the record, {spread:.3g} between copies, tolerance {norms}"
    return ""


def norms_apart(found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> float:
    """The largest relative difference between norms."""
    return max(
        abs(value / other[name] - 1)
        for norms, other in zip(found, expected, strict=True)
        for name, value in norms.items()
    )


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
