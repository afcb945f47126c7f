"""Comparison of results with the truth or each other on common pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.forward import MIN_SEEN_LIGHT, r_factor, seen_light
from ptychodask.grouping import chosen_patterns
from ptychodask.io.products import ForeignResult, read_foreign_result
from ptychodask.judging.metrics import (
    METRICS,
    PARTS,
    PTYCHOPINN_PEAK,
    WELL_LIT,
    Gauge,
    PartPair,
    align_gauge,
    frc,
    half_bit,
    well_lit,
)
from ptychodask.judging.refinements import attributes_of_network, refinement_text
from ptychodask.judging.registration import find_corner, on_whole_pixels, seen_box
from ptychodask.result import experiment_of, make_dataset, open_result, recorded
from ptychodask.scan import Scan, Truth
from ptychodask.storage.location import parse_location
from ptychodask.storage.records import as_text
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)


METHOD_OF_KIND = {"pinn": "PtychoPINN", "baseline": "Baseline", "iterative": "Iterative"}
"""Method name of a result, by the recorded kind of its model."""


METHOD_OF_PROGRAM = {"pty-chi": "PtyChi"}
"""Method name of a result of another program, by the program named in its file."""


LEAST_PIXELS = 8
"""Minimum pixels along each side of the area on which results are compared."""


PIXEL_TOLERANCE = 1e-3
"""Maximum relative difference of pixel sizes between compared results."""


FURTHEST_PX = 2**31
"""Maximum distance, pixels, of a result from the origin of the scan coordinates."""


Result = xr.Dataset | ForeignResult | str | Path


def compare(
    results: Mapping[str, Result] | Sequence[Result],
    *,
    truth: Truth | Scan | str | Path | None = None,
    scan: Scan | str | Path | None = None,
    experiment: int | None = None,
    baseline: str | None = None,
    register: bool = False,
    ramp: bool = True,
    scale: bool = False,
    peak: float | Literal["range", "ptychopinn"] = "range",
    min_weight: float = WELL_LIT,
) -> xr.Dataset:
    """Metrics of several results on the area seen in all of them.

    Parameters
    ----------
    results : dict of label to result, or list of results
        Results of `reconstruct` or `reconstruct_iterative`, their stores, or result files, also of other programs
        (`read_foreign_result`). One with a dimension ``method`` counts as several. Without a label, a result is named
        after the recorded kind of its model: ``PtychoPINN``, ``Baseline``; a file of pty-chi is ``PtyChi``; others are
        named after the file, or ``Iterative``.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one; without it the first result is the reference.
    scan : Scan or path, optional
        The measured scan (store); adds the R-factor of each object, see `r_factors`.
    experiment : int, optional
        Experiment of the results, in a scan of several; by default the one that they record.
    baseline : str, optional
        Label of the result from which signed differences are taken.
    register : bool
        Register each result to the reference with sub-pixel shifts. Results that are not in scan coordinates are
        always registered.
    ramp, scale : bool
        Remove a phase ramp, and a factor of the amplitude; the latter is a gauge only with calibration
        ``mean_counts``. The global phase is always removed.
    peak : float, "range" or "ptychopinn"
        Peak of the PSNR: a number, the range of the reference (per part), or PtychoPINN's 255.
    min_weight : float
        Pixels whose weight is below this fraction of the median weight of their result count as unseen. This leaves
        out the edge of the scan.

    Returns
    -------
    xarray.Dataset
        ``value`` (method, part, metric): the metrics of `METRICS`, over the smallest rectangle that contains the common
        area (the crossings of the ring correlation over its central square);
        ``difference`` (method, part, metric), the value minus that of `baseline`;
        ``frc`` (method, part, frequency), the curves, and ``half_bit`` (frequency);
        ``resolution_px`` and, where the pixel size is known, ``resolution_m`` (method, part, criterion), the inverse of
        the crossings: full periods;
        ``data_range`` (part), the reference's range, used for SSIM, and ``peak`` (part), used for PSNR;
        ``phase_rad``, ``ramp_rad_per_px``, ``scale``, the removed gauge (at the first pixel of the common area), and
        ``shift_px`` (method, axis), the shift of each result in registration;
        ``r_factor`` (method) with `scan`. Phases in radians. Attributes name the reference and the common area, and
        ``data_hash`` the data of each result (and of the scan) and ``refinement`` the refinement of each reconstruction
        if these differ: see `warnings_of`.
        Select with ``.sel({"method": label})``, because xarray's `sel` has a keyword ``method``.

    Raises
    ------
    PtychodaskError
        If there is nothing to compare with, the truth is missing, a file cannot be read, pixel sizes differ, or the
        results share no seen pixel.

    Notes
    -----
    The phase of an estimate is taken within π of the reference's, and the reference's relative to its mean phase, so
    that phases wrap only if those of the object span more than 2π.
    """
    known = None if truth is None else find_truth(truth)
    aligned_results = align(results, truth=known, register=register, min_weight=min_weight)
    if known is None and len(aligned_results) < 2:
        raise PtychodaskError(f"compare: {len(aligned_results)} results and no truth; pass truth=, or a second result")
    if baseline is not None and baseline not in aligned_results:
        raise PtychodaskError(
            f"compare: baseline is {baseline!r}, expected one of the results {', '.join(aligned_results)}"
        )
    objects, reference, y, x = _on_common_area(aligned_results, known, min_weight)
    aligned = [align_gauge(object_, reference, ramp=ramp, scale=scale) for object_ in objects.values()]
    # Relative to the reference's mean phase, phases are far from where they wrap.
    turn = np.exp(-1j * np.angle(np.nansum(reference)))
    turned = {label: object_ * turn for label, (object_, _) in zip(objects, aligned, strict=True)}
    metrics = _metrics_of(turned, reference * turn, peak, _pixel_size_m(aligned_results))
    comparison = _with_gauges(metrics, [gauge for _, gauge in aligned], aligned_results)
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
        comparison["r_factor"] = ("method", list(r_factors(aligned_results, measured, experiment).values()))
        comparison.attrs["r_patterns"] = len(patterns_inside(aligned_results, measured, experiment))
    comparison.attrs |= _different_data(aligned_results, {"the scan": measured, "the truth": truth})
    comparison.attrs |= _different_refinement(aligned_results)
    for warning in warnings_of(comparison):
        logger.warning("compare: %s", warning)
    return comparison if baseline is None else _with_differences(comparison, baseline)


def _different_data(
    results: Mapping[str, xr.Dataset], beside: Mapping[str, Truth | Scan | str | Path | None]
) -> dict[str, dict[str, str]]:
    """Attribute ``data_hash`` if the data of results and references differ, else empty."""
    hashes = {label: str(ds.attrs["data_hash"]) for label, ds in results.items() if "data_hash" in ds.attrs}
    for label, given in beside.items():
        scan = open_scan(given) if isinstance(given, str | Path) else given
        if isinstance(scan, Scan) and scan.data_hash and hashes and scan.data_hash != hashes.get("the scan"):
            hashes[label] = scan.data_hash
    return as_text({"data_hash": hashes}) if len(set(hashes.values())) > 1 else {}


def _different_refinement(results: Mapping[str, xr.Dataset]) -> dict[str, dict[str, str]]:
    """Attribute ``refinement`` if reconstructions differ in it, else empty.

    Iterative results and those of other programs are no refined predictions, so they have none to differ in.
    """
    texts = {label: refinement_text(ds.attrs) for label, ds in results.items() if "model" in ds.attrs}
    return as_text({"refinement": texts}) if len(set(texts.values())) > 1 else {}


def warnings_of(comparison: xr.Dataset) -> list[str]:
    """Warnings about results that were made from different data, or refined differently.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    list of str
        Sentences; empty if neither differs.

    Examples
    --------
    >>> warnings_of(xr.Dataset(attrs={"data_hash": {"a": "0123456789abcdef", "b": "fedcba9876543210"}}))
    ['Not all are from the same scan and probe; data hashes: a 0123456789ab, b fedcba987654.']
    >>> warnings_of(xr.Dataset(attrs={"refinement": {"a": "none", "b": "slow phase, 3 sweeps"}}))
    ['Not all were refined alike; refinement: a (none), b (slow phase, 3 sweeps).']
    """
    hashes, texts = (recorded(comparison.attrs, name) or {} for name in ("data_hash", "refinement"))
    warnings = []
    if hashes:
        listed = ", ".join(f"{label} {hash_[:12]}" for label, hash_ in hashes.items())
        warnings.append(f"Not all are from the same scan and probe; data hashes: {listed}.")
    if texts:
        listed = ", ".join(f"{label} ({text})" for label, text in texts.items())
        warnings.append(f"Not all were refined alike; refinement: {listed}.")
    return warnings


def align(
    results: Mapping[str, Result] | Sequence[Result],
    *,
    truth: Truth | Scan | str | Path | None = None,
    register: bool = False,
    min_weight: float = WELL_LIT,
) -> dict[str, xr.Dataset]:
    """Results of any program, in common pixel coordinates.

    These are the scan coordinates, or those of the first result if it is not in scan coordinates and there is no truth.

    Parameters
    ----------
    results, truth, register, min_weight
        As in `compare`.

    Returns
    -------
    dict of label to Dataset
        As from `reconstruct`. A registered result is in memory and has its shift in the attribute ``shift_yx_px``; one
        that is not in scan coordinates has the attribute ``frame`` = "own".

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
        reference = _well_lit_part(opened[first], min_weight)
    else:
        reference = _well_lit_truth(find_truth(truth), opened, min_weight)
    for label, ds in opened.items():
        search = _frame(ds) != frame
        if (register or search) and not (truth is None and label == first):
            opened[label] = _registered(label, ds, reference, frame, min_weight, search=search)
    return opened


