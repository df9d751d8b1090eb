"""Training of the networks that map gradients to edits (MEND, MALMEN, RLEdit)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.artifacts.base import ArtifactData
from workers.artifacts.pretrain import Trainer
from workers.data.scripts import joiner_of
from workers.inner_loop.losses import TargetTokens
from workers.methods.families.hypernet import (
    Factors,
    Hypernet,
    Pair,
    Questions,
    gradient_factors,
    plain_answer,
    question_of,
)
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch, Encoded, collate
from workers.model.overlay import Overlay, lane_linear
from workers.model.replay import Prefix, capture, override_forward, replay
from workers.types import DataError, EditRequest


@contextmanager
def changed(
    sites: Sequence[Site], changes: Sequence[Pair], batch: Batch, overlay: Overlay | None = None
) -> Iterator[None]:
    """Inside, each map has its lane's change added to the pristine weights or to an overlay's.
    Gradients flow to the changes."""

    def answer(site: Site, pair: Pair, x_BSI: Tensor) -> Tensor:
        left_LNO, right_LNI = pair
        low_BSN = lane_linear(x_BSI, right_LNI, batch)
        return plain_answer(site, x_BSI, batch, overlay) + lane_linear(
            low_BSN, left_LNO.transpose(1, 2), batch
        )

    with ExitStack() as stack:
        for site, pair in zip(sites, changes, strict=True):
            stack.enter_context(override_forward(site.module, _changed_at(answer, site, pair)))
        yield


def _changed_at(
    answer: Callable[[Site, Pair, Tensor], Tensor], site: Site, pair: Pair
) -> Callable[[Tensor], Tensor]:
    return lambda x_BSI: answer(site, pair, x_BSI)


@dataclass(frozen=True)
class Objective:
    """Training loss of the edited model: ``cedit * NLL of the new answers + cloc * KL(before ||
    after) elsewhere``.

    ``train_on``: the prompt of the new answer: drawn from the request's prompt and its rephrases
    (``rephrase``, the papers' equivalence set), or always the prompt (``prompt``, EasyEdit's
    trainer).
    """

    cedit: float
    cloc: float
    train_on: Literal["rephrase", "prompt"]
    public_bos: bool = False


class HypernetTrainer(Trainer):
    """Adam on the networks. Gradients flow only to the networks: their inputs are detached, as in
    the papers."""

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

    def update(self, figures: dict[str, float]) -> dict[str, float]:
        """Make one Adam step with the current gradients, clipped. If their norm is not finite,
        return it in the figures and make no step."""
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        if not math.isfinite(float(norm)):  # the builder raises for a non-finite figure
            return {**figures, "gradient": float(norm)}
        self._optimizer.step()
        return figures

    def state(self) -> ArtifactData:
        tensors = {f"net/{name}": tensor for name, tensor in self.net.data().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam/{name}/{key}"] = value.clone()
        return ArtifactData(tensors)

    def load_state(self, state: ArtifactData) -> None:
        self.net.restore(
            {k.removeprefix("net/"): t for k, t in state.tensors.items() if k.startswith("net/")}
        )
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


class SingleEditTrainer(HypernetTrainer):
    """One Adam step per batch of requests, each an edit of the pristine model."""

    @abstractmethod
    def lanes(self, requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
        """The requests that are edited together: each lane is one edit of the pristine model."""

    @abstractmethod
    def changes(self, factors: Sequence[Factors]) -> list[Pair]:
        """The change of each map, from the current networks."""

    @abstractmethod
    def chosen(self, factors: Sequence[Factors]) -> list[Factors]:
        """The same factors, with the method's selection of tokens in ``kept_LN``."""

    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        base, objective = self.base, self.objective
        lanes = self.lanes(requests)
        edits = Questions.of(base, [list(map(question_of, lane)) for lane in lanes], objective.public_bos)
        found, _ = gradient_factors(base, self.sites, edits)
        factors = self.chosen(found)
        self.net.learn_scale(factors)
        sentences = [[(Sentences.draw(base, lane, objective, generator), 1.0)] for lane in lanes]
        judge = Judge.of(base, sentences, self.sites[0].layer)
        with torch.enable_grad():
            nll, kl = (
                total / len(requests) for total in judge.losses(base, self.sites, self.changes(factors))
            )
            loss = objective.cedit * nll + objective.cloc * kl
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        return self.update(
            {"loss": float(loss.detach()), "nll": float(nll.detach()), "kl": float(kl.detach())}
        )


