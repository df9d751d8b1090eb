"""Check every node before the first shard runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.engine.machine import check_memory, versions
from orchestrator.engine.run_state import RunState
from orchestrator.planning.spec import Resources
from orchestrator.storage.base import StoreError
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from workers.model.config import ModelConfig, fingerprint_model
from workers.types import EditSweepError

PREFLIGHT_SECONDS = 180.0
"""Time limit for one node's report."""


class ClusterError(EditSweepError):
    """Ray cannot be reached, or a node cannot run shards. The message names the node and the
    cause."""


@dataclass(frozen=True)
class _NodeCheck:
    """Arguments of the check that runs on every node. ``nonce``: random text that the driver has
    written into the results folder."""

    root: str
    nonce: str
    run_id: str
    model: ModelConfig
    weight_bytes: int
    resources: Resources


@dataclass(frozen=True)
class _NodeReport:
    """Result of the check on one node. ``problem`` is empty if the node can be used."""

    host: str
    nonce: str
    versions: dict[str, str]
    fingerprint: str
    problem: str = ""


@ray.remote(num_cpus=0, max_retries=1)
def _check_node(check: _NodeCheck, node: str) -> _NodeReport:
    """Check a node: read and write the results folder, hash the model's files, check the memory.
    Runs on that node."""
    host = socket.gethostname()
    paths = ResultsPaths()
    store = open_store(check.root)
    try:
        nonce = store.read(paths.log(f"preflight-{check.run_id}")).decode()
    except StoreError as error:
        return _NodeReport(host, "", versions(), "", f"it cannot read the results folder ({error})")
    try:
        store.replace(paths.log(f"preflight-{check.run_id}-{node}"), nonce.encode())
        fingerprint = fingerprint_model(check.model)
        resources = check.resources
        check_memory(check.model, check.weight_bytes, resources.gpu, resources.memory_gb, where=host)
    except EditSweepError as error:
        return _NodeReport(host, nonce, versions(), "", str(error))
    return _NodeReport(host, nonce, versions(), f"{fingerprint.model}:{fingerprint.tokenizer}")


def check_nodes(run_state: RunState) -> int:
    """Check every node that has the resources of an actor. Return the number of actors that fit on
    these nodes together.

    Raises :class:`ClusterError` with the problems of all nodes.
    """
    plan, store, paths = run_state.plan, run_state.store, run_state.paths
    resources = plan.spec.engine.resources
    if plan.common.model.device == "cuda" and not resources.gpu:
        raise ClusterError("model.device is cuda, but engine.resources.gpu is 0; set it to 1 (or a fraction)")
    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {n["NodeID"]: n for n in alive if n["Alive"]}
    room = {node: _actors_on(info["Resources"], resources) for node, info in nodes.items()}
    able = {node: count for node, count in room.items() if count}
    if not able:
        have = ", ".join(
            f"{n['NodeManagerHostname']}: {n['Resources'].get('CPU', 0):g} cpu, "
            f"{n['Resources'].get('GPU', 0):g} gpu"
            for n in nodes.values()
        )
        raise ClusterError(
            f"engine.resources: an actor needs {resources.cpu:g} cpu and {resources.gpu:g} gpu; no node "
            f"has them ({have})"
        )
    nonce = os.urandom(16).hex()
    store.replace(paths.log(f"preflight-{run_state.run_id}"), nonce.encode())
    check = _NodeCheck(
        store.where(),
        nonce,
        run_state.run_id,
        plan.common.model,
        plan.weight_bytes,
        plan.spec.engine.resources,
    )
    asked = {
        node: _check_node.options(
            num_gpus=resources.gpu, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(check, node)
        for node in able
    }
    problems = []
    mine = versions()
    expected = f"{plan.common.model_fingerprint}:{plan.common.tokenizer_fingerprint}"
    for node, ref in asked.items():
        name = nodes[node]["NodeManagerHostname"]
        try:
            report: _NodeReport = ray.get(ref, timeout=PREFLIGHT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{name}: no answer within {PREFLIGHT_SECONDS:.0f} seconds")
            continue
        except ray.exceptions.RayError as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[-1][:500]}")
            continue
        problems += [f"{name}: {problem}" for problem in _problems(report, nonce, mine, expected)]
        back = paths.log(f"preflight-{run_state.run_id}-{node}")
        if not report.problem:
            if not store.exists(back):
                problems.append(
                    f"{name}: a file that it wrote into {store.where()} does not exist here; use a "
                    f"shared folder"
                )
            store.delete(back)
    store.delete(paths.log(f"preflight-{run_state.run_id}"))
    if problems:
        raise ClusterError("the cluster is not ready:\n  " + "\n  ".join(problems))
    return sum(able.values())


def _problems(report: _NodeReport, nonce: str, mine: Mapping[str, str], fingerprint: str) -> Iterator[str]:
    """The problems in one node's report."""
    different = [
        f"{name} {report.versions.get(name)} (here {version})"
        for name, version in mine.items()
        if report.versions.get(name) != version
    ]
    if different:
        yield f"other versions than the driver's: {', '.join(different)}"
    if report.problem:
        yield report.problem
    elif report.nonce != nonce:
        yield (
            "the results folder at this path is a different one there; results must be in a folder that "
            "all nodes share"
        )
    elif report.fingerprint != fingerprint:
        yield "the model's files differ from the driver's (another version of the weights or the tokenizer)"


def _actors_on(have: Mapping[str, float], need: Resources) -> int:
    counts = [have.get("CPU", 0) // need.cpu]
    if need.gpu:
        gpus = have.get("GPU", 0)
        counts.append(gpus // need.gpu if need.gpu >= 1 else gpus * (1 // need.gpu))
    return int(min(counts))
