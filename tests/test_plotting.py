"""Figures of results: every panel there, the right way up, in the right units."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ptychodask.plotting import length_label, nice_length, plot, plot_comparison
from ptychodask.result import make_dataset
from ptychodask.scan import PtychodaskError, Truth


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
    monkeypatch.setattr("ptychodask.plotting.LARGEST_PIXELS", 20)
    image = plot(result(object_)).axes[0].images[0]
    assert image.get_array().shape == (14, 20)


def test_comparison_shows_truth_and_results_without_their_gauge(object_, tmp_path):
    rng = np.random.default_rng(0)
    known = (rng.uniform(0.5, 1, (60, 80)) * np.exp(1j * rng.uniform(-0.5, 0.5, (60, 80)))).astype(np.complex64)
    y, x = np.indices((40, 60))
    turned = known[10:50, 5:65] * np.exp(1j * (2 + 0.01 * y - 0.02 * x))
    figure = plot_comparison(
        {"one": result(turned), "other": result(known[15:55, 5:65], corner=(-5, 5))},
        Truth(known, (-20.0, 0.0)),
        path=tmp_path / "comparison.png",
    )
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        *(f"{label}: amplitude" for label in ("truth", "one", "other")),
        *(f"{label}: phase (rad)" for label in ("truth", "one", "other")),
    ]
    truth, one, other = (axes.images[0].get_array() for axes in panels[3:])
    np.testing.assert_allclose(one, truth, atol=1e-3)
    np.testing.assert_allclose(other[5:], truth[5:], atol=1e-3)
    assert other.mask[:5].all()
    assert (tmp_path / "comparison.png").exists()


def test_plotting_leaves_pyplot_alone():
    code = "import sys, ptychodask.plotting; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_what_cannot_be_shown_is_refused(object_, tmp_path):
    ds = result(object_)
    with pytest.raises(PtychodaskError, match="nothing to show"):
        plot(result(np.full((4, 4), np.nan + 0j)))
    with pytest.raises(PtychodaskError, match=r"the Dataset has no weight, uncertainty \(y, x\)"):
        plot(ds[["object"]])
    with pytest.raises(PtychodaskError, match=r"is no name of a figure; end it in one of: .*\.png"):
        plot(ds, path=tmp_path / "result.xyz")
    with pytest.raises(PtychodaskError, match="found no result"):
        plot_comparison({})


@pytest.mark.parametrize(("longest", "nice"), [(1.0, 1.0), (4.99, 2.0), (5.0, 5.0), (99.0, 50.0), (3e-8, 2e-8)])
def test_scale_bar_length_is_one_two_or_five(longest, nice):
    assert nice_length(longest) == nice


def test_lengths_are_written_with_a_prefix():
    assert [length_label(m) for m in (2e-9, 1e-6, 5e-4, 3.0)] == ["2 nm", "1 µm", "500 µm", "3 m"]
