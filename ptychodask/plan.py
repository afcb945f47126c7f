"""Plan of a reconstruction: chunks of groups, tiles of the object, memory.

One pass over the group table and the positions (`survey`) finds the part of the object that each chunk of groups
reaches, the patterns that it reads and the memory that its task needs. Automatic chunks are halved until the largest
task fits; tiles then divide the object, each with the chunks that reach it. All sizes follow from scan, model and spec,
never from the workers: any cluster computes the same bits, and a resumed run finds the chunks of the earlier one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.grouping import GroupingSpec, check_drop
from ptychodask.html import card
from ptychodask.models.choose import recorded_model, resolve_model
from ptychodask.models.contract import Device, PatchModel
from ptychodask.models.pretrained import pretrained_for
from ptychodask.models.spec import Precision
from ptychodask.prediction import ModelReference, PredictionJob, precisions, predict_groups
from ptychodask.reassembly import CANVAS_PIXEL_BYTES, Box, Window
from ptychodask.scan import Scan, check_positions
from ptychodask.storage.location import parse_location
from ptychodask.store import ScanReader
from ptychodask.store.groups import GroupTable, group, open_groups, open_or_draw_groups, stored_group_names
from ptychodask.survey import BLOCK_GROUPS, NOWHERE, Survey, survey

MIB = 2**20

BATCH_PIXELS = 2**20
"""Approximate pixels of network input in one automatic batch."""

BATCH_GROUPS = 256
"""Groups in an automatic batch, at most."""

CHUNK_PIXELS = 2**24
"""Pixels of network input in one automatic chunk, at most."""

CHUNKS_AT_LEAST = 16
"""Automatic chunks of a scan, at least, if it has a batch of groups for each of them."""

TILES_ACROSS = 16
"""Approximate number of automatic tiles across the object; a tile has `TILE_PIXELS` to four times as many pixels."""

TILE_PIXELS = 256
"""Pixels across an automatic tile, at least."""

GROUP_CROP = 20
"""Pixels across the middle of a group's patch that a uniform window keeps by default, as in PtychoPINN."""

OnError = Literal["raise", "skip"]
"""Stop at patterns or groups that cannot be used, or leave them out."""

Live = bool | str | Path | Callable[[Any], Any] | None
"""Live picture of a run: True for one in a notebook, the path of a PNG, or a function that receives a Dataset."""

NOT_STORED = ("live", "follow", "follow_timeout_s")
"""Fields of a `ReconstructionSpec` that no result depends on: they set when a run starts and how it is displayed."""

LARGEST = {"batch_size": 2**31, "groups_per_chunk": 2**31, "tile": 2**16}
"""Upper limits of fields: a larger number is a typing error, and a larger tile does not fit into a store."""

MEASURE_S = 3.0
"""Longest duration of a speed measurement, seconds, after the network is compiled."""

RESULT_PIXEL_BYTES = 20
"""Bytes of one pixel of a result: object, weight, uncertainty and count."""

TableOfSpec = Callable[[str, GroupingSpec], GroupTable]
"""Function that returns the group table of a spec: `open_or_draw_groups`, or one that also stores the table."""


class RegionNotReachedError(PtychodaskError):
    """No pattern reaches the region of interest.

    In a growing scan, a later one may.
    """


