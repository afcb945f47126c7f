"""Several experiments in one store: an object for each, wherever patterns are chosen."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import xarray as xr
from models_for_tests import LinearModel

from ptychodask import FailedScansError, iterative
from ptychodask.errors import PtychodaskError
from ptychodask.export import export
from ptychodask.iterative import refine_probe
from ptychodask.judging.compare import compare, patterns_inside
from ptychodask.judging.report import write_report
from ptychodask.judging.residuals import outliers, residuals
from ptychodask.plan import plan
from ptychodask.reconstruction import reconstruct, tasks
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

NUMBERS = (0, 3)
N_PATTERNS = 100


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A scan for each experiment, of its own object, over the same area."""
    folder = tmp_path_factory.mktemp("parts")
    fields = {"n_pixels": 16, "n_patterns": N_PATTERNS, "step_px": 2.0, "path": "raster", "dose": 1e6}
    return {number: simulate(folder / f"{number}.zarr", seed=number, **fields) for number in NUMBERS}


@pytest.fixture(scope="module")
def scan(parts, tmp_path_factory):
    """The scan of both, whose patterns alternate."""
    order = np.argsort(np.tile(np.arange(N_PATTERNS), 2), kind="stable")
    return write_scan(
        tmp_path_factory.mktemp("both") / "both.zarr",
        diffraction=np.concatenate([part.diffraction[:] for part in parts.values()])[order],
        position_yx_px=np.concatenate([part.position_yx_px for part in parts.values()])[order],
        probe=parts[0].probe,
        domain="counts",
        calibration="as_given",
        scan_index=np.repeat(NUMBERS, N_PATTERNS)[order],
        pixel_size_m=1e-8,
        progress=False,
    )


@pytest.fixture(scope="module")
def folder(scan, client, tmp_path_factory):
    """Folder with the result of each."""
    path = tmp_path_factory.mktemp("results") / "both.object.zarr"
    reconstruct(scan.store, LinearModel(), client=client, out=path, progress=False)
    return path


@pytest.mark.parametrize("number", NUMBERS)
def test_each_has_the_object_that_it_has_alone(scan, parts, client, number):
    both = reconstruct(scan.store, LinearModel(members=1), client=client, experiment=number)
    alone = reconstruct(parts[number].store, LinearModel(members=1), client=client)
    # The model is linear, and its input is normalised over all patterns of a store.
    expected = alone["object"].values * np.float32(scan.normalization / parts[number].normalization)
    np.testing.assert_allclose(both["object"].values, expected, rtol=1e-5)
    np.testing.assert_array_equal(both["count"].values, alone["count"].values)
    assert both.ptycho.records["spec"]["experiment"] == number


def test_a_store_with_one_records_nothing_new(parts, client):
    plain = reconstruct(parts[0].store, LinearModel(), client=client)
    assert "experiment" not in plain.ptycho.records["spec"]
    chosen = reconstruct(parts[0].store, LinearModel(), client=client, experiment=np.int64(0))
    np.testing.assert_array_equal(chosen["object"].values, plain["object"].values)
    with pytest.raises(PtychodaskError, match=r"experiment is 3 \(--experiment\), but its patterns are of 0; pass one"):
        reconstruct(parts[0].store, LinearModel(), client=client, experiment=3)
    with pytest.raises(PtychodaskError, match="experiment is True, expected the number of one experiment"):
        reconstruct(parts[0].store, LinearModel(), client=client, experiment=True)


@pytest.mark.parametrize("options", [{}, {"compute": False}, {"polish": 2}])
def test_more_than_one_in_memory_is_refused_before_the_network(scan, options):
    with pytest.raises(PtychodaskError, match=r"has 2 experiments \(0, 3\), .* pass experiment= \(--experiment\) for"):
        reconstruct(scan.store, LinearModel(), **options)
    with pytest.raises(PtychodaskError, match=r"has 2 experiments \(0, 3\), .* choose one with experiment="):
        plan(scan.store, LinearModel())


def test_dropping_all_others_leaves_one(scan, client):
    others = np.flatnonzero(scan.scan_index != 3)
    dropped = reconstruct(scan.store, LinearModel(members=1), client=client, drop=others)
    chosen = reconstruct(scan.store, LinearModel(members=1), client=client, experiment=3)
    np.testing.assert_array_equal(dropped["object"].values, chosen["object"].values)


