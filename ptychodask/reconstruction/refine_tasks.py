"""Tasks of refinement: sums over some patterns, and steps of single tiles.

Arrays of tiles are in the memory of the workers, or in files that all workers reach (`Kept`): then no worker holds more
of the object than its task needs, and a lost worker loses nothing.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.plan.chunks import Tile
from ptychodask.prediction import PredictionJob, open_stored, part_of
from ptychodask.reassembly import Box
from ptychodask.reconstruction.live import coarse_part
from ptychodask.reconstruction.tasks import TileReport
from ptychodask.refinement.judges import Judgement, judge
from ptychodask.refinement.polishing import (
    Misfit,
    StepProducts,
    illumination_and_proximal_weight,
    negative_gradient,
    step_products,
    take_step,
    within,
)
from ptychodask.refinement.positions import PositionSums, position_sums, stretched
from ptychodask.refinement.slow_phase import (
    NodeGrid,
    NormalEquations,
    apply_phase,
    judged,
    normal_equations,
    phase_on,
)
from ptychodask.result import read_tile, write_tile
from ptychodask.scan import Scan
from ptychodask.storage.location import Location

Kept: TypeAlias = "NDArray[Any] | Location"
"""Array of a tile or part: itself, or the file that holds it."""


RECENT_BYTES = 64 << 20
"""Bytes of patterns that a process keeps from sweep to sweep."""

CHECKSUM_BYTES = 4
"""Bytes of the CRC-32 at the end of a file of `keep`."""


def keep(array: NDArray[Any], path: Location | None) -> Kept:
    """Array, or the file that it was written to.

    Parameters
    ----------
    array : array
    path : Location, optional
        Becomes an NPY array with a CRC-32 at its end, atomically.
    """
    if path is None:
        return array
    content = io.BytesIO()
    # Rows first whatever the order in memory, which arithmetic may leave to be columns first.
    np.save(content, np.ascontiguousarray(array), allow_pickle=False)
    content.write(zlib.crc32(content.getbuffer()).to_bytes(CHECKSUM_BYTES, "big"))
    path.write_bytes(content.getbuffer())
    return path


def opened(kept: Kept) -> NDArray[Any]:
    """Array that `keep` returned or wrote.

    Raises
    ------
    PtychodaskError
        If its file is damaged.
    """
    if isinstance(kept, np.ndarray):
        return kept
    content = memoryview(kept.read_buffer())
    body = content[:-CHECKSUM_BYTES]
    if zlib.crc32(body) != int.from_bytes(content[-CHECKSUM_BYTES:], "big"):
        raise PtychodaskError(
            f"{kept}: is damaged: its checksum is wrong; remove it and continue with resume=True (--resume), which "
            "refines again"
        )
    stream = io.BytesIO(body[:1024])
    version = np.lib.format.read_magic(stream)
    assert version == (1, 0)
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
    assert not columns_first
    return np.frombuffer(body, dtype, offset=stream.tell()).reshape(shape)


def is_whole(path: Location) -> bool:
    """True if a file that `keep` wrote is there and undamaged."""
    try:
        opened(path)
    except (PtychodaskError, OSError):
        return False
    return True


@dataclass(frozen=True)
class ObjectLayer:
    """One of the objects of a result."""

    label: str
    """Name for messages, and its key in the attribute ``refinement``; empty for the only object."""

    variable: str
    """Variable of the result, ``object`` or ``object_half``."""

    index: tuple[int, ...]
    """Index of the object in the variable: method and half, if there are any."""

    half: int | None
    """Remainder by 2 of the patterns that made it; None for all."""

    is_flat: bool = False
    """True if no network predicted it, so that its patches have no uncertainty."""

    is_learnt: bool = True
    """True if a trained network predicted it, near which few photons are no reason to leave."""


@dataclass(frozen=True, eq=False)
class MovedPatterns:
    """Refined positions and flux of some patterns."""

    index: NDArray[np.int64]
    """Patterns, ascending (k,)."""

    position_yx_px: NDArray[np.float64]
    """Positions (k, 2)."""

    flux: NDArray[np.float32]
    """Relative flux (k,)."""

    def of(self, index: NDArray[np.int64]) -> MovedPatterns:
        """Those of some of its patterns, ascending."""
        rows = np.searchsorted(self.index, index)
        return MovedPatterns(index, self.position_yx_px[rows], self.flux[rows])


@dataclass(frozen=True, eq=False)
class PatternPart:
    """Neighbouring patterns of one task."""

    index: NDArray[np.int64]
    """Patterns whose sums the task makes, ascending (k,)."""

    judges: NDArray[np.int64]
    """Patterns of the same part of the curve that judge, ascending."""

    read: NDArray[np.int64]
    """Patterns that the task reads, ascending: these and the judges at least."""

    moved: MovedPatterns | None
    """Refined positions and flux of all that are read; None for the stored ones."""

    box: Box
    """Pixels that the frames of its patterns and judges reach."""

    tiles: tuple[int, ...]
    """Tiles that overlap the box."""

    tile_boxes: tuple[Box, ...]
    """Box of each of these tiles."""


class PartChange(NamedTuple):
    """Negative gradient and misfit of one part of the patterns."""

    change: Kept
    """Negative gradient, complex128 (y, x), over the part's box."""

    box: Box

    misfit: Misfit
    """Of the patterns that make the sums."""

    judgement: Judgement
    """Of the judges, with the object before the step."""


