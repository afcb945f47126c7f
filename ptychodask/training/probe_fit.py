"""Fitted probes of a training: optimizer, gauge, comparison with the stored probe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.forward import shift_probe
from ptychodask.models.backend import keras, ops
from ptychodask.models.networks import FittedProbes
from ptychodask.probes import probe_centroid_px
from ptychodask.scan import Scan
from ptychodask.store.annotate import replace_probe
from ptychodask.training.spec import TrainingSpec

logger = logging.getLogger(__name__)


def _without_started_from(record: Any) -> Any:
    return {k: v for k, v in record.items() if k != "started_from"} if isinstance(record, dict) else record


@dataclass(frozen=True, eq=False)
class ProbeFit:
    """Fitted probe of a scan, and its held-out losses."""

    probe: NDArray[np.complex64]
    """The fitted probe (mode, N, N), in the gauge of the stored one (`in_gauge_of`)."""

    loss_before: float
    """Held-out loss with the stored probe."""

    loss_after: float
    """Held-out loss with the fitted probe, same patterns and weights."""

    @property
    def is_better(self) -> bool:
        """True if the fitted probe has the lower held-out loss."""
        return self.loss_after < self.loss_before

    def record(self, spec: TrainingSpec, scan: Scan) -> dict[str, Any]:
        """Provenance of the probe for the store, as plain values."""
        return {
            "by": "train",
            "held_out_loss_before": self.loss_before,
            "held_out_loss_after": self.loss_after,
            "probe_rate": spec.probe_rate,
            "seed": spec.seed,
            "started_from": _without_started_from(scan.attributes.get("probe_refinement")),
        }


class ProbeAdam(keras.optimizers.Adam):
    """Adam with one step size per fitted probe.

    The last variable is the fitted probes, the others are weights. The second moment of a probe is the mean of its
    squared gradient over modes and pixels. Adam's own second moment, pixel by pixel, would change pixels that the
    patterns hardly determine as much as the others.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Step of Adam with a single second moment for each scan's probe.

        Kingma & Ba, arXiv 1412.6980, algorithm 1.
        """
        index = self._get_variable_index(variable)
        if index < len(self._trainable_variables) - 1:
            super().update_step(gradient, variable, learning_rate)
            return
        momentum, velocity = self._momentums[index], self._velocities[index]
        step = ops.cast(self.iterations + 1, "float32")
        unbias = ops.sqrt(1 - self.beta_2**step) / (1 - self.beta_1**step)
        squared = ops.mean(ops.square(gradient), axis=(0, 2, 3, 4), keepdims=True)
        self.assign_add(momentum, (gradient - momentum) * (1 - self.beta_1))
        self.assign_add(velocity, (squared - velocity) * (1 - self.beta_2))
        rate = ops.cast(learning_rate, "float32") * unbias
        self.assign_sub(variable, momentum * rate / (ops.sqrt(velocity) + self.epsilon))


def in_gauge_of(stored: NDArray[np.complex64], probe: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Probe with intensity, centroid and global phase of the stored probe.

    The patterns do not determine these.

    Parameters
    ----------
    stored, probe : complex64 arrays (mode, N, N)

    Returns
    -------
    complex64 array (mode, N, N)
        With the total intensity Σ|P|² of the stored probe (the calibration), its centroid of Σ|P|² (the object would
        move along), and the global phase for which <stored, probe> is real and not negative.

    Notes
    -----
    A phase ramp is left unchanged. Probe and object could share one, but patches start from a flat object and the
    detector does not move, so that the patterns determine the probe's ramp; the ramp of the stored probe is no
    reference, since it depends on the assumed centre of the detector (as in `run_sweeps`).

    Examples
    --------
    >>> stored = np.eye(1, 16, 5).reshape(1, 4, 4).astype(np.complex64)
    >>> in_gauge_of(stored, 2j * np.roll(stored, 1, axis=2)).real.round(5).tolist() == stored.real.tolist()
    True
    """
    probe = shift_probe(probe, probe_centroid_px(stored) - probe_centroid_px(probe)).astype(np.complex128)
    phase = np.angle(np.vdot(stored, probe))
    scale = np.linalg.norm(stored.astype(np.complex128)) / np.linalg.norm(probe)
    return (probe * scale * np.exp(-1j * phase)).astype(np.complex64)


def judge_probes(
    fitted: FittedProbes, stored: Sequence[NDArray[np.complex64]], held_out_loss: Callable[[], float]
) -> list[ProbeFit]:
    """Compare the fitted probe of each scan with the stored one.

    Parameters
    ----------
    fitted : FittedProbes
        Probes with their final values.
    stored : sequence of complex64 arrays (mode, N, N)
    held_out_loss : callable
        Returns the held-out loss of the network with the current probes, over all scans.

    Returns
    -------
    list of ProbeFit
        One for each scan; between its two losses only the probe of that scan changes.
    """
    probes = [in_gauge_of(before, after) for before, after in zip(stored, fitted.read(), strict=True)]
    fitted.assign(probes)
    loss_after = held_out_loss()
    fits = []
    for number, before in enumerate(stored):
        fitted.assign([*probes[:number], before, *probes[number + 1 :]])
        fits.append(ProbeFit(probes[number], held_out_loss(), loss_after))
    return fits


def store_probe(scan: Scan, fit: ProbeFit, spec: TrainingSpec) -> None:
    """Replace the store's probe if the fit is better; log the losses."""
    if fit.is_better:
        replace_probe(str(scan.store), fit.probe, fit.record(spec, scan))
    logger.info(
        "%s: held-out loss %.5g with the stored probe and %.5g with the fitted one; the store %s",
        scan.store,
        fit.loss_before,
        fit.loss_after,
        "now has the fitted probe" if fit.is_better else "keeps its probe",
    )
