"""Limits that kernels share."""

from __future__ import annotations

LAID_OUT = 1 << 22
"""Weights of a decoder layer up to which edits on a processor lay them out a second time
(:mod:`workers.kernels.llama_cpu`): a larger layer is products almost alone."""
