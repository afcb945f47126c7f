"""The differentiable physics against plain NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from ptychodask.forward import crop_at, diffract, expected_counts
from ptychodask.models import Optics, physics
from ptychodask.probes import disc_probe, illumination, zone_plate_probe
from ptychodask.training import amplitude_loss, poisson_loss

N = 32


def pair(values):
    values = np.asarray(values)
    return values.real.astype(np.float32), values.imag.astype(np.float32)


def joined(values):
    return np.asarray(values[0]) + 1j * np.asarray(values[1])


def smooth_object(rng, shape):
    """Complex field without frequencies above a sixth of the grid's, amplitude around 1."""
    noise = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    fy, fx = np.meshgrid(*(np.fft.fftfreq(n) for n in shape[-2:]), indexing="ij")
    field = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-((fy**2 + fx**2) / (2 * 0.06**2))))
    return (1 + 0.3 * field / np.abs(field).max()).astype(np.complex64)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_propagation_is_the_centred_unitary_transform(rng):
    wave = rng.normal(size=(2, N, N)) + 1j * rng.normal(size=(2, N, N))
    expected = np.fft.fftshift(np.fft.fft2(wave), axes=(-2, -1)) / N
    np.testing.assert_allclose(joined(physics.propagate(pair(wave))), expected, atol=1e-5)
    np.testing.assert_allclose(joined(physics.propagate_back(pair(expected))), wave, atol=1e-5)


