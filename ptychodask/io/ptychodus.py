"""Reader of Ptychodus' products, and of dp/para pairs.

dp/para pairs are written by pty-chi, fold_slice and PtychoViT. Both formats have two files, one with the patterns. Keys
and their meaning: AdvancedPhotonSource/ptychodus, ``h5_product_file.py``, ``npz_product_file.py`` and ``api/io.py``;
AdvancedPhotonSource/pty-chi, ``tests/test_utils.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.quantities import DISTANCE, ENERGY, SQUARENESS, Optic
from ptychodask.io.source import (
    Container,
    IngestSpec,
    SourceScan,
    as_mask,
    as_probe,
    as_vector,
    as_whole_numbers,
    listed_keys,
    missing_key,
    require_keys,
)

logger = logging.getLogger(__name__)

OPTIONS = ("diffraction",)

INDEX, X, Y = "probe_position_indexes", "probe_position_x_m", "probe_position_y_m"

PATTERNS, PATTERN_INDEX, BAD_PIXELS = "patterns", "indexes", "bad_pixels"
"""Keys in Ptychodus' file of patterns."""

DP = "dp"
"""Key of the patterns in a pair."""

STANDARD_PATTERNS = ("diffraction.h5", "patterns.h5", "diffraction.npz", "patterns.npz")
"""Names of the file of patterns beside a product (Ptychodus' ``StandardFileLayout``)."""


def recognises(keys: Sequence[str]) -> bool:
    """True if a file with these keys is of this format.

    Either file: the one with the positions, or the one with the patterns and their indexes.
    """
    return all(key in keys for key in (X, Y)) or all(key in keys for key in (PATTERNS, PATTERN_INDEX))


def _patterns_key(keys: Sequence[str]) -> str | None:
    return next((key for key in (PATTERNS, DP) if key in keys), None)


def companion(path: Path, keys: Sequence[str], spec: IngestSpec) -> Path:
    """Path of the other file: with the patterns, or with the positions.

    Raises
    ------
    PtychodaskError
        If it is neither given nor in the same folder under a name that the format defines.
    """
    if X in keys:
        if spec.diffraction is not None:
            return Path(spec.diffraction)
        pair = path.with_name(path.name.replace("_para.", "_dp."))
        candidates = [pair] if pair != path else [path.with_name(name) for name in STANDARD_PATTERNS]
        remedy = "pass the file with the patterns as diffraction= (--diffraction)"
        return _first_existing(candidates, path, "positions and probe", remedy)
    if spec.diffraction is not None:
        raise PtychodaskError(
            f"{path}: contains the patterns; ingest the file with the positions, or leave diffraction= out"
        )
    pair = path.with_name(path.name.replace("_dp.", "_para."))
    remedy = "ingest the product, and pass this file as diffraction= (--diffraction)"
    return _first_existing([pair] if pair != path else [], path, "patterns", remedy)


