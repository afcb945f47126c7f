"""The two networks, built by plain functions from a `ModelSpec` and the optics of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from ptychodask.models.physics import (
    ComplexPair,
    Tensor,
    expected_counts,
    extrapolate,
    gathered_weight,
    merge_members,
    project_group,
    relative_light,
    shift_ramps,
    squared_modulus,
    step_length,
)
from ptychodask.models.spec import ModelSpec, Optics, Precision

BASE_FILTERS = 16

ATTENTION_HEADS = 4


@dataclass(frozen=True)
class OpticsTensors:
    """The optics of the scan that a batch comes from."""

    probe: ComplexPair
    """(mode, N, N)."""

    weight: Tensor
    """Relative illumination (N, N)."""

    mask: Tensor
    """1 where a detector pixel is good (N, N)."""

    amplitude_scale: Tensor
    """Factor from network input to amplitude."""

    object_amplitude: Tensor
    """Amplitude of the flat object that a prediction starts from."""


class FittedProbes:
    """The probes of some scans as one variable, which moves while a network is trained.

    Each probe is P = c (P_stored + r change), with change 0 at first. r is `rate` times the root mean square of each
    mode where light falls: an optimizer that moves weights by its rate moves the probe in proportion, and a mode that
    is missing stays dark. c keeps the light Σ|P|² that of the stored probe.

    Parameters
    ----------
    optics : sequence of Optics
        Of the scans, with the stored probes.
    rate : float
        Positive.
    """

    def __init__(self, optics: Sequence[Optics], rate: float) -> None:
        self._modes = [len(each.probe) for each in optics]
        self._stored = stacked_probes(optics)
        light = (np.abs(self._stored) ** 2).sum(axis=(2, 3), dtype=np.float64)
        lit = np.array([(each.weight > 0).sum() for each in optics])
        self._reach = (rate * np.sqrt(light / lit[:, None]))[..., None, None].astype(np.float32)
        self._light = light.sum(axis=1).astype(np.float32)
        self.change = keras.Variable(np.zeros((2, *self._stored.shape), np.float32), name="probe_change")
        """Real and imaginary part, (2, scan, mode, N, N)."""

    def pick(self, number: Tensor | None = None) -> ComplexPair:
        """The probe (mode, N, N) of a scan by its number, or of the only one."""

        def chosen(values: Any) -> Tensor:
            return values[0] if number is None else ops.take(ops.convert_to_tensor(values), number, axis=0)

        reach, light = chosen(self._reach), chosen(self._light)
        change = self.change[:, 0] if number is None else ops.take(self.change, number, axis=1)
        real = chosen(np.ascontiguousarray(self._stored.real)) + reach * change[0]
        imag = chosen(np.ascontiguousarray(self._stored.imag)) + reach * change[1]
        scale = ops.sqrt(light / ops.sum(squared_modulus((real, imag))))
        return real * scale, imag * scale

    def read(self) -> list[NDArray[np.complex64]]:
        """The probes as they are, complex64 (mode, N, N) each, with the modes that each scan has."""
        real, imag = self.change.numpy()
        moved = self._stored + self._reach * (real + 1j * imag)
        light = (np.abs(moved) ** 2).sum(axis=(1, 2, 3), dtype=np.float64)
        moved *= np.sqrt(self._light / light)[:, None, None, None].astype(np.float32)
        return [probe[:modes] for probe, modes in zip(moved, self._modes, strict=True)]

    def assign(self, probes: Sequence[NDArray[np.complex64]]) -> None:
        """Take probes of the stored ones' light, complex64 (mode, N, N) each."""
        away = _with_modes(probes, max(self._modes)) - self._stored
        # A dark mode cannot move.
        change = np.divide(away, self._reach, out=np.zeros_like(away), where=self._reach > 0)
        self.change.assign(np.stack([change.real, change.imag]))


