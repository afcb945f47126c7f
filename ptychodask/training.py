"""Training of the two networks, streaming groups from a store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray
from scipy import ndimage

from ptychodask.grouping import GroupingSpec, group_positions
from ptychodask.models import Model, ModelSpec, Optics, save_model
from ptychodask.models.networks import build_autoencoder, build_network
from ptychodask.models.spec import Kind
from ptychodask.progress import Progress, show_progress
from ptychodask.scan import PtychodaskError, Scan, check_choice, illuminated_radius_px
from ptychodask.store import open_scan, record_model

logger = logging.getLogger(__name__)

Loss = Literal["amplitude", "poisson", "staged"]
Validation = Literal["random", "left", "right", "top", "bottom"]

BUFFER_BYTES = 128 * 2**20
"""Network input that is held and shuffled at a time; what bounds the memory of training."""

RUN_GROUPS = 64
"""Groups that lie together along the curve and are read together."""

COUNTS_FLOOR = 0.1
"""Background, counts per pixel, that keeps the Poisson likelihood finite where no light is expected."""

AMPLITUDE_SHARE = 0.5
"""Share of a staged training that uses the amplitude loss before the likelihood of the counts."""

MAX_VALIDATION_GROUPS = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How a network is trained on a scan."""

    model: Kind = "pinn"
    """`pinn` (patterns alone) or `baseline` (needs the truth or labels)."""

    members: int | None = None
    """Patterns in one group, C; by default 4 for the PINN, always 1 for the baseline."""

    neighbours: int = GroupingSpec.neighbours
    """Nearest positions that members are drawn from, K."""

    oversampling: int = GroupingSpec.oversampling
    """Groups that each pattern seeds in training."""

    n_filters_scale: int = ModelSpec.n_filters_scale
    """Width of the network."""

    levels: int = ModelSpec.levels
    """How often the U-Net halves its resolution."""

    projections_before: int = ModelSpec.projections_before
    """Data-consistent steps before the U-Net."""

    projections_after: int = ModelSpec.projections_after
    """Data-consistent steps after the U-Net."""

    epochs: int = 50
    """Passes over the training groups at most."""

    max_minutes: float | None = None
    """Stop after so many minutes; the learning rate then falls with the clock."""

    batch_size: int = 16
    """Groups in one step."""

    learning_rate: float = 1e-3
    """Adam's rate at the start; it falls to zero along a half cosine."""

    loss: Loss | None = None
    """`amplitude`, `poisson` or `staged` (amplitude, then Poisson); by default staged for counts, amplitude for
    amplitudes, whose photon number is unknown."""

    validation: Validation = "random"
    """Held-out patterns: drawn at random, or those on one side of the field, with a dark gap to the others."""

    validation_fraction: float = 0.1
    """Share of the patterns that is held out."""

    seed: int = 0
    """Seed of the split, the groups, the weights and the order of the steps."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Kind), "training")
        check_choice("validation", self.validation, get_args(Validation), "training")
        if self.loss is not None:
            check_choice("loss", self.loss, get_args(Loss), "training")
        if self.model == "baseline" and self.members not in (None, 1):
            raise PtychodaskError(f"training: a baseline reads one pattern at a time, found members={self.members}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise PtychodaskError(f"training: {name} is {getattr(self, name)}, expected 1 or more")
        for name in ("learning_rate", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PtychodaskError(f"training: {name} is {value}, expected a positive number")
        if not 0 < self.validation_fraction < 1:
            raise PtychodaskError(
                f"training: validation_fraction is {self.validation_fraction}, expected a number between 0 and 1"
            )
        _ = self.grouping

    @property
    def grouping(self) -> GroupingSpec:
        """How the training groups are drawn."""
        members = self.members or (1 if self.model == "baseline" else GroupingSpec.members)
        if members == 1:
            return GroupingSpec(members=1, seed=self.seed)
        return GroupingSpec(members=members, neighbours=self.neighbours, oversampling=self.oversampling, seed=self.seed)


def split_patterns(scan: Scan, spec: TrainingSpec) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patterns to train on and patterns held out.

    Parameters
    ----------
    scan : Scan
    spec : TrainingSpec

    Returns
    -------
    training, held_out : int64 arrays
        Sorted pattern indices. With a side held out, patterns whose light would fall on both parts are in neither.

    Raises
    ------
    PtychodaskError
        If a part is left with no pattern.
    """
    if spec.validation == "random":
        order = np.random.default_rng(spec.seed).permutation(scan.n_patterns)
        n_held_out = max(1, round(spec.validation_fraction * scan.n_patterns))
        held_out, training = np.sort(order[:n_held_out]), np.sort(order[n_held_out:])
    else:
        axis = 0 if spec.validation in ("top", "bottom") else 1
        place = scan.position_yx_px[:, axis] * (1 if spec.validation in ("right", "bottom") else -1)
        border = np.quantile(place, 1 - spec.validation_fraction)
        gap = 2 * illuminated_radius_px(scan.probe)
        held_out, training = np.flatnonzero(place > border), np.flatnonzero(place < border - gap)
    if not len(training) or not len(held_out):
        raise PtychodaskError(
            f"{scan.store or 'scan'}: validation='{spec.validation}' with validation_fraction="
            f"{spec.validation_fraction} leaves {len(training)} patterns to train on and {len(held_out)} held out; "
            "pass another validation_fraction"
        )
    return training, held_out


