"""Chat templates are programs: what one may take, what it is told, and that nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.planning.inputs import Inputs, read_inputs
from orchestrator.planning.plan import Planner
from orchestrator.planning.spec import parse_spec
from tests.small import random_model
from tests.test_chat import INLINE, LINES, TEMPLATE
from tests.waiting import wait_for
from workers.data.tinyworld import assets_dir
from workers.model import chat as chat_module
from workers.model.batch import Encoder
from workers.model.chat import Limits, Renderer, chat, parse_day, renderer
from workers.types import DataError, SpecError

TIGHT = Limits(cpu_seconds=1, memory_bytes=100 << 20, characters=1000)
DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}"
    "{% endif %}Today: {{ day }}\n" + LINES
)
"""As the templates of Llama 3 do: today's date, or one that stands in the template."""
NEEDY = "{{ strftime_now('%Y-%m-%d') }}\n" + LINES
BLOCKS = (
    "{%- for m in messages -%}{%- if loop.first and false -%}{%- break -%}{%- endif -%}"
    "{{ dict(a=1) | tojson }}{% generation %}<{{ m.role | upper }}> {{ m.content | trim }}{% endgeneration %}\n"
    "{%- endfor -%}{%- set ns = namespace(x=1) -%}{{ ns.x }}{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.fixture(scope="module")
def tight() -> Renderer:
    return Renderer(TIGHT)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "1 seconds of proc",
        ),
        ("{{ 'a' * 10000000000 }}", "100 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "100 MiB of memory"),
        ("{{ 'a' * 20000 }}", "it writes 20000 characters, more than 1024"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{% if %}", "Expected an expression"),
        ("{{ strftime_now('%d') }}", "give it a day: `template: {date: 2024-07-26}`"),
    ],
)
def test_a_template_that_takes_too_much_is_refused_by_name(tight: Renderer, template: str, why: str) -> None:
    with pytest.raises(DataError, match=r"chat_template: true, but .*my-model") as caught:
        tight.render(template, {}, [chat("Who")], "my-model")
    assert why in str(caught.value)
    assert tight.render(LINES, {}, [chat("Who")], "other") == ["<user>\nWho\n<assistant>\n"]


@pytest.mark.parametrize(
    "template", [TEMPLATE, LINES, INLINE, BLOCKS, DATED.replace("strftime_now", "nothing")]
)
def test_the_text_is_the_librarys(template: str) -> None:
    """Bit for bit what the tokenizer's own method gives, white space and odd characters included."""
    tokenizer = random_model("llama").tokenizer
    tokenizer.chat_template = template
    prompts = ["Who?", "", "  two  spaces ", "日本語\u2028", "\x1b[31m", "a\nb\\n{{ 7 * 7 }}", "\ud800"]
    variables = {"enable_thinking": False, "level": 3, "what": None, "share": 0.1}
    for answer in (None, "Ostvale ", ""):
        found = renderer().render(
            template, {**tokenizer.special_tokens_map, **variables}, [chat(p, answer) for p in prompts], "m"
        )
        for prompt, text in zip(prompts, found, strict=True):
            messages, begins = chat(prompt, answer)
            assert text == tokenizer.apply_chat_template(
                messages, add_generation_prompt=begins, tokenize=False, **variables
            )


def test_an_encoder_renders_each_prompt_once_and_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = random_model("llama").tokenizer
    tokenizer.chat_template = LINES
    batches: list[int] = []
    ask = Renderer._ask

    def count(self: Renderer, asked: Any, name: str) -> list[str]:
        batches.append(len(asked["chats"]))
        return ask(self, asked, name)

    monkeypatch.setattr(Renderer, "_ask", count)
    encoder = Encoder(tokenizer, chat_template=True)
    batches.clear()
    encoder.prepare([f"Who {i}?" for i in range(chat_module.BATCH + 10)] * 2)
    assert batches == [chat_module.BATCH, 10]
    alone = Encoder(tokenizer, chat_template=True)
    batches.clear()
    assert encoder.pair("Who 3?", "him") == alone.pair("Who 3?", "him")
    assert encoder.prompt("Who 4?") == alone.prompt("Who 4?")
    assert batches == [1, 1]  # the other encoder's


