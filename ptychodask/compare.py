"""Results beside each other: the same figures, on the same pixels, against a known object or one of them."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from ptychodask.io import ForeignResult, read_foreign_result
from ptychodask.iterative import footprint_corners
from ptychodask.metrics import (
    PTYCHOPINN_PEAK,
    Gauge,
    align_gauge,
    amplitude_ratio,
    correlation,
    crossing,
    frc,
    half_bit,
    mae,
    ms_ssim,
    mse,
    psnr,
    r_factor,
    ssim,
)
from ptychodask.places import S3Location, parse_location
from ptychodask.registration import find_corner, on_whole_pixels, seen_box
from ptychodask.result import make_dataset, open_result, recorded
from ptychodask.scan import PtychodaskError, Scan, Truth
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)

METRICS = ("correlation", "ratio", "mae", "mse", "psnr", "ssim", "ms_ssim", "frc50", "frc_half_bit", "frc_1_7")
"""Figures of each part of an object; `ratio` is of amplitudes alone, the last three are in cycles per pixel."""

PARTS = ("amplitude", "phase")
"""Parts of an object that are judged apart."""

METHOD_OF_KIND = {"pinn": "PtychoPINN", "baseline": "Baseline"}
"""Name of the method of a result, from the kind of model that it records."""

METHOD_OF_PROGRAM = {"pty-chi": "PtyChi"}
"""Name of the method, from the program that a file of another one names."""

LIGHT_INSIDE = 0.99
"""Share of the probe's light that must fall on seen pixels for a pattern to be judged by."""

LEAST_PIXELS = 8
"""Pixels along each side of the area that results are judged on, at the least."""

PIXEL_TOLERANCE = 1e-3
"""By how much pixel sizes may differ, relative to one of them, between results that are compared."""

FURTHEST_PX = 2**31
"""Pixels from the origin of the scan's frame that a result may lie, at the most."""

Result = xr.Dataset | ForeignResult | str | Path


