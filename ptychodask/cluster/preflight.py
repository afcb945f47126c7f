"""`preflight`: whether every worker of a cluster can do a run, asked before the first task of it."""

from __future__ import annotations

import logging
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import distributed

from ptychodask.cluster import IN_PROCESS
from ptychodask.places import parse_location
from ptychodask.prediction import Device, ModelReference, PatchModel, PredictionJob, resolve_model
from ptychodask.scan import PtychodaskError, in_brief
from ptychodask.store import ScanReader

logger = logging.getLogger(__name__)

PACKAGES = ("ptychodask", "numpy", "dask", "distributed", "zarr", "numba", "keras")
"""Whose versions must be the client's: what is sent to workers, and the bits that come back, depend on them."""

KERAS_ONLY = ("keras",)
"""Of these, what a network of another library does without."""

ANSWERS_WITHIN_S = 60.0
"""How long all workers may take together; the first to open a network loads its library."""

ASKED_AGAIN_S = 2.0
"""How often the scheduler is asked which workers are still there."""


@dataclass(frozen=True, eq=False)
class _Question:
    """What a worker is asked."""

    store: str
    data_hash: str
    models: tuple[ModelReference, ...]
    device: Device


@dataclass(frozen=True)
class _Answer:
    """What a worker found."""

    host: str
    versions: dict[str, str | None]

    refusal: str | None
    """Why it cannot do the run, less what versions tell."""


def preflight(
    client: distributed.Client,
    store: str | Path,
    model: str | Path | PatchModel | Mapping[str, str | Path | PatchModel] | None = None,
    *,
    device: Device = "any",
) -> None:
    """Check that every worker can do a reconstruction, by one small task on each.

    Parameters
    ----------
    client : distributed.Client
    store, model
        As for `reconstruct`.
    device : str
        ``gpu`` where workers must see one; those that advertise a ``GPU`` must in any case.

    Raises
    ------
    PtychodaskError
        If a worker cannot import ptychodask, has another version of it or of a library that matters, does not see the
        same store or model under their paths, or no GPU where one is wanted. It names the worker, what it said and
        the way out. Also if store or model cannot be opened here.

    Notes
    -----
    A worker that does not answer within a minute, or ends, is named in a warning and not an error: it may be busy, and
    others may take its place.

    Examples
    --------
    >>> preflight(client, "scan.zarr", "scan.pinn.model")  # doctest: +SKIP
    """
    reader = ScanReader(store)
    scan = reader.first()
    named = model if isinstance(model, Mapping) else {"": model}
    models = tuple(ModelReference.to(resolve_model(scan, one).bind(scan)) for one in named.values())
    _ask_all(client, _Question(str(parse_location(store).resolve()), reader.data_hash, models, device))


def preflight_jobs(client: distributed.Client, jobs: Sequence[PredictionJob]) -> None:
    """The same for a run whose jobs are known; nothing where all workers live in this process.

    Parameters
    ----------
    client : distributed.Client
    jobs : sequence of PredictionJob
        Of one store, one for each model.
    """
    first = jobs[0]
    _ask_all(client, _Question(first.store, first.data_hash, tuple(job.model for job in jobs), first.device))


def _ask_all(client: distributed.Client, question: _Question) -> None:
    workers = _workers(client)
    if not workers:
        logger.info("no worker is there yet: none is checked")
    if all(address.startswith(IN_PROCESS) for address in workers):
        return
    name = uuid.uuid4().hex[:12]
    futures = {
        address: client.submit(
            _answer,
            question,
            "GPU" in worker["resources"],
            key=f"preflight-{name}-{address}",
            workers=[address],
            allow_other_workers=False,
            priority=10,
            retries=0,
            pure=False,
        )
        for address, worker in workers.items()
    }
    try:
        _wait(client, futures)
        own = _versions()
        for address, future in futures.items():
            _check(f"worker {workers[address]['name']} on {_host(address)}", future, own, question)
    finally:
        client.cancel(list(futures.values()))


def _wait(client: distributed.Client, futures: Mapping[str, distributed.Future]) -> None:
    """Wait until every worker that is still there has answered, or time is up."""
    waited_until = time.monotonic() + ANSWERS_WITHIN_S
    waiting = dict(futures)
    while waiting and time.monotonic() < waited_until:
        with client.as_current(), suppress(TimeoutError):
            distributed.wait(list(waiting.values()), timeout=ASKED_AGAIN_S)
        there = _workers(client)
        waiting = {address: one for address, one in waiting.items() if one.status == "pending" and address in there}


def _workers(client: distributed.Client) -> dict[str, dict[str, Any]]:
    """What the scheduler knows of each worker, by its address; none where workers come only once there are tasks."""
    return dict(client.scheduler_info(n_workers=-1)["workers"])


def _host(address: str) -> str:
    return address.partition("://")[2].rpartition(":")[0]


def _check(who: str, future: distributed.Future, own: Mapping[str, str | None], question: _Question) -> None:
    """Raise `PtychodaskError` unless a worker's answer is as it must be."""
    if future.status == "error":
        error = future.exception()
        said = f"{type(error).__name__}: {in_brief(error)}"
        raise PtychodaskError(
            f"{who} cannot answer ({said}); start it with the same Python {own['python']} and ptychodask "
            f"{own['ptychodask']} as here"
        )
    if future.status != "finished":
        logger.warning("%s ended or has not answered within %.0f s: it is not checked", who, ANSWERS_WITHIN_S)
        return
    answer: _Answer = future.result()
    who = f"{who} ({answer.host})"
    needs_keras = any(reference.path is not None for reference in question.models)
    others = [
        f"{name} {found} (here {own[name]})"
        for name, found in answer.versions.items()
        if found != own[name] and (needs_keras or name not in KERAS_ONLY)
    ]
    if others:
        raise PtychodaskError(f"{who} has {', '.join(others)}; install the same there as here, or start it from there")
    if answer.refusal is not None:
        raise PtychodaskError(f"{who}: {answer.refusal}")


def _versions() -> dict[str, str | None]:
    return {"python": ".".join(platform.python_version_tuple()[:2]), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _answer(question: _Question, advertised: bool) -> _Answer:
    """On a worker: what it has, and whether it can do the run."""
    return _Answer(socket.gethostname(), _versions(), _refusal(question, advertised))


def _refusal(question: _Question, advertised: bool) -> str | None:
    try:
        found = ScanReader(question.store).data_hash
        if found != question.data_hash:
            raise PtychodaskError(f"{question.store} has the data hash {found} there, and {question.data_hash} here")
        for reference in question.models:
            reference.load()
    except (PtychodaskError, OSError, ImportError) as error:
        return f"{in_brief(error)}; store and model must lie on a file system that all nodes see, under the same paths"
    try:
        for reference in question.models:
            reference.prepare_device(wanted=advertised or question.device == "gpu")
    except PtychodaskError as error:
        return in_brief(error)
    return None
