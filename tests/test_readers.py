"""Each format is read as its users write it, and what it leaves open is asked for."""

from __future__ import annotations

import bz2
import io
import json
import logging
import pickle
import select
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.io import ingest
from ptychodask.io.hdf5_stream import Hdf5File
from ptychodask.scan import Scan

N = 16
RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(20, (9, N, N)).astype(np.uint16)
Y, X = RNG.random((2, 9)) * 30 + 20
PROBE = (RNG.normal(size=(N, N)) + 1j * RNG.normal(size=(N, N))).astype(np.complex64)
OBJECT = (RNG.normal(size=(80, 81)) + 1j).astype(np.complex64)
KEYS = {"diffraction": "dp", "y": "py", "x": "px"}
MAPPED = {"keys": KEYS, "domain": "counts", "units": "px"}


def pinn(**changes: Any) -> dict[str, Any]:
    """A file by PtychoPINN's contract; a change to None leaves a key out."""
    arrays = {
        "diff3d": np.sqrt(COUNTS).astype(np.float32),
        "xcoords": X,
        "ycoords": Y,
        "probeGuess": PROBE,
        "objectGuess": OBJECT,
        "scan_index": np.zeros(9, int),
    } | changes
    return {key: value for key, value in arrays.items() if value is not None}


def foreign(**changes: Any) -> dict[str, Any]:
    return {"dp": COUNTS, "py": Y, "px": X} | changes


def save(folder: Path, arrays: dict[str, Any], *, compressed: bool = True) -> Path:
    path = folder / "source.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def save_hdf5(folder: Path, arrays: dict[str, Any], **options: Any) -> Path:
    path = folder / "source.h5"
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, **(options if np.ndim(values) > 2 else {}))
    return path


def read(path: Path, **options: Any) -> Scan:
    return ingest(path, path.parent / "scan.zarr", progress=False, overwrite=True, **options)


def in_file_order(scan: Scan) -> np.ndarray:
    return scan.diffraction[np.argsort(scan.source_index)]


# PtychoPINN


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("key", ["diff3d", "diffraction"])
def test_a_ptychopinn_file_is_read_by_its_contract(tmp_path, key, compressed):
    arrays = pinn()
    arrays[key] = arrays.pop("diff3d")
    scan = read(save(tmp_path, arrays, compressed=compressed))
    assert (scan.domain, scan.calibration) == ("amplitude", "as_given")
    np.testing.assert_array_equal(in_file_order(scan), np.sqrt(COUNTS).astype(np.float32))
    np.testing.assert_array_equal(scan.position_yx_px, np.stack([Y, X], axis=1)[scan.source_index])
    np.testing.assert_array_equal(scan.probe, PROBE[None])
    np.testing.assert_array_equal(scan.truth.object, OBJECT)
    assert scan.truth.corner_yx_px == (0, 0)
    assert scan.attributes["provenance"]["reader"] == "ptychopinn"


@pytest.mark.parametrize("fortran", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_order_of_axes_in_the_file_does_not_matter(tmp_path, legacy, compressed, fortran):
    patterns = COUNTS.transpose(1, 2, 0) if legacy else COUNTS
    patterns = np.asfortranarray(patterns) if fortran else np.ascontiguousarray(patterns)
    scan = read(save(tmp_path, pinn(diff3d=patterns), compressed=compressed), domain="counts")
    np.testing.assert_array_equal(in_file_order(scan), COUNTS)


def test_an_ambiguous_order_of_axes_is_asked_for(tmp_path):
    patterns = np.arange(8.0**3, dtype=np.float32).reshape(8, 8, 8)
    path = save(tmp_path, {"diff3d": patterns, "xcoords": X[:8], "ycoords": Y[:8]})
    with pytest.raises(PtychodaskError, match=r"\(8, 8, 8\) with 8 positions fit two orders.*axes='pattern,qy,qx'"):
        read(path)
    np.testing.assert_array_equal(in_file_order(read(path, axes="pattern,qy,qx")), patterns)
    np.testing.assert_array_equal(in_file_order(read(path, axes="qy,qx,pattern")), patterns.transpose(2, 0, 1))


def test_integers_are_not_taken_for_amplitudes_or_counts_unasked(tmp_path):
    path = save(tmp_path, pinn(diff3d=COUNTS))
    with pytest.raises(
        PtychodaskError, match="patterns are uint16, which may be counts or amplitudes; pass domain='counts'"
    ):
        read(path)
    assert read(path, domain="counts").domain == "counts"
    assert read(path, domain="amplitude").domain == "amplitude"


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        (pinn(diff3d=np.zeros((3, N, N, 4), np.float32)), r"diff3d has shape \(3, 16, 16, 4\)"),
        ({"X_full": np.zeros((3, N, N, 4), np.float32), "nn_indices": np.zeros((3, 4))}, "it has the key 'X_full'"),
    ],
)
def test_a_grouped_file_is_refused_with_the_way_out(tmp_path, arrays, what):
    with pytest.raises(PtychodaskError, match=f"already grouped .{what}.; ingest the ungrouped scan"):
        read(save(tmp_path, arrays))


