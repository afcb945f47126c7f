"""Reader of PtychoPINN's trained models (``wts.h5.zip``), without opening any pickle.

An archive contains ``diffraction_to_obj/model.keras``, itself a zip of ``config.json`` (the layers and their order) and
``model.weights.h5``, and ``diffraction_to_obj/model.h5`` with the attribute ``intensity_scale``. These are read as JSON
and as plain arrays; the layers are built from the table below, so that nothing in the archive is executed. Its
``.dill`` members are never opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.hdf5_stream import check_bytes_in_subprocess
from ptychodask.io.npy_stream import check_compression, check_member
from ptychodask.models.backend import keras, layers, ops
from ptychodask.models.contract import Output, Predict, check_n_pixels, predict_in_batches
from ptychodask.models.model import one_line
from ptychodask.models.networks import compiled_call, convolution_dtype
from ptychodask.models.physics import ComplexPair, Tensor
from ptychodask.models.spec import BOUNDS, Precision
from ptychodask.scan import Scan

ARCHIVE = "wts.h5.zip"
"""File name of PtychoPINN's archive."""

MODEL_FOLDER = "diffraction_to_obj"
"""Folder of the inference model in an archive."""

LARGEST_MEMBER = 2**31
"""Size limit of a file in an archive, bytes."""

LARGEST_PATTERN = 4096
"""Size limit of patterns a network is built for, pixels across."""

COUNT_OFFSET = 1e-3
"""Added to the number of members that cover a pixel before dividing their sum by it, as in PtychoPINN."""

ACTIVATIONS = ("linear", "relu", "sigmoid", "silu", "softplus", "swish", "tanh")
"""Activations PtychoPINN offers, by their Keras names."""

CONVOLUTION_FIELDS = ("filters", "kernel_size", "strides", "padding", "dilation_rate", "groups", "use_bias")

_FILE_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_CONTENT_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class PtychoPinnLayer(NamedTuple):
    """Entry of the archive's list of layers."""

    kind: str
    """Class of the layer."""

    name: str

    config: dict[str, Any]

    inputs: list[str]
    """Names of its input layers, in order."""

    arguments: list[Any]
    """Further arguments of its call."""


