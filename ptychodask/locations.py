"""Where stores lie: in folders, or under a prefix of an S3 bucket, ``s3://bucket/scan.zarr``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import ObjectStore

from ptychodask.scan import PtychodaskError, in_brief

SCHEME = "s3://"

PATIENCE_S = 180.0
"""How long a request is tried again: longer than a gateway takes to start again."""

FIRST_PATIENCE_S = 10.0
"""The same for the first request to a bucket, which tells of a wrong address."""

CLAIM = ".ptychodask-writing"
"""Object beside a store that is being written: its writer put it there, and no second one can."""


@dataclass(frozen=True)
class ObjectPath:
    """The objects of a bucket whose keys begin with a prefix: what a folder is on a disk.

    Endpoint, region and credentials come from the environment, by the names that AWS uses: ``AWS_ENDPOINT_URL``,
    ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``. None of them is kept, sent or written.

    Examples
    --------
    >>> path = locate("s3://data/run7/scan.zarr")
    >>> str(path.parent / "scan.object.zarr"), path.name
    ('s3://data/run7/scan.object.zarr', 'scan.zarr')
    """

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    def __fspath__(self) -> str:
        raise PtychodaskError(f"{self}: is in a bucket, and a file or folder is needed here; name one on a disk")

    def __truediv__(self, name: str | Path) -> ObjectPath:
        return ObjectPath(self.bucket, f"{self.key}/{name}" if self.key else str(name))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> ObjectPath:
        """The prefix that it lies in."""
        return ObjectPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Another one in the same prefix."""
        return self.parent / name

    def resolve(self) -> ObjectPath:
        """Itself: there is one name for it alone."""
        return self

    def exists(self) -> bool:
        """Whether there is any object of it."""
        return next(self.sizes(), None) is not None

    def is_dir(self) -> bool:
        """As `exists`."""
        return self.exists()

    def sizes(self) -> Iterator[int]:
        """Bytes of each of its objects."""
        with naming_refusals(self):
            for some in _obstore().list(_reached(self.bucket), prefix=self.key):
                # A listing also gives keys that go on behind the prefix, as scan.zarr.old does.
                yield from (int(one["size"]) for one in some if self._holds(one["path"]))

    def read(self, name: str) -> bytes | None:
        """An object, whole; None where there is none."""
        with naming_refusals(self):
            try:
                return bytes(_obstore().get(_reached(self.bucket), (self / name).key).bytes())
            except FileNotFoundError:
                return None

    def claim(self) -> None:
        """Say that it is being written; raises `PtychodaskError` where somebody did so before."""
        with naming_refusals(self):
            try:
                _obstore().put(_reached(self.bucket), (self / CLAIM).key, b"", mode="create")
            except (_obstore().exceptions.AlreadyExistsError, _obstore().exceptions.PreconditionError):
                raise PtychodaskError(
                    f"{self}: another run is writing it, or was stopped before its end; wait for it, or pass "
                    "overwrite=True (--overwrite) to start again"
                ) from None

    def release(self) -> None:
        """Take that back."""
        with naming_refusals(self):
            _obstore().delete(_reached(self.bucket), (self / CLAIM).key)

    def remove(self) -> None:
        """Delete all of its objects, the root of a store last, which says that it is unfinished until then."""
        with naming_refusals(self):
            store = _reached(self.bucket)
            for some in _obstore().list(store, prefix=self.key):
                keys = [one["path"] for one in some if self._holds(one["path"])]
                if keys:
                    _obstore().delete(store, keys)

    def _holds(self, key: str) -> bool:
        return key == self.key or key.startswith(f"{self.key}/")


Location = Path | ObjectPath


def locate(place: str | Path | ObjectPath) -> Location:
    """The place that a user names, on a disk or in a bucket.

    Parameters
    ----------
    place : path or str
        ``s3://bucket/key``, or a path. A `Path` of the former, which lost one of its slashes, is understood.

    Raises
    ------
    PtychodaskError
        If it has no bucket or no key, or names another kind of object storage.
    """
    if isinstance(place, ObjectPath):
        return place
    text = str(place)
    scheme, colon, rest = text.partition(":/")
    if not colon or len(scheme) < 2 or "/" in scheme:
        return Path(place)
    if scheme != "s3":
        raise PtychodaskError(f"{text}: {scheme}:// is not read; pass a path, or s3://bucket/name.zarr")
    bucket, _, key = rest.strip("/").partition("/")
    if not bucket or not key:
        raise PtychodaskError(f"{text}: names no place in a bucket; expected s3://bucket/name.zarr")
    return ObjectPath(bucket, key)


def zarr_store(place: Location, *, read_only: bool = False) -> Any:
    """What Zarr and xarray open for a place."""
    return ObjectStore(_store(place.bucket, place.key), read_only=read_only) if isinstance(place, ObjectPath) else place


def stored_sizes(array: zarr.Array) -> Iterator[int]:
    """Bytes of each file or object of an array."""
    store = array.store_path.store
    if isinstance(store, ObjectStore):
        prefix = array.store_path.path
        for some in _obstore().list(store.store, prefix=f"{prefix}/" if prefix else None):
            yield from (int(one["size"]) for one in some)
        return
    folder = Path(store.root) / array.path  # type: ignore[attr-defined]
    yield from (path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refusals() -> tuple[type[Exception], ...]:
    """What requests to object storage raise in this process, errors of a system among them."""
    found = sys.modules.get("obstore.exceptions")
    return (OSError,) if found is None else (OSError, found.BaseError)


@contextmanager
def naming_refusals(place: ObjectPath) -> Iterator[None]:
    """Raise what object storage refuses in a block as a `PtychodaskError` of one line."""
    try:
        yield
    except refusals() as error:
        told = str(error)
        if "NoSuchBucket" in told:
            raise PtychodaskError(f"{place}: there is no bucket {place.bucket!r}; make it, or name another") from error
        for sign in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden"):
            if sign in told:
                raise PtychodaskError(
                    f"{place}: object storage refuses the credentials ({sign}); set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY in the environment"
                ) from error
        raise PtychodaskError(
            f"{place}: object storage cannot be used ({type(error).__name__}: {in_brief(error)[:200]}); look at "
            "AWS_ENDPOINT_URL and AWS_REGION in the environment"
        ) from error


def _obstore() -> Any:
    try:
        return importlib.import_module("obstore")
    except ImportError as error:
        raise PtychodaskError(
            f"{SCHEME}: object storage needs the package {error.name}; install ptychodask with its extra 'cloud'"
        ) from error


@lru_cache(maxsize=64)
def _reached(bucket: str) -> Any:
    """A bucket, once it has answered."""
    next(iter(_obstore().list(_store(bucket, None, FIRST_PATIENCE_S), chunk_size=1)), None)
    return _store(bucket)


@lru_cache(maxsize=256)
def _store(bucket: str, prefix: str | None = None, patience_s: float = PATIENCE_S) -> Any:
    _obstore()
    retries = {
        "max_retries": 1000,
        "retry_timeout": timedelta(seconds=patience_s),
        "backoff": {"base": 2, "init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3)},
    }
    options = {"allow_http": True, "timeout": "60s"}
    made = importlib.import_module("obstore.store").S3Store
    try:
        return made(bucket, prefix=prefix, client_options=options, retry_config=retries)
    except refusals() as error:
        raise PtychodaskError(
            f"{SCHEME}{bucket}: cannot be used ({in_brief(error)[:200]}); set AWS_REGION, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        ) from error
