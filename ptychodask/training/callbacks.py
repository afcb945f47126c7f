"""Keras callback of a training: time, learning rate, best epoch, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.models.backend import keras
from ptychodask.progress import Progress
from ptychodask.training.batches import GroupStream, MixedStream
from ptychodask.training.checkpoint import Checkpoint, Snapshot
from ptychodask.training.loggers import Record
from ptychodask.training.spec import TrainingSpec

logger = logging.getLogger(__name__)


PLATEAU_EPOCHS = 3
"""Epochs without a lower held-out loss after which the rate of a `plateau` schedule halves."""


@dataclass(eq=False)
class TrainingCallback(keras.callbacks.Callback):
    """Keras callback of one training through all its stages.

    It keeps time spent, learning rate, best values of the variables and progress.
    """

    spec: TrainingSpec
    variables: Sequence[keras.Variable]
    optimizer: keras.optimizers.Optimizer
    stream: GroupStream | MixedStream
    bar: Progress
    checkpoint: Checkpoint
    record: Record
    stage: int = 0
    until: float = 1.0
    groups_seen: int = 0
    spent_s: float = 0.0
    stage_ends: bool = False
    waited: int = 0
    on_plateau: int = 0
    halvings: int = 0
    best: list[NDArray[np.float32]] = field(default_factory=list)
    best_loss: float = np.inf
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._started = time.monotonic() - self.spent_s
        self._groups_per_step = self.stream.groups_per_epoch / len(self.stream)

    def seconds(self) -> float:
        """Time spent, including earlier runs that were stopped."""
        return time.monotonic() - self._started

    def done(self) -> float:
        """Completed share of the training, 0 to 1.

        By epochs or by time, whichever is larger.
        """
        by_epochs = self.groups_seen / (self.spec.epochs * self.stream.groups_per_epoch)
        if self.spec.max_minutes is None:
            return min(1.0, by_epochs)
        return min(1.0, max(by_epochs, self.seconds() / (60 * self.spec.max_minutes)))

    def begin_stage(self, stage: int, until: float) -> None:
        """Start a stage that lasts until the share `until` of the training.

        The best loss is reset, since losses of different stages are not comparable.
        """
        if stage != self.stage or self.stage_ends:
            self.best_loss, self.waited, self.on_plateau = np.inf, 0, 0
        self.stage, self.until, self.stage_ends = stage, until, False

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        first = self.spec.first_learning_rate
        if self.spec.schedule == "constant":
            return first
        if self.spec.schedule == "plateau":
            return first * 0.5**self.halvings
        return first * 0.5 * (1 + np.cos(np.pi * self.done()))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.optimizer.learning_rate = self.learning_rate()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        seen = round((self._steps() + 1) * self._groups_per_step) - self.groups_seen
        self.groups_seen += seen
        self.bar.advance(seen)
        if self.done() >= self.until - 1e-9:
            self._end_stage()

    def _steps(self) -> int:
        return round(self.groups_seen / self._groups_per_step)

    def _end_stage(self) -> None:
        self.stage_ends = True
        self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # A stage of a staged loss may end within an epoch, which then has two entries, such as 0.5 and 1.
        entry = {"epoch": self.groups_seen / self.stream.groups_per_epoch, "seconds": round(self.seconds(), 3)}
        entry |= {"loss": float(logs["loss"]), "held_out_loss": float(logs["val_loss"])}
        entry["learning_rate"] = float(self.learning_rate())
        self.log.append(entry)
        self.bar.note(f"loss {entry['loss']:.4g}, held out {entry['held_out_loss']:.4g}")
        self.bar.expect(round(self.groups_seen / max(self.done(), 1e-9)))
        logger.info("epoch %(epoch).3g, %(seconds).0f s: loss %(loss).5g, held out %(held_out_loss).5g", entry)
        for name in ("loss", "held_out_loss"):
            if not np.isfinite(entry[name]):
                self.checkpoint.remove()
                raise PtychodaskError(
                    f"training: the {name.replace('_', ' ')} became {entry[name]} in epoch {entry['epoch']:.3g}; "
                    "pass a lower learning_rate="
                )
        self._judge(entry["held_out_loss"])
        self.record(entry)
        self.checkpoint.write(self.snapshot())

    def _judge(self, held_out_loss: float) -> None:
        """Keep the best values, or count an epoch without improvement.

        Such epochs halve the rate of a `plateau` schedule, and end the stage after `patience` of them.
        """
        if held_out_loss < self.best_loss:
            self.best_loss, self.best = held_out_loss, self._values()
            self.waited = self.on_plateau = 0
            return
        self.waited += 1
        self.on_plateau += 1
        if self.on_plateau >= PLATEAU_EPOCHS:
            self.halvings, self.on_plateau = self.halvings + 1, 0
        if self.spec.patience is not None and self.waited >= self.spec.patience:
            logger.info("no lower held-out loss in %d epochs", self.waited)
            self._end_stage()

    def _values(self) -> list[NDArray[np.float32]]:
        return [variable.numpy() for variable in self.variables]

    def snapshot(self) -> Snapshot:
        """State that the next epoch depends on."""
        # A resumed run starts a new fit, and Keras calls the stream's on_epoch_end before the first epoch of a fit.
        # Within this fit the stream is already in the order of the next epoch, so that one order less is recorded.
        orders = self.stream.n_orders if self.stage_ends else self.stream.n_orders - 1
        state = {name: getattr(self, name) for name in STATE_FIELDS} | {"spent_s": self.seconds(), "deals": orders}
        values = [variable.numpy() for variable in self.optimizer.variables]
        return Snapshot(state, self._values(), values, self.best)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state of a stopped run after its last epoch."""
        state = dict(snapshot.state)
        orders = state.pop("deals")
        for name, value in state.items():
            setattr(self, name, value)
        self._started = time.monotonic() - self.spent_s
        self.best = list(snapshot.best)
        for variables, values in ((self.variables, snapshot.network), (self.optimizer.variables, snapshot.optimizer)):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        while self.stream.n_orders < orders:
            self.stream.on_epoch_end()
        self.bar.advance(self.groups_seen)


STATE_FIELDS = (
    "stage",
    "groups_seen",
    "stage_ends",
    "waited",
    "on_plateau",
    "halvings",
    "best_loss",
    "log",
)
"""Fields of the callback stored in a checkpoint under their names."""
