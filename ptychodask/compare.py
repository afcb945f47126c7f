"""Results beside each other: the same figures, on the same pixels, against a known object or one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import shift

from ptychodask.metrics import (
    Gauge,
    align_gauge,
    amplitude_correlation,
    amplitude_ratio,
    frc50,
    mae,
    mse,
    phase_correlation,
    psnr,
    r_factor,
    ssim,
)
from ptychodask.result import open_result
from ptychodask.scan import PtychodaskError, Scan, Truth
from ptychodask.store import open_scan

METRICS = ("correlation", "ratio", "mae", "mse", "psnr", "ssim", "frc50")
"""Figures of each part of an object; `ratio` is of amplitudes alone."""

PARTS = ("amplitude", "phase")
"""Parts of an object that are judged apart."""


def compare(
    results: Mapping[str, xr.Dataset | str | Path],
    *,
    truth: Truth | Scan | str | Path | None = None,
    scan: Scan | str | Path | None = None,
    ramp: bool = True,
    scale: bool = False,
    min_weight: float = 0.1,
) -> xr.Dataset:
    """Judge results on the area that all of them have seen.

    Parameters
    ----------
    results : dict of label to Dataset or path
        Results of `reconstruct` or `reconstruct_iterative`, or stores that hold such.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one; without it the first result is the reference.
    scan : Scan or path, optional
        The measured scan (store); adds the R-factor of each whole object over all its patterns.
    ramp, scale : bool
        Remove a phase plane, a factor of the amplitude; the latter is a gauge only with calibration ``mean_counts``.
        The global phase always is one.
    min_weight : float
        Pixels whose weight is below this share of the median weight of their result count as unseen: the scan's rim.

    Returns
    -------
    xarray.Dataset
        ``value`` (method, part, metric): correlation, ratio of the mean amplitudes, mean absolute and squared error,
        PSNR (dB), SSIM, and FRC50 (cycles per pixel) over the common rectangle (its middle square);
        ``peak`` (part), the reference's range, which is the peak of the PSNR and the range of the SSIM;
        ``phase_rad``, ``ramp_rad_per_px``, ``scale``, the gauge that was removed (at the common area's first pixel);
        ``r_factor`` (method) with `scan`. Phases in radians. Attributes name the reference and the common area.
        Select with ``.sel({"method": label})``, for xarray's own `sel` has a keyword ``method``.

    Raises
    ------
    PtychodaskError
        If there is nothing to compare with, the truth is missing, or the results share no seen pixel.
    """
    opened = {label: _in_memory(result) for label, result in results.items()}
    if not opened or (truth is None and len(opened) < 2):
        raise PtychodaskError(f"compare: {len(opened)} results and no truth; pass truth=, or a second result")
    known = None if truth is None else find_truth(truth)
    y, x = _common_frame(opened)
    objects = {label: _seen_object(ds, y, x, min_weight) for label, ds in opened.items()}
    reference = next(iter(objects.values())) if known is None else truth_on_pixels(known, y, x)
    seen = np.isfinite(reference) & np.all([np.isfinite(object_) for object_ in objects.values()], axis=0)
    if not seen.any():
        raise PtychodaskError("compare: no pixel is seen in all of the results and in the reference")
    wanted = _parts(np.where(seen, reference, np.nan))
    peak = {part: float(np.ptp(values[seen])) for part, values in wanted.items()}
    gauges, values = [], []
    for object_ in objects.values():
        aligned, gauge = align_gauge(np.where(seen, object_, np.nan), reference, ramp=ramp, scale=scale)
        gauges.append(gauge)
        values.append(_figures(aligned, np.where(seen, reference, np.nan), peak))
    comparison = _as_dataset(list(objects), values, peak, gauges)
    comparison.attrs = {
        "reference": "truth" if known is not None else next(iter(objects)),
        "seen_pixels": int(seen.sum()),
        "y_px": [float(y[0]), float(y[-1])],
        "x_px": [float(x[0]), float(x[-1])],
        "min_weight": min_weight,
        "gauge_removed": ["phase", *(["ramp"] if ramp else []), *(["scale"] if scale else [])],
    }
    if scan is not None:
        comparison["r_factor"] = ("method", list(r_factors(opened, scan).values()))
    return comparison


def r_factors(results: Mapping[str, xr.Dataset | str | Path], scan: Scan | str | Path) -> dict[str, float]:
    """How well whole objects explain the measured patterns.

    Parameters
    ----------
    results : dict of label to Dataset or path
        As in `compare`.
    scan : Scan or path

    Returns
    -------
    dict of label to float
        R = Σ|√I_pred − √I| / Σ√I over all patterns (`r_factor`). A result of a region explains the patterns inside it;
        elsewhere its mean amplitude stands in.
    """
    measured = scan if isinstance(scan, Scan) else open_scan(scan)
    opened = {label: _in_memory(result) for label, result in results.items()}
    return {label: r_factor(ds["object"].values, _corner(ds), measured) for label, ds in opened.items()}


def _in_memory(result: xr.Dataset | str | Path) -> xr.Dataset:
    ds = result if isinstance(result, xr.Dataset) else open_result(result)
    for name in ("object", "weight"):
        if name not in ds or ds[name].dims != ("y", "x"):
            raise PtychodaskError(f"compare: a result has no {name} (y, x); select one method of it, or reconstruct it")
    return ds[["object", "weight"]].ptycho.compute()


def find_truth(truth: Truth | Scan | str | Path) -> Truth:
    """The known object itself, of a scan, or of a store.

    Raises
    ------
    PtychodaskError
        If the scan has none.
    """
    if isinstance(truth, Truth):
        return truth
    scan = truth if isinstance(truth, Scan) else open_scan(truth)
    if scan.truth is None:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: holds no truth; simulated scans do, others are compared without"
        )
    return scan.truth


def truth_on_pixels(
    truth: Truth, y_px: NDArray[np.float64], x_px: NDArray[np.float64]
) -> NDArray[np.complexfloating[Any, Any]]:
    """A known object on the pixels of a result.

    Parameters
    ----------
    truth : Truth
    y_px, x_px : float64 array
        Coordinates of the pixels in the scan's frame, whole numbers.

    Returns
    -------
    complex64 array (y, x)
        NaN where the truth does not reach. A corner that lies between pixels is met by cubic splines.

    Examples
    --------
    >>> truth = Truth(np.arange(6, dtype=np.complex64).reshape(2, 3), (4.0, 0.0))
    >>> truth_on_pixels(truth, np.array([5.0, 6.0]), np.array([1.0, 2.0])).real.tolist()
    [[4.0, 5.0], [nan, nan]]
    """
    corner = np.asarray(truth.corner_yx_px, np.float64)
    whole = np.ceil(corner)
    known = truth.object
    if (whole != corner).any():
        before = corner - whole
        known = (shift(known.real, before, order=3) + 1j * shift(known.imag, before, order=3)).astype(np.complex64)
        # The last row or column has met what lies beyond the known object.
        known = known[tuple(slice(None, -1) if part else slice(None) for part in before)]
    placed = np.full((len(y_px), len(x_px)), complex(np.nan, np.nan), np.complex64)
    rows, columns = (np.asarray(axis).astype(int) - int(start) for axis, start in zip((y_px, x_px), whole, strict=True))
    good_rows, good_columns = ((at >= 0) & (at < n) for at, n in zip((rows, columns), known.shape, strict=True))
    placed[np.ix_(good_rows, good_columns)] = known[np.ix_(rows[good_rows], columns[good_columns])]
    return placed


def _corner(ds: xr.Dataset) -> tuple[float, float]:
    return float(ds["y"][0]), float(ds["x"][0])


def _common_frame(results: Mapping[str, xr.Dataset]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates y and x, pixels, of the rectangle that all results cover."""
    axes = []
    for dim in ("y", "x"):
        low = max(float(ds[dim][0]) for ds in results.values())
        high = min(float(ds[dim][-1]) for ds in results.values())
        if low > high:
            raise PtychodaskError(
                f"compare: along {dim} one result begins at {low:g} px where another ends at {high:g} px; "
                "compare results of the same scan"
            )
        axes.append(np.arange(low, high + 1))
    return axes[0], axes[1]


def _seen_object(
    ds: xr.Dataset, y: NDArray[np.float64], x: NDArray[np.float64], min_weight: float
) -> NDArray[np.complex64]:
    """The object on the common frame, NaN where its weight is too small."""
    weight = ds["weight"].values
    enough = min_weight * float(np.median(weight[weight > 0])) if (weight > 0).any() else np.inf
    top, left = int(y[0] - ds["y"][0]), int(x[0] - ds["x"][0])
    frame = slice(top, top + len(y)), slice(left, left + len(x))
    return np.where(weight[frame] >= enough, ds["object"].values[frame], np.complex64(complex(np.nan, np.nan)))


def _parts(object_: NDArray[np.complexfloating[Any, Any]]) -> dict[str, NDArray[np.floating[Any]]]:
    return {"amplitude": np.abs(object_), "phase": np.angle(object_)}


def _figures(
    aligned: NDArray[np.complexfloating[Any, Any]],
    reference: NDArray[np.complexfloating[Any, Any]],
    peak: Mapping[str, float],
) -> list[list[float]]:
    """Figures (part, metric) of an aligned object."""
    found, wanted = _parts(aligned), _parts(reference)
    correlation = {"amplitude": amplitude_correlation, "phase": phase_correlation}
    return [
        [
            correlation[part](aligned, reference),
            amplitude_ratio(aligned, reference) if part == "amplitude" else np.nan,
            mae(found[part], wanted[part]),
            mse(found[part], wanted[part]),
            psnr(found[part], wanted[part], peak=peak[part]),
            ssim(found[part], wanted[part], data_range=peak[part]),
            frc50(found[part], wanted[part]),
        ]
        for part in PARTS
    ]


def _as_dataset(
    labels: list[str], values: list[list[list[float]]], peak: Mapping[str, float], gauges: list[Gauge]
) -> xr.Dataset:
    return xr.Dataset(
        {
            "value": (("method", "part", "metric"), np.array(values)),
            "peak": ("part", [peak[part] for part in PARTS]),
            "phase_rad": ("method", [gauge.phase_rad for gauge in gauges]),
            "ramp_rad_per_px": (("method", "axis"), [gauge.ramp_yx_rad_per_px for gauge in gauges]),
            "scale": ("method", [gauge.scale for gauge in gauges]),
        },
        coords={"method": labels, "part": list(PARTS), "metric": list(METRICS), "axis": ["y", "x"]},
    )


def to_markdown(comparison: xr.Dataset) -> str:
    """A comparison as a Markdown table, one row for each method and part.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    str
    """
    metrics = [str(metric) for metric in comparison["metric"].values]
    scored = "r_factor" in comparison
    rows = [["method", "part", *metrics, *(["r_factor"] if scored else [])]]
    for method in comparison["method"].values:
        for part in comparison["part"].values:
            figures = [float(value) for value in comparison["value"].loc[method, part]]
            if scored:
                figures.append(float(comparison["r_factor"].loc[method]))
            rows.append([str(method), str(part), *("" if np.isnan(value) else f"{value:.4g}" for value in figures)])
    rows.insert(1, ["---", "---", *("---:" for _ in rows[0][2:])])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
