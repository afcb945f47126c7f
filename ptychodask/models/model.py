"""A network with its weights: written by `train`, read by `load_model`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.html import card, curves
from ptychodask.models.contract import Output, PatchModel, Predict, check_n_pixels, predict_in_batches
from ptychodask.models.description import epochs_of
from ptychodask.models.spec import ModelSpec, Optics, Precision
from ptychodask.scan import Scan

if TYPE_CHECKING:
    from ptychodask.models.backend import keras

LOSSES = {"held_out_loss": "held out", "loss": "trained on"}
"""Losses in an entry of the training history, and their labels in a plot."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its weights, bound to the optics of one scan."""

    spec: ModelSpec
    """Architecture of the network."""

    weights: list[NDArray[np.float32]]
    """Trained weights, in the network's order."""

    optics: Optics
    """Probe, input scale and mask of the scan it is bound to."""

    trained_on: dict[str, Any] = field(default_factory=dict)
    """Provenance of the weights: scan, training spec, versions."""

    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per epoch: seconds, loss, held-out loss, learning rate."""

    path: str | None = None
    """The bundle on disk, or None for a model that exists only in memory."""

    content_hash: str = ""
    """SHA-256 over spec and weights."""

    output: Output = "member"
    """One patch per member, at the member's position."""

    runs_on_keras: ClassVar[bool] = True
    """Runs on Keras' backend, on the devices visible to it."""

    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)
    """Precisions it can compute in."""

    def __post_init__(self) -> None:
        if not self.content_hash:
            object.__setattr__(self, "content_hash", hash_weights(self.spec, self.weights))

    def __repr__(self) -> str:
        return one_line(self, self.weights)

    def _repr_html_(self) -> str:
        facts = {
            "members": f"{self.members}, one patch each",
            "patterns": f"{self.n_pixels} x {self.n_pixels}",
            "weights": f"{sum(array.size for array in self.weights):,}",
            "data-consistency steps": f"{self.spec.projections_before} before the U-Net of {self.spec.levels} levels, "
            f"{self.spec.projections_after} after it",
            "epochs": f"{epochs_of(self.history)} in {self.history[-1]['seconds']:,.0f} s" if self.history else None,
            "bundle": self.path,
            "content hash": self.content_hash[:12],
        }
        epochs = [entry for entry in self.history if LOSSES.keys() <= entry.keys()]
        losses = {words: [entry[name] for entry in epochs] for name, words in LOSSES.items()}
        return card(f"Model {self.kind}", facts, [curves(losses, "loss by epoch")] if epochs else [])

    @property
    def kind(self) -> str:
        """`pinn` or `baseline`."""
        return self.spec.kind

    @property
    def members(self) -> int:
        """Patterns in one group, C."""
        return self.spec.members

    @property
    def n_pixels(self) -> int:
        """Pixels across a pattern, N."""
        return self.spec.n_pixels

    def bind(self, scan: Scan) -> Model:
        """The same weights with the optics of a scan.

        Parameters
        ----------
        scan : Scan

        Returns
        -------
        Model

        Raises
        ------
        PtychodaskError
            If the scan's patterns differ in size from the network's.
        """
        check_n_pixels(self, scan)
        return Model(
            self.spec, self.weights, Optics.of(scan), self.trained_on, self.history, self.path, self.content_hash
        )

    def network(self, precision: Precision = "float32") -> keras.Model:
        """The Keras network with these weights and optics.

        Raises
        ------
        PtychodaskError
            If the weights do not fit the spec.
        """
        # Loaded with the first network that is built: plans and reports only read what a bundle records.
        from ptychodask.models.networks import build_network

        network = build_network(self.spec, self.optics, precision)
        expected = [tuple(weight.shape) for weight in network.weights]
        if expected != [weight.shape for weight in self.weights]:
            raise PtychodaskError(
                f"{self.path or 'model'}: has {len(self.weights)} weights that do not fit its spec (expected "
                f"{len(expected)}); train again"
            )
        network.set_weights(self.weights)
        return network

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        """Prediction function of a fixed batch size, compiled if the backend compiles.

        Parameters
        ----------
        batch_size : int
            Groups in each call.
        precision : {"float32", "mixed"}
            Precision of the U-Net's convolutions.

        Returns
        -------
        callable
            From X float32 (batch_size, N, N, C), normalised, and offsets float32 (batch_size, C, 2), pixels, to patches
            complex64 (batch_size, C, N, N) at the members' positions.
        """
        from ptychodask.models.networks import compiled_call

        return compiled_call(self.network(precision), batch_size)

    def predict(self, x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
        """Patches of any number of groups.

        Parameters
        ----------
        x : float32 array (group, N, N, C)
            Normalised amplitude (`Scan.network_input`).
        offset_yx_px : float32 array (group, C, 2)
            Member positions minus their mean, (y, x), pixels.

        Returns
        -------
        complex64 array (group, C, N, N)
            Object around each member's position, in the units of the scan's calibration.

        Raises
        ------
        PtychodaskError
            If a shape does not fit the network.
        """
        return predict_in_batches(self, x, offset_yx_px)


def one_line(model: PatchModel, weights: Iterable[NDArray[np.float32]]) -> str:
    """One-line description of a model."""
    n_weights = sum(array.size for array in weights)
    label = f"{model.path}: " if model.path else ""
    return (
        f"{type(model).__name__}({label}{model.kind}, N = {model.n_pixels}, C = {model.members}, "
        f"one patch per {model.output}, {n_weights:,} weights)"
    )


def hash_weights(spec: ModelSpec, weights: list[NDArray[np.float32]]) -> str:
    """SHA-256 over a spec and its weights."""
    fields = asdict(spec)
    # Left out if they are off, so that bundles older than these fields keep their hash.
    if not spec.attention:
        del fields["attention"]
    if not spec.momentum:
        del fields["momentum"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for array in weights:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
