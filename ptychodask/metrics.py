"""Figures of merit of a reconstructed object, with the gauge that was removed said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, gaussian_filter
from skimage.metrics import structural_similarity

from ptychodask.iterative import r_factor
from ptychodask.scan import PtychodaskError
from ptychodask.simulate import diffract

__all__ = [
    "Gauge",
    "align_gauge",
    "amplitude_ratio",
    "contrast_radius",
    "correlation",
    "crossing",
    "frc",
    "frc50",
    "half_bit",
    "mae",
    "ms_ssim",
    "mse",
    "patch_r_factor",
    "psnr",
    "r_factor",
    "seen_in_both",
    "spoke_contrast",
    "ssim",
]

PTYCHOPINN_PEAK = 255.0
"""Peak of the PSNR that PtychoPINN's tables state, whatever the unit of the object."""

SSIM_WINDOW = 7
"""Pixels across the uniform window of `ssim`."""

MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales of `ms_ssim`, finest first (Wang et al. 2003, section 3.2)."""

MS_SSIM_SIGMA = 1.5
"""Standard deviation, pixels, of the Gaussian window of `ms_ssim`."""

MS_SSIM_WINDOW = 11
"""Pixels across that window, where it is cut off."""

SSIM_CONSTANTS = (0.01, 0.03)
"""K1 and K2 of the structural similarity (Wang et al. 2004, section III.B)."""

ZOOM_STEPS = 10
"""Times that the search for a phase ramp narrows, four times each."""


@dataclass(frozen=True)
class Gauge:
    """What `align_gauge` removed: estimate = aligned · scale · exp(i (phase + ramp · (row, column)))."""

    phase_rad: float = 0.0
    """Global phase, radians."""

    ramp_yx_rad_per_px: tuple[float, float] = (0.0, 0.0)
    """Phase plane, radians per pixel along y and x."""

    scale: float = 1.0
    """Factor of the amplitude."""


def align_gauge(
    estimate: NDArray[np.complexfloating[Any, Any]],
    truth: NDArray[np.complexfloating[Any, Any]],
    *,
    weight: NDArray[np.floating[Any]] | None = None,
    phase: bool = True,
    ramp: bool = True,
    scale: bool = False,
) -> tuple[NDArray[np.complex64], Gauge]:
    """Remove from an estimate what diffraction patterns cannot tell.

    Parameters
    ----------
    estimate, truth : complex array (y, x)
        Pixels that are NaN in either have no say.
    weight : float array (y, x), optional
        Say of each pixel; equal by default.
    phase, ramp : bool
        Remove the global phase, the phase plane; the plane only together with the phase.
    scale : bool
        Remove a factor of the amplitude: a gauge only where the probe's scale is not known (calibration
        ``mean_counts``).

    Returns
    -------
    aligned : complex64 array (y, x)
        NaN where the estimate is.
    gauge : Gauge
        What was removed.

    Raises
    ------
    PtychodaskError
        If the shapes differ, no pixel is seen in both, or a plane is asked for without the phase.

    Notes
    -----
    The plane maximises |Σ w · estimate · conj(truth) · exp(−i plane)|: it is the peak of a Fourier transform, which is
    sampled ever finer around its maximum (M. Guizar-Sicairos et al., Opt. Lett. 33 (2008) 156, with the roles of space
    and frequency exchanged). The scale is the least-squares factor between the amplitudes.

    Examples
    --------
    >>> truth = np.exp(1j * np.random.default_rng(0).random((8, 8)))
    >>> aligned, gauge = align_gauge(truth * np.exp(1j * (2 + 0.1 * np.arange(8))), truth)
    >>> round(gauge.phase_rad, 4), [round(value, 4) for value in gauge.ramp_yx_rad_per_px]
    (2.0, [0.0, 0.1])
    """
    if ramp and not phase:
        raise PtychodaskError("align_gauge: ramp=True with phase=False, expected both or phase alone")
    seen = seen_in_both(estimate, truth)
    say = seen.astype(np.float64) if weight is None else np.where(seen, weight, 0.0)
    product = np.zeros(estimate.shape, np.complex128)
    product[seen] = say[seen] * estimate[seen] * np.conj(truth[seen])
    slope = _ramp_of(product) if ramp else (0.0, 0.0)
    plane = slope[0] * np.arange(estimate.shape[0])[:, None] + slope[1] * np.arange(estimate.shape[1])
    turn = float(np.angle((product * np.exp(-1j * plane)).sum())) if phase else 0.0
    factor = 1.0
    if scale:
        amplitude, wanted = np.abs(estimate[seen]), np.abs(truth[seen])
        factor = float((say[seen] * amplitude**2).sum() / (say[seen] * amplitude * wanted).sum())
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


def _ramp_of(product: NDArray[np.complex128]) -> tuple[float, float]:
    """Slopes (y, x), radians per pixel, of the plane whose removal makes |Σ product| largest."""
    shape = np.array(product.shape)
    spectrum = np.abs(scipy.fft.fft2(product))
    peak = np.array(np.unravel_index(spectrum.argmax(), spectrum.shape))
    frequency = np.where(peak > shape / 2, peak - shape, peak) / shape
    step = np.where(shape > 1, 0.25 / shape, 0.0)
    y, x = np.arange(shape[0]), np.arange(shape[1])
    for _ in range(ZOOM_STEPS):
        tried = frequency[:, None] + step[:, None] * np.arange(-4, 5)
        zoomed = np.exp(-2j * np.pi * np.outer(tried[0], y)) @ product @ np.exp(-2j * np.pi * np.outer(x, tried[1]))
        found = np.unravel_index(np.abs(zoomed).argmax(), zoomed.shape)
        frequency = np.array([tried[0, found[0]], tried[1, found[1]]])
        step = step / 4
    slope = 2 * np.pi * frequency
    return float(slope[0]), float(slope[1])


def _say(estimate: NDArray[Any], truth: NDArray[Any], weight: NDArray[Any] | None) -> NDArray[np.float64]:
    """Say of each pixel (y, x): its weight, 0 where it is unseen in either array."""
    seen = seen_in_both(estimate, truth)
    if weight is None:
        return seen.astype(np.float64)
    if weight.shape != seen.shape:
        raise PtychodaskError(f"metrics: weight has shape {weight.shape}, expected that of the arrays, {seen.shape}")
    say = np.where(seen, weight, 0.0).astype(np.float64)
    if not say.sum() > 0:
        raise PtychodaskError("metrics: no pixel that is seen in both arrays has a weight, so they cannot be compared")
    return say


def _mean(values: NDArray[Any], say: NDArray[np.float64]) -> float:
    """Weighted mean over the pixels that have a say; what the others hold, NaN too, does not matter."""
    return float(np.average(values[say > 0], weights=say[say > 0]))


def correlation(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Pearson correlation of real arrays (y, x) over the seen pixels; NaN where one is constant.

    Examples
    --------
    >>> round(correlation(np.array([[1.0, 2.0, np.nan]]), np.array([[0.0, -0.3, 7.0]])), 6)
    -1.0
    """
    say = _say(estimate, truth, weight)
    one, other = estimate - _mean(estimate, say), truth - _mean(truth, say)
    spread = np.sqrt(_mean(one * one, say) * _mean(other * other, say))
    return float(_mean(one * other, say) / spread) if spread > 0 else float("nan")


