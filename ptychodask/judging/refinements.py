"""Record of the refinement of a result.

Stages and their misfit, the slow phase that was added, and the shifts of positions. Attributes come with a store that
anyone may have written, so an entry of another kind counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from ptychodask.errors import PtychodaskError
from ptychodask.result import recorded
from ptychodask.scan import Scan
from ptychodask.storage.records import as_text

STITCHED, SLOW_PHASE = "stitched", "slow_phase"
"""Recorded names of the stage before all refinement, and of the slow phase; others are sweeps."""

PER_NETWORK = ("model", "plan", "refinement", "polish")
"""Attributes that a result of several networks records by the label of the network."""

MOST_STAGES = 100
"""Stages that are read from a record, at most."""

PLAIN = "none"
"""Description of a result that was not refined."""


@dataclass(frozen=True)
class Stage:
    """One stage of a refinement, and the object's misfit after it."""

    name: str
    """`STITCHED`, `SLOW_PHASE`, ``sweep 1``, ..."""

    misfit: float
    """Misfit of the judges, in the unit of `Refinement.measure`; NaN if not recorded."""

    r_factor: float
    """R of the patterns; NaN if not recorded."""

    kept: bool
    """False if the stage did not lower the judges' misfit, so that its change was discarded."""

    @property
    def title(self) -> str:
        """Name for figures and text."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Refinement:
    """Stages of a refinement, from the stitched object on."""

    stages: tuple[Stage, ...] = ()
    """In their order; empty if nothing was refined."""

    n_judges: int = 0
    """Patterns that judged and took no part."""

    measure: str = "misfit"
    """Unit of the misfit: Poisson deviance or squared amplitude."""

    left_out: str | None = None
    """Reason why the automatic refinement could not apply."""

    @property
    def relative_misfit(self) -> NDArray[np.float64]:
        """Misfit after each stage (stage,), relative to the first that is recorded."""
        misfit = np.array([stage.misfit for stage in self.stages], np.float64)
        known = misfit[np.isfinite(misfit)]
        return misfit / known[0] if known.size and known[0] > 0 else np.full(misfit.shape, np.nan)

    @property
    def steps(self) -> tuple[str, ...]:
        """Kept changes of the object: slow phase, number of sweeps."""
        kept = [stage.name for stage in self.stages if stage.kept and stage.name != STITCHED]
        n_sweeps = sum(name != SLOW_PHASE for name in kept)
        sweeps = f"{n_sweeps} sweep{'s' if n_sweeps > 1 else ''}"
        return (*(["slow phase"] if SLOW_PHASE in kept else []), *([sweeps] if n_sweeps else []))


def refinement_of(attributes: Mapping[str, Any]) -> Refinement:
    """Refinement that the attributes of a result of one method record.

    Parameters
    ----------
    attributes : dict
        Of a result: ``refinement`` with a list ``stages``, or of version 0.1: ``refinement`` with ``slow_phase`` and
        ``polish`` with ``r_factor``.

    Returns
    -------
    Refinement
        Without stages if the attributes record none.

    Examples
    --------
    >>> stages = [{"stage": "stitched", "misfit": 9.0}, {"stage": "sweep 1", "misfit": 8.0, "kept": True}]
    >>> refinement_of({"refinement": {"stages": stages, "n_judges": 4}}).steps
    ('1 sweep',)
    """
    record = recorded(attributes, "refinement")
    entries = recorded(record, "stages") if isinstance(record, Mapping) else None
    stages = _stages(entries) if isinstance(entries, list) else _stages_before_judged_sweeps(attributes)
    n_judges, measure, left_out = (
        recorded(attributes, "refinement", key) for key in ("n_judges", "measure", "left_out")
    )
    if not isinstance(n_judges, int):
        n_judges = recorded(attributes, "refinement", "slow_phase", "n_judges")
    return Refinement(
        stages,
        n_judges=n_judges if isinstance(n_judges, int) else 0,
        measure=measure.replace("poisson", "Poisson") if isinstance(measure, str) else Refinement.measure,
        left_out=left_out if isinstance(left_out, str) else None,
    )


def _stages(entries: list[Any]) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            entry["stage"],
            misfit=_number(entry.get("misfit")),
            r_factor=_number(entry.get("r_factor")),
            kept=entry.get("kept", True) is True,
        )
        for entry in entries[:MOST_STAGES]
        if isinstance(entry, Mapping) and isinstance(entry.get("stage"), str)
    )


def _stages_before_judged_sweeps(attributes: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Stages of results that record sweeps by their R only."""
    slow, r_factors = recorded(attributes, "refinement", SLOW_PHASE), recorded(attributes, "polish", "r_factor")
    slow = slow if isinstance(slow, Mapping) else None
    r_factors = [_number(value) for value in r_factors] if isinstance(r_factors, list) else []
    if slow is None and not r_factors:
        return ()
    r_before, *r_after = r_factors or [math.nan]
    sweeps = [Stage(f"sweep {k}", math.nan, value, kept=True) for k, value in enumerate(r_after, start=1)]
    if slow is None:
        return Stage(STITCHED, math.nan, r_before, kept=True), *sweeps
    before, after = (_number(slow.get(name)) for name in ("misfit_before", "misfit_after"))
    kept = slow.get("kept") is True
    stitched = Stage(STITCHED, before, math.nan if kept else r_before, kept=True)
    return stitched, Stage(SLOW_PHASE, after, r_before if kept else math.nan, kept=kept), *sweeps


