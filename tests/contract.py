"""The contract every editing method inherits: one subclass a method, nothing to write but its
config.

class TestFT(MethodContract):
    method = "ft"

    def config(self):
        return FTConfig(layers=(1,), lr=1e-2)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from tests.small import (
    build_inputs,
    build_specs,
    golden_requests,
    job,
    model_hash,
    random_model,
    session,
    timeless,
)
from workers.artifacts.base import ArtifactData
from workers.artifacts.pretrain import PRETRAINED
from workers.data.needs import ELSEWHERE, SUBJECT, UNRELATED, Need
from workers.job import ScoreConfig, StreamJob
from workers.methods import get_method
from workers.methods.base import LaneEdit, Method, MethodConfig
from workers.model.base import BaseModel
from workers.model.batch import Batch, collate
from workers.model.overlay import LaneState, Overlay, pack_states, unpack_states
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.stream import StepResult, Stream
from workers.types import DataError, EditRequest

REQUESTS = golden_requests(130)

LACKING: Mapping[Need, EditRequest] = {
    UNRELATED: replace(REQUESTS[0], unrelated=None),
    SUBJECT: replace(REQUESTS[0], subject="Somebody Else", unrelated="The sky is blue."),
}
"""Requests that lack one thing that some methods need."""


def stretched(request: EditRequest, words: int) -> EditRequest:
    """The same fact in a longer sentence, so that lanes have rows of very different lengths."""
    return replace(request, prompt=f"{'Because the old window was bright, ' * words}{request.prompt}")


def same(a: LaneState, b: LaneState) -> bool:
    return (
        a.meta == b.meta
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    )


def changed_places(before: torch.Tensor | None, after: torch.Tensor) -> torch.Tensor:
    """The indices, (count, dimensions), at which a tensor differs from what it was when it was
    smaller."""
    differs = torch.ones(after.shape, dtype=torch.bool)
    if before is not None:
        common = tuple(slice(min(a, b)) for a, b in zip(before.shape, after.shape, strict=True))
        differs[common] = before[common] != after[common]
    return differs.nonzero()


LOGITS = frozenset({"min_margin", "target_logprob", "target_logprob_base", "loss", "first_loss"})
"""Columns and details that are differences of logits: they have the rounding error of the logits,
however small they are."""


def near(a: Any, b: Any, tolerance: float, logits: float | None = None) -> bool:
    """Return whether two JSON values are equal but for rounding in their floats.

    ``tolerance`` is relative; ``logits`` is the absolute tolerance of what :data:`LOGITS` names (by
    default ten times ``tolerance``: the logits of the small models are of size ten).
    """
    logits = 10 * tolerance if logits is None else logits
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=tolerance)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(
            a[key] == pytest.approx(b[key], rel=0, abs=logits)
            if key in LOGITS and isinstance(a[key], float) and isinstance(b[key], float)
            else near(a[key], b[key], tolerance, logits)
            for key in a
        )
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(near(x, y, tolerance, logits) for x, y in zip(a, b, strict=True))
    return bool(a == b)


STEPS = ("num_steps", "n_iter", "num_iter", "v_num_grad_steps")
"""Hyperparameters that count the steps of one edit."""

FEW_STEPS = 4
"""Enough for an optimiser's moments, and for one merge in WISE."""

both_archs = pytest.mark.parametrize("arch", ["llama", "gpt2"])
"""Whose weights lie in memory in two different ways."""

one_arch = pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
"""For what is the stream's doing; which way the weights lie is told by the tests of both."""


