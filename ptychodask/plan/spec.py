"""Options of a reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.grouping import GroupingSpec, experiment_number
from ptychodask.models.contract import Device
from ptychodask.models.spec import Precision
from ptychodask.options import check_types, option
from ptychodask.probes import Window

NOWHERE = 2**40
"""Coordinate outside of every object, pixels."""


MIB = 2**20


OnError = Literal["raise", "skip"]
"""Stop at patterns or groups that cannot be used, or leave them out."""


Live = bool | str | Path | Callable[[Any], Any] | None
"""Live picture of a run: True for one in a notebook, the path of a PNG, or a function that receives a Dataset."""


LARGEST = {"batch_size": 2**31, "groups_per_chunk": 2**31, "tile": 2**16}
"""Upper limits of fields: a larger number is a typing error, and a larger tile does not fit into a store."""


REFINEMENTS = ("polish", "slow_phase", "refine_positions", "refine_flux")
"""Fields that refine the stitched object."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionSpec:
    """Options of a reconstruction; None means automatic."""

    groups: str | GroupingSpec | None = option(None, help="Name of a stored group table.", planned=True)
    """Name of a stored group table, or its spec; by default the stored table with the model's number of members."""

    window: Window | None = option(None, help="Weights of the pixels of a patch: illumination, uniform or cosine.")
    """Weights of a patch; by default "illumination" for one patch per member, "uniform" for one patch per group."""

    crop: int | None = option(
        None, help="Width in pixels of the central part of each patch that is used.", planned=True
    )
    """Pixels M across the middle of a patch that are used, even; by default N, or 20 for uniform group patches."""

    batch_size: int | None = option(None, help="Groups in one call of the network.", planned=True, timed=True)
    """Groups in one call of the network."""

    groups_per_chunk: int | None = option(None, help="Groups predicted by one task.", planned=True, timed=True)
    """Consecutive groups predicted by one task."""

    tile: int | None = option(None, help="Pixels across a tile of the object.", planned=True)
    """Pixels across one tile of the object."""

    roi: tuple[int, int, int, int] | None = option(
        None, help="Region of interest: y0,y1,x0,x1 in pixels.", planned=True
    )
    """Part of the object to reconstruct, (y0, y1, x0, x1) in pixels of the scan coordinates, ends excluded."""

    roi_m: tuple[float, float, float, float] | None = option(
        None, help="Region of interest in metres: y0,y1,x0,x1, such as 0,2e-6,1e-6,3e-6.", planned=True
    )
    """The same part in metres: pixels with y0 <= ``y_m`` < y1 and x0 <= ``x_m`` < x1. The scan's pixel size must be
    known."""

    drop: Sequence[int] | NDArray[np.integer[Any]] = option(
        (), help="Pattern indices to leave out.", planned=True, one_scan=True
    )
    """Patterns of the store to leave out, of groups (each group that contains one is left out) and of polishing.
    Converted to ascending integers."""

    experiment: int | None = option(
        None,
        help="Number of the experiment to reconstruct, if the scan has several.",
        planned=True,
        timed=True,
        recorded_at_default=False,
    )
    """Experiment (value of ``scan_index``) whose patterns are used, of a store with several: each has an object of its
    own. By default the only one."""

    polish: int | Literal["auto"] = option(
        "auto",
        help="Data-consistency sweeps after stitching: a number, or auto: as many as lower the misfit of patterns that "
        "take no part, 8 at most.",
    )
    """Data-consistency sweeps over the patterns that polish the stitched object. "auto": while they lower the misfit of
    the judges, patterns that take no part; 8 at most. 0: none."""

    slow_phase: bool | Literal["auto"] = option(
        "auto", help="Correct the slowly varying part of the phase after stitching."
    )
    """Correct the slowly varying part of the stitched phase by least squares over a share of the patterns. It is kept
    if it lowers the misfit of the judges. "auto": where it can be; True: refused where it cannot."""

    refine_positions: bool = option(
        False, help="Refine the positions of the patterns together with the object.", recorded_at_default=False
    )
    """Refine the positions of the patterns between sweeps: ``position_refined_yx_px`` in the result."""

    refine_flux: bool = option(
        False, help="Refine the relative flux of the patterns together with the object.", recorded_at_default=False
    )
    """Refine the relative flux of the patterns between sweeps: ``flux_refined`` in the result. It trades against slow
    variations of the transmission."""

    precision: Precision = option(
        "float32", help="Precision of the convolutions: float32, or mixed (bfloat16).", timed=True
    )
    """Precision of the network's convolutions: "mixed" computes them in bfloat16."""

    device: Device = option("any", help="any (default), or gpu: fail if there is no GPU.", changes_result=False)
    """Device of the network: "gpu" raises an error if a worker has no GPU."""

    on_error: OnError = option(
        "raise", help="raise, or skip: leave out unusable patterns and list them in the result.", changes_result=False
    )
    """Handling of unusable patterns and of groups that no worker can predict: "raise" stops and names them, "skip"
    leaves them out and lists them in the attribute ``skipped``."""

    verify: int = option(
        0, help="Number of chunks that a second worker computes again as a check.", changes_result=False, growing=False
    )
    """Number of chunks, drawn at random, that a second worker computes too; the run fails if the two differ."""

    split_half: bool = option(False, help="Also stitch even and odd patterns into two separate objects.")
    """Also stitch the even and the odd patterns separately, in the same pass: ``object_half`` and ``weight_half``.
    By default no group then mixes the two halves."""

    keep_stitched: bool = option(
        False, help="Also keep the object before refinement, as object_stitched.", recorded_at_default=False
    )
    """Also keep the object as stitched, before refinement: ``object_stitched``."""

    pyramid: bool = option(False, help="Add levels of coarser resolution to the result.", changes_result=False)
    """Add coarser levels to the written result (see `open_result`)."""

    cache: str | Path | None = option(
        None,
        help="Store of predicted patches: written by the first run; later runs read it and skip the network.",
        one_scan=True,
        growing=False,
    )
    """Store of predicted patches (float16): filled by the first run; later runs read it instead of predicting."""

    position_yx_px: NDArray[np.float64] | None = option(
        None,
        compare=False,
        help="Corrected positions (y, x), at which cached patches are stitched.",
        flag="--positions",
        one_scan=True,
        growing=False,
    )
    """Corrected positions, float64 (pattern, 2) in the order of the store, at which cached patches are stitched."""

    memory_bytes: int = option(
        1024 * MIB,
        help="Memory in bytes that one task may use, in addition to the network.",
        changes_result=False,
        planned=True,
    )
    """Memory limit of one task, without the network itself; automatic sizes respect it."""

    live: Live = option(None, compare=False, help="PNG preview, updated as tiles finish.", stored=False)
    """Coarse picture that fills in as tiles finish, updated at most twice a second: True displays it in a notebook, a
    path names a PNG that is overwritten, a function receives a Dataset."""

    follow: bool = option(
        False, compare=False, help="Process a growing scan as its segments arrive, until it is finished.", stored=False
    )
    """Follow a growing scan: predict its segments as they are appended, until it is finished."""

    follow_timeout_s: float = option(
        600.0, compare=False, help="With --follow: fail after this many seconds without a new segment.", stored=False
    )
    """Longest wait for a new segment of a followed scan, seconds; infinity waits forever."""

    def __post_init__(self) -> None:
        if not isinstance(self.follow, bool) or not (
            isinstance(self.follow_timeout_s, Real) and self.follow_timeout_s > 0
        ):
            raise PtychodaskError(
                f"reconstruct: follow is {self.follow!r} with follow_timeout_s={self.follow_timeout_s!r}, expected "
                "True or False, and a time above 0 seconds"
            )
        if not (self.live is None or isinstance(self.live, bool | str | Path) or callable(self.live)):
            raise PtychodaskError(
                f"reconstruct: live is {self.live!r}, expected True, the path of a PNG, or a function that receives "
                "a Dataset"
            )
        for name in ("crop", "batch_size", "groups_per_chunk", "tile", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise PtychodaskError(f"reconstruct: {name} is {value!r}, expected an integer of at least 1")
            if value is not None and int(value) > LARGEST.get(name, int(value)):
                raise PtychodaskError(f"reconstruct: {name} is {value}, expected at most {LARGEST[name]}")
        if self.crop is not None and self.crop % 2:
            raise PtychodaskError(f"reconstruct: crop is {self.crop}, expected an even number; pass {self.crop + 1}")
        if self.window is not None:
            check_choice("window", self.window, get_args(Window), "reconstruct")
        if self.groups is not None and not isinstance(self.groups, str | GroupingSpec):
            raise PtychodaskError(f"reconstruct: groups is {self.groups!r}, expected a name or a GroupingSpec")
        if self.roi is not None:
            _check_roi(self.roi)
        if self.roi_m is not None:
            _check_roi_m(self.roi_m, self.roi)
        object.__setattr__(self, "drop", _pattern_indices(self.drop))
        if self.experiment is not None:
            object.__setattr__(self, "experiment", experiment_number(self.experiment, "reconstruct"))
        if self.polish != "auto" and (not isinstance(self.polish, Integral) or self.polish < 0):
            raise PtychodaskError(
                f"reconstruct: polish is {self.polish!r}, expected a number of sweeps, an integer of at least 0, or "
                "'auto'"
            )
        for name, kind in (("precision", Precision), ("device", Device), ("on_error", OnError)):
            check_choice(name, getattr(self, name), get_args(kind), "reconstruct")
        if not isinstance(self.verify, Integral) or self.verify < 0:
            raise PtychodaskError(
                f"reconstruct: verify is {self.verify!r}, expected a number of chunks, an integer of at least 0"
            )
        if self.slow_phase != "auto" and not isinstance(self.slow_phase, bool):
            raise PtychodaskError(f"reconstruct: slow_phase is {self.slow_phase!r}, expected 'auto', True or False")
        if self.position_yx_px is not None:
            object.__setattr__(self, "position_yx_px", _as_positions(self.position_yx_px))
        if self.position_yx_px is not None and self.cache is None:
            raise PtychodaskError(
                "reconstruct: position_yx_px without cache=: the network's input uses the stored positions; pass "
                "cache= to stitch cached patches, or ingest with the corrected positions"
            )
        for name in ("refine_positions", "refine_flux"):
            if not isinstance(getattr(self, name), bool):
                raise PtychodaskError(f"reconstruct: {name} is {getattr(self, name)!r}, expected True or False")
            if getattr(self, name) and self.polish != "auto" and self.polish <= 2:
                raise PtychodaskError(
                    f"reconstruct: {name}=True with polish={self.polish}: each step follows two sweeps; pass "
                    "polish='auto', or more than 2"
                )
        if self.position_yx_px is not None:
            self._refuse_refinement("position_yx_px", "the patterns are refined at the stored positions")
        check_types(self, "reconstruct")

    @property
    def refines(self) -> bool:
        """True if the stitched object is refined."""
        return any(getattr(self, name) for name in REFINEMENTS)

    def _refuse_refinement(self, given: str, reason: str) -> None:
        """Raise `PtychodaskError` if a refinement that cannot be is asked for."""
        for name in REFINEMENTS:
            value = getattr(self, name)
            if value and value != "auto":
                raise PtychodaskError(f"reconstruct: {name}={value} with {given}: {reason}; remove one of the two")

    def with_refinement_that_applies(self, *, compute: bool) -> tuple[ReconstructionSpec, str | None]:
        """Spec without automatic refinements that cannot be, and the reason.

        Parameters
        ----------
        compute : bool
            False for a lazy result.

        Raises
        ------
        PtychodaskError
            If one was asked for explicitly.
        """
        reason = None
        if not compute:
            reason = "each stage needs the complete object, and compute=False makes pieces"
            self._refuse_refinement("compute=False", reason)
        elif self.position_yx_px is not None:
            reason = "the patterns are refined at the stored positions, not at position_yx_px"
        if reason is None or not self.refines:
            return self, None
        return replace(self, polish=0, slow_phase=False), reason


def _pattern_indices(drop: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[int, ...]:
    indices = np.asarray(drop)
    if indices.size and (indices.ndim != 1 or indices.dtype.kind not in "iu" or indices.min() < 0):
        raise PtychodaskError(
            f"reconstruct: drop has shape {indices.shape} and type {indices.dtype}, "
            "expected a list of pattern indices, 0 or more"
        )
    # Ascending and unique: the ledger compares the field, and two orders of one list are the same run.
    return tuple(np.unique(indices.astype(np.int64)).tolist())


def _as_positions(given: Any) -> NDArray[np.float64]:
    position = np.asarray(given)
    if position.dtype.kind not in "iuf":
        raise PtychodaskError(f"reconstruct: position_yx_px has type {position.dtype}, expected numbers (pattern, 2)")
    return position.astype(np.float64)


def _check_roi(roi: Any) -> None:
    are_integers = (
        isinstance(roi, Sequence | np.ndarray) and len(roi) == 4 and all(isinstance(value, Integral) for value in roi)
    )
    if not are_integers or roi[0] >= roi[1] or roi[2] >= roi[3]:
        raise PtychodaskError(f"reconstruct: roi is {roi}, expected integers (y0, y1, x0, x1), y0 < y1 and x0 < x1")


def _check_roi_m(roi_m: Any, roi: Any) -> None:
    if roi is not None:
        raise PtychodaskError(f"reconstruct: roi {roi} and roi_m {roi_m} both select the region; pass only one")
    fits = (
        isinstance(roi_m, Sequence | np.ndarray)
        and len(roi_m) == 4
        and all(isinstance(value, Real) and np.isfinite(float(value)) for value in roi_m)
    )
    if not fits or roi_m[0] >= roi_m[1] or roi_m[2] >= roi_m[3]:
        raise PtychodaskError(f"reconstruct: roi_m is {roi_m}, expected metres (y0, y1, x0, x1), y0 < y1 and x0 < x1")


def in_pixels(spec: ReconstructionSpec, pixel_size_m: float | None, label: str) -> ReconstructionSpec:
    """Spec with its region of interest in pixels.

    Parameters
    ----------
    spec : ReconstructionSpec
    pixel_size_m : float or None
        Size of an object pixel.
    label : str
        Name of the scan in messages.

    Raises
    ------
    PtychodaskError
        If the region is in metres and the pixel size is not known, or no pixel's coordinates are inside it.

    Examples
    --------
    >>> in_pixels(ReconstructionSpec(roi_m=(0.0, 3e-8, -1.5e-8, 3e-8)), 1e-8, "scan.zarr").roi
    (0, 3, -1, 3)
    """
    if spec.roi_m is None:
        return spec
    if pixel_size_m is None:
        raise PtychodaskError(
            f"{label}: the pixel size is not known, so roi_m {tuple(spec.roi_m)} cannot be converted; pass roi= in "
            f"pixels, or set it with 'ptychodask set {label} --pixel-size-m SIZE'"
        )
    # Rounded before the ceiling, or the division's error of some 1e-16 would add a row to a region that is an integer
    # number of pixels. Clipped, so that the conversion to integers cannot overflow.
    edges = np.round(np.clip(np.array(spec.roi_m, np.float64) / pixel_size_m, -NOWHERE, NOWHERE), 6)
    y0, y1, x0, x1 = np.ceil(edges).astype(int).tolist()
    if y0 >= y1 or x0 >= x1:
        raise PtychodaskError(
            f"{label}: roi_m {tuple(spec.roi_m)} contains no pixel of {pixel_size_m:g} m; pass a larger region"
        )
    return replace(spec, roi=(y0, y1, x0, x1), roi_m=None)
