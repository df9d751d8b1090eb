"""Estimate an actor's memory, and the number of lanes that fit into it. Does not import torch.

    need = estimate(shape, ROMEConfig(layer=5), edits=10, batch_size=1, score=ScoreConfig(), tokens=40)
    need.peak(lanes=8)                       # bytes: weights + 8 lanes + activations of one batch
    need.lanes_within(80 * GIB)              # the most lanes; 0 if not one fits

The number of lanes affects the rounding of results. It is therefore computed from the declared
memory, not from the memory that happens to be free.
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
"""`lanes: auto` gives at most so many lanes: they use a device fully, and with more lanes a failure
or a restart would repeat more work."""

CPU_MEMORY_GB = 4.0
"""GiB that `lanes: auto` assumes for a CPU actor without ``engine.resources.memory_gb``."""

USABLE = 0.9
"""Fraction of the declared memory that the plan uses. The rest is for the runtime's context and
fragmentation."""

SCORED_TOKENS = 16
"""Assumed number of target tokens of a sequence, at which the language-model head is computed."""

TEMPLATE_TOKENS = 32
"""Largest number of tokens that a context template adds before a prompt, special tokens
included."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of one actor in bytes. ``overlay`` (with optimiser state) and ``edit`` (activations)
    are per lane. ``score``: activations of one scoring batch. ``shared``: data that all lanes share
    (second moments and their factors, ...). ``kept``: the cache of scoring activations."""

    weights: int
    overlay: int
    edit: int
    score: int
    kept: int = 0
    shared: int = 0
    recorded: bool = False
    """True if steps are recorded as CUDA graphs: their activations stay allocated during
    scoring."""

    def peak(self, lanes: int) -> int:
        """Peak bytes with ``lanes`` lanes: weights, shared data, overlays, and the activations of
        one batch (of the edit or of scoring, whichever is larger; both if ``recorded``)."""
        once = self.weights + self.kept + self.shared
        batches = (lanes * self.edit, self.score)
        return once + lanes * self.overlay + (sum(batches) if self.recorded else max(batches))

    def lanes_within(self, budget: float) -> int:
        """Largest number of lanes, up to :data:`MOST_LANES`, whose peak is at most ``budget``
        bytes; 0 if not even one lane fits."""
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
    """Estimate the memory of a method on a model. A lane holds ``edits`` edits. ``tokens``: upper
    bound of a sequence's length.

    Activations of a backward pass, in each layer from the first edited one on: inputs and outputs
    of the linear maps, normalised copies of the hidden state, attention weights. The head adds
    float32 logits and their gradients.
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
    """Number of edits that a lane makes before it is rolled back."""
    return T if rollback == "group" else edits
