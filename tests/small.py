"""Small real models and requests that tests share. Nothing here is random between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from workers import session as session_module
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import training_source
from workers.job import Lane, ScoreConfig, StreamCell, StreamJob
from workers.methods import get_method
from workers.methods.base import ArtifactContext
from workers.model.base import BaseModel
from workers.model.config import ModelConfig, ModelFingerprint
from workers.session import Session
from workers.types import EditRequest, Probe

GOLDEN = Path(__file__).parent / "golden"

_SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 96},
}
_TOKENIZER = {"llama": "tiny-llama", "gpt2": "tiny-gpt2"}


def random_model(model_type: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> BaseModel:
    """An untrained model with the golden tokenizer: small, and far from any fixed point that
    training would have found."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models" / _TOKENIZER.get(model_type, "tiny-llama"))
    sizes = {"max_position_embeddings": 128, **_SIZES.get(model_type, _SIZES["llama"]), **sizes}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=1200,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for (
            p
        ) in model.parameters():  # the default initialisation is so small that tokens hardly see each other
            if p.dim() > 1:
                p.data.mul_(4)
        model.get_output_embeddings().weight.data.mul_(5)  # and that every answer is nearly uniform
    return BaseModel(
        model, tokenizer, ModelConfig(name="random", dtype=str(dtype).removeprefix("torch."), device="cpu")
    )


def golden_model(name: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    """A trained model of the golden set: tiny-llama or tiny-gpt2."""
    config = ModelConfig(
        name=str(GOLDEN / "models" / name),
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",  # type: ignore[arg-type]
    )
    return BaseModel.load(config)


def golden_requests(count: int = 200) -> list[EditRequest]:
    """The golden edit requests, as ours."""
    records = json.loads((GOLDEN / "requests.json").read_text())[:count]
    return [
        EditRequest(
            case_id=str(r["case_id"]),
            prompt=r["prompt"],
            subject=r["subject"],
            target_new=r["target_new"],
            ground_truth=r["ground_truth"],
            rephrases=(r["rephrase_prompt"],),
            locality=(Probe(r["locality_prompt"], r["locality_ground_truth"]),),
            unrelated=r["loc_prompt"],
        )
        for r in records
    ]


def build_specs(base: BaseModel, method: str, config: Any, seed: int = 0) -> tuple[ArtifactSpec, ...]:
    """The artifacts of a method; what is pretrained learns from a few requests of the embedded
    world."""
    training = training_source("tinyworld", shards=(16,))[0] if get_method(method).needs_pretraining else None
    found: tuple[ArtifactSpec, ...] = config.artifacts(
        ArtifactContext(ModelFingerprint("random", "golden"), base.config, seed, training)
    )
    return found


def build_inputs(base: BaseModel, method: str, config: Any, seed: int = 0) -> dict[str, ArtifactData]:
    """Really build what a method asks for, by name; what is pretrained learns from a few requests
    of the embedded world.

    An artifact is built once in a process for each model with these weights, and kept as the bytes
    that a store would hold.
    """
    specs = build_specs(base, method, config, seed)
    model = f"{model_hash(base)} {base.config.model_dump_json()}"
    kept, found = _artifacts(), {}
    for spec in specs:
        if (model, spec.key) not in kept:
            (built,) = session_module.build_inputs(base, [spec]).values()
            kept[model, spec.key] = built.to_bytes()
        found[spec.name] = ArtifactData.from_bytes(kept[model, spec.key])
    return found


@cache
def _artifacts() -> dict[tuple[str, str], bytes]:
    return {}


def job(
    method: str,
    config: Any,
    T: int,
    groups: Sequence[Sequence[int]],
    artifacts: Mapping[str, ArtifactData] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    **score: Any,
) -> StreamJob:
    """A job of one cell; ``groups`` lists the groups of each wave."""
    names = {name: name for name in artifacts or {}}
    return StreamJob(
        method=method,
        config=config.model_dump(mode="json"),
        cells=(StreamCell(cell_id="cell", seed=seed, artifacts=names),),
        T=T,
        batch_size=batch_size,
        waves=tuple(tuple(Lane(group=g, stop_group=g + 1) for g in wave) for wave in groups),
        score=ScoreConfig(**score),
    )


def session(base: BaseModel) -> Session:
    torch.set_num_threads(1)
    return Session(base)


def model_hash(base: BaseModel) -> str:
    """Every byte of every parameter and buffer, and the module tree."""
    digest = hashlib.sha256()
    for name, module in base.model.named_modules():
        digest.update(f"{name}:{type(module).__name__}:{sorted(module.__dict__)};".encode())
    for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
        digest.update(f"{name}:{tensor.dtype}:{tensor.requires_grad}:{tensor.grad is None};".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


TIMES = ("edit_seconds", "score_seconds", "peak_memory_bytes")


def timeless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock and the operating system say."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
