"""Stopped trainings: what is kept of them, how they go on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.models import load_model
from ptychodask.simulate import simulate
from ptychodask.training import train
from ptychodask.training.callbacks import TrainingCallback
from ptychodask.training.checkpoint import Checkpoint

N = 16

SMALL = {"members": 2, "levels": 1, "projections_before": 0, "projections_after": 0}
SHORT = SMALL | {"epochs": 5, "batch_size": 8, "validation_fraction": 0.2}

KILLED = """
import json, os, signal, sys
from ptychodask.training.callbacks import TrainingCallback
from ptychodask.training import train

on_epoch_end = TrainingCallback.on_epoch_end
def and_die(self, epoch, logs=None):
    on_epoch_end(self, epoch, logs)
    if len(self.log) == {epoch}:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingCallback.on_epoch_end = and_die
train({store!r}, out={out!r}, **json.loads({fields!r}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "scan.zarr"
    simulate(path, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=2)
    return path


def kill_training(store, out, epoch):
    code = KILLED.format(epoch=epoch, store=str(store), out=str(out), fields=json.dumps(SHORT))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -9


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The training that nobody stopped."""
    return train(store, out=tmp_path_factory.mktemp("whole") / "whole.model", **SHORT)


def curve(model):
    return [(entry["epoch"], entry["loss"], entry["held_out_loss"], entry["learning_rate"]) for entry in model.history]


# A staged training of 5 epochs changes its loss in the middle of the third.
@pytest.mark.parametrize("epoch", [2, 3])
def test_a_killed_training_goes_on_to_the_same_curve_and_the_same_weights(store, whole, tmp_path, epoch):
    out = tmp_path / "killed.model"
    kill_training(store, out, epoch)
    folder = tmp_path / ".killed.model.training"
    assert {path.name for path in folder.iterdir()} == {"training.json", "state.npz", "log.csv"}
    assert len((folder / "log.csv").read_text().splitlines()) == 1 + epoch
    assert not out.exists()
    with pytest.raises(PtychodaskError, match=r"pass resume=True .* or overwrite=True"):
        train(store, out=out, **SHORT)
    with pytest.raises(PtychodaskError, match=r"another training .*levels .*learning_rate was 0.001, is 0.002"):
        train(store, out=out, resume=True, **SHORT | {"learning_rate": 2e-3, "levels": 2})
    resumed = train(store, out=out, resume=True, **SHORT)
    assert curve(resumed) == curve(whole)
    assert resumed.content_hash == whole.content_hash == load_model(out).content_hash
    assert not folder.exists()


def interrupt_second_epoch(store, out, monkeypatch, fields):
    on_train_batch_end = TrainingCallback.on_train_batch_end

    def end_or_interrupt(self, batch, logs=None):
        if self.log:
            raise KeyboardInterrupt
        on_train_batch_end(self, batch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingCallback, "on_train_batch_end", end_or_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(store, out=out, **fields)


@pytest.fixture
def stopped(store, tmp_path, monkeypatch):
    """A bundle whose training was interrupted in its second epoch."""
    interrupt_second_epoch(store, tmp_path / "stopped.model", monkeypatch, SHORT)
    return tmp_path / "stopped.model"


def test_several_scans_with_every_term_go_on_to_the_same_weights(store, tmp_path, monkeypatch):
    other = tmp_path / "other.zarr"
    simulate(other, n_pixels=N, n_patterns=40, step_px=3.0, dose=1e4, probe="disc", seed=3)
    fields = SHORT | {
        "epochs": 3,
        "neighbours": 3,
        "loss": "amplitude",
        "accumulation": 2,
        "tv": 0.1,
        "real_space": 0.1,
    }
    fields |= {"schedule": "plateau", "patience": 2}
    whole = train([store, other], out=tmp_path / "whole.model", **fields)
    interrupt_second_epoch([store, other], tmp_path / "stopped.model", monkeypatch, fields)
    resumed = train([store, other], out=tmp_path / "stopped.model", resume=True, **fields)
    assert curve(resumed) == curve(whole)
    assert resumed.content_hash == whole.content_hash


def test_another_scan_is_refused_by_name(store, stopped, tmp_path):
    other = tmp_path / "other.zarr"
    simulate(other, n_pixels=N, n_patterns=60, step_px=3.0, dose=1e5, probe="zone_plate", seed=3)
    with pytest.raises(PtychodaskError, match=r"another training .*data hash was"):
        train(other, out=stopped, resume=True, **SHORT)


def test_the_time_that_a_stopped_run_spent_counts(store, tmp_path):
    fields = SHORT | {"epochs": 3, "max_minutes": 60, "loss": "amplitude"}
    kept = []
    write = Checkpoint.write
    with pytest.MonkeyPatch.context() as patch:

        def write_and_stop(self, snapshot):
            write(self, snapshot)
            kept.append(snapshot.state["spent_s"])
            raise KeyboardInterrupt

        patch.setattr(Checkpoint, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(store, out=tmp_path / "t.model", **fields)
    resumed = train(store, out=tmp_path / "t.model", resume=True, **fields)
    assert len(resumed.history) == 3
    assert resumed.history[1]["seconds"] >= kept[0]


def test_overwriting_forgets_a_stopped_run(store, stopped):
    fields = SHORT | {"epochs": 1, "loss": "amplitude"}
    assert len(train(store, out=stopped, overwrite=True, **fields).history) == 1
    assert not stopped.with_name(".stopped.model.training").exists()


def test_a_damaged_checkpoint_is_refused_with_the_way_out(store, stopped):
    for name, content in (("state.npz", b""), ("training.json", b"{")):
        (stopped.with_name(".stopped.model.training") / name).write_bytes(content)
        with pytest.raises(PtychodaskError, match=f"{name}: cannot be read .*overwrite=True"):
            train(store, out=stopped, resume=True, **SHORT)


def test_a_checkpoint_holds_no_pickle(stopped):
    with np.load(stopped.with_name(".stopped.model.training") / "state.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_resuming_what_was_never_begun_begins_it(store, tmp_path):
    fields = SHORT | {"epochs": 1, "loss": "amplitude"}
    assert len(train(store, out=tmp_path / "new.model", resume=True, **fields).history) == 1
