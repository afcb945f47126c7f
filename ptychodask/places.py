"""Storage locations of scans and results: folders, or ``s3://`` URLs.

An object store has no folders, no rename and no locks. A store in a bucket is written under its final name; the root
attribute ``state``, put last, makes it complete, and a conditional put of an object `CLAIM` keeps a second writer out.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

from zarr.storage import LocalStore, ObjectStore

from ptychodask.errors import PtychodaskError
from ptychodask.folders import (
    DAMAGED,
    LEDGER,
    StoreKind,
    atomic_folder,
    building_path,
    from_json,
    recorded_folder_format,
)
from ptychodask.folders import check_vacant as check_vacant_folder
from ptychodask.folders import is_resumable as is_resumable_folder

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

logger = logging.getLogger(__name__)

SCHEME = "s3:"

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

CLAIM = "claim"
"""Object beside an unfinished store; its content is a random text that only its writer knows."""

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


@dataclass(frozen=True)
class S3Location:
    """Object or prefix in a bucket, with methods of `pathlib.Path`.

    It contains no credentials: each process that receives it uses those of its environment.

    Examples
    --------
    >>> scan = parse_location("s3://beamline/2026/scan.zarr")
    >>> str(scan / "zarr.json"), scan.name, str(scan.parent)
    ('s3://beamline/2026/scan.zarr/zarr.json', 'scan.zarr', 's3://beamline/2026')
    """

    bucket: str

    key: str
    """Names joined by slashes, without one at either end."""

    def __str__(self) -> str:
        return f"{SCHEME}//{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> S3Location:
        return S3Location(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> S3Location:
        return S3Location(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> S3Location:
        return self.parent / name

    def resolve(self) -> S3Location:
        return self

    def exists(self) -> bool:
        """True if there is an object of this name or below it."""
        return self._is_object() or self.is_dir()

    def is_dir(self) -> bool:
        """True if there is any object below this name."""
        return next(self.below(), None) is not None

    def _is_object(self) -> bool:
        with s3_errors(self):
            try:
                _bucket(self).head(self.key)
            except FileNotFoundError:
                return False
        return True

    def below(self) -> Iterator[tuple[S3Location, int]]:
        """Objects below this name, each with its size in bytes."""
        with s3_errors(self):
            for batch in _bucket(self).list(prefix=self.key or None):
                for entry in batch:
                    yield S3Location(self.bucket, entry["path"]), int(entry["size"])

    def read_bytes(self) -> bytes:
        """Content of an object; raises `FileNotFoundError` if there is none."""
        with s3_errors(self):
            return bytes(_bucket(self).get(self.key).bytes())

    def write_bytes(self, content: bytes) -> None:
        """Create or replace an object; it appears only when complete."""
        with s3_errors(self):
            _bucket(self).put(self.key, content)

    def create(self, content: bytes) -> bool:
        """Create an object; False if one exists already.

        A conditional put (``If-None-Match: *``): of several writers, exactly one succeeds.
        """
        from obstore.exceptions import AlreadyExistsError

        with s3_errors(self):
            try:
                _bucket(self).put(self.key, content, mode="create")
            except AlreadyExistsError:
                # If the answer to a put was lost, its second attempt finds the object of the first.
                with suppress(FileNotFoundError):
                    return self.read_bytes() == content
                return False
        return True

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove an object; raises `FileNotFoundError` if there is none, unless `missing_ok`."""
        # S3 answers the delete of a missing object as that of an existing one; only a head request
        # shows the difference.
        if not missing_ok and not self._is_object():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with s3_errors(self), suppress(FileNotFoundError):
            _bucket(self).delete(self.key)

    def remove(self) -> None:
        """Remove all objects below this name."""
        # Removal is not atomic, and Zarr reads a missing chunk as fill values. Without its root, the rest is no store
        # to any reader, however far the removal got.
        (self / "zarr.json").unlink(missing_ok=True)
        keys = [location.key for location, _ in self.below()]
        with s3_errors(self):
            if keys:
                _bucket(self).delete(keys)


Location = Path | S3Location
"""Storage location of a scan or a result, as `parse_location` returns it."""


