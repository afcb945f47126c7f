"""A scan that grows: segments appear whole, keep what the first one had, and give what the finished scan gives."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import xarray as xr
import zarr

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, group_positions
from ptychodask.inspection import inspect_file
from ptychodask.io import ingest
from ptychodask.iterative import refine_probe
from ptychodask.simulate import simulate
from ptychodask.storage import atomic as folders
from ptychodask.store import StoredScan, open_scan
from ptychodask.store import append as growing
from ptychodask.store.annotate import record_model, replace_probe
from ptychodask.store.append import append_segment, finish_scan
from ptychodask.store.groups import group

SIZES = (70, 31, 90)
"""Patterns of the segments: chunks of the store (2048 patterns) and of tables hold several."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three files of one scan, as a beamline would hand them over."""
    folder = tmp_path_factory.mktemp("segments")
    scan = simulate(folder / "whole.zarr", n_pixels=16, n_patterns=sum(SIZES), step_px=3.0, seed=2)
    paths, start = [], 0
    for number, size in enumerate(SIZES):
        part = slice(start, start + size)
        paths.append(folder / f"part{number}.npz")
        write_npz(paths[-1], scan, part)
        start += size
    return paths


def write_npz(path, scan, part, **others):
    position = scan.position_yx_px[part]
    arrays = {
        "diff3d": np.sqrt(scan.diffraction[part].astype(np.float32)),
        "ycoords": position[:, 0],
        "xcoords": position[:, 1],
        "probeGuess": scan.probe[0],
    }
    np.savez(path, **(arrays | others))


def grown(store, files, *, finish=True, **options):
    for path in files:
        ingest(path, store, append=True, **options)
    return finish_scan(store) if finish else open_scan(store)


def test_segments_make_the_scan_that_one_file_makes(files, tmp_path):
    scan = grown(tmp_path / "scan.zarr", files)
    assert scan.attributes["state"] == "complete"
    assert [one["n_patterns"] for one in scan.attributes["segments"]] == list(SIZES)
    start = 0
    for path, size in zip(files, SIZES, strict=True):
        part = slice(start, start + size)
        source = scan.source_index[part]
        assert sorted(source) == list(range(size))
        with np.load(path) as file:
            np.testing.assert_array_equal(scan.diffraction[part], file["diff3d"][source])
            np.testing.assert_array_equal(scan.position_yx_px[part, 0], file["ycoords"][source])
            np.testing.assert_array_equal(scan.position_yx_px[part, 1], file["xcoords"][source])
        start += size


def test_probe_and_normalisation_stay_those_of_the_first_segment(files, tmp_path):
    first = ingest(files[0], tmp_path / "first.zarr")
    scan = grown(tmp_path / "scan.zarr", files)
    assert scan.normalization == first.normalization
    np.testing.assert_array_equal(scan.probe, first.probe)


@pytest.mark.parametrize(
    "spec", [GroupingSpec(), GroupingSpec(members=1), GroupingSpec(oversampling=2), GroupingSpec(halves=True)]
)
def test_groups_that_grew_are_those_of_the_finished_scan(files, tmp_path, spec):
    store, before = tmp_path / "scan.zarr", None
    for path in files:
        ingest(path, store, append=True)
        table = group(store, spec).member
        if before is not None:
            np.testing.assert_array_equal(table[: len(before)], before)
        before = table
    scan = finish_scan(store)
    np.testing.assert_array_equal(StoredScan(store).table(spec.name).rows(0, len(before)), before)
    late = tmp_path / "late.zarr"
    grown(late, files)
    np.testing.assert_array_equal(group(late, spec).member, before)
    # Each segment is drawn as if it were a scan of its own.
    edges = np.cumsum((0, *SIZES))
    expected = [
        group_positions(scan.position_yx_px[start:stop], spec) + start for start, stop in itertools.pairwise(edges)
    ]
    np.testing.assert_array_equal(before, np.concatenate(expected))
    half = before % 2
    assert not spec.halves or (half == half[:, :1]).all()


