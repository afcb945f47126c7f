"""`ingest`: conversion of a foreign file to a store, block by block."""

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

from ptychodask.errors import PtychodaskError, with_fields
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
from ptychodask.probes import disc_probe, estimate_probe, zone_plate_probe
from ptychodask.scan import Calibration, Domain, PatternSource, Scan, Truth, check_pattern_shape, check_positions
from ptychodask.storage.atomic import check_vacant
from ptychodask.storage.location import Location, parse_location
from ptychodask.storage.s3 import S3Location
from ptychodask.store import SCAN, open_scan
from ptychodask.store.append import append_segment
from ptychodask.store.write import write_scan

logger = logging.getLogger(__name__)

OF_EACH_SEGMENT = ("diffraction", "drop_frames", "scratch")
"""Options that may differ between the segments of a growing scan."""

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
"""Options for properties that all segments of a growing scan have from the first."""

LOST_INTENSITY_WARNED = 0.01
"""Fraction of a probe's intensity outside its new grid from which on a warning is logged."""


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
    """Convert a foreign file to a store, or append it to one.

    Parameters
    ----------
    source : path
        An NPZ (also .npz.bz2) or HDF5 file.
    store : path
        Store to write; it appears when it is complete. With `append`, a segment is added to an existing store.
    format : {"ptychopinn", "tike", "ptychodus", "nexus", "cxi", "hxn", "mapping"}, optional
        Format of the file; by default detected from its keys, or "mapping" if `keys` is given.
    recipe : path, optional
        A YAML file of options, as `inspect` writes it; options passed here take precedence.
    append : bool
        The file is one segment of a growing scan (the first if there is no store yet), until `finish_scan`.
    overwrite : bool
        Replace an existing store.
    progress : bool, optional
        True shows a progress bar, False does not; None shows it in a terminal and in Jupyter.
    **reader_options
        Fields of `IngestSpec`; other names are refused.

    Returns
    -------
    Scan
        The new store, opened.

    Raises
    ------
    PtychodaskError
        If the file or an option is invalid, or the disk cannot be written; no store is written, and an existing one is
        kept.

    Notes
    -----
    A growing scan keeps the properties of its first segment: probe, mask, normalisation, calibration, unit of the
    patterns, pixel size. Options need not be passed again; only `diffraction`, `drop_frames` and `scratch` may differ
    between segments. Readers see complete segments only (see `append_segment`).

    Only a few blocks of frames are in memory, however large the file. A file that cannot be read in any order
    (compressed, or with patterns along its last axis) is first written to a scratch file; compressed frames are already
    cropped there.
    """
    source, store = Path(source), parse_location(store)
    spec = with_fields(IngestSpec(), with_recipe(recipe, reader_options))
    if append and overwrite:
        raise PtychodaskError(f"{store}: append=True adds to the scan, overwrite=True replaces it; pass one of them")
    if append and isinstance(store, S3Location):
        raise PtychodaskError(
            f"{store}: append=True needs a store on disk, not in an object store; append to one on disk, and copy it "
            "when the scan is complete"
        )
    if append and isinstance(store, Path) and store.exists():
        return _append(source, store, format, spec, progress)
    check_vacant(store, overwrite=overwrite, kind=SCAN)
    with _opened(source, store, format, spec) as (opened, scratch, stack):
        gridded = on_grid(opened.scan, spec, opened.container.label)
        scan_parts = _prepare(opened, gridded, scratch, stack, progress)
        provenance = _provenance(source, opened, spec)
        if append:
            provenance["centre_yx"] = list(gridded.grid.centre_yx)
        return write_scan(
            store, provenance=provenance, growing=append, overwrite=overwrite, progress=progress, **scan_parts
        )


@contextmanager
def _opened(
    source: Path, store: Location, format: str | None, spec: IngestSpec
) -> Iterator[tuple[Source, Path, ExitStack]]:
    """Open a file with its reader; yields its scratch folder too."""
    with ExitStack() as stack:
        scratch = _scratch(spec, store, stack)
        container = open_container(source, scratch, stack)
        name = detect_format(container, spec) if format is None else format
        yield read_source(source, container, name, spec, scratch, stack), scratch, stack


