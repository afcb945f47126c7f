"""Nothing from outside is unpickled or executed, nothing leaves its folder, and claims are checked before memory is."""

from __future__ import annotations

import base64
import io
import json
import marshal
import os
import pickle
import resource
import shutil
import zipfile

import h5py
import numpy as np
import pytest
from models_for_tests import LinearModel
from test_ptychopinn_bundle import layer, members_of, small_network

from ptychodask import cli
from ptychodask.io import ingest, read_foreign_result
from ptychodask.models import ModelSpec, Optics, load_model, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.patches import StoredPatches
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.scan import PtychodaskError
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

GIB = 2**30


class Evil:
    """Something that makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path):
    """A path at which nothing may be in the end."""
    path = tmp_path / "canary"
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists(), "the pickle does harm where it is opened"
    proof.rmdir()
    yield path
    assert not path.exists()


@pytest.fixture
def memory():
    """The most memory of this process may not grow by a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < GIB


def evil_array(canary):
    found = np.empty(1, object)
    found[0] = Evil(canary)
    return found


def scan_arrays(**changes):
    rng = np.random.default_rng(0)
    return {
        "diff3d": np.sqrt(rng.poisson(20, (9, 16, 16))).astype(np.float32),
        "xcoords": rng.random(9) * 30 + 20,
        "ycoords": rng.random(9) * 30 + 20,
        "probeGuess": np.ones((16, 16), np.complex64),
    } | changes


@pytest.mark.parametrize("key", ["diff3d", "xcoords", "probeGuess", "objectGuess", "scan_index"])
def test_a_pickle_in_an_npz_stays_closed(tmp_path, canary, key):
    np.savez(tmp_path / "source.npz", **scan_arrays(**{key: evil_array(canary)}))
    with pytest.raises(PtychodaskError):
        ingest(tmp_path / "source.npz", tmp_path / "scan.zarr")
    with pytest.raises(PtychodaskError):
        read_foreign_result(tmp_path / "source.npz", key=key)


def test_a_pickle_that_is_not_needed_is_passed_by(tmp_path, canary):
    np.savez(tmp_path / "source.npz", **scan_arrays(_metadata=evil_array(canary)))
    assert ingest(tmp_path / "source.npz", tmp_path / "scan.zarr").n_patterns == 9


@pytest.mark.parametrize("flag", ["--drop", "--positions"])
def test_a_pickle_in_an_npy_of_the_command_line_stays_closed(tmp_path, canary, flag, monkeypatch, capsys):
    np.save(tmp_path / "evil.npy", evil_array(canary))
    simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    monkeypatch.setattr(
        "sys.argv", ["ptychodask", "reconstruct", str(tmp_path / "scan.zarr"), flag, str(tmp_path / "evil.npy")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "holds pickled Python objects, which are never loaded" in capsys.readouterr().err


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_pickles_in_a_ptychopinn_archive_stay_closed(tmp_path, canary):
    evil = pickle.dumps(Evil(canary))
    names = ["manifest.dill", "diffraction_to_obj/params.dill", "diffraction_to_obj/custom_objects.dill"]
    path = archive(tmp_path / "wts.h5.zip", members_of() | dict.fromkeys(names, evil))
    assert load_model(path).members == 4
    with h5py.File(io.BytesIO(), "w") as file:
        file.attrs["intensity_scale"] = np.void(evil)
        file.flush()
        spoilt = file.id.get_file_image()
    archive(path, members_of() | {"diffraction_to_obj/model.h5": spoilt})
    with pytest.raises(PtychodaskError):
        load_model(path)


def keras_with(entry):
    layers = [*small_network()[:-1], entry]
    return members_of(layers)


def test_code_in_a_keras_file_is_refused(tmp_path, canary):
    code = base64.b64encode(marshal.dumps(compile(f"__import__('os').mkdir({str(canary)!r})", "evil", "exec"))).decode()
    function = {"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}
    lambda_layer = layer("Lambda", "trimmed_obj", ["padded_obj_2"], function=function)
    foreign = layer("mkdir", "trimmed_obj", ["padded_obj_2"], path=str(canary)) | {
        "module": "os",
        "registered_name": "os>mkdir",
    }
    for entry in (lambda_layer, foreign):
        path = archive(tmp_path / "wts.h5.zip", keras_with(entry))
        with pytest.raises(PtychodaskError, match=r"Lambda|mkdir"):
            load_model(path)


def test_members_do_not_leave_their_folder(tmp_path, canary):
    members = members_of() | {"../canary": b"evil", str(canary): b"evil", "diffraction_to_obj/../../canary": b"evil"}
    load_model(archive(tmp_path / "wts.h5.zip", members))
    np.savez(tmp_path / "source.npz", **scan_arrays())
    with zipfile.ZipFile(tmp_path / "source.npz", "a") as file:
        file.writestr("../canary.npy", b"evil")
        file.writestr(f"{canary}.npy", b"evil")
    ingest(tmp_path / "source.npz", tmp_path / "scan.zarr")
    assert not list(tmp_path.parent.glob("canary*"))


def test_a_pickle_in_a_bundle_stays_closed(tmp_path, canary):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    save_model(untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(scan)), tmp_path / "net.model")
    for name in ("weights.npz", "optics.npz"):
        path = tmp_path / f"{name}.model"
        shutil.copytree(tmp_path / "net.model", path)
        np.savez(path / name, w0000=evil_array(canary), probe=evil_array(canary))
        with pytest.raises(PtychodaskError):
            load_model(path)


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "vlen-bytes", "numcodecs.json2"])
def test_a_pickle_codec_in_a_store_is_not_run(tmp_path, canary, codec):
    scan = tmp_path / "scan.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    for name in ("y_px", "diffraction"):
        shutil.copytree(scan, tmp_path / f"{name}.zarr")
        array = tmp_path / f"{name}.zarr" / name

        def put(document):
            document["codecs"] = [{"name": codec, "configuration": {"protocol": 4}}]

        edit(array / "zarr.json", put)
        edit(tmp_path / f"{name}.zarr" / "zarr.json", lambda document: document["attributes"])
        for chunk in (path for path in (array / "c").rglob("*") if path.is_file()):
            chunk.write_bytes(pickle.dumps(Evil(canary)))
        with pytest.raises(PtychodaskError):
            open_scan(tmp_path / f"{name}.zarr").diffraction[slice(None)]


