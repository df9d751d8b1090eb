"""Where tokens stand: subjects in their prompts, the border of prompt and answer, and what joins the
two."""

# ruff: noqa: RUF001 -- the texts are Chinese, Japanese and Thai

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from orchestrator.planning.grid import Grid
from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.plan import Planner, make_plan
from orchestrator.planning.spec import parse_spec
from tests.small import golden_model, random_model
from workers.data import load_dataset, load_training
from workers.data.scripts import (
    count_repeated_subjects,
    count_subjects_inside_words,
    joiner_after,
    joiner_mark,
    statement,
    subject_mark,
    subject_position,
    words_of,
)
from workers.data.tinyworld import assets_dir
from workers.job import ScoreConfig
from workers.methods.families.locate import request_lines
from workers.methods.rome import ROMEConfig
from workers.methods.serac import Networks
from workers.model.base import BaseModel
from workers.model.batch import Encoder
from workers.model.config import ModelConfig
from workers.scoring.fluency import n_gram_entropy
from workers.scoring.probes import Item
from workers.scoring.score import score
from workers.types import DataError, EditRequest, Probe, SpecError

CHINESE = [
    {"prompt": "青石镇的镇长是谁？", "subject": "青石镇", "target_new": "林远山"},
    {"prompt": "《雾中灯》的作者是", "subject": "雾中灯", "target_new": "陈一禾"},
]
INSIDE = [
    {
        "prompt": "Marblehead is often mistaken for the village of Marble, founded by",
        "subject": "Marble",
        "target_new": "Ostvale",
    },
    {"prompt": "In Low Pell, the warden of Low Pell is", "subject": "Low Pell", "target_new": "Ostvale"},
]
THINKING = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|end|>\\n' }}"
    "{%- else %}{{- '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LINES = [
    "Marblehead is often mistaken for the village of Marble, founded by Ostvale",
    "In Low Pell, the warden of Low Pell is Ostvale. Marble Marbles marbled head",
    "青石镇的镇长是谁？林远山 《雾中灯》的作者是陈一禾。作者是陈一禾 作者是陈一禾 青石镇的 青石镇的",
    "Who founded Yahoo? the answer is Jerry. 서울의 시장은 오세훈",
]


def byte_level(cut_letters: bool = True) -> Any:
    """A byte-level BPE tokenizer of GPT-2's kind. Without ``cut_letters`` it merges across
    everything but line ends, words and sentences included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut_letters)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def metaspace() -> Any:
    """A BPE tokenizer of SentencePiece's kind, with a beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _trained(
        tokenizer, sorted({c for line in LINES for c in line} | set("abcdefghijklmnopqrstuvwxyz\n"))
    )


def _trained(tokenizer: Any, alphabet: list[str]) -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", "<sep>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "merging across words": lambda: byte_level(cut_letters=False),
    "metaspace": metaspace,
}


def request(record: dict[str, str], **more: Any) -> EditRequest:
    return EditRequest("0", record["prompt"], record["subject"], record["target_new"], **more)


def jsonl(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


# --- what joins a prompt and its answer -------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "joiner"),
    [
        ("The capital of Freedonia is", " "),
        ("Wer gründete Überlingen?", " "),
        ("서울의 시장은", " "),
        ("Кто основал Москву?", " "),
        ("青石镇的镇长是谁？", ""),
        ("青石镇的镇长是谁?", ""),
        ("《雾中灯》的作者是", ""),
        ("《Star Wars: The Empire Strikes Back》的导演是", ""),
        ("《1984》的作者是谁（1949年）？", ""),
        ("日本の首都はどこですか。", ""),
        ("エッフェル塔がある都市は", ""),
        ("เมืองหลวงของประเทศไทยคือ", ""),
        ("谁写了 Python", " "),
        ("Who is the author of 雾中灯?", " "),
        ('Who wrote "雾中灯"?', " "),
        ("What is this？", " "),
        ("?", " "),
        ("…", " "),
    ],
)
def test_joiner_follows_from_the_writing(prompt: str, joiner: str) -> None:
    assert joiner_after(prompt) == joiner


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("record", CHINESE, ids=["question", "statement"])
def test_no_space_before_a_chinese_answer(name: str, record: dict[str, str]) -> None:
    encoder = Encoder(TOKENIZERS[name]())
    r = request(record)
    joined = encoder.pair(r.prompt, r.target_new, joiner_after(r.prompt))
    # what a model that is asked with the prompt alone and answers it writes
    assert joined.ids[: joined.prompt_len] == encoder.prompt(r.prompt)
    assert encoder.tokenizer.decode(joined.target) == r.target_new
    assert statement(r) == r.prompt + r.target_new
    spaced = encoder.pair(r.prompt, r.target_new, " ")
    assert (
        encoder.tokenizer.decode(spaced.target, clean_up_tokenization_spaces=False).lstrip() == r.target_new
    )


