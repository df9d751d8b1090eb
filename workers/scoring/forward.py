"""Replies of the unedited and the edited model to scoring batches. Both run the identical batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from workers.failures import out_of_memory
from workers.job import ScoreConfig
from workers.model.batch import collate
from workers.model.replay import capture, replay
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.probes import EncodedProbe, Reply, probe_batches, text_probe
from workers.scoring.reply import read_reply

if TYPE_CHECKING:
    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay


@torch.no_grad()
def text_logprobs(
    base: BaseModel,
    overlay: Overlay | None,
    lanes: Sequence[int],
    texts: Sequence[tuple[int, ...]],
    config: ScoreConfig,
    base_answers: BaseAnswers,
    prefixes: Prefixes,
) -> dict[int, tuple[float, float]]:
    """Per lane, the summed log-probability (nats) of all tokens but the first of each text, of its
    state and of the base model."""
    config = config.model_copy(update={"generated": False})
    probes = [text_probe(0, "ood", lane, ids, "") for lane in lanes for ids in texts]
    sums = dict.fromkeys(lanes, (0.0, 0.0))
    for batch in probe_batches(probes, config):
        before, after = both_replies(base, overlay, batch, config, base_answers, prefixes)
        for i, probe in enumerate(batch):
            edited, pristine = sums[probe.lane]
            count = len(probe.scored)
            sums[probe.lane] = (
                edited + count * after.answers[i].logprob,
                pristine + count * before.answers[i].logprob,
            )
    return sums


def fitting_replies(
    base: BaseModel,
    overlay: Overlay | None,
    batch: list[EncodedProbe],
    config: ScoreConfig,
    kept: BaseAnswers,
    prefixes: Prefixes,
    splits: int = 0,
) -> Iterator[tuple[list[EncodedProbe], int, Reply, Reply]]:
    """Both models' replies to a batch. If memory runs out, the batch is halved, again and again.

    Yields (probes, number of halvings, base reply, edited reply). Before the first halving the
    caches are emptied, which changes no bit. Halves may differ from the whole by rounding, but the
    base model runs the same halves. A single row that does not fit raises the error.
    """
    try:
        before, after = both_replies(base, overlay, batch, config, kept, prefixes)
    except Exception as error:
        if not out_of_memory(error) or (len(batch) == 1 and not prefixes.used):
            raise
    else:
        yield batch, splits, before, after
        return
    # outside the handler, because the exception keeps the tensors of the failed forward alive
    halves = [batch]
    if not prefixes.release():
        halves, splits = [batch[: len(batch) // 2], batch[len(batch) // 2 :]], splits + 1
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    for half in halves:
        yield from fitting_replies(base, overlay, half, config, kept, prefixes, splits)


def both_replies(
    base: BaseModel,
    overlay: Overlay | None,
    probes: list[EncodedProbe],
    config: ScoreConfig,
    kept: BaseAnswers,
    prefixes: Prefixes,
) -> tuple[Reply, Reply]:
    """The replies of the base model and of the edited model to the identical batch."""
    batch = collate([p.encoded for p in probes], [p.lane for p in probes], base.encoder.pad_id, base.device)
    texts = tuple(p.encoded for p in probes)
    key = (config.generated, config.extra_tokens, texts, tuple((p.kind, p.target, p.aliases) for p in probes))
    before = kept.get(key)
    if overlay is None or overlay.inert:
        if before is None:
            before = read_reply(base, None, base.hidden_states(batch), batch, probes, config, None)
            kept.put(key, before)
        return before, before
    if not overlay.replays:
        if before is None:
            before = read_reply(base, None, base.hidden_states(batch), batch, probes, config, None)
            kept.put(key, before)
        hidden_BSD = overlay.hidden_states(base, batch)
        return before, read_reply(base, overlay, hidden_BSD, batch, probes, config, before.texts)
    place = (overlay.first_layer, texts)
    prefix = prefixes.get(place)
    if before is None:
        pristine = capture(base, batch, overlay.first_layer)
        before = read_reply(base, None, pristine.output_BSD, batch, probes, config, None)
        kept.put(key, before)
        if prefix is None:
            prefix = pristine
            prefixes.put(place, prefix)
    with overlay.installed(batch):
        if prefix is not None:
            hidden_BSD = replay(base, prefix)
        else:  # the layers below an edit compute the same with it
            prefix = capture(base, batch, overlay.first_layer)
            hidden_BSD = prefix.output_BSD
            prefixes.put(place, prefix)
    return before, read_reply(base, overlay, hidden_BSD, batch, probes, config, before.texts)
