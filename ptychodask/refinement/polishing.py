"""Polishing: objective, gradient and step of the whole stitched object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from ptychodask.forward import footprint_corners, r_ratio, shift_ramp
from ptychodask.probes import squared_modulus
from ptychodask.reassembly import Box
from ptychodask.refinement.kernels import ExitWaves, add_back, change_to_measured
from ptychodask.scan import Scan


def within(part: Box, whole: Box) -> tuple[slice, slice]:
    """Slices of a box in an array over a larger one."""
    return slice(part.y0 - whole.y0, part.y1 - whole.y0), slice(part.x0 - whole.x0, part.x1 - whole.x0)


PRIOR_PHOTONS = 300.0
"""Proximal weight that holds each pixel near the network's object, in photons that illuminate it. Where a pixel
received far fewer, the patterns hold more noise than the network's object has errors. It is the precision 1/(4 σ²) of
an object whose real and imaginary parts have an error σ of 0.03 each, for the variance 1/4 of the amplitude of
counts."""

DIM_FROM_FLAT = 0.01
"""Share of the missing illumination that holds dim pixels near a flat object: no network predicted them, so they only
need to stay finite."""


@dataclass(frozen=True)
class Misfit:
    """Misfit of predicted patterns: sums over patterns and good pixels."""

    absolute: float = 0.0
    """Σ|√I_pred − √I|."""

    amplitude: float = 0.0
    """Σ√I."""

    square: float = 0.0
    """Σ(√I_pred − √I)², patterns scaled to mean flux."""

    @property
    def r_factor(self) -> float:
        """R = Σ|√I_pred − √I| / Σ√I.

        Raises `PtychodaskError` if the patterns are all zero.
        """
        return r_ratio(self.absolute, self.amplitude, "polish")

    def __add__(self, other: Misfit) -> Misfit:
        return Misfit(self.absolute + other.absolute, self.amplitude + other.amplitude, self.square + other.square)


def negative_gradient(
    object_: NDArray[np.complex64], corner: tuple[int, int], scan: Scan, index: NDArray[np.int64]
) -> tuple[NDArray[np.complex128], Misfit]:
    """Negative gradient of the misfit of some patterns, and the misfit.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Covers the footprint at each of these positions; no NaN.
    corner : (int, int)
        Scan coordinates of its pixel [0, 0].
    scan : Scan
    index : int64 array (k,)
        Indices of the patterns; `READ_BATCH` of them are in memory at a time.

    Returns
    -------
    change : complex128 array (y, x)
        Σ over patterns and modes of conj(P)(ψ' − ψ), with ψ' the exit wave of the measured modulus: half the negative
        gradient of ``misfit.square``.
    misfit : Misfit

    Notes
    -----
    Projection, modes and bad pixels as in `run_sweeps`. The term of a pattern depends only on the object in its
    footprint, so the sums over any partition of the patterns add up to the same total.
    """
    change, sums = np.zeros(object_.shape, np.complex128), np.zeros((len(index), 3))
    waves = ExitWaves(object_, corner, scan, index)
    for rows, measured in waves.batches():
        probes = waves.shifted_probes(rows)
        far = waves.far_fields(waves.of(rows, probes))
        change_to_measured(far, measured, waves.root_flux[rows], waves.good, sums[rows])
        add_back(change, waves.start[rows], probes, scipy.fft.ifft2(far, norm="ortho", overwrite_x=True))
    absolute, total = (waves.root_flux @ sums[:, :2]).tolist()
    return change, Misfit(absolute, total, float(sums[:, 2].sum()))


def illumination_and_proximal_weight(
    probe: NDArray[np.complex64],
    position_yx_px: NDArray[np.float64],
    corner: tuple[int, int],
    shape: tuple[int, int],
    *,
    prior: float = 0.0,
    dim: float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Illumination and proximal weight of each pixel, for polishing.

    Parameters
    ----------
    probe : complex64 array (mode, N, N)
    position_yx_px : float64 array (pattern, 2)
    corner : (int, int)
        Scan coordinates of pixel [0, 0].
    shape : (int, int)
        Pixels (y, x).
    prior : float
        Least proximal weight, in the probe's unit (see `PRIOR_PHOTONS`).
    dim : float
        Share of the missing illumination that holds dim pixels.

    Returns
    -------
    illumination : float32 array (y, x)
        Σ over patterns of |P|², in the probe's unit.
    proximal_weight : float32 array (y, x)
        dim · max(0, max|P|² − illumination) + prior: weight of the term that pulls a pixel back to its start, dim ones
        above all.
    """
    n_pixels = probe.shape[-1]
    # Padded by a footprint on each side, so that footprints across the edges need no clipping.
    padded = np.zeros((shape[0] + 2 * n_pixels, shape[1] + 2 * n_pixels), np.float64)
    start = footprint_corners(position_yx_px, n_pixels) - corner + n_pixels
    spectrum = scipy.fft.fft2(probe)
    for j in np.flatnonzero(((start > 0) & (start < np.add(shape, n_pixels))).all(axis=1)):
        footprint = tuple(slice(side, side + n_pixels) for side in start[j])
        fraction = position_yx_px[j] - np.floor(position_yx_px[j])
        shifted = scipy.fft.ifft2(spectrum * shift_ramp(fraction, n_pixels, probe.dtype))
        padded[footprint] += squared_modulus(shifted).sum(axis=0)
    total = padded[n_pixels:-n_pixels, n_pixels:-n_pixels]
    peak = float(squared_modulus(probe).sum(axis=0).max())
    return total.astype(np.float32), (dim * np.maximum(peak - total, 0) + prior).astype(np.float32)


@dataclass(frozen=True)
class StepProducts:
    """Real scalar products that determine a polishing step, float64 sums over pixels.

    s is the latest step, u the negative gradient now, y the decrease of u due to s; H divides by illumination plus
    proximal weight.
    """

    s_y: float = 0.0
    """s·y, the curvature along the step."""

    y_h_y: float = 0.0
    """y·Hy."""

    s_u: float = 0.0
    """s·u."""

    y_h_u: float = 0.0
    """y·Hu."""

    def __add__(self, other: StepProducts) -> StepProducts:
        return StepProducts(
            self.s_y + other.s_y, self.y_h_y + other.y_h_y, self.s_u + other.s_u, self.y_h_u + other.y_h_u
        )

    def mix(self) -> tuple[float, float, float]:
        """Factors (γ, a, b) of a polishing step.

        The step is γ H (u − a y) + b s. They are (1, 0, 0), the preconditioned gradient step, if the curvature along s
        was not positive.

        Notes
        -----
        Quasi-Newton step of BFGS with a memory of one step (D. F. Shanno, Math. Oper. Res. 3 (1978) 244), with the
        initial inverse curvature γ H, γ = s·y / y·Hy.
        """
        if not (self.s_y > 0 and self.y_h_y > 0):
            return 1.0, 0.0, 0.0
        gamma, a = self.s_y / self.y_h_y, self.s_u / self.s_y
        return gamma, a, a - gamma * (self.y_h_u - a * self.y_h_y) / self.s_y


def step_products(
    object_: NDArray[np.complex64],
    before: NDArray[np.complex64],
    change: NDArray[np.complex64],
    change_before: NDArray[np.complex64],
    curvature: NDArray[np.float32],
) -> StepProducts:
    """Scalar products of the latest step (see `StepProducts`).

    Parameters
    ----------
    object_, before : complex64 array (y, x)
        Object now, and before the latest step.
    change, change_before : complex64 array (y, x)
        Negative gradient now, and before the latest step, with the proximal term.
    curvature : float32 array (y, x)
        Illumination plus proximal weight, positive.
    """
    step = (object_ - before).astype(np.complex128)
    decrease = (change_before - change).astype(np.complex128)
    scaled = decrease / curvature
    return StepProducts(
        _real_dot(step, decrease), _real_dot(decrease, scaled), _real_dot(step, change), _real_dot(scaled, change)
    )


def _real_dot(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float((one.real * other.real + one.imag * other.imag).sum(dtype=np.float64))


def take_step(
    object_: NDArray[np.complex64],
    before: NDArray[np.complex64],
    change: NDArray[np.complex64],
    change_before: NDArray[np.complex64],
    curvature: NDArray[np.float32],
    mix: tuple[float, float, float],
) -> NDArray[np.complex64]:
    """Part of an object after a polishing step, complex64 (y, x).

    Parameters
    ----------
    object_, before, change, change_before, curvature
        See `step_products`.
    mix : (float, float, float)
        Factors from `StepProducts.mix`.
    """
    gamma, a, b = mix
    decrease = (change_before - change).astype(np.complex128)
    stepped = object_ + (gamma / curvature) * (change - a * decrease) + b * (object_ - before)
    return stepped.astype(np.complex64)
