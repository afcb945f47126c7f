"""Networks of other libraries: what they are called with, what they must return, and that the engine takes them."""

from __future__ import annotations

import io
import subprocess
import sys

import cloudpickle
import keras
import numpy as np
import pytest

from ptychodask.errors import PtychodaskError
from ptychodask.models import CallableModel, Model, PtychoPinnModel
from ptychodask.models.choose import resolve_model
from ptychodask.models.contract import AdaptedModel, PatchModel
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

N = 16


def patches_by_hand(x, offset_yx_px):
    """Patches that depend on every input of a group."""
    phase = offset_yx_px.sum(axis=-1)[..., None, None]
    return (np.moveaxis(x, -1, 1) * np.exp(0.1j * phase)).astype(np.complex64)


def model_of(call, **fields):
    defaults = {"n_pixels": N, "members": 4, "content_hash": "by hand"}
    return CallableModel(load=lambda: call, **{**defaults, **fields})


def groups(n_groups=5, members=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n_groups, N, N, members), dtype=np.float32)
    return x, rng.uniform(-3, 3, (n_groups, members, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "scan.zarr"
    simulate(path, probe="disc", n_pixels=N, n_patterns=40, step_px=2.0, dose=1e5)
    return path


def test_it_is_what_the_engine_asks_for():
    model = model_of(patches_by_hand)
    assert isinstance(model, PatchModel)
    assert (model.kind, model.output, model.path) == ("own", "member", None)


class LeastModel:
    """A user's class with the members of `MinimalModel` only."""

    content_hash, kind, path, output, members, n_pixels = "least", "least", None, "member", 4, N

    def bind(self, scan):
        return self

    def compile(self, batch_size):
        return patches_by_hand


def test_a_class_with_the_least_members_is_completed_at_the_border(store):
    assert not isinstance(LeastModel(), PatchModel)
    model = resolve_model(open_scan(store), LeastModel())
    assert isinstance(model, PatchModel)
    assert model.precisions == ("float32",)
    ds = reconstruct(store, LeastModel(), progress=False)
    by_hand = reconstruct(store, model_of(patches_by_hand), progress=False)
    np.testing.assert_array_equal(ds["object"], by_hand["object"])
    assert ds.ptycho.records["model"] == {"kind": "least", "hash": "least", "path": None}
    with pytest.raises(PtychodaskError, match="precision"):
        reconstruct(store, LeastModel(), precision="mixed", progress=False)


@pytest.mark.parametrize("kind", [Model, PtychoPinnModel, CallableModel, AdaptedModel])
def test_every_model_class_has_the_complete_interface(kind):
    members = {name for base in PatchModel.__mro__ for name in vars(base) if not name.startswith("_")}
    assert members >= {"bind", "compile", "path", "precisions", "runs_on_keras", "trained_on"}
    assert members <= set(dir(kind)) | set(kind.__dataclass_fields__)


def test_a_callable_runs_without_keras(store):
    code = (
        "import sys\n"
        "import numpy as np\n"
        "import ptychodask\n"
        "call = lambda x, offset_yx_px: np.moveaxis(x, -1, 1).astype(np.complex64)\n"
        f"model = ptychodask.CallableModel(load=lambda: call, n_pixels={N}, members=4, content_hash='x')\n"
        f"ds = ptychodask.reconstruct({str(store)!r}, model, progress=False)\n"
        "assert np.isfinite(ds['object']).any()\n"
        f"model.predict(np.ones((1, {N}, {N}, 4), np.float32), np.zeros((1, 4, 2), np.float32))\n"
        "sys.exit(any(name in sys.modules for name in ('keras', 'tensorflow', 'torch', 'jax')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_any_number_of_groups_is_predicted_in_batches_of_one_size():
    sizes = []

    def call(x, offset_yx_px):
        sizes.append(len(x))
        return patches_by_hand(x, offset_yx_px)

    x, offset = groups(71)
    np.testing.assert_array_equal(model_of(call).predict(x, offset), patches_by_hand(x, offset))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("domain", ["normalised", "amplitude", "counts"])
def test_patterns_come_in_the_unit_that_is_asked_for(store, domain):
    scan = open_scan(store)
    x = scan.network_input(slice(0, 3))[..., None]
    expected = {"normalised": x, "amplitude": scan.amplitude(slice(0, 3))[..., None]}
    expected["counts"] = expected["amplitude"] ** 2
    model = model_of(lambda x, offset: np.moveaxis(x, -1, 1) + 0j, members=1, input_domain=domain).bind(scan)
    patches = model.predict(x, np.zeros((3, 1, 2), np.float32))
    np.testing.assert_allclose(patches[:, 0].real, expected[domain][..., 0], rtol=1e-5)


def test_a_unit_of_a_scan_needs_the_scan():
    with pytest.raises(PtychodaskError, match=r"reads counts, .* call bind\(scan\) before predicting"):
        model_of(patches_by_hand, input_domain="counts").predict(*groups())


def test_a_scan_of_another_size_is_refused(store):
    with pytest.raises(PtychodaskError, match="takes patterns of 32 pixels"):
        model_of(patches_by_hand, n_pixels=32).bind(open_scan(store))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"output": "both"}, "output is 'both', expected one of: member, group"),
        ({"input_domain": "intensity"}, "input_domain is 'intensity', expected one of: normalised, amplitude, counts"),
        ({"members": 0}, "members is 0, expected 1 or more"),
        ({"content_hash": ""}, "content_hash is empty"),
    ],
)
def test_a_wrong_description_is_refused(fields, match):
    with pytest.raises(PtychodaskError, match=match):
        model_of(patches_by_hand, **fields)


