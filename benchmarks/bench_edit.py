"""Seconds per edit: a plain loop of the field against replay, lanes and both.

    python benchmarks/bench_edit.py [--quick] [--models embedded llama-60m gpt2-124m] [--methods ft rome grace wise]

(a) the plain loop of benchmarks/reference.py, (b) replay with one lane, (c) lanes without replay,
(d) both; ``--quick`` leaves out (b) and (c) at T=1, and GPT-2. Each figure is the median over
rounds in which (a) to (d) take turns, each on the same requests, one torch thread; a ratio is the
median of the rounds' own ratios. Both sides are checked to end with the same change. Edited layers
are those of the golden records on the embedded model, and the depth published for LLaMA-2-7B
elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from common import LOG, Report, alternate, median_ratio, parser
from reference import LOOPS, Loop, agrees
from transformers import AutoConfig

from workers.data.tinyworld import load_dataset
from workers.folders import build_model
from workers.methods import get_method
from workers.methods.base import ArtifactContext, LaneEdit, Method
from workers.model.base import BaseModel, Site
from workers.model.config import ModelConfig, ModelFingerprint
from workers.model.overlay import Overlay
from workers.model.replay import capture
from workers.rng import RandomStreams
from workers.session import Session, build_inputs, with_kernels
from workers.types import EditRequest

GOLDEN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ft": {"layers": [3], "objective": "prompt_last", "num_steps": 25, "lr": 1e-3},
        "rome": {
            "layer": 0,
            "v_num_grad_steps": 15,
            "v_lr": 1.0,
            "clamp_norm_factor": 10,
            "context_template_length_params": [[5, 5], [10, 5]],
            "corpus": "embedded",
            "samples": 2000,
        },
        "grace": {"layer": 4, "lr": 1.0, "n_iter": 25, "eps": 2.0},
        "wise": {
            "layer": 4,
            "lr": 0.3,
            "n_iter": 20,
            "alpha": 0.2,
            "beta": 0.8,
            "gamma": 0.4,
            "context_template_length_params": [[5, 5], [10, 5]],
        },
    }
)
"""Hyperparameters of the golden records."""

DEPTH: Mapping[str, float] = MappingProxyType(
    {"ft": 21 / 32, "rome": 5 / 32, "grace": 27 / 32, "wise": 27 / 32}
)
"""Published layer of LLaMA-2-7B as a share of the model's depth."""

TITLES = {"ft": "FT-L", "rome": "ROME", "grace": "GRACE", "wise": "WISE"}
GOALS = {
    ("embedded", "ft"): 8.0,
    ("embedded", "wise"): 5.0,
    ("embedded", "grace"): 8.0,
    ("embedded", "rome"): 3.5,
    ("llama-60m", "ft"): 4.0,
    ("llama-60m", "wise"): 3.0,
}
LANES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "embedded": {"ft": 50, "grace": 50, "rome": 8, "wise": 12},
        "llama-60m": {"ft": 16, "grace": 25, "rome": 4, "wise": 4},
        "gpt2-124m": {"ft": 8, "grace": 25, "rome": 4, "wise": 4},
    }
)
"""Lanes in lockstep: many where an edit is one short row, few where it is a dozen rows of a larger
model."""


