"""Rounded copies, and the comparison of a record with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.parity.common import FEW, Run, Scores, check_runs, check_seeds
from tests.rounding import rounded_model, rounded_tensors
from tests.small import model_hash, random_model

pytestmark = pytest.mark.numeric


def test_the_instruction_set_that_is_asked_for_is_used() -> None:
    """Of ``make test-numeric``: PyTorch would silently take another one for a name that it does not
    know."""
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    if asked:
        assert torch.backends.cpu.get_cpu_capability() == asked.upper()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_the_weights_of_a_copy_are_a_neighbouring_float(dtype: torch.dtype) -> None:
    base = random_model("llama", dtype)
    before = model_hash(base)
    copy, again = rounded_model(base, 1), rounded_model(base, 1)
    assert model_hash(base) == before == model_hash(rounded_model(base, 0))
    assert len({before, model_hash(copy), model_hash(rounded_model(base, 2))}) == 3
    assert model_hash(again) == model_hash(copy)
    moved = []
    for old, new in zip(base.model.parameters(), copy.model.parameters(), strict=True):
        moved.append((old != new).double().flatten())
        assert torch.equal(torch.nextafter(old, new), new)
    assert float(torch.cat(moved).mean()) == pytest.approx(0.5, abs=0.01)  # of all weights


def test_recorded_tensors_have_copies_too() -> None:
    tensors = {"weight": torch.ones(1000), "places": torch.arange(3)}
    copy = rounded_tensors(tensors, 3)
    assert torch.equal(copy["places"], tensors["places"])
    assert sorted(set((copy["weight"] - 1).tolist())) == [-(2.0**-24), 0.0, 2.0**-23]
    assert torch.equal(rounded_tensors(tensors, 0)["weight"], tensors["weight"])


def scores(right: Sequence[int]) -> Scores:
    """Scores of twenty requests, of which ``right`` are answered as asked."""
    one: dict[str, float | None] = {
        "reliability_token": 0.0,
        "generalization_token": 0.0,
        "locality_token": 1.0,
    }
    return [{**one, "reliability_token": float(i in right)} for i in range(20)]


def recorded(right: Sequence[int], norm: float = 1.0) -> dict[str, Any]:
    requests = [{"rewrite": float(i in right), "rephrase": 0.0, "locality": 1.0} for i in range(20)]
    means = {"rewrite_acc": len(right) / 20, "rephrase_acc": 0.0, "locality_acc": 1.0}
    return {"T": 10, "per_request": requests, **means, "delta_fro_per_group": [{"w": norm}]}


def runs_of(*found: Scores, norms: Sequence[float] = (1.0,) * FEW) -> tuple[list[int], Any]:
    """A function that gives these scores copy by copy (the last one from then on), and the copies
    that it was asked for."""
    asked: list[int] = []

    def run(copy: int) -> Run:
        asked.append(copy)
        return Run(found[min(copy, len(found) - 1)], [{"w": norms[copy]}])

    return asked, run


def test_a_run_within_the_tolerances_is_enough() -> None:
    asked, run = runs_of(scores(range(8)))
    check_runs(recorded(range(9)), run, 1e-2)  # one request of twenty may differ
    assert asked == [0]


@pytest.mark.filterwarnings("ignore:one run is not enough")
def test_a_run_that_rounding_explains_is_told_from_a_wrong_one() -> None:
    swinging = [scores(range(n)) for n in (5, 8, 6, 9, 7)]
    asked, run = runs_of(*swinging)
    check_runs(recorded(range(8)), run)  # five to nine are right, and no request on which all agree differs
    assert asked == list(range(FEW))
    _, run = runs_of(scores(range(5)))
    with pytest.raises(AssertionError, match="rewrite: means"):  # three differ, and rounding does not matter
        check_runs(recorded(range(8)), run)
    _, run = runs_of(*swinging)
    with pytest.raises(AssertionError, match="rewrite: means"):  # as many as in a run, but others
        check_runs(recorded([*range(12, 20)]), run)


@pytest.mark.filterwarnings("ignore:one run is not enough")
def test_norms_are_as_near_as_those_of_copies() -> None:
    right = scores(range(8))
    _, run = runs_of(right, norms=(1.0, 1.05, 0.98, 1.0, 1.0))
    check_runs(recorded(range(8), norm=1.08), run, 1e-2)
    _, run = runs_of(right, norms=(1.0, 1.01, 1.0, 1.0, 1.0))
    with pytest.raises(AssertionError, match=r"norms: 0\.0741 from the record"):
        check_runs(recorded(range(8), norm=1.08), run, 1e-2)


def test_seeds() -> None:
    check_seeds([0.1, 0.2, 0.3], 0.5, "wide")  # 4.3 times a standard error of 0.115
    with pytest.raises(AssertionError, match="narrow"):
        check_seeds([0.2, 0.2, 0.21], 0.5, "narrow")
    check_seeds([0.2, 0.2, 0.21], 0.5, "known to be wide", scatter=0.11)  # 2.6 times 0.127
    with pytest.raises(AssertionError, match="still too far"):
        check_seeds([0.2, 0.2, 0.21], 0.5, "still too far", scatter=0.09)