def compare(
    results: Mapping[str, Result] | Sequence[Result],
    *,
    truth: Truth | Scan | str | Path | None = None,
    scan: Scan | str | Path | None = None,
    baseline: str | None = None,
    register: bool = False,
    ramp: bool = True,
    scale: bool = False,
    peak: float | Literal["range", "ptychopinn"] = "range",
    min_weight: float = 0.1,
) -> xr.Dataset:
    """Judge results on the area that all of them have seen.

    Parameters
    ----------
    results : dict of label to result, or list of results
        Any number of: a result of `reconstruct` or `reconstruct_iterative`, a store or a file that holds one, also of
        another program (`read_foreign_result`). One with a dimension ``method`` counts as several. Without labels,
        the kind of model that a result records gives its name: ``PtychoPINN``, ``Baseline``; a file of pty-chi is
        ``PtyChi``; else the name of the file, or ``Iterative``.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one; without it the first result is the reference.
    scan : Scan or path, optional
        The measured scan (store); adds the R-factor of each object, see `r_factors`.
    baseline : str, optional
        Label of the result from which signed differences are taken.
    register : bool
        Move each result to where it fits the reference best, to a fraction of a pixel. Results without a place in the
        scan's frame are moved in any case.
    ramp, scale : bool
        Remove a phase plane, a factor of the amplitude; the latter is a gauge only with calibration ``mean_counts``.
        The global phase always is one.
    peak : float, "range" or "ptychopinn"
        Peak of the PSNR: a number, the range of the reference's part, or PtychoPINN's 255.
    min_weight : float
        Pixels whose weight is below this share of the median weight of their result count as unseen: the scan's rim.

    Returns
    -------
    xarray.Dataset
        ``value`` (method, part, metric): correlation, ratio of the mean amplitudes, mean absolute and squared error,
        PSNR (dB), SSIM, MS-SSIM, and the frequencies (cycles per pixel) at which the ring correlation crosses one half,
        the half-bit curve and 1/7, over the smallest rectangle that holds what all have seen (the latter three over its
        middle square);
        ``difference`` (method, part, metric), the same less that of `baseline`;
        ``frc`` (method, part, frequency), the curves, and ``half_bit`` (frequency);
        ``resolution_px`` and, where the pixel size is known, ``resolution_m`` (method, part, criterion), the inverse of
        the crossings: full periods;
        ``data_range`` (part), the reference's range, over which SSIM is taken, and ``peak`` (part), that of the PSNR;
        ``phase_rad``, ``ramp_rad_per_px``, ``scale``, the gauge that was removed (at the common area's first pixel),
        and ``shift_px`` (method, axis), by how much a result was moved;
        ``r_factor`` (method) with `scan`. Phases in radians. Attributes name the reference and the common area, and in
        ``data_hash`` the data of each result (and of the scan) where these are not the same: see `other_data`.
        Select with ``.sel({"method": label})``, for xarray's own `sel` has a keyword ``method``.

    Raises
    ------
    PtychodaskError
        If there is nothing to compare with, the truth is missing, a file cannot be read, pixel sizes differ, or the
        results share no seen pixel.

    Notes
    -----
    An estimate's phase is taken within π of the reference's, and that from the reference's mean phase on, so that only
    objects that wrap themselves show wraps.
    """
    known = None if truth is None else find_truth(truth)
    aligned_results = align(results, truth=known, register=register, min_weight=min_weight)
    if known is None and len(aligned_results) < 2:
        raise PtychodaskError(f"compare: {len(aligned_results)} results and no truth; pass truth=, or a second result")
    if baseline is not None and baseline not in aligned_results:
        raise PtychodaskError(
            f"compare: no result {baseline!r} to be the baseline; the results are {', '.join(aligned_results)}"
        )
    objects, reference, y, x = _on_common_area(aligned_results, known, min_weight)
    aligned = [align_gauge(object_, reference, ramp=ramp, scale=scale) for object_ in objects.values()]
    # Phases are taken from the reference's mean on, far from where they wrap.
    turn = np.exp(-1j * np.angle(np.nansum(reference)))
    turned = {label: found * turn for label, (found, _) in zip(objects, aligned, strict=True)}
    judged = _judged(turned, reference * turn, peak, _pixel_size_m(aligned_results))
    comparison = _with_gauges(judged, [gauge for _, gauge in aligned], aligned_results)
    comparison.attrs = {
        "reference": "truth" if known is not None else next(iter(objects)),
        "seen_pixels": int(np.isfinite(reference).sum()),
        "y_px": [float(y[0]), float(y[-1])],
        "x_px": [float(x[0]), float(x[-1])],
        "min_weight": min_weight,
        "gauge_removed": ["phase", *(["ramp"] if ramp else []), *(["scale"] if scale else [])],
    }
    measured = scan if isinstance(scan, Scan) or scan is None else open_scan(scan)
    if measured is not None:
        comparison["r_factor"] = ("method", list(r_factors(aligned_results, measured).values()))
        comparison.attrs["r_patterns"] = len(patterns_inside(aligned_results, measured))
    comparison.attrs |= _different_data(aligned_results, {"the scan": measured, "the truth": truth})
    if told := other_data(comparison):
        logger.warning("compare: %s", told)
    return comparison if baseline is None else _with_differences(comparison, baseline)


def _different_data(
    results: Mapping[str, xr.Dataset], beside: Mapping[str, Truth | Scan | str | Path | None]
) -> dict[str, dict[str, str]]:
    """The attribute ``data_hash`` where results were made of different data, or not of the scans that they are judged
    by; nothing elsewhere."""
    hashes = {label: str(ds.attrs["data_hash"]) for label, ds in results.items() if "data_hash" in ds.attrs}
    for label, given in beside.items():
        scan = open_scan(given) if isinstance(given, str | Path) else given
        if isinstance(scan, Scan) and scan.data_hash and hashes and scan.data_hash != hashes.get("the scan"):
            hashes[label] = scan.data_hash
    return {"data_hash": hashes} if len(set(hashes.values())) > 1 else {}


def other_data(comparison: xr.Dataset) -> str:
    """A sentence that says which results were made of which data; nothing where all were made of the same.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Examples
    --------
    >>> other_data(xr.Dataset(attrs={"data_hash": {"a": "0123456789abcdef", "b": "fedcba9876543210"}}))
    'Not all were made of one scan with one probe; data: a 0123456789ab, b fedcba987654.'
    """
    hashes = comparison.attrs.get("data_hash", {})
    listed = ", ".join(f"{label} {hash_[:12]}" for label, hash_ in hashes.items())
    return f"Not all were made of one scan with one probe; data: {listed}." if hashes else ""


