"""A reconstruction that follows a scan: to the bit that of the finished scan, however segments and runs come."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
from models_for_tests import LinearModel, SlowModel

from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.plan import plan
from ptychodask.plan.chunks import chunk_edges
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reconstruction import follow, live, reconstruct
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store import GroupTable, StoredScan, open_scan
from ptychodask.store.append import append_segment, finish_scan
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

SIZES = (90, 41, 60, 75)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A scan from which segments are taken, from top to bottom as a stage moves."""
    path = tmp_path_factory.mktemp("follow") / "whole.zarr"
    return simulate(path, n_pixels=16, n_patterns=sum(SIZES), step_px=3.0, seed=3)


@pytest.fixture
def quick(monkeypatch):
    """The store is looked at all the time."""
    monkeypatch.setattr(follow, "POLL_S", 0.01)


def part_of(whole, number):
    order = np.argsort(whole.position_yx_px[:, 0])
    start = sum(SIZES[:number])
    index = order[start : start + SIZES[number]]
    return {"diffraction": whole.diffraction[index], "position_yx_px": whole.position_yx_px[index]}


def begin(store, whole):
    write_scan(store, **part_of(whole, 0), probe=whole.probe, domain="counts", calibration="as_given", growing=True)


def append(store, whole, *numbers, finish=False):
    for number in numbers:
        append_segment(store, **part_of(whole, number))
    if finish:
        finish_scan(store)


@pytest.fixture(scope="module")
def finished(whole, tmp_path_factory):
    """The store of the finished scan."""
    path = tmp_path_factory.mktemp("finished") / "scan.zarr"
    begin(path, whole)
    append(path, whole, 1, 2, 3, finish=True)
    return path


def assert_same(ds, other):
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(ds[name].values, other[name].values)
    for name in ("data_hash", "plan", "spec", "model", "skipped"):
        assert ds.attrs[name] == other.attrs[name], name


class Appending:
    """A function for `live` that appends the next segment whenever a picture of all that there is was shown."""

    def __init__(self, store, whole):
        self.store, self.whole, self.next, self.pictures = store, whole, 1, []

    def __call__(self, picture):
        self.pictures.append(picture)
        if picture.attrs["tiles_done"] == picture.attrs["n_tiles"] and self.next <= len(SIZES):
            if self.next < len(SIZES):
                append(self.store, self.whole, self.next)
            else:
                finish_scan(self.store)
            self.next += 1


def test_chunks_begin_anew_in_each_segment(finished):
    group(finished)
    todo = plan(finished, LinearModel())
    table = StoredScan(finished).table(todo.groups)
    assert isinstance(table, GroupTable)
    assert table.segments == SIZES
    edges = chunk_edges(SIZES, todo.groups_per_chunk).tolist()
    assert [(chunk.start, chunk.stop) for chunk in todo.chunks] == list(itertools.pairwise(edges))
    assert set(np.cumsum(SIZES)) <= set(edges)


def test_early_chunks_are_those_of_the_finished_scan(whole, finished, tmp_path):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    last = plan(finished, LinearModel())
    for number in range(1, len(SIZES)):
        early = plan(store, LinearModel())
        assert early.chunks == last.chunks[: len(early.chunks)]
        assert (early.batch_size, early.groups_per_chunk) == (last.batch_size, last.groups_per_chunk)
        append(store, whole, number)


def test_a_growing_scan_is_reconstructed_as_it_is_now(whole, client, tmp_path):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    first = reconstruct(store, LinearModel(), client=client)
    append(store, whole, 1)
    second = reconstruct(store, LinearModel(), client=client)
    assert second["count"].sum() > first["count"].sum()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"groups_per_chunk": 13, "batch_size": 5, "tile": 24},
        {"polish": 1},
        {"slow_phase": True},
        {"split_half": True},
        {"roi": (-30, 5, -20, 15)},
        {"on_error": "skip"},
    ],
)
def test_it_gives_the_bits_of_the_finished_scan(whole, finished, client, tmp_path, quick, monkeypatch, fields):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    watching = Appending(store, whole)
    out = tmp_path / "object.zarr"
    ds = reconstruct(store, LinearModel(), out=out, client=client, follow=True, live=watching, **fields)
    assert watching.next == len(SIZES) + 1
    expected = reconstruct(finished, LinearModel(), client=client, **fields)
    if "polish" in fields:
        # Whoever reads the stitched object from disk sums the same numbers.
        expected = reconstruct(finished, LinearModel(), out=tmp_path / "other.zarr", client=client, **fields)
    assert_same(ds, expected)
    seen = [int(np.isfinite(picture["amplitude"].values).sum()) for picture in watching.pictures]
    assert max(seen) == seen[-1]


