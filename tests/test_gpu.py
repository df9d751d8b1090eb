"""What only a CUDA device can show. `make test-gpu` runs these where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.engine.worker import Worker
from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import parse_spec
from tests.small import GOLDEN, build_inputs, golden_requests, job, timeless
from workers.kernels.bundle import Kernels
from workers.kernels.matmul import wide_linear
from workers.methods import get_method
from workers.model.config import ModelConfig
from workers.session import Session
from workers.stream import Stream
from workers.timeline import cut_steps
from workers.types import ModelError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIGS: dict[str, dict[str, Any]] = {
    "ft": {"layers": [3], "lr": 1e-3},
    "rome": {"layer": 0, "corpus": str(GOLDEN / "corpus.txt"), "samples": 1000, "v_num_grad_steps": 10},
    "grace": {"layer": 4, "n_iter": 20},
    "wise": {"layer": 4, "lr": 0.3, "n_iter": 10, "alpha": 0.2, "beta": 0.8, "gamma": 0.4},
}


def rows_on(device: Any, method: str, recorded: bool = True, compiled: bool = False) -> list[dict[str, Any]]:
    model = ModelConfig(name=str(GOLDEN / "models" / "tiny-llama"), device=device, compile=compiled)
    session = Session.open(model)
    session.base.compiled.updates = compiled
    if not recorded:
        session.base.kernels = Kernels(session.base.compiled)
    config = get_method(method).Config.model_validate(CONFIGS[method])
    inputs = build_inputs(session.base, method, config)
    work = job(method, config, 5, [[0, 1], [2]], inputs)
    stream = Stream(session, work, [golden_requests(15)], inputs)
    rows = timeless([row for step in stream.run(cut_steps(work, 10)) for row in step.rows])
    assert not session.base.compiled.broken
    return rows


def test_a_shard_planned_for_a_larger_gpu_is_refused(tmp_path: Path) -> None:
    spec = parse_spec(
        "{name: g, model: {name: embedded, device: cuda}, dataset: {kind: tinyworld, edits: 2}, grid: {T: "
        "[1]}, "
        "methods: [ft], engine: {lanes: auto, gpu_memory_gb: 5000}}",
        "g.yaml",
        tmp_path,
    )
    plan = make_plan(spec)
    with pytest.raises(ModelError, match=r"gpu_memory_gb: 5000.*--set engine\.gpu_memory_gb="):
        list(Worker(str(tmp_path), "r").run(plan.manifest(plan.shards[0])))


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_device_repeats_itself_and_agrees_with_the_cpu(method: str) -> None:
    first, again, cpu = rows_on("cuda", method), rows_on("cuda", method), rows_on("cpu", method)
    assert first == again
    assert {row["device"] for row in first} == {"cuda"}
    assert len(first) == len(cpu)
    for name in ("reliability_token", "locality_token"):
        on_gpu, on_cpu = (sum(row[name] for row in rows) / len(rows) for rows in (first, cpu))
        assert on_gpu == pytest.approx(on_cpu, abs=0.1), name


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_recorded_step_has_the_bits_of_the_step_as_it_is_written(method: str) -> None:
    assert rows_on("cuda", method) == rows_on("cuda", method, recorded=False)


@pytest.mark.parametrize("method", ["ft", "wise"])
def test_compiled_layers_and_updates_change_nothing_beyond_rounding(method: str) -> None:
    compiled, plain = rows_on("cuda", method, compiled=True), rows_on("cuda", method)
    for name in ("target_logprob", "delta_norm", "iterations"):
        assert [row[name] for row in compiled] == pytest.approx(
            [row[name] for row in plain], rel=0.05, abs=0.05
        ), name


def test_products_of_narrow_numbers_are_added_up_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 256, device="cuda").bfloat16().requires_grad_(True)
    weight = torch.randn(90, 256, device="cuda").bfloat16()
    out = wide_linear(x, weight, None, torch.float32)
    exact = x.double() @ weight.double().T
    assert out.dtype == torch.float32
    assert torch.linalg.vector_norm(out - exact) < 1e-5 * torch.linalg.vector_norm(exact)
    pull = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, pull)
    want = (
        pull.double() @ weight.double()
    ).bfloat16()  # rounded once, and not to what the gradient was rounded to before
    assert torch.linalg.vector_norm((got - want).float()) < 1e-3 * torch.linalg.vector_norm(want.float())