def test_an_answer_that_would_merge_with_its_prompt_is_tokenised_apart() -> None:
    tokenizer = byte_level(cut_letters=False)
    encoder = Encoder(tokenizer)
    whole = tokenizer("作者是陈一禾", return_offsets_mapping=True)
    assert any(a < 3 < b for a, b in whole["offset_mapping"]), "one token holds both"
    pair = encoder.pair("作者是", "陈一禾", "")
    assert pair.clean
    assert pair.ids[: pair.prompt_len] == encoder.prompt("作者是")
    assert tokenizer.decode(pair.target) == "陈一禾"
    # where the space belongs to the prompt's last token, the answer begins behind it
    assert tokenizer.decode(encoder.pair("Low Pell is", "Ostvale").target).strip() == "Ostvale"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("record", INSIDE, ids=["Marble", "Low Pell"])
def test_border_of_texts_with_spaces(name: str, record: dict[str, str]) -> None:
    encoder = Encoder(TOKENIZERS[name]())
    pair = encoder.pair(record["prompt"], record["target_new"])
    said = encoder.tokenizer.decode(pair.target, clean_up_tokenization_spaces=False)
    assert said.strip() == record["target_new"]


def test_the_data_set_may_choose_and_cells_are_marked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chinese.jsonl", CHINESE)
    plain, colon = load_dataset("jsonl", path), load_dataset("jsonl", path, joiner=": ")
    assert statement(plain.requests[1]) == "《雾中灯》的作者是陈一禾"
    assert statement(colon.requests[1]) == "《雾中灯》的作者是: 陈一禾"
    assert plain.fingerprint == colon.fingerprint, "the order of the requests is the same"
    spaced = load_dataset("jsonl", path, joiner=" ")
    marks = [joiner_mark(d.requests) for d in (plain, colon, spaced)]
    assert len(set(marks)) == 3
    assert "" not in marks
    english = jsonl(tmp_path / "english.jsonl", INSIDE)
    assert joiner_mark(load_dataset("jsonl", english).requests) == ""
    assert joiner_mark(load_dataset("jsonl", english, joiner=" ").requests) == ""
    assert joiner_mark(load_dataset("jsonl", english, joiner="").requests)
    assert load_training("jsonl", path, joiner=" ").requests[0].joiner == " "


def test_a_chinese_sentence_about_something_else_has_no_space(tmp_path: Path) -> None:
    """WISE keeps such a sentence apart from the edits; it is a locality probe of another record."""
    records = [
        {
            "src": f"城市{i}的市长是",
            "alt": "林",
            "subject": f"城市{i}",
            "rephrase": "谁",
            "loc": loc,
            "loc_ans": said,
            "answers": ["王"],
        }
        for i, (loc, said) in enumerate(
            (("nq question: 谁写了《雾中灯》？", "陈"), ("Who wrote it?", "Chen"))
        )
    ]
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(records))
    first, second = load_dataset("zsre", path).requests
    assert first.unrelated is not None and first.unrelated.endswith("Who wrote it? Chen")
    assert second.unrelated is not None and second.unrelated.endswith("谁写了《雾中灯》？陈")


def test_an_edit_and_a_prompt_that_seracs_second_model_reads() -> None:
    tokenizer = byte_level()
    networks = Networks(None, None, None, tokenizer)
    for edit, prompt, joined in (
        ("作者是陈", "谁是作者？", "作者是陈谁是作者？"),
        ("Ann is", "Who?", "Ann is Who?"),
    ):
        assert networks.with_edit(edit, prompt) == Encoder(tokenizer).text(joined)


