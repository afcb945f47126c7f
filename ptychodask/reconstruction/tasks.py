"""Tasks of workers: predict a chunk into sums, reassemble sums into tiles."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster.broadcast import Broadcast
from ptychodask.cluster.executor import worker_address, worker_advertises_gpu
from ptychodask.plan.chunks import Chunk, Tile
from ptychodask.prediction import PatchBatch, PredictionJob, Skipped, open_stored, predict_groups, stage
from ptychodask.reassembly import (
    Canvas,
    Window,
    add_patches,
    crop_middle,
    empty_canvas,
    finish,
    make_window,
    merge,
)
from ptychodask.reconstruction.live import CoarsePart, coarse_part
from ptychodask.reconstruction.patch_cache import StoredPatches
from ptychodask.reconstruction.sums import checksum, open_canvas, save_canvas, sums_files
from ptychodask.result import Layers, TileArrays, read_tile, write_tile
from ptychodask.storage.location import Location
from ptychodask.storage.zarr_checks import DAMAGE

CACHED_GROUPS = 64
"""Groups whose cached patches are in memory at once."""


@dataclass(frozen=True, eq=False)
class MethodJob:
    """Prediction and stitching of one model's patches."""

    prediction: PredictionJob

    window: Window
    """Weights of the pixels of a patch."""

    crop: int
    """Pixels across the middle of a patch that are used, M."""


@dataclass(frozen=True, eq=False)
class StitchingJob:
    """Inputs that all tasks of a run share."""

    methods: tuple[MethodJob, ...]
    """One for each model, all of one store."""

    layers: Layers
    """Arrays of the result."""

    patches: str | None = None
    """Path of the cache of patches, or None; with one model only."""

    fill: bool = False
    """The cache is being filled; otherwise its patches are read, and nothing is predicted."""

    position_yx_px: NDArray[np.float64] | None = None
    """Positions to stitch cached patches at, float64 (pattern, 2); None for the stored positions."""

    @property
    def n_canvases(self) -> int:
        """Canvases of a chunk: one per method, or per half of it."""
        return (2 if self.layers.split_half else 1) * len(self.methods)


@dataclass(frozen=True)
class ChunkReport:
    """Report of a chunk's prediction."""

    seconds: dict[str, float]
    """Wall time of the stages."""

    skipped: tuple[Skipped, ...] = ()
    """Patterns that were left out."""

    checksums: tuple[int, ...] = ()
    """Checksum of each canvas (see `checksum`)."""

    worker: str = ""
    """Address of the worker that predicted it."""


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """Sums of one chunk over its box.

    One canvas for each method, or for each half of it.
    """

    canvases: tuple[Canvas, ...] | tuple[Location, ...]
    """In memory, or their files; empty if the complete chunk was left out."""

    corner: tuple[int, int]
    """Coordinates (y, x) of the first pixel of the canvases."""

    report: ChunkReport

    def canvas(self, number: int) -> Canvas:
        """One of the canvases."""
        if not self.canvases:
            return empty_canvas(self.corner, (0, 0))
        canvas = self.canvases[number]
        return canvas if isinstance(canvas, Canvas) else open_canvas(canvas, self.corner)


@dataclass(frozen=True, eq=False)
class TileReport:
    """Result of reassembling one tile, as sent to the client."""

    arrays: TileArrays | None
    """Arrays of the tile; None if it was written."""

    seconds: dict[str, float]
    """Wall time of its stages."""

    chunks: list[ChunkReport]
    """Reports of its chunks, in their order."""

    checksum: int = 0
    """Checksum of the arrays (see `tile_checksum`)."""

    coarse: CoarsePart | None = None
    """The object for the live picture, if one is shown."""


@dataclass(frozen=True)
class Verification:
    """Comparison of a chunk that was computed twice."""

    same_bits: bool

    largest_difference: float
    """Largest difference of the two objects, relative to the median of their modulus; infinite if they cover other
    pixels."""

    workers: tuple[str, str]
    """Addresses of the workers that computed it, first and again."""


