"""Files of other programs become scans with the same patterns at the same places, or one clear line says why not."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from foreign_files import (
    DETECTOR_PIXEL_M,
    DISTANCE_M,
    ENERGY_EV,
    measured,
    write_cxi,
    write_hxn,
    write_nexus,
    write_pair,
    write_patterns,
    write_product,
    write_product_npz,
)
from models_for_tests import LinearModel

from ptychodask import inspect_file
from ptychodask.errors import PtychodaskError
from ptychodask.export import export
from ptychodask.inspection.findings import Inspection
from ptychodask.io import hdf5_stream, ingest
from ptychodask.io.near_field import near_field, shadow_of
from ptychodask.io.recipe import read_options
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

POSITION_M = 1e-9
"""Tolerance of positions: a hundredth of the smallest pixel in use."""


@pytest.fixture(scope="module")
def of():
    return measured()


def ingested(path, tmp_path, **options):
    return ingest(path, tmp_path / "scan.zarr", progress=False, overwrite=True, **options)


def in_file_order(scan):
    """Patterns and positions (metres) by their rows in the file."""
    order = np.argsort(scan.source_index)
    return scan.diffraction[order], scan.position_yx_px[order] * scan.pixel_size_m


def product_and_patterns(folder, of):
    write_patterns(folder / "diffraction.h5", of)
    return write_product(folder / "product-in.h5", of)


def product_npz(folder, of):
    write_patterns(folder / "patterns.npz", of)
    return write_product_npz(folder / "product.npz", of)


FILES = {
    "product": product_and_patterns,
    "product npz": product_npz,
    "pair": write_pair,
    "cxi": lambda folder, of: write_cxi(folder / "scan.cxi", of),
    "nexus": lambda folder, of: write_nexus(folder / "scan.nxs", of),
    "nexus raster": lambda folder, of: write_nexus(folder / "scan.nxs", of, raster=(4, 6)),
    "nexus linked": lambda folder, of: write_nexus(folder / "scan.nxs", of, link=folder / "frames.h5", units="nm"),
    "hxn": lambda folder, of: write_hxn(folder / "scan.h5", of),
}


@pytest.mark.parametrize("kind", FILES)
def test_patterns_and_positions_come_through(tmp_path, of, kind):
    scan = ingested(FILES[kind](tmp_path, of), tmp_path)
    patterns, position_m = in_file_order(scan)
    counts = patterns if scan.domain == "counts" else np.square(patterns)
    np.testing.assert_allclose(counts, of.patterns, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(position_m, of.position_yx_m, rtol=0, atol=POSITION_M)
    assert scan.pixel_size_m == pytest.approx(of.pixel_m, rel=1e-6)
    assert scan.energy_ev == pytest.approx(ENERGY_EV, rel=1e-6)
    assert scan.distance_m == pytest.approx(DISTANCE_M)


@pytest.mark.parametrize("kind", ["product", "product npz", "pair", "cxi"])
def test_the_probe_comes_through_up_to_its_scale(tmp_path, of, kind):
    scan = ingested(FILES[kind](tmp_path, of), tmp_path)
    scale = np.abs(scan.probe).max() / np.abs(of.probe).max()
    np.testing.assert_allclose(scan.probe, of.probe * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["product", "cxi"])
def test_bad_pixels_are_those_of_the_file(tmp_path, of, kind):
    np.testing.assert_array_equal(ingested(FILES[kind](tmp_path, of), tmp_path).mask, of.mask)


@pytest.mark.parametrize("kind", FILES)
def test_inspect_proposes_an_ingest_that_works(tmp_path, of, kind):
    path = FILES[kind](tmp_path, of)
    found = inspect_file(path)
    assert isinstance(found, Inspection)
    assert found.refused == []
    assert ingested(path, tmp_path, **found.options).n_patterns == len(of.patterns)


def test_a_pair_is_found_from_either_of_its_files(tmp_path, of):
    para = write_pair(tmp_path, of)
    of_para = ingested(para, tmp_path).data_hash
    assert ingested(tmp_path / "scan1_dp.hdf5", tmp_path, format="ptychodus").data_hash == of_para


def test_both_files_of_a_pair_are_recorded(tmp_path, of):
    noted = ingested(write_pair(tmp_path, of), tmp_path).attributes["provenance"]
    assert noted["second_source"].endswith("scan1_dp.hdf5")
    assert len(noted["second_sha256"]) == 64


def test_a_product_goes_out_and_comes_in_again(tmp_path, of):
    scan = ingested(product_and_patterns(tmp_path, of), tmp_path)
    # Any object does: it is placed around the scan, and the positions beside it are what counts.
    result = reconstruct(tmp_path / "scan.zarr", LinearModel(), progress=False)
    export(result, tmp_path / "out_para.h5", format="ptychodus", scan=tmp_path / "scan.zarr")
    export(scan, tmp_path / "out_dp.h5", format="ptychodus")
    again = ingest(tmp_path / "out_para.h5", tmp_path / "again.zarr", progress=False)
    np.testing.assert_allclose(
        again.position_yx_px * again.pixel_size_m, scan.position_yx_px * scan.pixel_size_m, rtol=0, atol=POSITION_M
    )
    np.testing.assert_array_equal(again.diffraction[:], scan.diffraction[:])


def test_a_scan_goes_out_as_cxi_and_comes_in_again(tmp_path, of):
    scan = ingested(product_and_patterns(tmp_path, of), tmp_path)
    export(scan, tmp_path / "out.cxi", format="cxi")
    again = ingest(tmp_path / "out.cxi", tmp_path / "again.zarr", progress=False)
    np.testing.assert_allclose(
        again.position_yx_px * again.pixel_size_m, scan.position_yx_px * scan.pixel_size_m, rtol=0, atol=POSITION_M
    )
    np.testing.assert_array_equal(again.diffraction[:], scan.diffraction[:])
    np.testing.assert_array_equal(again.mask, scan.mask)


def test_patterns_are_paired_by_index_and_others_left_out(tmp_path, of, caplog):
    # The file of patterns has them backwards; positions 20..23 have no pattern, and pattern 99 no position.
    indexes = [99, *range(19, 0, -1)]
    shuffled = measured()
    rows = np.array([0, *range(19, 0, -1)])
    object.__setattr__(shuffled, "patterns", of.patterns[rows])
    write_patterns(tmp_path / "diffraction.h5", shuffled, indexes)
    with caplog.at_level("WARNING"):
        scan = ingested(write_product(tmp_path / "product.h5", of), tmp_path)
    assert "1 of 20 patterns have no position and 5 of 24 positions no pattern" in caplog.text
    patterns, position_m = in_file_order(scan)
    np.testing.assert_array_equal(patterns, of.patterns[rows[1:]])
    np.testing.assert_allclose(position_m, of.position_yx_m[rows[1:]], rtol=0, atol=POSITION_M)


def test_a_detector_that_is_turned_turns_positions(tmp_path, of):
    # Rows along +x, columns along -y of the laboratory: the probe is at minus the sample's translation.
    path = write_cxi(tmp_path / "scan.cxi", of, basis=np.array([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]) * 55e-6)
    _, position_m = in_file_order(ingested(path, tmp_path))
    expected = np.stack([-of.position_yx_m[:, 1], of.position_yx_m[:, 0]], axis=1)
    np.testing.assert_allclose(position_m, expected, rtol=0, atol=POSITION_M)


def test_a_virtual_raster_over_several_files_is_read(tmp_path, of):
    path = write_nexus(tmp_path / "scan.nxs", of, raster=(4, 6))
    shape = (4, 6, *of.patterns.shape[1:])
    layout = h5py.VirtualLayout(shape, of.patterns.dtype)
    for row in range(4):
        with h5py.File(tmp_path / f"row_{row}.h5", "w") as part:
            part["data"] = of.patterns[6 * row : 6 * row + 6]
        layout[row] = h5py.VirtualSource(f"row_{row}.h5", "data", shape[1:])
    with h5py.File(path, "r+") as file:
        del file["entry_1/instrument_1/detector_1/data"]
        file["entry_1/instrument_1/detector_1"].create_virtual_dataset("data", layout)
    patterns, _ = in_file_order(ingested(path, tmp_path))
    np.testing.assert_array_equal(patterns, of.patterns)
    (tmp_path / "row_2.h5").unlink()
    with pytest.raises(
        PtychodaskError, match=r"is a virtual dataset, and 1 of its source files are missing, for example 'row_2\.h5'"
    ):
        ingested(path, tmp_path)


@pytest.mark.parametrize("chunks", [None, (1, 1, 16, 16), (2, 3, 16, 16), (1, 4, 16, 16)])
def test_a_raster_is_read_row_after_row_however_it_is_chunked(tmp_path, of, chunks):
    path = write_nexus(tmp_path / "scan.nxs", of)
    with h5py.File(path, "r+") as file:
        del file["entry_1/instrument_1/detector_1/data"]
        raster = of.patterns.reshape(4, 6, 16, 16)
        file["entry_1/instrument_1/detector_1"].create_dataset("data", data=raster, chunks=chunks)
    patterns, _ = in_file_order(ingested(path, tmp_path))
    np.testing.assert_array_equal(patterns, of.patterns)


def test_axes_of_a_raster_give_its_positions(tmp_path, of):
    path = write_nexus(tmp_path / "scan.nxs", of, raster=(4, 6))
    with h5py.File(path, "r+") as file:
        del file["entry_1/data_1/translation"], file["entry_1/instrument_1/detector_1/translation"]
        for name, values in (("x", np.arange(4) * 0.1), ("y", np.arange(6) * 0.2)):
            file[f"entry_1/sample_1/transformations/{name}"] = values
            file[f"entry_1/sample_1/transformations/{name}"].attrs["units"] = "um"
    _, position_m = in_file_order(ingested(path, tmp_path))
    x, y = np.meshgrid(np.arange(4) * 1e-7, np.arange(6) * 2e-7, indexing="ij")
    np.testing.assert_allclose(position_m, np.stack([y.ravel(), x.ravel()], axis=1), rtol=0, atol=POSITION_M)


@pytest.mark.parametrize("name", ["Bitshuffle", "LZ4", "Zstd"])
def test_compressed_detectors_are_read(tmp_path, of, name):
    hdf5plugin = pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: pip install 'ptychodask[detectors]'")
    path = write_cxi(tmp_path / "scan.cxi", of)
    with h5py.File(path, "r+") as file:
        detector = file["entry_1/instrument_1/detector_1"]
        del detector["data"]
        detector.create_dataset("data", data=of.patterns, chunks=(1, 16, 16), **getattr(hdf5plugin, name)())
    patterns, _ = in_file_order(ingested(path, tmp_path))
    np.testing.assert_array_equal(patterns, of.patterns)


def test_a_missing_filter_is_named(tmp_path, of, monkeypatch):
    hdf5plugin = pytest.importorskip("hdf5plugin", reason="needs hdf5plugin: pip install 'ptychodask[detectors]'")
    path = write_cxi(tmp_path / "scan.cxi", of)
    with h5py.File(path, "r+") as file:
        detector = file["entry_1/instrument_1/detector_1"]
        del detector["data"]
        detector.create_dataset("data", data=of.patterns, chunks=(1, 16, 16), **hdf5plugin.Bitshuffle())
    monkeypatch.setattr(hdf5_stream.h5py.h5z, "filter_avail", lambda number: number != hdf5plugin.BSHUF_ID)
    with pytest.raises(
        PtychodaskError, match=r"HDF5 filter bitshuffle \(bslz4\), number 32008, which is not installed"
    ):
        ingested(path, tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"energy": ENERGY_EV},
            r"energy\]: is 8800 J, expected a photon energy of 1 to 1e\+07 eV, so its unit is wrong; pass energy_ev=",
        ),
        ({"x_pixel_size": 75.0}, r"x_pixel_size\]: is 75 m, expected a detector pixel.*pass detector_pixel_m="),
        ({"distance": -1.0}, r"distance\]: is -1\.0, expected one positive number, the detector distance"),
    ],
)
def test_numbers_of_another_unit_are_refused_and_can_be_said(tmp_path, of, changed, told):
    path = write_cxi(tmp_path / "scan.cxi", of, **changed)
    with pytest.raises(PtychodaskError, match=told):
        ingested(path, tmp_path)
    said = {"energy_ev": ENERGY_EV, "detector_pixel_m": DETECTOR_PIXEL_M, "distance_m": DISTANCE_M}
    assert ingested(path, tmp_path, **said).pixel_size_m == pytest.approx(of.pixel_m)


def test_positions_in_micrometres_are_no_metres(tmp_path, of):
    path = write_cxi(tmp_path / "scan.cxi", of)
    with h5py.File(path, "r+") as file:
        file["entry_1/sample_1/geometry_1/translation"][...] *= 1e6
    with pytest.raises(PtychodaskError, match=r"positions span 0\.\d+ m, .*so their unit is not metres"):
        ingested(path, tmp_path)
    _, position_m = in_file_order(ingested(path, tmp_path, units="um"))
    np.testing.assert_allclose(position_m, of.position_yx_m, rtol=0, atol=POSITION_M)


def without(path, *names):
    with h5py.File(path, "r+") as file:
        for name in names:
            del file[name]
    return path


def with_units(path, name, unit):
    with h5py.File(path, "r+") as file:
        if unit is None:
            del file[name].attrs["units"]
        else:
            file[name].attrs["units"] = unit
    return path


def turned(path, name):
    with h5py.File(path, "r+") as file:
        values = file[name][...].T
        del file[name]
        file[name] = values
    return path


DETECTOR = "entry_1/instrument_1/detector_1"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda f, of: write_product(f / "p.h5", of),
            r"contains only positions and probe, .*no diffraction\.h5.* as diffraction= \(--diffraction\)",
        ),
        (lambda f, of: write_patterns(f / "d.h5", of), r"contains only patterns; ingest the product"),
        (
            lambda f, of: (write_patterns(f / "diffraction.h5", of, range(100, 124)), write_product(f / "p.h5", of))[1],
            r"its indexes 100\.\.123 match none of .*, which are 0\.\.23",
        ),
        (
            lambda f, of: (
                write_patterns(f / "diffraction.h5", of),
                write_product(f / "p.h5", of, [0, 0, 1, 1, *range(2, 22)]),
            )[1],
            r"2 indexes are repeated, for example 0, 1; expected distinct indexes of the positions",
        ),
        (
            lambda f, of: (
                write_patterns(f / "diffraction.h5", of),
                write_product(f / "p.h5", of, probe_energy_eV=8.8e9),
            )[1],
            r"probe_energy_eV is 8\.8e\+09, expected a photon energy of 1 to 1e\+07 eV; pass energy_ev=",
        ),
        (
            lambda f, of: with_units(write_nexus(f / "n.nxs", of), f"{DETECTOR}/distance", None),
            r"has no unit.*--distance-m",
        ),
        (
            lambda f, of: with_units(write_nexus(f / "n.nxs", of), f"{DETECTOR}/translation", "furlong"),
            r"unit 'furlong', exp",
        ),
        (
            lambda f, of: turned(write_nexus(f / "n.nxs", of), f"{DETECTOR}/translation"),
            r"shape \(3, 24\).*\(pattern, 3\)",
        ),
        (lambda f, of: turned(write_cxi(f / "c.cxi", of), "entry_1/sample_1/geometry_1/translation"), r"\(3, 24\)"),
        (
            lambda f, of: turned(write_hxn(f / "h.h5", of), "points"),
            r"points\]: has shape \(24, 2\).*expected numbers \(2, pattern\)",
        ),
        (
            lambda f, of: without(write_cxi(f / "c.cxi", of), f"{DETECTOR}/data"),
            r"known format|is a link to|is missing",
        ),
        (
            lambda f, of: write_cxi(f / "c.cxi", of, basis=np.ones((2, 2))),
            r"basis_vectors\]: has shape \(2, 2\), expected \(3, 2\)",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, of, make, told):
    path = make(tmp_path, of)
    with pytest.raises(PtychodaskError, match=told) as caught:
        ingested(path, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scan.zarr").exists()


def test_a_link_that_leads_nowhere_names_the_file(tmp_path, of):
    path = write_nexus(tmp_path / "scan.nxs", of, link=tmp_path / "frames.h5")
    (tmp_path / "frames.h5").unlink()
    with pytest.raises(PtychodaskError, match=r"is a link to '/frames' in the file 'frames\.h5', which does not exist"):
        ingested(path, tmp_path)


def test_an_option_that_a_format_fixes_is_refused(tmp_path, of):
    with pytest.raises(PtychodaskError, match=r"domain does not apply to format 'cxi', which defines it"):
        ingested(write_cxi(tmp_path / "scan.cxi", of), tmp_path, domain="amplitude")
    with pytest.raises(PtychodaskError, match=r"diffraction does not apply to format 'cxi'"):
        ingested(tmp_path / "scan.cxi", tmp_path, diffraction=tmp_path / "other.h5")
    with pytest.raises(PtychodaskError, match=r"is a length, but units='px'; pass units='um' or units='m'"):
        ingested(tmp_path / "scan.cxi", tmp_path, units="px")


def test_options_of_a_file_are_those_of_the_call(tmp_path, of):
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["dp"], file["y"], file["x"] = of.patterns, *of.position_yx_m.T
    recipe = tmp_path / "raw.yaml"
    recipe.write_text(
        "keys: {diffraction: dp, y: y, x: x}\ndomain: counts\nunits: m\npixel_size_m: 2.0e-8\n"
        "centre: [8, 8]\naffine: [0, 1, -1, 0]\n"
    )
    by_file = ingested(path, tmp_path, recipe=recipe)
    assert by_file.data_hash == ingested(path, tmp_path, **read_options(recipe)).data_hash
    assert ingested(path, tmp_path, recipe=recipe, pixel_size_m=1e-8).pixel_size_m == 1e-8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("domian: counts", r"ingest has no option 'domian'; the options are: affine"),
        ("- domain", r"contains no options, expected lines of NAME: VALUE"),
        ("{", r"is not valid YAML"),
        ("domain: !!python/object/apply:os.system [true]", r"is not valid YAML \(could not determine a constructor"),
        ("affine: [1, 2]", r"affine is \(1, 2\), expected four numbers"),
        ("n_pixels: much", r"n_pixels is 'much'"),
    ],
)
def test_a_wrong_file_of_options_is_one_line(tmp_path, of, text, told):
    (tmp_path / "raw.yaml").write_text(text)
    with pytest.raises(PtychodaskError, match=told):
        ingested(write_cxi(tmp_path / "scan.cxi", of), tmp_path, recipe=tmp_path / "raw.yaml")


def shadows(n_patterns=80, n_pixels=64, magnified=0.2, seed=0):
    """A sample's shadow on a lit disc, that moves by `magnified` pixels for each object pixel."""
    rng = np.random.default_rng(seed)
    size = 512
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    sample = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * np.exp(-((frequency / 0.1) ** 2))).real
    sample = 1 + 0.3 * sample / sample.std()
    position = rng.uniform(0, (size - n_pixels) / magnified, (n_patterns, 2)) * 0.2
    y, x = np.indices((n_pixels, n_pixels)) - n_pixels // 2
    lit = np.hypot(y, x) < 24
    corners = np.rint(position * magnified).astype(int)
    frames = [sample[r : r + n_pixels, c : c + n_pixels] * lit * 500 for r, c in corners]
    return rng.poisson(np.maximum(frames, 0)), position


