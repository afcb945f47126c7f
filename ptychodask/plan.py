"""Everything that is known before a reconstruction runs: chunks of groups, tiles of the object, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.display import card
from ptychodask.grouping import GroupingSpec, check_drop
from ptychodask.models.pretrained import pretrained_for
from ptychodask.models.spec import Precision
from ptychodask.places import parse_location
from ptychodask.prediction import (
    Device,
    ModelReference,
    PatchModel,
    PredictionJob,
    precisions,
    predict_groups,
    recorded_model,
    resolve_model,
)
from ptychodask.reassembly import CANVAS_PIXEL_BYTES, Box, Window
from ptychodask.scan import PtychodaskError, Scan, check_choice, check_positions
from ptychodask.store import GroupTable, ScanReader, group, open_groups, open_or_draw_groups, stored_group_names
from ptychodask.survey import BLOCK_GROUPS, NOWHERE, Survey, survey

MIB = 2**20

BATCH_PIXELS = 2**20
"""Pixels of network input that one automatic batch comes close to."""

BATCH_GROUPS = 256
"""Groups in an automatic batch, at the most."""

CHUNK_PIXELS = 2**24
"""Pixels of network input that one automatic chunk takes, at the most."""

CHUNKS_AT_LEAST = 16
"""Chunks that a scan is cut into where it has groups for as many batches."""

TILES_ACROSS = 16
"""Tiles across the object that an automatic tile comes close to, from `TILE_PIXELS` to four times that."""

TILE_PIXELS = 256
"""Pixels across an automatic tile, at the least."""

GROUP_CROP = 20
"""Elements of a group's patch that a uniform window keeps by default, as PtychoPINN does."""

OnError = Literal["raise", "skip"]
"""What becomes of what cannot be used."""

Live = bool | str | Path | Callable[[Any], Any] | None
"""Where a picture is shown while a run is at work: True in a notebook, a path of a PNG, or what takes a Dataset."""

NOT_STORED = ("live", "follow", "follow_timeout_s")
"""Fields of a `ReconstructionSpec` that say when a run begins and what is seen of it: no result depends on them."""

LARGEST = {"batch_size": 2**31, "groups_per_chunk": 2**31, "tile": 2**16}
"""What fields may be at the most: a larger number is a slip of the hand, and a larger tile fits no store."""

MEASURE_S = 3.0
"""How long a speed is measured at the most, after the network is compiled."""

RESULT_PIXEL_BYTES = 20
"""Bytes of one pixel of a result: object, weight, uncertainty and count."""

TableOfSpec = Callable[[str, GroupingSpec], GroupTable]
"""Group table of a store for a spec: `open_or_draw_groups`, or one that also stores it."""


