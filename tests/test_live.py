"""The live picture: what it shows, where, how often, and that no run depends on it."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from models_for_tests import LinearModel

from ptychodask.errors import PtychodaskError
from ptychodask.reconstruction import live, reconstruct
from ptychodask.reconstruction.live import LivePicture, Screen, cell_size, coarse_part
from ptychodask.simulate import simulate

pytestmark = pytest.mark.usefixtures("empty_caches")

FIELDS = {"groups_per_chunk": 30, "batch_size": 10, "tile": 32}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("live") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=150, step_px=3.0, seed=1)
    return path


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of a small object are reduced too, and each is shown."""
    monkeypatch.setattr(live, "ACROSS_PX", 24)
    monkeypatch.setattr(live, "REFRESH_S", 0.0)


def reduced(object, step):
    """Means over cells by a loop."""
    cells = [
        [object[..., y : y + step, x : x + step] for x in range(0, object.shape[-1], step)]
        for y in range(0, object.shape[-2], step)
    ]
    return np.array([[mean_modulus(cell[np.isfinite(cell)]) for cell in row] for row in cells])


def mean_modulus(seen):
    return np.abs(seen).mean() if seen.size else np.nan


@pytest.mark.parametrize("step", [1, 2, 8])
def test_parts_make_the_picture_of_the_whole(step):
    rng = np.random.default_rng(0)
    whole = (rng.normal(size=(40, 56)) + 1j * rng.normal(size=(40, 56))).astype(np.complex64)
    whole[:9, :17] = np.nan
    parts = [
        coarse_part(whole[y : y + 16, x : x + 16], (y, x), step) for y in range(0, 40, 16) for x in range(0, 56, 16)
    ]
    found = np.empty((-(-40 // step), -(-56 // step)))
    for part in parts:
        y, x = part.start_yx
        found[y : y + part.amplitude.shape[0], x : x + part.amplitude.shape[1]] = part.amplitude
    np.testing.assert_allclose(found, reduced(whole, step), rtol=1e-6)


def test_a_picture_stays_within_its_size():
    assert all(-(-side // cell_size((side, 3))) <= live.ACROSS_PX for side in (1, 511, 512, 513, 10**6))


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("polish", [0, 1])
def test_it_fills_in_and_ends_with_the_object(store, client, coarse, tmp_path, written, polish):
    pictures = []
    out = tmp_path / "object.zarr" if written else None
    ds = reconstruct(store, LinearModel(), out=out, client=client, live=pictures.append, polish=polish, **FIELDS)
    seen = [int(np.isfinite(picture["amplitude"].values).sum()) for picture in pictures]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    last, step = pictures[-1], pictures[-1].attrs["step_px"]
    assert max(last["amplitude"].shape) <= 24
    np.testing.assert_allclose(last["amplitude"].values, reduced(ds["object"].values, step), rtol=1e-5)
    assert last["y"].values[0] == ds["y"].values[0] + (step - 1) / 2
    assert last.attrs["tiles_done"] == last.attrs["n_tiles"]


def test_methods_have_a_picture_each(store, client, coarse):
    pictures = []
    models = {"a": LinearModel(), "b": LinearModel(content_hash="other")}
    ds = reconstruct(store, models, client=client, live=pictures.append, **FIELDS)
    assert pictures[-1]["amplitude"].dims == ("network", "y", "x")
    expected = reduced(ds["object"].sel(network="b").values, pictures[-1].attrs["step_px"])
    np.testing.assert_allclose(pictures[-1]["amplitude"].sel(network="b").values, expected, rtol=1e-5)


def test_it_is_shown_twice_a_second_at_most(store, monkeypatch):
    clock = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    shown = []
    screen = Screen(shown.append)
    for number in range(100):
        screen.show(lambda number=number: number)
    # The clock goes on with each question: one picture takes 0.1 s more than those that are not shown.
    assert shown[0] == 0
    assert len(shown) <= 100 * 0.1 * 1.1 / live.REFRESH_S + 1
    assert screen.show(lambda: "last", last=True)
    assert shown[-1] == "last"


def test_an_error_of_the_users_function_costs_the_picture_alone(store, client, told):
    def fails(picture):
        raise ValueError("no such window\nand its long story")

    ds = reconstruct(store, LinearModel(), client=client, live=fails, **FIELDS)
    expected = reconstruct(store, LinearModel(), client=client, **FIELDS)
    np.testing.assert_array_equal(ds["object"].values, expected["object"].values)
    assert [text for text in told if text.startswith("live:")] == [
        "live: a picture could not be shown (ValueError: no such window); the run continues without pictures"
    ]


def test_a_png_is_replaced_and_shows_the_amplitude(store, client, coarse, tmp_path):
    path = tmp_path / "live.png"
    pictures = []

    def both(picture):
        pictures.append(picture)
        Screen(path).show(lambda: picture)

    reconstruct(store, LinearModel(), client=client, live=both, **FIELDS)
    grey = grey_of(path.read_bytes())
    assert grey.shape[:2] == pictures[-1]["amplitude"].shape
    seen = np.isfinite(pictures[-1]["amplitude"].values)
    np.testing.assert_array_equal(grey[..., 1] == 255, seen)
    assert list(tmp_path.iterdir()) == [path]


def grey_of(content):
    """Brightness and opacity of a PNG without filters: uint8 (y, x, 2)."""
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    start = content.index(b"IDAT")
    packed = content[start + 4 : start + 4 + int.from_bytes(content[start - 4 : start])]
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 2 * width)
    return rows[:, 1:].reshape(height, width, 2)


def test_neither_result_nor_ledger_knows_of_it(store, client, tmp_path):
    first = reconstruct(store, LinearModel(), out=tmp_path / "a.zarr", client=client, live=lambda ds: None, **FIELDS)
    assert "live" not in first.ptycho.records["spec"]
    again = reconstruct(store, LinearModel(), out=tmp_path / "a.zarr", client=client, resume=True, **FIELDS)
    assert json.dumps(again.ptycho.records["spec"]) == json.dumps(first.ptycho.records["spec"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "this is none; pass the path of a PNG"),
        ("live.jpg", r"live.jpg: live= must be the path of a .png"),
        ("no/such/folder/live.png", "in an existing folder"),
        (3, "live is 3, expected True"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_runs(store, client, value, message):
    model = LinearModel()
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(store, model, client=client, live=value)
    assert not model.calls


def test_a_lazy_result_has_no_picture(store):
    with pytest.raises(PtychodaskError, match="nothing to show live"):
        reconstruct(store, LinearModel(), compute=False, live=lambda ds: None)


def test_a_stopped_run_shows_what_it_had(store, client, coarse, tmp_path, monkeypatch):
    out, whole = tmp_path / "object.zarr", []
    seen = []

    def stops(picture):
        if picture.attrs["tiles_done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(store, LinearModel(), out=out, client=client, live=stops, **FIELDS)
    monkeypatch.setattr(LivePicture, "finish", lambda self: whole.append(self._dataset()))
    ds = reconstruct(store, LinearModel(), out=out, client=client, live=seen.append, resume=True, **FIELDS)
    assert seen[0].attrs["tiles_done"] == 1
    expected = reduced(ds["object"].values, whole[0].attrs["step_px"])
    np.testing.assert_allclose(whole[0]["amplitude"].values, expected, rtol=1e-5)


NOTEBOOK = """
import sys
sys.path[:0] = {folders!r}
from models_for_tests import LinearModel
from ptychodask.reconstruction import live, reconstruct
live.ACROSS_PX, live.REFRESH_S = 24, 0.0
ds = reconstruct({store!r}, LinearModel(), live=True, progress=False, groups_per_chunk=30, batch_size=10, tile=32)
"""


def test_a_notebook_shows_one_picture_that_is_replaced(store):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    from pathlib import Path

    import ptychodask

    here = Path(__file__).parent
    folders = [str(here), str(Path(ptychodask.__file__).parents[1])]
    source = NOTEBOOK.format(folders=folders, store=str(store))
    updates = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] in ("display_data", "update_display_data"):
                updates.append(message["content"])
            return super().process_message(message, cell, cell_index)

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    Client(book, kernel_name="python3", timeout=120).execute()
    pictures = [one for one in updates if "image/png" in one["data"]]
    assert len(pictures) > 2
    assert len({one["transient"]["display_id"] for one in pictures}) == 1
    shown = [out for out in book.cells[0].outputs if "image/png" in out.get("data", {})]
    assert len(shown) == 1
    assert shown[0]["data"]["image/png"] == pictures[-1]["data"]["image/png"]
