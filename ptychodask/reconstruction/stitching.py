"""The client's side of stitching: the tasks of a plan, what is noted of them, and what they tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import distributed
import numpy as np

from ptychodask.cluster import Broadcast, broadcast
from ptychodask.places import Location
from ptychodask.plan import Plan, Tile
from ptychodask.prediction import Skipped
from ptychodask.progress import progress_bar
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.live import LivePicture
from ptychodask.reconstruction.running import Finished, Run, Tasks
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
    sums_are_intact,
    sums_files,
    tile_is_intact,
    verify_chunk,
)
from ptychodask.result import remove_tile
from ptychodask.scan import PtychodaskError
from ptychodask.store import open_groups

logger = logging.getLogger(__name__)

SAME_OBJECT = 1e-5
"""What a chunk that is computed twice may differ by, relative to the median of its modulus."""


@contextmanager
def broadcast_job(client: distributed.Client, job: StitchingJob) -> Iterator[StitchingJob | Broadcast]:
    """The job as tasks carry it: itself, or a parcel where it holds what lies on no disk."""
    in_memory = job.position_yx_px is not None or any(
        method.prediction.model.model is not None for method in job.methods
    )
    with broadcast(client, job) if in_memory else nullcontext(job) as sent:
        yield sent


class Stitching:
    """One run over the chunks and tiles of a plan.

    Parameters
    ----------
    client : distributed.Client
    job, sent : StitchingJob, and as tasks carry it
    todo : Plan
    tolerant : bool
        What cannot be used is left out.
    n_verified : int
        Chunks that a second worker computes again.
    out : Place, optional
        Result store to write tiles into; by default they are sent.
    folder : Place, optional
        Where the sums of chunks wait for their tiles; by default in the memory of the workers.
    ledger : Ledger, optional
        Takes what is finished, and says what was.
    live : LivePicture, optional
        Gets each tile, reduced.
    keep : bool
        The sums of chunks are what is wanted: they stay, and tiles are shown and not delivered.
    sure : set of int
        Chunks whose kept sums need no check.
    """

    def __init__(
        self,
        client: distributed.Client,
        job: StitchingJob,
        sent: StitchingJob | Broadcast,
        plan: Plan,
        *,
        tolerant: bool = False,
        n_verified: int = 0,
        out: Location | None = None,
        folder: Location | None = None,
        ledger: Ledger | None = None,
        live: LivePicture | None = None,
        keep: bool = False,
        sure: Collection[int] = (),
    ) -> None:
        self._client, self._job, self._sent, self._plan = client, job, sent, plan
        self._tolerant, self._n_verified = tolerant, n_verified
        self._out, self._folder, self._ledger = out, folder, ledger
        self._keep, self._sure = keep, sure
        self.live = live
        """The picture that is shown meanwhile."""
        self.told = StitchingReport()
        """What chunks and tiles told, also those of earlier runs."""

    def run(self, take: Callable[[Tile, TileReport], None], progress: bool | None) -> None:
        """Run every task that is left; `take` gets each tile as it is done.

        Raises
        ------
        PtychodaskError
            If a task fails, or two workers do not agree on a chunk.
        """
        finished = self._finished()
        waiting = _Waiting(self._plan, self._folder, finished.tiles, self._job.n_canvases)
        tasks = self.tasks(finished, every_tile=False)

        def take_chunk(index: int, given: Any) -> None:
            if self._ledger is not None:
                self._ledger.add("chunk", index, asdict(given.report))

        def take_tile(index: int, given: Any) -> None:
            report = given.result() if isinstance(given, distributed.Future) else given
            self.told.add_tile(self._plan.tiles[index], report)
            if self._ledger is not None and not self._keep:
                self._ledger.add("tile", index, {"seconds": report.seconds, "checksum": report.checksum})
            if self.live is not None:
                self.live.add(report.coarse)
            take(self._plan.tiles[index], report)
            if self._keep:
                return
            waiting.done_with(self._plan.tiles[index].chunks)

        def take_check(index: int, given: Any) -> None:
            self.verified(index, given)
            waiting.done_with([index])

        for index in tasks.checked:
            waiting.needed_again(index)
        with (
            progress_bar("reconstruct", self._plan.n_groups, "groups", progress) as bar,
            Run(self._client, tasks, finished).guarded() as run,
        ):
            run.complete(take_tile, bar, take_chunk=take_chunk, take_check=take_check)

    def tasks(self, finished: Finished = Finished(), *, every_tile: bool) -> Tasks:
        """Tasks of the plan: `predict_chunk`, `deliver_tile` and `verify_chunk`.

        Parameters
        ----------
        finished : Finished
        every_tile : bool
            Tiles that no chunk touches are delivered too.
        """
        plan, sent, folder = self._plan, self._sent, self._folder
        coarse_step = 0 if self.live is None else self.live.step

        def tile_task(index: int, parts: list[Any]) -> tuple[Any, ...]:
            tile = plan.tiles[index]
            if self._keep:
                return show_tile, self._job.layers, tile, parts, start_yx(plan, tile), coarse_step
            return deliver_tile, self._job.layers, tile, parts, self._out, start_yx(plan, tile), coarse_step

        def without(index: int, why: str) -> ChunkSums:
            return ChunkSums((), plan.chunks[index].box.corner, ChunkReport({}, (self._seeds(index, why),)))

        return Tasks(
            chunks_of=[tile.chunks for tile in plan.tiles],
            amounts=[chunk.stop - chunk.start for chunk in plan.chunks],
            chunk=lambda index: (predict_chunk, sent, plan.chunks[index], folder),
            tile=tile_task,
            chunk_name=lambda index: f"predicting groups {plan.chunks[index].start}..{plan.chunks[index].stop - 1}",
            tile_name=lambda index: f"reassembling the tile {tuple(plan.tiles[index].box)}",
            on_device=True,
            every_tile=every_tile,
            on_disk=folder is not None,
            tolerant_chunk=(lambda index: (predict_chunk, sent, plan.chunks[index], folder, True))
            if self._tolerant
            else None,
            without_chunk=without if self._tolerant else None,
            checked=self._drawn(finished),
            check=lambda index, given: (verify_chunk, sent, plan.chunks[index], given),
        )

    def _drawn(self, finished: Finished) -> frozenset[int]:
        """Chunks to be computed again: drawn from those that this run computes."""
        open_tiles = [tile for index, tile in enumerate(self._plan.tiles) if index not in finished.tiles]
        fresh = sorted({chunk for tile in open_tiles for chunk in tile.chunks} - finished.chunks.keys())
        rng = np.random.default_rng(int(self._plan.data_hash[:8], 16))
        return frozenset(rng.choice(fresh, min(self._n_verified, len(fresh)), replace=False).tolist())

    def verified(self, index: int, given: Any) -> None:
        """Take how a chunk that was computed twice compares; raises `PtychodaskError` where both disagree."""
        found: Verification = given.result() if isinstance(given, distributed.Future) else given
        chunk = self._plan.chunks[index]
        self.told.verifications[index] = found
        if not found.largest_difference <= SAME_OBJECT:
            if self._ledger is not None:
                self._ledger.forget()
            raise PtychodaskError(
                f"reconstruct: groups {chunk.start}..{chunk.stop - 1} differ by {found.largest_difference:.3g} of the "
                f"median |object| between the workers {' and '.join(found.workers)} (expected {SAME_OBJECT:g} at the "
                "most): one of them computes wrongly, and nothing of the run is kept; run on others"
            )
        if not found.same_bits:
            logger.warning(
                "groups %d..%d differ by %.3g of the median |object| between two workers: their devices are not of one "
                "kind",
                chunk.start,
                chunk.stop - 1,
                found.largest_difference,
            )

    def _finished(self) -> Finished:
        """What earlier runs finished, each checked against what was noted of it."""
        if self._ledger is None or not self._ledger.exists:
            return Finished()
        assert self._folder is not None
        plan, ledger = self._plan, self._ledger
        for index, record in ledger.chunks.items():
            self.told.chunks[index] = _chunk_report(record)
        tiles, chunks = sorted(ledger.tiles), sorted(ledger.chunks)
        assert self._out is not None or not tiles
        whole = self._looked_at(
            tile_is_intact,
            [
                (self._out, plan.tiles[index], start_yx(plan, plan.tiles[index]), ledger.tiles[index]["checksum"])
                for index in tiles
            ],
        )
        done = frozenset(index for index, good in zip(tiles, whole, strict=True) if good)
        for index in set(tiles) - done:
            assert self._out is not None
            remove_tile(self._out, start_yx(plan, plan.tiles[index]), plan.tile)
        for index in done:
            self.told.tiles.append(ledger.tiles[index]["seconds"])
        self._show_stored(sorted(done))
        wanted = {chunk for index in range(len(plan.tiles)) if index not in done for chunk in plan.tiles[index].chunks}
        given = {index: self._kept_sums(index) for index in chunks if index in wanted and index in self._sure}
        chunks = [index for index in chunks if index in wanted and index not in given]
        kept = self._looked_at(
            sums_are_intact, [(self._folder, plan.chunks[index], self.told.chunks[index].checksums) for index in chunks]
        )
        given |= {index: self._kept_sums(index) for index, good in zip(chunks, kept, strict=True) if good}
        if self._keep and self.live is None:
            done = frozenset(index for index, tile in enumerate(plan.tiles) if given.keys() >= set(tile.chunks))
        logger.info(
            "%s: going on: %d of %d tiles are done, the sums of %d chunks are kept, %d chunks are left",
            self._out or plan.store,
            len(done),
            len(plan.tiles),
            len(given),
            len(wanted) - len(given),
        )
        return Finished(given, done)

    def _looked_at(self, is_complete: Callable[..., bool], asked: Sequence[tuple[Any, ...]]) -> list[bool]:
        """What workers say of what was kept; what no worker could look at, for they ended, is not taken for whole."""
        if not asked:
            return []
        futures = [self._client.submit(is_complete, *arguments, pure=False) for arguments in asked]
        with self._client.as_current():
            distributed.wait(futures)
        answered = [index for index, future in enumerate(futures) if future.status == "finished"]
        answers = dict(zip(answered, self._client.gather([futures[index] for index in answered]), strict=True))
        return [answers.get(index, False) for index in range(len(futures))]

    def _show_stored(self, tiles: Sequence[int]) -> None:
        """Put tiles that an earlier run wrote into the live picture."""
        if self.live is None:
            return
        places = [(self._plan.tiles[index], start_yx(self._plan, self._plan.tiles[index])) for index in tiles]
        parts = [
            self._client.submit(coarse_stored_tile, self._out, *place, self.live.step, pure=False) for place in places
        ]
        for part in self._client.gather(parts):
            self.live.add(part)

    def _seeds(self, index: int, why: str) -> Skipped:
        """A chunk that is left out as a whole, by the patterns that seed its groups."""
        chunk, table = self._plan.chunks[index], open_groups(self._plan.store, self._plan.groups)
        assert table is not None
        return Skipped(tuple(np.unique(table.rows(chunk.start, chunk.stop)[:, 0]).tolist()), why)

    def _kept_sums(self, index: int) -> ChunkSums:
        assert self._folder is not None
        chunk, report = self._plan.chunks[index], self.told.chunks[index]
        return ChunkSums(sums_files(self._folder, chunk, len(report.checksums)), chunk.box.corner, report)


def _chunk_report(record: dict[str, Any]) -> ChunkReport:
    skipped = tuple(Skipped(tuple(one["patterns"]), one["reason"]) for one in record["skipped"])
    return ChunkReport(record["seconds"], skipped, tuple(record["checksums"]), record["worker"])


class _Waiting:
    """Files of sums that tiles still wait for; each goes with the last of its uses."""

    def __init__(self, plan: Plan, folder: Location | None, tiles_done: Any, n_canvases: int) -> None:
        self._plan, self._folder, self._n_canvases = plan, folder, n_canvases
        self._uses = [0] * len(plan.chunks)
        for index, tile in enumerate(plan.tiles):
            for chunk in tile.chunks if index not in tiles_done else ():
                self._uses[chunk] += 1

    def needed_again(self, chunk: int) -> None:
        self._uses[chunk] += 1

    def done_with(self, chunks: Sequence[int]) -> None:
        if self._folder is None:
            return
        for index in chunks:
            self._uses[index] -= 1
            if self._uses[index] == 0:
                for path in sums_files(self._folder, self._plan.chunks[index], self._n_canvases):
                    path.unlink(missing_ok=True)


class StitchingReport:
    """What chunks and tiles told of their run."""

    def __init__(self) -> None:
        self.chunks: dict[int, ChunkReport] = {}
        self.tiles: list[dict[str, float]] = []
        self.verifications: dict[int, Verification] = {}

    def add_tile(self, tile: Tile, report: TileReport) -> None:
        """Take what a tile tells, and each of its chunks, which counts once."""
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
        found: dict[str, set[int]] = {}
        for report in self.chunks.values():
            for skipped in report.skipped:
                found.setdefault(skipped.reason, set()).update(skipped.patterns)
        return {reason: sorted(patterns) for reason, patterns in sorted(found.items())}


def start_yx(plan: Plan, tile: Tile) -> tuple[int, int]:
    """Row and column of a tile's first pixel in the whole object."""
    return tile.box.y0 - plan.box.y0, tile.box.x0 - plan.box.x0
