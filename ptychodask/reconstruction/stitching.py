"""The client's side of stitching: the tasks of a plan, and what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import distributed

from ptychodask.cluster import Parcel, parcel_for
from ptychodask.plan import Plan, Tile
from ptychodask.progress import show_progress
from ptychodask.reconstruction.running import Run, Tasks
from ptychodask.reconstruction.tasks import StitchingJob, TileReport, deliver_tile, predict_chunk


def stitching_tasks(
    job: StitchingJob,
    sent: StitchingJob | Parcel,
    todo: Plan,
    out: Path | None = None,
    folder: Path | None = None,
    *,
    every_tile: bool,
) -> Tasks:
    """Tasks of a plan: `predict_chunk` and `deliver_tile`.

    Parameters
    ----------
    job, sent : StitchingJob, and as tasks carry it
    todo : Plan
    out : Path, optional
        Result store to write tiles into; by default they are sent.
    folder : Path, optional
        Where the sums of chunks wait for their tiles; by default in the memory of the workers.
    every_tile : bool
        Tiles that no chunk touches are delivered too.
    """

    def tile_task(index: int, parts: list[Any]) -> tuple[Any, ...]:
        tile = todo.tiles[index]
        return deliver_tile, job.layers, tile, parts, out, start_yx(todo, tile)

    return Tasks(
        chunks_of=[tile.chunks for tile in todo.tiles],
        amounts=[chunk.stop - chunk.start for chunk in todo.chunks],
        chunk=lambda index: (predict_chunk, sent, todo.chunks[index], folder),
        tile=tile_task,
        chunk_name=lambda index: f"predicting groups {todo.chunks[index].start}..{todo.chunks[index].stop - 1}",
        tile_name=lambda index: f"reassembling the tile {tuple(todo.tiles[index].box)}",
        on_device=True,
        every_tile=every_tile,
        on_disk=folder is not None,
    )


@contextmanager
def sent_job(client: distributed.Client, job: StitchingJob) -> Iterator[StitchingJob | Parcel]:
    """The job as tasks carry it: itself, or a parcel where it holds what lies on no disk."""
    in_memory = job.position_yx_px is not None or any(
        method.prediction.model.model is not None for method in job.methods
    )
    with parcel_for(client, job) if in_memory else nullcontext(job) as sent:
        yield sent


def stitch(
    job: StitchingJob,
    sent: StitchingJob | Parcel,
    todo: Plan,
    client: distributed.Client,
    out: Path | None,
    folder: Path | None,
    take: Callable[[Tile, TileReport], None],
    show: bool | None,
) -> dict[str, float]:
    """Run every task of a plan; gives the wall time of each stage, summed over the tasks."""
    seconds = Seconds()
    waiting = _Waiting(todo, folder)

    def taken(index: int, given: Any) -> None:
        report = given.result() if isinstance(given, distributed.Future) else given
        seconds.add(todo.tiles[index], report)
        take(todo.tiles[index], report)
        waiting.tile_done(todo.tiles[index])

    with (
        show_progress("reconstruct", todo.n_groups, "groups", show) as progress,
        Run(client, stitching_tasks(job, sent, todo, out, folder, every_tile=False)).guarded() as run,
    ):
        run.to_its_end(taken, progress)
    return seconds.in_all()


class _Waiting:
    """Files of sums that tiles still wait for; each goes with the last of its tiles."""

    def __init__(self, todo: Plan, folder: Path | None) -> None:
        self._todo, self._folder = todo, folder
        self._tiles_left = [0] * len(todo.chunks)
        for tile in todo.tiles:
            for chunk in tile.chunks:
                self._tiles_left[chunk] += 1

    def tile_done(self, tile: Tile) -> None:
        if self._folder is None:
            return
        for index in tile.chunks:
            self._tiles_left[index] -= 1
            if self._tiles_left[index] == 0:
                for path in self._folder.glob(f"{self._todo.chunks[index].start}-*.npy"):
                    path.unlink()


class Seconds:
    """Wall time of the stages; a chunk's is told by each of its tiles and counts once."""

    def __init__(self) -> None:
        self._chunks: dict[int, dict[str, float]] = {}
        self._tiles: list[dict[str, float]] = []

    def add(self, tile: Tile, report: TileReport) -> None:
        """Take the times of a tile and of its chunks."""
        self._chunks |= dict(zip(tile.chunks, report.chunk_seconds, strict=True))
        self._tiles.append(report.seconds)

    def in_all(self) -> dict[str, float]:
        """Wall time of each stage, summed over the tasks."""
        total: dict[str, float] = {}
        for part in [*self._chunks.values(), *self._tiles]:
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total


def start_yx(todo: Plan, tile: Tile) -> tuple[int, int]:
    """Row and column of a tile's first pixel in the whole object."""
    return tile.box.y0 - todo.box.y0, tile.box.x0 - todo.box.x0
