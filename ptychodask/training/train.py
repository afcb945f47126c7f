"""Training: from stores of scans to the bundle of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.models import Model, ModelSpec, Optics, load_model, save_model
from ptychodask.models.backend import keras
from ptychodask.models.bundle import MODEL
from ptychodask.models.networks import FittedProbes, build_autoencoder, build_network, encoder_layers, with_penalties
from ptychodask.models.spec import Kind
from ptychodask.models.training_range import ranges_of
from ptychodask.options import takes_fields
from ptychodask.progress import progress_bar
from ptychodask.scan import Scan
from ptychodask.storage.atomic import READ_ONLY_ERRORS, check_vacant_folder
from ptychodask.storage.location import on_disk, parse_location
from ptychodask.store import hash_with_probe, open_scan
from ptychodask.store.annotate import check_probe_is_free, record_model
from ptychodask.training.batches import BUFFER_BYTES, GroupStream, MixedStream
from ptychodask.training.callbacks import TrainingCallback
from ptychodask.training.checkpoint import Checkpoint, Snapshot
from ptychodask.training.data import (
    amplitude_target,
    groups_within,
    judging_groups,
    patch_target,
    seed_alone,
    split_patterns,
)
from ptychodask.training.loggers import Record, open_logger
from ptychodask.training.losses import Loss, amplitude_loss, mae_loss, patch_loss, poisson_loss
from ptychodask.training.probe_fit import ProbeAdam, ProbeFit, judge_probes, store_probe
from ptychodask.training.spec import TrainingSpec

logger = logging.getLogger(__name__)


AMPLITUDE_SHARE = 0.5
"""Share of a staged training that uses the amplitude loss, before the Poisson loss."""


MAX_VALIDATION_GROUPS = 1024


Stream = GroupStream | MixedStream


@dataclass(frozen=True, eq=False)
class TrainingScan:
    """A scan in training, with its optics and split."""

    scan: Scan
    optics: Optics
    training: NDArray[np.int64]
    """Training patterns, sorted."""

    held_out: NDArray[np.int64]
    """Held-out patterns for validation after each epoch, sorted."""

    @classmethod
    def of(cls, scan: Scan, spec: TrainingSpec) -> TrainingScan:
        """Split a scan."""
        return cls(scan, Optics.of(scan), *split_patterns(scan, spec))

    def streams(self, spec: TrainingSpec, n_scans: int) -> tuple[GroupStream, GroupStream]:
        """Training and validation batches, for one of `n_scans` sharing the memory."""
        target_of = patch_target(self.scan) if spec.model == "baseline" else amplitude_target(self.scan)
        member = groups_within(self.scan, self.training, spec.grouping)
        once = replace(spec.grouping, oversampling=1)
        if spec.validation == "random":
            held_out, held_out_target = (
                judging_groups(self.scan, self.training, self.held_out, once),
                seed_alone(target_of),
            )
        else:
            held_out, held_out_target = groups_within(self.scan, self.held_out, once), target_of
        held_out = _evenly(held_out, -(-MAX_VALIDATION_GROUPS // n_scans))
        fields: dict[str, Any] = {
            "batch_size": spec.batch_size,
            "seed": spec.seed,
            "buffer_bytes": BUFFER_BYTES // n_scans,
        }
        return (
            GroupStream(self.scan, member, target_of, shuffle=True, **fields),
            GroupStream(self.scan, held_out, held_out_target, shuffle=False, **fields),
        )


def _streams(training_scans: Sequence[TrainingScan], spec: TrainingSpec) -> tuple[Stream, Stream]:
    """Training and validation batches of all scans."""
    pairs = [training_scan.streams(spec, len(training_scans)) for training_scan in training_scans]
    if len(pairs) == 1:
        return pairs[0]
    training, held_out = zip(*pairs, strict=True)
    return MixedStream(training, shuffle=True, seed=spec.seed), MixedStream(held_out, shuffle=False, seed=spec.seed)


def _build(
    spec: TrainingSpec,
    model_spec: ModelSpec,
    optics: Optics | Sequence[Optics],
    initial: Model | None,
    fitted: FittedProbes | None,
) -> tuple[keras.Model, keras.Model]:
    """The network, and the Keras model to fit.

    The latter adds the penalties and, for a PINN, the forward model.
    """
    keras.utils.set_random_seed(spec.seed)
    network = build_network(model_spec, optics, spec.precision, fitted)
    if initial is not None:
        network.set_weights(initial.weights)
    if spec.freeze_encoder:
        for layer in encoder_layers(network):
            layer.trainable = False
    trained = network
    if spec.tv or spec.real_space:
        trained = with_penalties(trained, model_spec, optics, fitted, tv=spec.tv, real_space=spec.real_space)
    return network, trained if spec.model == "baseline" else build_autoencoder(trained, optics, fitted)


def _fit(
    variables: Sequence[keras.Variable],
    trained: keras.Model,
    stages: list[tuple[float, Loss]],
    spec: TrainingSpec,
    streams: tuple[Stream, Stream],
    checkpoint: Checkpoint,
    stopped: Snapshot | None,
    record: Record,
    progress: bool | None,
) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    """Best values of the variables, and the training log.

    `variables` are all that `trained` can change, and those that are frozen.
    """
    stream, validation = streams
    steps = None if spec.accumulation == 1 else spec.accumulation
    adam = ProbeAdam if spec.probe_rate else keras.optimizers.Adam
    optimizer = adam(spec.first_learning_rate, gradient_accumulation_steps=steps)
    optimizer.build(trained.trainable_variables)
    with progress_bar("train", spec.epochs * stream.groups_per_epoch, "groups", progress) as bar:
        callback = TrainingCallback(spec, variables, optimizer, stream, bar, checkpoint, record)
        if stopped is not None:
            callback.restore(stopped)
        for number in range(callback.stage + callback.stage_ends, len(stages)):
            until, loss = stages[number]
            callback.begin_stage(number, until)
            loss = _for_devices(loss, spec.devices)
            # On a CPU, XLA compiles for minutes and runs slower; with JAX it is required.
            trained.compile(optimizer=optimizer, loss=loss, jit_compile=keras.backend.backend() == "jax")
            trained.fit(
                stream, validation_data=validation, epochs=spec.epochs, shuffle=False, verbose=0, callbacks=[callback]
            )
    return callback.best, callback.log


def _probe_fits(
    fitted: FittedProbes,
    training_scans: Sequence[TrainingScan],
    variables: Sequence[keras.Variable],
    best: Sequence[NDArray[np.float32]],
    trained: keras.Model,
    loss: Loss,
    spec: TrainingSpec,
    validation: Stream,
) -> list[ProbeFit]:
    """Comparison of each scan's fitted and stored probe, with the best weights."""
    for variable, value in zip(variables, best, strict=True):
        variable.assign(value)
    trained.compile(loss=_for_devices(loss, spec.devices), jit_compile=keras.backend.backend() == "jax")
    return judge_probes(
        fitted,
        [training_scan.scan.probe for training_scan in training_scans],
        lambda: float(trained.evaluate(validation, verbose=0, return_dict=True)["loss"]),
    )


