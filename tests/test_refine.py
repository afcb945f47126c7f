"""Refinement: the same object however it is cut, nearer to the data after every run, and not one pixel invented."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import xarray as xr
from models_for_tests import LinearModel

from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.forward import expected_counts, footprint_corners, r_factor, shift_probe
from ptychodask.iterative import refine_probe
from ptychodask.plan import plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reassembly import add_patches, empty_canvas, finish, illumination_window
from ptychodask.reconstruction import reconstruct, refine_tasks
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.refinement.judges import judge, judge_index
from ptychodask.refinement.polishing import (
    StepProducts,
    illumination_and_proximal_weight,
    negative_gradient,
    step_products,
    take_step,
)
from ptychodask.refinement.slow_phase import refine_slow_phase
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.storage.location import parse_location
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

N_PATTERNS = 120
FIELDS = {"groups_per_chunk": 40, "tile": 32}


@dataclass(eq=False)
class FlatModel(LinearModel):
    """A network that has learnt nothing: 0.9 everywhere."""

    content_hash: str = "flat"
    members: int = 1

    def patches(self, x, offset_yx_px):
        return np.full((len(x), 1, self.n_pixels, self.n_pixels), 0.9, np.complex64)


pytestmark = pytest.mark.usefixtures("empty_caches")


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("polish") / "scan.zarr"
    return simulate(path, n_pixels=16, n_patterns=N_PATTERNS, dose=1e6, step_px=2.0, path="raster", seed=3)


@pytest.fixture(scope="module")
def polished(scan, client):
    return reconstruct(scan.store, FlatModel(), client=client, polish=4, **FIELDS)


def store_of(scan, path, **changes):
    """A store like the scan's, patterns in the same order."""
    kept = {"diffraction": scan.diffraction[:], "probe": scan.probe, "domain": scan.domain} | changes
    return write_scan(path, position_yx_px=scan.position_yx_px, calibration="as_given", progress=False, **kept)


def assert_same_bits(ds, other):
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(ds[name].values, other[name].values)


@pytest.mark.parametrize("fields", [{"groups_per_chunk": 7, "tile": 24}, {"groups_per_chunk": 1, "tile": 200}])
def test_the_polished_object_does_not_depend_on_chunks_and_tiles(scan, client, polished, fields):
    found = reconstruct(scan.store, FlatModel(), client=client, polish=4, **fields)["object"].values
    wanted = polished["object"].values
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert np.nanmax(np.abs(found - wanted)) <= 1e-5 * np.nanmedian(np.abs(wanted))


def test_two_processes_give_the_same_bits_as_none_on_disk_and_in_memory(scan, polished, tmp_path):
    with local_client(2):
        there = reconstruct(scan.store, FlatModel(), polish=4, **FIELDS)
        written = reconstruct(scan.store, FlatModel(), polish=4, out=tmp_path / "object.zarr", **FIELDS)
    assert_same_bits(there, polished)
    assert_same_bits(written, polished)
    assert json.loads(json.dumps(written.ptycho.records["refinement"])) == polished.ptycho.records["refinement"]


def test_the_object_before_refinement_is_kept_on_request(scan, client, plain, polished, tmp_path):
    path = tmp_path / "object.zarr"
    kept = reconstruct(scan.store, FlatModel(), client=client, polish=4, keep_stitched=True, out=path, **FIELDS)
    np.testing.assert_array_equal(kept["object_stitched"].values, plain["object"].values)
    assert_same_bits(kept, polished)
    assert "object_stitched" not in polished
    assert "stitched object" in kept["uncertainty"].attrs["comment"]
    kept.ptycho.save(tmp_path / "again.zarr")
    again = open_result(tmp_path / "again.zarr")
    np.testing.assert_array_equal(again["object_stitched"].values, plain["object"].values)


def test_without_sweeps_nothing_changes(scan, client):
    plain, none = (
        reconstruct(scan.store, FlatModel(), client=client, **FIELDS, **more) for more in ({}, {"polish": 0})
    )
    assert_same_bits(none, plain)
    assert "refinement" not in none.attrs


def judges_of(scan):
    return judge_index(scan, np.arange(N_PATTERNS))


def test_the_judges_misfit_falls_and_is_that_of_the_object(scan, plain, polished):
    record = polished.ptycho.records["refinement"]
    stages = record["stages"]
    assert [stage["stage"] for stage in stages] == ["stitched", "sweep 1", "sweep 2", "sweep 3", "sweep 4"]
    assert (record["sweeps"], record["n_patterns"], record["n_judges"]) == (4, 113, 7)
    for ds, stage in ((plain, stages[0]), (polished, stages[-1])):
        # The two fill unseen pixels with other values, which hardly any light meets.
        wanted = judge(ds["object"].values, corner_of(ds), scan, judges_of(scan))
        assert stage["misfit"] == pytest.approx(wanted.misfit, rel=0.1)
        assert stage["r_factor"] == pytest.approx(wanted.r_factor, rel=0.05)
    assert stages[-1]["r_factor"] < 0.5 * stages[0]["r_factor"]
    assert polished.ptycho.records["spec"]["polish"] == 4


