"""Refinement of positions and flux from the patterns themselves.

A pattern fixes its position through the overlap of its far field with the object that all patterns make: one
Gauss-Newton step of two unknowns for each pattern. Errors that grow over the field (a wrong pixel size or rotation of
the raster) hardly show in it, since the object adapts: it is stretched as the positions are. They show in how each
pattern's own part of the object is stretched, and are solved for together: one step of four unknowns for all patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from ptychodask.forward import footprint_corners, shift_ramp
from ptychodask.probes import squared_modulus
from ptychodask.reassembly import Box
from ptychodask.refinement.slow_phase import DARK_AMPLITUDE
from ptychodask.scan import Scan

READ_BATCH = 64
"""Patterns that are read at a time."""

MOST_STEP_PX = 1.0
"""Longest step of a position along an axis, pixels."""

SPLINE_MARGIN_PX = 12
"""Pixels around those that are interpolated: a cubic spline hardly depends on what is farther away."""

DAMPING = 1e-2
"""Damping of the steps of single positions, relative to the median curvature: patterns without contrast stay."""


@dataclass(frozen=True, eq=False)
class PositionSums:
    """Gauss-Newton sums of some patterns, for positions and flux."""

    curvature: NDArray[np.float64]
    """JᵀJ of each pattern's position (pattern, 2, 2)."""

    slope: NDArray[np.float64]
    """Jᵀr of each pattern's position (pattern, 2)."""

    affine_curvature: NDArray[np.float64]
    """JᵀJ of the affine part (4, 4), summed over the patterns: elements yy, yx, xy, xx."""

    affine_slope: NDArray[np.float64]
    """Jᵀr of the affine part (4,)."""

    flux: NDArray[np.float64]
    """Flux of each pattern (pattern,) that fits it best, relative to flux 1; NaN for dark ones."""


def position_sums(
    object_: NDArray[np.complex64],
    corner: tuple[int, int],
    scan: Scan,
    index: NDArray[np.int64],
    taking_part: NDArray[np.bool_],
) -> PositionSums:
    """Sums of some patterns, linearised around an object and their positions.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Holds the whole frame at each position; no NaN.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    scan : Scan
    index : int64 array (k,)
        Patterns; `READ_BATCH` of them are in memory at a time.
    taking_part : bool array (k,)
        Patterns that are summed in the affine part; judges are not.

    Returns
    -------
    PositionSums

    Notes
    -----
    With the exit wave ψ = P(r − p) O, far field Ψ and amplitude M: ∂M/∂p = Re(Ψ* F[−∇P O]) / M, with ∇P from the
    Fourier shift. Residuals as in `normal_equations`. For the affine part the patterns stay, and O is stretched around
    each: ∂M/∂G_ab = −Re(Ψ* F[P (r − p)_b ∂O/∂r_a]) / M. The best flux is Σn / Σμ for counts, and (Σ√n M / Σ M²)² for
    amplitudes, over good pixels, with μ and M at flux 1. Gauss-Newton with the position of single patterns: C. Guizar-
    Sicairos and J. Fienup, Opt. Express 16 (2008) 7264, section 3.
    """
    n_pixels, n_patterns = scan.n_pixels, len(index)
    good = None if scan.mask is None else scipy.fft.ifftshift(scan.mask)
    position = scan.position_yx_px[index]
    start = footprint_corners(position, n_pixels) - corner
    spectrum = scipy.fft.fft2(scan.probe)
    frequency = scipy.fft.fftfreq(n_pixels)
    along = [(-2j * np.pi * each).astype(spectrum.dtype) for each in (frequency[:, None], frequency)]
    gradient = np.gradient(object_, axis=0), np.gradient(object_, axis=1)
    offset = np.arange(n_pixels) - n_pixels // 2
    curvature, slope = np.zeros((n_patterns, 2, 2)), np.zeros((n_patterns, 2))
    affine_curvature, affine_slope = np.zeros((4, 4)), np.zeros(4)
    best_flux = np.full(n_patterns, np.nan)
    for first in range(0, n_patterns, READ_BATCH):
        batch = np.arange(first, min(first + READ_BATCH, n_patterns))
        measured = scipy.fft.ifftshift(scan.amplitude(index[batch]), axes=(1, 2))
        for j, amplitude in zip(batch, measured, strict=True):
            frame = tuple(slice(side, side + n_pixels) for side in start[j])
            fraction = position[j] - np.floor(position[j])
            shifted_spectrum = spectrum * shift_ramp(fraction, n_pixels, spectrum.dtype)
            probe = scipy.fft.ifft2(shifted_spectrum)
            flux = 1.0 if scan.flux is None else float(scan.flux[index[j]])
            far = scipy.fft.fft2(probe * object_[frame], norm="ortho")
            single = np.sqrt(squared_modulus(far).sum(axis=0))
            best_flux[j] = _best_flux(scan.domain, amplitude, single, good)
            model = np.float32(np.sqrt(flux)) * single
            far *= np.float32(np.sqrt(flux)) / np.maximum(single, np.float32(1e-6) * single.max() + np.float32(1e-12))
            if good is not None:
                far *= good
            residual = _residual(scan.domain, amplitude, model).ravel()
            moved = [scipy.fft.ifft2(shifted_spectrum * ramp) * object_[frame] for ramp in along]
            jacobian = _jacobian(far, moved)
            curvature[j], slope[j] = jacobian @ jacobian.T, jacobian @ residual
            if taking_part[j]:
                distance = [(offset - fraction[0])[:, None], offset - fraction[1]]
                stretched = [probe * (-part[frame] * away) for part in gradient for away in distance]
                jacobian = _jacobian(far, stretched)
                affine_curvature += jacobian @ jacobian.T
                affine_slope += jacobian @ residual
    return PositionSums(curvature, slope, affine_curvature, affine_slope, best_flux)


