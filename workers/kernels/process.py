"""Settings of this process: freed memory is kept, numerics are fixed.

>>> keep_freed_memory()
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

import torch
import transformers

LOG = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of ``mallopt``'s parameters, from glibc's malloc.h."""

_LARGEST_KEPT = 256 << 20
_MOST_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next request: blocks up to 256 MiB, 1 GiB in all
    at the heap's end.

    By default it hands every block of more than a few hundred kilobytes back at once and gets it
    again, page by page and cleared by the system, for the next tensor of the same size: a fifth to
    a quarter of the time of scoring on a processor. The peak is what it was. Does nothing where the
    C library is not glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT)):
        if not mallopt(ctypes.c_int(parameter), ctypes.c_int(value)):
            LOG.debug("mallopt(%d, %d) was refused", parameter, value)


def fix_numerics() -> None:
    """No TF32, deterministic kernels: for the whole process."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS is deterministic with a fixed workspace only
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # the deterministic mode would also fill every fresh tensor with NaN first, a fifth of an edit's
    # time; nothing here reads memory that was not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
