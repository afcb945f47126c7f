"""Canvas algebra: add patches, merge canvases, finish the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.jit import compiled
from ptychodask.probes import Window, illumination

CANVAS_PIXEL_BYTES = 36
"""Bytes of one canvas pixel: complex128 and float64 sums and an int32 count."""


NOTHING = np.complex64(complex(np.nan, np.nan))
"""Value of an object pixel that no patch reached."""


class Box(NamedTuple):
    """Part of the object: whole pixels in scan coordinates, ends excluded."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def corner(self) -> tuple[int, int]:
        """Coordinates (y, x) of its first pixel."""
        return self.y0, self.x0

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels (y, x) across it; 0 if it is empty."""
        return max(self.y1 - self.y0, 0), max(self.x1 - self.x0, 0)

    @property
    def n_pixels(self) -> int:
        """Pixels in it."""
        return self.shape[0] * self.shape[1]

    def overlap(self, other: Box) -> Box:
        """Intersection of both boxes; without pixels if they do not meet.

        Examples
        --------
        >>> Box(0, 4, 0, 4).overlap(Box(2, 9, -1, 3))
        Box(y0=2, y1=4, x0=0, x1=3)
        """
        return Box(max(self.y0, other.y0), min(self.y1, other.y1), max(self.x0, other.x0), min(self.x1, other.x1))


@dataclass(frozen=True, eq=False)
class Canvas:
    """Running sums over part of the object."""

    corner: tuple[int, int]
    """Scan coordinates (y, x) of pixel [0, 0], pixels."""

    weighted: NDArray[np.complex128]
    """Σ w·patch (y, x)."""

    weight: NDArray[np.float64]
    """Σ w (y, x)."""

    weighted_square: NDArray[np.float64]
    """Σ w·|patch|² (y, x)."""

    count: NDArray[np.int32]
    """Patches that reached each pixel (y, x)."""

    @property
    def box(self) -> Box:
        """Box of the canvas in the object."""
        (y, x), (height, width) = self.corner, self.weight.shape
        return Box(y, y + height, x, x + width)


def empty_canvas(corner: tuple[int, int], shape: tuple[int, int]) -> Canvas:
    """Canvas with all sums zero.

    Parameters
    ----------
    corner : (int, int)
        Scan coordinates (y, x) of its first pixel.
    shape : (int, int)
        Pixels (y, x).
    """
    return Canvas(
        corner=(int(corner[0]), int(corner[1])),
        weighted=np.zeros(shape, np.complex128),
        weight=np.zeros(shape, np.float64),
        weighted_square=np.zeros(shape, np.float64),
        count=np.zeros(shape, np.int32),
    )


def add_patches(
    canvas: Canvas,
    patches: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: NDArray[np.float64],
    window: NDArray[np.float64],
) -> Canvas:
    """Add patches to the sums of a canvas, in their order.

    Parameters
    ----------
    canvas : Canvas
        Changed in place; parts of patches outside of it are ignored.
    patches : complex array (n, M, M)
        Estimates of the object.
    corner_yx_px : float64 array (n, 2)
        Scan coordinates (y, x) of element [0, 0] of each patch; fractions are kept.
    window : float64 array (M, M)
        Weight w of each element, 0 or more.

    Returns
    -------
    Canvas
        `canvas` itself.

    Notes
    -----
    Each element is distributed to the four pixels around it with the bilinear weights b of its fraction. A patch counts
    as one estimate in each pixel it reaches, S/W with W = Σ b·w and S = Σ b·w·patch over its elements; W, S and |S|²/W
    are added to the canvas, so that the uncertainty is the spread between patches, not within one.

    Examples
    --------
    >>> canvas = empty_canvas((0, 0), (1, 3))
    >>> _ = add_patches(canvas, np.full((1, 1, 1), 2j), np.array([[0.0, 0.25]]), np.ones((1, 1)))
    >>> canvas.weight.tolist(), canvas.weighted.tolist()
    ([[0.75, 0.25, 0.0]], [[1.5j, 0.5j, 0j]])
    """
    # Where the window is zero nothing is added, and the probe rarely reaches the edges of a patch.
    rows, columns = _support(window.any(axis=1)), _support(window.any(axis=0))
    _splat(
        canvas.weighted,
        canvas.weight,
        canvas.weighted_square,
        canvas.count,
        canvas.corner,
        np.ascontiguousarray(corner_yx_px + np.array([rows.start, columns.start]), np.float64),
        np.ascontiguousarray(patches[:, rows, columns], np.complex64),
        np.ascontiguousarray(window[rows, columns], np.float64),
    )
    return canvas


def _support(lit: Any) -> slice:
    """Slice from the first to the last True element, or empty."""
    indices = np.flatnonzero(lit)
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)


@compiled
def _splat(weighted, weight, weighted_square, count, origin, corner, patches, window):  # type: ignore[no-untyped-def]
    height, width = weight.shape
    n, n_rows, n_columns = patches.shape
    # One row of the patch, shifted along x: Σ b·w·patch (real, imaginary) and Σ b·w; and the row before it.
    real, imag, share = np.zeros(n_columns + 1), np.zeros(n_columns + 1), np.zeros(n_columns + 1)
    real_before, imag_before, share_before = real.copy(), imag.copy(), share.copy()
    for i in range(n):
        # The fraction is taken in scan coordinates, so that it does not depend on the corner of the canvas.
        whole_y, whole_x = np.floor(corner[i, 0]), np.floor(corner[i, 1])
        fy, fx = corner[i, 0] - whole_y, corner[i, 1] - whole_x
        gy, gx = 1.0 - fy, 1.0 - fx
        top, left = int(whole_y) - origin[0], int(whole_x) - origin[1]
        first, last = max(0, -left), min(n_columns + 1, width - left)
        real_before[:], imag_before[:], share_before[:] = 0.0, 0.0, 0.0
        for r in range(n_rows + 1):
            real_left = imag_left = share_left = 0.0
            if r < n_rows:
                for k in range(n_columns):
                    w, element = window[r, k], patches[i, r, k]
                    real_here, imag_here = w * element.real, w * element.imag
                    real[k] = gx * real_here + fx * real_left
                    imag[k] = gx * imag_here + fx * imag_left
                    share[k] = gx * w + fx * share_left
                    real_left, imag_left, share_left = real_here, imag_here, w
            else:
                real[:], imag[:], share[:] = 0.0, 0.0, 0.0
            real[n_columns], imag[n_columns], share[n_columns] = fx * real_left, fx * imag_left, fx * share_left
            y = top + r
            if 0 <= y < height:
                # Without a branch, for speed: zeros are added where the weight is zero.
                for k in range(first, last):
                    total = gy * share[k] + fy * share_before[k]
                    real_sum = gy * real[k] + fy * real_before[k]
                    imag_sum = gy * imag[k] + fy * imag_before[k]
                    reached = total > 0.0
                    square = real_sum * real_sum + imag_sum * imag_sum
                    weighted[y, left + k] += complex(real_sum, imag_sum)
                    weight[y, left + k] += total
                    weighted_square[y, left + k] += square / (total if reached else 1.0)
                    count[y, left + k] += reached
            real, real_before = real_before, real
            imag, imag_before = imag_before, imag
            share, share_before = share_before, share


def merge(canvas: Canvas, *others: Canvas) -> Canvas:
    """Sum of canvases over the box of the first, in order.

    Parameters
    ----------
    canvas : Canvas
    *others : Canvas
        Anywhere; their parts outside of `canvas` are ignored.

    Returns
    -------
    Canvas
        A new one, which shares no memory with its inputs.
    """
    merged = crop(canvas, canvas.box)
    for other in others:
        box = canvas.box.overlap(other.box)
        if box.n_pixels == 0:
            continue
        ours, theirs = _window_of(merged, box), _window_of(other, box)
        merged.weighted[ours] += other.weighted[theirs]
        merged.weight[ours] += other.weight[theirs]
        merged.weighted_square[ours] += other.weighted_square[theirs]
        merged.count[ours] += other.count[theirs]
    return merged


def crop(canvas: Canvas, box: Box) -> Canvas:
    """Copy of the part of a canvas inside of `box`.

    Raises
    ------
    PtychodaskError
        If the box is not inside of the canvas.
    """
    if canvas.box.overlap(box) != box:
        raise PtychodaskError(f"crop: {box} reaches outside the canvas, {canvas.box}; pass a box inside of it")
    part = _window_of(canvas, box)
    return Canvas(
        corner=box.corner,
        weighted=canvas.weighted[part].copy(),
        weight=canvas.weight[part].copy(),
        weighted_square=canvas.weighted_square[part].copy(),
        count=canvas.count[part].copy(),
    )


def _window_of(canvas: Canvas, box: Box) -> tuple[slice, slice]:
    (y, x) = canvas.corner
    return slice(box.y0 - y, box.y1 - y), slice(box.x0 - x, box.x1 - x)


class Finished(NamedTuple):
    """Object of a canvas, with weight, uncertainty and count."""

    object: NDArray[np.complex64]
    """Σw·patch / Σw (y, x); NaN where no patch reached."""

    weight: NDArray[np.float32]
    """Σw (y, x)."""

    uncertainty: NDArray[np.float32]
    """Weighted standard deviation of the overlapping patches, sqrt(Σw|patch|²/Σw − |object|²) (y, x).

    NaN where fewer than two overlap."""

    count: NDArray[np.int32]  # type: ignore[assignment]
    """Patches that reached each pixel (y, x)."""


def finish(canvas: Canvas) -> Finished:
    """Arrays of a result from the sums of a canvas."""
    reached = canvas.count > 0
    weight = np.where(reached, canvas.weight, 1.0)
    mean = canvas.weighted / weight
    variance = canvas.weighted_square / weight - (mean.real**2 + mean.imag**2)
    spread = np.where(canvas.count > 1, np.sqrt(np.maximum(variance, 0.0)), np.nan)
    return Finished(
        np.where(reached, mean, NOTHING).astype(np.complex64),
        canvas.weight.astype(np.float32),
        spread.astype(np.float32),
        canvas.count.copy(),
    )


def make_window(name: Window, crop: int, probe: NDArray[np.complexfloating[Any, Any]]) -> NDArray[np.float64]:
    """Weights of the central part of a patch in a canvas.

    Parameters
    ----------
    name : {"illumination", "uniform", "cosine"}
        Intensity of the probe; 1 everywhere; a raised cosine.
    crop : int
        Elements across the central part that is used, M, even.
    probe : complex array (mode, N, N)

    Returns
    -------
    float64 array (M, M)

    Raises
    ------
    PtychodaskError
        If the probe has no intensity inside of the crop.
    """
    if name == "uniform":
        return uniform_window(crop)
    if name == "cosine":
        return cosine_window(crop)
    return illumination_window(probe, crop)


def uniform_window(crop: int) -> NDArray[np.float64]:
    """Weight 1 for all `crop` x `crop` elements."""
    return np.ones((crop, crop))


def cosine_window(crop: int) -> NDArray[np.float64]:
    """Raised cosine (y times x), 1 at [M//2, M//2], 0 at 0.

    Examples
    --------
    >>> cosine_window(4)[2].round(2).tolist()
    [0.0, 0.5, 1.0, 0.5]
    """
    profile = 0.5 + 0.5 * np.cos(2 * np.pi * (np.arange(crop) / crop - 0.5))
    return np.outer(profile, profile)


def illumination_window(probe: NDArray[np.complexfloating[Any, Any]], crop: int) -> NDArray[np.float64]:
    """Relative probe intensity over the central `crop` x `crop` elements.

    See `illumination`.

    Raises
    ------
    PtychodaskError
        If the probe has no intensity inside of the crop.
    """
    window = crop_middle(illumination(probe), crop).astype(np.float64)
    if not window.any():
        raise PtychodaskError(f"window: the probe has no intensity in the central {crop} pixels; pass a larger crop=")
    return window


def crop_middle(patches: NDArray[Any], crop: int) -> NDArray[Any]:
    """View of the central `crop` elements of the last two axes.

    Its element M//2 is element N//2 of the patch.

    Examples
    --------
    >>> crop_middle(np.arange(16).reshape(4, 4), 2).tolist()
    [[5, 6], [9, 10]]
    """
    start = patches.shape[-1] // 2 - crop // 2
    return patches[..., start : start + crop, start : start + crop]
