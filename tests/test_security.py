"""Nothing from outside is unpickled or executed, nothing leaves its folder, and claims are checked before memory is."""

from __future__ import annotations

import base64
import bz2
import io
import json
import marshal
import os
import pickle
import resource
import shutil
import zipfile
import zlib
from contextlib import suppress

import h5py
import numcodecs.pickles
import numpy as np
import pytest
import zarr
from models_for_tests import LinearModel
from test_ptychopinn_bundle import convolution, layer, members_of, small_network, small_weights

from ptychodask import cli
from ptychodask.errors import PtychodaskError
from ptychodask.io import hdf5_stream, ingest, npy_stream, read_foreign_result
from ptychodask.models import ModelSpec, Optics, load_model, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.patch_cache import StoredPatches, create_patches
from ptychodask.result import open_result
from ptychodask.simulate import simulate
from ptychodask.storage import zarr_checks as store
from ptychodask.storage.atomic import LEDGER
from ptychodask.storage.location import parse_location
from ptychodask.store import open_scan
from ptychodask.study import read_study
from ptychodask.training.checkpoint import Checkpoint

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
    assert "contains pickled Python objects, which are never loaded" in capsys.readouterr().err


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


def edit_array(path, name, change):
    """Change what a store says of an array, at the array and at the root."""
    edit(path / name / "zarr.json", change)

    def change_root(root):
        listed = root.get("consolidated_metadata", {}).get("metadata", {})
        if name in listed:
            change(listed[name])

    edit(path / "zarr.json", change_root)


@pytest.fixture
def stores(tmp_path):
    """A scan, a result with a pyramid and a cache of patches."""
    scan, out, cache = (tmp_path / name for name in ("scan.zarr", "object.zarr", "patches.zarr"))
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    reconstruct(scan, LinearModel(), out=out, cache=cache, pyramid=True, progress=False)
    return {"scan": scan, "result": out, "cache": cache}


def read_all(kind, path):
    if kind == "scan":
        open_scan(path).diffraction[slice(None)]
    elif kind == "result":
        open_result(path).ptycho.compute()
    else:
        StoredPatches(path).read(0, 20)


EVERY_ARRAY = [
    *[("scan", name) for name in ("diffraction", "y_px", "probe", "scan_index", "truth")],
    *[("result", name) for name in ("object", "weight", "count", "y")],
    ("cache", "patches"),
]


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "vlen-bytes", "numcodecs.json2"])
@pytest.mark.parametrize(("kind", "name"), EVERY_ARRAY)
def test_a_codec_that_makes_objects_is_not_run(stores, canary, kind, name, codec):
    edit_array(stores[kind], name, lambda document: document.update(codecs=[{"name": codec, "configuration": {}}]))
    for chunk in (path for path in (stores[kind] / name / "c").rglob("*") if path.is_file()):
        chunk.write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(PtychodaskError):
        read_all(kind, stores[kind])


def as_format_2(path, name, canary):
    """Let the root of a store say that an array is of Zarr format 2 and pickled, and pickle it."""
    shape = json.loads((path / name / "zarr.json").read_text())["shape"]
    array = {"zarr_format": 2, "shape": shape, "chunks": shape, "order": "C", "dimension_separator": "."}
    array |= {"dtype": "|O", "fill_value": "", "attributes": {}, "compressor": None}
    array["filters"] = [{"id": "vlen-utf8"}, {"id": "pickle"}]
    (path / name / ".zarray").write_text(json.dumps(array))
    listed = {"kind": "inline", "must_understand": False, "metadata": {}}
    edit(
        path / "zarr.json",
        lambda root: root.setdefault("consolidated_metadata", listed)["metadata"].update({name: array}),
    )
    (path / name / ".".join("0" * len(shape))).write_bytes(pickle.dumps(Evil(canary)))


