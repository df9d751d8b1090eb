"""Where the names of models and files in a spec lie: beside the spec, in the working folder, or (for
models) on the hub.

    found = find_model("models/small", Path("sweeps"))
    found.name      # "/home/me/sweeps/models/small" where there is one, else the name as it was
    found.remark    # which one was taken, where several fit
    find_file("text.txt", Path("sweeps"), "corpus").name        # "/home/me/sweeps/text.txt"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """The place that a name was found at."""

    name: str
    """An absolute path; or the name itself for a model's bare name that is left to the working
    folder or the hub."""
    remark: str | None = None
    """Which place was taken, where several fit."""
    looked_at: tuple[str, ...] = ()
    """The places without it, where none fits (for a model, only the hub is left)."""


def is_bare(name: str) -> bool:
    """True for a name that is neither an absolute path nor one that begins with a dot or a tilde."""
    return not name.startswith((".", "~", "/"))


def find_model(name: str, base: Path, field: str = "model.name") -> Found:
    """Look for a bare name beside the spec (in ``base``), then in the working folder, then leave it
    to the hub."""
    beside, here = os.path.abspath(base / name), os.path.abspath(name)
    places = {beside: f"the folder {beside} beside the spec"}
    places.setdefault(here, f"the folder {here} in the working folder")
    fits = [folder for folder in places if _is_model(folder)]
    if not fits:
        looked_at = tuple(f"{folder} ({_lack(folder)})" for folder in places)
        return Found(name, looked_at=looked_at + ("the hub",) * (name.count("/") <= 1))
    others = [places[folder] for folder in fits[1:]] + ["a copy from the hub"] * _on_hub(name)
    remark = f"{field}: {name!r} is {places[fits[0]]}; {' and '.join(others)} would fit, too"
    return Found(beside if fits[0] != here else name, remark if others else None)


def find_network(name: str, base: Path, field: str) -> Found:
    """Look for a further model that a method reads: a bare name as :func:`find_model` does, a path
    beside the spec and then, as earlier versions did, in the working folder."""
    if is_bare(name):
        found = find_model(name, base, field)
        return found if found.looked_at else replace(found, name=os.path.abspath(found.name))
    return _first(name, base, field, "folder", _is_model, _lack)


def find_file(name: str, base: Path, field: str) -> Found:
    """Look for a file beside the spec and then, as earlier versions did, in the working folder."""
    return _first(name, base, field, "file", os.path.exists, lambda _: "no such file")


def _first(
    name: str, base: Path, field: str, kind: str, fits: Callable[[str], bool], lack: Callable[[str], str]
) -> Found:
    beside, here = (os.path.abspath(folder / os.path.expanduser(name)) for folder in (base, Path.cwd()))
    places = {beside: f"the {kind} {beside} beside the spec"}
    places.setdefault(here, f"the {kind} {here} in the working folder")
    fit = [path for path in places if fits(path)]
    if not fit:
        return Found(beside, looked_at=tuple(f"{path} ({lack(path)})" for path in places))
    remark = f"{field}: {name!r} is {places[fit[0]]}; {places[fit[-1]]} would fit, too"
    return Found(fit[0], remark if len(fit) > 1 else None)


def _is_model(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def _lack(folder: str) -> str:
    return "without config.json" if os.path.isdir(folder) else "no such folder"


def _on_hub(name: str) -> bool:
    """True if this machine holds a copy that was fetched under this name; asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name of the hub looks like this
        return False
