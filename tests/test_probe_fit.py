"""Training that fits the probe too: what it finds, what it leaves alone, its gauge, and what the store takes."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage

from ptychodask.errors import PtychodaskError
from ptychodask.models import ModelSpec, Optics, load_model
from ptychodask.models.networks import FittedProbes, build_autoencoder, build_network
from ptychodask.models.physics import relative_illumination
from ptychodask.probes import illumination, probe_centroid_px
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan
from ptychodask.training import TrainingSpec, probe_fit, train
from ptychodask.training.callbacks import TrainingCallback
from ptychodask.training.probe_fit import in_gauge_of

N = 16

MODULE = sys.modules["ptychodask.training.train"]
"""The module: its name stands for the function."""

SHORT = {"levels": 1, "batch_size": 16, "epochs": 6, "validation_fraction": 0.15, "loss": "amplitude"}
SHORT |= {"projections_before": 2, "projections_after": 1, "probe_rate": 10.0}

TINY = SHORT | {"epochs": 1, "members": 2, "neighbours": 3, "projections_before": 1, "projections_after": 0}


def curved_probe():
    """A Gaussian with a curved and a tilted phase, dark at the rim."""
    y, x = (np.indices((N, N)) - N // 2) / (N / 9)
    squared = y**2 + x**2
    return np.exp(-squared / 2 + 0.5j * squared + 0.3j * y)


def overlap(one, other):
    return abs(np.vdot(one, other)) / np.linalg.norm(one) / np.linalg.norm(other)


def light(probe):
    return (np.abs(probe) ** 2).sum(dtype=np.float64)


def blurred(probe):
    parts = [scipy.ndimage.gaussian_filter(part, (0, 1, 1)) for part in (probe.real, probe.imag)]
    wrong = parts[0] + 1j * parts[1]
    return (wrong * np.sqrt(light(probe) / light(wrong))).astype(np.complex64)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A simulated scan with its right probe."""
    store = tmp_path_factory.mktemp("probe") / "scan.zarr"
    options = {"n_pixels": N, "n_patterns": 120, "step_px": 1.6, "dose": 1e6, "path": "raster", "seed": 2}
    return simulate(store, probe=curved_probe(), progress=False, **options)


def stored(scan, path, probe):
    write_scan(
        path,
        diffraction=scan.diffraction,
        position_yx_px=scan.position_yx_px,
        probe=probe,
        domain="counts",
        calibration="as_given",
        progress=False,
    )
    return path


@pytest.fixture(scope="module")
def fitted(scan, tmp_path_factory):
    """A store that was ingested with a wrong probe, and the model whose training fitted it."""
    store = stored(scan, tmp_path_factory.mktemp("fitted") / "wrong.zarr", blurred(scan.probe))
    return store, train(store, out=store.with_name("fitted.model"), **SHORT)


def test_a_wrong_probe_comes_closer_to_the_right_one_and_the_held_out_loss_falls(scan, fitted):
    store, model = fitted
    found, wrong = open_scan(store).probe, blurred(scan.probe)
    assert overlap(wrong, scan.probe) < 0.98
    assert 1 - overlap(found, scan.probe) < 0.3 * (1 - overlap(wrong, scan.probe))
    fit = model.trained_on["probe_fit"]
    assert fit["held_out_loss_after"] < 0.5 * fit["held_out_loss_before"]


def test_the_store_takes_the_fitted_probe_and_remembers_what_it_had(scan, fitted):
    store, model = fitted
    opened = open_scan(store)
    np.testing.assert_array_equal(opened.probe, model.optics.probe)
    np.testing.assert_array_equal(opened.probe_initial, blurred(scan.probe))
    assert opened.attributes["probe_refinement"] == model.trained_on["probe_fit"]
    assert opened.attributes["probe_refinement"]["by"] == "train"
    assert model.trained_on["data_hash"] == opened.data_hash
    assert opened.attributes["models"][-1]["hash"] == load_model(model.path).content_hash
    assert np.isfinite(reconstruct(store, progress=False)["object"].values).any()


def test_the_fitted_probe_has_the_gauge_of_the_stored_one(scan, fitted):
    store, _ = fitted
    found, wrong = open_scan(store).probe, blurred(scan.probe)
    assert light(found) == pytest.approx(light(wrong), rel=1e-5)
    product = np.vdot(wrong, found)
    assert product.real > 0
    assert abs(product.imag) < 1e-4 * product.real
    # What a Fourier shift brings round the rim keeps the centroid from being exact.
    np.testing.assert_allclose(probe_centroid_px(found), probe_centroid_px(wrong), atol=0.02)


