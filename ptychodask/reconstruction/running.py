"""The client's side of a run: which tasks are out, what tiles still wait for, what becomes of those that fail."""

from __future__ import annotations

import errno
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import distributed

from ptychodask.progress import Progress
from ptychodask.scan import PtychodaskError, in_brief

logger = logging.getLogger(__name__)

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

WAKE_S = 0.1
"""How often a waiting client looks up, at the least."""

TRIES = 2
"""Times that a task which fails is tried as it is; a worker's disk or device may be at fault."""

STRAGGLER_S = 60.0
"""A task that is out longer than this, and `STRAGGLER_TIMES` longer than any that ended, goes to a second worker."""

STRAGGLER_TIMES = 4.0

NO_WORKER_S = 30.0
"""How long a run waits for workers before it says so."""

DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of a disk that another try would meet again; `atomic_folder` names them."""


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

    tolerant_chunk: Callable[[int], tuple[Any, ...]] | None = None
    """A chunk's task that leaves out what it cannot use, for one that failed; without it the run fails."""

    without_chunk: Callable[[int, str], Any] | None = None
    """What stands for a chunk that no worker survives, and why; without it the run fails once all else is done."""

    checked: frozenset[int] = frozenset()
    """Chunks that a second worker computes again."""

    check: Callable[[int, Any], tuple[Any, ...]] | None = None
    """Function and arguments of the task that does so, given what the chunk gave."""


@dataclass(frozen=True)
class Finished:
    """What an earlier run left."""

    chunks: Mapping[int, Any] = field(default_factory=dict)
    """What chunks gave."""

    tiles: Collection[int] = ()
    """Tiles that are done."""


class _Item(NamedTuple):
    """A task that is out."""

    kind: Literal["chunk", "tile", "check"]
    number: int
    """Index of the chunk or tile."""


class _Out(NamedTuple):
    """One attempt at a task."""

    item: _Item
    task: tuple[Any, ...]
    since: float


_PENDING = object()


def _nothing(index: int, given: Any) -> None:
    pass


