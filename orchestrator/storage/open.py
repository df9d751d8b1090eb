"""Open the store that a path or an address names. Adding a storage: its file, one line here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from orchestrator.storage.base import Store
from orchestrator.storage.local import LocalStore
from workers.types import EditSweepError

SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "s3": "orchestrator.storage.s3:S3Store",
    }
)
"""Scheme of an address -> the class that is called with the address. It is imported when such an
address is opened, because it may need packages that other users have not installed."""


def open_store(where: str | os.PathLike[str]) -> Store:
    """The store at a path, or at an address such as ``s3://bucket/prefix``. Touches nothing.

    Raises EditSweepError for an address with another scheme, and for what cannot name a folder.
    """
    if not isinstance(where, (str, os.PathLike)):
        raise EditSweepError(f"a results folder is named by a text or a path, not by {where!r}")
    if not os.fspath(where):
        raise EditSweepError("the name of the results folder is empty; give a folder, or s3://bucket/prefix")
    scheme, separator, _ = where.partition("://") if isinstance(where, str) else ("", "", "")
    if not separator:
        return LocalStore(where)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise EditSweepError(f"{where}: no storage is known for {scheme}://; give a folder, or {known}")
    module, attribute = SCHEMES[scheme].split(":")
    store: Store = getattr(import_module(module), attribute)(where)
    return store
