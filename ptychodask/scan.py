"""Scans: patterns, positions and probe, and checks of their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, check_choice, in_brief
from ptychodask.html import card, dots, image

Domain = Literal["counts", "amplitude"]
"""Unit of stored patterns: photon counts, or amplitude (square root of counts)."""


Calibration = Literal["as_given", "incident", "mean_counts"]
"""Scale of the probe, see `calibrate_probe`."""


PATTERNS_SHOWN = 8
"""Largest number of patterns read to show a scan in a notebook."""


LARGEST_EXTENT_PX = 1e7
"""Largest extent of positions, pixels: a larger one is an error, since its object would fill 10^15 bytes."""


class PatternSource(Protocol):
    """Patterns in memory or on disk.

    They are sliced, or indexed by an integer array, along the first axis.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Truth:
    """Known object of a simulated scan, and its location."""

    object: NDArray[np.complex64]
    """Object, complex64 (y, x)."""

    corner_yx_px: tuple[float, float] = (0.0, 0.0)
    """Scan coordinates (y, x) of pixel [0, 0], pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """One acquisition: patterns, positions, probe and metadata.

    Patterns and labels stay on disk if the scan was opened from a store; everything else is in memory.

    Examples
    --------
    >>> scan = Scan(
    ...     diffraction=np.ones((3, 8, 8), np.uint16),
    ...     position_yx_px=np.array([[0.0, 0.0], [0.0, 2.5], [3.0, 1.0]]),
    ...     probe=np.ones((1, 8, 8), np.complex64),
    ...     domain="counts",
    ...     normalization=0.5,
    ... )
    >>> scan.n_patterns, scan.n_pixels
    (3, 8)
    >>> float(scan.network_input([0]).mean())
    0.5
    """

    diffraction: PatternSource
    """Patterns as measured (pattern, N, N) in the unit of `domain`, DC at [N//2, N//2]."""

    position_yx_px: NDArray[np.float64]
    """Positions of the probe (pattern, 2), (y, x), object pixels."""

    probe: NDArray[np.complex64]
    """Calibrated probe (mode, N, N), centred on [N//2, N//2]."""

    domain: Domain
    """Unit of `diffraction`."""

    normalization: float
    """Factor from amplitude to network input, one for the complete scan."""

    calibration: Calibration = "as_given"
    """Scale of the probe, see `calibrate_probe`."""

    probe_initial: NDArray[np.complex64] | None = None
    """The calibrated probe as ingested (mode, N, N), before any refinement."""

    position_measured_yx_px: NDArray[np.float64] | None = None
    """The positions as ingested (pattern, 2), if others have been applied since."""

    mask: NDArray[np.bool_] | None = None
    """True where a detector pixel is good (N, N); None when all are."""

    flux: NDArray[np.float32] | None = None
    """Incident flux of each pattern relative to the mean (pattern,); None when constant."""

    scan_index: NDArray[np.int64] | None = None
    """Experiment that each pattern belongs to (pattern,)."""

    source_index: NDArray[np.int64] | None = None
    """Row of each pattern in the source file (pattern,)."""

    truth: Truth | None = None
    """The known object, for simulated scans."""

    label: PatternSource | None = None
    """Supervised labels, complex64 (pattern, N, N)."""

    pixel_size_m: float | None = None
    """Size of an object pixel, metres."""

    energy_ev: float | None = None
    """Photon (or electron) energy, electronvolts."""

    distance_m: float | None = None
    """Sample to detector, metres."""

    data_hash: str = ""
    """SHA-256 over diffraction, positions, mask and probe."""

    store: str | None = None
    """Path of the store that the scan was opened from."""

    attributes: dict[str, Any] = field(default_factory=dict)
    """Other attributes of the store's root (provenance, models, versions)."""

    def __post_init__(self) -> None:
        label = self.store or "scan"
        shape = self.diffraction.shape
        check_pattern_shape(shape, label)
        n_patterns, n_pixels = shape[0], shape[1]
        check_positions(self.position_yx_px, n_patterns, label)
        check_choice("domain", self.domain, get_args(Domain), label)
        check_choice("calibration", self.calibration, get_args(Calibration), label)
        if self.probe.ndim != 3 or self.probe.shape[1:] != (n_pixels, n_pixels):
            raise PtychodaskError(
                f"{label}: probe has shape {self.probe.shape}, expected (mode, {n_pixels}, {n_pixels}) as the patterns"
            )
        if not np.isfinite(self.normalization) or self.normalization <= 0:
            raise PtychodaskError(f"{label}: normalization is {self.normalization}, expected a positive number")
        if self.mask is not None and self.mask.shape != (n_pixels, n_pixels):
            raise PtychodaskError(f"{label}: mask has shape {self.mask.shape}, expected ({n_pixels}, {n_pixels})")
        for name in ("flux", "scan_index", "source_index", "label"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != n_patterns:
                raise PtychodaskError(f"{label}: {name} has {value.shape[0]} entries for {n_patterns} patterns")

    def __repr__(self) -> str:
        return f"Scan({self.store or 'in memory'}: {self.n_patterns:,} patterns of {self._size}, {self.domain})"

    def _repr_html_(self) -> str:
        extent_px = np.ptp(self.position_yx_px, axis=0)
        facts = {
            "patterns": f"{self.n_patterns:,} of {self._size}, {self.domain}",
            "positions": f"{extent_px[0]:,.0f} x {extent_px[1]:,.0f} px (y, x)",
            "probe": f"{len(self.probe)} mode{'s' * (len(self.probe) > 1)}, {self.calibration}",
            "bad pixels": None if self.mask is None else f"{np.count_nonzero(~self.mask):,}",
            "object pixel": None if self.pixel_size_m is None else f"{self.pixel_size_m * 1e9:.4g} nm",
            "energy": None if self.energy_ev is None else f"{self.energy_ev:,.6g} eV",
            "distance": None if self.distance_m is None else f"{self.distance_m:.4g} m",
            "truth": None if self.truth is None else "known, {} x {} px".format(*self.truth.object.shape),
            "labels": None if self.label is None else "one for each pattern",
            "data hash": self.data_hash[:12] or None,
        }
        pictures = [
            dots(self.position_yx_px, "positions"),
            image(np.sqrt((np.abs(self.probe) ** 2).sum(axis=0)), "amplitude of the probe"),
        ]
        shown = np.unique(np.linspace(0, self.n_patterns - 1, PATTERNS_SHOWN).astype(np.int64))
        try:
            mean = self.amplitude(shown).mean(axis=0)
            pictures.append(image(mean, f"mean amplitude of {len(shown)} patterns"))
        except PtychodaskError as error:
            facts["patterns"] = in_brief(error)
        return card(f"Scan {self.store or 'in memory'}", facts, pictures)

    @property
    def _size(self) -> str:
        return f"{self.n_pixels} x {self.n_pixels}"

    @property
    def n_patterns(self) -> int:
        """Number of patterns."""
        return int(self.diffraction.shape[0])

    @property
    def n_pixels(self) -> int:
        """Pixels across one pattern, N."""
        return int(self.diffraction.shape[1])

    def amplitude(self, index: Any) -> NDArray[np.float32]:
        """Measured amplitude (square root of counts) of patterns, bad pixels 0.

        Parameters
        ----------
        index : slice or int array (k,)
            Indices of the patterns.

        Returns
        -------
        float32 array (k, N, N)
        """
        amplitude = np.asarray(self.diffraction[_as_index(index)]).astype(np.float32)
        if self.mask is not None:
            # Assigned, not multiplied: a bad pixel may contain NaN or negative numbers.
            amplitude[:, ~self.mask] = 0
        if self.domain == "counts":
            np.sqrt(amplitude, out=amplitude)
        return amplitude

    def network_input(self, index: Any) -> NDArray[np.float32]:
        """Normalised amplitude X of patterns, the input of networks.

        Parameters
        ----------
        index : slice or int array (k,)
            Indices of the patterns.

        Returns
        -------
        float32 array (k, N, N)
            ``amplitude * normalization``, scaled to the mean flux if `flux` is known.
        """
        amplitude = self.amplitude(index)
        amplitude *= np.float32(self.normalization)
        if self.flux is not None:
            amplitude /= np.sqrt(self.flux[_as_index(index)])[:, None, None]
        return amplitude


def _as_index(index: Any) -> Any:
    return index if isinstance(index, slice) else np.asarray(index, dtype=np.int64)


def check_pattern_shape(shape: tuple[int, ...], label: str) -> None:
    """Raise `PtychodaskError` unless `shape` is a valid (pattern, N, N).

    There is at least one pattern, and N is divisible by 4 and at least 8.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise PtychodaskError(
            f"{label}: patterns have shape {tuple(shape)}, expected (pattern, N, N); crop or pad them with n_pixels="
        )
    if shape[0] == 0:
        raise PtychodaskError(f"{label}: contains no pattern; expected at least one")
    if shape[1] % 4 or shape[1] < 8:
        smaller = max(8, shape[1] - shape[1] % 4)
        raise PtychodaskError(
            f"{label}: patterns are {shape[1]} pixels wide, expected a multiple of 4, at least 8; "
            f"pass n_pixels={smaller} to crop or n_pixels={smaller + 4} to pad"
        )


def as_rows(index: NDArray[np.int64]) -> str:
    """Ascending rows as text in the syntax of `drop_frames`, however many.

    Examples
    --------
    >>> as_rows(np.array([3, 7, 8, 9]))
    '3,7:10'
    """
    stretches = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1) if len(index) else []
    return ",".join(str(rows[0]) if len(rows) == 1 else f"{rows[0]}:{rows[-1] + 1}" for rows in stretches)


def check_positions(position_yx_px: NDArray[np.float64], n_patterns: int, label: str) -> None:
    """Raise `PtychodaskError` unless there is one finite (y, x) for each pattern."""
    if position_yx_px.ndim != 2 or position_yx_px.shape[1] != 2:
        raise PtychodaskError(f"{label}: positions have shape {position_yx_px.shape}, expected (pattern, 2)")
    if len(position_yx_px) != n_patterns:
        raise PtychodaskError(
            f"{label}: {n_patterns} patterns but {len(position_yx_px)} positions; "
            "expected one position per pattern: correct the file"
        )
    bad = np.flatnonzero(~np.isfinite(position_yx_px).all(axis=1))
    if len(bad):
        raise PtychodaskError(
            f"{label}: {len(bad)} of {n_patterns} positions are not finite (patterns {as_rows(bad)}); "
            "leave them out with drop_frames= (--drop-frames)"
        )
    extent = float(np.ptp(position_yx_px, axis=0).max()) if n_patterns else 0.0
    if extent > LARGEST_EXTENT_PX:
        raise PtychodaskError(
            f"{label}: positions extend over {extent:.3g} px, expected at most {LARGEST_EXTENT_PX:.0e}; "
            "give their unit with units=, or leave outliers out with drop_frames="
        )


def input_normalization(mean_counts: float, n_pixels: int, label: str = "scan") -> float:
    """Factor from measured amplitude to network input.

    Parameters
    ----------
    mean_counts : float
        Mean over the patterns of the sum of amplitude squared, bad pixels left out.
    n_pixels : int
        Pixels across a pattern, N.
    label : str
        Name of the scan in error messages.

    Returns
    -------
    float
        ``sqrt((N/2)**2 / mean_counts)``; one factor for the complete scan.

    Raises
    ------
    PtychodaskError
        If every pattern is zero.

    Examples
    --------
    >>> input_normalization(16.0, 4)
    0.5
    """
    if not mean_counts > 0:
        raise PtychodaskError(f"{label}: every pattern is zero; nothing can be reconstructed")
    return float(np.sqrt((n_pixels / 2) ** 2 / mean_counts))


def calibrate_probe(
    probe: NDArray[np.complexfloating[Any, Any]],
    calibration: Calibration,
    *,
    mean_counts: float,
    incident_counts: float | None = None,
    label: str = "scan",
) -> NDArray[np.complex64]:
    """Scale a probe to the patterns.

    Parameters
    ----------
    probe : complex array (mode, N, N)
    calibration : {"as_given", "incident", "mean_counts"}
        ``as_given`` keeps its scale (probe and patterns share units); ``incident`` sets Σ|P|² to the known flux;
        ``mean_counts`` sets Σ|P|² to the mean counts per pattern, so that the object's amplitude is relative to
        the mean transmission.
    mean_counts : float
        Mean counts per pattern.
    incident_counts : float, optional
        Photons per pattern incident on the sample, for ``incident``.
    label : str
        Name of the scan in error messages.

    Returns
    -------
    complex64 array (mode, N, N)

    Raises
    ------
    PtychodaskError
        If the probe is zero or not finite, or the flux is missing.

    Examples
    --------
    >>> probe = calibrate_probe(np.ones((1, 2, 2)), "mean_counts", mean_counts=16.0)
    >>> float((np.abs(probe) ** 2).sum())
    16.0
    """
    check_choice("calibration", calibration, get_args(Calibration), label)
    total = float((np.abs(probe) ** 2).sum(dtype=np.float64))
    if not np.isfinite(total) or total <= 0:
        raise PtychodaskError(f"{label}: the probe's total intensity is {total}, expected a positive number")
    if calibration == "as_given":
        return probe.astype(np.complex64)
    if calibration == "mean_counts":
        return (probe * np.sqrt(mean_counts / total)).astype(np.complex64)
    if incident_counts is None or not np.isfinite(incident_counts) or incident_counts <= 0:
        raise PtychodaskError(
            f"{label}: calibration 'incident' needs incident_counts=, photons per pattern on the sample; "
            f"found {incident_counts}"
        )
    return (probe * np.sqrt(incident_counts / total)).astype(np.complex64)
