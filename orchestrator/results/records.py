"""What a results folder says of itself: which sweep it is of, and what its last plan asked for.

    identity(store).name                # sweep.json, or what the folder's other files know of it
    read_plan(store)["current"]         # plan.json, or its copy

Both files are small and stand alone, so both can be done without: each is remade by the next run.
Until then, readers take what stands in for it and say so. Knows nothing of torch or Ray.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.storage.base import Damaged, Entry, Missing, Store, put_aside
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, unseal_json
from workers.inputs import parse_yaml
from workers.types import JSON, EditSweepError

log = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Identity:
    """The sweep of a results folder. ``scoring``: the settings that its cells are scored with, None
    if they are not known. ``seal``: a name that the folder's table files carry, so that a file of
    another folder is not taken for one of this; the sweep's own name in folders of old."""

    name: str
    scoring: Mapping[str, JSON] | None
    seal: str

    @classmethod
    def new(cls, name: str, scoring: Mapping[str, JSON]) -> Identity:
        return cls(name, scoring, f"{name}-{secrets.token_hex(6)}")

    def to_bytes(self) -> bytes:
        return seal_json({"name": self.name, "scoring": self.scoring, "seal": self.seal})


def read_identity(store: Store, paths: ResultsPaths) -> Identity:
    """The identity in sweep.json. Raises :class:`Missing` and :class:`Damaged`."""
    found = unseal_json(store.read(paths.sweep), store.where(paths.sweep), "name")
    name = str(found["name"])
    return Identity(name, found.get("scoring"), str(found.get("seal", name)))


def identity(store: Store, paths: ResultsPaths) -> Identity | None:
    """The folder's identity, as far as its files know it; None if they know no name."""
    try:
        return read_identity(store, paths)
    except (Missing, Damaged) as error:
        name = _recorded_name(store, paths)
        taken = "its name is taken from the last run's spec" if name else "its name is not known"
        why = error if isinstance(error, Damaged) else f"{store.where(paths.sweep)}: missing"
        log.warning("%s; %s, and the next run writes the file anew", why, taken)
        return None if name is None else Identity(name, None, name)


def _recorded_name(store: Store, paths: ResultsPaths) -> str | None:
    """The name of the sweep in the newest readable ``runs/<run>/spec.yaml``."""
    raw = newest_spec(store, paths)
    return str(raw["name"]) if raw and raw.get("name") else None


def newest_spec(store: Store, paths: ResultsPaths) -> dict[str, JSON] | None:
    """The spec of the last run whose spec.yaml can be read."""
    for entry in reversed(store.list(paths.runs)):
        key = f"{entry.key}/spec.yaml"
        try:
            raw = parse_yaml(store.read(key).decode(), store.where(key))
        except (EditSweepError, UnicodeDecodeError):
            continue
        if isinstance(raw, dict):
            return raw
    return None


def is_results(store: Store, paths: ResultsPaths) -> bool:
    """Return whether the folder holds results, even if it has lost its sweep.json."""
    if store.exists(paths.sweep) or store.exists(paths.plan):
        return True
    if any(paths.table_number(entry.name) is not None for entry in store.list(paths.table)):
        return True
    shards = [entry.name for entry in store.list(paths.parts) if entry.folder and paths.is_name(entry.name)]
    return (
        any(store.exists(paths.manifest(shard)) for shard in shards) or newest_spec(store, paths) is not None
    )


def write_identity(store: Store, paths: ResultsPaths, found: Identity, seals: Iterable[str | None]) -> None:
    """Write sweep.json anew, after what stands there was put aside. ``seals``: those of the table
    files; the folder keeps the one that most of them carry."""
    most = Counter(seal for seal in seals if seal is not None).most_common(1)
    kept = Identity(found.name, found.scoring, most[0][0] if most else found.seal)
    store.publish_new(paths.sweep, kept.to_bytes())


def read_plan(store: Store, paths: ResultsPaths) -> dict[str, JSON] | None:
    """plan.json, or its copy if it is missing or damaged; None if there is neither."""
    lost: list[str] = []
    for key in (paths.plan, paths.plan_copy):
        try:
            found = unseal_json(store.read(key), store.where(key), "cells", "current")
        except Missing:
            lost.append(f"{store.where(key)}: missing")
            continue
        except Damaged as error:
            lost.append(str(error))
            continue
        if lost:
            log.warning("%s; its copy %s is read instead", lost[0], store.where(key))
        return found
    if any(store.list(folder) for folder in (paths.table, paths.parts)):
        log.warning(
            "%s; every row counts, those that the last plan had dropped too, until the next run writes it anew",
            "; ".join(lost),
        )
    return None


def write_plan(store: Store, paths: ResultsPaths, value: Mapping[str, JSON]) -> None:
    """Write plan.json and its copy."""
    data = seal_json(value)
    store.replace(paths.plan, data)
    store.replace(paths.plan_copy, data)


def put_aside_damaged(store: Store, paths: ResultsPaths) -> None:
    """Put aside those of sweep.json, plan.json and its copy that cannot be read. For the folder's
    owner, who writes them anew."""
    for key, fields in (
        (paths.sweep, ("name",)),
        (paths.plan, ("cells", "current")),
        (paths.plan_copy, ("cells", "current")),
    ):
        try:
            unseal_json(store.read(key), store.where(key), *fields)
        except Missing:
            continue
        except Damaged as error:
            aside = paths.aside(key)
            put_aside(store, key, aside)
            log.warning("%s; moved to %s and written anew", error, store.where(aside))


def tell_foreign(store: Store, folder: str, foreign: Iterable[Entry]) -> None:
    """Say which entries of a folder of ours are not ours. They are left alone."""
    names = [repr(entry.name) for entry in foreign]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        log.warning(
            "%s: not written by editsweep, ignored: %s%s",
            store.where(folder),
            ", ".join(names[:_SHOWN]),
            more,
        )
