"""PMET against the recorded numbers, its search for two vectors, and the hyperparameter files of EasyEdit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.common import check_norms, check_scores, final_scores, lane_edits, model, record, relative_error, run_groups
from tests.parity.test_emmet import moment
from workers.artifacts import ArtifactData
from workers.locate import Facts, facts_of
from workers.methods import load_config
from workers.methods.pmet import PMET, PMETConfig, _AtLayer
from workers.models import ModelConfig
from workers.types import SpecError

RECORDED = {
    "layers": [0, 1],
    "v_num_grad_steps": 15,
    "v_lr": 1.0,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 10,
    "kl_factor": 0.0625,
    "mom2_update_weight": 100.0,
    "public_target": True,
}


def prepared(**changes: Any) -> PMET:
    config = PMETConfig.model_validate({**RECORDED, **changes})
    texts = record("llama", "PMET-rightpad", 1)["context_templates"]
    inputs = {
        "templates": ArtifactData(meta={"templates": [text for kind in texts for text in kind]}),
        **{f"moment.{layer}": moment(layer) for layer in config.layers},
    }
    return PMET.prepare(model("llama"), config, inputs)


@pytest.mark.parametrize("T", [1, 10])
def test_scores(T: int) -> None:
    expected = record("llama", "PMET-rightpad", T)
    editor = prepared()
    overlay, _ = run_groups(editor, T, expected["n_groups"])
    print(T, check_norms(overlay, expected, 9))
    check_scores(final_scores(editor, overlay, T, expected["n_groups"]), expected)
