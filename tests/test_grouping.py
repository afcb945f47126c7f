"""Groups of neighbours: each pattern seeds its own, with the members that were asked for and no chance left."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.grouping import (
    GroupingSpec,
    curve_order,
    group_positions,
    named_outliers,
    outlying_positions,
    scan_points_of,
)

SPECS = [
    GroupingSpec(members=2, neighbours=2),
    GroupingSpec(members=4, neighbours=4),
    GroupingSpec(members=4, neighbours=7),
    GroupingSpec(members=9, neighbours=12, seed=3),
]


@pytest.fixture
def position():
    return np.random.default_rng(0).uniform(-50, 50, (300, 2))


def distances(position, member):
    return np.linalg.norm(position[member] - position[member[:, :1]], axis=2)


@pytest.mark.parametrize("spec", [GroupingSpec(members=1), *SPECS])
def test_every_pattern_seeds_exactly_one_group(position, spec):
    member = group_positions(position, spec)
    assert member.dtype == np.int32
    assert member.shape == (300, spec.members)
    assert sorted(member[:, 0]) == list(range(300))


@pytest.mark.parametrize("spec", SPECS)
def test_members_are_distinct_and_ordered_by_distance(position, spec):
    member = group_positions(position, spec)
    assert (np.diff(np.sort(member, axis=1), axis=1) > 0).all()
    assert (np.diff(distances(position, member), axis=1) >= 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_members_are_among_the_nearest_neighbours_of_the_seed(position, spec):
    member = group_positions(position, spec)
    all_distances = np.linalg.norm(position[:, None] - position, axis=2)
    nearest = np.argsort(all_distances, axis=1)[:, : spec.neighbours + 1]
    for group in member:
        assert set(group) <= set(nearest[group[0]])


def test_every_neighbour_is_drawn_as_often_as_any_other():
    # On a ring all seeds look alike, so the rank of a drawn member counts how often it is chosen.
    angle = 2 * np.pi * np.arange(4000) / 4000
    ring = 1000 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    member = group_positions(ring, GroupingSpec(members=3, neighbours=6))
    steps = np.abs((member[:, 1:] - member[:, :1] + 2000) % 4000 - 2000)
    share = np.bincount(steps.ravel(), minlength=4)[1:4] / steps.size
    # Three standard deviations of a share of 8000 draws are 0.016.
    np.testing.assert_allclose(share, 1 / 3, atol=0.02)


def test_the_seed_alone_decides_the_draw(position):
    spec = GroupingSpec(members=4, neighbours=7, seed=1)
    np.testing.assert_array_equal(group_positions(position, spec), group_positions(position, spec))
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(group_positions(position, spec), group_positions(position.copy(), spec))
    other = group_positions(position, GroupingSpec(members=4, neighbours=7, seed=2))
    assert not np.array_equal(group_positions(position, spec), other)
    np.testing.assert_array_equal(group_positions(position, spec)[:, 0], other[:, 0])


def test_groups_follow_the_curve_through_their_seeds(position):
    member = group_positions(position, GroupingSpec(members=4, neighbours=7))
    np.testing.assert_array_equal(member[:, 0], curve_order(position))


def test_oversampling_gives_no_more_groups_than_asked_and_none_twice(position):
    spec = GroupingSpec(members=3, neighbours=5, oversampling=4)
    member = group_positions(position, spec)
    seeds, times = np.unique(member[:, 0], return_counts=True)
    assert len(seeds) == 300
    assert times.max() == 4
    assert times.min() >= 1
    alike = np.column_stack([member[:, 0], np.sort(member, axis=1)])
    assert len(np.unique(alike, axis=0)) == len(member)
    # The first draw of each seed is the one without oversampling.
    first = member[np.unique(np.flatnonzero(np.r_[True, np.diff(member[:, 0]) != 0]))]
    np.testing.assert_array_equal(first, group_positions(position, GroupingSpec(members=3, neighbours=5)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": 0}, "members is 0, expected 1 or more"),
        ({"members": 4, "neighbours": 3}, "neighbours is 3 for groups of 4 members; pass neighbours=4"),
        ({"oversampling": 0}, "oversampling is 0, expected 1 or more"),
        (
            {"members": 4, "neighbours": 4, "oversampling": 2},
            "oversampling=2 needs members > 1 and neighbours > members",
        ),
        ({"members": 1, "oversampling": 2}, "oversampling=2 has no effect with members=1, .*; leave it out, or"),
        ({"members": True}, "members is True, expected a whole number"),
        ({"members": "4"}, "members is '4', expected a whole number"),
        ({"neighbours": 7.5}, "neighbours is 7.5, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_impossible_specs_are_refused(wrong, message):
    with pytest.raises(PtychodaskError, match=message):
        GroupingSpec(**wrong)


@pytest.mark.parametrize(("members", "neighbours"), [(1, 7), (4, 7), (7, 7), (9, 9), (np.int64(16), 16)])
def test_members_are_drawn_from_enough_neighbours_by_default(members, neighbours):
    spec = GroupingSpec(members=members)
    assert spec.neighbours == neighbours
    assert json.dumps(asdict(spec))


def test_too_few_patterns_are_refused_with_what_would_do(position):
    with pytest.raises(PtychodaskError, match="neighbours=7 needs 8 patterns, found 7; pass neighbours=6 or fewer"):
        group_positions(position[:7], GroupingSpec(members=4, neighbours=7))
    assert group_positions(position[:8], GroupingSpec(members=4, neighbours=7)).shape == (8, 4)
    with pytest.raises(PtychodaskError, match="found 4; pass members=1"):
        group_positions(position[:4], GroupingSpec(members=4, neighbours=7))


def test_repeated_positions_still_seed_their_own_groups(position):
    repeated = np.concatenate([np.zeros((40, 2)), position[:20]])
    member = group_positions(repeated, GroupingSpec(members=4, neighbours=7))
    assert sorted(member[:, 0]) == list(range(60))
    assert (np.diff(np.sort(member, axis=1), axis=1) > 0).all()
    with pytest.raises(PtychodaskError, match="neighbours=7 needs 8 scan points, found 1; pass members=1"):
        group_positions(np.zeros((12, 2)), GroupingSpec(members=4, neighbours=7))


def test_members_of_a_group_share_their_experiment(position):
    experiment = np.random.default_rng(1).integers(0, 3, 300)
    member = group_positions(position, GroupingSpec(members=4, neighbours=7), experiment)
    assert (experiment[member] == experiment[member[:, :1]]).all()
    assert sorted(member[:, 0]) == list(range(300))
    with pytest.raises(PtychodaskError, match="neighbours=7 needs 8 patterns, found 5"):
        group_positions(position, GroupingSpec(members=4, neighbours=7), np.repeat([0, 1], [295, 5]))


def test_curve_order_is_a_permutation_of_any_positions(position):
    for some in (position, position[:1], np.zeros((5, 2)), np.stack([np.arange(9.0), np.zeros(9)], axis=1)):
        assert sorted(curve_order(some)) == list(range(len(some)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_curve_walks_a_grid_by_single_steps(bits):
    side = 2**bits
    grid = np.stack(np.divmod(np.random.default_rng(0).permutation(side * side), side), axis=1).astype(np.float64)
    walked = grid[curve_order(grid)]
    np.testing.assert_array_equal(np.abs(np.diff(walked, axis=0)).sum(axis=1), 1)


def test_curve_does_not_depend_on_where_the_scan_lies_or_how_large_it_is(position):
    np.testing.assert_array_equal(curve_order(position), curve_order(4 * position + 1024))


def test_names_tell_specs_apart():
    specs = [*SPECS, GroupingSpec(members=1), GroupingSpec(members=4, neighbours=7, oversampling=2)]
    assert len({spec.name for spec in specs}) == len(specs)


def test_groups_of_halves_share_no_pattern_and_keep_the_seeds(position):
    spec = GroupingSpec(members=4, neighbours=7, halves=True)
    member = group_positions(position, spec)
    assert spec.name == "c4-k7-s0-halves"
    assert (member % 2 == member[:, :1] % 2).all()
    np.testing.assert_array_equal(member[:, 0], group_positions(position, GroupingSpec())[:, 0])


def test_single_patterns_have_no_halves_to_share():
    with pytest.raises(PtychodaskError, match="halves is True with members=1"):
        GroupingSpec(members=1, halves=True)


def repeated(position, times, jitter_px=0.0, seed=0):
    """Exposures of each place, one after the other; each a little off its place."""
    around = np.repeat(position, times, axis=0)
    return around + np.random.default_rng(seed).uniform(-jitter_px, jitter_px, around.shape)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("times", "jitter_px"), [(2, 0.0), (4, 0.0), (4, 0.08), (9, 0.1)])
def test_members_are_exposures_of_different_places(times, jitter_px, halves):
    grid = np.argwhere(np.ones((8, 9))) * 5.0
    at = repeated(grid, times, jitter_px)
    place = np.repeat(np.arange(len(grid)), times)
    member = group_positions(at, GroupingSpec(members=4, neighbours=7, halves=halves))
    assert all(len(np.unique(row)) == 4 for row in place[member])
    assert sorted(member[:, 0]) == list(range(len(at)))
    # Every exposure of a place may be drawn, and the places are the nearest ones.
    assert len(np.unique(member[:, 1:])) > 0.9 * len(at)
    distance = np.linalg.norm(at[member[:, 1:]] - at[member[:, :1]], axis=2)
    assert distance.max() < 3 * 5.0
    assert (np.diff(distance, axis=1) > -4 * (jitter_px + 1e-9)).all()


def test_a_few_coinciding_positions_and_fine_steps_are_no_repeated_exposures(position):
    assert scan_points_of(position) is None
    assert scan_points_of(np.concatenate([position, position[:20]])) is None
    assert scan_points_of(np.concatenate([position, position[:40]])) is not None
    fly_scan = np.column_stack([np.zeros(500), np.arange(500) * 0.1])
    assert scan_points_of(fly_scan) is None


def test_repeats_are_counted_within_each_experiment(position):
    twice = np.concatenate([position, position])
    experiment = np.repeat([0, 1], len(position))
    once = group_positions(twice, GroupingSpec(members=4, neighbours=7), experiment)
    assert (experiment[once] == experiment[once[:, :1]]).all()
    thrice = np.concatenate([position, repeated(position, 3)])
    experiment = np.repeat([0, 1], [len(position), 3 * len(position)])
    member = group_positions(thrice, GroupingSpec(members=4, neighbours=7), experiment)
    assert (experiment[member] == experiment[member[:, :1]]).all()
    assert all(len(np.unique(thrice[row], axis=0)) == 4 for row in member)


def test_places_too_few_are_named_with_what_would_do():
    at = repeated(np.argwhere(np.ones((2, 3))) * 5.0, 5)
    with pytest.raises(
        PtychodaskError, match="neighbours=7 needs 8 scan points, found 6; pass neighbours=5 or fewer, or"
    ):
        group_positions(at, GroupingSpec(members=4, neighbours=7))
    assert group_positions(at, GroupingSpec(members=4, neighbours=5)).shape == (30, 4)


def glitched(position, **places):
    """Positions of which some are moved."""
    moved = position.copy()
    for number, at in places.items():
        moved[int(number[1:])] = at
    return moved


@pytest.mark.parametrize(
    ("at", "found"),
    [
        ({}, []),
        ({"p17": (6e4, 4.5e4)}, [17]),
        ({"p17": (-3000.0, 20.0)}, [17]),
        ({"p3": (0.0, 1e9), "p4": (0.0, 1e9)}, [3, 4]),
        ({"p3": (900.0, 0.0), "p9": (0.0, -1200.0)}, [3, 9]),
        ({"p3": (1e15, -1e15)}, [3]),
    ],
)
@pytest.mark.parametrize("shape", [(20, 20), (1, 300)])
def test_positions_far_from_all_others_are_found(shape, at, found):
    raster = np.argwhere(np.ones(shape)) * 4.0
    assert outlying_positions(glitched(raster, **at)).tolist() == found


def test_areas_and_rows_apart_are_no_outliers(position):
    assert not len(outlying_positions(position))
    assert not len(outlying_positions(np.concatenate([position, position + 5000.0])))
    rows = np.argwhere(np.ones((20, 50))) * [60.0, 1.0]
    assert not len(outlying_positions(rows))
    few = np.concatenate([position, position[:10] + 5000.0])
    assert outlying_positions(few).tolist() == list(range(300, 310))
    assert not len(outlying_positions(few, np.repeat([0, 1], [300, 10])))
    assert not len(outlying_positions(np.zeros((5, 2))))


def test_outliers_are_named_with_the_options_that_leave_them_out():
    at = np.array([[9e4, -2.5], [9e4, 1.0]])
    text = named_outliers(at, np.array([1, 7]), np.array([30, 4]))
    assert text.startswith("2 patterns are far from all others, 1 at (y, x) = (90000, -2.5) px and so on")
    assert "drop=[1,7] (--drop 1,7)" in text
    assert 'drop_frames="4,30" (--drop-frames 4,30)' in text
