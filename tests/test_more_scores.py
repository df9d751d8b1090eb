"""Scores beyond right and wrong: perplexity, out-of-distribution texts, any of several questions,
fluency, general ability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orchestrator.engine.folder import check_folder
from orchestrator.planning.plan import make_plan
from orchestrator.planning.spec import parse_spec
from orchestrator.results.columns import STREAM_COLUMNS
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json
from tests.small import GOLDEN, golden_model, golden_requests, job, random_model, session, timeless
from workers.job import ScoreConfig, StreamJob
from workers.methods.ft import FTConfig
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay
from workers.scoring.ability import Ability, AbilityConfig, cut_windows
from workers.scoring.any_of import ANY_OF
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.fluency import FluencyConfig, continuations, fluency, n_gram_entropy
from workers.scoring.out_of_distribution import OUT_OF_DISTRIBUTION
from workers.scoring.probes import Item
from workers.scoring.registry import SCORES
from workers.scoring.score import score
from workers.scoring.target import exp
from workers.stream import Stream
from workers.timeline import cut_steps
from workers.types import DataError, EditRequest, EditSweepError, Probe

REQUESTS = golden_requests(20)
FT = FTConfig(layers=(1,), lr=1e-2, num_steps=3, objective="target_new")
CORPUS = GOLDEN / "corpus.txt"
LATER = ("fluency", "ability_perplexity", "perplexity")
ANY_COLUMNS = [column.name for column in ANY_OF.columns]
OOD_COLUMNS = [column.name for column in OUT_OF_DISTRIBUTION.columns]


def edited(base: BaseModel, lanes: int = 2) -> DenseOverlay:
    """Lane 0 is untouched."""
    site = base.site(1)
    overlay = DenseOverlay([site], lanes, torch.float32)
    for lane in range(1, lanes):
        overlay.weights_LOI[site.name][lane] *= 1 + 3 * lane
    return overlay


def logprobs(base: BaseModel, ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of every token but the first, straight from the model."""
    with torch.no_grad():
        logits_SV = base.model(torch.tensor([ids])).logits[0, :-1].float()
    return logits_SV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.numeric
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_perplexity_is_of_the_target_after_the_prompt(arch: str) -> None:
    base = random_model(arch)
    passage = replace(
        REQUESTS[0], target_new="a clock maker who lived in Paris and kept three birds.", passage=True
    )
    untouched, changed, plain = score(
        base, edited(base), [Item(0, passage), Item(1, passage), Item(1, REQUESTS[0])], ScoreConfig()
    )
    pair = base.encoder.pair(passage.prompt, passage.target_new)
    wanted = math.exp(-logprobs(base, pair.ids)[pair.prompt_len - 1 :].mean().item())
    assert untouched["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert untouched["perplexity_base"] == changed["perplexity_base"] == pytest.approx(wanted, rel=1e-4)
    assert changed["perplexity"] != pytest.approx(wanted, rel=1e-2)
    assert plain["perplexity"] is plain["perplexity_base"] is None
    assert exp(800) == math.inf


@pytest.mark.numeric
@pytest.mark.parametrize("generated", [True, False])
def test_ood_texts_are_read_token_by_token(generated: bool) -> None:
    base = golden_model("tiny-llama")
    text = " ".join(
        CORPUS.read_text().splitlines()[3:6]
    )  # the model was trained on it: some tokens are certain, some are not
    request = replace(REQUESTS[0], ood=(text,))
    (found,) = score(base, None, [Item(0, request)], ScoreConfig(generated=generated))
    ids = base.encoder.text(text)
    with torch.no_grad():
        argmax = base.model(torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
    right = sum(a == b for a, b in zip(argmax, ids[1:], strict=True)) / (len(ids) - 1)
    sure = (logprobs(base, ids).exp() > 0.8).float().mean().item()
    assert 0 < sure < right < 1
    assert found["ood_token"] == found["ood_token_base"] == pytest.approx(right)
    assert found["ood_confident"] == found["ood_confident_base"] == pytest.approx(sure)
    (without,) = score(base, None, [Item(0, REQUESTS[0])], ScoreConfig(generated=generated))
    assert all(without[name] is None for name in OOD_COLUMNS)
    with pytest.raises(DataError, match="at least two tokens"):
        score(base, None, [Item(0, replace(request, ood=("",)))], ScoreConfig())


def test_the_mean_of_group_means() -> None:
    """Six probes of one group that the model knows, and one of another that it does not."""
    base = golden_model("tiny-llama")
    known = [r for r in golden_requests(60) if r.ground_truth]
    said = [
        (r, score(base, None, [Item(0, replace(r, target_new=str(r.ground_truth)))], ScoreConfig())[0])
        for r in known
    ]
    right = next(r for r, s in said if s["reliability_exact"] == s["reliability_generated"] == 1)
    good = Probe(right.prompt, str(right.ground_truth), group="Subject_Aliasing")
    bad = Probe("Yes,", "Paris", group="Reasoning")
    request = replace(REQUESTS[0], portability=(good,) * 6 + (bad,), locality=(good, bad))
    unnamed = replace(request, portability=tuple(replace(p, group="") for p in request.portability))
    overlay = edited(base)
    found, plain = score(base, overlay, [Item(0, request), Item(0, unnamed)], ScoreConfig())
    for protocol in ("exact", "generated"):
        for suffix in ("", "_base"):
            assert found[f"portability_{protocol}{suffix}"] == pytest.approx(6 / 7)
            assert found[f"portability_group_mean_{protocol}{suffix}"] == 0.5
            assert plain[f"portability_group_mean_{protocol}{suffix}"] is None
    assert found["locality_group_mean_exact"] == 1
    assert "locality_group_mean_exact_base" not in found
    (changed,) = score(base, overlay, [Item(1, request)], ScoreConfig(generated=False))
    assert changed["portability_group_mean_generated"] is None


@pytest.mark.numeric
def test_any_of_several_questions() -> None:
    base = golden_model("tiny-llama")
    known = [r for r in golden_requests(60) if r.ground_truth]
    said = [
        (r, score(base, None, [Item(0, replace(r, target_new=str(r.ground_truth)))], ScoreConfig())[0])
        for r in known
    ]
    right = next(r for r, s in said if s["reliability_exact"] == s["reliability_generated"] == 1)
    good = Probe(right.prompt, str(right.ground_truth))
    bad = Probe("Yes,", "Paris")
    asked = replace(REQUESTS[0], portability=(bad, good, bad), any_of=True)
    mean, none, alias, wrong = score(
        base,
        None,
        [
            Item(0, asked),
            Item(0, replace(asked, any_of=False)),
            Item(0, replace(asked, portability=(bad, Probe(good.prompt, "Paris", (good.target,))))),
            Item(0, replace(asked, portability=(bad, bad))),
        ],
        ScoreConfig(),
    )
    assert mean["portability_exact"] == pytest.approx(1 / 3)
    assert all(mean[name] == 1 for name in ANY_COLUMNS)
    assert all(none[name] is None for name in ANY_COLUMNS)
    assert none["portability_exact"] == mean["portability_exact"]
    assert (alias["portability_any_exact"], alias["portability_any_generated"]) == (0, 1), (
        "an alias may be written"
    )
    assert all(wrong[name] == 0 for name in ANY_COLUMNS)
    (quiet,) = score(base, None, [Item(0, asked)], ScoreConfig(generated=False))
    assert (quiet["portability_any_exact"], quiet["portability_any_generated"]) == (1, None)


def test_n_gram_entropy() -> None:
    assert n_gram_entropy("one two") is None
    assert n_gram_entropy("so so so so so so") == 0
    # 4 bigrams and 3 trigrams, all different: (2/3 * 2 + 4/3 * log2 3) / 2
    assert n_gram_entropy("a b c d e") == pytest.approx((4 / 3 + 4 / 3 * math.log2(3)) / 2)
    # bigrams ab ba ab: H = log2 3 - 2/3; trigrams aba bab: H = 1
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3) / 2)
    assert n_gram_entropy("a, b.") == n_gram_entropy("a , b .")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fluency_does_not_depend_on_neighbours(arch: str) -> None:
    base = random_model(arch)
    overlay = edited(base)
    settings, config = FluencyConfig(tokens=12), ScoreConfig(tokens_per_batch=100)
    items = [Item(i // 3, REQUESTS[i % 3]) for i in range(6)]
    kept = BaseAnswers()
    together = fluency(base, overlay, items, settings, config, kept)
    assert fluency(base, overlay, items, settings, config, kept) == together
    assert kept.numbers.hits
    alone = [fluency(base, overlay, [item], settings, config, BaseAnswers())[0] for item in items]
    assert alone == together
    assert [after for after, _ in together[:3]] == [before for _, before in together[:3]], (
        "lane 0 is the base model"
    )
    assert [after for after, _ in together[3:]] != [before for _, before in together[3:]]


def test_continuations_are_drawn_from_the_likeliest() -> None:
    base = random_model("llama")
    items = [Item(0, REQUESTS[0])]
    (greedy,) = continuations(base, None, items, FluencyConfig(tokens=6, top_k=1))
    ids = list(base.encoder.prompt(REQUESTS[0].prompt))
    start = len(ids)
    for _ in range(6):
        with torch.no_grad():
            logits = base.model(torch.tensor([ids])).logits[0, -1]
        logits[base.tokenizer.eos_token_id] = -math.inf
        ids.append(int(logits.argmax()))
    assert greedy == base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    sampled = continuations(base, None, items, FluencyConfig(tokens=6, top_k=50))
    assert sampled == continuations(base, None, items, FluencyConfig(tokens=6, top_k=50)) != [greedy]


@pytest.mark.numeric
def test_ability_is_the_perplexity_of_the_windows(tmp_path: Path) -> None:
    base = random_model("llama")
    text = tmp_path / "held_out.txt"
    text.write_text("\n".join(CORPUS.read_text().splitlines()[:30]))
    settings = AbilityConfig(text=text, tokens=100, window=32)
    ability = Ability(base, text, settings, ScoreConfig())
    bos = base.tokenizer.bos_token_id
    assert all(window[0] == bos and bos not in window[1:] for window in ability.windows)
    assert sum(len(window) - 1 for window in ability.windows) == 100
    found = ability.perplexities(base, edited(base, 3), [0, 2], BaseAnswers(), Prefixes())
    scored = torch.cat([logprobs(base, window) for window in ability.windows])
    wanted = math.exp(-scored.mean().item())
    assert found[0] == (pytest.approx(wanted, rel=1e-4), pytest.approx(wanted, rel=1e-4))
    after, before = found[2]
    assert before == found[0][1]
    assert after != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), (" \n", "is empty"), (b"\xff", "expected UTF-8")]
)
def test_a_bad_held_out_text(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"text\.txt: .*{message}"):
        make_plan(spec(ability_text=str(path)))
    with pytest.raises(DataError, match="at least two tokens"):
        cut_windows(random_model("gpt2").encoder, "", 10, 5, path)


