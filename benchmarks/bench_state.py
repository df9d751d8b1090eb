"""Seconds per edit for checking a lane's state and counting its bytes, as the state grows.

    python benchmarks/bench_state.py

After every edit a stream checks that the lane's numbers are finite, and with every row it writes
the size of its snapshot. The states of some methods grow with each edit (codebooks, blocks, saved
memories). Only what the edit changed is checked, and sizes are counted without copies, so
neither may take longer in a large state. Beside it, in the same round: the same from a snapshot,
a copy of the whole state.

A Llama model with random weights, width 256; edits of one optimisation step.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import LOG, Report, parser
from transformers import AutoConfig, AutoModelForCausalLM

from workers.artifacts.base import ArtifactData
from workers.data import load_dataset
from workers.methods import get_method, load_config
from workers.methods.base import LaneEdit
from workers.model.base import BaseModel
from workers.model.config import ModelConfig
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.types import EditRequest

HPARAMS: dict[str, dict[str, Any]] = {
    "grace": {"layer": 4, "n_iter": 1, "eps": 1e-3},
    "melo": {"key_layer": 3, "layers": [4, 5], "radius": 1e-3, "num_iter": 1},
    "wise": {"layer": 4, "n_iter": 1, "retrieve": True, "save_freq": 5, "merge_freq": 10},
}
GROWTH = 2.0
"""A state that holds tenfold: what is left is timer noise and the tensors' count."""


@dataclass
class Found:
    """Seconds of some edits: ``ours``, and from a snapshot."""

    ours: list[float]
    copied: list[float]
    size: int = 0


def from_snapshot(overlay: Overlay) -> tuple[bool, int]:
    tensors = overlay.state(0).tensors.values()
    finite = all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
    return finite, sum(t.numel() * t.element_size() for t in overlay.state(0).tensors.values())


def measure(base: BaseModel, name: str, requests: list[EditRequest], last: int) -> dict[str, Found]:
    config = load_config(name, HPARAMS[name], None, ModelConfig(name="embedded", device="cpu"))
    inputs = {"templates": ArtifactData(meta={"templates": ["{}", "The. {}"]})}
    method: Any = get_method(name).prepare(base, config, inputs)
    overlay, plain = method.new_overlay(1), config.model_dump(mode="json")
    found = {"small": Found([], []), "large": Found([], [])}
    for position, request in enumerate(requests):
        method.edit(overlay, [LaneEdit((request,), RandomStreams(name, plain, 0, 0, position), inputs)])
        began = time.perf_counter()
        finite, size = overlay.finite(0), overlay.lane_bytes(0)
        ours = time.perf_counter() - began
        which = (
            "small" if last <= position < 2 * last else "large" if position >= len(requests) - last else ""
        )
        if which:
            began = time.perf_counter()
            assert from_snapshot(overlay) == (finite, size)
            found[which].copied.append(time.perf_counter() - began)
            found[which].ours.append(ours)
            found[which].size = size
    return found


def main() -> None:
    args = parser(__doc__).parse_args()
    report = Report("bench_state", args)
    edits, last = (40, 4) if args.smoke else (200, 10) if args.quick else (400, 20)
    embedded = BaseModel.load(ModelConfig(device="cpu"))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1500,
        max_position_embeddings=128,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    base = BaseModel(
        AutoModelForCausalLM.from_config(config), embedded.tokenizer, ModelConfig(name="random", device="cpu")
    )
    requests = list(load_dataset("tinyworld").requests[:edits])
    for name in HPARAMS:
        found = measure(base, name, requests, last)
        small, large = found["small"], found["large"]
        ours, copied = statistics.median(large.ours), statistics.median(large.copied)
        LOG.info("%-6s %.1f MiB -> %.1f MiB", name, small.size / 2**20, large.size / 2**20)
        report.at_most(
            f"checking and counting the state of {name}: {edits} edits against {2 * last}",
            ours / statistics.median(small.ours),
            GROWTH,
            "x",
            f"{1000 * ours:.2f} ms an edit; from a snapshot {1000 * copied:.2f} ms",
        )
    report.close()


if __name__ == "__main__":
    main()