def _well_lit_truth(truth: Truth, results: Mapping[str, xr.Dataset], min_weight: float) -> Truth:
    """Truth on the well-lit pixels of the first result in scan coordinates.

    Elsewhere the objects of other programs are not fixed by the data, so they would spoil the registration.
    """
    for ds in results.values():
        if _frame(ds) == "scan":
            lit = _well_lit_part(ds, min_weight)
            known = truth_on_pixels(truth, ds["y"].values, ds["x"].values)
            return Truth(np.where(np.isfinite(lit.object), known, np.complex64(np.nan)), lit.corner_yx_px)
    return truth


def _frame(ds: xr.Dataset) -> str:
    return str(ds.attrs.get("frame", "scan"))


def _registered(
    label: str, ds: xr.Dataset, reference: Truth, frame: str, min_weight: float, *, search: bool
) -> xr.Dataset:
    """Result registered to the reference."""
    ds = _in_memory(ds)
    lit = _well_lit_part(ds, min_weight)
    before, origin = np.asarray(lit.corner_yx_px), np.asarray(reference.corner_yx_px)
    start = None if search else tuple((before - origin).tolist())
    try:
        after = np.asarray(find_corner(lit.object, reference.object, start_yx_px=start)) + origin
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
    """Result from object and weight, with unknown uncertainty."""
    seen = np.isfinite(object_)
    uncertainty = np.full(seen.shape, np.nan, np.float32)
    weight = np.where(seen, weight, 0.0)
    return make_dataset(object_, weight, uncertainty, seen, corner, pixel_size_m=pixel_size_m, attributes=attributes)


