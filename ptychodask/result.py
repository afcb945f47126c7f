"""A reconstructed object as an xarray Dataset: its schema, its store and its accessor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.errors import ZarrUserWarning

import ptychodask
from ptychodask.scan import PtychodaskError
from ptychodask.store import Form, open_root, whole_or_nothing

FORMAT = "ptychodask-result"
FORMAT_VERSION = 1

RESULT = Form(FORMAT, FORMAT_VERSION, "result", "reconstruct")

CHUNK_PIXELS = 256
"""Pixels across a chunk of a stored result, where the tile is a multiple of it."""

VARIABLES: dict[str, tuple[type, Any, str]] = {
    "object": (np.complex64, complex(np.nan, np.nan), "complex transmission of the object"),
    "weight": (np.float32, 0.0, "sum of the weights of the patches"),
    "uncertainty": (np.float32, np.nan, "weighted standard deviation of the overlapping estimates"),
    "count": (np.int32, 0, "patches that reached the pixel"),
}
"""Data variables of a result: dtype, value where no patch reached, meaning."""

TileArrays = tuple[NDArray[np.complex64], NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]
"""object, weight, uncertainty and count of one tile, as `reassembly.finish` gives them."""


def make_dataset(
    object: Any,
    weight: Any,
    uncertainty: Any,
    count: Any,
    corner: tuple[int, int],
    *,
    pixel_size_m: float | None,
    attributes: dict[str, Any],
) -> xr.Dataset:
    """The Dataset of a reconstructed object.

    Parameters
    ----------
    object : complex64 array (y, x)
        NaN where no patch reached; NumPy or lazy, as the arrays that follow.
    weight, uncertainty : float32 array (y, x)
    count : int32 array (y, x)
    corner : (int, int)
        Coordinates (y, x) of pixel [0, 0] in the scan's frame.
    pixel_size_m : float or None
        Size of an object pixel, metres; adds the coordinates ``y_m`` and ``x_m``.
    attributes : dict
        Plain values for JSON: hashes, plan, versions, rates.

    Returns
    -------
    xarray.Dataset
        Variables of `VARIABLES`; coordinates ``y``, ``x`` in pixels of the scan's frame.

    Examples
    --------
    >>> ones = np.ones((2, 3))
    >>> ds = make_dataset(ones, ones, ones, ones, (-1, 4), pixel_size_m=None, attributes={})
    >>> ds.y.values.tolist(), ds.x.values.tolist()
    ([-1.0, 0.0], [4.0, 5.0, 6.0])
    """
    arrays = {"object": object, "weight": weight, "uncertainty": uncertainty, "count": count}
    return xr.Dataset(
        {
            name: (("y", "x"), array.astype(VARIABLES[name][0], copy=False), {"long_name": VARIABLES[name][2]})
            for name, array in arrays.items()
        },
        coords=_coordinates(object.shape, corner, pixel_size_m),
        attrs={**attributes, **_own_attributes(pixel_size_m)},
    )


def _own_attributes(pixel_size_m: float | None) -> dict[str, Any]:
    own = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return own if pixel_size_m is None else {**own, "pixel_size_m": float(pixel_size_m)}


def _coordinates(shape: tuple[int, ...], corner: tuple[int, int], pixel_size_m: float | None) -> dict[str, Any]:
    coordinates: dict[str, Any] = {}
    for dim, size, start in zip(("y", "x"), shape, corner, strict=True):
        pixels = start + np.arange(size, dtype=np.float64)
        coordinates[dim] = (dim, pixels, {"units": "px", "long_name": f"{dim} in the scan's frame"})
        if pixel_size_m is not None:
            coordinates[f"{dim}_m"] = (dim, pixels * pixel_size_m, {"units": "m", "long_name": f"{dim} in metres"})
    return coordinates


def create_result(
    path: Path, shape: tuple[int, int], corner: tuple[int, int], tile: int, *, pixel_size_m: float | None
) -> None:
    """An empty result store for tiles to be written into; it stays unfinished until `finish_result`.

    Parameters
    ----------
    path : Path
        Folder that exists and is empty (see `whole_or_nothing`).
    shape, corner : (int, int)
        Pixels (y, x) of the whole object, and the coordinates of its first one.
    tile : int
        Pixels across a tile; one shard, so that no two tiles share a file.
    pixel_size_m : float or None
    """
    root = zarr.create_group(path, zarr_format=3, overwrite=True)
    root.attrs.update({**_own_attributes(pixel_size_m), "state": "writing"})
    chunk = CHUNK_PIXELS if tile % CHUNK_PIXELS == 0 else tile
    for name, (dtype, fill, meaning) in VARIABLES.items():
        array = root.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(chunk, chunk),
            shards=(tile, tile),
            fill_value=dtype(fill),
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.bitshuffle),
            dimension_names=("y", "x"),
        )
        array.attrs["long_name"] = meaning
        if pixel_size_m is not None:
            # The CF convention by which xarray tells coordinates from data.
            array.attrs["coordinates"] = "y_m x_m"
    for name, (dim, values, attributes) in _coordinates(shape, corner, pixel_size_m).items():
        root.create_array(name, data=values, chunks=values.shape, dimension_names=(dim,)).attrs.update(attributes)


def write_tile(path: Path, start_yx: tuple[int, int], arrays: TileArrays) -> None:
    """Write one tile of a result store.

    Parameters
    ----------
    path : Path
        Store that `create_result` made.
    start_yx : (int, int)
        Row and column of the tile's first pixel in the whole arrays: whole multiples of the tile.
    arrays : object, weight, uncertainty, count (y, x)
    """
    root = zarr.open_group(path, mode="r+", zarr_format=3)
    height, width = arrays[0].shape
    region = slice(start_yx[0], start_yx[0] + height), slice(start_yx[1], start_yx[1] + width)
    for name, values in zip(VARIABLES, arrays, strict=True):
        array = root[name]
        assert isinstance(array, zarr.Array)
        array[region] = values


def finish_result(path: Path, attributes: dict[str, Any]) -> None:
    """Record what made a result and mark its store as complete.

    Parameters
    ----------
    path : Path
    attributes : dict
        Plain values for JSON.
    """
    root = zarr.open_group(path, mode="r+", zarr_format=3)
    root.attrs.update({**attributes, "state": "complete"})
    with warnings.catch_warnings():
        # Consolidated metadata are what xarray reads; zarr warns that format 3 has not standardised them.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(path, zarr_format=3)


def open_result(path: str | Path) -> xr.Dataset:
    """Open a stored result; its arrays stay on disk.

    Parameters
    ----------
    path : path
        What `reconstruct` wrote to `out`, or ``ds.ptycho.save`` wrote.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    PtychodaskError
        If there is no result, it is unfinished, foreign or of a newer format.
    """
    where = Path(path)
    open_root(where, RESULT)
    ds = xr.open_zarr(where, chunks={}, consolidated=True)[list(VARIABLES)]
    del ds.attrs["state"]
    return ds


@xr.register_dataset_accessor("ptycho")
class PtychoAccessor:
    """What a result can do beside what every Dataset can: ``ds.ptycho``."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @property
    def amplitude(self) -> xr.DataArray:
        """|object| (y, x)."""
        amplitude = abs(self._ds["object"]).rename("amplitude")
        return amplitude.assign_attrs(long_name="amplitude of the object")

    @property
    def phase(self) -> xr.DataArray:
        """Argument of the object (y, x) on [-π, π], radians."""
        phase = xr.ufuncs.angle(self._ds["object"]).rename("phase")
        return phase.assign_attrs(long_name="phase of the object", units="rad")

    def plot(self, *, path: str | Path | None = None) -> Any:
        """Figure of the result, as `ptychodask.plot` draws it: amplitude, phase, weight and uncertainty.

        Parameters
        ----------
        path : path, optional
            Where to write it too.

        Returns
        -------
        matplotlib.figure.Figure
        """
        # Figures lie further down; the package finds them when they are asked for.
        return ptychodask.plot(self._ds, path=path)

    def compute(self) -> xr.Dataset:
        """The result in memory, each task of a lazy one run once.

        Notes
        -----
        The graph is left as it was built: optimisation would drop the resources that tasks ask for.
        """
        return self._ds.compute(optimize_graph=False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Bring the result into memory and write it to a store that `open_result` opens.

        Parameters
        ----------
        path : path
        overwrite : bool
            Replace what is there.

        Raises
        ------
        PtychodaskError
            If `path` exists already, the disk refuses, or this is not a whole block of a result.

        Notes
        -----
        An object larger than memory goes to disk tile by tile with ``reconstruct(..., out=path)``.
        """
        _check_savable(self._ds)
        ds = self.compute()
        corner = (int(ds["y"][0]), int(ds["x"][0]))
        arrays = [ds[name].values for name in VARIABLES]
        with whole_or_nothing(Path(path), overwrite=overwrite, form=RESULT) as building:
            pixel_size_m = ds.attrs.get("pixel_size_m")
            create_result(building, arrays[0].shape, corner, CHUNK_PIXELS, pixel_size_m=pixel_size_m)
            write_tile(building, (0, 0), tuple(arrays))  # type: ignore[arg-type]
            finish_result(building, ds.attrs)


def _check_savable(ds: xr.Dataset) -> None:
    for name in VARIABLES:
        if name not in ds or ds[name].dims != ("y", "x"):
            found = f"dims {ds[name].dims}" if name in ds else f"variables {', '.join(map(str, ds))}"
            raise PtychodaskError(f"result: expected {name} (y, x) to save it, found {found}; select pixels with isel")
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(f"result: pixels along {dim} are not consecutive, expected steps of 1 to save it")
