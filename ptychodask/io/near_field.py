"""Detection of near-field patterns, which are shadows of the sample.

They are recognised from the patterns, since no format records it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import nearest_neighbour
from ptychodask.scan import Domain

PAIRS = 64
"""Number of pairs of neighbouring patterns that are compared."""

FEWEST_PAIRS = 12
"""Smallest number of pairs; with fewer, no pattern is taken for a shadow."""

LIT = 0.02
"""Fraction of the intensity of the brightest pixels of the mean pattern from which on a pixel counts as illuminated."""

LEAST_SHIFT_PX = 2.0
"""Smallest detectable shift of a shadow for a step of median length, pixels."""

CERTAIN = 10.0
"""Smallest excess of the correlation at the shift over that at the opposite shift, in standard errors."""

LEAST_AGREEMENT = 0.1
"""Smallest excess of the correlation at the shift over that at the opposite shift."""

TOO_WIDE = 3.0
"""Width of the sample in a pattern from which on it is refused, relative to the N object pixels of a far-field one."""


class Readable(Protocol):
    """Patterns (pattern, n, n) that can be read in any order."""

    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Shadow:
    """Shadow of the sample in the patterns."""

    slope: float
    """Shift of the shadow in pattern pixels per object pixel of probe motion."""

    width_px: float
    """Width of the sample that a pattern covers, object pixels."""


def shadow_of(patterns: Readable, position_yx_px: NDArray[np.float64], domain: Domain) -> Shadow | None:
    """Shadow of the sample that moves with the probe; None if undetected.

    Parameters
    ----------
    patterns : array (pattern, n, n)
        Patterns with the direct beam in the middle; a few dozen pairs are read.
    position_yx_px : float64 array (pattern, 2)
        Positions in object pixels.
    domain : {"counts", "amplitude"}
        Unit of the patterns.

    Notes
    -----
    A beam that diverges from a point at distance d before the sample casts a shadow on a detector at distance z behind
    it that is (d + z)/d times larger (Fresnel scaling theorem: D. Paganin, Coherent X-Ray Optics, Oxford 2006). If
    the probe moves by r, the shadow moves by that factor times r. Neighbouring patterns, each divided by the mean, are
    correlated, and the correlation at the shift of a shadow of a given slope and orientation is compared to that at the
    opposite shift, where far-field patterns correlate equally. An illuminated disc of D pixels covers D/slope of the
    sample.
    """
    seeds, neighbours = _pairs(position_yx_px)
    if len(seeds) < FEWEST_PAIRS:
        return None
    read = np.unique(np.concatenate([seeds, neighbours]))
    mean = np.sqrt(sum(np.square(_amplitude(patterns, row, domain)) for row in read) / len(read))
    brightest = np.partition((mean**2).ravel(), -max(10, mean.size // 100))[-max(10, mean.size // 100)]
    lit = mean**2 > LIT * brightest
    diameter_px = 2 * np.sqrt(lit.sum() / np.pi)
    if diameter_px < 4 * LEAST_SHIFT_PX:
        return None
    moved_px = position_yx_px[seeds] - position_yx_px[neighbours]
    candidates = _Candidates.of(moved_px, diameter_px, mean.shape[0])
    for pair, rows in enumerate(zip(seeds, neighbours, strict=True)):
        # One pair at a time, so that only a few patterns are in memory.
        one, other = (np.fft.fft2(_contrast(_amplitude(patterns, row, domain), mean, lit)) for row in rows)
        candidates.add(pair, np.fft.ifft2(one * other.conj()).real)
    slope = candidates.slope()
    return None if slope is None else Shadow(slope, diameter_px / slope)


def _amplitude(patterns: Readable, row: int, domain: Domain) -> NDArray[np.float64]:
    """One pattern as amplitudes (n, n); 0 where negative or non-finite."""
    values = np.nan_to_num(np.asarray(patterns[np.array([row])], np.float64)[0], nan=0.0, posinf=0.0, neginf=0.0)
    return np.sqrt(np.maximum(values, 0)) if domain == "counts" else np.abs(values)


def _pairs(position_yx_px: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patterns spread over the scan, and the nearest neighbour of each.

    Patterns whose nearest neighbour has the same position are left out.
    """
    distance, index = nearest_neighbour(position_yx_px)
    apart = np.flatnonzero(distance > 0)
    seeds = (
        apart[np.unique(np.linspace(0, len(apart) - 1, min(PAIRS, len(apart))).astype(int))] if len(apart) else apart
    )
    return seeds, index[seeds]


