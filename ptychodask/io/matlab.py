"""MATLAB 5 files, read into memory; MATLAB 7.3 files are HDF5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.raw import block_ranges
from ptychodask.io.source import Frames, pattern_axes, require_keys


class MatlabFile:
    """Arrays of a MATLAB 5 file by their names, as a `Container`.

    Parameters
    ----------
    file : binary file
        Open and seekable; the caller closes it.
    label : str
        Name of the file, for messages.
    scratch : Path
        Not used: the format is limited to 2 GB, and is read at once.
    stack : ExitStack
        Not used.
    """

    def __init__(self, file: IO[bytes], label: str, scratch: Path, stack: ExitStack) -> None:
        self.label = label
        file.seek(0)
        try:
            content = scipy.io.loadmat(file)
        # scipy raises errors of many types on a damaged file.
        except Exception as error:
            raise PtychodaskError(
                f"{label}: cannot be read as a MATLAB 5 file ({error}); copy it again, or save it with -v7.3"
            ) from error
        self._arrays = {
            key: values.astype(values.dtype.newbyteorder("="), copy=False)
            for key, values in content.items()
            if isinstance(values, np.ndarray) and values.dtype.kind in "buifc"
        }

    def keys(self) -> list[str]:
        return list(self._arrays)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._values(key).shape

    def dtype(self, key: str) -> np.dtype[Any]:
        return self._values(key).dtype

    def has(self, key: str) -> bool:
        return key in self._arrays

    def unit(self, key: str) -> str | None:
        return None

    def numbers(self, key: str) -> dict[str, float]:
        return {}

    def array(self, key: str) -> NDArray[Any]:
        return self._values(key)

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        values = self._values(key)
        shape = pattern_axes(values.shape, f"{self.label}[{key}]", last=pattern_last)
        if pattern_last:
            return _Frames(np.moveaxis(values.reshape(*shape[1:], shape[0]), -1, 0))
        return _Frames(values.reshape(shape))

    def _values(self, key: str) -> NDArray[Any]:
        require_keys(self, [key])
        return self._arrays[key]


class _Frames:
    """Frames of an array in memory."""

    random_access = seekable = True

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    def blocks(self) -> Iterator[NDArray[Any]]:
        for start, stop in block_ranges(self.shape, self.dtype.itemsize):
            yield np.ascontiguousarray(self._values[start:stop])

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        return np.ascontiguousarray(self._values[index])
