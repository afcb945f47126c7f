"""Patterns that are shadows of the sample: recognised in what they show, since no file says so."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import nearest_neighbour
from ptychodask.scan import Domain, PtychodaskError

PAIRS = 64
"""Pairs of neighbouring patterns that are compared."""

FEWEST_PAIRS = 12
"""Below, nothing is said."""

LIT = 0.02
"""Share of the brightest pixels of the mean pattern from which on a pixel counts as lit."""

LEAST_SHIFT_PX = 2.0
"""Shift of a shadow over the median step that is told from none."""

CERTAIN = 10.0
"""Standard errors that the agreement of shifted shadows must exceed that of shadows shifted the other way."""

LEAST_AGREEMENT = 0.1
"""By how much their correlation must be larger."""

TOO_WIDE = 3.0
"""Width of what a pattern shows over the width that a far-field pattern can hold, N object pixels, that is refused."""


class Readable(Protocol):
    """Patterns (pattern, n, n) that can be read in any order."""

    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Shadow:
    """How patterns follow the sample."""

    slope: float
    """Pixels of a pattern that its shadow moves by, over object pixels that the probe moves by."""

    width_px: float
    """Width of the sample that a pattern shows, object pixels."""


def shadow_of(patterns: Readable, position_yx_px: NDArray[np.float64], domain: Domain) -> Shadow | None:
    """How a shadow of the sample moves through the patterns as the probe moves; None where none is seen to.

    Parameters
    ----------
    patterns : array (pattern, n, n)
        The direct beam in the middle; a few dozen pairs are read.
    position_yx_px : float64 array (pattern, 2)
        Object pixels.
    domain : {"counts", "amplitude"}

    Notes
    -----
    A beam that diverges from a point at distance d before the sample throws a shadow on a detector at distance z behind
    it that is (d + z)/d times larger (Fresnel scaling theorem: D. Paganin, Coherent X-Ray Optics, Oxford 2006). Where
    the probe moves by r, the shadow moves by that many times r. Neighbouring patterns, each divided by the mean, are
    correlated, and the correlation is read where a shadow of a given slope and orientation would be, and on the other
    side of zero, where a far-field pattern correlates as well. A lit disc of D pixels shows D/slope of the sample.
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
    ways = _Ways.of(moved_px, diameter_px, mean.shape[0])
    for pair, rows in enumerate(zip(seeds, neighbours, strict=True)):
        # One pair at a time, so that memory holds a few patterns of any size.
        one, other = (np.fft.fft2(_contrast(_amplitude(patterns, row, domain), mean, lit)) for row in rows)
        ways.look(pair, np.fft.ifft2(one * other.conj()).real)
    slope = ways.slope()
    return None if slope is None else Shadow(slope, diameter_px / slope)


def _amplitude(patterns: Readable, row: int, domain: Domain) -> NDArray[np.float64]:
    """One pattern as amplitudes (n, n); what is negative or not finite counts as 0."""
    values = np.nan_to_num(np.asarray(patterns[np.array([row])], np.float64)[0], nan=0.0, posinf=0.0, neginf=0.0)
    return np.sqrt(np.maximum(values, 0)) if domain == "counts" else np.abs(values)


def _pairs(position_yx_px: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patterns spread over the scan, and the nearest neighbour of each that is not at the same place."""
    distance, index = nearest_neighbour(position_yx_px)
    apart = np.flatnonzero(distance > 0)
    seeds = (
        apart[np.unique(np.linspace(0, len(apart) - 1, min(PAIRS, len(apart))).astype(int))] if len(apart) else apart
    )
    return seeds, index[seeds]


def _contrast(amplitude: NDArray[np.float64], mean: NDArray[np.float64], lit: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A pattern over the mean where that is lit, of mean 0 and norm 1."""
    ratio = np.where(lit, amplitude / np.where(lit, mean, 1), 0)
    ratio = np.where(lit, ratio - ratio[lit].mean(), 0)
    contrast: NDArray[np.float64] = ratio / max(float(np.linalg.norm(ratio)), 1e-300)
    return contrast


@dataclass(frozen=True, eq=False)
class _Ways:
    """All ways that a shadow may move: eight orientations, and how far over the median step."""

    shift: NDArray[np.int64]
    """Of each pair's shadow in each way (way, pair, 2), pixels."""

    slopes: NDArray[np.float64]
    """Slope of each way."""

    more: NDArray[np.float64]
    """By how much the correlation there exceeds that on the other side of zero (way, pair); NaN outside the pattern."""

    @classmethod
    def of(cls, moved_px: NDArray[np.float64], diameter_px: float, n_pixels: int) -> _Ways:
        step_px = float(np.median(np.hypot(*moved_px.T)))
        shifts_px = np.arange(LEAST_SHIFT_PX, diameter_px / 2, max(0.5, diameter_px / 200))
        turns = product((False, True), (1, -1), (1, -1))
        turned = [(moved_px[:, ::-1] if swapped else moved_px) * (y, x) / step_px for swapped, y, x in turns]
        shift = np.rint(np.concatenate([shifts_px[:, None, None] * one for one in turned])).astype(np.int64)
        outside = np.abs(shift).max(axis=2) >= n_pixels // 2
        return cls(shift, np.tile(shifts_px / step_px, len(turned)), np.where(outside, np.nan, 0.0))

    def look(self, pair: int, correlation: NDArray[np.float64]) -> None:
        """Take the correlation (n, n) of a pair."""
        inside = np.flatnonzero(np.isfinite(self.more[:, pair]))
        y, x = self.shift[inside, pair].T
        self.more[inside, pair] = correlation[y, x] - correlation[-y, -x]

    def slope(self) -> float | None:
        """That of the way in which pairs agree best; None where none is certain."""
        enough = np.isfinite(self.more).sum(axis=1) >= FEWEST_PAIRS
        more, slopes = self.more[enough], self.slopes[enough]
        if not len(more):
            return None
        mean = np.nanmean(more, axis=1)
        certainty = mean / np.maximum(np.nanstd(more, axis=1) / np.sqrt(np.isfinite(more).sum(axis=1)), 1e-12)
        certainty[mean <= LEAST_AGREEMENT] = 0
        best = int(certainty.argmax())
        return float(slopes[best]) if certainty[best] > CERTAIN else None


def near_field(patterns: Readable, position_yx_px: NDArray[np.float64], n_pixels: int, domain: Domain) -> str | None:
    """Why patterns are taken for those of the near field; None where they are not."""
    shadow = shadow_of(patterns, position_yx_px, domain)
    if shadow is None or shadow.width_px <= TOO_WIDE * n_pixels:
        return None
    return (
        f"the patterns are shadows of the sample (near field): they move by {shadow.slope:.2g} px for each object "
        f"pixel that the probe moves, so that each shows {shadow.width_px:.0f} object pixels, where a far-field "
        f"pattern of {n_pixels} holds {n_pixels}"
    )


def check_far_field(
    patterns: Readable, position_yx_px: NDArray[np.float64], n_pixels: int, domain: Domain, label: str
) -> None:
    """Raise `PtychodaskError` where patterns are those of the near field, which the far-field models cannot explain."""
    reason = near_field(patterns, position_yx_px, n_pixels, domain)
    if reason is not None:
        raise PtychodaskError(
            f"{label}: {reason}; use a program for near-field ptychography, or correct units and pixel size if they "
            "are wrong; far_field=True (--far-field) takes it as it is"
        )
