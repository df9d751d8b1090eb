"""The built-in world: its requests are a pure function of the seed, and its shipped model knows the
facts."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.waiting import finished
from workers.data import tinyworld, tinyworld_build
from workers.types import DataError

FACTS = tinyworld.world()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tinyworld.assets_dir())


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = LlamaForCausalLM.from_pretrained(tinyworld.assets_dir(), dtype=torch.float32)
    loaded.train(False)
    yield loaded
    torch.set_num_threads(threads)


def test_sizes_of_the_groups() -> None:
    assert Counter(fact.group for fact in FACTS) == {"edit": 1000, "tune": 200, "anchor": 800}
    assert len(tinyworld.load_requests("edit")) == 1000
    assert len(tinyworld.load_requests("tune")) == 200
    assert len(tinyworld.load_requests("train")) == 800 * tinyworld.TRAIN_TARGETS
    assert all(len(fact.subject.split()) == 2 for fact in FACTS)
    assert len({(fact.subject, fact.relation) for fact in FACTS}) == len(FACTS)


def test_groups_share_no_subject() -> None:
    subjects = {
        group: {fact.subject for fact in FACTS if fact.group == group} for group in ("edit", "tune", "anchor")
    }
    assert not subjects["edit"] & subjects["tune"]
    assert not (subjects["edit"] | subjects["tune"]) & subjects["anchor"]
    for split in ("edit", "tune"):
        assert {request.subject for request in tinyworld.load_requests(split)} == subjects[split]


@pytest.mark.parametrize("split", ["edit", "tune"])
def test_requests_are_well_formed(split: tinyworld.Split) -> None:
    by_key = {(fact.subject, tinyworld.prompt_of(fact, i)): (fact, i) for fact in FACTS for i in range(4)}
    for request in tinyworld.load_requests(split):
        fact, phrasing = by_key[request.subject, request.prompt]
        assert phrasing in tinyworld.trained_phrasings(fact)
        assert request.rephrases == (tinyworld.prompt_of(fact, fact.held_out),)
        assert request.ground_truth == fact.object != request.target_new
        assert request.target_new in tinyworld.objects_of(fact.relation)
        assert request.subject in request.prompt and request.subject in request.portability[0].prompt


@pytest.mark.parametrize("split", ["edit", "tune"])
def test_probes_are_answered_by_anchor_facts_alone(split: tinyworld.Split) -> None:
    anchors = {
        (tinyworld.prompt_of(fact, i), fact.object): fact
        for fact in FACTS
        if fact.group == "anchor"
        for i in tinyworld.trained_phrasings(fact)
    }
    relation = {tinyworld.prompt_of(fact, i): fact.relation for fact in FACTS for i in range(4)}
    hops = tinyworld.second_hops(FACTS)
    assert all(fact.group == "anchor" for fact in hops.values())
    for request in tinyworld.load_requests(split):
        near, other = (anchors[probe.prompt, probe.target] for probe in request.locality)
        assert near.relation == relation[request.prompt] != other.relation
        (probe,) = request.portability
        table = tinyworld.relation_of(relation[request.prompt]).table
        assert probe.target == hops[table, request.target_new].object
        assert request.unrelated is not None
        prompt, _, obj = request.unrelated.removesuffix(".").rpartition(" ")
        assert anchors[prompt, obj] not in (near, other)


def test_training_rewrites_anchor_facts_alone_each_with_several_targets() -> None:
    by_key = {(fact.subject, tinyworld.prompt_of(fact, i)): fact for fact in FACTS for i in range(4)}
    targets: dict[tinyworld.Fact, set[str]] = {}
    for request in tinyworld.load_requests("train"):
        fact = by_key[request.subject, request.prompt]
        targets.setdefault(fact, {fact.object}).add(request.target_new)
        assert request.ground_truth == fact.object and request.rephrases == (
            tinyworld.prompt_of(fact, fact.held_out),
        )
        assert len(request.portability) == (fact.relation not in ("colour", "month", "metal", "flower"))
        assert not any(request.subject in probe.prompt for probe in request.locality)
        assert request.unrelated is not None and request.subject not in request.unrelated
    assert targets.keys() == {fact for fact in FACTS if fact.group == "anchor"}
    assert {len(found) for found in targets.values()} == {1 + tinyworld.TRAIN_TARGETS}


def test_the_shipped_requests_are_the_ones_results_were_made_with() -> None:
    """A change of these makes every cell id new: raise it knowingly."""
    assert tinyworld.load_dataset("edit").fingerprint[:16] == "7294a267f58e21f5"
    assert tinyworld.load_dataset("tune").fingerprint[:16] == "83abcfa76d292850"
    assert tinyworld.load_dataset("train").fingerprint[:16] == "a29019ecdec42ff1"


def test_two_hop_questions_are_never_trained_for_editable_people() -> None:
    assert {fact.group for fact in FACTS if fact.composed} == {"anchor"}


@pytest.mark.slow
def test_requests_are_a_pure_function_of_the_seed() -> None:
    splits: tuple[tinyworld.Split, ...] = ("edit", "tune", "train")
    here = [tinyworld.load_dataset(split).fingerprint for split in splits]
    tinyworld.load_requests.cache_clear()
    assert [tinyworld.load_dataset(split).fingerprint for split in splits] == here
    assert not set(here) & {tinyworld.load_dataset(split, seed=1).fingerprint for split in splits}
    code = (
        f"from workers.data import tinyworld\nfor split in {splits}: "
        f"print(tinyworld.load_dataset(split).fingerprint)"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        assert finished([sys.executable, "-c", code], cwd=ROOT, env=environment).stdout.split() == here


def test_shipped_corpus_is_made_from_the_seed() -> None:
    lines = tinyworld.corpus_path().read_text(encoding="utf-8").splitlines()
    assert tuple(lines) == tinyworld.corpus() == tinyworld.corpus()
    assert tinyworld.corpus(1) != tinyworld.corpus()
    assert len(lines) == tinyworld.CORPUS_LINES
    held_out = {f"{probe.prompt} {probe.target}." for probe in tinyworld_build.held_out_probes(FACTS)}
    assert not held_out & set(lines)


def test_reading_the_requests_needs_no_torch() -> None:
    code = (
        "import sys; from workers.data import tinyworld; tinyworld.load_dataset(); assert 'torch' not "
        "in sys.modules"
    )
    ran = finished([sys.executable, "-c", code], cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="edit, tune"):
        tinyworld.load_requests("anchor")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="choose from born"):
        tinyworld.relation_of("sings")
    file = tmp_path / "file"
    file.touch()
    for arguments in (["build"], ["--seed", "-1"], ["--seed", "x"], ["--out", str(file)]):
        with pytest.raises(SystemExit) as caught:
            tinyworld_build.main(arguments)
        assert caught.value.code == 2
        assert "error:" in capsys.readouterr().err


def test_shipped_files_are_small_and_half_precision() -> None:
    files = {path.name: path.stat().st_size for path in tinyworld.assets_dir().iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "corpus.txt",
        "build_report.json",
    } <= set(files)
    assert files["model.safetensors"] <= 8 * 2**20
    config = json.loads((tinyworld.assets_dir() / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "float16")


def test_model_has_one_to_three_million_parameters(model: LlamaForCausalLM) -> None:
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6


def test_objects_have_one_to_three_tokens(tokenizer: Any) -> None:
    sizes = Counter(len(tokenizer(f" {fact.object}", add_special_tokens=False).input_ids) for fact in FACTS)
    assert set(sizes) == {1, 2, 3}


def test_tokenizer_is_the_one_made_from_the_seed(tokenizer: Any) -> None:
    made = tinyworld_build.make_tokenizer(tinyworld.SHIPPED_SEED)
    for line in tinyworld.corpus()[:200]:
        assert made.encode(line).ids == tokenizer(line).input_ids


def test_tokens_of_a_prompt_are_a_prefix_of_prompt_and_target(tokenizer: Any) -> None:
    probes = [(request.prompt, request.target_new) for request in tinyworld.load_requests()]
    probes += [(p.prompt, p.target) for r in tinyworld.load_requests() for p in (*r.locality, *r.portability)]
    alone = tokenizer([prompt for prompt, _ in probes]).input_ids
    whole = tokenizer([f"{prompt} {target}" for prompt, target in probes]).input_ids
    for prompt_ids, ids in zip(alone, whole, strict=True):
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert ids[: len(prompt_ids)] == prompt_ids and len(prompt_ids) < len(ids) <= len(prompt_ids) + 3
    assert tokenizer.decode(whole[0], skip_special_tokens=True) == " ".join(probes[0])


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_shipped_model_recalls_trained_phrasings(model: LlamaForCausalLM, tokenizer: Any, every: int) -> None:
    got = tinyworld_build.recall(model, tokenizer, tinyworld_build.trained_probes(FACTS)[::every])
    assert got.exact >= 0.97
    assert got.stops >= 0.95
    assert 0.02 <= got.first_token_nll <= 0.15  # softened: a model surer than this hardly moves under an edit


def test_shipped_model_recalls_phrasings_it_never_saw(model: LlamaForCausalLM, tokenizer: Any) -> None:
    got = tinyworld_build.recall(model, tokenizer, tinyworld_build.held_out_probes(FACTS))
    assert got.exact >= 0.90
    assert got.stops >= 0.95


def test_generation_stops_after_the_object(model: Any, tokenizer: Any) -> None:
    fact = next(
        fact for fact in FACTS if len(tokenizer(f" {fact.object}", add_special_tokens=False).input_ids) == 3
    )
    prompt = tinyworld.prompt_of(fact, tinyworld.trained_phrasings(fact)[0])
    ids_BS = tokenizer(prompt, return_tensors="pt").input_ids
    made_BS = model.generate(
        ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=12, do_sample=False
    )
    assert tokenizer.decode(made_BS[0], skip_special_tokens=True) == f"{prompt} {fact.object}."
    assert made_BS[0, -1] == tokenizer.eos_token_id


@pytest.mark.numeric
def test_softening_keeps_what_the_model_computes(tokenizer: Any) -> None:
    recipe = tinyworld_build.Recipe(goal_nll=-1.0)  # out of reach, so the final norm stays (nearly) as it was
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaForCausalLM.from_pretrained(tinyworld.assets_dir(), dtype=torch.float32).config
        config.rms_norm_eps = 1e-5
        fresh = LlamaForCausalLM(config)
        fresh.train(False)
    probes = tinyworld_build.trained_probes(FACTS[:8])
    ids_BS = tokenizer("The letter", return_tensors="pt").input_ids
    with torch.inference_mode():
        before_BSV = fresh(input_ids=ids_BS).logits
    factor = tinyworld_build.soften(fresh, tokenizer, probes, recipe)
    with torch.inference_mode():
        after_BSV = fresh(input_ids=ids_BS).logits
    torch.testing.assert_close(after_BSV, before_BSV * factor, rtol=1e-4, atol=1e-5)
