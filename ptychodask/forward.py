"""Forward model in NumPy.

Shift, exit wave, far field, expected counts, footprint, modulus projection and the R-factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.probes import squared_modulus
from ptychodask.scan import Scan


def diffract(exit_wave: NDArray[np.complexfloating[Any, Any]]) -> NDArray[np.floating[Any]]:
    """Counts of the diffraction pattern of an exit wave.

    Parameters
    ----------
    exit_wave : complex array (..., mode, N, N)
        Probe times object; the modes are incoherent.

    Returns
    -------
    float array (..., N, N)
        Σ over modes of |fftshift(FFT₂(ψ))|²/N², DC at [N//2, N//2]; its sum is Σ|ψ|².

    Examples
    --------
    >>> diffract(np.ones((1, 4, 4)))[2, 2]
    np.float64(16.0)
    """
    wave = scipy.fft.fft2(exit_wave, norm="ortho")
    counts = (wave.real**2 + wave.imag**2).sum(axis=-3)
    return scipy.fft.fftshift(counts, axes=(-2, -1))


def shift_probe(
    probe: NDArray[np.complexfloating[Any, Any]], shift_yx_px: tuple[float, float] | NDArray[np.float64]
) -> NDArray[np.complexfloating[Any, Any]]:
    """Shift a probe by a sub-pixel distance, keeping its total intensity.

    Parameters
    ----------
    probe : complex array (..., N, N)
    shift_yx_px : (float, float)
        Shift (y, x), pixels; integers are equivalent to `np.roll`.

    Returns
    -------
    complex array (..., N, N)
        In the probe's precision.

    Examples
    --------
    >>> shift_probe(np.eye(1, 4, 2, dtype=complex).reshape(2, 2), (0, 1)).round(9).real.tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    return scipy.fft.ifft2(scipy.fft.fft2(probe) * shift_ramp(shift_yx_px, probe.shape[-1], probe.dtype))


def shift_ramp(
    shift_yx_px: tuple[float, float] | NDArray[np.float64], n_pixels: int, dtype: np.dtype[Any]
) -> NDArray[np.complexfloating[Any, Any]]:
    """Phase ramp that shifts a wave when multiplied with its spectrum.

    Parameters
    ----------
    shift_yx_px : (float, float)
        Shift (y, x), pixels.
    n_pixels : int
        Pixels across the wave, N.
    dtype : complex dtype

    Returns
    -------
    complex array (N, N)
        DC at [0, 0].

    Notes
    -----
    Fourier shift theorem: each spatial frequency q (cycles per pixel) is multiplied by exp(−2πi q·shift).
    """
    frequency = scipy.fft.fftfreq(n_pixels)
    ramp_y, ramp_x = (np.exp(-2j * np.pi * float(shift) * frequency).astype(dtype) for shift in shift_yx_px)
    return ramp_y[:, None] * ramp_x


def crop_at(
    object_: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: tuple[float, float],
    position_yx_px: NDArray[np.float64],
    n_pixels: int,
) -> tuple[NDArray[np.complexfloating[Any, Any]], NDArray[np.float64]]:
    """Part of an object in the probe's footprint at a position.

    Parameters
    ----------
    object_ : complex array (y, x)
    corner_yx_px : (float, float)
        Scan coordinates of the object's pixel [0, 0], pixels.
    position_yx_px : float64 array (2,)
        Position of the probe, pixels.
    n_pixels : int
        Pixels across the patch, N.

    Returns
    -------
    patch : complex array (N, N)
        A view whose pixel [N//2, N//2] is the pixel at or before the position.
    fraction_yx_px : float64 array (2,)
        Sub-pixel remainder of the position, 0 ≤ fraction < 1: the shift of the probe within the patch.

    Raises
    ------
    PtychodaskError
        If the patch reaches beyond the object.

    Examples
    --------
    >>> patch, fraction = crop_at(np.arange(64).reshape(8, 8), (-4, -4), np.array([0.25, 1.0]), 4)
    >>> int(patch[2, 2]), fraction.tolist()
    (37, [0.25, 0.0])
    """
    relative = np.asarray(position_yx_px, np.float64) - np.asarray(corner_yx_px, np.float64)
    pixel = np.floor(relative)
    top, left = (int(value) - n_pixels // 2 for value in pixel)
    height, width = object_.shape
    if top < 0 or left < 0 or top + n_pixels > height or left + n_pixels > width:
        raise PtychodaskError(
            f"object: {height} x {width} pixels from {tuple(corner_yx_px)} do not cover a patch of {n_pixels} pixels "
            f"at {np.asarray(position_yx_px).tolist()}; it must extend {n_pixels // 2} pixels beyond every position"
        )
    return object_[top : top + n_pixels, left : left + n_pixels], relative - pixel


def expected_counts(
    object_: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: tuple[float, float],
    probe: NDArray[np.complexfloating[Any, Any]],
    position_yx_px: NDArray[np.float64],
) -> NDArray[np.floating[Any]]:
    """Pattern of an object with the probe at a position, without noise.

    Parameters
    ----------
    object_, corner_yx_px, position_yx_px
        See `crop_at`.
    probe : complex array (mode, N, N)

    Returns
    -------
    float array (N, N)
        Counts, DC at [N//2, N//2].
    """
    patch, fraction = crop_at(object_, corner_yx_px, position_yx_px, probe.shape[-1])
    return diffract(shift_probe(probe, fraction) * patch)


PROBE_BATCH = 16
"""Patterns averaged into one update of the probe."""


def project_modulus(
    wave: NDArray[np.complex64], amplitude: NDArray[np.float32], good: NDArray[np.bool_] | None
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Change of an exit wave (mode, N, N) to the measured amplitude.

    Only good pixels change. The second array is the model's amplitude (N, N) before, bad pixels 0.
    """
    far = scipy.fft.fft2(wave, norm="ortho")
    model = np.sqrt(squared_modulus(far).sum(axis=0))
    # A pixel where the model is dark has no phase to keep; the floor prevents a division by zero there.
    ratio = amplitude / np.maximum(model, np.float32(1e-6) * model.max() + np.finfo(np.float32).eps ** 2) - 1
    if good is not None:
        ratio *= good
        model *= good
    return scipy.fft.ifft2(far * ratio, norm="ortho"), model


def r_factor(
    object_: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: tuple[float, float],
    scan: Scan,
    index: NDArray[np.int64] | None = None,
) -> float:
    """R factor of the patterns predicted from an object.

    Parameters
    ----------
    object_ : complex array (y, x)
        NaN where unseen; such pixels, and all beyond the edges, are set to the mean amplitude of the seen ones.
    corner_yx_px : (float, float)
        Scan coordinates of the object's pixel [0, 0], pixels.
    scan : Scan
        Patterns, positions, probe, mask and flux.
    index : int array (k,), optional
        Indices of the patterns; all by default.

    Returns
    -------
    float
        R = Σ|√I_pred − √I| / Σ√I over the good pixels of these patterns; 0 is perfect agreement.

    Raises
    ------
    PtychodaskError
        If the object has no seen pixel, or the patterns are all zero.
    """
    index = np.arange(scan.n_patterns) if index is None else np.asarray(index)
    filled, corner = filled_object(object_, corner_yx_px, scan.position_yx_px[index], scan.n_pixels)
    absolute = total = 0.0
    for start in range(0, len(index), PROBE_BATCH):
        batch = index[start : start + PROBE_BATCH]
        for j, amplitude in zip(batch, scan.amplitude(batch), strict=True):
            sums = r_sums(predicted_amplitude(filled, corner, scan, int(j)) - amplitude, amplitude)
            absolute, total = absolute + float(sums[0]), total + float(sums[1])
    return r_ratio(absolute, total, str(scan.store or "scan"))


def r_sums(
    difference: NDArray[np.floating[Any]], amplitude: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerator and denominator of the R-factor of each pattern.

    Parameters
    ----------
    difference, amplitude : float array (..., N, N)
        √I_pred − √I and √I, bad pixels 0.

    Returns
    -------
    float64 arrays (...)
        Σ|√I_pred − √I| and Σ√I; both add up over patterns.
    """
    absolute, total = (values.sum(axis=(-2, -1), dtype=np.float64) for values in (np.abs(difference), amplitude))
    return absolute, total


def r_ratio(absolute: float, amplitude: float, label: str) -> float:
    """R-factor of patterns from their `r_sums`.

    Raises `PtychodaskError`, beginning with `label`, if the patterns are all zero.
    """
    if not amplitude > 0:
        raise PtychodaskError(f"{label}: the patterns are all zero, so R is undefined; choose others")
    return absolute / amplitude


def predicted_amplitude(
    object_: NDArray[np.complex64], corner_yx_px: tuple[float, float], scan: Scan, pattern: int
) -> NDArray[np.float32]:
    """Predicted amplitude √I_pred of one pattern, bad pixels 0.

    Uses the scan's probe and flux.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Covers the footprint at the pattern's position; no NaN.
    corner_yx_px : (float, float)
        Scan coordinates of its pixel [0, 0], pixels.
    scan : Scan
    pattern : int
        Index of the pattern.

    Returns
    -------
    float32 array (N, N)
        Comparable with `Scan.amplitude`.
    """
    model = np.sqrt(expected_counts(object_, corner_yx_px, scan.probe, scan.position_yx_px[pattern]))
    if scan.flux is not None:
        model *= np.sqrt(scan.flux[pattern])
    if scan.mask is not None:
        model *= scan.mask
    return model


def filled_object(
    object_: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: tuple[float, float],
    position_yx_px: NDArray[np.float64],
    n_pixels: int,
) -> tuple[NDArray[np.complex64], tuple[float, float]]:
    """Object without NaN, extended to cover all footprints, and its corner."""
    seen = np.isfinite(object_)
    if not seen.any():
        raise PtychodaskError("object: all its pixels are NaN, so no pattern can be predicted from it")
    mean = np.abs(object_[seen]).mean(dtype=np.float64)
    first = np.floor(position_yx_px - np.asarray(corner_yx_px)).astype(int) - n_pixels // 2
    before = np.maximum(-first.min(axis=0), 0)
    after = np.maximum(first.max(axis=0) + n_pixels - object_.shape, 0)
    filled = np.pad(
        np.where(seen, object_, mean).astype(np.complex64), list(zip(before, after, strict=True)), constant_values=mean
    )
    return filled, (float(corner_yx_px[0] - before[0]), float(corner_yx_px[1] - before[1]))


def footprint_corners(position_yx_px: NDArray[np.float64], n_pixels: int) -> NDArray[np.int64]:
    """Coordinates (y, x) of each footprint's first pixel, int64 (..., 2)."""
    return np.floor(position_yx_px).astype(np.int64) - n_pixels // 2


MIN_SEEN_LIGHT = 0.99
"""Minimum fraction of the probe intensity on seen pixels for a pattern to have an R-factor."""


def seen_light(
    seen: NDArray[np.bool_],
    corner: NDArray[np.integer[Any]] | tuple[int, int],
    probe: NDArray[np.complexfloating[Any, Any]],
    position_yx_px: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Fraction of the probe intensity on seen pixels, for each position.

    Parameters
    ----------
    seen : bool array (y, x)
        True where patches reached the object; pixels outside of the array are unseen.
    corner : (int, int)
        Scan coordinates of its pixel [0, 0].
    probe : complex array (mode, N, N)
    position_yx_px : float64 array (pattern, 2)
        Rounded down to whole pixels.

    Returns
    -------
    float64 array (pattern,)
    """
    n_pixels = probe.shape[-1]
    intensity = (np.abs(probe) ** 2).sum(axis=0, dtype=np.float64)
    intensity /= intensity.sum()
    fraction = np.empty(len(position_yx_px))
    starts = footprint_corners(position_yx_px, n_pixels) - np.asarray(corner, np.int64)
    low, high = np.clip(starts, 0, seen.shape), np.clip(starts + n_pixels, 0, seen.shape)
    for j, start in enumerate(starts):
        lit = intensity[tuple(slice(*ends) for ends in zip(low[j] - start, high[j] - start, strict=True))]
        fraction[j] = lit[seen[tuple(slice(*ends) for ends in zip(low[j], high[j], strict=True))]].sum()
    return fraction
