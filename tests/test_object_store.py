"""Scans and results in a bucket: the same as on a disk, through restarts of the gateway and wrong settings alike."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ceph_for_tests import SECRET, Gateway, missing, running_gateway
from distributed import Client, LocalCluster
from models_for_tests import LinearModel

from ptychodask.errors import PtychodaskError
from ptychodask.export import export
from ptychodask.grouping import GroupingSpec
from ptychodask.judging.report import write_report
from ptychodask.models.bundle import load_model
from ptychodask.plan import plan
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.storage import s3 as places
from ptychodask.storage.atomic import LEDGER
from ptychodask.storage.location import parse_location
from ptychodask.storage.s3 import CLAIM, S3Location, S3ZarrStore
from ptychodask.store import StoredScan, open_scan
from ptychodask.store.annotate import replace_probe
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

needs_ceph = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FIELDS = {"tile": 64, "groups_per_chunk": 60, "batch_size": 30, "progress": False}
"""Chunks and tiles enough for a run to be stopped in the middle."""

SIZES = {"n_pixels": 16, "n_patterns": 300, "step_px": 4.0, "progress": False}


@pytest.fixture(scope="module")
def gateway():
    """Ceph's gateway with the bucket `scans`; what reaches it is in the environment."""
    folder = Path(tempfile.mkdtemp(prefix="ptyceph"))
    before = dict(os.environ)
    try:
        with running_gateway(folder) as gateway:
            gateway.make_bucket("scans")
            here = [str(Path(places.__file__).parents[1]), str(Path(__file__).parent)]
            os.environ |= gateway.settings | {"PYTHONPATH": os.pathsep.join(here)}
            yield gateway
    finally:
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A scan on a disk, and what is reconstructed from it there."""
    folder = tmp_path_factory.mktemp("disk")
    simulate(folder / "scan.zarr", **SIZES)
    return folder / "scan.zarr", reconstruct(folder / "scan.zarr", LinearModel(), out=folder / "object.zarr", **FIELDS)


@pytest.fixture(scope="module")
def stored(gateway):
    """The same scan in the bucket."""
    simulate("s3://scans/scan.zarr", **SIZES)
    return "s3://scans/scan.zarr"


@pytest.fixture
def bad_settings(monkeypatch):
    """Settings that reach nothing, and no patience with them."""
    monkeypatch.setattr(places, "FIRST_RETRY_S", 0.2)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


def same_bits(found: xr.Dataset, expected: xr.Dataset) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].values.tobytes() == expected[name].values.tobytes()


# What needs no server


@pytest.mark.parametrize("named", ["s3://scans/a/b.zarr", Path("s3://scans/a/b.zarr"), "s3://scans/a/b.zarr/"])
def test_a_place_in_a_bucket_is_known_by_its_name(named) -> None:
    found = parse_location(named)
    assert found == S3Location("scans", "a/b.zarr")
    assert str(found) == "s3://scans/a/b.zarr"
    assert str(found.with_name("c")) == "s3://scans/a/c"


def test_any_other_name_is_a_path() -> None:
    assert parse_location("s3/scan.zarr") == Path("s3/scan.zarr")


@pytest.mark.parametrize("named", ["s3://", "s3://scans", "s3://scans/", "s3://scans/a//b", "s3://scans/../b"])
def test_a_name_without_bucket_or_key_is_refused(named) -> None:
    with pytest.raises(PtychodaskError, match="expected s3://bucket/name"):
        open_scan(named)


def test_a_package_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    with pytest.raises(
        PtychodaskError, match=r"scan.zarr: needs the package obstore; pip install 'ptychodask\[cloud\]'"
    ):
        open_scan("s3://scans/scan.zarr")


def test_a_model_in_a_bucket_is_refused() -> None:
    with pytest.raises(PtychodaskError, match=r"s3://scans/a.model: a model cannot be stored in an object store"):
        load_model("s3://scans/a.model")


def check_unlink(found: S3Location) -> None:
    """A missing object is an error as for `pathlib.Path`, unless `missing_ok`."""
    found.write_bytes(b"content")
    found.unlink()
    assert not found.exists()
    with pytest.raises(FileNotFoundError) as raised:
        found.unlink()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(found))
    found.unlink(missing_ok=True)


def test_unlink_of_a_missing_object_raises_as_for_a_path(monkeypatch) -> None:
    stores = pytest.importorskip("obstore.store", reason="needs the package obstore")
    bucket = stores.MemoryStore()
    monkeypatch.setattr(places, "_bucket", lambda location: bucket)
    check_unlink(S3Location("scans", "folder/object"))
    # A folder without a Zarr root is no error.
    S3Location("scans", "folder/missing.zarr").remove()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_SECRET_ACCESS_KEY", "", "no credentials; set AWS_ACCESS_KEY_ID"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9", "AWS_ENDPOINT_URL is .*, expected http"),
        ("AWS_ENDPOINT_URL", "http://someone:password@127.0.0.1:9", "no answer from the object store at http://127"),
        ("AWS_ENDPOINT_URL", "http://no-such-host.invalid", "no answer from the object store at http://no-such-host"),
    ],
)
def test_settings_that_reach_nothing_are_told_of_without_secrets(bad_settings, refused, name, value, told) -> None:
    pytest.importorskip("obstore", reason="needs the package obstore")
    bad_settings.setenv(name, value)
    with pytest.raises(PtychodaskError, match=told) as raised:
        open_scan("s3://scans/scan.zarr")
    line = refused("plan", "s3://scans/scan.zarr")
    assert "s3://scans/scan.zarr" in line
    assert not any(word in text for text in (line, str(raised.value)) for word in (SECRET, "password"))


# What a real object store does


@needs_ceph
def test_a_scan_in_a_bucket_is_the_one_on_the_disk(stored, on_disk) -> None:
    found, expected = open_scan(stored), open_scan(on_disk[0])
    assert found.data_hash == expected.data_hash
    np.testing.assert_array_equal(found.diffraction[[7, 3, 3, 250]], expected.diffraction[[7, 3, 3, 250]])
    with xr.open_zarr(parse_location(stored).zarr_store(read_only=True), consolidated=True) as ds:
        assert ds.attrs["state"] == "complete"


@needs_ceph
def test_a_result_in_a_bucket_has_the_bits_of_the_one_on_a_disk(stored, on_disk, tmp_path) -> None:
    expected = on_disk[1]
    in_bucket = reconstruct(stored, LinearModel(), out="s3://scans/object.zarr", pyramid=True, **FIELDS)
    same_bits(in_bucket, expected)
    same_bits(reconstruct(stored, LinearModel(), out=tmp_path / "object.zarr", **FIELDS), expected)
    same_bits(open_result("s3://scans/object.zarr"), expected)
    assert open_result("s3://scans/object.zarr", level=1)["object"].ndim == 2
    # Nothing is left beside what is whole.
    assert not S3Location("scans", ".object.zarr.writing").exists()


@needs_ceph
def test_polishing_into_a_bucket_gives_the_bits_of_polishing_on_a_disk(stored, on_disk) -> None:
    found = reconstruct(stored, LinearModel(), out="s3://scans/polished.zarr", polish=2, **FIELDS)
    same_bits(found, reconstruct(on_disk[0], LinearModel(), polish=2, **FIELDS))


@needs_ceph
def test_a_result_in_a_bucket_is_exported_reported_and_saved(stored, on_disk, tmp_path) -> None:
    ds = reconstruct(stored, LinearModel(), out="s3://scans/exported.zarr", **FIELDS)
    export("s3://scans/exported.zarr", tmp_path / "object.png", format="png")
    write_report(ds, tmp_path / "report.html", scan=stored)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("object.png", "report.html"))
    on_disk[1].ptycho.save("s3://scans/saved.zarr")
    same_bits(open_result("s3://scans/saved.zarr"), on_disk[1])


@needs_ceph
def test_worker_processes_open_the_bucket_themselves(stored, on_disk) -> None:
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        found = reconstruct(stored, LinearModel(), out="s3://scans/by-workers.zarr", client=client, **FIELDS)
        lazy = reconstruct(stored, LinearModel(), compute=False, **FIELDS)
        same_bits(lazy.ptycho.compute(), on_disk[1])
    same_bits(found, on_disk[1])


@needs_ceph
def test_group_tables_plans_and_refined_probes_are_kept_in_the_bucket(gateway, run) -> None:
    scan = simulate("s3://scans/kept.zarr", **SIZES)
    groups = group("s3://scans/kept.zarr", GroupingSpec(members=4))
    table = StoredScan("s3://scans/kept.zarr").table(groups.name)
    np.testing.assert_array_equal(table.rows(0, 5), groups.member[:5])
    assert plan("s3://scans/kept.zarr", LinearModel()).store == "s3://scans/kept.zarr"
    changed = replace_probe("s3://scans/kept.zarr", 2 * scan.probe, {"by": "a test"})
    assert changed.data_hash != scan.data_hash
    code, out, _ = run("group", "s3://scans/kept.zarr", "--members", "1")
    assert code == 0
    assert out.startswith("s3://scans/kept.zarr: 300 groups of 1")


@needs_ceph
def test_nothing_that_is_sent_or_stored_holds_a_secret(stored) -> None:
    assert SECRET.encode() not in pickle.dumps(open_scan(stored))
    for found, _ in parse_location(stored).below():
        assert SECRET.encode() not in found.read_bytes()
    again = pickle.loads(pickle.dumps(S3ZarrStore(parse_location(stored), read_only=True)))
    assert again == S3ZarrStore(parse_location(stored), read_only=True)


@dataclass(eq=False)
class RestartingModel(LinearModel):
    """Meets a gateway that crashes once, and is started again."""

    content_hash: str = "restarting"
    gateway: Gateway | None = None

    def patches(self, x, offset_yx_px):
        if len(self.calls) == 4:
            self.gateway.kill()
            self.gateway.start()
        return super().patches(x, offset_yx_px)


class RestartingPatterns:
    """Patterns to be written, by blocks; the gateway crashes after the first, and is started again."""

    def __init__(self, patterns, gateway):
        self._patterns, self._gateway, self.reads = patterns, gateway, 0
        self.shape, self.dtype = patterns.shape, patterns.dtype

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 2:
            self._gateway.kill()
            self._gateway.start()
        return self._patterns[index]


@needs_ceph
def test_writing_a_scan_outlives_a_restart_of_the_gateway(gateway) -> None:
    rng = np.random.default_rng(0)
    patterns = rng.poisson(3.0, (700, 128, 128)).astype(np.uint16)
    source = RestartingPatterns(patterns, gateway)
    position = rng.uniform(0, 200, (700, 2))
    probe = np.ones((1, 128, 128), np.complex64)
    given = {"position_yx_px": position, "probe": probe, "domain": "counts", "calibration": "mean_counts"}
    written = write_scan("s3://scans/through.zarr", diffraction=source, **given, progress=False)
    assert source.reads >= 2
    np.testing.assert_array_equal(written.diffraction[:], patterns[written.source_index])


@needs_ceph
def test_a_reconstruction_outlives_a_restart_of_the_gateway(gateway, stored, on_disk, client) -> None:
    model = RestartingModel(gateway=gateway)
    found = reconstruct(stored, model, out="s3://scans/outlived.zarr", client=client, **FIELDS)
    assert len(model.calls) > 4
    same_bits(found, on_disk[1])


@dataclass(eq=False)
class StoppingModel(LinearModel):
    """Fails for good after some calls, until it is told not to."""

    content_hash: str = "stopping"
    stops: bool = True

    def patches(self, x, offset_yx_px):
        if self.stops and len(self.calls) > 6:
            raise PtychodaskError("model: stopped by a test")
        return super().patches(x, offset_yx_px)


@needs_ceph
def test_a_stopped_run_goes_on_from_its_ledger_in_the_bucket(stored, on_disk, client) -> None:
    out, model = "s3://scans/resumed.zarr", StoppingModel()
    with pytest.raises(
        PtychodaskError, match=r"stopped by a test; what is finished is kept: continue with resume=True"
    ):
        reconstruct(stored, model, out=out, client=client, **FIELDS)
    with pytest.raises(PtychodaskError, match=r"the result is unfinished \(state is 'writing'"):
        open_result(out)
    with pytest.raises(
        PtychodaskError,
        match=r"a stopped run left finished parts; continue it with resume=True \(--resume\)",
    ):
        reconstruct(stored, model, out=out, client=client, **FIELDS)
    model.stops = False
    model.calls.clear()
    same_bits(reconstruct(stored, model, out=out, client=client, resume=True, **FIELDS), on_disk[1])
    # 300 groups in batches of 30 are 10 calls; the first run's chunks are not among them.
    n_calls = len(model.calls)
    assert 0 < n_calls < 10
    same_bits(reconstruct(stored, model, out=out, client=client, resume=True, **FIELDS), on_disk[1])
    assert len(model.calls) == n_calls


@needs_ceph
def test_a_ledger_of_objects_reads_back_and_refuses_another_run(gateway) -> None:
    beside = S3Location("scans", "ledger-alone")
    ledger = Ledger(beside, {"plan": 1})
    assert not ledger.exists
    ledger.add("tile", 3, {"checksum": 5})
    ledger.add("chunk", 0, {"checksums": [7]})
    again = Ledger(beside, {"plan": 1})
    again.read()
    assert (again.tiles[3]["checksum"], again.chunks[0]["checksums"]) == (5, [7])
    with pytest.raises(PtychodaskError, match="plan was 1, is 2"):
        Ledger(beside, {"plan": 2}).read()
    again.forget()
    assert not (beside / LEDGER).exists()


@needs_ceph
def test_unlink_of_a_missing_object_raises_with_a_gateway(gateway) -> None:
    check_unlink(S3Location("scans", "unlink-one"))


@needs_ceph
def test_what_exists_is_replaced_only_when_asked_and_by_its_kind(stored, on_disk) -> None:
    out = "s3://scans/there.zarr"
    on_disk[1].ptycho.save(out)
    with pytest.raises(PtychodaskError, match=r"there.zarr: exists already"):
        on_disk[1].ptycho.save(out)
    with pytest.raises(
        PtychodaskError, match=r"is ptychodask-result, and overwrite=True .* replaces only a ptychodask-scan"
    ):
        simulate(out, overwrite=True, **SIZES)
    on_disk[1].ptycho.save(out, overwrite=True)
    same_bits(open_result(out), on_disk[1])


@needs_ceph
def test_a_scan_that_cannot_be_written_leaves_nothing(gateway) -> None:
    patterns = np.ones((10, 16, 16), np.float32)
    patterns[4] = np.nan
    probe = np.ones((1, 16, 16), np.complex64)
    given = {"position_yx_px": np.zeros((10, 2)), "probe": probe, "domain": "counts", "calibration": "mean_counts"}
    with pytest.raises(PtychodaskError, match="not finite in 1 patterns"):
        write_scan("s3://scans/bad.zarr", diffraction=patterns, **given, progress=False)
    assert not parse_location("s3://scans/bad.zarr").exists()
    assert not S3Location("scans", ".bad.zarr.writing").exists()


class TakenOver:
    """Patterns to be written, while another run claims their store."""

    def __init__(self, patterns, claim):
        self._patterns, self._claim = patterns, claim
        self.shape, self.dtype = patterns.shape, patterns.dtype

    def __getitem__(self, index):
        self._claim.write_bytes(b"another run")
        return self._patterns[index]


@needs_ceph
def test_a_second_writer_is_refused_and_one_that_lost_its_claim_completes_nothing(gateway, on_disk) -> None:
    goal, claim = parse_location("s3://scans/two.zarr"), S3Location("scans", ".two.zarr.writing") / CLAIM
    assert claim.create(b"another run")
    assert not claim.create(b"this run")
    with pytest.raises(PtychodaskError, match=r"two.zarr: another run is writing it, or was killed \("):
        on_disk[1].ptycho.save("s3://scans/two.zarr")
    patterns = TakenOver(np.ones((10, 16, 16), np.float32), claim)
    given = {"position_yx_px": np.zeros((10, 2)), "probe": np.ones((1, 16, 16), np.complex64)}
    with pytest.raises(PtychodaskError, match=r"two.zarr: another run took over"):
        write_scan(
            "s3://scans/two.zarr",
            diffraction=patterns,
            **given,
            domain="counts",
            calibration="mean_counts",
            overwrite=True,
            progress=False,
        )
    # What is there is the other's by now.
    assert (goal / "zarr.json").exists()
    with pytest.raises(PtychodaskError, match="the store is unfinished"):
        open_scan("s3://scans/two.zarr")


@needs_ceph
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "the object store does not know the access key"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "the secret key is not that of the access key"),
    ],
)
def test_wrong_keys_are_told_apart(gateway, monkeypatch, name, value, told) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(PtychodaskError, match=told) as raised:
        open_scan("s3://scans/scan.zarr")
    assert value not in str(raised.value)


@needs_ceph
def test_a_bucket_and_a_scan_that_are_missing_are_named(gateway, refused) -> None:
    assert "s3://none/scan.zarr: there is no such bucket" in refused("plan", "s3://none/scan.zarr")
    assert "s3://scans/none.zarr: no such store; make one" in refused("plan", "s3://scans/none.zarr")
