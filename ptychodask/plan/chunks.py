"""Chunks of groups and tiles of the object, sized to fit memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import named_outliers, outlying_positions
from ptychodask.plan.spec import MIB, NOWHERE, ReconstructionSpec
from ptychodask.reassembly import CANVAS_PIXEL_BYTES, Box
from ptychodask.store import GroupTable, StoredScan

BLOCK_GROUPS = 2**15
"""Groups processed together, unless one chunk has more."""


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
    stored: StoredScan,
    table: GroupTable,
    *,
    size: int,
    output: Literal["member", "group"],
    crop: int,
    drop: Sequence[int] = (),
    experiment: int | None = None,
    position_yx_px: NDArray[np.float64] | None = None,
    region: Box | None = None,
) -> Survey:
    """Survey a group table, block by block.

    Parameters
    ----------
    stored : StoredScan
    table : GroupTable
    size : int
        Most groups in a chunk; no chunk has groups of two segments.
    output : {"member", "group"}
        A patch for each member, or one for the group.
    crop : int
        Elements across the central part of a patch that is used, M.
    drop : ints
        Patterns whose groups are left out.
    experiment : int, optional
        Experiment whose groups are predicted; by default all.
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
    used = np.zeros(stored.n_patterns, bool)
    edges = chunk_edges(table.segments, size)
    parts: list[list[NDArray[np.int64]]] = []
    digest = hashlib.sha256()
    for member, starts in _blocks(table, edges):
        digest.update(np.ascontiguousarray(member).data)
        kept = stored.groups_kept(member, drop, experiment)
        chunk = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(member)))
        position = _positions(stored, member, position_yx_px)
        first, last = _reach(position if output == "member" else position.mean(axis=1, keepdims=True), crop, kept)
        low, high = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        pairs = np.unique(chunk[kept, None] * stored.n_patterns + member[kept])
        pattern_chunk, pattern = np.divmod(pairs, stored.n_patterns)
        parts.append(
            [
                low,
                high,
                np.bincount(chunk[kept], minlength=len(starts)),
                np.bincount(pattern_chunk, minlength=len(starts)),
                _decompressed(stored, pattern_chunk, pattern, len(starts)),
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
    stored: StoredScan, member: NDArray[np.int32], position_yx_px: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    if position_yx_px is not None:
        return position_yx_px[member]
    wanted, inverse = np.unique(member, return_inverse=True)
    return stored.position_yx_px(wanted.astype(np.int64))[inverse.reshape(member.shape)]


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
    stored: StoredScan, chunk: NDArray[np.int64], pattern: NDArray[np.int64], n_chunks: int
) -> NDArray[np.int64]:
    """Patterns in the stored chunks read by each chunk of groups."""
    per_stored = stored.stored_chunk_patterns
    n_stored = -(-stored.n_patterns // per_stored)
    # A chunk of groups decompresses a stored chunk once, however many of its patterns it reads.
    read_by, in_chunk = np.divmod(np.unique(chunk * n_stored + pattern // per_stored), n_stored)
    sizes = np.minimum(per_stored, stored.n_patterns - in_chunk * per_stored)
    return np.bincount(read_by, weights=sizes, minlength=n_chunks).astype(np.int64)


BATCH_PIXELS = 2**20
"""Approximate pixels of network input in one automatic batch."""


BATCH_GROUPS = 256
"""Groups in an automatic batch, at most."""


CHUNK_PIXELS = 2**24
"""Pixels of network input in one automatic chunk, at most."""


CHUNKS_AT_LEAST = 16
"""Automatic chunks of a scan, at least, if it has a batch of groups for each of them."""


TILES_ACROSS = 16
"""Approximate number of automatic tiles across the object; a tile has `TILE_PIXELS` to four times as many pixels."""


TILE_PIXELS = 256
"""Pixels across an automatic tile, at least."""


# Not derived from the variables: plans record it, and a stopped run is resumed only with an equal plan.
RESULT_PIXEL_BYTES = 20
"""Bytes of one pixel of a result: object, weight, uncertainty and count."""


class RegionNotReachedError(PtychodaskError):
    """No pattern reaches the region of interest.

    In a growing scan, a later one may.
    """


@dataclass(frozen=True)
class Chunk:
    """Consecutive groups predicted by one task."""

    start: int
    """First row of the group table."""

    stop: int
    """Row after the last one."""

    box: Box
    """Part of the object that their patches reach."""


@dataclass(frozen=True)
class Tile:
    """Part of the object reassembled by one task."""

    box: Box
    """Its pixels."""

    chunks: tuple[int, ...]
    """Indices of the chunks that reach it, ascending: the order in which they are merged."""


class _Network(NamedTuple):
    members: int
    n_pixels: int
    output: Literal["member", "group"]


def _object_box(whole: Box, roi: tuple[int, int, int, int] | None, label: str) -> Box:
    """Part of the region of interest that patches reach."""
    if roi is None:
        return whole
    box = whole.overlap(Box(*(int(value) for value in roi)))
    if box.n_pixels == 0:
        raise RegionNotReachedError(f"{label}: roi {roi} does not overlap the object, {tuple(whole)} (y0, y1, x0, x1)")
    return box


def _batch_size(spec: ReconstructionSpec, network: _Network, n_groups: int) -> int:
    if spec.batch_size is not None:
        return int(spec.batch_size)
    fitting = BATCH_PIXELS // (network.n_pixels**2 * network.members)
    # The compiled call pads its last batch: a batch above the chunk or the scan would mostly compute padding.
    return int(min(max(1, fitting), BATCH_GROUPS, n_groups, spec.groups_per_chunk or n_groups))


def _groups_per_chunk(network: _Network, batch_size: int, n_groups: int) -> int:
    # Large chunks read each pattern less often; enough of them keep several workers busy and lose little if one fails.
    most_groups = CHUNK_PIXELS // (network.n_pixels**2 * network.members)
    wanted = min(most_groups, -(-n_groups // CHUNKS_AT_LEAST))
    # Complete batches, since the last batch of each chunk is padded.
    return max(1, -(-wanted // batch_size)) * batch_size


def _tile(box: Box) -> int:
    """Pixels across an automatic tile, a multiple of the stored chunks."""
    # A tile is one shard of the result. Two tasks that write into one shard would lose each other's data, and a resumed
    # run could not replace one tile without the other.
    wanted = 2 ** int(np.ceil(np.log2(max(box.shape) / TILES_ACROSS)))
    return min(max(wanted, TILE_PIXELS), 4 * TILE_PIXELS)


def _fitting_chunks(
    stored: StoredScan,
    table: GroupTable,
    network: _Network,
    crop: int,
    batch_size: int,
    spec: ReconstructionSpec,
    box: Box | None,
) -> tuple[Survey, tuple[Chunk, ...], int, Box]:
    """Survey, chunks, memory of the largest task, and pixels of the object.

    Automatic chunks are halved until their tasks fit into the memory.
    """
    size = int(spec.groups_per_chunk or _groups_per_chunk(network, batch_size, table.segments[0]))
    while True:
        # The survey depends on the size of chunks, so it is repeated for each; a pass takes about a second for 10^6
        # groups.
        surveyed = survey(
            stored,
            table,
            size=size,
            output=network.output,
            crop=crop,
            drop=tuple(spec.drop),
            experiment=spec.experiment,
            position_yx_px=spec.position_yx_px,
            region=None if spec.roi is None else Box(*(int(value) for value in spec.roi)),
        )
        if not surveyed.n_groups.any():
            raise PtychodaskError(
                f"{stored.label}: each of the {len(table)} groups of '{table.name}' contains one of the "
                f"{len(spec.drop)} patterns to drop; drop fewer"
            )
        object_box = _object_box(surveyed.whole, spec.roi, stored.label) if box is None else box
        chunks, n_bytes = _chunks(stored, surveyed, network, object_box, batch_size, spec)
        if not chunks:
            raise RegionNotReachedError(f"{stored.label}: no pattern reaches roi {spec.roi}; pass another region")
        if max(n_bytes) <= spec.memory_bytes:
            return surveyed, chunks, max(n_bytes), object_box
        # A size that was passed is refused, not changed: with another one the object differs in its last bits, and the
        # run would not repeat an earlier one.
        if spec.groups_per_chunk is not None or size == 1:
            break
        size //= 2
    chunk = chunks[int(np.argmax(n_bytes))]
    n_groups = chunk.stop - chunk.start
    smaller = f"groups_per_chunk= below {n_groups}, a smaller batch_size=" if n_groups > 1 else "a smaller batch_size="
    need = (
        f"groups {chunk.start}..{chunk.stop - 1}, over {chunk.box.shape[0]:,} x {chunk.box.shape[1]:,} px, need "
        f"{max(n_bytes) / MIB:,.1f} MiB, a task may use {spec.memory_bytes / MIB:,.1f} MiB"
    )
    # A single position far from all others makes the box of its groups, and the object, as large as its distance.
    if outliers := outliers_of(stored, spec):
        raise PtychodaskError(f"plan: {outliers}; with it {need}")
    raise PtychodaskError(f"plan: {need}; pass {smaller}, or a larger memory_bytes=")


def outliers_of(stored: StoredScan, spec: ReconstructionSpec) -> str:
    """Used patterns with positions far from all others, in words; or empty.

    Parameters
    ----------
    stored : StoredScan
    spec : ReconstructionSpec
        Its patterns to drop, experiment and corrected positions count.
    """
    index = stored.chosen(spec.experiment, tuple(spec.drop))
    position = stored.position_yx_px(index) if spec.position_yx_px is None else spec.position_yx_px[index]
    outliers = outlying_positions(position)
    if not len(outliers):
        return ""
    return named_outliers(position[outliers], index[outliers], stored.source_rows(index[outliers]))


def _chunks(
    stored: StoredScan,
    surveyed: Survey,
    network: _Network,
    box: Box,
    batch_size: int,
    spec: ReconstructionSpec,
) -> tuple[tuple[Chunk, ...], list[int]]:
    """Chunks that overlap the object, and bytes of each prediction task."""
    # Two copies of the network input (float32) and two of the patches (complex64).
    batch_bytes = batch_size * network.members * network.n_pixels**2 * (2 * 4 + 2 * 8)
    pattern_bytes = network.n_pixels**2 * (stored.pattern_itemsize + 4)
    canvas_bytes = CANVAS_PIXEL_BYTES * (2 if spec.split_half else 1)
    chunks, n_bytes = [], []
    for index in np.flatnonzero(surveyed.n_groups).tolist():
        reached = surveyed.box(index).overlap(box)
        if reached.n_pixels:
            chunks.append(Chunk(int(surveyed.edges[index]), int(surveyed.edges[index + 1]), reached))
            pattern_sum = int(surveyed.n_patterns[index]) * pattern_bytes
            n_bytes.append(pattern_sum + batch_bytes + reached.n_pixels * canvas_bytes)
    return tuple(chunks), n_bytes


def _tiles(box: Box, tile: int, chunks: tuple[Chunk, ...]) -> tuple[Tile, ...]:
    """Tiles of the object, row by row, with their chunks."""
    n_rows, n_columns = (-(-side // tile) for side in box.shape)
    # Ascending chunks in each tile fix the order in which sums are merged, and with it the last bits of the object.
    overlapping: list[list[int]] = [[] for _ in range(n_rows * n_columns)]
    for index, chunk in enumerate(chunks):
        for row in range((chunk.box.y0 - box.y0) // tile, (chunk.box.y1 - 1 - box.y0) // tile + 1):
            for column in range((chunk.box.x0 - box.x0) // tile, (chunk.box.x1 - 1 - box.x0) // tile + 1):
                overlapping[row * n_columns + column].append(index)
    tiles = []
    for number, indices in enumerate(overlapping):
        y, x = box.y0 + number // n_columns * tile, box.x0 + number % n_columns * tile
        tiles.append(Tile(Box(y, y + tile, x, x + tile).overlap(box), tuple(indices)))
    return tuple(tiles)


def _reassemble_bytes(tile: Tile, chunks: tuple[Chunk, ...]) -> int:
    # At worst the canvases of all its chunks are in memory at once, with the sums and the finished arrays of the tile.
    canvases = sum(chunks[index].box.n_pixels for index in tile.chunks)
    return canvases * CANVAS_PIXEL_BYTES + tile.box.n_pixels * (CANVAS_PIXEL_BYTES + RESULT_PIXEL_BYTES)
