"""From a file's frames to a scan's patterns: geometry, probe, units, and what is refused on the way."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.io import IngestSpec, ingest
from ptychodask.io.geometry import FrameGrid
from ptychodask.probes import disc_probe, estimate_probe, to_far_field, to_real_space, zone_plate_probe
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.store import write as store_module

KEYS = {"diffraction": "dp", "y": "y", "x": "x"}
MAPPED = {"keys": KEYS, "domain": "counts", "units": "px"}
OPTICS = {"energy_ev": 8000.0, "distance_m": 2.0, "detector_pixel_m": 75e-6}
WAVELENGTH_M = 1.549802480415e-10


def frames(n_patterns: int = 12, h: int = 24, w: int = 24, dtype: Any = np.uint16) -> np.ndarray:
    return np.random.default_rng(0).poisson(20, (n_patterns, h, w)).astype(dtype)


def save(folder: Path, patterns: np.ndarray, **changes: Any) -> Path:
    y, x = np.random.default_rng(1).random((2, len(patterns))) * 30
    path = folder / "source.npz"
    np.savez_compressed(path, **({"dp": patterns, "y": y, "x": x} | changes))
    return path


def read(path: Path, **options: Any) -> Scan:
    return ingest(path, path.parent / "scan.zarr", progress=False, overwrite=True, **(MAPPED | options))


def in_file_order(scan: Scan) -> np.ndarray:
    return scan.diffraction[np.argsort(scan.source_index)]


# Crop, pad, bin


@pytest.mark.parametrize("dc", ["centre", "corner"])
@pytest.mark.parametrize(("shape", "centre"), [((24, 24), "dc"), ((24, 31), "dc"), ((24, 24), (10, 13.2))])
def test_patterns_are_cut_about_the_beam(tmp_path, shape, centre, dc):
    patterns = frames(5, *shape)
    in_file = np.fft.ifftshift(patterns, axes=(1, 2)) if dc == "corner" else patterns
    scan = read(save(tmp_path, in_file), n_pixels=16, centre=centre, dc=dc)
    y, x = (shape[0] // 2, shape[1] // 2) if centre == "dc" else (10, 13)
    np.testing.assert_array_equal(in_file_order(scan), patterns[:, y - 8 : y + 8, x - 8 : x + 8])


def test_the_beam_is_found_by_its_centre_of_mass_without_bad_pixels(tmp_path):
    patterns = np.zeros((5, 24, 24), np.uint16)
    patterns[:, 9:12, 14:17] = 7
    patterns[:, 0, 0] = 60_000
    mask = np.ones((24, 24), bool)
    mask[0, 0] = False
    np.save(tmp_path / "mask.npy", mask)
    scan = read(save(tmp_path, patterns), n_pixels=8, centre="auto", mask=tmp_path / "mask.npy")
    np.testing.assert_array_equal(scan.diffraction[[0]][0, 3:6, 3:6], 7)


def test_padding_was_not_measured(tmp_path):
    patterns = frames(5, 24, 20)
    scan = read(save(tmp_path, patterns), n_pixels=32)
    measured = np.zeros((32, 32), bool)
    measured[4:28, 6:26] = True
    np.testing.assert_array_equal(scan.mask, measured)
    np.testing.assert_array_equal(in_file_order(scan)[:, measured].reshape(5, 24, 20), patterns)
    assert (scan.diffraction[slice(None)][:, ~measured] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_binned_counts_are_sums_even_where_the_type_would_overflow(tmp_path, dtype):
    patterns = np.full((5, 32, 32), 250, dtype)
    scan = read(save(tmp_path, patterns), bin=2)
    assert scan.diffraction.shape == (5, 16, 16)
    assert (scan.diffraction[slice(None)] == 1000).all()


def test_binned_amplitudes_are_roots_of_summed_squares(tmp_path):
    patterns = frames(5, 16, 16, np.float32)
    scan = read(save(tmp_path, patterns), bin=2, domain="amplitude")
    expected = np.sqrt((patterns.astype(float) ** 2).reshape(5, 8, 2, 8, 2).sum(axis=(2, 4)))
    np.testing.assert_allclose(in_file_order(scan), expected, rtol=1e-6)


def test_a_bin_with_a_bad_pixel_is_bad(tmp_path):
    mask = np.ones((32, 32), np.uint8)
    mask[5, 8] = 0
    np.save(tmp_path / "mask.npy", mask)
    scan = read(save(tmp_path, frames(5, 32, 32)), bin=2, mask=str(tmp_path / "mask.npy"))
    assert np.argwhere(~scan.mask).tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("u1", "u1"), ("u2", "u2"), ("i4", "i4"), ("i8", "i4"), ("u8", "u4"), ("f8", "f4"), ("f2", "f2"), (">u2", "u2")],
)
def test_patterns_keep_the_type_they_were_measured_in(tmp_path, dtype, stored):
    patterns = frames().astype(dtype)
    scan = read(save(tmp_path, patterns))
    assert scan.diffraction.dtype == np.dtype(stored)
    np.testing.assert_array_equal(in_file_order(scan), patterns)


def test_a_count_that_fits_no_four_bytes_is_refused_unless_it_is_masked(tmp_path):
    patterns = frames(dtype=np.uint64)
    patterns[:, 3, 4] = 2**64 - 1
    with pytest.raises(PtychodaskError, match=r"1 pixels hold 18446744073709551615, the largest.*mask="):
        read(save(tmp_path, patterns))
    mask = np.ones((24, 24), bool)
    mask[3, 4] = False
    assert read(save(tmp_path, patterns, m=mask), keys=KEYS | {"mask": "m"}).n_patterns == 12


# Positions and optics


def analytic_object(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return 1 + 0.4 * np.cos(0.11 * y + 0.3) * np.exp(1j * 0.8 * np.sin(0.13 * x - 0.05 * y))


def gaussian_probe(n: int, width: float) -> np.ndarray:
    y, x = np.indices((n, n)) - n // 2
    return 100 * np.exp(-(y**2 + (x - 1) ** 2) / (2 * width**2) + 0.02j * y * x)


def patch_of_object(position: np.ndarray, n: int, pixel: float) -> np.ndarray:
    """Object around a position (in pixels of size `pixel`), by the definition of a patch's coordinates."""
    rows, columns = (position[:, None] - n / 2 + np.arange(n)) * pixel
    return analytic_object(*np.meshgrid(rows, columns, indexing="ij"))


