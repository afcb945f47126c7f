"""Crop, padding and binning of detector frames to N x N patterns.

Also their effect on the mask, the probe, positions and the object pixel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import Dc
from ptychodask.probes import to_far_field, to_real_space
from ptychodask.scan import Domain

HC_EV_M = 1.239841984332e-6
"""Planck's constant times the speed of light, electronvolt metres (CODATA 2018, exact)."""


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """Conversion of frames (h, w) to patterns (N, N).

    First `dc` is shifted to the middle, then the frame is cropped or padded about `centre_yx`, then binned.

    Examples
    --------
    >>> grid = FrameGrid(frame_shape=(6, 6), n_pixels=2, bin=2, dc="centre", centre_yx=(3, 3))
    >>> grid.patterns(np.ones((1, 6, 6), np.uint8), "counts")[0].tolist()
    [[4, 4], [4, 4]]
    """

    frame_shape: tuple[int, int]
    """Shape of a frame of the file (h, w)."""

    n_pixels: int
    """Pixels across a pattern, N."""

    bin: int
    """Frame pixels along each axis per pattern pixel."""

    dc: Dc
    """Pixel of the direct beam in a frame of the file."""

    centre_yx: tuple[int, int]
    """Frame pixel that becomes [N//2, N//2], after `dc`; with an even `bin` it is the first pixel of that bin."""

    @property
    def extent(self) -> int:
        """Frame pixels across a pattern, N·bin."""
        return self.n_pixels * self.bin

    @property
    def changes_the_object_grid(self) -> bool:
        """True if the patterns' object grid or field differs from the frames'."""
        return self.bin != 1 or self.frame_shape != (self.extent, self.extent)

    @property
    def position_scale_yx(self) -> tuple[float, float]:
        """Factors from object pixels of the file to those of the scan.

        An object pixel is λz/(extent of the detector), so cropping from h to N·bin pixels makes it h/(N·bin) times
        larger, and lengths in pixels that many times smaller.

        Examples
        --------
        >>> FrameGrid(frame_shape=(8, 8), n_pixels=4, bin=1, dc="centre", centre_yx=(4, 4)).position_scale_yx
        (0.5, 0.5)
        """
        return self.extent / self.frame_shape[0], self.extent / self.frame_shape[1]

    def patterns(self, frames: NDArray[Any], domain: Domain) -> NDArray[Any]:
        """Patterns (k, N, N) from frames (k, h, w).

        A bin is the sum of its counts, or √Σ amplitude² of its amplitudes. Integer counts are summed as int64, floats
        as float64; without binning the type is kept.
        """
        cut = self._cut(frames)
        if self.bin == 1:
            return cut
        if domain == "amplitude":
            return np.sqrt(self._binned(np.square(cut, dtype=np.float64)))
        return self._binned(cut.astype(np.float64 if cut.dtype.kind == "f" else np.int64))

    def mask(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Mask (N, N) from a mask (h, w), or None.

        A bin is good if all its pixels are; padding is bad. None if there is neither a mask nor padding.
        """
        good = self._cut((np.ones(self.frame_shape, bool) if mask is None else mask)[None])[0]
        if self.bin > 1:
            n = self.n_pixels
            good = good.reshape(n, self.bin, n, self.bin).all(axis=(1, 3))
        return None if mask is None and good.all() else good

    def probe(self, probe: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """Probe (mode, N, N) from a probe (mode, h, w).

        Its far field is cropped or padded to the detector's extent N·bin (both transforms are unitary, so the photons
        of each detector pixel are kept), and its middle N pixels are kept: binning reduces the field of view by `bin`.
        """
        middle = FrameGrid(
            frame_shape=self.frame_shape,
            n_pixels=self.extent,
            bin=1,
            dc="centre",
            centre_yx=(self.frame_shape[0] // 2, self.frame_shape[1] // 2),
        )
        wave = to_real_space(middle._cut(to_far_field(probe)))
        start = self.extent // 2 - self.n_pixels // 2
        kept = slice(start, start + self.n_pixels)
        return np.ascontiguousarray(wave[:, kept, kept], dtype=np.complex64)

    def touched(self, pixels: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """True where a pattern's pixel (k, N, N) contains one of the pixels (k, h, w)."""
        cut = self._cut(pixels)
        return cut if self.bin == 1 else self._binned(cut.astype(np.int64)) > 0

    def _cut(self, frames: NDArray[Any]) -> NDArray[Any]:
        """Frames (k, N·bin, N·bin), centred, cropped or zero-padded, from (k, h, w)."""
        if self.dc == "corner":
            frames = np.fft.fftshift(frames, axes=(1, 2))
        into: list[slice] = []
        out_of: list[slice] = []
        for size, centre in zip(self.frame_shape, self.centre_yx, strict=True):
            start = centre - (self.n_pixels // 2) * self.bin - (self.bin - 1) // 2
            low, high = max(start, 0), min(start + self.extent, size)
            into.append(slice(low - start, max(high - start, low - start)))
            out_of.append(slice(low, max(high, low)))
        part = frames[:, out_of[0], out_of[1]]
        if part.shape[1:] == (self.extent, self.extent):
            return part
        cut = np.zeros((len(frames), self.extent, self.extent), frames.dtype)
        cut[:, into[0], into[1]] = part
        return cut

    def _binned(self, cut: NDArray[Any]) -> NDArray[Any]:
        n, b = self.n_pixels, self.bin
        return cut.reshape(-1, n, b, n, b).sum(axis=(2, 4))


def stored_dtype(dtype: np.dtype[Any], domain: Domain, bin: int) -> np.dtype[Any]:
    """Type in which patterns are stored.

    The type of the file, with 8-byte types reduced to 4 bytes and 4 bytes for sums over bins.

    Examples
    --------
    >>> [str(stored_dtype(np.dtype(t), "counts", 1)) for t in ("u2", "f8", "i8", "?")]
    ['uint16', 'float32', 'int32', 'uint8']
    >>> str(stored_dtype(np.dtype("u2"), "counts", 2)), str(stored_dtype(np.dtype("u2"), "amplitude", 2))
    ('uint32', 'float32')
    """
    if dtype.kind == "b":
        dtype = np.dtype(np.uint8)
    if dtype.kind == "f" or (bin > 1 and domain == "amplitude"):
        return np.dtype(np.float32 if bin > 1 else f"f{min(dtype.itemsize, 4)}")
    return np.dtype(f"{dtype.kind}{4 if bin > 1 else min(dtype.itemsize, 4)}")


def as_stored(patterns: NDArray[Any], dtype: np.dtype[Any], mask: NDArray[np.bool_] | None, label: str) -> NDArray[Any]:
    """Patterns converted to the type they are stored in.

    Raises
    ------
    PtychodaskError
        If the value of a good pixel does not fit; a bad pixel becomes 0.
    """
    if patterns.dtype == dtype:
        return patterns
    if dtype.kind in "iu" and patterns.dtype.kind in "iu" and not np.can_cast(patterns.dtype, dtype):
        limits = np.iinfo(dtype)
        outside = (patterns < limits.min) | (patterns > limits.max)
        if mask is not None:
            outside &= mask
            patterns = np.where(mask, patterns, 0)
        if outside.any():
            raise PtychodaskError(
                f"{label}: values up to {patterns.max()} do not fit {dtype}; mark those pixels bad with mask="
            )
    with np.errstate(over="ignore"):
        # A float64 out of the range of float32 becomes infinite, which the store refuses.
        return patterns.astype(dtype)


def mean_counts(blocks: Iterable[NDArray[Any]], domain: Domain) -> NDArray[np.float64]:
    """Mean counts (h, w) over the frames of blocks (k, h, w).

    Negative and non-finite values count as 0.
    """
    total: NDArray[np.float64] | float = 0.0
    n_frames = 0
    for block in blocks:
        counts = block.astype(np.float64)
        np.nan_to_num(counts, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        with np.errstate(over="ignore"):
            # An overflow here needs values that are refused when they are stored.
            counts = np.maximum(counts, 0, out=counts) if domain == "counts" else np.square(counts, out=counts)
            total = total + counts.sum(axis=0)
        n_frames += len(block)
    return np.asarray(total / max(n_frames, 1))


def centre_of_mass(image: NDArray[np.float64], label: str) -> tuple[int, int]:
    """Pixel (y, x) nearest to the centre of mass.

    Examples
    --------
    >>> centre_of_mass(np.eye(1, 16, 6).reshape(4, 4), "scan")
    (1, 2)
    """
    total = image.sum()
    if not total > 0:
        raise PtychodaskError(f"{label}: the mean pattern is zero, so it has no centre; pass centre=(y, x)")
    rows, columns = np.indices(image.shape)
    return int(np.rint((rows * image).sum() / total)), int(np.rint((columns * image).sum() / total))


def pixel_size_m(wavelength_m: float, distance_m: float, detector_pixel_m: float, extent: int) -> float:
    """Object pixel of a far-field pattern, λz/(extent · detector pixel), metres.

    Examples
    --------
    >>> pixel_size_m(1e-10, 2.0, 50e-6, 100)
    4e-08
    """
    return wavelength_m * distance_m / (extent * detector_pixel_m)


ELECTRON_REST_EV = 510998.95
"""Rest energy of an electron, electronvolts (CODATA 2018)."""


def wavelength_m_of(energy_ev: float, particle: str | None) -> float:
    """Wavelength of photons, or of electrons (relativistic), metres.

    Examples
    --------
    >>> [float(f"{wavelength_m_of(300e3, particle):.4g}") for particle in ("photon", "electron")]
    [4.133e-12, 1.969e-12]
    """
    if particle == "electron":
        return float(HC_EV_M / np.sqrt(energy_ev * (energy_ev + 2 * ELECTRON_REST_EV)))
    return HC_EV_M / energy_ev


def rim_phase(
    defocus_m: float, *, wavelength_m: float, distance_m: float, pattern_pixel_m: float, outer_px: float
) -> float:
    """Phase of a defocus at the rim of a pupil, radians.

    π Δz θ²/λ with θ the angle of the rim.

    Examples
    --------
    >>> round(rim_phase(1e-4, wavelength_m=1e-10, distance_m=2.0, pattern_pixel_m=50e-6, outer_px=80), 3)
    3.142
    """
    angle = outer_px / 2 * pattern_pixel_m / distance_m
    return float(np.pi * defocus_m * angle**2 / wavelength_m)