@pytest.fixture(scope="module")
def plain(scan, client):
    return reconstruct(scan.store, FlatModel(), client=client, **FIELDS)


def corner_of(ds):
    return int(ds["y"][0]), int(ds["x"][0])


@pytest.mark.parametrize(
    "fields", [FIELDS, {"groups_per_chunk": 7, "tile": 24}, {"groups_per_chunk": 120, "tile": 200}]
)
def test_the_slow_phase_is_that_of_the_whole_object_in_memory(scan, client, plain, fields):
    ds = reconstruct(scan.store, FlatModel(), client=client, slow_phase=True, **fields)
    unrefined = reconstruct(scan.store, FlatModel(), client=client, **fields)
    wanted = refine_slow_phase(scan, unrefined["object"].values, corner_of(unrefined))
    np.testing.assert_array_equal(np.isnan(ds["object"]), ds["count"] == 0)
    assert np.nanmax(np.abs(ds["object"].values - wanted.object)) < 1e-5
    record = ds.ptycho.records["refinement"]["slow_phase"]
    assert record.pop("misfit_before") == pytest.approx(wanted.record.misfit_before)
    assert record.pop("misfit_after") == pytest.approx(wanted.record.misfit_after)
    assert record.items() <= asdict(wanted.record).items()
    assert (record["kept"], record["n_patterns"], record["n_judges"]) == (True, 113, 7)
    assert ds.ptycho.records["seconds"]["slow_phase"] > 0
    assert np.nanmax(np.abs(ds["object"].values - unrefined["object"].values)) > 0.1
    for name in ("weight", "uncertainty", "count"):
        np.testing.assert_array_equal(ds[name].values, unrefined[name].values)


def test_two_processes_give_the_same_slow_phase_as_none_on_disk_and_in_memory(scan, client, tmp_path):
    fields = FIELDS | {"slow_phase": True, "polish": 2}
    here = reconstruct(scan.store, FlatModel(), client=client, **fields)
    with local_client(2):
        there = reconstruct(scan.store, FlatModel(), **fields)
        written = reconstruct(scan.store, FlatModel(), out=tmp_path / "object.zarr", **fields)
    assert_same_bits(there, here)
    assert_same_bits(written, here)
    assert json.loads(json.dumps(written.ptycho.records["refinement"])) == here.ptycho.records["refinement"]


def test_sweeps_start_from_the_corrected_object(scan, client):
    slow, both = (
        reconstruct(scan.store, FlatModel(), client=client, slow_phase=True, polish=polish, **FIELDS)
        for polish in (0, 2)
    )
    names = [stage["stage"] for stage in both.ptycho.records["refinement"]["stages"]]
    # A flat object has no detail yet: one sweep comes first.
    assert names == ["stitched", "sweep 1", "slow_phase", "sweep 2"]
    assert [stage["stage"] for stage in slow.ptycho.records["refinement"]["stages"]] == ["stitched", "slow_phase"]
    misfits = [stage["misfit"] for stage in both.ptycho.records["refinement"]["stages"]]
    assert misfits == sorted(misfits, reverse=True)


@pytest.mark.parametrize("shape", [(5, 7), (1, 3)])
def test_kept_arrays_are_read_as_they_were_whatever_their_order_in_memory(shape, tmp_path):
    array = (np.arange(np.prod(shape)) * (1 + 2j)).astype(np.complex64).reshape(shape)
    for number, each in enumerate((array, np.asfortranarray(array), np.array(array.T).T)):
        path = refine_tasks.keep(each, parse_location(tmp_path / f"{number}.npy"))
        np.testing.assert_array_equal(refine_tasks.opened(path), array)


@pytest.mark.usefixtures("with_refinement")
def test_a_long_object_is_refined_on_disk_as_in_memory(client, tmp_path):
    position = {"path": "raster", "n_patterns": 90, "step_px": 3.0}
    made = simulate(tmp_path / "square.zarr", n_pixels=16, dose=1e6, seed=3, **position)
    line = np.stack([np.zeros(90), np.arange(90) * 2.0], axis=1)
    fields = {"diffraction": made.diffraction[:], "probe": made.probe, "domain": "counts", "calibration": "as_given"}
    write_scan(tmp_path / "line.zarr", position_yx_px=line, progress=False, **fields)
    there = reconstruct(tmp_path / "line.zarr", LinearModel(), client=client, out=tmp_path / "object.zarr", **FIELDS)
    assert_same_bits(there, reconstruct(tmp_path / "line.zarr", LinearModel(), client=client, **FIELDS))


