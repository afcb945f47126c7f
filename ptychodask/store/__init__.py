"""Scans and their group tables in a Zarr store, read lazily.

A store appears only when complete, or, in a bucket, is refused until then. What it records is checked before it is
used, since Zarr takes metadata on trust and reads a missing file as fill values.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib import import_module
from itertools import accumulate, pairwise
from math import prod
from types import EllipsisType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, check_drop, experiments_of, group_positions, groups_kept
from ptychodask.scan import PatternSource, Scan, Truth
from ptychodask.storage.atomic import StoreKind
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

CHANGING = "changing_to"
"""Root attribute while positions and flux change: the data hash after the change."""

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


def data_hash(
    diffraction_hash: str,
    position_yx_px: NDArray[np.float64],
    mask: NDArray[np.bool_] | None,
    probe: NDArray[np.complex64],
) -> str:
    """SHA-256 of all data that an object depends on.

    Diffraction enters by its own hash, so that opening a store need not read it; then positions, mask and probe.
    """
    # Runs, results and bundles record it, so order and bytes must never change: earlier ones would no longer be known.
    digest = hashlib.sha256(diffraction_hash.encode())
    digest.update(np.ascontiguousarray(position_yx_px).tobytes())
    _add_optics(digest, mask, probe)
    return digest.hexdigest()


def hash_with_probe(scan: Scan, probe: NDArray[np.complex64]) -> str:
    """Data hash of a stored scan with another probe."""
    return data_hash(str(scan.attributes["diffraction_hash"]), scan.position_yx_px, scan.mask, probe)


def hash_with_positions(stored: StoredScan, position_yx_px: NDArray[np.float64]) -> str:
    """Data hash of a stored scan with other positions."""
    return data_hash(str(stored.attributes["diffraction_hash"]), position_yx_px, stored.mask, stored.probe)


def _add_optics(digest: Any, mask: NDArray[np.bool_] | None, probe: NDArray[np.complex64]) -> None:
    for values in (mask, probe):
        digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())


class GroupTable:
    """Group table read by rows, from a store or from memory.

    Parameters
    ----------
    label : str
        The store, for messages.
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
        label: str,
        name: str,
        spec: GroupingSpec,
        member: zarr.Array | NDArray[np.int32],
        n_patterns: int,
        segments: Sequence[int] | None = None,
    ) -> None:
        self.name, self.spec = name, spec
        self.segments = (int(member.shape[0]),) if segments is None else tuple(segments)
        """Groups of each segment of the scan."""
        self._label, self._member, self._n_patterns = label, member, n_patterns
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

        Raises `PtychodaskError` if they cannot be read, or do not fit the scan.
        """
        if isinstance(self._member, np.ndarray):
            return self._member[start:stop]
        member = _read_rows(self._member, self._label, slice(start, stop)).astype(np.int32)
        # Zarr reads a missing file as zeros, which are valid indices, but several groups never consist of pattern 0
        # only.
        is_missing = len(member) > 1 and not member.any()
        if is_missing or not ((member >= 0) & (member < self._n_patterns)).all():
            raise self._misfit()
        return member

    def _misfit(self) -> PtychodaskError:
        return PtychodaskError(f"{self._label}: group table '{self.name}' does not fit the scan; pass another name=")


class StoredScan:
    """A stored scan, opened once for all that reads it.

    Parameters
    ----------
    store : path or ``s3://`` URL

    Raises
    ------
    PtychodaskError
        If there is no such store, or it is unfinished, of a newer format, damaged or lacks an array. The data hash is
        verified by `check` and `scan` only.

    Notes
    -----
    Patterns, positions and segments stay those at the time of opening, however the scan grows. Group tables stored
    later are seen too, without the groups of later segments.
    """

    def __init__(self, store: LocationLike) -> None:
        self.label = str(store)
        """The store as it was named, for messages."""
        location = parse_location(store)
        # Absolute, since a process may change its folder between planning and the tasks of a lazy result.
        self.path = str(location.resolve())
        """Absolute path, or URL, of the store."""
        self._root = open_root(location, SCAN)
        self.attributes: dict[str, Any] = dict(self._root.attrs)
        """Root attributes of the store."""
        _check_attributes(self.attributes, self.label)
        self._diffraction = StoredPatterns(self._array("diffraction"), self.label)
        self.probe: NDArray[np.complex64] = self._read("probe")
        """Calibrated probe (mode, N, N)."""
        self.mask: NDArray[np.bool_] | None = self._read_optional("mask")
        """True where a detector pixel is good (N, N); None when all are."""
        self._columns: dict[str, zarr.Array] = {}
        self._tables: dict[str, GroupTable] = {}
        self._scan: Scan | None = None
        self._lock = threading.Lock()

    @property
    def data_hash(self) -> str:
        """Data hash recorded in the store."""
        return str(self.attributes["data_hash"])

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

    def growth(self) -> tuple[str, int]:
        """State ("growing" or "complete") and number of segments by now."""
        attributes: dict[str, Any] = dict(self._opened_again().attrs)
        return attributes["state"], _n_segments(attributes)

    def had_hash(self, data_hash: str) -> bool:
        """True for the data hash of the scan or its first segments."""
        # Segments appended since a run was planned do not move the patterns that it reads.
        return data_hash in (self.data_hash, *(one.get("data_hash") for one in self.attributes.get("segments", ())))

    def check(self) -> None:
        """Raise `PtychodaskError` unless positions, mask and probe match the data hash."""
        digest = hashlib.sha256(str(self.attributes["diffraction_hash"]).encode())
        # Block by block: planning keeps no array whose size follows the scan, and neither does this.
        for start in range(0, self.n_patterns, TABLE_ROWS):
            rows = np.arange(start, min(start + TABLE_ROWS, self.n_patterns))
            digest.update(self.position_yx_px(rows).tobytes())
        _add_optics(digest, self.mask, self.probe)
        self._check_hash(digest.hexdigest())

    @property
    def scan(self) -> Scan:
        """The complete scan, checked; patterns and labels stay on disk."""
        # Threads share the handle, and without the lock each would read all positions.
        with self._lock:
            if self._scan is None:
                self._scan = self._read_scan()
            return self._scan

    def _read_scan(self) -> Scan:
        attributes = self.attributes
        truth = None
        if "truth" in self._root:
            corner: Any = self._root["truth"].attrs.get("corner_yx_px", [0.0, 0.0])
            with damage_errors(self.label, f"the corner of 'truth' is {corner!r}", INGEST_AGAIN):
                truth = Truth(self._read("truth"), (float(corner[0]), float(corner[1])))
        return replace(
            self._scan_of(self._diffraction, self._checked_positions(), self._read_optional("flux")),
            probe_initial=self._read_optional("probe_initial"),
            position_measured_yx_px=self._measured_positions(),
            scan_index=self._read_optional("scan_index"),
            source_index=self._read_optional("source_index"),
            truth=truth,
            label=StoredPatterns(self._array("label"), self.label) if "label" in self._root else None,
            pixel_size_m=attributes.get("pixel_size_m"),
            energy_ev=attributes.get("energy_ev"),
            distance_m=attributes.get("distance_m"),
            attributes=attributes,
        )

    def _scan_of(
        self, diffraction: PatternSource, position_yx_px: NDArray[np.float64], flux: NDArray[np.float32] | None
    ) -> Scan:
        return Scan(
            diffraction=diffraction,
            position_yx_px=position_yx_px,
            probe=self.probe,
            domain=self.attributes["domain"],
            normalization=float(self.attributes["normalization"]),
            calibration=self.attributes["calibration"],
            mask=self.mask,
            flux=flux,
            data_hash=self.data_hash,
            store=self.label,
        )

    def first(self) -> Scan:
        """Scan of the first pattern, with all attributes, for binding a model."""
        part = self.part(np.arange(1))
        return replace(part, attributes=self.attributes, pixel_size_m=self.attributes.get("pixel_size_m"))

    def part(self, index: NDArray[np.integer[Any]], *, gaps: bool = True) -> Scan:
        """Scan of some patterns only, read into memory.

        Parameters
        ----------
        index : int64 array (k,)
            Patterns, ascending.
        gaps : bool
            True if stored chunks between them may be read as well, which is faster; False if some cannot be read.
        """
        return self._scan_of(
            self._diffraction.read(index, SLICE_GAP if gaps else 1),
            self.position_yx_px(index),
            self._column("flux", index) if "flux" in self._root else None,
        )

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

    def position_yx_px(self, index: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Positions (y, x) of patterns by ascending indices, float64 (k, 2)."""
        return np.stack([self._column(name, index) for name in ("y_px", "x_px")], axis=1)

    def _column(self, name: str, index: NDArray[np.integer[Any]]) -> NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = self._array(name)
        return _read_rows(self._columns[name], self.label, index)

    def _checked_positions(self) -> NDArray[np.float64]:
        """Positions of all patterns; raises if the data hash differs."""
        position_yx_px = np.stack([self._read("y_px"), self._read("x_px")], axis=1)
        self._check_hash(data_hash(self.attributes["diffraction_hash"], position_yx_px, self.mask, self.probe))
        return position_yx_px

    def _measured_positions(self) -> NDArray[np.float64] | None:
        if "y_measured_px" not in self._root:
            return None
        return np.stack([self._read("y_measured_px"), self._read("x_measured_px")], axis=1)

    def _check_hash(self, digest: str) -> None:
        if CHANGING in self.attributes:
            # The flux, which the hash leaves out, may be of either state.
            raise PtychodaskError(
                f"{self.label}: a change of its positions was stopped; complete it with the result that was applied: "
                f"ptychodask set {self.label} --positions RESULT"
            )
        if digest != self.data_hash:
            raise PtychodaskError(
                f"{self.label}: positions, mask or probe have changed since they were written (hash differs); "
                f"{INGEST_AGAIN}"
            )

    def experiments(self, drop: Sequence[int] = ()) -> list[int]:
        """Numbers of the experiments of the patterns that are not dropped.

        Raises `PtychodaskError` if a pattern to drop does not exist, or all are dropped.
        """
        check_drop(self.label, self.n_patterns, drop)
        scan_index = self._read_optional("scan_index")
        if scan_index is not None and len(drop):
            scan_index = np.delete(scan_index, np.asarray(drop, np.int64))
        return experiments_of(scan_index)

    def chosen(self, experiment: int | None, drop: Sequence[int] = ()) -> NDArray[np.int64]:
        """Indices of the patterns of one experiment, without dropped ones.

        They are ascending; `experiment` None takes all.
        """
        index = np.delete(np.arange(self.n_patterns), np.asarray(drop, np.int64))
        scan_index = None if experiment is None else self._read_optional("scan_index")
        return index if scan_index is None else index[scan_index[index] == experiment]

    def source_rows(self, index: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Rows of some patterns in the source file; None if unknown.

        `index` is ascending.
        """
        return self._column("source_index", index) if "source_index" in self._root else None

    def groups_kept(
        self, member: NDArray[np.int32], drop: Sequence[int], experiment: int | None = None
    ) -> NDArray[np.bool_]:
        """True for each group of one experiment that contains no dropped pattern.

        Parameters
        ----------
        member : int32 array (group, channel)
        drop : ints
        experiment : int, optional
            By default all.
        """
        kept = groups_kept(member, drop)
        if experiment is None or "scan_index" not in self._root:
            return kept
        patterns, inverse = np.unique(member, return_inverse=True)
        is_chosen = self._column("scan_index", patterns.astype(np.int64)) == experiment
        return kept & is_chosen[inverse.reshape(member.shape)].all(axis=1)

    def table_names(self) -> list[str]:
        """Sorted names of the group tables stored at opening."""
        tables = self._root.get("groups")
        return sorted(tables.group_keys()) if isinstance(tables, zarr.Group) else []

    def table(self, name: str) -> GroupTable | None:
        """Stored group table, read lazily; None if there was none at opening.

        Raises `PtychodaskError` if the name is not valid, or the table has no readable spec or does not fit the scan.
        """
        if name in self._tables:
            return self._tables[name]
        table = self._open_table(self._root, name)
        return None if table is None else self.add_table(table)

    def add_table(self, table: GroupTable) -> GroupTable:
        """Add a table stored after opening, without segments unknown here."""
        # A writer may have appended a segment before the table was read: this handle has none of its patterns.
        self._tables[table.name] = table.in_segments(_n_segments(self.attributes))
        return self._tables[table.name]

    def _open_table(self, root: zarr.Group, name: str) -> GroupTable | None:
        if not name or "/" in name or name.startswith("."):
            raise PtychodaskError(
                f"{self.label}: {name!r} is not a valid name of a group table; use letters, digits, '-' and '_'"
            )
        table = root.get(f"groups/{name}")
        if not isinstance(table, zarr.Group) or table.attrs.get("state") != "complete":
            return None
        segment_groups: Any = table.attrs.get("segment_groups")
        try:
            spec = GroupingSpec(**dict(table.attrs["spec"]))  # type: ignore[arg-type]
            segments = None if segment_groups is None else tuple(int(n_groups) for n_groups in segment_groups)
        except (TypeError, KeyError, ValueError) as error:
            raise PtychodaskError(
                f"{self.label}: group table '{name}' has no readable spec ({error}); pass another name="
            ) from error
        # Patterns of the same root: a table in metadata read later may cover more segments than this handle.
        n_patterns = int(_array(root, "diffraction", self.label).shape[0])
        return GroupTable(self.label, name, spec, _array(table, "member", self.label), n_patterns, segments)

    def member(self, name: str, start: int, stop: int) -> NDArray[np.int32]:
        """Rows `start` to `stop` of a group table, int32 (group, channel).

        A table made after opening is read too.
        """
        with self._lock:
            table = self.table(name)
            if table is None:
                # A worker keeps a store open between runs, and the table may have been made since. Only the table is
                # taken from the metadata read again: the other arrays must keep the lengths that this handle knows.
                added = self._open_table(self._opened_again(), name)
                if added is None:
                    raise PtychodaskError(f"{self.label}: group table '{name}' is missing; plan again")
                table = self.add_table(added)
        return table.rows(start, stop)

    def same_table(self, spec: GroupingSpec, name: str) -> GroupTable | None:
        """Stored group table of a name; raises if its spec is another."""
        stored = self.table(name)
        if stored is not None and not stored.spec.draws_as(spec):
            raise PtychodaskError(
                f"{self.label}: group table '{name}' was made by {stored.spec}, not by {spec}; pass another name="
            )
        return stored

    def stored_or_drawn(self, spec: GroupingSpec) -> GroupTable:
        """Group table of a spec, stored or drawn with the same rows.

        The store is only read: a table that it lacks takes 4 bytes per member in memory.
        """
        stored = self.same_table(spec, spec.name)
        if stored is not None:
            return stored
        tables = self.draw(spec)
        segments = [len(part) for part in tables]
        return GroupTable(self.label, spec.name, spec, np.concatenate(tables), self.n_patterns, segments)

    def draw(self, spec: GroupingSpec) -> list[NDArray[np.int32]]:
        """Groups of the scan, int32 (group, channel) for each segment."""
        segments = self.attributes.get("segments")
        sizes = (self.n_patterns,) if segments is None else tuple(segment["n_patterns"] for segment in segments)
        if min(sizes, default=0) < 1 or sum(sizes) != self.n_patterns:
            raise PtychodaskError(
                f"{self.label}: segments of {sizes} patterns in a scan of {self.n_patterns}; {INGEST_AGAIN}"
            )
        first = [0, *accumulate(sizes)]
        # Not those of `scan`, which would stay in memory as long as this handle.
        position_yx_px, scan_index = self._checked_positions(), self._read_optional("scan_index")
        # Drawn segment by segment, so that the table of a growing scan is the same as if it had been there before.
        return [
            segment_groups(self.label, position_yx_px, scan_index, spec, start, stop) for start, stop in pairwise(first)
        ]

    def _opened_again(self) -> zarr.Group:
        return open_root(parse_location(self.path), SCAN)

    def _array(self, name: str) -> zarr.Array:
        return _array(self._root, name, self.label)

    def _read_optional(self, name: str) -> Any:
        return self._read(name) if name in self._root else None

    def _read(self, name: str) -> NDArray[Any]:
        """Content of an array; raises if its shape does not fit."""
        # Missing chunks are read as zeros, so a false shape would give positions or weights that look measured.
        array = self._array(name)
        of_patterns = (array.metadata.dimension_names or ("",))[0] == "pattern"  # type: ignore[union-attr]
        if array.nchunks > TABLE_CHUNKS or (of_patterns and array.shape[0] != self.n_patterns):
            raise PtychodaskError(
                f"{self.label}: array '{name}' has shape {array.shape} in {array.nchunks} chunks, for "
                f"{self.n_patterns} patterns; {INGEST_AGAIN}"
            )
        return _read_rows(array, self.label, ...)


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
    return StoredScan(store).scan


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


def _n_segments(attributes: Mapping[str, Any]) -> int:
    """Number of segments; one for a scan that never grew."""
    return len(attributes.get("segments", (None,)))


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
    # Checked here, so that neither drawing groups nor following a scan meets a segment without its size.
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
