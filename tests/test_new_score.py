"""Adding a score: one file and one line of a registry. The rows of a stream, the columns of the
table, their documentation and what identifies a sweep's scoring follow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.results.columns import COLUMNS, TableError, columns, docs, rows_to_table
from tests.small import golden_requests, job, random_model, session, timeless
from workers.job import StreamJob
from workers.methods.ft import FTConfig
from workers.scoring.registry import SCORES, Registry
from workers.stream import Stream
from workers.timeline import cut_steps
from workers.types import SpecError

PER_REQUEST = """
from workers.scoring.declare import RequestScore, Score


def _measure(request, asked, settings):
    (one,) = (one for one in asked if one.probe.kind == "reliability")
    return {"first_right": float(one.after.hits(one.probe.scored)[0]),
            "first_right_base": float(one.before.hits(one.probe.scored)[0])}


FIRST_RIGHT = RequestScore(
    scores=(Score("first_right", "1 if the first token of the target is predicted", unit="0..1", probe="reliability"),),
    measure=_measure,
)
"""
AT_A_GROUPS_END = """
from pydantic import Field

from workers.scoring.declare import GroupEndScore, Score, Settings


class DriftConfig(Settings):
    words: int = Field(0, ge=0, alias="drift_words", description="words of the prompt that are read; 0: not measured")

    @property
    def on(self):
        return self.words > 0

    def longest(self, tokens):
        return tokens + self.words


def _begin(base, config, settings):
    import torch

    def measure(state):
        def norms():
            return {lane: state.overlay.delta_norm(lane) for lane in state.lanes}

        found = state.once(norms)
        return [{"drift": found[item.lane], "drift_words": settings.words} for item in state.items]

    assert torch.is_tensor(base.model.get_input_embeddings().weight)
    return measure


