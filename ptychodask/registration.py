"""Where one reconstruction lies on another: sub-pixel shifts, and objects moved onto whole pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter1d, shift
from skimage.registration import phase_cross_correlation

from ptychodask.metrics import align_gauge
from ptychodask.scan import PtychodaskError

UPSAMPLING = 100
"""Parts of a pixel to which a shift is found."""

MOST_STEPS = 5
"""Times that a shift is found again with the object moved by what was found before."""

LARGEST_LAST_STEP_PX = 0.5
"""A shift that changes by more at the last step has not been found."""

LEAST_AGREEMENT = 0.2
"""Correlation of the complex objects, gauge and means removed, below which they do not match."""

LEAST_OVERLAP = 0.3
"""Share of the smaller object's seen pixels that must lie on the other's."""

SMOOTHING_PX = 2.0
"""Standard deviation of the Gaussian that objects are smoothed by before edges are looked for."""

ROUNDING_PX = 1e-4
"""Corners are taken to this part of a pixel, so that metres divided by a pixel size meet whole pixels."""

Complex = NDArray[np.complexfloating[Any, Any]]


def find_corner(
    moving: Complex, reference: Complex, *, start_yx_px: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Where an object's first pixel lies on the pixels of another.

    Parameters
    ----------
    moving, reference : complex array (y, x)
        Of any shapes; NaN where unseen. Of the same pixel size, and neither turned nor mirrored.
    start_yx_px : (float, float), optional
        Where the first pixel is thought to lie, to a few pixels; without it the whole of both is searched.

    Returns
    -------
    (float, float)
        Row and column of the reference that pixel [0, 0] of the other lies on, to 1/`UPSAMPLING` pixel where there is
        no noise.

    Raises
    ------
    PtychodaskError
        If no place is found where the two match.

    Notes
    -----
    The search compares the strength of smoothed edges, which the gauge leaves alone, by masked normalised
    cross-correlation (D. Padfield, IEEE Trans. Image Process. 21 (2012) 2706). The fraction is the peak of
    the cross-correlation of the complex objects, gauge removed, sampled finely (M. Guizar-Sicairos et al., Opt. Lett.
    33 (2008) 156), found again with the object moved there until it stays. The search of the whole takes about 500
    bytes of memory for each pixel of the larger object, and finds objects that share `LEAST_OVERLAP` of the smaller.

    Examples
    --------
    >>> from ptychodask.simulate import crossing_lines
    >>> reference = crossing_lines((64, 64), np.random.default_rng(0))
    >>> find_corner(reference[10:50, 20:60] * 1j, reference)
    (10.0, 20.0)
    """
    if not (np.isfinite(moving).any() and np.isfinite(reference).any()):
        raise PtychodaskError("registration: no pixel of one of the objects is seen, so it cannot be placed")
    corner = np.asarray(_search(moving, reference) if start_yx_px is None else start_yx_px, np.float64)
    for _ in range(MOST_STEPS):
        placed, whole = on_whole_pixels(moving, (float(corner[0]), float(corner[1])))
        step, agreement = _offset(*_shared(placed, reference, whole))
        corner = corner + step
        if np.abs(step).max() <= 1 / UPSAMPLING:
            break
    same = "check that they are of one sample, pixel size and orientation"
    if not agreement >= LEAST_AGREEMENT:
        raise PtychodaskError(
            f"registration: at its best place the object correlates with the other by {agreement:.2f}, expected "
            f"{LEAST_AGREEMENT} or more; {same}"
        )
    if np.abs(step).max() > LARGEST_LAST_STEP_PX:
        raise PtychodaskError(
            f"registration: the object's place still changes by {np.abs(step).max():.1f} px after {MOST_STEPS} steps, "
            f"expected {LARGEST_LAST_STEP_PX} or less; {same}"
        )
    return float(corner[0]), float(corner[1])


def _search(moving: Complex, reference: Complex) -> NDArray[np.float64]:
    """`find_corner` to whole pixels, from nothing."""
    # Arrays of one shape, for the origin of shifts between different shapes is not documented.
    shape = np.maximum(reference.shape, moving.shape)
    (one, seen_one), (other, seen_other) = (_edges(object_, shape) for object_ in (reference, moving))
    found, *_ = phase_cross_correlation(
        one, other, reference_mask=seen_one, moving_mask=seen_other, overlap_ratio=LEAST_OVERLAP
    )
    return np.asarray(found, np.float64)


