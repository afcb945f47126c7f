"""Reconstructed objects of other programs: what they wrote, and where their files say that it lies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.io.formats import open_container
from ptychodask.io.npy_stream import read_npy, reading
from ptychodask.io.quantities import SQUARENESS
from ptychodask.io.source import Container, listed_keys
from ptychodask.scan import PtychodaskError

RECONSTRUCTED_KEY = "reconstructed_object"
"""Key of the object in the NPZ files that PtychoPINN's scripts write for Tike and pty-chi."""

PRODUCT_KEY = "object"
"""Key of the object in a Ptychodus product."""

PRODUCT_NUMBERS = ("center_y_m", "center_x_m", "pixel_height_m", "pixel_width_m")
"""Attributes of that object in HDF5; in an NPZ, keys that begin with ``object_``."""


@dataclass(frozen=True, eq=False)
class ForeignResult:
    """An object that another program reconstructed."""

    object: NDArray[np.complex64]
    """complex64 (y, x)."""

    corner_yx_px: tuple[float, float] | None = None
    """Coordinates (y, x) of pixel [0, 0] where positions are metres over the pixel size; None where the file has no
    frame but its own."""

    pixel_size_m: float | None = None
    """Size of an object pixel, metres, where the file says it."""

    program: str | None = None
    """The program, where the file says it."""


def read_foreign_result(path: str | Path, *, key: str | None = None) -> ForeignResult:
    """Read the object that another program reconstructed.

    Parameters
    ----------
    path : path
        An NPZ of Tike or pty-chi with ``reconstructed_object``; a Ptychodus product, HDF5 or NPZ; an NPY, NPZ or HDF5
        file with a complex array.
    key : str, optional
        Name of the array, for a file with several that is neither of the former. Such an array has no frame.

    Returns
    -------
    ForeignResult

    Raises
    ------
    PtychodaskError
        If there is no such file or array, or it is no complex (y, x); pickled objects are never loaded.

    Notes
    -----
    A Ptychodus product says where its object lies: x in pixels = (x_m − center_x_m) / pixel_width_m + W/2, y likewise,
    so that pixel [0, 0] lies at center / pixel size − half the size. An object of several layers is their product, as
    there.
    """
    path = Path(path)
    if path.suffix == ".npy":
        if key is not None:
            raise PtychodaskError(f"{path}: a .npy holds one array without a name; leave {key!r} out")
        return ForeignResult(_as_object(read_npy(path), str(path)))
    with ExitStack() as stack:
        container = open_container(path, path.parent, stack)
        found = container.keys()
        if key is None and RECONSTRUCTED_KEY in found:
            object_ = _as_object(container.array(RECONSTRUCTED_KEY), f"{path}[{RECONSTRUCTED_KEY}]")
            return ForeignResult(object_, program=_text(container, "algorithm") if "algorithm" in found else None)
        if key is None and PRODUCT_KEY in found:
            noted = container.numbers(PRODUCT_KEY)
            numbers = _numbers_of_npz(container, found) or {
                name: noted[name] for name in PRODUCT_NUMBERS if name in noted
            }
            if numbers:
                return _product(container, numbers)
        name = _only_complex(container, found) if key is None else key
        if name not in found:
            raise PtychodaskError(f"{path}: holds no array {name!r}; keys found: {listed_keys(found)}")
        return ForeignResult(_as_object(container.array(name), f"{path}[{name}]"))


def _text(container: Container, key: str) -> str | None:
    """A text of a file, where it is plain."""
    if container.dtype(key).kind != "U" or container.shape(key) != ():
        return None
    return str(container.array(key)[()])


def _numbers_of_npz(container: Container, found: Sequence[str]) -> dict[str, float]:
    """What the keys of an NPZ product say about its object's place; empty where they say nothing."""
    keys = {name: f"{PRODUCT_KEY}_{name}" for name in PRODUCT_NUMBERS}
    with reading(container.label):
        return {name: float(container.array(key).item()) for name, key in keys.items() if key in found}


def _product(container: Container, numbers: dict[str, float]) -> ForeignResult:
    label = f"{container.label}[{PRODUCT_KEY}]"
    missing = [name for name in PRODUCT_NUMBERS if name not in numbers]
    if missing:
        raise PtychodaskError(
            f"{label}: has no {', '.join(missing)}; pass key={PRODUCT_KEY!r} to read it without a frame"
        )
    center_y_m, center_x_m, height_m, width_m = (numbers[name] for name in PRODUCT_NUMBERS)
    if not (height_m > 0 and abs(width_m / height_m - 1) <= SQUARENESS and np.isfinite([center_y_m, center_x_m]).all()):
        raise PtychodaskError(
            f"{label}: pixels of {height_m:g} x {width_m:g} m around ({center_y_m:g}, {center_x_m:g}) m, "
            "expected square ones around a finite centre; bring them to one size"
        )
    layers = container.array(PRODUCT_KEY)
    object_ = _as_object(layers.prod(axis=0) if layers.ndim == 3 and len(layers) else layers, label)
    corner = center_y_m / height_m - object_.shape[0] / 2, center_x_m / width_m - object_.shape[1] / 2
    return ForeignResult(object_, corner, height_m, "Ptychodus")


def _only_complex(container: Container, found: Sequence[str]) -> str:
    """The name of the one complex array of a file."""
    complex_ = [key for key in found if container.dtype(key).kind == "c"]
    if len(complex_) != 1:
        raise PtychodaskError(
            f"{container.label}: holds {len(complex_)} complex arrays, expected one, {RECONSTRUCTED_KEY!r}, or a "
            f"Ptychodus product; keys found: {listed_keys(found)}; name the object's with key= (--key LABEL=KEY)"
        )
    return complex_[0]


def _as_object(values: NDArray[Any], label: str) -> NDArray[np.complex64]:
    plane = values[0] if values.ndim == 3 and len(values) == 1 else values
    if plane.dtype.kind != "c" or plane.ndim != 2 or min(plane.shape) < 2:
        raise PtychodaskError(
            f"{label}: found {values.dtype} of shape {values.shape}, expected a complex object (y, x)"
        )
    return plane.astype(np.complex64)
