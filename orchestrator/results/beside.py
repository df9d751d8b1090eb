"""The tables beside the central one, declared like it: what the models wrote, what is measured once
per group, and the requests.

Rows of ``outputs`` and ``groups`` are made by the stream with the rows of the central table. They
are committed in the same part and gathered into the same file
(:mod:`orchestrator.results.parquet`), so that they survive whatever the rows survive. The requests
are written by the driver before the first shard that edits them begins.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from orchestrator.results.columns import COLUMNS, EDITS, Column, Declaration
from orchestrator.results.columns import docs as column_docs
from workers.scoring.registry import SCORES

_DECLARED = {column.name: column for column in COLUMNS}


def _same(*names: str) -> tuple[Column, ...]:
    """Columns of the central table that another table has, too."""
    return tuple(_DECLARED[name] for name in names)


OUTPUTS = Declaration(
    "outputs",
    (
        *_same("cell_id", "method", "T", "seed", "group", "position", "case_id", "edits_applied", "scored"),
        Column(
            "probe",
            "string",
            "",
            "the kind of question: reliability (the edit prompt), generalization, locality, portability, ood",
            "identity",
        ),
        Column(
            "number", "int32", "", "its place among the request's questions of this kind, from 0", "identity"
        ),
        Column(
            "how",
            "string",
            "",
            "teacher_forced: the most probable token at each position of the target; generated: the greedy "
            "continuation of the prompt",
            "moment",
        ),
        Column("text", "string", "", "what the edited model wrote, without white space around it", "text"),
        Column(
            "ending",
            "string",
            "",
            "of a generated text: natural, cut (at the limit of tokens), dropped (not continued, because it could "
            "no longer become right)",
            "text",
            nullable=True,
        ),
        Column(
            "correct",
            "bool",
            "",
            "every token of the target, or the normalised target; of locality: as the unedited model",
            "score",
        ),
        Column("text_base", "string", "", "what the unedited model wrote", "text", nullable=True),
        Column("ending_base", "string", "", "how its generated text ended", "text", nullable=True),
        Column("correct_base", "bool", "", "whether the unedited model was right", "score"),
    ),
    ("cell_id", "group", "scored", "edits_applied", "position", "probe", "number", "how"),
    "What the models wrote: one row per question of a request, moment and way of asking, for the requests and "
    "moments that `scoring.keep_outputs` names.",
)

_MEASURED = (
    Column("edits_applied", "int32", "edits", "edits the state had at the group's end", "moment"),
    Column("edit_seconds", "double", "s", "wall time of the group's edits, shared among the lanes", "cost"),
    Column("score_seconds", "double", "s", "wall time of all scoring up to the group's end", "cost"),
    Column("iterations", "int32", "", "optimisation steps of the group's edits", "cost"),
    *_same("lanes", "device", "peak_memory_bytes", "overlay_bytes", "delta_norm"),
    *(_DECLARED[column.name] for column in SCORES.columns if column.score.per_group),
)

GROUPS = Declaration(
    "groups",
    (
        *_same("cell_id"),
        *(replace(column, nullable=True) for column in _same("method", "T", "seed")),
        *_same("group"),
        Column(
            "failed",
            "bool",
            "",
            "true: the group failed, and what is measured is null",
            "identity",
            "reader",
            nullable=True,
        ),
        Column("cause", "string", "", "why it failed", "text", "reader", nullable=True),
        *(replace(column, nullable=True) for column in _MEASURED),
    ),
    ("cell_id", "group"),
    "What is measured once per group: one row per group that is done or has failed.",
)
"""Rows of groups that failed are not stored here: the seals list the failures."""

REQUESTS = Declaration(
    "requests",
    (
        Column(
            "dataset_fingerprint", "string", "", "hash of the data set's requests, as in `cells`", "identity"
        ),
        Column("dataset", "string", "", "data set as named in the spec", "identity"),
        Column("case_id", "string", "", "id of the request in the data set", "identity"),
        Column("prompt", "string", "", "what the model is asked", "text"),
        Column("subject", "string", "", "whom or what the prompt is about", "text"),
        Column("target", "string", "", "the answer that the edit teaches", "text"),
        Column("ground_truth", "string", "", "the true answer", "text", nullable=True),
        Column("rephrases", "strings", "", "the prompt in other words: generalization", "text"),
        Column(
            "probes",
            "probes",
            "",
            "further questions, each with `probe` (locality, portability, ood), `number`, `prompt`, `target`, "
            "`aliases` and `probe_group`",
            "text",
        ),
        Column("unrelated", "string", "", "a sentence about something else", "text", nullable=True),
        Column("passage", "bool", "", "the target is running text, judged by its perplexity", "text"),
        Column("any_of", "bool", "", "the portability questions are phrasings of one question", "text"),
        Column(
            "needs", "int32", "", "requests directly before this one that belong to the same case", "text"
        ),
        Column(
            "joiner",
            "string",
            "",
            "the text between prompt and answer; null: by the script of the prompt",
            "text",
            nullable=True,
        ),
    ),
    ("dataset_fingerprint", "case_id"),
    "The texts of the requests that the folder's cells edit.",
)

COMMITTED: Mapping[str, Declaration] = MappingProxyType({table.name: table for table in (OUTPUTS, GROUPS)})
"""The tables whose rows are committed and gathered with those of the central table."""

STORED: Mapping[str, Declaration] = MappingProxyType(
    {table.name: table for table in (EDITS, OUTPUTS, GROUPS, REQUESTS)}
)
"""All tables whose rows a results folder holds."""


def docs() -> str:
    """Every stored table with its columns, as markdown; the central one first."""
    sections = []
    for of in STORED.values():
        text = f"{of.meaning} Key: {', '.join(f'`{name}`' for name in of.key)}."
        sections.append(f"## {of.name}\n\n{textwrap.fill(text, 100)}\n\n{column_docs(of.columns)}")
    return "\n".join(sections)