class TileChange(NamedTuple):
    """Negative gradient over one tile, and the sums that its step needs."""

    change: Kept
    """Negative gradient with the proximal term, complex64 (y, x)."""

    products: StepProducts

    proximal: float
    """Proximal term Σ proximal weight |object − start|²."""

    parts: dict[int, tuple[Misfit, Judgement]]
    """Misfit and judgement of each part that reaches the tile."""


class AmplitudeSums(NamedTuple):
    """Sums over the seen pixels of a tile."""

    n_pixels: int
    amplitude: float
    """Σ|O|."""

    square: float
    """Σ|O|²."""

    value: complex
    """ΣO."""


class SlowStep(NamedTuple):
    """A slow phase that was solved for."""

    nodes: NodeGrid
    coefficients: NDArray[np.float64]
    """Phase at each node (y, x), radians."""


def stitched_layer(
    stitched: TileReport | Location,
    tile: Tile,
    box: Box,
    start_yx: tuple[int, int],
    layer: ObjectLayer,
    path: Location | None,
) -> Kept:
    """Stitched object of a layer over the box of a tile.

    Parameters
    ----------
    stitched : TileReport or Location
        The stitched tile, or the store that holds it.
    tile, start_yx
        See `deliver_tile`.
    box : Box
        Holds the tile; beyond the tile the object is NaN.
    layer : ObjectLayer
    path : Location, optional
        File of the object.
    """
    arrays = stitched.arrays if isinstance(stitched, TileReport) else read_tile(stitched, start_yx, tile.box.shape)
    assert arrays is not None
    object_ = np.full(box.shape, np.complex64(complex(np.nan, np.nan)))
    object_[within(tile.box, box)] = arrays[layer.variable][layer.index]
    return keep(object_, path)


def amplitude_sums(object_: Kept) -> AmplitudeSums:
    """Sums over the pixels of a tile that were seen."""
    array = opened(object_)
    seen = array[np.isfinite(array)].astype(np.complex128)
    amplitude = np.abs(seen)
    return AmplitudeSums(seen.size, float(amplitude.sum()), float((amplitude**2).sum()), complex(seen.sum()))


def fill_tile(object_: Kept, mean: float, path: Location | None) -> Kept:
    """Object over one tile, with the amplitude `mean` where unseen."""
    array = opened(object_)
    return keep(np.where(np.isfinite(array), array, np.complex64(mean)), path)


def weigh_tile(
    job: PredictionJob,
    position_yx_px: NDArray[np.float64],
    box: Box,
    held: tuple[float, float],
    path: Location | None,
) -> Kept:
    """Weights of one tile while it is polished.

    Parameters
    ----------
    job : PredictionJob
        Names the store.
    position_yx_px : float64 array (k, 2)
        Of the patterns whose frames may reach the tile.
    box : Box
        Extent of the tile while it is refined.
    held : (float, float)
        `prior` and `dim` of `illumination_and_proximal_weight`.
    path : Location, optional
        File of the weights.

    Returns
    -------
    float32 array (2, y, x), or its file
        Illumination and proximal weight.
    """
    prior, dim = held
    probe = open_stored(job).probe
    weights = illumination_and_proximal_weight(probe, position_yx_px, box.corner, box.shape, prior=prior, dim=dim)
    return keep(np.stack(weights), path)


def change_part(job: PredictionJob, part: PatternPart, objects: list[Kept], path: Location | None = None) -> PartChange:
    """Negative gradient of the patterns of one part, judged.

    Parameters
    ----------
    job : PredictionJob
        Names the store.
    part : PatternPart
    objects : list of complex64 arrays (y, x), or their files
        Object over each of ``part.tiles``.
    path : Location, optional
        File of the gradient.
    """
    piece, scan = _joined(part, objects), _read(job, part)
    judgement = _judgement(part, scan, piece)
    change, misfit = negative_gradient(piece, part.box.corner, scan, np.searchsorted(part.read, part.index))
    return PartChange(keep(change, path), part.box, misfit, judgement)


