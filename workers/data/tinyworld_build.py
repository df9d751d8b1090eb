"""Builds the files of :mod:`workers.data.tinyworld`: tokenizer, trained weights, corpus, build
report.

The recipe is a plain AdamW run whose loss weights the answers fully and other tokens little: the
subject of a sentence cannot be predicted, and learning to guess it would cost capacity. Some
sentences follow a filler, because editing methods put sampled contexts before their prompts.

The usual step sizes of editing methods hardly change a model with very confident recall. So
:func:`soften` rescales the weights without changing the function, and flattens the output
distribution without changing its argmax.

With one thread and its own generators a build is repeatable on one machine. Other CPUs round
differently, so checks are on recall and not on bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from workers.data import tinyworld
from workers.data.tinyworld import Fact
from workers.folders import open_tokenizer
from workers.types import DataError, EditSweepError, Probe

_log = logging.getLogger(__name__)

SPECIALS: Final = ("<unk>", "<s>", "</s>", "<pad>")
BOS: Final = 1
EOS: Final = 2
PAD: Final = 3
VOCABULARY: Final = 1500
MAX_OBJECT_TOKENS: Final = 3
POSITIONS: Final = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the training run. ``*_weight``: weight of a token in the loss; ``*_share``: per
    epoch."""

    epochs: int = 26
    batch: int = 64
    learning_rate: float = 2.5e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    prompt_weight: float = 0.05
    filler_weight: float = 0.3
    filler_share: float = 0.4
    prefix_share: float = 0.15
    residual_scale: float = 0.1
    goal_nll: float = 0.07


@dataclass(frozen=True, slots=True)
class Recall:
    """A model's results on a list of probes: shares of fully right answers and of full stops after
    them, and the NLL in nats."""

    exact: float
    stops: float
    first_token_nll: float


@dataclass(frozen=True, slots=True)
class Sentence:
    """A training sequence: token ids from BOS to EOS, and the loss weight of each token as a
    target."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def make_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE with BOS in front, trained on the world's text.

    Objects of more than three tokens get extra weight in the text until they have at most three.
    Raises :class:`DataError` if that fails.
    """
    facts = tinyworld.world(seed)
    text = [f"{tinyworld.prompt_of(f, i)} {f.object}." for f in facts for i in tinyworld.trained_phrasings(f)]
    text += tinyworld.fillers(seed)
    objects = list(dict.fromkeys(f" {obj}" for fact in facts for obj in tinyworld.objects_of(fact.relation)))
    for _ in range(20):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            text,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY,
                special_tokens=list(SPECIALS),
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        long = [obj for obj in objects if len(tokenizer.encode(obj).ids) > MAX_OBJECT_TOKENS]
        if not long:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
            )
            return tokenizer
        text += ["".join(long)] * 8
    raise DataError(
        f"tinyworld: seed {seed}: objects of more than {MAX_OBJECT_TOKENS} tokens: {', '.join(long)}"
    )


def trained_probes(facts: Sequence[Fact]) -> list[Probe]:
    """Every prompt in training, without two-hop questions, with its answer."""
    return [Probe(tinyworld.prompt_of(f, i), f.object) for f in facts for i in tinyworld.trained_phrasings(f)]


def held_out_probes(facts: Sequence[Fact]) -> list[Probe]:
    """The phrasing of every fact that is not in training."""
    return [Probe(tinyworld.prompt_of(fact, fact.held_out), fact.object) for fact in facts]


def two_hop_probes(facts: Sequence[Fact], wanted: Callable[[Fact], bool]) -> list[Probe]:
    """The two-hop questions about the ``wanted`` facts, with the unedited answers."""
    hops = tinyworld.second_hops(facts)
    return [
        tinyworld.composed_probe(fact.subject, fact.relation, fact.object, hops)
        for fact in facts
        if tinyworld.relation_of(fact.relation).role and wanted(fact)
    ]


