"""Single steps of the engine, timed one by one: pytest -o addopts= tests/benchmarks (needs pytest-benchmark).

Each benchmark notes in `extra_info` how many units one round takes; the docs give time per unit.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import KDTree

from ptychodask.grouping import GroupingSpec, group_positions
from ptychodask.plan import plan
from ptychodask.reassembly import add_patches, cosine_window, empty_canvas, finish, merge
from ptychodask.simulate import raster_positions
from ptychodask.store import StoredScan
from ptychodask.store.groups import group
from tests.benchmarks.measuring import CheapModel, noisy_scan

N_PATCHES = 1000
MILLION = 10**6
CHUNK_GROUPS = 1024

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def million_positions():
    return raster_positions(MILLION, 4.0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return noisy_scan(tmp_path_factory.mktemp("kernels") / "scan.zarr", 20_000, 64, step_px=6.0)


@pytest.fixture(scope="module")
def million_store(tmp_path_factory, million_positions):
    """A store of as many patterns, as small as they may be, with its groups."""
    store = tmp_path_factory.mktemp("million") / "scan.zarr"
    noisy_scan(store, MILLION, 8, step_px=4.0)
    group(store, GroupingSpec(members=4))
    return store


def patches_over(box_px, size, rng):
    """Patches, and their corners (y, x) anywhere in a box that starts at (0, 0)."""
    patches = rng.standard_normal((N_PATCHES, size, size, 2), np.float32).view(np.complex64)[..., 0]
    return patches, rng.uniform(0, box_px - size - 1, (N_PATCHES, 2))


@pytest.mark.parametrize("size", [20, 64])
@pytest.mark.parametrize("object_px", [1024, 32768])
def test_splat_into_the_box_of_a_chunk(benchmark, size, object_px):
    """A chunk's patches into its box of 1024 x 1024, wherever in the object that lies."""
    patches, corner = patches_over(1024, size, np.random.default_rng(0))
    origin = object_px - 1024
    canvas = empty_canvas((origin, origin), (1024, 1024))
    benchmark.extra_info["patches"] = N_PATCHES
    benchmark(add_patches, canvas, patches, corner + origin, cosine_window(size))


def test_empty_canvas_of_a_chunk_and_its_first_touch(benchmark):
    patches, corner = patches_over(1024, 64, np.random.default_rng(0))
    window = cosine_window(64)
    benchmark.extra_info["patches"] = N_PATCHES
    benchmark(lambda: add_patches(empty_canvas((0, 0), (1024, 1024)), patches, corner, window))


@pytest.fixture(scope="module")
def canvases():
    """Nine canvases of 512 x 512 around a tile of as many pixels."""
    patches, corner = patches_over(512, 64, np.random.default_rng(0))
    window = cosine_window(64)
    starts = [(y, x) for y in (-256, 0, 256) for x in (-256, 0, 256)]
    return [add_patches(empty_canvas(start, (512, 512)), patches, corner + start, window) for start in starts]


def test_merge_nine_canvases_into_a_tile(benchmark, canvases):
    benchmark(lambda: merge(empty_canvas((0, 0), (512, 512)), *canvases))


def test_finish_a_tile(benchmark, canvases):
    benchmark(finish, merge(empty_canvas((0, 0), (512, 512)), *canvases))


@pytest.mark.benchmark(group="grouping of 10^6 positions", min_rounds=3)
def test_group_a_million_positions(benchmark, million_positions):
    benchmark(group_positions, million_positions, GroupingSpec(members=4, neighbours=7))


@pytest.mark.benchmark(group="grouping of 10^6 positions", min_rounds=3)
def test_bare_tree_query_of_a_million_positions(benchmark, million_positions):
    benchmark(lambda: KDTree(million_positions).query(million_positions, k=8, workers=-1))


def test_read_the_patterns_of_one_chunk(benchmark, scan):
    wanted = np.unique(group(scan.store, GroupingSpec(members=4)).member[:CHUNK_GROUPS])
    benchmark.extra_info["patterns"] = len(wanted)
    benchmark(lambda: scan.diffraction[wanted])


def test_network_input_of_one_chunk(benchmark, scan):
    wanted = np.unique(group(scan.store, GroupingSpec(members=4)).member[:CHUNK_GROUPS])
    benchmark.extra_info["patterns"] = len(wanted)
    benchmark(scan.network_input, wanted)


@pytest.mark.benchmark(min_rounds=3)
def test_read_a_million_groups(benchmark, million_store):
    benchmark(lambda: StoredScan(million_store).member(GroupingSpec(members=4).name, 0, MILLION))


@pytest.mark.benchmark(min_rounds=3)
def test_plan_of_a_million_patterns(benchmark, million_store):
    benchmark(plan, million_store, CheapModel(n_pixels=8, members=4))
