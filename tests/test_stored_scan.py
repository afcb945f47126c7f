"""The handle of a stored scan: opened once in a process by all that a reconstruction does."""

from __future__ import annotations

import os

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from models_for_tests import LinearModel

from ptychodask import prediction
from ptychodask.cluster.clients import QUIET
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.models.contract import PatchModel
from ptychodask.plan import plan, prediction_job
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.prediction import open_stored
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.annotate import replace_probe
from ptychodask.store.append import append_segment, finish_scan
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

FIELDS = {"groups_per_chunk": 30, "tile": 20, "progress": False}

OPENED: list[str] = []
"""Modes in which this process has opened the scan; the rest of the list is on each worker."""


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=100, step_px=3.0, seed=1, progress=False)
    return path


def count_openings():
    """Count how often this process opens a scan, until the function returned is called."""
    OPENED.clear()
    open_group = zarr.open_group

    def counted(opened, *arguments, **options):
        if str(opened).endswith("scan.zarr"):
            OPENED.append(options["mode"])
        return open_group(opened, *arguments, **options)

    zarr.open_group = counted

    def stop():
        zarr.open_group = open_group
        return list(OPENED)

    return stop


@pytest.fixture
def openings():
    stop = count_openings()
    yield OPENED
    stop()


CASES = {
    "in memory": {},
    "to a store": {"out": "object.zarr"},
    "polished": {"polish": 2},
    "polished to a store": {"polish": 1, "out": "object.zarr"},
    "halves": {"split_half": True},
    "tolerant": {"on_error": "skip"},
    "cached": {"cache": "patches.zarr"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("client_of", ["given", "started"])
def test_a_reconstruction_opens_the_scan_once(store, client, tmp_path, openings, case, client_of):
    group(store, GroupingSpec(halves=case == "halves"))
    del openings[:]
    options = {name: tmp_path / value if name in ("out", "cache") else value for name, value in CASES[case].items()}
    reconstruct(store, LinearModel(), client=client if client_of == "given" else None, **FIELDS, **options)
    assert openings == ["r"]


def test_a_missing_table_is_stored_without_opening_the_scan_for_reading_again(store, openings):
    del openings[:]
    reconstruct(store, LinearModel(), **FIELDS)
    assert openings == ["r", "r+"]


def test_a_lazy_result_and_two_models_open_the_scan_once(store, openings, monkeypatch, tmp_path):
    group(store)
    del openings[:]
    monkeypatch.chdir(store.parent)
    lazy = reconstruct("scan.zarr", {"one": LinearModel(), "other": LinearModel("other")}, compute=False, **FIELDS)
    # Tasks find the scan wherever the process is by now.
    monkeypatch.chdir(os.sep)
    assert np.isfinite(lazy["object"].compute(scheduler="threads").values).any()
    assert openings == ["r"]


def test_each_worker_process_opens_the_scan_once(store, openings, tmp_path):
    group(store)
    local = reconstruct(store, LinearModel(), polish=1, **FIELDS)
    del openings[:]
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", memory_limit=None, **QUIET) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(count_openings)
        for out in (None, tmp_path / "object.zarr"):
            reconstruct(store, LinearModel(), client=client, polish=1, out=out, **FIELDS)
        # The client opens it anew for each run, since models or another probe may have been recorded meanwhile.
        assert openings == ["r", "r"]
        assert list(client.run(opened_here).values()) == [["r"]]
        # A table made since is seen by the worker, which reads the metadata once more.
        ds = reconstruct(store, LinearModel(), client=client, groups=GroupingSpec(seed=5), **FIELDS)
        assert list(client.run(opened_here).values()) == [["r", "r"]]
        again = reconstruct(store, LinearModel(), client=client, polish=1, **FIELDS)
        assert list(client.run(opened_here).values()) == [["r", "r"]]
    np.testing.assert_array_equal(again["object"].values, local["object"].values)
    assert ds.ptycho.records["plan"]["groups"] == GroupingSpec(seed=5).name


def opened_here():
    return list(OPENED)


def job_of(store, model: PatchModel):
    planned = plan(store, model, ReconstructionSpec())
    return prediction_job(planned, model, StoredScan(store).first(), ReconstructionSpec())


def test_plan_and_tasks_share_the_handle(store):
    group(store)
    job = job_of(store, LinearModel())
    assert open_stored(job) is open_stored(job)
    assert prediction._STORES.get((job.data_hash, str(store)), pytest.fail) is open_stored(job)
    assert open_stored(job).scan is open_stored(job).scan


def test_a_run_opens_the_scan_anew_and_tasks_of_another_probe_are_refused(store):
    group(store)
    job = job_of(store, LinearModel())
    before = open_stored(job)
    changed = replace_probe(store, 2 * open_scan(store).probe, {})
    later = job_of(store, LinearModel())
    assert later.data_hash == changed.data_hash != job.data_hash
    np.testing.assert_array_equal(open_stored(later).probe, 2 * before.probe)
    prediction._STORES._kept.clear()
    with pytest.raises(PtychodaskError, match="changed since it was planned"):
        open_stored(job)


def test_a_handle_keeps_the_scan_that_it_opened_while_it_grows(store, tmp_path):
    scan, path = open_scan(store), tmp_path / "growing.zarr"

    def part(rows):
        return {"diffraction": scan.diffraction[rows], "position_yx_px": scan.position_yx_px[rows]}

    write_scan(
        path,
        **part(slice(0, 60)),
        probe=scan.probe,
        domain="counts",
        calibration="as_given",
        growing=True,
    )
    first = StoredScan(path)
    assert first.growth() == ("growing", 1)
    append_segment(path, **part(slice(60, 100)), progress=False)
    assert (first.n_patterns, first.growth()) == (60, ("growing", 2))
    table, rows = group(path), first.member(GroupingSpec().name, 0, 60)
    np.testing.assert_array_equal(rows, table.member[:60])
    assert len(first.table(GroupingSpec().name)) == 60
    assert len(group(path)) == 100
    first.check()
    assert first.scan.n_patterns == 60
    finish_scan(path)
    both = StoredScan(path)
    assert both.growth() == first.growth() == ("complete", 2)
    assert both.had_hash(first.data_hash)
    assert not first.had_hash(both.data_hash)
    drawn = np.concatenate(both.draw(GroupingSpec()))
    np.testing.assert_array_equal(drawn, table.member)
