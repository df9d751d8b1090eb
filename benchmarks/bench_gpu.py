"""LLaMA-2-7B's geometry in random bfloat16 weights on one GPU: how near each method comes to what the device allows.

    python benchmarks/bench_gpu.py                      # minutes; needs no Ray, no download
    python benchmarks/bench_gpu.py --device cpu --tiny  # checks the code; its figures mean nothing

Without a GPU it says so, and its targets are skipped. Layers and hyperparameters are the published ones for this model;
weights are random, so what an edit achieves means nothing, only what it costs. ROME runs without the second moment (one
more product per edit). Per method and number of lanes:

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
from common import LOG, Report, alternate, parser
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from workers.artifacts import ArtifactData
from workers.data import load_dataset
from workers.job import ScoreConfig
from workers.methods import get_method, method_names
from workers.methods.base import EditOutcome, LaneEdit, Method
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
"""The number of lanes at which targets are judged."""

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
    """Seconds of one call that edits every lane, seconds per scored request, and what the floors of both say."""

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
    """One method at one number of lanes: count what it runs, which also warms it up, then time it."""
    requests = load_dataset("tinyworld").requests
    kind = get_method(name)
    config = kind.Config.model_validate(hparams)
    inputs = {"templates": templates_of(requests, getattr(config, "context_template_length_params", ()))}
    if name == "memit":  # how long it takes does not depend on what text the keys come from
        for layer in config.layers:
            width = base.site(layer).shape[1]
            inputs[f"moment.{layer}"] = ArtifactData({"moment": torch.eye(width)})
    method: Method[Any] = kind.prepare(base, config, inputs)
    plain = config.model_dump(mode="json")
    items = [Item(lane, requests[lane]) for lane in range(lanes)]
    settings = ScoreConfig(generated=False)
    held: list[Overlay] = []

    def edits(position: int) -> list[LaneEdit]:
        chosen = requests[position * lanes : (position + 1) * lanes]
        return [
            LaneEdit((request,), Draws(name, plain, 0, lane, position), inputs) for lane, request in enumerate(chosen)
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
    work.steps, work.lane_steps = max(iterations), sum(iterations)
    with scoring.counted(base):
        scored()
    rounds = {call: partial(timed, function, base.device) for call, function in calls.items()}
    found = {call: statistics.median(s) for call, s in alternate(rounds, repeats, warm_up=0).items()}
    overlay = held[0]
    floor, score_floor = Floor.of_edit(base, name, overlay, work), Floor.of_scores(base, overlay, scoring)
    return Result(
        lanes=lanes,
        first=found["first"],
        later=found["later"],
        floor=floor.seconds(device),
        scored=found["scored"] / lanes,
        score_floor=score_floor.seconds(device) / lanes,
        rate_share=(floor.operations + floor.head_operations) / found["later"] / device.rate,
        peak=torch.cuda.max_memory_allocated() if base.device.type == "cuda" else 0,
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


def judge(report: Report, name: str, found: Sequence[Result], why_not: str) -> None:
    """The targets of one method; those without results are skipped, and ``why_not`` says why."""
    layers = HPARAMS[name].get("layers", [HPARAMS[name].get("layer")])
    label = f"{LABELS.get(name, name)} at layer {','.join(map(str, layers))} of 7B geometry, bfloat16"
    share, gain = f"{label}: share of the roofline at {WIDE} lanes", f"{label}: edits per second, {WIDE} lanes, T=1"
    by_lanes = {r.lanes: r for r in found}
    one, wide = by_lanes.get(1), by_lanes.get(WIDE)
    if name in JUDGED and wide is not None:
        report.at_least(share, 100 * wide.share, 70, "%")
    elif name in JUDGED:
        report.skipped(share, why_not)
    if one is not None and wide is not None:
        report.at_least(gain, WIDE * one.first / wide.first, 3, "x of one lane")
    else:
        report.skipped(gain, why_not)


def settle(args: argparse.Namespace) -> torch.device | None:
    """The device, set up as an actor sets it up (:meth:`workers.session.Session.open`); None without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return None
    disable_progress_bar()
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
        LOG.info("torch finds no GPU here: nothing is measured (--device cpu --tiny checks the code)")
        for name in HPARAMS:
            judge(report, name, [], "torch finds no GPU here")
        report.close()
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
            judge(report, name, found, f"1 and {WIDE} lanes were not both asked for, or did not fit into memory")
    report.close()


if __name__ == "__main__":
    main()
