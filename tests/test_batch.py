"""Several scans as one job, and regions in metres."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from models_for_tests import LinearModel

from ptychodask import FailedScansError, reconstruction
from ptychodask.errors import PtychodaskError
from ptychodask.plan import plan
from ptychodask.plan.spec import ReconstructionSpec, in_pixels
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store.write import write_scan

pytestmark = pytest.mark.usefixtures("empty_caches")

PIXEL_M = 1e-8


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Three scans; the patterns of the second are gone."""
    folder = tmp_path_factory.mktemp("many")
    paths = [folder / f"{name}.zarr" for name in ("first", "broken", "last")]
    for seed, path in enumerate(paths):
        simulate(path, n_pixels=16, n_patterns=60, step_px=3.0, seed=seed)
    for file in (paths[1] / "diffraction" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    return paths


def test_each_scan_has_the_result_that_it_has_alone(stores, client, tmp_path):
    good = [stores[0], str(stores[2])]
    found = reconstruct(good, LinearModel(), client=client, out=tmp_path / "results")
    assert list(found) == ["first", "last"]
    for name, store in zip(found, good, strict=True):
        alone = reconstruct(store, LinearModel(), client=client)
        np.testing.assert_array_equal(found[name]["object"].values, alone["object"].values)
        stored = open_result(tmp_path / "results" / f"{name}.object.zarr")
        np.testing.assert_array_equal(stored["object"].values, alone["object"].values)


def test_one_that_fails_is_told_in_the_end_and_the_others_are_kept(stores, client, tmp_path):
    with pytest.raises(FailedScansError, match=r"1 of 3 scans failed \(kept: first, last in .*\): broken: ") as told:
        reconstruct(stores, LinearModel(), client=client, out=tmp_path / "results")
    assert list(told.value.results) == ["first", "last"]
    assert list(told.value.errors) == ["broken"]
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["first.object.zarr", "last.object.zarr"]


def test_in_memory_the_error_holds_the_other_results(stores, client):
    with pytest.raises(FailedScansError, match=r"kept: first, last\)") as told:
        reconstruct(tuple(stores), LinearModel(), client=client)
    assert told.value.results["last"]["object"].dims == ("y", "x")
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)


def test_resuming_opens_what_is_whole_and_does_what_is_left(stores, client, tmp_path):
    model, out = LinearModel(), tmp_path / "results"
    reconstruct(stores[:1], model, client=client, out=out)
    n_calls = len(model.calls)
    again = LinearModel()
    found = reconstruct([stores[0], stores[2]], again, client=client, out=out, resume=True)
    assert list(found) == ["first", "last"]
    assert len(model.calls) + len(again.calls) == 2 * n_calls
    with pytest.raises(FailedScansError, match=r"2 of 2 scans failed: first: .*exists already"):
        reconstruct([stores[0], stores[2]], model, client=client, out=out)


def test_lazy_results_compute_nothing(stores, client):
    model = LinearModel()
    found = reconstruct(stores[::2], model, compute=False)
    assert not model.calls
    np.testing.assert_array_equal(
        found["first"]["object"].values, reconstruct(stores[0], LinearModel(), client=client)["object"].values
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "patches.zarr"}, "cache refers to one scan, and 2 are given"),
        ({"drop": [1]}, "drop refers to one scan"),
        ({"out": "no/such/folder"}, "does not exist; make it first"),
    ],
)
def test_what_does_not_go_with_several_is_refused_before_anything_runs(stores, client, fields, message):
    model = LinearModel()
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(stores[::2], model, client=client, **fields)
    assert not model.calls


def test_names_tell_scans_apart(stores, client, tmp_path):
    with pytest.raises(PtychodaskError, match="several scans are called first"):
        reconstruct([stores[0], tmp_path / "first.zarr"], LinearModel(), client=client)
    with pytest.raises(PtychodaskError, match="no scan is given"):
        reconstruct([], LinearModel(), client=client)
    with pytest.raises(PtychodaskError, match="results of several scans need a folder"):
        reconstruct(stores, LinearModel(), client=client, out=stores[0])