@dataclass(frozen=True, kw_only=True)
class ReconstructionSpec:
    """Options of a reconstruction; None means automatic."""

    groups: str | GroupingSpec | None = None
    """Name of a stored group table, or its spec; by default the stored table with the model's number of members."""

    window: Window | None = None
    """Weights of a patch; by default "illumination" for one patch per member, "uniform" for one patch per group."""

    crop: int | None = None
    """Pixels M across the middle of a patch that are used, even; by default N, or 20 for uniform group patches."""

    batch_size: int | None = None
    """Groups in one call of the network."""

    groups_per_chunk: int | None = None
    """Consecutive groups predicted by one task."""

    tile: int | None = None
    """Pixels across one tile of the object."""

    roi: tuple[int, int, int, int] | None = None
    """Part of the object to reconstruct, (y0, y1, x0, x1) in pixels of the scan coordinates, ends excluded."""

    roi_m: tuple[float, float, float, float] | None = None
    """The same part in metres: pixels with y0 <= ``y_m`` < y1 and x0 <= ``x_m`` < x1. The scan's pixel size must be
    known."""

    drop: Sequence[int] | NDArray[np.integer[Any]] = ()
    """Patterns of the store to leave out, of groups (each group that contains one is left out) and of polishing.
    Converted to ascending integers."""

    polish: int = 0
    """Data-consistency sweeps over the patterns that polish the stitched object."""

    precision: Precision = "float32"
    """Precision of the network's convolutions: "mixed" computes them in bfloat16."""

    device: Device = "any"
    """Device of the network: "gpu" raises an error if a worker has no GPU."""

    on_error: OnError = "raise"
    """Handling of unusable patterns and of groups that no worker can predict: "raise" stops and names them, "skip"
    leaves them out and lists them in the attribute ``skipped``."""

    verify: int = 0
    """Number of chunks, drawn at random, that a second worker computes too; the run fails if the two differ."""

    split_half: bool = False
    """Also stitch the even and the odd patterns separately, in the same pass: ``object_half`` and ``weight_half``.
    By default no group then mixes the two halves."""

    pyramid: bool = False
    """Add coarser levels to the written result (see `open_result`)."""

    cache: str | Path | None = None
    """Store of predicted patches (float16): filled by the first run; later runs read it instead of predicting."""

    position_yx_px: NDArray[np.float64] | None = field(default=None, compare=False)
    """Corrected positions, float64 (pattern, 2) in the order of the store, at which cached patches are stitched."""

    memory_bytes: int = 1024 * MIB
    """Memory limit of one task, without the network itself; automatic sizes respect it."""

    live: Live = field(default=None, compare=False)
    """Coarse picture that fills in as tiles finish, updated at most twice a second: True displays it in a notebook, a
    path names a PNG that is overwritten, a function receives a Dataset."""

    follow: bool = field(default=False, compare=False)
    """Follow a growing scan: predict its segments as they are appended, until it is finished."""

    follow_timeout_s: float = field(default=600.0, compare=False)
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
        if not isinstance(self.polish, Integral) or self.polish < 0:
            raise PtychodaskError(
                f"reconstruct: polish is {self.polish!r}, expected a number of sweeps, an integer of at least 0"
            )
        for name, kind in (("precision", Precision), ("device", Device), ("on_error", OnError)):
            check_choice(name, getattr(self, name), get_args(kind), "reconstruct")
        if not isinstance(self.verify, Integral) or self.verify < 0:
            raise PtychodaskError(
                f"reconstruct: verify is {self.verify!r}, expected a number of chunks, an integer of at least 0"
            )
        if self.polish and self.split_half:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with split_half=True: sweeps would mix the halves; pass only one"
            )
        if self.position_yx_px is not None:
            object.__setattr__(self, "position_yx_px", _as_positions(self.position_yx_px))
        if self.position_yx_px is not None and self.cache is None:
            raise PtychodaskError(
                "reconstruct: position_yx_px without cache=: the network's input uses the stored positions; pass "
                "cache= to stitch cached patches, or ingest with the corrected positions"
            )
        if self.polish and self.position_yx_px is not None:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with position_yx_px: sweeps use the stored positions; "
                "ingest with the corrected ones"
            )
        if self.polish and self.roi is not None:
            raise PtychodaskError(
                f"reconstruct: polish={self.polish} with roi {self.roi}: patterns at its edge reach beyond it; "
                "polish the complete object and crop it"
            )


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
            "pixels, or ingest with pixel_size_m= (--pixel-size-m)"
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


@dataclass(frozen=True)
class Chunk:
    """Consecutive groups predicted by one task."""

    start: int
    """First row of the group table."""

    stop: int
    """Row after the last one."""

    box: Box
    """Part of the object that their patches reach."""


