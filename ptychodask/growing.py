"""Scans that are written while they are measured: segment after segment, of which readers see whole ones alone."""

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

from ptychodask.folders import folder_lock
from ptychodask.grouping import GroupingSpec
from ptychodask.places import on_disk
from ptychodask.progress import progress_bar
from ptychodask.scan import PatternSource, PtychodaskError, Scan, check_positions
from ptychodask.store import (
    INGEST_AGAIN,
    SCAN,
    ScanReader,
    changing_root,
    chunk_patterns,
    data_hash,
    fill_labels,
    fill_patterns,
    open_root,
    open_scan,
    relative_to_mean,
    segment_groups,
    storage_order,
    take_node,
)

logger = logging.getLogger(__name__)

OF_PATTERNS = ("diffraction", "y_px", "x_px", "scan_index", "source_index", "flux", "label")
"""Arrays that grow with the patterns."""


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
    """Add patterns to a growing scan as one more segment, sorted along the curve in itself.

    Parameters
    ----------
    store : path
        A store whose state is `growing`.
    diffraction : array or lazy source (pattern, N, N)
        As `write_scan` takes it; of the type, size and unit of the patterns that are there.
    position_yx_px : float64 array (pattern, 2)
        In the frame of the earlier segments.
    flux, scan_index, source_index, label, provenance, progress
        As `write_scan` takes them; flux is relative to the first segment's mean.

    Returns
    -------
    Scan
        The store, opened again.

    Raises
    ------
    PtychodaskError
        If the scan does not grow any more, another writer is at work, patterns are not as they must be or do not fit
        those that are there, or a stored group table cannot be drawn for so few.

    Notes
    -----
    Probe, mask, normalisation and calibration stay those of the first segment. All data are written first, beyond what
    readers know of; then the root's metadata are replaced in one piece. A writer that is stopped before leaves the
    earlier segments as they are, and the next one writes over what it left.

    The hash of the patterns is, from the second segment on, that of the segments' hashes in their order.
    """
    path = on_disk(store, "a scan that grows")
    with _appending(path):
        scan = open_scan(path)
        _check_fits(scan, diffraction, flux, label)
        n_new, n_pixels = diffraction.shape[:2]
        check_positions(position_yx_px, n_new, str(path))
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
        _resize(arrays, scan.n_patterns + n_new)
        for name, values in columns.items():
            arrays[name][scan.n_patterns :] = values
        if label is not None:
            fill_labels(arrays["label"], scan.n_patterns, label, order, str(path))
        with progress_bar("append", n_new, "patterns", progress) as bar:
            _, found_hash = fill_patterns(
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
        _publish(path, scan, position, columns["scan_index"], found_hash, provenance)
    logger.info("%s: appended %d patterns to %d", path, n_new, scan.n_patterns)
    return open_scan(path)


def finish_scan(store: str | Path) -> Scan:
    """Say that a growing scan is whole: nothing is appended any more.

    Parameters
    ----------
    store : path
        A store that `ingest` made with ``append=True``; one that is complete stays as it is.

    Returns
    -------
    Scan
        The store, opened again.

    Raises
    ------
    PtychodaskError
        If there is no such store, or a writer is appending to it.
    """
    path = on_disk(store, "a scan that grows")
    if open_root(path, SCAN).attrs["state"] == "growing":
        with _appending(path):
            scan = open_scan(path)
            arrays = _arrays(path)
            # What stopped writers left that readers do not know goes: the metadata are made of what is on disk again.
            _resize(arrays, scan.n_patterns)
            with changing_root(path) as root:
                known = _tables(root)
                for folder in (path / "groups").glob("*/"):
                    if f"groups/{folder.name}" not in known:
                        shutil.rmtree(folder)
                for table, recorded in known.items():
                    _write_table(path, table, recorded["segment_groups"])
                for name in arrays:
                    take_node(root, path, name)
                root["attributes"]["state"] = "complete"
    return open_scan(path)


def growth(store: str | Path) -> tuple[str, int]:
    """State of a store ("growing" or "complete"), and how many segments readers see."""
    attributes = ScanReader(store).attributes
    return attributes["state"], len(attributes.get("segments", (None,)))


@contextmanager
def _appending(path: Path) -> Iterator[None]:
    """Hold a growing store as its only writer; an error of its disk is named."""
    state = open_root(path, SCAN).attrs["state"]
    if state != "growing":
        raise PtychodaskError(
            f"{path}: the scan is {state}, expected one that grows (made by append=True, --append, and not finished); "
            "name another store"
        )
    try:
        # The patterns' folder is held for long; the root's, for each change of its metadata.
        with folder_lock(path / "diffraction", wait=False):
            yield
    except BlockingIOError as error:
        raise PtychodaskError(f"{path}: another writer is appending to it; wait for its end") from error
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be written ({error.strerror or error}); the segments that were there are untouched: free "
            "space, and append again"
        ) from error


