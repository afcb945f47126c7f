"""Contract between a network and a reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ptychodask.scan import Scan

Predict = Callable[[NDArray[np.float32], NDArray[np.float32]], Any]
"""Function of X (batch, N, N, C) and offset (batch, C, 2) that returns patches, for one fixed batch size."""


Device = Literal["any", "gpu"]
"""Device of a network: any that is available, or a GPU."""


@runtime_checkable
class PatchModel(Protocol):
    """Interface of a network to the engine.

    `load_model` returns such models; `CallableModel` wraps a callable as one.
    """

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
    def output(self) -> Literal["member", "group"]:
        """One patch per member at its position, or one at the centre."""

    @property
    def content_hash(self) -> str:
        """Hash of everything that its predictions depend on."""

    @property
    def path(self) -> str | None:
        """Bundle on disk; None for a model in memory."""

    def bind(self, scan: Scan) -> PatchModel:
        """Model for this scan's probe and normalisation; raises `PtychodaskError` if N differs."""

    def compile(self, batch_size: int) -> Predict:
        """Compiled call for one batch size.

        It maps X float32 (batch, N, N, C) and offset float32 (batch, C, 2) to complex64 patches (batch, C, N, N) for
        "member", (batch, N, N) for "group".
        """


InputDomain = Literal["normalised", "amplitude", "counts"]
"""Input of a network: X as `Scan.network_input` returns it, measured amplitude, or its square."""


Output = Literal["member", "group"]
"""Output of a network: one patch per member, or one per group."""
