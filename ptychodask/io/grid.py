"""Frames, positions and optics of a source on the object grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.geometry import FrameGrid, centre_of_mass, mean_counts, pixel_size_m, wavelength_m_of
from ptychodask.io.npy_stream import read_npy
from ptychodask.io.pixel_values import flagged_pixels
from ptychodask.io.plausible import unlikely_optics
from ptychodask.io.quantities import SQUARENESS
from ptychodask.io.source import IngestSpec, SourceScan, as_mask, as_matrix, rotation_matrix
from ptychodask.io.units import metres_in
from ptychodask.scan import Truth, check_pattern_shape, check_positions

logger = logging.getLogger(__name__)

ELECTRONS_FROM_EV = 60e3
"""Energy from which electrons are more likely than photons."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GriddedSource:
    """Geometry of a scan on its grid, known before patterns are read."""

    kept: NDArray[np.int64]
    """Rows of the file that are kept (pattern,)."""

    grid: FrameGrid
    """Conversion of frames to patterns."""

    mask: NDArray[np.bool_] | None
    """True where a pixel of a pattern is good (N, N)."""

    position_yx_px: NDArray[np.float64]
    """Positions of the kept patterns (pattern, 2), (y, x), object pixels."""

    pixel_size_m: float | None
    """Size of an object pixel, metres; None if unknown."""

    truth: Truth | None
    """The known object; None if there is none or it does not fit the grid."""

    spec: IngestSpec
    """The options, completed with the optics in the file."""


def on_grid(file_scan: SourceScan, spec: IngestSpec, label: str) -> GriddedSource:
    """Positions, mask and object of a file on the scan's grid.

    No pattern is read, except with ``centre="auto"``.

    Parameters
    ----------
    file_scan : SourceScan
        Content of the file.
    spec : IngestSpec
        Options.
    label : str
        Name of the file, for messages.

    Returns
    -------
    GriddedSource
        Kept rows, conversion of frames, mask, positions, pixel size and truth.

    Raises
    ------
    PtychodaskError
        If arrays do not fit each other or the spec, or a quantity that is needed is unknown.
    """
    file_scan, kept = _matched(file_scan, spec, label)
    _check_lengths(file_scan, label)
    spec = _with_optics(file_scan, spec)
    kept = _with_position(file_scan, kept, label)
    check_positions(file_scan.position_yx[kept], len(kept), label)
    frame_mask = _frame_mask(file_scan, spec, label)
    grid = _grid(file_scan, spec, frame_mask, label)
    mask = grid.mask(frame_mask)
    if mask is not None and not mask.any():
        raise PtychodaskError(f"{label}: the mask leaves no good pixel; it is True where a pixel is good")
    pixel_m = _object_pixel_m(file_scan, spec, grid, label)
    if spec.particle is None and (spec.energy_ev or 0) >= ELECTRONS_FROM_EV:
        logger.warning(
            "%s: an energy of %.4g keV is taken as that of photons; pass particle='electron' (--particle electron) if "
            "it is of electrons, or 'photon'",
            label,
            (spec.energy_ev or 0) / 1e3,
        )
    unlikely = unlikely_optics(pixel_m, wavelength_of(spec))
    if unlikely:
        logger.warning("%s: %s; check energy, distance and detector pixel", label, unlikely)
    file_scan = _with_affine(file_scan, spec, label)
    position_yx_px = _position_yx_px(file_scan, grid, pixel_m, label)[kept]
    truth = _truth(file_scan, grid, position_yx_px, label)
    _check_label(file_scan, grid, label)
    return GriddedSource(
        kept=kept,
        grid=grid,
        mask=mask,
        position_yx_px=position_yx_px,
        pixel_size_m=pixel_m,
        truth=truth,
        spec=spec,
    )


