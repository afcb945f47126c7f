"""Training from end to end: a scan's store goes in, a model's bundle comes out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from ptychodask.models import Model, ModelSpec, Optics, save_model
from ptychodask.models.networks import build_autoencoder, build_network
from ptychodask.models.spec import Kind
from ptychodask.progress import show_progress
from ptychodask.scan import PtychodaskError, Scan
from ptychodask.store import open_scan, record_model
from ptychodask.training.checkpoint import Checkpoint, Snapshot
from ptychodask.training.course import Course
from ptychodask.training.data import amplitude_target, groups_within, patch_target, split_patterns
from ptychodask.training.losses import Loss, amplitude_loss, mae_loss, patch_loss, poisson_loss
from ptychodask.training.spec import TrainingSpec, replace_fields
from ptychodask.training.streaming import GroupStream

AMPLITUDE_SHARE = 0.5
"""Share of a staged training that uses the amplitude loss before the likelihood of the counts."""

MAX_VALIDATION_GROUPS = 1024


@dataclass(frozen=True, eq=False)
class Lesson:
    """A scan as it is trained on."""

    scan: Scan
    optics: Optics
    training: NDArray[np.int64]
    """Patterns to train on, sorted."""

    held_out: NDArray[np.int64]
    """Patterns that judge each epoch, sorted."""

    @classmethod
    def of(cls, scan: Scan, spec: TrainingSpec) -> Lesson:
        """Split a scan."""
        return cls(scan, Optics.of(scan), *split_patterns(scan, spec))

    def streams(self, spec: TrainingSpec) -> tuple[GroupStream, GroupStream]:
        """Batches to train on, and batches that judge."""
        target_of = patch_target(self.scan) if spec.model == "baseline" else amplitude_target(self.scan)
        member = groups_within(self.scan, self.training, spec.grouping)
        held_out = groups_within(self.scan, self.held_out, replace(spec.grouping, oversampling=1))
        held_out = _evenly(held_out, MAX_VALIDATION_GROUPS)
        size, seed = spec.batch_size, spec.seed
        return (
            GroupStream(self.scan, member, target_of, batch_size=size, shuffle=True, seed=seed),
            GroupStream(self.scan, held_out, target_of, batch_size=size, shuffle=False, seed=seed),
        )


def _fit(
    network: keras.Model,
    trained: keras.Model,
    stages: list[tuple[float, Loss]],
    spec: TrainingSpec,
    stream: GroupStream,
    check: GroupStream,
    checkpoint: Checkpoint,
    stopped: Snapshot | None,
    progress: bool | None,
) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    """Best weights of the network and the log, after `trained` (it, or it and its forward model) went through."""
    optimizer = keras.optimizers.Adam(spec.learning_rate)
    optimizer.build(network.trainable_variables)
    with show_progress("train", spec.epochs * stream.groups_per_epoch, "groups", progress) as bar:
        course = Course(spec, network, optimizer, stream, bar, checkpoint)
        if stopped is not None:
            course.restore(stopped)
        for number in range(course.stage + course.stage_ends, len(stages)):
            until, loss = stages[number]
            course.begin_stage(number, until)
            # XLA compiles for minutes on a CPU and is slower there; JAX has no other way.
            trained.compile(optimizer=optimizer, loss=loss, jit_compile=keras.backend.backend() == "jax")
            trained.fit(stream, validation_data=check, epochs=spec.epochs, shuffle=False, verbose=0, callbacks=[course])
    return course.best, course.log


def train(
    store: str | Path,
    spec: TrainingSpec | None = None,
    *,
    out: str | Path | None = None,
    initial: Model | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **spec_fields: Any,
) -> Model:
    """Train a network on a scan, streaming its patterns from the store.

    Parameters
    ----------
    store : path
        A scan's store; it records the model in the end.
    spec : TrainingSpec, optional
        How to train.
    out : path, optional
        The bundle to write; by default ``<store without .zarr>.<kind>.model`` beside the store.
    initial : Model, optional
        Start from these weights (fine-tuning) in place of random ones; its spec must be the one asked for.
    resume : bool
        Go on from the last finished epoch of a stopped run of the same training, where there is one. It is kept in
        ``.NAME.training`` beside the bundle until that is written; a run limited by epochs ends with the weights that
        it would have had, and with `max_minutes` the time that was spent already counts.
    overwrite : bool
        Replace an existing bundle, and forget a stopped run unless it is resumed.
    progress : bool, optional
        See `show_progress`.
    **spec_fields
        Fields of `TrainingSpec`, by name.

    Returns
    -------
    Model
        The weights of the epoch with the lowest held-out loss, saved in `out`.

    Raises
    ------
    PtychodaskError
        If the scan does not suit the training (no truth for a baseline, too few patterns), the bundle exists, a stopped
        run is there and shall neither be resumed nor forgotten or trained something else, or the loss diverges.
    """
    spec = replace_fields(spec or TrainingSpec(), spec_fields)
    scan = open_scan(store)
    out = default_model_path(store, spec.model) if out is None else Path(out)
    if out.exists() and not overwrite:
        raise PtychodaskError(f"{out}: exists already; pass overwrite=True (--overwrite), or another out=")
    if not out.parent.is_dir():
        raise PtychodaskError(f"{out}: its folder {out.parent} does not exist; make it first")
    lesson = Lesson.of(scan, spec)
    model_spec = _model_spec(scan, spec, lesson.optics, initial)
    stages = _stages(scan, spec, lesson.optics, model_spec)
    if initial is not None:
        _check_initial(initial, model_spec)
    checkpoint = Checkpoint(out, _identity(scan, spec, model_spec, initial))
    stopped = checkpoint.begin(resume=resume, overwrite=overwrite)
    stream, check = lesson.streams(spec)
    keras.utils.set_random_seed(spec.seed)
    network = build_network(model_spec, lesson.optics)
    if initial is not None:
        network.set_weights(initial.weights)
    trained = network if spec.model == "baseline" else build_autoencoder(network, lesson.optics)
    weights, log = _fit(network, trained, stages, spec, stream, check, checkpoint, stopped, progress)
    model = Model(model_spec, weights, lesson.optics, _provenance(lesson, spec), log)
    model = save_model(model, out, overwrite=overwrite)
    record_model(store, kind=model.kind, path=out, content_hash=model.content_hash)
    checkpoint.remove()
    return model


def _model_spec(scan: Scan, spec: TrainingSpec, optics: Optics, initial: Model | None) -> ModelSpec:
    return ModelSpec(
        kind=spec.model,
        n_pixels=scan.n_pixels,
        members=spec.grouping.members,
        n_filters_scale=spec.n_filters_scale,
        levels=spec.levels,
        projections_before=spec.projections_before,
        projections_after=spec.projections_after,
        object_amplitude=optics.flat_amplitude() if initial is None else initial.spec.object_amplitude,
    )


def _identity(
    scan: Scan, spec: TrainingSpec, model_spec: ModelSpec, initial: Model | None
) -> dict[str, dict[str, Any]]:
    """What a stopped run must have in common with the one that goes on."""
    return {
        "training": asdict(spec),
        "network": asdict(model_spec),
        "begun": {
            "data hash": scan.data_hash,
            "initial model": None if initial is None else initial.content_hash,
            "Keras": keras.__version__,
            "backend": keras.backend.backend(),
        },
    }


def default_model_path(store: str | Path, kind: Kind) -> Path:
    """Where `train` writes its bundle when it is not told: beside the store.

    Examples
    --------
    >>> default_model_path("data/scan.zarr", "pinn").as_posix()
    'data/scan.pinn.model'
    """
    path = Path(store)
    return path.with_name(f"{path.name.removesuffix('.zarr')}.{kind}.model")


def _evenly(member: NDArray[np.int32], most: int) -> NDArray[np.int32]:
    return member[np.unique(np.linspace(0, len(member) - 1, min(most, len(member))).astype(int))]


def _check_initial(initial: Model, wanted: ModelSpec) -> None:
    if initial.spec != wanted:
        names = [name for name, value in asdict(wanted).items() if getattr(initial.spec, name) != value]
        listed = ", ".join(f"{n} is {getattr(initial.spec, n)}, asked for {getattr(wanted, n)}" for n in names)
        raise PtychodaskError(f"{initial.path or 'initial model'}: does not fit the training ({listed})")


def _stages(scan: Scan, spec: TrainingSpec, optics: Optics, model_spec: ModelSpec) -> list[tuple[float, Loss]]:
    """The losses in their order, each with the share of the training at which it ends."""
    if spec.model == "baseline":
        return [(1.0, patch_loss(optics, model_spec.object_amplitude))]
    name = spec.loss or ("staged" if scan.domain == "counts" else "amplitude")
    if name in ("poisson", "staged") and scan.domain == "amplitude":
        raise PtychodaskError(
            f"{scan.store or 'scan'}: holds amplitudes, whose photon number is unknown, and loss='{name}' needs "
            "counts; pass loss='amplitude'"
        )
    if name == "staged":
        return [(AMPLITUDE_SHARE, amplitude_loss(optics)), (1.0, poisson_loss(optics))]
    losses = {"amplitude": amplitude_loss, "mae": mae_loss, "poisson": poisson_loss}
    return [(1.0, losses[name](optics))]


def _provenance(lesson: Lesson, spec: TrainingSpec) -> dict[str, Any]:
    return {
        "store": lesson.scan.store,
        "data_hash": lesson.scan.data_hash,
        "n_training": len(lesson.training),
        "n_held_out": len(lesson.held_out),
        "training": asdict(spec),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
