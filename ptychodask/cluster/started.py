"""Clients of clusters that start with them: on SLURM, worker by worker, or on the GPUs of this machine."""

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
from ptychodask.scan import PtychodaskError, with_fields

NANNY_MIB = 256
"""Memory of a worker's job beside the worker itself."""

JOINS_WITHIN = 120
"""How long a worker looks for its scheduler, in seconds."""

LEAVES_BEFORE_S = 90
"""How long before its job's time is over a worker hands over what it holds, and another takes its place."""


class _OwningClient(Client):
    """A client that closes its cluster with itself, and takes a folder away."""

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
    """A client whose workers are SLURM jobs, one job each; the scheduler lives here, in this process.

    Parameters
    ----------
    spec : JobSpec
        Each job gets one worker with its `cpus`, `memory`, `time` and, with `gpus`, one GPU.
    at_most : int, optional
        Workers when there is much to do; by default as many as `spec` asks for. Jobs that end are replaced.
    host : str, optional
        Address or name of this machine that the nodes reach; by default the address of the interface of `spec`, or the
        machine's own name. What is said is encrypted, and who has no certificate is refused.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    distributed.Client
        The active one. Closing it ends the workers' jobs; it is a context manager. Until then their logs lie in a
        folder of mode 0700 inside the spec's `folder`, by default the working directory.

    Raises
    ------
    PtychodaskError
        If dask-jobqueue is not installed, there is no ``sbatch`` here, it refuses such jobs, or this machine does not
        listen on `host`.

    Notes
    -----
    Through dask-jobqueue, with adaptive scaling: ``scale`` alone would not replace a worker whose job was lost. Every
    worker advertises ``GPU: 1`` when it has one.

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
    with ExitStack() as undone:
        undone.callback(shutil.rmtree, folder, ignore_errors=True)
        security = write_credentials(folder / "tls")
        scheduler = {"dashboard_address": LOOPBACK} | _listens_on(spec, host, security)
        with dask.config.set({"distributed.scheduler.worker-ttl": HUNG_AFTER}):
            cluster = undone.enter_context(
                jobqueue.SLURMCluster(security=security, scheduler_options=scheduler, **_job_options(spec, folder))
            )
        # Later refusals would only be logged, while the client waits for workers.
        sbatch(cluster.job_script(), "--test-only")
        cluster.adapt(minimum_jobs=spec.n_workers, maximum_jobs=at_most or spec.n_workers)
        client = _OwningClient(cluster, security=security)
        undone.pop_all()
    client.folder = folder
    return client


def _listens_on(spec: JobSpec, host: str | None, security: Security) -> dict[str, str]:
    """Where the scheduler listens."""
    if host is None and spec.interface is not None:
        return {"interface": spec.interface}
    host = os.uname().nodename if host is None else host
    check_host(host, security)
    return {"host": host}


def _job_options(spec: JobSpec, folder: Path) -> dict[str, Any]:
    """What dask-jobqueue calls the fields of a spec; it quotes nothing itself."""
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
        Address or name of this machine that scheduler and workers listen on; dashboards there are none.
    security : distributed.Security, optional
        See `local_client`.

    Returns
    -------
    distributed.Client
        The active one. Each worker sees its own GPU alone and advertises ``GPU: 1``. Closing the client ends them; it
        is a context manager.

    Raises
    ------
    PtychodaskError
        If there is no GPU, one is named twice, or this machine does not listen on `host`.

    Notes
    -----
    Not through dask-cuda, whose releases are bound to one version of Dask each.
    """
    named = _visible_devices() if devices is None else [str(device) for device in devices]
    if not named or len(set(named)) < len(named):
        raise PtychodaskError(
            f"gpu_client: devices are {', '.join(named) or 'none'}, expected one or more, each once; without "
            "a GPU take local_client"
        )
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
    """GPUs that this process may use."""
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