@dataclass(frozen=True)
class Tile:
    """Part of the object reassembled by one task."""

    box: Box
    """Its pixels."""

    chunks: tuple[int, ...]
    """Indices of the chunks that reach it, ascending: the order in which they are merged."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """Chunks, tiles and memory of a reconstruction; prints as a table."""

    store: str
    """Path of the store."""

    data_hash: str
    """Data hash of the store."""

    groups: str
    """Name of the group table."""

    groups_hash: str
    """SHA-256 of the group table."""

    members: int
    """Patterns in one group, C."""

    n_pixels: int
    """Pixels across a pattern, N."""

    output: Literal["member", "group"]
    """One patch per member, or one per group."""

    window: Window
    crop: int
    batch_size: int
    groups_per_chunk: int
    tile: int
    memory_bytes: int

    n_groups: int
    """Groups to predict."""

    n_patterns: int
    """Different patterns to read."""

    box: Box
    """Pixels of the object."""

    chunks: tuple[Chunk, ...]
    """Chunks in the order of the group table."""

    tiles: tuple[Tile, ...]
    """Tiles of the object, row by row."""

    predict_bytes: int
    """Memory of the largest prediction task, without the network."""

    reassemble_bytes: int
    """Memory of the largest reassembly task."""

    read_amplification: float
    """Patterns decompressed per pattern used: stored chunks are decompressed completely, and patterns at the edges of
    chunks of groups are read by several tasks."""

    groups_per_s: float | None = None
    """Measured speed of one process, reading included; None if not measured."""

    def summary(self) -> dict[str, Any]:
        """Sizes of the plan as plain values."""
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
        return "\n".join(f"{name:<11} {value}" for name, value in self._rows().items())

    def _repr_html_(self) -> str:
        return card("Plan of a reconstruction", self._rows())

    def _rows(self) -> dict[str, str]:
        most_chunks = max(len(tile.chunks) for tile in self.tiles)
        (height, width), budget = self.box.shape, f"of {self.memory_bytes / MIB:,.0f} MiB"
        rows = {
            "store": self.store,
            "groups": f"{self.n_groups:,} of {self.members} from '{self.groups}'",
            "patterns": f"{self.n_patterns:,} of {self.n_pixels} x {self.n_pixels}",
            "window": f"{self.window}, {self.crop} x {self.crop}, one patch per {self.output}",
            "object": f"{height:,} x {width:,} px from (y, x) = {self.box.corner}, "
            f"{self.box.n_pixels * RESULT_PIXEL_BYTES / MIB:,.0f} MiB",
            "read": f"{self.read_amplification:.2f} patterns decompressed per pattern used",
            "predict": f"{len(self.chunks):,} tasks of {self.groups_per_chunk:,} groups, batches of {self.batch_size}",
            "reassemble": f"{len(self.tiles):,} tiles of {self.tile} x {self.tile} px, up to {most_chunks} chunks each",
            "memory": f"{self.predict_bytes / MIB:,.1f} MiB to predict, {self.reassemble_bytes / MIB:,.1f} MiB to "
            f"reassemble, {budget} per task",
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
    """Plan of a reconstruction, without running it.

    Parameters
    ----------
    store : path or ``s3://`` URL
    model : path or model, optional
        By default the model that the store records, or a packaged one. Without any, or if `spec` names groups, the plan
        is that of a model with one patch per member and the members of the group table.
    spec : ReconstructionSpec
    measure : bool
        Predict for a few seconds in this process, to estimate the time of the run.

    Returns
    -------
    Plan

    Raises
    ------
    PtychodaskError
        If the model does not fit the scan, the region is outside of the object, a task would not fit into the memory,
        or there is no model to measure.

    Notes
    -----
    Sizes follow from the scan, the model and ``spec.memory_bytes``, not from the number of workers, so the object does
    not depend on the machine. The store is only read: a missing group table is drawn in memory, with the rows that
    `reconstruct` will store.
    """
    reader = ScanReader(store)
    reader.check()
    scan = reader.first()
    spec = in_pixels(spec, scan.pixel_size_m, reader.label)
    has_model = recorded_model(scan) is not None or pretrained_for(scan.n_pixels) is not None
    # Sizes need the members and the kind of output only, so a scan can be planned before a model is trained on it.
    if model is None and not measure and (spec.groups is not None or not has_model):
        table = _known_segments(reader, _default_table(str(store), spec))
        return make_plan(reader, table, _Network(table.spec.members, scan.n_pixels, "member"), spec)
    patch_model = resolve_model(scan, model)
    table, network = _table_and_network(reader, patch_model, spec, open_or_draw_groups)
    planned = make_plan(reader, table, network, spec)
    if not measure:
        return planned
    # Measuring reads rows as a run does, but a table that was drawn for this plan is not in the store.
    job = replace(prediction_job(planned, patch_model, scan, spec), member=table.in_memory)
    return replace(planned, groups_per_s=_measured_rate(planned, job))


def prediction_job(planned: Plan, model: PatchModel, scan: Scan, spec: ReconstructionSpec) -> PredictionJob:
    """Model, scan and options for the prediction tasks of a plan."""
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
    """Groups per second of this process, including reading, without compilation."""
    # The first batch compiles the network, which a run does once per worker and not per group.
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
    """Plan of a run on an open store (see `plan`).

    A missing group table is stored, since the tasks read its rows from the store.
    """
    table, network = _table_and_network(reader, model, spec, _stored_table)
    return make_plan(reader, table, network, spec)


def plan_together(reader: ScanReader, models: Mapping[str, PatchModel], spec: ReconstructionSpec) -> dict[str, Plan]:
    """Plans of several models for a single pass over the patterns.

    The plans share object, chunks and tiles.

    Parameters
    ----------
    reader : ScanReader
    models : dict of label to model
    spec : ReconstructionSpec

    Returns
    -------
    dict of label to Plan
        Each with the memory of a task that predicts with all models.

    Raises
    ------
    PtychodaskError
        As `plan`, or if the groups of the models do not have the same seeds.
    """
    if not models:
        raise PtychodaskError("reconstruct: model is an empty dict, expected at least one label with its model")
    # Tables first: chunks are ranges of rows, so models can share them only if all tables have the same seeds in the
    # same rows. A task then reads the patterns of its rows once for all models.
    parts = {label: _table_and_network(reader, model, spec, _stored_table) for label, model in models.items()}
    _check_same_seeds(reader, {label: table for label, (table, _) in parts.items()})
    # A task has the canvases of all models in memory at the same time, so each is planned for its share of the limit.
    share = replace(spec, memory_bytes=max(1, spec.memory_bytes // len(models)))
    separate = [make_plan(reader, table, network, share) for table, network in parts.values()]
    # Crops and members differ between models, and with them the pixels that patches reach: the common object is the box
    # around all, and the smallest chunk fits the memory of each model.
    box = _enclosing(one.box for one in separate)
    n_groups = min(one.groups_per_chunk for one in separate)
    common = replace(share, groups_per_chunk=n_groups, tile=spec.tile or _tile(box))
    plans = {label: make_plan(reader, *part, common, box=box) for label, part in parts.items()}
    chunks = _merged_chunks(plan.chunks for plan in plans.values())
    tiles = _tiles(box, int(common.tile or 0), chunks)
    n_bytes = sum(one.predict_bytes for one in plans.values())
    return {
        label: replace(one, chunks=chunks, tiles=tiles, predict_bytes=n_bytes, memory_bytes=int(spec.memory_bytes))
        for label, one in plans.items()
    }


def _check_same_seeds(reader: ScanReader, tables: Mapping[str, GroupTable]) -> None:
    (first, table), *others = tables.items()
    for label, other in others:
        # Compared block by block, so that the memory of planning does not grow with the scan.
        blocks = [(row, row + BLOCK_GROUPS) for row in range(0, len(table), BLOCK_GROUPS)]
        if len(other) != len(table) or any(
            (other.rows(*block)[:, 0] != table.rows(*block)[:, 0]).any() for block in blocks
        ):
            raise PtychodaskError(
                f"{reader.label}: group tables '{table.name}' of {first} and '{other.name}' of {label} do not have the "
                "same seeds, so they cannot share a pass; reconstruct with one model at a time"
            )


def _enclosing(boxes: Iterable[Box]) -> Box:
    """Smallest box around some boxes."""
    y0, y1, x0, x1 = zip(*boxes, strict=True)
    return Box(min(y0), max(y1), min(x0), max(x1))


def _merged_chunks(chunks: Iterable[Sequence[Chunk]]) -> tuple[Chunk, ...]:
    """Chunks of several plans; the same rows become one chunk."""
    boxes: dict[tuple[int, int], list[Box]] = {}
    for chunk in (chunk for plan_chunks in chunks for chunk in plan_chunks):
        boxes.setdefault((chunk.start, chunk.stop), []).append(chunk.box)
    return tuple(Chunk(start, stop, _enclosing(same_rows)) for (start, stop), same_rows in sorted(boxes.items()))


def _table_and_network(
    reader: ScanReader, model: PatchModel, spec: ReconstructionSpec, table_of_spec: TableOfSpec
) -> tuple[GroupTable, _Network]:
    if model.n_pixels != reader.n_pixels:
        raise PtychodaskError(
            f"{reader.label}: patterns are {reader.n_pixels} pixels wide, the {model.kind} expects {model.n_pixels}; "
            f"ingest with n_pixels={model.n_pixels}, or pass another model"
        )
    if spec.precision not in precisions(model):
        raise PtychodaskError(
            f"reconstruct: precision is {spec.precision!r}, the {model.kind} supports: "
            f"{', '.join(precisions(model))}; leave out precision="
        )
    # Groups of one pattern never mix the halves, and a spec refuses halves for them.
    halves = spec.split_half and model.members > 1
    table = _known_segments(reader, _table_of(reader.label, spec.groups, model.members, table_of_spec, halves=halves))
    return table, _Network(model.members, model.n_pixels, model.output)


def _known_segments(reader: ScanReader, table: GroupTable) -> GroupTable:
    """Group table without segments appended after the scan was opened."""
    # The table is opened after the scan, and a writer may append in between; the reader knows none of those patterns.
    return table.in_segments(len(reader.attributes.get("segments", (None,))))


def _default_table(store: str, spec: ReconstructionSpec) -> GroupTable:
    """Group table if there is no model: named, only stored, or default."""
    if spec.groups is not None:
        return _named_table(store, spec.groups, open_or_draw_groups)
    names = stored_group_names(store)
    return _named_table(store, names[0] if len(names) == 1 else GroupingSpec(), open_or_draw_groups)


def _stored_table(store: str, spec: GroupingSpec) -> GroupTable:
    """Group table of a spec, stored if it was not yet."""
    # Tasks read rows of the table from the store: 10^6 groups of 4 are 16 MB, too much to send with each task.
    group(store, spec)
    return open_or_draw_groups(store, spec)


def _named_table(store: str, groups: str | GroupingSpec, table_of_spec: TableOfSpec) -> GroupTable:
    if isinstance(groups, GroupingSpec):
        return table_of_spec(store, groups)
    table = open_groups(store, groups)
    if table is None:
        stored = ", ".join(stored_group_names(store)) or "none"
        raise PtychodaskError(
            f"{store}: no group table '{groups}'; stored tables: {stored}; create it with 'ptychodask group'"
        )
    return table


def _table_of(
    store: str, groups: str | GroupingSpec | None, members: int, table_of_spec: TableOfSpec, *, halves: bool
) -> GroupTable:
    """Group table for a model: named, stored with its members, or default."""
    if groups is not None:
        named = _named_table(store, groups, table_of_spec)
        if named.spec.members != members:
            raise PtychodaskError(
                f"{store}: group table '{named.name}' has {named.spec.members} patterns in a group, "
                f"the model expects {members}; pass another groups=, or leave it out"
            )
        return named
    default = GroupingSpec(members=members, neighbours=max(GroupingSpec.neighbours, members), halves=halves)
    stored = [table for name in stored_group_names(store) if (table := open_groups(store, name))]
    fitting = [table for table in stored if table.spec.members == members and table.spec.halves == halves]
    if not fitting:
        return table_of_spec(store, default)
    # One that is not the default is taken only if it is the only one: which of two was meant cannot be known, and the
    # object depends on it.
    for table in fitting:
        if len(fitting) == 1 or table.spec == default:
            return table
    listed = ", ".join(table.name for table in fitting)
    raise PtychodaskError(f"{store}: several group tables have {members} patterns in a group ({listed}); pass groups=")


def make_plan(
    reader: ScanReader, table: GroupTable, network: _Network, spec: ReconstructionSpec, *, box: Box | None = None
) -> Plan:
    """Plan of a scan, from its positions and group table.

    Parameters
    ----------
    reader : ScanReader
    table : GroupTable
    network : (members, n_pixels, output)
    spec : ReconstructionSpec
    box : Box, optional
        Pixels of the object; by default those that the groups reach.

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
    # A growing scan keeps the sizes that fit its first segment, so that chunks predicted early stay valid.
    batch_size = _batch_size(spec, network, table.segments[0])
    surveyed, chunks, predict_bytes, box = _fitting_chunks(reader, table, network, crop, batch_size, spec, box)
    tile = int(spec.tile or _tile(box))
    tiles = _tiles(box, tile, chunks)
    reassemble_bytes = max(_reassemble_bytes(part, chunks) for part in tiles)
    # Refused before the first task: otherwise the worker is killed, perhaps hours into the run, and the next one fails
    # on the same tile.
    if reassemble_bytes > spec.memory_bytes:
        raise PtychodaskError(
            f"plan: a tile of {tile} x {tile} px needs {reassemble_bytes / MIB:,.0f} MiB to reassemble, "
            f"a task may use {spec.memory_bytes / MIB:,.0f} MiB; pass a smaller tile=, another groups_per_chunk= "
            f"than {surveyed.size}, or a larger memory_bytes="
        )
    # The survey covers the complete table; the plan only the chunks that reach the region of interest.
    in_plan = np.searchsorted(surveyed.edges, [chunk.start for chunk in chunks])
    n_patterns = int(np.count_nonzero(surveyed.used))
    return Plan(
        store=str(parse_location(reader.label).resolve()),
        data_hash=reader.data_hash,
        groups=table.name,
        groups_hash=surveyed.table_hash,
        members=network.members,
        n_pixels=network.n_pixels,
        output=network.output,
        window=window,
        crop=crop,
        batch_size=batch_size,
        groups_per_chunk=surveyed.size,
        tile=tile,
        memory_bytes=int(spec.memory_bytes),
        n_groups=int(surveyed.n_groups[in_plan].sum()),
        n_patterns=n_patterns,
        box=box,
        chunks=chunks,
        tiles=tiles,
        predict_bytes=predict_bytes,
        reassemble_bytes=reassemble_bytes,
        read_amplification=float(surveyed.n_decompressed[in_plan].sum() / n_patterns),
    )


