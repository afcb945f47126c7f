"""Damaged and hostile files for every reader: each is read, or refused in one line.

    python -m tests.campaigns.fuzz --inputs 20000

A child process mutates small valid files of each kind and reads them;
this process watches it: a crash of the interpreter, an input that takes more than 10 s, memory that grows by more than
1 GB, a file outside the folder of the input, and any exception that is no `PtychodaskError` of one line are finds. The
inputs of finds are kept in ``--keep``. An input follows from the seed and its number alone.
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import scipy.io
import zarr

sys.path.insert(0, str(Path(__file__).parents[1]))

from foreign_files import measured, write_hxn, write_nexus, write_patterns, write_product
from models_for_tests import LinearModel

import ptychodask
from ptychodask.errors import PtychodaskError
from ptychodask.io import read_foreign_result
from ptychodask.models import ModelSpec, Optics, load_model, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.patch_cache import StoredPatches, check_patches
from ptychodask.result import open_result
from ptychodask.storage.location import parse_location
from ptychodask.store import StoredScan, open_scan
from ptychodask.study import read_study
from ptychodask.training.checkpoint import Checkpoint, Snapshot

N = 16
N_PATTERNS = 12
RASTER = (3, 4)
PRISTINE = "pristine"
WHOLE_SHARE = 0.15
DEPTH = 5000
HANG_S = 10.0
GROWTH_BYTES = 10**9
EXTREMES = (0, -1, 1, 2, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**12, 10**30, 1e308, float("nan"), float("inf"), 0.5)
ODD = (
    "",
    "x" * 5000,
    "../../evil",
    "/tmp/evil",
    "\n\n",
    "pickle",
    None,
    True,
    [],
    {},
    [[[[[[[[]]]]]]]],
    "@deep@",
    {"id": "pickle"},
    {"name": "numcodecs.pickle", "configuration": {}},
    [{"id": "vlen-utf8"}, {"id": "pickle"}],
    "float128",
    "|O",
)


class Kind(NamedTuple):
    """Files of one kind, and what reads them."""

    make: Callable[[Path], None]
    """Writes a valid one into a folder."""

    read: Callable[[Path], Any]
    """Reads what lies in a folder."""

    share: int
    """How many of a hundred inputs are of this kind."""


def arrays() -> dict[str, Any]:
    """A scan by PtychoPINN's contract."""
    rng = np.random.default_rng(0)
    return {
        "diff3d": np.sqrt(rng.poisson(20, (N_PATTERNS, N, N))).astype(np.float32),
        "xcoords": rng.random(N_PATTERNS) * 30 + 20,
        "ycoords": rng.random(N_PATTERNS) * 30 + 20,
        "probeGuess": (rng.normal(size=(N, N)) + 1j).astype(np.complex64),
        "objectGuess": (rng.normal(size=(80, 81)) + 1j).astype(np.complex64),
        "scan_index": np.zeros(N_PATTERNS, int),
    }


def make_npz(folder: Path) -> None:
    np.savez(folder / "source.npz", **arrays())


def make_compressed_npz(folder: Path) -> None:
    np.savez_compressed(folder / "source.npz", **arrays())


def make_tike(folder: Path) -> None:
    found, packed = arrays(), io.BytesIO()
    position = np.stack([found["ycoords"], found["xcoords"]], axis=1)
    np.savez(
        packed,
        data=np.fft.fftshift(found["diff3d"] ** 2, axes=(1, 2))[None],
        scan=position[None].astype(np.float32),
        probe=found["probeGuess"][None, None, None, None],
    )
    (folder / "source.npz.bz2").write_bytes(bz2.compress(packed.getvalue()))


def make_hdf5(folder: Path) -> None:
    found = arrays()
    with h5py.File(folder / "source.h5", "w") as file:
        counts = np.rint(found["diff3d"] ** 2).astype(np.uint16)
        file.create_dataset("entry/data", data=counts, chunks=(1, N, N), compression="gzip")
        file["entry/y"], file["entry/x"] = found["ycoords"] * 1e-8, found["xcoords"] * 1e-8
        file["entry/y"].attrs["units"] = "m"


