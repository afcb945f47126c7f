"""Records of refinement: read as they are, whoever wrote them, and shown."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes

from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import compare, results_by_label
from ptychodask.judging.plotting import plot, plot_refinement
from ptychodask.judging.refinements import (
    MOST_STAGES,
    added_phase,
    attributes_of_network,
    refinement_of,
    refinement_text,
    shifts_of,
    slow_phase_on,
)
from ptychodask.judging.tables import to_csv, to_markdown
from ptychodask.result import make_dataset
from ptychodask.simulate import simulate

NODES = {
    "corner_yx_px": [-10, 5],
    "spacing_px": 20.0,
    "shape": [3, 4],
    "phase": (7 * np.arange(12.0).reshape(3, 4) / 12).tolist(),
}

SLOW_PHASE = {"kept": True, "misfit_before": 400.0, "misfit_after": 300.0, "n_patterns": 90, "n_judges": 12}

STAGES = [
    {"stage": "stitched", "misfit": 400.0, "r_factor": 0.2, "kept": True},
    {"stage": "slow_phase", "misfit": 300.0, "r_factor": None, "kept": True},
    {"stage": "sweep 1", "misfit": 200.0, "r_factor": 0.15, "kept": True},
    {"stage": "sweep 2", "misfit": 220.0, "r_factor": 0.14, "kept": False},
]

REFINEMENT = {
    "slow_phase": SLOW_PHASE | {"nodes": NODES},
    "stages": STAGES,
    "n_judges": 12,
    "measure": "poisson deviance",
}


def result(attributes, *, seed=0):
    rng = np.random.default_rng(seed)
    object_ = np.exp(1j * rng.uniform(-1, 1, (40, 60))).astype(np.complex64)
    object_[-1] = np.nan
    weight = np.isfinite(object_).astype(np.float32)
    return make_dataset(object_, weight, 0.1 * weight, weight, (-10, 5), pixel_size_m=None, attributes=attributes)


def with_positions(ds, position, shift):
    return ds.assign(position_refined_yx_px=(("pattern", "yx"), position + shift))


def panels_of(figure):
    titles = {axes.get_title() or axes.get_title(loc="left"): axes for axes in figure.findobj(Axes)}
    return {title: axes for title, axes in titles.items() if title}


def test_stages_of_a_record_are_read_in_their_order():
    record = refinement_of({"refinement": REFINEMENT})
    assert [(stage.title, stage.kept) for stage in record.stages] == [
        ("stitched", True),
        ("slow phase", True),
        ("sweep 1", True),
        ("sweep 2", False),
    ]
    np.testing.assert_array_equal(record.relative_misfit, [1, 0.75, 0.5, 0.55])
    assert (record.n_judges, record.measure, record.steps) == (12, "Poisson deviance", ("slow phase", "1 sweep"))


@pytest.mark.parametrize(
    ("slow_phase", "polish", "stages", "r_factors", "text"),
    [
        (SLOW_PHASE, None, [("stitched", 400), ("slow_phase", 300)], [np.nan, np.nan], "slow phase"),
        (
            SLOW_PHASE,
            [0.2, 0.1],
            [("stitched", 400), ("slow_phase", 300), ("sweep 1", np.nan)],
            [np.nan, 0.2, 0.1],
            "slow phase, 1 sweep",
        ),
        (
            SLOW_PHASE | {"kept": False},
            [0.2, 0.1, 0.05],
            [("stitched", 400), ("slow_phase", 300), ("sweep 1", np.nan), ("sweep 2", np.nan)],
            [0.2, np.nan, 0.1, 0.05],
            "2 sweeps",
        ),
        (None, [0.2, 0.1], [("stitched", np.nan), ("sweep 1", np.nan)], [0.2, 0.1], "1 sweep"),
        (None, None, [], [], "none"),
    ],
)
def test_results_whose_sweeps_had_no_judges_are_read_too(slow_phase, polish, stages, r_factors, text):
    attributes = {} if slow_phase is None else {"refinement": {"slow_phase": slow_phase}}
    attributes |= {} if polish is None else {"polish": {"sweeps": len(polish) - 1, "r_factor": polish}}
    record = refinement_of(attributes)
    assert [stage.name for stage in record.stages] == [name for name, _ in stages]
    np.testing.assert_array_equal([stage.misfit for stage in record.stages], [misfit for _, misfit in stages])
    np.testing.assert_array_equal([stage.r_factor for stage in record.stages], r_factors)
    assert refinement_text(attributes) == text


@pytest.mark.parametrize(
    "refinement",
    [
        3,
        "none",
        [],
        {"stages": "all", "slow_phase": [1], "n_judges": "many", "measure": 3, "left_out": 1},
        {"stages": [3, {"stage": 4}, {"misfit": 1.0}], "slow_phase": {"kept": True, "nodes": 3}},
        {"stages": [{"stage": "sweep 1", "misfit": "low", "r_factor": True, "kept": "yes"}], "slow_phase": 1.0},
        {"slow_phase": {"kept": False, "nodes": NODES}},
    ],
)
def test_records_of_another_form_count_as_absent(refinement):
    ds = result({"refinement": refinement, "polish": refinement, "model": {}})
    assert refinement_text(ds.attrs) == "none"
    assert added_phase(ds) is None
    assert len(plot(ds).findobj(Axes)) == len(plot(result({})).findobj(Axes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"phase": [[1.0], [2.0, 3.0]]},
        {"phase": [[1.0, float("nan")]]},
        {"phase": [[1.0, "high"]]},
        {"phase": [1.0, 2.0]},
        {"spacing_px": 0},
        {"corner_yx_px": "here"},
        {"corner_yx_px": [1]},
    ],
)
def test_nodes_of_another_form_count_as_absent(wrong):
    assert added_phase(result({"refinement": {"slow_phase": SLOW_PHASE | {"nodes": NODES | wrong}}})) is None


def test_long_records_are_cut():
    stages = [{"stage": f"sweep {k}", "misfit": 1.0} for k in range(10 * MOST_STAGES)]
    assert len(refinement_of({"refinement": {"stages": stages}}).stages) == MOST_STAGES


def test_several_methods_have_a_refinement_each():
    both = xr.concat([result({}), result({})], "network").assign_coords(network=["one", "other"])
    both.attrs = {"networks": ["one", "other"], "refinement": {"one": REFINEMENT, "other": {"left_out": "no probe"}}}
    opened = results_by_label([(None, both)])
    assert {label: refinement_text(ds.attrs) for label, ds in opened.items()} == {
        "one": "slow phase, 1 sweep",
        "other": "none",
    }
    assert refinement_of(opened["other"].attrs).left_out == "no probe"
    assert attributes_of_network({"refinement": REFINEMENT}, "one") == {"refinement": REFINEMENT}


def test_the_slow_phase_is_bilinear_between_nodes_and_constant_beyond():
    y, x = np.array([-30.0, -10.0, 0.0, 30.0, 99.0]), np.array([5.0, 15.0, 65.0])
    phase = slow_phase_on({"refinement": REFINEMENT}, y, x)
    at = (np.clip((y + 10) / 20, 0, 2)[:, None], np.clip((x - 5) / 20, 0, 3))
    np.testing.assert_allclose(phase, 7 / 12 * (4 * at[0] + at[1]), atol=1e-12)


def test_the_added_phase_of_a_stitched_object_is_their_difference():
    ds = result({})
    turn = 0.4 * np.sin(np.arange(60) / 9)
    ds["object_stitched"] = ds["object"] * np.exp(1j * (turn - 2)).astype(np.complex64)
    added = added_phase(ds)
    assert not added.is_slow
    assert np.isnan(added.phase[-1]).all()
    np.testing.assert_allclose(np.ptp(added.phase[:-1] + turn), 0, atol=1e-5)


def test_shifts_are_those_from_the_positions_of_the_scan_or_of_the_result(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, step_px=3.0, progress=False)
    shift = np.full((40, 2), [0.3, -0.4])
    ds = with_positions(result({}), scan.position_yx_px, shift)
    ds["position_refined_yx_px"][3] = np.nan
    assert shifts_of(ds) is None
    assert shifts_of(result({}), scan) is None
    shifts = shifts_of(ds, scan)
    assert shifts.rms_px == pytest.approx(0.5)
    np.testing.assert_array_equal(shifts.position_yx_px, np.delete(scan.position_yx_px, 3, axis=0))
    ds["position_yx_px"] = ("pattern", "yx"), scan.position_yx_px - 1
    np.testing.assert_allclose(shifts_of(ds, scan).shift_yx_px[0], [1.3, 0.6])
    with pytest.raises(
        PtychodaskError, match=r"has 5 refined positions, but .*scan.zarr has 40 patterns; pass the scan"
    ):
        plot(with_positions(result({}), np.zeros((5, 2)), 0), scan=tmp_path / "scan.zarr")


def test_the_figure_of_a_refinement_shows_all_that_is_recorded(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=40, step_px=3.0, progress=False)
    ds = with_positions(result({"refinement": REFINEMENT}), scan.position_yx_px, [[0.0, 2.0]])
    ds["object_stitched"] = ds["object"]
    figure = plot_refinement(ds, scan=scan, path=tmp_path / "refinement.png")
    panels = panels_of(figure)
    assert set(panels) == {
        "judges' misfit and R after each stage",
        "stitched: phase (rad)",
        "refined: phase (rad)",
        "slow phase added",
        "displacement, rms 2 px",
        "cycles | rad",
    }
    kept, rejected_path, rejected = panels["judges' misfit and R after each stage"].lines
    np.testing.assert_array_equal(kept.get_xydata(), [[0, 1], [1, 0.75], [2, 0.5]])
    np.testing.assert_array_equal(rejected_path.get_xydata(), [[2, 0.5], [3, 0.55]])
    np.testing.assert_array_equal(rejected.get_xydata(), [[3, 0.55]])
    (slow,) = panels["slow phase added"].images
    assert slow.get_array().mask[-1].all()
    np.testing.assert_allclose(slow.get_array()[0, [0, 20]], [0, 7 / 12], atol=1e-6)
    (cycles,) = panels["cycles | rad"].child_axes
    figure.canvas.draw()
    np.testing.assert_allclose(np.array(cycles.get_ylim()) * 2 * np.pi, slow.get_clim(), rtol=1e-6)
    (arrows,) = (one for one in panels["displacement, rms 2 px"].collections if hasattr(one, "U"))
    np.testing.assert_allclose(arrows.U, 2)
    np.testing.assert_allclose(arrows.V, 0)
    assert set(panels_of(plot(ds, scan=scan))) > {"slow phase added", "displacement, rms 2 px", "amplitude"}
    assert "slow phase added" not in panels_of(plot(ds, refinement=False))


def test_sweeps_without_judges_show_their_r():
    panels = panels_of(plot_refinement(result({"polish": {"r_factor": [0.3, 0.2, 0.1]}})))
    assert list(panels) == ["R after each stage"]
    np.testing.assert_array_equal(panels["R after each stage"].lines[0].get_ydata(), [0.3, 0.2, 0.1])


def test_a_result_without_a_refinement_has_no_figure_of_it():
    with pytest.raises(PtychodaskError, match="records no refinement; reconstruct with slow_phase=True"):
        plot_refinement(result({"refinement": {"left_out": "no probe"}}))


def test_comparisons_warn_if_results_were_refined_differently(caplog):
    plain, refined = result({"model": {}}), result({"model": {}, "refinement": REFINEMENT}, seed=1)
    iterative = result({"spec": {"engine": "iterative"}}, seed=2)
    alike = compare({"plain": plain, "again": plain, "iterative": iterative})
    assert "refinement" not in alike.attrs
    assert not caplog.records
    table = compare({"plain": plain, "refined": refined, "iterative": iterative})
    assert table.ptycho.records["refinement"] == {"plain": "none", "refined": "slow phase, 1 sweep"}
    warning = "Not all were refined alike; refinement: plain (none), refined (slow phase, 1 sweep)."
    assert warning in caplog.text
    assert warning in to_markdown(table)


def test_tables_hold_the_phase_correlation_of_each_band():
    table = compare({"one": result({}), "other": result({}, seed=1)})
    header, *rows = to_csv(table).splitlines()
    names = ["correlation", "correlation_slow", "correlation_middle", "correlation_fine"]
    assert header.split(",")[2:6] == names
    amplitude, phase = (row.split(",") for row in rows[:2])
    assert amplitude[3:6] == ["", "", ""]
    np.testing.assert_allclose(np.array(phase[2:6], float), 1, atol=1e-6)
    assert "correlation_slow, _middle, _fine below 0.02, up to 0.1 and above" in to_markdown(table)