def _with_optics(file_scan: SourceScan, spec: IngestSpec) -> IngestSpec:
    """Options, completed with the optics in the file."""
    given = spec.given()
    is_wavelength_given = {"energy_ev", "wavelength_m"} & set(given)
    optics: dict[str, Any] = {
        name: value
        for name, value in file_scan.optics.items()
        if name not in given and not (is_wavelength_given and name in ("energy_ev", "wavelength_m"))
    }
    return replace(spec, **optics)


def _with_position(file_scan: SourceScan, kept: NDArray[np.int64], label: str) -> NDArray[np.int64]:
    """Kept frames that have a position."""
    if file_scan.rows is None:
        return kept
    kept = np.intersect1d(kept, file_scan.rows)
    if not len(kept):
        raise PtychodaskError(
            f"{label}: drop_frames leaves none of the {len(file_scan.rows)} frames that have a position"
        )
    return kept


def _with_affine(file_scan: SourceScan, spec: IngestSpec, label: str) -> SourceScan:
    """Content of a file with its positions transformed by the affine matrix."""
    if spec.affine is None and spec.rotation_deg is None:
        return file_scan
    if file_scan.object is not None:
        raise PtychodaskError(
            f"{label}: {'rotation_deg' if spec.affine is None else 'affine'}= changes the positions, so that they no "
            "longer fit the object in the file; leave it out, "
            "or map the file's arrays with keys= without 'object'"
        )
    matrix = rotation_matrix(spec.rotation_deg or 0.0) if spec.affine is None else as_matrix(spec.affine)
    return replace(file_scan, position_yx=file_scan.position_yx @ matrix.T)


def _matched(file_scan: SourceScan, spec: IngestSpec, label: str) -> tuple[SourceScan, NDArray[np.int64]]:
    """Content with a position for every frame, and the kept rows.

    If there are more frames than positions, or fewer, rows are dropped from the longer of the two: the kept rows either
    have both, or are as many as the shorter one has and belong to it in order.
    """
    position_yx, n_frames = file_scan.position_yx, int(file_scan.frames.shape[0])
    n_positions = len(position_yx)
    if n_frames == n_positions or spec.drop_frames is None:
        return file_scan, kept_frames(n_frames, spec.drop_frames, label)
    kept = kept_frames(max(n_frames, n_positions), spec.drop_frames, label)
    matched = np.full((n_frames, 2), np.nan)
    if kept[-1] < min(n_frames, n_positions):
        matched[kept] = position_yx[kept]
    elif len(kept) == n_positions < n_frames:
        matched[kept] = position_yx
    elif len(kept) == n_frames < n_positions:
        matched, kept = position_yx[kept], np.arange(n_frames)
    else:
        return file_scan, kept
    return replace(file_scan, position_yx=matched), kept


def _check_lengths(file_scan: SourceScan, label: str) -> None:
    shape = file_scan.frames.shape
    if file_scan.frames.dtype.kind not in "buif":
        raise PtychodaskError(f"{label}: patterns have type {file_scan.frames.dtype}, expected counts or amplitudes")
    n_positions = len(file_scan.position_yx)
    if n_positions != shape[0]:
        raise PtychodaskError(
            f"{label}: {shape[0]} patterns but {n_positions} positions (patterns of shape {shape}); "
            f"every pattern needs one: drop the rows of the longer that have no counterpart, --drop-frames "
            f"{min(n_positions, shape[0])}:{max(n_positions, shape[0])} if they are the last, or pass the order of "
            "the patterns' axes with axes= (--axes)"
        )
    for name in ("flux", "scan_index"):
        values = getattr(file_scan, name)
        if values is not None and len(values) != shape[0]:
            raise PtychodaskError(f"{label}: {shape[0]} patterns but {len(values)} values of {name}; correct the file")