@pytest.mark.parametrize(
    ("h", "n_pixels", "bin", "width", "tolerance"),
    [
        (96, 48, 1, 4.0, 1e-3),  # the far field fits the crop to 1e-3
        (96, 96, 1, 4.0, 1e-6),  # float32 amplitudes
        (96, 128, 1, 4.0, 1e-3),  # the object is resampled by its definition, the probe by Fourier padding
        (96, 32, 3, 2.0, 0.02),  # a sum over a bin is the wave in its middle where the pattern is smooth
        (144, 32, 3, 2.0, 0.02),
    ],
)
def test_probe_and_positions_follow_the_patterns_onto_the_new_grid(tmp_path, h, n_pixels, bin, width, tolerance):
    position = np.random.default_rng(3).random((6, 2)) * 40 + 20
    probe = gaussian_probe(h, width)
    waves = [probe * patch_of_object(p, h, 1.0) for p in position]
    counts = np.abs(to_far_field(np.stack(waves))) ** 2
    path = save(tmp_path, counts, y=position[:, 0], x=position[:, 1], p=probe)
    options = {"keys": KEYS | {"probe": "p"}, "calibration": "as_given", "n_pixels": n_pixels, "bin": bin}
    scan = read(path, **options)
    pixel = h / (n_pixels * bin)
    np.testing.assert_allclose(scan.position_yx_px * pixel, position[scan.source_index], rtol=1e-12)
    predicted = np.stack(
        [np.abs(to_far_field(scan.probe[0] * patch_of_object(p, n_pixels, pixel))) for p in scan.position_yx_px]
    )
    measured = scan.amplitude(slice(None))
    if scan.mask is not None:
        predicted *= scan.mask
    assert np.abs(predicted - measured).sum() / measured.sum() < tolerance


@pytest.mark.parametrize(("units", "metres"), [("m", 1.0), ("um", 1e-6)])
def test_positions_in_metres_become_object_pixels(tmp_path, units, metres):
    y, x = np.random.default_rng(4).random((2, 12)) * 1e-6 / metres
    scan = read(save(tmp_path, frames(), y=y, x=x), units=units, n_pixels=8, bin=2, **OPTICS)
    pixel = WAVELENGTH_M * 2.0 / (16 * 75e-6)
    assert scan.pixel_size_m == pytest.approx(pixel, rel=1e-9)
    np.testing.assert_allclose(scan.position_yx_px[:, 0], y[scan.source_index] * metres / pixel)
    assert (scan.energy_ev, scan.distance_m) == (8000.0, 2.0)


