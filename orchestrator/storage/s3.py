"""A results folder in an S3-compatible bucket: ``s3://bucket/prefix``.

The verb everything rests on, :meth:`S3Store.publish_new`, is one PUT with ``If-None-Match: *``: the
service creates the object whole, or answers that the name is taken. S3 itself has that since 2024,
and so have most servers that speak its protocol; one that ignores the condition is found out by
:meth:`S3Store.probe` and refused. Objects are durable when the PUT returns; nothing is renamed, and
there are no folders to sync.

Credentials, region and endpoint are those of the AWS SDK (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, an instance's role, ...), on every node. Objects are written and listed by
boto3, which knows conditional writes; files of which only a part is wanted are opened by Arrow's S3
file system, which has none. Knows nothing of torch, Ray, or of what the objects mean.
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

_TAKEN = ("PreconditionFailed", "412")
_BUSY = ("ConditionalRequestConflict", "409")
_GONE = ("NoSuchKey", "404", "NotFound")
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
_DELETED_AT_ONCE = 1000
_RANGE_FROM = 8 << 20
"""Objects up to this size are read whole, even where only the end is wanted: one request instead of
three."""


class S3Store(Store):
    """Objects under ``prefix`` of a bucket. Making one touches nothing."""

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
        with self._telling("reach", ""):
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
                with self._telling("write", key):
                    self._client.put_object(
                        Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
                    )
                return True
            except _Refused as refused:
                if refused.code in _BUSY:
                    continue  # another write to the same name was under way: one of the two has won now
                # the answer to a PUT that succeeded can get lost, and the SDK's second one is then
                # told "taken"
                return refused.repeated and self._holds(key, data)
        raise StoreError("write", self.where(key), "other writes to the same object keep getting in the way")

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except Missing:
            return False

    def probe(self) -> None:
        """Find out whether the service honours the condition; without it two writers could
        overwrite each other.

        Raises :class:`StoreError` if it does not.
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
        with self._telling("write", key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def read(self, key: str) -> bytes:
        with self._telling("read", key):
            found = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
            data: bytes = found["Body"].read()
        return data

    def open(self, key: str) -> BinaryIO:
        with self._telling("read", key):
            size = self._client.head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"]
        if size <= _RANGE_FROM:
            return io.BytesIO(self.read(key))
        with self._telling("read", key):
            return cast(BinaryIO, self._arrow.open_input_file(f"{self.bucket}/{self._key(key)}"))

    def list(self, folder: str) -> list[Entry]:
        start = f"{self._key(folder)}/"
        prefix = f"{folder}/" if folder else ""
        entries = []
        with self._telling("list", folder):
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
            with self._telling("read", key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            return True
        except Missing:
            return any(True for _ in self._keys(key))

    def _keys(self, folder: str) -> Iterator[str]:
        with self._telling("list", folder):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{self._key(folder)}/"
            )
            for page in pages:
                yield from (item["Key"] for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing), self._telling("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def delete_folder(self, folder: str) -> None:
        if not folder:
            raise ValueError("refusing to delete the whole results folder")
        keys = list(self._keys(folder))
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
            with self._telling("delete", folder):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": some, "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                raise StoreError("delete", f"s3://{self.bucket}/{error['Key']}", str(error.get("Message")))

    def sync(self, folder: str = "") -> None:
        """Nothing: what the service has acknowledged is durable."""

    def tidy(self, folder: str, older_than_s: float = 3600.0) -> None:
        """Nothing: an interrupted PUT leaves no object."""

    def filesystem(self) -> tuple[S3FileSystem, str]:
        with self._telling("reach", ""):
            return self._arrow, f"{self.bucket}/{self.prefix}"

    def where(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    @contextlib.contextmanager
    def _telling(self, action: str, key: str) -> Iterator[None]:
        """Turns the SDK's errors into messages that name object and cause."""
        sdk = optional("botocore.exceptions", "s3", self.where())
        name = self.where(key)
        try:
            yield
        except sdk.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _TAKEN + _BUSY:
                retried = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                raise _Refused(action, name, code, repeated=bool(retried)) from error
            if code in _GONE:
                raise Missing(action, name, "no such object") from error
            raise StoreError(action, name, _CAUSES.get(code) or str(error)) from error
        except FileNotFoundError as error:
            raise Missing(action, name, "no such object") from error
        except (sdk.BotoCoreError, OSError) as error:
            raise StoreError(action, name, str(error)) from error


class _Refused(StoreError):
    """The service did not create the object, because of the condition."""

    def __init__(self, action: str, path: str, code: str, repeated: bool) -> None:
        super().__init__(action, path, f"the object exists ({code})")
        self.code = code
        self.repeated = repeated
