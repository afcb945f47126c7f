"""Safe file object for HDF5 writes: defers disk errors and signals.

HDF5 crashes its process if a disk error or a signal interrupts a write.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Block = TypeVar("Block")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that raise an exception in Python code at any point."""


class Hdf5Disk(io.FileIO):
    """A new file for ``h5py.File(disk, "w")`` that defers errors and signals.

    Disk errors and signals are raised when HDF5 is not running. Use it as the outer context manager, around that of the
    HDF5 file.

    Parameters
    ----------
    path : Path
        File to create.

    Raises
    ------
    OSError
        From `between`, and on exit, if a write failed.

    Notes
    -----
    After a full disk, HDF5 cannot close its file, tries again when the process ends, and crashes it; an exception
    raised by a signal while HDF5 writes to this file does the same. So HDF5 sees every write succeed, nothing more is
    written after an error, and signals are handled between blocks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._error: OSError | None = None
        self._pending: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Hdf5Disk:
        self._defer_signals()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self._error is None or isinstance(raised[1], KeyboardInterrupt | SystemExit):
            self._restore_signals()
            return
        self._restore_signals()
        raise self._error

    def between(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks to write; signals are handled while computing one.

        A disk error is raised before the next block.
        """
        iterator = iter(blocks)
        while True:
            if self._error is not None:
                raise self._error
            self._restore_signals()
            try:
                block = next(iterator)
            except StopIteration:
                return
            finally:
                self._defer_signals()
            yield block

    def write(self, data: Any) -> int:
        """Write all of `data`, or remember the error."""
        remaining = memoryview(data).cast("B")
        n_bytes = len(remaining)
        try:
            while len(remaining) and self._error is None:
                remaining = remaining[super().write(remaining) :]
        except OSError as error:
            self._error = error
        return n_bytes

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file, or remember the error."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def _defer_signals(self) -> None:
        """Defer signals; only the main thread receives and may handle them."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)

    def _restore_signals(self) -> None:
        """Restore the signal handlers, and raise the first pending signal."""
        for number, handler in self._handlers.items():
            # None stands for a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        if self._pending:
            signal.raise_signal(self._pending.pop(0))
