"""What a training makes small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from ptychodask.models import Optics

Loss = Callable[[Any, Any], Any]
"""(target, what the network gives) to a number."""

COUNTS_FLOOR = 0.1
"""Background, counts per pixel, that keeps the Poisson likelihood finite where no light is expected."""


def amplitude_loss(optics: Optics) -> Loss:
    """Σ(√I_pred − √I)² over good pixels, relative to the mean counts, averaged over patterns.

    The Gaussian likelihood of the amplitude: photon noise has the same variance in every pixel's square root.
    """
    mask, mean_counts = optics.mask, optics.mean_counts

    def loss(amplitude: Any, counts: Any) -> Any:
        difference = (ops.sqrt(counts + 1e-9) - amplitude) * ops.convert_to_tensor(mask)
        return ops.mean(ops.sum(difference * difference, axis=(-2, -1))) / mean_counts

    return loss


def mae_loss(optics: Optics) -> Loss:
    """Σ|√I_pred − √I| over good pixels, averaged over patterns, relative to N·√(mean counts).

    The latter is Σ√I of a pattern whose light is spread evenly.
    """
    mask, scale = optics.mask, 1.0 / (optics.mask.shape[0] * float(np.sqrt(optics.mean_counts)))

    def loss(amplitude: Any, counts: Any) -> Any:
        difference = ops.abs(ops.sqrt(counts + 1e-9) - amplitude) * ops.convert_to_tensor(mask)
        return ops.mean(ops.sum(difference, axis=(-2, -1))) * scale

    return loss


def poisson_loss(optics: Optics) -> Loss:
    """A quarter of the Poisson deviance over good pixels, relative to the mean counts, averaged over patterns.

    ½ Σ λ − n + n ln(n/λ), with `COUNTS_FLOOR` added to both: the quarter makes it agree with `amplitude_loss`
    where counts are high (deviance ≈ 4 Σ(√λ − √n)²; McCullagh & Nelder, Generalized Linear Models, 1989, §2.3).
    """
    mask, mean_counts = optics.mask, optics.mean_counts

    def loss(amplitude: Any, counts: Any) -> Any:
        measured = amplitude * amplitude + COUNTS_FLOOR
        expected = counts + COUNTS_FLOOR
        deviance = (expected - measured + measured * ops.log(measured / expected)) * ops.convert_to_tensor(mask)
        return 0.5 * ops.mean(ops.sum(deviance, axis=(-2, -1))) / mean_counts

    return loss


def patch_loss(optics: Optics, object_amplitude: float) -> Loss:
    """Mean |patch − label| where light fell, in units of the flat object's amplitude."""
    weight = (optics.weight > 0).astype(np.float32)[..., None]
    scale = 1.0 / (float(weight.sum()) * object_amplitude)

    def loss(label: Any, patches: Any) -> Any:
        return ops.mean(ops.sum(ops.abs(patches - label) * ops.convert_to_tensor(weight), axis=(-3, -2, -1))) * scale

    return loss
