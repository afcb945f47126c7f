"""Tables of a comparison: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import xarray as xr

from ptychodask.judging.compare import warnings_of
from ptychodask.judging.metrics import BAND_EDGES, PARTS


def to_markdown(comparison: xr.Dataset) -> str:
    """Comparison as Markdown, a row per method and part, with a caption.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    str
        One table, and a second one of signed differences if there is a baseline.
    """
    text = _table(comparison, "value", "{:.4g}")
    if "difference" in comparison:
        text += f"\nDifference from {comparison.attrs['baseline']}:\n\n" + _table(comparison, "difference", "{:+.3g}")
    return f"{text}\n{_caption(comparison)}\n"


def _table(comparison: xr.Dataset, variable: str, number_format: str) -> str:
    header, *rows = _rows(comparison, variable)
    body = [[*row[:2], *("" if np.isnan(value) else number_format.format(value) for value in row[2:])] for row in rows]
    lines = [header, ["---", "---", *("---:" for _ in header[2:])], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(comparison: xr.Dataset, variable: str) -> list[list[Any]]:
    """Header and rows: method, part, metrics, and R beside ``value``."""
    with_r = variable == "value" and "r_factor" in comparison
    rows: list[list[Any]] = [["method", "part", *comparison["metric"].values, *(["r_factor"] if with_r else [])]]
    for method in comparison["method"].values:
        for part in comparison["part"].values:
            values = comparison[variable].loc[method, part].values.tolist()
            rows.append([method, part, *values, *([float(comparison["r_factor"].loc[method])] if with_r else [])])
    return rows


def _caption(comparison: xr.Dataset) -> str:
    peak, span = (dict(zip(PARTS, comparison[name].values, strict=True)) for name in ("peak", "data_range"))
    slow, fine = BAND_EDGES
    moved = [
        f"{method} by ({shift[0]:+.2f}, {shift[1]:+.2f})"
        for method, shift in zip(comparison["method"].values, comparison["shift_px"].values, strict=True)
        if shift.any()
    ]
    return (
        f"Reference: {comparison.attrs['reference']}, on {comparison.attrs['seen_pixels']} common pixels; "
        f"{', '.join(comparison.attrs['gauge_removed'])} removed; "
        f"PSNR in dB with peak {peak['amplitude']:.4g} (amplitude) and {peak['phase']:.4g} (phase); "
        f"SSIM with range {span['amplitude']:.4g} (amplitude) and {span['phase']:.4g} (phase); "
        f"correlation_slow, _middle, _fine below {slow}, up to {fine} and above, FRC crossings, in cycles per pixel."
        + (f" R over {comparison.attrs['r_patterns']} patterns." if "r_factor" in comparison else "")
        + (f" Registered by a shift (y, x) in pixels: {', '.join(moved)}." if moved else "")
        + "".join(f" {warning}" for warning in warnings_of(comparison))
    )


def to_csv(comparison: xr.Dataset) -> str:
    """Comparison as CSV with all digits, a row per method and part.

    Parameters
    ----------
    comparison : xarray.Dataset
        From `compare`.

    Returns
    -------
    str
        Columns: method, part, the metrics, r_factor with a scan, and ``<metric>_less_<baseline>`` with a
        baseline; a NaN is an empty cell.
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
