"""What one backend of Keras computes from given weights; run by itself, since a process has one backend.

KERAS_BACKEND=jax python backend_run.py answers.npz
"""

from __future__ import annotations

import sys

import keras
import numpy as np

from ptychodask.forward import diffract
from ptychodask.models import Model, ModelSpec, Optics
from ptychodask.models.networks import build_autoencoder, build_network
from ptychodask.models.ptychopinn import GroupReassembly
from ptychodask.probes import zone_plate_probe
from ptychodask.training import amplitude_loss, poisson_loss

N = 16
GROUPS = 5

OPTICS = Optics(zone_plate_probe(N, outer_px=7, stop_px=2, defocus=1.0) * 30, 0.5, np.ones((N, N), np.float32))


def random_model(**fields):
    spec = ModelSpec(n_pixels=N, levels=2, **fields)
    # A seed for which no activation is zero but for rounding: there, a gradient may lie on either side of the kink.
    rng = np.random.default_rng(5)
    shapes = [weight.shape for weight in build_network(spec, OPTICS).weights]
    return Model(spec, [rng.normal(scale=0.1, size=shape).astype(np.float32) for shape in shapes], OPTICS)


def inputs(members):
    """What a detector would see of smooth random objects, and offsets."""
    rng = np.random.default_rng(1)
    spectrum = rng.normal(size=(GROUPS, members, 1, N, N)) * np.exp(
        -30 * np.hypot(*np.meshgrid(*[np.fft.fftfreq(N)] * 2))
    )
    patches = np.exp((0.2 + 0.5j) * np.fft.ifft2(spectrum * N).real)
    x = OPTICS.normalization * np.sqrt(diffract(OPTICS.probe * patches))
    return np.moveaxis(x, 1, -1).astype(np.float32), rng.uniform(-2, 2, (GROUPS, members, 2)).astype(np.float32)


def training_step(model, loss):
    """Loss of a batch, and by how much one step on it changes each weight."""
    network = model.network()
    autoencoder = build_autoencoder(network, OPTICS)
    jit = keras.backend.backend() == "jax"
    autoencoder.compile(keras.optimizers.SGD(1e-2, clipnorm=1.0), loss=loss, jit_compile=jit)
    x, offset = inputs(model.members)
    amplitude = np.moveaxis(x, -1, 1) / OPTICS.normalization
    value = autoencoder.train_on_batch([x, offset], amplitude)
    change = [after - before for after, before in zip(network.get_weights(), model.weights, strict=True)]
    return np.float64(value), np.concatenate([part.ravel() for part in change])


def answers():
    pinn = random_model(members=4)
    single = random_model(kind="baseline", members=1, projections_before=0, projections_after=1)
    found = {"pinn": pinn.predict(*inputs(4)), "baseline": single.predict(*inputs(1))}
    x, offset = inputs(4)
    found["reassembly"] = keras.ops.convert_to_numpy(GroupReassembly()(x, -x, offset))
    for name, loss in (("amplitude", amplitude_loss(OPTICS)), ("poisson", poisson_loss(OPTICS))):
        found[f"{name} loss"], found[f"{name} step"] = training_step(pinn, loss)
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], backend=keras.backend.backend(), **answers())
