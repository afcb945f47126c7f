"""A result keeps its numbers, coordinates and attributes on disk, and refuses what is no result."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
import zarr

from ptychodask.errors import PtychodaskError
from ptychodask.reassembly import Finished
from ptychodask.result import (
    CHUNK_PIXELS,
    Layers,
    create_result,
    finish_result,
    make_dataset,
    open_result,
    recorded,
    write_tile,
)
from ptychodask.storage.location import parse_location

CORNER = (-7, 12)


def some_arrays(shape=(50, 70), seed=0):
    rng = np.random.default_rng(seed)
    image = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
    weight, spread = rng.uniform(size=(2, *shape)).astype(np.float32)
    count = rng.integers(0, 5, shape).astype(np.int32)
    image[count == 0] = complex(np.nan, np.nan)
    spread[count < 2] = np.nan
    return image, weight, spread, count


@pytest.fixture
def result():
    attributes = {"model": {"kind": "pinn", "hash": "ab"}, "seconds": {"read": 0.5}, "data_hash": "cd"}
    return make_dataset(*some_arrays(), CORNER, pixel_size_m=2e-9, attributes=attributes)


def test_coordinates_are_whole_pixels_and_metres(result):
    np.testing.assert_array_equal(result.y, np.arange(-7, 43, dtype=float))
    np.testing.assert_array_equal(result.x, np.arange(12, 82, dtype=float))
    assert result.y.dtype == np.float64
    np.testing.assert_allclose(result.x_m, np.arange(12, 82) * 2e-9, rtol=1e-12)
    dtypes = [result[name].dtype for name in ("object", "weight", "uncertainty", "count")]
    assert dtypes == [np.complex64, np.float32, np.float32, np.int32]


def test_metres_are_absent_where_the_pixel_size_is_unknown():
    ds = make_dataset(*some_arrays(), CORNER, pixel_size_m=None, attributes={})
    assert set(ds.coords) == {"y", "x"}


def test_a_saved_result_opens_as_it_was(result, tmp_path):
    result.ptycho.save(tmp_path / "object.zarr")
    opened = open_result(tmp_path / "object.zarr")
    xr.testing.assert_identical(opened.compute(), result)
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "object.zarr").drop_attrs().compute(), result.drop_attrs())


def test_part_of_a_result_can_be_saved(result, tmp_path):
    part = result.isel(y=slice(5, 6), x=slice(3, 30))
    part.ptycho.save(tmp_path / "part.zarr")
    xr.testing.assert_identical(open_result(tmp_path / "part.zarr").compute(), part)


def test_what_is_no_block_of_a_result_is_not_saved(result, tmp_path):
    with pytest.raises(PtychodaskError, match="pixels along x are not consecutive"):
        result.isel(x=slice(None, None, 2)).ptycho.save(tmp_path / "a.zarr")
    with pytest.raises(PtychodaskError, match=r"expected weight \(y, x\)"):
        result.drop_vars("weight").ptycho.save(tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_replaced_unasked(result, tmp_path):
    result.ptycho.save(tmp_path / "object.zarr")
    with pytest.raises(PtychodaskError, match=r"exists already; pass overwrite=True"):
        result.ptycho.save(tmp_path / "object.zarr")
    (result * 2).assign_attrs(result.attrs).ptycho.save(tmp_path / "object.zarr", overwrite=True)
    np.testing.assert_array_equal(open_result(tmp_path / "object.zarr")["weight"], 2 * result["weight"])


def test_tiles_written_one_by_one_are_the_whole(result, tmp_path):
    tile, arrays = 32, some_arrays()
    create_result(parse_location(tmp_path), (50, 70), CORNER, tile, pixel_size_m=2e-9, variables=Finished._fields)
    for row in range(0, 50, tile):
        for column in range(0, 70, tile):
            part = {
                n: a[row : row + tile, column : column + tile] for n, a in zip(Finished._fields, arrays, strict=True)
            }
            write_tile(parse_location(tmp_path), (row, column), part)
    finish_result(parse_location(tmp_path), {k: v for k, v in result.attrs.items() if not k.startswith("format")})
    xr.testing.assert_identical(open_result(tmp_path).compute(), result)


@pytest.mark.parametrize("tile", [32, 2 * CHUNK_PIXELS])
def test_a_tile_is_a_whole_number_of_shards(tmp_path, tile):
    create_result(parse_location(tmp_path), (600, 600), (0, 0), tile, pixel_size_m=None)
    array = zarr.open_group(tmp_path, mode="r")["object"]
    assert array.shards == (tile, tile)
    assert all(s % c == 0 for s, c in zip(array.shards, array.chunks, strict=True))


def test_a_tile_that_was_never_written_is_nothing(tmp_path):
    create_result(parse_location(tmp_path), (40, 40), (0, 0), 32, pixel_size_m=None)
    finish_result(parse_location(tmp_path), {})
    ds = open_result(tmp_path).compute()
    assert np.isnan(ds["object"]).all()
    assert np.isnan(ds["uncertainty"]).all()
    assert (ds["weight"] == 0).all()
    assert (ds["count"] == 0).all()


def test_amplitude_and_phase_make_the_object_again(result):
    amplitude, phase = result.ptycho.amplitude, result.ptycho.phase
    assert (amplitude.name, phase.name) == ("amplitude", "phase")
    assert float(np.abs(phase).max()) <= np.pi
    np.testing.assert_allclose(amplitude * np.exp(1j * phase), result["object"], rtol=1e-5)


def test_what_is_no_result_is_refused(tmp_path, result):
    with pytest.raises(PtychodaskError, match=r"no such result; make one with 'ptychodask reconstruct'"):
        open_result(tmp_path / "absent.zarr")
    (tmp_path / "file").write_text("no store")
    with pytest.raises(PtychodaskError, match="is a file, expected a result"):
        open_result(tmp_path / "file")
    zarr.create_group(tmp_path / "other.zarr", attributes={"format": "ptychodask-scan"})
    with pytest.raises(PtychodaskError, match=r"format is 'ptychodask-scan', expected 'ptychodask-result'"):
        open_result(tmp_path / "other.zarr")


def test_a_damaged_array_is_named_when_it_is_read(result, tmp_path):
    result.ptycho.save(tmp_path / "r.zarr")
    for file in (tmp_path / "r.zarr" / "object" / "c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"nonsense")
    with pytest.raises(PtychodaskError, match=r"arrays cannot be read or computed \(.*it is damaged: reconstruct it"):
        open_result(tmp_path / "r.zarr").ptycho.compute()


def test_unfinished_and_newer_results_are_refused(tmp_path):
    create_result(parse_location(tmp_path), (40, 40), (0, 0), 32, pixel_size_m=None)
    with pytest.raises(PtychodaskError, match=r"unfinished \(state is 'writing'"):
        open_result(tmp_path)
    finish_result(parse_location(tmp_path), {"format_version": 99})
    with pytest.raises(PtychodaskError, match="format version 99, this ptychodask reads up to 1; upgrade"):
        open_result(tmp_path)
    (tmp_path / ".late.zarr.writing").mkdir()
    with pytest.raises(PtychodaskError, match="still at work, or was stopped"):
        open_result(tmp_path / "late.zarr")


def test_a_result_that_lost_a_file_is_refused(tmp_path):
    path = tmp_path / "object.zarr"
    make_dataset(*some_arrays(), CORNER, pixel_size_m=2e-9, attributes={}).ptycho.save(path)
    assert "stored_chunks" not in open_result(path).attrs
    next(file for file in (path / "object" / "c").rglob("*") if file.is_file()).unlink()
    with pytest.raises(
        PtychodaskError, match=r"object has 0 of its 1 chunks, files of it are missing; reconstruct again"
    ):
        open_result(path)


def full_attributes():
    return {
        "plan": {"tile": 256, "box": [0, 1, 2, 3]},
        "skipped": {},
        "store": None,
        "resumed": False,
        "rates": [1.5, 2],
        "labels": ["a", "b"],
        "mixed": [1, "b", None],
        "name": "{not json",
    }


def test_a_result_is_written_by_xarray_to_netcdf(tmp_path):
    ds = make_dataset(*some_arrays(), CORNER, pixel_size_m=2e-9, attributes=full_attributes())
    for opened in (ds, saved_and_opened(ds, tmp_path / "r.zarr")):
        opened[["weight", "count", "uncertainty"]].to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
        opened.ptycho.amplitude.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / "r.nc", engine="h5netcdf") as read:
            assert json.loads(read.attrs["plan"]) == full_attributes()["plan"]
            assert recorded(read.attrs, "plan", "box") == [0, 1, 2, 3]
            np.testing.assert_array_equal(read["weight"], opened["weight"])


def saved_and_opened(ds, path):
    ds.ptycho.save(path)
    return open_result(path)


def test_records_are_the_attributes_that_were_given(tmp_path):
    ds = make_dataset(*some_arrays(), CORNER, pixel_size_m=2e-9, attributes=full_attributes())
    for opened in (ds, saved_and_opened(ds, tmp_path / "r.zarr")):
        assert {name: opened.ptycho.records[name] for name in full_attributes()} == full_attributes()
    # The store has them as values, for programs that read it without ptychodask.
    assert zarr.open_group(tmp_path / "r.zarr", mode="r").attrs["plan"] == full_attributes()["plan"]


def test_a_result_of_several_networks_of_version_0_1_opens_with_a_hint(tmp_path, told):
    path = parse_location(tmp_path / "r.zarr")
    path.make_folder()
    layers = Layers(("pinn", "baseline"))
    create_result(path, (8, 8), (0, 0), 8, pixel_size_m=None, layers=layers)
    arrays = {name: np.zeros(layers.shape(name, (8, 8)), each.dtype) for name, each in layers.variables.items()}
    arrays["weight"][1] = 2.0
    write_tile(path, (0, 0), arrays)
    finish_result(path, {"model": {"pinn": {"kind": "pinn"}, "baseline": {"kind": "baseline"}}})
    new = open_result(path)
    for file in (tmp_path / "r.zarr").rglob("zarr.json"):
        file.write_text(file.read_text().replace('"networks"', '"methods"').replace('"network"', '"method"'))
    assert not told
    old = open_result(path)
    assert "its dimension 'method' is called 'network' now; select with ds.sel(network='pinn')" in told[0]
    xr.testing.assert_identical(old.compute(), new.compute())
    assert float(old.sel(network="baseline")["weight"].max()) == 2.0
    with pytest.raises(KeyError):
        new.sel(network="nosuch")
