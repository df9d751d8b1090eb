"""Packages that only some users need: imported where they are used, through one function that says
how to install what is missing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workers.types import EditSweepError


def optional(module: str, extra: str, purpose: str) -> Any:
    """Import ``module``, which the ``extra`` of that name installs; ``purpose`` begins the message.

    >>> Figure = optional("matplotlib.figure", "plots", "--plot").Figure  # doctest: +SKIP

    Raises :class:`~workers.types.EditSweepError` if it is not installed, or cannot be imported.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        state = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise EditSweepError(
            f"{purpose} needs {package}, {state}; install it with: {install_command(extra)}"
        ) from None


def not_installed(packages: Iterable[str]) -> list[str]:
    """Those of ``packages`` that this interpreter cannot import."""
    return [package for package in packages if not _findable(package)]


def _findable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a part of a package that is missing as a whole
        return False


def install_command(extra: str) -> str:
    """The command that installs an extra for the interpreter that runs: from the checkout, where
    this is one."""
    root = Path(__file__).resolve().parent.parent
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (root / "pyproject.toml").is_file():
        return f"{pip} -e {shlex.quote(f'{root}[{extra}]')}"
    return f"{pip} 'editsweep[{extra}]'"