def predict_chunk(
    job: StitchingJob | Broadcast, chunk: Chunk, folder: Location | None = None, tolerant: bool = False
) -> ChunkSums:
    """Predict one chunk, and sum its patches batch by batch.

    Parameters
    ----------
    job : StitchingJob, or Broadcast of one
    chunk : Chunk
    folder : Location, optional
        Folder to write the sums into; by default they stay in memory.
    tolerant : bool
        Leave out unusable patterns, and groups whose patches are not finite, instead of raising an error.

    Returns
    -------
    ChunkSums
    """
    job = job.open() if isinstance(job, Broadcast) else job
    prepare_device(job)
    seconds: dict[str, float] = {}
    skipped: list[Skipped] | None = [] if tolerant else None
    per_method = 2 if job.layers.split_half else 1
    canvases = [empty_canvas(chunk.box.corner, chunk.box.shape) for _ in range(job.n_canvases)]
    probe = open_stored(job.methods[0].prediction).probe
    windows = [make_window(method.window, method.crop, probe) for method in job.methods]
    for number, batch in _patches_of(job, chunk, seconds, skipped):
        crop = job.methods[number].crop
        with stage(seconds, "splat"):
            for half in range(per_method):
                selected = slice(None) if per_method == 1 else batch.pattern % 2 == half
                add_patches(
                    canvases[number * per_method + half],
                    crop_middle(batch.patches[selected], crop),
                    batch.position_yx_px[selected] - crop / 2,
                    windows[number],
                )
    with stage(seconds, "splat"):
        checksums = tuple(map(checksum, canvases))
    report = ChunkReport(seconds, tuple(skipped or ()), checksums, worker_address())
    if folder is None:
        return ChunkSums(tuple(canvases), chunk.box.corner, report)
    paths = sums_files(folder, chunk, len(canvases))
    with stage(seconds, "keep"):
        for canvas, path in zip(canvases, paths, strict=True):
            save_canvas(canvas, path)
    return ChunkSums(paths, chunk.box.corner, report)


def prepare_device(job: StitchingJob) -> None:
    """Set up the GPU of this process.

    Raises `PtychodaskError` if there is none although the worker advertises ``GPU`` or the job asks for one.
    """
    advertised = worker_advertises_gpu()
    for method in job.methods:
        method.prediction.model.prepare_device(wanted=advertised or method.prediction.device == "gpu")


def verify_chunk(job: StitchingJob | Broadcast, chunk: Chunk, sums: ChunkSums) -> Verification:
    """Predict a chunk again and compare the sums with the first ones.

    Parameters
    ----------
    job : StitchingJob, or Broadcast of one
    chunk : Chunk
    sums : ChunkSums

    Returns
    -------
    Verification
    """
    again = predict_chunk(job, chunk, tolerant=bool(sums.report.skipped))
    same = again.report.checksums == sums.report.checksums
    worst = 0.0 if same else max(_difference(sums.canvas(n), again.canvas(n)) for n in range(len(again.canvases)))
    return Verification(same, worst, (sums.report.worker, again.report.worker))


def _difference(first: Canvas, second: Canvas) -> float:
    if not np.array_equal(first.count, second.count):
        return float("inf")
    objects = [finish(canvas).object.astype(np.complex128) for canvas in (first, second)]
    seen = np.asarray(first.count) > 0
    scale = float(np.median(np.abs(objects[0][seen]))) or 1.0
    return float(np.abs(objects[0][seen] - objects[1][seen]).max()) / scale


def tile_is_intact(out: Location, tile: Tile, start_yx: tuple[int, int], expected: int) -> bool:
    """True if a tile of a result store has its recorded checksum.

    Parameters
    ----------
    out : Location
    tile : Tile
    start_yx : (int, int)
        Row and column of its first pixel in the complete object.
    expected : int
        Recorded checksum.
    """
    try:
        return tile_checksum(read_tile(out, start_yx, tile.box.shape)) == expected
    except DAMAGE:
        return False


