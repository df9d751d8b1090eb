"""`plan` says what `run` would trip over, all at once."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.main import main
from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.checks import LINES
from orchestrator.planning.inputs import measure_texts, read_inputs
from orchestrator.planning.plan import Plan, Planner, make_plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.select import select
from orchestrator.storage.local import LocalStore
from tests.engine import Watch
from tests.small import GOLDEN, golden_requests, random_model
from tests.test_located import THINKING
from workers.data import load_dataset, order_requests
from workers.data.tinyworld import assets_dir
from workers.model.base import load_encoder
from workers.model.batch import Encoder
from workers.model.config import ModelConfig
from workers.scoring.lengths import count_tokens, request_texts
from workers.scoring.probes import Item, item_probes
from workers.types import DataError, EditSweepError, ModelError, Probe

LLAMA = GOLDEN / "models" / "tiny-llama"


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": f"The harbour of Quellmar {number} lies in",
        "subject": f"Quellmar {number}",
        "target_new": "Ostvale",
        "unrelated": "Rain falls in autumn.",
        **changes,
    }


def spec_in(folder: Path, records: Iterable[Mapping[str, Any]], **changes: Any) -> SweepSpec:
    lines = list(records)
    texts = [json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines]
    (folder / "data.jsonl").write_text("\n".join(texts))
    raw: dict[str, Any] = {
        "name": "checks",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "jsonl", "path": "data.jsonl", "edits": len(lines), "order": "file"},
        "grid": {"T": [1]},
        "methods": ["none"],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = raw
        for key in parents:
            here = here[key]
        here[last] = value
    return parse_spec(yaml.safe_dump(raw), "s.yaml", folder)


def refused(spec: SweepSpec) -> str:
    with pytest.raises(EditSweepError) as caught:
        make_plan(spec)
    return str(caught.value)


def about_requests(plan: Plan) -> list[str]:
    return [warning for warning in plan.warnings if "requests" in warning]


# --- requests without what a method needs ---------------------------------------------------


def half(count: int = 40) -> list[dict[str, Any]]:
    """Requests of which every second one, from the first on, has no unrelated sentence."""
    return [record(i, unrelated=None if i % 2 == 0 else "Rain falls in autumn.") for i in range(count)]


def test_some_requests_without_what_a_method_needs_are_a_warning(tmp_path: Path) -> None:
    [warning] = about_requests(make_plan(spec_in(tmp_path, half(), methods=["wise", "ft"])))
    assert warning.startswith("wise: 20 of 40 requests (first request 1, case '1'): no unrelated sentence")
    assert warning.endswith("groups that will fail: T=1: 20 of 40")


def test_the_groups_that_fail_are_counted_as_they_are_cut(tmp_path: Path) -> None:
    records = [record(i, unrelated=None if i in (13, 14, 31) else "Rain falls.") for i in range(40)]
    spec = spec_in(tmp_path, records, methods=["wise"], grid={"T": [1, 4, 10], "seeds": [0, 1]})
    [warning] = about_requests(make_plan(spec))
    # requests 13 and 14 stand in one group of 4 and of 10; both seeds have the file's order
    assert warning.endswith("T=1: 6 of 80, T=4: 4 of 20, T=10: 4 of 8")
    assert "(first request 14, case '14')" in warning
    never = spec_in(tmp_path, records, methods=["wise"], grid={"T": [1, 10], "rollback": "never"})
    [warning] = about_requests(make_plan(never))
    assert warning.endswith("T=1: 27 of 40, T=10: 3 of 4")  # a lane ends with its first failure


def test_only_the_edited_requests_count(tmp_path: Path) -> None:
    records = [record(i, unrelated=None if i >= 7 else "Rain falls.") for i in range(40)]
    assert about_requests(make_plan(spec_in(tmp_path, records, methods=["wise"], dataset__edits=7))) == []
    [warning] = about_requests(make_plan(spec_in(tmp_path, records, methods=["wise"], dataset__edits=8)))
    assert "1 of 8 requests" in warning


def test_a_cell_without_a_group_to_edit_is_an_error(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, half(), methods=["ft", "wise"], grid={"T": [1, 40]})
    text = refused(spec)
    assert text.startswith("methods: wise: T=40: no group can be edited: 20 of 40 requests (first request 1")
    # the cells that can run do so on their own
    planner = Planner(read_inputs(spec))
    for conditions in (["T=1"], ["method=ft"]):
        planner.check(select(conditions, planner.described(), "--only"))
    everything = spec_in(tmp_path, [record(i, unrelated=None) for i in range(4)], methods=["wise"])
    assert "no group can be edited: 4 of 4" in refused(everything)


def test_run_warns_before_it_begins_and_is_right_about_what_fails(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, half(4), methods=["wise"], engine={"lanes": 2})
    view = Watch()
    outcome = run_sweep(spec, LocalStore(tmp_path / "r"), run_local, view)
    [warning] = [text for text in view.warnings if "requests" in text]
    assert warning.endswith("T=1: 2 of 4") and len(outcome.failed_groups) == 2
    assert {failure["group"] for failure in outcome.failed_groups} == {0, 2}


def test_an_impossible_cell_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, half(4), methods=["wise"], grid={"T": [4]})
    with pytest.raises(EditSweepError, match="no group can be edited"):
        run_sweep(spec, LocalStore(tmp_path / "r"), run_local, Watch())
    assert not (tmp_path / "r").exists() or not any((tmp_path / "r").iterdir())


def test_training_requests_that_lack_what_a_training_needs(tmp_path: Path) -> None:
    def spec_of(lonely: int) -> SweepSpec:
        probes = [{"prompt": "Rain falls in", "target": "autumn"}]
        lines = [
            record(
                i,
                prompt=f"The port of {i} is",
                subject=str(i),
                unrelated=None,
                locality=None if i < lonely else probes,
            )
            for i in range(10)
        ]
        (tmp_path / "train.jsonl").write_text(
            "\n".join(json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines)
        )
        networks = ["mend", {"method": "malmen", "label": "second"}, "serac"]
        spec = spec_in(tmp_path, [record(i) for i in range(4)], methods=networks)
        training = spec.training.model_copy(update={"kind": "jsonl", "path": tmp_path / "train.jsonl"})
        return spec.model_copy(update={"training": training})

    assert not about_requests(make_plan(spec_of(0)))
    [warning] = about_requests(make_plan(spec_of(3)))
    assert warning.startswith(
        "training: mend, second: 3 of 10 requests (first request 1, case '1'): locality"
    )
    assert refused(spec_of(10)).startswith("training: mend, second: 10 of 10 requests")


# --- texts ----------------------------------------------------------------------------------


def long(words: int) -> str:
    return " ".join(["the"] * words)


def context_of(name: str) -> int:
    config = json.loads(((assets_dir() if name == "embedded" else LLAMA) / "config.json").read_text())
    return int(config.get("n_positions") or config["max_position_embeddings"])


PROBE = {"prompt": long(300), "target": "x"}


@pytest.mark.parametrize("model", ["embedded", str(LLAMA)], ids=["learned", "rotary"])
@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt": f"{long(300)} in Quellmar 1 lies in"}),
        ("rephrases[1]", {"rephrases": ["Where?", long(300)]}),
        ("locality[0]", {"locality": [PROBE]}),
        ("portability[1]", {"portability": [{"prompt": "Who", "target": "x"}, PROBE]}),
        ("portability[0]", {"portability": [{"prompt": "Who", "target": long(300)}]}),
    ],
)
def test_a_text_longer_than_the_context_is_an_error(
    field: str, changes: dict[str, Any], model: str, tmp_path: Path
) -> None:
    spec = spec_in(tmp_path, [record(0), record(1, **changes)], model__name=model)
    text = refused(spec)
    assert text.startswith(f"dataset: request 2 (case '2'): {field}: ")
    assert text.endswith(f"tokens with its answer, but the model reads at most {context_of(model)}")
    make_plan(spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"edits": 1})}))


def test_the_tokens_are_those_of_the_models_own_encoder(tmp_path: Path) -> None:
    """The longest text that fits is accepted, one token more is refused; and the run agrees."""
    encoder = load_encoder(ModelConfig(), chat_template=False)
    context = context_of("embedded")
    words = next(n for n in range(1, 200) if len(encoder.pair(long(n), "Ostvale").ids) == context)

    def spec_of(words: int) -> SweepSpec:
        return spec_in(tmp_path, [record(0, rephrases=[long(words)])], scoring={"generated": False})

    assert f"rephrases[0]: {context + 1} tokens" in refused(spec_of(words + 1))
    outcome = run_sweep(spec_of(words), LocalStore(tmp_path / "r"), run_local, Watch())
    assert not outcome.unfinished
    # generation may go on after the answer
    [warning] = make_plan(spec_in(tmp_path, [record(0, rephrases=[long(words)])])).warnings
    assert warning.startswith(
        "1 of the texts leave no room for the 3 tokens by which generation may be longer"
    )
    assert make_plan(spec_in(tmp_path, [record(0, rephrases=[long(words - 3)])])).warnings == ()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_texts_are_counted_as_scoring_encodes_them(arch: str, chat: bool) -> None:
    base = random_model(arch)
    if chat:
        base.tokenizer.chat_template = THINKING
        base = base.with_encoder(Encoder(base.tokenizer, True, {"enable_thinking": False}))
    chinese = Probe("《雾中灯》的作者是", "林")
    request = replace(
        golden_requests(1)[0], locality=(chinese, Probe("Who", "she")), ood=("The rain falls.",)
    )
    for joiner in (None, "", "\n"):
        asked = replace(request, joiner=joiner)
        counted = [count_tokens(base.encoder, prompt, answer) for _, prompt, answer in request_texts(asked)]
        assert counted == [len(probe.encoded.ids) for probe in item_probes(base, [Item(0, asked)])]
        assert len(counted) >= 5


def test_a_chat_with_variables_of_its_template_is_measured(tmp_path: Path) -> None:
    """The chat itself takes tokens, and more in a template that opens an empty block."""
    shutil.copytree(assets_dir(), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(THINKING)
    changes = {"model__name": "./m", "chat_template": True, "template": {"enable_thinking": False}}
    make_plan(spec_in(tmp_path, [record(0, rephrases=[long(20)])], **changes))
    words = context_of("embedded") - 10
    make_plan(spec_in(tmp_path, [record(0, rephrases=[long(words)])]))
    assert "rephrases[0]: " in refused(spec_in(tmp_path, [record(0, rephrases=[long(words)])], **changes))


def test_an_unrelated_sentence_counts_where_a_method_reads_it(tmp_path: Path) -> None:
    records = [record(0, unrelated=long(300))]
    make_plan(spec_in(tmp_path, records, methods=["ft"]))
    assert "unrelated: " in refused(spec_in(tmp_path, records, methods=["ft", "wise"]))


def test_only_texts_that_some_seed_edits_count(tmp_path: Path) -> None:
    records = [record(i, rephrases=[long(300)] if i == 5 else ["Where?"]) for i in range(12)]

    def spec_of(seed: int) -> SweepSpec:
        dataset = {"kind": "jsonl", "path": "data.jsonl", "edits": 4, "order": "shuffle"}
        return spec_in(tmp_path, records, dataset=dataset, grid={"T": [1], "seeds": [seed]})

    seen = set()
    for seed in range(12):
        spec = spec_of(seed)
        data = load_dataset("jsonl", tmp_path / "data.jsonl")
        edited = 5 in order_requests(data, "shuffle", seed)[:4]
        seen.add(edited)
        if edited:
            assert refused(spec).startswith("dataset: request 6 (case '6'): rephrases[0]")
        else:
            make_plan(spec)
    assert seen == {True, False}


@pytest.mark.parametrize("order", ["file", "shuffle"])
def test_a_thousand_requests_are_measured_within_a_second(order: str, tmp_path: Path) -> None:
    dataset = {"kind": "tinyworld", "edits": 1000, "order": order}
    spec = spec_in(tmp_path, [record(0)], dataset=dataset, grid={"T": [1], "seeds": [0, 1, 2]})
    data = load_dataset("tinyworld")
    encoder = load_encoder(ModelConfig(), chat_template=False)
    began = time.process_time()
    measure_texts(spec, data, 64, encoder, unrelated=True, templates=10)
    assert time.process_time() - began < 1


# --- everything at once ---------------------------------------------------------------------


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    methods = [
        "ft",
        "rome",
        {"method": "memit", "hparams": {"layers": [99], "corpus": "/nowhere/c.txt"}},
        {"method": "emmet", "hparams": {"layers": [1], "corpus": "/nowhere/c.txt"}},
        {"method": "wise", "hparams": {"layer": 1}},
        {"method": "serac", "hparams": {"classifier": "/nowhere/cls", "counterfactual": "./nowhere/cf"}},
    ]
    records = [record(0, unrelated=None, rephrases=[long(300)]), record(1, unrelated=None)]
    text = refused(spec_in(tmp_path, records, model__name=str(LLAMA), methods=methods))
    first, *lines = text.splitlines()
    assert first == f"{len(lines)} problems:"
    for words in (
        "methods: ft: method ft: layers: ",
        "methods: rome: method rome: layer: this field is required",
        "methods: rome: method rome: corpus: ROME needs a text or JSONL file",
        "methods: memit: layers: layer 99 is out of range",
        "methods: memit: corpus: '/nowhere/c.txt' does not exist",
        "methods: emmet: corpus: '/nowhere/c.txt' does not exist",
        "methods: serac: classifier: '/nowhere/cls' does not exist",
        "nowhere/cf' does not exist; looked at: ",
        "dataset: request 1 (case '1'): rephrases[0]: ",
        "methods: wise: T=1: no group can be edited: 2 of 2 requests",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert all(line.startswith("  ") and not line.startswith("   ") for line in lines)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    text = refused(spec_in(tmp_path, [record(i, rephrases=[long(300)]) for i in range(27)]))
    lines = text.splitlines()
    assert lines[0] == "27 problems:" and len(lines) == 1 + LINES + 1 and lines[-1].strip() == "and 7 more"


def test_one_problem_keeps_its_kind_and_its_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^dataset: request 1"):
        make_plan(spec_in(tmp_path, [record(0, rephrases=[long(300)])]))
    with pytest.raises(ModelError, match=r"^model\.name: '/nowhere/m' does not exist"):
        make_plan(spec_in(tmp_path, [record(0)], model__name="/nowhere/m"))


def test_methods_are_checked_beside_a_model_or_data_that_cannot_be_read(tmp_path: Path) -> None:
    methods = [{"method": "ft", "hparams": {"layers": [-1]}}, {"method": "grace", "hparams": {"speed": 3}}]
    for changes in ({"model__name": "/nowhere/m"}, {"dataset__path": "nowhere.jsonl"}):
        text = refused(spec_in(tmp_path, [record(0)], methods=methods, **changes))
        assert "nowhere" in text and "methods: ft: " in text and "'speed'" in text


def test_what_follows_from_a_problem_is_no_problem_of_its_own(tmp_path: Path) -> None:
    training = {"kind": "jsonl", "path": "nowhere.jsonl"}
    spec = spec_in(tmp_path, [record(0)], methods=["mend", "malmen", "serac"], training=training)
    assert refused(spec) == f"training.path: {tmp_path}/nowhere.jsonl: no such file"


def test_bad_records_stand_in_the_list_line_by_line(tmp_path: Path) -> None:
    spec = spec_in(
        tmp_path, [record(0), record(1, target_new=3), record(2, prompt="")], methods=["serac", "ft"]
    )
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"name": "x/y"})})
    lines = refused(spec).splitlines()
    assert [line.split("data.jsonl, ")[-1].split(":")[0] for line in lines[1:3]] == ["line 2", "line 3"]
    assert "2 of 3 lines cannot be used" in lines[3] and lines[4].strip().startswith("methods: ft: ")


def test_a_folder_of_serac_without_a_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(GOLDEN / "pretrained" / "serac_llama_tiny-distilbert", tmp_path / "classifier")

    def spec_of(folder: str) -> SweepSpec:
        hparams = {"classifier": str(tmp_path / folder)}
        return spec_in(tmp_path, [record(0)], methods=[{"method": "serac", "hparams": hparams}])

    assert refused(spec_of("empty")).endswith("/empty' is a folder without config.json")
    make_plan(spec_of("classifier"))


# --- what statistics are made from ----------------------------------------------------------


ROME = {"method": "rome", "hparams": {"layer": 1, "samples": 100}}
EWC = {"method": "ft-ewc", "hparams": {"layers": [1], "fisher_samples": 100}}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.txt", b"one line\n" * 3, "for 512 x 512 statistics, so they are singular"),
        ("c.txt", b"word " * 9000 + b"\n", "for 512 x 512 statistics"),  # cut at the model's context
        ("c.txt", b"one line\n" * 400 + b"\xff\n", None),  # not among the samples
        ("c.txt", b"one line\n" * 40 + b"\xff\n", "c.txt, line 41: cannot be read as UTF-8 text"),
        ("c.jsonl", b'{"text": "one line"}\n' * 40 + b'{"txt": 1}\n', "c.jsonl, line 41: field `text`"),
    ],
)
def test_a_corpus_that_gives_no_statistics(name: str, text: bytes, said: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    method = {**ROME, "hparams": {"layer": 1, "samples": 400, "corpus": name}}
    spec = spec_in(tmp_path, [record(0)], methods=[method])
    if said is None:
        make_plan(spec)
    else:
        assert said in refused(spec)


def test_a_corpus_without_a_text_to_predict(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n \n")
    method = {"method": "ft-ewc", "hparams": {"corpus": "c.txt"}}
    assert refused(spec_in(tmp_path, [record(0)], methods=[method])) == (
        f"corpus: {tmp_path}/c.txt: holds no text of two tokens or more"
    )
    (tmp_path / "c.txt").write_text("\nRain falls in autumn.\n")
    make_plan(spec_in(tmp_path, [record(0)], methods=[method]))


# --- facts, templates and continuations that do not fit -------------------------------------


def test_groups_whose_facts_do_not_fit_are_counted(tmp_path: Path) -> None:
    """Of the model's 128 tokens a fact takes about 27; one of the prompts is long."""
    records = [record(i, rephrases=[long(100)] if i == 2 else ["Where?"]) for i in range(6)]
    spec = spec_in(tmp_path, records, methods=["icl"], grid={"T": [1, 3]})
    [warning] = about_requests(make_plan(spec))
    assert warning.startswith(
        "icl: 1 of 6 requests (first request 3, case '3'): the facts of its group and one"
    )
    assert warning.endswith("groups that will fail: T=1: 1 of 6, T=3: 1 of 2")
    outcome = run_sweep(spec, LocalStore(tmp_path / "r"), run_local, Watch())
    failed = {(failure["cell_id"], failure["group"]) for failure in outcome.failed_groups}
    assert sorted(group for _, group in failed) == [0, 2]

    never = spec_in(tmp_path, records, methods=["icl"], grid={"T": [1], "rollback": "never"})
    [warning] = about_requests(make_plan(never))
    assert warning.endswith("T=1: 4 of 6")  # with the third prompt or the fourth fact
    # no error, so that a grid that has smaller groups as well is one sweep
    [warning] = about_requests(make_plan(spec_in(tmp_path, records, methods=["icl"], grid={"T": [6]})))
    assert warning.endswith("T=6: 1 of 1")


