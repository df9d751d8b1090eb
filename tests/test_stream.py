"""The protocol: what is scored when, and what a stream does not need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contract import near
from tests.small import build_inputs, golden_model, golden_requests, job, random_model, session, timeless
from workers.job import Lane, ScoreConfig, StreamCell, StreamJob
from workers.methods.base import EditOutcome, LaneEdit
from workers.methods.ft import FT as FTMethod
from workers.methods.ft import FTConfig
from workers.methods.rome import ROMEConfig
from workers.methods.wise.config import WISEConfig
from workers.model.base import BaseModel
from workers.model.overlay import Overlay
from workers.scoring.probes import Item, normalise
from workers.scoring.score import score
from workers.stream import StepResult, Stream
from workers.timeline import cut_steps, expected_rows, timeline
from workers.types import EditRequest, Probe

REQUESTS = golden_requests(60)
ROME = ROMEConfig(layer=1, mom2_adjustment=False, v_num_grad_steps=3, context_template_length_params=())
FT = FTConfig(layers=(1,), lr=1e-2, num_steps=4, objective="target_new")


def run(base: BaseModel, work: StreamJob, step: int = 1) -> list[StepResult]:
    stream = Stream(session(base), work, [REQUESTS], {})
    return list(stream.run(cut_steps(work, step)))


def rows_of(results: list[StepResult]) -> list[dict[str, object]]:
    return timeless([row for r in results for row in r.rows])


@pytest.mark.numeric
def test_both_moments_are_recorded_and_the_final_state_is_what_final_scores_see() -> None:
    base = random_model("llama")
    work = job("ft", FT, 5, [[0, 1], [2]])
    rows = rows_of(run(base, work))
    assert len(rows) == expected_rows(work) == 30
    final = {(r["group"], r["position"]): r for r in rows if r["scored"] == "final"}
    immediate = {(r["group"], r["position"]): r for r in rows if r["scored"] == "immediate"}
    assert set(final) == set(immediate) == {(g, p) for g in range(3) for p in range(5)}
    assert all(r["edits_applied"] == 5 for r in final.values())
    assert all(r["edits_applied"] == key[1] + 1 for key, r in immediate.items())
    assert [final[2, p]["case_id"] for p in range(5)] == [str(i) for i in range(10, 15)]
    # the last edit's immediate state is the final one; the first one's has been edited over since
    assert immediate[0, 4]["target_logprob"] == pytest.approx(final[0, 4]["target_logprob"], abs=1e-4)
    assert immediate[0, 0]["target_logprob"] != pytest.approx(final[0, 0]["target_logprob"], abs=1e-3)


def test_groups_start_from_the_pristine_model() -> None:
    base = random_model("llama")
    together = rows_of(run(base, job("ft", FT, 3, [[0], [1]])))
    alone = rows_of(run(random_model("llama"), job("ft", FT, 3, [[1]])))
    assert [r for r in together if r["group"] == 1] == alone


def with_bad(*places: int) -> list[EditRequest]:
    """The requests, some of which cannot be edited."""
    return [replace(r, subject="Nobody") if i in places else r for i, r in enumerate(REQUESTS)]


def two_cells(T: int, method: str = "rome") -> StreamJob:
    """One wave: groups 0 and 1 of one cell, group 0 of another."""
    config = FT if method == "ft" else ROME
    names = {"templates": "templates"} if method == "rome" else {}
    cells = tuple(StreamCell(cell_id=f"seed {seed}", seed=seed, artifacts=names) for seed in (0, 1))
    lanes = (Lane(group=0, stop_group=1), Lane(group=1, stop_group=2), Lane(cell=1, group=0, stop_group=1))
    return StreamJob(method=method, config=config.model_dump(mode="json"), cells=cells, T=T, waves=(lanes,))


@pytest.mark.numeric
def test_a_lane_that_raises_fails_alone() -> None:
    base, work = random_model("llama"), two_cells(3)
    inputs = build_inputs(base, "rome", ROME)
    requests = [with_bad(4), with_bad()]  # in group 1, the second
    stream = Stream(session(base), work, requests, inputs)
    results = list(stream.run(cut_steps(work, 1)))
    (failure,) = [f for r in results for f in r.failures]
    assert (failure.cell_id, failure.group, failure.position, failure.kind) == ("seed 0", 1, 1, "DataError")
    assert "lacks its subject" in failure.message and "Traceback" in failure.trace
    whole = rows_of(list(Stream(session(base), work, [REQUESTS, REQUESTS], inputs).run(cut_steps(work, 1))))
    rows = rows_of(results)
    lost = [r for r in whole if (r["cell_id"], r["group"]) == ("seed 0", 1)]
    # smaller batches round differently: rounded copies of the model move logits by up to 6e-6, on
    # three instruction sets
    assert near(
        [r for r in rows if (r["cell_id"], r["group"]) != ("seed 0", 1)],
        [r for r in whole if r not in lost],
        1e-4,
        logits=1e-4,
    )
    assert [(r["position"], r["scored"]) for r in rows if (r["cell_id"], r["group"]) == ("seed 0", 1)] == [
        (0, "immediate")
    ]
    assert sum(r.edits for r in results) == 3 + 2 + 2
    for i, result in enumerate(results[:-1]):  # however it is cut, the rest is the same to the last bit
        rest = list(
            Stream(session(base), work, requests, inputs).run(cut_steps(work, 1), result.stop, result.state)
        )
        assert rows_of(rest) == rows_of(results[i + 1 :])
        assert [f for r in rest for f in r.failures] == [f for r in results[i + 1 :] for f in r.failures]


def test_lanes_that_raise_one_after_another() -> None:
    base, work = random_model("llama"), two_cells(3)
    inputs = build_inputs(base, "rome", ROME)
    stream = Stream(session(base), work, [with_bad(3, 2), with_bad(1)], inputs)
    results = list(stream.run(cut_steps(work, 1)))
    failed = [(f.cell_id, f.group, f.position) for r in results for f in r.failures]
    assert failed == [("seed 0", 1, 0), ("seed 1", 0, 1), ("seed 0", 0, 2)]
    assert [(r["cell_id"], r["group"], r["position"], r["scored"]) for r in rows_of(results)] == [
        ("seed 0", 0, 0, "immediate"),
        ("seed 1", 0, 0, "immediate"),
        ("seed 0", 0, 1, "immediate"),
    ]


def test_what_was_half_edited_when_it_raised_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, work = random_model("llama"), two_cells(2, "ft")
    whole = rows_of(list(Stream(session(base), work, [REQUESTS, REQUESTS], {}).run(cut_steps(work, 1))))
    edit = FTMethod.edit

    def edits_and_raises(self: FTMethod, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        outcomes = edit(self, overlay, edits)
        if any(request.case_id == "3" for lane in edits for request in lane.requests):
            raise FloatingPointError("too late")
        return outcomes

    monkeypatch.setattr(FTMethod, "edit", edits_and_raises)
    results = list(Stream(session(base), work, [REQUESTS, REQUESTS], {}).run(cut_steps(work, 1)))
    assert [(f.group, f.position, f.kind) for r in results for f in r.failures] == [
        (1, 1, "FloatingPointError")
    ]
    rows = [r for r in rows_of(results) if r["group"] == 0]
    assert near(rows, [r for r in whole if r["group"] == 0], 1e-4)


def test_where_no_lane_raises_alone_all_of_them_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = FTMethod.edit

    def only_alone(self: FTMethod, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if len(edits) > 1:
            raise FloatingPointError("only together")
        return edit(self, overlay, edits)

    monkeypatch.setattr(FTMethod, "edit", only_alone)
    results = run(random_model("llama"), job("ft", FT, 1, [[0, 1], [2]]))
    assert [(f.group, f.message) for r in results for f in r.failures] == [
        (0, "only together"),
        (1, "only together"),
    ]
    assert {r["group"] for r in rows_of(results)} == {2}


def test_one_raises_alone_and_then_the_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = FTMethod.edit

    def picky(self: FTMethod, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if any(request.case_id == "1" for lane in edits for request in lane.requests):
            raise ValueError("not this one")
        if len(edits) > 1:
            raise FloatingPointError("only together")
        return edit(self, overlay, edits)

    monkeypatch.setattr(FTMethod, "edit", picky)
    results = run(random_model("llama"), job("ft", FT, 1, [[0, 1, 2], [3]]))
    failed = [(f.group, f.message) for r in results for f in r.failures]
    assert failed == [(1, "not this one"), (0, "only together"), (2, "only together")]
    assert {r["group"] for r in rows_of(results)} == {3}


def test_one_edit_a_group_takes_one_forward_and_gives_two_rows() -> None:
    work = job("ft", FT, 1, [[0, 1, 2]])
    assert len(timeline(work)) == 1
    rows = rows_of(run(random_model("llama"), work))
    assert len(rows) == 6
    pairs = {(r["group"], r["scored"]): r for r in rows}
    for g in range(3):
        a, b = dict(pairs[g, "immediate"]), dict(pairs[g, "final"])
        assert a.pop("scored") != b.pop("scored")
        assert a == b


def test_checkpoints_score_everything_edited_so_far() -> None:
    rows = rows_of(run(random_model("llama"), job("ft", FT, 6, [[0]], score_at=(2, 4), requests_per_tick=3)))
    marks = [(r["edits_applied"], r["position"]) for r in rows if r["scored"] == "checkpoint"]
    assert marks == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_never_rolling_back_scores_every_t_edits_and_extends() -> None:
    base = random_model("llama")

    def work(first: int, stop: int, T: int = 3) -> StreamJob:
        return StreamJob(
            method="ft",
            config=FT.model_dump(mode="json"),
            cells=(StreamCell(cell_id="cell", seed=0),),
            T=T,
            rollback="never",
            waves=((Lane(group=first, stop_group=stop),),),
            score=ScoreConfig(score_at=(4, 9)),
        )

    whole = rows_of(run(base, work(0, 4)))
    assert len(whole) == expected_rows(work(0, 4))
    final = [(r["group"], r["position"], r["edits_applied"]) for r in whole if r["scored"] == "final"]
    assert final == [(g, p, 3 * g + 3) for g in range(4) for p in range(3)]
    # more edits later: the new groups of a longer stream are the whole stream's, bit for bit
    later = rows_of(run(random_model("llama"), work(2, 4)))
    assert len(later) == expected_rows(work(2, 4))
    key = lambda r: (r["scored"], r["edits_applied"], r["group"], r["position"])  # noqa: E731
    assert sorted(later, key=key) == sorted(
        (r for r in whole if r["group"] >= 2 or (r["scored"] == "checkpoint" and r["edits_applied"] > 6)),
        key=key,
    )
    # T only says when to score: the same edits
    assert [r["loss"] for r in whole if r["scored"] == "immediate"] == [
        r["loss"] for r in rows_of(run(random_model("llama"), work(0, 2, T=6))) if r["scored"] == "immediate"
    ]


def test_steps_cut_anywhere_give_the_same_rows() -> None:
    work = job("ft", FT, 4, [[0, 1], [2]])
    whole = rows_of(run(random_model("llama"), work, step=1000))
    assert rows_of(run(random_model("llama"), work, step=1)) == whole
    assert cut_steps(work, 1000)[-1] == cut_steps(work, 1)[-1] == len(timeline(work))


def test_a_batch_never_crosses_a_group_border() -> None:
    with pytest.raises(ValueError, match="batch_size 4 does not divide T=10"):
        job("ft", FT, 10, [[0]], batch_size=4)
    rows = rows_of(run(random_model("llama"), job("ft", FT, 4, [[0]], batch_size=2)))
    assert [r["edits_applied"] for r in rows if r["scored"] == "immediate"] == [2, 2, 4, 4]


BATCHED = {
    "ft": FTConfig(layers=(1,), lr=1e-2, num_steps=15),
    "wise": WISEConfig(
        layer=1,
        n_iter=8,
        lr=1.0,
        retrieve=False,
        save_freq=2,
        merge_freq=4,
        context_template_length_params=(),
    ),
}


@pytest.mark.numeric
@pytest.mark.parametrize("method", BATCHED)
def test_a_batch_is_edited_by_one_call_and_scored_after_it(method: str) -> None:
    base = random_model("llama")
    config = BATCHED[method]
    inputs = build_inputs(base, method, config)
    work = job(method, config, 4, [[0, 1]], inputs, batch_size=2)
    assert [(t.kind, t.start, t.stop, t.edits_applied) for t in timeline(work)] == [
        ("edit", 0, 2, 2),
        ("edit", 2, 4, 4),
        ("final", 0, 4, 4),
    ]
    stream = Stream(session(base), work, [REQUESTS], inputs)
    results = list(stream.run(cut_steps(work, 1)))
    rows = rows_of(results)
    assert len(rows) == expected_rows(work) == 16
    assert sum(r.edits for r in results) == 8
    immediate = {(r["group"], r["position"]): r for r in rows if r["scored"] == "immediate"}
    final = {(r["group"], r["position"]): r for r in rows if r["scored"] == "final"}
    for group in range(2):
        assert [immediate[group, p]["edits_applied"] for p in range(4)] == [2, 2, 4, 4]
        assert [final[group, p]["edits_applied"] for p in range(4)] == [4] * 4
        for first in (0, 2):  # one call, one loss, one state that both are scored on
            one, other = immediate[group, first], immediate[group, first + 1]
            assert all(one[k] == other[k] for k in ("loss", "iterations", "delta_norm", "overlay_bytes"))
            assert one["target_logprob"] > one["target_logprob_base"] + 1
            assert other["target_logprob"] > other["target_logprob_base"] + 1
        # the last batch's scores are of the final state; the first batch has been edited over since
        for p in (2, 3):
            assert immediate[group, p]["target_logprob"] == pytest.approx(
                final[group, p]["target_logprob"], abs=1e-4
            )
        assert any(
            abs(immediate[group, p]["target_logprob"] - final[group, p]["target_logprob"]) > 1e-3
            for p in (0, 1)
        )
    # stopping between two batches changes nothing
    rest = list(
        Stream(session(random_model("llama")), work, [REQUESTS], inputs).run(
            cut_steps(work, 1), results[0].stop, results[0].state
        )
    )
    assert rows_of(rest) == rows_of(results[1:])


def test_a_method_that_edits_whole_groups_has_one_moment() -> None:
    plain = job("ft", FT, 4, [[0], [1]], batch_size=4)
    work = plain.model_copy(update={"whole_group": True})
    assert len(timeline(work)) == 2
    whole, both = rows_of(run(random_model("llama"), work)), rows_of(run(random_model("llama"), plain))
    assert len(whole) == expected_rows(work) == 8 and len(both) == expected_rows(plain) == 16
    assert whole == [row for row in both if row["scored"] == "final"]
    with pytest.raises(ValueError, match="edits whole groups has batch_size T, not 2"):
        StreamJob.model_validate({**work.model_dump(), "batch_size": 2})


@pytest.mark.numeric
def test_generation_is_greedy_decoding() -> None:
    """The shortcut through the teacher-forced forward against plain token-by-token decoding."""
    base = golden_model("tiny-llama")
    requests = REQUESTS[:40]
    # half of the requests ask for what the model knows already, so that both outcomes occur
    asked = [
        EditRequest(
            r.case_id, r.prompt, r.subject, r.ground_truth if i % 2 else r.target_new, locality=r.locality
        )
        for i, r in enumerate(requests)
        if r.ground_truth is not None
    ]
    scores = score(base, None, [Item(0, r) for r in asked], ScoreConfig())
    expected = []
    for r in asked:
        ids = list(base.encoder.prompt(r.prompt))
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == base.tokenizer.eos_token_id:
                break
            ids.append(token)
            if base.tokenizer.decode(ids[start:]).strip().endswith("."):
                break
        expected.append(float(normalise(base.tokenizer.decode(ids[start:])) == normalise(r.target_new)))
    assert [s["reliability_generated"] for s in scores] == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Paris", True),
        (" paris. ", True),
        ('"Paris"', True),
        ("Paris,  ", True),
        ("Paris France", False),
        ("Pari", False),
    ],
)
def test_normalisation_forgives_case_and_punctuation(text: str, same: bool) -> None:
    assert (normalise(text) == normalise("Paris")) is same


def test_requests_without_probes_have_empty_columns() -> None:
    base = golden_model("tiny-llama")
    bare = EditRequest("x", REQUESTS[0].prompt, REQUESTS[0].subject, "clock maker")
    two = EditRequest(
        "y", bare.prompt, bare.subject, "harp", locality=(Probe("A b", "c"), Probe("D e", "f g"))
    )
    first, second = score(base, None, [Item(0, bare), Item(0, two)], ScoreConfig(generated=False))
    assert first["locality_token"] is first["generalization_exact"] is first["portability_token_base"] is None
    assert first["reliability_generated"] is None
    assert second["locality_token"] == 1.0


@pytest.mark.slow
def test_a_stream_needs_neither_ray_nor_pyarrow(tmp_path: Path) -> None:
    """In a process where importing them fails, a whole stream runs."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "pyarrow", "duckdb", "orchestrator"):
            raise ImportError(f"{name} is not for streams")
sys.meta_path.insert(0, Refuse())
from tests.test_stream import FT, job, random_model, rows_of, run
assert len(rows_of(run(random_model("llama"), job("ft", FT, 2, [[0, 1]])))) == 8
from workers.session import Session
from workers.model.base import ModelConfig
assert not {"ray", "pyarrow", "duckdb", "orchestrator"} & {m.split(".")[0] for m in sys.modules}
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ran")