def _check_fits(scan: Scan, diffraction: PatternSource, flux: NDArray[Any] | None, label: PatternSource | None) -> None:
    """Raise `PtychodaskError`, naming what differs, unless patterns fit those of a scan."""
    kinds: dict[str, tuple[Any, Any]] = {
        "pixels": (tuple(scan.diffraction.shape[1:]), tuple(diffraction.shape[1:])),
        "type of the patterns": (str(scan.diffraction.dtype), str(diffraction.dtype)),
        "flux": (_presence(scan.flux), _presence(flux)),
        "labels": (_presence(scan.label), _presence(label)),
    }
    for name, (first, found) in kinds.items():
        if first != found:
            raise PtychodaskError(
                f"{scan.store}: {name}: {first} in the segments that are there, {found} in this one; a scan keeps what "
                "its first segment had: mend the file, or ingest it into a store of its own"
            )


def _mean_flux(scan: Scan) -> float:
    """What the flux of the first segment was divided by."""
    found = scan.attributes.get("mean_flux")
    if not isinstance(found, int | float) or not found > 0:
        raise PtychodaskError(f"{scan.store}: attribute 'mean_flux' is {found!r}; {INGEST_AGAIN}")
    return float(found)


def _presence(values: Any) -> str:
    return "none" if values is None else "some"


def _arrays(path: Path) -> dict[str, zarr.Array]:
    """Arrays of patterns as they are on disk."""
    root = zarr.open_group(path, mode="r+", zarr_format=3, use_consolidated=False)
    found = {name: root.get(name) for name in OF_PATTERNS}
    return {name: array for name, array in found.items() if isinstance(array, zarr.Array)}


def _resize(arrays: dict[str, zarr.Array], n_patterns: int) -> None:
    for array in arrays.values():
        array.resize((n_patterns, *array.shape[1:]))


def _publish(
    path: Path,
    scan: Scan,
    position_yx_px: NDArray[np.float64],
    scan_index: NDArray[np.int64],
    diffraction_hash: str,
    provenance: dict[str, Any] | None,
) -> None:
    """Draw the segment's groups for each stored table, and let readers see all of it."""
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
        digest = hashlib.sha256("".join(one["diffraction_hash"] for one in segments).encode())
        attributes["diffraction_hash"] = digest.hexdigest()
        position = np.concatenate([scan.position_yx_px, position_yx_px])
        attributes["data_hash"] = data_hash(attributes["diffraction_hash"], position, scan.mask, scan.probe)
        segments[-1]["data_hash"] = attributes["data_hash"]
        attributes["segments"] = segments
        for name in _arrays(path):
            take_node(root, path, name)
        indices = None if scan.scan_index is None else np.concatenate([scan.scan_index, scan_index])
        _extend_groups(path, root, position, indices, n_new)


def _extend_groups(
    path: Path,
    root: dict[str, Any],
    position_yx_px: NDArray[np.float64],
    scan_index: NDArray[np.int64] | None,
    n_new: int,
) -> None:
    """Add the groups of the last segment to each table that readers know."""
    n_patterns = len(position_yx_px)
    for table, recorded in _tables(root).items():
        spec = GroupingSpec(**recorded["spec"])
        drawn = segment_groups(str(path), position_yx_px, scan_index, spec, n_patterns - n_new, n_patterns)
        before = recorded["segment_groups"]
        _write_table(path, table, [*before, len(drawn)])[sum(before) :] = drawn
        for name in (table, f"{table}/member"):
            take_node(root, path, name)


def _tables(root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Attributes of the group tables that readers know, by their paths in the store."""
    known = root["consolidated_metadata"]["metadata"]
    names = [name.removesuffix("/member") for name in known if name.startswith("groups/") and name.endswith("/member")]
    found = {name: known[name]["attributes"] for name in names}
    for name, attributes in found.items():
        if not isinstance(attributes.get("segment_groups"), list):
            raise PtychodaskError(f"{name}: attribute 'segment_groups' is missing; {INGEST_AGAIN}")
    return found


def _write_table(path: Path, table: str, segments: list[int]) -> zarr.Array:
    """Bring a group table to the length of its segments; gives its array."""
    zarr.open_group(path / table, mode="r+", zarr_format=3).attrs["segment_groups"] = segments
    member = zarr.open_array(path / table / "member", mode="r+", zarr_format=3)
    member.resize((sum(segments), *member.shape[1:]))
    return member
