"""Input that cannot be right is refused with one message, before anything is written: on the
command line (exit code 2) and in Python (EditSweepError)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import editsweep
from orchestrator.cli.main import main
from workers.methods import get_method, method_names

RAW: dict[str, Any] = {
    "name": "refused",
    "model": {"name": "embedded", "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 2},
    "grid": {"T": [1, 2], "seeds": [0]},
    "methods": [{"method": "ft", "hparams": {"num_steps": 2}}],
    "scoring": {"generated": False},
}
SAMPLE = Path(__file__).parent / "data" / "zsre_mend_eval_sample.json"
Told = Callable[..., str]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(RAW), encoding="utf-8")
    return path


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Told:
    """Calls the command, which must end with exit code 2, and returns what it says."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        out, err = capfd.readouterr()
        assert ended.value.code == 2, out + err
        assert "Traceback" not in err
        return " ".join(err.split())

    return call


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    (folder / "s.yaml").write_text(yaml.safe_dump(RAW), encoding="utf-8")
    outcome = editsweep.run(folder / "s.yaml", folder / "r", engine="local")
    assert outcome.exit_code == 0
    return folder / "r"


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(editsweep.EditSweepError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --- Python ---------------------------------------------------------------------------------


def test_python_refuses_another_engine_or_number_of_actors(spec: Path, tmp_path: Path) -> None:
    for engine in ("foo", "", None):
        wrong: Any = engine
        refused(lambda: editsweep.run(spec, "r", engine=wrong), "engine", repr(engine), "ray or local")  # noqa: B023
    for actors in (0, -1, "2", True, 1.5):
        number: Any = actors
        refused(
            lambda: editsweep.run(spec, "r", engine="local", max_actors=number),  # noqa: B023
            "max_actors: expected a whole number of at least 1",
            repr(actors),
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize("wrong", [5, {"name": "x"}, None, [1]])
def test_python_refuses_a_spec_of_another_type(wrong: Any) -> None:
    for call in (editsweep.plan, editsweep.run):
        refused(lambda: call(wrong), "spec: expected the path of a YAML file or a SweepSpec", repr(wrong))  # noqa: B023


@pytest.mark.parametrize("wrong", ["grid.T=[1]", [1], 5])
@pytest.mark.parametrize("name", ["overrides", "only"])
def test_python_refuses_one_text_for_a_list(spec: Path, name: str, wrong: Any) -> None:
    for call in (editsweep.plan, editsweep.run):
        function: Any = call
        refused(lambda: function(spec, "r", **{name: wrong}), f"{name}: expected a list", repr(wrong))  # noqa: B023


def test_python_refuses_a_folder_or_a_question_of_another_type(spec: Path, results: Path) -> None:
    no_path: Any
    for no_path in (5, ["a"], b"x"):
        refused(lambda: editsweep.open_results(no_path), "results folder", repr(no_path))  # noqa: B023
        refused(lambda: editsweep.plan(spec, no_path), "results folder", repr(no_path))  # noqa: B023
    refused(lambda: editsweep.plan(spec, ""), "the name of the results folder is empty")
    found = editsweep.open_results(results)
    nothing: Any = None
    refused(lambda: found.sql(nothing), "SQL: expected a text, found None")
    for read in (found.to_pandas, found.table):
        refused(lambda: read("method"), "expected a list of names, as in ['method']")  # noqa: B023
    for limit in (float("inf"), float("nan"), 0.0, -1.0, 1e300):
        refused(lambda: found.sql("SELECT 1", limit), "time_limit", "positive, finite")  # noqa: B023


# --- the command line -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["1e400", "inf", "nan", "1e300", "-1", "0"])
def test_a_time_limit_is_finite(told: Told, results: Path, limit: str) -> None:
    assert "--time-limit" in told("query", results, "SELECT 1", "--time-limit", limit)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_hyperparameter_is_finite(told: Told, spec: Path, tmp_path: Path, command: str, value: str) -> None:
    said = told(command, spec, "--set", f"methods.0.hparams.lr={value}")
    for word in ("s.yaml", "methods: ft", "lr: expected a finite number", value[-3:]):
        assert word in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize(("hparam", "value"), [("num_steps", "true"), ("num_steps", "'3'"), ("lr", "'1e-4'")])
def test_a_hyperparameter_is_written_as_a_number(told: Told, spec: Path, hparam: str, value: str) -> None:
    said = told("plan", spec, "--set", f"methods.0.hparams.{hparam}={value}")
    assert f"{hparam}: expected a" in said
    assert "number, found" in said


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("methods.0.hparams.num_steps", 1_000_000),
        ("scoring.fluency_tokens", 10_000),
        ("scoring.extra_tokens", 10_000),
        ("engine.threads", 1024),
        ("engine.max_actors", 100_000),
        ("engine.max_failures", 1000),
    ],
)
def test_a_number_that_is_far_too_large(told: Told, spec: Path, field: str, most: int) -> None:
    said = told("plan", spec, "--set", f"{field}=1000000000")
    assert f"{field.rsplit('.', 1)[-1]}: expected at most {most}, found 1000000000" in said


