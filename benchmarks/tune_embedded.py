"""How the hyperparameters for the embedded model were chosen: on its tuning split, which no sweep
uses.

    python benchmarks/tune_embedded.py ft '{"lr": [0.001, 0.003], "num_steps": [25]}'

prints one line per point of the grid: mean final scores at T=1, 10 and 100, immediate reliability,
seconds per edit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
from typing import Any

from workers.artifacts.pretrain import training_source
from workers.data.tinyworld import load_dataset
from workers.job import Lane, StreamCell, StreamJob
from workers.methods import get_method, load_config, method_names
from workers.methods.base import ArtifactContext
from workers.model.config import ModelConfig, fingerprint_model
from workers.session import Session, build_inputs
from workers.stream import Stream
from workers.timeline import cut_steps

LOG = logging.getLogger("tune")
GROUPS = {1: 30, 10: 3, 100: 1}


def measure(session: Session, method: str, hparams: dict[str, Any], Ts: list[int], lanes: int) -> str:
    """One line of means for one config."""
    model = session.base.config
    config = load_config(method, hparams, None, model)
    training = training_source("tinyworld")[0] if get_method(method).needs_pretraining else None
    specs = config.artifacts(ArtifactContext(fingerprint_model(model), model, 0, training))
    artifacts = build_inputs(session.base, specs)
    cell = StreamCell(cell_id="tune", seed=0, artifacts={name: name for name in artifacts})
    requests = load_dataset("tune").requests
    parts = []
    for T in Ts:
        groups = list(range(GROUPS.get(T, len(requests) // T)))
        waves = [groups[i : i + lanes] for i in range(0, len(groups), lanes)]
        job = StreamJob(
            method=method,
            config=config.model_dump(mode="json"),
            cells=(cell,),
            T=T,
            batch_size=T if get_method(method).whole_group else 1,
            waves=tuple(tuple(Lane(group=g, stop_group=g + 1) for g in wave) for wave in waves),
        )
        clock = time.perf_counter()
        results = list(Stream(session, job, [requests], artifacts).run(cut_steps(job, 1000)))
        seconds = (time.perf_counter() - clock) / (len(groups) * T)
        rows = [row for r in results for row in r.rows]
        final = [r for r in rows if r["scored"] == "final"]
        means = [
            sum(r[f"{kind}_exact"] for r in final) / max(1, len(final))
            for kind in ("reliability", "generalization", "locality", "portability")
        ]
        now = [r["reliability_exact"] for r in rows if r["scored"] == "immediate"]
        failed = sum(len(r.failures) for r in results)
        steps = sum(r["iterations"] for r in final) / max(1, len(final))
        parts.append(
            f"T={T}: rel {means[0]:.2f} gen {means[1]:.2f} loc {means[2]:.2f} port {means[3]:.2f} "
            f"(at once {sum(now) / max(1, len(now)):.2f}; {steps:.0f} it; {seconds:.2f} s; {failed} failed)"
        )
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=method_names())
    parser.add_argument("grid", nargs="?", default="{}", help="JSON: hyperparameter -> list of values")
    parser.add_argument("--T", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--lanes", type=int, default=10)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    session = Session.open(ModelConfig(device="cpu"))
    grid = json.loads(args.grid)
    for values in itertools.product(*grid.values()):
        hparams = dict(zip(grid, values, strict=True))
        LOG.info(
            "%s %s\n    %s", args.method, hparams, measure(session, args.method, hparams, args.T, args.lanes)
        )


if __name__ == "__main__":
    main()
