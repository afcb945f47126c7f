"""Any location keeps scans and results: a disk, and a backend in memory that is one file."""

from __future__ import annotations

import ast
import errno
import pickle
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import memory_location
import numpy as np
import pytest
import xarray as xr
import zarr
from models_for_tests import LinearModel

import ptychodask
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec
from ptychodask.plan import plan
from ptychodask.reassembly import Canvas
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.sums import checksum, open_canvas, save_canvas
from ptychodask.result import RESULT, open_result
from ptychodask.simulate import simulate
from ptychodask.storage.atomic import LEDGER
from ptychodask.storage.location import location_of, parse_location
from ptychodask.storage.zarr_checks import consolidate
from ptychodask.store import SCAN, StoredScan, open_scan
from ptychodask.store.annotate import record_model, replace_probe
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

PACKAGE = Path(ptychodask.__file__).parent

FIELDS = {"tile": 64, "groups_per_chunk": 60, "batch_size": 30, "progress": False}
"""Chunks and tiles enough for a run to be stopped in the middle."""

SIZES = {"n_pixels": 16, "n_patterns": 300, "step_px": 4.0, "progress": False}


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """An empty folder, or a prefix without objects."""
    if request.param == "disk":
        yield parse_location(tmp_path)
        return
    location = parse_location(f"memory://{uuid4().hex}/folder")
    yield location
    for key in [key for key in memory_location.OBJECTS if key[0] == location.bucket]:
        del memory_location.OBJECTS[key]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, client):
    """A scan on a disk, and its object, in memory."""
    path = tmp_path_factory.mktemp("disk") / "scan.zarr"
    simulate(path, **SIZES)
    return open_scan(path), reconstruct(path, LinearModel(), client=client, **FIELDS)


@pytest.fixture
def stored(folder):
    """The same scan in the location, by the name that a user would pass."""
    simulate(str(folder / "scan.zarr"), **SIZES)
    return str(folder / "scan.zarr")


def same_bits(found: xr.Dataset, expected: xr.Dataset) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].values.tobytes() == expected[name].values.tobytes()


def names_below(folder) -> set[str]:
    """First names of all that is in a folder."""
    return {str(path).removeprefix(f"{folder}/").split("/")[0] for path, _ in folder.below()}


def scan_parts(patterns) -> dict:
    return {
        "diffraction": patterns,
        "position_yx_px": np.zeros((len(patterns), 2)),
        "probe": np.ones((1, 16, 16), np.complex64),
        "domain": "counts",
        "calibration": "mean_counts",
        "progress": False,
    }


