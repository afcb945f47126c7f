"""Execution of a run: stitching, then refinement of the object's tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster.executor import AnyClient, Executor, Future, executor_for_run
from ptychodask.forward import footprint_corners
from ptychodask.grouping import curve_order, patterns_without
from ptychodask.plan import Plan
from ptychodask.plan.chunks import Tile
from ptychodask.prediction import PredictionJob, open_stored, stage
from ptychodask.progress import Progress, progress_bar
from ptychodask.reassembly import Box
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.run import Run, RunFolders
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph, check_done
from ptychodask.reconstruction.stitching import Stitching, StitchingReport, stitching_of
from ptychodask.reconstruction.tasks import TileReport, deliver_polished, stored_tile
from ptychodask.refinement.polishing import (
    PartChange,
    PolishPart,
    StepProducts,
    TileWeights,
    _within,
    amplitude_sum,
    change_tile,
    illumination_and_proximal_weight,
    misfit_in_all,
    negative_gradient,
    step_tile,
)
from ptychodask.scan import Scan
from ptychodask.storage.location import Location

logger = logging.getLogger(__name__)


def stitch_and_polish(
    run: Run,
    client: AnyClient | None,
    folders: RunFolders,
    on_tile: Callable[[Tile, TileReport], None],
    *,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Stitch and polish.

    Parameters
    ----------
    run : Run
    client : distributed.Client or Executor, optional
        See `executor_for_run`.
    folders : RunFolders
    on_tile : callable
        Takes each tile of the result, with its report.
    progress : bool, optional
        See `progress_bar`.
    screen : Screen or None
        Shows the live picture.

    Returns
    -------
    dict
        Attributes of the run: wall time of each stage, skipped patterns, verified chunks, R of the sweeps.
    """
    plan = run.plan
    n_chunks, n_tiles = len(plan.chunks), len(plan.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", plan.store, plan.n_groups, n_chunks, n_tiles)
    with executor_for_run(client) as executor, stitching_of(run, executor, folders, screen) as stitching:
        if not run.spec.polish:
            stitching.run(on_tile, progress)
            return _report_attributes(stitching.report, plan.store)
        if folders.stitched is None:
            stitched = stitch_on_workers(run, executor, stitching, progress)
        else:
            stitching.run(lambda tile, report: None, progress)
            stitched = [
                executor.submit(stored_tile, folders.stitched, tile, run.start_yx(tile), priority=1)
                for tile in plan.tiles
            ]
        report = _report_attributes(stitching.report, plan.store)
        drop = {*run.spec.drop, *(index for patterns in report["skipped"].values() for index in patterns)}
        polishing = Polishing(run, executor, stitched, tuple(sorted(drop)))
        n_sweeps = int(run.spec.polish)
        with stage(report["seconds"], "polish"):
            r_factors = polishing.sweep(n_sweeps, progress)
        polishing.deliver(folders.result, on_tile, stitching.live)
    logger.info(
        "%s: R %.4f after stitching and %.4f after %d sweeps", plan.store, r_factors[0], r_factors[-1], n_sweeps
    )
    return report | {"polish": {"sweeps": n_sweeps, "n_patterns": polishing.n_patterns, "r_factor": r_factors}}


def _report_attributes(report: StitchingReport, store: str) -> dict[str, Any]:
    """Attributes of a stitching; skipped patterns are logged too."""
    skipped = report.skipped()
    for reason, patterns in skipped.items():
        logger.warning("%s: left out %d patterns, which %s: %s", store, len(patterns), reason, _first_of(patterns))
    verifications = report.verifications.values()
    verified = {
        "chunks": sorted(report.verifications),
        "same_bits": sum(verification.same_bits for verification in verifications),
        "largest_difference": max((verification.largest_difference for verification in verifications), default=0.0),
        "elsewhere": sum(len(set(verification.workers)) == 2 for verification in verifications),
    }
    return {"seconds": report.seconds(), "skipped": skipped} | ({"verified": verified} if verifications else {})


def _first_of(patterns: list[int]) -> str:
    return ", ".join(map(str, patterns[:20])) + (", ..." if len(patterns) > 20 else "")


def stitch_on_workers(run: Run, executor: Executor, stitching: Stitching, progress: bool | None) -> list[Future]:
    """Stitch a run; returns a future `TileReport` for each tile.

    The arrays stay in the memory of the workers.
    """
    plan = run.plan
    tiles: dict[int, Future] = {}
    reports: dict[int, Future] = {}
    shown: set[int] = set()

    def on_tile(index: int, future: Future) -> None:
        tiles[index] = future
        reports[index] = executor.submit(_without_arrays, future, priority=1)
        if stitching.live is not None:
            for ready in [ready for ready in reports if ready not in shown and reports[ready].status == "finished"]:
                shown.add(ready)
                stitching.live.add(reports[ready].result().coarse)

    scheduler = Scheduler(executor, stitching.graph(every_tile=True))
    with progress_bar("reconstruct", plan.n_groups, "groups", progress) as bar:
        scheduler.complete(bar, on_tile=on_tile, on_verification=stitching.add_verification)
    for index, report in enumerate(gather_results(executor, [reports[index] for index in range(len(plan.tiles))])):
        stitching.report.add_tile(plan.tiles[index], report)
        if stitching.live is not None and index not in shown:
            stitching.live.add(report.coarse)
    return [tiles[index] for index in range(len(plan.tiles))]


class Polishing:
    """Polishing of an object whose tiles stay on the workers between sweeps.

    Parameters
    ----------
    run : Run
    executor : Executor
    stitched : list of Future
        `TileReport` of each tile.
    drop : ints
        Patterns that are left out.
    """

    def __init__(self, run: Run, executor: Executor, stitched: list[Future], drop: tuple[int, ...]) -> None:
        self._run, self._executor, self._plan, self._stitched = run, executor, run.plan, stitched
        job = run.job.methods[0].prediction
        self._boxes, self._parts = plan_polishing(open_stored(job).scan, run.plan, drop)
        # Without the model: sweeps only need the scan.
        self._job = replace(job, drop=drop, model=replace(job.model, model=None))
        self._parts_of = [
            tuple(index for index, part in enumerate(self._parts) if tile in part.tiles)
            for tile in range(len(run.plan.tiles))
        ]
        self.n_patterns = sum(len(part.index) for part in self._parts)
        self._objects: list[Future] = []

    def sweep(self, n_sweeps: int, progress: bool | None) -> list[float]:
        """Sweep over the patterns; returns R before and after each sweep."""
        stitched = self._on_tiles(_object_of, self._stitched)
        summed = gather_results(self._executor, self._on_tiles(amplitude_sum, stitched))
        mean = sum(total for total, _ in summed) / sum(count for _, count in summed)
        boxes = [tile.box for tile in self._plan.tiles]
        prepare = partial(prepare_tile, self._job, mean=mean)
        weights = self._on_tiles(prepare, boxes, self._boxes, stitched)
        objects = before = self._on_tiles(attrgetter("start"), weights)
        changes: list[Any] = [None] * len(weights)
        r_factors: list[float] = []
        initial = 0.0
        with progress_bar("polish", (n_sweeps + 1) * self.n_patterns, "patterns", progress) as bar:
            for sweep in range(n_sweeps + 1):
                earlier, changes = changes, self._changes(weights, objects, before, changes, bar)
                reports = gather_results(self._executor, self._on_tiles(attrgetter("report"), changes))
                misfit = misfit_in_all(reports)
                r_factors.append(misfit.r_factor)
                bar.note(f"{sweep} of {n_sweeps} sweeps, R {misfit.r_factor:.4f}")
                if sweep == n_sweeps:
                    break
                objective = misfit.square + sum(report.proximal for report in reports)
                initial = objective if sweep == 0 else initial
                # The plain step never raises the objective, so it recovers a run that has diverged.
                products = sum((report.products for report in reports), StepProducts())
                mix = products.mix() if objective <= initial else StepProducts().mix()
                step = partial(step_tile, mix=mix)
                before, objects = objects, self._on_tiles(step, weights, objects, before, changes, earlier)
        self._objects = objects
        return r_factors

    def _changes(
        self,
        weights: list[Future],
        objects: list[Future],
        before: list[Future],
        earlier: list[Any],
        bar: Progress,
    ) -> list[Future]:
        """Change of the object for all patterns, tile by tile."""
        parts, boxes = self._parts, self._boxes
        changes: dict[int, Future] = {}

        def part_task(index: int) -> tuple[Any, ...]:
            return change_part, self._job, parts[index], [objects[tile] for tile in parts[index].tiles]

        def tile_task(index: int, part_changes: list[Future]) -> tuple[Any, ...]:
            state = weights[index], objects[index], before[index], earlier[index]
            return change_tile, boxes[index], *state, part_changes, self._parts_of[index]

        graph = TaskGraph(
            chunks_of=self._parts_of,
            n_units=[len(part.index) for part in parts],
            chunk_task=part_task,
            tile_task=tile_task,
            chunk_name=lambda index: f"polishing with the patterns over {tuple(parts[index].box)}",
            tile_name=lambda index: f"polishing the tile {tuple(boxes[index])}",
            every_tile=True,
        )
        Scheduler(self._executor, graph).complete(bar, on_tile=changes.__setitem__)
        return [changes[index] for index in range(len(boxes))]

    def deliver(
        self, out: Location | None, on_tile: Callable[[Tile, TileReport], None], live: LivePicture | None = None
    ) -> None:
        """Write the tiles, or pass them to `on_tile`, and show them."""
        plan = self._plan
        coarse_step = 0 if live is None else live.step

        def tile_task(index: int, _: list[Future]) -> tuple[Any, ...]:
            tile = plan.tiles[index]
            box, stitched, polished = self._boxes[index], self._stitched[index], self._objects[index]
            return deliver_polished, tile, box, stitched, polished, out, self._run.start_yx(tile), coarse_step

        def deliver(index: int, future: Future) -> None:
            report = future.result()
            if live is not None:
                live.add(report.coarse)
            on_tile(plan.tiles[index], report)

        graph = TaskGraph(
            chunks_of=[()] * len(plan.tiles),
            tile_task=tile_task,
            tile_name=lambda index: f"delivering the tile {tuple(plan.tiles[index].box)}",
            every_tile=True,
        )
        with progress_bar("deliver", 0, "tiles", False) as bar:
            Scheduler(self._executor, graph).complete(bar, on_tile=deliver)

    def _on_tiles(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Future]:
        """Submit one task for each tile, with its element of each column."""
        return [self._executor.submit(function, *row, priority=1) for row in zip(*columns, strict=True)]


def gather_results(executor: Executor, futures: list[Future]) -> list[Any]:
    """Gather results of small tasks, raising the first error."""
    executor.wait(futures)
    for future in futures:
        check_done(future, "polishing")
    return executor.gather(futures)


def _object_of(report: TileReport) -> NDArray[np.complex64]:
    assert report.arrays is not None
    return report.arrays["object"]  # type: ignore[no-any-return]


def _without_arrays(report: TileReport) -> TileReport:
    return replace(report, arrays=None)


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
    scan = open_stored(job).scan
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
    scan = open_stored(job).scan
    joined = np.empty(part.box.shape, np.complex64)
    for box, object_ in zip(part.tile_boxes, objects, strict=True):
        shared = part.box.overlap(box)
        joined[_within(shared, part.box)] = object_[_within(shared, box)]
    change, misfit = negative_gradient(joined, part.box.corner, scan, part.index)
    return PartChange(change, part.box, misfit)


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