def _window_and_crop(spec: ReconstructionSpec, network: _Network) -> tuple[Window, int]:
    window: Window = spec.window or ("illumination" if network.output == "member" else "uniform")
    if spec.crop is not None and spec.crop > network.n_pixels:
        raise PtychodaskError(f"reconstruct: crop is {spec.crop}, a patch has {network.n_pixels} pixels; crop less")
    # A group's patch is centred between its members, where the probe illuminates its rim weakly if at all; without
    # weights, only the middle is reliable.
    if network.output == "group" and window == "uniform":
        return window, int(spec.crop or min(GROUP_CROP, network.n_pixels))
    return window, int(spec.crop or network.n_pixels)


def _object_box(whole: Box, roi: tuple[int, int, int, int] | None, label: str) -> Box:
    """Part of the region of interest that patches reach."""
    if roi is None:
        return whole
    box = whole.overlap(Box(*(int(value) for value in roi)))
    if box.n_pixels == 0:
        raise RegionNotReachedError(f"{label}: roi {roi} does not overlap the object, {tuple(whole)} (y0, y1, x0, x1)")
    return box


def _batch_size(spec: ReconstructionSpec, network: _Network, n_groups: int) -> int:
    if spec.batch_size is not None:
        return int(spec.batch_size)
    fitting = BATCH_PIXELS // (network.n_pixels**2 * network.members)
    # The compiled call pads its last batch: a batch above the chunk or the scan would mostly compute padding.
    return int(min(max(1, fitting), BATCH_GROUPS, n_groups, spec.groups_per_chunk or n_groups))