def model(name: str) -> BaseModel:
    """The embedded model, or random weights of a larger shape with the embedded tokenizer."""
    embedded = Session.open(ModelConfig(device="cpu")).base
    if name == "embedded":
        return embedded
    if name == "llama-60m":
        sizes = {
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
        }
        config = AutoConfig.for_model("llama", vocab_size=8192, max_position_embeddings=256, **sizes)
    else:
        config = AutoConfig.for_model("gpt2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = build_model("causal", config)
    return with_kernels(BaseModel(made, embedded.tokenizer, ModelConfig(name=name, device="cpu")))


def config_of(base: BaseModel, name: str, method: str) -> Any:
    values = dict(GOLDEN[method])
    if name != "embedded":
        layer = int(DEPTH[method] * len(base.layers))
        values |= {"layers": [layer]} if method == "ft" else {"layer": layer}
    return get_method(method).Config.model_validate(values)


@contextmanager
def without_replay() -> Iterator[None]:
    """Inside, every step runs all layers, rows and columns: a full forward but for the
    embedding."""
    from_the_first = lambda base, rows, _: capture(base, rows, 0)  # noqa: E731
    with (
        patch("workers.inner_loop.suffix.capture", from_the_first),
        patch.object(Site, "is_mlp_output", lambda *_: False),
    ):
        yield


@dataclass
class Bench:
    """One method on one model."""

    base: BaseModel
    editor: Method[Any, Any]
    loop: Loop
    requests: list[EditRequest]

    def draws(self, first: int, position: int) -> RandomStreams:
        return RandomStreams(self.editor.name, self.editor.config.model_dump(mode="json"), 0, first, position)

    def lanes(self, T: int, groups: list[int], whole: bool) -> Callable[[], Overlay]:
        """Edit ``groups`` in lockstep, T edits each."""

        def run() -> Overlay:
            overlay = self.editor.new_overlay(len(groups))
            for position in range(T):
                edits = [
                    LaneEdit(
                        (self.requests[g * T + position],), self.draws(g * T, position), self.editor.inputs
                    )
                    for g in groups
                ]
                with without_replay() if whole else nullcontext():
                    self.editor.edit(overlay, edits)
            return overlay

        return run

    def one_by_one(self, T: int, groups: list[int], whole: bool) -> Callable[[], None]:
        runs = [self.lanes(T, [g], whole) for g in groups]

        def run() -> None:
            for group in runs:
                group()

        return run

    def plain(self, T: int, groups: list[int]) -> Callable[[], None]:
        def run() -> None:
            for g in groups:
                for position in range(T):
                    self.loop.edit(self.requests[g * T + position], self.draws(g * T, position))
                self.loop.restore()

        return run

    def difference(self) -> float:
        """How far both sides end from each other after one edit."""
        overlay: Any = self.lanes(1, [0], whole=False)()
        self.loop.edit(self.requests[0], self.draws(0, 0))
        expected = self.loop.delta()
        self.loop.restore()
        if hasattr(overlay, "values_LJO"):
            found = overlay.values_LJO[0, :1]
        elif hasattr(overlay, "delta"):
            found = overlay.delta(0)
        elif hasattr(overlay, "delta_LOI"):
            found = overlay.delta_LOI[0]
        else:
            site = overlay.sites[0]
            found = overlay.weights_LOI[site.name][0] - site.weight_OI
        return agrees(found, expected)


def attainable_gain(bench: Bench) -> float:
    """What replay with one lane gains if time is the layers that are run.

    (all layers forward + 2 x suffix layers backward + head) / (suffix forward + 2 x suffix backward
    + head where scored), in multiply-adds of one token; the head runs at every position in the
    plain loop.
    """
    base, overlay = bench.base, bench.editor.new_overlay(1)
    layers, suffix = len(base.layers), len(base.layers) - overlay.first_layer
    per_layer = sum(p.numel() for p in base.layers[0].parameters() if p.dim() > 1)
    pair = base.encoder.pair(bench.requests[0].prompt, bench.requests[0].target_new)
    head = base.vocab * base.hidden
    plain = layers * per_layer + 2 * suffix * per_layer + head
    ours = suffix * per_layer + 2 * suffix * per_layer + head * len(pair.target) / len(pair.ids)
    return plain / ours


def measure(name: str, base: BaseModel, method: str, size: Size, report: Report) -> None:
    config = config_of(base, name, method)
    kind = get_method(method)
    specs = config.artifacts(ArtifactContext(ModelFingerprint(name, "embedded"), base.config, 0))
    inputs = build_inputs(base, specs)
    requests = list(load_dataset("tune").requests)
    bench = Bench(base, kind.prepare(base, config, inputs), LOOPS[method](base, config, inputs), requests)
    layer = bench.editor.new_overlay(1).first_layer
    title = f"{TITLES[method]} layer {layer} of {len(base.layers)}, {name}"
    LOG.info("%s: both sides' change differs by %.1e", title, bench.difference())
    for T in size.Ts:
        groups = list(range(min(size.lanes or LANES[name][method], len(requests) // T)))
        some = groups[: size.plain] if T == 1 else groups[:1]
        lanes, both = f"{len(groups)} lanes", f"replay and {len(groups)} lanes"
        runs: dict[str, tuple[Callable[[], object], int]] = {"plain": (bench.plain(T, some), len(some) * T)}
        if size.apart:
            runs["replay"] = bench.one_by_one(T, some, whole=False), len(some) * T
            runs[lanes] = bench.lanes(T, groups, whole=True), len(groups) * T
        runs[both] = bench.lanes(T, groups, whole=False), len(groups) * T
        found = per_edit(runs, size.rounds if T == 1 else 1)
        gain = {key: median_ratio(found["plain"], values) for key, values in found.items()}
        told = [
            f"{key} {1e3 * statistics.median(values):.1f} ({gain[key]:.1f}x)" for key, values in found.items()
        ]
        LOG.info("%s, T=%d: ms/edit %s", title, T, ", ".join(told))
        if T == 1 and (name, method) in GOALS:
            report.at_least(
                f"{title}, T=1: {both} against the plain loop", gain[both], GOALS[name, method], "x"
            )
    length = size.long
    found = per_edit(
        {
            "plain": (bench.plain(length, [0]), length),
            "replay": (bench.lanes(length, [0], whole=False), length),
        },
        size.rounds,
    )
    gain_one = median_ratio(found["plain"], found["replay"])
    attainable = attainable_gain(bench)
    LOG.info(
        "%s, one group of %d, one lane: ms/edit plain %.1f, replay %.1f (%.2fx; the layer count allows "
        "%.2fx)",
        *(title, length, 1e3 * statistics.median(found["plain"]), 1e3 * statistics.median(found["replay"])),
        *(gain_one, attainable),
    )
    what = f"{title}, one group of {length}, one lane: share of the {attainable:.2f}x the layer count allows"
    report.at_least(what, 100 * gain_one / attainable, 80, "%")


def per_edit(runs: Mapping[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds per edit of each run, round by round. A single round, for what takes seconds, has no
    warm-up: the comparison of both sides' change has run them once."""
    seconds = alternate({name: run for name, (run, _) in runs.items()}, rounds, warm_up=min(1, rounds - 1))
    return {name: [value / runs[name][1] for value in values] for name, values in seconds.items()}


@dataclass(frozen=True)
class Size:
    """How much is measured: lengths of groups, rounds, requests of the plain loop, the long group,
    lanes (0: the model's usual), and whether replay and lanes are measured apart, too."""

    Ts: tuple[int, ...]
    rounds: int
    plain: int
    long: int
    lanes: int = 0
    apart: bool = True


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--models", nargs="*", choices=sorted(LANES), default=["embedded", "llama-60m", "gpt2-124m"]
    )
    made.add_argument("--methods", nargs="*", choices=sorted(LOOPS), default=sorted(LOOPS))
    args = made.parse_args()
    report = Report("bench_edit", args)
    size = Size(Ts=(1, 10), rounds=5, plain=8, long=50)
    models = args.models
    if args.quick:
        size = Size(Ts=(1,), rounds=3, plain=2, long=3, apart=False)
        models = [name for name in models if name != "gpt2-124m"]
    if args.smoke:
        size, models = Size(Ts=(1,), rounds=1, plain=1, long=2, lanes=2), ["embedded"]
    for name in models:
        base = model(name)
        for method in args.methods:
            if args.quick and name != "embedded" and (name, method) not in GOALS:
                continue  # the larger models take minutes a method
            small = args.quick and name != "embedded"
            measure(name, base, method, replace(size, rounds=1, plain=1, long=2) if small else size, report)
    report.close()


if __name__ == "__main__":
    main()
