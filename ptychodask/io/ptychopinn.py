"""Reader of PtychoPINN's NPZ files.

Patterns `diff3d` or `diffraction`, positions `xcoords` and `ycoords` in object pixels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from math import prod
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.labels import labels_of
from ptychodask.io.source import (
    Axes,
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
from ptychodask.scan import Domain

logger = logging.getLogger(__name__)

OPTIONS = ("domain", "axes")

METADATA_BYTES = 2**20
"""Largest accepted text of ``_metadata``, which becomes an attribute of the store."""

_PATTERNS = ("diff3d", "diffraction")
_GROUPED = ("X_full", "coords_offsets", "coords_relative", "nn_indices")


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format."""
    return any(key in keys for key in (*_PATTERNS, "X_full"))


def read(container: Container, spec: IngestSpec) -> SourceScan:
    """Read a file that follows PtychoPINN's data contract.

    Notes
    -----
    By the contract (PtychoPINN, docs/data_contracts.md) patterns are amplitudes in float32; files with integers contain
    counts or rounded amplitudes, so `domain` is required. Pixels are (x, y) = (column, row). Truth and probe have the
    unit of the patterns.
    """
    label, keys = container.label, container.keys()
    patterns = next((key for key in _PATTERNS if key in keys), None)
    _refuse_groups(container, patterns)
    require_keys(container, [patterns or _PATTERNS[0], "xcoords", "ycoords"])
    patterns = patterns or _PATTERNS[0]
    y, x = (as_vector(container.array(key), f"{label}[{key}]") for key in ("ycoords", "xcoords"))
    if len(y) != len(x):
        raise PtychodaskError(f"{label}: {len(y)} ycoords but {len(x)} xcoords, expected equal numbers")
    position_yx = np.stack([y, x], axis=1)
    axes = frame_axes(container.shape(patterns))
    metadata = _metadata(container)
    noted = metadata.get("axes")
    order = spec.axes or (noted if noted in get_args(Axes) else None)
    last = pattern_axis_is_last(axes, len(position_yx), order, f"{label}[{patterns}]")
    frames = container.frames(patterns, pattern_last=last)
    return SourceScan(
        frames=frames,
        position_yx=position_yx,
        unit="px",
        domain=_domain(frames.dtype, spec, f"{label}[{patterns}]"),
        dc="centre",
        calibration="as_given",
        probe=as_probe(container.array("probeGuess"), f"{label}[probeGuess]") if "probeGuess" in keys else None,
        object=_object(container) if "objectGuess" in keys else None,
        label=_labels(container, frames, last),
        scan_index=as_whole_numbers(container.array("scan_index"), label) if "scan_index" in keys else None,
        metadata=metadata,
    )


def _metadata(container: Container) -> dict[str, Any]:
    """Content of ``_metadata``, a JSON text; empty without it."""
    if "_metadata" not in container.keys():  # noqa: SIM118
        return {}
    label = f"{container.label}[_metadata]"
    if container.dtype("_metadata").hasobject:
        logger.warning("%s: is left out, since it can only be read by unpickling; store it as text", label)
        return {}
    n_bytes = prod(container.shape("_metadata")) * container.dtype("_metadata").itemsize
    try:
        text = np.atleast_1d(container.array("_metadata")).ravel() if n_bytes <= METADATA_BYTES else np.empty(0)
        # NaN and Infinity are no JSON, and would make the attributes of the store unreadable to other programs.
        content = json.loads(text[0].decode() if isinstance(text[0], bytes) else str(text[0]), parse_constant=str)
    except (ValueError, IndexError, RecursionError):
        content = None
    if not isinstance(content, dict):
        logger.warning("%s: is left out, expected one JSON object as text of at most %d bytes", label, METADATA_BYTES)
        return {}
    return content


def _refuse_groups(container: Container, patterns: str | None) -> None:
    shape = frame_axes(container.shape(patterns)) if patterns else ()
    grouped = next((key for key in _GROUPED if key in container.keys()), None)  # noqa: SIM118
    if len(shape) == 4 or (patterns is None and grouped):
        evidence = f"{patterns} has shape {shape}" if patterns else f"it has the key {grouped!r}"
        raise PtychodaskError(
            f"{container.label}: its patterns are already grouped ({evidence}); ingest the ungrouped scan "
            "(diff3d (pattern, N, N), xcoords, ycoords) and group it with 'ptychodask group'"
        )


def _domain(dtype: np.dtype[Any], spec: IngestSpec, label: str) -> Domain:
    if spec.domain is not None:
        return spec.domain
    if dtype.kind == "f":
        return "amplitude"
    raise PtychodaskError(
        f"{label}: patterns are {dtype}, which may be counts or amplitudes; "
        "pass domain='counts' or domain='amplitude' (--domain)"
    )


def _object(container: Container) -> NDArray[np.complex64] | None:
    values = np.squeeze(container.array("objectGuess"))
    if values.ndim != 2 or not values.size or values.dtype.kind not in "cfiu":
        logger.info("%s: ignored objectGuess of shape %s", container.label, values.shape)
        return None
    return values.astype(np.complex64)


def _labels(container: Container, frames: Frames, last: bool) -> Frames | None:
    if not container.has("Y"):
        if not (container.has("label_amp") and container.has("label_phase")):
            return None
        labels = labels_of(container, {name: name for name in ("label_amp", "label_phase")}, pattern_last=last)
        if labels is not None and labels.shape != frames.shape:
            logger.info("%s: ignored labels of shape %s, which are not one per pattern", container.label, labels.shape)
            return None
        return labels
    shape = frame_axes(container.shape("Y"))
    pattern_last = last and shape != frames.shape
    if (shape if not pattern_last else (shape[-1], *shape[:-1])) != frames.shape:
        logger.info("%s: ignored Y of shape %s, which is not one label per pattern", container.label, shape)
        return None
    return container.frames("Y", pattern_last=pattern_last)