class RegionNotReachedError(PtychodaskError):
    """No pattern reaches the region of interest: of a scan that grows, another one may."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionSpec:
    """How a scan becomes an object; None stands for automatic."""

    groups: str | GroupingSpec | None = None
    """Name of a stored group table, or the spec of one; by default the stored one with the model's members."""

    window: Window | None = None
    """Weights of a patch; by default "illumination" for a patch per member, "uniform" for a patch per group."""

    crop: int | None = None
    """Elements across the middle of a patch that are used, M, even; by default N, or 20 for uniform group patches."""

    batch_size: int | None = None
    """Groups in one call of the network."""

    groups_per_chunk: int | None = None
    """Consecutive groups that one task predicts."""

    tile: int | None = None
    """Pixels across one tile of the object."""

    roi: tuple[int, int, int, int] | None = None
    """Part of the object to reconstruct, (y0, y1, x0, x1) in pixels of the scan's frame, ends left out."""

    roi_m: tuple[float, float, float, float] | None = None
    """The same part in metres: the pixels whose coordinates ``y_m``, ``x_m`` lie from (y0, x0) on and before (y1, x1).
    Needs a scan whose pixel size is known."""

    drop: Sequence[int] | NDArray[np.integer[Any]] = ()
    """Patterns of the store that are not read; groups that have one of them are left out, and polishing too goes
    without them. Kept as ascending whole numbers."""

    polish: int = 0
    """Data-consistent sweeps over the patterns that the stitched object is polished with."""

    precision: Precision = "float32"
    """Of the network's convolutions: "mixed" computes them in bfloat16."""

    device: Device = "any"
    """What the network must be predicted on: "gpu" makes it an error where a worker sees none."""

    on_error: OnError = "raise"
    """What becomes of patterns that cannot be used and of groups that no worker can predict: "raise" stops with their
    names, "skip" leaves them out and lists them in the attribute ``skipped``."""

    verify: int = 0
    """Chunks, drawn at random, that another worker computes again; where both disagree, the run fails."""

    split_half: bool = False
    """Stitch every other pattern apart as well, in the same pass: ``object_half`` and ``weight_half``. Groups are then
    by default drawn from either half alone."""

    pyramid: bool = False
    """Add coarser levels to the result that is written (see `open_result`)."""

    cache: str | Path | None = None
    """Store of predicted patches (float16): filled by the first run, read in place of the network by later ones."""

    position_yx_px: NDArray[np.float64] | None = field(default=None, compare=False)
    """Corrected positions, float64 (pattern, 2) in the store's order, at which cached patches are stitched."""

    memory_bytes: int = 1024 * MIB
    """Memory that one task may take beside the network itself; automatic sizes keep to it."""

    live: Live = field(default=None, compare=False)
    """A coarse picture that fills in while tiles finish: True shows it in a notebook, a path is that of a PNG which is
    replaced, and a function gets it as a Dataset, at most twice a second."""

    follow: bool = field(default=False, compare=False)
    """Keep up with a scan that grows: predict its segments as they come, until it is finished."""

    follow_timeout_s: float = field(default=600.0, compare=False)
    """How long a scan that is followed may go without a new segment, seconds; infinity waits for ever."""

    def __post_init__(self) -> None:
        if not isinstance(self.follow, bool) or not (
            isinstance(self.follow_timeout_s, Real) and self.follow_timeout_s > 0
        ):
            raise PtychodaskError(
                f"reconstruct: follow is {self.follow!r} with follow_timeout_s={self.follow_timeout_s!r}, expected "
                "True or False, and a time above 0"
            )
        if not (self.live is None or isinstance(self.live, bool | str | Path) or callable(self.live)):
            raise PtychodaskError(
                f"reconstruct: live is {self.live!r}, expected True, the path of a PNG, or a function that takes the "
                "picture as a Dataset"
            )
        for name in ("crop", "batch_size", "groups_per_chunk", "tile", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise PtychodaskError(f"reconstruct: {name} is {value!r}, expected a whole number from 1 on")
            if value is not None and int(value) > LARGEST.get(name, int(value)):
                raise PtychodaskError(f"reconstruct: {name} is {value}, expected {LARGEST[name]} at the most")
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
        if not isinstance(self.polish, Integral) or self.polish < 0:
            raise PtychodaskError(
                f"reconstruct: polish is {self.polish!r}, expected a whole number of sweeps, 0 or more"
            )
        for name, kind in (("precision", Precision), ("device", Device), ("on_error", OnError)):
            check_choice(name, getattr(self, name), get_args(kind), "reconstruct")
        if not isinstance(self.verify, Integral) or self.verify < 0:
            raise PtychodaskError(
                f"reconstruct: verify is {self.verify!r}, expected a whole number of chunks, 0 or more"
            )
        if self.polish and self.split_half:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with split_half=True: sweeps join the halves; leave one away"
            )
        if self.position_yx_px is not None:
            object.__setattr__(self, "position_yx_px", _as_positions(self.position_yx_px))
        if self.position_yx_px is not None and self.cache is None:
            raise PtychodaskError(
                "reconstruct: position_yx_px without cache=: a network reads offsets between the positions that are "
                "stored; name a cache of patches, or ingest with the corrected positions"
            )
        if self.polish and self.position_yx_px is not None:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with position_yx_px: sweeps take the stored positions; "
                "ingest with the corrected ones"
            )
        if self.polish and self.roi is not None:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with roi {self.roi}: patterns at its rim reach beyond it; "
                "polish the whole object and select from it"
            )


def _pattern_indices(drop: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[int, ...]:
    found = np.asarray(drop)
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0):
        raise PtychodaskError(
            f"reconstruct: drop has shape {found.shape} and type {found.dtype}, expected indices of patterns, 0 or more"
        )
    return tuple(np.unique(found.astype(np.int64)).tolist())


