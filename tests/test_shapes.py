"""Shapes of arrays that other programs write: the proposed command stores what was generated."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import zarr
from numpy.typing import NDArray

from ptychodask import PtychodaskError, ingest, open_scan
from ptychodask.inspection import check_axes, inspect_file

ROWS, COLUMNS, PIXELS = 5, 7, 16
N = ROWS * COLUMNS


def counts_and_positions() -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Patterns of a beam that is neither symmetric nor the same in two of them, and a jittered raster."""
    rng = np.random.default_rng(3)
    y, x = np.indices((PIXELS, PIXELS)) - PIXELS // 2
    beam = 400 * np.exp(-((y / 3.0) ** 2) - ((x - 0.5) / 2.0) ** 2)
    counts = rng.poisson(beam * rng.uniform(0.5, 1.5, (N, 1, 1))).astype("u2")
    position = np.stack(np.unravel_index(np.arange(N), (ROWS, COLUMNS)), axis=1) * 3.0 + 20
    return counts, position


def compound(values: NDArray[np.complex128], names: tuple[str, str] = ("real", "imag")) -> NDArray[Any]:
    """Complex numbers as pairs, as MATLAB and Julia store them."""
    pairs = np.empty(values.shape, [(names[0], "f8"), (names[1], "f8")])
    pairs[names[0]], pairs[names[1]] = values.real, values.imag
    return pairs


