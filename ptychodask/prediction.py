"""Prediction of patches: patterns read once per chunk, one model per process."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ptychodask import models
from ptychodask.errors import PtychodaskError
from ptychodask.models.choose import absolute_path
from ptychodask.models.contract import Device, PatchModel, Predict
from ptychodask.models.pretrained import is_pretrained
from ptychodask.models.spec import Precision
from ptychodask.scan import Scan
from ptychodask.storage.location import LocationLike
from ptychodask.store import StoredScan

logger = logging.getLogger(__name__)


CACHE_SIZE = 4
"""Number of open stores, and of compiled models, that a process caches for its next tasks."""


Cached = TypeVar("Cached")


@dataclass(frozen=True, eq=False)
class ModelReference:
    """Model as sent to a worker: by path if it has one."""

    content_hash: str
    path: str | None
    model: PatchModel | None

    @classmethod
    def to(cls, model: PatchModel) -> ModelReference:
        """Reference to a model."""
        if model.path is None:
            return cls(model.content_hash, None, model)
        return cls(model.content_hash, absolute_path(model.path), None)

    def load(self) -> PatchModel:
        """Load the model; raises `PtychodaskError` if its bundle was replaced."""
        if self.model is not None:
            return self.model
        assert self.path is not None
        model = models.load_model(self.path)
        if model.content_hash != self.content_hash and is_pretrained(self.path):
            raise PtychodaskError(
                f"{self.path}: the model's hash is {model.content_hash}, expected {self.content_hash}; this worker has "
                "another version of ptychodask than its client: install the same version"
            )
        if model.content_hash != self.content_hash:
            raise PtychodaskError(
                f"{self.path}: the model's hash is {model.content_hash}, expected {self.content_hash}; "
                "it was replaced during the run: start again"
            )
        return model

    def prepare_device(self, *, wanted: bool) -> None:
        """Select the GPU assigned to this process, for networks run by Keras.

        Raises
        ------
        PtychodaskError
            If a GPU is `wanted` and none is available.
        """
        if self.model is not None and not self.model.runs_on_keras:
            return
        _GPU.get("device", models.use_given_gpu)
        if wanted:
            models.check_gpu(self.path or "model")


@dataclass(frozen=True, eq=False)
class PredictionJob:
    """Input shared by the prediction tasks of a plan."""

    store: str
    """Path of the store."""

    data_hash: str
    """Data hash of the store when it was planned."""

    groups: str
    """Name of the group table."""

    model: ModelReference
    """Model to predict with."""

    batch_size: int
    """Groups in one call of the network."""

    drop: tuple[int, ...] = ()
    """Patterns whose groups are left out."""

    precision: Precision = "float32"
    """Precision of the network's convolutions."""

    device: Device = "any"
    """Required device."""

    bound_to: str | None = None
    """Data hash of a growing scan's first segment, whose probe and normalisation the network is bound to; by default
    that of the scan."""

    experiment: int | None = None
    """Experiment whose groups are predicted; by default all."""

    member: NDArray[np.int32] | None = None
    """Rows of the group table, int32 (group, channel), if it is not stored; by default they are read from the store."""


class PatchBatch(NamedTuple):
    """Patches and their positions."""

    patches: NDArray[np.complex64]
    """complex64 (n, N, N)."""

    position_yx_px: NDArray[np.float64]
    """Coordinates (y, x) of element [N//2, N//2] of each patch, float64 (n, 2)."""

    pattern: NDArray[np.integer[Any]]
    """Pattern of each patch (n,); for the patch of a group, that of its seed."""


class _Patterns(NamedTuple):
    """Usable patterns of a chunk."""

    scan: Scan
    """Part of the scan with these patterns, to bind a model to."""

    pattern: NDArray[np.int32]
    """Indices in the store, ascending (k,)."""

    position_yx_px: NDArray[np.float64]
    """float64 (k, 2)."""

    x: NDArray[np.float32]
    """Network input, float32 (k, N, N)."""


@dataclass(frozen=True)
class Skipped:
    """Patterns left out of a run, and the reason."""

    patterns: tuple[int, ...]
    """Indices in the store, ascending; for groups that could not be predicted, those of their seeds."""

    reason: str


