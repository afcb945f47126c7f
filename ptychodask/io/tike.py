"""Reader of the archives in tike's tests.

`data`, `scan` and `probe`, each with a leading axis of angles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import Container, IngestSpec, SourceScan, as_probe, frame_axes, require_keys

OPTIONS = ()

_KEYS = ("data", "scan", "probe")


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format."""
    return all(key in keys for key in _KEYS)


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read patterns, positions and probe of one angle.

    Notes
    -----
    Patterns are counts with the direct beam at [0, 0], positions (row, column) in object pixels. The probe is a first
    guess of arbitrary scale, so its calibration is "mean_counts".
    """
    require_keys(container, _KEYS)
    shape = container.shape("data")
    if len(frame_axes(shape)) != 3:
        raise PtychodaskError(
            f"{container.label}[data]: patterns have shape {shape}, expected one angle, (1, pattern, qy, qx); "
            "save each angle to a separate file"
        )
    scan = container.array("scan")
    position_yx = (scan[0] if scan.ndim == 3 and len(scan) == 1 else scan).astype(np.float64)
    return SourceScan(
        frames=container.frames("data"),
        position_yx=position_yx,
        unit="px",
        domain="counts",
        dc="corner",
        calibration="mean_counts",
        probe=as_probe(container.array("probe"), f"{container.label}[probe]"),
    )
