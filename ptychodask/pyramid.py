"""Coarser levels of a result."""

from __future__ import annotations

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.result import PYRAMID, stored_array
from ptychodask.storage.location import Location
from ptychodask.storage.zarr_checks import COMPRESSORS

COARSEST_PIXELS = 512
"""Upper bound of the longer side of the coarsest level of a pyramid, pixels."""


def write_pyramid(path: Location) -> None:
    """Add coarser levels of object and weight to an unfinished result store.

    Each level has half the pixels of the previous one along each side; there is at least one level, and the longer side
    of the last is shorter than `COARSEST_PIXELS`.

    Parameters
    ----------
    path : Location
        Store that `create_result` made, with all tiles written.

    Notes
    -----
    A pixel of level k is the mean of 2 x 2 pixels of level k - 1, weighted by their weights; its weight is the mean of
    theirs. It is centred between them, so its coordinate is that of the first plus half a pixel. One tile is in memory
    at a time.
    """
    root = zarr.open_group(path.zarr_store(), mode="r+", zarr_format=3)
    finer, level = root, 1
    while level == 1 or max(stored_array(finer, "object").shape[-2:]) >= COARSEST_PIXELS:
        finer = _write_level(root.require_group(f"{PYRAMID}/{level}"), finer)
        level += 1


def _write_level(group: zarr.Group, finer: zarr.Group) -> zarr.Group:
    sources = {name: stored_array(finer, name) for name in ("object", "weight")}
    plane = sources["object"].shape[-2:]
    coarse = tuple(-(-side // 2) for side in plane)
    tile = int((sources["object"].shards or sources["object"].chunks)[-1])
    for name, source in sources.items():
        group.create_array(
            name,
            shape=(*source.shape[:-2], *coarse),
            dtype=source.dtype,
            chunks=source.chunks,
            shards=(*source.shape[:-2], tile, tile),
            fill_value=source.fill_value,
            compressors=COMPRESSORS,
            dimension_names=tuple(source.metadata.dimension_names or ()),  # type: ignore[union-attr]
        )
    for y in range(0, coarse[0], tile):
        for x in range(0, coarse[1], tile):
            region = ..., slice(y, min(y + tile, coarse[0])), slice(x, min(x + tile, coarse[1]))
            below = ..., slice(2 * y, 2 * (y + tile)), slice(2 * x, 2 * (x + tile))
            halved = halve(*(np.asarray(sources[name][below]) for name in sources))
            for name, values in zip(sources, halved, strict=True):
                stored_array(group, name)[region] = values
    for axis, dim in enumerate(("y", "x")):
        values = np.asarray(stored_array(finer, dim)[...])
        first, step = float(values[0]), float(values[1] - values[0])
        group.create_array(
            dim,
            data=first + step / 2 + 2 * step * np.arange(coarse[axis]),
            chunks="auto",
            compressors=COMPRESSORS,
            dimension_names=(dim,),
        )
    return group


def halve(
    object_: NDArray[np.complex64], weight: NDArray[np.float32]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Object and weight with half the pixels along y and x.

    Parameters
    ----------
    object_ : complex64 array (..., y, x)
        NaN where no patch reached.
    weight : float32 array (..., y, x)

    Returns
    -------
    object : complex64 array (..., y/2, x/2)
        Mean of 2 x 2 pixels weighted by their weights, NaN if all are; an odd last row or column is averaged without a
        partner.
    weight : float32 array (..., y/2, x/2)
        Mean weight.

    Examples
    --------
    >>> halved, weight = halve(np.array([[1, 3], [np.nan, 3]], np.complex64), np.array([[1, 1], [0, 2]], np.float32))
    >>> halved.tolist(), weight.tolist()
    ([[(2.5+0j)]], [[1.0]])
    """
    odd = [(0, 0)] * (object_.ndim - 2) + [(0, side % 2) for side in object_.shape[-2:]]
    padded = np.pad(weight.astype(np.float64), odd)
    weighted = np.pad(np.where(weight > 0, object_, 0) * weight, odd)
    (height, width), blocks = padded.shape[-2:], (*padded.shape[:-2], -1, 2, padded.shape[-1] // 2, 2)
    total, sums = (values.reshape(blocks).sum(axis=(-3, -1)) for values in (padded, weighted))
    assert total.shape[-2:] == (height // 2, width // 2)
    mean = np.where(total > 0, sums / np.where(total > 0, total, 1), complex(np.nan, np.nan))
    present = np.pad(np.ones(weight.shape[-2:]), odd[-2:]).reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3))
    return mean.astype(np.complex64), (total / present).astype(np.float32)
