"""What the scans were like that a network was trained on, and in what another scan differs from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import mean_spacing_px
from ptychodask.models.spec import Optics
from ptychodask.scan import PtychodaskError, Scan, probe_diameter_px

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value of each trait."""


@dataclass(frozen=True)
class ScanQuantity:
    """A number by which scans are told apart."""

    words: str
    """What it is, with its unit."""

    factor: float = 1.0
    """How many times below or above the range a scan may lie."""

    margin: float = 0.0
    """How far below or above the range a scan may lie."""


QUANTITIES = {
    "step_px": ScanQuantity("mean step (px)", factor=1.5),
    "probe_diameter_px": ScanQuantity("probe diameter (px)", factor=1.25),
    "overlap": ScanQuantity("probe overlap, 1 - step / diameter", margin=0.1),
    "photons": ScanQuantity("photons in a pattern", factor=10.0),
}
"""What a prediction depends on beside the object. A network generalises a little beyond what it saw."""


def scan_quantities(scan: Scan, step_px: float | None) -> dict[str, float]:
    """The traits of a scan, by the names of `QUANTITIES`.

    Parameters
    ----------
    scan : Scan
        Its positions have no say.
    step_px : float, optional
        Mean spacing of its positions, pixels.

    Returns
    -------
    dict
        ``photons`` is the mean of the counts in a pattern, and is left out for amplitudes, whose photon number is
        unknown; so are ``step_px`` and ``overlap`` without a spacing.
    """
    diameter_px = probe_diameter_px(scan.probe)
    found = {"probe_diameter_px": diameter_px}
    if scan.domain == "counts":
        found["photons"] = Optics.of(scan).mean_counts
    return found if step_px is None else found | {"step_px": step_px, "overlap": 1 - step_px / diameter_px}


def spacing_px(position_yx_px: NDArray[np.float64]) -> float | None:
    """`mean_spacing_px`, or None where positions span no area."""
    try:
        return mean_spacing_px(position_yx_px)
    except PtychodaskError:
        return None


def ranges_of(scans: Iterable[Scan]) -> Ranges:
    """Lowest and highest value of each trait over some scans."""
    values: dict[str, list[float]] = {}
    for scan in scans:
        for name, value in scan_quantities(scan, spacing_px(scan.position_yx_px)).items():
            values.setdefault(name, []).append(value)
    return {name: (float(min(found)), float(max(found))) for name, found in sorted(values.items())}


def read_ranges(recorded: Any) -> Ranges:
    """Ranges as a bundle records them; what cannot be read, or is no trait, is left out."""
    if not isinstance(recorded, dict):
        return {}
    found = {}
    for name in QUANTITIES:
        ends = recorded.get(name)
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            continue
        if all(isinstance(end, int | float) and np.isfinite(end) for end in ends):
            found[name] = (float(ends[0]), float(ends[1]))
    return found


def outside_range(ranges: Ranges, scan: Scan, step_px: float | None) -> list[str]:
    """In what a scan lies outside of the scans that a network was trained on.

    Parameters
    ----------
    ranges : dict
        `ranges_of` the scans that it was trained on; none says nothing.
    scan, step_px
        As in `scan_quantities`.

    Returns
    -------
    list of str
        One line for each trait beyond its range by more than its factor and margin.

    Examples
    --------
    >>> scan = Scan(
    ...     diffraction=np.full((3, 8, 8), 9, np.uint16),
    ...     position_yx_px=np.array([[0.0, 0], [0, 9], [9, 0]]),
    ...     probe=np.ones((1, 8, 8), np.complex64),
    ...     domain="counts",
    ...     normalization=0.5,
    ... )
    >>> outside_range({"photons": (1e3, 1e6)}, scan, step_px=9.0)
    ['photons in a pattern is 64, trained on 1000 to 1e+06']
    """
    traits = scan_quantities(scan, step_px)
    lines = []
    for name, (low, high) in ranges.items():
        trait, value = QUANTITIES[name], traits.get(name)
        if value is None or low / trait.factor - trait.margin <= value <= high * trait.factor + trait.margin:
            continue
        trained_on = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        lines.append(f"{trait.words} is {value:.4g}, trained on {trained_on}")
    return lines
