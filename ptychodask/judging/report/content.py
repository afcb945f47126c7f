"""Everything a report is written from."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import align, compare, find_truth
from ptychodask.judging.plotting import thinned
from ptychodask.judging.refinements import attributes_of_network
from ptychodask.judging.residuals import residuals
from ptychodask.models.description import read_description, read_history
from ptychodask.models.pretrained import bundle_folder
from ptychodask.result import recorded
from ptychodask.scan import Scan, Truth
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)


GENERATOR = '<meta name="generator" content="ptychodask">'
"""Marks a page as a report; other pages are not overwritten."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content of a report."""

    title: str
    """Title of the report."""

    label: str
    """Label of the result among the compared ones."""

    result: xr.Dataset
    """Complete result, with lazy arrays if it was lazy."""

    shown: xr.Dataset
    """Result in memory, subsampled for pictures."""

    scan: Scan | None
    """Measured scan."""

    truth: Truth | None
    """Known object."""

    training: Mapping[str, Any]
    """Training record of the network; empty if unknown."""

    aligned_results: Mapping[str, xr.Dataset]
    """All compared results, in common pixel coordinates."""

    comparison: xr.Dataset | None
    """From `compare`."""

    residuals: xr.Dataset | None
    """From `residuals`, with a scan."""


def check_report_path(path: Path) -> None:
    """Raise `PtychodaskError` unless a report can be written to this path.

    It must end in .html and be in an existing folder, and a file there must be a report.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise PtychodaskError(f"cannot write {path}: found suffix {path.suffix!r}, expected .html")
    if path.is_dir():
        raise PtychodaskError(f"cannot write {path}: it is a folder; pass a file name")
    if not path.parent.is_dir():
        raise PtychodaskError(f"cannot write {path}: folder {path.parent} does not exist")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise PtychodaskError(
            f"cannot write {path}: it exists and is not a report of ptychodask; pass another name, or remove it"
        )


def _collect(
    title: str,
    results: Mapping[str, xr.Dataset],
    scan: Scan | str | Path | None,
    truth: Truth | Scan | str | Path | None,
    experiment: int | None,
    progress: bool | None,
) -> Content:
    measured = None if scan is None else scan if isinstance(scan, Scan) else open_scan(scan)
    label, result = next(iter(results.items()))
    result = _of_first_network(result)
    _check_same_data(label, result, measured)
    if truth is None and measured is not None:
        truth = measured.truth
    known = None if truth is None else find_truth(truth)
    is_compared = len(results) > 1 or known is not None
    aligned_results = align(results, truth=known) if is_compared else {}
    return Content(
        title=title,
        label=label,
        result=result,
        shown=thinned(result),
        scan=measured,
        truth=known,
        training=_training(result.attrs),
        aligned_results=aligned_results,
        comparison=compare(aligned_results, truth=known, scan=measured, experiment=experiment) if is_compared else None,
        residuals=None if measured is None else _residuals(result, measured, experiment, progress),
    )


def _residuals(result: xr.Dataset, scan: Scan, experiment: int | None, progress: bool | None) -> xr.Dataset:
    """Residuals of all patterns, with those dropped in the reconstruction flagged."""
    dropped = recorded(result.attrs, "spec", "drop") or []
    if not (isinstance(dropped, list) and all(isinstance(pattern, int) for pattern in dropped)):
        raise PtychodaskError(
            f"report: the result records {str(dropped)[:60]} as dropped, expected indices of patterns"
        )
    return residuals(result, scan, drop=dropped, experiment=experiment, progress=progress)


def _of_first_network(result: xr.Dataset) -> xr.Dataset:
    """Result with the attributes of its first network only.

    Several networks that were stored together share one record.
    """
    networks = recorded(result.attrs, "networks")
    if not isinstance(networks, list):
        return result
    return result.assign_attrs(attributes_of_network(result.attrs, networks[0]))


def _check_same_data(label: str, result: xr.Dataset, scan: Scan | None) -> None:
    made_from = recorded(result.attrs, "data_hash")
    if scan is not None and made_from is not None and made_from != scan.data_hash:
        raise PtychodaskError(
            f"report: {label} was made from data with hash {str(made_from)[:12]}, but {scan.store or 'the scan'} has "
            f"{scan.data_hash[:12]}; pass the scan that it was made from"
        )


def _training(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Training record in the bundle of the model.

    Empty if there is no bundle at the recorded path, or it contains another model by now.
    """
    path, content_hash = recorded(attributes, "model", "path"), recorded(attributes, "model", "hash")
    if not isinstance(path, str):
        return {}
    try:
        folder = bundle_folder(path)
        # Unlike Path.is_file, this returns False for impossible paths.
        if not os.path.isfile(os.path.join(folder, "model.json")):
            return {}
        description = read_description(folder)
        history = read_history(folder / "history.csv")
    except PtychodaskError as error:
        logger.warning("the report omits the training: %s", error)
        return {}
    if description.get("content_hash") != content_hash:
        return {}
    return {**description.get("trained_on", {}), "history": history}
