"""NPZ files written block by block.

No array needs to fit into memory.
"""

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
    """Context manager that writes an uncompressed NPZ file, like ``numpy.savez``.

    Parameters
    ----------
    path : Path
        File to create.
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
        """Write a complete array, a number or a string."""
        array = np.asarray(values)
        self.put_blocks(name, array.shape, array.dtype, [array])

    def put_blocks(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, blocks: Iterable[NDArray[Any]]) -> None:
        """Write an array from consecutive blocks along its first axes."""
        header = {"descr": npy_format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        # The archive does not know the length in advance; it may exceed the 4 GiB limit of plain ZIP.
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            npy_format.write_array_header_1_0(member, header)
            for block in blocks:
                member.write(np.ascontiguousarray(block, dtype).data.cast("B") if block.size else b"")