def _edges(object_: Complex, shape: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """How strongly an object changes at each pixel, smoothed against noise, and where it is seen; padded to a shape."""
    flat, _ = align_gauge(object_, np.ones_like(object_))
    wide = np.pad(flat, [(0, int(more)) for more in shape - object_.shape], constant_values=np.nan)
    seen = np.isfinite(wide)
    filled = np.where(seen, wide, flat[np.isfinite(flat)].mean())
    slopes = [
        gaussian_filter1d(gaussian_filter1d(filled, SMOOTHING_PX, axis=axis, order=1), SMOOTHING_PX, axis=1 - axis)
        for axis in (0, 1)
    ]
    far = binary_erosion(seen, iterations=int(2 * SMOOTHING_PX))
    seen = far if far.any() else seen
    return np.where(seen, np.hypot(*np.abs(slopes)), 0.0), seen


def _shared(moving: Complex, reference: Complex, corner: tuple[int, int]) -> tuple[Complex, Complex]:
    """The smallest rectangle of both that holds all pixels which are seen in both."""
    start = np.maximum(corner, 0)
    stop = np.minimum(np.add(corner, moving.shape), reference.shape)
    if (stop <= start).any():
        raise PtychodaskError("registration: the objects share no pixel; leave out where one is thought to lie")
    one = moving[tuple(slice(a - c, b - c) for a, b, c in zip(start, stop, corner, strict=True))]
    other = reference[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    box = seen_box(np.isfinite(one) & np.isfinite(other))
    return one[box], other[box]


def _offset(moving: Complex, reference: Complex) -> tuple[NDArray[np.float64], float]:
    """How far an object has to move to meet another of its shape, (y, x), and how well both correlate before."""
    aligned, _ = align_gauge(moving, reference)
    seen = np.isfinite(aligned) & np.isfinite(reference)
    taper = np.outer(*(np.hanning(size + 2)[1:-1] for size in seen.shape))
    one, other = (np.where(seen, object_ - object_[seen].mean(), 0) * taper for object_ in (reference, aligned))
    found, *_ = phase_cross_correlation(one, other, upsample_factor=UPSAMPLING, normalization=None)
    agreement = np.abs(np.vdot(one, other)) / max(np.linalg.norm(one) * np.linalg.norm(other), np.finfo(float).tiny)
    return np.asarray(found, np.float64), float(agreement)


def seen_box(seen: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of the smallest rectangle that holds all True pixels of a mask (y, x).

    Raises
    ------
    PtychodaskError
        If there is none.

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
    """An object whose corner lies between pixels, moved onto whole pixels.

    Parameters
    ----------
    object_ : complex array (y, x)
        NaN where unseen.
    corner_yx_px : (float, float)
        Coordinates of its pixel [0, 0].

    Returns
    -------
    object_ : complex array (y, x)
        By cubic splines. A pixel is seen where both old ones that it lies between are, so that a row or column is
        lost along an axis on which it moved.
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
    before = np.where(np.abs(corner - whole) < ROUNDING_PX / 2, 0.0, corner - whole)
    at = int(whole[0]), int(whole[1])
    if not before.any():
        return object_, at
    seen = np.isfinite(object_)
    if not seen.any():
        raise PtychodaskError("registration: no pixel of an object is seen, so it cannot be moved")
    nearest = distance_transform_edt(~seen, return_distances=False, return_indices=True)
    filled = object_[tuple(nearest)]
    moved = shift(filled.real, before, order=3, mode="nearest") + 1j * shift(
        filled.imag, before, order=3, mode="nearest"
    )
    if before[0]:
        moved, seen = moved[:-1], seen[:-1] & seen[1:]
    if before[1]:
        moved, seen = moved[:, :-1], seen[:, :-1] & seen[:, 1:]
    return np.where(seen, moved, complex(np.nan, np.nan)).astype(object_.dtype), at
