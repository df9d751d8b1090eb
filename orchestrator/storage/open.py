"""Open the store that a path or an address names."""

from __future__ import annotations

import os

from orchestrator.storage.base import Store
from orchestrator.storage.local import LocalStore


def open_store(where: str | os.PathLike[str]) -> Store:
    """The store at a path, or at ``s3://bucket/prefix``. Touches nothing."""
    if isinstance(where, str) and where.startswith("s3://"):
        from orchestrator.storage.s3 import S3Store

        return S3Store(where)
    return LocalStore(where)
