"""What is exported is what its programs read: each file reopened by its own library, or by its documented layout."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from PIL import Image

from ptychodask.errors import PtychodaskError
from ptychodask.export import FORMATS, export, png
from ptychodask.export.content import Picture
from ptychodask.io import ingest, read_foreign_result
from ptychodask.progress import progress_bar
from ptychodask.pyramid import halve
from ptychodask.result import make_dataset, open_result
from ptychodask.simulate import random_field, simulate
from ptychodask.storage.atomic import recorded_folder_format
from ptychodask.store.annotate import replace_probe

N = 16
PIXEL_M = 7e-9
OPTICS = {"pixel_size_m": PIXEL_M, "energy_ev": 8800.0, "distance_m": 1.9}
JOULE_PER_EV = 1.602176634e-19


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return simulate(
        tmp_path_factory.mktemp("export") / "gold.zarr",
        n_pixels=N,
        n_patterns=50,
        step_px=3.0,
        dose=1e4,
        probe="zone_plate",
    )


def result_of(scan, shape=(60, 71), corner=(-24, -31), rows=None, **more):
    """A result whose object is random, with an unseen corner; in `rows` rows a chunk where that is said."""
    object_ = random_field(shape, np.random.default_rng(3))
    count = np.ones(shape, np.int32)
    count[:7, :9] = 0
    object_[count == 0] = complex(np.nan, np.nan)
    weight = np.random.default_rng(4).uniform(1, 2, shape).astype(np.float32) * count
    attributes = {"data_hash": scan.data_hash, "store": scan.store, "plan": {"tile": 256}} | more
    arrays = object_, weight, np.where(count, np.float32(0.1), np.float32(np.nan)), count
    ds = make_dataset(*arrays, corner, pixel_size_m=None, attributes=attributes)
    return ds if rows is None else ds.chunk(y=rows)


@pytest.fixture
def result(scan):
    return result_of(scan, rows=13)


def unseen_as_zero(ds):
    return np.nan_to_num(ds["object"].values, nan=0.0)


def middle_m(ds, dim):
    return (float(ds[dim][0]) + ds.sizes[dim] / 2) * PIXEL_M


def test_a_product_of_ptychodus_has_its_names_shapes_and_units(scan, result, tmp_path):
    export(result, tmp_path / "product.h5", format="ptychodus", **OPTICS)
    with h5py.File(tmp_path / "product.h5") as file:
        attributes = dict(file.attrs)
        assert attributes.pop("name") == "gold"
        assert isinstance(attributes.pop("comments"), str)
        assert attributes.pop("probe_photon_count") == pytest.approx((np.abs(scan.probe) ** 2).sum(), rel=1e-6)
        assert attributes == {
            "detector_object_distance_m": 1.9,
            "probe_energy_eV": 8800.0,
            "photon_energy_eV": 8800.0,
            "exposure_time_s": 0.0,
            "mass_attenuation_m2_kg": 0.0,
            "mass_attenuation_m2_per_kg": 0.0,
            "tomography_angle_deg": 0.0,
        }
        np.testing.assert_array_equal(file["probe_position_indexes"], scan.source_index)
        assert file["probe_position_indexes"].dtype == np.int64
        np.testing.assert_allclose(file["probe_position_x_m"], scan.position_yx_px[:, 1] * PIXEL_M, rtol=1e-14)
        np.testing.assert_allclose(file["probe_position_y_m"], scan.position_yx_px[:, 0] * PIXEL_M, rtol=1e-14)
        np.testing.assert_array_equal(file["probe"], scan.probe[None])
        assert dict(file["probe"].attrs) == {"pixel_width_m": PIXEL_M, "pixel_height_m": PIXEL_M}
        assert (file["object"].shape, file["object"].dtype) == ((1, 60, 71), np.complex64)
        np.testing.assert_array_equal(file["object"][0], unseen_as_zero(result))
        assert file["object"].attrs["center_y_m"] == pytest.approx(middle_m(result, "y"), rel=1e-12)
        assert file["object"].attrs["center_x_m"] == pytest.approx(middle_m(result, "x"), rel=1e-12)
        assert {file["object"].attrs[name] for name in ("pixel_width_m", "pixel_height_m")} == {PIXEL_M}
        shapes = {name: file[name].shape for name in ("object_layer_spacing_m", "loss_epochs", "loss_values")}
        assert set(shapes.values()) == {(0,)}


@pytest.mark.parametrize("name", ["product.h5", "product.npz"])
def test_a_product_lies_where_the_result_lay(result, tmp_path, name):
    export(result, tmp_path / name, format="ptychodus", **OPTICS)
    found = read_foreign_result(tmp_path / name)
    np.testing.assert_array_equal(found.object, unseen_as_zero(result))
    np.testing.assert_allclose(found.corner_yx_px, (-24, -31), atol=1e-9)
    assert found.pixel_size_m == PIXEL_M


def test_both_kinds_of_product_hold_the_same(result, tmp_path):
    export(result, tmp_path / "a.h5", format="ptychodus", **OPTICS)
    export(result, tmp_path / "a.npz", format="ptychodus", **OPTICS)
    with h5py.File(tmp_path / "a.h5") as hdf5, np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        flat = dict(hdf5.attrs)
        for name, dataset in hdf5.items():
            flat |= {name: dataset[()]} | {f"{name}_{key}": value for key, value in dataset.attrs.items()}
        assert set(flat) == set(npz)
        for name, value in flat.items():
            np.testing.assert_array_equal(npz[name], value)


def test_a_product_read_again_gives_the_same_product(scan, result, tmp_path):
    """Positions agree to 1e-9 m, though they go to pixels and back."""
    export(result, tmp_path / "a.h5", format="ptychodus", **OPTICS)
    export(scan, tmp_path / "patterns.h5", format="ptychodus", **OPTICS)
    with h5py.File(tmp_path / "a.h5", "a") as file, h5py.File(tmp_path / "patterns.h5") as patterns:
        patterns.copy("patterns", file)
        np.testing.assert_array_equal(patterns["indexes"], file["probe_position_indexes"])
        first = file["probe_position_x_m"][()], file["probe_position_y_m"][()]
    keys = {"diffraction": "patterns", "y": "probe_position_y_m", "x": "probe_position_x_m", "probe": "probe"}
    options = {name: value for name, value in OPTICS.items() if name != "pixel_size_m"}
    again = ingest(
        tmp_path / "a.h5", tmp_path / "again.zarr", keys=keys, units="m", domain="counts", calibration="as_given",
        pixel_size_m=PIXEL_M, **options,
    )  # fmt: skip
    np.testing.assert_allclose(again.probe, scan.probe, rtol=1e-6)
    export(result_of(again), tmp_path / "b.h5", format="ptychodus")
    with h5py.File(tmp_path / "b.h5") as file:
        order = np.argsort(again.source_index)
        for name, values in zip(("probe_position_x_m", "probe_position_y_m"), first, strict=True):
            np.testing.assert_allclose(file[name][()][order], values, atol=1e-9, rtol=0)
            # Far below a pixel too, which a nanometre is not.
            np.testing.assert_allclose(file[name][()][order], values, atol=1e-6 * PIXEL_M, rtol=0)


def test_ptychodus_reads_its_own_files_and_finds_each_patch_in_its_place(tmp_path):
    """Patterns predicted with Ptychodus' own interpolation from an exported truth are those of the scan."""
    api = pytest.importorskip("ptychodus.api.io", reason="needs the package ptychodus")
    from ptychodus.api.interpolate import BarycentricArrayInterpolator
    from ptychodus.api.reconstruct import prepare_reconstruct_input

    scan = simulate(
        tmp_path / "a.zarr", object="star", probe="zone_plate", n_pixels=N, n_patterns=40, step_px=6.0, dose=1e9
    )
    truth = scan.truth
    ones = np.ones(truth.object.shape)
    corner = tuple(int(value) for value in truth.corner_yx_px)
    ds = make_dataset(truth.object, ones, ones, ones, corner, pixel_size_m=None, attributes={"store": scan.store})
    export(ds, tmp_path / "product.h5", format="ptychodus", **OPTICS)
    export(scan, tmp_path / "patterns.h5", format="ptychodus", **OPTICS)
    given = prepare_reconstruct_input(
        api.load_diffraction_data(tmp_path / "patterns.h5"), api.load_product(tmp_path / "product.h5")
    )
    geometry = given.product.object_.get_geometry()
    patches = BarycentricArrayInterpolator(given.product.object_.get_layers_flattened())
    probe = given.product.probes[0].get_array()

    def misfit(moved_x_px, moved_y_px):
        total = 0.0
        for position, pattern in zip(given.product.probe_positions, given.diffraction_patterns, strict=True):
            place = geometry.map_coordinates_probe_to_object(position)
            patch = patches.get_patch(place.x_px + moved_x_px, place.y_px + moved_y_px, N, N)
            wave = np.fft.fft2(probe * patch, norm="ortho")
            counts = (np.abs(np.fft.fftshift(wave, axes=(-2, -1))) ** 2).sum(axis=0)
            total += np.abs(np.sqrt(counts) - np.sqrt(pattern)).sum()
        return total

    # Noise and the interpolation leave a misfit; the place is right where it is least, to a quarter of a pixel.
    right = misfit(0, 0)
    assert all(misfit(*moved) > right for moved in ((-0.25, 0), (0.25, 0), (0, -0.25), (0, 0.25)))