def test_shadows_that_move_with_the_probe_are_measured():
    patterns, position = shadows(magnified=0.2)
    shadow = shadow_of(patterns, position, "counts")
    assert shadow.slope == pytest.approx(0.2, rel=0.2)
    assert shadow.width_px == pytest.approx(48 / 0.2, rel=0.25)
    assert "near field" in near_field(patterns, position, 64, "counts")


@pytest.mark.parametrize("object_", ["lines", "star", "field"])
@pytest.mark.parametrize("probe", ["disc", "zone_plate"])
def test_far_field_patterns_are_none(tmp_path, object_, probe):
    scan = simulate(tmp_path / "s.zarr", object=object_, probe=probe, n_patterns=150, step_px=6.0, progress=False)
    assert near_field(scan.diffraction, scan.position_yx_px, scan.n_pixels, scan.domain) is None


def test_near_field_patterns_are_refused_unless_asked_for(tmp_path):
    patterns, position = shadows()
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["dp"], file["y"], file["x"] = patterns.astype(np.uint16), *position.T
    options = {"keys": {"diffraction": "dp", "y": "y", "x": "x"}, "domain": "counts", "units": "px"}
    with pytest.raises(PtychodaskError, match=r"shadows of the sample \(near field\).*far_field=True"):
        ingested(path, tmp_path, **options)
    assert any("near field" in reason for reason in inspect_file(path, **options).refused)
    assert ingested(path, tmp_path, **options, far_field=True).n_patterns == len(patterns)


