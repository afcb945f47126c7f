"""Sums of chunks on disk or in a bucket: saved, opened, checked."""

from __future__ import annotations

import io
import uuid
import zlib
from collections.abc import Sequence

import numpy as np

from ptychodask.plan.chunks import Chunk
from ptychodask.reassembly import (
    Canvas,
)
from ptychodask.storage.location import Location
from ptychodask.storage.s3 import S3Location

PIXEL = np.dtype(
    [("weighted", np.complex128), ("weight", np.float64), ("weighted_square", np.float64), ("count", np.int32)]
)
"""Data type of one pixel of a stored canvas."""


def save_canvas(canvas: Canvas, path: Location) -> None:
    """Write a canvas to a file or object, atomically and exactly.

    Parameters
    ----------
    canvas : Canvas
    path : Path or S3Location
        Becomes an NPY array (y, x) of `PIXEL`, 36 bytes per pixel.

    Raises
    ------
    OSError
        If writing to the disk fails.
    """
    pixels = np.empty(canvas.weight.shape, PIXEL)
    for name in PIXEL.names or ():
        pixels[name] = getattr(canvas, name)
    if isinstance(path, S3Location):
        content = io.BytesIO()
        np.save(content, pixels, allow_pickle=False)
        path.write_bytes(content.getvalue())
        return
    being_written = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with being_written.open("wb") as file:
            # As np.save, except for the data: np.save does not report a full disk.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(pixels))
            file.write(np.ascontiguousarray(pixels).data)
        being_written.replace(path)
    except OSError:
        being_written.unlink(missing_ok=True)
        raise


def open_canvas(path: Location, corner: tuple[int, int]) -> Canvas:
    """Canvas that `save_canvas` wrote.

    The sums of a file stay on disk, read-only.

    Parameters
    ----------
    path : Path or S3Location
    corner : (int, int)
        Scan coordinates (y, x) of its first pixel.
    """
    if isinstance(path, S3Location):
        pixels = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    else:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return Canvas(corner, **{name: pixels[name] for name in PIXEL.names or ()})


def checksum(canvas: Canvas) -> int:
    """CRC-32 of the sums of a canvas.

    Examples
    --------
    >>> from ptychodask.reassembly import empty_canvas
    >>> checksum(empty_canvas((0, 0), (1, 1))) == checksum(empty_canvas((5, 7), (1, 1)))
    True
    """
    crc = 0
    for name in PIXEL.names or ():
        crc = zlib.crc32(np.ascontiguousarray(getattr(canvas, name)).data, crc)
    return crc


def sums_files(folder: Location, chunk: Chunk, n_canvases: int) -> tuple[Location, ...]:
    """Files of the sums of a chunk."""
    return tuple(folder / f"{chunk.start}-{number}.npy" for number in range(n_canvases))


def sums_are_intact(folder: Location, chunk: Chunk, checksums: Sequence[int]) -> bool:
    """True if the stored sums of a chunk have their recorded checksums.

    Parameters
    ----------
    folder : Location
    chunk : Chunk
    checksums : sequence of int
        Recorded checksum of each canvas.
    """
    try:
        stored = [checksum(open_canvas(path, chunk.box.corner)) for path in sums_files(folder, chunk, len(checksums))]
    except (OSError, ValueError, IndexError):
        return False
    return stored == list(checksums)
