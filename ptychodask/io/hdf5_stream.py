"""HDF5 files, read as streams of frames."""

from __future__ import annotations

import errno
import glob
import logging
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.npy_stream import check_compression, reading
from ptychodask.io.raw import block_ranges, runs
from ptychodask.io.source import Frames, frame_axes, missing_key, pattern_axes
from ptychodask.io.units import unit_text
from ptychodask.scan import as_rows

with suppress(ImportError):
    # Registers the compression filters of detectors, if installed.
    import hdf5plugin  # noqa: F401


logger = logging.getLogger(__name__)


STUCK_S = 5.0
"""Seconds that the HDF5 library may take for one object of a file."""

START_S = 120.0
"""Seconds that a process may take to start, on a busy machine or from a slow disk."""

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
            pass  # a broken link

def opened():
    if len(sys.argv) == 1:
        return h5py.File(sys.stdin.buffer, "r")
    try:
        return h5py.File(sys.argv[1], "r")
    except OSError:
        return h5py.File(sys.argv[1], "r", libver="latest", swmr=True)

try:
    with opened() as file:
        look("", file)
        file.visititems(look)
        file.visititems_links(follow)
except Exception:
    pass  # the error is reported when the file is read
"""
"""Code of the separate process, which prints a line for each object of a file."""


def check_in_subprocess(file: IO[bytes], label: str) -> None:
    """Open every object of an HDF5 file in a separate process.

    Targets of external links are opened too.

    Parameters
    ----------
    file : binary file
        A file on disk, with or without a name; its position is changed.
    label : str
        Name of the file, for messages.

    Raises
    ------
    PtychodaskError
        If the HDF5 library hangs or crashes, as it does on some damaged files: in this process no Python code could
        stop that.
    """
    # Links to files in the same folder are resolved from the name.
    named = [file.name] if isinstance(file.name, str) else []
    file.seek(0)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", LOOK, *named], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        patience_s = START_S
        signs = _signs_of_life(child.stdout)
        while True:
            try:
                sign = signs.get(timeout=patience_s)
            except queue.Empty:
                child.kill()
                raise PtychodaskError(
                    f"{label}: the HDF5 library hangs on it; the file is damaged: copy it again"
                ) from None
            if not sign:
                break
            patience_s = STUCK_S
    # The process moved the file position, which both share; seeking to the end makes Python query it again.
    file.seek(0, os.SEEK_END)
    if child.returncode < 0:
        raise PtychodaskError(
            f"{label}: the HDF5 library crashes on it (signal {-child.returncode}); the file is damaged: copy it again"
        )


def _signs_of_life(stream: IO[bytes]) -> queue.SimpleQueue[bytes]:
    """Queue of what a process prints; empty bytes at its end."""
    printed: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    # A thread that reads, since select() takes only sockets on Windows.
    def read() -> None:
        while part := os.read(stream.fileno(), 2**16):
            printed.put(part)
        printed.put(b"")

    threading.Thread(target=read, daemon=True).start()
    return printed


def check_bytes_in_subprocess(content: bytes, label: str) -> None:
    """Open every object of an in-memory HDF5 file in a separate process.

    See `check_in_subprocess`.
    """
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        check_in_subprocess(file, label)


_UNIT_ATTRIBUTES = ("units", "unit", "Units", "Unit", "UNITS", "UNIT")
"""Attributes that note the unit of an array."""

SMALL_BYTES = 2**26
"""Arrays up to this size are read even if hardly any bytes are stored: HDF5 does not store what was never written."""

LARGEST_CHUNK = 2**29
"""Largest accepted chunk of frames, bytes: reading one frame needs its complete chunk in memory."""

COMPRESSED_AT_MOST = 2**16
"""Largest accepted compression ratio of a dataset: frames without photons compress very well."""


def open_hdf5(path: str, label: str) -> h5py.File:
    """Open an HDF5 file for reading, also in SWMR mode.

    Parameters
    ----------
    path : str
    label : str
        Name of the file, for messages.

    Raises
    ------
    PtychodaskError
        If another program holds the file, its writer crashed, or the disk has no locks.
    OSError
        If it cannot be read for another reason.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        cause = error
    try:
        # Only while a program writes it in SWMR mode (single writer, multiple readers) does this open the file.
        file = h5py.File(path, "r", libver="latest", swmr=True)
    except OSError:
        _check_not_held(cause, label)
        raise cause from None
    logger.warning("%s: is open for writing (SWMR), or its writer crashed: only what is written so far is read", label)
    return file


