"""Networks of PINN and baseline, built from a `ModelSpec` and optics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.models.backend import keras, layers, ops
from ptychodask.models.contract import Predict
from ptychodask.models.physics import (
    ComplexPair,
    Tensor,
    expected_counts,
    extrapolate,
    gathered_weight,
    merge_members,
    project_group,
    relative_illumination,
    shift_ramps,
    squared_modulus,
    step_length,
)
from ptychodask.models.spec import BASE_FILTERS, ModelSpec, Optics, Precision

ATTENTION_HEADS = 4


@dataclass(frozen=True)
class OpticsTensors:
    """Optics of the scan that a batch is from."""

    probe: ComplexPair
    """(mode, N, N)."""

    weight: Tensor
    """Relative illumination (N, N)."""

    mask: Tensor
    """Good detector pixels are 1, bad ones 0 (N, N)."""

    amplitude_scale: Tensor
    """Factor from network input to amplitude."""

    object_amplitude: Tensor
    """Amplitude of the flat object that a prediction starts from."""


class FittedProbes:
    """Probes of the scans as one variable, trained along with a network.

    Each probe is P = c (P_stored + r change), with change 0 at first. r is `rate` times the root mean square of each
    mode over illuminated pixels, so that an optimizer's step of a probe is in proportion to its step of the weights,
    and a missing mode stays 0. c keeps the probe intensity Σ|P|² that of the stored probe.

    Parameters
    ----------
    optics : sequence of Optics
        Optics of the scans, with the stored probes.
    rate : float
        Positive.
    """

    def __init__(self, optics: Sequence[Optics], rate: float) -> None:
        self._modes = [len(each.probe) for each in optics]
        self._stored = stacked_probes(optics)
        intensity = (np.abs(self._stored) ** 2).sum(axis=(2, 3), dtype=np.float64)
        n_illuminated = np.array([(each.weight > 0).sum() for each in optics])
        self._scale = (rate * np.sqrt(intensity / n_illuminated[:, None]))[..., None, None].astype(np.float32)
        self._intensity = intensity.sum(axis=1).astype(np.float32)
        self.change = keras.Variable(np.zeros((2, *self._stored.shape), np.float32), name="probe_change")
        """Real and imaginary part, (2, scan, mode, N, N)."""

    def pick(self, number: Tensor | None = None) -> ComplexPair:
        """Probe (mode, N, N) of a scan, or the only one."""

        def select(values: Any) -> Tensor:
            return values[0] if number is None else ops.take(ops.convert_to_tensor(values), number, axis=0)

        scale, intensity = select(self._scale), select(self._intensity)
        change = self.change[:, 0] if number is None else ops.take(self.change, number, axis=1)
        real = select(np.ascontiguousarray(self._stored.real)) + scale * change[0]
        imag = select(np.ascontiguousarray(self._stored.imag)) + scale * change[1]
        factor = ops.sqrt(intensity / ops.sum(squared_modulus((real, imag))))
        return real * factor, imag * factor

    def read(self) -> list[NDArray[np.complex64]]:
        """Current probes, complex64 (mode, N, N), without padded modes."""
        real, imag = self.change.numpy()
        probes = self._stored + self._scale * (real + 1j * imag)
        intensity = (np.abs(probes) ** 2).sum(axis=(1, 2, 3), dtype=np.float64)
        probes *= np.sqrt(self._intensity / intensity)[:, None, None, None].astype(np.float32)
        return [probe[:modes] for probe, modes in zip(probes, self._modes, strict=True)]

    def assign(self, probes: Sequence[NDArray[np.complex64]]) -> None:
        """Set the probes, complex64 (mode, N, N), of the stored ones' intensity."""
        difference = _with_modes(probes, max(self._modes)) - self._stored
        # A mode of zero intensity has scale 0 and cannot change.
        change = np.divide(difference, self._scale, out=np.zeros_like(difference), where=self._scale > 0)
        self.change.assign(np.stack([change.real, change.imag]))