def _contrast(amplitude: NDArray[np.float64], mean: NDArray[np.float64], lit: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Pattern over the mean on lit pixels, with mean 0, norm 1."""
    ratio = np.where(lit, amplitude / np.where(lit, mean, 1), 0)
    ratio = np.where(lit, ratio - ratio[lit].mean(), 0)
    contrast: NDArray[np.float64] = ratio / max(float(np.linalg.norm(ratio)), 1e-300)
    return contrast


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Candidate motions of a shadow: eight orientations, and a range of slopes."""

    shift: NDArray[np.int64]
    """Shift of each pair's shadow in each candidate (candidate, pair, 2), pixels."""

    slopes: NDArray[np.float64]
    """Slope of each candidate."""

    excess: NDArray[np.float64]
    """Correlation at the shift minus that at the opposite shift (candidate, pair); NaN outside the pattern."""

    @classmethod
    def of(cls, moved_px: NDArray[np.float64], diameter_px: float, n_pixels: int) -> _Candidates:
        step_px = float(np.median(np.hypot(*moved_px.T)))
        shifts_px = np.arange(LEAST_SHIFT_PX, diameter_px / 2, max(0.5, diameter_px / 200))
        orientations = product((False, True), (1, -1), (1, -1))
        steps = [(moved_px[:, ::-1] if swapped else moved_px) * (y, x) / step_px for swapped, y, x in orientations]
        shift = np.rint(np.concatenate([shifts_px[:, None, None] * step for step in steps])).astype(np.int64)
        outside = np.abs(shift).max(axis=2) >= n_pixels // 2
        return cls(shift, np.tile(shifts_px / step_px, len(steps)), np.where(outside, np.nan, 0.0))

    def add(self, pair: int, correlation: NDArray[np.float64]) -> None:
        """Record the correlation (n, n) of a pair."""
        inside = np.flatnonzero(np.isfinite(self.excess[:, pair]))
        y, x = self.shift[inside, pair].T
        self.excess[inside, pair] = correlation[y, x] - correlation[-y, -x]

    def slope(self) -> float | None:
        """Slope of the most significant candidate; None if none is significant."""
        enough = np.isfinite(self.excess).sum(axis=1) >= FEWEST_PAIRS
        excess, slopes = self.excess[enough], self.slopes[enough]
        if not len(excess):
            return None
        mean = np.nanmean(excess, axis=1)
        certainty = mean / np.maximum(np.nanstd(excess, axis=1) / np.sqrt(np.isfinite(excess).sum(axis=1)), 1e-12)
        certainty[mean <= LEAST_AGREEMENT] = 0
        best = int(certainty.argmax())
        return float(slopes[best]) if certainty[best] > CERTAIN else None


def near_field(patterns: Readable, position_yx_px: NDArray[np.float64], n_pixels: int, domain: Domain) -> str | None:
    """Reason for taking patterns for near-field ones; None for far-field patterns."""
    shadow = shadow_of(patterns, position_yx_px, domain)
    if shadow is None or shadow.width_px <= TOO_WIDE * n_pixels:
        return None
    return (
        f"the patterns are shadows of the sample (near field): they move by {shadow.slope:.2g} px when the probe moves "
        f"by one object pixel, so each covers {shadow.width_px:.0f} object pixels, expected {n_pixels} in the far field"
    )


def check_far_field(
    patterns: Readable, position_yx_px: NDArray[np.float64], n_pixels: int, domain: Domain, label: str
) -> None:
    """Raise `PtychodaskError` if patterns are near-field ones, which no model supports."""
    reason = near_field(patterns, position_yx_px, n_pixels, domain)
    if reason is not None:
        raise PtychodaskError(
            f"{label}: {reason}; use a program for near-field ptychography, or correct units and pixel size if they "
            "are wrong; far_field=True (--far-field) skips this check"
        )
