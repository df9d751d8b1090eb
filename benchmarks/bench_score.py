"""Scoring: batches of like length against one sequence at a time, and what kept activations add.

    python benchmarks/bench_score.py [--quick]

The one-at-a-time loop scores as the field's scripts do: for each probe one forward of the unedited
and one of the edited model over prompt and target, the head at every position. Batched scoring
fills the same columns (token, exact, log-probability, margin, locality against the base model);
generation is off on both sides. Every score is checked to be equal. The second figure repeats the
batches with activations below the edit kept, against repeating them without: base scores are known
in both. The edited layer is that of WISE and GRACE.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from bench_edit import config_of, model
from common import LOG, Report, alternate, median_ratio, parser
from reference import as_it_comes

from workers.data.tinyworld import load_dataset
from workers.job import ScoreConfig
from workers.model.base import BaseModel
from workers.model.batch import Encoded, collate
from workers.model.overlay import DenseOverlay
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import EditRequest

CONFIG = ScoreConfig(generated=False)


@torch.no_grad()
def argmax_of(base: BaseModel, encoded: Encoded, overlay: DenseOverlay | None) -> tuple[list[int], float]:
    """What the model says at the target positions, and the target's mean log-probability."""
    rows = collate([encoded], [0], base.encoder.pad_id, base.device)
    with overlay.installed(rows) if overlay is not None else nullcontext():
        logits_SV = base.logits(base.hidden_states(rows))[0, encoded.prompt_len - 1 : -1]
    target = torch.tensor(encoded.target)
    logprob = logits_SV.log_softmax(-1).gather(1, target[:, None]).mean()
    return logits_SV.argmax(-1).tolist(), float(logprob)


def one_at_a_time(
    base: BaseModel, overlay: DenseOverlay, requests: Sequence[EditRequest]
) -> list[dict[str, float]]:
    """Token scores and log-probability of each request, probe by probe."""
    found = []
    for r in requests:
        probes = [("reliability", r.prompt, r.target_new)]
        probes += [("generalization", text, r.target_new) for text in r.rephrases]
        probes += [("locality", p.prompt, p.target) for p in r.locality]
        probes += [("portability", p.prompt, p.target) for p in r.portability]
        values: dict[str, list[float]] = {}
        for kind, prompt, target in probes:
            encoded = base.encoder.pair(prompt, target)
            before, _ = argmax_of(base, encoded, None)
            after, logprob = argmax_of(base, encoded, overlay)
            wanted = before if kind == "locality" else list(encoded.target)
            hits = [a == b for a, b in zip(after, wanted, strict=True)]
            values.setdefault(f"{kind}_token", []).append(sum(hits) / len(hits))
            if kind == "reliability":
                values["target_logprob"] = [logprob]
        found.append({name: sum(v) / len(v) for name, v in values.items()})
    return found


def edited(base: BaseModel, layer: int) -> DenseOverlay:
    """The same noise on one map of every model of a shape."""
    site = base.site(layer)
    overlay = DenseOverlay([site], 1, torch.float32)
    noise_OI = torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
    overlay.weights_LOI[site.name][0] += 0.3 * noise_OI * site.weight_OI.std()
    return overlay


def measure(
    name: str, requests: Sequence[EditRequest], rounds: int, report: Report, alone: bool = True
) -> None:
    """``alone``: the one-at-a-time loop is timed, too, not only compared."""
    base = model(name)
    field = as_it_comes(base)
    layer = int(config_of(base, name, "wise").layer)
    overlay, changed = edited(base, layer), edited(field, layer)
    items = [Item(0, r) for r in requests]

    def batched(answers: Callable[[], BaseAnswers], prefixes: Prefixes) -> Callable[[], object]:
        return lambda: score(base, overlay, items, CONFIG, answers(), prefixes)

    known, kept = BaseAnswers(), Prefixes(budget=1 << 32)
    score(base, overlay, items, CONFIG, known, kept)
    ours, theirs = score(base, overlay, items, CONFIG), one_at_a_time(field, changed, requests)
    runs: dict[str, Callable[[], object]] = {
        "batched": batched(BaseAnswers, Prefixes()),
        "with known base scores": batched(lambda: known, Prefixes()),
        "with kept activations": batched(lambda: known, kept),
    }
    if alone:
        runs = {"one at a time": lambda: one_at_a_time(field, changed, requests), **runs}
    seconds = alternate(runs, rounds, warm_up=0)  # both sides have run
    pairs = [
        (a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b if key.endswith("_token")
    ]
    different = sum(abs(float(a or 0) - b) > 1e-6 for a, b in pairs)
    gap = max(
        abs(float(a["target_logprob"] or 0) - b["target_logprob"]) for a, b in zip(ours, theirs, strict=True)
    )
    title = f"{name}, {len(requests)} requests, edit at layer {layer} of {len(base.layers)}"
    speed = [f"{key} {len(requests) / statistics.median(values):.0f}" for key, values in seconds.items()]
    LOG.info("%s: requests/s %s", title, ", ".join(speed))
    LOG.info(
        "%s: %d of %d token scores differ; log-probabilities by %.1e at most",
        title,
        different,
        len(pairs),
        gap,
    )
    note = f"{different} of {len(pairs)} token scores differ"
    if alone:
        gain = median_ratio(seconds["one at a time"], seconds["batched"])
        LOG.info("%s: batched against one at a time %.1fx", title, gain)
        if name == "embedded":
            report.at_least(f"scoring, {title}: batched against one at a time", gain, 10, "x", note)
    if name == "embedded":
        report.at_most(f"scoring, {title}: scores that differ", 100 * different / len(pairs), 0.1, "%")
    else:
        more = median_ratio(seconds["with known base scores"], seconds["with kept activations"])
        report.at_least(f"scoring, {title}: kept activations against batches without", more, 1.5, "x", note)


def main(args: argparse.Namespace) -> None:
    report = Report("bench_score", args)
    requests = list(load_dataset("edit").requests)
    count, rounds = (8, 1) if args.smoke else (300, 3 if args.quick else 5)
    measure("embedded", requests[:count], rounds, report)
    if args.quick:
        measure("llama-60m", requests[:20], 3, report, alone=False)
    elif not args.smoke:
        measure("llama-60m", requests[:count], 3, report)
    report.close()


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
