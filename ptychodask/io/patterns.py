"""Patterns and labels of a source, cropped, binned and checked."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.io.geometry import FrameGrid, as_stored, stored_dtype
from ptychodask.io.grid import GriddedSource
from ptychodask.io.near_field import check_far_field
from ptychodask.io.pixel_values import clipped, no_counts, refuse_no_counts
from ptychodask.io.raw import RawFrames, scratch_file, spill
from ptychodask.io.source import Frames, SourceScan
from ptychodask.scan import Domain, PatternSource


@dataclass(frozen=True)
class _Preparation:
    """Conversion of a block of frames to patterns as stored."""

    grid: FrameGrid
    domain: Domain
    dtype: np.dtype[Any]
    mask: NDArray[np.bool_] | None
    label: str
    floor: float | None
    keeps_saturated: bool

    def __call__(self, frames: NDArray[Any]) -> NDArray[Any]:
        frames = clipped(frames, self.floor)
        if not self.keeps_saturated and (flagged := no_counts(frames)).any():
            touched = self.grid.touched(flagged)
            refuse_no_counts(touched if self.mask is None else touched & self.mask, frames, self.label)
            frames = np.where(flagged, np.zeros((), frames.dtype), frames)
        return as_stored(self.grid.patterns(frames, self.domain), self.dtype, self.mask, self.label)


@dataclass(frozen=True)
class _Prepared:
    """Kept frames of a file, converted to patterns as they are read."""

    frames: Frames
    kept: NDArray[np.int64]
    prepare: _Preparation

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.kept), self.prepare.grid.n_pixels, self.prepare.grid.n_pixels

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.prepare.dtype

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        return self.prepare(self.frames[self.kept[index]])


def prepared(file_scan: SourceScan, gridded: GriddedSource, label: str) -> _Prepared:
    """Kept frames of a file as patterns, converted when they are read.

    Parameters
    ----------
    file_scan : SourceScan
        Content of the file.
    gridded : GriddedSource
        Its geometry, from `on_grid`.
    label : str
        Name of the file, for messages.
    """
    dtype = stored_dtype(file_scan.frames.dtype, file_scan.domain, gridded.grid.bin)
    preparation = _Preparation(
        gridded.grid,
        file_scan.domain,
        dtype,
        gridded.mask,
        label,
        floor=gridded.spec.floor,
        keeps_saturated=gridded.spec.saturated == "keep",
    )
    return _Prepared(file_scan.frames, gridded.kept, preparation)


@dataclass(frozen=True)
class _Labels:
    """Supervised labels of the kept frames of a file, as complex64."""

    frames: Frames
    kept: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.kept), *self.frames.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.complex64)

    def __getitem__(self, index: Any, /) -> NDArray[np.complex64]:
        return self.frames[self.kept[index]].astype(np.complex64)


def pattern_parts(
    file_scan: SourceScan, gridded: GriddedSource, label: str, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """Keyword arguments of `write_scan` and `append_segment` with values per pattern."""
    kept = gridded.kept
    diffraction = _random_access(prepared(file_scan, gridded, label), scratch, stack, progress)
    if not gridded.spec.far_field:
        check_far_field(diffraction, gridded.position_yx_px, gridded.grid.n_pixels, file_scan.domain, label)
    return {
        "diffraction": diffraction,
        "position_yx_px": gridded.position_yx_px,
        "flux": None if file_scan.flux is None else file_scan.flux[kept],
        "scan_index": None if file_scan.scan_index is None else file_scan.scan_index[kept],
        "source_index": kept,
        "label": None if file_scan.label is None else _labels(file_scan.label, kept, scratch, stack, progress, label),
    }


def _random_access(patterns: _Prepared, scratch: Path, stack: ExitStack, progress: bool | None) -> PatternSource:
    """Patterns readable in any order, from a scratch file if necessary."""
    if patterns.frames.random_access:
        return patterns
    label, n_bytes = patterns.prepare.label, prod(patterns.shape) * patterns.dtype.itemsize
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{label}: unpacking"))
    spill(patterns.frames, patterns.kept, patterns.prepare, file, folder=scratch, progress=progress)
    return RawFrames(file, 0, patterns.shape, patterns.dtype, label=label)


def _labels(
    frames: Frames, kept: NDArray[np.int64], scratch: Path, stack: ExitStack, progress: bool | None, label: str
) -> PatternSource:
    if frames.random_access:
        return _Labels(frames, kept)
    n_bytes = len(kept) * frames.shape[1] * frames.shape[2] * 8
    file = stack.enter_context(scratch_file(scratch, n_bytes, f"{label}: unpacking labels"))
    spill(frames, kept, lambda block: block.astype(np.complex64), file, folder=scratch, progress=progress)
    return RawFrames(file, 0, (len(kept), *frames.shape[1:]), np.dtype(np.complex64), label=label)
