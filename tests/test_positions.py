"""Refined positions and flux: the derivatives, whole runs, and positions that are applied to the scan."""

from __future__ import annotations

import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import zarr
from models_for_tests import LinearModel
from scipy.ndimage import gaussian_filter

from ptychodask import apply_positions
from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts
from ptychodask.grouping import GroupingSpec
from ptychodask.inspection import inspect_file
from ptychodask.reassembly import Box
from ptychodask.reconstruction import reconstruct, stages
from ptychodask.refinement.positions import affine_step, position_steps, position_sums, source_box, stretched
from ptychodask.result import open_result
from ptychodask.scan import Scan
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, annotate, open_scan
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

N = 16
CORNER = (-20, -20)
RUN = {"polish": "auto", "slow_phase": False, "refine_positions": True, "tile": 64, "groups_per_chunk": 60}


def smooth_object(seed, shape=(80, 80)):
    rng = np.random.default_rng(seed)
    real, imaginary = (gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(2))
    return ((0.9 + 0.5 * real) * np.exp(4j * imaginary)).astype(np.complex64)


def small_probe(modes):
    y, x = np.mgrid[:N, :N] - N // 2
    spot = np.exp(-(y**2 + x**2) / 18 + 0.05j * (y**2 + x**2))
    return np.stack([spot, 0.4 * spot * x / 3][:modes]).astype(np.complex64) * 30


def scan_of(object_, position, domain="counts", modes=1, mask=None, flux=None):
    """A scan without noise."""
    probe = small_probe(modes)
    counts = np.array([expected_counts(object_, CORNER, probe, one) for one in position])
    counts *= 1 if flux is None else flux[:, None, None]
    return Scan(
        diffraction=(counts if domain == "counts" else np.sqrt(counts)).astype(np.float32),
        position_yx_px=position,
        probe=probe,
        domain=domain,
        normalization=1.0,
        mask=mask,
        flux=flux,
    )


def some_positions(k, seed=0):
    return np.random.default_rng(seed).uniform(2, 35, size=(k, 2))


def sums_of(object_, scan):
    everyone = np.arange(scan.n_patterns)
    return position_sums(object_, CORNER, scan, everyone, np.ones(len(everyone), bool))


def misfits(object_, scan, position, flux=1.0):
    """Half the sum of squares of the amplitude, or a quarter of the Poisson likelihood, for each pattern."""
    found = []
    for measured, place in zip(scan.diffraction, position, strict=True):
        model = flux * expected_counts(object_.astype(complex), CORNER, scan.probe.astype(complex), place)
        n = measured.astype(float)
        each = (model - n * np.log(model)) / 4 if scan.domain == "counts" else (n - np.sqrt(model)) ** 2 / 2
        found.append(each.sum() if scan.mask is None else each[scan.mask].sum())
    return np.array(found)


