"""HDF5 files, read as streams of frames."""

from __future__ import annotations

import glob
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ptychodask.io.npy_stream import check_whole, reading
from ptychodask.io.raw import block_ranges, runs
from ptychodask.io.source import Frames, frame_axes, missing_key, pattern_axes
from ptychodask.scan import PtychodaskError

with suppress(ImportError):
    # Registers the compression filters of detectors where it is installed.
    import hdf5plugin  # noqa: F401


STUCK_S = 5.0
"""How long the HDF5 library may take for one object of a file."""

START_S = 120.0
"""How long a process may take to start, on a busy machine or from a slow disk."""

LOOK = """
import sys
import h5py
print(flush=True)

def look(name, item):
    print(flush=True)
    if isinstance(item, h5py.Dataset):
        item.shape, item.dtype, item.chunks
    dict(item.attrs)

def follow(name, link):
    if isinstance(link, h5py.ExternalLink):
        try:
            look(name, file[name])
        except (KeyError, OSError):
            pass  # it leads nowhere

try:
    with h5py.File(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.buffer, "r") as file:
        look("", file)
        file.visititems(look)
        file.visititems_links(follow)
except Exception:
    pass  # who reads the file will say what is wrong with it
"""
"""What a process of its own does with a file, a line for each object."""


def look_from_afar(file: IO[bytes], where: str) -> None:
    """Walk through the objects of an HDF5 file, and those that its links lead to, in a process of its own.

    Parameters
    ----------
    file : binary file
        On disk, with a name or without one; it may be anywhere after that.
    where : str
        Its name, for messages.

    Raises
    ------
    PtychodaskError
        If the HDF5 library gets stuck on the file or crashes, which damaged ones make it do: no Python code could stop
        that in this process.
    """
    # Links to files beside it are followed from its name.
    named = [file.name] if isinstance(file.name, str) else []
    file.seek(0)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", LOOK, *named], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        patience_s = START_S
        while True:
            ready, _, _ = select.select([child.stdout], [], [], patience_s)
            if not ready:
                child.kill()
                raise PtychodaskError(f"{where}: the HDF5 library gets stuck on it; the file is damaged: copy it again")
            if not os.read(child.stdout.fileno(), 2**16):
                break
            patience_s = STUCK_S
    # The process moved the place in the file that both share; from its end on, Python asks for it again.
    file.seek(0, os.SEEK_END)
    if child.returncode < 0:
        raise PtychodaskError(
            f"{where}: the HDF5 library crashes on it (signal {-child.returncode}); the file is damaged: copy it again"
        )


