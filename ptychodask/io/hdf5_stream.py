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


def look_from_afar(file: IO[bytes], label: str) -> None:
    """Walk through the objects of an HDF5 file, and those that its links lead to, in a process of its own.

    Parameters
    ----------
    file : binary file
        On disk, with a name or without one; it may be anywhere after that.
    label : str
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
                raise PtychodaskError(f"{label}: the HDF5 library gets stuck on it; the file is damaged: copy it again")
            if not os.read(child.stdout.fileno(), 2**16):
                break
            patience_s = STUCK_S
    # The process moved the place in the file that both share; from its end on, Python asks for it again.
    file.seek(0, os.SEEK_END)
    if child.returncode < 0:
        raise PtychodaskError(
            f"{label}: the HDF5 library crashes on it (signal {-child.returncode}); the file is damaged: copy it again"
        )


def look_into(content: bytes, label: str) -> None:
    """As `look_from_afar`, for a file in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        look_from_afar(file, label)


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
    label : str
        Its name, for messages.
    scratch : Path
        Not needed by this format: HDF5 reads any order of axes.
    stack : ExitStack
        What is opened here is closed with it.
    """

    def __init__(self, file: IO[bytes], label: str, scratch: Path, stack: ExitStack) -> None:
        self.label = label
        look_from_afar(file, label)
        with reading(label):
            # By its name where it has one, so that links to files beside it are followed.
            self._file = stack.enter_context(h5py.File(file.name if isinstance(file.name, str) else file, "r"))

    def keys(self) -> list[str]:
        """Names of the datasets, those that links lead to in other files among them."""
        links: list[bytes] = []
        with reading(self.label):
            found = _datasets_in(self._file)
            # The lower level of h5py, for the other one decodes the names of files, which may be damaged.
            self._file.id.links.visit(
                lambda name, link: links.append(name) if link.type == h5py.h5l.TYPE_EXTERNAL else None, info=True
            )
            for name in (link.decode(errors="replace") for link in links):
                item = self._item(name)
                if isinstance(item, h5py.Group):
                    found += [f"{name}/{below}" for below in _datasets_in(item)]
                elif item is not None:
                    found.append(name)
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._dataset(key).shape or ())

    def dtype(self, key: str) -> np.dtype[Any]:
        return np.dtype(self._dataset(key).dtype).newbyteorder("=")

    def has(self, key: str) -> bool:
        with reading(f"{self.label}[{key}]"):
            return isinstance(self._item(key), h5py.Dataset) or self._lost(key) is not None

    def unit(self, key: str) -> str | None:
        with reading(f"{self.label}[{key}]"):
            noted = self._dataset(key).attrs.get("units")
            return noted.decode() if isinstance(noted, bytes) else None if noted is None else str(noted)

    def numbers(self, key: str) -> dict[str, float]:
        with reading(f"{self.label}[{key}]"):
            holder = self._dataset(key) if key else self._file
            noted = {name: np.asarray(value) for name, value in holder.attrs.items()}
        return {
            name: float(value.item()) for name, value in noted.items() if value.size == 1 and value.dtype.kind in "iuf"
        }

    def array(self, key: str) -> NDArray[Any]:
        label = f"{self.label}[{key}]"
        if self.dtype(key).hasobject:
            raise PtychodaskError(f"{label}: holds text or references, expected numbers")
        dataset = self._dataset(key)
        check_whole((dataset.size or 0) * dataset.dtype.itemsize, check_claim(dataset, label), label)
        _check_readable(dataset, label)
        with reading(label):
            return np.asarray(self._dataset(key)[()]).astype(self.dtype(key), copy=False)

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        dataset = self._dataset(key)
        if dataset.dtype.kind not in "buifc":
            raise PtychodaskError(f"{self.label}[{key}]: values have type {dataset.dtype}, expected numbers")
        label = f"{self.label}[{key}]"
        check_claim(dataset, label)
        _check_readable(dataset, label)
        if dataset.chunks is not None and (chunk := prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
            raise PtychodaskError(
                f"{label}: is stored in chunks of {dataset.chunks}, {chunk} bytes each, expected at most "
                f"{LARGEST_CHUNK}; store it in smaller ones (h5repack -l CHUNK=...)"
            )
        if raster and len(frame_axes(self.shape(key))) == 4:
            return _RasterFrames(dataset, label)
        return _DatasetFrames(dataset, pattern_axes(self.shape(key), label, last=pattern_last), label, pattern_last)

    def _dataset(self, key: str) -> h5py.Dataset:
        lost = None
        with reading(f"{self.label}[{key}]"):
            dataset = self._item(key)
            if isinstance(dataset, h5py.Dataset):
                _ = dataset.shape, dataset.dtype, dataset.chunks  # what is damaged shows here
            else:
                lost = self._lost(key)
        if lost is not None:
            raise PtychodaskError(
                f"{self.label}[{key}]: leads to {lost}, which is not there; put it where the link looks for it"
            )
        if not isinstance(dataset, h5py.Dataset):
            raise missing_key(self, key)
        return dataset

    def _item(self, key: str) -> h5py.Group | h5py.Dataset | None:
        """What a name leads to; None where it leads nowhere."""
        try:
            return self._file.get(key)
        except (KeyError, OSError, UnicodeError):
            return None

    def _lost(self, key: str) -> str | None:
        """What a link on the way to a name leads to, where that is not there."""
        parts = key.strip("/").split("/")
        for n_parts in range(1, len(parts) + 1):
            path = "/".join(parts[:n_parts])
            link = self._file.get(path, getlink=True)
            if self._item(path) is None:
                if isinstance(link, h5py.ExternalLink):
                    return f"'{link.path}' in the file {link.filename!r}"
                return f"'{link.path}'" if isinstance(link, h5py.SoftLink) else None
        return None


def _datasets_in(group: h5py.Group) -> list[str]:
    """Names of the datasets in a group and below it."""
    found: list[str | bytes] = []
    group.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    # h5py gives a name that is no UTF-8 as bytes.
    return [name if isinstance(name, str) else name.decode(errors="replace") for name in found]


FILTERS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle (bslz4)", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}
"""Compression filters that detectors use, by the numbers that The HDF Group registered them under."""


def _check_readable(dataset: h5py.Dataset, label: str) -> None:
    """Raise `PtychodaskError` where a filter is not there, or a file that a virtual dataset is made of.

    HDF5 itself gives the fill value for what a missing file holds.
    """
    with reading(label):
        made_by = dataset.id.get_create_plist()
        filters = [made_by.get_filter(n) for n in range(made_by.get_nfilters())]
        lost = [name for name, files in _source_files(dataset).items() if not files] if dataset.is_virtual else []
    for number, _, _, name in filters:
        if not h5py.h5z.filter_avail(number):
            called = FILTERS.get(number) or name.decode(errors="replace") or "of unknown name"
            raise PtychodaskError(
                f"{label}: is compressed by the HDF5 filter {called}, number {number}, which is not installed; install "
                "ptychodask with its extra 'detectors' (the package hdf5plugin)"
            )
    if lost:
        raise PtychodaskError(
            f"{label}: is made of {len(lost)} files that are not there, {lost[0]!r} among them; put them beside it"
        )


def check_claim(dataset: h5py.Dataset, label: str) -> int:
    """Bytes that are stored of a dataset.

    Raises
    ------
    PtychodaskError
        Where it is larger than they can become, or names files whose bytes, of whatever kind, shall be its values.
    """
    with reading(label):
        if dataset.external:
            raise PtychodaskError(
                f"{label}: takes its values from the bytes of {dataset.external[0][0]!r}, which may be any file; "
                "store them in the file itself"
            )
        claimed = (dataset.size or 0) * dataset.dtype.itemsize
        stored = _bytes_of_sources(dataset) if dataset.is_virtual else dataset.id.get_storage_size()
    if claimed > SMALL_BYTES and claimed > COMPRESSED_AT_MOST * stored:
        raise PtychodaskError(
            f"{label}: has shape {dataset.shape}, and the file holds {stored} of the {claimed} bytes that it claims; "
            "it was never written, or is truncated: copy it again"
        )
    return stored


def _source_files(dataset: h5py.Dataset) -> dict[str, set[str]]:
    """Names of the other files that a virtual dataset is made of -> paths of those that are there."""
    beside = Path(glob.escape(os.path.dirname(os.fsdecode(dataset.file.filename))))
    found = {}
    for name in {source.file_name for source in dataset.virtual_sources()} - {"."}:
        # HDF5 looks for a name as it is and beside the file; one with %b in it stands for as many files as there are.
        text = re.sub("%[0-9]*b", "*", glob.escape(name))
        places = {str(place) for place in (text, beside / text, beside / Path(text).name)}
        found[name] = {os.path.realpath(path) for place in places for path in glob.iglob(place) if os.path.isfile(path)}
    return found


def _bytes_of_sources(dataset: h5py.Dataset) -> int:
    """Length of the files that a virtual dataset is made of, together."""
    of_own = any(source.file_name == "." for source in dataset.virtual_sources())
    own = dataset.file.id.get_filesize() if of_own else 0
    return own + sum(os.path.getsize(path) for path in set[str]().union(*_source_files(dataset).values()))


class _DatasetFrames:
    seekable = True

    def __init__(self, dataset: h5py.Dataset, shape: tuple[int, ...], label: str, pattern_last: bool) -> None:
        self._dataset, self._shape, self._label, self._pattern_last = dataset, shape, label, pattern_last
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
        label = tuple(slice(start, stop) if axis == self._axis else slice(None) for axis in range(self._dataset.ndim))
        with reading(self._label):
            frames = np.asarray(self._dataset[label]).astype(self.dtype, copy=False)
        if self._pattern_last:
            return np.ascontiguousarray(frames.reshape(*self._shape[1:], -1).transpose(2, 0, 1))
        return frames.reshape(-1, *self._shape[1:])


class _RasterFrames(_DatasetFrames):
    """A dataset (row, column, h, w) as frames (pattern, h, w), row after row."""

    def __init__(self, dataset: h5py.Dataset, label: str) -> None:
        self._dataset, self._label = dataset, label
        n_rows, self._n_columns, height, width = frame_axes(dataset.shape)
        self._shape = (n_rows * self._n_columns, height, width)
        self._axis = dataset.shape.index(n_rows)
        chunks = (1,) * dataset.ndim if dataset.chunks is None else dataset.chunks
        rows, columns = (int(n) for n in chunks[self._axis : self._axis + 2])
        self._chunk_frames = rows * self._n_columns if rows > 1 else columns
        self.random_access = rows == columns == 1

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        frames = np.empty((stop - start, *self.shape[1:]), self.dtype)
        before = (slice(None),) * self._axis
        for row in range(start // self._n_columns, -(-stop // self._n_columns)):
            first = row * self._n_columns
            columns = slice(max(start - first, 0), min(stop - first, self._n_columns))
            with reading(self._label):
                part = self._dataset[(*before, row, columns)]
            frames[first + columns.start - start : first + columns.stop - start] = part.reshape(-1, *self.shape[1:])
        return frames
