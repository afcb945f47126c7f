"""Options of `ingest`, and the interface between it and readers of formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.io.units import Unit, position_unit
from ptychodask.options import check_types, names_where, option
from ptychodask.scan import Calibration, Domain

Dc = Literal["centre", "corner"]
"""Pixel of the direct beam in a file: [h//2, w//2] or [0, 0]."""

Axes = Literal["pattern,qy,qx", "qy,qx,pattern"]
"""Order of the axes of patterns in a file."""

MAPPED_KEYS = (
    "diffraction",
    "y",
    "x",
    "position",
    "probe",
    "mask",
    "mask_bad",
    "object",
    "label",
    "label_amp",
    "label_phase",
    "flux",
    "scan_index",
)
"""Names that `keys` can map to keys of a file."""

PROBE_MODELS = ("file", "disc", "zone_plate", "estimate")
"""Sources of an initial probe, other than the path of a file."""

MOST_SHEARED = 1e6
"""Condition number from which on an affine matrix counts as singular."""

MOST_PIXELS = 2**14
"""Largest number of pixels across a pattern: more than any detector has."""

BLOCK_BYTES = 4 * 2**20
"""Bytes of frames read from a file at a time."""

SLAB_BYTES = 32 * 2**20
"""Bytes that are transposed at a time of an array with patterns along its last axis.

Larger slabs make longer contiguous writes.
"""


@dataclass(frozen=True, kw_only=True)
class IngestSpec:
    """Options for converting a foreign file to a scan."""

    keys: Mapping[str, str] | None = option(
        None,
        help="Keys of arrays in the file, by name: diffraction, y, x, position, probe, mask, mask_bad, "
        "object, label or flux.",
        flag="--key",
        of_format=True,
    )
    """Keys of the arrays in the file, for example ``{"diffraction": "dp", "y": "pos_y", "x": "pos_x"}``."""

    domain: Domain | None = option(None, help="Unit of the patterns: counts or amplitude.", of_format=True)
    """Unit of the patterns, if the format does not define it."""

    axes: Axes | None = option(None, help="Order of the pattern axes: pattern,qy,qx or qy,qx,pattern.", of_format=True)
    """Order of the patterns' axes, if their shape is ambiguous."""

    dc: Dc | None = option(
        None, help="Position of the direct beam in the file's patterns: centre or corner.", of_format=True
    )
    """Pixel of the direct beam in the file; the middle by default."""

    units: Unit | None = option(
        None, help="Unit of the positions: px, m, cm, mm, um, nm, pm or angstrom.", of_format=True
    )
    """Unit of the positions."""

    flip_y: bool = option(False, help="Change the sign of y in the positions (after --swap-xy).", of_format=True)
    """Positions: y becomes -y (after `swap_xy`), for files where +y is up."""

    flip_x: bool = option(False, help="Change the sign of x in the positions (after --swap-xy).", of_format=True)
    """Positions: x becomes -x (after `swap_xy`), for files where +x is left."""

    swap_xy: bool = option(False, help="Swap x and y in the positions.", of_format=True)
    """Positions: exchange the two axes."""

    affine: tuple[float, float, float, float] | None = option(
        None,
        help="a,b,c,d: map positions (y, x) to (a y + b x, c y + d x), after the swap and the flips. For every format.",
    )
    """Positions: (y, x) becomes (a·y + b·x, c·y + d·x) with (a, b, c, d), after `swap_xy` and the flips and before
    conversion of units. Corrects a stage that is rotated, scaled or sheared against the detector. For every format."""

    rotation_deg: float | None = option(
        None,
        help="Turn the positions from +x toward +y by this angle, degrees, after the swap and the flips.",
    )
    """Positions: turned from +x toward +y by this angle, degrees, in place of `affine`. For every format."""

    step: tuple[float, float] | None = option(
        None, help="y,x: distance of rows and of columns of a raster in --units, for want of positions.", of_format=True
    )
    """Distance (y, x) of rows and of columns of a raster without positions, in `units`; negative ones run backward."""

    raster: tuple[int, int] | None = option(
        None, help="Rows and columns of the raster, for --step, if the patterns have one axis.", of_format=True
    )
    """Rows and columns of the raster, for `step`, if the patterns' shape does not have them."""

    positions: str | Path | None = option(
        None,
        help="File with the positions, if not that of the patterns: columns of text, .npy, NPZ or HDF5.",
        of_format=True,
        segment="each",
    )
    """File with the positions, if the file of the patterns has none: columns of text, .npy, or a file with the `keys`
    ``y`` and ``x`` or ``position``. Its keys come after "positions/" where both files have the same."""

    n_pixels: int | None = option(None, help="Pixels across a stored pattern; crops or pads about the beam centre.")
    """Pixels across a stored pattern, N; crops or pads about the beam centre. By default the frame size over `bin`."""

    bin: int = option(1, help="Binning: sum this many detector pixels along each axis.")
    """Detector pixels along each axis that are summed into one."""

    centre: Literal["dc", "auto"] | tuple[float, float] = option(
        "dc", help="Beam centre in a frame: dc (the middle), auto (centre of mass), or y,x in pixels."
    )
    """Beam centre in a frame (after `dc`): "dc" is [h//2, w//2], "auto" the centre of mass of the mean pattern, or
    (y, x) in pixels of the frame; rounded to whole pixels."""

    energy_ev: float | None = option(
        None, help="Energy of the photons, or with --particle electron of the electrons, eV."
    )
    """Energy of the photons, or of the electrons with ``particle="electron"``, electronvolts."""

    particle: Literal["photon", "electron"] | None = option(
        None, help="Particle of the energy: photon or electron (relativistic wavelength)."
    )
    """Particle that has the energy: "electron" gives the relativistic wavelength; photons by default."""

    wavelength_m: float | None = option(None, help="Wavelength, metres, instead of the energy.")
    """Wavelength, metres, in place of `energy_ev`."""

    distance_m: float | None = option(None, help="Distance from sample to detector, metres.")
    """Distance from sample to detector, metres."""

    detector_pixel_m: float | None = option(None, help="Size of a detector pixel in the file, metres.")
    """Size of a detector pixel of the file, metres."""

    pixel_size_m: float | None = option(None, help="Size of an object pixel, metres, after --n-pixels and --bin.")
    """Size of an object pixel of the stored scan, after `n_pixels` and `bin`, metres."""

    probe: str | None = option(
        None,
        help="Probe: file (from the scan file), disc, zone_plate, estimate, or path of a .npy or .npz.",
        segment="first",
        inspected=False,
    )
    """One of "file", "disc", "zone_plate" and "estimate", or the path of a .npy or .npz with a probe on the grid of the
    file or of the store. By default the probe in the file, or the estimate if it has none."""

    probe_diameter_px: float | None = option(
        None,
        help="Diameter of the disc (object pixels) or of the zone plate's pupil (pattern pixels).",
        segment="first",
        inspected=False,
    )
    """Disc: diameter in object pixels. Zone plate: outer diameter of its pupil in pixels of the stored patterns."""

    probe_stop_px: float | None = option(
        None, help="Zone plate: diameter of the central stop, pattern pixels.", segment="first", inspected=False
    )
    """Zone plate: diameter of the central stop in pixels of the stored patterns."""

    probe_defocus: float | None = option(
        None, help="Zone plate: defocus phase at the rim of the pupil, radians.", segment="first", inspected=False
    )
    """Zone plate: phase of the defocus at the pupil's rim, radians."""

    probe_defocus_m: float | None = option(
        None, help="Zone plate: distance from the focus, metres.", segment="first", inspected=False
    )
    """Zone plate: distance from the focus, metres, in place of `probe_defocus`; needs the optics."""

    calibration: Calibration | None = option(
        None, help="Scale of the probe: as_given, incident or mean_counts.", segment="first", inspected=False
    )
    """Scale of the probe; by default that of the format, or "mean_counts" for a modelled probe."""

    incident_counts: float | None = option(
        None, help="Photons per pattern on the sample, for --calibration incident.", segment="first", inspected=False
    )
    """Photons per pattern incident on the sample, for calibration "incident"."""

    diffraction: str | Path | None = option(
        None, help="File with the patterns, if the format has a separate one.", of_format=True, segment="each"
    )
    """File with the patterns, for formats that store them in a separate file from the positions."""

    far_field: bool = option(False, help="Accept patterns as far-field even if they look like near-field shadows.")
    """Accept the patterns as far-field patterns even if they look like near-field shadows."""

    mask: str | Path | None = option(None, help=".npy mask of the detector frame, True = good pixel.", segment="first")
    """A .npy with the shape of a frame, True (or not 0) where a detector pixel is good."""

    saturated: Literal["mask", "keep"] | None = option(
        None, help="Pixels with the largest value of their type, or negative integers: mask (mark as bad) or keep."
    )
    """Pixels that hold the largest value of an integer type (or a negative integer, without `floor`) in any frame:
    "mask" marks them as bad, "keep" takes them as counts. By default they are refused unless the mask covers them."""

    floor: float | None = option(None, help="Values below this become 0; 0 for counts after dark subtraction.")
    """Values of frames below this become 0: 0 for counts after dark subtraction, more to remove readout noise."""

    drop_frames: str | Sequence[int | slice] | None = option(
        None, help='Frames to leave out, as row numbers in the file: "3,10:20".', segment="each"
    )
    """Frames to leave out, by row in the file: "3,10:20" or a list of numbers and slices."""

    scratch: str | Path | None = option(
        None, help="Folder for temporary unpacked data; by default beside the store.", segment="each"
    )
    """Folder for temporary files with unpacked or transposed arrays; by default the folder of the store."""

    def __post_init__(self) -> None:
        if isinstance(self.units, str):
            object.__setattr__(self, "units", position_unit(self.units) or self.units)
        for name, choices in (
            ("domain", get_args(Domain)),
            ("axes", get_args(Axes)),
            ("dc", get_args(Dc)),
            ("units", get_args(Unit)),
            ("calibration", get_args(Calibration)),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices, "ingest")
        for name in ("energy_ev", "wavelength_m", "distance_m", "detector_pixel_m", "pixel_size_m", "incident_counts"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, int | float | np.number) and np.isfinite(value) and value > 0
            ):
                raise PtychodaskError(f"ingest: {name} is {value!r}, expected a positive number")
        for name, low in (("n_pixels", 8), ("bin", 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and low <= value <= MOST_PIXELS):
                raise PtychodaskError(f"ingest: {name} is {value!r}, expected an integer in {low}..{MOST_PIXELS}")
        if self.particle is not None:
            check_choice("particle", self.particle, ("photon", "electron"), "ingest")
        if self.saturated is not None:
            check_choice("saturated", self.saturated, ("mask", "keep"), "ingest")
        if self.floor is not None and not (
            isinstance(self.floor, int | float | np.number) and np.isfinite(self.floor) and self.floor >= 0
        ):
            raise PtychodaskError(f"ingest: floor is {self.floor!r}, expected a number of at least 0")
        if self.energy_ev is not None and self.wavelength_m is not None:
            raise PtychodaskError("ingest: energy_ev and wavelength_m are both given; pass one of them")
        if self.incident_counts is not None and self.calibration != "incident":
            raise PtychodaskError(
                f"ingest: incident_counts has no meaning with calibration={self.calibration!r}; "
                "pass calibration='incident'"
            )
        if isinstance(self.centre, str):
            check_choice("centre", self.centre, ("dc", "auto", "(y, x)"), "ingest")
        elif not _are_finite(self.centre, 2):
            raise PtychodaskError(f"ingest: centre is {self.centre!r}, expected 'dc', 'auto' or (y, x)")
        if self.probe is not None and not isinstance(self.probe, str):
            raise PtychodaskError(
                f"ingest: probe is a {type(self.probe).__name__}, expected the name of a model or the path of a file"
            )
        if self.affine is not None:
            as_matrix(self.affine)
        self._check_raster()
        self._check_keys()
        self._check_probe_options()
        check_types(self, "ingest")

    def _check_raster(self) -> None:
        if self.rotation_deg is not None and (self.affine is not None or not _are_finite((self.rotation_deg,), 1)):
            raise PtychodaskError(
                f"ingest: rotation_deg is {self.rotation_deg!r}, expected a number of degrees, and no affine with it"
            )
        if self.step is not None and not (_are_finite(self.step, 2) and all(self.step)):
            raise PtychodaskError(f"ingest: step is {self.step!r}, expected two numbers (y, x) that are not 0")
        if self.raster is not None and not (
            _are_finite(self.raster, 2) and all(isinstance(n, int | np.integer) and n > 0 for n in self.raster)
        ):
            raise PtychodaskError(f"ingest: raster is {self.raster!r}, expected positive integers (rows, columns)")
        if self.raster is not None and self.step is None:
            raise PtychodaskError("ingest: raster has no meaning without step; pass step=(y, x) (--step)")
        if self.step is not None and ({"y", "x", "position"} & set(self.keys or ()) or self.positions is not None):
            raise PtychodaskError("ingest: step stands in place of positions; leave out it or the keys of positions")

    def _check_keys(self) -> None:
        unknown = sorted(set(self.keys or ()) - set(MAPPED_KEYS))
        if unknown:
            raise PtychodaskError(
                f"ingest: keys has the unknown name {unknown[0]!r}, expected some of: {', '.join(MAPPED_KEYS)}"
            )

    def _check_probe_options(self) -> None:
        needed = {
            "disc": ("probe_diameter_px",),
            "zone_plate": ("probe_diameter_px", "probe_stop_px", "probe_defocus", "probe_defocus_m"),
        }.get(self.probe or "", ())
        for name in ("probe_diameter_px", "probe_stop_px", "probe_defocus", "probe_defocus_m"):
            if getattr(self, name) is not None and name not in needed:
                raise PtychodaskError(f"ingest: {name} has no meaning with probe={self.probe!r}; leave it out")
        if self.probe in ("disc", "zone_plate") and self.probe_diameter_px is None:
            raise PtychodaskError(f"ingest: probe={self.probe!r} needs probe_diameter_px=")
        if self.probe == "zone_plate" and (self.probe_defocus is None) == (self.probe_defocus_m is None):
            raise PtychodaskError(
                "ingest: probe='zone_plate' needs one of probe_defocus= (radians at the rim) and probe_defocus_m="
            )

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


FORMAT_OPTIONS = names_where(IngestSpec, of_format=True)
"""Options for properties that not all formats define; a format that defines one refuses the option."""


def _are_finite(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence | np.ndarray)
        and len(values) == count
        and all(isinstance(value, int | float | np.number) and np.isfinite(value) for value in values)
    )


