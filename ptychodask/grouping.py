"""Grouping of scan positions for the networks: pure functions of the positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import scipy  # its subpackages load on first use: specs are read for every --help
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.html import card
from ptychodask.options import check_types, option
from ptychodask.scan import Scan

NEIGHBOURS = 7
"""Nearest positions that members are drawn from by default, if they are enough."""


CURVE_BITS = 16
"""The grid of the curve has 2**CURVE_BITS cells along each side."""


def default_neighbours(members: int) -> int:
    """Nearest positions that `members` are drawn from by default."""
    return max(NEIGHBOURS, members) if isinstance(members, Integral) else NEIGHBOURS


@dataclass(frozen=True, kw_only=True)
class GroupingSpec:
    """Options of the grouping of scan positions."""

    members: int = option(4, help="Patterns in one group.")
    """Patterns in one group, C; equals the input channels of the network."""

    neighbours: int = option(
        None, help="Number of nearest positions from which members are drawn; by default 7, or --members if more."
    )
    """Nearest positions from which the members other than the seed are drawn, K; at least `members` if `members` > 1,
    by default 7 or `members`, whichever is more."""

    oversampling: int = option(1, help="Number of groups drawn for each pattern.")
    """Groups that each pattern seeds; above 1 only with `members` > 1 and `neighbours` > `members`."""

    seed: int = option(0, help="Random seed of the members.")
    """Seed of the generator that draws the members."""

    halves: bool = option(False, help="Only group even patterns with even ones, and odd with odd.")
    """True: the patterns of a group have all even or all odd indices, so that two halves of a result share none."""

    def __post_init__(self) -> None:
        if self.neighbours is None:
            object.__setattr__(self, "neighbours", default_neighbours(self.members))
        if isinstance(self.halves, Integral) and self.halves in (0, 1):
            # Stored tables have 0 or 1.
            object.__setattr__(self, "halves", bool(self.halves))
        check_types(self, "grouping")
        if self.halves not in (0, 1) or (self.halves and self.members == 1):
            raise PtychodaskError(
                f"grouping: halves is {self.halves!r} with members={self.members}, expected True or False, and True "
                "only with members > 1: single patterns need no halves"
            )
        if self.seed < 0:
            raise PtychodaskError(f"grouping: seed is {self.seed}, expected 0 or more")
        if self.members < 1:
            raise PtychodaskError(f"grouping: members is {self.members}, expected 1 or more")
        if self.members > 1 and self.neighbours < self.members:
            raise PtychodaskError(
                f"grouping: neighbours is {self.neighbours} for groups of {self.members} members; "
                f"pass neighbours={self.members} or more"
            )
        if self.oversampling < 1:
            raise PtychodaskError(f"grouping: oversampling is {self.oversampling}, expected 1 or more")
        if self.oversampling > 1 and self.members == 1:
            raise PtychodaskError(
                f"grouping: oversampling={self.oversampling} has no effect with members=1, since one pattern is "
                "always the same group; leave it out, or pass members=2 or more"
            )
        if self.oversampling > 1 and self.neighbours <= self.members:
            raise PtychodaskError(
                f"grouping: oversampling={self.oversampling} needs members > 1 and neighbours > members, "
                f"found members={self.members}, neighbours={self.neighbours}; pass more neighbours"
            )

    def draws_as(self, other: GroupingSpec) -> bool:
        """True if another spec draws the same groups.

        Examples
        --------
        >>> GroupingSpec(members=1, seed=3).draws_as(GroupingSpec(members=1))
        True
        >>> GroupingSpec(seed=3).draws_as(GroupingSpec())
        False
        """
        return self == other or self.members == other.members == 1

    @property
    def name(self) -> str:
        """Default name of the group table in a store.

        Examples
        --------
        >>> GroupingSpec(members=4, neighbours=7).name
        'c4-k7-s0'
        """
        if self.members == 1:
            return "c1"
        name = f"c{self.members}-k{self.neighbours}-s{self.seed}"
        name = name if self.oversampling == 1 else f"{name}-x{self.oversampling}"
        return f"{name}-halves" if self.halves else name


@dataclass(frozen=True, eq=False)
class Groups:
    """Member table of a scan, and its spec."""

    member: NDArray[np.int32]
    """Indices into the patterns, int32 (group, channel); channel 0 is the seed."""

    spec: GroupingSpec
    """Spec of the table."""

    name: str
    """Name of the table in its store."""

    def __len__(self) -> int:
        return len(self.member)

    def __repr__(self) -> str:
        return f"Groups({self.name}: {len(self):,} groups of {self.spec.members})"

    def _repr_html_(self) -> str:
        recorded = {name: f"{value:,}" for name, value in self.attributes().items()}
        return card(f"Groups {self.name}", {"groups": f"{len(self):,}"} | recorded)

    def attributes(self) -> dict[str, int]:
        """The spec as plain numbers, for the attributes of the stored table."""
        return {name: int(value) for name, value in asdict(self.spec).items()}


def curve_order(position_yx_px: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order of positions along a Hilbert curve, which keeps neighbours together.

    Parameters
    ----------
    position_yx_px : float64 array (n, 2)

    Returns
    -------
    int64 array (n,)
        A permutation; equal curve cells keep their given order.

    Notes
    -----
    D. Hilbert, Math. Ann. 38 (1891) 459: each bit of (y, x), highest first, selects a quadrant, whose axes are then
    swapped or flipped; here for all positions at once.

    Examples
    --------
    >>> curve_order(np.array([[0.0, 0.0], [9.0, 9.0], [0.0, 1.0], [9.0, 8.0]])).tolist()
    [0, 2, 3, 1]
    >>> curve_order(np.empty((0, 2))).tolist()
    []
    """
    if not len(position_yx_px):
        return np.empty(0, np.int64)
    low = position_yx_px.min(axis=0)
    extent = float((position_yx_px.max(axis=0) - low).max())
    cells = 2**CURVE_BITS - 1
    scale = cells / extent if extent > 0 else 0.0
    y, x = ((position_yx_px - low) * scale).astype(np.int32).T.copy()
    distance = np.zeros(len(y), np.int64)
    for bit in reversed(range(CURVE_BITS)):
        below = np.int32((1 << bit) - 1)
        right, upper = (x >> bit) & 1, (y >> bit) & 1
        distance = distance << 2 | (3 * right ^ upper)
        x &= below
        y &= below
        # Both coordinates are mirrored in the lower right quadrant, and swapped in the two lower ones.
        mirrored = (right & (1 - upper)) * below
        x ^= mirrored
        y ^= mirrored
        exchanged = (x ^ y) * (1 - upper)
        x ^= exchanged
        y ^= exchanged
    return np.argsort(distance, kind="stable")


