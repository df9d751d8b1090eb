"""Loading a base model, and access to its parts.

The module paths are listed in :mod:`workers.model.architectures`, keyed by ``config.model_type``.
Both weight orientations (``nn.Linear`` and GPT-2's ``Conv1D``) are handled by :class:`Site`.

>>> base = BaseModel.load(ModelConfig(name="embedded"))
>>> base.site(layer=4).weight_OI.shape        # always (out, in)
torch.Size([128, 512])

The planner calls only :func:`model_shape`, which reads the model's config and not its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workers.folders import build_model, open_config, open_model
from workers.model.architectures import ARCHITECTURES, Arch, architecture
from workers.model.config import ModelConfig, ModelShape, context_length, resolve
from workers.model.tokenizer import load_tokenizer
from workers.types import ModelError, SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from workers.kernels.compiled import Compiled
    from workers.kernels.cuda_graphs import Pool
    from workers.model.batch import Batch, Encoder


def model_shape(config: ModelConfig) -> ModelShape:
    """Sizes of a model, from its config alone: the modules are built on torch's meta device,
    without storage."""
    import torch

    folder, own_code = resolve(config), config.trust_remote_code
    hf = _read(lambda: open_config(folder, own_code), config)
    arch = architecture(hf.model_type)
    with torch.device("meta"):
        model = _read(lambda: build_model("causal", hf, own_code), config)
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


def load_encoder(
    config: ModelConfig, chat_template: bool, template: Mapping[str, Any] | None = None
) -> Encoder:
    """The model's tokenizer as an encoder, without the model. Raises :class:`ModelError`, and
    :class:`DataError` if its chat template does not put an answer where it asks for one."""
    from workers.model.batch import Encoder

    return Encoder(_tokenizer(config), chat_template, template)


def _tokenizer(config: ModelConfig) -> Any:
    return load_tokenizer(resolve(config), f"model.name: {config.name!r}", config.trust_remote_code)


def _read(load: Any, config: ModelConfig) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(ARCHITECTURES))
        cause = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.name: {config.name!r} cannot be loaded ({cause}); known model types: {known}"
        ) from error


class Site:
    """One linear map inside the model, with its weight as (out, in) for every module class."""

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
        """Return whether this map's output is what its layer adds to the residual stream."""
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

    def base_output(self, x_BSI: Tensor) -> Tensor:
        """Return the output of the base's map, (B, S, O)."""
        from workers.kernels.matmul import linear

        return linear(x_BSI, self.weight_OI, self.bias_O)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


class BaseModel:
    """A frozen causal language model, shared by all overlays and never written to."""

    def __init__(self, model: Any, tokenizer: Any, config: ModelConfig, chat_template: bool = False) -> None:
        from workers.kernels.bundle import Kernels
        from workers.model.batch import Encoder

        self.model: Any = model.eval().requires_grad_(False)
        self.kernels = Kernels()
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, chat_template)
        self.arch = architecture(model.config.model_type)
        self.backbone: Any = model.get_submodule(self.arch.backbone)
        self.layers: list[nn.Module] = list(model.get_submodule(self.arch.layers))
        self.norm: Any = model.get_submodule(self.arch.norm)
        self.head_module: Any = model.get_submodule(self.arch.head)
        self.vocab = int(self.head_module.weight.shape[0])
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    @classmethod
    def load(cls, config: ModelConfig) -> BaseModel:
        """Load weights (safetensors only) and tokenizer. Raises :class:`ModelError`."""
        import torch

        folder, own_code = resolve(config), config.trust_remote_code
        hf = _read(lambda: open_config(folder, own_code), config)
        architecture(hf.model_type)
        device = pick_device(config)
        dtype = getattr(torch, config.dtype)
        model = _read(lambda: open_model("causal", folder, own_code, dtype), config)
        return cls(model.to(device), _tokenizer(config), config)

    def with_encoder(self, encoder: Encoder) -> BaseModel:
        """The same weights with another encoder (one with a chat template)."""
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

    @property
    def compiled(self) -> Compiled:
        """The compiled parts of an edit."""
        return self.kernels.compiled

    @property
    def pool(self) -> Pool | None:
        """Memory for recorded steps of edits; None: steps are not recorded."""
        return self.kernels.pool

    @property
    def hidden(self) -> int:
        return int(self.model.config.hidden_size)

    @cached_property
    def activation(self) -> Any:
        """The MLP's activation function (WISE compares activations after it)."""
        from transformers.activations import ACT2FN

        config = self.model.config
        name = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        return ACT2FN[getattr(config, "hidden_activation", None) or name]

    def site(self, layer: int, module: str | None = None) -> Site:
        """The linear map ``module`` of a decoder layer (None: the MLP's output projection)."""
        if not 0 <= layer < len(self.layers):
            raise SpecError(
                f"layer {layer} is out of range; the model has layers 0 to {len(self.layers) - 1}"
            )
        path = module or self.arch.mlp_out
        try:
            found = self.layers[layer].get_submodule(path)
        except AttributeError:
            raise SpecError(f"module: decoder layer {layer} has no {path!r}") from None
        return Site(found, f"{self.arch.layers}.{layer}.{path}", layer)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, (B, S, D). Runs every layer; ``replay`` runs only the
        last ones."""
        out = self.backbone(
            input_ids=batch.input_ids_BS,
            attention_mask=batch.attention_mask_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., D) -> (..., V). The head runs in at least float32: in
        bfloat16 the two largest logits are equal for a few percent of the tokens."""
        from workers.kernels.matmul import wide_linear

        weight, bias = self.head_module.weight, getattr(self.head_module, "bias", None)
        out = wide_linear(hidden, weight, bias, self.master_dtype)
        if self._softcap is not None:
            out = (out / self._softcap).tanh() * self._softcap
        return out


def pick_device(config: ModelConfig) -> str:
    """Resolve ``auto``. Raises :class:`ModelError` if ``cuda`` is requested but not available."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model.device: 'cuda' was asked for, but torch sees no CUDA device here; choices: auto, cpu"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device