def _as_positions(given: Any) -> NDArray[np.float64]:
    found = np.asarray(given)
    if found.dtype.kind not in "iuf":
        raise PtychodaskError(f"reconstruct: position_yx_px has type {found.dtype}, expected numbers (pattern, 2)")
    return found.astype(np.float64)


def _check_roi(roi: Any) -> None:
    whole = (
        isinstance(roi, Sequence | np.ndarray) and len(roi) == 4 and all(isinstance(value, Integral) for value in roi)
    )
    if not whole or roi[0] >= roi[1] or roi[2] >= roi[3]:
        raise PtychodaskError(f"reconstruct: roi is {roi}, expected whole pixels (y0, y1, x0, x1), y0 < y1 and x0 < x1")


def _check_roi_m(roi_m: Any, roi: Any) -> None:
    if roi is not None:
        raise PtychodaskError(f"reconstruct: roi {roi} and roi_m {roi_m} say the same thing; pass one of them")
    fits = (
        isinstance(roi_m, Sequence | np.ndarray)
        and len(roi_m) == 4
        and all(isinstance(value, Real) and np.isfinite(float(value)) for value in roi_m)
    )
    if not fits or roi_m[0] >= roi_m[1] or roi_m[2] >= roi_m[3]:
        raise PtychodaskError(f"reconstruct: roi_m is {roi_m}, expected metres (y0, y1, x0, x1), y0 < y1 and x0 < x1")


def in_pixels(spec: ReconstructionSpec, pixel_size_m: float | None, label: str) -> ReconstructionSpec:
    """A spec whose region of interest is in pixels.

    Parameters
    ----------
    spec : ReconstructionSpec
    pixel_size_m : float or None
        Of the scan's object.
    label : str
        The scan, for messages.

    Raises
    ------
    PtychodaskError
        If the region is in metres and the pixel size is not known, or no pixel's coordinates lie in it.

    Examples
    --------
    >>> in_pixels(ReconstructionSpec(roi_m=(0.0, 3e-8, -1.5e-8, 3e-8)), 1e-8, "scan.zarr").roi
    (0, 3, -1, 3)
    """
    if spec.roi_m is None:
        return spec
    if pixel_size_m is None:
        raise PtychodaskError(
            f"{label}: the size of a pixel is not known, so roi_m {tuple(spec.roi_m)} tells no place; pass roi= in "
            "pixels, or ingest with pixel_size_m= (--pixel-size-m)"
        )
    # A whole number of pixels in metres is whole again: division leaves some 1e-16 of it.
    edges = np.round(np.clip(np.array(spec.roi_m, np.float64) / pixel_size_m, -NOWHERE, NOWHERE), 6)
    y0, y1, x0, x1 = np.ceil(edges).astype(int).tolist()
    if y0 >= y1 or x0 >= x1:
        raise PtychodaskError(
            f"{label}: roi_m {tuple(spec.roi_m)} has no pixel in it, of {pixel_size_m:g} m; pass a larger one"
        )
    return replace(spec, roi=(y0, y1, x0, x1), roi_m=None)


@dataclass(frozen=True)
class Chunk:
    """Consecutive groups that one task predicts."""

    start: int
    """First row of the group table."""

    stop: int
    """Row after the last."""

    box: Box
    """Where their patches lie, cut to the object."""


