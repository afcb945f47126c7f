"""NPY and NPZ files, read as streams.

No pickles are loaded, and memory is allocated only for arrays that the length of the file allows.
"""

from __future__ import annotations

import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.raw import RawFrames, block_ranges, oriented, read_exactly, scratch_file, transpose_patterns_first
from ptychodask.io.source import BLOCK_BYTES, Frames, frame_axes, pattern_axes, raster_shape, require_keys

DEFLATE_LIMIT = 1032
"""Largest compression ratio of deflate (zlib's technical notes)."""

WHOLE_BYTES = 2**27
"""Arrays up to this size may be read at once at any compression ratio."""

WHOLE_PACKED_AT_MOST = 100
"""Largest accepted compression ratio of a larger array that is read at once: measured numbers hardly compress."""

_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
)


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Convert errors that damaged files cause to a one-line `PtychodaskError`."""
    try:
        yield
    except PtychodaskError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PtychodaskError(
            f"{label}: cannot be read ({reason}); the file is truncated or damaged: copy it again"
        ) from error


@dataclass(frozen=True)
class NpyHeader:
    """Header of an NPY stream."""

    shape: tuple[int, ...]
    """Shape of the array."""

    fortran: bool
    """True if the first axis varies fastest (Fortran order)."""

    dtype: np.dtype[Any]
    """Type of the values, byte order included."""

    length: int
    """Bytes before the first value."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all values."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], n_bytes: int, label: str) -> NpyHeader:
    """Read an NPY header and check it against the stream's length.

    Parameters
    ----------
    stream : binary file
        At the start of the NPY data; left at the first value.
    n_bytes : int
        Length of the NPY data, header included.
    label : str
        Name of the array, for messages.

    Raises
    ------
    PtychodaskError
        If it is not an NPY header, or its values do not fill the rest of the stream exactly.
    """
    with reading(label), warnings.catch_warnings():
        # Headers written by Python 2 or with old type names cause harmless warnings.
        warnings.simplefilter("ignore")
        version = npy_format.read_magic(stream)
        readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
        if version not in readers:
            raise PtychodaskError(f"{label}: NPY version {version} is not supported, expected (1, 0) or (2, 0)")
        shape, fortran, dtype = readers[version](stream)
        header = NpyHeader(tuple(int(n) for n in shape), bool(fortran), dtype, stream.tell())
    if not dtype.hasobject and (min(header.shape, default=0) < 0 or header.length + header.n_bytes != n_bytes):
        raise PtychodaskError(
            f"{label}: values of shape {header.shape} and type {dtype} take {header.n_bytes} bytes, "
            f"found {n_bytes - header.length}; the file is truncated or damaged: copy it again"
        )
    return header


def check_compression(n_bytes: int, stored_bytes: int, label: str) -> None:
    """Raise `PtychodaskError` if an array's compression ratio indicates a decompression bomb."""
    if n_bytes > WHOLE_BYTES and n_bytes > WHOLE_PACKED_AT_MOST * stored_bytes:
        raise PtychodaskError(
            f"{label}: {n_bytes} bytes would be read from {stored_bytes} compressed ones, expected at most "
            f"{WHOLE_PACKED_AT_MOST} times as many; save it without compression if the data are right"
        )


def check_member(member: zipfile.ZipInfo, file_bytes: int, label: str) -> None:
    """Raise `PtychodaskError` if an archive member claims an impossible size."""
    if member.compress_size > file_bytes or member.file_size > DEFLATE_LIMIT * member.compress_size + 1024:
        raise PtychodaskError(
            f"{label}: {member.file_size} bytes cannot come from {member.compress_size} compressed ones "
            f"in a file of {file_bytes}; the file is truncated or damaged: copy it again"
        )


def read_values(stream: IO[bytes], header: NpyHeader, label: str) -> NDArray[Any]:
    """All values after a header, in native byte order; no pickled objects."""
    if header.dtype.hasobject:
        raise PtychodaskError(f"{label}: contains pickled Python objects, which are never loaded; save plain numbers")
    with reading(label):
        values = np.empty(prod(header.shape), header.dtype)
        read_exactly(stream, values, label)
        values = values.reshape(header.shape, order="F" if header.fortran else "C")
    return values.astype(header.dtype.newbyteorder("="), copy=False)


def read_npy(path: str | Path) -> NDArray[Any]:
    """The array of one .npy file.

    Raises
    ------
    PtychodaskError
        If the file does not exist, or is not a complete NPY file of plain numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise PtychodaskError(f"{path}: no such file")
    with reading(str(path)), path.open("rb") as file:
        return read_values(file, read_header(file, path.stat().st_size, str(path)), str(path))


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a small NPZ file, by name.

    Raises
    ------
    PtychodaskError
        If it cannot be read, or an array claims more than the file can contain; pickled objects are never loaded.
    """
    with reading(str(path)), ExitStack() as stack:
        npz = NpzFile(stack.enter_context(path.open("rb")), str(path), path.parent, stack)
        names = npz.keys()
        check_compression(
            sum(prod(npz.shape(name)) * npz.dtype(name).itemsize for name in names), npz.n_bytes, str(path)
        )
        return {name: npz.array(name) for name in names}