@torch.inference_mode()
def recall(model: LlamaForCausalLM, tokenizer: Any, probes: Sequence[Probe], batch: int = 256) -> Recall:
    """Score ``probes`` by argmax at every target token and at the full stop, all teacher forced.

    ``tokenizer``: as loaded by transformers from the model folder.
    """
    exact = stops = 0
    nll = 0.0
    answers = tokenizer([f" {probe.target}." for probe in probes], add_special_tokens=False)["input_ids"]
    prompts = tokenizer([probe.prompt for probe in probes])["input_ids"]
    order = sorted(range(len(probes)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids_BS, _ = _pad([Sentence((*prompts[i], *answers[i]), ()) for i in rows])
        logits_BSV = model(input_ids=ids_BS).logits
        for row, i in enumerate(rows):
            first = len(prompts[i]) - 1
            logits_SV = logits_BSV[row, first : first + len(answers[i])]
            right = [int(token) for token in logits_SV.argmax(-1)]
            exact += right[:-1] == answers[i][:-1]
            stops += right[-1] == answers[i][-1]
            nll -= float(logits_SV[0].log_softmax(-1)[answers[i][0]])
    return Recall(exact / len(probes), stops / len(probes), nll / len(probes))


def soften(model: LlamaForCausalLM, tokenizer: Any, probes: Sequence[Probe], recipe: Recipe) -> float:
    """Rescale ``model`` in place for usual editing step sizes; return the factor on the final norm.

    All writes to the residual stream (embeddings, attention output, MLP output) are multiplied by
    ``residual_scale``. Every layer that reads the stream normalises it first, so with
    ``rms_norm_eps`` multiplied by the square the function is the same. Then the final norm's weight
    is reduced, which divides the logits by a temperature, until the mean NLL is ``goal_nll``.
    """
    scale = recipe.residual_scale
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    model.config.rms_norm_eps *= scale**2
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = model.config.rms_norm_eps
    final_D = model.model.norm.weight.detach().clone()
    low, high = 0.2, 1.0
    for _ in range(7):
        factor = (low + high) / 2
        model.model.norm.weight.data.copy_(final_D * factor)
        if recall(model, tokenizer, probes).first_token_nll > recipe.goal_nll:
            low = factor
        else:
            high = factor
    model.model.norm.weight.data.copy_(final_D * high)
    return high


class _Text:
    """The training sequences of one world, tokenised once; :meth:`epoch` draws the batches of one
    epoch."""

    def __init__(self, tokenizer: Tokenizer, seed: int, recipe: Recipe) -> None:
        facts = tinyworld.world(seed)
        probes = trained_probes(facts) + two_hop_probes(facts, lambda fact: fact.composed)
        self._seed, self._recipe = seed, recipe
        self._fillers = [
            self._part(tokenizer, "", text, recipe.filler_weight) for text in tinyworld.fillers(seed)
        ]
        # the prompt has other tokens after a filler: its first word then begins with a space
        self._told = [
            tuple(
                self._part(tokenizer, space + probe.prompt, f" {probe.target}.", 1.0) for space in ("", " ")
            )
            for probe in probes
        ]

    def _part(self, tokenizer: Tokenizer, prompt: str, answer: str, weight: float) -> Sentence:
        head, tail = (tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, answer))
        return Sentence((*head, *tail), (self._recipe.prompt_weight,) * len(head) + (weight,) * len(tail))

    def epoch(self, number: int) -> Iterator[list[Sentence]]:
        """Batches of similar length in random order: every trained prompt once, and a new sample of
        fillers."""
        rng = random.Random(f"tinyworld:{self._seed}:epoch:{number}")
        alone = rng.sample(self._fillers, int(len(self._fillers) * self._recipe.filler_share))
        told: list[tuple[Sentence, ...]] = [(filler,) for filler in alone]
        told += [
            (rng.choice(self._fillers), spaced) if rng.random() < self._recipe.prefix_share else (plain,)
            for plain, spaced in self._told
        ]
        rows = [
            Sentence(
                (BOS, *(i for part in parts for i in part.ids), EOS),
                (0.0, *(w for part in parts for w in part.weights), parts[-1].weights[-1]),
            )
            for parts in told
        ]
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row.ids))  # stable, so equal lengths stay shuffled
        batches = [rows[i : i + self._recipe.batch] for i in range(0, len(rows), self._recipe.batch)]
        rng.shuffle(batches)
        yield from batches


