"""Reader of any NPZ or HDF5 file by a mapping of keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.labels import labels_of
from ptychodask.io.source import (
    FORMAT_OPTIONS,
    Container,
    IngestSpec,
    SourceScan,
    apply_flips,
    as_mask,
    as_probe,
    as_vector,
    as_whole_numbers,
    frame_axes,
    listed_keys,
    pattern_axis_is_last,
    raster_shape,
)
from ptychodask.io.units import Unit, position_unit

logger = logging.getLogger(__name__)

OPTIONS = tuple(option for option in FORMAT_OPTIONS if option != "diffraction")


def recognises(keys: Sequence[str]) -> bool:
    """False: this format is only used on request, with `keys`."""
    return False


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read the arrays at `spec.keys`.

    Notes
    -----
    Patterns are (pattern, qy, qx), or a raster (row, column, qy, qx) that is read row after row. ``y`` and ``x`` are
    one number for each pattern, maps (row, column), or for a raster one number for each row and for each column.
    ``position`` is (pattern, 2), (row, column, 2) or (2, pattern) in the order (y, x), in place of ``y`` and ``x``;
    ``mask`` is True where a pixel is good, ``mask_bad`` where it is bad; labels are complex, or amplitudes and
    phases (``label_amp``, ``label_phase``); ``object`` has its pixel [0, 0] at position (0, 0) and needs positions in
    pixels, neither flipped nor swapped.

    Raises
    ------
    PtychodaskError
        If an array does not fit, or neither the file nor the spec gives a unit.
    """
    keys = _checked_keys(container, spec)
    label = container.label
    unit = _unit(container, keys, spec)
    is_flipped = spec.flip_y or spec.flip_x or spec.swap_xy
    if "object" in keys and (is_flipped or unit != "px"):
        raise PtychodaskError(
            f"{label}: key 'object' needs positions in object pixels (units='px'), neither flipped nor swapped; "
            "leave it out"
        )
    if spec.domain is None:
        raise PtychodaskError(
            f"{label}: '{keys['diffraction']}' may contain counts or amplitudes; "
            "pass domain='counts' or domain='amplitude' (--domain)"
        )
    shape = container.shape(keys["diffraction"])
    raster = raster_shape(shape)
    position_yx = positions_of(container, keys, spec)
    last = raster is None and pattern_axis_is_last(
        frame_axes(shape), len(position_yx), spec.axes, f"{label}[{keys['diffraction']}]"
    )
    if raster is not None and spec.axes == "qy,qx,pattern":
        raise PtychodaskError(
            f"{label}[{keys['diffraction']}]: has shape {shape}, read as (row, column, qy, qx); leave axes= out"
        )

    def optional(name: str) -> NDArray[Any] | None:
        return container.array(keys[name]) if name in keys else None

    probe, object_, flux, scan_index = map(optional, ("probe", "object", "flux", "scan_index"))
    return SourceScan(
        frames=container.frames(keys["diffraction"], pattern_last=last, raster=True),
        position_yx=position_yx,
        unit=unit,
        domain=spec.domain,
        dc=spec.dc or "centre",
        calibration="mean_counts",
        probe=None if probe is None else as_probe(probe, f"{label}[{keys['probe']}]"),
        mask=_mask(container, keys),
        object=None if object_ is None else _as_object(object_, f"{label}[{keys['object']}]"),
        label=labels_of(container, keys, pattern_last=last),
        flux=None if flux is None else as_vector(flux, f"{label}[{keys['flux']}]"),
        scan_index=None if scan_index is None else as_whole_numbers(scan_index, f"{label}[{keys['scan_index']}]"),
    )


def _checked_keys(container: Container, spec: IngestSpec) -> dict[str, str]:
    keys = dict(spec.keys or {})
    pair, single = "y" in keys and "x" in keys, "position" in keys
    has_positions = spec.step is not None or (pair != single and ("y" in keys) == ("x" in keys))
    if "diffraction" not in keys or not has_positions:
        raise PtychodaskError(
            f"{container.label}: keys= names {listed_keys(sorted(keys))}, expected 'diffraction' and either "
            f"'y' and 'x' or 'position', or a raster's step= (--step); keys found in the file: "
            f"{listed_keys(container.keys())}"
        )
    if ("label_amp" in keys) != ("label_phase" in keys) or ("label" in keys and "label_amp" in keys):
        raise PtychodaskError(
            f"{container.label}: keys= names {listed_keys(sorted(keys))}, expected complex labels as 'label', or as "
            "'label_amp' with 'label_phase'"
        )
    for key in keys.values():
        container.shape(key)  # raises if the key is missing
    return keys


def _unit(container: Container, keys: dict[str, str], spec: IngestSpec) -> Unit:
    named = [keys[name] for name in ("position", "y", "x") if name in keys]
    recorded = {key: text for key in named if (text := container.unit(key))}
    units = {key: position_unit(text) for key, text in recorded.items()}
    if spec.units is not None:
        for key, unit in units.items():
            if unit not in (None, spec.units):
                logger.warning(
                    "%s: '%s' is in %s by the file, but is read in %s as given by units=",
                    container.label,
                    key,
                    recorded[key],
                    spec.units,
                )
        return spec.units
    if spec.step is not None:
        raise PtychodaskError(f"{container.label}: the unit of step= is not given; pass units= (--units)")
    if len(set(units.values())) > 1:
        listed = ", ".join(f"'{key}' in {text}" for key, text in recorded.items())
        raise PtychodaskError(
            f"{container.label}: the file has {listed}, expected one unit of both axes; convert one of them in the "
            "file, or pass units= (--units) if one is noted wrongly"
        )
    unit = next(iter(units.values()), None)
    if unit is not None:
        return unit
    key = named[0]
    raise PtychodaskError(
        f"{container.label}: the unit of the positions '{key}' is {recorded.get(key, 'not recorded')}, "
        f"expected one of: {', '.join(get_args(Unit))}; pass units= (--units)"
    )


