"""EasyEdit hyperparameter files: every key is used, compared with the sweep, or named in a warning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from editsweep.view import LogView
from orchestrator.engine.sweep import engine_named, run_sweep
from orchestrator.planning.hparams_files import compare, warnings_of_files
from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.storage.local import LocalStore
from workers.inputs import parse_yaml
from workers.methods import get_method, load_config, load_method, method_names
from workers.methods.easyedit import IGNORED, SWEEP_KEYS
from workers.model.base import model_shape
from workers.model.config import ModelConfig
from workers.types import SpecError

WISE = """
alg_name: WISE
edit_lr: 1.0
n_iter: 5
act_margin: [5.0, 20.0, 10.0]
inner_params: ["model.layers[3].mlp.down_proj.weight"]
retrieve: true
replay: false
"""
FT = """
alg_name: FT
layers: [3]
num_steps: 3
objective_optimization: target_new
rewrite_module_tmp: "model.layers.{}.mlp.down_proj.weight"
"""
ULTRAEDIT = """
alg_name: ULTRAEDIT
inner_params: [model.layers.3.mlp.down_proj]
lr: 1e-6
token: mask
batch_size_once: 10
"""
MEMIT = """
alg_name: MEMIT
layers: [3]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
"""
MEND_TRAINING = """
alg: MEND
inner_params: [model.layers.3.mlp.down_proj.weight]
accumulate_bs: 10
max_iters: 100
"""
SIMIE = "alg_name: SimIE\nbase_method: ROME\n"
MELO = """
alg_name: MELO
grace: {num_iter: 5, init_radius: 0.5, num_block: 4, num_rank_per_block: 2, edit_lr: 0.001, reg: early_stop}
model: {target_modules: [transformer.h.3.mlp.c_fc], grace_layer: transformer.h.2.mlp.c_fc}
lora: {cls_name: distilbert}
"""


SERAC_TRAINING = """
alg: SERAC
small_name: ./small
cls_name: ./cls
max_iters: 100000
accumulate_bs: 10
"""
LORA = """
alg_name: LoRA
layers: [3]
rank: 8
num_steps: 5
lr: 1e-3
kl_factor: 0
norm_constraint: false
lora_type: lora
"""
MALMEN = """
alg: MALMEN
inner_params: [model.layers.3.mlp.down_proj.weight]
n_edits: 4
token: mask
max_iters: 100
"""
FILES = {
    "wise": WISE,
    "ft": FT,
    "ultraedit": ULTRAEDIT,
    "memit": MEMIT,
    "mend": MEND_TRAINING,
    "malmen": MALMEN,
    "serac": SERAC_TRAINING,
    "lora": LORA,
    "simie": SIMIE,
    "melo": MELO,
}


def spec_of(*methods: Any, **changes: Any) -> SweepSpec:
    raw: dict[str, Any] = {
        "name": "p",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 100},
        "grid": {"T": [10, 100], "seeds": [0]},
        "methods": list(methods),
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = raw
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = value
    return parse_spec(yaml.safe_dump(raw), "p.yaml", Path("/"))


def written(folder: Path, text: str, *more: str) -> str:
    path = folder / "file.yaml"
    path.write_text("\n".join((text, *more)))
    return str(path)


def warnings(spec: SweepSpec) -> list[str]:
    """What is said about the file of a sweep's only method."""
    method = spec.methods[0]
    assert method.hparams_file is not None
    _, remarks = load_method(method.method, method.hparams, method.hparams_file, spec.model)
    assert remarks is not None
    found = compare(spec, 0, remarks, model_shape(ModelConfig()), get_method(method.method).whole_group)
    return warnings_of_files(spec, [found])


# --- what contradicts the sweep ---


