"""ROME: one fact is written into one MLP layer as a rank-one change of its output projection.

Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262, section 3.1. With the
projection ``W`` of the chosen layer seen as a key-value memory:

- key ``k``: the input of ``W`` at the subject's last token, averaged over context templates before the prompt (Eq. 3);
- value ``v = W k0 + d``: ``d`` is found by Adam so that, added to the output of ``W`` at the subject's last token, the
  target becomes likely in every context while the next-token distribution of ``p' = "{subject} is a"`` stays (Eq. 4):
  ``mean_contexts mean_tokens -log P(target) + kl_factor * KL(P_edited[x | p'] || P_before[x | p'])
  + v_weight_decay * ||d|| / ||W k0||^2``, with ``||d|| <= clamp_norm_factor * ||W k0||`` after each step;
- change (Eq. 2): ``W' = W + d u^T / (u^T k0)`` with ``u = C^-1 k`` and ``C = E[k k^T]`` over ordinary text.

``k0`` is the key without a template. Edits of a sequence go on top of each other: keys do not depend on earlier edits
(they enter below the edited map), the optimisation of ``d`` and both distributions of the KL term do.

Differences from paper and public code, all deliberate:

1. The KL term is read at the subject's last token of ``p'``, as the authors' own code does, from which all published
   ROME numbers come. Eq. 4 to the letter is the prediction that follows ``p'``: ``kl_position: prompt_last``.
2. ``mom2_adjustment`` (``C^-1``) is on, as in the paper; EasyEdit's hyperparameter files switch it off.
3. ``C^-1`` is computed in float64 and rounded to the overlay's precision (public: inverted in float32).
4. ``v_loss_layer`` has no effect in the public code (the loss is always the final layer's) and is dropped.
5. Rows are padded on the left with the right position ids (public: on the right). Same numbers up to rounding.
6. ``C`` comes from the first ``samples`` lines of ``corpus`` (public: as many random documents of Wikipedia).
7. Context templates are ``length`` *new* tokens long (public: start word and BOS included), sampled once per model and
   seed.
8. Tokens of target and prompt are those of the joint text. A subject that stands in the prompt more than once is edited
   at its first place (the public code refuses it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from workers import stats, templates
from workers.artifacts import ArtifactData, ArtifactSpec
from workers.lockstep import Lockstep
from workers.losses import TargetTokens
from workers.methods.base import IGNORED, EditOutcome, LaneEdit, Method, MethodConfig, split_module
from workers.models import EMBEDDED, BaseModel, ModelConfig, ModelFingerprint, ModelShape
from workers.optim import Adam, LaneOptimizer
from workers.overlay import LowRankOverlay, Overlay
from workers.pretrain import TrainingSource
from workers.rows import Encoded, Rows, collate
from workers.suffix import Suffix
from workers.types import JSON, DataError, EditRequest, SpecError

STOP_LOSS = 5e-2
"""A lane whose loss is below this makes no further step (the published constant)."""

STARTS = ("The", "Therefore", "Because", "I", "You")
"""First words of the context templates, as published."""

MOMENT = "moment"
TEMPLATES = "templates"


class ROMEConfig(MethodConfig):
    """Hyperparameters of ROME, under the names the field uses."""

    layer: int = Field(ge=0, description="decoder layer that is edited")
    module: str | None = Field(None, description="linear map inside the layer; null: the MLP's output projection")
    fact_token: Literal["subject_last", "last"] = Field(
        "subject_last", description="where the fact is looked up: the subject's or the prompt's last token"
    )
    v_num_grad_steps: int = Field(20, ge=1, description="evaluations of the loss that finds the value (one step fewer)")
    v_lr: float = Field(0.5, gt=0, description="Adam's step size for the value")
    v_weight_decay: float = Field(1e-3, ge=0, description="weight of the value change's norm in the loss")
    clamp_norm_factor: float = Field(4.0, gt=0, description="largest norm of the value change, relative to the value")
    kl_factor: float = Field(0.0625, ge=0, description="weight of the KL term")
    kl_position: Literal["prompt_last", "subject_last"] = Field(
        "subject_last",
        description="token of '{subject} is a' whose prediction is kept (prompt_last: Eq. 4 to the letter)",
    )
    context_template_length_params: tuple[tuple[int, int], ...] = Field(
        ((5, 10), (10, 10)), description="[length in tokens, how many templates] pairs; a multiple of five each"
    )
    mom2_adjustment: bool = Field(True, description="multiply the key by the inverse second moment")
    samples: int = Field(100_000, ge=1, description="lines of the corpus that enter the second moment")
    precision: Literal["float32", "float64"] = Field("float32", description="precision of the sums")
    corpus: str | None = Field(
        None,
        description="plain text file for the second moment; null: the embedded model's own text, for it alone",
    )

    alg_names: ClassVar[tuple[str, ...]] = ("ROME",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "layers": "layer",
            "rewrite_module_tmp": "module",
            "v_loss_layer": IGNORED,
            "mom2_dataset": IGNORED,  # ours is a text file: ``corpus``
            "mom2_n_samples": "samples",
            "mom2_dtype": "precision",
        }
    )

    @field_validator("context_template_length_params")
    @classmethod
    def _fives(cls, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for length, count in pairs:
            if length < 1 or count < 1 or count % len(STARTS):
                raise ValueError(
                    f"[{length}, {count}]: needs a length of 1 or more, a multiple of {len(STARTS)} templates"
                )
        return pairs

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        if "layer" in out:
            layers = out["layer"] if isinstance(out["layer"], list) else [out["layer"]]
            if len(layers) != 1:
                raise SpecError(f"{source}: layers: {layers!r}: ROME edits exactly one layer")
            out["layer"] = layers[0]
        if "module" in out:
            _, out["module"] = split_module(out["module"], source)
        return out


class ROME(Method[ROMEConfig]):
    """Rank-one model editing.

    >>> editor = ROME.prepare(base, ROMEConfig(layer=5), inputs={"moment": moment, "templates": texts})
    """

    name: ClassVar[str] = "rome"
    title: ClassVar[str] = "ROME"
    paper: ClassVar[str] = "Meng et al., Locating and Editing Factual Associations in GPT, arXiv 2202.05262"
    version: ClassVar[int] = 1
    relative_cost: ClassVar[float] = 1.3
    Config: ClassVar[type[MethodConfig]] = ROMEConfig

    def __init__(
        self,
        base: BaseModel,
        config: ROMEConfig,
        inputs: Mapping[str, ArtifactData],
        inverse_II: Tensor | None = None,
    ) -> None:
        """``inverse_II`` is the inverse second moment; None stands for the identity."""
        super().__init__(base, config, inputs)
        self.site = base.site(config.layer, config.module)
        self.inverse_II = None if inverse_II is None else inverse_II.to(base.device, base.master_dtype)

    @classmethod
    def prepare(cls, base: BaseModel, config: ROMEConfig, inputs: Mapping[str, ArtifactData]) -> Self:
        if not config.mom2_adjustment:
            return cls(base, config, inputs)
        return cls(base, config, inputs, inverse_moment(inputs[MOMENT].tensors["moment"].to(base.device)))

    def new_overlay(self, lanes: int) -> LowRankOverlay:
        return LowRankOverlay(self.site, lanes, self.base.master_dtype)

    def edit(self, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        if not isinstance(overlay, LowRankOverlay):
            raise TypeError(f"ROME edits a LowRankOverlay, not a {type(overlay).__name__}")
        batch = _Batch.of(self.base, edits, self.config, self.inputs)
        found = self._find_value(overlay, batch)
        key_LI = found.keys_LI if self.inverse_II is None else found.keys_LI @ self.inverse_II.T
        key_LI = key_LI / key_LI.norm(dim=1, keepdim=True)
        scale_L1 = (found.key0_LI * key_LI).sum(1, keepdim=True)
        overlay.add(found.delta_LO / scale_L1, key_LI)
        change_L = found.delta_LO.norm(dim=1) / found.value_norm_L
        columns = (found.steps_L, found.loss_L, found.first_L, change_L)
        return [
            EditOutcome(steps, loss, {"first_loss": first, "value_change": change})
            for steps, loss, first, change in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _find_value(self, overlay: LowRankOverlay, batch: _Batch) -> _Found:
        """Optimise each lane's change of the value (Eq. 4)."""
        base, config = self.base, self.config
        lookup_B, rows = batch.lookup_B, batch.rows
        suffix = Suffix.capture(base, self.site, rows, batch.reads, int(lookup_B.min()), overlay)
        row_B = torch.arange(rows.size, device=base.device)
        keys_BI = suffix.input_BSI[row_B, lookup_B].to(base.master_dtype)
        value_LO = suffix.output_BSO[batch.plain_L, lookup_B[batch.plain_L]].to(base.master_dtype)
        problem = _Problem.of(suffix, batch, value_LO.norm(dim=1))
        delta_LO = torch.zeros(overlay.lanes, self.site.shape[0], dtype=base.master_dtype, device=base.device)
        steps_L = torch.zeros(overlay.lanes, dtype=torch.long, device=base.device)
        delta_KO = delta_LO.clone().requires_grad_(True)
        optimizer: LaneOptimizer = Adam([delta_KO], config.v_lr)
        steps = Lockstep(overlay.lanes, base.device)
        for step in range(config.v_num_grad_steps):
            if steps.halved():
                steps_L[steps.live], delta_LO[steps.live] = optimizer.steps_L, delta_KO.detach()
                kept = steps.compact()
                problem, delta_KO = problem.part(kept), delta_KO.detach()[kept].requires_grad_(True)
                optimizer = optimizer.part(kept, [delta_KO])
            optimizer.zero_grad()
            now_K = problem.loss(base, config, delta_KO)
            steps.record(now_K)
            steps.keep(now_K.detach() >= STOP_LOSS)
            if step == config.v_num_grad_steps - 1 or steps.ended():
                break
            steps.masked(now_K).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step(steps.active_K, steps.moving)
            self._project(delta_KO, config.clamp_norm_factor * problem.value_norm_K)
        steps_L[steps.live], delta_LO[steps.live] = optimizer.steps_L, delta_KO.detach()
        lane_sum_LI = keys_BI.new_zeros(overlay.lanes, keys_BI.shape[1]).index_add(
            0, rows.lane_B, torch.where(batch.edited_B[:, None], keys_BI, 0)
        )
        return _Found(
            keys_LI=lane_sum_LI / batch.contexts_L[:, None],
            key0_LI=keys_BI[batch.plain_L],
            delta_LO=delta_LO,
            value_norm_L=value_LO.norm(dim=1),
            steps_L=steps_L,
            loss_L=steps.loss_L,
            first_L=steps.first_L,
        )

    @staticmethod
    @torch.no_grad()
    def _project(delta_LO: Tensor, bound_L: Tensor) -> None:
        """Back into the ball; a lane inside it keeps its bits."""
        norm_L = delta_LO.norm(dim=1)
        shrunk_LO = delta_LO * (bound_L / norm_L)[:, None]
        delta_LO.copy_(torch.where((norm_L > bound_L)[:, None], shrunk_LO, delta_LO))

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {
            # this small model reads a person's fact at the prompt's last token, not at the name
            "layer": 4,
            "fact_token": "last",
            "v_num_grad_steps": 20,
            "v_lr": 0.5,
            "clamp_norm_factor": 10.0,
            "context_template_length_params": [[5, 5]],
            "samples": 4000,
        }

    @classmethod
    def check(cls, config: Any, shape: ModelShape) -> None:
        shape.check_layer(config.layer, "layer")
        shape.site(config.module)

    @classmethod
    def artifacts(
        cls,
        config: Any,
        fingerprint: ModelFingerprint,
        model: ModelConfig,
        seed: int,
        training: TrainingSource | None = None,
    ) -> tuple[ArtifactSpec, ...]:
        made_by = {"model": fingerprint.model, "tokenizer": fingerprint.tokenizer, "dtype": model.dtype}
        specs = [
            ArtifactSpec(
                name=TEMPLATES,
                kind=templates.KIND,
                recipe={
                    **made_by,
                    "starts": list(STARTS),
                    "lengths": [[n, count // len(STARTS)] for n, count in config.context_template_length_params],
                    "joiner": ". ",
                    "top_k": 5,
                    "seed": seed if config.context_template_length_params else 0,
                },
            )
        ]
        if config.mom2_adjustment:
            corpus = config.corpus
            if corpus is None:
                if model.name != EMBEDDED:
                    raise SpecError(
                        f"corpus: ROME needs a plain text file for the second moment of {model.name!r} "
                        "(a few thousand lines or more); or mom2_adjustment: false"
                    )
                corpus = EMBEDDED
            specs.append(
                stats.second_moment(
                    MOMENT,
                    fingerprint,
                    model,
                    corpus,
                    config.samples,
                    config.layer,
                    config.module,
                    config.precision,
                )
            )
        return tuple(specs)

    @classmethod
    def uses_seed(cls, config: Any) -> bool:
        return bool(config.context_template_length_params)

    @classmethod
    def overlay_bytes(cls, config: Any, shape: ModelShape, edits: int) -> int:
        out, into = shape.site(config.module)
        value = max(4, shape.bytes_per_value)
        if edits >= min(out, into) // 2:
            return 3 * out * into * value  # dense, and two temporaries while a change is added
        return 2 * edits * (out + into) * value


def inverse_moment(moment_II: Tensor) -> Tensor:
    """``C^-1`` in float64. Raises :class:`DataError` if ``C`` is singular."""
    inverse_II, info = torch.linalg.inv_ex(moment_II.to(torch.float64))
    if int(info) or not bool(torch.isfinite(inverse_II).all()):
        raise DataError("corpus: the second moment of ROME's layer is singular; give a longer text or more samples")
    symmetric: Tensor = (inverse_II + inverse_II.T) / 2
    return symmetric


class _Batch:
    """The rows of one call: per lane its contexts (the bare prompt first), then ``p'``; and where losses are read."""

    def __init__(self, base: BaseModel, lanes: Sequence[Sequence[_Line]]) -> None:
        lines = [(lane, line) for lane, of_lane in enumerate(lanes) for line in of_lane]
        device = base.device
        self.rows: Rows = collate(
            [line.encoded for _, line in lines], [lane for lane, _ in lines], base.encoder.pad_id, device
        )
        offsets = self.rows.offsets
        lookup = [offset + line.lookup for offset, (_, line) in zip(offsets, lines, strict=True)]
        self.lookup_B = torch.tensor(lookup, device=device)
        self.edited_B = torch.tensor([bool(line.target) for _, line in lines], device=device)
        self.contexts_L = torch.tensor([len(of_lane) - 1 for of_lane in lanes], device=device)
        starts = [start for _, start, _ in self.rows.segments]
        stops = [stop for _, _, stop in self.rows.segments]
        self.plain_L = torch.tensor(starts, device=device)
        self.kept_L = tuple(stop - 1 for stop in stops)
        self.kept_column_L = tuple(offsets[row] + lines[row][1].read for row in self.kept_L)
        places = [
            (i, line.read + j, token, 1 / (len(line.target) * (len(lanes[lane]) - 1)))
            for i, (lane, line) in enumerate(lines)
            for j, token in enumerate(line.target)
        ]
        self.targets = TargetTokens.of(self.rows, places, len(lanes))

    @classmethod
    def of(
        cls, base: BaseModel, edits: Sequence[LaneEdit], config: ROMEConfig, inputs: Mapping[str, ArtifactData]
    ) -> Self:
        lanes = []
        for edit in edits:
            if len(edit.requests) != 1:
                raise ValueError("ROME edits one request at a time")
            texts = edit.inputs.get(TEMPLATES) or inputs[TEMPLATES]
            lanes.append(_lines(base, edit.requests[0], texts.meta["templates"], config))
        return cls(base, lanes)

    @property
    def reads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and columns that the loss reads: those of the targets, then each lane's kept prediction."""
        row_P, column_P = self.targets.reads
        return (*row_P, *self.kept_L), (*column_P, *self.kept_column_L)


@dataclass
class _Problem:
    """The lanes in one batch: where their vector is added, and how their losses are found."""

    suffix: Suffix
    targets: TargetTokens
    here_BS1: Tensor
    """Whether a position is its row's lookup token, from column ``suffix.first`` on."""
    value_norm_K: Tensor
    before_KV: Tensor | None = None
    """Log-probabilities of the kept prediction, before anything is added."""

    @classmethod
    def of(cls, suffix: Suffix, batch: _Batch, value_norm_L: Tensor) -> Self:
        here_BS = F.one_hot(batch.lookup_B, batch.rows.input_ids_BS.shape[1]).bool()
        return cls(suffix, batch.targets, here_BS[:, suffix.first :, None], value_norm_L)

    def loss(self, base: BaseModel, config: ROMEConfig, delta_KO: Tensor) -> Tensor:
        """Eq. 4 per lane, (K,). The first call notes the predictions to keep."""
        plain_BSO = self.suffix.output_BSO[:, self.suffix.first :]
        shift_B1O = delta_KO[self.suffix.rows.lane_B].to(plain_BSO.dtype)[:, None]
        hidden_PD = self.suffix.hidden(plain_BSO + torch.where(self.here_BS1, shift_B1O, 0))
        count = len(self.targets.row_P)
        nll_K = self.targets.nll(base, hidden_PD[:count])
        kept_KV = base.logits(hidden_PD[count:]).log_softmax(-1)
        if self.before_KV is None:
            self.before_KV = kept_KV.detach()
        kl_K = F.kl_div(self.before_KV, kept_KV, log_target=True, reduction="none").sum(1)
        decay_K = delta_KO.norm(dim=1) / self.value_norm_K.square()
        loss_K: Tensor = nll_K + config.kl_factor * kl_K + config.v_weight_decay * decay_K
        return loss_K

    def part(self, lanes: Sequence[int]) -> _Problem:
        rows, row_B = self.suffix.rows.part(lanes)
        targets, read_P = self.targets.part(lanes, row_B)
        read_P += [len(self.targets.row_P) + lane for lane in lanes]
        before_KV = None if self.before_KV is None else self.before_KV[list(lanes)]
        suffix = self.suffix.part(row_B, rows, read_P)
        return _Problem(suffix, targets, self.here_BS1[row_B], self.value_norm_K[list(lanes)], before_KV)


@dataclass(frozen=True, slots=True)
class _Line:
    """One row: its tokens, where the fact is looked up, where reading starts, and the target tokens read from there."""

    encoded: Encoded
    lookup: int
    read: int
    target: tuple[int, ...] = ()


def _lines(base: BaseModel, request: EditRequest, texts: Sequence[str], config: ROMEConfig) -> list[_Line]:
    at = request.prompt.find(request.subject)
    if at < 0 or not request.subject:
        raise DataError(f"case {request.case_id}: prompt {request.prompt!r} lacks its subject {request.subject!r}")
    encoder = base.encoder
    lines = []
    for text in ["{}", *(text for text in texts if text != "{}")]:
        slot = text.index("{}")
        prompt = text[:slot] + request.prompt + text[slot + 2 :]
        pair = encoder.pair(prompt, request.target_new)
        lookup = pair.prompt_len
        if config.fact_token == "subject_last":
            lookup = encoder.tokens_until(prompt, slot + at + len(request.subject))
        # the last token predicts nothing that is scored
        encoded = Encoded(pair.ids[:-1], pair.prompt_len, pair.clean)
        lines.append(_Line(encoded, lookup - 1, pair.prompt_len - 1, pair.target))
    essence = f"{request.subject} is a"
    ids = encoder.prompt(essence)
    lookup = encoder.tokens_until(essence, len(request.subject)) if config.fact_token == "subject_last" else len(ids)
    read = len(ids) if config.kl_position == "prompt_last" else lookup
    lines.append(_Line(Encoded(ids, len(ids)), lookup - 1, read - 1))
    return lines


@dataclass(frozen=True)
class _Found:
    """What the optimisation gives, per lane."""

    keys_LI: Tensor
    key0_LI: Tensor
    delta_LO: Tensor
    value_norm_L: Tensor
    steps_L: Tensor
    loss_L: Tensor
    first_L: Tensor
