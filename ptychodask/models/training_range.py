"""Range of training scans, and warnings for a scan outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import mean_spacing_px
from ptychodask.models.contract import PatchModel
from ptychodask.models.spec import Optics
from ptychodask.probes import probe_diameter_px
from ptychodask.scan import Scan
from ptychodask.store import StoredScan

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value of each quantity."""


@dataclass(frozen=True)
class ScanQuantity:
    """A quantity of a scan that predictions depend on."""

    words: str
    """Description with unit."""

    factor: float = 1.0
    """Factor below or above the range that is still accepted."""

    margin: float = 0.0
    """Distance below or above the range that is still accepted."""


QUANTITIES = {
    "step_px": ScanQuantity("mean step (px)", factor=1.5),
    "probe_diameter_px": ScanQuantity("probe diameter (px)", factor=1.25),
    "overlap": ScanQuantity("probe overlap, 1 - step / diameter", margin=0.1),
    "photons": ScanQuantity("photons in a pattern", factor=10.0),
}
"""Quantities a prediction depends on besides the object.

A network generalises a little beyond its training range, hence the factors and margins."""


def scan_quantities(scan: Scan, step_px: float | None) -> dict[str, float]:
    """Values of a scan by the names of `QUANTITIES`.

    Parameters
    ----------
    scan : Scan
        Its positions are not used.
    step_px : float, optional
        Mean spacing of its positions, pixels.

    Returns
    -------
    dict
        ``photons`` is the mean counts per pattern, left out for amplitudes, whose photon number is unknown; ``step_px``
        and ``overlap`` are left out without a spacing.
    """
    diameter_px = probe_diameter_px(scan.probe)
    values = {"probe_diameter_px": diameter_px}
    if scan.domain == "counts":
        values["photons"] = Optics.of(scan).mean_counts
    return values if step_px is None else values | {"step_px": step_px, "overlap": 1 - step_px / diameter_px}


def spacing_px(position_yx_px: NDArray[np.float64]) -> float | None:
    """`mean_spacing_px`, or None if the positions span no area."""
    try:
        return mean_spacing_px(position_yx_px)
    except PtychodaskError:
        return None


def ranges_of(scans: Iterable[Scan]) -> Ranges:
    """Lowest and highest value of each quantity over some scans."""
    values: dict[str, list[float]] = {}
    for scan in scans:
        for name, value in scan_quantities(scan, spacing_px(scan.position_yx_px)).items():
            values.setdefault(name, []).append(value)
    return {name: (float(min(series)), float(max(series))) for name, series in sorted(values.items())}


def read_ranges(recorded: Any) -> Ranges:
    """Ranges recorded in a bundle, without unreadable entries and unknown names."""
    if not isinstance(recorded, dict):
        return {}
    ranges = {}
    for name in QUANTITIES:
        ends = recorded.get(name)
        if not isinstance(ends, list | tuple) or len(ends) != 2:
            continue
        if all(isinstance(end, int | float) and np.isfinite(end) for end in ends):
            ranges[name] = (float(ends[0]), float(ends[1]))
    return ranges


def outside_range(ranges: Ranges, scan: Scan, step_px: float | None) -> list[str]:
    """Quantities of a scan outside the range a network was trained on.

    Parameters
    ----------
    ranges : dict
        `ranges_of` the training scans; quantities without a range are not checked.
    scan, step_px
        As in `scan_quantities`.

    Returns
    -------
    list of str
        One line for each quantity outside its range by more than its factor and margin.

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
    values = scan_quantities(scan, step_px)
    lines = []
    for name, (low, high) in ranges.items():
        quantity, value = QUANTITIES[name], values.get(name)
        lowest, highest = low / quantity.factor - quantity.margin, high * quantity.factor + quantity.margin
        if value is None or lowest <= value <= highest:
            continue
        trained_on = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        lines.append(f"{quantity.words} is {value:.4g}, trained on {trained_on}")
    return lines


SPACING_POSITIONS = 20_000
"""Largest number of positions used for the mean spacing of a scan, which is compared with the training scans."""


def unlike_training(model: PatchModel, stored: StoredScan) -> list[str]:
    """Properties of a scan outside the range of the training scans.

    One line each; empty if the range is unknown.
    """
    ranges = read_ranges(model.trained_on.get("traits"))
    if not ranges:
        return []
    every = -(-stored.n_patterns // SPACING_POSITIONS)
    step_px = spacing_px(stored.position_yx_px(np.arange(0, stored.n_patterns, every)))
    return outside_range(ranges, stored.first(), None if step_px is None else step_px / np.sqrt(every))
