"""The probe a scan starts from: given, estimated or modelled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.geometry import FrameGrid, mean_counts, rim_phase
from ptychodask.io.grid import wavelength_of
from ptychodask.io.npy_stream import NpzFile, read_npy, reading
from ptychodask.io.raw import block_ranges
from ptychodask.io.source import PROBE_MODELS, IngestSpec, SourceScan, as_probe, listed_keys
from ptychodask.probes import disc_probe, estimate_probe, zone_plate_probe
from ptychodask.scan import Calibration, PatternSource

logger = logging.getLogger(__name__)


LOST_INTENSITY_WARNED = 0.01
"""Fraction of a probe's intensity outside its new grid from which on a warning is logged."""


def initial_probe(
    file_scan: SourceScan,
    spec: IngestSpec,
    grid: FrameGrid,
    diffraction: PatternSource,
    mask: NDArray[np.bool_] | None,
    label: str,
) -> tuple[NDArray[np.complex64], Calibration]:
    """Initial probe on the scan's grid, and its calibration."""
    kind = spec.probe or ("file" if file_scan.probe is not None else "estimate")
    if spec.probe is None and kind == "estimate":
        logger.warning(
            "%s: has no probe, so one is estimated from the mean pattern; pass probe= (--probe) with the path of a "
            "measured one if there is any, or probe='estimate'",
            label,
        )
    calibration = spec.calibration or (file_scan.calibration if kind == "file" else "mean_counts")
    if calibration == "as_given" and kind in ("disc", "zone_plate", "estimate"):
        raise PtychodaskError(
            f"{label}: calibration is 'as_given', but a probe from {kind!r} has an arbitrary scale; "
            "pass calibration='mean_counts', or 'incident' with incident_counts="
        )
    if kind == "file":
        if file_scan.probe is None:
            raise PtychodaskError(f"{label}: has no probe; pass probe= 'disc', 'zone_plate', 'estimate' or a path")
        if not np.any(file_scan.probe):
            raise PtychodaskError(
                f"{label}: its probe is zero everywhere; pass probe='estimate' (--probe estimate), 'disc', "
                "'zone_plate' or a path"
            )
        return _probe_on_grid(file_scan.probe, grid, label), calibration
    if kind == "disc":
        return disc_probe(grid.n_pixels, diameter_px=float(spec.probe_diameter_px or 0)), calibration
    if kind == "zone_plate":
        return _zone_plate(spec, grid, label), calibration
    if kind == "estimate":
        mean = mean_counts(_stored_blocks(diffraction), file_scan.domain)
        return estimate_probe(np.sqrt(mean if mask is None else mean * mask)), calibration
    return _probe_on_grid(_probe_file(kind), grid, kind), calibration


def _stored_blocks(diffraction: PatternSource) -> Iterator[NDArray[Any]]:
    for start, stop in block_ranges(diffraction.shape, diffraction.dtype.itemsize):
        yield diffraction[np.arange(start, stop)]


def _probe_on_grid(probe: NDArray[np.complex64], grid: FrameGrid, label: str) -> NDArray[np.complex64]:
    """Probe on the scan's grid, from the file's grid or the scan's."""
    if probe.shape[1:] == (grid.n_pixels, grid.n_pixels):
        return probe
    if probe.shape[1:] != grid.frame_shape:
        raise PtychodaskError(
            f"{label}: the probe has shape {probe.shape}, expected (mode, {grid.n_pixels}, {grid.n_pixels}) "
            f"or (mode, {grid.frame_shape[0]}, {grid.frame_shape[1]}) like the frames"
        )
    resampled = grid.probe(probe)
    before = float((np.abs(probe) ** 2).sum(dtype=np.float64))
    kept = float((np.abs(resampled) ** 2).sum(dtype=np.float64)) / before if before > 0 else 1.0
    if kept < 1 - LOST_INTENSITY_WARNED:
        logger.warning("%s: %.0f %% of the probe's intensity is outside its new grid", label, 100 * (1 - kept))
    return resampled


def _zone_plate(spec: IngestSpec, grid: FrameGrid, label: str) -> NDArray[np.complex64]:
    outer_px, defocus = float(spec.probe_diameter_px or 0), spec.probe_defocus
    if defocus is None:
        wavelength_m = wavelength_of(spec)
        if not (wavelength_m and spec.distance_m and spec.detector_pixel_m and spec.probe_defocus_m):
            raise PtychodaskError(
                f"{label}: probe_defocus_m needs energy_ev= (or wavelength_m=), distance_m= and detector_pixel_m=; "
                "pass them, or probe_defocus= in radians"
            )
        defocus = rim_phase(
            spec.probe_defocus_m,
            wavelength_m=wavelength_m,
            distance_m=spec.distance_m,
            pattern_pixel_m=spec.detector_pixel_m * grid.bin,
            outer_px=outer_px,
        )
    return zone_plate_probe(grid.n_pixels, outer_px=outer_px, stop_px=spec.probe_stop_px or 0.0, defocus=defocus)


def _probe_file(path: str) -> NDArray[np.complex64]:
    """Probe from a .npy or a .npz.

    In a .npz it is the only array, or the one at `probe` or `probeGuess`.
    """
    if not Path(path).is_file():
        raise PtychodaskError(f"{path}: no such file; pass probe= a path or one of: {', '.join(PROBE_MODELS)}")
    if Path(path).suffix != ".npz":
        return as_probe(read_npy(path), path)
    with reading(path), ExitStack() as stack:
        file = stack.enter_context(Path(path).open("rb"))
        npz = NpzFile(file, path, Path(path).parent, stack)
        keys = npz.keys()
        named = keys if len(keys) == 1 else [key for key in ("probe", "probeGuess") if key in keys]
        if len(named) != 1:
            raise PtychodaskError(
                f"{path}: expected one array, or one named 'probe' or 'probeGuess'; keys found: {listed_keys(keys)}"
            )
        return as_probe(npz.array(named[0]), path)
