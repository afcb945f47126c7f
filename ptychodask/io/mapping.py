"""Reader of any NPZ or HDF5 file by a mapping of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import (
    FORMAT_OPTIONS,
    Container,
    IngestSpec,
    SourceScan,
    Unit,
    apply_flips,
    as_mask,
    as_probe,
    as_vector,
    as_whole_numbers,
    frame_axes,
    listed_keys,
    pattern_axis_is_last,
)

OPTIONS = tuple(option for option in FORMAT_OPTIONS if option != "diffraction")

UNIT_NAMES: dict[str, Unit] = {
    "px": "px",
    "pixel": "px",
    "pixels": "px",
    "m": "m",
    "meter": "m",
    "metre": "m",
    "um": "um",
    "µm": "um",
    "μm": "um",
    "micron": "um",
    "microns": "um",
}


def recognises(keys: Sequence[str]) -> bool:
    """False: this format is only used on request, with `keys`."""
    return False


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read the arrays at `spec.keys`.

    Notes
    -----
    ``position`` is (pattern, 2) in the order (y, x), in place of ``y`` and ``x``; ``mask`` is True where a pixel is
    good; ``object`` has its pixel [0, 0] at position (0, 0) and needs positions in pixels, neither flipped nor swapped.

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
    position_yx = _positions(container, keys, spec)
    axes = frame_axes(container.shape(keys["diffraction"]))
    last = pattern_axis_is_last(axes, len(position_yx), spec.axes, f"{label}[{keys['diffraction']}]")

    def optional(name: str) -> NDArray[Any] | None:
        return container.array(keys[name]) if name in keys else None

    probe, mask, object_, flux, scan_index = map(optional, ("probe", "mask", "object", "flux", "scan_index"))
    return SourceScan(
        frames=container.frames(keys["diffraction"], pattern_last=last),
        position_yx=position_yx,
        unit=unit,
        domain=spec.domain,
        dc=spec.dc or "centre",
        calibration="mean_counts",
        probe=None if probe is None else as_probe(probe, f"{label}[{keys['probe']}]"),
        mask=None if mask is None else as_mask(mask, f"{label}[{keys['mask']}]"),
        object=None if object_ is None else _as_object(object_, f"{label}[{keys['object']}]"),
        label=container.frames(keys["label"], pattern_last=last) if "label" in keys else None,
        flux=None if flux is None else as_vector(flux, f"{label}[{keys['flux']}]"),
        scan_index=None if scan_index is None else as_whole_numbers(scan_index, f"{label}[{keys['scan_index']}]"),
    )


def _checked_keys(container: Container, spec: IngestSpec) -> dict[str, str]:
    keys = dict(spec.keys or {})
    pair, single = "y" in keys and "x" in keys, "position" in keys
    if "diffraction" not in keys or pair == single or ("y" in keys) != ("x" in keys):
        raise PtychodaskError(
            f"{container.label}: keys= names {listed_keys(sorted(keys))}, expected 'diffraction' and either "
            f"'y' and 'x' or 'position'; keys found in the file: {listed_keys(container.keys())}"
        )
    for key in keys.values():
        container.shape(key)  # raises if the key is missing
    return keys


def _unit(container: Container, keys: dict[str, str], spec: IngestSpec) -> Unit:
    if spec.units is not None:
        return spec.units
    key = keys.get("position") or keys["y"]
    recorded = container.unit(key)
    if recorded is not None and recorded.strip().lower() in UNIT_NAMES:
        return UNIT_NAMES[recorded.strip().lower()]
    raise PtychodaskError(
        f"{container.label}: the unit of the positions '{key}' is {recorded or 'not recorded'}, "
        f"expected one of: {', '.join(get_args(Unit))}; pass units= (--units)"
    )


def _positions(container: Container, keys: dict[str, str], spec: IngestSpec) -> NDArray[np.float64]:
    if "position" in keys:
        position = container.array(keys["position"])
        if position.ndim == 3 and len(position) == 1:
            position = position[0]
        if position.ndim != 2 or position.shape[1] != 2:
            raise PtychodaskError(
                f"{container.label}[{keys['position']}]: positions have shape {position.shape}, expected (pattern, 2) "
                "in the order (y, x); save them so, or map keys 'y' and 'x'"
            )
    else:
        y, x = (as_vector(container.array(keys[name]), f"{container.label}[{keys[name]}]") for name in ("y", "x"))
        if len(y) != len(x):
            raise PtychodaskError(
                f"{container.label}: {len(y)} y positions but {len(x)} x positions; map keys of the same length"
            )
        position = np.stack([y, x], axis=1)
    if position.dtype.kind not in "iuf":
        raise PtychodaskError(f"{container.label}: positions have type {position.dtype}, expected numbers")
    return apply_flips(position.astype(np.float64), spec)


def _as_object(values: NDArray[Any], label: str) -> NDArray[np.complex64]:
    if values.ndim != 2 or not values.size or values.dtype.kind not in "cfiu":
        raise PtychodaskError(f"{label}: the object has shape {values.shape}, expected complex (y, x)")
    return values.astype(np.complex64)