def test_an_edit_that_seracs_second_model_cannot_read(tmp_path: Path) -> None:
    records = [record(i, rephrases=[long(110)] if i == 1 else ["Where?"]) for i in range(3)]
    [warning] = about_requests(make_plan(spec_in(tmp_path, records, methods=["serac"])))
    assert warning.startswith("serac: 1 of 3 requests (first request 2, case '2'): its edit and one of its")
    assert "longer than the 128 tokens that the counterfactual model reads" in warning


def test_a_prompt_has_to_leave_room_for_context_templates(tmp_path: Path) -> None:
    prompt = f"{long(106)} in Quellmar 0 lies in"
    rome = {"method": "rome", "hparams": {"context_template_length_params": [[10, 5]]}}
    make_plan(spec_in(tmp_path, [record(0, prompt=prompt)], methods=["ft"]))
    text = refused(spec_in(tmp_path, [record(0, prompt=prompt)], methods=[rome]))
    assert text.startswith("dataset: request 1 (case '1'): prompt: ")
    assert text.endswith("with its answer and a context template of 10, but the model reads at most 128")
    make_plan(spec_in(tmp_path, [record(0, rephrases=[prompt])], methods=[rome]))  # no template before it
    for method in ("rome", "wise"):
        params = {"method": method, "hparams": {"context_template_length_params": [[128, 5]]}}
        assert "context_template_length_params: templates of 128 tokens, but the model reads at most 128" in (
            refused(spec_in(tmp_path, [record(0)], methods=[params]))
        )


