"""Do our methods stand in the order in which a published table has them?

    python benchmarks/compare_published.py results/all_methods docs/published/wise_table2_zsre.csv --model LLaMA-2-7B

Scores of another model and another data set cannot be compared; which of two methods is better at
the same T can. For every pair that the published table separates by more than ``--margin``, this
counts whether the results folder agrees, per T and per score (share of right tokens, final state),
and lists the pairs that it has the other way round by more than the margin.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import sys
from pathlib import Path

from orchestrator.results.query import open_results

LOG = logging.getLogger("compare")

OURS = {
    "FT-L": "ft-l",
    "FT-EWC": "ft-ewc",
    "MEND": "mend",
    "ROME": "rome",
    "MEMIT": "memit",
    "MEMIT-MASS": "memit-mass",
    "DEFER": "defer",
    "GRACE": "grace",
    "WISE": "wise-merge",
}
"""Names in the published table and the labels of ``sweeps/all_methods.yaml``."""

SCORES = ("reliability", "generalization", "locality", "average")
SQL = """
SELECT method, T, avg(reliability_token) AS reliability, avg(generalization_token) AS generalization,
       avg(locality_token) AS locality
FROM edits WHERE scored = 'final' GROUP BY ALL
"""

Table = dict[tuple[str, int], dict[str, float]]


def published(path: Path, model: str) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["method"] in OURS]
    if not rows:
        raise SystemExit(f"{path}: no rows of model {model!r}")
    return {(OURS[r["method"]], int(r["T"])): {s: float(r[s]) for s in SCORES} for r in rows}


def measured(folder: Path) -> Table:
    found: Table = {}
    for row in open_results(folder).sql(SQL).to_pylist():
        scores = {s: float(row[s]) for s in SCORES[:3]}
        found[row["method"], row["T"]] = {**scores, "average": sum(scores.values()) / 3}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--model", default="LLaMA-2-7B")
    parser.add_argument("--margin", type=float, default=0.1, help="scores closer than this count as equal")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    theirs, ours = published(args.table, args.model), measured(args.results)
    LOG.info("| T | score | pairs apart there | same order here | the other way round |")
    LOG.info("| --- | --- | --- | --- | --- |")
    for T in sorted({T for _, T in theirs} & {T for _, T in ours}):
        methods = [m for m in OURS.values() if (m, T) in theirs and (m, T) in ours]
        for score in SCORES:
            apart = same = 0
            against = []
            for a, b in itertools.combinations(methods, 2):
                there = theirs[a, T][score] - theirs[b, T][score]
                here = ours[a, T][score] - ours[b, T][score]
                if abs(there) <= args.margin:
                    continue
                apart += 1
                same += there * here > 0
                if there * here < 0 and abs(here) > args.margin:
                    better, worse = (a, b) if here > 0 else (b, a)
                    against.append(f"{better} above {worse}")
            LOG.info("| %d | %s | %d | %d | %s |", T, score, apart, same, ", ".join(against) or "none")


if __name__ == "__main__":
    main()
