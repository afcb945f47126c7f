"""The two networks, built by plain functions from a `ModelSpec` and the optics of a scan."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from ptychodask.models.physics import (
    ComplexPair,
    Tensor,
    expected_counts,
    gathered_weight,
    merge_members,
    project_group,
    shift_ramps,
)
from ptychodask.models.spec import ModelSpec, Optics

BASE_FILTERS = 16


class GroupProjections(layers.Layer):
    """A few data-consistent steps of each group, from given patches or from a flat object.

    Takes X (group, N, N, C), offsets (group, C, 2) and, optionally, patches (group, N, N, 2C) relative to the flat
    object (real parts, then imaginary parts); gives patches of that form.
    """

    def __init__(self, optics: Optics, steps: int, object_amplitude: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics
        self._steps = steps
        self._object_amplitude = object_amplitude

    def call(self, x: Tensor, offset_yx_px: Tensor, relative: Tensor | None = None) -> Tensor:
        amplitude = ops.transpose(x, (0, 3, 1, 2)) * (1.0 / self._optics.normalization)
        if relative is None:
            patches = (ops.ones_like(amplitude) * self._object_amplitude, ops.zeros_like(amplitude))
        else:
            patches = split_channels(relative, self._object_amplitude)
        weight = ops.convert_to_tensor(self._optics.weight)
        ramps = shift_ramps(offset_yx_px, x.shape[1])
        total_weight = gathered_weight(weight, ramps)
        probe = probe_pair(self._optics)
        for _ in range(self._steps):
            patches = project_group(patches, probe, amplitude, self._optics.mask, weight, ramps, total_weight)
        return join_channels(patches, self._object_amplitude)

    def compute_output_shape(self, x_shape: Any, *_: Any) -> Any:
        return (*x_shape[:3], 2 * x_shape[3])


class GroupCounts(layers.Layer):
    """Counts that the merged patches of each group give: the forward model of the PINN.

    Takes patches (group, C, N, N, 2) and offsets (group, C, 2); gives counts (group, C, N, N).
    """

    def __init__(self, optics: Optics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics

    def call(self, patches: Tensor, offset_yx_px: Tensor) -> Tensor:
        weight = ops.convert_to_tensor(self._optics.weight)
        ramps = shift_ramps(offset_yx_px, patches.shape[2])
        merged = merge_members((patches[..., 0], patches[..., 1]), weight, ramps, gathered_weight(weight, ramps))
        return expected_counts(probe_pair(self._optics), merged)

    def compute_output_shape(self, patches_shape: Any, *_: Any) -> Any:
        return patches_shape[:-1]


class MemberPatches(layers.Layer):
    """Channels (group, N, N, 2C) relative to the flat object as patches (group, C, N, N, 2) in its units."""

    def __init__(self, object_amplitude: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._object_amplitude = object_amplitude

    def call(self, relative: Tensor) -> Tensor:
        return ops.stack(split_channels(relative, self._object_amplitude), axis=-1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[3] // 2, shape[1], shape[2], 2)


def probe_pair(optics: Optics) -> ComplexPair:
    """The probe as a pair of float32 tensors (mode, N, N)."""
    return (
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.real)),
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.imag)),
    )


def split_channels(relative: Tensor, object_amplitude: float) -> ComplexPair:
    """Patches (group, C, N, N) from channels (group, N, N, 2C) of difference from the flat object."""
    members = relative.shape[-1] // 2
    channels = ops.transpose(relative, (0, 3, 1, 2)) * object_amplitude
    return channels[:, :members] + object_amplitude, channels[:, members:]


def join_channels(patches: ComplexPair, object_amplitude: float) -> Tensor:
    """The inverse of `split_channels`."""
    channels = ops.concatenate([patches[0] - object_amplitude, patches[1]], axis=1)
    return ops.transpose(channels, (0, 2, 3, 1)) * (1.0 / object_amplitude)


def unet(features: Tensor, spec: ModelSpec) -> Tensor:
    """U-Net of two 3x3 convolutions per level (Ronneberger, Fischer & Brox, MICCAI 2015), 2C channels out.

    Parameters
    ----------
    features : tensor (group, N, N, channels)
    spec : ModelSpec

    Returns
    -------
    tensor (group, N, N, 2C)
        Zero before training.
    """
    filters = [BASE_FILTERS * spec.n_filters_scale * 2**level for level in range(spec.levels + 1)]
    skips = []
    hidden = features
    for level, width in enumerate(filters[:-1]):
        hidden = _two_convolutions(hidden, width, f"down{level}")
        skips.append(hidden)
        hidden = layers.MaxPooling2D(name=f"pool{level}")(hidden)
    hidden = _two_convolutions(hidden, filters[-1], "bottom")
    for level in reversed(range(spec.levels)):
        hidden = layers.UpSampling2D(name=f"grow{level}")(hidden)
        hidden = _convolution(filters[level], f"up{level}_in")(hidden)
        hidden = layers.Concatenate(name=f"join{level}")([hidden, skips[level]])
        hidden = _two_convolutions(hidden, filters[level], f"up{level}")
    return layers.Conv2D(2 * spec.members, 3, padding="same", kernel_initializer="zeros", name="out")(hidden)


def _convolution(filters: int, name: str) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", activation="relu", name=name)


def _two_convolutions(hidden: Tensor, filters: int, name: str) -> Tensor:
    return _convolution(filters, f"{name}_b")(_convolution(filters, f"{name}_a")(hidden))


def build_network(spec: ModelSpec, optics: Optics) -> keras.Model:
    """The network of a spec: (X, offsets) to patches (group, C, N, N, 2) at the members' positions.

    Parameters
    ----------
    spec : ModelSpec
    optics : Optics
        Probe, input scale and mask of the scan that it will see.

    Returns
    -------
    keras.Model
        Inputs X float32 (group, N, N, C), normalised, and offsets float32 (group, C, 2), pixels; output float32
        (group, C, N, N, 2), real and imaginary part.

    Notes
    -----
    Both kinds are unrolled networks of one form, told apart by what they are trained on: data-consistent steps of the
    whole group (its members share the object where they overlap) lead from a flat object to a first estimate, a U-Net
    corrects it, and a few more steps bring the answer back to the data. The learned weights are the U-Net's alone.
    Without steps before it, the U-Net reads the patterns themselves, as PtychoNN does (Cherukara et al., Appl. Phys.
    Lett. 117 (2020) 044103).
    """
    x = keras.Input((spec.n_pixels, spec.n_pixels, spec.members), name="x")
    offset = keras.Input((spec.members, 2), name="offset_yx_px")
    first = GroupProjections(optics, spec.projections_before, spec.object_amplitude, name="before")(x, offset)
    features = first if spec.projections_before else x
    relative = layers.Add(name="corrected")([first, unet(features, spec)])
    if spec.projections_after:
        after = GroupProjections(optics, spec.projections_after, spec.object_amplitude, name="after")
        relative = after(x, offset, relative)
    patches = MemberPatches(spec.object_amplitude, name="patches")(relative)
    return keras.Model([x, offset], patches, name=spec.kind)


def build_autoencoder(network: keras.Model, optics: Optics) -> keras.Model:
    """A PINN's network followed by its forward model: (X, offsets) to counts (group, C, N, N)."""
    x, offset = network.inputs
    counts = GroupCounts(optics, name="counts")(network.outputs[0], offset)
    return keras.Model([x, offset], counts, name="autoencoder")