class OpticsTable:
    """The optics of one scan as constants, or of several to choose from by their number.

    Parameters
    ----------
    optics : Optics or sequence of Optics
        Probes may differ in the number of their modes: a mode that is missing is dark.
    object_amplitude : float, optional
        Of the flat object for all scans; by default each scan's own (`Optics.flat_amplitude`).
    fitted : FittedProbes, optional
        Probes that stand in for the stored ones, and change.
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
        """The optics of the scan that a batch comes from (integer tensor (group, 1)), or of the only one."""
        number = None if scan is None else scan[0, 0]
        stored = self._stored(number)
        if self.fitted is None:
            return stored
        probe = self.fitted.pick(number)
        return replace(stored, probe=probe, weight=ops.stop_gradient(relative_light(probe)))

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

        def chosen(values: Any) -> Tensor:
            return ops.take(ops.convert_to_tensor(np.ascontiguousarray(values)), number, axis=0)

        return OpticsTensors(
            (chosen(probes.real), chosen(probes.imag)),
            chosen(np.stack([optics.weight for optics in self._optics])),
            chosen(np.stack([optics.mask for optics in self._optics])),
            chosen(scales),
            chosen(np.array(flat, np.float32)),
        )


class GroupProjections(layers.Layer):
    """A few data-consistent steps of each group, from given patches or from a flat object.

    Takes X (group, N, N, C), offsets (group, C, 2) and, optionally, patches (group, N, N, 2C) relative to the flat
    object (real parts, then imaginary parts) and the number of the scan (group, 1); gives patches of that form.
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
        # A probe that is fitted learns as in ePIE, from the exit waves at given patches: how it made them is no guide.
        probe = (ops.stop_gradient(optics.probe[0]), ops.stop_gradient(optics.probe[1]))
        given = (probe, amplitude, optics.mask, optics.weight, ramps, total_weight)
        ahead, length = patches, step_length(self._momentum)
        for _ in range(self._steps):
            before, patches = patches, project_group(ahead, *given, length)
            ahead = extrapolate(before, patches, self._momentum)
        return join_channels(patches, optics.object_amplitude)

    def compute_output_shape(self, x_shape: Any, *_: Any) -> Any:
        return (*x_shape[:3], 2 * x_shape[3])


