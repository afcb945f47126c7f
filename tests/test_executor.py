"""Any executor of tasks serves: a pool of threads gives the bits that Dask gives."""

from __future__ import annotations

import itertools
import json
import queue
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from types import SimpleNamespace

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import KilledWorker
from models_for_tests import LinearModel

from ptychodask import study
from ptychodask.cluster.broadcast import shared_here
from ptychodask.cluster.executor import DaskExecutor, WorkerState
from ptychodask.errors import PtychodaskError
from ptychodask.judging.residuals import residuals
from ptychodask.progress import progress_bar
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.scheduler import Scheduler, TaskGraph
from ptychodask.simulate import simulate
from ptychodask.study import StudySpec, run_study

FIELDS = {"groups_per_chunk": 20, "batch_size": 5, "tile": 16, "progress": False}

pytestmark = pytest.mark.usefixtures("empty_caches")


class ThreadFuture:
    def __init__(self, key, running):
        self.key, self.running = key, running
        self.result, self.exception = running.result, running.exception

    @property
    def status(self):
        if not self.running.done():
            return "pending"
        return "cancelled" if self.running.cancelled() else "error" if self.running.exception() else "finished"


def resolved(argument):
    if isinstance(argument, list):
        return [resolved(each) for each in argument]
    return argument.result() if isinstance(argument, ThreadFuture) else argument


class Ended:
    def __init__(self, with_results):
        self._queue, self._with_results = queue.Queue(), with_results

    def add(self, future):
        future.running.add_done_callback(lambda _: self._queue.put(future))

    def ended(self, timeout_s):
        try:
            future = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return []
        return [(future, future.result() if self._with_results and future.status == "finished" else future)]


class Threads:
    """Executor of a thread pool; tasks start in the order in which they were submitted."""

    def __init__(self):
        self._pool, self._numbers = ThreadPoolExecutor(2), itertools.count()
        self.submitted = []

    def submit(self, function, *arguments, key=None, priority=0, workers=None, resources=None):
        self.submitted.append(function.__name__ if hasattr(function, "__name__") else str(function))
        running = self._pool.submit(lambda: function(*map(resolved, arguments)))
        return ThreadFuture(key or next(self._numbers), running)

    def compute(self, arrays):
        return list(dask.compute(*arrays, scheduler="sync"))

    def as_completed(self, *, with_results):
        return Ended(with_results)

    def wait(self, futures, timeout_s=None):
        wait([future.running for future in futures], timeout_s)

    def gather(self, futures):
        return [resolved(future) for future in futures]

    def cancel(self, futures):
        for future in futures:
            future.running.cancel()

    def workers(self):
        return {"inproc://threads": WorkerState("threads", 2, 0, {})}

    def who_has(self, futures):
        return {future.key: {"inproc://threads"} for future in futures}

    def broadcast(self, content):
        return shared_here(content)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("executor") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=120, step_px=3.0, dose=1e6, seed=1, progress=False)
    return path


