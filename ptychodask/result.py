"""Reconstructed object as an xarray Dataset: schema, store and accessor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import floordiv
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

import ptychodask
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import experiment_number, experiments_of
from ptychodask.html import Markup, card, image
from ptychodask.reassembly import Canvas, Finished, finish
from ptychodask.scan import Scan
from ptychodask.storage.atomic import StoreKind
from ptychodask.storage.location import Location, LocationLike, location_of, parse_location
from ptychodask.storage.records import as_text, from_text
from ptychodask.storage.zarr_checks import (
    COMPRESSORS,
    check_codecs,
    check_stored,
    consolidate,
    damage_errors,
    open_root,
)

logger = logging.getLogger(__name__)

FORMAT = "ptychodask-result"


FORMAT_VERSION = 1


RESULT = StoreKind(FORMAT, FORMAT_VERSION, "result", "reconstruct")


CHUNK_PIXELS = 256
"""Pixels across a chunk of a stored result, if the tile is a multiple of it."""


@dataclass(frozen=True)
class Variable:
    """Schema of one data variable, and its source in a canvas."""

    dtype: type

    fill: Any
    """Value where no patch reached."""

    long_name: str
    """Meaning, an attribute of the variable."""

    of: Callable[[Canvas, Finished], NDArray[Any]]
    """Array (y, x) from a canvas and its finished arrays."""

    per_half: bool = False
    """True if it describes the two halves of the patterns: it has a dimension `half` of 2."""

    on_request: bool = False
    """True if it is kept only with ``keep_stitched``."""

    comment: str | None = None
    """Remark for whoever reads it, an attribute of the CF conventions."""

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of the variable in a result."""
        return {"long_name": self.long_name} | ({} if self.comment is None else {"comment": self.comment})


NAN = complex(np.nan, np.nan)

OF_STITCHED = "of the stitched object; refinement does not change it"
"""Comment of variables that describe the overlapping patches."""

VARIABLES = {
    "object": Variable(np.complex64, NAN, "complex transmission of the object", lambda _, done: done.object),
    "weight": Variable(
        np.float32, 0.0, "sum of the weights of the patches", lambda _, done: done.weight, comment=OF_STITCHED
    ),
    "uncertainty": Variable(
        np.float32,
        np.nan,
        "weighted standard deviation of the overlapping estimates",
        lambda _, done: done.uncertainty,
        comment=OF_STITCHED,
    ),
    "count": Variable(np.int32, 0, "patches that reached the pixel", lambda _, done: done.count, comment=OF_STITCHED),
    "object_stitched": Variable(
        np.complex64, NAN, "object as stitched, before refinement", lambda _, done: done.object, on_request=True
    ),
    "object_half": Variable(
        np.complex64, NAN, "object from every other pattern", lambda _, done: done.object, per_half=True
    ),
    "weight_half": Variable(
        np.float32, 0.0, "sum of the weights of the patches of one half", lambda _, done: done.weight, per_half=True
    ),
}
"""Data variables of a result by name; a new one is an entry here."""


PATTERN_VARIABLES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "position_refined_yx_px": (("pattern", "yx"), {"units": "px", "long_name": "refined positions of the patterns"}),
    "flux_refined": (("pattern",), {"units": "1", "long_name": "refined relative flux of the patterns"}),
}
"""Dimensions and attributes of variables that have one entry for each stored pattern."""


TileArrays = dict[str, NDArray[Any]]
"""One tile of each data variable, by name."""


STORED_CHUNKS = "stored_chunks"
"""Attribute of a finished result: number of chunks of each data variable that have a file."""


PYRAMID = "pyramid"
"""Group of a result store with the coarser levels, named 1, 2, ..."""


MOST_TILES = 10**5
"""Most chunks along one axis of a result: xarray lists them all."""


AGAIN = "it is damaged: reconstruct it again"
"""Remedy for a damaged result."""