def kept_frames(n_frames: int, drop: str | Sequence[int | slice] | None, label: str) -> NDArray[np.int64]:
    """Rows of a file that are kept when some are dropped.

    Parameters
    ----------
    n_frames : int
        Number of frames in the file.
    drop : str or sequence of int and slice, optional
        Rows to drop; "3,10:20" means row 3 and rows 10 to 19.
    label : str
        Name of the file, for messages.

    Returns
    -------
    int64 array
        Kept rows, ascending.

    Raises
    ------
    PtychodaskError
        If a part is not a row or range of the file, or no row is kept.

    Examples
    --------
    >>> kept_frames(8, "0,2:4,7:", "scan.npz").tolist()
    [1, 4, 5, 6]
    """
    keep = np.ones(n_frames, bool)
    parts = [part.strip() for part in drop.split(",")] if isinstance(drop, str) else list(drop or ())
    for part in parts:
        keep[_rows(part, n_frames, label)] = False
    if not keep.any():
        raise PtychodaskError(f"{label}: drop_frames leaves none of {n_frames} frames")
    return np.flatnonzero(keep)


def _rows(part: str | int | slice, n_frames: int, label: str) -> slice:
    try:
        if isinstance(part, str) and ":" in part:
            low, high = part.split(":")
            rows = slice(int(low) if low.strip() else 0, int(high) if high.strip() else n_frames)
        else:
            rows = part if isinstance(part, slice) else slice(int(part), int(part) + 1)
        start = 0 if rows.start is None else int(rows.start)
        stop = n_frames if rows.stop is None else int(rows.stop)
    except (TypeError, ValueError) as error:
        raise PtychodaskError(
            f"{label}: drop_frames has the part {part!r}, expected a row or a range '10:20'"
        ) from error
    if not 0 <= start < stop <= n_frames:
        raise PtychodaskError(f"{label}: drop_frames has the part {part!r}, expected rows in 0..{n_frames - 1}")
    return slice(start, stop, rows.step)


def _frame_mask(file_scan: SourceScan, spec: IngestSpec, label: str) -> NDArray[np.bool_] | None:
    if spec.mask is not None and file_scan.mask is not None:
        raise PtychodaskError(f"{label}: there is a mask in the file and in mask=; leave mask= out, or map no mask")
    mask = file_scan.mask if spec.mask is None else as_mask(read_npy(spec.mask), str(spec.mask))
    if mask is not None and mask.shape != file_scan.frames.shape[1:]:
        raise PtychodaskError(
            f"{label}: the mask has shape {mask.shape}, expected {file_scan.frames.shape[1:]} like the frames"
        )
    if spec.saturated == "mask":
        flagged = flagged_pixels(file_scan.frames.blocks(), negative=spec.floor is None, label=label)
        logger.info("%s: marked %d pixels as bad, whose values are no counts", label, flagged.sum())
        return ~flagged if mask is None else mask & ~flagged
    return mask