@dataclass(frozen=True)
class Tile:
    """Part of the object that one task reassembles."""

    box: Box
    """Where it lies."""

    chunks: tuple[int, ...]
    """Indices of the chunks that touch it, ascending: the order in which they are merged."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a reconstruction will do; prints as a table."""

    store: str
    """Path of the store."""

    data_hash: str
    """Its data hash."""

    groups: str
    """Name of the group table."""

    groups_hash: str
    """SHA-256 of that table."""

    members: int
    """Patterns in one group, C."""

    n_pixels: int
    """Pixels across a pattern, N."""

    output: Literal["member", "group"]
    """A patch for each member, or one for the group."""

    window: Window
    crop: int
    batch_size: int
    groups_per_chunk: int
    tile: int
    memory_bytes: int

    n_groups: int
    """Groups that are predicted."""

    n_patterns: int
    """Patterns that are read, each counted once."""

    box: Box
    """The object."""

    chunks: tuple[Chunk, ...]
    """In the order of the group table."""

    tiles: tuple[Tile, ...]
    """Row by row; they cover the object."""

    predict_bytes: int
    """Memory of the largest task that predicts, beside the network."""

    reassemble_bytes: int
    """Memory of the largest task that reassembles."""

    read_amplification: float
    """Patterns that are decompressed for each that is read once: stored chunks are read whole, rims more than once."""

    groups_per_s: float | None = None
    """Measured speed of one process, reading included; None where it was not asked for."""

    def summary(self) -> dict[str, Any]:
        """The plan's sizes as plain values."""
        return {
            "groups": self.groups,
            "groups_hash": self.groups_hash,
            "window": self.window,
            "crop": self.crop,
            "batch_size": self.batch_size,
            "groups_per_chunk": self.groups_per_chunk,
            "tile": self.tile,
            "n_groups": self.n_groups,
            "n_patterns": self.n_patterns,
            "n_chunks": len(self.chunks),
            "n_tiles": len(self.tiles),
            "box": list(self.box),
            "predict_bytes": self.predict_bytes,
            "reassemble_bytes": self.reassemble_bytes,
            "read_amplification": self.read_amplification,
        }

    def __repr__(self) -> str:
        height, width = self.box.shape
        return (
            f"Plan({self.store}: {self.n_groups:,} groups in {len(self.chunks):,} chunks, "
            f"{len(self.tiles):,} tiles over {height:,} x {width:,} px)"
        )

    def __str__(self) -> str:
        return "\n".join(f"{name:<11} {value}" for name, value in self._in_words().items())

    def _repr_html_(self) -> str:
        return card("Plan of a reconstruction", self._in_words())

    def _in_words(self) -> dict[str, str]:
        most = max(len(tile.chunks) for tile in self.tiles)
        (height, width), budget = self.box.shape, f"of {self.memory_bytes / MIB:,.0f} MiB"
        rows = {
            "store": self.store,
            "groups": f"{self.n_groups:,} of {self.members} from '{self.groups}'",
            "patterns": f"{self.n_patterns:,} of {self.n_pixels} x {self.n_pixels}",
            "window": f"{self.window}, {self.crop} x {self.crop}, a patch per {self.output}",
            "object": f"{height:,} x {width:,} px from (y, x) = {self.box.corner}, "
            f"{self.box.n_pixels * RESULT_PIXEL_BYTES / MIB:,.0f} MiB",
            "read": f"{self.read_amplification:.2f} patterns decompressed for each",
            "predict": f"{len(self.chunks):,} tasks of {self.groups_per_chunk:,} groups, batches of {self.batch_size}",
            "reassemble": f"{len(self.tiles):,} tiles of {self.tile} x {self.tile} px, at most {most} chunks each",
            "memory": f"{self.predict_bytes / MIB:,.1f} MiB to predict, {self.reassemble_bytes / MIB:,.1f} MiB to "
            f"reassemble, {budget} a task",
        }
        if self.groups_per_s is not None:
            rows["time"] = (
                f"about {self.n_groups / self.groups_per_s:,.0f} s in one process, at {self.groups_per_s:,.0f} groups/s"
            )
        return rows


class _Network(NamedTuple):
    members: int
    n_pixels: int
    output: Literal["member", "group"]


def plan(
    store: str | Path,
    model: str | Path | PatchModel | None = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    measure: bool = False,
) -> Plan:
    """What `reconstruct` would do, without doing it.

    Parameters
    ----------
    store : path or ``s3://`` URL
    model : path or model, optional
        By default the one that the store records; a store without any is planned for a patch per member, with the
        group table of the spec.
    spec : ReconstructionSpec
    measure : bool
        Predict for a few seconds in this process, to tell how long it will take.

    Returns
    -------
    Plan

    Raises
    ------
    PtychodaskError
        If the model does not fit the scan, the region lies outside it, or a task would not fit into the memory; or if
        there is no model to measure.

    Notes
    -----
    Sizes follow from the scan, the model and ``spec.memory_bytes``, and not from the number of workers, so the object
    does not depend on where it was made. The store is only read: a group table that is missing is drawn in memory, with
    the rows that `reconstruct` will store.
    """
    reader = ScanReader(store)
    reader.check()
    scan = reader.first()
    spec = in_pixels(spec, scan.pixel_size_m, reader.label)
    known = recorded_model(scan) is not None or pretrained_for(scan.n_pixels) is not None
    if model is None and not measure and (spec.groups is not None or not known):
        table = _as_seen(reader, _default_table(str(store), spec))
        return make_plan(reader, table, _Network(table.spec.members, scan.n_pixels, "member"), spec)
    patch_model = resolve_model(scan, model)
    table, network = _table_and_network(reader, patch_model, spec, open_or_draw_groups)
    planned = make_plan(reader, table, network, spec)
    if not measure:
        return planned
    job = replace(prediction_job(planned, patch_model, scan, spec), member=table.in_memory)
    return replace(planned, groups_per_s=_measured_rate(planned, job))