def _jacobian(far: NDArray[np.complex64], waves: list[NDArray[np.complex64]]) -> NDArray[np.float64]:
    """Derivatives of the amplitude (wave, pixel) by changes of the exit wave."""
    rows = [(far.conj() * scipy.fft.fft2(wave, norm="ortho")).real.sum(axis=0).ravel() for wave in waves]
    return np.array(rows, np.float64)


def _residual(domain: str, amplitude: NDArray[np.float32], model: NDArray[np.float32]) -> NDArray[np.float64]:
    difference = (amplitude - model).astype(np.float64)
    if domain == "amplitude":
        return difference
    return difference * (amplitude + model) / (2 * np.maximum(model, DARK_AMPLITUDE))


def _best_flux(
    domain: str, amplitude: NDArray[np.float32], model: NDArray[np.float32], good: NDArray[np.bool_] | None
) -> float:
    """Flux that fits a pattern best; NaN without light."""
    n, m = ((values if good is None else values[good]).astype(np.float64) for values in (amplitude, model))
    power = float((m**2).sum())
    if power <= 0:
        return float("nan")
    return float((n**2).sum()) / power if domain == "counts" else (float((n * m).sum()) / power) ** 2


def position_steps(sums: PositionSums) -> NDArray[np.float64]:
    """Steps of single positions (pattern, 2), pixels; without their mean.

    Each is damped, and at most `MOST_STEP_PX` along an axis.
    """
    typical = np.median(np.trace(sums.curvature, axis1=1, axis2=2)) / 2
    system = sums.curvature + (DAMPING * typical + np.finfo(float).tiny) * np.eye(2)
    step = np.clip(np.linalg.solve(system, sums.slope[..., None])[..., 0], -MOST_STEP_PX, MOST_STEP_PX)
    return step - step.mean(axis=0)  # type: ignore[no-any-return]


def affine_step(sums: PositionSums) -> NDArray[np.float64]:
    """Affine part G (2, 2) of a step of all positions.

    Positions p become c + (1 + G)(p − c).
    """
    scale = np.trace(sums.affine_curvature) / 4
    if not scale > 0:
        return np.zeros((2, 2))
    return np.linalg.solve(sums.affine_curvature + 1e-6 * scale * np.eye(4), sums.affine_slope).reshape(2, 2)


def source_box(box: Box, affine: NDArray[np.float64], centre_yx_px: NDArray[np.float64]) -> Box:
    """Box of the pixels that `stretched` takes a box from."""
    inverse = np.linalg.inv(np.eye(2) + affine)
    corners = np.array([[y, x] for y in (box.y0, box.y1 - 1) for x in (box.x0, box.x1 - 1)], float) - centre_yx_px
    source = corners @ inverse.T + centre_yx_px
    (y0, x0) = np.floor(source.min(axis=0)).astype(int) - SPLINE_MARGIN_PX
    (y1, x1) = np.ceil(source.max(axis=0)).astype(int) + SPLINE_MARGIN_PX + 1
    return Box(int(y0), int(y1), int(x0), int(x1))


def stretched(
    piece: NDArray[np.complex64], source: Box, box: Box, affine: NDArray[np.float64], centre_yx_px: NDArray[np.float64]
) -> NDArray[np.complex64]:
    """Object over a box, stretched by 1 + G around a centre.

    Parameters
    ----------
    piece : complex64 array (y, x)
        Object over `source`, which `source_box` names.
    source, box : Box
    affine : float64 array (2, 2)
        G.
    centre_yx_px : float64 array (2,)

    Returns
    -------
    complex64 array (y, x)
        Interpolated by cubic splines.
    """
    inverse = np.linalg.inv(np.eye(2) + affine)
    y = np.arange(box.y0, box.y1)[:, None] - centre_yx_px[0]
    x = np.arange(box.x0, box.x1) - centre_yx_px[1]
    at = np.array(
        [
            inverse[0, 0] * y + inverse[0, 1] * x + centre_yx_px[0] - source.y0,
            inverse[1, 0] * y + inverse[1, 1] * x + centre_yx_px[1] - source.x0,
        ]
    )
    real, imaginary = (map_coordinates(part, at, order=3, mode="nearest") for part in (piece.real, piece.imag))
    return (real + 1j * imaginary).astype(np.complex64)  # type: ignore[no-any-return]
