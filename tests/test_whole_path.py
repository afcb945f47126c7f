"""From a scan to an object with the real networks: the same object whatever the chunks, batches and workers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptychodask import demo
from ptychodask.cluster.clients import in_process_client, local_client
from ptychodask.judging.compare import compare
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.training import train

N = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("path") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=150, step_px=4.0, dose=1e6, probe="zone_plate", seed=5)
    train(path, epochs=2, levels=2, validation_fraction=0.1)
    return path


@pytest.fixture(scope="module")
def client():
    with in_process_client() as found:
        yield found


@pytest.fixture(scope="module")
def whole(store, client):
    return reconstruct(store, client=client)


def test_the_object_looks_like_the_truth(store, whole):
    found = compare({"pinn": whole}, truth=store, scan=store)
    assert float(found["value"].sel(part="amplitude", metric="correlation")[0]) > 0.9
    assert float(found["value"].sel(part="amplitude", metric="ratio")[0]) == pytest.approx(1, abs=0.03)
    assert float(found["r_factor"][0]) < 0.2


@pytest.mark.parametrize("groups_per_chunk", [1, 7, 64, 150])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_the_object_does_not_depend_on_chunks_and_batches(store, client, whole, groups_per_chunk, batch_size):
    other = reconstruct(store, client=client, groups_per_chunk=groups_per_chunk, batch_size=batch_size)
    seen = np.isfinite(whole["object"].values)
    np.testing.assert_array_equal(np.isfinite(other["object"].values), seen)
    difference = np.abs(other["object"].values - whole["object"].values)[seen]
    assert difference.max() <= 1e-5 * np.median(np.abs(whole["object"].values[seen]))


def test_worker_processes_give_the_same_bits(store, whole):
    with local_client(2) as client:
        other = reconstruct(store, client=client)
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(other[name].values, whole[name].values)


def test_the_store_alone_is_enough(store, whole):
    np.testing.assert_array_equal(reconstruct(store)["object"].values, whole["object"].values)


def test_the_demo_leaves_pictures_results_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SCAN", demo.SCAN | {"n_patterns": 100})
    said = demo.run_demo(tmp_path / "demo")
    made = {path.name for path in (tmp_path / "demo").iterdir()}
    assert made >= {"scan.npz", "scan.zarr", "pinn.png", "comparison.png", "refinement.png", "comparison.md"}
    assert made >= {"scan.object.zarr", "stitched.object.zarr", "baseline.object.zarr"}
    assert "| PtychoPINN | amplitude |" in said
    assert re.search(r"\| (slow phase, )?\d sweeps \| phase correlation \| below 0.02 cycles/px \|", said)
    before, after = (float(re.search(rf"\| {word} \| (0\.\d+) \|", said).group(1)) for word in ("before", "after"))
    assert after > before
    assert "| Baseline | phase |" in (tmp_path / "demo" / "comparison.md").read_text()
    with pytest.raises(ValueError, match="not empty"):
        demo.run_demo(tmp_path / "demo")