def mean_spacing_px(position_yx_px: NDArray[np.float64]) -> float:
    """Square root of the area per position, within the convex hull, pixels.

    Raises
    ------
    PtychodaskError
        If the positions are collinear, or fewer than three.

    Examples
    --------
    >>> round(mean_spacing_px(np.argwhere(np.ones((41, 41))) * 3.0), 2)
    2.93
    """
    try:
        return float(np.sqrt(scipy.spatial.ConvexHull(position_yx_px).volume / len(position_yx_px)))
    except (scipy.spatial.QhullError, ValueError) as error:
        raise PtychodaskError(
            f"{len(position_yx_px)} positions span no area, expected three or more that are not collinear"
        ) from error


def median_step_px(position_yx_px: NDArray[np.float64]) -> float | None:
    """Median distance from a position to the nearest other one.

    Parameters
    ----------
    position_yx_px : float64 array (n, 2)
        Positions that repeat count once.

    Returns
    -------
    float or None
        In the unit of the positions; None if no two of them differ.

    Examples
    --------
    >>> median_step_px(np.array([[0.0, 0.0], [0.0, 2.0], [0.0, 2.0], [5.0, 0.0]]))
    2.0
    """
    different = np.unique(position_yx_px, axis=0)
    if len(different) < 2:
        return None
    distance, _ = scipy.spatial.KDTree(different).query(different, k=2, workers=-1)
    return float(np.median(distance[:, 1]))


