"""Scans and their group tables in a Zarr store, read lazily.

A store appears only when complete, or, in a bucket, is refused until then. What it records is checked before it is
used, since Zarr takes metadata on trust and reads a missing file as fill values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, Groups, curve_order, group_positions
from ptychodask.progress import Progress, progress_bar
from ptychodask.scan import (
    Calibration,
    Domain,
    PatternSource,
    Scan,
    Truth,
    calibrate_probe,
    check_pattern_shape,
    check_positions,
    input_normalization,
)
from ptychodask.storage.atomic import (
    StoreKind,
    atomic_file,
    atomic_store,
    folder_lock,
    read_json,
)
from ptychodask.storage.location import Location, parse_location, zarr_store
from ptychodask.storage.s3 import S3Location
from ptychodask.storage.zarr_checks import check_codecs, check_stored, consolidate, damage_errors, open_root

logger = logging.getLogger(__name__)


FORMAT = "ptychodask-scan"


FORMAT_VERSION = 1


SCAN = StoreKind(FORMAT, FORMAT_VERSION, "store", "ingest", may_grow=True)


CHUNK_BYTES = 512 * 1024
"""Target size of a chunk of patterns, uncompressed: the least that a read decompresses."""


SHARD_CHUNKS = 32
"""Chunks in one shard (one file), at most."""


SHARD_BYTES = 32 * 1024 * 1024
"""Largest size of a shard, uncompressed, unless one chunk is larger: it is in memory while it is written."""


SLICE_GAP = 4
"""Consecutive chunks without a needed row that end a slice: decoding fewer costs less than another slice."""


TABLE_ROWS = 2**15
"""Rows in a chunk of positions, flux and group tables."""


TABLE_CHUNKS = 10**4
"""Most chunks of an array that is read completely: tables of 10⁷ patterns have some hundred."""


CURVE_GAIN = 0.9
"""Patterns are sorted along the curve if that reduces the chunks read to this fraction or less."""


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


def chunk_patterns(n_pixels: int, itemsize: int) -> int:
    """Patterns in one chunk, from the size of a pattern.

    Examples
    --------
    >>> chunk_patterns(64, 2), chunk_patterns(1024, 4)
    (64, 1)
    """
    return max(1, CHUNK_BYTES // (n_pixels * n_pixels * itemsize))


def storage_order(position_yx_px: NDArray[np.float64], patterns_per_chunk: int) -> NDArray[np.int64]:
    """Storage order of the patterns: along the curve if that reduces reading.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)
        Positions in the order of the source.
    patterns_per_chunk : int
        Patterns in one chunk of the store.

    Returns
    -------
    int64 array (pattern,)
        The order of the curve, or 0, 1, 2, ... if the order of the source is about as good (`CURVE_GAIN`).
    """
    n_patterns = len(position_yx_px)
    curve = curve_order(position_yx_px)
    as_given = np.arange(n_patterns)
    read_as_given = _chunks_read(curve, as_given, patterns_per_chunk)
    read_sorted = _chunks_read(curve, np.argsort(curve), patterns_per_chunk)
    return curve if read_sorted <= CURVE_GAIN * read_as_given else as_given


def _chunks_read(curve: NDArray[np.int64], row: NDArray[np.int64], patterns_per_chunk: int) -> int:
    """Chunks decompressed when patterns, stored in `row`, are read along the curve."""
    # A run of four chunks of patterns stands for a chunk of groups, whose size is not known yet.
    run = np.arange(len(curve)) // (4 * patterns_per_chunk)
    return len(np.unique(np.stack([run, row[curve] // patterns_per_chunk]), axis=1).T)


def write_scan(
    store: str | Location,
    *,
    diffraction: PatternSource,
    position_yx_px: NDArray[np.float64],
    probe: NDArray[np.complexfloating[Any, Any]],
    domain: Domain,
    calibration: Calibration,
    incident_counts: float | None = None,
    mask: NDArray[np.bool_] | None = None,
    flux: NDArray[np.float32] | None = None,
    scan_index: NDArray[np.int64] | None = None,
    source_index: NDArray[np.int64] | None = None,
    truth: Truth | None = None,
    label: PatternSource | None = None,
    pixel_size_m: float | None = None,
    energy_ev: float | None = None,
    distance_m: float | None = None,
    provenance: dict[str, Any] | None = None,
    growing: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Scan:
    """Write a scan to a new store, by shards, and open it.

    Parameters
    ----------
    store : path or ``s3://`` URL
        The new store.
    diffraction : array or lazy source (pattern, N, N)
        Patterns in the unit of `domain`, DC at [N//2, N//2], in the order of the source; read once, one shard at a
        time, by integer arrays.
    position_yx_px : float64 array (pattern, 2)
        Positions (y, x), object pixels, in the order of the source, as the arrays below.
    probe : complex array (mode, N, N)
        Probe before calibration.
    domain : {"counts", "amplitude"}
    calibration, incident_counts
        See `calibrate_probe`.
    mask : bool array (N, N), optional
        True where a detector pixel is good.
    flux : float array (pattern,), optional
        Relative incident flux of each pattern; divided by its mean before it is stored.
    scan_index, source_index : int array (pattern,), optional
        Experiment and source row; by default 0 and 0, 1, 2, ...
    truth : Truth, optional
    label : complex array or lazy source (pattern, N, N), optional
    pixel_size_m, energy_ev, distance_m : float, optional
    provenance : dict, optional
        Origin of the data; plain values for JSON.
    growing : bool
        These are the first segment of a growing scan; `append_segment` adds others.
    overwrite : bool
        Replace an existing store.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Scan
        The new store, opened.

    Raises
    ------
    PtychodaskError
        If patterns are negative or not finite, shapes disagree, the store exists, or the disk refuses.

    Notes
    -----
    Patterns are sorted along a space-filling curve if that reduces the bytes a chunk of groups reads (`storage_order`).
    """
    path = parse_location(store)
    store_name = str(path)
    check_pattern_shape(diffraction.shape, store_name)
    n_patterns, n_pixels = diffraction.shape[:2]
    check_positions(position_yx_px, n_patterns, store_name)
    order = storage_order(position_yx_px, chunk_patterns(n_pixels, diffraction.dtype.itemsize))
    position = np.ascontiguousarray(position_yx_px[order], dtype=np.float64)
    scan_rows = np.zeros(n_patterns, np.int64) if scan_index is None else np.asarray(scan_index, np.int64)
    source_rows = np.arange(n_patterns) if source_index is None else np.asarray(source_index, np.int64)
    relative_flux = None if flux is None else relative_to_mean(flux, store_name)
    optics = {"pixel_size_m": pixel_size_m, "energy_ev": energy_ev, "distance_m": distance_m}
    with atomic_store(path, overwrite=overwrite, kind=SCAN) as writing:
        root = zarr.create_group(zarr_store(writing.whole), zarr_format=3)
        # First, so that readers and later writers recognise an unfinished store, in a bucket or after a kill, as a
        # scan.
        root.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION, "state": "writing"})
        patterns = _create_patterns(root, "diffraction", diffraction, ("pattern", "qy", "qx"), growing=growing)
        with progress_bar("ingest", n_patterns, "patterns", progress) as bar:
            total_counts, diffraction_hash = fill_patterns(
                patterns, 0, diffraction, order, source_rows, domain, mask, bar, store_name
            )
        if label is not None:
            labels = _create_patterns(root, "label", label, ("pattern", "py", "px"), growing=growing)
            fill_labels(labels, 0, label, order, store_name)
        # The scale of network input and probe comes from all patterns, so it is known only when all are written.
        mean_counts = total_counts / n_patterns
        normalization = input_normalization(mean_counts, n_pixels, store_name)
        calibrated = calibrate_probe(
            probe, calibration, mean_counts=mean_counts, incident_counts=incident_counts, label=store_name
        )
        _write_array(root, "y_px", position[:, 0], ("pattern",), growing, units="px")
        _write_array(root, "x_px", position[:, 1], ("pattern",), growing, units="px")
        _write_array(root, "scan_index", scan_rows[order], ("pattern",), growing)
        _write_array(root, "source_index", source_rows[order], ("pattern",), growing)
        _write_array(root, "probe", calibrated, ("mode", "py", "px"))
        _write_array(root, "probe_initial", calibrated, ("mode", "py", "px"))
        if mask is not None:
            _write_array(root, "mask", np.asarray(mask, bool), ("qy", "qx"))
        if relative_flux is not None:
            _write_array(root, "flux", relative_flux[order], ("pattern",), growing)
        if truth is not None:
            corner = [float(value) for value in truth.corner_yx_px]
            _write_array(root, "truth", truth.object.astype(np.complex64), ("y", "x"), corner_yx_px=corner)
        scan_hash = data_hash(diffraction_hash, position, mask, calibrated)
        segment: dict[str, Any] = {
            "n_patterns": n_patterns,
            "diffraction_hash": diffraction_hash,
            "data_hash": scan_hash,
        }
        root.attrs.update(
            {
                "domain": domain,
                "normalization": normalization,
                "calibration": calibration,
                "mean_counts": mean_counts,
                "diffraction_hash": diffraction_hash,
                "data_hash": scan_hash,
                "sorted_along_curve": bool((order != np.arange(n_patterns)).any()),
                "provenance": provenance or {},
                **{name: float(value) for name, value in optics.items() if value is not None},
                **({"segments": [segment]} if growing else {}),
                **({} if flux is None else {"mean_flux": float(np.mean(flux))}),
            }
        )
        # The state is the last change. In a bucket it completes the store, which by now may be that of a run that took
        # over.
        writing.check_held()
        consolidate(writing.whole).attrs["state"] = "growing" if growing else "complete"
    logger.info("%s: wrote %d patterns of %d x %d", store_name, n_patterns, n_pixels, n_pixels)
    return open_scan(path)


def fill_patterns(
    array: zarr.Array,
    first: int,
    source: PatternSource,
    order: NDArray[np.int64],
    source_rows: NDArray[np.int64],
    domain: Domain,
    mask: NDArray[np.bool_] | None,
    bar: Progress,
    label: str,
) -> tuple[float, str]:
    """Write patterns in `order` into an array from row `first`.

    Parameters
    ----------
    array : zarr.Array
        Stored patterns; long enough for the new ones.
    first : int
    source, source_rows, domain, mask
        As for `write_scan`.
    order : int64 array
    bar : Progress
    label : str
        The store, for messages.

    Returns
    -------
    total_counts : float
    digest : str
        SHA-256 of the patterns.

    Raises
    ------
    PtychodaskError
        If patterns are negative or not finite.
    """
    digest = hashlib.sha256()
    total_counts = 0.0
    for start, block in _blocks(source, order, _shard_patterns(array), first):
        total_counts += _checked_counts(block, domain, mask, source_rows[order[start : start + len(block)]], label)
        digest.update(np.ascontiguousarray(block).data)
        array[first + start : first + start + len(block)] = block
        bar.advance(len(block))
    return total_counts, digest.hexdigest()


def fill_labels(array: zarr.Array, first: int, label: PatternSource, order: NDArray[np.int64], store_name: str) -> None:
    """Write labels into an array from row `first`; see `fill_patterns`."""
    for start, block in _blocks(label, order, _shard_patterns(array), first):
        if not np.isfinite(block).all():
            raise PtychodaskError(
                f"{store_name}: labels have values that are not finite; correct them, or omit the labels"
            )
        array[first + start : first + start + len(block)] = block


def relative_to_mean(flux: NDArray[Any], label: str, mean: float | None = None) -> NDArray[np.float32]:
    """Flux divided by its mean.

    Parameters
    ----------
    flux : float array (pattern,)
    label : str
        The store, for messages.
    mean : float, optional
        Mean of the first segment of a growing scan, used instead.

    Raises
    ------
    PtychodaskError
        If a value is not positive.
    """
    flux = np.asarray(flux, np.float64)
    if not np.isfinite(flux).all() or (flux <= 0).any():
        raise PtychodaskError(f"{label}: flux has values that are not positive; leave those frames out")
    return (flux / (flux.mean() if mean is None else mean)).astype(np.float32)


def _shard_patterns(array: zarr.Array) -> int:
    """Patterns in one shard, which are read, checked and written together."""
    return int((array.shards or array.chunks)[0])


def _create_patterns(
    root: zarr.Group, name: str, source: PatternSource, dims: tuple[str, str, str], *, growing: bool
) -> zarr.Array:
    n_patterns, n_pixels = source.shape[:2]
    per_chunk = chunk_patterns(n_pixels, source.dtype.itemsize)
    per_chunk = per_chunk if growing else min(per_chunk, n_patterns)
    chunks_needed = -(-n_patterns // per_chunk)
    chunks_allowed = max(1, SHARD_BYTES // (per_chunk * n_pixels * n_pixels * source.dtype.itemsize))
    return root.create_array(
        name,
        shape=(n_patterns, n_pixels, n_pixels),
        dtype=source.dtype,
        chunks=(per_chunk, n_pixels, n_pixels),
        # Readers of a growing scan may meet a file while it is replaced. A chunk is read in one piece, old or new; a
        # shard is read in parts, its index first, which may belong to different versions.
        shards=None if growing else (per_chunk * min(SHARD_CHUNKS, chunks_needed, chunks_allowed), n_pixels, n_pixels),
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.bitshuffle),
        dimension_names=dims,
        # Patterns of zeros are written as well, so that a missing file always means damage.
        config={"write_empty_chunks": True},
    )


def _blocks(
    source: PatternSource, order: NDArray[np.int64], block_patterns: int, first: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Blocks of patterns in `order`, each with its first index in it.

    Blocks end where shards of the array do, if the first pattern goes into row `first`.
    """
    # A write rewrites each file that it touches. So each is written once, but the first, which an earlier segment may
    # have begun.
    start = 0
    while start < len(order):
        stop = start + block_patterns - (first + start) % block_patterns
        yield start, np.asarray(source[order[start:stop]])
        start = stop


def _checked_counts(
    block: NDArray[Any], domain: Domain, mask: NDArray[np.bool_] | None, rows: NDArray[np.int64], label: str
) -> float:
    """Total counts of a block; raises for negative or non-finite good pixels."""
    # A float sum is NaN or inf where any value is, so one pass serves both checks and the total.
    good = block if mask is None else block[:, mask]
    axes = tuple(range(1, good.ndim))
    lowest = good.min(axis=axes)
    if domain == "counts":
        totals = good.sum(axis=axes, dtype=np.float64)
    else:
        totals = np.square(good, dtype=np.float64).sum(axis=axes)
    for is_bad, problem in ((~np.isfinite(totals), "values that are not finite"), (lowest < 0, f"negative {domain}")):
        bad = rows[is_bad]
        if len(bad):
            listed = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise PtychodaskError(
                f"{label}: {problem} in {len(bad)} patterns (source rows {listed}); "
                "leave them out with drop_frames=, or mark the pixels bad with mask="
            )
    return float(totals.sum())


def _write_array(
    root: zarr.Group, name: str, values: NDArray[Any], dims: tuple[str, ...], growing: bool = False, **attributes: Any
) -> None:
    # Tables of patterns and groups are read in parts, all other arrays at once. A growing table gets chunks of full
    # size, since its chunk size cannot change later.
    rows = len(values)
    if dims[0] in ("pattern", "group"):
        rows = TABLE_ROWS if growing else min(rows, TABLE_ROWS)
    array = root.create_array(
        name, data=np.ascontiguousarray(values), chunks=(rows, *values.shape[1:]), dimension_names=dims
    )
    array.attrs.update(attributes)


@contextmanager
def changing_root(path: Path) -> Iterator[dict[str, Any]]:
    """Root metadata of a growing store, locked, then replaced at once.

    Parameters
    ----------
    path : Path

    Yields
    ------
    dict
        Content of ``zarr.json``, to be changed. Readers see the complete change or none of it: they take the shapes of
        arrays from here (the consolidated metadata), and arrays may be longer on disk.
    """
    # `append_segment`, `group` and `record_model` may run together, and each reads, changes and writes the same file:
    # without the lock the later one would drop what the earlier one added. A change takes milliseconds, so they wait.
    with folder_lock(path, wait=True):
        root = read_json(path / "zarr.json")
        yield root
        # One rename: Zarr's own update of metadata, node by node, would show readers a store between two states.
        with atomic_file(path / "zarr.json", overwrite=True) as building:
            building.write_text(json.dumps(root, indent=2))


def update_node(root: dict[str, Any], path: Path, name: str) -> None:
    """Copy the metadata of a node on disk into those of `changing_root`."""
    node = read_json(path / name / "zarr.json")
    if node["node_type"] == "group":
        node["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {}}
    root["consolidated_metadata"]["metadata"][name] = node


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


def open_scan(store: str | Location) -> Scan:
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

    def __init__(self, store: str | Location) -> None:
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


def group(store: str | Location, spec: GroupingSpec = GroupingSpec(), *, name: str | None = None) -> Groups:
    """Stored group table of a scan, drawn and stored if missing.

    Parameters
    ----------
    store : path or ``s3://`` URL
    spec : GroupingSpec
    name : str, optional
        Name of the table; by default the spec's.

    Returns
    -------
    Groups

    Raises
    ------
    PtychodaskError
        If the name is taken by another spec, or the scan has too few patterns.
    """
    path = parse_location(store)
    name = spec.name if name is None else name
    stored = _open_same_groups(path, spec, name)
    if stored is not None:
        return Groups(stored.rows(0, len(stored)), spec, name)
    # Only a scan on a disk can grow. While a segment is appended its arrays are longer than readers may know:
    # consolidating would publish them unfinished, so only the nodes of the new table are added to the metadata.
    if isinstance(path, Path) and open_root(path, SCAN).attrs["state"] == "growing":
        with changing_root(path) as root:
            groups = _write_groups(path, spec, name)
            for node in ("groups", f"groups/{name}", f"groups/{name}/member"):
                update_node(root, path, node)
    else:
        groups = _write_groups(path, spec, name)
        consolidate(path)
    logger.info("%s: stored %d groups of %d as '%s'", path, len(groups), spec.members, name)
    return groups


def open_or_draw_groups(store: str | Location, spec: GroupingSpec) -> GroupTable:
    """Group table of a spec, stored or drawn with the same rows.

    Parameters
    ----------
    store : path or ``s3://`` URL
        Only read.
    spec : GroupingSpec

    Returns
    -------
    GroupTable
        Rows as `group` would store them; 4 bytes per member in memory if they are not stored.

    Raises
    ------
    PtychodaskError
        As `group`.
    """
    path = parse_location(store)
    stored = _open_same_groups(path, spec, spec.name)
    if stored is not None:
        return stored
    scan = open_scan(path)
    tables = _draw_groups(scan, path, spec)
    segments = [len(part) for part in tables]
    return GroupTable(path, spec.name, spec, np.concatenate(tables), scan.n_patterns, segments)


def _open_same_groups(path: Location, spec: GroupingSpec, name: str) -> GroupTable | None:
    """Stored group table of a name, or None.

    Raises
    ------
    PtychodaskError
        If its spec is another.
    """
    stored = open_groups(path, name)
    if stored is not None and stored.spec != spec:
        raise PtychodaskError(
            f"{path}: group table '{name}' was made by {stored.spec}, not by {spec}; pass another name="
        )
    return stored


def _draw_groups(scan: Scan, path: Location, spec: GroupingSpec) -> list[NDArray[np.int32]]:
    """Groups of a stored scan, int32 (group, channel) for each segment."""
    # Groups are drawn segment by segment, so that the table of a growing scan is the same as if it had been there
    # before.
    sizes = segment_sizes(scan.attributes, scan.n_patterns, str(path))
    first = [0, *accumulate(sizes)]
    return [
        segment_groups(str(path), scan.position_yx_px, scan.scan_index, spec, start, stop)
        for start, stop in pairwise(first)
    ]


def _write_groups(path: Location, spec: GroupingSpec, name: str) -> Groups:
    """Draw groups and write their table, without the consolidated metadata."""
    scan = open_scan(path)
    tables = _draw_groups(scan, path, spec)
    groups = Groups(np.concatenate(tables), spec, name)
    # A killed run may have left a table that the consolidated metadata do not list: it is overwritten.
    root = zarr.open_group(zarr_store(path), mode="r+", zarr_format=3, use_consolidated=False)
    table = root.require_group("groups").create_group(name, overwrite=True)
    segmented = "segments" in scan.attributes
    _write_array(table, "member", groups.member, ("group", "channel"), scan.attributes["state"] == "growing")
    rows = {"segment_groups": [len(part) for part in tables]} if segmented else {}
    table.attrs.update({"spec": groups.attributes(), "state": "complete", **rows})
    return groups


def segment_groups(
    label: str,
    position_yx_px: NDArray[np.float64],
    scan_index: NDArray[np.int64] | None,
    spec: GroupingSpec,
    start: int,
    stop: int,
) -> NDArray[np.int32]:
    """Groups within the segment of patterns from `start` to `stop`.

    Parameters
    ----------
    label : str
        The store, for messages.
    position_yx_px, scan_index
        Those of all patterns, see `group_positions`.
    spec : GroupingSpec
    start, stop : int

    Returns
    -------
    int32 array (group, channel)
        Indices of patterns in the complete scan.

    Raises
    ------
    PtychodaskError
        See `group_positions`.
    """
    try:
        drawn = group_positions(
            position_yx_px[start:stop], spec, None if scan_index is None else scan_index[start:stop]
        )
    except PtychodaskError as error:
        if (start, stop) == (0, len(position_yx_px)):
            raise
        raise PtychodaskError(f"{label}: segment of patterns {start}..{stop - 1}: {error}") from error
    return drawn + np.int32(start)


class GroupTable:
    """Group table read by rows, from a store or from memory.

    Parameters
    ----------
    store : path or ``s3://`` URL
    name : str
    spec : GroupingSpec
    member : zarr.Array, or int32 array (group, channel)
        Stored rows, or those of a table that is not stored.
    n_patterns : int
    segments : ints, optional
        Groups of each segment; by default one segment.
    """

    def __init__(
        self,
        store: Location,
        name: str,
        spec: GroupingSpec,
        member: zarr.Array | NDArray[np.int32],
        n_patterns: int,
        segments: Sequence[int] | None = None,
    ) -> None:
        self.name, self.spec = name, spec
        self.segments = (int(member.shape[0]),) if segments is None else tuple(segments)
        """Groups of each segment of the scan."""
        self._store, self._member, self._n_patterns = store, member, n_patterns
        most = spec.oversampling * n_patterns
        fits = member.ndim == 2 and member.shape[1] == spec.members and member.shape[0] <= most
        if not fits or sum(self.segments) != member.shape[0] or min(self.segments, default=0) < 1:
            raise self._misfit()

    def __len__(self) -> int:
        return sum(self.segments)

    def in_segments(self, n_segments: int) -> GroupTable:
        """The table as it was when the scan had `n_segments` segments."""
        cut = copy(self)
        cut.segments = self.segments[:n_segments]
        return cut

    @property
    def in_memory(self) -> NDArray[np.int32] | None:
        """Rows of a table that is not stored, int32 (group, channel)."""
        return self._member if isinstance(self._member, np.ndarray) else None

    def rows(self, start: int, stop: int) -> NDArray[np.int32]:
        """Rows `start` to `stop`, int32 (group, channel).

        Raises
        ------
        PtychodaskError
            If they cannot be read, or do not fit the scan.
        """
        if isinstance(self._member, np.ndarray):
            return self._member[start:stop]
        member = _read_rows(self._member, str(self._store), slice(start, stop)).astype(np.int32)
        # Zarr reads a missing file as zeros, which are valid indices, but several groups never consist of pattern 0
        # only.
        is_missing = len(member) > 1 and not member.any()
        if is_missing or not ((member >= 0) & (member < self._n_patterns)).all():
            raise self._misfit()
        return member

    def _misfit(self) -> PtychodaskError:
        return PtychodaskError(f"{self._store}: group table '{self.name}' does not fit the scan; pass another name=")


def open_groups(store: str | Location, name: str) -> GroupTable | None:
    """Stored group table, read lazily; None if there is none.

    Parameters
    ----------
    store : path or ``s3://`` URL
    name : str

    Raises
    ------
    PtychodaskError
        If the name is not valid, or the table has no readable spec or does not fit the scan.
    """
    path = parse_location(store)
    if not name or "/" in name or name.startswith("."):
        raise PtychodaskError(
            f"{path}: {name!r} is not a valid name of a group table; use letters, digits, '-' and '_'"
        )
    root = open_root(path, SCAN)
    table = root.get(f"groups/{name}")
    if not isinstance(table, zarr.Group) or table.attrs.get("state") != "complete":
        return None
    segment_groups: Any = table.attrs.get("segment_groups")
    try:
        spec = GroupingSpec(**dict(table.attrs["spec"]))  # type: ignore[arg-type]
        segments = None if segment_groups is None else tuple(int(n_groups) for n_groups in segment_groups)
    except (TypeError, KeyError, ValueError) as error:
        raise PtychodaskError(
            f"{path}: group table '{name}' has no readable spec ({error}); pass another name="
        ) from error
    n_patterns = int(_array(root, "diffraction", str(path)).shape[0])
    return GroupTable(path, name, spec, _array(table, "member", str(path)), n_patterns, segments)


def read_groups(store: str | Location, name: str) -> Groups | None:
    """Stored group table in memory; None and errors as for `open_groups`."""
    table = open_groups(store, name)
    return None if table is None else Groups(table.rows(0, len(table)), table.spec, name)


def stored_group_names(store: str | Location) -> list[str]:
    """Sorted names of the group tables in a store."""
    root = open_root(parse_location(store), SCAN)
    tables = root.get("groups")
    return sorted(tables.group_keys()) if isinstance(tables, zarr.Group) else []


def check_probe_is_free(scan: Scan) -> None:
    """Raise `PtychodaskError` if a scan is growing: its probe is fixed."""
    if scan.attributes["state"] == "growing":
        raise PtychodaskError(
            f"{scan.store}: the scan is still growing, and keeps the probe of its first segment; finish it first with "
            f"'ptychodask ingest --finish {scan.store}'"
        )


def replace_probe(store: str | Location, probe: NDArray[np.complex64], record: dict[str, Any]) -> Scan:
    """Replace the probe of a store; `probe_initial` and the patterns stay.

    Parameters
    ----------
    store : path or ``s3://`` URL
    probe : complex64 array (mode, N, N)
        Calibrated, with the shape of the stored probe.
    record : dict
        Description of the refinement; stored as the attribute ``probe_refinement``.

    Returns
    -------
    Scan
        The store, opened again, with a new data hash.

    Raises
    ------
    PtychodaskError
        If the shape differs or a value is not finite.
    """
    path = parse_location(store)
    scan = open_scan(path)
    check_probe_is_free(scan)
    if probe.shape != scan.probe.shape or not np.isfinite(probe).all():
        raise PtychodaskError(
            f"{path}: the new probe has shape {probe.shape} or values that are not finite; expected {scan.probe.shape}"
        )
    probe = probe.astype(np.complex64)
    root = open_root(path, SCAN, "r+")
    _array(root, "probe", str(path))[...] = probe
    # Results and models record the data hash, so those of the earlier probe are recognised as such.
    root.attrs.update({"data_hash": hash_with_probe(scan, probe), "probe_refinement": record})
    if "segments" in scan.attributes:
        # A run planned while the scan grew accepts the store by the hash of an earlier segment; with another probe it
        # must not.
        root.attrs["segments"] = [
            {key: value for key, value in segment.items() if key != "data_hash"}
            for segment in scan.attributes["segments"]
        ]
    consolidate(path)
    return open_scan(path)


def record_model(store: str | Location, *, kind: str, path: str | Path, content_hash: str) -> None:
    """Record a trained model in a store as its latest of `kind`.

    Parameters
    ----------
    store : path or ``s3://`` URL
    kind : str
        "pinn" or "baseline".
    path : path
        Bundle of the model; recorded relative to the folder of the store, or as an absolute path if the store is in a
        bucket.
    content_hash : str
        Hash of the content of the bundle.
    """
    location, bundle = parse_location(store), Path(path).resolve()
    root = open_root(location, SCAN, "r+")
    recorded = str(bundle) if isinstance(location, S3Location) else os.path.relpath(bundle, location.resolve().parent)
    model = {"kind": kind, "path": recorded, "hash": content_hash, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if isinstance(location, Path) and root.attrs["state"] == "growing":
        with changing_root(location) as metadata:
            metadata["attributes"].setdefault("models", []).append(model)
        return
    root.attrs["models"] = [*root.attrs.get("models", []), model]  # type: ignore[misc]
    consolidate(location)
