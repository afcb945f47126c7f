"""How a training goes: when it ends, at which rate, what it never sees, and what it reports to."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from ptychodask.cli import app
from ptychodask.errors import PtychodaskError
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.training import TrainingSpec, split_patterns, train
from ptychodask.training.callbacks import PLATEAU_EPOCHS, TrainingCallback

N = 16

SMALL = {"members": 1, "levels": 1, "projections_before": 0, "projections_after": 0, "batch_size": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("course") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=2)
    return path


@pytest.fixture
def without_gain(monkeypatch):
    """Trainings whose held-out loss never falls after the first epoch."""
    judge = TrainingCallback._judge
    monkeypatch.setattr(TrainingCallback, "_judge", lambda self, loss: judge(self, 1.0 + len(self.log)))


def test_patience_ends_a_training_that_gains_nothing(store, tmp_path, without_gain):
    model = train(store, out=tmp_path / "p.model", epochs=30, patience=2, loss="mae", **SMALL)
    assert len(model.history) == 3


def test_patience_ends_a_stage_and_the_next_one_begins(store, tmp_path, without_gain):
    model = train(store, out=tmp_path / "p.model", epochs=30, patience=2, loss="staged", **SMALL)
    assert len(model.history) == 6


def test_the_best_epoch_is_kept_when_patience_ends(store, tmp_path, without_gain):
    one = train(store, out=tmp_path / "one.model", epochs=1, schedule="constant", loss="amplitude", **SMALL)
    more = train(store, out=tmp_path / "m.model", epochs=9, patience=1, schedule="constant", loss="amplitude", **SMALL)
    assert len(more.history) == 2
    assert more.content_hash == one.content_hash


def test_each_schedule_has_its_rates(store, tmp_path, without_gain):
    def rates(schedule):
        fields = SMALL | {"epochs": 2 + PLATEAU_EPOCHS, "loss": "amplitude", "learning_rate": 1e-3}
        model = train(store, out=tmp_path / f"{schedule}.model", schedule=schedule, **fields)
        return [entry["learning_rate"] for entry in model.history]

    assert rates("constant") == [1e-3] * (2 + PLATEAU_EPOCHS)
    assert rates("plateau") == [1e-3] * (1 + PLATEAU_EPOCHS) + [5e-4]
    cosine = 0.5e-3 * (1 + np.cos(np.pi * np.arange(1, 3 + PLATEAU_EPOCHS) / (2 + PLATEAU_EPOCHS)))
    np.testing.assert_allclose(rates("cosine"), cosine, atol=1e-12)


@pytest.mark.parametrize("validation", ["random", "right"])
def test_excluded_patterns_are_neither_trained_on_nor_held_out(store, validation):
    scan = open_scan(store)
    spec = TrainingSpec(exclude=np.arange(0, 60, 3), validation=validation, validation_fraction=0.1)
    if validation == "right":
        scan = type(scan)(**{**vars(scan), "probe": np.pad(np.ones((1, 2, 2), np.complex64), ((0, 0), (7, 7), (7, 7)))})
    training, held_out = split_patterns(scan, spec)
    assert not set(spec.exclude) & (set(training) | set(held_out))
    assert len(held_out) == 4
    assert spec == TrainingSpec(exclude=list(range(0, 60, 3)), validation=validation, validation_fraction=0.1)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ([60], "exclude names pattern 60, the scan has 60"),
        (range(60), "exclude names all of its patterns"),
        ([-1], "expected pattern indices"),
        ([0.5], "type float64, expected pattern indices"),
    ],
)
def test_patterns_that_cannot_be_excluded_are_refused(store, exclude, message):
    with pytest.raises(PtychodaskError, match=message):
        split_patterns(open_scan(store), TrainingSpec(exclude=exclude))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"patience": 0}, "patience is 0"), ({"schedule": "cyclic"}, "schedule is 'cyclic', expected one of: cosine")],
)
def test_a_course_that_goes_nowhere_is_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        TrainingSpec(**fields)


def test_the_flags_of_the_command_line_reach_the_training(tmp_path, monkeypatch):
    given = {}

    def fake(store, **options):
        given.update(options, store=store)
        return SimpleNamespace(path="x.model", history=[{"seconds": 1.0, "held_out_loss": 0.5}])

    monkeypatch.setattr(sys.modules["ptychodask.training.train"], "train", fake)
    np.save(tmp_path / "e.npy", np.arange(3))
    flags = "--patience 4 --schedule plateau --tv 0.1 --probe-rate 5 --accumulation 2 --precision mixed"
    flags += " --attention --resume"
    arguments = [
        "train",
        "a.zarr",
        "b.zarr",
        *flags.split(),
        "--exclude",
        str(tmp_path / "e.npy"),
        "--log-to",
        "mlflow:x",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [str(store) for store in given["store"]] == ["a.zarr", "b.zarr"]
    np.testing.assert_array_equal(given.pop("exclude"), np.arange(3))
    expected = {"patience": 4, "schedule": "plateau", "tv": 0.1, "accumulation": 2, "precision": "mixed"}
    expected |= {"attention": True, "resume": True, "log_to": "mlflow:x", "probe_rate": 5.0}
    assert {name: given[name] for name in expected} == expected
    assert "freeze_encoder" not in given
