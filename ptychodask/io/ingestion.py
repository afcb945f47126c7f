"""`ingest`: a foreign file becomes a store, block by block."""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.growing import append_segment
from ptychodask.io.formats import Source, detect_format, open_container, read_source
from ptychodask.io.geometry import (
    HC_EV_M,
    FrameGrid,
    as_stored,
    centre_of_mass,
    mean_counts,
    pixel_size_m,
    rim_phase,
    stored_dtype,
)
from ptychodask.io.near_field import check_far_field
from ptychodask.io.npy_stream import NpzFile, read_npy, reading
from ptychodask.io.probe import disc_probe, estimate_probe, zone_plate_probe
from ptychodask.io.raw import RawFrames, block_ranges, scratch_file, spill
from ptychodask.io.recipe import with_recipe
from ptychodask.io.source import (
    BLOCK_BYTES,
    PROBE_MODELS,
    Frames,
    IngestSpec,
    SourceScan,
    as_mask,
    as_matrix,
    as_probe,
    listed_keys,
)
from ptychodask.places import Location, S3Location, check_vacant, parse_location
from ptychodask.scan import (
    Calibration,
    Domain,
    PatternSource,
    PtychodaskError,
    Scan,
    Truth,
    check_pattern_shape,
    check_positions,
    with_fields,
)
from ptychodask.store import SCAN, open_scan, write_scan

logger = logging.getLogger(__name__)

OF_EACH_SEGMENT = ("diffraction", "drop_frames", "scratch")
"""Options that each segment of a growing scan has for itself."""

OF_FIRST_SEGMENT = (
    "probe",
    "probe_diameter_px",
    "probe_stop_px",
    "probe_defocus",
    "probe_defocus_m",
    "calibration",
    "incident_counts",
    "mask",
)
"""Options about what the first segment of a growing scan gives to all."""

LOST_LIGHT_NOTED = 0.01
"""Share of a probe's light outside its new grid from which on the loss is a warning."""


def ingest(
    source: str | Path,
    store: str | Path | S3Location,
    *,
    format: str | None = None,
    recipe: str | Path | None = None,
    append: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **reader_options: Any,
) -> Scan:
    """Make a store from a file of another program, or add it to a scan that grows.

    Parameters
    ----------
    source : path
        An NPZ (also .npz.bz2) or HDF5 file.
    store : path
        The store to make; it appears when it is whole. With `append`, one that is there may have a segment added.
    format : {"ptychopinn", "tike", "ptychodus", "nexus", "cxi", "hxn", "mapping"}, optional
        By default what the file's keys say; "mapping" when `keys` is given.
    recipe : path, optional
        A YAML file of options, as `inspect` writes it; what is passed here goes before it.
    append : bool
        The file is one segment of a scan that grows (its first, where there is no store yet), until `finish_scan`.
    overwrite : bool
        Replace an existing store.
    progress : bool, optional
        True shows a bar, False does not; None shows it in a terminal and in Jupyter.
    **reader_options
        Fields of `IngestSpec`; other names are refused.

    Returns
    -------
    Scan
        The new store, opened.

    Raises
    ------
    PtychodaskError
        If the file, an option or the disk is not as it must be; then no store is written and an earlier one stays.

    Notes
    -----
    A scan that grows keeps what its first segment had: probe, mask, normalisation, calibration, unit of the patterns,
    pixel size. Options need not be passed again; `drop_frames` and `scratch` alone may differ from the first time.
    Readers see whole segments (see `append_segment`).

    Memory holds a few blocks of frames, however large the file. A file that cannot be read at random (compressed, or
    with patterns along its last axis) is first unpacked into a scratch file, cropped already where it is compressed.
    """
    source, store = Path(source), parse_location(store)
    spec = with_fields(IngestSpec(), with_recipe(recipe, reader_options))
    if append and overwrite:
        raise PtychodaskError(f"{store}: append=True adds to the scan, overwrite=True replaces it; pass one of them")
    if append and isinstance(store, S3Location):
        raise PtychodaskError(
            f"{store}: a scan grows on a disk alone; append to a store there, and copy it when it is whole"
        )
    if append and isinstance(store, Path) and store.exists():
        return _append(source, store, format, spec, progress)
    check_vacant(store, overwrite=overwrite, kind=SCAN)
    with _opened(source, store, format, spec) as (read, scratch, stack):
        gridded = on_grid(read.scan, spec, read.container.label)
        scan_parts = _prepare(read, gridded, scratch, stack, progress)
        provenance = _provenance(source, read, spec)
        if append:
            provenance["centre_yx"] = list(gridded.grid.centre_yx)
        return write_scan(
            store, provenance=provenance, growing=append, overwrite=overwrite, progress=progress, **scan_parts
        )