@pytest.mark.parametrize(
    ("method", "text", "line", "changes", "said"),
    [
        ("wise", WISE, "use_chat_template: true", {}, ["use_chat_template: true", "chat_template: false"]),
        (
            "ultraedit",
            ULTRAEDIT,
            "batch_size: 100",
            {},
            ["batch_size: 100", "grid.batch_size: 1", "methods.0"],
        ),
        ("ft", FT, "batch_size: 1", {"grid__batch_size": 10}, ["batch_size: 1,", "grid.batch_size: 10"]),
        ("ft", FT, "batch_size: many", {}, ["batch_size: 'many' is not valid"]),
        ("ultraedit", ULTRAEDIT, "half: true", {}, ["half: true", "model.dtype: float32", "float16 or bf"]),
        ("ft", FT, "fp16: true", {"model__dtype": "bfloat16"}, ["fp16: true", "dtype: bfloat16", "float16"]),
        ("ft", FT, "fp16: false", {"model__dtype": "float16"}, ["fp16: false", "dtype: float16"]),
        ("ft", FT, "fp16: some", {}, ["fp16: 'some' is not valid; choose true or false"]),
    ],
)
def test_a_contradiction_names_both(
    tmp_path: Path, method: str, text: str, line: str, changes: dict[str, Any], said: list[str]
) -> None:
    path = written(tmp_path, text, line)
    with pytest.raises(SpecError) as caught:
        read_inputs(spec_of({"method": method, "hparams_file": path}, **changes))
    for part in (*said, path, f"methods: {method}"):
        assert part in str(caught.value)


def test_all_contradictions_of_a_file_are_said_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, FT, "batch_size: 3", "fp16: true", "use_chat_template: true")
    with pytest.raises(SpecError) as caught:
        read_inputs(spec_of({"method": "ft", "hparams_file": path}))
    assert all(key in str(caught.value) for key in ("batch_size: 3", "fp16: true", "use_chat_template: true"))


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("use_chat_template: true", {"chat_template": True}),
        ("use_chat_template: false", {}),
        ("use_chat_template: null", {"chat_template": True}),
        ("batch_size: 10", {"grid__batch_size": 10}),
        ("batch_size: 1", {}),
        ("fp16: true", {"model__dtype": "float16"}),
        ("fp16: false", {"model__dtype": "float64"}),
        ("half: true", {"model__dtype": "bfloat16"}),
        ("model_parallel: false", {}),
    ],
)
def test_what_agrees_is_not_mentioned(tmp_path: Path, line: str, changes: dict[str, Any]) -> None:
    path = written(tmp_path, FT, line)
    assert warnings(spec_of({"method": "ft", "hparams_file": path}, **changes)) == []


@pytest.mark.parametrize("key", ["alg_name", "alg"])
def test_a_file_of_another_method(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, "", f"{key}: ROME", "layers: [3]", "objective_optimization: target_new")
    with pytest.raises(SpecError, match=f"{key}: 'ROME' is another method; expected FT"):
        load_config("ft", {}, Path(path), ModelConfig())
    with pytest.raises(SpecError, match=f"{key}: 'ROME' is another method; this one has no files"):
        load_config("ft-ewc", {}, Path(path), ModelConfig())


# --- what a file leaves open ---

ROMES_LAYOUT = """{
 "layers": [3], "num_steps": 25, "lr": 0.0005, "weight_decay": 0, "kl_factor": 0, "norm_constraint": false,
 "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "layer_module_tmp": "model.layers.{}"
}"""


def test_an_ft_file_without_objective(tmp_path: Path) -> None:
    path = Path(written(tmp_path, ROMES_LAYOUT))
    with pytest.raises(
        SpecError, match=r"objective_optimization: the file does not say it.*FT-L.*`objective`"
    ):
        load_config("ft", {}, path, ModelConfig())
    for objective in ("prompt_last", "target_new"):
        config = load_config("ft", {"objective": objective}, path, ModelConfig()).model_dump()
        assert (config["objective"], config["layers"]) == (objective, (3,))