def test_every_number_of_steps_has_a_bound() -> None:
    for name in method_names():
        for field, about in get_method(name).Config.model_fields.items():
            if "steps" in field or field.endswith("_iter"):
                assert any(getattr(limit, "le", None) for limit in about.metadata), f"{name}: {field}"


def test_a_picture_that_cannot_be_written(told: Told, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "d.svg").mkdir()
    for picture in ("/proc/d.svg", tmp_path / "d.svg"):
        assert f"--plot {picture}: cannot write" in told("report", results, "--plot", picture)


@pytest.mark.parametrize("address", ["gs://h", "ray://h:1", "''", "h"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_cluster_is_checked_with_the_spec(
    told: Told, spec: Path, tmp_path: Path, command: str, address: str
) -> None:
    said = told(command, spec, "--set", f"ray.address={address}")
    assert "s.yaml (with --set): ray.address: " in said
    assert "is not host:port or auto" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("command", ["run", "artifacts"])
def test_a_gpu_that_is_not_there_is_missed_before_anything_is_written(
    told: Told, spec: Path, tmp_path: Path, engine: str, command: str
) -> None:
    said = told(command, spec, "--engine", engine, "--set", "model.device=cuda")
    assert "s.yaml: this machine: model.device is cuda, but torch finds no GPU there" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.yaml"]


def test_an_empty_name_of_a_folder(told: Told, spec: Path) -> None:
    for arguments in (("run", spec, "--results", ""), ("plan", spec, "--results", ""), ("status", "")):
        assert "the name of the results folder is empty" in told(*arguments)


def test_folders_where_files_are_meant(told: Told, spec: Path, tmp_path: Path) -> None:
    said = told("run", tmp_path)
    assert f"{tmp_path}: is a folder, expected a spec file" in said
    assert "Errno" not in said
    said = told("plan", spec, "--set", "methods.0.hparams_file=.")
    assert f"hparams_file: {tmp_path}: is a folder, expected a file" in said
    assert "Errno" not in said


# --- messages name the field ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("nowhere.json", "nowhere.json: no such file"),
        ("empty.json", "empty.json: the list of records is empty"),
        ("folder", "folder: is a folder"),
        ("bad.json", "bad.json, record 1: "),
    ],
)
def test_a_data_file_is_named_with_its_field(
    told: Told, spec: Path, tmp_path: Path, file: str, says: str
) -> None:
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.json").write_text('[{"src": 3}]')
    (tmp_path / "good.json").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "folder").mkdir()
    where = f"{tmp_path}/{says}"
    for field, changes in (
        ("dataset.path", [f"dataset={{kind: zsre, path: {file}, edits: 2}}"]),
        ("dataset.train_path", [f"dataset={{kind: zsre, path: good.json, train_path: {file}, edits: 2}}"]),
        ("training.path", ["methods=[mend]", f"training={{kind: zsre, path: {file}}}"]),
    ):
        said = told("plan", spec, *(part for change in changes for part in ("--set", change)))
        assert f" {field}: {where}" in said, said


