"""The disk under an HDF5 file that is being written: HDF5 crashes its process where a disk, or a signal, breaks in."""

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
"""Signals that Python answers by an exception, wherever it is."""


class Hdf5Disk(io.FileIO):
    """A new file for ``h5py.File(disk, "w")``: what the disk refuses, and signals, wait until HDF5 is not at work.

    A context manager to open around that of the HDF5 file.

    Parameters
    ----------
    path : Path
        File to make.

    Raises
    ------
    OSError
        From `between`, and at the end, if the disk refused anything.

    Notes
    -----
    HDF5 that meets a full disk cannot close its file, tries again when the process ends, and crashes it; so does an
    exception that a signal raises while HDF5 has this file write. So HDF5 is told that all went well, nothing more is
    written, and signals are answered between blocks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._refusal: OSError | None = None
        self._came: list[int] = []
        self._answers: dict[int, Any] = {}

    def __enter__(self) -> Hdf5Disk:
        self._hold()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self._refusal is None or isinstance(raised[1], KeyboardInterrupt | SystemExit):
            self._answer()
            return
        self._answer()
        raise self._refusal

    def between(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks that a file is written from: signals are answered while one is made, and a refusal ends them."""
        making = iter(blocks)
        while True:
            if self._refusal is not None:
                raise self._refusal
            self._answer()
            try:
                block = next(making)
            except StopIteration:
                return
            finally:
                self._hold()
            yield block

    def write(self, data: Any) -> int:
        """Write all of `data`, or remember why not."""
        left = memoryview(data).cast("B")
        n_bytes = len(left)
        try:
            while len(left) and self._refusal is None:
                left = left[super().write(left) :]
        except OSError as error:
            self._refusal = error
        return n_bytes

    def truncate(self, size: int | None = None) -> int:
        """Give the file its length, or remember why not."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._refusal = self._refusal or error
            return size or 0

    def _hold(self) -> None:
        """Let signals wait; only the main thread is broken by them, and may say what becomes of them."""
        if threading.current_thread() is threading.main_thread():
            self._answers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def _answer(self) -> None:
        """Give signals back to who had them, the first that came among them."""
        for number, answer in self._answers.items():
            # None stands for an answer that is not Python's, which cannot be given back.
            signal.signal(number, signal.SIG_DFL if answer is None else answer)
        self._answers = {}
        if self._came:
            signal.raise_signal(self._came.pop(0))
