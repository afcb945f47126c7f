"""Execution of a run: stitching, then refinement of the objects' tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.cluster.executor import AnyClient, Executor, Future, executor_for_run
from ptychodask.grouping import chosen_patterns, curve_order
from ptychodask.plan.chunks import Tile
from ptychodask.prediction import PredictionJob, open_stored
from ptychodask.probes import illuminated_radius_px
from ptychodask.progress import progress_bar
from ptychodask.reassembly import Box
from ptychodask.reconstruction.flat import ITERATIVE
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.refine_tasks import (
    ObjectLayer,
    deliver_refined,
)
from ptychodask.reconstruction.run import Run, RunFolders
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph
from ptychodask.reconstruction.stages import Refinement, TileArrays, gather_results
from ptychodask.reconstruction.stitching import Stitching, StitchingReport, stitching_of
from ptychodask.reconstruction.tasks import TileReport
from ptychodask.scan import Scan

logger = logging.getLogger(__name__)

OF_PATTERNS = "of_patterns"
"""Key of the variables that are refined for each pattern, in what `stitch_and_refine` returns."""

LEAST_PATTERNS = 4
"""Fewest patterns that refinement needs."""


def stitch_and_refine(
    run: Run,
    client: AnyClient | None,
    folders: RunFolders,
    on_tile: Callable[[Tile, TileReport], None],
    *,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Stitch, then refine the objects as the spec asks.

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
        Attributes of the run: wall time of each stage, skipped patterns, verified chunks, outcome of the refinement;
        and under `OF_PATTERNS` the variables that it refined for each pattern.
    """
    plan = run.plan
    n_chunks, n_tiles = len(plan.chunks), len(plan.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", plan.store, plan.n_groups, n_chunks, n_tiles)
    if client is None and run.spec.cache is None:
        # The network library is loaded here rather than in a task: meanwhile nothing reaches stderr, bars neither.
        for method in run.job.methods:
            method.prediction.model.prepare_device(wanted=False)
    with executor_for_run(client) as executor, stitching_of(run, executor, folders, screen) as stitching:
        if not run.spec.refines:
            stitching.run(on_tile, progress)
            return _report_attributes(stitching.report, plan.store)
        stitched: list[Any] = [folders.stitched] * n_tiles
        if folders.stitched is None:
            stitched = stitch_on_workers(run, executor, stitching, progress)
        else:
            stitching.run(lambda tile, report: None, progress)
        report = _report_attributes(stitching.report, plan.store)
        skipped = (index for patterns in report["skipped"].values() for index in patterns)
        drop = tuple(sorted({*run.spec.drop, *skipped}))
        refined: list[Refined] = []
        for number, layer in enumerate(object_layers(run)):
            tiles = TileArrays(executor, folders.refined, folders.ledger, number)
            one = refine_layer(run, executor, layer, stitched, drop, tiles, report["seconds"], progress)
            refined.append(one)
        records = {one.layer.label: one.record for one in refined}
        report["refinement"] = records.get("", records)
        # Halves have refined positions of their own, which only they are judged by.
        report[OF_PATTERNS] = refined[0].of_patterns
        _deliver(run, executor, stitched, refined, folders, on_tile, stitching.live)
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


def object_layers(run: Run) -> list[ObjectLayer]:
    """Objects of a run that are refined, each by its own patterns."""
    methods: Sequence[tuple[str, tuple[int, ...]]] = [
        (label, (number,)) for number, label in enumerate(run.job.layers.networks)
    ] or [("", ())]
    layers = []
    for (label, index), method in zip(methods, run.job.methods, strict=True):
        network = method.prediction.model.model
        is_flat = network is not None and network.kind == ITERATIVE
        is_learnt = network is None or bool(network.trained_on)
        layers.append(ObjectLayer(label, "object", index, None, is_flat, is_learnt))
        if run.job.layers.split_half:
            for half in range(2):
                name = f"{label}, half {half}" if label else f"half {half}"
                layers.append(ObjectLayer(name, "object_half", (*index, half), half, is_flat, is_learnt))
    if len(layers) > 1 and not layers[0].label:
        layers[0] = replace(layers[0], label="whole")
    return layers


def patterns_to_refine(run: Run, scan: Scan, drop: Sequence[int], half: int | None) -> NDArray[np.int64]:
    """Patterns that refine an object, in the order of the curve.

    Parameters
    ----------
    run : Run
    scan : Scan
        The complete scan.
    drop : ints
        Patterns that are left out.
    half : int or None
        Remainder by 2 of the patterns of a half.

    Returns
    -------
    int64 array (k,)
        In a region, those that illuminate nothing outside.
    """
    index = chosen_patterns(scan, run.spec.experiment, drop)
    if half is not None:
        index = index[index % 2 == half]
    if run.spec.roi is not None:
        radius, box = illuminated_radius_px(scan.probe), run.plan.box
        low, high = np.array(box.corner) + radius, np.array([box.y1, box.x1]) - radius
        position = scan.position_yx_px[index]
        index = index[((position >= low) & (position <= high)).all(axis=1)]
    return index[curve_order(scan.position_yx_px[index])] if len(index) else index


@dataclass(frozen=True, eq=False)
class Refined:
    """A refined object."""

    layer: ObjectLayer

    boxes: tuple[Box, ...]
    """Box of each tile."""

    objects: list[Any]
    """Object over each of them: futures, or files; empty if it was not refined."""

    record: dict[str, Any]
    """Its outcome, for the attribute ``refinement``."""

    of_patterns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Refined positions and flux, by the names of the result's variables."""


def refine_layer(
    run: Run,
    executor: Executor,
    layer: ObjectLayer,
    stitched: Sequence[Any],
    drop: tuple[int, ...],
    tiles: TileArrays,
    seconds: dict[str, float],
    progress: bool | None,
) -> Refined:
    """Refine one object of a run.

    Parameters
    ----------
    run : Run
    executor : Executor
    layer : ObjectLayer
    stitched : sequence
        For each tile: a future `TileReport`, or the store that holds it.
    drop : ints
        Patterns that are left out.
    tiles : TileArrays
    seconds : dict
        Receives the wall time of the stages ``slow_phase`` and ``polish``.
    progress : bool, optional
        See `progress_bar`.
    """
    job = scan_job(run, drop)
    scan = open_stored(job).scan
    index = patterns_to_refine(run, scan, drop, layer.half)
    if len(index) < LEAST_PATTERNS:
        reason = f"only {len(index)} patterns illuminate only the region" if run.spec.roi else f"{len(index)} patterns"
        logger.info("%s: refinement left out: %s", run.plan.store, reason)
        return Refined(layer, (), [], {"left_out": reason})
    refinement = Refinement(run, executor, layer, stitched, job, scan, index, tiles)
    record = refinement.run(seconds, progress)
    return Refined(layer, refinement.boxes, refinement.objects, record, refinement.of_patterns)


def scan_job(run: Run, drop: tuple[int, ...]) -> PredictionJob:
    """Job of tasks that need the scan, and not the model."""
    job = run.job.methods[0].prediction
    return replace(job, drop=drop, model=replace(job.model, model=None))


def _deliver(
    run: Run,
    executor: Executor,
    stitched: Sequence[Any],
    refined: Sequence[Refined],
    folders: RunFolders,
    on_tile: Callable[[Tile, TileReport], None],
    live: LivePicture | None,
) -> None:
    """Write the refined tiles, or pass them to `on_tile`, and show them."""
    tiles = run.plan.tiles
    coarse_step = 0 if live is None else live.step
    done = [one for one in refined if one.objects]
    layers = [one.layer for one in done]

    def tile_task(index: int, _: list[Future]) -> tuple[Any, ...]:
        tile, start = tiles[index], run.start_yx(tiles[index])
        boxes, objects = [one.boxes[index] for one in done], [one.objects[index] for one in done]
        return deliver_refined, tile, layers, boxes, objects, stitched[index], folders.result, start, coarse_step

    def deliver(index: int, report: Any) -> None:
        report = report if folders.result is not None else report.result()
        if live is not None:
            live.add(report.coarse)
        on_tile(tiles[index], report)

    graph = TaskGraph(
        chunks_of=[()] * len(tiles),
        tile_task=tile_task,
        tile_name=lambda index: f"delivering the tile {tuple(tiles[index].box)}",
        every_tile=True,
        fetch_results=folders.result is not None,
    )
    with progress_bar("deliver", 0, "tiles", False) as bar:
        Scheduler(executor, graph).complete(bar, on_tile=deliver)


def _without_arrays(report: TileReport) -> TileReport:
    return replace(report, arrays=None)
