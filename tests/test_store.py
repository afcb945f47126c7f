"""A store is written whole or not at all, keeps what belongs together, and opens elsewhere."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from ptychodask import store as stores
from ptychodask.errors import PtychodaskError
from ptychodask.grouping import GroupingSpec, curve_order
from ptychodask.scan import Scan, Truth
from ptychodask.storage import atomic
from ptychodask.storage.atomic import LOCK, WHOLE, atomic_folder, building_path, check_vacant_folder
from ptychodask.storage.location import parse_location
from ptychodask.store import SCAN, StoredScan, open_scan
from ptychodask.store import write as store_module
from ptychodask.store.annotate import record_model, replace_probe
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan


def scan_parts(n_patterns: int = 40, n_pixels: int = 16, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "diffraction": rng.poisson(5, (n_patterns, n_pixels, n_pixels)).astype(np.uint16),
        "position_yx_px": rng.random((n_patterns, 2)) * 50,
        "probe": (rng.normal(size=(1, n_pixels, n_pixels)) + 1j).astype(np.complex64),
        "domain": "counts",
        "calibration": "mean_counts",
    }


def write(path: Path, **changes: Any) -> Scan:
    return write_scan(path, progress=False, **(scan_parts() | changes))


def test_what_is_written_is_read_back(tmp_path):
    parts = scan_parts()
    mask = np.ones((16, 16), bool)
    mask[3, 4] = False
    truth = Truth(np.full((80, 90), 0.5 + 0.25j, np.complex64), (-12.0, 3.5))
    scan = write(tmp_path / "a.zarr", mask=mask, truth=truth, energy_ev=8000.0, pixel_size_m=1e-8, distance_m=2.0)
    order = scan.source_index
    np.testing.assert_array_equal(scan.diffraction[slice(None)], parts["diffraction"][order])
    np.testing.assert_array_equal(scan.position_yx_px, parts["position_yx_px"][order])
    np.testing.assert_array_equal(scan.mask, mask)
    np.testing.assert_array_equal(scan.truth.object, truth.object)
    assert scan.truth.corner_yx_px == (-12.0, 3.5)
    assert (scan.energy_ev, scan.pixel_size_m, scan.distance_m) == (8000.0, 1e-8, 2.0)
    assert scan.domain == "counts"
    assert scan.diffraction.dtype == np.uint16


def test_normalization_is_that_of_all_patterns_without_bad_pixels(tmp_path):
    parts = scan_parts()
    mask = np.random.default_rng(1).random((16, 16)) > 0.2
    scan = write(tmp_path / "a.zarr", mask=mask)
    mean = parts["diffraction"][:, mask].sum(axis=1).mean()
    assert scan.normalization == pytest.approx(np.sqrt(8**2 / mean))
    assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(mean, rel=1e-5)


def test_sorting_keeps_pattern_position_label_and_row_together(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 2 * 16 * 16 * 2)
    n_patterns = 300
    position = np.random.default_rng(2).random((n_patterns, 2)) * 100
    tag = np.arange(n_patterns)
    patterns = np.ones((n_patterns, 16, 16), np.uint16) * (1 + tag)[:, None, None].astype(np.uint16)
    scan = write(
        tmp_path / "a.zarr",
        diffraction=patterns,
        position_yx_px=position,
        label=patterns.astype(np.complex64) * 1j,
        scan_index=tag // 7,
        flux=1.0 + tag,
    )
    rows = scan.source_index
    assert scan.attributes["sorted_along_curve"]
    np.testing.assert_array_equal(rows, curve_order(position))
    np.testing.assert_array_equal(scan.position_yx_px, position[rows])
    np.testing.assert_array_equal(scan.diffraction[slice(None)][:, 0, 0], 1 + rows)
    np.testing.assert_array_equal(scan.label[np.arange(n_patterns)][:, 0, 0].imag, 1 + rows)
    np.testing.assert_array_equal(scan.scan_index, rows // 7)
    np.testing.assert_allclose(scan.flux, (1 + rows) / (1 + tag).mean(), rtol=1e-6)


def test_a_raster_in_its_own_order_is_left_as_it_is(tmp_path):
    line = np.stack([np.zeros(40), np.arange(40.0)], axis=1)
    assert (write(tmp_path / "a.zarr", position_yx_px=line).source_index == np.arange(40)).all()


@pytest.mark.parametrize("index", [[5], [7, 3, 3, 39, 0], list(range(10, 30)), slice(4, 9), [0, 39], []])
def test_patterns_are_read_by_index_in_any_order(tmp_path, monkeypatch, index):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 3 * 16 * 16 * 2)
    scan = write(tmp_path / "a.zarr")
    expected = scan_parts()["diffraction"][scan.source_index]
    index = index if isinstance(index, slice) else np.array(index, np.int64)
    np.testing.assert_array_equal(scan.diffraction[index], expected[index])


def test_xarray_opens_a_store_without_a_warning(tmp_path):
    scan = write(tmp_path / "a.zarr")
    group(tmp_path / "a.zarr", GroupingSpec())
    with xarray.open_zarr(tmp_path / "a.zarr") as ds:
        assert ds["diffraction"].dims == ("pattern", "qy", "qx")
        assert ds["y_px"].attrs["units"] == "px"
        assert ds["probe"].dtype == np.complex64
        np.testing.assert_array_equal(ds["y_px"], scan.position_yx_px[:, 0])
    with xarray.open_zarr(tmp_path / "a.zarr", group=f"groups/{GroupingSpec().name}") as groups:
        assert groups["member"].dims == ("group", "channel")


def test_a_shard_of_large_patterns_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 3 * 64 * 64 * 4)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 64 * 64 * 4)
    parts = scan_parts(10, 64)
    write(tmp_path / "a.zarr", **(parts | {"diffraction": parts["diffraction"].astype(np.float32)}))
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["diffraction"]
    assert array.shards == (3, 64, 64)
    assert array.chunks == (1, 64, 64)


def test_the_data_hash_follows_the_data_and_nothing_else(tmp_path):
    first = write(tmp_path / "a.zarr").data_hash
    assert write(tmp_path / "b.zarr").data_hash == first
    parts = scan_parts()
    changed = parts["diffraction"].copy()
    changed[3, 2, 1] += 1
    assert write(tmp_path / "c.zarr", diffraction=changed).data_hash != first
    assert write(tmp_path / "d.zarr", position_yx_px=parts["position_yx_px"] + 1).data_hash != first
    assert write(tmp_path / "e.zarr", mask=np.ones((16, 16), bool)).data_hash != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (-1.0, r"negative counts in 1 patterns \(source rows 6\)"),
        (np.nan, r"not finite in 1 patterns \(source rows 6\)"),
        (np.inf, r"not finite in 1 patterns \(source rows 6\)"),
    ],
)
def test_bad_counts_are_refused_by_the_rows_of_the_source(tmp_path, change, message):
    patterns = scan_parts()["diffraction"].astype(np.float32)
    patterns[6, 2, 3] = change
    with pytest.raises(PtychodaskError, match=message):
        write(tmp_path / "a.zarr", diffraction=patterns)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_are_not_finite_are_refused(tmp_path):
    label = np.ones((40, 16, 16), np.complex64)
    label[3, 1, 1] = np.nan
    with pytest.raises(PtychodaskError, match="labels have values that are not finite"):
        write(tmp_path / "a.zarr", label=label)


def test_bad_counts_under_the_mask_do_not_matter(tmp_path):
    patterns = scan_parts()["diffraction"].astype(np.float32)
    patterns[6, 2, 3] = np.nan
    mask = np.ones((16, 16), bool)
    mask[2, 3] = False
    assert np.isfinite(write(tmp_path / "a.zarr", diffraction=patterns, mask=mask).normalization)


def test_an_existing_store_stays_unless_overwrite_is_said(tmp_path):
    first = write(tmp_path / "a.zarr")
    with pytest.raises(PtychodaskError, match="exists already; pass overwrite=True"):
        write(tmp_path / "a.zarr", **scan_parts(seed=1))
    assert open_scan(tmp_path / "a.zarr").data_hash == first.data_hash
    second = write(tmp_path / "a.zarr", overwrite=True, **scan_parts(seed=1))
    assert second.data_hash != first.data_hash
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_full_disk_leaves_nothing_behind_and_the_earlier_store_whole(tmp_path, monkeypatch):
    first = write(tmp_path / "a.zarr")

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "fill_patterns", refuse)
    for name, overwrite in (("a.zarr", True), ("new.zarr", False)):
        with pytest.raises(PtychodaskError, match=r"cannot be written \(No space left on device\)"):
            write(tmp_path / name, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    reopened = open_scan(tmp_path / "a.zarr")
    np.testing.assert_array_equal(reopened.diffraction[slice(None)], first.diffraction[slice(None)])


def test_an_earlier_store_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    first = write(tmp_path / "a.zarr")
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name == WHOLE:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(PtychodaskError, match="Input/output error"):
        write(tmp_path / "a.zarr", overwrite=True, **scan_parts(seed=1))
    assert open_scan(tmp_path / "a.zarr").data_hash == first.data_hash
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_killed_writer_is_recognised_and_replaced_on_request(tmp_path):
    (tmp_path / ".a.zarr.writing").mkdir()
    with pytest.raises(PtychodaskError, match="the store is unfinished"):
        open_scan(tmp_path / "a.zarr")
    (tmp_path / ".a.zarr.writing" / "half").touch()
    write(tmp_path / "a.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.fixture
def killed_between_renames(tmp_path):
    """A store whose writer was killed after it moved the previous version away, with the new one still unnamed."""
    write(tmp_path / "a.zarr")
    (tmp_path / "a.zarr").rename(tmp_path / ".a.zarr.replaced")
    (building_path(tmp_path / "a.zarr") / WHOLE).mkdir(parents=True)
    return tmp_path / "a.zarr"


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_check_changes_nothing_after_a_writer_was_killed_between_renames(killed_between_renames):
    path = killed_between_renames
    before = content(path.parent)
    with pytest.raises(PtychodaskError, match=r"a\.zarr: exists already \(as .*\.a\.zarr\.replaced"):
        check_vacant_folder(path, overwrite=False, kind=SCAN)
    check_vacant_folder(path, overwrite=True, kind=SCAN)
    with pytest.raises(PtychodaskError, match="is ptychodask-scan, and overwrite=True"):
        check_vacant_folder(path, overwrite=True, kind=replace(SCAN, name="ptychodask-result"))
    with pytest.raises(PtychodaskError, match=r"previous one is .*\.replaced: .* rename that folder to a\.zarr"):
        open_scan(path)
    assert content(path.parent) == before


def test_a_writer_restores_the_previous_version_before_it_replaces_it(killed_between_renames):
    path = killed_between_renames
    with pytest.raises(PtychodaskError, match="exists already"):
        write(path)
    with pytest.raises(KeyError), atomic_folder(path, overwrite=True, kind=SCAN):
        raise KeyError
    first = open_scan(path).data_hash
    assert [found.name for found in path.parent.iterdir()] == ["a.zarr"]
    write(path, overwrite=True, **scan_parts(seed=1))
    assert open_scan(path).data_hash != first
    assert [found.name for found in path.parent.iterdir()] == ["a.zarr"]


def test_a_store_that_another_run_finished_after_the_check_is_not_replaced(tmp_path, monkeypatch):
    first = write(tmp_path / "a.zarr")
    monkeypatch.setattr(atomic, "check_vacant_folder", lambda path, **arguments: None)
    with pytest.raises(PtychodaskError, match="exists already"):
        write(tmp_path / "a.zarr", **scan_parts(seed=1))
    assert open_scan(tmp_path / "a.zarr").data_hash == first.data_hash
    assert [found.name for found in tmp_path.iterdir()] == ["a.zarr"]


def test_a_second_writer_is_refused_while_the_first_is_at_work(tmp_path):
    with atomic_folder(tmp_path / "a.zarr", overwrite=False, kind=SCAN) as building:
        (building / "half").touch()
        for overwrite in (False, True):
            with pytest.raises(PtychodaskError, match=r"another run is writing it .*wait until it has finished"):
                write(tmp_path / "a.zarr", overwrite=overwrite)
        assert (building / "half").exists()
    assert [path.name for path in (tmp_path / "a.zarr").iterdir()] == ["half"]


def test_where_files_cannot_be_locked_leftovers_are_replaced_on_request_alone(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".a.zarr.writing").mkdir()
    (tmp_path / ".a.zarr.writing" / LOCK).touch()
    with pytest.raises(PtychodaskError, match="another run is writing it, or was stopped"):
        write(tmp_path / "a.zarr")
    write(tmp_path / "a.zarr", overwrite=True)
    assert "cannot be locked (" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def change_root(path: Path, **attributes: Any) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"].update(attributes)
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"state": "writing"}, "the store is unfinished.*'writing', expected 'complete'"),
        ({"format_version": 99}, "format version 99, this ptychodask reads up to 1; upgrade"),
        ({"format": "other"}, "of another kind .format is .other., expected .ptychodask-scan."),
        ({"domain": "photons"}, "domain is 'photons'"),
    ],
)
def test_a_store_that_cannot_be_trusted_is_refused(tmp_path, attributes, message):
    write(tmp_path / "a.zarr")
    change_root(tmp_path / "a.zarr", **attributes)
    with pytest.raises(PtychodaskError, match=message):
        open_scan(tmp_path / "a.zarr")


def test_a_store_without_an_array_is_refused_by_its_name(tmp_path):
    write(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "probe")
    document = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"].pop("probe")
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(PtychodaskError, match="array 'probe' is missing"):
        open_scan(tmp_path / "a.zarr")


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, message in (("none.zarr", "no such store"), ("file", "is a file"), ("folder", "not a Zarr format 3")):
        with pytest.raises(PtychodaskError, match=message):
            open_scan(tmp_path / name)
    with pytest.raises(PtychodaskError, match=r"its folder .* does not exist"):
        write(tmp_path / "missing" / "a.zarr")


def test_a_stored_group_table_is_read_not_computed_again(tmp_path, monkeypatch):
    write(tmp_path / "a.zarr")
    calls = []
    compute = stores.group_positions

    def counted(*args: Any) -> Any:
        calls.append(args)
        return compute(*args)

    monkeypatch.setattr(stores, "group_positions", counted)
    first = group(tmp_path / "a.zarr", GroupingSpec(seed=3))
    again = group(tmp_path / "a.zarr", GroupingSpec(seed=3))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.member, again.member)
    group(tmp_path / "a.zarr", GroupingSpec(seed=4))
    assert len(calls) == 2
    assert StoredScan(tmp_path / "a.zarr").table_names() == ["c4-k7-s3", "c4-k7-s4"]


def test_a_grouping_that_was_killed_is_made_again(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    write(path)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ptychodask.store.groups.consolidate", killed)
        with pytest.raises(KeyboardInterrupt):
            group(path)
    assert StoredScan(path).table(GroupingSpec().name) is None
    made = group(path)
    np.testing.assert_array_equal(StoredScan(path).table(made.name).rows(0, len(made)), made.member)


def test_grouping_leaves_the_patterns_untouched(tmp_path):
    scan = write(tmp_path / "a.zarr")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "a.zarr" / "diffraction").rglob("*") if p.is_file()}
    group(tmp_path / "a.zarr", GroupingSpec())
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert open_scan(tmp_path / "a.zarr").data_hash == scan.data_hash


def test_a_group_name_taken_by_another_spec_is_refused(tmp_path):
    write(tmp_path / "a.zarr")
    group(tmp_path / "a.zarr", GroupingSpec(), name="mine")
    with pytest.raises(PtychodaskError, match="'mine' was made by"):
        group(tmp_path / "a.zarr", GroupingSpec(seed=5), name="mine")
    with pytest.raises(PtychodaskError, match="is not a valid name of a group table"):
        group(tmp_path / "a.zarr", GroupingSpec(), name="a/b")
    assert StoredScan(tmp_path / "a.zarr").table("unknown") is None


def test_a_refined_probe_replaces_the_probe_but_not_the_initial_one(tmp_path):
    scan = write(tmp_path / "a.zarr")
    refined = replace_probe(tmp_path / "a.zarr", scan.probe * 1j, {"sweeps": 3})
    np.testing.assert_array_equal(refined.probe, scan.probe * 1j)
    np.testing.assert_array_equal(refined.probe_initial, scan.probe)
    assert refined.data_hash != scan.data_hash
    assert refined.attributes["probe_refinement"] == {"sweeps": 3}
    with pytest.raises(PtychodaskError, match="the new probe has shape"):
        replace_probe(tmp_path / "a.zarr", scan.probe[:, :8], {})


def test_models_are_recorded_relative_to_the_store(tmp_path):
    write(tmp_path / "a.zarr")
    record_model(tmp_path / "a.zarr", kind="pinn", path=tmp_path / "m" / "a.model", content_hash="abc")
    record_model(tmp_path / "a.zarr", kind="baseline", path=tmp_path / "b.model", content_hash="def")
    models = open_scan(tmp_path / "a.zarr").attributes["models"]
    assert [(m["kind"], m["path"], m["hash"]) for m in models] == [
        ("pinn", "m/a.model", "abc"),
        ("baseline", "b.model", "def"),
    ]


def test_a_damaged_chunk_is_named_when_it_is_read(tmp_path):
    scan = write(tmp_path / "a.zarr")
    shard = next(p for p in (tmp_path / "a.zarr" / "diffraction" / "c").rglob("*") if p.is_file())
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(PtychodaskError, match=r"cannot be read for patterns 0\.\.1"):
        scan.diffraction[np.array([0, 1])]


@pytest.mark.parametrize("name", ["notes.txt", "folder"])
def test_nothing_but_stores_and_models_is_overwritten(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    (tmp_path / "notes.txt").write_text("a source")
    with pytest.raises(PtychodaskError, match=f"{name}: is something of another kind.*replaces only a ptychodask-scan"):
        write(tmp_path / name, overwrite=True)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "notes.txt").read_text() == "a source"


def test_an_empty_folder_and_a_damaged_store_are_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)
    (tmp_path / "empty" / "zarr.json").write_text("{")
    assert write(tmp_path / "empty", overwrite=True).n_patterns == 40


@pytest.mark.parametrize("index", [slice(0, 5), np.array([39, 0, 7])])
def test_patterns_whose_file_is_gone_are_not_read_as_zeros(tmp_path, index):
    scan = write(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "diffraction" / "c")
    with pytest.raises(PtychodaskError, match=r"diffraction cannot be read.*1 of its 1 files are missing"):
        scan.amplitude(index)


def test_patterns_without_light_are_read_as_they_were_measured(tmp_path):
    diffraction = scan_parts()["diffraction"]
    diffraction[3:] = 0
    scan = write(tmp_path / "a.zarr", diffraction=diffraction)
    np.testing.assert_array_equal(scan.diffraction[slice(None)], diffraction[scan.source_index])


@pytest.mark.parametrize("name", ["probe", "y_px"])
def test_an_array_whose_file_is_gone_is_noticed(tmp_path, name):
    write(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / name)
    with pytest.raises(PtychodaskError, match=r"have changed since they were written \(hash differs\)"):
        open_scan(tmp_path / "a.zarr")


def test_a_group_table_whose_file_is_gone_is_noticed(tmp_path):
    write(tmp_path / "a.zarr")
    table = group(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "groups" / table.name / "member")
    with pytest.raises(PtychodaskError, match="does not fit the scan"):
        StoredScan(tmp_path / "a.zarr").member(table.name, 0, 2)


@pytest.mark.parametrize("attribute", ["normalization", "pixel_size_m", "diffraction_hash"])
@pytest.mark.parametrize("value", [None, [1]])
def test_attributes_that_make_no_sense_are_named(tmp_path, attribute, value):
    write(tmp_path / "a.zarr", pixel_size_m=1e-8)
    zarr.open_group(tmp_path / "a.zarr", mode="r+").attrs[attribute] = value
    with pytest.raises(PtychodaskError, match=f"attribute '{attribute}' is .*damaged"):
        open_scan(tmp_path / "a.zarr")


def test_positions_of_two_lengths_are_refused(tmp_path):
    write(tmp_path / "a.zarr")
    root = zarr.open_group(tmp_path / "a.zarr", mode="r+", use_consolidated=False)
    root["y_px"].resize((10,))
    store_module.consolidate(parse_location(tmp_path) / "a.zarr")
    with pytest.raises(PtychodaskError, match=r"array 'y_px' has shape \(10,\) .* for 40 patterns"):
        open_scan(tmp_path / "a.zarr")


def test_a_name_that_leaves_the_store_is_refused(tmp_path):
    write(tmp_path / "a.zarr")
    with pytest.raises(PtychodaskError, match="is not a valid name of a group table"):
        StoredScan(tmp_path / "a.zarr").table("../x")
