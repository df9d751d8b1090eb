"""Loading a base model, and where its parts are.

Everything that depends on an architecture stands in :data:`ARCHITECTURES`, keyed by ``config.model_type``; supporting
another one is one line there. Both weight orientations (``nn.Linear`` and GPT-2's ``Conv1D``) are handled by :class:`Site`.

>>> base = BaseModel.load(ModelConfig(name="embedded"))
>>> base.site(layer=4).weight_OI.shape        # always (out, in)
torch.Size([128, 512])

Only :func:`fingerprint_model` and :func:`model_shape` serve the planner: they read files, never weights into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workers.job import Frozen
from workers.types import ModelError, SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from workers.layers import Weights
    from workers.recorded import Pool
    from workers.rows import Encoder, Rows

EMBEDDED = "embedded"

LAID_OUT = 1 << 22
"""Weights of a decoder layer up to which edits on a processor lay them out a second time (:mod:`workers.layers`): a larger layer
is products almost alone."""


class ModelConfig(Frozen):
    """Which base model, in which precision, where."""

    name: str = Field(
        EMBEDDED, min_length=1, max_length=1000, description="'embedded', a local folder, or a Hugging Face name"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    compile: bool = Field(
        False,
        description="torch.compile the decoder layers inside an edit's steps: faster on a GPU after a minute of compiling, but "
        "rows of different actors agree up to rounding only",
    )


@dataclass(frozen=True)
class Arch:
    """Module paths of one architecture; paths below ``layers`` are relative to one decoder layer."""

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
            "in ARCHITECTURES of workers/models.py (one entry)."
        ) from None


@dataclass(frozen=True)
class ModelFingerprint:
    """Content hashes that enter every cell id."""

    model: str
    tokenizer: str


@dataclass(frozen=True)
class ModelShape:
    """What the planner needs to know of a model: sizes of linear maps, never their values."""

    model_type: str
    layers: int
    hidden: int
    vocab: int
    parameters: int
    bytes_per_value: int
    linear: Mapping[str, tuple[int, int]]
    """(out, in) of each linear map of a decoder layer, by its path inside the layer."""
    context: int | None = None
    """Tokens the model reads at most; None: unknown."""

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_value

    def laid_out_bytes(self, layer: int) -> int:
        """What edits of ``layer`` on a processor keep of the layers above it beside the weights, at most."""
        each = sum(out * into for out, into in self.linear.values())
        return 2 * each * self.bytes_per_value * (self.layers - 1 - layer) if each <= LAID_OUT else 0

    def check_layer(self, layer: int, field: str) -> None:
        """Raise :class:`SpecError` if the model has no such decoder layer."""
        if not 0 <= layer < self.layers:
            raise SpecError(f"{field}: layer {layer} is out of range; the model has layers 0 to {self.layers - 1}")

    def site(self, module: str | None) -> tuple[int, int]:
        """(out, in) of a layer's linear map; None means the MLP's output projection."""
        path = module or architecture(self.model_type).mlp_out
        try:
            return self.linear[path]
        except KeyError:
            raise SpecError(
                f"module: {path!r} is not a linear map of a {self.model_type} layer; choices: {', '.join(self.linear)}"
            ) from None


def resolve(config: ModelConfig) -> Path:
    """The folder with the model's files. Hub names resolve through the local cache or a download.

    Raises :class:`ModelError` if nothing is found there.
    """
    if config.name == EMBEDDED:
        from workers.data.tinyworld import assets_dir

        return assets_dir()
    path = Path(os.path.expanduser(config.name))  # the function leaves an unknown user's name as it stands
    if os.path.exists(path):  # and this one says no to what no path can be
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: {config.name!r} is a folder without config.json")
        return path.resolve()
    if path.is_absolute() or config.name.startswith(".") or config.name.count("/") > 1:
        raise ModelError(f"model.name: {config.name!r} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except Exception as error:
        raise ModelError(
            f"model.name: {config.name!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"choices: '{EMBEDDED}', a local folder, or a hub name such as 'org/model'"
        ) from error


def fingerprint_model(config: ModelConfig) -> ModelFingerprint:
    """Hash the files that decide the numbers: config and weights, and apart from them the tokenizer."""
    folder = resolve(config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"model.name: {folder} holds no *.safetensors (pickled weights are never read)")
    tokenizer = sorted(
        p
        for p in folder.iterdir()
        if p.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"))
    )
    return ModelFingerprint(_hash_files([folder / "config.json", *weights]), _hash_files(tokenizer))


def has_chat_template(config: ModelConfig) -> bool:
    """Whether the model's tokenizer knows how to write a chat; told by its files, without loading it."""
    folder = resolve(config)
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: cannot be read: {error}") from None
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _hash_files(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()[:32]


def model_shape(config: ModelConfig) -> ModelShape:
    """Sizes from the model's config alone: the modules are built on torch's meta device, without storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = resolve(config)
    hf = _read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code), config)
    arch = architecture(hf.model_type)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf, trust_remote_code=config.trust_remote_code
        )
    layers = model.get_submodule(arch.layers)
    linear = {}
    for path in (*arch.attn_in, arch.attn_out, *arch.mlp_in, arch.mlp_out):
        linear[path] = Site(layers[0].get_submodule(path), path, 0).shape
    return ModelShape(
        model_type=hf.model_type,
        layers=len(layers),
        hidden=hf.hidden_size,
        vocab=hf.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_per_value={"float64": 8, "float32": 4}.get(config.dtype, 2),
        linear=MappingProxyType(linear),
        context=context_length(hf),
    )


def context_length(hf: Any) -> int | None:
    """How many tokens a model reads, from its ``transformers`` config; None if it does not say."""
    value = getattr(hf, "max_position_embeddings", None)
    return None if value is None else int(value)


def _read(load: Any, config: ModelConfig) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return load()
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        known = ", ".join(sorted(ARCHITECTURES))
        cause = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.name: {config.name!r} cannot be loaded ({cause}); known model types: {known}"
        ) from error


class Site:
    """One linear map inside the model, seen as (out, in) whatever its class stores."""

    def __init__(self, module: nn.Module, name: str, layer: int) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D can be edited")
        self.module = module
        self.name = name
        self.layer = layer
        self.transposed = isinstance(module, Conv1D)

    def is_mlp_output(self, arch: Arch) -> bool:
        """Whether this is the map whose answer its layer adds to the sum it passes on."""
        return self.name.endswith(f"{arch.layers}.{self.layer}.{arch.mlp_out}")

    @property
    def weight_OI(self) -> Tensor:
        """A view of the base weight. Never write into it."""
        weight: Tensor = self.module.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def bias_O(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias
        return None if bias is None else bias.detach()

    def answer(self, x_BSI: Tensor) -> Tensor:
        """What the base's map answers, (B, S, O)."""
        from workers.products import linear

        return linear(x_BSI, self.weight_OI, self.bias_O)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


class BaseModel:
    """A frozen causal language model: the shared, read-only ground every overlay stands on."""

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, chat_template: bool = False) -> None:
        from workers.compiled import WORTH, Compiled
        from workers.products import quicken
        from workers.rows import Encoder

        self.model: Any = model.eval().requires_grad_(False)
        quicken(model)
        large = self.device.type == "cuda" and sum(p.numel() for p in model.parameters()) >= WORTH
        self.compiled = Compiled(updates=large, layers=config.compile)
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, chat_template)
        self.arch = architecture(model.config.model_type)
        self.backbone: Any = model.get_submodule(self.arch.backbone)
        self.layers: list[nn.Module] = list(model.get_submodule(self.arch.layers))
        self.norm: Any = model.get_submodule(self.arch.norm)
        self.head_module: Any = model.get_submodule(self.arch.head)
        self.vocab = int(self.head_module.weight.shape[0])
        self._quick: dict[int, Weights | None] = {}
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @classmethod
    def load(cls, config: ModelConfig) -> BaseModel:
        """Load weights (safetensors only) and tokenizer. Raises :class:`ModelError`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        folder = resolve(config)
        remote = config.trust_remote_code
        hf = _read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=remote), config)
        architecture(hf.model_type)
        device = pick_device(config)
        model = _read(
            lambda: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                trust_remote_code=remote,
            ),
            config,
        )
        tokenizer = _read(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=remote), config)
        return cls(model.to(device), tokenizer, config)

    def with_encoder(self, encoder: Encoder) -> BaseModel:
        """The same weights seen through another encoder (a chat template)."""
        import copy

        other = copy.copy(self)
        other.encoder = encoder
        return other

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @cached_property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @cached_property
    def master_dtype(self) -> torch.dtype:
        """Precision of overlays and of the head: never below float32."""
        import torch

        return torch.promote_types(self.dtype, torch.float32)

    @cached_property
    def pool(self) -> Pool | None:
        """Where steps of edits are recorded; None: they are not, which would help on a GPU only."""
        from workers.recorded import Pool

        return Pool() if self.device.type == "cuda" else None

    def quick_weights(self, layer: int) -> Weights | None:
        """A decoder layer's weights laid out for :class:`~workers.layers.QuickLayer`, once; None where there is no such way."""
        from workers.layers import Weights

        if layer not in self._quick:
            self._quick[layer] = Weights.of(self.layers[layer])
        return self._quick[layer]

    @property
    def hidden(self) -> int:
        return int(self.model.config.hidden_size)

    @cached_property
    def activation(self) -> Any:
        """The MLP's activation function (WISE measures distances behind it)."""
        from transformers.activations import ACT2FN

        config = self.model.config
        name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        return ACT2FN[getattr(config, "hidden_activation", None) or name]

    def site(self, layer: int, module: str | None = None) -> Site:
        """The linear map ``module`` of a decoder layer (None: the MLP's output projection)."""
        if not 0 <= layer < len(self.layers):
            raise SpecError(f"layer {layer} is out of range; the model has layers 0 to {len(self.layers) - 1}")
        path = module or self.arch.mlp_out
        try:
            found = self.layers[layer].get_submodule(path)
        except AttributeError:
            raise SpecError(f"module: decoder layer {layer} has no {path!r}") from None
        return Site(found, f"{self.arch.layers}.{layer}.{path}", layer)

    def hidden_states(self, rows: Rows) -> Tensor:
        """Hidden states after the final norm, (B, S, D). Runs every layer; see ``replay`` for less."""
        out = self.backbone(
            input_ids=rows.input_ids_BS,
            attention_mask=rows.attention_mask_BS,
            position_ids=rows.position_ids_BS,
            use_cache=False,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Head in at least float32 (in bfloat16 a few percent of the top-2 tie exactly). (..., D) -> (..., V)."""
        from workers.products import wide_linear

        weight, bias = self.head_module.weight, getattr(self.head_module, "bias", None)
        out = wide_linear(hidden, weight, bias, self.master_dtype)
        if self._softcap is not None:
            out = (out / self._softcap).tanh() * self._softcap
        return out


def pick_device(config: ModelConfig) -> str:
    """Resolve ``auto``; a device asked for by name must be there."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: 'cuda' was asked for, but torch sees no CUDA device here; choices: auto, cpu")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
