"""Residuals of single patterns: they agree with R, do not depend on chunks, and point at what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.forward import MIN_SEEN_LIGHT, crop_at, diffract, r_factor, shift_probe
from ptychodask.judging.residuals import outliers, poisson_deviance, residuals
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.result import make_dataset, open_result
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan

N = 16


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("residuals") / "scan.zarr"
    return simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=3)


def as_result(object_, corner):
    ones = np.isfinite(object_).astype(np.float32)
    return make_dataset(object_, ones, ones, ones, corner, pixel_size_m=None, attributes={})


@pytest.fixture(scope="module")
def truth(scan):
    return as_result(scan.truth.object, tuple(int(side) for side in scan.truth.corner_yx_px))


@pytest.fixture(scope="module")
def iterated(scan):
    return reconstruct_iterative(scan.store, n_sweeps=5)


def test_the_total_and_each_pattern_agree_with_r(scan, iterated):
    found = residuals(iterated, scan)
    corner = float(iterated["y"][0]), float(iterated["x"][0])
    judged = np.flatnonzero(np.isfinite(found["r_factor"]))
    assert len(judged) == found.attrs["n_counted"] > 40
    assert found.attrs["r_factor"] == pytest.approx(r_factor(iterated["object"].values, corner, scan, judged), rel=1e-9)
    for pattern in judged[:3]:
        alone = r_factor(iterated["object"].values, corner, scan, np.array([pattern]))
        # The fill of unseen pixels sums float32 amplitudes in another order.
        assert float(found["r_factor"][pattern]) == pytest.approx(alone, rel=1e-6)
    np.testing.assert_array_equal(found["y_px"], scan.position_yx_px[:, 0])
    np.testing.assert_array_equal(found["source_index"], scan.source_index)


def test_mask_and_flux_enter_and_the_deviance_is_that_of_poisson(tmp_path, scan, truth):
    rng = np.random.default_rng(0)
    mask = rng.random((N, N)) > 0.1
    flux = rng.uniform(0.5, 2, scan.n_patterns).astype(np.float32)
    flux /= flux.mean()
    patterns = (scan.diffraction[:] * flux[:, None, None]).astype(np.uint32)
    patterns[:, ~mask] = 60000
    scan_here = write_scan(
        tmp_path / "masked.zarr",
        diffraction=patterns,
        position_yx_px=scan.position_yx_px,
        probe=scan.probe,
        domain="counts",
        calibration="as_given",
        mask=mask,
        flux=flux,
        provenance={},
    )
    found = residuals(truth, scan_here)
    corner = truth["y"].values[0], truth["x"].values[0]
    patch, fraction = crop_at(scan.truth.object, corner, scan_here.position_yx_px[7], N)
    predicted = (diffract(shift_probe(scan.probe, fraction) * patch) * scan_here.flux[7])[mask].astype(np.float64)
    counts = scan_here.diffraction[[7]][0][mask].astype(np.float64)
    expected = np.abs(np.sqrt(predicted) - np.sqrt(counts)).sum() / np.sqrt(counts).sum()
    assert float(found["r_factor"][7]) == pytest.approx(expected, rel=1e-5)
    safe = np.where(counts > 0, counts, 1)
    deviance = 2 * np.mean(predicted - counts + counts * np.log(safe / predicted))
    assert float(found["poisson_deviance"][7]) == pytest.approx(deviance, rel=1e-4)


def test_the_deviance_of_photon_noise_is_one():
    predicted = np.full((100, 100), 50.0)
    counts = np.random.default_rng(1).poisson(predicted).astype(float)
    # Its standard deviation over 10^4 pixels is about sqrt(2 / 10^4).
    assert poisson_deviance(predicted, counts) == pytest.approx(1, abs=0.05)
    assert poisson_deviance(predicted, predicted) == 0
    assert np.isfinite(poisson_deviance(np.zeros((2, 2)), np.ones((2, 2))))


def test_amplitudes_of_unknown_photon_number_have_no_deviance(scan, truth):
    known = residuals(truth, scan)
    amplitudes = replace(scan, domain="amplitude", diffraction=np.sqrt(scan.diffraction[:].astype(np.float32)))
    found = residuals(truth, amplitudes)
    np.testing.assert_allclose(found["r_factor"], known["r_factor"], rtol=1e-6)
    assert np.isnan(found["poisson_deviance"]).all()
    assert "photon number is unknown" in found["poisson_deviance"].attrs["comment"]
    assert "poisson_deviance" not in found.attrs


@pytest.mark.parametrize("patterns_per_part", [1, 7, 60])
def test_residuals_do_not_depend_on_how_the_scan_is_cut(scan, iterated, monkeypatch, patterns_per_part):
    whole = residuals(iterated, scan)
    module = sys.modules["ptychodask.judging.residuals"]
    monkeypatch.setattr(module, "PARTS_AT_LEAST", 1)
    monkeypatch.setattr(module, "PART_PIXELS", patterns_per_part * N**2)
    xr.testing.assert_identical(residuals(iterated, scan), whole)


def test_worker_processes_read_stores_and_give_the_same_bits(scan, iterated, tmp_path):
    iterated.ptycho.save(tmp_path / "result.zarr")
    with local_client(1) as client:
        found = residuals(tmp_path / "result.zarr", scan.store, client=client)
    xr.testing.assert_identical(found, residuals(open_result(tmp_path / "result.zarr"), scan))
    np.testing.assert_array_equal(found["r_factor"], residuals(iterated, scan)["r_factor"])


def test_patterns_off_the_seen_object_are_not_judged(scan, truth):
    part = truth.where(truth["y"] < 0).isel(x=slice(5, None))
    part = as_result(part["object"].values, (int(part["y"][0]), int(part["x"][0])))
    found = residuals(part, scan)
    light = (np.abs(scan.probe) ** 2).sum(axis=0)
    share = np.empty(scan.n_patterns)
    for index, (y, x) in enumerate(np.floor(scan.position_yx_px).astype(int)):
        rows, columns = np.arange(N) + y - N // 2, np.arange(N) + x - N // 2
        inside = ((rows >= part["y"].values[0]) & (rows < 0))[:, None] & (columns >= part["x"].values[0])
        share[index] = light[inside].sum() / light.sum()
    np.testing.assert_allclose(found["seen_light"], share, rtol=1e-6)
    unseen = share < MIN_SEEN_LIGHT
    assert 0 < unseen.sum() < scan.n_patterns
    np.testing.assert_array_equal(np.isnan(found["r_factor"]), unseen)
    assert (found.attrs["n_counted"], found.attrs["n_unseen"]) == ((~unseen).sum(), unseen.sum())


@pytest.fixture(scope="module")
def spoilt(scan):
    """The scan with six wrong patterns (two swapped, two doubled, two dead), and which."""
    bad = np.array([5, 40, 12, 23, 31, 50])
    patterns = scan.diffraction[:].copy()
    patterns[bad[:2]] = patterns[bad[[1, 0]]]
    patterns[bad[2:4]] *= 2
    patterns[bad[4:]] = 0
    return replace(scan, diffraction=patterns), bad


def test_wrong_patterns_have_the_highest_residuals_and_are_named(spoilt, truth):
    wrong, bad = spoilt
    found = residuals(truth, wrong)
    for name in ("r_factor", "poisson_deviance"):
        assert set(np.argsort(-found[name].values)[: len(bad)]) == set(bad)
    assert np.isinf(found["r_factor"][bad[4:]]).all()
    assert set(outliers(found)) == set(bad)
    assert set(outliers(found)[:2]) == set(bad[4:])


def test_dropped_patterns_are_flagged_and_leave_the_totals(scan, spoilt, truth):
    wrong, bad = spoilt
    found = residuals(truth, wrong, drop=bad)
    np.testing.assert_array_equal(np.flatnonzero(found["dropped"]), np.sort(bad))
    assert found.attrs["n_counted"] == scan.n_patterns - len(bad)
    clean = residuals(truth, scan, drop=bad)
    assert found.attrs["r_factor"] == clean.attrs["r_factor"]
    assert found.attrs["poisson_deviance"] == clean.attrs["poisson_deviance"]
    assert len(outliers(found)) == 0


def test_residuals_go_to_disk_as_they_are(scan, truth, tmp_path):
    found = residuals(truth, scan, drop=[3])
    found.to_zarr(tmp_path / "residuals.zarr", consolidated=False)
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "residuals.zarr", consolidated=False).load(), found)


def test_a_damaged_result_is_told(scan, truth, tmp_path):
    truth.ptycho.save(tmp_path / "truth.zarr")
    for file in (tmp_path / "truth.zarr" / "object" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"nonsense")
    with pytest.raises(PtychodaskError, match=r"arrays cannot be read or computed \(.*it is damaged"):
        residuals(tmp_path / "truth.zarr", scan)


def test_what_cannot_be_judged_is_refused(scan, truth):
    with pytest.raises(PtychodaskError, match=r"no object \(y, x\)"):
        residuals(truth[["weight"]], scan)
    with pytest.raises(PtychodaskError, match=r"along y are not consecutive"):
        residuals(truth.isel(y=slice(None, None, 2)), scan)
    with pytest.raises(PtychodaskError, match=r"the object has no seen pixel"):
        residuals(truth.where(truth["y"] > 1e6), scan)
    with pytest.raises(PtychodaskError, match=r"expected indices 0..59"):
        residuals(truth, scan, drop=[60])
    far = as_result(truth["object"].values, (10_000, 10_000))
    with pytest.raises(
        PtychodaskError,
        match=r"no pattern that is not dropped has counts and 99% of the probe intensity on seen pixels",
    ):
        residuals(far, scan)
    with pytest.raises(PtychodaskError, match=r"n_mad is 0"):
        outliers(residuals(truth, scan), n_mad=0)


def test_a_result_of_other_data_is_reported(scan, truth, caplog):
    residuals(truth.assign_attrs(data_hash=scan.data_hash), scan)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    residuals(truth.assign_attrs(data_hash="another"), scan)
    assert "made from other data than" in caplog.text


def test_a_scan_that_lies_in_no_store_is_judged_too(scan, truth):
    xr.testing.assert_identical(
        residuals(truth, replace(scan, diffraction=scan.diffraction[:])), residuals(truth, open_scan(scan.store))
    )
