"""Tells failures that may pass on a second try from those that will come again. Free of torch."""

from __future__ import annotations

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DEVICE = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error")


def out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the machine, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, on any device
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def may_pass(error: BaseException) -> bool:
    """Return whether the cause lies in the machine: memory, device, files, network. Anything else
    is the computation itself, which would only repeat it."""
    if out_of_memory(error) or isinstance(error, OSError) or type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)