def matlab(path: Path, **arrays: NDArray[Any]) -> None:
    """Write a MATLAB 7.3 file: a header, and every array with its axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, values in arrays.items():
            file[key] = compound(values.T) if np.iscomplexobj(values) else np.ascontiguousarray(values.T)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def hdf5(path: Path, **arrays: NDArray[Any]) -> None:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values


def raster_maps(path: Path, counts: Any, position: Any) -> None:
    y, x = position.reshape(ROWS, COLUMNS, 2).transpose(2, 0, 1)
    hdf5(path, data=counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS), pos_y=y, pos_x=x)


def raster_axes(path: Path, counts: Any, position: Any) -> None:
    grid = position.reshape(ROWS, COLUMNS, 2)
    hdf5(path, data=counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS), pos_y=grid[:, 0, 0], pos_x=grid[0, :, 1])


def raster_pairs(path: Path, counts: Any, position: Any) -> None:
    raster = counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS)
    hdf5(path, data=raster, positions=position.reshape(ROWS, COLUMNS, 2))


def maps(path: Path, counts: Any, position: Any) -> None:
    y, x = position.reshape(ROWS, COLUMNS, 2).transpose(2, 0, 1)
    hdf5(path, data=counts, pos_y=y, pos_x=x)


def single_axis(path: Path, counts: Any, position: Any) -> None:
    hdf5(path, data=counts[:, None], pos_y=position[:, 0], pos_x=position[:, 1])


def pairs_first(path: Path, counts: Any, position: Any) -> None:
    hdf5(path, data=counts, positions=position.T)


def master(path: Path, counts: Any, position: Any) -> None:
    with h5py.File(path, "w") as file:
        for number, (start, stop) in enumerate(((0, 12), (12, 24), (24, N)), 9):
            part = path.with_name(f"part_{number}.h5")
            hdf5(part, data=counts[start:stop])
            file[f"entry/data/data_{number}"] = h5py.ExternalLink(part.name, "data")
        file["pos/y"], file["pos/x"] = position.T


def ptyd(path: Path, counts: Any, position: Any) -> None:
    with h5py.File(path, "w") as file:
        for number, rows in enumerate(np.array_split(np.arange(N), 3)):
            file[f"chunks/{number}/data"], file[f"chunks/{number}/positions"] = counts[rows], position[rows]
            file[f"chunks/{number}/weights"] = np.ones((len(rows), PIXELS, PIXELS), "f4")


def matlab_columns(path: Path, counts: Any, position: Any) -> None:
    matlab(path, dp=counts.transpose(1, 2, 0), pos_y=position[:, :1], pos_x=position[:, 1:])


def matlab_pairs(path: Path, counts: Any, position: Any) -> None:
    matlab(path, dp=counts.transpose(1, 2, 0), positions=position)


def matlab_first(path: Path, counts: Any, position: Any) -> None:
    matlab(path, dp=counts, positions=position)


def matlab_5(path: Path, counts: Any, position: Any) -> None:
    arrays = {"dp": counts.transpose(1, 2, 0), "pos_y": position[:, :1], "pos_x": position[:, 1:]}
    with path.open("wb") as file:
        scipy.io.savemat(file, arrays, do_compression=True)


def npz_raster(path: Path, counts: Any, position: Any) -> None:
    y, x = position.reshape(ROWS, COLUMNS, 2).transpose(2, 0, 1)
    with path.open("wb") as file:
        np.savez(file, data=counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS), pos_y=y, pos_x=x)


def npz_raster_compressed(path: Path, counts: Any, position: Any) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, data=counts[:, None], pos_y=position[:, 0], pos_x=position[:, 1])


def npy_folder(path: Path, counts: Any, position: Any) -> None:
    path.mkdir()
    for name, values in (("data", counts), ("pos_y", position[:, 0]), ("pos_x", position[:, 1])):
        np.save(path / f"{name}.npy", values)


def npy_folder_of_a_raster(path: Path, counts: Any, position: Any) -> None:
    path.mkdir()
    np.save(path / "data.npy", counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS).astype(">u2"))
    np.save(path / "positions.npy", position)


def npy_folder_in_fortran_order(path: Path, counts: Any, position: Any) -> None:
    path.mkdir()
    np.save(path / "data.npy", np.asfortranarray(counts.transpose(1, 2, 0)))
    np.save(path / "positions.npy", position)


def zarr_3(path: Path, counts: Any, position: Any) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    raster = counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS)
    group.create_array("entry/data", data=raster, chunks=(2, 3, PIXELS, PIXELS))
    group.create_array("entry/pos_y", data=position[:, 0])
    group.create_array("entry/pos_x", data=position[:, 1])


def zarr_2(path: Path, counts: Any, position: Any) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("data", data=counts[:, None], chunks=(4, 1, PIXELS, PIXELS))
    group.create_array("positions", data=position)


def zarr_2_patterns_last(path: Path, counts: Any, position: Any) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("data", data=counts.transpose(1, 2, 0), chunks=(PIXELS, PIXELS, 9))
    group.create_array("positions", data=position)


WRITERS = (
    npy_folder,
    npy_folder_of_a_raster,
    npy_folder_in_fortran_order,
    zarr_3,
    zarr_2,
    zarr_2_patterns_last,
    raster_maps,
    raster_axes,
    raster_pairs,
    maps,
    single_axis,
    pairs_first,
    master,
    ptyd,
    matlab_columns,
    matlab_pairs,
    matlab_first,
    matlab_5,
    npz_raster,
    npz_raster_compressed,
)
"""Writers of a file in a shape that some program writes."""


def stored_positions(path: Path) -> NDArray[np.float64]:
    stored = np.asarray(open_scan(path).position_yx_px)
    return stored - stored[0]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_proposed_command_stores_what_was_written(
    write: Callable[[Path, Any, Any], None], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts, position = counts_and_positions()
    write(tmp_path / "file.h5", counts, position)
    inspection = inspect_file("file.h5", units="px", domain="counts")
    assert not inspection.refused
    assert inspection.command is not None
    assert run(*shlex.split(inspection.command)[1:], "-q")[0] == 0
    scan = open_scan("file.zarr")
    np.testing.assert_array_equal(scan.diffraction[np.arange(scan.diffraction.shape[0])], counts)
    # Stored positions may be shifted as a whole, never against each other.
    stored = np.asarray(scan.position_yx_px)
    np.testing.assert_allclose(stored - stored[0], position - position[0], atol=1e-9)


KEYS = {"diffraction": "data", "y": "y", "x": "x"}


@pytest.mark.parametrize(
    ("n_frames", "n_positions", "drop", "frames", "positions"),
    [
        (N, N - 2, f"{N - 2}:{N}", range(N - 2), range(N - 2)),
        (N, N - 2, "0,9", [*range(1, 9), *range(10, N)], range(N - 2)),
        (N, N - 2, f"4,{N - 2}:{N}", [*range(4), *range(5, N - 2)], [*range(4), *range(5, N - 2)]),
        (N - 3, N, f"{N - 3}:{N}", range(N - 3), range(N - 3)),
        (N - 3, N, "0:3", range(N - 3), range(3, N)),
    ],
)
def test_dropped_rows_match_frames_and_positions(
    n_frames: int, n_positions: int, drop: str, frames: Any, positions: Any, tmp_path: Path
) -> None:
    counts, position = counts_and_positions()
    y, x = position[:n_positions].T
    hdf5(tmp_path / "file.h5", data=counts[:n_frames], y=y, x=x)
    options: dict[str, Any] = {"keys": KEYS, "domain": "counts", "units": "px"}
    with pytest.raises(
        PtychodaskError, match=f"--drop-frames {min(n_frames, n_positions)}:{max(n_frames, n_positions)}"
    ):
        ingest(tmp_path / "file.h5", tmp_path / "refused.zarr", **options)
    scan = ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", drop_frames=drop, **options)
    np.testing.assert_array_equal(scan.diffraction[np.arange(scan.diffraction.shape[0])], counts[list(frames)])
    stored, expected = np.asarray(scan.position_yx_px), position[list(positions)]
    np.testing.assert_allclose(stored - stored[0], expected - expected[0], atol=1e-9)


def test_a_map_of_other_axes_than_the_raster_is_refused(tmp_path: Path) -> None:
    counts, position = counts_and_positions()
    y, x = position.reshape(ROWS, COLUMNS, 2).transpose(2, 1, 0)
    hdf5(tmp_path / "file.h5", data=counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS), y=y, x=x)
    with pytest.raises(PtychodaskError, match="map of 7 x 5 positions for a raster of 5 x 7 patterns"):
        ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", keys=KEYS, domain="counts", units="px")


def test_a_lost_part_is_named(tmp_path: Path) -> None:
    counts, position = counts_and_positions()
    master(tmp_path / "file.h5", counts, position)
    (tmp_path / "part_10.h5").unlink()
    keys = {"diffraction": "entry/data/data_*", "y": "pos/y", "x": "pos/x"}
    with pytest.raises(PtychodaskError, match="part 10 is missing, found 2 parts from 9 to 11"):
        ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", keys=keys, domain="counts", units="px")


@pytest.mark.parametrize("names", [("real", "imag"), ("r", "i")])
@pytest.mark.parametrize("shape", [(2, 1, PIXELS, PIXELS), (1, 1, 2, PIXELS, PIXELS), (PIXELS, PIXELS, 2)])
def test_probes_are_read_with_modes_and_single_axes_anywhere(
    shape: tuple[int, ...], names: tuple[str, str], tmp_path: Path
) -> None:
    counts, position = counts_and_positions()
    rng = np.random.default_rng(5)
    probe = rng.standard_normal((2, PIXELS, PIXELS)) + 1j * rng.standard_normal((2, PIXELS, PIXELS))
    stored = np.moveaxis(probe, 0, -1) if shape[-1] == 2 else probe.reshape(shape)
    y, x = position.T
    hdf5(tmp_path / "file.h5", data=counts, y=y, x=x, probe=compound(stored, names))
    keys = {**KEYS, "probe": "probe"}
    scan = ingest(
        tmp_path / "file.h5", tmp_path / "scan.zarr", keys=keys, domain="counts", units="px", calibration="as_given"
    )
    assert scan.probe.shape == (2, PIXELS, PIXELS)
    np.testing.assert_allclose(np.asarray(scan.probe), probe, rtol=1e-5)
    assert inspect_file(tmp_path / "file.h5", units="px").options["keys"]["probe"] == "probe"


def test_small_arrays_are_no_patterns(tmp_path: Path) -> None:
    hdf5(tmp_path / "file.h5", monitor=np.ones((2, 2, 2)), data=np.ones((2, 2, 2, 20, 20)))
    inspection = inspect_file(tmp_path / "file.h5")
    assert "n_pixels" not in inspection.options
    assert any("merge its scan axes" in reason for reason in inspection.refused)


def test_a_zarr_with_codecs_that_unpickle_is_refused(tmp_path: Path) -> None:
    zarr_2(tmp_path / "raw", *counts_and_positions())
    described = tmp_path / "raw" / "data" / ".zarray"
    described.write_text(described.read_text().replace('"filters": null', '"filters": [{"id": "pickle"}]'))
    with pytest.raises(PtychodaskError, match=r"raw.*(codecs pickle|cannot be read as Zarr)"):
        inspect_file(tmp_path / "raw")


def test_a_store_is_no_source(tmp_path: Path) -> None:
    counts, position = counts_and_positions()
    hdf5(tmp_path / "file.h5", data=counts, y=position[:, 0], x=position[:, 1])
    ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", keys=KEYS, domain="counts", units="px")
    with pytest.raises(PtychodaskError, match="is a store already"):
        ingest(tmp_path / "scan.zarr", tmp_path / "other.zarr", keys=KEYS, domain="counts", units="px")


def emd(path: Path, counts: NDArray[Any], unit: str, *, is_full: bool) -> None:
    """As py4DSTEM writes: axes of the data beside them, of two values if they are linear."""
    with h5py.File(path, "w") as file:
        file["datacube_root/datacube/data"] = counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS)
        for axis, n in enumerate((ROWS, COLUMNS)):
            name = f"datacube_root/datacube/dim{axis}"
            file[name] = np.arange(n if is_full else 2) * (3.0 + axis)
            file[name].attrs["units"] = unit


@pytest.mark.parametrize(
    ("unit", "metres", "is_full"), [("A", 1e-10, False), ("nm", 1e-9, True), ("[n_m]", 1e-9, True)]
)
def test_the_step_of_an_emd_file_is_proposed(
    unit: str, metres: float, is_full: bool, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts, _ = counts_and_positions()
    emd(tmp_path / "file.h5", counts, unit, is_full=is_full)
    inspection = inspect_file("file.h5", domain="counts", pixel_size_m=metres)
    assert not inspection.refused
    assert inspection.command is not None
    assert run(*shlex.split(inspection.command)[1:], "-q")[0] == 0
    expected = np.indices((ROWS, COLUMNS)).reshape(2, -1).T * [3.0, 4.0]
    np.testing.assert_allclose(stored_positions(tmp_path / "file.zarr"), expected, atol=1e-6)


def test_an_emd_file_without_a_scale_needs_the_step(tmp_path: Path) -> None:
    emd(tmp_path / "file.h5", counts_and_positions()[0], "pixels", is_full=False)
    assert any("--step Y,X" in reason for reason in inspect_file(tmp_path / "file.h5").refused)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS, PIXELS, PIXELS), (N, PIXELS, PIXELS), (N, 1, PIXELS, PIXELS)])
@pytest.mark.parametrize("angle", [None, 90.0, -30.0])
def test_a_step_stands_in_place_of_positions(shape: tuple[int, ...], angle: float | None, tmp_path: Path) -> None:
    counts, _ = counts_and_positions()
    hdf5(tmp_path / "file.h5", data=counts.reshape(shape))
    options: dict[str, Any] = {"keys": {"diffraction": "data"}, "domain": "counts", "units": "px", "step": (3.0, -2.0)}
    if shape[1] != COLUMNS:
        with pytest.raises(PtychodaskError, match="--raster"):
            ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", **options)
        options["raster"] = (ROWS, COLUMNS)
    ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", rotation_deg=angle, **options)
    expected = np.indices((ROWS, COLUMNS)).reshape(2, -1).T * [3.0, -2.0]
    turn = np.deg2rad(angle or 0.0)
    y, x = expected.T
    expected = np.stack([y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)], axis=1)
    np.testing.assert_allclose(stored_positions(tmp_path / "scan.zarr"), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step": (1.0, 0.0)}, "step is"),
        ({"raster": (5, 7)}, "raster has no meaning without step"),
        ({"step": (1.0, 1.0), "raster": (5, 6)}, "leave raster= out"),
        ({"step": (1.0, 1.0), "keys": KEYS}, "step stands in place of positions"),
        ({"step": (1.0, 1.0), "rotation_deg": 3.0, "affine": (1, 0, 0, 1)}, "no affine with it"),
    ],
)
def test_steps_that_cannot_be_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    counts, _ = counts_and_positions()
    hdf5(tmp_path / "file.h5", data=counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS))
    given = {"keys": {"diffraction": "data"}, "domain": "counts", "units": "px"} | options
    with pytest.raises(PtychodaskError, match=reason):
        ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", **given)


def text_of(position: NDArray[np.float64], header: str, delimiter: str) -> str:
    return header + "".join(f"{y}{delimiter}{x}\n" for y, x in position)


@pytest.mark.parametrize("kind", ["pos.csv", "named.csv", "pos.txt", "comment.dat", "pos.npy", "pos.npz", "pos.h5"])
def test_positions_of_a_second_file_are_proposed(
    kind: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts, position = counts_and_positions()
    hdf5(tmp_path / "file.h5", data=counts)
    second = tmp_path / kind
    y, x = position.T
    if kind == "pos.npy":
        np.save(second, position)
    elif kind == "pos.npz":
        np.savez(second, data=np.zeros(3), pos_y=y, pos_x=x)
    elif kind == "pos.h5":
        hdf5(second, stage_y=y, stage_x=x)
    elif kind == "named.csv":
        second.write_text("pos_x,pos_y\n" + "".join(f"{x},{y}\n" for y, x in position))
    else:
        header = "# y x\n" if kind == "comment.dat" else ""
        second.write_text(text_of(position, header, "," if kind == "pos.csv" else " "))
    inspection = inspect_file("file.h5", units="px", domain="counts", positions=kind)
    assert not inspection.refused
    assert inspection.command is not None
    assert run(*shlex.split(inspection.command)[1:], "-q")[0] == 0
    np.testing.assert_allclose(stored_positions(tmp_path / "file.zarr"), position - position[0], atol=1e-9)
    provenance = open_scan("file.zarr").attributes["provenance"]
    assert provenance["second_source"] == str(second)


def test_text_that_is_no_table_is_refused(tmp_path: Path) -> None:
    counts, _ = counts_and_positions()
    hdf5(tmp_path / "file.h5", data=counts)
    for content, reason in (("1 2 3\n4 5 6\n", "3 columns without names"), ("1 2\n3\n", "columns of numbers")):
        (tmp_path / "pos.txt").write_text(content)
        with pytest.raises(PtychodaskError, match=reason):
            inspect_file(tmp_path / "file.h5", positions=tmp_path / "pos.txt")


@pytest.mark.parametrize("names", ["mapping", "ptychopinn"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_labels_are_amplitudes_and_phases(
    names: str, is_compressed: bool, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts, position = counts_and_positions()
    rng = np.random.default_rng(1)
    amp, phase = rng.random((N, PIXELS, PIXELS)), rng.random((N, PIXELS, PIXELS)).astype("f4")
    y, x = position.T
    of_format = names == "ptychopinn"
    keys = ("diffraction", "ycoords", "xcoords") if of_format else ("dp", "pos_y", "pos_x")
    arrays = dict(zip(keys, (counts, y, x), strict=True)) | {"label_amp": amp, "label_phase": phase}
    (np.savez_compressed if is_compressed else np.savez)(tmp_path / "file.npz", **arrays)
    inspection = inspect_file("file.npz", domain="counts", **({} if of_format else {"units": "px"}))
    assert inspection.command is not None
    assert run(*shlex.split(inspection.command)[1:], "-q")[0] == 0
    label = open_scan("file.zarr").label
    assert label is not None
    np.testing.assert_allclose(label[np.arange(N)], amp * np.exp(1j * phase), rtol=1e-5, atol=1e-6)


def test_a_key_that_resembles_a_format_is_no_obstacle(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts, position = counts_and_positions()
    y, x = position.T
    hdf5(tmp_path / "file.h5", diffraction=counts, pos_y=y, pos_x=x)
    inspection = inspect_file("file.h5", units="px", domain="counts")
    assert not inspection.refused
    assert inspection.command is not None
    assert "its keys resemble format 'ptychopinn'" in str(inspection)
    assert run(*shlex.split(inspection.command)[1:], "-q")[0] == 0
    np.testing.assert_allclose(stored_positions(tmp_path / "file.zarr"), position - position[0], atol=1e-9)


@pytest.mark.parametrize("n_bad", [1, 9])
def test_lists_of_bad_rows_are_whole_and_can_be_passed_on(n_bad: int, tmp_path: Path) -> None:
    # More patterns than one shard has, so that bad rows are in several blocks.
    counts, position = counts_and_positions()
    counts, position = np.tile(counts, (40, 1, 1)).astype("f4"), np.tile(position, (40, 1))
    bad = np.linspace(3, len(counts) - 3, n_bad).astype(int)
    counts[bad, 2, 2] = np.nan
    hdf5(tmp_path / "file.h5", data=counts, y=position[:, 0], x=position[:, 1])
    options: dict[str, Any] = {"keys": KEYS, "domain": "counts", "units": "px"}
    with pytest.raises(PtychodaskError, match="not finite") as refusal:
        ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", **options)
    listed = str(refusal.value).split("rows ")[1].split(")")[0]
    assert listed == ",".join(map(str, bad))
    scan = ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", drop_frames=listed, **options)
    assert scan.n_patterns == len(counts) - n_bad


def test_axes_of_a_scan_with_more_frames_than_positions_are_checked(tmp_path: Path) -> None:
    counts, position = counts_and_positions()
    counts, position = np.tile(counts, (2, 1, 1)), np.concatenate([position, position + np.array([15.0, 0.0])])
    y, x = position[2:].T
    hdf5(tmp_path / "file.h5", data=counts, y=y, x=x)
    options: dict[str, Any] = {"keys": KEYS, "domain": "counts", "units": "px", "drop_frames": "0,1"}
    verdict = check_axes(tmp_path / "file.h5", progress=False, **options)
    assert str(verdict)


@pytest.mark.parametrize("is_raster", [False, True])
def test_patterns_of_lost_sources_are_listed_and_can_be_left_out(is_raster: bool, tmp_path: Path) -> None:
    counts, position = counts_and_positions()
    stored = counts.reshape(ROWS, COLUMNS, PIXELS, PIXELS)
    layout = h5py.VirtualLayout((ROWS, COLUMNS, PIXELS, PIXELS) if is_raster else (N, PIXELS, PIXELS), "u2")
    for row in range(ROWS):
        hdf5(tmp_path / f"row_{row}.h5", data=stored[row])
        source = h5py.VirtualSource(f"row_{row}.h5", "data", stored[row].shape)
        layout[row if is_raster else slice(row * COLUMNS, (row + 1) * COLUMNS)] = source
    y, x = position.T
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
        file["y"], file["x"] = (values.reshape(ROWS, COLUMNS) if is_raster else values for values in (y, x))
    (tmp_path / "row_1.h5").unlink()
    (tmp_path / "row_3.h5").unlink()
    options: dict[str, Any] = {"keys": KEYS, "domain": "counts", "units": "px"}
    assert any("--drop-frames 7:14,21:28" in reason for reason in inspect_file(tmp_path / "file.h5", **options).refused)
    with pytest.raises(PtychodaskError, match=r"2 of its source files are missing.*--drop-frames 7:14,21:28"):
        ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", **options)
    scan = ingest(tmp_path / "file.h5", tmp_path / "scan.zarr", drop_frames="7:14,21:28", **options)
    kept = np.setdiff1d(np.arange(N), [*range(7, 14), *range(21, 28)])
    np.testing.assert_array_equal(scan.diffraction[np.arange(len(kept))], counts[kept])