def rotation_matrix(angle_deg: float) -> NDArray[np.float64]:
    """Matrix (2, 2) that turns (y, x) from +x toward +y.

    Examples
    --------
    >>> np.round(rotation_matrix(90) @ np.array([0.0, 1.0]), 9)
    array([1., 0.])
    """
    sine, cosine = np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))
    return np.array([[cosine, sine], [-sine, cosine]])


def as_matrix(affine: Sequence[float]) -> NDArray[np.float64]:
    """Matrix (2, 2) of positions (y, x) from `affine`.

    Raises
    ------
    PtychodaskError
        If it is not four finite numbers, or the matrix is nearly singular, so that positions would fall on one line.

    Examples
    --------
    >>> as_matrix((0, 1, -1, 0)) @ np.array([3.0, 4.0])
    array([ 4., -3.])
    """
    values = np.asarray(affine)
    if values.shape != (4,) or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise PtychodaskError(f"ingest: affine is {affine!r}, expected four numbers (a, b, c, d)")
    matrix = values.astype(np.float64).reshape(2, 2)
    if np.linalg.cond(matrix) > MOST_SHEARED:
        raise PtychodaskError(
            f"ingest: affine is {tuple(values.tolist())}, which is singular or nearly so: positions would fall on "
            "one line; pass a matrix that can be inverted"
        )
    return matrix


