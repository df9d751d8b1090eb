"""Plot of the summary: scores over T, one line per method. Needs the ``plots`` extra
(matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workers.optional import optional
from workers.types import EditSweepError

if TYPE_CHECKING:
    from orchestrator.results.report import Row

PANELS = ("reliability", "generalization", "locality")
FORMATS = (".png", ".pdf", ".svg")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the plot to ``path``. Solid lines: scores on a group's final state. Dashed lines, in
    the first panel: scores right after each edit.

    Raises :class:`EditSweepError` if matplotlib is missing or the format is unknown.
    """
    if path.suffix not in FORMATS:
        raise EditSweepError(f"--plot {path}: unknown format {path.suffix!r}; choices: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise EditSweepError(f"--plot {path}: there is no folder {path.parent}")
    figure = optional("matplotlib.figure", "plots", "--plot").Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    methods = list(dict.fromkeys(_title(row) for row in rows))
    for axis, score in zip(axes, PANELS, strict=True):
        for i, method in enumerate(methods):
            of_method = [row for row in rows if _title(row) == method]
            Ts = [row["T"] for row in of_method]
            colour = f"C{i}"
            axis.plot(Ts, [row[f"{score}_exact"] for row in of_method], "o-", color=colour, label=method)
            if score == "reliability":
                axis.plot(Ts, [row["immediate_exact"] for row in of_method], "--", color=colour, alpha=0.5)
        axis.set_xscale("log")
        axis.set_xticks(sorted({row["T"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("T, edits before scoring and rollback")
        axis.set_title(score)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("exact match (dashed: right after the edit)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise EditSweepError(f"--plot {path}: cannot write: {error.strerror or error}") from None


def _title(row: Row) -> str:
    return f"{row['results']}: {row['method']}" if "results" in row else str(row["method"])
