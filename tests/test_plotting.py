"""Figures of results: every panel there, the right way up, in the right units."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import compare
from ptychodask.judging.metrics import frc
from ptychodask.judging.plotting import (
    UNSEEN_COLOUR,
    complex_colours,
    length_label,
    nice_length,
    plot,
    plot_comparison,
    plot_complex,
    plot_residuals,
    plot_split_half,
    worst_patterns,
)
from ptychodask.judging.resolution import resolution
from ptychodask.result import make_dataset
from ptychodask.scan import Truth


def result(object_, *, corner=(-10, 5), pixel_size_m=None):
    seen = np.isfinite(object_)
    weight = seen.astype(np.float32)
    uncertainty = np.where(seen, 0.1, np.nan)
    return make_dataset(object_, weight, uncertainty, weight, corner, pixel_size_m=pixel_size_m, attributes={})


@pytest.fixture
def object_():
    """Bright in the upper left corner alone; one unseen row."""
    object_ = np.full((40, 60), 0.5, np.complex64)
    object_[:10, :10] = np.exp(0.5j)
    object_[-1] = np.nan
    return object_


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def grey_at(figure, axes, y, x):
    """Mean colour, 0 to 1, that the figure shows at a data coordinate."""
    figure.canvas.draw()
    rgba = np.asarray(figure.canvas.buffer_rgba())
    column, row_from_below = axes.transData.transform((x, y))
    return rgba[len(rgba) - 1 - round(row_from_below), round(column), :3].mean() / 255


def test_result_gets_four_panels_with_colour_bars_and_scale_bars(object_, tmp_path):
    figure = plot(result(object_), path=tmp_path / "result.png")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["amplitude", "phase (rad)", "weight", "uncertainty"]
    assert len(figure.axes) == 8
    assert texts(figure) == ["10 px"] * 4
    with Image.open(tmp_path / "result.png") as image:
        assert min(image.size) > 600


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_single_panels_take_colours_limits_and_axes(object_):
    ds = result(object_)
    figure = plot(ds, "phase", cmap="viridis", vmin=-1.0, vmax=2.0, title="lines")
    assert titles_of(figure) == ["phase (rad)"]
    assert figure.get_suptitle() == "lines"
    (image,) = figure.axes[0].images
    assert (image.get_cmap().name, image.get_clim()) == ("viridis", (-1.0, 2.0))
    own = Figure()
    assert plot(ds, "amplitude", ax=own.add_subplot(), title="mine") is own
    assert titles_of(own) == ["mine"]
    assert titles_of(plot(ds, ["phase", "weight"])) == ["phase (rad)", "weight"]
    for fields, message in (
        ({"panels": "fase"}, "panels is 'fase', expected some of: amplitude, phase, weight, uncertainty"),
        ({"cmap": "gray"}, "cmap with 4 panels; choose one"),
        ({"crop": (0, 5, 900, 910)}, r"holds no pixel; the object reaches from y -10 to 29, x 5 to 64"),
        ({"crop": (0, 5)}, "expected first and last y"),
    ):
        with pytest.raises(PtychodaskError, match=message):
            plot(ds, **fields)


def test_the_crop_is_shown_at_its_coordinates(object_):
    (image,) = plot(result(object_), "amplitude", crop=(0, 9, 20, 39)).axes[0].images
    assert image.get_array().shape == (10, 20)
    assert image.get_extent() == [19.5, 39.5, 9.5, -0.5]


def test_the_dim_rim_is_left_out_unless_asked_for(object_):
    ds = result(object_)
    ds["weight"][:, :7] = 1e-3
    for show_dim, n_drawn in ((False, 39 * 53), (True, 39 * 60)):
        (image,) = plot(ds, "phase", show_dim=show_dim).axes[0].images
        assert np.isfinite(np.ma.filled(image.get_array(), np.nan)).sum() == n_drawn


def test_what_is_not_known_has_no_panel(object_):
    ds = result(object_)
    ds["uncertainty"][:] = np.nan
    figure = plot(ds.assign_attrs(store="/data/star.zarr"))
    assert titles_of(figure) == ["amplitude", "phase (rad)", "weight"]
    assert figure.get_suptitle() == "star"


def test_scale_bar_is_in_metres_where_the_pixel_size_is_known(object_):
    figure = plot(result(object_, pixel_size_m=1e-7))
    assert texts(figure) == ["1 µm"] * 4
    assert figure.axes[0].patches[0].get_width() == pytest.approx(10)


def test_y_points_down_and_x_points_right(object_):
    figure = plot(result(object_))
    axes = figure.axes[0]
    assert grey_at(figure, axes, -7, 8) > 0.9
    for y, x in [(-7, 60), (25, 8 + 20), (25, 60)]:
        assert grey_at(figure, axes, y, x) < 0.1
    assert axes.get_ylim() == (29.5, -10.5)
    assert axes.get_xlim() == (4.5, 64.5)


def test_wide_phases_are_shown_on_a_cyclic_map():
    ramp = np.exp(1j * np.linspace(-3, 3, 64 * 64).reshape(64, 64)).astype(np.complex64)
    image = plot(result(ramp)).axes[1].images[0]
    assert image.get_cmap().name == "twilight"
    np.testing.assert_allclose(image.get_clim(), (-np.pi, np.pi))
    narrow = plot(result(ramp**0.1)).axes[1].images[0]
    assert narrow.get_cmap().name == "gray"


def test_large_objects_are_thinned(monkeypatch, object_):
    monkeypatch.setattr("ptychodask.judging.plotting.LARGEST_PIXELS", 20)
    image = plot(result(object_)).axes[0].images[0]
    assert image.get_array().shape == (14, 20)


def known_object(shape=(60, 80)):
    rng = np.random.default_rng(0)
    return (rng.uniform(0.5, 1, shape) * np.exp(1j * rng.uniform(-0.5, 0.5, shape))).astype(np.complex64)


def panels_of(figure):
    return {axes.get_title(): axes for axes in figure.findobj(Axes) if axes.get_title()}


def test_comparison_shows_truth_and_results_without_their_gauge(tmp_path):
    known = known_object()
    y, x = np.indices((40, 60))
    turned = known[10:50, 5:65] * np.exp(1j * (2 + 0.01 * y - 0.02 * x))
    figure = plot_comparison(
        {"one": result(turned), "other": result(known[15:55, 5:65] + 0.1, corner=(-5, 5))},
        Truth(known, (-20.0, 0.0)),
        path=tmp_path / "comparison.png",
    )
    panels = panels_of(figure)
    assert set(panels) == {
        *(f"{label}: {part}" for label in ("truth", "one", "other") for part in ("amplitude", "phase (rad)")),
        "|one − truth|",
        "|other − truth|",
    }
    truth, one, other = (panels[f"{label}: phase (rad)"].images[0].get_array() for label in ("truth", "one", "other"))
    np.testing.assert_allclose(one, truth, atol=1e-3)
    assert other.mask[:5].all()
    np.testing.assert_allclose(panels["|one − truth|"].images[0].get_array(), 0, atol=1e-3)
    far = panels["|other − truth|"].images[0].get_array()
    assert far.mask[:5].all()
    assert 0.05 < far[5:].mean() < 0.15
    assert (tmp_path / "comparison.png").exists()


def test_comparison_shows_the_ring_correlations_of_compare():
    known = known_object()
    results = {"one": result(known[10:50, 5:65]), "noisy": result(known[10:50, 5:65] + 0.3 * known[:40, :60])}
    comparison = compare(results)
    panels = panels_of(plot_comparison(results, comparison=comparison))
    for part in ("amplitude", "phase"):
        lines = {line.get_label(): line for line in panels[f"FRC of the {part}"].lines}
        assert set(lines) == {"noisy", "half bit", "1/2", "1/7"}
        np.testing.assert_array_equal(lines["noisy"].get_xdata(), comparison["frequency"][1:])
        np.testing.assert_array_equal(lines["noisy"].get_ydata(), comparison["frc"].loc["noisy", part][1:])


def test_phase_is_hue_and_amplitude_is_brightness():
    numbers = np.array([[1, np.exp(2j * np.pi / 3), 0.5 * np.exp(-2j * np.pi / 3), 7, np.nan]])
    red, green, blue, bright, unseen = complex_colours(numbers, 1.0)[0]
    np.testing.assert_allclose([red, green, blue], np.diag([1, 1, 0.5]), atol=1e-12)
    np.testing.assert_array_equal(bright, red)
    np.testing.assert_array_equal(unseen, to_rgb(UNSEEN_COLOUR))


def test_complex_view_has_a_wheel_of_its_own_colours_and_lines_of_weight(object_):
    ds = result(object_)
    ds["weight"][:, 30:] = 0.02
    figure = plot_complex(ds)
    axes, wheel = figure.axes[0], figure.axes[0].child_axes[0]
    assert texts(figure) == ["10 px"]
    assert [text.get_text() for text in wheel.texts] == ["0", "π/2", "π", "-π/2"]
    colours = wheel.images[0].get_array()
    np.testing.assert_allclose(colours[100, -1], (1, 0, 0), atol=1e-6)
    np.testing.assert_allclose(colours[0, 100], complex_colours(np.array([[1j]]), 1.0)[0, 0], atol=1e-6)
    np.testing.assert_allclose(colours[0, 0], 1)
    np.testing.assert_allclose(colours[100, 100], 0, atol=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "10% of the median weight",
        "50% of the median weight",
    ]


def test_a_result_draws_itself_with_nothing_else_imported(object_, tmp_path):
    result(object_).ptycho.save(tmp_path / "object.zarr")
    code = (
        "import sys, ptychodask; ds = ptychodask.open_result(sys.argv[1]);"
        "assert 'matplotlib' not in sys.modules; print(len(ds.ptycho.plot(path=sys.argv[2]).axes))"
    )
    paths = str(tmp_path / "object.zarr"), str(tmp_path / "object.png")
    found = subprocess.run([sys.executable, "-W", "error", "-c", code, *paths], capture_output=True, text=True)
    assert found.stdout == "8\n", found.stderr
    assert (tmp_path / "object.png").stat().st_size > 10_000


def some_residuals(r_factor, deviance, **coords):
    n_patterns = len(r_factor)
    places = {"y_px": ("pattern", np.arange(n_patterns) * 2.0), "x_px": ("pattern", np.arange(n_patterns) * 3.0)}
    variables = {"r_factor": ("pattern", r_factor), "poisson_deviance": ("pattern", deviance)}
    return xr.Dataset(variables, coords={**places, **{name: ("pattern", values) for name, values in coords.items()}})


def test_residuals_are_drawn_over_the_scan_and_in_turn_and_the_worst_named():
    r_factor = np.full(30, 0.2) + 0.001 * np.arange(30)
    r_factor[[4, 17]] = 0.9, np.inf
    r_factor[5] = np.nan
    assert worst_patterns(some_residuals(r_factor, r_factor))[:3] == [17, 4, 29]
    turn = np.arange(30)[::-1]
    figure = plot_residuals(some_residuals(r_factor, np.full(30, np.nan), source_index=turn))
    over_scan, in_turn = figure.axes[:2]
    assert len(figure.axes) == 3, "no row for a deviance that is not known"
    dots, rings = over_scan.collections
    assert len(dots.get_offsets()) == 29
    np.testing.assert_array_equal(rings.get_offsets()[:2], [[51, 34], [12, 8]])
    assert over_scan.yaxis_inverted()
    assert in_turn.get_title().startswith("worst, by index in the store: 17, 4, 29, 28, ")
    worst = {line.get_label(): line for line in in_turn.lines}["the 10 worst"]
    np.testing.assert_array_equal(worst.get_xdata()[:2], turn[[17, 4]])
    np.testing.assert_allclose(worst.get_ydata()[:2], [1.05 * 0.9, 0.9])


def test_a_dark_frame_leaves_the_residuals_of_others_readable():
    r_factor = np.linspace(0.1, 0.2, 30)
    scales = []
    for highest in (0.9, 128.0):
        r_factor[4] = highest
        in_turn = plot_residuals(some_residuals(r_factor, np.full(30, np.nan))).axes[1]
        scales.append(in_turn.get_yscale())
    assert scales == ["linear", "log"]


def test_dropped_patterns_are_not_among_the_worst():
    residuals = some_residuals(np.array([0.1, 0.9, 0.2]), np.ones(3), dropped=np.array([False, True, False]))
    assert worst_patterns(residuals) == [2, 0]


def test_halves_are_shown_with_their_ring_correlation():
    known = known_object((48, 48))
    rng = np.random.default_rng(1)
    noise = 0.1 * (rng.normal(size=(2, 48, 48)) + 1j * rng.normal(size=(2, 48, 48)))
    ds = result(known, pixel_size_m=1e-8)
    ds["object_half"] = ("half", "y", "x"), (known + noise).astype(np.complex64)
    ds["weight_half"] = ("half", "y", "x"), np.ones((2, 48, 48), np.float32)
    panels = panels_of(plot_split_half(ds))
    assert set(panels) == {
        "first half: phase (rad)",
        "second half: phase (rad)",
        "|first − second|",
        "FRC of the halves",
    }
    frequency, curve = frc(*ds["object_half"].values)
    line = panels["FRC of the halves"].lines[0]
    np.testing.assert_allclose(line.get_xdata(), frequency[1:])
    np.testing.assert_allclose(line.get_ydata(), curve[1:], atol=1e-6)
    (periods,) = panels["FRC of the halves"].child_axes
    assert [label.get_text() for label in periods.get_xticklabels()] == ["20 nm", "100 nm"]


def test_plotting_leaves_pyplot_alone():
    code = "import sys, ptychodask.judging.plotting; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_what_cannot_be_shown_is_refused(object_, tmp_path):
    ds = result(object_)
    with pytest.raises(PtychodaskError, match="nothing to show"):
        plot(result(np.full((4, 4), np.nan + 0j)))
    with pytest.raises(PtychodaskError, match=r"the Dataset has no weight, uncertainty \(y, x\)"):
        plot(ds[["object"]])
    with pytest.raises(PtychodaskError, match=r"unknown figure format .*, expected one of: .*\.png"):
        plot(ds, path=tmp_path / "result.xyz")
    with pytest.raises(PtychodaskError, match="found no result"):
        plot_comparison({})
    dark = result(object_)
    dark["weight"][:, 30:] = 1e-3
    with pytest.raises(PtychodaskError, match="no well-lit pixel of the first result is seen in all results"):
        plot_comparison({"dark": dark, "other": result(object_[:, 30:], corner=(-10, 35))})
    with pytest.raises(PtychodaskError, match=r"no object_half, weight_half \(half, y, x\)"):
        plot_split_half(ds)
    with pytest.raises(PtychodaskError, match=r"plot_residuals: the Dataset has no r_factor, poisson_deviance, y_px"):
        plot_residuals(ds)
    with pytest.raises(PtychodaskError, match="no pattern has a residual"):
        plot_residuals(some_residuals(np.full(3, np.nan), np.full(3, np.nan)))


@pytest.mark.parametrize(("longest", "nice"), [(1.0, 1.0), (4.99, 2.0), (5.0, 5.0), (99.0, 50.0), (3e-8, 2e-8)])
def test_scale_bar_length_is_one_two_or_five(longest, nice):
    assert nice_length(longest) == nice


def test_lengths_are_written_with_a_prefix():
    assert [length_label(m) for m in (2e-9, 1e-6, 5e-4, 3.0)] == ["2 nm", "1 µm", "500 µm", "3 m"]


def test_local_resolution_is_drawn_where_its_windows_lie(object_):
    known = np.exp(1j * np.random.default_rng(1).standard_normal((96, 96)))
    ds = result(known.astype(np.complex64))
    ds["object_half"] = ("half", "y", "x"), np.stack([known, known]).astype(np.complex64)
    ds["weight_half"] = ("half", "y", "x"), np.ones((2, 96, 96), np.float32)
    found = resolution(ds, window_px=32, step_px=16)
    panel = panels_of(plot_split_half(ds, resolution=found))["local resolution (px), FRC at 1/7"]
    (image,) = panel.images
    assert image.get_extent() == [5 + 16 - 8, 5 + 80 + 8, -10 + 80 + 8, -10 + 16 - 8]
    np.testing.assert_array_equal(image.get_array(), 2)
    assert image.get_clim() == (2, 4), "the finest there can be, and where nothing is coarser a wide enough scale"
    found["local_resolution_px"][:] = np.nan
    assert plot_split_half(ds, resolution=found)


def drawn(shape, **options):
    return plot(result(known_object(shape), **options))


@pytest.mark.parametrize(
    ("shape", "pixel_size_m"),
    [((20, 320), None), ((320, 20), 1e-9), ((20, 6000), 1e-9), ((6000, 20), None), ((1, 90), None), ((90, 1), None)],
)
def test_elongated_objects_are_stacked_and_nothing_covers_them(shape, pixel_size_m):
    figure = drawn(shape, pixel_size_m=pixel_size_m)
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_title()]
    boxes = [axes.get_position() for axes in panels]
    is_wide = shape[1] > shape[0]
    same = [(box.x0, box.x1) if is_wide else (box.y0, box.y1) for box in boxes]
    np.testing.assert_allclose(same, [same[0]] * 4, atol=1e-3)
    for axes, box in zip(panels, boxes, strict=True):
        width, height = np.array([box.width, box.height]) * figure.get_size_inches()
        assert max(width, height) / min(width, height) <= 20.5
        assert min(width, height) > 0.25
        renderer = figure.canvas.get_renderer()
        inside = axes.get_window_extent(renderer)
        assert not any(inside.overlaps(text.get_window_extent(renderer)) for text in axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_window_extent(renderer) for label in axis.get_ticklabels() if label.get_text()]
            assert not any(one.overlaps(other) for one, other in pairwise(labels))


def test_the_stretch_of_a_very_long_object_is_in_its_label():
    assert {axes.get_ylabel() for axes in drawn((20, 6000)).axes if axes.get_title()} == {"y (px) × 15"}
    assert {axes.get_xlabel() for axes in drawn((6000, 20)).axes if axes.get_title()} == {"x (px) × 15"}
    assert {axes.get_ylabel() for axes in drawn((20, 320)).axes if axes.get_title()} == {"y (px)"}


def test_the_short_side_of_a_long_object_keeps_its_pixels(monkeypatch):
    monkeypatch.setattr("ptychodask.judging.plotting.LARGEST_PIXELS", 100)
    image = drawn((20, 320)).axes[0].images[0]
    assert image.get_array().shape == (20, 80)
    np.testing.assert_allclose(image.get_extent(), (5 - 2, 5 + 316 + 2, 9.5, -10.5))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (5, 3)])
def test_tiny_objects_have_whole_pixels_at_their_ticks(shape):
    figure = drawn(shape)
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shape == (1, 1) or all(tick % 1 == 0 for tick in ticks)
    assert len({label.get_text() for label in axes.get_xticklabels()}) == len(axes.get_xticklabels())


@pytest.mark.parametrize("shape", [(30, 200), (200, 30)])
def test_other_figures_of_elongated_objects_are_drawn(shape, tmp_path):
    ds = result(known_object(shape))
    plot_complex(ds, path=tmp_path / "complex.png")
    results = {"a": ds, "b": ds * 1}
    figure = plot_comparison(results, comparison=compare(results), path=tmp_path / "comparison.png")
    assert len(panels_of(figure)) == 7
    halves = ds.assign(
        object_half=(("half", "y", "x"), np.stack([ds["object"].values] * 2)),
        weight_half=(("half", "y", "x"), np.stack([ds["weight"].values] * 2)),
    )
    assert len(panels_of(plot_split_half(halves, path=tmp_path / "halves.png"))) == 4
