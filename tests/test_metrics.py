"""Figures of merit against cases made by hand and against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ptychodask.metrics import (
    align_gauge,
    amplitude_ratio,
    correlation,
    frc,
    frc50,
    mae,
    mse,
    patch_r_factor,
    psnr,
    ssim,
)
from ptychodask.scan import PtychodaskError
from ptychodask.simulate import diffract, random_field

NAN = complex(np.nan, np.nan)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def truth(rng):
    return random_field((50, 64), rng)


def plane(shape, phase, slope_y, slope_x):
    y, x = np.indices(shape)
    return np.exp(1j * (phase + slope_y * y + slope_x * x))


@pytest.mark.parametrize(("phase", "slope_y", "slope_x"), [(0.5, 0.0, 0.0), (-3.0, 0.013, -0.4), (1.0, 3.0, -2.9)])
def test_gauge_is_removed_and_told(truth, phase, slope_y, slope_x):
    aligned, gauge = align_gauge(1.7 * truth * plane(truth.shape, phase, slope_y, slope_x), truth, scale=True)
    np.testing.assert_allclose(aligned, truth, atol=1e-4)
    np.testing.assert_allclose(gauge.ramp_yx_rad_per_px, [slope_y, slope_x], atol=1e-6)
    assert gauge.phase_rad == pytest.approx(phase, abs=1e-4)
    assert gauge.scale == pytest.approx(1.7, rel=1e-6)


def test_only_the_gauge_that_was_asked_for_is_removed(truth):
    turned = 2 * truth * plane(truth.shape, 0.3, 0.05, 0.0)
    untouched, gauge = align_gauge(turned, truth, phase=False, ramp=False)
    np.testing.assert_array_equal(untouched, turned.astype(np.complex64))
    assert (gauge.phase_rad, gauge.ramp_yx_rad_per_px, gauge.scale) == (0.0, (0.0, 0.0), 1.0)
    only_phase, gauge = align_gauge(turned, truth, ramp=False)
    assert gauge.ramp_yx_rad_per_px == (0.0, 0.0)
    assert np.angle((only_phase * np.conj(truth)).sum()) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(np.abs(only_phase), np.abs(turned), rtol=1e-6)


def test_gauge_is_found_from_seen_and_weighted_pixels_alone(truth, rng):
    estimate = truth * plane(truth.shape, 1.0, 0.02, -0.03)
    estimate[:10] = NAN
    weight = np.ones(truth.shape)
    weight[-10:] = 0
    estimate[-10:] = rng.standard_normal((10, 64)) * 100
    aligned, gauge = align_gauge(estimate, truth, weight=weight)
    np.testing.assert_allclose(aligned[10:-10], truth[10:-10], atol=1e-4)
    assert np.isnan(aligned[:10]).all()
    assert gauge.phase_rad == pytest.approx(1.0, abs=1e-4)


def test_gauge_survives_noise(truth, rng):
    noise = 0.5 * (rng.standard_normal(truth.shape) + 1j * rng.standard_normal(truth.shape))
    _, gauge = align_gauge((truth + noise) * plane(truth.shape, 1.0, 0.02, -0.03), truth)
    # One sigma of the slope is about noise / (sqrt(pixels) * rms distance), here 1e-3.
    np.testing.assert_allclose(gauge.ramp_yx_rad_per_px, [0.02, -0.03], atol=4e-3)


def test_what_cannot_be_compared_is_refused(truth):
    with pytest.raises(PtychodaskError, match=r"shapes \(50, 64\) and \(50, 63\), expected the same"):
        align_gauge(truth, truth[:, 1:])
    with pytest.raises(PtychodaskError, match="no pixel is seen in both"):
        amplitude_ratio(truth, np.full_like(truth, NAN))
    with pytest.raises(PtychodaskError, match="ramp=True with phase=False"):
        align_gauge(truth, truth, phase=False)


def test_correlation_is_that_of_numpy_over_seen_pixels(truth, rng):
    estimate = np.abs(truth) + 0.2 * rng.standard_normal(truth.shape)
    estimate[3:8, 5:30] = np.nan
    seen = np.isfinite(estimate)
    expected = np.corrcoef(estimate[seen], np.abs(truth[seen]))[0, 1]
    assert correlation(estimate, np.abs(truth)) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(correlation(np.ones(truth.shape), np.abs(truth)))


def test_amplitude_ratio_of_a_scaled_object_is_the_scale(truth):
    assert amplitude_ratio(0.9j * truth, truth) == pytest.approx(0.9, rel=1e-6)


def test_errors_leave_unseen_pixels_out():
    estimate = np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]])
    truth = np.array([[1.0, 2.0, 1.0], [4.0, np.nan, 6.0]])
    assert mae(estimate, truth) == pytest.approx(2 / 4)
    assert mse(estimate, truth) == pytest.approx(4 / 4)
    assert psnr(estimate, truth, peak=10.0) == pytest.approx(20.0)
    assert psnr(truth, truth, peak=10.0) == np.inf


def test_psnr_and_ssim_are_those_of_scikit_image(truth, rng):
    one = np.abs(truth).astype(np.float64)
    other = one + 0.05 * rng.standard_normal(one.shape)
    assert psnr(other, one, peak=0.5) == pytest.approx(peak_signal_noise_ratio(one, other, data_range=0.5))
    assert ssim(other, one, data_range=0.5) == pytest.approx(structural_similarity(one, other, data_range=0.5))


def test_ssim_of_a_part_is_that_of_the_part_alone(truth, rng):
    one = np.abs(truth).astype(np.float64)
    other = one + 0.05 * rng.standard_normal(one.shape)
    expected = structural_similarity(one[:, 20:], other[:, 20:], data_range=0.5)
    other[:, :20] = np.nan
    assert ssim(other, one, data_range=0.5) == pytest.approx(expected)
    assert np.isnan(ssim(other[:4], one[:4], data_range=0.5))


def test_ring_correlation_is_one_where_signals_agree_and_falls_where_they_do_not(rng):
    truth = rng.standard_normal((64, 70))
    frequency, correlation = frc(truth, truth)
    np.testing.assert_allclose(correlation, 1, rtol=1e-12)
    np.testing.assert_allclose(frequency, np.arange(33) / 64)
    assert frc50(truth, truth) == 0.5
    spectrum = np.fft.fft2(truth)
    high = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(70), indexing="ij")) > 0.2
    spectrum[high] = np.fft.fft2(rng.standard_normal((64, 70)))[high]
    assert frc50(np.fft.ifft2(spectrum), truth) == pytest.approx(0.2, abs=2 / 64)


def test_patch_r_factor_is_zero_for_exact_patches_and_leaves_bad_pixels_out(rng):
    patches = rng.standard_normal((5, 16, 16)) + 1j * rng.standard_normal((5, 16, 16))
    probe = (rng.standard_normal((2, 16, 16)) + 0j).astype(np.complex64)
    flux = rng.uniform(0.5, 1.5, 5).astype(np.float32)
    amplitude = np.sqrt(diffract(probe * patches[:, None]) * flux[:, None, None]).astype(np.float32)
    assert patch_r_factor(patches, probe, amplitude, flux=flux) < 1e-6
    mask = rng.random((16, 16)) > 0.1
    amplitude[:, ~mask] = 0
    assert patch_r_factor(patches, probe, amplitude, flux=flux, mask=mask) < 1e-6
    assert patch_r_factor(patches, probe, amplitude, flux=flux) > 0.05
    with pytest.raises(PtychodaskError, match="have no light"):
        patch_r_factor(patches, probe, np.zeros_like(amplitude))