def test_the_wavelength_may_be_given_in_place_of_the_energy(tmp_path):
    optics = {"wavelength_m": WAVELENGTH_M, "distance_m": 2.0, "detector_pixel_m": 75e-6}
    assert read(save(tmp_path, frames()), **optics).pixel_size_m == pytest.approx(WAVELENGTH_M * 2 / (24 * 75e-6))


def test_a_raw_file_with_foreign_keys_is_cropped_binned_and_placed_in_metres(shared, tmp_path):
    source = shared / "data" / "test235_truncated.npz"
    options = {"keys": {"diffraction": "reciprocal", "position": "position"}, "units": "m", "pixel_size_m": 1e-8}
    scan = ingest(
        source, tmp_path / "scan.zarr", domain="counts", n_pixels=128, bin=2, centre="auto", progress=False, **options
    )
    with np.load(source) as archive:
        counts, position = archive["reciprocal"], archive["position"]
    rows, columns = np.indices((512, 512))
    mean = counts.mean(axis=0)
    y, x = (round(float((axis * mean).sum() / mean.sum())) for axis in (rows, columns))
    expected = counts[:, y - 128 : y + 128, x - 128 : x + 128].reshape(20, 128, 2, 128, 2).sum(axis=(2, 4))
    np.testing.assert_array_equal(in_file_order(scan), expected)
    np.testing.assert_allclose(scan.position_yx_px, position[scan.source_index] / 1e-8)


# Probe


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("domain", ["counts", "amplitude"])
@pytest.mark.parametrize("holds", ["counts", "amplitude"])
def test_values_that_are_taken_for_what_they_are_not_are_warned_of(tmp_path, caplog, holds, domain, dtype):
    counts = np.random.default_rng(0).poisson(np.geomspace(1, 300, 32)[:, None] * np.ones(32), (12, 32, 32))
    patterns = counts.astype(dtype) if holds == "counts" else np.sqrt(counts).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        read(save(tmp_path, patterns), domain=domain)
    told = [record.getMessage() for record in caplog.records if "are taken for" in record.getMessage()]
    assert len(told) == (holds != domain)
    assert all(f"ingest again with --domain {holds}" in line for line in told)


def test_a_file_without_a_probe_gets_the_estimate_and_says_so(tmp_path, caplog):
    patterns = frames()
    with caplog.at_level(logging.INFO):
        scan = read(save(tmp_path, patterns))
    assert "has no probe, so one is estimated from the mean pattern" in caplog.text
    assert scan.calibration == "mean_counts"
    np.testing.assert_allclose(np.abs(to_far_field(scan.probe[0])) ** 2, patterns.mean(axis=0), rtol=1e-4)


def test_an_estimated_probe_is_centred_in_real_space():
    y, x = np.indices((32, 32)) - 16
    probe = estimate_probe(np.exp(-(y**2 + x**2) / 50.0))
    assert np.unravel_index(np.abs(probe[0]).argmax(), (32, 32)) == (16, 16)
    assert np.abs(probe.imag).max() < 1e-6


def test_real_space_and_far_field_undo_each_other_and_keep_the_light():
    wave = np.random.default_rng(0).normal(size=(2, 15, 16)) + 1j
    np.testing.assert_allclose(to_real_space(to_far_field(wave)), wave, atol=1e-12)
    assert (np.abs(to_far_field(wave)) ** 2).sum() == pytest.approx((np.abs(wave) ** 2).sum())


def test_modelled_probes_take_their_options(tmp_path):
    path = save(tmp_path, frames())
    disc = read(path, probe="disc", probe_diameter_px=9).probe
    expected = disc_probe(24, diameter_px=9)
    np.testing.assert_allclose(disc / np.abs(disc).max(), expected, rtol=1e-5)
    plate = read(path, probe="zone_plate", probe_diameter_px=14, probe_stop_px=5, probe_defocus=12.0).probe
    expected = zone_plate_probe(24, outer_px=14, stop_px=5, defocus=12.0)
    np.testing.assert_allclose(plate / np.abs(plate).max(), expected / np.abs(expected).max(), atol=1e-5)