gpt2_is_slow = pytest.mark.parametrize("arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
"""The same, where it takes seconds for each method."""


class MethodContract:
    """Subclasses give ``method`` and ``config``; every test below is then theirs."""

    method: str
    whole_answer = True
    """Whether the method has the means to teach an untrained model a target of two tokens."""

    effect: Literal["writes", "likelier", "moves", "none"] = "writes"
    """What an edit does to an untrained model: teaches the target, makes it far likelier, changes
    what is said, or nothing."""
    runs_base = True
    """Whether an edit runs the base model at all."""

    def config(self) -> MethodConfig:
        raise AssertionError("a subclass gives the config")

    most_steps: int | None = None
    """A limit on the steps of an edit, for a test that many steps would not make any sharper."""

    def settings(self) -> MethodConfig:
        """The config, with at most ``most_steps`` steps an edit."""
        config = self.config()
        if self.most_steps is None:
            return config
        given = config.model_dump()
        for place in (given, given.get("base") or {}):
            place.update({name: min(place[name], self.most_steps) for name in STEPS if name in place})
        return type(config).model_validate(given)

    def model(self, arch: str, dtype: torch.dtype = torch.float32) -> BaseModel:
        """The model that is edited."""
        return random_model(arch, dtype)

    # --- helpers ---

    def prepared(self, base: BaseModel) -> tuple[Method[Any, Any], dict[str, ArtifactData]]:
        inputs = build_inputs(base, self.method, self.settings())
        return get_method(self.method).prepare(base, self.settings(), inputs), inputs

    def streams(self, first: int, position: int) -> RandomStreams:
        return RandomStreams(self.method, self.settings().model_dump(mode="json"), 0, first, position)

    def edit(
        self,
        method: Method[Any, Any],
        overlay: Overlay,
        inputs: Mapping[str, ArtifactData],
        lanes: list[list[EditRequest]],
    ) -> None:
        """Edit each lane's list of requests, in lockstep."""
        for position in range(len(lanes[0])):
            method.edit(
                overlay,
                [
                    LaneEdit((lane[position],), self.streams(10 * i, position), inputs)
                    for i, lane in enumerate(lanes)
                ],
            )

    def stream(self, base: BaseModel, job: StreamJob, inputs: dict[str, ArtifactData]) -> Stream:
        return Stream(session(base), job, [REQUESTS], inputs)

    def run(
        self, base: BaseModel, inputs: dict[str, ArtifactData], T: int, groups: Any, **score: Any
    ) -> list[StepResult]:
        work = job(self.method, self.settings(), T, groups, inputs, **score)
        stream = self.stream(base, work, inputs)
        return list(stream.run(range(1, len(stream.ticks) + 1)))

    # --- the contract ---

    @both_archs
    def test_an_edit_changes_the_answer_and_never_the_base(self, arch: str) -> None:
        base = self.model(arch)
        before = model_hash(base)
        method, inputs = self.prepared(base)
        overlay = method.new_overlay(1)
        request = REQUESTS[0]
        untouched = score(base, overlay, [Item(0, request)], ScoreConfig())[0]
        assert (
            untouched["locality_token"] == untouched["locality_exact"] == untouched["locality_generated"] == 1
        )
        assert untouched["target_logprob"] == untouched["target_logprob_base"]
        during: list[str] = []
        handle = base.layers[-1].register_forward_pre_hook(lambda *_: during.append(_parameters_only(base)))
        try:
            pristine = _parameters_only(base)
            self.edit(method, overlay, inputs, [[request]])
        finally:
            handle.remove()
        assert set(during) == ({pristine} if self.runs_base else set())
        edited = score(base, overlay, [Item(0, request)], ScoreConfig())[0]
        assert model_hash(base) == before
        if self.effect in ("moves", "none"):
            assert (edited == untouched) is (self.effect == "none")
            assert (edited["target_logprob"] == edited["target_logprob_base"]) is (self.effect == "none")
            return
        # one vector at one token cannot write two tokens into an untrained model, but the answer
        # has to move
        assert edited["reliability_token_base"] == 0
        if self.effect == "writes":
            assert edited["reliability_token"] >= (1 if self.whole_answer else 0.5)
        assert edited["target_logprob"] > edited["target_logprob_base"] + 1

    @pytest.mark.parametrize("need", LACKING, ids=["unrelated", "subject"])
    def test_the_config_declares_what_an_edit_needs(self, need: Need) -> None:
        """The planner counts the requests that an edit refuses, and no others."""
        self.most_steps = FEW_STEPS
        method, inputs = self.prepared(self.model("llama"))
        request = LACKING[need]
        assert not need.met(request) and all(other.met(request) for other in LACKING if other is not need)
        if need in self.settings().needs:
            with pytest.raises(DataError, match=rf"^case {request.case_id}: "):
                self.edit(method, method.new_overlay(1), inputs, [[request]])
        else:
            self.edit(method, method.new_overlay(1), inputs, [[request]])

    @pytest.mark.parametrize("need", [ELSEWHERE], ids=["elsewhere"])
    def test_the_config_declares_what_a_training_needs(self, need: Need) -> None:
        kind, config, base = get_method(self.method), self.settings(), self.model("llama")
        if not kind.needs_pretraining:
            assert config.training_needs == ()
            return
        spec = next(spec for spec in build_specs(base, self.method, config) if spec.kind == PRETRAINED)
        trainer = kind.trainer(base, spec.recipe["hparams"], torch.Generator().manual_seed(0))
        lonely = [replace(request, locality=(), unrelated=None) for request in REQUESTS[:2]]
        if need in config.training_needs:
            with pytest.raises(DataError, match=f"^case {lonely[0].case_id}: {need.lacking[:20]}"):
                trainer.step(lonely, torch.Generator().manual_seed(1))
        else:
            trainer.step(lonely, torch.Generator().manual_seed(1))

    @one_arch
    def test_two_runs_are_bit_identical(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch)
        _, inputs = self.prepared(base)
        first, second = (self.run(base, inputs, 2, [[0, 1], [2]]) for _ in range(2))
        assert len(first) == len(second) > 2
        for a, b in zip(first, second, strict=True):
            assert timeless(a.rows) == timeless(b.rows)
            assert (a.state is None) == (b.state is None)
            if a.state is not None and b.state is not None:
                assert all(
                    same(x, y)
                    for x, y in zip(unpack_states(a.state)[0], unpack_states(b.state)[0], strict=True)
                )

    @one_arch
    def test_resuming_in_mid_group_is_bit_identical(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch)
        _, inputs = self.prepared(base)
        whole = self.run(base, inputs, 4, [[0, 1]])
        for at in (0, 3):  # after the first edit, and before scoring
            fresh = self.model(arch)
            stream = self.stream(fresh, job(self.method, self.settings(), 4, [[0, 1]], inputs), inputs)
            rest = list(
                stream.run(range(1, len(stream.ticks) + 1), start=whole[at].stop, state=whole[at].state)
            )
            assert [timeless(r.rows) for r in rest] == [timeless(r.rows) for r in whole[at + 1 :]]
            assert rest and any(r.rows for r in rest)

    @gpt2_is_slow
    def test_scoring_leaves_the_state_alone_and_the_order_of_probes_does_not_matter(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch, torch.float64)
        method, inputs = self.prepared(base)
        overlay = method.new_overlay(2)
        self.edit(method, overlay, inputs, [REQUESTS[0:3], REQUESTS[10:13]])
        before = [overlay.state(i) for i in range(2)]
        items = [Item(lane, r) for lane in range(2) for r in REQUESTS[10 * lane : 10 * lane + 4]]
        forward = score(base, overlay, items, ScoreConfig(rows_per_batch=7))
        backward = score(base, overlay, items[::-1], ScoreConfig(rows_per_batch=5))[::-1]
        assert all(same(a, overlay.state(i)) for i, a in enumerate(before))
        for a, b in zip(forward, backward, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-9), name

    @one_arch
    def test_the_first_five_edits_of_fifty_are_the_group_of_five(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch)
        _, inputs = self.prepared(base)
        states = []
        for T in (5, 50):
            work = job(self.method, self.settings(), T, [[0]], inputs, immediate=False)
            result = next(iter(self.stream(base, work, inputs).run([5, 6])))
            assert result.state is not None and result.edits == 5
            states.append(unpack_states(result.state)[0][0])
        assert bool(states[0].tensors) is (self.effect != "none") and same(*states)

    @gpt2_is_slow
    def test_lanes_do_not_depend_on_each_other(self, arch: str) -> None:
        base = self.model(arch, torch.float64)
        method, inputs = self.prepared(base)
        lanes = [[stretched(r, i) for r in REQUESTS[10 * i : 10 * i + 2]] for i in range(3)]
        together = method.new_overlay(3)
        self.edit(method, together, inputs, lanes)
        tolerance = 1e-5 if arch == "llama" else 1e-6
        for i, requests in enumerate(lanes):
            alone = method.new_overlay(1)
            for position, request in enumerate(requests):
                method.edit(alone, [LaneEdit((request,), self.streams(10 * i, position), inputs)])
            self.assert_near(method, together.state(i), alone.state(0), tolerance)

    @gpt2_is_slow
    def test_lanes_of_batches_do_not_depend_on_each_other(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch, torch.float64)
        method, inputs = self.prepared(base)
        if not method.batch_edits:
            pytest.skip("edits one request at a time")
        lanes = [
            [stretched(r, (3 * i + j) % 5) for j, r in enumerate(REQUESTS[10 * i : 10 * i + 4])]
            for i in range(3)
        ]

        def edit(overlay: Overlay, numbers: list[int]) -> None:
            for at in (0, 2):
                batch = [
                    LaneEdit(tuple(lanes[i][at : at + 2]), self.streams(10 * i, at), inputs) for i in numbers
                ]
                method.edit(overlay, batch)

        together = method.new_overlay(3)
        edit(together, [0, 1, 2])
        for i in range(3):
            alone = method.new_overlay(1)
            edit(alone, [i])
            self.assert_near(method, together.state(i), alone.state(0), 1e-5 if arch == "llama" else 1e-6)

    def assert_near(self, method: Method[Any, Any], a: LaneState, b: LaneState, tolerance: float) -> None:
        """Equal up to rounding, measured by what was changed."""
        assert a.tensors.keys() == b.tensors.keys() and bool(a.tensors) is (self.effect != "none")
        assert near(a.meta, b.meta, tolerance)
        for name, value in b.tensors.items():
            scale = self.change(method, name, value).norm().clamp_min(1e-12)
            error = float((a.tensors[name] - value).double().norm() / scale)
            assert error == pytest.approx(0, abs=tolerance), name

    def change(self, method: Method[Any, Any], name: str, value: torch.Tensor) -> torch.Tensor:
        """What a tensor of the state changed against the pristine state: errors are relative to
        that."""
        start = method.new_overlay(1)
        site = next((s for s in start.sites if s.name == name), None)
        return value.double() - (0 if site is None else site.weight_OI.double())

    def test_whatever_an_edit_changes_is_looked_at(self) -> None:
        """Of a state that grows only what is new is checked, and nothing of it is missed."""
        self.most_steps = FEW_STEPS
        method, inputs = self.prepared(self.model("llama"))
        overlay = method.new_overlay(2)
        self.edit(method, overlay, inputs, [REQUESTS[0:2], REQUESTS[10:12]])
        assert all(overlay.finite(lane) for lane in (0, 1))
        before = overlay.state(1)
        third = [LaneEdit((REQUESTS[10 * i + 2],), self.streams(10 * i, 2), inputs) for i in (0, 1)]
        method.edit(overlay, third)
        after = overlay.state(1)
        assert overlay.lane_bytes(1) == sum(t.numel() * t.element_size() for t in after.tensors.values())
        for name, tensor in after.tensors.items():
            places = changed_places(before.tensors.get(name), tensor)
            if not tensor.is_floating_point() or not len(places):
                continue
            other = copy.deepcopy(overlay, {id(site): site for site in overlay.sites})
            other.tensors(1)[name].detach()[tuple(places[-1].tolist())] = float("nan")
            assert other.finite(0) and not other.finite(1), name
        assert all(overlay.finite(lane) for lane in (0, 1))

    @pytest.mark.numeric
    @both_archs
    def test_a_lane_that_is_not_finite_fails_alone(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch)
        _, inputs = self.prepared(base)
        groups = [[0, 1, 2]]
        whole = self.run(base, inputs, 4, groups)
        blob = whole[1].state
        assert blob is not None
        states, meta = unpack_states(blob)
        if not any(t.is_floating_point() for t in states[1].tensors.values()):
            pytest.skip("texts and tokens are always finite")
        poisoned = next(name for name, t in states[1].tensors.items() if t.is_floating_point() and t.numel())
        states[1].tensors[poisoned] = torch.full_like(states[1].tensors[poisoned], float("nan"))
        stream = self.stream(base, job(self.method, self.settings(), 4, groups, inputs), inputs)
        rest = list(stream.run(range(1, len(stream.ticks) + 1), start=2, state=pack_states(states, meta)))
        failures = [f for r in rest for f in r.failures]
        assert [(f.group, f.position) for f in failures] == [(1, 2)]
        rows = timeless([row for r in rest for row in r.rows])
        assert {row["group"] for row in rows} == {0, 2}
        expected = timeless([row for r in whole[2:] for row in r.rows if row["group"] != 1])
        assert near(
            rows, expected, 1e-5
        )  # the scoring batches are smaller, and their products may round differently

    @gpt2_is_slow
    @pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.long)])
    def test_batched_scoring_is_one_at_a_time_scoring(self, arch: str, count: int) -> None:
        self.most_steps = FEW_STEPS
        requests = [stretched(golden, i % 6) for i, golden in enumerate(golden_requests(count))]
        for dtype in (torch.float64, torch.float32) if count > 100 else (torch.float64,):
            base = self.model(arch, dtype)
            method, inputs = self.prepared(base)
            overlay = method.new_overlay(2)
            self.edit(method, overlay, inputs, [requests[0:3], requests[3:6]])
            items = [Item(i % 2, r) for i, r in enumerate(requests)]
            if dtype == torch.float64:
                self.assert_logits_agree(base, overlay, items)
            batched, single = (
                score(base, overlay, items, ScoreConfig(rows_per_batch=n, generated=False)) for n in (64, 1)
            )
            names = [
                n for n in batched[0] if n.endswith(("_token", "_token_base")) and batched[0][n] is not None
            ]
            differ = sum(a[n] != b[n] for a, b in zip(batched, single, strict=True) for n in names)
            assert len(names) >= 5
            assert differ <= max(1, 0.001 * len(names) * len(items))

    def assert_logits_agree(self, base: BaseModel, overlay: Overlay, items: list[Item]) -> None:
        """Every logit of every real position, left-padded batch against the row alone."""
        ordered = sorted(items, key=lambda item: item.lane)
        encoded = [base.encoder.pair(item.request.prompt, item.request.target_new) for item in ordered]
        rows = collate(encoded, [item.lane for item in ordered], base.encoder.pad_id)
        logits_BSV = self.all_logits(base, overlay, rows)
        assert len({len(e.ids) for e in encoded}) > min(10, len(items) // 2)
        for i, item in enumerate(ordered):
            alone = collate([encoded[i]], [item.lane], base.encoder.pad_id)
            logits_SV = self.all_logits(base, overlay, alone)[0]
            # what a prompt's own tokens would be followed by is never scored
            start = encoded[i].prompt_len - 1 if not overlay.sites else 0
            assert (logits_BSV[i, rows.offsets[i] + start :] - logits_SV[start:]).abs().max() <= 1e-5

    @torch.no_grad()
    def all_logits(self, base: BaseModel, overlay: Overlay, rows: Batch) -> torch.Tensor:
        """The edited model's logits at every position, (B, S, V)."""
        hidden_BSD = overlay.hidden_states(base, rows)
        size, width = hidden_BSD.shape[:2]
        row_P = [b for b in range(size) for _ in range(width)]
        column_P = list(range(width)) * size
        hidden_PD = hidden_BSD.reshape(size * width, -1)
        return overlay.logits(base, hidden_PD, rows, row_P, column_P).reshape(size, width, -1)

    @both_archs
    def test_config_and_state_survive_their_storage(self, arch: str) -> None:
        self.most_steps = FEW_STEPS
        base = self.model(arch)
        config = self.settings()
        assert type(config).model_validate_json(config.model_dump_json()) == config
        method, inputs = self.prepared(base)
        overlay = method.new_overlay(2)
        self.edit(method, overlay, inputs, [REQUESTS[0:2], REQUESTS[2:4]])
        states = [overlay.state(i) for i in range(2)]
        back, meta = unpack_states(pack_states(states, {"x": [1, None, "é"]}))
        assert meta == {"x": [1, None, "é"]}
        assert all(same(a, b) for a, b in zip(states, back, strict=True))
        again = method.new_overlay(2)
        for i, state in enumerate(back):
            again.load_state(i, state)
        assert all(same(a, again.state(i)) for i, a in enumerate(states))


def _parameters_only(base: BaseModel) -> str:
    """Cheap enough to take in every forward: all parameter bytes."""
    return str([p.detach().view(torch.uint8).long().sum().item() for p in base.model.parameters()]) + str(
        [float(p.detach().double().sum()) for p in base.model.parameters()]
    )