@contextmanager
def _opened(
    source: Path, store: Location, format: str | None, spec: IngestSpec
) -> Iterator[tuple[Source, Path, ExitStack]]:
    """A file for as long as it is read: what its reader found, and the folder for scratch."""
    with ExitStack() as stack:
        scratch = _scratch(spec, store, stack)
        container = open_container(source, scratch, stack)
        name = detect_format(container, spec) if format is None else format
        yield read_source(source, container, name, spec, scratch, stack), scratch, stack


def _append(source: Path, store: Path, format: str | None, spec: IngestSpec, progress: bool | None) -> Scan:
    """Add a file to a scan that grows, as one more segment."""
    scan = open_scan(store)
    recorded = scan.attributes.get("provenance", {})
    if scan.attributes["state"] != "growing" or not {"options", "reader"} <= recorded.keys():
        raise PtychodaskError(
            f"{store}: the scan is complete, and append=True (--append) adds to one that it began itself; name another "
            "store"
        )
    spec = _as_first(spec, recorded, str(store))
    with _opened(source, store, format or recorded["reader"], spec) as (read, scratch, stack):
        label = read.container.label
        provenance = _provenance(source, read, spec)
        found = _with_mask_of(scan, read.scan, spec, label)
        gridded = on_grid(found, spec, label)
        _check_kept(scan, recorded, found, gridded, read.format, label)
        gridded = replace(gridded, mask=scan.mask)
        return append_segment(
            store,
            **_pattern_parts(found, gridded, label, scratch, stack, progress),
            provenance=provenance,
            progress=progress,
        )


def _as_first(spec: IngestSpec, recorded: dict[str, Any], label: str) -> IngestSpec:
    """The options of a scan's first segment, with those that each segment has for itself."""
    first, given = recorded["options"], {key: _plain(value) for key, value in spec.given().items()}
    for name, value in given.items():
        if name not in OF_EACH_SEGMENT and value != first.get(name):
            raise PtychodaskError(
                f"{label}: {name} was {first.get(name, 'not given')!r} for the first segment and is {value!r} now; a "
                "scan keeps the options of its first segment: leave it out, or ingest into a store of its own"
            )
    kept = {name: value for name, value in first.items() if name not in (*OF_EACH_SEGMENT, *OF_FIRST_SEGMENT)}
    own = {name: getattr(spec, name) for name in OF_EACH_SEGMENT}
    # What was found once is not looked for again: another centre would shift the patterns.
    centre = {"centre": tuple(recorded["centre_yx"])} if "centre_yx" in recorded and "centre" in kept else {}
    return with_fields(IngestSpec(), {**kept, **centre, **own})


def _with_mask_of(scan: Scan, found: SourceScan, spec: IngestSpec, label: str) -> SourceScan:
    """What a reader found, its mask set aside once it is sure to be that of the first segment."""
    if found.mask is None:
        return found
    mask = on_grid(replace(found, probe=None, label=None), spec, label).mask
    if scan.mask is None or mask is None or not np.array_equal(mask, scan.mask):
        raise PtychodaskError(
            f"{label}: its mask is not that of the first segment of {scan.store}, which the scan keeps"
        )
    return replace(found, mask=None)