def make_filtered_hdf5(folder: Path) -> None:
    """As `make_hdf5`, through the filters of the HDF5 library that have a history."""
    found = arrays()
    counts = np.rint(found["diff3d"] ** 2).astype(np.uint16)
    with h5py.File(folder / "source.h5", "w") as file:
        file.create_dataset("entry/data", data=counts, chunks=(4, N, N), scaleoffset=0)
        for axis in "yx":
            values = found[f"{axis}coords"]
            file.create_dataset(
                f"entry/{axis}", data=values * 1e-8, chunks=(5,), compression="lzf", shuffle=True, fletcher32=True
            )
        file["entry/y"].attrs["units"] = "m"


def make_packed_hdf5(folder: Path) -> None:
    make_hdf5(folder)
    path = folder / "source.h5"
    (folder / "source.h5.bz2").write_bytes(bz2.compress(path.read_bytes()))
    path.unlink()


def make_cxi(folder: Path) -> None:
    found = arrays()
    with h5py.File(folder / "source.cxi", "w") as file:
        entry = file.create_group("entry_1")
        entry["data_1/data"] = np.rint(found["diff3d"] ** 2).astype(np.int32)
        x, y = found["xcoords"], found["ycoords"]
        entry["data_1/translation"] = np.stack([x, y, 0 * y], axis=1) * 1e-8
        entry["instrument_1/detector_1/mask"] = np.zeros((N, N), np.int32)
        entry["instrument_1/detector_1/distance"] = 2.0
        entry["instrument_1/detector_1/x_pixel_size"] = entry["instrument_1/detector_1/y_pixel_size"] = 1e-4
        entry["instrument_1/source_1/energy"] = 1.4e-15
        entry["y"], entry["x"] = y, x


def make_nexus(folder: Path) -> None:
    write_nexus(folder / "source.nxs", measured(N_PATTERNS, N), raster=(3, 4))


def make_linked_nexus(folder: Path) -> None:
    """As `make_nexus`, its patterns behind a link to a file that is damaged as well."""
    write_nexus(folder / "source.nxs", measured(N_PATTERNS, N), link=folder / "frames.h5")


def make_two_files(folder: Path) -> None:
    """A product of Ptychodus and its patterns."""
    write_product(folder / "product.h5", measured(N_PATTERNS, N))
    write_patterns(folder / "diffraction.h5", measured(N_PATTERNS, N))


def make_hxn(folder: Path) -> None:
    write_hxn(folder / "source.h5", measured(N_PATTERNS, N))


def scan_by_hand() -> tuple[np.ndarray, np.ndarray]:
    """Counts (pattern, N, N) and positions (pattern, 2) of a raster, no two alike."""
    rng = np.random.default_rng(1)
    position = np.stack(np.unravel_index(np.arange(N_PATTERNS), RASTER), axis=1) * [3.0, 2.5] + 20
    return rng.poisson(20, (N_PATTERNS, N, N)).astype(np.uint16), position


def make_raster(folder: Path) -> None:
    """Patterns with two axes of the scan, and maps of positions."""
    counts, position = scan_by_hand()
    y, x = position.reshape(*RASTER, 2).transpose(2, 0, 1)
    with h5py.File(folder / "source.h5", "w") as file:
        file["data"], file["pos_y"], file["pos_x"] = counts.reshape(*RASTER, N, N), y, x


def make_parts(folder: Path) -> None:
    """A master file with links to numbered parts."""
    counts, position = scan_by_hand()
    with h5py.File(folder / "source.h5", "w") as file:
        for number, rows in enumerate(np.array_split(np.arange(N_PATTERNS), 3), 1):
            with h5py.File(folder / f"part_{number}.h5", "w") as part:
                part["data"] = counts[rows]
            file[f"data_{number}"] = h5py.ExternalLink(f"part_{number}.h5", "data")
        file["pos_y"], file["pos_x"] = position.T


