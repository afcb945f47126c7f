"""How the packaged models are made: ``python -m ptychodask.models.recipes pinn-n64-c4 --out pinn-n64-c4``.

This is a program that stands on all stages down to the judging of results; no module imports it.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ptychodask.compare import compare
from ptychodask.io.probe import disc_probe, to_far_field, to_real_space, zone_plate_probe
from ptychodask.models import Model, save_model, untrained_model
from ptychodask.models.pretrained import CARD
from ptychodask.models.traits import QUANTITIES
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Scan, probe_diameter_px
from ptychodask.simulate import crossing_lines, random_field, siemens_star, simulate
from ptychodask.training import TrainingSpec, train

logger = logging.getLogger(__name__)

N_PIXELS = 64

PATTERNS = 256
"""Patterns of each simulated scan."""

TRAINING_SCANS = 64
"""Scans that a model is trained on."""

JUDGED = 12
"""Scans that a model is judged on; it never saw their objects, probes or positions."""

JUDGED_SEED = 1_000_000
"""Seed of the first scan to judge on; those to train on count from 0."""

METRICS = (("amplitude", "correlation"), ("phase", "correlation"), ("amplitude", "ratio"))


wrapped = partial(fill, width=118, break_on_hyphens=False)
"""A paragraph of a card."""

DRAWN = (
    "Objects: crossing lines, smooth fields, sharp-edged blobs and Siemens stars, amplitude from 1 down to 0.3, phase "
    "over up to 2.4 rad. Probes: discs, flat and curved, and zone plates out of focus, a little aberrated. Paths: "
    "random, raster, spiral. Poisson noise."
)
"""What the scans are like, see `varied_scan`."""

JUDGING = (
    "scans drawn in the same way, whose objects, probes and positions it has not seen. A global phase and a "
    "plane are removed, nothing else. Median (lowest to highest) over the scans; R is Σ\\|√I_pred − √I\\| / Σ√I of the "
    "stitched object."
)

NOT_FOR = (
    "Scans outside of the ranges above: `reconstruct` warns of them.",
    "A probe that is not known well: run `ptychodask refine-probe` first.",
    "Near-field patterns, and objects thicker than one slice.",
    "Quantitative phase of features wider than the probe, which are weak in what the network gives: polish the result "
    "(`reconstruct(..., polish=10)`).",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A packaged model as it is trained."""

    training: TrainingSpec

    minutes: float
    """Time of the training; the learning rate falls with the clock."""

    about: str
    """What it is, in a sentence."""


RECIPES = {
    "pinn-n64-c4": Recipe(
        training=TrainingSpec(model="pinn", members=4),
        minutes=27,
        about="Reads four neighbouring patterns (gridsize 2); trained on patterns alone, through the forward model.",
    ),
    "pinn-n64-c1": Recipe(
        training=TrainingSpec(model="pinn", members=1),
        minutes=12,
        about="Reads one pattern (gridsize 1); trained on patterns alone, through the forward model.",
    ),
    "baseline-n64-c1": Recipe(
        training=TrainingSpec(model="baseline"),
        minutes=12,
        about="Reads one pattern (gridsize 1); supervised, trained on patches of the known objects.",
    ),
}
"""The packaged models by name."""


def varied_object(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """A random object of one of four kinds (lines, smooth field, sharp-edged blobs, star) and of random contrast.

    Parameters
    ----------
    shape : (int, int)
        Pixels (y, x).
    rng : numpy.random.Generator

    Returns
    -------
    complex64 array (y, x)
        Amplitude from 0.3 to 0.95 up to 1; phase over 0.2 to 2.4 rad, of a random sign; drawn independently of the
        amplitude, or following it. The mean is real and positive.
    """
    kind = rng.choice(["lines", "field", "blobs", "star"], p=[0.35, 0.25, 0.3, 0.1])
    if kind == "lines":
        drawn = crossing_lines(shape, rng)
    elif kind == "star":
        drawn = siemens_star(shape, n_spokes=int(rng.integers(8, 40)))
    else:
        drawn = random_field(shape, rng, correlation_px=float(rng.uniform(2, 12)))
    amplitude, phase = _grey(np.abs(drawn)), _grey(np.angle(drawn))
    if kind == "blobs":
        amplitude, phase = (_blobs(grey, rng) for grey in (amplitude, phase))
    if rng.random() < 0.5:
        phase = amplitude
    darkest, turn = rng.uniform(0.3, 0.95), rng.uniform(0.1, 1.2) * rng.choice([-1, 1])
    amplitude = darkest + (1 - darkest) * amplitude
    drawn = amplitude * np.exp(1j * turn * (2 * phase - 1))
    # No pattern tells the global phase, so no label shall ask for it.
    return (drawn * np.exp(-1j * np.angle(drawn.mean()))).astype(np.complex64)


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values - values.min()) / max(float(np.ptp(values)), 1e-6)