def test_the_near_field_scan_of_petra_is_refused(tmp_path, shared):
    path = shared / "data" / "PETRAIII_P25_Near_Field_Ptycho.cxi"
    with pytest.raises(PtychodaskError, match=r"shadows of the sample \(near field\)"):
        ingested(path, tmp_path)
    scan = ingested(path, tmp_path, far_field=True)
    assert scan.pixel_size_m == pytest.approx(1.9946e-8, rel=1e-3)
    assert (scan.n_patterns, scan.n_pixels) == (200, 100)


@pytest.mark.parametrize("name", ["siemens-star-small.npz.bz2", "lines64_train.npz"])
def test_the_far_field_scans_are_taken(tmp_path, shared, name):
    scan = ingested(shared / "data" / name, tmp_path)
    assert open_scan(tmp_path / "scan.zarr").data_hash == scan.data_hash


def test_memory_does_not_grow_with_a_compressed_file(tmp_path):
    """A child process ingests a file of 256 MB, in chunks of several frames, with a few blocks in memory."""
    import subprocess
    import sys

    path = tmp_path / "large.h5"
    rng = np.random.default_rng(0)
    frame = rng.poisson(3, (64, 128, 128)).astype(np.uint16)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("dp", (8192, 128, 128), np.uint16, chunks=(16, 128, 128), compression="lzf")
        for start in range(0, 8192, 64):
            data[start : start + 64] = frame
        file["y"], file["x"] = rng.uniform(0, 3000, (2, 8192))
    code = f"""
import resource, sys
from ptychodask.io import ingest
ingest({str(path)!r}, {str(tmp_path / "small.zarr")!r}, keys=dict(diffraction="dp", y="y", x="x"), domain="counts",
       units="px", drop_frames=[slice(64, 8192)], progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ingest({str(path)!r}, {str(tmp_path / "large.zarr")!r}, keys=dict(diffraction="dp", y="y", x="x"), domain="counts",
       units="px", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown_kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    # The store's shards in flight and the file's blocks; a quarter of the file at the most.
    assert grown_kib < 64 * 1024 * 4
