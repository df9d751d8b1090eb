"""What MEND and MALMEN share, and their training: gradients against autograd, statistics, resumed
training, and that it helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import golden_requests, job, model_hash, random_model, session
from workers.artifacts.base import ArtifactData
from workers.artifacts.pretrain import Trainer, TrainingSchedule, training_source
from workers.data.tinyworld import load_requests
from workers.methods import get_method, load_config
from workers.methods.base import ArtifactContext, LaneEdit
from workers.methods.families.hypernet import (
    Block,
    Hypernet,
    Questions,
    Statistics,
    fit,
    fit_keys,
    fitted,
    gradient_factors,
    hypernet_sites,
    squared_norm,
)
from workers.methods.families.hypernet_training import HypernetTrainer, changed
from workers.methods.malmen import MALMENConfig
from workers.methods.mend import MENDConfig
from workers.methods.rledit import RLEdit, RLEditConfig
from workers.model.base import BaseModel
from workers.model.batch import collate
from workers.model.config import ModelConfig, ModelFingerprint
from workers.model.overlay import DenseOverlay, LaneState
from workers.rng import RandomStreams, derive_generator
from workers.session import build_inputs
from workers.stream import Stream
from workers.types import DataError, EditRequest, SpecError

CONFIGS: Mapping[str, Any] = {
    "mend": MENDConfig(layers=(0, 2), rank=8, lr=1e-3, schedule=TrainingSchedule(steps=2)),
    "malmen": MALMENConfig(
        layers=(0, 2), modules=(), rank=8, lr=1e-2, meta_lr=1e-3, schedule=TrainingSchedule(steps=2)
    ),
    "rledit": RLEditConfig(
        layers=(0, 2),
        rank=8,
        n_blocks=2,
        lr=1e-2,
        meta_lr=1e-3,
        edit_size=2,
        schedule=TrainingSchedule(steps=2),
    ),
}


def trainer(base: BaseModel, method: str, seed: int = 0, **changes: Any) -> Trainer:
    hparams = CONFIGS[method].model_copy(update=changes).model_dump(mode="json")
    return get_method(method).trainer(base, hparams, derive_generator(seed))


def learn(trained: Trainer, steps: range) -> list[dict[str, float]]:
    requests = load_requests("train")
    return [trained.step(requests[4 * i : 4 * i + 4], derive_generator("step", i)) for i in steps]


# --- the parts ---


@pytest.mark.numeric
@pytest.mark.parametrize(("arch", "modules"), [("llama", ("mlp.up_proj", "mlp.down_proj")), ("gpt2", ())])
def test_factors_are_the_gradient_of_the_edited_weights(arch: str, modules: tuple[str, ...]) -> None:
    base = random_model(arch, torch.float64)
    sites = hypernet_sites(base, (2, 1), modules)
    assert [site.layer for site in sites] == sorted(site.layer for site in sites)
    overlay = DenseOverlay(sites, 2, torch.float64)
    for place, edited_LOI in enumerate(overlay.weights_LOI.values()):
        edited_LOI.add_(
            torch.randn(edited_LOI.shape, generator=derive_generator(place), dtype=torch.float64), alpha=0.1
        )
    requests = golden_requests(4)
    lanes = [
        [(r.prompt, r.target_new) for r in requests[:2]],
        [(f"Now {r.prompt}", r.target_new) for r in requests[2:]],
    ]
    questions = Questions.of(base, lanes)
    factors, loss_L = gradient_factors(base, sites, questions, overlay)
    for weight_LOI in overlay.weights_LOI.values():
        weight_LOI.requires_grad_(True)
    row_P, column_P = questions.targets.reads
    with overlay.installed(questions.batch):
        hidden_PD = base.hidden_states(questions.batch)[list(row_P), list(column_P)]
        wanted_L = questions.targets.nll(base, hidden_PD)
    wanted_L.sum().backward()
    assert torch.allclose(loss_L, wanted_L.detach())
    for site, found in zip(sites, factors, strict=True):
        kept = found.kept_LN[..., None]
        change_LOI = (found.grad_LNO * kept).transpose(1, 2) @ (found.key_LNI * kept)
        assert torch.allclose(change_LOI, overlay.weights_LOI[site.name].grad, atol=1e-10)
        assert not (found.kept_LN & ~found.real_LN).any() and not (found.read_LN & ~found.real_LN).any()


@pytest.mark.numeric
def test_a_change_in_factors_is_the_change_in_weights() -> None:
    base = random_model("llama", torch.float64)
    sites = hypernet_sites(base, (0, 1), ())
    questions = Questions.of(base, [[(r.prompt, r.target_new)] for r in golden_requests(3)])
    generator = derive_generator("pairs")
    pairs = [
        tuple(torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for width in site.shape)
        for site in sites
    ]
    overlay = DenseOverlay(sites, 3, torch.float64)
    for site, (left_LNO, right_LNI) in zip(sites, pairs, strict=True):
        overlay.weights_LOI[site.name] += left_LNO.transpose(1, 2) @ right_LNI
    with torch.no_grad(), changed(sites, pairs, questions.batch):  # type: ignore[arg-type]
        ours = base.hidden_states(questions.batch)
    with torch.no_grad(), overlay.installed(questions.batch):
        assert torch.allclose(ours, base.hidden_states(questions.batch), atol=1e-9)


@pytest.mark.numeric
def test_running_statistics_are_those_of_all_rows() -> None:
    rows = [torch.randn(n, 6, generator=derive_generator(n)) * 3 + 2 for n in (1, 5, 0, 30, 1)]
    statistics = Statistics(6)
    for x_NF in rows:
        statistics.update(x_NF)
    whole = torch.cat(rows).double()
    assert torch.allclose(statistics.mean_F, whole.mean(0))
    normal = statistics(rows[3].double())
    assert torch.allclose(normal, (rows[3].double() - whole.mean(0)) / whole.std(0), atol=1e-6)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_an_untrained_network_gives_back_what_it_is_given_and_can_learn(order: Any) -> None:
    block = Block(7, 3, 2, order, derive_generator(0))
    x_NF = torch.randn(4, 7, generator=derive_generator(1))
    assert torch.equal(block(x_NF, 1), x_NF)
    block(x_NF, 1).square().sum().backward()
    assert block.up_FR.grad is not None and float(block.up_FR.grad.norm()) > 0


def test_maps_of_one_shape_share_a_network() -> None:
    net = Hypernet([(4, 8), (8, 4), (4, 8)], 2, 2, 0.1)
    assert sorted(net.blocks) == ["4x8", "8x4"] and net.modes == [0, 0, 1]
    assert net.blocks["8x4"][0].scale_MF.shape == (2, 12)


@pytest.mark.parametrize("tokens", [3, 20])
def test_the_fit_is_the_ridge_solution(tokens: int) -> None:
    """Its residual's gradient is zero: ``(S U - V) U^T + l S = 0``, in both forms of the normal
    equation."""
    generator = derive_generator("fit")
    key_LNI = torch.randn(2, tokens, 8, generator=generator, dtype=torch.float64)
    value_LNO = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    damping = torch.tensor(0.3, dtype=torch.float64)
    change_LOI = value_LNO.transpose(1, 2) @ fit(key_LNI, damping)
    left_LON = change_LOI @ key_LNI.transpose(1, 2) - value_LNO.transpose(1, 2)
    assert float((left_LON @ key_LNI + damping * change_LOI).abs().max()) < 1e-10
    poisoned = key_LNI.clone()
    poisoned[0, 0, 0] = float("nan")
    assert torch.equal(fit(poisoned, damping)[1], fit(key_LNI, damping)[1])
    assert not torch.isfinite(fit(poisoned, damping)[0]).all()


# --- training ---


@pytest.mark.parametrize("method", list(CONFIGS))
def test_training_goes_on_as_if_it_had_never_stopped(method: str) -> None:
    base = random_model("gpt2")
    before = model_hash(base)
    whole = trainer(base, method)
    figures = learn(whole, range(6))
    first = trainer(base, method)
    learn(first, range(3))
    blob = first.state().to_bytes()
    learn(first, range(3, 4))  # a state is a copy
    second = trainer(base, method, seed=99)
    second.load_state(ArtifactData.from_bytes(blob))
    assert learn(second, range(3, 6)) == figures[3:]
    a, b = whole.state().tensors, second.state().tensors
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith("exp_avg_sq") for name in a) and any(name.endswith("squares_F") for name in a)
    assert model_hash(base) == before
    assert set(whole.product().tensors) == {
        name.removeprefix("net/") for name in a if name.startswith("net/")
    }


@pytest.mark.numeric
@pytest.mark.parametrize("method", list(CONFIGS))
def test_gradients_reach_every_part_of_the_networks_and_nothing_else(method: str) -> None:
    """Against a finite difference of the loss by one step size, so that nothing on the way is cut
    off."""
    base = random_model("gpt2", torch.float64)  # Llama's norms are float32 whatever the weights are
    changes: dict[str, Any] = {"grad_clip": 1e9} if method == "mend" else {"max_grad_norm": 1e9}
    if method == "rledit":
        changes["edit_size"] = (
            4  # one edit: no gradient goes through the weights that an edit before has left
        )
    made = trainer(base, method, **changes)
    assert isinstance(made, HypernetTrainer)
    learn(made, range(1))  # statistics, and networks that are no longer the identity
    state = made.state()
    learn(made, range(1, 2))
    found = {name: p.grad.clone() for name, p in made.net.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, _ in made.net.named_parameters()} - (
        {"damping_S"} if method == "mend" else set()
    )
    for name in ("rate_S", "damping_S", next(n for n in found if n.endswith("bias_F"))):
        if name not in found:
            continue
        losses = []
        for sign in (1, -1):
            made.load_state(state)
            made.net.get_parameter(name).data.view(-1)[1] += sign * 1e-5
            losses.append(learn(made, range(1, 2))[0]["loss"])
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float(found[name].view(-1)[1]), rel=1e-3, abs=1e-6), name


@pytest.mark.numeric
def test_a_trajectory_counts_earlier_edits_at_the_weights_of_later_ones() -> None:
    """Its loss is computed anew from whole forward passes of the edited model, edit by edit, and
    its gradient from theirs."""
    base = random_model("gpt2", torch.float64)
    decay, loc_coef, reg_coef = 0.7, 0.6, 0.01
    made = trainer(
        base,
        "rledit",
        edit_size=1,
        time_decay=decay,
        back_depth=2,
        loc_coef=loc_coef,
        reg_coef=reg_coef,
        train_on="prompt",
        max_grad_norm=1e9,
    )
    assert isinstance(made, HypernetTrainer)
    learn(made, range(1))
    requests = [replace(r, locality=r.locality[:1]) for r in load_requests("train")[8:11]]
    again = trainer(base, "rledit")
    assert isinstance(again, HypernetTrainer)
    again.load_state(made.state())
    figures = made.step(requests, derive_generator(0))

    net, sites = again.net, made.sites
    overlay = DenseOverlay(sites, 1, torch.float64)
    losses = []
    for i, request in enumerate(requests):
        questions = Questions.of(base, [[(request.prompt, request.target_new)]])
        factors = fit_keys(gradient_factors(base, sites, questions, overlay)[0], "answer")
        net.learn_scale(factors)
        changes = fitted(net, factors)
        later = DenseOverlay(sites, 1, torch.float64)
        loss = torch.zeros((), dtype=torch.float64)
        for site, (left_LNO, right_LNI) in zip(sites, changes, strict=True):
            change_LOI = left_LNO.transpose(1, 2) @ right_LNI
            later.weights_LOI[site.name] = overlay.weights_LOI[site.name] + change_LOI
            loss = loss + reg_coef * change_LOI.square().sum()
        for age in range(min(i + 1, 2)):
            past = requests[i - age]
            (probe,) = past.locality
            nll = -said(base, later, past.prompt, past.target_new).mean()
            before, after = (said(base, o, probe.prompt, probe.target, every=True) for o in (overlay, later))
            kl = (before.detach().exp() * (before.detach() - after)).sum(-1).mean()
            loss = loss + decay**age * (nll + loc_coef * kl)
        losses.append(loss)
        for name, weight_LOI in later.weights_LOI.items():
            overlay.weights_LOI[name] = weight_LOI.detach()
    wanted = torch.stack(losses).mean()
    wanted.backward()
    assert figures["loss"] == pytest.approx(float(wanted.detach()), rel=1e-9)
    for name, parameter in made.net.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, net.get_parameter(name).grad, rtol=1e-6, atol=1e-9), name
    assert float(made.net.rate_S.grad.norm()) > 0


def said(base: BaseModel, overlay: DenseOverlay, prompt: str, target: str, every: bool = False) -> Tensor:
    """The edited model's log-probabilities of the target's tokens, or of every token where it
    stands."""
    pair = base.encoder.pair(prompt, target)
    rows = collate([pair], [0], base.encoder.pad_id)
    with overlay.installed(rows):
        logits_SV = base.logits(base.hidden_states(rows)[0])[pair.prompt_len - 1 : -1]
    found_SV = logits_SV.log_softmax(-1)
    return found_SV if every else found_SV[torch.arange(len(pair.target)), list(pair.target)]


def test_the_norm_of_a_change_is_found_without_it() -> None:
    generator = derive_generator("norm")
    left, right = (torch.randn(2, 4, width, generator=generator, dtype=torch.float64) for width in (6, 9))
    assert torch.allclose(squared_norm((left, right)), (left.transpose(1, 2) @ right).square().sum())


@pytest.mark.parametrize("statistics", ["lifelong", "trained"])
def test_rledits_statistics_are_a_lanes_own(statistics: str) -> None:
    """With them, an edit depends on the edits before it even where these changed no weight; a
    rollback forgets them."""
    base = random_model("gpt2")
    config = CONFIGS["rledit"].model_copy(update={"statistics": statistics})
    source = training_source("tinyworld", shards=(16,))[0]
    specs = config.artifacts(ArtifactContext(ModelFingerprint("m", "t"), base.config, 0, source))
    method = get_method("rledit").prepare(base, config, build_inputs(base, specs))
    assert isinstance(method, RLEdit)
    first, second = golden_requests(2)
    trained = method.net.data()
    states = []
    for lead in ((), (first,)):
        overlay = method.new_overlay(2)
        empty = overlay.state(0)
        for request in lead:
            method.edit(overlay, [LaneEdit((request,), RandomStreams("x", {}, 0, 0, 0))] * 2)
        saved = overlay.state(1)
        weightless = LaneState({n: t for n, t in saved.tensors.items() if "/" in n} | pristine(method))
        overlay.load_state(0, weightless if lead else empty)
        method.edit(overlay, [LaneEdit((second,), RandomStreams("x", {}, 0, 0, 1))] * 2)
        states.append(overlay.state(0).tensors)
        overlay.load_state(0, empty)
        assert not overlay.state(0).tensors
        assert all(torch.equal(overlay.scales[0][n].mean_F, s.mean_F) for n, s in method.net.scale.items())
    alike = [torch.equal(states[0][site.name], states[1][site.name]) for site in method.new_overlay(1).sites]
    assert all(alike) if statistics == "trained" else not any(alike)
    assert all(torch.equal(trained[name], tensor) for name, tensor in method.net.data().items())


def pristine(method: RLEdit) -> dict[str, Tensor]:
    return {site.name: site.weight_OI for site in method.new_overlay(1).sites}


def test_rledit_reads_its_authors_file(tmp_path: Path) -> None:
    path = tmp_path / "rledit.yaml"
    text = (
        "name: rledit\nrank: 512\nn_blocks: 4\nlr: 1e-6\nmeta_lr: 1e-4\nloc_coef: 0.6\nmax_grad_norm: "
        "1\nn_epochs: 3\n"
    )
    text += (
        "batch_size: 128\ntoken: {}\ncache_dir: cache\nn_test: 10\nreg_coef: 1e-4\ntime_decay: "
        "0.9\nback_depth: 7\n"
    )
    path.write_text(text.format("ans"))
    config = load_config(
        "rledit", {"layers": [22, 23], "modules": ["mlp.up_proj"]}, path, ModelConfig(name="some/model")
    )
    assert isinstance(config, RLEditConfig)
    assert (config.rank, config.tokens, config.lr_lr, config.back_depth) == (512, "answer", 1e-4, 7)
    assert (config.schedule.steps, config.schedule.batch_size, config.edit_size) == (3, 8000, 20)
    path.write_text(text.format("some"))
    with pytest.raises(SpecError, match="token: 'some'; choices: ans"):
        load_config("rledit", {"layers": [22]}, path, ModelConfig(name="some/model"))


def test_a_request_without_anything_else_is_named() -> None:
    made = trainer(random_model("llama"), "mend")
    lonely = EditRequest("c7", "The cat is", "cat", "green")
    with pytest.raises(DataError, match="case c7: locality, unrelated: neither is given"):
        made.step([lonely], derive_generator(0))
    alone = EditRequest("c8", "The cat is", "cat", "green", unrelated="The sky is blue.")
    assert made.step([alone], derive_generator(0))["kl"] >= 0


def test_networks_are_shared_by_configs_that_train_alike() -> None:
    source = training_source("tinyworld", shards=(16,))[0]
    for config in CONFIGS.values():
        keys = [
            changed.artifacts(ArtifactContext(ModelFingerprint("m", "t"), ModelConfig(), seed, source))[0].key
            for changed, seed in ((config, 0), (config, 5), (config.model_copy(update={"rank": 9}), 0))
        ]
        assert keys[0] == keys[1] != keys[2]


def test_malmen_reads_easyedits_file(tmp_path: Path) -> None:
    text = """
