"""Pictures of the documentation: the demo, and simulated scans before and after refinement.

``python docs/pictures.py`` takes two minutes on two cores. It writes ``demo.png``, ``demo-refinement.png`` and
``refinement.png`` beside this file, and prints the table of phase correlations in ``how-it-works.md``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from ptychodask.demo import MODELS, REFINED, STITCHED, run_demo
from ptychodask.judging.compare import compare, find_truth, truth_on_pixels
from ptychodask.judging.metrics import align_gauge, well_lit
from ptychodask.judging.plotting import plot_contact_sheet
from ptychodask.judging.refinements import refinement_text
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate

FOLDER = Path(__file__).parent

SCAN: dict[str, Any] = {"object": "lines", "n_patterns": 700, "step_px": 7.0, "dose": 1e6, "seed": 3}
"""Arguments of `simulate`; neither object nor positions were seen in training."""

PROBES = ("zone_plate", "disc")
"""Probes of `simulate`, one scan each."""

METRICS = ("correlation", "correlation_slow", "correlation_middle", "correlation_fine")
"""Metrics of the phase in the printed table."""

WIDEST_PX, COLOURS = 1500, 256
"""Pixels across a stored picture, at most, and its colours."""


def before_and_after(folder: Path, probe: str) -> dict[str, xr.Dataset]:
    """Stitched and refined object of a simulated scan, ``<probe>.zarr`` in a folder."""
    store = folder / f"{probe}.zarr"
    simulate(store, probe=probe, **SCAN)
    model, cache = next(iter(MODELS.values())), folder / f"{probe}.patches.zarr"
    options = {"stitched": STITCHED, "refined": REFINED}
    return {label: reconstruct(store, model, cache=cache, **fields) for label, fields in options.items()}


def phase(object_: NDArray[np.complex64], truth: NDArray[np.complex64], lit: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Phase in the gauge of the truth, NaN where poorly lit."""
    seen = lit & np.isfinite(truth)
    aligned, _ = align_gauge(np.where(seen, object_, np.complex64(np.nan)), truth)
    return np.angle(aligned * np.exp(-1j * np.angle(truth[seen].sum())))


def write_refinement(folder: Path) -> None:
    """Draw true, stitched and refined phases, and print their metrics."""
    pictures = {}
    print(f"| scan | object | {' | '.join(METRICS)} | R |\n| --- | --- |{' ---: |' * (len(METRICS) + 1)}")
    for probe in PROBES:
        results = before_and_after(folder, probe)
        store, ds = folder / f"{probe}.zarr", results["stitched"]
        truth = truth_on_pixels(find_truth(store), ds["y"].values, ds["x"].values)
        lit = well_lit(ds["weight"].values)
        objects = {"truth": truth} | {label: result["object"].values for label, result in results.items()}
        column = probe.replace("_", " ")
        pictures |= {(label, column): phase(object_, truth, lit) for label, object_ in objects.items()}
        table = compare(results, truth=store, scan=store)
        for label, result in results.items():
            values = [f"{float(table['value'].loc[label, 'phase', metric]):.3f}" for metric in METRICS]
            text, r_factor = refinement_text(result.attrs), float(table["r_factor"].loc[label])
            print(f"| {column} | {label} ({text}) | {' | '.join(values)} | {r_factor:.4f} |")
    rows = {key: pictures[key] for label in ("truth", "stitched", "refined") for key in pictures if key[0] == label}
    plot_contact_sheet(rows, path=folder / "refinement.png")
    write_small(folder / "refinement.png", FOLDER / "refinement.png")


def write_small(source: Path, path: Path, method: Image.Quantize = Image.Quantize.MEDIANCUT) -> None:
    """Write a picture with fewer pixels and colours.

    Median cut has the finer greys; an octree keeps thin lines of many colours apart.
    """
    with Image.open(source) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((WIDEST_PX, 10 * WIDEST_PX))
        picture.quantize(COLOURS, method=method).save(path, optimize=True)


def main() -> None:
    """Write all pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        print(run_demo(Path(scratch) / "demo"))
        write_small(Path(scratch) / "demo" / "comparison.png", FOLDER / "demo.png", Image.Quantize.FASTOCTREE)
        write_small(Path(scratch) / "demo" / "refinement.png", FOLDER / "demo-refinement.png")
        write_refinement(Path(scratch))


if __name__ == "__main__":
    main()
