"""Canvas algebra: known answer, a slow oracle, and the laws of a reduction."""

from __future__ import annotations

from functools import reduce

import numba
import numpy as np
import pytest
from numba.core.caching import CacheImpl

from ptychodask import reassembly
from ptychodask.errors import PtychodaskError
from ptychodask.jit import compiled
from ptychodask.reassembly import (
    Box,
    add_patches,
    cosine_window,
    crop,
    empty_canvas,
    finish,
    illumination_window,
    make_window,
    merge,
    uniform_window,
)

SHAPE = (40, 37)
CORNER = (-3, 5)
SIZE = 9


def some_patches(n=30, seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(n, SIZE, SIZE)) + 1j * rng.normal(size=(n, SIZE, SIZE))
    corners = rng.uniform((0, 7), (26, 30), (n, 2))
    corners[0] = (2.0, 9.0)
    window = rng.uniform(0, 1, (SIZE, SIZE))
    window[0] = 0
    return patches.astype(np.complex64), corners, window


def slow_sums(patches, corners, window, corner, shape):
    """Each patch on its own canvas, its elements shared out one by one."""
    sums = np.zeros((4, *shape), complex)
    for patch, (y, x) in zip(patches.astype(complex), corners, strict=True):
        own = np.zeros((2, *shape), complex)
        top, left = int(np.floor(y)), int(np.floor(x))
        for r in range(len(patch)):
            for c in range(len(patch)):
                for dy, by in ((0, 1 - (y - top)), (1, y - top)):
                    for dx, bx in ((0, 1 - (x - left)), (1, x - left)):
                        at = top + r + dy - corner[0], left + c + dx - corner[1]
                        if 0 <= at[0] < shape[0] and 0 <= at[1] < shape[1]:
                            own[(0, *at)] += by * bx * window[r, c] * patch[r, c]
                            own[(1, *at)] += by * bx * window[r, c]
        hit = own[1].real > 0
        sums[0] += own[0]
        sums[1] += own[1]
        sums[2][hit] += np.abs(own[0][hit]) ** 2 / own[1][hit].real
        sums[3] += hit
    return sums


def assert_same(canvas, other, rtol=1e-12):
    assert canvas.corner == other.corner
    for name in ("weighted", "weight", "weighted_square", "count"):
        np.testing.assert_allclose(getattr(canvas, name), getattr(other, name), rtol=rtol, atol=1e-13)


