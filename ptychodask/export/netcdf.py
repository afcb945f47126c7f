"""NetCDF-4 files with all arrays of a result, for example for xarray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np

from ptychodask.export.content import Content
from ptychodask.export.hdf5_disk import Hdf5Disk
from ptychodask.progress import Progress

PARTS = {"_real": "real", "_imag": "imag"}
"""Name endings of the two variables for a complex one, and their parts: NetCDF has no complex numbers."""


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write the data variables (y, x) of a result.

    Unseen pixels stay NaN.

    Notes
    -----
    A complex variable becomes two, ``object_real`` and ``object_imag``; ``object_real + 1j * object_imag`` is the
    object. Attributes other than numbers and strings are JSON.
    """
    ds = content.object.ds
    names = [str(name) for name in ds.data_vars if ds[name].dims == ("y", "x")]
    with Hdf5Disk(path) as disk, h5netcdf.File(disk, "w") as file:
        file.dimensions = dict(zip(("y", "x"), content.object.shape, strict=True))
        file.attrs.update(_supported(ds.attrs))
        for name, coordinate in ds.coords.items():
            if coordinate.ndim == 1:
                axis = file.create_variable(str(name), coordinate.dims, coordinate.dtype, data=coordinate.values)
                axis.attrs.update(_supported(coordinate.attrs))
        variables = {name: _variables(file, name, ds[name].dtype, ds[name].attrs) for name in names}
        for rows, arrays in disk.between(content.object.rows(bar, names)):
            for name, parts in variables.items():
                for part, variable in parts.items():
                    variable[rows] = getattr(arrays[name], part)


def _variables(file: h5netcdf.File, name: str, dtype: np.dtype[Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """File variables of a data variable, by part: "real" and "imag".

    A real variable has only "real".
    """
    endings = PARTS if dtype.kind == "c" else {"": "real"}
    kind = np.empty(0, dtype).real.dtype
    chunks = tuple(min(256, size.size) for size in (file.dimensions["y"], file.dimensions["x"]))
    variables = {}
    for ending, part in endings.items():
        variable = file.create_variable(
            f"{name}{ending}", ("y", "x"), kind, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True
        )
        variable.attrs.update(_supported(attributes))
        variables[part] = variable
    return variables


def _supported(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes in types that NetCDF supports.

    Examples
    --------
    >>> _supported({"units": "m", "plan": {"tile": 256}, "resumed": False})
    {'units': 'm', 'plan': '{"tile": 256}', 'resumed': 'false'}
    """
    plain = (str, int, float)
    return {
        str(name): value if isinstance(value, plain) and not isinstance(value, bool) else json.dumps(value)
        for name, value in attributes.items()
    }
