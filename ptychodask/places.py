"""Where scans and results lie: folders on a disk, or below a name in a bucket of an object store (``s3://``)."""

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
from ptychodask.scan import PtychodaskError

if TYPE_CHECKING:
    from obstore.store import S3Store
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

logger = logging.getLogger(__name__)

SCHEME = "s3:"

RETRY_S = 150
"""How long a request is tried again: longer than a gateway takes to restart."""

RETRY_PAUSE_S = 5
"""Longest pause between two tries."""

FIRST_RETRY_S = 10
"""How long the first request to a bucket is tried again: a wrong address is told of soon. Workers wait longer: their
client was answered."""

REQUEST_S = 60
"""How long one try may take."""

CONNECT_S = 10
"""How long one try waits for a connection."""

CLAIM = "claim"
"""Object beside what is being written; it holds a text that its writer alone knows."""

CAUSES = {
    "NoSuchBucket": "there is no such bucket; make it first, or name another",
    "InvalidAccessKeyId": "the object store does not know the access key; set AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is not that of the access key; set AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the access key may not do this; ask for the right to read and write the bucket",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
}
"""What the error codes of S3 mean for its user.

Source: Amazon S3 API Reference, "Error responses"."""


class _Settings(NamedTuple):
    """How an object store is reached, as the environment has it; never logged, never sent."""

    endpoint: str | None
    key: str | None
    secret: str | None
    token: str | None
    region: str
    unsigned: bool

    @classmethod
    def now(cls) -> _Settings:
        found = os.environ.get
        return cls(
            found("AWS_ENDPOINT_URL_S3") or found("AWS_ENDPOINT_URL"),
            found("AWS_ACCESS_KEY_ID"),
            found("AWS_SECRET_ACCESS_KEY"),
            found("AWS_SESSION_TOKEN"),
            found("AWS_REGION") or found("AWS_DEFAULT_REGION") or "us-east-1",
            found("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"),
        )

    def __repr__(self) -> str:
        return f"settings for {self.address}"

    @property
    def address(self) -> str:
        """The endpoint without a user or a password that may be in it."""
        if self.endpoint is None:
            return f"Amazon S3 ({self.region})"
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


@dataclass(frozen=True)
class S3Location:
    """What a name in a bucket stands for: an object, or all objects below it. It answers as `pathlib.Path` does.

    It knows no credentials: each process that it is sent to takes those of its own environment.

    Examples
    --------
    >>> scan = parse_location("s3://beamline/2026/scan.zarr")
    >>> str(scan / "zarr.json"), scan.name, str(scan.parent)
    ('s3://beamline/2026/scan.zarr/zarr.json', 'scan.zarr', 's3://beamline/2026')
    """

    bucket: str

    key: str
    """Names joined by slashes; none at either end."""

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
        """Whether there is an object of this name, or any below it."""
        return self._is_object() or self.is_dir()

    def is_dir(self) -> bool:
        """Whether there is any object below this name."""
        return next(self.below(), None) is not None

    def _is_object(self) -> bool:
        with naming(self):
            try:
                _bucket(self).head(self.key)
            except FileNotFoundError:
                return False
        return True

    def below(self) -> Iterator[tuple[S3Location, int]]:
        """Objects below this name, each with its size in bytes."""
        with naming(self):
            for batch in _bucket(self).list(prefix=self.key or None):
                for found in batch:
                    yield S3Location(self.bucket, found["path"]), int(found["size"])

    def read_bytes(self) -> bytes:
        """An object's content; raises `FileNotFoundError` where there is none."""
        with naming(self):
            return bytes(_bucket(self).get(self.key).bytes())

    def write_bytes(self, content: bytes) -> None:
        """Make or replace an object; it appears when it is whole."""
        with naming(self):
            _bucket(self).put(self.key, content)

    def create(self, content: bytes) -> bool:
        """Make an object where there is none; False where there is one (a conditional put, ``If-None-Match: *``)."""
        from obstore.exceptions import AlreadyExistsError

        with naming(self):
            try:
                _bucket(self).put(self.key, content, mode="create")
            except AlreadyExistsError:
                # A put whose answer was lost is tried again, and then meets itself.
                with suppress(FileNotFoundError):
                    return self.read_bytes() == content
                return False
        return True

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove an object; raises `FileNotFoundError` if there is none, unless `missing_ok`."""
        # S3 answers the delete of a missing object as that of an existing one; only a head request can tell them apart.
        if not missing_ok and not self._is_object():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with naming(self), suppress(FileNotFoundError):
            _bucket(self).delete(self.key)

    def remove(self) -> None:
        """Remove all objects below this name, the root of a Zarr store first: no reader takes the rest for a store."""
        (self / "zarr.json").unlink(missing_ok=True)
        keys = [found.key for found, _ in self.below()]
        with naming(self):
            if keys:
                _bucket(self).delete(keys)


Location = Path | S3Location
"""What a scan or a result is named by, once `parse_location` has read it."""


def parse_location(named: str | Path | S3Location) -> Location:
    """What a user named: a path, or a place in a bucket.

    Parameters
    ----------
    named : str or path
        ``s3://bucket/name`` is in a bucket; also where `pathlib.Path` has made one slash of the two.

    Returns
    -------
    Path or S3Location

    Raises
    ------
    PtychodaskError
        If the name has no bucket, or nothing after it.

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


