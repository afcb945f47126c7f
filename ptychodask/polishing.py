"""Polishing: what a sweep of all patterns calls for, part by part of the patterns and tile by tile of the object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import curve_order
from ptychodask.iterative import (
    Misfit,
    StepProducts,
    footprint_corners,
    illumination_and_proximal_weight,
    negative_gradient,
    patterns_without,
    step_products,
    take_step,
)
from ptychodask.plan import Plan
from ptychodask.prediction import PredictionJob, open_source
from ptychodask.reassembly import Box
from ptychodask.scan import Scan


@dataclass(frozen=True, eq=False)
class PolishPart:
    """Patterns near each other whose shares of a sweep one task sums."""

    index: NDArray[np.int64]
    """Which patterns."""

    box: Box
    """Where their frames lie."""

    tiles: tuple[int, ...]
    """Indices of the tiles that hold the object there."""

    tile_boxes: tuple[Box, ...]
    """What each of them holds."""


@dataclass(frozen=True, eq=False)
class PartChange:
    """What one part of the patterns calls for."""

    change: NDArray[np.complex128]
    """Change (y, x) over the part's box, as `negative_gradient` gives it."""

    box: Box
    misfit: Misfit


@dataclass(frozen=True, eq=False)
class TileWeights:
    """What is fixed of a tile while it is polished; arrays (y, x)."""

    start: NDArray[np.complex64]
    """The stitched object, its unseen pixels at the mean amplitude."""

    curvature: NDArray[np.float32]
    """Light plus hold (see `illumination_and_proximal_weight`)."""

    proximal_weight: NDArray[np.float32]
    """How firmly a dim pixel is held where it was."""


@dataclass(frozen=True)
class SweepReport:
    """Sums over one tile that a sweep goes on from."""

    products: StepProducts

    held: float
    """Σ hold |object − start|²."""

    misfit: dict[int, Misfit]
    """Misfit of each part that touches the tile."""


@dataclass(frozen=True, eq=False)
class TileChange:
    """What patterns and hold call for in one tile."""

    change: NDArray[np.complex64]
    report: SweepReport


def plan_polishing(scan: Scan, plan: Plan, drop: tuple[int, ...]) -> tuple[tuple[Box, ...], tuple[PolishPart, ...]]:
    """What each tile holds while it is polished, and the parts of the patterns.

    Parameters
    ----------
    scan : Scan
    todo : Plan
        Of the whole object.
    drop : ints
        Patterns that are left out.

    Returns
    -------
    boxes : tuple of Box
        Each tile, and beyond the object's edges as far as any frame reaches.
    parts : tuple of PolishPart
        As many patterns along the curve as a chunk has groups.
    """
    index = patterns_without(scan, drop)
    index = index[curve_order(scan.position_yx_px[index])]
    corner = footprint_corners(scan.position_yx_px[index], scan.n_pixels)
    around = _box_around(corner, scan.n_pixels)
    boxes = tuple(_stretched(tile.box, plan.box, around) for tile in plan.tiles)
    parts = []
    for first in range(0, len(index), plan.groups_per_chunk):
        mine = slice(first, first + plan.groups_per_chunk)
        box = _box_around(corner[mine], scan.n_pixels)
        tiles = tuple(place for place, held in enumerate(boxes) if held.overlap(box).n_pixels)
        parts.append(PolishPart(index[mine], box, tiles, tuple(boxes[place] for place in tiles)))
    return boxes, tuple(parts)


def prepare_tile(
    job: PredictionJob, tile: Box, box: Box, stitched: NDArray[np.complex64], *, mean: float
) -> TileWeights:
    """What is fixed of one tile while it is polished.

    Parameters
    ----------
    job : PredictionJob
        Names the store.
    tile, box : Box
        The tile, and what it holds while it is polished.
    stitched : complex64 array (y, x)
        The stitched object over the tile, NaN where unseen.
    mean : float
        Amplitude that unseen pixels start with.

    Returns
    -------
    TileWeights
    """
    scan = open_source(job)
    kept = patterns_without(scan, job.drop)
    light, proximal_weight = illumination_and_proximal_weight(
        scan.probe, scan.position_yx_px[kept], box.corner, box.shape
    )
    start = np.full(box.shape, mean, np.complex64)
    seen = np.isfinite(stitched)
    start[_within(tile, box)][seen] = stitched[seen]
    return TileWeights(start, light + proximal_weight, proximal_weight)


