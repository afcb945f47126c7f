"""Where tasks run: the active Dask client, one inside this process, or worker processes on this machine."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dask
from dask.utils import key_split
from distributed import Client, LocalCluster, Security, Worker, WorkerPlugin, core

from ptychodask.progress import quiet_stderr
from ptychodask.scan import PtychodaskError, in_brief

logger = logging.getLogger(__name__)

IN_PROCESS = "inproc://"
"""How addresses of workers begin that live in the client's process."""

_PARCELS: dict[str, Any] = {}

THREADS_PER_WORKER = 2
"""One thread reads and sums while the other predicts."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
"""Environment variables by which a process learns how many threads its libraries may start."""

WORKER_VARIABLES = {"MALLOC_ARENA_MAX": "2"}
"""Of worker processes: the C library keeps fewer heaps, which freed memory would be spread over."""

LOOPBACK_HOST = "127.0.0.1"
"""What clusters listen on unless they are told otherwise: only this machine reaches it."""

LOOPBACK = f"{LOOPBACK_HOST}:0"
"""Address of Dask's own servers: a free port that only this machine reaches, where the default is every interface."""

SCRATCH = "dask-scratch-space"
"""Part of the names of folders that workers make and remove."""

HUNG_AFTER = "60s"
"""How long a worker process may be silent until its own results are computed by others, and it is started anew."""

TAKEN_BACK_WITHIN_S = 10.0
"""How long all workers may take to let go of a parcel."""

ANSWER_WITHIN = "10s"
"""How long a scheduler that is named by its address may take to answer."""

QUIET = {
    "dashboard_address": LOOPBACK,
    "scheduler_kwargs": {"dashboard": False},
    # Errors of tasks reach the caller as exceptions; Dask's own log of them would only repeat them.
    "silence_logs": logging.CRITICAL,
}
"""How clusters of this process are started, beside their size."""


def active_client() -> Client | None:
    """The Dask client that is active here, or None."""
    try:
        return Client.current()
    except ValueError:
        return None


@contextmanager
def _started(**options: Any) -> Iterator[LocalCluster]:
    """A cluster of this machine, closed in the end.

    Dask's statistical profiler stays off in it: it looks at all threads a hundred times a second, which now and then
    never ends (CPython 3.11, `sys._current_frames`; seen once in 1600 rounds of `tests/soak.py`).
    """
    settings = {"distributed.worker.profile.enabled": False, "distributed.scheduler.worker-ttl": HUNG_AFTER}
    # As long as the cluster lives, for worker processes that are started anew read them too.
    with dask.config.set(settings), LocalCluster(**QUIET, **options) as cluster:
        yield cluster


@contextmanager
def _forgotten_when_closed() -> Iterator[None]:
    """Let go of the schedulers and workers of a block, which stay in caches of the whole process.

    Seen in distributed 2026.8: it keeps their methods (a quarter of a megabyte for each cluster of this process) and
    the names of their tasks, and Python keeps what it knows of the workers' scratch folders, which were on its path.
    """
    try:
        yield
    finally:
        cached = getattr(core, "_expects_comm", None)
        if cached is not None and hasattr(cached, "cache_clear"):
            cached.cache_clear()
        key_split.cache_clear()
        for place in [place for place in sys.path_importer_cache if SCRATCH in place]:
            if not Path(place).exists():
                sys.path_importer_cache.pop(place, None)


