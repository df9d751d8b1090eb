"""Networks that map a gradient to an edit; shared by MEND, MALMEN and RLEdit.

>>> sites = hypernet_sites(base, layers=(4, 5), modules=())
>>> questions = Questions.of(base, [[(prompt, target)], [(other_prompt, other_target)]])  # one lane each
>>> factors, loss_L = gradient_factors(base, sites, questions, overlay)
>>> net = Hypernet([site.shape for site in sites], rank=64, blocks=2, rate=1e-3)
>>> key_LNI, grad_LNO = net(place, factors[place])  # same shapes, zero at tokens that are not kept

The gradient of a linear map's weight is the sum over tokens of (gradient of its output) x (its
input). A network takes this pair, normalised by running statistics, and returns another pair. Maps
of one shape share a network; each has its own scale and shift inside it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import PRETRAINED, TrainingSchedule, pretrained
from workers.data.needs import ELSEWHERE, Need
from workers.data.scripts import SPACE, joiner_of
from workers.inner_loop.losses import TargetTokens
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, Layers, Method, MethodConfig
from workers.methods.easyedit import split_module
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch, Encoded, collate
from workers.model.config import ModelShape
from workers.model.overlay import DenseOverlay, Overlay
from workers.model.replay import override_forward
from workers.types import JSON, EditRequest, SpecError

_TINY = 1e-7
"""Added to a standard deviation, as in the public code of both methods."""

Pair = tuple[Tensor, Tensor]
"""Factors of a weight change, one per lane: ``left_LNO`` and ``right_LNI``; the change is ``left^T
right``."""


# --- edited maps ----------------------------------------------------------------------------


def hypernet_sites(base: BaseModel, layers: Sequence[int], modules: Sequence[str]) -> list[Site]:
    """The edited maps, layer by layer; without modules, the MLP's output projection."""
    return [base.site(layer, module) for layer in sorted(layers) for module in (modules or (None,))]


def site_shapes(shape: ModelShape, layers: Sequence[int], modules: Sequence[str]) -> list[tuple[int, int]]:
    """(out, in) of each edited map, from a model's sizes. Raises :class:`SpecError` for a missing
    layer or map."""
    for layer in layers:
        shape.check_layer(layer, "layers")
    return [shape.site(module) for _ in layers for module in (modules or (None,))]


def split_inner_params(names: JSON, source: str) -> tuple[list[int], list[str]]:
    """EasyEdit's ``inner_params`` as layers and modules. Raises :class:`SpecError` unless every
    layer has the same modules."""
    if not isinstance(names, list):
        raise SpecError(f"{source}: inner_params: {names!r}: expected a list of module names")
    places = [split_module(name, source) for name in names]
    layers = sorted({layer for layer, _ in places if layer is not None})
    modules = list(dict.fromkeys(path for _, path in places))
    if not places or sorted(places, key=str) != sorted(((i, m) for i in layers for m in modules), key=str):
        raise SpecError(
            f"{source}: inner_params: {list(names)}: expected the same modules in each of some layers"
        )
    return layers, modules


# --- methods --------------------------------------------------------------------------------


