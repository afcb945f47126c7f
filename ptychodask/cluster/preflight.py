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

from ptychodask.cluster.broadcast import IN_PROCESS
from ptychodask.cluster.executor import DaskExecutor, Executor, Future
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
    """Reason why it cannot do the run, except for versions; None if it can."""


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


def preflight_jobs(executor: Executor, jobs: Sequence[PredictionJob]) -> None:
    """Like `preflight`, for the jobs of a run.

    Does nothing if all workers are inside this process.

    Parameters
    ----------
    executor : Executor
    jobs : sequence of PredictionJob
        Jobs on one store, one for each model.
    """
    first = jobs[0]
    _check_all(executor, _Requirements(first.store, first.data_hash, tuple(job.model for job in jobs), first.device))


def _check_all(executor: Executor, requirements: _Requirements) -> None:
    # An adaptive cluster may start workers only for tasks, and have none yet.
    workers = executor.workers()
    if not workers:
        logger.info("no worker has connected yet: none is checked")
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
    finally:
        executor.cancel(list(futures.values()))


def _wait(executor: Executor, futures: Mapping[str, Future]) -> None:
    """Wait until every connected worker has answered, at most `ANSWERS_WITHIN_S`."""
    deadline = time.monotonic() + ANSWERS_WITHIN_S
    waiting = dict(futures)
    while waiting and time.monotonic() < deadline:
        executor.wait(list(waiting.values()), POLL_S)
        connected = executor.workers()
        waiting = {
            address: future
            for address, future in waiting.items()
            if future.status == "pending" and address in connected
        }


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
    return _Report(socket.gethostname(), _versions(), _problem(requirements, advertised))


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
