"""Group tables of a scan: drawn, stored, opened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, Groups, group_positions
from ptychodask.scan import (
    Scan,
)
from ptychodask.storage.location import Location, LocationLike, parse_location
from ptychodask.storage.zarr_checks import consolidate, open_root
from ptychodask.store import SCAN, _array, _read_rows, open_scan, segment_sizes
from ptychodask.store.write import _write_array, changing_root, update_node

logger = logging.getLogger(__name__)


def group(store: LocationLike, spec: GroupingSpec = GroupingSpec(), *, name: str | None = None) -> Groups:
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
    folder = path.local_path
    if folder is not None and open_root(path, SCAN).attrs["state"] == "growing":
        with changing_root(folder) as root:
            groups = _write_groups(path, spec, name)
            for node in ("groups", f"groups/{name}", f"groups/{name}/member"):
                update_node(root, folder, node)
    else:
        groups = _write_groups(path, spec, name)
        consolidate(path)
    logger.info("%s: stored %d groups of %d as '%s'", path, len(groups), spec.members, name)
    return groups


def open_or_draw_groups(store: LocationLike, spec: GroupingSpec) -> GroupTable:
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
    root = zarr.open_group(path.zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)
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


def open_groups(store: LocationLike, name: str) -> GroupTable | None:
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


def read_groups(store: LocationLike, name: str) -> Groups | None:
    """Stored group table in memory; None and errors as for `open_groups`."""
    table = open_groups(store, name)
    return None if table is None else Groups(table.rows(0, len(table)), table.spec, name)


def stored_group_names(store: LocationLike) -> list[str]:
    """Sorted names of the group tables in a store."""
    root = open_root(parse_location(store), SCAN)
    tables = root.get("groups")
    return sorted(tables.group_keys()) if isinstance(tables, zarr.Group) else []