class HypernetConfig(MethodConfig):
    """The edited maps, and the size of the networks that edit them."""

    layers: Layers = Field(min_length=1, description="decoder layers whose maps are edited")
    modules: tuple[str, ...] = Field(
        (), description="linear maps inside each layer; none: the MLP's output projection"
    )
    rank: int = Field(1920, ge=1, le=65_536, description="rank of the networks' maps")
    schedule: TrainingSchedule = Field(description="how long the networks are trained")

    method: ClassVar[str]
    """The name of the method that trains the networks."""
    learnt: ClassVar[tuple[str, ...]]
    """Names of the hyperparameters that the trained networks depend on."""

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "inner_params" in out:
            out["layers"], out["modules"] = split_inner_params(out.pop("inner_params"), source)
        return out

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Number of blocks of a network."""

    @property
    def first_layer(self) -> int:
        return min(self.layers)

    def check(self, shape: ModelShape) -> None:
        site_shapes(shape, self.layers, self.modules)

    @property
    def training_needs(self) -> tuple[Need, ...]:
        return (ELSEWHERE,)

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        hparams = self.model_dump(mode="json", include=set(self.learnt))
        return (
            pretrained(
                self.method, hparams, self.schedule, context.fingerprint, context.model, context.training
            ),
        )

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        copies = 3  # weight, its change, one temporary
        sizes = sum(out * in_features for out, in_features in site_shapes(shape, self.layers, self.modules))
        return copies * sizes * max(4, shape.bytes_per_value)

    def shared_bytes(self, shape: ModelShape) -> int:
        copies = 2  # as they were read, and in use
        sizes = site_shapes(shape, self.layers, self.modules)
        values = 4 * len(sizes)  # step sizes, counts
        for out, in_features in set(sizes):
            width = out + in_features
            block = width * (2 * min(self.rank, width) + 2 * sizes.count((out, in_features)) + 1)
            values += self.blocks * block + 4 * width  # and its statistics, in float64
        return copies * values * max(4, shape.bytes_per_value)


C = TypeVar("C", bound=HypernetConfig)
OverlayT = TypeVar("OverlayT", bound=DenseOverlay)


class HypernetMethod(Method[C, OverlayT]):
    """A method whose edit is one forward, one backward and one pass through the networks."""

    needs_pretraining: ClassVar[bool] = True
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.1

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        super().__init__(base, config, inputs)
        self.sites = hypernet_sites(base, config.layers, config.modules)
        self.net = self.network(base, config.model_dump(mode="json"), None).of_precision(base)
        self.net.restore(inputs[PRETRAINED].tensors)
        self.net.requires_grad_(False)

    @classmethod
    @abstractmethod
    def network(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None
    ) -> Hypernet:
        """Untrained networks."""

    @abstractmethod
    def changes(self, factors: Sequence[Factors], overlay: OverlayT) -> list[Pair]:
        """The change of each map."""

    def questions(self, lanes: Sequence[Sequence[Question]]) -> Questions:
        return Questions.of(self.base, lanes)

    def edit(self, overlay: OverlayT, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        asked = [list(map(question_of, edit.requests)) for edit in edits]
        factors, loss_L = gradient_factors(self.base, self.sites, self.questions(asked), overlay)
        with torch.no_grad():
            add(overlay, self.changes(factors, overlay))
        return [EditOutcome(1, loss / len(lane)) for loss, lane in zip(loss_L.tolist(), asked, strict=True)]


# --- gradients ------------------------------------------------------------------------------


Question = tuple[str, str] | tuple[str, str, str]
"""A prompt, its answer, and the text between them: one space unless it is given."""


def question_of(request: EditRequest) -> Question:
    return request.prompt, request.target_new, joiner_of(request, request.prompt)


@dataclass(frozen=True)
class Questions:
    """Prompts with their new answers, several per lane, as one batch."""

    batch: Batch
    targets: TargetTokens

    @classmethod
    def of(cls, base: BaseModel, lanes: Sequence[Sequence[Question]], public_bos: bool = False) -> Self:
        """The loss of a lane is the sum over its questions of the mean over the answer's tokens.

        It is a sum, so that a question has the same gradient in a batch as alone.
        ``public_bos`` tokenises the answer alone, which makes a BOS token part of it if the
        tokenizer adds one.
        """
        encoded: list[Encoded] = []
        places: list[tuple[int, int, int, float]] = []
        for question in (question for lane in lanes for question in lane):
            prompt, target, joiner = question if len(question) == 3 else (*question, SPACE)
            pair = base.encoder.pair(prompt, target, joiner)
            answer = base.encoder.text(f"{joiner}{target}") if public_bos else pair.target
            start = len(pair.ids) - 1 - len(answer)
            places += [(len(encoded), start + j, token, 1 / len(answer)) for j, token in enumerate(answer)]
            encoded.append(pair)
        batch = collate(
            encoded, [i for i, lane in enumerate(lanes) for _ in lane], base.encoder.pad_id, base.device
        )
        return cls(batch, TargetTokens.of(batch, places, len(lanes)))


@dataclass(frozen=True)
class Factors:
    """The factors of a weight's gradient, at the N columns of all rows of a lane."""

    key_LNI: Tensor
    """Input of the map."""
    grad_LNO: Tensor
    """Gradient of the lane's loss with respect to the map's output."""
    kept_LN: Tensor
    """Tokens that the networks take; initially the real tokens where both factors are non-zero."""
    read_LN: Tensor
    """Tokens that predict a token of an answer, where the loss is read."""
    real_LN: Tensor
    """Tokens that are not padding."""

    def lane(self, lane: int) -> Factors:
        """The factors of one lane."""
        part = slice(lane, lane + 1)
        return Factors(
            self.key_LNI[part],
            self.grad_LNO[part],
            self.kept_LN[part],
            self.read_LN[part],
            self.real_LN[part],
        )