def stages_of(ds):
    return [stage["stage"] for stage in ds.ptycho.records["refinement"]["stages"]]


@pytest.mark.usefixtures("with_refinement")
def test_by_default_the_judges_decide_and_the_best_object_is_kept(scan, client, monkeypatch):
    rising = iter(range(100))
    honest = refine_tasks.judge

    def judge_after_the_second_sweep(*arguments):
        found = honest(*arguments)
        return replace(found, misfit=found.misfit + 1e9 * max(0, next(rising) - 3))

    monkeypatch.setattr(refine_tasks, "judge", judge_after_the_second_sweep)
    fields = FIELDS | {"groups_per_chunk": 200, "client": client, "slow_phase": False}
    ds = reconstruct(scan.store, FlatModel(), **fields)
    # Judged once before each sweep and after the last: the misfit rises from the fourth time on, three in a row.
    assert [stage["kept"] for stage in ds.ptycho.records["refinement"]["stages"]] == [True] * 4 + [False] * 3
    assert ds.ptycho.records["refinement"]["sweeps"] == 3
    monkeypatch.undo()
    assert_same_bits(ds, reconstruct(scan.store, FlatModel(), **fields, polish=3))


@pytest.mark.usefixtures("with_refinement")
def test_few_patterns_are_refined_without_judges(client, tmp_path):
    simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, dose=1e6, step_px=2.0, path="raster", seed=3)
    ds = reconstruct(tmp_path / "scan.zarr", FlatModel(), client=client, **FIELDS)
    record = ds.ptycho.records["refinement"]
    assert (record["sweeps"], record["n_judges"], record["n_patterns"]) == (2, 0, 40)
    assert stages_of(ds)[:2] == ["stitched", "sweep 1"]
    assert record["slow_phase"]["n_patterns"] == 40


@pytest.mark.usefixtures("with_refinement")
def test_defaults_refine_where_they_can_and_say_where_they_cannot(scan, client, plain, tmp_path):
    ds = reconstruct(scan.store, FlatModel(), client=client, **FIELDS)
    assert "slow_phase" in stages_of(ds)
    assert (ds.ptycho.records["spec"]["polish"], ds.ptycho.records["spec"]["slow_phase"]) == ("auto", "auto")
    lazy = reconstruct(scan.store, FlatModel(), compute=False, **FIELDS)
    assert_same_bits(lazy.compute(), plain)
    assert "compute=False" in lazy.ptycho.records["refinement"]["left_out"]
    region = reconstruct(scan.store, FlatModel(), client=client, roi=(0, 6, 0, 6), **FIELDS)
    assert region.ptycho.records["refinement"]["left_out"] == "only 0 patterns illuminate only the region"


def test_a_region_is_refined_by_the_patterns_within(scan, client, plain):
    fields = FIELDS | {"client": client, "polish": 3, "slow_phase": True, "roi": (-14, 14, -16, 12)}
    part = reconstruct(scan.store, FlatModel(), **fields)
    record = part.ptycho.records["refinement"]
    assert 0 < record["n_patterns"] < 113
    middle = {"y": slice(-6, 6), "x": slice(-8, 4)}
    truth = scan.truth.object
    corner = [int(value) for value in scan.truth.corner_yx_px]
    wanted = truth[-6 - corner[0] : 7 - corner[0], -8 - corner[1] : 5 - corner[1]]

    def error(ds):
        found = ds["object"].sel(**middle).values
        return np.abs(found - wanted * np.exp(1j * np.angle(np.vdot(wanted, found)))).mean()

    assert error(part) < 0.5 * error(plain)


def test_each_half_is_refined_by_its_own_patterns(scan, client, tmp_path):
    spoilt = scan.diffraction[:]
    spoilt[1::2] = spoilt[1::2, ::-1]
    store_of(scan, tmp_path / "spoilt.zarr", diffraction=spoilt)
    fields = FIELDS | {"client": client, "polish": 2, "slow_phase": True, "split_half": True}
    one, other = (reconstruct(store, FlatModel(), **fields) for store in (scan.store, tmp_path / "spoilt.zarr"))
    assert list(one.ptycho.records["refinement"]) == ["whole", "half 0", "half 1"]
    np.testing.assert_array_equal(one["object_half"][0], other["object_half"][0])
    assert np.nanmax(np.abs(one["object_half"][1] - other["object_half"][1])) > 0.1
    assert one.ptycho.records["refinement"]["half 0"]["n_patterns"] == N_PATTERNS // 2


def test_the_object_of_each_model_is_refined(scan, client):
    fields = FIELDS | {"client": client, "polish": 2, "slow_phase": True}
    both = reconstruct(scan.store, {"flat": FlatModel(), "linear": LinearModel()}, **fields)
    for label, model in (("flat", FlatModel()), ("linear", LinearModel())):
        alone = reconstruct(scan.store, model, **fields)
        found = both["object"].sel({both["object"].dims[0]: label}).values
        assert np.nanmax(np.abs(found - alone["object"].values)) < 1e-4
        assert list(both.ptycho.records["refinement"]) == ["flat", "linear"]


