"""Inner loops of refinement: exit waves and far fields.

Far fields have DC in the middle, as patterns are stored, although nothing is shifted: exit waves carry the sign
(−1)^(y + x), which moves their transform by half a period. It cancels wherever a wave meets a conjugate one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from ptychodask.forward import footprint_corners
from ptychodask.jit import compiled
from ptychodask.scan import Scan

READ_BATCH = 64
"""Patterns that are read at a time."""

WAVE_VALUES = 1 << 16
"""Values of exit waves that are transformed at a time, or those of one pattern: they stay in a processor's cache."""


class ExitWaves:
    """Exit waves of some patterns, by an object and the scan's probe.

    Parameters
    ----------
    object_ : complex64 array (y, x)
        Holds the whole frame at each of these positions; no NaN.
    corner : (int, int)
        Coordinates of its pixel [0, 0] in the scan's frame.
    scan : Scan
    index : int64 array (k,)
        Patterns; `READ_BATCH` of them are in memory at a time.
    """

    def __init__(
        self, object_: NDArray[np.complex64], corner: tuple[int, int], scan: Scan, index: NDArray[np.int64]
    ) -> None:
        self._scan, self._index = scan, index
        self._object = np.ascontiguousarray(object_, np.complex64)
        self.n_pixels = scan.n_pixels
        position = scan.position_yx_px[index]
        self.frame_corner = footprint_corners(position, scan.n_pixels)
        """Coordinates (y, x) of each frame's first pixel, int64 (k, 2)."""
        self.start = self.frame_corner - np.asarray(corner, np.int64)
        """First pixel (y, x) of each frame in the object, int64 (k, 2)."""
        self._fraction = position - np.floor(position)
        flux = np.ones(len(index)) if scan.flux is None else scan.flux[index]
        self.root_flux = np.sqrt(flux, dtype=np.float32)
        """Square root of each pattern's flux, float32 (k,)."""
        self._spectrum = scipy.fft.fftshift(scipy.fft.fft2(scan.probe.astype(np.complex64)), axes=(-2, -1))
        self._frequency = scipy.fft.fftshift(scipy.fft.fftfreq(scan.n_pixels))
        good = np.ones((scan.n_pixels, scan.n_pixels), bool) if scan.mask is None else scan.mask
        self.good = good.astype(np.float32)
        """1 at good pixels, 0 at bad ones, float32 (N, N)."""

    def batches(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Slices of the patterns, and their measured amplitudes (n, N, N)."""
        together = max(WAVE_VALUES // self._spectrum.size, 1)
        for first in range(0, len(self._index), READ_BATCH):
            measured = np.ascontiguousarray(self._scan.amplitude(self._index[first : first + READ_BATCH]))
            for start in range(0, len(measured), together):
                some = measured[start : start + together]
                yield slice(first + start, first + start + len(some)), some

    def shifted_probes(self, rows: slice) -> NDArray[np.complex64]:
        """Shifted probe of each pattern (n, mode, N, N), with the sign."""
        ramps = np.exp(-2j * np.pi * self._fraction[rows, :, None] * self._frequency).astype(np.complex64)
        shifted = np.empty((len(ramps), *self._spectrum.shape), np.complex64)
        _ramp(self._spectrum, ramps, shifted)
        return scipy.fft.ifft2(shifted, overwrite_x=True)  # type: ignore[no-any-return]

    def of(self, rows: slice, shifted_probes: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """Exit waves (n, mode, N, N)."""
        waves = np.empty_like(shifted_probes)
        _transmit(shifted_probes, self._object, self.start[rows], waves)
        return waves

    def far_fields(self, waves: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """Their far fields (n, mode, N, N), DC in the middle."""
        return scipy.fft.fft2(waves, norm="ortho")  # type: ignore[no-any-return]


@compiled
def _ramp(spectrum, ramps, out):  # type: ignore[no-untyped-def]
    """Spectrum times the ramps along y and x."""
    n_modes, n_rows, n_columns = spectrum.shape
    for i in range(len(out)):
        for m in range(n_modes):
            for y in range(n_rows):
                for x in range(n_columns):
                    out[i, m, y, x] = spectrum[m, y, x] * (ramps[i, 0, y] * ramps[i, 1, x])


@compiled
def _transmit(probes, object_, start, out):  # type: ignore[no-untyped-def]
    """Probes times the object in their frames."""
    n, n_modes, n_rows, n_columns = probes.shape
    for i in range(n):
        top, left = start[i]
        for m in range(n_modes):
            for y in range(n_rows):
                for x in range(n_columns):
                    out[i, m, y, x] = probes[i, m, y, x] * object_[top + y, left + x]


@compiled
def model_amplitude(far, out):  # type: ignore[no-untyped-def]
    """Square root of Σ over modes of |far|²; returns nothing.

    Parameters
    ----------
    far : complex64 array (n, mode, N, N)
    out : float32 array (n, N, N)
        Receives it.
    """
    n, n_modes, n_rows, n_columns = far.shape
    for i in range(n):
        for y in range(n_rows):
            for x in range(n_columns):
                value = far[i, 0, y, x]
                out[i, y, x] = value.real * value.real + value.imag * value.imag
            for m in range(1, n_modes):
                for x in range(n_columns):
                    value = far[i, m, y, x]
                    out[i, y, x] += value.real * value.real + value.imag * value.imag
            for x in range(n_columns):
                out[i, y, x] = np.sqrt(out[i, y, x])


@compiled
def change_to_measured(far, measured, root_flux, good, sums):  # type: ignore[no-untyped-def]
    """Replace far fields by their change to the measured amplitude.

    As `project_modulus`, for patterns scaled to mean flux.

    Parameters
    ----------
    far : complex64 array (n, mode, N, N)
        Changed in place.
    measured : float32 array (n, N, N)
        Amplitudes, bad pixels 0; overwritten.
    root_flux : float32 array (n,)
    good : float32 array (N, N)
    sums : float64 array (n, 3)
        Receives Σ|M − √n|, Σ√n and Σ(M − √n)² over good pixels, at mean flux.
    """
    n, n_modes, n_rows, n_columns = far.shape
    model = np.empty((n_rows, n_columns), np.float32)
    # Sums of columns, so that the loops along a line need no order and run several pixels at a time.
    absolute, total, square = np.empty(n_columns), np.empty(n_columns), np.empty(n_columns)
    for i in range(n):
        absolute[:], total[:], square[:] = 0.0, 0.0, 0.0
        scale = np.float32(1) / root_flux[i]
        peak = np.float32(0)
        for y in range(n_rows):
            for x in range(n_columns):
                value = far[i, 0, y, x]
                model[y, x] = value.real * value.real + value.imag * value.imag
            for m in range(1, n_modes):
                for x in range(n_columns):
                    value = far[i, m, y, x]
                    model[y, x] += value.real * value.real + value.imag * value.imag
            for x in range(n_columns):
                model[y, x] = np.sqrt(model[y, x])
            peak = max(peak, model[y].max())
        # A pixel where the model is dark has no phase to keep; the floor prevents a division by zero there.
        floor = np.float32(1e-6) * peak + np.float32(1.4e-14)
        for y in range(n_rows):
            for x in range(n_columns):
                amplitude = measured[i, y, x] * scale
                difference = (model[y, x] - amplitude) * good[y, x]
                absolute[x] += abs(difference)
                total[x] += amplitude
                square[x] += np.float64(difference) * difference
                measured[i, y, x] = (amplitude / max(model[y, x], floor) - np.float32(1)) * good[y, x]
            for m in range(n_modes):
                for x in range(n_columns):
                    far[i, m, y, x] = far[i, m, y, x] * measured[i, y, x]
        sums[i, 0], sums[i, 1], sums[i, 2] = absolute.sum(), total.sum(), square.sum()


@compiled
def add_back(change, start, probes, waves):  # type: ignore[no-untyped-def]
    """Add Σ over modes of conj(probe)·wave to an object, in the frames.

    Parameters
    ----------
    change : complex128 array (y, x)
        Changed in place.
    start : int64 array (n, 2)
        First pixel (y, x) of each frame.
    probes, waves : complex64 arrays (n, mode, N, N)
    """
    n, n_modes, n_rows, n_columns = waves.shape
    for i in range(n):
        top, left = start[i]
        for m in range(n_modes):
            for y in range(n_rows):
                for x in range(n_columns):
                    change[top + y, left + x] += np.conj(probes[i, m, y, x]) * waves[i, m, y, x]


@compiled
def under_hats(waves, first, hats, numbers, out):  # type: ignore[no-untyped-def]
    """Waves times hats along their last axis, one for each node.

    Parameters
    ----------
    waves : complex64 array (hat, mode, line, N)
        Lines from `first` on are used.
    first : int
    hats : float32 array (hat, N)
    numbers : int64 array (2, node)
        Element along the first axis of `waves`, and hat, of each node.
    out : complex64 array (node, mode, line, N)
        Receives them.
    """
    n_nodes, n_modes, n_lines, n_columns = out.shape
    for k in range(n_nodes):
        along, across = numbers[0, k], numbers[1, k]
        for m in range(n_modes):
            for y in range(n_lines):
                for x in range(n_columns):
                    out[k, m, y, x] = waves[along, m, first + y, x] * hats[across, x]


@compiled
def amplitude_derivative(far, first, direction, out):  # type: ignore[no-untyped-def]
    """Derivative Σ over modes of Re(Ψ* i F[Bψ]) of an amplitude.

    Parameters
    ----------
    far : complex64 array (node, mode, line, N)
        F[Bψ] under each node's hat B.
    first : int
        Line of `direction` that the first one is.
    direction : complex64 array (mode, N, N)
        Ψ, over the amplitude.
    out : float32 array (node, line, N)
        Receives it.
    """
    n_nodes, n_modes, n_lines, n_columns = far.shape
    for k in range(n_nodes):
        for y in range(n_lines):
            for x in range(n_columns):
                one, other = direction[0, first + y, x], far[k, 0, y, x]
                out[k, y, x] = one.imag * other.real - one.real * other.imag
            for m in range(1, n_modes):
                for x in range(n_columns):
                    one, other = direction[m, first + y, x], far[k, m, y, x]
                    out[k, y, x] += one.imag * other.real - one.real * other.imag
