"""Optional loggers of a training: TensorBoard and MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import ceil
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.training.spec import TrainingSpec

Record = Callable[[dict[str, float]], None]
"""Function called with the log entry of each epoch."""


@contextmanager
def open_logger(log_to: str | None, name: str, spec: TrainingSpec) -> Iterator[Record]:
    """Open a logger for the epochs of a training.

    Parameters
    ----------
    log_to : str or None
        ``tensorboard:FOLDER``, ``mlflow:URI``, or None for neither.
    name : str
        Name of the run.
    spec : TrainingSpec
        Recorded as parameters of the run.

    Yields
    ------
    callable
        Records the log entry of an epoch.

    Raises
    ------
    PtychodaskError
        If `log_to` has another form, or the package is not installed.
    """
    if log_to is None:
        yield lambda _: None
        return
    kind, colon, destination = log_to.partition(":")
    if kind not in LOGGERS or not colon or not destination:
        raise PtychodaskError(f"training: log_to is {log_to!r}, expected tensorboard:FOLDER or mlflow:URI")
    with LOGGERS[kind](destination, name, spec) as record:
        yield record


@contextmanager
def _tensorboard(folder: str, name: str, spec: TrainingSpec) -> Iterator[Record]:
    """Scalars of each epoch, in the subfolder `name` of a TensorBoard folder."""
    try:
        import tensorboard  # noqa: F401
        import tensorflow as tf
    except ImportError as error:
        raise _missing("tensorboard", error) from error
    writer = tf.summary.create_file_writer(f"{folder}/{name}")
    with writer.as_default():
        tf.summary.text("spec", "  \n".join(f"{key}: {value}" for key, value in asdict(spec).items()), step=0)

    def record(entry: dict[str, float]) -> None:
        with writer.as_default():
            for key, value in entry.items():
                tf.summary.scalar(key, value, step=ceil(entry["epoch"]))
        writer.flush()

    yield record
    writer.close()


@contextmanager
def _mlflow(uri: str, name: str, spec: TrainingSpec) -> Iterator[Record]:
    """Metrics of each epoch, in an MLflow run (server or folder)."""
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise _missing("mlflow", error) from error
    # A separate client: MLflow's fluent interface would change the tracking server of the whole process.
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ptychodask")
    experiment_id = client.create_experiment("ptychodask") if experiment is None else experiment.experiment_id
    run_id = client.create_run(experiment_id, run_name=name).info.run_id
    for key, value in asdict(spec).items():
        client.log_param(run_id, key, str(value)[:250])

    def record(entry: dict[str, float]) -> None:
        for key, value in entry.items():
            client.log_metric(run_id, key, value, step=ceil(entry["epoch"]))

    try:
        yield record
    except BaseException:
        client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)


LOGGERS: dict[str, Any] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


def _missing(package: str, error: ImportError) -> PtychodaskError:
    return PtychodaskError(f"training: log_to needs {package}, which is not installed ({error}); pip install {package}")