class _ProcessCache(Generic[Cached]):
    """Most recently used objects shared by the tasks of this process.

    Each is created once, by the first task that needs it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Cached] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Cached], *, anew: bool = False) -> Cached:
        with self._lock:
            if anew or key not in self._kept:
                self._kept[key] = make()
                while len(self._kept) > CACHE_SIZE:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


# Per process and not per Dask worker: the threaded scheduler has no worker, and one process may run several.
_STORES: _ProcessCache[StoredScan] = _ProcessCache()


_PREDICTORS: _ProcessCache[Predict] = _ProcessCache()


_GPU: _ProcessCache[None] = _ProcessCache()


_DEVICE = threading.Lock()


_BATCH_SIZES: dict[tuple[str, Precision], int] = {}
"""Largest batch that fits into the device's memory, for networks that ran out of it."""


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of a block to ``seconds[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def predict_groups(
    jobs: Sequence[PredictionJob],
    start: int,
    stop: int,
    seconds: dict[str, float],
    skipped: list[Skipped] | None = None,
) -> Iterator[tuple[int, PatchBatch]]:
    """Patches of consecutive groups, batch by batch; patterns are read once.

    Parameters
    ----------
    jobs : sequence of PredictionJob
        One for each model, all of the same store.
    start, stop : int
        Rows of each job's group table.
    seconds : dict
        Receives the wall time of the stages ``load``, ``read``, ``gather`` and ``predict``.
    skipped : list of Skipped, optional
        Receives the patterns that cannot be used, whose groups are left out; without it they are an error.

    Yields
    ------
    number : int
        Index of the job.
    PatchBatch
        Patches in the order of the rows (and, for "member" models, of the members in each).

    Raises
    ------
    PtychodaskError
        If the store changed since it was planned, a pattern cannot be read or used, or a network returns values that
        are not finite.

    Notes
    -----
    Patterns are read outside the device lock, so that one thread can read while another predicts.
    """
    with stage(seconds, "read"):
        stored = open_stored(jobs[0])
        rows = [_rows_of(stored, job, start, stop) for job in jobs]
        wanted = np.unique(np.concatenate([member.ravel() for _, member in rows]))
        patterns = _read_patterns(stored, wanted, skipped)
    if patterns is None:
        return
    if len(patterns.pattern) < len(wanted):
        rows = [
            (row[usable], member[usable])
            for row, member in rows
            for usable in [np.isin(member, patterns.pattern).all(1)]
        ]
    for number, (job, (row, member)) in enumerate(zip(jobs, rows, strict=True)):
        with stage(seconds, "load"):
            _predictor(job, patterns.scan, job.batch_size)
        for batch in _predict_rows(job, patterns, row, member, seconds, skipped):
            yield number, batch


def _rows_of(
    stored: StoredScan, job: PredictionJob, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows of a job's group table and their members, without dropped ones."""
    member = stored.member(job.groups, start, stop) if job.member is None else job.member[start:stop]
    if len(member) != stop - start:
        raise _changed(job)
    kept = stored.groups_kept(member, job.drop, job.experiment)
    return np.arange(start, stop)[kept], member[kept]


def _read_patterns(stored: StoredScan, wanted: NDArray[np.int32], skipped: list[Skipped] | None) -> _Patterns | None:
    """Usable ones of the wanted patterns; None if there is none."""
    if skipped is not None:
        readable = stored.readable(wanted)
        _leave_out(stored, wanted[~readable], "cannot be read", skipped)
        wanted = wanted[readable]
    if len(wanted) == 0:
        return None
    scan = part_of(stored, wanted)
    with np.errstate(invalid="ignore"):
        x = scan.network_input(slice(None))
    # A sum is not finite if one of its values is not, which includes the square root of negative counts.
    total, lowest = x.sum(axis=(1, 2)), x.min(axis=(1, 2))
    wrong, dark = ~np.isfinite(total) | (lowest < 0), total == 0
    _leave_out(stored, wanted[wrong], "have values that are negative or not finite", skipped)
    _leave_out(stored, wanted[dark], "are dark: zero in all good pixels", skipped)
    usable = ~(wrong | dark)
    if usable.all():
        return _Patterns(scan, wanted, scan.position_yx_px, x)
    return _Patterns(scan, wanted[usable], scan.position_yx_px[usable], x[usable]) if usable.any() else None


def part_of(stored: StoredScan, wanted: NDArray[np.integer[Any]]) -> Scan:
    """Part of the scan with some patterns, ascending.

    Damaged chunks between them are not read.
    """
    try:
        return stored.part(wanted)
    except PtychodaskError:
        return stored.part(wanted, gaps=False)


def _leave_out(stored: StoredScan, patterns: NDArray[np.int32], reason: str, skipped: list[Skipped] | None) -> None:
    """Record patterns that are left out; raises `PtychodaskError` if `skipped` is None."""
    if len(patterns) == 0:
        return
    if skipped is None:
        listed = ", ".join(map(str, patterns[:10].tolist())) + (", ..." if len(patterns) > 10 else "")
        raise PtychodaskError(
            f"{stored.label}: {len(patterns)} patterns {reason} ({listed}); leave them out with drop= (--drop) or "
            "on_error='skip' (--on-error skip)"
        )
    skipped.append(Skipped(tuple(patterns.tolist()), reason))


def _predictor(job: PredictionJob, part: Scan, batch_size: int) -> Predict:
    key = (job.model.content_hash, job.bound_to or job.data_hash, batch_size, job.precision)
    return _PREDICTORS.get(key, lambda: job.model.load().bind(part).compile(batch_size, job.precision))


def _predict_batch(
    job: PredictionJob, part: Scan, x: NDArray[np.float32], offset: NDArray[np.float32]
) -> NDArray[np.complex64]:
    """Patches of one batch, in smaller calls if memory runs out."""
    key = job.model.content_hash, job.precision
    while True:
        size = min(job.batch_size, _BATCH_SIZES.get(key, job.batch_size))
        try:
            if size == job.batch_size:
                return np.asarray(_predictor(job, part, size)(x, offset))
            return _in_smaller_calls(_predictor(job, part, size), size, x, offset)
        except Exception as error:
            if not models.is_out_of_memory(error):
                raise
            if size == 1:
                raise PtychodaskError(
                    f"model: the device has too little memory for one group of {x.shape[-1]} patterns of {x.shape[1]} "
                    "pixels; free memory, or predict on another device"
                ) from error
            logger.warning("the device is out of memory with batches of %d groups: continuing with %d", size, size // 2)
            _BATCH_SIZES[key] = size // 2


def _in_smaller_calls(
    predict: Predict, size: int, x: NDArray[np.float32], offset: NDArray[np.float32]
) -> NDArray[np.complex64]:
    parts = []
    for first in range(0, len(x), size):
        rows = np.minimum(np.arange(first, first + size), len(x) - 1)
        parts.append(np.asarray(predict(x[rows], offset[rows]))[: len(x) - first])
    return np.concatenate(parts)


def _predict_rows(
    job: PredictionJob,
    patterns: _Patterns,
    row: NDArray[np.int64],
    member: NDArray[np.int32],
    seconds: dict[str, float],
    skipped: list[Skipped] | None,
) -> Iterator[PatchBatch]:
    """Patches of the groups in some rows, batch by batch."""
    index = np.searchsorted(patterns.pattern, member)
    position = patterns.position_yx_px[index]
    centre = position.mean(axis=1)
    offset = (position - centre[:, None]).astype(np.float32)
    for first in range(0, len(index), job.batch_size):
        # The compiled call has one batch shape, so the last batch is padded (with its last group) and cut.
        batch = np.minimum(np.arange(first, first + job.batch_size), len(index) - 1)
        n_real = min(job.batch_size, len(index) - first)
        real = batch[:n_real]
        with stage(seconds, "gather"):
            x = np.ascontiguousarray(np.moveaxis(patterns.x[index[batch]], 1, -1))
        with _DEVICE, stage(seconds, "predict"):
            patches = _predict_batch(job, patterns.scan, x, offset[batch])[:n_real]
        label = f"groups {row[real[0]]}..{row[real[-1]]} of '{job.groups}'"
        finite = _finite_groups(patches, x.shape, label, skipped)
        if not finite.all():
            seeds = tuple(member[real[~finite], 0].tolist())
            assert skipped is not None
            skipped.append(Skipped(seeds, "the network returned values that are not finite"))
            patches, real = patches[finite], real[finite]
        if patches.ndim == 4:
            yield PatchBatch(
                patches.reshape(-1, *patches.shape[-2:]), position[real].reshape(-1, 2), member[real].reshape(-1)
            )
        else:
            yield PatchBatch(patches, centre[real], member[real, 0])


def open_anew(store: LocationLike) -> StoredScan:
    """Open a store, checked, for planning and tasks in this process."""
    stored = StoredScan(store)
    stored.check()
    return _STORES.get((stored.data_hash, stored.path), lambda: stored, anew=True)


def open_stored(job: PredictionJob) -> StoredScan:
    """Store of a job, opened once per process.

    Raises `PtychodaskError` if the store changed since it was planned.
    """
    return open_once(job.store, job.data_hash, lambda _: _changed(job))


def open_once(store: str, data_hash: str, changed: Callable[[str], PtychodaskError]) -> StoredScan:
    """Store planned with a data hash, opened once per process.

    Raises the error that `changed` makes of the present data hash, if the scan was never that of `data_hash`.
    """

    def opened() -> StoredScan:
        stored = StoredScan(store)
        if not stored.had_hash(data_hash):
            raise changed(stored.data_hash)
        return stored

    return _STORES.get((data_hash, store), opened)


def _changed(job: PredictionJob) -> PtychodaskError:
    return PtychodaskError(
        f"{job.store}: its data or its group table '{job.groups}' changed since it was planned; plan again"
    )


def _finite_groups(
    patches: NDArray[Any], input_shape: tuple[int, ...], label: str, skipped: list[Skipped] | None
) -> NDArray[np.bool_]:
    """True for groups with finite patches (group,).

    Raises `PtychodaskError` for the others if `skipped` is None.
    """
    _, n_pixels, _, members = input_shape
    if patches.shape[1:] not in ((members, n_pixels, n_pixels), (n_pixels, n_pixels)):
        raise PtychodaskError(
            f"model: patches for {label} have shape {patches.shape}, "
            f"expected (group, {members}, {n_pixels}, {n_pixels}) or (group, {n_pixels}, {n_pixels})"
        )
    # One sum is cheaper than a test of each value; it is finite unless a value is not, or the sum overflows.
    with np.errstate(all="ignore"):
        total = patches.sum()
    if np.isfinite(total):
        return np.ones(len(patches), bool)
    finite = np.isfinite(patches).reshape(len(patches), -1).all(axis=1)
    if skipped is None and not finite.all():
        raise PtychodaskError(
            f"model: the network returned values that are not finite for {label}; its weights or input are damaged: "
            "train again, drop these patterns, or pass on_error='skip' (--on-error skip)"
        )
    return finite
