"""Zarr of other programs, opened to read arrays of numbers."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import zarr

from ptychodask.errors import PtychodaskError
from ptychodask.storage.zarr_checks import CODECS, check_stored, codec_names, damage_errors

FOREIGN_CODECS = CODECS | {"bz2", "delta", "fletcher32", "lz4", "shuffle", "zlib"}
"""Codecs that may run in the Zarr of another program: as `CODECS`, and those of Zarr format 2."""


def is_zarr(path: Path) -> bool:
    """True for the folder of a Zarr group or array."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


def foreign_arrays(path: Path) -> tuple[dict[str, zarr.Array], dict[str, str]]:
    """Arrays of numbers in the Zarr of another program, and their units.

    Parameters
    ----------
    path : Path
        A group or array of Zarr format 2 or 3.

    Returns
    -------
    arrays : dict
        Path in the group -> array; a single array is named "data". Arrays of text are left out.
    units : dict
        Path -> its attribute "units" or "unit".

    Raises
    ------
    PtychodaskError
        If it cannot be read, or an array needs a codec that is not in `FOREIGN_CODECS`.
    """
    remedy = "copy it again, or save its arrays as .npy files"
    with damage_errors(path, "cannot be read as Zarr", remedy):
        root = zarr.open(path, mode="r")
        nodes = {"data": root} if isinstance(root, zarr.Array) else dict(root.members(max_depth=None))
        arrays = {
            name: node for name, node in nodes.items() if isinstance(node, zarr.Array) and node.dtype.kind in "buifc"
        }
        for name, array in arrays.items():
            label = f"{path}[{name}]"
            if array.metadata.zarr_format == 3:
                codecs = codec_names([codec.to_dict() for codec in array.metadata.codecs])
            else:
                described = array.metadata.to_dict()
                filters: Any = described.get("filters") or ()
                stages: list[Any] = [described.get("compressor"), *filters]
                codecs = {str(stage["id"]) for stage in stages if stage}
            if foreign := sorted(codecs - FOREIGN_CODECS):
                raise PtychodaskError(
                    f"{label}: has the codecs {', '.join(foreign)}, expected some of: "
                    f"{', '.join(sorted(FOREIGN_CODECS))}; {remedy}"
                )
            check_stored([array], prod(array.shape) * array.dtype.itemsize, label, remedy)
        attributes = {name: dict(array.attrs) for name, array in arrays.items()}
    units = {name: held.get("units", held.get("unit")) for name, held in attributes.items()}
    return arrays, {name: unit for name, unit in units.items() if isinstance(unit, str)}
