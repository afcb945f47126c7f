"""Metrics of a reconstructed object, and explicit removal of its gauge.

A pixel is seen if it is not NaN. A gauge is a quantity that the data do not fix: the global phase, a phase ramp and,
for a probe of unknown scale, a factor of the amplitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from skimage.metrics import structural_similarity

from ptychodask.errors import PtychodaskError
from ptychodask.forward import r_factor

__all__ = [
    "METRICS",
    "Gauge",
    "Metric",
    "PartPair",
    "align_gauge",
    "amplitude_ratio",
    "band_correlations",
    "contrast_radius",
    "correlation",
    "crossing",
    "frc",
    "half_bit",
    "mae",
    "ms_ssim",
    "mse",
    "psnr",
    "r_factor",
    "seen_in_both",
    "spoke_contrast",
    "ssim",
    "well_lit",
]


WELL_LIT = 0.1
"""Minimum weight of a well-lit pixel, relative to the median; excludes the edge of the scan."""


PTYCHOPINN_PEAK = 255.0
"""PSNR peak used in PtychoPINN's tables, regardless of the unit of the object."""


SSIM_WINDOW = 7
"""Pixels across the uniform window of `ssim`."""


MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponent of each scale of `ms_ssim`, finest first (Wang et al. 2003, section 3.2)."""


MS_SSIM_SIGMA = 1.5
"""Standard deviation, pixels, of the Gaussian window of `ms_ssim`."""


MS_SSIM_WINDOW = 11
"""Pixels across the Gaussian window of `ms_ssim`, which is truncated there."""


SSIM_CONSTANTS = (0.01, 0.03)
"""K1 and K2 of the structural similarity (Wang et al. 2004, section III.B)."""


BAND_EDGES = (0.02, 0.1)
"""Cycles per pixel between the slow, middle and fine bands of `band_correlations`."""


BAND_ROUNDING = 1e-6
"""Share of an array's norm up to which a band holds only rounding errors."""


ZOOM_STEPS = 10
"""Refinements of the search for a phase ramp; each reduces the step four times."""


@dataclass(frozen=True)
class Gauge:
    """Gauge removed by `align_gauge`.

    estimate = aligned · scale · exp(i (phase + ramp · (row, column))).
    """

    phase_rad: float = 0.0
    """Global phase, radians."""

    ramp_yx_rad_per_px: tuple[float, float] = (0.0, 0.0)
    """Slope of the phase ramp, radians per pixel along y and x."""

    scale: float = 1.0
    """Factor of the amplitude, estimate over aligned."""


def align_gauge(
    estimate: NDArray[np.complexfloating[Any, Any]],
    truth: NDArray[np.complexfloating[Any, Any]],
    *,
    weight: NDArray[np.floating[Any]] | None = None,
    phase: bool = True,
    ramp: bool = True,
    scale: bool = False,
) -> tuple[NDArray[np.complex64], Gauge]:
    """Remove global phase, phase ramp and scale relative to a reference.

    Parameters
    ----------
    estimate, truth : complex array (y, x)
        Pixels that are NaN in either are ignored.
    weight : float array (y, x), optional
        Weight of each pixel; equal by default.
    phase, ramp : bool
        Remove the global phase and the phase ramp; the ramp only together with the phase.
    scale : bool
        Remove a factor of the amplitude. It is a gauge only if the scale of the probe is unknown (calibration
        ``mean_counts``).

    Returns
    -------
    aligned : complex64 array (y, x)
        NaN where the estimate is NaN.
    gauge : Gauge
        The removed phase, ramp and scale.

    Raises
    ------
    PtychodaskError
        If the shapes differ, no pixel is seen in both, or `ramp` is set without `phase`.

    Notes
    -----
    The ramp maximises |Σ w · estimate · conj(truth) · exp(−i ramp)|. This is the peak of a Fourier transform, which is
    sampled ever more finely around its maximum (M. Guizar-Sicairos et al., Opt. Lett. 33 (2008) 156, with the roles of
    space and frequency exchanged). The scale is the least-squares factor between the amplitudes.

    Examples
    --------
    >>> truth = np.exp(1j * np.random.default_rng(0).random((8, 8)))
    >>> aligned, gauge = align_gauge(truth * np.exp(1j * (2 + 0.1 * np.arange(8))), truth)
    >>> round(gauge.phase_rad, 4), [round(value, 4) for value in gauge.ramp_yx_rad_per_px]
    (2.0, [0.0, 0.1])
    """
    if ramp and not phase:
        raise PtychodaskError("align_gauge: ramp=True with phase=False, expected both or phase only")
    seen = seen_in_both(estimate, truth)
    weights = seen.astype(np.float64) if weight is None else np.where(seen, weight, 0.0)
    product = np.zeros(estimate.shape, np.complex128)
    product[seen] = weights[seen] * estimate[seen] * np.conj(truth[seen])
    slope = _ramp_of(product) if ramp else (0.0, 0.0)
    plane = slope[0] * np.arange(estimate.shape[0])[:, None] + slope[1] * np.arange(estimate.shape[1])
    turn = float(np.angle((product * np.exp(-1j * plane)).sum())) if phase else 0.0
    factor = 1.0
    if scale:
        amplitude, expected = np.abs(estimate[seen]), np.abs(truth[seen])
        factor = float((weights[seen] * amplitude**2).sum() / (weights[seen] * amplitude * expected).sum())
    aligned = estimate * np.exp(-1j * (turn + plane)) / factor
    return aligned.astype(np.complex64), Gauge(turn, slope, factor)