def amplitude_ratio(estimate: NDArray[Any], truth: NDArray[Any], *, weight: NDArray[Any] | None = None) -> float:
    """Mean |estimate| over mean |truth| (y, x), seen pixels alone; 1 is perfect."""
    say = _say(estimate, truth, weight)
    return _mean(np.abs(estimate), say) / _mean(np.abs(truth), say)


def mae(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Mean absolute difference of real arrays (y, x) over the seen pixels.

    Parameters
    ----------
    estimate, truth : float array (y, x)
        Pixels that are NaN in either have no say.
    weight : array (y, x), optional
        Say of each pixel, here and in the other figures; a mask is a weight of 0 and 1. Equal by default.

    Examples
    --------
    >>> mae(np.array([[1.0, 2.0, np.nan]]), np.array([[1.0, 4.0, 5.0]]))
    1.0
    """
    return _mean(np.abs(estimate - truth), _say(estimate, truth, weight))


def mse(
    estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, weight: NDArray[Any] | None = None
) -> float:
    """Mean squared difference of real arrays (y, x) over the seen pixels."""
    return _mean(np.square(estimate - truth, dtype=np.float64), _say(estimate, truth, weight))


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
        The signal's largest value or its range, in the unit of the arrays, or `PTYCHOPINN_PEAK`; state it with the
        figure.
    weight : array (y, x), optional

    Returns
    -------
    float
        10 log10(peak² / mse), decibels; infinite where both are equal.

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
    """Structural similarity of real arrays (y, x), averaged over the windows that are seen whole.

    Parameters
    ----------
    estimate, truth : float array (y, x)
    data_range : float
        Range of the signal, in the unit of the arrays; state it with the figure.
    weight : array (y, x), optional
        Say of the window around each pixel; a window that meets a weight of 0 is not seen whole.

    Returns
    -------
    float
        As `skimage.metrics.structural_similarity` (uniform window of `SSIM_WINDOW` pixels); NaN where no window is
        seen whole.

    Notes
    -----
    Z. Wang et al., IEEE Trans. Image Process. 13 (2004) 600.
    """
    say = _say(estimate, truth, weight)
    whole = _whole_windows(say > 0, SSIM_WINDOW)
    if not whole.any():
        return float("nan")
    one, other = (np.where(say > 0, values, 0).astype(np.float64) for values in (estimate, truth))
    _, similarity = structural_similarity(one, other, win_size=SSIM_WINDOW, data_range=data_range, full=True)
    return _mean(similarity, say * whole)


def _whole_windows(seen: NDArray[np.bool_], n_pixels: int) -> NDArray[np.bool_]:
    """True where the window around a pixel lies within the array and is seen whole."""
    return binary_erosion(seen, np.ones((n_pixels, n_pixels)))


def ms_ssim(
    estimate: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    *,
    data_range: float,
    exponents: tuple[float, ...] = MS_SSIM_EXPONENTS,
    weight: NDArray[Any] | None = None,
) -> float:
    """Structural similarity over several scales of real arrays (y, x).

    Parameters
    ----------
    estimate, truth : float array (y, x)
    data_range : float
        Range of the signal, in the unit of the arrays; state it with the figure.
    exponents : tuple of float
        One for each scale, finest first; each scale has half the resolution of the one before.
    weight : array (y, x), optional
        Say of the window around each pixel; a window that meets a weight of 0 is not seen whole.

    Returns
    -------
    float
        Product over the scales of the mean contrast and structure, at the coarsest also luminance, each to its
        exponent; a negative mean counts as 0. NaN where no window is seen whole at the coarsest scale: with five
        scales the seen area must hold 176 x 176 pixels. Pass fewer exponents for less, and say so with the figure.

    Notes
    -----
    Z. Wang et al., Proc. 37th Asilomar Conf. Signals, Systems and Computers (2003) 1398. Gaussian window of
    `MS_SSIM_SIGMA`; a coarser pixel is the mean of 2 x 2 finer ones, and unseen where one of these is.
    """
    say = _say(estimate, truth, weight)
    seen = say > 0
    one, other = (np.where(seen, values, 0).astype(np.float64) for values in (estimate, truth))
    product = 1.0
    for scale, exponent in enumerate(exponents):
        if scale:
            seen = np.asarray(_cells(seen).all(axis=(1, 3)))
            one, other, say = (_cells(values).mean(axis=(1, 3)) for values in (one, other, say))
        whole = _whole_windows(seen, MS_SSIM_WINDOW)
        if not whole.any():
            return float("nan")
        luminance, structure = _similarities(one, other, data_range)
        similarity = luminance * structure if scale == len(exponents) - 1 else structure
        product *= max(_mean(similarity, say * whole), 0.0) ** exponent
    return product


def _cells(values: NDArray[Any]) -> NDArray[Any]:
    """2 x 2 pixels to a cell (row, 2, column, 2); an odd last row or column is left out."""
    height, width = (size // 2 for size in values.shape)
    return values[: 2 * height, : 2 * width].reshape(height, 2, width, 2)


def _similarities(
    one: NDArray[np.float64], other: NDArray[np.float64], data_range: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Luminance, and contrast times structure, of the window around each pixel.

    Notes
    -----
    Wang et al. 2004, equations 6 and, with C3 = C2/2, 9 times 10.
    """

    def local_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_filter(values, MS_SSIM_SIGMA, radius=MS_SSIM_WINDOW // 2)

    small_1, small_2 = ((constant * data_range) ** 2 for constant in SSIM_CONSTANTS)
    mean_1, mean_2 = local_mean(one), local_mean(other)
    covariance = local_mean(one * other) - mean_1 * mean_2
    variances = local_mean(one * one) - mean_1**2 + local_mean(other * other) - mean_2**2
    luminance = (2 * mean_1 * mean_2 + small_1) / (mean_1**2 + mean_2**2 + small_1)
    return luminance, (2 * covariance + small_2) / (variances + small_2)


def frc(
    estimate: NDArray[Any], truth: NDArray[Any], *, weight: NDArray[Any] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fourier ring correlation of two arrays over their middle square.

    Parameters
    ----------
    estimate, truth : real or complex array (y, x)
        Unseen pixels count as the mean of the seen ones.
    weight : array (y, x), optional
        Multiplies both; let it fade towards what it leaves out, for an edge that both share correlates.

    Returns
    -------
    frequency : float64 array (ring,)
        Cycles per pixel, one ring for each frequency of the square, up to 0.5.
    correlation : float64 array (ring,)
        Real part of the normalised correlation over each ring; NaN where one array is constant.

    Notes
    -----
    W. O. Saxton, W. Baumeister, J. Microsc. 127 (1982) 127. Means are taken off and a Hann window is laid over the
    square, so that its edges make no signal.
    """
    say = _say(estimate, truth, weight)
    side = min(estimate.shape)
    square = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in estimate.shape)
    taper = np.outer(np.hanning(side), np.hanning(side))
    one, other = (
        scipy.fft.fft2((np.where(say > 0, values - values[say > 0].mean(), 0) * say)[square] * taper)
        for values in (estimate, truth)
    )
    ring = _ring_of(side)
    powers = [_over_rings(np.abs(spectrum) ** 2, ring) for spectrum in (one, other)]
    found = _over_rings((one * np.conj(other)).real, ring)
    found /= np.maximum(np.sqrt(powers[0] * powers[1]), np.finfo(np.float64).tiny)
    if not all(power.any() for power in powers):
        found[:] = np.nan
    return np.arange(side // 2 + 1, dtype=np.float64) / side, found


def _ring_of(side: int) -> NDArray[np.int64]:
    """Ring (y, x) that each frequency of a square belongs to: its distance from zero, to the nearest whole number."""
    frequency = scipy.fft.fftfreq(side)
    return np.rint(np.hypot(frequency[:, None], frequency) * side).astype(np.int64)


def _over_rings(values: NDArray[Any], ring: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over the rings that are whole."""
    sums = np.bincount(ring.ravel(), weights=values.ravel())
    return sums[: len(ring) // 2 + 1].astype(np.float64)


def half_bit(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation at which a ring carries half a bit of information in each pixel.

    Parameters
    ----------
    frequency : float64 array (ring,)
        From `frc`.

    Returns
    -------
    float64 array (ring,)
        (0.2071 + 1.9102/√n) / (1.2071 + 0.9102/√n), n the number of the square's frequencies in the ring.

    Notes
    -----
    M. van Heel, M. Schatz, J. Struct. Biol. 151 (2005) 250, equation 17. All frequencies of a ring count as
    independent, as is usual for images of objects that fill the square.
    """
    ring = _ring_of(round(1 / float(frequency[1])))
    root = np.sqrt(_over_rings(np.ones(ring.shape), ring))
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
        Cycles per pixel, by straight lines between rings; its inverse is the resolution as a full period in pixels.
        0.5 where the correlation never falls below, the first ring where it is below from the start, NaN where there
        is no correlation.

    Notes
    -----
    The ring of zero frequency, which the mean and the window rule, does not count. An object whose slow changes are
    wrong crosses in the first rings however well finer ones agree: look at the curve.

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


def frc50(estimate: NDArray[Any], truth: NDArray[Any]) -> float:
    """Frequency, cycles per pixel, at which the `frc` crosses one half: see `crossing`."""
    return crossing(*frc(estimate, truth), 0.5)


def spoke_contrast(
    values: NDArray[np.floating[Any]], centre_yx_px: tuple[float, float], n_spokes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How strongly the spokes of a Siemens star stand out, circle by circle.

    Parameters
    ----------
    values : float array (y, x)
        Amplitude or phase of the star; pixels that are NaN have no say.
    centre_yx_px : (float, float)
        Row and column at which the spokes meet.
    n_spokes : int
        Spokes around the whole circle, whether all of them are there or not.

    Returns
    -------
    radius_px : float64 array (circle,)
        Whole pixels, from the smallest circle with two pixels for each spoke to the largest that lies in the array.
    contrast : float64 array (circle,)
        Amplitude of the wave with `n_spokes` periods around the circle, half of its peak to peak, in the unit of
        `values`; NaN where less than half of a circle's pixels are seen.

    Raises
    ------
    PtychodaskError
        If there are no spokes, or no circle with two pixels for each spoke fits into the array.

    Notes
    -----
    Least-squares fit of a + b cos nθ + c sin nθ to the pixels within half a pixel of each circle, without
    interpolation (C. Loebich et al., Proc. SPIE 6502 (2007) 65020N; ISO 12233). The spatial frequency across the spokes
    is ``n_spokes / (2 pi radius_px)`` cycles per pixel, so the contrast relative to that of large circles is the
    modulation transfer function there. Spokes that are missing lower the contrast of their circles alike.

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
            f"spoke_contrast: {n_spokes} spokes need a circle of {smallest} pixels around {tuple(centre_yx_px)}, the "
            f"array of {values.shape} holds one of {largest}; pass another centre, or fewer spokes"
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
    """Amplitude of the wave of a phase angle that fits values best, beside a constant."""
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
    """Radius at which the contrast of spokes, followed inwards, falls to a share of its outer value.

    Parameters
    ----------
    radius_px, contrast : float64 array (circle,)
        From `spoke_contrast`.
    outer_px : (float, float)
        Smallest and largest radius of the circles whose mean contrast is the outer value: spokes that are wide, lit
        and whole there.
    level : float
        The share, between 0 and 1.

    Returns
    -------
    float
        Pixels, by straight lines between circles; where the contrast never falls so low, the smallest radius before a
        circle without one.

    Raises
    ------
    PtychodaskError
        If no circle with a contrast lies in `outer_px`.

    Notes
    -----
    Half a period, one spoke or one gap, is ``pi * radius / n_spokes`` pixels wide there. What ends the spokes ends
    their contrast too: where a hub does, the radius is that of the hub and the resolution is finer than it tells.

    Examples
    --------
    >>> round(contrast_radius(np.arange(1.0, 8.0), np.array([0.0, 0.1, 0.3, 0.5, 0.8, 0.8, 0.8]), (5, 7)), 6)
    3.5
    """
    outer = (radius_px >= outer_px[0]) & (radius_px <= outer_px[1]) & np.isfinite(contrast)
    if not outer.any():
        raise PtychodaskError(
            f"contrast_radius: no circle with a contrast lies in outer_px {tuple(outer_px)}; those there are go from "
            f"{radius_px[0]:g} to {radius_px[-1]:g} px"
        )
    wanted = level * float(contrast[outer].mean())
    start = int(np.flatnonzero(outer)[0])
    low = np.flatnonzero(~(contrast[:start] > wanted))
    if not len(low):
        return float(radius_px[0])
    k = int(low[-1])
    if np.isnan(contrast[k]):
        return float(radius_px[k + 1])
    return float(np.interp(wanted, contrast[k : k + 2], radius_px[k : k + 2]))


def patch_r_factor(
    patches: NDArray[np.complexfloating[Any, Any]],
    probe: NDArray[np.complex64],
    amplitude: NDArray[np.float32],
    *,
    mask: NDArray[np.bool_] | None = None,
    flux: NDArray[np.float32] | None = None,
) -> float:
    """How far the patterns that a network's own patches make are from the measured ones.

    Parameters
    ----------
    patches : complex array (pattern, N, N)
        Object around each position, [N//2, N//2] on the position.
    probe : complex64 array (mode, N, N)
    amplitude : float32 array (pattern, N, N)
        Measured amplitude, from `Scan.amplitude`.
    mask : bool array (N, N), optional
        True where a detector pixel is good.
    flux : float array (pattern,), optional
        Incident flux of each pattern relative to the mean.

    Returns
    -------
    float
        R = Σ|√I_pred − √I| / Σ√I over good pixels; 0 is perfect.

    Examples
    --------
    >>> probe = np.ones((1, 4, 4), np.complex64)
    >>> patches = np.exp(1j * np.arange(32.0)).reshape(2, 4, 4)
    >>> patch_r_factor(2 * patches, probe, np.sqrt(diffract(patches[:, None])))
    1.0
    """
    good = np.ones(amplitude.shape[1:], bool) if mask is None else mask
    misfit = total = 0.0
    for j, (patch, measured) in enumerate(zip(patches, amplitude, strict=True)):
        model = np.sqrt(diffract(probe * patch) * (1.0 if flux is None else flux[j]))
        misfit += float(np.abs(model - measured)[good].sum(dtype=np.float64))
        total += float(measured[good].sum(dtype=np.float64))
    if not total > 0:
        raise PtychodaskError("metrics: the patterns to judge by have no light")
    return misfit / total