def test_the_process_that_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds no credentials, is started again when it was killed, and ends with its renderer."""
    monkeypatch.setenv("HF_TOKEN", "planted")
    ours = Renderer(TIGHT)
    ours.render(LINES, {}, [chat("a")], "m")
    child = ours._child
    assert child is not None
    assert b"planted" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="its process ended by SIGKILL"):
        ours.render(LINES, {}, [chat("a")], "m")
    assert ours.render(LINES, {}, [chat("a")], "m") == ["<user>\na\n<assistant>\n"]
    second = ours._child
    assert second is not None and second.pid != child.pid
    del ours
    wait_for(lambda: second.poll() is not None)


# --- the day --------------------------------------------------------------------------------


def encoder_of(template: str, **variables: Any) -> Encoder:
    tokenizer = random_model("llama").tokenizer
    tokenizer.chat_template = template
    return Encoder(tokenizer, chat_template=True, template=variables)


def test_a_template_has_no_clock_but_the_one_it_is_given() -> None:
    plain = encoder_of(DATED)
    assert plain.asks_for_day
    assert plain._chat("Who").startswith("Today: 26 Jul 2024\n")
    given = encoder_of(DATED, date="2001-02-03")
    assert not given.asks_for_day
    assert given._chat("Who").startswith("Today: 03 Feb 2001\n")
    assert encoder_of(NEEDY, date="2001-02-03")._chat("Who").startswith("2001-02-03\n")
    with pytest.raises(DataError, match=r"asks for today's date.*`template: \{date: 2024-07-26\}`"):
        encoder_of(NEEDY)
    assert not encoder_of(LINES).asks_for_day
    named = "{# strftime_now('%d') #}" + LINES  # named, and never asked
    assert not encoder_of(named).asks_for_day
    assert datetime.now().strftime("%d %b %Y") != "26 Jul 2024"


@pytest.mark.parametrize("value", ["tomorrow", "2024-13-01", "2024-7-6", 20240726, True])
def test_a_day_that_is_none(value: Any) -> None:
    with pytest.raises(DataError, match=r"template.date: .* is no day; .* for example 2024-07-26"):
        encoder_of(DATED, date=value)
    assert parse_day("2024-07-26") == date(2024, 7, 26)


def test_a_templates_own_variable_of_that_name() -> None:
    with pytest.raises(DataError, match="the model's chat template never reads date; remove it"):
        encoder_of(LINES, date="2024-07-26")
    assert encoder_of("{{ date }}\n" + LINES, date="soon")._chat("Who").startswith("soon\n")


RAW: dict[str, Any] = {
    "name": "day",
    "dataset": {"kind": "tinyworld", "edits": 2},
    "grid": {"T": [1]},
    "methods": [{"method": "ft", "hparams": {"layers": [1]}}],
    "chat_template": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(assets_dir(), tmp_path_factory.mktemp("dated") / "m"))


def planned(model: Path, template: str, **variables: Any) -> tuple[str, Inputs]:
    (model / "chat_template.jinja").write_text(template)
    text = yaml.safe_dump({**RAW, "model": {"name": str(model), "device": "cpu"}, "template": variables})
    inputs = read_inputs(parse_spec(text, "s.yaml", Path.cwd()))
    return Planner(inputs).cells[0].cell_id, inputs


def test_the_day_is_part_of_a_cell_only_where_it_is_set(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template without a clock keeps its cells; one that would write the day makes others."""
    from orchestrator.planning import plan

    plain, inputs = planned(model, LINES)
    marks: list[str] = []
    grid = plan.Grid

    def noting(spec: Any, common: Any, *rest: Any) -> Any:
        marks.append(common.clock_mark)
        return grid(spec, common, *rest)

    monkeypatch.setattr(plan, "Grid", noting)
    assert not inputs.asks_for_day and not any("date" in warning for warning in inputs.warnings)
    dated, inputs = planned(model, DATED)
    assert any("asks for today's date, and is not told it" in warning for warning in inputs.warnings)
    given, inputs = planned(model, DATED, date=date(2024, 7, 26))
    assert inputs.spec.template == {"date": "2024-07-26"}  # as a text, which survives JSON
    assert json.loads(inputs.spec.model_dump_json())["template"] == {"date": "2024-07-26"}
    assert not any("date" in warning for warning in inputs.warnings)
    other, _ = planned(model, DATED, date="2024-07-27")
    assert len({plain, dated, given, other}) == 4
    assert marks == ["none", "", ""]


def test_the_cells_of_chats_keep_their_ids(model: Path) -> None:
    """As they were when the library rendered chats in this process."""
    assert planned(model, LINES)[0] == LINES_CELL
    assert planned(model, THINKING, enable_thinking=False)[0] == THINKING_CELL


def test_a_plan_refuses_a_template_by_the_models_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.model.batch.renderer", lambda: Renderer(TIGHT))
    with pytest.raises(DataError, match=f"{model}: the chat template fails: it takes more than 100 MiB"):
        planned(model, "{{ 'a' * 10000000000 }}" + LINES)
    with pytest.raises(SpecError, match="template"):
        planned(model, LINES, when=datetime(2024, 7, 26, 1))


THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking %}{% endif %}{% endif %}"
)
LINES_CELL, THINKING_CELL = "00b31675764697e5", "4d15f5ef13ce5229"
