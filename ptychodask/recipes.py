"""Training recipes of the packaged models.

``python -m ptychodask.models.recipes pinn-n64-c4 --out pinn-n64-c4`` simulates scans, trains a model on them, validates
it on others and writes its bundle with a model card. A script that uses all stages; no module imports it.
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

from ptychodask.judging.compare import compare
from ptychodask.models import Model, save_model, untrained_model
from ptychodask.models.description import epochs_of
from ptychodask.models.pretrained import CARD
from ptychodask.models.training_range import QUANTITIES
from ptychodask.probes import disc_probe, probe_diameter_px, to_far_field, to_real_space, zone_plate_probe
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Scan
from ptychodask.simulate import crossing_lines, random_field, siemens_star, simulate
from ptychodask.training import TrainingSpec
from ptychodask.training.train import train

logger = logging.getLogger(__name__)


N_PIXELS = 64


PATTERNS = 256
"""Patterns of each simulated scan."""


TRAINING_SCANS = 64
"""Number of simulated training scans."""


JUDGED = 12
"""Number of validation scans; none of their objects, probes or positions is in the training scans."""


JUDGED_SEED = 1_000_000
"""Seed of the first validation scan; seeds of training scans count from 0."""


METRICS = (("amplitude", "correlation"), ("phase", "correlation"), ("amplitude", "ratio"))


wrapped = partial(fill, width=118, break_on_hyphens=False)
"""A paragraph of a card, wrapped."""


SIMULATION = (
    "Objects: crossing lines, smooth fields, sharp-edged blobs and Siemens stars, amplitudes down to 0.3, phase "
    "ranges up to 2.4 rad. Probes: discs with flat or curved phase, and defocused zone plates, slightly aberrated. "
    "Scan paths: random, raster, spiral. Poisson noise."
)
"""Description of the simulated scans, see `varied_scan`."""


VALIDATION = (
    "scans simulated in the same way, with objects, probes and positions that are not in the training scans. A global "
    "phase and a phase ramp are removed, nothing else. Median (lowest to highest) over the scans; R is "
    "Σ\\|√I_pred − √I\\| / Σ√I of the stitched object."
)
"""Description of the validation, after the number of scans."""


NOT_FOR = (
    "Scans outside of the ranges above (`reconstruct` warns about them).",
    "Scans without a well-known probe: run `ptychodask refine-probe` first.",
    "Near-field patterns, and objects thicker than one slice.",
    "Quantitative phase of features wider than the probe, which the network underestimates: polish the result "
    "(`reconstruct(..., polish=10)`).",
)
"""Limits of the packaged models, for their cards."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings of a packaged model."""

    training: TrainingSpec

    minutes: float
    """Training time; the learning rate decreases with time."""

    about: str
    """One-sentence description for its card."""


RECIPES = {
    "pinn-n64-c4": Recipe(
        training=TrainingSpec(model="pinn", members=4),
        minutes=27,
        about="Reads four neighbouring patterns (gridsize 2); trained only on patterns, through the forward model.",
    ),
    "pinn-n64-c1": Recipe(
        training=TrainingSpec(model="pinn", members=1),
        minutes=12,
        about="Reads one pattern (gridsize 1); trained only on patterns, through the forward model.",
    ),
    "baseline-n64-c1": Recipe(
        training=TrainingSpec(model="baseline"),
        minutes=12,
        about="Reads one pattern (gridsize 1); supervised, trained on patches of the simulated objects.",
    ),
}
"""The packaged models by name."""