def test_a_margin_covers_every_patch_of_the_scan(scan, tmp_path):
    small = result_of(scan, shape=(20, 22), corner=(-5, -6))
    picture = Picture(small).covering(scan)
    lowest = np.array(picture.corner_yx_px)
    first, last = (scan.position_yx_px - N / 2).min(axis=0), (scan.position_yx_px - N / 2).max(axis=0)
    assert (lowest <= first).all()
    assert (lowest > first - 1).all()
    # A patch between two pixels meets one more pixel than it has.
    assert (lowest + picture.shape - 1 >= np.floor(last) + N).all()
    export(small, tmp_path / "a.h5", format="ptychodus", **OPTICS)
    found = read_foreign_result(tmp_path / "a.h5")
    np.testing.assert_allclose(found.corner_yx_px, lowest, atol=1e-9)
    top, left = (int(value) for value in np.array((-5, -6)) - lowest)
    inside = np.zeros(found.object.shape, bool)
    inside[top : top + 20, left : left + 22] = True
    np.testing.assert_array_equal(found.object[inside].reshape(20, 22), unseen_as_zero(small))
    assert not found.object[~inside].any()


@pytest.mark.parametrize("margin", [((0, 0), (0, 0)), ((3, 0), (0, 2)), ((30, 41), (1, 0))])
@pytest.mark.parametrize("rows", [None, 7, 13, 100])
def test_rows_cover_a_picture_once_and_in_order(scan, margin, rows):
    picture = Picture(result_of(scan, rows=rows), margin)
    with progress_bar("test", 1, "rows", progress=False) as bar:
        blocks = list(picture.rows(bar, ["object", "weight"]))
    assert [r.start for r, _ in blocks[1:]] == [r.stop for r, _ in blocks[:-1]]
    assert (blocks[0][0].start, blocks[-1][0].stop) == (0, picture.shape[0])
    whole = {name: np.concatenate([arrays[name] for _, arrays in blocks]) for name in ("object", "weight")}
    np.testing.assert_array_equal(
        whole["object"], np.pad(picture.ds["object"], margin, constant_values=np.nan + 1j * np.nan)
    )
    np.testing.assert_array_equal(whole["weight"], np.pad(picture.ds["weight"], margin))


