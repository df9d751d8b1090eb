"""The parts of each supported architecture, keyed by model_type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from workers.types import ModelError


@dataclass(frozen=True)
class Arch:
    """Module paths of one architecture; paths below ``layers`` are relative to one decoder
    layer."""

    backbone: str
    layers: str
    norm: str
    head: str
    attn: str
    attn_in: tuple[str, ...]
    attn_out: str
    mlp: str
    mlp_in: tuple[str, ...]
    mlp_out: str


_LLAMA = Arch(
    backbone="model",
    layers="model.layers",
    norm="model.norm",
    head="lm_head",
    attn="self_attn",
    attn_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attn_out="self_attn.o_proj",
    mlp="mlp",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
)

ARCHITECTURES: Mapping[str, Arch] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gemma": _LLAMA,
        "phi3": replace(_LLAMA, attn_in=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
        "gpt2": Arch(
            backbone="transformer",
            layers="transformer.h",
            norm="transformer.ln_f",
            head="lm_head",
            attn="attn",
            attn_in=("attn.c_attn",),
            attn_out="attn.c_proj",
            mlp="mlp",
            mlp_in=("mlp.c_fc",),
            mlp_out="mlp.c_proj",
        ),
        "gptj": Arch(
            backbone="transformer",
            layers="transformer.h",
            norm="transformer.ln_f",
            head="lm_head",
            attn="attn",
            attn_in=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            attn_out="attn.out_proj",
            mlp="mlp",
            mlp_in=("mlp.fc_in",),
            mlp_out="mlp.fc_out",
        ),
        "gpt_neox": Arch(
            backbone="gpt_neox",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="lm_head",
            attn="attention",
            attn_in=("attention.query_key_value",),
            attn_out="attention.dense",
            mlp="mlp",
            mlp_in=("mlp.dense_h_to_4h",),
            mlp_out="mlp.dense_4h_to_h",
        ),
    }
)


def architecture(model_type: str) -> Arch:
    """Raises :class:`ModelError` with what to add for an unknown type."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise ModelError(
            f"model type {model_type!r} is not known; known: {', '.join(sorted(ARCHITECTURES))}. "
            "To add it, give the paths of its decoder layers, projections, final norm and head "
            "in ARCHITECTURES of workers/model/architectures.py (one entry)."
        ) from None
