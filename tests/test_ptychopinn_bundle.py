"""PtychoPINN's archives: they predict what PtychoPINN predicts, nothing in them is executed, damage is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.models import load_model
from ptychodask.models.ptychopinn import COUNT_OFFSET, PtychoPinnModel
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan
from ptychodask.training import train

N = 32
SCALE = 50.0


def tensor(name):
    return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}


def layer(kind, name, inputs, **config):
    nodes = [{"args": [[tensor(i) for i in inputs]] if len(inputs) > 1 else [tensor(i) for i in inputs], "kwargs": {}}]
    return {"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes * bool(inputs)}


def convolution(name, given, filters, activation="linear"):
    fields = {"filters": filters, "kernel_size": [1, 1], "strides": [1, 1], "padding": "same", "dilation_rate": [1, 1]}
    return layer("Conv2D", name, [given], **fields, groups=1, use_bias=True, activation=activation)


def small_network(members=4, n_pixels=N):
    """PtychoPINN's ends with one convolution between them: amplitude X, phase 0."""
    return [
        layer("InputLayer", "input", [], batch_shape=[None, n_pixels, n_pixels, members]),
        layer("IntensityScaler", "intensity_scaler", ["input"]),
        convolution("amplitude", "intensity_scaler", members),
        convolution("phase", "intensity_scaler", members),
        layer("CombineComplexLayer", "obj", ["amplitude", "phase"], use_polar=True),
        layer("InputLayer", "input_positions", [], batch_shape=[None, 1, 2, members]),
        layer("ReassemblePatchesLayer", "padded_obj_2", ["obj", "input_positions"], padded_size=N + 14, N=N),
        layer("TrimReconstructionLayer", "trimmed_obj", ["padded_obj_2"], output_size=n_pixels),
    ]


def small_weights(members=4):
    zeros = np.zeros(members, np.float32)
    identity = np.eye(members, dtype=np.float32)[None, None]
    return [[identity, zeros], [np.zeros_like(identity), zeros]]


def in_memory_h5(fill):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def put_weights(file, weights):
    for i, arrays in enumerate(weights):
        group = file.create_group(f"layers/conv2d_{i}/vars" if i else "layers/conv2d/vars")
        for k, array in enumerate(arrays):
            group[str(k)] = array


def keras_file(layers, fill_weights):
    output = [[layers[-1]["name"], 0, 0]]
    config = {"class_name": "Functional", "config": {"layers": layers, "output_layers": output}}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", in_memory_h5(fill_weights))
    return buffer.getvalue()


def members_of(layers=None, weights=None, scale=SCALE, fill_weights=None):
    """Contents of an archive, by name."""
    fill = fill_weights or (lambda file: put_weights(file, small_weights() if weights is None else weights))
    return {
        "diffraction_to_obj/model.keras": keras_file(small_network() if layers is None else layers, fill),
        "diffraction_to_obj/model.h5": in_memory_h5(lambda file: file.attrs.__setitem__("intensity_scale", scale)),
    }


def write_archive(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "wts.h5.zip", members_of())


def groups(n_groups=5, members=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n_groups, N, N, members), dtype=np.float32)
    return x, rng.uniform(-6, 6, (n_groups, members, 2)).astype(np.float32)


def moved(image, offset_yx_px):
    """An image whose content is moved by a sub-pixel offset: bilinear, zeros beyond the rim."""
    padded = np.pad(image.astype(np.float64), N)
    whole = np.floor(offset_yx_px).astype(int)
    part = offset_yx_px - whole
    total = np.zeros(image.shape)
    for dy, wy in ((0, 1 - part[0]), (1, part[0])):
        for dx, wx in ((0, 1 - part[1]), (1, part[1])):
            top, left = N - whole[0] - dy, N - whole[1] - dx
            total += wy * wx * padded[top : top + N, left : left + N]
    return total


def test_patches_are_those_of_ptychopinn_for_any_batch(shared):
    model = load_model(shared / "reference" / "ptychopinn_bundle" / "wts.h5.zip")
    known = np.load(shared / "reference" / "ptychopinn_predictions.npz", allow_pickle=False)
    x = known["X"]
    offset = np.ascontiguousarray(-known["offsets_xy_channel"][:, 0].transpose(0, 2, 1)[..., ::-1])
    middle = slice(16, 48)
    mean_amplitude = np.abs(known["patches"][:, middle, middle]).mean()
    first = None
    for batch_size in (1, 8, 48):
        call = model.compile(batch_size)
        starts = range(0, len(x), batch_size)
        patches = np.concatenate([call(x[i : i + batch_size], offset[i : i + batch_size]) for i in starts])
        difference = np.abs(patches - known["patches"])[:, middle, middle].max()
        # Float32 rounding of two orders of summation.
        assert difference < 2e-5 * mean_amplitude
        first = patches if first is None else first
        np.testing.assert_array_equal(patches, first)