def fail_after(n_steps, monkeypatch):
    """Steps of tiles fail, all but the first ones."""
    honest, taken = refine_tasks.take_step, itertools.count()

    def step(*arguments):
        if next(taken) >= n_steps:
            raise RuntimeError("power cut")
        return honest(*arguments)

    monkeypatch.setattr(refine_tasks, "take_step", step)


def test_a_stopped_run_continues_with_the_stage_it_was_in(scan, client, tmp_path, monkeypatch):
    fields = FIELDS | {"polish": 4, "slow_phase": True, "out": tmp_path / "object.zarr", "client": client}
    fail_after(12, monkeypatch)
    with pytest.raises(PtychodaskError, match="power cut; what is finished is kept"):
        reconstruct(scan.store, FlatModel(), **fields)
    monkeypatch.undo()
    counted = Mock(wraps=refine_tasks.take_step)
    monkeypatch.setattr(refine_tasks, "take_step", counted)
    resumed = reconstruct(scan.store, FlatModel(), resume=True, **fields)
    n_tiles = len(plan(scan.store, FlatModel(), ReconstructionSpec(**FIELDS)).tiles)
    assert counted.call_count <= 3 * n_tiles
    monkeypatch.undo()
    whole = reconstruct(scan.store, FlatModel(), **(fields | {"out": None}))
    assert_same_bits(resumed, whole)
    assert stages_of(resumed) == stages_of(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["object.zarr"]


def test_damaged_files_of_a_stopped_refinement_are_made_again(scan, client, tmp_path, monkeypatch, told):
    fields = FIELDS | {"polish": 2, "out": tmp_path / "object.zarr", "client": client}
    fail_after(4, monkeypatch)
    with pytest.raises(PtychodaskError, match="power cut"):
        reconstruct(scan.store, FlatModel(), **fields)
    monkeypatch.undo()
    (folder,) = tmp_path.glob("*/refined")
    file = sorted(folder.glob("0-object-*-0.npy"))[-1]
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    resumed = reconstruct(scan.store, FlatModel(), resume=True, **fields)
    assert any("files of the refinement are damaged" in message for message in told)
    assert_same_bits(resumed, reconstruct(scan.store, FlatModel(), **(fields | {"out": None})))


@pytest.mark.parametrize("stage", ["normal_equations", "negative_gradient"])
def test_a_worker_that_is_killed_costs_its_tasks_and_no_bits(scan, tmp_path, stage):
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    out = tmp_path / "object.zarr"
    found = subprocess.run(
        [sys.executable, script, scan.store, out, stage, tmp_path / "killed"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "killed").exists()
    whole = reconstruct(scan.store, FlatModel(), polish=2, slow_phase=True, **FIELDS)
    for written in (open_result(out), xr.open_zarr(tmp_path / "memory.zarr", consolidated=False)):
        np.testing.assert_array_equal(written["object"].values, whole["object"].values)


VICTIM = """
import os, sys
from pathlib import Path
from distributed import Client, LocalCluster, WorkerPlugin

sys.path.insert(0, TESTS)
store, out, stage, killed = sys.argv[1:]

class Killer(WorkerPlugin):
    def setup(self, worker):
        sys.path.insert(0, TESTS)
        from ptychodask.reconstruction import refine_tasks
        honest = getattr(refine_tasks, stage)

        def once(*arguments):
            try:
                os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return honest(*arguments)
            os._exit(1)

        setattr(refine_tasks, stage, once)

if __name__ == "__main__":
    from test_refine import FIELDS, FlatModel
    import ptychodask

    fields = FIELDS | {"polish": 2, "slow_phase": True, "progress": False}
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        client.register_plugin(Killer())
        ptychodask.reconstruct(store, FlatModel(), client=client, out=out, **fields)
        os.remove(killed)
        ds = ptychodask.reconstruct(store, FlatModel(), client=client, **fields)
        ds.to_zarr(Path(out).with_name("memory.zarr"), consolidated=False)
""".replace("TESTS", repr(str(Path(__file__).parent)))


def test_a_rejected_slow_phase_leaves_the_object_as_it_was(client, tmp_path):
    fields = {"n_pixels": 16, "n_patterns": N_PATTERNS, "step_px": 2.0, "path": "raster", "seed": 3}
    simulate(tmp_path / "scan.zarr", dose=30, **fields)
    plain, slow = (
        reconstruct(tmp_path / "scan.zarr", FlatModel(), client=client, slow_phase=slow_phase, **FIELDS)
        for slow_phase in (False, True)
    )
    assert_same_bits(slow, plain)
    record = slow.ptycho.records["refinement"]["slow_phase"]
    assert not record["kept"]
    assert record["misfit_after"] > record["misfit_before"]
    assert "less than 0.0001 of itself lower" in record["reason"]


def test_dropped_patterns_take_no_part_in_the_slow_phase(scan, client, tmp_path):
    drop = np.arange(0, N_PATTERNS, 5)
    spoilt = scan.diffraction[:]
    spoilt[drop] = spoilt[drop, ::-1] // 2
    store_of(scan, tmp_path / "spoilt.zarr", diffraction=spoilt)
    one, other = (
        reconstruct(store, FlatModel(), client=client, slow_phase=True, drop=drop, **FIELDS)
        for store in (scan.store, tmp_path / "spoilt.zarr")
    )
    assert_same_bits(one, other)
    record = one.ptycho.records["refinement"]["slow_phase"]
    assert record == other.ptycho.records["refinement"]["slow_phase"]
    assert record["n_patterns"] + record["n_judges"] == N_PATTERNS - len(drop)


def test_refinement_is_recorded_and_a_run_with_another_is_not_resumed(scan, client, plain, tmp_path):
    assert plain.ptycho.records["spec"]["slow_phase"] is False
    assert "refinement" not in plain.attrs
    fields = FIELDS | {"client": client, "out": tmp_path / "object.zarr"}
    slow = reconstruct(scan.store, FlatModel(), slow_phase=True, **fields)
    assert slow.ptycho.records["spec"]["slow_phase"] is True
    with pytest.raises(PtychodaskError, match=r"spec\.slow_phase was true, is false"):
        reconstruct(scan.store, FlatModel(), resume=True, **fields)


def test_a_stopped_slow_phase_is_done_again_from_the_stitched_tiles(scan, client, tmp_path, monkeypatch):
    fail = Mock(side_effect=RuntimeError("the disk went away"))
    monkeypatch.setattr(refine_tasks, "judged", fail)
    fields = FIELDS | {"slow_phase": True, "out": tmp_path / "object.zarr", "client": client}
    with pytest.raises(PtychodaskError, match=r"judging the slow phase over .* failed: RuntimeError: the disk"):
        reconstruct(scan.store, FlatModel(), **fields)
    monkeypatch.undo()
    monkeypatch.setattr(FlatModel, "patches", fail)
    resumed = reconstruct(scan.store, FlatModel(), resume=True, **fields)
    monkeypatch.undo()
    assert_same_bits(resumed, reconstruct(scan.store, FlatModel(), **FIELDS, slow_phase=True, client=client))
    assert [path.name for path in tmp_path.iterdir()] == ["object.zarr"]


def test_a_task_of_the_slow_phase_that_fails_once_is_tried_again(scan, client, monkeypatch):
    wanted = reconstruct(scan.store, FlatModel(), client=client, slow_phase=True, **FIELDS)
    flaky = Mock(wraps=refine_tasks.normal_equations, side_effect=[RuntimeError("once"), *[DEFAULT] * 9])
    monkeypatch.setattr(refine_tasks, "normal_equations", flaky)
    ds = reconstruct(scan.store, FlatModel(), client=client, slow_phase=True, **FIELDS)
    assert flaky.call_count == 4
    assert_same_bits(ds, wanted)


def test_the_slow_phase_of_several_experiments_is_refused_before_the_network(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(FlatModel, "patches", lambda *_: pytest.fail("the network was used"))
    store_of(scan, tmp_path / "two.zarr", scan_index=np.arange(N_PATTERNS) % 2)
    with pytest.raises(
        PtychodaskError, match=r"has 2 experiments \(0, 1\), and each has an object of its own; pass experiment="
    ):
        reconstruct(tmp_path / "two.zarr", FlatModel(), slow_phase=True, **FIELDS)


def test_a_failing_sweep_gives_one_line_and_the_run_goes_on_without_the_network(scan, client, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk went away\nand this is its long story")

    monkeypatch.setattr(refine_tasks, "negative_gradient", fail)
    fields = FIELDS | {"polish": 2, "out": tmp_path / "object.zarr", "client": client}
    with pytest.raises(PtychodaskError) as caught:
        reconstruct(scan.store, FlatModel(), **fields)
    assert str(caught.value).startswith("reconstruct: polishing with the patterns over (")
    assert "failed: RuntimeError: the disk went away; what is finished is kept" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(FlatModel, "patches", fail)
    resumed = reconstruct(scan.store, FlatModel(), resume=True, **fields)
    monkeypatch.undo()
    whole = reconstruct(scan.store, FlatModel(), **FIELDS, polish=2, client=client)
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(resumed[name].values, whole[name].values)
    assert [path.name for path in tmp_path.iterdir()] == ["object.zarr"]


def test_only_the_object_changes_and_unseen_pixels_stay_unseen(scan, client, polished):
    plain = reconstruct(scan.store, FlatModel(), client=client, **FIELDS)
    for name in ("weight", "uncertainty", "count"):
        np.testing.assert_array_equal(polished[name].values, plain[name].values)
    np.testing.assert_array_equal(np.isnan(polished["object"]), polished["count"] == 0)


def test_a_small_crop_is_polished_where_it_was_seen(scan, client):
    ds = reconstruct(scan.store, FlatModel(), client=client, polish=3, crop=6, window="uniform", **FIELDS)
    np.testing.assert_array_equal(np.isnan(ds["object"]), ds["count"] == 0)
    stages = ds.ptycho.records["refinement"]["stages"]
    assert stages[-1]["r_factor"] < 0.6 * stages[0]["r_factor"]


def test_dim_pixels_are_held_where_they_were(scan, polished):
    corner, shape = frames(scan)
    taking_part = np.setdiff1d(np.arange(N_PATTERNS), judges_of(scan))
    light, hold = illumination_and_proximal_weight(scan.probe, scan.position_yx_px[taking_part], corner, shape)
    peak = (np.abs(scan.probe) ** 2).sum(axis=0).max()
    np.testing.assert_allclose(hold, np.maximum(peak - light, 0), atol=1e-6 * peak)
    y, x = (slice(first, first + size - 1) for first, size in zip(corner, shape, strict=True))
    object_ = polished["object"].sel(y=y, x=x).values
    unlit = (light < 1e-4 * peak) & np.isfinite(object_)
    assert unlit.any()
    np.testing.assert_allclose(object_[unlit], 0.9, atol=0.02)
    assert np.nanmax(np.abs(object_)) < 1.5


def frames(scan):
    """The object's corner and shape around all frames."""
    corner = footprint_corners(scan.position_yx_px, scan.n_pixels)
    low = corner.min(axis=0)
    return tuple(low.tolist()), tuple((corner.max(axis=0) - low + scan.n_pixels).tolist())


def truth_over(scan):
    corner, shape = frames(scan)
    y, x = (int(c - t) for c, t in zip(corner, scan.truth.corner_yx_px, strict=True))
    return np.ascontiguousarray(scan.truth.object[y : y + shape[0], x : x + shape[1]]), corner


def noise_free(scan, **changes):
    truth = scan.truth
    counts = [expected_counts(truth.object, truth.corner_yx_px, scan.probe, place) for place in scan.position_yx_px]
    return replace(scan, **({"diffraction": np.array(counts), "store": None} | changes))


def test_the_truth_is_a_fixed_point(scan):
    object_, corner = truth_over(scan)
    change, misfit = negative_gradient(object_, corner, noise_free(scan), np.arange(N_PATTERNS))
    light, hold = illumination_and_proximal_weight(scan.probe, scan.position_yx_px, corner, object_.shape)
    assert misfit.r_factor < 1e-5
    step = take_step(object_, object_, change, change, light + hold, StepProducts().mix())
    np.testing.assert_allclose(step, object_, atol=1e-5)


def test_what_patterns_call_for_is_half_the_slope_of_the_misfit(scan):
    object_, corner = truth_over(scan)
    rng = np.random.default_rng(0)
    off = (rng.standard_normal(object_.shape) + 1j * rng.standard_normal(object_.shape)).astype(np.complex64)
    object_, index = object_ + np.float32(0.05) * off, np.arange(30)
    change, _ = negative_gradient(object_, corner, scan, index)
    step = np.float32(1e-2)
    after, before = (negative_gradient(object_ + sign * step * off, corner, scan, index)[1].square for sign in (1, -1))
    slope = (after - before) / (2 * float(step))
    assert -2 * np.vdot(off, change).real == pytest.approx(slope, rel=2e-2)


def test_shares_of_the_patterns_add_up_wherever_the_part_lies(scan):
    object_, corner = truth_over(scan)
    whole, total = negative_gradient(object_[:], corner, scan, np.arange(40))
    summed, misfits = np.zeros_like(whole), []
    for index in np.array_split(np.arange(40), 3):
        first = footprint_corners(scan.position_yx_px[index], 16)
        y0, x0 = first.min(axis=0) - corner
        y1, x1 = first.max(axis=0) - corner + 16
        change, misfit = negative_gradient(object_[y0:y1, x0:x1], (corner[0] + y0, corner[1] + x0), scan, index)
        summed[y0:y1, x0:x1] += change
        misfits.append(misfit)
    np.testing.assert_allclose(summed, whole, rtol=0, atol=1e-12 * np.abs(whole).max())
    assert sum(m.absolute for m in misfits) == pytest.approx(total.absolute, rel=1e-12)


def test_the_misfit_honours_mask_flux_modes_and_domain(scan):
    object_, corner = truth_over(scan)
    modes = np.concatenate([scan.probe, 0.3 * np.roll(scan.probe, 2, axis=1)])
    mask = np.random.default_rng(1).random((16, 16)) > 0.1
    flux = np.linspace(0.5, 1.5, N_PATTERNS).astype(np.float32)
    exact = noise_free(replace(scan, probe=modes))
    counts = exact.diffraction * flux[:, None, None]
    counts[:, ~mask] = 1e9
    spoilt = replace(exact, diffraction=counts, mask=mask, flux=flux)
    index = np.arange(N_PATTERNS)
    _, misfit = negative_gradient(object_, corner, spoilt, index)
    assert misfit.r_factor < 1e-5
    _, amplitude = negative_gradient(
        object_, corner, replace(spoilt, diffraction=np.sqrt(counts), domain="amplitude"), index
    )
    assert amplitude.r_factor < 1e-5
    flat = np.ones_like(object_)
    _, misfit = negative_gradient(flat, corner, spoilt, index)
    assert misfit.r_factor == pytest.approx(r_factor(flat, corner, spoilt), rel=1e-4)


def test_masked_pixels_do_not_touch_the_object(scan, client, tmp_path):
    mask = np.random.default_rng(0).random((16, 16)) > 0.05
    garbage = scan.diffraction[:]
    garbage[:, ~mask] = 1234
    objects = []
    for name, counts in (("clean", scan.diffraction[:]), ("spoilt", garbage)):
        store_of(scan, tmp_path / f"{name}.zarr", diffraction=counts, mask=mask)
        ds = reconstruct(tmp_path / f"{name}.zarr", FlatModel(), client=client, polish=2, **FIELDS)
        objects.append(ds["object"].values)
    np.testing.assert_array_equal(*objects)


def test_dark_patterns_are_refused(scan):
    object_, corner = truth_over(scan)
    dark = replace(scan, diffraction=np.zeros((N_PATTERNS, 16, 16)))
    _, misfit = negative_gradient(object_, corner, dark, np.arange(3))
    with pytest.raises(PtychodaskError, match="the patterns are all zero"):
        _ = misfit.r_factor


def test_light_is_summed_as_the_patterns_lie(scan):
    corner, shape = frames(scan)
    light, _ = illumination_and_proximal_weight(scan.probe, scan.position_yx_px, corner, shape)
    wanted = np.zeros(shape)
    for position in scan.position_yx_px:
        y, x = (np.floor(position).astype(int) - 8) - corner
        shifted = shift_probe(scan.probe, position - np.floor(position))
        wanted[y : y + 16, x : x + 16] += (np.abs(shifted) ** 2).sum(axis=0)
    np.testing.assert_allclose(light, wanted, rtol=1e-5)
    part, _ = illumination_and_proximal_weight(scan.probe, scan.position_yx_px, (corner[0] + 5, corner[1] + 3), (9, 7))
    np.testing.assert_array_equal(part, light[5:14, 3:10])


def test_steps_solve_a_quadratic_ever_better():
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 50, 30)
    wanted = (rng.standard_normal((5, 6)) + 1j * rng.standard_normal((5, 6))).astype(np.complex64)
    curvature = np.full((5, 6), 50, np.float32)
    now = before = np.zeros((5, 6), np.complex64)
    earlier = change = (scale.reshape(5, 6) * (wanted - now)).astype(np.complex64)
    mix, misses = StepProducts().mix(), []
    for _ in range(25):
        now, before = take_step(now, before, change, earlier, curvature, mix), now
        earlier, change = change, (scale.reshape(5, 6) * (wanted - now)).astype(np.complex64)
        mix = step_products(now, before, change, earlier, curvature).mix()
        misses.append(np.linalg.norm(wanted - now))
    plain = np.linalg.norm(wanted * ((1 - scale / 50) ** 25).reshape(5, 6))
    # On its way a remembered step may overshoot; in the end it is far ahead of as many plain ones.
    assert misses[-1] < 0.05 * plain


def test_a_step_without_curvature_is_the_plain_one():
    assert StepProducts().mix() == (1.0, 0.0, 0.0)
    assert StepProducts(s_y=-1.0, y_h_y=2.0, s_u=1.0, y_h_u=1.0).mix() == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("groups_per_chunk", [7, N_PATTERNS])
def test_exactly_the_groups_of_dropped_patterns_are_left_out(scan, client, groups_per_chunk):
    drop = np.array([3, 50, 51, 119])
    model, fields = LinearModel(), {"drop": drop, "groups_per_chunk": groups_per_chunk}
    todo = plan(scan.store, model, ReconstructionSpec(**fields))
    table = group(scan.store).member
    member = np.array([row for row in table if not set(row.tolist()) & set(drop.tolist())])
    assert 0 < todo.n_groups == len(member) < len(table)
    assert todo.n_patterns == len(np.unique(member))
    position = scan.position_yx_px[member]
    x = np.moveaxis(scan.network_input(member.ravel()).reshape(*member.shape, 16, 16), 1, -1)
    patches = model.patches(x, (position - position.mean(axis=1, keepdims=True)).astype(np.float32))
    canvas = empty_canvas(todo.box.corner, todo.box.shape)
    window = illumination_window(scan.probe, 16)
    add_patches(canvas, patches.reshape(-1, 16, 16), position.reshape(-1, 2) - 8, window)
    wanted, _, _, count = finish(canvas)
    found = reconstruct(scan.store, model, client=client, **fields)
    np.testing.assert_array_equal(found["count"], count)
    np.testing.assert_allclose(found["object"], wanted, atol=1e-5 * np.nanmedian(np.abs(wanted)))


def test_dropping_nothing_changes_nothing_and_a_lazy_result_drops_too(scan, client):
    fields = {"client": client, **FIELDS}
    whole, none, some = (reconstruct(scan.store, LinearModel(), drop=drop, **fields) for drop in ((), [], [5, 7, 60]))
    assert_same_bits(none, whole)
    lazy = reconstruct(scan.store, LinearModel(), drop=[60, 7, 5, 5], compute=False, **FIELDS)
    assert_same_bits(lazy.compute(), some)
    assert some.ptycho.records["spec"]["drop"] == [5, 7, 60]
    assert float(some["count"].sum()) < float(whole["count"].sum())


def test_dropped_patterns_have_no_say_in_polishing(scan, client, tmp_path):
    drop = np.arange(0, N_PATTERNS, 5)
    spoilt = scan.diffraction[:]
    spoilt[drop] = spoilt[drop, ::-1] // 2
    store_of(scan, tmp_path / "spoilt.zarr", diffraction=spoilt)
    one, other = (
        reconstruct(store, FlatModel(), client=client, polish=2, drop=drop, **FIELDS)
        for store in (scan.store, tmp_path / "spoilt.zarr")
    )
    assert_same_bits(one, other)
    assert one.ptycho.records["refinement"] == other.ptycho.records["refinement"]
    assert one.ptycho.records["refinement"]["n_patterns"] + one.ptycho.records["refinement"][
        "n_judges"
    ] == N_PATTERNS - len(drop)


def test_excluded_patterns_have_no_say_in_the_iterative_engine(scan, tmp_path):
    out = np.arange(0, N_PATTERNS, 5)
    spoilt = scan.diffraction[:]
    spoilt[out] = spoilt[out, ::-1] // 2
    stores = []
    for name, counts in (("clean", scan.diffraction[:]), ("spoilt", spoilt)):
        store_of(scan, tmp_path / f"{name}.zarr", diffraction=counts)
        stores.append(tmp_path / f"{name}.zarr")
    one, other = (reconstruct_iterative(store, n_sweeps=2, exclude=out, progress=False) for store in stores)
    assert_same_bits(one, other)
    assert one.attrs["r_factor"] == other.attrs["r_factor"]
    found = [refine_probe(store, n_sweeps=3, exclude=out, progress=False) for store in stores]
    np.testing.assert_array_equal(found[0].probe, found[1].probe)
    assert found[0].n_patterns + found[0].n_held_out == N_PATTERNS - len(out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"polish": -1}, "polish is -1, expected a number of sweeps, an integer of at least 0"),
        ({"polish": 1.5}, "polish is 1.5, expected a number of sweeps, an integer"),
        ({"polish": "often"}, "polish is 'often', expected a number of sweeps, an integer of at least 0, or 'auto'"),
        ({"polish": 2, "compute": False}, "polish=2 with compute=False: each stage needs the complete object"),
        ({"slow_phase": 1}, "slow_phase is 1, expected 'auto', True or False"),
        ({"slow_phase": True, "compute": False}, "slow_phase=True with compute=False: each stage needs the complete"),
        (
            {"slow_phase": True, "position_yx_px": np.zeros((N_PATTERNS, 2)), "cache": "patches.zarr"},
            "slow_phase=True with position_yx_px: the patterns are refined at the stored positions",
        ),
        ({"drop": [-1]}, "expected a list of pattern indices, 0 or more"),
        ({"drop": [0.5]}, "drop has shape .* expected a list of pattern indices"),
        ({"drop": [N_PATTERNS]}, f"patterns {N_PATTERNS}..{N_PATTERNS} are to be left out, expected indices 0..119"),
        ({"drop": range(N_PATTERNS)}, "every pattern is left out; keep some"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(scan, fields, message):
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(scan.store, FlatModel(), **fields)


def test_a_drop_that_leaves_no_group_is_refused(scan):
    drop = range(2, N_PATTERNS)
    with pytest.raises(PtychodaskError, match=r"each of the 120 groups of .* contains one of the 118 patterns to drop"):
        reconstruct(scan.store, LinearModel(), drop=drop)
