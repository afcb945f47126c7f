"""PtychoPINN's trained models: its `wts.h5.zip` becomes a network of our own, and no pickle in it is ever opened.

An archive holds ``diffraction_to_obj/model.keras``, itself a zip of ``config.json`` (which layers, in which order) and
``model.weights.h5``, and ``diffraction_to_obj/model.h5`` with the attribute ``intensity_scale``. These are read as JSON
and as plain arrays; the layers are built from the table below, so that nothing of the archive is executed. Its
``.dill`` members are left closed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import h5py
import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from ptychodask.io.hdf5_stream import check_bytes_in_subprocess
from ptychodask.io.npy_stream import check_compression, check_member
from ptychodask.models.model import CompiledCall, check_n_pixels, compiled_call, one_line, predict_in_batches
from ptychodask.models.networks import convolution_dtype
from ptychodask.models.physics import ComplexPair, Tensor
from ptychodask.models.spec import BOUNDS, Precision
from ptychodask.scan import PtychodaskError, Scan

ARCHIVE = "wts.h5.zip"
"""Name that PtychoPINN gives to its archive."""

MODEL_FOLDER = "diffraction_to_obj"
"""Folder of the inference model in an archive."""

LARGEST_MEMBER = 2**31
"""Bytes of the largest file in an archive that is read."""

LARGEST_PATTERN = 4096
"""Pixels across the largest pattern that a network is built for."""

UNSEEN = 1e-3
"""Added to the number of members that see a pixel before it divides their sum, as PtychoPINN does."""

ACTIVATIONS = ("linear", "relu", "sigmoid", "silu", "softplus", "swish", "tanh")
"""Activations that PtychoPINN offers, by their Keras names."""

CONVOLUTION_FIELDS = ("filters", "kernel_size", "strides", "padding", "dilation_rate", "groups", "use_bias")

_OF_FILES = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_OF_CONTENT = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class PtychoPinnLayer(NamedTuple):
    """One entry of the archive's list of layers."""

    kind: str
    """Class of the layer."""

    name: str

    config: dict[str, Any]

    inputs: list[str]
    """Names of the layers that it reads, in order."""

    arguments: list[Any]
    """What its call takes beside them."""


