"""Judges: patterns that decide whether a refinement is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from ptychodask.grouping import curve_order
from ptychodask.refinement.kernels import ExitWaves, model_amplitude
from ptychodask.scan import Scan

JUDGE_EVERY = 16
"""Patterns along the curve for each judge."""

LEAST_JUDGED = 64
"""Patterns of an experiment below which it has no judges."""

LEAST_FALL = 1e-4
"""Relative fall of the judges' misfit that a step must exceed to be kept."""

LEAST_COUNTS = 1e-3
"""Least model counts in the Poisson deviance."""


def curve_rank(scan: Scan, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranks of some patterns along the curve, within each experiment.

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        Patterns that are ranked among each other; for halves of a scan, those of one half.

    Returns
    -------
    int64 array (k,)
        From 0 in each experiment.
    """
    rank = np.empty(len(index), np.int64)
    experiment = np.zeros(len(index), np.int64) if scan.scan_index is None else scan.scan_index[index]
    for one in np.unique(experiment):
        members = np.flatnonzero(experiment == one)
        rank[members[curve_order(scan.position_yx_px[index[members]])]] = np.arange(len(members))
    return rank


def is_judge(scan: Scan, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for patterns that judge a refinement and take no part.

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        See `curve_rank`.

    Returns
    -------
    bool array (k,)
        One pattern in `JUDGE_EVERY`; none in an experiment of fewer than `LEAST_JUDGED`.
    """
    judge = curve_rank(scan, index) % JUDGE_EVERY == JUDGE_EVERY // 2
    if scan.scan_index is None:
        return judge & (len(index) >= LEAST_JUDGED)
    _, experiment, n_patterns = np.unique(scan.scan_index[index], return_inverse=True, return_counts=True)
    return judge & (n_patterns[experiment] >= LEAST_JUDGED)


def judge_index(scan: Scan, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Patterns that judge a refinement (see `is_judge`).

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        See `curve_rank`.

    Returns
    -------
    int64 array
        Those of `index`, in its order.
    """
    return index[is_judge(scan, index)]


@dataclass(frozen=True)
class Judgement:
    """Agreement of an object with its judges, summed over good pixels."""

    misfit: float = 0.0
    """Poisson deviance 2(n ln(n/μ) − n + μ) for counts, μ at `LEAST_COUNTS` or more; (√n − M)² for amplitudes."""

    absolute: float = 0.0
    """Σ|M − √n|."""

    amplitude: float = 0.0
    """Σ√n."""

    @property
    def r_factor(self) -> float | None:
        """R = Σ|M − √n| / Σ√n; None without light."""
        return self.absolute / self.amplitude if self.amplitude > 0 else None

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(self.misfit + other.misfit, self.absolute + other.absolute, self.amplitude + other.amplitude)


def judge(object_: NDArray[np.complex64], corner: tuple[int, int], scan: Scan, index: NDArray[np.int64]) -> Judgement:
    """Agreement of an object with the patterns that judge it.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Holds the whole frame at each of these positions; NaN counts as 0, a pixel that transmits nothing.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    scan : Scan
    index : int64 array (k,)
        Patterns; some of them are in memory at a time.
    """
    total = Judgement()
    waves = ExitWaves(np.where(np.isfinite(object_), object_, np.complex64(0)), corner, scan, index)
    good = slice(None) if scan.mask is None else scan.mask
    for rows, measured in waves.batches():
        model = np.empty_like(measured)
        model_amplitude(waves.far_fields(waves.of(rows, waves.shifted_probes(rows))), model)
        model *= waves.root_flux[rows, None, None]
        for one, other in zip(measured, model, strict=True):
            total += _judgement(scan.domain, one[good].astype(np.float64), other[good].astype(np.float64))
    return total


def _judgement(domain: str, measured: NDArray[np.float64], model: NDArray[np.float64]) -> Judgement:
    """Agreement of amplitudes with those of a model."""
    difference = model - measured
    if domain == "amplitude":
        misfit = (difference**2).sum()
    else:
        counts, expected = measured**2, np.maximum(model**2, LEAST_COUNTS)
        misfit = 2 * (xlogy(counts, counts / expected) - counts + expected).sum()
    return Judgement(float(misfit), float(np.abs(difference).sum()), float(measured.sum()))


def is_better(before: float, after: float) -> bool:
    """True if a misfit fell by more than `LEAST_FALL` of itself.

    Examples
    --------
    >>> is_better(100.0, 99.0), is_better(100.0, 99.995), is_better(100.0, float("nan"))
    (True, False, False)
    """
    return after < before * (1 - LEAST_FALL)
