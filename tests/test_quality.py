"""How good objects are where nobody has looked: unseen patterns, unseen objects, few photons; run by .ci/long."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.optimize import minimize

from ptychodask.forward import r_factor
from ptychodask.io import ingest
from ptychodask.iterative import refine_probe
from ptychodask.judging.compare import compare
from ptychodask.judging.metrics import contrast_radius, spoke_contrast
from ptychodask.models import ModelSpec, Optics
from ptychodask.models.untrained import untrained_model
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.training import train

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]

STAR_MINUTES = 6.0

PROBE_EPOCHS = 1

DOSE_EPOCHS = 2

DOSES = (1e4, 1e5, 1e6, 1e9)

LOSSES = ("amplitude", "mae", "poisson")

CIRCLES_PX = (60, 140)
"""Radii where all spokes of the real star are lit and none has a gap."""

OUTER_PX = (110, 150)
"""Radii whose contrast is the outer one: within the ring of gaps and the ends of the two short spokes."""

BANDS = {"up to 0.02": (0.0, 0.02), "0.02 to 0.1": (0.02, 0.1), "0.1 to 0.25": (0.1, 0.25)}
"""Spatial frequencies, cycles per pixel, whose ring correlations are averaged."""


def told(*cells):
    print(
        "| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def untrained(scan, **fields):
    """The network before training: its U-Net answers zero, so that its projections are all that it does."""
    return untrained_model(ModelSpec(n_pixels=scan.n_pixels, **fields), Optics.of(scan))


def flat(scan):
    """A network that answers with the flat object, whatever it is shown."""
    return untrained(scan, projections_before=0, projections_after=0)


def r_of(ds, scan, patterns):
    return r_factor(ds["object"].values, (float(ds["y"][0]), float(ds["x"][0])), scan, patterns)


def phase_of(ds):
    """Phase from its mean on, radians."""
    object_, weight = ds["object"].values, ds["weight"].values
    return np.angle(object_ * np.exp(-1j * np.angle(np.nansum(object_ * (weight > 0.1 * np.nanmedian(weight))))))


def harmonics(phase, centre_yx_px):
    """Mean modulus of the Fourier components along the circles of `CIRCLES_PX`."""
    radius, angle = np.arange(*CIRCLES_PX, 2)[:, None], np.linspace(0, 2 * np.pi, 512, endpoint=False)
    place = [centre_yx_px[0] + radius * np.sin(angle), centre_yx_px[1] + radius * np.cos(angle)]
    return np.abs(np.fft.rfft(map_coordinates(phase, place, order=1), axis=1)).mean(axis=0)


def find_star(phase):
    """Centre (y, x) in pixels of the array and number of spokes: where a harmonic above the 8th is strongest."""
    middle = np.array(phase.shape) / 2
    tried = [middle + step for step in itertools.product(np.arange(-40, 41, 4), repeat=2)]
    found = np.array([harmonics(np.nan_to_num(phase), centre)[8:61] for centre in tried])
    place, strongest = np.unravel_index(found.argmax(), found.shape)
    n_spokes = int(strongest) + 8

    def faint(centre):
        radius, contrast = spoke_contrast(phase, tuple(centre), n_spokes)
        return -contrast[(radius >= CIRCLES_PX[0]) & (radius <= CIRCLES_PX[1])].mean()

    best = minimize(faint, tried[place], method="Nelder-Mead", options={"xatol": 0.05, "fatol": 1e-5})
    return tuple(best.x), n_spokes


def half_contrast(ds):
    """Where the star is (y, x, pixels of the array), its spokes, their outer contrast (rad) and the radius of half."""
    phase = phase_of(ds)
    centre, n_spokes = find_star(phase)
    radius, contrast = spoke_contrast(phase, centre, n_spokes)
    outer = contrast[(radius >= OUTER_PX[0]) & (radius <= OUTER_PX[1])].mean()
    return centre, n_spokes, float(outer), contrast_radius(radius, contrast, OUTER_PX)


def test_the_siemens_star_explains_patterns_that_nobody_saw(shared, tmp_path):
    store = tmp_path / "star.zarr"
    n_patterns = ingest(shared / "data" / "siemens-star-small.npz.bz2", store, progress=False).n_patterns
    unseen = np.sort(np.random.default_rng(0).permutation(n_patterns)[: round(0.2 * n_patterns)])
    seen = np.setdiff1d(np.arange(n_patterns), unseen)
    refine_probe(store, exclude=unseen, progress=False)
    scan = open_scan(store)
    network = train(store, max_minutes=STAR_MINUTES, exclude=unseen, progress=False)
    starts = {"network": network, "untrained": untrained(scan), "flat": flat(scan)}
    made = {}
    for (name, model), polish in itertools.product(starts.items(), (0, 2, 10)):
        out = tmp_path / f"{name}{polish}.zarr"
        made[f"{name}, polish={polish}"] = reconstruct(
            store, model, drop=unseen, polish=polish, out=out, progress=False
        )
    made["10 sweeps from flat"] = reconstruct_iterative(store, n_sweeps=10, exclude=unseen, progress=False)
    told("object", f"R of {len(unseen)} unseen", f"R of {len(seen)} seen", "centre", "spokes", "outer", "half at px")
    found = {}
    for name, ds in made.items():
        found[name] = r_of(ds, scan, unseen)
        centre, n_spokes, outer, half_px = half_contrast(ds) if name != "flat, polish=0" else ((0, 0), 0, 0.0, 0.0)
        told(name, found[name], r_of(ds, scan, seen), np.round(centre, 1), n_spokes, outer, round(half_px, 1))
        if name == "network, polish=10":
            assert n_spokes == 30
            assert half_px <= 45
    assert found["network, polish=0"] <= 0.21
    assert found["network, polish=10"] <= 0.18
    assert found["network, polish=10"] < found["10 sweeps from flat"]


def figures(results, store):
    """Figures against the truth by result: correlations, ratio, ring correlations of the phase, R; printed."""
    judged = compare(results, truth=store, scan=store)
    told("object", "amplitude", "ratio", "SSIM", "phase", "SSIM", *(f"phase FRC {band}" for band in BANDS), "R")
    rows = {}
    for name in results:
        of = judged["value"].sel({"method": name})
        curve = judged["frc"].sel({"method": name, "part": "phase"})
        rings = [
            float(curve[(curve["frequency"] > low) & (curve["frequency"] <= high)].mean())
            for low, high in BANDS.values()
        ]
        row = [
            float(of.sel(part=part, metric=metric))
            for part, metric in (
                ("amplitude", "correlation"),
                ("amplitude", "ratio"),
                ("amplitude", "ssim"),
                ("phase", "correlation"),
                ("phase", "ssim"),
            )
        ]
        rows[name] = dict(zip(("amplitude", "ratio", "amplitude SSIM", "phase", "phase SSIM"), row, strict=True))
        rows[name] |= dict(zip(BANDS, rings, strict=True)) | {"R": float(judged["r_factor"].sel({"method": name}))}
        told(name, *rows[name].values())
    return rows


def lines(folder, *, seed, **fields):
    """A simulated scan of crossing lines that the seed draws."""
    store = folder / f"seed{seed}.zarr"
    simulate(store, seed=seed, step_px=7.0, progress=False, **fields)
    return store


@pytest.mark.parametrize("probe", ["zone plate", "measured"])
def test_lines_that_nobody_saw_are_recognised_under_a_structured_probe(probe, request, tmp_path):
    light = "zone_plate"
    if probe == "measured":
        with np.load(request.getfixturevalue("shared") / "data" / "Run1084_recon3_postPC.npz") as file:
            light = file["probeGuess"]
    lesson = lines(tmp_path, seed=1, probe=light, dose=1e6, n_patterns=1500)
    store = lines(tmp_path, seed=2, probe=light, dose=1e6, n_patterns=700)
    scan = open_scan(store)
    results = {
        "untrained": reconstruct(store, untrained(scan), progress=False),
        "60 projections": reconstruct(store, untrained(scan, projections_before=60), progress=False),
    }
    for members in (1, 4):
        out = tmp_path / f"{members}.model"
        network = train(lesson, members=members, epochs=PROBE_EPOCHS, out=out, progress=False)
        for polish in (0, 10):
            made = reconstruct(store, network, polish=polish, progress=False)
            results[f"gridsize {round(members**0.5)}, polish={polish}"] = made
    results["flat, polish=10"] = reconstruct(store, flat(scan), polish=10, progress=False)
    results["10 sweeps from flat"] = reconstruct_iterative(store, n_sweeps=10, progress=False)
    print(f"\n{probe}")
    found = figures(results, store)
    assert found["gridsize 2, polish=0"]["amplitude"] >= 0.95
    assert found["gridsize 2, polish=10"]["up to 0.02"] > found["gridsize 2, polish=0"]["up to 0.02"]
    assert found["gridsize 2, polish=10"]["phase"] > found["gridsize 2, polish=0"]["phase"]


def test_figures_fall_smoothly_with_the_dose_whatever_the_loss(tmp_path):
    found = {}
    for dose in DOSES:
        folder = tmp_path / f"{dose:g}"
        folder.mkdir()
        lesson = lines(folder, seed=1, probe="zone_plate", dose=dose, n_patterns=400)
        store = lines(folder, seed=2, probe="zone_plate", dose=dose, n_patterns=200)
        results = {"untrained": reconstruct(store, untrained(open_scan(store)), progress=False)}
        for loss in LOSSES:
            out = folder / f"{loss}.model"
            network = train(lesson, loss=loss, epochs=DOSE_EPOCHS, out=out, progress=False)
            results[loss] = reconstruct(store, network, progress=False)
        results["10 sweeps from flat"] = reconstruct_iterative(store, n_sweeps=10, progress=False)
        print(f"\n{dose:g} photons")
        found[dose] = figures(results, store)
    for loss in LOSSES:
        rows = [found[dose][loss] for dose in DOSES]
        assert np.isfinite([list(row.values()) for row in rows]).all()
        for name in ("amplitude", "phase"):
            # More photons make no figure worse by more than what two trainings differ by.
            assert all(more[name] > less[name] - 0.03 for less, more in itertools.pairwise(rows)), (loss, name)
        assert rows[0]["amplitude"] >= 0.75
        assert rows[0]["phase"] >= 0.4
        assert all(row["ratio"] == pytest.approx(1, abs=0.05) for row in rows)
