"""Opening of Zarr stores, and checks before anything is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import floordiv
from typing import Any

import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.errors import ZarrUserWarning

from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.storage.atomic import StoreKind
from ptychodask.storage.location import Location, LocationLike, location_of

CODECS = {"blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "zstd"}
"""Codecs that may run: they decode bytes to numbers, and do nothing else."""


COMPRESSORS = (BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.bitshuffle), Crc32cCodec())
"""Codecs of the chunks that this package writes. The checksum is that of RFC 3720: with it no changed bit is read."""


SMALL_BYTES = 2**26
"""Arrays up to this size are not compared with their files: Zarr stores no chunk of fill values only."""


PACKED_AT_MOST = 2**16
"""Largest ratio of the size of an array to that of its files."""


MOST_CHUNKS = 10**7
"""Most chunks along one axis of an array."""


DAMAGE: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""Exceptions of Zarr and its codecs for damaged metadata or chunks, which they do not check."""


@contextmanager
def damage_errors(label: LocationLike, problem: str, remedy: str) -> Iterator[None]:
    """Raise exceptions from damaged files in a block as one-line `PtychodaskError`.

    Parameters
    ----------
    label : path
        The store, for messages.
    problem : str
        The affected part of the store and the failed operation.
    remedy : str
    """
    try:
        yield
    except PtychodaskError:
        raise
    except DAMAGE as error:
        raise PtychodaskError(f"{label}: {problem} ({in_brief(error)}); {remedy}") from error


def consolidate(path: Location) -> zarr.Group:
    """Rewrite the consolidated metadata of a store; returns its root group.

    Parameters
    ----------
    path : Location
    """
    # Readers take all metadata from the consolidated copy in the root, one request for the complete store. After any
    # change that copy is stale, and an array or table that it does not list does not exist for them.
    with warnings.catch_warnings():
        # zarr warns that format 3 has not standardised them.
        warnings.simplefilter("ignore", ZarrUserWarning)
        return zarr.consolidate_metadata(path.zarr_store(), zarr_format=3)


def check_codecs(array: zarr.Array, label: LocationLike, remedy: str) -> None:
    """Raise `PtychodaskError` unless an array contains numbers in known codecs.

    Parameters
    ----------
    array : zarr.Array
    label : path
        Its store, for messages.
    remedy : str

    Notes
    -----
    Stores come from anywhere. A group of format 3 may list arrays of format 2, whose codecs can unpickle, and so run,
    what they read; only `CODECS` may run.
    """
    name = f"{label}: array '{array.path}'"
    metadata = array.metadata
    if metadata.zarr_format != 3:
        raise PtychodaskError(f"{name} is of Zarr format {metadata.zarr_format}, expected 3; {remedy}")
    if foreign := sorted(codec_names([codec.to_dict() for codec in metadata.codecs]) - CODECS):
        raise PtychodaskError(
            f"{name} has the codecs {', '.join(foreign)}, expected some of: {', '.join(sorted(CODECS))}; {remedy}"
        )
    if array.dtype.kind not in "buifc":
        raise PtychodaskError(f"{name} has type {array.dtype}, expected numbers; {remedy}")
    # A few bytes of metadata may claim chunks of size 0, or more chunks than any loop over them could end.
    sides = array.chunks + (array.shards or ())
    if min(sides, default=1) < 1 or max(map(floordiv, array.shape, array.chunks), default=0) > MOST_CHUNKS:
        raise PtychodaskError(f"{name} has shape {array.shape} in chunks of {array.chunks}; {remedy}")


def check_stored(arrays: Sequence[zarr.Array], claimed_bytes: int, label: LocationLike, remedy: str) -> None:
    """Raise `PtychodaskError` if arrays claim more than their files can contain.

    Parameters
    ----------
    arrays : sequence of zarr.Array
        Complete ones; Zarr reads a missing file as fill values, so a forged shape would fill the memory.
    claimed_bytes : int
        Bytes to be read from all of them.
    label : path
        Their store, for messages.
    remedy : str
    """
    if claimed_bytes <= SMALL_BYTES:
        return
    sizes = (size for array in arrays for _, size in (location_of(array.store) / array.path).below())
    # Lazily: the files of a large store are too many to list, and the first few are mostly enough.
    if all(total < claimed_bytes // PACKED_AT_MOST for total in accumulate(sizes)):
        listed = ", ".join(f"'{array.path}' of shape {array.shape} in chunks of {array.chunks}" for array in arrays)
        raise PtychodaskError(f"{label}: array {listed} is larger than its files can contain; {remedy}")


def codec_names(described: Any) -> set[str]:
    """Names of codecs and nested codecs in their JSON description."""
    if isinstance(described, list | tuple):
        return set().union(*map(codec_names, described))
    inner = described.get("configuration", {})
    return {str(described["name"])} | codec_names([*inner.get("codecs", ()), *inner.get("index_codecs", ())])


def open_root(path: Location, kind: StoreKind, mode: str = "r") -> zarr.Group:
    """Root group of a complete Zarr store of a kind.

    Raises
    ------
    PtychodaskError
        If there is none, or it is unfinished, of another kind, or newer than this package reads.
    """
    make = f"make one with 'ptychodask {kind.maker}'"
    again = f"{kind.maker} again with overwrite=True (--overwrite)"
    if not path.exists():
        raise PtychodaskError(f"{path}: {path.unfinished(kind.noun, again) or f'no such {kind.noun}; {make}'}")
    if not path.is_dir():
        raise PtychodaskError(f"{path}: is a file, expected a {kind.noun} (a folder); {make}")
    with damage_errors(path, "is not a Zarr format 3 store", make):
        # Absolute, so that a store stays readable when the process changes its folder.
        store = path.resolve().zarr_store(read_only=mode == "r")
        root = zarr.open_group(store, mode=mode, zarr_format=3)  # type: ignore[arg-type]
        attributes = dict(root.attrs)
    if attributes.get("format") != kind.name:
        raise PtychodaskError(
            f"{path}: is a Zarr store of another kind (format is {attributes.get('format')!r}, "
            f"expected {kind.name!r}); {make}"
        )
    version = attributes.get("format_version")
    if not isinstance(version, int) or version > kind.version:
        raise PtychodaskError(
            f"{path}: has format version {version!r}, this ptychodask reads up to {kind.version}; upgrade ptychodask"
        )
    # A growing scan may be read at any time, since readers see complete segments only; no other kind of store grows.
    state = attributes.get("state")
    if state != "complete" and not (state == "growing" and kind.may_grow):
        raise PtychodaskError(
            f"{path}: the {kind.noun} is unfinished (state is {state!r}, expected 'complete'); {again}"
        )
    return root
