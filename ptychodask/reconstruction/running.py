"""The client's side of a run: which tasks are out, and what each tile still waits for."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import distributed

from ptychodask.progress import Progress
from ptychodask.scan import PtychodaskError

DEVICE_SHARE = 0.5
"""Part of a worker's `GPU` that a predict task asks for: two overlap, one reading while the other predicts."""

WRITERS_WAIT_S = 60
"""How long a run that ends early waits for tiles that are being written."""

IN_FLIGHT_PER_THREAD = 3
"""Chunks that are out for each thread: one at work, one at hand, and one whose end the client has yet to hear of."""

IN_FLIGHT_AT_LEAST = 4
"""Chunks that are out at a time, however few threads there are yet."""

LOOK_AGAIN_S = 1.0
"""How often the client asks the scheduler for its workers: some join late, some go."""


@dataclass(frozen=True)
class Tasks:
    """Tasks of two kinds: each chunk gives something that the tiles which it touches take."""

    chunks_of: list[tuple[int, ...]]
    """Chunks of each tile, ascending."""

    amounts: list[int]
    """Units of progress in each chunk."""

    chunk: Callable[[int], tuple[Any, ...]]
    """Function and arguments of a chunk's task."""

    tile: Callable[[int, list[Any]], tuple[Any, ...]]
    """Function and arguments of a tile's task, given what its chunks give: futures, or the things themselves."""

    chunk_name: Callable[[int], str]
    """What a chunk's task does, for messages."""

    tile_name: Callable[[int], str]
    """What a tile's task does, for messages."""

    on_device: bool = False
    """Chunks ask for a share of a GPU where workers advertise one."""

    every_tile: bool = False
    """Tiles that no chunk touches have a task too."""

    on_disk: bool = False
    """What tasks give is small, their data lie on disk: the client fetches it, so that no worker's loss takes it."""


