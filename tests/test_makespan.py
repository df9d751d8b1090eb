"""Estimates of time: what was measured counts, and a simulated schedule keeps the bounds it must
keep."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.makespan import GUESSED_SECONDS, Timing, calibrate, simulate, wave_work

DURATIONS = st.lists(st.floats(0.01, 1000), min_size=1, max_size=60)


@settings(max_examples=200)
@given(durations=DURATIONS, actors=st.integers(1, 20))
def test_the_makespan_is_between_the_bound_and_greedy_s_guarantee(
    durations: list[float], actors: int
) -> None:
    found = simulate(durations, actors)
    assert found.makespan >= found.bound * (1 - 1e-9)
    assert found.makespan <= (found.total / actors + (1 - 1 / actors) * found.longest) * (1 + 1e-9)
    assert found.total == pytest.approx(sum(durations))
    assert simulate(durations, 1).makespan == pytest.approx(sum(durations))
    assert simulate(durations, len(durations)).makespan == max(durations)


def best(durations: list[int], actors: int) -> int:
    """The shortest makespan there is, by trying every assignment (up to renaming actors)."""
    loads = {(0,) * actors}
    for duration in durations:
        loads = {
            tuple(sorted((*load[:i], load[i] + duration, *load[i + 1 :])))
            for load in loads
            for i in range(actors)
        }
    return min(max(load) for load in loads)


@settings(max_examples=60)
@given(durations=st.lists(st.integers(1, 30), min_size=1, max_size=9), actors=st.integers(1, 4))
def test_longest_first_is_within_four_thirds_of_the_optimum(durations: list[int], actors: int) -> None:
    found = simulate(sorted(durations, reverse=True), actors)
    assert (
        best(durations, actors)
        <= found.makespan
        <= (4 / 3 - 1 / (3 * actors)) * best(durations, actors) + 1e-9
    )


def test_nothing_to_do_takes_no_time() -> None:
    found = simulate([], 64)
    assert (found.makespan, found.bound, found.ratio) == (0, 0, 1)
    with pytest.raises(ValueError, match="at least one"):
        simulate([1.0], 0)


def test_what_was_measured_is_used_and_the_rest_follows_it() -> None:
    clock = calibrate(
        [Timing(0, 10, 100, 50), Timing(0, 10, 300, 250), Timing(0, 1, 100, 20), Timing(1, 1, 50, 180)]
    )
    assert clock.seconds(0, 10, 8) == pytest.approx(8 * 300 / 400)  # this variant at this T
    assert clock.seconds(0, 100, 8) == pytest.approx(8 * 320 / 500)  # this variant
    assert clock.seconds(7, 1, 8) == pytest.approx(8 * 500 / 550)  # its relative cost, scaled by all there is
    note = clock.note([(0, 10), (0, 100), (7, 1), (7, 10)])
    assert "of 4 (method, T) left, 1 were measured in this folder, 1 follow their method's other T, 2" in note
    nothing = calibrate([Timing(0, 1, 0, 5), Timing(0, 1, 5, 0)])
    assert nothing.seconds(0, 1, 8) == 8 * GUESSED_SECONDS
    assert "nothing has been measured" in nothing.note([(0, 1)])


def test_lanes_make_an_edit_cheaper_and_a_wave_longer() -> None:
    for on_gpu in (False, True):
        works = [wave_work(2.0, 10, 20, lanes, on_gpu) for lanes in (1, 2, 8, 32)]
        assert works == sorted(works)
        shares = [work / lanes for work, lanes in zip(works, (1, 2, 8, 32), strict=True)]
        assert shares == sorted(shares, reverse=True)
        assert wave_work(2.0, 10, 0, 1, on_gpu) == 20
    assert wave_work(2.0, 10, 20, 8, True) < wave_work(2.0, 10, 20, 8, False)
