"""Frames as uncompressed bytes in a file, and scratch files of them.

Frames that can only be read in order are written to a scratch file, which can be read in any order.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import BLOCK_BYTES, SLAB_BYTES, Frames
from ptychodask.progress import progress_bar

logger = logging.getLogger(__name__)


class RawFrames:
    """Frames stored contiguously in an open file.

    Parameters
    ----------
    file : binary file
        Open for reading; the caller closes it.
    offset : int
        Byte at which frame 0 begins.
    shape : (pattern, h, w)
        Shape of the frames as returned.
    dtype : dtype
        Type in the file, byte order included; frames are returned in native byte order.
    transposed : bool
        The file stores each frame as (w, h).
    label : str
        Name of the file, for messages.
    """

    random_access = seekable = True

    def __init__(
        self,
        file: IO[bytes],
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        label: str,
        transposed: bool = False,
    ) -> None:
        self._file, self._offset, self._stored, self._transposed, self._label = file, offset, dtype, transposed, label
        self._shape = shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._stored.newbyteorder("=")

    def blocks(self) -> Iterator[NDArray[Any]]:
        for start, stop in block_ranges(self._shape, self._stored.itemsize):
            yield self[np.arange(start, stop)]

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        n_pixels = self._shape[1] * self._shape[2]
        frames = np.empty((len(index), n_pixels), self._stored)
        for start, stop in runs(index):
            try:
                self._file.seek(self._offset + int(index[start]) * n_pixels * self._stored.itemsize)
                read_exactly(self._file, frames[start:stop], self._label)
            except OSError as error:
                raise PtychodaskError(f"{self._label}: cannot be read ({error.strerror or error})") from error
        return oriented(frames, self._shape, transposed=self._transposed)


def oriented(frames: NDArray[Any], shape: tuple[int, ...], *, transposed: bool) -> NDArray[Any]:
    """Frames (k, h*w) as (k, h, w) in native byte order.

    With `transposed` each was stored as (w, h).
    """
    native = frames.astype(frames.dtype.newbyteorder("="), copy=False)
    if transposed:
        return np.ascontiguousarray(native.reshape(-1, shape[2], shape[1]).transpose(0, 2, 1))
    return native.reshape(-1, shape[1], shape[2])


def runs(index: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of consecutive rows in an index.

    Examples
    --------
    >>> list(runs(np.array([4, 5, 6, 2, 3, 3])))
    [(0, 3), (3, 5), (5, 6)]
    """
    ends = (np.flatnonzero(np.diff(index, append=-2) != 1) + 1).tolist()
    yield from zip([0, *ends[:-1]], ends, strict=True) if ends else ()


def block_ranges(shape: tuple[int, ...], itemsize: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Start and stop of blocks of frames of about `BLOCK_BYTES`.

    The length of a block is a multiple of `multiple` frames, but for the last.
    """
    step = max(1, BLOCK_BYTES // max(1, shape[1] * shape[2] * itemsize * multiple)) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def read_exactly(stream: IO[bytes], out: NDArray[Any], label: str) -> None:
    """Fill a contiguous array from a stream; raise if it is truncated."""
    view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while len(view):
        piece = stream.read(min(len(view), BLOCK_BYTES))
        if not piece:
            raise PtychodaskError(f"{label}: the file is truncated: {len(view)} bytes are missing; copy it again")
        view[: len(piece)] = piece
        view = view[len(piece) :]


@contextmanager
def scratch_file(folder: Path, needed_bytes: int, purpose: str) -> Iterator[IO[bytes]]:
    """Temporary file without a name, deleted when the block ends.

    Parameters
    ----------
    folder : Path
        Folder of the file.
    needed_bytes : int
        Expected size of the file; 0 if unknown.
    purpose : str
        Purpose of the file, for the log and for messages.

    Raises
    ------
    PtychodaskError
        If the folder does not exist, has too little free space, or cannot be written to.
    """
    if not folder.is_dir():
        raise PtychodaskError(f"{folder}: the scratch folder does not exist; create it, or pass another scratch=")
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise PtychodaskError(
            f"{folder}: {purpose} needs {megabytes(needed_bytes)} of scratch space, but only {megabytes(free)} are "
            "free; free some space, or pass another folder with scratch="
        )
    size = megabytes(needed_bytes) if needed_bytes else "an unknown amount"
    logger.info("%s: uses %s of scratch in %s", purpose, size, folder)
    with writing_scratch(folder):
        file = tempfile.TemporaryFile(dir=folder, prefix=".ptychodask-")  # noqa: SIM115
    with file:
        yield file


@contextmanager
def writing_scratch(folder: Path) -> Iterator[None]:
    """Convert write errors of the scratch disk to a one-line `PtychodaskError`."""
    try:
        yield
    except OSError as error:
        raise PtychodaskError(
            f"{folder}: scratch cannot be written ({error.strerror or error}); "
            "free some space, or pass another folder with scratch="
        ) from error


def megabytes(n_bytes: int) -> str:
    """Text of a number of bytes, in MB.

    Examples
    --------
    >>> megabytes(2_345_678)
    '2.3 MB'
    """
    return f"{n_bytes / 1e6:.1f} MB"


def spill(
    frames: Frames,
    kept: NDArray[np.int64],
    prepare: Callable[[NDArray[Any]], NDArray[Any]],
    file: IO[bytes],
    *,
    folder: Path,
    progress: bool | None,
) -> None:
    """Convert the kept frames and write them to a scratch file.

    Parameters
    ----------
    frames : Frames
        Frames of the file; read once, in order.
    kept : int64 array
        Rows to keep, ascending.
    prepare : callable
        Converts a block of frames to a block of patterns as stored.
    file : binary file
        Open for writing, at its start.
    folder : Path
        Folder of the scratch file, for messages.
    progress : bool, optional
        See `progress_bar`.
    """
    start = 0
    with progress_bar("unpack", frames.shape[0], "patterns", progress) as bar:
        for block in frames.blocks():
            rows = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + len(block))] - start
            prepared = prepare(block[rows])
            with writing_scratch(folder):
                file.write(np.ascontiguousarray(prepared).data)
            start += len(block)
            bar.advance(len(block))
    with writing_scratch(folder):
        file.flush()


def transpose_patterns_first(
    stream: IO[bytes], n_frame: int, n_patterns: int, dtype: np.dtype[Any], file: IO[bytes], *, folder: Path, label: str
) -> None:
    """Transpose values (pixel, pattern) to (pattern, pixel) in a scratch file.

    A slab of pixels is copied at a time.
    """
    step = max(1, SLAB_BYTES // max(1, n_patterns * dtype.itemsize))
    for first in range(0, n_frame, step):
        slab = np.empty((min(step, n_frame - first), n_patterns), dtype)
        read_exactly(stream, slab, label)
        rows = np.ascontiguousarray(slab.T)
        with writing_scratch(folder):
            for pattern in range(n_patterns):
                file.seek((pattern * n_frame + first) * dtype.itemsize)
                file.write(rows[pattern].data)
    with writing_scratch(folder):
        file.flush()
