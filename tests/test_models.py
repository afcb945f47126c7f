"""Networks and bundles: what is saved is what was there, and shapes, batches and optics keep their promises."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.forward import diffract
from ptychodask.models import Model, ModelSpec, Optics, load_model, save_model
from ptychodask.models.networks import build_network
from ptychodask.probes import disc_probe, illumination, zone_plate_probe
from ptychodask.scan import Scan

N = 16


def optics(normalization=0.5):
    return Optics(disc_probe(N, diameter_px=8) * 20, normalization, np.ones((N, N), np.float32))


def random_model(seed=0, **fields):
    """A model whose every weight is random, so that no path through it is zero."""
    spec = ModelSpec(**{"n_pixels": N, "members": 4, "levels": 2, **fields})
    rng = np.random.default_rng(seed)
    shapes = [weight.shape for weight in build_network(spec, optics()).weights]
    weights = [rng.normal(scale=0.1, size=shape).astype(np.float32) for shape in shapes]
    return Model(spec, weights, optics())


def inputs(n_groups, members=4, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.random((n_groups, N, N, members), dtype=np.float32)
    offset = rng.uniform(-2, 2, size=(n_groups, members, 2)).astype(np.float32)
    return x, offset


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_an_untrained_pinn_without_projections_is_flat():
    spec = ModelSpec(n_pixels=N, levels=2, projections_before=0, projections_after=0, object_amplitude=0.7)
    network = build_network(spec, optics())
    patches = Model(spec, network.get_weights(), optics()).predict(*inputs(2))
    np.testing.assert_allclose(patches, 0.7, atol=1e-6)


def untrained_patch(probe, amplitude):
    """What a network that nothing was learnt by makes of one measured amplitude (N, N)."""
    factor = float(N / 2 / np.sqrt((amplitude**2).sum()))
    bound = Optics(probe, factor, np.ones((N, N), np.float32))
    spec = ModelSpec(n_pixels=N, members=1, levels=2)
    untrained = Model(spec, build_network(spec, bound).get_weights(), bound)
    return untrained.predict(factor * amplitude[None, ..., None], np.zeros((1, 1, 2), np.float32))[0, 0]


def test_an_untrained_pinn_explains_the_data_better_than_a_flat_object():
    probe = zone_plate_probe(N, outer_px=8, stop_px=2, defocus=2.0) * 30
    y, x = np.indices((N, N))
    truth = (1 + 0.2 * np.exp(1j * y / 3) * np.cos(x / 2)).astype(np.complex64)
    patch = untrained_patch(probe, np.sqrt(diffract(probe * truth)).astype(np.float32))

    amplitude = np.sqrt(diffract(probe * truth))

    def misfit(patch):
        return np.abs(np.sqrt(diffract(probe * patch)) - amplitude).sum()

    assert misfit(patch) < 0.5 * misfit(np.ones((N, N)))


@pytest.mark.parametrize("transmission", [0.2, 1.0, 3.0])
def test_the_amplitude_has_the_scale_of_the_probe_whatever_it_is(transmission):
    probe = zone_plate_probe(N, outer_px=8, stop_px=2, defocus=2.0) * 30
    y, x = np.indices((N, N))
    truth = (transmission * (1 + 0.1 * np.cos(x / 2) * np.exp(1j * y / 3))).astype(np.complex64)
    patch = untrained_patch(probe, np.sqrt(diffract(probe * truth)).astype(np.float32))
    assert np.average(np.abs(patch) / np.abs(truth), weights=illumination(probe)) == pytest.approx(1, abs=0.02)


def test_the_flat_object_is_not_dimmer_for_light_that_bad_pixels_hide():
    probe = disc_probe(N, diameter_px=8) * 20
    mask = np.ones((N, N), np.float32)
    mask[N // 2 - 1 : N // 2 + 2, N // 2 - 1 : N // 2 + 2] = 0
    seen = float((diffract(probe * np.complex64(0.7)) * mask).sum())
    assert seen < 0.5 * float(diffract(probe * np.complex64(0.7)).sum())
    assert Optics(probe, float(N / 2 / np.sqrt(seen)), mask).flat_amplitude() == pytest.approx(0.7, rel=1e-5)


def test_a_bundle_from_before_there_was_momentum_has_none_and_keeps_its_hash(tmp_path):
    saved = save_model(random_model(momentum=0.0), tmp_path / "old.model")
    described = json.loads((tmp_path / "old.model" / "model.json").read_text())
    del described["spec"]["momentum"]
    (tmp_path / "old.model" / "model.json").write_text(json.dumps(described))
    loaded = load_model(tmp_path / "old.model")
    assert (loaded.spec.momentum, loaded.content_hash) == (0.0, saved.content_hash)


@pytest.mark.parametrize("members", [1, 4, 9])
def test_patches_come_one_for_each_member(members):
    patches = random_model(members=members).predict(*inputs(3, members))
    assert patches.shape == (3, members, N, N)
    assert patches.dtype == np.complex64
    assert np.isfinite(patches).all()


def test_predictions_do_not_depend_on_the_batch(model):
    x, offset = inputs(41)
    whole = model.predict(x, offset)
    for batch_size in (1, 7, 41):
        call = model.compile(batch_size)
        last = 41 - 41 % batch_size
        parts = [call(x[i : i + batch_size], offset[i : i + batch_size]) for i in range(0, last, batch_size)]
        np.testing.assert_allclose(np.concatenate(parts), whole[:last], atol=1e-5 * np.median(np.abs(whole)))


def test_a_network_is_compiled_once_and_forgotten_with_the_model(monkeypatch):
    model, compiled = random_model(seed=7), []
    compile_ = type(model).compile
    monkeypatch.setattr(type(model), "compile", lambda *given: compiled.append(1) or compile_(*given))
    x, offset = inputs(3)
    first = model.predict(x, offset)
    np.testing.assert_array_equal(model.predict(x, offset), first)
    assert len(compiled) == 1
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_two_models_in_one_process_do_not_disturb_each_other(model):
    x, offset = inputs(3)
    before = model.predict(x, offset)
    other = random_model(seed=5).predict(x, offset)
    assert np.abs(other - before).max() > 1e-3
    np.testing.assert_array_equal(model.predict(x, offset), before)


def test_a_saved_model_predicts_the_same_to_the_bit(model, tmp_path):
    saved = save_model(model, tmp_path / "a.model")
    loaded = load_model(tmp_path / "a.model")
    x, offset = inputs(5)
    np.testing.assert_array_equal(loaded.predict(x, offset), model.predict(x, offset))
    assert loaded.content_hash == saved.content_hash == model.content_hash
    assert loaded.path == str(tmp_path / "a.model")
    assert loaded.spec == model.spec


def test_a_bundle_holds_no_pickle(model, tmp_path):
    save_model(model, tmp_path / "a.model")
    files = {path.name for path in (tmp_path / "a.model").iterdir()}
    assert files == {"model.json", "weights.npz", "optics.npz", "history.csv"}
    for name in ("weights.npz", "optics.npz"):
        with np.load(tmp_path / "a.model" / name, allow_pickle=False) as archive:
            assert all(archive[key].dtype != object for key in archive.files)


def scan_for(normalization=0.25, n_pixels=N):
    probe = disc_probe(n_pixels, diameter_px=6) * 10
    return Scan(
        diffraction=np.ones((2, n_pixels, n_pixels), np.uint16),
        position_yx_px=np.zeros((2, 2)),
        probe=probe,
        domain="counts",
        normalization=normalization,
    )


def test_binding_takes_the_optics_of_the_scan_and_keeps_the_weights(model):
    bound = model.bind(scan_for())
    assert bound.optics.normalization == 0.25
    assert bound.content_hash == model.content_hash
    assert np.abs(bound.predict(*inputs(2)) - model.predict(*inputs(2))).max() > 1e-3


def test_a_model_for_another_size_is_refused(model):
    with pytest.raises(PtychodaskError, match="takes patterns of 16 pixels, the scan has 24"):
        model.bind(scan_for(n_pixels=24))


def test_inputs_of_the_wrong_shape_are_refused(model):
    x, offset = inputs(2)
    with pytest.raises(PtychodaskError, match=r"X has shape .*, expected \(group, 16, 16, 4\)"):
        model.predict(x[..., :3], offset)
    with pytest.raises(PtychodaskError, match="offsets have shape"):
        model.predict(x, offset[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gan"}, "kind is 'gan', expected one of: pinn, baseline"),
        ({"kind": "baseline", "members": 4}, "one pattern at a time, found members=4"),
        ({"members": 0}, "members is 0, expected a whole number from 1 to 64"),
        ({"n_filters_scale": 10**6}, "n_filters_scale is 1000000"),
        ({"levels": 1.5}, "levels is 1.5"),
        ({"n_pixels": 20, "levels": 3}, "not divisible by"),
        ({"object_amplitude": float("nan")}, "object_amplitude is nan"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number from 0 to less than 1"),
        ({"projections_after": -1}, "projections_after is -1"),
    ],
)
def test_a_spec_that_makes_no_network_is_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        ModelSpec(**fields)


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def test_damaged_foreign_and_newer_bundles_are_refused_in_one_line(model, tmp_path):
    with pytest.raises(PtychodaskError, match="no such model"):
        load_model(tmp_path / "missing.model")
    with pytest.raises(PtychodaskError, match="is not a model bundle"):
        load_model(tmp_path)
    cases = [
        ("model.json", lambda _: b"", "model.json cannot be read"),
        ("model.json", lambda _: b"[]", "is not a model bundle"),
        ("model.json", lambda b: b.replace(b'"format_version": 1', b'"format_version": 99'), "has format version 99"),
        ("model.json", lambda b: b.replace(b'"levels"', b'"storeys"'), "spec cannot be read"),
        ("model.json", lambda b: b.replace(b'"levels": 2', b'"levels": 1'), "hash differs"),
        (
            "model.json",
            lambda b: b.replace(b'"trained_on": {', b'"trained_on": [], "was": {'),
            "model.json cannot be read .not a JSON",
        ),
        ("weights.npz", lambda b: b[: len(b) // 2], "cannot be read"),
        ("optics.npz", lambda _: b"", "cannot be read"),
    ]
    for number, (name, change, message) in enumerate(cases):
        folder = tmp_path / f"{number}.model"
        save_model(model, folder)
        spoil(folder, name, change)
        with pytest.raises(PtychodaskError, match=message) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"normalization": np.ones(3)}, {"mask": np.ones(2)}, {"probe": np.ones((1, 8, 8), np.complex64)}]
)
def test_optics_of_another_shape_are_refused(model, tmp_path, changes):
    save_model(model, tmp_path / "a.model")
    with np.load(tmp_path / "a.model" / "optics.npz") as stored:
        arrays = dict(stored)
    np.savez(tmp_path / "a.model" / "optics.npz", **(arrays | changes))
    with pytest.raises(PtychodaskError, match="does not contain the optics"):
        load_model(tmp_path / "a.model")


def test_changed_weights_are_noticed(model, tmp_path):
    save_model(model, tmp_path / "a.model")
    save_model(random_model(seed=9), tmp_path / "b.model")
    (tmp_path / "a.model" / "weights.npz").write_bytes((tmp_path / "b.model" / "weights.npz").read_bytes())
    with pytest.raises(PtychodaskError, match="hash differs"):
        load_model(tmp_path / "a.model")


def test_a_pickle_among_the_weights_does_not_run(model, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return open, (str(canary), "w")

    save_model(model, tmp_path / "a.model")
    np.savez(tmp_path / "a.model" / "weights.npz", w0000=np.array([Malicious()], dtype=object), allow_pickle=True)
    with pytest.raises(PtychodaskError, match="contains pickled Python objects, which are never loaded"):
        load_model(tmp_path / "a.model")
    assert not canary.exists()


def test_an_existing_bundle_is_kept_unless_told(model, tmp_path):
    save_model(model, tmp_path / "a.model")
    with pytest.raises(PtychodaskError, match="exists already"):
        save_model(model, tmp_path / "a.model")
    save_model(replace(model, history=[{"epoch": 1.0, "seconds": 2.5}]), tmp_path / "a.model", overwrite=True)
    assert load_model(tmp_path / "a.model").history == [{"epoch": 1.0, "seconds": 2.5}]
    assert json.loads((tmp_path / "a.model" / "model.json").read_text())["format"] == "ptychodask-model"