def align(
    results: Mapping[str, Result] | Sequence[Result],
    *,
    truth: Truth | Scan | str | Path | None = None,
    register: bool = False,
    min_weight: float = 0.1,
) -> dict[str, xr.Dataset]:
    """Results of any program on the pixels of one frame: the scan's, or that of the first result if it has another.

    Parameters
    ----------
    results, truth, register, min_weight
        As in `compare`.

    Returns
    -------
    dict of label to Dataset
        As `reconstruct` gives them. One that was moved is in memory and says by how much in the attribute
        ``shift_yx_px``; one on pixels that belong to no scan has the attribute ``frame`` = "own".

    Raises
    ------
    PtychodaskError
        If a file cannot be read, pixel sizes differ, or a result cannot be registered.
    """
    opened = results_by_label(results.items() if isinstance(results, Mapping) else [(None, each) for each in results])
    _pixel_size_m(opened)
    if not opened:
        return {}
    first = next(iter(opened))
    frame = "scan" if truth is not None else _frame(opened[first])
    if truth is None:
        reference = _known(opened[first], min_weight)
    else:
        reference = _where_lit(find_truth(truth), opened, min_weight)
    for label, ds in opened.items():
        searched = _frame(ds) != frame
        if (register or searched) and not (truth is None and label == first):
            opened[label] = _registered(label, ds, reference, frame, min_weight, search=searched)
    return opened


def _where_lit(truth: Truth, results: Mapping[str, xr.Dataset], min_weight: float) -> Truth:
    """The truth where the first result in the scan's frame is well lit: beyond, other programs' objects are guesses."""
    for ds in results.values():
        if _frame(ds) == "scan":
            lit = _known(ds, min_weight)
            known = truth_on_pixels(truth, ds["y"].values, ds["x"].values)
            return Truth(np.where(np.isfinite(lit.object), known, np.complex64(np.nan)), lit.corner_yx_px)
    return truth


def _frame(ds: xr.Dataset) -> str:
    return str(ds.attrs.get("frame", "scan"))


def _registered(
    label: str, ds: xr.Dataset, reference: Truth, frame: str, min_weight: float, *, search: bool
) -> xr.Dataset:
    """A result moved to where it fits the reference best."""
    ds = _in_memory(ds)
    known = _known(ds, min_weight)
    before, origin = np.asarray(known.corner_yx_px), np.asarray(reference.corner_yx_px)
    start = None if search else tuple((before - origin).tolist())
    try:
        after = np.asarray(find_corner(known.object, reference.object, start_yx_px=start)) + origin
    except PtychodaskError as error:
        raise PtychodaskError(f"{label}: {error}") from error
    logger.info("%s: moved by (%.2f, %.2f) px", label, *(after - before))
    attributes = {**ds.attrs, "frame": frame, "shift_yx_px": (after - before).tolist()}
    weight, _ = on_whole_pixels(ds["weight"].values + 0j, tuple(after.tolist()))
    object_, corner = on_whole_pixels(ds["object"].values, tuple(after.tolist()))
    return _dataset(object_, np.maximum(weight.real, 0), corner, ds.attrs.get("pixel_size_m"), attributes)


def _dataset(
    object_: NDArray[np.complexfloating[Any, Any]],
    weight: NDArray[np.floating[Any]],
    corner: tuple[int, int],
    pixel_size_m: float | None,
    attributes: dict[str, Any],
) -> xr.Dataset:
    """A result of which nothing but object and weight is known."""
    seen = np.isfinite(object_)
    uncertainty = np.full(seen.shape, np.nan, np.float32)
    weight = np.where(seen, weight, 0.0)
    return make_dataset(object_, weight, uncertainty, seen, corner, pixel_size_m=pixel_size_m, attributes=attributes)


def results_by_label(results: Iterable[tuple[str | None, Result]]) -> dict[str, xr.Dataset]:
    """Results under their labels, those of several methods taken apart.

    Parameters
    ----------
    results : iterable of (label or None, result)
        See `compare` for the name of one without a label.

    Returns
    -------
    dict of label to Dataset
        One of another program has the attribute ``frame`` = "own" where its file says no place.
    """
    found: dict[str, xr.Dataset] = {}
    for label, result in results:
        source = Path(result).stem if isinstance(result, str | Path) else None
        methods = _methods_of(result)
        for method, ds in methods.items():
            name = method or source or "result"
            if label is not None:
                name = f"{label} {method}" if len(methods) > 1 else label
            elif name in found:
                name = f"{name} ({source})"
            if name in found:
                raise PtychodaskError(f"compare: two results are called {name}; give each a label (LABEL=PATH)")
            found[name] = _checked(name, ds)
    return found


