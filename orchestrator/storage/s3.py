"""A results folder in an S3-compatible bucket: ``s3://bucket/prefix``.

:meth:`S3Store.publish_new` is one PUT with ``If-None-Match: *``: the service creates the whole
object, or answers that the key exists. S3 supports this since 2024, and so do most servers with its
protocol. :meth:`S3Store.probe` detects a server that ignores the condition; such a server is
refused. Objects are durable when the PUT returns.

Credentials, region and endpoint are those of the AWS SDK (``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, an instance's role, ...), on every node. boto3 writes and lists objects,
because Arrow's S3 file system has no conditional writes. Every request, with the reading of its
reply to the end, is tried again while its error may pass, for :data:`PATIENCE_SECONDS` at most. The
SDK's own repetition is off: it ends before a reply's body is read. Arrow scans large tables.
"""

from __future__ import annotations

import contextlib
import io
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from orchestrator.storage.base import Entry, Missing, Store, StoreError
from workers.optional import optional
from workers.types import EditSweepError

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 120.0
"""A request is tried again for so long, if its error may pass."""

FIRST_CONTACT_SECONDS = 3.0
"""The same for a connection that is refused before any request has succeeded: then the address is
more likely wrong than the service down."""

_PAUSES = (0.1, 5.0)
"""Seconds before the second try, and the most: each pause is up to twice the one before."""

_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}
_PASSING_STATUS = (408, 425, 429)
"""HTTP status codes of errors that may pass, besides those from 500 on."""

_LASTING_STATUS = (501, 505, 507)
_PASSING_CODES = (
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
)
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
_BUFFER_BYTES = 1 << 20
_READ_WHOLE_BYTES = 8 << 20
"""Bytes. :meth:`S3Store.open` reads objects up to this size whole: one request instead of three."""


