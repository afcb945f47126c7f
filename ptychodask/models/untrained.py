"""Untrained networks, for benchmarks of prediction.

The time and memory of a prediction do not depend on the values of the weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.models.model import Model
from ptychodask.models.networks import build_network
from ptychodask.models.ptychopinn import PtychoPinnLayer, PtychoPinnModel
from ptychodask.models.spec import ModelSpec, Optics

OUTER_CHANNELS = 4
"""Channels of PtychoPINN's last feature map from which the rim of its patches is computed."""

BOTTOM_FILTERS = 128
"""Filters of PtychoPINN's level of lowest resolution, for n_filters_scale = 1."""

PTYCHOPINN_LEVELS = {64: 3, 128: 4, 256: 5}
"""Number of times PtychoPINN halves the resolution, for each pattern size it supports (pixels across)."""


def untrained_model(spec: ModelSpec, optics: Optics) -> Model:
    """A ptychodask network with the initial weights of a training."""
    return Model(spec, build_network(spec, optics).get_weights(), optics)


def untrained_ptychopinn(n_pixels: int = 64, members: int = 4, n_filters_scale: int = 2) -> PtychoPinnModel:
    """A network of PtychoPINN's layer sizes with random weights.

    Parameters
    ----------
    n_pixels : int
        Pixels across a pattern, N: one of `PTYCHOPINN_LEVELS`.
    members : int
        Patterns in one group, C.
    n_filters_scale : int
        Width of the network.

    Returns
    -------
    PtychoPinnModel

    Raises
    ------
    PtychodaskError
        If PtychoPINN does not support patterns of that size.

    Notes
    -----
    Hoidn, Mishra & Mehta, Scientific Reports 13 (2023) 22789; the amplitude is the output of a sigmoid, the rim comes
    from separate channels.
    """
    if n_pixels not in PTYCHOPINN_LEVELS:
        sizes = ", ".join(map(str, PTYCHOPINN_LEVELS))
        raise PtychodaskError(f"model: n_pixels is {n_pixels}, PtychoPINN supports only: {sizes}")
    layers = _ptychopinn_layers(n_pixels, members, n_filters_scale)
    name = f"untrained PtychoPINN, N {n_pixels}, C {members}, n_filters_scale {n_filters_scale}"
    model = PtychoPinnModel(layers, {}, 1.0, n_pixels, members, name)
    weights = {layer.name: layer.get_weights() for layer in model.network().layers if layer.weights}
    return replace(model, weights=weights)


class _Layers:
    """List of layers under construction; `add` returns the new layer's name."""

    def __init__(self) -> None:
        self.entries: list[PtychoPinnLayer] = []

    def add(self, kind: str, /, *inputs: str, arguments: tuple[Any, ...] = (), **config: Any) -> str:
        name = f"{kind.lower()}_{len(self.entries)}"
        self.entries.append(PtychoPinnLayer(kind, name, config, list(inputs), list(arguments)))
        return name

    def convolve(self, given: str, filters: int, activation: str = "relu") -> str:
        sizes: dict[str, Any] = {"kernel_size": [3, 3], "strides": [1, 1], "dilation_rate": [1, 1], "groups": 1}
        return self.add("Conv2D", given, filters=filters, padding="same", use_bias=True, activation=activation, **sizes)

    def convolve_twice(self, given: str, filters: int) -> str:
        return self.convolve(self.convolve(given, filters), filters)

    def upsample(self, given: str, filters: int) -> str:
        hidden = self.convolve_twice(given, filters)
        return self.add("UpSampling2D", hidden, size=[2, 2], interpolation="nearest")

    def channels(self, given: str, start: int | None, stop: int | None) -> str:
        bounds = {"start": start, "stop": stop, "step": None}
        picked = [{"class_name": "__ellipsis__", "config": {}}, {"class_name": "__slice__", "config": bounds}]
        return self.add("GetItem", given, arguments=(picked,))


def _ptychopinn_layers(n_pixels: int, members: int, n_filters_scale: int) -> list[PtychoPinnLayer]:
    levels, bottom = PTYCHOPINN_LEVELS[n_pixels], BOTTOM_FILTERS * n_filters_scale
    layers = _Layers()
    x = layers.add("InputLayer", batch_shape=[None, n_pixels, n_pixels, members])
    hidden = layers.add("IntensityScaler", x)
    for level in reversed(range(levels)):
        hidden = layers.convolve_twice(hidden, bottom // 2**level)
        hidden = layers.add("MaxPooling2D", hidden, pool_size=[2, 2], strides=[2, 2], padding="same")
    amplitude = _decoder(layers, hidden, n_pixels, members, n_filters_scale, ("sigmoid", 1.0))
    phase = _decoder(layers, hidden, n_pixels, members, n_filters_scale, ("tanh", math.pi))
    patches = layers.add("CombineComplexLayer", amplitude, phase, use_polar=True)
    offset = layers.add("InputLayer", batch_shape=[None, 1, 2, members])
    merged = layers.add("ReassemblePatchesLayer", patches, offset)
    layers.add("TrimReconstructionLayer", merged, output_size=n_pixels)
    return layers.entries


def _decoder(
    layers: _Layers, hidden: str, n_pixels: int, members: int, n_filters_scale: int, activation: tuple[str, float]
) -> str:
    """Decoder of PtychoPINN's network.

    The middle N/2 of each patch comes from most channels, its rim from the last few.
    """
    n_up = PTYCHOPINN_LEVELS[n_pixels] - 1
    for level in reversed(range(n_up)):
        hidden = layers.upsample(hidden, 32 * 2**level * n_filters_scale)
    inner = layers.convolve(layers.channels(hidden, None, -OUTER_CHANNELS), members, "linear")
    inner = layers.add("ActivationLayer", inner, activation_name=activation[0], scale=activation[1])
    inner = layers.add("ZeroPadding2D", inner, padding=[[n_pixels // 4] * 2] * 2)
    rim = layers.upsample(layers.channels(hidden, -OUTER_CHANNELS, None), 2048 // n_pixels * n_filters_scale)
    rim = layers.add("Silu", layers.convolve(rim, members, "linear"))
    rim = layers.add("Multiply", rim, layers.add("CenterMaskLayer", rim, kind="border"))
    return layers.add("Add", inner, rim)
