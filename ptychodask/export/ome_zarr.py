"""OME-Zarr 0.5: amplitude and phase as an image pyramid, for napari.

The store has Zarr format 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle

from ptychodask.export.content import Content
from ptychodask.progress import Progress
from ptychodask.pyramid import COARSEST_PIXELS, halve
from ptychodask.storage.atomic import StoreKind

KIND = StoreKind("ptychodask-ome-zarr", 1, "OME-Zarr image", "export")

OME_VERSION = "0.5"

CHANNELS = ("amplitude", "phase")

CHUNK_PIXELS = 512
"""Pixels across a chunk of a level; each chunk is a file, and viewers fetch them separately."""

SHOWN_PERCENTILES = (1.0, 99.0)
"""Percentiles of the seen pixels of the coarsest level at the ends of the initial colour scale."""


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write amplitude and phase (radians) at full size, 1/2, 1/4, ...

    Unseen pixels are NaN.

    Notes
    -----
    A coarser pixel is the weighted mean of 2 x 2 complex pixels of the finer level (`halve`), centred on them, so the
    translation of level k is larger by (2^k − 1)/2 pixels. The coarsest level is shorter than `COARSEST_PIXELS` along
    both sides. Each block of rows is halved down to the coarsest level in memory, so no level is read back.
    """
    scales = n_levels(content.object.shape)
    root = zarr.create_group(path, zarr_format=3)
    levels = [_create_level(root, level, content.object.shape) for level in range(scales)]
    names = [name for name in ("object", "weight") if name in content.object.ds]
    # Blocks begin at chunk borders (both numbers are powers of two), so no chunk of the finest level is written twice.
    for rows, arrays in content.object.rows(bar, names, multiple=max(CHUNK_PIXELS, 2 ** (scales - 1))):
        object_ = arrays["object"]
        weight = arrays.get("weight", np.isfinite(object_).astype(np.float32))
        start = rows.start
        for level, array in enumerate(levels):
            if level:
                object_, weight = halve(object_, weight)
                start //= 2
            _put_rows(array, start, object_)
    root.attrs.update(
        {"format": KIND.name, "format_version": KIND.version, "ome": _metadata(content, scales, np.asarray(levels[-1]))}
    )


def _put_rows(array: zarr.Array, start: int, object_: NDArray[np.complex64]) -> None:
    """Write rows of a level chunk by chunk.

    With several at once, writes would still be running after one fails on a full disk.
    """
    width = array.chunks[-1]
    for channel, values in enumerate((np.abs(object_), np.angle(object_))):
        for x in range(0, array.shape[-1], width):
            for y in range(0, len(object_), CHUNK_PIXELS):
                part = values[y : y + CHUNK_PIXELS, x : x + width]
                array[channel, start + y : start + y + part.shape[0], x : x + part.shape[1]] = part


def n_levels(shape: tuple[int, int]) -> int:
    """Number of levels of a pyramid, including the full size.

    Examples
    --------
    >>> n_levels((8192, 100)), n_levels((300, 511)), n_levels((512, 512))
    (6, 1, 2)
    """
    side, levels = max(shape), 1
    while side >= COARSEST_PIXELS:
        side, levels = -(-side // 2), levels + 1
    return levels


def _create_level(root: zarr.Group, level: int, shape: tuple[int, int]) -> zarr.Array:
    plane = tuple(-(-side // 2**level) for side in shape)
    return root.create_array(
        str(level),
        shape=(len(CHANNELS), *plane),
        dtype=np.float32,
        chunks=(1, *(min(CHUNK_PIXELS, side) for side in plane)),
        fill_value=np.nan,
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.bitshuffle),
        dimension_names=("c", "y", "x"),
    )


def _metadata(content: Content, scales: int, coarsest: NDArray[np.float32]) -> dict[str, Any]:
    """The group's ``ome`` attribute (ngff.openmicroscopy.org/0.5)."""
    known = content.pixel_size_m is not None
    size = content.known("pixel_size_m") * 1e9 if known else 1.0
    unit = {"unit": "nanometer"} if known else {}
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space"} | unit for axis in "yx")]
    datasets = []
    for level in range(scales):
        corner = [(start + (2**level - 1) / 2) * size for start in content.object.corner_yx_px]
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, 2**level * size, 2**level * size]},
                    {"type": "translation", "translation": [0.0, *corner]},
                ],
            }
        )
    multiscale = {"name": content.name, "axes": axes, "datasets": datasets, "type": "weighted mean"}
    channels = [_shown(name, values) for name, values in zip(CHANNELS, coarsest, strict=True)]
    return {"version": OME_VERSION, "multiscales": [multiscale], "omero": {"channels": channels}}


def _shown(name: str, values: NDArray[np.float32]) -> dict[str, Any]:
    """Initial display settings of a channel."""
    seen = values[np.isfinite(values)]
    low, high = np.percentile(seen, SHOWN_PERCENTILES) if seen.size else (0.0, 1.0)
    window = {"min": low, "max": high, "start": low, "end": high}
    return {"label": name, "color": "FFFFFF", "active": True, "window": {k: float(v) for k, v in window.items()}}