def look_into(content: bytes, where: str) -> None:
    """As `look_from_afar`, for a file in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        look_from_afar(file, where)


SMALL_BYTES = 2**26
"""Arrays up to this size are read whatever is stored of them: HDF5 leaves out what was never written."""

LARGEST_CHUNK = 2**29
"""Bytes of the largest chunk of frames that is read: one frame of it needs all of it in memory."""

COMPRESSED_AT_MOST = 2**16
"""Times that a dataset is larger than what is stored of it, at the most: a frame without light packs well."""


class Hdf5File:
    """The datasets of an HDF5 file, by their paths: see `Container`.

    Parameters
    ----------
    file : binary file
        Open and seekable; whoever opened it closes it.
    where : str
        Its name, for messages.
    scratch : Path
        Not needed by this format: HDF5 reads any order of axes.
    stack : ExitStack
        What is opened here is closed with it.
    """

    def __init__(self, file: IO[bytes], where: str, scratch: Path, stack: ExitStack) -> None:
        self.where = where
        look_from_afar(file, where)
        with reading(where):
            # By its name where it has one, so that links to files beside it are followed.
            self._file = stack.enter_context(h5py.File(file.name if isinstance(file.name, str) else file, "r"))

    def keys(self) -> list[str]:
        found: list[str | bytes] = []
        with reading(self.where):
            self._file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        # h5py gives a name that is no UTF-8 as bytes.
        return [name if isinstance(name, str) else name.decode(errors="replace") for name in found]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._dataset(key).shape or ())

    def dtype(self, key: str) -> np.dtype[Any]:
        return np.dtype(self._dataset(key).dtype).newbyteorder("=")

    def unit(self, key: str) -> str | None:
        with reading(f"{self.where}[{key}]"):
            noted = self._dataset(key).attrs.get("units")
            return noted.decode() if isinstance(noted, bytes) else None if noted is None else str(noted)

    def array(self, key: str) -> NDArray[Any]:
        where = f"{self.where}[{key}]"
        if self.dtype(key).hasobject:
            raise PtychodaskError(f"{where}: holds text or references, expected numbers")
        dataset = self._dataset(key)
        check_whole((dataset.size or 0) * dataset.dtype.itemsize, check_claim(dataset, where), where)
        with reading(where):
            return np.asarray(self._dataset(key)[()]).astype(self.dtype(key), copy=False)

    def frames(self, key: str, *, pattern_last: bool = False) -> Frames:
        dataset = self._dataset(key)
        if dataset.dtype.kind not in "buifc":
            raise PtychodaskError(f"{self.where}[{key}]: values have type {dataset.dtype}, expected numbers")
        where = f"{self.where}[{key}]"
        check_claim(dataset, where)
        if dataset.chunks is not None and (chunk := prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
            raise PtychodaskError(
                f"{where}: is stored in chunks of {dataset.chunks}, {chunk} bytes each, expected at most "
                f"{LARGEST_CHUNK}; store it in smaller ones (h5repack -l CHUNK=...)"
            )
        return _DatasetFrames(dataset, pattern_axes(self.shape(key), where, last=pattern_last), where, pattern_last)

    def _dataset(self, key: str) -> h5py.Dataset:
        with reading(f"{self.where}[{key}]"):
            dataset = self._file.get(key)
            if isinstance(dataset, h5py.Dataset):
                _ = dataset.shape, dataset.dtype, dataset.chunks  # what is damaged shows here
        if not isinstance(dataset, h5py.Dataset):
            raise missing_key(self, key)
        return dataset


def check_claim(dataset: h5py.Dataset, where: str) -> int:
    """Bytes that are stored of a dataset.

    Raises
    ------
    PtychodaskError
        Where it is larger than they can become, or names files whose bytes, of whatever kind, shall be its values.
    """
    with reading(where):
        if dataset.external:
            raise PtychodaskError(
                f"{where}: takes its values from the bytes of {dataset.external[0][0]!r}, which may be any file; "
                "store them in the file itself"
            )
        claimed = (dataset.size or 0) * dataset.dtype.itemsize
        stored = _bytes_of_sources(dataset) if dataset.is_virtual else dataset.id.get_storage_size()
    if claimed > SMALL_BYTES and claimed > COMPRESSED_AT_MOST * stored:
        raise PtychodaskError(
            f"{where}: has shape {dataset.shape}, and the file holds {stored} of the {claimed} bytes that it claims; "
            "it was never written, or is truncated: copy it again"
        )
    return stored


def _bytes_of_sources(dataset: h5py.Dataset) -> int:
    """Length of the files that a virtual dataset is made of, together."""
    beside = Path(glob.escape(os.path.dirname(os.fsdecode(dataset.file.filename))))
    names = {source.file_name for source in dataset.virtual_sources()}
    # HDF5 looks for a name as it is and beside the file; one with %b in it stands for as many files as there are.
    patterns = {re.sub("%[0-9]*b", "*", glob.escape(name)) for name in names if name != "."}
    places = {str(place) for text in patterns for place in (text, beside / text, beside / Path(text).name)}
    found = {os.path.realpath(path) for place in places for path in glob.iglob(place) if os.path.isfile(path)}
    own = dataset.file.id.get_filesize() if "." in names else 0
    return own + sum(os.path.getsize(path) for path in found)


class _DatasetFrames:
    seekable = True

    def __init__(self, dataset: h5py.Dataset, shape: tuple[int, ...], where: str, pattern_last: bool) -> None:
        self._dataset, self._shape, self._where, self._pattern_last = dataset, shape, where, pattern_last
        leading = dataset.shape.index(frame_axes(dataset.shape)[0])
        self._axis = leading + (2 if pattern_last else 0)
        self._chunk_frames = 1 if dataset.chunks is None else int(dataset.chunks[self._axis])
        # A chunk of many frames would be decompressed again for each of them.
        self.random_access = not pattern_last and self._chunk_frames == 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._dataset.dtype).newbyteorder("=")

    def blocks(self) -> Iterator[NDArray[Any]]:
        for start, stop in block_ranges(self._shape, self.dtype.itemsize, self._chunk_frames):
            yield self._read(start, stop)

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        frames = np.empty((len(index), *self.shape[1:]), self.dtype)
        for start, stop in runs(index):
            frames[start:stop] = self._read(int(index[start]), int(index[start]) + stop - start)
        return frames

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        where = tuple(slice(start, stop) if axis == self._axis else slice(None) for axis in range(self._dataset.ndim))
        with reading(self._where):
            frames = np.asarray(self._dataset[where]).astype(self.dtype, copy=False)
        if self._pattern_last:
            return np.ascontiguousarray(frames.reshape(*self._shape[1:], -1).transpose(2, 0, 1))
        return frames.reshape(-1, *self._shape[1:])
