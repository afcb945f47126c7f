"""Ptychodus' products, and the dp/para pairs of pty-chi, fold_slice and PtychoViT: two files, one with the patterns.

Names and meanings: AdvancedPhotonSource/ptychodus, ``h5_product_file.py``, ``npz_product_file.py`` and ``api/io.py``;
AdvancedPhotonSource/pty-chi, ``tests/test_utils.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from ptychodask.scan import PtychodaskError

logger = logging.getLogger(__name__)

OPTIONS = ("diffraction",)

INDEX, X, Y = "probe_position_indexes", "probe_position_x_m", "probe_position_y_m"

PATTERNS, PATTERN_INDEX, BAD_PIXELS = "patterns", "indexes", "bad_pixels"
"""Keys of the patterns in Ptychodus' own file."""

DP = "dp"
"""Key of the patterns in a pair."""

STANDARD_PATTERNS = ("diffraction.h5", "patterns.h5", "diffraction.npz", "patterns.npz")
"""What Ptychodus calls the patterns' file when it hands a product over (``StandardFileLayout``)."""


def recognises(keys: Sequence[str]) -> bool:
    """Whether a file with these keys is of this format: of its positions, or of its patterns with their indexes."""
    return all(key in keys for key in (X, Y)) or all(key in keys for key in (PATTERNS, PATTERN_INDEX))


def _patterns_key(keys: Sequence[str]) -> str | None:
    return next((key for key in (PATTERNS, DP) if key in keys), None)


def companion(path: Path, keys: Sequence[str], spec: IngestSpec) -> Path:
    """The other file: of the patterns where this one has positions, of the positions where it has patterns.

    Raises
    ------
    PtychodaskError
        If it is neither named nor beside this one under a name that the format defines.
    """
    if X in keys:
        if spec.diffraction is not None:
            return Path(spec.diffraction)
        pair = path.with_name(path.name.replace("_para.", "_dp."))
        beside = [pair] if pair != path else [path.with_name(name) for name in STANDARD_PATTERNS]
        return _first_of(beside, path, "positions and probe", "pass diffraction= (--diffraction)")
    if spec.diffraction is not None:
        raise PtychodaskError(
            f"{path}: holds the patterns itself; ingest the file with the positions, or leave diffraction= out"
        )
    pair = path.with_name(path.name.replace("_dp.", "_para."))
    return _first_of(
        [pair] if pair != path else [], path, "patterns", "ingest the product, with diffraction= this file"
    )


def _first_of(candidates: Sequence[Path], path: Path, held: str, way_out: str) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = f" ({', '.join(candidate.name for candidate in candidates)} is not there)" if candidates else ""
    raise PtychodaskError(f"{path}: holds {held} only{looked}; {way_out}")