def gradient_factors(
    base: BaseModel, sites: Sequence[Site], questions: Questions, overlay: Overlay | None = None
) -> tuple[list[Factors], Tensor]:
    """Factors at each site and the loss of each lane, (L,), from one forward and one backward pass
    at the edited weights.

    Every lane must have the same number of questions. All results are detached.
    """
    batch, targets = questions.batch, questions.targets
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def answer(site: Site, x_BSI: Tensor) -> Tensor:
        plain = plain_answer(site, x_BSI, batch, overlay)
        # no tensor below the lowest sites requires a gradient, so the graph must start here
        out_BSO = plain if plain.requires_grad else plain.detach().requires_grad_(True)
        inputs[site.name], outputs[site.name] = x_BSI.detach(), out_BSO
        return out_BSO

    with torch.enable_grad(), ExitStack() as stack:
        if overlay is not None:
            stack.enter_context(overlay.installed(batch))
        for site in sites:
            stack.enter_context(override_forward(site.module, _bind(answer, site)))
        row_P, column_P = targets.reads
        hidden_PD = base.hidden_states(batch)[list(row_P), list(column_P)]
        loss_L = targets.nll(base, hidden_PD)
        grads = torch.autograd.grad(loss_L.sum(), [outputs[site.name] for site in sites])
    lanes = targets.lanes
    read_BS = torch.zeros_like(batch.attention_mask_BS, dtype=torch.bool)
    read_BS[list(row_P), list(column_P)] = True
    real_LN = batch.attention_mask_BS.bool().reshape(lanes, -1)
    found = []
    for site, grad_BSO in zip(sites, grads, strict=True):
        key_LNI = inputs[site.name].to(base.master_dtype).reshape(lanes, -1, site.shape[1])
        grad_LNO = grad_BSO.to(base.master_dtype).reshape(lanes, -1, site.shape[0])
        kept_LN = real_LN & (key_LNI != 0).any(-1) & (grad_LNO != 0).any(-1)
        found.append(Factors(key_LNI, grad_LNO, kept_LN, read_BS.reshape(lanes, -1), real_LN))
    return found, loss_L.detach()


def plain_answer(site: Site, x_BSI: Tensor, batch: Batch, overlay: Overlay | None) -> Tensor:
    return site.base_output(x_BSI) if overlay is None else overlay.forward(site, x_BSI, batch)


