"""Scans, results, caches, bundles and stopped runs of earlier versions: opened, resumed, the same bits."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from stored.make import SIZES, VARIABLES, FixedModel

import ptychodask

ARCHIVE = Path(__file__).parent / "stored" / "version_0_1.zip"


@pytest.fixture
def stored(tmp_path):
    """Folder with what version 0.1 stored."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def assert_same_bits(one, other, names=VARIABLES):
    for name in names:
        assert one[name].values.tobytes() == other[name].values.tobytes(), name


def expected(stored, name):
    """Object without halves, as version 0.1 stitched it from predictions, or from its cache."""
    with np.load(stored / f"{name}.npz") as arrays:
        return xr.Dataset({name: (("y", "x"), arrays[name]) for name in VARIABLES})


def reconstruct(stored, **options):
    return ptychodask.reconstruct(stored / "scan.zarr", FixedModel(), progress=False, **SIZES, **options)


def test_a_scan_opens_with_the_hash_it_was_stored_with(stored):
    recorded = json.loads((stored / "scan.zarr" / "zarr.json").read_text())["attributes"]
    scan = ptychodask.open_scan(stored / "scan.zarr")
    assert (scan.n_patterns, scan.n_pixels) == (60, 16)
    assert scan.data_hash == recorded["data_hash"]


def test_a_result_opens_and_a_new_one_has_its_bits(stored):
    result = ptychodask.open_result(stored / "result.zarr")
    again = reconstruct(stored, split_half=True, out=stored / "again.zarr", pyramid=True)
    assert_same_bits(result, again, [*VARIABLES, "object_half", "weight_half"])
    assert result.ptycho.records["plan"] == again.ptycho.records["plan"]
    level = ptychodask.open_result(stored / "result.zarr", level=1)
    assert_same_bits(level, ptychodask.open_result(stored / "again.zarr", level=1), ["object", "weight"])


def test_a_stopped_run_resumes_from_its_ledger(stored):
    ledger = (stored / ".stopped.zarr.writing" / "ledger.jsonl").read_text()
    assert ledger.count('"kind": "tile"') == 2
    resumed = reconstruct(stored, out=stored / "stopped.zarr", resume=True)
    assert_same_bits(resumed, expected(stored, "predicted"))


def test_a_cache_of_patches_is_stitched_without_its_network(stored, monkeypatch):
    monkeypatch.setattr(FixedModel, "compile", lambda *_: pytest.fail("the network was used"))
    assert_same_bits(reconstruct(stored, cache=stored / "patches.zarr"), expected(stored, "from_cache"))


def test_a_bundle_predicts_what_it_predicted(stored):
    before = np.load(stored / "small_predictions.npz")
    model = ptychodask.load_model(stored / "small.model")
    recorded = json.loads((stored / "small.model" / "model.json").read_text())
    assert model.content_hash == recorded["content_hash"]
    patches = model.bind(ptychodask.open_scan(stored / "scan.zarr")).predict(
        before["x"], np.zeros((2, 4, 2), np.float32)
    )
    # TensorFlow rounds differently on another processor.
    np.testing.assert_allclose(patches, before["patches"], atol=1e-5 * np.abs(before["patches"]).max())