def half_masked():
    mask = np.random.default_rng(5).random((N, N)) > 0.3
    mask[N // 2, N // 2] = False
    return mask


CASES = {
    "counts": {},
    "amplitudes": {"domain": "amplitude"},
    "mask": {"mask": half_masked()},
    "modes": {"modes": 2},
    "amplitudes, mask and modes": {"domain": "amplitude", "mask": half_masked(), "modes": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_slope_of_positions_is_that_of_the_misfit(case):
    measured = scan_of(smooth_object(0), some_positions(4), **CASES[case])
    guess = smooth_object(1)
    scan = replace(measured, position_yx_px=measured.position_yx_px + 0.13)
    slope = sums_of(guess, scan).slope
    step = 1e-3
    for axis in range(2):
        away = step * np.eye(2)[axis]
        higher, lower = (misfits(guess, scan, scan.position_yx_px + sign * away) for sign in (1, -1))
        expected = -(higher - lower) / (2 * step)
        np.testing.assert_allclose(slope[:, axis], expected, rtol=0.02, atol=0.01 * np.abs(slope).max())


@pytest.mark.parametrize("case", CASES)
def test_steps_lead_to_the_true_positions(case):
    true = some_positions(40, seed=2)
    object_ = smooth_object(0)
    scan = scan_of(object_, true, **CASES[case])
    error = np.random.default_rng(3).uniform(-0.4, 0.4, true.shape)
    error -= error.mean(axis=0)
    for _ in range(3):
        error = error + position_steps(sums_of(object_, replace(scan, position_yx_px=true + error)))
    assert np.sqrt((error**2).mean()) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_the_best_flux_is_the_minimum_of_the_misfit(case):
    flux = np.array([0.7, 1.0, 1.3], np.float32)
    object_, guess = smooth_object(0), smooth_object(1)
    scan = scan_of(object_, some_positions(3), flux=flux, **CASES[case])
    np.testing.assert_allclose(sums_of(object_, scan).flux, flux, rtol=1e-3)
    best = sums_of(guess, scan).flux
    for j, one in enumerate(best):
        at, above, below = (misfits(guess, scan, scan.position_yx_px, one * f)[j] for f in (1, 1.02, 0.98))
        assert at < min(above, below)


def test_a_known_flux_scales_the_model_of_the_positions():
    flux = np.array([0.5, 2.0], np.float32)
    object_, position = smooth_object(0), some_positions(2)
    at_truth = sums_of(object_, scan_of(object_, position, flux=flux))
    ignored = sums_of(object_, replace(scan_of(object_, position, flux=flux), flux=None))
    assert np.abs(at_truth.slope).max() < 1e-3 * np.abs(ignored.slope).max()


@pytest.mark.parametrize("affine", [[[0.01, 0.0], [0.0, 0.01]], [[0.0, -0.012], [0.012, 0.0]], [[-0.01, 0.006], [0, 0]]])
@pytest.mark.parametrize("domain", ["counts", "amplitude"])
def test_the_affine_part_of_a_stretched_object_is_found(affine, domain):
    object_, true = smooth_object(0), some_positions(60)
    scan = scan_of(object_, true, domain=domain)
    centre, affine = true.mean(axis=0), np.array(affine)
    inverse = np.linalg.inv(np.eye(2) + affine)
    # The object that wrong positions lead to is stretched as they are.
    wrong = centre + (true - centre) @ inverse.T
    whole = Box(*(side for start, n in zip(CORNER, object_.shape, strict=True) for side in (start, start + n)))
    adapted = stretched(object_, whole, whole, inverse - np.eye(2), centre)
    found = affine_step(sums_of(adapted, replace(scan, position_yx_px=wrong)))
    np.testing.assert_allclose(found, affine, atol=0.002)


def test_stretching_moves_a_point_as_its_position():
    affine, centre = np.array([[0.02, -0.01], [0.03, 0.01]]), np.array([30.0, 25.0])
    y, x = np.mgrid[:60, :60]
    place = np.array([40.0, 31.0])
    object_ = np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / 30).astype(np.complex64)
    box = Box(15, 58, 10, 55)
    source = source_box(box, affine, centre)
    inside = source.overlap(Box(0, 60, 0, 60))
    moved = stretched(object_[inside.y0 : inside.y1, inside.x0 : inside.x1], inside, box, affine, centre).real
    found = [(moved * grid).sum() / moved.sum() for grid in np.mgrid[15:58, 10:55]]
    np.testing.assert_allclose(found, centre + (np.eye(2) + affine) @ (place - centre), atol=0.05)


def test_a_pattern_without_light_has_no_flux():
    scan = scan_of(smooth_object(0), some_positions(2))
    sums = sums_of(np.zeros((80, 80), np.complex64), scan)
    assert np.isnan(sums.flux).all()
    assert np.isfinite(position_steps(sums)).all()
    np.testing.assert_array_equal(affine_step(sums), 0)


# Whole runs


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    path = tmp_path_factory.mktemp("true") / "scan.zarr"
    return simulate(path, n_pixels=32, n_patterns=220, dose=1e6, step_px=3.0, path="random", seed=4, object="field")


def store_like(scan, path, **changes):
    kept = {
        "diffraction": scan.diffraction[:],
        "position_yx_px": scan.position_yx_px,
        "probe": scan.probe,
        "domain": scan.domain,
    }
    return write_scan(path, calibration="as_given", progress=False, **kept | changes)


@pytest.fixture(scope="module")
def wrong(true, tmp_path_factory):
    """The scan with positions that are 1 % too far apart and up to 1 px off."""
    centre = true.position_yx_px.mean(axis=0)
    jitter = np.random.default_rng(0).uniform(-1, 1, true.position_yx_px.shape)
    position = centre + 1.01 * (true.position_yx_px - centre) + jitter
    # Rows of the true scan, in case the patterns are sorted along another curve.
    path = tmp_path_factory.mktemp("wrong") / "scan.zarr"
    return store_like(true, path, position_yx_px=position, source_index=np.arange(true.n_patterns))


@pytest.fixture(scope="module")
def refined(wrong):
    return reconstruct(wrong.store, "iterative", **RUN)


def rms_error(true, scan, position):
    """Error of positions without a common shift, pixels."""
    error = position - true.position_yx_px[scan.source_index]
    return np.sqrt(((error - error.mean(axis=0)) ** 2).sum(axis=1).mean())


def test_positions_of_a_run_are_refined(true, wrong, refined):
    assert rms_error(true, wrong, wrong.position_yx_px) > 0.8
    assert refined["position_refined_yx_px"].dims == ("pattern", "yx")
    assert "flux_refined" not in refined
    assert rms_error(true, wrong, refined["position_refined_yx_px"].values) < 0.3
    kept = [one for one in refined.ptycho.records["refinement"]["stages"] if one["stage"] == "positions"]
    assert kept