# --- in a stream and in a sweep -------------------------------------------------------------


def rows_of(work: StreamJob, step: int, base: BaseModel | None = None) -> list[dict[str, Any]]:
    stream = Stream(session(base or random_model("llama")), work, [REQUESTS], {})
    return timeless([row for result in stream.run(cut_steps(work, step)) for row in result.rows])


def test_what_is_measured_at_a_groups_end(tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("\n".join(CORPUS.read_text().splitlines()[:10]))
    extra = {"fluency_tokens": 5, "ability_text": text, "ability_tokens": 60, "ability_window": 20}
    work = job("ft", FT, 4, [[0, 1], [2]], score_at=(2,), requests_per_tick=3, **extra)
    rows = rows_of(work, 1000)
    assert {
        frozenset(row) | frozenset(("edit_seconds", "score_seconds", "peak_memory_bytes")) for row in rows
    } == {STREAM_COLUMNS}
    values: dict[tuple[int, int], set[float]] = {}
    for row in rows:
        if row["scored"] == "immediate":
            assert row["fluency"] is row["fluency_base"] is row["ability_perplexity"] is None
            continue
        assert row["fluency"] is not None
        values.setdefault((row["group"], row["edits_applied"]), set()).add(row["ability_perplexity"])
    assert len(values) == 6, "three groups, each at its checkpoint and at its end"
    assert all(len(found) == 1 for found in values.values()), (
        "one value per state, however many ticks score it"
    )
    assert len(set.union(*values.values())) == 6
    assert len({row["ability_perplexity_base"] for row in rows if row["scored"] != "immediate"}) == 1
    assert rows_of(work, 1) == rows, "where a stream commits changes no bit"
    plain = rows_of(job("ft", FT, 4, [[0, 1], [2]], score_at=(2,), requests_per_tick=3), 1000)
    names = [f"{name}{suffix}" for name in LATER for suffix in ("", "_base")]
    assert all(row[name] is None for row in plain for name in (*names, *OOD_COLUMNS, *ANY_COLUMNS))
    measured = ("fluency", "fluency_base", "ability_perplexity", "ability_perplexity_base")
    assert [{k: v for k, v in row.items() if k not in measured} for row in rows] == [
        {k: v for k, v in row.items() if k not in measured} for row in plain
    ]


def spec(**scoring: Any) -> Any:
    raw = {
        "name": "s",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 10},
        "grid": {"T": [10]},
        "methods": ["ft"],
        "scoring": scoring,
    }
    return parse_spec(yaml.safe_dump(raw), "s.yaml", CORPUS.parent)