def nearest_neighbour(position_yx_px: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to the nearest other position of each, and its index.

    Parameters
    ----------
    position_yx_px : float64 array (n, 2)
        Two or more.

    Returns
    -------
    distance : float64 array (n,)
        0 where a position repeats.
    index : int64 array (n,)

    Examples
    --------
    >>> nearest_neighbour(np.array([[0.0, 0.0], [0.0, 2.0], [5.0, 2.0]]))[1]
    array([1, 0, 1])
    """
    distance, index = scipy.spatial.KDTree(position_yx_px).query(position_yx_px, k=2, workers=-1)
    # Of two equal positions, the tree may list either first.
    itself_first = index[:, 0] == np.arange(len(index))
    return distance[:, 1], np.where(itself_first, index[:, 1], index[:, 0])


APART_STEPS = 10.0
"""Gap between an outlier and other positions, in median steps, at least."""


TOGETHER_SHARE = 0.9
"""Share of the positions that are together if the others are outliers."""


STEP_SAMPLE = 2**17
"""Most positions from which the median step is measured."""


def outlying_positions(
    position_yx_px: NDArray[np.float64], scan_index: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Outlying positions, such as encoder glitches, by their patterns.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)
    scan_index : int64 array (pattern,), optional
        Experiment of each pattern; each is judged by itself.

    Returns
    -------
    int64 array (k,)
        Ascending. Empty unless `TOGETHER_SHARE` of the positions are in one area without gaps of `APART_STEPS` median
        steps: a scan of several areas has no outliers.

    Examples
    --------
    >>> line = np.column_stack([np.zeros(20), np.arange(20.0)])
    >>> line[17] = 3000.0, 0.0
    >>> outlying_positions(line).tolist()
    [17]
    """
    if scan_index is not None and len(np.unique(scan_index)) > 1:
        parts = [np.flatnonzero(scan_index == experiment) for experiment in np.unique(scan_index)]
        return np.sort(np.concatenate([part[outlying_positions(position_yx_px[part])] for part in parts]))
    sample = position_yx_px[:: -(-len(position_yx_px) // STEP_SAMPLE)]
    step = median_step_px(sample)
    if step is None:
        return np.empty(0, np.int64)
    # Cells, not pairs of positions: their number does not grow with the density. Cells that touch are one area.
    cells = np.floor(position_yx_px / (APART_STEPS * step))
    occupied, cell = np.unique(cells, axis=0, return_inverse=True)
    if len(occupied) == 1:
        return np.empty(0, np.int64)
    pairs = scipy.spatial.KDTree(occupied).query_pairs(1.0, p=np.inf, output_type="ndarray")
    area = _linked(len(occupied), pairs)[cell.reshape(-1)]
    sizes = np.bincount(area)
    apart = area != sizes.argmax()
    return np.flatnonzero(apart) if sizes.max() >= TOGETHER_SHARE * len(area) else np.empty(0, np.int64)


def _linked(n_points: int, pairs: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Number of the connected component of each point."""
    links = scipy.sparse.coo_array((np.ones(len(pairs), bool), pairs.T), shape=(n_points, n_points))
    return np.asarray(scipy.sparse.csgraph.connected_components(links, directed=False)[1], np.int64)


MOST_NAMED = 20
"""Outliers that a message names; more are counted."""


def named_outliers(
    position_yx_px: NDArray[np.float64], pattern: NDArray[np.int64], row: NDArray[np.int64] | None = None
) -> str:
    """Outliers in words, with the options that leave them out.

    Parameters
    ----------
    position_yx_px : float64 array (k, 2)
        Positions of the outliers.
    pattern : int64 array (k,)
        Their indices in the store; one or more.
    row : int64 array (k,), optional
        Their rows in the source file.

    Examples
    --------
    >>> named_outliers(np.array([[9e4, -2.5]]), np.array([1]))
    'pattern 1 at (y, x) = (90000, -2.5) px is far from all others; leave it out with drop=[1] (--drop 1)'
    """
    y, x = position_yx_px[0].tolist()
    drop = _listed(pattern)
    subject = (
        f"pattern {drop} at (y, x) = ({y:.6g}, {x:.6g}) px is far from all others; leave it out"
        if len(pattern) == 1
        else f"{len(pattern)} patterns are far from all others, {pattern[0]} at (y, x) = ({y:.6g}, {x:.6g}) px and so "
        "on; leave them out"
    )
    rows = "" if row is None else _listed(np.sort(row))
    at_ingest = f', or at ingest with drop_frames="{rows}" (--drop-frames {rows})' if rows else ""
    return f"{subject} with drop=[{drop}] (--drop {drop}){at_ingest}"


def _listed(numbers: NDArray[np.int64]) -> str:
    return ",".join(map(str, numbers[:MOST_NAMED].tolist())) + (",..." if len(numbers) > MOST_NAMED else "")


def group_positions(
    position_yx_px: NDArray[np.float64],
    spec: GroupingSpec,
    scan_index: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """Gather positions into groups of neighbours.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)
        Positions (y, x), pixels.
    spec : GroupingSpec
    scan_index : int64 array (pattern,), optional
        Experiment of each pattern; the same for all members of a group.

    Returns
    -------
    int32 array (group, channel)
        Channel 0 is the seed, and each pattern seeds `spec.oversampling` groups (fewer if a group is drawn twice); the
        other members are drawn from the `spec.neighbours` nearest of the seed, ordered by distance. Groups are ordered
        by `curve_order` of their seeds. In a scan of repeated exposures (see `scan_points_of`) members are
        exposures at different scan points: the nearest are counted in points, and one exposure of each is drawn.

    Raises
    ------
    PtychodaskError
        If an experiment has too few patterns, or scan points, for `spec.neighbours`.

    Examples
    --------
    >>> line = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 2.1], [0.0, 3.3]])
    >>> group_positions(line, GroupingSpec(members=2, neighbours=2)).shape
    (4, 2)
    """
    order = curve_order(position_yx_px)
    if spec.members == 1:
        return order[:, None].astype(np.int32)
    if spec.halves:
        # The halves are drawn separately, as if they were two experiments.
        half = np.arange(len(position_yx_px)) % 2
        scan_index = half if scan_index is None else 2 * scan_index + half
    neighbourhood = _neighbourhood(position_yx_px, spec, scan_index)
    rng = np.random.default_rng(spec.seed)
    rounds = [_draw_members(neighbourhood, spec.members, rng) for _ in range(spec.oversampling)]
    if spec.oversampling == 1:
        return rounds[0][order]
    table = np.stack(rounds, axis=1)[order]
    first = np.ones(table.shape[:2], bool)
    alike = np.sort(table, axis=2)
    for later in range(1, spec.oversampling):
        for earlier in range(later):
            first[:, later] &= (alike[:, later] != alike[:, earlier]).any(axis=1)
    return np.ascontiguousarray(table[first])


def check_drop(label: str, n_patterns: int, drop: Sequence[int] | NDArray[np.integer[Any]]) -> None:
    """Raise `PtychodaskError` unless patterns to leave out exist, and others remain."""
    indices = np.asarray(drop)
    if indices.size and indices.dtype.kind not in "iu":
        raise PtychodaskError(f"{label}: patterns to leave out have type {indices.dtype}, expected whole numbers")
    left_out = indices.astype(np.int64)
    if left_out.size and not 0 <= left_out.min() <= left_out.max() < n_patterns:
        raise PtychodaskError(
            f"{label}: patterns {left_out.min()}..{left_out.max()} are to be left out, expected "
            f"indices 0..{n_patterns - 1}; pass indices of patterns in the store"
        )
    if len(np.unique(left_out)) == n_patterns:
        raise PtychodaskError(f"{label}: every pattern is left out; keep some")


def groups_kept(member: NDArray[np.int32], drop: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """True for each group that contains none of the dropped patterns.

    Parameters
    ----------
    member : int32 array (group, channel)
    drop : ints
        Patterns to be left out.

    Returns
    -------
    bool array (group,)

    Examples
    --------
    >>> groups_kept(np.array([[0, 1], [1, 2], [2, 3]]), (0, 7)).tolist()
    [False, True, True]
    """
    return np.asarray(~np.isin(member, drop).any(axis=1))


SAME_POINT_PX = 0.25
"""Distance up to which positions may be exposures of one scan point, pixels."""


REPEATED_SHARE = 0.1
"""Share of patterns at the scan point of another from which on a scan is one of repeated exposures."""


def scan_points_of(position_yx_px: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """Place of each exposure in a scan of repeated exposures.

    Parameters
    ----------
    position_yx_px : float64 array (pattern, 2)

    Returns
    -------
    int64 array (pattern,), or None
        Numbers from 0; None if less than `REPEATED_SHARE` of the patterns repeat a scan point, as some positions of a
        random scan do.

    Notes
    -----
    Positions are of one scan point if they are equal, or if they are linked by distances up to `SAME_POINT_PX` and all
    within twice that: a stage does not return exactly. A chain of finer steps, of a fly scan, is none.

    Examples
    --------
    >>> scan_points_of(np.array([[0.0, 0.0], [0.0, 5.0], [0.0, 0.1], [0.0, 5.0]])).tolist()
    [0, 1, 0, 1]
    """
    different, exact = np.unique(position_yx_px, axis=0, return_inverse=True)
    exact = exact.reshape(-1)
    point = _linked_points(different)[exact]
    sizes = np.bincount(point)
    # In the order of their first exposures, whatever the linking numbered them.
    _, point = np.unique(point, return_inverse=True)
    repeats = len(position_yx_px) - int(np.count_nonzero(sizes))
    return point.reshape(-1).astype(np.int64) if repeats >= REPEATED_SHARE * len(position_yx_px) else None


def _linked_points(different: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of the scan point of each of some different positions."""
    pairs = scipy.spatial.KDTree(different).query_pairs(SAME_POINT_PX, output_type="ndarray")
    itself = np.arange(len(different))
    if not len(pairs):
        return itself
    linked = _linked(len(different), pairs)
    extent = np.empty((int(linked.max()) + 1, 2))
    for axis, values in enumerate(different.T):
        low, high = np.full(len(extent), np.inf), np.full(len(extent), -np.inf)
        np.minimum.at(low, linked, values)
        np.maximum.at(high, linked, values)
        extent[:, axis] = high - low
    is_point = extent.max(axis=1)[linked] <= 2 * SAME_POINT_PX
    return np.where(is_point, linked, len(extent) + itself)


