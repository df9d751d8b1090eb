"""Overlay kinds and per-lane optimisers, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.small import random_model
from workers.inner_loop.optim import SGD, Adam, AdamW, LaneOptimizer
from workers.model.batch import Batch, Encoded, collate
from workers.model.overlay import (
    DenseOverlay,
    LaneState,
    LowRankOverlay,
    lane_linear,
    pack_states,
    unpack_states,
)

pytestmark = pytest.mark.numeric


def rows_of(lanes: list[int]) -> Batch:
    return collate([Encoded((5, 6, 7), 2) for _ in lanes], lanes, 0)


@pytest.mark.parametrize("lanes", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2], [1, 1], [0, 2, 2]])
def test_each_row_meets_the_weight_of_its_lane(lanes: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    weight_LOI = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    x = torch.randn(len(lanes), 3, 5, generator=g, dtype=torch.float64)
    bias = torch.randn(4, generator=g, dtype=torch.float64)
    out = lane_linear(x, weight_LOI, rows_of(lanes), bias)
    for i, lane in enumerate(lanes):
        torch.testing.assert_close(out[i], x[i] @ weight_LOI[lane].T + bias, rtol=1e-12, atol=1e-12)


def test_the_dense_overlay_snapshots_only_what_was_touched() -> None:
    base = random_model("gpt2")
    site = base.site(1)
    overlay = DenseOverlay([site], 2, torch.float32)
    assert overlay.state(0) == LaneState()
    assert overlay.delta_norm(0) == 0
    overlay.weights_LOI[site.name][1] += 1
    overlay.touch([1])
    saved = overlay.state(1)
    assert overlay.state(0) == LaneState()
    assert overlay.lane_bytes(1) == site.weight_OI.numel() * 4
    expected = (site.weight_OI.numel() ** 0.5) / float(site.weight_OI.norm())
    assert overlay.delta_norm(1) == pytest.approx(expected, rel=1e-5)
    overlay.load_state(1, LaneState())
    assert torch.equal(overlay.weights_LOI[site.name][1], site.weight_OI)
    overlay.load_state(0, saved)
    assert torch.equal(overlay.weights_LOI[site.name][0], saved.tensors[site.name])


def test_low_rank_and_dense_agree_across_the_switch() -> None:
    base = random_model("llama", torch.float64)
    site = base.site(1)
    overlay = LowRankOverlay(site, 2, torch.float64)
    g = torch.Generator().manual_seed(0)
    total = torch.zeros(2, *site.shape, dtype=torch.float64)
    x = torch.randn(2, 3, site.shape[1], generator=g, dtype=torch.float64)
    rows = rows_of([0, 1])
    for _ in range(30):  # the smaller dimension is 48: the switch comes at 24
        left, right = (torch.randn(2, n, generator=g, dtype=torch.float64) for n in site.shape)
        overlay.add(left, right)
        total += torch.einsum("lo,li->loi", left, right)
        with overlay.installed(rows):
            out = site.module(x)
        expected = torch.einsum("lsi,loi->lso", x, total + site.weight_OI)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(overlay.delta(1), total[1], rtol=1e-9, atol=1e-9)
        again = LowRankOverlay(site, 2, torch.float64)
        for lane in range(2):
            again.load_state(lane, overlay.state(lane))
        with again.installed(rows):
            assert torch.equal(site.module(x), out)
    assert overlay.dense_LOI is not None
    overlay.load_state(0, LaneState())
    assert overlay.delta_norm(0) == 0
    torch.testing.assert_close(overlay.delta(1), total[1], rtol=1e-9, atol=1e-9)


def test_several_maps_have_their_own_factors() -> None:
    base = random_model("llama", torch.float64)
    sites = [base.site(0), base.site(2, "self_attn.o_proj")]
    overlay = LowRankOverlay(sites, 2, torch.float64)
    assert overlay.state(1) == LaneState()
    g = torch.Generator().manual_seed(0)
    totals = [torch.zeros(2, *site.shape, dtype=torch.float64) for site in sites]
    for count in (1, 5, 20):  # 26 columns: dense from the third time on
        for site, total in zip(sites, totals, strict=True):
            left = torch.randn(2, site.shape[0], count, generator=g, dtype=torch.float64)
            right = torch.randn(2, count, site.shape[1], generator=g, dtype=torch.float64)
            overlay.add(left, right, site)
            total.add_(left @ right)
        again = LowRankOverlay(sites, 2, torch.float64)
        for lane in range(2):
            again.load_state(lane, overlay.state(lane))
        for site, total in zip(sites, totals, strict=True):
            x = torch.randn(2, 3, site.shape[1], generator=g, dtype=torch.float64)
            rows = rows_of([0, 1])
            with overlay.installed(rows):
                out = site.module(x)
            expected = torch.einsum("lsi,loi->lso", x, total + site.weight_OI)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
            with again.installed(rows):
                assert torch.equal(site.module(x), out)
    assert {name.rpartition("/")[2] for name in overlay.state(0).tensors} == {"dense"}
    changes = sum(float(total[1].square().sum()) for total in totals)
    weights = sum(float(site.weight_OI.square().sum()) for site in sites)
    assert overlay.delta_norm(1) == pytest.approx((changes / weights) ** 0.5, rel=1e-9)
    overlay.load_state(1, LaneState())
    assert overlay.delta_norm(1) == 0
    assert overlay.delta_norm(0) != 0


def test_states_pack_into_safetensors() -> None:
    states = [
        LaneState({"a/b": torch.arange(3), "m": torch.ones(2, dtype=torch.bool)}, {"n": [1]}),
        LaneState(),
    ]
    back, meta = unpack_states(pack_states(states, {"t": "ü"}))
    assert meta == {"t": "ü"}
    assert torch.equal(back[0].tensors["a/b"], torch.arange(3))
    assert back[0].tensors["m"].dtype == torch.bool
    assert back[0].meta == {"n": [1]}
    assert back[1] == LaneState()


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
        (Adam, torch.optim.Adam, {"lr": 0.1}),
        (Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
        (AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
def test_optimisers_are_torchs_and_stopped_lanes_stand_still(
    ours: type[LaneOptimizer], theirs: Any, options: dict[str, float]
) -> None:
    g = torch.Generator().manual_seed(1)
    start = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    stops = [7, 3, 0]  # steps after which each lane stops
    mine = start.clone().requires_grad_()
    optimizer = ours([mine], **options)
    single = [start[i].clone().requires_grad_() for i in range(3)]
    reference = [theirs([p], **options) for p in single]
    for step in range(7):
        grad = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
        mine.grad = grad.clone()
        optimizer.step(torch.tensor([step < s for s in stops]))
        for i, p in enumerate(single):
            if step < stops[i]:
                p.grad = grad[i].clone()
                reference[i].step()
    for i, p in enumerate(single):
        torch.testing.assert_close(mine[i].detach(), p.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(mine[2].detach(), start[2])


def test_rows_know_where_a_prompt_ends() -> None:
    rows = collate([Encoded((1, 2, 3, 4), 3), Encoded((5, 6), 1)], [0, 1], 0)
    assert rows.input_ids_BS.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert rows.position_ids_BS.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert rows.prompt_end_B.tolist() == [2, 2]
    assert rows.prompt_mask_BS.tolist() == [[True, True, True, False], [False, False, True, False]]
    right = collate([Encoded((1, 2, 3, 4), 3), Encoded((5, 6), 1)], [0, 1], 0, side="right")
    assert right.prompt_end_B.tolist() == [2, 0]
    assert right.offsets == (0, 0)
    public = collate([Encoded((5, 6), 1), Encoded((1, 2, 3), 1)], [0, 1], 0, public_positions=True)
    assert public.position_ids_BS.tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(ValueError, match="lanes ascending"):
        collate([Encoded((1,), 1), Encoded((2,), 1)], [1, 0], 0)
