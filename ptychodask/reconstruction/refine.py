"""Execution of a run: stitching, then refinement of the object's tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster.executor import AnyClient, Executor, Future, executor_for_run
from ptychodask.cluster.watch import Watch, wait_for
from ptychodask.errors import PtychodaskError
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
from ptychodask.reconstruction.tasks import TileReport, deliver_refined, stored_tile
from ptychodask.refinement.polishing import (
    PartChange,
    PolishPart,
    StepProducts,
    TileWeights,
    amplitude_sum,
    change_tile,
    illumination_and_proximal_weight,
    misfit_in_all,
    negative_gradient,
    step_tile,
    within,
)
from ptychodask.refinement.slow_phase import (
    NodeGrid,
    NormalEquations,
    SlowPhaseRecord,
    apply_phase,
    frames_box,
    judged,
    merge,
    normal_equations,
    phase_on,
    plan_slow_phase,
    solve,
)
from ptychodask.scan import Scan
from ptychodask.storage.location import Location

logger = logging.getLogger(__name__)


def stitch_and_refine(
    run: Run,
    client: AnyClient | None,
    folders: RunFolders,
    on_tile: Callable[[Tile, TileReport], None],
    *,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Stitch, then refine the object as the spec asks.

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
        Attributes of the run: wall time of each stage, skipped patterns, verified chunks, outcome of the refinements.
    """
    plan = run.plan
    n_chunks, n_tiles = len(plan.chunks), len(plan.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", plan.store, plan.n_groups, n_chunks, n_tiles)
    with executor_for_run(client) as executor, stitching_of(run, executor, folders, screen) as stitching:
        if not run.spec.refines:
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
        skipped = (index for patterns in report["skipped"].values() for index in patterns)
        drop = tuple(sorted({*run.spec.drop, *skipped}))
        boxes = tuple(tile.box for tile in plan.tiles)
        objects = on_tiles(executor, _object_of, stitched)
        if run.spec.slow_phase:
            with stage(report["seconds"], "slow_phase"):
                objects, record = correct_slow_phase(run, executor, objects, drop, progress)
            report["refinement"] = {"slow_phase": asdict(record)}
        if run.spec.polish:
            polishing = Polishing(run, executor, objects, drop)
            n_sweeps = int(run.spec.polish)
            with stage(report["seconds"], "polish"):
                r_factors = polishing.sweep(n_sweeps, progress)
            boxes, objects = polishing.boxes, polishing.objects
            report["polish"] = {"sweeps": n_sweeps, "n_patterns": polishing.n_patterns, "r_factor": r_factors}
            first, last = r_factors[0], r_factors[-1]
            logger.info("%s: R %.4f after stitching and %.4f after %d sweeps", plan.store, first, last, n_sweeps)
        _deliver(run, executor, boxes, stitched, objects, folders.result, on_tile, stitching.live)
    return report


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
    objects : list of Future
        Stitched object over each tile, complex64 (y, x), NaN where unseen.
    drop : ints
        Patterns that are left out.
    """

    def __init__(self, run: Run, executor: Executor, objects: list[Future], drop: tuple[int, ...]) -> None:
        self._executor, self._tiles = executor, [tile.box for tile in run.plan.tiles]
        self._job = scan_job(run, drop)
        self.boxes, self._parts = plan_polishing(open_stored(self._job).scan, run.plan, drop)
        """Box of each tile while it is polished."""
        self._parts_of = [
            tuple(index for index, part in enumerate(self._parts) if tile in part.tiles)
            for tile in range(len(run.plan.tiles))
        ]
        self.n_patterns = sum(len(part.index) for part in self._parts)
        self.objects = objects
        """Object over each tile, from `sweep` on over each of `boxes`."""

    def sweep(self, n_sweeps: int, progress: bool | None) -> list[float]:
        """Sweep over the patterns; returns R before and after each sweep."""
        stitched = self.objects
        summed = gather_results(self._executor, self._on_tiles(amplitude_sum, stitched))
        mean = sum(total for total, _ in summed) / sum(count for _, count in summed)
        prepare = partial(prepare_tile, self._job, mean=mean)
        weights = self._on_tiles(prepare, self._tiles, self.boxes, stitched)
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
        self.objects = objects
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
        parts, boxes = self._parts, self.boxes
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

    def _on_tiles(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Future]:
        return on_tiles(self._executor, function, *columns)


def on_tiles(executor: Executor, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Future]:
    """Submit one task for each tile, with its element of each column."""
    return [executor.submit(function, *row, priority=1) for row in zip(*columns, strict=True)]


def scan_job(run: Run, drop: tuple[int, ...]) -> PredictionJob:
    """Job of tasks that need the scan, and not the model."""
    job = run.job.methods[0].prediction
    return replace(job, drop=drop, model=replace(job.model, model=None))


def correct_slow_phase(
    run: Run, executor: Executor, objects: list[Future], drop: tuple[int, ...], progress: bool | None
) -> tuple[list[Future], SlowPhaseRecord]:
    """Correct the slow part of the phase of the stitched object.

    Parameters
    ----------
    run : Run
    executor : Executor
    objects : list of Future
        Object over each tile, complex64 (y, x), NaN where unseen.
    drop : ints
        Patterns that are left out.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    objects : list of Future
        The corrected tiles, or those given if the step was rejected.
    record : SlowPhaseRecord
    """
    job, boxes = scan_job(run, drop), tuple(tile.box for tile in run.plan.tiles)
    scan = open_stored(job).scan
    index = patterns_without(scan, drop)
    plan = plan_slow_phase(scan, run.plan.box, index)
    index = index[curve_order(scan.position_yx_px[index])]
    chosen, judges = (
        curve_parts(scan, index, run.plan.groups_per_chunk, boxes, among) for among in (plan.chosen, plan.judges)
    )

    def results(parts: Sequence[PolishPart], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of one task for each part, in their order."""
        fetched: dict[int, Any] = {}

        def part_task(number: int) -> tuple[Any, ...]:
            part = parts[number]
            return function, job, *arguments, part, [objects[tile] for tile in part.tiles]

        graph = TaskGraph(
            n_units=[len(part.index) for part in parts],
            chunk_task=part_task,
            chunk_name=lambda number: f"the slow phase of the patterns over {tuple(parts[number].box)}",
            fetch_results=True,
        )
        Scheduler(executor, graph).complete(bar, on_chunk=fetched.__setitem__)
        return [fetched[number] for number in range(len(parts))]

    with progress_bar("slow phase", len(plan.chosen) + len(plan.judges), "patterns", progress) as bar:
        coefficients = solve(merge(*results(chosen, equations_of_part, plan.nodes)), plan.nodes)
        # One copy for all tasks: with many nodes it is larger than a part's own input.
        step = executor.submit(SlowStep, plan.nodes, coefficients)
        misfits = results(judges, judge_part, step)
    record = plan.record(sum(before for before, _ in misfits), sum(after for _, after in misfits))
    return (on_tiles(executor, turn_tile, [step] * len(boxes), boxes, objects) if record.kept else objects), record


def _deliver(
    run: Run,
    executor: Executor,
    boxes: Sequence[Box],
    stitched: list[Future],
    objects: list[Future],
    out: Location | None,
    on_tile: Callable[[Tile, TileReport], None],
    live: LivePicture | None,
) -> None:
    """Write the refined tiles, or pass them to `on_tile`, and show them.

    `objects` cover `boxes`; `stitched` has the `TileReport` of each tile.
    """
    tiles = run.plan.tiles
    coarse_step = 0 if live is None else live.step

    def tile_task(index: int, _: list[Future]) -> tuple[Any, ...]:
        tile = tiles[index]
        state = boxes[index], stitched[index], objects[index]
        return deliver_refined, tile, *state, out, run.start_yx(tile), coarse_step

    def deliver(index: int, future: Future) -> None:
        report = future.result()
        if live is not None:
            live.add(report.coarse)
        on_tile(tiles[index], report)

    graph = TaskGraph(
        chunks_of=[()] * len(tiles),
        tile_task=tile_task,
        tile_name=lambda index: f"delivering the tile {tuple(tiles[index].box)}",
        every_tile=True,
    )
    with progress_bar("deliver", 0, "tiles", False) as bar:
        Scheduler(executor, graph).complete(bar, on_tile=deliver)


def gather_results(executor: Executor, futures: list[Future]) -> list[Any]:
    """Gather results of small tasks, raising the first error."""
    wait_for(executor, futures, Watch(executor, "reconstruct"))
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
    around = frames_box(scan, index)
    boxes = tuple(_extended(tile.box, plan.box, around) for tile in plan.tiles)
    return boxes, curve_parts(scan, index, plan.groups_per_chunk, boxes, index)


def curve_parts(
    scan: Scan, index: NDArray[np.int64], size: int, boxes: tuple[Box, ...], among: NDArray[np.int64]
) -> tuple[PolishPart, ...]:
    """Parts of some patterns, cut from the curve.

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        Patterns in the order of the curve.
    size : int
        Consecutive patterns of the curve that a part takes its own from, so that its box is no larger than theirs.
    boxes : tuple of Box
        One per tile.
    among : int64 array
        Patterns of `index` that are in the parts.

    Returns
    -------
    tuple of PolishPart
        Without empty ones.
    """
    is_among = np.zeros(scan.n_patterns, bool)
    is_among[among] = True
    parts = []
    for first in range(0, len(index), size):
        rows = index[first : first + size]
        rows = rows[is_among[rows]]
        if len(rows):
            box = frames_box(scan, rows)
            tiles = tuple(number for number, tile_box in enumerate(boxes) if tile_box.overlap(box).n_pixels)
            parts.append(PolishPart(rows, box, tiles, tuple(boxes[number] for number in tiles)))
    return tuple(parts)


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
    start[within(tile, box)][seen] = stitched[seen]
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
    change, misfit = negative_gradient(_joined(part, objects), part.box.corner, scan, part.index)
    return PartChange(change, part.box, misfit)


def equations_of_part(
    job: PredictionJob, nodes: NodeGrid, part: PolishPart, objects: list[NDArray[np.complex64]]
) -> NormalEquations:
    """Equations of the slow phase of one part.

    Parameters
    ----------
    job, part, objects
        See `change_part`.
    nodes : NodeGrid

    Returns
    -------
    NormalEquations
    """
    return normal_equations(_joined(part, objects), part.box.corner, open_stored(job).scan, nodes, part.index)


class SlowStep(NamedTuple):
    """A slow phase that was solved for."""

    nodes: NodeGrid
    coefficients: NDArray[np.float64]
    """Phase at each node (y, x), radians."""


def judge_part(
    job: PredictionJob, step: SlowStep, part: PolishPart, objects: list[NDArray[np.complex64]]
) -> tuple[float, float]:
    """Misfit of the judges in one part, before and after.

    Parameters
    ----------
    job, part, objects
        See `change_part`.
    step : SlowStep
    """
    return judged(_joined(part, objects), part.box, open_stored(job).scan, *step, part.index)


def turn_tile(step: SlowStep, box: Box, object_: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """One tile of the object times exp(i slow phase)."""
    return apply_phase(object_, phase_on(box, *step))


def _joined(part: PolishPart, objects: list[NDArray[np.complex64]]) -> NDArray[np.complex64]:
    """Object over the box of a part, 0 outside its tiles."""
    joined = np.zeros(part.box.shape, np.complex64)
    for box, object_ in zip(part.tile_boxes, objects, strict=True):
        shared = part.box.overlap(box)
        joined[within(shared, part.box)] = object_[within(shared, box)]
    return joined


def check_one_experiment(scan: Scan, drop: Sequence[int] | NDArray[np.integer[Any]]) -> None:
    """Raise `PtychodaskError` if a store has several experiments."""
    n_experiments = 1 if scan.scan_index is None else len(np.unique(scan.scan_index[patterns_without(scan, drop)]))
    if n_experiments > 1:
        raise PtychodaskError(
            f"{scan.store}: slow_phase=True with {n_experiments} experiments in one store: it is the phase of one "
            "object; remove slow_phase, or ingest them into a store each"
        )


def _extended(tile: Box, whole: Box, around: Box) -> Box:
    """Box of a tile; edges shared with `whole` moved to `around`."""
    return Box(
        min(tile.y0, around.y0) if tile.y0 == whole.y0 else tile.y0,
        max(tile.y1, around.y1) if tile.y1 == whole.y1 else tile.y1,
        min(tile.x0, around.x0) if tile.x0 == whole.x0 else tile.x0,
        max(tile.x1, around.x1) if tile.x1 == whole.x1 else tile.x1,
    )
