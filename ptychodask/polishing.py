"""Polishing sweeps: negative gradients of parts of the patterns, steps of tiles.

A task per part sums the negative gradient of its patterns over the pixels that their footprints reach. A task per tile
adds the gradients of its parts and the proximal term, which keeps dim pixels near the stitched object, and takes a
quasi-Newton step (`iterative.StepProducts`) preconditioned with the illumination. The scalar products that determine
the step are summed over all tiles, so that all of them take the same one.
"""

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
    """Neighbouring patterns whose gradients one task sums."""

    index: NDArray[np.int64]
    """Indices of the patterns (k,)."""

    box: Box
    """Pixels that their footprints reach."""

    tiles: tuple[int, ...]
    """Indices of the tiles that overlap the box."""

    tile_boxes: tuple[Box, ...]
    """Box of each of these tiles while it is polished."""


@dataclass(frozen=True, eq=False)
class PartChange:
    """Negative gradient and misfit of one part of the patterns."""

    change: NDArray[np.complex128]
    """Negative gradient (y, x) over the part's box, from `negative_gradient`."""

    box: Box
    """Box of the part."""

    misfit: Misfit
    """Misfit of its patterns."""


@dataclass(frozen=True, eq=False)
class TileWeights:
    """Start and weights of a polished tile; arrays (y, x)."""

    start: NDArray[np.complex64]
    """Stitched object, with the mean amplitude in unseen pixels."""

    curvature: NDArray[np.float32]
    """Illumination plus proximal weight (see `illumination_and_proximal_weight`)."""

    proximal_weight: NDArray[np.float32]
    """Weight with which a dim pixel is pulled back to `start`."""


@dataclass(frozen=True)
class SweepReport:
    """Sums over one tile, needed for the step of a sweep."""

    products: StepProducts
    """Scalar products of the step."""

    proximal: float
    """Proximal term Σ proximal weight |object − start|²."""

    misfit: dict[int, Misfit]
    """Misfit of each part that reaches the tile."""


@dataclass(frozen=True, eq=False)
class TileChange:
    """Negative gradient of one tile, with the proximal term, and its sums."""

    change: NDArray[np.complex64]
    """Negative gradient (y, x) over the tile's box."""

    report: SweepReport
    """Sums over the tile."""


def plan_polishing(scan: Scan, plan: Plan, drop: tuple[int, ...]) -> tuple[tuple[Box, ...], tuple[PolishPart, ...]]:
    """Boxes of the polished tiles, and parts of the patterns.

    Parameters
    ----------
    scan : Scan
    plan : Plan
        Of the complete object.
    drop : ints
        Patterns that are left out.

    Returns
    -------
    boxes : tuple of Box
        One per tile; tiles at the edges of the object are extended as far as any footprint reaches.
    parts : tuple of PolishPart
        Consecutive patterns along the curve, as many as a chunk has groups.
    """
    index = patterns_without(scan, drop)
    index = index[curve_order(scan.position_yx_px[index])]
    corner = footprint_corners(scan.position_yx_px[index], scan.n_pixels)
    around = _box_around(corner, scan.n_pixels)
    boxes = tuple(_extended(tile.box, plan.box, around) for tile in plan.tiles)
    parts = []
    for first in range(0, len(index), plan.groups_per_chunk):
        rows = slice(first, first + plan.groups_per_chunk)
        box = _box_around(corner[rows], scan.n_pixels)
        tiles = tuple(number for number, tile_box in enumerate(boxes) if tile_box.overlap(box).n_pixels)
        parts.append(PolishPart(index[rows], box, tiles, tuple(boxes[number] for number in tiles)))
    return boxes, tuple(parts)


def prepare_tile(
    job: PredictionJob, tile: Box, box: Box, stitched: NDArray[np.complex64], *, mean: float
) -> TileWeights:
    """Start and weights of one tile while it is polished.

    Parameters
    ----------
    job : PredictionJob
        Names the store.
    tile, box : Box
        The tile, and its box while it is polished.
    stitched : complex64 array (y, x)
        The stitched object over the tile, NaN where unseen.
    mean : float
        Initial amplitude of unseen pixels.

    Returns
    -------
    TileWeights
    """
    scan = open_source(job)
    kept = patterns_without(scan, job.drop)
    illumination, proximal_weight = illumination_and_proximal_weight(
        scan.probe, scan.position_yx_px[kept], box.corner, box.shape
    )
    start = np.full(box.shape, mean, np.complex64)
    seen = np.isfinite(stitched)
    start[_within(tile, box)][seen] = stitched[seen]
    return TileWeights(start, illumination + proximal_weight, proximal_weight)