@contextmanager
def in_process_client() -> Iterator[Client]:
    """A client whose one worker lives in this process and shares its memory, closed in the end.

    Yields
    ------
    distributed.Client
        Not the active one, so that other threads of this process do not come to depend on it.
    """
    with (
        _forgotten_when_closed(),
        _started(
            processes=False,
            n_workers=1,
            threads_per_worker=THREADS_PER_WORKER,
            worker_dashboard_address=LOOPBACK,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def local_client(n_workers: int, *, security: Security | None = None, host: str = LOOPBACK_HOST) -> Iterator[Client]:
    """A client with worker processes on this machine, the processor's cores divided among them, closed in the end.

    Parameters
    ----------
    n_workers : int
        Worker processes.
    security : distributed.Security, optional
        Encrypts and authenticates all that they say to each other; ``Security.temporary()`` makes credentials that
        live in this process and its workers. Without it, whoever reaches `host` can connect.
    host : str
        Address or name of this machine that scheduler and workers listen on; by default the loopback interface alone.
        Dashboards stay there in any case.

    Yields
    ------
    distributed.Client
        The active one until it is closed.

    Raises
    ------
    PtychodaskError
        If `n_workers` is not positive, or `host` is not of this machine.
    """
    if n_workers < 1:
        raise PtychodaskError(f"local_client: n_workers is {n_workers}, expected 1 or more")
    check_host(host, security)
    threads = str(max(1, (os.cpu_count() or 1) // n_workers))
    with (
        _forgotten_when_closed(),
        _started(
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
    """Loads the network library when a worker starts, its notes kept off the terminal."""

    name = "ptychodask-quiet-start"

    def setup(self, worker: Worker) -> None:
        with quiet_stderr():
            import_module("ptychodask.models.model")


def check_host(host: str, security: Security | None) -> None:
    """Raise `PtychodaskError` unless this machine can listen on `host`; warn where strangers could connect.

    Parameters
    ----------
    host : str
        Address or name.
    security : distributed.Security or None
        What protects it there.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise PtychodaskError(
            f"host {host!r}: this machine cannot listen there ({in_brief(error)}); give one of its own addresses, or "
            f"{LOOPBACK_HOST}"
        ) from error
    if security is None and not ip_address(address[0]).is_loopback:
        logger.warning("whoever reaches %s can run code in this cluster: encrypt it (--tls, security=)", host)


@contextmanager
def connected_client(address: str, *, security: Security | None = None) -> Iterator[Client]:
    """A client of a scheduler that is running already, closed in the end.

    Parameters
    ----------
    address : str
        Such as ``tcp://127.0.0.1:8786``, or ``tls://...`` with `security`; or the file that ``dask scheduler
        --scheduler-file`` wrote.
    security : distributed.Security, optional
        Credentials that the scheduler knows (see `credentials_in`).

    Yields
    ------
    distributed.Client
        The active one until it is closed.

    Raises
    ------
    PtychodaskError
        If no scheduler answers there, or the file is no such file.
    """
    address = _address_in(Path(address)) if Path(address).is_file() else address
    options = {"set_as_default": False, "timeout": ANSWER_WITHIN, "security": security}
    try:
        try:
            client = Client(address, **options)
        except AssertionError:
            # Dask's handshake asserts that no other message comes with it, which one does at times (2026.8).
            client = Client(address, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise PtychodaskError(
            f"{address}: no Dask scheduler answers ({in_brief(error)}); give the address that dask scheduler prints, "
            "and where that begins with tls:// the folder of its credentials (--tls-folder)"
        ) from error
    with client:
        yield client


def _address_in(file: Path) -> str:
    """The address that a scheduler wrote into a file."""
    try:
        return str(json.loads(file.read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PtychodaskError(
            f"{file}: holds no address of a Dask scheduler ({in_brief(error)}); expected what dask scheduler "
            "--scheduler-file writes"
        ) from error


def temporary_credentials() -> Security:
    """Credentials of one cluster, made anew and kept in memory.

    Raises
    ------
    PtychodaskError
        If the package that makes them is not installed.
    """
    try:
        return Security.temporary()
    except ImportError as error:
        raise PtychodaskError("tls: needs the package cryptography; pip install 'ptychodask[tls]'") from error


AUTHORITY, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
"""Files of a folder of credentials: the authority that all sides trust, a certificate of its, and the key."""

ROLES = ("scheduler", "worker", "client")


def write_credentials(folder: str | Path) -> Security:
    """Make credentials of one cluster, in a folder that only its owner can open.

    Parameters
    ----------
    folder : path
        The folder to make, with mode 0700; its files have mode 0600.

    Returns
    -------
    distributed.Security
        As `credentials_in` gives it.

    Raises
    ------
    PtychodaskError
        If the folder exists already, cannot be made, or the package that makes credentials is not installed.
    """
    folder = Path(folder)
    made = temporary_credentials().get_tls_config_for_role("client")
    try:
        folder.mkdir(mode=0o700)
        for name, content in ((AUTHORITY, made["ca_file"]), (CERTIFICATE, made["cert"]), (KEY, made["key"])):
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(content)
    except OSError as error:
        raise PtychodaskError(
            f"{folder}: credentials cannot be written ({error.strerror}); expected a folder that is new, where this "
            "user may write"
        ) from error
    return credentials_in(folder)


def credentials_in(folder: str | Path) -> Security:
    """Credentials for a cluster that speaks TLS, for each side of it.

    Parameters
    ----------
    folder : path
        Holds ``ca.pem``, the authority that both sides trust, ``cert.pem`` and ``key.pem``.

    Returns
    -------
    distributed.Security

    Raises
    ------
    PtychodaskError
        If a file is missing.
    """
    folder = Path(folder)
    for name in (AUTHORITY, CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise PtychodaskError(
                f"{folder}: holds no {name}; expected {AUTHORITY}, {CERTIFICATE}, {KEY}: the authority that scheduler "
                "and client trust, and a certificate of its with the key"
            )
    pairs = {
        f"tls_{role}_{what}": str(folder / name)
        for role in ROLES
        for what, name in (("cert", CERTIFICATE), ("key", KEY))
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / AUTHORITY), **pairs)


@dataclass(frozen=True)
class Broadcast:
    """Something large that lies in every process of a cluster while a run is at work; tasks carry its key alone."""

    key: str

    def open(self) -> Any:
        """What is inside."""
        return _PARCELS[self.key]


class _Delivery(WorkerPlugin):
    """Puts a parcel into each worker's process, also of one that joins late."""

    def __init__(self, key: str, content: Any) -> None:
        self.name = key
        self._content = content

    def setup(self, worker: Worker) -> None:
        _PARCELS.setdefault(self.name, self._content)

    def teardown(self, worker: Worker) -> None:
        # A worker inside the client's process leaves it to the client, which may have other workers beside it.
        if not worker.address.startswith(IN_PROCESS):
            _PARCELS.pop(self.name, None)


@contextmanager
def broadcast(client: Client, content: Any) -> Iterator[Broadcast]:
    """A parcel that tasks of a client open while the block lasts.

    Parameters
    ----------
    client : distributed.Client
    content : object
        Sent once to each process that is not this one.

    Yields
    ------
    Parcel

    Notes
    -----
    Data that are scattered to all workers do not stay with all of them: the scheduler's memory manager removes what it
    takes for needless copies.
    """
    parcel = Broadcast(f"ptychodask-{uuid.uuid4().hex}")
    _PARCELS[parcel.key] = content
    workers = client.scheduler_info(n_workers=-1)["workers"]
    elsewhere = not workers or not all(address.startswith(IN_PROCESS) for address in workers)
    if elsewhere:
        client.register_plugin(_Delivery(parcel.key, content))
    try:
        yield parcel
    finally:
        _PARCELS.pop(parcel.key, None)
        if elsewhere and client.status == "running":
            # A worker that hangs would never answer.
            taking_back = threading.Thread(target=_take_back, args=(client, parcel.key), daemon=True)
            taking_back.start()
            taking_back.join(TAKEN_BACK_WITHIN_S)


def _take_back(client: Client, key: str) -> None:
    # The scheduler, or a worker, may be gone by now, and the parcel with it.
    with suppress(OSError, RuntimeError, ValueError):
        client.unregister_worker_plugin(key)


@contextmanager
def client_for_run(client: Client | None) -> Iterator[Client]:
    """The client that a run uses: the given one, else the active one, else one in this process, closed in the end.

    Parameters
    ----------
    client : distributed.Client or None

    Yields
    ------
    distributed.Client
    """
    found = client if client is not None else active_client()
    if found is not None:
        yield found
        return
    with in_process_client() as own:
        logger.info("no Dask client is active: running in this process")
        yield own
