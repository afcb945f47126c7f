"""Penalties, frozen layers, precision, steps of several batches and devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from models_for_tests import when_installed

from ptychodask.errors import PtychodaskError
from ptychodask.models import ModelSpec, Optics, load_model
from ptychodask.models.networks import build_network, disagreement, encoder_layers, total_variation, with_penalties
from ptychodask.probes import disc_probe, illumination
from ptychodask.simulate import simulate
from ptychodask.training import TrainingSpec, train

N = 16

SMALL = {"members": 2, "neighbours": 3, "levels": 1, "projections_before": 1, "projections_after": 0, "batch_size": 8}
SHORT = SMALL | {"epochs": 1, "loss": "amplitude"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("terms") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=2)
    return path


@pytest.fixture(scope="module")
def plain(store, tmp_path_factory):
    return train(store, out=tmp_path_factory.mktemp("plain") / "plain.model", **SHORT)


def ramp(slope_y, slope_x):
    y, x = np.indices((N, N), dtype=np.float32)
    flat = np.ones((1, 2, 1, 1), np.float32)
    return (flat * (slope_y * y + slope_x * x), np.zeros((1, 2, N, N), np.float32))


def test_the_total_variation_of_a_ramp_is_its_slope():
    weight = illumination(disc_probe(N, diameter_px=8))
    assert float(total_variation(ramp(0.3, 0.4), weight)) == pytest.approx(0.5, rel=1e-4)
    assert float(total_variation(ramp(0.0, 0.0), weight)) < 2e-4


def test_members_that_see_one_object_do_not_disagree():
    weight = illumination(disc_probe(N, diameter_px=8))
    offset = np.array([[[1.0, 0.0], [-1.0, 0.0]]], np.float32)
    y = np.arange(N, dtype=np.float32)[:, None] * np.ones(N, np.float32)
    seen = np.stack([y + 1.0, y - 1.0])[None]
    unseen = np.stack([y - 1.0, y + 1.0])[None]
    zero = np.zeros_like(seen)
    agree, differ = (float(disagreement((each, zero), weight, offset)) for each in (seen, unseen))
    assert agree < 0.05 * differ


def test_penalties_are_added_to_the_loss_and_change_no_patch():
    optics = Optics(disc_probe(N, diameter_px=8) * 20, 0.5, np.ones((N, N), np.float32))
    spec = ModelSpec(n_pixels=N, members=2, levels=1, object_amplitude=2.0)
    network = build_network(spec, optics)
    rng = np.random.default_rng(0)
    inputs = [rng.random((3, N, N, 2), dtype=np.float32), rng.normal(size=(3, 2, 2)).astype(np.float32)]
    patches = np.asarray(network(inputs))
    penalised = with_penalties(network, spec, optics, tv=0.5, real_space=0.25)
    np.testing.assert_array_equal(np.asarray(penalised(inputs)), patches)
    parts = (patches[..., 0] / 2, patches[..., 1] / 2)
    expected = 0.5 * float(total_variation(parts, optics.weight))
    expected += 0.25 * float(disagreement(parts, optics.weight, inputs[1]))
    assert sum(float(loss) for loss in penalised.losses) == pytest.approx(expected, rel=1e-4)


def test_a_training_with_every_term_ends(store, plain, tmp_path):
    model = train(store, out=tmp_path / "t.model", tv=0.1, real_space=0.1, accumulation=2, attention=True, **SHORT)
    assert model.history[-1]["loss"] > plain.history[-1]["loss"]
    loaded = load_model(model.path)
    assert (loaded.spec.attention, loaded.content_hash) == (True, model.content_hash)


def test_a_frozen_encoder_keeps_its_weights_and_the_rest_learns(store, plain, tmp_path):
    tuned = train(store, out=tmp_path / "f.model", initial=plain, freeze_encoder=True, **SHORT)
    before, after = plain.network(), tuned.network()
    frozen = {layer.name for layer in encoder_layers(before)}
    assert frozen == {"down0_a", "down0_b", "bottom_a", "bottom_b"}
    for old, new in zip(before.layers, after.layers, strict=True):
        same = [np.array_equal(a, b) for a, b in zip(old.get_weights(), new.get_weights(), strict=True)]
        assert all(same) if old.name in frozen else not any(same)
    with pytest.raises(PtychodaskError, match="pass initial="):
        train(store, out=tmp_path / "g.model", freeze_encoder=True, **SHORT)


def test_mixed_precision_trains_float32_weights_and_leaves_the_physics_alone(store, plain, tmp_path):
    network = build_network(plain.spec, plain.optics, "mixed")
    for layer in network.layers:
        narrow = layer.name.startswith(("down", "bottom", "up", "pool", "grow", "join"))
        assert layer.compute_dtype == ("bfloat16" if narrow else "float32"), layer.name
    mixed = train(store, out=tmp_path / "m.model", precision="mixed", **SHORT)
    assert all(weight.dtype == np.float32 for weight in mixed.weights)
    assert mixed.history[-1]["held_out_loss"] == pytest.approx(plain.history[-1]["held_out_loss"], rel=0.05)
    assert keras.config.dtype_policy().name == "float32"


def test_the_rate_grows_with_the_step():
    spec = TrainingSpec(batch_size=32, accumulation=4, learning_rate=1e-3, scale_learning_rate=True)
    assert spec.first_learning_rate == pytest.approx(8e-3)
    assert TrainingSpec(batch_size=32, learning_rate=1e-3).first_learning_rate == 1e-3


TWO_DEVICES = """
import json, os, sys
if os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
from ptychodask.training import train
for devices in (1, 2):
    train(sys.argv[1], out=f"{sys.argv[2]}/{devices}.model", devices=devices, **json.loads(sys.argv[3]))
"""


@pytest.mark.parametrize("backend", ["tensorflow", when_installed("jax")])
def test_two_devices_that_share_each_batch_learn_what_one_learns(store, tmp_path, backend):
    code = [sys.executable, "-c", TWO_DEVICES, str(store), str(tmp_path), json.dumps(SHORT)]
    devices = {
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(code, env=os.environ | devices, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_model(tmp_path / f"{devices}.model") for devices in (1, 2))
    # Adam divides by the gradient's size, so that rounding moves single weights by up to the rate, 1e-3.
    for a, b in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3)
    assert two.history[-1]["held_out_loss"] == pytest.approx(one.history[-1]["held_out_loss"], rel=1e-3)


def test_devices_that_are_not_there_are_refused(store, tmp_path):
    with pytest.raises(PtychodaskError, match="devices is 8, this process has"):
        train(store, out=tmp_path / "d.model", devices=8, **SHORT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tv": -1.0}, "tv is -1.0, expected 0 or more"),
        ({"real_space": 0.1, "members": 1}, "compares members and groups have only one"),
        ({"devices": 3}, "batch_size is 16, not divisible among 3 devices"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"precision": "half"}, "precision is 'half', expected one of: float32, mixed"),
    ],
)
def test_terms_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        TrainingSpec(**fields)
