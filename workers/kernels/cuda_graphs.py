"""One forward and backward of an edit's inner loop, recorded on a GPU as a CUDA graph and replayed
in every later step.

>>> recorded = RecordedStep(lambda: (problem.loss(base, delta_KOI),), [delta_KOI], base.pool)
>>> (now_K,) = recorded.play()  # the function's result now; also sets delta_KOI.grad

A step through a few layers launches about a thousand small kernels, and launching them one by one
from Python takes longer than running them. The recording holds the same kernels in the same order,
so the bits equal those of the unrecorded step. It reads the tensors it was recorded with: between
two replays, parameters are changed in place and all other inputs stay constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class RecordedStep:
    """A loss of every lane (and what else the function returns), and the gradient of the losses'
    sum."""

    def __init__(
        self, losses: Callable[[], tuple[Tensor, ...]], params: Sequence[Tensor], pool: Pool
    ) -> None:
        """``losses`` must have run once before, inside :meth:`Pool.aside`: the setup done by a
        first run must not be recorded."""
        self._params = list(params)
        try:
            self._record(losses, pool)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()  # memory cached by the first run is not available to recordings
            self._record(losses, pool)

    def _record(self, losses: Callable[[], tuple[Tensor, ...]], pool: Pool) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with pool.aside():
            # other threads may copy to the device meanwhile
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                out = losses()
                self._grads = torch.autograd.grad(out[0].sum(), self._params)
                self._out = tuple(t.detach() for t in out)
            finally:
                self._graph.capture_end()

    def play(self) -> tuple[Tensor, ...]:
        """Return the function's results for the current parameters; put the gradients into the
        parameters' ``grad``, valid until the next play."""
        self._graph.replay()
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
        return tuple(t.clone() for t in self._out)


class Pool:
    """Memory shared by successive recordings, so that each reuses what the one before has freed,
    and the CUDA stream they are made on."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # the pool keeps its memory as long as one of its graphs exists
        self._anchor = torch.cuda.CUDAGraph()
        with self.aside():
            self._anchor.capture_begin(capture_error_mode="thread_local")
            self._held = torch.zeros(1, device="cuda")
            self._anchor.capture_end()
        self.handle = self._anchor.pool()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work runs on the recordings' stream, after earlier and before later work of the
        current stream. Needed because autograd remembers the stream of a parameter's first use, and
        the default stream cannot be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
