"""`plan` says what `run` would trip over, all at once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.engine.local import run_local
from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.checks import LINES
from orchestrator.planning.inputs import measure_texts, read_inputs
from orchestrator.planning.plan import Plan, Planner, make_plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.select import select
from orchestrator.storage.local import LocalStore
from tests.engine import Recorder
from tests.small import GOLDEN, build_inputs, golden_requests, random_model
from workers.data.needs import ELSEWHERE, SUBJECT, UNRELATED, Need
from workers.data.tinyworld import assets_dir
from workers.methods import get_method, load_config, method_names
from workers.methods.base import LaneEdit, MethodConfig
from workers.methods.families.hypernet import HypernetConfig
from workers.model.config import ModelConfig
from workers.rng import RandomStreams
from workers.types import DataError, EditRequest, EditSweepError, ModelError

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
    view = Recorder()
    outcome = run_sweep(spec, LocalStore(tmp_path / "r"), run_local, view)
    [warning] = [text for text in view.warnings if "requests" in text]
    assert warning.endswith("T=1: 2 of 4") and len(outcome.failed_groups) == 2
    assert {failure["group"] for failure in outcome.failed_groups} == {0, 2}


def test_an_impossible_cell_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, half(4), methods=["wise"], grid={"T": [4]})
    with pytest.raises(EditSweepError, match="no group can be edited"):
        run_sweep(spec, LocalStore(tmp_path / "r"), run_local, Recorder())
    assert not (tmp_path / "r").exists() or not any((tmp_path / "r").iterdir())


LACKING: Mapping[Need, EditRequest] = {
    UNRELATED: replace(golden_requests(1)[0], unrelated=None),
    SUBJECT: replace(golden_requests(1)[0], subject="Somebody Else"),
}


def editable(name: str) -> MethodConfig | None:
    """The method's config for the embedded model; None if its networks are trained first."""
    kind = get_method(name)
    return None if kind.needs_pretraining else load_config(name, {}, None, ModelConfig())


@pytest.mark.parametrize("need", LACKING, ids=["unrelated", "subject"])
@pytest.mark.parametrize("name", [name for name in method_names() if editable(name) is not None])
def test_what_a_config_declares_is_what_an_edit_needs(name: str, need: Need) -> None:
    """An edit of a request that lacks it raises exactly where the config says so."""
    from workers.model.base import BaseModel

    base = BaseModel.load(ModelConfig(device="cpu"))
    config = load_config(name, short_edits(name), None, ModelConfig())
    inputs = build_inputs(base, name, config)
    method = get_method(name).prepare(base, config, inputs)
    streams = RandomStreams(name, config.model_dump(mode="json"), 0, 0, 0)
    edit = [LaneEdit((LACKING[need],), streams, inputs)]
    if need in config.needs:
        with pytest.raises(DataError, match=f"case {LACKING[need].case_id}: .*"):
            method.edit(method.new_overlay(1), edit)
    else:
        method.edit(method.new_overlay(1), edit)


def short_edits(name: str) -> dict[str, Any]:
    """Hyperparameters that make an edit and its artifacts short."""
    fields = get_method(name).Config.model_fields
    short = {"num_steps": 1, "n_iter": 1, "v_num_grad_steps": 2, "samples": 200, "num_iterations": 1}
    return {key: value for key, value in short.items() if key in fields}
