"""Editing the way the field's hand-written loops do it: the yardstick of the benchmarks, never used
by a sweep.

One request at a time; every optimisation step runs the whole model and its head at every position;
the change is written into the model's own weights (or hooked into its modules) and undone by
copying the saved weights back. Mathematics, rows, steps and stopping rules are those of
:mod:`workers.methods`, and :func:`agrees` checks that both sides end with the same change.

>>> loop = LOOPS["ft"](base, config, inputs)
>>> loop.edit(request, draws)
>>> loop.restore()
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.artifacts.base import ArtifactData
from workers.inner_loop.finetune import STOP_LOSS as FT_STOP
from workers.kernels.matmul import slow
from workers.methods.families.locate import MOMENT, inverse_moment
from workers.methods.families.locate import STOP_LOSS as ROME_STOP
from workers.methods.wise.method import STOP_CHANGE
from workers.methods.wise.method import STOP_LOSS as WISE_STOP
from workers.model.base import BaseModel, Site
from workers.rng import RandomStreams
from workers.types import EditRequest


def as_it_comes(base: BaseModel) -> BaseModel:
    """A copy of the model whose linear maps are PyTorch's own, as the field's scripts load it."""
    copied = BaseModel(copy.deepcopy(base.model), base.tokenizer, base.config)
    slow(copied.model)
    return copied


class Loop(ABC):
    """One method on its own copy of the model."""

    def __init__(self, base: BaseModel, config: Any, inputs: Mapping[str, ArtifactData]) -> None:
        self.base = as_it_comes(base)
        self.model = self.base.model
        self.encoder = base.encoder
        self.pad = base.encoder.pad_id
        self.device = base.device
        self.config = config
        self.inputs = inputs
        layer = config.layers[0] if hasattr(config, "layers") else config.layer
        self.site: Site = self.base.site(layer, config.module)
        self.weight: Tensor = self.site.module.weight
        self.saved = {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p is self.weight
        }
        self.prepare()

    def prepare(self) -> None:  # noqa: B027  (most methods need nothing)
        """What is made once before the first edit, and again by :meth:`restore`."""

    @abstractmethod
    def edit(self, request: EditRequest, draws: RandomStreams) -> int:
        """Edit the model; how many optimisation steps it took."""

    def restore(self) -> None:
        """Copy the saved weights back."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self.saved:
                    p.copy_(self.saved[name])

    def delta(self) -> Tensor:
        """The change of the edited map, (O, I)."""
        (saved,) = self.saved.values()
        change = self.weight.detach() - saved
        return change.T if self.site.transposed else change

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], list[int]]:
        """Left-padded model inputs, and where each row starts."""
        width = max(len(r) for r in rows)
        gaps = [width - len(r) for r in rows]
        ids = torch.tensor(
            [[self.pad] * g + list(r) for g, r in zip(gaps, rows, strict=True)], device=self.device
        )
        mask = torch.tensor(
            [[0] * g + [1] * len(r) for g, r in zip(gaps, rows, strict=True)], device=self.device
        )
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}, gaps  # type: ignore[dict-item]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.model(**batch).logits
        return out.float()


class FTLoop(Loop):
    """Adam on the weight itself."""

    def edit(self, request: EditRequest, draws: RandomStreams) -> int:
        config = self.config
        pair = self.encoder.pair(request.prompt, request.target_new)
        if config.objective == "prompt_last":
            ids, places = pair.ids[: pair.prompt_len], [pair.prompt_len - 1] * len(pair.target)
        else:
            ids, places = pair.ids[:-1], list(range(pair.prompt_len - 1, len(pair.ids) - 1))
        batch, _ = self.batch([ids])
        target = torch.tensor(pair.target, device=self.device)
        self.weight.requires_grad_(True)
        optimizer = torch.optim.Adam([self.weight], lr=config.lr, weight_decay=config.weight_decay)
        steps = 0
        for _ in range(config.num_steps):
            optimizer.zero_grad()
            loss = -self.logits(batch).log_softmax(-1)[0, places].gather(1, target[:, None]).mean()
            if loss.item() < FT_STOP:
                break
            loss.backward()
            optimizer.step()
            steps += 1
        self.weight.requires_grad_(False)
        self.weight.grad = None
        return steps