PREVIEW_PX = 1024
"""Largest side of a preview, pixels."""


@dataclass(frozen=True)
class Layers:
    """Dimensions of a result other than y and x."""

    networks: tuple[str, ...] = ()
    """Labels of the models if there are several: the dimension `network`."""

    split_half: bool = False
    """True if the two halves are stored as well."""

    keep_stitched: bool = False
    """True if the object before refinement is stored as well."""

    @property
    def variables(self) -> dict[str, Variable]:
        """Data variables by name."""
        left_out = {
            name
            for name, each in VARIABLES.items()
            if (each.per_half and not self.split_half) or (each.on_request and not self.keep_stitched)
        }
        return {name: each for name, each in VARIABLES.items() if name not in left_out}

    def arrays(self, whole: Canvas, halves: Sequence[Canvas] = ()) -> TileArrays:
        """Arrays of one network, from its canvas and those of its halves."""
        done, half_done = finish(whole), [(half, finish(half)) for half in halves]
        return {
            name: np.stack([each.of(*one) for one in half_done]) if each.per_half else each.of(whole, done)
            for name, each in self.variables.items()
        }

    def dims(self, name: str) -> tuple[str, ...]:
        """Dimensions of a data variable."""
        return (*(("network",) if self.networks else ()), *(("half",) if VARIABLES[name].per_half else ()), "y", "x")

    def shape(self, name: str, plane: tuple[int, int]) -> tuple[int, ...]:
        """Shape of a data variable over a plane of pixels (y, x)."""
        sizes = {"network": len(self.networks), "half": 2, "y": plane[0], "x": plane[1]}
        return tuple(sizes[dim] for dim in self.dims(name))


def make_dataset(
    object: Any,
    weight: Any,
    uncertainty: Any,
    count: Any,
    corner: tuple[int, int],
    *,
    pixel_size_m: float | None,
    attributes: dict[str, Any],
    layers: Layers = Layers(),
    **others: Any,
) -> xr.Dataset:
    """Dataset of a reconstructed object.

    Parameters
    ----------
    object : complex64 array (y, x)
        NaN where no patch reached; NumPy or lazy, as the arrays below.
    weight, uncertainty : float32 array (y, x)
    count : int32 array (y, x)
    corner : (int, int)
        Scan coordinates (y, x) of pixel [0, 0].
    pixel_size_m : float or None
        Size of an object pixel, metres; adds the coordinates ``y_m`` and ``x_m``.
    attributes : dict
        Plain values for JSON: hashes, plan, versions, rates. Mappings become JSON text, since NetCDF has no type for
        them; ``ds.ptycho.records`` parses it.
    layers : Layers
        With several networks, the first axis of each array is the network.
    **others : array
        Other variables of the layers, such as ``object_half`` (half, y, x).

    Returns
    -------
    xarray.Dataset
        Given ones of `VARIABLES`; scan coordinates ``y``, ``x`` in pixels.

    Examples
    --------
    >>> ones = np.ones((2, 3))
    >>> ds = make_dataset(ones, ones, ones, ones, (-1, 4), pixel_size_m=None, attributes={})
    >>> ds.y.values.tolist(), ds.x.values.tolist()
    ([-1.0, 0.0], [4.0, 5.0, 6.0])
    """
    arrays = {"object": object, "weight": weight, "uncertainty": uncertainty, "count": count, **others}
    return xr.Dataset(
        {
            name: (layers.dims(name), arrays[name].astype(each.dtype, copy=False), each.attributes)
            for name, each in layers.variables.items()
            if name in arrays
        }
        | {
            name: (dims, arrays[name], described)
            for name, (dims, described) in PATTERN_VARIABLES.items()
            if name in arrays
        },
        coords=_coordinates(object.shape[-2:], corner, pixel_size_m)
        | ({"network": list(layers.networks)} if layers.networks else {}),
        attrs=as_text({**attributes, **_schema_attributes(pixel_size_m, layers)}),
    )


