"""`reconstruct`: the tasks of a plan, their run on a Dask client, and the Dataset they give."""

from __future__ import annotations

import logging
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from numbers import Integral
from operator import getitem
from pathlib import Path
from typing import Any

import dask.array as da
import distributed
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, List, Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from ptychodask.cluster import active_client, client_for_run
from ptychodask.plan import MIB, RESULT_PIXEL_BYTES, Chunk, Plan, ReconstructionSpec, Tile, plan_for
from ptychodask.prediction import (
    ModelReference,
    PatchModel,
    PredictionJob,
    open_source,
    predict_groups,
    resolve_model,
    stage,
)
from ptychodask.progress import Progress, show_progress
from ptychodask.reassembly import Canvas, Window, add_patches, crop_middle, empty_canvas, finish, make_window, merge
from ptychodask.result import (
    VARIABLES,
    TileArrays,
    create_result,
    finish_result,
    make_dataset,
    open_result,
    write_tile,
)
from ptychodask.scan import PtychodaskError
from ptychodask.store import open_scan, whole_or_nothing

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.5
"""Part of a worker's `GPU` that a predict task asks for: two overlap, one reading while the other predicts."""

WRITERS_WAIT_S = 60
"""How long a run that ends early waits for tiles that are being written."""


@dataclass(frozen=True, eq=False)
class ReconstructionJob:
    """All that a task needs to know beside its chunk or tile."""

    prediction: PredictionJob

    window: Window
    """Weights of a patch."""

    crop: int
    """Elements across the middle of a patch that are used, M."""


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """What predicting one chunk gives."""

    canvas: Canvas
    """Sums over the chunk's box."""

    seconds: dict[str, float]
    """Wall time of its stages."""


@dataclass(frozen=True, eq=False)
class TileReport:
    """What reassembling one tile gives to the client."""

    arrays: TileArrays | None
    """The tile; None once it is written."""

    seconds: dict[str, float]
    """Wall time of its stages."""

    chunk_seconds: list[dict[str, float]]
    """Wall time of the stages of each of its chunks."""


def predict_chunk(job: ReconstructionJob, chunk: Chunk) -> ChunkSums:
    """Predict one chunk and sum its patches over its own box, batch by batch.

    Parameters
    ----------
    job : ReconstructionJob
    chunk : Chunk

    Returns
    -------
    ChunkSums
    """
    seconds: dict[str, float] = {}
    scan, _ = open_source(job.prediction)
    window = make_window(job.window, job.crop, scan.probe)
    canvas = empty_canvas(chunk.box.corner, chunk.box.shape)
    for batch in predict_groups(job.prediction, chunk.start, chunk.stop, seconds):
        with stage(seconds, "splat"):
            add_patches(canvas, crop_middle(batch.patches, job.crop), batch.position_yx_px - job.crop / 2, window)
    return ChunkSums(canvas, seconds)


def reassemble_tile(tile: Tile, parts: list[ChunkSums]) -> TileArrays:
    """One tile of the object from the canvases that touch it.

    Parameters
    ----------
    tile : Tile
    parts : list of ChunkSums
        In the order of ``tile.chunks``.

    Returns
    -------
    object, weight, uncertainty, count (y, x)
    """
    return finish(merge(empty_canvas(tile.box.corner, tile.box.shape), *(part.canvas for part in parts)))


def deliver_tile(tile: Tile, parts: list[ChunkSums], out: Path | None, start_yx: tuple[int, int]) -> TileReport:
    """Reassemble one tile and write it, or send it to the client.

    Parameters
    ----------
    tile : Tile
    parts : list of ChunkSums
    out : Path or None
        Result store to write into; None sends the tile.
    start_yx : (int, int)
        Row and column of the tile's first pixel in the whole object.

    Returns
    -------
    TileReport
    """
    seconds: dict[str, float] = {}
    with stage(seconds, "merge"):
        arrays = reassemble_tile(tile, parts)
    if out is not None:
        with stage(seconds, "write"):
            write_tile(out, start_yx, arrays)
    return TileReport(arrays if out is None else None, seconds, [part.seconds for part in parts])


