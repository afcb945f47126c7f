"""Plan of a reconstruction: chunks of groups, tiles of the object, memory.

One pass over the group table and the positions (`survey`) finds the part of the object that each chunk of groups
reaches, the patterns that it reads and the memory that its task needs. Automatic chunks are halved until the largest
task fits; tiles then divide the object, each with the chunks that reach it. All sizes follow from scan, model and spec,
never from the workers: any cluster computes the same bits, and a resumed run finds the chunks of the earlier one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.grouping import GroupingSpec, check_experiment
from ptychodask.html import card
from ptychodask.models.choose import recorded_model, resolve_model
from ptychodask.models.contract import MinimalModel, PatchModel
from ptychodask.models.pretrained import pretrained_for
from ptychodask.options import takes_fields
from ptychodask.plan.chunks import (
    BLOCK_GROUPS,
    RESULT_PIXEL_BYTES,
    Chunk,
    Tile,
    _batch_size,
    _fitting_chunks,
    _Network,
    _reassemble_bytes,
    _tile,
    _tiles,
    outliers_of,
)
from ptychodask.plan.spec import MIB, ReconstructionSpec, in_pixels
from ptychodask.prediction import ModelReference, PredictionJob, open_anew, predict_groups
from ptychodask.reassembly import Box, Window
from ptychodask.scan import Scan, check_positions
from ptychodask.store import GroupTable, StoredScan
from ptychodask.store.groups import stored_table

GROUP_CROP = 20
"""Pixels across the middle of a group's patch that a uniform window keeps by default, as in PtychoPINN."""


MEASURE_S = 3.0
"""Longest duration of a speed measurement, seconds, after the network is compiled."""


TableOfSpec = Callable[[StoredScan, GroupingSpec], GroupTable]
"""Function that returns the group table of a spec: `StoredScan.stored_or_drawn`, or `stored_table`, which stores it."""


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

    outliers: str = ""
    """Used patterns whose positions are far from all others, in words; or empty."""

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
        if self.outliers:
            rows["outliers"] = self.outliers
        if self.groups_per_s is not None:
            rows["time"] = (
                f"about {self.n_groups / self.groups_per_s:,.0f} s in one process, at {self.groups_per_s:,.0f} groups/s"
            )
        return rows