def _for_devices(loss: Loss, devices: int) -> Loss:
    """The loss with shape (1,) for MirroredStrategy.

    MirroredStrategy averages such a loss over the devices, but sums a scalar.
    """
    if devices == 1 or keras.backend.backend() != "tensorflow":
        return loss
    return lambda target, prediction: keras.ops.reshape(loss(target, prediction), (1,))


@takes_fields(TrainingSpec)
def train(
    store: str | Path | Sequence[str | Path],
    spec: TrainingSpec | None = None,
    *,
    out: str | Path | None = None,
    initial: Model | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log_to: str | None = None,
    progress: bool | None = None,
    **spec_fields: Any,
) -> Model:
    """Train a network on one or several scans.

    Patterns are streamed from the stores in bounded memory.

    Parameters
    ----------
    store : path or sequence of paths
        A scan's store, or several of the same N, each with its own probe, mask and scale; each store records the
        finished model.
    spec : TrainingSpec, optional
        Training settings.
    out : path, optional
        Bundle to write; by default ``<store without .zarr>.<kind>.model`` beside the (first) store.
    initial : Model or path, optional
        Start from these weights (fine-tuning) in place of random ones, for instance from those of a packaged model,
        ``pretrained:<name>``; its spec must agree with that of the training.
    resume : bool
        Continue from the last finished epoch of a stopped run of the same training, if there is one. The checkpoint is
        in ``.NAME.training`` beside the bundle until the bundle is written. A resumed run limited by epochs ends with
        the same weights as one that was not stopped; with `max_minutes` the time already spent counts.
    overwrite : bool
        Replace an existing bundle, and delete a stopped run unless it is resumed.
    log_to : str, optional
        ``tensorboard:FOLDER`` or ``mlflow:URI``: additional log of each epoch. The losses are always in ``log.csv`` of
        the checkpoint during the training, and in the bundle's ``history.csv`` afterwards.
    progress : bool, optional
        See `progress_bar`.
    **spec_fields
        Fields of `TrainingSpec`, by name.

    Returns
    -------
    Model
        The weights of the epoch with the lowest held-out loss, saved in `out`. With `probe_rate`, each store's probe is
        replaced by the fitted one (of that epoch, `in_gauge_of` the stored one) if the held-out loss is lower with it,
        before the store records the model; `probe_initial` stays.

    Raises
    ------
    PtychodaskError
        If the scan does not suit the training (no truth for a baseline, too few patterns, a probe to fit of a scan that
        is still growing or given twice), the bundle exists, there is a stopped run and neither `resume` nor `overwrite`
        is set or it is of another training, or the loss diverges.
    """
    spec = with_fields(spec or TrainingSpec(), spec_fields)
    stores = [store] if isinstance(store, str | Path) else list(store)
    scans = _open_scans(stores, spec)
    out = default_model_path(stores[0], spec.model) if out is None else on_disk(out, "a model")
    check_vacant_folder(out, overwrite=overwrite, kind=MODEL)
    training_scans = [TrainingScan.of(scan, spec) for scan in scans]
    optics = (
        training_scans[0].optics
        if len(training_scans) == 1
        else [training_scan.optics for training_scan in training_scans]
    )
    if isinstance(initial, str | Path):
        initial = load_model(initial)
    if not isinstance(initial, Model | None):
        raise PtychodaskError(
            f"training: initial is a {type(initial).__name__}, expected a bundle that ptychodask trained; "
            "train that network with the software it is from, or omit initial"
        )
    model_spec = _model_spec(training_scans, spec, initial)
    stages = _stages(scans, spec, optics, model_spec)
    _check_initial(initial, model_spec, spec)
    checkpoint = Checkpoint(out, _identity(scans, spec, model_spec, initial))
    stopped = checkpoint.begin(resume=resume, overwrite=overwrite)
    streams = _streams(training_scans, spec)
    fits: Sequence[ProbeFit | None] = [None] * len(training_scans)
    with _on_devices(spec.devices), open_logger(log_to, out.name, spec) as record:
        fitted = (
            FittedProbes([training_scan.optics for training_scan in training_scans], spec.probe_rate)
            if spec.probe_rate
            else None
        )
        network, trained = _build(spec, model_spec, optics, initial, fitted)
        variables = [*network.weights, *([] if fitted is None else [fitted.change])]
        best, log = _fit(variables, trained, stages, spec, streams, checkpoint, stopped, record, progress)
        if fitted is not None:
            fits = _probe_fits(fitted, training_scans, variables, best, trained, stages[-1][1], spec, streams[1])
    weights, bound = best[: len(network.weights)], _optics(training_scans[0], fits[0])
    model = save_model(
        Model(model_spec, weights, bound, _provenance(training_scans, fits, spec, initial), log),
        out,
        overwrite=overwrite,
    )
    # The bundle is complete before a store changes, and the checkpoint is removed last: a run killed in between can be
    # resumed with the data it was started with.
    for each, training_scan, fit in zip(stores, training_scans, fits, strict=True):
        if fit is not None:
            store_probe(training_scan.scan, fit, spec)
        _record(each, model, out)
    checkpoint.remove()
    return model