def _blobs(grey: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    above = (grey > np.quantile(grey, rng.uniform(0.3, 0.7))).astype(np.float32)
    return gaussian_filter(above, rng.uniform(0.5, 1.5))


def varied_probe(rng: np.random.Generator, n_pixels: int = N_PIXELS) -> NDArray[np.complex64]:
    """A random probe: a disc, flat or curved, or the donut or spot of a zone plate; each a little aberrated.

    Parameters
    ----------
    rng : numpy.random.Generator
    n_pixels : int

    Returns
    -------
    complex64 array (1, N, N)
    """
    across = rng.uniform(0.3, 0.6) * n_pixels
    if rng.random() < 0.4:
        probe = disc_probe(n_pixels, diameter_px=across, edge_px=rng.uniform(1, 4))
        radius = np.hypot(*(np.indices((n_pixels, n_pixels)) - n_pixels // 2))
        probe = probe * np.exp(1j * rng.uniform(-8, 8) * (2 * radius / across) ** 2)
    else:
        outer_px = rng.uniform(0.3, 0.6) * n_pixels
        # The pupil's shadow at this defocus is as wide as `across`.
        defocus = np.pi / 4 * across * outer_px / n_pixels * rng.choice([-1, 1])
        probe = zone_plate_probe(n_pixels, outer_px=outer_px, stop_px=rng.uniform(0.2, 0.5) * outer_px, defocus=defocus)
    aberration = gaussian_filter(rng.standard_normal((n_pixels, n_pixels)), n_pixels / 8)
    aberration *= rng.uniform(0, 0.5) / aberration.std()
    return to_real_space(to_far_field(probe) * np.exp(1j * aberration)).astype(np.complex64)


def varied_scan(store: Path, seed: int) -> Scan:
    """Simulate a scan whose object, probe, path, overlap and dose are drawn at random; pure under its seed.

    Parameters
    ----------
    store : Path
        The store to make.
    seed : int

    Returns
    -------
    Scan
        Overlap (1 − step / diameter) 0.45 to 0.85, 10⁴ to 10⁹ photons in a pattern.
    """
    rng = np.random.default_rng(seed)
    probe = varied_probe(rng)
    step_px = max(2.0, (1 - rng.uniform(0.45, 0.85)) * probe_diameter_px(probe))
    reach = int(np.ceil(0.6 * step_px * np.sqrt(PATTERNS))) + N_PIXELS // 2 + 2
    return simulate(
        store,
        object=varied_object((2 * reach, 2 * reach), rng),
        probe=probe,
        n_pixels=N_PIXELS,
        n_patterns=PATTERNS,
        dose=float(10 ** rng.uniform(4, 9)),
        step_px=step_px,
        path=str(rng.choice(["random", "raster", "spiral"])),
        seed=seed,
        progress=False,
    )


def make(
    name: str,
    out: Path,
    *,
    minutes: float | None = None,
    n_scans: int = TRAINING_SCANS,
    n_judged: int = JUDGED,
    seed: int = 0,
) -> Model:
    """Train a packaged model, judge it on scans that it has not seen, and write its bundle with its card.

    Parameters
    ----------
    name : str
        One of `RECIPES`.
    out : Path
        The bundle to write; what is there is replaced when the new one is whole.
    minutes : float, optional
        Time of the training; by default the recipe's.
    n_scans : int
        Scans to train on.
    n_judged : int
        Scans to judge on.
    seed : int
        Seed of the training; the scans' seeds count from 0.

    Returns
    -------
    Model
    """
    recipe = RECIPES[name]
    spec = replace(recipe.training, max_minutes=minutes or recipe.minutes, epochs=1000, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ptychodask-recipe-") as folder:
        lessons = [varied_scan(Path(folder, f"lesson{i:03d}.zarr"), i) for i in range(n_scans)]
        trained = train([str(scan.store) for scan in lessons], spec, out=Path(folder, "trained.model"))
        judged = judge(trained, Path(folder), n_judged)
    about = {
        "recipe": name,
        "traits": trained.trained_on["traits"],
        "n_scans": n_scans,
        "n_patterns": n_scans * PATTERNS,
        "training": trained.trained_on["training"],
        "keras": trained.trained_on["keras"],
        "backend": trained.trained_on["backend"],
        "judged": judged,
    }
    model = save_model(replace(trained, trained_on=about), out, overwrite=True)
    (out / CARD).write_text(card(model, recipe.about))
    return model


def judge(model: Model, folder: Path, n_scans: int) -> dict[str, dict[str, list[float]]]:
    """Figures of a model, and of its steps alone without what the U-Net learned, on scans that it has not seen.

    Returns
    -------
    dict
        For ``trained`` and ``untrained``, by "part metric", one number for each scan.
    """
    found: dict[str, dict[str, list[float]]] = {"trained": {}, "untrained": {}}
    for number in range(n_scans):
        scan = varied_scan(folder / f"judged{number:02d}.zarr", JUDGED_SEED + number)
        models = {"trained": model, "untrained": untrained_model(model.spec, model.optics)}
        both = reconstruct(str(scan.store), models, progress=False)
        comparison = compare({label: both.sel({"method": label}) for label in models}, truth=scan, scan=scan)
        for label, figures in found.items():
            for key, value in _figures(comparison, label).items():
                figures.setdefault(key, []).append(round(value, 4))
        shutil.rmtree(str(scan.store))
    return found


def _figures(comparison: xr.Dataset, label: str) -> dict[str, float]:
    one = comparison.sel({"method": label})
    figures = {f"{part} {metric}": float(one["value"].sel(part=part, metric=metric)) for part, metric in METRICS}
    return figures | {"R": float(one["r_factor"])}


def card(model: Model, about: str) -> str:
    """What a model is, was trained on and reached, and what it must not be used for, as Markdown."""
    on, spec = model.trained_on, model.spec
    name, judged = on["recipe"], on["judged"]
    made_of = (
        f"{about} {sum(array.size for array in model.weights):,} weights; {spec.projections_before} data-consistent "
        f"steps before the U-Net, {spec.projections_after} after it. Content hash `{model.content_hash[:12]}`."
    )
    trained_on = (
        f"{on['n_scans']} simulated scans of {PATTERNS} patterns of {spec.n_pixels}², {len(model.history)} epochs in "
        f"{model.history[-1]['seconds'] / 60:.0f} minutes ({on['backend']}). {DRAWN}"
    )
    ranges = [f"| {QUANTITIES[trait].words} | {low:.3g} to {high:.3g} |" for trait, (low, high) in on["traits"].items()]
    figures = [
        f"| {key} | {_spread(values)} | {_spread(judged['untrained'][key])} |"
        for key, values in judged["trained"].items()
    ]
    lines = [
        f"# {name}",
        "",
        wrapped(made_of),
        "",
        f"Made by `python -m ptychodask.models.recipes {name} --out {name}`.",
        "",
        "## Trained on",
        "",
        wrapped(trained_on),
        "",
        "| | range |",
        "|---|---|",
        *ranges,
        "",
        "## Judged on",
        "",
        wrapped(f"{len(judged['trained']['R'])} {JUDGING}"),
        "",
        "| | trained | the same steps, U-Net of zero |",
        "|---|---|---|",
        *figures,
        "",
        "## Not for",
        "",
        *(wrapped(f"* {text}", subsequent_indent="  ") for text in NOT_FOR),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ptychodask.models.recipes", description=__doc__)
    parser.add_argument("name", choices=RECIPES, help="the packaged model to make")
    parser.add_argument("--out", type=Path, required=True, help="the bundle to write")
    parser.add_argument("--minutes", type=float, help="time of the training; by default the recipe's")
    parser.add_argument("--scans", type=int, default=TRAINING_SCANS, help="simulated scans to train on")
    parser.add_argument("--judged", type=int, default=JUDGED, help="simulated scans to judge on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    given: Any = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = make(
        given.name, given.out, minutes=given.minutes, n_scans=given.scans, n_judged=given.judged, seed=given.seed
    )
    logger.info("%s: %s", given.out, json.dumps(model.trained_on["judged"]))


if __name__ == "__main__":
    main()
