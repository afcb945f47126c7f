"""One chunk of groups becomes patches: each pattern read once, one compiled model per process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ptychodask import models
from ptychodask.grouping import groups_kept
from ptychodask.models.spec import Precision
from ptychodask.scan import PtychodaskError, Scan
from ptychodask.store import ScanReader, open_scan

MODEL_ORDER = ("pinn", "baseline")
"""Kinds of recorded models, the one that is taken first in front."""

CACHE_SIZE = 4
"""Scans, and compiled models, that a process keeps for its next tasks."""

Predict = Callable[[NDArray[np.float32], NDArray[np.float32]], Any]
"""X (batch, N, N, C) and offset (batch, C, 2) to patches, one fixed batch."""

Cached = TypeVar("Cached")
Opened = TypeVar("Opened", Scan, ScanReader)


@runtime_checkable
class PatchModel(Protocol):
    """What the engine asks of a network; `load_model` returns such models, `CallableModel` makes one of a callable."""

    @property
    def kind(self) -> str:
        """What it is: "pinn", "baseline", or another word."""

    @property
    def members(self) -> int:
        """Patterns in one group, C."""

    @property
    def n_pixels(self) -> int:
        """Pixels across a pattern, N."""

    @property
    def output(self) -> Literal["member", "group"]:
        """A patch for each member at its position, or one for the group at its centre."""

    @property
    def content_hash(self) -> str:
        """Hash of everything that its predictions depend on."""

    @property
    def path(self) -> str | None:
        """Bundle on disk; None for a model that lives in memory only."""

    def bind(self, scan: Scan) -> PatchModel:
        """The model for this scan's probe and normalisation; raises `PtychodaskError` when N does not fit."""

    def compile(self, batch_size: int) -> Predict:
        """One call of fixed shape.

        It takes X float32 (batch, N, N, C) and offset float32 (batch, C, 2) to complex64 patches (batch, C, N, N) for
        "member", (batch, N, N) for "group".
        """


@dataclass(frozen=True, eq=False)
class ModelReference:
    """What travels to a worker: where the model lies, or the model itself when it lies nowhere."""

    content_hash: str
    path: str | None
    model: PatchModel | None

    @classmethod
    def to(cls, model: PatchModel) -> ModelReference:
        """Reference to a model."""
        if model.path is None:
            return cls(model.content_hash, None, model)
        return cls(model.content_hash, str(Path(model.path).resolve()), None)

    def load(self) -> PatchModel:
        """The model; raises `PtychodaskError` when its bundle is another one by now."""
        if self.model is not None:
            return self.model
        assert self.path is not None
        model = models.load_model(self.path)
        if model.content_hash != self.content_hash:
            raise PtychodaskError(
                f"{self.path}: the model's hash is {model.content_hash}, expected {self.content_hash}; "
                "it was replaced while the run was at work: start again"
            )
        return model


@dataclass(frozen=True, eq=False)
class PredictionJob:
    """All that a task needs to know beside its rows of the group table."""

    store: str
    """Path of the store."""

    data_hash: str
    """Data hash of the store as it was planned."""

    groups: str
    """Name of the group table."""

    model: ModelReference

    batch_size: int
    """Groups in one call of the network."""

    drop: tuple[int, ...] = ()
    """Patterns whose groups are left out."""

    precision: Precision = "float32"
    """Of the network's convolutions."""


class PatchBatch(NamedTuple):
    """Patches and where they belong."""

    patches: NDArray[np.complex64]
    """complex64 (n, N, N)."""

    position_yx_px: NDArray[np.float64]
    """Coordinates (y, x) of element [N//2, N//2] of each patch, float64 (n, 2)."""

    pattern: NDArray[np.integer[Any]]
    """The pattern of each patch, of a group's patch its seed (n,)."""


