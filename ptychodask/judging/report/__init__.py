"""HTML report of a result: figures, metrics, methods text and provenance."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import xarray as xr

from ptychodask.judging.compare import results_by_label
from ptychodask.judging.report.content import _collect, check_report_path
from ptychodask.judging.report.page import _page
from ptychodask.scan import Scan, Truth
from ptychodask.storage.atomic import atomic_file

logger = logging.getLogger(__name__)


def write_report(
    result: xr.Dataset | str | Path,
    out: str | Path,
    *,
    label: str | None = None,
    scan: Scan | str | Path | None = None,
    truth: Truth | Scan | str | Path | None = None,
    others: Iterable[tuple[str | None, xr.Dataset | str | Path]] = (),
    experiment: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a report of a result as one self-contained HTML file.

    It loads nothing from the network and runs no script.

    Parameters
    ----------
    result : xarray.Dataset or path
        From `reconstruct`, `reconstruct_iterative` or `open_result`. If it has several networks, the first is reported
        and compared with the others.
    out : path
        File to write, ending in ``.html``; an existing report is replaced, any other file is not.
    label : str, optional
        Title of the report and label of the result; by default the name of its store, and the label that `compare`
        uses.
    scan : Scan or path, optional
        The scan that the result was made from: adds a description of the measurement, the residual of each pattern and,
        unless `truth` is given, its truth.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one: adds a comparison with it.
    others : pairs of label or None and Dataset or path, optional
        Results to compare with; those without a label are named as in `compare`.
    experiment : int, optional
        Experiment of the results, in a scan of several; by default the one that they record.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    PtychodaskError
        If `out` cannot be written as a report, `result` is not a result, or it was made from another scan.
    """
    path = Path(out)
    check_report_path(path)
    opened = results_by_label([(label, result), *others])
    store = None if isinstance(result, xr.Dataset) else Path(result).name.removesuffix(".zarr")
    content = _collect(label or store or next(iter(opened)), opened, scan, truth, experiment, progress)
    with atomic_file(path, overwrite=True) as building:
        building.write_text(_page(content), encoding="utf-8")
    logger.info("%s: %d kB", path, path.stat().st_size // 1000)
    return path