def test_a_region_that_no_segment_reaches_yet_is_waited_for(whole, finished, client, tmp_path, quick, told):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    fields = {"roi": (20, 33, -20, 15), "client": client}
    with pytest.raises(PtychodaskError, match="does not overlap the object"):
        reconstruct(store, LinearModel(), **fields)
    writer = threading.Timer(0.2, append, (store, whole, 1, 2, 3), {"finish": True})
    writer.start()
    ds = reconstruct(store, LinearModel(), out=tmp_path / "object.zarr", follow=True, **fields)
    writer.join()
    assert any("waiting for a segment that does" in text for text in told)
    assert_same(ds, reconstruct(finished, LinearModel(), **fields))
    with pytest.raises(PtychodaskError, match="does not overlap the object"):
        reconstruct(finished, LinearModel(), client=client, follow=True, roi=(400, 500, 0, 9))


def test_several_models_follow_together(whole, finished, client, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    models = {"one": LinearModel(), "two": LinearModel(content_hash="other")}
    watching = Appending(store, whole)
    ds = reconstruct(store, models, out=tmp_path / "object.zarr", client=client, follow=True, live=watching)
    assert_same(ds, reconstruct(finished, models, client=client))


def test_a_notebook_has_one_picture_for_all_segments(whole, client, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store, handles = tmp_path / "scan.zarr", set()
    begin(store, whole)
    watching = Appending(store, whole)

    class Output(live._InNotebook):
        def __call__(self, picture):
            handles.add(self)
            watching(picture)

    monkeypatch.setattr(live, "_InNotebook", Output)
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    reconstruct(store, LinearModel(), out=tmp_path / "object.zarr", client=client, follow=True, live=True)
    assert len(handles) == 1


def test_each_group_is_predicted_once(whole, client, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store, model = tmp_path / "scan.zarr", LinearModel()
    begin(store, whole)
    fields = {"groups_per_chunk": 13, "batch_size": 5}
    reconstruct(
        store, model, out=tmp_path / "object.zarr", client=client, follow=True, live=Appending(store, whole), **fields
    )
    assert len(model.calls) == n_batches(plan(store, model, ReconstructionSpec(**fields)))


def n_batches(todo):
    return sum(-(-(chunk.stop - chunk.start) // todo.batch_size) for chunk in todo.chunks)


def test_a_complete_scan_just_runs(finished, client):
    assert_same(
        reconstruct(finished, LinearModel(), client=client, follow=True),
        reconstruct(finished, LinearModel(), client=client),
    )


def test_no_segment_for_long_ends_the_run_and_resume_goes_on(whole, finished, client, tmp_path, quick, monkeypatch):
    store, out, model = tmp_path / "scan.zarr", tmp_path / "object.zarr", LinearModel()
    begin(store, whole)
    options = {"out": out, "client": client, "follow": True}
    with pytest.raises(
        PtychodaskError, match=r"no new segment within follow_timeout_s=0.05 s after 1 .* continue with resume=True"
    ):
        reconstruct(store, model, follow_timeout_s=0.05, **options)
    n_calls = len(model.calls)
    assert n_calls > 0
    append(store, whole, 1, 2, 3, finish=True)
    # The run began on a scan that grew, and goes on with one that is complete.
    ds = reconstruct(store, model, resume=True, **options)
    assert len(model.calls) == n_batches(plan(store, model))
    assert_same(ds, reconstruct(finished, model, client=client))
    assert not list(tmp_path.glob(".object*"))


def test_a_run_that_followed_goes_on_while_the_scan_still_grows(whole, finished, client, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store, out, model = tmp_path / "scan.zarr", tmp_path / "object.zarr", LinearModel()
    begin(store, whole)
    options = {"out": out, "client": client, "follow": True}
    with pytest.raises(PtychodaskError, match="resume=True"):
        reconstruct(store, model, follow_timeout_s=0.05, **options)
    n_calls = len(model.calls)
    ds = reconstruct(store, model, resume=True, live=Appending(store, whole), **options)
    assert 0 < n_calls < len(model.calls) == n_batches(plan(store, model))
    assert_same(ds, reconstruct(finished, model, client=client))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out": None}, "kept on a disk until it is finished; pass out="),
        ({"verify": 1}, "verify needs a complete scan"),
        ({"cache": "patches.zarr"}, "cache needs a complete scan"),
        ({"out": None, "compute": False}, "nothing to follow"),
        ({"follow_timeout_s": 0.0}, "a time above 0"),
    ],
)
def test_what_cannot_be_followed_is_refused(whole, client, tmp_path, fields, message):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    options = {"out": tmp_path / "object.zarr", "client": client, "follow": True} | fields
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(store, LinearModel(), **options)


def test_a_store_that_is_replaced_meanwhile_is_told_apart(whole, client, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(live, "REFRESH_S", 0.0)
    store = tmp_path / "scan.zarr"
    begin(store, whole)

    def replaces(picture):
        if picture.attrs["tiles_done"] == picture.attrs["n_tiles"]:
            part = part_of(whole, 1)
            write_scan(
                store, **part, probe=whole.probe, domain="counts", calibration="as_given", growing=True, overwrite=True
            )
            append_segment(store, **part_of(whole, 2))

    with pytest.raises(PtychodaskError, match="first_segment was"):
        reconstruct(store, LinearModel(), out=tmp_path / "a.zarr", client=client, follow=True, live=replaces)


def test_a_cache_of_a_scan_with_segments_serves_as_well(finished, client, tmp_path):
    fields = {"client": client, "cache": tmp_path / "patches.zarr", "groups_per_chunk": 13, "batch_size": 5}
    model = LinearModel()
    reconstruct(finished, model, **fields)
    n_calls = len(model.calls)
    again = reconstruct(finished, model, **fields)
    assert len(model.calls) == n_calls
    expected = reconstruct(finished, model, client=client, groups_per_chunk=13, batch_size=5)
    scale = np.nanmedian(np.abs(expected["object"].values))
    # The cache keeps float16.
    assert np.nanmax(np.abs(again["object"].values - expected["object"].values)) < 2e-3 * scale


WRITER = """
import sys
import time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_follow import append
from ptychodask.store import open_scan
whole, store, shown = open_scan({whole!r}), {store!r}, Path({shown!r})
for number in (1, 2, 3):
    # Each segment comes after something was seen of the one before.
    before = shown.stat().st_mtime_ns if shown.exists() else None
    while not shown.exists() or shown.stat().st_mtime_ns == before:
        time.sleep(0.02)
    append(store, whole, number, finish=number == 3)
"""


def test_worker_processes_follow_a_scan_that_another_process_writes(whole, finished, client, tmp_path, quick):
    store, shown = tmp_path / "scan.zarr", tmp_path / "live.png"
    begin(store, whole)
    from pathlib import Path

    source = WRITER.format(tests=str(Path(__file__).parent), whole=whole.store, store=str(store), shown=str(shown))
    model = SlowModel(seconds=0.01)
    with subprocess.Popen([sys.executable, "-c", source]) as writer, local_client(2) as workers:
        ds = reconstruct(
            store, model, out=tmp_path / "object.zarr", client=workers, follow=True, live=shown, follow_timeout_s=60
        )
        assert writer.wait() == 0
    assert_same(ds, reconstruct(finished, model, client=client))
    assert open_scan(store).data_hash == open_scan(finished).data_hash
    assert_same(open_result(tmp_path / "object.zarr"), ds)


def test_the_command_line_follows(whole, tmp_path, refused):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    told = refused(
        "reconstruct", store, "--model", "none.model", "--follow", "--follow-timeout-s", "0.05", "--live", "a.jpg"
    )
    assert "a.jpg: live= must be the path of a .png" in told


def test_appending_while_it_is_predicted_disturbs_nothing(whole, finished, client, tmp_path, quick):
    store = tmp_path / "scan.zarr"
    begin(store, whole)
    model = SlowModel(seconds=0.01)
    writer = threading.Thread(target=append, args=(store, whole, 1, 2, 3), kwargs={"finish": True})
    writer.start()
    ds = reconstruct(store, model, out=tmp_path / "object.zarr", client=client, follow=True, batch_size=5)
    writer.join()
    assert_same(ds, reconstruct(finished, model, client=client, batch_size=5))
