"""Reader of NeXus files of the definition NXcxi_ptycho.

Like CXI, but numbers have a ``units`` attribute, and patterns of a raster have four axes. Keys and their meaning:
nexusformat/definitions, ``NXcxi_ptycho.nxdl.xml``. There ``source_1/energy`` is the energy of the storage ring; the
photon energy is that of the beam.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.cxi import as_translation, good_pixels, illumination
from ptychodask.io.quantities import DETECTOR_PIXEL, DISTANCE, ENERGY, Optic, metres_of, pixel_aspect, read_optics
from ptychodask.io.source import Container, IngestSpec, SourceScan, apply_flips, as_vector, frame_axes, missing_key

OPTIONS = ("units", "dc", "flip_y", "flip_x", "swap_xy")

BEAM_ENERGY = ("energy", "incident_beam_energy", "incident_energy")

_BEAM = re.compile(rf"^([^/]+)/.*beam_1/({'|'.join(BEAM_ENERGY)}|extent)$")


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format.

    The group of the beam distinguishes it from CXI.
    """
    return _entry(keys) is not None


def _entry(keys: Sequence[str]) -> str | None:
    beam = next((match for key in keys if (match := _BEAM.match(key))), None)
    if beam is None:
        return None
    entry = beam.group(1)
    return entry if any(key.startswith(f"{entry}/instrument_1/detector_1/") for key in keys) else None


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read patterns (counts), positions, mask, probe and optics.

    Notes
    -----
    Frames are (pattern, h, w), or (npts_x, npts_y, h, w) for a raster, row after row. Positions are ``translation``
    (pattern, 3), or else x and y of ``sample_1/transformations``: one of each per pattern, or npts_x and npts_y of
    them. By default +x is along columns and +y along rows; other orientations need the flips, which
    `inspect --check-axes` determines.
    """
    entry = _entry(container.keys())
    if entry is None:
        raise PtychodaskError(
            f"{container.label}: has no group beam_1 with an energy or extent, expected by NXcxi_ptycho; "
            "map the file's arrays with keys="
        )
    detector, sample = f"{entry}/instrument_1/detector_1", f"{entry}/sample_1"
    data = next((key for key in (f"{entry}/data_1/data", f"{detector}/data") if container.has(key)), None)
    if data is None:
        raise missing_key(container, f"{entry}/data_1/data")
    frames = container.frames(data, raster=True)
    raster = frame_axes(container.shape(data))[:-2]
    translations = [f"{group}/translation" for group in (f"{entry}/data_1", detector, f"{sample}/geometry_1")]
    position_yx_m = _positions(container, spec, translations, f"{sample}/transformations", raster)
    beams = [f"{group}/beam_1" for group in (f"{entry}/instrument_1", sample, entry)]
    optics: tuple[tuple[Optic, list[str], None], ...] = (
        (ENERGY, [f"{beam}/{name}" for beam in beams for name in BEAM_ENERGY], None),
        (DISTANCE, [f"{detector}/distance"], None),
        (DETECTOR_PIXEL, [f"{detector}/x_pixel_size"], None),
    )
    return SourceScan(
        frames=frames,
        position_yx=apply_flips(position_yx_m, spec),
        unit="m",
        domain="counts",
        dc=spec.dc or "centre",
        calibration="mean_counts",
        probe=illumination(container, [f"{entry}/instrument_1/source_1/illumination", f"{entry}/image_1/data"]),
        mask=good_pixels(
            container, f"{detector}/pixel_mask" if container.has(f"{detector}/pixel_mask") else f"{detector}/mask"
        ),
        optics=read_optics(container, spec, optics),
        pixel_aspect=1.0 if spec.detector_pixel_m else pixel_aspect(container, detector, defined=None),
    )


def _positions(
    container: Container, spec: IngestSpec, translations: Sequence[str], transformations: str, raster: tuple[int, ...]
) -> NDArray[np.float64]:
    """Positions (pattern, 2), (y, x), metres."""
    key = next((key for key in translations if container.has(key)), None)
    if key is not None:
        values = container.array(key)
        flat = values.reshape(-1, values.shape[-1]) if values.ndim else values
        return as_translation(flat, f"{container.label}[{key}]")[:, 1::-1] * metres_of(
            container, key, spec.units, defined=None
        )
    y, x = (_axis(container, f"{transformations}/{name}", spec, translations[0]) for name in ("y", "x"))
    if len(raster) == 2 and (len(x), len(y)) == raster:
        x, y = (grid.ravel() for grid in np.meshgrid(x, y, indexing="ij"))
    if len(y) != len(x):
        raise PtychodaskError(
            f"{container.label}[{transformations}]: {len(y)} y and {len(x)} x positions for patterns {raster}, "
            "expected one of each per pattern, or npts_x and npts_y of them; correct the file"
        )
    return np.stack([y, x], axis=1)


def _axis(container: Container, key: str, spec: IngestSpec, wanted: str) -> NDArray[np.float64]:
    if not container.has(key):
        raise missing_key(container, wanted)
    values = container.array(key)
    return as_vector(values.reshape(-1, 1), f"{container.label}[{key}]") * metres_of(
        container, key, spec.units, defined=None
    )