DRIFT = GroupEndScore(
    scores=(
        Score("drift", "norm of the change", when="in final rows only", base=False),
        Score("drift_words", "words that were read", unit="words", type="int32",
              when="not in immediate rows", base=False),
    ),
    settings=DriftConfig,
    begin=_begin,
)
"""
FT = FTConfig(layers=(1,), lr=1e-2, num_steps=2, objective="target_new")
REQUESTS = golden_requests(8)


def loaded(folder: Path, name: str, text: str) -> Iterator[ModuleType]:
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture
def scores(tmp_path: Path) -> Iterator[Registry]:
    """The registry with two more lines, each a score of a file of its own."""
    for first in loaded(tmp_path, "first_right_score", PER_REQUEST):
        for drift in loaded(tmp_path, "drift_score", AT_A_GROUPS_END):
            yield SCORES.with_line(first.FIRST_RIGHT).with_line(drift.DRIFT)


def rows_of(work: StreamJob, scores: Registry, step: int = 1000) -> list[dict[str, Any]]:
    stream = Stream(session(random_model("llama")), work, [REQUESTS], {}, scores)
    return [row for result in stream.run(cut_steps(work, step)) for row in result.rows]


def work_of(**score: Any) -> StreamJob:
    return job("ft", FT, 4, [[0, 1]], score_at=(2,), generated=False, **score)


NEW = ["first_right", "first_right_base", "drift", "drift_words"]


def test_it_runs_through_a_stream_into_the_table(scores: Registry) -> None:
    rows = rows_of(work_of(drift_words=3), scores)
    assert {row["scored"] for row in rows} == {"immediate", "checkpoint", "final"}
    for row in rows:
        assert row["first_right"] in (0.0, 1.0) and row["first_right_base"] in (0.0, 1.0)
        assert row["first_right"] >= row["reliability_exact"]
        assert (row["drift"] is not None) == (row["scored"] == "final")
        assert row["drift_words"] == (None if row["scored"] == "immediate" else 3)
    final = [row for row in rows if row["scored"] == "final"]
    assert all(row["drift"] == row["delta_norm"] > 0 for row in final)
    assert timeless(rows_of(work_of(drift_words=3), scores, 1)) == timeless(rows), (
        "where a stream commits changes no bit"
    )

    declared = columns(scores)
    names = [column.name for column in declared]
    assert [name for name in names if name in NEW] == NEW
    assert [column for column in declared if column.name not in NEW] == list(COLUMNS)
    assert names.index("first_right") == names.index(SCORES.columns[-1].name) + 1, (
        "a new score's columns stand last"
    )
    others = {column.name: None for column in declared if column.source != "stream" and column.nullable}
    others |= {
        c.name: 0 if c.type.startswith("int") else "x"
        for c in declared
        if c.source != "stream" and not c.nullable
    }
    table = rows_to_table([{**others, **row} for row in rows], declared)
    assert table.schema.names == names
    assert table["drift"].to_pylist() == [row["drift"] for row in rows]
    assert str(table.schema.field("drift_words").type) == "int32"
    with pytest.raises(TableError, match="unknown columns"):
        rows_to_table([{**others, **rows[0]}])
    text = docs(declared)
    assert (
        "| `drift` | double |  | score | yes | norm of the change; in final rows only, and off unless the "
        "spec asks" in text
    )
    assert (
        "| `first_right_base` | double | 0..1 | score | yes | 1 if the first token of the target is "
        "predicted; the un" in text
    )


def test_it_changes_no_other_value(scores: Registry) -> None:
    for drift in ({}, {"drift_words": 3}):
        rows = timeless(rows_of(work_of(**drift), scores))
        assert all(row["drift"] is None for row in rows) == (not drift)
        assert [{k: v for k, v in row.items() if k not in NEW} for row in rows] == timeless(
            rows_of(work_of(), SCORES)
        )


def test_its_settings_are_read_and_enter_the_identity_where_they_are_on(scores: Registry) -> None:
    plain, on = scores.read({}), scores.read({"drift_words": 3, "fluency_top_k": 2})
    assert plain.model_extra is not None and plain.model_extra["drift_words"] == 0
    assert scores.identity(plain) == SCORES.identity(SCORES.read({}))
    assert scores.shard_key(plain) == SCORES.shard_key(SCORES.read({}))
    assert scores.identity(on) == {**scores.identity(plain), "drift_words": 3}
    assert scores.shard_key(on) == {**scores.shard_key(plain), "drift_words": 3, "fluency_top_k": 2}
    assert (scores.longest(plain, 40), scores.longest(on, 40)) == (40, 43)
    assert type(on).model_validate_json(on.model_dump_json()) == on
    with pytest.raises(ValidationError, match=r"(?s)drift_words.*greater than or equal to 0"):
        scores.read({"drift_words": -1})
    with pytest.raises(ValidationError, match=r"unknown key 'drift_word' \(did you mean 'drift_words'\?\)"):
        scores.read({"drift_word": 3})
    with pytest.raises(SpecError, match="unknown keys drift_words; valid keys: immediate"):
        rows_of(work_of(drift_words=3), SCORES)


def test_identities_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Written down as commit 393dd08 gave them: folders and shard ids compare equal."""
    text = tmp_path / "held_out.txt"
    text.write_text("A held-out text.\n")
    given = {
        "fluency_tokens": 8,
        "ability_text": str(text),
        "ability_window": 64,
        "rows_per_batch": 9,
        "score_at": [2],
    }
    on = SCORES.read(given)
    core = {"immediate": True, "generated": True, "score_at": [2], "extra_tokens": 4}
    batches = {"rows_per_batch": 9, "tokens_per_batch": 1024, "requests_per_tick": 25}
    ability = {"ability_text": "e4ea0d3e2996e19c", "ability_tokens": 2048, "ability_window": 64}
    assert SCORES.identity(on) == {**core, "fluency_tokens": 8, "fluency_top_k": 5, **ability}
    assert SCORES.shard_key(on) == {
        **core,
        **batches,
        "fluency_tokens": 8,
        "ability_text": str(text),
        "ability_window": 64,
    }
    off = SCORES.read({"fluency_top_k": 2, "ability_tokens": 9})
    core = {**core, "score_at": []}
    assert SCORES.identity(off) == core
    assert SCORES.shard_key(off) == {
        **core,
        **batches,
        "rows_per_batch": 256,
        "fluency_top_k": 2,
        "ability_tokens": 9,
    }
    assert list(SCORES.read({}).model_dump(mode="json")) == [
        "immediate",
        "generated",
        "score_at",
        "rows_per_batch",
        "tokens_per_batch",
        "requests_per_tick",
        "extra_tokens",
        "keep_outputs",
        "fluency_tokens",
        "fluency_top_k",
        "ability_text",
        "ability_tokens",
        "ability_window",
    ]