def results_by_label(results: Iterable[tuple[str | None, Result]]) -> dict[str, xr.Dataset]:
    """Results by label, one for each method.

    Parameters
    ----------
    results : iterable of (label or None, result)
        `compare` describes the names of results without a label.

    Returns
    -------
    dict of label to Dataset
        A result of another program has the attribute ``frame`` = "own" if its file has no scan coordinates.
    """
    by_label: dict[str, xr.Dataset] = {}
    for label, result in results:
        source = Path(result).stem if isinstance(result, str | Path) else None
        methods = _methods_of(result)
        for method, ds in methods.items():
            name = method or source or "result"
            if label is not None:
                name = f"{label} {method}" if len(methods) > 1 else label
            elif name in by_label:
                name = f"{name} ({source})"
            if name in by_label:
                raise PtychodaskError(f"compare: two results are called {name}; give each a label (LABEL=PATH)")
            by_label[name] = _checked(name, ds)
    return by_label


def _checked(label: str, ds: xr.Dataset) -> xr.Dataset:
    for name in ("object", "weight"):
        if name not in ds or ds[name].dims != ("y", "x"):
            raise PtychodaskError(
                f"{label}: has no {name} (y, x); pass a reconstruction, and select pixels with slices"
            )
    for dim in ("y", "x"):
        at = ds[dim].values
        if dim not in ds.coords or not at.size or abs(at[0]) > FURTHEST_PX or at[0] % 1 or (np.diff(at) != 1).any():
            first = f"{at[:3].tolist()}, ..." if dim in ds.coords else "none"
            raise PtychodaskError(
                f"{label}: coordinates along {dim} are {first}, expected consecutive integers up to {FURTHEST_PX}"
            )
    size = ds.attrs.get("pixel_size_m", 1.0)
    if not (isinstance(size, int | float) and 0 < size < np.inf):
        raise PtychodaskError(f"{label}: records {size!r} as pixel_size_m, expected a positive number of metres")
    shift = ds.attrs.get("shift_yx_px", [0.0, 0.0])
    if not (isinstance(shift, list) and len(shift) == 2 and all(isinstance(value, int | float) for value in shift)):
        raise PtychodaskError(f"{label}: records {shift!r} as shift_yx_px, expected two numbers")
    return ds


