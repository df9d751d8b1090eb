"""Frozen lanes, ticks at a group's end, even teams, and layers whose arguments the reduced pass
does not know."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.planning.packing import _even
from tests.small import build_inputs, golden_requests, job, random_model, session
from tests.test_stream import REQUESTS, ROME, two_cells, with_bad
from workers.inner_loop.suffix import Suffix, _can_cut
from workers.job import ScoreConfig
from workers.methods.ft import FTConfig
from workers.model.base import BaseModel
from workers.model.batch import Batch, collate
from workers.model.overlay import unpack_states
from workers.stream import Stream
from workers.timeline import cut_steps, moments, timeline


def test_a_lane_that_raised_starts_again_from_the_pristine_state() -> None:
    """Another lane's requests take its place in the batch: all that is in it then is that lane's
    edit of this tick."""
    base, work = random_model("llama"), two_cells(3)
    inputs = build_inputs(base, "rome", ROME)
    stream = Stream(session(base), work, [with_bad(4), with_bad()], inputs)
    (result,) = (r for r in stream.run(cut_steps(work, 1)) if r.failures)
    states, meta = unpack_states(result.state or b"")
    assert (meta["dead"], meta["raised"]) == ([1], [[1, 1]])
    changes = [state.tensors["left"] @ state.tensors["right"] for state in states]
    alone = stream.method.new_overlay(1)
    stream.method.edit(alone, [stream._lane_edit(work.waves[0][0], stream.ticks[1])])
    expected = alone.state(0).tensors["left"] @ alone.state(0).tensors["right"]
    torch.testing.assert_close(changes[1], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert (changes[0] - expected).norm() > 0.1 * expected.norm()  # that lane has its first edit in it, too


def test_a_lane_whose_numbers_stop_being_finite_is_put_back_to_the_pristine_state() -> None:
    base = random_model("llama")
    config = FTConfig(layers=(1,), lr=3e38, num_steps=4, objective="target_new")
    work = job("ft", config, 3, [[0, 1]])
    results = list(Stream(session(base), work, [REQUESTS], {}).run(cut_steps(work, 1)))
    failed = [(f.group, f.position, f.kind) for r in results for f in r.failures]
    assert failed == [(0, 0, "diverged"), (1, 0, "diverged")]
    states, meta = unpack_states(results[0].state or b"")
    assert [dict(state.tensors) for state in states] == [{}, {}]
    assert meta["dead"] == [0, 1]


def ticks_of(T: int, score_at: tuple[int, ...], **score: Any) -> list[tuple[str, int, int, int]]:
    work = job("ft", FTConfig(layers=(1,)), T, [[0]], score_at=score_at, **score)
    return [(tick.kind, tick.start, tick.stop, tick.edits_applied) for tick in timeline(work)]


def test_at_a_groups_end_its_requests_are_scored_once() -> None:
    edits = [("edit", i, i + 1, i + 1) for i in range(4)]
    assert ticks_of(4, ()) == [*edits, ("final", 0, 4, 4)]
    assert ticks_of(4, (2,)) == [*edits[:2], ("checkpoint", 0, 2, 2), *edits[2:], ("final", 0, 4, 4)]
    assert ticks_of(4, (2, 4)) == [*edits[:2], ("checkpoint", 0, 2, 2), *edits[2:], ("final", 0, 4, 4)]
    assert ticks_of(4, (4,), requests_per_tick=3) == [*edits, ("final", 0, 3, 4), ("final", 3, 4, 4)]
    assert ticks_of(1, (1,)) == edits[:1]  # one forward gives both moments


def test_without_rollback_a_checkpoint_is_written_at_every_groups_end_but_the_first() -> None:
    """The final rows of the first group are all there is at that moment; later the checkpoint
    covers earlier groups, too."""
    config = FTConfig(layers=(1,)).model_dump(mode="json")
    one = job("ft", FTConfig(layers=(1,)), 2, [[0]])
    (lane,) = one.waves[0]
    wave = (lane.model_copy(update={"stop_group": 2}),)
    score = ScoreConfig(score_at=(2, 4))
    work = one.model_copy(update={"rollback": "never", "waves": (wave,), "score": score, "config": config})
    ticks = [(tick.kind, tick.start, tick.stop, tick.edits_applied) for tick in timeline(work)]
    assert ticks == [
        ("edit", 0, 1, 1),
        ("edit", 1, 2, 2),
        ("final", 0, 2, 2),
        ("edit", 2, 3, 3),
        ("edit", 3, 4, 4),
        ("final", 2, 4, 4),
        ("checkpoint", 0, 4, 4),
    ]
    rows = Counter(
        (tick.edits_applied, position, scored)
        for tick in timeline(work)
        for scored in moments(work, tick, wave[0])
        for position in range(tick.start, tick.stop)
    )
    assert set(rows.values()) == {1}


@pytest.mark.parametrize(
    ("members", "most", "sizes"), [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (4, 4, [4]), (5, 4, [3, 2])]
)
def test_teams_are_few_and_even(members: int, most: int, sizes: list[int]) -> None:
    teams = list(_even(range(members), most))
    assert [len(team) for team in teams] == sizes
    assert [member for team in teams for member in team] == list(range(members))


def test_any_number_of_members_is_divided_evenly() -> None:
    for members in range(1, 40):
        for most in (1, 2, 3, 5, 8, 64):
            sizes = [len(team) for team in _even(range(members), most)]
            assert sum(sizes) == members and max(sizes) <= most
            assert len(sizes) == (members + most - 1) // most
            assert max(sizes) - min(sizes) <= 1


def alike(base: BaseModel) -> Batch:
    """Two texts of as many tokens, so that one triangle is the mask of both."""
    by_length: dict[int, list[Any]] = {}
    for request in golden_requests(60):
        pair = base.encoder.pair(request.prompt, request.target_new)
        found = by_length.setdefault(len(pair.ids), [])
        if all(pair.ids != other.ids for other in found):
            found.append(pair)
        if len(found) == 2:
            return collate(found, [0, 0], base.encoder.pad_id)
    raise AssertionError("no two requests of one length")


def given_to_layers(base: BaseModel, change: Any) -> None:
    for layer in base.layers:
        layer.register_forward_pre_hook(lambda _m, args, kwargs: (args, change(kwargs)), with_kwargs=True)


@pytest.mark.parametrize("what", ["a mask without the axis of heads", "a tensor of an unknown name"])
@pytest.mark.parametrize("first", [0, 3])
def test_layers_with_arguments_that_cannot_be_cut_run_whole(what: str, first: int) -> None:
    base = random_model("llama", torch.float64)
    rows = alike(base)
    width = rows.input_ids_BS.shape[1]
    expected = base.hidden_states(rows)
    triangle = torch.ones(width, width, dtype=torch.bool).tril()
    extra = (
        {"attention_mask": triangle}
        if what.startswith("a mask")
        else {"weights_of_rows": torch.ones(2, width)}
    )
    reads = ([0, 1], [width - 1, width - 2])
    known = Suffix.capture(base, base.site(1), rows, reads, first)
    assert known._layers is not None and known.first == first
    change = torch.zeros_like(known.output_BSO)
    change[:, first:] = 1.0
    changed = known.hidden((known.output_BSO + change)[:, first:])
    given_to_layers(base, lambda kwargs: {**kwargs, **extra})
    suffix = Suffix.capture(base, base.site(1), rows, reads, first)
    assert (suffix._layers, suffix.first) == (None, 0)
    # 2e-6: the norms of this model round to float32
    torch.testing.assert_close(suffix.hidden(suffix.output_BSO), expected[reads], rtol=0, atol=2e-6)
    torch.testing.assert_close(suffix.hidden(suffix.output_BSO + change), changed, rtol=0, atol=2e-6)
    assert (changed - expected[reads]).abs().max() > 1e-2


def test_which_arguments_can_be_cut() -> None:
    mask, table = torch.ones(2, 1, 5, 5), torch.ones(2, 5, 4)
    assert _can_cut("attention_mask", mask) and _can_cut("attention_mask", (mask, mask))
    for other in (mask[0], mask[0, 0], (mask, mask[0]), [mask[0]]):
        assert not _can_cut("attention_mask", other)
    assert _can_cut("position_embeddings", (table, table)) and _can_cut("position_ids", table[..., 0])
    assert not _can_cut("alibi", table) and not _can_cut("alibi", (None, table))
    assert _can_cut("alibi", None) and _can_cut("training", (True, "sdpa"))


def test_layers_are_modules_with_hooks() -> None:
    """What the tests above rely on: an argument that a hook adds reaches the layer."""
    base = random_model("llama")
    seen: list[str] = []
    given_to_layers(base, lambda kwargs: {**kwargs, "weights_of_rows": torch.ones(1)})
    layer: nn.Module = base.layers[0]
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.extend(kwargs), with_kwargs=True)
    base.hidden_states(alike(base))
    assert "weights_of_rows" in seen
