"""Estimates of an actor's memory, and of the lanes that fit into the declared memory. Torch-free.

    need = estimate(shape, ROMEConfig(layer=5), edits=10, batch_size=1, score=ScoreConfig(), tokens=40)
    need.peak(lanes=8)                       # bytes: weights + 8 lanes + activations of one batch
    need.lanes_within(80 * GIB)              # 0: not even one

What is free at the moment is never asked: lanes decide bits, so they follow from declared figures
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workers.job import Rollback, ScoreConfig
from workers.model.config import ModelShape

if TYPE_CHECKING:
    from workers.methods.base import MethodConfig

GIB = 1 << 30

MOST_LANES = 32
"""`lanes: auto` stops here: a batch this wide fills a device, and what fails or is resumed stays
small."""

CPU_MEMORY_GB = 4.0
"""Memory that `lanes: auto` assumes for a CPU actor that declares nothing
(``engine.resources.memory_gb``)."""

USABLE = 0.9
"""Share of the declared memory that is planned for; the rest is the runtime's context and
fragmentation."""

SCORED_TOKENS = 16
"""Positions of a sequence at which the head runs: those of the target."""

TEMPLATE_TOKENS = 32
"""Tokens that a context template puts in front of a prompt at most, special tokens included."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one actor. ``overlay`` (optimiser state included) and ``edit`` (activations) are per
    lane; ``shared`` is what lanes share (second moments and their factors, ...), ``kept`` what is
    kept of scoring."""

    weights: int
    overlay: int
    edit: int
    score: int
    kept: int = 0
    shared: int = 0
    recorded: bool = False
    """True if steps are recorded, as on a GPU: a recording's activations stay while the edit is
    scored."""

    def peak(self, lanes: int) -> int:
        """Weights + what lanes share + lanes x overlay + the activations of one batch: of an edit
        or of scoring, or both."""
        once = self.weights + self.kept + self.shared
        batches = (lanes * self.edit, self.score)
        return once + lanes * self.overlay + (sum(batches) if self.recorded else max(batches))

    def lanes_within(self, budget: float) -> int:
        """The most lanes whose peak stays within ``budget`` bytes, :data:`MOST_LANES` at most; 0 if
        one does not fit."""
        return max((n for n in range(1, MOST_LANES + 1) if self.peak(n) <= budget), default=0)


def estimate(
    shape: ModelShape,
    config: MethodConfig,
    edits: int,
    batch_size: int,
    score: ScoreConfig,
    tokens: int,
    cache_bytes: int = 0,
    on_gpu: bool = False,
) -> MemoryEstimate:
    """The memory of a method's config on a model. A lane holds ``edits`` edits; ``tokens`` bounds a
    sequence's length.

    A backward pass keeps, in every layer that is replayed, what enters and leaves each linear map,
    some normalised copies of the hidden state and the attention weights; the head keeps float32
    logits and their gradients.
    """
    value = shape.bytes_per_value
    layer = (
        sum(sum(sizes) for sizes in shape.linear.values()) + 6 * shape.hidden + tokens * shape.hidden // 64
    ) * value
    logits = SCORED_TOKENS * shape.vocab * 4
    suffix = shape.layers - config.first_layer
    edited = (
        config.rows_per_edit * batch_size * (tokens * (suffix * layer + shape.hidden * value) + 3 * logits)
    )
    rows = max(1, min(score.rows_per_batch, score.tokens_per_batch // tokens))
    scored = rows * (tokens * (layer + 2 * shape.hidden * value) + 2 * logits)
    return MemoryEstimate(
        weights=shape.weight_bytes,
        overlay=config.overlay_bytes(shape, edits),
        edit=edited,
        score=scored,
        kept=cache_bytes,
        shared=config.shared_bytes(shape),
        recorded=on_gpu,
    )


def lane_edits(rollback: Rollback, T: int, edits: int) -> int:
    """Return the number of edits a lane holds before it is rolled back."""
    return T if rollback == "group" else edits