def seen_in_both(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """True where neither array is NaN.

    Raises
    ------
    PtychodaskError
        If the shapes differ, or there is no such pixel.
    """
    if one.shape != other.shape:
        raise PtychodaskError(f"metrics: the arrays have shapes {one.shape} and {other.shape}, expected the same")
    seen = np.isfinite(one) & np.isfinite(other)
    if not seen.any():
        raise PtychodaskError("metrics: no pixel is seen in both arrays, so they cannot be compared")
    return seen


def well_lit(weight: NDArray[np.floating[Any]], least: float = WELL_LIT) -> NDArray[np.bool_]:
    """True where a weight is at least `least` of its median.

    Examples
    --------
    >>> well_lit(np.array([0.0, 0.1, 2.0, 3.0])).tolist()
    [False, False, True, True]
    """
    reached = weight[weight > 0]
    return weight >= (least * float(np.median(reached)) if reached.size else np.inf)


def _ramp_of(product: NDArray[np.complex128]) -> tuple[float, float]:
    """Ramp (y, x), radians per pixel, that maximises |Σ product| when removed."""
    shape = np.array(product.shape)
    spectrum = np.abs(scipy.fft.fft2(product))
    peak = np.array(np.unravel_index(spectrum.argmax(), spectrum.shape))
    frequency = np.where(peak > shape / 2, peak - shape, peak) / shape
    step = np.where(shape > 1, 0.25 / shape, 0.0)
    y, x = np.arange(shape[0]), np.arange(shape[1])
    for _ in range(ZOOM_STEPS):
        tried = frequency[:, None] + step[:, None] * np.arange(-4, 5)
        zoomed = np.exp(-2j * np.pi * np.outer(tried[0], y)) @ product @ np.exp(-2j * np.pi * np.outer(x, tried[1]))
        best = np.unravel_index(np.abs(zoomed).argmax(), zoomed.shape)
        frequency = np.array([tried[0, best[0]], tried[1, best[1]]])
        step = step / 4
    slope = 2 * np.pi * frequency
    return float(slope[0]), float(slope[1])


def _pixel_weights(estimate: NDArray[Any], truth: NDArray[Any], weight: NDArray[Any] | None) -> NDArray[np.float64]:
    """Weight of each pixel (y, x), 0 if unseen in either array."""
    seen = seen_in_both(estimate, truth)
    if weight is None:
        return seen.astype(np.float64)
    if weight.shape != seen.shape:
        raise PtychodaskError(f"metrics: weight has shape {weight.shape}, expected that of the arrays, {seen.shape}")
    weights = np.where(seen, weight, 0.0).astype(np.float64)
    if not weights.sum() > 0:
        raise PtychodaskError("metrics: no pixel seen in both arrays has a positive weight, so they cannot be compared")
    return weights


def _mean(values: NDArray[Any], weights: NDArray[np.float64]) -> float:
    """Weighted mean over the pixels of positive weight; others may be NaN."""
    return float(np.average(values[weights > 0], weights=weights[weights > 0]))


def correlation(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Pearson correlation of real arrays (y, x); NaN if one is constant.

    Examples
    --------
    >>> round(correlation(np.array([[1.0, 2.0, np.nan]]), np.array([[0.0, -0.3, 7.0]])), 6)
    -1.0
    """
    weights = _pixel_weights(estimate, truth, weight)
    one, other = estimate - _mean(estimate, weights), truth - _mean(truth, weights)
    spread = np.sqrt(_mean(one * one, weights) * _mean(other * other, weights))
    return float(_mean(one * other, weights) / spread) if spread > 0 else float("nan")


def band_correlations(
    estimate: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    *,
    edges: tuple[float, ...] = BAND_EDGES,
    weight: NDArray[Any] | None = None,
) -> tuple[float, ...]:
    """Pearson correlation of real arrays (y, x) in bands of spatial frequency.

    Parameters
    ----------
    estimate, truth : float array (y, x)
        Phases in a common gauge (`align_gauge`), relative to a mean phase so that they do not wrap. Pixels that are
        NaN in either are ignored.
    edges : floats
        Ascending frequencies, cycles per pixel, between the bands.
    weight : array (y, x), optional
        Weight of each pixel in the correlation; pixels of weight 0 are ignored.

    Returns
    -------
    tuple of float
        One for each band: from 0 to the first edge, between edges, and from the last edge up. NaN for a band that
        contains no frequency (the slow one needs more than 25 pixels) or only rounding errors.

    Notes
    -----
    Both arrays are filtered in the discrete cosine transform (type II, N. Ahmed et al., IEEE Trans. Comput. C-23 (1974)
    90), whose k-th coefficient along a side of n pixels has k/(2n) cycles per pixel, and correlated over the seen
    pixels, as in `correlation`. The transform continues an array by its mirror image (S. A. Martucci, IEEE Trans.
    Signal Process. 42 (1994) 1038), so that edges add little to the fine bands, without a window that would favour the
    centre. Unseen pixels take the value of the nearest seen one. A band is not free of its neighbours: if all slow
    variations are wrong, a perfect middle band reads 0.8 to 0.95.

    Examples
    --------
    >>> x = np.zeros((400, 1)) + np.arange(400)
    >>> slow, fine = np.cos(2 * np.pi * 0.01 * x), np.cos(2 * np.pi * 0.2 * x)
    >>> low, _, high = band_correlations(fine - slow, fine + slow)
    >>> round(low, 2), round(high, 2)
    (-1.0, 1.0)
    """
    weights = _pixel_weights(estimate, truth, weight)
    one, other = (_cosine_transform(values, weights) for values in (estimate, truth))
    frequency = np.hypot(*np.ix_(*(np.arange(size) / (2 * size) for size in weights.shape)))
    band = np.digitize(frequency, edges)
    # The constant is a gauge freedom.
    band[0, 0] = -1
    return tuple(_correlation_within(one, other, band == k, weights) for k in range(len(edges) + 1))


def _cosine_transform(values: NDArray[np.floating[Any]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal cosine transform; pixels without weight like the nearest others."""
    centred = values - _mean(values, weights)
    if not weights.all():
        centred = centred[tuple(distance_transform_edt(weights == 0, return_distances=False, return_indices=True))]
    return scipy.fft.dctn(centred.astype(np.float64), norm="ortho")  # type: ignore[no-any-return]


def _correlation_within(
    one: NDArray[np.float64], other: NDArray[np.float64], band: NDArray[np.bool_], weights: NDArray[np.float64]
) -> float:
    """Correlation of transformed arrays in a band; NaN without power there."""
    for transformed in (one, other):
        if np.linalg.norm(transformed[band]) <= BAND_ROUNDING * np.linalg.norm(transformed):
            return float("nan")
    filtered = (scipy.fft.idctn(np.where(band, transformed, 0), norm="ortho") for transformed in (one, other))
    return correlation(*filtered, weight=weights)


def amplitude_ratio(estimate: NDArray[Any], truth: NDArray[Any], *, weight: NDArray[Any] | None = None) -> float:
    """Mean |estimate| over mean |truth| of the seen pixels (y, x)."""
    weights = _pixel_weights(estimate, truth, weight)
    return _mean(np.abs(estimate), weights) / _mean(np.abs(truth), weights)


def mae(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Mean absolute difference of real arrays (y, x) over the seen pixels.

    Parameters
    ----------
    estimate, truth : float array (y, x)
        Pixels that are NaN in either are ignored.
    weight : array (y, x), optional
        Weight of each pixel, here and in the other metrics; a mask is a weight of 0 and 1. Equal by default.

    Examples
    --------
    >>> mae(np.array([[1.0, 2.0, np.nan]]), np.array([[1.0, 4.0, 5.0]]))
    1.0
    """
    return _mean(np.abs(estimate - truth), _pixel_weights(estimate, truth, weight))


def mse(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Mean squared difference of real arrays (y, x) over the seen pixels."""
    return _mean(np.square(estimate - truth, dtype=np.float64), _pixel_weights(estimate, truth, weight))


def psnr(
    estimate: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    *,
    peak: float,
    weight: NDArray[Any] | None = None,
) -> float:
    """Peak signal-to-noise ratio of real arrays (y, x) over the seen pixels.

    Parameters
    ----------
    estimate, truth : float array (y, x)
    peak : float
        Maximum or range of the signal, in the unit of the arrays, or `PTYCHOPINN_PEAK`; report it with the value.
    weight : array (y, x), optional

    Returns
    -------
    float
        10 log10(peak² / mse), decibels; infinite if both are equal.

    Examples
    --------
    >>> psnr(np.array([[0.0, 0.1]]), np.array([[0.1, 0.0]]), peak=1.0)
    20.0
    """
    error = mse(estimate, truth, weight=weight)
    return float(10 * np.log10(peak**2 / error)) if error > 0 else float("inf")


def ssim(
    estimate: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    *,
    data_range: float,
    weight: NDArray[Any] | None = None,
) -> float:
    """Mean structural similarity of real arrays (y, x) over completely seen windows.

    Parameters
    ----------
    estimate, truth : float array (y, x)
    data_range : float
        Range of the signal, in the unit of the arrays; report it with the value.
    weight : array (y, x), optional
        Weight of the window around each pixel; a window that contains a weight of 0 is left out.

    Returns
    -------
    float
        As `skimage.metrics.structural_similarity` (uniform window of `SSIM_WINDOW` pixels); NaN if no window is
        completely seen.

    Notes
    -----
    Z. Wang et al., IEEE Trans. Image Process. 13 (2004) 600.
    """
    weights = _pixel_weights(estimate, truth, weight)
    complete = _complete_windows(weights > 0, SSIM_WINDOW)
    if not complete.any():
        return float("nan")
    one, other = (np.where(weights > 0, values, 0).astype(np.float64) for values in (estimate, truth))
    _, similarity = structural_similarity(one, other, win_size=SSIM_WINDOW, data_range=data_range, full=True)
    return _mean(similarity, weights * complete)


def _complete_windows(seen: NDArray[np.bool_], n_pixels: int) -> NDArray[np.bool_]:
    """True where the window around a pixel is completely seen."""
    return binary_erosion(seen, np.ones((n_pixels, n_pixels)))


def ms_ssim(
    estimate: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    *,
    data_range: float,
    exponents: tuple[float, ...] = MS_SSIM_EXPONENTS,
    weight: NDArray[Any] | None = None,
) -> float:
    """Multi-scale structural similarity of real arrays (y, x).

    Parameters
    ----------
    estimate, truth : float array (y, x)
    data_range : float
        Range of the signal, in the unit of the arrays; report it with the value.
    exponents : tuple of float
        One for each scale, finest first; each scale has half the resolution of the one before.
    weight : array (y, x), optional
        Weight of the window around each pixel; a window that contains a weight of 0 is left out.

    Returns
    -------
    float
        Product over the scales of the mean of contrast times structure (times luminance at the coarsest scale), raised
        to the exponent of the scale; a negative mean counts as 0. NaN if no window is completely seen at the coarsest
        scale: five scales need a seen area of 176 x 176 pixels. For a smaller one pass fewer exponents, and report them
        with the value.

    Notes
    -----
    Z. Wang et al., Proc. 37th Asilomar Conf. Signals, Systems and Computers (2003) 1398. Gaussian window of
    `MS_SSIM_SIGMA`; a coarser pixel is the mean of 2 x 2 finer ones, and unseen if one of these is.
    """
    weights = _pixel_weights(estimate, truth, weight)
    seen = weights > 0
    one, other = (np.where(seen, values, 0).astype(np.float64) for values in (estimate, truth))
    product = 1.0
    for scale, exponent in enumerate(exponents):
        if scale:
            seen = np.asarray(_cells(seen).all(axis=(1, 3)))
            one, other, weights = (_cells(values).mean(axis=(1, 3)) for values in (one, other, weights))
        complete = _complete_windows(seen, MS_SSIM_WINDOW)
        if not complete.any():
            return float("nan")
        luminance, structure = _similarities(one, other, data_range)
        similarity = luminance * structure if scale == len(exponents) - 1 else structure
        product *= max(_mean(similarity, weights * complete), 0.0) ** exponent
    return product


def _cells(values: NDArray[Any]) -> NDArray[Any]:
    """Cells of 2 x 2 pixels (row, 2, column, 2).

    An odd last row or column is left out.
    """
    height, width = (size // 2 for size in values.shape)
    return values[: 2 * height, : 2 * width].reshape(height, 2, width, 2)


def _similarities(
    one: NDArray[np.float64], other: NDArray[np.float64], data_range: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Luminance, and contrast times structure, in the window around each pixel.

    Notes
    -----
    Wang et al. 2004, equations 6 and, with C3 = C2/2, 9 times 10.
    """

    def local_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_filter(values, MS_SSIM_SIGMA, radius=MS_SSIM_WINDOW // 2)

    constant_1, constant_2 = ((factor * data_range) ** 2 for factor in SSIM_CONSTANTS)
    mean_1, mean_2 = local_mean(one), local_mean(other)
    covariance = local_mean(one * other) - mean_1 * mean_2
    variances = local_mean(one * one) - mean_1**2 + local_mean(other * other) - mean_2**2
    luminance = (2 * mean_1 * mean_2 + constant_1) / (mean_1**2 + mean_2**2 + constant_1)
    return luminance, (2 * covariance + constant_2) / (variances + constant_2)


def frc(
    estimate: NDArray[Any], truth: NDArray[Any], *, weight: NDArray[Any] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fourier ring correlation of two arrays over their central square.

    Parameters
    ----------
    estimate, truth : real or complex array (y, x)
        Unseen pixels are set to the mean of the seen ones.
    weight : array (y, x), optional
        Multiplies both. It should fall off smoothly: an edge that both arrays share adds correlation.

    Returns
    -------
    frequency : float64 array (ring,)
        Cycles per pixel, one ring per frequency step of the square, up to 0.5.
    correlation : float64 array (ring,)
        Real part of the normalised correlation over each ring; NaN if one array is constant.

    Notes
    -----
    W. O. Saxton, W. Baumeister, J. Microsc. 127 (1982) 127. The mean is subtracted and a Hann window applied, so that
    the edges of the square add no correlation.
    """
    weights = _pixel_weights(estimate, truth, weight)
    side = min(estimate.shape)
    square = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in estimate.shape)
    taper = np.outer(np.hanning(side), np.hanning(side))
    one, other = (
        scipy.fft.fft2((np.where(weights > 0, values - values[weights > 0].mean(), 0) * weights)[square] * taper)
        for values in (estimate, truth)
    )
    ring = _ring_index(side)
    powers = [_ring_sums(np.abs(spectrum) ** 2, ring) for spectrum in (one, other)]
    curve = _ring_sums((one * np.conj(other)).real, ring)
    curve /= np.maximum(np.sqrt(powers[0] * powers[1]), np.finfo(np.float64).tiny)
    if not all(power.any() for power in powers):
        curve[:] = np.nan
    return np.arange(side // 2 + 1, dtype=np.float64) / side, curve


def _ring_index(side: int) -> NDArray[np.int64]:
    """Rounded distance (y, x) of each frequency of a square from zero."""
    frequency = scipy.fft.fftfreq(side)
    return np.rint(np.hypot(frequency[:, None], frequency) * side).astype(np.int64)


def _ring_sums(values: NDArray[Any], ring: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of values over each complete ring."""
    sums = np.bincount(ring.ravel(), weights=values.ravel())
    return sums[: len(ring) // 2 + 1].astype(np.float64)


def half_bit(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half-bit threshold of the Fourier ring correlation.

    Parameters
    ----------
    frequency : float64 array (ring,)
        From `frc`.

    Returns
    -------
    float64 array (ring,)
        (0.2071 + 1.9102/√n) / (1.2071 + 0.9102/√n) for a ring of n frequencies: half a bit of information per pixel.

    Notes
    -----
    M. van Heel, M. Schatz, J. Struct. Biol. 151 (2005) 250, equation 17. All frequencies of a ring are
    counted as independent, as is usual for objects that fill the square.
    """
    ring = _ring_index(round(1 / float(frequency[1])))
    root = np.sqrt(_ring_sums(np.ones(ring.shape), ring))
    return (0.2071 + 1.9102 / root) / (1.2071 + 0.9102 / root)


def crossing(
    frequency: NDArray[np.float64], correlation: NDArray[np.float64], threshold: float | NDArray[np.float64]
) -> float:
    """Lowest frequency at which a ring correlation falls below a threshold.

    Parameters
    ----------
    frequency, correlation : float64 array (ring,)
        From `frc`.
    threshold : float or float64 array (ring,)
        0.5 (FRC50), 1/7, or `half_bit(frequency)`.

    Returns
    -------
    float
        Cycles per pixel, linearly interpolated between rings; its inverse is the full-period resolution in pixels.
        0.5 if the correlation never falls below the threshold, the first ring if it is below from the start, NaN if
        the correlation is NaN.

    Notes
    -----
    The ring of zero frequency, which depends on the mean and the window, is ignored. An object with wrong low
    frequencies crosses in the first rings even if higher frequencies agree: look at the curve.

    Examples
    --------
    >>> crossing(np.array([0.0, 0.1, 0.2, 0.3]), np.array([1.0, 0.9, 0.6, 0.2]), 0.5)
    0.225
    """
    above = correlation - threshold
    if np.isnan(above).any():
        return float("nan")
    below = np.flatnonzero(above[1:] < 0) + 1
    if not len(below):
        return 0.5
    k = below[0]
    if k == 1:
        return float(frequency[1])
    return float(np.interp(0.0, [above[k], above[k - 1]], [frequency[k], frequency[k - 1]]))


def spoke_contrast(
    values: NDArray[np.floating[Any]], centre_yx_px: tuple[float, float], n_spokes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Contrast of the spokes of a Siemens star at each radius.

    Parameters
    ----------
    values : float array (y, x)
        Amplitude or phase of the star; NaN pixels are ignored.
    centre_yx_px : (float, float)
        Row and column of the centre of the star.
    n_spokes : int
        Spokes around the full circle, including any that are missing.

    Returns
    -------
    radius_px : float64 array (circle,)
        Integers, from the smallest circle with two pixels per spoke to the largest inside the array.
    contrast : float64 array (circle,)
        Amplitude (half of peak to peak) of the wave with `n_spokes` periods around the circle, in the unit of `values`;
        NaN if less than half of the circle's pixels are seen.

    Raises
    ------
    PtychodaskError
        If `n_spokes` is below 1, or no circle with two pixels per spoke fits into the array.

    Notes
    -----
    Least-squares fit of a + b cos nθ + c sin nθ to the pixels within half a pixel of each circle, without
    interpolation (C. Loebich et al., Proc. SPIE 6502 (2007) 65020N; ISO 12233). The spatial frequency across the spokes
    is ``n_spokes / (2 pi radius_px)`` cycles per pixel, so the contrast relative to that of large circles is the
    modulation transfer function there. Missing spokes lower the contrast of all circles by the same factor.

    Examples
    --------
    >>> y, x = np.indices((65, 65)) - 32
    >>> radius, contrast = spoke_contrast(3 + 0.5 * np.cos(8 * np.arctan2(y, x)), (32, 32), 8)
    >>> radius[0], radius[-1], contrast.round(6).min(), contrast.round(6).max()
    (np.float64(3.0), np.float64(32.0), np.float64(0.5), np.float64(0.5))
    """
    if n_spokes < 1:
        raise PtychodaskError(f"spoke_contrast: n_spokes is {n_spokes}, expected 1 or more")
    y, x = (np.arange(n) - at for n, at in zip(values.shape, centre_yx_px, strict=True))
    smallest, largest = int(np.ceil(n_spokes / np.pi)), int(np.floor(min(-y[0], y[-1], -x[0], x[-1])))
    if smallest > largest:
        raise PtychodaskError(
            f"spoke_contrast: {n_spokes} spokes need a radius of {smallest} pixels around {tuple(centre_yx_px)}, the "
            f"array of shape {values.shape} has room for {largest}; pass another centre, or fewer spokes"
        )
    angle = n_spokes * np.arctan2(y[:, None], x)
    circle = np.rint(np.hypot(y[:, None], x)).astype(np.int64)
    radius = np.arange(smallest, largest + 1)
    contrast = np.full(len(radius), np.nan)
    order = np.argsort(circle, axis=None)
    edges = np.searchsorted(circle.ravel()[order], np.arange(smallest, largest + 2))
    for k in range(len(radius)):
        on = order[edges[k] : edges[k + 1]]
        seen = on[np.isfinite(values.ravel()[on])]
        if 2 * len(seen) >= len(on):
            contrast[k] = _wave_amplitude(values.ravel()[seen], angle.ravel()[seen])
    return radius.astype(np.float64), contrast


def _wave_amplitude(values: NDArray[np.floating[Any]], angle_rad: NDArray[np.float64]) -> float:
    """Amplitude of the sinusoid in the least-squares fit of sinusoid plus constant."""
    basis = np.stack([np.ones_like(angle_rad), np.cos(angle_rad), np.sin(angle_rad)], axis=1)
    _, in_phase, out_of_phase = np.linalg.lstsq(basis, values.astype(np.float64), rcond=None)[0]
    return float(np.hypot(in_phase, out_of_phase))


def contrast_radius(
    radius_px: NDArray[np.float64],
    contrast: NDArray[np.float64],
    outer_px: tuple[float, float],
    *,
    level: float = 0.5,
) -> float:
    """Radius at which spoke contrast falls to a given level.

    Parameters
    ----------
    radius_px, contrast : float64 array (circle,)
        From `spoke_contrast`.
    outer_px : (float, float)
        Smallest and largest radius of the circles whose mean contrast is the outer value. Choose radii at which the
        spokes are wide, illuminated and complete.
    level : float
        Fraction of the mean outer contrast, between 0 and 1.

    Returns
    -------
    float
        Pixels, searched inwards and linearly interpolated between circles. If the contrast never falls so low, the
        smallest radius reached: the first circle, or the last before one without a contrast.

    Raises
    ------
    PtychodaskError
        If `outer_px` contains no circle with a contrast.

    Notes
    -----
    Half a period, one spoke or one gap, is ``pi * radius / n_spokes`` pixels wide there. If the spokes end at a hub,
    the radius is that of the hub and the resolution is finer than it suggests.

    Examples
    --------
    >>> round(contrast_radius(np.arange(1.0, 8.0), np.array([0.0, 0.1, 0.3, 0.5, 0.8, 0.8, 0.8]), (5, 7)), 6)
    3.5
    """
    outer = (radius_px >= outer_px[0]) & (radius_px <= outer_px[1]) & np.isfinite(contrast)
    if not outer.any():
        raise PtychodaskError(
            f"contrast_radius: outer_px {tuple(outer_px)} contains no circle with a contrast; the circles range from "
            f"{radius_px[0]:g} to {radius_px[-1]:g} px"
        )
    threshold = level * float(contrast[outer].mean())
    start = int(np.flatnonzero(outer)[0])
    low = np.flatnonzero(~(contrast[:start] > threshold))
    if not len(low):
        return float(radius_px[0])
    k = int(low[-1])
    if np.isnan(contrast[k]):
        return float(radius_px[k + 1])
    return float(np.interp(threshold, contrast[k : k + 2], radius_px[k : k + 2]))


PARTS = ("amplitude", "phase")
"""Parts of an object that have separate metrics."""


@dataclass(frozen=True, eq=False)
class PartPair:
    """One part of an object and of its reference, on common pixels."""

    estimate: NDArray[np.floating[Any]]
    """float (y, x), gauge removed, NaN where unseen."""

    truth: NDArray[np.floating[Any]]
    """The reference, float (y, x)."""

    data_range: float
    """Range of the reference, for SSIM; 0 if it is constant."""

    peak: float
    """Peak for the PSNR; 0 if that is the range of a constant."""

    ring_correlation: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Frequency and correlation of each ring, from `frc`."""

    @cached_property
    def band_correlations(self) -> tuple[float, ...]:
        """Correlation in the slow, middle and fine band."""
        return band_correlations(self.estimate, self.truth)


@dataclass(frozen=True)
class Metric:
    """One metric of `compare`, and its presentation in tables, reports and studies."""

    title: str
    """Name in reports, with the unit."""

    function: Callable[[PartPair], float]

    parts: tuple[str, ...] = PARTS
    """Parts that it applies to; NaN for others."""

    needs_structure: bool = True
    """NaN if the reference is constant, as the phase of an absorber, and has nothing to correlate with."""

    is_crossing: bool = False
    """The frequency, cycles per pixel, at which the ring correlation crosses a threshold: gives a resolution."""

    is_drawn: bool = False
    """Studies plot it over the dose."""

    def value(self, part: str, pair: PartPair) -> float:
        """Metric of one part; NaN if it does not apply."""
        applies = part in self.parts and (pair.data_range > 0 or not self.needs_structure)
        return self.function(pair) if applies else float("nan")


METRICS = {
    "correlation": Metric("correlation (Pearson)", lambda pair: correlation(pair.estimate, pair.truth)),
    "correlation_slow": Metric(
        f"correlation below {BAND_EDGES[0]} cycles per pixel", lambda pair: pair.band_correlations[0], parts=("phase",)
    ),
    "correlation_middle": Metric(
        f"correlation from {BAND_EDGES[0]} to {BAND_EDGES[1]} cycles per pixel",
        lambda pair: pair.band_correlations[1],
        parts=("phase",),
    ),
    "correlation_fine": Metric(
        f"correlation above {BAND_EDGES[1]} cycles per pixel", lambda pair: pair.band_correlations[2], parts=("phase",)
    ),
    "ratio": Metric(
        "ratio of mean amplitudes",
        lambda pair: amplitude_ratio(pair.estimate, pair.truth),
        parts=("amplitude",),
        needs_structure=False,
    ),
    "mae": Metric("mean absolute error", lambda pair: mae(pair.estimate, pair.truth), needs_structure=False),
    "mse": Metric("mean squared error", lambda pair: mse(pair.estimate, pair.truth), needs_structure=False),
    "psnr": Metric(
        "PSNR (dB)",
        lambda pair: psnr(pair.estimate, pair.truth, peak=pair.peak) if pair.peak > 0 else float("nan"),
        needs_structure=False,
        is_drawn=True,
    ),
    "ssim": Metric("SSIM", lambda pair: ssim(pair.estimate, pair.truth, data_range=pair.data_range), is_drawn=True),
    "ms_ssim": Metric("MS-SSIM", lambda pair: ms_ssim(pair.estimate, pair.truth, data_range=pair.data_range)),
    "frc50": Metric(
        "FRC crosses 1/2 (cycles per pixel)",
        lambda pair: crossing(*pair.ring_correlation, 0.5),
        is_crossing=True,
        is_drawn=True,
    ),
    "frc_half_bit": Metric(
        "FRC crosses the half-bit curve (cycles per pixel)",
        lambda pair: crossing(*pair.ring_correlation, half_bit(pair.ring_correlation[0])),
        is_crossing=True,
    ),
    "frc_1_7": Metric(
        "FRC crosses 1/7 (cycles per pixel)", lambda pair: crossing(*pair.ring_correlation, 1 / 7), is_crossing=True
    ),
}
"""Metrics of each part of an object, in the order of tables; a new one is an entry here."""