def reconstruct(
    store: str | Path,
    model: str | Path | PatchModel | None = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    out: str | Path | None = None,
    client: distributed.Client | None = None,
    overwrite: bool = False,
    compute: bool = True,
    progress: bool | None = None,
    **spec_fields: Any,
) -> xr.Dataset:
    """Turn a scan into an object: predict its groups chunk by chunk, and reassemble them tile by tile.

    Parameters
    ----------
    store : path
        A store that `ingest` or `simulate` wrote.
    model : path or model, optional
        By default the latest `pinn` that the store records, else the latest `baseline`.
    spec : ReconstructionSpec
        How; its group table is by default the stored one with the model's members, else made by the default spec.
    out : path, optional
        Store to write the result into, tile by tile; by default it stays in memory.
    client : distributed.Client, optional
        Where to run; by default the active client, else one in this process.
    overwrite : bool
        Replace what is at `out`.
    compute : bool
        False gives a lazy Dataset: a region of it predicts only the chunks that meet the tiles it touches.
    progress : bool, optional
        See `show_progress`.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    xarray.Dataset
        ``object``, ``weight``, ``uncertainty`` and ``count`` (y, x), see `make_dataset`; lazy when `out` is given or
        `compute` is False.

    Raises
    ------
    PtychodaskError
        If a field is unknown, no model fits, the plan is refused (see `plan`), a task fails, or `out` exists.

    Notes
    -----
    The same plan gives the same bits for any number of workers: sums are float64 and merged in the order of chunks.
    """
    started = time.perf_counter()
    spec = _with_fields(spec, spec_fields)
    if out is not None and not compute:
        raise PtychodaskError("reconstruct: compute=False writes nothing; leave out= away, or compute")
    scan = open_scan(store)
    network = resolve_model(scan, model)
    todo = plan_for(scan, network, spec)
    prediction = PredictionJob(
        todo.store, todo.data_hash, todo.groups, ModelReference.to(network.bind(scan)), todo.batch_size
    )
    job = ReconstructionJob(prediction, todo.window, todo.crop)
    attributes = _attributes(network, todo, spec)
    if not compute:
        return _lazy(job, todo, scan.pixel_size_m, attributes)
    if out is None:
        _check_in_memory(todo)
        arrays = _empty_arrays(todo)
        seconds = _run(job, todo, client, None, lambda tile, report: _place(arrays, todo, tile, report), progress)
        attributes |= _rates(todo, seconds, time.perf_counter() - started)
        return make_dataset(*arrays, todo.box.corner, pixel_size_m=scan.pixel_size_m, attributes=attributes)
    path = Path(out)
    if path.resolve() == Path(todo.store):
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another place with out=")
    with whole_or_nothing(path, overwrite=overwrite) as building:
        create_result(building, todo.box.shape, todo.box.corner, todo.tile, pixel_size_m=scan.pixel_size_m)
        seconds = _run(job, todo, client, building.resolve(), lambda tile, report: None, progress)
        finish_result(building, attributes | _rates(todo, seconds, time.perf_counter() - started))
    return open_result(path)


def _with_fields(spec: ReconstructionSpec, spec_fields: dict[str, Any]) -> ReconstructionSpec:
    names = [field.name for field in fields(ReconstructionSpec)]
    unknown = [name for name in spec_fields if name not in names]
    if unknown:
        raise PtychodaskError(f"reconstruct: no field {', '.join(unknown)}; the fields are: {', '.join(names)}")
    return replace(spec, **spec_fields)


