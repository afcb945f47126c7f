"""Watch over the workers that a run waits for."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dask

from ptychodask.cluster.executor import Executor, WorkerState
from ptychodask.cluster.job import MIB
from ptychodask.errors import PtychodaskError

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Time between two looks at the list of workers."""


NO_WORKER_S = 30.0
"""Time without any worker after which a warning is logged."""


PAUSED_S = 15.0
"""Time that all workers may be paused and idle. Nothing then frees their memory, so that they would stay paused."""


QUIET_S = 60.0
"""Time without the end of a task after which a line states what the workers do; doubled for each further line."""


NETWORK_BYTES = 1200 * MIB
"""Memory of a worker with TensorFlow and the smallest packaged network, loaded and compiled."""


MEMORY_OPTIONS = "dask worker --memory-limit, or memory_limit= of a LocalCluster"


RESTARTS = 4
"""Restarts of one worker for its memory that are accepted before any task has ended: so many may be due to one task."""


class Watch:
    """Reasons of waiting, logged; ends a wait that nothing would end.

    Parameters
    ----------
    executor : Executor
    command : str
        Name of the command, for messages.
    task_bytes : int
        Memory of its largest task.
    restarts : int
        Restarts of one worker for its memory that are accepted before any task has ended.
    """

    def __init__(self, executor: Executor, command: str, task_bytes: int = 0, restarts: int = RESTARTS) -> None:
        self._executor, self._command, self._task_bytes = executor, command, task_bytes
        self._accepted = restarts
        self._n_restarts: Counter[str] = Counter()
        self._last: dict[str, tuple[str, WorkerState]] = {}
        self._polled_at = -POLL_S
        self._seen_at = self._ended_at = time.monotonic()
        self._idle_since: float | None = None
        self._has_ended = False
        self._quiet_s = QUIET_S
        self._reported_paused: set[str] = set()
        self.is_over = False
        """True once the scheduler is gone."""
        self.is_stuck = False
        """True once all workers are paused, and none runs a task."""

    def task_ended(self) -> None:
        """Note that a task has ended."""
        self._ended_at, self._quiet_s, self._idle_since, self._has_ended = time.monotonic(), QUIET_S, None, True

    def look(self) -> dict[str, WorkerState] | None:
        """Workers by their addresses, at most once in `POLL_S`; None in between.

        Raises
        ------
        PtychodaskError
            If all workers are paused for their memory limit and none runs a task, or if a worker restarts for its
            memory again and again.
        """
        now = time.monotonic()
        if now - self._polled_at < POLL_S:
            return None
        self._polled_at = now
        try:
            workers = self._executor.workers()
        except OSError:
            # The tasks in flight fail with that, and their error names the cause.
            self.is_over = True
            return None
        if workers:
            self._seen_at = now
        elif now - self._seen_at > NO_WORKER_S:
            logger.warning("no worker for %.0f s: waiting for one", NO_WORKER_S)
            self._seen_at = self._ended_at = now
        self._check_restarts(workers)
        self._check_paused(workers, now)
        if workers and now - self._ended_at > self._quiet_s:
            logger.warning("no task has ended for %.0f s; %s", now - self._ended_at, _summary(workers))
            self._quiet_s *= 2
        return workers

    def _check_restarts(self, workers: Mapping[str, WorkerState]) -> None:
        # Dask starts a worker again under its name, at another address.
        for address, worker in workers.items():
            before = self._last.get(worker.name)
            self._last[worker.name] = (address, worker)
            if before is None or before[0] == address or before[0] in workers:
                continue
            self._n_restarts[worker.name] += 1
            last = before[1]
            # Its last report is up to a second old, and loading a library takes hundreds of MiB in that time.
            by_memory = last.memory_bytes > 0 and last.used_bytes > last.memory_bytes / 2
            line = f"worker {worker.name} was restarted" + (f": it {_usage(last)}" if by_memory else "")
            if by_memory and self._n_restarts[worker.name] > self._accepted and not self._has_ended:
                raise PtychodaskError(f"{self._command}: {line}; {self._remedy(last)}")
            logger.warning("%s", line)

    def _check_paused(self, workers: Mapping[str, WorkerState], now: float) -> None:
        paused = [worker for worker in workers.values() if worker.is_paused]
        if not workers or len(paused) < len(workers) or any(worker.n_running for worker in paused):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > PAUSED_S:
            self.is_stuck = True
            largest = max(paused, key=lambda worker: worker.used_bytes)
            raise PtychodaskError(
                f"{self._command}: {_all_of(len(paused))} paused and stays so, since nothing frees its memory: worker "
                f"{largest.name} {_usage(largest)}; {self._remedy(largest)}"
            )
        for worker in paused:
            if worker.name not in self._reported_paused:
                self._reported_paused.add(worker.name)
                logger.warning("worker %s is paused: it %s", worker.name, _usage(worker))

    def _remedy(self, worker: WorkerState) -> str:
        used = max(worker.used_bytes, worker.memory_bytes)
        return f"start workers with {needed_mib(used, worker.n_threads * self._task_bytes)} or more ({MEMORY_OPTIONS})"


def wait_for(executor: Executor, futures: Sequence[Any], watch: Watch) -> None:
    """Return once all futures have ended, watching the workers meanwhile."""
    # A NumPy array among them is a result already.
    for future in [each for each in futures if hasattr(each, "status")]:
        while future.status == "pending" and not watch.is_over:
            executor.wait([future], POLL_S)
            watch.look()
        watch.task_ended()


def needed_mib(used_bytes: float, tasks_bytes: float) -> str:
    """Memory limit that suits a worker, such as ``1,500 MiB``.

    Parameters
    ----------
    used_bytes : float
        Memory that it used, not all of which it may have reached.
    tasks_bytes : float
        Memory of the tasks that it runs at a time.
    """
    n_bytes = (max(used_bytes, NETWORK_BYTES) + tasks_bytes) / (pause_fraction() or 1.0)
    return f"{n_bytes / MIB:,.0f} MiB"


def pause_fraction() -> float | None:
    """Fraction of the memory limit at which Dask pauses workers, or None."""
    return dask.config.get("distributed.worker.memory.pause") or None


def _usage(worker: WorkerState) -> str:
    """Memory and memory limit of a worker, for messages."""
    paused_at = f", and Dask pauses it at {100 * fraction:.0f} %" if (fraction := pause_fraction()) else ""
    return (
        f"uses {worker.used_bytes / MIB:,.0f} MiB, mostly for the network and its library, of the "
        f"{worker.memory_bytes / MIB:,.0f} MiB that it may use{paused_at}"
    )


def _all_of(n_workers: int) -> str:
    return "the only worker is" if n_workers == 1 else f"each of the {n_workers} workers is"


def _summary(workers: Mapping[str, WorkerState]) -> str:
    """State of the workers, for messages."""
    n_threads = sum(worker.n_threads for worker in workers.values())
    n_running = sum(worker.n_running for worker in workers.values())
    n_paused = sum(worker.is_paused for worker in workers.values())
    paused = f", of which {n_paused} paused for their memory limit" if n_paused else ""
    return f"workers: {len(workers)}{paused}; threads that run a task, of any client: {n_running} of {n_threads}"