def _schema_attributes(pixel_size_m: float | None, layers: Layers) -> dict[str, Any]:
    attributes: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    attributes |= {} if pixel_size_m is None else {"pixel_size_m": float(pixel_size_m)}
    # Labels are an attribute, since Zarr format 3 has no standard type for text.
    return attributes | ({"networks": list(layers.networks)} if layers.networks else {})


def _coordinates(shape: tuple[int, ...], corner: tuple[int, int], pixel_size_m: float | None) -> dict[str, Any]:
    coordinates: dict[str, Any] = {}
    for dim, size, start in zip(("y", "x"), shape, corner, strict=True):
        pixels = start + np.arange(size, dtype=np.float64)
        coordinates[dim] = (dim, pixels, {"units": "px", "long_name": f"{dim} in the scan's frame"})
        if pixel_size_m is not None:
            coordinates[f"{dim}_m"] = (dim, pixels * pixel_size_m, {"units": "m", "long_name": f"{dim} in metres"})
    return coordinates


def create_result(
    path: Location,
    shape: tuple[int, int],
    corner: tuple[int, int],
    tile: int,
    *,
    pixel_size_m: float | None,
    layers: Layers = Layers(),
    variables: Iterable[str] | None = None,
) -> None:
    """Create an empty result store, unfinished until `finish_result`.

    Parameters
    ----------
    path : Location
        Empty location (see `Location.atomic_store`).
    shape, corner : (int, int)
        Pixels (y, x) of the complete object, and scan coordinates of its first one.
    tile : int
        Pixels across a tile. A tile is one shard, so that no two tiles share a file.
    pixel_size_m : float or None
    layers : Layers
    variables : iterable of str, optional
        Names of the variables; by default all of the layers.
    """
    root = zarr.create_group(path.zarr_store(), zarr_format=3)
    root.attrs.update({**_schema_attributes(pixel_size_m, layers), "state": "writing"})
    for name in layers.variables if variables is None else variables:
        _create_variable(root, name, shape, tile, pixel_size_m, layers)
    for name, (dim, values, attributes) in _coordinates(shape, corner, pixel_size_m).items():
        array = root.create_array(
            name, data=values, chunks=values.shape, compressors=COMPRESSORS, dimension_names=(dim,)
        )
        array.attrs.update(attributes)


def _create_variable(
    root: zarr.Group, name: str, shape: tuple[int, int], tile: int, pixel_size_m: float | None, layers: Layers
) -> zarr.Array:
    variable = VARIABLES[name]
    chunk = CHUNK_PIXELS if tile % CHUNK_PIXELS == 0 else tile
    full_shape = layers.shape(name, shape)
    array = root.create_array(
        name,
        shape=full_shape,
        dtype=variable.dtype,
        chunks=(*[1] * (len(full_shape) - 2), chunk, chunk),
        shards=(*full_shape[:-2], tile, tile),
        fill_value=variable.dtype(variable.fill),
        compressors=COMPRESSORS,
        dimension_names=layers.dims(name),
    )
    array.attrs.update(variable.attributes)
    if pixel_size_m is not None:
        # The CF convention by which xarray distinguishes coordinates from data.
        array.attrs["coordinates"] = "y_m x_m"
    return array


def write_tile(path: Location, start_yx: tuple[int, int], arrays: TileArrays) -> None:
    """Write one tile of a result store.

    Parameters
    ----------
    path : Location
        Store that `create_result` made.
    start_yx : (int, int)
        Row and column of the first pixel of the tile in the complete arrays: multiples of the tile.
    arrays : dict of name to array (..., y, x)
    """
    root = zarr.open_group(path.zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)
    height, width = arrays["object"].shape[-2:]
    region = ..., slice(start_yx[0], start_yx[0] + height), slice(start_yx[1], start_yx[1] + width)
    for name, values in arrays.items():
        array = root.get(name)
        # A resumed run of an earlier version keeps the variables that it began with.
        if isinstance(array, zarr.Array):
            array[region] = values