def test_a_group_becomes_the_mean_of_its_moved_patches(archive):
    x, offset = groups()
    patches = load_model(archive).predict(x, offset)
    square = np.pad(np.ones((N // 2, N // 2)), N // 4)
    for g in range(len(x)):
        total = sum(moved(x[g, ..., c], offset[g, c]) for c in range(4))
        seen = sum(moved(square, offset[g, c]) for c in range(4))
        expected = total / (seen + COUNT_OFFSET)
        np.testing.assert_allclose(patches[g], expected, atol=1e-5 * expected.max())


def test_amplitude_and_phase_are_combined_as_the_archive_says(tmp_path):
    weights = small_weights()
    weights[1][1] = np.full(4, 0.5, np.float32)
    layers = small_network()
    x, offset = groups(2)
    polar = load_model(write_archive(tmp_path / "a.zip", members_of(layers, weights))).predict(x, offset * 0)
    layers[4]["config"]["use_polar"] = False
    cartesian = load_model(write_archive(tmp_path / "b.zip", members_of(layers, weights))).predict(x, offset * 0)
    middle = slice(N // 4, 3 * N // 4)
    mean = x.mean(axis=-1)[:, middle, middle] * 4 / (4 + COUNT_OFFSET)
    np.testing.assert_allclose(polar[:, middle, middle], mean * np.exp(0.5j), rtol=1e-5)
    np.testing.assert_allclose(cartesian[:, middle, middle], mean + 0.5j * 4 / (4 + COUNT_OFFSET), rtol=1e-5)


def test_the_archive_its_folder_and_its_unpacked_folder_are_one_model(archive, tmp_path):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(unpacked)
    found = [load_model(path) for path in (archive, tmp_path, unpacked, unpacked / "diffraction_to_obj")]
    assert len({model.content_hash for model in found}) == 1
    assert [model.path for model in found][:2] == [str(archive), str(tmp_path)]


def test_the_hash_follows_weights_and_layers(tmp_path):
    other = small_weights()
    other[0][1] = other[0][1] + 1
    wide = small_network()
    wide[2]["config"]["activation"] = "relu"
    paths = [
        write_archive(tmp_path / f"{i}.zip", contents)
        for i, contents in enumerate([members_of(), members_of(weights=other), members_of(wide), members_of(scale=2.0)])
    ]
    assert len({load_model(path).content_hash for path in paths}) == 4


def test_a_model_travels_and_predicts_the_same(archive):
    model = load_model(archive)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(*groups()), model.predict(*groups()))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_opened_and_nothing_is_unpacked(tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(str(sprung)))
    dills = ["manifest.dill", "diffraction_to_obj/params.dill", "diffraction_to_obj/custom_objects.dill"]
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = members_of() | dict.fromkeys(dills, trap) | {"../outside.txt": b"x", "/outside.txt": b"x"}
    load_model(write_archive(folder / "wts.h5.zip", contents))
    assert not sprung.exists()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "wts.h5.zip"]


def test_a_scan_of_another_size_is_refused(archive, tmp_path):
    simulate(tmp_path / "scan.zarr", probe="disc", n_pixels=16, n_patterns=20)
    with pytest.raises(PtychodaskError, match=r"takes patterns of 32 pixels, .*scan.zarr has 16"):
        load_model(archive).bind(open_scan(tmp_path / "scan.zarr"))


def test_a_scan_is_reconstructed_from_an_archive_whatever_the_chunks(archive, tmp_path):
    store = tmp_path / "scan.zarr"
    simulate(store, probe="disc", n_pixels=N, n_patterns=40, step_px=3.0)
    results = [
        reconstruct(store, archive, crop=10, groups_per_chunk=chunk, batch_size=batch, progress=False)
        for chunk, batch in ((40, 16), (7, 3))
    ]
    whole, pieces = (result["object"].to_numpy() for result in results)
    assert results[0].ptycho.records["plan"]["window"] == "uniform"
    np.testing.assert_array_equal(np.isnan(whole), np.isnan(pieces))
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)


def test_a_training_that_would_start_from_an_archive_is_refused(archive, tmp_path):
    simulate(tmp_path / "scan.zarr", probe="disc", n_pixels=N, n_patterns=40, step_px=3.0)
    with pytest.raises(PtychodaskError, match="initial is a PtychoPinnModel, expected a bundle"):
        train(tmp_path / "scan.zarr", initial=load_model(archive), progress=False)


def refused(path, match):
    with pytest.raises(PtychodaskError, match=match) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [("Lambda", "lambda_3"), ("BatchNormalization", "norm")])