class Frames(Protocol):
    """Frames of a file (pattern, h, w).

    They can always be read in order, and in any order if `random_access` is True.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def random_access(self) -> bool: ...

    @property
    def seekable(self) -> bool:
        """True if frames can be read without reading all frames before them."""

    def blocks(self) -> Iterator[NDArray[Any]]:
        """All frames in order, a block of about `BLOCK_BYTES` at a time."""

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        """Frames at an integer array of rows; only if seekable."""


class Container(Protocol):
    """A file of named arrays."""

    @property
    def label(self) -> str:
        """Name of the file, for messages."""

    def keys(self) -> list[str]:
        """Names of the arrays."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array."""

    def dtype(self, key: str) -> np.dtype[Any]:
        """Type of an array's values, in native byte order."""

    def has(self, key: str) -> bool:
        """True if the key is an array or a link to one."""

    def unit(self, key: str) -> str | None:
        """Unit that the file records for an array."""

    def text(self, key: str) -> str | None:
        """Text of a scalar string; None for any other array."""

    def numbers(self, key: str) -> dict[str, float]:
        """Scalar attributes of an array, or of the file for ""."""

    def array(self, key: str) -> NDArray[Any]:
        """A small array, read at once."""

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        """Frames (pattern, h, w) of an array.

        The array is (pattern, h, w), or with `pattern_last` (h, w, pattern), after leading and trailing axes of length
        1 are removed. With `raster` it may also be (row, column, h, w), which is read row after row.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceScan:
    """Content of a foreign file, on its grid and in its order."""

    frames: Frames
    """Patterns (pattern, h, w)."""

    position_yx: NDArray[np.float64]
    """Positions (pattern, 2), (y, x), +y down and +x right, in `unit`."""

    unit: Unit
    """Unit of the positions; "px" are object pixels of the file's grid."""

    domain: Domain
    """Unit of the patterns."""

    dc: Dc
    """Pixel of the direct beam in a frame."""

    calibration: Calibration
    """Scale of the probe in the file, unless the user passes another."""

    probe: NDArray[np.complex64] | None = None
    """Probe (mode, h, w), centred on [h//2, w//2]."""

    mask: NDArray[np.bool_] | None = None
    """True where a detector pixel is good (h, w), with `dc` as in the frames."""

    object: NDArray[np.complex64] | None = None
    """The known object (y, x), with pixel [0, 0] at position (0, 0)."""

    label: Frames | None = None
    """Supervised labels (pattern, h, w)."""

    flux: NDArray[np.float64] | None = None
    """Incident flux of each pattern (pattern,), relative."""

    scan_index: NDArray[np.int64] | None = None
    """Experiment of each pattern (pattern,)."""

    rows: NDArray[np.int64] | None = None
    """Frames that have a position, ascending; all by default. Positions of the others are NaN."""

    optics: Mapping[str, float] = field(default_factory=dict)
    """Values in the file for `energy_ev`, `wavelength_m`, `distance_m` and `detector_pixel_m`."""

    pixel_size_m: float | None = None
    """Size of an object pixel on the file's grid, metres, if the file records it."""

    pixel_aspect: float = 1.0
    """Height of a detector pixel over its width."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Description of the scan in the file, which the provenance records."""


