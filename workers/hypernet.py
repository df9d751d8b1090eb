"""Networks that turn a gradient into an edit: what MEND and MALMEN share.

>>> sites = hypernet_sites(base, layers=(4, 5), modules=())
>>> questions = Questions.of(base, [[(prompt, target)], [(other_prompt, other_target)]])     # one lane each
>>> factors, loss_L = gradient_factors(base, sites, questions, overlay)
>>> net = Hypernet([site.shape for site in sites], rank=64, blocks=2, rate=1e-3)
>>> key_LNI, grad_LNO = net(place, factors[place])            # same shapes, rows that are not kept are zero

The gradient of a linear map's weight is the sum over tokens of (gradient of its answer) x (its input). A network reads that
pair, normalised by running statistics, and gives another pair. Maps of one shape share a network; a scale and a shift of
their own tell it which of them it is looking at.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workers.artifacts import ArtifactData, ArtifactSpec
from workers.losses import TargetTokens
from workers.methods.base import EditOutcome, LaneEdit, Layers, Method, MethodConfig, split_module
from workers.models import BaseModel, ModelConfig, ModelFingerprint, ModelShape, Site
from workers.overlay import DenseOverlay, Overlay, lane_linear
from workers.pretrain import PRETRAINED, Trainer, TrainingSource, pretrained
from workers.replay import answering, capture, replay
from workers.rows import Encoded, Rows, collate
from workers.types import JSON, DataError, EditRequest, SpecError

_TINY = 1e-7
"""Added to a standard deviation, as in the public code of both methods."""

Pair = tuple[Tensor, Tensor]
"""Factors of a change of weights, one per lane: ``left_LNO`` and ``right_LNI``; the change is ``left^T right``."""


# --- where ----------------------------------------------------------------------------------------------------------


def hypernet_sites(base: BaseModel, layers: Sequence[int], modules: Sequence[str]) -> list[Site]:
    """The edited maps, layer by layer; no modules: the MLP's output projection."""
    return [base.site(layer, module) for layer in sorted(layers) for module in (modules or (None,))]


def site_shapes(shape: ModelShape, layers: Sequence[int], modules: Sequence[str]) -> list[tuple[int, int]]:
    """(out, in) of each edited map, from a model's sizes alone. Raises :class:`SpecError` for what it lacks."""
    for layer in layers:
        shape.check_layer(layer, "layers")
    return [shape.site(module) for _ in layers for module in (modules or (None,))]


def split_inner_params(names: Sequence[str], source: str) -> tuple[list[int], list[str]]:
    """EasyEdit's ``inner_params`` as layers and modules. They have to be the same modules in every layer."""
    places = [split_module(name, source) for name in names]
    layers = sorted({layer for layer, _ in places if layer is not None})
    modules = list(dict.fromkeys(path for _, path in places))
    if not places or sorted(places, key=str) != sorted(((i, m) for i in layers for m in modules), key=str):
        raise SpecError(f"{source}: inner_params: {list(names)}: expected the same modules in each of some layers")
    return layers, modules


# --- methods ---------------------------------------------------------------------------------------------------------


class HypernetConfig(MethodConfig):
    """Which maps are edited, and by networks of which size."""

    layers: Layers = Field(min_length=1, description="decoder layers whose maps are edited")
    modules: tuple[str, ...] = Field((), description="linear maps inside each layer; none: the MLP's output projection")
    rank: int = Field(1920, ge=1, description="rank of the networks' maps")

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "inner_params" in out:
            out["layers"], out["modules"] = split_inner_params(out.pop("inner_params"), source)
        return out


C = TypeVar("C", bound=HypernetConfig)