def test_patterns_for_ptychodus_are_counts_with_their_rows(tmp_path):
    mask = np.ones((N, N), bool)
    mask[3, 4] = False
    np.savez(
        tmp_path / "scan.npz",
        diff3d=np.sqrt(np.arange(30 * N * N, dtype=np.float32)).reshape(30, N, N),
        xcoords=np.arange(30.0),
        ycoords=np.arange(30.0),
        probeGuess=np.ones((N, N), np.complex64),
    )
    np.save(tmp_path / "mask.npy", mask)
    scan = ingest(tmp_path / "scan.npz", tmp_path / "scan.zarr", mask=tmp_path / "mask.npy", drop_frames="3,5")
    export(scan, tmp_path / "a.h5", format="ptychodus", **OPTICS)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["indexes"], scan.source_index)
        np.testing.assert_array_equal(file["bad_pixels"], ~mask)
        expected = np.arange(30 * N * N).reshape(30, N, N)[scan.source_index]
        # Squares of float32 roots.
        np.testing.assert_allclose(file["patterns"][()][:, mask], expected[:, mask], rtol=1e-6)
        wavelength_m = 1.239841984332e-6 / 8800
        np.testing.assert_allclose(
            [file["patterns"].attrs[f"detector_pixel_{side}_m"] for side in ("width", "height")],
            wavelength_m * 1.9 / (N * PIXEL_M),
        )