def _checked(label: str, ds: xr.Dataset) -> xr.Dataset:
    for name in ("object", "weight"):
        if name not in ds or ds[name].dims != ("y", "x"):
            raise PtychodaskError(f"{label}: has no {name} (y, x); reconstruct it, or select pixels with isel")
    for dim in ("y", "x"):
        at = ds[dim].values
        if dim not in ds.coords or not at.size or abs(at[0]) > FURTHEST_PX or at[0] % 1 or (np.diff(at) != 1).any():
            raise PtychodaskError(f"{label}: its pixels along {dim} lie at no consecutive whole numbers, expected such")
    size = ds.attrs.get("pixel_size_m", 1.0)
    if not (isinstance(size, int | float) and 0 < size < np.inf):
        raise PtychodaskError(f"{label}: records {size!r} as pixel_size_m, expected a positive number of metres")
    shift = ds.attrs.get("shift_yx_px", [0.0, 0.0])
    if not (isinstance(shift, list) and len(shift) == 2 and all(isinstance(value, int | float) for value in shift)):
        raise PtychodaskError(f"{label}: records {shift!r} as shift_yx_px, expected two numbers")
    return ds


def _methods_of(result: Result) -> dict[str | None, xr.Dataset]:
    """The results that one holds, by the names of the methods that it records."""
    if isinstance(result, str | Path):
        path = parse_location(result)
        if isinstance(path, S3Location) or path.is_dir() or (not path.exists() and path.suffix in ("", ".zarr")):
            result = open_result(path)
        else:
            result = read_foreign_result(path)
    if isinstance(result, ForeignResult):
        return {METHOD_OF_PROGRAM.get(result.program or ""): _from_foreign(result)}
    if "method" in result.coords:
        several = result if "method" in result.dims else result.expand_dims("method")
        kinds = [str(kind) for kind in several["method"].values]
        return {METHOD_OF_KIND.get(kind, kind): several.isel(method=i, drop=True) for i, kind in enumerate(kinds)}
    if recorded(result.attrs, "spec", "engine") == "iterative":
        return {"Iterative": result}
    return {METHOD_OF_KIND.get(str(recorded(result.attrs, "model", "kind"))): result}


def _from_foreign(result: ForeignResult) -> xr.Dataset:
    own = result.corner_yx_px or (0.0, 0.0)
    object_, corner = on_whole_pixels(result.object, own)
    attributes = {} if result.corner_yx_px else {"frame": "own"}
    return _dataset(object_, np.ones(object_.shape, np.float32), corner, result.pixel_size_m, attributes)


def _in_memory(ds: xr.Dataset) -> xr.Dataset:
    return ds[["object", "weight"]].ptycho.compute()


def _known(ds: xr.Dataset, min_weight: float) -> Truth:
    """The well-lit part of a result, as if it were known: NaN where its weight is too small."""
    ds = _in_memory(ds)
    weight = ds["weight"].values
    enough = min_weight * float(np.median(weight[weight > 0])) if (weight > 0).any() else np.inf
    object_ = np.where(weight >= enough, ds["object"].values, np.complex64(complex(np.nan, np.nan)))
    return Truth(object_, _corner(ds))


def _corner(ds: xr.Dataset) -> tuple[float, float]:
    return float(ds["y"][0]), float(ds["x"][0])


