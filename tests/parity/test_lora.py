"""LoRA against the recorded numbers, and the hyperparameter files of EasyEdit."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import PAIRS, final_scores, lane_edits, model, record, run_groups
from workers.methods import load_config
from workers.methods.lora import LoRA, LoRAConfig
from workers.models import ModelConfig, model_shape
from workers.types import SpecError

SEEDS = 8
ELSEWHERE = ModelConfig(name="some/other-model")


def prepared(short: str = "llama", **changes: Any) -> LoRA:
    values = {
        "target_modules": ("q_proj", "v_proj"),
        "rank": 8,
        "lora_alpha": 32,
        "num_steps": 30,
        "lr": 5e-3,
        **changes,
    }
    return LoRA.prepare(model(short), LoRAConfig.model_validate(values), {})


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 10])
def test_scores(T: int) -> None:
    expected = record("llama", "LoRA", T)
    assert expected["hparams"]["target_modules"] == ["q_proj", "v_proj"] and expected["hparams"]["lora_dropout"] == 0
    editor, groups = prepared(), expected["n_groups"]
    means: dict[str, list[float]] = {column: [] for _, _, column in PAIRS}
    for seed in range(SEEDS):
        overlay, _ = run_groups(editor, T, groups, seed=seed)
        scores = final_scores(editor, overlay, T, groups)
        for column, found in means.items():
            found.append(statistics.mean(float(s[column] or 0) for s in scores))
    for _, mean_name, column in PAIRS:
        error = statistics.stdev(means[column]) * math.sqrt(1 + 1 / SEEDS)
        said = (column, means[column], expected[mean_name])
        assert abs(statistics.mean(means[column]) - expected[mean_name]) <= max(0.05, 2 * error) + 1e-6, said
