"""`preflight`: check every worker of a cluster before a run."""

from __future__ import annotations

import logging
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distributed
import psutil

from ptychodask.cluster.broadcast import IN_PROCESS
from ptychodask.cluster.executor import DaskExecutor, Executor, Future, WorkerState
from ptychodask.cluster.job import MIB
from ptychodask.cluster.watch import MEMORY_OPTIONS, Watch, needed_mib, pause_fraction
from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.models.choose import resolve_model
from ptychodask.models.contract import Device, MinimalModel
from ptychodask.prediction import ModelReference, PredictionJob, open_once
from ptychodask.store import StoredScan

logger = logging.getLogger(__name__)

PACKAGES = ("ptychodask", "numpy", "dask", "distributed", "zarr", "numba", "keras")
"""Packages whose versions must match the client's: messages and the bits of results depend on them."""

KERAS_ONLY = ("keras",)
"""Packages of these that matter only for Keras networks."""

ANSWERS_WITHIN_S = 60.0
"""Time for the answers of all workers; opening a network for the first time imports its library."""

POLL_S = 2.0
"""Interval at which the list of workers is read from the scheduler."""


@dataclass(frozen=True, eq=False)
class _Requirements:
    """Requirements of a run that a worker checks."""

    store: str
    data_hash: str
    models: tuple[ModelReference, ...]
    device: Device


@dataclass(frozen=True)
class _Report:
    """Result of the check on one worker."""

    host: str
    versions: dict[str, str | None]

    problem: str | None
    """Reason why it cannot do the run, except for versions and memory; None if it can."""

    used_bytes: int
    """Memory that its process uses once the network is loaded."""


def preflight(
    client: distributed.Client,
    store: str | Path,
    model: str | Path | MinimalModel | Mapping[str, str | Path | MinimalModel] | None = None,
    *,
    device: Device = "any",
) -> None:
    """Check with one small task that every worker can do a reconstruction.

    Parameters
    ----------
    client : distributed.Client
    store, model
        As for `reconstruct`.
    device : str
        ``gpu`` if workers must see a GPU; those that advertise a ``GPU`` always must.

    Raises
    ------
    PtychodaskError
        If a worker cannot import ptychodask, has another version of it or of a library that matters, cannot open the
        same store or model under their paths, or sees no GPU although one is required. The error names the worker, the
        problem and the remedy. Also if the store or model cannot be opened here.

    Notes
    -----
    A worker that ends, or does not answer within a minute, causes a warning and not an error: it may be busy, and
    other workers may replace it.

    Examples
    --------
    >>> preflight(client, "scan.zarr", "scan.pinn.model")  # doctest: +SKIP
    """
    stored = StoredScan(store)
    scan = stored.first()
    named = model if isinstance(model, Mapping) else {"": model}
    models = tuple(ModelReference.to(resolve_model(scan, one).bind(scan)) for one in named.values())
    _check_all(DaskExecutor(client), _Requirements(stored.path, stored.data_hash, models, device))


def preflight_jobs(executor: Executor, jobs: Sequence[PredictionJob], task_bytes: int = 0) -> None:
    """Like `preflight`, for the jobs of a run.

    Of workers inside this process only the memory limit is checked.

    Parameters
    ----------
    executor : Executor
    jobs : sequence of PredictionJob
        Jobs on one store, one for each model.
    task_bytes : int
        Memory of the largest task, without the network.

    Raises
    ------
    PtychodaskError
        As `preflight`, or if the memory limit of a worker is too low for network, library and tasks.
    """
    first = jobs[0]
    models = tuple(job.model for job in jobs)
    _check_all(executor, _Requirements(first.store, first.data_hash, models, first.device), task_bytes)


def _check_all(executor: Executor, requirements: _Requirements, task_bytes: int = 0) -> None:
    # An adaptive cluster may start workers only for tasks, and have none yet.
    workers = executor.workers()
    if not workers:
        logger.info("no worker has connected yet: none is checked")
    # Checked before any task runs: Dask kills a worker over its limit, and the error would then blame a chunk.
    for worker in workers.values():
        _check_memory(worker, 0, task_bytes)
    if all(address.startswith(IN_PROCESS) for address in workers):
        return
    name = uuid.uuid4().hex[:12]
    futures = {
        address: executor.submit(
            _report,
            requirements,
            "GPU" in worker.resources,
            key=f"preflight-{name}-{address}",
            workers=[address],
            priority=10,
        )
        for address, worker in workers.items()
    }
    try:
        _wait(executor, futures)
        expected = _versions()
        for address, future in futures.items():
            _check(f"worker {workers[address].name} on {_host(address)}", future, expected, requirements)
            if future.status == "finished":
                _check_memory(workers[address], future.result().used_bytes, task_bytes)
    finally:
        executor.cancel(list(futures.values()))