def apply_flips(position_yx: NDArray[np.float64], spec: IngestSpec) -> NDArray[np.float64]:
    """Positions (pattern, 2) after `swap_xy` and the flips.

    Examples
    --------
    >>> apply_flips(np.array([[1.0, 2.0]]), IngestSpec(swap_xy=True, flip_y=True))
    array([[-2.,  1.]])
    """
    position_yx = position_yx[:, ::-1] if spec.swap_xy else position_yx
    return position_yx * np.array([-1.0 if spec.flip_y else 1.0, -1.0 if spec.flip_x else 1.0])


def require_keys(container: Container, keys: Sequence[str]) -> None:
    """Raise `PtychodaskError` if the file lacks a key, listing its keys."""
    available = container.keys()
    missing = [key for key in keys if key not in available]
    if missing:
        raise missing_key(container, missing[0])


def missing_key(container: Container, key: str) -> PtychodaskError:
    """Error for a missing key, which lists the keys of the file."""
    return PtychodaskError(
        f"{container.label}: key {key!r} is missing; keys found: {listed_keys(container.keys())}; "
        "map the file's keys with keys= (--key diffraction=... --key y=... --key x=...)"
    )


def listed_keys(keys: Sequence[str]) -> str:
    """Keys of a file in one line, cut after the first 30."""
    if not keys:
        return "(none)"
    return ", ".join(" ".join(key.split()) for key in keys[:30]) + (
        f", ... ({len(keys)} in all)" if len(keys) > 30 else ""
    )


