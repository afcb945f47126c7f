"""Figures show themselves at the end of a cell, once, in the notebooks of the repository too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ptychodask.judging.plotting import plot
from ptychodask.result import make_dataset

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))

FIGURES = ("ptychodask.plot", ".preview()")
"""Calls whose value is a picture; a cell that ends in one must show it."""

PNG = b"\x89PNG\r\n\x1a\n"

FIGURE = """
import numpy as np
from ptychodask.judging.plotting import plot
from ptychodask.result import make_dataset

ones = np.ones((8, 9))
plot(make_dataset(np.exp(1j * ones), ones, ones, ones, (0, 0), pixel_size_m=None, attributes={}))"""

SETTINGS = {
    "no backend": "",
    "inline": "%matplotlib inline",
    "inline, crisp": "%matplotlib inline\n%config InlineBackend.figure_formats = ['retina']",
    "widget": "%matplotlib widget",
    "svg": "import matplotlib; matplotlib.use('svg')",
    "webagg": "import matplotlib; matplotlib.use('webagg')",
}
"""Code that a user ran before."""


def test_a_figure_is_a_picture_to_any_front_end():
    ones = np.ones((8, 9))
    figure = plot(make_dataset(ones + 0j, ones, ones, ones, (0, 0), pixel_size_m=None, attributes={}))
    assert figure._repr_png_().startswith(PNG)
    assert figure._repr_html_() is None


@pytest.mark.long
@pytest.mark.parametrize("code", SETTINGS.values(), ids=SETTINGS)
def test_a_figure_shows_itself_once_with_any_backend(code):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    if "widget" in code:
        pytest.importorskip("ipympl")
    cells = [nbformat.v4.new_code_cell(source) for source in (f"{code}\nimport matplotlib.pyplot", FIGURE)]
    notebook = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells)).execute()
    shown = [output["data"] for output in notebook["cells"][1]["outputs"] if "data" in output]
    assert ["image/png" in data for data in shown] == [True]


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request, tmp_path_factory):
    """Cells of an executed notebook: that in the folder ``$EXECUTED_NOTEBOOKS``, else it is executed here."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    if folder := os.environ.get("EXECUTED_NOTEBOOKS"):
        (path,) = Path(folder).rglob(request.param.name)
        return nbformat.read(path, 4)["cells"]
    notebook = nbformat.read(request.param, 4)
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp(request.param.stem))}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook["cells"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_each_cell_that_plots_has_its_picture_once(cells):
    plots = 0
    for cell in cells:
        last = cell["source"].strip().splitlines()[-1:]
        if cell["cell_type"] != "code" or not any(call in "".join(last) for call in FIGURES):
            continue
        outputs = [output["data"] for output in cell["outputs"] if "data" in output]
        pictures = [data for data in outputs if "image/png" in data or "<img" in "".join(data.get("text/html", ""))]
        assert len(pictures) == 1, f"{len(pictures)} pictures of: {cell['source']}"
        plots += 1
    assert plots


@pytest.mark.long
def test_notebooks_print_no_start_up_notes(cells):
    texts = [output.get("text", "") for cell in cells for output in cell.get("outputs", ())]
    noise = [text for text in texts for word in ("tensorflow/", "oneDNN", "cuda", "WARNING:") if word in text]
    assert not noise


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_write_into_folders_of_their_own(path):
    text = path.read_text()
    assert 'Path(\\"' in text
    assert "folder" in text
    assert '(\\"scan.zarr' not in text, "a reader may have a scan of that name beside the notebook"
