"""Studies: every cell of the matrix once, whatever stopped it; and what is refused before anything runs."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from distributed.scheduler import KilledWorker

from ptychodask import study as module
from ptychodask.cluster.clients import in_process_client
from ptychodask.errors import PtychodaskError
from ptychodask.judging.compare import compare
from ptychodask.judging.plotting import plot_contact_sheet, plot_study
from ptychodask.probes import probe_diameter_px
from ptychodask.simulate import scaled_probe, simulate
from ptychodask.study import StudySpec, cells_of, read_study, run_study, steps_px, to_markdown

TINY = StudySpec(
    dose=(1e4, 1e6),
    overlap=(0.75,),
    gridsize=(1,),
    simulate={"n_pixels": 32, "n_patterns": 40, "probe": "zone_plate"},
    train={"epochs": 1, "levels": 1, "projections_before": 1, "projections_after": 0, "validation_fraction": 0.2},
)

LOGICAL = StudySpec(dose=(1e3, 1e5), step_px=(4, 8), gridsize=(1, 2), seed=(0, 1))
"""A matrix that `fake_cell` fills at once."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny study that nobody stopped, and its folder."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    return run_study(TINY, folder), folder


@pytest.fixture
def fake(monkeypatch):
    """Cells that are filled without a network; the names of those that were computed."""
    computed = []

    def fake_cell(cell, folder):
        folder.mkdir(parents=True, exist_ok=True)
        module._write_json(folder / module.SPEC_FILE, json.loads(json.dumps(asdict(cell))))
        computed.append(cell.name)
        value = [[cell.simulate["dose"], cell.train["members"]], [cell.simulate["seed"], np.nan]]
        record = {"r_factor": 0.5, "part": ["amplitude", "phase"], "metric": ["ssim", "psnr"], "value": value}
        module._write_json(folder / module.RECORD_FILE, record)

    monkeypatch.setattr(module, "run_cell", fake_cell)
    monkeypatch.setattr(module, "_thumbnails", lambda spec, cells, folder: {("truth", "scan"): np.eye(3)})
    monkeypatch.setattr(module, "DRAWN_METRICS", ("ssim",))
    return computed


def test_each_cell_holds_what_compare_finds(whole):
    found, folder = whole
    assert found["value"].dims == ("dose", "overlap", "gridsize", "model", "seed", "part", "metric")
    assert found["r_factor"].shape == (2, 1, 1, 2, 1)
    for key, cell in cells_of(TINY).items():
        store = folder / "cells" / cell.name / "scan.zarr"
        alone = compare({"it": folder / "cells" / cell.name / "object.zarr"}, truth=store, scan=store)
        dose, overlap, gridsize, model, seed = key
        here = {"dose": dose, "overlap": overlap, "gridsize": gridsize, "model": model, "seed": seed}
        np.testing.assert_array_equal(found["value"].sel(here), alone["value"][0])
        assert float(found["r_factor"].sel(here)) == float(alone["r_factor"][0])
        assert json.loads((folder / "cells" / cell.name / "record.json").read_text())["refinement"] == "none"
    diameter = found.attrs["probe_diameter_px"]
    np.testing.assert_allclose(found["step_px"], 0.25 * diameter)
    assert json.loads(found.attrs["study"])["train"]["epochs"] == 1


def test_a_study_leaves_a_table_of_every_figure_and_pictures(whole):
    found, folder = whole
    made = {path.name for path in folder.iterdir()}
    assert made == {
        "cells",
        "metrics.csv",
        "table.md",
        "psnr.png",
        "ssim.png",
        "frc50.png",
        "amplitude.png",
        "phase.png",
    }
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == int(found["value"].notnull().sum())
    row = next(row for row in rows if (row["model"], row["metric"], row["part"]) == ("baseline", "psnr", "phase"))
    one = found["value"].sel(model="baseline", metric="psnr", part="phase", dose=float(row["dose"]))
    assert float(row["value"]) == pytest.approx(float(one.squeeze()))
    assert (folder / "table.md").read_text() == to_markdown(found)
    *rows, _, refinement = to_markdown(found).splitlines()
    assert len(rows) == 2 + 4 * 2
    assert refinement == "Refinement of all objects: slow_phase = False, polish = 0."


def test_a_finished_study_is_read_and_not_computed(whole, monkeypatch):
    found, folder = whole
    monkeypatch.delattr(module, "run_cell")
    xr.testing.assert_identical(run_study(TINY, folder), found)