def test_the_hash_tells_every_state_apart_and_that_of_the_last_is_kept(files, tmp_path):
    store, hashes = tmp_path / "scan.zarr", []
    for path in files:
        hashes.append(ingest(path, store, append=True).data_hash)
    assert len(set(hashes)) == len(files)
    assert finish_scan(store).data_hash == hashes[-1]
    # One other value in the last file is another scan.
    other = grown(tmp_path / "other.zarr", [*files[:2], files[0]])
    assert other.data_hash != hashes[-1]


def test_xarray_reads_a_growing_store_without_a_warning(files, tmp_path):
    store = tmp_path / "scan.zarr"
    grown(store, files[:2], finish=False)
    assert xr.open_zarr(store).sizes["pattern"] == sum(SIZES[:2])


def test_a_reader_sees_the_segments_that_were_whole_when_it_opened(files, tmp_path):
    store = tmp_path / "scan.zarr"
    early = ingest(files[0], store, append=True)
    before = early.diffraction[np.arange(SIZES[0])]
    ingest(files[1], store, append=True)
    assert early.n_patterns == SIZES[0]
    np.testing.assert_array_equal(early.diffraction[np.arange(SIZES[0])], before)


@pytest.mark.parametrize("step", ["_resize", "fill_patterns", "_publish", "_extend_groups", "update_node"])
def test_an_append_that_fails_anywhere_changes_nothing_and_the_next_one_takes_its_place(
    files, tmp_path, monkeypatch, step
):
    store = tmp_path / "scan.zarr"
    grown(store, files[:1], finish=False)
    group(store)
    before = open_scan(store)
    whole = getattr(growing, step)

    def breaks(*given, **named):
        if step == "fill_patterns":
            whole(*given, **named)
        raise RuntimeError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(growing, step, breaks)
        with pytest.raises(RuntimeError, match="the power went"):
            ingest(files[2], store, append=True)
    after = open_scan(store)
    assert (after.n_patterns, after.data_hash) == (before.n_patterns, before.data_hash)
    assert len(group(store)) == SIZES[0]
    assert xr.open_zarr(store).sizes["pattern"] == SIZES[0]
    # A shorter segment than the torn one, then the end.
    scan = grown(store, files[1:2])
    assert scan.n_patterns == SIZES[0] + SIZES[1]
    assert len(group(store)) == scan.n_patterns
    clean = grown(tmp_path / "clean.zarr", files[:2])
    assert scan.data_hash == clean.data_hash
    np.testing.assert_array_equal(group(store).member, group(tmp_path / "clean.zarr").member)
    for name in ("diffraction", "source_index"):
        found, expected = (zarr.open_array(path / name, mode="r")[:] for path in (store, tmp_path / "clean.zarr"))
        np.testing.assert_array_equal(found, expected)


def test_finishing_removes_what_a_torn_append_left(files, tmp_path, monkeypatch):
    store = tmp_path / "scan.zarr"
    grown(store, files[:2], finish=False)
    group(store)
    with monkeypatch.context() as patched:
        patched.setattr(growing, "update_node", lambda *given: (_ for _ in ()).throw(RuntimeError("the power went")))
        with pytest.raises(RuntimeError):
            ingest(files[2], store, append=True)
    scan = finish_scan(store)
    # What rewrites all metadata from the disk finds the same scan.
    record_model(store, kind="pinn", path=tmp_path / "pinn.model", content_hash="0")
    again = open_scan(store)
    assert (again.n_patterns, again.data_hash) == (scan.n_patterns, scan.data_hash)
    assert len(group(store)) == scan.n_patterns


KILLED = """
import sys
import numpy as np
from ptychodask.store import append as growing
from ptychodask.inspection import inspect_file
from ptychodask.io import ingest
from ptychodask.iterative import refine_probe
write = growing.zarr.Array.__setitem__
def slow(array, *given):
    write(array, *given)
    if "diffraction" in array.path:
        print("torn", flush=True)
        sys.stdin.read()
growing.zarr.Array.__setitem__ = slow
ingest(sys.argv[1], sys.argv[2], append=True)
"""


