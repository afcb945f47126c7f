"""Scans and results in a bucket of a real S3 are those on a disk, also when its gateway goes away for a while."""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import pytest
from models_for_tests import LinearModel
from s3_for_tests import BUCKET, Gateway, missing, started_gateway

from ptychodask import locations
from ptychodask.cluster import local_client
from ptychodask.export import export
from ptychodask.io import ingest
from ptychodask.locations import CLAIM, ObjectPath, locate
from ptychodask.plan import plan
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.scan import PtychodaskError
from ptychodask.simulate import simulate
from ptychodask.store import group, open_scan, replace_probe

needs_gateway = pytest.mark.skipif(missing() is not None, reason=str(missing()))

pytest.importorskip("obstore", reason="needs obstore: pip install 'ptychodask[cloud]'")

FIELDS = {"groups_per_chunk": 20, "tile": 24, "progress": False}


@pytest.fixture(scope="module")
def gateway():
    # Sockets of daemons have short names.
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, started_gateway(Path(folder)) as started:
        made = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=started.url,
            region_name="us-east-1",
            aws_access_key_id=started.access_key,
            aws_secret_access_key=started.secret_key,
        )
        made.create_bucket(Bucket=BUCKET)
        yield started


@pytest.fixture
def s3(gateway, monkeypatch):
    """Prefix of a bucket that the environment leads to."""
    forget()
    for name, value in gateway.environment.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}/{np.random.default_rng().integers(2**60):x}"
    forget()