def _wait(executor: Executor, futures: Mapping[str, Future]) -> None:
    """Wait until every connected worker has answered, at most `ANSWERS_WITHIN_S`.

    Raises `PtychodaskError` if a worker is restarted meanwhile, or all are paused: its limit is below what the network
    and its library take.
    """
    watch = Watch(executor, "reconstruct", restarts=0)
    watch.look()
    deadline = time.monotonic() + ANSWERS_WITHIN_S
    waiting = dict(futures)
    while waiting and time.monotonic() < deadline:
        executor.wait(list(waiting.values()), POLL_S)
        connected = watch.look() or executor.workers()
        waiting = {
            address: future
            for address, future in waiting.items()
            if future.status == "pending" and address in connected
        }


def _check_memory(worker: WorkerState, loaded_bytes: int, task_bytes: int) -> None:
    """Raise `PtychodaskError` if the limit of a worker is too low.

    `loaded_bytes` is what its process uses once the network is loaded.
    """
    limit, threads = worker.memory_bytes, worker.n_threads
    needed, pauses = loaded_bytes + threads * task_bytes, pause_fraction() or 1.0
    if not limit or (needed <= limit and loaded_bytes <= pauses * limit):
        return
    loaded = f"the network and its library take {loaded_bytes / MIB:,.0f} MiB, and " if loaded_bytes else ""
    fewer = f"pass memory_bytes= below {limit // threads}, " if threads * task_bytes > limit else ""
    raise PtychodaskError(
        f"reconstruct: worker {worker.name} may use {limit / MIB:,.0f} MiB, {loaded}its {threads} threads need "
        f"{threads * task_bytes / MIB:,.0f} MiB; {fewer}start workers with "
        f"{needed_mib(loaded_bytes, threads * task_bytes)} or more ({MEMORY_OPTIONS}), or with fewer threads"
    )


def _host(address: str) -> str:
    return address.partition("://")[2].rpartition(":")[0]


def _check(label: str, future: Future, expected: Mapping[str, str | None], requirements: _Requirements) -> None:
    """Raise `PtychodaskError` unless a worker can do the run."""
    if future.status == "error":
        error = future.exception()
        raise PtychodaskError(
            f"{label} cannot run the check ({type(error).__name__}: {in_brief(error)}); start it with the same Python "
            f"{expected['python']} and ptychodask {expected['ptychodask']} as here"
        )
    if future.status != "finished":
        logger.warning("%s ended or did not answer within %.0f s: it is not checked", label, ANSWERS_WITHIN_S)
        return
    report: _Report = future.result()
    label = f"{label} ({report.host})"
    needs_keras = any(reference.path is not None for reference in requirements.models)
    differences = [
        f"{name} {installed} (here {expected[name]})"
        for name, installed in report.versions.items()
        if installed != expected[name] and (needs_keras or name not in KERAS_ONLY)
    ]
    if differences:
        raise PtychodaskError(
            f"{label} has {', '.join(differences)}; install the same versions on both, or start the run from there"
        )
    if report.problem is not None:
        raise PtychodaskError(f"{label}: {report.problem}")


def _versions() -> dict[str, str | None]:
    return {"python": ".".join(platform.python_version_tuple()[:2]), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _report(requirements: _Requirements, advertised: bool) -> _Report:
    """Check this worker; `advertised` is True if it advertises a GPU."""
    problem = _problem(requirements, advertised)
    return _Report(socket.gethostname(), _versions(), problem, psutil.Process().memory_info().rss)


def _problem(requirements: _Requirements, advertised: bool) -> str | None:
    try:
        store, planned = requirements.store, requirements.data_hash
        # Kept open for the tasks of the run.
        open_once(
            store,
            planned,
            lambda there: PtychodaskError(f"{store} has the data hash {there} there, and {planned} here"),
        )
        for reference in requirements.models:
            reference.load()
    except (PtychodaskError, OSError, ImportError) as error:
        return f"{in_brief(error)}; store and model must be on a file system that all nodes share, under the same paths"
    try:
        for reference in requirements.models:
            reference.prepare_device(wanted=advertised or requirements.device == "gpu")
    except PtychodaskError as error:
        return in_brief(error)
    return None
