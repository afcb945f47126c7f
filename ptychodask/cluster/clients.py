"""Dask clients: in this process, on this machine, SLURM or GPUs."""

from __future__ import annotations

import ast
import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dask
from dask.utils import key_split
from distributed import Client, LocalCluster, Nanny, Scheduler, Security, SpecCluster, Worker, WorkerPlugin, core
from distributed.system import MEMORY_LIMIT

from ptychodask.cluster.job import (
    LOOPBACK,
    LOOPBACK_HOST,
    MIB,
    THREAD_VARIABLES,
    THREADS_PER_WORKER,
    WORKER_VARIABLES,
    JobSpec,
    job_folder,
)
from ptychodask.cluster.submission import prologue, sbatch, worker_variables
from ptychodask.cluster.tls import write_credentials
from ptychodask.errors import PtychodaskError, in_brief, with_fields
from ptychodask.options import takes_fields
from ptychodask.progress import quiet_stderr

logger = logging.getLogger(__name__)


SCRATCH = "dask-scratch-space"
"""Part of the names of folders that workers create and remove."""


HUNG_AFTER = "60s"
"""Time without contact after which a worker is restarted and its results are recomputed by others."""


ANSWER_WITHIN = "10s"
"""Time that a scheduler may take to answer."""


QUIET = {
    "dashboard_address": LOOPBACK,
    "scheduler_kwargs": {"dashboard": False},
    # Errors of tasks are raised in the caller; Dask's log would only repeat them.
    "silence_logs": logging.CRITICAL,
}
"""Options of clusters started by this process, except for their size."""


def active_client() -> Client | None:
    """The active Dask client, or None."""
    try:
        return Client.current()
    except ValueError:
        return None


def check_client(client: Client) -> Client:
    """Return a client; raise `PtychodaskError` unless calls can wait for its results.

    Parameters
    ----------
    client : distributed.Client
    """
    if client.asynchronous:
        raise PtychodaskError(
            "the Dask client is asynchronous, and waiting for its results would block its event loop for ever; make "
            "one without asynchronous=True (in a notebook too), or pass one as client="
        )
    if client.status != "running":
        raise PtychodaskError(f"the Dask client is {client.status}; make a new one, or pass an open one as client=")
    return client


@contextmanager
def _local_cluster(**options: Any) -> Iterator[LocalCluster]:
    """A cluster on this machine, closed at the end of the block.

    Dask's statistical profiler is turned off: it samples all threads a hundred times a second, and such a sample
    can hang (CPython 3.11, `sys._current_frames`; seen once in 1600 rounds of `tests/campaigns/soak.py`).
    """
    settings = {"distributed.worker.profile.enabled": False, "distributed.scheduler.worker-ttl": HUNG_AFTER}
    # Kept until the cluster is closed, because restarted worker processes read the settings too.
    with dask.config.set(settings), LocalCluster(**QUIET, **options) as cluster:
        yield cluster


def _check_main_guard(function: str) -> None:
    """Raise `PtychodaskError` if a script starts worker processes when it is imported.

    A new worker process imports the script of its parent, and would start workers itself.
    """
    if dask.config.get("distributed.worker.multiprocessing-method") == "fork":
        return
    line = _line_of_script()
    if line is not None and not _is_guarded(*line):
        raise PtychodaskError(
            f"{function}: line {line[1]} of {line[0]} also runs when a worker process imports the script; put it under "
            "if __name__ == '__main__':"
        )


def _line_of_script() -> tuple[Path, int] | None:
    """Line of the main script that is running.

    None in a notebook, a thread, or without a script.
    """
    main = sys.modules.get("__main__")
    path, frame = getattr(main, "__file__", None), sys._getframe()
    while frame is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None or path is None else (Path(path), frame.f_lineno)


