"""Check of positions and optics by what patterns and probe imply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import median_step_px
from ptychodask.io.evidence import least_probe_diameter_px, spread_rows
from ptychodask.probes import probe_diameter_px
from ptychodask.scan import Domain, PatternSource

WIDEST_OVERLAPPING = 1.0
"""Step over probe diameter from which neighbours do not overlap."""

LEAST_STEP = 0.05
"""Step over probe diameter below which units are likely wrong: no scan overlaps by more."""

LEAST_STEP_PX = 1.0
"""Step below which units are likely wrong, object pixels."""

JUDGED_PATTERNS = 32
"""Patterns from which the diameter of the probe is estimated."""


@dataclass(frozen=True)
class Overlap:
    """Step of a scan against the diameter of its probe."""

    step_px: float
    """Median distance of neighbours, object pixels."""

    diameter_px: float
    """Diameter of the probe, object pixels."""

    basis: str
    """How the diameter is known, for messages."""

    @property
    def share(self) -> float:
        """Step over diameter."""
        return self.step_px / self.diameter_px

    @property
    def statement(self) -> str:
        """Step and diameter in words."""
        return f"the median step is {self.step_px:.3g} px; {self.basis} {self.diameter_px:.3g} px wide"

    @property
    def is_too_small(self) -> bool:
        """True if the step is unlikely small."""
        return self.share < LEAST_STEP or self.step_px < LEAST_STEP_PX

    @property
    def problem(self) -> str | None:
        """What is unlikely about it; None if nothing is."""
        if self.share >= WIDEST_OVERLAPPING:
            return "neighbours do not overlap, or units, pixel size or probe are wrong"
        if self.is_too_small:
            return (
                f"an overlap of {100 * (1 - self.share):.3g} % is unlikely: the unit of the positions, or energy, "
                "distance or pixel size, are wrong"
            )
        return None


def overlap_of(
    position_yx_px: NDArray[np.float64],
    probe: NDArray[np.complexfloating[Any, Any]] | None,
    counts: NDArray[np.float64] | None,
    *,
    scale: float = 1.0,
) -> Overlap | None:
    """Overlap of a scan, by its probe or else its patterns.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)
        Positions, object pixels.
    probe : complex array (mode, N, N), optional
        Measured probe.
    counts : float64 array (k, h, w), optional
        Some patterns, used without a probe.
    scale : float
        Object pixels of the positions over those of probe and patterns.

    Returns
    -------
    Overlap or None
        None if there is no step, or neither probe nor patterns tell a diameter.
    """
    step = median_step_px(position_yx_px)
    if probe is not None and np.any(probe):
        diameter, basis = probe_diameter_px(probe), "the file's probe is"
    else:
        diameter = (least_probe_diameter_px(counts) if counts is not None else None) or 0.0
        basis = "judged by speckle size, the probe is at least"
    return Overlap(step, diameter * scale, basis) if step and diameter else None


def sampled_counts(diffraction: PatternSource, domain: Domain, mask: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Some patterns of a scan as counts (k, N, N), 0 at bad pixels."""
    values = np.asarray(diffraction[spread_rows(diffraction.shape[0], JUDGED_PATTERNS)], np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    counts = np.maximum(values, 0) if domain == "counts" else np.square(values)
    return counts if mask is None else counts * mask


def unlikely_optics(pixel_m: float | None, wavelength_m: float | None) -> str | None:
    """What is unlikely about an object pixel; None if nothing is.

    Examples
    --------
    >>> unlikely_optics(1e-11, 1e-10)
    'an object pixel of 1e-11 m is less than half the wavelength of 1e-10 m, which no detector reaches'
    """
    if pixel_m and wavelength_m and pixel_m < wavelength_m / 2:
        return (
            f"an object pixel of {pixel_m:.3g} m is less than half the wavelength of {wavelength_m:.3g} m, which no "
            "detector reaches"
        )
    if pixel_m and not PIXEL_M[0] <= pixel_m <= PIXEL_M[1]:
        return f"an object pixel of {pixel_m:.3g} m is unlikely, expected {PIXEL_M[0]:g} to {PIXEL_M[1]:g} m"
    return None


PIXEL_M = (1e-12, 1e-5)
"""Plausible sizes of an object pixel, metres."""