def _attributes(model: PatchModel, todo: Plan, spec: ReconstructionSpec) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "numba", "dask", "distributed", "xarray", "zarr")
    return {
        "store": todo.store,
        "data_hash": todo.data_hash,
        "model": {"kind": model.kind, "hash": model.content_hash, "path": model.path},
        "spec": _plain(asdict(spec)),
        "plan": todo.summary(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _plain(value: Any) -> Any:
    """A spec's values as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, Integral) else value


def _rates(todo: Plan, seconds: dict[str, float], total: float) -> dict[str, Any]:
    return {
        "seconds": {"total": total, **seconds},
        "groups_per_s": todo.n_groups / total,
        "patterns_per_s": todo.n_patterns / total,
    }


def _check_in_memory(todo: Plan) -> None:
    n_bytes = todo.box.n_pixels * RESULT_PIXEL_BYTES
    if n_bytes > todo.memory_bytes:
        raise PtychodaskError(
            f"reconstruct: the object has {todo.box.shape[0]} x {todo.box.shape[1]} px, {n_bytes / MIB:,.0f} MiB, more "
            f"than memory_bytes={todo.memory_bytes}; pass out= to write it to disk, or roi=, or compute=False"
        )


def _empty_arrays(todo: Plan) -> TileArrays:
    arrays: tuple[Any, ...] = tuple(np.full(todo.box.shape, fill, dtype) for dtype, fill, _ in VARIABLES.values())
    return arrays  # type: ignore[return-value]


def _place(arrays: TileArrays, todo: Plan, tile: Tile, report: TileReport) -> None:
    assert report.arrays is not None
    y, x = _start_yx(todo, tile)
    height, width = tile.box.shape
    for whole, part in zip(arrays, report.arrays, strict=True):
        whole[y : y + height, x : x + width] = part


def _start_yx(todo: Plan, tile: Tile) -> tuple[int, int]:
    return tile.box.y0 - todo.box.y0, tile.box.x0 - todo.box.x0


def _run(
    job: ReconstructionJob,
    todo: Plan,
    client: distributed.Client | None,
    out: Path | None,
    take: Callable[[Tile, TileReport], None],
    show: bool | None,
) -> dict[str, float]:
    """Run every task of a plan; gives the wall time of each stage, summed over the tasks."""
    n_chunks, n_tiles = len(todo.chunks), len(todo.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", todo.store, todo.n_groups, n_chunks, n_tiles)
    with (
        client_for_run(client) as used,
        show_progress("reconstruct", todo.n_groups, "groups", show) as progress,
        _Run(used, job, todo, out).guarded() as run,
    ):
        return run.to_its_end(take, progress)


class _Run:
    """The client's side of a run: which tasks are out, and which canvases a tile still waits for."""

    def __init__(self, client: distributed.Client, job: ReconstructionJob, todo: Plan, out: Path | None) -> None:
        self._client, self._todo, self._out = client, todo, out
        # A model that lies on no disk is sent to every worker once; one with a path is loaded by each of them.
        in_memory = job.prediction.model.model is not None
        self._job = client.scatter(job, hash=False, broadcast=True) if in_memory else job
        self._name = uuid.uuid4().hex[:12]
        self._next_chunk = 0
        self._canvases: dict[int, distributed.Future] = {}
        self._missing = [len(tile.chunks) for tile in todo.tiles]
        self._tiles_of: list[list[int]] = [[] for _ in todo.chunks]
        for index, tile in enumerate(todo.tiles):
            for chunk in tile.chunks:
                self._tiles_of[chunk].append(index)
        self._unused = [len(tiles) for tiles in self._tiles_of]
        self._predicting: dict[distributed.Future, int] = {}
        self._reassembling: dict[distributed.Future, int] = {}
        self._completed = distributed.as_completed(loop=client.loop)

    @contextmanager
    def guarded(self) -> Iterator[_Run]:
        """The run; whatever ends it early, no task is left behind, and none writes any more."""
        try:
            yield self
        finally:
            self._client.cancel(list(self._predicting))
            if self._reassembling:
                with suppress(TimeoutError), self._client.as_current():
                    distributed.wait(list(self._reassembling), timeout=WRITERS_WAIT_S)
                self._client.cancel(list(self._reassembling))

    def to_its_end(self, take: Callable[[Tile, TileReport], None], progress: Progress) -> dict[str, float]:
        """Run all tasks; `take` gets each tile as it is done."""
        chunk_seconds: dict[int, dict[str, float]] = {}
        tile_seconds: list[dict[str, float]] = []
        self._submit_chunks()
        while self._predicting or self._reassembling:
            future = next(self._completed)
            if future in self._predicting:
                chunk = self._todo.chunks[self._chunk_done(future)]
                progress.advance(chunk.stop - chunk.start)
            else:
                tile, report = self._tile_done(future)
                chunk_seconds |= dict(zip(tile.chunks, report.chunk_seconds, strict=True))
                tile_seconds.append(report.seconds)
                take(tile, report)
            self._submit_chunks()
        return _sum_stages([*chunk_seconds.values(), *tile_seconds])

    def _submit_chunks(self) -> None:
        """Keep each thread busy with one task and one more at hand, and no more: canvases would pile up."""
        if self._next_chunk == len(self._todo.chunks):
            return
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        threads = sum(worker["nthreads"] for worker in workers)
        resources = _device_share(worker["resources"] for worker in workers)
        while len(self._predicting) < max(2, 2 * threads) and self._next_chunk < len(self._todo.chunks):
            future = self._client.submit(
                predict_chunk,
                self._job,
                self._todo.chunks[self._next_chunk],
                key=f"predict-{self._name}-{self._next_chunk}",
                resources=resources,
                pure=False,
            )
            self._predicting[future] = self._next_chunk
            self._completed.add(future)
            self._next_chunk += 1

    def _chunk_done(self, future: distributed.Future) -> int:
        index = self._predicting.pop(future)
        chunk = self._todo.chunks[index]
        _check_done(future, f"predicting groups {chunk.start}..{chunk.stop - 1}", (PtychodaskError,))
        self._canvases[index] = future
        for tile in self._tiles_of[index]:
            self._missing[tile] -= 1
            if self._missing[tile] == 0:
                self._submit_tile(tile)
        return index

    def _submit_tile(self, index: int) -> None:
        tile = self._todo.tiles[index]
        future = self._client.submit(
            deliver_tile,
            tile,
            [self._canvases[chunk] for chunk in tile.chunks],
            self._out,
            _start_yx(self._todo, tile),
            key=f"reassemble-{self._name}-{index}",
            priority=1,
            pure=False,
        )
        self._reassembling[future] = index
        self._completed.add(future)
        for chunk in tile.chunks:
            self._unused[chunk] -= 1
            if self._unused[chunk] == 0:
                # The tasks that were submitted hold the canvas; it goes with the last of them.
                del self._canvases[chunk]

    def _tile_done(self, future: distributed.Future) -> tuple[Tile, TileReport]:
        tile = self._todo.tiles[self._reassembling.pop(future)]
        # What the disk refuses is named by `whole_or_nothing`.
        _check_done(future, f"reassembling the tile {tuple(tile.box)}", (PtychodaskError, OSError))
        return tile, future.result()


def _device_share(resources: Any) -> dict[str, float] | None:
    """What a predict task asks of a worker: a share of its GPU where workers advertise one."""
    return {"GPU": DEVICE_SHARE} if any("GPU" in found for found in resources) else None


def _check_done(future: distributed.Future, what: str, as_it_is: tuple[type[Exception], ...]) -> None:
    """Raise what a task raised, if it did: as it is, or named in one line."""
    if future.status == "finished":
        return
    if future.status != "error":
        raise PtychodaskError(
            f"reconstruct: {what} was {future.status}: the Dask client or its workers ended; start again"
        )
    error = future.exception()
    if isinstance(error, as_it_is):
        raise error
    told = (str(error).splitlines() or [""])[0]
    raise PtychodaskError(f"reconstruct: {what} failed: {type(error).__name__}: {told}") from error


def _sum_stages(parts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _lazy(job: ReconstructionJob, todo: Plan, pixel_size_m: float | None, attributes: dict[str, Any]) -> xr.Dataset:
    """The Dataset of Dask arrays: one task per chunk, one per tile, which gives all four arrays together."""
    token = tokenize(todo.store, todo.data_hash, job.prediction.model.content_hash, todo.summary(), todo.box)
    job_key, predict, tiles = f"job-{token}", f"predict-{token}", f"reassemble-{token}"
    chunk_tasks = {
        (predict, i): Task((predict, i), predict_chunk, TaskRef(job_key), c) for i, c in enumerate(todo.chunks)
    }
    tile_tasks = {
        (tiles, i): Task((tiles, i), reassemble_tile, tile, List(*(TaskRef((predict, c)) for c in tile.chunks)))
        for i, tile in enumerate(todo.tiles)
    }
    client = active_client()
    workers = client.scheduler_info(n_workers=-1)["workers"].values() if client is not None else ()
    resources = _device_share(worker["resources"] for worker in workers)
    layers: dict[str, Any] = {
        job_key: MaterializedLayer({job_key: DataNode(job_key, job)}),
        predict: MaterializedLayer(chunk_tasks, annotations={"resources": resources} if resources else None),
        tiles: MaterializedLayer(tile_tasks),
    }
    dependencies: dict[str, set[str]] = {job_key: set(), predict: {job_key}, tiles: {predict}}
    sizes = tuple(_tile_sizes(side, todo.tile) for side in todo.box.shape)
    arrays = {}
    for place, (variable, (dtype, _, _)) in enumerate(VARIABLES.items()):
        name = f"{variable}-{token}"
        picks = {}
        for i in range(len(todo.tiles)):
            key = (name, i // len(sizes[1]), i % len(sizes[1]))
            picks[key] = Task(key, getitem, TaskRef((tiles, i)), place)
        graph = HighLevelGraph({**layers, name: MaterializedLayer(picks)}, {**dependencies, name: {tiles}})
        arrays[variable] = da.Array(graph, name, sizes, dtype=dtype)
    return make_dataset(**arrays, corner=todo.box.corner, pixel_size_m=pixel_size_m, attributes=attributes)


def _tile_sizes(side: int, tile: int) -> tuple[int, ...]:
    return tuple(min(tile, side - start) for start in range(0, side, tile))