def test_a_continuation_has_to_fit(tmp_path: Path) -> None:
    records = [record(0), record(1, prompt=f"{long(20)} Quellmar 1 lies in")]
    text = refused(spec_in(tmp_path, records, scoring={"fluency_tokens": 120}))
    assert text.startswith(
        "scoring.fluency_tokens: 120: the model reads at most 128 tokens, and request 2 (case"
    )
    most = int(text.split()[-1])
    make_plan(spec_in(tmp_path, records, scoring={"fluency_tokens": most}))
    assert "valid value is" in refused(spec_in(tmp_path, records, scoring={"fluency_tokens": most + 1}))


def test_a_training_text_longer_than_the_context(tmp_path: Path) -> None:
    lines = [record(i, prompt=f"Of {i} it is said", subject=str(i)) for i in range(50, 54)]
    lines[2]["locality"] = [{"prompt": long(300), "target": "x"}]
    lines[3]["portability"] = [{"prompt": long(300), "target": "x"}]  # which no training reads
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    training = {"kind": "jsonl", "path": "train.jsonl"}
    spec = spec_in(tmp_path, [record(0)], methods=["mend"], training=training)
    assert refused(spec).startswith("training: request 3 (case '3'): locality[0]: ")
    assert len(refused(spec).splitlines()) == 1


