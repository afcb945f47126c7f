"""Loss functions of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptychodask.models import Optics
from ptychodask.models.backend import ops

Loss = Callable[[Any, Any], Any]
"""From (target, prediction) to a scalar."""

COUNTS_FLOOR = 0.1
"""Background, counts per pixel, that keeps the Poisson likelihood finite where the expected counts are 0."""


class ScanValues:
    """Constants of each scan for a loss, such as its detector mask.

    Parameters
    ----------
    values : sequence of dict
        For each scan, arrays and numbers by name. With several scans, the loss selects those of a batch by the scan
        number in the target (see `with_scan_number`).
    """

    def __init__(self, values: Sequence[dict[str, Any]]) -> None:
        self._values = values

    def of(self, target: Any) -> tuple[Any, dict[str, Any]]:
        """Target without scan number, and values of its scan."""
        if len(self._values) == 1:
            return target, {name: ops.convert_to_tensor(value, "float32") for name, value in self._values[0].items()}
        number = ops.cast(ops.reshape(target[0, -1], (-1,))[0], "int32")
        names = self._values[0]
        stacked = {name: np.stack([value[name] for value in self._values]).astype(np.float32) for name in names}
        return target[:, :-1], {name: ops.take(stack, number, axis=0) for name, stack in stacked.items()}


def _measured(optics: Optics | Sequence[Optics]) -> ScanValues:
    listed = [optics] if isinstance(optics, Optics) else optics
    return ScanValues([{"mask": each.mask, "mean_counts": each.mean_counts} for each in listed])


def _known(amplitude: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Amplitude without NaN, and the mean over members whose target is known.

    The target of the other members is NaN, which is replaced by 0.
    """
    known = ops.logical_not(ops.isnan(amplitude))
    share = ops.cast(known[..., 0, 0], "float32")
    return ops.where(known, amplitude, 0.0), lambda misfit: ops.sum(misfit * share) / ops.sum(share)


def amplitude_loss(optics: Optics | Sequence[Optics]) -> Loss:
    """Squared amplitude error Σ(√I_pred − √I)² over good pixels.

    Relative to the scan's mean counts, averaged over patterns. This is the Gaussian likelihood of the amplitude: photon
    noise has the same variance in the square root of every pixel.
    """
    values = _measured(optics)

    def loss(target: Any, counts: Any) -> Any:
        amplitude, scan = values.of(target)
        amplitude, mean = _known(amplitude)
        difference = (ops.sqrt(counts + 1e-9) - amplitude) * scan["mask"]
        return mean(ops.sum(difference * difference, axis=(-2, -1))) / scan["mean_counts"]

    return loss


def mae_loss(optics: Optics | Sequence[Optics]) -> Loss:
    """Absolute amplitude error Σ|√I_pred − √I| over good pixels.

    Averaged over patterns, relative to N·√(mean counts of the scan), which is Σ√I of a uniform pattern.
    """
    values = _measured(optics)

    def loss(target: Any, counts: Any) -> Any:
        amplitude, scan = values.of(target)
        amplitude, mean = _known(amplitude)
        difference = ops.abs(ops.sqrt(counts + 1e-9) - amplitude) * scan["mask"]
        of_uniform = counts.shape[-1] * scan["mean_counts"] ** 0.5
        return mean(ops.sum(difference, axis=(-2, -1))) / of_uniform

    return loss


def poisson_loss(optics: Optics | Sequence[Optics]) -> Loss:
    """A quarter of the Poisson deviance over good pixels.

    Relative to the scan's mean counts, averaged over patterns: ½ Σ λ − n + n ln(n/λ), with `COUNTS_FLOOR` added to
    λ and n. The factor of a quarter makes it agree with `amplitude_loss` at high counts (deviance ≈ 4 Σ(√λ − √n)²;
    McCullagh & Nelder, Generalized Linear Models, 1989, §2.3).
    """
    values = _measured(optics)

    def loss(target: Any, counts: Any) -> Any:
        amplitude, scan = values.of(target)
        amplitude, mean = _known(amplitude)
        measured = amplitude * amplitude + COUNTS_FLOOR
        expected = counts + COUNTS_FLOOR
        deviance = (expected - measured + measured * ops.log(measured / expected)) * scan["mask"]
        return 0.5 * mean(ops.sum(deviance, axis=(-2, -1))) / scan["mean_counts"]

    return loss


def patch_loss(optics: Optics | Sequence[Optics], object_amplitude: float | None = None) -> Loss:
    """Mean |patch − label| over illuminated pixels.

    In units of the flat object's amplitude, by default that of each scan (`Optics.flat_amplitude`).
    """
    listed = [optics] if isinstance(optics, Optics) else optics
    masks = [(each.weight > 0).astype(np.float32)[..., None] for each in listed]
    flat = [object_amplitude or each.flat_amplitude() for each in listed]
    values = ScanValues(
        [{"illuminated": m, "scale": 1.0 / (float(m.sum()) * a)} for m, a in zip(masks, flat, strict=True)]
    )

    def loss(target: Any, patches: Any) -> Any:
        label, scan = values.of(target)
        return ops.mean(ops.sum(ops.abs(patches - label) * scan["illuminated"], axis=(-3, -2, -1))) * scan["scale"]

    return loss
