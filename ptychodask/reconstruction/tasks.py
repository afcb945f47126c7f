"""What a worker does: a chunk of groups becomes sums over its box, the sums become a tile."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distributed
import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster import Broadcast
from ptychodask.grouping import groups_kept
from ptychodask.patches import StoredPatches
from ptychodask.places import Location
from ptychodask.plan import Chunk, Tile
from ptychodask.polishing import seen_part
from ptychodask.prediction import PatchBatch, PredictionJob, Skipped, open_reader, predict_groups, stage
from ptychodask.reassembly import (
    Box,
    Canvas,
    Window,
    add_patches,
    checksum,
    crop_middle,
    empty_canvas,
    finish,
    make_window,
    merge,
    open_canvas,
    save_canvas,
)
from ptychodask.reconstruction.live import CoarsePart, coarse_part
from ptychodask.result import VARIABLES, Layers, TileArrays, read_tile, write_tile
from ptychodask.store import DAMAGE

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

    @property
    def n_canvases(self) -> int:
        """Canvases that the sums of a chunk fill: one for each method, or for each of its halves."""
        return (2 if self.layers.split_half else 1) * len(self.methods)


@dataclass(frozen=True)
class ChunkReport:
    """What is told of a chunk beside its sums."""

    seconds: dict[str, float]
    """Wall time of the stages."""

    skipped: tuple[Skipped, ...] = ()
    """Patterns that were left out."""

    checksums: tuple[int, ...] = ()
    """Of its canvases (see `checksum`)."""

    worker: str = ""
    """Address of the worker that predicted it."""


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """What predicting one chunk gives: sums over its box for each method, or for each of its halves."""

    canvases: tuple[Canvas, ...] | tuple[Location, ...]
    """In memory, or files of them; none where the whole chunk was left out."""

    corner: tuple[int, int]
    """Coordinates (y, x) of their first pixel."""

    report: ChunkReport

    def canvas(self, number: int) -> Canvas:
        """One of the canvases."""
        if not self.canvases:
            return empty_canvas(self.corner, (0, 0))
        found = self.canvases[number]
        return found if isinstance(found, Canvas) else open_canvas(found, self.corner)


@dataclass(frozen=True, eq=False)
class TileReport:
    """What reassembling one tile gives to the client."""

    arrays: TileArrays | None
    """The tile; None once it is written."""

    seconds: dict[str, float]
    """Wall time of its stages."""

    chunks: list[ChunkReport]
    """What its chunks told, in their order."""

    checksum: int = 0
    """Of the arrays (see `tile_checksum`)."""

    coarse: CoarsePart | None = None
    """The object for a live picture, where one is shown."""


@dataclass(frozen=True)
class Verification:
    """How a chunk that was computed twice compares."""

    same_bits: bool

    largest_difference: float
    """Of the objects that the sums make, relative to the median of their modulus; infinite where other pixels are
    seen."""

    workers: tuple[str, str]
    """Addresses of those that computed it, first and again."""


def predict_chunk(
    job: StitchingJob | Broadcast, chunk: Chunk, folder: Location | None = None, tolerant: bool = False
) -> ChunkSums:
    """Predict one chunk and sum its patches over its own box, batch by batch.

    Parameters
    ----------
    job : StitchingJob, or Parcel of one
    chunk : Chunk
    folder : Place, optional
        Where the sums are kept; by default in memory.
    tolerant : bool
        Leave out patterns that cannot be used, and groups whose patches are not finite, where they would be an error.

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
    probe = open_reader(job.methods[0].prediction).probe
    windows = [make_window(method.window, method.crop, probe) for method in job.methods]
    for number, batch in _patches_of(job, chunk, seconds, skipped):
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
    with stage(seconds, "splat"):
        checksums = tuple(map(checksum, canvases))
    report = ChunkReport(seconds, tuple(skipped or ()), checksums, own_address())
    if folder is None:
        return ChunkSums(tuple(canvases), chunk.box.corner, report)
    paths = sums_files(folder, chunk, len(canvases))
    with stage(seconds, "keep"):
        for canvas, path in zip(canvases, paths, strict=True):
            save_canvas(canvas, path)
    return ChunkSums(paths, chunk.box.corner, report)


def sums_files(folder: Location, chunk: Chunk, n_canvases: int) -> tuple[Location, ...]:
    """Files that the sums of a chunk are kept in."""
    return tuple(folder / f"{chunk.start}-{number}.npy" for number in range(n_canvases))


