"""Figures of results: what was found, how much light it rests on, how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ptychodask.compare import find_truth, truth_on_pixels
from ptychodask.metrics import align_gauge
from ptychodask.scan import PtychodaskError, Scan, Truth

LIMIT_PERCENTILES = (1.0, 99.0)
"""Percentiles of the seen pixels at the ends of a colour scale."""

LARGEST_PIXELS = 2048
"""Pixels along one side of a picture; larger objects are shown by every second, third, ... pixel."""

UNSEEN_COLOUR = "lightsteelblue"
"""Colour of pixels that no patch reached."""


def plot(ds: xr.Dataset, *, path: str | Path | None = None) -> Figure:
    """Figure of a result: amplitude, phase, weight and uncertainty.

    Parameters
    ----------
    ds : xarray.Dataset
        From `reconstruct`, `reconstruct_iterative` or `open_result`.
    path : path, optional
        Where to write it too; the suffix gives the format (``.png``, ``.pdf``, ...).

    Returns
    -------
    matplotlib.figure.Figure
        Four panels, each with a colour bar and a scale bar (in metres where the pixel size is known, else in pixels);
        +y down, +x right. Colour scales span the 1st to the 99th percentile of the well-lit pixels; pixels that
        no patch reached are light blue. A phase that fills more than half the circle is shown on a cyclic map over the
        whole of it.

    Raises
    ------
    PtychodaskError
        If the Dataset is no result, nothing in it is seen, or the figure cannot be written.
    """
    shown = _thinned(ds)
    object_, weight = shown["object"].values, shown["weight"].values
    seen = np.isfinite(object_)
    if not seen.any():
        raise PtychodaskError("plot: no pixel of the object is seen, so there is nothing to show")
    bright = seen & (weight >= np.median(weight[seen]) / 10)
    middle = _middle_phasor(object_[bright])
    phase = np.angle(object_ * middle)
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _panel(axes[0, 0], np.abs(object_), "amplitude", shown, _limits(np.abs(object_)[bright]))
    _panel(axes[0, 1], phase, "phase (rad)", shown, *_phase_scale(phase[bright]))
    _panel(axes[1, 0], np.where(seen, weight, np.nan), "weight", shown, (0.0, float(weight.max())), "viridis")
    uncertainty = shown["uncertainty"].values
    known = uncertainty[bright & np.isfinite(uncertainty)]
    _panel(axes[1, 1], uncertainty, "uncertainty", shown, _limits(known) if known.size else (0.0, 1.0), "magma")
    return _written(figure, path)


def plot_comparison(
    results: Mapping[str, xr.Dataset],
    truth: Truth | Scan | str | Path | None = None,
    *,
    ramp: bool = True,
    scale: bool = False,
    path: str | Path | None = None,
) -> Figure:
    """Figure of several results side by side: amplitudes above, phases below, on one scale each.

    Parameters
    ----------
    results : dict of label to Dataset
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one; it comes first. Without it the first result is the reference.
    ramp, scale : bool
        Remove a phase plane, a factor of the amplitude, beside the global phase: from all towards the reference.
    path : path, optional
        Where to write it too.

    Returns
    -------
    matplotlib.figure.Figure
        One column for the truth and for each result, in the frame of the first result.

    Raises
    ------
    PtychodaskError
        If there is no result, or one shares no seen pixel with the reference.
    """
    if not results:
        raise PtychodaskError("plot_comparison: found no result, expected one at least")
    first = _thinned(next(iter(results.values())))
    y, x = first["y"].values, first["x"].values
    objects = {label: _on_pixels(ds, y, x) for label, ds in results.items()}
    if truth is not None:
        objects = {"truth": truth_on_pixels(find_truth(truth), y, x), **objects}
    reference = next(iter(objects.values()))
    objects = {label: align_gauge(found, reference, ramp=ramp, scale=scale)[0] for label, found in objects.items()}
    weight = first["weight"].values
    bright = np.isfinite(reference) & (weight >= np.median(weight[weight > 0]) / 10)
    middle = _middle_phasor(reference[bright])
    amplitude_limits = _limits(np.abs(reference)[bright])
    phase_scale = _phase_scale(np.angle(reference * middle)[bright])
    figure = Figure(figsize=(4.2 * len(objects), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(objects), squeeze=False)
    for column, (label, object_) in enumerate(objects.items()):
        _panel(axes[0, column], np.abs(object_), f"{label}: amplitude", first, amplitude_limits)
        _panel(axes[1, column], np.angle(object_ * middle), f"{label}: phase (rad)", first, *phase_scale)
    return _written(figure, path)


def _thinned(ds: xr.Dataset) -> xr.Dataset:
    """The result in memory, by every k-th pixel where it is larger than a picture shows."""
    missing = [name for name in ("object", "weight", "uncertainty") if name not in ds or ds[name].dims != ("y", "x")]
    if missing:
        raise PtychodaskError(f"plot: the Dataset has no {', '.join(missing)} (y, x); select one method of a result")
    step = -(-max(ds.sizes.values()) // LARGEST_PIXELS)
    return ds.isel(y=slice(None, None, step), x=slice(None, None, step)).ptycho.compute()


def _on_pixels(ds: xr.Dataset, y_px: NDArray[np.float64], x_px: NDArray[np.float64]) -> NDArray[np.complex64]:
    """The object at the given coordinates, NaN where the result does not reach."""
    return ds[["object"]].reindex(y=y_px, x=x_px, fill_value=complex(np.nan, np.nan)).ptycho.compute()["object"].values


def _middle_phasor(object_: NDArray[np.complexfloating]) -> np.complexfloating:
    """Turns an object so that its mean phase is zero, which keeps the wrap far from its phases."""
    return np.exp(-1j * np.angle(object_.sum()))


def _limits(values: NDArray[np.floating]) -> tuple[float, float]:
    low, high = (float(end) for end in np.percentile(values, LIMIT_PERCENTILES))
    # A constant picture still needs a scale with two ends.
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _phase_scale(phase: NDArray[np.floating]) -> tuple[tuple[float, float], str]:
    """Ends of the colour scale and colour map of a phase."""
    low, high = _limits(phase)
    return ((-np.pi, np.pi), "twilight") if high - low > np.pi else ((low, high), "gray")


def _panel(
    axes: Axes,
    values: NDArray[np.floating],
    title: str,
    ds: xr.Dataset,
    limits: tuple[float, float],
    colours: str = "gray",
) -> None:
    """One picture with its colour bar and scale bar, axes in pixels of the scan's frame."""
    y, x = ds["y"].values, ds["x"].values
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    image = axes.imshow(
        values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="upper",
        extent=(x[0] - half, x[-1] + half, y[-1] + half, y[0] - half),
    )
    axes.set_facecolor(UNSEEN_COLOUR)
    axes.set_title(title)
    axes.set_xlabel("x (px)")
    axes.set_ylabel("y (px)")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
    _add_scale_bar(axes, ds)


