"""Memory that is freed is kept for the next tensor."""

from __future__ import annotations

import platform
import resource
import sys

import pytest
import torch

from tests.processes import fork
from tests.waiting import output_of
from workers.kernels.process import keep_freed_memory


def _count(how: str) -> None:
    if how == "kept":
        keep_freed_memory()
    sys.stdout.write(str(min(_faults_of_a_round() for _ in range(8))))


def _faults_of_a_round() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _work() -> None:
    for _ in range(5):
        torch.ones(10, 1 << 20).add(1).mul(2)  # three times 40 MiB


def _faults(how: str) -> int:
    return int(output_of(fork(_count, how)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_and_not_fetched_anew_page_by_page() -> None:
    # the least of several rounds: the heap grows until its holes fit, how often depends on what the
    # process did before
    given_back, kept = _faults("given back"), _faults("kept")
    assert kept < given_back / 10, (kept, given_back)