# --- chats ----------------------------------------------------------------------------------

CUT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content.split('|')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_methods_that_read_plain_texts_are_named_together(tmp_path: Path) -> None:
    shutil.copytree(assets_dir(), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(CUT)
    methods = [{"method": "ft", "hparams": {"layers": [1]}}, "icl", "serac"]
    training = {"kind": "tinyworld"}
    changes = {"model__name": "./m", "chat_template": True, "methods": methods, "training": training}
    lines = refused(spec_in(tmp_path, [record(0)], **changes)).splitlines()
    assert lines[1:] == [
        "  methods: icl: chat_template: true is not supported by icl: facts would stand before the first turn",
        "  methods: serac: chat_template: true is not supported by serac: its networks read plain texts",
    ]


def test_a_template_that_changes_a_prompt(tmp_path: Path) -> None:
    shutil.copytree(assets_dir(), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(CUT)
    (tmp_path / "c.txt").write_text("Rain falls in autumn.\n" * 200)
    rome = {"method": "rome", "hparams": {"layer": 1, "corpus": "c.txt"}}
    records = [record(0), record(1, prompt="Short | The harbour of Quellmar 1 lies in")]
    changes = {"model__name": "./m", "chat_template": True}
    [warning] = about_requests(make_plan(spec_in(tmp_path, records, methods=[rome], **changes)))
    assert warning.startswith("rome: 1 of 2 requests (first request 2, case '2'): the chat template changes")
    ft = {"method": "ft", "hparams": {"layers": [1]}}
    assert not about_requests(make_plan(spec_in(tmp_path, records, methods=[ft], **changes)))


# --- tokenizers and further models ----------------------------------------------------------

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


@pytest.mark.parametrize(
    ("file", "data", "kind", "missing"),
    [
        ("tokenizer.model", SENTENCEPIECE, "LlamaTokenizer", "sentencepiece and protobuf (tokenizer.model)"),
        ("spiece.model", SENTENCEPIECE, "T5Tokenizer", "sentencepiece and protobuf (spiece.model)"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "PreTrainedTokenizerFast", "tiktoken (tokenizer.model)"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", "PreTrainedTokenizerFast", "tiktoken (qwen.tiktoken)"),
    ],
)
def test_the_package_that_a_tokenizer_needs_is_named(
    file: str, data: bytes, kind: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(LLAMA, tmp_path / "m", ignore=shutil.ignore_patterns("*token*"))
    (tmp_path / "m" / file).write_bytes(data)
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for package in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)
    text = refused(spec_in(tmp_path, [record(0)], model__name="./m"))
    assert f"model.name: '{tmp_path}/m': the tokenizer needs {missing}, which " in text, text
    assert "[tokenizers]" in text and len(text.splitlines()) == 1


def test_a_tokenizer_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    assert f"model.name: '{tmp_path}/m'" in refused(spec_in(tmp_path, [record(0)], model__name="./m"))


@pytest.mark.parametrize(
    ("field", "changes", "said"),
    [
        ("classifier", {"model_type": "no_such_type"}, "classifier: "),
        ("classifier", {"model_type": "t5"}, "classifier: it is of type 't5', expected an encoder"),
        (
            "counterfactual",
            {"model_type": "distilbert"},
            "counterfactual: it is of type 'distilbert', expected a language model",
        ),
        ("counterfactual", {}, "has another vocabulary than the base model"),
    ],
)
def test_a_network_of_serac_that_cannot_be_used(
    field: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = (
        assets_dir() if field == "counterfactual" else GOLDEN / "pretrained" / "serac_llama_tiny-distilbert"
    )
    shutil.copytree(source, tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps({**config, **changes}))
    serac = {"method": "serac", "hparams": {field: "./net"}}
    spec = spec_in(
        tmp_path, [record(0)], model__name=str(LLAMA), methods=[serac], training={"kind": "tinyworld"}
    )
    text = refused(spec)
    assert text.startswith("methods: serac: ") and said in text


# --- everything that is found late today ----------------------------------------------------


def test_sizes_batches_and_overlap_stand_in_the_same_list(tmp_path: Path) -> None:
    records = [record(i) for i in range(40)]
    (tmp_path / "train.jsonl").write_text(json.dumps({**record(3), "locality": [PROBE]}))
    spec = spec_in(
        tmp_path,
        records,
        methods=["icl", "mend", "grace", "rome"],
        grid={"T": [20], "batch_size": 10},
        training={"kind": "jsonl", "path": "train.jsonl"},
    )
    text = refused(spec)
    for words in (
        "methods: icl: grid.T: 20: 20 facts before every prompt do not fit",
        "grid.batch_size: 10, but grace, rome can edit only one request at a time",
        "training: 1 of its 1 requests are edited by the sweep",
        "training: request 1 (case '1'): locality[0]: ",
    ):
        assert words in text, text


def test_the_command_exits_with_2_and_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(i, rephrases=[long(300)] if i < 2 else []) for i in range(3)]
    spec_in(tmp_path, records)
    (tmp_path / "s.yaml").write_text(
        "name: s\nmodel: {name: embedded, device: cpu}\ngrid: {T: [1]}\nmethods: [none]\n"
        "dataset: {kind: jsonl, path: data.jsonl, edits: 3}\n"
    )
    monkeypatch.chdir(tmp_path)
    for command in (["plan"], ["run", "--engine", "local"]):
        monkeypatch.setattr("sys.argv", ["editsweep", command[0], "s.yaml", *command[1:]])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "s.yaml: 2 problems:" in said and said.count("rephrases[0]") == 2
