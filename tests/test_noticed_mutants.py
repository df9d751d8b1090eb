"""Tests for drawn mutants that the other fast tests let pass; the list is
tests/mutation/drawn.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.results import table as table_module
from orchestrator.results.journal import Journal, _compress, _Step
from orchestrator.results.parquet import reading
from orchestrator.results.table import CentralTable, TableShard
from orchestrator.storage.base import Damaged, Missing, StoreError
from orchestrator.storage.local import LocalStore
from orchestrator.storage.sealed import seal_json, unseal_json
from tests.shards import contents, finish, make_manifest, undisturbed
from tests.small import golden_requests, job, random_model
from workers.job import Lane, ScoreConfig, Share, StreamJob
from workers.methods.ft import FTConfig
from workers.model.overlay import LaneState, LowRankOverlay, pack_states
from workers.scoring.ability import cut_windows
from workers.scoring.fluency import FluencyConfig, _chunks, continuations
from workers.scoring.probes import Answer, Asked, EncodedProbe, Item, Text
from workers.timeline import cut_steps, expected_rows, timeline
from workers.types import DataError


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "results")


# -- table


def test_a_table_file_ends_with_the_shard_that_fills_it(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = [make_manifest(f"s{i}", T=2, groups=2, cell=f"c{i}") for i in range(3)]
    journal, table = Journal(store), CentralTable(store)
    finish(journal, *manifests)
    one = expected_rows(manifests[0].job)
    monkeypatch.setattr(table_module, "_FILE_ROWS", one + 1)  # two shards reach it
    assert table.gather(journal).files == (1, 2)
    assert [shard.file for shard in table.shards().values()] == [1, 1, 2]
    assert contents(table) == undisturbed(tmp_path / "clean", *manifests)


# -- store


def test_another_process_may_make_the_folder_first(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def overtaken(self: Path, *args: Any, **kwargs: Any) -> None:
        os.mkdir(self)  # between the look and the making
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", overtaken)
    assert store.publish_new("a/b/x", b"1")
    assert store.read("a/b/x") == b"1"


def test_what_vanishes_while_a_folder_is_listed_is_not_in_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        store.publish_new(f"folder/{name}", b"1")
    scandir = os.scandir

    class Deleting:
        """The real listing; another process deletes ``b`` after it was read from the disk."""

        def __init__(self, path: Path) -> None:
            self.path, self.found = path, scandir(path)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            items = list(self.found)
            (self.path / "b").unlink()
            return iter(items)

        def __exit__(self, *_: object) -> None:
            self.found.close()

    monkeypatch.setattr(os, "scandir", Deleting)
    assert [entry.name for entry in store.list("folder")] == ["a", "c"]


def test_tidy_removes_what_is_older_than_the_limit_only(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish_new("folder/x", b"")
    ages = {"older": 101.0, "as-old": 100.0, "younger": 99.0}
    now = 2.0**30  # whole seconds, so that the file system keeps them exactly
    for name, age in ages.items():
        path = store.root / "folder" / f".tmp-{name}"
        path.write_bytes(b"half")
        os.utime(path, (now - age, now - age))
    monkeypatch.setattr("orchestrator.storage.local.time.time", lambda: now)
    store.tidy("folder", older_than_s=100.0)
    assert sorted(os.listdir(store.root / "folder")) == [".tmp-as-old", ".tmp-younger", "x"]


@pytest.mark.parametrize("text", ["{}", '{"sha256": "x"}', '{"value": {}}', "[]", "null", "{", '"text"'])
def test_other_json_is_damage_with_a_name(text: str) -> None:
    with pytest.raises(Damaged, match=r"^some\.json: "):
        unseal_json(text.encode(), "some.json")


def test_sealed_json_may_be_laid_out_anew() -> None:
    """What is hashed is the value: an editor that sorts keys otherwise changes nothing."""
    value = {"b": 1, "a": {"d": [1, 2], "c": "ü"}}
    sealed = json.loads(seal_json(value))
    turned = {"value": {"b": 1, "a": {"d": [1, 2], "c": "ü"}}, "sha256": sealed["sha256"]}
    assert list(turned["value"]) != sorted(turned["value"])
    assert unseal_json(json.dumps(turned).encode(), "some.json") == value
    turned["value"]["a"]["c"] = "u"
    with pytest.raises(Damaged, match="checksum"):
        unseal_json(json.dumps(turned).encode(), "some.json")


# -- table


def test_errors_of_arrow_are_damage_and_those_of_the_system_are_not() -> None:
    import pyarrow as pa

    for error in (pa.ArrowInvalid("bad thrift"), OSError("Corrupt snappy compressed data")):
        with pytest.raises(Damaged, match=r"^the file: "), reading("the file"):
            raise error
    with pytest.raises(StoreError, match="cannot read the file: Input/output error"), reading("the file"):
        raise OSError(5, "Input/output error")


def test_a_shard_that_ended_without_rows_has_cost_nothing() -> None:
    empty = TableShard.empty("s0", 3)
    told = empty.to_json()
    assert {
        told[name]
        for name in ("rows", "attempts", "edits", "edit_seconds", "score_seconds", "commit_seconds")
    } == {0}
    assert (told["cells"], told["failed"], told["failures"], told["score"]) == ({}, {}, [], {})
    assert TableShard.from_json(told, 3) == empty


def test_other_files_and_folders_among_the_numbered_ones_are_not_read(
    store: LocalStore, tmp_path: Path
) -> None:
    manifest = make_manifest("s0", T=2, groups=2)
    finish(Journal(store), manifest)
    (store.root / "table" / "000007.parquet").mkdir(parents=True)
    (store.root / "table" / "notes.txt").write_text("mine")
    table = CentralTable(store)
    assert table.gather(Journal(store)).files == (1,)
    assert set(table.shards()) == {"s0"} and table.verify() == []
    assert contents(table) == undisturbed(tmp_path / "clean", manifest)


# -- journal


def test_a_chain_names_each_attempts_parts_as_one_span() -> None:
    steps = [_Step(1, 0, 2), _Step(1, 2, 4), _Step(3, 4, 5), _Step(3, 5, 9), _Step(4, 9, 10)]
    assert _compress(steps) == [[1, 0, 4], [3, 4, 9], [4, 9, 10]]
    assert _compress([]) == []


def test_a_shard_that_has_begun_has_done_nothing(store: LocalStore) -> None:
    journal, manifest = Journal(store), make_manifest()
    journal.begin(manifest)
    for attempts in (0, 1):
        progress = journal.progress("s0")
        assert (progress.committed, progress.attempts, progress.rows, progress.edits) == (0, attempts, 0, 0)
        assert (progress.edit_seconds, progress.score_seconds, progress.commit_seconds) == (0.0, 0.0, 0.0)
        assert (progress.failures, progress.error, progress.finished) == ((), None, False)
        journal.claim("s0", "r1")


class _Dropping(LocalStore):
    """Another process drops the shard after the name was found taken and before it is read."""

    times = 1

    def publish_new(self, key: str, data: bytes) -> bool:
        published = super().publish_new(key, data)
        if not published and self.times:
            self.times -= 1
            self.delete(key)
        return published


def test_a_shard_that_is_dropped_while_it_begins_begins_anew(tmp_path: Path) -> None:
    store = _Dropping(tmp_path / "results")
    journal, manifest = Journal(store), make_manifest()
    journal.begin(manifest)
    journal.begin(manifest)
    assert store.times == 0
    assert journal.manifest("s0") == manifest


def test_an_unfinished_shard_is_not_loaded(store: LocalStore) -> None:
    journal = Journal(store)
    journal.begin(make_manifest())
    assert journal.load("s0") is None
    with pytest.raises(Missing):
        journal.load("unknown")


# -- timeline


@pytest.mark.parametrize(
    ("step_edits", "immediate", "bounds"),
    [
        (1, True, (1, 2, 3, 4, 5)),
        (2, True, (2, 4, 5)),
        (1, False, (1, 2, 3, 4, 5)),
        (2, False, (2, 4, 5)),  # an edit is work, whether or not it is scored
        (4, False, (4, 5)),
        (100, False, (5,)),
    ],
)
def test_steps_are_cut_by_work(step_edits: int, immediate: bool, bounds: tuple[int, ...]) -> None:
    work = job("ft", FTConfig(layers=(1,)), 4, [[0]], immediate=immediate)
    assert cut_steps(work, step_edits) == bounds


def test_a_tick_tells_the_groups_of_every_lane_of_its_wave() -> None:
    """The first lane serves one T, the second a smaller one, too."""
    one = job("ft", FTConfig(layers=(1,)), 4, [[0]], immediate=False)
    cells = (one.cells[0], one.cells[0].model_copy(update={"cell_id": "smaller", "T": 2}))
    lanes = (
        Lane(group=0, stop_group=1),
        Lane(group=1, stop_group=2, also=(Share(cell=1, group=2, stop_group=3),)),
    )
    ticks = timeline(StreamJob(**{**dict(one), "cells": cells, "waves": (lanes,)}))
    assert [(tick.kind, tick.edits_applied, tick.sizes) for tick in ticks if tick.kind == "final"] == [
        ("final", 2, (2,)),
        ("final", 4, (4,)),
    ]


# -- scoring


def test_an_answer_that_ended_elsewhere_is_not_the_base_models_own() -> None:
    """Generation goes on while a text may still become what the base model says; it may end before
    it does."""
    base = random_model("llama")
    probe = EncodedProbe(0, "locality", 0, base.encoder.pair("Yes,", "no"), "Yes,", "no")
    answer = Answer(argmax=(*probe.scored, 0), logprob=-1.0, margin=1.0, confident=0.0)
    said = Text("clock maker", natural=True)
    for text, same in (
        (said, 1.0),
        (Text("clock", natural=True), 0.0),
        (Text("clock maker", natural=False), 0.0),
        (Text(None, natural=False), 0.0),
    ):
        assert Asked(probe, answer, answer, said, text).accuracy(of_base=False) == (1.0, 1.0, same)
    dropped = Text(None, natural=False)
    assert Asked(probe, answer, answer, dropped, dropped).accuracy(of_base=False) == (1.0, 1.0, 0.0)


def test_continuations_follow_the_models_probabilities() -> None:
    """The first token after each of sixty prompts: the likeliest as often as the model says, within
    five deviations."""
    base = random_model("llama")
    items = [Item(0, request) for request in golden_requests(60)]
    written = continuations(base, None, items, FluencyConfig(tokens=1, top_k=4))
    first = last = 0
    wanted, spread = 0.0, 0.0
    for item, text in zip(items, written, strict=True):
        with torch.no_grad():
            logits = base.model(torch.tensor([base.encoder.prompt(item.request.prompt)])).logits[0, -1]
        logits[base.tokenizer.eos_token_id] = -torch.inf
        values, ids = logits.double().topk(4)
        choices = [base.tokenizer.decode([int(token)], skip_special_tokens=True).strip() for token in ids]
        assert text in choices
        first, last = first + (text == choices[0]), last + (text == choices[-1])
        p = float(values.softmax(-1)[0])
        wanted, spread = wanted + p, spread + p * (1 - p)
    assert abs(first - wanted) < 5 * spread**0.5 + 1
    assert 5 < wanted < 55 and last < 60 - 5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_windows_hold_the_text_once_whether_or_not_a_tokenizer_begins_it(arch: str, tmp_path: Path) -> None:
    base = random_model(arch)
    text = " ".join(request.prompt for request in golden_requests(20))
    ids, bos = base.encoder.text(text), base.tokenizer.bos_token_id
    begun = ids[:1] if ids[0] == bos else ()
    windows = cut_windows(base.encoder, text, 100, 32, tmp_path)
    assert all(window[: len(begun)] == begun and len(window) <= 32 for window in windows)
    assert sum((window[len(begun) :] for window in windows), ()) == ids[len(begun) :][:100]
    with pytest.raises(DataError, match="too little text"):
        cut_windows(base.encoder, "", 100, 32, tmp_path)


@pytest.mark.parametrize(("rows", "tokens"), [(3, 10_000), (100, 120), (1, 1), (100, 100_000)])
def test_prompts_are_continued_in_batches_that_keep_to_the_budget(rows: int, tokens: int) -> None:
    base = random_model("llama")
    items = [Item(0, request) for request in golden_requests(12)]
    config, settings = ScoreConfig(rows_per_batch=rows, tokens_per_batch=tokens), FluencyConfig(tokens=10)
    chunks = [list(chunk) for chunk in _chunks(base, items, settings, config)]
    assert [item for chunk in chunks for item in chunk] == items
    widths = [[len(base.encoder.prompt(item.request.prompt)) + 10 for item in chunk] for chunk in chunks]
    for width, following in zip(widths, [*widths[1:], None], strict=True):
        assert len(width) == 1 or (len(width) <= rows and len(width) * max(width) <= tokens)
        if following is not None:  # one more would not have fitted
            more = [*width, following[0]]
            assert len(more) > rows or len(more) * max(more) > tokens


# -- overlay


def test_a_pristine_lane_among_dense_ones_has_no_change() -> None:
    base = random_model("llama", torch.float64)
    site = base.site(1)
    overlay = LowRankOverlay(site, 2, torch.float64)
    n = min(site.shape)
    overlay.add(
        *(torch.ones(2, *shape, dtype=torch.float64) for shape in ((site.shape[0], n), (n, site.shape[1])))
    )
    assert overlay.dense_LOI is not None
    overlay.load_state(0, LaneState())
    assert torch.equal(overlay.delta(0), torch.zeros(site.shape, dtype=torch.float64))
    assert bool((overlay.delta(1) != 0).all())


def test_the_change_becomes_dense_at_half_the_smaller_dimension() -> None:
    """For the smallest maps at once: a factor of rank one costs as much as they do."""
    for sizes, expected in (
        ({"hidden_size": 48}, 24),
        ({"intermediate_size": 4}, 2),
        ({"intermediate_size": 2}, 1),
    ):
        base = random_model("llama", **sizes)
        overlay = LowRankOverlay(base.site(1), 1, torch.float32)
        out, inner = base.site(1).shape
        for rank in range(1, expected + 1):
            overlay.add(torch.ones(1, out), torch.ones(1, inner))
            assert overlay.rank == rank % expected
            assert (overlay.dense_LOI is not None) is (rank == expected)


def test_a_snapshot_has_one_form_whatever_the_order_of_its_keys() -> None:
    state = LaneState({"w": torch.ones(2)}, {"b": 1, "a": 2})
    same = LaneState({"w": torch.ones(2)}, {"a": 2, "b": 1})
    assert pack_states([state], {"d": 1, "c": 2}) == pack_states([same], {"c": 2, "d": 1})
