"""The client's side of polishing: sweeps over the patterns, the object's tiles staying with the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import distributed
import numpy as np
from numpy.typing import NDArray

from ptychodask.iterative import StepProducts
from ptychodask.places import Location
from ptychodask.plan import Plan, Tile
from ptychodask.polishing import (
    amplitude_sum,
    change_part,
    change_tile,
    misfit_in_all,
    plan_polishing,
    prepare_tile,
    step_tile,
)
from ptychodask.prediction import PredictionJob
from ptychodask.progress import Progress, progress_bar
from ptychodask.reconstruction.live import LivePicture
from ptychodask.reconstruction.running import Run, Tasks, check_done
from ptychodask.reconstruction.stitching import Stitching, start_yx
from ptychodask.reconstruction.tasks import TileReport, deliver_polished, stored_tile
from ptychodask.scan import Scan


def stitch_on_workers(
    client: distributed.Client, stitching: Stitching, plan: Plan, progress: bool | None
) -> list[distributed.Future]:
    """Stitch a plan; gives a `TileReport` for each tile, which stays with the workers."""
    done: dict[int, distributed.Future] = {}
    told: dict[int, distributed.Future] = {}

    def take(index: int, future: distributed.Future) -> None:
        done[index] = future
        told[index] = client.submit(_without_arrays, future, priority=1, pure=False)
        if stitching.live is not None:
            for one in [one for one in told if one not in shown and told[one].status == "finished"]:
                shown.add(one)
                stitching.live.add(told[one].result().coarse)

    shown: set[int] = set()
    with (
        progress_bar("reconstruct", plan.n_groups, "groups", progress) as bar,
        Run(client, stitching.tasks(every_tile=True)).guarded() as run,
    ):
        run.complete(take, bar, take_check=stitching.verified)
    reports = gather_results(client, [told[index] for index in range(len(plan.tiles))])
    for index, report in enumerate(reports):
        stitching.told.add_tile(plan.tiles[index], report)
        if stitching.live is not None and index not in shown:
            stitching.live.add(report.coarse)
    return [done[index] for index in range(len(plan.tiles))]


def tiles_from_disk(client: distributed.Client, out: Location, plan: Plan) -> list[distributed.Future]:
    """Tiles that lie in a result store: a `TileReport` of each, which stays with the workers."""
    return [client.submit(stored_tile, out, tile, start_yx(plan, tile), priority=1, pure=False) for tile in plan.tiles]


class Polishing:
    """The client's side of polishing: the tiles of the object, which stay with the workers from sweep to sweep.

    Parameters
    ----------
    client : distributed.Client
    job : PredictionJob
        Names the store.
    todo : Plan
    scan : Scan
    stitched : list of Future
        `TileReport` of each tile.
    drop : ints
        Patterns that are left out.
    """

    def __init__(
        self,
        client: distributed.Client,
        job: PredictionJob,
        plan: Plan,
        scan: Scan,
        stitched: list[distributed.Future],
        drop: tuple[int, ...],
    ) -> None:
        self._client, self._plan, self._stitched = client, plan, stitched
        self._boxes, self._parts = plan_polishing(scan, plan, drop)
        # The model stays behind: sweeps need the scan alone.
        self._job = replace(job, drop=drop, model=replace(job.model, model=None))
        self._parts_of = [
            tuple(index for index, part in enumerate(self._parts) if tile in part.tiles)
            for tile in range(len(plan.tiles))
        ]
        self.n_patterns = sum(len(part.index) for part in self._parts)
        self._objects: list[distributed.Future] = []

    def sweep(self, n_sweeps: int, progress: bool | None) -> list[float]:
        """Sweep over the patterns; R before the first sweep and after each."""
        stitched = self._on_tiles(_object_of, self._stitched)
        summed = gather_results(self._client, self._on_tiles(amplitude_sum, stitched))
        mean = sum(total for total, _ in summed) / sum(count for _, count in summed)
        places = [tile.box for tile in self._plan.tiles]
        hold = partial(prepare_tile, self._job, mean=mean)
        held = self._on_tiles(hold, places, self._boxes, stitched)
        objects = before = self._on_tiles(attrgetter("start"), held)
        changes: list[Any] = [None] * len(held)
        r_factors: list[float] = []
        most = 0.0
        with progress_bar("polish", (n_sweeps + 1) * self.n_patterns, "patterns", progress) as bar:
            for sweep in range(n_sweeps + 1):
                earlier, changes = changes, self._changes(held, objects, before, changes, bar)
                reports = gather_results(self._client, self._on_tiles(attrgetter("report"), changes))
                misfit = misfit_in_all(reports)
                r_factors.append(misfit.r_factor)
                bar.note(f"{sweep} of {n_sweeps} sweeps, R {misfit.r_factor:.4f}")
                if sweep == n_sweeps:
                    break
                missed = misfit.square + sum(report.proximal for report in reports)
                most = missed if sweep == 0 else most
                # The plain step never raises what is to be lowered, so it brings back a run that has strayed.
                products = sum((report.products for report in reports), StepProducts())
                mix = products.mix() if missed <= most else StepProducts().mix()
                step = partial(step_tile, mix=mix)
                before, objects = objects, self._on_tiles(step, held, objects, before, changes, earlier)
        self._objects = objects
        return r_factors

    def _changes(
        self,
        held: list[distributed.Future],
        objects: list[distributed.Future],
        before: list[distributed.Future],
        earlier: list[Any],
        bar: Progress,
    ) -> list[distributed.Future]:
        """What all patterns call for, tile by tile."""
        parts, boxes = self._parts, self._boxes
        done: dict[int, distributed.Future] = {}

        def part_task(index: int) -> tuple[Any, ...]:
            return change_part, self._job, parts[index], [objects[tile] for tile in parts[index].tiles]

        def tile_task(index: int, given: list[distributed.Future]) -> tuple[Any, ...]:
            known = held[index], objects[index], before[index], earlier[index]
            return change_tile, boxes[index], *known, given, self._parts_of[index]

        tasks = Tasks(
            chunks_of=self._parts_of,
            amounts=[len(part.index) for part in parts],
            chunk=part_task,
            tile=tile_task,
            chunk_name=lambda index: f"polishing with the patterns over {tuple(parts[index].box)}",
            tile_name=lambda index: f"polishing the tile {tuple(boxes[index])}",
            every_tile=True,
        )
        with Run(self._client, tasks).guarded() as run:
            run.complete(done.__setitem__, bar)
        return [done[index] for index in range(len(boxes))]

    def deliver(
        self, out: Location | None, take: Callable[[Tile, TileReport], None], live: LivePicture | None = None
    ) -> None:
        """Write the tiles, or hand them to `take`; the live picture gets each."""
        plan = self._plan
        coarse_step = 0 if live is None else live.step

        def tile_task(index: int, _: list[distributed.Future]) -> tuple[Any, ...]:
            tile = plan.tiles[index]
            box, stitched, polished = self._boxes[index], self._stitched[index], self._objects[index]
            return deliver_polished, tile, box, stitched, polished, out, start_yx(plan, tile), coarse_step

        def take_tile(index: int, future: distributed.Future) -> None:
            report = future.result()
            if live is not None:
                live.add(report.coarse)
            take(plan.tiles[index], report)

        tasks = Tasks(
            chunks_of=[()] * len(plan.tiles),
            amounts=[],
            chunk=lambda index: (),
            tile=tile_task,
            chunk_name=lambda index: "",
            tile_name=lambda index: f"delivering the tile {tuple(plan.tiles[index].box)}",
            every_tile=True,
        )
        with progress_bar("deliver", 0, "tiles", False) as bar, Run(self._client, tasks).guarded() as run:
            run.complete(take_tile, bar)

    def _on_tiles(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[distributed.Future]:
        """One task for each tile, with its place in each column."""
        return [self._client.submit(function, *row, priority=1, pure=False) for row in zip(*columns, strict=True)]


def gather_results(client: distributed.Client, futures: list[distributed.Future]) -> list[Any]:
    """What small tasks give; raises what one raised."""
    for future in distributed.as_completed(futures, loop=client.loop):
        check_done(future, "polishing")
    return list(client.gather(futures))


def _object_of(report: TileReport) -> NDArray[np.complex64]:
    assert report.arrays is not None
    return report.arrays["object"]  # type: ignore[no-any-return]


def _without_arrays(report: TileReport) -> TileReport:
    return replace(report, arrays=None)
