"""Dask clients of runs, their credentials, and broadcasts to workers."""

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

from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.progress import quiet_stderr

logger = logging.getLogger(__name__)

IN_PROCESS = "inproc://"
"""Prefix of the addresses of workers inside the client's process."""

_BROADCASTS: dict[str, Any] = {}
"""Contents of the broadcasts that are open in this process, by key."""

THREADS_PER_WORKER = 2
"""One thread reads and sums while the other predicts."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
"""Environment variables that limit the number of threads of numerical libraries."""

WORKER_VARIABLES = {"MALLOC_ARENA_MAX": "2"}
"""Environment of worker processes: with fewer heaps in the C library, less freed memory stays allocated."""

LOOPBACK_HOST = "127.0.0.1"
"""Default address that clusters listen on: reachable from this machine only."""

LOOPBACK = f"{LOOPBACK_HOST}:0"
"""Address for dashboards: a free port reachable from this machine only; Dask's default is all interfaces."""

SCRATCH = "dask-scratch-space"
"""Part of the names of folders that workers create and remove."""

HUNG_AFTER = "60s"
"""Time without contact after which a worker is restarted and its results are recomputed by others."""

REMOVED_WITHIN_S = 10.0
"""Time that all workers may take to remove a broadcast, in seconds."""

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


@contextmanager
def _local_cluster(**options: Any) -> Iterator[LocalCluster]:
    """A cluster on this machine, closed at the end of the block.

    Dask's statistical profiler is turned off: it samples all threads a hundred times a second, and such a sample
    can hang (CPython 3.11, `sys._current_frames`; seen once in 1600 rounds of `tests/soak.py`).
    """
    settings = {"distributed.worker.profile.enabled": False, "distributed.scheduler.worker-ttl": HUNG_AFTER}
    # Kept until the cluster is closed, because restarted worker processes read the settings too.
    with dask.config.set(settings), LocalCluster(**QUIET, **options) as cluster:
        yield cluster


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
            worker_dashboard_address=LOOPBACK,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
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
        If `n_workers` is not positive, or `host` is not an address of this machine.
    """
    if n_workers < 1:
        raise PtychodaskError(f"local_client: n_workers is {n_workers}, expected 1 or more")
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


def temporary_credentials() -> Security:
    """New credentials of one cluster, kept in memory.

    Raises
    ------
    PtychodaskError
        If the package cryptography is not installed.
    """
    try:
        return Security.temporary()
    except ImportError as error:
        raise PtychodaskError("tls: needs the package cryptography; pip install 'ptychodask[tls]'") from error


AUTHORITY, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
"""Files of a credentials folder: certificate authority, a certificate signed by it, and the key."""

ROLES = ("scheduler", "worker", "client")


def write_credentials(folder: str | Path) -> Security:
    """Create credentials of one cluster in a private folder.

    Parameters
    ----------
    folder : path
        The folder to create, with mode 0700; its files have mode 0600.

    Returns
    -------
    distributed.Security
        The same as `credentials_in` returns for this folder.

    Raises
    ------
    PtychodaskError
        If the folder exists already or cannot be created, or the package cryptography is not installed.
    """
    folder = Path(folder)
    config = temporary_credentials().get_tls_config_for_role("client")
    try:
        folder.mkdir(mode=0o700)
        for name, content in ((AUTHORITY, config["ca_file"]), (CERTIFICATE, config["cert"]), (KEY, config["key"])):
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(content)
    except OSError as error:
        raise PtychodaskError(
            f"{folder}: cannot write credentials ({error.strerror}); expected a new folder, in a folder that this user "
            "may write to"
        ) from error
    return credentials_in(folder)


def credentials_in(folder: str | Path) -> Security:
    """Credentials for a cluster with TLS, read from a folder.

    They are for scheduler, workers and client.

    Parameters
    ----------
    folder : path
        Contains ``ca.pem``, the authority that all sides trust, ``cert.pem`` and ``key.pem``.

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
                f"{folder}: contains no {name}; expected {AUTHORITY}, {CERTIFICATE}, {KEY}: the authority that "
                "scheduler and client trust, a certificate signed by it, and the key of the certificate"
            )
    pairs = {
        f"tls_{role}_{item}": str(folder / name)
        for role in ROLES
        for item, name in (("cert", CERTIFICATE), ("key", KEY))
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / AUTHORITY), **pairs)


@dataclass(frozen=True)
class Broadcast:
    """A large object in every process of a cluster during a run.

    Tasks contain only its key.
    """

    key: str

    def open(self) -> Any:
        """The content, in the process of a task."""
        return _BROADCASTS[self.key]


class _Delivery(WorkerPlugin):
    """Worker plugin: store a broadcast in every worker, including late ones."""

    def __init__(self, key: str, content: Any) -> None:
        self.name = key
        self._content = content

    def setup(self, worker: Worker) -> None:
        _BROADCASTS.setdefault(self.name, self._content)

    def teardown(self, worker: Worker) -> None:
        # Inside the client's process the client removes the content, because its other workers may still use it.
        if not worker.address.startswith(IN_PROCESS):
            _BROADCASTS.pop(self.name, None)


@contextmanager
def broadcast(client: Client, content: Any) -> Iterator[Broadcast]:
    """Send an object to all workers, for the tasks of a block.

    Parameters
    ----------
    client : distributed.Client
    content : object
        Sent once to each other process.

    Yields
    ------
    Broadcast

    Notes
    -----
    ``client.scatter(broadcast=True)`` would not keep the data on all workers: the scheduler's memory manager removes
    copies that it considers redundant.
    """
    sent = Broadcast(f"ptychodask-{uuid.uuid4().hex}")
    _BROADCASTS[sent.key] = content
    workers = client.scheduler_info(n_workers=-1)["workers"]
    elsewhere = not workers or not all(address.startswith(IN_PROCESS) for address in workers)
    if elsewhere:
        client.register_plugin(_Delivery(sent.key, content))
    try:
        yield sent
    finally:
        _BROADCASTS.pop(sent.key, None)
        if elsewhere and client.status == "running":
            # In a thread with a time limit, because a hanging worker would never answer.
            removal = threading.Thread(target=_remove_from_workers, args=(client, sent.key), daemon=True)
            removal.start()
            removal.join(REMOVED_WITHIN_S)


def _remove_from_workers(client: Client, key: str) -> None:
    # The scheduler or a worker may have ended by now, and the broadcast with it.
    with suppress(OSError, RuntimeError, ValueError):
        client.unregister_worker_plugin(key)


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
    """
    existing = client if client is not None else active_client()
    if existing is not None:
        yield existing
        return
    with in_process_client() as started:
        logger.info("no Dask client is active: running in this process")
        yield started