def _methods_of(result: Result) -> dict[str | None, xr.Dataset]:
    """Results contained in one, by recorded method name."""
    if isinstance(result, str | Path):
        location = parse_location(result)
        path = location.local_path
        if path is None or path.is_dir() or (not path.exists() and path.suffix in ("", ".zarr")):
            result = open_result(location)
        else:
            result = read_foreign_result(path)
    if isinstance(result, ForeignResult):
        return {METHOD_OF_PROGRAM.get(result.program or ""): _from_foreign(result)}
    if "network" in result.coords:
        several = result if "network" in result.dims else result.expand_dims("network")
        kinds = [str(kind) for kind in several["network"].values]
        return {
            METHOD_OF_KIND.get(kind, kind): several.isel(network=i, drop=True).assign_attrs(
                attributes_of_network(several.attrs, kind)
            )
            for i, kind in enumerate(kinds)
        }
    if recorded(result.attrs, "spec", "engine") == "iterative":
        return {"Iterative": result}
    return {METHOD_OF_KIND.get(str(recorded(result.attrs, "model", "kind"))): result}


def _from_foreign(result: ForeignResult) -> xr.Dataset:
    object_, corner = on_whole_pixels(result.object, result.corner_yx_px or (0.0, 0.0))
    attributes = {} if result.corner_yx_px else {"frame": "own"}
    return _dataset(object_, np.ones(object_.shape, np.float32), corner, result.pixel_size_m, attributes)


def _in_memory(ds: xr.Dataset) -> xr.Dataset:
    return ds[["object", "weight"]].ptycho.compute()


def _well_lit_part(ds: xr.Dataset, min_weight: float) -> Truth:
    """Well-lit part of a result, NaN where the weight is small."""
    ds = _in_memory(ds)
    weight = ds["weight"].values
    object_ = np.where(well_lit(weight, min_weight), ds["object"].values, np.complex64(complex(np.nan, np.nan)))
    return Truth(object_, _corner(ds))


def _corner(ds: xr.Dataset) -> tuple[float, float]:
    return float(ds["y"][0]), float(ds["x"][0])


def _pixel_size_m(results: Mapping[str, xr.Dataset]) -> float | None:
    """Common pixel size of the results that record one."""
    sizes = {label: ds.attrs["pixel_size_m"] for label, ds in results.items() if "pixel_size_m" in ds.attrs}
    for label, size in sizes.items():
        first_label, first = next(iter(sizes.items()))
        if abs(size / first - 1) > PIXEL_TOLERANCE:
            raise PtychodaskError(
                f"compare: the pixel size of {first_label} is {first:g} m and that of {label} {size:g} m; "
                "resample the objects to one pixel size first"
            )
    return next(iter(sizes.values()), None)