@dataclass(frozen=True, eq=False)
class PtychoPinnModel:
    """A trained PtychoPINN network: one patch per group, at the group's centre.

    Its object has the amplitude that PtychoPINN's own scaling of the probe gave it, which is not that of the scan's
    calibration.
    """

    layers: list[PtychoPinnLayer]
    """What the network is made of, in an order that can be built."""

    weights: dict[str, list[NDArray[np.float32]]]
    """Arrays of each layer that has any, by the layer's name."""

    intensity_scale: float
    """Factor from X to what the network is called with."""

    n_pixels: int
    """Pixels across a pattern, N."""

    members: int
    """Patterns in one group, C."""

    content_hash: str
    """SHA-256 over layers, weights and scale."""

    path: str | None = None
    """The archive, or None for a model that lives in memory alone."""

    kind: str = "pinn"

    output: Literal["member", "group"] = "group"

    runs_on_keras: ClassVar[bool] = True
    """Keras' backend computes it, on the devices that it sees."""

    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)
    """Precisions that it computes in."""

    def __repr__(self) -> str:
        return one_line(self, (array for arrays in self.weights.values() for array in arrays))

    def bind(self, scan: Scan) -> PtychoPinnModel:
        """The model for a scan, whose normalised input is PtychoPINN's own; raises `PtychodaskError` for another N."""
        check_n_pixels(self, scan)
        return self

    def network(self, precision: Precision = "float32") -> keras.Model:
        """The Keras network: X (group, N, N, C) and offsets (group, C, 2) to patches (group, N, N, 2)."""
        return build_ptychopinn(self, precision)

    def compile(self, batch_size: int, precision: Precision = "float32") -> CompiledCall:
        """One call of a fixed batch size: X and offsets, as in `Model.compile`, to complex64 (batch_size, N, N)."""
        return compiled_call(self.network(precision), batch_size)

    def predict(self, x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
        """Patches complex64 (group, N, N) of any number of groups; arguments as in `Model.predict`."""
        return predict_in_batches(self, x, offset_yx_px)


def holds_ptychopinn(path: Path) -> bool:
    """Whether a path looks like what PtychoPINN saves: an archive, or a folder that has one or was one."""
    if path.is_dir():
        return any((path / name).exists() for name in (ARCHIVE, MODEL_FOLDER, "model.keras", "saved_model.pb"))
    return path.suffix == ".zip" or zipfile.is_zipfile(path)


def read_ptychopinn(path: str | Path) -> PtychoPinnModel:
    """Read a trained model of PtychoPINN.

    Parameters
    ----------
    path : path
        ``wts.h5.zip``, the folder that holds it, or the folder ``diffraction_to_obj`` of an unpacked one.

    Returns
    -------
    PtychoPinnModel

    Raises
    ------
    PtychodaskError
        If the archive is damaged, of an older format (SavedModel, H5), or its network has a part that is not
        PtychoPINN's.

    Notes
    -----
    Layers and formulas: Hoidn, Mishra & Mehta, Scientific Reports 13 (2023) 22789, and the code published with it.
    """
    path = Path(path)
    source = path / ARCHIVE if (path / ARCHIVE).is_file() else path
    with _one_line(source):
        model = replace(_read_model(source), path=str(path))
        shape = model.network().output_shape
    if shape != (None, model.n_pixels, model.n_pixels, 2):
        raise PtychodaskError(
            f"{source}: its network gives {shape[1:]}, expected one patch of {model.n_pixels} pixels for a group; "
            "pass the model that PtychoPINN saved for inference"
        )
    return model


def _read_model(source: Path) -> PtychoPinnModel:
    parts = _read_folder(source) if source.is_dir() else _read_archive(source)
    with zipfile.ZipFile(io.BytesIO(parts["model.keras"])) as archive:
        n_bytes = len(parts["model.keras"])
        config = json.loads(_member(archive, "config.json", n_bytes, source))
        weights_file = _member(archive, "model.weights.h5", n_bytes, source)
    for name, content in (("model.weights.h5", weights_file), ("model.h5", parts["model.h5"])):
        check_bytes_in_subprocess(content, f"{source}[{name}]")
    entries = _layers(config, source)
    n_pixels, members = _input_shape(entries, source)
    weights = _read_weights(weights_file, entries, source)
    scale = _intensity_scale(parts["model.h5"], source)
    return PtychoPinnModel(entries, weights, scale, n_pixels, members, _hash(entries, weights, scale))


@contextmanager
def _one_line(source: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its readers raise into one refusal."""
    try:
        yield
    except PtychodaskError:
        raise
    except (*_OF_FILES, *_OF_CONTENT) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise PtychodaskError(
            f"{source}: cannot be read as a PtychoPINN model ({type(error).__name__}: {first}); copy it again from "
            "where it was trained"
        ) from error


def _read_archive(source: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(source) as archive:
        inside = [name for name in archive.namelist() if name.startswith(f"{MODEL_FOLDER}/")]
        _check_format({name.removeprefix(f"{MODEL_FOLDER}/").split("/")[0] for name in inside}, source)
        n_bytes = source.stat().st_size
        return {
            name: _member(archive, f"{MODEL_FOLDER}/{name}", n_bytes, source) for name in ("model.keras", "model.h5")
        }


def _read_folder(source: Path) -> dict[str, bytes]:
    folder = source / MODEL_FOLDER if (source / MODEL_FOLDER).is_dir() else source
    _check_format({found.name for found in folder.iterdir()}, source)
    return {name: _file(folder / name, source) for name in ("model.keras", "model.h5")}


def _check_format(names: set[str], source: Path) -> None:
    if {"model.keras", "model.h5"} <= names:
        return
    way_out = "load it with the PtychoPINN that wrote it, and save it with one that writes model.keras (Keras 3)"
    if "saved_model.pb" in names:
        raise PtychodaskError(f"{source}: holds a TensorFlow SavedModel, which Keras 3 does not read; {way_out}")
    if "model.h5" in names:
        raise PtychodaskError(f"{source}: holds an H5 model without model.keras, an older format; {way_out}")
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise PtychodaskError(
        f"{source}: found {found} in {MODEL_FOLDER}/, expected model.keras and model.h5; pass PtychoPINN's {ARCHIVE}"
    )


def _member(archive: zipfile.ZipFile, name: str, n_bytes: int, source: Path) -> bytes:
    """One member of an archive of so many bytes, in memory: nothing goes to disk, so no name in it leads anywhere."""
    member = archive.getinfo(name)
    check_member(member, n_bytes, f"{source}[{name}]")
    check_compression(member.file_size, member.compress_size, f"{source}[{name}]")
    _check_size(member.file_size, name, source)
    return archive.read(name)


def _file(path: Path, source: Path) -> bytes:
    _check_size(path.stat().st_size, path.name, source)
    return path.read_bytes()


def _check_size(n_bytes: int, name: str, source: Path) -> None:
    if n_bytes > LARGEST_MEMBER:
        raise PtychodaskError(
            f"{source}: {name} has {n_bytes} bytes, expected at most {LARGEST_MEMBER}; pass PtychoPINN's {ARCHIVE}"
        )


def _layers(config: dict[str, Any], source: Path) -> list[PtychoPinnLayer]:
    if config["class_name"] != "Functional":
        raise PtychodaskError(f"{source}: holds a {config['class_name']} network, expected PtychoPINN's Functional one")
    entries = [_layer(entry, source) for entry in config["config"]["layers"]]
    output = config["config"]["output_layers"]
    if [entries[-1].name, 0, 0] not in (output, *output):
        raise PtychodaskError(
            f"{source}: its last layer is '{entries[-1].name}', its output {output}; expected the same"
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
    """Names of the layers whose output appears in serialised call arguments, in order."""
    if isinstance(arguments, list):
        return [name for argument in arguments for name in _names_of_inputs(argument)]
    if isinstance(arguments, dict) and arguments["class_name"] == "__keras_tensor__":
        return [arguments["config"]["keras_history"][0]]
    return []


def _input_shape(entries: list[PtychoPinnLayer], source: Path) -> tuple[int, int]:
    """Pixels across a pattern, and patterns in one group."""
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
            # Keras numbers the layers of a class in the order of the list, whatever their names are.
            where = f"layers/conv2d_{i}" if i else "layers/conv2d"
            shapes = _convolution_shapes(entry.config)
            arrays = [_array(file, f"{where}/vars/{k}", source, len(content)) for k in range(len(shapes))]
            for array, shape in zip(arrays, shapes, strict=True):
                if (*array.shape[:-2], array.shape[-1]) != shape:
                    raise PtychodaskError(
                        f"{source}: layer '{entry.name}' has weights {array.shape}, expected {entry.config['filters']} "
                        f"filters of {entry.config['kernel_size']}; copy the archive again"
                    )
            written_for = file[f"{where}/vars"].attrs.get("name", entry.name)
            if written_for != entry.name:
                raise PtychodaskError(
                    f"{source}: {where} holds the weights of '{written_for}', expected those of '{entry.name}'; "
                    "save the model again with the Keras that PtychoPINN asks for"
                )
            weights[entry.name] = arrays
        if "layers/intensity_scaler/vars/0" in file:
            raise PtychodaskError(
                f"{source}: its intensity_scaler has a weight of its own, expected the scale in model.h5 alone; "
                "wrap the network in a CallableModel"
            )
    return weights


def _convolution_shapes(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of kernel and bias, the kernel's input channels left out."""
    kernel = (*config["kernel_size"], config["filters"])
    return [kernel, (config["filters"],)] if config["use_bias"] else [kernel]


def _array(file: h5py.File, where: str, source: Path, n_bytes: int) -> NDArray[np.float32]:
    """A plain array that lies in the file itself: no link out of it, no more bytes than it has."""
    node: Any = file
    for part in where.split("/"):
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise PtychodaskError(f"{source}: its weights have no array {where}; copy the archive again")
        node = node[part]
    plain = (
        isinstance(node, h5py.Dataset) and node.dtype == np.float32 and node.external is None and node.chunks is None
    )
    if not plain or node.is_virtual or node.nbytes > n_bytes:
        raise PtychodaskError(
            f"{source}: {where} is not a plain float32 array as Keras writes it; copy the archive again"
        )
    array = np.asarray(node[()])
    if not np.isfinite(array).all():
        raise PtychodaskError(f"{source}: {where} holds values that are not finite; train the model again")
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
    """The Keras network of a model: X (group, N, N, C) and offsets (group, C, 2) to patches (group, N, N, 2).

    With `precision` "mixed" the convolutions, and what lies between them, are computed in bfloat16.
    """
    dtype = convolution_dtype(precision)
    x = keras.Input((model.n_pixels, model.n_pixels, model.members), name="x")
    offset = keras.Input((model.members, 2), name="offset_yx_px")
    given = iter([x, offset])
    values: dict[str, Any] = {}
    for entry in model.layers:
        inputs = [next(given)] if entry.kind == "InputLayer" else [values[name] for name in entry.inputs]
        arguments = {"dtype": dtype} if entry.kind in OF_PRECISION else {}
        if entry.name in model.weights:
            _check_channels(entry, model.weights[entry.name][0].shape[-2], inputs[0].shape[-1])
        values[entry.name] = BUILDERS[entry.kind](entry, *inputs, **arguments)
    network = keras.Model([x, offset], values[model.layers[-1].name], name="ptychopinn")
    for name, arrays in model.weights.items():
        network.get_layer(name).set_weights(arrays)
    return network


def _check_channels(entry: PtychoPinnLayer, stored: int, given: int) -> None:
    """Raise `PtychodaskError` unless a convolution's weights are for the channels that it is given: Keras would take
    memory for as many as it is given."""
    if stored * entry.config["groups"] != given:
        raise PtychodaskError(
            f"model: layer '{entry.name}' is given {given} channels, expected {entry.config['groups']} groups of "
            f"{stored} as its weights are; copy the archive again"
        )


class GroupReassembly(layers.Layer):
    """The mean of a group's patches around its centre, as PtychoPINN takes it.

    Takes real and imaginary parts (group, N, N, C) and offsets (group, C, 2), pixels; gives (group, N, N, 2).

    Notes
    -----
    Each patch is moved by its offset (bilinear, zeros beyond its rim) and all are summed; the sum is divided by the
    number of members whose central N/2 square, moved alike, sees the pixel, plus `UNSEEN`. A pixel that no member's
    centre sees is therefore a large number without meaning: a crop of the middle leaves it out.
    """

    def call(self, real: Tensor, imag: Tensor, offset_yx_px: Tensor) -> Tensor:
        n_pixels = real.shape[1]
        along_y = shift_matrices(offset_yx_px[..., 0], n_pixels)
        along_x = shift_matrices(offset_yx_px[..., 1], n_pixels)
        centre = np.zeros(n_pixels, np.float32)
        centre[n_pixels // 4 : n_pixels // 4 + n_pixels // 2] = 1
        centre = ops.convert_to_tensor(centre)
        seen = ops.einsum("bcy,bcx->byx", ops.matmul(along_y, centre), ops.matmul(along_x, centre))
        summed = [
            ops.sum(ops.matmul(ops.matmul(along_y, ops.transpose(part, (0, 3, 1, 2))), along_x_t), axis=1)
            for along_x_t in [ops.transpose(along_x, (0, 1, 3, 2))]
            for part in (real, imag)
        ]
        return ops.stack(summed, axis=-1) / (seen + UNSEEN)[..., None]

    def compute_output_shape(self, real_shape: Any, *_: Any) -> Any:
        return (*real_shape[:3], 2)


def shift_matrices(shift_px: Tensor, n_pixels: int) -> Tensor:
    """Matrices that move a row of pixels by linear interpolation, zeros beyond its ends.

    Parameters
    ----------
    shift_px : tensor (...)
        How far the content moves towards larger indices, pixels.
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


def _keep(entry: PtychoPinnLayer, value: Any) -> Any:
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


def _grow(entry: PtychoPinnLayer, value: Tensor, dtype: str) -> Tensor:
    fields = {name: entry.config[name] for name in ("size", "interpolation")}
    return layers.UpSampling2D(**fields, dtype=dtype)(value)


def _some_channels(entry: PtychoPinnLayer, value: Tensor) -> Tensor:
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


def _only_member(entry: PtychoPinnLayer, patches: ComplexPair) -> Tensor:
    return ops.concatenate(patches, axis=-1)


BUILDERS: dict[str, Callable[..., Any]] = {
    "InputLayer": _keep,
    # X comes times intensity_scale and is divided by exp(log_scale), which PtychoPINN sets to the same number.
    "IntensityScaler": _keep,
    "Conv2D": _convolve,
    "MaxPooling2D": _pool,
    "UpSampling2D": _grow,
    "GetItem": _some_channels,
    "Silu": lambda entry, value: ops.silu(value),
    "ActivationLayer": _activate,
    "ZeroPadding2D": lambda entry, value: layers.ZeroPadding2D(entry.config["padding"])(value),
    "CenterMaskLayer": _centre_mask,
    "Multiply": lambda entry, first, second: ops.multiply(first, second),
    "Add": lambda entry, first, second: ops.add(first, second),
    "CombineComplexLayer": _combine,
    "ReassemblePatchesLayer": _reassemble,
    "PadReconstructionLayer": _only_member,
    "TrimReconstructionLayer": _trim,
}
"""What each class in an archive's list becomes: its entry and the values it reads, to its value."""

OF_PRECISION = ("Conv2D", "MaxPooling2D", "UpSampling2D")
"""Classes that are computed in the precision that is asked for."""