def _number(value: Any) -> float:
    """Finite number, else NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return float(value) if is_number else math.nan


def refinement_text(attributes: Mapping[str, Any]) -> str:
    """Refinement that was applied to an object, in a few words.

    Parameters
    ----------
    attributes : dict
        Of a result of one method.

    Examples
    --------
    >>> refinement_text({"polish": {"r_factor": [0.2, 0.1, 0.09]}, "spec": {"refine_flux": True}})
    '2 sweeps, flux'
    >>> refinement_text({})
    'none'
    """
    options = [name for name in ("positions", "flux") if recorded(attributes, "spec", f"refine_{name}") is True]
    return ", ".join([*refinement_of(attributes).steps, *options]) or PLAIN


def attributes_of_network(attributes: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Attributes of a result, of several networks only those of one.

    Parameters
    ----------
    attributes : dict
        Of a result.
    network : str
        Label of the network.

    Examples
    --------
    >>> attributes_of_network({"networks": ["a", "b"], "model": {"a": 1, "b": 2}, "store": "x"}, "b")
    {'networks': 'b', 'model': 2, 'store': 'x'}
    """
    if not isinstance(recorded(attributes, "networks"), list):
        return dict(attributes)
    by_network = {name: recorded(attributes, name) for name in PER_NETWORK}
    chosen = {
        name: value[network] for name, value in by_network.items() if isinstance(value, Mapping) and network in value
    }
    return {**attributes, **as_text(chosen), "networks": network}