def _record(store: str | Path, model: Model, out: Path) -> None:
    """Record a model in a store, unless it is read-only."""
    try:
        record_model(store, kind=model.kind, path=out, content_hash=model.content_hash)
    except OSError as error:
        if error.errno not in READ_ONLY_ERRORS:
            raise
        logger.warning(
            "%s: cannot be written (%s), so it does not record the model; pass it by its path, %s",
            store,
            error.strerror,
            out,
        )


def _open_scans(stores: Sequence[str | Path], spec: TrainingSpec) -> list[Scan]:
    """Scans of a training, checked to be compatible."""
    if not stores:
        raise PtychodaskError("training: no store was given; pass one or more")
    scans = [open_scan(store) for store in stores]
    sizes = {scan.n_pixels for scan in scans}
    if len(sizes) > 1:
        listed = ", ".join(f"{scan.store} has N={scan.n_pixels}" for scan in scans)
        raise PtychodaskError(f"training: scans differ in size ({listed}); ingest them with one n_pixels=")
    if spec.exclude and len(scans) > 1:
        raise PtychodaskError(
            f"training: exclude names patterns of one scan, found {len(scans)} scans; train on one, or omit exclude"
        )
    if spec.probe_rate:
        _check_probes_are_free(scans)
    return scans


def _check_probes_are_free(scans: Sequence[Scan]) -> None:
    for number, scan in enumerate(scans):
        check_probe_is_free(scan)
        if scan.store in [other.store for other in scans[:number]]:
            raise PtychodaskError(
                f"training: {scan.store} is given twice, and probe_rate would fit two probes to it; pass it once, or "
                "pass probe_rate=0"
            )


