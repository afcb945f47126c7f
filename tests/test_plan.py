"""A plan is exact before anything runs, and refuses what cannot fit."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys

import numpy as np
import pytest
from models_for_tests import LinearModel

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.plan import plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reassembly import Box
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.store import groups as group_tables
from ptychodask.store.append import append_segment
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

N_PATTERNS = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=N_PATTERNS, step_px=4.0, seed=3)
    group(path)
    return path


def reached(position_yx_px, crop):
    """Box that patches of `crop` elements at some positions reach, one by one."""
    corners = np.floor(np.asarray(position_yx_px) - crop / 2).astype(int).reshape(-1, 2)
    (y0, x0), (y1, x1) = corners.min(axis=0), corners.max(axis=0) + crop + 1
    return Box(y0, y1, x0, x1)


@pytest.mark.parametrize(("output", "crop"), [("member", 16), ("member", 10), ("group", 12)])
def test_a_chunks_box_is_what_its_patches_reach(store, output, crop):
    found = plan(store, LinearModel(output=output), ReconstructionSpec(groups_per_chunk=11, crop=crop))
    position = open_scan(store).position_yx_px[group(store).member]
    if output == "group":
        position = position.mean(axis=1)
    assert [(chunk.start, chunk.stop) for chunk in found.chunks] == [
        (start, min(start + 11, N_PATTERNS)) for start in range(0, N_PATTERNS, 11)
    ]
    for chunk in found.chunks:
        assert chunk.box == reached(position[chunk.start : chunk.stop], crop)
    assert found.box == reached(position, crop)


def test_a_tile_lists_exactly_the_chunks_that_touch_it(store):
    found = plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=5, tile=16))
    for tile in found.tiles:
        touching = [i for i, chunk in enumerate(found.chunks) if chunk.box.overlap(tile.box).n_pixels]
        assert list(tile.chunks) == touching
    assert max(len(tile.chunks) for tile in found.tiles) < len(found.chunks)


@pytest.mark.parametrize("roi", [None, (-13, 20, -3, 200)])
def test_tiles_cover_each_pixel_once(store, roi):
    found = plan(store, LinearModel(), ReconstructionSpec(tile=7, roi=roi))
    covered = np.zeros(found.box.shape, int)
    for tile in found.tiles:
        y, x = tile.box.y0 - found.box.y0, tile.box.x0 - found.box.x0
        covered[y : y + tile.box.shape[0], x : x + tile.box.shape[1]] += 1
    np.testing.assert_array_equal(covered, 1)


def test_a_region_keeps_only_the_chunks_that_meet_it(store):
    whole = plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=5))
    roi = (whole.box.y0 - 50, whole.box.y0 + 12, whole.box.x0, whole.box.x0 + 15)
    part = plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=5, roi=roi))
    box = Box(whole.box.y0, roi[1], roi[2], roi[3])
    assert part.box == box
    expected = [(chunk.start, chunk.box.overlap(box)) for chunk in whole.chunks if chunk.box.overlap(box).n_pixels]
    assert [(chunk.start, chunk.box) for chunk in part.chunks] == expected
    assert 0 < len(part.chunks) < len(whole.chunks)
    assert part.n_patterns < whole.n_patterns == N_PATTERNS


def test_a_region_outside_the_object_is_refused(store):
    with pytest.raises(PtychodaskError, match=r"roi \(900, 910, 0, 5\) does not overlap the object"):
        plan(store, LinearModel(), ReconstructionSpec(roi=(900, 910, 0, 5)))


def test_a_region_between_the_patterns_is_refused(tmp_path):
    write_scan(
        tmp_path / "two.zarr",
        diffraction=np.ones((2, 16, 16), np.uint16),
        position_yx_px=np.array([[0.0, 0.0], [200.0, 200.0]]),
        probe=np.ones((1, 16, 16), np.complex64),
        domain="counts",
        calibration="as_given",
    )
    with pytest.raises(PtychodaskError, match=r"no pattern reaches roi \(90, 110, 90, 110\)"):
        plan(
            tmp_path / "two.zarr",
            LinearModel(members=1),
            ReconstructionSpec(roi=(90, 110, 90, 110), groups_per_chunk=1),
        )


def test_automatic_chunks_keep_to_the_memory(store):
    roomy = plan(store, LinearModel())
    tight = plan(store, LinearModel(), ReconstructionSpec(memory_bytes=roomy.predict_bytes - 1, tile=8, batch_size=4))
    assert tight.groups_per_chunk < roomy.groups_per_chunk
    assert max(tight.predict_bytes, tight.reassemble_bytes) < roomy.predict_bytes


def test_a_chunk_or_a_tile_that_cannot_fit_is_refused_and_names_its_knob(store):
    with pytest.raises(PtychodaskError, match=r"groups 0\.\.99, .* pass groups_per_chunk= below 100"):
        plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=100, memory_bytes=400_000))
    with pytest.raises(PtychodaskError, match=r"a tile of 4000 x 4000 px needs .* smaller tile="):
        plan(
            store, LinearModel(), ReconstructionSpec(groups_per_chunk=1, batch_size=1, tile=4000, memory_bytes=400_000)
        )


def test_without_a_model_the_group_table_decides(store):
    assert plan(store, spec=ReconstructionSpec(groups=GroupingSpec(members=1))).members == 1
    found = plan(store, spec=ReconstructionSpec(groups="c4-k7-s0"))
    assert (found.members, found.output, found.window, found.crop) == (4, "member", "illumination", 16)


def test_a_patch_per_group_takes_a_uniform_crop(store):
    found = plan(store, LinearModel(output="group"))
    assert (found.window, found.crop) == ("uniform", 16)
    found = plan(store, LinearModel(output="group"), ReconstructionSpec(window="cosine"))
    assert (found.window, found.crop) == ("cosine", 16)


def test_the_group_table_has_the_models_members(tmp_path):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=40, step_px=4.0, seed=3)
    assert plan(path, LinearModel(members=9)).groups == "c9-k9-s0"
    group(path, GroupingSpec(members=2, neighbours=3))
    assert plan(path, LinearModel(members=2)).groups == "c2-k3-s0"
    group(path, GroupingSpec(members=2, neighbours=4))
    with pytest.raises(PtychodaskError, match=r"several group tables have 2 .*c2-k3-s0, c2-k4-s0.*pass groups="):
        plan(path, LinearModel(members=2))
    assert plan(path, LinearModel(members=2), ReconstructionSpec(groups="c2-k4-s0")).groups == "c2-k4-s0"
    group(path, GroupingSpec(members=2))
    assert plan(path, LinearModel(members=2)).groups == "c2-k7-s0"


def test_tables_of_single_patterns_are_all_the_same(tmp_path):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=40, step_px=4.0, seed=3)
    group(path, GroupingSpec(members=1, seed=3))
    group(path, GroupingSpec(members=1), name="others")
    assert group(path, GroupingSpec(members=1)).name == "c1"
    assert plan(path, LinearModel(members=1)).groups == "c1"


def test_a_model_or_a_table_that_does_not_fit_is_refused(store):
    with pytest.raises(PtychodaskError, match=r"patterns are 16 pixels wide, the linear expects 64"):
        plan(store, LinearModel(n_pixels=64))
    group(store, GroupingSpec(members=1))
    with pytest.raises(PtychodaskError, match=r"'c1' has 1 patterns in a group, the model expects 4"):
        plan(store, LinearModel(), ReconstructionSpec(groups="c1"))
    with pytest.raises(PtychodaskError, match=r"no group table 'mine'; stored tables: c1"):
        plan(store, LinearModel(), ReconstructionSpec(groups="mine"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected an integer of at least 1"),
        ({"tile": 2.5}, "tile is 2.5, expected an integer"),
        ({"crop": 15}, "crop is 15, expected an even number; pass 16"),
        ({"window": "round"}, "window is 'round', expected one of: illumination, uniform, cosine"),
        ({"groups": 4}, "groups is 4, expected a name or a GroupingSpec"),
        ({"tile": 10**9}, "tile is 1000000000, expected at most 65536"),
        ({"batch_size": 10**10}, "batch_size is 10000000000, expected at most 2147483648"),
        ({"roi": 3}, "roi is 3, expected integers"),
        ({"roi": (0, 5, 7)}, r"roi is \(0, 5, 7\), expected integers \(y0, y1, x0, x1\)"),
        ({"roi": (5, 5, 0, 7)}, r"y0 < y1 and x0 < x1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        ReconstructionSpec(**fields)


def test_a_crop_beyond_the_patch_is_refused(store):
    with pytest.raises(PtychodaskError, match="crop is 18, a patch has 16 pixels"):
        plan(store, LinearModel(), ReconstructionSpec(crop=18))


def contents(folder):
    """Bytes and time of change of each file in a folder, and the time of each folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def refuse(*args, **kwargs):
    raise AssertionError("planning writes to the store")


