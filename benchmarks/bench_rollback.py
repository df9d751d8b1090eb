"""From the end of one group to readiness for the next edit, against copying the model's state dict.

    python benchmarks/bench_rollback.py

Ours is all that lies between the last score of a wave and the first forward of the next: the old
overlay is dropped (it holds an edit), a pristine one made, and for every lane a generator derived
and, for WISE, a mask drawn. Ten lanes, so ten groups are rolled back at once; the field's way,
``copy.deepcopy(model.state_dict())`` before a group and ``load_state_dict`` after it, rolls back
one group and is not multiplied by ten.

Two series of Llama-shaped models with random weights:

- the model grows from 2 M (the embedded one) to 350 M parameters by more layers and a larger
  vocabulary; the edited map, an MLP output projection of 128 x 512, stays the same. Seconds must
  not grow;
- the edited map grows, and the six layers with it. Seconds may grow with it, and this says how.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import LOG, Report, alternate, median_ratio, parser
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from workers.artifacts.base import ArtifactData
from workers.data import load_dataset
from workers.folders import build_model
from workers.methods import get_method, load_config
from workers.methods.base import LaneEdit, Method
from workers.model.base import BaseModel
from workers.model.config import ModelConfig
from workers.rng import RandomStreams
from workers.session import with_kernels

LAYER = {"ft": 3, "rome": 0, "grace": 4, "wise": 4}
"""Where each method edits: as in the recorded reference numbers of the embedded geometry."""
LANES = 10
SHORT: dict[str, dict[str, Any]] = {
    "ft": {"num_steps": 1},
    "rome": {"v_num_grad_steps": 2, "mom2_adjustment": False},
    "grace": {"n_iter": 1},
    "wise": {"n_iter": 1},
}
"""One optimisation step: what an overlay holds does not depend on how many there were."""


@dataclass(frozen=True)
class Size:
    """Geometry of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int


SAME_MAP = (Size(128, 512, 6, 1500), Size(128, 512, 48, 70_000), Size(128, 512, 320, 1_040_000))
LARGER_MAP = (
    Size(128, 512, 6, 1500),
    Size(256, 1024, 6, 1500),
    Size(512, 2048, 6, 1500),
    Size(1024, 4096, 6, 1500),
)


def model_of(size: Size, embedded: BaseModel) -> BaseModel:
    """Random weights with the embedded model's tokenizer."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=size.vocab,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    model = build_model("causal", config)
    return with_kernels(BaseModel(model, embedded.tokenizer, ModelConfig(name="random", device="cpu")))


def parameters(base: BaseModel) -> int:
    return sum(p.numel() for p in base.model.parameters())


def ours(base: BaseModel, name: str) -> Callable[[], object]:
    """One rollback of ``LANES`` edited lanes, up to where the next edit would run its first
    forward."""
    where: dict[str, Any] = {"layers": [LAYER[name]]} if name == "ft" else {"layer": LAYER[name]}
    hparams = {**SHORT[name], **where}
    config = load_config(name, hparams, None, ModelConfig(name="embedded", device="cpu"))
    inputs = {"templates": ArtifactData(meta={"templates": ["{}", "The. {}"]})}
    method: Method[Any, Any] = get_method(name).prepare(base, config, inputs)
    requests = load_dataset("tinyworld").requests
    plain = config.model_dump(mode="json")

    def edits(first: int) -> list[LaneEdit]:
        return [
            LaneEdit((requests[lane],), RandomStreams(name, plain, 0, first + lane, 0), inputs)
            for lane in range(LANES)
        ]

    held = [method.new_overlay(LANES)]
    method.edit(held[0], edits(0))
    edited = [held[0].state(lane) for lane in range(LANES)]

    def rollback() -> float:
        for lane, state in enumerate(edited):  # not timed: the group that is rolled back had made an edit
            held[0].load_state(lane, state)
        began = time.perf_counter()
        held.clear()
        overlay = method.new_overlay(LANES)
        held.append(overlay)
        for lane, edit in enumerate(edits(LANES)):
            edit.streams.generator("edit")
            if name == "wise":
                overlay.begin(lane, method.draw_mask(edit))  # type: ignore[attr-defined]
        return time.perf_counter() - began

    return rollback


def deep_copy(base: BaseModel) -> Callable[[], object]:
    """What the field does around each group: keep a copy of every weight, and write it back."""

    def rollback() -> None:
        kept = copy.deepcopy(base.model.state_dict())
        base.model.load_state_dict(kept)

    return rollback


def measure(
    sizes: list[BaseModel], repeats: int, copies: int, label: Callable[[BaseModel], str]
) -> dict[str, Any]:
    """Seconds per method and size, the sizes taking turns; the field's copies beside them."""
    found: dict[str, Any] = {}
    gc.collect()
    for name in LAYER:
        found[name] = alternate({label(base): ours(base, name) for base in sizes}, repeats, warm_up=3)
    found["deepcopy"] = alternate({label(base): deep_copy(base) for base in sizes}, copies)
    for name in (*LAYER, "deepcopy"):
        cells = "  ".join(f"{size}: {1000 * statistics.median(s):8.2f} ms" for size, s in found[name].items())
        LOG.info("%-9s %s", name, cells)
    return found


def main() -> None:
    args = parser(__doc__).parse_args()
    report = Report("bench_rollback", args)
    disable_progress_bar()
    repeats, copies = (3, 1) if args.smoke else (15, 3) if args.quick else (41, 7)
    embedded = BaseModel.load(ModelConfig(device="cpu"))
    larger = SAME_MAP[1:2] if args.smoke else SAME_MAP[1:]
    same = [embedded, *(model_of(size, embedded) for size in larger)]

    def by_parameters(base: BaseModel) -> str:
        return f"{parameters(base) / 1e6:.0f} M"

    LOG.info("edited map 128 x 512 (MLP output), %d lanes; the model grows:", LANES)
    found = measure(same, repeats, copies, by_parameters)
    small, large = by_parameters(same[0]), by_parameters(same[-1])
    for name, layer in LAYER.items():
        seconds, copied = found[name], statistics.median(found["deepcopy"][large])
        growth = median_ratio(seconds[large], seconds[small])
        factor = copied / statistics.median(seconds[large])
        report.at_most(
            f"rollback of {name}, MLP output 128x512 of layer {layer}: {large} parameters against {small}",
            growth,
            1.3,
            "x",
            f"{1000 * statistics.median(seconds[large]):.2f} ms for {LANES} lanes; copying the state dict: "
            f"{1000 * copied:.0f} ms for one group, {factor:,.0f} x",
        )
    del same[1:]
    LOG.info("\nthe edited map grows (six layers):")

    def by_map(base: BaseModel) -> str:
        out, in_features = base.site(0).shape
        return f"{out}x{in_features}"

    grown = [model_of(size, embedded) for size in (LARGER_MAP[:2] if args.smoke else LARGER_MAP)]
    found = measure(grown, repeats, copies, by_map)
    first, last = by_map(grown[0]), by_map(grown[-1])
    values = (base.site(0).weight_OI.numel() for base in (grown[-1], grown[0]))
    LOG.info(
        "\nvalues of the edited map %s against %s: x %.0f; seconds:", last, first, next(values) / next(values)
    )
    for name in LAYER:
        LOG.info("%-9s x %.1f", name, median_ratio(found[name][last], found[name][first]))
    report.close()


if __name__ == "__main__":
    main()
