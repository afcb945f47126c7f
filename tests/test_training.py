"""Training: the split, the stream, the losses, and what a short run must achieve."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.models import Optics, load_model
from ptychodask.models.description import epochs_of
from ptychodask.probes import disc_probe, illuminated_radius_px
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.write import write_scan
from ptychodask.training import (
    GroupStream,
    TrainingSpec,
    amplitude_loss,
    amplitude_target,
    groups_within,
    judging_groups,
    mae_loss,
    member_offsets,
    patch_target,
    poisson_loss,
    seed_alone,
    split_patterns,
    train,
)

N = 16

SHORT = {"epochs": 2, "batch_size": 8, "levels": 2, "neighbours": 5, "validation_fraction": 0.2}
SHORT |= {"projections_before": 1, "projections_after": 1, "loss": "amplitude"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=120, step_px=3.0, dose=1e5, probe="zone_plate", seed=2)
    return path


@pytest.fixture(scope="module")
def scan(store):
    return open_scan(store)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return train(store, out=tmp_path_factory.mktemp("models") / "pinn.model", **SHORT)


def test_random_split_parts_the_patterns(scan):
    training, held_out = split_patterns(scan, TrainingSpec(validation_fraction=0.25))
    assert len(held_out) == 30
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(120))


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_side_held_out_shares_no_light_with_the_rest(scan, side):
    scan = replace(scan, probe=disc_probe(N, diameter_px=4))
    training, held_out = split_patterns(scan, TrainingSpec(validation=side, validation_fraction=0.3))
    distance = np.abs(scan.position_yx_px[training][:, None] - scan.position_yx_px[held_out]).max(axis=-1)
    assert distance.min() >= 2 * illuminated_radius_px(scan.probe)
    axis, sign = {"left": (1, -1), "right": (1, 1), "top": (0, -1), "bottom": (0, 1)}[side]
    middle = sign * np.median(scan.position_yx_px[:, axis])
    assert (sign * scan.position_yx_px[held_out, axis]).mean() > middle


def test_a_split_that_leaves_nothing_is_refused(scan):
    with pytest.raises(PtychodaskError, match="leaves 0 patterns to train on"):
        split_patterns(scan, TrainingSpec(validation="left", validation_fraction=0.95))


def test_groups_stay_within_their_patterns(scan):
    patterns = np.arange(0, 120, 2)
    assert set(groups_within(scan, patterns, GroupingSpec()).ravel()) <= set(patterns)


def stream_of(scan, member, **options):
    return GroupStream(scan, member, amplitude_target(scan), **{"batch_size": 8, "shuffle": True, "seed": 0} | options)


def test_an_epoch_gives_each_group_once_with_its_own_patterns_and_offsets(scan):
    member = groups_within(scan, np.arange(120), GroupingSpec(members=3, neighbours=5))
    stream = stream_of(scan, member)
    expected = {
        tuple(offset.ravel()): scan.amplitude(row)
        for row, offset in zip(member, member_offsets(scan, member), strict=True)
    }
    assert len(stream) * 8 == 120
    seen = set()
    for i in range(len(stream)):
        (x, offset), amplitude = stream[i]
        for one_x, one_offset, one_amplitude in zip(x, offset, amplitude, strict=True):
            seen.add(tuple(one_offset.ravel()))
            np.testing.assert_allclose(one_amplitude, expected[tuple(one_offset.ravel())], rtol=1e-6)
            np.testing.assert_allclose(np.moveaxis(one_x, -1, 0), one_amplitude * scan.normalization, rtol=1e-6)
    assert seen == set(expected)


def test_a_small_buffer_gives_the_same_groups(scan, monkeypatch):
    member = groups_within(scan, np.arange(120), GroupingSpec(members=3, neighbours=5))
    monkeypatch.setattr("ptychodask.training.batches.BUFFER_BYTES", 2 * 8 * 3 * N * N * 4)
    stream = stream_of(scan, member)
    for _ in range(2):
        seen = [tuple(row) for i in range(len(stream)) for row in stream[i][0][1].reshape(8, -1)]
        assert set(seen) == {tuple(row) for row in member_offsets(scan, member).reshape(120, -1)}
        stream.on_epoch_end()


def test_a_stream_holds_no_more_than_its_buffer(scan, monkeypatch):
    largest = []
    monkeypatch.setattr("ptychodask.training.batches.BUFFER_BYTES", 2 * 8 * N * N * 4)
    monkeypatch.setattr(
        type(scan), "network_input", lambda self, index: largest.append(len(index)) or self.amplitude(index)
    )
    stream = stream_of(scan, np.arange(120, dtype=np.int32)[:, None])
    for i in range(len(stream)):
        stream[i]
    assert max(largest) <= 16


def test_the_truth_is_cut_at_the_positions(scan):
    member = np.array([[5], [70]], np.int32)
    patches = patch_target(scan)(member, np.empty(0))
    corner = np.asarray(scan.truth.corner_yx_px)
    for pattern, patch in zip(member[:, 0], patches[:, 0], strict=True):
        place = scan.position_yx_px[pattern] - corner
        near = scan.truth.object[tuple(np.round(place).astype(int))]
        assert abs(patch[N // 2, N // 2, 0] + 1j * patch[N // 2, N // 2, 1] - near) < 0.2


def test_losses_vanish_at_the_data_and_agree_at_high_counts(scan):
    counts = (scan.amplitude(slice(0, 4)) ** 2)[None] * 1e4
    optics = replace(Optics.of(scan), normalization=scan.normalization / 100)
    for make in (amplitude_loss, poisson_loss):
        assert float(make(optics)(np.sqrt(counts), counts)) < 1e-6
    moved = counts * 1.02
    assert float(poisson_loss(optics)(np.sqrt(counts), moved)) == pytest.approx(
        float(amplitude_loss(optics)(np.sqrt(counts), moved)), rel=0.02
    )


def test_losses_stay_finite_where_no_light_is_expected(scan):
    optics = Optics.of(scan)
    bright = np.full((1, 1, N, N), 1e4, np.float32)
    for make in (amplitude_loss, poisson_loss):
        assert np.isfinite(float(make(optics)(bright, np.zeros_like(bright))))


def test_members_without_a_target_are_not_judged(scan):
    optics = Optics.of(scan)
    counts = (scan.amplitude(slice(0, 3)) ** 2)[None]
    seed = np.sqrt(counts)
    seed[:, 1:] = np.nan
    for make in (amplitude_loss, mae_loss, poisson_loss):
        judged = float(make(optics)(seed, 2 * counts))
        assert judged == pytest.approx(float(make(optics)(np.sqrt(counts[:, :1]), 2 * counts[:, :1])), rel=1e-5)


def test_patterns_held_out_at_random_are_judged_among_their_neighbours(scan):
    training, held_out = split_patterns(scan, TrainingSpec(validation_fraction=0.05))
    member = judging_groups(scan, training, held_out, GroupingSpec(neighbours=5))
    np.testing.assert_array_equal(np.sort(member[:, 0]), held_out)
    assert np.isin(member[:, 1:], training).any()
    target = seed_alone(amplitude_target(scan))(member, np.ones((len(member), 4, N, N), np.float32))
    assert np.isfinite(target[:, 0]).all()
    assert np.isnan(target[:, 1:]).all()


def test_bad_pixels_do_not_count_in_a_loss(scan):
    good = np.random.default_rng(0).random((N, N)) > 0.3
    optics = replace(Optics.of(scan), mask=good.astype(np.float32))
    counts = (scan.amplitude(slice(0, 2)) ** 2)[None]
    spoiled = np.where(good, np.sqrt(counts), 0)
    for make in (amplitude_loss, poisson_loss):
        assert float(make(optics)(spoiled, counts)) < 1e-6


def test_training_lowers_the_held_out_loss_and_records_the_model(store, trained):
    assert trained.history[-1]["held_out_loss"] < 1
    assert [entry["epoch"] for entry in trained.history] == list(range(1, len(trained.history) + 1))
    recorded = open_scan(store).attributes["models"][-1]
    assert recorded["kind"] == "pinn"
    assert recorded["hash"] == trained.content_hash
    assert load_model(store.parent / recorded["path"]).content_hash == trained.content_hash


def test_the_saved_model_is_the_trained_one(scan, trained):
    member = groups_within(scan, np.arange(120), GroupingSpec(members=4, neighbours=5))[:9]
    x = np.moveaxis(scan.network_input(np.arange(120))[member], 1, -1)
    loaded = load_model(trained.path)
    np.testing.assert_array_equal(
        loaded.predict(x, member_offsets(scan, member)), trained.predict(x, member_offsets(scan, member))
    )


def test_the_same_seed_gives_the_same_weights(store, trained, tmp_path):
    again = train(store, out=tmp_path / "again.model", **SHORT)
    assert again.content_hash == trained.content_hash


def test_fine_tuning_starts_from_given_weights(store, trained, tmp_path):
    tuned = train(store, out=tmp_path / "tuned.model", initial=trained, **SHORT | {"learning_rate": 1e-9})
    for before, after in zip(trained.weights, tuned.weights, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    with pytest.raises(PtychodaskError, match="levels is 2, requested 1"):
        train(store, out=tmp_path / "other.model", initial=trained, **SHORT | {"levels": 1})


def test_a_baseline_learns_from_the_truth(store, scan, tmp_path):
    model = train(store, model="baseline", out=tmp_path / "b.model", epochs=3, batch_size=8, levels=2)
    assert (model.kind, model.members) == ("baseline", 1)
    assert model.history[-1]["loss"] < model.history[0]["loss"]


def test_supervised_training_without_truth_is_refused_before_anything_is_built(scan, tmp_path, monkeypatch):
    store = tmp_path / "bare.zarr"
    write_scan(
        store,
        diffraction=scan.diffraction[np.arange(20)],
        position_yx_px=scan.position_yx_px[:20],
        probe=scan.probe,
        domain="counts",
        calibration="as_given",
    )
    monkeypatch.setattr(
        sys.modules["ptychodask.training.train"], "build_network", lambda *_: pytest.fail("a network was built")
    )
    with pytest.raises(PtychodaskError, match="neither truth nor labels"):
        train(store, model="baseline", out=tmp_path / "b.model")
    assert not (tmp_path / "b.model").exists()


def test_time_ends_a_training(store, tmp_path):
    model = train(store, out=tmp_path / "t.model", **SHORT | {"epochs": 10_000, "max_minutes": 0.02})
    assert len(model.history) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "gan"}, "model is 'gan', expected one of: pinn, baseline"),
        ({"model": "baseline", "members": 4}, "one pattern at a time"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_minutes": -1.0}, "max_minutes is -1.0"),
        ({"validation": "middle"}, "validation is 'middle'"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"neighbours": 2}, "neighbours is 2 for groups of 4 members"),
        ({"storeys": 3}, "no field storeys; the fields are: .*levels"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
        ({"batch_size": 7.0}, "batch_size is 7.0, expected a whole number"),
        ({"patience": True}, "patience is True, expected a whole number"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', expected a number"),
        ({"attention": 1}, "attention is 1, expected True or False"),
        ({"seed": 0.0}, "seed is 0.0, expected a whole number"),
        ({"members": 1, "oversampling": 4}, "oversampling=4 has no effect with members=1"),
        ({"model": "baseline", "oversampling": 2}, "oversampling=2 has no effect with members=1"),
    ],
)
def test_a_spec_that_trains_nothing_is_refused(store, tmp_path, fields, message):
    with pytest.raises(PtychodaskError, match=message):
        train(store, out=tmp_path / "x.model", **fields)


def test_numbers_of_numpy_are_recorded_as_plain_ones():
    spec = TrainingSpec(epochs=np.int64(3), learning_rate=np.float32(0.5), members=9)
    assert json.loads(json.dumps(spec.recorded()))["learning_rate"] == 0.5
    assert (spec.recorded()["epochs"], spec.recorded()["neighbours"]) == (3, 9)


def test_an_epoch_in_two_stages_counts_once(store, tmp_path):
    fields = SHORT | {"epochs": 1, "loss": "staged"}
    model = train(store, out=tmp_path / "s.model", **fields)
    assert [entry["epoch"] for entry in model.history] == [pytest.approx(0.5, abs=0.1), 1.0]
    assert epochs_of(model.history) == "1"


def test_an_existing_bundle_is_refused_before_training(store, trained):
    with pytest.raises(PtychodaskError, match="exists already"):
        train(store, out=trained.path, **SHORT)