def prediction_job(planned: Plan, model: PatchModel, scan: Scan, spec: ReconstructionSpec) -> PredictionJob:
    """What the tasks of a plan know of their model and of the scan."""
    return PredictionJob(
        planned.store,
        planned.data_hash,
        planned.groups,
        ModelReference.to(model.bind(scan)),
        planned.batch_size,
        tuple(spec.drop),
        spec.precision,
        spec.device,
        scan.attributes.get("segments", [{}])[0].get("data_hash"),
    )


def _measured_rate(planned: Plan, job: PredictionJob) -> float:
    """Groups per second of this process, compiling left out, reading included."""
    chunk = planned.chunks[0]
    next(predict_groups([job], chunk.start, min(chunk.start + planned.batch_size, chunk.stop), {}))
    n_groups, started = 0, time.perf_counter()
    for chunk in planned.chunks:
        for _, batch in predict_groups([job], chunk.start, chunk.stop, {}):
            n_groups += len(batch.pattern) // (planned.members if planned.output == "member" else 1)
            if time.perf_counter() - started > MEASURE_S:
                return n_groups / (time.perf_counter() - started)
    return n_groups / (time.perf_counter() - started)


def plan_for(reader: ScanReader, model: PatchModel, spec: ReconstructionSpec) -> Plan:
    """Plan of a run on an open store with a loaded model (see `plan`).

    A group table that is missing is stored, since the tasks read its rows from the store.
    """
    table, network = _table_and_network(reader, model, spec, _stored_table)
    return make_plan(reader, table, network, spec)