def _groups_per_chunk(network: _Network, batch_size: int, n_groups: int) -> int:
    # Large chunks read each pattern less often; enough of them keep several workers busy and lose little if one fails.
    most_groups = CHUNK_PIXELS // (network.n_pixels**2 * network.members)
    wanted = min(most_groups, -(-n_groups // CHUNKS_AT_LEAST))
    # Complete batches, since the last batch of each chunk is padded.
    return max(1, -(-wanted // batch_size)) * batch_size


def _tile(box: Box) -> int:
    """Pixels across an automatic tile, a multiple of the stored chunks."""
    # A tile is one shard of the result. Two tasks that write into one shard would lose each other's data, and a resumed
    # run could not replace one tile without the other.
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
    """Survey, chunks, memory of the largest task, and pixels of the object.

    Automatic chunks are halved until their tasks fit into the memory.
    """
    size = int(spec.groups_per_chunk or _groups_per_chunk(network, batch_size, table.segments[0]))
    while True:
        # The survey depends on the size of chunks, so it is repeated for each; a pass takes about a second for 10^6
        # groups.
        surveyed = survey(
            reader,
            table,
            size=size,
            output=network.output,
            crop=crop,
            drop=tuple(spec.drop),
            position_yx_px=spec.position_yx_px,
            region=None if spec.roi is None else Box(*(int(value) for value in spec.roi)),
        )
        if not surveyed.n_groups.any():
            raise PtychodaskError(
                f"{reader.label}: each of the {len(table)} groups of '{table.name}' contains one of the "
                f"{len(spec.drop)} patterns to drop; drop fewer"
            )
        object_box = _object_box(surveyed.whole, spec.roi, reader.label) if box is None else box
        chunks, n_bytes = _chunks(reader, surveyed, network, object_box, batch_size, spec)
        if not chunks:
            raise RegionNotReachedError(f"{reader.label}: no pattern reaches roi {spec.roi}; pass another region")
        if max(n_bytes) <= spec.memory_bytes:
            return surveyed, chunks, max(n_bytes), object_box
        # A size that was passed is refused, not changed: with another one the object differs in its last bits, and the
        # run would not repeat an earlier one.
        if spec.groups_per_chunk is not None or size == 1:
            break
        size //= 2
    chunk = chunks[int(np.argmax(n_bytes))]
    raise PtychodaskError(
        f"plan: groups {chunk.start}..{chunk.stop - 1}, over {chunk.box.shape[0]} x {chunk.box.shape[1]} px, need "
        f"{max(n_bytes) / MIB:,.1f} MiB, a task may use {spec.memory_bytes / MIB:,.1f} MiB; pass "
        f"groups_per_chunk= below {chunk.stop - chunk.start}, a smaller batch_size=, or a larger memory_bytes="
    )


def _chunks(
    reader: ScanReader,
    surveyed: Survey,
    network: _Network,
    box: Box,
    batch_size: int,
    spec: ReconstructionSpec,
) -> tuple[tuple[Chunk, ...], list[int]]:
    """Chunks that overlap the object, and bytes of each prediction task."""
    # Two copies of the network input (float32) and two of the patches (complex64).
    batch_bytes = batch_size * network.members * network.n_pixels**2 * (2 * 4 + 2 * 8)
    pattern_bytes = network.n_pixels**2 * (reader.pattern_itemsize + 4)
    canvas_bytes = CANVAS_PIXEL_BYTES * (2 if spec.split_half else 1)
    chunks, n_bytes = [], []
    for index in np.flatnonzero(surveyed.n_groups).tolist():
        reached = surveyed.box(index).overlap(box)
        if reached.n_pixels:
            chunks.append(Chunk(int(surveyed.edges[index]), int(surveyed.edges[index + 1]), reached))
            pattern_sum = int(surveyed.n_patterns[index]) * pattern_bytes
            n_bytes.append(pattern_sum + batch_bytes + reached.n_pixels * canvas_bytes)
    return tuple(chunks), n_bytes


def _tiles(box: Box, tile: int, chunks: tuple[Chunk, ...]) -> tuple[Tile, ...]:
    """Tiles of the object, row by row, with their chunks."""
    n_rows, n_columns = (-(-side // tile) for side in box.shape)
    # Ascending chunks in each tile fix the order in which sums are merged, and with it the last bits of the object.
    overlapping: list[list[int]] = [[] for _ in range(n_rows * n_columns)]
    for index, chunk in enumerate(chunks):
        for row in range((chunk.box.y0 - box.y0) // tile, (chunk.box.y1 - 1 - box.y0) // tile + 1):
            for column in range((chunk.box.x0 - box.x0) // tile, (chunk.box.x1 - 1 - box.x0) // tile + 1):
                overlapping[row * n_columns + column].append(index)
    tiles = []
    for number, indices in enumerate(overlapping):
        y, x = box.y0 + number // n_columns * tile, box.x0 + number % n_columns * tile
        tiles.append(Tile(Box(y, y + tile, x, x + tile).overlap(box), tuple(indices)))
    return tuple(tiles)


def _reassemble_bytes(tile: Tile, chunks: tuple[Chunk, ...]) -> int:
    # At worst the canvases of all its chunks are in memory at once, with the sums and the finished arrays of the tile.
    canvases = sum(chunks[index].box.n_pixels for index in tile.chunks)
    return canvases * CANVAS_PIXEL_BYTES + tile.box.n_pixels * (CANVAS_PIXEL_BYTES + RESULT_PIXEL_BYTES)
