"""Values that detectors write where they measured nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError

WIDE_SENTINELS = (2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
"""Largest values of integer types, which wider types and floats keep when frames are converted."""

MOST_BAD = 0.5
"""Largest share of pixels that may be marked as bad for their values."""


def no_counts(frames: NDArray[Any], *, negative: bool = False) -> NDArray[np.bool_]:
    """True where a value is no count: the largest of an integer type.

    Parameters
    ----------
    frames : array (k, h, w)
    negative : bool
        Negative integers, which detectors write as flags, are none either.

    Returns
    -------
    bool array (k, h, w)

    Examples
    --------
    >>> no_counts(np.array([[[3, 65535]]], np.uint16)).tolist()
    [[[False, True]]]
    """
    if frames.dtype.kind not in "iuf":
        return np.zeros(frames.shape, bool)
    if frames.dtype.kind == "f":
        # Rounded as a conversion rounds them; half precision holds none of them.
        wide = [frames.dtype.type(value) for value in WIDE_SENTINELS] if frames.dtype.itemsize > 2 else []
        return np.isin(frames, wide)
    top = np.iinfo(frames.dtype).max
    hit = np.isin(frames, [value for value in WIDE_SENTINELS if value < top]) | (frames == top)
    return hit | (frames < 0) if negative and frames.dtype.kind == "i" else hit


def flagged_pixels(blocks: Iterable[NDArray[Any]], *, negative: bool, label: str) -> NDArray[np.bool_]:
    """Pixels (h, w) that hold no count in any frame.

    Parameters
    ----------
    blocks : iterable of array (k, h, w)
        All frames.
    negative : bool
        See `no_counts`.
    label : str
        Name of the file, for messages.

    Raises
    ------
    PtychodaskError
        If these are more than `MOST_BAD` of the pixels.
    """
    flagged: NDArray[np.bool_] | None = None
    for block in blocks:
        here: NDArray[np.bool_] = np.any(no_counts(block, negative=negative), axis=0)
        flagged = here if flagged is None else np.logical_or(flagged, here)
    if flagged is None:
        raise PtychodaskError(f"{label}: has no frames; name a file with patterns")
    if flagged.mean() > MOST_BAD:
        raise PtychodaskError(
            f"{label}: {100 * flagged.mean():.0f} % of the pixels hold the largest value of their type or a negative "
            "one in some frame, so saturated='mask' would leave too few; leave frames out with drop_frames=, or pass "
            "floor=0 if negative values are noise"
        )
    return flagged


def clipped(frames: NDArray[Any], floor: float | None) -> NDArray[Any]:
    """Frames with values below the floor set to 0.

    Examples
    --------
    >>> clipped(np.array([-0.4, 0.3, 2.0]), 0.5).tolist()
    [0.0, 0.0, 2.0]
    """
    return frames if floor is None else np.where(frames < floor, np.zeros((), frames.dtype), frames)


def refuse_no_counts(touched: NDArray[np.bool_], frames: NDArray[Any], label: str) -> None:
    """Raise `PtychodaskError` if good pixels hold no counts.

    Parameters
    ----------
    touched : bool array (k, N, N)
        Good pixels of patterns with such a value.
    frames : array (k, h, w)
        Frames of the file.
    label : str
        Name of the file, for messages.
    """
    if not touched.any():
        return
    n_pixels, value = int(touched.any(axis=0).sum()), frames[no_counts(frames)].max()
    raise PtychodaskError(
        f"{label}: {n_pixels} pixels hold {value:.0f}, the largest value of an integer type, which detectors write in "
        "gaps and on overflow; mark them as bad with saturated='mask' (--saturated mask) or mask=, or pass "
        "saturated='keep' if they are counts"
    )
