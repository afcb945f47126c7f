"""Sums of chunks on disk or in a bucket: saved, opened, checked."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence

import numpy as np

from ptychodask.plan.chunks import Chunk
from ptychodask.reassembly import Canvas
from ptychodask.storage.location import Location

PIXEL = np.dtype(
    [("weighted", np.complex128), ("weight", np.float64), ("weighted_square", np.float64), ("count", np.int32)]
)
"""Data type of one pixel of a stored canvas."""

HEADER_BYTES = 1024
"""Bytes that contain the header of an NPY file of `PIXEL`, with some to spare."""


def save_canvas(canvas: Canvas, path: Location) -> None:
    """Write a canvas to a file or object, atomically and exactly.

    Parameters
    ----------
    canvas : Canvas
    path : Location
        Becomes an NPY array (y, x) of `PIXEL`, 36 bytes per pixel.

    Raises
    ------
    OSError
        If writing to the disk fails.
    """
    shape = canvas.weight.shape
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(PIXEL), "fortran_order": False, "shape": shape}
    )
    # Header and sums in one buffer, so that the sums are in memory once only.
    content = bytearray(header.tell() + canvas.weight.size * PIXEL.itemsize)
    content[: header.tell()] = header.getvalue()
    pixels = np.frombuffer(content, PIXEL, offset=header.tell()).reshape(shape)
    for name in PIXEL.names or ():
        pixels[name] = getattr(canvas, name)
    path.write_bytes(content)


def open_canvas(path: Location, corner: tuple[int, int]) -> Canvas:
    """Canvas that `save_canvas` wrote.

    The sums of a file stay on disk, read-only.

    Parameters
    ----------
    path : Location
    corner : (int, int)
        Scan coordinates (y, x) of its first pixel.
    """
    content = path.read_buffer()
    header = io.BytesIO(content[:HEADER_BYTES])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    pixels = np.frombuffer(content, dtype, offset=header.tell()).reshape(shape)
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
