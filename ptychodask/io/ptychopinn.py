"""PtychoPINN's NPZ: patterns `diff3d` or `diffraction`, positions `xcoords` and `ycoords` in object pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.io.source import (
    Container,
    Frames,
    IngestSpec,
    SourceScan,
    as_probe,
    as_vector,
    as_whole_numbers,
    frame_axes,
    pattern_axis_is_last,
    require_keys,
)
from ptychodask.scan import Domain, PtychodaskError

logger = logging.getLogger(__name__)

OPTIONS = ("domain", "axes")

_PATTERNS = ("diff3d", "diffraction")
_GROUPED = ("X_full", "coords_offsets", "coords_relative", "nn_indices")


def recognises(keys: Sequence[str]) -> bool:
    """Whether a file with these keys is of this format."""
    return any(key in keys for key in (*_PATTERNS, "X_full"))


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read a file by PtychoPINN's data contract.

    Notes
    -----
    The contract (PtychoPINN, docs/data_contracts.md) has amplitudes in float32; files with integers hold counts or
    rounded amplitudes, so their unit is asked for. Pixels are (x, y) = (column, row). Truth and probe share the units
    of the patterns.
    """
    label, found = container.label, container.keys()
    patterns = next((key for key in _PATTERNS if key in found), None)
    _refuse_groups(container, patterns)
    require_keys(container, [patterns or _PATTERNS[0], "xcoords", "ycoords"])
    patterns = patterns or _PATTERNS[0]
    y, x = (as_vector(container.array(key), f"{label}[{key}]") for key in ("ycoords", "xcoords"))
    if len(y) != len(x):
        raise PtychodaskError(f"{label}: {len(y)} ycoords but {len(x)} xcoords, expected as many of both")
    position_yx = np.stack([y, x], axis=1)
    axes = frame_axes(container.shape(patterns))
    last = pattern_axis_is_last(axes, len(position_yx), spec.axes, f"{label}[{patterns}]")
    frames = container.frames(patterns, pattern_last=last)
    if "_metadata" in found:
        logger.info("%s: left out _metadata, which is read by unpickling", label)
    return SourceScan(
        frames=frames,
        position_yx=position_yx,
        unit="px",
        domain=_domain(frames.dtype, spec, f"{label}[{patterns}]"),
        dc="centre",
        calibration="as_given",
        probe=as_probe(container.array("probeGuess"), f"{label}[probeGuess]") if "probeGuess" in found else None,
        object=_object(container) if "objectGuess" in found else None,
        label=_labels(container, frames, last) if "Y" in found else None,
        scan_index=as_whole_numbers(container.array("scan_index"), label) if "scan_index" in found else None,
    )


def _refuse_groups(container: Container, patterns: str | None) -> None:
    shape = frame_axes(container.shape(patterns)) if patterns else ()
    grouped = next((key for key in _GROUPED if key in container.keys()), None)  # noqa: SIM118
    if len(shape) == 4 or (patterns is None and grouped):
        what = f"{patterns} has shape {shape}" if patterns else f"key {grouped!r} is there"
        raise PtychodaskError(
            f"{container.label}: its patterns are grouped already ({what}); ingest the scan that it was made from "
            "(diff3d (pattern, N, N), xcoords, ycoords): groups are made by 'ptychodask group'"
        )


def _domain(dtype: np.dtype[Any], spec: IngestSpec, label: str) -> Domain:
    if spec.domain is not None:
        return spec.domain
    if dtype.kind == "f":
        return "amplitude"
    raise PtychodaskError(
        f"{label}: patterns are {dtype}, which the format leaves open; "
        "pass domain='counts' or domain='amplitude' (--domain)"
    )


def _object(container: Container) -> NDArray[np.complex64] | None:
    values = np.squeeze(container.array("objectGuess"))
    if values.ndim != 2 or not values.size or values.dtype.kind not in "cfiu":
        logger.info("%s: left out objectGuess of shape %s", container.label, values.shape)
        return None
    return values.astype(np.complex64)


def _labels(container: Container, frames: Frames, last: bool) -> Frames | None:
    shape = frame_axes(container.shape("Y"))
    pattern_last = last and shape != frames.shape
    if (shape if not pattern_last else (shape[-1], *shape[:-1])) != frames.shape:
        logger.info("%s: left out Y of shape %s, which is no label for each pattern", container.label, shape)
        return None
    return container.frames("Y", pattern_last=pattern_last)
