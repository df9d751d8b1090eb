"""What MEND and MALMEN share, and their training: gradients against autograd, statistics, resumed training, and that it helps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import golden_requests, job, model_hash, random_model, session
from workers.artifacts import ArtifactData
from workers.data.tinyworld import load_requests
from workers.hypernet import (
    Block,
    Hypernet,
    HypernetTrainer,
    Questions,
    Statistics,
    changed,
    gradient_factors,
    hypernet_sites,
)
from workers.methods import get_method, load_config
from workers.methods.malmen import MALMENConfig, fit
from workers.methods.mend import MENDConfig
from workers.models import BaseModel, ModelConfig, ModelFingerprint
from workers.overlay import DenseOverlay
from workers.pretrain import Schedule, Trainer, training_source
from workers.rng import derive_generator
from workers.session import build_inputs
from workers.stream import Stream
from workers.types import DataError, EditRequest, SpecError

CONFIGS: Mapping[str, Any] = {
    "mend": MENDConfig(layers=(0, 2), rank=8, lr=1e-3, schedule=Schedule(steps=2)),
    "malmen": MALMENConfig(layers=(0, 2), modules=(), rank=8, lr=1e-2, meta_lr=1e-3, schedule=Schedule(steps=2)),
}


def trainer(base: BaseModel, method: str, seed: int = 0, **changes: Any) -> Trainer:
    hparams = CONFIGS[method].model_copy(update=changes).model_dump(mode="json")
    return get_method(method).trainer(base, hparams, derive_generator(seed))


def learn(trained: Trainer, steps: range) -> list[dict[str, float]]:
    requests = load_requests("train")
    return [trained.step(requests[4 * i : 4 * i + 4], derive_generator("step", i)) for i in steps]


# --- the parts ---


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
    with overlay.installed(questions.rows):
        hidden_PD = base.hidden_states(questions.rows)[list(row_P), list(column_P)]
        wanted_L = questions.targets.nll(base, hidden_PD)
    wanted_L.sum().backward()
    assert torch.allclose(loss_L, wanted_L.detach())
    for site, found in zip(sites, factors, strict=True):
        kept = found.kept_LN[..., None]
        change_LOI = (found.grad_LNO * kept).transpose(1, 2) @ (found.key_LNI * kept)
        assert torch.allclose(change_LOI, overlay.weights_LOI[site.name].grad, atol=1e-10)
        assert not (found.kept_LN & ~found.real_LN).any() and not (found.read_LN & ~found.real_LN).any()


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
    with torch.no_grad(), changed(sites, pairs, questions.rows):  # type: ignore[arg-type]
        ours = base.hidden_states(questions.rows)
    with torch.no_grad(), overlay.installed(questions.rows):
        assert torch.allclose(ours, base.hidden_states(questions.rows), atol=1e-9)


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
    """Its residual's gradient is zero: ``(S U - V) U^T + l S = 0``, in both forms of the normal equation."""
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
    assert set(whole.product().tensors) == {name.removeprefix("net/") for name in a if name.startswith("net/")}


@pytest.mark.parametrize("method", list(CONFIGS))
def test_gradients_reach_every_part_of_the_networks_and_nothing_else(method: str) -> None:
    """Against a finite difference of the loss by one step size, so that nothing on the way is cut off."""
    base = random_model("gpt2", torch.float64)  # Llama's norms are float32 whatever the weights are
    made = trainer(base, method, grad_clip=1e9) if method == "mend" else trainer(base, method, max_grad_norm=1e9)
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


def test_a_request_without_anything_else_is_named() -> None:
    made = trainer(random_model("llama"), "mend")
    lonely = EditRequest("c7", "The cat is", "cat", "green")
    with pytest.raises(DataError, match="case c7: locality, unrelated: neither is given"):
        made.step([lonely], derive_generator(0))
    alone = EditRequest("c8", "The cat is", "cat", "green", unrelated="The sky is blue.")
    assert made.step([alone], derive_generator(0))["kl"] >= 0


def test_networks_are_shared_by_configs_that_train_alike() -> None:
    source = training_source("tinyworld", shards=(16,))[0]
    for method, config in CONFIGS.items():
        keys = [
            get_method(method).artifacts(changed, ModelFingerprint("m", "t"), ModelConfig(), seed, source)[0].key
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


def success(method: str, config: Any, data: Mapping[str, ArtifactData], T: int, batch_size: int) -> dict[str, float]:
    """Mean final scores on the tuning split, which no training has seen."""
    work = job(method, config, T, [[0, 1, 2]], data, batch_size=batch_size, generated=False)
    stream = Stream(session(embedded()), work, [load_requests("tune")], data)
    rows = [
        row for step in stream.run(range(1, len(stream.ticks) + 1)) for row in step.rows if row["scored"] == "final"
    ]
    assert len(rows) == 3 * T
    names = ("reliability", "generalization", "locality")
    return {name: sum(row[f"{name}_exact"] for row in rows) / len(rows) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(CONFIGS))
def test_training_raises_the_success_of_edits(method: str) -> None:
    base = embedded()
    config = load_config(method, {}, None, base.config)
    source = training_source("tinyworld")[0]
    size = 10 if method == "malmen" else 1
    scores = []
    for steps in (1, 150):
        short = config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": steps})})  # type: ignore[attr-defined]
        data = build_inputs(
            base, get_method(method).artifacts(short, ModelFingerprint("m", "t"), base.config, 0, source)
        )
        scores.append(success(method, short, data, 10, size))
    untrained, trained = scores
    assert trained["reliability"] >= 0.8 and trained["locality"] >= 0.6, scores
    gain = sum(trained[name] - untrained[name] for name in ("reliability", "generalization"))
    assert gain >= 0.2, scores