def _check_kept(
    scan: Scan, recorded: dict[str, Any], found: SourceScan, gridded: GriddedSource, name: str, label: str
) -> None:
    """Raise `PtychodaskError`, naming what differs, unless a file fits the first segment of a scan."""
    kinds: dict[str, tuple[Any, Any]] = {
        "format": (recorded["reader"], name),
        "domain": (scan.domain, found.domain),
        "n_pixels": (scan.n_pixels, gridded.grid.n_pixels),
        "pixel_size_m": (_rounded(scan.pixel_size_m), _rounded(gridded.pixel_size_m)),
    }
    for what, (first, now) in kinds.items():
        if first != now:
            raise PtychodaskError(
                f"{label}: {what} is {now!r}, and was {first!r} in the first segment of {scan.store}; a scan keeps "
                "what its first segment had: ingest into a store of its own"
            )


def _rounded(size_m: float | None) -> str | None:
    """A length as text, so that rounding does not tell two apart."""
    return None if size_m is None else f"{size_m:.9g}"


def _scratch(spec: IngestSpec, store: Location, stack: ExitStack) -> Path:
    """Folder for what has to be unpacked: beside the store, where that is on a disk."""
    if spec.scratch is not None:
        return Path(spec.scratch)
    if isinstance(store, S3Location):
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptychodask-")))
    return store.parent


@dataclass(frozen=True)
class _Preparation:
    """What happens to a block of frames on its way into the store."""

    grid: FrameGrid
    domain: Domain
    dtype: np.dtype[Any]
    mask: NDArray[np.bool_] | None
    label: str

    def __call__(self, frames: NDArray[Any]) -> NDArray[Any]:
        return as_stored(self.grid.patterns(frames, self.domain), self.dtype, self.mask, self.label)


@dataclass(frozen=True)
class _Prepared:
    """Kept frames of a file with random access, prepared as they are read."""

    frames: Frames
    kept: NDArray[np.int64]
    prepare: _Preparation

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.kept), self.prepare.grid.n_pixels, self.prepare.grid.n_pixels

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.prepare.dtype

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        return self.prepare(self.frames[self.kept[index]])


def prepared(found: SourceScan, gridded: GriddedSource, label: str) -> _Prepared:
    """The kept frames of a file as patterns, which are read by index where the file can be."""
    dtype = stored_dtype(found.frames.dtype, found.domain, gridded.grid.bin)
    return _Prepared(found.frames, gridded.kept, _Preparation(gridded.grid, found.domain, dtype, gridded.mask, label))


@dataclass(frozen=True)
class _Labels:
    """Kept labels of a file with random access, as complex64."""

    frames: Frames
    kept: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.kept), *self.frames.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.complex64)

    def __getitem__(self, index: Any, /) -> NDArray[np.complex64]:
        return self.frames[self.kept[index]].astype(np.complex64)


