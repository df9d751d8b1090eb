"""The files around the code: what is installed, what CI runs, how a cluster is made, who may import
whom."""

from __future__ import annotations

import ast
import copy
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grimp
import networkx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.waiting import PATIENCE_SECONDS, finished
from workers.methods import REGISTRY, get_method, method_names

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES = ("editsweep", "orchestrator", "workers")
CONTRACTS = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every constraint is an exact version"
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [
        Requirement(text)
        for text in [
            *PROJECT["dependencies"],
            *extras["test"],
            *extras["pandas"],
            *extras["plots"],
            *extras["s3"],
            *extras["tokenizers"],
        ]
    ]


# --- pyproject and constraints --------------------------------------------------------------


def test_distribution() -> None:
    assert (PROJECT["name"], PROJECT["version"]) == ("editsweep", "0.1.0")
    assert PROJECT["scripts"] == {"editsweep": "orchestrator.cli.main:main"}
    assert set(PROJECT["optional-dependencies"]) == {"test", "pandas", "plots", "s3", "tokenizers"}


def test_console_script_exists() -> None:
    """Read, not imported: the command must exist without this test paying for its imports."""
    module, _, function = PROJECT["scripts"]["editsweep"].partition(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert function in names


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    pinned = constraints()
    assert canonical(requirement.name) in pinned
    assert requirement.specifier.contains(pinned[canonical(requirement.name)])


def test_pins_fit_any_build_of_torch() -> None:
    pinned = constraints()
    assert pinned["torch"] == "2.13.0"
    assert all(Version(version).local is None for version in pinned.values())
    assert "editsweep" not in pinned


def third_party_imports(package: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def test_code_imports_only_what_is_required() -> None:
    """An import that works because some other library happens to bring it breaks when that library
    stops doing so."""
    named = {canonical(Requirement(text).name) for text in PROJECT["dependencies"]}
    named |= {"yaml"} if "pyyaml" in named else set()
    named |= {"pandas"}  # ray[tune] requires it; Results.to_pandas() is all that needs it
    optional = {"matplotlib", "boto3", "botocore"}
    used = {canonical(name) for name in set().union(*map(third_party_imports, PACKAGES))}
    assert used - named - optional == set()


def test_package_data_pattern_finds_the_shipped_model() -> None:
    (pattern,) = PYPROJECT["tool"]["setuptools"]["package-data"]["workers.data"]
    found = [path for path in (ROOT / "workers" / "data").glob(pattern) if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in found)
    assert sum(path.stat().st_size for path in found) < 12 * 2**20


# --- Makefile and CI ------------------------------------------------------------------------


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return finished(["make", *arguments], cwd=ROOT, env=os.environ | environment)


def test_make_targets_exist() -> None:
    targets = [
        "help",
        "setup",
        "demo",
        "test",
        "test-numeric",
        "test-slow",
        "test-long",
        "test-gpu",
        "bench",
        "chaos",
        "chaos-short",
        "lint",
        "format",
    ]
    ran = make("--dry-run", *targets)
    assert ran.returncode == 0, ran.stderr


def test_make_help_lists_the_targets() -> None:
    assert {line.split()[1] for line in make().stdout.splitlines()} >= {
        "demo",
        "test",
        "test-slow",
        "lint",
        "setup",
    }


def test_make_demo_sets_up_runs_and_asks(tmp_path: Path) -> None:
    commands = make("--dry-run", "demo", f"VENV={tmp_path / 'venv'}").stdout
    steps = [
        "-m venv",
        "-c constraints.txt",
        "run sweeps/demo.yaml --results results/demo",
        "query results/demo",
    ]
    positions = [commands.find(step) for step in steps]
    assert -1 not in positions
    assert positions == sorted(positions)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = executable(
        tmp_path / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n'
    )
    ran = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert ran.returncode != 0
    assert "editsweep needs Python 3.11 or newer; found: Python 3.9.1." in ran.stderr
    assert not (tmp_path / "venv").exists()


def fake_venv(tmp_path: Path, pip: str) -> Path:
    """A virtual environment whose interpreter only pretends to install: ``pip`` is the shell text
    it runs instead."""
    venv = tmp_path / "venv"
    executable(venv / "bin" / "python", f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/calls'\n{pip}\n")
    return venv


def test_set_up_is_done_once(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path, 'echo "Collecting torch==2.13.0 (from editsweep)"')
    first = make("setup", f"VENV={venv}")
    assert first.returncode == 0, first.stderr
    assert "torch==2.13.0\n" in first.stdout, "progress is shown"
    assert make("setup", f"VENV={venv}").returncode == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_failed_set_up_is_not_taken_for_done(tmp_path: Path) -> None:
    venv = fake_venv(tmp_path, "echo 'no network' >&2; exit 1")
    for _ in range(2):
        ran = make("setup", f"VENV={venv}")
        assert ran.returncode != 0
        assert "no network" in ran.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize("failing", [None, "lint", "test", "test-numeric", "test-slow", "chaos-short"])
def test_ci_runs_its_stages_in_order_and_stops_at_a_failure(failing: str | None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    executable(tmp_path / "bin" / "make", f'#!/bin/sh\necho "$1" >> "{log}"\n[ "$1" != "{failing}" ]\n')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ran = finished([ROOT / ".ci" / "run"], env=environment)
    stages = ["lint", "test", "test-numeric", "test-slow", "chaos-short"]
    started = stages if failing is None else stages[: stages.index(failing) + 1]
    assert (ran.returncode == 0) == (failing is None)
    assert log.read_text().split() == started
    times = re.findall(r"(?m)^(?:stage .*|total) +\d+:[0-5]\d(?:  (\w+))?$", ran.stdout)
    assert times == ["passed"] * (len(started) - (failing is not None)) + ["failed"] * (
        failing is not None
    ) + [""]


def test_no_test_has_a_clock_of_its_own() -> None:
    """How long a test waits is said once, in tests/waiting.py, so that a busy machine only makes
    tests slower."""
    clock = re.compile(r"\btimeout=\d|mark\.timeout|deadline=\d|\.(?:wait|join|communicate)\(\d|\.result\(\d")
    said = {
        path for path in (ROOT / "tests").rglob("test_*.py") if clock.search(path.read_text(encoding="utf-8"))
    }
    assert said - {Path(__file__).resolve()} == set()
    assert PYPROJECT["tool"]["pytest"]["ini_options"]["timeout"] > PATIENCE_SECONDS


# --- cluster.yaml ---------------------------------------------------------------------------


def cluster() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def validate_cluster(config: dict[str, Any]) -> None:
    """Ray's own check, offline. It fills in a missing cluster_name, so that is checked here."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    if not config.get("cluster_name"):
        raise ValueError("cluster_name is missing")
    validate_config(prepare_config(copy.deepcopy(config)))


def test_cluster_file_is_valid() -> None:
    validate_cluster(cluster())


def no_name(config: dict[str, Any]) -> None:
    del config["cluster_name"]


def no_provider_type(config: dict[str, Any]) -> None:
    del config["provider"]["type"]


def misspelt_key(config: dict[str, Any]) -> None:
    config["setup_comands"] = config.pop("setup_commands")


def unknown_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "haed"


def text_for_a_number(config: dict[str, Any]) -> None:
    config["idle_timeout_minutes"] = "fifteen"


def too_many_workers(config: dict[str, Any]) -> None:
    config["max_workers"] = 1


def no_container(config: dict[str, Any]) -> None:
    del config["docker"]["container_name"]


@pytest.mark.parametrize(
    "break_it",
    [
        no_name,
        no_provider_type,
        misspelt_key,
        unknown_head,
        text_for_a_number,
        too_many_workers,
        no_container,
    ],
)
def test_a_broken_cluster_file_is_noticed(break_it: Callable[[dict[str, Any]], None]) -> None:
    config = cluster()
    break_it(config)
    with pytest.raises(Exception):  # noqa: B017  (Ray raises whatever it finds fitting)
        validate_cluster(config)


def test_cluster_has_a_head_without_gpu_and_gpu_workers_on_one_ray_version() -> None:
    config = cluster()
    assert config["head_node_type"] == "head"
    assert set(config["available_node_types"]) == {"head", "gpu"}
    assert config["available_node_types"]["gpu"]["min_workers"] >= 1
    version = constraints()["ray"]
    for image, kind in (("head_image", "cpu"), ("worker_image", "gpu")):
        assert config["docker"][image] == f"rayproject/ray:{version}-py311-{kind}"


def test_cluster_keeps_to_the_security_rules() -> None:
    config = cluster()
    starts = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert {".git", ".venv", "results"} <= set(config["rsync_exclude"])


# --- who may import whom --------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return finished(
        [Path(sys.executable).parent / "lint-imports", "--config", folder / "pyproject.toml", "--no-cache"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )


def test_contracts_hold() -> None:
    ran = lint_imports(ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The contract on circles sees siblings; this sees every circle of modules, wherever they
    lie."""
    graph = grimp.build_graph(*PACKAGES)
    edges = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
    assert len(edges) > 500
    assert [
        found for found in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(found) > 1
    ] == []


def test_every_file_of_a_method_stands_in_the_registry() -> None:
    """Whatever lies in the folder beside the rooms that methods share is a method; the contract
    takes it in by a wildcard."""
    shared = {"__init__", "base", "easyedit", "families"}
    found = {
        path.stem for path in (ROOT / "workers" / "methods").iterdir() if not path.name.startswith("__")
    } - shared
    assert found == {
        target.removeprefix("workers.methods.").split(":")[0].split(".")[0] for target in REGISTRY.values()
    }


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """The project's modules, empty, under the real contracts: what they forbid can be planted one
    at a time."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copied = tmp_path / path.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "orchestrator/results/artifact_store.py").write_text(
        "import workers.artifacts.base\n", encoding="utf-8"
    )
    (tmp_path / "workers/scoring/fluency.py").write_text(
        "def f():\n    import torch, workers.model.base, workers.rng\n", encoding="utf-8"
    )
    return tmp_path


RAY = "orchestrator/engine/ray_engine"


@pytest.mark.parametrize(
    ("planted", "broken"),
    [
        ({f"{RAY}/run.py": "import ray", f"{RAY}/trial.py": "import ray.tune"}, set()),
        ({"orchestrator/planning/plan.py": "import torch, workers.types"}, set()),
        ({"workers/types.py": "import ray"}, {"streams-run-in-a-notebook"}),
        ({"workers/methods/ft.py": "def f():\n    import pyarrow.parquet"}, {"streams-run-in-a-notebook"}),
        ({"workers/types.py": "from orchestrator.planning import plan"}, {"streams-run-in-a-notebook"}),
        ({"workers/model/base.py": "import workers.inner_loop.suffix"}, {"floors-of-workers"}),
        ({"workers/kernels/matmul.py": "from workers.data import records"}, {"floors-of-workers"}),
        ({"workers/a_room_without_a_floor.py": ""}, {"floors-of-workers"}),
        ({"workers/methods/base.py": "from workers.methods.families import locate"}, {"floors-of-methods"}),
        ({"workers/methods/wise/method.py": "from workers.methods.ft import x"}, {"methods-stand-alone"}),
        ({"workers/methods/a_new_one.py": "from workers.methods.base import Method"}, set()),
        ({"workers/methods/a_new_one.py": "from workers.methods.ft import x"}, {"methods-stand-alone"}),
        (
            {"workers/methods/families/locate.py": "from workers.methods.rome import x"},
            {"methods-stand-alone"},
        ),
        (
            {
                "workers/methods/icl.py": "def f():\n    from workers.methods import get_method",
                "workers/methods/__init__.py": "import workers.methods.ft",
            },
            {"methods-stand-alone"},
        ),
        (
            {"orchestrator/planning/spec.py": "import orchestrator.engine.run_state"},
            {"floors-of-orchestrator"},
        ),
        (
            {"orchestrator/storage/open.py": "if TYPE_CHECKING:\n    import orchestrator.results.table"},
            {"floors-of-orchestrator"},
        ),
        ({"editsweep/__init__.py": "def f():\n    import orchestrator.cli.main, workers.stream"}, set()),
        ({"workers/rng.py": "import editsweep"}, {"the-interface-on-top"}),
        (
            {"orchestrator/cli/running.py": "def f():\n    from editsweep import run"},
            {"the-interface-on-top"},
        ),
        ({"editsweep/view.py": "import ray"}, {"ray-in-one-room"}),
        ({f"{RAY}/trial.py": "import orchestrator.planning.plan"}, {"actors-do-not-plan"}),
        (
            {
                "orchestrator/engine/worker.py": "import orchestrator.planning.inputs",
                "orchestrator/planning/inputs.py": "def f():\n    import orchestrator.planning.packing",
            },
            {"actors-do-not-plan"},
        ),
        ({"orchestrator/planning/plan.py": "from ray import tune"}, {"ray-in-one-room"}),
        ({"orchestrator/engine/local.py": "from ray import tune"}, {"ray-in-one-room"}),
        ({"orchestrator/results/table.py": "import transformers"}, {"reading-results-is-light"}),
        ({"orchestrator/results/columns.py": "import workers.scoring.fluency"}, set()),
        (
            {
                "orchestrator/results/columns.py": "import workers.scoring.registry",
                "workers/scoring/registry.py": "import transformers",
            },
            {"reading-results-is-light"},
        ),
        (
            {"orchestrator/results/query.py": "import workers.job", "workers/job.py": "import torch"},
            {"reading-results-is-light"},
        ),
        (
            {
                "orchestrator/engine/run_state.py": "import orchestrator.engine.folder",
                "orchestrator/engine/folder.py": "def f():\n    import orchestrator.engine.run_state",
            },
            {"no-circles"},
        ),
    ],
)
def test_contracts_notice_what_they_forbid(planted: dict[str, str], broken: set[str], skeleton: Path) -> None:
    for path, text in planted.items():
        (skeleton / path).write_text(text + "\n", encoding="utf-8")
    ran = lint_imports(skeleton)
    said = {CONTRACTS[name]["name"]: name for name in CONTRACTS}
    failed = {
        name
        for title, name in said.items()
        if re.search(rf"{re.escape(title)} BROKEN", " ".join(ran.stdout.split()))
    }
    assert failed == broken, ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (not broken)


# --- pages that list what there is ----------------------------------------------------------


def test_the_methods_page_has_a_line_and_a_section_for_each_in_the_registrys_order() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^## (.+)$", page)
    sections = [name for title in headings for name in title.partition(":")[0].split(", ")]
    assert tuple(sections) == method_names()
    lines = re.findall(r"(?m)^\| \[(.+?)\]\(#(.+?)\) \|.*?\| ([^|]+?) \|$", page)
    assert [name for names, _, _ in lines for name in names.split(", ")] == sections
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
    assert [anchor for _, anchor, _ in lines] == anchors
    for names, _, together in lines:
        assert together.startswith("batch") == get_method(names.split(", ")[0]).batch_edits, names
    unsaid = [
        (n, f)
        for n in sections
        for f in get_method(n).Config.model_fields
        if not re.search(rf"`{f}[`:]", page)
    ]
    assert unsaid == []


# --- results/README.md ----------------------------------------------------------------------


def test_results_page_shows_every_path() -> None:
    """Whatever ``ResultsPaths`` can name stands in the page's tree."""
    from orchestrator.storage.paths import ResultsPaths

    paths = ResultsPaths()
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    named = [paths.sweep, paths.plan, paths.lock, paths.table_bad, paths.artifacts_bad]
    for key in (
        paths.run_spec("r"),
        paths.run_info("r"),
        paths.manifest("s"),
        paths.attempt_info("s", 1),
        paths.error("s", 1),
    ):
        named.append(key.rpartition("/")[2])
    for folder in (paths.runs, paths.parts, paths.table, paths.artifacts, paths.logs):
        named.append(f"{folder}/<")
    missing = [name for name in named if name not in page]
    assert not missing
    assert "0001" in page
    assert paths.attempt("s", 1).endswith("/0001")
    assert paths.table_file(1).rpartition("/")[2] in page
