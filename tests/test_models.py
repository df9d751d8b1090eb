"""Where a model's parts are, and that running only the upper layers gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.small import GOLDEN, model_hash, random_model
from workers.model.architectures import ARCHITECTURES, architecture
from workers.model.base import BaseModel, model_shape, pick_device
from workers.model.batch import Batch, collate
from workers.model.config import ModelConfig, fingerprint_model
from workers.model.overlay import DenseOverlay
from workers.model.replay import capture, replay
from workers.types import ModelError, SpecError

pytestmark = pytest.mark.numeric

TEXTS = [
    ("The profession of Brewen Morwick is", "clock maker"),
    ("Yes,", "no"),
    ("Letters for Gordor Elkton go to", "Paris"),
]

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gptj": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 96, "rotary_dim": 4},
    "gemma": {"head_dim": 12, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 12, "num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
}


def model_of(model_type: str) -> BaseModel:
    if model_type == "gptj":
        return random_model("gptj", **SIZES["gptj"])
    sizes = SIZES.get(model_type, {})
    if model_type not in ("gpt2", "llama"):
        sizes = {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            **sizes,
        }
    return random_model(model_type, **sizes)


def batch(base: BaseModel, lanes: list[int]) -> Batch:
    return collate([base.encoder.pair(*t) for t in TEXTS], lanes, base.encoder.pad_id)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_table_finds_every_part(model_type: str) -> None:
    base = model_of(model_type)
    arch = base.arch
    assert len(base.layers) == 3
    rows = batch(base, [0, 0, 0])
    expected = base.model(
        input_ids=rows.input_ids_BS,
        attention_mask=rows.attention_mask_BS,
        position_ids=rows.position_ids_BS,
        use_cache=False,  # a cache may change the layout of the keys, and with it the rounding
    ).logits
    # rounded copies of a model of this size move logits by up to 6e-6
    torch.testing.assert_close(base.logits(base.hidden_states(rows)), expected, rtol=0, atol=1e-4)
    assert base.site(1).shape[0] == base.hidden
    for path in (*arch.attn_in, arch.attn_out, *arch.mlp_in, arch.mlp_out):
        site = base.site(2, path)
        x = torch.randn(3, site.shape[1], generator=torch.Generator().manual_seed(0))
        bias = site.bias_O if site.bias_O is not None else torch.zeros(site.shape[0])
        torch.testing.assert_close(site.module(x), x @ site.weight_OI.T + bias, rtol=1e-4, atol=1e-5)
    for path in (arch.attn, arch.mlp):
        base.layers[0].get_submodule(path)


@pytest.mark.parametrize("first_layer", [0, 2])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_replay_has_the_bits_of_the_full_forward(model_type: str, first_layer: int) -> None:
    base = model_of(model_type)
    rows = batch(base, [0, 0, 1])
    site = base.site(first_layer)
    overlay = DenseOverlay([site], 2, torch.float32)
    overlay.weights_LOI[site.name][1] *= 1.5
    before = model_hash(base)
    with overlay.installed(rows):
        full = base.logits(base.hidden_states(rows))
    prefix = capture(base, rows, first_layer)
    plain = base.logits(base.hidden_states(rows))
    with overlay.installed(rows):
        replayed = base.logits(replay(base, prefix))
    assert torch.equal(full, replayed)
    assert torch.equal(base.logits(prefix.output_BSD), plain)
    assert not torch.allclose(full[2], plain[2], atol=1e-4)
    torch.testing.assert_close(full[:2], plain[:2], rtol=1e-4, atol=1e-4)
    assert model_hash(base) == before


def test_a_forward_that_raises_leaves_the_modules_as_they_were() -> None:
    base = random_model("llama")
    rows = batch(base, [0, 0, 0])
    site = base.site(1)
    overlay = DenseOverlay([site], 1, torch.float32)
    overlay.weights_LOI[site.name] = torch.zeros(1, 3, 3)
    before = model_hash(base)
    with pytest.raises(RuntimeError), overlay.installed(rows):
        base.hidden_states(rows)
    assert model_hash(base) == before


def test_an_unknown_type_says_what_to_add() -> None:
    with pytest.raises(
        ModelError,
        match=r"'mamba' is not known; known: gemma.*ARCHITECTURES of workers/model/architectures.py",
    ):
        architecture("mamba")


def test_a_layer_out_of_range_names_the_range() -> None:
    base = random_model("llama")
    with pytest.raises(SpecError, match=r"layer 3 is out of range; the model has layers 0 to 2"):
        base.site(3)
    with pytest.raises(SpecError, match=r"no 'mlp.nothing'"):
        base.site(0, "mlp.nothing")


def test_the_shape_is_read_without_weights(tmp_path: Path) -> None:
    config = ModelConfig(name=str(GOLDEN / "models" / "tiny-gpt2"), dtype="bfloat16")
    shape = model_shape(config)
    assert (shape.model_type, shape.layers, shape.hidden, shape.bytes_per_value) == ("gpt2", 6, 128, 2)
    assert shape.site(None) == (128, 512)
    assert shape.site("attn.c_attn") == (384, 128)
    with pytest.raises(SpecError, match=r"choices: .*mlp.c_proj"):
        shape.site("mlp.down_proj")
    # the same without any weight file beside the config
    (tmp_path / "config.json").write_text((GOLDEN / "models" / "tiny-gpt2" / "config.json").read_text())
    assert model_shape(ModelConfig(name=str(tmp_path), dtype="bfloat16")) == shape
    loaded = BaseModel.load(ModelConfig(name=str(GOLDEN / "models" / "tiny-gpt2"), device="cpu"))
    assert shape.parameters == sum(p.numel() for p in loaded.model.parameters())


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    source = GOLDEN / "models" / "tiny-llama"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    original = fingerprint_model(ModelConfig(name=str(source)))
    assert fingerprint_model(ModelConfig(name=str(copy))) == original
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = fingerprint_model(ModelConfig(name=str(copy)))
    assert changed.model != original.model
    assert changed.tokenizer == original.tokenizer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("{tmp}", "without config.json"),
        ("{tmp}/typed", "known model types"),
        ("{tmp}/broken", "cannot be loaded"),
        ("{tmp}/odd", "cannot be loaded.*hidden size"),
    ],
)
def test_models_that_cannot_be_loaded_say_why(tmp_path: Path, name: str, message: str) -> None:
    odd = {"model_type": "llama", "hidden_size": 7}
    for folder, text in (
        ("typed", '{"model_type": "no-such-type"}'),
        ("broken", "{"),
        ("odd", json.dumps(odd)),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        BaseModel.load(ModelConfig(name=name.format(tmp=tmp_path), device="cpu"))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    config.save_pretrained(tmp_path)
    planted = tmp_path / "planted"
    torch.save({"lm_head.weight": _Planted(str(planted))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        BaseModel.load(ModelConfig(name=str(tmp_path), device="cpu"))
    with pytest.raises(ModelError, match="safetensors"):
        fingerprint_model(ModelConfig(name=str(tmp_path)))
    assert not planted.exists()


class _Planted:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_cuda_must_be_there_when_asked_for() -> None:
    if torch.cuda.is_available():
        assert pick_device(ModelConfig(device="cuda")) == "cuda"
    else:
        with pytest.raises(ModelError, match="choices: auto, cpu"):
            pick_device(ModelConfig(device="cuda"))


def test_conv1d_and_linear_answer_alike() -> None:
    """One overlay on GPT-2's transposed map and on a Linear with the same numbers."""
    gpt2 = random_model("gpt2")
    site = gpt2.site(1)
    weight_OI = site.weight_OI.clone() * 1.25
    overlay = DenseOverlay([site], 1, torch.float32)
    overlay.weights_LOI[site.name][0] = weight_OI
    x = torch.randn(2, 5, site.shape[1], generator=torch.Generator().manual_seed(0))
    rows = batch(gpt2, [0, 0, 0])
    linear = torch.nn.Linear(*reversed(site.shape))
    linear.weight.data.copy_(weight_OI)
    assert site.bias_O is not None
    linear.bias.data.copy_(site.bias_O)
    with overlay.installed(rows):
        torch.testing.assert_close(site.module(x), linear(x), rtol=1e-4, atol=1e-5)


def test_saved_models_load_in_every_precision(tmp_path: Path) -> None:
    base = random_model("llama")
    AutoModelForCausalLM.from_config(base.model.config).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    for dtype, master in (("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        loaded = BaseModel.load(ModelConfig(name=str(tmp_path), dtype=dtype, device="cpu"))
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert str(loaded.master_dtype) == f"torch.{master}"
        rows = batch(loaded, [0, 0, 0])
        assert str(loaded.logits(loaded.hidden_states(rows)).dtype) == f"torch.{master}"