class GroupCounts(layers.Layer):
    """Counts that the merged patches of each group give: the forward model of the PINN.

    Takes patches (group, C, N, N, 2), offsets (group, C, 2) and, optionally, the number of the scan (group, 1); gives
    counts (group, C, N, N).
    """

    def __init__(self, optics: OpticsTable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics
        # Keras finds a fitted probe here and nowhere else, so that a network's own weights are the U-Net's alone.
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
    """Adds to the loss what patches cost by themselves, and gives them on as they are.

    Takes patches (group, C, N, N, 2), offsets (group, C, 2) and, optionally, the number of the scan (group, 1).

    Parameters
    ----------
    optics : OpticsTable
    tv : float
        Weight of the total variation where light fell: mean |∇patch|, per pixel (Rudin, Osher & Fatemi, Physica D 60
        (1992) 259), in units of the flat object's amplitude.
    real_space : float
        Weight of the mean squared difference between each member's patch and the group's merged one where light fell,
        in units of the flat object's intensity.
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
    """Mean |∇patch| over lit pixels of patches (group, C, N, N), forward differences."""
    lit = ops.cast(weight > 0, "float32")
    both = lit[:-1, :-1] * lit[1:, :-1] * lit[:-1, 1:]
    squared = 0.0
    for part in patches:
        down = part[..., 1:, :-1] - part[..., :-1, :-1]
        right = part[..., :-1, 1:] - part[..., :-1, :-1]
        squared = squared + down * down + right * right
    # The root has no gradient at zero.
    steps = ops.sqrt(squared + 1e-8) * both
    return ops.mean(ops.sum(steps, axis=(-2, -1))) / ops.maximum(ops.sum(both), 1.0)


def disagreement(patches: ComplexPair, weight: Tensor, offset_yx_px: Tensor) -> Tensor:
    """Mean |patch − merged|² of members, weighted by the light, of patches (group, C, N, N)."""
    ramps = shift_ramps(offset_yx_px, patches[0].shape[-1])
    merged = merge_members(patches, weight, ramps, gathered_weight(weight, ramps))
    squared = (patches[0] - merged[0]) ** 2 + (patches[1] - merged[1]) ** 2
    return ops.mean(ops.sum(squared * weight, axis=(-2, -1))) / ops.sum(weight)


class MemberPatches(layers.Layer):
    """Channels (group, N, N, 2C) relative to the flat object as patches (group, C, N, N, 2) in its units.

    Takes also, optionally, the number of the scan (group, 1).
    """

    def __init__(self, optics: OpticsTable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optics = optics

    def call(self, relative: Tensor, scan: Tensor | None = None) -> Tensor:
        return ops.stack(split_channels(relative, self._optics.pick(scan).object_amplitude), axis=-1)

    def compute_output_shape(self, shape: Any, *_: Any) -> Any:
        return (shape[0], shape[3] // 2, shape[1], shape[2], 2)


def stacked_probes(optics: Sequence[Optics]) -> NDArray[np.complex64]:
    """The probes of several scans, complex64 (scan, mode, N, N); a mode that is missing is dark."""
    return _with_modes([each.probe for each in optics], max(len(each.probe) for each in optics))


def _with_modes(probes: Sequence[NDArray[np.complex64]], modes: int) -> NDArray[np.complex64]:
    return np.stack([np.pad(probe, ((0, modes - len(probe)), (0, 0), (0, 0))) for probe in probes])


def probe_pair(optics: Optics) -> ComplexPair:
    """The probe as a pair of float32 tensors (mode, N, N)."""
    return (
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.real)),
        ops.convert_to_tensor(np.ascontiguousarray(optics.probe.imag)),
    )


def split_channels(relative: Tensor, object_amplitude: Tensor) -> ComplexPair:
    """Patches (group, C, N, N) from channels (group, N, N, 2C) of difference from the flat object."""
    members = relative.shape[-1] // 2
    channels = ops.transpose(relative, (0, 3, 1, 2)) * object_amplitude
    return channels[:, :members] + object_amplitude, channels[:, members:]


def join_channels(patches: ComplexPair, object_amplitude: Tensor) -> Tensor:
    """The inverse of `split_channels`."""
    channels = ops.concatenate([patches[0] - object_amplitude, patches[1]], axis=1)
    return ops.transpose(channels, (0, 2, 3, 1)) * (1.0 / object_amplitude)


def unet(features: Tensor, spec: ModelSpec, precision: Precision = "float32") -> Tensor:
    """U-Net of two 3x3 convolutions per level (Ronneberger, Fischer & Brox, MICCAI 2015), 2C channels out.

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
    """Keras' name of a precision."""
    return "mixed_bfloat16" if precision == "mixed" else "float32"


def _convolution(filters: int, name: str, dtype: str) -> layers.Layer:
    return layers.Conv2D(filters, 3, padding="same", activation="relu", name=name, dtype=dtype)


def _two_convolutions(hidden: Tensor, filters: int, name: str, dtype: str) -> Tensor:
    return _convolution(filters, f"{name}_b", dtype)(_convolution(filters, f"{name}_a", dtype)(hidden))


def _attention(hidden: Tensor, filters: int, dtype: str) -> Tensor:
    """Each place takes from all others what resembles it (Vaswani et al., NeurIPS 2017), added to what it had."""
    _, height, width, _ = hidden.shape
    places = layers.Reshape((height * width, filters), name="bottom_places", dtype=dtype)(hidden)
    normal = layers.LayerNormalization(name="bottom_normal", dtype=dtype)(places)
    attention = layers.MultiHeadAttention(
        ATTENTION_HEADS, filters // ATTENTION_HEADS, name="bottom_attention", dtype=dtype
    )
    taken = layers.Reshape((height, width, filters), name="bottom_taken", dtype=dtype)(attention(normal, normal))
    return layers.Add(name="bottom_attended", dtype=dtype)([hidden, taken])


def encoder_layers(network: keras.Model) -> list[layers.Layer]:
    """Layers on the U-Net's way down and at its bottom that have weights."""
    return [layer for layer in network.layers if layer.weights and layer.name.startswith(("down", "bottom"))]


def bottom_weights(spec: ModelSpec) -> int:
    """Numbers in the widest convolution of the U-Net of a spec, which are about a third of all that it has."""
    return 9 * (BASE_FILTERS * spec.n_filters_scale * 2**spec.levels) ** 2


def build_network(
    spec: ModelSpec,
    optics: Optics | Sequence[Optics],
    precision: Precision = "float32",
    fitted: FittedProbes | None = None,
) -> keras.Model:
    """The network of a spec: (X, offsets) to patches (group, C, N, N, 2) at the members' positions.

    Parameters
    ----------
    spec : ModelSpec
    optics : Optics or sequence of Optics
        Probe, input scale and mask of the scan that it will see, or of several scans.
    precision : {"float32", "mixed"}
    fitted : FittedProbes, optional
        Probes that are fitted along; they are no weights of the network.

    Returns
    -------
    keras.Model
        Inputs X float32 (group, N, N, C), normalised, and offsets float32 (group, C, 2), pixels; for several scans also
        the number of the scan, int32 (group, 1), the same in a whole batch. Output float32 (group, C, N, N, 2), real
        and imaginary part. The weights and their order do not depend on how many scans there are.

    Notes
    -----
    Both kinds are unrolled networks of one form, told apart by what they are trained on: data-consistent steps of the
    whole group (its members share the object where they overlap) lead from a flat object to a first estimate, a U-Net
    corrects it, and a few more steps bring the answer back to the data. The learned weights are the U-Net's alone.
    Without steps before it, the U-Net reads the patterns themselves, as PtychoNN does (Cherukara et al., Appl. Phys.
    Lett. 117 (2020) 044103).
    """
    table = OpticsTable(optics, spec.object_amplitude, fitted)
    x = keras.Input((spec.n_pixels, spec.n_pixels, spec.members), name="x")
    offset = keras.Input((spec.members, 2), name="offset_yx_px")
    which = {} if len(table) == 1 else {"scan": keras.Input((1,), dtype="int32", name="scan")}
    before = GroupProjections(table, spec.projections_before, spec.momentum, name="before")
    first = before(x, offset, **which)
    features = first if spec.projections_before else x
    relative = layers.Add(name="corrected")([first, unet(features, spec, precision)])
    if spec.projections_after:
        after = GroupProjections(table, spec.projections_after, 0.0, name="after")
        relative = after(x, offset, relative, **which)
    patches = MemberPatches(table, name="patches")(relative, **which)
    return keras.Model([x, offset, *which.values()], patches, name=spec.kind)


def with_penalties(
    network: keras.Model,
    spec: ModelSpec,
    optics: Optics | Sequence[Optics],
    fitted: FittedProbes | None = None,
    *,
    tv: float,
    real_space: float,
) -> keras.Model:
    """A network whose patches cost something by themselves: see `PatchPenalties`."""
    _, offset, *scan = network.inputs
    table = OpticsTable(optics, spec.object_amplitude, fitted)
    penalties = PatchPenalties(table, tv, real_space, name="penalties")
    patches = penalties(network.outputs[0], offset, **({"scan": scan[0]} if scan else {}))
    return keras.Model(network.inputs, patches, name="penalised")


def build_autoencoder(
    network: keras.Model, optics: Optics | Sequence[Optics], fitted: FittedProbes | None = None
) -> keras.Model:
    """A PINN's network followed by its forward model: from the network's inputs to counts (group, C, N, N).

    Fitted probes are a weight of the whole, the last one.
    """
    _, offset, *scan = network.inputs
    counts = GroupCounts(OpticsTable(optics, fitted=fitted), name="counts")
    return keras.Model(
        network.inputs,
        counts(network.outputs[0], offset, **({"scan": scan[0]} if scan else {})),
        name="autoencoder",
    )
