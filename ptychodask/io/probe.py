"""Models of the probe, for files that contain none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.scan import PtychodaskError


def disc_probe(n_pixels: int, *, diameter_px: float, edge_px: float = 1.0) -> NDArray[np.complex64]:
    """Probe that is a disc with constant phase, as behind a pinhole.

    Parameters
    ----------
    n_pixels : int
        Pixels across the probe, N.
    diameter_px : float
        Diameter at half amplitude, object pixels.
    edge_px : float
        Width of the linear edge from amplitude 1 to 0, object pixels.

    Returns
    -------
    complex64 array (1, N, N)
        Centred on [N//2, N//2], largest amplitude 1.

    Raises
    ------
    PtychodaskError
        If the disc is empty or wider than the frame, or the edge has no width.

    Examples
    --------
    >>> np.abs(disc_probe(8, diameter_px=4))[0, 4].tolist()
    [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    _check_diameter("disc: diameter_px", diameter_px, n_pixels)
    if not edge_px > 0:
        raise PtychodaskError(f"disc: edge_px is {edge_px}, expected more than 0")
    amplitude = np.clip((diameter_px / 2 - _radius_px(n_pixels)) / edge_px + 0.5, 0, 1)
    return amplitude.astype(np.complex64)[None]


def zone_plate_probe(n_pixels: int, *, outer_px: float, stop_px: float, defocus: float = 0.0) -> NDArray[np.complex64]:
    """Probe of a zone plate with central stop, in or near focus.

    Parameters
    ----------
    n_pixels : int
        Pixels across the probe and the detector, N.
    outer_px, stop_px : float
        Outer diameter of the annular pupil and diameter of its central stop, detector pixels.
    defocus : float
        Phase of the quadratic wavefront at the pupil's rim, radians; 0 is in focus. For some tens and more the probe is
        a ring, the shadow of the pupil.

    Returns
    -------
    complex64 array (1, N, N)
        Centred on [N//2, N//2]; Σ|P|² is the number of pixels in the pupil.

    Raises
    ------
    PtychodaskError
        If the pupil is empty or wider than the detector, or the defocus is not finite.

    Notes
    -----
    The pupil is the probe's far field, so the probe is its unitary inverse Fourier transform; a paraxial defocus adds
    the phase `defocus` (r/R)² over the pupil (J. W. Goodman, Introduction to Fourier Optics, section 6.4).

    Examples
    --------
    >>> probe = zone_plate_probe(32, outer_px=16, stop_px=6, defocus=20.0)
    >>> probe.shape, float(np.abs(probe[0, 16, 16]) < np.abs(probe).max())
    ((1, 32, 32), 1.0)
    """
    _check_diameter("zone plate: outer_px", outer_px, n_pixels)
    if not 0 <= stop_px < outer_px:
        raise PtychodaskError(f"zone plate: stop_px is {stop_px}, expected 0 or more and less than outer_px={outer_px}")
    if not np.isfinite(defocus):
        raise PtychodaskError(f"zone plate: defocus is {defocus}, expected a number of radians")
    radius = _radius_px(n_pixels)
    pupil = ((radius <= outer_px / 2) & (radius >= stop_px / 2)) * np.exp(1j * defocus * (radius * 2 / outer_px) ** 2)
    if not pupil.any():
        raise PtychodaskError(
            f"zone plate: no pixel is between stop_px={stop_px} and outer_px={outer_px}; make the pupil wider"
        )
    return to_real_space(pupil).astype(np.complex64)[None]


def estimate_probe(mean_amplitude: NDArray[np.floating[Any]]) -> NDArray[np.complex64]:
    """Initial probe from the mean pattern, back-propagated with zero phase.

    Parameters
    ----------
    mean_amplitude : float array (N, N)
        Square root of the mean counts of the scan, DC at [N//2, N//2].

    Returns
    -------
    complex64 array (1, N, N)
        Centred on [N//2, N//2]; its far field has the given amplitude.

    Notes
    -----
    Averaging over a scan removes most of the object's structure, so the mean pattern is close to the probe's far field.
    Its phase is unknown; zero phase is a probe in focus.

    Examples
    --------
    >>> flat = estimate_probe(np.ones((4, 4)))
    >>> np.abs(flat)[0, 2].round(6).tolist()
    [0.0, 0.0, 4.0, 0.0]
    """
    return to_real_space(mean_amplitude).astype(np.complex64)[None]


def to_real_space(far_field: NDArray[Any]) -> NDArray[np.complex128]:
    """Unitary inverse Fourier transform of the last two axes.

    DC and origin at [N//2, N//2].
    """
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(far_field, axes=axes), norm="ortho"), axes=axes)


def to_far_field(wave: NDArray[Any]) -> NDArray[np.complex128]:
    """Unitary Fourier transform of the last two axes.

    Origin and DC at [N//2, N//2].
    """
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(wave, axes=axes), norm="ortho"), axes=axes)


def _radius_px(n_pixels: int) -> NDArray[np.float64]:
    axis = np.arange(n_pixels) - n_pixels // 2
    return np.hypot(*np.meshgrid(axis, axis))


def _check_diameter(name: str, diameter_px: float, n_pixels: int) -> None:
    if not 0 < diameter_px <= n_pixels:
        raise PtychodaskError(
            f"{name} is {diameter_px}, expected more than 0 and at most the frame's {n_pixels} pixels"
        )