def slow_phase_on(
    attributes: Mapping[str, Any], y_px: NDArray[np.float64], x_px: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Slow phase that a refinement added to the object.

    Parameters
    ----------
    attributes : dict
        Of a result of one method; ``refinement`` holds the phase at nodes, if there are few.
    y_px, x_px : float64 array
        Scan coordinates of rows and columns.

    Returns
    -------
    float64 array (y, x) or None
        Radians, not wrapped, bilinear between nodes; None if the nodes are not recorded or the phase was not kept.

    Examples
    --------
    >>> nodes = {"corner_yx_px": [0, 0], "spacing_px": 4.0, "shape": [2, 2], "phase": [[0.0, 2.0], [0.0, 2.0]]}
    >>> attributes = {"refinement": {"slow_phase": {"kept": True, "nodes": nodes}}}
    >>> slow_phase_on(attributes, np.arange(1.0), np.arange(5.0)).tolist()
    [[0.0, 0.5, 1.0, 1.5, 2.0]]
    """
    slow = recorded(attributes, "refinement", SLOW_PHASE)
    nodes = recorded(slow, "nodes") if isinstance(slow, Mapping) else None
    if not isinstance(nodes, Mapping) or recorded(slow, "kept") is not True:
        return None
    try:
        phase = np.asarray(nodes["phase"], np.float64)
        corner = np.asarray(nodes["corner_yx_px"], np.float64)
        spacing_px = float(nodes["spacing_px"])
    except (KeyError, TypeError, ValueError):
        return None
    if phase.ndim != 2 or corner.shape != (2,) or not spacing_px > 0 or not np.isfinite(phase).all():
        return None
    at = ((axis - first) / spacing_px for axis, first in zip((y_px, x_px), corner, strict=True))
    grid: NDArray[np.float64] = map_coordinates(phase, np.meshgrid(*at, indexing="ij"), order=1, mode="nearest")
    return grid


@dataclass(frozen=True, eq=False)
class AddedPhase:
    """Phase that a refinement added to an object."""

    phase: NDArray[np.float64]
    """float64 (y, x), radians, NaN where unseen."""

    is_slow: bool
    """True for the slow phase, not wrapped; else all that refinement changed, on [-π, π]."""


def added_phase(ds: xr.Dataset) -> AddedPhase | None:
    """Phase that a refinement added to a result.

    Parameters
    ----------
    ds : xarray.Dataset
        A result in memory, of one method.

    Returns
    -------
    AddedPhase or None
        `slow_phase_on`, else the phase between ``object_stitched`` and ``object``, with what sweeps added; None if
        neither is known.
    """
    seen = np.isfinite(ds["object"].values)
    slow = slow_phase_on(ds.attrs, ds["y"].values, ds["x"].values)
    if slow is not None:
        return AddedPhase(np.where(seen, slow, np.nan), is_slow=True)
    if "object_stitched" not in ds:
        return None
    turned = ds["object"].values * np.conj(ds["object_stitched"].values)
    if not np.isfinite(turned).any():
        return None
    centred = np.angle(turned * np.exp(-1j * np.angle(np.nansum(turned))))
    return AddedPhase(np.where(seen, centred, np.nan), is_slow=False)


@dataclass(frozen=True, eq=False)
class Shifts:
    """Positions of a scan, and their shifts by refinement."""

    position_yx_px: NDArray[np.float64]
    """float64 (pattern, 2): positions before, pixels."""

    shift_yx_px: NDArray[np.float64]
    """float64 (pattern, 2): refined minus planned position, pixels."""

    @property
    def rms_px(self) -> float:
        """Root-mean-square length of the shifts, pixels."""
        return float(np.sqrt((self.shift_yx_px**2).sum(axis=1).mean()))


def shifts_of(ds: xr.Dataset, scan: Scan | None = None) -> Shifts | None:
    """Shifts of the positions of a result that refined them.

    Parameters
    ----------
    ds : xarray.Dataset
        A result, with ``position_refined_yx_px`` (pattern, 2).
    scan : Scan, optional
        The scan that it was made from: its positions are those before, unless the result has ``position_yx_px``.

    Returns
    -------
    Shifts or None
        Patterns whose position is not finite, as dropped ones, left out; None without refined positions, or if those
        before are unknown.

    Raises
    ------
    PtychodaskError
        If the scan has another number of patterns.
    """
    if "position_refined_yx_px" not in ds:
        return None
    refined = np.asarray(ds["position_refined_yx_px"].values, np.float64)
    if "position_yx_px" in ds:
        before = np.asarray(ds["position_yx_px"].values, np.float64)
    elif scan is not None:
        before = scan.position_yx_px
    else:
        return None
    if before.shape != refined.shape:
        raise PtychodaskError(
            f"the result has {len(refined)} refined positions, but {getattr(scan, 'store', None) or 'the scan'} has "
            f"{len(before)} patterns; pass the scan that it was made from"
        )
    finite = np.isfinite(refined).all(axis=1) & np.isfinite(before).all(axis=1)
    return Shifts(before[finite], (refined - before)[finite]) if finite.any() else None
