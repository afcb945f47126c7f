"""Iterative reconstruction of a complete scan, as a reference for networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.forward import r_factor
from ptychodask.grouping import chosen_patterns, experiment_number
from ptychodask.iterative import iterate_with_probe
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.flat import ITERATIVE
from ptychodask.store import open_scan


def reconstruct_iterative(
    store: str | Path,
    *,
    n_sweeps: int | Literal["auto"] = "auto",
    refine_probe: bool = False,
    exclude: Sequence[int] | NDArray[np.integer[Any]] = (),
    experiment: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    """Reconstruct a scan without a network, as a reference for networks.

    The same as ``reconstruct(store, "iterative")``: a flat object, refined by sweeps over all patterns with the slow
    phase between them.

    Parameters
    ----------
    store : path
    n_sweeps : int or "auto"
        Sweeps over the patterns. "auto": while they lower the misfit of patterns that take no part, 24 at most.
    refine_probe : bool
        Refine the probe together with the object, in memory on one core (`run_sweeps`); 16 sweeps by default, 3 or
        more. The stored probe is not changed.
    exclude : int array (k,), optional
        Patterns of the store that are left out.
    experiment : int, optional
        Experiment to reconstruct, if the scan has several.
    seed : int
        With `refine_probe`: seed of the order of the patterns.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    xarray.Dataset
        A result as from `reconstruct`, in memory. ``weight`` is the relative illumination of a pixel, Σ over patterns
        of |P|²/max|P|²; ``count`` the patterns that illuminate it; ``uncertainty`` is NaN, since there is one estimate
        per pixel. The attribute ``r_factor`` is R of all patterns that were not excluded.

    Raises
    ------
    PtychodaskError
        If `n_sweeps` is too small, a pattern or the experiment does not exist, or the scan has several experiments and
        none is chosen.
    """
    fewest = 3 if refine_probe else 1
    if n_sweeps != "auto" and n_sweeps < fewest:
        raise PtychodaskError(f"reconstruct_iterative: n_sweeps is {n_sweeps}, expected {fewest} or more")
    if experiment is not None:
        experiment = experiment_number(experiment, "reconstruct_iterative")
    scan = open_scan(store)
    used = chosen_patterns(scan, experiment, exclude)
    if refine_probe:
        return iterate_with_probe(store, 16 if n_sweeps == "auto" else n_sweeps, exclude, experiment, seed, progress)
    ds = reconstruct(
        store,
        ITERATIVE,
        polish=n_sweeps,
        slow_phase="auto",
        drop=np.asarray(exclude),
        experiment=experiment,
        progress=progress,
    )
    corner = float(ds["y"][0]), float(ds["x"][0])
    return ds.assign_attrs(r_factor=r_factor(ds["object"].values, corner, scan, used))