@takes_fields(ReconstructionSpec)
def plan(
    store: str | Path,
    model: str | Path | MinimalModel | None = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    measure: bool = False,
    **spec_fields: Any,
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
    **spec_fields
        Fields of `ReconstructionSpec`, by name; they replace those of `spec`.

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
    spec = with_fields(spec, spec_fields)
    stored = open_anew(store)
    scan = stored.first()
    spec = in_pixels(spec, scan.pixel_size_m, stored.label)
    has_model = recorded_model(scan) is not None or pretrained_for(scan.n_pixels) is not None
    # Sizes need the members and the kind of output only, so a scan can be planned before a model is trained on it.
    if model is None and not measure and (spec.groups is not None or not has_model):
        table = _default_table(stored, spec)
        return make_plan(stored, table, _Network(table.spec.members, scan.n_pixels, "member"), spec)
    patch_model = resolve_model(scan, model)
    table, network = _table_and_network(stored, patch_model, spec, StoredScan.stored_or_drawn)
    planned = make_plan(stored, table, network, spec)
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
        experiment=spec.experiment,
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


def plan_for(stored: StoredScan, model: PatchModel, spec: ReconstructionSpec) -> Plan:
    """Plan of a run on an open store (see `plan`).

    A missing group table is stored, since the tasks read its rows from the store.
    """
    table, network = _table_and_network(stored, model, spec, stored_table)
    return make_plan(stored, table, network, spec)


def plan_together(stored: StoredScan, models: Mapping[str, PatchModel], spec: ReconstructionSpec) -> dict[str, Plan]:
    """Plans of several models for a single pass over the patterns.

    The plans share object, chunks and tiles.

    Parameters
    ----------
    stored : StoredScan
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
    parts = {label: _table_and_network(stored, model, spec, stored_table) for label, model in models.items()}
    _check_same_seeds(stored, {label: table for label, (table, _) in parts.items()})
    # A task has the canvases of all models in memory at the same time, so each is planned for its share of the limit.
    share = replace(spec, memory_bytes=max(1, spec.memory_bytes // len(models)))
    separate = [make_plan(stored, table, network, share) for table, network in parts.values()]
    # Crops and members differ between models, and with them the pixels that patches reach: the common object is the box
    # around all, and the smallest chunk fits the memory of each model.
    box = _enclosing(one.box for one in separate)
    n_groups = min(one.groups_per_chunk for one in separate)
    common = replace(share, groups_per_chunk=n_groups, tile=spec.tile or _tile(box))
    plans = {label: make_plan(stored, *part, common, box=box) for label, part in parts.items()}
    chunks = _merged_chunks(plan.chunks for plan in plans.values())
    tiles = _tiles(box, int(common.tile or 0), chunks)
    n_bytes = sum(one.predict_bytes for one in plans.values())
    return {
        label: replace(one, chunks=chunks, tiles=tiles, predict_bytes=n_bytes, memory_bytes=int(spec.memory_bytes))
        for label, one in plans.items()
    }


def _check_same_seeds(stored: StoredScan, tables: Mapping[str, GroupTable]) -> None:
    (first, table), *others = tables.items()
    for label, other in others:
        # Compared block by block, so that the memory of planning does not grow with the scan.
        blocks = [(row, row + BLOCK_GROUPS) for row in range(0, len(table), BLOCK_GROUPS)]
        if len(other) != len(table) or any(
            (other.rows(*block)[:, 0] != table.rows(*block)[:, 0]).any() for block in blocks
        ):
            raise PtychodaskError(
                f"{stored.label}: group tables '{table.name}' of {first} and '{other.name}' of {label} do not have the "
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
    stored: StoredScan, model: PatchModel, spec: ReconstructionSpec, table_of_spec: TableOfSpec
) -> tuple[GroupTable, _Network]:
    if model.n_pixels != stored.n_pixels:
        raise PtychodaskError(
            f"{stored.label}: patterns are {stored.n_pixels} pixels wide, the {model.kind} expects {model.n_pixels}; "
            f"ingest with n_pixels={model.n_pixels}, or pass another model"
        )
    if spec.precision not in model.precisions:
        raise PtychodaskError(
            f"reconstruct: precision is {spec.precision!r}, the {model.kind} supports: "
            f"{', '.join(model.precisions)}; leave out precision="
        )
    # Groups of one pattern never mix the halves, and a spec refuses halves for them.
    halves = spec.split_half and model.members > 1
    table = _table_of(stored, spec.groups, model.members, table_of_spec, halves=halves)
    return table, _Network(model.members, model.n_pixels, model.output)


def _default_table(stored: StoredScan, spec: ReconstructionSpec) -> GroupTable:
    """Group table if there is no model: named, only stored, or default."""
    if spec.groups is not None:
        return _named_table(stored, spec.groups, StoredScan.stored_or_drawn)
    names = stored.table_names()
    return _named_table(stored, names[0] if len(names) == 1 else GroupingSpec(), StoredScan.stored_or_drawn)


def _named_table(stored: StoredScan, groups: str | GroupingSpec, table_of_spec: TableOfSpec) -> GroupTable:
    if isinstance(groups, GroupingSpec):
        return table_of_spec(stored, groups)
    table = stored.table(groups)
    if table is None:
        names = ", ".join(stored.table_names()) or "none"
        raise PtychodaskError(
            f"{stored.label}: no group table '{groups}'; stored tables: {names}; create it with 'ptychodask group'"
        )
    return table


def _table_of(
    stored: StoredScan, groups: str | GroupingSpec | None, members: int, table_of_spec: TableOfSpec, *, halves: bool
) -> GroupTable:
    """Group table for a model: named, stored with its members, or default."""
    if groups is not None:
        named = _named_table(stored, groups, table_of_spec)
        if named.spec.members != members:
            raise PtychodaskError(
                f"{stored.label}: group table '{named.name}' has {named.spec.members} patterns in a group, "
                f"the model expects {members}; pass another groups=, or leave it out"
            )
        return named
    default = GroupingSpec(members=members, halves=halves)
    tables = [table for name in stored.table_names() if (table := stored.table(name))]
    fitting = [table for table in tables if table.spec.members == members and table.spec.halves == halves]
    if not fitting:
        return table_of_spec(stored, default)
    # One that is not the default is taken only if it is the only one: which of two was meant cannot be known, and the
    # object depends on it.
    for table in fitting:
        if len(fitting) == 1 or table.spec.draws_as(default):
            return table
    listed = ", ".join(table.name for table in fitting)
    raise PtychodaskError(
        f"{stored.label}: several group tables have {members} patterns in a group ({listed}); pass groups="
    )


def make_plan(
    stored: StoredScan, table: GroupTable, network: _Network, spec: ReconstructionSpec, *, box: Box | None = None
) -> Plan:
    """Plan of a scan, from its positions and group table.

    Parameters
    ----------
    stored : StoredScan
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
    check_experiment(stored.label, stored.experiments(tuple(spec.drop)), spec.experiment)
    if spec.position_yx_px is not None:
        check_positions(spec.position_yx_px, stored.n_patterns, "position_yx_px")
    window, crop = _window_and_crop(spec, network)
    # A growing scan keeps the sizes that fit its first segment, so that chunks predicted early stay valid.
    batch_size = _batch_size(spec, network, table.segments[0])
    surveyed, chunks, predict_bytes, box = _fitting_chunks(stored, table, network, crop, batch_size, spec, box)
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
        store=stored.path,
        data_hash=stored.data_hash,
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
        outliers=outliers_of(stored, spec),
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