class _ProcessCache(Generic[Cached]):
    """The latest few things that tasks of this process share, each made once by the first task that asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Cached] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Cached]) -> Cached:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
                while len(self._kept) > CACHE_SIZE:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


# Per process and not per Dask worker: the threaded scheduler has no worker, and one process may hold several.
_SCANS: _ProcessCache[Scan] = _ProcessCache()
_READERS: _ProcessCache[ScanReader] = _ProcessCache()
_PREDICTORS: _ProcessCache[Predict] = _ProcessCache()
_DEVICE = threading.Lock()


def resolve_model(scan: Scan, model: str | Path | PatchModel | None) -> PatchModel:
    """The model that an argument names, or the one that the scan's store records.

    Parameters
    ----------
    scan : Scan
        Opened from a store.
    model : path, model or None
        None takes the latest recorded `pinn`, else the latest `baseline`.

    Returns
    -------
    PatchModel

    Raises
    ------
    PtychodaskError
        If none is recorded, or the recorded one is missing or was changed.
    """
    if model is None:
        return _recorded_model(scan)
    if isinstance(model, str | Path):
        return models.load_model(model)
    if not isinstance(model, PatchModel):
        raise PtychodaskError(
            f"model: found {type(model).__name__}, expected a path or what load_model returns, or a CallableModel"
        )
    return model


def _recorded_model(scan: Scan) -> PatchModel:
    record = recorded_model(scan)
    if record is None:
        raise PtychodaskError(
            f"{scan.store}: no model is recorded for it; run 'ptychodask train {scan.store}', or pass model= (--model)"
        )
    path = Path(str(scan.store)).resolve().parent / record["path"]
    if not path.exists():
        raise PtychodaskError(
            f"{scan.store}: its latest {record['kind']} is recorded at {path}, where nothing is; "
            "train again, or pass model= (--model)"
        )
    model: PatchModel = models.load_model(path)
    if model.content_hash != record["hash"]:
        raise PtychodaskError(
            f"{scan.store}: its latest {record['kind']} is recorded with hash {record['hash']}, {path} has "
            f"{model.content_hash}; pass model= (--model) to take it as it is, or train again"
        )
    return model


def recorded_model(scan: Scan) -> dict[str, str] | None:
    """Record (kind, path, hash) of the model that a store's `reconstruct` takes, or None."""
    records = scan.attributes.get("models", [])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise PtychodaskError(f"{scan.store}: its record of models cannot be read; pass model= (--model)")
    for kind in MODEL_ORDER:
        for record in reversed(records):
            if record.keys() >= {"kind", "path", "hash"} and record["kind"] == kind:
                return dict(record)
    return None


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of a block to ``seconds[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def predict_groups(
    jobs: Sequence[PredictionJob], start: int, stop: int, seconds: dict[str, float]
) -> Iterator[tuple[int, PatchBatch]]:
    """Patches of consecutive groups, batch by batch, from one reading of their patterns.

    Parameters
    ----------
    jobs : sequence of PredictionJob
        Of one store, one for each model.
    start, stop : int
        Rows of each job's group table.
    seconds : dict
        Takes the wall time of the stages ``load``, ``read``, ``gather`` and ``predict``.

    Yields
    ------
    number : int
        Which job.
    PatchBatch
        Patches in the order of the rows (and, for "member" models, of the members in each).

    Raises
    ------
    PtychodaskError
        If the store changed since it was planned, or a network returns values that are not finite.

    Notes
    -----
    Patterns are read outside the device lock, so that one thread reads while another predicts.
    """
    with stage(seconds, "read"):
        reader = open_reader(jobs[0])
        rows = [_rows_of(reader, job, start, stop) for job in jobs]
        wanted = np.unique(np.concatenate([member.ravel() for _, member in rows]))
        part = reader.part(wanted)
        patterns = part.network_input(slice(None))
    for number, (job, (row, member)) in enumerate(zip(jobs, rows, strict=True)):
        with stage(seconds, "load"):
            predict = _predictor(job, part)
        places = np.searchsorted(wanted, member)
        for batch in _predict_rows(job, predict, patterns, part.position_yx_px, places, row, seconds):
            yield number, batch._replace(pattern=wanted[batch.pattern])


def _rows_of(
    reader: ScanReader, job: PredictionJob, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows of a job's group table, and their members, less those that it drops."""
    member = reader.member(job.groups, start, stop)
    if len(member) != stop - start:
        raise _changed(job)
    kept = groups_kept(member, job.drop)
    return np.arange(start, stop)[kept], member[kept]


def _predictor(job: PredictionJob, part: Scan) -> Predict:
    key = (job.model.content_hash, job.data_hash, job.batch_size, job.precision)
    return _PREDICTORS.get(key, lambda: compile_model(job.model.load().bind(part), job.batch_size, job.precision))


def compile_model(model: PatchModel, batch_size: int, precision: Precision) -> Predict:
    """A model's call of one batch size, in a precision that `precisions` says it has."""
    return model.compile(batch_size) if precision == "float32" else model.compile(batch_size, precision)  # type: ignore[call-arg]


def precisions(model: PatchModel) -> tuple[Precision, ...]:
    """Precisions that a model computes in; one that says nothing computes in float32 alone."""
    return getattr(model, "precisions", ("float32",))


def _predict_rows(
    job: PredictionJob,
    predict: Predict,
    patterns: NDArray[np.float32],
    position_yx_px: NDArray[np.float64],
    places: NDArray[np.int64],
    row: NDArray[np.int64],
    seconds: dict[str, float],
) -> Iterator[PatchBatch]:
    """Patches of groups whose members lie at `places` in the patterns; they name patterns by their places."""
    position = position_yx_px[places]
    centre = position.mean(axis=1)
    offset = (position - centre[:, None]).astype(np.float32)
    for first in range(0, len(places), job.batch_size):
        # The compiled call has one batch shape, so the last batch is padded (with its last group) and cut.
        batch = np.minimum(np.arange(first, first + job.batch_size), len(places) - 1)
        n_real = min(job.batch_size, len(places) - first)
        real = batch[:n_real]
        with stage(seconds, "gather"):
            x = np.ascontiguousarray(np.moveaxis(patterns[places[batch]], 1, -1))
        with _DEVICE, stage(seconds, "predict"):
            patches = np.asarray(predict(x, offset[batch]))[:n_real]
        _check_patches(patches, x.shape, f"groups {row[real[0]]}..{row[real[-1]]} of '{job.groups}'")
        if patches.ndim == 4:
            yield PatchBatch(
                patches.reshape(-1, *patches.shape[-2:]), position[real].reshape(-1, 2), places[real].reshape(-1)
            )
        else:
            yield PatchBatch(patches, centre[real], places[real, 0])


def open_reader(job: PredictionJob) -> ScanReader:
    """The store of a job, opened once per process; raises `PtychodaskError` if it changed since it was planned."""
    return _READERS.get((job.data_hash, job.store), lambda: _as_planned(job, ScanReader(job.store)))


def open_source(job: PredictionJob) -> Scan:
    """The scan of a job, opened once per process; raises `PtychodaskError` if it changed since it was planned."""
    return _SCANS.get((job.data_hash, job.store), lambda: _as_planned(job, open_scan(job.store)))


def _as_planned(job: PredictionJob, opened: Opened) -> Opened:
    if opened.data_hash != job.data_hash:
        raise _changed(job)
    return opened


def _changed(job: PredictionJob) -> PtychodaskError:
    return PtychodaskError(
        f"{job.store}: its data or its group table '{job.groups}' changed since the plan; plan again"
    )


def _check_patches(patches: NDArray[Any], input_shape: tuple[int, ...], what: str) -> None:
    _, n_pixels, _, members = input_shape
    if patches.shape[1:] not in ((members, n_pixels, n_pixels), (n_pixels, n_pixels)):
        raise PtychodaskError(
            f"model: patches for {what} have shape {patches.shape}, "
            f"expected (group, {members}, {n_pixels}, {n_pixels}) or (group, {n_pixels}, {n_pixels})"
        )
    # A sum is finite unless a value is not, or all are huge: it spares looking at each.
    with np.errstate(all="ignore"):
        total = patches.sum()
    if not np.isfinite(total) and not np.isfinite(patches).all():
        raise PtychodaskError(
            f"model: the network returned values that are not finite for {what}; its weights or its input are damaged: "
            "train again, or drop these patterns"
        )