def test_patterns_for_ptychodus_are_the_same_as_npz(scan, tmp_path):
    for name in ("a.h5", "a.npz"):
        export(scan, tmp_path / name, format="ptychodus", **OPTICS)
    with h5py.File(tmp_path / "a.h5") as hdf5, np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        assert set(hdf5) == set(npz) == {"indexes", "patterns", "bad_pixels"}
        for name in npz:
            np.testing.assert_array_equal(npz[name], hdf5[name])
            assert npz[name].dtype == hdf5[name].dtype


def test_a_cxi_file_of_a_result_has_its_layout_in_si_units(scan, result, tmp_path):
    export(result, tmp_path / "a.cxi", format="cxi", **OPTICS)
    with h5py.File(tmp_path / "a.cxi") as file:
        assert file["cxi_version"][()] == 160
        entry = file["entry_1"]
        assert entry["instrument_1/source_1/energy"][()] == pytest.approx(8800 * JOULE_PER_EV, rel=1e-12)
        assert entry["instrument_1/detector_1/distance"][()] == 1.9
        np.testing.assert_array_equal(entry["instrument_1/source_1/illumination"], scan.probe)
        np.testing.assert_array_equal(entry["image_1/data"], scan.probe)
        expected = np.concatenate([scan.position_yx_px[:, ::-1] * PIXEL_M, np.zeros((50, 1))], axis=1)
        for where in ("data_1/translation", "sample_1/geometry_1/translation"):
            np.testing.assert_allclose(entry[where], expected, rtol=1e-14)
        np.testing.assert_array_equal(entry["image_2/data"], unseen_as_zero(result))
        np.testing.assert_array_equal(entry["image_2/mask"], np.isnan(result["object"]))
        np.testing.assert_allclose(entry["image_2/image_size"], [71 * PIXEL_M, 60 * PIXEL_M, 0])
        np.testing.assert_allclose(entry["image_2/image_center"], [middle_m(result, "x"), middle_m(result, "y"), 0])
        assert "data" not in entry["data_1"]


def test_a_cxi_file_of_a_scan_holds_its_patterns(scan, tmp_path):
    export(scan, tmp_path / "a.cxi", format="cxi", pixel_size_m=PIXEL_M)
    with h5py.File(tmp_path / "a.cxi") as file:
        np.testing.assert_array_equal(file["entry_1/data_1/data"], scan.diffraction[:])
        assert file["entry_1/data_1/data"].dtype == scan.diffraction.dtype
        assert file["entry_1/data_1/data"] == file["entry_1/instrument_1/detector_1/data"]
        # What is not known is left out, not invented.
        assert "energy" not in file["entry_1/instrument_1/source_1"]
        assert "image_2" not in file["entry_1"]


def test_a_scan_survives_ptychopinns_format(scan, tmp_path):
    export(scan, tmp_path / "a.npz", format="ptychopinn")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        kinds = {name: (file[name].dtype, file[name].shape) for name in file}
    assert kinds["diff3d"] == (np.float32, (50, N, N))
    assert kinds["xcoords"] == kinds["ycoords"] == (np.float64, (50,))
    assert kinds["probeGuess"] == (np.complex64, (N, N))
    assert kinds["objectGuess"] == (np.complex64, scan.truth.object.shape)
    again = ingest(tmp_path / "a.npz", tmp_path / "again.zarr", calibration="as_given")
    stored = np.argsort(again.source_index)
    # The file's origin is the first pixel of its object; amplitudes of counts are exact to a float32's rounding.
    np.testing.assert_allclose(
        again.position_yx_px[stored], scan.position_yx_px - np.array(scan.truth.corner_yx_px), atol=1e-9
    )
    np.testing.assert_allclose(again.amplitude(stored), scan.amplitude(slice(None)), rtol=1e-6)
    np.testing.assert_array_equal(again.probe, scan.probe)
    np.testing.assert_array_equal(again.truth.object, scan.truth.object)