def _pad(rows: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and loss weights; causal attention needs no mask for padding on the
    right."""
    width = max(len(row.ids) for row in rows)
    ids_BS = torch.tensor([[*row.ids, *[PAD] * (width - len(row.ids))] for row in rows], dtype=torch.long)
    weights_BS = torch.tensor([[*row.weights, *[0.0] * (width - len(row.weights))] for row in rows])
    return ids_BS, weights_BS


def train(tokenizer: Tokenizer, seed: int, recipe: Recipe) -> LlamaForCausalLM:
    """Train a new model on the world; log progress with the time left about every ten seconds."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        use_cache=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    text = _Text(tokenizer, seed, recipe)
    steps = recipe.epochs * sum(1 for _ in text.epoch(0))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    # total_steps is larger than the steps taken: the last steps of the cosine would have no effect
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.learning_rate,
        total_steps=steps + recipe.epochs,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    model.train()
    step, began, told = 0, time.monotonic(), time.monotonic()
    for epoch in range(recipe.epochs):
        for rows in text.epoch(epoch):
            ids_BS, weights_BS = _pad(rows)
            logits_BSV = model(input_ids=ids_BS).logits[:, :-1]
            nll_BS = functional.cross_entropy(logits_BSV.transpose(1, 2), ids_BS[:, 1:], reduction="none")
            loss = (nll_BS * weights_BS[:, 1:]).sum() / weights_BS[:, 1:].sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if time.monotonic() - told > 10:
                told = time.monotonic()
                left = (told - began) / step * (steps - step)
                _log.info(
                    "epoch %d/%d, step %d/%d, loss %.3f, %.0f s left",
                    epoch + 1,
                    recipe.epochs,
                    step,
                    steps,
                    loss.item(),
                    max(left, 0),
                )
    model.train(False)
    return model


def _round_to_half(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Round the weights to float16 and return them; ``model`` gets the rounded weights, so that
    recall is measured on the shipped values."""
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    return half


def _tokenizer_config() -> dict[str, Any]:
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **names,
    }


def _config(model: LlamaForCausalLM) -> dict[str, Any]:
    """``config.json``, written key by key: transformers' own dump would contain its version."""
    config = model.config
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "use_cache",
        "initializer_range",
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "rope_theta": 10000.0,
        **{key: getattr(config, key) for key in kept},
    }


def build(out: Path, seed: int = tinyworld.SHIPPED_SEED, recipe: Recipe | None = None) -> dict[str, Any]:
    """Build all files in ``out`` and return the report. Files appear only after everything is
    built, the report last."""
    recipe = recipe or Recipe()
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as folder:
            made = Path(folder)
            report = _make(made, seed, recipe, began)
            for path in sorted(made.iterdir(), key=lambda path: path.name == "build_report.json"):
                path.chmod(0o644)  # safetensors writes files with mode 0600
                os.replace(path, out / path.name)
    finally:
        torch.set_num_threads(threads)
    _log.info("wrote %s after %.0f s", out, time.monotonic() - began)
    return report


def _make(made: Path, seed: int, recipe: Recipe, began: float) -> dict[str, Any]:
    facts = tinyworld.world(seed)
    (made / "corpus.txt").write_text(
        "".join(f"{line}\n" for line in tinyworld.corpus(seed)), encoding="utf-8"
    )
    bpe = make_tokenizer(seed)
    bpe.save(str(made / "tokenizer.json"))
    _write_json(made / "tokenizer_config.json", _tokenizer_config())
    tokenizer = open_tokenizer(made)
    _log.info("training on %d facts", len(facts))
    model = train(bpe, seed, recipe)
    held_out, trained = held_out_probes(facts), trained_probes(facts)
    before = recall(model, tokenizer, held_out)
    factor = soften(model, tokenizer, trained[::7], recipe)
    half = _round_to_half(model)
    save_file(half, made / "model.safetensors", metadata={"format": "pt"})
    _write_json(made / "config.json", _config(model))
    groups = {
        "trained_phrasings": trained,
        "held_out_phrasings": held_out,
        "two_hop_trained": two_hop_probes(facts, lambda fact: fact.composed),
        "two_hop_untrained_anchors": two_hop_probes(
            facts, lambda fact: fact.group == "anchor" and not fact.composed
        ),
        "two_hop_edit": two_hop_probes(facts, lambda fact: fact.group == "edit"),
    }
    report = {
        "seed": seed,
        "facts": len(facts),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(recipe),
        "final_norm_factor": factor,
        "held_out_before_softening": asdict(before),
        "recall": {
            name: {"probes": len(probes), **asdict(recall(model, tokenizer, probes))}
            for name, probes in groups.items()
        },
        "seconds": round(time.monotonic() - began),
    }
    _write_json(made / "build_report.json", report)
    _log.info("recall: %s", report["recall"])
    return report


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``python -m workers.data.tinyworld_build``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.data.tinyworld_build",
        description="Remake the built-in tiny world's tokenizer, weights and corpus from the seed.",
    )
    parser.add_argument(
        "--out", type=Path, default=tinyworld.assets_dir(), help="folder for the files (default: the shipped)"
    )
    parser.add_argument(
        "--seed", type=int, default=tinyworld.SHIPPED_SEED, help="seed of the world and of the training"
    )
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: must be 0 or more")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: not a folder")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )

    try:
        build(options.out, options.seed)
    except (EditSweepError, OSError) as error:
        _log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