@contextmanager
def _on_devices(devices: int) -> Iterator[None]:
    """Context for building and fitting on several devices that share each batch."""
    if devices == 1:
        yield
        return
    available = _devices()
    if len(available) < devices:
        raise PtychodaskError(
            f"training: devices is {devices}, this process has {len(available)}; pass {len(available)}"
        )
    if keras.backend.backend() == "jax":
        with keras.distribution.DataParallel(devices=available[:devices], auto_shard_dataset=False).scope():
            yield
        return
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(available[:devices]).scope():
        yield


def _devices() -> list[str]:
    """Names of this process's GPUs, or of its CPUs if none."""
    backend = keras.backend.backend()
    if backend == "jax":
        names = list(keras.distribution.list_devices())
        return [name for name in names if not name.startswith("cpu")] or names
    if backend == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return [device.name for device in devices]
    raise PtychodaskError(f"training: several devices need the TensorFlow or the JAX backend, found {backend}; pass 1")


def _model_spec(training_scans: Sequence[TrainingScan], spec: TrainingSpec, initial: Model | None) -> ModelSpec:
    return ModelSpec(
        kind=spec.model,
        n_pixels=training_scans[0].scan.n_pixels,
        members=spec.grouping.members,
        n_filters_scale=spec.n_filters_scale,
        levels=spec.levels,
        projections_before=spec.projections_before,
        projections_after=spec.projections_after,
        momentum=spec.momentum,
        attention=spec.attention,
        object_amplitude=None if initial is None else initial.spec.object_amplitude,
    )


def _identity(
    scans: Sequence[Scan], spec: TrainingSpec, model_spec: ModelSpec, initial: Model | None
) -> dict[str, dict[str, Any]]:
    """Settings and data that a stopped run and its resumption must share."""
    return {
        "training": spec.recorded(),
        "network": asdict(model_spec),
        "begun": {
            "data hash": " ".join(scan.data_hash for scan in scans),
            "initial model": None if initial is None else initial.content_hash,
            "Keras": keras.__version__,
            "backend": keras.backend.backend(),
        },
    }