class _Neighbourhood(NamedTuple):
    """Candidates for the groups of each seed."""

    nearest: NDArray[np.int32]
    """Indices (row, 1 + neighbours): a pattern or scan point, then its nearest by distance."""

    point: NDArray[np.int64] | None = None
    """Row of `nearest`, a scan point, of each pattern (pattern,); None if rows are patterns."""

    exposures: NDArray[np.int64] | None = None
    """Patterns sorted by scan point (pattern,)."""

    first: NDArray[np.int64] | None = None
    """Index into `exposures` of the first pattern of each scan point, and the end (point + 1,)."""


def _neighbourhood(
    position_yx_px: NDArray[np.float64], spec: GroupingSpec, scan_index: NDArray[np.int64] | None
) -> _Neighbourhood:
    """Neighbours of each pattern, or of each repeated scan point."""
    point = _points_apart(position_yx_px, scan_index)
    if point is None:
        return _Neighbourhood(_nearest(position_yx_px, spec, scan_index, "patterns"))
    exposures = np.argsort(point, kind="stable")
    sizes = np.bincount(point)
    first = np.concatenate([[0], np.cumsum(sizes)])
    centre = np.stack([np.bincount(point, position_yx_px[:, axis]) / sizes for axis in range(2)], axis=1)
    of_point = None if scan_index is None else scan_index[exposures[first[:-1]]]
    return _Neighbourhood(_nearest(centre, spec, of_point, "scan points"), point, exposures, first)