@pytest.mark.parametrize(
    "fields", [{}, {"polish": 2}, {"slow_phase": True}, {"split_half": True}, {"on_error": "skip", "verify": 2}]
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_threads_reconstruct_to_the_same_bits(store, client, tmp_path, fields, on_disk):
    threads = Threads()
    by_threads, by_dask = (
        reconstruct(
            store,
            LinearModel(),
            out=tmp_path / f"{type(one).__name__}.zarr" if on_disk else None,
            client=one,
            **FIELDS,
            **fields,
        )
        for one in (threads, client)
    )
    xr.testing.assert_equal(by_threads, by_dask)
    assert {"predict_chunk", "deliver_tile"} <= set(threads.submitted)
    if "polish" in fields:
        assert json.loads(json.dumps(by_threads.ptycho.records["refinement"])) == json.loads(
            json.dumps(by_dask.ptycho.records["refinement"])
        )


@pytest.mark.parametrize("kind", ["in memory", "on disk", "lazy"])
def test_threads_judge_patterns_to_the_same_bits(store, client, tmp_path, monkeypatch, kind):
    out = tmp_path / "object.zarr" if kind == "on disk" else None
    result = reconstruct(store, LinearModel(), out=out, compute=kind != "lazy", client=client, **FIELDS)
    threads = Threads()
    xr.testing.assert_identical(residuals(result, store, client=threads), residuals(result, store, client=client))
    assert threads.submitted.count("_judge_sent") == 15


def test_a_task_of_residuals_that_fails_once_is_tried_again(store, client, monkeypatch):
    result = reconstruct(store, LinearModel(), client=client, **FIELDS)
    expected = residuals(result, store, client=client)
    module = sys.modules["ptychodask.judging.residuals"]
    judge, failures = module.judge_patterns, []

    def fails(n_times):
        def judge_patterns(scan, part, *rest):
            if part[0] == 8 and len(failures) < n_times:
                failures.append(part)
                raise RuntimeError("the disk went away\nand this is its long story")
            return judge(scan, part, *rest)

        return judge_patterns

    monkeypatch.setattr(module, "judge_patterns", fails(1))
    xr.testing.assert_identical(residuals(result, store, client=client), expected)
    failures.clear()
    monkeypatch.setattr(module, "judge_patterns", fails(2))
    with pytest.raises(
        PtychodaskError, match=r"^residuals: judging patterns 8\.\.15 failed: RuntimeError: the disk went"
    ):
        residuals(result, store, client=client)


def test_threads_compute_a_study_one_cell_at_a_time(tmp_path, monkeypatch):
    running, most, tries = [], [], []

    def fake_cell(cell, folder):
        running.append(cell.name)
        most.append(len(running))
        tries.append(cell.name)
        try:
            if cell.name.startswith("dose1000-"):
                raise PtychodaskError("training: the loss diverged")
            if cell.name.startswith("dose10-"):
                raise KilledWorker(cell.name, SimpleNamespace(address="tcp://gone"), 3)
            folder.mkdir(parents=True)
            study._write_json(folder / study.SPEC_FILE, json.loads(json.dumps(asdict(cell))))
            record = {"r_factor": 0.5, "part": ["phase"], "metric": ["ssim"], "value": [[cell.simulate["dose"]]]}
            study._write_json(folder / study.RECORD_FILE, record)
        finally:
            running.remove(cell.name)

    monkeypatch.setattr(study, "run_cell", fake_cell)
    monkeypatch.setattr(study, "_write_all", lambda *_: None)
    spec = StudySpec(dose=(10, 1e3, 1e5), step_px=(4, 8), gridsize=(1,), model=("pinn",))
    with pytest.raises(PtychodaskError, match=r"4 of 6 cells failed, the others are done; the first is dose1000-"):
        run_study(spec, tmp_path, client=Threads())
    assert max(most) == 1
    # A cell whose workers died runs once more, alone; an error of a cell is final.
    assert [tries.count(f"dose{dose}-step4-g1-pinn-s0") for dose in (10, 1000, 100000)] == [2, 1, 1]
    found = run_study(replace(spec, dose=(1e5,)), tmp_path, client=Threads())
    np.testing.assert_array_equal(found["value"].squeeze(), [1e5, 1e5])


def test_chunks_without_tiles_all_run_within_their_bound(client):
    running, most = [], []

    def task(index):
        running.append(index)
        most.append(len(running))
        running.remove(index)
        return index**2

    for executor in (Threads(), DaskExecutor(client)):
        results = {}
        graph = TaskGraph(
            n_units=[1] * 20,
            chunk_task=lambda index: (task, index),
            chunk_name=lambda index: f"squaring {index}",
            fetch_results=True,
            chunks_per_worker=1,
        )
        with progress_bar("square", 20, "numbers", False) as bar:
            Scheduler(executor, graph).complete(bar, on_chunk=results.__setitem__)
        assert results == {index: index**2 for index in range(20)}
    assert max(most) == 1