class OpticsTable:
    """Optics of one scan as constants, or of several, selected by number.

    Parameters
    ----------
    optics : Optics or sequence of Optics
        Probes may differ in their number of modes: missing modes are 0.
    object_amplitude : float, optional
        Amplitude of the flat object for all scans; by default one per scan (`Optics.flat_amplitude`).
    fitted : FittedProbes, optional
        Trainable probes that replace the stored ones.
    """

    def __init__(
        self,
        optics: Optics | Sequence[Optics],
        object_amplitude: float | None = None,
        fitted: FittedProbes | None = None,
    ) -> None:
        self._optics = (optics,) if isinstance(optics, Optics) else tuple(optics)
        self._object_amplitude = object_amplitude
        self.fitted = fitted

    def __len__(self) -> int:
        return len(self._optics)

    def pick(self, scan: Tensor | None = None) -> OpticsTensors:
        """Optics of the scan of a batch, or of the only scan.

        `scan` is an integer tensor (group, 1) of its number.
        """
        number = None if scan is None else scan[0, 0]
        stored = self._stored(number)
        if self.fitted is None:
            return stored
        probe = self.fitted.pick(number)
        return replace(stored, probe=probe, weight=ops.stop_gradient(relative_illumination(probe)))

    def _stored(self, number: Tensor | None) -> OpticsTensors:
        flat = [self._object_amplitude or optics.flat_amplitude() for optics in self._optics]
        if number is None:
            (optics,) = self._optics
            return OpticsTensors(
                probe_pair(optics),
                ops.convert_to_tensor(optics.weight),
                ops.convert_to_tensor(optics.mask),
                1.0 / optics.normalization,
                flat[0],
            )
        probes = stacked_probes(self._optics)
        scales = np.array([1.0 / optics.normalization for optics in self._optics], np.float32)

        def select(values: Any) -> Tensor:
            return ops.take(ops.convert_to_tensor(np.ascontiguousarray(values)), number, axis=0)

        return OpticsTensors(
            (select(probes.real), select(probes.imag)),
            select(np.stack([optics.weight for optics in self._optics])),
            select(np.stack([optics.mask for optics in self._optics])),
            select(scales),
            select(np.array(flat, np.float32)),
        )