def test_a_defocus_in_metres_is_the_phase_that_the_optics_make_of_it(tmp_path):
    path = save(tmp_path, frames(h=48, w=48))
    options = {"probe": "zone_plate", "probe_diameter_px": 14, "probe_stop_px": 5, "bin": 2, **OPTICS}
    rim = np.pi * 2e-5 * (7 * 150e-6 / 2.0) ** 2 / WAVELENGTH_M
    in_metres = read(path, probe_defocus_m=2e-5, **options).probe
    np.testing.assert_allclose(in_metres, read(path, probe_defocus=rim, **options).probe, atol=1e-3)


def test_a_zone_plate_far_from_focus_is_a_donut():
    light = np.abs(zone_plate_probe(128, outer_px=50, stop_px=20, defocus=60.0)[0]) ** 2
    y, x = np.indices((128, 128)) - 64
    radius = np.hypot(y, x)
    rim = 60.0 * 2 / 25 * 128 / (2 * np.pi)  # where the rim's rays go: slope of the phase times N / 2π
    assert light[radius < 0.2 * rim].mean() < 0.25 * light[(radius > 0.5 * rim) & (radius < 0.9 * rim)].mean()
    assert light[radius < 1.2 * rim].sum() > 0.9 * light.sum()


@pytest.mark.parametrize("name", ["probe.npy", "probe.npz"])
def test_a_probe_is_read_from_a_file_of_its_own(tmp_path, name):
    probe = gaussian_probe(24, 3.0).astype(np.complex64)
    if name.endswith("npy"):
        np.save(tmp_path / name, probe)
    else:
        np.savez(tmp_path / name, probeGuess=probe, other=np.zeros(3))
    scan = read(save(tmp_path, frames()), probe=str(tmp_path / name), calibration="as_given")
    np.testing.assert_array_equal(scan.probe, probe[None])


def test_light_lost_by_the_probe_on_its_new_grid_is_noted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read(save(tmp_path, frames(), p=disc_probe(24, diameter_px=22)), keys=KEYS | {"probe": "p"}, n_pixels=8, bin=2)
    assert "of the probe's intensity is outside its new grid" in caplog.text


def test_a_known_flux_sets_the_scale_of_the_probe(tmp_path):
    scan = read(save(tmp_path, frames()), calibration="incident", incident_counts=5000.0)
    assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(5000.0, rel=1e-5)


# Frames left out


@pytest.mark.parametrize("drop", ["3, 7:9,11", [3, slice(7, 9), 11]])
@pytest.mark.parametrize("compressed", [True, False])
def test_dropped_frames_are_left_out_of_everything(tmp_path, drop, compressed):
    patterns, flux = frames(), np.arange(12) + 1.0
    path = save(tmp_path, patterns, f=flux)
    if not compressed:
        with np.load(path) as archive:
            np.savez(path, **archive)
    scan = read(path, drop_frames=drop, keys=KEYS | {"flux": "f"})
    kept = np.setdiff1d(np.arange(12), [3, 7, 8, 11])
    np.testing.assert_array_equal(np.sort(scan.source_index), kept)
    np.testing.assert_array_equal(scan.diffraction[slice(None)], patterns[scan.source_index])
    np.testing.assert_allclose(scan.flux, flux[scan.source_index] / flux[kept].mean(), rtol=1e-6)