def _pixel_size_m(results: Mapping[str, xr.Dataset]) -> float | None:
    """Size of a pixel, on which all results that know theirs agree."""
    sizes = {label: ds.attrs["pixel_size_m"] for label, ds in results.items() if "pixel_size_m" in ds.attrs}
    for label, size in sizes.items():
        first_label, first = next(iter(sizes.items()))
        if abs(size / first - 1) > PIXEL_TOLERANCE:
            raise PtychodaskError(
                f"compare: pixels of {first_label} are {first:g} m across and those of {label} {size:g} m; "
                "bring the objects to one pixel size first"
            )
    return next(iter(sizes.values()), None)


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
        NaN where the truth does not reach. A corner that lies between pixels is met by `on_whole_pixels`.

    Examples
    --------
    >>> truth = Truth(np.arange(6, dtype=np.complex64).reshape(2, 3), (4.0, 0.0))
    >>> truth_on_pixels(truth, np.array([5.0, 6.0]), np.array([1.0, 2.0])).real.tolist()
    [[4.0, 5.0], [nan, nan]]
    """
    known, corner = on_whole_pixels(truth.object, truth.corner_yx_px)
    aligned_results = np.full((len(y_px), len(x_px)), complex(np.nan, np.nan), np.complex64)
    rows, columns = (np.asarray(axis).astype(int) - start for axis, start in zip((y_px, x_px), corner, strict=True))
    good_rows, good_columns = ((at >= 0) & (at < n) for at, n in zip((rows, columns), known.shape, strict=True))
    aligned_results[np.ix_(good_rows, good_columns)] = known[np.ix_(rows[good_rows], columns[good_columns])]
    return aligned_results


def _on_common_area(
    results: Mapping[str, xr.Dataset], truth: Truth | None, min_weight: float
) -> tuple[dict[str, NDArray[np.complex64]], NDArray[np.complex64], NDArray[np.float64], NDArray[np.float64]]:
    """Objects by label and the reference, all NaN on the same pixels, and the coordinates y and x of these."""
    y, x = _common_frame(results)
    objects = {label: truth_on_pixels(_known(ds, min_weight), y, x) for label, ds in results.items()}
    reference = next(iter(objects.values())) if truth is None else truth_on_pixels(truth, y, x)
    seen = np.isfinite(reference) & np.all([np.isfinite(object_) for object_ in objects.values()], axis=0)
    if not seen.any():
        raise PtychodaskError("compare: no pixel is seen in all of the results and in the reference")
    box = seen_box(seen)
    if min(seen[box].shape) < LEAST_PIXELS:
        raise PtychodaskError(
            f"compare: all results and the reference have seen {' x '.join(map(str, seen[box].shape))} pixels, "
            f"expected {LEAST_PIXELS} or more along each side"
        )
    unseen = np.complex64(complex(np.nan, np.nan))
    objects = {label: np.where(seen, object_, unseen)[box] for label, object_ in objects.items()}
    return objects, np.where(seen, reference, unseen)[box], y[box[0]], x[box[1]]


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


def _judged(
    objects: Mapping[str, NDArray[np.complexfloating[Any, Any]]],
    reference: NDArray[np.complexfloating[Any, Any]],
    peak: float | Literal["range", "ptychopinn"],
    pixel_size_m: float | None,
) -> xr.Dataset:
    """Figures and ring correlations of aligned objects, all NaN on the same pixels."""
    wanted = _parts(reference, reference)
    data_range = {
        "amplitude": _range(wanted["amplitude"], float(np.nanmax(wanted["amplitude"]))),
        "phase": _range(wanted["phase"], np.pi),
    }
    peaks = {part: _peak(peak, data_range[part]) for part in PARTS}
    found = [_parts(object_, reference) for object_ in objects.values()]
    curves = [[frc(parts[part], wanted[part]) for part in PARTS] for parts in found]
    frequency = curves[0][0][0]
    thresholds: dict[str, float | NDArray[np.float64]] = {
        "frc50": 0.5,
        "frc_half_bit": half_bit(frequency),
        "frc_1_7": 1 / 7,
    }
    crossings = np.array(
        [[[crossing(*curve, level) for level in thresholds.values()] for curve in row] for row in curves]
    )
    plain = np.array([[_figures(parts, wanted, part, data_range, peaks) for part in PARTS] for parts in found])
    judged = xr.Dataset(
        {
            "value": (("method", "part", "metric"), np.concatenate([plain, crossings], axis=2)),
            "frc": (("method", "part", "frequency"), np.array([[c for _, c in row] for row in curves])),
            "half_bit": ("frequency", thresholds["frc_half_bit"]),
            "resolution_px": (("method", "part", "criterion"), 1 / crossings, {"units": "px"}),
            "data_range": ("part", list(data_range.values())),
            "peak": ("part", list(peaks.values())),
        },
        coords={
            "method": list(objects),
            "part": list(PARTS),
            "metric": list(METRICS),
            "criterion": list(thresholds),
            "frequency": ("frequency", frequency, {"units": "1/px", "long_name": "spatial frequency"}),
        },
    )
    # A part that is constant in the reference, as the phase of an absorber, has no structure to correlate with.
    structured = judged["data_range"] > 0
    for name in ("frc", "resolution_px"):
        judged[name] = judged[name].where(structured)
    judged["value"] = judged["value"].where(structured | judged["metric"].isin(["ratio", "mae", "mse", "psnr"]))
    if pixel_size_m is not None:
        judged["resolution_m"] = (judged["resolution_px"] * pixel_size_m).assign_attrs(units="m")
    return judged


def _parts(
    object_: NDArray[np.complexfloating[Any, Any]], reference: NDArray[np.complexfloating[Any, Any]]
) -> dict[str, NDArray[np.floating[Any]]]:
    """Amplitude, and the phase within π of the reference's."""
    phase = np.angle(reference) + np.angle(object_ * np.conj(reference))
    return {"amplitude": np.abs(object_), "phase": phase}


