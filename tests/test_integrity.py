"""Checks of stored data: whole stores, changed bits, missing files and changed hashes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import zarr
from campaigns.flips import RIGHT, make_stores, play
from models_for_tests import LinearModel
from typer.testing import CliRunner

from ptychodask.cli import app
from ptychodask.errors import PtychodaskError
from ptychodask.inspection.integrity import check_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("integrity"), LinearModel(), 120)


def test_finished_stores_are_whole_and_every_array_has_checksums(stores):
    for store in stores.values():
        checked = check_store(store, progress=False)
        assert checked.problems == ()
        assert checked.arrays
        assert all(array.has_checksum and array.n_chunks for array in checked.arrays)


def test_no_changed_bit_is_read_and_each_is_named(stores):
    told = []
    outcomes = play(stores, 40, 1, told.append)
    assert set(outcomes) <= set(RIGHT), told
    assert outcomes["named, refused"] > 20


def test_a_missing_file_is_named(stores, tmp_path):
    store = tmp_path / "scan.zarr"
    shutil.copytree(stores["scan"], store)
    next(path for path in sorted((store / "y_px").rglob("c/**/*")) if path.is_file()).unlink()
    assert any("array 'y_px': 1 files are missing" in problem for problem in check_store(store).problems)


def test_other_patterns_than_the_recorded_ones_are_named(stores, tmp_path):
    store = tmp_path / "scan.zarr"
    shutil.copytree(stores["scan"], store)
    patterns = zarr.open_group(store, mode="r+", use_consolidated=False)["diffraction"]
    patterns[3] = np.flip(patterns[3])
    (problem,) = check_store(store).problems
    assert "patterns 0..119 are not those that were stored" in problem


def test_the_command_names_the_array_and_the_way_out(stores, tmp_path):
    store = tmp_path / "scan.zarr"
    shutil.copytree(stores["scan"], store)
    path = next(path for path in sorted((store / "diffraction").rglob("c/**/*")) if path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    told = CliRunner().invoke(app, ["check", str(store), str(stores["patches"]), "--quiet"])
    assert "array 'diffraction': 1 chunks are damaged: (0, 0, 0); ingest again" in told.stdout
    assert "patches  " in told.stdout
    assert isinstance(told.exception, PtychodaskError)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(PtychodaskError, match="no such store"):
        check_store(tmp_path / "none.zarr")
