"""LLaMA-2-7B's geometry in random bfloat16 weights on one GPU: how near each method comes to what the device allows.

    python benchmarks/bench_gpu.py                      # minutes; needs no Ray, no download
    python benchmarks/bench_gpu.py --device cpu --tiny  # checks the code; its figures mean nothing

Without a GPU it says so and ends well. Layers and hyperparameters are the published ones for this model; weights are
random, so what an edit achieves means nothing, only what it costs. ROME runs without the second moment (one more
product per edit). Per method and number of lanes:

- T=1: a fresh overlay and one edit of every lane, masks and generators included;
- in a group: one more edit of the same overlay (the second edit of a T=10 group);
- scoring: every probe of a request, teacher forced, edited and base model, nothing cached.

**The floor** of an edit is ``max(bytes / bandwidth, operations / rate)`` of what replaying whole layers cannot leave
out, with bandwidth and rates measured here first. It counts, for one pass over the whole model (capture) and for every
optimisation step that ran: the weights of the layers from the edited one on and of the head, read once forward and,
above the edited layer, once backward; two operations per weight and token forward, two backward for what lies above
the edited map, two for the gradient of a trained weight; the head at the positions that are scored (float32, as scores
are); and for trained weights the least passes over float32 master, gradient, moments and mask. Attention itself, norms,
activations and the host are left out: real time lies above the floor. Tokens count as they were run, padding included.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import LOG, Report, clock, parser
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from workers.artifacts import ArtifactData
from workers.data import load_dataset
from workers.job import ScoreConfig
from workers.methods import get_method, method_names
from workers.methods.base import LaneEdit, Method
from workers.models import BaseModel, ModelConfig
from workers.overlay import Overlay
from workers.rng import Draws
from workers.scoring import Item, score
from workers.types import EditRequest

METHODS = ("wise", "grace", "ft", "rome", "memit")
"""What is measured, if the registry has it and its settings stand below."""

HPARAMS: dict[str, dict[str, Any]] = {
    "wise": {"layer": 27, "n_iter": 70, "lr": 1.0, "mask_ratio": 0.2},
    "grace": {"layer": 27, "n_iter": 50, "lr": 1.0},
    "ft": {"layers": [21], "objective": "prompt_last", "num_steps": 25, "lr": 5e-4, "norm_constraint": 5e-5},
    "rome": {"layer": 5, "v_num_grad_steps": 25, "v_lr": 0.5, "mom2_adjustment": False},
}
TINY: dict[str, dict[str, Any]] = {
    "wise": {"layer": 2, "n_iter": 2},
    "grace": {"layer": 2, "n_iter": 2},
    "ft": {"layers": [1], "num_steps": 2},
    "rome": {"layer": 1, "v_num_grad_steps": 3},
}
LABELS = {"ft": "FT-L"}
JUDGED = ("wise", "ft")
"""Methods with a target against the floor."""

TRAINED_BYTES = {
    # weight read forward, gradient written; Adam reads gradient, weight and two moments and writes three of them
    "ft": 4 + 4 + 7 * 4,
    # ... SGD reads gradient, weight and mask (a byte) and writes the weight
    "wise": 4 + 4 + 3 * 4 + 1,
}
"""Least bytes per value of a trained matrix, per lane and optimisation step; other methods train vectors."""

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Device:
    """What the device attains: bytes per second of a copy or a sum, operations per second of matrix products."""

    bandwidth: float
    rate: float
    rate_float32: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Device:
        big = device.type == "cuda"
        source = torch.ones((1 << 29) if big else (1 << 21), device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / _best(partial(target.copy_, source), device)
        read = source.nbytes / _best(source.sum, device)
        rates = []
        for kind, size in ((dtype, 8192 if big else 256), (torch.float32, 4096 if big else 256)):
            a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
            rates.append(2 * size**3 / _best(partial(torch.matmul, a, b), device))
        return cls(max(copied, read), *rates)


@dataclass
class Work:
    """What one call of ``edit`` ran, counted from outside: tokens of every pass, positions of every head."""

    passes: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    steps: int = 0
    """Optimisation steps of the lane that made most."""
    lane_steps: int = 0
    """Of all lanes together."""

    @contextmanager
    def counted(self, base: BaseModel) -> Iterator[None]:
        """Inside, every pass through the last layer and every call of the head is noted."""
        head = base.logits

        def logits(hidden: Tensor) -> Tensor:
            self.positions.append(hidden[..., 0].numel())
            return head(hidden)

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.passes.append(hidden.shape[0] * hidden.shape[1])

        handle = base.layers[-1].register_forward_pre_hook(note, with_kwargs=True)
        base.logits = logits  # type: ignore[method-assign]
        try:
            yield
        finally:
            handle.remove()
            del base.logits


@dataclass(frozen=True)
class Floor:
    """Bytes and operations that must be spent; those of the head apart, they run in float32."""

    bytes: float
    operations: float
    head_operations: float

    def seconds(self, device: Device) -> float:
        return max(
            self.bytes / device.bandwidth,
            self.operations / device.rate + self.head_operations / device.rate_float32,
        )

    @classmethod
    def of_edit(cls, base: BaseModel, name: str, overlay: Overlay, work: Work) -> Floor:
        layer = sum(p.numel() for p in base.layers[0].parameters())
        head = base.head_module.weight.numel()
        width = base.head_module.weight.element_size()
        above = (len(base.layers) - 1 - overlay.first_layer) * layer
        suffix = above + layer
        edited = sum(site.weight_OI.numel() for site in overlay.sites) if name in TRAINED_BYTES else 0
        capture, *replays = work.passes
        backward = replays[: work.steps]
        heads = 2 * head * sum(work.positions)
        return cls(
            bytes=width * (len(base.layers) * layer + len(replays) * (suffix + head) + len(backward) * (above + head))
            + work.lane_steps * edited * TRAINED_BYTES.get(name, 0),
            operations=2 * (len(base.layers) * layer * capture + suffix * sum(replays))
            + 2 * (above + edited) * sum(backward),
            head_operations=heads + heads * len(backward) / max(1, len(replays)),
        )

    @classmethod
    def of_scores(cls, base: BaseModel, overlay: Overlay, work: Work) -> Floor:
        """One pass of the whole model for the base's answers; from the edited layer on once more."""
        layer = sum(p.numel() for p in base.layers[0].parameters())
        head = base.head_module.weight.numel()
        suffix = (len(base.layers) - overlay.first_layer) * layer
        tokens = sum(work.passes) / 2
        batches = len(work.passes) / 2
        return cls(
            bytes=base.head_module.weight.element_size()
            * (batches * (len(base.layers) * layer + suffix) + 2 * batches * head),
            operations=2 * tokens * (len(base.layers) * layer + suffix),
            head_operations=2 * head * sum(work.positions),
        )