def _range(values: NDArray[np.floating[Any]], size: float) -> float:
    """Largest less smallest; 0 where that is rounding."""
    span = float(np.nanmax(values) - np.nanmin(values))
    return span if span > 1e-6 * size else 0.0


def _peak(peak: float | Literal["range", "ptychopinn"], data_range: float) -> float:
    named = {"range": data_range, "ptychopinn": PTYCHOPINN_PEAK}
    if isinstance(peak, str) and peak in named:
        return named[peak]
    if not (isinstance(peak, int | float) and peak > 0):
        raise PtychodaskError(f"compare: peak is {peak!r}, expected a positive number or one of {', '.join(named)}")
    return float(peak)


def _figures(
    found: Mapping[str, NDArray[np.floating[Any]]],
    wanted: Mapping[str, NDArray[np.floating[Any]]],
    part: str,
    data_range: Mapping[str, float],
    peaks: Mapping[str, float],
) -> list[float]:
    """The figures of one part that are no crossings."""
    pair, span, peak = (found[part], wanted[part]), data_range[part], peaks[part]
    return [
        correlation(*pair),
        amplitude_ratio(*pair) if part == "amplitude" else np.nan,
        mae(*pair),
        mse(*pair),
        psnr(*pair, peak=peak) if peak > 0 else np.nan,
        ssim(*pair, data_range=span) if span > 0 else np.nan,
        ms_ssim(*pair, data_range=span) if span > 0 else np.nan,
    ]


def _with_gauges(judged: xr.Dataset, gauges: list[Gauge], opened: Mapping[str, xr.Dataset]) -> xr.Dataset:
    shifts = [ds.attrs.get("shift_yx_px", [0.0, 0.0]) for ds in opened.values()]
    return judged.assign(
        {
            "phase_rad": ("method", [gauge.phase_rad for gauge in gauges]),
            "ramp_rad_per_px": (("method", "axis"), [gauge.ramp_yx_rad_per_px for gauge in gauges]),
            "scale": ("method", [gauge.scale for gauge in gauges]),
            "shift_px": (("method", "axis"), shifts),
        }
    ).assign_coords(axis=["y", "x"])


def r_factors(results: Mapping[str, Result] | Sequence[Result], scan: Scan | str | Path) -> dict[str, float]:
    """How well whole objects explain the measured patterns.

    Parameters
    ----------
    results : dict of label to result, or list of results
        As in `compare`, in the scan's frame.
    scan : Scan or path

    Returns
    -------
    dict of label to float
        R = Σ|√I_pred − √I| / Σ√I over the patterns of `patterns_inside` (`r_factor`); NaN where there are none.

    Raises
    ------
    PtychodaskError
        If a result has no place in the scan's frame.
    """
    measured = scan if isinstance(scan, Scan) else open_scan(scan)
    opened = {label: _in_memory(ds) for label, ds in align(results).items()}
    index = patterns_inside(opened, measured)
    if not len(index):
        logger.warning("compare: no pattern's light falls inside all results, so there is no R")
        return dict.fromkeys(opened, float("nan"))
    return {label: r_factor(ds["object"].values, _corner(ds), measured, index) for label, ds in opened.items()}