def default_model_path(store: str | Path, kind: Kind) -> Path:
    """Default path of the bundle written by `train`: beside the store.

    Examples
    --------
    >>> default_model_path("data/scan.zarr", "pinn").as_posix()
    'data/scan.pinn.model'
    """
    path = parse_location(store).local_path
    if path is None:
        raise PtychodaskError(f"{store}: a model cannot be written to an object store; pass a local out= (--out)")
    return path.with_name(f"{path.name.removesuffix('.zarr')}.{kind}.model")


def _evenly(member: NDArray[np.int32], n_most: int) -> NDArray[np.int32]:
    return member[np.unique(np.linspace(0, len(member) - 1, min(n_most, len(member))).astype(int))]


def _check_initial(initial: Model | None, requested: ModelSpec, spec: TrainingSpec) -> None:
    if initial is None:
        if spec.freeze_encoder:
            raise PtychodaskError("training: freeze_encoder needs the weights of a trained model; pass initial=")
        return
    if initial.spec != requested:
        names = [name for name, value in asdict(requested).items() if getattr(initial.spec, name) != value]
        listed = ", ".join(f"{n} is {getattr(initial.spec, n)}, requested {getattr(requested, n)}" for n in names)
        remedy = ", ".join(f"{'model' if name == 'kind' else name}={getattr(initial.spec, name)!r}" for name in names)
        raise PtychodaskError(
            f"{initial.path or 'initial model'}: does not fit the training ({listed}); pass {remedy}, or no initial"
        )


def _stages(
    scans: Sequence[Scan], spec: TrainingSpec, optics: Optics | Sequence[Optics], model_spec: ModelSpec
) -> list[tuple[float, Loss]]:
    """Losses in order, each with the share of training where it ends."""
    if spec.model == "baseline":
        return [(1.0, patch_loss(optics, model_spec.object_amplitude))]
    amplitudes = [scan for scan in scans if scan.domain == "amplitude"]
    name = spec.loss or ("amplitude" if amplitudes else "staged")
    if name in ("poisson", "staged") and amplitudes:
        raise PtychodaskError(
            f"{amplitudes[0].store or 'scan'}: contains amplitudes, whose photon number is unknown, but loss='{name}' "
            "needs counts; pass loss='amplitude'"
        )
    if name == "staged":
        return [(AMPLITUDE_SHARE, amplitude_loss(optics)), (1.0, poisson_loss(optics))]
    losses = {"amplitude": amplitude_loss, "mae": mae_loss, "poisson": poisson_loss}
    return [(1.0, losses[name](optics))]


def _optics(training_scan: TrainingScan, fit: ProbeFit | None) -> Optics:
    """Optics after the training: with the fitted probe if better."""
    return replace(training_scan.optics, probe=fit.probe) if fit is not None and fit.is_better else training_scan.optics


def _provenance(
    training_scans: Sequence[TrainingScan], fits: Sequence[ProbeFit | None], spec: TrainingSpec, initial: Model | None
) -> dict[str, Any]:
    """Provenance of the weights.

    Fields of the first scan are at the top; with several scans, all are in ``scans``.
    """
    scans = [
        {
            "store": training_scan.scan.store,
            # Hash of the store after its probe is replaced, which happens once the bundle is written.
            "data_hash": training_scan.scan.data_hash
            if fit is None or not fit.is_better
            else hash_with_probe(training_scan.scan, fit.probe),
            "n_training": len(training_scan.training),
            "n_held_out": len(training_scan.held_out),
            **({} if fit is None else {"probe_fit": fit.record(spec, training_scan.scan)}),
        }
        for training_scan, fit in zip(training_scans, fits, strict=True)
    ]
    return {
        **scans[0],
        "traits": ranges_of(
            replace(training_scan.scan, probe=_optics(training_scan, fit).probe)
            for training_scan, fit in zip(training_scans, fits, strict=True)
        ),
        "initial": None if initial is None else {"path": initial.path, "hash": initial.content_hash},
        **({"scans": scans} if len(scans) > 1 else {}),
        "training": spec.recorded(),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