def _points_apart(
    position_yx_px: NDArray[np.float64], scan_index: NDArray[np.int64] | None
) -> NDArray[np.int64] | None:
    """`scan_points_of` each experiment; None if none repeats exposures."""
    if scan_index is None:
        return scan_points_of(position_yx_px)
    point = np.empty(len(position_yx_px), np.int64)
    n_points, is_repeated = 0, False
    for experiment in np.unique(scan_index):
        mine = np.flatnonzero(scan_index == experiment)
        repeated = scan_points_of(position_yx_px[mine])
        point[mine] = n_points + (np.arange(len(mine)) if repeated is None else repeated)
        n_points, is_repeated = int(point[mine].max()) + 1, is_repeated or repeated is not None
    return point if is_repeated else None


def _nearest(
    position_yx_px: NDArray[np.float64], spec: GroupingSpec, scan_index: NDArray[np.int64] | None, noun: str
) -> NDArray[np.int32]:
    """Indices (row, 1 + neighbours): the row, then its nearest by distance."""
    neighbours = spec.neighbours
    nearest = np.empty((len(position_yx_px), min(neighbours, len(position_yx_px)) + 1), np.int32)
    for experiment in [None] if scan_index is None else np.unique(scan_index):
        mine = np.arange(len(position_yx_px)) if experiment is None else np.flatnonzero(scan_index == experiment)
        if len(mine) <= neighbours:
            fewer = f"neighbours={len(mine) - 1} or fewer, or " if len(mine) > spec.members else ""
            raise PtychodaskError(
                f"grouping: neighbours={neighbours} needs {neighbours + 1} {noun}, found {len(mine)}; "
                f"pass {fewer}members=1"
            )
        _, index = scipy.spatial.KDTree(position_yx_px[mine]).query(position_yx_px[mine], k=neighbours + 1, workers=-1)
        _put_seed_first(index)
        nearest[mine] = index if experiment is None else mine[index]
    return nearest


