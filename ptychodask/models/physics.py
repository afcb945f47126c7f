"""Differentiable forward model of a group: propagation, shifts, merging, data projections.

Everything here runs on any Keras backend. Complex values are pairs (real, imaginary) of float32 tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.models.backend import ops
from ptychodask.probes import ILLUMINATION_FLOOR

Tensor = Any
"""A tensor of the Keras backend in use."""

ComplexPair = tuple[Tensor, Tensor]
"""Real and imaginary part, tensors of one shape."""

MERGE_FLOOR = 1e-2
"""Weight of a member's own patch added when patches are merged, relative to the brightest pixel's weight.

It dominates only where no member has illumination."""

TINY = 1e-12

DARK_FLOOR = 1e-3
"""Far-field amplitude, relative to the root mean square of the probe's far field, below which a pixel counts less.

Its phase may be rounding error there."""


def multiply(a: ComplexPair, b: ComplexPair) -> ComplexPair:
    """Product of two complex pairs."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def conjugate(a: ComplexPair) -> ComplexPair:
    """Complex conjugate of a pair."""
    return a[0], -a[1]


def squared_modulus(a: ComplexPair) -> Tensor:
    """|a|² of a pair."""
    return a[0] * a[0] + a[1] * a[1]


def alternating_signs(n_pixels: int) -> NDArray[np.float32]:
    """(−1)**(y+x), float32 (N, N), which shifts an FFT by N/2.

    Multiplied into the input of an FFT of even size, it shifts the output by N/2.

    Examples
    --------
    >>> alternating_signs(2).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    y, x = np.indices((n_pixels, n_pixels))
    return (1 - 2 * ((y + x) % 2)).astype(np.float32)


def relative_illumination(probe: ComplexPair) -> Tensor:
    """Relative illumination (N, N) of a probe (mode, N, N).

    `scan.illumination` in differentiable form.
    """
    intensity = ops.sum(squared_modulus(probe), axis=0)
    relative = intensity / ops.max(intensity)
    return ops.where(relative < ILLUMINATION_FLOOR, 0.0, relative)


def propagate(wave: ComplexPair) -> ComplexPair:
    """Far field of exit waves (..., N, N) by a unitary FFT.

    DC is at [N//2, N//2]. Equals ``fftshift(fft2(wave)) / N``, so that Σ|far|² = Σ|wave|².
    """
    n_pixels = wave[0].shape[-1]
    signs = ops.convert_to_tensor(alternating_signs(n_pixels))
    real, imag = ops.fft2((wave[0] * signs, wave[1] * signs))
    return real / n_pixels, imag / n_pixels


def propagate_back(far: ComplexPair) -> ComplexPair:
    """Exit waves from far fields (..., N, N): inverse of `propagate`."""
    n_pixels = far[0].shape[-1]
    signs = ops.convert_to_tensor(alternating_signs(n_pixels) * n_pixels)
    real, imag = ops.ifft2(far)
    return real * signs, imag * signs


def shift_ramps(shift_yx_px: Tensor, n_pixels: int) -> ComplexPair:
    """Fourier factors that shift images by sub-pixel amounts.

    Parameters
    ----------
    shift_yx_px : tensor (..., 2)
        Shift of the sampling points: out(k) = in(k + shift), pixels.
    n_pixels : int

    Returns
    -------
    pair of tensors (..., N, N)
        exp(2πi f·shift), in the order of an FFT's frequencies.
    """
    frequency = ops.convert_to_tensor((2 * np.pi * np.fft.fftfreq(n_pixels)).astype(np.float32))
    along_y = shift_yx_px[..., 0:1] * frequency
    along_x = shift_yx_px[..., 1:2] * frequency
    return multiply(
        (ops.cos(along_y)[..., :, None], ops.sin(along_y)[..., :, None]),
        (ops.cos(along_x)[..., None, :], ops.sin(along_x)[..., None, :]),
    )


def gather_members(values: ComplexPair, ramps: ComplexPair) -> ComplexPair:
    """Sum of all members' values, in the coordinates of each member.

    Parameters
    ----------
    values : pair of tensors (group, C, N, N)
        Values in each member's coordinates, zero at the rim.
    ramps : pair of tensors (group, C, N, N)
        `shift_ramps` of the members' offsets.

    Returns
    -------
    pair of tensors (group, C, N, N)
        Σ over c of values[c], translated by offset[j] − offset[c], for each member j.
    """
    # The factor between two members is one member's ramp times the conjugate of the other's, so that all are first
    # summed in the coordinates of the group's centre: C transforms instead of C².
    at_centre = multiply(conjugate(ramps), ops.fft2(values))
    summed = tuple(ops.sum(part, axis=1, keepdims=True) for part in at_centre)
    return ops.ifft2(multiply(ramps, (summed[0], summed[1])))


def gathered_weight(weight: Tensor, ramps: ComplexPair) -> Tensor:
    """Sum of all members' weights, in the coordinates of each member.

    From weights (N, N) to (group, C, N, N); nowhere less than the member's own weight.
    """
    each = ops.broadcast_to(weight, ops.shape(ramps[0]))
    total, _ = gather_members((each, ops.zeros_like(each)), ramps)
    # A sharp edge rings when it is shifted: negative lobes of the others must not lower a member's own weight.
    return ops.maximum(total, each)


def merge_members(patches: ComplexPair, weight: Tensor, ramps: ComplexPair, total_weight: Tensor) -> ComplexPair:
    """Weighted mean of a group's patches, in the coordinates of each member.

    Parameters
    ----------
    patches : pair of tensors (group, C, N, N)
    weight : tensor (N, N)
        Relative illumination |P|²/max|P|².
    ramps, total_weight
        `shift_ramps` of the members' offsets, and `gathered_weight`.

    Returns
    -------
    pair of tensors (group, C, N, N)
        Where no member has illumination, each member keeps its own patch (`MERGE_FLOOR`).
    """
    real, imag = gather_members((patches[0] * weight, patches[1] * weight), ramps)
    denominator = total_weight + MERGE_FLOOR
    return (real + MERGE_FLOOR * patches[0]) / denominator, (imag + MERGE_FLOOR * patches[1]) / denominator


def exit_waves(probe: ComplexPair, patches: ComplexPair) -> ComplexPair:
    """Exit waves (group, C, mode, N, N) of a probe on patches.

    The probe is (mode, N, N), patches are (group, C, N, N).
    """
    return multiply(probe, (patches[0][:, :, None], patches[1][:, :, None]))


def expected_counts(probe: ComplexPair, patches: ComplexPair) -> Tensor:
    """Expected counts (group, C, N, N) of patches under a probe.

    Summed over modes, DC at [N//2, N//2].
    """
    return ops.sum(squared_modulus(propagate(exit_waves(probe, patches))), axis=2)


def data_step(patches: ComplexPair, probe: ComplexPair, amplitude: Tensor, mask: Tensor) -> ComplexPair:
    """Modulus-projection update of patches: conj(P)·(ψ' − ψ), summed over modes.

    Parameters
    ----------
    patches : pair of tensors (group, C, N, N)
    probe : pair of tensors (mode, N, N)
    amplitude : tensor (group, C, N, N)
        Measured amplitude.
    mask : tensor (N, N)
        Good detector pixels are 1; bad ones (0) keep the model's value.

    Returns
    -------
    pair of tensors (group, C, N, N)

    Notes
    -----
    The modulus projection of ePIE with a step shared by all members: Maiden & Rodenburg, Ultramicroscopy 109 (2009)
    1256, eqs. 3-5.
    """
    far = propagate(exit_waves(probe, patches))
    modelled = ops.sum(squared_modulus(far), axis=2)
    floor = ops.sum(squared_modulus(probe)) * (DARK_FLOOR / probe[0].shape[-1]) ** 2
    change = ((amplitude - ops.sqrt(modelled + TINY)) / ops.sqrt(modelled + floor) * mask)[:, :, None]
    difference = propagate_back((far[0] * change, far[1] * change))
    real, imag = multiply(conjugate(probe), difference)
    return ops.sum(real, axis=2), ops.sum(imag, axis=2)


def project_group(
    patches: ComplexPair,
    probe: ComplexPair,
    amplitude: Tensor,
    mask: Tensor,
    weight: Tensor,
    ramps: ComplexPair,
    total_weight: Tensor,
    length: float = 1.0,
) -> ComplexPair:
    """One data-consistency step of a group, from patches to patches.

    All members' updates are summed in the coordinates of each member and divided by the illumination there,
    regularised as in rPIE (Maiden, Johnson & Li, Optica 4 (2017) 736, eq. 12) by `MERGE_FLOOR` times the brightest
    pixel.

    Parameters
    ----------
    patches, probe, amplitude, mask
        As in `data_step`.
    weight, ramps, total_weight
        As in `merge_members`.
    length : float
        Factor of the full step.

    Returns
    -------
    pair of tensors (group, C, N, N)
    """
    brightest = ops.max(ops.sum(squared_modulus(probe), axis=0))
    step = gather_members(data_step(patches, probe, amplitude, mask), ramps)
    denominator = (total_weight + MERGE_FLOOR) * (brightest / length)
    return patches[0] + step[0] / denominator, patches[1] + step[1] / denominator


def extrapolate(before: ComplexPair, after: ComplexPair, momentum: float) -> ComplexPair:
    """Starting point of the next step: after + momentum (after − before).

    Parameters
    ----------
    before, after : pair of tensors (group, C, N, N)
        Patches before and after a step.
    momentum : float
        From 0 to less than 1.

    Returns
    -------
    pair of tensors (group, C, N, N)

    Notes
    -----
    Nesterov's acceleration, in ptychography mPIE (Maiden, Johnson & Li, Optica 4 (2017) 736). Steps of low spatial
    frequencies are short and of one sign; momentum lengthens them up to `step_length` / (1 − momentum) times.
    """
    if momentum == 0:
        return after
    real, imag = (b + momentum * (b - a) for a, b in zip(before, after, strict=True))
    return real, imag


def step_length(momentum: float) -> float:
    """Step length that keeps steps with momentum stable.

    Factor of the full step with which momentum is stable wherever full steps without momentum are.

    Notes
    -----
    A full step changes a misfit by a factor 1 − λ, and steps without momentum converge for λ < 2 (a sharp edge of the
    probe between pixels comes close to it). With momentum μ they do for λ < (2 + 2μ) / (1 + 2μ): the roots of
    z² − (1 − λ)(1 + μ) z + (1 − λ) μ are inside the unit circle.

    Examples
    --------
    >>> step_length(0.0), round(step_length(0.8), 3)
    (1.0, 0.692)
    """
    return (1 + momentum) / (1 + 2 * momentum)