def test_a_layer_that_is_not_known_is_named(tmp_path, kind, name):
    layers = small_network()
    layers.insert(2, layer(kind, name, ["intensity_scaler"], function="anything"))
    path = write_archive(tmp_path / "a.zip", members_of(layers))
    refused(path, f"its layer '{name}' is a {kind}, not a known part.*CallableModel")


def changed(index, **config):
    layers = small_network()
    layers[index]["config"].update(config)
    return {"layers": layers}


def linked(file):
    put_weights(file, small_weights())
    del file["layers/conv2d/vars/0"]
    file["layers/conv2d/vars/0"] = h5py.ExternalLink("other.h5", "/secret")


def swapped(file):
    put_weights(file, small_weights())
    file["layers/conv2d/vars"].attrs["name"] = "phase"


def scaled(file):
    put_weights(file, small_weights())
    file["layers/intensity_scaler/vars/0"] = np.float32(1)


def hollow(file):
    put_weights(file, small_weights())
    del file["layers/conv2d/vars/0"]
    file.create_dataset("layers/conv2d/vars/0", shape=(1, 1, 10**8, 4), dtype="f4", chunks=(1, 1, 1000, 4))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (changed(2, activation="exec"), "layer 'amplitude' has the activation 'exec', expected one of: linear, relu"),
        (changed(2, filters=10**6), r"layer 'amplitude' has weights \(1, 1, 4, 4\), expected 1000000 filters"),
        (changed(0, batch_shape=[None, N, N, 9]), r"takes .* expected patterns \(group, N, N, C\) and offsets"),
        (changed(0, batch_shape=[None, 30, 30, 4]), "N divisible by 4"),
        (changed(7, name="trimmed_obj", output_size=8), "trims to 8 pixels, expected 32"),
        (
            {"layers": [small_network()[i] for i in (0, 1, 5, 2)]},
            r"its network returns \(32, 32, 4\), expected one patch",
        ),
        ({"layers": small_network()[:4]}, "expected patterns"),
        ({"weights": [small_weights()[0]]}, r"have no array layers/conv2d_1"),
        ({"weights": [[w * np.float32(np.nan) for w in pair] for pair in small_weights()]}, "not finite"),
        ({"weights": [[w[..., :1] for w in pair] for pair in small_weights()]}, "expected 4 filters"),
        ({"scale": -1.0}, "intensity_scale is -1.0, expected a positive number"),
        ({"fill_weights": linked}, "have no array layers/conv2d/vars/0"),
        ({"fill_weights": swapped}, "layers/conv2d has the weights of 'phase', expected those of 'amplitude'"),
        ({"fill_weights": scaled}, "its intensity_scaler has a weight, expected the scale only in model.h5"),
        ({"fill_weights": hollow}, "not a plain float32 array"),
    ],
)
def test_a_damaged_or_foreign_network_is_refused_in_one_line(tmp_path, changes, match):
    refused(write_archive(tmp_path / "a.zip", members_of(**changes)), match)


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ({"readme.txt": b"x"}, r"found nothing in diffraction_to_obj/, expected model.keras and model.h5"),
        (
            {"diffraction_to_obj/saved_model.pb": b"x"},
            "TensorFlow SavedModel.*save it with one that writes model.keras",
        ),
        ({"diffraction_to_obj/model.h5": b"x"}, "H5 model without model.keras, an older format"),
        (
            {"diffraction_to_obj/model.h5": b"x", "diffraction_to_obj/model.keras": b"x"},
            "cannot be read as a PtychoPINN",
        ),
    ],
)
def test_another_archive_is_refused_with_the_way_out(tmp_path, contents, match):
    refused(write_archive(tmp_path / "wts.h5.zip", contents), match)
    with zipfile.ZipFile(tmp_path / "wts.h5.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    if "diffraction_to_obj" in str(contents):
        refused(tmp_path / "unpacked", match)


@pytest.mark.parametrize("n_bytes", [0, 100, 1500])
def test_a_truncated_archive_is_refused(archive, n_bytes):
    archive.write_bytes(archive.read_bytes()[:n_bytes])
    refused(archive, "cannot be read as a PtychoPINN model")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"anything")
    refused(tmp_path / "model.bin", r"is not a model bundle \(it has no model.json\), nor PtychoPINN's wts.h5.zip")
    assert isinstance(load_model(write_archive(tmp_path / "any.name", members_of())), PtychoPinnModel)