def find_truth(truth: Truth | Scan | str | Path) -> Truth:
    """Truth of a scan or a store; a `Truth` is returned unchanged.

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
            f"{scan.store or 'scan'}: has no truth (simulated scans have one); compare its results without"
        )
    return scan.truth


def truth_on_pixels(
    truth: Truth, y_px: NDArray[np.float64], x_px: NDArray[np.float64]
) -> NDArray[np.complexfloating[Any, Any]]:
    """Known object on the pixels of a result.

    Parameters
    ----------
    truth : Truth
    y_px, x_px : float64 array
        Scan coordinates of the pixels, integers.

    Returns
    -------
    complex64 array (y, x)
        NaN outside of the truth. A truth with a fractional corner is interpolated by `on_whole_pixels`.

    Examples
    --------
    >>> truth = Truth(np.arange(6, dtype=np.complex64).reshape(2, 3), (4.0, 0.0))
    >>> truth_on_pixels(truth, np.array([5.0, 6.0]), np.array([1.0, 2.0])).real.tolist()
    [[4.0, 5.0], [nan, nan]]
    """
    known, corner = on_whole_pixels(truth.object, truth.corner_yx_px)
    on_grid = np.full((len(y_px), len(x_px)), complex(np.nan, np.nan), np.complex64)
    rows, columns = (np.asarray(axis).astype(int) - start for axis, start in zip((y_px, x_px), corner, strict=True))
    good_rows, good_columns = ((at >= 0) & (at < n) for at, n in zip((rows, columns), known.shape, strict=True))
    on_grid[np.ix_(good_rows, good_columns)] = known[np.ix_(rows[good_rows], columns[good_columns])]
    return on_grid


def _on_common_area(
    results: Mapping[str, xr.Dataset], truth: Truth | None, min_weight: float
) -> tuple[dict[str, NDArray[np.complex64]], NDArray[np.complex64], NDArray[np.float64], NDArray[np.float64]]:
    """Objects by label, reference, and y and x of the common area.

    Objects and reference are NaN on the same pixels.
    """
    y, x = _common_pixels(results)
    objects = {label: truth_on_pixels(_well_lit_part(ds, min_weight), y, x) for label, ds in results.items()}
    reference = next(iter(objects.values())) if truth is None else truth_on_pixels(truth, y, x)
    seen = np.isfinite(reference) & np.all([np.isfinite(object_) for object_ in objects.values()], axis=0)
    if not seen.any():
        raise PtychodaskError("compare: no pixel is seen in all results and in the reference")
    box = seen_box(seen)
    if min(seen[box].shape) < LEAST_PIXELS:
        raise PtychodaskError(
            f"compare: the area seen in all results and in the reference is "
            f"{' x '.join(map(str, seen[box].shape))} pixels, expected {LEAST_PIXELS} or more along each side"
        )
    unseen = np.complex64(complex(np.nan, np.nan))
    objects = {label: np.where(seen, object_, unseen)[box] for label, object_ in objects.items()}
    return objects, np.where(seen, reference, unseen)[box], y[box[0]], x[box[1]]


def _common_pixels(results: Mapping[str, xr.Dataset]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates y and x, pixels, of the rectangle covered by all results."""
    axes = []
    for dim in ("y", "x"):
        low = max(float(ds[dim][0]) for ds in results.values())
        high = min(float(ds[dim][-1]) for ds in results.values())
        if low > high:
            raise PtychodaskError(
                f"compare: along {dim} one result begins at {low:g} px but another ends at {high:g} px; "
                "compare results of the same scan"
            )
        axes.append(np.arange(low, high + 1))
    return axes[0], axes[1]


def _metrics_of(
    objects: Mapping[str, NDArray[np.complexfloating[Any, Any]]],
    reference: NDArray[np.complexfloating[Any, Any]],
    peak: float | Literal["range", "ptychopinn"],
    pixel_size_m: float | None,
) -> xr.Dataset:
    """Metrics and ring correlations of objects aligned to the reference."""
    reference_parts = _parts(reference, reference)
    data_range = {
        "amplitude": _range(reference_parts["amplitude"], float(np.nanmax(reference_parts["amplitude"]))),
        "phase": _range(reference_parts["phase"], np.pi),
    }
    peaks = {part: _peak(peak, data_range[part]) for part in PARTS}
    pairs = [
        [
            PartPair(
                each[part], reference_parts[part], data_range[part], peaks[part], frc(each[part], reference_parts[part])
            )
            for part in PARTS
        ]
        for each in (_parts(object_, reference) for object_ in objects.values())
    ]
    values = np.array(
        [
            [[metric.value(part, pair) for metric in METRICS.values()] for part, pair in zip(PARTS, row, strict=True)]
            for row in pairs
        ]
    )
    is_crossing = np.array([metric.is_crossing for metric in METRICS.values()])
    frequency = pairs[0][0].ring_correlation[0]
    metrics = xr.Dataset(
        {
            "value": (("method", "part", "metric"), values),
            "frc": (
                ("method", "part", "frequency"),
                np.array([[pair.ring_correlation[1] for pair in row] for row in pairs]),
            ),
            "half_bit": ("frequency", half_bit(frequency)),
            "resolution_px": (("method", "part", "criterion"), 1 / values[..., is_crossing], {"units": "px"}),
            "data_range": ("part", list(data_range.values())),
            "peak": ("part", list(peaks.values())),
        },
        coords={
            "method": list(objects),
            "part": list(PARTS),
            "metric": list(METRICS),
            "criterion": np.array(list(METRICS))[is_crossing],
            "frequency": ("frequency", frequency, {"units": "1/px", "long_name": "spatial frequency"}),
        },
    )
    metrics["frc"] = metrics["frc"].where(metrics["data_range"] > 0)
    if pixel_size_m is not None:
        metrics["resolution_m"] = (metrics["resolution_px"] * pixel_size_m).assign_attrs(units="m")
    return metrics


