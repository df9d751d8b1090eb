"""Data sets: what the loaders make of good files, and that they say clearly what is wrong with bad
ones."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.waiting import finished
from workers.data import (
    DATASETS,
    count_conflicts,
    count_cut_cases,
    count_duplicates,
    count_edited_locality,
    fingerprint,
    load_dataset,
    order_requests,
)
from workers.types import DataError, Dataset, EditRequest, Probe

FIXTURES = Path(__file__).parent / "data"
SAMPLES = {
    "zsre": FIXTURES / "zsre_mend_eval_sample.json",
    "counterfact": FIXTURES / "counterfact_sample.json",
    "hallucination": FIXTURES / "hallucination_sample.json",
    "temporal": FIXTURES / "temporal_sample.json",
    "wikibigedit": FIXTURES / "wikibigedit_sample.json",
    "knowedit": FIXTURES / "knowedit_sample.json",
    "mquake": FIXTURES / "mquake_sample.json",
    "ultraeditbench": FIXTURES / "ultraeditbench_sample.json",
    "jsonl": FIXTURES / "requests_sample.jsonl",
}
WIKIBIO = FIXTURES / "knowedit_wikibio_sample.json"
FILE_KINDS = tuple(SAMPLES)

ZSRE = json.loads(SAMPLES["zsre"].read_text(encoding="utf-8"))
COUNTERFACT = json.loads(SAMPLES["counterfact"].read_text(encoding="utf-8"))
JSONL = [
    json.loads(line) for line in SAMPLES["jsonl"].read_text(encoding="utf-8").splitlines() if line.strip()
]
RAW: dict[str, list[dict[str, Any]]] = {
    kind: JSONL if kind == "jsonl" else json.loads(path.read_text(encoding="utf-8"))
    for kind, path in SAMPLES.items()
}


def write(path: Path, kind: str, records: Any) -> Path:
    if kind == "jsonl" and isinstance(records, list):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return path


def request(prompt: str, subject: str, target: str, locality: tuple[Probe, ...] = ()) -> EditRequest:
    return EditRequest(
        case_id=f"{prompt}/{target}", prompt=prompt, subject=subject, target_new=target, locality=locality
    )


# --- good files -----------------------------------------------------------------------------


def test_zsre_fields() -> None:
    dataset = load_dataset("zsre", SAMPLES["zsre"])
    assert dataset.name == "zsre"
    assert len(dataset.requests) == len(ZSRE) == 20
    first = dataset.requests[0]
    assert replace(first, unrelated=None) == EditRequest(
        case_id="0",
        prompt="What university did Watts Humphrey attend?",
        subject="Watts Humphrey",
        target_new="University of Michigan",
        ground_truth="Illinois Institute of Technology",
        rephrases=("What university did Watts Humphrey take part in?",),
        locality=(Probe("nq question: who played desmond doss father in hacksaw ridge", "Hugo Weaving"),),
    )
    assert dataset.requests[12].target_new == "Clairmont-Mayer", (
        "texts are stripped: the file has a leading space"
    )
    assert dataset.notes["skipped"] == 0


def test_counterfact_fields() -> None:
    dataset = load_dataset("counterfact", SAMPLES["counterfact"])
    assert [r.case_id for r in dataset.requests] == ["0", "1", "2", "3", "4"]
    first = dataset.requests[0]
    assert first.prompt == "The mother tongue of Odile Marchetti is"
    assert (first.subject, first.target_new, first.ground_truth) == ("Odile Marchetti", "Quenish", "Valdish")
    assert first.rephrases[0].endswith("spoke the language"), "trailing spaces are stripped"
    assert [probe.target for probe in first.locality] == ["Valdish"] * 3
    assert first.locality[1].prompt == "Tilda Oramund is a native speaker of"


def test_jsonl_fields() -> None:
    dataset = load_dataset("jsonl", SAMPLES["jsonl"])
    assert dataset.name == "requests_sample"
    assert [r.case_id for r in dataset.requests] == ["capital-1", "2", "4"], (
        "the third record stands on line 4"
    )
    first, second, _ = dataset.requests
    assert first.portability == (Probe("The mayor of the capital of Freedonia is", "Rufus Vane"),)
    assert first.unrelated == "Bread rises because yeast makes gas."
    assert second == EditRequest("2", "Who founded the Ærø Society?", "Ærø Society", "Søren Quist")
    assert dataset.notes["without_unrelated"] == 2


def test_hallucination_fields(tmp_path: Path) -> None:
    dataset = load_dataset("hallucination", SAMPLES["hallucination"])
    first, second, *_ = dataset.requests
    assert first.passage
    assert first.target_new.endswith("until late in life.")
    assert first.rephrases == first.portability == first.ood == ()
    assert first.locality == (
        Probe("The harbour of Strakos lies where two rivers", "meet below the old mill of Strakos"),
    )
    assert second.subject == "tobin marr"
    assert all(
        r.unrelated and r.unrelated != f"{r.locality[0].prompt} {r.locality[0].target}"
        for r in dataset.requests
    )
    train = write(
        tmp_path / "train.json", "", [{"locality_prompt": "Snow is", "locality_ground_truth": "cold"}]
    )
    assert {r.unrelated for r in load_dataset("hallucination", SAMPLES["hallucination"], train).requests} == {
        "Snow is cold"
    }


def test_temporal_fields() -> None:
    first = load_dataset("temporal", SAMPLES["temporal"]).requests[0]
    assert first.passage
    assert first.ood == (RAW["temporal"][0]["ood_rephrase"],)
    assert (first.prompt, first.subject, first.rephrases) == ("The Lantern Hall is", "The Lantern Hall", ())


def test_wikibigedit_fields() -> None:
    dataset = load_dataset("wikibigedit", SAMPLES["wikibigedit"])
    first, second, third = dataset.requests
    assert first.rephrases == ("Dunmere is governed by which mayor?", "Arr, who be the mayor o' Dunmere?")
    assert first.portability == (Probe("Where was the mayor of Dunmere born?", "Strakos"),)
    assert first.locality == (Probe("Who is the mayor of Quorn?", "Bram Eastley"),)
    assert second.portability == third.rephrases == third.locality == third.portability == ()
    assert dataset.notes["probes_without_answer"] == 2


def test_knowedit_fields() -> None:
    dataset = load_dataset("knowedit", SAMPLES["knowedit"])
    first, second = dataset.requests
    assert [p.target for p in first.portability] == ["Mina Vane", "Rufus Vane"]
    assert [p.target for p in first.locality] == ["Fredville", "Ivo Strak"]
    assert (first.ground_truth, first.passage, second.ground_truth) == ("Ada Vane", False, None)
    assert dataset.notes["probes_without_answer"] == 1
    biographies = load_dataset("knowedit", WIKIBIO).requests
    assert [r.subject for r in biographies] == ["orla fenwick", "Tobin Marr"]
    assert all(r.passage and r.subject in r.prompt for r in biographies)
    assert biographies[0].target_new.startswith("She built")


def test_ultraeditbench_fields() -> None:
    dataset = load_dataset("ultraeditbench", SAMPLES["ultraeditbench"])
    first, _, third = dataset.requests
    assert replace(first, unrelated=None) == EditRequest(
        case_id="1",
        prompt="What is the capital of Freedonia?",
        subject="Freedonia",
        target_new="Glorious City",
        rephrases=("Freedonia has what capital?",),
        locality=(Probe("Which river runs through Strakos?", "Wend"),),
    )
    assert third.rephrases == third.locality == ()
    assert dataset.notes["probes_without_answer"] == 1
    assert third.unrelated


def test_knowedit_as_wikidata_files_have_it(tmp_path: Path) -> None:
    """`rephrase` for `rephrase_prompt`, and null or empty lists where there are no probes."""
    first = {
        "subject": "Quellmar",
        "prompt": "The capital of Quellmar is",
        "target_new": "Ostvale",
        "ground_truth": ["Tarn"],
        "rephrase": "Quellmar's capital is",
        "locality": {
            "Relation_Specificity": [{"prompt": "The river of Tarn is", "ground_truth": [["Lis", "the Lis"]]}]
        },
        "portability": None,
    }
    second = {
        "subject": "Tarn",
        "prompt": "The river of Tarn is",
        "target_new": "Mar",
        "ground_truth": [],
        "rephrase_prompt": None,
        "rephrase": ["Through Tarn runs", "Tarn lies on"],
        "locality": {"Relation_Specificity": None, "Forgetfulness": []},
        "portability": [],
    }
    one, two = load_dataset("knowedit", write(tmp_path / "wiki.json", "knowedit", [first, second])).requests
    assert one.rephrases == ("Quellmar's capital is",)
    assert one.locality == (Probe("The river of Tarn is", "Lis"),)
    assert (one.portability, one.ground_truth, two.ground_truth) == ((), "Tarn", None)
    assert two.rephrases == ("Through Tarn runs", "Tarn lies on")
    assert two.locality == two.portability == ()
    alone = write(tmp_path / "empty.json", "knowedit", [second])
    assert load_dataset("knowedit", alone).requests[0].prompt == "The river of Tarn is"
    odd = write(tmp_path / "odd.json", "knowedit", [first, second | {"portability": ["p"]}])
    with pytest.raises(DataError, match="record 2: field `portability`: expected an object"):
        load_dataset("knowedit", odd)


def test_groups_keep_their_names() -> None:
    first, _ = load_dataset("knowedit", SAMPLES["knowedit"]).requests
    groups = RAW["knowedit"][0]
    for kind, probes in (("portability", first.portability), ("locality", first.locality)):
        asked = {
            str(p["prompt"] if isinstance(p["prompt"], str) else p["prompt"][0]): name
            for name, group in groups[kind].items()
            for p in group
        }
        assert probes
        assert [p.group for p in probes] == [asked[p.prompt] for p in probes]


# --- records that name their target twice ---------------------------------------------------


@pytest.mark.parametrize("kind", ["zsre", "wikibigedit", "ultraeditbench"])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_record_with_two_targets_asks_which(kind: str, policy: Any, tmp_path: Path) -> None:
    records = copy.deepcopy(RAW[kind])
    records[1] |= {"ans": "An Answer", "alt": "Another"}
    path = write(tmp_path / "two.json", kind, records)
    with pytest.raises(DataError) as caught:
        load_dataset(kind, path, on_bad_record=policy)
    for words in ("two.json, record 2", "`ans and alt`", "`dataset.target_field: ans`", "'Another'"):
        assert words in str(caught.value)
    both = write(tmp_path / "both.json", kind, [r | {"ans": "An Answer", "alt": "Another"} for r in records])
    with pytest.raises(DataError, match=r"dataset\.target_field: alt") as caught:
        load_dataset(kind, both)
    assert "no kind" not in str(caught.value)
    for field, target in (("ans", "An Answer"), ("alt", "Another")):
        found = load_dataset(kind, both, target_field=field)  # type: ignore[arg-type]
        assert {r.target_new for r in found.requests} == {target}
    with pytest.raises(
        DataError, match=r"record 1: field `(ans|alt)`: is missing, and dataset\.target_field"
    ):
        load_dataset(kind, path, target_field="alt" if kind != "zsre" else "ans")


def test_kinds_with_one_target_take_no_choice() -> None:
    with pytest.raises(
        DataError, match=r"counterfact' does not take `target_field` .got 'ans'.*zsre, wikibig"
    ):
        load_dataset("counterfact", SAMPLES["counterfact"], target_field="ans")


# --- files that no kind reads ---------------------------------------------------------------


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"question": "Who?", "answer": "Ada"}] * 3),
        json.dumps([{"prompt": "Say hello", "subject": "hello", "target_new": 3, "rephrases": []}]),
        json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n",
    ],
    ids=["questions", "broken jsonl", "lines"],
)
def test_a_file_that_no_kind_reads_says_so(kind: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "unknown.json"
    path.write_text(text)
    with pytest.raises(DataError, match="no kind of data set reads this file") as caught:
        load_dataset(kind, path)
    assert "set `dataset.kind" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_lines_given_to_a_kind_of_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "lines.jsonl", "jsonl", JSONL)
    with pytest.raises(DataError, match=r"set `dataset\.kind: jsonl`"):
        load_dataset("zsre", path)


def test_mquake_fields() -> None:
    dataset = load_dataset("mquake", SAMPLES["mquake"])
    assert [r.case_id for r in dataset.requests] == ["1/1", "2/1", "2/2"]
    one, two, three = dataset.requests
    assert (one.prompt, one.target_new, one.ground_truth) == (
        "Tobin Marr is a citizen of",
        "Sylvania",
        "Freedonia",
    )
    assert one.rephrases == ("What is the country of citizenship of Tobin Marr?",)
    assert [p.target for p in one.portability] == ["Strakos"] * 3
    assert one.portability[0].aliases == ("Strakos-on-Wend",)
    assert (one.any_of, one.needs) == (True, 0)
    assert (two.any_of, two.needs, two.portability) == (False, 0, ())
    assert (three.any_of, three.needs, len(three.portability)) == (True, 1, 3)
    assert {r.unrelated for r in dataset.requests} == {"Where does the Wend rise? in Quorn"}
    assert dataset.notes["cases"] == 2


def test_the_requests_of_a_case_stay_together(tmp_path: Path) -> None:
    many = [copy.deepcopy(RAW["mquake"][i % 2]) | {"case_id": i} for i in range(40)]
    dataset = load_dataset("mquake", write(tmp_path / "many.json", "mquake", many))
    order = order_requests(dataset, "shuffle", 3)
    assert sorted(order) == list(range(60))
    assert order != tuple(range(60))
    place = {index: position for position, index in enumerate(order)}
    for index, r in enumerate(dataset.requests):
        assert not r.needs or place[index - 1] == place[index] - 1
    chosen = [dataset.requests[i] for i in order]
    assert count_cut_cases(chosen, 60) == 0
    assert count_cut_cases(chosen, 1) == 20
    assert 0 < count_cut_cases(chosen, 2) < 20


@pytest.mark.parametrize("path", [*SAMPLES.values(), WIKIBIO], ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_file_given_to_another_loader(kind: str, path: Path) -> None:
    own = next((name for name, sample in SAMPLES.items() if sample == path), "knowedit")
    if kind == own:
        return
    reads_easyedit = kind in ("zsre", "counterfact") and path == SAMPLES["knowedit"]
    if reads_easyedit:
        assert load_dataset(kind, path).requests
        return
    with pytest.raises(DataError) as caught:
        load_dataset(kind, path)
    assert str(path) in str(caught.value)
    if "jsonl" not in (kind, own):
        assert f"It looks like {own}" in str(caught.value)
        assert f"set `dataset.kind: {own}`" in str(caught.value)


def test_hallucination_and_zsre_in_one_layout(tmp_path: Path) -> None:
    """Both are flat records of EasyEdit's layout: nothing but the targets and the missing
    rephrasing tells them apart."""
    flat = [
        {
            "subject": r["subject"],
            "prompt": r["src"],
            "target_new": r["alt"],
            "rephrase_prompt": r["rephrase"],
            "locality_prompt": r["loc"],
            "locality_ground_truth": r["loc_ans"],
        }
        for r in ZSRE
    ]
    path = write(tmp_path / "flat.json", "zsre", flat)
    assert len(load_dataset("zsre", path).requests) == 20
    with pytest.raises(
        DataError, match=r"It looks like EasyEdit's layout of zsre or counterfact .* not like hallucination"
    ):
        load_dataset("hallucination", path)
    with pytest.raises(
        DataError, match=r"It looks like hallucination .* not like zsre; set `dataset.kind: hallucination`"
    ):
        load_dataset("zsre", SAMPLES["hallucination"])


def test_tinyworld_takes_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tinyworld.*path"):
        load_dataset("tinyworld", tmp_path / "x.json")
    with pytest.raises(DataError, match=r"tinyworld.*train_path"):
        load_dataset("tinyworld", None, tmp_path / "x.json")


def test_easyedit_layout_loads_under_both_kinds(tmp_path: Path) -> None:
    flat = {
        "case_id": 7,
        "prompt": "The capital of Freedonia is",
        "subject": "Freedonia",
        "target_new": "Glorious City",
        "ground_truth": "Fredville",
        "rephrase_prompt": "Freedonia's capital is",
        "locality_prompt": "The capital of Sylvania is",
        "locality_ground_truth": "Strakos",
    }
    grouped = {
        "subject": "Freedonia",
        "prompt": "The anthem of Freedonia is",
        "target_new": "Hail",
        "ground_truth": [["Land"], ["Of"]],
        "locality": {
            "Relation_Specificity": [{"prompt": ["The anthem of Sylvania is"], "ground_truth": [["March"]]}]
        },
        "portability": {
            "Reasoning": [
                {"prompt": "Hail is sung in", "ground_truth": []},
                {"prompt": "p", "ground_truth": "a"},
            ]
        },
    }
    path = write(tmp_path / "easyedit.json", "zsre", [flat, grouped])
    datasets = [load_dataset(kind, path) for kind in ("zsre", "counterfact")]
    assert datasets[0].requests == datasets[1].requests
    first, second = datasets[0].requests
    assert (first.case_id, first.rephrases) == ("7", ("Freedonia's capital is",))
    assert first.locality == (Probe("The capital of Sylvania is", "Strakos"),)
    assert (second.case_id, second.ground_truth, second.rephrases) == ("1", "Land", ())
    assert second.locality == (Probe("The anthem of Sylvania is", "March"),)
    assert second.portability == (Probe("p", "a"),)
    assert datasets[0].notes["probes_without_answer"] == 1, "left out, and counted"


def test_zsre_second_hop_becomes_portability(tmp_path: Path) -> None:
    hop = {"Recalled Relation": "(x, y)", "New Question": "In which state is it?", "New Answer": "Ohio"}
    dataset = load_dataset(
        "zsre", write(tmp_path / "z.json", "zsre", [ZSRE[0] | {"portability": hop}, ZSRE[1]])
    )
    assert dataset.requests[0].portability == (Probe("In which state is it?", "Ohio"),)
    assert dataset.requests[1].portability == ()


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_byte_order_mark_and_windows_line_ends_change_nothing(kind: str, tmp_path: Path) -> None:
    text = SAMPLES[kind].read_text(encoding="utf-8")
    marked = tmp_path / SAMPLES[kind].name
    marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode("utf-8"))
    assert load_dataset(kind, marked).fingerprint == load_dataset(kind, SAMPLES[kind]).fingerprint


def test_jsonl_line_separator_inside_a_text_is_not_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "u2028.jsonl"
    path.write_text('{"prompt": "a\u2028b is", "subject": "a\u2028b", "target_new": "c"}\n', encoding="utf-8")
    assert load_dataset("jsonl", path).requests[0].subject == "a\u2028b"


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_every_loaded_request_keeps_the_promises_of_its_type(kind: str) -> None:
    for r in load_dataset(kind, SAMPLES[kind]).requests:
        assert r.subject in r.prompt
        texts = [r.case_id, r.prompt, r.subject, r.target_new, *r.rephrases]
        texts += [text for probe in r.locality + r.portability for text in (probe.prompt, probe.target)]
        assert all(text and text == text.strip() for text in texts)


# --- subjects -------------------------------------------------------------------------------


def zsre_with(tmp_path: Path, **changes: Any) -> Path:
    return write(tmp_path / "zsre.json", "zsre", [ZSRE[0] | changes, *ZSRE[1:]])


def test_subject_takes_the_spelling_of_the_prompt(tmp_path: Path) -> None:
    dataset = load_dataset("zsre", zsre_with(tmp_path, subject="WATTS humphrey"))
    assert dataset.requests[0].subject == "Watts Humphrey"


@pytest.mark.parametrize("subject", ["WHO", "OLE", "HOL"])
def test_subject_is_not_found_inside_another_word(subject: str, tmp_path: Path) -> None:
    path = zsre_with(tmp_path, subject=subject, src="Is the whole story true?")
    with pytest.raises(
        DataError, match=rf"record 1: field `subject`: '{subject}' does not occur in the prompt"
    ):
        load_dataset("zsre", path)


# --- unrelated sentences --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zsre", "counterfact"])
def test_unrelated_sentences_come_from_other_records(kind: str) -> None:
    requests = load_dataset(kind, SAMPLES[kind]).requests
    edited = {r.prompt for r in requests}
    for r in requests:
        others = {f"{p.prompt} {p.target}": p.prompt for o in requests if o is not r for p in o.locality}
        assert r.unrelated in others
        assert others[r.unrelated] not in edited | {p.prompt for p in r.locality}
    assert len({r.unrelated for r in requests}) > 1


def test_unrelated_sentences_come_from_the_training_file(tmp_path: Path) -> None:
    train = [{"loc": f"nq question: number {i}", "loc_ans": str(i), "extra": None} for i in range(50)]
    train_path = write(tmp_path / "train.json", "zsre", train)
    dataset = load_dataset("zsre", SAMPLES["zsre"], train_path)
    sentences = {f"{row['loc']} {row['loc_ans']}" for row in train}
    assert all(r.unrelated in sentences for r in dataset.requests)
    assert len({r.unrelated for r in dataset.requests}) > 5
    assert dataset.fingerprint != load_dataset("zsre", SAMPLES["zsre"]).fingerprint
    assert dataset == load_dataset("zsre", SAMPLES["zsre"], train_path), "the same in every run"


def test_unrelated_is_missing_rather_than_wrong(tmp_path: Path) -> None:
    same = [record | {"loc": ZSRE[0]["loc"]} for record in ZSRE[:3]]
    for records in (ZSRE[:1], same):
        dataset = load_dataset("zsre", write(tmp_path / "few.json", "zsre", records))
        assert all(r.unrelated is None for r in dataset.requests)
        assert dataset.notes["without_unrelated"] == len(records)


def test_train_path_belongs_to_zsre(tmp_path: Path) -> None:
    for kind in ("counterfact", "jsonl"):
        with pytest.raises(DataError, match="train_path"):
            load_dataset(kind, SAMPLES[kind], SAMPLES["zsre"])
    with pytest.raises(DataError, match=r"train\.json, record 2: field `loc_ans`"):
        load_dataset("zsre", SAMPLES["zsre"], write(tmp_path / "train.json", "zsre", [ZSRE[0], {"loc": "x"}]))


# --- malformed files ------------------------------------------------------------------------


def test_unknown_kind_lists_the_valid_ones() -> None:
    kinds = (
        "counterfact, hallucination, jsonl, knowedit, mquake, temporal, tinyworld, ultraeditbench, "
        "wikibigedit, zsre"
    )
    with pytest.raises(DataError, match=f"unknown data set 'zsRE'; valid kinds: {kinds}"):
        load_dataset("zsRE", SAMPLES["zsre"])
    assert set(DATASETS) == {"tinyworld", *FILE_KINDS}


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_path_is_required(kind: str) -> None:
    with pytest.raises(DataError, match=rf"{kind}.*`path` is missing"):
        load_dataset(kind)


def test_on_bad_record_is_checked() -> None:
    with pytest.raises(DataError, match="choose error or skip"):
        load_dataset("zsre", SAMPLES["zsre"], on_bad_record="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON|no records"),
        (b"\n \n", "not valid JSON|no records"),
        (b"[]", "empty|expected an object"),
        (b'{"data": []}', "expected a JSON list|unknown key|is missing"),
        (b"null", "expected a JSON list|expected an object"),
        (b"[1, 2", "not valid JSON"),
        (b"this is not JSON", "not valid JSON"),
        (b"\xff\xfe[\x00]\x00", "expected UTF-8 text, found byte 0xff at offset 0"),
        (b'[\n"caf\xe9"]', r"expected UTF-8 text, found byte 0xe9 at offset 6 \(line 2\)"),
        (b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b"[" + b"9" * 10_000 + b"]", "not valid JSON"),
        (b"[NaN]", "expected an object"),
        (b"[[]]", "expected an object"),
    ],
)
def test_file_that_holds_no_records(kind: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(kind, path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000 + 4 * len(str(path))


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_file_that_cannot_be_opened(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load_dataset(kind, tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="is a folder"):
        load_dataset(kind, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(kind, Path("nul\0byte"))
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(kind, loop)


def put(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A mutation that sets a (dotted) field; ``...`` as the value removes it."""

    def mutate(record: dict[str, Any]) -> None:
        *parents, last = field.split(".")
        for parent in parents:
            record = record[parent]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return mutate