class HypernetMethod(Method[C]):
    """One forward, one backward, and the networks: an edit is a single step."""

    needs_pretraining: ClassVar[bool] = True
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.1
    learnt: ClassVar[tuple[str, ...]]
    """Hyperparameters that the trained networks depend on."""

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        super().__init__(base, config, inputs)
        self.sites = hypernet_sites(base, config.layers, config.modules)
        self.net = self.network(base, config.model_dump(mode="json"), None).of_precision(base)
        self.net.restore(inputs[PRETRAINED].tensors)
        self.net.requires_grad_(False)

    @classmethod
    @abstractmethod
    def network(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None) -> Hypernet:
        """Untrained networks."""

    @abstractmethod
    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        """The change of each map."""

    def questions(self, lanes: Sequence[Sequence[tuple[str, str]]]) -> Questions:
        return Questions.of(self.base, lanes)

    def new_overlay(self, lanes: int) -> DenseOverlay:
        return DenseOverlay(self.sites, lanes, self.base.master_dtype)

    def edit(self, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if not isinstance(overlay, DenseOverlay):
            raise TypeError(f"{self.title} edits a DenseOverlay, not a {type(overlay).__name__}")
        asked = [[(r.prompt, r.target_new) for r in edit.requests] for edit in edits]
        factors, loss_L = gradient_factors(self.base, self.sites, self.questions(asked), overlay)
        with torch.no_grad():
            for site, (left_LNO, right_LNI) in zip(self.sites, self.changes(factors), strict=True):
                overlay.weights_LOI[site.name] += torch.bmm(left_LNO.transpose(1, 2), right_LNI)
        overlay.touch(range(overlay.lanes))
        return [EditOutcome(1, loss / len(lane)) for loss, lane in zip(loss_L.tolist(), asked, strict=True)]

    @classmethod
    def check(cls, config: Any, shape: ModelShape) -> None:
        site_shapes(shape, config.layers, config.modules)

    @classmethod
    def artifacts(
        cls,
        config: Any,
        fingerprint: ModelFingerprint,
        model: ModelConfig,
        seed: int,
        training: TrainingSource | None = None,
    ) -> tuple[ArtifactSpec, ...]:
        hparams = config.model_dump(mode="json", include=set(cls.learnt))
        return (pretrained(cls, hparams, config.schedule, fingerprint, model, training),)

    @classmethod
    def overlay_bytes(cls, config: Any, shape: ModelShape, edits: int) -> int:
        copies = 3  # weight, its change, one temporary
        sizes = sum(out * into for out, into in site_shapes(shape, config.layers, config.modules))
        return copies * sizes * max(4, shape.bytes_per_value)


# --- gradients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Prompts with the answers they are to have, some per lane, as one batch."""

    rows: Rows
    targets: TargetTokens

    @classmethod
    def of(cls, base: BaseModel, lanes: Sequence[Sequence[tuple[str, str]]], public_bos: bool = False) -> Self:
        """The loss of a lane is the sum over its questions of the mean over the answer's tokens.

        A sum, so that what is learnt from a question is the same in a batch as alone. ``public_bos`` tokenises the answer
        alone, which makes a BOS token part of it if the tokenizer adds one.
        """
        encoded: list[Encoded] = []
        places: list[tuple[int, int, int, float]] = []
        for prompt, target in (question for lane in lanes for question in lane):
            pair = base.encoder.pair(prompt, target)
            answer = base.encoder.text(f" {target}") if public_bos else pair.target
            start = len(pair.ids) - 1 - len(answer)
            places += [(len(encoded), start + j, token, 1 / len(answer)) for j, token in enumerate(answer)]
            encoded.append(pair)
        rows = collate(encoded, [i for i, lane in enumerate(lanes) for _ in lane], base.encoder.pad_id, base.device)
        return cls(rows, TargetTokens.of(rows, places, len(lanes)))


@dataclass(frozen=True)
class Factors:
    """What a weight's gradient is made of, at every column of every row of a lane (N of them)."""

    key_LNI: Tensor
    """What entered the map."""
    grad_LNO: Tensor
    """The gradient of the lane's loss by the map's answer."""
    kept_LN: Tensor
    """Rows that the networks see; at first, real tokens at which neither of the two is zero."""
    read_LN: Tensor
    """Tokens at which the loss is read: those that predict a token of an answer."""
    real_LN: Tensor
    """Tokens that are no padding."""


def gradient_factors(
    base: BaseModel, sites: Sequence[Site], questions: Questions, overlay: Overlay | None = None
) -> tuple[list[Factors], Tensor]:
    """Factors at each site and the loss of each lane, (L,), from one forward and one backward pass at the edited weights.

    Every lane has to have equally many questions. All results are detached.
    """
    rows, targets = questions.rows, questions.targets
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def answer(site: Site, x_BSI: Tensor) -> Tensor:
        plain = F.linear(x_BSI, site.weight_OI, site.bias_O) if overlay is None else overlay.forward(site, x_BSI, rows)
        # nothing below the lowest sites needs a gradient, so there one has to begin
        out_BSO = plain if plain.requires_grad else plain.detach().requires_grad_(True)
        inputs[site.name], outputs[site.name] = x_BSI.detach(), out_BSO
        return out_BSO

    with torch.enable_grad(), ExitStack() as stack:
        if overlay is not None:
            stack.enter_context(overlay.installed(rows))
        for site in sites:
            stack.enter_context(answering(site.module, _answer_at(answer, site)))
        row_P, column_P = targets.reads
        hidden_PD = base.hidden_states(rows)[list(row_P), list(column_P)]
        loss_L = targets.nll(base, hidden_PD)
        grads = torch.autograd.grad(loss_L.sum(), [outputs[site.name] for site in sites])
    lanes = targets.lanes
    read_BS = torch.zeros_like(rows.attention_mask_BS, dtype=torch.bool)
    read_BS[list(row_P), list(column_P)] = True
    real_LN = rows.attention_mask_BS.bool().reshape(lanes, -1)
    found = []
    for site, grad_BSO in zip(sites, grads, strict=True):
        key_LNI = inputs[site.name].to(base.master_dtype).reshape(lanes, -1, site.shape[1])
        grad_LNO = grad_BSO.to(base.master_dtype).reshape(lanes, -1, site.shape[0])
        kept_LN = real_LN & (key_LNI != 0).any(-1) & (grad_LNO != 0).any(-1)
        found.append(Factors(key_LNI, grad_LNO, kept_LN, read_BS.reshape(lanes, -1), real_LN))
    return found, loss_L.detach()


def _answer_at(answer: Callable[[Site, Tensor], Tensor], site: Site) -> Callable[[Tensor], Tensor]:
    return lambda x_BSI: answer(site, x_BSI)


# --- networks -------------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Running mean and deviation of each feature over all rows seen. Part of the saved state."""

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
        """Take more rows in (Chan et al.'s combination of two samples, which is Welford's rule for many rows at once)."""
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


Order = Literal["inside", "outside"]
"""Whether scale and shift act inside the rectifier (MEND) or outside of it (MALMEN)."""


class Block(nn.Module):
    """``x + max(0, scale (U V x + b) + shift)`` (inside) or ``x + scale max(0, U V x + b) + shift`` (outside).

    ``U`` is zero at first, so an untrained network gives back what it is given.
    """

    def __init__(self, features: int, rank: int, modes: int, order: Order, generator: torch.Generator | None) -> None:
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
        # clamp, not relu: its gradient at zero is one, and at zero is where training starts
        if self.order == "inside":
            return x_NF + (out_NF * scale_F + shift_F).clamp(min=0)
        return x_NF + out_NF.clamp(min=0) * scale_F + shift_F


class Hypernet(nn.Module):
    """A network per shape, and two numbers per map: ``rate_S``, its step size, and ``damping_S``, the log of MALMEN's lambda."""

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
        self.names = [f"{into}x{out}" for out, into in shapes]
        self.modes = [self.names[:i].count(name) for i, name in enumerate(self.names)]
        self.rate_S = nn.Parameter(torch.full((len(shapes),), rate))
        self.damping_S = nn.Parameter(torch.zeros(len(shapes)))
        self.statistics = nn.ModuleDict()
        self.blocks = nn.ModuleDict()
        for name, (out, into) in zip(self.names, shapes, strict=True):
            if name not in self.blocks:
                modes = self.names.count(name)
                self.statistics[name] = Statistics(into + out)
                self.blocks[name] = nn.ModuleList(
                    Block(into + out, rank, modes, order, generator) for _ in range(blocks)
                )

    def learn_scale(self, factors: Sequence[Factors]) -> None:
        """Take the kept rows of each map into the statistics of its shape."""
        for name, found in zip(self.names, factors, strict=True):
            statistics = self.statistics[name]
            assert isinstance(statistics, Statistics)
            statistics.update(_rows(found))

    def forward(self, place: int, factors: Factors) -> Pair:
        """The other pair for map ``place``: ``key_LNI``, ``grad_LNO``, zero in rows that are not kept."""
        x_MF = self.statistics[self.names[place]](_rows(factors))
        for block in self._blocks_of(self.names[place]):
            x_MF = block(x_MF, self.modes[place])
        out_LNF = x_MF.new_zeros(*factors.kept_LN.shape, x_MF.shape[1])
        out_LNF = out_LNF.masked_scatter(factors.kept_LN[..., None], x_MF)
        into = factors.key_LNI.shape[-1]
        return out_LNF[..., :into], out_LNF[..., into:]

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
        """In the masters' precision on the model's device; the statistics stay in float64."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(base.device, base.master_dtype)
        for name, buffer in list(self.named_buffers()):
            module, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            module.register_buffer(leaf, buffer.to(base.device))
        return self


def _rows(factors: Factors) -> Tensor:
    """Kept rows of all lanes, input and gradient side by side, (M, I + O)."""
    kept_LN = factors.kept_LN
    return torch.cat([factors.key_LNI[kept_LN], factors.grad_LNO[kept_LN]], dim=-1)


# --- training -------------------------------------------------------------------------------------------------------


@contextmanager
def changed(sites: Sequence[Site], changes: Sequence[Pair], rows: Rows) -> Iterator[None]:
    """Inside, each map answers with its lane's change added; gradients flow into the changes."""

    def answer(site: Site, pair: Pair, x_BSI: Tensor) -> Tensor:
        left_LNO, right_LNI = pair
        low_BSN = lane_linear(x_BSI, right_LNI, rows)
        return F.linear(x_BSI, site.weight_OI, site.bias_O) + lane_linear(low_BSN, left_LNO.transpose(1, 2), rows)

    with ExitStack() as stack:
        for site, pair in zip(sites, changes, strict=True):
            stack.enter_context(answering(site.module, _changed_at(answer, site, pair)))
        yield


def _changed_at(answer: Callable[[Site, Pair, Tensor], Tensor], site: Site, pair: Pair) -> Callable[[Tensor], Tensor]:
    return lambda x_BSI: answer(site, pair, x_BSI)


@dataclass(frozen=True)
class Objective:
    """What the edited model is judged by: ``cedit * NLL of the new answers + cloc * KL(before || after) elsewhere``.

    ``train_on``: which sentences ask for the new answer: one drawn from the request's prompt and its rephrases
    (``rephrase``, the papers' equivalence set), or always its prompt (``prompt``, EasyEdit's trainer).
    """

    cedit: float
    cloc: float
    train_on: Literal["rephrase", "prompt"]
    public_bos: bool = False


class HypernetTrainer(Trainer):
    """One Adam step per batch of requests. Gradients flow to the networks only: their inputs are detached, as in the papers."""

    def __init__(
        self,
        base: BaseModel,
        sites: Sequence[Site],
        net: Hypernet,
        objective: Objective,
        lr: float,
        rate_lr: float,
        clip: float,
    ) -> None:
        self.base = base
        self.sites = list(sites)
        self.net = net.of_precision(base)
        self.objective = objective
        self.clip = clip
        own = [net.rate_S]
        others = [p for p in net.parameters() if p is not net.rate_S]
        self._optimizer = torch.optim.Adam([{"params": others, "lr": lr}, {"params": own, "lr": rate_lr}])

    @abstractmethod
    def lanes(self, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        """Which requests are edited together: each lane is one edit of the pristine model."""

    @abstractmethod
    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        """The change of each map, from the networks as they are now."""

    @abstractmethod
    def chosen(self, factors: Sequence[Factors]) -> list[Factors]:
        """The same factors with the rows kept that the method uses."""

    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        base, objective = self.base, self.objective
        lanes = self.lanes(requests)
        edits = Questions.of(base, [[(r.prompt, r.target_new) for r in lane] for lane in lanes], objective.public_bos)
        found, _ = gradient_factors(base, self.sites, edits)
        factors = self.chosen(found)
        self.net.learn_scale(factors)
        judge = _Judge.of(base, lanes, self.sites[0].layer, objective, generator)
        with torch.enable_grad():
            nll, kl = judge.losses(base, self.sites, self.changes(factors))
            loss = objective.cedit * nll + objective.cloc * kl
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        figures = {"loss": float(loss.detach()), "nll": float(nll.detach()), "kl": float(kl.detach())}
        if math.isfinite(float(norm)):  # else the figures, or those of the next step, say so
            self._optimizer.step()
        else:
            figures["gradient"] = float(norm)
        return figures

    def state(self) -> ArtifactData:
        tensors = {f"net/{name}": tensor for name, tensor in self.net.data().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{key}"] = value.clone()
        return ArtifactData(tensors)

    def load_state(self, state: ArtifactData) -> None:
        self.net.restore({k.removeprefix("net/"): t for k, t in state.tensors.items() if k.startswith("net/")})
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.tensors.items():
            if key.startswith("adam/"):
                name, _, what = key.removeprefix("adam/").rpartition("/")
                moments.setdefault(name, {})[what] = tensor.clone()
        whole: dict[str, Any] = self._optimizer.state_dict()
        names = {p: name for name, p in self.net.named_parameters()}
        order = [names[p] for group in self._optimizer.param_groups for p in group["params"]]
        whole["state"] = {i: moments[name] for i, name in enumerate(order) if name in moments}
        self._optimizer.load_state_dict(whole)

    def product(self) -> ArtifactData:
        return ArtifactData(self.net.data())


@dataclass(frozen=True)
class _Judge:
    """Sentences that ask for the new answers, and sentences about something else, as one batch through the pristine model."""

    rows: Rows
    prefix: Any
    targets: TargetTokens
    other_row_P: list[int]
    other_column_P: list[int]
    share_P: Tensor
    edits: int

    @classmethod
    def of(
        cls,
        base: BaseModel,
        lanes: Sequence[Sequence[EditRequest]],
        first_layer: int,
        objective: Objective,
        generator: torch.Generator,
    ) -> Self:
        encoded: list[Encoded] = []
        lane_B: list[int] = []
        places: list[tuple[int, int, int, float]] = []
        others: list[tuple[int, int, float]] = []
        encoder = base.encoder
        for i, lane in enumerate(lanes):
            for request in lane:
                ways = (request.prompt, *(request.rephrases if objective.train_on == "rephrase" else ()))
                pair = encoder.pair(ways[_draw(len(ways), generator)], request.target_new)
                answer = encoder.text(f" {request.target_new}") if objective.public_bos else pair.target
                start = len(pair.ids) - 1 - len(answer)
                places += [(len(encoded), start + j, token, 1 / len(answer)) for j, token in enumerate(answer)]
                encoded.append(pair)
            for request in lane:
                kept, read = _elsewhere(base, request, generator)
                others += [(len(encoded), column, 1 / len(read)) for column in read]
                encoded.append(kept)
            lane_B += [i] * (2 * len(lane))
        rows = collate(encoded, lane_B, encoder.pad_id, base.device)
        row, column, share = zip(*others, strict=True)
        return cls(
            rows,
            capture(base, rows, first_layer),
            TargetTokens.of(rows, places, len(lanes)),
            list(row),
            [rows.offsets[r] + c for r, c in zip(row, column, strict=True)],
            torch.tensor(share, dtype=base.master_dtype, device=base.device),
            sum(map(len, lanes)),
        )

    def losses(self, base: BaseModel, sites: Sequence[Site], changes: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Mean over the requests of both terms."""
        with changed(sites, changes, self.rows):
            hidden_BSD = replay(base, self.prefix)
        row_P, column_P = self.targets.reads
        nll = self.targets.nll(base, hidden_BSD[list(row_P), list(column_P)]).sum()
        with torch.no_grad():
            before_PV = base.logits(self.prefix.output_BSD[self.other_row_P, self.other_column_P]).log_softmax(-1)
        after_PV = base.logits(hidden_BSD[self.other_row_P, self.other_column_P]).log_softmax(-1)
        kl_P = F.kl_div(after_PV, before_PV, log_target=True, reduction="none").sum(1)
        return nll / self.edits, (kl_P * self.share_P).sum() / self.edits


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _elsewhere(base: BaseModel, request: EditRequest, generator: torch.Generator) -> tuple[Encoded, range]:
    """A sentence that the edit must not touch, and the columns whose predictions have to stay.

    One of the locality probes, at its answer; a request without one gives its unrelated sentence, at all tokens.
    """
    if request.locality:
        probe = request.locality[_draw(len(request.locality), generator)]
        pair = base.encoder.pair(probe.prompt, probe.target)
        return pair, range(pair.prompt_len - 1, len(pair.ids) - 1)
    if request.unrelated is None:
        raise DataError(
            f"case {request.case_id}: locality, unrelated: neither is given, and training needs one to learn what to leave alone"
        )
    ids = base.encoder.text(request.unrelated)
    return Encoded(ids, len(ids)), range(len(ids))
