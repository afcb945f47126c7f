"""Trainings on real scans from the command line, with the figures they must reach; run by .ci/long."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ptychodask.forward import diffract, r_factor, r_ratio, r_sums
from ptychodask.judging.compare import compare
from ptychodask.models import load_model
from ptychodask.probes import illuminated_radius_px
from ptychodask.result import open_result
from ptychodask.store import open_scan
from ptychodask.store.groups import group
from ptychodask.training import member_offsets

pytestmark = pytest.mark.long

MINUTES = "9"


def run(*arguments):
    command = [sys.executable, "-c", "from ptychodask.cli import main; main()", *map(str, arguments)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def seed_patches(store):
    """The network's own patch of each group's seed, and the measured amplitudes they belong to."""
    scan = open_scan(store)
    model = load_model(store.with_name("star.pinn.model")).bind(scan)
    member = group(store).member
    patches = np.empty((len(member), scan.n_pixels, scan.n_pixels), np.complex64)
    for start in range(0, len(member), 64):
        part = member[start : start + 64]
        x = np.moveaxis(scan.network_input(part.ravel()).reshape(*part.shape, *patches.shape[1:]), 1, -1)
        patches[start : start + 64] = model.predict(x, member_offsets(scan, part))[:, 0]
    return patches, scan.probe, scan.amplitude(member[:, 0])


def patch_r_factor(patches, probe, amplitude):
    """R of patterns predicted from single patches."""
    model = np.sqrt(diffract(probe * patches[:, None]))
    return r_ratio(*(float(sums.sum()) for sums in r_sums(model - amplitude, amplitude)), "star")


def test_the_siemens_star_is_explained(shared, tmp_path):
    store = tmp_path / "star.zarr"
    run("ingest", shared / "data" / "siemens-star-small.npz.bz2", store)
    run("refine-probe", store)
    run("train", store, "--max-minutes", MINUTES)
    run("reconstruct", store)
    ds = open_result(tmp_path / "star.object.zarr")
    stitched = r_factor(ds["object"].values, (float(ds["y"][0]), float(ds["x"][0])), open_scan(store))
    patches = patch_r_factor(*seed_patches(store))
    print(f"Siemens star: R {patches:.4f} of the network's patches, {stitched:.4f} of the stitched object")
    assert patches <= 0.21
    assert stitched <= 0.22


def test_unseen_lines_are_recognised(shared, tmp_path):
    store = tmp_path / "lines.zarr"
    run("ingest", shared / "data" / "lines64_train.npz", store)
    run("train", store, "--validation", "right", "--validation-fraction", "0.45", "--max-minutes", MINUTES)
    scan = open_scan(store)
    y, x = scan.position_yx_px.T
    radius = illuminated_radius_px(scan.probe)
    unseen = x > np.quantile(x, 0.55)
    box = [y.min() - radius, y.max() + radius, x[unseen].min() - radius, x.max() + radius]
    run("reconstruct", store, "--roi", ",".join(str(int(value)) for value in np.ceil(box)))
    found = compare({"pinn": tmp_path / "lines.object.zarr"}, truth=scan)["value"].sel({"method": "pinn"})
    amplitude, phase = (float(found.sel(part=part, metric="correlation")) for part in ("amplitude", "phase"))
    ratio = float(found.sel(part="amplitude", metric="ratio"))
    print(f"lines64, unseen half: correlation {amplitude:.3f} amplitude, {phase:.3f} phase, ratio {ratio:.3f}")
    assert amplitude >= 0.6
    assert phase >= 0.35
    assert ratio == pytest.approx(1, abs=0.05)