def test_a_bad_frame_may_be_dropped(tmp_path):
    patterns = frames(dtype=np.float32)
    patterns[5, 1, 1] = -3
    y = np.arange(12.0)
    y[8] = np.nan
    path = save(tmp_path, patterns, y=y)
    with pytest.raises(PtychodaskError, match=r"1 of 12 positions are not finite \(patterns 8\).*drop_frames="):
        read(path)
    with pytest.raises(PtychodaskError, match=r"negative counts in 1 patterns \(source rows 5\).*drop_frames="):
        read(path, drop_frames="8,0:3")
    assert read(path, drop_frames="5,8").n_patterns == 10


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pixel": 64}, "no field n_pixel; the fields are: keys, domain, axes"),
        ({"n_pixels": 18}, "18 pixels wide, expected a multiple of 4"),
        ({"n_pixels": 2}, "n_pixels is 2, expected an integer in 8..16384"),
        ({"bin": 0}, "bin is 0"),
        ({"bin": 4}, "6 pixels wide"),
        ({"centre": "middle"}, "centre is 'middle', expected one of: dc, auto"),
        ({"centre": (30, 5)}, r"centre is \(30, 5\), expected a pixel of the 24 x 24 frame"),
        ({"energy_ev": -1.0}, "energy_ev is -1.0, expected a positive number"),
        ({"energy_ev": 8e3, "wavelength_m": 1e-10}, "energy_ev and wavelength_m are both given"),
        ({"pixel_size_m": 1e-8, **OPTICS}, "pixel_size_m is 1e-08, but .* by wavelength, distance and detector pixel"),
        ({"incident_counts": 5.0}, "incident_counts has no meaning with calibration=None"),
        ({"calibration": "incident"}, "needs incident_counts="),
        ({"calibration": "as_given"}, "a probe from 'estimate' has an arbitrary scale"),
        ({"n_pixels": 10**6}, "n_pixels is 1000000, expected an integer in 8..16384"),
        ({"centre": None}, "centre is None, expected 'dc', 'auto'"),
        ({"centre": ("3", 4)}, r"centre is \('3', 4\), expected 'dc', 'auto'"),
        ({"probe": np.ones((24, 24))}, "probe is a ndarray, expected the name of a model or the path"),
        ({"probe": "disc"}, "probe='disc' needs probe_diameter_px="),
        ({"probe_diameter_px": 5}, "probe_diameter_px has no meaning with probe=None"),
        ({"probe": "disc", "probe_diameter_px": 50}, "at most the frame's 24 pixels"),
        ({"probe": "zone_plate", "probe_diameter_px": 9}, "needs one of probe_defocus="),
        ({"probe": "zone_plate", "probe_diameter_px": 9, "probe_defocus_m": 1e-5}, "probe_defocus_m needs energy_ev="),
        ({"probe": "file"}, "has no probe; pass probe="),
        ({"probe": "none.npy"}, "none.npy: no such file; pass probe= a path or one of: file, disc"),
        ({"mask": "none.npy"}, "none.npy: no such file"),
        ({"drop_frames": "5:50"}, r"the part '5:50', expected rows in 0..11"),
        ({"drop_frames": "a"}, "the part 'a', expected a row or a range"),
        ({"drop_frames": "0:"}, "leaves none of 12 frames"),
        ({"scratch": "nowhere"}, "the scratch folder does not exist"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(tmp_path, options, message):
    path = save(tmp_path, frames())
    with pytest.raises(PtychodaskError, match=message):
        read(path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["source.npz"]


@pytest.mark.parametrize(
    ("patterns", "changes", "message"),
    [
        (frames(h=66, w=66), {}, "66 pixels wide, expected a multiple of 4.*n_pixels=64"),
        (frames(h=24, w=20), {}, r"shape \(12, 24, 20\), expected \(pattern, N, N\); crop or pad"),
        (frames()[:0], {}, "none of them 0"),
        (frames() * 1j, {}, "patterns have type complex128, expected counts or amplitudes"),
        (frames(), {"y": np.zeros(11), "x": np.zeros(11)}, "12 patterns but 11 positions"),
        (frames(), {"y": np.zeros(11)}, "11 y positions but 12 x positions"),
        (frames(), {"x": np.full(12, np.inf)}, "12 of 12 positions are not finite"),
        (frames() * 0, {}, "every pattern is zero"),
        (np.where(np.arange(24) > 4, 1.0, np.nan) * frames(), {}, "not finite in 12 patterns"),
        (frames().astype(np.int32) - 30, {}, "negative counts in 12 patterns"),
    ],
)
def test_a_file_that_holds_no_scan_is_refused_and_leaves_nothing(tmp_path, patterns, changes, message):
    path = save(tmp_path, patterns, **changes)
    with pytest.raises(PtychodaskError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source.npz"]


def test_labels_are_refused_and_a_truth_left_out_on_another_grid(tmp_path, caplog):
    smooth = np.exp(1j * np.arange(6400).reshape(80, 80) / 1e3)
    y = np.full(12, 40.0)
    path = save(tmp_path, frames(), o=smooth, label=frames() * 1j, y=y, x=y)
    with caplog.at_level(logging.INFO):
        scan = read(path, keys=KEYS | {"object": "o"}, n_pixels=16)
    assert scan.truth is None
    assert "changes the object's grid" in caplog.text
    with pytest.raises(PtychodaskError, match="its labels do not fit patterns of another size"):
        read(path, keys=KEYS | {"label": "label"}, n_pixels=16)


def test_a_mask_without_a_good_pixel_is_refused(tmp_path):
    with pytest.raises(PtychodaskError, match="leaves no good pixel; it is True where a pixel is good"):
        read(save(tmp_path, frames(), m=np.zeros((24, 24), bool)), keys=KEYS | {"mask": "m"})


def test_an_existing_store_is_refused_before_the_source_is_touched(tmp_path):
    read(save(tmp_path, frames()))
    with pytest.raises(PtychodaskError, match=r"scan\.zarr: exists already; pass overwrite=True"):
        ingest(tmp_path / "no such source", tmp_path / "scan.zarr")


def test_a_failed_ingest_leaves_an_earlier_store_as_it_was(tmp_path):
    before = read(save(tmp_path, frames())).data_hash
    with pytest.raises(PtychodaskError, match="negative counts"):
        read(save(tmp_path, frames().astype(np.int32) - 30))
    assert open_scan(tmp_path / "scan.zarr").data_hash == before


# Disk and memory


def test_too_little_scratch_space_is_said_before_it_is_used(tmp_path, monkeypatch):
    path = save(tmp_path, frames())
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(PtychodaskError, match=r"needs 0\.0 MB of scratch space, but only 0\.0 MB are free.*scratch="):
        read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["source.npz"]


def full_disk(*_args: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_full_scratch_disk_ends_in_one_line(tmp_path, monkeypatch, legacy):
    patterns = frames().transpose(1, 2, 0) if legacy else frames()
    path = save(tmp_path, patterns, y=np.arange(12.0), x=np.arange(12.0))

    class FullFile(tempfile.SpooledTemporaryFile):
        write = full_disk  # type: ignore[assignment]

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir, prefix: FullFile(dir=dir))
    with pytest.raises(PtychodaskError, match=r"scratch cannot be written \(No space left on device\).*scratch="):
        read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["source.npz"]


def test_a_full_disk_under_the_store_leaves_the_earlier_one(tmp_path, monkeypatch):
    before = read(save(tmp_path, frames())).data_hash
    monkeypatch.setattr(store_module.zarr.Array, "__setitem__", full_disk)
    with pytest.raises(PtychodaskError, match=r"scan\.zarr: cannot be written \(No space left on device\)"):
        read(save(tmp_path, frames() + 1))
    assert open_scan(tmp_path / "scan.zarr").data_hash == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.zarr", "source.npz"]


def test_the_scratch_folder_is_used_and_left_empty(tmp_path, caplog):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with caplog.at_level(logging.INFO):
        read(save(tmp_path, frames()), scratch=scratch)
    assert f"MB of scratch in {scratch}" in caplog.text
    assert list(scratch.iterdir()) == []


PEAK = """
import sys, h5py
from pathlib import Path
from ptychodask.io import ingest
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
ingest(sys.argv[1], sys.argv[1] + ".zarr", keys={"diffraction": "dp", "y": "y", "x": "x"}, units="px", domain="counts")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    patterns = np.zeros((6400, 128, 128), np.uint16)
    patterns[:, 50:78, 50:78] = frames(1, 28, 28)
    y, x = np.random.default_rng(0).random((2, 6400)) * 1000
    path = tmp_path / f"large.{kind}"
    if kind == "npz":
        np.savez_compressed(path, dp=patterns, y=y, x=x)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("dp", data=patterns, chunks=(64, 128, 128), compression="gzip", compression_opts=1)
            file["y"], file["x"] = y, x
    run = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)
    # Blocks, a shard and its compressed copy: 75 MB were seen for patterns of 210 MB.
    assert int(run.stdout) < patterns.nbytes / 2


# What is recorded


def test_a_store_says_where_it_comes_from(tmp_path):
    path = save(tmp_path, frames())
    provenance = read(path, n_pixels=16, centre=(12, 11), drop_frames=[1, slice(3, 5)]).attributes["provenance"]
    assert provenance["source"] == str(path)
    assert provenance["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance["reader"] == "mapping"
    assert provenance["options"]["n_pixels"] == 16
    assert provenance["options"]["centre"] == [12, 11]
    assert provenance["options"]["keys"] == KEYS
    assert "bin" not in provenance["options"]
    assert {"python", "numpy", "zarr", "ptychodask"} <= set(provenance["versions"])


def test_a_spec_lists_what_differs_from_its_defaults():
    assert IngestSpec(bin=2, domain="counts").given() == {"domain": "counts", "bin": 2}


def test_a_grid_that_is_the_frame_itself_changes_nothing():
    grid = FrameGrid(frame_shape=(16, 16), n_pixels=16, bin=1, dc="centre", centre_yx=(8, 8))
    block = frames(3, 16, 16)
    np.testing.assert_array_equal(grid.patterns(block, "counts"), block)
    assert grid.mask(None) is None
    assert not grid.changes_the_object_grid