class ROMELoop(Loop):
    """A vector added at the lookup token by a hook, then a rank-one change of the weight."""

    def prepare(self) -> None:
        self.inverse_II: Tensor | None = None
        if self.config.mom2_adjustment:
            self.inverse_II = inverse_moment(self.inputs[MOMENT].tensors["moment"]).to(
                self.device, torch.float32
            )

    def edit(self, request: EditRequest, draws: RandomStreams) -> int:
        config, encoder = self.config, self.encoder
        texts = ["{}", *(t for t in self.inputs["templates"].meta["templates"] if t != "{}")]
        rows, lookups, targets = [], [], []
        at = request.prompt.find(request.subject) + len(request.subject)
        for text in texts:
            slot = text.index("{}")
            prompt = text.replace("{}", request.prompt)
            pair = encoder.pair(prompt, request.target_new)
            last = config.fact_token == "last"
            lookups.append((pair.prompt_len if last else encoder.tokens_until(prompt, slot + at)) - 1)
            rows.append(pair.ids[:-1])
            targets.append((pair.prompt_len - 1, pair.target))
        essence = encoder.prompt(f"{request.subject} is a")
        until = (
            len(essence)
            if config.fact_token == "last"
            else encoder.tokens_until(request.subject, len(request.subject))
        )
        rows.append(essence)
        lookups.append(until - 1)
        read = (len(essence) if config.kl_position == "prompt_last" else until) - 1
        batch, gaps = self.batch(rows)
        index = torch.arange(len(rows), device=self.device)
        lookup = torch.tensor([g + k for g, k in zip(gaps, lookups, strict=True)], device=self.device)
        delta = torch.zeros(self.site.shape[0], device=self.device, requires_grad=True)
        seen: dict[str, Tensor] = {}

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if "key" not in seen:
                seen["key"] = args[0][index, lookup].detach()
                seen["value"] = out[index, lookup].detach()
            out = out.clone()
            out[index, lookup] += delta
            return out

        optimizer = torch.optim.Adam([delta], lr=config.v_lr)
        before: Tensor | None = None
        handle = self.site.module.register_forward_hook(hook)
        steps = 0
        for step in range(config.v_num_grad_steps):
            optimizer.zero_grad()
            logprobs = self.logits(batch).log_softmax(-1)
            nll = torch.stack(
                [
                    -logprobs[i, gaps[i] + start : gaps[i] + start + len(target)]
                    .gather(1, torch.tensor(target, device=self.device)[:, None])
                    .mean()
                    for i, (start, target) in enumerate(targets)
                ]
            ).mean()
            kept = logprobs[-1, gaps[-1] + read]
            before = kept.detach() if before is None else before
            norm = seen["value"][0].norm()
            loss = nll + config.kl_factor * F.kl_div(before, kept, log_target=True, reduction="sum")
            loss = loss + config.v_weight_decay * delta.norm() / norm**2
            if loss.item() < ROME_STOP or step == config.v_num_grad_steps - 1:
                break
            loss.backward()
            optimizer.step()
            steps += 1
            bound = config.clamp_norm_factor * norm
            if delta.norm() > bound:
                with torch.no_grad():
                    delta.mul_(bound / delta.norm())
        handle.remove()
        key = seen["key"][: len(texts)].mean(0)
        left = key if self.inverse_II is None else self.inverse_II @ key
        left = left / left.norm()
        with torch.no_grad():
            change = torch.outer(delta / (seen["key"][0] @ left), left)
            self.weight.add_(change.T if self.site.transposed else change)
        return steps