MALFORMED = [
    ("zsre", put("src", ...), "field `src`: is missing"),
    ("zsre", put("src", 12), "field `src`: expected a text; got 12"),
    ("zsre", put("src", ["a"]), r"field `src`: expected a text; got \['a'\]"),
    ("zsre", put("alt", ""), "field `alt`: expected a text that is not empty; got ''"),
    ("zsre", put("alt", " \n\t"), r"field `alt`: expected a text that is not empty; got ' \\n\\t'"),
    ("zsre", put("alt", None), "field `alt`: expected a text; got None"),
    ("zsre", put("answers", []), r"field `answers`: expected at least one entry; got \[\]"),
    ("zsre", put("answers", "Paris"), "field `answers`: expected a list; got 'Paris'"),
    ("zsre", put("answers", [None]), r"field `answers\.0`: expected a text; got None"),
    ("zsre", put("loc", True), "field `loc`: expected a text; got True"),
    ("zsre", put("loc_ans", {}), "field `loc_ans`: expected a text; got {}"),
    ("zsre", put("rephrase", "\ud800"), "field `rephrase`: expected valid Unicode text"),
    (
        "zsre",
        put("subject", "Nobody At All"),
        "field `subject`: 'Nobody At All' does not occur in the prompt",
    ),
    ("zsre", put("portability", []), "field `portability`: expected an object"),
    ("counterfact", put("requested_rewrite", ...), "field `requested_rewrite`: is missing"),
    ("counterfact", put("requested_rewrite", "x"), "field `requested_rewrite`: expected an object; got 'x'"),
    (
        "counterfact",
        put("requested_rewrite.prompt", "no slot"),
        r"field `requested_rewrite\.prompt`: expected one {}",
    ),
    (
        "counterfact",
        put("requested_rewrite.prompt", "{} and {}"),
        r"field `requested_rewrite\.prompt`: expected one {}",
    ),
    (
        "counterfact",
        put("requested_rewrite.target_new", "x"),
        r"field `requested_rewrite\.target_new`: expected an object",
    ),
    (
        "counterfact",
        put("requested_rewrite.target_new.str", ""),
        r"field `requested_rewrite\.target_new\.str`: expected",
    ),
    (
        "counterfact",
        put("requested_rewrite.target_true.str", 3),
        r"`requested_rewrite\.target_true\.str`: expected a text",
    ),
    (
        "counterfact",
        put("requested_rewrite.subject", ""),
        r"field `requested_rewrite\.subject`: expected a text that is",
    ),
    (
        "counterfact",
        put("paraphrase_prompts", "one"),
        "field `paraphrase_prompts`: expected a list; got 'one'",
    ),
    (
        "counterfact",
        put("neighborhood_prompts", ["ok", ""]),
        r"field `neighborhood_prompts\.1`: expected a text",
    ),
    ("counterfact", put("case_id", 1.5), "field `case_id`: expected a text; got 1.5"),
    ("counterfact", put("case_id", True), "field `case_id`: expected a text; got True"),
    ("counterfact", put("case_id", 0), "field `case_id`: '0' is taken by record 1; expected unique ids"),
    ("hallucination", put("target_new", ...), "field `target_new`: is missing"),
    (
        "hallucination",
        put("locality_ground_truth", ""),
        "field `locality_ground_truth`: expected a text that is not",
    ),
    ("hallucination", put("subject", "Nobody"), "field `subject`: 'Nobody' does not occur in the prompt"),
    ("temporal", put("ood_rephrase", " "), "field `ood_rephrase`: expected a text that is not empty"),
    ("temporal", put("locality_prompt", None), "field `locality_prompt`: expected a text; got None"),
    ("wikibigedit", put("ans", ""), "field `ans`: expected a text that is not empty"),
    ("wikibigedit", put("mhop", 3), "field `mhop`: expected a text; got 3"),
    ("wikibigedit", put("update", ...), "field `update`: is missing"),
    (
        "knowedit",
        put("locality", {"Forgetfulness": "x"}),
        r"field `locality\.Forgetfulness`: expected a list; got 'x'",
    ),
    ("knowedit", put("target_new", []), r"field `target_new`: expected a text; got \[\]"),
    ("mquake", put("requested_rewrite", []), "field `requested_rewrite`: expected at least one entry"),
    ("mquake", put("questions", []), "field `questions`: expected at least one entry"),
    ("mquake", put("new_answer", 7), "field `new_answer`: expected a text; got 7"),
    ("mquake", put("case_id", 1), "field `case_id`: '1' is taken by record 1; expected unique ids"),
    (
        "mquake",
        lambda record: record["requested_rewrite"][1].update(prompt="no slot"),
        r"field `requested_rewrite\.1\.prompt`: expected one {}",
    ),
    (
        "jsonl",
        put("target", "x"),
        "field `target`: unknown key; valid keys: case_id, prompt, subject, target_new",
    ),
    ("jsonl", put("locality", [{"prompt": "p", "answer": "a"}]), r"field `locality\.0\.target`: is missing"),
    (
        "jsonl",
        put("locality", [{"prompt": "p", "target": "a", "x": 1}]),
        r"`locality\.0\.x`: unknown key; .*: prompt, target",
    ),
    (
        "jsonl",
        put("locality", [{"prompt": "p", "target": ""}]),
        r"field `locality\.0\.target`: expected a text that is",
    ),
    ("jsonl", put("portability", ["p"]), r"field `portability\.0`: expected an object; got 'p'"),
    ("jsonl", put("rephrases", [1]), r"field `rephrases\.0`: expected a text; got 1"),
    ("jsonl", put("unrelated", ""), "field `unrelated`: expected a text that is not empty"),
    ("jsonl", put("case_id", "capital-1"), "field `case_id`: 'capital-1' is taken by line 1"),
    ("jsonl", put("subject", "Sylvania"), "field `subject`: 'Sylvania' does not occur in the prompt"),
]