def test_counts_keep_the_energy_and_equal_the_numpy_model(rng):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    patches = smooth_object(rng, (3, N, N))[None]
    counts = np.asarray(physics.expected_counts(pair(probe), pair(patches)))
    waves = probe[None, None] * patches[:, :, None]
    np.testing.assert_allclose(counts.sum((-2, -1)), (np.abs(waves) ** 2).sum((2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(counts, diffract(waves), atol=1e-5 * counts.max())


def test_ramps_of_whole_pixels_roll(rng):
    image = rng.normal(size=(N, N)) + 1j * rng.normal(size=(N, N))
    ramps = joined(physics.shift_ramps(np.array([2.0, -3.0], np.float32), N))
    moved = np.fft.ifft2(np.fft.fft2(image) * ramps)
    np.testing.assert_allclose(moved, np.roll(image, (-2, 3), axis=(0, 1)), atol=1e-5)


def test_ramps_sample_a_band_limited_image_between_its_pixels():
    y, x = np.indices((N, N))
    wave = lambda y, x: np.exp(2j * np.pi * (3 * y - 2 * x) / N)  # noqa: E731
    ramps = joined(physics.shift_ramps(np.array([0.3, 1.7], np.float32), N))
    moved = np.fft.ifft2(np.fft.fft2(wave(y, x)) * ramps)
    np.testing.assert_allclose(moved, wave(y + 0.3, x + 1.7), atol=1e-5)


def compiled(function):
    """A function of tensors as the backend compiles it."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


@pytest.mark.parametrize("wrap", [compiled, lambda function: function], ids=["compiled", "eager"])
@pytest.mark.parametrize("members", [1, 4, 9])
@pytest.mark.parametrize("n_groups", [1, 7, 64])
def test_members_cut_from_one_object_merge_to_themselves(rng, members, n_groups, wrap):
    # Each patch already equals the object where it overlaps others, so the weighted mean changes nothing there.
    probe = disc_probe(N, diameter_px=14, edge_px=2.0)
    weight = illumination(probe)
    field = smooth_object(rng, (N + 24, N + 24))
    centre = np.array([(N + 24) / 2] * 2)
    offset = rng.integers(-4, 5, size=(n_groups, members, 2)).astype(np.float32)
    patches = np.stack([[crop_at(field, (0, 0), centre + o, N)[0] for o in group] for group in offset])

    def merge(real, imag, offset):
        ramps = physics.shift_ramps(offset, N)
        return physics.merge_members((real, imag), weight, ramps, physics.gathered_weight(weight, ramps))

    merged = joined(wrap(merge)(*pair(patches), offset))
    lit = weight > 0.05
    assert merged.shape == (n_groups, members, N, N)
    np.testing.assert_allclose(merged[..., lit], patches[..., lit], atol=2e-3)


def test_merging_one_member_keeps_it(rng):
    probe = disc_probe(N, diameter_px=14)
    patches = smooth_object(rng, (N, N))[None, None]
    ramps = physics.shift_ramps(np.zeros((1, 1, 2), np.float32), N)
    total = physics.gathered_weight(illumination(probe), ramps)
    merged = joined(physics.merge_members(pair(patches), illumination(probe), ramps, total))
    np.testing.assert_allclose(merged, patches, atol=1e-4)


def projected(patches, probe, amplitude, offset, mask=None, length=1.0):
    ramps = physics.shift_ramps(offset, N)
    weight = illumination(probe)
    total = physics.gathered_weight(weight, ramps)
    mask = np.ones((N, N), np.float32) if mask is None else mask
    step = physics.project_group(pair(patches), pair(probe), amplitude, mask, weight, ramps, total, length)
    return joined(step)


def test_a_projection_leaves_the_true_object_where_it_is(rng):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    truth = smooth_object(rng, (2, N, N))[:, None]
    amplitude = np.sqrt(diffract(probe * truth[:, :, None])).astype(np.float32)
    after = projected(truth, probe, amplitude, np.zeros((2, 1, 2), np.float32))
    np.testing.assert_allclose(after, truth, atol=1e-4)


def test_projections_bring_a_flat_object_to_the_data(rng):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    field = smooth_object(rng, (N + 24, N + 24))
    offset = np.array([[[0, 0], [3, 1], [-2, 3], [1, -4]]], np.float32)
    truth = np.stack([[crop_at(field, (0, 0), 28 + o, N)[0] for o in offset[0]]])
    amplitude = np.sqrt(diffract(probe * truth[:, :, None])).astype(np.float32)
    patches = np.ones_like(truth)
    residual = []
    for _ in range(4):
        modelled = np.sqrt(diffract(probe * patches[:, :, None]))
        residual.append(np.abs(modelled - amplitude).sum() / amplitude.sum())
        patches = projected(patches, probe, amplitude, offset).astype(np.complex64)
    assert residual == sorted(residual, reverse=True)
    assert residual[-1] < 0.5 * residual[0]


def test_momentum_carries_slow_changes_of_the_phase_farther(rng):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    offset = np.array([[[0, 0], [3, 1], [-2, 3], [1, -4]]], np.float32)
    y, x = np.indices((N + 24, N + 24))
    slow = np.exp(0.4j * np.cos(2 * np.pi * (y + x) / 60))
    truth = np.stack([[crop_at(slow, (0, 0), 28 + o, N)[0] for o in offset[0]]])
    amplitude = np.sqrt(diffract(probe * truth[:, :, None])).astype(np.float32)
    weight = illumination(probe)

    def far_off(momentum):
        patches = ahead = np.ones_like(truth)
        for _ in range(8):
            before, patches = patches, projected(ahead, probe, amplitude, offset, length=physics.step_length(momentum))
            ahead = joined(physics.extrapolate(pair(before), pair(patches), momentum))
        turn = patches * truth.conj()
        turn *= np.exp(-1j * np.angle((weight * turn).sum()))
        return float((weight * np.angle(turn) ** 2).sum())

    assert far_off(0.8) < 0.7 * far_off(0.0)


@pytest.mark.parametrize("loss_of", [amplitude_loss, poisson_loss])
def test_gradients_are_those_of_finite_differences(rng, loss_of):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    mask = np.ones((N, N), np.float32)
    mask[3, 5] = 0
    counts = diffract(probe * smooth_object(rng, (1, 2, 1, N, N)))
    optics = Optics(probe, float(N / 2 / np.sqrt(counts.sum() / 2)), mask)
    loss, offset = loss_of(optics), np.array([[[1.3, 0.4], [-1.3, -0.4]]], np.float32)
    ramps = physics.shift_ramps(offset, N)
    total = physics.gathered_weight(optics.weight, ramps)

    def value(real, imag):
        merged = physics.merge_members((real, imag), optics.weight, ramps, total)
        return loss(np.sqrt(counts).astype(np.float32), physics.expected_counts(pair(probe), merged))

    at = pair(smooth_object(rng, (1, 2, N, N)))
    slope = gradient(value, at)
    # Along the gradient itself the loss changes most, so that float32 still tells by how much.
    step = 1e-2 / np.sqrt(sum((part**2).sum() for part in slope))
    ahead, behind = (float(value(*(a + sign * step * s for a, s in zip(at, slope, strict=True)))) for sign in (1, -1))
    expected = sum((part**2).sum() for part in slope)
    assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-2)


def gradient(function, at):
    """Gradient of a function of two arrays, as the backend derives it."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return [np.asarray(part) for part in jax.grad(function, argnums=(0, 1))(*at)]
    if backend == "torch":
        variables = [keras.ops.convert_to_tensor(part).requires_grad_() for part in at]
        function(*variables).backward()
        return [variable.grad.numpy() for variable in variables]
    import tensorflow as tf

    variables = [tf.Variable(part) for part in at]
    with tf.GradientTape() as tape:
        found = function(*variables)
    return [part.numpy() for part in tape.gradient(found, variables)]


def test_bad_pixels_change_nothing(rng):
    probe = zone_plate_probe(N, outer_px=16, stop_px=5, defocus=4.0) * 30
    truth = smooth_object(rng, (1, N, N))[:, None]
    amplitude = np.sqrt(diffract(probe * truth[:, :, None])).astype(np.float32)
    mask = (rng.random((N, N)) > 0.2).astype(np.float32)
    spoiled = np.where(mask > 0, amplitude, 0)
    after = projected(truth, probe, spoiled, np.zeros((1, 1, 2), np.float32), mask)
    np.testing.assert_allclose(after, truth, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_projections_stay_stable_under_a_probe_with_sharp_edges(rng, momentum):
    # Translating a sharp edge rings below zero; a weight that becomes too small makes the steps grow without bound.
    probe = disc_probe(N, diameter_px=15, edge_px=0.5) * 30
    field = smooth_object(rng, (N + 24, N + 24))
    offset = rng.uniform(-5, 5, size=(8, 4, 2)).astype(np.float32)
    position = 28 + offset.reshape(-1, 2).astype(float)
    counts = np.stack([expected_counts(field, (0, 0), probe, place) for place in position])
    amplitude = np.sqrt(counts).reshape(8, 4, N, N).astype(np.float32)
    patches = ahead = np.ones((8, 4, N, N), np.complex64)
    misfit = []
    for _ in range(24):
        misfit.append(np.abs(np.sqrt(diffract(probe * patches[:, :, None])) - amplitude).sum())
        length = physics.step_length(momentum)
        before, patches = patches, projected(ahead, probe, amplitude, offset, length=length).astype(np.complex64)
        ahead = joined(physics.extrapolate(pair(before), pair(patches), momentum))
    assert misfit[-1] < 0.7 * misfit[0]
    assert np.abs(patches[..., illumination(probe) > 0.05]).max() < 2
