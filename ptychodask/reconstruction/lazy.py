"""Lazy result: Dask arrays over the tasks of a plan."""

from __future__ import annotations

from operator import getitem
from typing import Any

import dask.array as da
import xarray as xr
from dask._task_spec import DataNode, List, Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from ptychodask.cluster.clients import active_client
from ptychodask.cluster.executor import DaskExecutor, device_share
from ptychodask.reconstruction.run import Run
from ptychodask.reconstruction.tasks import predict_chunk, reassemble_tile
from ptychodask.result import make_dataset


def lazy_result(run: Run) -> xr.Dataset:
    """Dataset of Dask arrays, computed on demand.

    One task for each chunk, and one for each tile, which returns all arrays of the tile.
    """
    job, plan = run.job, run.plan
    predictions = [method.prediction for method in job.methods]
    token = tokenize(
        [
            (
                each.store,
                each.data_hash,
                each.groups,
                each.model.content_hash,
                each.drop,
                each.experiment,
                each.precision,
            )
            for each in predictions
        ],
        plan.summary(),
        plan.box,
        job.layers,
        job.patches,
        job.position_yx_px,
    )
    job_key, predict, tiles = f"job-{token}", f"predict-{token}", f"reassemble-{token}"
    chunk_tasks = {
        (predict, i): Task((predict, i), predict_chunk, TaskRef(job_key), c) for i, c in enumerate(plan.chunks)
    }
    tile_tasks = {
        (tiles, i): Task(
            (tiles, i), reassemble_tile, job.layers, tile, List(*(TaskRef((predict, c)) for c in tile.chunks))
        )
        for i, tile in enumerate(plan.tiles)
    }
    client = active_client()
    resources = None if client is None else device_share(DaskExecutor(client).workers())
    layers: dict[str, Any] = {
        job_key: MaterializedLayer({job_key: DataNode(job_key, job)}),
        predict: MaterializedLayer(chunk_tasks, annotations={"resources": resources} if resources else None),
        tiles: MaterializedLayer(tile_tasks),
    }
    dependencies: dict[str, set[str]] = {job_key: set(), predict: {job_key}, tiles: {predict}}
    planes = tuple(_tile_sizes(side, plan.tile) for side in plan.box.shape)
    arrays = {}
    for variable, schema in job.layers.variables.items():
        name = f"{variable}-{token}"
        leading = tuple((size,) for size in job.layers.shape(variable, (0, 0))[:-2])
        picks = {}
        for i in range(len(plan.tiles)):
            key = (name, *[0] * len(leading), i // len(planes[1]), i % len(planes[1]))
            picks[key] = Task(key, getitem, TaskRef((tiles, i)), variable)
        graph = HighLevelGraph({**layers, name: MaterializedLayer(picks)}, {**dependencies, name: {tiles}})
        arrays[variable] = da.Array(graph, name, (*leading, *planes), dtype=schema.dtype)
    return make_dataset(
        **arrays,
        corner=plan.box.corner,
        pixel_size_m=run.scan.pixel_size_m,
        attributes=run.attributes,
        layers=job.layers,
    )


def _tile_sizes(side: int, tile: int) -> tuple[int, ...]:
    return tuple(min(tile, side - start) for start in range(0, side, tile))