def frame_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape without leading and trailing axes of length 1.

    Only as many are removed as leave three axes.

    Examples
    --------
    >>> frame_axes((1, 516, 128, 128)), frame_axes((9, 64, 64, 1)), frame_axes((9, 64, 64, 4))
    ((516, 128, 128), (9, 64, 64), (9, 64, 64, 4))
    """
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def raster_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a raster; None for other shapes.

    Examples
    --------
    >>> raster_shape((12, 9, 64, 64)), raster_shape((108, 1, 64, 64)), raster_shape((108, 64, 64))
    ((12, 9), (108, 1), None)
    """
    axes = frame_axes(shape)
    # (group, h, w, member) is input of a network, no raster.
    is_grouped = len(axes) == 4 and axes[1] == axes[2] != axes[3]
    return (axes[0], axes[1]) if len(axes) == 4 and not is_grouped else None


def pattern_axes(shape: tuple[int, ...], label: str, *, last: bool) -> tuple[int, ...]:
    """Shape (pattern, h, w) of an array.

    With `last` the array is stored (h, w, pattern).

    Raises
    ------
    PtychodaskError
        If it has not three axes, or one of them is 0.

    Examples
    --------
    >>> pattern_axes((64, 48, 1500), "scan.npz", last=True)
    (1500, 64, 48)
    """
    axes = frame_axes(shape)
    if len(axes) != 3 or 0 in axes:
        raise PtychodaskError(f"{label}: has shape {shape}, expected (pattern, qy, qx), none of them 0")
    return (axes[2], *axes[:2]) if last else axes


