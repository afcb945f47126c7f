"""Training data: split, groups as arrays, batches in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, check_drop, group_positions, groups_kept
from ptychodask.probes import illuminated_radius_px
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.training.spec import TrainingSpec

GROUPS_AT_ONCE = 64
"""Groups that an iteration reads together."""

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
    member : int array (group, channel), optional
        Groups to read, in place of those drawn by `grouping`.
    target_of : callable, optional
        Target of some groups; by default the measured amplitude.
    exclude : int array (k,), optional
        Patterns that no group contains.

    Raises
    ------
    PtychodaskError
        If the members are no table of existing patterns, both `member` and `grouping` are given, or no group remains.

    Notes
    -----
    A slice or an array of indices gives the arrays of these groups, with a leading axis; one index the arrays of one
    group, without it. Iteration yields the groups one by one. ``torch.utils.data.DataLoader(reader, batch_size=16,
    shuffle=True)`` works, but reads each pattern once for each group: `as_torch_dataset` reads less.

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
        member: NDArray[np.integer[Any]] | None = None,
        target_of: TargetOf | None = None,
        exclude: Sequence[int] | NDArray[np.integer[Any]] = (),
    ) -> None:
        self.scan = source if isinstance(source, Scan) else open_scan(source)
        label = self.scan.store or "scan"
        if member is not None and grouping != GroupingSpec():
            raise PtychodaskError(f"{label}: member and {grouping} both name the groups; pass one of them")
        # Patterns of all experiments: a network may learn from each.
        check_drop(self.scan.store or "scan", self.scan.n_patterns, exclude)
        used = np.setdiff1d(np.arange(self.scan.n_patterns), exclude)
        if member is None:
            self.member = groups_within(self.scan, used, grouping)
        else:
            table = _as_table(member, self.scan.n_patterns, label)
            self.member = table[groups_kept(table, exclude)] if len(exclude) else table
        if not len(self.member):
            raise PtychodaskError(f"{label}: each group contains an excluded pattern; exclude fewer")
        self.target_of = amplitude_target(self.scan) if target_of is None else target_of

    def __len__(self) -> int:
        return len(self.member)

    def __iter__(self) -> Iterator[GroupArrays]:
        """Groups one by one, read together where they are neighbours."""
        for start in range(0, len(self), GROUPS_AT_ONCE):
            yield from self.__getitems__(np.arange(start, min(start + GROUPS_AT_ONCE, len(self))))

    def __getitem__(self, groups: Any) -> GroupArrays:
        """X, offsets and target of one group or some.

        X is float32 (group, N, N, C), offsets are float32 (group, C, 2) in pixels. The measured amplitude, as a target,
        is float32 (group, C, N, N). With a single index there is no axis of groups.

        Raises
        ------
        IndexError
            If there is no such group.
        PtychodaskError
            If `groups` is no index, slice or sequence of indices.
        """
        if isinstance(groups, Integral) and not isinstance(groups, bool | np.bool_):
            return _first(self[[int(groups)]])
        if not isinstance(groups, slice):
            groups = self._indices(groups)
        return self.arrays(groups, self.read_patterns(groups))

    def __getitems__(self, groups: Sequence[int] | NDArray[np.integer[Any]]) -> list[GroupArrays]:
        """Arrays of some groups, one by one; PyTorch's loaders call this."""
        x, offset, target = self[groups]
        return list(zip(x, offset, target, strict=True))

    def _indices(self, groups: Any) -> NDArray[np.int64]:
        """Indices of groups, int64 (k,)."""
        try:
            indices = np.asarray(groups)
        except ValueError:
            indices = np.empty((0, 0))
        if indices.dtype == bool and indices.shape == (len(self),):
            indices = np.flatnonzero(indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise PtychodaskError(
                f"GroupReader: {groups!r} selects no groups; pass an index, a slice, or a list of indices"
            )
        if indices.size and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"GroupReader: groups {indices.min()}..{indices.max()}, expected 0..{len(self) - 1}")
        return indices.astype(np.int64)

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


def _first(arrays: GroupArrays) -> GroupArrays:
    x, offset, target = arrays
    return x[0], offset[0], target[0]


def _as_table(member: Any, n_patterns: int, label: str) -> NDArray[np.int32]:
    """Member table, int32 (group, channel), checked."""
    table = np.asarray(member)
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iu":
        raise PtychodaskError(
            f"{label}: member has shape {table.shape} and type {table.dtype}, expected indices of patterns "
            "(group, channel)"
        )
    if not 0 <= table.min() <= table.max() < n_patterns:
        raise PtychodaskError(
            f"{label}: member contains patterns {table.min()}..{table.max()}, expected 0..{n_patterns - 1}; pass the "
            "groups of this scan"
        )
    return table.astype(np.int32, copy=False)


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
    return partial(_scaled, np.float32(1.0 / scan.normalization))


def patch_target(scan: Scan) -> TargetOf:
    """Target of the baseline: labels, or patches of the truth.

    Float32 (group, 1, N, N, 2), real and imaginary part.

    Raises
    ------
    PtychodaskError
        If the scan has neither.
    """
    if scan.label is not None:
        return partial(_labels_of, scan.label)
    if scan.truth is None:
        raise PtychodaskError(
            f"{scan.store or 'scan'}: has neither truth nor labels, which supervised training needs; "
            "train model='pinn', or a baseline on a simulated scan"
        )
    parts = [ndimage.spline_filter(part) for part in (scan.truth.object.real, scan.truth.object.imag)]
    corner = np.asarray(scan.truth.corner_yx_px)
    grid = np.indices((scan.n_pixels, scan.n_pixels)) - scan.n_pixels // 2
    return partial(_truth_under, parts, scan.position_yx_px - corner, grid)


# Functions of the module and no closures, so that the workers of a data loader can receive a reader.
def _scaled(scale: np.float32, member: NDArray[np.int32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x * scale


def _labels_of(label: Any, member: NDArray[np.int32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    return _pairs(np.asarray(label[member.reshape(-1)]).reshape(*member.shape, *label.shape[1:]))


def _truth_under(
    parts: Sequence[NDArray[np.float64]],
    position_yx_px: NDArray[np.float64],
    grid: NDArray[np.int64],
    member: NDArray[np.int32],
    x: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Known object around positions in its pixels, for some members."""
    coordinates = np.moveaxis(position_yx_px[member][..., None, None] + grid, 2, 0)
    values = [ndimage.map_coordinates(part, coordinates, prefilter=False, mode="nearest") for part in parts]
    return np.stack(values, axis=-1).astype(np.float32)


def _pairs(patches: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([patches.real, patches.imag], axis=-1).astype(np.float32)
