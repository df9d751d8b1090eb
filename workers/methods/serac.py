"""SERAC: a memory of edits, a scope classifier, and a second model that answers in scope.

Mitchell et al., Memory-Based Model Editing at Scale, arXiv 2206.06520. An edit ``z`` (a prompt and
its new answer) is only stored in the memory. For a row with prompt ``x`` the classifier gives the
probability that ``x`` is in the scope of ``z``,

    s(z, x) = exp(-||q(z) - q(x)||^2),        q: the first token's last hidden state of a small encoder,

and with ``z*`` the edit of largest ``s``, the row is answered by the base model if ``s(z*, x) <
threshold`` (0.5), otherwise by the counterfactual model, a small language model over the same
vocabulary that reads ``z*`` before ``x``.

Both networks are trained before the sweep, on requests that it does not edit, independently of each
other: the classifier on ``-log s(z, x_in) - log(1 - s(z, x_out))``, the counterfactual model on the
mean over the target's tokens of ``-log p(y | z, x_in)``. ``x_in`` is the request's prompt or a
rephrase of it; ``x_out`` are its locality prompts, and the prompts of the step's other requests
about other subjects.

Differences from paper and public code, all deliberate:

1. Each row is answered by one of the two models, without mixing, as in the paper. The public code
   mixes: ``log((1 - s) p_base + s p_counterfactual + eps)`` at every position (``mixing: soft``).
2. The classifier reads the prompt, so that the decision holds for the whole row and is the same in
   generation. The public code reads the text that is scored, its answer included, which raises
   ``s`` for the right answer (``reads: row``).
3. The classifier's input for an edit is its prompt and target. The public code removes the last
   word and appends the separator token (``edit_view: public``).
4. Edits accumulate in the memory until the rollback. In the public code only the last one is kept
   (``accumulate: false``).
5. Training follows the paper. The public code trains both networks through the mixture (NLL of the
   edit text itself, never of a rephrase, and a KL on unrelated texts).
6. Both networks are always in evaluation mode (the public code never calls ``eval()``).
7. ``cos``, ``bound_embeds``, ``cross_attend``, ``dist_heads``, ``freeze_cntr`` and BERT-like base
   models are not implemented.

The paper's text was not available: its rule, threshold and losses are from memory, the numbers are
checked only against the public code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import PRETRAINED, Trainer, TrainingSchedule, pretrained
from workers.data.scripts import joiner_of, statement
from workers.folders import Kind, build_model, open_config, open_model, open_tokenizer
from workers.methods.base import ArtifactContext, EditOutcome, LaneEdit, Method, MethodConfig
from workers.methods.easyedit import IGNORED, TRAINER_KEYS, TRAINER_LOST, TRAINER_OFF
from workers.model.base import BaseModel
from workers.model.batch import Batch, Encoder
from workers.model.config import ModelConfig, ModelShape, context_length, resolve
from workers.model.overlay import LaneState, SitelessOverlay
from workers.types import JSON, DataError, EditRequest, ModelError, SpecError

LARGEST_COPY = 50_000_000
"""Parameters of a base model that may be copied to become the counterfactual model."""

SCRATCH: Mapping[str, int] = MappingProxyType({"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256})
"""Sizes of the default classifier (DistilBERT)."""

_BLOCK = 32
"""Padded batches have a multiple of this number of columns."""

_CLASSIFIER, _COUNTERFACTUAL = "classifier.", "counterfactual."

_OF_THE_PUBLIC_CODE = (
    *(
        "cls_class",
        "edit_lr",
        "lr_lr",
        "cbase",
        "checkpoint_grad",
    ),
    *(
        "inner_params",
        "edit_bs",
        "max_iters",
        "accumulate_bs",
        "log_errors",
    ),
    "exact_match",
)
"""Keys of a public YAML that have no effect here, or are read separately."""


class SERACConfig(MethodConfig):
    """Hyperparameters of SERAC."""

    threshold: float = Field(
        0.5, gt=0, le=1, description="least scope at which the counterfactual model answers"
    )
    mixing: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: one model answers a row (paper); soft: probabilities are mixed by the scope "
        "(public)",
    )
    reads: Literal["prompt", "row"] = Field(
        "prompt", description="what the classifier reads: the prompt, or all that is scored (public code)"
    )
    edit_view: Literal["whole", "public"] = Field(
        "whole", description="the classifier's view of an edit: prompt and target; public: last word cut off"
    )
    accumulate: bool = Field(True, description="false: the memory keeps the last edit only (public code)")
    classifier: str | None = Field(
        None, description="folder or hub name of the encoder to start from; null: a small one made here"
    )
    counterfactual: str | None = Field(
        None,
        description="folder or hub name of the second model; null: a copy of the base model, if that is "
        "small",
    )
    lr: float = Field(1e-5, gt=0, description="Adam's step size in training")
    grad_clip: float = Field(100.0, gt=0, description="largest norm of each network's gradient in training")
    schedule: TrainingSchedule = Field(
        TrainingSchedule(steps=10_000, batch_size=10), description="how long it is trained"
    )

    alg_names: ClassVar[tuple[str, ...]] = ("SERAC",)
    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "small_name": "counterfactual",
            "cls_name": "classifier",
            **TRAINER_KEYS,
            **dict.fromkeys(_OF_THE_PUBLIC_CODE, IGNORED),
        }
    )
    easyedit_off: ClassVar[Mapping[str, tuple[JSON, ...]]] = MappingProxyType(
        {
            "cross_attend": (False,),
            "cos": (False,),
            "square": (True,),
            "bound_embeds": (False,),
            "freeze_cntr": (False,),
            "dist_heads": (1,),
            "train_base": (False,),
            "no_grad_layers": (None,),
            **TRAINER_OFF,
            "lora": (None,),
            "dropout": (0, 0.0),
            "supervised": (False, True),
            "soft_weighting": (False, True),
        }
    )
    easyedit_lost: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **TRAINER_LOST,
            **dict.fromkeys(
                ("cedit", "cloc", "unlikelihood", "use_all_negatives", "freeze"),
                "both networks are trained on the paper's losses",
            ),
        }
    )
    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType(
        {"mixing": "soft", "reads": "row", "edit_view": "public", "accumulate": False}
    )

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        out = super().from_easyedit(values, source)
        steps, batch = values.get("max_iters"), values.get("accumulate_bs")
        if (
            steps is not None and batch is not None
        ):  # the public code makes one step per ``accumulate_bs`` iterations
            out["schedule"] = {"steps": max(1, int(steps) // int(batch)), "batch_size": int(batch)}
        return out

    def check(self, shape: ModelShape) -> None:
        if self.counterfactual is None and shape.parameters > LARGEST_COPY:
            raise SpecError(
                f"counterfactual: null means a copy of the base model, which has {shape.parameters:,} "
                f"parameters; give a small "
                f"model of the same vocabulary (a copy is made up to {LARGEST_COPY:,} parameters)"
            )

    @property
    def networks(self) -> Mapping[str, str]:
        given = {"classifier": self.classifier, "counterfactual": self.counterfactual}
        return {field: name for field, name in given.items() if name is not None}

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        return (
            pretrained(
                "serac", _learnt(self), self.schedule, context.fingerprint, context.model, context.training
            ),
        )

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        widest = 1024  # assumed width of classifier encoders
        return edits * widest * 4


# --- the two networks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Networks:
    """The scope classifier and the counterfactual model, each with its tokenizer."""

    classifier: Any
    classifier_tokenizer: Any
    counterfactual: Any
    counterfactual_tokenizer: Any

    @classmethod
    def skeleton(
        cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator | None = None
    ) -> Self:
        """The networks before training: weights of a folder, a copy of the base, or random weights.
        Raises :class:`ModelError`."""
        from transformers import AutoConfig

        seed = 0 if generator is None else int(torch.randint(2**31, (1,), generator=generator))
        dtype = base.master_dtype
        if hparams["classifier"] is None:
            config: Any = AutoConfig.for_model(
                "distilbert",
                vocab_size=len(base.tokenizer),
                max_position_embeddings=512,
                pad_token_id=base.encoder.pad_id,
                dropout=0.0,
                attention_dropout=0.0,
                **SCRATCH,
            )
            classifier, tokenizer = _drawn("encoder", config, seed), base.tokenizer
        else:
            classifier, tokenizer = _load("encoder", hparams["classifier"], "classifier", seed)
        if hparams["counterfactual"] is None:
            counterfactual, second = copy.deepcopy(base.model), base.tokenizer
        else:
            counterfactual, second = _load("causal", hparams["counterfactual"], "counterfactual", seed + 1)
        if second is not base.tokenizer and second.get_vocab() != base.tokenizer.get_vocab():
            raise ModelError(
                f"serac: counterfactual: {hparams['counterfactual']!r} has another vocabulary than the "
                f"base model; both answer "
                "in the same tokens, so choose a model of the same family"
            )
        for network in (classifier, counterfactual):
            network.to(device=base.device, dtype=dtype).eval().requires_grad_(False)
        return cls(classifier, tokenizer, counterfactual, second)

    @classmethod
    def trained(cls, base: BaseModel, hparams: Mapping[str, JSON], product: ArtifactData) -> Self:
        """The networks with the trained weights."""
        networks = cls.skeleton(base, hparams)
        networks.load(product.tensors)
        return networks

    def tensors(self) -> dict[str, Tensor]:
        """All weights; tied ones once, under their first name."""
        parts = ((_CLASSIFIER, self.classifier), (_COUNTERFACTUAL, self.counterfactual))
        return {
            prefix + name: p.detach().clone() for prefix, part in parts for name, p in part.named_parameters()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights of :meth:`tensors`. Raises :class:`ModelError` if they belong to other
        networks."""
        for prefix, part in ((_CLASSIFIER, self.classifier), (_COUNTERFACTUAL, self.counterfactual)):
            for name, p in part.named_parameters():
                found = tensors.get(prefix + name)
                if found is None or found.shape != p.shape:
                    what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                    raise ModelError(
                        f"serac: the trained weight {prefix + name} {what}; expected {tuple(p.shape)}"
                    )
                p.data.copy_(found)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The classifier's embedding of each text, (N, D); padded on the right and masked."""
        tokenizer, device = self.classifier_tokenizer, self.classifier.device
        ids = [tokenizer(text, max_length=512, truncation=True)["input_ids"] for text in texts]
        width = max(map(len, ids))
        ids_NS = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
        mask_NS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        hidden_NSD: Tensor = self.classifier(input_ids=ids_NS, attention_mask=mask_NS).last_hidden_state
        return hidden_NSD[:, 0]

    def answer_logits(
        self, prompts: Sequence[tuple[int, ...]], continued: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """The counterfactual model's logits of each row, from its last prompt token to its end, (1
        + len(continued), V)."""
        rows = [[*p, *c] for p, c in zip(prompts, continued, strict=True)]
        limit, width = context_length(self.counterfactual.config), max(map(len, rows))
        if limit is not None and width > limit:
            raise DataError(
                f"serac: an edit and a prompt are {width} tokens, the counterfactual model reads at most "
                f"{limit}"
            )
        # blocks of columns, so that a row's bits rarely depend on the lengths of other rows
        width = max(width, min(-(-width // _BLOCK) * _BLOCK, limit or width))
        device = self.counterfactual.device
        ids_NS = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask_NS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        logits_NSV = self.counterfactual(
            input_ids=ids_NS,
            attention_mask=mask_NS,
            position_ids=(mask_NS.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=1 + max(map(len, continued)),
            use_cache=False,
        ).logits
        return [logits_NSV[i, -1 - len(c) :] for i, c in enumerate(continued)]

    def with_edit(self, edit: str, prompt: str) -> tuple[int, ...]:
        """Tokens of an edit followed by a prompt."""
        return self._encoder.text(f"{edit} {prompt}")

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.counterfactual_tokenizer)


def _drawn(kind: Kind, config: Any, seed: int) -> Any:
    """A network with random weights, determined by ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(kind, config)


def _load(kind: Kind, name: str, field: str, seed: int) -> tuple[Any, Any]:
    """A network and its tokenizer from a folder; random weights if it has none. Raises
    :class:`ModelError`."""
    try:
        folder = resolve(ModelConfig(name=name))
        tokenizer = open_tokenizer(folder)
        if any(folder.glob("*.safetensors")):
            return open_model(kind, folder), tokenizer
        return _drawn(kind, open_config(folder), seed), tokenizer
    except (ModelError, OSError, ValueError) as error:
        raise ModelError(
            f"serac: {field}: {name!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error


# --- the memory -----------------------------------------------------------------------------


class EditMemory(SitelessOverlay):
    """The texts of each lane's edits and their classifier embeddings."""

    def __init__(self, networks: Networks, config: SERACConfig, lanes: int) -> None:
        super().__init__(lanes)
        self.networks = networks
        self.config = config
        self.texts: list[tuple[str, ...]] = [()] * lanes
        weight = next(networks.classifier.parameters())
        self.empty_JD = weight.new_zeros(0, networks.classifier.config.hidden_size)
        self.embeds_JD: list[Tensor] = [self.empty_JD] * lanes

    @torch.no_grad()
    def add(self, requests: Sequence[Sequence[EditRequest]]) -> None:
        """Store each lane's requests, with one pass of the classifier for all of them."""
        texts = [list(map(statement, lane)) for lane in requests]
        embeds_ND = self.networks.embed([self.view(text) for lane in texts for text in lane])
        start = 0
        for lane, new in enumerate(texts):
            fresh_JD = embeds_ND[start : start + len(new)]
            start += len(new)
            self.texts[lane] = (*self.texts[lane], *new)
            self.embeds_JD[lane] = torch.cat([self.embeds_JD[lane], fresh_JD])
            if not self.config.accumulate:
                self.texts[lane], self.embeds_JD[lane] = (
                    self.texts[lane][-1:],
                    self.embeds_JD[lane][-1:].clone(),
                )

    def view(self, text: str) -> str:
        """The classifier's input text for an edit."""
        if self.config.edit_view == "whole":
            return text
        return text.rsplit(" ", 1)[0] + (self.networks.classifier_tokenizer.sep_token or "")

    @torch.no_grad()
    def scopes(self, lanes: Sequence[int], texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """The largest scope of each text in its lane's memory, and the index of that edit (-1: no
        edits)."""
        scope, place = [0.0] * len(texts), [-1] * len(texts)
        asked = [i for i, lane in enumerate(lanes) if self.texts[lane]]
        if not asked:
            return scope, place
        embeds_ND = self.networks.embed([texts[i] for i in asked])
        for lane in sorted({lanes[i] for i in asked}):
            mine = [n for n, i in enumerate(asked) if lanes[i] == lane]
            best, index = scope_of(self.embeds_JD[lane], embeds_ND[mine]).max(1)
            for n, s, k in zip(mine, best.tolist(), index.tolist(), strict=True):
                scope[asked[n]], place[asked[n]] = s, k
        return scope, place

    @torch.no_grad()
    def logits(
        self, base: BaseModel, hidden_PD: Tensor, batch: Batch, row_P: Sequence[int], column_P: Sequence[int]
    ) -> Tensor:
        logits_PV = base.logits(hidden_PD)
        ends = batch.prompt_end_B.tolist()
        asked = sorted({r for r in row_P if self.texts[int(batch.lane_B[r])]})
        if not asked:
            return logits_PV
        lanes = batch.lane_B[asked].tolist()
        tokens = [_split(batch, r, ends[r]) for r in asked]
        prompts = [_text(base, prompt) for prompt, _ in tokens]
        read = prompts if self.config.reads == "prompt" else [_text(base, (*p, *c)) for p, c in tokens]
        scope, place = self.scopes(lanes, read)
        soft = self.config.mixing == "soft"
        chosen = [i for i in range(len(asked)) if soft or scope[i] >= self.config.threshold]
        if not chosen:
            return logits_PV
        said = self.networks.answer_logits(
            [self.networks.with_edit(self.texts[lanes[i]][place[i]], prompts[i]) for i in chosen],
            [tokens[i][1] for i in chosen],
        )
        answers = {asked[i]: (scope[i], logits_SV) for i, logits_SV in zip(chosen, said, strict=True)}
        logits_PV = logits_PV.clone()
        for p, (r, column) in enumerate(zip(row_P, column_P, strict=True)):
            if r in answers and column >= ends[r]:  # positions inside the prompt keep the base's logits
                s, logits_SV = answers[r]
                said_V = logits_SV[column - ends[r]].to(logits_PV)
                logits_PV[p] = mixed(logits_PV[p], said_V, s) if soft else said_V
        return logits_PV

    def tensors(self, lane: int) -> dict[str, Tensor]:
        return {"embeds": self.embeds_JD[lane]} if self.texts[lane] else {}

    def meta(self, lane: int) -> dict[str, JSON]:
        return {"texts": list(self.texts[lane])} if self.texts[lane] else {}

    def changed(self, lane: int) -> Iterable[Tensor]:
        return [self._since(lane, "embeds", self.embeds_JD[lane])]

    def load_state(self, lane: int, state: LaneState) -> None:
        self._seen[lane].clear()
        self.texts[lane] = tuple(state.meta.get("texts", ()))
        self.embeds_JD[lane] = state.tensors.get("embeds", self.empty_JD).to(self.empty_JD)


def scope_of(edits_JD: Tensor, asked_ND: Tensor) -> Tensor:
    """``exp(-||difference||^2)`` of all pairs, (N, J)."""
    return torch.exp(-(asked_ND[:, None] - edits_JD[None]).square().sum(-1))


def mixed(base_V: Tensor, counterfactual_V: Tensor, scope: float) -> Tensor:
    """Log-probabilities of the mixture of two logit vectors, (V,)."""
    eps = torch.finfo(torch.float32).eps
    return ((1 - scope) * base_V.softmax(-1) + scope * counterfactual_V.softmax(-1) + eps).log()


def _split(batch: Batch, row: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The real tokens of a row's prompt, and those after it."""
    start = batch.offsets[row]
    ids = batch.input_ids_BS[row].tolist()
    stop = start + int(batch.attention_mask_BS[row].sum())
    return tuple(ids[start : end + 1]), tuple(ids[end + 1 : stop])


def _text(base: BaseModel, ids: Sequence[int]) -> str:
    return str(base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# --- the method -----------------------------------------------------------------------------


class SERAC(Method[SERACConfig, EditMemory]):
    """Memory-based editing.

    >>> editor = SERAC.prepare(base, SERACConfig(), inputs={"pretrained": product})
    """

    name: ClassVar[str] = "serac"
    title: ClassVar[str] = "SERAC"
    paper: ClassVar[str] = "Mitchell et al., Memory-Based Model Editing at Scale, ICML 2022, arXiv 2206.06520"
    version: ClassVar[int] = 1
    needs_pretraining: ClassVar[bool] = True
    batch_edits: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 0.1
    Config: ClassVar[type[MethodConfig]] = SERACConfig

    def __init__(self, base: BaseModel, config: SERACConfig, inputs: Mapping[str, ArtifactData]) -> None:
        super().__init__(base, config, inputs)
        if base.encoder.chat_template:
            raise SpecError(
                "serac: model.chat_template: true is not supported: its networks read plain texts"
            )
        self.networks = Networks.trained(base, _learnt(config), inputs[PRETRAINED])

    def new_overlay(self, lanes: int) -> EditMemory:
        return EditMemory(self.networks, self.config, lanes)

    def edit(self, overlay: EditMemory, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        overlay.add([edit.requests for edit in edits])
        return [EditOutcome(0, None, {"edits": len(texts)}) for texts in overlay.texts]

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        return {"lr": 5e-4, "schedule": {"steps": 1000, "batch_size": 8}}

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> Trainer:
        return SERACTrainer(base, hparams, generator)


def _learnt(config: SERACConfig) -> dict[str, JSON]:
    """The settings that training depends on."""
    return config.model_dump(mode="json", include={"classifier", "counterfactual", "lr", "grad_clip"})


class SERACTrainer(Trainer):
    """Trains both networks with Adam, one step per batch of requests."""

    def __init__(self, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> None:
        self.base = base
        self.networks = Networks.skeleton(base, hparams, generator)
        self.grad_clip = float(hparams["grad_clip"])
        self.parts: dict[str, nn.Module] = {
            _CLASSIFIER: self.networks.classifier,
            _COUNTERFACTUAL: self.networks.counterfactual,
        }
        for part in self.parts.values():
            part.requires_grad_(True)
        self.parameters = {
            prefix + name: p for prefix, part in self.parts.items() for name, p in part.named_parameters()
        }
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=float(hparams["lr"]))

    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        self.optimizer.zero_grad()
        scope = self._scope_loss(requests, generator)
        answer = self._answer_loss(requests, generator)
        (scope + answer).backward()  # type: ignore[no-untyped-call]
        for part in self.parts.values():  # clipped separately: the networks share no parameters
            torch.nn.utils.clip_grad_norm_(part.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        scope_loss, answer_loss = float(scope.detach()), float(answer.detach())
        return {"loss": scope_loss + answer_loss, "scope_loss": scope_loss, "answer_loss": answer_loss}

    def _scope_loss(self, requests: Sequence[EditRequest], generator: torch.Generator) -> Tensor:
        """Mean of ``-log s`` over pairs in scope, plus mean of ``-log(1 - s)`` over pairs out of
        scope."""
        edits = list(map(statement, requests))
        inside = [_chosen((r.prompt, *r.rephrases), generator) for r in requests]
        outside = [_chosen(tuple(p.prompt for p in r.locality), generator) for r in requests]
        asked = inside + [text for text in outside if text is not None]
        embeds_ND = self.networks.embed([*edits, *asked])
        distance_EA = (embeds_ND[: len(edits), None] - embeds_ND[None, len(edits) :]).square().sum(-1)
        count = len(requests)
        near_E = distance_EA[range(count), range(count)]
        owner = [*range(count), *(i for i, text in enumerate(outside) if text is not None)]
        apart = [
            (e, a)
            for e, request in enumerate(requests)
            for a, i in enumerate(owner)
            # locality prompts are out of scope; texts of other requests are, if the subject differs
            if a >= count or (i != e and requests[i].subject != request.subject)
        ]
        loss = near_E.mean()  # -log exp(-d)
        if apart:
            far_P = distance_EA[[e for e, _ in apart], [a for _, a in apart]]
            loss = loss - torch.log(-torch.expm1(-far_P.clamp_min(1e-6))).mean()
        return loss

    def _answer_loss(self, requests: Sequence[EditRequest], generator: torch.Generator) -> Tensor:
        """Mean over requests and target tokens of the counterfactual model's NLL, given the edit
        and a text in its scope."""
        prompts, targets = [], []
        for r in requests:
            text = _chosen((r.prompt, *r.rephrases), generator)
            assert text is not None
            prompts.append(self.networks.with_edit(statement(r), text))
            targets.append(self.base.encoder.pair(text, r.target_new, joiner_of(r, text)).target)
        losses = [
            torch.nn.functional.cross_entropy(
                logits_SV[:-1].float(), torch.tensor(target, device=logits_SV.device)
            )
            for logits_SV, target in zip(self.networks.answer_logits(prompts, targets), targets, strict=True)
        ]
        return torch.stack(losses).mean()

    def state(self) -> ArtifactData:
        return ArtifactData({**self.networks.tensors(), **dict(self._moments())})

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                yield f"adam.{key}.{name}", value.detach().clone()

    def load_state(self, state: ArtifactData) -> None:
        self.networks.load(state.tensors)
        for name, p in self.parameters.items():
            moments = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                found = state.tensors.get(f"adam.{key}.{name}")
                if found is not None:
                    moments[key] = found.clone() if key == "step" else found.to(p, copy=True)
            if moments:
                self.optimizer.state[p] = moments

    def product(self) -> ArtifactData:
        return ArtifactData(self.networks.tensors())


def _chosen(texts: Sequence[str], generator: torch.Generator) -> Any:
    """One of the texts, drawn at random; None if there is none."""
    place = int(torch.randint(2**31, (1,), generator=generator))
    return texts[place % len(texts)] if texts else None