@dataclass(frozen=True, eq=False)
class PtychoPinnModel:
    """A trained PtychoPINN network: one patch per group, at the group's centre.

    The amplitude of its object follows PtychoPINN's scaling of the probe, not the scan's calibration.
    """

    layers: list[PtychoPinnLayer]
    """Layers of the network, each after its inputs."""

    weights: dict[str, list[NDArray[np.float32]]]
    """Arrays of each layer with weights, by the layer's name."""

    intensity_scale: float
    """Factor from X to the network's input."""

    n_pixels: int
    """Pixels across a pattern, N."""

    members: int
    """Patterns in one group, C."""

    content_hash: str
    """SHA-256 over layers, weights and scale."""

    path: str | None = None
    """The archive, or None for a model that exists only in memory."""

    kind: str = "pinn"

    output: Output = "group"

    runs_on_keras: ClassVar[bool] = True
    """Runs on Keras' backend, on the devices visible to it."""

    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)
    """Precisions it can compute in."""

    trained_on: ClassVar[Mapping[str, Any]] = {}
    """Empty: the archive has no record of the scans."""

    def __repr__(self) -> str:
        return one_line(self, (array for arrays in self.weights.values() for array in arrays))

    def bind(self, scan: Scan) -> PtychoPinnModel:
        """The model itself: a scan's normalised input is PtychoPINN's input.

        Raises
        ------
        PtychodaskError
            If the scan's patterns differ in size from the network's.
        """
        check_n_pixels(self, scan)
        return self

    def network(self, precision: Precision = "float32") -> keras.Model:
        """The Keras network, see `build_ptychopinn`."""
        return build_ptychopinn(self, precision)

    def compile(self, batch_size: int, precision: Precision = "float32") -> Predict:
        """Prediction function of a fixed batch size.

        From X and offsets, as in `Model.compile`, to complex64 (batch_size, N, N).
        """
        return compiled_call(self.network(precision), batch_size)

    def predict(self, x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
        """Patches complex64 (group, N, N) of any number of groups.

        Arguments as in `Model.predict`.
        """
        return predict_in_batches(self, x, offset_yx_px)


def looks_like_ptychopinn(path: Path) -> bool:
    """True if a path looks like PtychoPINN's archive.

    Also for a folder that contains the archive, and for the unpacked archive.
    """
    if path.is_dir():
        return any((path / name).exists() for name in (ARCHIVE, MODEL_FOLDER, "model.keras", "saved_model.pb"))
    return path.suffix == ".zip" or zipfile.is_zipfile(path)


def read_ptychopinn(path: str | Path) -> PtychoPinnModel:
    """Read a trained model of PtychoPINN.

    Parameters
    ----------
    path : path
        ``wts.h5.zip``, the folder that contains it, or the folder ``diffraction_to_obj`` of an unpacked archive.

    Returns
    -------
    PtychoPinnModel

    Raises
    ------
    PtychodaskError
        If the archive is damaged, of an older format (SavedModel, H5), or its network has a layer unknown in
        PtychoPINN.

    Notes
    -----
    Layers and equations: Hoidn, Mishra & Mehta, Scientific Reports 13 (2023) 22789, and the code published with it.
    """
    path = Path(path)
    source = path / ARCHIVE if (path / ARCHIVE).is_file() else path
    with _reading(source):
        model = replace(_read_model(source), path=str(path))
        shape = model.network().output_shape
    if shape != (None, model.n_pixels, model.n_pixels, 2):
        raise PtychodaskError(
            f"{source}: its network returns {shape[1:]}, expected one patch of {model.n_pixels} pixels per group; "
            "pass the model that PtychoPINN saved for inference"
        )
    return model


def _read_model(source: Path) -> PtychoPinnModel:
    parts = _read_folder(source) if source.is_dir() else _read_archive(source)
    with zipfile.ZipFile(io.BytesIO(parts["model.keras"])) as archive:
        n_bytes = len(parts["model.keras"])
        config = json.loads(_read_member(archive, "config.json", n_bytes, source))
        weights_file = _read_member(archive, "model.weights.h5", n_bytes, source)
    for name, content in (("model.weights.h5", weights_file), ("model.h5", parts["model.h5"])):
        check_bytes_in_subprocess(content, f"{source}[{name}]")
    entries = _layers(config, source)
    n_pixels, members = _input_shape(entries, source)
    weights = _read_weights(weights_file, entries, source)
    scale = _intensity_scale(parts["model.h5"], source)
    return PtychoPinnModel(entries, weights, scale, n_pixels, members, _hash(entries, weights, scale))


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn any error that a damaged file causes into a one-line `PtychodaskError`."""
    try:
        yield
    except PtychodaskError:
        raise
    except (*_FILE_ERRORS, *_CONTENT_ERRORS) as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise PtychodaskError(
            f"{source}: cannot be read as a PtychoPINN model ({type(error).__name__}: {first_line}); copy the original "
            "file again"
        ) from error


def _read_archive(source: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{MODEL_FOLDER}/")]
        _check_format({name.removeprefix(f"{MODEL_FOLDER}/").split("/")[0] for name in names}, source)
        n_bytes = source.stat().st_size
        return {
            name: _read_member(archive, f"{MODEL_FOLDER}/{name}", n_bytes, source)
            for name in ("model.keras", "model.h5")
        }


def _read_folder(source: Path) -> dict[str, bytes]:
    folder = source / MODEL_FOLDER if (source / MODEL_FOLDER).is_dir() else source
    _check_format({path.name for path in folder.iterdir()}, source)
    return {name: _read_file(folder / name, source) for name in ("model.keras", "model.h5")}


def _check_format(names: set[str], source: Path) -> None:
    if {"model.keras", "model.h5"} <= names:
        return
    remedy = "load it with the PtychoPINN that wrote it, and save it with one that writes model.keras (Keras 3)"
    if "saved_model.pb" in names:
        raise PtychodaskError(f"{source}: is a TensorFlow SavedModel, which Keras 3 does not read; {remedy}")
    if "model.h5" in names:
        raise PtychodaskError(f"{source}: is an H5 model without model.keras, an older format; {remedy}")
    listed = ", ".join(sorted(names)[:8]) or "nothing"
    raise PtychodaskError(
        f"{source}: found {listed} in {MODEL_FOLDER}/, expected model.keras and model.h5; pass PtychoPINN's {ARCHIVE}"
    )


def _read_member(archive: zipfile.ZipFile, name: str, n_bytes: int, source: Path) -> bytes:
    """Content of one member of an archive of `n_bytes`.

    Read into memory: nothing is unpacked to disk, so that a member's name cannot write outside of a folder.
    """
    member = archive.getinfo(name)
    check_member(member, n_bytes, f"{source}[{name}]")
    check_compression(member.file_size, member.compress_size, f"{source}[{name}]")
    _check_size(member.file_size, name, source)
    return archive.read(name)


def _read_file(path: Path, source: Path) -> bytes:
    _check_size(path.stat().st_size, path.name, source)
    return path.read_bytes()


def _check_size(n_bytes: int, name: str, source: Path) -> None:
    if n_bytes > LARGEST_MEMBER:
        raise PtychodaskError(
            f"{source}: {name} has {n_bytes} bytes, expected at most {LARGEST_MEMBER}; check that it is PtychoPINN's "
            f"{ARCHIVE}"
        )


def _layers(config: dict[str, Any], source: Path) -> list[PtychoPinnLayer]:
    if config["class_name"] != "Functional":
        raise PtychodaskError(f"{source}: its network is {config['class_name']}, expected PtychoPINN's Functional")
    entries = [_layer(entry, source) for entry in config["config"]["layers"]]
    output = config["config"]["output_layers"]
    if [entries[-1].name, 0, 0] not in (output, *output):
        raise PtychodaskError(
            f"{source}: its last layer is '{entries[-1].name}' but its output {output}, expected the last layer"
        )
    return entries


def _layer(entry: dict[str, Any], source: Path) -> PtychoPinnLayer:
    kind, nodes = entry["class_name"], entry["inbound_nodes"]
    if kind not in BUILDERS:
        raise PtychodaskError(
            f"{source}: its layer '{entry['name']}' is a {kind}, not a known part of PtychoPINN's networks; "
            "wrap the network in a CallableModel"
        )
    if len(nodes) > 1:
        raise PtychodaskError(
            f"{source}: its layer '{entry['name']}' is used {len(nodes)} times, expected once; "
            "wrap the network in a CallableModel"
        )
    arguments = nodes[0]["args"] if nodes else []
    return PtychoPinnLayer(kind, entry["name"], entry["config"], _names_of_inputs(arguments), arguments[1:])


def _names_of_inputs(arguments: Any) -> list[str]:
    """Names of the layers that serialised call arguments refer to, in order."""
    if isinstance(arguments, list):
        return [name for argument in arguments for name in _names_of_inputs(argument)]
    if isinstance(arguments, dict) and arguments["class_name"] == "__keras_tensor__":
        return [arguments["config"]["keras_history"][0]]
    return []


def _input_shape(entries: list[PtychoPinnLayer], source: Path) -> tuple[int, int]:
    """Pattern size N and group size C."""
    shapes = [entry.config["batch_shape"] for entry in entries if entry.kind == "InputLayer"]
    n_pixels, members = shapes[0][2:] if shapes and len(shapes[0]) == 4 else (0, 0)
    if (
        shapes != [[None, n_pixels, n_pixels, members], [None, 1, 2, members]]
        or n_pixels % 4
        or n_pixels > LARGEST_PATTERN
        or members > BOUNDS["members"][1]
    ):
        raise PtychodaskError(
            f"{source}: its network takes {shapes}, expected patterns (group, N, N, C) and offsets (group, 1, 2, C), "
            f"N divisible by 4 and at most {LARGEST_PATTERN}, C at most {BOUNDS['members'][1]}; pass the model that "
            "PtychoPINN saved for inference"
        )
    return n_pixels, members


def _read_weights(content: bytes, entries: list[PtychoPinnLayer], source: Path) -> dict[str, list[NDArray[np.float32]]]:
    weights = {}
    with h5py.File(io.BytesIO(content), "r") as file:
        convolutions = [entry for entry in entries if entry.kind == "Conv2D"]
        for i, entry in enumerate(convolutions):
            # In the weights file Keras numbers the layers of a class in order and ignores their names.
            group = f"layers/conv2d_{i}" if i else "layers/conv2d"
            shapes = _convolution_shapes(entry.config)
            arrays = [_array(file, f"{group}/vars/{k}", source, len(content)) for k in range(len(shapes))]
            for array, shape in zip(arrays, shapes, strict=True):
                if (*array.shape[:-2], array.shape[-1]) != shape:
                    raise PtychodaskError(
                        f"{source}: layer '{entry.name}' has weights {array.shape}, expected {entry.config['filters']} "
                        f"filters of {entry.config['kernel_size']}; copy the archive again"
                    )
            layer_name = file[f"{group}/vars"].attrs.get("name", entry.name)
            if layer_name != entry.name:
                raise PtychodaskError(
                    f"{source}: {group} has the weights of '{layer_name}', expected those of '{entry.name}'; "
                    "save the model again with the Keras version that PtychoPINN requires"
                )
            weights[entry.name] = arrays
        if "layers/intensity_scaler/vars/0" in file:
            raise PtychodaskError(
                f"{source}: its intensity_scaler has a weight, expected the scale only in model.h5; "
                "wrap the network in a CallableModel"
            )
    return weights


def _convolution_shapes(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of kernel and bias, without the kernel's input channels."""
    kernel = (*config["kernel_size"], config["filters"])
    return [kernel, (config["filters"],)] if config["use_bias"] else [kernel]


def _array(file: h5py.File, name: str, source: Path, n_bytes: int) -> NDArray[np.float32]:
    """A plain array stored in the file itself.

    Links to other files, and arrays of more than the file's `n_bytes`, are refused.
    """
    node: Any = file
    for part in name.split("/"):
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise PtychodaskError(f"{source}: its weights have no array {name}; copy the archive again")
        node = node[part]
    plain = (
        isinstance(node, h5py.Dataset) and node.dtype == np.float32 and node.external is None and node.chunks is None
    )
    if not plain or node.is_virtual or node.nbytes > n_bytes:
        raise PtychodaskError(
            f"{source}: {name} is not a plain float32 array as Keras writes it; copy the archive again"
        )
    array = np.asarray(node[()])
    if not np.isfinite(array).all():
        raise PtychodaskError(f"{source}: {name} has values that are not finite; train the model again")
    return array


def _intensity_scale(content: bytes, source: Path) -> float:
    with h5py.File(io.BytesIO(content), "r") as file:
        scale = float(file.attrs["intensity_scale"])
    if not (math.isfinite(scale) and scale > 0):
        raise PtychodaskError(f"{source}: its intensity_scale is {scale}, expected a positive number")
    return scale


def _hash(entries: list[PtychoPinnLayer], weights: dict[str, list[NDArray[np.float32]]], scale: float) -> str:
    digest = hashlib.sha256(json.dumps([entries, scale], sort_keys=True).encode())
    for name in weights:
        for array in weights[name]:
            digest.update(array.tobytes())
    return digest.hexdigest()


def build_ptychopinn(model: PtychoPinnModel, precision: Precision = "float32") -> keras.Model:
    """Keras network of a model, from X and offsets to patches.

    X is (group, N, N, C), offsets are (group, C, 2), patches (group, N, N, 2). With `precision` "mixed" the
    convolutions, pooling and upsampling are computed in bfloat16.
    """
    dtype = convolution_dtype(precision)
    x = keras.Input((model.n_pixels, model.n_pixels, model.members), name="x")
    offset = keras.Input((model.members, 2), name="offset_yx_px")
    network_inputs = iter([x, offset])
    values: dict[str, Any] = {}
    for entry in model.layers:
        inputs = [next(network_inputs)] if entry.kind == "InputLayer" else [values[name] for name in entry.inputs]
        arguments = {"dtype": dtype} if entry.kind in MIXED_PRECISION_KINDS else {}
        if entry.name in model.weights:
            _check_channels(entry, model.weights[entry.name][0].shape[-2], inputs[0].shape[-1])
        values[entry.name] = BUILDERS[entry.kind](entry, *inputs, **arguments)
    network = keras.Model([x, offset], values[model.layers[-1].name], name="ptychopinn")
    for name, arrays in model.weights.items():
        network.get_layer(name).set_weights(arrays)
    return network


def _check_channels(entry: PtychoPinnLayer, stored: int, n_channels: int) -> None:
    """Raise `PtychodaskError` unless a convolution's weights fit its input channels.

    Checked first, since Keras would allocate weights for any number of input channels.
    """
    if stored * entry.config["groups"] != n_channels:
        raise PtychodaskError(
            f"model: layer '{entry.name}' has {n_channels} input channels, expected {entry.config['groups']} groups of "
            f"{stored} as in its weights; copy the archive again"
        )


class GroupReassembly(layers.Layer):
    """Mean of a group's patches around its centre, as in PtychoPINN.

    Takes real and imaginary parts (group, N, N, C) and offsets (group, C, 2), pixels; returns (group, N, N, 2).

    Notes
    -----
    Each patch is shifted by its offset (bilinear, zeros beyond its rim) and all are summed; the sum is divided by the
    number of members whose central N/2 square, shifted alike, covers the pixel, plus `COUNT_OFFSET`. A pixel that no
    member's central square covers is therefore large and meaningless; cropping to the middle removes it.
    """

    def call(self, real: Tensor, imag: Tensor, offset_yx_px: Tensor) -> Tensor:
        n_pixels = real.shape[1]
        along_y = shift_matrices(offset_yx_px[..., 0], n_pixels)
        along_x = shift_matrices(offset_yx_px[..., 1], n_pixels)
        centre = np.zeros(n_pixels, np.float32)
        centre[n_pixels // 4 : n_pixels // 4 + n_pixels // 2] = 1
        centre = ops.convert_to_tensor(centre)
        n_members = ops.einsum("bcy,bcx->byx", ops.matmul(along_y, centre), ops.matmul(along_x, centre))
        summed = [
            ops.sum(ops.matmul(ops.matmul(along_y, ops.transpose(part, (0, 3, 1, 2))), along_x_t), axis=1)
            for along_x_t in [ops.transpose(along_x, (0, 1, 3, 2))]
            for part in (real, imag)
        ]
        return ops.stack(summed, axis=-1) / (n_members + COUNT_OFFSET)[..., None]

    def compute_output_shape(self, real_shape: Any, *_: Any) -> Any:
        return (*real_shape[:3], 2)


def shift_matrices(shift_px: Tensor, n_pixels: int) -> Tensor:
    """Matrices that shift a row of pixels by linear interpolation.

    Beyond the ends of the row there are zeros.

    Parameters
    ----------
    shift_px : tensor (...)
        Shift of the content towards larger indices, pixels.
    n_pixels : int

    Returns
    -------
    tensor (..., N, N)
        ``max(0, 1 − |k − shift − j|)`` in row k and column j.

    Examples
    --------
    >>> np.asarray(shift_matrices(np.float32([1.25]), 3)[0]).tolist()
    [[0.0, 0.0, 0.0], [0.75, 0.0, 0.0], [0.25, 0.75, 0.0]]
    """
    index = np.arange(n_pixels, dtype=np.float32)
    distance = ops.convert_to_tensor(index[:, None] - index) - ops.convert_to_tensor(shift_px)[..., None, None]
    return ops.maximum(0.0, 1.0 - ops.abs(distance))


def _identity(entry: PtychoPinnLayer, value: Any) -> Any:
    return value


def _convolve(entry: PtychoPinnLayer, value: Tensor, dtype: str) -> Tensor:
    fields = {name: entry.config[name] for name in CONVOLUTION_FIELDS}
    activation = _activation(entry, entry.config["activation"])
    return layers.Conv2D(**fields, activation=activation, name=entry.name, dtype=dtype)(value)


def _activation(entry: PtychoPinnLayer, name: Any) -> str:
    if name not in ACTIVATIONS:
        raise PtychodaskError(
            f"model: layer '{entry.name}' has the activation {name!r}, expected one of: {', '.join(ACTIVATIONS)}"
        )
    return str(name)


def _activate(entry: PtychoPinnLayer, value: Tensor) -> Tensor:
    name = _activation(entry, entry.config["activation_name"])
    activated = layers.Activation(name)(value)
    return activated * float(entry.config["scale"]) if name == "tanh" else activated


def _pool(entry: PtychoPinnLayer, value: Tensor, dtype: str) -> Tensor:
    fields = {name: entry.config[name] for name in ("pool_size", "strides", "padding")}
    return layers.MaxPooling2D(**fields, dtype=dtype)(value)


def _upsample(entry: PtychoPinnLayer, value: Tensor, dtype: str) -> Tensor:
    fields = {name: entry.config[name] for name in ("size", "interpolation")}
    return layers.UpSampling2D(**fields, dtype=dtype)(value)


def _slice_channels(entry: PtychoPinnLayer, value: Tensor) -> Tensor:
    ((_, channels),) = entry.arguments
    if [part["class_name"] for part in entry.arguments[0]] != ["__ellipsis__", "__slice__"]:
        raise PtychodaskError(f"model: layer '{entry.name}' takes {entry.arguments}, expected a slice of channels")
    return value[..., slice(*(channels["config"][name] for name in ("start", "stop", "step")))]


def _centre_mask(entry: PtychoPinnLayer, value: Tensor) -> NDArray[np.float32]:
    n_pixels = value.shape[1]
    if n_pixels > LARGEST_PATTERN:
        raise PtychodaskError(f"model: layer '{entry.name}' has {n_pixels} pixels, expected at most {LARGEST_PATTERN}")
    mask = np.zeros((1, n_pixels, n_pixels, 1), np.float32)
    inner = slice(n_pixels // 4, n_pixels // 4 + n_pixels // 2)
    mask[:, inner, inner] = 1
    return 1 - mask if entry.config["kind"] == "border" else mask


def _combine(entry: PtychoPinnLayer, first: Tensor, second: Tensor) -> ComplexPair:
    first, second = ops.cast(first, "float32"), ops.cast(second, "float32")
    if entry.config.get("use_polar", False):
        return first * ops.cos(second), first * ops.sin(second)
    return first, second


def _reassemble(entry: PtychoPinnLayer, patches: ComplexPair, offset_yx_px: Tensor) -> Tensor:
    return GroupReassembly(name=entry.name)(*patches, offset_yx_px)


def _trim(entry: PtychoPinnLayer, value: Tensor) -> Tensor:
    if entry.config["output_size"] not in (None, value.shape[1]):
        raise PtychodaskError(
            f"model: layer '{entry.name}' trims to {entry.config['output_size']} pixels, expected {value.shape[1]}"
        )
    return value


def _single_member(entry: PtychoPinnLayer, patches: ComplexPair) -> Tensor:
    return ops.concatenate(patches, axis=-1)


BUILDERS: dict[str, Callable[..., Any]] = {
    "InputLayer": _identity,
    # PtychoPINN multiplies X by intensity_scale and divides by exp(log_scale), which it sets to the same number.
    "IntensityScaler": _identity,
    "Conv2D": _convolve,
    "MaxPooling2D": _pool,
    "UpSampling2D": _upsample,
    "GetItem": _slice_channels,
    "Silu": lambda entry, value: ops.silu(value),
    "ActivationLayer": _activate,
    "ZeroPadding2D": lambda entry, value: layers.ZeroPadding2D(entry.config["padding"])(value),
    "CenterMaskLayer": _centre_mask,
    "Multiply": lambda entry, first, second: ops.multiply(first, second),
    "Add": lambda entry, first, second: ops.add(first, second),
    "CombineComplexLayer": _combine,
    "ReassemblePatchesLayer": _reassemble,
    "PadReconstructionLayer": _single_member,
    "TrimReconstructionLayer": _trim,
}
"""Builder of each layer class of an archive: from its entry and input values to its output."""

MIXED_PRECISION_KINDS = ("Conv2D", "MaxPooling2D", "UpSampling2D")
"""Layer classes computed in the requested precision."""