@pytest.fixture
def no_table(tmp_path, monkeypatch):
    """A store without a group table, whose writers fail until `monkeypatch.undo`."""
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=60, step_px=4.0, seed=3)
    for writer in ("_write_table", "consolidate", "changing_root"):
        monkeypatch.setattr(group_tables, writer, refuse)
    return path


@pytest.mark.parametrize(
    ("model", "fields", "measure"),
    [
        (LinearModel(), {}, False),
        (LinearModel(), {}, True),
        (LinearModel(output="group"), {"groups_per_chunk": 11, "drop": (3,)}, True),
        (LinearModel(members=1), {"split_half": True}, False),
        (LinearModel(), {"split_half": True}, True),
        (LinearModel(members=2), {"groups": GroupingSpec(members=2, neighbours=5, oversampling=2, seed=7)}, True),
        (None, {"groups": GroupingSpec(members=3)}, False),
        (None, {}, False),
    ],
)
def test_planning_writes_nothing_and_equals_the_plan_of_the_stored_table(no_table, monkeypatch, model, fields, measure):
    before = contents(no_table)
    spec = ReconstructionSpec(**fields)
    drawn = plan(no_table, model, spec, measure=measure)
    assert contents(no_table) == before
    assert StoredScan(no_table).table_names() == []
    monkeypatch.undo()
    members = 4 if model is None else model.members
    halves = "split_half" in fields and members > 1
    group(no_table, fields.get("groups") or GroupingSpec(members=members, halves=halves))
    stored = plan(no_table, model, spec)
    assert StoredScan(no_table).table_names() == [stored.groups]
    assert dataclasses.replace(drawn, groups_per_s=None).summary() == stored.summary()
    assert (drawn.chunks, drawn.tiles, drawn.data_hash) == (stored.chunks, stored.tiles, stored.data_hash)
    assert (drawn.groups_per_s is not None) == measure


