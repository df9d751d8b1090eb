"""Nothing in a spec, a folder or a data file runs code: each attempt, and its refusal."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

import editsweep
from orchestrator.engine.worker import Worker
from orchestrator.planning.runtime_env import VARIABLES, is_secret, read_runtime_env
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results.query import write
from tests.engine import ROOT
from tests.small import GOLDEN
from workers import folders
from workers.data.tinyworld import assets_dir
from workers.methods import get_method, method_names
from workers.model.base import BaseModel, load_encoder, model_shape
from workers.model.config import ModelConfig
from workers.types import EditSweepError, ModelError, SpecError

RAW: dict[str, Any] = {
    "name": "untrusted",
    "model": {"name": "embedded", "device": "cpu"},
    "dataset": {"kind": "tinyworld", "edits": 2},
    "grid": {"T": [1]},
    "methods": [{"method": "ft", "hparams": {"num_steps": 1, "layers": [1]}}],
    "scoring": {"generated": False},
}


def spec_of(**changes: Any) -> SweepSpec:
    return parse_spec(yaml.safe_dump({**RAW, **changes}), "spec.yaml", Path.cwd())


# --- ray.runtime_env ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "py_executable",
        "container",
        "image_uri",
        "conda",
        "pip",
        "uv",
        "working_dir",
        "py_modules",
        "worker_process_setup_hook",
        "nsight",
        "rocprof_sys",
        "config",
        "java_jars",
        "mpi",
        "anything",
    ],
)
def test_a_spec_sets_variables_only(key: str) -> None:
    with pytest.raises(SpecError, match=f"ray.runtime_env: '{key}' is not for a spec") as caught:
        spec_of(ray={"runtime_env": {key: "x"}})
    assert "--runtime-env FILE" in str(caught.value) and "cluster file" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PATH",
        "HOME",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "PYTHONHOME",
        "BASH_ENV",
        "OMP_TOOL_LIBRARIES",
        "NCCL_NET_PLUGIN",
        "HF_MODULES_CACHE",
        "HF_HOME",
        "AWS_ENDPOINT_URL",
        "AWS_PROFILE",
        "HTTPS_PROXY",
        "PYTORCH_CUDA_ALLOC_CONF ",
        "aws_region",
        "RAY_RUNTIME_ENV_HOOK",
        "",
    ],
)
def test_a_spec_sets_variables_of_the_list_only(name: str) -> None:
    with pytest.raises(SpecError, match=r"ray.runtime_env: env_vars") as caught:
        spec_of(ray={"runtime_env": {"env_vars": {name: "x"}}})
    assert "--runtime-env FILE" in str(caught.value) and "HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("OMP_NUM_THREADS", "set engine.threads"),
        ("CUBLAS_WORKSPACE_CONFIG", "bits"),
        ("HF_TOKEN", "logs"),
        ("AWS_SECRET_ACCESS_KEY", "credentials"),
        ("AWS_ACCESS_KEY_ID", "credentials"),
        ("WANDB_API_KEY", "credentials"),
    ],
)
def test_variables_of_the_sweep_and_credentials(name: str, why: str) -> None:
    with pytest.raises(SpecError, match=f"ray.runtime_env: env_vars.{name}: ") as caught:
        spec_of(ray={"runtime_env": {"env_vars": {name: "1"}}})
    assert why in str(caught.value)


def test_harmless_variables_and_their_values() -> None:
    values = {"env_vars": {**dict.fromkeys(VARIABLES, "text"), "HF_HUB_OFFLINE": 1}}
    read = spec_of(ray={"runtime_env": values})
    assert read.ray.runtime_env == {"env_vars": {**dict.fromkeys(VARIABLES, "text"), "HF_HUB_OFFLINE": "1"}}
    assert all(reason for reason in VARIABLES.values())
    assert not any(map(is_secret, VARIABLES))
    assert spec_of(ray={"runtime_env": {}}).ray.runtime_env == spec_of().ray.runtime_env == {}
    for bad in (True, 1.5, [1], None):
        with pytest.raises(SpecError, match=r"env_vars.HF_HUB_OFFLINE: expected a text or a whole number"):
            spec_of(ray={"runtime_env": {"env_vars": {"HF_HUB_OFFLINE": bad}}})
    with pytest.raises(SpecError, match="env_vars: expected a mapping"):
        spec_of(ray={"runtime_env": {"env_vars": "LD_PRELOAD=x"}})


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("MY_PASSWORD", True),
        ("GITHUB_PAT", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("AZURE_STORAGE_KEY", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("RAY_AUTH_TOKEN_PATH", False),
    ],
)
def test_names_of_credentials(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_the_users_own_file_may_say_everything_but_credentials(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("working_dir: .\nenv_vars: {LD_PRELOAD: /lib/x.so, N: 1}\n")
    assert read_runtime_env(file) == {"working_dir": ".", "env_vars": {"LD_PRELOAD": "/lib/x.so", "N": "1"}}
    file.write_text("env_vars: {AWS_SECRET_ACCESS_KEY: x}\n")
    with pytest.raises(
        SpecError, match=r"--runtime-env .*env.yaml: env_vars.AWS_SECRET_ACCESS_KEY: credential"
    ):
        read_runtime_env(file)
    for text, why in [("- a", "expected a mapping"), ("a: [", "not valid YAML"), ("", "found nothing")]:
        file.write_text(text)
        with pytest.raises(SpecError, match=why):
            read_runtime_env(file)
    with pytest.raises(SpecError, match="no such file"):
        read_runtime_env(tmp_path / "missing")
    with pytest.raises(SpecError, match="is a folder, expected a file"):
        read_runtime_env(tmp_path)


def test_the_file_is_for_ray(call: Any, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(RAW))
    (tmp_path / "env.yaml").write_text("pip: [x]\n")
    words = ("run", tmp_path / "s.yaml", "--results", tmp_path / "r", "--runtime-env", tmp_path / "env.yaml")
    code, _, err = call(*words, "--engine", "local")
    assert code == 2 and "no effect with the local engine" in err
    assert not (tmp_path / "r").exists()
    with pytest.raises(EditSweepError, match="no effect with the local engine"):
        editsweep.run(spec_of(), tmp_path / "r", engine="local", runtime_env={"pip": ["x"]})
    with pytest.raises(EditSweepError, match=r"runtime_env: env_vars.HF_TOKEN: credentials"):
        editsweep.run(spec_of(), tmp_path / "r", runtime_env={"env_vars": {"HF_TOKEN": "x"}})


# --- folders --------------------------------------------------------------------------------

PROGRAM = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "planted.Config",
    "AutoModel": "planted.Model",
    "AutoModelForCausalLM": "planted.Model",
    "AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"],
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a planted program makes when it runs. Standard input says ``yes`` to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = tmp_path / "the-program-ran"
    yield found
    assert not found.exists()


def plant(folder: Path, mark: Path, where: str) -> str:
    """A good model whose config, tokenizer, or config of a type that only its own code knows, names a
    program."""
    shutil.copytree(assets_dir(), folder)
    model_type = "planted" if where == "unknown type" else "llama"
    (folder / "planted.py").write_text(PROGRAM.format(mark=str(mark), model_type=model_type))
    file = folder / ("tokenizer_config.json" if where == "tokenizer" else "config.json")
    value = {**json.loads(file.read_text()), "auto_map": CLASSES}
    if where == "tokenizer":
        value["tokenizer_class"] = "Tokenizer"
    else:
        value["model_type"] = model_type
    file.write_text(json.dumps(value))
    return str(folder)


PLANTED = ("config", "tokenizer", "unknown type")


def test_the_planted_program_would_run(mark: Path, tmp_path: Path) -> None:
    """What the other tests plant is a program that runs where both consents are given."""
    for where in PLANTED:
        folder = Path(plant(tmp_path / where, mark, where))
        (folders.open_tokenizer if where == "tokenizer" else folders.open_config)(folder, own_code=True)
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize("where", PLANTED)
def test_no_way_to_open_a_folder_runs_its_program(mark: Path, tmp_path: Path, where: str) -> None:
    config = ModelConfig(name=plant(tmp_path / "m", mark, where), device="cpu")
    ways: list[Callable[[], object]] = [
        lambda: folders.open_config(Path(config.name)),
        lambda: folders.open_tokenizer(Path(config.name)),
        lambda: folders.open_model("causal", Path(config.name)),
        lambda: folders.open_model("encoder", Path(config.name)),
        lambda: model_shape(config),
        lambda: load_encoder(config, chat_template=False),
        lambda: BaseModel.load(config),
    ]
    refused = 0
    for way in ways:
        try:
            way()
        except (ModelError, ValueError) as error:
            assert folders.OWN_CODE in str(error)
            refused += 1
    # a known type has the library's own class; what only the program knows cannot be opened
    assert refused == {"config": 0, "tokenizer": 3, "unknown type": 5}[where]


def network_options() -> list[tuple[str, str]]:
    """The hyperparameters that take a model's folder, of every method: asked of the methods, so that a
    new one is among them."""
    found = []
    for name in method_names():
        kind = get_method(name).Config
        for field in kind.model_fields:
            try:
                config = kind.model_validate({field: "some/folder"})
            except (ValidationError, SpecError):
                continue
            if "some/folder" in config.networks.values():
                found.append((name, field))
    return found


def test_the_options_that_take_a_folder_are_found() -> None:
    assert {("serac", "classifier"), ("serac", "counterfactual")} <= set(network_options())


@pytest.mark.parametrize(
    ("option", "where"),
    [("model.name", where) for where in PLANTED]
    + [(f"{m}.{field}", where) for m, field in network_options() for where in ("tokenizer", "unknown type")],
)
def test_a_command_runs_no_planted_program(
    call: Any, mark: Path, tmp_path: Path, option: str, where: str
) -> None:
    """From the spec to the built networks. Where the model itself is whole for the library, it runs."""
    folder = plant(tmp_path / "m", mark, where)
    changes: dict[str, Any] = {"model": {"name": folder, "device": "cpu"}}
    if option != "model.name":
        name, field = option.split(".")
        schedule = {"steps": 1, "batch_size": 1}
        changes = {"methods": [{"method": name, "hparams": {field: folder, "schedule": schedule}}]}
        changes["training"] = {"kind": "tinyworld", "shards": [2]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**RAW, **changes}))
    code, out, err = call("run", tmp_path / "s.yaml", "--engine", "local", "--results", tmp_path / "r")
    if where == "config":
        assert code == 0, out + err
    else:
        assert code in (1, 2) and "needs code of its own (auto_map)" in out + err, out + err


def test_remote_code_needs_both_consents(call: Any, mark: Path, tmp_path: Path) -> None:
    model = {"name": plant(tmp_path / "m", mark, "unknown type"), "trust_remote_code": True}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**RAW, "model": model}))
    assert call("plan", tmp_path / "s.yaml")[0] == 2  # the spec alone
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**RAW, "model": {"name": model["name"]}}))
    assert call("plan", tmp_path / "s.yaml", "--trust-remote-code")[0] == 2  # the command line alone


def test_a_results_folder_gives_no_consent(mark: Path, tmp_path: Path) -> None:
    """A shard that has begun takes its model from the folder, which may be somebody else's."""
    model = ModelConfig(
        name=plant(tmp_path / "m", mark, "unknown type"), device="cpu", trust_remote_code=True
    )
    with pytest.raises(ModelError, match=r"results folder asks for .* with its own code"):
        Worker(str(tmp_path / "r"), "run").session(model, threads=1)