def read_tile(path: Location, start_yx: tuple[int, int], shape: tuple[int, int]) -> TileArrays:
    """Read one tile of a result store, as `write_tile` wrote it.

    Parameters
    ----------
    path : Location
        Store that `create_result` made, finished or not.
    start_yx : (int, int)
        Row and column of the first pixel of the tile in the complete arrays.
    shape : (int, int)
        Pixels (y, x).

    Returns
    -------
    dict of name to array (..., y, x)
    """
    root = zarr.open_group(path.zarr_store(read_only=True), mode="r", zarr_format=3, use_consolidated=False)
    region = ..., slice(start_yx[0], start_yx[0] + shape[0]), slice(start_yx[1], start_yx[1] + shape[1])
    return {name: np.asarray(stored_array(root, name)[region]) for name in VARIABLES if name in root}


def remove_tile(path: Location, start_yx: tuple[int, int], tile: int) -> None:
    """Remove the files of a damaged tile before it is rewritten.

    Parameters
    ----------
    path : Location
        Store that `create_result` made.
    start_yx : (int, int)
        Row and column of the first pixel of the tile in the complete arrays.
    tile : int
        Pixels across a tile.
    """
    root = zarr.open_group(path.zarr_store(read_only=True), mode="r", zarr_format=3, use_consolidated=False)
    for name in VARIABLES:
        if name in root:
            array = stored_array(root, name)
            shard = (*[0] * (array.ndim - 2), start_yx[0] // tile, start_yx[1] // tile)
            (path / name / array.metadata.encode_chunk_key(shard)).unlink(missing_ok=True)


def stored_array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    check_codecs(array, location_of(group.store), AGAIN)
    return array


def finish_result(
    path: Location, attributes: dict[str, Any], of_patterns: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Record the attributes of a result and mark its store as complete.

    Parameters
    ----------
    path : Location
    attributes : dict
        Plain values for JSON.
    of_patterns : dict of name to array (pattern, ...), optional
        Some of `PATTERN_VARIABLES`.
    """
    root = zarr.open_group(path.zarr_store(), mode="r+", zarr_format=3)
    for name, values in (of_patterns or {}).items():
        dims, described = PATTERN_VARIABLES[name]
        array = root.create_array(name, data=values, compressors=COMPRESSORS, dimension_names=dims, overwrite=True)
        array.attrs.update(described)
    stored = {name: stored_array(root, name).nchunks_initialized for name in VARIABLES if name in root}
    consolidate(path).attrs.update({**attributes, STORED_CHUNKS: stored, "state": "complete"})


def open_result(path: LocationLike, level: int = 0) -> xr.Dataset:
    """Open a stored result; its arrays stay on disk.

    Parameters
    ----------
    path : path or ``s3://`` URL
        A store written by `reconstruct` (`out`) or ``ds.ptycho.save``.
    level : int
        0 for the result itself; 1, 2, ... for a coarser level of its pyramid, with ``object`` and ``weight`` only.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    PtychodaskError
        If there is no result, or it is unfinished, of another kind or a newer format, damaged, or has no such level.
    """
    location = parse_location(path)
    check_one_result(location)
    root = open_root(location, RESULT)
    with damage_errors(location, "cannot be opened", AGAIN):
        _check_arrays(root, location)
        if level:
            return _open_level(location, root, level)
        ds = xr.open_zarr(location.zarr_store(read_only=True), chunks={}, consolidated=True, zarr_format=3)
        ds = ds[[name for name in (*VARIABLES, *PATTERN_VARIABLES) if name in ds]]
        del ds.attrs["state"]
        _check_complete(location, root, ds.attrs.pop(STORED_CHUNKS, {}))
        return _with_labels(ds, location)


def _check_arrays(group: zarr.Group, location: Location) -> None:
    """Raise `PtychodaskError` unless xarray can safely open the arrays of a group."""
    arrays = dict(group.arrays())
    for name, array in arrays.items():
        check_codecs(array, location, AGAIN)
        if array.ndim == 1:
            # xarray reads coordinates when it opens a store.
            check_stored([array], array.nbytes, location, AGAIN)
        if max(map(floordiv, array.shape, array.chunks), default=0) > MOST_TILES:
            raise PtychodaskError(
                f"{location}: array '{name}' has shape {array.shape} in chunks of {array.chunks}; {AGAIN}"
            )
    # All together: pixels that no patch reached have no file, and counts compress more than the ratio allows.
    check_stored(list(arrays.values()), sum(array.nbytes for array in arrays.values()), location, AGAIN)


def _check_complete(location: Location, root: zarr.Group, stored: Any) -> None:
    """Raise `PtychodaskError` if a file of a result is missing."""
    # Zarr would read it as pixels that no patch reached.
    for name, n_written in stored.items() if isinstance(stored, dict) else ():
        n_present = stored_array(root, name).nchunks_initialized
        if n_present != n_written:
            raise PtychodaskError(
                f"{location}: {name} has {n_present} of its {n_written} chunks, files of it are missing; reconstruct "
                "again with overwrite=True (--overwrite)"
            )


def _open_level(location: Location, root: zarr.Group, level: int) -> xr.Dataset:
    pyramid = root.get(PYRAMID)
    levels = sorted(pyramid.group_keys()) if isinstance(pyramid, zarr.Group) else []
    if str(level) not in levels:
        available = (
            f"levels 1 to {len(levels)}" if levels else "no pyramid: reconstruct again with pyramid=True (--pyramid)"
        )
        raise PtychodaskError(f"{location}: no level {level}; it has {available}")
    # xarray reads the metadata of the level itself, not the consolidated ones.
    store = (location / PYRAMID / str(level)).zarr_store(read_only=True)
    _check_arrays(zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False), location)
    ds = xr.open_zarr(
        location.zarr_store(read_only=True), group=f"{PYRAMID}/{level}", chunks={}, consolidated=False, zarr_format=3
    )
    ds.attrs = {key: value for key, value in root.attrs.items() if key not in ("state", STORED_CHUNKS)} | {
        "level": level
    }
    if "pixel_size_m" in ds.attrs:
        ds.attrs["pixel_size_m"] = float(ds.attrs["pixel_size_m"]) * 2**level
    return _with_labels(ds, location)


def _with_labels(ds: xr.Dataset, location: Location) -> xr.Dataset:
    """Result with the labels of its networks as a coordinate."""
    if "method" in ds.dims:
        # Of version 0.1, or begun by it.
        ds = ds.rename_dims(method="network")
        ds.attrs["networks"] = ds.attrs.pop("methods", ds.attrs.get("networks"))
        logger.warning(
            "%s: was written by version 0.1, and its dimension 'method' is called 'network' now; select with "
            "ds.sel(network=%r)",
            location,
            ds.attrs["networks"][0],
        )
    ds.attrs = as_text(ds.attrs)
    return ds.assign_coords(network=list(ds.attrs["networks"])) if "network" in ds.dims else ds


def experiment_name(number: int) -> str:
    """Name of the result of one of several experiments, less ``.zarr``.

    Examples
    --------
    >>> experiment_name(3)
    'experiment-3'
    """
    return f"experiment-{number}"


def experiment_of(results: Mapping[str, xr.Dataset], scan: Scan, experiment: int | None, command: str) -> int | None:
    """Experiment of a scan that results were made from.

    Parameters
    ----------
    results : dict of label to Dataset
    scan : Scan
    experiment : int or None
        The one that was passed.
    command : str
        Name for messages.

    Returns
    -------
    int or None
        The passed or, in a scan of several, the recorded one; None if there is neither.

    Raises
    ------
    PtychodaskError
        If results are of several experiments of the scan, or of another than the passed one.
    """
    if experiment is not None:
        experiment = experiment_number(experiment, command)
    if len(experiments_of(scan.scan_index)) < 2:
        return experiment
    numbers = {label: recorded(ds.attrs, "spec", "experiment") for label, ds in results.items()}
    numbers = {label: number for label, number in numbers.items() if number is not None}
    if experiment is not None:
        numbers["experiment="] = experiment
    if len(set(numbers.values())) > 1:
        listed = ", ".join(f"{label} {number}" for label, number in numbers.items())
        raise PtychodaskError(
            f"{command}: the results are of different experiments ({listed}), which have objects of their own; pass "
            "results of one experiment, and no other number, or leave out the scan"
        )
    return next(iter(numbers.values()), None)


def check_one_result(location: Location) -> None:
    """Raise `PtychodaskError` for a folder with results of several experiments."""
    folder = location.local_path
    if folder is None or not folder.is_dir() or (folder / "zarr.json").exists():
        return
    names = sorted((path.name for path in folder.glob("experiment-*.zarr")), key=lambda name: (len(name), name))
    if names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise PtychodaskError(
            f"{location}: has a result for each experiment of a scan ({listed}); pass one of them, such as "
            f"{location / names[0]}"
        )


@contextmanager
def reading_result() -> Iterator[None]:
    """Raise errors of reading or computing a result as `PtychodaskError`."""
    with damage_errors(
        "result", "its arrays cannot be read or computed", "if it is stored, it is damaged: reconstruct it again"
    ):
        yield


def recorded(attributes: Mapping[str, Any], *names: str) -> Any:
    """Value in nested attributes or their JSON text; None if missing.

    Examples
    --------
    >>> recorded({"plan": {"tile": 256}}, "plan", "tile"), recorded({"plan": "none"}, "plan", "tile")
    (256, None)
    """
    value: Any = attributes
    for name in names:
        value = from_text(value.get(name)) if isinstance(value, Mapping) else None
    return value


@xr.register_dataset_accessor("ptycho")
class PtychoAccessor:
    """Methods of a result beyond those of a Dataset: ``ds.ptycho``."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @property
    def records(self) -> dict[str, Any]:
        """Attributes with their JSON text parsed, such as ``records["plan"]["tile"]``."""
        return {str(name): from_text(value) for name, value in self._ds.attrs.items()}

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

    def plot(self, panels: str | Sequence[str] | None = None, **options: Any) -> Any:
        """Figure of amplitude, phase, weight and uncertainty.

        Parameters
        ----------
        panels, **options
            As for `ptychodask.plot`.

        Returns
        -------
        matplotlib.figure.Figure
        """
        # `plotting` imports this module; the package imports it on demand.
        return ptychodask.plot(self._ds, panels, **options)

    def preview(self) -> Preview:
        """Small images of amplitude and phase for a notebook.

        Returns
        -------
        Preview
            The centre of the object, at most `PREVIEW_PX` pixels along each side; only this part is read or computed.
            One row of images for each network.

        Raises
        ------
        PtychodaskError
            If this is no result, or its store cannot be read.

        Examples
        --------
        >>> ones = np.ones((2, 3))
        >>> make_dataset(ones, ones, ones, ones, (0, 0), pixel_size_m=None, attributes={}).ptycho.preview()
        Preview(all 2 x 3 px)
        """
        if "object" not in self._ds or self._ds["object"].dims[-2:] != ("y", "x"):
            raise PtychodaskError(
                f"preview: expected object (y, x), found {', '.join(map(str, self._ds))}; select no row or column"
            )
        height, width = self._ds["object"].shape[-2:]
        middle = {dim: _middle(self._ds.sizes[dim]) for dim in ("y", "x")}
        shown = self._ds[["object"]].isel(middle).ptycho.compute()["object"]
        return Preview(shown, (height, width))

    @property
    def standard_error(self) -> xr.DataArray:
        """Uncertainty over the square root of the count (y, x).

        It is the standard error of the mean if the estimates are independent.
        """
        error = (self._ds["uncertainty"] / self._ds["count"] ** 0.5).rename("standard_error")
        return error.assign_attrs(long_name="standard error of the object, overlapping estimates taken as independent")

    def compute(self) -> xr.Dataset:
        """Load or compute the result, each task once.

        Raises
        ------
        PtychodaskError
            If the store cannot be read.

        Notes
        -----
        The graph is not optimised: that would drop the resources that tasks request.
        """
        with reading_result():
            return self._ds.compute(optimize_graph=False)

    def save(self, path: LocationLike, *, overwrite: bool = False) -> None:
        """Load the result and write it to a store that `open_result` opens.

        Parameters
        ----------
        path : path
        overwrite : bool
            Replace an existing result.

        Raises
        ------
        PtychodaskError
            If `path` exists already, writing fails, or this is not a rectangular block of a result.

        Notes
        -----
        For an object larger than memory, use ``reconstruct(..., out=path)``, which writes tile by tile.
        """
        _check_savable(self._ds)
        ds = self.compute()
        corner = (int(ds["y"][0]), int(ds["x"][0]))
        arrays = {name: ds[name].values for name in Layers(keep_stitched=True).variables if name in ds}
        with parse_location(path).atomic_store(overwrite=overwrite, kind=RESULT) as writing:
            pixel_size_m = ds.attrs.get("pixel_size_m")
            shape = arrays["object"].shape
            create_result(writing.whole, shape, corner, CHUNK_PIXELS, pixel_size_m=pixel_size_m, variables=arrays)
            write_tile(writing.whole, (0, 0), arrays)
            writing.check_held()
            of_patterns = {name: ds[name].values for name in PATTERN_VARIABLES if name in ds}
            finish_result(writing.whole, ds.ptycho.records, of_patterns)


def _middle(size: int) -> slice:
    start = max(0, (size - PREVIEW_PX) // 2)
    return slice(start, start + PREVIEW_PX)


@dataclass(frozen=True, repr=False, eq=False)
class Preview:
    """Centre of a result, shown by a notebook."""

    object: xr.DataArray
    """complex64 (y, x) or (network, y, x), in memory."""

    shape: tuple[int, int]
    """Pixels (y, x) of the complete result."""

    def __repr__(self) -> str:
        return f"Preview({self._size()})"

    def _repr_html_(self) -> str:
        planes = self.object if "network" in self.object.dims else self.object.expand_dims("network")
        labels = [f"{label}: " for label in planes["network"].values] if "network" in planes.coords else [""]
        pictures = [
            picture for label, plane in zip(labels, planes.values, strict=True) for picture in _pictures(plane, label)
        ]
        return card("Object", {"shown": self._size()}, pictures)

    def _size(self) -> str:
        shown, whole = ("{:,} x {:,} px".format(*shape) for shape in (self.object.shape[-2:], self.shape))
        return f"all {whole}" if shown == whole else f"the middle {shown} of {whole}"


def _pictures(plane: NDArray[np.complex64], label: str) -> list[Markup]:
    """Images of amplitude and phase, with the mean phase set to zero.

    This keeps most phases far from the wrap at ±π.
    """
    turned = plane * np.exp(-1j * np.angle(np.nansum(plane)))
    return [image(np.abs(turned), f"{label}amplitude"), image(np.angle(turned), f"{label}phase")]


def _check_savable(ds: xr.Dataset) -> None:
    for name in Finished._fields:
        if name not in ds or ds[name].dims != ("y", "x"):
            content = f"dims {ds[name].dims}" if name in ds else f"variables {', '.join(map(str, ds))}"
            raise PtychodaskError(
                f"result: expected {name} (y, x) to save it, found {content}; select pixels with isel"
            )
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(f"result: pixels along {dim} are not consecutive, expected steps of 1 to save it")
