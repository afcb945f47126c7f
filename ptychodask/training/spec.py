"""Training settings, without importing a network library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.grouping import GroupingSpec, default_neighbours
from ptychodask.models import ModelSpec
from ptychodask.models.spec import Kind, Precision
from ptychodask.options import check_types, option

Loss = Literal["amplitude", "mae", "poisson", "staged"]
Schedule = Literal["cosine", "constant", "plateau"]
Validation = Literal["random", "left", "right", "top", "bottom"]

REFERENCE_STEP = 16
"""Groups per step at which a scaled rate equals `learning_rate` (Goyal et al., arXiv 1706.02677)."""


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Settings of a training."""

    model: Kind = option("pinn", help="Network to train.")
    """`pinn` (needs only patterns) or `baseline` (needs the truth or labels)."""

    members: int | None = option(None, help="Patterns in one group.")
    """Patterns in one group, C; by default 4 for the PINN, always 1 for the baseline."""

    neighbours: int | None = option(
        None, help="Number of nearest positions from which members are drawn; by default 7, or --members if more."
    )
    """Nearest positions that members are drawn from, K; by default 7 or `members`, whichever is more. No effect on
    groups of one member."""

    oversampling: int = option(GroupingSpec.oversampling, help="Number of groups drawn for each pattern.")
    """Training groups seeded by each pattern."""

    n_filters_scale: int = option(
        ModelSpec.n_filters_scale, help="Width of the network: multiplies its number of filters."
    )
    """Width of the network."""

    levels: int = option(ModelSpec.levels, help="Number of downsampling steps of the U-Net.")
    """Number of times the U-Net halves the resolution."""

    projections_before: int = option(ModelSpec.projections_before, help="Data-consistency steps before the U-Net.")
    """Data-consistency steps before the U-Net."""

    projections_after: int = option(ModelSpec.projections_after, help="Data-consistency steps after the U-Net.")
    """Data-consistency steps after the U-Net."""

    momentum: float = option(ModelSpec.momentum, help="Momentum of the data-consistency steps, 0 to 1 (default 0.8).")
    """Momentum of the data-consistency steps before the U-Net, 0 to less than 1."""

    attention: bool = option(ModelSpec.attention, help="Add self-attention at the bottom of the U-Net.")
    """Self-attention at the bottom of the U-Net."""

    epochs: int = option(50, help="Largest number of epochs.")
    """Maximum number of passes over the training groups."""

    max_minutes: float | None = option(None, help="Stop after this many minutes.")
    """Time limit, after which only the held-out loss is computed; the learning rate then decreases with time."""

    patience: int | None = option(None, help="Stop after this many epochs without a lower held-out loss.")
    """Stop after this many epochs without a lower held-out loss (a staged loss then continues with its next stage)."""

    batch_size: int = option(16, help="Groups in one batch.")
    """Groups in one batch."""

    accumulation: int = option(1, help="Number of batches whose gradients are averaged into one step.")
    """Batches whose gradients are averaged into one step."""

    devices: int = option(1, help="Number of devices that share each batch.")
    """Devices that share each batch; more than one needs TensorFlow (MirroredStrategy) or JAX (keras.distribution)."""

    precision: Precision = option("float32", help="Precision of the convolutions: float32, or mixed (bfloat16).")
    """Precision of the U-Net's convolutions: `float32`, or `mixed` (bfloat16); physics and weights are float32."""

    learning_rate: float = option(1e-3, help="Initial learning rate.")
    """Initial learning rate of Adam."""

    scale_learning_rate: bool = option(False, help="Multiply the learning rate by (groups per step) / 16.")
    """Multiply the rate by groups per step / 16."""

    schedule: Schedule = option("cosine", help="Learning-rate schedule: cosine, constant or plateau.")
    """`cosine`: the rate decreases to zero along a half cosine; `constant`; `plateau`: it halves when the held-out loss
    stops decreasing."""

    loss: Loss | None = option(None, help="Loss function: amplitude, mae, poisson or staged.")
    """`amplitude`, `mae` (of the amplitude), `poisson` or `staged` (amplitude, then Poisson); by default staged for
    counts, amplitude for amplitudes, whose photon number is unknown."""

    tv: float = option(0.0, help="Weight of the total variation of the patches.")
    """Weight of the patches' total variation over illuminated pixels, per pixel, relative to the flat object."""

    real_space: float = option(0.0, help="Weight of the mismatch between overlapping patches of a group.")
    """Weight of the mean squared difference between members' patches and the group's merged patch."""

    probe_rate: float = option(0.0, help="Also fit the probe, at this multiple of the learning rate; 0 keeps it fixed.")
    """Fit the probe too: step size relative to the rate of the weights and to the root mean square of each mode over
    illuminated pixels; 0 keeps the stored probe. PINN only; 3 to 10 suit the default rate."""

    freeze_encoder: bool = option(False, help="Freeze the U-Net's encoder at the initial weights.")
    """Keep the weights of the U-Net's encoder and bottleneck from `initial`."""

    validation: Validation = option(
        "random", help="Held-out patterns: random, or on one side of the scan (left, right, top, bottom)."
    )
    """Held-out patterns: drawn at random (each validated in a group with its neighbours), or those on one side of the
    scan, with a gap so that no illumination is shared."""

    validation_fraction: float = option(0.1, help="Fraction of the patterns held out.")
    """Share of the patterns that is held out."""

    exclude: Sequence[int] = option((), help="Pattern indices to exclude from training and validation.")
    """Patterns (indices in the store) used in neither training nor validation."""

    seed: int = option(0, help="Random seed of split, groups, weights and order.")
    """Seed of the split, the groups, the weights and the order of the steps."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Kind), "training")
        check_types(self, "training")
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
                f"training: real_space is {self.real_space}, but compares members and groups have only one; "
                "pass members=2 or more, or real_space=0"
            )
        if self.probe_rate and self.model == "baseline":
            raise PtychodaskError(
                f"training: probe_rate is {self.probe_rate}, but a baseline learns from patches, which do not depend "
                "on the probe; pass model='pinn', or probe_rate=0"
            )
        if self.batch_size % self.devices:
            raise PtychodaskError(
                f"training: batch_size is {self.batch_size}, not divisible among {self.devices} devices; pass a "
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
        """Grouping of the training patterns."""
        return GroupingSpec(
            members=self.n_members,
            neighbours=default_neighbours(self.n_members) if self.neighbours is None else self.neighbours,
            oversampling=self.oversampling,
            seed=self.seed,
        )

    def recorded(self) -> dict[str, Any]:
        """Fields by name, as models and checkpoints record them."""
        return asdict(self) | {"neighbours": self.grouping.neighbours}

    @property
    def n_members(self) -> int:
        """Patterns in one group, C."""
        if self.members is not None:
            return self.members
        return 1 if self.model == "baseline" else GroupingSpec.members

    @property
    def first_learning_rate(self) -> float:
        """Initial learning rate of Adam, scaled if `scale_learning_rate`.

        Examples
        --------
        >>> TrainingSpec(batch_size=64, learning_rate=1e-3, scale_learning_rate=True).first_learning_rate
        0.004
        """
        if not self.scale_learning_rate:
            return self.learning_rate
        return self.learning_rate * (self.batch_size * self.accumulation) / REFERENCE_STEP


def _pattern_indices(exclude: Sequence[int]) -> tuple[int, ...]:
    """Sorted plain integers, for comparison of specs and for JSON."""
    indices = np.asarray(exclude)
    if indices.size and (indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer) or indices.min() < 0):
        raise PtychodaskError(
            f"training: exclude has shape {indices.shape} and type {indices.dtype}, expected pattern indices: "
            "a sequence of integers from 0"
        )
    return tuple(int(i) for i in np.unique(indices))