def _is_guarded(script: Path, line: int) -> bool:
    """True if a line is below a condition on ``__name__``.

    Also if the script cannot be read.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "__name__" in ast.dump(node.test)]
    return any(node.lineno <= line <= (node.end_lineno or line) for node in conditions)


@contextmanager
def _caches_cleared() -> Iterator[None]:
    """Clear global caches that keep closed schedulers and workers in memory.

    distributed 2026.8 caches their methods (a quarter of a megabyte for each cluster of this process) and the names
    of their tasks, and Python caches the importers of the workers' scratch folders, which were on its path.
    """
    try:
        yield
    finally:
        cached = getattr(core, "_expects_comm", None)
        if cached is not None and hasattr(cached, "cache_clear"):
            cached.cache_clear()
        key_split.cache_clear()
        for folder in [folder for folder in sys.path_importer_cache if SCRATCH in folder]:
            if not Path(folder).exists():
                sys.path_importer_cache.pop(folder, None)


@contextmanager
def in_process_client() -> Iterator[Client]:
    """A client with one worker inside this process, closed at the end.

    Yields
    ------
    distributed.Client
        Not set as the active client, so that other threads of this process do not use it. The worker shares the
        memory of this process.
    """
    with (
        _caches_cleared(),
        _local_cluster(
            processes=False,
            n_workers=1,
            threads_per_worker=THREADS_PER_WORKER,
            memory_limit=MEMORY_LIMIT,
            worker_dashboard_address=LOOPBACK,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        # Dask would pause it while this process, with all else that it holds, uses more than a share of the memory: for
        # ever, since the run frees none of that.
        for worker in cluster.workers.values():
            worker.memory_manager.memory_pause_fraction = False
        yield client


@contextmanager
def local_client(n_workers: int, *, security: Security | None = None, host: str = LOOPBACK_HOST) -> Iterator[Client]:
    """A client with worker processes on this machine, closed at the end.

    The cores are divided among the workers.

    Parameters
    ----------
    n_workers : int
        Worker processes.
    security : distributed.Security, optional
        Encrypts and authenticates the communication; ``Security.temporary()`` creates credentials that are kept in
        the memory of this process and its workers. Without it, anyone who can reach `host` can connect.
    host : str
        Address or name of this machine that scheduler and workers listen on; by default the loopback interface.
        Dashboards always use the loopback interface.

    Yields
    ------
    distributed.Client
        The active client until it is closed.

    Raises
    ------
    PtychodaskError
        If `n_workers` is not positive, `host` is not an address of this machine, or a script calls this outside of
        ``if __name__ == "__main__":``.
    """
    if n_workers < 1:
        raise PtychodaskError(f"local_client: n_workers is {n_workers}, expected 1 or more")
    _check_main_guard("local_client")
    check_host(host, security)
    threads = str(max(1, (os.cpu_count() or 1) // n_workers))
    with (
        _caches_cleared(),
        _local_cluster(
            processes=True,
            n_workers=n_workers,
            threads_per_worker=THREADS_PER_WORKER,
            host=host,
            worker_dashboard_address=LOOPBACK,
            security=security,
            env=dict.fromkeys(THREAD_VARIABLES, threads) | WORKER_VARIABLES,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(_QuietStart())
        yield client


class _QuietStart(WorkerPlugin):
    """Worker plugin: import the network library at start, with its messages suppressed."""

    name = "ptychodask-quiet-start"

    def setup(self, worker: Worker) -> None:
        with quiet_stderr():
            import_module("ptychodask.models.model")


def check_host(host: str, security: Security | None) -> None:
    """Raise `PtychodaskError` unless this machine can listen on `host`.

    Logs a warning if others can connect without credentials.

    Parameters
    ----------
    host : str
        Address or name.
    security : distributed.Security or None
        Credentials of the cluster.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise PtychodaskError(
            f"host {host!r}: this machine cannot listen on it ({in_brief(error)}); pass an address of this machine, or "
            f"{LOOPBACK_HOST}"
        ) from error
    if security is None and not ip_address(address[0]).is_loopback:
        logger.warning("anyone who can reach %s can run code in this cluster; encrypt it (--tls, security=)", host)


@contextmanager
def connected_client(address: str, *, security: Security | None = None) -> Iterator[Client]:
    """A client of a running scheduler, closed at the end.

    Parameters
    ----------
    address : str
        Such as ``tcp://127.0.0.1:8786``, or ``tls://...`` with `security`; or the file written by ``dask scheduler
        --scheduler-file``.
    security : distributed.Security, optional
        Credentials accepted by the scheduler (see `credentials_in`).

    Yields
    ------
    distributed.Client
        The active client until it is closed.

    Raises
    ------
    PtychodaskError
        If no scheduler answers, or the file contains no address.
    """
    address = _address_in(Path(address)) if Path(address).is_file() else address
    options = {"set_as_default": False, "timeout": ANSWER_WITHIN, "security": security}
    try:
        try:
            client = Client(address, **options)
        except AssertionError:
            # Dask's handshake asserts that no other message arrives with it, but sometimes one does (2026.8).
            client = Client(address, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise PtychodaskError(
            f"{address}: no Dask scheduler answers ({in_brief(error)}); pass the address that dask scheduler prints, "
            "and if it begins with tls://, the folder of its credentials (--tls-folder)"
        ) from error
    with client:
        yield client


def _address_in(file: Path) -> str:
    """Address in a scheduler file."""
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PtychodaskError(
            f"{file}: contains no address of a Dask scheduler ({in_brief(error)}); expected a file written by dask "
            "scheduler --scheduler-file"
        ) from error


@contextmanager
def client_for_run(client: Client | None) -> Iterator[Client]:
    """Client of a run: the given, the active, or a new one.

    A new one runs in this process and is closed at the end.

    Parameters
    ----------
    client : distributed.Client or None

    Yields
    ------
    distributed.Client

    Raises
    ------
    PtychodaskError
        If the client is asynchronous or closed.
    """
    existing = client if client is not None else active_client()
    if existing is not None:
        yield check_client(existing)
        return
    with in_process_client() as started:
        logger.info("no Dask client is active: running in this process")
        yield started


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


@takes_fields(JobSpec)
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
        If there is no GPU, one is given twice, this machine cannot listen on `host`, or a script calls this outside of
        ``if __name__ == "__main__":``.

    Notes
    -----
    Does not use dask-cuda, because each of its releases requires one version of Dask.
    """
    named = _visible_devices() if devices is None else [str(device) for device in devices]
    if not named:
        raise PtychodaskError("gpu_client: no GPU found or given, expected one or more; without a GPU use local_client")
    if len(set(named)) < len(named):
        raise PtychodaskError(f"gpu_client: devices are {', '.join(named)}, expected no duplicates; pass each GPU once")
    _check_main_guard("gpu_client")
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