def test_a_killed_append_leaves_the_earlier_segments(files, tmp_path):
    store = tmp_path / "scan.zarr"
    grown(store, files[:1], finish=False)
    before = open_scan(store)
    arguments = [sys.executable, "-c", KILLED, str(files[1]), str(store)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "torn\n"
        with pytest.raises(PtychodaskError, match="another writer is appending to it"):
            ingest(files[2], store, append=True)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert zarr.open_array(store / "diffraction", mode="r").shape[0] == sum(SIZES[:2])
    after = open_scan(store)
    assert (after.n_patterns, after.data_hash) == (before.n_patterns, before.data_hash)
    scan = grown(store, files[1:])
    assert scan.data_hash == grown(tmp_path / "clean.zarr", files).data_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dc": "corner"}, "dc was 'not given' for the first segment and is 'corner' now"),
        ({"n_pixels": 8}, "n_pixels was 'not given' for the first segment and is 8 now"),
        ({"pixel_size_m": 2e-8}, "pixel_size_m was 1e-08 for the first segment and is 2e-08 now"),
        ({"probe": "disc", "probe_diameter_px": 9.0}, "probe was 'not given'"),
        ({"overwrite": True}, "pass one of them"),
    ],
)
def test_options_that_differ_from_the_first_segment_are_refused_by_name(files, tmp_path, options, message):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store, append=True, pixel_size_m=1e-8)
    with pytest.raises(PtychodaskError, match=message):
        ingest(files[1], store, append=True, **options)
    assert open_scan(store).n_patterns == SIZES[0]


def test_options_need_not_be_repeated_and_each_segment_may_drop_frames(files, tmp_path):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store, append=True, pixel_size_m=1e-8, centre="auto", n_pixels=12, drop_frames="0")
    scan = ingest(files[1], store, append=True, drop_frames="0:3")
    assert scan.n_pixels == 12
    assert scan.pixel_size_m == 1e-8
    assert scan.n_patterns == SIZES[0] - 1 + SIZES[1] - 3
    assert 0 not in scan.source_index[SIZES[0] - 1 :]


def test_files_that_do_not_fit_are_refused_by_name(files, tmp_path):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store, append=True)
    whole = open_scan(files[0].parent / "whole.zarr")
    part = slice(0, 20)
    counts = whole.diffraction[part]
    cases = {
        "type of the patterns: float32 in": {"diff3d": np.sqrt(counts).astype(np.float16)},
        "n_pixels is 12, expected 16 as in the first segment": {
            "diff3d": np.ones((20, 12, 12), np.float32),
            "probeGuess": whole.probe[0, :12, :12],
        },
        "not finite": {"diff3d": np.full((20, 16, 16), np.nan, np.float32)},
    }
    for message, arrays in cases.items():
        write_npz(tmp_path / "odd.npz", whole, part, **arrays)
        with pytest.raises(PtychodaskError, match=message):
            ingest(tmp_path / "odd.npz", store, append=True)
        assert open_scan(store).n_patterns == SIZES[0]


def test_flux_is_relative_to_the_first_segment(files, tmp_path):
    store = tmp_path / "scan.zarr"
    whole = open_scan(files[0].parent / "whole.zarr")
    keys = {"diffraction": "d", "y": "y", "x": "x", "flux": "f", "probe": "p"}
    for number, level in enumerate((2.0, 5.0)):
        position = whole.position_yx_px[:20]
        np.savez(
            tmp_path / f"{number}.npz",
            d=whole.diffraction[:20],
            y=position[:, 0],
            x=position[:, 1],
            p=whole.probe[0],
            f=np.full(20, level),
        )
        scan = ingest(tmp_path / f"{number}.npz", store, append=True, keys=keys, domain="counts", units="px")
    np.testing.assert_allclose(scan.flux, np.repeat([1.0, 2.5], 20))
    with pytest.raises(PtychodaskError, match="flux: some in the stored segments, none in this one"):
        append_segment(store, diffraction=whole.diffraction[:9], position_yx_px=whole.position_yx_px[:9])