@dataclass(frozen=True)
class Sentences:
    """The sentences of some requests for the training loss: per request, one that asks for the new
    answer and one about something else."""

    asking: tuple[tuple[Encoded, tuple[int, ...]], ...]
    """Each with the answer's tokens."""
    others: tuple[tuple[Encoded, range], ...]
    """Each with the columns whose predictions must stay."""

    @classmethod
    def draw(
        cls,
        base: BaseModel,
        requests: Sequence[EditRequest],
        objective: Objective,
        generator: torch.Generator,
    ) -> Self:
        encoder = base.encoder
        asking = []
        for request in requests:
            ways = (request.prompt, *(request.rephrases if objective.train_on == "rephrase" else ()))
            prompt = ways[_draw(len(ways), generator)]
            joiner = joiner_of(request, prompt)
            pair = encoder.pair(prompt, request.target_new, joiner)
            alone = f"{joiner}{request.target_new}"
            answer = encoder.text(alone) if objective.public_bos else pair.target
            asking.append((pair, tuple(answer)))
        return cls(tuple(asking), tuple(_elsewhere(base, request, generator) for request in requests))


@dataclass(frozen=True)
class Judge:
    """A batch of sentences with its prefix in the pristine model and the sentences' weights."""

    batch: Batch
    prefix: Prefix
    targets: TargetTokens
    other_row_P: list[int]
    other_column_P: list[int]
    share_P: Tensor

    @classmethod
    def of(
        cls, base: BaseModel, lanes: Sequence[Sequence[tuple[Sentences, float]]], first_layer: int
    ) -> Self:
        """Collate each lane's sentences; the number is the weight of all sentences beside it."""
        encoded: list[Encoded] = []
        lane_B: list[int] = []
        places: list[tuple[int, int, int, float]] = []
        others: list[tuple[int, int, float]] = []
        for i, lane in enumerate(lanes):
            for sentences, weight in lane:
                for pair, answer in sentences.asking:
                    start = len(pair.ids) - 1 - len(answer)
                    share = weight / len(answer)
                    places += [(len(encoded), start + j, token, share) for j, token in enumerate(answer)]
                    encoded.append(pair)
                for kept, read in sentences.others:
                    others += [(len(encoded), column, weight / len(read)) for column in read]
                    encoded.append(kept)
                lane_B += [i] * (len(sentences.asking) + len(sentences.others))
        batch = collate(encoded, lane_B, base.encoder.pad_id, base.device)
        row, column, share_P = zip(*others, strict=True)
        return cls(
            batch,
            capture(base, batch, first_layer),
            TargetTokens.of(batch, places, len(lanes)),
            list(row),
            [batch.offsets[r] + c for r, c in zip(row, column, strict=True)],
            torch.tensor(share_P, dtype=base.master_dtype, device=base.device),
        )

    def losses(
        self, base: BaseModel, sites: Sequence[Site], changes: Sequence[Pair], overlay: Overlay | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums over all sentences: ``-log p`` of the answers, and KL of the predictions
        before and after the change. The change is added to the pristine weights or to an
        overlay's."""
        with changed(sites, changes, self.batch, overlay):
            hidden_BSD = replay(base, self.prefix)
        row_P, column_P = self.targets.reads
        nll = self.targets.nll(base, hidden_BSD[list(row_P), list(column_P)]).sum()
        with torch.no_grad():
            before_BSD = self.prefix.output_BSD
            if overlay is not None:
                with overlay.installed(self.batch):
                    before_BSD = replay(base, self.prefix)
            before_PV = base.logits(before_BSD[self.other_row_P, self.other_column_P]).log_softmax(-1)
        after_PV = base.logits(hidden_BSD[self.other_row_P, self.other_column_P]).log_softmax(-1)
        kl_P = F.kl_div(after_PV, before_PV, log_target=True, reduction="none").sum(1)
        return nll, (kl_P * self.share_P).sum()


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _elsewhere(base: BaseModel, request: EditRequest, generator: torch.Generator) -> tuple[Encoded, range]:
    """A sentence whose predictions the edit must not change, and the columns of these predictions.

    It is one of the locality probes (columns of the answer) or, without any, the unrelated sentence
    (all columns). Raises :class:`DataError` if the request has neither.
    """
    if request.locality:
        probe = request.locality[_draw(len(request.locality), generator)]
        pair = base.encoder.pair(probe.prompt, probe.target, joiner_of(request, probe.prompt))
        return pair, range(pair.prompt_len - 1, len(pair.ids) - 1)
    if request.unrelated is None:
        raise DataError(
            f"case {request.case_id}: locality, unrelated: neither is given, and training needs one to "
            f"learn what to leave alone"
        )
    ids = base.encoder.text(request.unrelated)
    return Encoded(ids, len(ids)), range(len(ids))