def test_the_held_out_text_is_named_with_its_field(told: Told, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for file, says in (
        (".", ": is a folder"),
        ("no.txt", "/no.txt: no such file"),
        ("empty.txt", "/empty.txt: "),
    ):
        said = told("plan", spec, "--set", f"scoring.ability_text={file}")
        assert f"s.yaml: scoring.ability_text: {tmp_path}{says}" in said, said


def test_a_file_that_is_not_given_or_not_taken_is_named_with_its_section(told: Told, spec: Path) -> None:
    assert "s.yaml: dataset.path: data set 'zsre'" in told(
        "plan", spec, "--set", "dataset={kind: zsre, edits: 2}"
    )
    for changes, says in (
        (
            ["dataset={kind: tinyworld, path: x, edits: 2}"],
            "s.yaml: dataset: data set 'tinyworld' does not take",
        ),
        (
            ["methods=[mend]", "training={kind: tinyworld, path: x}"],
            " training: data set 'tinyworld' does",
        ),
        (["methods=[mend]", "training={kind: zsre}"], " training.path: data set 'zsre'"),
    ):
        assert says in told("plan", spec, *(part for change in changes for part in ("--set", change)))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_other_scoring_settings_name_the_spec(told: Told, spec: Path, results: Path, command: str) -> None:
    said = told(command, spec, "--results", results, "--set", "scoring.extra_tokens=9")
    assert "s.yaml: scoring: the cells in" in said
    refused(lambda: editsweep.plan(spec, results, overrides=["scoring.extra_tokens=9"]), "s.yaml: scoring: ")


# --- what is said, and true -----------------------------------------------------------------


def test_a_mark_that_no_group_reaches_is_a_warning(spec: Path) -> None:
    def warnings(*overrides: str) -> str:
        return " ".join(editsweep.plan(spec, "r", overrides=overrides).warnings)

    told = "scoring.score_at: 3, 100 is never reached: no state has more than 2 edits"
    assert f"{told} (grid.T)" in warnings("scoring.score_at=[1,3,100]")
    assert f"{told} (dataset.edits)" in warnings("scoring.score_at=[3,100]", "grid.rollback=never")
    assert warnings("scoring.score_at=[1,2]") == warnings("scoring.score_at=[2]", "grid.rollback=never") == ""
    assert "3 is never reached" not in warnings("scoring.score_at=[3]", "dataset.edits=4", "grid.T=[1,4]")
    part = ["scoring.score_at=[3]", "dataset.edits=4", "grid.T=[1,4]", "methods=[{method: ft, T: 1}]"]
    assert "3 is never reached: no state has more than 1 edits" in warnings(*part)


def test_values_of_a_condition_are_listed_in_order(told: Told, spec: Path, results: Path) -> None:
    grid = ("--set", "dataset.edits=100", "--set", "grid.T=[100,20,5]", "--set", "grid.seeds=[10,9]")
    assert "there are T: 5, 20, 100; seed: 9, 10" in told("plan", spec, *grid, "--only", "T=7,seed=1")
    assert "there are T: 1, 2" in told("forget", results, "--cells", "T=5", "--yes")


@pytest.mark.parametrize("command", ["plan", "run", "forget"])
def test_help_says_what_a_repeated_key_means(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "a key given twice fits either value" in " ".join(capfd.readouterr().out.split())


def test_an_empty_hyperparameter_file(told: Told, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("# nothing\n")
    said = told("plan", spec, "--set", "methods.0.hparams_file=h.yaml")
    assert f"hparams_file: {tmp_path}/h.yaml: expected a mapping, found nothing" in said


def test_one_thing_is_singular(spec: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (["plan", str(spec), "--set", "grid.T=[2]"], "1 cell, 1 shard, 2 edits to make"),
        (["plan", str(spec), "--set", "grid.T=[1]", "--set", "dataset.edits=1"], "1 edit to make"),
        (["plan", str(spec)], "2 cells, "),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert says in capfd.readouterr().out


def test_artifacts_that_others_are_built_from_are_told_apart(
    spec: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(spec), "--set", "methods=[mend]", "--set"]
    for shards, says in (
        (
            "[]",
            "1 needed (pretrained), 0 present, 2 to be built, 1 of them because others are built from it\n",
        ),
        (
            "[4, 4]",
            "1 needed (pretrained), 0 present, 3 to be built, 2 of them because others are built from them\n",
        ),
    ):
        with pytest.raises(SystemExit):
            main([*plan, f"training.shards={shards}"])
        assert says in capfd.readouterr().out
