"""Architecture of a network and its optics, without importing a network library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.probes import illumination
from ptychodask.scan import Scan

Kind = Literal["pinn", "baseline"]

Precision = Literal["float32", "mixed"]
"""Precision of a network's convolutions; `mixed` is bfloat16 from float32 weights. The physics is always float32."""

BOUNDS = {
    "n_pixels": (8, 8192),
    "members": (1, 64),
    "n_filters_scale": (1, 64),
    "levels": (1, 8),
    "projections_before": (0, 1000),
    "projections_after": (0, 1000),
}
"""Lowest and highest values, so that a damaged bundle cannot request a network too large for memory."""


BASE_FILTERS = 16


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Architecture of a network."""

    kind: Kind = "pinn"
    """`pinn`: trained only on patterns, through the forward model; `baseline`: supervised, one pattern at a time."""

    n_pixels: int = 64
    """Pixels across a pattern, N; divisible by 2**`levels`."""

    members: int = 4
    """Patterns read together, C; 1 for the baseline."""

    n_filters_scale: int = 1
    """Width of the network: 16 times this many filters at full resolution, doubled at each level."""

    levels: int = 3
    """Number of times the U-Net halves the resolution."""

    projections_before: int = 8
    """Data-consistency steps of the group before the U-Net; with 0 the U-Net reads the patterns."""

    projections_after: int = 2
    """Data-consistency steps of the group after the U-Net."""

    momentum: float = 0.8
    """Momentum of the data-consistency steps before the U-Net, 0 to less than 1; 0 is none."""

    attention: bool = False
    """Self-attention at the bottom of the U-Net."""

    object_amplitude: float | None = None
    """Amplitude of the flat object that a prediction starts from, in the units of the calibration; with None, for each
    scan the amplitude at which a flat object transmits as many photons as were measured."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PtychodaskError(f"model: kind is {self.kind!r}, expected one of: {', '.join(get_args(Kind))}")
        if self.kind == "baseline" and self.members != 1:
            raise PtychodaskError(f"model: a baseline reads one pattern at a time, found members={self.members}")
        for name, (lowest, highest) in BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or not lowest <= value <= highest:
                raise PtychodaskError(f"model: {name} is {value!r}, expected a whole number from {lowest} to {highest}")
        if self.n_pixels % 2**self.levels:
            raise PtychodaskError(
                f"model: n_pixels is {self.n_pixels}, not divisible by 2**levels = {2**self.levels}; lower levels"
            )
        momentum = self.momentum
        if not (isinstance(momentum, int | float | np.number) and 0 <= momentum < 1):
            raise PtychodaskError(f"model: momentum is {momentum!r}, expected a number from 0 to less than 1")
        amplitude = self.object_amplitude
        if amplitude is None:
            return
        if not (isinstance(amplitude, int | float | np.number) and np.isfinite(amplitude) and amplitude > 0):
            raise PtychodaskError(f"model: object_amplitude is {amplitude!r}, expected a positive number")


@dataclass(frozen=True, eq=False)
class Optics:
    """Instrument data of a network: probe, input scale and detector mask."""

    probe: NDArray[np.complex64]
    """Calibrated probe, complex64 (mode, N, N)."""

    normalization: float
    """Factor from amplitude to network input."""

    mask: NDArray[np.float32]
    """1 where a detector pixel is good, float32 (N, N)."""

    @classmethod
    def of(cls, scan: Scan) -> Optics:
        """The optics of a scan."""
        good = np.ones((scan.n_pixels, scan.n_pixels), bool) if scan.mask is None else scan.mask
        return cls(scan.probe.astype(np.complex64), float(scan.normalization), good.astype(np.float32))

    @property
    def weight(self) -> NDArray[np.float32]:
        """Relative illumination |P|²/max|P|², float32 (N, N)."""
        return illumination(self.probe)

    @property
    def mean_counts(self) -> float:
        """Mean counts per pattern of the scan, from its normalisation."""
        n_pixels = self.probe.shape[-1]
        return float((n_pixels / 2) ** 2 / self.normalization**2)

    def flat_amplitude(self) -> float:
        """Amplitude of a flat object that transmits the measured number of photons."""
        # Photons on bad pixels were not measured, so that they are left out of the model too.
        far_field = np.fft.fftshift(np.fft.fft2(self.probe, norm="ortho"), axes=(-2, -1))
        return float(np.sqrt(self.mean_counts / (np.abs(far_field) ** 2 * self.mask).sum(dtype=np.float64)))


def bottom_weights(spec: ModelSpec) -> int:
    """Weights in a U-Net's widest convolution, about a third of all."""
    return 9 * (BASE_FILTERS * spec.n_filters_scale * 2**spec.levels) ** 2
