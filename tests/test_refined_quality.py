"""How good refined objects are, with the defaults of `reconstruct` and a packaged network; run by .ci/long."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from ptychodask.forward import r_factor
from ptychodask.io import ingest
from ptychodask.iterative import refine_probe
from ptychodask.judging.compare import compare
from ptychodask.models import ModelSpec, Optics
from ptychodask.models.untrained import untrained_model
from ptychodask.probes import defocused, illuminated_radius_px
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000), pytest.mark.usefixtures("with_refinement")]

NETWORK = "pretrained:pinn-n64-c4"

PLAIN = {"polish": 0, "slow_phase": False}


def told(*cells):
    print(
        "| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def figures(results, truth):
    """Correlations, SSIM and ring correlation of the phase up to 0.02 cycles per pixel, by result."""
    judged = compare(results, truth=truth)
    label = judged["value"].dims[0]
    found = {}
    for name in results:
        value = judged["value"].sel({label: name})
        curve = judged["frc"].sel({label: name, "part": "phase"})
        slow = float(curve[(curve["frequency"] > 0) & (curve["frequency"] <= 0.02)].mean())
        row = {
            f"{part} {metric}": float(value.sel(part=part, metric=metric))
            for part in ("amplitude", "phase")
            for metric in ("correlation", "ssim")
        }
        found[name] = row | {"slow": slow}
        told(name, *found[name].values())
    return found


def stages_of(ds):
    return [(one["stage"], one["misfit"], one["kept"]) for one in ds.ptycho.records["refinement"]["stages"]]


@pytest.fixture(scope="module")
def measured_probe(shared):
    with np.load(shared / "data" / "Run1084_recon3_postPC.npz") as file:
        return file["probeGuess"]


@pytest.fixture
def probe_of(measured_probe):
    return lambda name: measured_probe if name == "measured" else name


@pytest.mark.parametrize(("probe", "phase"), [("measured", 0.98), ("zone_plate", 0.99), ("disc", 0.99)])
def test_the_slow_phase_is_right_with_the_defaults(probe, phase, probe_of, tmp_path):
    store = tmp_path / "scan.zarr"
    simulate(store, seed=2, step_px=7.0, probe=probe_of(probe), dose=1e6, n_patterns=700, progress=False)
    results = {
        "network": reconstruct(store, NETWORK, **PLAIN, progress=False),
        "refined": reconstruct(store, NETWORK, progress=False),
        "iterative, 6 sweeps": reconstruct_iterative(store, n_sweeps=6, progress=False),
        "iterative": reconstruct_iterative(store, progress=False),
    }
    print(f"\n{probe}: {stages_of(results['refined'])}")
    found = figures(results, store)
    assert found["refined"]["phase correlation"] >= phase
    assert found["refined"]["slow"] >= 0.985
    assert found["refined"]["amplitude correlation"] >= found["network"]["amplitude correlation"] - 0.002
    assert found["iterative, 6 sweeps"]["phase correlation"] >= (0.936 if probe == "measured" else 0.98)


@pytest.mark.parametrize("probe", ["measured", "zone_plate"])
@pytest.mark.parametrize("dose", [1e4, 1e5, 1e6, 1e9])
def test_few_photons_are_not_made_worse(probe, dose, probe_of, tmp_path):
    store = tmp_path / "scan.zarr"
    simulate(store, seed=2, step_px=7.0, probe=probe_of(probe), dose=dose, n_patterns=700, progress=False)
    results = {
        "network": reconstruct(store, NETWORK, **PLAIN, progress=False),
        "refined": reconstruct(store, NETWORK, progress=False),
        "iterative": reconstruct_iterative(store, progress=False),
    }
    print(f"\n{probe}, {dose:g} photons: {stages_of(results['refined'])}")
    found = figures(results, store)
    assert found["refined"]["amplitude correlation"] >= found["network"]["amplitude correlation"] - 0.002
    assert found["refined"]["phase correlation"] >= found["network"]["phase correlation"]
    if (probe, dose) == ("measured", 1e5):
        assert found["refined"]["phase correlation"] >= 0.95


CASES = ("positions", "defocus", "step", "modes", "mask")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_scan_costs_little(case, measured_probe, tmp_path):
    """Positions off by 0.5 px rms, a stored probe out of focus, a step of 12 px, two modes, 5 % bad pixels."""
    rng = np.random.default_rng(3)
    light = measured_probe.reshape(1, 64, 64)
    if case == "modes":
        light = np.concatenate([light, 0.4 * np.roll(light, 5, axis=1) * np.exp(1j * np.arange(64) / 9)])
    step = 12.0 if case == "step" else 7.0
    scan = simulate(tmp_path / "true.zarr", seed=2, step_px=step, probe=light, dose=1e6, n_patterns=700, progress=False)
    position, probe, counts, mask = scan.position_yx_px, scan.probe, scan.diffraction[:], None
    if case == "positions":
        position = position + rng.normal(0, 0.5, position.shape)
    if case == "defocus":
        probe = defocused(probe, 3.0)
    if case == "mask":
        mask = rng.random((64, 64)) > 0.05
        counts[:, ~mask] = 60_000
    store = tmp_path / "scan.zarr"
    fields = {"diffraction": counts, "position_yx_px": position, "probe": probe, "domain": "counts", "mask": mask}
    write_scan(store, **fields, calibration="as_given", progress=False)
    results = {
        "network": reconstruct(store, NETWORK, **PLAIN, progress=False),
        "refined": reconstruct(store, NETWORK, progress=False),
    }
    print(f"\n{case}: {stages_of(results['refined'])}")
    found = figures(results, tmp_path / "true.zarr")
    assert found["refined"]["phase correlation"] >= 0.93


def test_the_unseen_half_of_lines64(shared, tmp_path):
    store = tmp_path / "lines.zarr"
    scan = ingest(shared / "data" / "lines64_train.npz", store, progress=False)
    y, x = scan.position_yx_px.T
    radius = illuminated_radius_px(scan.probe)
    left = x[x > np.quantile(x, 0.55)].min() - radius

    def unseen(ds):
        inside = (ds["y"] >= y.min() - radius) & (ds["y"] < y.max() + radius)
        return ds.isel(y=inside.values, x=((ds["x"] >= left) & (ds["x"] < x.max() + radius)).values)

    bundle = shared / "reference" / "ptychopinn_bundle"
    results = {
        "network": reconstruct(store, NETWORK, **PLAIN, progress=False),
        "refined": reconstruct(store, NETWORK, progress=False),
        "bundle": reconstruct(store, bundle, **PLAIN, progress=False),
        "bundle, refined": reconstruct(store, bundle, progress=False),
        "iterative": reconstruct_iterative(store, progress=False),
    }
    print(f"\nlines64: {stages_of(results['refined'])}\n{stages_of(results['bundle, refined'])}")
    found = figures({name: unseen(ds) for name, ds in results.items()}, store)
    assert found["refined"]["phase correlation"] >= 0.99
    assert found["refined"]["phase ssim"] >= 0.94
    assert found["refined"]["amplitude ssim"] >= 0.99
    assert found["bundle, refined"]["phase correlation"] >= 0.95


def test_unseen_patterns_of_the_star(shared, tmp_path):
    found = []
    for seed in range(5):
        store = tmp_path / f"star{seed}.zarr"
        n_patterns = ingest(shared / "data" / "siemens-star-small.npz.bz2", store, progress=False).n_patterns
        unseen = np.sort(np.random.default_rng(seed).permutation(n_patterns)[: round(0.2 * n_patterns)])
        refine_probe(store, exclude=unseen, progress=False)
        scan = open_scan(store)
        network = untrained_model(ModelSpec(n_pixels=scan.n_pixels), Optics.of(scan))
        ds = reconstruct(store, network, drop=unseen, progress=False)
        iterative = reconstruct_iterative(store, exclude=unseen, progress=False)
        found.append([r_of(one, scan, unseen) for one in (ds, iterative)])
        told(seed, *found[-1], stages_of(ds))
    told("mean", *np.mean(found, axis=0))
    assert np.mean(found, axis=0)[0] <= 0.175


def r_of(ds: xr.Dataset, scan, patterns):
    return r_factor(ds["object"].values, (float(ds["y"][0]), float(ds["x"][0])), scan, patterns)


def test_halves_share_nothing_but_the_object(tmp_path):
    """Patterns beyond a radius are pure noise: there the halves of the refined object do not correlate."""
    scan = simulate(tmp_path / "true.zarr", seed=2, step_px=6.0, probe="disc", dose=1e5, n_patterns=900, progress=False)
    counts = scan.diffraction[:].astype(np.int64)
    y, x = np.indices((64, 64)) - 32
    outer = np.hypot(y, x) > 10
    counts[:, outer] = np.random.default_rng(0).poisson(counts[:, outer].mean(), (900, int(outer.sum())))
    store = tmp_path / "noise.zarr"
    fields = {"diffraction": counts.astype(np.uint16), "position_yx_px": scan.position_yx_px, "probe": scan.probe}
    write_scan(store, **fields, domain="counts", calibration="as_given", progress=False)
    found = {}
    for name, options in (("plain", PLAIN), ("refined", {})):
        ds = reconstruct(store, NETWORK, split_half=True, progress=False, **options)
        first, second = (ds["object_half"].values[half] for half in range(2))
        seen = np.isfinite(first) & np.isfinite(second)
        first, second = (np.where(seen, one, one[seen].mean()) - one[seen].mean() for one in (first, second))
        f = [
            np.fft.fft2(one[40:-40, 40:-40] * np.hanning(one.shape[0] - 80)[:, None] * np.hanning(one.shape[1] - 80))
            for one in (first, second)
        ]
        ky, kx = np.fft.fftfreq(f[0].shape[0])[:, None], np.fft.fftfreq(f[0].shape[1])
        ring = np.hypot(ky, kx)
        found[name] = [
            float(
                abs((f[0] * f[1].conj())[band].sum())
                / np.sqrt((abs(f[0]) ** 2)[band].sum() * (abs(f[1]) ** 2)[band].sum())
            )
            for band in ((ring > low) & (ring <= low + 0.05) for low in np.arange(0, 0.5, 0.05))
        ]
        told(name, *found[name])
    high = np.array(found["plain"]) < 0.2
    assert high.any()
    assert np.abs(np.array(found["refined"])[high]).max() < 0.25


def test_particles_of_an_electron_scan_have_mass(shared, tmp_path):
    store = tmp_path / "rotavirus.zarr"
    keys = {"diffraction": "diffraction", "position": "epie_positions_px", "probe": "epie_probe"}
    ingest(shared / "data" / "rotavirus_N64.h5", store, keys=keys, units="px", domain="counts", progress=False)
    plain, refined = (reconstruct(store, NETWORK, progress=False, **options) for options in (PLAIN, {}))
    print(stages_of(refined))
    stages = refined.ptycho.records["refinement"]["stages"]
    kept = [one["misfit"] for one in stages if one["kept"]]
    assert kept[-1] < kept[0]
    told(*(r_of(ds, open_scan(store), np.arange(0, 16000, 40)) for ds in (plain, refined)))