@dataclass(frozen=True)
class Result:
    """Seconds per edit and per scored request at one number of lanes, and what the floor says."""

    lanes: int
    first: float
    later: float
    floor: float
    scored: float
    score_floor: float
    rate_share: float
    peak: int

    @property
    def share(self) -> float:
        return self.floor / self.later


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Least seconds of ten calls after three: what the device can do, not what it usually does."""
    for _ in range(3):
        function()
    return min(clock(lambda: (function(), _wait(device))) for _ in range(10))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_on(device: torch.device, geometry: dict[str, int], dtype: torch.dtype) -> BaseModel:
    """Random weights, made on the device; the embedded model's tokenizer."""
    embedded = BaseModel.load(ModelConfig(device="cpu"))
    config = AutoConfig.for_model(
        "llama", vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=3, **geometry
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    return BaseModel(model, embedded.tokenizer, ModelConfig(name="random", dtype="bfloat16", device="auto"))


def templates_of(requests: Sequence[EditRequest], lengths: Sequence[tuple[int, int]]) -> ArtifactData:
    """Context templates as long and as many as published; their words are those of other prompts."""
    words = " ".join(request.prompt for request in requests[-20:]).split()
    texts = [f"{' '.join(words[i : i + n])}. {{}}" for n, count in lengths for i in range(count)]
    return ArtifactData(meta={"templates": ["{}", *texts]})


def measure(base: BaseModel, name: str, hparams: dict[str, Any], lanes: int, device: Device, repeats: int) -> Result:
    requests = load_dataset("tinyworld").requests
    kind = get_method(name)
    config = kind.Config.model_validate(hparams)
    inputs = {"templates": templates_of(requests, getattr(config, "context_template_length_params", ()))}
    method: Method[Any] = kind.prepare(base, config, inputs)
    plain = config.model_dump(mode="json")
    target = base.device

    def edits(position: int) -> list[LaneEdit]:
        chosen = [requests[(lane + position * lanes) % len(requests)] for lane in range(lanes)]
        return [
            LaneEdit((request,), Draws(name, plain, 0, lane, position), inputs) for lane, request in enumerate(chosen)
        ]

    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, later, scored = [], [], []
    work, scoring = Work(), Work()
    settings = ScoreConfig(generated=False)
    for number in range(repeats + 1):  # the first round warms up and counts
        _wait(target)
        began = time.perf_counter()
        overlay = method.new_overlay(lanes)
        method.edit(overlay, edits(0))
        _wait(target)
        first.append(time.perf_counter() - began)
        if number:
            began = time.perf_counter()
            method.edit(overlay, edits(1))
            _wait(target)
            later.append(time.perf_counter() - began)
        else:
            with work.counted(base):
                iterations = [outcome.iterations for outcome in method.edit(overlay, edits(1))]
            work.steps, work.lane_steps = max(iterations), sum(iterations)
        items = [Item(lane, edit.requests[0]) for lane, edit in enumerate(edits(0))]
        _wait(target)
        began = time.perf_counter()
        if number:
            score(base, overlay, items, settings)
            _wait(target)
            scored.append(time.perf_counter() - began)
        else:
            with scoring.counted(base):
                score(base, overlay, items, settings)
    floor, score_floor = Floor.of_edit(base, name, overlay, work), Floor.of_scores(base, overlay, scoring)
    seconds = statistics.median(later)
    return Result(
        lanes=lanes,
        first=statistics.median(first[1:]),
        later=seconds,
        floor=floor.seconds(device),
        scored=statistics.median(scored) / lanes,
        score_floor=score_floor.seconds(device) / lanes,
        rate_share=(floor.operations + floor.head_operations) / seconds / device.rate,
        peak=torch.cuda.max_memory_allocated() if target.type == "cuda" else 0,
    )


def run(
    base: BaseModel, name: str, hparams: dict[str, Any], lanes: Sequence[int], device: Device, repeats: int
) -> list[Result]:
    """Results of growing numbers of lanes, until memory ends."""
    where = hparams.get("layers", [hparams.get("layer")])
    LOG.info("\n%s, layers %s, MLP output projection, %s", name, where, hparams)
    LOG.info(
        "lanes  T=1 s/edit  in a group s/edit  floor s/edit  share of floor  matrix rate  s/scored request  (floor)  peak GiB"
    )
    found: list[Result] = []
    for count in lanes:
        gc.collect()
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            r = measure(base, name, hparams, count, device, repeats)
        except torch.cuda.OutOfMemoryError:
            LOG.info("%5d  out of memory", count)
            break
        found.append(r)
        LOG.info(
            "%5d  %10.4f  %17.4f  %12.4f  %13.0f%%  %10.0f%%  %16.5f  (%.5f)  %8.1f",
            r.lanes,
            r.first / count,
            r.later / count,
            r.floor / count,
            100 * r.share,
            100 * r.rate_share,
            r.scored,
            r.score_floor,
            r.peak / 2**30,
        )
    return found


def judge(report: Report, name: str, layers: str, found: Sequence[Result], lanes: int) -> None:
    by_lanes = {r.lanes: r for r in found}
    label = f"{LABELS.get(name, name)} at {layers}, 7B geometry, bfloat16"
    wide = by_lanes.get(lanes)
    if wide is None:
        LOG.info("%s: %d lanes did not fit, nothing to judge", label, lanes)
        return
    if name in JUDGED:
        report.at_least(f"{label}: share of the roofline, {lanes} lanes", 100 * wide.share, 70, "%")
    if 1 in by_lanes:
        gain = (by_lanes[1].first / 1) / (wide.first / lanes)
        report.at_least(f"{label}: edits per second, {lanes} lanes against one, T=1", gain, 3, "x")


def settle(args: argparse.Namespace) -> torch.device | None:
    """The device, set up as an actor sets it up (:meth:`workers.session.Session.open`); None without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device(args.device)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="a tiny geometry, to check the code")
    made.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    made.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    args = made.parse_args()
    if args.smoke:
        args.device, args.tiny, args.lanes = "cpu", True, [1, 8]
    report = Report("bench_gpu", args)
    target = settle(args)
    if target is None:
        LOG.info("skipped: torch finds no GPU here (--device cpu --tiny checks the code)")
        return
    device = Device.measure(target, torch.bfloat16)
    LOG.info(
        "attainable: %.0f GB/s, %.1f TFLOP/s in bfloat16, %.1f TFLOP/s in float32",
        device.bandwidth / 1e9,
        device.rate / 1e12,
        device.rate_float32 / 1e12,
    )
    base = model_on(target, LLAMA_TINY if args.tiny else LLAMA_7B, torch.bfloat16)
    LOG.info("model: %.2f B parameters", sum(p.numel() for p in base.model.parameters()) / 1e9)
    repeats = 1 if args.smoke else 2 if args.quick else 5
    for name in args.methods:
        if name not in method_names():
            LOG.info("\n%s: skipped, there is no such method yet (there are: %s)", name, ", ".join(method_names()))
            continue
        if name not in HPARAMS:
            LOG.info("\n%s: skipped, HPARAMS of this file has no settings for it", name)
            continue
        hparams = {**HPARAMS[name], **(TINY[name] if args.tiny else {})}
        found = run(base, name, hparams, args.lanes, device, repeats)
        if not args.tiny:
            layers = ",".join(str(layer) for layer in hparams.get("layers", [hparams.get("layer")]))
            judge(report, name, f"layer {layers}", found, 8)
    report.close()


if __name__ == "__main__":
    main()
