"""Whatever breaks, what is finished is kept, the object is the same, and what was left out is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster, get_worker
from models_for_tests import (
    CrampedModel,
    DeadlyModel,
    FailingModel,
    LinearModel,
    MoodyModel,
    NotFiniteModel,
    PatchyModel,
    SlowModel,
)

from ptychodask import prediction
from ptychodask.cluster.clients import QUIET, in_process_client, local_client
from ptychodask.errors import PtychodaskError
from ptychodask.io import ingest
from ptychodask.models import ModelSpec, Optics, untrained_model
from ptychodask.models import device as device_module
from ptychodask.reconstruction import reconstruct, scheduler, stitching
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.storage.atomic import LEDGER, WHOLE, building_path
from ptychodask.storage.location import parse_location
from ptychodask.storage.zarr_checks import consolidate
from ptychodask.store import open_scan
from ptychodask.store.groups import group

N_PATTERNS = 150

FIELDS = {"groups_per_chunk": 5, "batch_size": 5, "tile": 16, "progress": False}

pytestmark = pytest.mark.usefixtures("empty_caches")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=N_PATTERNS, step_px=3.0, dose=1e6, seed=1, progress=False)
    return path


@pytest.fixture(scope="module")
def whole(store, client):
    return reconstruct(store, LinearModel(), client=client, **FIELDS)


@pytest.fixture
def spoilt(tmp_path):
    """A store of amplitudes that a test may write into: small chunks of patterns, no checksum."""
    path = tmp_path / "spoilt.zarr"
    simulate(path, n_pixels=16, n_patterns=N_PATTERNS, step_px=3.0, dose=1e6, seed=1, progress=False)
    return path


def spoil(path: Path, pattern: int, value: float) -> None:
    """Give a pattern one value everywhere, behind the back of the store."""
    root = zarr.open_group(path, mode="r+")
    patterns = root["diffraction"][...].astype(np.float32)
    patterns[pattern] = value
    attributes = dict(root["diffraction"].attrs)
    array = root.create_array(
        "diffraction",
        data=patterns,
        chunks=(10, 16, 16),
        overwrite=True,
        dimension_names=("pattern", "qy", "qx"),
        config={"write_empty_chunks": True},
    )
    array.attrs.update(attributes)
    consolidate(parse_location(path))


def assert_same_bits(ds, other):
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(ds[name].values, other[name].values)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, "negative or not finite"), (-3.0, "negative or not finite"), (0.0, "are dark: zero in all good pixels")],
)
def test_a_bad_pattern_is_named_or_left_out_as_if_dropped(spoilt, client, tmp_path, value, reason, told):
    spoil(spoilt, 77, value)
    with pytest.raises(PtychodaskError, match=rf"1 patterns .*{reason}.* \(77\); leave them out with drop= .*on_error"):
        reconstruct(spoilt, LinearModel(), client=client, **FIELDS)
    skipping = reconstruct(spoilt, LinearModel(), client=client, on_error="skip", **FIELDS)
    assert_same_bits(skipping, reconstruct(spoilt, LinearModel(), client=client, drop=[77], **FIELDS))
    ((found, patterns),) = skipping.ptycho.records["skipped"].items()
    assert reason in found
    assert patterns == [77]
    assert any("left out 1 patterns" in line for line in told)
    written = reconstruct(spoilt, LinearModel(), client=client, on_error="skip", out=tmp_path / "object.zarr", **FIELDS)
    assert_same_bits(written, skipping)
    assert written.ptycho.records["skipped"] == skipping.ptycho.records["skipped"]


def test_an_unreadable_chunk_is_named_or_left_out(spoilt, client):
    spoil(spoilt, 0, 5.0)
    (spoilt / "diffraction" / "c" / "7" / "0" / "0").write_bytes(b"no chunk")
    gone = list(range(70, 80))
    with pytest.raises(PtychodaskError, match=r"cannot be read for patterns .*the store is damaged"):
        reconstruct(spoilt, LinearModel(), client=client, **FIELDS)
    skipping = reconstruct(spoilt, LinearModel(), client=client, on_error="skip", **FIELDS)
    assert skipping.ptycho.records["skipped"] == {"cannot be read": gone}
    assert_same_bits(skipping, reconstruct(spoilt, LinearModel(), client=client, drop=gone, **FIELDS))


def test_bad_patterns_are_left_out_of_polishing_too(spoilt, client):
    spoil(spoilt, 77, np.nan)
    fields = FIELDS | {"client": client, "polish": 1}
    skipping = reconstruct(spoilt, LinearModel(), on_error="skip", **fields)
    assert_same_bits(skipping, reconstruct(spoilt, LinearModel(), drop=[77], **fields))


def test_groups_for_which_the_network_diverges_are_left_out(store, client, whole):
    scan = open_scan(store)
    model = PatchyModel(marker=float(scan.network_input([40])[0].sum()))
    with pytest.raises(PtychodaskError, match=r"not finite for groups .*on_error='skip'"):
        reconstruct(store, model, client=client, **FIELDS)
    skipping = reconstruct(store, model, client=client, on_error="skip", **FIELDS)
    assert skipping.ptycho.records["skipped"] == {"the network returned values that are not finite": [40]}
    assert int(whole["count"].sum() - skipping["count"].sum()) > 0
    assert bool((skipping["count"] <= whole["count"]).all())


def test_a_network_that_always_diverges_leaves_an_empty_object(store, client):
    ds = reconstruct(store, NotFiniteModel(), client=client, on_error="skip", **FIELDS)
    assert int(ds["count"].sum()) == 0
    assert bool(np.isnan(ds["object"]).all())
    ((_, patterns),) = ds.ptycho.records["skipped"].items()
    assert patterns == list(range(N_PATTERNS))


def test_skipping_excludes_what_cannot_tell_of_it(store, tmp_path):
    with pytest.raises(PtychodaskError, match="compute=False cannot list what is skipped"):
        reconstruct(store, LinearModel(), compute=False, on_error="skip")
    with pytest.raises(PtychodaskError, match="would leave a cache of patches with holes"):
        reconstruct(store, LinearModel(), cache=tmp_path / "patches.zarr", on_error="skip")
    with pytest.raises(PtychodaskError, match="on_error is 'ignore', expected one of: raise, skip"):
        reconstruct(store, LinearModel(), on_error="ignore")
    with pytest.raises(PtychodaskError, match=r"resume=True needs a result on disk; pass out="):
        reconstruct(store, LinearModel(), resume=True)


def test_a_full_device_gets_smaller_batches(store, client, whole, told, monkeypatch):
    monkeypatch.setattr(prediction, "_BATCH_SIZES", {})
    assert_same_bits(reconstruct(store, CrampedModel(), client=client, **FIELDS), whole)
    assert "the device is out of memory with batches of 5 groups: continuing with 2" in told
    with pytest.raises(PtychodaskError, match="has too little memory for one group of 4 patterns of 16 pixels"):
        reconstruct(store, CrampedModel(content_hash="no room", holds=0), client=client, **FIELDS)


def test_two_workers_that_agree_are_told_of(store, whole):
    with bare_workers(2) as client:
        ds = reconstruct(store, LinearModel(), verify=4, client=client, **FIELDS)
    assert_same_bits(ds, whole)
    verified = ds.ptycho.records["verified"]
    assert len(verified["chunks"]) == verified["same_bits"] == verified["elsewhere"] == 4
    assert verified["largest_difference"] == 0


def test_a_worker_that_computes_otherwise_is_found(store, tmp_path):
    told = r"groups \d+\.\.\d+ differ by .* between the workers tcp://.* nothing of the run is kept"
    with bare_workers(2) as client, pytest.raises(PtychodaskError, match=told):
        reconstruct(store, MoodyModel(), verify=30, out=tmp_path / "object.zarr", client=client, **FIELDS)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def bare_workers(n_workers):
    """Worker processes that load no network library, and so start anew in a second or two."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.worker-ttl": "60s"}),
        LocalCluster(
            n_workers=n_workers, threads_per_worker=2, host="127.0.0.1", memory_limit=None, **QUIET
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def stopped(store, out, client, monkeypatch, n_tiles=4, **fields):
    """A run that ends after some tiles."""
    add, seen = Ledger.add, []

    def interrupted(self, kind, *rest):
        add(self, kind, *rest)
        seen.append(kind)
        if seen.count("tile") == n_tiles:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(store, LinearModel(), out=out, client=client, **(FIELDS | fields))
    return seen


def test_a_run_of_something_else_is_refused_with_the_differences(store, client, tmp_path, monkeypatch):
    out = tmp_path / "object.zarr"
    stopped(store, out, client, monkeypatch)
    for fields, told in (
        ({"window": "cosine"}, r'plan.window was "illumination", is "cosine"; spec.window was null, is "cosine"'),
        ({"drop": [3]}, r"spec.drop was \[\], is \[3\]"),
    ):
        with pytest.raises(PtychodaskError, match=f"was made by another run: .*{told}.*without resume, to start again"):
            reconstruct(store, LinearModel(), out=out, client=client, resume=True, **(FIELDS | fields))
    with pytest.raises(PtychodaskError, match=r'model.hash was "linear", is "other"'):
        reconstruct(store, LinearModel(content_hash="other"), out=out, client=client, resume=True, **FIELDS)
    reconstruct(store, LinearModel(), out=out, client=client, overwrite=True, **FIELDS)
    with pytest.raises(PtychodaskError, match="was made by another run"):
        reconstruct(store, LinearModel(), out=out, client=client, resume=True, **(FIELDS | {"tile": 24}))


def test_a_whole_result_of_the_same_run_is_opened(store, client, tmp_path, whole):
    reconstruct(store, LinearModel(), out=tmp_path / "object.zarr", client=client, **FIELDS)
    model = FailingModel(content_hash="linear", kind="linear")
    assert_same_bits(
        reconstruct(store, model, out=tmp_path / "object.zarr", client=client, resume=True, **FIELDS), whole
    )


def test_damage_to_what_was_finished_is_noticed_and_mended(store, client, tmp_path, monkeypatch, whole):
    out = tmp_path / "object.zarr"
    stopped(store, out, client, monkeypatch)
    building = building_path(out)
    tile = next(path for path in sorted((building / WHOLE / "object" / "c").rglob("*")) if path.is_file())
    tile.write_bytes(tile.read_bytes()[:-9] + b"spoilt !!")
    sums = sorted((building / "sums").glob("*.npy"))
    sums[0].unlink()
    sums[1].write_bytes(sums[1].read_bytes()[:200])
    lines = (building / LEDGER).read_text().splitlines(keepends=True)
    (building / LEDGER).write_text("".join(lines[:-2]) + lines[-2].replace("tile", "tale") + lines[-1][:30])
    assert_same_bits(reconstruct(store, LinearModel(), out=out, client=client, resume=True, **FIELDS), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["object.zarr"]


def test_a_ledger_that_is_none_is_refused(store, client, tmp_path, monkeypatch):
    out = tmp_path / "object.zarr"
    stopped(store, out, client, monkeypatch)
    (building_path(out) / LEDGER).write_text("something else\n")
    with pytest.raises(PtychodaskError, match="is no ledger that this ptychodask reads; pass overwrite"):
        reconstruct(store, LinearModel(), out=out, client=client, resume=True, **FIELDS)


def test_what_was_skipped_stays_skipped(spoilt, client, tmp_path, monkeypatch):
    spoil(spoilt, 0, np.nan)
    out, fields = tmp_path / "object.zarr", FIELDS | {"on_error": "skip"}
    # The first groups of the table lie at the same end as the first tile.
    stopped(spoilt, out, client, monkeypatch, n_tiles=8, **fields)
    records = [
        json.loads(line.rpartition("\t")[0]) for line in (building_path(out) / LEDGER).read_text().splitlines() if line
    ]
    if any(record.get("skipped") for record in records):
        with pytest.raises(
            PtychodaskError, match="left patterns out with on_error='skip', which on_error='raise' does"
        ):
            reconstruct(spoilt, LinearModel(), out=out, client=client, resume=True, **FIELDS)
    resumed = reconstruct(spoilt, LinearModel(), out=out, client=client, resume=True, **fields)
    assert_same_bits(resumed, reconstruct(spoilt, LinearModel(), client=client, **fields))
    assert list(resumed.ptycho.records["skipped"].values()) == [[0]]


def test_a_cache_that_was_being_filled_goes_on_with_the_run(store, client, tmp_path, monkeypatch, whole):
    out, fields = tmp_path / "object.zarr", FIELDS | {"cache": tmp_path / "patches.zarr", "client": client}
    stopped(store, out, client, monkeypatch, cache=fields["cache"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".object.zarr.writing", ".patches.zarr.writing"]
    assert_same_bits(reconstruct(store, LinearModel(), out=out, resume=True, **fields), whole)
    again = reconstruct(store, FailingModel(content_hash="linear"), **fields)
    assert np.nanmax(np.abs(again["object"] - whole["object"])) < 1e-2 * np.nanmedian(np.abs(whole["object"]))


def test_two_runs_do_not_write_one_result(store, client, tmp_path):
    out = tmp_path / "object.zarr"
    refused = []

    class Second(LinearModel):
        def patches(self, x, offset_yx_px):
            if not refused:
                with pytest.raises(PtychodaskError, match="another run is writing it") as caught:
                    reconstruct(store, LinearModel(), out=out, client=client, overwrite=True, **FIELDS)
                refused.append(caught.value)
            return super().patches(x, offset_yx_px)

    reconstruct(store, Second(content_hash="second"), out=out, client=client, **FIELDS)
    assert len(refused) == 1
    assert open_result(out).ptycho.records["model"]["hash"] == "second"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_target_leaves_the_earlier_result(store, client, small_disk, whole):
    out = small_disk / "object.zarr"
    reconstruct(store, LinearModel(), out=out, client=client, **FIELDS)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(PtychodaskError, match=r"cannot be written \(Read-only file system\); nothing of it was kept"):
        reconstruct(store, LinearModel(), out=out, client=client, overwrite=True, **FIELDS)
    assert_same_bits(open_result(out), whole)
    assert [path.name for path in small_disk.iterdir()] == ["object.zarr"]


def test_a_full_disk_leaves_the_earlier_result_and_what_was_finished(store, client, small_disk, whole):
    out = small_disk / "object.zarr"
    reconstruct(store, LinearModel(content_hash="earlier"), out=out, client=client, **FIELDS)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 400_000))
    with pytest.raises(
        PtychodaskError, match=r"cannot be written \(No space left on device\); its finished parts are kept"
    ):
        reconstruct(store, LinearModel(), out=out, client=client, overwrite=True, **FIELDS)
    assert open_result(out).ptycho.records["model"]["hash"] == "earlier"
    (small_disk / "ballast").unlink()
    resumed = reconstruct(store, LinearModel(), out=out, client=client, overwrite=True, resume=True, **FIELDS)
    assert resumed.ptycho.records["model"]["hash"] == "linear"
    assert_same_bits(resumed, whole)


def test_a_chunk_that_ends_every_worker_is_set_aside(store, tmp_path):
    member = group(store).member
    # A pattern whose groups all lie in the second of three chunks.
    inside = np.setdiff1d(member[60:90], np.concatenate([member[:50], member[100:]]))
    model = DeadlyModel(marker=float(open_scan(store).network_input(inside[:1])[0].sum()))
    fields = FIELDS | {"groups_per_chunk": 50}
    with bare_workers(2) as client:
        told = r"predicting groups 50\.\.99 crashed every worker, also when run alone; the rest is complete"
        with pytest.raises(PtychodaskError, match=told):
            reconstruct(store, model, out=tmp_path / "object.zarr", client=client, **fields)
        skipping = reconstruct(
            store, model, out=tmp_path / "object.zarr", client=client, resume=True, on_error="skip", **fields
        )
    assert skipping.ptycho.records["skipped"] == {
        "ended every worker that took them": sorted(member[50:100, 0].tolist())
    }


def test_a_worker_that_hangs_does_not_hold_the_run_up(store, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "STRAGGLER_S", 1.0)
    monkeypatch.setattr(scheduler, "STRAGGLER_TIMES", 1.0)
    add_tile, stopped_one = stitching.StitchingReport.add_tile, []
    with bare_workers(2) as client:
        processes = list(client.run(os.getpid).values())

        def stopping(self, *rest):
            if not stopped_one:
                os.kill(processes[0], signal.SIGSTOP)
                stopped_one.append(processes[0])
            return add_tile(self, *rest)

        monkeypatch.setattr(stitching.StitchingReport, "add_tile", stopping)
        try:
            ds = reconstruct(store, SlowModel(content_hash="hung"), client=client, out=tmp_path / "o.zarr", **FIELDS)
        finally:
            for process in stopped_one:
                os.kill(process, signal.SIGKILL)
    assert stopped_one
    assert_same_bits(ds, whole)


VICTIM = """
import sys
from models_for_tests import SlowModel
from ptychodask.reconstruction import reconstruct
store, out, noted = sys.argv[1:4]
if __name__ == "__main__":
    fields = {"groups_per_chunk": 5, "batch_size": 5, "tile": 16, "polish": 0, "slow_phase": False}
    reconstruct(store, SlowModel(noted_in=noted), out=out, progress=False, **fields)
"""


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_client_that_is_killed_goes_on_where_it_was(store, whole, client, tmp_path, share):
    out, noted = tmp_path / "object.zarr", tmp_path / "calls"
    n_chunks = whole.ptycho.records["plan"]["n_chunks"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", VICTIM, store, out, noted], env=environment) as victim:
        wait_for(lambda: n_noted(out, "chunk") >= share * n_chunks)
        victim.kill()
    done_chunks, done_tiles = n_noted(out, "chunk"), n_noted(out, "tile")
    assert share * n_chunks <= done_chunks < n_chunks
    noted.unlink()
    resumed = reconstruct(store, SlowModel(noted_in=str(noted)), out=out, client=client, resume=True, **FIELDS)
    assert len(noted.read_text().splitlines()) == n_chunks - done_chunks
    assert (done_tiles > 0) == (share > 0.5)
    assert_same_bits(resumed, whole)


def n_noted(out: Path, kind: str) -> int:
    ledger = building_path(out) / LEDGER
    return ledger.read_text().count(f'"kind": "{kind}"') if ledger.exists() else 0


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


INGESTING = """
import sys
from ptychodask.io import ingest
ingest(sys.argv[1], sys.argv[2], progress=False)
"""


def test_an_ingest_that_is_killed_starts_again_cleanly(tmp_path):
    rng = np.random.default_rng(0)
    n_patterns = 20000
    np.savez(
        tmp_path / "source.npz",
        diff3d=rng.random((n_patterns, 32, 32), np.float32),
        xcoords=rng.random(n_patterns) * 500,
        ycoords=rng.random(n_patterns) * 500,
        probeGuess=np.ones((32, 32), np.complex64),
    )
    store = tmp_path / "scan.zarr"
    command = [sys.executable, "-c", INGESTING, str(tmp_path / "source.npz"), str(store)]
    with subprocess.Popen(command) as victim:
        wait_for(lambda: (building_path(store) / WHOLE / "diffraction" / "c").exists())
        victim.kill()
    assert not store.exists()
    with pytest.raises(PtychodaskError, match="the store is unfinished"):
        open_scan(store)
    assert ingest(tmp_path / "source.npz", store, progress=False).n_patterns == n_patterns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.zarr", "source.npz"]


def test_a_writer_that_is_killed_between_two_renames_loses_nothing(store, client, tmp_path, whole):
    out = tmp_path / "object.zarr"
    reconstruct(store, LinearModel(), out=out, client=client, **FIELDS)
    out.rename(tmp_path / ".object.zarr.replaced")
    with pytest.raises(PtychodaskError, match=r"exists already \(as .*\.object\.zarr\.replaced"):
        reconstruct(store, LinearModel(), out=out, client=client, **FIELDS)
    with pytest.raises(PtychodaskError, match=r"\.object\.zarr\.replaced: .* rename that folder to object\.zarr"):
        open_result(out)
    (tmp_path / ".object.zarr.replaced").rename(out)
    assert_same_bits(open_result(out), whole)


def untrained(store):
    return untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(open_scan(store)))


def test_a_gpu_that_is_asked_for_and_missing_is_one_error(store, client):
    with pytest.raises(PtychodaskError, match=r"a GPU is required, but \w+ sees none in this process; check CUDA_VIS"):
        reconstruct(store, untrained(store), client=client, device="gpu", **FIELDS)
    with pytest.raises(PtychodaskError, match="device is 'tpu', expected one of: any, gpu"):
        reconstruct(store, untrained(store), device="tpu")


def test_a_worker_that_advertises_a_gpu_has_one(store):
    with (
        LocalCluster(n_workers=1, processes=False, resources={"GPU": 1}, **QUIET) as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(PtychodaskError, match="a GPU is required"),
    ):
        reconstruct(store, untrained(store), client=client, **FIELDS)


def test_a_process_keeps_to_the_first_gpu_that_it_sees(monkeypatch):
    chosen = []

    class Config:
        class experimental:  # noqa: N801 as TensorFlow spells it
            set_memory_growth = staticmethod(lambda gpu, on: chosen.append((gpu, on)))

        set_visible_devices = staticmethod(lambda gpu, kind: chosen.append((gpu, kind)))

    class TensorFlow:
        config = Config

    monkeypatch.setattr(device_module, "visible_gpus", lambda: ["second of the node, given to this process", "another"])
    monkeypatch.setattr(device_module, "import_module", lambda name: TensorFlow)
    monkeypatch.setattr(device_module.keras.backend, "backend", lambda: "tensorflow")
    device_module.use_given_gpu()
    given = "second of the node, given to this process"
    assert chosen == [(given, "GPU"), (given, True)]


def profiled():
    return "profile" in get_worker().periodic_callbacks


def test_no_cluster_of_ours_looks_at_all_threads_all_the_time():
    with in_process_client() as client:
        assert not client.submit(profiled).result()
    with local_client(1) as client:
        assert not client.submit(profiled, pure=False).result()
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        assert not client.submit(profiled, pure=False).result(timeout=60)