def test_too_few_patterns_for_a_stored_table_are_refused(files, tmp_path):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store, append=True)
    group(store)
    with pytest.raises(PtychodaskError, match=r"segment of patterns 70..73: .*needs 8 patterns, found 4"):
        ingest(files[1], store, append=True, drop_frames="4:")
    assert open_scan(store).n_patterns == SIZES[0]


def test_a_complete_scan_takes_no_segment(files, tmp_path):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store)
    with pytest.raises(PtychodaskError, match="the scan is complete"):
        ingest(files[1], store, append=True)
    grown(tmp_path / "grown.zarr", files)
    with pytest.raises(PtychodaskError, match="the scan is complete"):
        append_segment(
            tmp_path / "grown.zarr", diffraction=np.ones((9, 16, 16), np.float32), position_yx_px=np.ones((9, 2))
        )


def test_the_probe_is_kept_while_the_scan_grows(files, tmp_path):
    store = tmp_path / "scan.zarr"
    scan = grown(store, files, finish=False)
    with pytest.raises(PtychodaskError, match="still growing, and keeps the probe of its first segment"):
        replace_probe(store, scan.probe, {})
    with pytest.raises(PtychodaskError, match="still growing"):
        refine_probe(store)
    assert inspect_file(store).command.endswith(f"ingest --finish {store}")
    assert "3, the scan is growing" in str(inspect_file(store))
    finish_scan(store)
    changed = replace_probe(store, scan.probe * 2, {})
    assert scan.data_hash not in json.dumps(changed.attributes)


def test_models_are_recorded_while_it_grows(files, tmp_path):
    store = tmp_path / "scan.zarr"
    ingest(files[0], store, append=True)
    record_model(store, kind="pinn", path=tmp_path / "pinn.model", content_hash="0")
    assert grown(store, files[1:]).attributes["models"][0]["kind"] == "pinn"


def test_segments_that_disagree_with_the_patterns_are_damage(files, tmp_path):
    store = tmp_path / "scan.zarr"
    grown(store, files[:1])
    metadata = json.loads((store / "zarr.json").read_text())
    for segments, message in (
        ([{"n_patterns": 3}], r"segments of \(3,\) patterns in a scan of 70"),
        (5, "attribute 'segments' is 5"),
        ([{"n_patterns": "7"}], "attribute 'segments' is"),
    ):
        metadata["attributes"]["segments"] = segments
        (store / "zarr.json").write_text(json.dumps(metadata))
        with pytest.raises(PtychodaskError, match=message):
            group(store)


def test_locks_that_cannot_be_had_are_a_warning(files, tmp_path, monkeypatch, told):
    monkeypatch.setattr(folders, "fcntl", None)
    assert grown(tmp_path / "scan.zarr", files[:2]).n_patterns == sum(SIZES[:2])
    assert any("cannot be locked" in text for text in told)


def test_the_command_line_appends_and_finishes(files, tmp_path, run, refused):
    store = tmp_path / "scan.zarr"
    for path in files[:2]:
        code, out, _ = run("ingest", path, store, "--append", "-q")
        assert code == 0
        assert "still growing" in out
    assert "--finish needs --append" in refused("ingest", files[2], store, "--finish")
    assert "accepts no other option" in refused("ingest", store, "--finish", "--dc", "corner")
    assert "the store is missing" in refused("ingest", files[2])
    code, out, _ = run("ingest", "--finish", store)
    assert (code, "growing" in out) == (0, False)
    assert "the scan is complete" in refused("ingest", files[2], store, "--append")
    code, out, _ = run("ingest", files[0], tmp_path / "one.zarr", "--append", "--finish", "-q")
    assert (code, "growing" in out) == (0, False)


def test_a_wait_for_another_writer_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folders, "REPORTED_AFTER_S", 0.2)
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        threading.Timer(1.0, writer.stdin.close).start()
        with folders.folder_lock(tmp_path, wait=True):
            pass
    assert "another process is writing it: waiting until it has finished" in caplog.text
