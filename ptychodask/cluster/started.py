"""Clients of clusters that start with them: on SLURM, worker by worker, or on the GPUs of this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Security

from ptychodask.cluster import (
    HUNG_AFTER,
    LOOPBACK,
    LOOPBACK_HOST,
    THREADS_PER_WORKER,
    check_host,
    write_credentials,
)
from ptychodask.cluster.job import MIB, JobSpec, job_folder
from ptychodask.cluster.submission import prologue, sbatch
from ptychodask.scan import PtychodaskError, in_brief, with_fields

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


def gpu_client(*, host: str = LOOPBACK_HOST, security: Security | None = None) -> Client:
    """A client with a worker for each GPU of this machine, through dask-cuda.

    Parameters
    ----------
    host : str
        Address or name of this machine that scheduler and workers listen on.
    security : distributed.Security, optional
        See `local_client`.

    Returns
    -------
    distributed.Client
        The active one. Each worker sees its own GPU in front of the others, and advertises ``GPU: 1``. Closing the
        client ends them; it is a context manager.

    Raises
    ------
    PtychodaskError
        If dask-cuda is not installed, or finds no GPU.
    """
    check_host(host, security)
    try:
        dask_cuda = import_module("dask_cuda")
    except ImportError as error:
        raise PtychodaskError(
            "gpu_client: needs dask-cuda; pip install dask-cuda, or start a worker on each GPU yourself: "
            "CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --resources GPU=1"
        ) from error
    options = {"threads_per_worker": THREADS_PER_WORKER, "resources": {"GPU": 1}, "dashboard_address": LOOPBACK}
    try:
        return _OwningClient(dask_cuda.LocalCUDACluster(host=host, security=security, **options), security=security)
    except (OSError, RuntimeError, ValueError) as error:
        raise PtychodaskError(f"gpu_client: dask-cuda starts no worker: {in_brief(error)}") from error
