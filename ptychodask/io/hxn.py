"""Reader of processed scans of NSLS-II's HXN beamline.

Amplitudes with the direct beam at the corner, positions in micrometres. Keys and their meaning:
AdvancedPhotonSource/ptychodus, ``nsls2_product_file.py``, and NSLS2/ptycho_gui.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptychodask.errors import PtychodaskError
from ptychodask.io.quantities import DETECTOR_PIXEL, DISTANCE, WAVELENGTH, read_optics
from ptychodask.io.source import Container, IngestSpec, SourceScan, apply_flips, require_keys

OPTIONS = ("flip_y", "flip_x", "swap_xy")

OPTICS = (
    (WAVELENGTH, ("lambda_nm",), "nm"),
    (DISTANCE, ("z_m",), "m"),
    (DETECTOR_PIXEL, ("ccd_pixel_um",), "um"),
)
"""Numbers of the instrument, their keys, and the unit in the key."""


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format."""
    return all(key in keys for key in ("diffamp", "points"))


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read patterns (amplitudes), positions and optics.

    ``points`` is (2, pattern), x and y.
    """
    require_keys(container, ("diffamp", "points"))
    points = container.array("points")
    if points.ndim != 2 or len(points) != 2 or points.dtype.kind not in "iuf":
        raise PtychodaskError(
            f"{container.label}[points]: has shape {points.shape} and type {points.dtype}, "
            "expected numbers (2, pattern), x and y; transpose it in the file"
        )
    return SourceScan(
        frames=container.frames("diffamp"),
        position_yx=apply_flips(points[::-1].T.astype("f8"), spec),
        unit="um",
        domain="amplitude",
        dc="corner",
        calibration="mean_counts",
        optics=read_optics(container, spec, OPTICS),
    )
