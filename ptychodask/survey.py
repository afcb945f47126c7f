"""Patterns and pixels that each chunk of a group table needs.

One pass over the table in blocks, so that memory does not depend on the size of the scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import groups_kept
from ptychodask.reassembly import Box
from ptychodask.store import ScanReader
from ptychodask.store.groups import GroupTable

BLOCK_GROUPS = 2**15
"""Groups processed together, unless one chunk has more."""

NOWHERE = 2**40
"""Coordinate outside of every object, pixels."""


@dataclass(frozen=True, eq=False)
class Survey:
    """Patterns read and pixels reached by each chunk of consecutive groups.

    Arrays have one entry for each chunk of the table.
    """

    size: int
    """Groups in a chunk; the last of each segment has fewer."""

    edges: NDArray[np.int64]
    """First rows of the chunks, and the row after the last (chunk + 1,)."""

    first_yx: NDArray[np.int64]
    """First pixel (chunk, 2) that the patches of a chunk reach."""

    last_yx: NDArray[np.int64]
    """The pixel after the last (chunk, 2); before the first if all groups of the chunk are dropped."""

    n_groups: NDArray[np.int64]
    """Groups that are predicted (chunk,)."""

    n_patterns: NDArray[np.int64]
    """Different patterns that a chunk reads (chunk,)."""

    n_decompressed: NDArray[np.int64]
    """Patterns in the stored chunks that a chunk of groups reads (chunk,)."""

    table_hash: str
    """SHA-256 of the table."""

    used: NDArray[np.bool_]
    """True for each pattern (pattern,) read for a chunk that reaches the region."""

    def box(self, chunk: int) -> Box:
        """Pixels that a chunk reaches."""
        (y0, x0), (y1, x1) = self.first_yx[chunk].tolist(), self.last_yx[chunk].tolist()
        return Box(y0, y1, x0, x1)

    @property
    def whole(self) -> Box:
        """Pixels that all chunks reach together."""
        (y0, x0), (y1, x1) = self.first_yx.min(axis=0).tolist(), self.last_yx.max(axis=0).tolist()
        return Box(y0, y1, x0, x1)


def survey(
    reader: ScanReader,
    table: GroupTable,
    *,
    size: int,
    output: Literal["member", "group"],
    crop: int,
    drop: Sequence[int] = (),
    position_yx_px: NDArray[np.float64] | None = None,
    region: Box | None = None,
) -> Survey:
    """Survey a group table, block by block.

    Parameters
    ----------
    reader : ScanReader
    table : GroupTable
    size : int
        Most groups in a chunk; no chunk has groups of two segments.
    output : {"member", "group"}
        A patch for each member, or one for the group.
    crop : int
        Elements across the central part of a patch that is used, M.
    drop : ints
        Patterns whose groups are left out.
    position_yx_px : float64 array (pattern, 2), optional
        Positions at which patches are stitched; by default the stored ones.
    region : Box, optional
        Patterns count as used if their chunks reach it.

    Returns
    -------
    Survey

    Raises
    ------
    PtychodaskError
        If the table or the positions cannot be read, or a row names a pattern that the scan does not have.
    """
    used = np.zeros(reader.n_patterns, bool)
    edges = chunk_edges(table.segments, size)
    parts: list[list[NDArray[np.int64]]] = []
    digest = hashlib.sha256()
    for member, starts in _blocks(table, edges):
        digest.update(np.ascontiguousarray(member).data)
        kept = groups_kept(member, drop)
        chunk = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(member)))
        position = _positions(reader, member, position_yx_px)
        first, last = _reach(position if output == "member" else position.mean(axis=1, keepdims=True), crop, kept)
        low, high = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        pairs = np.unique(chunk[kept, None] * reader.n_patterns + member[kept])
        pattern_chunk, pattern = np.divmod(pairs, reader.n_patterns)
        parts.append(
            [
                low,
                high,
                np.bincount(chunk[kept], minlength=len(starts)),
                np.bincount(pattern_chunk, minlength=len(starts)),
                _decompressed(reader, pattern_chunk, pattern, len(starts)),
            ]
        )
        used[pattern[_reaching(low, high, region)[pattern_chunk]]] = True
    first, last, *counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Survey(size, edges, first, last, counts[0], counts[1], counts[2], digest.hexdigest(), used)


def chunk_edges(segments: Sequence[int], size: int) -> NDArray[np.int64]:
    """Edges of chunks of `size` groups, none across two segments.

    Parameters
    ----------
    segments : ints
        Groups of each segment.
    size : int

    Returns
    -------
    int64 array (chunk + 1,)
        First row of each chunk, and the row after the last.

    Examples
    --------
    >>> chunk_edges((5, 4), 2).tolist()
    [0, 2, 4, 5, 7, 9]
    """
    ends = np.cumsum(segments)
    starts = [np.arange(end - n_groups, end, size) for end, n_groups in zip(ends, segments, strict=True)]
    return np.concatenate([*starts, ends[-1:]]).astype(np.int64)


def _blocks(table: GroupTable, edges: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Blocks of complete chunks, with the first row of each chunk."""
    first = 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + BLOCK_GROUPS, side="right")) - 1)
        yield table.rows(int(edges[first]), int(edges[last])), edges[first:last] - edges[first]
        first = last


def _positions(
    reader: ScanReader, member: NDArray[np.int32], position_yx_px: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    if position_yx_px is not None:
        return position_yx_px[member]
    wanted, inverse = np.unique(member, return_inverse=True)
    return reader.position_yx_px(wanted.astype(np.int64))[inverse.reshape(member.shape)]


def _reach(
    position: NDArray[np.float64], crop: int, kept: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First pixel (group, 2) of each group, and that after the last.

    A group that is not kept reaches nothing: its first pixel is after its last.
    """
    first = np.floor(position.min(axis=1) - crop / 2).astype(np.int64)
    last = np.floor(position.max(axis=1) - crop / 2).astype(np.int64) + crop + 1
    first[~kept], last[~kept] = NOWHERE, -NOWHERE
    return first, last


def _reaching(first: NDArray[np.int64], last: NDArray[np.int64], region: Box | None) -> NDArray[np.bool_]:
    """True for each chunk with a pixel in the region, bool (chunk,)."""
    if region is None:
        return np.ones(len(first), bool)
    meets = (first < (region.y1, region.x1)) & (last > (region.y0, region.x0))
    return np.asarray(meets.all(axis=1))


def _decompressed(
    reader: ScanReader, chunk: NDArray[np.int64], pattern: NDArray[np.int64], n_chunks: int
) -> NDArray[np.int64]:
    """Patterns in the stored chunks read by each chunk of groups."""
    per_stored = reader.stored_chunk_patterns
    n_stored = -(-reader.n_patterns // per_stored)
    read_by, stored = np.divmod(np.unique(chunk * n_stored + pattern // per_stored), n_stored)
    sizes = np.minimum(per_stored, reader.n_patterns - stored * per_stored)
    return np.bincount(read_by, weights=sizes, minlength=n_chunks).astype(np.int64)
