"""How far each measured pattern is from the one that a reconstructed object makes: which patterns are wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.cluster import Broadcast, broadcast, client_for_run
from ptychodask.iterative import footprint_corners, patterns_without, predicted_amplitude
from ptychodask.places import parse_location
from ptychodask.progress import progress_bar
from ptychodask.result import open_result, reading_result
from ptychodask.scan import PtychodaskError, Scan
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)

MIN_SEEN_LIGHT = 0.99
"""Share of the probe's light that must fall on seen pixels of the object for a pattern to be judged."""

PART_PIXELS = 2**22
"""Pixels of patterns that one task reads, at the most."""

PARTS_AT_LEAST = 16
"""Tasks that a scan is cut into where it has as many patterns."""

OUTLIER_MAD = 8.0
"""Deviations above the median from which a pattern's R stands out."""

MAD_TO_SIGMA = 1.4826
"""Standard deviation of normally spread values in units of their median absolute deviation."""


def residuals(
    result: xr.Dataset | str | Path,
    scan: Scan | str | Path,
    *,
    client: distributed.Client | None = None,
    drop: Sequence[int] | NDArray[np.integer[Any]] = (),
    progress: bool | None = None,
) -> xr.Dataset:
    """Push a reconstructed object through the forward model, against each measured pattern.

    Parameters
    ----------
    result : xarray.Dataset or path
        With ``object`` (y, x): from `reconstruct` or `reconstruct_iterative`, or a store that holds such.
    scan : Scan or path
        The measured scan: patterns, positions, probe, mask and flux.
    client : distributed.Client, optional
        Where to run; by default the active client, else one in this process.
    drop : int array (k,), optional
        Patterns of the store that are flagged as dropped and left out of the totals; they are judged all the same.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    xarray.Dataset
        Along ``pattern``, in the order of the store:

        * ``r_factor`` float64, R = Σ|√I_pred − √I| / Σ√I over good pixels; infinite for a pattern without light;
        * ``poisson_deviance`` float64, 2 Σ(I_pred − I + I log(I / I_pred)) / n over the n good pixels, about 1 where
          photon noise is all that differs and pixels have a few photons or more; NaN for a scan of amplitudes, whose
          photon number is unknown;
        * ``seen_light`` float64, share of the probe's light, the probe on the whole pixel at or before the position,
          that falls on seen pixels of the object.

        Where ``seen_light`` is below `MIN_SEEN_LIGHT` the first two are NaN: the object does not tell that pattern.
        Coordinates ``pattern`` (place in the store), ``y_px``, ``x_px``, ``source_index`` where known, and ``dropped``
        with `drop`. Attributes: totals over the patterns that were judged and not dropped (``r_factor`` is
        ΣΣ|√I_pred − √I| / ΣΣ√I, ``poisson_deviance`` the mean over patterns), and how many those are.

    Raises
    ------
    PtychodaskError
        If the result has no object (y, x) of consecutive pixels, cannot be read, no pixel of it is seen, a pattern to
        drop does not exist, or no pattern can be judged.

    Notes
    -----
    The forward model is that of `r_factor`, pixels that were not seen counting as the mean amplitude of those that
    were. A task reads consecutive patterns and the part of the object that they meet, so neither scan nor object is
    ever whole in memory when both lie on disk. A pattern's residual does not depend on how the scan is cut.
    A lazy result that lies on no disk (``compute=False``) is predicted twice: compute it, or write it, first. A result
    of other data, or made with another probe than the scan has now, is judged all the same, and a warning logged.
    """
    measured = scan if isinstance(scan, Scan) else open_scan(parse_location(scan).resolve())
    opened = result if isinstance(result, xr.Dataset) else open_result(parse_location(result).resolve())
    object_ = _object_of(opened)
    if opened.attrs.get("data_hash", measured.data_hash) != measured.data_hash:
        logger.warning(
            "the result was made of other data than %s, or with another probe", measured.store or "this scan"
        )
    kept = patterns_without(measured, drop)
    # Tasks need none of what else a scan knows; a truth may be as large as the object.
    sent = replace(measured, truth=None, label=None, probe_initial=None, scan_index=None, source_index=None)
    with client_for_run(client) as used, used.as_current(), reading_result():
        fill = float(abs(object_).mean(dtype=np.float64))
        if not np.isfinite(fill):
            raise PtychodaskError("residuals: no pixel of the object is seen, so nothing can be predicted from it")
        sums = _run(used, sent, object_, fill, progress)
    return _as_dataset(measured, sums, kept, flagged=len(drop) > 0)


def _object_of(ds: xr.Dataset) -> xr.DataArray:
    if "object" not in ds or ds["object"].dims != ("y", "x"):
        raise PtychodaskError("residuals: the result has no object (y, x); select one method of it, or reconstruct it")
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(
                f"residuals: the object's pixels along {dim} are not consecutive, expected steps of 1"
            )
    return ds["object"]


