"""Demonstration of the packaged networks on a simulated scan."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.io.ingest import ingest
from ptychodask.judging.compare import compare
from ptychodask.judging.plotting import plot, plot_comparison, plot_refinement
from ptychodask.judging.refinements import refinement_text
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

STITCHED: dict[str, Any] = {"slow_phase": False, "polish": 0}
"""Options of `reconstruct` for the network's own object."""

REFINED: dict[str, Any] = {"slow_phase": True, "polish": 5}
"""Options of `reconstruct` for the refined object."""

REFINED_LABEL = "refined"
"""Label of the refined object of the first network."""

SHOWN = {
    "phase correlation": "correlation",
    "below 0.02 cycles/px": "correlation_slow",
    "0.02 to 0.1": "correlation_middle",
    "above 0.1": "correlation_fine",
}
"""Metrics of the phase before and after refinement, by their text."""


def run_demo(folder: str | Path, *, overwrite: bool = False, progress: bool | None = None) -> str:
    """Simulate, ingest, reconstruct and refine a scan, and compare with the truth.

    Parameters
    ----------
    folder : path
        Output: ``simulated.zarr``, ``scan.npz`` (the same as a PtychoPINN file), ``scan.zarr`` (ingested from that),
        ``scan.object.zarr``, the refined object of the first network, ``stitched.object.zarr``, the same before, and
        ``baseline.object.zarr``, that of the second, ``refinement.png``, ``pinn.png``, ``comparison.png`` and
        ``comparison.md``.
    overwrite : bool
        Replace existing files.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    str
        Table of the comparison, figures before and after refinement, the files written, and commands to try next.

    Raises
    ------
    PtychodaskError
        If the folder exists and is not empty, without `overwrite`.

    Notes
    -----
    Both networks come with the package (their training is in `ptychodask.recipes`): neither was trained on this
    object, this probe or these positions. The patches of the first are kept in a cache, so that it predicts once.
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
    options: dict[str, Any] = {"overwrite": overwrite, "progress": progress}
    (pinn, pinn_path), (baseline, baseline_path) = MODELS.items()
    with tempfile.TemporaryDirectory() as scratch:
        options_pinn = options | {"cache": Path(scratch) / "patches.zarr"}
        stitched = reconstruct(store, pinn_path, out=folder / "stitched.object.zarr", **STITCHED, **options_pinn)
        refined = reconstruct(store, pinn_path, out=folder / "scan.object.zarr", **REFINED, **options_pinn)
    results = {
        pinn: stitched,
        REFINED_LABEL: refined,
        baseline: reconstruct(store, baseline_path, out=folder / "baseline.object.zarr", **STITCHED, **options),
    }
    comparison = compare(results, truth=store, scan=store)
    table = to_markdown(comparison)
    (folder / "comparison.md").write_text(table + "\n")
    plot(refined, path=folder / "pinn.png")
    plot_refinement(refined.assign(object_stitched=stitched["object"]), path=folder / "refinement.png")
    plot_comparison(results, store, comparison=comparison, path=folder / "comparison.png")
    logger.info("demo took %.0f s", time.monotonic() - started)
    text = f"{table}\n{_before_and_after(comparison, pinn, refinement_text(refined.attrs))}"
    return _summary(folder, text, time.monotonic() - started)


def _before_and_after(comparison: xr.Dataset, pinn: str, refinement: str) -> str:
    """Phase correlations and R of the stitched and of the refined object."""
    rows = [[refinement, *SHOWN, "R"]]
    for title, label in (("before", pinn), ("after", REFINED_LABEL)):
        phase, r_factor = comparison["value"].loc[label, "phase"], float(comparison["r_factor"].loc[label])
        rows.append([title, *(f"{float(phase.loc[metric]):.3f}" for metric in SHOWN.values()), f"{r_factor:.4f}"])
    rows.insert(1, ["---", *("---:" for _ in rows[0][1:])])
    return f"Refinement of {pinn}:\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


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


def _summary(folder: Path, text: str, seconds: float) -> str:
    return f"""{text}

Done in {seconds:.0f} s. In {folder}/: comparison.png, refinement.png (before and after) and pinn.png are the pictures,
comparison.md is this table.

Try next:
  ptychodask report {folder / "scan.object.zarr"} --scan {folder / "scan.zarr"}
  ptychodask reconstruct {folder / "scan.zarr"} --out {folder / "polished.object.zarr"} --slow-phase --polish 20
  ptychodask train {folder / "scan.zarr"} --initial {MODELS["PtychoPINN"]} --learning-rate 3e-4 --max-minutes 5
  ptychodask ingest your_scan.npz scan.zarr && ptychodask refine-probe scan.zarr && ptychodask train scan.zarr"""