@pytest.mark.parametrize(
    ("call", "fields", "match"),
    [
        (lambda x, offset: x + 0j, {}, r"returned complex64 \(32, 16, 16, 4\), expected complex \(32, 4, 16, 16\)"),
        (lambda x, offset: np.moveaxis(x, -1, 1), {}, r"returned float32 \(32, 4, 16, 16\), expected complex"),
        (patches_by_hand, {"output": "group"}, r"expected complex \(32, 16, 16\) for output='group'"),
    ],
)
def test_patches_of_another_form_are_refused(call, fields, match):
    with pytest.raises(PtychodaskError, match=match):
        model_of(call, **fields).predict(*groups())


def test_the_network_is_opened_where_it_runs_and_never_sent():
    def load():
        unsendable = io.BytesIO().getbuffer()
        return lambda x, offset_yx_px: patches_by_hand(x, offset_yx_px) + len(unsendable)

    model = CallableModel(load=load, n_pixels=N, members=4, content_hash="opened")
    model.predict(*groups())
    travelled = cloudpickle.loads(cloudpickle.dumps(model))
    np.testing.assert_array_equal(travelled.predict(*groups()), model.predict(*groups()))


@pytest.mark.parametrize("output", ["member", "group"])
def test_a_scan_is_reconstructed_whatever_the_chunks(store, output):
    def call(x, offset_yx_px):
        patches = patches_by_hand(x, offset_yx_px)
        return patches if output == "member" else patches.mean(axis=1)

    model = model_of(call, output=output, content_hash=f"by hand, {output}")
    whole, pieces = (
        reconstruct(store, model, crop=8, groups_per_chunk=chunk, batch_size=batch, progress=False)["object"].to_numpy()
        for chunk, batch in ((40, 16), (7, 3))
    )
    assert np.isfinite(whole).any()
    np.testing.assert_array_equal(np.isnan(whole), np.isnan(pieces))
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)


def test_a_keras_network_plugs_in():
    layer = keras.layers.Conv2D(8, 3, padding="same")
    network = keras.Sequential([keras.Input((N, N, 4)), layer])

    def load():
        def call(x, offset_yx_px):
            found = np.moveaxis(keras.ops.convert_to_numpy(network(x, training=False)), -1, 1)
            return found[:, :4] * np.exp(1j * found[:, 4:])

        return call

    x, offset = groups(3)
    patches = CallableModel(load=load, n_pixels=N, members=4, content_hash="keras").predict(x, offset)
    kernel, bias = (np.asarray(weight, np.float64) for weight in layer.get_weights())
    # The middle pixel by hand.
    expected = np.einsum("gyxc,yxcf->gf", x[:, 7:10, 7:10], kernel) + bias
    np.testing.assert_allclose(patches[:, :, 8, 8], expected[:, :4] * np.exp(1j * expected[:, 4:]), rtol=1e-4)


def test_a_torch_network_plugs_in():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 8, kernel_size=1).eval()

    def load():
        def call(x, offset_yx_px):
            with torch.no_grad():
                found = network(torch.from_numpy(x).movedim(-1, 1)).numpy()
            return found[:, :4] + 1j * found[:, 4:]

        return call

    x, offset = groups(3)
    patches = CallableModel(load=load, n_pixels=N, members=4, content_hash="torch").predict(x, offset)
    kernel = network.weight.detach().numpy()[..., 0, 0].astype(np.float64)
    found = np.einsum("gyxc,fc->gfyx", x, kernel) + network.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(patches, found[:, :4] + 1j * found[:, 4:], atol=1e-5)


def test_an_onnx_network_plugs_in(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    node = onnx.helper.make_node("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2])
    shapes = {"x": ["g", N, N, 4], "y": ["g", 4, N, N]}
    x_info, y_info = (onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v) for k, v in shapes.items())
    graph = onnx.helper.make_graph([node], "network", [x_info], [y_info])
    file = tmp_path / "network.onnx"
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), file)

    def load():
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x, offset_yx_px: session.run(None, {"x": x})[0] * np.complex64(1j)

    x, offset = groups(3)
    patches = CallableModel(load=load, n_pixels=N, members=4, content_hash="onnx").predict(x, offset)
    np.testing.assert_array_equal(patches, np.moveaxis(x, -1, 1) * np.complex64(1j))