def _run(
    client: distributed.Client, scan: Scan, object_: xr.DataArray, fill: float, progress: bool | None
) -> NDArray[np.float64]:
    """What `judge_patterns` gives for all patterns, in their order."""
    with broadcast(client, scan) as sent:
        return _judge_all(client, scan, sent, object_, fill, progress)


def _judge_all(
    client: distributed.Client, scan: Scan, sent: Broadcast, object_: xr.DataArray, fill: float, progress: bool | None
) -> NDArray[np.float64]:
    tasks = []
    for part in _parts(scan):
        cut, corner = _object_under(object_, scan.position_yx_px[part], scan.n_pixels)
        tasks.append(dask.delayed(_judge_sent, pure=False)(sent, part, cut.data, corner, fill))
    # The graph of a lazy object is left as it was built: optimisation would drop the resources that its tasks ask for.
    futures = client.compute(tasks, optimize_graph=False)
    found: dict[distributed.Future, NDArray[np.float64]] = {}
    logger.info("%s: %d patterns in %d tasks", scan.store or "scan", scan.n_patterns, len(futures))
    try:
        with progress_bar("residuals", scan.n_patterns, "patterns", progress) as bar:
            for future, sums in distributed.as_completed(futures, with_results=True, loop=client.loop):
                found[future] = sums
                bar.advance(len(sums))
    finally:
        client.cancel(futures)
    return np.concatenate([found[future] for future in futures])


