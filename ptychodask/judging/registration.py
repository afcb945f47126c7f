"""Registration of two reconstructions with sub-pixel shifts.

Two steps: a masked cross-correlation of edge strengths to whole pixels, then the peak of the upsampled
cross-correlation of the complex objects, repeated until the shift no longer changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter1d, shift
from skimage.registration import phase_cross_correlation

from ptychodask.errors import PtychodaskError
from ptychodask.judging.metrics import align_gauge

UPSAMPLING = 100
"""Subdivisions of a pixel: shifts have a resolution of 1/100 pixel."""


MOST_STEPS = 5
"""Maximum iterations, each of which shifts the object by the previous estimate."""


LARGEST_LAST_STEP_PX = 0.5
"""Largest change of the shift at the last step for which it counts as converged."""


LEAST_AGREEMENT = 0.2
"""Minimum correlation of matching complex objects, with gauge and means removed."""


LEAST_OVERLAP = 0.3
"""Minimum overlap, as a fraction of the seen pixels of the smaller object."""


SMOOTHING_PX = 2.0
"""Standard deviation of the Gaussian smoothing before edge detection."""


ROUNDING_PX = 1e-4
"""Corners are rounded to this, since metres divided by a pixel size are not exact integers."""


Complex = NDArray[np.complexfloating[Any, Any]]


def find_corner(
    moving: Complex, reference: Complex, *, start_yx_px: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Location of an object's first pixel on the grid of another object.

    Parameters
    ----------
    moving, reference : complex array (y, x)
        Any shapes; NaN where unseen. Same pixel size and orientation.
    start_yx_px : (float, float), optional
        Estimate of the result, correct to a few pixels; by default all shifts are searched.

    Returns
    -------
    (float, float)
        Row and column in `reference` of pixel [0, 0] of `moving`, to 1/`UPSAMPLING` pixel without noise.

    Raises
    ------
    PtychodaskError
        If the two do not match at any shift.

    Notes
    -----
    The search compares the strength of smoothed edges, which does not depend on the gauge, by masked normalised
    cross-correlation (D. Padfield, IEEE Trans. Image Process. 21 (2012) 2706). The sub-pixel shift is the peak of
    the upsampled cross-correlation of the complex objects with the gauge removed (M. Guizar-Sicairos et al., Opt. Lett.
    33 (2008) 156), repeated with the shifted object until it converges. The full search needs about 500 bytes of memory
    per pixel of the larger object, and an overlap of `LEAST_OVERLAP` of the smaller one.

    Examples
    --------
    >>> from ptychodask.simulate import crossing_lines
    >>> reference = crossing_lines((64, 64), np.random.default_rng(0))
    >>> find_corner(reference[10:50, 20:60] * 1j, reference)
    (10.0, 20.0)
    """
    if not (np.isfinite(moving).any() and np.isfinite(reference).any()):
        raise PtychodaskError("registration: one of the objects has no seen pixel, so they cannot be registered")
    corner = np.asarray(_search(moving, reference) if start_yx_px is None else start_yx_px, np.float64)
    for _ in range(MOST_STEPS):
        shifted, whole_corner = on_whole_pixels(moving, (float(corner[0]), float(corner[1])))
        step, agreement = _offset(*_overlapping(shifted, reference, whole_corner))
        corner = corner + step
        if np.abs(step).max() <= 1 / UPSAMPLING:
            break
    remedy = "check that they are of one sample, pixel size and orientation"
    if not agreement >= LEAST_AGREEMENT:
        raise PtychodaskError(
            f"registration: at the best shift the correlation of the two objects is {agreement:.2f}, expected "
            f"{LEAST_AGREEMENT} or more; {remedy}"
        )
    if np.abs(step).max() > LARGEST_LAST_STEP_PX:
        raise PtychodaskError(
            f"registration: the shift still changes by {np.abs(step).max():.1f} px after {MOST_STEPS} steps, "
            f"expected {LARGEST_LAST_STEP_PX} or less; {remedy}"
        )
    return float(corner[0]), float(corner[1])


def _search(moving: Complex, reference: Complex) -> NDArray[np.float64]:
    """`find_corner` to whole pixels, without a start."""
    # Padded to one shape, because the origin of shifts between different shapes is not documented.
    shape = np.maximum(reference.shape, moving.shape)
    (one, seen_one), (other, seen_other) = (_edges(object_, shape) for object_ in (reference, moving))
    corner, *_ = phase_cross_correlation(
        one, other, reference_mask=seen_one, moving_mask=seen_other, overlap_ratio=LEAST_OVERLAP
    )
    return np.asarray(corner, np.float64)