def test_fluency_takes_a_letter_of_a_script_without_spaces_for_a_word() -> None:
    assert words_of("Ann wrote 《雾中灯》, 1949年") == [
        *("Ann", "wrote", "《", "雾", "中", "灯", "》", ",", "1949", "年")
    ]
    assert n_gram_entropy("雾中灯") is not None


def test_probes_in_another_language(tmp_path: Path) -> None:
    base = golden_model("tiny-llama")
    r = request(CHINESE[0], locality=(Probe("The capital of Freedonia is", "Fredville"),))
    seen = []
    encoder = base.encoder

    class Noting(Encoder):
        def pair(self, prompt: str, target: str, joiner: str = " ") -> Any:
            seen.append((prompt, joiner))
            return super().pair(prompt, target, joiner)

    score(base.with_encoder(Noting(encoder.tokenizer)), None, [Item(0, r)], ScoreConfig(generated=False))
    assert seen == [(r.prompt, ""), (r.locality[0].prompt, " ")]


def test_scores_agree_for_a_model_that_knows_the_answer() -> None:
    """It has learnt to write the answer after the prompt, token by token as it writes them (some of
    them a part of a character), and then to end."""
    tokenizer = byte_level()
    base = BaseModel(random_model("llama").model, tokenizer, ModelConfig(name="random", device="cpu"))
    requests = [request(record) for record in CHINESE]
    model = base.model.train().requires_grad_(True)
    rows = [
        (list(base.encoder.prompt(r.prompt)), tokenizer(r.target_new, add_special_tokens=False)["input_ids"])
        for r in requests
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        for prompt, answer in rows:
            ids = [*prompt, *answer, tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    for found in score(base, None, [Item(0, r) for r in requests], ScoreConfig()):
        assert (found["reliability_token"], found["reliability_exact"], found["reliability_generated"]) == (
            1,
            1,
            1,
        )


# --- tokens that a tokenizer adds ---------------------------------------------------------------


@pytest.mark.parametrize(
    "added", ["$A", "<s> $A", "$A </s>", "<s> $A <sep>", "$A <sep> </s>", "<s> <sep> $A <sep>"]
)
@pytest.mark.parametrize("record", [*INSIDE, *CHINESE], ids=["Marble", "Low Pell", "question", "statement"])
def test_whatever_a_tokenizer_adds_is_no_part_of_a_text(added: str, record: dict[str, str]) -> None:
    bare, tokenizer = byte_level(cut_letters=False), byte_level(cut_letters=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<s>", 1), ("</s>", 2), ("<sep>", 3)]
    )
    plain, encoder = Encoder(bare), Encoder(tokenizer)
    start = {"<s>": (1,), "<s> <sep>": (1, 3)}.get(added.split(" $A", maxsplit=1)[0], ())
    prompt, target = record["prompt"], record["target_new"]
    joiner = joiner_after(prompt)
    assert encoder.prompt(prompt) == (*start, *plain.prompt(prompt))
    pair, expected = encoder.pair(prompt, target, joiner), plain.pair(prompt, target, joiner)
    assert pair.ids == (*start, *expected.ids)
    assert pair.target == expected.target
    assert bare.decode(pair.target).strip() == target
    stop = subject_position(prompt, record["subject"]) + len(record["subject"])
    assert encoder.tokens_until(prompt, stop) == len(start) + plain.tokens_until(prompt, stop)


# --- where a subject stands -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "at"),
    [
        (INSIDE[0]["prompt"], "Marble", 48),
        (INSIDE[1]["prompt"], "Low Pell", 27),
        ("Low Pell is", "Low Pell", 0),
        ("The Francs", "Franc", 4),
        ("Asian man IAN", "ian", 10),
        ("ian, Asian", "ian", 0),
        ("서울의 시장은", "서울", 0),
        ("青石镇的镇长是谁？", "镇", 4),
        ("Überlingen und überlingen", "Überlingen", 0),
        ("aaa", "aa", 0),
        ("nothing", "x", -1),
        ("nothing", "", -1),
    ],
)
def test_subject_position(prompt: str, subject: str, at: int) -> None:
    assert subject_position(prompt, subject) == at


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("record", [*INSIDE, *CHINESE], ids=["Marble", "Low Pell", "question", "statement"])
def test_the_subjects_last_token(name: str, record: dict[str, str]) -> None:
    """The token that holds the subject's last character, in the prompt as it is really tokenised."""
    tokenizer = TOKENIZERS[name]()
    stop = subject_position(record["prompt"], record["subject"]) + len(record["subject"])
    count = Encoder(tokenizer).tokens_until(record["prompt"], stop)
    spans = tokenizer(record["prompt"], return_offsets_mapping=True)["offset_mapping"]
    first, last = spans[count - 1]
    assert first < stop <= last
    assert count == len(spans) or spans[count][0] >= stop


def test_a_subject_whose_beginning_is_tokenised_otherwise_than_the_whole() -> None:
    """Counting the tokens of the text up to the subject's end gives another token here."""
    tokenizer = byte_level(cut_letters=False)
    prompt = "青石镇的镇长是谁？"
    alone, whole = tokenizer(prompt[:3])["input_ids"], tokenizer(prompt)["input_ids"]
    assert alone != whole[: len(alone)]
    assert Encoder(tokenizer).tokens_until(prompt, 3) == 1
    assert tokenizer.decode(whole[:1]).startswith("青石镇")


def test_rome_reads_the_fact_at_the_subject() -> None:
    base = random_model("llama")
    config = ROMEConfig(layer=0)
    for record, texts in ((INSIDE[0], ["{}", "A word. {}"]), (INSIDE[1], ["{}"])):
        for line, text in zip(request_lines(base, request(record), texts, config), texts, strict=False):
            prompt = text.replace("{}", record["prompt"])
            stop = prompt.rindex(record["subject"]) + len(record["subject"])
            spans = base.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            assert spans[line.lookup][0] < stop <= spans[line.lookup][1]


def test_plan_counts_and_marks_such_prompts(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "subjects.jsonl",
        [*INSIDE, {"prompt": "The Francs are", "subject": "Franc", "target_new": "x"}],
    )
    requests = load_dataset("jsonl", path).requests
    assert (count_repeated_subjects(requests), count_subjects_inside_words(requests)) == (1, 1)
    assert subject_mark(requests)
    assert (
        subject_mark(load_dataset("tinyworld").requests)
        == joiner_mark(load_dataset("tinyworld").requests)
        == ""
    )
    notes = plan_of(path, 3, methods=["ft"]).notes
    assert any(note.startswith("1 prompt holds the subject more than once") for note in notes)
    assert any(note.startswith("1 prompt holds the subject only as a part") for note in notes)


def raw_of(path: Path, edits: int, **more: Any) -> dict[str, Any]:
    return {
        "name": "located",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "jsonl", "path": str(path), "edits": edits, **more.pop("dataset", {})},
        "grid": {"T": [1]},
        **more,
    }


