"""Demonstration of the packaged networks on a simulated scan."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.io.ingest import ingest
from ptychodask.judging.compare import compare
from ptychodask.judging.plotting import plot, plot_comparison
from ptychodask.judging.tables import to_markdown
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Scan
from ptychodask.simulate import simulate

logger = logging.getLogger(__name__)

SCAN: dict[str, Any] = {
    "object": "lines",
    "probe": "zone_plate",
    "n_patterns": 1200,
    "dose": 1e6,
    "step_px": 6.0,
    "seed": 1,
}
"""Arguments of `simulate` for the scan."""

MODELS = {"PtychoPINN": "pretrained:pinn-n64-c4", "Baseline": "pretrained:baseline-n64-c1"}
"""Packaged networks, trained on other simulated scans."""


def run_demo(folder: str | Path, *, overwrite: bool = False, progress: bool | None = None) -> str:
    """Simulate, ingest and reconstruct a scan, and compare with the truth.

    Parameters
    ----------
    folder : path
        Output: ``simulated.zarr``, ``scan.npz`` (the same as a PtychoPINN file), ``scan.zarr`` (ingested from that),
        ``scan.object.zarr`` with the results of both networks, ``pinn.png``, ``comparison.png`` and ``comparison.md``.
    overwrite : bool
        Replace existing files.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    str
        Table of the comparison, the files written, and commands to try next.

    Raises
    ------
    PtychodaskError
        If the folder exists and is not empty, without `overwrite`.

    Notes
    -----
    Both networks come with the package (their training is in `ptychodask.recipes`): neither was trained on this
    object, this probe or these positions.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise PtychodaskError(f"{folder}: exists and is not empty; pass --overwrite, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    store = folder / "scan.zarr"
    simulated = simulate(folder / "simulated.zarr", **SCAN, overwrite=overwrite, progress=progress)
    write_ptychopinn_npz(simulated, folder / "scan.npz")
    ingest(folder / "scan.npz", store, domain="counts", overwrite=overwrite, progress=progress)
    both = reconstruct(store, MODELS, out=folder / "scan.object.zarr", overwrite=overwrite, progress=progress)
    results = {label: both.sel(network=label) for label in MODELS}
    comparison = compare(results, truth=store, scan=store)
    table = to_markdown(comparison)
    (folder / "comparison.md").write_text(table + "\n")
    plot(results["PtychoPINN"], path=folder / "pinn.png")
    plot_comparison(results, store, comparison=comparison, path=folder / "comparison.png")
    logger.info("demo took %.0f s", time.monotonic() - started)
    return _summary(folder, table, time.monotonic() - started)


def write_ptychopinn_npz(scan: Scan, path: Path) -> None:
    """Write a scan with truth as a PtychoPINN file.

    Counts are in ``diff3d``, and positions are relative to the corner of the object.
    """
    if scan.truth is None:
        raise PtychodaskError(f"{scan.store or 'scan'}: has no truth to write as objectGuess")
    position = scan.position_yx_px - np.asarray(scan.truth.corner_yx_px)
    np.savez_compressed(
        path,
        diff3d=scan.diffraction[:],
        ycoords=position[:, 0],
        xcoords=position[:, 1],
        probeGuess=scan.probe[0],
        objectGuess=scan.truth.object,
    )


def _summary(folder: Path, table: str, seconds: float) -> str:
    return f"""{table}

Done in {seconds:.0f} s. In {folder}/: comparison.png and pinn.png are the pictures, comparison.md is this table.

Try next:
  ptychodask report {folder / "scan.object.zarr"} --scan {folder / "scan.zarr"}
  ptychodask reconstruct {folder / "scan.zarr"} --out {folder / "polished.object.zarr"} --polish 10
  ptychodask train {folder / "scan.zarr"} --initial {MODELS["PtychoPINN"]} --learning-rate 3e-4 --max-minutes 5
  ptychodask ingest your_scan.npz scan.zarr && ptychodask refine-probe scan.zarr && ptychodask train scan.zarr"""