class GRACELoop(Loop):
    """A value that replaces the map's answer at the last prompt token, found by a hook; keys in a
    list."""

    def prepare(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def edit(self, request: EditRequest, draws: RandomStreams) -> int:
        pair = self.encoder.pair(request.prompt, request.target_new)
        batch, _ = self.batch([pair.ids[:-1]])
        places = list(range(pair.prompt_len - 1, len(pair.ids) - 1))
        target = torch.tensor(pair.target, device=self.device)
        start = torch.rand(self.site.shape[0], generator=draws.generator("value")).to(self.device)
        value = start.requires_grad_(True)
        key: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not key:
                key.append(args[0][0, pair.prompt_len - 1].detach().clone())
            distances = [(key[0] - k).norm() for k in self.keys]
            if distances:
                torch.stack(distances).min()
            out = out.clone()
            out[0, pair.prompt_len - 1] = value
            return out

        optimizer = torch.optim.Adam([value], lr=self.config.lr)
        handle = self.site.module.register_forward_hook(hook)
        for _ in range(self.config.n_iter):
            optimizer.zero_grad()
            loss = -self.logits(batch).log_softmax(-1)[0, places].gather(1, target[:, None]).mean()
            loss.backward()
            optimizer.step()
        handle.remove()
        self.keys.append(key[0])
        self.values.append(value.detach())
        return int(self.config.n_iter)

    def restore(self) -> None:
        super().restore()
        self.prepare()

    def delta(self) -> Tensor:
        """The last value, as a row."""
        return self.values[-1][None]


class WISELoop(Loop):
    """Masked gradient descent on a copy of the weight, with the margin between edit rows and the
    unrelated sentence."""

    def prepare(self) -> None:
        self.mask_OI: Tensor | None = None

    def edit(self, request: EditRequest, draws: RandomStreams) -> int:
        config, encoder = self.config, self.encoder
        texts = [str(t) for t in self.inputs["templates"].meta["templates"]]
        pairs = [encoder.pair(t.replace("{}", request.prompt), request.target_new) for t in texts]
        assert request.unrelated is not None
        outside = encoder.text(request.unrelated)
        batch, gaps = self.batch([*(p.ids[:-1] for p in pairs), outside])
        lengths = [*(p.prompt_len for p in pairs), len(outside)]
        token = torch.zeros(batch["input_ids"].shape, device=self.device)
        for i, (gap, length) in enumerate(zip(gaps, lengths, strict=True)):
            token[i, gap : gap + length] = 1
        if self.mask_OI is None:
            draw = torch.rand(self.site.shape, generator=draws.generator("mask"))
            self.mask_OI = (draw < config.mask_ratio).to(self.device)
        mask = self.mask_OI.T if self.site.transposed else self.mask_OI
        (saved,) = self.saved.values()
        plain = saved.T if not self.site.transposed else saved  # (I, O)
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            bias = self.site.bias_O
            original = args[0] @ plain if bias is None else args[0] @ plain + bias
            seen.append(out - original)

        self.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([self.weight], lr=config.lr)
        handle = self.site.module.register_forward_hook(hook)
        loss_now, loss_before, steps = 1e9, 0.0, 0
        for _ in range(config.n_iter):
            if abs(loss_now - loss_before) <= STOP_CHANGE and loss_now <= WISE_STOP:
                break
            optimizer.zero_grad()
            seen.clear()
            logprobs = self.logits(batch).log_softmax(-1)
            nll = torch.stack(
                [
                    -logprobs[i, gaps[i] + p.prompt_len - 1 : gaps[i] + len(p.ids) - 1]
                    .gather(1, torch.tensor(p.target, device=self.device)[:, None])
                    .mean()
                    for i, p in enumerate(pairs)
                ]
            ).mean()
            strength = seen[0].norm(dim=-1)
            activation = (strength * token).sum(1) / token.sum(1)
            inside, out = activation[:-1], activation[-1]
            margin = (out - config.alpha).relu() + (config.beta - inside).relu().mean()
            loss = nll + margin + (config.gamma - (inside - out)).relu().mean()
            loss_before, loss_now = loss_now, loss.item()
            loss.backward()
            gradient = self.weight.grad
            assert gradient is not None
            self.weight.grad = (gradient + config.weight_decay * self.weight.detach()) * mask
            optimizer.step()
            if config.norm_constraint is not None:
                with torch.no_grad():
                    self.weight.copy_(
                        torch.clamp(
                            self.weight,
                            min=saved - config.norm_constraint,
                            max=saved + config.norm_constraint,
                        )
                    )
            steps += 1
        handle.remove()
        self.weight.requires_grad_(False)
        self.weight.grad = None
        return steps

    def restore(self) -> None:
        super().restore()
        self.prepare()


LOOPS: Mapping[str, type[Loop]] = MappingProxyType(
    {"ft": FTLoop, "rome": ROMELoop, "grace": GRACELoop, "wise": WISELoop}
)


def agrees(found_OI: Tensor, expected_OI: Tensor) -> float:
    """Relative Frobenius difference of two changes."""
    return float((found_OI - expected_OI).norm() / expected_OI.norm())