def test_a_stopped_study_goes_on_to_the_same_figures(whole, tmp_path, monkeypatch):
    trained = []
    train, reconstruct = module.train, module.reconstruct

    def counted(*arguments, **options):
        trained.append(options["out"].parent.name)
        return train(*arguments, **options)

    def interrupted(*arguments, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return reconstruct(*arguments, **options)

    monkeypatch.setattr(module, "train", counted)
    monkeypatch.setattr(module, "reconstruct", interrupted)
    spec = replace(TINY, model=("pinn",))
    with pytest.raises(KeyboardInterrupt):
        run_study(spec, tmp_path)
    assert [path.parent.name for path in tmp_path.glob("cells/*/record.json")] == trained[:1]
    assert not (tmp_path / "metrics.csv").exists()
    monkeypatch.setattr(module, "reconstruct", reconstruct)
    found = run_study(spec, tmp_path)
    # The second network was whole when the study was stopped.
    assert len(trained) == len(set(trained)) == 2
    for name in ("value", "r_factor"):
        xr.testing.assert_identical(found[name], whole[0][name].sel(model=["pinn"]))


def test_cells_run_as_tasks_of_a_client(whole, tmp_path):
    found, folder = whole
    shutil.copytree(folder, tmp_path / "again")
    records = list((tmp_path / "again").glob("cells/*/record.json"))
    for record in records:
        record.unlink()
    with in_process_client() as client:
        xr.testing.assert_identical(run_study(TINY, tmp_path / "again", client=client), found)
    assert all(record.exists() for record in records)


def test_every_combination_has_its_cell_and_a_baseline_the_same_for_all_gridsizes(fake, tmp_path):
    found = run_study(LOGICAL, tmp_path)
    assert len(fake) == len(set(fake)) == 2 * 2 * (2 + 1) * 2
    assert "dose1000-step4-g2-pinn-s1" in fake
    ssim, members = found["value"].sel(part="amplitude", metric="ssim"), found["value"].sel(metric="psnr")[..., 0]
    np.testing.assert_array_equal(ssim, np.broadcast_to(np.reshape([1e3, 1e5], (2, 1, 1, 1, 1)), ssim.shape))
    assert np.unique(members.sel(model="pinn", gridsize=2)).tolist() == [4]
    assert np.unique(members.sel(model="baseline")).tolist() == [1]
    assert np.unique(found["value"].sel(part="phase", metric="ssim", seed=1)).tolist() == [1]
    assert len(to_markdown(found).splitlines()) == 2 + 24 * 2 + 2
    np.testing.assert_allclose(found["overlap"], 1 - np.array([4, 8]) / found.attrs["probe_diameter_px"])


def test_cells_of_another_study_are_refused_or_computed_again_by_name(fake, tmp_path):
    first = replace(LOGICAL, seed=(0,), step_px=(4,))
    run_study(first, tmp_path)
    changed = replace(first, train={"epochs": 7})
    with pytest.raises(
        PtychodaskError, match=r"train.epochs was null, is 7; .*--recompute 'dose1000-step4-g1-pinn-s0'"
    ):
        run_study(changed, tmp_path)
    with pytest.raises(PtychodaskError, match=r"dose1000-step4-g1-baseline-s0: was computed with"):
        run_study(changed, tmp_path, recompute=["*pinn*"])
    with pytest.raises(PtychodaskError, match=r"no cell is named typo; the cells are: dose1000-"):
        run_study(changed, tmp_path, recompute=["typo"])
    fake.clear()
    run_study(changed, tmp_path, recompute=["*"])
    assert len(fake) == 6
    fake.clear()
    run_study(changed, tmp_path, recompute=["dose1000-step4-g2-pinn-s0"])
    assert fake == ["dose1000-step4-g2-pinn-s0"]
    fake.clear()
    run_study(replace(changed, dose=(1e3, 1e5, 1e7)), tmp_path)
    assert len(fake) == 3
    assert all(name.startswith("dose10000000-") for name in fake)


@pytest.mark.parametrize("cluster", [nullcontext, in_process_client])
def test_a_cell_that_fails_stops_no_other(fake, tmp_path, monkeypatch, cluster):
    works = module.run_cell

    def fails(cell, folder):
        if cell.name == "dose1000-step4-g2-pinn-s0":
            raise PtychodaskError("training: the loss diverged")
        works(cell, folder)

    monkeypatch.setattr(module, "run_cell", fails)
    spec = replace(LOGICAL, seed=(0,), step_px=(4,))
    failure = r"1 of 6 cells failed, .* dose1000-step4-g2-pinn-s0: .* diverged"
    with cluster() as client, pytest.raises(PtychodaskError, match=failure):
        run_study(spec, tmp_path, client=client)
    assert len(list(tmp_path.glob("cells/*/record.json"))) == 5
    fake.clear()
    monkeypatch.setattr(module, "run_cell", works)
    run_study(spec, tmp_path)
    assert fake == ["dose1000-step4-g2-pinn-s0"]


def test_a_cell_whose_workers_die_is_reported(fake, tmp_path, monkeypatch):
    def killed(cell, folder):
        raise KilledWorker(cell.name, SimpleNamespace(address="tcp://gone"), 3)

    monkeypatch.setattr(module, "run_cell", killed)
    with (
        in_process_client() as client,
        pytest.raises(PtychodaskError, match=r"6 of 6 cells failed, .* workers .* died"),
    ):
        run_study(replace(LOGICAL, seed=(0,), step_px=(4,)), tmp_path, client=client)


def test_the_overlap_is_one_less_the_spacing_in_diameters_of_the_probe():
    disc = scaled_probe("disc", 64, 1.0)
    assert probe_diameter_px(disc) == pytest.approx(0.35 * 64, rel=0.01)
    assert probe_diameter_px(np.concatenate([disc, 2j * disc])) == pytest.approx(probe_diameter_px(disc))
    spec = StudySpec(dose=(1e4,), overlap=(0.5, 0.9))
    np.testing.assert_allclose(steps_px(spec), [0.5 * 0.35 * 64, 0.1 * 0.35 * 64], rtol=0.01)
    for cell in cells_of(spec).values():
        assert cell.simulate["step_px"] in steps_px(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[matrix]\ndose = [1e4]\noverlap = [1.0]", r"overlap contains 1.0, .* between 0 and 22.35 px, the diameter"),
        ("[matrix]\ndose = [1e4]\noverlap = [-0.2]", r"overlap contains -0.2, expected more than 0"),
        (
            "[matrix]\ndose = [1e4]\nstep_px = [30]",
            r"step_px contains 30, .* less than 22.35, the diameter of the probe",
        ),
        ("[matrix]\ndose = [1e4]\nstep_px = [3]\noverlap = [0.5]", r"needs overlap or step_px, and not both"),
        ("[matrix]\ndose = [1e4]", r"needs overlap or step_px"),
        ("[matrix]\noverlap = [0.5]", r"\[matrix\] has no dose"),
        ("[matrix]\ndose = 1e4\noverlap = [0.5]", r"dose is 10000.0, expected a list"),
        ("[matrix]\ndose = []\noverlap = [0.5]", r"dose is \[\], expected one or more different values"),
        ("[matrix]\ndose = [1e4, 1e4]\noverlap = [0.5]", r"expected one or more different values"),
        ("[matrix]\ndose = [-1]\noverlap = [0.5]", r"dose contains -1, expected positive"),
        ("[matrix]\ndose = ['1e4']\noverlap = [0.5]", r"dose contains '1e4', expected a number"),
        ("[matrix]\ndose = [[1e4]]\noverlap = [0.5]", r"dose contains \[10000.0\], expected a number"),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\nmodel = ['gan']",
            r"model is 'gan', expected one of: pinn, baseline",
        ),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\nphotons = [1]",
            r"\[matrix\] has no key photons; its keys are: dose, over",
        ),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[sim]\n", r"sim is no table of a study"),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\n[simulate]\ndose = 3",
            r"\[simulate\] has no key dose; its keys are: obj",
        ),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[simulate]\nn_pixels = 64.0", r"n_pixels is 64.0, expected a whole"),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\n[simulate]\nprobe = 'pin'",
            r"probe is 'pin', expected one of: disc",
        ),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\n[train]\nmodel = 'pinn'",
            r"\[train\] has no key model; its keys are",
        ),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[train]\nepochs = 0", r"epochs is 0, expected 1 or more"),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\n[train]\nepochs = 'x'",
            r"epochs is 'x', expected a whole number",
        ),
        (
            "[matrix]\ndose = [1e4]\noverlap = [0.5]\ngridsize = [3]\n[train]\nneighbours = 8",
            r"neighbours is 8 for groups of 9 members",
        ),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[reconstruct]\npolich = 5", r"\[reconstruct\] has no key polich"),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[reconstruct]\npolish = -5", r"polish is -5"),
        ("[matrix]\ndose = [1e4]\noverlap = [0.5]\n[compare]\nramp = 1", r"ramp is 1, expected true or false"),
        ("[matrix\n", r"is no TOML"),
    ],
)
def test_a_wrong_study_is_refused_by_name_before_anything_runs(tmp_path, text, message):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(PtychodaskError, match=message):
        run_study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_spacing_that_the_scan_of_the_positions_cannot_give_is_refused_with_the_bound(tmp_path):
    store = tmp_path / "known.zarr"
    simulate(store, n_pixels=16, n_patterns=200, step_px=5.0, path="raster", dose=1e4)
    taken = {"path": str(store), "n_patterns": 40}
    with pytest.raises(
        PtychodaskError, match=r"step_px is 2.235, but the mean spacing of the positions of .* is 4\.\d+ px"
    ):
        StudySpec(dose=(1e4,), overlap=(0.7, 0.9), simulate=taken)
    with pytest.raises(PtychodaskError, match=r"expected at least n_patterns=40; pass n_patterns=1\d"):
        StudySpec(dose=(1e4,), step_px=(8, 16), simulate=taken)
    assert len(cells_of(StudySpec(dose=(1e4,), step_px=(5, 8), simulate=taken))) == 4


