"""NumPy's NPZ, written array by array and block by block, so that no array need be whole in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import DTypeLike, NDArray


class NpzWriter:
    """An NPZ file that is being written, uncompressed as ``numpy.savez`` writes it; a context manager.

    Parameters
    ----------
    path : Path
        File to make.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> NpzWriter:
        self._archive = self._stack.enter_context(zipfile.ZipFile(self._path, "w"))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def put(self, name: str, values: Any) -> None:
        """Write an array, a number or a text whole."""
        array = np.asarray(values)
        self.put_blocks(name, array.shape, array.dtype, [array])

    def put_blocks(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, blocks: Iterable[NDArray[Any]]) -> None:
        """Write an array of which blocks along its first axes come one after the other."""
        header = {"descr": npy_format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        # The length is not known to the archive beforehand, and may be beyond what its old format holds.
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            npy_format.write_array_header_1_0(member, header)
            for block in blocks:
                member.write(np.ascontiguousarray(block, dtype).data.cast("B") if block.size else b"")