class Run:
    """The client's side of a run.

    Parameters
    ----------
    client : distributed.Client
    tasks : Tasks
    finished : Finished
        Chunks and tiles that have no task any more.

    Notes
    -----
    A chunk whose workers died is set aside and tried alone when all others are done: only then is it sure that it is
    the one they die of. A task that is out far longer than any other is given to a second worker too, since the first
    may hang; both would give the same.
    """

    def __init__(self, client: distributed.Client, tasks: Tasks, finished: Finished = Finished()) -> None:
        self._client, self._tasks = client, tasks
        self._name = uuid.uuid4().hex[:12]
        self._given: dict[int, Any] = dict(finished.chunks)
        self._open_tiles = [index for index in range(len(tasks.chunks_of)) if index not in set(finished.tiles)]
        self._tiles_of: list[list[int]] = [[] for _ in tasks.amounts]
        self._missing = [0] * len(tasks.chunks_of)
        for tile in self._open_tiles:
            for chunk in tasks.chunks_of[tile]:
                self._tiles_of[chunk].append(tile)
                self._missing[tile] += chunk not in self._given
        self._unused = [len(tiles) for tiles in self._tiles_of]
        self._queue = deque(index for index, tiles in enumerate(self._tiles_of) if tiles and index not in self._given)
        self._out: dict[distributed.Future, _Out] = {}
        self._attempts: dict[_Item, list[distributed.Future]] = {}
        self._submitted: Counter[_Item] = Counter()
        self._failures: Counter[_Item] = Counter()
        self._tolerant: set[_Item] = set()
        self._set_aside: deque[_Item] = deque()
        self._alone: set[_Item] = set()
        self._lost: list[int] = []
        self._limit = IN_FLIGHT_AT_LEAST
        self._resources: dict[str, float] | None = None
        self._looked = -LOOK_AGAIN_S
        self._last_seen = time.monotonic()
        self._longest = 0.0
        # Fetched as they come, side by side: one after the other, the way to the workers would hold the run up.
        self._completed = distributed.as_completed(loop=client.loop, with_results=tasks.on_disk, raise_errors=False)

    @contextmanager
    def guarded(self) -> Iterator[Run]:
        """The run; whatever ends it early, no task is left behind, and none writes any more."""
        try:
            yield self
        finally:
            writing = [future for future, out in self._out.items() if out.item.kind == "tile"]
            # Without a scheduler there is nobody to call off, and its workers end by themselves.
            with suppress(TimeoutError, OSError, distributed.CancelledError):
                self._call_off([future for future in self._out if future not in writing])
                if writing and self._client.status == "running":
                    with self._client.as_current():
                        distributed.wait(writing, timeout=WRITERS_WAIT_S)
            self._call_off(writing)

    def _call_off(self, futures: list[distributed.Future]) -> None:
        if futures and self._client.status == "running":
            with suppress(OSError):
                self._client.cancel(futures)

    def complete(
        self,
        take: Callable[[int, Any], None],
        bar: Progress,
        *,
        take_chunk: Callable[[int, Any], None] = _nothing,
        take_check: Callable[[int, Any], None] = _nothing,
    ) -> None:
        """Run all tasks; `take` gets each tile, by its index, as it is done: its future, or what it gave.

        So do `take_chunk` and `take_check` with chunks and their checks.
        """
        takers = {"chunk": take_chunk, "tile": take, "check": take_check}
        tiles_left = {tile for tile in self._open_tiles if self._tasks.every_tile or self._tasks.chunks_of[tile]}
        self._start(bar)
        while self._out:
            for future, given in self._next_done():
                out = self._out.pop(future, None)
                outcome = _PENDING if out is None else self._outcome(future, out, given)
                if out is not None and outcome is not _PENDING:
                    self._done(future, out, outcome, bar)
                    tiles_left.discard(out.item.number if out.item.kind == "tile" else -1)
                    takers[out.item.kind](out.item.number, outcome)
            self._submit_chunks()
        if self._lost:
            names = " and ".join(self._tasks.chunk_name(index) for index in sorted(self._lost))
            raise PtychodaskError(
                f"reconstruct: {names} ended every worker that took it, alone too; all else is done: give workers more "
                "memory, or leave these groups out with on_error='skip' (--on-error skip)"
            )
        assert not tiles_left, "every tile has a task until it is done"

    def _start(self, bar: Progress) -> None:
        waiting = set(self._queue)
        bar.advance(sum(amount for index, amount in enumerate(self._tasks.amounts) if index not in waiting))
        for tile in self._open_tiles:
            if self._missing[tile] == 0 and (self._tasks.every_tile or self._tasks.chunks_of[tile]):
                self._submit_tile(tile)
        self._submit_chunks()

    def _next_done(self) -> list[tuple[distributed.Future, Any]]:
        """Tasks that are done by now, one at least, and what they gave."""
        while not self._completed.has_ready():
            with self._completed.thread_condition:
                self._completed.thread_condition.wait(timeout=WAKE_S)
            self._look_at_workers()
        batch = self._completed.next_batch(block=False)
        return list(batch) if self._tasks.on_disk else [(future, future) for future in batch]

    def _submit_chunks(self) -> None:
        """Keep each thread busy, and no more: what tasks give would pile up."""
        self._look_at_workers()
        chunks_out = sum(item.kind == "chunk" for item in self._attempts)
        while self._queue and chunks_out < self._limit:
            index = self._queue.popleft()
            self._submit(_Item("chunk", index), self._tasks.chunk(index))
            chunks_out += 1
        if self._set_aside and not chunks_out:
            item = self._set_aside.popleft()
            self._alone.add(item)
            self._submit(item, self._tasks.chunk(item.number))

    def _look_at_workers(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        try:
            workers = workers_of(self._client)
        except OSError:
            # The scheduler is gone: the tasks that are out will say so.
            return
        if workers:
            self._last_seen = now
        elif now - self._last_seen > NO_WORKER_S:
            logger.warning("no worker has been there for %.0f s: waiting for one", NO_WORKER_S)
            self._last_seen = now
        threads = sum(worker["nthreads"] for worker in workers.values())
        self._limit = max(IN_FLIGHT_AT_LEAST, IN_FLIGHT_PER_THREAD * threads)
        if self._tasks.on_device:
            self._resources = device_share(worker["resources"] for worker in workers.values())
        self._help_stragglers(now, list(workers))

    def _help_stragglers(self, now: float, workers: list[str]) -> None:
        """Give tasks that take far longer than others did to a second worker: theirs may hang."""
        limit = max(STRAGGLER_S, STRAGGLER_TIMES * self._longest)
        late = [
            (future, out)
            for future, out in self._out.items()
            if now - out.since > limit and len(self._attempts[out.item]) == 1
        ]
        if not late or self._longest == 0:
            return
        at_work = self._client.processing()
        # A worker that hangs does not hand over what it has done, either.
        done_by = self._client.who_has([future for future, _ in late])
        for future, out in late:
            has_it = {worker for worker in workers if future.key in at_work.get(worker, ())}
            has_it.update(done_by.get(future.key, ()))
            others = [worker for worker in workers if worker not in has_it]
            if has_it and others:
                logger.warning("%s takes longer than others: a second worker gets it", self._name_of(out.item))
                self._submit(out.item, out.task, others)

    def _submit_tile(self, index: int) -> None:
        chunks = self._tasks.chunks_of[index]
        self._submit(_Item("tile", index), self._tasks.tile(index, [self._given[chunk] for chunk in chunks]))
        for chunk in chunks:
            self._used(chunk)

    def _used(self, chunk: int) -> None:
        """The tasks that were submitted hold what a chunk gave; it goes with the last of them."""
        self._unused[chunk] -= 1
        if self._unused[chunk] == 0:
            del self._given[chunk]

    def _submit(self, item: _Item, task: tuple[Any, ...], workers: list[str] | None = None) -> None:
        function, *arguments = task
        attempt = self._submitted[item]
        future = self._client.submit(
            function,
            *arguments,
            key=f"{function.__name__}-{self._name}-{item.number}" + (f"-{attempt}" if attempt else ""),
            resources=None if item.kind == "tile" else self._resources,
            priority=0 if item.kind == "chunk" else 1,
            workers=workers,
            pure=False,
        )
        self._submitted[item] += 1
        self._out[future] = _Out(item, task, time.monotonic())
        self._attempts.setdefault(item, []).append(future)
        self._completed.add(future)

    def _outcome(self, future: distributed.Future, out: _Out, given: Any) -> Any:
        """What a task gives, or `_PENDING` where it failed and another attempt is out; raises what it raised else."""
        item = out.item
        if future.status == "finished":
            return given
        self._attempts[item].remove(future)
        error = future.exception() if future.status == "error" else None
        if self._attempts[item]:
            return _PENDING
        del self._attempts[item]
        if isinstance(error, distributed.KilledWorker) and item.kind == "chunk":
            return self._after_deaths(item, error)
        self._failures[item] += 1
        task = self._next_attempt(out, error)
        if task is None:
            check_done(future, self._name_of(item))
        assert task is not None
        assert error is not None
        logger.info("%s failed and is tried again: %s", self._name_of(item), in_brief(error))
        self._submit(item, task)
        return _PENDING

    def _after_deaths(self, item: _Item, error: Exception) -> Any:
        """Set a chunk aside whose workers died; when it was alone, it is given up."""
        if item not in self._alone:
            logger.warning("%s is set aside until all others are done: %s", self._name_of(item), in_brief(error))
            self._set_aside.append(item)
            return _PENDING
        if self._tasks.without_chunk is not None:
            return self._tasks.without_chunk(item.number, "ended every worker that took them")
        self._lost.append(item.number)
        return _PENDING

    def _next_attempt(self, out: _Out, error: BaseException | None) -> tuple[Any, ...] | None:
        item = out.item
        if error is None or _is_refusal(error):
            return None
        if self._failures[item] < TRIES:
            return out.task
        if item.kind != "chunk" or self._tasks.tolerant_chunk is None or item in self._tolerant:
            return None
        self._tolerant.add(item)
        return self._tasks.tolerant_chunk(item.number)

    def _done(self, future: distributed.Future, out: _Out, given: Any, bar: Progress) -> None:
        item = out.item
        others = [future for future in self._attempts.pop(item, []) if future in self._out]
        for future in others:
            del self._out[future]
        self._client.cancel(others)
        self._longest = max(self._longest, time.monotonic() - out.since)
        if item.kind != "chunk":
            return
        index = item.number
        bar.advance(self._tasks.amounts[index])
        self._given[index] = given
        if index in self._tasks.checked and self._tasks.check is not None:
            self._unused[index] += 1
            self._submit(_Item("check", index), self._tasks.check(index, given), self._others_than(future))
            self._used(index)
        for tile in self._tiles_of[index]:
            self._missing[tile] -= 1
            if self._missing[tile] == 0:
                self._submit_tile(tile)

    def _others_than(self, future: distributed.Future) -> list[str] | None:
        """Workers that did not make what a task gave; None where there are none."""
        made_by = self._client.who_has([future]).get(future.key, ())
        return [worker for worker in workers_of(self._client) if worker not in made_by] or None

    def _name_of(self, item: _Item) -> str:
        if item.kind == "tile":
            return self._tasks.tile_name(item.number)
        return ("checking " if item.kind == "check" else "") + self._tasks.chunk_name(item.number)


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_REFUSES


def workers_of(client: distributed.Client) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of each worker, by its address."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def check_workers(client: distributed.Client, task_bytes: int) -> None:
    """Raise `PtychodaskError` when a worker that is there could not hold a task in each of its threads."""
    for worker in workers_of(client).values():
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


def check_done(future: distributed.Future, what: str) -> None:
    """Raise what a task raised, if it did: as it is where it says what there is to say, or named in one line."""
    if future.status == "finished":
        return
    if future.status != "error":
        raise PtychodaskError(
            f"reconstruct: {what} was {future.status}: the Dask client, its scheduler or its workers ended; start "
            "again, with resume=True (--resume) where out= is given"
        )
    error = future.exception()
    if isinstance(error, PtychodaskError) or _is_refusal(error):
        raise error
    raise PtychodaskError(f"reconstruct: {what} failed: {type(error).__name__}: {in_brief(error)}") from error