def change_part(job: PredictionJob, part: PolishPart, objects: list[NDArray[np.complex64]]) -> PartChange:
    """Negative gradient of the patterns of one part.

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
    joined = np.empty(part.box.shape, np.complex64)
    for box, object_ in zip(part.tile_boxes, objects, strict=True):
        shared = part.box.overlap(box)
        joined[_within(shared, part.box)] = object_[_within(shared, box)]
    change, misfit = negative_gradient(joined, part.box.corner, scan, part.index)
    return PartChange(change, part.box, misfit)


def change_tile(
    box: Box,
    weights: TileWeights,
    object_: NDArray[np.complex64],
    before: NDArray[np.complex64],
    earlier: TileChange | None,
    changes: list[PartChange],
    parts: tuple[int, ...],
) -> TileChange:
    """Negative gradient in one tile, with the proximal term.

    Parameters
    ----------
    box : Box
        Box of the tile while it is polished.
    weights : TileWeights
    object_, before : complex64 array (y, x)
        Object now, and before the latest step.
    earlier : TileChange or None
        Change before the latest step; None in the first sweep.
    changes : list of PartChange
        Of the parts that reach the tile, in the order of `parts`.
    parts : ints
        Indices of these parts.

    Returns
    -------
    TileChange
    """
    deviation = weights.start - object_
    total = (weights.proximal_weight * deviation).astype(np.complex128)
    for part in changes:
        shared = box.overlap(part.box)
        total[_within(shared, box)] += part.change[_within(shared, part.box)]
    change = total.astype(np.complex64)
    products = StepProducts()
    if earlier is not None:
        products = step_products(object_, before, change, earlier.change, weights.curvature)
    proximal = float((weights.proximal_weight * (deviation.real**2 + deviation.imag**2)).sum(dtype=np.float64))
    misfit = {index: part.misfit for index, part in zip(parts, changes, strict=True)}
    return TileChange(change, SweepReport(products, proximal, misfit))


def step_tile(
    weights: TileWeights,
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
    weights, object_, before, change, earlier
        See `change_tile`.
    mix : (float, float, float)
        Factors of the step, from `StepProducts.mix`.

    Returns
    -------
    complex64 array (y, x)
    """
    last = change if earlier is None else earlier
    return take_step(object_, before, change.change, last.change, weights.curvature, mix)


def amplitude_sum(stitched: NDArray[np.complex64]) -> tuple[float, int]:
    """Sum of the amplitude over the seen pixels, and their number."""
    amplitude = np.abs(stitched[np.isfinite(stitched)])
    return float(amplitude.sum(dtype=np.float64)), amplitude.size


def seen_part(
    tile: Box, box: Box, stitched: NDArray[np.complex64], polished: NDArray[np.complex64]
) -> NDArray[np.complex64]:
    """The polished object over one tile, NaN where the stitched one is.

    Parameters
    ----------
    tile, box : Box
        The tile, and the box of `polished`.
    stitched, polished : complex64 array (y, x)

    Returns
    -------
    complex64 array (y, x)
    """
    return np.where(np.isfinite(stitched), polished[_within(tile, box)], stitched)


def misfit_in_all(reports: list[SweepReport]) -> Misfit:
    """Misfit of all patterns.

    Each tile that a part reaches reports its misfit, which counts once.
    """
    parts: dict[int, Misfit] = {}
    for report in reports:
        parts |= report.misfit
    return sum((parts[index] for index in sorted(parts)), Misfit())


def _box_around(corner: NDArray[np.int64], n_pixels: int) -> Box:
    """Box around footprints of N x N pixels."""
    (y0, x0), (y1, x1) = corner.min(axis=0).tolist(), (corner.max(axis=0) + n_pixels).tolist()
    return Box(y0, y1, x0, x1)


def _extended(tile: Box, whole: Box, around: Box) -> Box:
    """Box of a tile; edges shared with `whole` moved to `around`."""
    return Box(
        min(tile.y0, around.y0) if tile.y0 == whole.y0 else tile.y0,
        max(tile.y1, around.y1) if tile.y1 == whole.y1 else tile.y1,
        min(tile.x0, around.x0) if tile.x0 == whole.x0 else tile.x0,
        max(tile.x1, around.x1) if tile.x1 == whole.x1 else tile.x1,
    )


def _within(part: Box, whole: Box) -> tuple[slice, slice]:
    """Slices of a box in an array over a larger one."""
    return slice(part.y0 - whole.y0, part.y1 - whole.y0), slice(part.x0 - whole.x0, part.x1 - whole.x0)