def test_a_folder_has_a_result_for_each_and_is_resumed(scan, folder, client, monkeypatch):
    assert sorted(path.name for path in folder.iterdir()) == ["experiment-0.zarr", "experiment-3.zarr"]
    monkeypatch.setattr(LinearModel, "patches", lambda *_: pytest.fail("the network was used"))
    again = reconstruct(scan.store, LinearModel(), client=client, out=folder, resume=True)
    assert list(again) == ["experiment-0", "experiment-3"]
    for number in NUMBERS:
        stored = open_result(folder / f"experiment-{number}.zarr")
        assert stored.ptycho.records["spec"]["experiment"] == number
    with pytest.raises(FailedScansError, match=r"2 of 2 experiments failed: experiment-0: .*exists already"):
        reconstruct(scan.store, LinearModel(), client=client, out=folder)
    with pytest.raises(
        PtychodaskError, match=r"a result for each experiment of a scan \(experiment-0\.zarr, experiment-3"
    ):
        open_result(folder)
    with pytest.raises(PtychodaskError, match="is a file or a store, and results of several experiments need a folder"):
        reconstruct(scan.store, LinearModel(), client=client, out=folder / "experiment-0.zarr", overwrite=True)


def test_a_stopped_run_resumes_with_what_is_left(scan, client, tmp_path, monkeypatch):
    fields = {"client": client, "groups_per_chunk": 20, "tile": 16, "out": tmp_path / "results"}
    whole = reconstruct(scan.store, LinearModel(), experiment=3, client=client, groups_per_chunk=20, tile=16)
    predicted, calls = tasks.predict_groups, []

    def stop_later(jobs, start, *others):
        calls.append((jobs[0].experiment, start))
        if stops and jobs[0].experiment == 3 and start >= 100:
            raise PtychodaskError("stopped")
        return predicted(jobs, start, *others)

    monkeypatch.setattr(tasks, "predict_groups", stop_later)
    stops = True
    with pytest.raises(FailedScansError, match=r"1 of 2 experiments failed \(kept: experiment-0 in"):
        reconstruct(scan.store, LinearModel(), **fields)
    stops = False
    calls.clear()
    resumed = reconstruct(scan.store, LinearModel(), resume=True, **fields)
    np.testing.assert_array_equal(resumed["experiment-3"]["object"].values, whole["object"].values)
    assert {number for number, _ in calls} == {3}
    assert 0 < len(calls) < 10


def test_one_of_several_stores_may_have_several(scan, parts, client, tmp_path):
    found = reconstruct([parts[0].store, scan.store], LinearModel(), client=client, out=tmp_path)
    assert list(found) == ["0", "both/experiment-0", "both/experiment-3"]
    assert open_result(tmp_path / "both.object.zarr" / "experiment-3.zarr")["object"].shape


def test_refinement_takes_the_patterns_of_one(scan, parts, client):
    fields = {"client": client, "slow_phase": True, "polish": 2, "groups_per_chunk": 20}
    both = reconstruct(scan.store, LinearModel(members=1), experiment=3, **fields)
    alone = reconstruct(parts[3].store, LinearModel(members=1), **fields)
    records = [ds.ptycho.records["refinement"] for ds in (both, alone)]
    assert records[0]["n_patterns"] + records[0]["n_judges"] == N_PATTERNS
    for name in ("n_patterns", "n_judges"):
        assert records[0][name] == records[1][name]


def test_a_cache_needs_one_experiment(scan, client, tmp_path):
    with pytest.raises(PtychodaskError, match="a cache of patches has those of all groups, and the scan has several"):
        reconstruct(scan.store, LinearModel(), client=client, experiment=0, cache=tmp_path / "cache.zarr")


def test_residuals_are_those_of_the_recorded_experiment(scan, parts, folder, client):
    found = residuals(folder / "experiment-3.zarr", scan.store, client=client)
    np.testing.assert_array_equal(found["pattern"].values, np.flatnonzero(scan.scan_index == 3))
    alone = residuals(folder / "experiment-3.zarr", parts[3].store, client=client)
    np.testing.assert_allclose(found["r_factor"].values, alone["r_factor"].values, rtol=1e-6)
    worst = outliers(found, n_mad=0.5)
    assert set(worst) <= set(found["pattern"].values)
    np.testing.assert_array_equal(scan.scan_index[worst], 3)
    with pytest.raises(PtychodaskError, match=r"different experiments \(result 3, experiment= 0\)"):
        residuals(folder / "experiment-3.zarr", scan.store, client=client, experiment=0)
    unknown = open_result(folder / "experiment-3.zarr").drop_attrs()
    with pytest.raises(PtychodaskError, match=r"has 2 experiments \(0, 3\).*choose one with experiment="):
        residuals(unknown, scan.store, client=client)
    given = residuals(unknown, scan.store, client=client, experiment=3)
    xr.testing.assert_equal(given, found)


