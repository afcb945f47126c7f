"""Some hundred inputs of the fuzz campaign, and what it found (more: `python -m tests.campaigns.fuzz`)."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.io import hdf5_stream, ingest
from ptychodask.models import ModelSpec, Optics, load_model, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.models.description import read_history
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.result import create_result, finish_result, open_result
from ptychodask.simulate import simulate
from ptychodask.storage.atomic import LEDGER
from ptychodask.storage.location import parse_location
from ptychodask.store import open_scan
from ptychodask.training.checkpoint import Checkpoint, Snapshot

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.campaigns.fuzz",
        "--inputs",
        "120",
        "--seed",
        "3",
        "--keep",
        str(tmp_path / "finds"),
    ]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-2000:]
    assert "| all |" in told.stdout


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"node_type":"array"', '"node_kind":"array"'),
        ('"shape":', '"shape":"wide","shape too":'),
        ('"name":"blosc","configuration"', '"name":"blosc","settings"'),
        ('"complex64"', '"\\ud800"'),
        ('"data_type"', '"data type"'),
        ('"codecs":[', '"codecs":7,"codecs too":['),
    ],
)
def test_a_result_whose_metadata_make_no_sense_is_refused(tmp_path, before, after):
    create_result(parse_location(tmp_path), (40, 40), (0, 0), 32, pixel_size_m=None)
    finish_result(parse_location(tmp_path), {})
    root = (tmp_path / "zarr.json").read_text()
    compact = "".join(line.strip() for line in root.splitlines()).replace('": ', '":')
    assert before in compact
    (tmp_path / "zarr.json").write_text(compact.replace(before, after, 1))
    with pytest.raises(PtychodaskError) as caught:
        open_result(tmp_path).ptycho.compute()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("corner", [None, 7, 0.5, [1.0], ["x", 2.0]])
def test_a_truth_whose_corner_makes_no_sense_is_refused(tmp_path, corner):
    scan = tmp_path / "scan.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    for path, place in (
        (scan / "truth" / "zarr.json", ()),
        (scan / "zarr.json", ("consolidated_metadata", "metadata", "truth")),
    ):
        document = json.loads(path.read_text())
        held = document
        for name in place:
            held = held[name]
        held["attributes"]["corner_yx_px"] = corner
        path.write_text(json.dumps(document))
    with pytest.raises(PtychodaskError, match=r"the corner of 'truth' is .*; the store is damaged"):
        open_scan(scan)


def test_a_bundle_whose_version_is_several_lines_is_refused_in_one(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    save_model(untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(scan)), tmp_path / "net.model")
    description = json.loads((tmp_path / "net.model" / "model.json").read_text()) | {"format_version": "\n\n"}
    (tmp_path / "net.model" / "model.json").write_text(json.dumps(description))
    with pytest.raises(PtychodaskError) as caught:
        load_model(tmp_path / "net.model")
    assert "\n" not in str(caught.value)


STUCK = """
import sys
from pathlib import Path
import numpy as np
from tests.campaigns import fuzz
folder = Path(sys.argv[1])
fuzz.make_hdf5(folder)
fuzz.mutate(folder, np.random.default_rng([11, 13682]))
print(fuzz.outcome_of(fuzz.read_mapped, folder))
"""


def test_a_file_that_the_hdf5_library_gets_stuck_on_is_given_up(tmp_path):
    """Which bytes do it depends on the library's version; the file is refused, or read, in either case."""
    told = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert told.stdout.splitlines()[-1] in ("('refused', '')", "('read', '')")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; print(flush=True); time.sleep(60)", "hangs on it"),
        ("import os; os.abort()", "crashes on it"),
    ],
)
def test_what_the_hdf5_library_does_to_a_process_stays_there(tmp_path, monkeypatch, code, told):
    monkeypatch.setattr(hdf5_stream, "LOOK", code)
    monkeypatch.setattr(hdf5_stream, "STUCK_S", 0.5)
    path = tmp_path / "source.h5"
    h5py.File(path, "w").close()
    with pytest.raises(PtychodaskError, match=rf"source\.h5: the HDF5 library {told}"):
        ingest(path, tmp_path / "scan.zarr", keys={"diffraction": "d", "position": "p"}, domain="counts", units="px")


@pytest.mark.parametrize("amplitude", [[], [1.0], "1", float("nan")])
def test_a_bundle_whose_amplitude_is_no_number_is_refused(tmp_path, amplitude):
    with pytest.raises(PtychodaskError, match=r"object_amplitude is .*, expected a positive number"):
        ModelSpec(object_amplitude=amplitude)


@pytest.mark.parametrize("name", ["probe", "y_px", "truth"])
def test_an_array_in_chunks_of_nothing_is_refused(tmp_path, name):
    scan = tmp_path / "scan.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    root = json.loads((scan / "zarr.json").read_text())
    grid = root["consolidated_metadata"]["metadata"][name]["chunk_grid"]["configuration"]
    grid["chunk_shape"] = [0] * len(grid["chunk_shape"])
    (scan / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(PtychodaskError, match=rf"'{name}'.*in chunks of \(0"):
        open_scan(scan)


def test_a_history_of_one_endless_number_is_refused(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss\n1," + "9" * 200_000 + "\n")
    with pytest.raises(PtychodaskError, match=r"field larger than field limit"):
        read_history(tmp_path / "history.csv")


def test_a_checkpoint_that_claims_what_it_does_not_hold_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "net.model", {})
    checkpoint.write(Snapshot({"log": [{"epoch": 1}]}, [np.ones(3)], [np.ones(3)], [np.ones(3)]))
    path = checkpoint.folder / "state.npz"
    path.write_bytes(path.read_bytes().replace(b"'shape': (3,), }", b"'shape':(9**9,)}", 1))
    with pytest.raises(PtychodaskError, match=r"state\.npz.*cannot be read .*start again"):
        checkpoint.begin(resume=True, overwrite=False)


@pytest.mark.parametrize("line", ["7", "[]", '{"kind": "tile"}', '{"kind": "tile", "index": "x"}', "{"])
def test_a_ledger_of_strange_lines_is_refused_or_read_without_them(tmp_path, line):
    ledger = Ledger(parse_location(tmp_path), {})
    ledger.add("tile", 0, {})
    path = tmp_path / LEDGER
    path.write_text(path.read_text() + f"{line}\t{zlib.crc32(line.encode()):08x}\n")
    again = Ledger(parse_location(tmp_path), {})
    with suppress(PtychodaskError):
        again.read()
    assert list(again.tiles) == [0]


def test_an_archive_whose_header_does_not_end_is_refused(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    save_model(untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(scan)), tmp_path / "net.model")
    weights = tmp_path / "net.model" / "weights.npz"
    weights.write_bytes(weights.read_bytes().replace(b"'shape': (", b"'shape':  ", 1))
    with pytest.raises(PtychodaskError, match=r"weights\.npz.*cannot be read .*or train again"):
        load_model(tmp_path / "net.model")