def test_objects_are_plain_unless_the_study_refines_them(fake, tmp_path):
    spec = replace(LOGICAL, seed=(0,), step_px=(4,))
    assert {json.dumps(cell.reconstruct) for cell in cells_of(spec).values()} == {'{"slow_phase": false, "polish": 0}'}
    refined = replace(spec, reconstruct={"polish": 3, "tile": 64})
    assert {cell.reconstruct["polish"] for cell in cells_of(refined).values()} == {3}
    found = run_study(refined, tmp_path)
    assert json.loads(found.attrs["refinement"]) == {"slow_phase": False, "polish": 3}
    assert "Refinement of all objects: slow_phase = False, polish = 3." in to_markdown(found)


def test_cells_of_earlier_versions_are_finished_and_lack_later_metrics(fake, tmp_path):
    spec = replace(LOGICAL, seed=(0,), step_px=(4,), model=("pinn",), gridsize=(1,))
    run_study(spec, tmp_path)
    folder = tmp_path / "cells" / "dose1000-step4-g1-pinn-s0"
    cell, record = (json.loads((folder / name).read_text()) for name in (module.SPEC_FILE, module.RECORD_FILE))
    (folder / module.SPEC_FILE).write_text(json.dumps(cell | {"reconstruct": {}}))
    record |= {"metric": ["psnr"], "value": [[7.0], [8.0]]}
    (folder / module.RECORD_FILE).write_text(json.dumps(record))
    fake.clear()
    found = run_study(spec, tmp_path)
    assert fake == []
    assert set(found["metric"].values) == {"ssim", "psnr"}
    assert found["value"].sel(dose=1e3, metric="psnr").values.ravel().tolist() == [7, 8]
    assert found["value"].sel(dose=1e3, metric="ssim").isnull().all()
    assert found["value"].sel(dose=1e5, metric="ssim", part="amplitude").values.ravel().tolist() == [1e5]


