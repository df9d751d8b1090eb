"""How much memory an actor needs, and how many lanes fit into what the spec declares. Estimates; torch-free.

    need = estimate(shape, config, overlay_bytes=..., batch_size=1, score=ScoreConfig(), tokens=40)
    need.peak(lanes=8)                       # bytes: weights + 8 lanes + activations of one batch
    need.lanes_within(80 * GIB)              # 0: not even one

What is free at the moment is never asked: lanes decide bits, so they follow from declared figures alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.job import Rollback, ScoreConfig
from workers.model.config import ModelShape
from workers.types import JSON

GIB = 1 << 30

MOST_LANES = 32
"""`lanes: auto` stops here: a batch this wide fills a device, and what fails or is resumed stays small."""

CPU_MEMORY_GB = 4.0
"""What `lanes: auto` counts on for a CPU actor that declares nothing (``engine.resources.memory_gb``)."""

USABLE = 0.9
"""Share of the declared memory that is planned for; the rest is the runtime's context and fragmentation."""

SCORED_TOKENS = 16
"""Positions of a sequence at which the head runs: those of the target."""

TEMPLATE_TOKENS = 32
"""What a context template puts in front of a prompt, at most, and the special tokens."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one actor. ``overlay`` (optimiser state included) and ``edit`` (activations) are per lane; ``shared`` is what
    lanes share (second moments and their factors, ...), ``kept`` what is kept of scoring."""

    weights: int
    overlay: int
    edit: int
    score: int
    kept: int = 0
    shared: int = 0
    recorded: bool = False
    """Whether steps are recorded, as on a GPU: a recording's activations stay while the edit is scored."""

    def peak(self, lanes: int) -> int:
        """Weights + what lanes share + lanes x overlay + the activations of one batch: of an edit or of scoring, or both."""
        once = self.weights + self.kept + self.shared
        batches = (lanes * self.edit, self.score)
        return once + lanes * self.overlay + (sum(batches) if self.recorded else max(batches))

    def lanes_within(self, budget: float) -> int:
        """The most lanes whose peak stays within ``budget`` bytes, :data:`MOST_LANES` at most; 0 if one does not fit."""
        return max((n for n in range(1, MOST_LANES + 1) if self.peak(n) <= budget), default=0)


def estimate(
    shape: ModelShape,
    config: Mapping[str, JSON],
    overlay_bytes: int,
    batch_size: int,
    score: ScoreConfig,
    tokens: int,
    cache_bytes: int = 0,
    shared_bytes: int = 0,
    on_gpu: bool = False,
) -> MemoryEstimate:
    """The memory of a method's config on a model; ``tokens`` bounds a sequence's length.

    A backward pass keeps, in every layer that is replayed, what enters and leaves each linear map, some normalised
    copies of the hidden state and the attention weights; the head keeps float32 logits and their gradients.
    """
    wrapped = config.get("base")  # a method around another one: layers and rows are those of the one inside
    config = wrapped if isinstance(wrapped, Mapping) else config
    value = shape.bytes_per_value
    layer = (
        sum(sum(sizes) for sizes in shape.linear.values()) + 6 * shape.hidden + tokens * shape.hidden // 64
    ) * value
    logits = SCORED_TOKENS * shape.vocab * 4
    first = first_layer(config)
    suffix = shape.layers - first
    edited = rows_per_edit(config) * batch_size * (tokens * (suffix * layer + shape.hidden * value) + 3 * logits)
    rows = max(1, min(score.rows_per_batch, score.tokens_per_batch // tokens))
    scored = rows * (tokens * (layer + 2 * shape.hidden * value) + 2 * logits)
    return MemoryEstimate(
        weights=shape.weight_bytes,
        overlay=overlay_bytes,
        edit=edited,
        score=scored,
        kept=cache_bytes,
        shared=shared_bytes,
        recorded=on_gpu,
    )


def first_layer(config: Mapping[str, JSON]) -> int:
    """The first decoder layer a config names (``layers`` or ``layer``); 0, the dearest, if it names none."""
    named = config.get("layers") or [config.get("layer") or 0]
    return min(int(layer) for layer in named)


def rows_per_edit(config: Mapping[str, JSON]) -> int:
    """Sequences of one request in an optimisation step: its prompt, one more for locality, and one per context template."""
    return 2 + sum(int(count) for _, count in config.get("context_template_length_params") or ())


def lane_edits(rollback: Rollback, T: int, edits: int) -> int:
    """How many edits a lane holds before it is rolled back."""
    return T if rollback == "group" else edits
