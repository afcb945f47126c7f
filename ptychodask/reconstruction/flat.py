"""Iterative reconstruction through the engine: a flat object, refined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ptychodask.models.contract import Output, Predict, check_n_pixels
from ptychodask.models.spec import Precision
from ptychodask.scan import Scan

ITERATIVE = "iterative"
"""Name of the flat object among models."""


@dataclass(frozen=True)
class FlatObject:
    """Flat object in the place of a network: all else is refinement."""

    n_pixels: int

    kind: ClassVar[str] = ITERATIVE
    members: ClassVar[int] = 1
    output: ClassVar[Output] = "member"
    content_hash: ClassVar[str] = ITERATIVE
    path: ClassVar[str | None] = None
    precisions: ClassVar[tuple[Precision, ...]] = ("float32",)
    runs_on_keras: ClassVar[bool] = False
    trained_on: ClassVar[Mapping[str, Any]] = {}

    def bind(self, scan: Scan) -> FlatObject:
        """See `MinimalModel.bind`."""
        check_n_pixels(self, scan)
        return self

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        """See `PatchModel.compile`."""
        shape = batch_size, self.members, self.n_pixels, self.n_pixels
        return lambda x, offset_yx_px: np.ones(shape, np.complex64)
