"""Training data: split, groups as arrays, batches in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, group_positions
from ptychodask.probes import illuminated_radius_px
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.training.spec import TrainingSpec

READ_BYTES = 4 * 2**20
"""Network input read at a time, bytes."""


def split_patterns(scan: Scan, spec: TrainingSpec) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split of a scan into training patterns and held-out patterns.

    Parameters
    ----------
    scan : Scan
    spec : TrainingSpec

    Returns
    -------
    training, held_out : int64 arrays
        Sorted pattern indices, none of `spec.exclude`. If a side is held out, patterns whose illumination would overlap
        both parts are in neither.

    Raises
    ------
    PtychodaskError
        If a part has no pattern, or `spec.exclude` contains an index beyond the last pattern.
    """
    patterns = _used_patterns(scan, spec)
    if spec.validation == "random":
        order = patterns[np.random.default_rng(spec.seed).permutation(len(patterns))]
        n_held_out = max(1, round(spec.validation_fraction * len(patterns)))
        held_out, training = np.sort(order[:n_held_out]), np.sort(order[n_held_out:])
    else:
        axis = 0 if spec.validation in ("top", "bottom") else 1
        coordinate = scan.position_yx_px[patterns, axis] * (1 if spec.validation in ("right", "bottom") else -1)
        border = np.quantile(coordinate, 1 - spec.validation_fraction)
        gap = 2 * illuminated_radius_px(scan.probe)
        held_out, training = patterns[coordinate > border], patterns[coordinate < border - gap]
    if not len(training) or not len(held_out):
        raise PtychodaskError(
            f"{scan.store or 'scan'}: validation='{spec.validation}' with validation_fraction="
            f"{spec.validation_fraction} leaves {len(training)} patterns to train on and {len(held_out)} held out; "
            "pass another validation_fraction"
        )
    return training, held_out


def _used_patterns(scan: Scan, spec: TrainingSpec) -> NDArray[np.int64]:
    """Patterns that are not excluded, int64, sorted."""
    if spec.exclude and spec.exclude[-1] >= scan.n_patterns:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: exclude names pattern {spec.exclude[-1]}, the scan has {scan.n_patterns} "
            "(0 is the first)"
        )
    used = np.setdiff1d(np.arange(scan.n_patterns), np.asarray(spec.exclude, np.int64))
    if not len(used):
        raise PtychodaskError(f"{scan.store or 'scan'}: exclude names all of its patterns; leave some to train on")
    return used


def groups_within(scan: Scan, patterns: NDArray[np.int64], spec: GroupingSpec) -> NDArray[np.int32]:
    """Groups (group, channel) whose members are all among some patterns."""
    scan_index = None if scan.scan_index is None else scan.scan_index[patterns]
    return patterns[group_positions(scan.position_yx_px[patterns], spec, scan_index)].astype(np.int32)


def judging_groups(
    scan: Scan, training: NDArray[np.int64], held_out: NDArray[np.int64], spec: GroupingSpec
) -> NDArray[np.int32]:
    """Groups (group, channel) seeded by held-out patterns.

    The other members are drawn from all patterns: patterns held out at random are far apart, and a group of only these
    would be unlike the groups of a scan. Only the seed of such a group enters the loss (`seed_alone`).
    """
    member = groups_within(scan, np.union1d(training, held_out), spec)
    return member[np.isin(member[:, 0], held_out)]


def member_offsets(scan: Scan, member: NDArray[np.int32]) -> NDArray[np.float32]:
    """Offsets of members from their group's centre, float32 (group, channel, 2), pixels."""
    position = scan.position_yx_px[member]
    return (position - position.mean(axis=1, keepdims=True)).astype(np.float32)


TargetOf = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]
"""Target of some groups: from their member table and the X of each member."""


GroupArrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""X (group, N, N, C), offsets (group, C, 2) and target of some groups."""


@dataclass(frozen=True)
class PatternBuffer:
    """Network input of some patterns, in memory."""

    pattern: NDArray[np.int64]
    """Indices of the patterns, sorted."""

    x: NDArray[np.float32]
    """Their normalised amplitude (pattern, N, N)."""

    def take(self, member: NDArray[np.int32]) -> NDArray[np.float32]:
        """Input of members, float32 (group, C, N, N)."""
        return self.x[np.searchsorted(self.pattern, member)]


class GroupReader:
    """Groups of a scan as arrays, read on access.

    Parameters
    ----------
    source : path or Scan
        A store, or a scan.
    grouping : GroupingSpec
        How groups are drawn.
    member : int32 array (group, channel), optional
        Groups to read, in place of those drawn by `grouping`.
    target_of : callable, optional
        Target of some groups; by default the measured amplitude.

    Examples
    --------
    >>> scan = Scan(
    ...     diffraction=np.full((6, 8, 8), 9, np.uint16),
    ...     position_yx_px=np.arange(12.0).reshape(6, 2),
    ...     probe=np.ones((1, 8, 8), np.complex64),
    ...     domain="counts",
    ...     normalization=0.5,
    ... )
    >>> x, offset_yx_px, amplitude = GroupReader(scan, GroupingSpec(members=2, neighbours=2))[0:3]
    >>> x.shape, offset_yx_px.shape, amplitude.shape, float(amplitude.max())
    ((3, 8, 8, 2), (3, 2, 2), (3, 2, 8, 8), 3.0)
    """

    def __init__(
        self,
        source: str | Path | Scan,
        grouping: GroupingSpec = GroupingSpec(),
        *,
        member: NDArray[np.int32] | None = None,
        target_of: TargetOf | None = None,
    ) -> None:
        self.scan = source if isinstance(source, Scan) else open_scan(source)
        if member is None:
            member = group_positions(self.scan.position_yx_px, grouping, self.scan.scan_index)
        self.member = member
        self.target_of = amplitude_target(self.scan) if target_of is None else target_of

    def __len__(self) -> int:
        return len(self.member)

    def __getitem__(self, groups: slice | NDArray[np.integer[Any]]) -> GroupArrays:
        """X, offsets and target of some groups.

        X is float32 (group, N, N, C), offsets are float32 (group, C, 2) in pixels. The measured amplitude, as a target,
        is float32 (group, C, N, N).
        """
        return self.arrays(groups, self.read_patterns(groups))

    def read_patterns(self, groups: slice | NDArray[np.integer[Any]]) -> PatternBuffer:
        """Read the patterns of some groups, each once."""
        pattern = np.unique(self.member[groups]).astype(np.int64)
        n_pixels = self.scan.n_pixels
        x = np.empty((len(pattern), n_pixels, n_pixels), np.float32)
        step = max(1, READ_BYTES // (4 * n_pixels**2))
        # A read needs several times the memory of its result, so that it is done in pieces.
        for start in range(0, len(pattern), step):
            x[start : start + step] = self.scan.network_input(pattern[start : start + step])
        return PatternBuffer(pattern, x)

    def arrays(self, groups: slice | NDArray[np.integer[Any]], buffer: PatternBuffer) -> GroupArrays:
        """Arrays of some groups from buffered patterns."""
        member = self.member[groups]
        x = buffer.take(member)
        return np.moveaxis(x, 1, -1), member_offsets(self.scan, member), self.target_of(member, x)


def seed_alone(target_of: TargetOf) -> TargetOf:
    """The same target for each group's seed, and NaN for other members.

    Losses ignore members whose target is NaN.
    """

    def target(member: NDArray[np.int32], x: NDArray[np.float32]) -> NDArray[np.float32]:
        values = target_of(member, x).copy()
        values[:, 1:] = np.nan
        return values

    return target


def amplitude_target(scan: Scan) -> TargetOf:
    """Measured amplitude (group, C, N, N), target of the PINN."""
    scale = np.float32(1.0 / scan.normalization)
    return lambda _, x: x * scale


def patch_target(scan: Scan) -> TargetOf:
    """Target of the baseline: labels, or patches of the truth.

    Float32 (group, 1, N, N, 2), real and imaginary part.

    Raises
    ------
    PtychodaskError
        If the scan has neither.
    """
    if scan.label is not None:
        label = scan.label
        return lambda member, _: _pairs(np.asarray(label[member.reshape(-1)]).reshape(*member.shape, *label.shape[1:]))
    if scan.truth is None:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: has neither truth nor labels, which supervised training needs; "
            "train model='pinn', or a baseline on a simulated scan"
        )
    parts = [ndimage.spline_filter(part) for part in (scan.truth.object.real, scan.truth.object.imag)]
    corner = np.asarray(scan.truth.corner_yx_px)
    grid = np.indices((scan.n_pixels, scan.n_pixels)) - scan.n_pixels // 2

    def target(member: NDArray[np.int32], _: NDArray[np.float32]) -> NDArray[np.float32]:
        pixel_yx_px = (scan.position_yx_px[member] - corner)[..., None, None] + grid
        coordinates = np.moveaxis(pixel_yx_px, 2, 0)
        values = [ndimage.map_coordinates(part, coordinates, prefilter=False, mode="nearest") for part in parts]
        return np.stack(values, axis=-1).astype(np.float32)

    return target


def _pairs(patches: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([patches.real, patches.imag], axis=-1).astype(np.float32)
