"""Values that are no counts, units by any name, optics, and quantities that are wrong by a factor."""

from __future__ import annotations

import logging

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.inspection import inspect_file
from ptychodask.io import ingest
from ptychodask.io.geometry import wavelength_m_of
from ptychodask.io.pixel_values import no_counts
from ptychodask.io.units import factor_of, position_unit, unit_text
from ptychodask.iterative import refine_probe
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

N = 32
OPTICS = {"energy_ev": 8000.0, "distance_m": 2.0, "detector_pixel_m": 75e-6}
PIXEL_M = wavelength_m_of(8000.0, None) * 2.0 / (N * 75e-6)
KEYS = {"diffraction": "dp", "y": "y", "x": "x", "probe": "probe"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A simulated scan: counts, positions in pixels, probe."""
    path = tmp_path_factory.mktemp("numbers") / "scan.zarr"
    return simulate(path, object="star", probe="zone_plate", n_pixels=N, n_patterns=90, dose=1e5, step_px=3.0)


def written(path, scan, *, dtype="u4", unit=None, scale=1.0, **arrays):
    """An HDF5 file of a scan, with positions times `scale`."""
    content = {
        "dp": scan.diffraction[:].astype(dtype),
        "y": scan.position_yx_px[:, 0] * scale,
        "x": scan.position_yx_px[:, 1] * scale,
        "probe": scan.probe,
    } | arrays
    with h5py.File(path, "w") as file:
        for name, values in content.items():
            if values is not None:
                file[name] = values
        for name in ("y", "x"):
            if unit is not None:
                file[name].attrs["units"] = unit
    return path


def read(path, store, **options):
    return ingest(path, store, **{"keys": KEYS, "domain": "counts", "units": "px", "progress": False} | options)


# Quantities that are wrong by a factor

EXPONENTS = [k for k in range(-6, 7) if k]


@pytest.mark.parametrize("probe", ["file", "estimate"])
@pytest.mark.parametrize("quantity", ["position", "energy_ev", "distance_m", "detector_pixel_m", "pixel_size_m"])
def test_a_quantity_wrong_by_a_factor_is_refused_or_warned_of(scan, tmp_path, caplog, quantity, probe):
    path = written(tmp_path / "scan.h5", scan, scale=PIXEL_M, unit="m")
    accepted = []
    for k in EXPONENTS:
        options = {"pixel_size_m": PIXEL_M} if quantity == "pixel_size_m" else dict(OPTICS)
        if quantity == "position":
            options["affine"] = (10.0**k, 0.0, 0.0, 10.0**k)
        else:
            options[quantity] = options[quantity] * 10.0**k
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                read(path, tmp_path / "scan.zarr", units=None, probe=probe, overwrite=True, **options)
        except PtychodaskError as refusal:
            lines = str(refusal).splitlines()
        else:
            lines = [record.message for record in caplog.records]
            if not any("wrong" in line or "unlikely" in line for line in lines):
                accepted.append(k)
            continue
        assert len(lines) == 1
    assert not accepted


@pytest.mark.parametrize("probe", ["file", "estimate"])
def test_right_quantities_are_not_warned_of(scan, tmp_path, caplog, probe):
    path = written(tmp_path / "scan.h5", scan, scale=PIXEL_M, unit="m")
    with caplog.at_level(logging.WARNING):
        read(path, tmp_path / "scan.zarr", units=None, probe=probe, **OPTICS)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("factor", [1e-3, 1e-2])
def test_no_probe_is_stored_that_was_fitted_to_positions_in_a_wrong_unit(scan, tmp_path, factor):
    path = written(tmp_path / "scan.h5", scan, scale=factor)
    read(path, tmp_path / "scan.zarr", probe="estimate")
    before = open_scan(tmp_path / "scan.zarr").probe
    refined = refine_probe(tmp_path / "scan.zarr", n_sweeps=6, progress=False)
    assert not refined.stored
    assert refined.problem
    np.testing.assert_array_equal(open_scan(tmp_path / "scan.zarr").probe, before)


def test_a_probe_refined_on_right_positions_is_stored(scan, tmp_path):
    read(written(tmp_path / "scan.h5", scan), tmp_path / "scan.zarr", probe="estimate")
    refined = refine_probe(tmp_path / "scan.zarr", n_sweeps=8, search_defocus=True, progress=False)
    assert refined.stored
    assert refined.problem is None
    assert refined.r_after < refined.r_uniform


# Values that are no counts


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("u2", 65535), ("u4", 2**32 - 1), ("i4", 2**31 - 1), ("i8", 2**32 - 1), ("f4", 2**32 - 1), ("f8", 2**32 - 1)],
)
@pytest.mark.parametrize("frames", [slice(None), [5, 60]])
def test_the_largest_value_of_a_type_is_refused_masked_or_kept(scan, tmp_path, dtype, value, frames):
    counts = scan.diffraction[:].astype(dtype)
    counts[frames, 20, 7] = value
    path = written(tmp_path / "scan.h5", scan, dp=counts)
    with pytest.raises(PtychodaskError, match=r"1 pixels hold \d+, the largest.*saturated='mask'"):
        read(path, tmp_path / "refused.zarr")
    masked = read(path, tmp_path / "masked.zarr", saturated="mask")
    assert np.argwhere(~masked.mask).tolist() == [[20, 7]]
    assert masked.diffraction[:].max() < 1e6
    if dtype == "i8":
        with pytest.raises(PtychodaskError, match=r"do not fit int32; mark those pixels bad"):
            read(path, tmp_path / "kept.zarr", saturated="keep")
    else:
        assert read(path, tmp_path / "kept.zarr", saturated="keep").diffraction[:].max() >= 65535
    inspection = inspect_file(path)
    if frames == slice(None):
        assert inspection.options["saturated"] == "mask"
        assert "amplitude" not in str(inspection)


def test_negative_flags_are_masked_and_negative_noise_is_set_to_zero(scan, tmp_path):
    counts = scan.diffraction[:].astype("i4")
    counts[:, 3, 4], counts[:, 5, 6] = -1, -2
    path = written(tmp_path / "flags.h5", scan, dp=counts)
    with pytest.raises(PtychodaskError, match=r"negative counts.*floor=0.*saturated='mask'"):
        read(path, tmp_path / "refused.zarr")
    assert inspect_file(path).options["saturated"] == "mask"
    assert (~read(path, tmp_path / "masked.zarr", saturated="mask").mask).sum() == 2
    noise = scan.diffraction[:] + np.random.default_rng(0).normal(0, 0.4, scan.diffraction.shape)
    path = written(tmp_path / "noise.h5", scan, dp=noise.astype("f4"))
    assert inspect_file(path).options["floor"] == 0
    clipped = read(path, tmp_path / "clipped.zarr", floor=0.0)
    assert clipped.mask is None
    assert clipped.diffraction[:].min() == 0


def test_a_masked_pixel_may_hold_anything_and_bins_leave_it_out(scan, tmp_path):
    counts, bad = scan.diffraction[:].astype("u4"), np.zeros((N, N), "u4")
    counts[:, 8], bad[8] = 2**32 - 1, 1
    path = written(tmp_path / "scan.h5", scan, dp=counts, pixel_mask=bad)
    inspection = inspect_file(path)
    assert inspection.options["keys"]["mask_bad"] == "pixel_mask"
    binned = read(path, tmp_path / "scan.zarr", keys=KEYS | {"mask_bad": "pixel_mask"}, bin=2)
    assert not binned.mask[4].any()
    assert binned.mask.sum() == 15 * 16


def test_values_below_the_largest_are_counts():
    assert not no_counts(np.array([[[0, 65534]]], "u2")).any()
    assert not no_counts(np.array([[[65535]]], "u4")).any()
    assert no_counts(np.array([[[-1, 3]]], "i2"), negative=True).tolist() == [[[True, False]]]
    assert not no_counts(np.array([[[True]]])).any()


# Units and optics


@pytest.mark.parametrize(
    ("name", "metres"),
    [
        ("m", 1.0), ("metre", 1.0), ("Meters", 1.0), ("cm", 1e-2), ("mm", 1e-3), ("MM", 1e-3), ("millimetre", 1e-3),
        ("um", 1e-6), ("µm", 1e-6), ("μm", 1e-6), ("micron", 1e-6), ("micrometer", 1e-6), ("nm", 1e-9),
        ("nanometers", 1e-9), ("pm", 1e-12), ("Å", 1e-10), ("angstroms", 1e-10), ("Ångström", 1e-10),
        ("1e-6 m", 1e-6), ("10^-9 m", 1e-9), ("0.1 nm", 1e-10), ("s", None), ("deg", None), ("eV", None), ("", None),
    ],
)  # fmt: skip
def test_lengths_by_any_name(name, metres):
    found = factor_of(name, "m")
    assert found == (None if metres is None else pytest.approx(metres, rel=1e-12))


@pytest.mark.parametrize(
    ("name", "ev"),
    [("eV", 1.0), ("keV", 1e3), ("KEV", 1e3), ("MeV", 1e6), ("meV", 1e-3), ("J", 6.241509e18), ("fJ", 6241.509),
     ("joules", 6.241509e18), ("kiloelectronvolt", 1e3), ("kV", 1e3), ("m", None)],
)  # fmt: skip
def test_energies_by_any_name(name, ev):
    assert factor_of(name, "eV") == (None if ev is None else pytest.approx(ev, rel=1e-6))


def test_units_are_read_from_attributes_of_any_shape():
    for value in (b"um", "um", np.bytes_(b"um"), np.array(b"um"), np.array([b"um"]), np.array([["um", "um"]], object)):
        assert unit_text(value) == "um"
    assert unit_text(np.array([], "S2")) is None
    assert position_unit(unit_text(np.array([b"um", b"mm"]))) is None


@pytest.mark.parametrize(
    ("unit", "metres"), [("mm", 1e-3), ("nm", 1e-9), ("micrometer", 1e-6), (np.array([b"um"]), 1e-6), ("Å", 1e-10)]
)
def test_positions_are_read_in_the_unit_that_the_file_notes(scan, tmp_path, unit, metres):
    path = written(tmp_path / "scan.h5", scan, scale=PIXEL_M / metres, unit=unit)
    stored = read(path, tmp_path / "scan.zarr", units=None, pixel_size_m=PIXEL_M)
    apart = np.ptp(stored.position_yx_px, axis=0)
    np.testing.assert_allclose(apart, np.ptp(scan.position_yx_px, axis=0), rtol=1e-6)
    assert "noted" in next(f.certainty for f in inspect_file(path, pixel_size_m=PIXEL_M).findings if f.topic == "units")


def test_axes_in_two_units_and_a_unit_that_is_no_length_are_refused(scan, tmp_path):
    path = written(tmp_path / "scan.h5", scan, unit="deg")
    assert "'deg', which is no length" in " ".join(inspect_file(path).refused)
    with pytest.raises(PtychodaskError, match=r"positions 'y' is deg.*pass units="):
        read(path, tmp_path / "scan.zarr", units=None)
    with h5py.File(path, "r+") as file:
        file["y"].attrs["units"], file["x"].attrs["units"] = "mm", "um"
    with pytest.raises(PtychodaskError, match="'y' in mm, 'x' in um, expected one unit"):
        read(path, tmp_path / "scan.zarr", units=None)


def test_another_unit_than_the_noted_one_is_warned_of(scan, tmp_path, caplog):
    path = written(tmp_path / "scan.h5", scan, unit="mm", scale=PIXEL_M * 1e6)
    read(path, tmp_path / "scan.zarr", units="um", pixel_size_m=PIXEL_M)
    assert "'y' is in mm by the file, but is read in um" in caplog.text


def test_the_number_of_pixels_is_no_pixel_size(scan, tmp_path):
    path = written(
        tmp_path / "scan.h5",
        scan,
        **{"d/x_pixels_in_detector": 487, "d/x_pixel_size": 1.72e-4, "d/detector_distance": 2.0, "b/energy": 8000.0},
    )
    assert inspect_file(path).options["detector_pixel_m"] == 1.72e-4


def test_electrons_have_the_relativistic_wavelength(scan, tmp_path, caplog):
    assert wavelength_m_of(300e3, "electron") == pytest.approx(1.96875e-12, rel=1e-4)
    assert wavelength_m_of(80e3, "electron") == pytest.approx(4.1757e-12, rel=1e-4)
    optics = {"energy_ev": 300e3, "distance_m": 1.0, "detector_pixel_m": 1e-4}
    pixel = wavelength_m_of(300e3, "electron") / (N * 1e-4)
    path = written(tmp_path / "scan.h5", scan, scale=pixel, unit="m", **{"beam/voltage_kV": 300.0})
    options = inspect_file(path, distance_m=1.0, detector_pixel_m=1e-4).options
    assert (options["particle"], options["energy_ev"]) == ("electron", 300e3)
    stored = read(path, tmp_path / "e.zarr", units=None, particle="electron", **optics)
    assert stored.pixel_size_m == pytest.approx(pixel)
    assert "electron" not in caplog.text
    read(path, tmp_path / "p.zarr", units=None, **optics)
    assert "taken as that of photons; pass particle='electron'" in caplog.text


def test_pixels_that_are_not_square_scale_the_positions(scan, tmp_path):
    y, x = scan.position_yx_px.T
    path = written(
        tmp_path / "scan.h5",
        scan,
        y=y * PIXEL_M / 2,
        x=x * PIXEL_M,
        unit="m",
        **{"d/x_pixel_size": 75e-6, "d/y_pixel_size": 150e-6, "d/detector_distance": 2.0, "b/energy": 8000.0},
    )
    options = inspect_file(path).options
    assert options["affine"] == (2.0, 0.0, 0.0, 1.0)
    stored = ingest(path, tmp_path / "scan.zarr", progress=False, **options)
    np.testing.assert_allclose(np.ptp(stored.position_yx_px, 0), np.ptp(scan.position_yx_px, 0), rtol=1e-6)


@pytest.mark.parametrize("unit", ["10^999 m", "0 m", "1e999 m", "-1 m", "10^x m"])
def test_a_factor_that_is_no_positive_number_is_no_unit(unit):
    assert factor_of(unit, "m") is None
    assert factor_of("10^-6 m", "m") == 1e-6