def make_virtual(folder: Path) -> None:
    """A virtual dataset of two files."""
    counts, position = scan_by_hand()
    layout, half = h5py.VirtualLayout(counts.shape, counts.dtype), N_PATTERNS // 2
    for number in range(2):
        rows = slice(number * half, (number + 1) * half)
        with h5py.File(folder / f"part_{number}.h5", "w") as part:
            part["data"] = counts[rows]
        layout[rows] = h5py.VirtualSource(f"part_{number}.h5", "data", (half, N, N))
    with h5py.File(folder / "source.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
        file["pos_y"], file["pos_x"] = position.T


def make_matlab_7(folder: Path) -> None:
    """MATLAB 7.3: a header before HDF5, and every array with its axes reversed."""
    counts, position = scan_by_hand()
    with h5py.File(folder / "source.h5", "w", userblock_size=512) as file:
        file["data"], file["positions"] = counts.transpose(1, 2, 0).T, position.T
    with (folder / "source.h5").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def make_matlab_5(folder: Path) -> None:
    counts, position = scan_by_hand()
    arrays = {"data": counts.transpose(1, 2, 0), "pos_y": position[:, :1], "pos_x": position[:, 1:]}
    scipy.io.savemat(folder / "source.mat", arrays, do_compression=True)


def make_npy_folder(folder: Path) -> None:
    counts, position = scan_by_hand()
    (folder / "source").mkdir()
    np.save(folder / "source" / "data.npy", counts[:, None])
    np.save(folder / "source" / "positions.npy", position)


def make_foreign_zarr(folder: Path) -> None:
    counts, position = scan_by_hand()
    group = zarr.open_group(folder / "source", mode="w", zarr_format=2)
    group.create_array("data", data=counts.reshape(*RASTER, N, N), chunks=(1, 2, N, N))
    group.create_array("positions", data=position)


def make_table(folder: Path) -> None:
    """Patterns, and their positions as text."""
    counts, position = scan_by_hand()
    with h5py.File(folder / "source.h5", "w") as file:
        file["data"] = counts
    (folder / "table.csv").write_text("pos_y,pos_x\n" + "".join(f"{y},{x}\n" for y, x in position))


def make_recipe(folder: Path) -> None:
    make_hdf5(folder)
    keys = "keys: {diffraction: entry/data, y: entry/y, x: entry/x}"
    (folder / "source.yaml").write_text(f"{keys}\ndomain: counts\npixel_size_m: 1.0e-8\ncentre: [8, 8]\nbin: 1\n")


def make_product(folder: Path) -> None:
    found = arrays()
    with h5py.File(folder / "result.h5", "w") as file:
        file["object"] = found["objectGuess"][None]
        sizes = {"center_x_m": 0.0, "center_y_m": 0.0, "pixel_width_m": 1e-8, "pixel_height_m": 1e-8}
        file["object"].attrs.update(sizes)
        file["probe"] = found["probeGuess"][None]


def make_scan(folder: Path) -> None:
    ptychodask.simulate(folder / "scan.zarr", n_pixels=N, n_patterns=N_PATTERNS, step_px=3.0, progress=False)
    ptychodask.group(folder / "scan.zarr", ptychodask.GroupingSpec(members=2, neighbours=3))


def make_result(folder: Path) -> None:
    make_scan(folder)
    reconstruct(folder / "scan.zarr", MODEL, out=folder / "object.zarr", pyramid=True, progress=False, tile=32)
    shutil.rmtree(folder / "scan.zarr")


def make_cache(folder: Path) -> None:
    make_scan(folder)
    reconstruct(folder / "scan.zarr", MODEL, cache=folder / "patches.zarr", progress=False)
    shutil.rmtree(folder / "scan.zarr")


def make_bundle(folder: Path) -> None:
    scan = ptychodask.simulate(folder / "scan.zarr", n_pixels=N, n_patterns=N_PATTERNS, step_px=3.0, progress=False)
    save_model(untrained_model(ModelSpec(n_pixels=N, levels=1), Optics.of(scan)), folder / "net.model")
    shutil.rmtree(folder / "scan.zarr")


def make_ptychopinn(folder: Path) -> None:
    from test_ptychopinn_bundle import members_of

    with zipfile.ZipFile(folder / "wts.h5.zip", "w") as archive:
        for name, content in members_of().items():
            archive.writestr(name, content)


def make_ledger(folder: Path) -> None:
    ledger = Ledger(parse_location(folder), {"spec": {"tile": 16}, "plan": {"n_chunks": 3}})
    for index in range(3):
        ledger.add("chunk", index, {"seconds": {"read": 0.1}, "skipped": [], "checksums": [1, 2], "worker": "w"})
    ledger.add("tile", 0, {"seconds": {}, "checksum": 3})


def make_checkpoint(folder: Path) -> None:
    weights = [np.ones((3, 4), np.float32), np.zeros(2, np.float32)]
    state = {"epoch": 1, "log": [{"epoch": 1, "loss": 0.5}]}
    Checkpoint(folder / "net.model", TRAINED).write(Snapshot(state, weights, weights, weights))
    # Its folder begins with a dot.
    (folder / ".net.model.training").rename(folder / "training")


def make_study(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "docs" / "study.toml", folder / "study.toml")


MODEL = LinearModel(members=2, n_pixels=N)

TRAINED = {"spec": {"epochs": 3, "batch_size": 4}, "data": {"hash": "0" * 64}}


def ingest(folder: Path, name: str | None = None, **options: Any) -> None:
    """Make a store of a file, by default the only one, and read it."""
    source = folder / name if name else next(path for path in folder.iterdir() if path.is_file())
    target = folder / "target"
    target.mkdir()
    try:
        scan = ptychodask.ingest(source, target / "scan.zarr", progress=False, **options)
        scan.network_input(slice(None))
    except PtychodaskError:
        assert not list(target.iterdir()), f"left behind: {list(target.iterdir())}"
        raise


def read_shape(folder: Path, name: str = "source.h5", **options: Any) -> None:
    """Store a scan by the options that `inspect_file` proposes, and compare it with what was generated.

    A damaged file may hold other numbers; a file that is whole must give those that were written.
    """
    pristine = folder / PRISTINE
    is_whole = pristine.exists()
    pristine.unlink(missing_ok=True)
    if "positions" in options:
        options["positions"] = folder / options["positions"]
    inspection = ptychodask.inspect_file(folder / name, units="px", domain="counts", **options)
    if inspection.refused:
        assert not is_whole, inspection.refused
        raise PtychodaskError(inspection.refused[0])
    ingest(folder, name, far_field=True, **inspection.options)
    if is_whole:
        counts, position = scan_by_hand()
        scan = open_scan(folder / "target" / "scan.zarr")
        order = np.argsort(scan.source_index)
        stored = np.asarray(scan.position_yx_px)[order]
        np.testing.assert_array_equal(scan.diffraction[order], counts)
        np.testing.assert_allclose(stored - stored[0], position - position[0], atol=1e-6)


def read_mapped(folder: Path) -> None:
    keys = {"diffraction": "entry/data", "y": "entry/y", "x": "entry/x"}
    ingest(folder, keys=keys, domain="counts", pixel_size_m=1e-8)


def read_cxi(folder: Path) -> None:
    keys = {"diffraction": "entry_1/data_1/data", "y": "entry_1/y", "x": "entry_1/x"}
    keys["mask"] = "entry_1/instrument_1/detector_1/mask"
    ingest(folder, keys=keys, domain="counts", units="px")


def read_by_format(folder: Path, name: str) -> None:
    """Inspect a file whose keys tell its format, then make a store of it."""
    with suppress(PtychodaskError):
        str(ptychodask.inspect_file(folder / name))
    ingest(folder, name)


def read_scan(folder: Path) -> None:
    scan = open_scan(folder / "scan.zarr")
    scan.network_input(slice(None))
    stored = StoredScan(folder / "scan.zarr")
    stored.check()
    stored.part(np.arange(min(3, stored.n_patterns)))
    for name in stored.table_names():
        table = stored.table(name)
        if table is not None:
            table.rows(0, len(table))


def read_result(folder: Path) -> None:
    open_result(folder / "object.zarr").ptycho.compute()
    open_result(folder / "object.zarr", level=1).ptycho.compute()


def read_cache(folder: Path) -> None:
    check_patches(folder / "patches.zarr", {"model_hash": MODEL.content_hash})
    StoredPatches(folder / "patches.zarr").read(0, N_PATTERNS)


def read_checkpoint(folder: Path) -> None:
    (folder / "training").rename(folder / ".net.model.training")
    Checkpoint(folder / "net.model", TRAINED).begin(resume=True, overwrite=False)


def read_ledger(folder: Path) -> None:
    Ledger(parse_location(folder), {"spec": {"tile": 16}, "plan": {"n_chunks": 3}}).read()


KINDS: dict[str, Kind] = {
    "npz": Kind(make_npz, ingest, 16),
    "npz, compressed": Kind(make_compressed_npz, ingest, 8),
    "tike npz.bz2": Kind(make_tike, ingest, 6),
    "hdf5": Kind(make_hdf5, read_mapped, 12),
    "hdf5, filters": Kind(make_filtered_hdf5, read_mapped, 7),
    "hdf5.bz2": Kind(make_packed_hdf5, read_mapped, 2),
    "cxi": Kind(make_cxi, read_cxi, 8),
    "cxi, by its format": Kind(make_cxi, lambda folder: read_by_format(folder, "source.cxi"), 4),
    "nexus": Kind(make_nexus, lambda folder: read_by_format(folder, "source.nxs"), 4),
    "nexus, linked": Kind(make_linked_nexus, lambda folder: read_by_format(folder, "source.nxs"), 3),
    "two files": Kind(make_two_files, lambda folder: read_by_format(folder, "product.h5"), 4),
    "hxn": Kind(make_hxn, lambda folder: read_by_format(folder, "source.h5"), 2),
    "recipe": Kind(make_recipe, lambda folder: ingest(folder, "source.h5", recipe=folder / "source.yaml"), 2),
    "product": Kind(make_product, lambda folder: read_foreign_result(folder / "result.h5"), 6),
    "scan store": Kind(make_scan, read_scan, 16),
    "result store": Kind(make_result, read_result, 10),
    "patch cache": Kind(make_cache, read_cache, 4),
    "bundle": Kind(make_bundle, lambda folder: load_model(folder / "net.model"), 3),
    "ptychopinn archive": Kind(make_ptychopinn, lambda folder: load_model(folder / "wts.h5.zip"), 3),
    "checkpoint": Kind(make_checkpoint, read_checkpoint, 3),
    "ledger": Kind(make_ledger, read_ledger, 3),
    "raster": Kind(make_raster, read_shape, 3),
    "parts": Kind(make_parts, read_shape, 3),
    "virtual": Kind(make_virtual, read_shape, 3),
    "matlab 7.3": Kind(make_matlab_7, read_shape, 3),
    "matlab 5": Kind(make_matlab_5, lambda folder: read_shape(folder, "source.mat"), 3),
    "npy folder": Kind(make_npy_folder, lambda folder: read_shape(folder, "source"), 3),
    "foreign zarr": Kind(make_foreign_zarr, lambda folder: read_shape(folder, "source"), 3),
    "positions as text": Kind(make_table, lambda folder: read_shape(folder, positions="table.csv"), 3),
    "study": Kind(make_study, lambda folder: read_study(folder / "study.toml"), 3),
}


SHAPES = (
    "raster",
    "parts",
    "virtual",
    "matlab 7.3",
    "matlab 5",
    "npy folder",
    "foreign zarr",
    "positions as text",
)
"""Kinds of files whose shapes other programs write; some inputs of them stay whole."""


def kind_of(number: int) -> str:
    """Kinds take turns by their shares."""
    # 37 divides no sum of shares near a hundred, so that each stretch of numbers has all kinds.
    turn = number * 37 % sum(kind.share for kind in KINDS.values())
    for name, kind in KINDS.items():
        if turn < kind.share:
            return name
        turn -= kind.share
    raise AssertionError


def mutate(folder: Path, rng: np.random.Generator) -> None:
    """Damage one to three files of a folder."""
    for _ in range(rng.integers(1, 4)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return
        path = files[rng.integers(len(files))]
        # Metadata of a store are few among its files, and say the most.
        told = [file for file in files if file.suffix == ".json"]
        if told and rng.random() < 0.5:
            path = told[rng.integers(len(told))]
        roll = rng.random()
        if path.suffix == ".json" and roll < 0.75:
            mutate_json(path, rng)
        elif path.suffix in (".npz", ".zip") and roll < 0.6:
            mutate_zip(path, rng)
        elif path.suffix in (".h5", ".cxi", ".nxs") and roll < 0.4:
            mutate_hdf5(path, rng)
        elif path.suffix == ".jsonl" and roll < 0.6:
            mutate_ledger(path, rng)
        elif path.suffix == ".bz2" and roll < 0.8:
            mutate_packed(path, rng)
        elif len(files) > 1 and roll > 0.95:
            path.unlink()
        else:
            path.write_bytes(mutated(path.read_bytes(), rng))


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes, changed."""
    found = bytearray(content)
    size = len(found)
    if size == 0:
        return bytes(rng.bytes(8))
    way, place = rng.integers(7), int(rng.integers(size))
    length = int(rng.integers(1, max(2, min(64, size))))
    if way == 0:
        for _ in range(rng.integers(1, 9)):
            found[rng.integers(size)] ^= 1 << rng.integers(8)
    elif way == 1:
        del found[place:]
    elif way == 2:
        found[place : place + length] = bytes(length)
    elif way == 3:
        start = int(rng.integers(size))
        found[place:place] = found[start : start + length]
    elif way == 4:
        found[place : place + length] = rng.bytes(length)
    elif way == 5:
        value = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62]))
        width = int(rng.choice([4, 8]))
        found[place : place + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    else:
        text = bytes(found)
        digits = [i for i in range(size) if text[i : i + 1].isdigit()][:4000]
        if digits:
            found[digits[rng.integers(len(digits))]] = int(rng.choice(list(b"0123456789-eE")))
    return bytes(found)


def mutate_json(path: Path, rng: np.random.Generator) -> None:
    """Replace, drop or add a value somewhere in a document."""
    try:
        document = json.loads(path.read_text())
    except (ValueError, RecursionError):
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    if places:
        holder, key = places[rng.integers(len(places))]
        roll = rng.random()
        if roll < 0.2 and isinstance(holder, dict):
            del holder[key]
        elif roll < 0.3 and isinstance(holder, dict):
            holder[f"{key} too"] = holder[key]
        else:
            wild = [*EXTREMES, *ODD]
            holder[key] = wild[rng.integers(len(wild))]
    text = json.dumps(document).replace('"@deep@"', "[" * DEPTH + "]" * DEPTH)
    if isinstance(document, dict) and document and rng.random() < 0.1:
        # The first key again, as another value: readers may take the one or the other.
        text = "{" + json.dumps(next(iter(document))) + ": 7, " + text[1:]
    path.write_text(text)


def mutate_ledger(path: Path, rng: np.random.Generator) -> None:
    """Change what a line of a ledger says, its checksum right."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if "\t" in line]
    if not lines:
        return
    number = int(rng.integers(len(lines)))
    record = path.with_suffix(".json")
    record.write_text(lines[number].rpartition("\t")[0], errors="replace")
    mutate_json(record, rng)
    text = record.read_bytes().decode(errors="replace")
    lines[number] = f"{text}\t{zlib.crc32(text.encode(errors='replace')):08x}"
    path.write_text("\n".join(lines) + "\n", errors="replace")
    record.unlink()


def mutate_zip(path: Path, rng: np.random.Generator) -> None:
    """Change what an archive holds, its checksums right."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # noqa: BLE001 what an earlier mutation left is no archive any more
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    if not members:
        return
    name = list(members)[rng.integers(len(members))]
    roll = rng.random()
    if roll < 0.15:
        del members[name]
    elif roll < 0.3:
        renamed = ["../../evil.npy", "/tmp/evil.npy", "a/../../b.npy", "x" * 300 + ".npy", name.upper(), "Y.npy"]
        members[renamed[rng.integers(len(renamed))]] = members.pop(name)
    elif roll < 0.6:
        members[name] = npy_bytes(rng)
    else:
        members[name] = mutated(members[name], rng)
    with zipfile.ZipFile(path, "w", int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for each, content in members.items():
            archive.writestr(each, content)


def mutate_packed(path: Path, rng: np.random.Generator) -> None:
    """Damage what a bzip2 file holds, its checksum right."""
    inner = path.with_suffix("")
    try:
        inner.write_bytes(bz2.decompress(path.read_bytes()))
    except (OSError, ValueError):
        path.write_bytes(mutated(path.read_bytes(), rng))
        return
    if rng.random() < 0.5:
        inner.write_bytes(mutated(inner.read_bytes(), rng))
    elif inner.suffix == ".npz":
        mutate_zip(inner, rng)
    else:
        mutate_hdf5(inner, rng)
    path.write_bytes(bz2.compress(inner.read_bytes()))
    inner.unlink()


def npy_bytes(rng: np.random.Generator) -> bytes:
    """An array that does not fit, or that claims what is not there."""
    shapes = ["(0,)", "()", "(12,)", "(1000000000000,)", "(12, 16)", "(12, 16, 16)", "(99999999, 99999999)", "(-1,)"]
    types = ["<f4", "<f8", "<u2", "|O", "<c8", "|S9", "<U4", "<M8[s]", "|b1", ">i8", "<f2", "|V8"]
    header = f"{{'descr': '{types[rng.integers(len(types))]}', 'fortran_order': {bool(rng.integers(2))}, "
    header += f"'shape': {shapes[rng.integers(len(shapes))]}, }}"
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + rng.bytes(int(rng.integers(0, 3000)))


def mutate_hdf5(path: Path, rng: np.random.Generator) -> None:
    """Put something else in the place of a dataset."""
    try:
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            name = names[rng.integers(len(names))]
            roll = int(rng.integers(7))
            del file[name]
            if roll == 0:
                file.create_dataset(name, shape=(10**6, 10**6), dtype="u2", chunks=(1, 1000))
            elif roll == 1:
                file.create_dataset(name, shape=(10**12, N, N), dtype="u2", chunks=(1, N, N), compression="gzip")
            elif roll == 2:
                file[name] = "text"
            elif roll == 3:
                file[name] = h5py.ExternalLink("/etc/passwd", "/x")
            elif roll == 4:
                file[name] = np.full((N_PATTERNS, N, N), np.nan)
            elif roll == 5:
                file[name] = h5py.SoftLink(f"/{name}")
    except Exception:  # noqa: BLE001 what an earlier mutation left is no HDF5 file any more
        path.write_bytes(mutated(path.read_bytes(), rng))


@dataclass
class Child:
    """The process that reads, watched."""

    seed: int
    numbers: list[int]
    keep: Path

    def run(self) -> dict[int, dict[str, str]]:
        """What became of the inputs, up to one that ended the process."""
        with tempfile.TemporaryDirectory(prefix="ptyfuzz-", ignore_cleanup_errors=True) as text:
            found = self._watch(Path(text))
            for number, one in found.items():
                kept = self.keep / f"{self.seed}-{number}"
                if one["outcome"].isupper() and not kept.exists():
                    # The process was ended at this input, which is still where it was read.
                    shutil.copytree(Path(text) / "work" / "input", kept)
        return found

    def _watch(self, root: Path) -> dict[int, dict[str, str]]:
        told = json.dumps([self.seed, self.numbers, str(root)])
        command = [sys.executable, "-m", "tests.campaigns.fuzz", "--child", told, "--keep", self.keep]
        found: dict[int, dict[str, str]] = {}
        at = -1
        with subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"},
        ) as process:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            pending, since, baseline = b"", time.monotonic(), 0
            while process.poll() is None or pending:
                if process.poll() is None:
                    select.select([process.stdout], [], [], 0.1)
                pending += process.stdout.read() or b""
                while b"\n" in pending:
                    line, _, pending = pending.partition(b"\n")
                    told = json.loads(line)
                    since = time.monotonic()
                    if "at" in told:
                        at, baseline = told["at"], baseline or rss(process.pid)
                    else:
                        found[told.pop("number")] = told
                        at = -1
                verdict = ""
                if at >= 0 and time.monotonic() - since > HANG_S:
                    verdict = "HANG"
                elif at >= 0 and baseline and rss(process.pid) > baseline + GROWTH_BYTES:
                    verdict = "MEMORY"
                if verdict:
                    process.kill()
                    process.wait()
                    found[at] = {"outcome": verdict, "detail": ""}
                    return found
                if process.poll() is not None and b"\n" not in pending:
                    break
        if process.returncode != 0 and at < 0:
            raise RuntimeError(f"the child ended with {process.returncode} between two inputs")
        if process.returncode != 0:
            found[at] = {"outcome": "CRASH", "detail": f"exit code {process.returncode}"}
        return found


def rss(pid: int) -> int:
    """Memory of a process and of those that it started, bytes."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        started = [text.read_text() for text in Path(f"/proc/{pid}/task").glob("*/children")]
    except (OSError, IndexError):
        return 0
    return own + sum(rss(int(each)) for each in " ".join(started).split())


def child(seed: int, numbers: list[int], root: Path, keep: Path) -> None:
    """Read inputs in an empty folder, one after the other, and say what became of each."""
    for name, kind in KINDS.items():
        if any(kind_of(number) == name for number in numbers):
            (root / "seeds" / name).mkdir(parents=True)
            kind.make(root / "seeds" / name)
    work = root / "work"
    for number in numbers:
        work.mkdir()
        rng = np.random.default_rng([seed, number])
        name = kind_of(number)
        shutil.copytree(root / "seeds" / name, work / "input")
        # Some stay whole, so that what is stored can be compared with what was generated.
        if name in SHAPES and rng.random() < WHOLE_SHARE:
            (work / "input" / PRISTINE).touch()
        else:
            mutate(work / "input", rng)
        print(json.dumps({"at": number}), flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, detail = outcome_of(KINDS[name].read, work / "input")
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > GROWTH_BYTES:
            outcome, detail = "MEMORY", f"{grown / 1e6:.0f} MB"
        strays = [*root.iterdir(), *work.iterdir(), *Path(tempfile.gettempdir()).glob("evil*")]
        if {path.name for path in strays} != {"seeds", "work", "input"}:
            outcome, detail = "OUTSIDE", ", ".join(map(str, strays))
        if outcome.isupper():
            shutil.rmtree(work / "input" / "target", ignore_errors=True)
            shutil.copytree(work / "input", keep / f"{seed}-{number}", dirs_exist_ok=True)
        print(json.dumps({"number": number, "outcome": outcome, "detail": detail}), flush=True)
        shutil.rmtree(work)


def outcome_of(read: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """How reading a folder ends; finds are in capitals."""
    try:
        read(folder)
    except PtychodaskError as error:
        return ("refused", "") if "\n" not in str(error) else ("LINES", str(error)[:500])
    except BaseException as error:  # noqa: BLE001 whatever it is, it is a find
        return "EXCEPTION", f"{type(error).__name__}: {str(error)[:300]}\n{traceback.format_exc()[-1500:]}"
    return "read", ""


def fuzz(
    n_inputs: int, seed: int, keep: Path, *, minutes: float = float("inf"), progress: bool = False
) -> dict[int, dict[str, str]]:
    """What became of some inputs, by their numbers; after so many minutes no more are begun."""
    found: dict[int, dict[str, str]] = {}
    left = list(range(n_inputs))
    end = time.monotonic() + 60 * minutes
    while left and time.monotonic() < end:
        found |= Child(seed, left[:500], keep).run()
        left = [number for number in left if number not in found]
        if progress:
            finds = sum(one["outcome"].isupper() for one in found.values())
            kinds = sorted({one["outcome"] for one in found.values() if one["outcome"].isupper()})
            print(f"{len(found)} inputs, {finds} finds {' '.join(kinds)}", flush=True)
    return found


def main() -> None:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more inputs after that")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-finds"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        seed, numbers, root = json.loads(asked.child)
        child(seed, numbers, Path(root), asked.keep)
        return
    found = fuzz(asked.inputs, asked.seed, asked.keep, minutes=asked.minutes, progress=True)
    counts = Counter((kind_of(number), one["outcome"]) for number, one in found.items())
    outcomes = sorted({outcome for _, outcome in counts})
    print("| kind | " + " | ".join(outcomes) + " |\n" + "|---" * (len(outcomes) + 1) + "|")
    for name in KINDS:
        print(f"| {name} | " + " | ".join(str(counts[name, outcome]) for outcome in outcomes) + " |")
    print("| all | " + " | ".join(str(sum(counts[name, outcome] for name in KINDS)) for outcome in outcomes) + " |")
    for number, one in sorted(found.items()):
        if one["outcome"].isupper():
            print(f"--- {number}, {kind_of(number)}: {one['outcome']} {one['detail']}")
    sys.exit(any(one["outcome"].isupper() for one in found.values()))


if __name__ == "__main__":
    main()