def test_a_growing_store_is_planned_without_writing(tmp_path):
    path, scan = tmp_path / "scan.zarr", simulate(tmp_path / "whole.zarr", n_pixels=16, n_patterns=60, step_px=4.0)
    fields = {"domain": "counts", "calibration": "as_given"}
    parts = [(np.asarray(scan.diffraction[rows]), scan.position_yx_px[rows]) for rows in (slice(0, 35), slice(35, 60))]
    write_scan(path, diffraction=parts[0][0], position_yx_px=parts[0][1], probe=scan.probe, growing=True, **fields)
    append_segment(path, diffraction=parts[1][0], position_yx_px=parts[1][1])
    before = contents(path)
    drawn = plan(path, LinearModel(), ReconstructionSpec(groups_per_chunk=10), measure=True)
    assert contents(path) == before
    group(path)
    stored = plan(path, LinearModel(), ReconstructionSpec(groups_per_chunk=10))
    assert drawn.summary() == stored.summary()
    assert [chunk.start for chunk in drawn.chunks] == [0, 10, 20, 30, 35, 45, 55]


def test_reconstruct_stores_the_table_that_was_planned(tmp_path):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=60, step_px=4.0, seed=3)
    planned = plan(path, LinearModel())
    ds = reconstruct(path, {"one": LinearModel(), "other": LinearModel("other", members=2)}, progress=False)
    assert StoredScan(path).table_names() == ["c2-k7-s0", "c4-k7-s0"]
    assert ds.ptycho.records["plan"]["one"]["groups_hash"] == planned.groups_hash


