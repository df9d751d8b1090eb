"""A results folder in an S3-compatible bucket: ``s3://bucket/prefix``.

:meth:`S3Store.publish_new` is one PUT with ``If-None-Match: *``: the service creates the whole
object, or answers that the key exists. S3 supports this since 2024, and so do most servers with its
protocol. :meth:`S3Store.probe` detects a server that ignores the condition; such a server is
refused. Objects are durable when the PUT returns.

Credentials, region and endpoint are those of the AWS SDK (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, an instance's role, ...), on every node. boto3 writes and lists objects,
because Arrow's S3 file system has no conditional writes. Arrow opens files of which only a part is
read.
"""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from orchestrator.storage.base import Entry, Missing, Store, StoreError
from workers.optional import optional
from workers.types import EditSweepError

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

_EXISTS_CODES = ("PreconditionFailed", "412")
_CONFLICT_CODES = ("ConditionalRequestConflict", "409")
_MISSING_CODES = ("NoSuchKey", "404", "NotFound")
_CAUSES = {
    "AccessDenied": "permission denied",
    "403": "permission denied",
    "InvalidAccessKeyId": "the access key is unknown",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "NoSuchBucket": "no such bucket",
    "SlowDown": "the service asks to slow down",
    "InsufficientStorage": "the storage is full",
    "QuotaExceeded": "the storage quota is used up",
}
_DELETE_BATCH = 1000
_READ_WHOLE_BYTES = 8 << 20
"""Bytes. :meth:`S3Store.open` reads objects up to this size whole: one request instead of three."""