class NpzFile:
    """Arrays of an NPZ file by their names, as a `Container`.

    Parameters
    ----------
    file : binary file
        Open and seekable; the caller closes it.
    label : str
        Name of the file, for messages.
    scratch : Path
        Folder for arrays that must be transposed before they can be read by pattern.
    stack : ExitStack
        Closes what is opened here.
    """

    def __init__(self, file: IO[bytes], label: str, scratch: Path, stack: ExitStack) -> None:
        self.label = label
        self._file, self._scratch, self._stack = file, scratch, stack
        with reading(label):
            archive = stack.enter_context(zipfile.ZipFile(file))
            self._members = {
                name.removesuffix(".npy"): archive.getinfo(name) for name in archive.namelist() if name.endswith(".npy")
            }
            self._file_bytes = file.seek(0, 2)
        self._archive = archive
        self._headers: dict[str, NpyHeader] = {}

    @property
    def n_bytes(self) -> int:
        """Length of the file."""
        return self._file_bytes

    def keys(self) -> list[str]:
        return list(self._members)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._header(key).shape

    def dtype(self, key: str) -> np.dtype[Any]:
        return self._header(key).dtype.newbyteorder("=")

    def has(self, key: str) -> bool:
        return key in self._members

    def unit(self, key: str) -> str | None:
        return None

    def text(self, key: str) -> str | None:
        return None

    def numbers(self, key: str) -> dict[str, float]:
        return {}

    def array(self, key: str) -> NDArray[Any]:
        header, label = self._header(key), f"{self.label}[{key}]"
        check_compression(header.n_bytes, self._members[key].compress_size, label)
        with self.open_values(key) as stream:
            return read_values(stream, header, label)

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        header, label = self._header(key), f"{self.label}[{key}]"
        if header.dtype.kind not in "buifc":
            raise PtychodaskError(f"{label}: values have type {header.dtype}, expected numbers")
        raster_axes = raster_shape(header.shape) if raster else None
        if raster_axes is not None and header.fortran:
            raise PtychodaskError(
                f"{label}: has shape {header.shape} in Fortran order, expected C order for a raster of patterns; save "
                "np.ascontiguousarray of it"
            )
        merged = (prod(raster_axes), *frame_axes(header.shape)[2:]) if raster_axes else header.shape
        shape = pattern_axes(merged, label, last=pattern_last)
        if pattern_last != header.fortran:
            return self._transposed(key, shape, transposed=header.fortran)
        if self._members[key].compress_type != zipfile.ZIP_STORED:
            return _StreamedFrames(self, key, shape, header)
        with self.open_values(key) as stream, reading(label):
            while stream.read(BLOCK_BYTES):
                pass  # read completely once, so that zipfile verifies the checksum
        offset = self._member_offset(key) + header.length
        return RawFrames(self._file, offset, shape, header.dtype, label=label, transposed=header.fortran)

    def _header(self, key: str) -> NpyHeader:
        require_keys(self, [key])
        if key not in self._headers:
            member, label = self._members[key], f"{self.label}[{key}]"
            check_member(member, self._file_bytes, label)
            with reading(label), self._archive.open(member) as stream:
                self._headers[key] = read_header(stream, member.file_size, label)
        return self._headers[key]

    @contextmanager
    def open_values(self, key: str) -> Iterator[IO[bytes]]:
        """Stream of an array's values."""
        header, label = self._header(key), f"{self.label}[{key}]"
        with reading(label):
            stream = self._archive.open(self._members[key])
            stream.read(header.length)
        with stream:
            yield stream

    def _member_offset(self, key: str) -> int:
        """Offset in the file of a member's data (PKWARE APPNOTE, section 4.3.7)."""
        start = self._members[key].header_offset
        with reading(self.label):
            self._file.seek(start + 26)
            name_length, extra_length = struct.unpack("<HH", self._file.read(4))
        return start + 30 + name_length + extra_length

    def _transposed(self, key: str, shape: tuple[int, ...], *, transposed: bool) -> RawFrames:
        header, label = self._header(key), f"{self.label}[{key}]"
        purpose = f"{label}: transposing (qy, qx, pattern) to (pattern, qy, qx)"
        file = self._stack.enter_context(scratch_file(self._scratch, header.n_bytes, purpose))
        with self.open_values(key) as stream, reading(label):
            n_frame = shape[1] * shape[2]
            transpose_patterns_first(stream, n_frame, shape[0], header.dtype, file, folder=self._scratch, label=label)
        return RawFrames(file, 0, shape, header.dtype, label=label, transposed=transposed)


class _StreamedFrames:
    """Frames of a compressed member, which can only be read in order."""

    random_access = seekable = False

    def __init__(self, npz: NpzFile, key: str, shape: tuple[int, ...], header: NpyHeader) -> None:
        self._npz, self._key, self._shape, self._header = npz, key, shape, header

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._header.dtype.newbyteorder("=")

    def blocks(self) -> Iterator[NDArray[Any]]:
        label = f"{self._npz.label}[{self._key}]"
        with self._npz.open_values(self._key) as stream:
            for start, stop in block_ranges(self._shape, self._header.dtype.itemsize):
                frames = np.empty((stop - start, self._shape[1] * self._shape[2]), self._header.dtype)
                with reading(label):
                    read_exactly(stream, frames, label)
                yield oriented(frames, self._shape, transposed=self._header.fortran)

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        raise TypeError(f"{self._npz.label}[{self._key}] is a stream: read it with blocks()")
