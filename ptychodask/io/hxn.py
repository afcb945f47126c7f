"""Processed scans of NSLS-II's HXN beamline: amplitudes with the direct beam at the corner, positions in micrometres.

Names and meanings: AdvancedPhotonSource/ptychodus, ``nsls2_product_file.py``, and NSLS2/ptycho_gui.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptychodask.io.quantities import DETECTOR_PIXEL, DISTANCE, WAVELENGTH, read_optics
from ptychodask.io.source import Container, IngestSpec, SourceScan, require_keys, turned
from ptychodask.scan import PtychodaskError

OPTIONS = ("flip_y", "flip_x", "swap_xy")

OPTICS = (
    (WAVELENGTH, ("lambda_nm",), "nm"),
    (DISTANCE, ("z_m",), "m"),
    (DETECTOR_PIXEL, ("ccd_pixel_um",), "um"),
)
"""What a file may hold, and the unit that its key names."""


def recognises(keys: Sequence[str]) -> bool:
    """Whether a file with these keys is of this format."""
    return all(key in keys for key in ("diffamp", "points"))


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read patterns (amplitudes), positions and optics; ``points`` is (2, pattern), x and y."""
    require_keys(container, ("diffamp", "points"))
    points = container.array("points")
    if points.ndim != 2 or len(points) != 2 or points.dtype.kind not in "iuf":
        raise PtychodaskError(
            f"{container.label}[points]: has shape {points.shape} and type {points.dtype}, "
            "expected (2, pattern), x and y; turn it in the file"
        )
    return SourceScan(
        frames=container.frames("diffamp"),
        position_yx=turned(points[::-1].T.astype("f8"), spec),
        unit="um",
        domain="amplitude",
        dc="corner",
        calibration="mean_counts",
        optics=read_optics(container, spec, OPTICS),
    )