class S3Store(Store):
    """Objects under ``prefix`` of a bucket. The constructor sends no request."""

    def __init__(self, where: str) -> None:
        parts = urlsplit(where)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not self.bucket or not self.prefix or parts.query or parts.fragment:
            raise EditSweepError(f"{where}: expected s3://bucket/prefix")
        if any(part in ("", ".", "..") for part in self.prefix.split("/")):
            raise EditSweepError(f"{where}: the prefix has an empty or relative part")
        self._conditional = False

    @cached_property
    def _client(self) -> Any:
        boto3 = optional("boto3", "s3", self.where())
        config = optional("botocore.config", "s3", self.where()).Config(
            connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 6}
        )
        with self._store_errors("reach", ""):
            return boto3.session.Session().client("s3", config=config)

    @cached_property
    def _arrow(self) -> S3FileSystem:
        """Arrow's client, for the same endpoint with the same credentials."""
        from pyarrow.fs import S3FileSystem

        endpoint = urlsplit(str(self._client.meta.endpoint_url))
        found = self._client._request_signer._credentials
        options: dict[str, Any] = {}
        if found is not None:
            keys = found.get_frozen_credentials()
            options |= {
                "access_key": keys.access_key,
                "secret_key": keys.secret_key,
                "session_token": keys.token,
            }
        if not endpoint.netloc.endswith(".amazonaws.com"):
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        return S3FileSystem(region=self._client.meta.region_name, **options)

    def _key(self, key: str) -> str:
        parts = key.split("/") if key else []
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not a key: {key!r}")
        return "/".join([self.prefix, *parts])

    def publish_new(self, key: str, data: bytes) -> bool:
        if not self._conditional:
            self.probe()
        return self._create(key, data)

    def _create(self, key: str, data: bytes) -> bool:
        for _ in range(10):
            try:
                with self._store_errors("write", key):
                    self._client.put_object(
                        Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
                    )
                return True
            except _KeyExists as refused:
                if refused.code in _CONFLICT_CODES:
                    continue  # a concurrent write to the same key, which has ended by now
                # The reply to a successful PUT can be lost. The SDK then repeats the PUT, which
                # fails because the key exists.
                return refused.repeated and self._has_value(key, data)
        raise StoreError("write", self.where(key), "other writes to the same object keep getting in the way")

    def _has_value(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except Missing:
            return False

    def probe(self) -> None:
        """Check that the service supports ``If-None-Match: *``. Without it two writers could
        overwrite each other.

        Raises :class:`StoreError` if the service ignores the condition.
        """
        key = f"lock/probe-{uuid.uuid4().hex}"
        try:
            if not self._create(key, b"1") or self._create(key, b"2") or self.read(key) != b"1":
                raise StoreError(
                    "use",
                    self.where(),
                    "this service ignores `If-None-Match: *` on PUT, so that two writers would overwrite "
                    "each other",
                )
        finally:
            with contextlib.suppress(EditSweepError):
                self.delete(key)
        self._conditional = True

    def replace(self, key: str, data: bytes, settle: bool = True) -> None:
        with self._store_errors("write", key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def read(self, key: str) -> bytes:
        with self._store_errors("read", key):
            found = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
            data: bytes = found["Body"].read()
        return data

    def open(self, key: str) -> BinaryIO:
        with self._store_errors("read", key):
            size = self._client.head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"]
        if size <= _READ_WHOLE_BYTES:
            return io.BytesIO(self.read(key))
        with self._store_errors("read", key):
            return cast(BinaryIO, self._arrow.open_input_file(f"{self.bucket}/{self._key(key)}"))

    def list(self, folder: str) -> list[Entry]:
        start = f"{self._key(folder)}/"
        prefix = f"{folder}/" if folder else ""
        entries = []
        with self._store_errors("list", folder):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start, Delimiter="/"
            )
            for page in pages:
                for item in page.get("CommonPrefixes", ()):
                    name = item["Prefix"][len(start) :].rstrip("/")
                    entries.append(Entry(prefix + name, name, True, 0))
                for item in page.get("Contents", ()):
                    name = item["Key"][len(start) :]
                    if name:  # some tools leave an empty object in place of a folder
                        entries.append(Entry(prefix + name, name, False, int(item["Size"])))
        return sorted(entries, key=lambda entry: entry.name)

    def exists(self, key: str) -> bool:
        if not key:
            return any(True for _ in self._keys(""))
        try:
            with self._store_errors("read", key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            return True
        except Missing:
            return any(True for _ in self._keys(key))

    def _keys(self, folder: str) -> Iterator[str]:
        with self._store_errors("list", folder):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{self._key(folder)}/"
            )
            for page in pages:
                yield from (item["Key"] for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), self._store_errors("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def delete_folder(self, folder: str) -> None:
        if not folder:
            raise ValueError("refusing to delete the whole results folder")
        keys = list(self._keys(folder))
        for start in range(0, len(keys), _DELETE_BATCH):
            some = [{"Key": key} for key in keys[start : start + _DELETE_BATCH]]
            with self._store_errors("delete", folder):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": some, "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                raise StoreError("delete", f"s3://{self.bucket}/{error['Key']}", str(error.get("Message")))

    def sync(self, folder: str = "") -> None:
        """No-op: an acknowledged request is durable."""

    def tidy(self, folder: str, older_than_s: float = 3600.0) -> None:
        """No-op: an interrupted PUT leaves no object."""

    def filesystem(self) -> tuple[S3FileSystem, str]:
        with self._store_errors("reach", ""):
            return self._arrow, f"{self.bucket}/{self.prefix}"

    def where(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    @contextlib.contextmanager
    def _store_errors(self, action: str, key: str) -> Iterator[None]:
        """Convert the SDK's errors into :class:`StoreError`."""
        sdk = optional("botocore.exceptions", "s3", self.where())
        name = self.where(key)
        try:
            yield
        except sdk.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _EXISTS_CODES + _CONFLICT_CODES:
                retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                raise _KeyExists(action, name, code, repeated=bool(retried)) from error
            if code in _MISSING_CODES:
                raise Missing(action, name, "no such object") from error
            raise StoreError(action, name, _CAUSES.get(code) or str(error)) from error
        except FileNotFoundError as error:
            raise Missing(action, name, "no such object") from error
        except (sdk.BotoCoreError, OSError) as error:
            raise StoreError(action, name, str(error)) from error


class _KeyExists(StoreError):
    """The service did not create the object, because it exists (``If-None-Match: *``)."""

    def __init__(self, action: str, path: str, code: str, repeated: bool) -> None:
        super().__init__(action, path, f"the object exists ({code})")
        self.code = code
        self.repeated = repeated