def test_folders_are_opened_in_one_place() -> None:
    """Every other call that opens a model, a tokenizer or a config, by the syntax trees of the
    sources. A new one goes through :mod:`workers.folders`."""
    opening = {"from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module"}
    reading = {
        ("torch", "load"),
        ("torch", "hub"),
        ("pickle", "load"),
        ("pickle", "loads"),
        ("joblib", "load"),
    }
    found = []
    for path in sorted(
        path
        for room in ("workers", "orchestrator", "editsweep", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = (
                node.attr
                if isinstance(node, ast.Attribute)
                else node.id
                if isinstance(node, ast.Name)
                else ""
            )
            of = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
            if name in opening or (of, name) in reading:
                found.append((path.relative_to(ROOT).as_posix(), name))
            if isinstance(node, ast.Constant) and node.value in opening:  # getattr(kind, "from_pretrained")
                found.append((path.relative_to(ROOT).as_posix(), str(node.value)))
    assert {path for path, _ in found} == {"workers/folders.py"}
    assert {name for _, name in found} == {"from_pretrained", "from_config"}
    tree = ast.parse((ROOT / "workers/folders.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    opened = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in opening]
    assert len(opened) == 4
    assert all("trust_remote_code" in {keyword.arg for keyword in call.keywords} for call in opened)


# --- programs of the hub --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn@main:f"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"attn_implementation": "flash_attention_3"},
        {"_experts_implementation": "sonicmoe"},
    ],
)
def test_a_config_names_no_program_of_the_hub(tmp_path: Path, change: dict[str, Any], call: Any) -> None:
    shutil.copytree(assets_dir(), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    config = ModelConfig(name=str(tmp_path / "m"), device="cpu")
    for way in (model_shape, BaseModel.load):
        with pytest.raises(ModelError, match=r"model.name: .*implementation: '.*' is not valid.*eager, sdpa"):
            way(config)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**RAW, "model": {"name": config.name}}))
    code, _, err = call("run", tmp_path / "s.yaml", "--engine", "local", "--results", tmp_path / "r")
    assert code == 2 and "choose eager, sdpa" in err and not (tmp_path / "r").exists()