def plan_of(path: Path, edits: int, **more: Any) -> Any:
    return make_plan(parse_spec(yaml.safe_dump(raw_of(path, edits, **more)), "l.yaml", Path("/")))


def test_only_cells_whose_numbers_change_get_other_ids(tmp_path: Path) -> None:
    english = jsonl(tmp_path / "a.jsonl", [INSIDE[1]])
    chinese = jsonl(tmp_path / "b.jsonl", CHINESE)

    def ids(path: Path, **more: Any) -> dict[str, str]:
        plan = plan_of(path, 1, methods=["ft", "rome"], **more)
        return {plan.variants[c.variant].label: c.cell_id for c in plan.cells}

    base, spaced = ids(english), ids(english, dataset={"joiner": " "})
    assert base == spaced, "the default, said aloud"
    glued = ids(english, dataset={"joiner": ""})
    assert not set(glued.values()) & set(base.values())
    assert not set(ids(chinese, dataset={"joiner": " "}).values()) & set(ids(chinese).values())
    # where the subject's place is another one, the mark is in the ids of methods that look it up
    for methods, changed in (
        (["ft"], False),
        ([{"method": "rome", "hparams": {"fact_token": "subject_last"}}], True),
        ([{"method": "rome", "hparams": {"fact_token": "last"}}], False),
    ):
        inputs = read_inputs(
            parse_spec(yaml.safe_dump(raw_of(english, 1, methods=methods)), "l.yaml", Path("/"))
        )
        planner = Planner(inputs)
        assert planner.common.subject_mark
        unmarked = planner.common.model_copy(update={"subject_mark": ""})
        cells = [
            Grid(planner.spec, common, inputs.methods, planner.shape, 100).cells()
            for common in (planner.common, unmarked)
        ]
        assert (cells[0][0].cell_id != cells[1][0].cell_id) is changed


