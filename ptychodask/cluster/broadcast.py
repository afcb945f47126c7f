"""One value sent to each worker once."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, Worker, WorkerPlugin

IN_PROCESS = "inproc://"
"""Prefix of the addresses of workers inside the client's process."""


_BROADCASTS: dict[str, Any] = {}
"""Contents of the broadcasts that are open in this process, by key."""


REMOVED_WITHIN_S = 10.0
"""Time that all workers may take to remove a broadcast, in seconds."""


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
def shared_here(content: Any) -> Iterator[Broadcast]:
    """An object shared with the tasks of this process, for a block."""
    sent = Broadcast(f"ptychodask-{uuid.uuid4().hex}")
    _BROADCASTS[sent.key] = content
    try:
        yield sent
    finally:
        _BROADCASTS.pop(sent.key, None)


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
    with shared_here(content) as sent:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if workers and all(address.startswith(IN_PROCESS) for address in workers):
            yield sent
            return
        client.register_plugin(_Delivery(sent.key, content))
        try:
            yield sent
        finally:
            if client.status == "running":
                # In a thread with a time limit, because a hanging worker would never answer.
                removal = threading.Thread(target=_remove_from_workers, args=(client, sent.key), daemon=True)
                removal.start()
                removal.join(REMOVED_WITHIN_S)


def _remove_from_workers(client: Client, key: str) -> None:
    # The scheduler or a worker may have ended by now, and the broadcast with it.
    with suppress(OSError, RuntimeError, ValueError):
        client.unregister_worker_plugin(key)