def test_a_damaged_record_is_named(fake, tmp_path):
    spec = replace(LOGICAL, seed=(0,), step_px=(4,))
    run_study(spec, tmp_path)
    (tmp_path / "cells" / "dose1000-step4-g1-pinn-s0" / "record.json").write_text("{")
    with pytest.raises(PtychodaskError, match=r"record.json: cannot be read .* remove its folder"):
        run_study(spec, tmp_path)


def test_the_example_of_the_documentation_is_a_study():
    spec = read_study(Path(__file__).parents[1] / "docs" / "study.toml")
    assert len(cells_of(spec)) == 3 * 2 * 2 * 2


def test_figures_have_a_line_for_each_network_and_gridsize(fake, tmp_path):
    found = run_study(LOGICAL, tmp_path)
    figure = plot_study(found, "psnr")
    # The phase has no PSNR here; members are 1 and 4 for the gridsizes of the PINN.
    assert [axes.get_title() for axes in figure.axes] == ["amplitude, step px 4", "amplitude, step px 8"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["pinn, gridsize 1", "pinn, gridsize 2", "baseline"]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [4, 4])
    with pytest.raises(PtychodaskError, match=r"metric is mse, expected one of: ssim, psnr"):
        plot_study(found, "mse")
    with pytest.raises(PtychodaskError, match="no picture"):
        plot_contact_sheet({})


def test_a_network_that_cannot_be_is_refused_before_the_first_cell():
    with pytest.raises(PtychodaskError, match=r"n_filters_scale is 0\.5, expected a whole number"):
        replace(LOGICAL, train={"n_filters_scale": 0.5})