alg_name: "MALMEN"
model_class: GPT2LMHeadModel
inner_params: [transformer.h.46.mlp.c_proj.weight, transformer.h.47.mlp.c_proj.weight]
dropout: {dropout}
train_base: False
no_grad_layers: null
rank: 1920
n_blocks: 2
lr: 1e-6
meta_lr: 1e-5
loc_coef: 1
max_grad_norm: 1
token: {token}
n_edits: 16
max_iters: 500
editor_batch_size: 1024
val_steps: 200
"""
    path = tmp_path / "malmen.yaml"
    elsewhere = ModelConfig(name="some/model")
    path.write_text(text.format(dropout="0.0", token="mask"))
    config = load_config("malmen", {}, path, elsewhere)
    assert isinstance(config, MALMENConfig)
    assert (config.layers, config.modules, config.tokens) == ((46, 47), ("mlp.c_proj",), "all")
    assert (config.schedule.steps, config.schedule.batch_size, config.lr_lr) == (500, 16, 1e-5)
    for dropout, token, said in (
        ("0.1", "ans", "dropout: 0.1 is a variant"),
        ("0.0", "some", "token: 'some'; choices: ans"),
    ):
        path.write_text(text.format(dropout=dropout, token=token))
        with pytest.raises(SpecError, match=said):
            load_config("malmen", {}, path, elsewhere)


@cache
def embedded() -> BaseModel:
    return BaseModel.load(ModelConfig(device="cpu"))


def success(
    method: str, config: Any, data: Mapping[str, ArtifactData], T: int, batch_size: int
) -> dict[str, float]:
    """Mean final scores on the tuning split, which no training has seen."""
    work = job(method, config, T, [[0, 1, 2]], data, batch_size=batch_size, generated=False)
    stream = Stream(session(embedded()), work, [load_requests("tune")], data)
    rows = [
        row
        for step in stream.run(range(1, len(stream.ticks) + 1))
        for row in step.rows
        if row["scored"] == "final"
    ]
    assert len(rows) == 3 * T
    names = ("reliability", "generalization", "locality")
    return {name: sum(row[f"{name}_exact"] for row in rows) / len(rows) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.long) if m == "rledit" else m for m in CONFIGS]
)
def test_training_raises_the_success_of_edits(method: str) -> None:
    base = embedded()
    config = load_config(method, {}, None, base.config)
    source = training_source("tinyworld")[0]
    size = 10 if method == "malmen" else 1
    scores = []
    for steps in (1, 30 if method == "rledit" else 150):  # a step of RLEdit's is a sequence of edits
        short = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": steps})})  # type: ignore[attr-defined]
        data = build_inputs(
            base, short.artifacts(ArtifactContext(ModelFingerprint("m", "t"), base.config, 0, source))
        )
        scores.append(success(method, short, data, 10, size))
    untrained, trained = scores
    assert trained["reliability"] >= 0.8 and trained["locality"] >= 0.6, scores
    gain = sum(trained[name] - untrained[name] for name in ("reliability", "generalization"))
    assert gain >= 0.2, scores
