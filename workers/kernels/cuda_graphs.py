"""One forward and backward of an edit's inner loop, recorded on a GPU (a CUDA graph) and played
again in every later step.

>>> recorded = RecordedStep(lambda: (problem.loss(base, delta_KOI),), [delta_KOI], base.pool)
>>> (now_K,) = recorded.play()  # as the function would answer now; delta_KOI.grad is there, too

A step of a few layers is a thousand small kernels, and starting them one by one from Python takes
longer than they run. The recording holds the same kernels in the same order, so the bits are those
of the step as it is written. It reads the very tensors that it was made with: parameters are
changed in place between two plays, everything else stays as it was.
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
        """``losses`` must have run once before, :meth:`Pool.aside`: what a first run sets up must
        not be recorded."""
        self._params = list(params)
        try:
            self._record(losses, pool)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()  # what the first run has left is not the recordings' to take
            self._record(losses, pool)

    def _record(self, losses: Callable[[], tuple[Tensor, ...]], pool: Pool) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with pool.aside():
            # other threads may go on copying to the device meanwhile
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                out = losses()
                self._grads = torch.autograd.grad(out[0].sum(), self._params)
                self._out = tuple(t.detach() for t in out)
            finally:
                self._graph.capture_end()

    def play(self) -> tuple[Tensor, ...]:
        """Return what the function returns now; leaves the gradients in the parameters' ``grad``,
        to be used before the next play."""
        self._graph.replay()
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
        return tuple(t.clone() for t in self._out)


class Pool:
    """Memory that recordings made one after another share, so that each finds what the one before
    it has left, and the stream they are made on."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # memory stays with the pool as long as one of its graphs lives
        self._anchor = torch.cuda.CUDAGraph()
        with self.aside():
            self._anchor.capture_begin(capture_error_mode="thread_local")
            self._held = torch.zeros(1, device="cuda")
            self._anchor.capture_end()
        self.handle = self._anchor.pool()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to the recordings' stream, between what was asked for before and what
        is asked for after. Autograd remembers the stream on which it first met a parameter, and the
        default one cannot take part in a recording."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