def on_disk(named: str | Path, what: str) -> Path:
    """A path; raises `PtychodaskError` for a place in a bucket, where `what` cannot lie."""
    found = parse_location(named)
    if isinstance(found, S3Location):
        raise PtychodaskError(f"{found}: {what} cannot lie in an object store; name a folder on a disk")
    return found


@contextmanager
def naming(location: S3Location) -> Iterator[None]:
    """Raise what an object store refuses, or does not answer, in a block as a `PtychodaskError` of one line."""
    if find_spec("obstore") is None:
        raise PtychodaskError(f"{location}: needs the package obstore; pip install 'ptychodask[cloud]'")
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        # The answer itself stays out, and out of the traceback: it may repeat what was signed.
        raise PtychodaskError(f"{location}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    address = _Settings.now().address
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    status = re.search(r"status code: (\d+ [\w ]+)", str(error))
    if code and code[1] in CAUSES:
        return CAUSES[code[1]]
    if code or status:
        found = " ".join(part[1] for part in (status, code) if part)
        return f"the object store at {address} refused a request ({found}); ask who runs it"
    if "HTTP error" in str(error):
        return (
            f"no answer from the object store at {address}; see that it is at work, or set AWS_ENDPOINT_URL to where "
            "it is"
        )
    return f"the object store at {address} failed ({type(error).__name__}); try again, or ask who runs it"


def _bucket(location: S3Location) -> S3Store:
    """The bucket of a place."""
    return _opened(location.bucket, "", _checked(location, _Settings.now()))


def _checked(location: S3Location, settings: _Settings) -> _Settings:
    if settings.endpoint and not re.fullmatch(r"https?://[^/\s]+/?", settings.endpoint):
        raise PtychodaskError(
            f"{location}: AWS_ENDPOINT_URL is {settings.address!r}, expected http://host:port or https://host"
        )
    if not settings.unsigned and not (settings.key and settings.secret):
        raise PtychodaskError(
            f"{location}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true "
            "for a bucket that is open to all"
        )
    return settings


@lru_cache(maxsize=128)
def _opened(bucket: str, prefix: str, settings: _Settings) -> S3Store:
    """Client of what is below a prefix of a bucket; that of the bucket itself is known to be answered."""
    if not prefix:
        # The answer to a request for a name that is not there tells of all that can be wrong with the settings.
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
            # The time ends the tries, not their number.
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
    """A place in a bucket as Zarr opens it; what travels to another process is the place alone.

    Parameters
    ----------
    where : S3Location
    read_only : bool
    """

    def __init__(self, location: S3Location, *, read_only: bool = False) -> None:
        with naming(location):
            opened = _opened(location.bucket, location.key, _checked(location, _Settings.now()))
        super().__init__(opened, read_only=read_only)
        self.location = location
        """The place."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.location, self.read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3ZarrStore) and (self.location, self.read_only) == (other.location, other.read_only)

    def __str__(self) -> str:
        return str(self.location)

    def with_read_only(self, read_only: bool = False) -> S3ZarrStore:  # type: ignore[override]
        return S3ZarrStore(self.location, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with naming(self.location):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Any) -> list[Buffer | None]:
        with naming(self.location):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        with naming(self.location):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        with naming(self.location):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with naming(self.location):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with naming(self.location):
            await super().delete(key)

    async def getsize(self, key: str) -> int:
        with naming(self.location):
            return await super().getsize(key)

    async def list(self) -> AsyncIterator[str]:  # type: ignore[override]
        with naming(self.location):
            async for key in super().list():
                yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        with naming(self.location):
            async for key in super().list_prefix(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # type: ignore[override]
        with naming(self.location):
            async for key in super().list_dir(prefix):
                yield key


def _reopened(location: S3Location, read_only: bool) -> S3ZarrStore:
    return S3ZarrStore(location, read_only=read_only)


def zarr_store(location: Location, *, read_only: bool = False) -> Path | S3ZarrStore:
    """What Zarr and xarray open for a place."""
    return S3ZarrStore(location, read_only=read_only) if isinstance(location, S3Location) else location


def location_of(store: Any) -> Location:
    """The place of an open Zarr store: one of a disk, or a `S3ZarrStore`."""
    assert isinstance(store, LocalStore | S3ZarrStore)
    return store.location if isinstance(store, S3ZarrStore) else Path(store.root)


def stored_sizes(location: Location) -> Iterator[int]:
    """Bytes of each file, or object, below a place."""
    if isinstance(location, S3Location):
        return (size for _, size in location.below())
    return (path.stat().st_size for path in location.rglob("*") if path.is_file())


def remove(location: Location) -> None:
    """Remove what is below a place, if anything."""
    if isinstance(location, S3Location):
        location.remove()
    else:
        shutil.rmtree(location, ignore_errors=True)


def is_complete(location: Location) -> bool:
    """Whether something has the name that is not still being written."""
    if isinstance(location, Path):
        return location.exists()
    return _root_of(location).get("state") == "complete"


def is_resumable(location: Location) -> bool:
    """Whether a stopped writer of a place left something to go on with."""
    return is_resumable_folder(location) if isinstance(location, Path) else (_beside(location) / LEDGER).exists()


@dataclass(frozen=True)
class Writing:
    """Something that is being written."""

    whole: Location
    """Where it is written; a folder takes its name in the end, in a bucket it has it from the beginning."""

    beside: Location
    """What its writer keeps meanwhile; it goes in the end."""

    claim: bytes | None = None
    """What the object `CLAIM` holds while this writer has it; None where a file is locked instead."""

    def check_held(self) -> None:
        """Raise `PtychodaskError` if another writer took over what this one is writing."""
        if self.claim is not None and not self._is_held():
            raise PtychodaskError(
                f"{self.whole}: another run took over with overwrite=True or resume=True while this one was writing "
                "it; let that one end, and compare"
            )

    def _is_held(self) -> bool:
        try:
            return isinstance(self.beside, Path) or (self.beside / CLAIM).read_bytes() == self.claim
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        """Remove what is half written, unless it can be gone on with or is another writer's."""
        assert isinstance(self.whole, S3Location)
        assert isinstance(self.beside, S3Location)
        try:
            if not self._is_held():
                return
            if (self.beside / LEDGER).exists():
                (self.beside / CLAIM).unlink(missing_ok=True)
                return
            self.whole.remove()
            self.beside.remove()
        except PtychodaskError as error:
            logger.warning("%s; what was written of it is left there, and is no store that can be opened", error)


@contextmanager
def written(location: Location, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> Iterator[Writing]:
    """A place to write into that is whole when the block ends well, and gone when it does not.

    Parameters
    ----------
    where : Place
        What shall exist in the end.
    overwrite, form, resume
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
    In a bucket nothing can be renamed. What is there is removed first, and the new one is written in its place; the
    block marks it as complete with its last put. A writer that is killed leaves what it wrote, which readers refuse.
    """
    if isinstance(location, Path):
        with atomic_folder(location, overwrite=overwrite, kind=kind, resume=resume) as building:
            yield Writing(building.resolve(), building.resolve().parent)
        return
    writing = _claimed(location, overwrite=overwrite, kind=kind, resume=resume)
    try:
        yield writing
    except BaseException:
        writing.leave()
        raise
    remove(writing.beside)


def _claimed(location: S3Location, *, overwrite: bool, kind: StoreKind, resume: bool) -> Writing:
    """Make room for a writer and claim it for this one alone."""
    check_vacant(location, overwrite=overwrite, kind=kind, resume=resume)
    beside, claim = _beside(location), uuid4().hex.encode()
    going_on = resume and is_resumable(location)
    if going_on:
        (beside / CLAIM).unlink(missing_ok=True)
    else:
        beside.remove()
    if not (beside / CLAIM).create(claim):
        raise _at_work(location)
    if not going_on:
        location.remove()
    return Writing(location, beside, claim)


def check_vacant(location: Location, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
    """Raise `PtychodaskError` unless a place can be written: nothing is in the way.

    Parameters
    ----------
    where : Place
    overwrite, form, resume
        As for `written`.
    """
    if isinstance(location, Path):
        check_vacant_folder(location, overwrite=overwrite, kind=kind, resume=resume)
        return
    whole, claimed, resumable = is_complete(location), (_beside(location) / CLAIM).exists(), is_resumable(location)
    if claimed and not (overwrite or resume):
        raise _at_work(location)
    if resumable and not whole and not (overwrite or resume):
        raise PtychodaskError(
            f"{location}: a run was stopped before its end, and what it finished is kept; go on with resume=True "
            "(--resume), or pass overwrite=True (--overwrite) to start again"
        )
    if not location.exists():
        return
    if not overwrite and (whole or not (resume or claimed)):
        raise PtychodaskError(f"{location}: exists already; pass overwrite=True (--overwrite), or another name")
    # A writer that was killed while it removed what was there leaves no root, but its claim.
    found = recorded_format(location) or (kind.name if claimed else "something of another kind")
    if found not in (kind.name, DAMAGED):
        raise PtychodaskError(
            f"{location}: is {found}, and overwrite=True (--overwrite) replaces a {kind.name} alone; pass another "
            "name, or remove it first"
        )


def recorded_format(location: Location) -> str | None:
    """The format that the root of what lies at a place records of itself; None without such."""
    return recorded_folder_format(location) if isinstance(location, Path) else _root_of(location).get("format")


def _root_of(location: S3Location) -> dict[str, Any]:
    """Attributes that the root of a Zarr store records; of one that cannot be read its format is `DAMAGED`."""
    try:
        found = from_json((location / "zarr.json").read_bytes().decode())["attributes"]
        return found if isinstance(found, dict) else {"format": DAMAGED}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return {"format": DAMAGED}


def _beside(location: S3Location) -> S3Location:
    return location.with_name(building_path(Path(location.name)).name)


def _at_work(location: S3Location) -> PtychodaskError:
    go_on = "go on with resume=True (--resume), or " if is_resumable(location) else ""
    return PtychodaskError(
        f"{location}: another run is writing it, or was killed before its end ({_beside(location) / CLAIM} is there); "
        f"wait for it, or, if none is at work, {go_on}pass overwrite=True (--overwrite)"
    )
