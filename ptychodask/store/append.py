"""Growing scans: segments appended while a scan is measured."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.progress import progress_bar
from ptychodask.scan import PatternSource, Scan, check_positions
from ptychodask.storage.atomic import folder_lock
from ptychodask.storage.location import LocalLocation, on_disk
from ptychodask.storage.zarr_checks import open_root
from ptychodask.store import INGEST_AGAIN, SCAN, data_hash, open_scan, segment_groups
from ptychodask.store.write import (
    changing_root,
    chunk_patterns,
    fill_labels,
    fill_patterns,
    relative_to_mean,
    storage_order,
    update_node,
)

logger = logging.getLogger(__name__)


OF_PATTERNS = ("diffraction", "y_px", "x_px", "scan_index", "source_index", "flux", "label")
"""Names of the arrays that have one row for each pattern."""


def append_segment(
    store: str | Path,
    *,
    diffraction: PatternSource,
    position_yx_px: NDArray[np.float64],
    flux: NDArray[np.floating[Any]] | None = None,
    scan_index: NDArray[np.int64] | None = None,
    source_index: NDArray[np.int64] | None = None,
    label: PatternSource | None = None,
    provenance: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> Scan:
    """Append patterns to a growing scan as a new segment.

    Parameters
    ----------
    store : path
        A store whose state is `growing`.
    diffraction : array or lazy source (pattern, N, N)
        As for `write_scan`; of the same type, size and unit as the stored patterns.
    position_yx_px : float64 array (pattern, 2)
        In the same scan coordinates as the earlier segments.
    flux, scan_index, source_index, label, provenance, progress
        As for `write_scan`; flux is relative to the mean of the first segment.

    Returns
    -------
    Scan
        The store, opened again.

    Raises
    ------
    PtychodaskError
        If the scan is finished, another writer is appending, patterns are not valid or do not fit the stored ones, or
        they are too few for the groups of a stored table.

    Notes
    -----
    Probe, mask, normalisation and calibration stay those of the first segment, and each segment is sorted along the
    curve separately. All data are written first, beyond the shapes that readers know; then the root metadata are
    replaced in one step. A writer that is stopped before that leaves the earlier segments unchanged, and the next one
    overwrites what it left.

    From the second segment on, the hash of the patterns is that of the segments' hashes in their order.
    """
    path = on_disk(store, "a growing scan")
    with _appending(path):
        # Opened under the lock: another writer may have appended since the caller looked at the store.
        scan = open_scan(path)
        _check_fits(scan, diffraction, flux, label)
        n_new, n_pixels = diffraction.shape[:2]
        check_positions(position_yx_px, n_new, str(path))
        # Sorted within the segment only: rows that readers have must keep their indices, which group tables refer to.
        order = storage_order(position_yx_px, chunk_patterns(n_pixels, diffraction.dtype.itemsize))
        position = np.ascontiguousarray(position_yx_px[order], np.float64)
        rows = np.arange(n_new) if source_index is None else np.asarray(source_index, np.int64)
        indices = np.zeros(n_new, np.int64) if scan_index is None else np.asarray(scan_index, np.int64)
        columns: dict[str, NDArray[Any]] = {
            "y_px": position[:, 0],
            "x_px": position[:, 1],
            "scan_index": indices[order],
            "source_index": rows[order],
        }
        if flux is not None:
            columns["flux"] = relative_to_mean(flux, str(path), _mean_flux(scan))[order]
        arrays = _arrays(path)
        # From the number of patterns that readers know, not from the length on disk: rows that a stopped writer left
        # beyond it are overwritten.
        _resize(arrays, scan.n_patterns + n_new)
        for name, values in columns.items():
            arrays[name][scan.n_patterns :] = values
        if label is not None:
            fill_labels(arrays["label"], scan.n_patterns, label, order, str(path))
        with progress_bar("append", n_new, "patterns", progress) as bar:
            _, diffraction_hash = fill_patterns(
                arrays["diffraction"],
                scan.n_patterns,
                diffraction,
                order,
                rows,
                scan.domain,
                scan.mask,
                bar,
                str(path),
            )
        # Last: until the root is replaced no reader knows of the new rows, so a failure above leaves the scan as is.
        _publish(path, scan, position, columns["scan_index"], diffraction_hash, provenance)
    logger.info("%s: appended %d patterns to %d", path, n_new, scan.n_patterns)
    return open_scan(path)


def finish_scan(store: str | Path) -> Scan:
    """Mark a growing scan as complete.

    Parameters
    ----------
    store : path
        A store made by `ingest` with ``append=True``; a complete one stays unchanged.

    Returns
    -------
    Scan
        The store, opened again.

    Raises
    ------
    PtychodaskError
        If there is no such store, or a writer is appending to it.
    """
    path = on_disk(store, "a growing scan")
    if open_root(path, SCAN).attrs["state"] == "growing":
        with _appending(path):
            scan = open_scan(path)
            arrays = _arrays(path)
            # What stopped writers left beyond the known segments goes first, since the metadata are then taken from
            # disk.
            _resize(arrays, scan.n_patterns)
            with changing_root(path) as root:
                tables = _tables(root)
                for folder in (path / "groups").glob("*/"):
                    # Readers do not know it, and consolidating the finished store would publish it half-written.
                    if f"groups/{folder.name}" not in tables:
                        shutil.rmtree(folder)
                for table, attributes in tables.items():
                    _resized_table(path, table, attributes["segment_groups"])
                for name in arrays:
                    update_node(root, path, name)
                root["attributes"]["state"] = "complete"
    return open_scan(path)


@contextmanager
def _appending(path: LocalLocation) -> Iterator[None]:
    """Lock a growing store for appending; disk errors become `PtychodaskError`."""
    state = open_root(path, SCAN).attrs["state"]
    if state != "growing":
        raise PtychodaskError(
            f"{path}: the scan is {state}, expected a growing one (made with append=True, --append, and not finished); "
            "name another store"
        )
    try:
        # Two locks: that of the patterns for the complete append, which keeps a second writer out; that of the root,
        # taken by `changing_root` for moments only, so that `group` and `record_model` need not wait for an append.
        with folder_lock(path / "diffraction", wait=False):
            yield
    except BlockingIOError as error:
        raise PtychodaskError(f"{path}: another writer is appending to it; wait until it has finished") from error
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); the earlier segments are unchanged: free space, "
            "and append again"
        ) from error


def _check_fits(scan: Scan, diffraction: PatternSource, flux: NDArray[Any] | None, label: PatternSource | None) -> None:
    """Raise `PtychodaskError` unless new patterns fit those of a scan."""
    compared: dict[str, tuple[Any, Any]] = {
        "pixels": (tuple(scan.diffraction.shape[1:]), tuple(diffraction.shape[1:])),
        "type of the patterns": (str(scan.diffraction.dtype), str(diffraction.dtype)),
        "flux": (_presence(scan.flux), _presence(flux)),
        "labels": (_presence(scan.label), _presence(label)),
    }
    for name, (stored, new) in compared.items():
        if stored != new:
            raise PtychodaskError(
                f"{scan.store}: {name}: {stored} in the stored segments, {new} in this one; segments must "
                "agree: correct the file, or ingest it into another store"
            )


def _mean_flux(scan: Scan) -> float:
    """Mean flux of the first segment, by which its flux was divided."""
    mean = scan.attributes.get("mean_flux")
    if not isinstance(mean, int | float) or not mean > 0:
        raise PtychodaskError(f"{scan.store}: attribute 'mean_flux' is {mean!r}; {INGEST_AGAIN}")
    return float(mean)


def _presence(values: Any) -> str:
    return "none" if values is None else "some"


def _arrays(path: LocalLocation) -> dict[str, zarr.Array]:
    """Arrays of patterns, with their shapes on disk."""
    # Not those of the consolidated metadata, which end before the rows that are being written or that a stopped writer
    # left.
    root = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
    nodes = {name: root.get(name) for name in OF_PATTERNS}
    return {name: array for name, array in nodes.items() if isinstance(array, zarr.Array)}


def _resize(arrays: dict[str, zarr.Array], n_patterns: int) -> None:
    for array in arrays.values():
        array.resize((n_patterns, *array.shape[1:]))


def _publish(
    path: LocalLocation,
    scan: Scan,
    position_yx_px: NDArray[np.float64],
    scan_index: NDArray[np.int64],
    diffraction_hash: str,
    provenance: dict[str, Any] | None,
) -> None:
    """Extend the stored group tables and make the segment visible."""
    n_new = len(position_yx_px)
    with changing_root(path) as root:
        attributes: dict[str, Any] = root["attributes"]
        segments = [
            *attributes["segments"],
            {
                "n_patterns": n_new,
                "diffraction_hash": diffraction_hash,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **({"provenance": provenance} if provenance else {}),
            },
        ]
        # Of the segments' hashes: reading all earlier patterns again would make each segment cost more than the last.
        digest = hashlib.sha256("".join(segment["diffraction_hash"] for segment in segments).encode())
        attributes["diffraction_hash"] = digest.hexdigest()
        position = np.concatenate([scan.position_yx_px, position_yx_px])
        # Each segment records the hash of the scan up to it: a run planned before another segment finds its data by it.
        attributes["data_hash"] = data_hash(attributes["diffraction_hash"], position, scan.mask, scan.probe)
        segments[-1]["data_hash"] = attributes["data_hash"]
        attributes["segments"] = segments
        for name in _arrays(path):
            update_node(root, path, name)
        indices = None if scan.scan_index is None else np.concatenate([scan.scan_index, scan_index])
        _extend_groups(path, root, position, indices, n_new)


def _extend_groups(
    path: LocalLocation,
    root: dict[str, Any],
    position_yx_px: NDArray[np.float64],
    scan_index: NDArray[np.int64] | None,
    n_new: int,
) -> None:
    """Add the groups of the last segment to each table."""
    n_patterns = len(position_yx_px)
    for table, attributes in _tables(root).items():
        spec = GroupingSpec(**attributes["spec"])
        drawn = segment_groups(str(path), position_yx_px, scan_index, spec, n_patterns - n_new, n_patterns)
        before = attributes["segment_groups"]
        # From the known rows on: a writer that was stopped here may have left others after them.
        _resized_table(path, table, [*before, len(drawn)])[sum(before) :] = drawn
        for name in (table, f"{table}/member"):
            update_node(root, path, name)


def _tables(root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attributes of the group tables that readers know, by path."""
    nodes = root["consolidated_metadata"]["metadata"]
    names = [name.removesuffix("/member") for name in nodes if name.startswith("groups/") and name.endswith("/member")]
    tables = {name: nodes[name]["attributes"] for name in names}
    for name, attributes in tables.items():
        if not isinstance(attributes.get("segment_groups"), list):
            raise PtychodaskError(f"{name}: attribute 'segment_groups' is missing; {INGEST_AGAIN}")
    return tables


def _resized_table(path: LocalLocation, table: str, segments: list[int]) -> zarr.Array:
    """Resize a group table to its segments; returns its array."""
    zarr.open_group(path / table, mode="r+", zarr_format=3).attrs["segment_groups"] = segments
    member = zarr.open_array(path / table / "member", mode="r+", zarr_format=3)
    member.resize((sum(segments), *member.shape[1:]))
    return member