@pytest.mark.parametrize("shape", [(N, N), (1, N, N), (N, N, 1), (2, N, N)])
def test_a_probe_is_read_in_all_its_shapes(tmp_path, shape):
    probe = np.broadcast_to(PROBE[..., None] if shape == (N, N, 1) else PROBE, shape)
    scan = read(save(tmp_path, pinn(probeGuess=probe)))
    np.testing.assert_array_equal(scan.probe, np.broadcast_to(PROBE, (2 if shape[0] == 2 else 1, N, N)))


@pytest.mark.parametrize(
    ("guess", "reason"),
    [
        (np.ones((80, 80), complex), "constant"),
        (OBJECT[:40], "does not cover the scan"),
        (np.full((80, 80), np.nan, complex), "not finite"),
    ],
)
def test_an_object_that_is_no_truth_is_left_out(tmp_path, caplog, guess, reason):
    with caplog.at_level(logging.INFO):
        assert read(save(tmp_path, pinn(objectGuess=guess))).truth is None
    assert reason in caplog.text


@pytest.mark.parametrize("compressed", [True, False])
def test_labels_travel_with_their_patterns(tmp_path, compressed):
    label = (COUNTS[..., None] * (1 - 2j)).astype(np.complex128)
    scan = read(save(tmp_path, pinn(Y=label), compressed=compressed), drop_frames="4")
    np.testing.assert_array_equal(scan.label[slice(None)], label[scan.source_index, :, :, 0].astype(np.complex64))
    assert scan.label.dtype == np.complex64