def pattern_axis_is_last(shape: tuple[int, ...], n_positions: int, axes: Axes | None, label: str) -> bool:
    """True if patterns are stored (h, w, pattern).

    Decided by `axes` if given, else by the number of positions.

    Parameters
    ----------
    shape : tuple of int
        Shape of the patterns, three axes.
    n_positions : int
        Number of positions.
    axes : Axes, optional
        Order of the axes that the user passes.
    label : str
        Name of the file, for messages.

    Raises
    ------
    PtychodaskError
        If there are not three axes, or both orders fit and `axes` is not given.

    Examples
    --------
    >>> pattern_axis_is_last((64, 64, 1500), 1500, None, "scan.npz")
    True
    """
    if len(shape) != 3:
        raise PtychodaskError(
            f"{label}: patterns have shape {shape}, expected (pattern, qy, qx); reshape them in the file"
        )
    if axes is not None:
        return axes == "qy,qx,pattern"
    first, last = shape[0] == n_positions, shape[2] == n_positions
    if first and last:
        raise PtychodaskError(
            f"{label}: patterns of shape {shape} with {n_positions} positions fit two orders of axes; "
            "pass axes='pattern,qy,qx' or axes='qy,qx,pattern' (--axes)"
        )
    return last and not first


def as_probe(values: NDArray[Any], label: str) -> NDArray[np.complex64]:
    """Probe as complex64 (mode, h, w).

    From (h, w), (mode, h, w) or square (h, w, mode), with axes of length 1 anywhere.
    """
    probe = np.squeeze(values)
    if probe.ndim == 2:
        probe = probe[None]
    elif probe.ndim == 3 and probe.shape[0] == probe.shape[1] != probe.shape[2]:
        probe = np.moveaxis(probe, -1, 0)
    if probe.ndim != 3 or not probe.size or probe.dtype.kind not in "cfiu":
        raise PtychodaskError(
            f"{label}: the probe has shape {values.shape} and type {values.dtype}, "
            "expected complex (mode, h, w) or (h, w)"
        )
    return np.ascontiguousarray(probe, dtype=np.complex64)


def as_mask(values: NDArray[Any], label: str) -> NDArray[np.bool_]:
    """Mask from booleans or integers, True (or not 0) where good."""
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise PtychodaskError(
            f"{label}: the mask has shape {values.shape} and type {values.dtype}, "
            "expected bool (h, w), True where a pixel is good"
        )
    return values.astype(bool)


def as_vector(values: NDArray[Any], label: str) -> NDArray[np.float64]:
    """Numbers as float64 (n,), without axes of length 1."""
    if values.dtype.kind not in "iuf" or values.size != max(values.shape, default=1):
        raise PtychodaskError(
            f"{label}: values have shape {values.shape} and type {values.dtype}, expected one number for each pattern"
        )
    return values.reshape(-1).astype(np.float64)


def as_whole_numbers(values: NDArray[Any], label: str) -> NDArray[np.int64]:
    """Integers as int64 (n,), from integers or floats."""
    vector = as_vector(values, label)
    if not np.isfinite(vector).all() or (vector != np.rint(vector)).any():
        raise PtychodaskError(f"{label}: values are not whole numbers, expected one for each pattern")
    return vector.astype(np.int64)