def test_the_command_line_takes_several(stores, tmp_path, run, refused, monkeypatch):
    monkeypatch.setattr(reconstruction, "resolve_model", lambda scan, model: LinearModel())
    out = tmp_path / "results"
    code, told, err = run("reconstruct", *stores, "--out", out, "-q")
    assert code == 2
    assert "1 of 3 scans failed" in err
    assert "broken: " in err
    assert told.count("px, ") == 2
    made = sorted(found.name for found in out.iterdir())
    assert made == ["first.object.png", "first.object.zarr", "last.object.png", "last.object.zarr"]
    assert "pass --out" in refused("reconstruct", *stores)
    assert "and not --png" in refused("reconstruct", *stores, "--out", out, "--png", tmp_path / "a.png")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A scan whose pixel size is known."""
    folder = tmp_path_factory.mktemp("metres")
    scan = simulate(folder / "a.zarr", n_pixels=16, n_patterns=60, step_px=3.0, seed=0)
    write_scan(
        folder / "scan.zarr",
        diffraction=scan.diffraction,
        position_yx_px=scan.position_yx_px,
        probe=scan.probe,
        domain="counts",
        calibration="as_given",
        pixel_size_m=PIXEL_M,
    )
    return folder / "scan.zarr"


@pytest.mark.parametrize(
    "roi_m", [(-5e-8, 9e-8, -8e-8, 3e-8), (-5.5e-8, 9.2e-8, -1.0e-8, 3e-8), (0.3e-8, 1.1e-8, 0.0, 1e-8)]
)
def test_a_region_in_metres_is_that_of_the_coordinates_in_metres(measured, client, roi_m):
    part = reconstruct(measured, LinearModel(), client=client, roi_m=roi_m)
    whole = reconstruct(measured, LinearModel(), client=client)
    y_m, x_m = whole["y_m"].values, whole["x_m"].values
    # Coordinates are products of pixels and 1e-8, good to some 1e-16 of themselves.
    eps = 1e-6 * PIXEL_M
    inside = whole["object"].values[(y_m >= roi_m[0] - eps) & (y_m < roi_m[1] - eps)]
    inside = inside[:, (x_m >= roi_m[2] - eps) & (x_m < roi_m[3] - eps)]
    assert part["object"].shape == inside.shape
    scale = np.nanmedian(np.abs(inside))
    assert np.nanmax(np.abs(part["object"].values - inside)) <= 1e-5 * scale
    assert part.ptycho.records["spec"]["roi_m"] is None
    assert plan(measured, LinearModel(), ReconstructionSpec(roi_m=roi_m)).box.shape == inside.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"roi_m": (1e-9, 2e-9, 0.0, 1e-7)}, "contains no pixel of 1e-08 m"),
        ({"roi_m": (1.0, 0.0, 0.0, 1.0)}, "expected metres"),
        ({"roi_m": (0.0, float("nan"), 0.0, 1.0)}, "expected metres"),
        ({"roi_m": (0.0, 1.0, 0.0)}, "expected metres"),
        ({"roi_m": (0.0, 1.0, 0.0, 1.0), "roi": (0, 1, 0, 1)}, "both select the region"),
        ({"roi_m": (5.0, 6.0, 0.0, 1.0)}, "does not overlap the object"),
        ({"roi_m": (1e200, 1e300, 0.0, 1.0)}, "contains no pixel"),
    ],
)
def test_a_region_that_is_none_is_refused(measured, client, fields, message):
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(measured, LinearModel(), client=client, **fields)


def test_metres_need_a_pixel_size(stores, client, refused):
    with pytest.raises(PtychodaskError, match="the pixel size is not known"):
        reconstruct(stores[0], LinearModel(), client=client, roi_m=(0.0, 1e-6, 0.0, 1e-6))
    assert "the pixel size is not known" in refused("plan", stores[0], "--roi-m", "0,1e-6,0,1e-6")
    assert "--roi-m" in refused("plan", stores[0], "--roi-m", "0,1e-6")


def test_pixels_are_left_alone():
    spec = ReconstructionSpec(roi=(0, 5, 0, 5))
    assert in_pixels(spec, None, "scan.zarr") is spec