def _bind(answer: Callable[[Site, Tensor], Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    return lambda x_BSI: answer(site, x_BSI)


# --- networks -------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Running mean and standard deviation of each feature over all rows seen. Part of the saved
    state."""

    count: Tensor
    mean_F: Tensor
    squares_F: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_F", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("squares_F", torch.zeros(features, dtype=torch.float64))

    @torch.no_grad()
    def update(self, x_NF: Tensor) -> None:
        """Add rows to the statistics (Chan et al.'s combination of two samples: Welford's rule for
        several rows at once)."""
        if not len(x_NF):
            return
        x_NF = x_NF.to(torch.float64)
        mean_F, seen, more = x_NF.mean(0), self.count.clone(), len(x_NF)
        apart_F = mean_F - self.mean_F
        self.count += more
        self.mean_F += apart_F * more / self.count
        self.squares_F += (x_NF - mean_F).square().sum(0) + apart_F.square() * seen * more / self.count

    def forward(self, x_NF: Tensor) -> Tensor:
        deviation_F = (self.squares_F / (self.count - 1).clamp_min(1)).sqrt()
        return (x_NF - self.mean_F.to(x_NF.dtype)) / (deviation_F.to(x_NF.dtype) + _TINY)


Scale = Mapping[str, Statistics]
"""The statistics of each shape of map."""

Order = Literal["inside", "outside"]
"""Scale and shift act inside the rectifier (MEND) or outside of it (MALMEN)."""


class Block(nn.Module):
    """``x + max(0, scale (U V x + b) + shift)`` (inside) or ``x + scale max(0, U V x + b) + shift``
    (outside).

    ``U`` is zero at first, so an untrained network is the identity.
    """

    def __init__(
        self, features: int, rank: int, modes: int, order: Order, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        rank = min(rank, features)
        self.order = order
        self.up_FR = nn.Parameter(torch.zeros(features, rank))
        self.down_RF = nn.Parameter(torch.randn(rank, features, generator=generator))
        self.bias_F = nn.Parameter(torch.zeros(features))
        self.scale_MF = nn.Parameter(torch.ones(modes, features))
        self.shift_MF = nn.Parameter(torch.zeros(modes, features))

    def forward(self, x_NF: Tensor, mode: int) -> Tensor:
        scale_F, shift_F = self.scale_MF[mode], self.shift_MF[mode]
        out_NF = F.linear(F.linear(x_NF, self.down_RF), self.up_FR, self.bias_F)
        # clamp, not relu: its gradient at zero, where training starts, is one
        if self.order == "inside":
            return x_NF + (out_NF * scale_F + shift_F).clamp(min=0)
        return x_NF + out_NF.clamp(min=0) * scale_F + shift_F


class Hypernet(nn.Module):
    """One network per shape, and two numbers per map: the step size ``rate_S``, and ``damping_S``,
    the log of MALMEN's lambda. S is an axis over maps."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        blocks: int,
        rate: float,
        order: Order = "inside",
        generator: torch.Generator | None = None,
    ) -> None:
        """``shapes``: (out, in) of each map. ``generator``: for the initial weights."""
        super().__init__()
        self.names = [f"{in_features}x{out}" for out, in_features in shapes]
        self.modes = [self.names[:i].count(name) for i, name in enumerate(self.names)]
        self.rate_S = nn.Parameter(torch.full((len(shapes),), rate))
        self.damping_S = nn.Parameter(torch.zeros(len(shapes)))
        self.statistics = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        for name, (out, in_features) in zip(self.names, shapes, strict=True):
            if name not in self.blocks:
                modes = self.names.count(name)
                self.statistics[name] = Statistics(in_features + out)
                self.blocks[name] = nn.ModuleList(
                    Block(in_features + out, rank, modes, order, generator) for _ in range(blocks)
                )

    def learn_scale(self, factors: Sequence[Factors], scale: Scale | None = None) -> None:
        """Add the kept tokens of each map to the statistics of its shape: the network's, or
        ``scale``."""
        for name, found in zip(self.names, factors, strict=True):
            (scale or self.scale)[name].update(_rows(found))

    @property
    def scale(self) -> Scale:
        return {name: found for name, found in self.statistics.items() if isinstance(found, Statistics)}

    def forward(self, place: int, factors: Factors, scales: Sequence[Scale] | None = None) -> Pair:
        """The new pair of map ``place``, (L, N, I) and (L, N, O); zero at tokens that are not kept.

        ``scales``: statistics per lane, used instead of the network's.
        """
        name = self.names[place]
        if scales is None:
            x_MF = self.statistics[name](_rows(factors))
        else:
            x_MF = torch.cat([scale[name](_rows(factors.lane(lane))) for lane, scale in enumerate(scales)])
        for block in self._blocks_of(name):
            x_MF = block(x_MF, self.modes[place])
        out_LNF = x_MF.new_zeros(*factors.kept_LN.shape, x_MF.shape[1])
        out_LNF = out_LNF.masked_scatter(factors.kept_LN[..., None], x_MF)
        in_features = factors.key_LNI.shape[-1]
        return out_LNF[..., :in_features], out_LNF[..., in_features:]

    def _blocks_of(self, name: str) -> nn.ModuleList:
        blocks = self.blocks[name]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def data(self) -> dict[str, Tensor]:
        """All weights and statistics, as copies."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict({name: tensors[name] for name in self.state_dict()})

    def of_precision(self, base: BaseModel) -> Self:
        """Convert to the masters' precision on the model's device, in place; the statistics stay in
        float64."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(base.device, base.master_dtype)
        for name, buffer in list(self.named_buffers()):
            module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            module.register_buffer(leaf, buffer.to(base.device))
        return self


def _rows(factors: Factors) -> Tensor:
    """Kept tokens of all lanes, input and gradient concatenated, (M, I + O)."""
    kept_LN = factors.kept_LN
    return torch.cat([factors.key_LNI[kept_LN], factors.grad_LNO[kept_LN]], dim=-1)


# --- MALMEN's normal equation ---------------------------------------------------------------


def token_choice(value: JSON, source: str) -> str:
    """Our word for ``token`` of a public hyperparameter file. Raises :class:`SpecError`."""
    choices = {"ans": "answer", "mask": "all", "all": "all"}
    if not isinstance(value, str) or value not in choices:
        raise SpecError(f"{source}: token: {value!r}; choices: {', '.join(choices)}")
    return choices[value]


def fit_keys(factors: Sequence[Factors], tokens: str) -> list[Factors]:
    """Select the tokens of the fit. ``tokens``: ``answer``; or ``all``, which includes tokens
    without gradient, because their values must stay."""
    if tokens == "answer":
        return [replace(found, kept_LN=found.read_LN) for found in factors]
    return [replace(found, kept_LN=found.real_LN) for found in factors]


def fitted(net: Hypernet, factors: Sequence[Factors], scales: Sequence[Scale] | None = None) -> list[Pair]:
    """``S`` of every lane and map as its factors: the values ``v_n``, and the rows of ``U^T (U U^T
    + l I)^-1``."""
    changes = []
    for place, found in enumerate(factors):
        other_LNI, grad_LNO = net(place, found, scales)
        key_LNI = torch.where(found.kept_LN[..., None], found.key_LNI, 0)
        size_LN1 = (other_LNI * key_LNI).sum(-1, keepdim=True)
        changes.append((-net.rate_S[place] * size_LN1 * grad_LNO, fit(key_LNI, net.damping_S[place].exp())))
    return changes


def fit(key_LNI: Tensor, damping: Tensor) -> Tensor:
    """``K (K^T K + l I)^-1`` of each lane's keys (rows of K), (L, N, I); computed as the equal ``(K
    K^T + l I)^-1 K`` if that system is smaller.

    A lane with non-finite keys gets non-finite results; the other lanes are not affected.
    """
    wide_LNI = key_LNI.to(torch.float64)
    _, tokens, in_features = wide_LNI.shape
    eye = torch.eye(min(tokens, in_features), dtype=torch.float64, device=key_LNI.device) * damping.to(
        torch.float64
    )
    if tokens <= in_features:
        gram_LNN = wide_LNI @ wide_LNI.transpose(1, 2) + eye
        found_LNI = torch.linalg.solve_ex(gram_LNN, wide_LNI)[0]
    else:
        gram_LII = wide_LNI.transpose(1, 2) @ wide_LNI + eye
        found_LNI = torch.linalg.solve_ex(gram_LII, wide_LNI.transpose(1, 2))[0].transpose(1, 2)
    fitted_LNI: Tensor = found_LNI.to(key_LNI.dtype)
    return fitted_LNI


def squared_norm(change: Pair) -> Tensor:
    """``|left^T right|^2`` over all lanes, from inner products of the rows instead of the
    product."""
    left_LNO, right_LNI = change
    return ((left_LNO @ left_LNO.transpose(1, 2)) * (right_LNI @ right_LNI.transpose(1, 2))).sum()


def add(overlay: DenseOverlay, changes: Sequence[Pair]) -> None:
    """Add every lane's change to its weights."""
    for site, (left_LNO, right_LNI) in zip(overlay.sites, changes, strict=True):
        overlay.weights_LOI[site.name] += torch.bmm(left_LNO.transpose(1, 2), right_LNI)
    overlay.touch(range(overlay.lanes))


# --- training -------------------------------------------------------------------------------
