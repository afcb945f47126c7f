"""Loggers: each epoch reaches them, and one that is not installed is named."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.simulate import simulate
from ptychodask.training import TrainingSpec, train
from ptychodask.training.loggers import open_logger

ENTRY = {"epoch": 1.0, "loss": 0.5}


class FakeClient:
    """Stands in for MLflow's client: notes what it is told."""

    notes: list[tuple] = []  # noqa: RUF012

    def __init__(self, tracking_uri):
        self.notes[:] = [("uri", tracking_uri)]

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment_id, run_name):
        self.notes.append(("run", experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_param(self, run_id, key, value):
        self.notes.append(("param", key, value))

    def log_metric(self, run_id, key, value, step):
        self.notes.append(("metric", key, value, step))

    def set_terminated(self, run_id, status="FINISHED"):
        self.notes.append(("end", status))


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeClient))
    return FakeClient.notes


def test_mlflow_gets_the_spec_and_every_epoch_of_a_training(mlflow, tmp_path):
    simulate(tmp_path / "s.zarr", n_pixels=16, n_patterns=40, step_px=3.0, dose=1e5, probe="disc", seed=2)
    fields = {"members": 1, "levels": 1, "projections_before": 0, "projections_after": 0, "loss": "amplitude"}
    model = train(tmp_path / "s.zarr", out=tmp_path / "m.model", log_to="mlflow:http://here", epochs=2, **fields)
    assert mlflow[:2] == [("uri", "http://here"), ("run", "ptychodask", "m.model")]
    assert ("param", "levels", "1") in mlflow
    losses = [note[2] for note in mlflow if note[:2] == ("metric", "held_out_loss")]
    assert losses == [entry["held_out_loss"] for entry in model.history]
    assert mlflow[-1] == ("end", "FINISHED")


def test_a_run_that_fails_is_marked_so(mlflow):
    run = ExitStack()
    run.enter_context(open_logger("mlflow:x", "run", TrainingSpec()))(ENTRY)
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert mlflow[-1] == ("end", "FAILED")


def test_tensorboard_gets_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    with open_logger(f"tensorboard:{tmp_path}", "run", TrainingSpec()) as record:
        record(ENTRY)
    (events,) = (tmp_path / "run").iterdir()
    assert b"loss" in events.read_bytes()


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_a_logger_that_is_not_installed_is_named(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(PtychodaskError, match=f"needs {package}, which is not installed .*pip install {package}"),
        open_logger(f"{package}:{tmp_path}", "run", TrainingSpec()),
    ):
        pass


@pytest.mark.parametrize("log_to", ["wandb:x", "mlflow", "tensorboard:"])
def test_an_unknown_logger_is_refused(log_to):
    with (
        pytest.raises(PtychodaskError, match="expected tensorboard:FOLDER or mlflow:URI"),
        open_logger(log_to, "run", TrainingSpec()),
    ):
        pass