def _first_existing(candidates: Sequence[Path], path: Path, content: str, remedy: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    missing = f", and there is no {' or '.join(candidate.name for candidate in candidates)}" if candidates else ""
    raise PtychodaskError(f"{path}: contains only {content}{missing}; {remedy}")


def read_pair(one: Container, other: Container, spec: IngestSpec) -> SourceScan:
    """Read positions and probe from one file, and patterns from the other.

    The files may be in either order.

    Raises
    ------
    PtychodaskError
        If positions or patterns are missing, indexes are repeated or do not match, pixels are not square, or a number
        is not plausible.

    Notes
    -----
    Positions are metres, x along columns and y along rows; patterns are counts with the direct beam in the middle.
    If the patterns have indexes, each is matched to the position with the same index. The object of a product is the
    reconstruction of another program and not the truth, so it is not read: pass the product to `compare` instead.
    """
    product, patterns = (one, other) if one.has(X) else (other, one)
    require_keys(product, [X, Y])
    key = _patterns_key(patterns.keys())
    if key is None:
        raise PtychodaskError(
            f"{patterns.label}: has neither {PATTERNS!r} nor {DP!r}; keys found: {listed_keys(patterns.keys())}; "
            "pass the file with the patterns as diffraction= (--diffraction)"
        )
    frames = patterns.frames(key)
    y, x = (as_vector(product.array(name), f"{product.label}[{name}]") for name in (Y, X))
    if len(y) != len(x):
        raise PtychodaskError(
            f"{product.label}: {len(y)} y positions but {len(x)} x positions, expected equal numbers; correct the file"
        )
    position_yx_m, rows = _paired(product, patterns, np.stack([y, x], axis=1), frames.shape[0])
    pixel_m = _pixel_m(product)
    if product.has("object"):
        logger.info("%s: ignored its object, a reconstruction; pass the product to compare", product.label)
    bad = patterns.array(BAD_PIXELS) if patterns.has(BAD_PIXELS) else None
    return SourceScan(
        frames=frames,
        position_yx=position_yx_m,
        unit="m",
        domain="counts",
        dc="centre",
        calibration="mean_counts",
        probe=_probe(product),
        mask=None if bad is None else ~as_mask(bad, f"{patterns.label}[{BAD_PIXELS}]"),
        rows=rows,
        optics=_optics(product) | _detector_pixel(patterns, key),
        pixel_size_m=pixel_m,
    )


def _paired(
    product: Container, patterns: Container, position: NDArray[np.float64], n_frames: int
) -> tuple[NDArray[np.float64], NDArray[np.int64] | None]:
    """Positions (frame, 2) in the order of the patterns, and their rows.

    Positions are NaN for frames without one; the rows are None if the patterns have no indexes.
    """
    if not patterns.has(PATTERN_INDEX):
        return position, None
    if not product.has(INDEX):
        raise missing_key(product, INDEX)
    of_position = _unique(product, INDEX, len(position), "positions")
    of_pattern = _unique(patterns, PATTERN_INDEX, n_frames, "patterns")
    _, in_frames, in_positions = np.intersect1d(of_pattern, of_position, assume_unique=True, return_indices=True)
    if not len(of_pattern) or not len(of_position):
        raise PtychodaskError(
            f"{patterns.label}: has {len(of_pattern)} patterns and {product.label} {len(of_position)} positions, "
            "expected one or more of each; pass the files of a finished scan"
        )
    if not len(in_frames):
        raise PtychodaskError(
            f"{patterns.label}: its indexes {of_pattern.min()}..{of_pattern.max()} match none of {product.label}, "
            f"which are {of_position.min()}..{of_position.max()}; pass the patterns of that product"
        )
    if len(in_frames) < n_frames or len(in_frames) < len(position):
        logger.warning(
            "%s: %d of %d patterns have no position and %d of %d positions no pattern; they are left out",
            patterns.label,
            n_frames - len(in_frames),
            n_frames,
            len(position) - len(in_frames),
            len(position),
        )
    position_of_frame = np.full((n_frames, 2), np.nan)
    position_of_frame[in_frames] = position[in_positions]
    return position_of_frame, np.sort(in_frames)


def _unique(container: Container, key: str, length: int, kind: str) -> NDArray[np.int64]:
    """Indexes of patterns or positions, which must be distinct."""
    label = f"{container.label}[{key}]"
    index = as_whole_numbers(container.array(key), label)
    if len(index) != length:
        raise PtychodaskError(f"{label}: {len(index)} indexes but {length} {kind}, expected one for each")
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any():
        repeated = values[counts > 1]
        raise PtychodaskError(
            f"{label}: {len(repeated)} indexes are repeated, for example "
            f"{', '.join(map(str, repeated[:5].tolist()))}; expected distinct indexes of the {kind}: average or "
            "drop the repeated ones in the file"
        )
    return index


def _probe(product: Container) -> NDArray[np.complex64] | None:
    """Modes (mode, h, w) of the first probe in the file."""
    if not product.has("probe"):
        return None
    values = product.array("probe")
    if values.ndim == 4:
        if len(values) > 1:
            logger.info("%s: used the first of %d probes (orthogonal probe relaxation)", product.label, len(values))
        values = values[0] if len(values) else values
    return as_probe(values, f"{product.label}[probe]")


def _number(product: Container, name: str, array: str = "") -> float | None:
    """Number of a product or an array in it; None if unknown.

    An attribute in HDF5, a key in an NPZ.
    """
    key = f"{array}_{name}" if array else name
    if product.has(key):
        values: Any = product.array(key)
        value = float(values.item()) if values.size == 1 and values.dtype.kind in "iuf" else None
    else:
        value = product.numbers(array).get(name)
    # Ptychodus writes 0 for an unknown number.
    return value if value is not None and np.isfinite(value) and value > 0 else None


def _optics(product: Container) -> dict[str, float]:
    optics = {}
    names: tuple[tuple[Optic, tuple[str, ...]], ...] = (
        (ENERGY, ("photon_energy_eV", "probe_energy_eV")),
        (DISTANCE, ("detector_object_distance_m",)),
    )
    for quantity, keys in names:
        value = next((value for key in keys if (value := _number(product, key)) is not None), None)
        if value is None:
            continue
        if not quantity.low <= value <= quantity.high:
            raise PtychodaskError(
                f"{product.label}: {keys[-1]} is {value:.6g}, expected a {quantity.expected}; {quantity.remedy}"
            )
        optics[quantity.option] = value
    return optics


def _detector_pixel(patterns: Container, key: str) -> dict[str, float]:
    value = patterns.numbers(key).get("detector_pixel_width_m")
    return {} if value is None or not value > 0 else {"detector_pixel_m": value}


def _pixel_m(product: Container) -> float | None:
    """Size of an object pixel in metres, from the probe or object."""
    for array in ("probe", "object"):
        width, height = (_number(product, f"pixel_{side}_m", array) for side in ("width", "height"))
        if width is None and height is None:
            continue
        if width is None or height is None or abs(width / height - 1) > SQUARENESS:
            raise PtychodaskError(
                f"{product.label}[{array}]: pixels of {height or 0:g} x {width or 0:g} m, expected square ones; "
                "resample the probe and the object to square pixels"
            )
        return width
    return None