def test_compare_takes_patterns_of_one(scan, folder):
    one, other = (open_result(folder / f"experiment-{number}.zarr") for number in NUMBERS)
    inside = patterns_inside({"one": one}, scan)
    assert len(inside)
    np.testing.assert_array_equal(scan.scan_index[inside], 0)
    with pytest.raises(PtychodaskError, match=r"results are of different experiments \(one 0, other 3\)"):
        compare({"one": one, "other": other}, scan=scan)
    assert "r_factor" in compare({"one": one, "again": one * 1}, scan=scan, experiment=0)
    assert "r_factor" not in compare({"one": one, "other": other})


def test_a_report_is_of_one(scan, folder, tmp_path):
    page = write_report(folder / "experiment-3.zarr", tmp_path / "r.html", scan=scan.store, progress=False)
    assert f"Experiment 3 of the scan consists of {N_PATTERNS} diffraction patterns" in page.read_text()


def test_export_has_the_positions_of_one(scan, folder, tmp_path):
    export(folder / "experiment-3.zarr", tmp_path / "a.cxi", format="cxi", scan=scan.store)
    export(folder / "experiment-3.zarr", tmp_path / "a.npz", format="ptychopinn", scan=scan.store)
    with np.load(tmp_path / "a.npz") as file:
        assert file["diff3d"].shape[0] == N_PATTERNS
        np.testing.assert_array_equal(file["scan_index"], 3)
    with h5py.File(tmp_path / "a.cxi") as file:
        assert len(file["entry_1/sample_1/geometry_1/translation"]) == N_PATTERNS
    with pytest.raises(PtychodaskError, match="choose one with experiment="):
        export(scan.store, tmp_path / "b.cxi", format="cxi")
    export(scan.store, tmp_path / "b.cxi", format="cxi", experiment=0)
    export(scan.store, tmp_path / "both.npz", format="ptychopinn")
    export(scan.store, tmp_path / "one.npz", format="ptychopinn", experiment=3)
    with np.load(tmp_path / "both.npz") as both, np.load(tmp_path / "one.npz") as one:
        assert len(both["diff3d"]) == 2 * N_PATTERNS
        np.testing.assert_array_equal(one["diff3d"], both["diff3d"][both["scan_index"] == 3])


@pytest.mark.parametrize("with_probe", [False, True])
def test_the_iterative_engine_takes_one(scan, parts, client, with_probe):
    fields = {"n_sweeps": 3, "refine_probe": with_probe, "progress": False}
    found = reconstruct_iterative(scan.store, experiment=3, **fields)
    alone = reconstruct_iterative(parts[3].store, **fields)
    assert found.attrs["r_factor"] == pytest.approx(alone.attrs["r_factor"], rel=0.05)
    assert found.ptycho.records["spec"]["experiment"] == 3
    with pytest.raises(PtychodaskError, match="choose one with experiment="):
        reconstruct_iterative(scan.store, **fields)


def test_the_probe_is_refined_on_the_chosen_one(scan, tmp_path, monkeypatch):
    used = []
    measured = iterative.measure
    monkeypatch.setattr(iterative, "measure", lambda scan, index: used.extend(index) or measured(scan, index))
    refine_probe(scan.store, n_sweeps=3, experiment=3, progress=False)
    np.testing.assert_array_equal(open_scan(scan.store).scan_index[used], 3)
    with pytest.raises(PtychodaskError, match=r"experiment is 1 \(--experiment\), but its patterns are of 0, 3"):
        refine_probe(scan.store, n_sweeps=3, experiment=1, progress=False)


def test_commands_write_and_take_a_result_for_each(scan, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ptychodask.reconstruction.resolve_model", lambda *_: LinearModel())
    code, out, err = run("plan", scan.store, "--groups", "c4-k7-s0")
    assert (code, out.count("patterns    100 of")) == (0, 2), err
    code, out, err = run("reconstruct", scan.store, "--out", "results", "--png", "picture.png", "-q")
    assert code == 0, err
    assert out.count("results/experiment-") == 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"picture-experiment-{n}.png" for n in NUMBERS]
    code, _, err = run("residuals", "results", scan.store, "-q")
    assert code
    assert "pass one of them, such as" in err
    code, out, err = run("residuals", "results/experiment-0.zarr", scan.store, "-q")
    assert code == 0, err
    code, out, err = run("compare", "results/experiment-0.zarr", "--scan", scan.store, "--experiment", 0)
    assert (code, "R " in out) == (0, True), err