def parse_location(named: str | Path | S3Location) -> Location:
    """Location from a path or an ``s3://`` URL.

    Parameters
    ----------
    named : str or path
        ``s3://bucket/name`` is in a bucket, also after `pathlib.Path` has merged the two slashes.

    Returns
    -------
    Path or S3Location

    Raises
    ------
    PtychodaskError
        If the URL has no bucket, or no name after it.

    Examples
    --------
    >>> parse_location("data/scan.zarr").as_posix()
    'data/scan.zarr'
    >>> parse_location("s3://beamline/scan.zarr")
    S3Location(bucket='beamline', key='scan.zarr')
    """
    if isinstance(named, S3Location):
        return named
    text = str(named)
    if not text.startswith(f"{SCHEME}/"):
        return Path(named)
    bucket, *names = text.removeprefix(SCHEME).lstrip("/").rstrip("/").split("/")
    if not bucket or not names or any(name in ("", ".", "..") for name in names):
        raise PtychodaskError(f"{text}: expected s3://bucket/name, with one slash between names")
    return S3Location(bucket, "/".join(names))


def on_disk(named: str | Path, noun: str) -> Path:
    """Path on a disk; raises `PtychodaskError` for an ``s3://`` URL.

    Parameters
    ----------
    named : str or path
    noun : str
        Word for it in the message, with its article.
    """
    location = parse_location(named)
    if isinstance(location, S3Location):
        raise PtychodaskError(f"{location}: {noun} cannot be stored in an object store; name a folder on a disk")
    return location


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


def zarr_store(location: Location, *, read_only: bool = False) -> Path | S3ZarrStore:
    """Store of a location that Zarr and xarray open."""
    return S3ZarrStore(location, read_only=read_only) if isinstance(location, S3Location) else location


def location_of(store: Any) -> Location:
    """Location of an open Zarr store, local or `S3ZarrStore`."""
    assert isinstance(store, LocalStore | S3ZarrStore)
    return store.location if isinstance(store, S3ZarrStore) else Path(store.root)


def stored_sizes(location: Location) -> Iterator[int]:
    """Bytes of each file or object below a location."""
    if isinstance(location, S3Location):
        return (size for _, size in location.below())
    return (path.stat().st_size for path in location.rglob("*") if path.is_file())


def remove(location: Location) -> None:
    """Remove everything below a location, if anything."""
    if isinstance(location, S3Location):
        location.remove()
    else:
        shutil.rmtree(location, ignore_errors=True)


def is_complete(location: Location) -> bool:
    """True if a location exists and is not being written."""
    # A folder has its name only once it is complete; objects are there from the first put on.
    if isinstance(location, Path):
        return location.exists()
    return _root_of(location).get("state") == "complete"


def is_resumable(location: Location) -> bool:
    """True if a stopped writer of a location left finished parts."""
    return is_resumable_folder(location) if isinstance(location, Path) else (_beside(location) / LEDGER).exists()


@dataclass(frozen=True)
class Writing:
    """Store that is being written, with the files of its writer."""

    whole: Location
    """Location to write into: a folder is renamed at the end, objects have their final names from the beginning."""

    beside: Location
    """Ledger, sums and lock or claim of the writer; removed at the end."""

    claim: bytes | None = None
    """Content of the object `CLAIM` while it is this writer's; None on a disk, where a file is locked."""

    def check_held(self) -> None:
        """Raise `PtychodaskError` if another writer has taken over."""
        # Asked just before the store is marked as complete: the objects may by now be those of the other writer.
        if self.claim is not None and not self._is_held():
            raise PtychodaskError(
                f"{self.whole}: another run took over with overwrite=True or resume=True while this one was writing "
                "it; wait until that run has finished, and check its result"
            )

    def _is_held(self) -> bool:
        try:
            return isinstance(self.beside, Path) or (self.beside / CLAIM).read_bytes() == self.claim
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        """Remove an unfinished store, unless it is resumable or another writer's."""
        assert isinstance(self.whole, S3Location)
        assert isinstance(self.beside, S3Location)
        try:
            if not self._is_held():
                return
            # What a ledger lists is kept. Only the claim goes, so that the next run sees that no writer is at work.
            if (self.beside / LEDGER).exists():
                (self.beside / CLAIM).unlink(missing_ok=True)
                return
            self.whole.remove()
            self.beside.remove()
        except PtychodaskError as error:
            # The error that ended the writing is on its way; a second one must not hide it.
            logger.warning("%s; the unfinished store is left there, and cannot be opened", error)


