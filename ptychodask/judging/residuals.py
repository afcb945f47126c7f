"""Residuals of measured patterns against those predicted from an object, and outliers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.cluster.broadcast import Broadcast
from ptychodask.cluster.executor import AnyClient, Executor, executor_for_run
from ptychodask.cluster.watch import Watch, wait_for
from ptychodask.errors import PtychodaskError
from ptychodask.forward import MIN_SEEN_LIGHT, footprint_corners, predicted_amplitude, r_ratio, r_sums, seen_light
from ptychodask.grouping import chosen_patterns
from ptychodask.progress import progress_bar
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph
from ptychodask.result import experiment_of, open_result, reading_result
from ptychodask.scan import Scan
from ptychodask.storage.location import parse_location
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)


PART_PIXELS = 2**22
"""Maximum detector pixels that one task reads."""


PARTS_AT_LEAST = 16
"""Minimum number of tasks of a scan, if it has as many patterns."""


OUTLIER_MAD = 8.0
"""Standard deviations above the median R beyond which a pattern is an outlier."""


MAD_TO_SIGMA = 1.4826
"""Ratio of standard deviation to median absolute deviation of a normal distribution."""


def residuals(
    result: xr.Dataset | str | Path,
    scan: Scan | str | Path,
    *,
    client: AnyClient | None = None,
    drop: Sequence[int] | NDArray[np.integer[Any]] = (),
    experiment: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Residuals of each measured pattern against the forward model of an object.

    Parameters
    ----------
    result : xarray.Dataset or path
        With ``object`` (y, x): from `reconstruct` or `reconstruct_iterative`, or the store of such a result.
    scan : Scan or path
        The measured scan: patterns, positions, probe, mask and flux.
    client : distributed.Client or Executor, optional
        Client to run on; by default the active one, else one in this process.
    drop : int array (k,), optional
        Patterns flagged as dropped and left out of the totals; their residuals are computed too.
    experiment : int, optional
        Experiment of the result, in a scan of several; by default the one that the result records.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    xarray.Dataset
        Along ``pattern``, those of the experiment in the order of the store:

        * ``r_factor`` float64, R = Σ|√I_pred − √I| / Σ√I over good pixels; infinite for a pattern without counts;
        * ``poisson_deviance`` float64, 2 Σ(I_pred − I + I log(I / I_pred)) / n over the n good pixels, about 1 if
          photon noise is the only difference and pixels have a few photons or more; NaN for a scan of amplitudes, whose
          photon number is unknown;
        * ``seen_light`` float64, fraction of the probe intensity on seen pixels of the object, with the position
          rounded down to whole pixels.

        If ``seen_light`` is below `MIN_SEEN_LIGHT` the first two are NaN, because the object does not determine that
        pattern. Coordinates ``pattern`` (index in the store), ``y_px``, ``x_px``, ``source_index`` if known, and
        ``dropped`` with `drop`. Attributes: totals over the patterns that have residuals and are not dropped
        (``r_factor`` is ΣΣ|√I_pred − √I| / ΣΣ√I, ``poisson_deviance`` the mean over patterns), and their number.

    Raises
    ------
    PtychodaskError
        If the result has no object (y, x) of consecutive pixels, cannot be read, or has no seen pixel; if a pattern to
        drop does not exist, or no pattern can have residuals; if the scan has several experiments and it is not known
        which one the result is of.

    Notes
    -----
    The forward model is that of `r_factor`; unseen pixels are set to the mean amplitude of the seen ones. A task reads
    consecutive patterns and the part of the object that they illuminate, so if both are on disk, neither scan nor
    object is ever completely in memory. Residuals do not depend on how the scan is cut into tasks.
    A lazy result that is not on disk (``compute=False``) is computed twice: compute or save it first. A result of other
    data, or of another probe than the scan has now, is accepted with a logged warning.
    """
    measured = scan if isinstance(scan, Scan) else open_scan(parse_location(scan).resolve())
    opened = result if isinstance(result, xr.Dataset) else open_result(parse_location(result).resolve())
    object_ = _object_of(opened)
    if opened.attrs.get("data_hash", measured.data_hash) != measured.data_hash:
        logger.warning(
            "the result was made from other data than %s, or with another probe", measured.store or "this scan"
        )
    kept = chosen_patterns(measured, experiment_of({"result": opened}, measured, experiment, "residuals"), drop)
    judged = _of_experiment(measured, kept)
    # Fields that the tasks do not need are not sent; a truth may be as large as the object.
    sent = replace(
        measured,
        truth=None,
        label=None,
        probe_initial=None,
        position_measured_yx_px=None,
        scan_index=None,
        source_index=None,
    )
    with executor_for_run(client) as executor, reading_result():
        mean = executor.compute([abs(object_).mean(dtype=np.float64).data])
        wait_for(executor, mean, Watch(executor, "residuals"))
        fill = float(executor.gather(mean)[0])
        if not np.isfinite(fill):
            raise PtychodaskError("residuals: the object has no seen pixel, so no pattern can be predicted")
        sums = _judge_all(executor, sent, judged, object_, fill, progress)
    return _as_dataset(measured, judged, sums, kept, flagged=len(drop) > 0)


