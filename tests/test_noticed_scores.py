"""Values of scores against the plain model of transformers, and where a generated answer ends."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.small import golden_requests, random_model
from workers.job import ScoreConfig
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay
from workers.scoring.probes import EncodedProbe, Item, Text, normalise
from workers.scoring.reply import _Generation
from workers.scoring.score import score
from workers.types import EditRequest

LAYER = 1


def of_plain_model(
    model: torch.nn.Module, base: BaseModel, prompt: str, target: str
) -> tuple[float, float, list[bool]]:
    """Smallest margin, mean log-probability and hits of the target's tokens, from the logits of the
    whole text."""
    ids = base.tokenizer(f"{prompt} {target}")["input_ids"]
    first = len(base.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    margins, logprobs, hits = [], [], []
    for place in range(first, len(ids)):
        ordered = sorted(logits[place - 1].tolist(), reverse=True)
        margins.append(ordered[0] - ordered[1])
        logprobs.append(float(logits[place - 1].log_softmax(-1)[ids[place]]))
        hits.append(int(logits[place - 1].argmax()) == ids[place])
    return min(margins), sum(logprobs) / len(logprobs), hits


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_margin_logprob_and_hits_are_those_of_the_plain_model(arch: str) -> None:
    base = random_model(arch, torch.float64)
    site = base.site(LAYER)
    plain = copy.deepcopy(base.model)
    edited = copy.deepcopy(base.model)
    overlay = DenseOverlay([site], 1, torch.float64)
    overlay.set_weight(0, site, 1.5 * site.weight_OI)
    dict(edited.named_modules())[site.name].weight.data.mul_(1.5)
    requests = golden_requests(30)
    rows = score(base, overlay, [Item(0, r) for r in requests], ScoreConfig(generated=False))
    counts = set()
    for request, row in zip(requests, rows, strict=True):
        margin, logprob, hits = of_plain_model(edited, base, request.prompt, request.target_new)
        before_margin, before, before_hits = of_plain_model(plain, base, request.prompt, request.target_new)
        assert row["min_margin"] == pytest.approx(margin, abs=1e-9)
        assert row["target_logprob"] == pytest.approx(logprob, abs=1e-9)
        assert row["target_logprob_base"] == pytest.approx(before, abs=1e-9)
        assert row["reliability_token"] == pytest.approx(sum(hits) / len(hits))
        assert row["reliability_token_base"] == pytest.approx(sum(before_hits) / len(before_hits))
        assert abs(margin - before_margin) > 1e-6  # otherwise nothing shows which of the two models was asked
        counts.add(len(hits))
    assert len(counts) > 1 and max(counts) > 1  # the smallest of several


def says(base: BaseModel, prompt: str, continuation: str) -> None:
    """Train the model until it continues the prompt with these very words."""
    ids = base.encoder.text(f"{prompt} {continuation}")
    start = len(base.encoder.text(prompt))
    inputs = torch.tensor([ids])
    base.model.requires_grad_(True)
    optimizer = torch.optim.Adam(base.model.parameters(), lr=3e-3)
    for _ in range(200):
        logits = base.model(input_ids=inputs).logits[0, start - 1 : -1]
        if bool((logits.argmax(-1) == inputs[0, start:]).all()):
            break
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, inputs[0, start:]).backward()
        optimizer.step()
    else:
        raise AssertionError(f"the model did not learn to say {continuation!r}")
    base.model.requires_grad_(False)


@pytest.mark.parametrize(
    ("said", "target", "right"),
    [
        (
            "clock maker. He lives in Paris",
            "clock maker",
            1.0,
        ),  # the sentence ends, whatever the model would add
        ("Clock maker.\nHe lives in Paris", "clock maker", 1.0),
        ("St. Paris. He lives there", "St. Paris", 1.0),  # the target's own full stop ends nothing
        ("clock maker and he lives in Paris", "clock maker", 0.0),  # no end
        ("clock. maker", "clock maker", 0.0),  # ended too early
    ],
)
def test_a_full_stop_ends_a_generated_answer(said: str, target: str, right: float) -> None:
    base = random_model("llama")
    prompt = "The profession of Brewen Morwick is"
    says(base, prompt, said)
    (row,) = score(base, None, [Item(0, EditRequest("x", prompt, "Brewen Morwick", target))], ScoreConfig())
    assert row["reliability_generated"] == right


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (" clock maker.", Text("clock maker", natural=True)),
        (" clock.", Text("clock", natural=True)),
        (" clock maker", None),
        (" St.", None),  # the beginning of an alias
        (" ST.", None),
        (" St. Paris", None),
        (" St. Paris.", Text("st. paris", natural=True)),
        ("\n clock", None),  # a line that has not begun does not end
        (" clock\n", Text("clock", natural=True)),
    ],
)
def test_where_a_generated_answer_ends(said: str, result: Text | None) -> None:
    base = random_model("llama")
    prompt, target = "The profession of Brewen Morwick is", "clock maker"
    probe = EncodedProbe(
        0, "reliability", 0, base.encoder.pair(prompt, target), prompt, target, ("St. Paris",)
    )
    generation = _Generation(base, probe, 100, None)
    for token in base.tokenizer(said, add_special_tokens=False)["input_ids"]:
        assert generation.result is None
        generation.absorb(token)
    assert generation.result == result


def test_the_end_token_and_the_limit_end_an_answer() -> None:
    base = random_model("llama")
    prompt, target = "The profession of Brewen Morwick is", "clock maker"
    probe = EncodedProbe(0, "reliability", 0, base.encoder.pair(prompt, target), prompt, target)
    ids = base.tokenizer(" clock maker", add_special_tokens=False)["input_ids"]
    ended, cut, left = (
        _Generation(base, probe, limit, want) for limit, want in ((9, None), (2, None), (9, ("harp",)))
    )
    for token in ids[:2]:
        ended.absorb(token)
        if cut.result is None:
            cut.absorb(token)
    ended.absorb(base.tokenizer.eos_token_id)
    left.absorb(ids[0])
    assert ended.result == Text(normalise(base.tokenizer.decode(ids[:2])), natural=True)
    assert cut.result == Text(normalise(base.tokenizer.decode(ids[:2])), natural=False)
    assert left.result == Text(None, natural=False)  # it can no longer become what is wanted


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" Paris. ", "paris"),
        ("St. Paris.", "st. paris"),
        ("...", ""),
        ('"Clock  \n maker!"', "clock maker"),
        ("(Paris)", "(paris)"),
    ],
)
def test_a_text_is_normalised(text: str, normal: str) -> None:
    assert normalise(text) == normal
