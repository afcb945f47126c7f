"""Scans and their group tables in a Zarr store, read lazily.

A store appears only when complete, or, in a bucket, is refused until then. What it records is checked before it is
used, since Zarr takes metadata on trust and reads a missing file as fill values.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from math import prod
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.scan import (
    Scan,
    Truth,
)
from ptychodask.storage.atomic import (
    StoreKind,
)
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.storage.zarr_checks import check_codecs, check_stored, damage_errors, open_root

FORMAT = "ptychodask-scan"


FORMAT_VERSION = 1


SCAN = StoreKind(FORMAT, FORMAT_VERSION, "store", "ingest", may_grow=True)


SLICE_GAP = 4
"""Consecutive chunks without a needed row that end a slice: decoding fewer costs less than another slice."""


TABLE_ROWS = 2**15
"""Rows in a chunk of positions, flux and group tables."""


TABLE_CHUNKS = 10**4
"""Most chunks of an array that is read completely: tables of 10⁷ patterns have some hundred."""


INGEST_AGAIN = "the store is damaged: ingest the source again"
"""Remedy for a damaged scan store."""


class StoredPatterns:
    """Stored patterns, read by slice or integer array in any order."""

    def __init__(self, array: zarr.Array, label: str) -> None:
        self._array = array
        self._label = label

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._array.dtype)

    @property
    def chunk_patterns(self) -> int:
        """Patterns in one chunk, the least that a read decompresses."""
        return int(self._array.chunks[0])

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        return self.read(index)

    def read(self, index: Any, gap: int = SLICE_GAP) -> NDArray[Any]:
        """Patterns by slice or indices, read in slices.

        Parameters
        ----------
        index : slice or int array
        gap : int
            Chunks without a wanted pattern from which on another slice begins.
        """
        problem = f"{(self._array.name or 'array').lstrip('/')} cannot be read for patterns {_brief(index)}"
        with damage_errors(self._label, problem, INGEST_AGAIN):
            if isinstance(index, slice):
                return self._checked(np.asarray(self._array[index]))
            index = np.asarray(index, dtype=np.int64)
            if (np.diff(index) > 0).all():
                return self._checked(_rows(self._array, index, gap))
            # Shuffled training batches come here: each chunk is decompressed once, however its patterns are ordered.
            wanted, inverse = np.unique(index, return_inverse=True)
            return self._checked(_rows(self._array, wanted, gap))[inverse.reshape(-1)]

    def _checked(self, patterns: NDArray[Any]) -> NDArray[Any]:
        """Return the patterns, raising if zeros come from missing files."""
        # Zarr reads a missing file as zeros. Files are counted only if a pattern is all zeros, for that lists the
        # store.
        if not patterns.any(axis=(1, 2)).all():
            stored = self._array.shards or self._array.chunks
            per_file = prod(side // chunk for side, chunk in zip(stored, self._array.chunks, strict=True))
            n_files = prod(-(-size // side) for size, side in zip(self._array.shape, stored, strict=True))
            n_present = self._array.nchunks_initialized // per_file
            if n_present < n_files:
                raise FileNotFoundError(f"{n_files - n_present} of its {n_files} files are missing")
        return patterns


def _rows(array: zarr.Array, wanted: NDArray[np.integer[Any]], gap: int = SLICE_GAP) -> NDArray[Any]:
    """Rows of a stored array by ascending indices, read in slices."""
    # Rows read one by one would decompress their chunk each time.
    ends = [0, *(np.flatnonzero(np.diff(wanted) >= gap * array.chunks[0]) + 1).tolist(), len(wanted)]
    rows = np.empty((len(wanted), *array.shape[1:]), array.dtype)
    for start, stop in pairwise(ends):
        if start == stop:
            continue
        first, last = int(wanted[start]), int(wanted[stop - 1])
        rows[start:stop] = np.asarray(array[first : last + 1])[wanted[start:stop] - first]
    return rows


def _brief(index: Any) -> str:
    if isinstance(index, slice):
        return f"{index.start}..{index.stop}"
    index = np.asarray(index)
    return f"{index.min()}..{index.max()}" if index.size else "(none)"


def segment_sizes(attributes: Mapping[str, Any], n_patterns: int, label: str) -> tuple[int, ...]:
    """Patterns in each segment; one segment for a scan that never grew.

    Parameters
    ----------
    attributes : dict
        Root attributes of the store.
    n_patterns : int
    label : str
        The store, for messages.

    Raises
    ------
    PtychodaskError
        If the segments do not add up to the patterns.
    """
    segments = attributes.get("segments")
    if segments is None:
        return (n_patterns,)
    sizes = tuple(segment["n_patterns"] for segment in segments)
    if min(sizes, default=0) < 1 or sum(sizes) != n_patterns:
        raise PtychodaskError(f"{label}: segments of {sizes} patterns in a scan of {n_patterns}; {INGEST_AGAIN}")
    return sizes


def data_hash(
    diffraction_hash: str,
    position_yx_px: NDArray[np.float64],
    mask: NDArray[np.bool_] | None,
    probe: NDArray[np.complex64],
) -> str:
    """SHA-256 of all data that an object depends on.

    Diffraction enters by its own hash, so that opening a store need not read it; then positions, mask and probe.
    """
    digest = hashlib.sha256(diffraction_hash.encode())
    digest.update(np.ascontiguousarray(position_yx_px).tobytes())
    _add_optics(digest, mask, probe)
    return digest.hexdigest()


def hash_with_probe(scan: Scan, probe: NDArray[np.complex64]) -> str:
    """Data hash of a stored scan with another probe."""
    return data_hash(str(scan.attributes["diffraction_hash"]), scan.position_yx_px, scan.mask, probe)


def _add_optics(digest: Any, mask: NDArray[np.bool_] | None, probe: NDArray[np.complex64]) -> None:
    for values in (mask, probe):
        digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())


def _hash_differs(label: str) -> PtychodaskError:
    return PtychodaskError(
        f"{label}: positions, mask or probe have changed since they were written (hash differs); {INGEST_AGAIN}"
    )


def open_scan(store: LocationLike) -> Scan:
    """Open a stored scan; patterns and labels stay on disk.

    Parameters
    ----------
    store : path or ``s3://`` URL
        A store written by `ingest` or `simulate`.

    Returns
    -------
    Scan

    Raises
    ------
    PtychodaskError
        If there is no such store, or it is unfinished, of a newer format, damaged or lacks an array.
    """
    path = parse_location(store)
    root = open_root(path, SCAN)
    attributes: dict[str, Any] = dict(root.attrs)
    label = str(path)
    _check_attributes(attributes, label)
    truth = None
    if "truth" in root:
        corner: Any = root["truth"].attrs.get("corner_yx_px", [0.0, 0.0])
        with damage_errors(label, f"the corner of 'truth' is {corner!r}", INGEST_AGAIN):
            truth = Truth(_read(root, "truth", label), (float(corner[0]), float(corner[1])))
    y_px, x_px = _read(root, "y_px", label), _read(root, "x_px", label)
    scan = Scan(
        diffraction=StoredPatterns(_array(root, "diffraction", label), label),
        position_yx_px=np.stack([y_px, x_px], axis=1),
        probe=_read(root, "probe", label),
        probe_initial=_read(root, "probe_initial", label) if "probe_initial" in root else None,
        domain=attributes["domain"],
        normalization=float(attributes["normalization"]),
        calibration=attributes["calibration"],
        mask=_read(root, "mask", label) if "mask" in root else None,
        flux=_read(root, "flux", label) if "flux" in root else None,
        scan_index=_read(root, "scan_index", label) if "scan_index" in root else None,
        source_index=_read(root, "source_index", label) if "source_index" in root else None,
        truth=truth,
        label=StoredPatterns(_array(root, "label", label), label) if "label" in root else None,
        pixel_size_m=attributes.get("pixel_size_m"),
        energy_ev=attributes.get("energy_ev"),
        distance_m=attributes.get("distance_m"),
        data_hash=attributes["data_hash"],
        store=label,
        attributes=attributes,
    )
    if data_hash(attributes["diffraction_hash"], scan.position_yx_px, scan.mask, scan.probe) != scan.data_hash:
        raise _hash_differs(label)
    return scan


class ScanReader:
    """Reader of parts of a stored scan of any size, for tasks.

    Parameters
    ----------
    store : path or ``s3://`` URL

    Raises
    ------
    PtychodaskError
        As `open_scan`, except that the data hash is not checked (see `check`).
    """

    def __init__(self, store: LocationLike) -> None:
        self.label = str(store)
        """Path of the store."""
        self._root = open_root(parse_location(store), SCAN)
        self._attributes: dict[str, Any] = dict(self._root.attrs)
        _check_attributes(self._attributes, self.label)
        self._diffraction = StoredPatterns(_array(self._root, "diffraction", self.label), self.label)
        self.probe: NDArray[np.complex64] = _read(self._root, "probe", self.label)
        """Calibrated probe (mode, N, N)."""
        self._mask = _read(self._root, "mask", self.label) if "mask" in self._root else None
        self._tables: dict[str, zarr.Array] = {}

    @property
    def data_hash(self) -> str:
        """Data hash recorded in the store."""
        return str(self._attributes["data_hash"])

    @property
    def attributes(self) -> dict[str, Any]:
        """Root attributes of the store."""
        return self._attributes

    @property
    def n_patterns(self) -> int:
        """Number of patterns in the scan."""
        return int(self._diffraction.shape[0])

    @property
    def n_pixels(self) -> int:
        """Pixels across one pattern, N."""
        return int(self._diffraction.shape[1])

    @property
    def pattern_itemsize(self) -> int:
        """Bytes of one pixel of a stored pattern."""
        return self._diffraction.dtype.itemsize

    @property
    def stored_chunk_patterns(self) -> int:
        """Patterns in one stored chunk, the least that a read decompresses."""
        return self._diffraction.chunk_patterns

    def check(self) -> None:
        """Raise `PtychodaskError` unless positions, mask and probe match the data hash."""
        digest = hashlib.sha256(str(self._attributes["diffraction_hash"]).encode())
        for start in range(0, self.n_patterns, TABLE_ROWS):
            rows = np.arange(start, min(start + TABLE_ROWS, self.n_patterns))
            digest.update(self.position_yx_px(rows).tobytes())
        _add_optics(digest, self._mask, self.probe)
        if digest.hexdigest() != self.data_hash:
            raise _hash_differs(self.label)

    def first(self) -> Scan:
        """Scan of the first pattern, with all attributes, for binding a model."""
        part = self.part(np.arange(1))
        return replace(part, attributes=self._attributes, pixel_size_m=self._attributes.get("pixel_size_m"))

    def member(self, groups: str, start: int, stop: int) -> NDArray[np.int32]:
        """Rows `start` to `stop` of a group table, int32 (group, channel)."""
        return self._table(f"groups/{groups}/member", slice(start, stop))

    def position_yx_px(self, index: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Positions (y, x) of patterns by ascending indices, float64 (k, 2)."""
        return np.stack([self._table(name, index) for name in ("y_px", "x_px")], axis=1)

    def _table(self, name: str, rows: slice | NDArray[np.integer[Any]]) -> NDArray[Any]:
        if name not in self._tables:
            if name not in self._root:
                # The metadata are those of the time of opening; the table may have been added since.
                self._root = open_root(parse_location(self.label), SCAN)
            self._tables[name] = _array(self._root, name, self.label)
        return _read_rows(self._tables[name], self.label, rows)

    def readable(self, index: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """True for each pattern that can be read, bool (k,).

        Parameters
        ----------
        index : int64 array (k,)
            Patterns, ascending.
        """
        stored = index // self.stored_chunk_patterns
        is_readable = np.ones(len(index), bool)
        # A damaged chunk loses all its patterns and no others, so each is tried separately.
        for chunk in np.unique(stored):
            try:
                self._diffraction[index[stored == chunk]]
            except PtychodaskError:
                is_readable[stored == chunk] = False
        return is_readable

    def part(self, index: NDArray[np.integer[Any]], *, gaps: bool = True) -> Scan:
        """Scan of some patterns only, read into memory.

        Parameters
        ----------
        index : int64 array (k,)
            Patterns, ascending.
        gaps : bool
            True if stored chunks between them may be read as well, which is faster; False if some cannot be read.
        """
        return Scan(
            diffraction=self._diffraction.read(index, SLICE_GAP if gaps else 1),
            position_yx_px=self.position_yx_px(index),
            probe=self.probe,
            domain=self._attributes["domain"],
            normalization=float(self._attributes["normalization"]),
            calibration=self._attributes["calibration"],
            mask=self._mask,
            flux=self._table("flux", index) if "flux" in self._root else None,
            data_hash=self.data_hash,
            store=self.label,
        )


def _check_attributes(attributes: dict[str, Any], label: str) -> None:
    """Raise `PtychodaskError` unless the root attributes are those of a scan."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "domain": str,
        "normalization": (int, float),
        "calibration": str,
        "diffraction_hash": str,
        "data_hash": str,
    }
    optional = dict.fromkeys(("pixel_size_m", "energy_ev", "distance_m"), (int, float))
    for name, kind in (kinds | {name: kind for name, kind in optional.items() if name in attributes}).items():
        value = attributes.get(name)
        if not isinstance(value, kind):
            raise PtychodaskError(f"{label}: attribute '{name}' is {value!r}; {INGEST_AGAIN}")
    segments = attributes.get("segments", [{"n_patterns": 1}])
    if not isinstance(segments, list) or not all(
        isinstance(one, dict) and isinstance(one.get("n_patterns"), int) for one in segments
    ):
        raise PtychodaskError(f"{label}: attribute 'segments' is {segments!r}; {INGEST_AGAIN}")


def _array(root: zarr.Group, name: str, label: str) -> zarr.Array:
    with damage_errors(label, f"array '{name}' cannot be opened", INGEST_AGAIN):
        array = root.get(name)
        if not isinstance(array, zarr.Array):
            raise PtychodaskError(f"{label}: array '{name}' is missing; {INGEST_AGAIN}")
        check_codecs(array, label, INGEST_AGAIN)
        # A `scan_index` of zeros has no file at all, so the size of a table is not judged by its files; `_read`
        # compares its rows with the patterns. Of any other array, at least one chunk is in memory during a read.
        of_patterns = array.ndim == 1 and array.metadata.dimension_names == ("pattern",)  # type: ignore[union-attr]
        sides = array.chunks if of_patterns else map(max, array.shape, array.chunks)
        check_stored([array], prod(sides) * array.dtype.itemsize, label, INGEST_AGAIN)
    return array


def _read(root: zarr.Group, name: str, label: str) -> NDArray[Any]:
    """Content of an array; raises if its shape does not fit."""
    # Missing chunks are read as zeros, so a false shape would give positions or weights that look measured.
    array = _array(root, name, label)
    of_patterns = (array.metadata.dimension_names or ("",))[0] == "pattern"  # type: ignore[union-attr]
    n_patterns = _array(root, "diffraction", label).shape[0]
    if array.nchunks > TABLE_CHUNKS or (of_patterns and array.shape[0] != n_patterns):
        raise PtychodaskError(
            f"{label}: array '{name}' has shape {array.shape} in {array.nchunks} chunks, for {n_patterns} patterns; "
            f"{INGEST_AGAIN}"
        )
    return _read_rows(array, label, ...)


def _read_rows(array: zarr.Array, label: str, rows: slice | EllipsisType | NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Rows of an array by a slice or by ascending indices."""
    with damage_errors(label, f"array '{array.name.lstrip('/')}' cannot be read", INGEST_AGAIN):
        return _rows(array, rows) if isinstance(rows, np.ndarray) else np.asarray(array[rows])


def __getattr__(name: str) -> Any:
    """Functions under their names of version 0.1, with a warning."""
    if name == "write_scan":
        warnings.warn(
            "ptychodask.store.write_scan is now ptychodask.store.write.write_scan", DeprecationWarning, stacklevel=2
        )
        return import_module("ptychodask.store.write").write_scan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
