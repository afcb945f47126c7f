"""TIFF: amplitude and phase as two 32-bit float channels, for ImageJ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ptychodask.export.content import Content
from ptychodask.progress import Progress

CHANNELS = ("amplitude", "phase")

PLAIN_BYTES = 4 * 10**9
"""Largest size of both channels for ImageJ's own variant: plain TIFF has 32-bit byte offsets."""


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write amplitude and phase (radians), float32; unseen pixels stay NaN.

    Notes
    -----
    The pixel size is in the resolution tags and in ImageJ's description, in nanometres, and so is the origin of the
    object: ImageJ shows scan coordinates. Above `PLAIN_BYTES` it is an OME-TIFF with 64-bit offsets (BigTIFF), which
    ImageJ opens with Bio-Formats. Rows are written block by block, each at its offset in the file.
    """
    shape = (len(CHANNELS), *content.object.shape)
    plain = math.prod(shape) * 4 <= PLAIN_BYTES
    dtype = np.dtype(">f4" if plain else "<f4")
    laid_out = tifffile.imwrite(
        path,
        shape=shape,
        dtype=dtype,
        byteorder=">" if plain else "<",
        photometric="minisblack",
        returnoffset=True,
        **(_imagej(content) if plain else _ome(content)),
    )
    assert laid_out is not None
    start, width = laid_out[0], shape[2]
    with path.open("r+b") as file:
        for rows, arrays in content.object.rows(bar):
            for channel, values in enumerate((np.abs(arrays["object"]), np.angle(arrays["object"]))):
                file.seek(start + (channel * shape[1] + rows.start) * width * dtype.itemsize)
                file.write(values.astype(dtype).data)


def _imagej(content: Content) -> dict[str, Any]:
    y_px, x_px = content.object.corner_yx_px
    metadata = {"axes": "CYX", "mode": "grayscale", "Labels": list(CHANNELS), "xorigin": -x_px, "yorigin": -y_px}
    if content.pixel_size_m is None:
        return {"imagej": True, "metadata": metadata | {"unit": "pixel"}}
    per_nm = 1e-9 / content.pixel_size_m
    return {"imagej": True, "resolution": (per_nm, per_nm), "metadata": metadata | {"unit": "nm"}}


def _ome(content: Content) -> dict[str, Any]:
    metadata: dict[str, Any] = {"axes": "CYX", "Name": content.name, "Channel": {"Name": list(CHANNELS)}}
    if content.pixel_size_m is None:
        return {"ome": True, "bigtiff": True, "metadata": metadata}
    size_nm = content.pixel_size_m * 1e9
    for axis, corner_px in zip("YX", content.object.corner_yx_px, strict=True):
        metadata |= {f"PhysicalSize{axis}": size_nm, f"PhysicalSize{axis}Unit": "nm"}
        metadata.setdefault("Plane", {})[f"Position{axis}"] = [corner_px * size_nm] * len(CHANNELS)
        metadata["Plane"][f"Position{axis}Unit"] = ["nm"] * len(CHANNELS)
    per_cm = 1e-2 / content.pixel_size_m
    return {
        "ome": True,
        "bigtiff": True,
        "resolution": (per_cm, per_cm),
        "resolutionunit": "CENTIMETER",
        "metadata": metadata,
    }