def _append(source: Path, store: Path, format: str | None, spec: IngestSpec, progress: bool | None) -> Scan:
    """Append a file to a growing scan, as one more segment."""
    scan = open_scan(store)
    recorded = scan.attributes.get("provenance", {})
    if scan.attributes["state"] != "growing" or not {"options", "reader"} <= recorded.keys():
        raise PtychodaskError(
            f"{store}: the scan is complete, or was not started with append=True (--append), which only adds to "
            "growing scans; pass another store"
        )
    spec = _with_first_options(spec, recorded, str(store))
    with _opened(source, store, format or recorded["reader"], spec) as (opened, scratch, stack):
        label = opened.container.label
        provenance = _provenance(source, opened, spec)
        file_scan = _without_mask(opened.scan, scan, spec, label)
        gridded = on_grid(file_scan, spec, label)
        _check_same_scan(scan, recorded, file_scan, gridded, opened.format, label)
        gridded = replace(gridded, mask=scan.mask)
        return append_segment(
            store,
            **_pattern_parts(file_scan, gridded, label, scratch, stack, progress),
            provenance=provenance,
            progress=progress,
        )


def _with_first_options(spec: IngestSpec, recorded: dict[str, Any], label: str) -> IngestSpec:
    """Options of a scan's first segment, with `OF_EACH_SEGMENT` of this one."""
    first, given = recorded["options"], {key: _plain(value) for key, value in spec.given().items()}
    for name, value in given.items():
        if name not in OF_EACH_SEGMENT and value != first.get(name):
            raise PtychodaskError(
                f"{label}: {name} was {first.get(name, 'not given')!r} for the first segment and is {value!r} now; a "
                "scan keeps the options of its first segment: leave it out, or ingest into another store"
            )
    kept = {name: value for name, value in first.items() if name not in (*OF_EACH_SEGMENT, *OF_FIRST_SEGMENT)}
    of_segment = {name: getattr(spec, name) for name in OF_EACH_SEGMENT}
    # The centre of the first segment is reused: another one would shift the patterns.
    centre = {"centre": tuple(recorded["centre_yx"])} if "centre_yx" in recorded and "centre" in kept else {}
    return with_fields(IngestSpec(), {**kept, **centre, **of_segment})


def _without_mask(file_scan: SourceScan, scan: Scan, spec: IngestSpec, label: str) -> SourceScan:
    """Content of a file without its mask, which must be the scan's."""
    if file_scan.mask is None:
        return file_scan
    mask = on_grid(replace(file_scan, probe=None, label=None), spec, label).mask
    if scan.mask is None or mask is None or not np.array_equal(mask, scan.mask):
        raise PtychodaskError(
            f"{label}: its mask differs from that of the first segment of {scan.store}, which the scan keeps; ingest "
            "into another store"
        )
    return replace(file_scan, mask=None)


def _check_same_scan(
    scan: Scan, recorded: dict[str, Any], file_scan: SourceScan, gridded: GriddedSource, name: str, label: str
) -> None:
    """Raise `PtychodaskError` if a file does not fit a scan's first segment."""
    properties: dict[str, tuple[Any, Any]] = {
        "format": (recorded["reader"], name),
        "domain": (scan.domain, file_scan.domain),
        "n_pixels": (scan.n_pixels, gridded.grid.n_pixels),
        "pixel_size_m": (_rounded(scan.pixel_size_m), _rounded(gridded.pixel_size_m)),
    }
    for property_name, (first, now) in properties.items():
        if first != now:
            raise PtychodaskError(
                f"{label}: {property_name} is {now!r}, expected {first!r} as in the first segment of {scan.store}; "
                "ingest into another store"
            )


def _rounded(size_m: float | None) -> str | None:
    """Length as text, so that sizes that differ by rounding are equal."""
    return None if size_m is None else f"{size_m:.9g}"


def _scratch(spec: IngestSpec, store: Location, stack: ExitStack) -> Path:
    """Folder for scratch files; by default the store's, if on disk."""
    if spec.scratch is not None:
        return Path(spec.scratch)
    if isinstance(store, S3Location):
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptychodask-")))
    return store.parent


@dataclass(frozen=True)
class _Preparation:
    """Conversion of a block of frames to patterns as stored."""

    grid: FrameGrid
    domain: Domain
    dtype: np.dtype[Any]
    mask: NDArray[np.bool_] | None
    label: str

    def __call__(self, frames: NDArray[Any]) -> NDArray[Any]:
        return as_stored(self.grid.patterns(frames, self.domain), self.dtype, self.mask, self.label)


@dataclass(frozen=True)
class _Prepared:
    """Kept frames of a file, converted to patterns as they are read."""

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


