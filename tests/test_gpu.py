"""What only a CUDA device can show. `make test-gpu` runs these where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.execute import Bench
from orchestrator.plan import make_plan
from orchestrator.spec import parse_spec
from tests.small import GOLDEN, build_inputs, golden_requests, job, timeless
from workers.job import cut_steps
from workers.methods import get_method
from workers.models import ModelConfig
from workers.session import Session
from workers.stream import Stream
from workers.types import ModelError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

CONFIGS: dict[str, dict[str, Any]] = {
    "ft": {"layers": [3], "lr": 1e-3},
    "rome": {"layer": 0, "corpus": str(GOLDEN / "corpus.txt"), "samples": 1000, "v_num_grad_steps": 10},
    "grace": {"layer": 4, "n_iter": 20},
    "wise": {"layer": 4, "lr": 0.3, "n_iter": 10, "alpha": 0.2, "beta": 0.8, "gamma": 0.4},
}


def rows_on(device: Any, method: str) -> list[dict[str, Any]]:
    model = ModelConfig(name=str(GOLDEN / "models" / "tiny-llama"), device=device)
    session = Session.open(model)
    config = get_method(method).Config.model_validate(CONFIGS[method])
    inputs = build_inputs(session.base, method, config)
    work = job(method, config, 5, [[0, 1], [2]], inputs)
    stream = Stream(session, work, [golden_requests(15)], inputs)
    return timeless([row for step in stream.run(cut_steps(work, 10)) for row in step.rows])


def test_a_shard_planned_for_a_larger_gpu_is_refused(tmp_path: Path) -> None:
    spec = parse_spec(
        "{name: g, model: {name: embedded, device: cuda}, dataset: {kind: tinyworld, edits: 2}, grid: {T: [1]}, "
        "methods: [ft], engine: {lanes: auto, gpu_memory_gb: 5000}}",
        "g.yaml",
        tmp_path,
    )
    plan = make_plan(spec)
    with pytest.raises(ModelError, match=r"gpu_memory_gb: 5000.*--set engine\.gpu_memory_gb="):
        list(Bench(str(tmp_path), "r").run(plan.manifest(plan.shards[0])))


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_device_repeats_itself_and_agrees_with_the_cpu(method: str) -> None:
    first, again, cpu = rows_on("cuda", method), rows_on("cuda", method), rows_on("cpu", method)
    assert first == again
    assert {row["device"] for row in first} == {"cuda"}
    assert len(first) == len(cpu)
    for name in ("reliability_token", "locality_token"):
        on_gpu, on_cpu = (sum(row[name] for row in rows) / len(rows) for rows in (first, cpu))
        assert on_gpu == pytest.approx(on_cpu, abs=0.1), name