def npy_header(shape, descr="<f4"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.usefixtures("memory")
def test_an_npz_that_claims_what_it_does_not_hold_is_refused(tmp_path):
    np.savez(tmp_path / "source.npz", **{k: v for k, v in scan_arrays().items() if k not in ("diff3d", "xcoords")})
    with zipfile.ZipFile(tmp_path / "source.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("diff3d.npy", npy_header((10**12, 16, 16)) + bytes(10**4))
        file.writestr("xcoords.npy", npy_header((10**12,), "<f8") + bytes(100))
    with pytest.raises(PtychodaskError, match=r"source\.npz\[\w+\]: .*truncated"):
        ingest(tmp_path / "source.npz", tmp_path / "scan.zarr")


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("claimed", ["diffraction", "y", "all"])
@pytest.mark.parametrize("many", [10**9, 10**12])
def test_an_hdf5_that_claims_what_it_does_not_hold_is_refused(tmp_path, claimed, many):
    with h5py.File(tmp_path / "source.h5", "w") as file:
        n_patterns = many if claimed in ("diffraction", "all") else 9
        file.create_dataset("d", (n_patterns, 16, 16), "u2", chunks=(1, 16, 16), compression="gzip")
        for name in ("y", "x"):
            file.create_dataset(name, (many if claimed in ("y", "all") else 9,), "f8", chunks=True)
    assert (tmp_path / "source.h5").stat().st_size < 10**4
    keys = {"diffraction": "d", "y": "y", "x": "x"}
    with pytest.raises(PtychodaskError, match=rf"{many}|of the .* that it claims"):
        ingest(tmp_path / "source.h5", tmp_path / "scan.zarr", keys=keys, domain="counts", units="px")
    assert not (tmp_path / "scan.zarr").exists()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("many", [10**9, 10**12])
@pytest.mark.parametrize("array", ["diffraction", "y_px", "scan_index", "probe"])
def test_a_store_that_claims_what_it_does_not_hold_is_refused(tmp_path, array, many):
    scan = tmp_path / "scan.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)

    def claim(metadata):
        metadata["shape"][0] = many

    edit(scan / array / "zarr.json", claim)
    edit(scan / "zarr.json", lambda root: claim(root["consolidated_metadata"]["metadata"][array]))
    with pytest.raises(PtychodaskError):
        open_scan(scan).network_input(slice(None))
    if array != "scan_index":
        with pytest.raises(PtychodaskError):
            reconstruct(scan, LinearModel(), progress=False)


@pytest.mark.usefixtures("memory")
def test_a_result_and_a_cache_that_claim_what_they_do_not_hold_are_refused(tmp_path):
    scan = tmp_path / "scan.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    out, cache = tmp_path / "object.zarr", tmp_path / "patches.zarr"
    reconstruct(scan, LinearModel(), out=out, cache=cache, progress=False)
    for path, name in ((out, "object"), (cache, "patches")):
        edit(path / name / "zarr.json", lambda metadata: metadata["shape"].__setitem__(0, 10**9))
    root = json.loads((out / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"]["object"]["shape"][0] = 10**9
    (out / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(PtychodaskError):
        open_result(out).ptycho.compute()
    assert StoredPatches(cache).read(0, 20).shape[0] == 20
    with pytest.raises(PtychodaskError):
        StoredPatches(cache).read(0, 10**9)