def patterns_inside(results: Mapping[str, xr.Dataset], scan: Scan) -> NDArray[np.int64]:
    """Patterns whose light falls on what all results have seen: `LIGHT_INSIDE` of it at the least.

    Parameters
    ----------
    results : dict of label to Dataset
        In the scan's frame.
    scan : Scan

    Returns
    -------
    int64 array (k,)
    """
    inside = np.ones(scan.n_patterns, bool)
    light = (np.abs(scan.probe) ** 2).sum(axis=0, dtype=np.float64)
    for label, ds in results.items():
        if _frame(ds) != "scan":
            raise PtychodaskError(f"{label}: has no place in the scan's frame, so no R; pass truth= to find one")
        seen = np.pad(np.isfinite(ds["object"].values).astype(np.float64), scan.n_pixels)
        share = fftconvolve(seen, light[::-1, ::-1] / light.sum(), mode="valid")
        start = footprint_corners(scan.position_yx_px, scan.n_pixels) - np.asarray(_corner(ds), int) + scan.n_pixels
        on = ((start >= 0) & (start < share.shape)).all(axis=1)
        inside &= on
        inside[on] &= share[tuple(start[on].T)] >= LIGHT_INSIDE
    return np.flatnonzero(inside)


def _with_differences(comparison: xr.Dataset, baseline: str) -> xr.Dataset:
    comparison = comparison.assign(
        difference=comparison["value"] - comparison["value"].loc[baseline].drop_vars("method")
    )
    comparison.attrs["baseline"] = baseline
    return comparison


def to_markdown(comparison: xr.Dataset) -> str:
    """A comparison as Markdown: a row for each method and part, and what the figures mean.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    str
        One table; a second one of signed differences where there is a baseline.
    """
    text = _table(comparison, "value", "{:.4g}")
    if "difference" in comparison:
        text += f"\nLess {comparison.attrs['baseline']}:\n\n" + _table(comparison, "difference", "{:+.3g}")
    return f"{text}\n{_caption(comparison)}\n"


def _table(comparison: xr.Dataset, variable: str, form: str) -> str:
    header, *rows = _rows(comparison, variable)
    shown = [[*row[:2], *("" if np.isnan(value) else form.format(value) for value in row[2:])] for row in rows]
    lines = [header, ["---", "---", *("---:" for _ in header[2:])], *shown]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(comparison: xr.Dataset, variable: str) -> list[list[Any]]:
    """Header and rows: method, part, figures, and R beside the values."""
    scored = variable == "value" and "r_factor" in comparison
    rows: list[list[Any]] = [["method", "part", *comparison["metric"].values, *(["r_factor"] if scored else [])]]
    for method in comparison["method"].values:
        for part in comparison["part"].values:
            figures = comparison[variable].loc[method, part].values.tolist()
            rows.append([method, part, *figures, *([float(comparison["r_factor"].loc[method])] if scored else [])])
    return rows


def _caption(comparison: xr.Dataset) -> str:
    peak, span = (dict(zip(PARTS, comparison[name].values, strict=True)) for name in ("peak", "data_range"))
    moved = [
        f"{method} by ({shift[0]:+.2f}, {shift[1]:+.2f})"
        for method, shift in zip(comparison["method"].values, comparison["shift_px"].values, strict=True)
        if shift.any()
    ]
    return (
        f"Against {comparison.attrs['reference']} on {comparison.attrs['seen_pixels']} pixels; "
        f"{', '.join(comparison.attrs['gauge_removed'])} removed; "
        f"PSNR in dB at peak {peak['amplitude']:.4g} (amplitude) and {peak['phase']:.4g} (phase); "
        f"SSIM over ranges of {span['amplitude']:.4g} and {span['phase']:.4g} rad; "
        "FRC crossings in cycles per pixel."
        + (f" R over {comparison.attrs['r_patterns']} patterns." if "r_factor" in comparison else "")
        + (f" Moved (y, x), in pixels: {', '.join(moved)}." if moved else "")
        + (f" {told}" if (told := other_data(comparison)) else "")
    )


def to_csv(comparison: xr.Dataset) -> str:
    """A comparison as CSV: a row for each method and part, all digits, nothing where there is no figure.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    str
        Columns: method, part, the metrics, r_factor with a scan, and ``<metric>_less_<baseline>`` with a baseline.
    """
    header, *rows = _rows(comparison, "value")
    if "difference" in comparison:
        names, *differences = _rows(comparison, "difference")
        header = [*header, *(f"{name}_less_{comparison.attrs['baseline']}" for name in names[2:])]
        rows = [[*row, *more[2:]] for row, more in zip(rows, differences, strict=True)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value != value else value for value in row] for row in rows])
    return text.getvalue()