def positions_of(container: Container, keys: Mapping[str, str], spec: IngestSpec) -> NDArray[np.float64]:
    """Positions (pattern, 2) of the mapped arrays, swapped and flipped.

    Raises
    ------
    PtychodaskError
        If their shapes do not fit each other or the raster of the patterns.
    """
    raster = raster_shape(container.shape(keys["diffraction"]))
    if spec.step is not None:
        rows, columns = _raster_of(raster, spec, f"{container.label}[{keys['diffraction']}]")
        position = np.indices((rows, columns)).reshape(2, -1).T * np.asarray(spec.step, np.float64)
    elif "position" in keys:
        position = _position_pairs(container.array(keys["position"]), f"{container.label}[{keys['position']}]", raster)
    else:
        y, x = _position_columns(container, keys, raster)
        if len(y) != len(x):
            raise PtychodaskError(
                f"{container.label}: {len(y)} y positions but {len(x)} x positions; map keys of the same length"
            )
        position = np.stack([y, x], axis=1)
    if position.dtype.kind not in "iuf":
        raise PtychodaskError(f"{container.label}: positions have type {position.dtype}, expected numbers")
    return apply_flips(position.astype(np.float64), spec)


def _raster_of(raster: tuple[int, int] | None, spec: IngestSpec, label: str) -> tuple[int, int]:
    """Rows and columns of a scan without positions."""
    if spec.raster is None:
        if raster is None or 1 in raster:
            raise PtychodaskError(
                f"{label}: its shape has no rows and columns of a raster; pass raster=(rows, columns) (--raster)"
            )
        return raster
    if raster is not None and raster != spec.raster and (1 not in raster or prod(raster) != prod(spec.raster)):
        raise PtychodaskError(f"{label}: is a raster of {raster}, but raster is {spec.raster}; leave raster= out")
    return spec.raster


def _position_pairs(values: NDArray[Any], label: str, raster: tuple[int, int] | None) -> NDArray[Any]:
    """Positions (pattern, 2) from pairs along the last or first axis."""
    pairs = values
    while pairs.ndim > 2 and 1 in pairs.shape:
        pairs = np.squeeze(pairs, axis=pairs.shape.index(1))
    if pairs.ndim in (2, 3) and pairs.shape[-1] != 2 and pairs.shape[0] == 2:
        pairs = np.moveaxis(pairs, 0, -1)
    if pairs.ndim not in (2, 3) or pairs.shape[-1] != 2:
        raise PtychodaskError(
            f"{label}: positions have shape {values.shape}, expected (pattern, 2), (row, column, 2) or (2, pattern) in "
            "the order (y, x); save them so, or map keys 'y' and 'x'"
        )
    if pairs.ndim == 3:
        _check_map(pairs.shape[:2], raster, label)
    return pairs.reshape(-1, 2)


def _position_columns(
    container: Container, keys: Mapping[str, str], raster: tuple[int, int] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions y and x (pattern,) from vectors, maps, or one axis each."""
    labels = [f"{container.label}[{keys[name]}]" for name in ("y", "x")]
    arrays = [container.array(keys[name]) for name in ("y", "x")]
    if all(len(_long_axes(values.shape)) == 2 and values.dtype.kind in "iuf" for values in arrays):
        for values, label in zip(arrays, labels, strict=True):
            _check_map(_long_axes(values.shape), raster, label)
        y, x = (values.reshape(-1).astype(np.float64) for values in arrays)
        return y, x
    y, x = (as_vector(values, label) for values, label in zip(arrays, labels, strict=True))
    if raster is not None and 1 not in raster and (len(y), len(x)) == raster:
        return np.repeat(y, raster[1]), np.tile(x, raster[0])
    return y, x


def _long_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _check_map(shape: tuple[int, ...], raster: tuple[int, int] | None, label: str) -> None:
    if raster is not None and 1 not in raster and shape != raster:
        raise PtychodaskError(
            f"{label}: is a map of {shape[0]} x {shape[1]} positions for a raster of {raster[0]} x {raster[1]} "
            "patterns; save it in the order of the patterns, (row, column)"
        )


def _mask(container: Container, keys: Mapping[str, str]) -> NDArray[np.bool_] | None:
    """Good pixels (h, w) by ``mask`` and ``mask_bad``, True where both say so."""
    good: NDArray[np.bool_] | None = None
    for name in {"mask", "mask_bad"} & set(keys):
        values = container.array(keys[name])
        values = np.squeeze(values) if values.ndim > 2 else values
        told = as_mask(values, f"{container.label}[{keys[name]}]")
        told = ~told if name == "mask_bad" else told
        good = told if good is None or good.shape != told.shape else good & told
    return good


def _as_object(values: NDArray[Any], label: str) -> NDArray[np.complex64]:
    if values.ndim != 2 or not values.size or values.dtype.kind not in "cfiu":
        raise PtychodaskError(f"{label}: the object has shape {values.shape}, expected complex (y, x)")
    return values.astype(np.complex64)