def test_a_config_may_name_what_is_installed(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "models" / "tiny-llama", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "eager"}))
    assert folders.open_model("causal", tmp_path / "m").config._attn_implementation == "eager"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"."):  # whatever a library raises over the file, it is one kind
        folders.open_config(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises((ValueError, OSError), match=r"."):
        folders.open_tokenizer(tmp_path / "m")


# --- text that is shown ---------------------------------------------------------------------

ODD = "a\x1b]0;x\x07b\x9bc\r\n\td\x7f 日本"
SHOWN = "a\\u001b]0;x\\u0007b\\u009bc\\u000d\n\td\\u007f 日本"


def test_answers_for_programs_hold_no_control_characters() -> None:
    answer = pa.table({"te\x1bxt": [ODD, None, "plain"], "n": [1, 2, 3], "list": [[ODD], [], None]})
    written = {}
    for name, raw in (("csv", False), ("csv", True), ("json", False), ("json", True)):
        stream = io.BytesIO()
        write(answer, name, stream, raw)
        written[name, raw] = stream.getvalue().decode()
    controls = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    assert controls.findall(written["csv", True]) and "\x1b]0;x" in written["csv", True]
    for key in (("csv", False), ("json", False), ("json", True)):
        assert not controls.findall(written[key])
    rows = list(csv.reader(io.StringIO(written["csv", False])))
    assert rows[0] == ["te\\u001bxt", "n", "list"] and rows[1][0] == SHOWN and rows[3][0] == "plain"
    assert json.loads(rows[1][2]) == [ODD]
    assert json.loads(written["json", False].splitlines()[0]) == {"te\x1bxt": ODD, "n": 1, "list": [ODD]}


def test_suggested_commands_are_quoted(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied from the terminal into a shell names the folder, and runs nothing in its name."""
    monkeypatch.chdir(tmp_path)
    spec, folder = "my spec;$(touch ran).yaml", "a;b$(touch ran)'`"
    Path(spec).write_text(yaml.safe_dump({**RAW, "grid": {"T": [1, 2]}}))
    code, out, err = call("plan", spec, "--results", folder)
    assert code == 0 and f"`editsweep run {shlex.quote(spec)}`" in out
    code, out, err = call("run", spec, "--engine", "local", "--results", folder)
    assert code == 0, err
    commands = [line for line in out.splitlines() if line.startswith("  editsweep ")]
    assert [shlex.split(line)[:3] for line in commands] == [
        ["editsweep", "status", folder],
        ["editsweep", "query", folder],
    ]


def test_a_bug_leaves_no_file_in_the_temporary_folder(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr("orchestrator.engine.sweep.run_sweep", bug)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(RAW))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    code, _, err = call("run", tmp_path / "s.yaml", "--engine", "local", "--results", tmp_path / "r")
    assert code == 1 and "this is a bug in editsweep: KeyError" in err
    assert "Traceback" in err and not list(temporary.iterdir()) and not (tmp_path / "r").exists()
