"""Models that come with the package: what they are, when they are taken, and when a scan is unlike their lessons."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from ptychodask import recipes
from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import compare
from ptychodask.judging.report import write_report
from ptychodask.models import load_model, training_range
from ptychodask.models.choose import resolve_model
from ptychodask.models.pretrained import CARD, FOLDER, is_pretrained, packaged_folder, pretrained_for, pretrained_names
from ptychodask.models.training_range import (
    QUANTITIES,
    outside_range,
    ranges_of,
    read_ranges,
    scan_quantities,
    unlike_training,
)
from ptychodask.plan import plan
from ptychodask.prediction import ModelReference
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.run import identity
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.training import train

NAMES = ["pinn-n64-c4", "pinn-n64-c1", "baseline-n64-c1"]

LARGEST_BYTES = 12 * 10**6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "scan.zarr"
    simulate(path, probe="zone_plate", n_patterns=150, dose=1e6, step_px=7.0, seed=77)
    return path


def test_the_packaged_models_are_those_of_the_recipes_and_small():
    assert pretrained_names() == NAMES
    assert sorted(NAMES) == sorted(recipes.RECIPES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < LARGEST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_model_says_what_it_is(name):
    model = load_model(f"pretrained:{name}")
    recipe = recipes.RECIPES[name].training
    assert (model.kind, model.members, model.n_pixels) == (recipe.model, recipe.grouping.members, 64)
    assert model.path == f"pretrained:{name}"
    assert model.trained_on["recipe"] == name
    assert read_ranges(model.trained_on["traits"]).keys() == QUANTITIES.keys()
    card = (packaged_folder(model.path) / CARD).read_text()
    assert model.content_hash[:12] in card
    assert "## Not for" in card
    assert not any(word in str(model.trained_on) for word in ("/tmp", "/work", "/home"))


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_model_is_not_worse_than_its_steps_alone_on_what_it_never_saw(name):
    judged = load_model(f"pretrained:{name}").trained_on["judged"]
    for figure in ("amplitude correlation", "phase correlation"):
        trained, untrained = (np.median(judged[which][figure]) for which in ("trained", "untrained"))
        # From one pattern a PINN learns next to nothing: what tells the slow phase is in the neighbours.
        assert trained >= untrained - (0.02 if name == "pinn-n64-c1" else 0), figure


def test_a_scan_without_a_model_takes_the_packaged_one(store, tmp_path):
    scan = open_scan(store)
    assert resolve_model(scan, None).path == "pretrained:pinn-n64-c4"
    assert plan(store).members == 4
    ds = reconstruct(store)
    assert ds.ptycho.records["model"]["path"] == "pretrained:pinn-n64-c4"
    assert "unlike_training" not in ds.ptycho.records["model"]
    found = compare({"packaged": ds}, truth=scan)["value"].sel({"method": "packaged", "metric": "correlation"})
    assert float(found.sel(part="amplitude")) > 0.9
    report = write_report(ds, tmp_path / "report.html").read_text()
    assert (
        "It is a model packaged with ptychodask (pinn-n64-c4), trained on 16384 patterns of 64 simulated scans"
        in report
    )


def test_a_packaged_model_travels_by_its_name(store):
    reference = ModelReference.to(load_model("pretrained:pinn-n64-c4").bind(open_scan(store)))
    assert (reference.path, reference.model) == ("pretrained:pinn-n64-c4", None)
    assert reference.load().content_hash == reference.content_hash


def test_training_goes_on_from_a_packaged_model(store, tmp_path):
    model = train(store, out=tmp_path / "t.model", initial="pretrained:pinn-n64-c4", max_minutes=0.5, epochs=1)
    packaged = load_model("pretrained:pinn-n64-c4")
    moved = [np.abs(a - b).max() for a, b in zip(model.weights, packaged.weights, strict=True)]
    assert 0 < max(moved) < 0.1


def test_an_unknown_name_is_told_with_those_that_there_are():
    with pytest.raises(PtychodaskError, match="pretrained:big: no such packaged model; available: pinn-n64-c4, pinn"):
        load_model("pretrained:big")
    assert pretrained_for(128) is None
    assert not is_pretrained("pretrained.model")


def test_a_scan_that_is_unlike_the_lessons_is_warned_of_and_the_report_says_so(tmp_path, caplog, monkeypatch):
    path = tmp_path / "sparse.zarr"
    simulate(path, probe="disc", n_patterns=40, dose=200.0, step_px=21.0, seed=3)
    with caplog.at_level(logging.WARNING):
        ds = reconstruct(path)
    assert "sparse.zarr: is outside the training range of pretrained:pinn-n64-c4" in caplog.text
    unlike = ds.ptycho.records["model"]["unlike_training"]
    assert any(line.startswith("photons in a pattern is ") for line in unlike)
    assert any(line.startswith("probe overlap, 1 - step / diameter is ") for line in unlike)
    monkeypatch.setattr(training_range, "SPACING_POSITIONS", 20)
    sparser = unlike_training(load_model("pretrained:pinn-n64-c4"), StoredScan(path))
    assert [line.split(" is ")[0] for line in sparser] == [line.split(" is ")[0] for line in unlike]
    report = write_report(ds, tmp_path / "report.html").read_text()
    assert "The scan is outside the range of the training scans: " in report


def test_ranges_hold_the_scans_that_they_are_of_and_a_little_more(store):
    scan = open_scan(store)
    ranges = ranges_of([scan])
    assert ranges.keys() == QUANTITIES.keys()
    assert scan_quantities(scan, None)["photons"] == pytest.approx(
        scan.diffraction[:].sum() / scan.n_patterns, rel=1e-6
    )
    step_px = ranges["step_px"][0]
    assert outside_range(ranges, scan, step_px) == []
    assert outside_range(ranges | {"photons": (1.0, 2.0)}, scan, step_px) == [
        f"photons in a pattern is {ranges['photons'][0]:.4g}, trained on 1 to 2"
    ]
    assert outside_range(ranges | {"step_px": (1.4 * step_px,) * 2}, scan, step_px) == []
    assert outside_range(ranges, scan, None) == []


def test_what_a_scan_is_unlike_is_no_part_of_what_a_run_must_have_in_common_with_the_one_before():
    said = {"data_hash": "d", "spec": {}, "plan": {}, "model": {"kind": "pinn", "hash": "h", "path": "a"}}
    more = said | {"model": said["model"] | {"unlike_training": ["mean step (px) is 5, trained on 9"], "path": "b"}}
    assert identity(said) == identity(more)
    assert identity(said) != identity(said | {"model": said["model"] | {"hash": "other"}})


def test_ranges_that_cannot_be_read_say_nothing():
    assert read_ranges(None) == {}
    damaged = {"photons": [1.0], "step_px": "3", "overlap": [float("nan"), 1.0], "colour": [1, 2]}
    assert read_ranges(damaged | {"probe_diameter_px": [2, 3]}) == {"probe_diameter_px": (2.0, 3.0)}


def test_a_recipe_makes_a_bundle_with_a_card(tmp_path):
    out = tmp_path / "small.model"
    model = recipes.make("baseline-n64-c1", out, minutes=0.02, n_scans=2, n_judged=1)
    assert load_model(out).content_hash == model.content_hash
    assert "| amplitude correlation |" in (out / CARD).read_text()


def test_the_scans_of_a_recipe_are_pure_under_their_seed(tmp_path):
    one, same, other = (recipes.varied_scan(tmp_path / f"{i}.zarr", seed) for i, seed in enumerate((5, 5, 6)))
    assert one.data_hash == same.data_hash != other.data_hash
