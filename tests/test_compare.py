"""Results beside each other: placed by their coordinates, judged on what all have seen."""

from __future__ import annotations

import numpy as np
import pytest

from ptychodask.compare import METRICS, compare, to_markdown, truth_on_pixels
from ptychodask.iterative import r_factor
from ptychodask.result import make_dataset
from ptychodask.scan import PtychodaskError, Truth
from ptychodask.simulate import random_field, shift_probe, simulate


@pytest.fixture
def truth():
    return Truth(random_field((70, 80), np.random.default_rng(2)), (-20.0, 10.0))


def result(object_, corner, weight=None):
    weight = np.ones(object_.shape, np.float32) if weight is None else weight
    return make_dataset(object_, weight, weight, weight, corner, pixel_size_m=None, attributes={})


def crop_of(truth, start, shape):
    return truth.object[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]].copy()


def test_the_truth_itself_scores_perfectly_whatever_its_gauge_and_corner(truth):
    y, x = np.indices((50, 60))
    part = crop_of(truth, (5, 8), (50, 60)) * np.exp(1j * (1 + 0.02 * y - 0.01 * x))
    table = compare({"same": result(part, (-15, 18))}, truth=truth)
    same = table["value"].loc["same"]
    np.testing.assert_allclose(same.sel(metric="correlation"), 1, atol=1e-6)
    np.testing.assert_allclose(same.sel(metric="ssim"), 1, atol=1e-4)
    np.testing.assert_allclose(same.sel(metric="mae"), 0, atol=1e-4)
    np.testing.assert_allclose(same.sel(metric="frc50"), 0.5)
    assert float(same.sel(metric="ratio", part="amplitude")) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(table["ramp_rad_per_px"][0], [0.02, -0.01], atol=1e-6)
    assert float(table["phase_rad"][0]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(table["peak"].sel(part="amplitude"), np.ptp(np.abs(part)), rtol=1e-6)
    assert table.attrs["reference"] == "truth"
    assert table.attrs["seen_pixels"] == 50 * 60


def test_results_of_different_frames_are_judged_on_what_they_share(truth):
    one = crop_of(truth, (0, 0), (50, 60))
    one[:5] = np.nan
    weight = np.isfinite(one).astype(np.float32)
    other = crop_of(truth, (10, 20), (50, 60))
    table = compare({"one": result(one, (-20, 10), weight), "other": result(other, (-10, 30))})
    assert table.attrs["seen_pixels"] == 40 * 40
    assert (table.attrs["y_px"], table.attrs["x_px"]) == ([-10.0, 29.0], [30.0, 69.0])
    assert table.attrs["reference"] == "one"
    np.testing.assert_allclose(table["value"].sel(metric="correlation"), 1, atol=1e-6)


def test_pixels_of_small_weight_are_left_out(truth):
    spoilt = crop_of(truth, (0, 0), (50, 60))
    weight = np.ones((50, 60), np.float32)
    spoilt[:10], weight[:10] = 100, 0.05
    table = compare({"spoilt": result(spoilt, (-20, 10), weight)}, truth=truth)
    assert table.attrs["seen_pixels"] == 40 * 60
    np.testing.assert_allclose(table["value"].sel(metric="mae"), 0, atol=1e-5)
    whole = compare({"spoilt": result(spoilt, (-20, 10), weight)}, truth=truth, min_weight=0.0)
    assert whole.attrs["seen_pixels"] == 50 * 60


def test_scale_is_removed_only_on_request(truth):
    brighter = result(1.5 * truth.object, (-20, 10))
    kept, removed = (compare({"a": brighter}, truth=truth, scale=scale) for scale in (False, True))
    assert float(kept["value"].sel(metric="ratio", part="amplitude")[0]) == pytest.approx(1.5, rel=1e-6)
    assert float(removed["value"].sel(metric="ratio", part="amplitude")[0]) == pytest.approx(1, rel=1e-6)
    assert float(removed["scale"][0]) == pytest.approx(1.5, rel=1e-6)
    assert removed.attrs["gauge_removed"] == ["phase", "ramp", "scale"]


def test_truth_between_pixels_is_met_by_splines(truth):
    # A smooth field moved by a Fourier shift is the same field on a grid moved the other way.
    square = random_field((64, 64), np.random.default_rng(3))
    moved = Truth(shift_probe(square, (0.25, -0.5)), (-0.25, 0.5))
    axis = np.arange(8.0, 56.0)
    np.testing.assert_allclose(truth_on_pixels(moved, axis, axis), square[8:56, 8:56], atol=2e-3)


def test_stores_are_opened_and_r_is_added(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, step_px=3.0, progress=False)
    corner = tuple(int(value) for value in scan.truth.corner_yx_px)
    result(scan.truth.object, corner).ptycho.save(tmp_path / "truth.zarr")
    table = compare(
        {"truth": tmp_path / "truth.zarr", "flat": result(np.ones_like(scan.truth.object), corner)},
        truth=tmp_path / "scan.zarr",
        scan=tmp_path / "scan.zarr",
    )
    flat = r_factor(np.ones((2, 2)), (0.0, 0.0), scan)
    np.testing.assert_allclose(table["r_factor"].loc["flat"], flat, rtol=1e-4)
    assert float(table["r_factor"].loc["truth"]) < 0.01 < flat


def test_markdown_table_has_a_row_for_each_method_and_part(truth):
    table = to_markdown(compare({"a": result(truth.object, (-20, 10))}, truth=truth))
    lines = table.splitlines()
    assert lines[0] == "| method | part | " + " | ".join(METRICS) + " |"
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| a", "amplitude"], ["| a", "phase"]]
    assert "nan" not in table
    assert lines[-1].startswith("Against truth on 5600 pixels; phase, ramp removed; PSNR in dB at peak ")


def test_what_cannot_be_compared_is_refused(truth, tmp_path):
    one = result(truth.object, (-20, 10))
    with pytest.raises(PtychodaskError, match="1 results and no truth; pass truth="):
        compare({"one": one})
    with pytest.raises(PtychodaskError, match="along y one result begins at 500 px where another ends at 49 px"):
        compare({"one": one, "far": result(truth.object, (500, 10))})
    with pytest.raises(PtychodaskError, match="no pixel is seen in all"):
        compare({"one": one}, truth=Truth(truth.object, (500.0, 10.0)))
    with pytest.raises(PtychodaskError, match=r"one: has no weight \(y, x\)"):
        compare({"one": one.drop_vars("weight"), "other": one})
    with pytest.raises(PtychodaskError, match="no such result"):
        compare({"one": tmp_path / "none.zarr", "other": one})
