"""Client side of stitching: tasks of a run, their ledger and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from ptychodask.cluster.broadcast import Broadcast
from ptychodask.cluster.executor import Executor
from ptychodask.cluster.preflight import preflight_jobs
from ptychodask.cluster.watch import Watch, wait_for
from ptychodask.errors import PtychodaskError
from ptychodask.plan import Plan
from ptychodask.plan.chunks import Tile
from ptychodask.prediction import Skipped, open_stored
from ptychodask.progress import progress_bar
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.run import Run, RunFolders
from ptychodask.reconstruction.scheduler import Finished, Scheduler, TaskGraph
from ptychodask.reconstruction.sums import sums_are_intact, sums_files
from ptychodask.reconstruction.tasks import (
    ChunkReport,
    ChunkSums,
    StitchingJob,
    TileReport,
    Verification,
    coarse_stored_tile,
    deliver_tile,
    predict_chunk,
    show_tile,
    tile_is_intact,
    verify_chunk,
)
from ptychodask.result import remove_tile
from ptychodask.storage.location import Location

logger = logging.getLogger(__name__)

LOST = "ended every worker that took them"
"""Reason for which a chunk that no worker survives is left out."""


SAME_OBJECT = 1e-5
"""Largest accepted difference of a chunk that is computed twice, relative to the median of its modulus."""


@contextmanager
def stitching_of(
    run: Run,
    executor: Executor,
    folders: RunFolders = RunFolders(),
    screen: Screen | None = None,
    trusted: Collection[int] = (),
) -> Iterator[Stitching]:
    """Context with the stitching of a run, once all workers are checked.

    The workers have what its tasks need until the block ends.

    Parameters
    ----------
    run : Run
    executor : Executor
    folders : RunFolders
    screen : Screen, optional
        Shows the live picture.
    trusted : set of int
        Chunks whose stored sums need no check.
    """
    job, plan = run.job, run.plan
    # Only what cannot be opened from its path is sent.
    in_memory = job.position_yx_px is not None or any(each.prediction.model.model is not None for each in job.methods)
    with executor.broadcast(job) if in_memory else nullcontext(job) as job_reference:
        predictions = [method.prediction for method in job.methods]
        preflight_jobs(executor, predictions, max(plan.predict_bytes, plan.reassemble_bytes))
        stitching = Stitching(run, executor, job_reference, folders, run.live_picture(screen), trusted)
        yield stitching
        if stitching.live is not None:
            stitching.live.finish()


class Stitching:
    """Tasks of a run's chunks and tiles, and their reports.

    Parameters
    ----------
    run, executor, folders, trusted
        See `stitching_of`.
    job_reference : StitchingJob or Broadcast
        The job as tasks take it.
    live : LivePicture or None
        Shows each tile, reduced.
    """

    def __init__(
        self,
        run: Run,
        executor: Executor,
        job_reference: StitchingJob | Broadcast,
        folders: RunFolders,
        live: LivePicture | None,
        trusted: Collection[int],
    ) -> None:
        self._run, self._executor, self._job_reference = run, executor, job_reference
        self._plan, self._tolerant, self._trusted = run.plan, run.spec.on_error == "skip", trusted
        self._folder, self._ledger, self._out = folders.sums, folders.ledger, folders.stitched
        self._sums_only = folders.sums is not None and folders.stitched is None
        self.live = live
        """Picture that is shown during the run."""
        self.report = StitchingReport()
        """Reports of chunks and tiles, also those of earlier runs."""

    def run(self, on_tile: Callable[[Tile, TileReport], None], progress: bool | None) -> None:
        """Run all remaining tasks; `on_tile` gets each tile when it is done.

        Raises
        ------
        PtychodaskError
            If a task fails, or two workers do not agree on a chunk.
        """
        finished = self._read_finished()
        sums = _SumsFiles(self._plan, self._folder, finished.tiles, self._run.job.n_canvases)
        graph = self.graph(finished, every_tile=False)

        def record_chunk(index: int, result: Any) -> None:
            if self._ledger is not None:
                self._ledger.add("chunk", index, asdict(result.report))

        def record_tile(index: int, result: Any) -> None:
            report = self._value(result)
            self.report.add_tile(self._plan.tiles[index], report)
            if self._ledger is not None and not self._sums_only:
                self._ledger.add("tile", index, {"seconds": report.seconds, "checksum": report.checksum})
            if self.live is not None:
                self.live.add(report.coarse)
            on_tile(self._plan.tiles[index], report)
            if self._sums_only:
                return
            # Only now that the tile is recorded: a run stopped before would need its sums again.
            sums.release(self._plan.tiles[index].chunks)

        def record_verification(index: int, result: Any) -> None:
            self.add_verification(index, result)
            sums.release([index])

        for index in graph.verified:
            sums.add_use(index)
        scheduler = Scheduler(self._executor, graph, finished)
        with progress_bar("reconstruct", self._plan.n_groups, "groups", progress) as bar:
            scheduler.complete(bar, on_tile=record_tile, on_chunk=record_chunk, on_verification=record_verification)

    def graph(self, finished: Finished = Finished(), *, every_tile: bool) -> TaskGraph:
        """Tasks of the plan: `predict_chunk`, `deliver_tile` and `verify_chunk`.

        Parameters
        ----------
        finished : Finished
        every_tile : bool
            Tiles that no chunk touches are delivered too.
        """
        run, plan, job, folder = self._run, self._plan, self._job_reference, self._folder
        coarse_step = 0 if self.live is None else self.live.step

        def tile_task(index: int, parts: list[Any]) -> tuple[Any, ...]:
            tile = plan.tiles[index]
            if self._sums_only:
                return show_tile, run.job.layers, tile, parts, run.start_yx(tile), coarse_step
            return deliver_tile, run.job.layers, tile, parts, self._out, run.start_yx(tile), coarse_step

        def empty_sums(index: int) -> ChunkSums:
            return ChunkSums((), plan.chunks[index].box.corner, ChunkReport({}, (self._seeds(index, LOST),)))

        return TaskGraph(
            chunks_of=[tile.chunks for tile in plan.tiles],
            n_units=[chunk.stop - chunk.start for chunk in plan.chunks],
            chunk_task=lambda index: (predict_chunk, job, plan.chunks[index], folder),
            tile_task=tile_task,
            chunk_name=lambda index: f"predicting groups {plan.chunks[index].start}..{plan.chunks[index].stop - 1}",
            tile_name=lambda index: f"reassembling the tile {tuple(plan.tiles[index].box)}",
            task_bytes=max(plan.predict_bytes, plan.reassemble_bytes),
            on_device=True,
            every_tile=every_tile,
            fetch_results=folder is not None,
            tolerant_chunk_task=(lambda index: (predict_chunk, job, plan.chunks[index], folder, True))
            if self._tolerant
            else None,
            lost_chunk_result=empty_sums if self._tolerant else None,
            verified=self._draw_verified(finished),
            verify_task=lambda index, sums: (verify_chunk, job, plan.chunks[index], sums),
        )

    def _draw_verified(self, finished: Finished) -> frozenset[int]:
        """Chunks to verify, drawn at random from those that this run computes."""
        open_tiles = [tile for index, tile in enumerate(self._plan.tiles) if index not in finished.tiles]
        fresh = sorted({chunk for tile in open_tiles for chunk in tile.chunks} - finished.chunks.keys())
        rng = np.random.default_rng(int(self._plan.data_hash[:8], 16))
        return frozenset(rng.choice(fresh, min(int(self._run.spec.verify), len(fresh)), replace=False).tolist())

    def add_verification(self, index: int, result: Any) -> None:
        """Record the comparison of a chunk; raises `PtychodaskError` if workers disagree."""
        verification: Verification = self._value(result)
        chunk = self._plan.chunks[index]
        self.report.verifications[index] = verification
        if not verification.largest_difference <= SAME_OBJECT:
            # It is unknown which worker is wrong, and since when: resuming would trust all that it computed before.
            if self._ledger is not None:
                self._ledger.forget()
            raise PtychodaskError(
                f"reconstruct: groups {chunk.start}..{chunk.stop - 1} differ by {verification.largest_difference:.3g} "
                f"of the median |object| between the workers {' and '.join(verification.workers)} (expected "
                f"{SAME_OBJECT:g} at most): one of them computes wrongly, and nothing of the run is kept; run on others"
            )
        if not verification.same_bits:
            logger.warning(
                "groups %d..%d differ by %.3g of the median |object| between two workers: their devices differ in kind",
                chunk.start,
                chunk.stop - 1,
                verification.largest_difference,
            )

    def _read_finished(self) -> Finished:
        """Chunks and tiles of earlier runs, checked against their recorded checksums."""
        if self._ledger is None or not self._ledger.exists:
            return Finished()
        assert self._folder is not None
        plan, ledger = self._plan, self._ledger
        for index, record in ledger.chunks.items():
            self.report.chunks[index] = _chunk_report(record)
        tiles, chunks = sorted(ledger.tiles), sorted(ledger.chunks)
        assert self._out is not None or not tiles
        intact = self._check_on_workers(
            tile_is_intact,
            [
                (self._out, plan.tiles[index], self._run.start_yx(plan.tiles[index]), ledger.tiles[index]["checksum"])
                for index in tiles
            ],
        )
        done = frozenset(index for index, good in zip(tiles, intact, strict=True) if good)
        for index in set(tiles) - done:
            assert self._out is not None
            remove_tile(self._out, self._run.start_yx(plan.tiles[index]), plan.tile)
        for index in done:
            self.report.tiles.append(ledger.tiles[index]["seconds"])
        self._show_stored(sorted(done))
        needed = {chunk for index in range(len(plan.tiles)) if index not in done for chunk in plan.tiles[index].chunks}
        sums = {index: self._stored_sums(index) for index in chunks if index in needed and index in self._trusted}
        chunks = [index for index in chunks if index in needed and index not in sums]
        intact = self._check_on_workers(
            sums_are_intact,
            [(self._folder, plan.chunks[index], self.report.chunks[index].checksums) for index in chunks],
        )
        sums |= {index: self._stored_sums(index) for index, good in zip(chunks, intact, strict=True) if good}
        if self._sums_only and self.live is None:
            done = frozenset(index for index, tile in enumerate(plan.tiles) if sums.keys() >= set(tile.chunks))
        logger.info(
            "%s: resuming: %d of %d tiles are done, the sums of %d chunks are stored, %d chunks are left",
            self._out or plan.store,
            len(done),
            len(plan.tiles),
            len(sums),
            len(needed) - len(sums),
        )
        return Finished(sums, done)

    def _check_on_workers(self, is_intact: Callable[..., bool], arguments: Sequence[tuple[Any, ...]]) -> list[bool]:
        """Check stored data on workers; data whose worker died count as damaged."""
        if not arguments:
            return []
        futures = [self._executor.submit(is_intact, *each) for each in arguments]
        wait_for(self._executor, futures, Watch(self._executor, "reconstruct"))
        finished = [index for index, future in enumerate(futures) if future.status == "finished"]
        answers = dict(zip(finished, self._executor.gather([futures[index] for index in finished]), strict=True))
        return [answers.get(index, False) for index in range(len(futures))]

    def _show_stored(self, tiles: Sequence[int]) -> None:
        """Put tiles that an earlier run wrote into the live picture."""
        if self.live is None:
            return
        parts = [
            self._executor.submit(coarse_stored_tile, self._out, tile, self._run.start_yx(tile), self.live.step)
            for tile in (self._plan.tiles[index] for index in tiles)
        ]
        wait_for(self._executor, parts, Watch(self._executor, "reconstruct"))
        for part in self._executor.gather(parts):
            self.live.add(part)

    def _value(self, result: Any) -> Any:
        """Result of a task, fetched if it is still on the workers."""
        return result.result() if self._folder is None else result

    def _seeds(self, index: int, reason: str) -> Skipped:
        """Patterns that seed the groups of a chunk which is left out."""
        chunk, stored = self._plan.chunks[index], open_stored(self._run.job.methods[0].prediction)
        member = stored.member(self._plan.groups, chunk.start, chunk.stop)
        return Skipped(tuple(np.unique(member[:, 0]).tolist()), reason)

    def _stored_sums(self, index: int) -> ChunkSums:
        assert self._folder is not None
        chunk, report = self._plan.chunks[index], self.report.chunks[index]
        return ChunkSums(sums_files(self._folder, chunk, len(report.checksums)), chunk.box.corner, report)


def _chunk_report(record: dict[str, Any]) -> ChunkReport:
    skipped = tuple(Skipped(tuple(entry["patterns"]), entry["reason"]) for entry in record["skipped"])
    return ChunkReport(record["seconds"], skipped, tuple(record["checksums"]), record["worker"])


class _SumsFiles:
    """Files of sums, each removed after its last use."""

    def __init__(self, plan: Plan, folder: Location | None, tiles_done: Collection[int], n_canvases: int) -> None:
        self._plan, self._folder, self._n_canvases = plan, folder, n_canvases
        self._n_uses = [0] * len(plan.chunks)
        for index, tile in enumerate(plan.tiles):
            for chunk in tile.chunks if index not in tiles_done else ():
                self._n_uses[chunk] += 1

    def add_use(self, chunk: int) -> None:
        self._n_uses[chunk] += 1

    def release(self, chunks: Sequence[int]) -> None:
        if self._folder is None:
            return
        for index in chunks:
            self._n_uses[index] -= 1
            if self._n_uses[index] == 0:
                for path in sums_files(self._folder, self._plan.chunks[index], self._n_canvases):
                    path.unlink(missing_ok=True)


class StitchingReport:
    """Reports of the chunks and tiles of a run."""

    def __init__(self) -> None:
        self.chunks: dict[int, ChunkReport] = {}
        self.tiles: list[dict[str, float]] = []
        self.verifications: dict[int, Verification] = {}

    def add_tile(self, tile: Tile, report: TileReport) -> None:
        """Add the reports of a tile and its chunks, each once."""
        self.chunks |= dict(zip(tile.chunks, report.chunks, strict=True))
        self.tiles.append(report.seconds)

    def seconds(self) -> dict[str, float]:
        """Wall time of each stage, summed over the tasks."""
        total: dict[str, float] = {}
        for part in [*(report.seconds for report in self.chunks.values()), *self.tiles]:
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def skipped(self) -> dict[str, list[int]]:
        """Patterns that were left out, ascending, by the reason."""
        patterns: dict[str, set[int]] = {}
        for report in self.chunks.values():
            for skipped in report.skipped:
                patterns.setdefault(skipped.reason, set()).update(skipped.patterns)
        return {reason: sorted(indices) for reason, indices in sorted(patterns.items())}