def read_pair(one: Container, other: Container, spec: IngestSpec) -> SourceScan:
    """Read positions and probe from one file, and patterns from the other, whichever is which.

    Notes
    -----
    Positions are metres, x along columns and y along rows; patterns are counts with the direct beam in the middle.
    Where the patterns have indexes, each goes to the position of the same index. The object of a product is another
    program's reconstruction, which is no truth: `compare` takes the product beside a result.

    Raises
    ------
    PtychodaskError
        If one of them has no positions or no patterns, indexes repeat or do not meet, pixels are not square, or a
        number cannot be what it is said to be.
    """
    product, patterns = (one, other) if one.has(X) else (other, one)
    require_keys(product, [X, Y])
    key = _patterns_key(patterns.keys())
    if key is None:
        raise PtychodaskError(
            f"{patterns.label}: holds neither {PATTERNS!r} nor {DP!r}; keys found: {listed_keys(patterns.keys())}; "
            "pass the file with the patterns as diffraction= (--diffraction)"
        )
    frames = patterns.frames(key)
    y, x = (as_vector(product.array(name), f"{product.label}[{name}]") for name in (Y, X))
    if len(y) != len(x):
        raise PtychodaskError(
            f"{product.label}: {len(y)} positions y but {len(x)} positions x, expected as many of both"
        )
    position_yx_m, rows = _paired(product, patterns, np.stack([y, x], axis=1), frames.shape[0])
    pixel_m = _pixel_m(product)
    if product.has("object"):
        logger.info("%s: left out its object, a reconstruction; compare takes the product itself", product.label)
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
    """Positions (frame, 2) in the order of the patterns, NaN where a frame has none, and the rows that have one."""
    if not patterns.has(PATTERN_INDEX):
        return position, None
    if not product.has(INDEX):
        raise missing_key(product, INDEX)
    of_position = _unique(product, INDEX, len(position), "positions")
    of_pattern = _unique(patterns, PATTERN_INDEX, n_frames, "patterns")
    _, in_frames, in_positions = np.intersect1d(of_pattern, of_position, assume_unique=True, return_indices=True)
    if not len(in_frames):
        raise PtychodaskError(
            f"{patterns.label}: its indexes {of_pattern.min()}..{of_pattern.max()} share none with those of "
            f"{product.label}, {of_position.min()}..{of_position.max()}; expected the patterns of that product"
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
    placed = np.full((n_frames, 2), np.nan)
    placed[in_frames] = position[in_positions]
    return placed, np.sort(in_frames)


def _unique(container: Container, key: str, length: int, of_what: str) -> NDArray[np.int64]:
    """Indexes, one for each; those that come twice are named."""
    label = f"{container.label}[{key}]"
    index = as_whole_numbers(container.array(key), label)
    if len(index) != length:
        raise PtychodaskError(f"{label}: {len(index)} indexes but {length} {of_what}, expected one for each")
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1]
        raise PtychodaskError(
            f"{label}: {len(twice)} indexes come more than once, {', '.join(map(str, twice[:5].tolist()))} among them; "
            f"expected one for each of the {of_what}: average or drop them in the file"
        )
    return index


def _probe(product: Container) -> NDArray[np.complex64] | None:
    """Modes (mode, h, w) of the first of the probes (opr, mode, h, w)."""
    if not product.has("probe"):
        return None
    values = product.array("probe")
    if values.ndim == 4:
        if len(values) > 1:
            logger.info("%s: took the first of %d orthogonal probe relaxations", product.label, len(values))
        values = values[0] if len(values) else values
    return as_probe(values, f"{product.label}[probe]")


def _number(product: Container, name: str, beside: str = "") -> float | None:
    """A number of a product: an attribute of an array or of the file in HDF5, a key in an NPZ; None where unknown."""
    key = f"{beside}_{name}" if beside else name
    if product.has(key):
        values: Any = product.array(key)
        value = float(values.item()) if values.size == 1 and values.dtype.kind in "iuf" else None
    else:
        value = product.numbers(beside).get(name)
    # Ptychodus writes 0 for what it does not know.
    return value if value is not None and np.isfinite(value) and value > 0 else None


def _optics(product: Container) -> dict[str, float]:
    found = {}
    names: tuple[tuple[Optic, tuple[str, ...]], ...] = (
        (ENERGY, ("photon_energy_eV", "probe_energy_eV")),
        (DISTANCE, ("detector_object_distance_m",)),
    )
    for what, keys in names:
        value = next((value for key in keys if (value := _number(product, key)) is not None), None)
        if value is None:
            continue
        if not what.low <= value <= what.high:
            raise PtychodaskError(
                f"{product.label}: {keys[-1]} is {value:.6g}, which is no {what.name}; {what.way_out}"
            )
        found[what.option] = value
    return found


def _detector_pixel(patterns: Container, key: str) -> dict[str, float]:
    value = patterns.numbers(key).get("detector_pixel_width_m")
    return {} if value is None or not value > 0 else {"detector_pixel_m": value}


def _pixel_m(product: Container) -> float | None:
    """Size of an object pixel, as the probe's or else the object's; square."""
    for beside in ("probe", "object"):
        width, height = (_number(product, f"pixel_{side}_m", beside) for side in ("width", "height"))
        if width is None and height is None:
            continue
        if width is None or height is None or abs(width / height - 1) > SQUARENESS:
            raise PtychodaskError(
                f"{product.label}[{beside}]: pixels of {height or 0:g} x {width or 0:g} m, expected square ones; "
                "bring them to one size, or pass pixel_size_m= (--pixel-size-m)"
            )
        return width
    return None
