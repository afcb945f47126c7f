"""Writing of a scan: patterns, positions, probe, and changes of the root."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import curve_order
from ptychodask.progress import Progress, progress_bar
from ptychodask.scan import (
    Calibration,
    Domain,
    PatternSource,
    Scan,
    Truth,
    as_rows,
    calibrate_probe,
    check_pattern_shape,
    check_positions,
    input_normalization,
)
from ptychodask.storage.atomic import atomic_file, folder_lock, read_json
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.storage.zarr_checks import COMPRESSORS, consolidate
from ptychodask.store import FORMAT, FORMAT_VERSION, SCAN, TABLE_ROWS, data_hash, open_scan

logger = logging.getLogger(__name__)


CHUNK_BYTES = 512 * 1024
"""Target size of a chunk of patterns, uncompressed: the least that a read decompresses."""


SHARD_CHUNKS = 32
"""Chunks in one shard (one file), at most."""


SHARD_BYTES = 32 * 1024 * 1024
"""Largest size of a shard, uncompressed, unless one chunk is larger: it is in memory while it is written."""


CURVE_GAIN = 0.9
"""Patterns are sorted along the curve if that reduces the chunks read to this fraction or less."""


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
    store: LocationLike,
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
    with path.atomic_store(overwrite=overwrite, kind=SCAN) as writing:
        root = zarr.create_group(writing.whole.zarr_store(), zarr_format=3)
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
    bad: dict[str, list[NDArray[np.int64]]] = {}
    for start, block in _blocks(source, order, _shard_patterns(array), first):
        total, problems = _counts_and_problems(block, domain, mask)
        for problem, is_bad in problems.items():
            bad.setdefault(problem, []).append(source_rows[order[start : start + len(block)]][is_bad])
        bar.advance(len(block))
        if bad:
            continue  # nothing is stored, but the message lists the bad rows of all blocks
        total_counts += total
        digest.update(np.ascontiguousarray(block).data)
        array[first + start : first + start + len(block)] = block
    if bad:
        problem = next(iter(bad))
        rows = np.sort(np.concatenate(bad[problem]))
        of_negative = ", or of ingest use floor=0 (--floor 0) for noise and saturated='mask' for flags"
        raise PtychodaskError(
            f"{label}: {problem} in {len(rows)} patterns (source rows {as_rows(rows)}); "
            "leave them out with drop_frames= (--drop-frames), or mark the pixels bad with mask="
            + (of_negative if problem.startswith("negative") else "")
        )
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
        compressors=COMPRESSORS,
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


def _counts_and_problems(
    block: NDArray[Any], domain: Domain, mask: NDArray[np.bool_] | None
) -> tuple[float, dict[str, NDArray[np.bool_]]]:
    """Total counts of a block, and bad patterns by problem."""
    # A float sum is NaN or inf where any value is, so one pass serves both checks and the total.
    good = block if mask is None else block[:, mask]
    axes = tuple(range(1, good.ndim))
    lowest = good.min(axis=axes)
    if domain == "counts":
        totals = good.sum(axis=axes, dtype=np.float64)
    else:
        totals = np.square(good, dtype=np.float64).sum(axis=axes)
    problems = {"values that are not finite": ~np.isfinite(totals), f"negative {domain}": lowest < 0}
    return float(totals.sum()), {problem: is_bad for problem, is_bad in problems.items() if is_bad.any()}


def _write_array(
    root: zarr.Group, name: str, values: NDArray[Any], dims: tuple[str, ...], growing: bool = False, **attributes: Any
) -> zarr.Array:
    # Tables of patterns and groups are read in parts, all other arrays at once. A growing table gets chunks of full
    # size, since its chunk size cannot change later.
    rows = len(values)
    if dims[0] in ("pattern", "group"):
        rows = TABLE_ROWS if growing else min(rows, TABLE_ROWS)
    array = root.create_array(
        name,
        data=np.ascontiguousarray(values),
        chunks=(rows, *values.shape[1:]),
        compressors=COMPRESSORS,
        dimension_names=dims,
        config={"write_empty_chunks": True},
    )
    array.attrs.update(attributes)
    return array


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