def judge_part(job: PredictionJob, part: PatternPart, objects: list[Kept]) -> Judgement:
    """Judgement of the judges of one part (see `change_part`)."""
    return _judgement(part, _read(job, part), _joined(part, objects))


def change_tile(
    box: Box,
    anchor: Kept,
    weights: Kept,
    object_: Kept,
    before: Kept | None,
    earlier: TileChange | None,
    changes: list[PartChange],
    numbers: tuple[int, ...],
    path: Location | None = None,
) -> TileChange:
    """Negative gradient over one tile, with the proximal term.

    Parameters
    ----------
    box : Box
        Extent of the tile while it is polished.
    anchor : complex64 array (y, x), or its file
        Object that the proximal term pulls to.
    weights : float32 array (2, y, x), or its file
        Illumination and proximal weight.
    object_ : complex64 array (y, x), or its file
    before, earlier
        Object and change before the latest step; None in the first sweep.
    changes : list of PartChange
        Of the parts that reach the tile, in the order of `numbers`, their indices.
    path : Location, optional
        File of the change.
    """
    now, (illumination, proximal_weight) = opened(object_), opened(weights)
    deviation = opened(anchor) - now
    total = (proximal_weight * deviation).astype(np.complex128)
    for part in changes:
        shared = box.overlap(part.box)
        total[within(shared, box)] += opened(part.change)[within(shared, part.box)]
    change = total.astype(np.complex64)
    products = StepProducts()
    if before is not None and earlier is not None:
        products = step_products(now, opened(before), change, opened(earlier.change), illumination + proximal_weight)
    proximal = float((proximal_weight * (deviation.real**2 + deviation.imag**2)).sum(dtype=np.float64))
    parts = {number: (part.misfit, part.judgement) for number, part in zip(numbers, changes, strict=True)}
    return TileChange(keep(change, path), products, proximal, parts)


def step_tile(
    weights: Kept,
    object_: Kept,
    before: Kept | None,
    change: TileChange,
    earlier: TileChange | None,
    mix: tuple[float, float, float],
    path: Location | None = None,
) -> Kept:
    """Object over one tile after a step.

    Parameters
    ----------
    weights, object_, before, change, earlier
        See `change_tile`.
    mix : (float, float, float)
        Factors of the step, from `StepProducts.mix`.
    path : Location, optional
        File of the object.
    """
    now, new = opened(object_), opened(change.change)
    last = new if earlier is None else opened(earlier.change)
    curvature = opened(weights).sum(axis=0)
    return keep(take_step(now, now if before is None else opened(before), new, last, curvature, mix), path)


def equations_of_part(job: PredictionJob, nodes: NodeGrid, part: PatternPart, objects: list[Kept]) -> NormalEquations:
    """Equations of the slow phase of one part (see `change_part`)."""
    scan, rows = _read(job, part), np.searchsorted(part.read, part.index)
    (block,) = normal_equations(_joined(part, objects), part.box.corner, scan, nodes, rows).blocks
    return NormalEquations((replace(block, order=int(part.index[0])),))


def judge_step(
    job: PredictionJob, step: SlowStep, part: PatternPart, objects: list[Kept]
) -> tuple[Judgement, Judgement]:
    """Judgement of one part, before and after a slow step."""
    rows = np.searchsorted(part.read, part.judges)
    return judged(_joined(part, objects), part.box, _read(job, part), *step, rows)


def sums_of_positions(job: PredictionJob, part: PatternPart, objects: list[Kept]) -> PositionSums:
    """Sums for the positions of all patterns of one part (see `change_part`).

    The positions of judges are fitted to the object as well, which they do not change.
    """
    index = np.sort(np.concatenate([part.index, part.judges]))
    taking_part = ~np.isin(index, part.judges)
    rows = np.searchsorted(part.read, index)
    return position_sums(_joined(part, objects), part.box.corner, _read(job, part), rows, taking_part)


def stretch_tile(
    box: Box,
    source: Box,
    tile_boxes: Sequence[Box],
    objects: list[Kept],
    affine: NDArray[np.float64],
    centre_yx_px: NDArray[np.float64],
    path: Location | None,
) -> Kept:
    """Object over one tile after a stretching (see `stretched`).

    Parameters
    ----------
    box, source : Box
        Extent of the tile, and of the pixels that it is taken from, within the object.
    tile_boxes : sequence of Box
        Extents of the tiles that overlap the source.
    objects : list of complex64 arrays (y, x), or their files
        Object over each of them.
    affine, centre_yx_px
        See `stretched`.
    path : Location, optional
        File of the object.
    """
    piece = np.zeros(source.shape, np.complex64)
    for tile_box, object_ in zip(tile_boxes, objects, strict=True):
        shared = source.overlap(tile_box)
        piece[within(shared, source)] = opened(object_)[within(shared, tile_box)]
    return keep(stretched(piece, source, box, affine, centre_yx_px), path)


