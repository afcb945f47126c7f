"""What a worker does: a chunk of groups becomes sums over its box, the sums become a tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster import Parcel
from ptychodask.grouping import groups_kept
from ptychodask.patches import StoredPatches
from ptychodask.plan import Chunk, Tile
from ptychodask.polishing import seen_part
from ptychodask.prediction import PatchBatch, PredictionJob, open_reader, predict_groups, stage
from ptychodask.reassembly import (
    Box,
    Canvas,
    Window,
    add_patches,
    crop_middle,
    empty_canvas,
    finish,
    make_window,
    merge,
    open_canvas,
    save_canvas,
)
from ptychodask.result import VARIABLES, Layers, TileArrays, write_tile

CACHED_GROUPS = 64
"""Groups whose cached patches are in memory at once."""


@dataclass(frozen=True, eq=False)
class MethodJob:
    """How the patches of one model are made and stitched."""

    prediction: PredictionJob

    window: Window
    """Weights of a patch."""

    crop: int
    """Elements across the middle of a patch that are used, M."""


@dataclass(frozen=True, eq=False)
class StitchingJob:
    """All that a task needs to know beside its chunk or tile."""

    methods: tuple[MethodJob, ...]
    """One for each model, all of one store."""

    layers: Layers
    """What the result has."""

    patches: str | None = None
    """Cache of patches of the only model, or None."""

    fill: bool = False
    """The cache is being filled; else it is read in place of the network."""

    position_yx_px: NDArray[np.float64] | None = None
    """Where cached patches are stitched, float64 (pattern, 2), in place of the stored positions."""


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """What predicting one chunk gives: sums over its box for each method, or for each of its halves."""

    canvases: tuple[Canvas, ...] | tuple[Path, ...]
    """In memory, or files of them."""

    corner: tuple[int, int]
    """Coordinates (y, x) of their first pixel."""

    seconds: dict[str, float]
    """Wall time of the stages."""

    def canvas(self, number: int) -> Canvas:
        """One of the canvases."""
        found = self.canvases[number]
        return open_canvas(found, self.corner) if isinstance(found, Path) else found


@dataclass(frozen=True, eq=False)
class TileReport:
    """What reassembling one tile gives to the client."""

    arrays: TileArrays | None
    """The tile; None once it is written."""

    seconds: dict[str, float]
    """Wall time of its stages."""

    chunk_seconds: list[dict[str, float]]
    """Wall time of the stages of each of its chunks."""


def predict_chunk(job: StitchingJob | Parcel, chunk: Chunk, folder: Path | None = None) -> ChunkSums:
    """Predict one chunk and sum its patches over its own box, batch by batch.

    Parameters
    ----------
    job : StitchingJob, or Parcel of one
    chunk : Chunk
    folder : Path, optional
        Where the sums are kept; by default in memory.

    Returns
    -------
    ChunkSums
    """
    job = job.open() if isinstance(job, Parcel) else job
    seconds: dict[str, float] = {}
    per_method = 2 if job.layers.split_half else 1
    canvases = [empty_canvas(chunk.box.corner, chunk.box.shape) for _ in range(per_method * len(job.methods))]
    probe = open_reader(job.methods[0].prediction).probe
    windows = [make_window(method.window, method.crop, probe) for method in job.methods]
    for number, batch in _patches_of(job, chunk, seconds):
        crop = job.methods[number].crop
        with stage(seconds, "splat"):
            for half in range(per_method):
                mine = slice(None) if per_method == 1 else batch.pattern % 2 == half
                add_patches(
                    canvases[number * per_method + half],
                    crop_middle(batch.patches[mine], crop),
                    batch.position_yx_px[mine] - crop / 2,
                    windows[number],
                )
    if folder is None:
        return ChunkSums(tuple(canvases), chunk.box.corner, seconds)
    with stage(seconds, "keep"):
        paths = tuple(folder / f"{chunk.start}-{number}.npy" for number in range(len(canvases)))
        for canvas, path in zip(canvases, paths, strict=True):
            save_canvas(canvas, path)
    return ChunkSums(paths, chunk.box.corner, seconds)


def _patches_of(job: StitchingJob, chunk: Chunk, seconds: dict[str, float]) -> Iterator[tuple[int, PatchBatch]]:
    """Patches of a chunk: predicted, or read from the cache."""
    if job.patches is not None and not job.fill:
        yield from _cached_patches(job, chunk, seconds)
        return
    row = chunk.start
    cache = None if job.patches is None else StoredPatches(Path(job.patches))
    for number, batch in predict_groups(
        [method.prediction for method in job.methods], chunk.start, chunk.stop, seconds
    ):
        if cache is not None:
            with stage(seconds, "cache"):
                row = cache.write(row, batch.patches)
        yield number, batch


def _cached_patches(job: StitchingJob, chunk: Chunk, seconds: dict[str, float]) -> Iterator[tuple[int, PatchBatch]]:
    prediction, cache = job.methods[0].prediction, StoredPatches(Path(str(job.patches)))
    reader = open_reader(prediction)
    for start in range(chunk.start, chunk.stop, CACHED_GROUPS):
        with stage(seconds, "read"):
            member = reader.member(prediction.groups, start, min(start + CACHED_GROUPS, chunk.stop))
            kept = groups_kept(member, prediction.drop)
            patches = cache.read(start, start + len(member))
            if not kept.all():
                patches, member = patches[kept], member[kept]
            if job.position_yx_px is not None:
                position = job.position_yx_px[member]
            else:
                wanted, place = np.unique(member, return_inverse=True)
                position = reader.position_yx_px(wanted.astype(np.int64))[place.reshape(member.shape)]
        if patches.ndim == 4:
            yield 0, PatchBatch(patches.reshape(-1, *patches.shape[-2:]), position.reshape(-1, 2), member.reshape(-1))
        else:
            yield 0, PatchBatch(patches, position.mean(axis=1), member[:, 0])


def reassemble_tile(layers: Layers, tile: Tile, parts: Sequence[ChunkSums]) -> TileArrays:
    """One tile of the object from the sums that touch it.

    Parameters
    ----------
    layers : Layers
    tile : Tile
    parts : sequence of ChunkSums
        In the order of ``tile.chunks``.

    Returns
    -------
    dict of name to array (..., y, x)
    """
    methods = [_reassemble_method(layers, tile, parts, number) for number in range(max(1, len(layers.methods)))]
    if not layers.methods:
        return methods[0]
    return {name: np.stack([arrays[name] for arrays in methods]) for name in layers.variables}


def _reassemble_method(layers: Layers, tile: Tile, parts: Sequence[ChunkSums], number: int) -> TileArrays:
    def merged(place: int) -> Canvas:
        return merge(empty_canvas(tile.box.corner, tile.box.shape), *(part.canvas(place) for part in parts))

    if not layers.split_half:
        return _finished(merged(number))
    halves = [merged(2 * number), merged(2 * number + 1)]
    finished = [_finished(half) for half in halves]
    return _finished(merge(*halves)) | {
        f"{name}_half": np.stack([arrays[name] for arrays in finished]) for name in ("object", "weight")
    }


def _finished(canvas: Canvas) -> TileArrays:
    return dict(zip(VARIABLES, finish(canvas), strict=True))


def deliver_tile(
    layers: Layers, tile: Tile, parts: Sequence[ChunkSums], out: Path | None, start_yx: tuple[int, int]
) -> TileReport:
    """Reassemble one tile and write it, or send it to the client.

    Parameters
    ----------
    layers : Layers
    tile : Tile
    parts : sequence of ChunkSums
    out : Path or None
        Result store to write into; None sends the tile.
    start_yx : (int, int)
        Row and column of the tile's first pixel in the whole object.

    Returns
    -------
    TileReport
    """
    seconds: dict[str, float] = {}
    with stage(seconds, "merge"):
        arrays = reassemble_tile(layers, tile, parts)
    if out is not None:
        with stage(seconds, "write"):
            write_tile(out, start_yx, arrays)
    return TileReport(arrays if out is None else None, seconds, [part.seconds for part in parts])


def deliver_polished(
    tile: Tile,
    box: Box,
    stitched: TileReport,
    polished: NDArray[np.complex64],
    out: Path | None,
    start_yx: tuple[int, int],
) -> TileReport:
    """Put the polished object into a stitched tile, unseen pixels left NaN, and write it or send it to the client.

    Parameters
    ----------
    tile, out, start_yx
        See `deliver_tile`.
    box : Box
        What `polished` holds.
    stitched : TileReport
    polished : complex64 array (y, x)

    Returns
    -------
    TileReport
    """
    assert stitched.arrays is not None
    arrays: dict[str, Any] = stitched.arrays | {"object": seen_part(tile.box, box, stitched.arrays["object"], polished)}
    if out is not None:
        write_tile(out, start_yx, arrays)
    return replace(stitched, arrays=arrays if out is None else None)
