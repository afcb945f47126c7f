"""What is seen in files and stores, how sure that is said to be, and that the commands that follow work."""

from __future__ import annotations

import json
import shlex

import h5py
import numpy as np
import pytest
import yaml

from ptychodask.errors import PtychodaskError
from ptychodask.forward import diffract
from ptychodask.inspection import inspect_file, plot_preview
from ptychodask.io import evidence as evidence_module
from ptychodask.io import ingest
from ptychodask.io.evidence import (
    Sample,
    bad_pixels,
    beam_of,
    domain_of,
    least_probe_diameter_px,
    spread_rows,
    take_sample,
)
from ptychodask.probes import disc_probe
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.store.annotate import record_model, set_metadata
from ptychodask.store.groups import group
from ptychodask.store.write import write_scan

N = 32


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A simulated scan: counts, positions in pixels, probe."""
    path = tmp_path_factory.mktemp("inspection") / "scan.zarr"
    return simulate(path, object="star", probe="zone_plate", n_pixels=N, n_patterns=90, dose=1e5, step_px=3.0)


# What frames say


def poisson(mean, shape=(4, 32, 32)):
    return np.random.default_rng(0).poisson(mean, shape)


@pytest.mark.parametrize(
    ("frames", "domain", "certainty"),
    [
        (poisson(5).astype(np.uint16), "counts", "measured"),
        (poisson(5).astype(np.float32), "counts", "measured"),
        (np.sqrt(poisson(5)).astype(np.float32), "amplitude", "measured"),
        (np.rint(np.sqrt(poisson(20))).astype(np.uint8), "amplitude", "guess"),
        (poisson(5) * 0.37, None, "open"),
        (np.zeros((2, 8, 8)), None, "open"),
        (poisson(5).astype(np.uint16) * 300, "counts", "guess"),
    ],
)
def test_counts_and_amplitudes_are_told_by_their_scatter(frames, domain, certainty):
    assert domain_of(frames)[:2] == (domain, certainty)


def test_values_that_are_not_finite_do_not_disturb_what_the_others_say():
    frames = poisson(5).astype(np.float32)
    frames[1, 3, 3] = np.nan
    assert domain_of(frames)[0] == "counts"


@pytest.mark.parametrize(("n", "beam"), [(32, "centre"), (33, "centre")])
def test_the_beam_is_found_in_the_middle_and_in_the_corner(n, beam):
    y, x = np.indices((n, n)) - n // 2
    mean = np.exp(-(y**2 + x**2) / 20)
    assert beam_of(mean)[0] == "centre"
    assert beam_of(np.fft.ifftshift(mean))[0] == "corner"


def test_a_flat_pattern_does_not_say_where_the_beam_is():
    assert beam_of(np.ones((32, 32)))[0] is None
    assert beam_of(np.zeros((32, 32)))[0] is None


def test_hot_and_dead_pixels_are_found_and_masked_ones_are_not_counted():
    frames = poisson(40, (8, 32, 32))
    frames[:, 5, 6], frames[:, 20, 3] = 4000, 0
    sample = Sample(frames, np.arange(8), 8, 8)
    hot, dead = bad_pixels(sample, frames.mean(axis=0))
    assert np.argwhere(hot).tolist() == [[5, 6]]
    assert np.argwhere(dead).tolist() == [[20, 3]]
    good = np.ones((32, 32), bool)
    good[5, 6] = good[20, 3] = False
    assert not np.any(bad_pixels(sample, frames.mean(axis=0), good))


@pytest.mark.parametrize("diameter_px", [10.0, 20.0, 30.0])
def test_speckles_tell_how_wide_a_probe_is_at_least(diameter_px):
    rng = np.random.default_rng(0)
    probe = disc_probe(64, diameter_px=diameter_px)
    objects = np.exp(1j * rng.uniform(-1, 1, (12, 1, 64, 64)))
    patterns = rng.poisson(diffract(probe * objects) * 1e4)
    # A disc's autocorrelation vanishes at its diameter, linearly, so the last few per cent are below any noise.
    assert 0.8 * diameter_px <= least_probe_diameter_px(patterns.astype(float)) <= diameter_px + 2


class Counted:
    """Frames that know how many of them were read."""

    random_access = False

    def __init__(self, n_frames, seekable):
        self.shape, self.dtype, self.seekable, self.n_read = (n_frames, 4, 4), np.dtype(np.int64), seekable, 0

    def blocks(self):
        for start in range(0, self.shape[0], 10):
            self.n_read += 10
            yield np.full((10, 4, 4), np.arange(start, start + 10)[:, None, None])

    def __getitem__(self, index):
        self.n_read += len(index)
        return np.broadcast_to(index[:, None, None], (len(index), 4, 4))


def test_a_sample_comes_from_all_over_a_file_and_reads_no_more():
    frames = Counted(10_000, seekable=True)
    sample = take_sample(frames)
    assert frames.n_read == len(sample.rows) == evidence_module.SAMPLE_FRAMES
    assert (sample.rows[0], sample.rows[-1]) == (0, 9999)
    np.testing.assert_array_equal(sample.frames[:, 0, 0], sample.rows)


def test_a_sample_of_a_stream_ends_where_its_share_ends(monkeypatch):
    frames = Counted(10_000, seekable=False)
    monkeypatch.setattr(evidence_module, "STREAM_BYTES", 1000 * 4 * 4 * 8)
    sample = take_sample(frames)
    assert frames.n_read == 1000
    assert "of the first 1000, since the file is a stream" in sample.description
    np.testing.assert_array_equal(sample.frames[:, 0, 0], sample.rows)


@pytest.mark.parametrize(("n_rows", "wanted"), [(1, 64), (64, 64), (65, 64), (1000, 3), (1000, 64)])
def test_rows_are_different_and_never_more_than_wanted(n_rows, wanted):
    rows = spread_rows(n_rows, wanted)
    assert len(np.unique(rows)) == len(rows) <= wanted
    assert 0 <= rows.min() <= rows.max() < n_rows


# Files of every kind: the command that is printed makes the scan


def ptychopinn(path, scan, **changes):
    y, x = scan.position_yx_px.T
    np.savez_compressed(path, **{"diff3d": scan.diffraction[:], "ycoords": y, "xcoords": x} | changes)


def ptychopinn_of_floats(path, scan):
    ptychopinn(path, scan, diff3d=scan.diffraction[:].astype(np.float32))


def ptychopinn_patterns_last(path, scan):
    ptychopinn(path, scan, diff3d=np.moveaxis(scan.diffraction[:], 0, -1))


def tike(path, scan):
    data = np.fft.ifftshift(scan.diffraction[:].astype(np.float32), axes=(1, 2))
    np.savez(path, data=data[None], scan=scan.position_yx_px[None], probe=scan.probe[None, None, None])


def own_keys_in_metres(path, scan):
    np.savez_compressed(path, reciprocal=scan.diffraction[:].astype(np.int32), position=scan.position_yx_px * 2e-9)


def own_keys_in_hdf5(path, scan):
    """Names with spaces, micrometres, optics in other units, the beam in the corner, a mask."""
    wavelength_m = 1.239841984332e-6 / 8000
    with h5py.File(path, "w") as file:
        counts = np.fft.ifftshift(scan.diffraction[:], axes=(1, 2))
        file.create_dataset("entry/data of eiger", data=counts, chunks=(10, N, N), compression="gzip")
        for name, values in zip("yx", scan.position_yx_px.T, strict=True):
            file[f"entry/stage/pos_{name}"] = values * wavelength_m * 2 / (N * 75e-6) * 1e6
            file[f"entry/stage/pos_{name}"].attrs["units"] = "um"
        file["entry/energy_kev"] = 8.0
        file["entry/distance"] = 2000.0
        file["entry/distance"].attrs["units"] = "mm"
        file["entry/x_pixel_size"] = 75e-6
        file["entry/probe"] = scan.probe
        mask = np.ones((N, N), np.uint8)
        mask[0, 0] = 0
        file["entry/mask"] = mask


KINDS = [ptychopinn, ptychopinn_of_floats, ptychopinn_patterns_last, tike, own_keys_in_metres, own_keys_in_hdf5]


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_the_command_that_is_printed_makes_the_scan(write, measured, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "my scan.h5" if "hdf5" in write.__name__ else "my scan.npz"
    write(tmp_path / source, measured)
    code, out, err = run("inspect", source, "--yaml", "my.yaml")
    assert code == 0, err
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:4] == ["ptychodask", "ingest", source, "my scan.zarr"]
    code, _, err = run(*command[1:], "-q")
    assert code == 0, err
    scan = open_scan(tmp_path / "my scan.zarr")
    row = np.argsort(scan.source_index)
    assert scan.domain == "counts"
    np.testing.assert_array_equal(scan.diffraction[row], measured.diffraction[:])
    if write is own_keys_in_metres:
        # The size of a pixel is a guess, so that only the shape of the scan is known.
        scale = np.ptp(scan.position_yx_px) / np.ptp(measured.position_yx_px)
        np.testing.assert_allclose(scan.position_yx_px[row] / scale, measured.position_yx_px, atol=1e-5)
        assert "REPLACE it by yours" in out.replace("\n            ", " ")
    else:
        np.testing.assert_allclose(scan.position_yx_px[row], measured.position_yx_px, atol=1e-6)
    again = ingest(source, "again.zarr", progress=False, **yaml.safe_load((tmp_path / "my.yaml").read_text()))
    assert again.data_hash == scan.data_hash


def test_real_scans_are_told_what_they_are(shared, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, told in (
        ("siemens-star-small.npz.bz2", ["counts, as the format defines", "in the corner, as the format defines"]),
        ("lines64_train.npz", ["amplitude, as the format defines", "becomes the truth"]),
        ("test235_truncated.npz", ["counts: integers", "positions are in m"]),
    ):
        code, out, err = run("inspect", shared / "data" / name)
        assert code == 0, err
        assert [text for text in told if text not in out] == []
        assert run(*shlex.split(out.strip().splitlines()[-1])[1:], "-q")[0] == 0


def test_files_without_a_scan_say_what_is_missing(shared):
    data = shared / "data"
    assert "no array of patterns" in inspect_file(data / "Run1084_recon3_postPC.npz").refused[0]
    assert "near field" in inspect_file(data / "PETRAIII_P25_Near_Field_Ptycho.cxi").refused[0]
    assert "no array of patterns" in inspect_file(data / "gold_balls.mat").refused[0]


# What is said, and how sure


def said(found, topic):
    return [(finding.statement, finding.certainty) for finding in found.findings if finding.topic == topic]


def test_what_a_file_leaves_open_is_said_to_be_open(measured, tmp_path):
    y, x = measured.position_yx_px.T
    path = tmp_path / "scan.npz"
    np.savez(path, patterns=measured.diffraction[:] * 0.37, pos_y=y, pos_x=x)
    found = inspect_file(path)
    (values,) = said(found, "values")
    assert values[1] == "open"
    assert "undetermined, so the command assumes counts" in values[0]
    assert said(found, "units")[0][1] == "guess"
    assert said(found, "axes")[0][1] == "guess"
    assert found.options["keys"] == {"diffraction": "patterns", "y": "pos_y", "x": "pos_x"}


def test_what_is_known_of_a_file_becomes_part_of_the_command(measured, tmp_path):
    path = tmp_path / "scan.npz"
    np.savez(path, patterns=measured.diffraction[:] * 0.37, pos=measured.position_yx_px)
    options = {"domain": "amplitude", "units": "um", "pixel_size_m": 1e-7, "affine": (-1.0, 0.0, 0.0, 1.0)}
    found = inspect_file(path, **options)
    assert options.items() <= found.options.items()
    assert "--domain amplitude --units um" in found.command
    assert "--affine=-1,0,0,1" in found.command
    assert said(found, "values")[0][1] == "noted"


def test_patterns_against_their_format_are_named(measured, tmp_path):
    path = tmp_path / "scan.npz"
    data = np.sqrt(measured.diffraction[:]).astype(np.float32)
    np.savez(path, data=data, scan=measured.position_yx_px, probe=measured.probe)
    found = inspect_file(path)
    assert "this contradicts the format" in said(found, "values")[0][0]
    assert "this contradicts the format" in said(found, "beam")[0][0]


def test_positions_that_are_not_finite_are_left_out_by_the_command(measured, tmp_path):
    position = measured.position_yx_px.copy()
    position[[3, 7, 8]] = np.nan
    position[20] = position[21]
    path = tmp_path / "scan.npz"
    np.savez(path, dp=measured.diffraction[:], pos=position)
    found = inspect_file(path)
    assert found.options["drop_frames"] == "3,7:9"
    assert "3 not finite, 1 duplicates" in said(found, "positions")[1][0]
    assert not found.refused


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            {"dp": poisson(5, (60, 16, 16)) - 8, "pos": np.ones((60, 2))},
            "values are negative in 60 of 60 sampled patterns",
        ),
        ({"dp": np.full((60, 16, 16), np.nan), "pos": np.ones((60, 2))}, "values are not finite in 60 of 60"),
        ({"dp": poisson(5, (60, 16, 16))}, "no positions for 60 patterns"),
        ({"dp": poisson(5, (60, 16, 16)), "points": np.ones((3, 60))}, "'points' has shape \\(3, 60\\)"),
        ({"cube": poisson(5, (6, 10, 16, 16))}, "no positions for 60 patterns"),
        ({"cube": poisson(5, (2, 6, 10, 16, 16))}, "no array of patterns.*merge its scan axes into one"),
        ({"X_full": np.ones((9, 8, 8, 4))}, "already grouped"),
        ({"diff3d": poisson(5, (60, 16, 16)), "ycoords": np.ones(60)}, "'xcoords' is missing"),
    ],
)
def test_what_would_be_refused_is_said_and_why(arrays, reason, tmp_path):
    np.savez(tmp_path / "scan.npz", **arrays)
    found = inspect_file(tmp_path / "scan.npz")
    assert len(found.refused) == 1
    with pytest.raises(PtychodaskError, match=reason):
        raise PtychodaskError(found.refused[0])


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def pickled(path):
    np.savez(path, diff3d=np.array([{"a": 1}], object))
    return path


def cut(path):
    with h5py.File(path, "w") as file:
        file["dp"] = poisson(5, (60, 16, 16))
    return write_bytes(path, path.read_bytes()[:50_000])


@pytest.mark.parametrize(
    ("name", "make", "line"),
    [
        ("missing.npz", lambda path: path, "no such file"),
        ("empty.npz", lambda path: write_bytes(path, b""), "the file is empty"),
        ("text.h5", lambda path: write_bytes(path, b"not a scan"), "begins with b'not a sc'"),
        ("objects.npz", pickled, "contains no array of numbers: 'diff3d' is pickled"),
        ("cut.h5", cut, "truncated or damaged"),
    ],
)
def test_bad_files_end_in_one_line(name, make, line, run, tmp_path):
    code, _, err = run("inspect", make(tmp_path / name))
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_bad_options_end_in_one_line(measured, run, tmp_path):
    np.savez(tmp_path / "scan.npz", dp=measured.diffraction[:], pos=measured.position_yx_px)
    for options, line in (
        (["--rotation"], "--rotation: needs --check-axes"),
        (["--png", tmp_path / "none" / "a.png"], "none does not exist"),
        (["--png", tmp_path / "a.txt"], "unknown figure format '.txt'"),
        (["--domain", "photons"], "domain is 'photons'"),
        (["--affine", "1,2,2,4"], "singular"),
        (["--affine", "1,2"], "expected 4 numbers"),
    ):
        code, _, err = run("inspect", tmp_path / "scan.npz", *options)
        assert code == 2
        assert line in err
        assert len(err.strip().splitlines()) == 1
    code, _, err = run("inspect", measured.store, "--units", "px")
    assert (code, "is a store" in err) == (2, True)


def test_the_picture_and_the_json_are_written(measured, run, tmp_path):
    np.savez(tmp_path / "scan.npz", dp=measured.diffraction[:], pos=measured.position_yx_px)
    code, out, err = run("inspect", tmp_path / "scan.npz", "--json", "--png", tmp_path / "scan.png")
    assert code == 0, err
    found = json.loads(out)
    assert [array["role"] for array in found["arrays"]] == ["diffraction", "position"]
    assert found["options"]["keys"] == {"diffraction": "dp", "position": "pos"}
    assert (tmp_path / "scan.png").stat().st_size > 10_000


def test_the_picture_shows_the_beam_in_the_middle(measured, tmp_path):
    tike(tmp_path / "scan.npz", measured)
    preview = inspect_file(tmp_path / "scan.npz").preview
    assert beam_of(preview.mean)[0] == "centre"
    for row, pattern in preview.patterns.items():
        np.testing.assert_array_equal(pattern, measured.diffraction[[row]][0])


def test_dark_patterns_have_no_picture(measured, tmp_path):
    np.savez(tmp_path / "dark.npz", dp=np.zeros((60, 16, 16), np.uint16), pos=measured.position_yx_px[:60])
    with pytest.raises(PtychodaskError, match="all patterns are zero"):
        plot_preview(inspect_file(tmp_path / "dark.npz").preview, tmp_path / "dark.png")


# Stores


def test_a_store_says_what_it_holds_and_what_comes_next(tmp_path):
    store = tmp_path / "scan.zarr"
    scan = simulate(store, object="star", probe="zone_plate", n_pixels=N, n_patterns=60, dose=1e5, step_px=3.0)
    found = inspect_file(store)
    assert found.command == f"ptychodask train {store}"
    assert said(found, "groups") == [("none stored; they are made when needed", "noted")]
    group(store)
    record_model(store, kind="pinn", path=tmp_path / "a.model", content_hash="0")
    found = inspect_file(store)
    assert found.command == f"ptychodask reconstruct {store}"
    assert said(found, "groups")[0][0] == "'c4-k7-s0' (60 of 4)"
    assert said(found, "models")[0][0] == "pinn a.model"
    assert f"mean counts per pattern {scan.attributes['mean_counts']:.4g}" in said(found, "values")[0][0]
    assert said(found, "truth")


def test_an_ingested_store_wants_its_probe_refined(measured, tmp_path):
    ptychopinn(tmp_path / "scan.npz", measured)
    ingest(tmp_path / "scan.npz", tmp_path / "scan.zarr", domain="counts", progress=False)
    found = inspect_file(tmp_path / "scan.zarr")
    assert found.command == f"ptychodask refine-probe {tmp_path / 'scan.zarr'}"
    assert "read as 'ptychopinn' with domain=counts" in said(found, "source")[0][0]


def test_outlying_positions_are_named_with_the_option_that_leaves_them_out(measured, run, tmp_path):
    position = measured.position_yx_px.copy()
    position[[5, 9]] += 4000.0
    amplitude = np.sqrt(measured.diffraction[:]).astype(np.float32)
    ptychopinn(tmp_path / "a.npz", measured, ycoords=position[:, 0], xcoords=position[:, 1], diff3d=amplitude)
    ((statement, _),) = said(inspect_file(tmp_path / "a.npz"), "outliers")
    assert statement == "2 positions are far from all others; leave out with --drop-frames 5,9"
    ingest(tmp_path / "a.npz", tmp_path / "a.zarr", progress=False)
    ((statement, _),) = said(inspect_file(tmp_path / "a.zarr"), "outliers")
    assert 'drop_frames="5,9" (--drop-frames 5,9)' in statement
    code, _, err = run("ingest", tmp_path / "a.npz", tmp_path / "b.zarr", "--drop-frames", "5,9", "-q")
    assert code == 0, err
    assert not said(inspect_file(tmp_path / "b.zarr"), "outliers")


def test_experiments_are_listed_and_judged_apart(measured, tmp_path):
    ptychopinn(tmp_path / "a.npz", measured, scan_index=np.arange(measured.n_patterns) % 2 * 4)
    ingest(tmp_path / "a.npz", tmp_path / "a.zarr", domain="counts", progress=False)
    ((statement, _),) = said(inspect_file(tmp_path / "a.zarr"), "experiments")
    assert statement == "2 in one store (0, 4): reconstruct writes a result for each, or for --experiment"


# Metadata that the file lacked


def test_missing_metadata_are_listed_and_can_be_set(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=N, n_patterns=12, step_px=3.0, dose=1e5)
    assert "not known: --pixel-size-m, --energy-ev, --distance-m" in str(inspect_file(scan.store))
    changed = set_metadata(scan.store, pixel_size_m=12e-9, energy_ev=8800)
    assert (changed.pixel_size_m, changed.energy_ev, changed.distance_m) == (12e-9, 8800.0, None)
    assert changed.data_hash == scan.data_hash
    assert "not known: --distance-m" in str(inspect_file(scan.store))
    assert set_metadata(scan.store, pixel_size_m=13e-9).pixel_size_m == 13e-9
    assert open_scan(scan.store).energy_ev == 8800.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to set; pass one or more of pixel_size_m"),
        ({"distance_m": -1}, "distance_m is -1, expected a positive number"),
        ({"energy_ev": float("nan")}, "energy_ev is nan, expected a positive number"),
        ({"energy_ev": "8800"}, r"energy_ev is '8800' \(str\), expected a number"),
        (
            {"pixel_size_m": 2e-9},
            r"pixel_size_m is 1e-09 from ingest.*ingest again with pixel_size_m= \(--pixel-size-m\)",
        ),
    ],
)
def test_metadata_that_contradict_the_scan_are_refused(tmp_path, given, message):
    scan = store_with_pixel_size(tmp_path / "scan.zarr")
    with pytest.raises(PtychodaskError, match=message):
        set_metadata(scan.store, **given)
    assert open_scan(scan.store).attributes == scan.attributes


def store_with_pixel_size(path):
    """A scan whose pixel size, 1 nm, was known at ingest."""
    rng = np.random.default_rng(0)
    return write_scan(
        path,
        diffraction=rng.poisson(9, (6, N, N)).astype(np.uint16),
        position_yx_px=rng.uniform(0, 20, (6, 2)),
        probe=disc_probe(N, diameter_px=8),
        domain="counts",
        calibration="mean_counts",
        pixel_size_m=1e-9,
    )
