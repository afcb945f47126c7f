"""How a network is trained: plain values, no network library needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ptychodask.grouping import GroupingSpec
from ptychodask.models import ModelSpec
from ptychodask.models.spec import Kind, Precision
from ptychodask.scan import PtychodaskError, check_choice

Loss = Literal["amplitude", "mae", "poisson", "staged"]
Schedule = Literal["cosine", "constant", "plateau"]
Validation = Literal["random", "left", "right", "top", "bottom"]

REFERENCE_STEP = 16
"""Groups in one step that `learning_rate` is meant for when it is scaled (Goyal et al., arXiv 1706.02677)."""


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

    momentum: float = ModelSpec.momentum
    """Share of each data-consistent step that the next one goes on with."""

    attention: bool = ModelSpec.attention
    """Self-attention at the bottom of the U-Net."""

    epochs: int = 50
    """Passes over the training groups at most."""

    max_minutes: float | None = None
    """Take no step after so many minutes (the last epoch is still judged); the learning rate falls with the clock."""

    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss (a staged loss then goes on to its next stage)."""

    batch_size: int = 16
    """Groups in one batch."""

    accumulation: int = 1
    """Batches whose gradients are averaged into one step."""

    devices: int = 1
    """Devices that share each batch; more than one needs TensorFlow (MirroredStrategy) or JAX (keras.distribution)."""

    precision: Precision = "float32"
    """Of the U-Net's convolutions while training: `float32`, or `mixed` (bfloat16); physics and weights are float32."""

    learning_rate: float = 1e-3
    """Adam's rate at the start."""

    scale_learning_rate: bool = False
    """Take the rate for a step of 16 groups and multiply it by how many times more (or fewer) a step has."""

    schedule: Schedule = "cosine"
    """The rate falls to zero along a half cosine, stays `constant`, or halves on a `plateau` of the held-out loss."""

    loss: Loss | None = None
    """`amplitude`, `mae` (of the amplitude), `poisson` or `staged` (amplitude, then Poisson); by default staged for
    counts, amplitude for amplitudes, whose photon number is unknown."""

    tv: float = 0.0
    """Weight of the patches' total variation where light fell, per pixel, relative to the flat object."""

    real_space: float = 0.0
    """Weight of the disagreement of a group's members where they overlap."""

    probe_rate: float = 0.0
    """Fit the probe too: how far a step moves it, relative to the rate of the weights and to the root mean square of
    each mode where light falls; 0 keeps the stored probe. For the PINN; some 3 to 10 suit the default rate."""

    freeze_encoder: bool = False
    """Keep the U-Net's way down and its bottom as `initial` has them."""

    validation: Validation = "random"
    """Held-out patterns: drawn at random (each judged in a group with its neighbours), or those on one side of the
    field, with a dark gap to the others."""

    validation_fraction: float = 0.1
    """Share of the patterns that is held out."""

    exclude: Sequence[int] = ()
    """Patterns (indices in the store) that neither training nor validation sees."""

    seed: int = 0
    """Seed of the split, the groups, the weights and the order of the steps."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Kind), "training")
        check_choice("validation", self.validation, get_args(Validation), "training")
        check_choice("schedule", self.schedule, get_args(Schedule), "training")
        if self.loss is not None:
            check_choice("loss", self.loss, get_args(Loss), "training")
        if self.model == "baseline" and self.members not in (None, 1):
            raise PtychodaskError(f"training: a baseline reads one pattern at a time, found members={self.members}")
        check_choice("precision", self.precision, get_args(Precision), "training")
        for name in ("epochs", "batch_size", "patience", "accumulation", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PtychodaskError(f"training: {name} is {value}, expected 1 or more")
        if self.seed < 0:
            raise PtychodaskError(f"training: seed is {self.seed}, expected 0 or more")
        for name in ("learning_rate", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PtychodaskError(f"training: {name} is {value}, expected a positive number")
        for name in ("tv", "real_space", "probe_rate"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise PtychodaskError(f"training: {name} is {value}, expected 0 or more")
        if self.real_space and self.grouping.members == 1:
            raise PtychodaskError(
                f"training: real_space is {self.real_space}, but groups of one member have nothing to agree with; "
                "pass members=2 or more, or real_space=0"
            )
        if self.probe_rate and self.model == "baseline":
            raise PtychodaskError(
                f"training: probe_rate is {self.probe_rate}, but a baseline learns from patches, which tell nothing of "
                "the probe; pass model='pinn', or probe_rate=0"
            )
        if self.batch_size % self.devices:
            raise PtychodaskError(
                f"training: batch_size is {self.batch_size}, which {self.devices} devices cannot share evenly; pass a "
                f"multiple of {self.devices}"
            )
        if not 0 < self.validation_fraction < 1:
            raise PtychodaskError(
                f"training: validation_fraction is {self.validation_fraction}, expected a number between 0 and 1"
            )
        object.__setattr__(self, "exclude", _pattern_indices(self.exclude))
        _ = self.grouping

    @property
    def grouping(self) -> GroupingSpec:
        """How the training groups are drawn."""
        members = self.members or (1 if self.model == "baseline" else GroupingSpec.members)
        if members == 1:
            return GroupingSpec(members=1, seed=self.seed)
        return GroupingSpec(members=members, neighbours=self.neighbours, oversampling=self.oversampling, seed=self.seed)

    @property
    def first_learning_rate(self) -> float:
        """Adam's rate at the start, scaled with the step where that is asked for.

        Examples
        --------
        >>> TrainingSpec(batch_size=64, learning_rate=1e-3, scale_learning_rate=True).first_learning_rate
        0.004
        """
        if not self.scale_learning_rate:
            return self.learning_rate
        return self.learning_rate * (self.batch_size * self.accumulation) / REFERENCE_STEP


def _pattern_indices(exclude: Sequence[int]) -> tuple[int, ...]:
    """Sorted plain integers, so that a spec can be compared and written as JSON."""
    indices = np.asarray(exclude)
    if indices.size and (indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer) or indices.min() < 0):
        raise PtychodaskError(
            f"training: exclude has shape {indices.shape} and type {indices.dtype}, expected pattern indices: "
            "integers from 0 on, in one row"
        )
    return tuple(int(i) for i in np.unique(indices))
