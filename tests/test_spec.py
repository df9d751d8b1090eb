"""What a sweep spec accepts, and what it says about what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.planning.spec import SweepSpec, load_spec, parse_spec
from workers.inputs import MAX_BYTES, parse_yaml
from workers.methods import method_names
from workers.scoring.registry import SCORES
from workers.types import SpecError

ROOT = Path(__file__).resolve().parent.parent
GOOD: dict[str, Any] = {
    "name": "s",
    "model": {"name": "embedded"},
    "dataset": {"kind": "tinyworld", "edits": 50},
    "grid": {"T": [1, 10], "seeds": [0, 1]},
    "methods": ["ft", {"method": "wise", "label": "wise-merge", "hparams": {"retrieve": False}}],
}


def parse(text: str, overrides: tuple[str, ...] = (), base: Path = Path("/base")) -> SweepSpec:
    return parse_spec(text, source="s.yaml", base=base, overrides=overrides)


def changed(path: str, value: Any) -> str:
    raw = copy.deepcopy(GOOD)
    here = raw
    *parents, last = path.split(".")
    for key in parents:
        here = here.setdefault(key, {})
    here[last] = value
    return yaml.safe_dump(raw)


def refusal(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, overrides)
    return str(caught.value)


def test_defaults_and_labels() -> None:
    spec = parse(yaml.safe_dump(GOOD))
    assert [m.label for m in spec.methods] == ["ft", "wise-merge"]
    assert spec.grid.rollback == "group"
    assert spec.engine.max_failures == 2
    assert spec.methods[1].hparams == {"retrieve": False}


def test_round_trip() -> None:
    spec = parse(yaml.safe_dump(GOOD))
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec
    assert parse(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


@pytest.mark.parametrize(("name", "ft"), [("demo", "ft"), ("continual", "ft"), ("wise_table2", "ft-l")])
def test_specs_that_ship(name: str, ft: str) -> None:
    spec = load_spec(ROOT / "sweeps" / f"{name}.yaml")
    assert spec.name == name
    assert [m.label for m in spec.methods] == [ft, "rome", "grace", "wise-merge", "wise-retrieve"]


def test_one_sweep_has_every_method() -> None:
    spec = load_spec(ROOT / "sweeps" / "all_methods.yaml")
    assert {m.method for m in spec.methods} == set(method_names())


def test_automatic_lanes_need_declared_memory_on_a_gpu_only() -> None:
    auto = {"engine": {"lanes": "auto"}}
    for model, resources, on_gpu in (
        ({"device": "cpu"}, {"gpu": 1}, False),
        ({"device": "auto"}, {}, False),
        ({"device": "auto"}, {"gpu": 0.5}, True),
        ({"device": "cuda"}, {}, True),
    ):
        raw = {
            **GOOD,
            "model": {"name": "embedded", **model},
            "engine": {**auto["engine"], "resources": resources},
        }
        if on_gpu:
            message = refusal(yaml.safe_dump(raw))
            for word in ("engine.gpu_memory_gb", "required", "engine.lanes: auto", "80"):
                assert word in message
            raw["engine"]["gpu_memory_gb"] = 24
        spec = parse(yaml.safe_dump(raw))
        assert spec.engine.lanes == "auto"
        assert spec.on_gpu == on_gpu
        assert parse(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    raw = copy.deepcopy(GOOD)
    raw["dataset"] = {"kind": "zsre", "edits": 50, "path": "data/z.json"}
    raw["model"] = {"name": "./model"}
    raw["methods"] = [{"method": "rome", "hparams_file": "h.yaml"}]
    spec = parse(yaml.safe_dump(raw), base=tmp_path)
    assert spec.dataset.path == tmp_path / "data" / "z.json"
    assert spec.model.name == str(tmp_path / "model")
    assert spec.methods[0].hparams_file == tmp_path / "h.yaml"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gird", {}, ["gird", "unknown key", "'grid'", "methods"]),
        ("grid.seed", [0], ["grid.seed", "unknown key", "seeds"]),
        ("engine.resources.gpus", 1, ["engine.resources.gpus", "valid keys: cpu, gpu"]),
        ("dataset.edits", "many", ["dataset.edits", "whole number", "'many'"]),
        ("dataset.edits", 0, ["dataset.edits", "greater than or equal to 1"]),
        ("grid.T", [7], ["grid.T", "7 does not divide", "50", "5 and 10"]),
        ("grid.T", [100], ["grid.T", "100 is larger", "50"]),
        ("grid.T", [], ["grid.T"]),
        ("grid.T", [1, 1], ["grid.T", "twice"]),
        ("grid.T", [0], ["grid.T", "at least 1", "0"]),
        ("grid.seeds", [0, 0], ["grid.seeds", "twice: 0"]),
        ("grid.seeds", [-1], ["grid.seeds", "-1"]),
        ("grid.batch_size", 3, ["grid.batch_size", "3", "T=1"]),
        ("methods", [{"method": "ft", "T": [1, 5]}], ["methods.0.T", "5", "1, 10"]),
        ("grid.rollback", "always", ["grid.rollback", "'always'", "'group' or 'never'"]),
        ("dataset.order", "random", ["dataset.order", "'file' or 'shuffle'"]),
        ("model.dtype", "int8", ["model.dtype", "'int8'", "float32"]),
        ("methods", ["wise", {"method": "wise"}], ["'wise'", "2 times", "label"]),
        ("methods", [], ["methods"]),
        ("methods", [{"label": "x"}], ["methods.0.method", "required"]),
        ("methods", [{"method": "ft", "hparam": {}}], ["methods.0.hparam", "did you mean 'hparams'"]),
        ("name", "../up", ["name", "../up", "plain name"]),
        ("scoring.score_at", ["x"], ["scoring.score_at.0", "'x'"]),
        ("engine.lanes", 0, ["engine.lanes", "0 is not valid", "from 1 to 10000", "auto"]),
        ("engine.lanes", "many", ["engine.lanes", "'many' is not valid", "auto"]),
        ("engine.lanes", True, ["engine.lanes", "True is not valid", "auto"]),
        ("engine.lanes_across_seeds", "perhaps", ["engine.lanes_across_seeds", "'perhaps'"]),
        ("engine.gpu_memory_gb", 0, ["engine.gpu_memory_gb", "greater than 0"]),
    ],
)
def test_refusals_name_field_value_and_choices(path: str, value: Any, words: list[str]) -> None:
    message = refusal(changed(path, value))
    for word in ["s.yaml", *words]:
        assert word in message, message


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("grid.T", "abc", "grid.T: expected a number or a list of numbers, found 'abc'"),
        ("grid.T", True, "grid.T: expected a number or a list of numbers, found True"),
        ("grid.T", None, "grid.T: expected a number or a list of numbers, found nothing"),
        ("grid.T", ["2"], "grid.T: expected a whole number, found '2'"),
        ("grid.seeds", [True], "grid.seeds: expected a whole number, found True"),
        ("dataset.edits", True, "dataset.edits: expected a whole number, found True"),
        ("dataset.edits", "50", "dataset.edits: expected a whole number, found '50'"),
        ("dataset.edits", None, "dataset.edits: expected a whole number, found nothing"),
        ("engine.max_actors", True, "engine.max_actors: expected a whole number, found True"),
        ("engine.gpu_memory_gb", "80", "engine.gpu_memory_gb: expected a number, found '80'"),
        ("engine.gpu_memory_gb", float("inf"), "engine.gpu_memory_gb: expected a finite number, found inf"),
        ("engine.resources.cpu", float("nan"), "engine.resources.cpu: expected a finite number, found nan"),
        ("scoring.extra_tokens", "4", "scoring.extra_tokens: expected a whole number, found '4'"),
        ("scoring.fluency_tokens", True, "scoring.fluency_tokens: expected a whole number, found True"),
        ("methods", 5, "methods: expected a list, found 5"),
        ("methods", [], "methods: expected at least one entry, found []"),
        ("methods", [{"method": "ft", "hparams": 3}], "methods.0.hparams: expected a mapping, found 3"),
        ("dataset", "zsre", "dataset: expected a mapping with the fields kind, edits, order, path, "),
        ("engine", None, "engine: expected a mapping with the fields lanes, "),
        ("training", {"kind": "foo"}, "training.kind: 'foo' is not valid; choose tinyworld, "),
        ("ray.address", "", "ray.address: '' is not host:port or auto"),
        ("ray.address", "gs://h", "ray.address: 'gs://h' is not host:port or auto"),
        ("ray.address", "ray://h:1", "ray.address: 'ray://h:1' is not host:port or auto: Ray Client is not "),
        ("ray.address", "h:70000", "ray.address: 'h:70000' is not host:port or auto"),
    ],
)
def test_a_refusal_says_what_is_expected_in_plain_words(path: str, value: Any, line: str) -> None:
    message = refusal(changed(path, value))
    assert message.startswith(f"s.yaml: {line}"), message
    assert "\n" not in message


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example.org:6379", "[::1]:6379", None])
def test_addresses_of_a_cluster(address: str | None) -> None:
    assert parse(changed("ray.address", address)).ray.address == address


def test_a_whole_number_may_be_written_as_a_power_of_ten() -> None:
    spec = parse(yaml.safe_dump(GOOD), ("dataset.edits=1e2", "grid.T=[1e1, 1E2]", "engine.resources.cpu=2"))
    assert (spec.dataset.edits, spec.grid.T, spec.engine.resources.cpu) == (100, (10, 100), 2.0)
    assert parse(yaml.safe_dump(GOOD), ("grid.T=5e1",)).grid.T == (50,)


def test_every_fault_of_a_list_and_no_other_is_named() -> None:
    message = refusal(changed("methods", [{"method": "ft", "T": True, "hparam": 1}]))
    assert message.count("\n") == 2
    assert "methods.0.T: expected a number" in message
    assert "methods.0.hparam: unknown key" in message


def test_a_mark_lies_between_two_batches() -> None:
    raw = {**GOOD, "grid": {"T": [10], "batch_size": 5}, "scoring": {"score_at": [10, 12]}}
    assert "scoring.score_at: 12 lies within a batch of grid.batch_size=5 edits" in refusal(
        yaml.safe_dump(raw)
    )
    assert "nearest valid values are 10 and 15" in refusal(yaml.safe_dump(raw))


def test_missing_field_and_wrong_shape() -> None:
    raw = {k: v for k, v in GOOD.items() if k != "dataset"}
    assert "dataset: this field is required" in refusal(yaml.safe_dump(raw))
    assert "expected a mapping" in refusal("- 1\n- 2\n")
    assert "expected a mapping" in refusal("")


def test_missing_and_large_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: no such spec file"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match="is a folder, expected a spec file"):
        load_spec(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="at most"):
        load_spec(big)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(binary)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line"),
        ("a: 1\na: 2", "'a' appears twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: &a [*a]", "contains itself"),
        ("a: " + "[" * 200 + "]" * 200, "nested"),
        ("? [1, 2]\n: 3", "plain word"),
        ("a: 2020-13-45", "month"),
        ("a: 1\n---\nb: 2", "document"),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=r"s\.yaml") as caught:
        parse_yaml(text, "s.yaml")
    assert words in str(caught.value)


def test_a_nest_of_aliases_is_not_written_out() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(SpecError, match="aliases"):
        parse_yaml("\n".join(lines), "s.yaml")
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "s.yaml")["c"] == {"x": 1, "y": 2}


def test_numbers_in_scientific_notation() -> None:
    assert parse_yaml("[1e-4, 5E3, -2e+1, 1.5e-2]", "s.yaml") == [1e-4, 5e3, -20.0, 0.015]


def test_overrides() -> None:
    text = yaml.safe_dump(GOOD)
    spec = parse(
        text, ("grid.T=[1,50]", "engine.lanes=3", "methods.0.label=mine", "ray.address=auto", "grid.seeds=7")
    )
    assert spec.grid.T == (1, 50)
    assert spec.grid.seeds == (7,)
    assert spec.engine.lanes == 3
    assert spec.methods[0].label == "mine"
    assert spec.methods[0].method == "ft"
    assert spec.ray.address == "auto"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grid.T", "key=value"),
        ("=3", "key=value"),
        ("grid.X=3", "unknown key 'X'"),
        ("methods.9.label=a", "entries 0 to 1"),
        ("name.x=1", "has no fields"),
        ("grid.T=[1", "not valid YAML"),
        ("grid.T=[3]", "3 does not divide"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    message = refusal(yaml.safe_dump(GOOD), (override,))
    assert words in message
    assert "--set" in message


def test_scoring_identity_leaves_batching_out() -> None:
    one = parse(changed("scoring", {"rows_per_batch": 8, "requests_per_tick": 5}))
    other = parse(changed("scoring", {"generated": False}))
    plain = parse(yaml.safe_dump(GOOD))
    assert SCORES.identity(one.scoring) == SCORES.identity(plain.scoring)
    assert SCORES.identity(other.scoring) != SCORES.identity(plain.scoring)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1:30", "line 1.*'1:30' is a number to base 60; write it as a plain number"),
        ("a: 1:30.5", "base 60"),
        ("a: 59" + ":59" * 2000, "base 60"),
        ("a: 0x" + "f" * 5000, "too many digits"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!timestamp x", "a value that does not fit its tag"),
        ("a: !!int ''", "does not fit its tag|not valid YAML"),
        ("a: !!python/name:os.system", "not valid YAML in line 1"),
    ],
)
def test_values_that_are_not_what_they_look_like(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"s.yaml.*{said}") as refused:
        parse_yaml(text, "s.yaml")
    assert len(str(refused.value)) < 300


def test_other_numbers_are_what_they_were() -> None:
    text = "[1, -2, 0x1F, 0b11, 017, 1_000, 1.5, .5, 1e-4, .inf, -.INF, '1:30']"
    inf = float("inf")
    assert parse_yaml(text, "s.yaml") == [1, -2, 31, 3, 15, 1000, 1.5, 0.5, 1e-4, inf, -inf, "1:30"]