def test_what_is_off_leaves_no_trace(tmp_path: Path) -> None:
    plain = spec()
    assert SCORES.identity(plain.scoring).keys() == {"immediate", "generated", "score_at", "extra_tokens"}
    same = make_plan(spec(ability_tokens=2048, fluency_tokens=0))
    assert [s.shard_id for s in same.shards] == [s.shard_id for s in make_plan(plain).shards]
    on = spec(ability_text="corpus.txt", fluency_tokens=8)
    assert on.scoring.ability_text == str(CORPUS)
    identity = SCORES.identity(on.scoring)
    assert (identity["fluency_tokens"], identity["fluency_top_k"], identity["ability_window"]) == (8, 5, 256)
    copy = tmp_path / "copy.txt"
    copy.write_text(CORPUS.read_text())
    moved = spec(ability_text=str(copy), fluency_tokens=8)
    assert SCORES.identity(moved.scoring) == identity, "a text counts by its content"
    copy.write_text("Another text.")
    assert SCORES.identity(moved.scoring) != identity
    planned = make_plan(on)
    assert [c.cell_id for c in planned.cells] == [c.cell_id for c in same.cells]
    assert planned.shards[0].shard_id != same.shards[0].shard_id


def test_a_folder_keeps_its_scoring_settings(tmp_path: Path) -> None:
    plain, on = spec(), spec(fluency_tokens=8)
    for there, here in ((plain, on), (on, plain)):
        folder = tmp_path / f"{there.scoring.fluency_tokens}"
        store, paths = LocalStore(folder), ResultsPaths()
        store.publish_new(paths.sweep, seal_json({"name": "s", "scoring": SCORES.identity(there.scoring)}))
        check_folder(there, store, paths)
        with pytest.raises(EditSweepError, match=r"scored with other settings \(fluency_tokens: "):
            check_folder(here, store, paths)


def test_a_request_of_every_new_kind_runs_through_a_stream() -> None:
    hop = Probe("Yes,", "no")
    request = EditRequest(
        "1", "Brewen is", "Brewen", "a clock maker", portability=(hop,), passage=True, ood=("So it is.",)
    )
    request = replace(request, any_of=True)
    stream = Stream(session(random_model("gpt2")), job("ft", FT, 1, [[0]]), [[request]], {})
    (row, _) = [row for result in stream.run([1]) for row in result.rows]
    assert all(
        row[name] is not None for name in (*OOD_COLUMNS, *ANY_COLUMNS, "perplexity", "perplexity_base")
    )
