"""Folders of other programs as files of arrays: .npy files, or Zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.io.arrays import NamedArrays, Sliced
from ptychodask.io.npy_stream import read_header, reading
from ptychodask.storage.atomic import recorded_folder_format
from ptychodask.storage.foreign import foreign_arrays, is_zarr

NPY_ENDING = ".npy"


def is_foreign_folder(path: Path) -> bool:
    """True for .npy files, or Zarr of another program."""
    if is_zarr(path):
        return recorded_folder_format(path) is None
    return any(path.glob(f"*{NPY_ENDING}"))


def open_folder(path: Path) -> NamedArrays:
    """A folder of .npy files or of Zarr, as a `Container`.

    Parameters
    ----------
    path : Path
        The folder. The keys are the names of its .npy files without their ending, or the paths of its Zarr arrays.

    Raises
    ------
    PtychodaskError
        If it contains neither, is a store of this package, or has an array that cannot be read safely.
    """
    stored = recorded_folder_format(path)
    if stored is not None:
        raise PtychodaskError(
            f"{path}: is a store already (format is {stored!r}), expected data of another program; use it as it is"
        )
    if is_zarr(path):
        arrays, units = foreign_arrays(path)
        return NamedArrays(str(path), arrays, units)
    files = sorted(file for file in path.iterdir() if file.suffix == NPY_ENDING and file.is_file())
    if not files:
        raise PtychodaskError(
            f"{path}: is a folder, expected an NPZ or HDF5 file, or a folder of .npy files or Zarr; name a file in it"
        )
    return NamedArrays(str(path), {file.stem: _mapped(file) for file in files})


def _mapped(path: Path) -> Sliced:
    """Values of a .npy file, read when they are sliced."""
    with reading(str(path)), path.open("rb") as file:
        header = read_header(file, path.stat().st_size, str(path))
    if header.dtype.kind not in "buifc":
        raise PtychodaskError(f"{path}: values have type {header.dtype}, expected numbers; move it out of the folder")
    if not all(header.shape):
        return np.empty(header.shape, header.dtype)
    return np.memmap(
        path, header.dtype, "r", offset=header.length, shape=header.shape, order="F" if header.fortran else "C"
    )
