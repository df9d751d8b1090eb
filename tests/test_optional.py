"""Packages that only some users have: a missing one is named with the command that installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.optional import optional
from workers.types import EditSweepError

ROOT = Path(__file__).resolve().parent.parent

HIDE = """
import sys
hidden = {hidden!r}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from orchestrator.cli.main import main
main({arguments!r})
"""


def said_without(hidden: list[str], *arguments: str, folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a command in an interpreter that lacks some packages."""
    text = HIDE.format(hidden=hidden, arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra", "package"),
    [
        (["boto3", "botocore"], ["status", "s3://bucket/prefix"], "s3", "botocore"),
        (["botocore"], ["query", "s3://bucket/prefix", "SELECT 1"], "s3", "botocore"),
        (["boto3"], ["run", str(ROOT / "sweeps" / "demo.yaml"), "--results", "s3://b/p"], "s3", "boto3"),
        (["matplotlib"], ["report", "{folder}", "--plot", "x.png"], "plots", "matplotlib"),
    ],
)
def test_a_command_names_the_extra_to_install(
    hidden: list[str], arguments: list[str], extra: str, package: str, tmp_path: Path
) -> None:
    folder = ROOT / "tests" / "data" / "folders" / "finished"
    code, said = said_without(hidden, *(a.format(folder=folder) for a in arguments), folder=tmp_path)
    assert code == 2, said
    assert f"needs {package}, which is not installed; install it with:" in said
    assert f"{sys.executable} -m pip install -e {ROOT}[{extra}]".replace(" ", "") in said.replace(
        " ", ""
    ).replace("'", "")
    assert "bug" not in said


def test_of_an_installed_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import workers.optional

    monkeypatch.setattr(workers.optional, "__file__", str(tmp_path / "workers" / "optional.py"))
    with pytest.raises(EditSweepError) as caught:
        optional("no_such_package.part", "plots", "--plot")
    assert str(caught.value) == (
        "--plot needs no_such_package, which is not installed; install it with: "
        f"{sys.executable} -m pip install 'editsweep[plots]'"
    )


def test_a_package_that_is_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_part")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EditSweepError, match=r"which cannot be imported \(No module named 'no_such_part'\)"):
        optional("broken_package", "plots", "--plot")


def test_what_is_there_is_imported() -> None:
    assert optional("json.decoder", "plots", "--plot").JSONDecoder