def test_a_shift_a_phase_and_a_scale_are_taken_off_a_probe(scan):
    moved = 2 * np.exp(1j) * np.roll(scan.probe, (1, -2), axis=(1, 2))
    np.testing.assert_allclose(in_gauge_of(scan.probe, moved), scan.probe, atol=1e-3 * np.abs(scan.probe).max())


def test_a_ramp_of_the_stored_probe_that_the_patterns_contradict_goes(scan, tmp_path):
    ramp = np.exp(2j * np.pi * 0.5 * np.arange(N) / N).astype(np.complex64)
    store = stored(scan, tmp_path / "tilted.zarr", scan.probe * ramp)
    train(store, out=tmp_path / "t.model", **SHORT | {"epochs": 4})
    assert 1 - overlap(open_scan(store).probe, scan.probe) < 0.5 * (1 - overlap(scan.probe * ramp, scan.probe))


def test_a_right_probe_is_not_spoiled(scan, tmp_path):
    store = stored(scan, tmp_path / "right.zarr", scan.probe)
    model = train(store, out=tmp_path / "r.model", **SHORT | {"epochs": 4})
    assert overlap(open_scan(store).probe, scan.probe) > 0.999
    np.testing.assert_array_equal(model.optics.probe, open_scan(store).probe)


def test_a_probe_that_is_not_better_stays_out_of_the_store(scan, tmp_path, monkeypatch, caplog):
    store = stored(scan, tmp_path / "kept.zarr", scan.probe)
    monkeypatch.setattr(probe_fit.ProbeFit, "is_better", property(lambda self: False))
    before = open_scan(store)
    with caplog.at_level(logging.INFO, "ptychodask.training.probe_fit"):
        model = train(store, out=tmp_path / "k.model", **TINY)
    after = open_scan(store)
    assert after.data_hash == before.data_hash == model.trained_on["data_hash"]
    assert "probe_refinement" not in after.attributes
    np.testing.assert_array_equal(model.optics.probe, scan.probe)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "ptychodask.training.probe_fit"]
    assert "held-out loss" in line
    assert "the store keeps its probe" in line


def test_weights_in_the_bundle_are_the_network_s_alone(fitted):
    _, model = fitted
    plain = build_network(model.spec, model.optics)
    assert [weight.shape for weight in model.weights] == [weight.shape for weight in plain.get_weights()]


def test_without_a_rate_there_is_no_probe_to_fit(scan, tmp_path, monkeypatch):
    store = stored(scan, tmp_path / "off.zarr", scan.probe)
    for name in ("FittedProbes", "ProbeAdam", "judge_probes"):
        monkeypatch.setattr(MODULE, name, lambda *_: pytest.fail("a probe is fitted"))
    before = open_scan(store).data_hash
    model = train(store, out=tmp_path / "off.model", **TINY | {"probe_rate": 0.0})
    assert open_scan(store).data_hash == before
    assert "probe_fit" not in model.trained_on


def test_a_probe_that_has_not_moved_is_the_stored_one(scan):
    optics = [Optics.of(scan), replace(Optics.of(scan), probe=np.concatenate([scan.probe, 0.5 * scan.probe]))]
    found = FittedProbes(optics, 2.0)
    for number, each in enumerate(optics):
        real, imag = (np.asarray(part) for part in found.pick(np.int32(number)))
        shown = (real + 1j * imag)[: len(each.probe)]
        np.testing.assert_allclose(shown, each.probe, atol=1e-5 * np.abs(each.probe).max())
        np.testing.assert_allclose(np.asarray(relative_illumination((real, imag))), illumination(each.probe), atol=1e-5)