class Run:
    """The client's side of a run: which tasks are out, and what a tile still waits for."""

    def __init__(self, client: distributed.Client, tasks: Tasks) -> None:
        self._client, self._tasks = client, tasks
        self._name = uuid.uuid4().hex[:12]
        self._next_chunk = 0
        self._given: dict[int, Any] = {}
        self._limit = 0
        self._resources: dict[str, float] | None = None
        self._looked = -LOOK_AGAIN_S
        self._missing = [len(chunks) for chunks in tasks.chunks_of]
        self._tiles_of: list[list[int]] = [[] for _ in tasks.amounts]
        for index, chunks in enumerate(tasks.chunks_of):
            for chunk in chunks:
                self._tiles_of[chunk].append(index)
        self._unused = [len(tiles) for tiles in self._tiles_of]
        self._at_chunks: dict[distributed.Future, int] = {}
        self._at_tiles: dict[distributed.Future, int] = {}
        # Fetched as they come, side by side: one after the other, the way to the workers would hold the run up.
        self._completed = distributed.as_completed(loop=client.loop, with_results=tasks.on_disk, raise_errors=False)

    @contextmanager
    def guarded(self) -> Iterator[Run]:
        """The run; whatever ends it early, no task is left behind, and none writes any more."""
        try:
            yield self
        finally:
            self._client.cancel(list(self._at_chunks))
            if self._at_tiles:
                with suppress(TimeoutError), self._client.as_current():
                    distributed.wait(list(self._at_tiles), timeout=WRITERS_WAIT_S)
                self._client.cancel(list(self._at_tiles))

    def to_its_end(self, take: Callable[[int, Any], None], progress: Progress) -> None:
        """Run all tasks; `take` gets each tile, by its index, as it is done: its future, or what it gave."""
        if self._tasks.every_tile:
            for index, missing in enumerate(self._missing):
                if missing == 0:
                    self._submit_tile(index)
        self._submit_chunks()
        while self._at_chunks or self._at_tiles:
            for future, given in self._next_done():
                if future in self._at_chunks:
                    progress.advance(self._tasks.amounts[self._chunk_done(future, given)])
                else:
                    take(self._tile_done(future), given)
            self._submit_chunks()

    def _next_done(self) -> list[tuple[distributed.Future, Any]]:
        """Tasks that are done by now, one at least, and what they gave."""
        batch = self._completed.next_batch(block=True)
        return list(batch) if self._tasks.on_disk else [(future, future) for future in batch]

    def _submit_chunks(self) -> None:
        """Keep each thread busy, and no more: what tasks give would pile up."""
        self._look_at_workers()
        while len(self._at_chunks) < self._limit and self._next_chunk < len(self._tasks.amounts):
            function, *arguments = self._tasks.chunk(self._next_chunk)
            future = self._client.submit(
                function,
                *arguments,
                key=f"{function.__name__}-{self._name}-{self._next_chunk}",
                resources=self._resources,
                pure=False,
            )
            self._at_chunks[future] = self._next_chunk
            self._completed.add(future)
            self._next_chunk += 1

    def _look_at_workers(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_AGAIN_S or self._next_chunk == len(self._tasks.amounts):
            return
        self._looked = now
        workers = workers_of(self._client)
        self._limit = max(IN_FLIGHT_AT_LEAST, IN_FLIGHT_PER_THREAD * sum(worker["nthreads"] for worker in workers))
        if self._tasks.on_device:
            self._resources = device_share(worker["resources"] for worker in workers)

    def _chunk_done(self, future: distributed.Future, given: Any) -> int:
        index = self._at_chunks.pop(future)
        check_done(future, self._tasks.chunk_name(index), (PtychodaskError,))
        self._given[index] = given
        for tile in self._tiles_of[index]:
            self._missing[tile] -= 1
            if self._missing[tile] == 0:
                self._submit_tile(tile)
        return index

    def _submit_tile(self, index: int) -> None:
        chunks = self._tasks.chunks_of[index]
        function, *arguments = self._tasks.tile(index, [self._given[chunk] for chunk in chunks])
        future = self._client.submit(
            function, *arguments, key=f"{function.__name__}-{self._name}-{index}", priority=1, pure=False
        )
        self._at_tiles[future] = index
        self._completed.add(future)
        for chunk in chunks:
            self._unused[chunk] -= 1
            if self._unused[chunk] == 0:
                # The tasks that were submitted hold what it gave; it goes with the last of them.
                del self._given[chunk]

    def _tile_done(self, future: distributed.Future) -> int:
        index = self._at_tiles.pop(future)
        # What the disk refuses is named by `whole_or_nothing`.
        check_done(future, self._tasks.tile_name(index), (PtychodaskError, OSError))
        return index


def workers_of(client: distributed.Client) -> list[dict[str, Any]]:
    """What the scheduler knows of each worker."""
    return list(client.scheduler_info(n_workers=-1)["workers"].values())


def check_workers(client: distributed.Client, task_bytes: int) -> None:
    """Raise `PtychodaskError` when a worker that is there could not hold a task in each of its threads."""
    for worker in workers_of(client):
        limit, threads = worker["memory_limit"], worker["nthreads"]
        if limit and threads * task_bytes > limit:
            raise PtychodaskError(
                f"reconstruct: worker {worker['name']} may take {limit / 2**20:,.0f} MiB, its {threads} threads need "
                f"{threads * task_bytes / 2**20:,.0f} MiB; pass memory_bytes= below {limit // threads}, start workers "
                "with more memory, or with fewer threads"
            )


def device_share(resources: Any) -> dict[str, float] | None:
    """What a predict task asks of a worker: a share of its GPU where workers advertise one."""
    return {"GPU": DEVICE_SHARE} if any("GPU" in found for found in resources) else None


def check_done(future: distributed.Future, what: str, as_it_is: tuple[type[Exception], ...]) -> None:
    """Raise what a task raised, if it did: as it is, or named in one line."""
    if future.status == "finished":
        return
    if future.status != "error":
        raise PtychodaskError(
            f"reconstruct: {what} was {future.status}: the Dask client or its workers ended; start again"
        )
    error = future.exception()
    if isinstance(error, as_it_is):
        raise error
    told = (str(error).splitlines() or [""])[0]
    raise PtychodaskError(f"reconstruct: {what} failed: {type(error).__name__}: {told}") from error
