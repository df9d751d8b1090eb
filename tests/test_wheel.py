"""The wheel: what it holds, and that it runs from a fresh environment, far from the checkout.

Torch, Ray and the other libraries are those of the environment that runs the tests, because
installing them again takes gigabytes; editsweep itself is there as the wheel only.
"""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import finished

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES = [
    name for name in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"] if "*" not in name
]

SWEEP = """
name: wheel
model: {name: embedded, device: cpu}
dataset: {kind: tinyworld, edits: 4}
grid: {T: [1, 2]}
methods: [{method: ft, hparams: {num_steps: 3}}]
engine: {lanes: 1, shard_edits: 2, share_prefixes: false}
"""
SCORES = (
    'SELECT T, "group", position, scored, reliability_token, locality_token, target_logprob FROM '
    "edits ORDER BY ALL"
)

pytestmark = pytest.mark.slow


def succeed(command: Sequence[str]) -> None:
    ran = finished(command)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    succeed(command)
    (built,) = folder.glob(f"{PROJECT['name']}-{PROJECT['version']}-*.whl")
    return built


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a fresh virtual environment with the wheel in it.

    A path in a ``.pth`` file brings the libraries of the outer environment but does not read the
    ``.pth`` files that lie there, so an editable installation of editsweep stays outside.
    """
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    succeed([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    (packages,) = venv.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(venv / "bin" / "python"),
        "--disable-pip-version-check",
    ]
    succeed([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)])
    return venv / "bin"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is no checkout, with a spec and with other packages under the names of ours."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"raise RuntimeError('the wrong {name}')\n", encoding="utf-8"
        )
    (tmp_path / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    return tmp_path


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(
            archive.read(f"{PROJECT['name']}-{PROJECT['version']}.dist-info/METADATA")
        )


def test_wheel_holds_packages_and_assets(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and (path.suffix == ".py" or path.name == "py.typed" or "assets" in path.parts)
    }
    names = files_of(wheel)
    assert expected <= names
    places = {name.partition("/")[0] for name in names}
    assert places == {*PACKAGES, f"{PROJECT['name']}-{PROJECT['version']}.dist-info"}


def test_wheel_says_its_licence_and_brings_the_text(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert f"{PROJECT['name']}-{PROJECT['version']}.dist-info/licenses/LICENSE" in files_of(wheel)


def test_a_wheel_runs_a_sweep_where_folders_bear_the_names_of_its_packages(
    binaries: Path, outside: Path, home: dict[str, str]
) -> None:
    environment = {key: value for key, value in home.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return finished([binaries / program, *arguments], cwd=outside, env=environment)

    def scores(folder: str) -> list[dict[str, Any]]:
        asked = call("editsweep", "query", folder, SCORES, "--format", "json")
        assert asked.returncode == 0, asked.stderr
        return [json.loads(line) for line in asked.stdout.splitlines()]

    show = "import json; print(json.dumps([__import__(name).__file__ for name in {!r}]))"
    shown = call("python", "-I", "-c", show.format(PACKAGES))
    assert shown.returncode == 0, shown.stderr
    assert all(Path(path).is_relative_to(binaries.parent) for path in json.loads(shown.stdout)), shown.stdout
    assert "the wrong workers" in call("python", "-c", "import workers").stderr, "the folder is in the way"

    for folder, options in (("local", ("--engine", "local")), ("ray", ("--max-actors", "2"))):
        ran = call("editsweep", "run", "sweep.yaml", "--results", folder, *options)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "all 2 cells finished" in ran.stdout
    assert len(scores("local")) == 16
    assert scores("ray") == scores("local")
