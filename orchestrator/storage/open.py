"""Open the store that a path or an address names. Adding a storage: its file, one line here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from orchestrator.storage.base import Store
from orchestrator.storage.local import LocalStore

SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "s3": "orchestrator.storage.s3:S3Store",
    }
)
"""Scheme of an address -> the class that is called with the address. It is imported when such an
address is opened, because it may need packages that other users have not installed."""


def open_store(where: str | os.PathLike[str]) -> Store:
    """The store at a path, or at an address such as ``s3://bucket/prefix``. Touches nothing."""
    scheme, separator, _ = where.partition("://") if isinstance(where, str) else ("", "", "")
    if not separator or scheme not in SCHEMES:
        return LocalStore(where)
    module, attribute = SCHEMES[scheme].split(":")
    store: Store = getattr(import_module(module), attribute)(where)
    return store
