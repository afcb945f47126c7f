"""From a file's detector frame to the N x N patterns of a scan: where the beam is, crop, pad, bin and what follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.io.probe import to_far_field, to_real_space
from ptychodask.io.source import Dc
from ptychodask.scan import Domain, PtychodaskError

HC_EV_M = 1.239841984332e-6
"""Planck's constant times the speed of light, electronvolt metres (CODATA 2018, exact)."""


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """How a frame (h, w) becomes a pattern (N, N): first `dc`, then crop or pad about `centre_yx`, then bin.

    Examples
    --------
    >>> grid = FrameGrid(frame_shape=(6, 6), n_pixels=2, bin=2, dc="centre", centre_yx=(3, 3))
    >>> grid.patterns(np.ones((1, 6, 6), np.uint8), "counts")[0].tolist()
    [[4, 4], [4, 4]]
    """

    frame_shape: tuple[int, int]
    """Pixels of a frame of the file (h, w)."""

    n_pixels: int
    """Pixels across a pattern, N."""

    bin: int
    """Frame pixels along each axis in one pattern pixel."""

    dc: Dc
    """Where the direct beam lies in the file."""

    centre_yx: tuple[int, int]
    """Frame pixel that becomes [N//2, N//2], after `dc`; with an even `bin` it is the first pixel of that bin."""

    @property
    def extent(self) -> int:
        """Frame pixels across a pattern, N·bin."""
        return self.n_pixels * self.bin

    @property
    def changes_the_object_grid(self) -> bool:
        """Whether the patterns' object grid or field differs from that of the file's frames."""
        return self.bin != 1 or self.frame_shape != (self.extent, self.extent)

    @property
    def position_scale_yx(self) -> tuple[float, float]:
        """Factors from object pixels of the file's grid to those of the scan.

        An object pixel is λz/(extent of the detector), so cropping from h to N·bin pixels makes it h/(N·bin) times
        larger, and numbers of pixels that many times smaller.

        Examples
        --------
        >>> FrameGrid(frame_shape=(8, 8), n_pixels=4, bin=1, dc="centre", centre_yx=(4, 4)).position_scale_yx
        (0.5, 0.5)
        """
        return self.extent / self.frame_shape[0], self.extent / self.frame_shape[1]

    def patterns(self, frames: NDArray[Any], domain: Domain) -> NDArray[Any]:
        """Patterns (k, N, N) from frames (k, h, w): counts are summed over a bin, amplitudes as √Σ amplitude².

        Integer counts are summed as int64, floats as float64; without binning the type stays.
        """
        cut = self._cut(frames)
        if self.bin == 1:
            return cut
        if domain == "amplitude":
            return np.sqrt(self._binned(np.square(cut, dtype=np.float64)))
        return self._binned(cut.astype(np.float64 if cut.dtype.kind == "f" else np.int64))

    def mask(self, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Mask (N, N) from a mask (h, w): a bin is good when all its pixels are; padding was not measured.

        Without a mask and without padding there is none.
        """
        good = self._cut((np.ones(self.frame_shape, bool) if mask is None else mask)[None])[0]
        if self.bin > 1:
            n = self.n_pixels
            good = good.reshape(n, self.bin, n, self.bin).all(axis=(1, 3))
        return None if mask is None and good.all() else good

    def probe(self, probe: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """Probe (mode, N, N) from a probe (mode, h, w) on the file's grid.

        Its far field is cropped or padded to the detector's extent N·bin (unitary transforms on both sides, so that
        the photons of each detector pixel stay), and its middle N pixels are kept: a binned detector sees a field
        that is smaller by `bin`.
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

    def _cut(self, frames: NDArray[Any]) -> NDArray[Any]:
        """Frames (k, h, w) with the beam in the middle, cropped and padded with 0 to (k, N·bin, N·bin)."""
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
    """Type in which patterns are stored: as measured, 8-byte types in 4 bytes, sums of a bin with room.

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
    """Patterns in the type they are stored in; a good pixel that does not fit is refused, a bad one becomes 0."""
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
        # A float64 beyond float32 becomes infinite, which the store refuses.
        return patterns.astype(dtype)


def mean_counts(blocks: Iterable[NDArray[Any]], domain: Domain) -> NDArray[np.float64]:
    """Mean counts (h, w) over the frames of all blocks (k, h, w); negative and non-finite values count as 0."""
    total: NDArray[np.float64] | float = 0.0
    n_frames = 0
    for block in blocks:
        counts = block.astype(np.float64)
        np.nan_to_num(counts, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        with np.errstate(over="ignore"):
            # What overflows is refused when it is stored.
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


def rim_phase(
    defocus_m: float, *, wavelength_m: float, distance_m: float, pattern_pixel_m: float, outer_px: float
) -> float:
    """Phase of a defocus at the rim of a pupil, π Δz θ²/λ with θ the rim's angle, radians.

    Examples
    --------
    >>> round(rim_phase(1e-4, wavelength_m=1e-10, distance_m=2.0, pattern_pixel_m=50e-6, outer_px=80), 3)
    3.142
    """
    angle = outer_px / 2 * pattern_pixel_m / distance_m
    return float(np.pi * defocus_m * angle**2 / wavelength_m)
