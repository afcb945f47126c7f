"""What objects show of themselves in a notebook: cheap, escaped, without colours of their own, loading nothing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from models_for_tests import LinearModel
from PIL import Image

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, Groups
from ptychodask.html import MOST_DOTS, THUMBNAIL_PX, card, curves, dots, image, png, tag
from ptychodask.models import Model, ModelSpec, Optics
from ptychodask.plan import plan
from ptychodask.reconstruction import reconstruct
from ptychodask.result import PREVIEW_PX, make_dataset
from ptychodask.scan import PATTERNS_SHOWN, Scan
from ptychodask.simulate import simulate

EVIL = "<script>alert('&')</script>\"'"

N = 16


class Shown(HTMLParser):
    """Elements and text of what a notebook shows; complains about elements that are not closed."""

    def __init__(self, shown):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(shown)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def pictures(self):
        """Pixels of each image, uint8 (y, x, 2): brightness and opacity."""
        sources = [attributes["src"].partition("base64,")[2] for tag, attributes in self.elements if tag == "img"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


class CountedPatterns:
    """Patterns that count how many of them were read."""

    def __init__(self, patterns):
        self.patterns, self.n_read = patterns, 0
        self.shape, self.dtype = patterns.shape, patterns.dtype

    def __getitem__(self, index):
        found = self.patterns[index]
        self.n_read += len(found)
        return found


def make_scan(n_patterns=40, **changes):
    fields = {
        "diffraction": CountedPatterns(np.full((n_patterns, N, N), 4, np.uint16)),
        "position_yx_px": np.random.default_rng(0).uniform(0, 90, (n_patterns, 2)),
        "probe": np.ones((1, N, N), np.complex64),
        "domain": "counts",
        "normalization": 0.5,
    }
    return Scan(**(fields | changes))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("display") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", progress=False)
    return path


def make_model(**changes):
    spec = ModelSpec(n_pixels=N, members=1, levels=2)
    return Model(spec, [np.zeros((3, 5), np.float32)], Optics.of(make_scan()), content_hash="abc", **changes)


def result(shape, **changes):
    ones = np.ones(shape)
    return make_dataset(ones, ones, ones, ones, (0, 0), pixel_size_m=None, attributes={}, **changes)


def test_a_picture_is_read_by_another_library_as_it_was_written():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 2), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_an_image_runs_from_black_to_white_and_is_clear_where_nothing_was_seen():
    values = np.linspace(-3.0, 5.0, 64).reshape(8, 8)
    values[2, 3] = np.nan
    (shown,) = Shown(image(values, "a")).pictures()
    assert (shown[..., 0].min(), shown[..., 0].max()) == (0, 255)
    assert shown[2, 3, 1] == 0
    assert np.count_nonzero(shown[..., 1] == 255) == 63
    assert (np.diff(shown[..., 0].ravel()[20:].astype(int)) >= 0).all()


@pytest.mark.parametrize("values", [np.full((4, 4), np.nan), np.full((4, 4), 2.0)])
def test_an_image_without_contrast_is_black(values):
    (shown,) = Shown(image(values, "a")).pictures()
    assert (shown[..., 0] == 0).all()


def test_large_images_and_maps_are_thinned():
    (shown,) = Shown(image(np.random.default_rng(0).random((1000, 300)), "a")).pictures()
    assert max(shown.shape) <= THUMBNAIL_PX
    drawn = str(dots(np.random.default_rng(0).random((5000, 2)), "a"))
    assert MOST_DOTS / 2 < drawn.count("M") <= MOST_DOTS


def test_a_map_has_its_dots_where_the_positions_are():
    drawn = str(dots(np.array([[10.0, 100.0], [30.0, 140.0], [20.0, 120.0]]), "a"))
    found = np.array([[float(value) for value in pair] for pair in re.findall(r"M([\d.]+) ([\d.]+)h0", drawn)])
    # (x, y) from the upper left, 96 units to the longer side, 2 of margin.
    np.testing.assert_allclose(found, [[2, 2], [98, 50], [50, 26]])


def test_positions_on_one_spot_or_line_make_a_map():
    for positions in (np.zeros((3, 2)), np.array([[0.0, 0.0], [5.0, 0.0]])):
        assert "nan" not in dots(positions, "a")


@pytest.mark.parametrize("values", [[3.0], [np.nan, 1.0, -1.0, 2.0], [np.nan], [1.0, 1.0]])
def test_any_course_of_a_loss_makes_a_curve(values):
    drawn = str(curves({"loss": values}, "a"))
    assert "nan" not in re.search(r' d="([^"]*)"', drawn)[1]


def test_what_comes_from_files_is_escaped():
    for shown in (
        card(
            EVIL, {EVIL: EVIL}, [image(np.ones((2, 2)), EVIL), dots(np.zeros((1, 2)), EVIL), curves({EVIL: [1]}, EVIL)]
        ),
        make_scan(store=EVIL)._repr_html_(),
        make_model(path=EVIL)._repr_html_(),
        Groups(np.zeros((3, 4), np.int32), GroupingSpec(), EVIL)._repr_html_(),
        tag("p", EVIL, title=EVIL),
    ):
        assert {name for name, _ in Shown(shown).elements}.isdisjoint({"script"})
        assert EVIL in Shown(shown).text


def test_a_scan_shows_itself_by_a_few_patterns():
    scan = make_scan(n_patterns=500)
    shown = Shown(scan._repr_html_())
    assert 0 < scan.diffraction.n_read <= PATTERNS_SHOWN
    assert "500 of 16 x 16, counts" in shown.text
    assert len(shown.pictures()) == 2


def test_a_scan_whose_patterns_are_damaged_says_so_and_shows_the_rest():
    class Damaged(CountedPatterns):
        def __getitem__(self, index):
            raise PtychodaskError("scan.zarr: diffraction is damaged")

    scan = make_scan(diffraction=Damaged(np.ones((40, N, N), np.uint16)))
    shown = Shown(scan._repr_html_())
    assert "scan.zarr: diffraction is damaged" in shown.text
    assert len(shown.pictures()) == 1


def test_everything_is_one_line_of_text(store):
    groups = Groups(np.zeros((60, 4), np.int32), GroupingSpec(), "c4")
    ds = reconstruct(store, LinearModel(n_pixels=N), progress=False)
    expected = {
        make_scan(store="a.zarr"): "Scan(a.zarr: 40 patterns of 16 x 16, counts)",
        groups: "Groups(c4: 60 groups of 4)",
        make_model(path="a.model"): "Model(a.model: pinn, N = 16, C = 1, one patch per member, 15 weights)",
        ds.ptycho.preview(): f"Preview(all {ds.sizes['y']} x {ds.sizes['x']} px)",
    }
    assert {thing: repr(thing) for thing in expected} == expected
    assert re.fullmatch(r"Plan\(.*scan\.zarr: 60 groups in \d+ chunks, 1 tiles over .*\)", repr(plan(store)))


def test_a_plan_shows_what_it_prints(store):
    found = plan(store)
    shown = Shown(found._repr_html_()).text
    for line in str(found).splitlines():
        name, value = line.split(maxsplit=1)
        assert name in shown
        assert value in shown


def test_a_model_shows_the_course_of_its_training():
    history = [{"seconds": 2.0 * k, "loss": 1 / k, "held_out_loss": 2 / k} for k in range(1, 6)]
    shown = Shown(make_model(history=history)._repr_html_())
    assert "5 in 10 s" in shown.text
    assert "held out 0.4; trained on 0.2 (dashed)" in shown.text
    assert [name for name, _ in Shown(make_model()._repr_html_()).elements].count("svg") == 0


def test_a_preview_reads_the_middle_alone():
    ds = result((PREVIEW_PX + 40, PREVIEW_PX + 10))
    ds["object"][:] = 0
    middle = ds["object"][20 : PREVIEW_PX + 20, 5 : PREVIEW_PX + 5]
    middle[:] = np.exp(1j * np.linspace(-1, 1, PREVIEW_PX))
    preview = ds.ptycho.preview()
    np.testing.assert_array_equal(preview.object, middle)
    assert repr(preview) == "Preview(the middle 1,024 x 1,024 px of 1,064 x 1,034 px)"
    assert len(Shown(preview._repr_html_()).pictures()) == 2


def test_a_preview_shows_each_method():
    one = result((6, 8))
    both = one.expand_dims(network=["PINN", "Baseline"])
    shown = Shown(both.ptycho.preview()._repr_html_())
    assert "PINN: amplitude" in shown.text
    assert "Baseline: phase" in shown.text
    assert len(shown.pictures()) == 4


def test_a_preview_of_something_else_is_refused():
    with pytest.raises(PtychodaskError, match=r"expected object \(y, x\)"):
        result((6, 8)).drop_vars("object").ptycho.preview()
    with pytest.raises(PtychodaskError, match=r"expected object \(y, x\)"):
        result((6, 8)).isel(y=0).ptycho.preview()


def test_nothing_is_loaded_and_no_colour_is_set(store):
    ds = reconstruct(store, LinearModel(n_pixels=N), progress=False)
    history = [{"seconds": 1.0, "loss": 1.0, "held_out_loss": 1.0}]
    for thing in (make_scan(), plan(store), make_model(history=history), ds.ptycho.preview()):
        for name, attributes in Shown(thing._repr_html_()).elements:
            assert name not in {"script", "link", "style", "iframe"}
            assert attributes.get("src", "data:").startswith("data:")
            assert "href" not in attributes
            assert not re.search(r"background|color: (?!inherit)", attributes.get("style", ""))
            assert attributes.get("stroke", "currentColor") == "currentColor"
