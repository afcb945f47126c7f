"""Refined positions and flux of a result, written into its scan."""

from __future__ import annotations

import logging

import numpy as np
import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.result import open_result
from ptychodask.scan import Scan
from ptychodask.storage.location import LocationLike
from ptychodask.store import StoredScan
from ptychodask.store.annotate import replace_positions

logger = logging.getLogger(__name__)


def apply_positions(store: LocationLike, result: LocationLike | xr.Dataset) -> Scan:
    """Write the refined positions of a result into its scan.

    Flux too, if the result refined it. All later runs and trainings use them. The measured positions stay in
    ``y_measured_px`` and ``x_measured_px``; group tables are removed, and drawn again by the next run.

    Parameters
    ----------
    store : path or ``s3://`` URL
        The scan that the result was made from.
    result : path, ``s3://`` URL or xarray.Dataset
        Made with ``refine_positions=True``: ``position_refined_yx_px`` (pattern, 2), pixels, and with
        ``refine_flux=True`` ``flux_refined`` (pattern,).

    Returns
    -------
    Scan
        The store, opened again, with a new data hash.

    Raises
    ------
    PtychodaskError
        If the result has no refined positions or is of another scan, or the scan is growing.
    """
    ds = result if isinstance(result, xr.Dataset) else open_result(result)
    name = "the result" if isinstance(result, xr.Dataset) else str(result)
    if "position_refined_yx_px" not in ds:
        raise PtychodaskError(
            f"{name}: has no refined positions (position_refined_yx_px); reconstruct with refine_positions=True "
            "(--refine-positions)"
        )
    stored = StoredScan(store)
    made_from = ds.attrs.get("data_hash")
    if made_from != stored.data_hash:
        if made_from in stored.attributes.get("earlier_data_hashes", ()):
            problem = "is of earlier positions of this scan, which have been replaced since"
        else:
            problem = f"is of another scan (data hash {str(made_from)[:12]}, expected {stored.data_hash[:12]})"
        raise PtychodaskError(
            f"{stored.label}: {name} {problem}; reconstruct this scan again with refine_positions=True "
            "(--refine-positions)"
        )
    flux = ds["flux_refined"].values if "flux_refined" in ds else None
    scan = replace_positions(store, np.asarray(ds["position_refined_yx_px"].values, np.float64), flux)
    logger.info("%s: applied the refined positions of %s", stored.label, name)
    return scan
