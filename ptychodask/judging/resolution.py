"""Resolution from the ring correlation of two half-data objects, without truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.judging.metrics import crossing, frc, half_bit, well_lit
from ptychodask.result import open_result

Criterion = Literal["1/7", "half-bit", "1/2"]
"""Threshold of the ring correlation of halves that defines the resolution."""


THRESHOLDS: dict[Criterion, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "1/7": lambda frequency: np.full_like(frequency, 1 / 7),
    "half-bit": half_bit,
    "1/2": lambda frequency: np.full_like(frequency, 1 / 2),
}


WINDOWS_ACROSS = 64
"""Approximate maximum number of windows along the longer side for an automatic step."""


LARGEST_SQUARE = 4096
"""Maximum pixels across the central square used for the global correlation."""


SEEN_SHARE = 0.9
"""Minimum fraction of a window's pixels that are well lit in both halves."""


def resolution(
    result: xr.Dataset | str | Path,
    *,
    criterion: Criterion = "1/7",
    window_px: int = 64,
    step_px: int | None = None,
) -> xr.Dataset:
    """Resolution of a result, global and local, from its two halves.

    Global: Fourier ring correlation over the central square. Local: the same in a moving window.

    Parameters
    ----------
    result : xarray.Dataset or path
        From ``reconstruct(..., split_half=True)``: ``object_half`` and ``weight_half`` (half, y, x).
    criterion : {"1/7", "half-bit", "1/2"}
        Threshold of the correlation.
    window_px : int
        Pixels across the moving window, even.
    step_px : int, optional
        Pixels from one window to the next; by default a quarter of the window, or more for a large object.

    Returns
    -------
    xarray.Dataset
        ``frc`` (frequency), of the complex halves over their central square; ``threshold`` (frequency);
        ``resolution_px``, full period at the crossing; ``local_resolution_px`` (window_y, window_x), NaN if a window
        has too few well-lit pixels; coordinates ``frequency`` (cycles per pixel), ``window_y`` and ``window_x``, window
        centres in scan coordinates, pixels. If the pixel size is known also ``resolution_m`` and
        ``local_resolution_m``. The finest possible value is 2 pixels.

    Raises
    ------
    PtychodaskError
        If the result has no halves, or no window fits into it.

    Notes
    -----
    1/7 for halves: P. Rosenthal, R. Henderson, J. Mol. Biol. 333 (2003) 721; local: G. Cardone, J. Heymann,
    A. Steven, J. Struct. Biol. 184 (2013) 226. A small window has few frequencies in its inner rings, so its value is
    coarse, and one without detail has nothing to correlate. Artefacts that a network adds to both halves alike do not
    lower the correlation.
    """
    check_choice("criterion", criterion, get_args(Criterion), "resolution")
    ds = result if isinstance(result, xr.Dataset) else open_result(result)
    _check_halves(ds, window_px, step_px)
    step = step_px or max(window_px // 4, -(-max(ds.sizes["y"], ds.sizes["x"]) // WINDOWS_ACROSS))
    frequency, correlation = frc(*_halves(_central_square(ds)))
    threshold = THRESHOLDS[criterion](frequency)
    starts_y, starts_x = (np.arange(0, ds.sizes[dim] - window_px + 1, step) for dim in ("y", "x"))
    local = np.stack([_row_of_windows(ds, int(y), starts_x, window_px, criterion) for y in starts_y])
    resolutions = xr.Dataset(
        {
            "frc": ("frequency", correlation),
            "threshold": ("frequency", threshold),
            "resolution_px": 1 / crossing(frequency, correlation, threshold),
            "local_resolution_px": (("window_y", "window_x"), local, {"long_name": "local resolution", "units": "px"}),
        },
        coords={
            "frequency": ("frequency", frequency, {"units": "cycles per pixel"}),
            "window_y": ds["y"].values[starts_y] + window_px / 2,
            "window_x": ds["x"].values[starts_x] + window_px / 2,
        },
        attrs={"criterion": criterion, "window_px": window_px, "step_px": int(step)},
    )
    pixel_size_m = ds.attrs.get("pixel_size_m")
    if pixel_size_m is None:
        return resolutions
    in_metres = {
        name.replace("_px", "_m"): resolutions[name] * pixel_size_m for name in ("resolution_px", "local_resolution_px")
    }
    return resolutions.assign(in_metres).assign_attrs(pixel_size_m=pixel_size_m)


def _check_halves(ds: xr.Dataset, window_px: int, step_px: int | None) -> None:
    for name in ("object_half", "weight_half"):
        if name not in ds or ds[name].dims != ("half", "y", "x"):
            raise PtychodaskError(
                f"resolution: the result has no {name} (half, y, x); reconstruct with split_half=True (--split-half), "
                "or select one method"
            )
    if window_px % 2 or not 8 <= window_px <= min(ds.sizes["y"], ds.sizes["x"]):
        raise PtychodaskError(
            f"resolution: window_px is {window_px}, expected an even number from 8 to the object's shorter side, "
            f"{min(ds.sizes['y'], ds.sizes['x'])}"
        )
    if step_px is not None and step_px < 1:
        raise PtychodaskError(f"resolution: step_px is {step_px}, expected 1 or more")


def _central_square(ds: xr.Dataset) -> xr.Dataset:
    side = min(ds.sizes["y"], ds.sizes["x"], LARGEST_SQUARE)
    starts = {dim: (ds.sizes[dim] - side) // 2 for dim in ("y", "x")}
    return ds.isel({dim: slice(start, start + side) for dim, start in starts.items()})


def _halves(ds: xr.Dataset) -> list[NDArray[np.complex64]]:
    """Both objects in memory, NaN where either is poorly lit or unseen."""
    shown = ds[["object_half", "weight_half"]].ptycho.compute()
    objects, weights = shown["object_half"].values, shown["weight_half"].values
    seen = np.logical_and(*map(well_lit, weights)) & np.isfinite(objects).all(axis=0)
    if not seen.any():
        raise PtychodaskError("resolution: no pixel is well lit in both halves, so they cannot be compared")
    return [np.where(seen, object_, np.complex64(np.nan)) for object_ in objects]


def _row_of_windows(
    ds: xr.Dataset, y: int, starts_x: NDArray[np.int64], window_px: int, criterion: Criterion
) -> NDArray[np.float64]:
    """Resolution of each window in a row of windows.

    Only this row is loaded into memory.
    """
    band = ds.isel(y=slice(y, y + window_px))
    if not (band["weight_half"].values > 0).all(axis=0).any():
        return np.full(len(starts_x), np.nan)
    one, other = _halves(band)
    return np.array(
        [_in_window(one[:, x : x + window_px], other[:, x : x + window_px], criterion) for x in starts_x.tolist()]
    )


def _in_window(one: NDArray[np.complex64], other: NDArray[np.complex64], criterion: Criterion) -> float:
    if np.isfinite(one).mean() < SEEN_SHARE:
        return float("nan")
    frequency, correlation = frc(one, other)
    return 1 / crossing(frequency, correlation, THRESHOLDS[criterion](frequency))
