"""Locations of scans and results, on a disk or in a bucket."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zarr.abc.store import Store

from ptychodask.errors import PtychodaskError
from ptychodask.storage.atomic import (
    StoreKind,
    Writing,
    atomic_folder,
    check_vacant_folder,
    is_resumable_folder,
    recorded_folder_format,
    remove_path,
    renamed_file,
    unfinished_folder,
)
from ptychodask.storage.s3 import S3Location

if TYPE_CHECKING:
    _Path = Path
else:
    # Before Python 3.12, only the class for this system can be derived from.
    _Path = type(Path())


class Location(Protocol):
    """Storage location of a scan, a result or a file.

    Names work as in `pathlib.Path`, and its `str` is what a user would pass.
    """

    @property
    def name(self) -> str: ...

    @property
    def stem(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def parent(self) -> Location: ...

    def __truediv__(self, name: str, /) -> Location: ...

    def with_name(self, name: str) -> Location: ...

    def resolve(self) -> Location: ...

    @property
    def local_path(self) -> LocalLocation | None:
        """Path on a disk, for operations that need one; None elsewhere."""

    def exists(self) -> bool: ...

    def is_dir(self) -> bool: ...

    def below(self) -> Iterator[tuple[Location, int]]:
        """Files or objects below it, each with its size in bytes."""

    def read_bytes(self) -> bytes:
        """Content; raises `FileNotFoundError` if there is none."""

    def read_buffer(self) -> bytes | mmap.mmap:
        """Content, read-only; that of a file stays on disk."""

    def write_bytes(self, data: Any, /) -> Any:
        """Create or replace a file or object; it appears only when complete."""

    def unlink(self, *, missing_ok: bool = False) -> None: ...

    def make_folder(self) -> None:
        """Make a folder if missing; nothing in a bucket."""

    def remove(self) -> None:
        """Remove everything at and below it, if anything."""

    def add_lines(self, lines: Mapping[str, str]) -> None:
        """Append lines by unique names; they are stored when this returns."""

    def lines(self) -> list[str]:
        """Lines that `add_lines` stored, the one with the first name first."""

    def zarr_store(self, *, read_only: bool = False) -> Store | Path:
        """Store that Zarr and xarray open."""

    def recorded_format(self) -> str | None:
        """Format recorded in the root of a store; None without one."""

    def is_complete(self) -> bool:
        """True if a store exists and is not being written."""

    def is_resumable(self) -> bool:
        """True if a stopped writer left finished parts."""

    def unfinished(self, noun: str, again: str) -> str | None:
        """Reason why a missing store is unfinished; None if nobody began it."""

    def check_vacant(self, *, overwrite: bool, kind: StoreKind, resume: bool = False) -> None:
        """Raise `PtychodaskError` unless it can be written; see `check_vacant_folder`."""

    def atomic_store(
        self, *, overwrite: bool, kind: StoreKind, resume: bool = False
    ) -> AbstractContextManager[Writing[Location]]:
        """Store to write into, as `atomic_folder`."""


class LocalLocation(_Path):
    """Path on a disk, with the methods of `Location`."""

    __slots__ = ()

    @property
    def local_path(self) -> LocalLocation:
        return self

    def below(self) -> Iterator[tuple[LocalLocation, int]]:
        return ((path, path.stat().st_size) for path in self.rglob("*") if path.is_file())

    def read_buffer(self) -> mmap.mmap:
        with self.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def write_bytes(self, data: Any) -> int:
        with renamed_file(self) as building:
            return building.write_bytes(data)

    def make_folder(self) -> None:
        if not self.parent.is_dir():
            raise PtychodaskError(f"{self}: its folder {self.parent} does not exist; make it first")
        self.mkdir(exist_ok=True)

    def add_lines(self, lines: Mapping[str, str]) -> None:
        # A newline first, so that a line which a full disk cut short does not spoil these.
        text = ("\n" if self.exists() else "") + "".join(lines.values())
        with self.open("a") as file:
            file.write(text)
            # Finished work is to survive a power cut. The data are not synced: if they are lost although the line is
            # not, the checksum in the line shows it, and they are computed again.
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[str]:
        # Damaged bytes are replaced rather than an error: their line fails its checksum, and all others still count.
        return self.read_text(errors="replace").splitlines()

    def zarr_store(self, *, read_only: bool = False) -> Path:
        return Path(self)

    # A folder has its name only once it is complete.
    is_complete = Path.exists
    is_resumable = is_resumable_folder
    recorded_format = recorded_folder_format
    unfinished = unfinished_folder
    check_vacant = check_vacant_folder
    remove = remove_path

    @contextmanager
    def atomic_store(
        self, *, overwrite: bool, kind: StoreKind, resume: bool = False
    ) -> Iterator[Writing[LocalLocation]]:
        with atomic_folder(self, overwrite=overwrite, kind=kind, resume=resume) as building:
            # Workers may have another current folder.
            whole = LocalLocation(building.resolve())
            yield Writing(whole, whole.parent)


SCHEMES: dict[str, Callable[[str, str], Location]] = {S3Location.scheme: S3Location}
"""Classes of the locations other than paths, by the first part of their URLs; each takes a bucket and a key."""


LocationLike = str | Path | Location
"""Location, path, or URL such as ``s3://bucket/name``: arguments that `parse_location` takes."""


def parse_location(named: LocationLike) -> Location:
    """Location from a path or a URL such as ``s3://bucket/name``.

    Parameters
    ----------
    named : str, path or Location
        A URL may have become a `pathlib.Path`, which merges its two slashes.

    Raises
    ------
    PtychodaskError
        If a URL has no bucket, or no name after it.

    Examples
    --------
    >>> parse_location("data/scan.zarr").as_posix()
    'data/scan.zarr'
    >>> parse_location("s3://beamline/scan.zarr")
    S3Location(bucket='beamline', key='scan.zarr')
    """
    if not isinstance(named, str | os.PathLike):
        return named
    scheme, _, rest = str(named).partition(":/")
    if scheme not in SCHEMES:
        return LocalLocation(named)
    bucket, *names = rest.strip("/").split("/")
    if not bucket or not names or any(name in ("", ".", "..") for name in names):
        raise PtychodaskError(f"{named}: expected {scheme}://bucket/name, with one slash between names")
    return SCHEMES[scheme](bucket, "/".join(names))


def on_disk(named: LocationLike, noun: str) -> LocalLocation:
    """Path on a disk; raises `PtychodaskError` for a bucket.

    Parameters
    ----------
    named : str, path or Location
    noun : str
        Word for it in the message, with its article.
    """
    location = parse_location(named)
    if location.local_path is None:
        raise PtychodaskError(f"{location}: {noun} cannot be stored in an object store; name a folder on a disk")
    return location.local_path


def location_of(store: Any) -> Location:
    """Location of an open Zarr store."""
    return getattr(store, "location", None) or LocalLocation(store.root)
