"""Locations in an object store (``s3://``): client, objects, and their Zarr store."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

from zarr.storage import ObjectStore

from ptychodask.errors import PtychodaskError
from ptychodask.storage.objects import CLAIM, ObjectLocation

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


RETRY_S = 150
"""Retry time of a request, seconds: longer than a gateway takes to restart."""


RETRY_PAUSE_S = 5
"""Longest pause between two attempts, seconds."""


FIRST_RETRY_S = 10
"""Retry time of the first request to a bucket, seconds: short, so that a wrong address fails soon. Workers use
`RETRY_S`, since their client has had an answer.
"""


REQUEST_S = 60
"""Time limit of one attempt, seconds."""


CONNECT_S = 10
"""Time limit of one attempt to connect, seconds."""


CAUSES = {
    "NoSuchBucket": "there is no such bucket; create it first, or name another",
    "InvalidAccessKeyId": "the object store does not know the access key; set AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not that of the access key; set AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the access key lacks a permission; ask for read and write access to the bucket",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
}
"""Cause and remedy for the error codes of S3.

Source: Amazon S3 API Reference, "Error responses".
"""


class _Settings(NamedTuple):
    """Endpoint and credentials from the environment; never logged, never sent."""

    endpoint: str | None
    key: str | None
    secret: str | None
    token: str | None
    region: str
    unsigned: bool

    @classmethod
    def from_environment(cls) -> _Settings:
        variable = os.environ.get
        return cls(
            variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL"),
            variable("AWS_ACCESS_KEY_ID"),
            variable("AWS_SECRET_ACCESS_KEY"),
            variable("AWS_SESSION_TOKEN"),
            variable("AWS_REGION") or variable("AWS_DEFAULT_REGION") or "us-east-1",
            variable("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"),
        )

    # Logs and tracebacks show the repr of an argument, so the secrets stay out of it.
    def __repr__(self) -> str:
        return f"settings for {self.address}"

    @property
    def address(self) -> str:
        """The endpoint, without any user and password in it."""
        if self.endpoint is None:
            return f"Amazon S3 ({self.region})"
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


class S3Location(ObjectLocation):
    """Object or prefix in a bucket of S3.

    Examples
    --------
    >>> scan = S3Location("beamline", "2026/scan.zarr")
    >>> str(scan / "zarr.json"), scan.name, str(scan.parent)
    ('s3://beamline/2026/scan.zarr/zarr.json', 'scan.zarr', 's3://beamline/2026')
    """

    scheme = "s3"

    def is_object(self) -> bool:
        with s3_errors(self):
            try:
                _bucket(self).head(self.key)
            except FileNotFoundError:
                return False
        return True

    def below(self) -> Iterator[tuple[S3Location, int]]:
        with s3_errors(self):
            for batch in _bucket(self).list(prefix=self.key or None):
                for entry in batch:
                    yield S3Location(self.bucket, entry["path"]), int(entry["size"])

    def read_bytes(self) -> bytes:
        with s3_errors(self):
            return bytes(_bucket(self).get(self.key).bytes())

    def write_bytes(self, data: Any, /) -> None:
        with s3_errors(self):
            _bucket(self).put(self.key, data)

    def create(self, content: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        with s3_errors(self):
            try:
                # A conditional put (If-None-Match: *): of several writers, exactly one succeeds.
                _bucket(self).put(self.key, content, mode="create")
            except AlreadyExistsError:
                # If the answer to a put was lost, its second attempt finds the object of the first.
                with suppress(FileNotFoundError):
                    return self.read_bytes() == content
                return False
        return True

    def delete(self, keys: list[str]) -> None:
        with s3_errors(self), suppress(FileNotFoundError):
            # A server takes an empty list for a malformed request.
            if keys:
                _bucket(self).delete(keys[0] if len(keys) == 1 else keys)

    def zarr_store(self, *, read_only: bool = False) -> S3ZarrStore:
        return S3ZarrStore(self, read_only=read_only)


@contextmanager
def s3_errors(location: S3Location) -> Iterator[None]:
    """Raise errors of an object store in a block as one-line `PtychodaskError`."""
    if find_spec("obstore") is None:
        raise PtychodaskError(f"{location}: needs the package obstore; pip install 'ptychodask[cloud]'")
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        # The server's answer stays out of the message and of the traceback: it may repeat the signed request.
        raise PtychodaskError(f"{location}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    address = _Settings.from_environment().address
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    status = re.search(r"status code: (\d+ [\w ]+)", str(error))
    if code and code[1] in CAUSES:
        return CAUSES[code[1]]
    if code or status:
        reason = " ".join(part[1] for part in (status, code) if part)
        return f"the object store at {address} refused a request ({reason}); ask its administrator"
    if "HTTP error" in str(error):
        return (
            f"no answer from the object store at {address}; check that it is running, or set AWS_ENDPOINT_URL to its "
            "address"
        )
    return f"the object store at {address} failed ({type(error).__name__}); try again, or ask its administrator"


def _bucket(location: S3Location) -> S3Store:
    """Client of the bucket of a location."""
    return _opened(location.bucket, "", _checked(location, _Settings.from_environment()))


def _checked(location: S3Location, settings: _Settings) -> _Settings:
    if settings.endpoint and not re.fullmatch(r"https?://[^/\s]+/?", settings.endpoint):
        raise PtychodaskError(
            f"{location}: AWS_ENDPOINT_URL is {settings.address!r}, expected http://host:port or https://host"
        )
    if not settings.unsigned and not (settings.key and settings.secret):
        raise PtychodaskError(
            f"{location}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true "
            "for a public bucket"
        )
    return settings


# Settings are part of the cache's key: a process whose environment changes gets a new client.
@lru_cache(maxsize=128)
def _opened(bucket: str, prefix: str, settings: _Settings) -> S3Store:
    """Client of a prefix in a bucket that has answered once."""
    if not prefix:
        # Listing a name that cannot exist checks address, keys, bucket and permission at once, with a short retry time;
        # a wrong setting would else fail only after `RETRY_S`.
        patience_s = FIRST_RETRY_S if parent_process() is None else RETRY_S
        next(iter(_client(bucket, "", settings, patience_s).list(prefix=f"{CLAIM}-{uuid4().hex}")), None)
    else:
        _opened(bucket, "", settings)
    return _client(bucket, prefix, settings, RETRY_S)


def _client(bucket: str, prefix: str, settings: _Settings, retry_s: float) -> S3Store:
    from obstore.store import S3Store

    signed = {} if settings.unsigned else {"access_key_id": settings.key, "secret_access_key": settings.secret}
    options: dict[str, Any] = signed | ({"session_token": settings.token} if settings.token else {})
    if settings.endpoint:
        options["endpoint"] = settings.endpoint
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=settings.region,
        skip_signature=settings.unsigned,
        client_options={
            "allow_http": (settings.endpoint or "").startswith("http://"),
            "timeout": timedelta(seconds=REQUEST_S),
            "connect_timeout": timedelta(seconds=min(CONNECT_S, retry_s)),
        },
        retry_config={
            # Time limits the attempts, not their number: a gateway that restarts refuses many of them at once.
            "max_retries": 10_000,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=RETRY_PAUSE_S),
                "base": 2,
            },
        },
        **options,
    )


class S3ZarrStore(ObjectStore):  # type: ignore[type-arg]
    """Zarr store in a bucket, pickled as its location only.

    Parameters
    ----------
    location : S3Location
    read_only : bool
    """

    def __init__(self, location: S3Location, *, read_only: bool = False) -> None:
        with s3_errors(location):
            opened = _opened(location.bucket, location.key, _checked(location, _Settings.from_environment()))
        super().__init__(opened, read_only=read_only)
        self.location = location
        """Root of the store in its bucket."""

    # The client would be pickled with its credentials; each process takes those of its environment instead.
    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.location, self.read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3ZarrStore) and (self.location, self.read_only) == (other.location, other.read_only)

    def __str__(self) -> str:
        return str(self.location)

    def with_read_only(self, read_only: bool = False) -> S3ZarrStore:  # type: ignore[override]
        return S3ZarrStore(self.location, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with s3_errors(self.location):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Any) -> list[Buffer | None]:
        with s3_errors(self.location):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        with s3_errors(self.location):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        with s3_errors(self.location):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with s3_errors(self.location):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with s3_errors(self.location):
            await super().delete(key)

    async def getsize(self, key: str) -> int:
        with s3_errors(self.location):
            return await super().getsize(key)

    async def list(self) -> AsyncIterator[str]:  # type: ignore[override]
        with s3_errors(self.location):
            async for key in super().list():
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        with s3_errors(self.location):
            async for key in super().list_prefix(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        with s3_errors(self.location):
            async for key in super().list_dir(prefix):
                yield key


def _reopened(location: S3Location, read_only: bool) -> S3ZarrStore:
    return S3ZarrStore(location, read_only=read_only)