def plan_together(reader: ScanReader, models: Mapping[str, PatchModel], spec: ReconstructionSpec) -> dict[str, Plan]:
    """Plans of several models that share object, chunks and tiles, so that one pass over the patterns serves all.

    Parameters
    ----------
    reader : ScanReader
    models : dict of label to model
    spec : ReconstructionSpec

    Returns
    -------
    dict of label to Plan
        Each with the bytes of a task that predicts all.

    Raises
    ------
    PtychodaskError
        As `plan`, or if the models' group tables do not follow the same seeds.
    """
    if not models:
        raise PtychodaskError("reconstruct: model is an empty dict, expected a label and a model at least")
    parts = {label: _table_and_network(reader, model, spec, _stored_table) for label, model in models.items()}
    _check_same_seeds(reader, {label: table for label, (table, _) in parts.items()})
    share = replace(spec, memory_bytes=max(1, spec.memory_bytes // len(models)))
    alone = [make_plan(reader, table, network, share) for table, network in parts.values()]
    box = _around(one.box for one in alone)
    common = replace(share, groups_per_chunk=min(one.groups_per_chunk for one in alone), tile=spec.tile or _tile(box))
    plans = {label: make_plan(reader, *part, common, box=box) for label, part in parts.items()}
    chunks = _united(plan.chunks for plan in plans.values())
    tiles = _tiles(box, int(common.tile or 0), chunks)
    n_bytes = sum(one.predict_bytes for one in plans.values())
    return {
        label: replace(one, chunks=chunks, tiles=tiles, predict_bytes=n_bytes, memory_bytes=int(spec.memory_bytes))
        for label, one in plans.items()
    }


def _check_same_seeds(reader: ScanReader, tables: Mapping[str, GroupTable]) -> None:
    (first, table), *others = tables.items()
    for label, other in others:
        blocks = range(0, len(table), BLOCK_GROUPS)
        if len(other) != len(table) or any(
            (other.rows(at, at + BLOCK_GROUPS)[:, 0] != table.rows(at, at + BLOCK_GROUPS)[:, 0]).any() for at in blocks
        ):
            raise PtychodaskError(
                f"{reader.label}: group tables '{table.name}' of {first} and '{other.name}' of {label} do not have the "
                "same seeds, so they cannot share a pass; reconstruct with one model at a time"
            )


def _around(boxes: Iterable[Box]) -> Box:
    """The box that holds all."""
    y0, y1, x0, x1 = zip(*boxes, strict=True)
    return Box(min(y0), max(y1), min(x0), max(x1))


def _united(chunks: Iterable[Sequence[Chunk]]) -> tuple[Chunk, ...]:
    """Chunks of several plans with the same rows, each over the box that holds all of its namesakes."""
    boxes: dict[tuple[int, int], list[Box]] = {}
    for chunk in (chunk for plan_chunks in chunks for chunk in plan_chunks):
        boxes.setdefault((chunk.start, chunk.stop), []).append(chunk.box)
    return tuple(Chunk(start, stop, _around(found)) for (start, stop), found in sorted(boxes.items()))


def _table_and_network(
    reader: ScanReader, model: PatchModel, spec: ReconstructionSpec, table_of_spec: TableOfSpec
) -> tuple[GroupTable, _Network]:
    if model.n_pixels != reader.n_pixels:
        raise PtychodaskError(
            f"{reader.label}: patterns are {reader.n_pixels} pixels wide, the {model.kind} takes {model.n_pixels}; "
            f"ingest with n_pixels={model.n_pixels}, or pass another model"
        )
    if spec.precision not in precisions(model):
        raise PtychodaskError(
            f"reconstruct: precision is {spec.precision!r}, the {model.kind} computes in: "
            f"{', '.join(precisions(model))}; leave precision away"
        )
    halves = spec.split_half and model.members > 1
    table = _as_seen(reader, _table_of(reader.label, spec.groups, model.members, table_of_spec, halves=halves))
    return table, _Network(model.members, model.n_pixels, model.output)


def _as_seen(reader: ScanReader, table: GroupTable) -> GroupTable:
    """A table less the groups of segments that came after the scan was opened."""
    return table.in_segments(len(reader.attributes.get("segments", (None,))))


def _default_table(store: str, spec: ReconstructionSpec) -> GroupTable:
    """The table that the spec names, or the store's only one, or the default spec's."""
    if spec.groups is not None:
        return _named_table(store, spec.groups, open_or_draw_groups)
    names = stored_group_names(store)
    return _named_table(store, names[0] if len(names) == 1 else GroupingSpec(), open_or_draw_groups)


def _stored_table(store: str, spec: GroupingSpec) -> GroupTable:
    """Group table of a spec, which is stored if it is not yet."""
    group(store, spec)
    return open_or_draw_groups(store, spec)


def _named_table(store: str, groups: str | GroupingSpec, table_of_spec: TableOfSpec) -> GroupTable:
    if isinstance(groups, GroupingSpec):
        return table_of_spec(store, groups)
    table = open_groups(store, groups)
    if table is None:
        stored = ", ".join(stored_group_names(store)) or "none"
        raise PtychodaskError(
            f"{store}: no group table '{groups}'; stored are: {stored}; make it with 'ptychodask group'"
        )
    return table


def _table_of(
    store: str, groups: str | GroupingSpec | None, members: int, table_of_spec: TableOfSpec, *, halves: bool
) -> GroupTable:
    """The table that is asked for, or the stored one with the model's members, or the default spec's."""
    if groups is not None:
        found = _named_table(store, groups, table_of_spec)
        if found.spec.members != members:
            raise PtychodaskError(
                f"{store}: group table '{found.name}' has {found.spec.members} patterns in a group, "
                f"the model takes {members}; pass another groups=, or none"
            )
        return found
    default = GroupingSpec(members=members, neighbours=max(GroupingSpec.neighbours, members), halves=halves)
    stored = [table for name in stored_group_names(store) if (table := open_groups(store, name))]
    fitting = [table for table in stored if table.spec.members == members and table.spec.halves == halves]
    if not fitting:
        return table_of_spec(store, default)
    for table in fitting:
        if len(fitting) == 1 or table.spec == default:
            return table
    listed = ", ".join(table.name for table in fitting)
    raise PtychodaskError(f"{store}: several group tables have {members} patterns in a group ({listed}); pass groups=")


def make_plan(
    reader: ScanReader, table: GroupTable, network: _Network, spec: ReconstructionSpec, *, box: Box | None = None
) -> Plan:
    """The plan of a scan, from its positions and group table alone.

    Parameters
    ----------
    reader : ScanReader
    table : GroupTable
    network : (members, n_pixels, output)
    spec : ReconstructionSpec
    box : Box, optional
        The object, where it is not that of these groups alone.

    Returns
    -------
    Plan

    Raises
    ------
    PtychodaskError
        See `plan`.
    """
    check_drop(reader.label, reader.n_patterns, tuple(spec.drop))
    if spec.position_yx_px is not None:
        check_positions(spec.position_yx_px, reader.n_patterns, "position_yx_px")
    window, crop = _window_and_crop(spec, network)
    # A scan that grows keeps the sizes that fit its first segment, so that what is predicted early stays valid.
    batch_size = _batch_size(spec, network, table.segments[0])
    found, chunks, predict_bytes, box = _fitting_chunks(reader, table, network, crop, batch_size, spec, box)
    tile = int(spec.tile or _tile(box))
    tiles = _tiles(box, tile, chunks)
    reassemble_bytes = max(_reassemble_bytes(part, chunks) for part in tiles)
    if reassemble_bytes > spec.memory_bytes:
        raise PtychodaskError(
            f"plan: a tile of {tile} x {tile} px needs {reassemble_bytes / MIB:,.0f} MiB to reassemble, "
            f"a task may take {spec.memory_bytes / MIB:,.0f} MiB; pass a smaller tile=, another groups_per_chunk= "
            f"than {found.size}, or a larger memory_bytes="
        )
    of_plan = np.searchsorted(found.edges, [chunk.start for chunk in chunks])
    n_patterns = int(np.count_nonzero(found.used))
    return Plan(
        store=str(parse_location(reader.label).resolve()),
        data_hash=reader.data_hash,
        groups=table.name,
        groups_hash=found.table_hash,
        members=network.members,
        n_pixels=network.n_pixels,
        output=network.output,
        window=window,
        crop=crop,
        batch_size=batch_size,
        groups_per_chunk=found.size,
        tile=tile,
        memory_bytes=int(spec.memory_bytes),
        n_groups=int(found.n_groups[of_plan].sum()),
        n_patterns=n_patterns,
        box=box,
        chunks=chunks,
        tiles=tiles,
        predict_bytes=predict_bytes,
        reassemble_bytes=reassemble_bytes,
        read_amplification=float(found.n_decompressed[of_plan].sum() / n_patterns),
    )


def _window_and_crop(spec: ReconstructionSpec, network: _Network) -> tuple[Window, int]:
    window: Window = spec.window or ("illumination" if network.output == "member" else "uniform")
    if spec.crop is not None and spec.crop > network.n_pixels:
        raise PtychodaskError(f"reconstruct: crop is {spec.crop}, a patch has {network.n_pixels} pixels; pass fewer")
    if network.output == "group" and window == "uniform":
        return window, int(spec.crop or min(GROUP_CROP, network.n_pixels))
    return window, int(spec.crop or network.n_pixels)


def _object_box(whole: Box, roi: tuple[int, int, int, int] | None, label: str) -> Box:
    """The box that all patches reach, cut to the region that is asked for."""
    if roi is None:
        return whole
    box = whole.overlap(Box(*(int(value) for value in roi)))
    if box.n_pixels == 0:
        raise RegionNotReachedError(f"{label}: roi {roi} does not meet the object, {tuple(whole)} (y0, y1, x0, x1)")
    return box


def _batch_size(spec: ReconstructionSpec, network: _Network, n_groups: int) -> int:
    if spec.batch_size is not None:
        return int(spec.batch_size)
    fitting = BATCH_PIXELS // (network.n_pixels**2 * network.members)
    return int(min(max(1, fitting), BATCH_GROUPS, n_groups, spec.groups_per_chunk or n_groups))


def _groups_per_chunk(network: _Network, batch_size: int, n_groups: int) -> int:
    most = CHUNK_PIXELS // (network.n_pixels**2 * network.members)
    wanted = min(most, -(-n_groups // CHUNKS_AT_LEAST))
    return max(1, -(-wanted // batch_size)) * batch_size


def _tile(box: Box) -> int:
    """A power of two, so that stored chunks divide it."""
    wanted = 2 ** int(np.ceil(np.log2(max(box.shape) / TILES_ACROSS)))
    return min(max(wanted, TILE_PIXELS), 4 * TILE_PIXELS)


def _fitting_chunks(
    reader: ScanReader,
    table: GroupTable,
    network: _Network,
    crop: int,
    batch_size: int,
    spec: ReconstructionSpec,
    box: Box | None,
) -> tuple[Survey, tuple[Chunk, ...], int, Box]:
    """Survey, chunks, the memory of the largest, and the object; chunks are halved until they fit where that is
    automatic."""
    size = int(spec.groups_per_chunk or _groups_per_chunk(network, batch_size, table.segments[0]))
    while True:
        found = survey(
            reader,
            table,
            size=size,
            output=network.output,
            crop=crop,
            drop=tuple(spec.drop),
            position_yx_px=spec.position_yx_px,
            region=None if spec.roi is None else Box(*(int(value) for value in spec.roi)),
        )
        if not found.n_groups.any():
            raise PtychodaskError(
                f"{reader.label}: each of the {len(table)} groups of '{table.name}' has one of the {len(spec.drop)} "
                "patterns to drop; drop fewer"
            )
        object_box = _object_box(found.whole, spec.roi, reader.label) if box is None else box
        chunks, n_bytes = _chunks(reader, found, network, object_box, batch_size, spec)
        if not chunks:
            raise RegionNotReachedError(f"{reader.label}: no pattern reaches roi {spec.roi}; pass another one")
        if max(n_bytes) <= spec.memory_bytes:
            return found, chunks, max(n_bytes), object_box
        if spec.groups_per_chunk is not None or size == 1:
            break
        size //= 2
    chunk = chunks[int(np.argmax(n_bytes))]
    raise PtychodaskError(
        f"plan: groups {chunk.start}..{chunk.stop - 1}, over {chunk.box.shape[0]} x {chunk.box.shape[1]} px, need "
        f"{max(n_bytes) / MIB:,.1f} MiB, a task may take {spec.memory_bytes / MIB:,.1f} MiB; pass "
        f"groups_per_chunk= below {chunk.stop - chunk.start}, a smaller batch_size=, or a larger memory_bytes="
    )


def _chunks(
    reader: ScanReader,
    found: Survey,
    network: _Network,
    box: Box,
    batch_size: int,
    spec: ReconstructionSpec,
) -> tuple[tuple[Chunk, ...], list[int]]:
    """Chunks that meet the object, and the memory that predicting each of them takes."""
    batch_bytes = batch_size * network.members * network.n_pixels**2 * (2 * 4 + 2 * 8)
    pattern_bytes = network.n_pixels**2 * (reader.pattern_itemsize + 4)
    canvas_bytes = CANVAS_PIXEL_BYTES * (2 if spec.split_half else 1)
    chunks, n_bytes = [], []
    for index in np.flatnonzero(found.n_groups).tolist():
        own = found.box(index).overlap(box)
        if own.n_pixels:
            chunks.append(Chunk(int(found.edges[index]), int(found.edges[index + 1]), own))
            n_bytes.append(int(found.n_patterns[index]) * pattern_bytes + batch_bytes + own.n_pixels * canvas_bytes)
    return tuple(chunks), n_bytes


def _tiles(box: Box, tile: int, chunks: tuple[Chunk, ...]) -> tuple[Tile, ...]:
    """Tiles that cover the object, row by row, each with the chunks whose boxes touch it."""
    n_rows, n_columns = (-(-side // tile) for side in box.shape)
    touching: list[list[int]] = [[] for _ in range(n_rows * n_columns)]
    for index, chunk in enumerate(chunks):
        for row in range((chunk.box.y0 - box.y0) // tile, (chunk.box.y1 - 1 - box.y0) // tile + 1):
            for column in range((chunk.box.x0 - box.x0) // tile, (chunk.box.x1 - 1 - box.x0) // tile + 1):
                touching[row * n_columns + column].append(index)
    tiles = []
    for place, indices in enumerate(touching):
        y, x = box.y0 + place // n_columns * tile, box.x0 + place % n_columns * tile
        tiles.append(Tile(Box(y, y + tile, x, x + tile).overlap(box), tuple(indices)))
    return tuple(tiles)


def _reassemble_bytes(tile: Tile, chunks: tuple[Chunk, ...]) -> int:
    canvases = sum(chunks[index].box.n_pixels for index in tile.chunks)
    return canvases * CANVAS_PIXEL_BYTES + tile.box.n_pixels * (CANVAS_PIXEL_BYTES + RESULT_PIXEL_BYTES)
