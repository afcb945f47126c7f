"""Named arrays in memory, memory maps or Zarr, as a `Container`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.npy_stream import reading
from ptychodask.io.raw import block_ranges, runs
from ptychodask.io.source import Frames, frame_axes, pattern_axes, raster_shape, require_keys


class Sliced(Protocol):
    """An array that is read by slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class NamedArrays:
    """Arrays by their names, as a `Container`.

    Parameters
    ----------
    label : str
        Name of the file or folder, for messages.
    arrays : mapping
        Name -> array of numbers, of any byte order.
    units : mapping
        Name -> unit that is recorded for an array.
    """

    def __init__(self, label: str, arrays: Mapping[str, Sliced], units: Mapping[str, str] | None = None) -> None:
        self.label = label
        self._arrays, self._units = arrays, units or {}

    def keys(self) -> list[str]:
        return list(self._arrays)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._values(key).shape)

    def dtype(self, key: str) -> np.dtype[Any]:
        return np.dtype(self._values(key).dtype).newbyteorder("=")

    def has(self, key: str) -> bool:
        return key in self._arrays

    def unit(self, key: str) -> str | None:
        return self._units.get(key)

    def text(self, key: str) -> str | None:
        return None

    def numbers(self, key: str) -> dict[str, float]:
        return {}

    def array(self, key: str) -> NDArray[Any]:
        with reading(f"{self.label}[{key}]"):
            return np.asarray(self._values(key)[...]).astype(self.dtype(key), copy=False)

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        label = f"{self.label}[{key}]"
        shape = self.shape(key)
        if self.dtype(key).kind not in "buifc":
            raise PtychodaskError(f"{label}: values have type {self.dtype(key)}, expected numbers")
        n_columns = 1
        if raster and (axes := raster_shape(shape)):
            n_columns = axes[1]
            merged: tuple[int, ...] = (prod(axes), *frame_axes(shape)[2:])
        else:
            merged = pattern_axes(shape, label, last=pattern_last)
        return _SlicedFrames(self._values(key), merged, self.dtype(key), label, n_columns, pattern_last)

    def _values(self, key: str) -> Sliced:
        require_keys(self, [key])
        return self._arrays[key]


class _SlicedFrames:
    """Frames of an array that is read by slices."""

    random_access = seekable = True

    def __init__(
        self,
        values: Sliced,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        label: str,
        n_columns: int,
        pattern_last: bool,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._values, self._label, self._n_columns, self._last = values, label, n_columns, pattern_last
        axes = values.shape
        # The axis of the patterns, or of the rows of a raster, is the first or last one that is longer than 1.
        longest = [axis for axis, n in enumerate(axes) if n == shape[0] // n_columns]
        self._axis = (longest[-1] if pattern_last else longest[0]) if longest else 0

    def blocks(self) -> Iterator[NDArray[Any]]:
        for start, stop in block_ranges(self.shape, self.dtype.itemsize):
            yield self._read(start, stop)

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        frames = np.empty((len(index), *self.shape[1:]), self.dtype)
        for start, stop in runs(index):
            frames[start:stop] = self._read(int(index[start]), int(index[stop - 1]) + 1)
        return frames

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        first, last = start // self._n_columns, -(-stop // self._n_columns)
        with reading(self._label):
            part = np.asarray(self._values[(*(slice(None),) * self._axis, slice(first, last))])
        if self._last:
            part = np.moveaxis(part, self._axis, 0)
        part = part.reshape(-1, *self.shape[1:])
        skipped = first * self._n_columns
        return np.ascontiguousarray(part[start - skipped : stop - skipped], dtype=self.dtype)
