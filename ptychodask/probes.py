"""Probes: models, estimates, defocus, and size and centre of their illumination."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError

Window = Literal["illumination", "uniform", "cosine"]
"""Name of the weights with which a patch enters a canvas: see `make_window`."""


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


ILLUMINATION_FLOOR = 1e-3
"""Relative intensity of the probe below which a pixel counts as dark."""


def illumination(probe: NDArray[np.complexfloating[Any, Any]]) -> NDArray[np.float32]:
    """Relative intensity of the probe, the weight of a patch's pixels.

    Parameters
    ----------
    probe : complex array (mode, N, N)

    Returns
    -------
    float32 array (N, N)
        Σ over modes of |P|², divided by its maximum; 0 below `ILLUMINATION_FLOOR`.

    Examples
    --------
    >>> illumination(np.array([[[2.0, 1.0], [0.01, 0.0]]])).tolist()
    [[1.0, 0.25], [0.0, 0.0]]
    """
    intensity = (np.abs(probe) ** 2).sum(axis=0)
    relative = intensity / intensity.max()
    return np.where(relative < ILLUMINATION_FLOOR, 0, relative).astype(np.float32)


def illuminated_radius_px(probe: NDArray[np.complexfloating[Any, Any]]) -> float:
    """Largest distance of an illuminated pixel from the probe's middle, pixels.

    The middle is [N//2, N//2]; see `illumination` for the illuminated pixels.

    Examples
    --------
    >>> illuminated_radius_px(np.eye(1, 16, 6).reshape(1, 4, 4))
    1.0
    """
    lit = np.argwhere(illumination(probe) > 0)
    return float(np.hypot(*(lit - probe.shape[-1] // 2).T).max())


def probe_diameter_px(probe: NDArray[np.complexfloating[Any, Any]]) -> float:
    """Diameter of a uniform disc with the probe's effective area.

    Parameters
    ----------
    probe : complex array (mode, N, N)

    Returns
    -------
    float
        2 sqrt(A / π), pixels, with the area A = (Σ|P|²)² / Σ|P|⁴; the number of pixels of a uniform disc.

    Examples
    --------
    >>> y, x = np.indices((64, 64)) - 32
    >>> round(probe_diameter_px((np.hypot(y, x) < 10)[None]), 1)
    19.7
    """
    intensity = (np.abs(probe) ** 2).sum(axis=0, dtype=np.float64)
    return float(2 * np.sqrt(intensity.sum() ** 2 / (intensity**2).sum() / np.pi))


DEFOCUS_RADII = (1 / 32, 1 / 16, 1 / 8, 1 / 6, 1 / 4)
"""Root-mean-square radii of the defocused probes in a defocus search, relative to N."""


def squared_modulus(wave: NDArray[np.complex64]) -> NDArray[np.float32]:
    return wave.real**2 + wave.imag**2


def probe_centroid_px(probe: NDArray[np.complex64]) -> NDArray[np.float64]:
    """Centroid (y, x) of Σ|P|², float64 (2,), pixels."""
    intensity = squared_modulus(probe).sum(axis=0, dtype=np.float64)
    axis = np.arange(len(intensity))
    return np.array([intensity.sum(axis=1) @ axis, intensity.sum(axis=0) @ axis]) / intensity.sum()


def defocused(probe: NDArray[np.complex64], defocus_rad: float) -> NDArray[np.complex64]:
    """Probe with added defocus.

    Parameters
    ----------
    probe : complex64 array (mode, N, N)
    defocus_rad : float
        Phase added at the edge of the far field (N/2 pixels from DC), quadratic in the distance; 0 returns the probe
        unchanged.

    Returns
    -------
    complex64 array (mode, N, N)
    """
    curved = defocus_rad * (far_radius(probe.shape[-1]) ** 2)
    return scipy.fft.ifft2(scipy.fft.fft2(probe) * np.exp(1j * curved).astype(np.complex64))


def far_radius(n_pixels: int) -> NDArray[np.float64]:
    """Distance from DC at [0, 0], units of N/2 pixels (N, N)."""
    axis = 2 * scipy.fft.fftfreq(n_pixels)
    return np.hypot(axis[:, None], axis)


def defocus_starts(probe: NDArray[np.complex64]) -> tuple[float, ...]:
    """Defocus values of a search, radians: 0 and both signs.

    Each spreads a focused probe to one of the radii `DEFOCUS_RADII`.
    """
    n_pixels = probe.shape[-1]
    intensity = squared_modulus(scipy.fft.fft2(probe)).sum(axis=0, dtype=np.float64)
    spread = np.sqrt((intensity * far_radius(n_pixels) ** 2).sum() / intensity.sum())
    # The gradient of the quadratic phase moves intensity at far-field radius s by 2 defocus s / π pixels.
    positive = [float(radius * n_pixels * np.pi / (2 * spread)) for radius in DEFOCUS_RADII]
    return (0.0, *positive, *(-defocus for defocus in positive))