def prepared(file_scan: SourceScan, gridded: GriddedSource, label: str) -> _Prepared:
    """Kept frames of a file as patterns, converted when they are read.

    Parameters
    ----------
    file_scan : SourceScan
        Content of the file.
    gridded : GriddedSource
        Its geometry, from `on_grid`.
    label : str
        Name of the file, for messages.
    """
    dtype = stored_dtype(file_scan.frames.dtype, file_scan.domain, gridded.grid.bin)
    preparation = _Preparation(gridded.grid, file_scan.domain, dtype, gridded.mask, label)
    return _Prepared(file_scan.frames, gridded.kept, preparation)


@dataclass(frozen=True)
class _Labels:
    """Supervised labels of the kept frames of a file, as complex64."""

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
    opened: Source, gridded: GriddedSource, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """Keyword arguments of `write_scan` from the content of a file."""
    file_scan, label, spec = opened.scan, opened.container.label, gridded.spec
    parts = _pattern_parts(file_scan, gridded, label, scratch, stack, progress)
    probe, calibration = _probe(file_scan, spec, gridded.grid, parts["diffraction"], gridded.mask, label)
    return parts | {
        "probe": probe,
        "domain": file_scan.domain,
        "calibration": calibration,
        "incident_counts": spec.incident_counts,
        "mask": gridded.mask,
        "truth": gridded.truth,
        "pixel_size_m": gridded.pixel_size_m,
        "energy_ev": HC_EV_M / spec.wavelength_m if spec.wavelength_m else spec.energy_ev,
        "distance_m": spec.distance_m,
    }