def _check_not_held(error: OSError, label: str) -> None:
    """Raise `PtychodaskError` if a lock or a writer caused an error."""
    reason = str(error)
    if "lock file" in reason and error.errno in (errno.EAGAIN, errno.EACCES):
        raise PtychodaskError(
            f"{label}: another program is writing it and has locked it; wait until it has closed the file, or copy it "
            "once the writer has flushed it"
        ) from error
    if "lock file" in reason:
        raise PtychodaskError(
            f"{label}: its disk has no file locks ({os.strerror(error.errno or 0)}); set the environment variable "
            "HDF5_USE_FILE_LOCKING=FALSE once no program is writing it"
        ) from error
    if "already open for write" in reason or "already open for SWMR write" in reason:
        raise PtychodaskError(
            f"{label}: is marked as open for writing; wait until its writer has closed it, or if the writer crashed, "
            f"clear the mark with: h5clear -s {label}"
        ) from error


class Hdf5File:
    """Datasets of an HDF5 file by their paths, as a `Container`.

    Parameters
    ----------
    file : binary file
        Open and seekable; the caller closes it.
    label : str
        Name of the file, for messages.
    scratch : Path
        Not used: HDF5 reads any order of axes.
    stack : ExitStack
        Closes what is opened here.
    """

    def __init__(self, file: IO[bytes], label: str, scratch: Path, stack: ExitStack) -> None:
        self.label = label
        check_in_subprocess(file, label)
        with reading(label):
            # Opened by name if it has one, so that links to files in the same folder are followed.
            self._file = stack.enter_context(
                open_hdf5(file.name, label) if isinstance(file.name, str) else h5py.File(file, "r")
            )
        file.seek(0)
        # MATLAB 7.3 writes every array with its axes in reverse, so that the shape in MATLAB is the one reversed here.
        self._is_reversed = file.read(6) == b"MATLAB"

    def keys(self) -> list[str]:
        """Names of the datasets, including linked ones in other files."""
        links: list[bytes] = []
        with reading(self.label):
            names = _datasets_in(self._file)
            # h5py's low-level interface, since the high-level one decodes the names of files, which may be damaged.
            self._file.id.links.visit(
                lambda name, link: links.append(name) if link.type == h5py.h5l.TYPE_EXTERNAL else None, info=True
            )
            for name in (link.decode(errors="replace") for link in links):
                item = self._item(name)
                if item is None:
                    self._broken_link(name)  # raises if another program holds its target
                if isinstance(item, h5py.Group):
                    names += [f"{name}/{below}" for below in _datasets_in(item)]
                elif item is not None:
                    names.append(name)
        return names

    def shape(self, key: str) -> tuple[int, ...]:
        shape = tuple(self._dataset(key).shape or ())
        return shape[::-1] if self._is_reversed else shape

    def dtype(self, key: str) -> np.dtype[Any]:
        dtype = np.dtype(self._dataset(key).dtype).newbyteorder("=")
        return _complex_type(dtype) or dtype

    def has(self, key: str) -> bool:
        with reading(f"{self.label}[{key}]"):
            return isinstance(self._item(key), h5py.Dataset) or self._broken_link(key) is not None

    def unit(self, key: str) -> str | None:
        with reading(f"{self.label}[{key}]"):
            attributes = self._dataset(key).attrs
            named = (unit_text(attributes[name]) for name in _UNIT_ATTRIBUTES if name in attributes)
            return next((text for text in named if text), None)

    def text(self, key: str) -> str | None:
        with reading(f"{self.label}[{key}]"):
            dataset = self._dataset(key)
            is_short = dataset.size == 1 and (h5py.check_string_dtype(dataset.dtype) is not None)
            return unit_text(dataset[()]) if is_short else None

    def numbers(self, key: str) -> dict[str, float]:
        with reading(f"{self.label}[{key}]"):
            item = self._dataset(key) if key else self._file
            attributes = {name: np.asarray(value) for name, value in item.attrs.items()}
        return {
            name: float(value.item())
            for name, value in attributes.items()
            if value.size == 1 and value.dtype.kind in "iuf"
        }

    def array(self, key: str) -> NDArray[Any]:
        label = f"{self.label}[{key}]"
        if self.dtype(key).hasobject:
            raise PtychodaskError(f"{label}: contains text or references, expected numbers")
        dataset = self._dataset(key)
        if dataset.shape is None:
            raise PtychodaskError(
                f"{label}: is an empty dataset (a null dataspace), expected numbers; write its values"
            )
        check_compression((dataset.size or 0) * dataset.dtype.itemsize, check_storage(dataset, label), label)
        _check_readable(dataset, label)
        with reading(label):
            values = np.asarray(self._dataset(key)[()])
            if _complex_type(values.dtype):
                real, imaginary = values.dtype.names or ()
                values = values[real] + 1j * values[imaginary]
            values = values.astype(self.dtype(key), copy=False)
        return np.ascontiguousarray(values.T) if self._is_reversed else values

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        dataset = self._dataset(key)
        if dataset.dtype.kind not in "buifc":
            raise PtychodaskError(f"{self.label}[{key}]: values have type {dataset.dtype}, expected numbers")
        label = f"{self.label}[{key}]"
        check_storage(dataset, label)
        lost = _lost_frames(dataset, label, has_patterns_first=not (pattern_last or self._is_reversed))
        if dataset.chunks is not None and (chunk := prod(dataset.chunks) * dataset.dtype.itemsize) > LARGEST_CHUNK:
            raise PtychodaskError(
                f"{label}: is stored in chunks of {dataset.chunks}, {chunk} bytes each, expected at most "
                f"{LARGEST_CHUNK}; store it in smaller chunks (h5repack -l CHUNK=...)"
            )
        if self._is_reversed:
            pattern_axes(self.shape(key), label, last=pattern_last)  # raises in the order of axes of MATLAB
            axes = pattern_axes(self.shape(key)[::-1], label, last=not pattern_last)
            return _TransposedFrames(_DatasetFrames(dataset, axes, label, not pattern_last))
        if raster and len(frame_axes(self.shape(key))) == 4:
            return _RasterFrames(dataset, label, lost)
        axes = pattern_axes(self.shape(key), label, last=pattern_last)
        return _DatasetFrames(dataset, axes, label, pattern_last, lost)

    def _dataset(self, key: str) -> h5py.Dataset:
        target = None
        with reading(f"{self.label}[{key}]"):
            dataset = self._item(key)
            if isinstance(dataset, h5py.Dataset):
                _ = dataset.shape, dataset.dtype, dataset.chunks  # raises if these are damaged
            else:
                target = self._broken_link(key)
        if target is not None:
            raise PtychodaskError(
                f"{self.label}[{key}]: is a link to {target}, which does not exist; put the target where the link "
                "points"
            )
        if not isinstance(dataset, h5py.Dataset):
            raise missing_key(self, key)
        return dataset

    def _item(self, key: str) -> h5py.Group | h5py.Dataset | None:
        """Group or dataset with a name; None if there is none."""
        try:
            return self._file.get(key)
        except (KeyError, OSError, UnicodeError):
            return None

    def _broken_link(self, key: str) -> str | None:
        """Target of the first broken link in a path, or None."""
        parts = key.strip("/").split("/")
        for n_parts in range(1, len(parts) + 1):
            path = "/".join(parts[:n_parts])
            link = self._file.get(path, getlink=True)
            if self._item(path) is None:
                if isinstance(link, h5py.ExternalLink):
                    self._check_target(link.filename)
                    return f"'{link.path}' in the file {link.filename!r}"
                return f"'{link.path}'" if isinstance(link, h5py.SoftLink) else None
        return None

    def _check_target(self, name: str) -> None:
        """Raise `PtychodaskError` if another program holds a linked file."""
        for path in _existing_paths(name, self._file):
            _check_source(path)