@contextmanager
def atomic_store(location: Location, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> Iterator[Writing]:
    """Store to write into; complete if the block succeeds, else removed.

    Parameters
    ----------
    location : Path or S3Location
        Final location of the store.
    overwrite, kind, resume
        As for `atomic_folder`.

    Yields
    ------
    Writing

    Raises
    ------
    PtychodaskError
        As `atomic_folder`; and if the object store does not answer.

    Notes
    -----
    Nothing can be renamed in a bucket. An existing store is removed first, and the new one is written under its name;
    the last put of the block marks it as complete. A writer that is killed leaves a store that readers refuse.
    """
    if isinstance(location, Path):
        with atomic_folder(location, overwrite=overwrite, kind=kind, resume=resume) as building:
            # Workers may have another current folder.
            yield Writing(building.resolve(), building.resolve().parent)
        return
    writing = _claimed(location, overwrite=overwrite, kind=kind, resume=resume)
    try:
        yield writing
    except BaseException:
        writing.leave()
        raise
    # Last: a writer that is killed just before leaves a claim, by which the next one is refused until it takes over,
    # and never an unfinished store that looks free.
    remove(writing.beside)


def _claimed(location: S3Location, *, overwrite: bool, kind: StoreKind, resume: bool) -> Writing:
    """Claim a location for this writer, and remove an existing store."""
    check_vacant(location, overwrite=overwrite, kind=kind, resume=resume)
    beside, claim = _beside(location), uuid4().hex.encode()
    resuming = resume and is_resumable(location)
    # A bucket has no lock that ends with a process, so the claim is an object, and one of a killed writer stays. With
    # overwrite or resume the user has stated that no other run is at work: its claim goes.
    if resuming:
        (beside / CLAIM).unlink(missing_ok=True)
    else:
        beside.remove()
    # Of several writers that come this far, the conditional put lets one through.
    if not (beside / CLAIM).create(claim):
        raise _at_work(location)
    # Only the one that has the claim removes the existing store.
    if not resuming:
        location.remove()
    return Writing(location, beside, claim)


def check_vacant(location: Location, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
    """Raise `PtychodaskError` unless a location can be written.

    Parameters
    ----------
    location : Path or S3Location
    overwrite, kind, resume
        As for `atomic_store`.
    """
    if isinstance(location, Path):
        check_vacant_folder(location, overwrite=overwrite, kind=kind, resume=resume)
        return
    complete, claimed, resumable = is_complete(location), (_beside(location) / CLAIM).exists(), is_resumable(location)
    if claimed and not (overwrite or resume):
        raise _at_work(location)
    if resumable and not complete and not (overwrite or resume):
        raise PtychodaskError(
            f"{location}: a stopped run left finished parts; continue it with resume=True (--resume), or start again "
            "with overwrite=True (--overwrite)"
        )
    if not location.exists():
        return
    if not overwrite and (complete or not (resume or claimed)):
        raise PtychodaskError(f"{location}: exists already; pass overwrite=True (--overwrite), or another name")
    # The root goes first: a writer killed while it removed the existing store leaves objects without a root, and its
    # claim, which it got only because the root was of this kind.
    format_name = recorded_format(location) or (kind.name if claimed else "something of another kind")
    if format_name not in (kind.name, DAMAGED):
        raise PtychodaskError(
            f"{location}: is {format_name}, and overwrite=True (--overwrite) replaces only a {kind.name}; pass another "
            "name, or remove it first"
        )


def recorded_format(location: Location) -> str | None:
    """Format recorded in the root at a location; None without one."""
    return recorded_folder_format(location) if isinstance(location, Path) else _root_of(location).get("format")


def _root_of(location: S3Location) -> dict[str, Any]:
    """Root attributes of a Zarr store; their format is `DAMAGED` if unreadable."""
    try:
        attributes = from_json((location / "zarr.json").read_bytes().decode())["attributes"]
        return attributes if isinstance(attributes, dict) else {"format": DAMAGED}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return {"format": DAMAGED}


def _beside(location: S3Location) -> S3Location:
    return location.with_name(building_path(Path(location.name)).name)


def _at_work(location: S3Location) -> PtychodaskError:
    resuming = "continue with resume=True (--resume), or " if is_resumable(location) else ""
    return PtychodaskError(
        f"{location}: another run is writing it, or was killed ({_beside(location) / CLAIM} exists); wait for it, or, "
        f"if no run is at work, {resuming}start again with overwrite=True (--overwrite)"
    )
