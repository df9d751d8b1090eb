"""Packages that only some users need: imported where they are used, through one function that says
how to install what is missing."""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
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
            f"{purpose} needs {package}, {state}; install it with: {_command(extra)}"
        ) from None


def _command(extra: str) -> str:
    """The command that installs an extra for the interpreter that runs: from the checkout, where
    this is one."""
    root = Path(__file__).resolve().parent.parent
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (root / "pyproject.toml").is_file():
        return f"{pip} -e {shlex.quote(f'{root}[{extra}]')}"
    return f"{pip} 'editsweep[{extra}]'"