def varied_object(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """Random object: lines, smooth field, sharp-edged blobs or star, of random contrast.

    Parameters
    ----------
    shape : (int, int)
        Pixels (y, x).
    rng : numpy.random.Generator

    Returns
    -------
    complex64 array (y, x)
        Amplitude from a minimum (0.3 to 0.95) to 1; phase range 0.2 to 2.4 rad, of random sign; independent of the
        amplitude or a linear function of it. The mean is real and positive.
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
    # Patterns do not determine the global phase, so the labels must not contain a random one.
    return (drawn * np.exp(-1j * np.angle(drawn.mean()))).astype(np.complex64)


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values - values.min()) / max(float(np.ptp(values)), 1e-6)


def _blobs(grey: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    above = (grey > np.quantile(grey, rng.uniform(0.3, 0.7))).astype(np.float32)
    return gaussian_filter(above, rng.uniform(0.5, 1.5))


def varied_probe(rng: np.random.Generator, n_pixels: int = N_PIXELS) -> NDArray[np.complex64]:
    """Random probe: disc or defocused zone plate, slightly aberrated.

    Parameters
    ----------
    rng : numpy.random.Generator
    n_pixels : int

    Returns
    -------
    complex64 array (1, N, N)
    """
    diameter_px = rng.uniform(0.3, 0.6) * n_pixels
    if rng.random() < 0.4:
        probe = disc_probe(n_pixels, diameter_px=diameter_px, edge_px=rng.uniform(1, 4))
        radius = np.hypot(*(np.indices((n_pixels, n_pixels)) - n_pixels // 2))
        probe = probe * np.exp(1j * rng.uniform(-8, 8) * (2 * radius / diameter_px) ** 2)
    else:
        outer_px = rng.uniform(0.3, 0.6) * n_pixels
        # At this defocus the pupil's shadow has the diameter `diameter_px`.
        defocus = np.pi / 4 * diameter_px * outer_px / n_pixels * rng.choice([-1, 1])
        probe = zone_plate_probe(n_pixels, outer_px=outer_px, stop_px=rng.uniform(0.2, 0.5) * outer_px, defocus=defocus)
    aberration = gaussian_filter(rng.standard_normal((n_pixels, n_pixels)), n_pixels / 8)
    aberration *= rng.uniform(0, 0.5) / aberration.std()
    return to_real_space(to_far_field(probe) * np.exp(1j * aberration)).astype(np.complex64)


def varied_scan(store: Path, seed: int) -> Scan:
    """Simulate a scan with random object, probe, path, overlap and dose.

    The scan depends only on the seed.

    Parameters
    ----------
    store : Path
        Store to create.
    seed : int

    Returns
    -------
    Scan
        Overlap (1 − step / diameter) 0.45 to 0.85, 10⁴ to 10⁹ photons per pattern.
    """
    rng = np.random.default_rng(seed)
    probe = varied_probe(rng)
    step_px = max(2.0, (1 - rng.uniform(0.45, 0.85)) * probe_diameter_px(probe))
    half_px = int(np.ceil(0.6 * step_px * np.sqrt(PATTERNS))) + N_PIXELS // 2 + 2
    return simulate(
        store,
        object=varied_object((2 * half_px, 2 * half_px), rng),
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
    """Train and validate a packaged model, and write its bundle with card.

    Parameters
    ----------
    name : str
        One of `RECIPES`.
    out : Path
        Bundle to write; an existing one is replaced once the new one is complete.
    minutes : float, optional
        Training time; by default the recipe's.
    n_scans : int
        Number of training scans.
    n_judged : int
        Number of validation scans.
    seed : int
        Seed of the training; the scans' seeds count from 0.

    Returns
    -------
    Model
    """
    recipe = RECIPES[name]
    spec = replace(recipe.training, max_minutes=minutes or recipe.minutes, epochs=1000, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ptychodask-recipe-") as folder:
        scans = [varied_scan(Path(folder, f"scan{i:03d}.zarr"), i) for i in range(n_scans)]
        trained = train([str(scan.store) for scan in scans], spec, out=Path(folder, "trained.model"))
        judged = judge(trained, Path(folder), n_judged)
    trained_on = {
        "recipe": name,
        "traits": trained.trained_on["traits"],
        "n_scans": n_scans,
        "n_patterns": n_scans * PATTERNS,
        "training": trained.trained_on["training"],
        "keras": trained.trained_on["keras"],
        "backend": trained.trained_on["backend"],
        "judged": judged,
    }
    model = save_model(replace(trained, trained_on=trained_on), out, overwrite=True)
    (out / CARD).write_text(card(model, recipe.about))
    return model


def judge(model: Model, folder: Path, n_scans: int) -> dict[str, dict[str, list[float]]]:
    """Metrics of a model with trained and untrained U-Net on validation scans.

    With the untrained U-Net (output 0) only the data-consistency steps act.

    Returns
    -------
    dict
        For ``trained`` and ``untrained``, by "part metric", one value per scan.
    """
    metrics: dict[str, dict[str, list[float]]] = {"trained": {}, "untrained": {}}
    for number in range(n_scans):
        scan = varied_scan(folder / f"judged{number:02d}.zarr", JUDGED_SEED + number)
        models = {"trained": model, "untrained": untrained_model(model.spec, model.optics)}
        both = reconstruct(str(scan.store), models, progress=False)
        comparison = compare({label: both.sel(network=label) for label in models}, truth=scan, scan=scan)
        for label, values in metrics.items():
            for key, value in _metrics(comparison, label).items():
                values.setdefault(key, []).append(round(value, 4))
        shutil.rmtree(str(scan.store))
    return metrics


def _metrics(comparison: xr.Dataset, label: str) -> dict[str, float]:
    method = comparison.sel({"method": label})
    values = {f"{part} {metric}": float(method["value"].sel(part=part, metric=metric)) for part, metric in METRICS}
    return values | {"R": float(method["r_factor"])}


def card(model: Model, about: str) -> str:
    """Model card as Markdown: architecture, training data, validation and limits."""
    record, spec = model.trained_on, model.spec
    name, judged = record["recipe"], record["judged"]
    architecture = (
        f"{about} {sum(array.size for array in model.weights):,} weights; {spec.projections_before} data-consistency "
        f"steps before the U-Net, {spec.projections_after} after it. Content hash `{model.content_hash[:12]}`."
    )
    trained_on = (
        f"{record['n_scans']} simulated scans of {PATTERNS} patterns of {spec.n_pixels} x {spec.n_pixels} pixels, "
        f"{epochs_of(model.history)} epochs in {model.history[-1]['seconds'] / 60:.0f} minutes ({record['backend']}). "
        f"{SIMULATION}"
    )
    ranges = [
        f"| {QUANTITIES[quantity].words} | {low:.3g} to {high:.3g} |"
        for quantity, (low, high) in record["traits"].items()
    ]
    metrics = [
        f"| {key} | {_spread(values)} | {_spread(judged['untrained'][key])} |"
        for key, values in judged["trained"].items()
    ]
    lines = [
        f"# {name}",
        "",
        wrapped(architecture),
        "",
        f"Trained with `python -m ptychodask.models.recipes {name} --out {name}`.",
        "",
        "## Training data",
        "",
        wrapped(trained_on),
        "",
        "| | range |",
        "|---|---|",
        *ranges,
        "",
        "## Validation",
        "",
        wrapped(f"{len(judged['trained']['R'])} {VALIDATION}"),
        "",
        "| | trained | the same steps with an untrained U-Net |",
        "|---|---|---|",
        *metrics,
        "",
        "## Not for",
        "",
        *(wrapped(f"* {text}", subsequent_indent="  ") for text in NOT_FOR),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ptychodask.models.recipes", description=__doc__)
    parser.add_argument("name", choices=RECIPES, help="packaged model to train")
    parser.add_argument("--out", type=Path, required=True, help="bundle to write")
    parser.add_argument("--minutes", type=float, help="training time; by default the recipe's")
    parser.add_argument("--scans", type=int, default=TRAINING_SCANS, help="number of simulated training scans")
    parser.add_argument("--judged", type=int, default=JUDGED, help="number of simulated validation scans")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    arguments: Any = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = make(
        arguments.name,
        arguments.out,
        minutes=arguments.minutes,
        n_scans=arguments.scans,
        n_judged=arguments.judged,
        seed=arguments.seed,
    )
    logger.info("%s: %s", arguments.out, json.dumps(model.trained_on["judged"]))


if __name__ == "__main__":
    main()