@pytest.mark.parametrize(("kind", "name"), EVERY_ARRAY)
def test_an_array_of_zarr_format_2_whose_filter_unpickles_is_not_read(
    stores, canary, kind, name, monkeypatch, tmp_path
):
    # Later numcodecs ask before they unpickle; earlier ones, which Zarr takes as well, do not.
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    proof = tmp_path / "unpickled"
    as_format_2(stores[kind], name, proof)
    with suppress(Exception):
        zarr.open_group(stores[kind], mode="r", zarr_format=3)[name][...]
    assert proof.exists(), "Zarr itself unpickles it"
    as_format_2(stores[kind], name, canary)
    with pytest.raises(PtychodaskError, match=r"is of Zarr format 2, expected 3"):
        read_all(kind, stores[kind])


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("kind", "name"), EVERY_ARRAY)
@pytest.mark.parametrize("side", [2 * 10**4, 10**6])
def test_an_array_in_one_chunk_that_is_not_there_is_refused(stores, kind, name, side):
    def claim(document):
        shape = [max(side**2, 1)] if len(document["shape"]) == 1 else [*document["shape"][:-2], side, side]
        document["shape"] = document["chunk_grid"]["configuration"]["chunk_shape"] = shape
        document["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]

    edit_array(stores[kind], name, claim)
    shutil.rmtree(stores[kind] / name / "c", ignore_errors=True)
    with pytest.raises(PtychodaskError):
        read_all(kind, stores[kind])


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_result_in_countless_chunks_is_refused(stores, chunk):
    def claim(document):
        document["shape"] = [10**8, 10**8]
        document["chunk_grid"]["configuration"]["chunk_shape"] = [chunk, chunk]
        document["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]

    edit_array(stores["result"], "weight", claim)
    with pytest.raises(PtychodaskError, match=r"in chunks of"):
        read_all("result", stores["result"])


def test_a_cache_that_is_being_filled_has_no_files_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL_BYTES", 0)
    create_patches(tmp_path, (4, 16, 16), 20, (10, 10), {})
    patches = np.ones((20 * 4, 16, 16), np.complex64)
    assert StoredPatches(tmp_path).write(0, patches) == 20
    np.testing.assert_array_equal(StoredPatches(tmp_path).read(0, 20).reshape(patches.shape), patches)


def test_what_is_written_by_this_package_holds_what_it_claims(tmp_path, monkeypatch):
    """Compared with its files even where it is small."""
    monkeypatch.setattr(store, "SMALL_BYTES", 0)
    scan, out = tmp_path / "scan.zarr", tmp_path / "object.zarr"
    simulate(scan, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    assert open_scan(scan).n_patterns == 20
    reconstruct(scan, LinearModel(), out=out, pyramid=True, progress=False)
    assert open_result(out, level=1).ptycho.compute().sizes["y"] > 0


def test_tables_of_zeros_need_no_files(tmp_path):
    """What version 0.1 did not store, since it is the fill value, is no claim: `scan_index` of one experiment."""
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    shutil.rmtree(tmp_path / "scan.zarr" / "scan_index" / "c")
    assert open_scan(tmp_path / "scan.zarr").scan_index.tolist() == [0] * scan.n_patterns


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize("what", ["scan", "model", "study", "checkpoint", "ledger"])
def test_brackets_without_end_are_refused(tmp_path, what):
    path = tmp_path / {"scan": "zarr.json", "model": "model.json", "study": "study.toml"}.get(what, "made")
    if what == "checkpoint":
        checkpoint = Checkpoint(path, {})
        checkpoint.folder.mkdir()
        (checkpoint.folder / "training.json").write_text(DEEP)
    elif what == "ledger":
        path.mkdir()
        (path / LEDGER).write_text(f"{DEEP}\t{zlib.crc32(DEEP.encode()):08x}\n")
    else:
        path.write_text(f"x = {DEEP}" if what == "study" else DEEP)
    readers = {
        "scan": lambda: open_scan(tmp_path),
        "model": lambda: load_model(tmp_path),
        "study": lambda: read_study(path),
        "checkpoint": lambda: checkpoint.begin(resume=True, overwrite=False),
        "ledger": lambda: Ledger(parse_location(path), {}).read(),
    }
    with pytest.raises(PtychodaskError, match=r"nested too deeply|recursion|no ledger"):
        readers[what]()


def test_a_name_that_a_terminal_would_obey_is_shown_as_text(tmp_path):
    np.savez(tmp_path / "source.npz", **{"\x1b[2Jgone\nmore": np.ones(3)})
    with pytest.raises(PtychodaskError, match=r"keys found: \\x1b\[2Jgone more") as caught:
        ingest(tmp_path / "source.npz", tmp_path / "scan.zarr")
    assert str(caught.value).isprintable()


def zeros_npz(path, n_bytes, **arrays):
    """An NPZ whose array `zeros` has so many bytes, and takes a thousandth of them."""
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros.npy", npy_header((n_bytes // 8,), "<f8") + bytes(n_bytes))
    return path


def test_an_array_that_is_a_bomb_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(npy_stream, "WHOLE_BYTES", 2**20)
    arrays = scan_arrays()
    arrays["zeros"] = arrays.pop("xcoords")
    del arrays["zeros"]
    path = zeros_npz(tmp_path / "source.npz", 2**22, **arrays)
    keys = {"diffraction": "diff3d", "y": "zeros", "x": "ycoords"}
    with pytest.raises(PtychodaskError, match=r"source\.npz\[zeros\]: 4194304 bytes would be read from \d{4}"):
        ingest(path, tmp_path / "scan.zarr", keys=keys, domain="counts", units="px")
    with pytest.raises(PtychodaskError, match=r"source\.npz: \d+ bytes would be read from"):
        npy_stream.read_npz(path)


def test_a_bzip2_bomb_is_not_unpacked(tmp_path):
    piece = bz2.compress(bytes(2**24))
    (tmp_path / "source.npz.bz2").write_bytes(5 * piece)
    with pytest.raises(PtychodaskError, match=r"unpack to more than 1000 times as many"):
        ingest(tmp_path / "source.npz.bz2", tmp_path / "scan.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["source.npz.bz2"]


def test_a_bomb_in_a_ptychopinn_archive_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npy_stream, "WHOLE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "wts.h5.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("diffraction_to_obj/model.h5", b"")
        file.writestr("diffraction_to_obj/model.keras", bytes(2**22))
    with pytest.raises(PtychodaskError, match=r"model\.keras\]: 4194304 bytes would be read from"):
        load_model(tmp_path / "wts.h5.zip")


@pytest.mark.usefixtures("memory")
def test_a_network_larger_than_its_weights_is_not_built(tmp_path):
    scan = simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    save_model(untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(scan)), tmp_path / "net.model")
    edit(tmp_path / "net.model" / "model.json", lambda found: found["spec"].update(n_filters_scale=64, levels=4))
    with pytest.raises(PtychodaskError, match=r"has fewer weights than its spec needs"):
        load_model(tmp_path / "net.model")


@pytest.mark.usefixtures("memory")
def test_a_keras_network_larger_than_its_weights_is_not_built(tmp_path):
    many = archive(tmp_path / "many.zip", members_of(small_network(members=10**9)))
    with pytest.raises(PtychodaskError, match=r"C at most 64"):
        load_model(many)
    wide = 10**5
    layers = small_network()
    layers[2:3] = [convolution("wide", "intensity_scaler", wide), convolution("amplitude", "wide", wide)]
    kernel, bias = np.zeros((1, 1, 1, wide), np.float32), np.zeros(wide, np.float32)
    weights = [[np.zeros((1, 1, 4, wide), np.float32), bias], [kernel, bias], *small_weights()[1:]]
    with pytest.raises(PtychodaskError, match=r"'amplitude' has 100000 input channels, expected 1 groups of 1"):
        load_model(archive(tmp_path / "wide.zip", members_of(layers, weights)))


def mapped(path, tmp_path):
    keys = {"diffraction": "d", "y": "y", "x": "x"}
    return ingest(path, tmp_path / "scan.zarr", keys=keys, domain="counts", units="px")


def hdf5_with(path, **datasets):
    """An HDF5 file with nine patterns, but for what is put by functions of (file, name)."""
    rng = np.random.default_rng(0)
    plain = {"d": rng.poisson(20, (9, 16, 16)).astype("u2"), "y": 30 * rng.random(9), "x": 30 * rng.random(9)}
    with h5py.File(path, "w") as file:
        for name, values in plain.items():
            datasets.get(name, lambda file, name, values=values: file.create_dataset(name, data=values))(file, name)
    return path


def test_bytes_of_other_files_do_not_become_patterns(tmp_path):
    (tmp_path / "secret").write_bytes(b"password" * 500)

    def take(file, name):
        file.create_dataset(name, (9, 16, 16), "u1", external=[(str(tmp_path / "secret"), 0, 9 * 256)])

    with pytest.raises(PtychodaskError, match=r"its values are the raw bytes of '.*secret', which may be any file"):
        mapped(hdf5_with(tmp_path / "source.h5", d=take), tmp_path)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("source", ["absent.h5", "/absent.h5", ".", None])
def test_a_virtual_dataset_that_claims_what_no_file_holds_is_refused(tmp_path, source):
    def claim(file, name):
        shape = (10**10, *(() if name in "yx" else (16, 16)))
        layout = h5py.VirtualLayout(shape, "f8")
        if source is not None:
            layout[:9] = h5py.VirtualSource(source, "nothing", (9, *shape[1:]))
        file.create_virtual_dataset(name, layout, fillvalue=1)

    with pytest.raises(PtychodaskError, match=r"needs \d+ bytes, but the file contains"):
        mapped(hdf5_with(tmp_path / "source.h5", d=claim, y=claim, x=claim), tmp_path)


def gather(file, name):
    """A virtual dataset of three files, each named."""
    layout = h5py.VirtualLayout((9, 16, 16), "u2")
    for number in range(3):
        layout[3 * number : 3 * number + 3] = h5py.VirtualSource(f"part_{number}.h5", "d", (3, 16, 16))
    file.create_virtual_dataset(name, layout)


def gather_by_number(file, name):
    """A virtual dataset of as many files as there are."""
    endless = h5py.h5s.UNLIMITED
    whole = h5py.h5s.create_simple((9, 16, 16), (endless, 16, 16))
    blocks = h5py.h5s.create_simple((9, 16, 16), (endless, 16, 16))
    blocks.select_hyperslab((0, 0, 0), (endless, 1, 1), (3, 1, 1), (3, 16, 16))
    made_of = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made_of.set_virtual(blocks, b"part_%b.h5", b"d", h5py.h5s.create_simple((3, 16, 16)))
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U16LE, whole, made_of)


@pytest.mark.parametrize("make", [gather, gather_by_number])
def test_a_virtual_dataset_of_files_that_are_there_is_read(tmp_path, monkeypatch, make):
    # Then what the files hold is compared with what is claimed even for so few patterns.
    monkeypatch.setattr(hdf5_stream, "SMALL_BYTES", 0)
    whole = np.random.default_rng(1).poisson(20, (9, 16, 16)).astype("u2")
    for number in range(3):
        with h5py.File(tmp_path / f"part_{number}.h5", "w") as part:
            part["d"] = whole[3 * number : 3 * number + 3]
    scan = mapped(hdf5_with(tmp_path / "source.h5", d=make), tmp_path)
    np.testing.assert_array_equal(scan.diffraction[np.argsort(scan.source_index)], whole)


def test_a_chunk_that_is_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_stream, "LARGEST_CHUNK", 2**10)
    whole = np.ones((9, 16, 16), "u2")
    path = hdf5_with(
        tmp_path / "source.h5", d=lambda file, name: file.create_dataset(name, data=whole, chunks=(9, 16, 16))
    )
    with pytest.raises(PtychodaskError, match=r"in chunks of \(9, 16, 16\), 4608 bytes each, expected at most 1024"):
        mapped(path, tmp_path)


def test_a_link_to_what_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_stream, "STUCK_S", 1.0)
    os.mkfifo(tmp_path / "pipe")

    def link(file, name):
        file[name] = h5py.ExternalLink(str(tmp_path / "pipe"), "y")

    with pytest.raises(PtychodaskError, match=r"the HDF5 library hangs on it"):
        mapped(hdf5_with(tmp_path / "source.h5", y=link), tmp_path)


