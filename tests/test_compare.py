"""Results beside each other: aligned by their coordinates, judged on what all have seen."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.forward import r_factor, shift_probe
from ptychodask.io import ForeignResult
from ptychodask.judging.compare import (
    align,
    compare,
    patterns_inside,
    r_factors,
    results_by_label,
    truth_on_pixels,
)
from ptychodask.judging.metrics import METRICS, frc, half_bit
from ptychodask.judging.tables import to_csv, to_markdown
from ptychodask.result import make_dataset
from ptychodask.scan import Truth
from ptychodask.simulate import crossing_lines, random_field, simulate


@pytest.fixture
def truth():
    return Truth(random_field((70, 80), np.random.default_rng(2)), (-20.0, 10.0))


def result(object_, corner, weight=None, *, pixel_size_m=None, **attributes):
    weight = np.ones(object_.shape, np.float32) if weight is None else weight
    return make_dataset(object_, weight, weight, weight, corner, pixel_size_m=pixel_size_m, attributes=attributes)


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
    assert lines[-1].startswith("Reference: truth, on 5600 common pixels; phase, ramp removed; PSNR in dB with peak ")


def noisy(truth, seed, noise=0.05):
    rng = np.random.default_rng(seed)
    return (truth.object + noise * rng.standard_normal(truth.object.shape)).astype(np.complex64)


def test_differences_are_signed_and_from_the_baseline(truth):
    results = {"good": result(noisy(truth, 0, 0.02), (-20, 10)), "poor": result(noisy(truth, 1, 0.1), (-20, 10))}
    table = compare(results, truth=truth, baseline="good")
    np.testing.assert_array_equal(
        table["difference"].values, table["value"].values - table["value"].loc[["good"]].values
    )
    assert (
        float(table["difference"].loc["poor", "amplitude", "mae"])
        > 0
        > table["difference"].loc["poor", "phase", "psnr"]
    )
    assert "Difference from good:" in to_markdown(table)
    with pytest.raises(PtychodaskError, match="baseline is 'best', expected one of the results good, poor"):
        compare(results, truth=truth, baseline="best")


def test_ring_correlations_come_with_their_crossings_in_pixels_and_metres(truth):
    estimate = noisy(truth, 0)
    table = compare({"a": result(estimate, (-20, 10), pixel_size_m=2e-9)}, truth=truth, ramp=False)
    frequency, curve = frc(np.abs(estimate), np.abs(truth.object))
    np.testing.assert_allclose(table["frequency"], frequency)
    np.testing.assert_allclose(table["frc"].loc["a", "amplitude"], curve, atol=5e-3)
    np.testing.assert_array_equal(table["half_bit"], half_bit(frequency))
    crossings = table["value"].sel(metric=["frc50", "frc_half_bit", "frc_1_7"]).values
    np.testing.assert_allclose(table["resolution_px"], 1 / crossings)
    np.testing.assert_allclose(table["resolution_m"], 2e-9 / crossings)


def test_the_peak_of_the_psnr_is_stated_and_can_be_chosen(truth):
    one = {"a": result(noisy(truth, 0), (-20, 10))}
    own, ptychopinn, two = (compare(one, truth=truth, peak=peak) for peak in ("range", "ptychopinn", 2.0))
    error = own["value"].loc["a", :, "mse"]
    np.testing.assert_allclose(own["value"].loc["a", :, "psnr"], 10 * np.log10(own["data_range"] ** 2 / error))
    np.testing.assert_allclose(ptychopinn["value"].loc["a", :, "psnr"], 10 * np.log10(255**2 / error))
    np.testing.assert_allclose(two["peak"], 2)
    assert "PSNR in dB with peak 255 (amplitude)" in to_markdown(ptychopinn)
    with pytest.raises(PtychodaskError, match="peak is 'most', expected a positive number or one of range, ptychopinn"):
        compare(one, truth=truth, peak="most")


def test_what_a_constant_phase_cannot_tell_is_left_blank(truth):
    absorber = Truth((np.abs(truth.object) * np.exp(0.3j)).astype(np.complex64), truth.corner_yx_px)
    table = compare({"a": result(noisy(truth, 0), (-20, 10))}, truth=absorber)
    known = table["value"].loc["a", "phase"].notnull()
    assert table["frc"].loc["a", "phase"].isnull().all()
    differences = {name for name, each in METRICS.items() if "phase" in each.parts and not each.needs_structure}
    assert set(known["metric"].values[known]) == differences - {"psnr"} >= {"mae", "mse"}
    amplitude = {name for name, each in METRICS.items() if "amplitude" in each.parts}
    known = table["value"].loc["a", "amplitude"].notnull()
    assert set(known["metric"].values[known]) == amplitude - {"ms_ssim"}  # too small for MS-SSIM


def test_phases_around_the_wrap_are_as_good_as_others(truth):
    plain = compare({"a": result(noisy(truth, 0), (-20, 10))}, truth=truth)
    turned = Truth((truth.object * np.exp(3.1j)).astype(np.complex64), truth.corner_yx_px)
    wrapped = compare({"a": result(noisy(truth, 0), (-20, 10))}, truth=turned)
    np.testing.assert_allclose(wrapped["value"].loc["a", "phase"], plain["value"].loc["a", "phase"], rtol=1e-3)


def test_an_object_of_another_program_is_found_on_the_truth(truth):
    moved = np.ones((90, 100), np.complex64)
    moved[11:81, 7:87] = truth.object
    foreign = ForeignResult(shift_probe(np.pad(moved, ((0, 10), (0, 0))), (0.25, -0.4))[:90] * 1j, program="pty-chi")
    ours = result(truth.object, (-20, 10))
    table = compare([ours.assign_attrs(model={"kind": "pinn"}), foreign], truth=truth)
    assert table["method"].values.tolist() == ["PtychoPINN", "PtyChi"]
    # Its pixel [11.25, 6.6] is the truth's [0, 0], which lies at (-20, 10).
    np.testing.assert_allclose(table["shift_px"].loc["PtyChi"], (-31.25, 3.4), atol=0.03)
    assert (table["shift_px"].loc["PtychoPINN"] == 0).all()
    assert (table["value"].loc["PtyChi", :, "correlation"] > 0.997).all()
    assert "Registered by a shift (y, x) in pixels: PtyChi by (-31.2" in to_markdown(table)


def test_a_product_lies_where_its_file_says_unless_it_is_registered(truth):
    product = {"a": result(truth.object, (-20, 10)), "product": ForeignResult(truth.object, (-18.0, 10.0), 1e-9)}
    kept, found = (compare(product, truth=truth, register=register) for register in (False, True))
    assert (kept["shift_px"].loc["product"] == 0).all()
    np.testing.assert_allclose(found["shift_px"].loc["product"], (-2, 0), atol=0.02)
    np.testing.assert_allclose(found["value"].sel(metric="correlation"), 1, atol=1e-4)
    assert (kept["value"].loc["product", :, "correlation"] < 0.99).all()


def test_registered_results_are_placed_on_the_first_where_there_is_no_truth(truth):
    own = ForeignResult(truth.object)
    aligned = align({"own": own, "scan's": result(crop_of(truth, (5, 8), (50, 60)), (500, 600))})
    assert [ds.attrs["frame"] for ds in aligned.values()] == ["own", "own"]
    assert (float(aligned["scan's"]["y"][0]), float(aligned["scan's"]["x"][0])) == (5, 8)
    np.testing.assert_allclose(aligned["scan's"].attrs["shift_yx_px"], (-495, -592), atol=0.011)


def test_results_name_themselves(truth, tmp_path):
    pinn, baseline = (result(truth.object, (-20, 10), model={"kind": kind}) for kind in ("pinn", "baseline"))
    iterative = result(truth.object, (-20, 10), spec={"engine": "iterative"})
    pinn.ptycho.save(tmp_path / "again.zarr")
    np.save(tmp_path / "other.npy", truth.object)
    files = [tmp_path / "again.zarr", tmp_path / "other.npy"]
    found = results_by_label((None, each) for each in (pinn, baseline, iterative, *files))
    assert list(found) == ["PtychoPINN", "Baseline", "Iterative", "PtychoPINN (again)", "other"]
    both = xr.concat([pinn, baseline], xr.Variable("network", ["pinn", "baseline"]), combine_attrs="override")
    assert list(results_by_label([(None, both)])) == ["PtychoPINN", "Baseline"]
    assert list(results_by_label([(None, both.isel(network=1)), (None, iterative)])) == ["Baseline", "Iterative"]
    assert list(results_by_label([("new", both), ("old", pinn)])) == ["new PtychoPINN", "new Baseline", "old"]
    with pytest.raises(PtychodaskError, match=r"two results are called PtychoPINN.*give each a label \(LABEL=PATH\)"):
        results_by_label([(None, pinn), (None, pinn), (None, pinn)])


def test_csv_has_all_digits_and_reads_back(truth):
    results = {"a": result(noisy(truth, 0), (-20, 10)), "b": result(noisy(truth, 1), (-20, 10))}
    table = compare(results, truth=truth, baseline="a")
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [(row["method"], row["part"]) for row in rows] == [
        ("a", "amplitude"),
        ("a", "phase"),
        ("b", "amplitude"),
        ("b", "phase"),
    ]
    assert float(rows[3]["psnr"]) == float(table["value"].loc["b", "phase", "psnr"])
    assert float(rows[3]["psnr_less_a"]) == float(table["difference"].loc["b", "phase", "psnr"])
    assert rows[1]["ratio"] == ""


def test_a_region_is_judged_by_the_patterns_whose_light_falls_inside(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=300, step_px=3.0, progress=False)
    corner = np.asarray(scan.truth.corner_yx_px, int)
    whole = result(scan.truth.object, tuple(corner.tolist()))
    region = whole.isel(y=slice(10, 50), x=slice(12, 52))
    inside = patterns_inside({"whole": whole, "region": region}, scan)
    # The light lies in the middle half of the frame around a position.
    distance = np.abs(scan.position_yx_px - corner - (10, 12) - 20).max(axis=1)
    assert set(np.flatnonzero(distance < 20 - 8)) <= set(inside) <= set(np.flatnonzero(distance < 20 - 2))
    table = compare({"region": region, "whole": whole}, truth=scan, scan=scan)
    assert table.attrs["r_patterns"] == len(inside) < scan.n_patterns
    expected = r_factor(scan.truth.object, tuple(corner), scan, inside)
    np.testing.assert_allclose(table["r_factor"].loc["whole"], expected, rtol=1e-6)
    np.testing.assert_allclose(table["r_factor"].loc["region"], expected, atol=0.01)
    assert len(patterns_inside({"whole": whole}, scan)) == scan.n_patterns


def test_without_a_pattern_inside_there_is_no_r(tmp_path, caplog):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, step_px=3.0, progress=False)
    corner = tuple(int(value) for value in scan.truth.corner_yx_px)
    found = r_factors({"small": result(scan.truth.object[:9, :9], corner)}, scan)
    assert np.isnan(found["small"])
    assert "no pattern illuminates only pixels seen in all results" in caplog.text
    with pytest.raises(PtychodaskError, match="own: is not in scan coordinates, so R cannot be computed"):
        r_factors({"own": ForeignResult(scan.truth.object)}, scan)


@pytest.mark.parametrize("attributes", [{"spec": "none", "model": 3}, {"model": {"kind": ["pinn"]}}, {"spec": [1]}])
def test_attributes_of_another_form_give_no_name(truth, attributes):
    assert list(results_by_label([(None, result(truth.object, (0, 0), **attributes))])) == ["result"]


def test_results_of_other_data_are_reported(truth, tmp_path, caplog):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, step_px=3.0, progress=False)
    corner = tuple(int(value) for value in scan.truth.corner_yx_px)
    own, other, silent = (
        result(scan.truth.object, corner, **attributes)
        for attributes in ({"data_hash": scan.data_hash}, {"data_hash": "0123456789abcdef"}, {})
    )
    alike = compare({"own": own, "silent": silent}, truth=scan, scan=scan)
    assert "data_hash" not in alike.attrs
    assert not caplog.records
    table = compare({"own": own, "other": other})
    assert table.ptycho.records["data_hash"] == {"own": scan.data_hash, "other": "0123456789abcdef"}
    words = f"Not all are from the same scan and probe; data hashes: own {scan.data_hash[:12]}, other 0123456789ab"
    assert words in caplog.text
    assert words in to_markdown(table)
    assert f"other 0123456789ab, the scan {scan.data_hash[:12]}." in to_markdown(
        compare({"other": other}, truth=scan, scan=scan)
    )


def test_what_cannot_be_compared_is_refused(truth, tmp_path):
    one = result(truth.object, (-20, 10))
    with pytest.raises(PtychodaskError, match="1 results and no truth; pass truth="):
        compare({"one": one})
    with pytest.raises(PtychodaskError, match="along y one result begins at 500 px but another ends at 49 px"):
        compare({"one": one, "far": result(truth.object, (500, 10))})
    with pytest.raises(PtychodaskError, match="no pixel is seen in all"):
        compare({"one": one}, truth=Truth(truth.object, (500.0, 10.0)))
    with pytest.raises(PtychodaskError, match=r"one: has no weight \(y, x\)"):
        compare({"one": one.drop_vars("weight"), "other": one})
    with pytest.raises(PtychodaskError, match="pixel size of a is 1e-09 m and that of b 2e-09 m"):
        compare({name: result(truth.object, (0, 0), pixel_size_m=size) for name, size in (("a", 1e-9), ("b", 2e-9))})
    with pytest.raises(PtychodaskError, match="odd: records 'small' as pixel_size_m, expected a positive number"):
        compare({"one": one, "odd": result(truth.object, (0, 0)).assign_attrs(pixel_size_m="small")})
    with pytest.raises(PtychodaskError, match=r"odd: records \[1\] as shift_yx_px, expected two numbers"):
        compare({"one": one, "odd": result(truth.object, (0, 0)).assign_attrs(shift_yx_px=[1])})
    far = one.assign_coords(y=one["y"] + 1e12)
    for odd in (one.isel(y=slice(None, None, 2)), one.assign_coords(y=one["y"] + 0.5), one.drop_vars("y"), far):
        with pytest.raises(PtychodaskError, match=r"odd: coordinates along y are .*, expected consecutive integers"):
            compare({"one": one, "odd": odd})
    with pytest.raises(PtychodaskError, match=r"alien: registration: .*; check that they are of one sample"):
        compare({"one": one, "alien": ForeignResult(crossing_lines((60, 70), np.random.default_rng(8)))})
    with pytest.raises(
        PtychodaskError, match="seen in all results and in the reference is 7 x 80 pixels, expected 8 or more"
    ):
        compare({"one": one, "rim": result(truth.object, (43, 10))})
    with pytest.raises(PtychodaskError, match="no such result"):
        compare({"one": tmp_path / "none.zarr", "other": one})