def _add_scale_bar(axes: Axes, ds: xr.Dataset) -> None:
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    pixel_size_m = ds.attrs.get("pixel_size_m")
    unit_per_px = 1.0 if pixel_size_m is None else float(pixel_size_m)
    length = nice_length(0.3 * (right - left) * unit_per_px)
    width_px = length / unit_per_px
    x, y = left + 0.05 * (right - left), bottom + 0.05 * (top - bottom)
    height = 0.015 * (top - bottom)
    axes.add_patch(Rectangle((x, y), width_px, height, facecolor="white", edgecolor="black", linewidth=0.8))
    label = f"{length:g} px" if pixel_size_m is None else length_label(length)
    axes.text(
        x + width_px / 2,
        y + 1.5 * height,
        label,
        ha="center",
        va="bottom",
        bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "edgecolor": "none"},
    )


def nice_length(longest: float) -> float:
    """Largest of 1, 2, 5 times a power of ten that is not above `longest`.

    Examples
    --------
    >>> nice_length(37.0), nice_length(1.2e-6)
    (20.0, 1e-06)
    """
    power = 10.0 ** np.floor(np.log10(longest) + 1e-9)
    factor = max(factor for factor in (1, 2, 5) if factor * power <= longest * (1 + 1e-9))
    return float(f"{factor * power:.3g}")


def length_label(length_m: float) -> str:
    """A length in metres, written with the prefix that suits it.

    Examples
    --------
    >>> length_label(5e-7), length_label(2e-6)
    ('500 nm', '2 µm')
    """
    for unit_m, name in ((1.0, "m"), (1e-3, "mm"), (1e-6, "µm"), (1e-9, "nm"), (1e-12, "pm")):
        if length_m >= unit_m * (1 - 1e-9):
            return f"{length_m / unit_m:g} {name}"
    return f"{length_m:g} m"


def check_figure_path(path: str | Path) -> None:
    """Raise `PtychodaskError` unless a figure can be written there: a file in a folder, of a kind that is known."""
    path = Path(path)
    kinds = sorted(FigureCanvasAgg.filetypes)
    if path.suffix.lstrip(".").lower() not in kinds:
        raise PtychodaskError(f"{path}: is no name of a figure; end it in one of: {', '.join(f'.{k}' for k in kinds)}")
    if path.is_dir() or not path.parent.is_dir():
        raise PtychodaskError(f"{path}: is a folder, or lies in none that exists; name a file in a folder")


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        check_figure_path(path)
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:
            raise PtychodaskError(f"{path}: the figure cannot be written ({error}); name a .png in a folder") from error
    return figure