def forget():
    locations._reached.cache_clear()
    locations._store.cache_clear()


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A scan on a disk, and its object."""
    store = tmp_path_factory.mktemp("disk") / "scan.zarr"
    simulate(store, n_pixels=16, n_patterns=120, step_px=3.0, progress=False)
    return store, reconstruct(store, LinearModel(), **FIELDS)


def written(s3):
    return simulate(f"{s3}/scan.zarr", n_pixels=16, n_patterns=120, step_px=3.0, progress=False)


def assert_same_bits(found, expected):
    for name in expected.data_vars:
        np.testing.assert_array_equal(found[name].values, expected[name].values)


@needs_gateway
def test_a_scan_in_a_bucket_is_the_one_on_a_disk(s3, on_disk, tmp_path):
    store, _ = on_disk
    scan = open_scan(store)
    arrays = {"diff3d": np.sqrt(scan.diffraction[:].astype(np.float32))}
    arrays |= {"ycoords": scan.position_yx_px[:, 0], "xcoords": scan.position_yx_px[:, 1], "probeGuess": scan.probe[0]}
    np.savez_compressed(tmp_path / "scan.npz", **arrays)
    there = ingest(tmp_path / "scan.npz", f"{s3}/scan.zarr", progress=False)
    here = ingest(tmp_path / "scan.npz", tmp_path / "scan.zarr", progress=False)
    assert there.data_hash == here.data_hash
    np.testing.assert_array_equal(there.diffraction[:], here.diffraction[:])
    assert group(f"{s3}/scan.zarr").member.tolist() == group(tmp_path / "scan.zarr").member.tolist()
    replaced = replace_probe(f"{s3}/scan.zarr", 2 * there.probe, {})
    np.testing.assert_array_equal(open_scan(f"{s3}/scan.zarr").probe, replaced.probe)


@needs_gateway
@pytest.mark.parametrize("fields", [{}, {"pyramid": True}, {"polish": 2}])
def test_an_object_from_and_to_a_bucket_is_the_same_bit_by_bit(s3, on_disk, fields):
    written(s3)
    expected = reconstruct(on_disk[0], LinearModel(), **FIELDS, **({} if "pyramid" in fields else fields))
    found = reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", **FIELDS, **fields)
    assert_same_bits(found, expected)
    assert_same_bits(open_result(f"{s3}/object.zarr"), expected)
    if "pyramid" in fields:
        assert open_result(f"{s3}/object.zarr", level=1).sizes["y"] == -(-expected.sizes["y"] // 2)


@needs_gateway
def test_worker_processes_open_the_bucket_themselves(s3, on_disk):
    written(s3)
    with local_client(2) as client:
        found = reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", client=client, **FIELDS)
    assert_same_bits(found, on_disk[1])


@dataclass(eq=False)
class GatewayGoesAway(LinearModel):
    """At its fourth call the gateway is killed, and comes back some seconds later."""

    content_hash: str = "gateway"
    gateway: Gateway | None = None
    back: threading.Thread | None = None
    going: Any = field(default_factory=threading.Lock)

    def patches(self, x, offset_yx_px):
        if len(self.calls) >= 4 and self.going.acquire(blocking=False):
            self.gateway.stop()
            self.back = threading.Timer(3.0, self.gateway.start)
            self.back.start()
        return super().patches(x, offset_yx_px)


@needs_gateway
def test_a_gateway_that_is_started_again_midway_is_waited_for(s3, gateway, on_disk):
    written(s3)
    model = GatewayGoesAway(gateway=gateway)
    found = reconstruct(f"{s3}/scan.zarr", model, out=f"{s3}/object.zarr", **FIELDS)
    model.back.join()
    assert_same_bits(found, on_disk[1])


@needs_gateway
def test_an_ingest_waits_for_the_gateway_too(s3, gateway, on_disk, monkeypatch):
    from ptychodask import store

    count = {"blocks": 0}
    checked = store._checked_counts

    def stop_at_the_second(*arguments):
        count["blocks"] += 1
        if count["blocks"] == 2:
            gateway.stop()
            count["back"] = threading.Timer(3.0, gateway.start)
            count["back"].start()
        return checked(*arguments)

    monkeypatch.setattr(store, "_checked_counts", stop_at_the_second)
    monkeypatch.setattr(store, "CHUNK_BYTES", 16 * 16 * 2)
    monkeypatch.setattr(store, "SHARD_CHUNKS", 20)
    scan = written(s3)
    count["back"].join()
    assert count["blocks"] > 2
    np.testing.assert_array_equal(
        scan.diffraction[:][np.argsort(scan.source_index)],
        open_scan(on_disk[0]).diffraction[:][np.argsort(open_scan(on_disk[0]).source_index)],
    )


@needs_gateway
def test_a_region_of_a_lazy_object_is_read_from_the_bucket(s3, on_disk):
    written(s3)
    lazy = reconstruct(f"{s3}/scan.zarr", LinearModel(), compute=False, groups_per_chunk=20, tile=24)
    region = {"y": slice(0, 24), "x": slice(24, 48)}
    assert_same_bits(lazy.isel(region).ptycho.compute(), on_disk[1].isel(region))


@needs_gateway
def test_a_result_is_exported_and_saved(s3, on_disk, tmp_path):
    written(s3)
    reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", **FIELDS)
    export(f"{s3}/object.zarr", tmp_path / "object.png", format="png")
    assert (tmp_path / "object.png").stat().st_size > 1000
    on_disk[1].ptycho.save(f"{s3}/saved.zarr")
    assert_same_bits(open_result(f"{s3}/saved.zarr"), on_disk[1])


@needs_gateway
def test_what_is_there_is_replaced_only_when_asked_and_only_by_its_kind(s3, on_disk):
    written(s3)
    with pytest.raises(PtychodaskError, match=r"scan\.zarr: exists already.*overwrite=True"):
        written(s3)
    with pytest.raises(PtychodaskError, match=r"scan\.zarr: is the store of the scan itself"):
        reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/scan.zarr", overwrite=True, **FIELDS)
    reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", **FIELDS)
    with pytest.raises(
        PtychodaskError, match=r"object\.zarr: is ptychodask-result, .* replaces a ptychodask-scan alone"
    ):
        simulate(f"{s3}/object.zarr", n_pixels=16, n_patterns=20, overwrite=True, progress=False)
    simulate(f"{s3}/scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, overwrite=True, progress=False)
    assert open_scan(f"{s3}/scan.zarr").n_patterns == 20


@needs_gateway
def test_a_name_that_begins_alike_is_left_alone(s3):
    written(s3)
    simulate(f"{s3}/scan.zarr.old", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    locate(f"{s3}/scan.zarr").remove()
    assert not locate(f"{s3}/scan.zarr").exists()
    assert open_scan(f"{s3}/scan.zarr.old").n_patterns == 20


@needs_gateway
def test_a_run_that_fails_leaves_nothing(s3):
    written(s3)

    class Failing(LinearModel):
        def patches(self, x, offset_yx_px):
            raise RuntimeError("out of luck")

    with pytest.raises(PtychodaskError, match="out of luck"):
        reconstruct(f"{s3}/scan.zarr", Failing(content_hash="failing"), out=f"{s3}/object.zarr", **FIELDS)
    assert not locate(f"{s3}/object.zarr").exists()


@needs_gateway
def test_what_a_killed_run_left_is_refused_and_two_do_not_write_one(s3):
    place = locate(f"{s3}/scan.zarr")
    place.claim()
    with pytest.raises(PtychodaskError, match=r"another run is writing it, or was stopped"):
        place.claim()
    with pytest.raises(PtychodaskError, match=r"exists already, or is what a stopped run left"):
        written(s3)
    with pytest.raises(PtychodaskError, match=r"is not a Zarr format 3 store"):
        open_scan(place)
    simulate(place, n_pixels=16, n_patterns=20, step_px=3.0, overwrite=True, progress=False)
    assert place.read(CLAIM) is None


@needs_gateway
def test_credentials_are_written_nowhere(s3, gateway, told):
    written(s3)
    found = reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", **FIELDS)
    texts = [json.dumps(found.attrs, default=str), repr(locate(s3 + "/x")), *told]
    texts += [locate(f"{s3}/{name}.zarr").read("zarr.json").decode() for name in ("scan", "object")]
    assert not any(key in text for text in texts for key in (gateway.access_key, gateway.secret_key))


@needs_gateway
@pytest.mark.parametrize(
    ("variable", "value", "place", "told"),
    [
        (None, None, f"s3://{BUCKET}/nothing.zarr", r"nothing\.zarr: no such store; make one with 'ptychodask ingest'"),
        (None, None, "s3://absent/scan.zarr", r"there is no bucket 'absent'; make it, or name another"),
        (
            "AWS_SECRET_ACCESS_KEY",
            "wrong",
            f"s3://{BUCKET}/scan.zarr",
            r"refuses the credentials \(SignatureDoesNotMatch\)",
        ),
        ("AWS_ACCESS_KEY_ID", "nobody", f"s3://{BUCKET}/scan.zarr", r"refuses the credentials \(InvalidAccessKeyId\)"),
        (
            "AWS_ENDPOINT_URL",
            "http://127.0.0.1:9",
            f"s3://{BUCKET}/scan.zarr",
            r"look at AWS_ENDPOINT_URL and AWS_REGION",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(s3, monkeypatch, variable, value, place, told):
    monkeypatch.setattr(locations, "FIRST_PATIENCE_S", 0.5)
    if variable is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(PtychodaskError, match=told) as caught:
        plan(place, LinearModel())
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


@needs_gateway
def test_what_a_bucket_cannot_keep_is_refused(s3):
    written(s3)
    with pytest.raises(PtychodaskError, match=r"is in a bucket, where nothing is kept of a run that is stopped"):
        reconstruct(f"{s3}/scan.zarr", LinearModel(), out=f"{s3}/object.zarr", resume=True, **FIELDS)
    with pytest.raises(PtychodaskError, match=r"a cache of patches lies on a disk"):
        reconstruct(f"{s3}/scan.zarr", LinearModel(), cache=f"{s3}/patches.zarr", **FIELDS)


@pytest.mark.parametrize("text", ["s3://data/run/scan.zarr", "s3://data/run/scan.zarr/"])
def test_a_place_in_a_bucket_is_known_even_as_a_path(text):
    expected = ObjectPath("data", "run/scan.zarr")
    assert locate(text) == locate(Path(text)) == expected
    assert str(expected) == "s3://data/run/scan.zarr"


@pytest.mark.parametrize("text", ["scan.zarr", "/data/scan.zarr", "C:/data/scan.zarr", "odd:name/scan.zarr"])
def test_other_places_are_paths(text):
    assert locate(text) == Path(text)


@pytest.mark.parametrize("text", ["s3://", "s3://data", "gs://data/scan.zarr", "https://data/scan.zarr"])
def test_places_that_cannot_be_are_refused(text):
    with pytest.raises(PtychodaskError, match=r"expected s3://bucket|pass a path, or s3://bucket"):
        locate(text)


def test_object_storage_without_its_package_says_which(monkeypatch):
    forget()
    monkeypatch.setitem(locations.sys.modules, "obstore", None)
    with pytest.raises(PtychodaskError, match=r"object storage needs the package obstore; .*extra 'cloud'"):
        open_scan("s3://data/scan.zarr")
