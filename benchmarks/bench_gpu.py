"""LLaMA-2-7B's geometry in random bfloat16 weights on one GPU: how near each method comes to what
the device allows.

    python benchmarks/bench_gpu.py                      # minutes; needs no Ray, no download
    python benchmarks/bench_gpu.py --device cpu --tiny  # checks the code; its figures mean nothing

Without a GPU it says so, and its targets are skipped. Layers and hyperparameters are the published
ones for this model; weights are random, so what an edit achieves means nothing, only what it costs.
ROME runs without the second moment (one more product per edit). Per method and number of lanes:

- T=1: a fresh overlay and one edit of every lane, masks and generators included;
- in a group: one more edit of the same overlay (the second edit of a T=10 group);
- scoring: every probe of a request, teacher forced, edited and base model, nothing cached.

**The floor** of an edit is the sum, over every product of a linear map and of the head that replay
cannot leave out (counted call by call in one edit that is neither compiled nor recorded), forward
and, where a gradient passes through, backward, of ``max(bytes of its weight / bandwidth, operations
/ rate)``, with bandwidth and rate measured here first. A sum, because each of them waits for the
one before it. For a trained weight the same with a bfloat16 copy that is read and a gradient that
is written, and then the least pass over gradient, float32 master, moments, mask and copy that moves
it. Attention itself, norms, activations and the host are left out: real time lies above the floor.
Tokens count as they were run, padding included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import LOG, Report, alternate, parser
from torch import Tensor, nn
from transformers import AutoConfig

from workers.artifacts.base import ArtifactData
from workers.data import load_dataset
from workers.folders import build_model
from workers.job import ScoreConfig
from workers.kernels.bundle import Kernels
from workers.kernels.process import fix_numerics
from workers.methods import get_method, method_names
from workers.methods.base import EditOutcome, LaneEdit, Method
from workers.model.base import BaseModel
from workers.model.config import ModelConfig
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.session import with_kernels
from workers.types import EditRequest

METHODS = ("wise", "grace", "ft", "rome", "memit")
"""What is measured, if the registry has it and its settings stand below."""

HPARAMS: dict[str, dict[str, Any]] = {
    "wise": {"layer": 27, "n_iter": 70, "lr": 1.0, "mask_ratio": 0.2},
    "grace": {"layer": 27, "n_iter": 50, "lr": 1.0},
    "ft": {"layers": [21], "objective": "prompt_last", "num_steps": 25, "lr": 5e-4, "norm_constraint": 5e-5},
    "rome": {"layer": 5, "v_num_grad_steps": 25, "v_lr": 0.5, "mom2_adjustment": False},
    "memit": {"layers": [4, 5, 6, 7, 8], "v_num_grad_steps": 25, "v_lr": 0.5},
}
TINY: dict[str, dict[str, Any]] = {
    "wise": {"layer": 2, "n_iter": 2},
    "grace": {"layer": 2, "n_iter": 2},
    "ft": {"layers": [1], "num_steps": 2},
    "rome": {"layer": 1, "v_num_grad_steps": 3},
    "memit": {"layers": [1, 2], "v_num_grad_steps": 3},
}
LABELS = {"ft": "FT-L"}
JUDGED = ("wise", "ft")
"""Methods with a target against the floor."""

WIDE = 8
"""The number of lanes that is compared with one; shares are judged at the best number of those
measured."""

TRAINED_BYTES = 2 + 2
"""Per value of a trained matrix, per lane and step: a bfloat16 copy is read in the forward pass,
its gradient written."""

MOVED_BYTES = {
    "ft": 2 + 6 * 4 + 2,  # Adam reads the gradient, reads and writes master and two moments, writes the copy
    "wise": 2
    + 2 * 4
    + 1
    + 2,  # gradient descent reads the gradient, master (and writes it) and mask, writes the copy
}
"""Least bytes per value that move a trained matrix, per lane and step; other methods train
vectors."""

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Device:
    """What the device attains: bytes per second of a copy or a sum, operations per second of matrix
    products."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Device:
        big = device.type == "cuda"
        source = torch.ones((1 << 29) if big else (1 << 21), device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / _best(partial(target.copy_, source), device)
        read = source.nbytes / _best(source.sum, device)
        size = 8192 if big else 256
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return cls(max(copied, read), 2 * size**3 / _best(partial(torch.matmul, a, b), device))


@dataclass(frozen=True)
class Cost:
    """Bytes that must pass through the device's memory and operations, of one product or one pass
    over memory."""

    bytes: float
    operations: float = 0.0
    times: float = 1.0

    def seconds(self, device: Device) -> float:
        return self.times * max(self.bytes / device.bandwidth, self.operations / device.rate)


@dataclass
class Work:
    """The products of one call, counted from outside."""

    products: list[Cost] = field(default_factory=list)
    tokens: int = 0
    """Of the batch, as the first map sees it."""

    @contextmanager
    def counted(self, base: BaseModel) -> Iterator[None]:
        """Inside, nothing is compiled or recorded, and every product of a linear map and of the
        head is noted."""
        head, kernels = base.logits, base.kernels
        maps = [m for layer in base.layers for m in layer.modules() if isinstance(m, nn.Linear)]

        def logits(hidden: Tensor) -> Tensor:
            self._product(base.head_module, hidden)
            return head(hidden)

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.tokens = self.tokens or args[0][..., 0].numel()
            # in a step, what answers for a map is either the trained weight, which counts apart, or
            # nothing at all
            if not (torch.is_grad_enabled() and "forward" in module.__dict__):
                self._product(module, args[0])

        with ExitStack() as stack:
            for module in maps:
                stack.callback(module.register_forward_pre_hook(note).remove)
            base.kernels = Kernels()
            base.logits = logits  # type: ignore[method-assign]
            try:
                yield
            finally:
                del base.logits
                base.kernels = kernels

    def _product(self, module: nn.Module, x: Tensor) -> None:
        weight = module.get_parameter("weight")
        times = 2 if torch.is_grad_enabled() and x.requires_grad else 1
        self.products.append(Cost(weight.nbytes, 2 * weight.numel() * x[..., 0].numel(), times))


@dataclass(frozen=True)
class Floor:
    """What cannot be left out, one after the other: nothing here can begin before the one before it
    has ended."""

    costs: tuple[Cost, ...]

    @property
    def operations(self) -> float:
        return sum(cost.times * cost.operations for cost in self.costs)

    def seconds(self, device: Device) -> float:
        return sum(cost.seconds(device) for cost in self.costs)

    @classmethod
    def of_edit(cls, name: str, overlay: Overlay, work: Work, iterations: Sequence[int]) -> Floor:
        """``iterations``: optimisation steps of each lane."""
        if name not in MOVED_BYTES:
            return cls(tuple(work.products))
        trained = sum(site.weight_OI.numel() for site in overlay.sites)
        lane_steps = sum(iterations)
        # of one lane: its answers to its share of the tokens, and its gradient
        product = Cost(TRAINED_BYTES / 2 * trained, 2 * trained * work.tokens / overlay.lanes, 2 * lane_steps)
        return cls((*work.products, product, Cost(MOVED_BYTES[name] * trained, times=lane_steps)))


@dataclass(frozen=True)
class Result:
    """Seconds of one call that edits every lane, seconds per scored request, and what the floors of
    both say."""

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


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device's own work included."""
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Least seconds of ten calls after three: what the device can do, not what it usually does."""
    return min([timed(function, device) for _ in range(13)][3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_on(
    device: torch.device, geometry: dict[str, int], dtype: torch.dtype, compiled: bool = False
) -> BaseModel:
    """Random weights, made on the device; the embedded model's tokenizer."""
    embedded = BaseModel.load(ModelConfig(device="cpu"))
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=3,
        **geometry,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with device:
            model = build_model("causal", config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    config = ModelConfig(name="random", dtype="bfloat16", compile=compiled)
    return with_kernels(BaseModel(model, embedded.tokenizer, config))


def templates_of(requests: Sequence[EditRequest], lengths: Sequence[tuple[int, int]]) -> ArtifactData:
    """Context templates as long and as many as published; their words are those of other
    prompts."""
    words = " ".join(request.prompt for request in requests[-20:]).split()
    texts = [f"{' '.join(words[i : i + n])}. {{}}" for n, count in lengths for i in range(count)]
    return ArtifactData(meta={"templates": ["{}", *texts]})


def measure(
    base: BaseModel, name: str, hparams: dict[str, Any], lanes: int, device: Device, repeats: int
) -> Result:
    """One method at one number of lanes: count what it runs, which also warms it up, then time
    it."""
    requests = load_dataset("tinyworld").requests
    kind = get_method(name)
    config = kind.Config.model_validate(hparams)
    inputs = {"templates": templates_of(requests, getattr(config, "context_template_length_params", ()))}
    if name == "memit":  # how long it takes does not depend on what text the keys come from
        for layer in config.layers:
            width = base.site(layer).shape[1]
            inputs[f"moment.{layer}"] = ArtifactData({"moment": torch.eye(width)})
    method: Method[Any, Any] = kind.prepare(base, config, inputs)
    plain = config.model_dump(mode="json")
    items = [Item(lane, requests[lane]) for lane in range(lanes)]
    settings = ScoreConfig(generated=False)
    held: list[Overlay] = []

    def edits(position: int) -> list[LaneEdit]:
        chosen = requests[position * lanes : (position + 1) * lanes]
        return [
            LaneEdit((request,), RandomStreams(name, plain, 0, lane, position), inputs)
            for lane, request in enumerate(chosen)
        ]

    def first() -> None:
        held.clear()
        held.append(method.new_overlay(lanes))
        method.edit(held[0], edits(0))

    def later() -> list[EditOutcome]:
        return method.edit(held[0], edits(1))

    def scored() -> None:
        score(base, held[0], items, settings)

    calls: dict[str, Callable[[], object]] = {"first": first, "later": later, "scored": scored}
    work, scoring = Work(), Work()
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first()
    with work.counted(base):
        iterations = [outcome.iterations for outcome in later()]
    with scoring.counted(base):
        scored()
    rounds = {call: partial(timed, function, base.device) for call, function in calls.items()}
    found = {call: statistics.median(s) for call, s in alternate(rounds, repeats, warm_up=0).items()}
    overlay = held[0]
    floor, score_floor = Floor.of_edit(name, overlay, work, iterations), Floor(tuple(scoring.products))
    return Result(
        lanes=lanes,
        first=found["first"],
        later=found["later"],
        floor=floor.seconds(device),
        scored=found["scored"] / lanes,
        score_floor=score_floor.seconds(device) / lanes,
        rate_share=floor.operations / found["later"] / device.rate,
        peak=torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0,
    )


def run(
    base: BaseModel, name: str, hparams: dict[str, Any], lanes: Sequence[int], device: Device, repeats: int
) -> list[Result]:
    """Results of growing numbers of lanes, until memory ends."""
    where = hparams.get("layers", [hparams.get("layer")])
    LOG.info("\n%s, layers %s, MLP output projection, %s", name, where, hparams)
    LOG.info(
        "lanes  T=1 s/edit  in a group s/edit  floor s/edit  share of floor  matrix rate  s/scored request "
        " (floor)  peak GiB"
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


def judge(report: Report, name: str, found: Sequence[Result], why_not: str) -> None:
    """The targets of one method; those without results are skipped, and ``why_not`` says why."""
    layers = HPARAMS[name].get("layers", [HPARAMS[name].get("layer")])
    label = f"{LABELS.get(name, name)} at layer {','.join(map(str, layers))} of 7B geometry, bfloat16"
    share, gain = f"{label}: share of the roofline", f"{label}: edits per second, {WIDE} lanes, T=1"
    by_lanes = {r.lanes: r for r in found}
    one, wide = by_lanes.get(1), by_lanes.get(WIDE)
    if name in JUDGED and found:
        best = max(found, key=lambda r: r.share)
        at_wide = "" if wide is None else f"{100 * wide.share:.0f}% at {WIDE}"
        report.at_least(f"{share}, {best.lanes} lanes", 100 * best.share, 70, "%", at_wide)
    elif name in JUDGED:
        report.skipped(share, why_not)
    if one is not None and wide is not None:
        report.at_least(gain, WIDE * one.first / wide.first, 3, "x of one lane")
    else:
        report.skipped(gain, why_not)


def settle(args: argparse.Namespace) -> torch.device | None:
    """The device, set up as an actor sets it up; None without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return None
    fix_numerics()
    return torch.device(args.device)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="a tiny geometry, to check the code")
    made.add_argument(
        "--compile", action="store_true", help="decoder layers compiled, as with model.compile: true"
    )
    made.add_argument(
        "--lanes",
        type=int,
        nargs="+",
        help="default: 1 to 128, doubling; with --quick 1, 8 and, where judged, 64",
    )
    made.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    args = made.parse_args()
    if args.smoke:
        args.device, args.tiny, args.lanes = "cpu", True, [1, 8]
    report = Report("bench_gpu", args)
    target = settle(args)
    if target is None:
        LOG.info("torch finds no GPU here: nothing is measured (--device cpu --tiny checks the code)")
        for name in HPARAMS:
            judge(report, name, [], "torch finds no GPU here")
        report.close()
        return
    device = Device.measure(target, torch.bfloat16)
    LOG.info(
        "attainable: %.0f GB/s, %.1f TFLOP/s in bfloat16",
        device.bandwidth / 1e9,
        device.rate / 1e12,
    )
    base = model_on(target, LLAMA_TINY if args.tiny else LLAMA_7B, torch.bfloat16, args.compile)
    LOG.info("model: %.2f B parameters", sum(p.numel() for p in base.model.parameters()) / 1e9)
    repeats = 1 if args.smoke else 2 if args.quick else 5
    for name in args.methods:
        if name not in method_names():
            LOG.info(
                "\n%s: skipped, there is no such method yet (there are: %s)", name, ", ".join(method_names())
            )
            continue
        if name not in HPARAMS:
            LOG.info("\n%s: skipped, HPARAMS of this file has no settings for it", name)
            continue
        hparams = {**HPARAMS[name], **(TINY[name] if args.tiny else {})}
        quick = [1, WIDE, 64] if name in JUDGED else [1, WIDE]
        lanes = args.lanes or (quick if args.quick else [2**power for power in range(8)])
        found = run(base, name, hparams, lanes, device, repeats)
        if not args.tiny:
            judge(
                report, name, found, f"1 and {WIDE} lanes were not both asked for, or did not fit into memory"
            )
    report.close()


if __name__ == "__main__":
    main()