def test_the_row_of_each_pattern_in_its_source_is_written(scan, tmp_path):
    # Patterns of a store are in the order of a curve if that saves reading.
    row = np.random.default_rng(0).permutation(50)
    export(replace(scan, source_index=row), tmp_path / "a.npz", format="ptychopinn")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["source_index"], row)


def test_as_many_patterns_as_pixels_are_read_back_in_their_order(scan, tmp_path):
    per_pattern = dict.fromkeys(("source_index", "scan_index", "label", "flux"))
    square = replace(
        scan, diffraction=scan.diffraction[np.arange(N)], position_yx_px=scan.position_yx_px[:N], **per_pattern
    )
    export(square, tmp_path / "a.npz", format="ptychopinn")
    again = ingest(tmp_path / "a.npz", tmp_path / "again.zarr", calibration="as_given")
    order = np.argsort(again.source_index)
    np.testing.assert_allclose(again.amplitude(order), square.amplitude(slice(None)), rtol=1e-6)


def test_ptychopinns_format_takes_the_object_of_a_result(scan, result, tmp_path):
    export(result, tmp_path / "a.npz", format="ptychopinn")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["objectGuess"], unseen_as_zero(result))
        np.testing.assert_allclose(file["xcoords"] - 31, scan.position_yx_px[:, 1], atol=1e-9)
        np.testing.assert_allclose(file["ycoords"] - 24, scan.position_yx_px[:, 0], atol=1e-9)


def test_a_scan_of_an_unknown_object_gets_a_flat_guess_that_covers_it(scan, tmp_path):
    export(replace(scan, truth=None), tmp_path / "a.npz", format="ptychopinn")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        guess, y, x = file["objectGuess"], file["ycoords"], file["xcoords"]
    assert (guess == 1).all()
    for values, side in ((y, guess.shape[0]), (x, guess.shape[1])):
        assert values.min() - N / 2 >= 0
        assert values.max() + N / 2 <= side
    assert np.ptp(y) == pytest.approx(np.ptp(scan.position_yx_px[:, 0]))


def test_xarray_opens_the_netcdf_file(result, tmp_path):
    pytest.importorskip("h5netcdf")
    export(result, tmp_path / "a.nc", format="netcdf", pixel_size_m=PIXEL_M)
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as opened:
        found = opened.load()
    np.testing.assert_array_equal((found["object_real"] + 1j * found["object_imag"]).values, result["object"].values)
    for name in ("weight", "uncertainty", "count", "y", "x"):
        xr.testing.assert_equal(found[name], result[name].compute())
    assert json.loads(found.attrs["plan"]) == {"tile": 256}
    assert found.attrs["data_hash"] == result.attrs["data_hash"]