def turn_tile(step: SlowStep, box: Box, object_: Kept, path: Location | None = None) -> Kept:
    """Object over one tile times exp(i slow phase)."""
    return keep(apply_phase(opened(object_), phase_on(box, *step)), path)


def deliver_refined(
    tile: Tile,
    layers: Sequence[ObjectLayer],
    boxes: Sequence[Box],
    objects: list[Kept],
    stitched: TileReport | Location,
    out: Location | None,
    start_yx: tuple[int, int],
    coarse_step: int = 0,
) -> TileReport:
    """Replace the objects of a tile by refined ones, and deliver it.

    It is written, or sent to the client; unseen pixels stay NaN.

    Parameters
    ----------
    tile, out, start_yx, coarse_step
        See `deliver_tile`.
    layers : sequence of ObjectLayer
        That were refined.
    boxes : sequence of Box
        Extent of each of `objects`.
    objects : list of complex64 arrays (y, x), or their files
        Refined object of each layer.
    stitched : TileReport or Location
        The stitched tile, or the store that holds it.

    Returns
    -------
    TileReport
    """
    if not isinstance(stitched, TileReport):
        stitched = TileReport(read_tile(stitched, start_yx, tile.box.shape), {}, [])
    assert stitched.arrays is not None
    arrays: dict[str, Any] = dict(stitched.arrays)
    for layer, box, object_ in zip(layers, boxes, objects, strict=True):
        # Copied, for in-process futures share their memory with the task.
        variable = arrays[layer.variable] = arrays[layer.variable].copy()
        plane = variable[layer.index]
        seen = np.isfinite(plane)
        plane[seen] = opened(object_)[within(tile.box, box)][seen]
        variable[layer.index] = plane
        if layer.is_flat and layer.half is None:
            uncertainty = arrays["uncertainty"] = arrays["uncertainty"].copy()
            uncertainty[layer.index] = np.nan
    if out is not None:
        write_tile(out, start_yx, arrays)
    coarse = coarse_part(arrays["object"], start_yx, coarse_step) if coarse_step else None
    return replace(stitched, arrays=arrays if out is None else None, coarse=coarse)


class _RecentParts:
    """Parts of a scan that stay in memory for the next sweep.

    They are the first that fit: sweeps take the parts in one order, so that the latest ones would be dropped before
    they are needed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data_hash, self._n_bytes = "", 0
        self._parts: dict[bytes, Scan] = {}

    def read(self, job: PredictionJob, index: NDArray[np.int64]) -> Scan:
        """Part of the scan with some patterns, ascending."""
        stored, key = open_stored(job), index.tobytes()
        with self._lock:
            if stored.data_hash != self._data_hash:
                self._data_hash, self._n_bytes, self._parts = stored.data_hash, 0, {}
            if key in self._parts:
                return self._parts[key]
        part = part_of(stored, index)
        n_bytes = part.n_patterns * part.n_pixels**2 * stored.pattern_itemsize
        with self._lock:
            fits = self._n_bytes + n_bytes <= RECENT_BYTES
            if fits and stored.data_hash == self._data_hash and key not in self._parts:
                self._parts[key] = part
                self._n_bytes += n_bytes
        return part


_RECENT = _RecentParts()


def _read(job: PredictionJob, part: PatternPart) -> Scan:
    """Scan of the patterns that a part reads."""
    scan = _RECENT.read(job, part.read)
    if part.moved is None:
        return scan
    return replace(scan, position_yx_px=part.moved.position_yx_px, flux=part.moved.flux)


def _judgement(part: PatternPart, scan: Scan, piece: NDArray[np.complex64]) -> Judgement:
    return judge(piece, part.box.corner, scan, np.searchsorted(part.read, part.judges))


def _joined(part: PatternPart, objects: list[Kept]) -> NDArray[np.complex64]:
    """Object over the box of a part, 0 outside its tiles."""
    joined = np.zeros(part.box.shape, np.complex64)
    for box, object_ in zip(part.tile_boxes, objects, strict=True):
        shared = part.box.overlap(box)
        joined[within(shared, part.box)] = opened(object_)[within(shared, box)]
    return joined
