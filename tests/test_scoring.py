"""Scoring batches: their budget, and that what is kept between them changes no bit."""

from __future__ import annotations

import pytest
import torch

from tests.small import golden_requests, random_model
from workers.job import ScoreConfig
from workers.model.base import BaseModel
from workers.model.batch import collate
from workers.model.overlay import DenseOverlay
from workers.model.replay import capture
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.probes import Item
from workers.scoring.score import score

REQUESTS = golden_requests(40)


def edited(base: BaseModel) -> DenseOverlay:
    site = base.site(1)
    overlay = DenseOverlay([site], 2, torch.float32)
    overlay.weights_LOI[site.name][1] *= 1.5
    return overlay


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("generated", [True, False])
def test_what_is_kept_changes_no_bit(arch: str, generated: bool) -> None:
    base = random_model(arch)
    overlay = edited(base)
    items = [Item(i % 2, r) for i, r in enumerate(REQUESTS)]
    config = ScoreConfig(generated=generated, tokens_per_batch=300)
    cold = score(base, overlay, items, config)
    answers, prefixes = BaseAnswers(), Prefixes(budget=1 << 30)
    first = score(base, overlay, items, config, answers, prefixes)
    assert prefixes.hits == 0 < prefixes.misses
    warm = score(base, overlay, items, config, answers, prefixes)
    assert prefixes.hits == prefixes.misses == answers.hits
    assert cold == first == warm
    only_prefixes = score(base, overlay, items, config, BaseAnswers(), prefixes)
    only_answers = score(base, overlay, items, config, answers, Prefixes(budget=0))
    assert only_prefixes == only_answers == cold
    overlay.weights_LOI[base.site(1).name][0] *= 0.5
    assert (
        score(base, overlay, items, config, answers, prefixes) == score(base, overlay, items, config) != cold
    )


def test_a_kept_prefix_spares_the_layers_below_the_edit() -> None:
    base = random_model("llama")
    overlay = edited(base)
    items = [Item(0, r) for r in REQUESTS[:5]]
    answers, prefixes = BaseAnswers(), Prefixes(budget=1 << 30)
    config = ScoreConfig(generated=False)
    calls: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(base.layers)
    ]
    score(base, overlay, items, config, answers, prefixes)
    assert set(calls) == {0, 1, 2}
    calls.clear()
    score(base, overlay, items, config, answers, prefixes)
    assert set(calls) == {1, 2}
    for handle in handles:
        handle.remove()


def test_prefixes_stay_within_their_bytes() -> None:
    base = random_model("llama")
    overlay = edited(base)
    whole = Prefixes(budget=1 << 30)
    config = ScoreConfig(generated=False, tokens_per_batch=100)
    items = [Item(0, r) for r in REQUESTS]
    score(base, overlay, items, config, prefixes=whole)
    held = sum(prefix.bytes() for prefix, _ in whole._kept.values())
    assert whole.used == held > 10_000
    small = Prefixes(budget=held // 3)
    for _ in range(2):
        score(base, overlay, items, config, prefixes=small)
        assert 0 < small.used <= held // 3
        assert small.used == sum(prefix.bytes() for prefix, _ in small._kept.values())
    assert len(small._kept) < len(whole._kept)
    assert (
        small.hits == 0
    )  # least recently used out: one pass in order pushes out what the next one asks for first


def test_a_batch_that_is_kept_again_weighs_once_and_holds_no_output() -> None:
    base = random_model("llama")
    rows = collate([base.encoder.pair("Yes,", "no")], [0], base.encoder.pad_id)
    prefix = capture(base, rows, 1)
    kept = Prefixes(budget=1 << 20)
    for _ in range(3):
        kept.put(("batch",), prefix)
    held = kept.get(("batch",))
    assert held is not None
    assert kept.used == held.bytes()
    assert held.output_BSD.untyped_storage().nbytes() == 0
    kept.resize(0)
    assert (kept.used, len(kept._kept)) == (0, 0)


@pytest.mark.parametrize(("rows", "tokens"), [(1000, 200), (7, 10_000), (1, 1), (1000, 1)])
def test_batches_keep_to_their_budget(rows: int, tokens: int) -> None:
    base = random_model("gpt2")
    sizes: list[tuple[int, int]] = []
    handle = base.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    config = ScoreConfig(generated=False, rows_per_batch=rows, tokens_per_batch=tokens)
    found = score(base, None, [Item(0, r) for r in REQUESTS[:12]], config)
    handle.remove()
    assert len(found) == 12
    assert sum(count for count, _ in sizes) == 12 * 3
    for count, width in sizes:
        assert count <= rows
        assert count == 1 or count * width <= tokens
