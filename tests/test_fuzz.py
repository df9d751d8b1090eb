"""Whatever is in a spec or a data file: one message that names where it is wrong, exit code 2,
never a traceback."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.main import main
from tests.test_data import RAW, write
from workers.data import load_dataset
from workers.types import DataError

SPECS = 2000
RECORDS = 500

FULL: dict[str, Any] = {
    "name": "fuzz",
    "model": {"name": "embedded", "dtype": "float32", "device": "cpu", "trust_remote_code": False},
    "dataset": {"kind": "tinyworld", "edits": 20, "order": "shuffle", "on_bad_record": "error"},
    "grid": {"T": [1, 10], "seeds": [0, 1], "rollback": "group", "batch_size": 1},
    "methods": [
        {"method": "ft", "hparams": {"layers": [3], "lr": 0.001, "num_steps": 4, "objective": "target_new"}},
        {"method": "rome", "hparams": {"layer": 4, "fact_token": "last", "v_lr": 0.5}},
        {"method": "grace", "hparams": {"layer": 4, "eps": 1.0}},
        {
            "method": "wise",
            "label": "wise-merge",
            "hparams": {"retrieve": False, "save_freq": 5, "merge_freq": 10},
        },
    ],
    "scoring": {"immediate": True, "generated": False, "rows_per_batch": 64, "score_at": []},
    "chat_template": False,
    "engine": {
        "lanes": 4,
        "threads": 1,
        "shard_edits": 20,
        "step_edits": 10,
        "max_actors": 2,
        "max_failures": 1,
        "gpu_memory_gb": None,
        "resources": {"cpu": 1, "gpu": 0},
    },
    "ray": {"address": None, "connect_seconds": 5},
}
"""Every section, with every kind of value."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 10**6, -(10**30), 0.5, -0.0, 1e300, float("inf"), float("nan")),
    *(
        "",
        " ",
        "x",
        "../..",
        "/",
        "\x00",
        "ü😀",
        "a" * 5000,
        "null",
        "1",
        "embedded",
        "ft",
        "group",
        "cuda",
        "{{}}",
        "%s",
        "[bold]",
    ),
    *([], [[]], [None], [1, 1], [0], ["x", 2], {}, {"x": 1}, {"": None}, {1: 2}, [{"method": "ft"}]),
)
"""What people and programs write by mistake."""

Path_ = tuple[Any, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place inside a nest of mappings and lists."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from places(child, (*path, key))


def mutated(good: Any, rng: random.Random) -> tuple[Any, Path_, str]:
    """A copy with one fault; where it is, and the word that a message has to have."""
    raw = copy.deepcopy(good)
    path = rng.choice(list(places(raw)))
    here = raw
    for key in path[:-1]:
        here = here[key]
    last = path[-1]
    kind = rng.choice(["value", "value", "value", "drop", "rename", "add", "twice"])
    word = next((str(key) for key in reversed(path) if isinstance(key, str)), "")
    if kind == "drop":
        del here[last]
    elif kind == "rename" and isinstance(here, dict):
        word = f"{last}_{rng.randint(0, 9)}"
        here[word] = here.pop(last)
    elif kind == "add" and isinstance(here, dict):
        word = rng.choice(["extra", "T ", "лейн", "0", "name2"])
        here[word] = rng.choice(ODD)
    elif kind == "twice" and isinstance(here, list):
        here.append(copy.deepcopy(here[last]))
    else:
        here[last] = copy.deepcopy(rng.choice(ODD))
    return raw, path, word


def said_of(path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--results", str(folder / "none")])
    out = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), out.out + out.err


@pytest.mark.slow
@pytest.mark.parametrize("count", [500, pytest.param(SPECS, marks=pytest.mark.long)])
def test_mutated_specs(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["editsweep", "plan"])
    rng = random.Random(0)
    refused = 0
    path = tmp_path / "f.yaml"
    for i in range(count):
        raw, place, word = mutated(FULL, rng)
        path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
        code, text = said_of(path, capsys, tmp_path)
        context = (i, place, word, text[-2000:])
        assert code in (0, 2), context
        assert "Traceback" not in text, context
        if code == 2:
            refused += 1
            squeezed = "".join(text.split())  # a terminal wraps long lines
            assert "".join(word.split())[:40] in squeezed or str(place[0]) in squeezed, context
            assert not (tmp_path / "none").exists(), context
    assert refused > count / 3


@pytest.mark.slow
def test_spoiled_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes changed, cut out and put in: what is not YAML any more is refused by its place in the
    file."""
    rng = random.Random(1)
    good = yaml.safe_dump(FULL).encode()
    path = tmp_path / "f.yaml"
    for i in range(300):
        text = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
        path.write_bytes(bytes(text))
        code, said = said_of(path, capsys, tmp_path)
        assert code in (0, 2), (i, bytes(text), said)
        assert "Traceback" not in said, (i, said)
        assert code == 0 or "f.yaml" in "".join(said.split()), (i, said)


@pytest.mark.parametrize("kind", sorted(RAW))
def test_mutated_records(kind: str, tmp_path: Path) -> None:
    rng = random.Random(2)
    good = RAW[kind][:6]
    path = tmp_path / "records"
    refused = 0
    for i in range(RECORDS):
        number = rng.randrange(len(good))
        records = copy.deepcopy(good)
        records[number], place, _ = mutated(records[number], rng)
        write(path, kind, records)
        try:
            load_dataset(kind, path)
        except DataError as error:
            refused += 1
            text = str(error)
            context = (i, number, place, json.dumps(records[number])[:500], text)
            assert str(path) in text, context
            assert re.search(rf"(record|line) {number + 1}\b.*: ", text), context
            assert "field `" in text or "expected" in text, context
    assert refused > RECORDS / 10
