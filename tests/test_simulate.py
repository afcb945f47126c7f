"""Laws of the simulated scans: light is conserved, a seed is a scan, the truth is where the probe was."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ptychodask.errors import PtychodaskError
from ptychodask.forward import crop_at, diffract, expected_counts, shift_probe
from ptychodask.grouping import mean_spacing_px
from ptychodask.scan import Truth
from ptychodask.simulate import (
    OBJECTS,
    PATHS,
    SimulatedPatterns,
    crossing_lines,
    make_positions,
    random_field,
    siemens_star,
    simulate,
)
from ptychodask.store.write import write_scan

SMALL = {"n_pixels": 16, "n_patterns": 60, "dose": 1e5, "step_px": 3.0, "progress": False}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def complex_noise(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def test_pattern_holds_the_light_of_the_exit_wave(rng):
    wave = complex_noise(rng, 3, 2, 16, 16)
    np.testing.assert_allclose(diffract(wave).sum(axis=(1, 2)), (np.abs(wave) ** 2).sum(axis=(1, 2, 3)), rtol=1e-12)


def test_pattern_is_the_centred_transform_written_out(rng):
    wave = complex_noise(rng, 1, 8, 8)
    k = np.arange(8)
    kernel = np.exp(-2j * np.pi * np.outer(k - 4, k) / 8)
    np.testing.assert_allclose(diffract(wave), np.abs(kernel @ wave[0] @ kernel.T) ** 2 / 8**2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-8, 5)])
def test_shift_by_whole_pixels_is_a_roll(rng, shift):
    probe = complex_noise(rng, 2, 16, 16)
    np.testing.assert_allclose(shift_probe(probe, shift), np.roll(probe, shift, axis=(1, 2)), atol=1e-12)


def test_shift_by_a_fraction_keeps_the_light_and_moves_the_centroid(rng):
    y, x = np.mgrid[:32, :32] - 16
    probe = np.exp(-(y**2 + x**2) / 18)[None].astype(np.complex128)
    moved = np.abs(shift_probe(probe, (0.3, -0.7))[0]) ** 2
    assert moved.sum() == pytest.approx((np.abs(probe) ** 2).sum(), rel=1e-12)
    np.testing.assert_allclose(
        [(moved * y).sum() / moved.sum(), (moved * x).sum() / moved.sum()], [0.3, -0.7], atol=1e-9
    )


def test_crop_puts_the_position_on_the_middle_pixel():
    object_ = np.arange(20 * 30).reshape(20, 30)
    patch, fraction = crop_at(object_, (-10.0, 5.0), np.array([-2.75, 15.0]), 8)
    assert patch[4, 4] == object_[7, 10]
    assert fraction.tolist() == [0.25, 0.0]


def test_crop_beyond_the_object_is_refused():
    with pytest.raises(PtychodaskError, match=r"do not cover a patch of 8 pixels at \[3\.0, 6\.0\]"):
        crop_at(np.zeros((12, 12)), (0, 0), np.array([3.0, 6.0]), 8)


@pytest.mark.parametrize("make", [crossing_lines, lambda shape, rng: siemens_star(shape), random_field])
def test_objects_span_the_stated_amplitude_and_phase(rng, make):
    made = make((90, 70), rng)
    assert made.shape == (90, 70)
    assert made.dtype == np.complex64
    np.testing.assert_allclose([np.abs(made).min(), np.abs(made).max()], [0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose([np.angle(made).min(), np.angle(made).max()], [-0.6, 0.6], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_paths_cover_the_stated_area_around_the_origin(rng, path):
    position = PATHS[path](1000, 4.0, rng)
    assert position.shape == (1000, 2)
    assert len(np.unique(position, axis=0)) == 1000
    # Second moment of a square (side²/12) and of a disc (radius²/4) of the stated area.
    area = 1000 * 4.0**2
    expected = area / (4 * np.pi) if path == "spiral" else area / 12
    np.testing.assert_allclose(position.var(axis=0), expected, rtol=0.1)
    np.testing.assert_allclose(position.mean(axis=0), 0, atol=4)


def test_raster_neighbours_are_a_jittered_step_apart(rng):
    position = PATHS["raster"](100, 5.0, rng)
    steps = np.diff(position.reshape(10, 10, 2), axis=1)
    assert np.abs(steps[..., 1] - 5).max() <= 2 * 0.2 * 5
    assert np.abs(steps[..., 0]).max() <= 2 * 0.2 * 5


def test_positions_of_another_scan_are_thinned_to_the_spacing(tmp_path, rng):
    store = tmp_path / "known.zarr"
    known = simulate(store, **SMALL | {"n_patterns": 900, "path": "raster"}).position_yx_px
    position = make_positions(str(store), 100, 6.0, rng)
    # Each is one of the known positions, moved with all others.
    moved = position[:, None] - known
    places = moved.reshape(-1, 2).round(6)
    assert np.unique(places, axis=0, return_counts=True)[1].max() == 100
    assert mean_spacing_px(position) == pytest.approx(6.0, rel=0.1)
    assert np.abs(position).max() < 0.7 * 6.0 * 10
    scan = simulate(tmp_path / "scan.zarr", **SMALL | {"path": str(store), "step_px": 6.0})
    assert scan.n_patterns == SMALL["n_patterns"]
    assert len(make_positions(str(store), 900, mean_spacing_px(known), rng)) == 900


def test_positions_that_a_scan_cannot_give_are_refused_with_the_bound(tmp_path, rng):
    store = tmp_path / "known.zarr"
    own = mean_spacing_px(simulate(store, **SMALL | {"n_patterns": 400, "path": "raster"}).position_yx_px)
    with pytest.raises(
        PtychodaskError, match=rf"step_px is 2, but the mean spacing .* is {own:.4g} px; pass {own:.4g} or more"
    ):
        make_positions(str(store), 50, 2.0, rng)
    with pytest.raises(
        PtychodaskError, match=rf"has 93 positions at step_px=6, .* n_patterns=93, .* down to {own:.4g}"
    ):
        make_positions(str(store), 200, 6.0, rng)
    with pytest.raises(
        PtychodaskError, match=r"path is 'zigzag', expected one of: random, raster, spiral, the store of"
    ):
        make_positions("zigzag", 50, 2.0, rng)
    with pytest.raises(PtychodaskError, match=r"4 positions span no area"):
        mean_spacing_px(np.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("object_", OBJECTS)
def test_truth_and_probe_reproduce_the_patterns(tmp_path, object_, path):
    scan = simulate(tmp_path / "scan.zarr", object=object_, path=path, **SMALL)
    assert scan.truth is not None
    assert scan.domain == "counts"
    assert scan.calibration == "as_given"
    assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(1e5, rel=1e-6)
    pull = []
    for measured, position in zip(scan.diffraction[:], scan.position_yx_px, strict=True):
        expected = expected_counts(scan.truth.object, scan.truth.corner_yx_px, scan.probe, position)
        bright = expected > 20
        pull.append(((measured - expected) ** 2 / expected)[bright])
    # Poisson noise: the squared deviation is the mean, up to the sampling error of these pixels.
    pull = np.concatenate(pull)
    assert pull.mean() == pytest.approx(1, abs=6 * np.sqrt(2 / len(pull)))


def test_truth_reaches_more_than_half_a_pattern_beyond_the_positions(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", **SMALL)
    low = scan.position_yx_px - scan.truth.corner_yx_px
    high = np.add(scan.truth.corner_yx_px, scan.truth.object.shape) - scan.position_yx_px
    assert min(low.min(), high.min()) >= 16 // 2 + 1


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    first = simulate(tmp_path / "1.zarr", seed=3, **SMALL)
    again = simulate(tmp_path / "2.zarr", seed=3, **SMALL)
    other = simulate(tmp_path / "3.zarr", seed=4, **SMALL)
    assert first.data_hash == again.data_hash
    np.testing.assert_array_equal(first.truth.object, again.truth.object)
    assert first.data_hash != other.data_hash
    assert not np.array_equal(first.position_yx_px, other.position_yx_px)


def test_patterns_do_not_depend_on_the_order_or_the_block_they_are_asked_in(rng):
    truth = Truth(crossing_lines((40, 40), rng), (-20.0, -20.0))
    position = rng.uniform(-8, 8, (9, 2))
    patterns = SimulatedPatterns(truth, 50 * complex_noise(rng, 1, 16, 16), position, seed=1)
    whole = patterns[:]
    order = rng.permutation(9)
    np.testing.assert_array_equal(patterns[order], whole[order])
    np.testing.assert_array_equal(np.concatenate([patterns[2:3], patterns[3:7]]), whole[2:7])


@pytest.mark.parametrize(("dose", "dtype"), [(1e4, np.uint16), (1e6, np.uint32)])
def test_counts_follow_the_dose(tmp_path, dose, dtype):
    scan = simulate(tmp_path / "scan.zarr", object="field", **(SMALL | {"dose": dose}))
    assert scan.diffraction.dtype == dtype
    share = scan.diffraction[:].sum(axis=(1, 2), dtype=np.float64).mean() / dose
    assert 0.5**2 < share < 1


def test_given_complex_object_and_probe_are_used_as_they_are(tmp_path, rng):
    object_ = complex_noise(rng, 61, 64).astype(np.complex64)
    probe = complex_noise(rng, 2, 16, 16)
    scan = simulate(tmp_path / "scan.zarr", object=object_, probe=probe, **SMALL)
    np.testing.assert_array_equal(scan.truth.object, object_)
    assert scan.truth.corner_yx_px == (-30.0, -32.0)
    ratio = scan.probe / probe
    np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-5)


def test_image_files_become_amplitude_and_phase(tmp_path, rng):
    grey = rng.integers(0, 256, (64, 64)).astype(np.uint8)
    grey[0, :2] = 0, 255
    np.save(tmp_path / "grey.npy", grey)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    from_npy = simulate(tmp_path / "1.zarr", object=str(tmp_path / "grey.npy"), **SMALL)
    from_png = simulate(tmp_path / "2.zarr", object=tmp_path / "grey.png", **SMALL)
    np.testing.assert_allclose(np.abs(from_npy.truth.object), 0.5 + grey / 510, atol=1e-6)
    np.testing.assert_allclose(np.angle(from_npy.truth.object), -0.6 + 1.2 * grey / 255, atol=1e-6)
    np.testing.assert_array_equal(from_png.truth.object, from_npy.truth.object)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"object": "circle"}, r"object is 'circle', expected one of: lines, star, field, a path to an image"),
        ({"object": "none.png"}, r"none\.png: cannot be read as an image"),
        ({"object": np.ones((64, 64))}, r"every grey value is 1\.0"),
        ({"object": np.ones((20, 20), complex)}, r"shape \(20, 20\), the scan needs at least \(y, x\) = \(\d+, \d+\)"),
        ({"object": np.full((64, 64), np.nan + 0j)}, r"the object has values that are not finite"),
        ({"probe": "square"}, r"probe is 'square', expected one of: disc, zone_plate"),
        ({"probe": np.ones((8, 8))}, r"probe has shape \(8, 8\), expected \(16, 16\) or \(mode, 16, 16\)"),
        ({"probe": np.zeros((16, 16))}, r"total intensity is 0\.0, expected a positive number"),
        ({"path": "circle"}, r"path is 'circle', expected one of: random, raster, spiral"),
        ({"n_pixels": 18}, r"18 pixels wide, expected a multiple of 4"),
        ({"n_patterns": 0}, r"n_patterns is 0, expected a positive number"),
        ({"dose": np.inf}, r"dose is inf, expected a positive number"),
        ({"dose": 1e10}, r"overflow 32 bits; pass a dose below 4e9"),
        ({"step_px": -1.0}, r"step_px is -1\.0, expected a positive number"),
        ({"seed": -1}, r"seed is -1, expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_store(tmp_path, wrong, message):
    with pytest.raises(PtychodaskError, match=message):
        simulate(tmp_path / "scan.zarr", **(SMALL | wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_measured_scan_is_not_overwritten(tmp_path):
    small = {"n_pixels": 16, "n_patterns": 4, "progress": False}
    scan = simulate(tmp_path / "simulated.zarr", **small)
    assert simulate(tmp_path / "simulated.zarr", overwrite=True, **small).data_hash == scan.data_hash
    given = {"position_yx_px": scan.position_yx_px, "probe": scan.probe, "domain": "counts", "calibration": "as_given"}
    write_scan(tmp_path / "scan.zarr", diffraction=scan.diffraction[:], progress=False, **given)
    with pytest.raises(PtychodaskError, match="holds a scan that was not simulated, from Python; name another store"):
        simulate(tmp_path / "scan.zarr", overwrite=True, **small)