def test_hdf5_inside_of_other_files_is_looked_at_from_afar_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_stream, "LOOK", "import os; os.abort()")
    packed = tmp_path / "source.h5.bz2"
    packed.write_bytes(bz2.compress(hdf5_with(tmp_path / "source.h5").read_bytes()))
    with pytest.raises(PtychodaskError, match=r"source\.h5\.bz2: the HDF5 library crashes on it \(signal 6\)"):
        mapped(packed, tmp_path)
    with pytest.raises(PtychodaskError, match=r"model\.weights\.h5\]: the HDF5 library crashes on it"):
        load_model(archive(tmp_path / "wts.h5.zip", members_of()))


def test_a_bzipped_hdf5_is_read_as_it_is_without_bzip2(tmp_path):
    """The process that looks at it first shares its place in the file."""
    plain = mapped(hdf5_with(tmp_path / "source.h5"), tmp_path)
    (tmp_path / "source.h5.bz2").write_bytes(bz2.compress((tmp_path / "source.h5").read_bytes()))
    (tmp_path / "packed").mkdir()
    assert mapped(tmp_path / "source.h5.bz2", tmp_path / "packed").data_hash == plain.data_hash


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
    with pytest.raises(PtychodaskError, match=rf"{many}|needs .* bytes, but the file contains"):
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
    with pytest.raises(PtychodaskError, match=r"array 'patches' has shape \(1000000000, "):
        StoredPatches(cache)