def test_a_table_of_another_spec_is_refused_by_a_plan(no_table, monkeypatch):
    monkeypatch.undo()
    group(no_table, GroupingSpec(seed=1), name="c4-k7-s0")
    with pytest.raises(PtychodaskError, match=r"'c4-k7-s0' was made by .*seed=1.*not by .*seed=0"):
        plan(no_table, LinearModel(), ReconstructionSpec(groups=GroupingSpec()))
    with pytest.raises(PtychodaskError, match=r"no group table 'mine'; stored tables: c4-k7-s0"):
        plan(no_table, spec=ReconstructionSpec(groups="mine"))


def test_a_plan_prints_as_a_table(store):
    lines = str(plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=40, batch_size=8, tile=32))).splitlines()
    assert "predict     3 tasks of 40 groups, batches of 8" in lines
    assert "patterns    120 of 16 x 16" in lines
    assert lines[-1].endswith("of 1,024 MiB per task")


def test_planning_loads_no_network_library(store):
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ptychodask\n"
            "ptychodask.reconstruct\n"
            f"print(ptychodask.plan({str(store)!r}, spec=ptychodask.ReconstructionSpec(groups='c4-k7-s0')).n_groups)\n"
            "print(sorted({'keras', 'tensorflow', 'matplotlib'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split("\n")[:2] == [str(N_PATTERNS), "[]"]


@pytest.fixture(scope="module")
def glitch(tmp_path_factory):
    """A scan with one position far from all others, and its file's rows in another order than the store's."""
    scan = simulate(tmp_path_factory.mktemp("glitch") / "scan.zarr", n_pixels=16, n_patterns=100, step_px=3.0)
    position = scan.position_yx_px.copy()
    position[17] = 60000.0, 45000.0
    path = str(scan.store).replace("scan.zarr", "glitch.zarr")
    return write_scan(
        path,
        diffraction=scan.diffraction[:],
        position_yx_px=position,
        probe=scan.probe,
        domain="counts",
        calibration="as_given",
        source_index=np.arange(100) + 1000,
        progress=False,
    )


def test_an_outlying_position_is_named_before_memory_is_blamed(glitch):
    (pattern,) = np.flatnonzero(glitch.position_yx_px[:, 0] > 1000)
    named = rf"plan: pattern {pattern} at \(y, x\) = \(60000, 45000\) px is far from all others; leave it out with "
    named += rf"drop=\[{pattern}\] \(--drop {pattern}\), or at ingest with drop_frames=\"1017\" .* need [\d,]+.\d MiB"
    with pytest.raises(PtychodaskError, match=named) as refused:
        plan(glitch.store, LinearModel())
    assert "below 1" not in str(refused.value)
    assert not plan(glitch.store, LinearModel(), drop=[int(pattern)]).outliers


def test_an_outlying_position_that_fits_is_named_in_plan_and_run(glitch, client, told):
    fields = {"memory_bytes": 2**40, "roi": (0, 60, 0, 60)}
    planned = plan(glitch.store, LinearModel(), **fields)
    assert "outliers    pattern" in str(planned)
    reconstruct(glitch.store, LinearModel(), client=client, **fields)
    assert any("is far from all others; leave it out with" in message for message in told)


def test_the_command_takes_numbers_to_drop(glitch, run):
    (pattern,) = np.flatnonzero(glitch.position_yx_px[:, 0] > 1000)
    code, _, err = run("plan", glitch.store, "--groups", "c4-k7-s0")
    assert code
    assert f"--drop {pattern}" in err
    code, out, err = run("plan", glitch.store, "--groups", "c4-k7-s0", "--drop", pattern)
    assert code == 0, err
    assert "outliers" not in out
    code, _, err = run("plan", glitch.store, "--drop", "17,x")
    assert code
    assert "--drop" in err


def test_a_scan_that_cannot_be_written_is_planned_and_its_owner_is_told_what_to_run(tmp_path, monkeypatch):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=40, step_px=4.0, seed=3)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    # The tests may run as root, who can write everywhere but on such a disk.
    monkeypatch.setattr("ptychodask.store.groups._write_table", read_only)
    assert plan(path, LinearModel()).n_groups == 40
    with pytest.raises(PtychodaskError, match=r"cannot be written .*owner run: ptychodask group .* --members 4"):
        reconstruct(path, LinearModel())