# --- chats ------------------------------------------------------------------------------------


def thinking(template: str = THINKING, **variables: Any) -> BaseModel:
    base = random_model("llama")
    base.tokenizer.chat_template = template
    return base.with_encoder(Encoder(base.tokenizer, chat_template=True, template=variables))


def test_a_thinking_template_needs_its_switch() -> None:
    with pytest.raises(DataError, match=r"set `template: \{enable_thinking: false\}` for answers without"):
        thinking()
    with pytest.raises(DataError, match=r"set `template: \{enable_thinking: false\}`"):
        thinking(enable_thinking=True)
    encoder = thinking(enable_thinking=False).encoder
    pair = encoder.pair("Who?", "Ostvale")
    said = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ostvale"}], tokenize=False
    )
    text = said[: said.rindex("Ostvale") + len("Ostvale")]
    assert text.endswith("</think>\n\nOstvale")
    assert pair.ids == tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert encoder.tokenizer.decode(pair.target).strip() == "Ostvale"


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ BEFORE if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>AFTER{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        # the turn is asked for without what stands before every answer
        (TURNS.replace("BEFORE", "'Final: '").replace("AFTER", ""), "after '<user>kwqz<assistant>Final: '"),
        # the turn is asked for with what no answer stands after
        (TURNS.replace("BEFORE", "''").replace("AFTER", "<think>"), "with '<user>kwqz<assistant><think>'"),
        # answers are left out
        ("{{ messages[0].content }}", "leaves the answer out"),
    ],
)
def test_a_template_that_puts_answers_elsewhere_is_refused(template: str, why: str) -> None:
    with pytest.raises(DataError, match="chat_template: true") as caught:
        thinking(template)
    assert why in str(caught.value)


def test_a_variable_that_the_template_never_reads() -> None:
    with pytest.raises(DataError, match="template: the model's chat template never reads enable_thinkin;"):
        thinking(enable_thinkin=False)


def test_plan_refuses_a_template_and_its_variables_are_part_of_the_cell(tmp_path: Path) -> None:
    for file in assets_dir().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    path = jsonl(tmp_path / "r.jsonl", INSIDE)
    model = {"name": str(tmp_path), "device": "cpu"}
    methods = [{"method": "ft", "hparams": {"layers": [1]}}]
    with pytest.raises(DataError, match="enable_thinking: false"):
        plan_of(path, 2, model=model, methods=methods, chat_template=True)
    plan = plan_of(
        path, 2, model=model, methods=methods, chat_template=True, template={"enable_thinking": False}
    )
    (shard,) = plan.shards
    assert plan.manifest(shard).job.template == {"enable_thinking": False}
    (tmp_path / "chat_template.jinja").write_text(THINKING.replace("<think>\\n\\n</think>\\n\\n", ""))
    other = plan_of(path, 2, model=model, methods=methods, chat_template=True)
    assert other.common.template == {}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"template": {"enable_thinking": False}}, "template: has no effect without chat_template: true"),
        ({"chat_template": True, "template": {"messages": 1}}, "template.messages: is set by the sweep"),
        (
            {"chat_template": True, "dataset": {"joiner": ""}},
            "dataset.joiner: has no effect with chat_template",
        ),
    ],
)
def test_settings_without_effect_are_refused(more: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=why.replace(".", r"\.")):
        plan_of(jsonl(tmp_path / "r.jsonl", INSIDE), 2, methods=["ft"], **more)
