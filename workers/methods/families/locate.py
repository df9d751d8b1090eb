"""Common part of the locate-then-edit family (ROME, R-ROME, MEMIT, EMMET, PMET, AlphaEdit).

>>> facts = facts_of(base, edits, config, inputs)               # a lane may have several requests
>>> for chunk in chunked(facts, overlay.lanes):
...     part = Facts(base, chunk)
...     at = AtMap.capture(base, site, part, overlay)
...     found = search(base, config, part, at, [at.value_NO])  # or [at.layer_NO]: the value of the whole layer
>>> keys, (now_ND,) = observe(base, overlay, facts, sites, [base.layers[z]])  # keys_NI of each site
>>> change = factor.solve(keys_LIN)                              # C^-1 K in float64

A *fact* is one request of one lane. Each has its own vector, optimiser state and stop, so that
neither lanes nor the requests of a batch depend on each other. The mathematics: Meng et al., arXiv
2202.05262, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from workers.artifacts import stats, templates
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.data.needs import SUBJECT, Need
from workers.data.scripts import joiner_of, subject_position
from workers.inner_loop.descend import DivisibleProblem, descend
from workers.inner_loop.losses import TargetTokens
from workers.inner_loop.optim import Adam
from workers.inner_loop.suffix import Suffix
from workers.methods.base import MOST_STEPS, ArtifactContext, LaneEdit, MethodConfig
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch, Encoded, collate
from workers.model.overlay import Overlay
from workers.model.replay import override_forward
from workers.types import JSON, DataError, EditRequest

STOP_LOSS = 5e-2
"""A fact whose loss is below this makes no further step (the published constant)."""

STARTS = ("The", "Therefore", "Because", "I", "You")
"""First words of the context templates, as published."""

MOMENT = "moment"
TEMPLATES = "templates"

_AT_ONCE = 64
"""Facts in one value search if lanes have several; one fact per lane is always searched
together."""


class LocateConfig(MethodConfig):
    """Hyperparameters of the value search and of the statistics, under their usual names."""

    fact_token: Literal["subject_last", "last"] = Field(
        "subject_last", description="where the fact is looked up: the subject's or the prompt's last token"
    )
    v_num_grad_steps: int = Field(
        20, ge=1, le=MOST_STEPS, description="evaluations of the loss that finds the value (one step fewer)"
    )
    v_lr: float = Field(0.5, gt=0, description="Adam's step size for the value")
    v_weight_decay: float = Field(1e-3, ge=0, description="weight of the value change's norm in the loss")
    clamp_norm_factor: float = Field(
        4.0, gt=0, description="largest norm of the value change, relative to the value"
    )
    kl_factor: float = Field(0.0625, ge=0, description="weight of the KL term")
    kl_position: Literal["prompt_last", "subject_last"] = Field(
        "subject_last",
        description="token of '{subject} is a' whose prediction is kept (prompt_last: Eq. 4 to the letter)",
    )
    context_template_length_params: tuple[tuple[int, int], ...] = Field(
        ((5, 10), (10, 10)),
        description="[length in tokens, how many templates] pairs; a multiple of five each",
    )
    samples: int = Field(100_000, ge=1, description="lines of the corpus that enter the second moment")
    precision: Literal["float32", "float64"] = Field("float32", description="precision of the sums")
    corpus: str | None = Field(
        None,
        description="text (one a line) or JSONL file for the second moment; null: the embedded model's own "
        "text, for it alone",
    )

    title: ClassVar[str]
    """The method's name in messages about its corpus."""

    @field_validator("context_template_length_params")
    @classmethod
    def _fives(cls, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for length, count in pairs:
            if length < 1 or count < 1 or count % len(STARTS):
                raise ValueError(
                    f"[{length}, {count}]: needs a length of 1 or more, a multiple of {len(STARTS)} templates"
                )
        return pairs

    @property
    def reads_subject(self) -> bool:
        return self.fact_token == "subject_last"

    @property
    def uses_seed(self) -> bool:
        return bool(self.context_template_length_params)

    @property
    def template_tokens(self) -> int:
        return max((length for length, _ in self.context_template_length_params), default=0)

    @property
    def rows_per_edit(self) -> int:
        return 2 + sum(count for _, count in self.context_template_length_params)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (SUBJECT,)

    @classmethod
    def reads_corpus(cls, hparams: Mapping[str, JSON]) -> bool:
        return True


# --- artifacts ---


def template_spec(config: LocateConfig, context: ArtifactContext) -> ArtifactSpec:
    """The context templates of a seed."""
    return ArtifactSpec(
        name=TEMPLATES,
        kind=templates.KIND,
        recipe={
            **context.model_recipe,
            "starts": list(STARTS),
            "lengths": [[n, count // len(STARTS)] for n, count in config.context_template_length_params],
            "joiner": ". ",
            "top_k": 5,
            "seed": context.seed if config.context_template_length_params else 0,
        },
    )


def moment_spec(
    config: LocateConfig,
    context: ArtifactContext,
    layer: int,
    module: str | None,
    name: str = MOMENT,
    otherwise: str = "",
) -> ArtifactSpec:
    """The second moment of one map's inputs. ``otherwise``: for the message, the alternative of a
    user without a corpus."""
    how_much = f"a few thousand lines or more{otherwise}"
    corpus = stats.corpus_of(config.place("corpus"), context.model, config.title, "second moment", how_much)
    return stats.second_moment(
        name,
        context.fingerprint,
        context.model,
        corpus,
        config.samples,
        layer,
        module,
        config.precision,
        context.corpora,
    )


def moment_name(layer: int) -> str:
    """Name of one layer's second moment in a method with several layers."""
    return f"{MOMENT}.{layer}"


# --- algebra in float64 ---


def moment_value(config: LocateConfig) -> int:
    """Bytes per number of a second moment."""
    return 8 if config.precision == "float64" else 4


def inverse_moment(moment_II: Tensor) -> Tensor:
    """``C^-1`` in float64. Raises :class:`DataError` if ``C`` is singular."""
    inverse_II, info = torch.linalg.inv_ex(moment_II.to(torch.float64))
    if int(info) or not bool(torch.isfinite(inverse_II).all()):
        raise DataError(
            "corpus: the second moment of ROME's layer is singular; give a longer text or more samples"
        )
    symmetric: Tensor = (inverse_II + inverse_II.T) / 2
    return symmetric


@dataclass(frozen=True)
class Factor:
    """``C`` factorised once (LU, float64), for all lanes and edits."""

    lu_II: Tensor
    pivots_I: Tensor

    @classmethod
    def of(cls, moment_II: Tensor, layer: int) -> Self:
        """Raises :class:`DataError` naming the layer if ``C`` is singular."""
        lu_II, pivots_I, info = torch.linalg.lu_factor_ex(moment_II.to(torch.float64))
        diagonal_I = lu_II.diagonal().abs()
        floor = diagonal_I.max() * torch.finfo(torch.float64).eps
        if int(info) or not bool(torch.isfinite(lu_II).all()) or bool((diagonal_I <= floor).any()):
            raise DataError(
                f"corpus: the second moment of layer {layer} is singular; give a longer text or more samples"
            )
        return cls(lu_II, pivots_I)

    def solve(self, keys_LIN: Tensor) -> Tensor:
        """``C^-1 K`` of every lane, (L, I, N), float64."""
        lanes, in_features, count = keys_LIN.shape
        flat_IM = keys_LIN.to(torch.float64).movedim(0, 1).reshape(in_features, lanes * count)
        solved_IM: Tensor = torch.linalg.lu_solve(self.lu_II, self.pivots_I, flat_IM)
        return solved_IM.view(in_features, lanes, count).movedim(1, 0)


def lane_chunks(lanes: int, bytes_each: int, limit: int) -> Iterator[slice]:
    """Split lanes into chunks of at most ``limit`` bytes, at least one lane each."""
    size = max(1, limit // max(1, bytes_each))
    for start in range(0, lanes, size):
        yield slice(start, min(lanes, start + size))


# --- the rows of a request ---


@dataclass(frozen=True, slots=True)
class Line:
    """One row: its tokens, the position where the fact is looked up, the first position that is
    read, and the target tokens predicted from there on."""

    encoded: Encoded
    lookup: int
    read: int
    target: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fact:
    """One request of one lane: a line per context (the bare prompt first), then ``"{subject} is
    a"``."""

    lane: int
    lines: tuple[Line, ...]

    @property
    def contexts(self) -> tuple[Line, ...]:
        return self.lines[:-1]


def request_lines(
    base: BaseModel, request: EditRequest, texts: Sequence[str], config: LocateConfig, spaced: bool = True
) -> list[Line]:
    """The rows of one request, in the order of ``texts`` (the bare prompt first). ``spaced=False``:
    the target is tokenised alone and follows without a space, as in some public code. Raises
    :class:`DataError` if the prompt lacks its subject."""
    at = subject_position(request.prompt, request.subject)
    if at < 0:
        raise DataError(
            f"case {request.case_id}: prompt {request.prompt!r} lacks its subject {request.subject!r}"
        )
    encoder = base.encoder
    lines = []
    for text in ["{}", *(text for text in texts if text != "{}")]:
        slot = text.index("{}")
        prompt = text[:slot] + request.prompt + text[slot + 2 :]
        pair = encoder.pair(prompt, request.target_new, joiner_of(request, request.prompt))
        lookup = pair.prompt_len
        if config.fact_token == "subject_last":
            lookup = encoder.tokens_until(prompt, slot + at + len(request.subject))
        if spaced:
            # the last token predicts nothing that is scored
            encoded = Encoded(pair.ids[:-1], pair.prompt_len, pair.clean)
            lines.append(Line(encoded, lookup - 1, pair.prompt_len - 1, pair.target))
            continue
        target = tuple(base.tokenizer(request.target_new, add_special_tokens=False)["input_ids"])
        ids = encoder.text(prompt + base.tokenizer.decode(target[:-1]))
        read = len(ids) - len(target)
        lines.append(Line(Encoded(ids, read + 1), lookup - 1, read, target))
    essence = f"{request.subject} is a"
    ids = encoder.prompt(essence)
    lookup = (
        encoder.tokens_until(essence, len(request.subject))
        if config.fact_token == "subject_last"
        else len(ids)
    )
    read = len(ids) if config.kl_position == "prompt_last" else lookup
    lines.append(Line(Encoded(ids, len(ids)), lookup - 1, read - 1))
    return lines


def facts_of(
    base: BaseModel,
    edits: Sequence[LaneEdit],
    config: LocateConfig,
    inputs: Mapping[str, ArtifactData],
    spaced: bool = True,
) -> list[Fact]:
    """The facts of all lanes, lanes ascending. A lane's templates are those of its own cell."""
    facts = []
    for lane, edit in enumerate(edits):
        texts = (edit.inputs.get(TEMPLATES) or inputs[TEMPLATES]).meta["templates"]
        facts += [
            Fact(lane, tuple(request_lines(base, request, texts, config, spaced)))
            for request in edit.requests
        ]
    return facts


def chunked(facts: Sequence[Fact], lanes: int) -> Iterator[Sequence[Fact]]:
    """Split facts into chunks of one batch each."""
    size = max(lanes, _AT_ONCE)
    for start in range(0, len(facts), size):
        yield facts[start : start + size]


class Facts:
    """The rows of one value search. In ``batch`` every fact is a lane of its own; ``lane_batch``
    has the same rows with the overlay's lanes."""

    def __init__(self, base: BaseModel, facts: Sequence[Fact]) -> None:
        lines = [(n, line) for n, fact in enumerate(facts) for line in fact.lines]
        device = base.device
        self.count = len(facts)
        encoded, pad = [line.encoded for _, line in lines], base.encoder.pad_id
        self.batch: Batch = collate(encoded, [n for n, _ in lines], pad, device)
        self.lane_batch = self.batch
        if [fact.lane for fact in facts] != list(range(len(facts))):
            self.lane_batch = collate(encoded, [facts[n].lane for n, _ in lines], pad, device)
        offsets = self.batch.offsets
        lookup = [offset + line.lookup for offset, (_, line) in zip(offsets, lines, strict=True)]
        self.lookup_B = torch.tensor(lookup, device=device)
        self.first = min(lookup)
        """Columns before this one never change."""
        self.edited_B = torch.tensor([bool(line.target) for _, line in lines], device=device)
        self.contexts_N = torch.tensor([len(fact.contexts) for fact in facts], device=device)
        starts = [start for _, start, _ in self.batch.segments]
        stops = [stop for _, _, stop in self.batch.segments]
        self.plain_N = torch.tensor(starts, device=device)
        """The row of each fact's bare prompt."""
        self.kept_N = tuple(stop - 1 for stop in stops)
        self.kept_column_N = tuple(offsets[row] + lines[row][1].read for row in self.kept_N)
        places = [
            (i, line.read + j, token, 1 / (len(line.target) * len(facts[n].contexts)))
            for i, (n, line) in enumerate(lines)
            for j, token in enumerate(line.target)
        ]
        self.targets = TargetTokens.of(self.batch, places, self.count)

    @property
    def reads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and columns that the loss reads: those of the targets, then those of each fact's KL
        term."""
        row_P, column_P = self.targets.reads
        return (*row_P, *self.kept_N), (*column_P, *self.kept_column_N)

    def at_lookup(self, tensor_BSX: Tensor) -> Tensor:
        """Values of a captured tensor at each row's lookup token, (B, X)."""
        return tensor_BSX[torch.arange(self.batch.size, device=self.lookup_B.device), self.lookup_B]

    def plain(self, tensor_BSX: Tensor) -> Tensor:
        """Values of a captured tensor at the lookup token of each fact's bare prompt, (N, X)."""
        return tensor_BSX[self.plain_N, self.lookup_B[self.plain_N]]

    def mean(self, rows_BX: Tensor) -> Tensor:
        """Mean over each fact's contexts, (N, X)."""
        kept_BX = torch.where(self.edited_B[:, None], rows_BX, 0)
        sum_NX = rows_BX.new_zeros(self.count, rows_BX.shape[1]).index_add(0, self.batch.lane_B, kept_BX)
        return sum_NX / self.contexts_N[:, None]

    def lookup_mask(self, first: int) -> Tensor:
        """Mask of each row's lookup token, for the columns from ``first`` on, (B, S, 1)."""
        here_BS = F.one_hot(self.lookup_B, self.batch.input_ids_BS.shape[1]).bool()
        return here_BS[:, first:, None]


# --- the search for the value ---


class Added(Protocol):
    """The model with each fact's vectors added at its lookup tokens, as :func:`search` runs it."""

    @property
    def batch(self) -> Batch:
        """Its batch; every fact is a lane of its own."""

    def hidden(self, deltas: Sequence[Tensor]) -> Tensor:
        """Hidden states after the final norm at the positions that are read, (P, D). ``deltas``:
        (K, width) each."""

    def part(self, row_B: Sequence[int], batch: Batch, read_P: Sequence[int]) -> Added:
        """The same for rows ``row_B`` and reads ``read_P``. ``batch``: the new batch of these
        rows."""


@dataclass(frozen=True)
class AtMap:
    """One vector, added to the output of one linear map. For an MLP's output projection this equals
    adding it to the output of its decoder layer, so a layer's value is searched here, too; only the
    initial value differs."""

    suffix: Suffix
    here_BS1: Tensor
    value_NO: Tensor
    """Output of the map at the bare prompt's lookup token."""
    layer_NO: Tensor
    """Output of the whole layer there."""

    @classmethod
    def capture(cls, base: BaseModel, site: Site, facts: Facts, overlay: Overlay) -> Self:
        """Run one forward with the edits made so far."""
        suffix = Suffix.capture(base, site, facts.lane_batch, facts.reads, facts.first, overlay)
        suffix = replace(suffix, batch=facts.batch)
        wide = base.master_dtype
        value_NO, layer_NO = facts.plain(suffix.output_BSO).to(wide), facts.plain(suffix.layer_BSD).to(wide)
        return cls(suffix, facts.lookup_mask(suffix.first), value_NO, layer_NO)

    @property
    def batch(self) -> Batch:
        return self.suffix.batch

    def hidden(self, deltas: Sequence[Tensor]) -> Tensor:
        (delta_KO,) = deltas
        plain_BSO = self.suffix.output_BSO[:, self.suffix.first :]
        shift_B1O = delta_KO[self.batch.lane_B].to(plain_BSO.dtype)[:, None]
        return self.suffix.hidden(plain_BSO + torch.where(self.here_BS1, shift_B1O, 0))

    def part(self, row_B: Sequence[int], batch: Batch, read_P: Sequence[int]) -> AtMap:
        return replace(
            self, suffix=self.suffix.part(row_B, batch, read_P), here_BS1=self.here_BS1[list(row_B)]
        )


@dataclass(frozen=True)
class HitRule:
    """Rule for a fact whose target tokens all have the largest logits (PMET): in the next step the
    weight of its target loss is ``less`` instead of ``weight``, and it stops if the weighted KL
    term is at most ``kl``."""

    weight: float
    less: float
    kl: float


@dataclass
class _Problem(DivisibleProblem):
    """The value search of the facts left in the batch."""

    base: BaseModel
    config: LocateConfig
    deltas: list[Tensor]
    """The vectors that are optimised, (K, width) each."""
    at: Added
    targets: TargetTokens
    norms: list[Tensor]
    """Norm of each vector's current value, (K,)."""
    hit_rule: HitRule | None = None
    before_KV: Tensor | None = None
    """Log-probabilities of the prediction in the KL term, before anything is added."""
    weight_K: Tensor | None = None
    """Weight of each fact's target loss in the next step; None before the first step."""

    @property
    def params(self) -> list[Tensor]:
        return self.deltas

    def losses(self) -> tuple[Tensor, Tensor]:
        """Eq. 4 per fact, and whether the fact continues, (K,) each. The first call stores the
        predictions for the KL term."""
        base, config, deltas = self.base, self.config, self.deltas
        hidden_PD = self.at.hidden(deltas)
        count = len(self.targets.row_P)
        hit_K: Tensor | None = None
        if self.hit_rule is None:
            nll_K = self.targets.nll(base, hidden_PD[:count])
        else:
            nll_K, hit_K = self.targets.nll_and_hit(base, hidden_PD[:count])
        kept_KV = base.logits(hidden_PD[count:]).log_softmax(-1)
        if self.before_KV is None:
            self.before_KV = kept_KV.detach()
        kl_K = F.kl_div(self.before_KV, kept_KV, log_target=True, reduction="none").sum(1)
        decay_K = deltas[0].norm(dim=1) / self.norms[0].square()
        for delta_KO, norm_K in zip(deltas[1:], self.norms[1:], strict=True):
            decay_K = decay_K + delta_KO.norm(dim=1) / norm_K.square()
        if self.hit_rule is not None:
            nll_K = nll_K * (self.hit_rule.weight if self.weight_K is None else self.weight_K)
        loss_K: Tensor = nll_K + config.kl_factor * kl_K + config.v_weight_decay * decay_K
        goes_on_K = loss_K.detach() >= STOP_LOSS
        if self.hit_rule is not None and hit_K is not None:
            self.weight_K = torch.where(hit_K, self.hit_rule.less, self.hit_rule.weight).to(loss_K)
            goes_on_K = goes_on_K & ~(hit_K & (config.kl_factor * kl_K.detach() <= self.hit_rule.kl))
        return loss_K, goes_on_K

    def project(self) -> None:
        for delta_KO, norm_K in zip(self.deltas, self.norms, strict=True):
            into_ball(delta_KO, self.config.clamp_norm_factor * norm_K)

    def part(self, kept: Sequence[int]) -> Self:
        batch, row_B = self.at.batch.part(kept)
        targets, read_P = self.targets.part(kept, row_B)
        read_P += [len(self.targets.row_P) + n for n in kept]
        return replace(
            self,
            deltas=[delta_KO[list(kept)] for delta_KO in self.deltas],
            at=self.at.part(row_B, batch, read_P),
            targets=targets,
            norms=[norm_K[list(kept)] for norm_K in self.norms],
            before_KV=None if self.before_KV is None else self.before_KV[list(kept)],
            weight_K=None if self.weight_K is None else self.weight_K[list(kept)],
        )


@dataclass(frozen=True)
class Found:
    """Result of the search, per fact: vectors, norms of the values, steps, last and first loss."""

    deltas: list[Tensor]
    norms: list[Tensor]
    steps_N: Tensor
    loss_N: Tensor
    first_N: Tensor


def search(
    base: BaseModel,
    config: LocateConfig,
    facts: Facts,
    at: Added,
    values: Sequence[Tensor],
    hit_rule: HitRule | None = None,
) -> Found:
    """Optimise each fact's vectors by Adam (Eq. 4). ``values``: the values they are added to, (N,
    width) each; their norms bound each vector (``clamp_norm_factor``) and scale its decay."""
    deltas = [torch.zeros_like(value_NO) for value_NO in values]
    norms = [value_NO.norm(dim=1) for value_NO in values]
    found = descend(
        _Problem(base, config, deltas, at, facts.targets, norms, hit_rule),
        Adam(deltas, config.v_lr),
        config.v_num_grad_steps,
        # with this rule the loss weights change between steps, so a recorded step would be wrong
        pool=base.pool if hit_rule is None else None,
        update_last=False,
    )
    return Found(deltas, norms, found.steps_L, found.loss_L, found.first_L)


@torch.no_grad()
def into_ball(delta_NO: Tensor, bound_N: Tensor) -> None:
    """Project vectors (N, O) onto balls of radius ``bound_N``, in place; a vector inside its ball
    keeps its bits."""
    norm_N = delta_NO.norm(dim=1)
    shrunk_NO = delta_NO * (bound_N / norm_N)[:, None]
    delta_NO.copy_(torch.where((norm_N > bound_N)[:, None], shrunk_NO, delta_NO))


# --- keys and current values ---


@torch.no_grad()
def observe(
    base: BaseModel,
    overlay: Overlay,
    facts: Sequence[Fact],
    sites: Sequence[Site],
    modules: Sequence[nn.Module] = (),
    bare_share: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations of the edited model at the lookup tokens: the input of each site averaged over
    the contexts, (N, I), and the output of each module at the bare prompt, (N, D). In the masters'
    precision.

    ``bare_share``: the bare prompt's weight in the average, the templates share the rest; None: all
    contexts weigh the same. Rows end at their lookup token, and layers above the last needed one
    are not run.
    """
    keys: list[list[Tensor]] = [[] for _ in sites]
    outs: list[list[Tensor]] = [[] for _ in modules]
    last = max([site.layer for site in sites] + [_layer_of(base, module) for module in modules])
    for part in chunked(facts, overlay.lanes):
        lines = [(fact, line) for fact in part for line in fact.contexts]
        cut = [Encoded(line.encoded.ids[: line.lookup + 1], line.lookup + 1) for _, line in lines]
        batch = collate(cut, [fact.lane for fact, _ in lines], base.encoder.pad_id, base.device)
        caught: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(overlay.installed(batch))
            for i, site in enumerate(sites):
                stack.callback(site.module.register_forward_pre_hook(_note_input(caught, i)).remove)
            for i, module in enumerate(modules):
                stack.callback(module.register_forward_hook(_note_output(caught, len(sites) + i)).remove)
            top: list[Any] = []
            stack.callback(
                base.layers[last].register_forward_hook(lambda _, args, out, top=top: top.append(out)).remove
            )
            for layer in base.layers[last + 1 :]:
                stack.enter_context(override_forward(layer, lambda *_, top=top, **__: top[0]))
            base.hidden_states(batch)
        share_B = torch.tensor(
            [share for fact in part for share in _shares(len(fact.contexts), bare_share)],
            dtype=base.master_dtype,
        ).to(base.device)
        fact_B = torch.tensor([n for n, fact in enumerate(part) for _ in fact.contexts], device=base.device)
        plain_N = torch.tensor(
            [i for i, (fact, line) in enumerate(lines) if line is fact.lines[0]], device=base.device
        )
        for i, found in enumerate(keys):  # with padding on the left the lookup token is the last column
            key_BI = caught[i][:, -1].to(base.master_dtype)
            found.append(
                key_BI.new_zeros(len(part), key_BI.shape[1]).index_add(0, fact_B, key_BI * share_B[:, None])
            )
        for i, found in enumerate(outs):
            found.append(caught[len(sites) + i][plain_N, -1].to(base.master_dtype))
    return [torch.cat(found) for found in keys], [torch.cat(found) for found in outs]


def _shares(contexts: int, bare: float | None) -> list[float]:
    if contexts == 1:
        return [1.0]
    if bare is None:
        return [1 / contexts] * contexts
    return [bare] + [(1 - bare) / (contexts - 1)] * (contexts - 1)


def _layer_of(base: BaseModel, module: nn.Module) -> int:
    return next(i for i, layer in enumerate(base.layers) if any(m is module for m in layer.modules()))


def _note_input(caught: dict[int, Tensor], i: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught[i] = args[0]

    return note


def _note_output(caught: dict[int, Tensor], i: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        caught[i] = out[0] if isinstance(out, tuple) else out

    return note


def layer_list(values: Mapping[str, JSON], field: str = "layers") -> list[JSON]:
    """``layers`` of an EasyEdit file, which may be one number."""
    layers = values[field]
    return list(layers) if isinstance(layers, list) else [layers]