class Canary:
    """Its unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_metadata_are_read_around_and_never_unpickled(tmp_path):
    canary = tmp_path / "unpickled"
    path = save(tmp_path, pinn(_metadata=np.array(Canary(canary), dtype=object)))
    assert read(path).n_patterns == 9
    assert not canary.exists()
    with np.load(path, allow_pickle=True) as archive:
        archive["_metadata"]
    assert canary.exists()  # the trap works


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("diff3d", "values have type object, expected numbers"),
        ("xcoords", "contains pickled Python objects, which are never loaded"),
        ("probeGuess", "contains pickled Python objects, which are never loaded"),
    ],
)
def test_a_pickled_array_that_is_needed_is_refused(tmp_path, key, message):
    with pytest.raises(PtychodaskError, match=message):
        read(save(tmp_path, pinn(**{key: np.full((9, N, N), {"a": 1}, dtype=object)})))


def test_a_missing_key_is_named_with_the_keys_that_are_there(tmp_path):
    with pytest.raises(PtychodaskError, match="key 'xcoords' is missing; keys found: diff3d, ycoords, probeGuess"):
        read(save(tmp_path, pinn(xcoords=None)))


def test_lines64_reproduces_its_amplitudes_from_truth_and_probe(shared, tmp_path):
    scan = ingest(shared / "data" / "lines64_train.npz", tmp_path / "scan.zarr", progress=False)
    chosen = np.arange(0, scan.n_patterns, 25)
    measured = scan.amplitude(chosen)
    corner = scan.position_yx_px[chosen] - scan.n_pixels / 2
    exits = np.stack([scan.probe[0] * bilinear_patch(scan.truth.object, c, scan.n_pixels) for c in corner])
    predicted = np.abs(np.fft.fftshift(np.fft.fft2(exits, norm="ortho"), axes=(1, 2)))
    # The file's own simulator interpolates too; a wrong axis, sign or half pixel gives 0.05 and more.
    assert np.abs(predicted - measured).sum() / measured.sum() < 0.02


def bilinear_patch(image: np.ndarray, corner_yx: np.ndarray, n: int) -> np.ndarray:
    (y, x), (fy, fx) = np.floor(corner_yx).astype(int), corner_yx % 1
    rows = (1 - fy) * image[y : y + n] + fy * image[y + 1 : y + n + 1]
    return (1 - fx) * rows[:, x : x + n] + fx * rows[:, x + 1 : x + n + 1]


# The archive of tike's tests


def tike_arrays() -> dict[str, Any]:
    return {
        "data": np.fft.ifftshift(COUNTS, axes=(1, 2)).astype(np.float32)[None],
        "scan": np.stack([Y, X], axis=1).astype(np.float32)[None],
        "probe": PROBE[None, None, None, None],
    }


@pytest.mark.parametrize("packed", [True, False])
def test_a_tike_archive_has_its_direct_beam_moved_to_the_middle(tmp_path, packed):
    path = save(tmp_path, tike_arrays(), compressed=False)
    if packed:
        packed_path = tmp_path / "source.npz.bz2"
        packed_path.write_bytes(bz2.compress(path.read_bytes()))
        path = packed_path
    scan = read(path)
    assert (scan.domain, scan.calibration) == ("counts", "mean_counts")
    np.testing.assert_array_equal(in_file_order(scan), COUNTS)
    np.testing.assert_allclose(scan.position_yx_px, np.stack([Y, X], 1)[scan.source_index], rtol=1e-6)
    assert scan.attributes["provenance"]["reader"] == "tike"


def test_many_angles_are_refused(tmp_path):
    arrays = tike_arrays() | {"data": np.ones((2, 9, N, N), np.float32)}
    with pytest.raises(PtychodaskError, match=r"shape \(2, 9, 16, 16\), expected one angle"):
        read(save(tmp_path, arrays))


def test_the_siemens_star_is_lit_as_its_readme_says(shared, tmp_path):
    scan = ingest(shared / "data" / "siemens-star-small.npz.bz2", tmp_path / "scan.zarr", progress=False)
    assert (scan.n_patterns, scan.n_pixels) == (516, 128)
    assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(scan.attributes["mean_counts"], rel=1e-5)
    flat = np.abs(np.fft.fftshift(np.fft.fft2(scan.probe[0], norm="ortho")))
    measured = scan.amplitude(np.arange(0, 516, 10))
    # A flat object with the guessed probe has R 0.45; a wrong place of the direct beam gives more than 1.
    assert np.abs(flat - measured).sum() / measured.sum() == pytest.approx(0.45, abs=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.zarr"]


# Any NPZ or HDF5 by a mapping of keys


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (1, N, N)}, {"chunks": (4, N, N), "compression": "gzip"}, {"chunks": (4, 8, 8), "shuffle": True}],
)
@pytest.mark.parametrize("last", [True, False])
def test_hdf5_is_read_in_every_layout(tmp_path, options, last):
    patterns = COUNTS
    if last:
        patterns = np.ascontiguousarray(COUNTS.transpose(1, 2, 0))
        options = {key: value[1:] + value[:1] if key == "chunks" else value for key, value in options.items()}
    path = save_hdf5(tmp_path, {"entry/dp": patterns, "py": Y, "px": X}, **options)
    scan = read(path, **(MAPPED | {"keys": KEYS | {"diffraction": "entry/dp"}}))
    np.testing.assert_array_equal(in_file_order(scan), COUNTS)
    np.testing.assert_array_equal(scan.position_yx_px, np.stack([Y, X], 1)[scan.source_index])


def test_a_chunk_of_many_frames_is_decompressed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ptychodask.io.raw.BLOCK_BYTES", 6 * COUNTS[0].nbytes)
    path = save_hdf5(tmp_path, foreign(), chunks=(4, N, N), compression="gzip")
    with ExitStack() as stack:
        source = Hdf5File(stack.enter_context(path.open("rb")), str(path), tmp_path, stack).frames("dp")
        assert not source.random_access
        blocks = list(source.blocks())
    assert [len(block) for block in blocks] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), COUNTS)


def test_a_packed_hdf5_is_read_too(tmp_path):
    packed = tmp_path / "source.h5.bz2"
    packed.write_bytes(bz2.compress(save_hdf5(tmp_path, foreign()).read_bytes()))
    np.testing.assert_array_equal(in_file_order(read(packed, **MAPPED)), COUNTS)


def test_the_unit_beside_a_dataset_is_honoured(tmp_path):
    path = save_hdf5(tmp_path, foreign())
    with h5py.File(path, "a") as file:
        file["py"].attrs["units"] = "um"
    scan = read(path, keys=KEYS, domain="counts", pixel_size_m=2e-8)
    np.testing.assert_allclose(scan.position_yx_px[:, 0], Y[scan.source_index] * 50)


def test_positions_may_be_one_array_and_be_flipped_and_swapped(tmp_path):
    path = save(tmp_path, {"dp": COUNTS, "pos": np.stack([X, Y], axis=1)})
    keys = {"diffraction": "dp", "position": "pos"}
    scan = read(path, keys=keys, domain="counts", units="px", swap_xy=True, flip_y=True)
    np.testing.assert_array_equal(scan.position_yx_px, np.stack([-Y, X], axis=1)[scan.source_index])
    scan = read(path, keys=keys, domain="counts", units="px", flip_x=True)
    np.testing.assert_array_equal(scan.position_yx_px, np.stack([X, -Y], axis=1)[scan.source_index])


def test_everything_that_can_be_mapped_is_read(tmp_path):
    mask = np.ones((N, N), np.uint8)
    mask[1, 2] = 0
    extra = {
        "p": PROBE[None],
        "m": mask,
        "o": OBJECT,
        "l": COUNTS * 1j,
        "f": 1.0 + np.arange(9),
        "s": np.arange(9) // 5,
    }
    names = {"probe": "p", "mask": "m", "object": "o", "label": "l", "flux": "f", "scan_index": "s"}
    scan = read(save(tmp_path, foreign(**extra)), **(MAPPED | {"keys": KEYS | names, "calibration": "as_given"}))
    rows = scan.source_index
    np.testing.assert_array_equal(scan.probe, PROBE[None])
    np.testing.assert_array_equal(scan.mask, mask.astype(bool))
    np.testing.assert_array_equal(scan.truth.object, OBJECT)
    np.testing.assert_array_equal(scan.label[slice(None)], (COUNTS * 1j)[rows])
    np.testing.assert_allclose(scan.flux, (1.0 + rows) / 5, rtol=1e-6)
    np.testing.assert_array_equal(scan.scan_index, rows // 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": None}, "'dp' may contain counts or amplitudes; pass domain='counts'"),
        (
            {"units": None},
            r"the unit of the positions 'py' is not recorded, expected one of: px, m, .*units=",
        ),
        ({"units": "s"}, "units is 's'"),
        ({"keys": KEYS | {"y": "yy"}}, "key 'yy' is missing; keys found: dp, py, px"),
        (
            {"keys": {"diffraction": "dp", "y": "py"}},
            r"keys= names diffraction, y, expected.*, or a raster's step=",
        ),
        ({"keys": KEYS | {"position": "py"}}, "expected 'diffraction' and either 'y' and 'x' or 'position'"),
        ({"keys": KEYS | {"prob": "p"}}, "keys has the unknown name 'prob', expected some of: diffraction, y, x"),
        ({"keys": None, "format": "mapping"}, r"keys= names \(none\).*keys found in the file: dp, py, px"),
        ({"keys": None}, r"its keys match no known format; keys found: dp, py, px; map them with keys="),
        ({"units": "um"}, "positions are in um, but the size of an object pixel is unknown; pass pixel_size_m="),
        ({"keys": KEYS | {"object": "dp"}, "flip_y": True}, "key 'object' needs positions in object pixels"),
        ({"keys": KEYS | {"mask": "dp"}}, r"the mask has shape \(9, 16, 16\)"),
        ({"keys": KEYS | {"label": "py"}}, r"\[py\]: has shape \(9,\), expected \(pattern, qy, qx\)"),
        ({"keys": KEYS | {"x": "dp"}}, r"values have shape \(9, 16, 16\)"),
        ({"keys": KEYS | {"diffraction": "py"}}, r"patterns have shape \(9,\), expected \(pattern, qy, qx\)"),
    ],
)
@pytest.mark.parametrize("hdf5", [True, False])
def test_a_mapping_that_leaves_something_open_is_refused(tmp_path, hdf5, options, message):
    path = (save_hdf5 if hdf5 else save)(tmp_path, foreign())
    if hdf5:
        message = message.replace("dp, py, px", "dp, px, py")
    with pytest.raises(PtychodaskError, match=message):
        read(path, **(MAPPED | options))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (pinn(), {"dc": "corner"}, "dc does not apply to format 'ptychopinn'"),
        (pinn(), {"units": "m"}, "units does not apply to format 'ptychopinn'"),
        (tike_arrays(), {"domain": "counts"}, "domain does not apply to format 'tike'"),
        (tike_arrays(), {"format": "ptychopinn"}, "key 'diff3d' is missing; keys found: data, scan, probe"),
        (pinn(), {"format": "pinn"}, "format is 'pinn', expected one of: ptychopinn, tike, "),
    ],
)
def test_an_option_without_meaning_for_the_format_is_refused(tmp_path, arrays, options, message):
    with pytest.raises(PtychodaskError, match=message):
        read(save(tmp_path, arrays), **options)


# Files that are not what they should be


def test_no_such_file_and_no_file_at_all_are_refused(tmp_path):
    for name, message in (("none.npz", "no such file"), ("folder", "is a folder, expected an NPZ or HDF5")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(PtychodaskError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"just text", "expected an NPZ or HDF5 file"),
        (b"PK\x03\x04 and no more", "truncated or damaged: copy it again"),
        (b"\x89HDF\r\n\x1a\n and no more", "truncated or damaged: copy it again"),
        (b"BZh9 and no more", "truncated or damaged: copy it again"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "source.npz"
    path.write_bytes(content)
    with pytest.raises(PtychodaskError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def damaged_files(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    plain = save(folder, pinn(), compressed=False).read_bytes()
    return [
        (plain, {}),
        (save(folder, pinn()).read_bytes(), {}),
        (save(folder, pinn(diff3d=COUNTS.transpose(1, 2, 0))).read_bytes(), {"domain": "counts"}),
        (save_hdf5(folder, foreign(), compression="gzip", fletcher32=True).read_bytes(), MAPPED),
        (bz2.compress(plain), {}),
    ]


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    source = tmp_path / "cut"
    for content, options in damaged_files(tmp_path):
        for share in (0.01, 0.3, 0.9, 0.999):
            source.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(PtychodaskError, match="copy it again"):
                read(source, **options)
    assert not (tmp_path / "scan.zarr").exists()


def test_flipped_bytes_end_in_a_scan_or_in_one_clear_line(tmp_path):
    rng = np.random.default_rng(5)
    source, refusals = tmp_path / "flipped", []
    for content, options in damaged_files(tmp_path):
        for _ in range(25):
            flipped = bytearray(content)
            for place in rng.integers(0, len(content), 3):
                flipped[place] ^= 1 << int(rng.integers(8))
            source.write_bytes(flipped)
            try:
                read(source, **options)
            except PtychodaskError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in refusal for refusal in refusals)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"scan.zarr", "flipped", "source.npz", "source.h5"}


def test_a_header_that_announces_more_than_the_file_holds_allocates_nothing(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 1024, 1024)})
    path = save(tmp_path, pinn(diff3d=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("diff3d.npy", header.getvalue() + bytes(800))
    with pytest.raises(PtychodaskError, match="take 8388608000000000 bytes, found 800; the file is truncated"):
        read(path)


def test_pickles_in_the_middle_of_nowhere_are_no_arrays(tmp_path):
    path = save(tmp_path, pinn())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ycoords.txt", pickle.dumps([1, 2]))
    assert read(path).n_patterns == 9


WRITER = """
import sys
import h5py
import numpy as np
path, mode, arrays = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
with h5py.File(path, "w", libver="latest") as file:
    for key, values in arrays.items():
        file.create_dataset(key, data=values, maxshape=(None, *values.shape[1:]), chunks=(1, *values.shape[1:]))
    file.flush()
    if mode == "swmr":
        file.swmr_mode = True
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def written_by_another(path: Path, mode: str = "plain") -> Iterator[None]:
    """An HDF5 file that another process has open for writing, as during an acquisition."""
    arrays = save(path.parent, foreign())
    command = [sys.executable, "-c", WRITER, str(path), mode, str(arrays)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        yield
        writer.communicate()


def test_a_file_locked_by_its_writer_is_refused_as_such(tmp_path: Path) -> None:
    with (
        written_by_another(tmp_path / "held.h5"),
        pytest.raises(PtychodaskError, match=r"held\.h5: another program is writing it and has locked it; wait"),
    ):
        ingest(tmp_path / "held.h5", tmp_path / "scan.zarr", **MAPPED)
    assert ingest(tmp_path / "held.h5", tmp_path / "scan.zarr", **MAPPED).n_patterns == 9


def test_a_file_in_swmr_mode_is_read_as_far_as_it_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with written_by_another(tmp_path / "grows.h5", "swmr"):
        scan = ingest(tmp_path / "grows.h5", tmp_path / "scan.zarr", **MAPPED)
        np.testing.assert_array_equal(np.sort(scan.diffraction[:], axis=0), np.sort(COUNTS, axis=0))
    assert "only what is written so far is read" in caplog.text


def test_a_file_whose_writer_crashed_names_the_command_that_clears_it(tmp_path: Path) -> None:
    path = tmp_path / "crashed.h5"
    code = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'w', libver='latest'); f['dp'] = 1; f.flush(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    with pytest.raises(PtychodaskError, match=r"marked as open for writing.*h5clear -s .*crashed\.h5"):
        ingest(path, tmp_path / "scan.zarr", **MAPPED)


@pytest.mark.parametrize("reference", ["external link", "virtual dataset"])
def test_a_part_that_its_writer_holds_is_not_called_missing_and_not_read_as_zeros(
    tmp_path: Path, reference: str
) -> None:
    with h5py.File(tmp_path / "master.h5", "w", libver="latest") as master:
        if reference == "external link":
            master["dp"] = h5py.ExternalLink("part.h5", "dp")
        else:
            layout = h5py.VirtualLayout(COUNTS.shape, COUNTS.dtype)
            layout[:] = h5py.VirtualSource("part.h5", "dp", COUNTS.shape)
            master.create_virtual_dataset("dp", layout)
        master["py"], master["px"] = Y, X
    with (
        written_by_another(tmp_path / "part.h5"),
        pytest.raises(PtychodaskError, match=r"part\.h5: another program is writing it"),
    ):
        ingest(tmp_path / "master.h5", tmp_path / "scan.zarr", **MAPPED)
    assert ingest(tmp_path / "master.h5", tmp_path / "scan.zarr", **MAPPED).n_patterns == 9


def test_a_disk_without_locks_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> h5py.File:
        # What h5py raises on a network disk without locks, which needs such a disk.
        raise OSError(37, "[Errno 37] Unable to synchronously open file (unable to lock file, errno = 37)")

    path = save_hdf5(tmp_path, foreign())
    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(PtychodaskError, match=r"no file locks.*HDF5_USE_FILE_LOCKING=FALSE"):
        ingest(path, tmp_path / "scan.zarr", **MAPPED)


def test_hdf5_files_open_where_select_takes_sockets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unix = select.select

    def windows(*lists: Any) -> Any:
        if not all(isinstance(each, socket.socket) for each in (*lists[0], *lists[1], *lists[2])):
            raise OSError(10038, "An operation was attempted on something that is not a socket")
        return unix(*lists)

    monkeypatch.setattr(select, "select", windows)
    assert ingest(save_hdf5(tmp_path, foreign()), tmp_path / "scan.zarr", **MAPPED).n_patterns == 9


@pytest.mark.parametrize("as_array", [np.array, lambda text: np.array([text]), lambda text: np.array(text.encode())])
def test_a_metadata_text_is_recorded(tmp_path: Path, as_array: Any) -> None:
    text = json.dumps({"sample": "Siemens star", "dwell_s": 0.1})
    scan = ingest(save(tmp_path, pinn(_metadata=as_array(text))), tmp_path / "scan.zarr")
    assert scan.attributes["provenance"]["metadata"] == {"sample": "Siemens star", "dwell_s": 0.1}


@pytest.mark.parametrize("content", ["no JSON", "[1, 2]", "[" * 100_000, " " * 2**20])
def test_metadata_of_another_form_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    scan = ingest(save(tmp_path, pinn(_metadata=np.array(content))), tmp_path / "scan.zarr")
    assert "metadata" not in scan.attributes["provenance"]
    assert "source.npz[_metadata]: is left out, expected one JSON object" in caplog.text


def test_a_missing_probe_is_not_replaced_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ingest(save(tmp_path, pinn(probeGuess=None)), tmp_path / "scan.zarr")
    assert "source.npz: has no probe, so one is estimated from the mean pattern; pass probe= (--probe)" in caplog.text
    caplog.clear()
    ingest(save(tmp_path, pinn(probeGuess=None)), tmp_path / "asked.zarr", probe="estimate")
    assert "has no probe" not in caplog.text


EMPTY = {"no patterns": {"dp": COUNTS[:0], "py": Y[:0], "px": X[:0]}, "no pixels": {"dp": COUNTS[:, :0, :0]}}
EMPTY |= {"null patterns": {"dp": h5py.Empty("u2")}, "null positions": {"py": h5py.Empty("f8")}}
EMPTY |= {"no positions": {"py": Y[:0]}, "no probe": {"probe": PROBE[None][:0]}, "zero probe": {"probe": 0 * PROBE}}
REFUSED = {
    "no patterns": r"dp\]: has shape \(0, 16, 16\), expected \(pattern, qy, qx\), none of them 0",
    "no pixels": r"dp\]: has shape \(9, 0, 0\)",
    "null patterns": r"dp\]: patterns have shape \(\)",
    "null positions": r"py\]: is an empty dataset \(a null dataspace\), expected numbers",
    "no positions": r"9 patterns but 0 positions|0 .* but 9",
    "no probe": r"probe\]: the probe has shape \(0, 16, 16\)",
    "zero probe": r"its probe is zero everywhere; pass probe='estimate' \(--probe estimate\)",
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_arrays_are_refused_by_name(tmp_path: Path, case: str) -> None:
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        for key, values in (foreign() | EMPTY[case]).items():
            file.create_dataset(key, data=values)
    keys = KEYS | ({"probe": "probe"} if "probe" in EMPTY[case] else {})
    with pytest.raises(PtychodaskError, match=REFUSED[case]):
        ingest(tmp_path / "empty.h5", tmp_path / "scan.zarr", **MAPPED | {"keys": keys})


@pytest.mark.parametrize("n_patterns", [0, 3])
def test_a_cxi_without_patterns_or_finite_positions_is_refused(tmp_path: Path, n_patterns: int) -> None:
    with h5py.File(tmp_path / "empty.cxi", "w") as file:
        file["entry_1/instrument_1/detector_1/data"] = COUNTS[:n_patterns]
        file["entry_1/sample_1/geometry_1/translation"] = np.full((n_patterns, 3), np.nan)
    with pytest.raises(PtychodaskError):
        ingest(tmp_path / "empty.cxi", tmp_path / "scan.zarr", energy_ev=8000.0, distance_m=1.0, detector_pixel_m=1e-4)
