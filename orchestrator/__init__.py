"""The grid, the engine and the table of a sweep.

>>> import orchestrator
>>> results = orchestrator.open_results("results/demo")            # doctest: +SKIP
>>> results.sql("select method, T, avg(reliability_exact) from edits group by all")   # doctest: +SKIP

Importing this package imports nothing else: ``open_results`` is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.results.query import Results, open_results

__all__ = ["Results", "open_results"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from orchestrator.results import query

        return getattr(query, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