def test_a_canvas_holds_the_sums_of_a_slow_splat():
    patches, corners, window = some_patches()
    canvas = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    sums = slow_sums(patches, corners, window, CORNER, SHAPE)
    np.testing.assert_allclose(canvas.weighted, sums[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(canvas.weight, sums[1].real, rtol=1e-12)
    np.testing.assert_allclose(canvas.weighted_square, sums[2].real, rtol=1e-12)
    np.testing.assert_array_equal(canvas.count, sums[3].real)


def test_the_mosaic_of_ptychopinn_is_reproduced(shared):
    known = np.load(shared / "reference" / "reassembly_m20.npz", allow_pickle=False)
    centre = np.stack([known["centre_y_px"], known["centre_x_px"]], axis=1)
    corners = centre - centre.mean(axis=0) + 168 - 10
    canvas = add_patches(empty_canvas((0, 0), known["image"].shape), known["patches"], corners, uniform_window(20))
    image, weight, _, _ = finish(canvas)
    both = (weight > 0) & (known["image"] != 0)
    assert both.sum() > 90_000
    assert np.percentile(np.abs(image - known["image"])[both], 99) <= 1e-5


@pytest.mark.parametrize("n_parts", [1, 2, 7, 30])
def test_any_split_in_any_order_gives_the_same_object(n_parts):
    patches, corners, window = some_patches()
    whole = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    parts = [
        add_patches(empty_canvas(CORNER, SHAPE), p, c, window)
        for p, c in zip(np.array_split(patches, n_parts), np.array_split(corners, n_parts), strict=True)
    ]
    assert_same(reduce(merge, reversed(parts)), whole)
    for found, expected in zip(finish(merge(*parts)), finish(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_an_empty_canvas_is_neutral():
    patches, corners, window = some_patches()
    canvas = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    empty = empty_canvas(CORNER, SHAPE)
    assert_same(merge(canvas, empty), canvas, rtol=0)
    assert_same(merge(empty, canvas), canvas, rtol=0)
    assert_same(merge(canvas, empty_canvas((100, 100), (3, 3))), canvas, rtol=0)


def test_merge_leaves_its_inputs_alone():
    patches, corners, window = some_patches()
    canvas = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    other = add_patches(empty_canvas((0, 9), (9, 9)), patches, corners, window)
    before = crop(canvas, canvas.box), crop(other, other.box)
    merged = merge(canvas, other)
    merged.weighted[:] = np.nan
    assert_same(canvas, before[0], rtol=0)
    assert_same(other, before[1], rtol=0)


def test_a_small_canvas_holds_the_same_bits_as_the_part_of_a_large_one():
    patches, corners, window = some_patches()
    # A position a hair beside a whole pixel keeps its fraction wherever the canvas begins.
    corners[1] = (1e-17, 7 + 1e-15)
    large = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    box = Box(0, 11, 6, 21)
    small = add_patches(empty_canvas(box.corner, box.shape), patches, corners, window)
    assert_same(small, crop(large, box), rtol=0)
    np.testing.assert_array_equal(small.weighted, crop(large, box).weighted)


def test_tiles_put_together_are_the_whole():
    patches, corners, window = some_patches()
    whole = add_patches(empty_canvas(CORNER, SHAPE), patches, corners, window)
    left, right = Box(-3, 37, 5, 20), Box(-3, 37, 20, 42)
    tiles = [merge(empty_canvas(box.corner, box.shape), whole) for box in (left, right)]
    np.testing.assert_array_equal(np.hstack([tile.weighted for tile in tiles]), whole.weighted)


def test_a_constant_object_comes_back_with_no_spread():
    corners = np.array([[0.3, 0.7], [2.5, 1.25], [4.0, 3.0]])
    patches = np.full((3, 8, 8), 0.5 - 0.25j, np.complex64)
    image, weight, spread, count = finish(
        add_patches(empty_canvas((0, 0), (16, 16)), patches, corners, uniform_window(8))
    )
    reached = count > 0
    np.testing.assert_allclose(image[reached], 0.5 - 0.25j, rtol=1e-6)
    assert np.isnan(image[~reached]).all()
    assert (weight[~reached] == 0).all()
    np.testing.assert_allclose(spread[count > 1], 0, atol=1e-7)
    assert np.isnan(spread[count < 2]).all()
    assert (image.dtype, weight.dtype, spread.dtype, count.dtype) == (np.complex64, np.float32, np.float32, np.int32)


def test_uncertainty_is_the_weighted_deviation_of_the_estimates():
    values, weights = np.array([1.0 + 1j, 3.0, -2j]), np.array([0.5, 1.0, 2.0])
    canvas = empty_canvas((0, 0), (1, 1))
    for value, weight in zip(values, weights, strict=True):
        add_patches(canvas, np.full((1, 1, 1), value), np.zeros((1, 2)), np.full((1, 1), weight))
    mean = np.average(values, weights=weights)
    expected = np.sqrt(np.average(np.abs(values - mean) ** 2, weights=weights))
    image, _, spread, count = finish(canvas)
    np.testing.assert_allclose(image, mean, rtol=1e-6)
    np.testing.assert_allclose(spread, expected, rtol=1e-6)
    assert count.item() == 3


def test_a_patch_at_whole_pixels_reaches_no_pixel_more():
    canvas = empty_canvas((0, 0), (8, 8))
    add_patches(canvas, np.ones((1, 4, 4)), np.array([[2.0, 1.0]]), uniform_window(4))
    expected = np.zeros((8, 8))
    expected[2:6, 1:5] = 1
    np.testing.assert_array_equal(canvas.count, expected)


def test_the_middle_of_a_window_stays_in_the_middle():
    probe = np.zeros((2, 16, 16), complex)
    probe[0, 8, 8], probe[1, 8, 9] = 2, 1
    window = illumination_window(probe, 6)
    assert window.shape == (6, 6)
    assert (window[3, 3], window[3, 4], window.sum()) == (1.0, 0.25, 1.25)
    assert cosine_window(6)[3, 3] == 1
    np.testing.assert_array_equal(make_window("illumination", 6, probe), window)
    np.testing.assert_array_equal(make_window("cosine", 6, probe), cosine_window(6))
    np.testing.assert_array_equal(make_window("uniform", 6, probe), np.ones((6, 6)))


def test_a_window_without_light_is_refused():
    probe = np.zeros((1, 16, 16), complex)
    probe[0, 0, 0] = 1
    with pytest.raises(PtychodaskError, match=r"no intensity in the central 4 pixels; pass a larger crop="):
        illumination_window(probe, 4)


def test_a_crop_beyond_the_canvas_is_refused():
    with pytest.raises(PtychodaskError, match="reaches outside the canvas"):
        crop(empty_canvas((0, 0), (4, 4)), Box(0, 5, 0, 4))


def test_it_runs_where_nothing_can_be_cached(monkeypatch):
    # Where neither the installation nor the home folder can be written, numba finds none of its cache folders.
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(reassembly._splat.py_func)
    anew = compiled(reassembly._splat.py_func)
    assert anew.py_func is reassembly._splat.py_func