def change_part(job: PredictionJob, part: PolishPart, objects: list[NDArray[np.complex64]]) -> PartChange:
    """What the patterns of one part call for.

    Parameters
    ----------
    job : PredictionJob
        Names the store.
    part : PolishPart
    objects : list of complex64 arrays (y, x)
        Object over each of ``part.tiles``.

    Returns
    -------
    PartChange
    """
    scan = open_source(job)
    whole = np.empty(part.box.shape, np.complex64)
    for box, object_ in zip(part.tile_boxes, objects, strict=True):
        shared = part.box.overlap(box)
        whole[_within(shared, part.box)] = object_[_within(shared, box)]
    change, misfit = negative_gradient(whole, part.box.corner, scan, part.index)
    return PartChange(change, part.box, misfit)


def change_tile(
    box: Box,
    held: TileWeights,
    object_: NDArray[np.complex64],
    before: NDArray[np.complex64],
    earlier: TileChange | None,
    given: list[PartChange],
    parts: tuple[int, ...],
) -> TileChange:
    """What all patterns and the hold call for in one tile.

    Parameters
    ----------
    box : Box
        What the tile holds.
    held : TileWeights
    object_, before : complex64 array (y, x)
        Now, and before the latest step.
    earlier : TileChange or None
        What was called for before the latest step; None in the first sweep.
    given : list of PartChange
        What the parts that touch the tile call for, in their order.
    parts : ints
        Their indices.

    Returns
    -------
    TileChange
    """
    off = held.start - object_
    total = (held.proximal_weight * off).astype(np.complex128)
    for part in given:
        shared = box.overlap(part.box)
        total[_within(shared, box)] += part.change[_within(shared, part.box)]
    change = total.astype(np.complex64)
    products = StepProducts()
    if earlier is not None:
        products = step_products(object_, before, change, earlier.change, held.curvature)
    missed = float((held.proximal_weight * (off.real**2 + off.imag**2)).sum(dtype=np.float64))
    misfit = {index: part.misfit for index, part in zip(parts, given, strict=True)}
    return TileChange(change, SweepReport(products, missed, misfit))


def step_tile(
    held: TileWeights,
    object_: NDArray[np.complex64],
    before: NDArray[np.complex64],
    change: TileChange,
    earlier: TileChange | None,
    *,
    mix: tuple[float, float, float],
) -> NDArray[np.complex64]:
    """One tile of the object after a step.

    Parameters
    ----------
    held, object_, before, change, earlier
        See `change_tile`.
    mix : (float, float, float)
        Factors of the step, from `StepProducts.mix`.

    Returns
    -------
    complex64 array (y, x)
    """
    last = change if earlier is None else earlier
    return take_step(object_, before, change.change, last.change, held.curvature, mix)


def amplitude_sum(stitched: NDArray[np.complex64]) -> tuple[float, int]:
    """Sum of the amplitude over the seen pixels of a tile (y, x), and their number."""
    amplitude = np.abs(stitched[np.isfinite(stitched)])
    return float(amplitude.sum(dtype=np.float64)), amplitude.size


def seen_part(
    tile: Box, box: Box, stitched: NDArray[np.complex64], polished: NDArray[np.complex64]
) -> NDArray[np.complex64]:
    """The polished object over one tile, NaN where the stitched one is.

    Parameters
    ----------
    tile, box : Box
        The tile, and what `polished` holds.
    stitched, polished : complex64 array (y, x)

    Returns
    -------
    complex64 array (y, x)
    """
    return np.where(np.isfinite(stitched), polished[_within(tile, box)], stitched)


def misfit_in_all(reports: list[SweepReport]) -> Misfit:
    """Misfit of all patterns; that of a part is told by each of its tiles and counts once."""
    parts: dict[int, Misfit] = {}
    for report in reports:
        parts |= report.misfit
    return sum((parts[index] for index in sorted(parts)), Misfit())


def _box_around(corner: NDArray[np.int64], n_pixels: int) -> Box:
    """The box around frames of N x N pixels."""
    (y0, x0), (y1, x1) = corner.min(axis=0).tolist(), (corner.max(axis=0) + n_pixels).tolist()
    return Box(y0, y1, x0, x1)


def _stretched(tile: Box, whole: Box, around: Box) -> Box:
    """A tile, from the edges of the whole on moved out to those of the box around it."""
    return Box(
        min(tile.y0, around.y0) if tile.y0 == whole.y0 else tile.y0,
        max(tile.y1, around.y1) if tile.y1 == whole.y1 else tile.y1,
        min(tile.x0, around.x0) if tile.x0 == whole.x0 else tile.x0,
        max(tile.x1, around.x1) if tile.x1 == whole.x1 else tile.x1,
    )


def _within(part: Box, whole: Box) -> tuple[slice, slice]:
    """Where a box lies in an array over another that holds it."""
    return slice(part.y0 - whole.y0, part.y1 - whole.y0), slice(part.x0 - whole.x0, part.x1 - whole.x0)
