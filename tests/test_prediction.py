"""One chunk becomes patches: read once, predicted in batches of one shape, placed where they belong."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from models_for_tests import LinearModel, NotFiniteModel

from ptychodask import models, prediction
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.models.choose import resolve_model
from ptychodask.prediction import ModelReference, PredictionJob, predict_groups
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.annotate import record_model, replace_probe
from ptychodask.store.groups import group

N_PATTERNS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("prediction") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=N_PATTERNS, step_px=4.0, seed=3)
    group(path, GroupingSpec())
    return path


@pytest.fixture(autouse=True)
def _empty_caches(monkeypatch):
    monkeypatch.setattr(prediction, "_STORES", prediction._ProcessCache())
    monkeypatch.setattr(prediction, "_PREDICTORS", prediction._ProcessCache())


def job_for(store, model, batch_size=8):
    return PredictionJob(str(store), open_scan(store).data_hash, "c4-k7-s0", ModelReference.to(model), batch_size)


def predicted(job, start=0, stop=N_PATTERNS):
    batches = [batch for _, batch in predict_groups([job], start, stop, {})]
    return np.concatenate([b.patches for b in batches]), np.concatenate([b.position_yx_px for b in batches])


@pytest.mark.parametrize("output", ["member", "group"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_patches_are_the_networks_own_at_their_positions(store, output, batch_size):
    model, scan, member = LinearModel(output=output), open_scan(store), StoredScan(store).member("c4-k7-s0", 3, 29)
    patches, position = predicted(job_for(store, model, batch_size), 3, 29)
    own = scan.position_yx_px[member]
    x = np.moveaxis(scan.network_input(member.ravel()).reshape(*member.shape, 16, 16), 1, -1)
    expected = model.patches(x, (own - own.mean(axis=1, keepdims=True)).astype(np.float32))
    np.testing.assert_array_equal(patches, expected.reshape(-1, 16, 16))
    np.testing.assert_array_equal(position, own.reshape(-1, 2) if output == "member" else own.mean(axis=1))


def test_every_call_has_one_shape_and_the_last_is_padded(store):
    model = LinearModel()
    predicted(job_for(store, model, 16), 0, 37)
    assert model.calls == [(16, 16, 16, 4)] * 3


def test_a_chunk_reads_each_pattern_once(store, monkeypatch):
    reads = []
    read = StoredScan.part
    monkeypatch.setattr(StoredScan, "part", lambda self, index: reads.append(index) or read(self, index))
    predicted(job_for(store, LinearModel()), 5, 25)
    (index,) = reads
    np.testing.assert_array_equal(index, np.unique(StoredScan(store).member("c4-k7-s0", 5, 25)))


def test_stages_are_timed(store):
    seconds: dict[str, float] = {}
    list(predict_groups([job_for(store, LinearModel())], 0, 10, seconds))
    assert set(seconds) == {"load", "read", "gather", "predict"}
    assert min(seconds.values()) >= 0


def test_a_network_that_diverged_is_named_with_its_groups(store):
    with pytest.raises(PtychodaskError, match=r"not finite for groups 20\.\.27 of 'c4-k7-s0'"):
        predicted(job_for(store, NotFiniteModel()), 20, 30)


def test_patches_of_another_shape_are_refused(store):
    class Cut(LinearModel):
        def patches(self, x, offset_yx_px):
            return super().patches(x, offset_yx_px)[..., :-2]

    with pytest.raises(PtychodaskError, match=r"have shape \(8, 4, 16, 14\), expected \(group, 4, 16, 16\)"):
        predicted(job_for(store, Cut(content_hash="cut")))


def test_threads_of_a_process_load_a_model_once(store, monkeypatch):
    loads = []

    def load(path):
        loads.append(path)
        return LinearModel(content_hash="on disk", path=str(path))

    monkeypatch.setattr(models, "load_model", load)
    job = job_for(store, LinearModel(content_hash="on disk", path="/models/a"))
    assert job.model.model is None
    threads = [threading.Thread(target=predicted, args=(job, start, start + 10)) for start in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["/models/a"]


def test_a_model_replaced_during_a_run_is_refused(store, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda path: LinearModel(content_hash="other"))
    with pytest.raises(PtychodaskError, match="hash is other, expected first; it was replaced"):
        predicted(job_for(store, LinearModel(content_hash="first", path="/models/a")))


def test_a_store_that_changed_since_the_plan_is_refused(tmp_path):
    path = tmp_path / "scan.zarr"
    scan = simulate(path, n_pixels=16, n_patterns=20, step_px=4.0)
    group(path, GroupingSpec())
    job = job_for(path, LinearModel())
    replace_probe(path, scan.probe * 2, {})
    with pytest.raises(PtychodaskError, match="changed since it was planned"):
        predicted(job, 0, 20)


def test_the_recorded_model_is_the_latest_pinn_else_the_latest_baseline(tmp_path, monkeypatch):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=20, step_px=4.0)
    with pytest.raises(
        PtychodaskError,
        match=r"no model is recorded, and none is packaged for patterns of [0-9]+ pixels; run 'ptychodask train",
    ):
        resolve_model(open_scan(path), None)
    monkeypatch.setattr(models, "load_model", lambda where: LinearModel(content_hash=where.name))
    for kind, name in (("pinn", "p1"), ("pinn", "p2"), ("baseline", "b1")):
        (tmp_path / name).mkdir()
        if name == "b1":
            assert resolve_model(open_scan(path), None).content_hash == "p2"
        record_model(path, kind=kind, path=tmp_path / name, content_hash=name)
    assert resolve_model(open_scan(path), None).content_hash == "p2"


def test_a_recorded_model_that_is_gone_or_changed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=20, step_px=4.0)
    record_model(path, kind="baseline", path=tmp_path / "b1", content_hash="b1")
    with pytest.raises(PtychodaskError, match=r"no model found at .*b1, where its latest baseline is recorded"):
        resolve_model(open_scan(path), None)
    (tmp_path / "b1").mkdir()
    monkeypatch.setattr(models, "load_model", lambda where: LinearModel(content_hash="b2"))
    with pytest.raises(PtychodaskError, match=r"recorded with hash b1, .*b1 has b2; pass model="):
        resolve_model(open_scan(path), None)


def test_what_is_no_model_is_refused(store):
    with pytest.raises(PtychodaskError, match="got dict, expected a path, a model from load_model"):
        resolve_model(open_scan(store), {"pinn": "a"})


@pytest.mark.parametrize("records", ["pinn", ["pinn"], {"kind": "pinn"}])
def test_a_record_of_models_that_cannot_be_read_is_refused(store, records):
    scan = open_scan(store)
    scan.attributes["models"] = records
    with pytest.raises(PtychodaskError, match="list of models cannot be read"):
        resolve_model(scan, None)


def test_a_record_without_its_path_is_no_record(store):
    scan = open_scan(store)
    scan.attributes["models"] = [{"kind": "pinn"}]
    with pytest.raises(PtychodaskError, match="no model is recorded"):
        resolve_model(scan, None)