def _parts(
    object_: NDArray[np.complexfloating[Any, Any]], reference: NDArray[np.complexfloating[Any, Any]]
) -> dict[str, NDArray[np.floating[Any]]]:
    """Amplitude, and phase within π of the reference's."""
    phase = np.angle(reference) + np.angle(object_ * np.conj(reference))
    return {"amplitude": np.abs(object_), "phase": phase}


def _range(values: NDArray[np.floating[Any]], size: float) -> float:
    """Maximum minus minimum; 0 if that is only rounding error."""
    span = float(np.nanmax(values) - np.nanmin(values))
    return span if span > 1e-6 * size else 0.0


def _peak(peak: float | Literal["range", "ptychopinn"], data_range: float) -> float:
    named = {"range": data_range, "ptychopinn": PTYCHOPINN_PEAK}
    if isinstance(peak, str) and peak in named:
        return named[peak]
    if not (isinstance(peak, int | float) and peak > 0):
        raise PtychodaskError(f"compare: peak is {peak!r}, expected a positive number or one of {', '.join(named)}")
    return float(peak)


def _with_gauges(metrics: xr.Dataset, gauges: list[Gauge], opened: Mapping[str, xr.Dataset]) -> xr.Dataset:
    shifts = [ds.attrs.get("shift_yx_px", [0.0, 0.0]) for ds in opened.values()]
    return metrics.assign(
        {
            "phase_rad": ("method", [gauge.phase_rad for gauge in gauges]),
            "ramp_rad_per_px": (("method", "axis"), [gauge.ramp_yx_rad_per_px for gauge in gauges]),
            "scale": ("method", [gauge.scale for gauge in gauges]),
            "shift_px": (("method", "axis"), shifts),
        }
    ).assign_coords(axis=["y", "x"])


def r_factors(
    results: Mapping[str, Result] | Sequence[Result], scan: Scan | str | Path, experiment: int | None = None
) -> dict[str, float]:
    """R-factor of each object over the measured patterns.

    Parameters
    ----------
    results : dict of label to result, or list of results
        As in `compare`, in scan coordinates.
    scan : Scan or path
    experiment : int, optional
        As in `patterns_inside`.

    Returns
    -------
    dict of label to float
        R = Σ|√I_pred − √I| / Σ√I over the patterns of `patterns_inside` (`r_factor`); NaN if there are none.

    Raises
    ------
    PtychodaskError
        If a result is not in scan coordinates.
    """
    measured = scan if isinstance(scan, Scan) else open_scan(scan)
    opened = {label: _in_memory(ds) for label, ds in align(results).items()}
    index = patterns_inside(opened, measured, experiment)
    if not len(index):
        logger.warning("compare: no pattern illuminates only pixels seen in all results, so there is no R")
        return dict.fromkeys(opened, float("nan"))
    return {label: r_factor(ds["object"].values, _corner(ds), measured, index) for label, ds in opened.items()}


def patterns_inside(results: Mapping[str, xr.Dataset], scan: Scan, experiment: int | None = None) -> NDArray[np.int64]:
    """Patterns that illuminate only the area seen in all results.

    Parameters
    ----------
    results : dict of label to Dataset
        In scan coordinates.
    scan : Scan
    experiment : int, optional
        Experiment of the results, in a scan of several; by default the one that they record.

    Returns
    -------
    int64 array (k,)
        Indices of patterns with at least `MIN_SEEN_LIGHT` of the probe intensity on seen pixels of every result.

    Raises
    ------
    PtychodaskError
        If a result is not in scan coordinates; if the scan has several experiments, and the results are of several or
        do not record theirs.
    """
    index = chosen_patterns(scan, experiment_of(results, scan, experiment, "compare"))
    inside = np.zeros(scan.n_patterns, bool)
    inside[index] = True
    for label, ds in results.items():
        if _frame(ds) != "scan":
            raise PtychodaskError(
                f"{label}: is not in scan coordinates, so R cannot be computed; pass truth= to register it"
            )
        seen = np.isfinite(ds["object"].values)
        inside &= seen_light(seen, np.asarray(_corner(ds), int), scan.probe, scan.position_yx_px) >= MIN_SEEN_LIGHT
    return np.flatnonzero(inside)


def _with_differences(comparison: xr.Dataset, baseline: str) -> xr.Dataset:
    comparison = comparison.assign(
        difference=comparison["value"] - comparison["value"].loc[baseline].drop_vars("method")
    )
    comparison.attrs["baseline"] = baseline
    return comparison
