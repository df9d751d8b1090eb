"""Checks of every node before the first shard runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.engine.books import Books
from orchestrator.engine.machine import check_memory, versions
from orchestrator.planning.spec import Resources
from orchestrator.storage.base import StoreError
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from workers.model.config import ModelConfig, fingerprint_model
from workers.types import EditSweepError

PREFLIGHT_SECONDS = 180.0


class ClusterError(EditSweepError):
    """Ray cannot be reached, or a node cannot do the work. The message names node and cause."""


@dataclass(frozen=True)
class _Question:
    """The question that every node answers before the first shard."""

    root: str
    nonce: str
    run_id: str
    model: ModelConfig
    weight_bytes: int
    resources: Resources


@dataclass(frozen=True)
class _Answer:
    host: str
    nonce: str
    versions: dict[str, str]
    fingerprint: str
    problem: str = ""


@ray.remote(num_cpus=0, max_retries=1)
def _prove(question: _Question, node: str) -> _Answer:
    """Runs on a node: reads and writes the results folder, hashes the model, looks at memory."""
    host = socket.gethostname()
    paths = ResultsPaths()
    store = open_store(question.root)
    try:
        nonce = store.read(paths.log(f"preflight-{question.run_id}")).decode()
    except StoreError as error:
        return _Answer(host, "", versions(), "", f"it does not see the results folder ({error})")
    try:
        store.replace(paths.log(f"preflight-{question.run_id}-{node}"), nonce.encode())
        fingerprint = fingerprint_model(question.model)
        resources = question.resources
        check_memory(question.model, question.weight_bytes, resources.gpu, resources.memory_gb, where=host)
    except EditSweepError as error:
        return _Answer(host, nonce, versions(), "", str(error))
    return _Answer(host, nonce, versions(), f"{fingerprint.model}:{fingerprint.tokenizer}")


def check_nodes(books: Books) -> int:
    """Let every node that can hold an actor prove itself; how many actors they hold together."""
    plan, store, paths = books.plan, books.store, books.paths
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
    store.replace(paths.log(f"preflight-{books.run_id}"), nonce.encode())
    question = _Question(
        store.where(), nonce, books.run_id, plan.common.model, plan.weight_bytes, plan.spec.engine.resources
    )
    asked = {
        node: _prove.options(
            num_gpus=resources.gpu, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(question, node)
        for node in able
    }
    problems = []
    mine = versions()
    expected = f"{plan.common.model_fingerprint}:{plan.common.tokenizer_fingerprint}"
    for node, ref in asked.items():
        name = nodes[node]["NodeManagerHostname"]
        try:
            answer: _Answer = ray.get(ref, timeout=PREFLIGHT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{name}: no answer within {PREFLIGHT_SECONDS:.0f} seconds")
            continue
        except ray.exceptions.RayError as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[-1][:500]}")
            continue
        problems += [f"{name}: {problem}" for problem in _problems(answer, nonce, mine, expected)]
        back = paths.log(f"preflight-{books.run_id}-{node}")
        if not answer.problem:
            if not store.exists(back):
                problems.append(
                    f"{name}: what it writes into {store.where()} is not seen here; use a shared folder"
                )
            store.delete(back)
    store.delete(paths.log(f"preflight-{books.run_id}"))
    if problems:
        raise ClusterError("the cluster is not ready:\n  " + "\n  ".join(problems))
    return sum(able.values())


def _problems(answer: _Answer, nonce: str, mine: Mapping[str, str], fingerprint: str) -> Iterator[str]:
    """List the problems in one node's answer."""
    different = [
        f"{name} {answer.versions.get(name)} (here {version})"
        for name, version in mine.items()
        if answer.versions.get(name) != version
    ]
    if different:
        yield f"other versions than the driver's: {', '.join(different)}"
    if answer.problem:
        yield answer.problem
    elif answer.nonce != nonce:
        yield (
            "the results folder of this name is another one there; results must be on a folder that all "
            "nodes share"
        )
    elif answer.fingerprint != fingerprint:
        yield "the model's files differ from the driver's (another version of the weights or the tokenizer)"


def _actors_on(have: Mapping[str, float], need: Resources) -> int:
    counts = [have.get("CPU", 0) // need.cpu]
    if need.gpu:
        gpus = have.get("GPU", 0)
        counts.append(gpus // need.gpu if need.gpu >= 1 else gpus * (1 // need.gpu))
    return int(min(counts))
