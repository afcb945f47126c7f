"""How fine an object is known, from two halves of the patterns: no truth is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.metrics import crossing, frc, half_bit
from ptychodask.result import open_result
from ptychodask.scan import PtychodaskError, check_choice

Criterion = Literal["1/7", "half-bit", "1/2"]
"""Where a ring correlation of halves is said to end."""

THRESHOLDS: dict[Criterion, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "1/7": lambda frequency: np.full_like(frequency, 1 / 7),
    "half-bit": half_bit,
    "1/2": lambda frequency: np.full_like(frequency, 1 / 2),
}

WINDOWS_ACROSS = 64
"""Windows along the longer side that an automatic step comes close to, at the most."""

LARGEST_SQUARE = 4096
"""Pixels across the middle of the object over which the whole correlation is taken, at the most."""

SEEN_SHARE = 0.9
"""Share of a window's pixels that both halves must have lit well."""

LIT_SHARE = 0.1
"""A pixel is lit well where its weight is this share of the median weight, or more."""


def resolution(
    result: xr.Dataset | str | Path,
    *,
    criterion: Criterion = "1/7",
    window_px: int = 64,
    step_px: int | None = None,
) -> xr.Dataset:
    """Fourier ring correlation of the halves of a result, over its middle and in a window that moves over it.

    Parameters
    ----------
    result : xarray.Dataset or path
        From ``reconstruct(..., split_half=True)``: ``object_half`` and ``weight_half`` (half, y, x).
    criterion : {"1/7", "half-bit", "1/2"}
        Correlation at which a frequency counts as lost.
    window_px : int
        Pixels across the moving window, even.
    step_px : int, optional
        Pixels from one window to the next; by default a quarter of the window, or more for a large object.

    Returns
    -------
    xarray.Dataset
        ``frc`` (frequency), of the complex halves over their middle square; ``threshold`` (frequency);
        ``resolution_px``, a full period at the crossing; ``local_resolution_px`` (window_y, window_x), NaN where a
        window is not seen well; coordinates ``frequency`` (cycles per pixel), ``window_y`` and ``window_x``, middles of
        the windows in pixels of the scan's frame. Where the pixel size is known also ``resolution_m`` and
        ``local_resolution_m``. The finest that can be said is 2 pixels.

    Raises
    ------
    PtychodaskError
        If the result has no halves, or no window fits into it.

    Notes
    -----
    1/7 for halves: P. Rosenthal, R. Henderson, J. Mol. Biol. 333 (2003) 721; local: G. Cardone, J. Heymann,
    A. Steven, J. Struct. Biol. 184 (2013) 226. A small window has few frequencies in its inner rings, so its figure is
    coarse, and one without detail has nothing to agree on. What a network adds by itself it adds to both halves.
    """
    check_choice("criterion", criterion, get_args(Criterion), "resolution")
    ds = result if isinstance(result, xr.Dataset) else open_result(result)
    _check_halves(ds, window_px, step_px)
    step = step_px or max(window_px // 4, -(-max(ds.sizes["y"], ds.sizes["x"]) // WINDOWS_ACROSS))
    frequency, correlation = frc(*_halves(_middle(ds)))
    threshold = THRESHOLDS[criterion](frequency)
    starts_y, starts_x = (np.arange(0, ds.sizes[dim] - window_px + 1, step) for dim in ("y", "x"))
    local = np.stack([_along_a_band(ds, int(y), starts_x, window_px, criterion) for y in starts_y])
    found = xr.Dataset(
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
        return found
    in_metres = {
        name.replace("_px", "_m"): found[name] * pixel_size_m for name in ("resolution_px", "local_resolution_px")
    }
    return found.assign(in_metres).assign_attrs(pixel_size_m=pixel_size_m)


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


def _middle(ds: xr.Dataset) -> xr.Dataset:
    side = min(ds.sizes["y"], ds.sizes["x"], LARGEST_SQUARE)
    starts = {dim: (ds.sizes[dim] - side) // 2 for dim in ("y", "x")}
    return ds.isel({dim: slice(start, start + side) for dim, start in starts.items()})


def _halves(ds: xr.Dataset) -> list[NDArray[np.complex64]]:
    """The two objects in memory, NaN where either is dim."""
    shown = ds[["object_half", "weight_half"]].ptycho.compute()
    objects, weights = shown["object_half"].values, shown["weight_half"].values
    lit = [
        weight >= LIT_SHARE * np.median(weight[weight > 0]) if (weight > 0).any() else weight > 0 for weight in weights
    ]
    seen = np.logical_and(*lit) & np.isfinite(objects).all(axis=0)
    if not seen.any():
        raise PtychodaskError("resolution: no pixel is well lit in both halves, so they cannot be compared")
    return [np.where(seen, object_, np.complex64(np.nan)) for object_ in objects]


def _along_a_band(
    ds: xr.Dataset, y: int, starts_x: NDArray[np.int64], window_px: int, criterion: Criterion
) -> NDArray[np.float64]:
    """Resolution in each window of a row of them, which alone is in memory."""
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
