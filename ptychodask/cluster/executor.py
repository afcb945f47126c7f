"""Executors of tasks: the protocol that the scheduler needs, and Dask's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol, TypeAlias

import distributed
from distributed import Client

from ptychodask.cluster.broadcast import Broadcast, broadcast
from ptychodask.cluster.clients import check_client, client_for_run

DEVICE_SHARE = 0.5
"""Part of a worker's `GPU` that a predict task asks for: two overlap, one reading while the other predicts."""


KilledWorker = distributed.KilledWorker
"""Error of a task whose workers died."""


class WorkerState(NamedTuple):
    """A worker, as its executor describes it."""

    name: str
    n_threads: int
    memory_bytes: int
    """Memory it may use; 0 for no limit."""

    resources: Mapping[str, float]
    """Resources that it advertises, such as ``GPU``."""

    used_bytes: int = 0
    """Memory that its process uses, as last reported."""

    is_paused: bool = False
    """True if it starts no task, since it uses too much of its memory."""

    n_running: int = 0
    """Tasks that it runs, of any client, as last reported."""


class Future(Protocol):
    """A submitted task.

    As an argument of another task it stands for its result.
    """

    @property
    def key(self) -> Any:
        """Name of the task."""

    @property
    def status(self) -> str:
        """State: ``pending``, ``finished``, ``error``, or another for lost tasks."""

    def result(self) -> Any:
        """Result, once there is one; raises the error of the task."""

    def exception(self) -> Any:
        """Error of the task."""


class Completions(Protocol):
    """Futures in the order in which they end."""

    def add(self, future: Any) -> None:
        """Add a future."""

    def ended(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """Futures that ended since the last call, with their results.

        Empty if none ends within `timeout_s`. Without results each comes with itself.
        """


class Executor(Protocol):
    """Runs tasks on workers."""

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        key: str | None = None,
        priority: int = 0,
        workers: list[str] | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> Any:
        """Future of a call; `arguments` may be futures, or lists of them."""

    def compute(self, arrays: Sequence[Any]) -> list[Any]:
        """Futures of Dask arrays; other arrays are returned unchanged."""

    def as_completed(self, *, with_results: bool) -> Completions:
        """Empty set of futures to wait for."""

    def wait(self, futures: Sequence[Any], timeout_s: float | None = None) -> None:
        """Return once all have ended, however they did."""

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        """Results of futures, raising the first error."""

    def cancel(self, futures: Sequence[Any]) -> None:
        """Cancel tasks that have not started."""

    def workers(self) -> dict[str, WorkerState]:
        """Connected workers by their addresses; raises OSError if the cluster is gone."""

    def who_has(self, futures: Sequence[Any]) -> dict[Any, set[str]]:
        """Workers that run a task or have its result, by key."""

    def broadcast(self, content: Any) -> AbstractContextManager[Broadcast]:
        """Context with a reference to an object, sent to each process once."""


class DaskExecutor:
    """Executor of a Dask client.

    Parameters
    ----------
    client : distributed.Client
        Synchronous and open, see `check_client`.
    """

    def __init__(self, client: Client) -> None:
        self._client = check_client(client)

    def submit(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        key: str | None = None,
        priority: int = 0,
        workers: list[str] | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> Any:
        return self._client.submit(
            function, *arguments, key=key, priority=priority, workers=workers, resources=resources, pure=False
        )

    def compute(self, arrays: Sequence[Any]) -> list[Any]:
        # Optimising would drop the resource annotations of a lazy result. The priority is below that of tasks that
        # use the arrays, or all arrays would be in memory before they are used.
        return list(self._client.compute(list(arrays), optimize_graph=False, priority=-1))

    def as_completed(self, *, with_results: bool) -> Completions:
        return _DaskCompletions(self._client, with_results)

    def wait(self, futures: Sequence[Any], timeout_s: float | None = None) -> None:
        if futures and self._client.status == "running":
            with self._client.as_current(), suppress(TimeoutError, OSError, distributed.CancelledError):
                distributed.wait(futures, timeout=timeout_s)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        return list(self._client.gather(list(futures)))

    def cancel(self, futures: Sequence[Any]) -> None:
        if futures and self._client.status == "running":
            # If the scheduler is gone there is nothing to cancel with: its workers end without it.
            with suppress(TimeoutError, OSError, distributed.CancelledError):
                self._client.cancel(list(futures))

    def workers(self) -> dict[str, WorkerState]:
        return {
            address: WorkerState(
                str(worker["name"]),
                worker["nthreads"],
                worker["memory_limit"] or 0,
                worker["resources"],
                int(worker["metrics"].get("memory", 0)),
                worker["status"] == "paused",
                int(worker["metrics"].get("task_counts", {}).get("executing", 0)),
            )
            for address, worker in self._client.scheduler_info(n_workers=-1)["workers"].items()
        }

    def who_has(self, futures: Sequence[Any]) -> dict[Any, set[str]]:
        stored, processing = self._client.who_has(list(futures)), self._client.processing()
        return {
            future.key: {*stored.get(future.key, ()), *(one for one, keys in processing.items() if future.key in keys)}
            for future in futures
        }

    def broadcast(self, content: Any) -> AbstractContextManager[Broadcast]:
        return broadcast(self._client, content)


class _DaskCompletions:
    def __init__(self, client: Client, with_results: bool) -> None:
        # Dask fetches results in the background, side by side. Fetched one by one by the caller, they would slow it.
        self._completed = distributed.as_completed(loop=client.loop, with_results=with_results, raise_errors=False)

    def add(self, future: Any) -> None:
        self._completed.add(future)

    def ended(self, timeout_s: float) -> list[tuple[Any, Any]]:
        with self._completed.thread_condition:
            if not self._completed.has_ready():
                self._completed.thread_condition.wait(timeout=timeout_s)
        batch = self._completed.next_batch(block=False)
        return list(batch) if self._completed.with_results else [(future, future) for future in batch]


AnyClient: TypeAlias = Client | Executor
"""A Dask client, or another executor."""


@contextmanager
def executor_for_run(client: AnyClient | None) -> Iterator[Executor]:
    """Executor of a run: the given, or that of `client_for_run`.

    Parameters
    ----------
    client : distributed.Client, Executor or None

    Yields
    ------
    Executor
    """
    if client is not None and not isinstance(client, Client):
        yield client
        return
    with client_for_run(client) as used:
        yield DaskExecutor(used)


def device_share(workers: Mapping[str, WorkerState]) -> dict[str, float] | None:
    """Resources of a predict task: a share of an advertised GPU."""
    return {"GPU": DEVICE_SHARE} if any("GPU" in worker.resources for worker in workers.values()) else None


def worker_address() -> str:
    """Address of this Dask worker; "here" outside of workers."""
    try:
        return str(distributed.get_worker().address)
    except ValueError:
        return "here"


def worker_advertises_gpu() -> bool:
    """True in a task on a Dask worker that advertises ``GPU``."""
    try:
        return "GPU" in distributed.get_worker().state.total_resources
    except ValueError:
        return False
