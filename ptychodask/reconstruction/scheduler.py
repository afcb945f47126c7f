"""Scheduler of chunk and tile tasks on an executor.

The graph has two levels: chunks are independent of each other, and a tile is ready once all chunks that touch it are
done (residuals and studies have chunks only). The client submits it piece by piece instead of all at once, because much
is decided only while it runs. A loop
waits for any attempt in flight (an attempt is one future), records its result, submits the tiles which that makes
ready, and refills the chunks in flight up to a bound. An attempt that fails is repeated. An attempt far slower than all
others gets a second one on another worker, and the first to finish counts; both would return the same bits. A chunk
whose workers died is set aside until no other chunk is in flight, and then runs alone: only then does a death show that
this chunk is the cause. The loop ends when nothing is in flight: each task is then finished, replaced, or reported as
lost.
"""

from __future__ import annotations

import errno
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ptychodask.cluster.executor import Executor, Future, KilledWorker, device_share
from ptychodask.cluster.watch import Watch
from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.progress import Progress

logger = logging.getLogger(__name__)


WRITERS_WAIT_S = 60
"""Longest time that a run which ends early waits for tiles that are being written."""


IN_FLIGHT_PER_THREAD = 3
"""Chunks in flight for each thread: one running, one ready to start, one whose end the client has yet to learn of."""


IN_FLIGHT_AT_LEAST = 4
"""Chunks in flight at least, however few threads there are yet."""


WAKE_S = 0.1
"""Longest time that the client sleeps while it waits for results."""


TRIES = 2
"""Attempts at a failing task with the same arguments; the disk or device of a worker may be at fault."""


STRAGGLER_S = 60.0
"""A task in flight longer than this, and `STRAGGLER_TIMES` the slowest finished one, is also run on a second worker."""


STRAGGLER_TIMES = 4.0


PERMANENT_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Disk errors that another attempt would meet again; `atomic_folder` gives their message."""


def _no_task(index: int, *_: Any) -> Any:
    raise AssertionError("the graph has no such task")


@dataclass(frozen=True, kw_only=True)
class TaskGraph:
    """Chunk tasks, and tile tasks that take the results of their chunks."""

    n_units: Sequence[int] = ()
    """Units of progress in each chunk."""

    chunk_task: Callable[[int], tuple[Any, ...]] = _no_task
    """Function and arguments of a chunk's task."""

    chunk_name: Callable[[int], str] = _no_task
    """Description of a chunk's task, for messages."""

    chunks_of: Sequence[tuple[int, ...]] = ()
    """Chunks that touch each tile, ascending. Without tiles all chunks have a task."""

    tile_task: Callable[[int, list[Any]], tuple[Any, ...]] = _no_task
    """Function and arguments of a tile's task, from the results of its chunks: futures, or values if they are
    fetched."""

    tile_name: Callable[[int], str] = _no_task
    """Description of a tile's task, for messages."""

    command: str = "reconstruct"
    """Name of the command, for messages."""

    remedy_lost: str = "give workers more memory, or leave these groups out with on_error='skip' (--on-error skip)"
    """Remedy if a chunk crashes every worker."""

    remedy_ended: str = "start again, with resume=True (--resume) if out= is given"
    """Remedy if the cluster ended."""

    task_bytes: int = 0
    """Memory of the largest task, for messages."""

    on_device: bool = False
    """Chunk tasks ask for a share of a GPU if workers advertise one."""

    every_tile: bool = False
    """Tiles that no chunk touches have a task too."""

    fetch_results: bool = False
    """Results are small, with their data on disk: the client fetches them, so that losing a worker loses none."""

    chunks_per_worker: int | None = None
    """Chunks in flight for each worker; by default enough to keep its threads busy."""

    once_at_a_time: bool = False
    """Two attempts at a chunk would disturb each other: slow ones get no second worker."""

    tolerant_chunk_task: Callable[[int], tuple[Any, ...]] | None = None
    """Task of a failed chunk that leaves out unusable patterns; without it the run fails."""

    lost_chunk_result: Callable[[int], Any] | None = None
    """Result used for a chunk that no worker survives; without it the run fails once the rest is done."""

    verified: frozenset[int] = frozenset()
    """Chunks that a second worker computes again."""

    verify_task: Callable[[int, Any], tuple[Any, ...]] | None = None
    """Function and arguments of a chunk's verification, from its result."""


@dataclass(frozen=True)
class Finished:
    """Results of an earlier run."""

    chunks: Mapping[int, Any] = field(default_factory=dict)
    """Results of chunks."""

    tiles: Collection[int] = ()
    """Tiles that are done."""


class _TaskId(NamedTuple):
    """Identity of a task, shared by all attempts at it."""

    kind: Literal["chunk", "tile", "verification"]
    number: int
    """Index of the chunk or tile."""


