"""Figures of merit of a reconstructed object, with the gauge that was removed said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity

from ptychodask.iterative import r_factor
from ptychodask.scan import PtychodaskError
from ptychodask.simulate import diffract

__all__ = [
    "Gauge",
    "align_gauge",
    "amplitude_correlation",
    "amplitude_ratio",
    "frc",
    "frc50",
    "mae",
    "mse",
    "patch_r_factor",
    "phase_correlation",
    "psnr",
    "r_factor",
    "seen_in_both",
    "ssim",
]

SSIM_WINDOW = 7
"""Pixels across the window of `ssim`."""

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


def _pearson(one: NDArray[Any], other: NDArray[Any]) -> float:
    one, other = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    spread = np.sqrt((one * one).sum() * (other * other).sum())
    return float((one * other).sum() / spread) if spread > 0 else float("nan")


def amplitude_correlation(estimate: NDArray[Any], truth: NDArray[Any]) -> float:
    """Pearson correlation of |estimate| and |truth| (y, x) over the seen pixels; NaN where one is constant."""
    seen = seen_in_both(estimate, truth)
    return _pearson(np.abs(estimate[seen]), np.abs(truth[seen]))


def phase_correlation(estimate: NDArray[Any], truth: NDArray[Any]) -> float:
    """Pearson correlation of the phases (y, x) over the seen pixels; NaN where one is constant.

    Notes
    -----
    Phases are taken on [-π, π] as they are: remove the gauge first, and expect little of objects that wrap.
    """
    seen = seen_in_both(estimate, truth)
    return _pearson(np.angle(estimate[seen]), np.angle(truth[seen]))


def amplitude_ratio(estimate: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean |estimate| over mean |truth| (y, x), seen pixels alone; 1 is perfect."""
    seen = seen_in_both(estimate, truth)
    return float(np.abs(estimate[seen]).mean(dtype=np.float64) / np.abs(truth[seen]).mean(dtype=np.float64))


def mae(estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]]) -> float:
    """Mean absolute difference of real arrays (y, x) over the seen pixels.

    Examples
    --------
    >>> mae(np.array([[1.0, 2.0, np.nan]]), np.array([[1.0, 4.0, 5.0]]))
    1.0
    """
    seen = seen_in_both(estimate, truth)
    return float(np.abs(estimate[seen] - truth[seen]).mean(dtype=np.float64))


def mse(estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]]) -> float:
    """Mean squared difference of real arrays (y, x) over the seen pixels."""
    seen = seen_in_both(estimate, truth)
    return float(np.square(estimate[seen] - truth[seen], dtype=np.float64).mean())


def psnr(estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, peak: float) -> float:
    """Peak signal-to-noise ratio of real arrays (y, x) over the seen pixels.

    Parameters
    ----------
    estimate, truth : float array (y, x)
    peak : float
        The signal's largest value or its range, in the unit of the arrays; state it with the figure.

    Returns
    -------
    float
        10 log10(peak² / mse), decibels; infinite where both are equal.

    Examples
    --------
    >>> psnr(np.array([[0.0, 0.1]]), np.array([[0.1, 0.0]]), peak=1.0)
    20.0
    """
    error = mse(estimate, truth)
    return float(10 * np.log10(peak**2 / error)) if error > 0 else float("inf")


def ssim(estimate: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]], *, data_range: float) -> float:
    """Structural similarity of real arrays (y, x), averaged over the windows that are seen whole.

    Parameters
    ----------
    estimate, truth : float array (y, x)
    data_range : float
        Range of the signal, in the unit of the arrays; state it with the figure.

    Returns
    -------
    float
        As `skimage.metrics.structural_similarity` (uniform window of `SSIM_WINDOW` pixels); NaN where no window is
        seen whole.

    Notes
    -----
    Z. Wang et al., IEEE Trans. Image Process. 13 (2004) 600.
    """
    seen = seen_in_both(estimate, truth)
    whole = binary_erosion(seen, np.ones((SSIM_WINDOW, SSIM_WINDOW)))
    if not whole.any():
        return float("nan")
    one, other = (np.where(seen, values, 0).astype(np.float64) for values in (estimate, truth))
    _, similarity = structural_similarity(one, other, win_size=SSIM_WINDOW, data_range=data_range, full=True)
    return float(similarity[whole].mean())


def frc(estimate: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fourier ring correlation of two arrays over their middle square.

    Parameters
    ----------
    estimate, truth : real or complex array (y, x)
        Unseen pixels count as the mean of the seen ones.

    Returns
    -------
    frequency : float64 array (ring,)
        Cycles per pixel, one ring for each frequency of the square, up to 0.5.
    correlation : float64 array (ring,)
        Real part of the normalised correlation over each ring.

    Notes
    -----
    W. O. Saxton, W. Baumeister, J. Microsc. 127 (1982) 127. Means are taken off and a Hann window is laid over the
    square, so that its edges make no signal.
    """
    seen = seen_in_both(estimate, truth)
    side = min(estimate.shape)
    square = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in estimate.shape)
    taper = np.outer(np.hanning(side), np.hanning(side))
    one, other = (
        scipy.fft.fft2((np.where(seen, values - values[seen].mean(), 0))[square] * taper)
        for values in (estimate, truth)
    )
    radius = np.hypot(*np.meshgrid(scipy.fft.fftfreq(side), scipy.fft.fftfreq(side)))
    ring = np.rint(radius * side).astype(int).ravel()
    n_rings = side // 2 + 1

    def over_rings(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(ring, weights=values.ravel())[:n_rings].astype(np.float64)

    power = np.sqrt(over_rings(np.abs(one) ** 2) * over_rings(np.abs(other) ** 2))
    correlation = over_rings((one * np.conj(other)).real) / np.maximum(power, np.finfo(np.float64).tiny)
    return np.arange(n_rings, dtype=np.float64) / side, correlation


def frc50(estimate: NDArray[Any], truth: NDArray[Any]) -> float:
    """Lowest frequency, cycles per pixel, at which the `frc` falls below one half; 0.5 where it never does.

    The ring of zero frequency, which the mean and the window rule, does not count.
    """
    frequency, correlation = frc(estimate, truth)
    below = np.flatnonzero(correlation[1:] < 0.5)
    return float(frequency[1:][below[0]]) if len(below) else 0.5


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
