"""One command from a file to a picture: what it does, what it says next, and what it refuses before any work."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

from ptychodask import run as running
from ptychodask.demo import write_ptychopinn_npz
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store import open_scan


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file in PtychoPINN's format, of patterns for which no network is packaged."""
    folder = tmp_path_factory.mktemp("run")
    scan = simulate(folder / "made.zarr", n_pixels=32, n_patterns=100, step_px=3.0, dose=1e5, probe="zone_plate")
    write_ptychopinn_npz(scan, folder / "scan.npz")
    return folder / "scan.npz"


@pytest.mark.usefixtures("with_refinement")
def test_a_file_becomes_a_picture_with_its_r(run, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("run", file, "-q")
    assert code == 0, err
    assert (tmp_path / "scan.object.png").stat().st_size > 10_000
    assert open_result(tmp_path / "scan.object.zarr").ptycho.records["model"]["kind"] == "iterative"
    r_factor = float(re.search(r"scan\.object\.zarr: R ([\d.]+); figure scan\.object\.png", out)[1])
    assert 0 < r_factor < 0.2


@pytest.mark.long
@pytest.mark.usefixtures("with_refinement")
def test_the_commands_to_try_next_work(run, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("run", file, "-q")[1]
    steps = [shlex.split(line, comments=True) for line in out.partition("Try next:\n")[2].splitlines()]
    assert [step[1] for step in steps] == ["report", "reconstruct", "train"]
    for step in steps[:2]:
        code, _, err = run(*step[1:], "-q")
        assert code == 0, err


def test_a_store_keeps_what_it_has(run, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan = simulate(tmp_path / "own.zarr", n_pixels=32, n_patterns=40, step_px=3.0, dose=1e5)
    code, out, err = run("run", "own.zarr", "--model", "iterative", "-q")
    assert code == 0, err
    assert "probe:" not in out
    np.testing.assert_array_equal(open_scan("own.zarr").probe, scan.probe)
    assert "is a store itself" in run("run", "own.zarr", "other.zarr")[2]


def test_nothing_is_done_if_a_result_is_in_the_way(refused, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.object.zarr").mkdir()
    assert "scan.object.zarr exists already; pass overwrite=True (--overwrite)" in refused("run", file)
    assert not (tmp_path / "scan.zarr").exists()


def test_a_file_that_leaves_questions_open_is_refused_with_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("raw.npz", dp=np.random.default_rng(0).uniform(0, 1, (9, 32, 32)))
    code, _, err = run("run", "raw.npz")
    assert code == 2
    assert "raw.npz cannot be ingested as it is: " in err
    assert not (tmp_path / "raw.zarr").exists()


def test_a_high_r_points_to_wrong_inputs_first():
    steps = list(running._next_steps("a b.zarr", "a b.object.zarr", None, [0.5]))
    assert "My picture is noise" in steps[0]
    assert steps[1].startswith("ptychodask inspect 'a b.zarr' --check-axes")
