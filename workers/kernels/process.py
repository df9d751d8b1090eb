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
    """Make the C library keep freed memory: blocks up to 256 MiB, and 1 GiB at the end of the heap.

    By default it returns every block of more than a few hundred kilobytes to the system, which then
    clears new pages for the next tensor of the same size. That took 20 to 25% of the time of
    scoring on a CPU. Peak memory does not change. Does nothing if the C library is not glibc.
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
    """Disable TF32 and enable deterministic kernels, for the whole process."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS is deterministic only with a fixed workspace
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # deterministic mode would also fill every new tensor with NaN, which takes a fifth of an edit's
    # time; no code here reads uninitialised memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
