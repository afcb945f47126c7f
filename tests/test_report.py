"""A report says what is known, in one file that no browser leaves and nothing from a file can take over."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from ptychodask import cli
from ptychodask.errors import PtychodaskError
from ptychodask.judging.report import write_report
from ptychodask.judging.report.content import check_report_path
from ptychodask.reconstruction.iterative import reconstruct_iterative
from ptychodask.result import make_dataset, open_result
from ptychodask.scan import Truth
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

EVIL = "$\\frac{<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'&amp;"

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Elements of a page and what they hold; complains about elements that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A simulated scan with truth, an iterative result of it and its report with everything."""
    folder = tmp_path_factory.mktemp("report")
    simulate(folder / "scan.zarr", n_pixels=16, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate")
    ds = reconstruct_iterative(folder / "scan.zarr", n_sweeps=3, progress=False)
    ds.ptycho.save(folder / "scan.object.zarr")
    (ds * 1).assign_attrs(ds.attrs).ptycho.save(folder / "again.object.zarr")
    write_report(
        folder / "scan.object.zarr",
        folder / "report.html",
        scan=folder / "scan.zarr",
        others=[("Again", folder / "again.object.zarr")],
        progress=False,
    )
    return folder


@pytest.fixture
def ds():
    """A result whose every name and attribute tries to be more than text."""
    rng = np.random.default_rng(0)
    object_ = (rng.uniform(0.5, 1, (40, 40)) * np.exp(1j * rng.uniform(-1, 1, (40, 40)))).astype(np.complex64)
    ones = np.ones(object_.shape)
    attributes = {
        "store": f"/data/{EVIL}.zarr",
        "data_hash": EVIL,
        "model": {"kind": EVIL, "hash": EVIL, "path": EVIL},
        "plan": {"n_groups": EVIL, EVIL: [EVIL, {EVIL: None}]},
        "polish": {"sweeps": EVIL, "r_factor": [EVIL, EVIL]},
        "refinement": {
            "slow_phase": {"kept": True, "n_nodes": EVIL, "n_patterns": EVIL},
            "stages": [{"stage": f"{EVIL}{k}", "misfit": 2.0 - k, "r_factor": EVIL, "kept": True} for k in range(2)],
            "n_judges": 3,
            "measure": EVIL,
        },
        "versions": {"ptychodask": EVIL},
        EVIL: EVIL,
    }
    return make_dataset(object_, ones, ones * 0.1, ones, (0, 0), pixel_size_m=2e-8, attributes=attributes)


def test_report_holds_summary_figures_metrics_methods_and_provenance(folder):
    page = page_of(folder / "report.html")
    sections = [attributes["id"] for attributes in page.tags("section")]
    assert sections == ["summary", "object", "refinement", "comparison", "patterns", "methods", "provenance"]
    assert [attributes["href"] for attributes in page.tags("a")] == [f"#{name}" for name in sections]
    pictures = page.tags("img")
    assert len(pictures) == 5
    for picture in pictures:
        kind, data = picture["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(picture["alt"]) > 40
    for fact in (
        "amplitude: SSIM",
        "R-factor of 60 patterns",
        "Again",
        open_scan(folder / "scan.zarr").data_hash,
        "kind iterative",
    ):
        assert fact in page.text


def test_methods_say_what_was_done_with_which_numbers_and_what_is_not_known(folder):
    text = page_of(folder / "report.html").text
    methods = text[text.rindex("Methods") : text.rindex("Provenance")]
    for sentence in (
        "The scan consists of 60 diffraction patterns of 16 × 16 pixels, stored as photon counts",
        "It was simulated with the object “lines”, the probe “zone_plate”, 100,000 photons per pattern and a step",
        "The object was reconstructed iteratively, without a network, from a flat object.",
        "after removal of a global phase offset and a linear phase ramp.",
        "The data do not determine a global phase offset and a linear phase ramp.",
    ):
        assert sentence in methods
    assert "accuracy of the reconstruction is unknown" not in methods


def test_report_shows_the_stages_of_a_refinement(folder, tmp_path):
    ds = open_result(folder / "scan.object.zarr").load()
    scan = open_scan(folder / "scan.zarr")
    stages = [
        {"stage": "stitched", "misfit": 5000.0, "r_factor": 0.2, "kept": True},
        {"stage": "slow_phase", "misfit": 4000.0, "r_factor": None, "kept": True},
        {"stage": "sweep 1", "misfit": 4500.0, "r_factor": 0.1, "kept": False},
    ]
    slow_phase = {"kept": True, "n_nodes": 9, "n_patterns": 50}
    measured = {"slow_phase": slow_phase, "stages": stages, "n_judges": 4, "measure": "poisson deviance"}
    ds.attrs |= {"model": {"kind": "pinn"}, "refinement": measured}
    ds["position_refined_yx_px"] = ("pattern", "yx"), scan.position_yx_px + 0.5
    page = page_of(write_report(ds, tmp_path / "report.html", scan=scan, progress=False))
    assert [attributes["id"] for attributes in page.tags("section")][:3] == ["summary", "object", "refinement"]
    for text in (
        "stage Poisson deviance of 4 judges relative R",
        "slow phase 4000 0.8000",
        "sweep 1 4500 0.9000 0.1000 rejected",
        "Refinement slow phase",
        "corrected by a least-squares fit of 9 coefficients to 50 patterns.",
        "4 patterns that took no part judged the refinement: their Poisson deviance fell to 80.0% of that",
    ):
        assert text in page.text
    assert "polished" not in page.text


def test_report_gives_the_reason_why_refinement_was_left_out(ds, tmp_path):
    left_out = ds.assign_attrs(refinement={"left_out": "the store has no probe"}, polish=None)
    page = page_of(write_report(left_out, tmp_path / "report.html", progress=False))
    assert "Refinement was left out: the store has no probe." in page.text
    assert "It was not refined: the store has no probe." in page.text


def test_methods_without_a_scan_say_so(ds, tmp_path):
    text = page_of(write_report(ds, tmp_path / "report.html")).text
    assert "the measurement (no scan was passed to this report)" in text
    assert "the training of the network (no bundle at the recorded path" in text
    assert "No known object was available, so the accuracy of the reconstruction is unknown." in text


def test_training_is_told_where_the_bundle_is_the_one_that_was_used(ds, tmp_path):
    bundle = tmp_path / "a.model"
    bundle.mkdir()
    description = {
        "format": "ptychodask-model",
        "format_version": 1,
        "content_hash": "abc",
        "trained_on": {"store": "lesson.zarr", "data_hash": "other", "n_training": 90, "n_held_out": 10},
    }
    (bundle / "model.json").write_text(json.dumps(description))
    (bundle / "history.csv").write_text("epoch,held_out_loss\n1,0.5\n2,0.25\n")
    ds.attrs["model"] = {"kind": "baseline", "hash": "abc", "path": str(bundle)}
    text = page_of(write_report(ds, tmp_path / "report.html")).text
    assert (
        "It was trained on 90 patterns of another scan (lesson.zarr), with 10 held-out patterns, for 2 epochs; the "
        "lowest held-out loss was 0.2500." in text
    )
    ds.attrs["model"]["hash"] = "another"
    assert "It was trained on" not in page_of(write_report(ds, tmp_path / "report.html")).text


def test_of_several_methods_the_first_is_told_and_the_others_stand_beside_it(ds, tmp_path):
    both = xr.concat([ds, ds * 1.1], "network").assign_coords(network=["pinn", "baseline"])
    plan = {"n_groups": 12, "n_patterns": 20, "groups": "c4", "n_chunks": 3, "crop": 8, "window": "cosine"}
    both.attrs = {
        "networks": ["pinn", "baseline"],
        "model": {name: {"kind": name, "hash": f"{name}-hash", "path": "gone"} for name in ("pinn", "baseline")},
        "plan": {"pinn": plan, "baseline": plan | {"n_groups": 99}},
        "spec": {"drop": [3, 7]},
    }
    text = page_of(write_report(both, tmp_path / "report.html")).text
    assert "predicted by a physics-informed network" in text
    assert (
        "The model was applied to 12 groups drawn from 20 patterns (group table c4), in 3 chunks; 2 patterns "
        "were excluded." in text
    )
    assert "PtychoPINN Baseline amplitude: correlation" in text
    assert "99" not in text[text.rindex("Methods") : text.rindex("Provenance")]


def test_what_comes_from_a_file_stays_text(ds, tmp_path):
    path = write_report(ds, tmp_path / "report.html", label=EVIL, others=[(f"other {EVIL}", ds)])
    page = page_of(path)
    assert page.tags("script") == []
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.tags("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert f"/data/{EVIL}.zarr" in html.unescape(path.read_text())


def test_policy_allows_its_own_style_and_pictures_alone(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = re.findall(r'content="(default-src[^"]*)"', text)
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "http://" not in text
    assert "https://" not in text


def test_patterns_that_a_result_was_made_without_do_not_count(folder, tmp_path):
    ds = reconstruct_iterative(folder / "scan.zarr", n_sweeps=1, exclude=[3, 7], progress=False)
    ds.attrs["spec"] = {"drop": [3, 7]}
    text = page_of(write_report(ds, tmp_path / "report.html", scan=folder / "scan.zarr", progress=False)).text
    assert "over 58 patterns. Outliers, more than 8 standard deviations above the median:" in text
    ds.attrs["spec"] = {"drop": ["3"]}
    with pytest.raises(PtychodaskError, match=r"records \['3'\] as dropped, expected indices of patterns"):
        write_report(ds, tmp_path / "report.html", scan=folder / "scan.zarr", progress=False)


def test_a_truth_of_its_own_is_compared_with(ds, tmp_path):
    truth = Truth(ds["object"].values, (0.0, 0.0))
    text = page_of(write_report(ds, tmp_path / "report.html", label="mine", truth=truth)).text
    assert "For the amplitude of “mine” the Pearson correlation is 1.000" in text


def test_halves_get_a_picture(ds, tmp_path):
    ds["object_half"] = ("half", "y", "x"), np.stack([ds["object"].values] * 2)
    ds["weight_half"] = ("half", "y", "x"), np.stack([ds["weight"].values] * 2)
    assert "each stitched from one half of the patches" in page_of(write_report(ds, tmp_path / "report.html")).text


def test_only_a_report_is_replaced_and_nothing_half_written_is_left(ds, folder, tmp_path):
    path = tmp_path / "report.html"
    write_report(ds, path)
    write_report(ds, path)
    path.write_text("<html>my notes</html>")
    with pytest.raises(PtychodaskError, match=r"report\.html: it exists and is not a report of ptychodask"):
        write_report(ds, path)
    assert path.read_text() == "<html>my notes</html>"
    with pytest.raises(PtychodaskError, match=r"found suffix '\.pdf', expected \.html"):
        check_report_path(tmp_path / "report.pdf")
    with pytest.raises(PtychodaskError, match="no does not exist"):
        check_report_path(tmp_path / "no" / "report.html")
    with pytest.raises(PtychodaskError, match="pass the scan that it was made from"):
        write_report(ds, tmp_path / "other.html", scan=folder / "scan.zarr")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_command_writes_it_beside_the_result(folder, monkeypatch, capsys):
    arguments = ["report", f"Mine={folder / 'scan.object.zarr'}", "--scan", folder / "scan.zarr", "-q"]
    monkeypatch.setattr("sys.argv", ["ptychodask", *map(str, [*arguments, "--compare", folder / "again.object.zarr"])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert re.fullmatch(r".*scan\.object\.html: \d\.\d MB\n", capsys.readouterr().out)
    text = page_of(folder / "scan.object.html").text
    assert text.startswith("Mine Mine Report of a ptychographic reconstruction.")
    assert "Mine Iterative amplitude: correlation" in text
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "scan.object.html exists already; pass --overwrite" in capsys.readouterr().err


def test_a_browser_shows_it_without_a_complaint_and_asks_for_nothing(ds, folder, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    write_report(ds, tmp_path / "evil.html", label=EVIL, others=[(f"other {EVIL}", ds)])
    with playwright.sync_playwright() as engine:
        browser = launched(engine, playwright.Error)
        for path in (folder / "report.html", tmp_path / "evil.html"):
            page = browser.new_page(viewport={"width": 1000, "height": 800})
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(path.as_uri())
            page.wait_for_load_state("networkidle")
            assert said == []
            assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
            assert page.title() != "taken"
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 500)")
            assert page.evaluate("getComputedStyle(document.body).maxWidth") == "960px"
            page.set_viewport_size({"width": 390, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()


def launched(engine, error):
    """Chromium as playwright brings it, or as the system has it; the test is skipped where there is neither."""
    tried = []
    for options in ({}, {"executable_path": "/usr/bin/chromium"}):
        try:
            return engine.chromium.launch(args=["--no-sandbox"], **options)
        except error as reason:
            tried.append(str(reason).splitlines()[0])
    pytest.skip(f"needs Chromium, from playwright or at /usr/bin/chromium ({'; '.join(tried)})")
