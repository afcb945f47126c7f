"""Contract between a network and a reconstruction; loads no network library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.models.spec import Precision
from ptychodask.scan import Scan

Predict = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.complex64]]
"""From X (batch, N, N, C) and offsets (batch, C, 2), of one fixed batch size, to patches (batch, ..., N, N)."""


Device = Literal["any", "gpu"]
"""Device of a network: any that is available, or a GPU."""


InputDomain = Literal["normalised", "amplitude", "counts"]
"""Input of a network: X as `Scan.network_input` returns it, measured amplitude, or its square."""


Output = Literal["member", "group"]
"""Output of a network: one patch per member, or one per group."""


PREDICT_BATCH = 32


@runtime_checkable
class MinimalModel(Protocol):
    """Least interface of a user's own class, see `AdaptedModel`."""

    @property
    def kind(self) -> str:
        """Kind of model: "pinn", "baseline", or another word."""

    @property
    def members(self) -> int:
        """Patterns in one group, C."""

    @property
    def n_pixels(self) -> int:
        """Pixels across a pattern, N."""

    @property
    def output(self) -> Output:
        """One patch per member at its position, or one at the centre."""

    @property
    def content_hash(self) -> str:
        """Hash of everything that its predictions depend on."""

    @property
    def path(self) -> str | None:
        """Bundle on disk; None for a model in memory."""

    def bind(self, scan: Scan) -> MinimalModel:
        """Model for this scan's probe and normalisation; raises `PtychodaskError` if N differs."""

    def compile(self, batch_size: int) -> Predict:
        """Compiled call for one batch size.

        It maps X float32 (batch, N, N, C) and offset float32 (batch, C, 2) to complex64 patches (batch, C, N, N) for
        "member", (batch, N, N) for "group".
        """


@runtime_checkable
class PatchModel(MinimalModel, Protocol):
    """Interface of a network to the engine.

    `load_model` returns such models; `CallableModel` wraps a callable as one, `resolve_model` any other `MinimalModel`.
    """

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions it can compute in."""

    @property
    def runs_on_keras(self) -> bool:
        """True if it runs on Keras, on the devices visible to it."""

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """Provenance of the weights: scan, training spec, versions; empty if unknown."""

    def bind(self, scan: Scan) -> PatchModel:
        """As `MinimalModel.bind`."""

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        """As `MinimalModel.compile`, in one of the `precisions`."""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A `MinimalModel` as a `PatchModel`: float32, not on Keras, of unknown training."""

    network: MinimalModel

    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    runs_on_keras: ClassVar[bool] = False
    trained_on: ClassVar[Mapping[str, Any]] = {}

    @property
    def kind(self) -> str:
        return self.network.kind

    @property
    def members(self) -> int:
        return self.network.members

    @property
    def n_pixels(self) -> int:
        return self.network.n_pixels

    @property
    def output(self) -> Output:
        return self.network.output

    @property
    def content_hash(self) -> str:
        return self.network.content_hash

    @property
    def path(self) -> str | None:
        return self.network.path

    def bind(self, scan: Scan) -> AdaptedModel:
        return AdaptedModel(self.network.bind(scan))

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        assert precision in self.precisions
        return self.network.compile(batch_size)


def check_n_pixels(model: MinimalModel, scan: Scan) -> None:
    """Raise `PtychodaskError` if pattern sizes of scan and network differ."""
    if scan.n_pixels != model.n_pixels:
        raise PtychodaskError(
            f"{model.path or 'model'}: takes patterns of {model.n_pixels} pixels, {scan.store or 'the scan'} has "
            f"{scan.n_pixels}; train a model on this scan, or ingest it with n_pixels={model.n_pixels}"
        )


def predict_in_batches(
    model: MinimalModel, x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]
) -> NDArray[np.complex64]:
    """Patches of any number of groups, predicted in batches of one size.

    Arguments and errors as in `Model.predict`.
    """
    shape = (model.n_pixels, model.n_pixels, model.members)
    if x.ndim != 4 or x.shape[1:] != shape:
        raise PtychodaskError(f"model: X has shape {x.shape}, expected (group, {', '.join(map(str, shape))})")
    if offset_yx_px.shape != (len(x), model.members, 2):
        raise PtychodaskError(
            f"model: offsets have shape {offset_yx_px.shape}, expected ({len(x)}, {model.members}, 2)"
        )
    call = _call_of(model)
    channels = (model.members,) if model.output == "member" else ()
    patches = np.empty((len(x), *channels, model.n_pixels, model.n_pixels), np.complex64)
    for start in range(0, len(x), PREDICT_BATCH):
        part = slice(start, start + PREDICT_BATCH)
        # The compiled call has one batch shape, so the last batch is padded and cut.
        padded = [_pad_batch(values[part], PREDICT_BATCH) for values in (x, offset_yx_px)]
        patches[part] = call(*padded)[: len(x[part])]
    return patches


_CALLS: WeakKeyDictionary[MinimalModel, Predict] = WeakKeyDictionary()
"""Compiled calls of the networks that predicted, as long as these live."""


def _call_of(model: MinimalModel) -> Predict:
    """Call of a model, compiled once for each network."""
    if not getattr(model, "runs_on_keras", False):
        # A function of the user's is no work to prepare, and its call may hold the model, which then never ended.
        return model.compile(PREDICT_BATCH)
    if model not in _CALLS:
        _CALLS[model] = model.compile(PREDICT_BATCH)
    return _CALLS[model]


def _pad_batch(values: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    """Pad values to `batch_size` by repeating the last entry; float32, contiguous."""
    missing = batch_size - len(values)
    if missing:
        values = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
    return np.ascontiguousarray(values, dtype=np.float32)
