"""Separates transient failures, where a retry may succeed, from permanent ones. Does not import
torch."""

from __future__ import annotations

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DEVICE = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error")


def out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the machine ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, on any device
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_transient(error: BaseException) -> bool:
    """Return whether the failure is transient: caused by memory, device, files or network. Any
    other error comes from the computation, and a retry would raise it again."""
    if out_of_memory(error) or isinstance(error, OSError) or type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)