def _put_seed_first(index: NDArray[np.int64]) -> None:
    """Move each position to the front of its own neighbours, in place.

    Where positions repeat, a tree may list an equal one before (or instead of) the position itself.
    """
    row = np.flatnonzero(index[:, 0] != np.arange(len(index)))
    itself = index[row] == row[:, None]
    itself[~itself.any(axis=1), -1] = True
    others = index[row][~itself].reshape(len(row), index.shape[1] - 1)
    index[row] = np.column_stack([row, others])


def _draw_members(neighbourhood: _Neighbourhood, members: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Draw one group for each seed, int32 (pattern, members).

    The seed is first, then members drawn from its nearest, ordered by distance.
    """
    nearest, point, exposures, first = neighbourhood
    if point is not None:
        nearest = nearest[point]
    keys = rng.random((len(nearest), nearest.shape[1] - 1), dtype=np.float32)
    drawn = np.sort(np.argpartition(keys, members - 2, axis=1)[:, : members - 1], axis=1) + 1
    group = np.take_along_axis(nearest, np.column_stack([np.zeros(len(nearest), np.int64), drawn]), axis=1)
    if point is None:
        return group
    assert exposures is not None
    assert first is not None
    others = group[:, 1:]
    among = (rng.random(others.shape) * (first[others + 1] - first[others])).astype(np.int64)
    return np.column_stack([np.arange(len(group)), exposures[first[others] + among]]).astype(np.int32)


def experiment_number(given: Any, command: str) -> int:
    """Number of an experiment as int; raises `PtychodaskError` for any other value."""
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise PtychodaskError(
            f"{command}: experiment is {given!r}, expected the number of one experiment, a value of scan_index"
        )
    return int(given)


def experiments_of(scan_index: NDArray[np.int64] | None) -> list[int]:
    """Numbers of the experiments of some patterns, ascending.

    Examples
    --------
    >>> experiments_of(np.array([3, 0, 3])), experiments_of(None)
    ([0, 3], [0])
    """
    return [0] if scan_index is None else np.unique(scan_index).tolist()


def check_experiment(label: str, experiments: list[int], experiment: int | None) -> None:
    """Raise `PtychodaskError` unless one of some experiments is chosen.

    Parameters
    ----------
    label : str
        The scan, for messages.
    experiments : list of int
        Experiments of its patterns.
    experiment : int, optional
        The chosen one; None if there is only one.
    """
    listed = ", ".join(map(str, experiments[:10])) + (", ..." if len(experiments) > 10 else "")
    if experiment is None and len(experiments) > 1:
        raise PtychodaskError(
            f"{label}: has {len(experiments)} experiments ({listed}), and each has an object of its own; choose one "
            f"with experiment= (--experiment), such as {experiments[0]}"
        )
    if experiment is not None and experiment not in experiments:
        raise PtychodaskError(
            f"{label}: experiment is {experiment} (--experiment), but its patterns are of {listed}; pass one of these"
        )


def chosen_patterns(
    scan: Scan, experiment: int | None, drop: Sequence[int] | NDArray[np.integer[Any]] = ()
) -> NDArray[np.int64]:
    """Indices of the patterns of one experiment without dropped ones, ascending.

    Parameters
    ----------
    scan : Scan
    experiment : int, optional
        Number of the experiment; by default the only one.
    drop : int array (k,)
        Patterns to leave out.

    Returns
    -------
    int64 array

    Raises
    ------
    PtychodaskError
        If a pattern to leave out does not exist, no pattern remains, the experiment does not exist, or there are
        several and none is chosen.
    """
    label = scan.store or "scan"
    check_drop(label, scan.n_patterns, drop)
    kept = np.ones(scan.n_patterns, bool)
    kept[np.asarray(drop, np.int64)] = False
    index = np.flatnonzero(kept)
    if scan.scan_index is None:
        check_experiment(label, [0], experiment)
        return index
    check_experiment(label, experiments_of(scan.scan_index[index]), experiment)
    return index if experiment is None else index[scan.scan_index[index] == experiment]
