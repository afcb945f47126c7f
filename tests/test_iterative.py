"""The iterative engine: it finds probe and object, leaves a right probe alone, and keeps what it was given."""

from __future__ import annotations

import bz2
import io
from dataclasses import replace

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts, r_factor
from ptychodask.iterative import measure, refine_probe, run_sweeps
from ptychodask.probes import defocused, zone_plate_probe
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.scan import Scan, input_normalization
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan


def overlap(one, other):
    return abs(np.vdot(one, other)) / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A simulated scan with its right probe."""
    store = tmp_path_factory.mktemp("iterative") / "scan.zarr"
    return simulate(
        store, probe="zone_plate", n_pixels=32, n_patterns=160, dose=1e7, step_px=4.0, path="raster", progress=False
    )


def store_with_probe(scan, path, probe, **other):
    return write_scan(
        path,
        diffraction=scan.diffraction,
        position_yx_px=scan.position_yx_px,
        probe=probe,
        domain=scan.domain,
        calibration="as_given",
        progress=False,
        **other,
    )


def noise_free(scan, **changes):
    counts = [
        expected_counts(scan.truth.object, scan.truth.corner_yx_px, scan.probe, position)
        for position in scan.position_yx_px
    ]
    return replace(scan, **({"diffraction": np.array(counts), "store": None} | changes))


def test_r_factor_of_the_truth_is_zero(scan):
    exact = noise_free(scan)
    assert r_factor(scan.truth.object, scan.truth.corner_yx_px, exact) < 1e-5
    assert r_factor(np.ones((4, 4)), (0.0, 0.0), exact) > 0.1


def test_r_factor_is_the_formula_written_out(scan):
    index = np.array([5, 0])
    flat = r_factor(np.ones((2, 2)), (0.0, 0.0), scan, index)
    measured = scan.amplitude(index)
    big = np.ones((200, 200))
    model = [np.sqrt(expected_counts(big, (-100, -100), scan.probe, scan.position_yx_px[j])) for j in index]
    assert flat == pytest.approx(np.abs(model - measured).sum() / measured.sum(), rel=1e-5)


def test_r_factor_takes_unseen_pixels_as_the_mean_amplitude(scan):
    seen = scan.truth.object.copy()
    seen[: len(seen) // 2] = np.nan
    filled = np.where(np.isnan(seen), np.abs(seen[np.isfinite(seen)]).mean(dtype=np.float64), seen)
    corner = scan.truth.corner_yx_px
    assert r_factor(seen, corner, scan) == pytest.approx(r_factor(filled, corner, scan), rel=1e-6)
    with pytest.raises(PtychodaskError, match="all its pixels are NaN"):
        r_factor(np.full((4, 4), np.nan + 0j), (0.0, 0.0), scan)


def test_r_factor_honours_mask_and_flux(scan):
    flux = np.linspace(0.5, 1.5, scan.n_patterns).astype(np.float32)
    mask = np.random.default_rng(0).random((32, 32)) > 0.1
    bright = noise_free(scan)
    counts = bright.diffraction * flux[:, None, None]
    counts[:, ~mask] = 1e9
    corner = scan.truth.corner_yx_px
    assert r_factor(scan.truth.object, corner, replace(bright, diffraction=counts, mask=mask, flux=flux)) < 1e-5
    assert r_factor(scan.truth.object, corner, replace(bright, diffraction=counts, mask=mask)) > 0.05


def test_sweeps_with_the_right_probe_find_the_object(scan):
    measured = measure(scan, np.arange(scan.n_patterns))
    object_, probe = run_sweeps(measured, scan.probe, n_sweeps=15)
    assert probe is scan.probe
    before = r_factor(np.ones((2, 2)), (0.0, 0.0), scan)
    assert r_factor(object_, measured.corner_yx_px, scan) < 0.1 * before
    offset = np.subtract(measured.corner_yx_px, scan.truth.corner_yx_px).astype(int)
    truth = scan.truth.object[offset[0] :, offset[1] :][: object_.shape[0], : object_.shape[1]]
    middle = (slice(26, -26), slice(26, -26))
    assert overlap(object_[middle], truth[middle]) > 0.99


def test_sweeps_are_the_same_under_the_same_seed(scan):
    measured = measure(scan, np.arange(60))
    one, other, third = (
        run_sweeps(measured, scan.probe, n_sweeps=3, update_probe=True, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    assert not np.array_equal(one[0], third[0])


def test_bad_pixels_do_not_touch_the_object(scan):
    mask = np.random.default_rng(0).random((32, 32)) > 0.05
    garbage = scan.diffraction[:]
    garbage[:, ~mask] = 12345
    index = np.arange(40)
    clean, spoilt = (
        run_sweeps(measure(replace(scan, diffraction=counts, mask=mask), index), scan.probe, n_sweeps=2)[0]
        for counts in (scan.diffraction[:], garbage)
    )
    np.testing.assert_array_equal(clean, spoilt)


def test_flux_and_domain_do_not_change_the_object(scan):
    flux = np.linspace(0.8, 1.2, scan.n_patterns).astype(np.float32)
    exact = noise_free(scan)
    index = np.arange(40)
    variants = (
        exact,
        replace(exact, diffraction=exact.diffraction * flux[:, None, None], flux=flux),
        replace(exact, diffraction=np.sqrt(exact.diffraction), domain="amplitude"),
    )
    objects = [run_sweeps(measure(variant, index), scan.probe, n_sweeps=2)[0] for variant in variants]
    np.testing.assert_allclose(objects[1], objects[0], atol=1e-4)
    np.testing.assert_allclose(objects[2], objects[0], atol=1e-4)


def test_two_incoherent_modes_are_told_apart(scan):
    y, x = np.mgrid[:32, :32] - 16
    modes = np.stack([np.exp(-(y**2 + x**2) / 40), 0.3 * x * np.exp(-(y**2 + x**2) / 40)]).astype(np.complex64)
    modes *= 1e3
    exact = noise_free(replace(scan, probe=modes))
    measured = measure(exact, np.arange(scan.n_patterns))
    object_, _ = run_sweeps(measured, modes, n_sweeps=10)
    one_mode, _ = run_sweeps(measured, modes[:1], n_sweeps=10)
    both = r_factor(object_, measured.corner_yx_px, exact)
    assert both < 0.5 * r_factor(one_mode, measured.corner_yx_px, replace(exact, probe=modes[:1]))


def test_refinement_lowers_r_on_unseen_patterns_and_keeps_the_initial_probe(scan, tmp_path):
    y, x = np.mgrid[:32, :32] - 16
    wrong = scan.probe * np.exp(-(y**2 + x**2) / 60)
    before = store_with_probe(scan, tmp_path / "scan.zarr", wrong)
    found = refine_probe(tmp_path / "scan.zarr", progress=False)
    after = open_scan(tmp_path / "scan.zarr")
    assert found.stored
    assert found.r_after < 0.3 * found.r_before
    assert overlap(found.probe, scan.probe) > overlap(wrong, scan.probe) + 0.03
    np.testing.assert_array_equal(after.probe, found.probe)
    np.testing.assert_array_equal(after.probe_initial, before.probe)
    assert after.data_hash != before.data_hash
    assert after.attributes["probe_refinement"]["r_after"] == found.r_after
    again = refine_probe(tmp_path / "scan.zarr", progress=False)
    np.testing.assert_array_equal(again.probe, found.probe)


def test_a_better_stored_probe_stays(scan, tmp_path):
    y, x = np.mgrid[:32, :32] - 16
    store_with_probe(scan, tmp_path / "scan.zarr", scan.probe * np.exp(-(y**2 + x**2) / 60))
    good = refine_probe(tmp_path / "scan.zarr", progress=False)
    worse = refine_probe(tmp_path / "scan.zarr", n_sweeps=3, progress=False)
    assert worse.r_before == good.r_after < worse.r_after
    assert not worse.stored
    np.testing.assert_array_equal(open_scan(tmp_path / "scan.zarr").probe, good.probe)


def test_refinement_keeps_the_total_and_the_centroid_of_the_probe(scan):
    wrong = np.roll(defocused(scan.probe, 12.0), (2, -1), axis=(1, 2))
    _, probe = run_sweeps(measure(scan, np.arange(scan.n_patterns)), wrong, n_sweeps=8, update_probe=True)
    y, x = np.mgrid[:32, :32]

    def moments(wave):
        light = (np.abs(wave) ** 2).sum(axis=0, dtype=np.float64)
        return [light.sum(), (light * y).sum() / light.sum(), (light * x).sum() / light.sum()]

    # The light that a shift wraps around the frame moves its centroid by hundredths of a pixel.
    np.testing.assert_allclose(moments(probe), moments(wrong), rtol=5e-3)


def test_a_right_probe_stays_right(scan, tmp_path):
    _, probe = run_sweeps(measure(scan, np.arange(scan.n_patterns)), scan.probe, n_sweeps=10, update_probe=True)
    assert overlap(probe, scan.probe) > 0.999


def test_search_of_the_defocus_finds_a_donut_from_a_focused_guess(scan, tmp_path):
    focused = zone_plate_probe(32, outer_px=16, stop_px=6.4)
    focused *= np.sqrt((np.abs(scan.probe) ** 2).sum() / (np.abs(focused) ** 2).sum())
    store_with_probe(scan, tmp_path / "scan.zarr", focused)
    plain = refine_probe(tmp_path / "scan.zarr", progress=False)
    searched = refine_probe(tmp_path / "scan.zarr", search_defocus=True, progress=False)
    assert searched.defocus_rad > 0
    assert searched.r_after < 0.8 * plain.r_after


def test_fraction_uses_the_patterns_nearest_to_the_middle(scan, tmp_path):
    store_with_probe(scan, tmp_path / "scan.zarr", defocused(scan.probe, 12.0))
    found = refine_probe(tmp_path / "scan.zarr", fraction=0.5, held_out=0.2, n_sweeps=3, progress=False)
    assert (found.n_patterns, found.n_held_out) == (64, 16)


def test_only_the_largest_experiment_is_used(scan, tmp_path):
    experiment = np.repeat([7, 3], [60, 100])
    store_with_probe(scan, tmp_path / "scan.zarr", defocused(scan.probe, 12.0), scan_index=experiment)
    found = refine_probe(tmp_path / "scan.zarr", n_sweeps=3, progress=False)
    assert found.n_patterns + found.n_held_out == 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.0}, "fraction is 0.0, expected more than 0 and at most 1"),
        ({"held_out": 1.0}, "held_out is 1.0, expected more than 0 and at most 0.9"),
        ({"step_probe": 1.5}, "step_probe is 1.5, expected more than 0 and at most 1"),
        ({"n_sweeps": 2}, "n_sweeps is 2, expected 3 or more"),
        ({"fraction": 0.1}, "16 patterns are used and 2 of them held out, which leaves fewer than 16"),
    ],
)
def test_wrong_arguments_are_refused(scan, wrong, message):
    with pytest.raises(PtychodaskError, match=message):
        refine_probe(scan.store, progress=False, **wrong)


def test_iterative_result_lies_on_the_truth(scan):
    ds = reconstruct_iterative(scan.store, n_sweeps=15, progress=False)
    seen = ds["count"].values > 0
    np.testing.assert_array_equal(np.isfinite(ds["object"].values), seen)
    np.testing.assert_array_equal(ds["weight"].values > 0, seen)
    assert ds["count"].values.max() <= scan.n_patterns
    corner = scan.truth.corner_yx_px
    truth = scan.truth.object[
        np.ix_((ds["y"] - corner[0]).values.astype(int), (ds["x"] - corner[1]).values.astype(int))
    ]
    bright = ds["weight"].values > 1
    assert overlap(ds["object"].values[bright], truth[bright]) > 0.99
    assert ds.attrs["r_factor"] < 0.1
    assert ds.attrs["data_hash"] == scan.data_hash


def test_iterative_result_can_refine_the_probe_and_leaves_the_store(scan, tmp_path):
    y, x = np.mgrid[:32, :32] - 16
    before = store_with_probe(scan, tmp_path / "scan.zarr", scan.probe * np.exp(-(y**2 + x**2) / 60))
    fixed = reconstruct_iterative(tmp_path / "scan.zarr", n_sweeps=10, progress=False)
    refined = reconstruct_iterative(tmp_path / "scan.zarr", n_sweeps=10, refine_probe=True, progress=False)
    assert refined.attrs["r_factor"] < 0.5 * fixed.attrs["r_factor"]
    assert open_scan(tmp_path / "scan.zarr").data_hash == before.data_hash


def test_iterative_result_of_several_experiments_is_refused(scan, tmp_path):
    store_with_probe(scan, tmp_path / "scan.zarr", scan.probe, scan_index=np.repeat([0, 1], 80))
    with pytest.raises(
        PtychodaskError,
        match=r"has 2 experiments \(0, 1\), and each has an object of its own; choose one with experiment=",
    ):
        reconstruct_iterative(tmp_path / "scan.zarr", progress=False)
    with pytest.raises(PtychodaskError, match="n_sweeps is 2, expected 3 or more"):
        reconstruct_iterative(tmp_path / "scan.zarr", n_sweeps=2, refine_probe=True)


def test_siemens_star_probe_predicts_unseen_patterns(shared, tmp_path):
    packed = bz2.decompress((shared / "data/siemens-star-small.npz.bz2").read_bytes())
    star = np.load(io.BytesIO(packed), allow_pickle=False)
    write_scan(
        tmp_path / "star.zarr",
        diffraction=np.fft.fftshift(star["data"][0], axes=(1, 2)),
        position_yx_px=star["scan"][0].astype(np.float64),
        probe=star["probe"].reshape(1, 128, 128),
        domain="counts",
        calibration="mean_counts",
        progress=False,
    )
    found = refine_probe(tmp_path / "star.zarr", progress=False)
    assert found.r_before > 0.38
    assert found.r_after < 0.19


def test_right_probe_of_crossing_lines_is_not_spoiled(shared):
    lines = np.load(shared / "data/lines64_train.npz", allow_pickle=False)
    amplitude = lines["diff3d"]
    scan = Scan(
        diffraction=amplitude,
        position_yx_px=np.stack([lines["ycoords"], lines["xcoords"]], axis=1),
        probe=lines["probeGuess"][None],
        domain="amplitude",
        normalization=input_normalization(float((amplitude**2).sum(dtype=np.float64)) / len(amplitude), 64),
    )
    index = np.arange(0, scan.n_patterns, 2)
    _, probe = run_sweeps(measure(scan, index), scan.probe, n_sweeps=8, update_probe=True)
    assert overlap(probe, scan.probe) > 0.999