@pytest.mark.parametrize(
    ("kind", "mutate", "message"), MALFORMED, ids=[f"{k}-{m[:40]}" for k, _, m in MALFORMED]
)
def test_malformed_record(
    kind: str, mutate: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    records = copy.deepcopy(RAW[kind])
    mutate(records[1])
    path = write(tmp_path / "bad.json", kind, records)
    unit = "line" if kind == "jsonl" else "record"
    with pytest.raises(DataError, match=rf"bad\.json, {unit} 2: .*{message}") as caught:
        load_dataset(kind, path)
    assert "on_bad_record: skip" in str(caught.value)
    dataset = load_dataset(kind, path, on_bad_record="skip")
    assert (dataset.notes["skipped"], dataset.notes["skipped_records"]) == (1, [2])
    assert len(dataset.requests) == len(records) - 1  # mquake: the record that is left has one rewrite


def test_long_values_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("zsre", zsre_with(tmp_path, subject="x" * 10_000))
    assert len(str(caught.value)) < 1000


def test_only_the_first_offenders_are_described(tmp_path: Path) -> None:
    records = [record | ({"alt": ""} if i % 2 else {}) for i, record in enumerate(ZSRE)]
    with pytest.raises(DataError) as caught:
        load_dataset("zsre", write(tmp_path / "z.json", "zsre", records))
    assert re.findall(r"record (\d+):", str(caught.value)) == ["2", "4", "6"]
    assert "and 7 more" in str(caught.value)
    assert "10 of 20 records cannot be used" in str(caught.value)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_file_of_the_wrong_kind_is_refused_even_when_skipping(policy: Any) -> None:
    with pytest.raises(DataError, match="none of the 20 records can be used: is this the right kind of file"):
        load_dataset("counterfact", SAMPLES["zsre"], on_bad_record=policy)


def test_jsonl_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    good = '{"prompt": "a is", "subject": "a", "target_new": "b"}'
    path.write_text(f'{good}\n\n{{"prompt": "a is",\n{good[:-1]}, "prompt": "c"}}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"line 3: not valid JSON(.|\n)*line 4: not valid JSON: key 'prompt' occurs twice"
    ):
        load_dataset("jsonl", path)
    assert load_dataset("jsonl", path, on_bad_record="skip").notes["skipped_records"] == [3, 4]


# --- nothing but DataError, whatever the file holds -----------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def paths_of(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value that can be changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, inner in items:
        found += paths_of(inner, (*prefix, key))
    return found


def loads_or_data_error(kind: str, path: Path) -> Dataset | None:
    try:
        dataset = load_dataset(kind, path)
    except DataError as failure:
        message = str(failure)
    else:
        assert dataset.requests
        fingerprint(dataset.requests)
        return dataset
    assert str(path) in message
    message.encode("utf-8")  # it can be printed
    return None


@pytest.mark.parametrize("kind", FILE_KINDS)
@FUZZ
@given(data=st.data())
def test_mutated_records_raise_nothing_but_data_errors(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    records = copy.deepcopy(RAW[kind][:3])
    for _ in range(data.draw(st.integers(1, 3))):
        parent: Any = records
        *steps, last = data.draw(st.sampled_from(paths_of(records)))
        for step in steps:
            parent = parent[step]
        change = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "delete":
            del parent[last]
        elif change == "add" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = data.draw(json_values)
        else:
            parent[last] = data.draw(json_values)
        if not records or not paths_of(records):
            break
    dataset = loads_or_data_error(kind, write(tmp_path / "mutated.json", kind, records))
    if dataset is not None:
        assert all(r.subject in r.prompt for r in dataset.requests)


@pytest.mark.parametrize("kind", FILE_KINDS)
@FUZZ
@given(content=st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_file_raises_nothing_but_data_errors(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(content)
    assert loads_or_data_error(kind, path) is None


EASYEDIT_KEYS = (
    "subject",
    "target_new",
    "ground_truth",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
)


@FUZZ
@given(
    record=st.fixed_dictionaries(
        {"prompt": json_values},
        optional=dict.fromkeys((*EASYEDIT_KEYS, "locality", "portability"), json_values),
    )
)
def test_easyedit_records_raise_nothing_but_data_errors(record: dict[str, Any], tmp_path: Path) -> None:
    loads_or_data_error("zsre", write(tmp_path / "easyedit.json", "zsre", [record]))


# --- order ----------------------------------------------------------------------------------

DATASET = load_dataset("zsre", SAMPLES["zsre"])


@given(seed=st.integers(-(2**40), 2**40))
def test_shuffle_is_a_permutation(seed: int) -> None:
    order = order_requests(DATASET, "shuffle", seed)
    assert sorted(order) == list(range(len(DATASET.requests)))
    assert order == order_requests(DATASET, "shuffle", seed)


def test_order_is_pinned() -> None:
    """A changed order would silently change what every stored cell means: this must never need an
    update."""
    dataset = Dataset("pinned", DATASET.requests[:10], "0" * 64)
    assert order_requests(dataset, "file", 3) == tuple(range(10))
    assert order_requests(dataset, "shuffle", 0) == PINNED_SEED_0
    assert order_requests(dataset, "shuffle", 1) != PINNED_SEED_0
    assert order_requests(replace(dataset, fingerprint="1" * 64), "shuffle", 0) != PINNED_SEED_0


PINNED_SEED_0 = (5, 3, 9, 7, 6, 1, 0, 4, 8, 2)


def test_order_needs_no_global_random_state() -> None:
    code = (
        "import random; random.seed(99)\n"
        "from pathlib import Path\nfrom workers.data import load_dataset, order_requests\n"
        f"dataset = load_dataset('zsre', Path({str(SAMPLES['zsre'])!r}))\n"
        "import sys; sys.stdout.write(repr((dataset.fingerprint, order_requests(dataset, 'shuffle', 5))))"
    )
    ran = finished([sys.executable, "-c", code])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == repr((DATASET.fingerprint, order_requests(DATASET, "shuffle", 5)))


def test_unknown_order() -> None:
    with pytest.raises(DataError, match="choose file or shuffle"):
        order_requests(DATASET, "random", 0)  # type: ignore[arg-type]


# --- fingerprint ----------------------------------------------------------------------------


def test_fingerprint_is_pinned() -> None:
    """It enters every cell id, so the definition cannot change."""
    one = EditRequest("1", "a is", "a", "b", "c", ("d",), (Probe("e", "f"),), (Probe("g", "é"),), None)
    canonical = (
        '[{"case_id":"1","ground_truth":"c","locality":[{"prompt":"e","target":"f"}],'
        '"portability":[{"prompt":"g","target":"\\u00e9"}],"prompt":"a is","rephrases":["d"],"subject":"a",'
        '"target_new":"b","unrelated":null}]'
    )
    assert fingerprint([one]) == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"case_id": "x"},
        {"prompt": "Watts Humphrey"},
        {"subject": "Watts"},
        {"target_new": "x"},
        {"ground_truth": None},
        {"rephrases": ()},
        {"locality": ()},
        {"portability": (Probe("x", "y"),)},
        {"unrelated": "x"},
        {"passage": True},
        {"ood": ("x",)},
        {"any_of": True},
        {"needs": 1},
        {"portability": (Probe("x", "y", ("z",)),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_sees_every_field(change: dict[str, Any]) -> None:
    requests = list(DATASET.requests)
    assert fingerprint([replace(requests[0], **change), *requests[1:]]) != DATASET.fingerprint


def test_fingerprint_sees_order_and_number() -> None:
    requests = DATASET.requests
    assert len({fingerprint(requests), fingerprint(requests[::-1]), fingerprint(requests[:-1])}) == 3


# --- counts ---------------------------------------------------------------------------------


def test_count_duplicates() -> None:
    a, b = request("a is", "a", "x"), request("b is", "b", "x")
    assert count_duplicates([a, b]) == 0
    assert count_duplicates([a, b, a, a]) == 2
    assert count_duplicates([]) == 0


def test_count_conflicts() -> None:
    a = request("The capital of a is", "a", "x")
    assert count_conflicts([a, a]) == 0, "asking twice for the same is no conflict"
    assert count_conflicts([a, replace(a, target_new="y")]) == 1
    assert count_conflicts([a, replace(a, target_new="y"), a]) == 2, "the third undoes the second"
    assert count_conflicts([a, replace(a, target_new="X")]) == 0, "upper and lower case do not count"
    assert count_conflicts([a, replace(a, prompt="the capital  of a is", target_new="y")]) == 1
    assert count_conflicts([a, request("The capital of b is", "b", "y")]) == 0, "another subject"
    assert count_conflicts([a, request("The mayor of a is", "a", "y")]) == 0, "another relation"
    assert count_conflicts([request("a b is", "a", "x"), request("a b is", "b", "y")]) == 1, "same prompt"


def test_count_edited_locality() -> None:
    probes = (Probe("b is", "1"), Probe("c is", "2"))
    requests = [request("a is", "a", "x", probes), request("b is", "b", "x", probes)]
    assert count_edited_locality(requests) == 2
    assert count_edited_locality(requests[:1]) == 0


def test_counts_on_the_sample() -> None:
    requests = load_dataset("counterfact", SAMPLES["counterfact"]).requests
    assert (count_duplicates(requests), count_conflicts(requests), count_edited_locality(requests)) == (
        1,
        1,
        1,
    )


# --- scale and imports ----------------------------------------------------------------------


def test_a_file_as_large_as_the_real_one_loads_in_seconds(tmp_path: Path) -> None:
    """19,086 records, as in the published evaluation file; also that finding unrelated sentences is
    not quadratic."""
    records = [
        ZSRE[i % 20] | {"loc": "nq question: the same" if i % 2 else f"nq question: {i}"}
        for i in range(19_086)
    ]
    dataset = load_dataset("zsre", write(tmp_path / "large.json", "zsre", records))
    assert len(dataset.requests) == 19_086
    assert count_duplicates(dataset.requests) == 19_066


def test_importing_the_data_package_needs_no_heavy_library() -> None:
    code = (
        "import sys, workers.data\n"
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'ray', 'pyarrow', 'numpy') if m in "
        "sys.modules) or 0)"
    )
    ran = finished([sys.executable, "-c", code])
    assert ran.returncode == 0, ran.stderr