class _Attempt(NamedTuple):
    """One submission of a task."""

    task_id: _TaskId
    task: tuple[Any, ...]
    submitted_at: float


_PENDING = object()
"""Outcome of an attempt that failed while the task goes to another one."""


def _ignore(index: int, result: Any) -> None:
    pass


class Scheduler:
    """Client side of a run: submits tasks, and handles failures.

    Parameters
    ----------
    executor : Executor
    graph : TaskGraph
    finished : Finished
        Chunks and tiles that need no task any more.
    """

    def __init__(self, executor: Executor, graph: TaskGraph, finished: Finished = Finished()) -> None:
        self._executor, self._graph = executor, graph
        self._name = uuid.uuid4().hex[:12]
        self._results: dict[int, Any] = dict(finished.chunks)
        self._open_tiles = [index for index in range(len(graph.chunks_of)) if index not in set(finished.tiles)]
        self._tiles_of: list[list[int]] = [[] for _ in graph.n_units]
        self._n_missing = [0] * len(graph.chunks_of)
        for tile in self._open_tiles:
            for chunk in graph.chunks_of[tile]:
                self._tiles_of[chunk].append(tile)
                self._n_missing[tile] += chunk not in self._results
        self._n_uses_left = [len(tiles) for tiles in self._tiles_of]
        # A chunk whose tiles are all done has no use left, even if its own result was lost.
        self._queue = deque(
            index
            for index, tiles in enumerate(self._tiles_of)
            if (tiles or not graph.chunks_of) and index not in self._results
        )
        self._in_flight: dict[Future, _Attempt] = {}
        self._futures_of: dict[_TaskId, list[Future]] = {}
        self._n_submitted: Counter[_TaskId] = Counter()
        self._n_failures: Counter[_TaskId] = Counter()
        self._tolerant: set[_TaskId] = set()
        self._set_aside: deque[_TaskId] = deque()
        self._alone: set[_TaskId] = set()
        self._lost: list[int] = []
        self._max_chunks_in_flight = IN_FLIGHT_AT_LEAST
        self._resources: dict[str, float] | None = None
        self._watch = Watch(executor, graph.command, graph.task_bytes)
        self._longest_s = 0.0
        self._completed = executor.as_completed(with_results=graph.fetch_results)

    def complete(
        self,
        bar: Progress,
        *,
        on_tile: Callable[[int, Any], None] = _ignore,
        on_chunk: Callable[[int, Any], None] = _ignore,
        on_verification: Callable[[int, Any], None] = _ignore,
    ) -> None:
        """Run all tasks, and pass each result to its callback; once only.

        Parameters
        ----------
        bar : Progress
        on_tile, on_chunk, on_verification : callable
            Take the index of a tile or chunk, and its future, or its result where results are fetched.

        Raises
        ------
        PtychodaskError
            If a task fails, or (after all others) if a chunk crashes every worker.
        OSError
            If the disk is full or refuses writing.
        """
        try:
            self._complete(bar, {"chunk": on_chunk, "tile": on_tile, "verification": on_verification})
        finally:
            # No task outlives this call. Cancelling does not stop one that is already running, and one that writes a
            # tile is waited for: it could otherwise write into the store after the next run has begun there.
            writing = [future for future, attempt in self._in_flight.items() if attempt.task_id.kind == "tile"]
            self._executor.cancel([future for future in self._in_flight if future not in writing])
            if not self._watch.is_stuck:
                self._executor.wait(writing, WRITERS_WAIT_S)
            self._executor.cancel(writing)

    def _complete(self, bar: Progress, callbacks: Mapping[str, Callable[[int, Any], None]]) -> None:
        tiles_left = {tile for tile in self._open_tiles if self._graph.every_tile or self._graph.chunks_of[tile]}
        self._start(bar)
        while self._in_flight:
            # The wait is cut into short ones, since workers that hang or leave end no task: only polling notices them.
            for future, result in self._completed.ended(WAKE_S):
                # None: another attempt at the task finished first, and this one was cancelled.
                attempt = self._in_flight.pop(future, None)
                if future.status == "finished":
                    self._watch.task_ended()
                outcome = _PENDING if attempt is None else self._outcome(future, attempt, result)
                if attempt is not None and outcome is not _PENDING:
                    self._record(future, attempt, outcome, bar)
                    tiles_left.discard(attempt.task_id.number if attempt.task_id.kind == "tile" else -1)
                    callbacks[attempt.task_id.kind](attempt.task_id.number, outcome)
            self._submit_chunks()
        if self._lost:
            names = " and ".join(self._graph.chunk_name(index) for index in sorted(self._lost))
            raise PtychodaskError(
                f"{self._graph.command}: {names} crashed every worker, also when run alone; the rest is complete: "
                f"{self._graph.remedy_lost}"
            )
        assert not tiles_left, "every tile has a task until it is done"

    def _start(self, bar: Progress) -> None:
        waiting = set(self._queue)
        bar.advance(sum(n_units for index, n_units in enumerate(self._graph.n_units) if index not in waiting))
        # A resumed run may have all chunks of a tile already: no chunk that finishes would ever make it ready.
        for tile in self._open_tiles:
            if self._n_missing[tile] == 0 and (self._graph.every_tile or self._graph.chunks_of[tile]):
                self._submit_tile(tile)
        self._submit_chunks()

    def _submit_chunks(self) -> None:
        """Submit chunks up to the bound on those in flight."""
        # Enough to keep each thread busy, and no more. Dask would otherwise predict far ahead of the tiles, and the
        # sums of chunks, each as large as its part of the object, would fill the memory of the workers.
        self._poll_workers()
        n_in_flight = sum(task_id.kind == "chunk" for task_id in self._futures_of)
        while self._queue and n_in_flight < self._max_chunks_in_flight:
            index = self._queue.popleft()
            self._submit(_TaskId("chunk", index), self._graph.chunk_task(index))
            n_in_flight += 1
        # One at a time, so that the next death has only one possible cause among the chunks.
        if self._set_aside and not n_in_flight:
            task_id = self._set_aside.popleft()
            self._alone.add(task_id)
            self._submit(task_id, self._graph.chunk_task(task_id.number))

    def _poll_workers(self) -> None:
        workers = self._watch.look()
        if workers is None:
            return
        if self._graph.chunks_per_worker is None:
            threads = sum(worker.n_threads for worker in workers.values())
            self._max_chunks_in_flight = max(IN_FLIGHT_AT_LEAST, IN_FLIGHT_PER_THREAD * threads)
        else:
            self._max_chunks_in_flight = max(1, self._graph.chunks_per_worker * len(workers))
        if self._graph.on_device:
            self._resources = device_share(workers)
        if not self._graph.once_at_a_time:
            self._duplicate_stragglers(time.monotonic(), list(workers))

    def _duplicate_stragglers(self, now: float, workers: list[str]) -> None:
        """Submit tasks far slower than others to a second worker too."""
        # The worker may hang. Dask gives its tasks to others only when it is declared dead, minutes later, or never if
        # only the task hangs (a stuck disk or GPU). One duplicate at most, which is all that a merely long task costs.
        limit = max(STRAGGLER_S, STRAGGLER_TIMES * self._longest_s)
        late = [
            (future, attempt)
            for future, attempt in self._in_flight.items()
            if now - attempt.submitted_at > limit and len(self._futures_of[attempt.task_id]) == 1
        ]
        # Before any task has ended there is nothing to compare with: the first may all be slow, compiling the network.
        if not late or self._longest_s == 0:
            return
        # A hanging worker does not hand over finished results either, so those that have a result count as well.
        who_has = self._executor.who_has([future for future, _ in late])
        for future, attempt in late:
            holders = who_has[future.key]
            others = [worker for worker in workers if worker not in holders]
            # Without a holder the task only waits for a free worker.
            if holders and others:
                logger.warning(
                    "%s takes longer than other tasks: started on a second worker too", self._name_of(attempt.task_id)
                )
                self._submit(attempt.task_id, attempt.task, others)

    def _submit_tile(self, index: int) -> None:
        chunks = self._graph.chunks_of[index]
        self._submit(_TaskId("tile", index), self._graph.tile_task(index, [self._results[chunk] for chunk in chunks]))
        for chunk in chunks:
            self._release(chunk)

    def _release(self, chunk: int) -> None:
        """Drop a chunk's result after its last use."""
        # Dask keeps what a submitted task depends on, and frees it once no task and no future of ours refers to it.
        self._n_uses_left[chunk] -= 1
        if self._n_uses_left[chunk] == 0:
            del self._results[chunk]

    def _submit(self, task_id: _TaskId, task: tuple[Any, ...], workers: list[str] | None = None) -> None:
        function, *arguments = task
        n_before = self._n_submitted[task_id]
        future = self._executor.submit(
            function,
            *arguments,
            # A key of its own for each run and attempt: for a known key Dask would return the earlier future.
            key=f"{function.__name__}-{self._name}-{task_id.number}" + (f"-{n_before}" if n_before else ""),
            resources=None if task_id.kind == "tile" else self._resources,
            # Tiles and verifications first: they free the sums of chunks, and another chunk adds to them.
            priority=0 if task_id.kind == "chunk" else 1,
            workers=workers,
        )
        self._n_submitted[task_id] += 1
        self._in_flight[future] = _Attempt(task_id, task, time.monotonic())
        self._futures_of.setdefault(task_id, []).append(future)
        self._completed.add(future)

    def _outcome(self, future: Future, attempt: _Attempt, result: Any) -> Any:
        """Result of an attempt, or `_PENDING` if another one follows.

        Raises the error of the last attempt.
        """
        task_id = attempt.task_id
        if future.status == "finished":
            return result
        self._futures_of[task_id].remove(future)
        error = future.exception() if future.status == "error" else None
        if self._futures_of[task_id]:
            return _PENDING
        del self._futures_of[task_id]
        if isinstance(error, KilledWorker) and task_id.kind == "chunk":
            return self._after_worker_deaths(task_id, error)
        self._n_failures[task_id] += 1
        task = self._next_task(attempt, error)
        if task is None:
            check_done(future, self._name_of(task_id), self._graph)
        assert task is not None
        assert error is not None
        logger.info("%s failed and is tried again: %s", self._name_of(task_id), in_brief(error))
        self._submit(task_id, task)
        return _PENDING

    def _after_worker_deaths(self, task_id: _TaskId, error: Exception) -> Any:
        """Set a chunk aside, or give it up if it ran alone."""
        # Dask blames every task that was on a worker when it died, so a chunk may be blamed for its neighbour. Tried
        # again among others, the guilty one would kill more workers, and more innocent chunks would fail with it.
        if task_id not in self._alone:
            logger.warning("%s is set aside until all others are done: %s", self._name_of(task_id), in_brief(error))
            self._set_aside.append(task_id)
            return _PENDING
        if self._graph.lost_chunk_result is not None:
            return self._graph.lost_chunk_result(task_id.number)
        self._lost.append(task_id.number)
        return _PENDING

    def _next_task(self, attempt: _Attempt, error: BaseException | None) -> tuple[Any, ...] | None:
        """Task to submit after a failure; None to end the run."""
        task_id = attempt.task_id
        if error is None or _is_permanent(error):
            return None
        if self._n_failures[task_id] < TRIES:
            return attempt.task
        # Last, so that no pattern is left out because of a worker that fails once.
        if task_id.kind != "chunk" or self._graph.tolerant_chunk_task is None or task_id in self._tolerant:
            return None
        self._tolerant.add(task_id)
        return self._graph.tolerant_chunk_task(task_id.number)

    def _record(self, future: Future, attempt: _Attempt, result: Any, bar: Progress) -> None:
        """Record a finished task, and submit the tasks it makes ready."""
        task_id = attempt.task_id
        others = [future for future in self._futures_of.pop(task_id, []) if future in self._in_flight]
        for future in others:
            del self._in_flight[future]
        self._executor.cancel(others)
        self._longest_s = max(self._longest_s, time.monotonic() - attempt.submitted_at)
        if task_id.kind != "chunk":
            return
        index = task_id.number
        bar.advance(self._graph.n_units[index])
        if self._tiles_of[index]:
            self._results[index] = result
        if index in self._graph.verified and self._graph.verify_task is not None:
            # On the same worker a fault of its memory or device would repeat, and go unnoticed.
            workers = self._workers_without(future)
            self._submit(_TaskId("verification", index), self._graph.verify_task(index, result), workers)
        for tile in self._tiles_of[index]:
            self._n_missing[tile] -= 1
            if self._n_missing[tile] == 0:
                self._submit_tile(tile)

    def _workers_without(self, future: Future) -> list[str] | None:
        """Workers without the result of a task; None if all have it."""
        holders = self._executor.who_has([future])[future.key]
        return [worker for worker in self._executor.workers() if worker not in holders] or None

    def _name_of(self, task_id: _TaskId) -> str:
        if task_id.kind == "tile":
            return self._graph.tile_name(task_id.number)
        return ("checking " if task_id.kind == "verification" else "") + self._graph.chunk_name(task_id.number)


def _is_permanent(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in PERMANENT_DISK_ERRORS


def check_done(future: Future, task_name: str, graph: TaskGraph = TaskGraph()) -> None:
    """Raise the error of a task that did not finish.

    A `PtychodaskError` and a permanent disk error are raised unchanged, others as one line with the task's name.
    """
    if future.status == "finished":
        return
    if future.status != "error":
        raise PtychodaskError(
            f"{graph.command}: {task_name} was {future.status}: the Dask client, its scheduler or its workers ended; "
            f"{graph.remedy_ended}"
        )
    error = future.exception()
    if isinstance(error, PtychodaskError) or _is_permanent(error):
        raise error
    raise PtychodaskError(f"{graph.command}: {task_name} failed: {type(error).__name__}: {in_brief(error)}") from error
