"""One pass that gives more than one object, patches that are kept for another pass, and coarser levels."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import distributed
import numpy as np
import pytest
from models_for_tests import LinearModel

from ptychodask.cluster.clients import QUIET
from ptychodask.cluster.executor import WorkerState
from ptychodask.cluster.job import LOOPBACK
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, groups_kept
from ptychodask.plan import plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reassembly import add_patches, empty_canvas, finish, illumination_window
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.groups import group

SAME = ("object", "weight", "uncertainty", "count")


pytestmark = pytest.mark.usefixtures("empty_caches")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("passes") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=150, step_px=3.0, seed=1)
    return path


def assert_same_bits(one, other, names=SAME):
    for name in names:
        np.testing.assert_array_equal(one[name].values, other[name].values)


def stitched(store, keep, position=None, **fields):
    """Object from the patches of the linear model whose pattern `keep` takes, all at once."""
    model, scan = LinearModel(), open_scan(store)
    planned = plan(store, model, ReconstructionSpec(**fields))
    member = group(store, GroupingSpec(halves=fields.get("split_half", False))).member
    own = scan.position_yx_px[member]
    x = np.moveaxis(scan.network_input(member.ravel()).reshape(*member.shape, 16, 16), 1, -1)
    patches = model.patches(x, (own - own.mean(axis=1, keepdims=True)).astype(np.float32)).reshape(-1, 16, 16)
    placed = own if position is None else position[member]
    chosen = keep(member.ravel())
    canvas = empty_canvas(planned.box.corner, planned.box.shape)
    window = illumination_window(scan.probe, 16)
    return finish(add_patches(canvas, patches[chosen], placed.reshape(-1, 2)[chosen] - 8, window))


def test_halves_are_the_patches_of_every_other_pattern(store, client):
    ds = reconstruct(store, LinearModel(), client=client, split_half=True, groups_per_chunk=7, tile=20)
    for half in range(2):
        object_, weight, _, _ = stitched(store, lambda pattern, half=half: pattern % 2 == half, split_half=True)
        np.testing.assert_allclose(ds["object_half"][half], object_, rtol=1e-5)
        np.testing.assert_allclose(ds["weight_half"][half], weight, rtol=1e-6)
    groups = GroupingSpec(halves=True)
    whole = reconstruct(store, LinearModel(), client=client, groups_per_chunk=7, tile=20, groups=groups)
    np.testing.assert_allclose(ds["object"], whole["object"], rtol=1e-6)
    np.testing.assert_array_equal(ds["count"], whole["count"])


def test_halves_share_no_pattern(store, client):
    model = LinearModel()
    one = reconstruct(store, model, client=client, split_half=True)["object_half"].values
    even = reconstruct(store, model, client=client, groups=GroupingSpec(halves=True), drop=range(1, 150, 2))
    seen = np.isfinite(even["object"].values)
    y, x = (even[dim].values.astype(int) for dim in ("y", "x"))
    first = plan(store, model, ReconstructionSpec(split_half=True)).box
    part = one[0][np.ix_(y - first.y0, x - first.x0)]
    np.testing.assert_allclose(part[seen], even["object"].values[seen], rtol=1e-5)


def test_halves_are_the_same_on_disk_and_lazily(store, client, tmp_path):
    fields = {"split_half": True, "groups_per_chunk": 40, "tile": 32}
    names = (*SAME, "object_half", "weight_half")
    memory = reconstruct(store, LinearModel(), client=client, **fields)
    assert_same_bits(reconstruct(store, LinearModel(), client=client, out=tmp_path / "o.zarr", **fields), memory, names)
    assert_same_bits(reconstruct(store, LinearModel(), compute=False, **fields).ptycho.compute(), memory, names)
    assert memory["object_half"].dims == ("half", "y", "x")


@pytest.mark.parametrize("on_disk", [False, True])
def test_several_models_read_each_pattern_once_and_give_what_each_gives_alone(
    store, client, tmp_path, monkeypatch, on_disk
):
    models = {"pinn": LinearModel(), "baseline": LinearModel(content_hash="other", members=1, output="group")}
    group(store, GroupingSpec(members=1))
    reads = []
    read = StoredScan.part
    monkeypatch.setattr(StoredScan, "part", lambda self, index: reads.append(len(index)) or read(self, index))
    out = tmp_path / "both.zarr" if on_disk else None
    both = reconstruct(store, models, client=client, groups_per_chunk=150, window="illumination", out=out)
    # The client binds the models with the first pattern; the only chunk reads all.
    assert reads == [1, 150]
    assert both["object"].dims == ("network", "y", "x")
    assert both["network"].values.tolist() == ["pinn", "baseline"]
    for label, model in models.items():
        alone = reconstruct(store, model, client=client, groups_per_chunk=150, window="illumination")
        y, x = alone["y"].values, alone["x"].values
        assert_same_bits(both.sel(network=label, y=y, x=x), alone)


def test_several_models_keep_their_halves_apart(store, client):
    models = {"a": LinearModel(), "b": LinearModel(content_hash="b")}
    both = reconstruct(store, models, client=client, split_half=True, tile=32, groups_per_chunk=40)
    alone = reconstruct(store, models["a"], client=client, split_half=True, tile=32, groups_per_chunk=40)
    assert both["object_half"].dims == ("network", "half", "y", "x")
    for label in "ab":
        assert_same_bits(both.sel(network=label), alone, (*SAME, "object_half", "weight_half"))
    lazy = reconstruct(store, models, compute=False, split_half=True, tile=32, groups_per_chunk=40).ptycho.compute()
    assert_same_bits(lazy, both, (*SAME, "object_half"))


def test_models_whose_groups_have_other_seeds_cannot_share_a_pass(tmp_path, client):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=60, step_px=3.0)
    group(path, GroupingSpec(members=4, oversampling=2))
    with pytest.raises(PtychodaskError, match="do not have the same seeds, so they cannot share a pass"):
        reconstruct(path, {"a": LinearModel(), "b": LinearModel(content_hash="b", members=1)}, client=client)


def test_cached_patches_are_stitched_again_without_the_network(store, client, tmp_path):
    model, cache = LinearModel(), tmp_path / "patches.zarr"
    first = reconstruct(store, model, client=client, cache=cache, groups_per_chunk=40)
    plain = reconstruct(store, LinearModel(), client=client, groups_per_chunk=40)
    assert_same_bits(first, plain)
    n_calls = len(model.calls)
    again = reconstruct(store, model, client=client, cache=cache, groups_per_chunk=7)
    assert len(model.calls) == n_calls
    # float16 keeps eleven bits.
    np.testing.assert_allclose(again["object"], plain["object"], rtol=0, atol=2e-3 * float(abs(plain["object"]).max()))
    np.testing.assert_array_equal(again["count"], plain["count"])
    cosine = reconstruct(store, model, client=client, cache=cache, window="cosine", crop=12)
    expected = reconstruct(store, LinearModel(), client=client, window="cosine", crop=12)
    np.testing.assert_allclose(cosine["object"], expected["object"], rtol=0, atol=2e-3 * 2)
    assert len(model.calls) == n_calls


def test_cached_patches_can_be_dropped_and_moved(store, client, tmp_path):
    model, cache = LinearModel(), tmp_path / "patches.zarr"
    reconstruct(store, model, client=client, cache=cache)
    drop = [3, 50]
    dropped = reconstruct(store, model, client=client, cache=cache, drop=drop)
    expected = reconstruct(store, model, client=client, drop=drop)
    np.testing.assert_array_equal(dropped["count"], expected["count"])
    scan = open_scan(store)
    moved = scan.position_yx_px + np.random.default_rng(0).uniform(-0.5, 0.5, scan.position_yx_px.shape)
    shifted = reconstruct(store, model, client=client, cache=cache, position_yx_px=moved)
    object_, weight, _, count = stitched(store, lambda pattern: pattern >= 0, moved)
    box = shifted["object"].shape
    seen = (count > 0).sum()
    assert (shifted["count"].values > 0).sum() >= seen - box[0] - box[1]
    assert shifted["weight"].sum() == pytest.approx(weight.sum(), rel=0.02)
    assert shifted.ptycho.records["spec"]["position_yx_px"] is not None
    assert np.nanmean(np.abs(object_)) == pytest.approx(float(np.abs(shifted["object"]).mean()), rel=0.02)


def test_a_cache_of_something_else_or_with_holes_is_refused(store, client, tmp_path):
    cache = tmp_path / "patches.zarr"
    with pytest.raises(PtychodaskError, match="would leave it with holes; fill it with the complete scan first"):
        reconstruct(store, LinearModel(), client=client, cache=cache, drop=[1])
    with pytest.raises(PtychodaskError, match="is the path of both the result and the cache of patches"):
        reconstruct(store, LinearModel(), client=client, cache=cache, out=cache)
    with pytest.raises(PtychodaskError, match="compute=False cannot fill the cache"):
        reconstruct(store, LinearModel(), compute=False, cache=cache)
    reconstruct(store, LinearModel(), client=client, cache=cache)
    with pytest.raises(PtychodaskError, match='contains patches of another run: model_hash was "linear", is "b"'):
        reconstruct(store, LinearModel(content_hash="b"), client=client, cache=cache)
    for file in (cache / "patches" / "c").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(PtychodaskError, match="are missing; remove the cache"):
        reconstruct(store, LinearModel(), client=client, cache=cache)


def test_a_failing_run_leaves_no_cache(store, client, tmp_path):
    class Loud(LinearModel):
        def patches(self, x, offset_yx_px):
            return super().patches(x, offset_yx_px) * np.float32(1e6)

    with pytest.raises(PtychodaskError, match="too large for float16; reconstruct without cache="):
        reconstruct(store, Loud(content_hash="loud"), client=client, cache=tmp_path / "patches.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"polish": 2, "compute": False}, "polish=2 with compute=False: each stage needs the complete object"),
        ({"position_yx_px": np.zeros((150, 2))}, "position_yx_px without cache="),
        ({"precision": "float16"}, "precision is 'float16', expected one of: float32, mixed"),
        ({"precision": "mixed"}, "the linear supports: float32; leave out precision="),
        ({"pyramid": True}, "pyramid=True needs a result on disk"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(store, fields, message):
    with pytest.raises(PtychodaskError, match=message):
        reconstruct(store, LinearModel(), **fields)


def test_several_models_share_no_cache(store, tmp_path):
    with pytest.raises(PtychodaskError, match="cache needs a single model, and several are given"):
        reconstruct(store, {"a": LinearModel(), "b": LinearModel()}, cache=tmp_path / "patches.zarr")


def test_a_worker_with_too_little_memory_is_named_before_the_first_task(store, client, monkeypatch):
    model = LinearModel()
    monkeypatch.setattr(
        "ptychodask.cluster.executor.DaskExecutor.workers",
        lambda self: {"inproc://x": WorkerState("small", 2, 2**20, {})},
    )
    with pytest.raises(PtychodaskError, match=r"worker small may use 1 MiB, its 2 threads need .*pass memory_bytes="):
        reconstruct(store, model, client=client)
    assert model.calls == []


def test_each_level_of_a_pyramid_is_the_weighted_mean_of_the_one_below(tmp_path, client, monkeypatch):
    monkeypatch.setattr("ptychodask.pyramid.COARSEST_PIXELS", 32)
    path, out = tmp_path / "scan.zarr", tmp_path / "object.zarr"
    simulate(path, n_pixels=16, n_patterns=300, step_px=5.0)
    whole = reconstruct(path, LinearModel(), client=client, out=out, tile=16, pyramid=True).compute()
    height, width = whole["object"].shape
    level = open_result(out, level=1).compute()
    assert level["object"].shape == (-(-height // 2), -(-width // 2))
    assert level["y"].values[:2].tolist() == [whole["y"].values[0] + 0.5, whole["y"].values[0] + 2.5]
    y, x = height // 4, width // 4
    block = whole.isel(y=slice(2 * y, 2 * y + 2), x=slice(2 * x, 2 * x + 2))
    expected = (block["object"] * block["weight"]).sum() / block["weight"].sum()
    np.testing.assert_allclose(level["object"][y, x], expected, rtol=1e-5)
    n_levels = 1
    while max(open_result(out, level=n_levels)["object"].shape) >= 32:
        n_levels += 1
    with pytest.raises(PtychodaskError, match=f"no level {n_levels + 1}; it has levels 1 to {n_levels}"):
        open_result(out, level=n_levels + 1)
    assert_same_bits(open_result(out), reconstruct(path, LinearModel(), client=client, tile=16))


def test_a_measured_plan_tells_the_time(store):
    planned = plan(store, LinearModel(), ReconstructionSpec(groups_per_chunk=40), measure=True)
    assert planned.groups_per_s > 0
    assert "groups/s" in str(planned).splitlines()[-1]


def test_read_amplification_counts_each_stored_chunk_as_often_as_it_is_read(store):
    model = LinearModel()
    scan = open_scan(store)
    planned = plan(store, model, ReconstructionSpec(groups_per_chunk=40))
    per_stored = scan.diffraction.chunk_patterns
    read = 0
    for chunk in planned.chunks:
        member = group(store).member[chunk.start : chunk.stop]
        assert groups_kept(member, ()).all()
        for stored in np.unique(member // per_stored):
            read += min(per_stored, scan.n_patterns - stored * per_stored)
    assert planned.read_amplification == pytest.approx(read / 150)


@dataclass(eq=False)
class WaitingModel(LinearModel):
    """A network whose first call waits until it is let go, and that says which worker calls it."""

    let_go: ClassVar[threading.Event] = threading.Event()
    begun: ClassVar[threading.Event] = threading.Event()
    seen: ClassVar[set[str]] = set()
    compiled: ClassVar[list[int]] = []

    def compile(self, batch_size, precision="float32"):
        self.compiled.append(batch_size)
        return super().compile(batch_size, precision)

    def patches(self, x, offset_yx_px):
        self.begun.set()
        assert self.let_go.wait(60)
        self.seen.add(distributed.get_worker().name)
        return super().patches(x, offset_yx_px)


def quiet_cluster(n_workers):
    return distributed.LocalCluster(
        processes=False, n_workers=n_workers, threads_per_worker=1, worker_dashboard_address=LOOPBACK, **QUIET
    )


def test_a_worker_that_joins_late_takes_its_part(store, client):
    fields = {"groups_per_chunk": 7, "tile": 16, "batch_size": 7}
    with quiet_cluster(1) as cluster, distributed.Client(cluster, set_as_default=False) as joined:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(reconstruct, store, WaitingModel(content_hash="late"), client=joined, **fields)
            assert WaitingModel.begun.wait(60)
            cluster.scale(2)
            joined.wait_for_workers(2)
            WaitingModel.let_go.set()
            ds = running.result()
        assert len(WaitingModel.seen) == 2
    # One process: its workers share the compiled call.
    assert WaitingModel.compiled == [7]
    assert_same_bits(ds, reconstruct(store, LinearModel(), client=client, **fields))


def test_an_adaptive_cluster_without_workers_starts_some(store, client):
    with quiet_cluster(0) as cluster, distributed.Client(cluster, set_as_default=False) as adaptive:
        cluster.adapt(minimum=0, maximum=2, interval="100ms")
        ds = reconstruct(store, LinearModel(), client=adaptive, groups_per_chunk=7)
    assert_same_bits(ds, reconstruct(store, LinearModel(), client=client, groups_per_chunk=7))


def test_a_cache_with_a_flipped_bit_is_refused(store, client, tmp_path):
    cache = tmp_path / "patches.zarr"
    reconstruct(store, LinearModel(), client=client, cache=cache)
    file = next(file for file in (cache / "patches" / "c").rglob("*") if file.is_file())
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises(
        PtychodaskError, match=r"patches of groups .* cannot be read .*remove the cache and fill it again"
    ):
        reconstruct(store, LinearModel(), client=client, cache=cache)