def test_names_and_files(folder) -> None:
    file = folder / "one" / "file.npy"
    assert (file.name, file.stem, file.suffix, file.parent.name) == ("file.npy", "file", ".npy", "one")
    assert str(file.with_name("other")) == f"{folder}/one/other"
    assert parse_location(str(file)) == parse_location(file) == file
    assert pickle.loads(pickle.dumps(file)) == file
    assert not file.exists()
    file.parent.make_folder()
    for content in (b"content", bytearray(b"other")):
        file.write_bytes(content)
        assert file.read_bytes() == bytes(file.read_buffer()) == content
    assert list(folder.below()) == [(file, 5)]
    assert (file.exists(), file.is_dir(), file.parent.is_dir()) == (True, False, True)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.unlink()
    file.unlink(missing_ok=True)
    file.write_bytes(b"again")
    folder.remove()
    folder.remove()
    assert not folder.exists()


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch) -> None:
    file = parse_location(tmp_path / "file")
    file.write_bytes(b"earlier")

    def refuse(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        file.write_bytes(b"new")
    assert file.read_bytes() == b"earlier"
    assert names_below(parse_location(tmp_path)) == {"file"}


def test_lines_are_added_in_their_order_and_read_back(folder) -> None:
    file = folder / "lines"
    file.add_lines({"0": "header\n", "a-1": "first\n"})
    file.add_lines({"a-2": "second\n"})
    assert [line for line in file.lines() if line] == ["header", "first", "second"]
    file.remove()
    assert not file.exists()


def test_a_ledger_reads_back_begins_anew_and_refuses_another_run(folder) -> None:
    ledger = Ledger(folder, {"plan": 0})
    assert not ledger.exists
    ledger.add("tile", 1, {"checksum": 4})
    ledger.begin_anew({"plan": 1})
    ledger.add("tile", 3, {"checksum": 5})
    again = Ledger(folder, {"plan": 1})
    again.read()
    again.add("chunk", 0, {"checksums": [7]})
    last = Ledger(folder, {"plan": 1})
    last.read()
    assert (list(last.tiles), last.tiles[3]["checksum"], last.chunks[0]["checksums"]) == ([3], 5, [7])
    with pytest.raises(PtychodaskError, match="plan was 1, is 2"):
        Ledger(folder, {"plan": 2}).read()
    last.forget()
    assert not (folder / LEDGER).exists()


def test_sums_of_a_chunk_come_back_exactly(folder) -> None:
    rng = np.random.default_rng(0)
    sums = {name: rng.normal(size=(7, 5)) for name in ("weight", "weighted_square")}
    canvas = Canvas((-3, 4), rng.normal(size=(7, 5)) + 1j, count=rng.integers(0, 9, (7, 5), np.int32), **sums)
    save_canvas(canvas, folder / "0-0.npy")
    found = open_canvas(folder / "0-0.npy", (-3, 4))
    assert checksum(found) == checksum(canvas)
    assert not found.weight.flags.writeable
    content = (folder / "0-0.npy").read_bytes()
    np.testing.assert_array_equal(np.frombuffer(content, "u1")[:6], np.frombuffer(b"\x93NUMPY", "u1"))
    for damaged in (content[:-1], content[:40], b""):
        (folder / "0-0.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"."):
            open_canvas(folder / "0-0.npy", (-3, 4))


def test_a_scan_is_the_one_on_a_disk(folder, stored, expected) -> None:
    found = open_scan(stored)
    assert found.data_hash == expected[0].data_hash
    np.testing.assert_array_equal(found.diffraction[[7, 3, 3, 250]], expected[0].diffraction[[7, 3, 3, 250]])
    root = zarr.open_group((folder / "scan.zarr").zarr_store(read_only=True), mode="r")
    assert location_of(root.store) == folder / "scan.zarr"
    assert names_below(folder) == {"scan.zarr"}


def test_groups_probes_and_models_are_added(folder, stored, expected) -> None:
    spec = GroupingSpec(members=4, neighbours=5)
    groups = group(stored, spec)
    np.testing.assert_array_equal(StoredScan(stored).table(spec.name).rows(0, len(groups)), groups.member)
    np.testing.assert_array_equal(group(stored, spec).member, groups.member)
    assert StoredScan(stored).table_names() == [spec.name]
    changed = replace_probe(stored, 2 * expected[0].probe, {"by": "a test"})
    assert changed.data_hash != expected[0].data_hash
    record_model(stored, kind="pinn", path="a.model", content_hash="0")
    (model,) = open_scan(stored).attributes["models"]
    assert Path(model["path"]).name == "a.model"


def test_a_store_is_replaced_only_when_asked_and_by_its_kind(folder, stored, expected) -> None:
    out = str(folder / "object.zarr")
    expected[1].ptycho.save(out)
    with pytest.raises(PtychodaskError, match=r"object\.zarr: exists already"):
        expected[1].ptycho.save(out)
    with pytest.raises(PtychodaskError, match=r"is ptychodask-result, and overwrite=True .* only a ptychodask-scan"):
        simulate(out, overwrite=True, **SIZES)
    expected[1].ptycho.save(out, overwrite=True)
    same_bits(open_result(out), expected[1])
    with pytest.raises(PtychodaskError, match=r"of another kind .format is 'ptychodask-scan'"):
        open_result(stored)
    with pytest.raises(PtychodaskError, match=r"none\.zarr: no such store; make one"):
        open_scan(str(folder / "none.zarr"))


def test_a_scan_that_cannot_be_written_leaves_nothing(folder) -> None:
    patterns = np.ones((10, 16, 16), np.float32)
    patterns[4] = np.nan
    with pytest.raises(PtychodaskError, match="not finite in 1 patterns"):
        write_scan(str(folder / "bad.zarr"), **scan_parts(patterns))
    assert not names_below(folder)


def test_a_second_writer_is_refused_and_readers_see_the_store_as_unfinished(folder) -> None:
    location = folder / "two.zarr"
    with location.atomic_store(overwrite=False, kind=SCAN) as writing:
        root = zarr.create_group(writing.whole.zarr_store(), zarr_format=3)
        root.attrs.update({"format": SCAN.name, "format_version": 1, "state": "writing"})
        with pytest.raises(PtychodaskError, match=r"two\.zarr: another run is writing it"):
            write_scan(str(location), **scan_parts(np.ones((10, 16, 16), np.float32)))
        with pytest.raises(PtychodaskError, match="the store is unfinished"):
            open_scan(str(location))
        assert not location.is_complete()
        writing.check_held()
        consolidate(writing.whole).attrs["state"] = "complete"
    assert location.is_complete()
    assert location.recorded_format() == SCAN.name
    with pytest.raises(PtychodaskError, match="exists already"):
        location.check_vacant(overwrite=False, kind=SCAN)
    with pytest.raises(PtychodaskError, match="replaces only a ptychodask-result"):
        location.check_vacant(overwrite=True, kind=RESULT)
    assert names_below(folder) == {"two.zarr"}


@pytest.mark.parametrize("fields", [{"pyramid": True}, {"polish": 2}], ids=["pyramid", "polished"])
def test_a_result_has_the_bits_of_the_one_in_memory(folder, stored, expected, client, fields) -> None:
    out = str(folder / "object.zarr")
    found = reconstruct(stored, LinearModel(), out=out, client=client, **fields, **FIELDS)
    polished = {name: value for name, value in fields.items() if name == "polish"}
    same_bits(found, reconstruct(expected[0].store, LinearModel(), client=client, **polished, **FIELDS))
    same_bits(open_result(out), found)
    if "pyramid" in fields:
        assert open_result(out, level=1)["object"].ndim == 2
    # Nothing is left beside what is whole.
    assert names_below(folder) == {"scan.zarr", "object.zarr"}


def test_a_location_is_recorded_as_a_user_would_name_it(folder, stored, client) -> None:
    assert open_scan(stored).store == stored
    assert plan(stored, LinearModel()).store == stored
    results = reconstruct([folder / "scan.zarr"], LinearModel(), out=folder / "out", client=client, **FIELDS)
    same_bits(open_result(str(folder / "out" / "scan.object.zarr")), results["scan"])


@dataclass(eq=False)
class StoppingModel(LinearModel):
    """Fails for good after some calls, until it is told not to."""

    stops: bool = True

    def patches(self, x, offset_yx_px):
        if self.stops and len(self.calls) > 6:
            raise PtychodaskError("model: stopped by a test")
        return super().patches(x, offset_yx_px)


def test_a_stopped_run_goes_on_from_its_ledger(folder, stored, expected, client) -> None:
    # Workers keep a network by its hash, and would meet the one of the other location.
    out, model = str(folder / "resumed.zarr"), StoppingModel(uuid4().hex)
    with pytest.raises(PtychodaskError, match="stopped by a test; what is finished is kept: continue with resume=True"):
        reconstruct(stored, model, out=out, client=client, **FIELDS)
    with pytest.raises(PtychodaskError, match="the result is unfinished"):
        open_result(out)
    with pytest.raises(PtychodaskError, match=r"a stopped run left finished parts.*resume=True \(--resume\)"):
        reconstruct(stored, model, out=out, client=client, **FIELDS)
    assert parse_location(out).is_resumable()
    model.stops = False
    model.calls.clear()
    same_bits(reconstruct(stored, model, out=out, client=client, resume=True, **FIELDS), expected[1])
    # 300 groups in batches of 30 are 10 calls; the first run's chunks are not among them.
    n_calls = len(model.calls)
    assert 0 < n_calls < 10
    same_bits(reconstruct(stored, model, out=out, client=client, resume=True, **FIELDS), expected[1])
    assert len(model.calls) == n_calls


def test_a_backend_is_one_short_file() -> None:
    assert len(Path(memory_location.__file__).read_text().splitlines()) < 120


def test_no_module_but_those_of_storage_asks_for_the_type_of_a_location() -> None:
    """Arguments may be asked whether they are a path or an object, as `str | Path`."""
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "storage":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                names = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
                if names & {"Path", "Location", "LocalLocation", "S3Location"} and "str" not in names:
                    asked.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not asked