def _of_experiment(scan: Scan, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of all patterns of the kept ones' experiment."""
    if scan.scan_index is None:
        return np.arange(scan.n_patterns)
    return np.flatnonzero(scan.scan_index == scan.scan_index[kept[0]])


def _object_of(ds: xr.Dataset) -> xr.DataArray:
    if "object" not in ds or ds["object"].dims != ("y", "x"):
        raise PtychodaskError("residuals: the result has no object (y, x); select one method, or pass a reconstruction")
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(
                f"residuals: coordinates of the object along {dim} are not consecutive, expected steps of 1"
            )
    return ds["object"]


def _judge_all(
    executor: Executor,
    scan: Scan,
    index: NDArray[np.int64],
    object_: xr.DataArray,
    fill: float,
    progress: bool | None,
) -> NDArray[np.float64]:
    """`judge_patterns` of some patterns, in their order."""
    parts = _parts(index, scan.n_pixels)
    pieces = [_illuminated_part(object_, scan.position_yx_px[part], scan.n_pixels) for part in parts]
    # All at once: a lazy result computes what several parts share once only.
    computed = dict(enumerate(executor.compute([illuminated.data for illuminated, _ in pieces])))
    done: dict[int, NDArray[np.float64]] = {}

    def record(index: int, sums: NDArray[np.float64]) -> None:
        done[index] = sums
        # The workers drop this part of the object.
        del computed[index]

    logger.info("%s: %d patterns in %d tasks", scan.store or "scan", len(index), len(parts))
    with executor.broadcast(scan) as sent, progress_bar("residuals", len(index), "patterns", progress) as bar:
        graph = TaskGraph(
            n_units=[len(part) for part in parts],
            chunk_task=lambda index: (_judge_sent, sent, parts[index], computed[index], pieces[index][1], fill),
            chunk_name=lambda index: f"judging patterns {parts[index][0]}..{parts[index][-1]}",
            command="residuals",
            remedy_lost="give workers more memory",
            remedy_ended="start again",
            fetch_results=True,
            # As the parts of the object are all on their way, so are the tasks that use them up.
            chunks_per_worker=len(parts),
        )
        Scheduler(executor, graph).complete(bar, on_chunk=record)
    return np.concatenate([done[index] for index in range(len(parts))])


def _parts(index: NDArray[np.int64], n_pixels: int) -> list[NDArray[np.int64]]:
    """Consecutive ones of some patterns, for each task."""
    size = max(1, min(PART_PIXELS // n_pixels**2, -(-len(index) // PARTS_AT_LEAST)))
    return [index[start : start + size] for start in range(0, len(index), size)]


def _illuminated_part(
    object_: xr.DataArray, position_yx_px: NDArray[np.float64], n_pixels: int
) -> tuple[xr.DataArray, tuple[int, int]]:
    """Part of an object under the probe footprints, and its corner."""
    corner = footprint_corners(position_yx_px, n_pixels)
    first = int(object_["y"][0]), int(object_["x"][0])
    low = np.clip(corner.min(axis=0) - first, 0, object_.shape).tolist()
    high = np.clip(corner.max(axis=0) + n_pixels - first, 0, object_.shape).tolist()
    illuminated = object_.isel(y=slice(low[0], high[0]), x=slice(low[1], high[1]))
    return illuminated, (first[0] + low[0], first[1] + low[1])


def _judge_sent(sent: Broadcast, *arguments: Any) -> NDArray[np.float64]:
    return judge_patterns(sent.open(), *arguments)


def judge_patterns(
    scan: Scan, part: NDArray[np.int64], object_: NDArray[np.complex64], corner: tuple[int, int], fill: float
) -> NDArray[np.float64]:
    """Compare some patterns with those predicted from an object.

    Parameters
    ----------
    scan : Scan
    part : int64 array (pattern,)
        Indices of the patterns.
    object_ : complex64 array (y, x)
        The object under all their probe footprints; NaN where unseen.
    corner : (int, int)
        Scan coordinates of its pixel [0, 0].
    fill : float
        Value of unseen pixels, and of all outside the object.

    Returns
    -------
    float64 array (pattern, 4)
        Σ|√I_pred − √I| and Σ√I over good pixels, Poisson deviance per good pixel, ``seen_light`` (see `residuals`).
    """
    corners = footprint_corners(scan.position_yx_px[part], scan.n_pixels)
    padded, start = _padded_to_footprints(object_, corner, corners, scan.n_pixels)
    seen = np.isfinite(padded)
    padded[~seen] = fill
    sums = np.empty((len(corners), 4))
    sums[:, 3] = seen_light(seen, start, scan.probe, scan.position_yx_px[part])
    for row, (pattern, amplitude) in enumerate(zip(part.tolist(), scan.amplitude(part), strict=True)):
        model = predicted_amplitude(padded, start, scan, pattern).astype(np.float64)
        deviance = poisson_deviance(model**2, amplitude.astype(np.float64) ** 2, scan.mask)
        sums[row, :3] = *r_sums(model - amplitude, amplitude), deviance
    if scan.domain != "counts":
        sums[:, 2] = np.nan
    return sums


def _padded_to_footprints(
    object_: NDArray[np.complex64], corner: tuple[int, int], corners: NDArray[np.int64], n_pixels: int
) -> tuple[NDArray[np.complex64], tuple[int, int]]:
    """Object padded with NaN to all probe footprints, and its corner."""
    low = corners.min(axis=0)
    start = int(low[0]), int(low[1])
    padded = np.full(corners.max(axis=0) + n_pixels - low, complex(np.nan, np.nan), np.complex64)
    if object_.size:
        top, left = corner[0] - start[0], corner[1] - start[1]
        padded[top : top + object_.shape[0], left : left + object_.shape[1]] = object_
    return padded, start


def poisson_deviance(
    predicted: NDArray[np.float64], counts: NDArray[np.float64], mask: NDArray[np.bool_] | None = None
) -> float:
    """Poisson deviance of counts from predicted ones, per good pixel.

    Parameters
    ----------
    predicted, counts : float64 array (N, N)
        Photons.
    mask : bool array (N, N), optional
        True where a pixel is good.

    Returns
    -------
    float
        2 Σ(predicted − counts + counts log(counts / predicted)) / n; 0 if both are equal.

    Notes
    -----
    P. McCullagh, J. A. Nelder, Generalized Linear Models (1989), §2.3. Predictions are at least the float32
    rounding error of the brightest pixel of the pattern: smaller values are not accurate, and their logarithm would
    dominate the sum.

    Examples
    --------
    >>> round(poisson_deviance(np.array([[4.0, 1.0]]), np.array([[4.0, 0.0]])), 6)
    1.0
    """
    good = np.ones(counts.shape, bool) if mask is None else mask
    counts = counts[good]
    floor = max(float(predicted.max()) * float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny))
    predicted = np.maximum(predicted[good], floor)
    logarithm = np.log(np.where(counts > 0, counts, predicted) / predicted)
    return 2 * float((predicted - counts + counts * logarithm).sum()) / counts.size


def _as_dataset(
    scan: Scan, index: NDArray[np.int64], sums: NDArray[np.float64], kept: NDArray[np.int64], *, flagged: bool
) -> xr.Dataset:
    misfit, amplitude, deviance, fraction = sums.T
    judged = fraction >= MIN_SEEN_LIGHT
    counted = judged & np.isin(index, kept)
    if not amplitude[counted].sum() > 0:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: no pattern that is not dropped has counts and {MIN_SEEN_LIGHT:.0%} of the probe "
            "intensity on seen pixels of the object; pass a result of this scan, and drop fewer"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        r_factor = np.where(judged, misfit / amplitude, np.nan)
    coords: dict[str, Any] = {
        "pattern": index,
        "y_px": ("pattern", scan.position_yx_px[index, 0], {"units": "pixel"}),
        "x_px": ("pattern", scan.position_yx_px[index, 1], {"units": "pixel"}),
    }
    if scan.source_index is not None:
        coords["source_index"] = ("pattern", scan.source_index[index])
    if flagged:
        coords["dropped"] = ("pattern", ~np.isin(index, kept))
    known = scan.domain == "counts"
    totals = {"r_factor": r_ratio(float(misfit[counted].sum()), float(amplitude[counted].sum()), "residuals")}
    if known:
        totals["poisson_deviance"] = float(deviance[counted].mean())
    note = {} if known else {"comment": "NaN: the store contains amplitudes, whose photon number is unknown"}
    return xr.Dataset(
        {
            "r_factor": ("pattern", r_factor, {"long_name": "R factor"}),
            "poisson_deviance": (
                "pattern",
                np.where(judged, deviance, np.nan),
                {"long_name": "Poisson deviance per good pixel", **note},
            ),
            "seen_light": ("pattern", fraction, {"long_name": "fraction of the probe intensity on seen pixels"}),
        },
        coords=coords,
        attrs={
            **totals,
            "n_counted": int(counted.sum()),
            "n_unseen": int((~judged).sum()),
            "min_seen_light": MIN_SEEN_LIGHT,
            "store": scan.store or "",
            "data_hash": scan.data_hash,
        },
    )


def outliers(residuals: xr.Dataset, *, n_mad: float = OUTLIER_MAD) -> NDArray[np.int64]:
    """Patterns whose R is far above the median, worst first.

    Parameters
    ----------
    residuals : xarray.Dataset
        From `residuals`.
    n_mad : float
        Threshold above the median of R, in units of 1.4826 median absolute deviations (the standard deviation if R is
        normally distributed).

    Returns
    -------
    int64 array (k,)
        Indices in the store, as for ``drop`` of `reconstruct`. Patterns without residuals or flagged as dropped are
        ignored.

    Raises
    ------
    PtychodaskError
        If `n_mad` is not positive.

    Notes
    -----
    Bad patterns damage the object around them and so raise the R of their neighbours: drop the worst, reconstruct,
    and check again. At the edge of a scan, where few patterns overlap, R is larger than inside even for good patterns.

    Examples
    --------
    >>> residuals = xr.Dataset({"r_factor": ("pattern", [0.1, 0.12, np.inf, 0.11, np.nan, 0.5])})
    >>> outliers(residuals).tolist()
    [2, 5]
    """
    if not n_mad > 0:
        raise PtychodaskError(f"outliers: n_mad is {n_mad}, expected a positive number")
    r_factor = residuals["r_factor"].values
    if "dropped" in residuals.coords:
        r_factor = np.where(residuals["dropped"].values, np.nan, r_factor)
    middle = np.nanmedian(r_factor)
    spread = MAD_TO_SIGMA * np.nanmedian(np.abs(r_factor - middle))
    far = np.flatnonzero(r_factor > middle + n_mad * spread)
    return stored_indices(residuals)[far[np.argsort(-r_factor[far], kind="stable")]]


def stored_indices(residuals: xr.Dataset) -> NDArray[np.int64]:
    """Index in the store of each pattern that has residuals, int64 (pattern,).

    They are not consecutive from 0 for one experiment of several.
    """
    return np.asarray(residuals["pattern"].values, np.int64)