def _parts(scan: Scan) -> list[slice]:
    """Consecutive patterns, one slice for each task."""
    n_patterns = scan.n_patterns
    size = max(1, min(PART_PIXELS // scan.n_pixels**2, -(-n_patterns // PARTS_AT_LEAST)))
    return [slice(start, min(start + size, n_patterns)) for start in range(0, n_patterns, size)]


def _object_under(
    object_: xr.DataArray, position_yx_px: NDArray[np.float64], n_pixels: int
) -> tuple[xr.DataArray, tuple[int, int]]:
    """The part of an object that frames at some positions meet, and the coordinates of its first pixel."""
    corner = footprint_corners(position_yx_px, n_pixels)
    first = int(object_["y"][0]), int(object_["x"][0])
    low = np.clip(corner.min(axis=0) - first, 0, object_.shape).tolist()
    high = np.clip(corner.max(axis=0) + n_pixels - first, 0, object_.shape).tolist()
    cut = object_.isel(y=slice(low[0], high[0]), x=slice(low[1], high[1]))
    return cut, (first[0] + low[0], first[1] + low[1])


def _judge_sent(sent: Broadcast, *arguments: Any) -> NDArray[np.float64]:
    return judge_patterns(sent.open(), *arguments)


def judge_patterns(
    scan: Scan, part: slice, object_: NDArray[np.complex64], corner: tuple[int, int], fill: float
) -> NDArray[np.float64]:
    """Compare consecutive patterns with those that an object makes.

    Parameters
    ----------
    scan : Scan
    part : slice
        Which patterns.
    object_ : complex64 array (y, x)
        All of the object that their frames meet; NaN where unseen.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    fill : float
        What unseen pixels, and all beyond the edges, count as.

    Returns
    -------
    float64 array (pattern, 4)
        Σ|√I_pred − √I| and Σ√I over good pixels, Poisson deviance for each good pixel, seen light (see `residuals`).
    """
    corners = footprint_corners(scan.position_yx_px[part], scan.n_pixels)
    whole, start = _around_frames(object_, corner, corners, scan.n_pixels)
    seen = np.isfinite(whole)
    whole[~seen] = fill
    light = (np.abs(scan.probe) ** 2).sum(axis=0, dtype=np.float64)
    light /= light.sum()
    found = np.empty((len(corners), 4))
    for row, (frame_corner, amplitude) in enumerate(zip(corners, scan.amplitude(part), strict=True)):
        model = predicted_amplitude(whole, start, scan, part.start + row).astype(np.float64)
        frame = tuple(slice(side, side + scan.n_pixels) for side in frame_corner - start)
        found[row] = (
            np.abs(model - amplitude).sum(),
            amplitude.sum(dtype=np.float64),
            poisson_deviance(model**2, amplitude.astype(np.float64) ** 2, scan.mask),
            light[seen[frame]].sum(),
        )
    if scan.domain != "counts":
        found[:, 2] = np.nan
    return found


def _around_frames(
    object_: NDArray[np.complex64], corner: tuple[int, int], corners: NDArray[np.int64], n_pixels: int
) -> tuple[NDArray[np.complex64], tuple[int, int]]:
    """The object on the box around all frames, NaN where it does not reach, and the coordinates of the first pixel."""
    low = corners.min(axis=0)
    start = int(low[0]), int(low[1])
    whole = np.full(corners.max(axis=0) + n_pixels - low, complex(np.nan, np.nan), np.complex64)
    if object_.size:
        top, left = corner[0] - start[0], corner[1] - start[1]
        whole[top : top + object_.shape[0], left : left + object_.shape[1]] = object_
    return whole, start


def poisson_deviance(
    predicted: NDArray[np.float64], counts: NDArray[np.float64], mask: NDArray[np.bool_] | None = None
) -> float:
    """Deviance of counts from what was predicted, for each good pixel.

    Parameters
    ----------
    predicted, counts : float64 array (N, N)
        Photons.
    mask : bool array (N, N), optional
        True where a pixel is good.

    Returns
    -------
    float
        2 Σ(predicted − counts + counts log(counts / predicted)) / n; 0 where both are equal.

    Notes
    -----
    P. McCullagh, J. A. Nelder, Generalized Linear Models (1989), §2.3. A prediction below the float32 rounding of the
    pattern's brightest pixel counts as that: less is not known of it, and its logarithm would rule the sum.

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


def _as_dataset(scan: Scan, sums: NDArray[np.float64], kept: NDArray[np.int64], *, flagged: bool) -> xr.Dataset:
    misfit, amplitude, deviance, seen_light = sums.T
    judged = seen_light >= MIN_SEEN_LIGHT
    counted = judged.copy()
    counted[np.setdiff1d(np.arange(scan.n_patterns), kept)] = False
    if not amplitude[counted].sum() > 0:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: no pattern that counts has light, {MIN_SEEN_LIGHT:.0%} of it on seen pixels of "
            "the object; pass a result of this scan, and drop fewer"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        r_factor = np.where(judged, misfit / amplitude, np.nan)
    coords: dict[str, Any] = {
        "pattern": np.arange(scan.n_patterns),
        "y_px": ("pattern", scan.position_yx_px[:, 0], {"units": "pixel"}),
        "x_px": ("pattern", scan.position_yx_px[:, 1], {"units": "pixel"}),
    }
    if scan.source_index is not None:
        coords["source_index"] = ("pattern", scan.source_index)
    if flagged:
        coords["dropped"] = ("pattern", ~np.isin(np.arange(scan.n_patterns), kept))
    known = scan.domain == "counts"
    totals = {"r_factor": float(misfit[counted].sum() / amplitude[counted].sum())}
    if known:
        totals["poisson_deviance"] = float(deviance[counted].mean())
    note = {} if known else {"comment": "NaN: the store holds amplitudes, whose photon number is unknown"}
    return xr.Dataset(
        {
            "r_factor": ("pattern", r_factor, {"long_name": "R factor"}),
            "poisson_deviance": (
                "pattern",
                np.where(judged, deviance, np.nan),
                {"long_name": "Poisson deviance for each good pixel", **note},
            ),
            "seen_light": ("pattern", seen_light, {"long_name": "share of the light on seen pixels"}),
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


def outliers(found: xr.Dataset, *, n_mad: float = OUTLIER_MAD) -> NDArray[np.int64]:
    """Patterns whose R is far above that of most others, worst first.

    Parameters
    ----------
    found : xarray.Dataset
        From `residuals`.
    n_mad : float
        How far: more than the median of R by so many times 1.4826 median absolute deviations, which is the standard
        deviation where R is normally spread.

    Returns
    -------
    int64 array (k,)
        Places in the store, as ``drop`` of `reconstruct` takes them. Patterns that were not judged or are flagged as
        dropped neither count nor are named.

    Raises
    ------
    PtychodaskError
        If `n_mad` is not positive.

    Notes
    -----
    Bad patterns spoil the object where they lie, and with it the R of their neighbours: drop the worst, reconstruct,
    and look again. At the rim of a scan, where few patterns overlap, R is larger than inside with nothing wrong.

    Examples
    --------
    >>> found = xr.Dataset({"r_factor": ("pattern", [0.1, 0.12, np.inf, 0.11, np.nan, 0.5])})
    >>> outliers(found).tolist()
    [2, 5]
    """
    if not n_mad > 0:
        raise PtychodaskError(f"outliers: n_mad is {n_mad}, expected a positive number")
    r_factor = found["r_factor"].values
    if "dropped" in found.coords:
        r_factor = np.where(found["dropped"].values, np.nan, r_factor)
    middle = np.nanmedian(r_factor)
    spread = MAD_TO_SIGMA * np.nanmedian(np.abs(r_factor - middle))
    far = np.flatnonzero(r_factor > middle + n_mad * spread)
    return far[np.argsort(-r_factor[far], kind="stable")]
