"""A pytest plugin that measures how much of each numeric tolerance is used, also on rounded copies
of the models.

    python -m pytest -p tests.margins --rounded 3 tests/parity       # the third copy of every model
    python -m pytest -p tests.margins --least 0.1 tests/test_suffix.py

Two correct processors round differently, and so do a model and a copy of it whose weights are moved
to a neighbouring float. A tolerance that such copies use up is too small, whatever one machine
gives. At its end a run lists each comparison (``pytest.approx``, ``assert_close``,
``relative_error``, norms of records) with the part of its tolerance that was used: one is all of
it. A comparison that expects a difference (``!= approx``) is listed with more than one.
"""

from __future__ import annotations

import functools
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.small
from tests.parity import common
from tests.rounding import rounded_model, rounded_tensors

TESTS = Path(__file__).parent
HELPERS = {TESTS / "margins.py", TESTS / "parity" / "common.py", TESTS / "small.py"}


class Margins:
    """The largest part of its tolerance that each line of each test has used."""

    def __init__(self, least: float) -> None:
        self.least = least
        self.test = ""
        self.used: dict[tuple[str, str, int], float] = {}

    def note(self, used: float | Callable[[str], float]) -> None:
        """Record a comparison of the innermost line of a test, which a function is given as
        text."""
        frame = sys._getframe(1)
        while frame is not None and (
            TESTS not in (path := Path(frame.f_code.co_filename)).parents or path in HELPERS
        ):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            return
        line = linecache.getline(str(path), frame.f_lineno).strip()
        key = (self.test, line, frame.f_lineno)
        self.used[key] = max(self.used.get(key, 0.0), used(line) if callable(used) else used)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.test = item.nodeid
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"tolerances used to {self.least:g} or more")
        for (test, line, number), used in sorted(self.used.items(), key=lambda entry: -entry[1]):
            if used >= self.least:
                terminalreporter.write_line(f"{used:9.3g}  {test}, line {number}: {line}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounded", type=int, default=0, help="the number of the rounded copies of all models; 0: the models"
    )
    parser.addoption("--least", type=float, default=0.1, help="list what uses so much of its tolerance")


def pytest_configure(config: pytest.Config) -> None:
    margins = Margins(config.getoption("--least"))
    config.pluginmanager.register(margins)
    seed = config.getoption("--rounded")
    if seed:
        for name in ("random_model", "golden_model"):
            _wrap(tests.small, name, lambda base: rounded_model(base, seed))
        common.golden_model = tests.small.golden_model
        _wrap(common, "core", lambda tensors: rounded_tensors(tensors, seed))
    _watch(margins)


def _wrap(module: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Replace a function of a module by one that changes what it returns. Tests import the name
    later."""
    original = getattr(module, name)
    setattr(
        module, name, functools.wraps(original)(lambda *args, **kwargs: change(original(*args, **kwargs)))
    )


def _watch(margins: Margins) -> None:
    """Let every comparison tell ``margins`` how close it was."""
    approx: Any = type(pytest.approx(1.0))
    scalar = approx.__eq__

    def equal(self: Any, actual: Any) -> bool:
        if isinstance(actual, int | float) and isinstance(self.expected, int | float) and self.tolerance > 0:
            margins.note(abs(actual - self.expected) / self.tolerance)
        return scalar(self, actual)

    approx.__eq__ = equal
    close = torch.testing.assert_close

    def assert_close(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(actual, torch.Tensor) and actual.is_floating_point() and actual.shape == expected.shape:
            default = {torch.float64: (1e-7, 1e-7), torch.bfloat16: (1.6e-2, 1e-5)}.get(
                actual.dtype, (1.3e-6, 1e-5)
            )
            rtol, atol = (
                kwargs.get(name, value) for name, value in zip(("rtol", "atol"), default, strict=True)
            )
            apart = (actual - expected).abs().double() / (atol + rtol * expected.abs().double()).clamp_min(
                1e-300
            )
            margins.note(float(apart.nan_to_num(0).max()) if apart.numel() else 0.0)
        close(actual, expected, *args, **kwargs)

    torch.testing.assert_close = assert_close
    error, misfit = common.relative_error, common._misfit

    def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
        value = error(found, expected)

        def used(line: str) -> float:
            bound = re.search(r"<= ([\d.e-]+)", line)
            return value / float(bound[1]) if bound else value

        margins.note(used)
        return value

    def norms_used(runs: Any, expected: Any, norms: float | None) -> str:
        if norms is not None:
            margins.note(common.norms_apart(runs[0].norms, expected["delta_fro_per_group"]) / norms)
        return misfit(runs, expected, norms)

    common.relative_error, common._misfit = relative_error, norms_used