def own_address() -> str:
    """Address of the Dask worker that runs this task; "here" outside of any."""
    try:
        return str(distributed.get_worker().address)
    except ValueError:
        return "here"


def prepare_device(job: StitchingJob) -> None:
    """Take the GPU that was given to this process; raises `PtychodaskError` where one is wanted and there is none.

    A worker that advertises ``GPU`` is wanted to have one, and so is each process when the job says so.
    """
    try:
        advertised = "GPU" in distributed.get_worker().state.total_resources
    except ValueError:
        advertised = False
    for method in job.methods:
        method.prediction.model.prepare_device(wanted=advertised or method.prediction.device == "gpu")


def verify_chunk(job: StitchingJob | Broadcast, chunk: Chunk, sums: ChunkSums) -> Verification:
    """Predict a chunk once more and compare its sums with those that were made before.

    Parameters
    ----------
    job : StitchingJob, or Parcel of one
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
    objects = [finish(canvas)[0].astype(np.complex128) for canvas in (first, second)]
    seen = np.asarray(first.count) > 0
    scale = float(np.median(np.abs(objects[0][seen]))) or 1.0
    return float(np.abs(objects[0][seen] - objects[1][seen]).max()) / scale


def sums_are_intact(folder: Location, chunk: Chunk, checksums: Sequence[int]) -> bool:
    """Whether the kept sums of a chunk are those that were noted of it.

    Parameters
    ----------
    folder : Place
    chunk : Chunk
    checksums : sequence of int
        Of each canvas.
    """
    try:
        found = [checksum(open_canvas(path, chunk.box.corner)) for path in sums_files(folder, chunk, len(checksums))]
    except (OSError, ValueError, IndexError):
        return False
    return found == list(checksums)


def tile_is_intact(out: Location, tile: Tile, start_yx: tuple[int, int], expected: int) -> bool:
    """Whether a tile of a result store is the one whose checksum was noted.

    Parameters
    ----------
    out : Place
    tile : Tile
    start_yx : (int, int)
        Row and column of its first pixel in the whole object.
    expected : int
    """
    try:
        return tile_checksum(read_tile(out, start_yx, tile.box.shape)) == expected
    except DAMAGE:
        return False


def tile_checksum(arrays: TileArrays) -> int:
    """CRC-32 of the arrays of a tile, in the order of their names."""
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).data.cast("B"), found)
    return found


def coarse_stored_tile(out: Location, tile: Tile, start_yx: tuple[int, int], coarse_step: int) -> CoarsePart:
    """A tile that was written before, for the live picture.

    Parameters
    ----------
    out, tile, start_yx, coarse_step
        See `deliver_tile`.
    """
    return coarse_part(read_tile(out, start_yx, tile.box.shape)["object"], start_yx, coarse_step)


def stored_tile(out: Location, tile: Tile, start_yx: tuple[int, int]) -> TileReport:
    """A tile that was written before, as `deliver_tile` would send it.

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
    out : Place or None
        Result store to write into; None sends the tile.
    start_yx : (int, int)
        Row and column of the tile's first pixel in the whole object.
    coarse_step : int
        Pixels across a cell of the live picture; 0 where there is none.

    Returns
    -------
    TileReport
    """
    seconds: dict[str, float] = {}
    with stage(seconds, "merge"):
        arrays = reassemble_tile(layers, tile, parts)
        found = tile_checksum(arrays)
    if out is not None:
        with stage(seconds, "write"):
            write_tile(out, start_yx, arrays)
    coarse = coarse_part(arrays["object"], start_yx, coarse_step) if coarse_step else None
    return TileReport(arrays if out is None else None, seconds, [part.report for part in parts], found, coarse)


def show_tile(
    layers: Layers, tile: Tile, parts: Sequence[ChunkSums], start_yx: tuple[int, int], coarse_step: int
) -> TileReport:
    """Reassemble one tile for the live picture alone.

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


def deliver_polished(
    tile: Tile,
    box: Box,
    stitched: TileReport,
    polished: NDArray[np.complex64],
    out: Location | None,
    start_yx: tuple[int, int],
    coarse_step: int = 0,
) -> TileReport:
    """Put the polished object into a stitched tile, unseen pixels left NaN, and write it or send it to the client.

    Parameters
    ----------
    tile, out, start_yx, coarse_step
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
    coarse = coarse_part(arrays["object"], start_yx, coarse_step) if coarse_step else None
    return replace(stitched, arrays=arrays if out is None else None, coarse=coarse)