def _edges(object_: Complex, shape: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Smoothed edge strength and mask of seen pixels, padded to a shape."""
    flat, _ = align_gauge(object_, np.ones_like(object_))
    wide = np.pad(flat, [(0, int(more)) for more in shape - object_.shape], constant_values=np.nan)
    seen = np.isfinite(wide)
    filled = np.where(seen, wide, flat[np.isfinite(flat)].mean())
    slopes = [
        gaussian_filter1d(gaussian_filter1d(filled, SMOOTHING_PX, axis=axis, order=1), SMOOTHING_PX, axis=1 - axis)
        for axis in (0, 1)
    ]
    inner = binary_erosion(seen, iterations=int(2 * SMOOTHING_PX))
    seen = inner if inner.any() else seen
    return np.where(seen, np.hypot(*np.abs(slopes)), 0.0), seen


def _overlapping(moving: Complex, reference: Complex, corner: tuple[int, int]) -> tuple[Complex, Complex]:
    """Both objects on the smallest rectangle containing all pixels seen in both."""
    start = np.maximum(corner, 0)
    stop = np.minimum(np.add(corner, moving.shape), reference.shape)
    if (stop <= start).any():
        raise PtychodaskError(
            "registration: with this start_yx_px the objects do not overlap; omit it to search all shifts"
        )
    one = moving[tuple(slice(a - c, b - c) for a, b, c in zip(start, stop, corner, strict=True))]
    other = reference[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    box = seen_box(np.isfinite(one) & np.isfinite(other))
    return one[box], other[box]


def _offset(moving: Complex, reference: Complex) -> tuple[NDArray[np.float64], float]:
    """Shift (y, x) of an object towards another, and their correlation.

    Both have one shape. The correlation is that before the shift.
    """
    aligned, _ = align_gauge(moving, reference)
    seen = np.isfinite(aligned) & np.isfinite(reference)
    taper = np.outer(*(np.hanning(size + 2)[1:-1] for size in seen.shape))
    one, other = (np.where(seen, object_ - object_[seen].mean(), 0) * taper for object_ in (reference, aligned))
    offset, *_ = phase_cross_correlation(one, other, upsample_factor=UPSAMPLING, normalization=None)
    agreement = np.abs(np.vdot(one, other)) / max(np.linalg.norm(one) * np.linalg.norm(other), np.finfo(float).tiny)
    return np.asarray(offset, np.float64), float(agreement)


def seen_box(seen: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Bounding box of the True pixels of a mask (y, x).

    Raises
    ------
    PtychodaskError
        If there are none.

    Examples
    --------
    >>> seen_box(np.array([[False, False, False], [False, True, True]]))
    (slice(1, 2, None), slice(1, 3, None))
    """
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if not len(rows):
        raise PtychodaskError("registration: no pixel is seen in both objects")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def on_whole_pixels(object_: Complex, corner_yx_px: tuple[float, float]) -> tuple[Complex, tuple[int, int]]:
    """Object with a fractional corner, interpolated onto whole pixels.

    Parameters
    ----------
    object_ : complex array (y, x)
        NaN where unseen.
    corner_yx_px : (float, float)
        Coordinates of its pixel [0, 0].

    Returns
    -------
    object_ : complex array (y, x)
        By cubic splines. A pixel is seen if both old pixels next to it are seen, so a shift along an axis removes one
        row or column.
    corner_yx_px : (int, int)
        Coordinates of its pixel [0, 0].

    Examples
    --------
    >>> moved, corner = on_whole_pixels(np.arange(12.0).reshape(3, 4) + 0j, (0.0, -0.5))
    >>> moved.shape, corner, round(float(moved[1, 1].real), 3)
    ((3, 3), (0, 0), 5.5)
    """
    corner = np.round(np.asarray(corner_yx_px, np.float64) / ROUNDING_PX) * ROUNDING_PX
    whole = np.ceil(corner - ROUNDING_PX / 2)
    fraction = np.where(np.abs(corner - whole) < ROUNDING_PX / 2, 0.0, corner - whole)
    whole_corner = int(whole[0]), int(whole[1])
    if not fraction.any():
        return object_, whole_corner
    seen = np.isfinite(object_)
    if not seen.any():
        raise PtychodaskError("registration: the object has no seen pixel, so it cannot be shifted")
    nearest = distance_transform_edt(~seen, return_distances=False, return_indices=True)
    filled = object_[tuple(nearest)]
    moved = shift(filled.real, fraction, order=3, mode="nearest") + 1j * shift(
        filled.imag, fraction, order=3, mode="nearest"
    )
    if fraction[0]:
        moved, seen = moved[:-1], seen[:-1] & seen[1:]
    if fraction[1]:
        moved, seen = moved[:, :-1], seen[:, :-1] & seen[:, 1:]
    return np.where(seen, moved, complex(np.nan, np.nan)).astype(object_.dtype), whole_corner
