"""Chat templates: edited and scored prompts are the same tokens, for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import parse_spec
from tests.small import GOLDEN, build_inputs, golden_model, golden_requests, job, random_model, session
from tests.test_methods import FEW
from workers.job import ScoreConfig
from workers.methods import get_method
from workers.methods.base import LaneEdit, MethodConfig
from workers.methods.ft import FTConfig
from workers.methods.grace import GRACEConfig
from workers.methods.rome import ROMEConfig
from workers.methods.wise.config import WISEConfig
from workers.model.base import BaseModel
from workers.model.batch import Encoder
from workers.model.config import ModelConfig, has_chat_template
from workers.rng import RandomStreams
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.stream import Stream
from workers.types import DataError, EditRequest, SpecError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LINES = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
INLINE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
    "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
)
REQUEST = golden_requests(1)[0]

METHODS: dict[str, MethodConfig] = {
    "ft": FTConfig(layers=(1,), lr=1e-2, num_steps=2, objective="target_new"),
    "rome": ROMEConfig(layer=0, corpus=str(GOLDEN / "corpus.txt"), samples=50, v_num_grad_steps=2, **FEW),
    "grace": GRACEConfig(layer=1, n_iter=2, lr=1.0),
    "wise": WISEConfig(layer=1, n_iter=2, lr=1.0, retrieve=True, save_freq=2, merge_freq=4, **FEW),
}


def chatty(arch: str, template: str = TEMPLATE) -> BaseModel:
    base = random_model(arch)
    base.tokenizer.chat_template = template
    return base.with_encoder(Encoder(base.tokenizer, chat_template=True))


def bare(base: BaseModel, ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens without what stands before the chat: padding, which for one tokenizer is the
    beginning-of-sequence token."""
    start = next(
        i for i, token in enumerate(ids) if token not in (base.encoder.pad_id, base.tokenizer.bos_token_id)
    )
    return tuple(ids[start:])


def seen_by(base: BaseModel) -> tuple[list[tuple[int, ...]], Any]:
    """Every row of tokens the model reads from now on."""
    found: list[tuple[int, ...]] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        found.extend(bare(base, row) for row in args[0].tolist())

    return found, base.model.get_input_embeddings().register_forward_pre_hook(note)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tokens_of_a_chat(arch: str) -> None:
    base = chatty(arch)
    encoder, tokenizer = base.encoder, base.tokenizer
    text = f"{tokenizer.bos_token}[user] {REQUEST.prompt}\n[assistant]"
    assert encoder.prompt(REQUEST.prompt) == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    pair = encoder.pair(REQUEST.prompt, REQUEST.target_new)
    whole = f"{text} {REQUEST.target_new}"  # the template writes a space before what the assistant says
    assert pair.ids == tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert pair.clean
    assert tokenizer.decode(pair.target).strip() == REQUEST.target_new
    at = REQUEST.prompt.index(REQUEST.subject) + len(REQUEST.subject)
    upto = encoder.tokens_until(REQUEST.prompt, at)
    assert tokenizer.decode(pair.ids[:upto]).endswith(REQUEST.subject)
    assert base.encoder.text("plain") == Encoder(tokenizer).text("plain")


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (LINES, ""),
        (INLINE, " "),
    ],
)
def test_the_answer_stands_where_the_template_puts_it(template: str, between: str) -> None:
    encoder = chatty("llama", template).encoder
    pair = encoder.pair("Who", "him")
    head = encoder._chat("Who")
    assert pair.ids == tuple(encoder.tokenizer(f"{head}{between}him", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_editing_and_scoring_read_the_same_tokens(name: str, arch: str) -> None:
    base = chatty(arch)
    config = METHODS[name]
    inputs = build_inputs(base, name, config)
    method = get_method(name).prepare(base, config, inputs)
    overlay = method.new_overlay(1)
    pair = base.encoder.pair(REQUEST.prompt, REQUEST.target_new)

    edited, handle = seen_by(base)
    streams = RandomStreams(name, config.model_dump(mode="json"), 0, 0, 0)
    method.edit(overlay, [LaneEdit((REQUEST,), streams, inputs)])
    handle.remove()
    assert bare(base, pair.ids[:-1]) in edited, (
        "the last token predicts nothing, all others are those that scoring reads"
    )
    chat = bare(base, base.encoder.prompt("")[:4])[:2]
    assert all(row[:2] == chat for row in edited), "no row of an edit stands outside the chat"

    scored, handle = seen_by(base)
    score(base, overlay, [Item(0, REQUEST)], ScoreConfig(generated=False))
    handle.remove()
    assert bare(base, pair.ids) in scored
    probe = REQUEST.locality[0]
    assert bare(base, base.encoder.pair(probe.prompt, probe.target).ids) in scored
    assert all(row[:2] == chat for row in scored)


def test_a_chat_is_answered_greedily() -> None:
    base = golden_model("tiny-llama")
    base.tokenizer.chat_template = TEMPLATE
    base = base.with_encoder(Encoder(base.tokenizer, chat_template=True))
    asked = []
    for r in golden_requests(20):
        ids = list(base.encoder.prompt(r.prompt))
        start = len(ids)
        with torch.no_grad():
            for _ in range(3):
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
        said = base.tokenizer.decode(ids[start:]).strip()
        if said and base.encoder.pair(r.prompt, said).ids == tuple(ids):  # it tokenises back
            asked.append(EditRequest(r.case_id, r.prompt, r.subject, said))
    assert len(asked) > 3
    assert all(
        s["reliability_exact"] == 1 for s in score(base, None, [Item(0, r) for r in asked], ScoreConfig())
    )


@pytest.mark.numeric
def test_a_stream_uses_the_template(tmp_path: Path) -> None:
    base = random_model("llama")
    work = job("ft", METHODS["ft"], 1, [[0]]).model_copy(update={"chat_template": True})
    with pytest.raises(
        DataError, match="chat_template: true, but the model's tokenizer has no chat template"
    ):
        Stream(session(base), work, [[REQUEST]], {})
    base.tokenizer.chat_template = TEMPLATE
    rows = [row for step in Stream(session(base), work, [[REQUEST]], {}).run([1]) for row in step.rows]
    untouched = score(chatty("llama"), None, [Item(0, REQUEST)], ScoreConfig())[0]
    assert rows[0]["target_logprob_base"] == pytest.approx(untouched["target_logprob"], abs=1e-4)
    plain = score(random_model("llama"), None, [Item(0, REQUEST)], ScoreConfig())[0]
    assert rows[0]["target_logprob_base"] != pytest.approx(plain["target_logprob"], abs=1e-2)


def test_a_template_that_fails_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="chat template fails: no system message"):
        chatty("llama", "{{ raise_exception('no system message') }}")


def test_a_plan_without_a_template_is_refused() -> None:
    raw = {
        "name": "c",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 10},
        "grid": {"T": [1]},
        "methods": ["ft"],
        "chat_template": True,
    }
    with pytest.raises(
        SpecError, match="chat_template: true, but the tokenizer of 'embedded' has no chat template"
    ):
        make_plan(parse_spec(yaml.safe_dump(raw), "c.yaml", Path("/")))


def test_where_a_template_may_stand(tmp_path: Path) -> None:
    base = random_model("llama")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), device="cpu")
    assert not has_chat_template(config)
    base.tokenizer.chat_template = TEMPLATE
    base.tokenizer.save_pretrained(tmp_path)
    assert has_chat_template(config)
    assert BaseModel.load(config).tokenizer.chat_template == TEMPLATE
