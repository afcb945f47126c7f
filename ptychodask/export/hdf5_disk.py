"""The disk under an HDF5 file that is being written: HDF5 itself cannot end well when its disk refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class Hdf5Disk(io.FileIO):
    """A new file for ``h5py.File(disk, "w")`` that keeps what the disk refuses to itself until HDF5 has closed.

    A context manager to open around that of the HDF5 file.

    Parameters
    ----------
    path : Path
        File to make.

    Raises
    ------
    OSError
        From `check`, and at the end, if the disk refused anything.

    Notes
    -----
    HDF5 that meets a full disk leaves chunks behind which it tries to write again when the process ends, and crashes.
    So it is told that all went well, and nothing more is written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, or remember why not."""
        left = memoryview(data).cast("B")
        try:
            while len(left) and self._refusal is None:
                left = left[super().write(left) :]
        except OSError as error:
            self._refusal = error
        return len(memoryview(data).cast("B"))

    def truncate(self, size: int | None = None) -> int:
        """Give the file its length, or remember why not."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._refusal = self._refusal or error
            return size or 0

    def check(self) -> None:
        """Raise what the disk refused: between blocks, so that a full disk ends the writing early."""
        if self._refusal is not None:
            raise self._refusal

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.check()
