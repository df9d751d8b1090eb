"""The folder that a model's bare name stands for: names such as ``models/small`` may be a folder
beside the spec, one in the working folder, or a name on the hub.

    found = find_model("models/small", Path("sweeps"))
    found.name      # "/home/me/sweeps/models/small" where there is one, else the name as it was
    found.remark    # which one was taken, where several fit
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FoundModel:
    """The place that a bare name was found at."""

    name: str
    """What the model's configuration is to say: an absolute path, or the name itself for the working
    folder and the hub."""
    remark: str | None = None
    """Which place was taken, where several fit."""
    looked_at: tuple[str, ...] = ()
    """The places without the model, where no folder fits: only the hub is left."""


def is_bare(name: str) -> bool:
    """True for a name that is neither an absolute path nor one that begins with a dot or a tilde."""
    return not name.startswith((".", "~", "/"))


def find_model(name: str, base: Path) -> FoundModel:
    """Look for a bare name beside the spec (in ``base``), then in the working folder, then leave it
    to the hub."""
    beside, here = os.path.abspath(base / name), os.path.abspath(name)
    places = {beside: f"the folder {beside} beside the spec"}
    places.setdefault(here, f"the folder {here} in the working folder")
    fits = [folder for folder in places if os.path.isfile(os.path.join(folder, "config.json"))]
    if not fits:
        looked_at = tuple(f"{folder} ({_lack(folder)})" for folder in places)
        return FoundModel(name, looked_at=looked_at + ("the hub",) * (name.count("/") <= 1))
    others = [places[folder] for folder in fits[1:]] + ["a copy from the hub"] * _on_hub(name)
    remark = f"model.name: {name!r} is {places[fits[0]]}; {' and '.join(others)} would fit, too"
    return FoundModel(beside if fits[0] != here else name, remark if others else None)


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