class S3Store(Store):
    """Objects under ``prefix`` of a bucket. The constructor sends no request."""

    folders_take_names = False

    def __init__(self, where: str) -> None:
        try:
            parts = urlsplit(where)
        except ValueError as error:
            raise EditSweepError(f"{where}: {error}; expected s3://bucket/prefix") from None
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if parts.scheme != "s3" or not self.bucket or not self.prefix or parts.query or parts.fragment:
            raise EditSweepError(f"{where}: expected s3://bucket/prefix")
        if any(part in ("", ".", "..") for part in self.prefix.split("/")):
            raise EditSweepError(f"{where}: the prefix has an empty or relative part")
        self._conditional = False
        self._reached = False

    @cached_property
    def _client(self) -> Any:
        boto3 = optional("boto3", "s3", self.where())
        config = optional("botocore.config", "s3", self.where()).Config(
            **_TIMEOUTS, retries={"total_max_attempts": 1}
        )
        with self._store_errors("reach", ""):
            try:
                return boto3.session.Session().client("s3", config=config)
            except ValueError as error:  # an address in AWS_ENDPOINT_URL or in a profile that is none
                raise StoreError("reach", self.where(), str(error)) from error

    def _ask(self, action: str, key: str, request: Callable[[], Answer]) -> Answer:
        """The answer to a request, which is made again while its error may pass."""
        tries, end = 0, 0.0
        first, most = _PAUSES
        while True:
            try:
                with self._store_errors(action, key):
                    answer = request()
                self._reached = True
                return answer
            except _KeyExists as error:
                error.repeated = tries > 0
                raise
            except _MayPass as error:
                if not tries:
                    patience = PATIENCE_SECONDS if self._reached or error.reached else FIRST_CONTACT_SECONDS
                    end = time.monotonic() + patience
                pause = random.uniform(0.5, 1.0) * min(first * 2.0**tries, most)
                if time.monotonic() + pause > end:
                    cause = f"{error.cause} ({tries + 1} tries)" if tries else error.cause
                    raise StoreError(action, error.path, cause) from error
                time.sleep(pause)
                tries += 1

    @cached_property
    def _arrow(self) -> S3FileSystem:
        """Arrow's client, for the same endpoint with the same credentials."""
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        endpoint = urlsplit(str(self._client.meta.endpoint_url))
        found = self._client._request_signer._credentials
        options: dict[str, Any] = {"retry_strategy": AwsStandardS3RetryStrategy(max_attempts=12)}
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
        repeated = False
        for _ in range(10):
            try:
                self._ask(
                    "write",
                    key,
                    lambda: self._client.put_object(
                        Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
                    ),
                )
                return True
            except _KeyExists as refused:
                if refused.code in _CONFLICT_CODES:
                    repeated = repeated or refused.repeated
                    continue  # a concurrent write to the same key, which has ended by now
                # The reply to a successful PUT can be lost. The PUT is then repeated, and fails
                # because the key exists.
                return (repeated or refused.repeated) and self._has_value(key, data)
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
        self._ask(
            "write",
            key,
            lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data),
        )

    def read(self, key: str) -> bytes:
        return self._get(key)

    def _get(self, key: str, **options: str) -> bytes:
        def get() -> bytes:
            found = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **options)
            data: bytes = found["Body"].read()
            if len(data) != int(found["ContentLength"]):
                raise ConnectionError("the reply ended early")
            return data

        return self._ask("read", key, get)

    def _head(self, key: str) -> Any:
        return self._ask(
            "read", key, lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        )

    def open(self, key: str) -> BinaryIO:
        found = self._head(key)
        size, version = int(found["ContentLength"]), str(found["ETag"])
        if size <= _READ_WHOLE_BYTES:
            return io.BytesIO(self.read(key))

        def read(start: int, stop: int) -> bytes:
            try:
                return self._get(key, Range=f"bytes={start}-{stop - 1}", IfMatch=version)
            except _KeyExists:
                raise StoreError("read", self.where(key), "it was replaced meanwhile; try again") from None

        return cast(BinaryIO, io.BufferedReader(_Object(size, read), _BUFFER_BYTES))

    def list(self, folder: str) -> list[Entry]:
        start = f"{self._key(folder)}/"
        prefix = f"{folder}/" if folder else ""
        entries = []
        for page in self._pages(folder, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                name = item["Prefix"][len(start) :].rstrip("/")
                entries.append(Entry(prefix + name, name, True, 0))
            for item in page.get("Contents", ()):
                name = item["Key"][len(start) :]
                if name:  # some tools leave an empty object in place of a folder
                    entries.append(Entry(prefix + name, name, False, int(item["Size"])))
        return sorted(entries, key=lambda entry: entry.name)

    def _pages(self, folder: str, **options: str) -> Iterator[Any]:
        """The pages of a list of everything under ``folder``."""
        asked = {"Bucket": self.bucket, "Prefix": f"{self._key(folder)}/", **options}
        while True:
            page = self._ask("list", folder, lambda: self._client.list_objects_v2(**asked))
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def exists(self, key: str) -> bool:
        if not key:
            return any(True for _ in self._keys(""))
        try:
            self._head(key)
            return True
        except Missing:
            return any(True for _ in self._keys(key))

    def _keys(self, folder: str) -> Iterator[str]:
        for page in self._pages(folder):
            yield from (item["Key"] for item in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        with contextlib.suppress(Missing):
            self._ask(
                "delete",
                key,
                lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(key)),
            )

    def move(self, key: str, target: str, instead: bytes | None = None) -> None:
        source = {"Bucket": self.bucket, "Key": self._key(key)}
        try:
            self._ask(
                "write",
                target,
                lambda: self._client.copy_object(
                    Bucket=self.bucket, Key=self._key(target), CopySource=source
                ),
            )
        except Missing:
            return  # keys that begin with this one and a slash are in nobody's way
        if instead is None:
            self.delete(key)
        else:
            self.replace(key, instead)

    def delete_folder(self, folder: str) -> None:
        if not folder:
            raise ValueError("refusing to delete the whole results folder")
        keys = list(self._keys(folder))
        for start in range(0, len(keys), _DELETE_BATCH):
            some = [{"Key": key} for key in keys[start : start + _DELETE_BATCH]]
            answer = self._ask("delete", folder, partial(self._delete, some))
            for error in answer.get("Errors", ()):
                raise StoreError("delete", f"s3://{self.bucket}/{error['Key']}", str(error.get("Message")))

    def _delete(self, some: Sequence[Mapping[str, str]]) -> Any:
        return self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": some, "Quiet": True})

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
                raise _KeyExists(action, name, code) from error
            if code in _MISSING_CODES:
                raise Missing(action, name, "no such object") from error
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            message = str(error.response.get("Error", {}).get("Message") or "an error")
            cause = _CAUSES.get(code) or f"{message} ({code or status})"
            if code in _PASSING_CODES or status in _PASSING_STATUS:
                raise _MayPass(action, name, cause) from error
            if status >= 500 and status not in _LASTING_STATUS:
                raise _MayPass(action, name, cause) from error
            raise StoreError(action, name, cause) from error
        except FileNotFoundError as error:
            raise Missing(action, name, "no such object") from error
        except (sdk.EndpointConnectionError, sdk.ConnectTimeoutError) as error:
            raise _MayPass(action, name, str(error), reached=False) from error
        except (sdk.SSLError, sdk.ProxyConnectionError) as error:
            raise StoreError(action, name, str(error)) from error
        except (
            sdk.HTTPClientError,  # no reply in time, a connection that was closed, a body cut off
            sdk.IncompleteReadError,
            sdk.ChecksumError,
            optional("botocore.parsers", "s3", self.where()).ResponseParserError,  # a list cut off
            optional("urllib3.exceptions", "s3", self.where()).HTTPError,
            OSError,
        ) as error:
            raise _MayPass(action, name, str(error)) from error
        except sdk.BotoCoreError as error:
            raise StoreError(action, name, str(error)) from error


class _Object(io.RawIOBase):
    """A large object, read in ranges."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._at, self._read = size, 0, read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._read(self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _MayPass(StoreError):
    """An error of the service or of the way to it. ``reached``: something answered."""

    def __init__(self, action: str, path: str, cause: str, reached: bool = True) -> None:
        super().__init__(action, path, cause)
        self.reached = reached


class _KeyExists(StoreError):
    """The service did not create the object, because it exists (``If-None-Match: *``)."""

    def __init__(self, action: str, path: str, code: str) -> None:
        super().__init__(action, path, f"the object exists ({code})")
        self.code = code
        self.repeated = False
        """The request had been made before and its reply was an error, or was lost."""