def groups_within(scan: Scan, patterns: NDArray[np.int64], spec: GroupingSpec) -> NDArray[np.int32]:
    """Groups (group, channel) whose members all lie among some patterns."""
    scan_index = None if scan.scan_index is None else scan.scan_index[patterns]
    return patterns[group_positions(scan.position_yx_px[patterns], spec, scan_index)].astype(np.int32)


def member_offsets(scan: Scan, member: NDArray[np.int32]) -> NDArray[np.float32]:
    """Offsets of members from their group's centre, float32 (group, channel, 2), pixels."""
    position = scan.position_yx_px[member]
    return (position - position.mean(axis=1, keepdims=True)).astype(np.float32)


TargetOf = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]
"""What a network shall give for some groups: (member table, X) to target."""


class GroupStream(keras.utils.PyDataset):
    """Batches of groups read from a scan, shuffled, in bounded memory.

    The groups are cut into short runs along the curve, whose patterns lie together in the store. An epoch goes
    through the runs in a new order, a buffer of several at a time; a buffer's patterns are read once and its groups
    are dealt into batches at random.
    """

    def __init__(
        self,
        scan: Scan,
        member: NDArray[np.int32],
        target_of: TargetOf,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self._scan = scan
        self._member = member
        self._target_of = target_of
        self.batch_size = min(batch_size, len(member))
        self._rng = np.random.default_rng(seed) if shuffle else None
        group_bytes = 4 * member.shape[1] * scan.n_pixels**2
        self._buffer_batches = max(1, int(BUFFER_BYTES // (group_bytes * self.batch_size)))
        self._held: tuple[int, NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]] | None = None
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self._member) // self.batch_size

    def on_epoch_end(self) -> None:
        """Deal the groups anew."""
        if self._rng is None:
            self._order = np.arange(len(self._member))
            return
        runs = np.array_split(np.arange(len(self._member)), -(-len(self._member) // RUN_GROUPS))
        order = np.concatenate([runs[i] for i in self._rng.permutation(len(runs))])
        size = self._buffer_batches * self.batch_size
        self._order = np.concatenate(
            [self._rng.permutation(order[start : start + size]) for start in range(0, len(order), size)]
        )
        # One buffer that holds every group stays valid from epoch to epoch.
        if len(order) > size:
            self._held = None

    def __getitem__(self, index: int) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]:
        buffer = index // self._buffer_batches
        patterns, inputs = self._read(buffer)
        start = index * self.batch_size
        member = self._member[self._order[start : start + self.batch_size]]
        x = inputs[np.searchsorted(patterns, member)]
        return (np.moveaxis(x, 1, -1), member_offsets(self._scan, member)), self._target_of(member, x)

    def _read(self, buffer: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self._held is None or self._held[0] != buffer:
            size = self._buffer_batches * self.batch_size
            member = self._member[self._order[buffer * size : (buffer + 1) * size]]
            patterns = np.unique(member).astype(np.int64)
            self._held = (buffer, member, patterns, self._scan.network_input(patterns))
        return self._held[2], self._held[3]


def amplitude_target(scan: Scan) -> TargetOf:
    """Measured amplitude (group, C, N, N): what the PINN's forward model shall give."""
    scale = np.float32(1.0 / scan.normalization)
    return lambda _, x: x * scale


def patch_target(scan: Scan) -> TargetOf:
    """Labels, or patches of the truth, as float32 (group, 1, N, N, 2): what the baseline shall give.

    Raises
    ------
    PtychodaskError
        If the scan has neither.
    """
    if scan.label is not None:
        label = scan.label
        return lambda member, _: _pairs(np.asarray(label[member.reshape(-1)]).reshape(*member.shape, *label.shape[1:]))
    if scan.truth is None:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: has neither truth nor labels, which supervised training needs; "
            "train model='pinn', or a baseline on a simulated scan"
        )
    parts = [ndimage.spline_filter(part) for part in (scan.truth.object.real, scan.truth.object.imag)]
    corner = np.asarray(scan.truth.corner_yx_px)
    grid = np.indices((scan.n_pixels, scan.n_pixels)) - scan.n_pixels // 2

    def target(member: NDArray[np.int32], _: NDArray[np.float32]) -> NDArray[np.float32]:
        place = (scan.position_yx_px[member] - corner)[..., None, None] + grid
        coordinates = np.moveaxis(place, 2, 0)
        values = [ndimage.map_coordinates(part, coordinates, prefilter=False, mode="nearest") for part in parts]
        return np.stack(values, axis=-1).astype(np.float32)

    return target


def _pairs(patches: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([patches.real, patches.imag], axis=-1).astype(np.float32)


def amplitude_loss(optics: Optics) -> Callable[[Any, Any], Any]:
    """Σ(√I_pred − √I)² over good pixels, relative to the mean counts, averaged over patterns.

    The Gaussian likelihood of the amplitude: photon noise has the same variance in every pixel's square root.
    """
    mask, mean_counts = optics.mask, optics.mean_counts

    def loss(amplitude: Any, counts: Any) -> Any:
        difference = (ops.sqrt(counts + 1e-9) - amplitude) * mask
        return ops.mean(ops.sum(difference * difference, axis=(-2, -1))) / mean_counts

    return loss


def poisson_loss(optics: Optics) -> Callable[[Any, Any], Any]:
    """A quarter of the Poisson deviance over good pixels, relative to the mean counts, averaged over patterns.

    ½ Σ λ − n + n ln(n/λ), with `COUNTS_FLOOR` added to both: the quarter makes it agree with `amplitude_loss`
    where counts are high (deviance ≈ 4 Σ(√λ − √n)²; McCullagh & Nelder, Generalized Linear Models, 1989, §2.3).
    """
    mask, mean_counts = optics.mask, optics.mean_counts

    def loss(amplitude: Any, counts: Any) -> Any:
        measured = amplitude * amplitude + COUNTS_FLOOR
        excess = counts + COUNTS_FLOOR - measured
        # log1p keeps the digits that λ − n − n ln(λ/n) loses where counts are high and nearly equal.
        deviance = (excess - measured * ops.log1p(excess / measured)) * mask
        return 0.5 * ops.mean(ops.sum(deviance, axis=(-2, -1))) / mean_counts

    return loss


def patch_loss(optics: Optics, object_amplitude: float) -> Callable[[Any, Any], Any]:
    """Mean |patch − label| where light fell, in units of the flat object's amplitude."""
    weight = (optics.weight > 0).astype(np.float32)[..., None]
    scale = 1.0 / (float(weight.sum()) * object_amplitude)

    def loss(label: Any, patches: Any) -> Any:
        return ops.mean(ops.sum(ops.abs(patches - label) * weight, axis=(-3, -2, -1))) * scale

    return loss


@dataclass(eq=False)
class _Course(keras.callbacks.Callback):
    """Clock, learning rate, best weights and progress of one training, through all its stages."""

    spec: TrainingSpec
    network: keras.Model
    groups_per_epoch: int
    bar: Progress
    until: float = 1.0
    groups_seen: int = 0
    started: float = field(default_factory=time.monotonic)
    best: list[NDArray[np.float32]] = field(default_factory=list)
    best_loss: float = np.inf
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def done(self) -> float:
        """Share of the training that is over, 0 to 1: by the epochs, or by the clock where that is further."""
        by_epochs = self.groups_seen / (self.spec.epochs * self.groups_per_epoch)
        if self.spec.max_minutes is None:
            return min(1.0, by_epochs)
        return min(1.0, max(by_epochs, (time.monotonic() - self.started) / (60 * self.spec.max_minutes)))

    def begin_stage(self, until: float) -> None:
        """Go on until that share of the training is over; losses of the stages do not compare."""
        self.until, self.best_loss = until, np.inf

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = self.spec.learning_rate * 0.5 * (1 + np.cos(np.pi * self.done()))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        batch_size = min(self.spec.batch_size, self.groups_per_epoch)
        self.groups_seen += batch_size
        self.bar.advance(batch_size)
        if self.done() >= self.until - 1e-9:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        entry = {"epoch": float(len(self.log) + 1), "seconds": round(time.monotonic() - self.started, 3)}
        entry |= {"loss": float(logs["loss"]), "held_out_loss": float(logs["val_loss"])}
        self.log.append(entry)
        self.bar.note(f"loss {entry['loss']:.4g}, held out {entry['held_out_loss']:.4g}")
        self.bar.expect(round(self.groups_seen / max(self.done(), 1e-9)))
        logger.info("epoch %(epoch)d, %(seconds).0f s: loss %(loss).5g, held out %(held_out_loss).5g", entry)
        if not np.isfinite(entry["loss"]):
            raise PtychodaskError(
                f"training: the loss became {entry['loss']} in epoch {len(self.log)}; pass a lower learning_rate="
            )
        if entry["held_out_loss"] < self.best_loss:
            self.best_loss, self.best = entry["held_out_loss"], self.network.get_weights()


def _fit(
    network: keras.Model,
    trained: keras.Model,
    stages: list[tuple[float, Callable[[Any, Any], Any]]],
    spec: TrainingSpec,
    stream: GroupStream,
    check: GroupStream,
    progress: bool | None,
) -> tuple[list[NDArray[np.float32]], list[dict[str, float]]]:
    """Best weights of the network and the log, after `trained` (it, or it and its forward model) went through."""
    groups_per_epoch = len(stream) * stream.batch_size
    optimizer = keras.optimizers.Adam(spec.learning_rate)
    with show_progress("train", spec.epochs * groups_per_epoch, "groups", progress) as bar:
        course = _Course(spec, network, groups_per_epoch, bar)
        for until, loss in stages:
            course.begin_stage(until)
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
    overwrite : bool
        Replace an existing bundle.
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
        If the scan does not suit the training (no truth for a baseline, too few patterns), the bundle exists, or the
        loss diverges.
    """
    spec = replace_fields(spec or TrainingSpec(), spec_fields)
    scan = open_scan(store)
    out = default_model_path(store, spec.model) if out is None else Path(out)
    if out.exists() and not overwrite:
        raise PtychodaskError(f"{out}: exists already; pass overwrite=True (--overwrite), or another out=")
    if not out.parent.is_dir():
        raise PtychodaskError(f"{out}: its folder {out.parent} does not exist; make it first")
    target_of = patch_target(scan) if spec.model == "baseline" else amplitude_target(scan)
    training, held_out = split_patterns(scan, spec)
    members = groups_within(scan, training, spec.grouping)
    held_out_spec = replace(spec.grouping, oversampling=1)
    held_out_members = _evenly(groups_within(scan, held_out, held_out_spec), MAX_VALIDATION_GROUPS)
    optics = Optics.of(scan)
    model_spec = ModelSpec(
        kind=spec.model,
        n_pixels=scan.n_pixels,
        members=spec.grouping.members,
        n_filters_scale=spec.n_filters_scale,
        levels=spec.levels,
        projections_before=spec.projections_before,
        projections_after=spec.projections_after,
        object_amplitude=optics.flat_amplitude() if initial is None else initial.spec.object_amplitude,
    )
    stages = _stages(scan, spec, optics, model_spec)
    keras.utils.set_random_seed(spec.seed)
    network = build_network(model_spec, optics)
    if initial is not None:
        _check_initial(initial, model_spec)
        network.set_weights(initial.weights)
    stream = GroupStream(scan, members, target_of, batch_size=spec.batch_size, shuffle=True, seed=spec.seed)
    check = GroupStream(scan, held_out_members, target_of, batch_size=spec.batch_size, shuffle=False, seed=spec.seed)
    trained = network if spec.model == "baseline" else build_autoencoder(network, optics)
    weights, log = _fit(network, trained, stages, spec, stream, check, progress)
    model = Model(model_spec, weights, optics, _provenance(scan, spec, len(training), len(held_out)), log)
    model = save_model(model, out, overwrite=overwrite)
    record_model(store, kind=model.kind, path=out, content_hash=model.content_hash)
    return model


def replace_fields(spec: Any, fields: dict[str, Any]) -> Any:
    """A spec with some fields changed by name; an unknown name is refused with the list of known ones."""
    known = set(spec.__dataclass_fields__)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise PtychodaskError(
            f"{type(spec).__name__} has no field {', '.join(unknown)}; it has: {', '.join(sorted(known))}"
        )
    return replace(spec, **fields)


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


def _stages(
    scan: Scan, spec: TrainingSpec, optics: Optics, model_spec: ModelSpec
) -> list[tuple[float, Callable[[Any, Any], Any]]]:
    """The losses in their order, each with the share of the training at which it ends."""
    if spec.model == "baseline":
        return [(1.0, patch_loss(optics, model_spec.object_amplitude))]
    name = spec.loss or ("staged" if scan.domain == "counts" else "amplitude")
    if name != "amplitude" and scan.domain == "amplitude":
        raise PtychodaskError(
            f"{scan.store or 'scan'}: holds amplitudes, whose photon number is unknown, and loss='{name}' needs "
            "counts; pass loss='amplitude'"
        )
    if name == "staged":
        return [(AMPLITUDE_SHARE, amplitude_loss(optics)), (1.0, poisson_loss(optics))]
    return [(1.0, amplitude_loss(optics) if name == "amplitude" else poisson_loss(optics))]


def _provenance(scan: Scan, spec: TrainingSpec, n_training: int, n_held_out: int) -> dict[str, Any]:
    return {
        "store": scan.store,
        "data_hash": scan.data_hash,
        "n_training": n_training,
        "n_held_out": n_held_out,
        "training": asdict(spec),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
    }