def _prepare(
    read: Source, gridded: GriddedSource, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """Keyword arguments of `write_scan` from what a reader found."""
    found, label, spec = read.scan, read.container.label, gridded.spec
    parts = _pattern_parts(found, gridded, label, scratch, stack, progress)
    probe, calibration = _probe(found, spec, gridded.grid, parts["diffraction"], gridded.mask, label)
    return parts | {
        "probe": probe,
        "domain": found.domain,
        "calibration": calibration,
        "incident_counts": spec.incident_counts,
        "mask": gridded.mask,
        "truth": gridded.truth,
        "pixel_size_m": gridded.pixel_size_m,
        "energy_ev": HC_EV_M / spec.wavelength_m if spec.wavelength_m else spec.energy_ev,
        "distance_m": spec.distance_m,
    }


def _pattern_parts(
    found: SourceScan, gridded: GriddedSource, label: str, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """What a file says of each of its patterns: keyword arguments of `write_scan` and `append_segment`."""
    kept = gridded.kept
    diffraction = _at_random(prepared(found, gridded, label), scratch, stack, progress)
    if not gridded.spec.far_field:
        check_far_field(diffraction, gridded.position_yx_px, gridded.grid.n_pixels, found.domain, label)
    return {
        "diffraction": diffraction,
        "position_yx_px": gridded.position_yx_px,
        "flux": None if found.flux is None else found.flux[kept],
        "scan_index": None if found.scan_index is None else found.scan_index[kept],
        "source_index": kept,
        "label": None if found.label is None else _labels(found.label, kept, scratch, stack, progress, label),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class GriddedSource:
    """What is known of a scan before its patterns are read."""

    kept: NDArray[np.int64]
    """Rows of the file that stay (pattern,)."""

    grid: FrameGrid
    """How frames become patterns."""

    mask: NDArray[np.bool_] | None
    """True where a pixel of a pattern is good (N, N)."""

    position_yx_px: NDArray[np.float64]
    """Positions of the kept patterns (pattern, 2)."""

    pixel_size_m: float | None
    """Object pixel, metres."""

    truth: Truth | None
    """The known object, where it fits."""

    spec: IngestSpec
    """What was asked for, and what the file says of the optics."""


def on_grid(found: SourceScan, spec: IngestSpec, label: str) -> GriddedSource:
    """Bring what a reader found onto the scan's grid; no pattern is read, but for ``centre="auto"``.

    Raises
    ------
    PtychodaskError
        If arrays do not fit each other or the spec, or something that is needed is not known.
    """
    _check_lengths(found, label)
    spec = _with_optics(found, spec)
    kept = _with_position(found, kept_frames(found.frames.shape[0], spec.drop_frames, label), label)
    check_positions(found.position_yx[kept], len(kept), label)
    frame_mask = _frame_mask(found, spec, label)
    grid = _grid(found, spec, frame_mask, label)
    mask = grid.mask(frame_mask)
    if mask is not None and not mask.any():
        raise PtychodaskError(f"{label}: the mask leaves no good pixel; it is True where a pixel is good")
    pixel_m = _object_pixel_m(found, spec, grid, label)
    found = _turned(found, spec, label)
    position_yx_px = _position_yx_px(found, grid, pixel_m, label)[kept]
    truth = _truth(found, grid, position_yx_px, label)
    _check_label(found, grid, label)
    return GriddedSource(
        kept=kept,
        grid=grid,
        mask=mask,
        position_yx_px=position_yx_px,
        pixel_size_m=pixel_m,
        truth=truth,
        spec=spec,
    )


def _with_optics(found: SourceScan, spec: IngestSpec) -> IngestSpec:
    """The spec, and what the file says of the optics where the user says nothing."""
    given = spec.given()
    says_wavelength = {"energy_ev", "wavelength_m"} & set(given)
    optics: dict[str, Any] = {
        name: value
        for name, value in found.optics.items()
        if name not in given and not (says_wavelength and name in ("energy_ev", "wavelength_m"))
    }
    return replace(spec, **optics)


def _with_position(found: SourceScan, kept: NDArray[np.int64], label: str) -> NDArray[np.int64]:
    """Kept frames that have a position."""
    if found.rows is None:
        return kept
    kept = np.intersect1d(kept, found.rows)
    if not len(kept):
        raise PtychodaskError(f"{label}: drop_frames leaves none of the {len(found.rows)} frames that have a position")
    return kept


def _turned(found: SourceScan, spec: IngestSpec, label: str) -> SourceScan:
    """What a reader found, its positions turned by the affine matrix."""
    if spec.affine is None:
        return found
    if found.object is not None:
        raise PtychodaskError(
            f"{label}: affine turns positions away from the object that the file holds; leave affine= out, or name the "
            "file's arrays with keys=, without 'object'"
        )
    return replace(found, position_yx=found.position_yx @ as_matrix(spec.affine).T)


def _check_lengths(found: SourceScan, label: str) -> None:
    shape = found.frames.shape
    if found.frames.dtype.kind not in "buif":
        raise PtychodaskError(f"{label}: patterns have type {found.frames.dtype}, expected counts or amplitudes")
    if len(found.position_yx) != shape[0]:
        raise PtychodaskError(
            f"{label}: {shape[0]} patterns but {len(found.position_yx)} positions (patterns of shape {shape}); "
            "every pattern needs exactly one: mend the file, or say its order of axes with axes= (--axes)"
        )
    for name in ("flux", "scan_index"):
        values = getattr(found, name)
        if values is not None and len(values) != shape[0]:
            raise PtychodaskError(f"{label}: {shape[0]} patterns but {len(values)} values of {name}; mend the file")


def kept_frames(n_frames: int, drop: str | Sequence[int | slice] | None, label: str) -> NDArray[np.int64]:
    """Rows of a file that stay when some are dropped.

    Parameters
    ----------
    n_frames : int
    drop : str or sequence of int and slice, optional
        "3,10:20" means row 3 and rows 10 to 19.
    label : str
        The file, for messages.

    Returns
    -------
    int64 array
        Ascending.

    Raises
    ------
    PtychodaskError
        If a part is no row or range of the file, or nothing stays.

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
        raise PtychodaskError(f"{label}: drop_frames has the part {part!r}, expected rows of 0..{n_frames - 1}")
    return slice(start, stop, rows.step)


def _frame_mask(found: SourceScan, spec: IngestSpec, label: str) -> NDArray[np.bool_] | None:
    if spec.mask is not None and found.mask is not None:
        raise PtychodaskError(f"{label}: mask= and a mask among keys= say the same thing; pass one of them")
    mask = found.mask if spec.mask is None else as_mask(read_npy(spec.mask), str(spec.mask))
    if mask is not None and mask.shape != found.frames.shape[1:]:
        raise PtychodaskError(
            f"{label}: the mask has shape {mask.shape}, expected {found.frames.shape[1:]} as the frames"
        )
    return mask


def _grid(found: SourceScan, spec: IngestSpec, mask: NDArray[np.bool_] | None, label: str) -> FrameGrid:
    height, width = (int(n) for n in found.frames.shape[1:])
    if spec.n_pixels is None and height != width:
        check_pattern_shape(found.frames.shape, label)
    n_pixels = height // spec.bin if spec.n_pixels is None else int(spec.n_pixels)
    check_pattern_shape((found.frames.shape[0], n_pixels, n_pixels), label)
    if spec.centre == "dc":
        centre = (height // 2, width // 2)
    elif spec.centre == "auto":
        centre = _found_centre(found, mask, label)
        logger.info("%s: the beam's centre is at (y, x) = %s of %s", label, centre, (height, width))
    else:
        centre = (round(float(spec.centre[0])), round(float(spec.centre[1])))
    if not (0 <= centre[0] < height and 0 <= centre[1] < width):
        raise PtychodaskError(f"{label}: centre is {centre}, expected a pixel of the {height} x {width} frame")
    return FrameGrid(frame_shape=(height, width), n_pixels=n_pixels, bin=int(spec.bin), dc=found.dc, centre_yx=centre)


def _found_centre(found: SourceScan, mask: NDArray[np.bool_] | None, label: str) -> tuple[int, int]:
    mean = mean_counts(found.frames.blocks(), found.domain)
    if mask is not None:
        mean = mean * mask
    return centre_of_mass(np.fft.fftshift(mean) if found.dc == "corner" else mean, label)


def _object_pixel_m(found: SourceScan, spec: IngestSpec, grid: FrameGrid, label: str) -> float | None:
    """Object pixel as the user says, or the file, or λz/(extent of the detector); None where none of them is known."""
    wavelength_m = _wavelength_m(spec)
    computed = None
    if wavelength_m and spec.distance_m and spec.detector_pixel_m:
        computed = pixel_size_m(wavelength_m, spec.distance_m, spec.detector_pixel_m, grid.extent)
    if spec.pixel_size_m and computed and not np.isclose(spec.pixel_size_m, computed, rtol=0.01):
        raise PtychodaskError(
            f"{label}: pixel_size_m is {spec.pixel_size_m:.4g} but wavelength, distance and detector pixel make it "
            f"{computed:.4g}; leave pixel_size_m out, or correct the optics"
        )
    of_file = found.pixel_size_m / grid.position_scale_yx[0] if found.pixel_size_m else None
    return spec.pixel_size_m or of_file or computed


def _wavelength_m(spec: IngestSpec) -> float | None:
    return HC_EV_M / spec.energy_ev if spec.energy_ev else spec.wavelength_m


def _position_yx_px(
    found: SourceScan, grid: FrameGrid, object_pixel_m: float | None, label: str
) -> NDArray[np.float64]:
    if found.unit == "px":
        return found.position_yx * np.array(grid.position_scale_yx)
    if object_pixel_m is None:
        raise PtychodaskError(
            f"{label}: positions are in {found.unit} and the object pixel is not known; "
            "pass pixel_size_m=, or energy_ev=, distance_m= and detector_pixel_m="
        )
    return found.position_yx * ({"um": 1e-6, "m": 1.0}[found.unit] / object_pixel_m)


def _truth(found: SourceScan, grid: FrameGrid, position_yx_px: NDArray[np.float64], label: str) -> Truth | None:
    if found.object is None:
        return None
    half = grid.n_pixels / 2
    inside = (position_yx_px >= half).all() and (position_yx_px <= np.array(found.object.shape) - half).all()
    for left_out, reason in (
        (grid.changes_the_object_grid, "crop, padding or bin changes the object's grid"),
        (not inside, "it does not cover the scan"),
        (not np.isfinite(found.object).all(), "it has values that are not finite"),
        (bool((found.object == found.object.flat[0]).all()), "it is constant, a placeholder"),
    ):
        if left_out:
            logger.info("%s: left out its object as truth: %s", label, reason)
            return None
    return Truth(found.object)


def _check_label(found: SourceScan, grid: FrameGrid, label: str) -> None:
    if found.label is None:
        return
    if found.label.shape != found.frames.shape:
        raise PtychodaskError(
            f"{label}: labels have shape {found.label.shape}, expected {found.frames.shape} as the patterns"
        )
    if grid.changes_the_object_grid:
        raise PtychodaskError(
            f"{label}: its labels do not fit patterns of another size; leave n_pixels= and bin= out, "
            "or name the file's arrays with keys=, without 'label'"
        )


def _at_random(patterns: _Prepared, scratch: Path, stack: ExitStack, progress: bool | None) -> PatternSource:
    """Prepared patterns that can be read in any order: through scratch where the file itself cannot."""
    if patterns.frames.random_access:
        return patterns
    label, n_bytes = patterns.prepare.label, prod(patterns.shape) * patterns.dtype.itemsize
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{label}: unpacking"))
    spill(patterns.frames, patterns.kept, patterns.prepare, file, folder=scratch, progress=progress)
    return RawFrames(file, 0, patterns.shape, patterns.dtype, label=label)


def _labels(
    label: Frames, kept: NDArray[np.int64], scratch: Path, stack: ExitStack, progress: bool | None, source_name: str
) -> PatternSource:
    if label.random_access:
        return _Labels(label, kept)
    n_bytes = len(kept) * label.shape[1] * label.shape[2] * 8
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{source_name}: unpacking labels"))
    spill(label, kept, lambda block: block.astype(np.complex64), file, folder=scratch, progress=progress)
    return RawFrames(file, 0, (len(kept), *label.shape[1:]), np.dtype(np.complex64), label=source_name)


def _probe(
    found: SourceScan,
    spec: IngestSpec,
    grid: FrameGrid,
    diffraction: PatternSource,
    mask: NDArray[np.bool_] | None,
    label: str,
) -> tuple[NDArray[np.complex64], Calibration]:
    """The initial probe on the scan's grid, and its calibration."""
    kind = spec.probe or ("file" if found.probe is not None else "estimate")
    if spec.probe is None and kind == "estimate":
        logger.info("%s: holds no probe; it is estimated from the mean pattern (probe=)", label)
    calibration = spec.calibration or (found.calibration if kind == "file" else "mean_counts")
    if calibration == "as_given" and kind in ("disc", "zone_plate", "estimate"):
        raise PtychodaskError(
            f"{label}: a probe made by {kind!r} has no scale of its own; "
            "pass calibration='mean_counts', or 'incident' with incident_counts="
        )
    if kind == "file":
        if found.probe is None:
            raise PtychodaskError(f"{label}: holds no probe; pass probe= 'disc', 'zone_plate', 'estimate' or a path")
        return _on_grid(found.probe, grid, label), calibration
    if kind == "disc":
        return disc_probe(grid.n_pixels, diameter_px=float(spec.probe_diameter_px or 0)), calibration
    if kind == "zone_plate":
        return _zone_plate(spec, grid, label), calibration
    if kind == "estimate":
        mean = mean_counts(_stored_blocks(diffraction), found.domain)
        return estimate_probe(np.sqrt(mean if mask is None else mean * mask)), calibration
    return _on_grid(_probe_file(kind), grid, kind), calibration


def _stored_blocks(diffraction: PatternSource) -> Iterator[NDArray[Any]]:
    for start, stop in block_ranges(diffraction.shape, diffraction.dtype.itemsize):
        yield diffraction[np.arange(start, stop)]


def _on_grid(probe: NDArray[np.complex64], grid: FrameGrid, label: str) -> NDArray[np.complex64]:
    """A probe on the file's grid or on the scan's, on the scan's."""
    if probe.shape[1:] == (grid.n_pixels, grid.n_pixels):
        return probe
    if probe.shape[1:] != grid.frame_shape:
        raise PtychodaskError(
            f"{label}: the probe has shape {probe.shape}, expected (mode, {grid.n_pixels}, {grid.n_pixels}) "
            f"or (mode, {grid.frame_shape[0]}, {grid.frame_shape[1]}) as the frames"
        )
    resampled = grid.probe(probe)
    before = float((np.abs(probe) ** 2).sum(dtype=np.float64))
    kept = float((np.abs(resampled) ** 2).sum(dtype=np.float64)) / before if before > 0 else 1.0
    if kept < 1 - LOST_LIGHT_NOTED:
        logger.warning("%s: %.0f %% of the probe's light lies outside its new grid", label, 100 * (1 - kept))
    return resampled


def _zone_plate(spec: IngestSpec, grid: FrameGrid, label: str) -> NDArray[np.complex64]:
    outer_px, defocus = float(spec.probe_diameter_px or 0), spec.probe_defocus
    if defocus is None:
        wavelength_m = _wavelength_m(spec)
        if not (wavelength_m and spec.distance_m and spec.detector_pixel_m and spec.probe_defocus_m):
            raise PtychodaskError(
                f"{label}: probe_defocus_m needs energy_ev= (or wavelength_m=), distance_m= and detector_pixel_m=; "
                "pass them, or probe_defocus= in radians"
            )
        defocus = rim_phase(
            spec.probe_defocus_m,
            wavelength_m=wavelength_m,
            distance_m=spec.distance_m,
            pattern_pixel_m=spec.detector_pixel_m * grid.bin,
            outer_px=outer_px,
        )
    return zone_plate_probe(grid.n_pixels, outer_px=outer_px, stop_px=spec.probe_stop_px or 0.0, defocus=defocus)


def _probe_file(path: str) -> NDArray[np.complex64]:
    """A probe from a .npy, or from the only key, `probe` or `probeGuess` of a .npz."""
    if not Path(path).is_file():
        raise PtychodaskError(f"{path}: no such file; probe= is a path or one of: {', '.join(PROBE_MODELS)}")
    if Path(path).suffix != ".npz":
        return as_probe(read_npy(path), path)
    with reading(path), ExitStack() as stack:
        file = stack.enter_context(Path(path).open("rb"))
        npz = NpzFile(file, path, Path(path).parent, stack)
        keys = npz.keys()
        named = keys if len(keys) == 1 else [key for key in ("probe", "probeGuess") if key in keys]
        if len(named) != 1:
            raise PtychodaskError(
                f"{path}: expected one array, or one named 'probe' or 'probeGuess'; keys found: {listed_keys(keys)}"
            )
        return as_probe(npz.array(named[0]), path)


def _provenance(source: Path, read: Source, spec: IngestSpec) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "zarr")
    second = read.companion
    return {
        "source": str(source.resolve()),
        "sha256": _sha256(source),
        **({} if second is None else {"second_source": str(second.resolve()), "second_sha256": _sha256(second)}),
        "reader": read.format,
        "options": {key: _plain(value) for key, value in spec.given().items()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _plain(value: Any) -> Any:
    """A value of an option as JSON holds it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(str(path)), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