def test_an_ft_file_without_objective_below_simie(tmp_path: Path) -> None:
    for name, text in (("SimIE", "base_method: FT\n"), ("FT", ROMES_LAYOUT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.yaml").write_text(text)
    path = tmp_path / "SimIE" / "m.yaml"
    with pytest.raises(SpecError, match=r"base: ft.*objective_optimization: the file does not say it"):
        load_config("simie", {}, path, ModelConfig())


def test_simies_base_takes_what_hparams_leave_open_from_its_file(tmp_path: Path) -> None:
    for name, text in (("SimIE", "base_method: FT\n"), ("FT", ROMES_LAYOUT)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.yaml").write_text(text)
    path = tmp_path / "SimIE" / "m.yaml"
    given = {"base": {"objective": "prompt_last", "num_steps": 7}}
    base = load_config("simie", given, path, ModelConfig()).model_dump()["base"]
    assert (base["objective"], base["num_steps"], base["layers"]) == ("prompt_last", 7, [3])
    other = {"base_method": "rome", "base": {"layer": 2}}
    config = load_config("simie", other, path, ModelConfig()).model_dump()
    assert (config["base_method"], config["base"]["layer"]) == ("rome", 2)


# --- what is not followed ---


@pytest.mark.parametrize(
    ("method", "text", "line", "changes", "said"),
    [
        ("wise", WISE, "model_parallel: true", {}, "model_parallel: true is not followed"),
        ("wise", WISE, "load_path: wise.pt", {}, "load_path: 'wise.pt' is not followed"),
        ("ft", FT, "fp16: false", {"model__dtype": "bfloat16"}, "fp16: false is not followed"),
        ("memit", MEMIT, "mom2_dataset: wikipedia", {}, "mom2_dataset: 'wikipedia' is not followed"),
        ("memit", MEMIT, "v_loss_layer: 4", {}, "v_loss_layer: 4 is not followed"),
        ("memit-mass", MEMIT, "batch_size: 10", {}, "batch_size: 10 is not followed"),
        ("mend", MEND_TRAINING, "archive: ./mend.pt", {}, "archive: './mend.pt' is not followed"),
        ("mend", MEND_TRAINING, "seed: 0", {}, "seed: 0 is not followed"),
        ("mend", MEND_TRAINING, "early_stop_patience: 9", {}, "early_stop_patience: 9 is not followed"),
        ("mend", MEND_TRAINING, "batch_size: 10", {}, "batch_size: 10 is not followed"),
    ],
)
def test_a_value_that_is_not_followed_is_named(
    tmp_path: Path, method: str, text: str, line: str, changes: dict[str, Any], said: str
) -> None:
    path = written(tmp_path, text, line)
    found = warnings(spec_of({"method": method, "hparams_file": path}, **changes))
    assert [f"{method}: file.yaml: {said}" in warning for warning in found] == [True]


def test_the_last_layers_loss_is_what_memit_reads(tmp_path: Path) -> None:
    last = model_shape(ModelConfig()).layers - 1
    path = written(tmp_path, MEMIT, f"v_loss_layer: {last}")
    assert warnings(spec_of({"method": "memit", "hparams_file": path})) == []


def test_keys_that_no_number_depends_on_are_named_once(tmp_path: Path) -> None:
    path = written(tmp_path, FT, "device: 3", "model_name: ./m", "max_length: 40")
    spec = spec_of(
        {"method": "ft", "hparams_file": path},
        {"method": "ft", "label": "again", "hparams_file": path, "hparams": {"num_steps": 4}},
    )
    [line] = [w for w in make_plan(spec).warnings if "hyperparameter files" in w]
    assert line.endswith(": device, max_length, model_name")


def test_a_base_methods_file_counts_too(tmp_path: Path) -> None:
    for name, text in (("SimIE", SIMIE), ("ROME", "layers: [3]\nfp16: true\nmom2_dataset: wiki\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.yaml").write_text(text)
    spec = spec_of({"method": "simie", "hparams_file": str(tmp_path / "SimIE" / "m.yaml")})
    with pytest.raises(SpecError, match=r"fp16: true, but the sweep has model\.dtype: float32"):
        warnings(spec)
    (tmp_path / "ROME" / "m.yaml").write_text("layers: [3]\nmom2_dataset: wiki\n")
    assert "ROME: mom2_dataset: 'wiki' is not followed" in warnings(spec)[0]


def test_melos_sections(tmp_path: Path) -> None:
    path = Path(written(tmp_path, MELO, "use_chat_template: true"))
    _, remarks = load_method("melo", {}, path, ModelConfig(name="some/model"))
    assert remarks is not None
    assert remarks.sweep == {"use_chat_template": True}
    assert set(remarks.neutral) == {"grace.reg", "lora.cls_name"}
    path.write_text(MELO.replace("num_iter", "num_iters"))
    with pytest.raises(SpecError, match=r"grace\.num_iters: has no meaning"):
        load_config("melo", {}, path, ModelConfig(name="some/model"))


@pytest.mark.parametrize("name", method_names())
def test_no_key_that_is_put_aside_goes_unmentioned(name: str) -> None:
    config = get_method(name).Config
    if name == "melo":  # has sections
        return
    aside = {key for key, ours in config._easyedit_table().items() if ours == IGNORED}
    assert set(SWEEP_KEYS) <= aside
    for key in aside - {"alg_name", "alg"} - set(config.easyedit_off):
        remarks = config.easyedit_remarks({key: "x"}, "nowhere/a/b.yaml")
        assert key in {*remarks.sweep, *remarks.lost, *remarks.neutral}, key


WRONG: tuple[Any, ...] = (
    None,
    True,
    "many",
    -1,
    0,
    1.5,
    [],
    ["a"],
    [1],
    {},
    {"a": 1},
    [[1, 2]],
    [None],
    10**30,
)


@pytest.mark.parametrize("name", FILES)
def test_any_value_is_read_or_refused_in_words(name: str, tmp_path: Path) -> None:
    path, told = tmp_path / "file.yaml", yaml.safe_load(FILES[name])
    places = [(key,) for key in told]
    places += [(key, inner) for key, value in told.items() if isinstance(value, dict) for inner in value]
    refused = 0
    for place in places:
        for value in WRONG:
            changed = yaml.safe_load(FILES[name])
            here = changed
            for key in place[:-1]:
                here = here[key]
            here[place[-1]] = value
            path.write_text(yaml.safe_dump(changed))
            try:
                load_method(name, {}, path, ModelConfig(name="some/model"))
            except SpecError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 2 * len(places)


def test_a_file_of_a_model_of_images_is_refused_as_such(tmp_path: Path) -> None:
    path = written(tmp_path, SERAC_TRAINING.replace("SERAC", "SERAC_MULTI"), "coco_image: ../", "name: opt")
    with pytest.raises(SpecError, match=r"coco_image: the file is for a model of images and text"):
        load_config("serac", {}, Path(path), ModelConfig(name="some/model"))


def test_a_key_is_a_word(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"file\.yaml: expected a mapping of hyperparameters"):
        load_config("ft", {}, Path(written(tmp_path, FT, "1: 2")), ModelConfig(name="some/model"))


@pytest.mark.parametrize(
    ("lines", "steps", "batch"),
    [
        (("max_iters: 100000", "accumulate_bs: 10"), 10_000, 10),
        (("max_iters: 500",), 50, 10),
        (("accumulate_bs: 4",), 25_000, 4),
        ((), 10_000, 10),
    ],
)
def test_the_length_of_seracs_training_is_the_files(
    lines: tuple[str, ...], steps: int, batch: int, tmp_path: Path
) -> None:
    """And it is not named among what no number depends on."""
    path = Path(written(tmp_path, "alg: SERAC\nsmall_name: ./small", *lines))
    config, remarks = load_method("serac", {}, path, ModelConfig(name="some/model"))
    schedule: Any = config.model_dump()["schedule"]
    assert (schedule["steps"], schedule["batch_size"]) == (steps, batch)
    assert remarks is not None and not {"max_iters", "accumulate_bs"} & set(remarks.neutral)


# --- batch sizes of variants ---


def jobs(plan: Plan, label: str) -> list[Any]:
    found = [plan.manifest(shard).job for shard in plan.shards if plan.variants[shard.variant].label == label]
    return [job.model_copy(update={"waves": ()}) for job in found]


def ids(plan: Plan, label: str) -> list[str]:
    return [cell.cell_id for cell in plan.cells if plan.variants[cell.variant].label == label]


def test_each_variant_has_its_own_batch_size() -> None:
    mixed = make_plan(spec_of("grace", {"method": "ft", "batch_size": 10}))
    ones, tens = make_plan(spec_of("grace", "ft")), make_plan(spec_of("ft", grid__batch_size=10))
    assert ids(mixed, "grace") == ids(ones, "grace")
    assert ids(mixed, "ft") == ids(tens, "ft") != ids(ones, "ft")
    assert jobs(mixed, "ft") == jobs(tens, "ft")
    assert {job.batch_size for job in jobs(mixed, "ft")} == {10}
    assert {job.batch_size for job in jobs(mixed, "grace")} == {1}
    assert {(c.variant, c.batch_size) for c in mixed.cells} == {(0, 1), (1, 10)}


def test_a_batch_size_that_is_the_grids_changes_no_identity() -> None:
    for size in (1, 10):
        told = make_plan(spec_of({"method": "ft", "batch_size": size}, grid__batch_size=size))
        untold = make_plan(spec_of("ft", grid__batch_size=size))
        assert ids(told, "ft") == ids(untold, "ft")
        assert told.variants == untold.variants


def test_one_setting_in_two_batch_sizes() -> None:
    plan = make_plan(spec_of("ft", {"method": "ft", "label": "ft-10", "batch_size": 10}))
    assert not set(ids(plan, "ft")) & set(ids(plan, "ft-10"))
    with pytest.raises(SpecError, match="same settings"):
        make_plan(spec_of("ft", {"method": "ft", "label": "other", "batch_size": 1}))
    memit = [
        {"method": "memit-mass", "label": label, "batch_size": size} for label, size in (("a", 1), ("b", 10))
    ]
    with pytest.raises(SpecError, match="same settings"):  # it edits whole groups, whatever it is told
        make_plan(spec_of(*memit))


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ({"method": "ft", "batch_size": 3}, {}, "methods.0.batch_size: 3 does not divide T=10"),
        ({"method": "ft", "batch_size": 0}, {}, "methods.0.batch_size"),
        (
            {"method": "ft", "batch_size": 20, "T": [100]},
            {"scoring__score_at": [50]},
            "methods.0.batch_size=20",
        ),
    ],
)
def test_batch_sizes_that_do_not_fit(method: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(method, **changes)
    assert said in str(caught.value)


def test_a_method_that_edits_one_at_a_time_is_told_how_to_stay() -> None:
    with pytest.raises(SpecError, match=r"methods\.0\.batch_size: 10, but grace can edit only one"):
        make_plan(spec_of({"method": "grace", "batch_size": 10}))
    with pytest.raises(SpecError, match=r"grid\.batch_size: 10, but grace .* its own `batch_size`"):
        make_plan(spec_of("grace", "ft", grid__batch_size=10))
    make_plan(spec_of({"method": "grace", "batch_size": 1}, "ft", grid__batch_size=10))


def test_a_batch_size_of_the_variants_own_goes_before_the_files(tmp_path: Path) -> None:
    path = written(tmp_path, ULTRAEDIT, "batch_size: 100")
    fits = {"method": "ultraedit", "hparams_file": path, "T": [100], "batch_size": 100}
    assert warnings(spec_of(fits)) == []
    assert {cell.batch_size for cell in make_plan(spec_of("grace", fits)).cells if cell.variant == 1} == {100}
    for size in (1, 10):
        [said] = warnings(spec_of({**fits, "batch_size": size}))
        assert f"batch_size: 100 is not followed: methods.0.batch_size is {size}" in said


# --- keys given twice ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: 2\na: 1", {"a": 1, "b": 2}),
        ("a: [1, {b: 2}]\na: [1, {b: 2}]", {"a": [1, {"b": 2}]}),
        ("x: {a: text, a: text}", {"x": {"a": "text"}}),
    ],
)
def test_a_key_given_twice_with_one_value(text: str, value: Any) -> None:
    assert parse_yaml(text, "f.yaml") == value


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: 1\na: true", "a: 1\na: 1.0", "a: [1]\na: [1, 1]", "a: {b: 1}\na: {c: 1}"]
)
def test_a_key_given_twice_with_two_values(text: str) -> None:
    with pytest.raises(
        SpecError, match=r"f\.yaml: not valid YAML in line 2.*'a' appears twice, as .* and as "
    ):
        parse_yaml(text, "f.yaml")


# --- where it is said ---


def test_run_says_what_plan_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, FT, "load_path: there", "device: 3")
    spec = spec_of({"method": "ft", "hparams_file": path}, dataset__edits=1, grid__T=[1])
    expected = list(make_plan(spec).warnings)
    assert len(expected) == 2
    with caplog.at_level(logging.WARNING, logger="editsweep"):
        assert (
            run_sweep(
                spec, LocalStore(tmp_path / "results"), engine_named("local", spec), LogView()
            ).exit_code
            == 0
        )
    assert [record.message for record in caplog.records if record.name == "editsweep"] == expected
