"""Clients that start a cluster: SLURM jobs, or workers on GPUs."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, Security, SpecCluster
from distributed.system import MEMORY_LIMIT

from ptychodask.cluster import (
    HUNG_AFTER,
    LOOPBACK,
    LOOPBACK_HOST,
    THREADS_PER_WORKER,
    check_host,
    write_credentials,
)
from ptychodask.cluster.job import MIB, JobSpec, job_folder
from ptychodask.cluster.submission import prologue, sbatch, worker_variables
from ptychodask.errors import PtychodaskError, with_fields

NANNY_MIB = 256
"""Memory of a worker's job in addition to the worker itself."""

JOINS_WITHIN = 120
"""Time that a worker tries to reach its scheduler, in seconds."""

LEAVES_BEFORE_S = 90
"""Time before the limit of its job at which a worker hands over its data and is replaced."""


class _OwningClient(Client):
    """A client that also closes its cluster and removes a folder."""

    folder: Path | None = None

    def close(self, *args: Any, **options: Any) -> None:
        cluster = self.cluster
        super().close(*args, **options)
        if cluster is not None:
            with suppress(TimeoutError, OSError):
                cluster.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def slurm_client(
    spec: JobSpec = JobSpec(), *, at_most: int | None = None, host: str | None = None, **spec_fields: Any
) -> Client:
    """A client whose workers are SLURM jobs, one job each.

    The scheduler runs in this process.

    Parameters
    ----------
    spec : JobSpec
        Each job has one worker with the `cpus`, `memory` and `time` of the spec and, with `gpus`, one GPU.
    at_most : int, optional
        Upper limit of workers under load; by default the number in `spec`. Jobs that end are replaced.
    host : str, optional
        Address or name of this machine that the nodes can reach; by default the address of the interface of `spec`, or
        the host name. The communication is encrypted, and connections without a certificate are refused.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    distributed.Client
        The active client. Closing it ends the workers' jobs; it is a context manager. Until then their logs are in a
        folder of mode 0700 inside the spec's `folder`, by default the working directory.

    Raises
    ------
    PtychodaskError
        If dask-jobqueue is not installed, ``sbatch`` is not found, SLURM refuses such jobs, or this machine cannot
        listen on `host`.

    Notes
    -----
    Uses dask-jobqueue with adaptive scaling, since ``scale`` would not replace a worker whose job was lost. Every
    worker with a GPU advertises ``GPU: 1``.

    Examples
    --------
    >>> client = slurm_client(gpus=8, partition="gpu", time="02:00")  # doctest: +SKIP
    >>> reconstruct("scan.zarr")  # doctest: +SKIP
    """
    spec = with_fields(spec, spec_fields)
    if spec.system != "slurm":
        raise PtychodaskError(f"slurm_client: system is {spec.system!r}, expected 'slurm'")
    if at_most is not None and at_most < spec.n_workers:
        raise PtychodaskError(f"slurm_client: at_most is {at_most}, expected {spec.n_workers} or more")
    try:
        jobqueue = import_module("dask_jobqueue")
    except ImportError as error:
        raise PtychodaskError("slurm_client: needs dask-jobqueue; pip install 'ptychodask[hpc]'") from error
    folder = Path(tempfile.mkdtemp(prefix=f".{spec.name}-", dir=job_folder(spec, Path.cwd())))
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        security = write_credentials(folder / "tls")
        scheduler = {"dashboard_address": LOOPBACK} | _listen_options(spec, host, security)
        with dask.config.set({"distributed.scheduler.worker-ttl": HUNG_AFTER}):
            cluster = cleanup.enter_context(
                jobqueue.SLURMCluster(security=security, scheduler_options=scheduler, **_job_options(spec, folder))
            )
        # Checked now, because a later refusal is only logged while the client waits for workers.
        sbatch(cluster.job_script(), "--test-only")
        cluster.adapt(minimum_jobs=spec.n_workers, maximum_jobs=at_most or spec.n_workers)
        client = _OwningClient(cluster, security=security)
        cleanup.pop_all()
    client.folder = folder
    return client


def _listen_options(spec: JobSpec, host: str | None, security: Security) -> dict[str, str]:
    """Interface or address that the scheduler listens on."""
    if host is None and spec.interface is not None:
        return {"interface": spec.interface}
    host = os.uname().nodename if host is None else host
    check_host(host, security)
    return {"host": host}


