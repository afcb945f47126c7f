"""Figures of merit against cases made by hand and against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import ive
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from ptychodask.errors import PtychodaskError
from ptychodask.judging.metrics import (
    PTYCHOPINN_PEAK,
    align_gauge,
    amplitude_ratio,
    band_correlations,
    contrast_radius,
    correlation,
    crossing,
    frc,
    half_bit,
    mae,
    ms_ssim,
    mse,
    psnr,
    spoke_contrast,
    ssim,
)
from ptychodask.simulate import random_field, siemens_star

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


def test_weights_are_the_say_of_pixels():
    estimate, truth = np.array([[1.0, 5.0, 3.0]]), np.array([[0.0, 3.0, 3.5]])
    weight = np.array([[3.0, 1.0, 0.0]])
    assert mae(estimate, truth, weight=weight) == pytest.approx((3 * 1 + 1 * 2) / 4)
    assert mse(estimate, truth, weight=weight) == pytest.approx((3 * 1 + 1 * 4) / 4)
    assert psnr(estimate, truth, peak=2.0, weight=weight) == pytest.approx(10 * np.log10(4 / 1.75))
    assert amplitude_ratio(estimate, truth, weight=weight) == pytest.approx((3 * 1 + 5) / 3)
    with pytest.raises(PtychodaskError, match=r"weight has shape \(1, 2\), expected that of the arrays, \(1, 3\)"):
        mae(estimate, truth, weight=weight[:, 1:])
    with pytest.raises(PtychodaskError, match="no pixel seen in both arrays has a positive weight"):
        mae(estimate, truth, weight=np.zeros((1, 3)))


@pytest.mark.parametrize("figure", [mae, mse, amplitude_ratio, correlation])
def test_a_mask_is_a_weight_of_zero_and_one(truth, rng, figure):
    one = np.abs(truth).astype(np.float64)
    other = one + 0.1 * rng.standard_normal(one.shape)
    mask = rng.random(one.shape) > 0.3
    hidden = np.where(mask, other, np.nan)
    assert figure(other, one, weight=mask) == pytest.approx(figure(hidden, one), rel=1e-12)


def test_errors_psnr_and_ssim_are_those_of_scikit_image(truth, rng):
    one = np.abs(truth).astype(np.float64)
    other = one + 0.05 * rng.standard_normal(one.shape)
    assert mse(other, one) == pytest.approx(mean_squared_error(one, other), rel=1e-6)
    assert psnr(other, one, peak=0.5) == pytest.approx(peak_signal_noise_ratio(one, other, data_range=0.5), rel=1e-6)
    assert ssim(other, one, data_range=0.5) == pytest.approx(
        structural_similarity(one, other, data_range=0.5), rel=1e-6
    )


def test_the_peak_of_ptychopinns_tables_is_255():
    truth = np.zeros((3, 4))
    estimate = np.full((3, 4), np.sqrt(0.0084030))
    assert psnr(estimate, truth, peak=PTYCHOPINN_PEAK) == pytest.approx(68.886, abs=5e-4)
    assert psnr(estimate, truth, peak=1.0) == pytest.approx(20.756, abs=5e-4)


@pytest.fixture
def wide(rng):
    """A textured picture and a blurred, noisy one of it, both large enough for five scales."""
    one = np.abs(random_field((192, 208), rng)).astype(np.float64)
    return one, gaussian_filter(one, 1) + 0.03 * rng.standard_normal(one.shape)


def test_one_scale_of_ms_ssim_is_scikit_images_gaussian_ssim(wide):
    one, other = wide
    expected = structural_similarity(
        one, other, data_range=0.5, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ms_ssim(other, one, data_range=0.5, exponents=(1.0,)) == pytest.approx(expected, rel=1e-6)


def test_ms_ssim_is_that_of_tensorflow(wide):
    import tensorflow as tf

    one, other = (tf.constant(values[None, :, :, None], tf.float32) for values in wide)
    expected = float(tf.image.ssim_multiscale(one, other, 0.5)[0])
    # TensorFlow computes in float32.
    assert ms_ssim(wide[1], wide[0], data_range=0.5) == pytest.approx(expected, abs=1e-5)


def test_ms_ssim_of_a_part_is_that_of_the_part_alone(wide):
    one, other = (np.pad(values, ((0, 0), (32, 0))) for values in wide)
    expected = ms_ssim(wide[1], wide[0], data_range=0.5)
    assert ms_ssim(other, one, data_range=0.5, weight=np.arange(240) >= np.full((192, 1), 32)) == pytest.approx(
        expected
    )
    other[:, :32] = np.nan
    assert ms_ssim(other, one, data_range=0.5) == pytest.approx(expected)


def test_ms_ssim_needs_a_window_at_its_coarsest_scale(wide):
    one, other = (values[:175] for values in wide)
    assert np.isnan(ms_ssim(other, one, data_range=0.5))
    assert 0 < ms_ssim(other, one, data_range=0.5, exponents=(0.5, 0.5)) < 1
    assert ms_ssim(one, one, data_range=0.5, exponents=(0.5, 0.5)) == pytest.approx(1)


def test_ssim_of_a_part_is_that_of_the_part_alone(truth, rng):
    one = np.abs(truth).astype(np.float64)
    other = one + 0.05 * rng.standard_normal(one.shape)
    expected = structural_similarity(one[:, 20:], other[:, 20:], data_range=0.5)
    other[:, :20] = np.nan
    assert ssim(other, one, data_range=0.5) == pytest.approx(expected)
    assert np.isnan(ssim(other[:4], one[:4], data_range=0.5))


def all_crossings(one, other):
    frequency, correlation = frc(one, other)
    return [crossing(frequency, correlation, threshold) for threshold in (0.5, half_bit(frequency), 1 / 7)]


@pytest.mark.parametrize("side", [64, 65])
def test_ring_correlation_of_a_picture_with_itself_is_one(rng, side):
    truth = rng.standard_normal((side, 70))
    frequency, correlation = frc(truth, -3 * truth + 5)
    np.testing.assert_allclose(correlation, -1, rtol=1e-12)
    np.testing.assert_allclose(frequency, np.arange(side // 2 + 1) / side)
    assert all_crossings(3 * truth + 5, truth) == [0.5, 0.5, 0.5]


def test_ring_correlation_of_independent_noise_is_about_zero(rng):
    one, other = rng.standard_normal((2, 256, 256))
    _, correlation = frc(one, other)
    # A ring of n frequencies scatters by about 2 / sqrt(n), for half are conjugates and the window couples neighbours.
    assert abs(correlation[20:].mean()) < 0.02
    assert correlation[20:].std() < 0.12
    assert max(all_crossings(one, other)) < 0.02


def test_ring_correlation_crosses_where_the_common_band_ends(rng):
    one, other = rng.standard_normal((2, 128, 140))
    high = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(140), indexing="ij")) > 0.2
    limited = np.fft.ifft2(np.where(high, np.fft.fft2(other), np.fft.fft2(one))).real
    # The Hann window is three frequencies wide, the square's are 1/128 apart.
    np.testing.assert_allclose(all_crossings(limited, one), 0.2, atol=2 / 128)


def test_ring_correlation_of_signal_and_noise_follows_their_ratio(rng):
    signal, *noise = rng.standard_normal((3, 256, 256))
    # FSC = SNR / (1 + SNR) of each half (Saxton & Baumeister); SNR 1 in each gives one half.
    _, correlation = frc(signal + noise[0], signal + noise[1])
    assert correlation[10:].mean() == pytest.approx(0.5, abs=0.02)


def test_a_weight_hides_pixels_from_the_ring_correlation(rng):
    truth = rng.standard_normal((96, 96))
    fade = np.clip((np.arange(96) - 30) / 10, 0, 1) * np.ones((96, 1))
    spoilt = np.where(np.arange(96) < 30, rng.standard_normal((96, 96)), truth)
    assert frc(spoilt, truth)[1][1:].mean() < 0.95
    np.testing.assert_allclose(frc(spoilt, truth, weight=fade)[1][1:], 1, atol=1e-12)


def test_ring_correlation_of_a_constant_is_unknown(truth):
    frequency, correlation = frc(np.ones((50, 64)), np.abs(truth))
    assert np.isnan(correlation).all()
    assert np.isnan(crossing(frequency, correlation, 0.5))


def test_half_bit_curve_is_that_of_van_heel_and_schatz():
    frequency = np.arange(513) / 1024
    curve = half_bit(frequency)
    # Ring 1 of a square holds 8 frequencies: (0, ±1), (±1, 0), (±1, ±1).
    assert curve[1] == pytest.approx((0.2071 + 1.9102 / np.sqrt(8)) / (1.2071 + 0.9102 / np.sqrt(8)))
    # Half a bit in each pixel of the sum needs an SNR of √2 − 1, half of it in each picture.
    assert curve[-1] == pytest.approx(0.2071 / 1.2071, abs=0.03)
    assert (np.diff(curve[1:]) < 0.02).all()


def test_a_curve_crosses_between_rings_and_once():
    frequency = np.arange(6) / 10
    curve = np.array([0.0, 1.0, 0.8, 0.2, 0.9, 0.1])
    assert crossing(frequency, curve, 0.5) == pytest.approx(0.25)
    assert crossing(frequency, curve, np.array([1, 0.1, 0.1, 0.1, 1.0, 1.0])) == pytest.approx(0.3 + 0.1 * 0.1 / 0.2)
    assert crossing(frequency, np.full(6, 0.9), 0.5) == 0.5
    assert crossing(frequency, np.zeros(6), 0.5) == pytest.approx(0.1)


def blurred_contrast(radius_px, n_spokes, sigma_px):
    """Contrast of endless spokes blurred by a Gaussian, relative to sharp ones: exact, for any radius.

    The blur of exp(inθ) is exp(inθ) ∫ r'/σ² exp(−(r² + r'²)/2σ²) Iₙ(rr'/σ²) dr' (Gradshteyn & Ryzhik, 6.631 and 8.406).
    """
    z = radius_px**2 / (4 * sigma_px**2)
    return np.sqrt(np.pi * z / 2) * (ive((n_spokes - 1) / 2, z) + ive((n_spokes + 1) / 2, z))


def test_the_exact_contrast_of_a_blur_is_the_usual_transfer_function_of_large_circles():
    radius = np.array([60.0, 120.0])
    usual = np.exp(-2 * (np.pi * 3.0 * 20 / (2 * np.pi * radius)) ** 2)
    np.testing.assert_allclose(blurred_contrast(radius, 20, 3.0), usual, atol=2e-3)


@pytest.mark.parametrize("n_spokes", [20, 36])
@pytest.mark.parametrize("sigma_px", [1.0, 2.0, 3.5])
def test_spoke_contrast_falls_as_a_known_blur_makes_it(n_spokes, sigma_px):
    sharp = np.angle(siemens_star((301, 301), n_spokes=n_spokes))
    radius, before = spoke_contrast(sharp, (150, 150), n_spokes)
    _, after = spoke_contrast(gaussian_filter(sharp, sigma_px), (150, 150), n_spokes)
    # Between hub and gap, four blurs from either. The edges of a star of two values fall on pixels by chance.
    inside = (radius > 0.05 * 144 + 4 * sigma_px) & (radius < 0.48 * 144 - 4 * sigma_px)
    expected = blurred_contrast(radius, n_spokes, sigma_px)
    np.testing.assert_allclose((after / before)[inside], expected[inside], atol=0.03)
    wide = (radius > 45) & (radius < 0.48 * 144 - 4 * sigma_px)
    # The pixel's own area blurs too, with a variance of 1/12.
    both = blurred_contrast(radius, n_spokes, np.sqrt(sigma_px**2 + 1 / 12))
    found = contrast_radius(radius, after, (radius[wide][0], radius[wide][-1]))
    assert found == pytest.approx(np.interp(0.5 * both[wide].mean(), both, radius), abs=1)


def test_spoke_contrast_is_half_the_peak_to_peak_of_a_wave_whatever_lies_beside_it():
    y, x = np.indices((90, 101)) - np.array([44.3, 50.8])[:, None, None]
    wave = 7 + 0.25 * np.cos(11 * np.arctan2(y, x) + 0.4)
    wave[20:30] = np.nan
    radius, contrast = spoke_contrast(wave, (44.3, 50.8), 11)
    assert (radius[0], radius[-1]) == (4, 44)
    np.testing.assert_allclose(contrast, 0.25, rtol=1e-6)


def test_missing_spokes_lower_the_contrast_of_all_circles_alike():
    sharp = np.angle(siemens_star((301, 301), n_spokes=20))
    y, x = np.indices(sharp.shape) - 150
    some = np.where(np.abs(np.arctan2(y, x)) < 5 * np.pi / 20, sharp.min(), sharp)
    radius, whole = spoke_contrast(sharp, (150, 150), 20)
    _, less = spoke_contrast(some, (150, 150), 20)
    np.testing.assert_allclose((less / whole)[(radius > 20) & (radius < 60)], 0.75, atol=0.03)


def test_circles_that_are_mostly_unseen_have_no_contrast():
    values = np.where(np.hypot(*(np.indices((61, 61)) - 30)) < 19.6, 1.0, np.nan)
    radius, contrast = spoke_contrast(values, (30, 30), 6)
    np.testing.assert_array_equal(np.isnan(contrast), radius >= 20)
    with pytest.raises(PtychodaskError, match=r"outer_px \(25, 30\) contains no circle with a contrast.* 2 to 30 px"):
        contrast_radius(radius, contrast, (25, 30))


def test_contrast_that_never_falls_has_the_smallest_radius():
    radius, contrast = np.arange(3.0, 9.0), np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert contrast_radius(radius, contrast, (6, 8)) == 3
    assert contrast_radius(radius, np.where(radius < 5, np.nan, contrast), (6, 8)) == 5


@pytest.mark.parametrize(
    ("centre", "n_spokes", "message"),
    [((30, 30), 0, "n_spokes is 0"), ((30, 30), 100, "need a radius of 32 pixels"), ((2, 30), 20, "has room for 2")],
)
def test_a_star_without_a_circle_to_judge_is_refused(centre, n_spokes, message):
    with pytest.raises(PtychodaskError, match=message):
        spoke_contrast(np.zeros((61, 61)), centre, n_spokes)


def noise_in_band(shape, low, high, rng):
    """White noise that holds only periodic waves between two frequencies."""
    spectrum = np.fft.fft2(rng.standard_normal(shape))
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1]))
    return np.fft.ifft2(np.where((frequency > low) & (frequency < high), spectrum, 0)).real


def cut(waves):
    """Waves over an area whose sides no period fits into."""
    return [wave[7:247, 11:331] for wave in waves]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_each_band_of_the_phase_is_judged_by_itself(rng, wrong):
    edges = ((0.003, 0.015), (0.03, 0.08), (0.12, 0.4))
    right = cut(noise_in_band((360, 360), *edge, rng) for edge in edges)
    other = cut(noise_in_band((360, 360), *edge, rng) for edge in edges)
    right, other = ([wave / wave.std() for wave in waves] for waves in (right, other))
    expected = [1.0, 1.0, 1.0]
    expected[wrong] = correlation(other[wrong], right[wrong])
    estimate = [*right[:wrong], other[wrong], *right[wrong + 1 :]]
    bands = band_correlations(sum(estimate), sum(right))
    np.testing.assert_allclose(bands, expected, atol=0.05)


def test_bands_ignore_unseen_pixels_and_a_constant(rng):
    right = sum(cut([noise_in_band((360, 360), *edge, rng) for edge in ((0.003, 0.015), (0.03, 0.08), (0.12, 0.4))]))
    y, x = np.indices(right.shape)
    holes = (np.hypot(y - 120, x - 160) > 118) | (np.hypot(y - 100, x - 150) < 12)
    estimate = np.where(holes, np.nan, right + 0.3)
    np.testing.assert_allclose(band_correlations(estimate, right), 1, atol=1e-9)
    np.testing.assert_allclose(band_correlations(-estimate, right), -1, atol=1e-9)
    spoiled = np.where(holes, 1e3, right)
    np.testing.assert_allclose(band_correlations(spoiled, right, weight=~holes), 1, atol=1e-9)


def test_bands_agree_with_the_plain_correlation_if_there_is_one_band(rng):
    one, other = (rng.standard_normal((40, 51)) for _ in range(2))
    (whole,) = band_correlations(one, one + 2 * other, edges=())
    assert whole == pytest.approx(correlation(one, one + 2 * other), abs=1e-12)


def test_a_band_without_frequencies_or_power_has_no_correlation(rng):
    slow, middle, fine = band_correlations(*rng.standard_normal((2, 20, 20)))
    assert np.isnan(slow)
    assert np.isfinite([middle, fine]).all()
    x = np.zeros((64, 1)) + np.arange(64)
    wave = np.cos(np.pi * (x + 0.5) * 20 / 64)  # one coefficient of the cosine transform, at 20/128 cycles per pixel
    found = band_correlations(wave, rng.standard_normal((64, 64)))
    assert np.isnan(found).tolist() == [True, True, False]