def _datasets_in(group: h5py.Group) -> list[str]:
    """Names of the datasets in a group and its subgroups."""
    names: list[str | bytes] = []
    group.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    # h5py returns a name that is not UTF-8 as bytes.
    return [name if isinstance(name, str) else name.decode(errors="replace") for name in names]


def _complex_type(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Complex type of a compound of two numbers, or None."""
    names = dtype.names or ()
    if tuple(name.lower() for name in names) not in (("real", "imag"), ("r", "i"), ("re", "im")):
        return None
    parts = [dtype[name] for name in names]
    if parts[0] != parts[1] or parts[0].kind not in "iuf" or parts[0].shape:
        return None
    return np.result_type(parts[0], np.complex64)


FILTERS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle (bslz4)", 32013: "zfp", 32015: "zstd", 32026: "blosc2"}
"""Compression filters that detectors use, by their number in The HDF Group's registry."""


def _check_readable(dataset: h5py.Dataset, label: str) -> None:
    """Raise `PtychodaskError` if a compression filter or a source file is missing.

    Without this check HDF5 returns the fill value for a missing source file of a virtual dataset.
    """
    with reading(label):
        creation = dataset.id.get_create_plist()
        filters = [creation.get_filter(n) for n in range(creation.get_nfilters())]
        sources = _source_files(dataset) if dataset.is_virtual else {}
        missing = [name for name, files in sources.items() if not files]
        # HDF5 reads the fill value for a source that it cannot open, without an error.
        for path in sorted(set[str]().union(*sources.values())):
            _check_source(path)
    for number, _, _, name in filters:
        if not h5py.h5z.filter_avail(number):
            filter_name = FILTERS.get(number) or name.decode(errors="replace") or "of unknown name"
            raise PtychodaskError(
                f"{label}: is compressed by the HDF5 filter {filter_name}, number {number}, which is not installed; "
                "install ptychodask with the extra 'detectors' (package hdf5plugin)"
            )
    if missing:
        rows = _rows_of_sources(dataset, set(missing))
        raise LostSourceError(
            f"{label}: is a virtual dataset, and {len(missing)} of its source files are missing, for example "
            f"{missing[0]!r}; put them beside the file",
            rows,
        )


class LostSourceError(PtychodaskError):
    """Source files of a virtual dataset are missing.

    Parameters
    ----------
    message : str
    rows : int64 array (k,) or None
        Rows of the first axis that they hold, ascending; None if these cannot be told.
    """

    def __init__(self, message: str, rows: NDArray[np.int64] | None) -> None:
        super().__init__(message)
        self.rows = rows


def _lost_frames(dataset: h5py.Dataset, label: str, *, has_patterns_first: bool) -> LostSourceError | None:
    """Frames of missing source files, an error to raise where they are read.

    Raises
    ------
    PtychodaskError
        If the values cannot be read, or it cannot be told which frames are lost.
    """
    try:
        _check_readable(dataset, label)
    except LostSourceError as error:
        axes = frame_axes(dataset.shape)
        if error.rows is None or not has_patterns_first or axes[0] != dataset.shape[0]:
            raise
        n_columns = axes[1] if len(axes) == 4 else 1
        frames = (error.rows[:, None] * n_columns + np.arange(n_columns)).ravel()
        if len(frames) == dataset.shape[0] * n_columns:
            raise
        return LostSourceError(f"{error}, or leave their patterns out with --drop-frames {as_rows(frames)}", frames)
    return None


def _rows_of_sources(dataset: h5py.Dataset, names: set[str]) -> NDArray[np.int64] | None:
    """Rows of the first axis that come from source files; None if unknown."""
    if not dataset.shape or any("%" in name for name in names):
        return None
    is_lost = np.zeros(dataset.shape[0], bool)
    for source in dataset.virtual_sources():
        if source.file_name in names:
            first, last = (int(corner[0]) for corner in source.vspace.get_select_bounds())
            is_lost[first : last + 1] = True
    return np.flatnonzero(is_lost)


def check_storage(dataset: h5py.Dataset, label: str) -> int:
    """Number of bytes stored for a dataset.

    Raises
    ------
    PtychodaskError
        If the dataset is larger than these bytes can decompress to, or its values are the raw bytes of other files
        (external storage), which may be any files.
    """
    with reading(label):
        if dataset.external:
            raise PtychodaskError(
                f"{label}: its values are the raw bytes of {dataset.external[0][0]!r}, which may be any file; "
                "store them in the HDF5 file itself"
            )
        n_bytes = (dataset.size or 0) * dataset.dtype.itemsize
        stored = _bytes_of_sources(dataset) if dataset.is_virtual else dataset.id.get_storage_size()
    if n_bytes > SMALL_BYTES and n_bytes > COMPRESSED_AT_MOST * stored:
        raise PtychodaskError(
            f"{label}: shape {dataset.shape} needs {n_bytes} bytes, but the file contains {stored}; the array was "
            "never written, or the file is truncated: copy it again"
        )
    return stored


def _source_files(dataset: h5py.Dataset) -> dict[str, set[str]]:
    """Source files of a virtual dataset: name -> paths that exist."""
    names = {source.file_name for source in dataset.virtual_sources()} - {"."}
    # HDF5 replaces %b in a name by a running number of files.
    return {name: _existing_paths(name, dataset.file, re.compile("%[0-9]*b")) for name in names}


def _existing_paths(name: str, file: h5py.File, numbered: re.Pattern[str] | None = None) -> set[str]:
    """Existing paths among those that HDF5 tries for a file name."""
    folder = Path(glob.escape(os.path.dirname(os.fsdecode(file.filename))))
    # HDF5 tries the name as given and in the folder of the file.
    pattern = glob.escape(name) if numbered is None else numbered.sub("*", glob.escape(name))
    patterns = {str(path) for path in (pattern, folder / pattern, folder / Path(pattern).name)}
    return {os.path.realpath(path) for one in patterns for path in glob.iglob(one) if os.path.isfile(path)}


def _check_source(path: str) -> None:
    """Raise `PtychodaskError` if another program holds a source file."""
    try:
        h5py.File(path, "r").close()
    except OSError as error:
        _check_not_held(error, path)


def _bytes_of_sources(dataset: h5py.Dataset) -> int:
    """Total length of the source files of a virtual dataset."""
    is_own_source = any(source.file_name == "." for source in dataset.virtual_sources())
    file_bytes = dataset.file.id.get_filesize() if is_own_source else 0
    return file_bytes + sum(os.path.getsize(path) for path in set[str]().union(*_source_files(dataset).values()))


class _DatasetFrames:
    """Frames (pattern, h, w) of a dataset."""

    seekable = True

    def __init__(
        self,
        dataset: h5py.Dataset,
        shape: tuple[int, ...],
        label: str,
        pattern_last: bool,
        lost: LostSourceError | None = None,
    ) -> None:
        self._dataset, self._shape, self._label, self._pattern_last = dataset, shape, label, pattern_last
        self._lost = lost
        leading = dataset.shape.index(frame_axes(dataset.shape)[0])
        self._axis = leading + (2 if pattern_last else 0)
        self._chunk_frames = 1 if dataset.chunks is None else int(dataset.chunks[self._axis])
        # A chunk of several frames would be decompressed again for each of them.
        self.random_access = not pattern_last and self._chunk_frames == 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._dataset.dtype).newbyteorder("=")

    def blocks(self) -> Iterator[NDArray[Any]]:
        for start, stop in block_ranges(self._shape, self.dtype.itemsize, self._chunk_frames):
            self._check_not_lost(np.arange(start, stop))
            yield self._read(start, stop)

    def _check_not_lost(self, index: NDArray[np.int64]) -> None:
        # HDF5 reads the fill value for them, without an error.
        if self._lost is not None and self._lost.rows is not None and np.isin(index, self._lost.rows).any():
            raise self._lost

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        self._check_not_lost(index)
        frames = np.empty((len(index), *self.shape[1:]), self.dtype)
        for start, stop in runs(index):
            frames[start:stop] = self._read(int(index[start]), int(index[start]) + stop - start)
        return frames

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        rows = tuple(slice(start, stop) if axis == self._axis else slice(None) for axis in range(self._dataset.ndim))
        with reading(self._label):
            frames = np.asarray(self._dataset[rows]).astype(self.dtype, copy=False)
        if self._pattern_last:
            return np.ascontiguousarray(frames.reshape(*self._shape[1:], -1).transpose(2, 0, 1))
        return frames.reshape(-1, *self._shape[1:])


class _RasterFrames(_DatasetFrames):
    """Frames of a raster dataset (row, column, h, w), row after row."""

    def __init__(self, dataset: h5py.Dataset, label: str, lost: LostSourceError | None) -> None:
        self._dataset, self._label, self._lost = dataset, label, lost
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


class _TransposedFrames:
    """Frames of a MATLAB file, whose rows and columns HDF5 exchanges."""

    seekable = True

    def __init__(self, frames: _DatasetFrames) -> None:
        self._frames = frames
        self.random_access = frames.random_access

    @property
    def shape(self) -> tuple[int, ...]:
        n_patterns, width, height = self._frames.shape
        return n_patterns, height, width

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._frames.dtype

    def blocks(self) -> Iterator[NDArray[Any]]:
        for block in self._frames.blocks():
            yield np.ascontiguousarray(block.swapaxes(1, 2))

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        return np.ascontiguousarray(self._frames[index].swapaxes(1, 2))