def _grid(file_scan: SourceScan, spec: IngestSpec, mask: NDArray[np.bool_] | None, label: str) -> FrameGrid:
    height, width = (int(n) for n in file_scan.frames.shape[1:])
    if spec.n_pixels is None and height != width:
        check_pattern_shape(file_scan.frames.shape, label)
    n_pixels = height // spec.bin if spec.n_pixels is None else int(spec.n_pixels)
    check_pattern_shape((file_scan.frames.shape[0], n_pixels, n_pixels), label)
    if spec.centre == "dc":
        centre = (height // 2, width // 2)
    elif spec.centre == "auto":
        centre = _measured_centre(file_scan, mask, label)
        logger.info("%s: the beam centre is at (y, x) = %s of %s", label, centre, (height, width))
    else:
        centre = (round(float(spec.centre[0])), round(float(spec.centre[1])))
    if not (0 <= centre[0] < height and 0 <= centre[1] < width):
        raise PtychodaskError(f"{label}: centre is {centre}, expected a pixel of the {height} x {width} frame")
    return FrameGrid(
        frame_shape=(height, width), n_pixels=n_pixels, bin=int(spec.bin), dc=file_scan.dc, centre_yx=centre
    )


def _measured_centre(file_scan: SourceScan, mask: NDArray[np.bool_] | None, label: str) -> tuple[int, int]:
    mean = mean_counts(file_scan.frames.blocks(), file_scan.domain)
    if mask is not None:
        mean = mean * mask
    return centre_of_mass(np.fft.fftshift(mean) if file_scan.dc == "corner" else mean, label)


def _object_pixel_m(file_scan: SourceScan, spec: IngestSpec, grid: FrameGrid, label: str) -> float | None:
    """Size of an object pixel, metres; None if unknown.

    The one that the user passes, else the one in the file, else λz/(extent of the detector).
    """
    wavelength_m = wavelength_of(spec)
    computed = None
    if wavelength_m and spec.distance_m and spec.detector_pixel_m:
        computed = pixel_size_m(wavelength_m, spec.distance_m, spec.detector_pixel_m, grid.extent)
    if spec.pixel_size_m and computed and not np.isclose(spec.pixel_size_m, computed, rtol=0.01):
        raise PtychodaskError(
            f"{label}: pixel_size_m is {spec.pixel_size_m:.4g}, but {computed:.4g} by wavelength, distance and "
            "detector pixel; leave pixel_size_m out, or correct the optics"
        )
    of_file = file_scan.pixel_size_m / grid.position_scale_yx[0] if file_scan.pixel_size_m else None
    return spec.pixel_size_m or of_file or computed


def wavelength_of(spec: IngestSpec) -> float | None:
    """Wavelength by the options, metres; None without energy and wavelength."""
    return wavelength_m_of(spec.energy_ev, spec.particle) if spec.energy_ev else spec.wavelength_m


def _position_yx_px(
    file_scan: SourceScan, grid: FrameGrid, object_pixel_m: float | None, label: str
) -> NDArray[np.float64]:
    if file_scan.unit == "px":
        return file_scan.position_yx * np.array(grid.position_scale_yx)
    if object_pixel_m is None:
        raise PtychodaskError(
            f"{label}: positions are in {file_scan.unit}, but the size of an object pixel is unknown; "
            "pass pixel_size_m=, or energy_ev=, distance_m= and detector_pixel_m="
        )
    aspect = file_scan.pixel_aspect
    if not np.isclose(aspect, 1, rtol=SQUARENESS):
        logger.warning(
            "%s: detector pixels are not square (height %.4g of the width); y positions are scaled to object pixels of "
            "that height, and pixel_size_m is the width of an object pixel",
            label,
            aspect,
        )
    return file_scan.position_yx * np.array([aspect, 1.0]) * (metres_in(file_scan.unit) / object_pixel_m)


def _truth(file_scan: SourceScan, grid: FrameGrid, position_yx_px: NDArray[np.float64], label: str) -> Truth | None:
    if file_scan.object is None:
        return None
    half = grid.n_pixels / 2
    inside = (position_yx_px >= half).all() and (position_yx_px <= np.array(file_scan.object.shape) - half).all()
    for left_out, reason in (
        (grid.changes_the_object_grid, "crop, padding or binning changes the object's grid"),
        (not inside, "it does not cover the scan"),
        (not np.isfinite(file_scan.object).all(), "it has values that are not finite"),
        (bool((file_scan.object == file_scan.object.flat[0]).all()), "it is constant, a placeholder"),
    ):
        if left_out:
            logger.info("%s: did not use its object as truth: %s", label, reason)
            return None
    return Truth(file_scan.object)


def _check_label(file_scan: SourceScan, grid: FrameGrid, label: str) -> None:
    if file_scan.label is None:
        return
    if file_scan.label.shape != file_scan.frames.shape:
        raise PtychodaskError(
            f"{label}: labels have shape {file_scan.label.shape}, expected {file_scan.frames.shape} like the patterns"
        )
    if grid.changes_the_object_grid:
        raise PtychodaskError(
            f"{label}: its labels do not fit patterns of another size; leave n_pixels= and bin= out, "
            "or map the file's arrays with keys= without 'label'"
        )
