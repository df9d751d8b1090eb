"""The Python interface of editsweep: plan a sweep, run it, read its table.

>>> import editsweep
>>> small = ["dataset.edits=4", "grid.T=[1,4]", "grid.seeds=[0]", "methods=[ft]"]
>>> plan = editsweep.plan("sweeps/demo.yaml", overrides=small)
>>> len(plan.cells), plan.edits_left
(2, 7)
>>> outcome = editsweep.run("sweeps/demo.yaml", "results/ft", overrides=small, engine="local")
>>> outcome.unfinished
()
>>> results = editsweep.open_results(outcome.folder)
>>> results.sql("SELECT T, count(*) AS edits FROM edits WHERE scored = 'final' GROUP BY T ORDER BY T").to_pylist()
[{'T': 1, 'edits': 4}, {'T': 4, 'edits': 4}]

Each function does what the command of the same name does. An error in the spec raises an
:class:`EditSweepError`. Importing this package does not import torch, Ray or Arrow: the functions
import them when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from orchestrator.engine.run_state import Outcome, View
    from orchestrator.planning.plan import Plan
    from orchestrator.planning.spec import SweepSpec
    from orchestrator.results.query import Results, Union
    from workers.types import EditSweepError

__all__ = ["EditSweepError", "Outcome", "Plan", "Results", "SweepSpec", "View", "open_results", "plan", "run"]

_MODULE_OF = {
    "EditSweepError": "workers.types",
    "Outcome": "orchestrator.engine.run_state",
    "Plan": "orchestrator.planning.plan",
    "Results": "orchestrator.results.query",
    "SweepSpec": "orchestrator.planning.spec",
    "View": "orchestrator.engine.run_state",
}
"""Public class -> the module it is imported from, when it is first used."""


def plan(
    spec: SweepSpec | str | os.PathLike[str],
    results: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    retry_failed: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan the unfinished part of a sweep. Runs nothing and writes nothing.

    Args: spec: The sweep's YAML file, or a spec that was read before. results: The folder whose
        finished work is subtracted (default: ``results/<name of the sweep>``). overrides: Fields to
        override, as in ``["grid.T=[1,10]"]``. only: Cells to plan, as in
        ``["method=wise,T=1000"]``; none means all. retry_failed: Plan the groups that failed in an
        earlier run as well. trust_remote_code: Allow the model's own code to run; the spec must ask
        for it too.
    """
    from orchestrator.engine.sweep import plan_sweep
    from orchestrator.planning.spec import default_results, naming
    from orchestrator.storage.open import open_store

    read, source = _read(spec, overrides, trust_remote_code)
    _check_texts("only", only, "method=wise,T=1000")
    store = open_store(default_results(read) if results is None else results)
    with naming(source):
        return plan_sweep(read, store, only=only, retry_failed=retry_failed)


def run(
    spec: SweepSpec | str | os.PathLike[str],
    results: str | os.PathLike[str] | None = None,
    *,
    engine: Literal["ray", "local"] = "ray",
    max_actors: int | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    retry_failed: bool = False,
    redo_outdated: bool = False,
    trust_remote_code: bool = False,
    runtime_env: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    view: View | None = None,
) -> Outcome:
    """Run the unfinished part of a sweep. After an interruption, the same call continues it.

    Args: spec: The sweep's YAML file, or a spec that was read before. results: The results folder,
        or ``s3://bucket/prefix`` (default: ``results/<name of the sweep>``). engine: ``ray`` for
        many processes and machines, ``local`` for this process. max_actors: Shards in flight at
        most (default: the spec's ``engine.max_actors``). overrides: Fields to override, as in
        ``["grid.T=[1,10]"]``. only: Cells to run, as in ``["method=wise,T=1000"]``; none means all.
        retry_failed: Run the groups that failed in an earlier run as well. redo_outdated: Remove the
        rows of cells that other code has made, and run these cells again. trust_remote_code: Allow
        the model's own code to run; the spec must ask for it too. runtime_env: Ray's ``runtime_env``
        for the workers, or a YAML file with it; it may run code on every node, so a spec cannot
        hold it. view: Receives the progress
        (default: notes and warnings go to the logger ``editsweep``).

    Returns: How the run ended: ``unfinished`` cells, ``errors`` by shard, and the ``folder`` for
        :func:`open_results`. A failed cell raises no exception; it is among ``unfinished``.
    """
    from editsweep.view import LogView
    from orchestrator.engine.sweep import engine_named, run_sweep
    from orchestrator.planning.runtime_env import check_runtime_env, read_runtime_env
    from orchestrator.planning.spec import default_results, naming
    from orchestrator.storage.open import open_store
    from workers.types import EditSweepError

    read, source = _read(spec, overrides, trust_remote_code)
    _check_texts("only", only, "method=wise,T=1000")
    if max_actors is not None and (type(max_actors) is not int or max_actors < 1):
        raise EditSweepError(f"max_actors: expected a whole number of at least 1, found {max_actors!r}")
    if isinstance(runtime_env, (str, os.PathLike)):
        runtime_env = read_runtime_env(runtime_env)
    elif runtime_env is not None:
        runtime_env = check_runtime_env(runtime_env, "runtime_env")
    store = open_store(default_results(read) if results is None else results)
    with naming(source):
        return run_sweep(
            read,
            store,
            engine_named(engine, read, runtime_env),
            view or LogView(),
            max_actors,
            only=only,
            retry_failed=retry_failed,
            redo_outdated=redo_outdated,
        )


@overload
def open_results(folder: str | os.PathLike[str], /) -> Results: ...


@overload
def open_results(folder: str | os.PathLike[str], /, *more: str | os.PathLike[str]) -> Results | Union: ...


def open_results(folder: str | os.PathLike[str], /, *more: str | os.PathLike[str]) -> Results | Union:
    """Open a results folder, or ``s3://bucket/prefix``, for reading; several are one table. A sweep
    may write to it at the same time."""
    from orchestrator.results import query

    return query.open_results(folder, *more)


def _read(
    spec: SweepSpec | str | os.PathLike[str], overrides: Sequence[str], trust_remote_code: bool
) -> tuple[SweepSpec, str]:
    """The spec with its overrides, and its name in error messages."""
    from orchestrator.planning.spec import SweepSpec, check_trust, load_spec, override_spec
    from workers.types import EditSweepError

    _check_texts("overrides", overrides, "grid.T=[1,10]")
    if not isinstance(spec, (SweepSpec, str, os.PathLike)):
        raise EditSweepError(f"spec: expected the path of a YAML file or a SweepSpec, found {spec!r}")
    if isinstance(spec, SweepSpec):
        read, source = override_spec(spec, overrides), f"the sweep {spec.name!r}"
    else:
        read, source = load_spec(Path(spec), overrides), str(spec)
    check_trust(read, source, trust_remote_code, "trust_remote_code=True")
    return read, source


def _check_texts(name: str, value: Sequence[str], example: str) -> None:
    """Refuses a single text: a text is a sequence, too, of its characters."""
    from workers.types import EditSweepError

    texts = isinstance(value, Sequence) and not isinstance(value, str)
    if not texts or not all(isinstance(one, str) for one in value):
        raise EditSweepError(f"{name}: expected a list of texts, as in [{example!r}], found {value!r}")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