def test_modes_that_a_scan_lacks_stay_dark_and_each_keeps_its_light(scan):
    two = np.concatenate([scan.probe, 0.5 * scan.probe])
    found = FittedProbes([Optics.of(scan), replace(Optics.of(scan), probe=two)], 2.0)
    found.change.assign(np.random.default_rng(0).normal(size=found.change.shape))
    real, imag = (np.asarray(part) for part in found.pick(np.int32(0)))
    assert not real[1].any()
    assert not imag[1].any()
    one, other = found.read()
    assert (len(one), len(other)) == (1, 2)
    np.testing.assert_allclose(real[0] + 1j * imag[0], one[0], rtol=1e-4)
    assert light(one) == pytest.approx(light(scan.probe), rel=1e-5)
    assert light(other) == pytest.approx(light(two), rel=1e-5)
    found.assign([one, other])
    for before, after in zip((one, other), found.read(), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_steps_and_forward_model_see_the_fitted_probe(scan):
    spec = ModelSpec(n_pixels=N, members=2, levels=1, projections_before=2, projections_after=1)
    given, moved = Optics.of(scan), replace(Optics.of(scan), probe=blurred(scan.probe))
    found = FittedProbes([given], 1.0)
    found.assign([moved.probe])
    x = np.moveaxis(scan.network_input(np.arange(8)).reshape(4, 2, N, N), 1, -1)
    offset = np.zeros((4, 2, 2), np.float32)
    networks = build_network(spec, given, fitted=found), build_network(spec, moved)
    answers = [np.asarray(network([x, offset])) for network in networks]
    np.testing.assert_allclose(*answers, atol=1e-4)
    counts = [
        np.asarray(whole([x, offset]))
        for whole in (build_autoencoder(networks[0], given, found), build_autoencoder(networks[1], moved))
    ]
    np.testing.assert_allclose(*counts, atol=1e-4 * counts[0].max())


@pytest.fixture
def two_stores(scan, tmp_path):
    other = simulate(
        tmp_path / "true.zarr", n_pixels=N, n_patterns=60, step_px=2.0, dose=1e5, probe=curved_probe(), progress=False
    )
    return [
        stored(scan, tmp_path / "a.zarr", blurred(scan.probe)),
        stored(other, tmp_path / "b.zarr", np.concatenate([blurred(other.probe), 0.1 * other.probe])),
    ]


def test_a_stopped_training_of_several_scans_goes_on_to_the_same_probes(two_stores, tmp_path, monkeypatch):
    before, two_epochs = [open_scan(store).probe for store in two_stores], TINY | {"epochs": 2}
    on_epoch_end = TrainingCallback.on_epoch_end

    def stop(self, epoch, logs=None):
        on_epoch_end(self, epoch, logs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCallback, "on_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(two_stores, out=tmp_path / "stopped.model", **two_epochs)
    # Kept from the store, so that both trainings begin with the same data.
    with monkeypatch.context() as patch:
        patch.setattr(probe_fit, "replace_probe", lambda *_: None)
        whole = train(two_stores, out=tmp_path / "whole.model", **two_epochs)
    resumed = train(two_stores, out=tmp_path / "stopped.model", resume=True, **two_epochs)
    losses = [[(entry["loss"], entry["held_out_loss"]) for entry in model.history] for model in (whole, resumed)]
    assert losses[0] == losses[1]
    assert resumed.content_hash == whole.content_hash
    np.testing.assert_array_equal(resumed.optics.probe, whole.optics.probe)
    after = [open_scan(store) for store in two_stores]
    for old, new, record in zip(before, after, resumed.trained_on["scans"], strict=True):
        assert new.probe.shape == old.shape
        assert not np.array_equal(new.probe, old)
        assert new.data_hash == record["data_hash"]
        assert new.attributes["models"][-1]["hash"] == resumed.content_hash


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_run_that_is_killed_while_it_ends_leaves_store_and_bundle_that_work(scan, tmp_path, monkeypatch):
    store, out = stored(scan, tmp_path / "killed.zarr", blurred(scan.probe)), tmp_path / "k.model"
    before = open_scan(store)
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "store_probe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(store, out=out, **TINY)
    assert open_scan(store).data_hash == before.data_hash
    left = load_model(out)
    # Nothing is trained again: the run had finished its last epoch.
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "record_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(store, out=out, resume=True, overwrite=True, **TINY)
    model, opened = load_model(out), open_scan(store)
    assert model.content_hash == left.content_hash
    np.testing.assert_array_equal(opened.probe, model.optics.probe)
    assert model.trained_on["data_hash"] == opened.data_hash != before.data_hash


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probe_rate": -1.0}, "probe_rate is -1.0, expected 0 or more"),
        ({"probe_rate": np.nan}, "probe_rate is nan, expected 0 or more"),
        ({"probe_rate": np.inf}, "probe_rate is inf, expected 0 or more"),
        ({"probe_rate": 1.0, "model": "baseline"}, "probe_rate is 1.0, but a baseline learns from patches"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        TrainingSpec(**fields)


def test_probes_that_are_not_free_are_refused_before_anything_is_built(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "build_network", lambda *_: pytest.fail("a network was built"))
    store = stored(scan, tmp_path / "s.zarr", scan.probe)
    with pytest.raises(PtychodaskError, match="is given twice, and probe_rate would fit two probes"):
        train([store, store], out=tmp_path / "x.model", **TINY)
    growing = replace(open_scan(store), attributes={"state": "growing"})
    monkeypatch.setattr(MODULE, "open_scan", lambda _: growing)
    with pytest.raises(PtychodaskError, match="still growing, and keeps the probe of its first segment"):
        train(store, out=tmp_path / "x.model", **TINY)
    assert not (tmp_path / "x.model").exists()