def _pattern_parts(
    file_scan: SourceScan, gridded: GriddedSource, label: str, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """Keyword arguments of `write_scan` and `append_segment` with values per pattern."""
    kept = gridded.kept
    diffraction = _random_access(prepared(file_scan, gridded, label), scratch, stack, progress)
    if not gridded.spec.far_field:
        check_far_field(diffraction, gridded.position_yx_px, gridded.grid.n_pixels, file_scan.domain, label)
    return {
        "diffraction": diffraction,
        "position_yx_px": gridded.position_yx_px,
        "flux": None if file_scan.flux is None else file_scan.flux[kept],
        "scan_index": None if file_scan.scan_index is None else file_scan.scan_index[kept],
        "source_index": kept,
        "label": None if file_scan.label is None else _labels(file_scan.label, kept, scratch, stack, progress, label),
    }


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
    _check_lengths(file_scan, label)
    spec = _with_optics(file_scan, spec)
    kept = _with_position(file_scan, kept_frames(file_scan.frames.shape[0], spec.drop_frames, label), label)
    check_positions(file_scan.position_yx[kept], len(kept), label)
    frame_mask = _frame_mask(file_scan, spec, label)
    grid = _grid(file_scan, spec, frame_mask, label)
    mask = grid.mask(frame_mask)
    if mask is not None and not mask.any():
        raise PtychodaskError(f"{label}: the mask leaves no good pixel; it is True where a pixel is good")
    pixel_m = _object_pixel_m(file_scan, spec, grid, label)
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
    if spec.affine is None:
        return file_scan
    if file_scan.object is not None:
        raise PtychodaskError(
            f"{label}: affine= changes the positions, so that they no longer fit the object in the file; leave it out, "
            "or map the file's arrays with keys= without 'object'"
        )
    return replace(file_scan, position_yx=file_scan.position_yx @ as_matrix(spec.affine).T)


def _check_lengths(file_scan: SourceScan, label: str) -> None:
    shape = file_scan.frames.shape
    if file_scan.frames.dtype.kind not in "buif":
        raise PtychodaskError(f"{label}: patterns have type {file_scan.frames.dtype}, expected counts or amplitudes")
    if len(file_scan.position_yx) != shape[0]:
        raise PtychodaskError(
            f"{label}: {shape[0]} patterns but {len(file_scan.position_yx)} positions (patterns of shape {shape}); "
            "every pattern needs one: correct the file, or pass the order of its axes with axes= (--axes)"
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
    wavelength_m = _wavelength_m(spec)
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


def _wavelength_m(spec: IngestSpec) -> float | None:
    return HC_EV_M / spec.energy_ev if spec.energy_ev else spec.wavelength_m


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
    return file_scan.position_yx * ({"um": 1e-6, "m": 1.0}[file_scan.unit] / object_pixel_m)


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


def _random_access(patterns: _Prepared, scratch: Path, stack: ExitStack, progress: bool | None) -> PatternSource:
    """Patterns readable in any order, from a scratch file if necessary."""
    if patterns.frames.random_access:
        return patterns
    label, n_bytes = patterns.prepare.label, prod(patterns.shape) * patterns.dtype.itemsize
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{label}: unpacking"))
    spill(patterns.frames, patterns.kept, patterns.prepare, file, folder=scratch, progress=progress)
    return RawFrames(file, 0, patterns.shape, patterns.dtype, label=label)


def _labels(
    frames: Frames, kept: NDArray[np.int64], scratch: Path, stack: ExitStack, progress: bool | None, label: str
) -> PatternSource:
    if frames.random_access:
        return _Labels(frames, kept)
    n_bytes = len(kept) * frames.shape[1] * frames.shape[2] * 8
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{label}: unpacking labels"))
    spill(frames, kept, lambda block: block.astype(np.complex64), file, folder=scratch, progress=progress)
    return RawFrames(file, 0, (len(kept), *frames.shape[1:]), np.dtype(np.complex64), label=label)


def _probe(
    file_scan: SourceScan,
    spec: IngestSpec,
    grid: FrameGrid,
    diffraction: PatternSource,
    mask: NDArray[np.bool_] | None,
    label: str,
) -> tuple[NDArray[np.complex64], Calibration]:
    """Initial probe on the scan's grid, and its calibration."""
    kind = spec.probe or ("file" if file_scan.probe is not None else "estimate")
    if spec.probe is None and kind == "estimate":
        logger.info("%s: has no probe; it is estimated from the mean pattern (see probe=)", label)
    calibration = spec.calibration or (file_scan.calibration if kind == "file" else "mean_counts")
    if calibration == "as_given" and kind in ("disc", "zone_plate", "estimate"):
        raise PtychodaskError(
            f"{label}: calibration is 'as_given', but a probe from {kind!r} has an arbitrary scale; "
            "pass calibration='mean_counts', or 'incident' with incident_counts="
        )
    if kind == "file":
        if file_scan.probe is None:
            raise PtychodaskError(f"{label}: has no probe; pass probe= 'disc', 'zone_plate', 'estimate' or a path")
        return _probe_on_grid(file_scan.probe, grid, label), calibration
    if kind == "disc":
        return disc_probe(grid.n_pixels, diameter_px=float(spec.probe_diameter_px or 0)), calibration
    if kind == "zone_plate":
        return _zone_plate(spec, grid, label), calibration
    if kind == "estimate":
        mean = mean_counts(_stored_blocks(diffraction), file_scan.domain)
        return estimate_probe(np.sqrt(mean if mask is None else mean * mask)), calibration
    return _probe_on_grid(_probe_file(kind), grid, kind), calibration


def _stored_blocks(diffraction: PatternSource) -> Iterator[NDArray[Any]]:
    for start, stop in block_ranges(diffraction.shape, diffraction.dtype.itemsize):
        yield diffraction[np.arange(start, stop)]


def _probe_on_grid(probe: NDArray[np.complex64], grid: FrameGrid, label: str) -> NDArray[np.complex64]:
    """Probe on the scan's grid, from the file's grid or the scan's."""
    if probe.shape[1:] == (grid.n_pixels, grid.n_pixels):
        return probe
    if probe.shape[1:] != grid.frame_shape:
        raise PtychodaskError(
            f"{label}: the probe has shape {probe.shape}, expected (mode, {grid.n_pixels}, {grid.n_pixels}) "
            f"or (mode, {grid.frame_shape[0]}, {grid.frame_shape[1]}) like the frames"
        )
    resampled = grid.probe(probe)
    before = float((np.abs(probe) ** 2).sum(dtype=np.float64))
    kept = float((np.abs(resampled) ** 2).sum(dtype=np.float64)) / before if before > 0 else 1.0
    if kept < 1 - LOST_INTENSITY_WARNED:
        logger.warning("%s: %.0f %% of the probe's intensity is outside its new grid", label, 100 * (1 - kept))
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
    """Probe from a .npy or a .npz.

    In a .npz it is the only array, or the one at `probe` or `probeGuess`.
    """
    if not Path(path).is_file():
        raise PtychodaskError(f"{path}: no such file; pass probe= a path or one of: {', '.join(PROBE_MODELS)}")
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


def _provenance(source: Path, opened: Source, spec: IngestSpec) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "zarr")
    second = opened.companion
    return {
        "source": str(source.resolve()),
        "sha256": _sha256(source),
        **({} if second is None else {"second_source": str(second.resolve()), "second_sha256": _sha256(second)}),
        "reader": opened.format,
        "options": {key: _plain(value) for key, value in spec.given().items()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _plain(value: Any) -> Any:
    """Value of an option as JSON types."""
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
