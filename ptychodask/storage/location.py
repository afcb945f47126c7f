"""Locations of scans and results, on a disk or in a bucket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

from ptychodask.errors import PtychodaskError

if TYPE_CHECKING:
    pass
from ptychodask.storage.s3 import SCHEME, S3Location, S3ZarrStore

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
