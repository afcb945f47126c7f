"""Readers of reconstructed objects of other programs, with their coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.formats import open_container
from ptychodask.io.npy_stream import read_npy, reading
from ptychodask.io.quantities import SQUARENESS
from ptychodask.io.source import Container, listed_keys

RECONSTRUCTED_KEY = "reconstructed_object"
"""Key of the object in the NPZ files that PtychoPINN's scripts write for Tike and pty-chi."""

PRODUCT_KEY = "object"
"""Key of the object in a Ptychodus product."""

PRODUCT_NUMBERS = ("center_y_m", "center_x_m", "pixel_height_m", "pixel_width_m")
"""Attributes of the object in an HDF5 product; in an NPZ, keys that begin with ``object_``."""


@dataclass(frozen=True, eq=False)
class ForeignResult:
    """An object that another program reconstructed."""

    object: NDArray[np.complex64]
    """complex64 (y, x)."""

    corner_yx_px: tuple[float, float] | None = None
    """Scan coordinates (y, x) of pixel [0, 0], object pixels (metres over the pixel size); None if the file has no scan
    coordinates."""

    pixel_size_m: float | None = None
    """Size of an object pixel, metres, if the file records it."""

    program: str | None = None
    """Name of the program, if the file records it."""


def read_foreign_result(path: str | Path, *, key: str | None = None) -> ForeignResult:
    """Read the object that another program reconstructed.

    Parameters
    ----------
    path : path
        An NPZ of Tike or pty-chi with ``reconstructed_object``; a Ptychodus product, HDF5 or NPZ; an NPY, NPZ or HDF5
        file with a complex array.
    key : str, optional
        Key of the array, for any other file with several arrays. Such an array has no scan coordinates.

    Returns
    -------
    ForeignResult
        The object, with scan coordinates if it is from a Ptychodus product.

    Raises
    ------
    PtychodaskError
        If the file or the array does not exist, or is not a complex array (y, x); pickled objects are never loaded.

    Notes
    -----
    A Ptychodus product records the coordinates of its object: x in pixels = (x_m − center_x_m) / pixel_width_m + W/2,
    y likewise, so that pixel [0, 0] is at center / pixel size − half the size. As in Ptychodus, an object of several
    layers is the product of the layers.
    """
    path = Path(path)
    if path.suffix == ".npy":
        if key is not None:
            raise PtychodaskError(f"{path}: a .npy file contains one array without a name; leave key={key!r} out")
        return ForeignResult(_as_object(read_npy(path), str(path)))
    with ExitStack() as stack:
        container = open_container(path, path.parent, stack)
        keys = container.keys()
        if key is None and RECONSTRUCTED_KEY in keys:
            object_ = _as_object(container.array(RECONSTRUCTED_KEY), f"{path}[{RECONSTRUCTED_KEY}]")
            return ForeignResult(object_, program=_text(container, "algorithm") if "algorithm" in keys else None)
        if key is None and PRODUCT_KEY in keys:
            attributes = container.numbers(PRODUCT_KEY)
            numbers = _numbers_of_npz(container, keys) or {
                name: attributes[name] for name in PRODUCT_NUMBERS if name in attributes
            }
            if numbers:
                return _product(container, numbers)
        name = _only_complex(container, keys) if key is None else key
        if name not in keys:
            raise PtychodaskError(
                f"{path}: has no array {name!r}; keys found: {listed_keys(keys)}; pass one of them as key="
            )
        return ForeignResult(_as_object(container.array(name), f"{path}[{name}]"))


def _text(container: Container, key: str) -> str | None:
    """Text at a key; None if it is not a plain string."""
    if container.dtype(key).kind != "U" or container.shape(key) != ():
        return None
    return str(container.array(key)[()])


def _numbers_of_npz(container: Container, keys: Sequence[str]) -> dict[str, float]:
    """Coordinates of the object in an NPZ product; may be empty."""
    key_of = {name: f"{PRODUCT_KEY}_{name}" for name in PRODUCT_NUMBERS}
    with reading(container.label):
        return {name: float(container.array(key).item()) for name, key in key_of.items() if key in keys}


def _product(container: Container, numbers: dict[str, float]) -> ForeignResult:
    label = f"{container.label}[{PRODUCT_KEY}]"
    missing = [name for name in PRODUCT_NUMBERS if name not in numbers]
    if missing:
        raise PtychodaskError(
            f"{label}: has no {', '.join(missing)}; pass key={PRODUCT_KEY!r} to read it without coordinates"
        )
    center_y_m, center_x_m, height_m, width_m = (numbers[name] for name in PRODUCT_NUMBERS)
    if not (height_m > 0 and abs(width_m / height_m - 1) <= SQUARENESS and np.isfinite([center_y_m, center_x_m]).all()):
        raise PtychodaskError(
            f"{label}: pixels of {height_m:g} x {width_m:g} m around ({center_y_m:g}, {center_x_m:g}) m, "
            "expected square pixels and a finite centre; resample the object to square pixels"
        )
    layers = container.array(PRODUCT_KEY)
    object_ = _as_object(layers.prod(axis=0) if layers.ndim == 3 and len(layers) else layers, label)
    corner = center_y_m / height_m - object_.shape[0] / 2, center_x_m / width_m - object_.shape[1] / 2
    return ForeignResult(object_, corner, height_m, "Ptychodus")


def _only_complex(container: Container, keys: Sequence[str]) -> str:
    """Key of the only complex array of a file."""
    complex_ = [key for key in keys if container.dtype(key).kind == "c"]
    if len(complex_) != 1:
        raise PtychodaskError(
            f"{container.label}: has {len(complex_)} complex arrays, expected one, {RECONSTRUCTED_KEY!r}, or a "
            f"Ptychodus product; keys found: {listed_keys(keys)}; pass that of the object as key= (--key LABEL=KEY)"
        )
    return complex_[0]


def _as_object(values: NDArray[Any], label: str) -> NDArray[np.complex64]:
    plane = values[0] if values.ndim == 3 and len(values) == 1 else values
    if plane.dtype.kind != "c" or plane.ndim != 2 or min(plane.shape) < 2:
        raise PtychodaskError(
            f"{label}: found {values.dtype} of shape {values.shape}, expected a complex object (y, x)"
        )
    return plane.astype(np.complex64)
