"""Reader of CXI files (Coherent X-ray Imaging Data Bank, version 1.6).

SI units, energy in joules, mask 0 where a pixel is good.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.quantities import (
    DETECTOR_PIXEL,
    DISTANCE,
    ENERGY,
    WAVELENGTH,
    Optic,
    metres_of,
    pixel_aspect,
    read_optics,
)
from ptychodask.io.source import Container, IngestSpec, SourceScan, apply_flips, as_probe, missing_key

logger = logging.getLogger(__name__)

OPTIONS = ("units", "dc", "flip_y", "flip_x", "swap_xy")

ENTRY = "entry_1"
DETECTOR = f"{ENTRY}/instrument_1/detector_1"
SOURCE = f"{ENTRY}/instrument_1/source_1"

DATA = (f"{ENTRY}/data_1/data", f"{DETECTOR}/data")
TRANSLATION = (f"{ENTRY}/data_1/translation", f"{ENTRY}/sample_1/geometry_1/translation", f"{DETECTOR}/translation")
ILLUMINATION = (
    f"{SOURCE}/illumination",
    f"{ENTRY}/image_1/data",
    f"{SOURCE}/data_illumination",
    f"{SOURCE}/probe",
    f"{DETECTOR}/data_illumination",
    f"{DETECTOR}/probe",
)
OPTICS: tuple[tuple[Optic, tuple[str, ...], str], ...] = (
    (ENERGY, (f"{SOURCE}/energy",), "J"),
    (WAVELENGTH, (f"{SOURCE}/wavelength",), "m"),
    (DISTANCE, (f"{DETECTOR}/distance",), "m"),
    (DETECTOR_PIXEL, (f"{DETECTOR}/x_pixel_size",), "m"),
)
"""Numbers of the instrument, their keys, and their unit by the format."""

WIDEST_M = 0.1
"""Largest extent of positions in metres: no stage scans further."""


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format."""
    return any(key in keys for key in DATA) and any(key in keys for key in TRANSLATION)


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read patterns (counts), positions, mask, probe and optics.

    Notes
    -----
    The translation of the sample is (x, y, z) in laboratory axes; the position of the probe on the sample is its
    negative. The rows and columns of a frame run along the columns of ``basis_vectors``, (slow, fast). Without these,
    they run along -y and -x, as in the standard detector, so that position y is translation y and x is x.
    """
    data = _first(container, DATA)
    key = _first(container, TRANSLATION)
    translation_xyz = as_translation(container.array(key), f"{container.label}[{key}]")
    unit_m = metres_of(container, key, spec.units, defined="m")
    position_yx_m = _on_detector_axes(container, translation_xyz) * unit_m
    finite = position_yx_m[np.isfinite(position_yx_m).all(axis=1)]
    extent_m = float(np.ptp(finite, axis=0).max()) if len(finite) else 0.0
    if extent_m > WIDEST_M:
        raise PtychodaskError(
            f"{container.label}[{key}]: positions span {extent_m:.4g} m, expected at most {WIDEST_M} m, so their unit "
            "is not metres; pass units= (--units)"
        )
    return SourceScan(
        frames=container.frames(data),
        position_yx=apply_flips(position_yx_m, spec),
        unit="m",
        domain="counts",
        dc=spec.dc or "centre",
        calibration="mean_counts",
        probe=illumination(container, ILLUMINATION),
        mask=good_pixels(container, f"{DETECTOR}/mask"),
        optics=read_optics(container, spec, OPTICS),
        pixel_aspect=1.0 if spec.detector_pixel_m else pixel_aspect(container, DETECTOR, defined="m"),
    )


def _first(container: Container, keys: Sequence[str]) -> str:
    for key in keys:
        if container.has(key):
            return key
    raise missing_key(container, keys[0])


def as_translation(values: NDArray[Any], label: str) -> NDArray[np.float64]:
    """Translations (x, y, z) as float64 (pattern, 3), in the file's unit.

    From two or three numbers for each pattern; z is 0 if there are two.
    """
    if values.ndim != 2 or values.shape[1] not in (2, 3) or values.dtype.kind not in "iuf":
        raise PtychodaskError(
            f"{label}: has shape {values.shape} and type {values.dtype}, "
            "expected numbers (pattern, 3) in the order (x, y, z); transpose it in the file"
        )
    xyz = np.zeros((len(values), 3))
    xyz[:, : values.shape[1]] = values
    return xyz


def _on_detector_axes(container: Container, translation_xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions (pattern, 2) of the probe on the sample along detector axes."""
    key = f"{DETECTOR}/basis_vectors"
    if not container.has(key):
        return translation_xyz[:, 1::-1].copy()
    basis = container.array(key)
    if basis.shape != (3, 2) or basis.dtype.kind not in "iuf" or not (np.linalg.norm(basis, axis=0) > 0).all():
        raise PtychodaskError(
            f"{container.label}[{key}]: has shape {basis.shape}, expected (3, 2), nonzero vectors along the slow and "
            "the fast axis; correct them, or map the file's arrays with keys="
        )
    along = basis / np.linalg.norm(basis, axis=0)
    # Adding 0 makes 0 of -0.
    return -translation_xyz @ along + 0.0


def illumination(container: Container, keys: Sequence[str]) -> NDArray[np.complex64] | None:
    """Probe of a file, if it contains a complex one."""
    for key in keys:
        if container.has(key) and container.dtype(key).kind == "c":
            return as_probe(container.array(key), f"{container.label}[{key}]")
    return None


def good_pixels(container: Container, key: str) -> NDArray[np.bool_] | None:
    """Mask of CXI or NeXus, True where a pixel is 0."""
    if not container.has(key):
        return None
    values = container.array(key)
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind not in "biu":
        logger.warning(
            "%s[%s]: ignored a mask of shape %s and type %s", container.label, key, values.shape, values.dtype
        )
        return None
    good: NDArray[np.bool_] = values == 0
    return good