def tile_checksum(arrays: TileArrays) -> int:
    """CRC-32 of the arrays of a tile, in order of their names."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data.cast("B"), crc)
    return crc


def coarse_stored_tile(out: Location, tile: Tile, start_yx: tuple[int, int], coarse_step: int) -> CoarsePart:
    """A stored tile, reduced for the live picture.

    Parameters
    ----------
    out, tile, start_yx, coarse_step
        See `deliver_tile`.
    """
    return coarse_part(read_tile(out, start_yx, tile.box.shape)["object"], start_yx, coarse_step)


def stored_tile(out: Location, tile: Tile, start_yx: tuple[int, int]) -> TileReport:
    """A stored tile, as `deliver_tile` would send it.

    Parameters
    ----------
    out, tile, start_yx
        See `tile_is_intact`.
    """
    return TileReport(read_tile(out, start_yx, tile.box.shape), {}, [])


def _patches_of(
    job: StitchingJob, chunk: Chunk, seconds: dict[str, float], skipped: list[Skipped] | None
) -> Iterator[tuple[int, PatchBatch]]:
    """Patches of a chunk: predicted, or read from the cache."""
    if job.patches is not None and not job.fill:
        yield from _cached_patches(job, chunk, seconds)
        return
    row = chunk.start
    cache = None if job.patches is None else StoredPatches(Path(job.patches))
    for number, batch in predict_groups(
        [method.prediction for method in job.methods], chunk.start, chunk.stop, seconds, skipped
    ):
        if cache is not None:
            with stage(seconds, "cache"):
                row = cache.write(row, batch.patches)
        yield number, batch


def _cached_patches(job: StitchingJob, chunk: Chunk, seconds: dict[str, float]) -> Iterator[tuple[int, PatchBatch]]:
    prediction, cache = job.methods[0].prediction, StoredPatches(Path(str(job.patches)))
    reader = open_stored(prediction)
    for start in range(chunk.start, chunk.stop, CACHED_GROUPS):
        with stage(seconds, "read"):
            member = reader.member(prediction.groups, start, min(start + CACHED_GROUPS, chunk.stop))
            kept = reader.groups_kept(member, prediction.drop, prediction.experiment)
            patches = cache.read(start, start + len(member))
            if not kept.all():
                patches, member = patches[kept], member[kept]
            if job.position_yx_px is not None:
                position = job.position_yx_px[member]
            else:
                patterns, index = np.unique(member, return_inverse=True)
                position = reader.position_yx_px(patterns.astype(np.int64))[index.reshape(member.shape)]
        if patches.ndim == 4:
            yield 0, PatchBatch(patches.reshape(-1, *patches.shape[-2:]), position.reshape(-1, 2), member.reshape(-1))
        else:
            yield 0, PatchBatch(patches, position.mean(axis=1), member[:, 0])


def reassemble_tile(layers: Layers, tile: Tile, parts: Sequence[ChunkSums]) -> TileArrays:
    """Arrays of one tile, from the sums of its chunks.

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
    methods = [_reassemble_method(layers, tile, parts, number) for number in range(max(1, len(layers.networks)))]
    if not layers.networks:
        return methods[0]
    return {name: np.stack([arrays[name] for arrays in methods]) for name in layers.variables}


def _reassemble_method(layers: Layers, tile: Tile, parts: Sequence[ChunkSums], number: int) -> TileArrays:
    def merged(canvas: int) -> Canvas:
        return merge(empty_canvas(tile.box.corner, tile.box.shape), *(part.canvas(canvas) for part in parts))

    if not layers.split_half:
        return layers.arrays(merged(number))
    halves = [merged(2 * number), merged(2 * number + 1)]
    return layers.arrays(merge(*halves), halves)


def deliver_tile(
    layers: Layers,
    tile: Tile,
    parts: Sequence[ChunkSums],
    out: Location | None,
    start_yx: tuple[int, int],
    coarse_step: int = 0,
) -> TileReport:
    """Reassemble one tile and write it, or send it to the client.

    Parameters
    ----------
    layers : Layers
    tile : Tile
    parts : sequence of ChunkSums
    out : Location or None
        Result store to write into; None sends the tile.
    start_yx : (int, int)
        Row and column of the tile's first pixel in the complete object.
    coarse_step : int
        Pixels across a cell of the live picture; 0 if there is none.

    Returns
    -------
    TileReport
    """
    seconds: dict[str, float] = {}
    with stage(seconds, "merge"):
        arrays = reassemble_tile(layers, tile, parts)
        crc = tile_checksum(arrays)
    if out is not None:
        with stage(seconds, "write"):
            write_tile(out, start_yx, arrays)
    coarse = coarse_part(arrays["object"], start_yx, coarse_step) if coarse_step else None
    return TileReport(arrays if out is None else None, seconds, [part.report for part in parts], crc, coarse)


def show_tile(
    layers: Layers, tile: Tile, parts: Sequence[ChunkSums], start_yx: tuple[int, int], coarse_step: int
) -> TileReport:
    """Reassemble one tile for the live picture only.

    Parameters
    ----------
    layers, tile, parts, start_yx, coarse_step
        See `deliver_tile`.

    Returns
    -------
    TileReport
        Without arrays.
    """
    coarse = None
    if coarse_step:
        coarse = coarse_part(reassemble_tile(layers, tile, parts)["object"], start_yx, coarse_step)
    return TileReport(None, {}, [part.report for part in parts], coarse=coarse)
