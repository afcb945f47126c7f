"""`reconstruct`: the tasks of a plan, their run on a Dask client, and the Dataset they give."""

from __future__ import annotations

import logging
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from numbers import Integral
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

import dask.array as da
import distributed
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, List, Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from numpy.typing import NDArray

from ptychodask.cluster import active_client, client_for_run
from ptychodask.iterative import StepProducts
from ptychodask.plan import MIB, RESULT_PIXEL_BYTES, Chunk, Plan, ReconstructionSpec, Tile, plan_for
from ptychodask.polishing import (
    amplitude_sum,
    change_part,
    change_tile,
    hold_tile,
    misfit_in_all,
    plan_polishing,
    seen_part,
    step_tile,
)
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
from ptychodask.reassembly import (
    Box,
    Canvas,
    Window,
    add_patches,
    crop_middle,
    empty_canvas,
    finish,
    make_window,
    merge,
)
from ptychodask.result import (
    RESULT,
    VARIABLES,
    TileArrays,
    create_result,
    finish_result,
    make_dataset,
    open_result,
    write_tile,
)
from ptychodask.scan import PtychodaskError, Scan, with_fields
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


def deliver_polished(
    tile: Tile,
    box: Box,
    stitched: TileReport,
    polished: NDArray[np.complex64],
    out: Path | None,
    start_yx: tuple[int, int],
) -> TileReport:
    """Put the polished object into a stitched tile, unseen pixels left NaN, and write it or send it to the client.

    Parameters
    ----------
    tile, out, start_yx
        See `deliver_tile`.
    box : Box
        What `polished` holds.
    stitched : TileReport
    polished : complex64 array (y, x)

    Returns
    -------
    TileReport
    """
    assert stitched.arrays is not None
    object_, weight, uncertainty, count = stitched.arrays
    arrays = (seen_part(tile.box, box, object_, polished), weight, uncertainty, count)
    if out is not None:
        write_tile(out, start_yx, arrays)
    return replace(stitched, arrays=arrays if out is None else None)


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

    Polishing fits the stitched object to the amplitudes of the patterns, with the store's probe: it lowers
    Σ(√I_pred − √I)² + Σ hold |object − stitched|², where the hold keeps pixels that met less light than the brightest
    of one exposure near the network's answer. All patterns are projected at once in each sweep (their shares are
    summed), and the step follows the summed change and the step before (`StepProducts.mix`), so the result depends on
    chunks no more than the stitching does. A task reads the part of the object that its patterns meet. Between sweeps
    the object's tiles, 68 bytes a pixel in all, are spread over the workers. Pixels that no patch reached stay NaN;
    ``weight``, ``uncertainty`` and ``count`` stay those of the network's patches. The attribute ``polish`` records R of
    the patterns that were not dropped before the first sweep and after each.
    """
    started = time.perf_counter()
    spec = with_fields(spec, spec_fields)
    if out is not None and not compute:
        raise PtychodaskError("reconstruct: compute=False writes nothing; leave out= away, or compute")
    if spec.polish and not compute:
        raise PtychodaskError(
            f"reconstruct: compute=False with polish={spec.polish}: each sweep needs the whole object; compute, "
            "or leave polish away"
        )
    scan = open_scan(store)
    network = resolve_model(scan, model)
    todo = plan_for(scan, network, spec)
    prediction = PredictionJob(
        todo.store,
        todo.data_hash,
        todo.groups,
        ModelReference.to(network.bind(scan)),
        todo.batch_size,
        tuple(spec.drop),
    )
    job = ReconstructionJob(prediction, todo.window, todo.crop)
    attributes = _attributes(network, todo, spec)
    run = partial(_run, job, todo, scan, spec.polish, client, show=progress)
    if not compute:
        return _lazy(job, todo, scan.pixel_size_m, attributes)
    if out is None:
        _check_in_memory(todo)
        arrays = _empty_arrays(todo)
        seconds, polished = run(None, lambda tile, report: _place(arrays, todo, tile, report))
        attributes |= polished | _rates(todo, seconds, time.perf_counter() - started)
        return make_dataset(*arrays, todo.box.corner, pixel_size_m=scan.pixel_size_m, attributes=attributes)
    path = Path(out)
    if path.resolve() == Path(todo.store):
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another place with out=")
    with whole_or_nothing(path, overwrite=overwrite, form=RESULT) as building:
        create_result(building, todo.box.shape, todo.box.corner, todo.tile, pixel_size_m=scan.pixel_size_m)
        seconds, polished = run(building.resolve(), lambda tile, report: None)
        finish_result(building, attributes | polished | _rates(todo, seconds, time.perf_counter() - started))
    return open_result(path)


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
    scan: Scan,
    n_sweeps: int,
    client: distributed.Client | None,
    out: Path | None,
    take: Callable[[Tile, TileReport], None],
    *,
    show: bool | None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Stitch and polish; the wall time of each stage, and what the result records of the polishing."""
    n_chunks, n_tiles = len(todo.chunks), len(todo.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", todo.store, todo.n_groups, n_chunks, n_tiles)
    with client_for_run(client) as used:
        if n_sweeps == 0:
            return _stitch(job, todo, used, out, take, show), {}
        polishing = _Polishing(used, job, todo, scan)
        seconds = polishing.stitch(show)
        with stage(seconds, "polish"):
            r_factors = polishing.sweep(n_sweeps, show)
        polishing.deliver(out, take)
    logger.info(
        "%s: R %.4f after stitching and %.4f after %d sweeps", todo.store, r_factors[0], r_factors[-1], n_sweeps
    )
    return seconds, {"polish": {"sweeps": int(n_sweeps), "n_patterns": polishing.n_patterns, "r_factor": r_factors}}


@dataclass(frozen=True)
class _Tasks:
    """Tasks of two kinds: each chunk gives something that the tiles which it touches take."""

    chunks_of: list[tuple[int, ...]]
    """Chunks of each tile, ascending."""

    amounts: list[int]
    """Units of progress in each chunk."""

    chunk: Callable[[int], tuple[Any, ...]]
    """Function and arguments of a chunk's task."""

    tile: Callable[[int, list[distributed.Future]], tuple[Any, ...]]
    """Function and arguments of a tile's task, given what its chunks give."""

    chunk_name: Callable[[int], str]
    """What a chunk's task does, for messages."""

    tile_name: Callable[[int], str]
    """What a tile's task does, for messages."""

    on_device: bool = False
    """Chunks ask for a share of a GPU where workers advertise one."""

    every_tile: bool = False
    """Tiles that no chunk touches have a task too."""


def _stitching(
    client: distributed.Client, job: ReconstructionJob, todo: Plan, out: Path | None, *, every_tile: bool
) -> _Tasks:
    """Tasks of the plan: `predict_chunk` and `deliver_tile`."""
    # A model that lies on no disk is sent to every worker once; one with a path is loaded by each of them.
    in_memory = job.prediction.model.model is not None
    sent = client.scatter(job, hash=False, broadcast=True) if in_memory else job

    def tile_task(index: int, parts: list[distributed.Future]) -> tuple[Any, ...]:
        return deliver_tile, todo.tiles[index], parts, out, _start_yx(todo, todo.tiles[index])

    return _Tasks(
        chunks_of=[tile.chunks for tile in todo.tiles],
        amounts=[chunk.stop - chunk.start for chunk in todo.chunks],
        chunk=lambda index: (predict_chunk, sent, todo.chunks[index]),
        tile=tile_task,
        chunk_name=lambda index: f"predicting groups {todo.chunks[index].start}..{todo.chunks[index].stop - 1}",
        tile_name=lambda index: f"reassembling the tile {tuple(todo.tiles[index].box)}",
        on_device=True,
        every_tile=every_tile,
    )


def _stitch(
    job: ReconstructionJob,
    todo: Plan,
    client: distributed.Client,
    out: Path | None,
    take: Callable[[Tile, TileReport], None],
    show: bool | None,
) -> dict[str, float]:
    """Run every task of a plan; gives the wall time of each stage, summed over the tasks."""
    seconds = _Seconds()

    def taken(index: int, future: distributed.Future) -> None:
        report = future.result()
        seconds.add(todo.tiles[index], report)
        take(todo.tiles[index], report)

    tasks = _stitching(client, job, todo, out, every_tile=False)
    with (
        show_progress("reconstruct", todo.n_groups, "groups", show) as progress,
        _Run(client, tasks).guarded() as run,
    ):
        run.to_its_end(taken, progress)
    return seconds.in_all()


class _Seconds:
    """Wall time of the stages; a chunk's is told by each of its tiles and counts once."""

    def __init__(self) -> None:
        self._chunks: dict[int, dict[str, float]] = {}
        self._tiles: list[dict[str, float]] = []

    def add(self, tile: Tile, report: TileReport) -> None:
        self._chunks |= dict(zip(tile.chunks, report.chunk_seconds, strict=True))
        self._tiles.append(report.seconds)

    def in_all(self) -> dict[str, float]:
        return _sum_stages([*self._chunks.values(), *self._tiles])


class _Run:
    """The client's side of a run: which tasks are out, and what a tile still waits for."""

    def __init__(self, client: distributed.Client, tasks: _Tasks) -> None:
        self._client, self._tasks = client, tasks
        self._name = uuid.uuid4().hex[:12]
        self._next_chunk = 0
        self._given: dict[int, distributed.Future] = {}
        self._missing = [len(chunks) for chunks in tasks.chunks_of]
        self._tiles_of: list[list[int]] = [[] for _ in tasks.amounts]
        for index, chunks in enumerate(tasks.chunks_of):
            for chunk in chunks:
                self._tiles_of[chunk].append(index)
        self._unused = [len(tiles) for tiles in self._tiles_of]
        self._at_chunks: dict[distributed.Future, int] = {}
        self._at_tiles: dict[distributed.Future, int] = {}
        self._completed = distributed.as_completed(loop=client.loop)

    @contextmanager
    def guarded(self) -> Iterator[_Run]:
        """The run; whatever ends it early, no task is left behind, and none writes any more."""
        try:
            yield self
        finally:
            self._client.cancel(list(self._at_chunks))
            if self._at_tiles:
                with suppress(TimeoutError), self._client.as_current():
                    distributed.wait(list(self._at_tiles), timeout=WRITERS_WAIT_S)
                self._client.cancel(list(self._at_tiles))

    def to_its_end(self, take: Callable[[int, distributed.Future], None], progress: Progress) -> None:
        """Run all tasks; `take` gets each tile, by its index, as it is done."""
        if self._tasks.every_tile:
            for index, missing in enumerate(self._missing):
                if missing == 0:
                    self._submit_tile(index)
        self._submit_chunks()
        while self._at_chunks or self._at_tiles:
            future = next(self._completed)
            if future in self._at_chunks:
                progress.advance(self._tasks.amounts[self._chunk_done(future)])
            else:
                take(self._tile_done(future), future)
            self._submit_chunks()

    def _submit_chunks(self) -> None:
        """Keep each thread busy with one task and one more at hand, and no more: what they give would pile up."""
        if self._next_chunk == len(self._tasks.amounts):
            return
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        threads = sum(worker["nthreads"] for worker in workers)
        resources = _device_share(worker["resources"] for worker in workers) if self._tasks.on_device else None
        while len(self._at_chunks) < max(2, 2 * threads) and self._next_chunk < len(self._tasks.amounts):
            function, *arguments = self._tasks.chunk(self._next_chunk)
            future = self._client.submit(
                function,
                *arguments,
                key=f"{function.__name__}-{self._name}-{self._next_chunk}",
                resources=resources,
                pure=False,
            )
            self._at_chunks[future] = self._next_chunk
            self._completed.add(future)
            self._next_chunk += 1

    def _chunk_done(self, future: distributed.Future) -> int:
        index = self._at_chunks.pop(future)
        _check_done(future, self._tasks.chunk_name(index), (PtychodaskError,))
        self._given[index] = future
        for tile in self._tiles_of[index]:
            self._missing[tile] -= 1
            if self._missing[tile] == 0:
                self._submit_tile(tile)
        return index

    def _submit_tile(self, index: int) -> None:
        chunks = self._tasks.chunks_of[index]
        function, *arguments = self._tasks.tile(index, [self._given[chunk] for chunk in chunks])
        future = self._client.submit(
            function, *arguments, key=f"{function.__name__}-{self._name}-{index}", priority=1, pure=False
        )
        self._at_tiles[future] = index
        self._completed.add(future)
        for chunk in chunks:
            self._unused[chunk] -= 1
            if self._unused[chunk] == 0:
                # The tasks that were submitted hold what it gave; it goes with the last of them.
                del self._given[chunk]

    def _tile_done(self, future: distributed.Future) -> int:
        index = self._at_tiles.pop(future)
        # What the disk refuses is named by `whole_or_nothing`.
        _check_done(future, self._tasks.tile_name(index), (PtychodaskError, OSError))
        return index


class _Polishing:
    """The client's side of polishing: the tiles of the object, which stay with the workers from sweep to sweep."""

    def __init__(self, client: distributed.Client, job: ReconstructionJob, todo: Plan, scan: Scan) -> None:
        self._client, self._stitching, self._todo = client, job, todo
        self._boxes, self._parts = plan_polishing(scan, todo, job.prediction.drop)
        # The model stays behind: sweeps need the scan alone.
        self._job = replace(job.prediction, model=replace(job.prediction.model, model=None))
        self._parts_of = [
            tuple(index for index, part in enumerate(self._parts) if tile in part.tiles)
            for tile in range(len(todo.tiles))
        ]
        self.n_patterns = sum(len(part.index) for part in self._parts)
        self._stitched: list[distributed.Future] = []
        self._objects: list[distributed.Future] = []

    def stitch(self, show: bool | None) -> dict[str, float]:
        """Stitch; the tiles stay with the workers. Gives the wall time of each stage."""
        todo = self._todo
        done: dict[int, distributed.Future] = {}
        tasks = _stitching(self._client, self._stitching, todo, None, every_tile=True)
        with (
            show_progress("reconstruct", todo.n_groups, "groups", show) as progress,
            _Run(self._client, tasks).guarded() as run,
        ):
            run.to_its_end(done.__setitem__, progress)
        self._stitched = [done[index] for index in range(len(todo.tiles))]
        seconds = _Seconds()
        for tile, report in zip(todo.tiles, self._told(self._on_tiles(_times, self._stitched)), strict=True):
            seconds.add(tile, report)
        return seconds.in_all()

    def sweep(self, n_sweeps: int, show: bool | None) -> list[float]:
        """Sweep over the patterns; R before the first sweep and after each."""
        stitched = self._on_tiles(_object_of, self._stitched)
        summed = self._told(self._on_tiles(amplitude_sum, stitched))
        mean = sum(total for total, _ in summed) / sum(count for _, count in summed)
        places = [tile.box for tile in self._todo.tiles]
        hold = partial(hold_tile, self._job, mean=mean)
        held = self._on_tiles(hold, places, self._boxes, stitched)
        objects = before = self._on_tiles(attrgetter("start"), held)
        changes: list[Any] = [None] * len(held)
        r_factors: list[float] = []
        most = 0.0
        with show_progress("polish", (n_sweeps + 1) * self.n_patterns, "patterns", show) as progress:
            for sweep in range(n_sweeps + 1):
                earlier, changes = changes, self._changes(held, objects, before, changes, progress)
                reports = self._told(self._on_tiles(attrgetter("report"), changes))
                misfit = misfit_in_all(reports)
                r_factors.append(misfit.r_factor)
                progress.note(f"{sweep} of {n_sweeps} sweeps, R {misfit.r_factor:.4f}")
                if sweep == n_sweeps:
                    break
                missed = misfit.square + sum(report.held for report in reports)
                most = missed if sweep == 0 else most
                # The plain step never raises what is to be lowered, so it brings back a run that has strayed.
                products = sum((report.products for report in reports), StepProducts())
                mix = products.mix() if missed <= most else StepProducts().mix()
                step = partial(step_tile, mix=mix)
                before, objects = objects, self._on_tiles(step, held, objects, before, changes, earlier)
        self._objects = objects
        return r_factors

    def _changes(
        self,
        held: list[distributed.Future],
        objects: list[distributed.Future],
        before: list[distributed.Future],
        earlier: list[Any],
        progress: Progress,
    ) -> list[distributed.Future]:
        """What all patterns call for, tile by tile."""
        parts, boxes = self._parts, self._boxes
        done: dict[int, distributed.Future] = {}

        def part_task(index: int) -> tuple[Any, ...]:
            return change_part, self._job, parts[index], [objects[tile] for tile in parts[index].tiles]

        def tile_task(index: int, given: list[distributed.Future]) -> tuple[Any, ...]:
            known = held[index], objects[index], before[index], earlier[index]
            return change_tile, boxes[index], *known, given, self._parts_of[index]

        tasks = _Tasks(
            chunks_of=self._parts_of,
            amounts=[len(part.index) for part in parts],
            chunk=part_task,
            tile=tile_task,
            chunk_name=lambda index: f"polishing with the patterns over {tuple(parts[index].box)}",
            tile_name=lambda index: f"polishing the tile {tuple(boxes[index])}",
            every_tile=True,
        )
        with _Run(self._client, tasks).guarded() as run:
            run.to_its_end(done.__setitem__, progress)
        return [done[index] for index in range(len(boxes))]

    def deliver(self, out: Path | None, take: Callable[[Tile, TileReport], None]) -> None:
        """Write the tiles, or hand them to `take`."""
        todo = self._todo

        def tile_task(index: int, _: list[distributed.Future]) -> tuple[Any, ...]:
            tile = todo.tiles[index]
            box, stitched, polished = self._boxes[index], self._stitched[index], self._objects[index]
            return deliver_polished, tile, box, stitched, polished, out, _start_yx(todo, tile)

        tasks = _Tasks(
            chunks_of=[()] * len(todo.tiles),
            amounts=[],
            chunk=lambda index: (),
            tile=tile_task,
            chunk_name=lambda index: "",
            tile_name=lambda index: f"delivering the tile {tuple(todo.tiles[index].box)}",
            every_tile=True,
        )
        with show_progress("deliver", 0, "tiles", False) as progress, _Run(self._client, tasks).guarded() as run:
            run.to_its_end(lambda index, future: take(todo.tiles[index], future.result()), progress)

    def _on_tiles(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[distributed.Future]:
        """One task for each tile, with its place in each column."""
        return [self._client.submit(function, *row, priority=1, pure=False) for row in zip(*columns, strict=True)]

    def _told(self, futures: list[distributed.Future]) -> list[Any]:
        """What small tasks give."""
        for future in distributed.as_completed(futures, loop=self._client.loop):
            _check_done(future, "polishing", (PtychodaskError,))
        return list(self._client.gather(futures))


def _object_of(report: TileReport) -> NDArray[np.complex64]:
    assert report.arrays is not None
    return report.arrays[0]


def _times(report: TileReport) -> TileReport:
    return replace(report, arrays=None)


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
    token = tokenize(
        todo.store, todo.data_hash, job.prediction.model.content_hash, todo.summary(), todo.box, job.prediction.drop
    )
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