def test_imagej_finds_pixel_size_and_place_in_the_tiff(result, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    export(result, tmp_path / "a.tif", format="tiff", pixel_size_m=PIXEL_M)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_imagej
        assert file.series[0].axes == "CYX"
        amplitude, phase = file.asarray()
        tags, metadata = file.pages[0].tags, file.imagej_metadata
    assert amplitude.dtype.newbyteorder("=") == np.float32
    np.testing.assert_array_equal(amplitude, np.abs(result["object"].values))
    np.testing.assert_array_equal(phase, np.angle(result["object"].values))
    for tag in ("XResolution", "YResolution"):
        numerator, denominator = tags[tag].value
        # ImageJ takes pixels per unit from here; a fraction of 32-bit numbers.
        assert denominator / numerator == pytest.approx(7.0, rel=1e-6)
    assert metadata["unit"] == "nm"
    assert (metadata["yorigin"], metadata["xorigin"]) == (24, 31)
    assert metadata["Labels"] == ["amplitude", "phase"]
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(np.asarray(image), amplitude)


def test_a_tiff_that_is_too_large_for_imagejs_kind_is_an_ome_tiff(result, tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    from ptychodask.export import tiff

    monkeypatch.setattr(tiff, "PLAIN_BYTES", 1000)
    export(result, tmp_path / "a.tif", format="tiff", pixel_size_m=PIXEL_M)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_ome
        assert file.is_bigtiff
        amplitude, phase = file.asarray()
        described = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
    np.testing.assert_array_equal(amplitude, np.abs(result["object"].values))
    np.testing.assert_array_equal(phase, np.angle(result["object"].values))
    assert (described["PhysicalSizeX"], described["PhysicalSizeXUnit"]) == (7.0, "nm")
    assert described["Plane"][0]["PositionY"] == pytest.approx(-24 * 7.0)


@pytest.fixture(scope="module")
def pyramid(scan, tmp_path_factory):
    """A result of three levels, and its OME-Zarr."""
    ds = result_of(scan, shape=(600, 1027), corner=(10, -20), rows=250)
    path = tmp_path_factory.mktemp("ome") / "a.ome.zarr"
    export(ds, path, format="ome-zarr", pixel_size_m=PIXEL_M)
    return ds, path


def test_levels_of_an_ome_zarr_are_the_weighted_means_of_the_finer(pyramid):
    ds, path = pyramid
    root = zarr.open_group(path, mode="r")
    object_, weight = ds["object"].values, ds["weight"].values
    for level in ("0", "1", "2"):
        amplitude, phase = root[level][:]
        np.testing.assert_array_equal(amplitude, np.abs(object_))
        np.testing.assert_array_equal(phase, np.angle(object_))
        object_, weight = halve(object_, weight)
    assert sorted(root.array_keys()) == ["0", "1", "2"]
    assert root["2"].shape == (2, 150, 257)


def test_pixels_of_all_levels_lie_where_they_belong(pyramid):
    """The place of a coarse pixel is the mean of those of the pixels that it is made of."""
    _, path = pyramid
    (multiscale,) = zarr.open_group(path, mode="r").attrs["ome"]["multiscales"]
    for level, dataset in enumerate(multiscale["datasets"]):
        scale, translation = dataset["coordinateTransformations"]
        finest = (np.arange(2**level) + np.array([[10], [-20]])).mean(axis=1) * 7.0
        np.testing.assert_allclose(translation["translation"], [0, *finest])
        np.testing.assert_allclose(scale["scale"], [1, 7 * 2**level, 7 * 2**level])
    assert [axis.get("unit") for axis in multiscale["axes"]] == [None, "nanometer", "nanometer"]


def test_the_ome_zarr_is_valid(pyramid):
    models = pytest.importorskip("ome_zarr_models.v05.image", reason="needs the package ome-zarr-models")
    image = models.Image.from_zarr(zarr.open_group(pyramid[1], mode="r"))
    assert [dataset.path for dataset in image.attributes.ome.multiscales[0].datasets] == ["0", "1", "2"]


def test_a_figure_is_drawn(result, tmp_path):
    export(result, tmp_path / "a.png", format="png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 500


def test_a_result_on_disk_finds_its_scan_by_itself(scan, tmp_path):
    result_of(scan).ptycho.save(tmp_path / "gold.object.zarr")
    export(tmp_path / "gold.object.zarr", tmp_path / "a.npz", format="ptychopinn")
    export(open_result(tmp_path / "gold.object.zarr"), tmp_path / "b.npz", format="ptychopinn", scan=scan.store)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_one_method_of_several_is_exported(scan, tmp_path):
    several = xr.concat([result_of(scan), result_of(scan) * 2], dim="network").assign_coords(
        network=["PINN", "Baseline"]
    )
    pytest.importorskip("tifffile")
    export(several, tmp_path / "a.tif", format="tiff", network="Baseline")
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_allclose(np.asarray(image), 2 * np.abs(result_of(scan)["object"]), rtol=1e-6)
    for network, problem in ((None, "none was chosen"), ("U-Net", "not 'U-Net'")):
        with pytest.raises(PtychodaskError, match=rf"networks PINN, Baseline, but {problem}; pass network="):
            export(several, tmp_path / "b.tif", format="tiff", network=network)
    with pytest.raises(PtychodaskError, match="has only one network; leave out network='PINN'"):
        export(result_of(scan), tmp_path / "b.tif", format="tiff", network="PINN")


def test_what_a_format_needs_is_asked_for(scan, result, tmp_path):
    unknown = result.assign_attrs(store="nowhere.zarr")
    for source, name, options, message in (
        (result, "a.h5", {}, r"needs pixel_size_m, energy_ev, distance_m, .*pass pixel_size_m= \(--pixel-size-m\), "),
        (result, "a.h5", {"pixel_size_m": 1e-9, "energy_ev": 8e3}, r"needs distance_m, .*; pass distance_m="),
        (unknown, "a.h5", OPTICS, r"format ptychodus needs scan, which is not recorded; pass scan= \(--scan\)"),
        (
            scan,
            "a.tif",
            {},
            "tiff is only for results, but the source is a scan; choose one of: ptychodus, cxi, ptychop",
        ),
        (
            result,
            "a.h5",
            OPTICS | {"energy_ev": -1.0},
            r"energy_ev is -1.0, expected a positive number \(--energy-ev\)",
        ),
        (result, "a.h5", OPTICS | {"energy_ev": np.nan}, "energy_ev is nan, expected a positive number"),
        (
            result,
            "a.tif",
            {"format": "jpeg"},
            "format is 'jpeg', expected one of: ptychodus, cxi, ptychopinn, netcdf, t",
        ),
        (result, "a.png", {"format": "tiff"}, r"a.png: a file of format tiff must end in .tif or .tiff; rename it"),
        (scan, "a.npz", {"scan": scan.store}, "scan= and network= are only for a result, but the source is a scan"),
        (tmp_path / "no.zarr", "a.tif", {}, "no.zarr: no such result"),
    ):
        format = {".h5": "ptychodus", ".tif": "tiff", ".npz": "ptychopinn", ".png": "png"}[name[name.index(".") :]]
        with pytest.raises(PtychodaskError, match=message):
            export(source, tmp_path / name, **{"format": format} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantity_that_contradicts_the_recorded_one_is_refused(scan, tmp_path):
    known = result_of(scan).assign_attrs(pixel_size_m=5e-9)
    with pytest.raises(PtychodaskError, match=r"pixel_size_m=7e-09 was passed .*, but 5e-09 is recorded; leave it out"):
        export(known, tmp_path / "a.tif", format="tiff", pixel_size_m=PIXEL_M)


def test_a_scan_of_other_data_is_refused(scan, result, tmp_path):
    other = simulate(tmp_path / "b.zarr", n_pixels=N, n_patterns=20, step_px=3.0)
    with pytest.raises(
        PtychodaskError, match=rf"made from data {scan.data_hash[:12]}, .*b.zarr contains {other.data_hash[:12]}"
    ):
        export(result, tmp_path / "a.npz", format="ptychopinn", scan=other)
    replace_probe(other.store, 2 * other.probe, {})
    of_the_old_probe = result.assign_attrs(store=other.store, data_hash=other.data_hash)
    with pytest.raises(PtychodaskError, match="other patterns, positions or another probe"):
        export(of_the_old_probe, tmp_path / "a.npz", format="ptychopinn")
    assert {path.name for path in tmp_path.iterdir()} == {"b.zarr"}


def test_corrected_positions_that_are_not_there_are_told_of(result, tmp_path, told):
    export(result.assign_attrs(spec={"position_yx_px": "ab"}), tmp_path / "a.npz", format="ptychopinn")
    assert (
        "the result was made with corrected positions, which are not stored in it: exporting those of the scan" in told
    )


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_nothing_is_replaced_unasked_and_nothing_half_written(result, tmp_path, format, monkeypatch):
    suffix = FORMATS[format].suffixes[0]
    target = tmp_path / f"a{suffix}"
    export(result, target, format=format, **OPTICS)
    with pytest.raises(PtychodaskError, match=r"exists already; pass overwrite=True"):
        export(result, target, format=format, **OPTICS)
    before = contents(target)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(png, "plot", fails)
    monkeypatch.setattr(Picture, "rows", fails)
    with pytest.raises(PtychodaskError, match=r"a.* cannot be written \(No space left on device\)"):
        export(result, target, format=format, overwrite=True, **OPTICS)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert contents(target) == before
    monkeypatch.undo()
    export((2 * result).assign_attrs(result.attrs), target, format=format, overwrite=True, **OPTICS)
    assert contents(target) != before


LIMITED = """
import resource, sys
from ptychodask.export import export
from ptychodask.errors import PtychodaskError
from ptychodask.result import open_result
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
names = {"ptychodus": "a.h5", "cxi": "a.cxi", "netcdf": "a.nc", "tiff": "a.tif", "ome-zarr": "a.zarr"}
for format, name in names.items():
    try:
        export(sys.argv[1], name, format=format, pixel_size_m=1e-9, energy_ev=1e4, distance_m=1.0, progress=False)
    except PtychodaskError as error:
        print(error)
"""


def test_a_disk_that_refuses_ends_every_format_in_one_line(scan, tmp_path):
    """In a process of its own, whose files may not grow: HDF5 would crash it when it ends."""
    pytest.importorskip("resource")
    result_of(scan, shape=(700, 300), corner=(-300, -100)).ptycho.save(tmp_path / "r.zarr")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "r.zarr")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    names = ["a.h5", "a.cxi", "a.nc", "a.tif", "a.zarr"]
    assert [line.split(":")[0] for line in lines] == names
    assert all("cannot be written (File too large); nothing of it was kept" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]


def contents(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def test_a_folder_of_another_kind_is_never_replaced(result, tmp_path):
    (tmp_path / "a.tif").mkdir()
    with pytest.raises(PtychodaskError, match=r"a.tif: is a folder, expected the name of a file"):
        export(result, tmp_path / "a.tif", format="tiff", overwrite=True)
    zarr.create_group(tmp_path / "a.ome.zarr", attributes={"ome": {"version": "0.5"}})
    with pytest.raises(PtychodaskError, match="replaces only a ptychodask-ome-zarr"):
        export(result, tmp_path / "a.ome.zarr", format="ome-zarr", overwrite=True)
    assert recorded_folder_format(tmp_path / "a.ome.zarr") is None
    with pytest.raises(PtychodaskError, match=r"its folder .*none does not exist; make it first"):
        export(result, tmp_path / "none" / "a.tif", format="tiff")


def test_what_is_no_whole_result_is_refused(scan, result, tmp_path):
    (tmp_path / "file.zarr").write_text("no store")
    zarr.create_group(tmp_path / "other.zarr")
    (tmp_path / "a.model").mkdir()
    (tmp_path / "a.model" / "model.json").write_text('{"format": "ptychodask-model"}')
    for source, message in (
        (result.isel(x=slice(None, None, 2)), "pixels along x are not consecutive"),
        (result.drop_vars("object"), r"has no object \(y, x\)"),
        (tmp_path / "file.zarr", "file.zarr: is neither a scan nor a result of ptychodask"),
        (tmp_path / "a.model", r"a.model: is a ptychodask-model; pass the folder of a scan or of a result"),
        (tmp_path / "other.zarr", "other.zarr: "),
    ):
        with pytest.raises(PtychodaskError, match=message):
            export(source, tmp_path / "a.tif", format="tiff")
    assert not (tmp_path / "a.tif").exists()


def test_a_missing_package_is_named(result, tmp_path, monkeypatch):
    import builtins

    importing = builtins.__import__

    def without(name, *rest):
        if name == "tifffile":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *rest)

    monkeypatch.delitem(__import__("sys").modules, "ptychodask.export.tiff", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        PtychodaskError, match="format tiff needs the package tifffile; install ptychodask with its extra"
    ):
        export(result, tmp_path / "a.tif", format="tiff")


def test_a_stage_says_what_it_wrote(result, tmp_path, told, caplog):
    caplog.set_level(logging.INFO, "ptychodask")
    export(result, tmp_path / "a.npz", format="ptychopinn")
    assert any(line.endswith("a.npz: wrote ptychopinn") for line in told)