class GroupProjections(layers.Layer):
    """Data-consistency steps of each group, from given patches or a flat object.

    Takes X (group, N, N, C), offsets (group, C, 2) and, optionally, patches (group, N, N, 2C) relative to the flat
    object (real parts, then imaginary parts) and the number of the scan (group, 1); returns patches in the same form.
    """

    def __init__(self, optics: OpticsTable, steps: int, momentum: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics
        self._steps = steps
        self._momentum = momentum

    def call(
        self, x: Tensor, offset_yx_px: Tensor, relative: Tensor | None = None, scan: Tensor | None = None
    ) -> Tensor:
        optics = self._optics.pick(scan)
        amplitude = ops.transpose(x, (0, 3, 1, 2)) * optics.amplitude_scale
        if relative is None:
            patches = (ops.ones_like(amplitude) * optics.object_amplitude, ops.zeros_like(amplitude))
        else:
            patches = split_channels(relative, optics.object_amplitude)
        ramps = shift_ramps(offset_yx_px, x.shape[1])
        total_weight = gathered_weight(optics.weight, ramps)
        # As in ePIE, a fitted probe learns from the exit waves at fixed patches: no gradient reaches it through these
        # steps, only through the forward model.
        probe = (ops.stop_gradient(optics.probe[0]), ops.stop_gradient(optics.probe[1]))
        fixed = (probe, amplitude, optics.mask, optics.weight, ramps, total_weight)
        start, length = patches, step_length(self._momentum)
        for _ in range(self._steps):
            before, patches = patches, project_group(start, *fixed, length)
            start = extrapolate(before, patches, self._momentum)
        return join_channels(patches, optics.object_amplitude)

    def compute_output_shape(self, x_shape: Any, *_: Any) -> Any:
        return (*x_shape[:3], 2 * x_shape[3])


class GroupCounts(layers.Layer):
    """Expected counts of each group's merged patches: the PINN's forward model.

    Takes patches (group, C, N, N, 2), offsets (group, C, 2) and, optionally, the number of the scan (group, 1); returns
    counts (group, C, N, N).
    """

    def __init__(self, optics: OpticsTable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics
        # Only this layer has the fitted probe as a Keras weight, so that a network's weights are only the U-Net's.
        self._probe_change = None if optics.fitted is None else optics.fitted.change

    def call(self, patches: Tensor, offset_yx_px: Tensor, scan: Tensor | None = None) -> Tensor:
        optics = self._optics.pick(scan)
        ramps = shift_ramps(offset_yx_px, patches.shape[2])
        total_weight = gathered_weight(optics.weight, ramps)
        merged = merge_members((patches[..., 0], patches[..., 1]), optics.weight, ramps, total_weight)
        return expected_counts(optics.probe, merged)

    def compute_output_shape(self, patches_shape: Any, *_: Any) -> Any:
        return patches_shape[:-1]


class PatchPenalties(layers.Layer):
    """Regularisation terms of patches added to the loss; returns the patches unchanged.

    Takes patches (group, C, N, N, 2), offsets (group, C, 2) and, optionally, the number of the scan (group, 1).

    Parameters
    ----------
    optics : OpticsTable
    tv : float
        Weight of the total variation over illuminated pixels: mean |∇patch|, per pixel (Rudin, Osher & Fatemi, Physica
        D 60 (1992) 259), in units of the flat object's amplitude.
    real_space : float
        Weight of the mean squared difference between each member's patch and the group's merged one over illuminated
        pixels, in units of the flat object's intensity.
    """

    def __init__(self, optics: OpticsTable, tv: float, real_space: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics
        self._tv = tv
        self._real_space = real_space

    def call(self, patches: Tensor, offset_yx_px: Tensor, scan: Tensor | None = None) -> Tensor:
        optics = self._optics.pick(scan)
        relative = (patches[..., 0] / optics.object_amplitude, patches[..., 1] / optics.object_amplitude)
        if self._tv:
            self.add_loss(self._tv * total_variation(relative, optics.weight))
        if self._real_space:
            self.add_loss(self._real_space * disagreement(relative, optics.weight, offset_yx_px))
        return patches

    def compute_output_shape(self, patches_shape: Any, *_: Any) -> Any:
        return patches_shape


def total_variation(patches: ComplexPair, weight: Tensor) -> Tensor:
    """Mean |∇patch| over illuminated pixels of patches (group, C, N, N).

    Forward differences.
    """
    illuminated = ops.cast(weight > 0, "float32")
    all_three = illuminated[:-1, :-1] * illuminated[1:, :-1] * illuminated[:-1, 1:]
    squared = 0.0
    for part in patches:
        down = part[..., 1:, :-1] - part[..., :-1, :-1]
        right = part[..., :-1, 1:] - part[..., :-1, :-1]
        squared = squared + down * down + right * right
    # The small constant avoids the infinite gradient of the square root at zero.
    steps = ops.sqrt(squared + 1e-8) * all_three
    return ops.mean(ops.sum(steps, axis=(-2, -1))) / ops.maximum(ops.sum(all_three), 1.0)


def disagreement(patches: ComplexPair, weight: Tensor, offset_yx_px: Tensor) -> Tensor:
    """Illumination-weighted mean |patch − merged|² of patches (group, C, N, N)."""
    ramps = shift_ramps(offset_yx_px, patches[0].shape[-1])
    merged = merge_members(patches, weight, ramps, gathered_weight(weight, ramps))
    squared = (patches[0] - merged[0]) ** 2 + (patches[1] - merged[1]) ** 2
    return ops.mean(ops.sum(squared * weight, axis=(-2, -1))) / ops.sum(weight)


class MemberPatches(layers.Layer):
    """Channels relative to the flat object as absolute patches.

    Takes channels (group, N, N, 2C) and, optionally, the number of the scan (group, 1); returns patches
    (group, C, N, N, 2) in the units of the scan's calibration.
    """

    def __init__(self, optics: OpticsTable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics

    def call(self, relative: Tensor, scan: Tensor | None = None) -> Tensor:
        return ops.stack(split_channels(relative, self._optics.pick(scan).object_amplitude), axis=-1)

    def compute_output_shape(self, shape: Any, *_: Any) -> Any:
        return (shape[0], shape[3] // 2, shape[1], shape[2], 2)


def stacked_probes(optics: Sequence[Optics]) -> NDArray[np.complex64]:
    """Probes of several scans, complex64 (scan, mode, N, N).

    Missing modes are 0.
    """
    return _with_modes([each.probe for each in optics], max(len(each.probe) for each in optics))


def _with_modes(probes: Sequence[NDArray[np.complex64]], modes: int) -> NDArray[np.complex64]:
    return np.stack([np.pad(probe, ((0, modes - len(probe)), (0, 0), (0, 0))) for probe in probes])


def probe_pair(optics: Optics) -> ComplexPair:
    """Probe as a pair of float32 tensors (mode, N, N)."""
    return (
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.real)),
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.imag)),
    )


def split_channels(relative: Tensor, object_amplitude: Tensor) -> ComplexPair:
    """Patches (group, C, N, N) from channels relative to the flat object.

    Channels (group, N, N, 2C) are differences from the flat object in units of its amplitude.
    """
    members = relative.shape[-1] // 2
    channels = ops.transpose(relative, (0, 3, 1, 2)) * object_amplitude
    return channels[:, :members] + object_amplitude, channels[:, members:]


def join_channels(patches: ComplexPair, object_amplitude: Tensor) -> Tensor:
    """Inverse of `split_channels`."""
    channels = ops.concatenate([patches[0] - object_amplitude, patches[1]], axis=1)
    return ops.transpose(channels, (0, 2, 3, 1)) * (1.0 / object_amplitude)


def unet(features: Tensor, spec: ModelSpec, precision: Precision = "float32") -> Tensor:
    """U-Net of two 3x3 convolutions per level, with 2C output channels.

    Ronneberger, Fischer & Brox, MICCAI 2015.

    Parameters
    ----------
    features : tensor (group, N, N, channels)
    spec : ModelSpec
    precision : {"float32", "mixed"}

    Returns
    -------
    tensor (group, N, N, 2C)
        Zero before training, float32.
    """
    dtype = convolution_dtype(precision)
    filters = [BASE_FILTERS * spec.n_filters_scale * 2**level for level in range(spec.levels + 1)]
    skips = []
    hidden = features
    for level, width in enumerate(filters[:-1]):
        hidden = _two_convolutions(hidden, width, f"down{level}", dtype)
        skips.append(hidden)
        hidden = layers.MaxPooling2D(name=f"pool{level}", dtype=dtype)(hidden)
    hidden = _two_convolutions(hidden, filters[-1], "bottom", dtype)
    if spec.attention:
        hidden = _attention(hidden, filters[-1], dtype)
    for level in reversed(range(spec.levels)):
        hidden = layers.UpSampling2D(name=f"grow{level}", dtype=dtype)(hidden)
        hidden = _convolution(filters[level], f"up{level}_in", dtype)(hidden)
        hidden = layers.Concatenate(name=f"join{level}", dtype=dtype)([hidden, skips[level]])
        hidden = _two_convolutions(hidden, filters[level], f"up{level}", dtype)
    return layers.Conv2D(2 * spec.members, 3, padding="same", kernel_initializer="zeros", name="out", dtype="float32")(
        hidden
    )


def convolution_dtype(precision: Precision) -> str:
    """Keras dtype policy of a precision."""
    return "mixed_bfloat16" if precision == "mixed" else "float32"


def _convolution(filters: int, name: str, dtype: str) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", activation="relu", name=name, dtype=dtype)


def _two_convolutions(hidden: Tensor, filters: int, name: str, dtype: str) -> Tensor:
    return _convolution(filters, f"{name}_b", dtype)(_convolution(filters, f"{name}_a", dtype)(hidden))


def _attention(hidden: Tensor, filters: int, dtype: str) -> Tensor:
    """Self-attention over pixels with a residual connection (Vaswani et al., NeurIPS 2017)."""
    _, height, width, _ = hidden.shape
    tokens = layers.Reshape((height * width, filters), name="bottom_places", dtype=dtype)(hidden)
    normal = layers.LayerNormalization(name="bottom_normal", dtype=dtype)(tokens)
    attention = layers.MultiHeadAttention(
        ATTENTION_HEADS, filters // ATTENTION_HEADS, name="bottom_attention", dtype=dtype
    )
    attended = layers.Reshape((height, width, filters), name="bottom_taken", dtype=dtype)(attention(normal, normal))
    return layers.Add(name="bottom_attended", dtype=dtype)([hidden, attended])


def encoder_layers(network: keras.Model) -> list[layers.Layer]:
    """Layers of the U-Net's encoder and bottleneck that have weights."""
    return [layer for layer in network.layers if layer.weights and layer.name.startswith(("down", "bottom"))]


def build_network(
    spec: ModelSpec,
    optics: Optics | Sequence[Optics],
    precision: Precision = "float32",
    fitted: FittedProbes | None = None,
) -> keras.Model:
    """Network of a spec, from X and offsets to patches.

    Parameters
    ----------
    spec : ModelSpec
    optics : Optics or sequence of Optics
        Probe, input scale and mask of the scan it is applied to, or of several scans.
    precision : {"float32", "mixed"}
    fitted : FittedProbes, optional
        Probes fitted during training; they are not weights of the network.

    Returns
    -------
    keras.Model
        Inputs X float32 (group, N, N, C), normalised, and offsets float32 (group, C, 2), pixels; for several scans also
        the number of the scan, int32 (group, 1), equal for all groups of a batch. Output patches float32
        (group, C, N, N, 2) at the members' positions, real and imaginary part. The weights and their order do not
        depend on the number of scans.

    Notes
    -----
    PINN and baseline are unrolled networks of the same architecture and differ only in their training: data-consistency
    steps of the group (its members share the object where they overlap) lead from a flat object to a first estimate, a
    U-Net corrects it, and a few more steps make the result consistent with the data again. Only the U-Net has learned
    weights. Without steps before it, the U-Net reads the patterns, as in PtychoNN (Cherukara et al., Appl. Phys. Lett.
    117 (2020) 044103).
    """
    table = OpticsTable(optics, spec.object_amplitude, fitted)
    x = keras.Input((spec.n_pixels, spec.n_pixels, spec.members), name="x")
    offset = keras.Input((spec.members, 2), name="offset_yx_px")
    scan_input = {} if len(table) == 1 else {"scan": keras.Input((1,), dtype="int32", name="scan")}
    before = GroupProjections(table, spec.projections_before, spec.momentum, name="before")
    first = before(x, offset, **scan_input)
    features = first if spec.projections_before else x
    relative = layers.Add(name="corrected")([first, unet(features, spec, precision)])
    if spec.projections_after:
        after = GroupProjections(table, spec.projections_after, 0.0, name="after")
        relative = after(x, offset, relative, **scan_input)
    patches = MemberPatches(table, name="patches")(relative, **scan_input)
    return keras.Model([x, offset, *scan_input.values()], patches, name=spec.kind)


def with_penalties(
    network: keras.Model,
    spec: ModelSpec,
    optics: Optics | Sequence[Optics],
    fitted: FittedProbes | None = None,
    *,
    tv: float,
    real_space: float,
) -> keras.Model:
    """A network with `PatchPenalties` on its patches."""
    _, offset, *scan = network.inputs
    table = OpticsTable(optics, spec.object_amplitude, fitted)
    penalties = PatchPenalties(table, tv, real_space, name="penalties")
    patches = penalties(network.outputs[0], offset, **({"scan": scan[0]} if scan else {}))
    return keras.Model(network.inputs, patches, name="penalised")


def build_autoencoder(
    network: keras.Model, optics: Optics | Sequence[Optics], fitted: FittedProbes | None = None
) -> keras.Model:
    """PINN's network followed by its forward model, with counts as output.

    The output is (group, C, N, N). Fitted probes are the last weight of the returned model.
    """
    _, offset, *scan = network.inputs
    counts = GroupCounts(OpticsTable(optics, fitted=fitted), name="counts")
    return keras.Model(
        network.inputs,
        counts(network.outputs[0], offset, **({"scan": scan[0]} if scan else {})),
        name="autoencoder",
    )


def compiled_call(network: keras.Model, batch_size: int) -> Predict:
    """Prediction function of a network at a fixed batch size.

    Compiled if the backend compiles (TensorFlow, JAX).

    Parameters
    ----------
    network : keras.Model
        From X and offsets to patches whose last axis is (real, imaginary), float32.
    batch_size : int
        Groups in each call.

    Returns
    -------
    callable
        From float32 arrays X (batch_size, N, N, C) and offsets (batch_size, C, 2) to the patches, complex64.
    """
    run = _compiled(network, batch_size)

    def call(x: NDArray[np.float32], offset_yx_px: NDArray[np.float32]) -> NDArray[np.complex64]:
        pairs = np.ascontiguousarray(run(x, offset_yx_px), dtype=np.float32)
        return pairs.view(np.complex64)[..., 0]

    return call


def _compiled(network: keras.Model, batch_size: int) -> Callable[[Any, Any], Any]:
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        signature = [tf.TensorSpec((batch_size, *tensor.shape[1:]), tf.float32) for tensor in network.inputs]
        run = tf.function(lambda x, offset: network([x, offset], training=False), input_signature=signature)
        return lambda x, offset: run(tf.convert_to_tensor(x), tf.convert_to_tensor(offset)).numpy()
    if backend == "jax":
        import jax

        trainable = [variable.value for variable in network.trainable_variables]
        fixed = [variable.value for variable in network.non_trainable_variables]
        compiled = jax.jit(lambda x, offset: network.stateless_call(trainable, fixed, [x, offset], training=False)[0])
        return lambda x, offset: np.asarray(compiled(x, offset))
    import torch

    def run_torch(x: Any, offset: Any) -> Any:
        with torch.no_grad():
            return keras.ops.convert_to_numpy(network([x, offset], training=False))

    return run_torch