def _job_options(spec: JobSpec, folder: Path) -> dict[str, Any]:
    """Fields of a spec as arguments of dask-jobqueue, quoted."""
    named = {"qos": spec.qos, "constraint": spec.constraint, "gres": "gpu:1" if spec.gpus else None}
    extra = ["--dashboard-address", LOOPBACK, "--no-dashboard"]
    extra += ["--resources", "GPU=1"] if spec.gpus else []
    if spec.seconds > 4 * LEAVES_BEFORE_S:
        extra += ["--lifetime", f"{spec.seconds - LEAVES_BEFORE_S}s", "--lifetime-stagger", "30s"]
    mib = spec.memory_bytes // MIB
    return {
        "job_name": shlex.quote(spec.name),
        "queue": None if spec.partition is None else shlex.quote(spec.partition),
        "account": None if spec.account is None else shlex.quote(spec.account),
        "walltime": spec.clock_time,
        "cores": THREADS_PER_WORKER,
        "processes": 1,
        "memory": f"{mib}MiB",
        "job_cpu": spec.cpus,
        "job_mem": f"{mib + NANNY_MIB}M",
        "interface": spec.interface,
        "local_directory": shlex.quote(spec.scratch) if spec.scratch is not None else '"${TMPDIR:-/tmp}"',
        "log_directory": str(folder),
        "death_timeout": JOINS_WITHIN,
        "python": shlex.quote(spec.python),
        "job_extra_directives": [
            *(f"--{name}={shlex.quote(value)}" for name, value in named.items() if value is not None),
            *spec.directives,
        ],
        "job_script_prologue": prologue(spec),
        "worker_extra_args": extra,
    }


def gpu_client(
    devices: Sequence[int | str] | None = None, *, host: str = LOOPBACK_HOST, security: Security | None = None
) -> Client:
    """A client with a worker process for each GPU of this machine.

    Parameters
    ----------
    devices : sequence of int or str, optional
        Numbers or UUIDs of GPUs; by default those of ``CUDA_VISIBLE_DEVICES``, else all that ``nvidia-smi`` lists.
    host : str
        Address or name of this machine that scheduler and workers listen on. There are no dashboards.
    security : distributed.Security, optional
        See `local_client`.

    Returns
    -------
    distributed.Client
        The active client. Each worker sees only its own GPU and advertises ``GPU: 1``. Closing the client ends the
        workers; it is a context manager.

    Raises
    ------
    PtychodaskError
        If there is no GPU, one is given twice, or this machine cannot listen on `host`.

    Notes
    -----
    Does not use dask-cuda, because each of its releases requires one version of Dask.
    """
    named = _visible_devices() if devices is None else [str(device) for device in devices]
    if not named:
        raise PtychodaskError("gpu_client: no GPU found or given, expected one or more; without a GPU use local_client")
    if len(set(named)) < len(named):
        raise PtychodaskError(f"gpu_client: devices are {', '.join(named)}, expected no duplicates; pass each GPU once")
    check_host(host, security)
    shared = {"host": host, "protocol": "tcp" if security is None else "tls", "security": security}
    shared |= {"dashboard_address": LOOPBACK}
    worker = shared | {
        "nthreads": THREADS_PER_WORKER,
        "resources": {"GPU": 1},
        "memory_limit": MEMORY_LIMIT // len(named),
        "silence_logs": logging.CRITICAL,
    }
    environment = worker_variables(max(1, (os.cpu_count() or 1) // len(named)))
    workers = {
        device: {"cls": Nanny, "options": worker | {"env": environment | {"CUDA_VISIBLE_DEVICES": device}}}
        for device in named
    }
    scheduler = {"cls": Scheduler, "options": shared | {"dashboard": False}}
    with dask.config.set({"distributed.scheduler.worker-ttl": HUNG_AFTER}):
        cluster = SpecCluster(workers, scheduler, security=security, silence_logs=logging.CRITICAL)
    return _OwningClient(cluster, security=security)


def _visible_devices() -> list[str]:
    """Numbers or UUIDs of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device.strip() for device in given.split(",") if device.strip()]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split()
