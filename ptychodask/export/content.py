"""Input of the format writers: object (read by rows), scan and optics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.geometry import HC_EV_M
from ptychodask.progress import Progress
from ptychodask.result import VARIABLES
from ptychodask.scan import PatternSource, Scan
from ptychodask.store import StoredPatterns

ROWS = 256
"""Rows of an object that are read at a time, if it is not chunked."""

PATTERN_BYTES = 32 * 1024 * 1024
"""Bytes of patterns, as float32, that are read at a time."""

UNSEEN = 0
"""Value of unseen pixels in the formats of reconstruction programs, which cannot handle NaN."""


@dataclass(frozen=True, eq=False)
class Picture:
    """Object of one method with a margin around it.

    It is in memory, on disk or not yet computed, like the result.
    """

    ds: xr.Dataset
    """Data variables of a result (y, x), ``object`` among them; consecutive pixels."""

    margin: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    """Unseen pixels added before and after the object, along y and along x."""

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels (y, x), including the margin."""
        return self.ds.sizes["y"] + sum(self.margin[0]), self.ds.sizes["x"] + sum(self.margin[1])

    @property
    def corner_yx_px(self) -> tuple[float, float]:
        """Scan coordinates (y, x) of pixel [0, 0]."""
        return float(self.ds["y"][0]) - self.margin[0][0], float(self.ds["x"][0]) - self.margin[1][0]

    @property
    def middle_yx_px(self) -> tuple[float, float]:
        """Scan coordinates (y, x) of the middle of the array.

        It is the corner plus half the size, the origin of programs that count from the middle. A patch of N pixels at
        position p begins at pixel p − N/2 − corner, which is p − middle + (size − N)/2.
        """
        (y, x), (height, width) = self.corner_yx_px, self.shape
        return y + height / 2, x + width / 2

    def covering(self, scan: Scan) -> Picture:
        """Picture extended by a margin to contain every patch of a scan.

        A patch at a fractional position touches N + 1 pixels. The object may be smaller than the scan: it may be a
        region of interest, or cropped where its patches have no illumination.
        """
        first = np.floor(scan.position_yx_px.min(axis=0) - scan.n_pixels / 2)
        last = np.floor(scan.position_yx_px.max(axis=0) - scan.n_pixels / 2) + scan.n_pixels
        before = np.maximum(np.array(self.corner_yx_px) - first, 0).astype(int)
        after = np.maximum(last - (np.array(self.corner_yx_px) + self.shape - 1), 0).astype(int)
        (top, left), (bottom, right) = before.tolist(), after.tolist()
        return Picture(self.ds, ((top, bottom), (left, right)))

    def rows(
        self, bar: Progress, names: Sequence[str] = ("object",), multiple: int = 1
    ) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
        """Rows from top to bottom, one block in memory at a time.

        Parameters
        ----------
        bar : Progress
            Advances by the rows that were used.
        names : sequence of str
            Data variables to read.
        multiple : int
            Without a margin, each block begins at a multiple of this number of rows.

        Yields
        ------
        rows : slice
        arrays : dict of name to array (rows, x)
            As stored: unseen pixels, including the margin, are NaN in float or complex arrays.
        """
        (top, _), (left, _) = self.margin
        (height, width), (inner, inner_width) = self.shape, (self.ds.sizes["y"], self.ds.sizes["x"])
        chunks = self.ds["object"].chunks
        step = -(-(chunks[0][0] if chunks else ROWS) // multiple) * multiple
        bottom = top + inner
        starts = [*range(0, top, step), *range(top, bottom, step), *range(bottom, height, step)]
        wanted = self.ds[list(names)]
        for start, stop in pairwise([*starts, height]):
            read = wanted.isel(y=slice(start - top, stop - top)) if top <= start < bottom else None
            block = None if read is None else read.ptycho.compute()
            arrays = {}
            for name in names:
                arrays[name] = np.full(
                    (stop - start, width), VARIABLES[name].fill if name in VARIABLES else 0, self.ds[name].dtype
                )
                if block is not None:
                    arrays[name][:, left : left + inner_width] = block[name].values
            yield slice(start, stop), arrays
            bar.advance(stop - start)

    def seen_rows(self, bar: Progress) -> Iterator[tuple[slice, NDArray[np.complex64], NDArray[np.bool_]]]:
        """Rows of the object, `UNSEEN` for NaN, and mask of seen pixels."""
        for rows, arrays in self.rows(bar):
            object_ = arrays["object"]
            seen = np.isfinite(object_)
            yield rows, np.where(seen, object_, np.complex64(UNSEEN)), seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """Data to write into one file.

    A writer uses the fields that its format supports."""

    name: str
    """Sample name, for formats that have one."""

    picture: Picture | None = None
    """Object of a result."""

    scan: Scan | None = None
    """Scan: positions, probe and, if the scan itself is exported, patterns."""

    pixel_size_m: float | None = None
    """Size of an object pixel, metres."""

    energy_ev: float | None = None
    """Photon energy, electronvolts."""

    distance_m: float | None = None
    """Sample to detector, metres."""

    @property
    def object(self) -> Picture:
        """Object, for formats that need it; `export` has checked that it exists."""
        assert self.picture is not None
        return self.picture

    @property
    def measured(self) -> Scan:
        """Scan, for formats that need it; `export` has checked that it exists."""
        assert self.scan is not None
        return self.scan

    def known(self, name: str) -> float:
        """Required optical quantity; `export` has checked that it exists."""
        value = getattr(self, name)
        assert value is not None
        return float(value)

    @property
    def position_xy_m(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions x and y of the patterns, metres, float64 (pattern,) each."""
        position_m = self.measured.position_yx_px * self.known("pixel_size_m")
        return np.ascontiguousarray(position_m[:, 1]), np.ascontiguousarray(position_m[:, 0])

    @property
    def detector_pixel_m(self) -> float:
        """Pixel size of the patterns, metres.

        It follows from the object pixel size, λz over the extent of a pattern.
        """
        extent_m = self.measured.n_pixels * self.known("pixel_size_m")
        return HC_EV_M / self.known("energy_ev") * self.known("distance_m") / extent_m

    @property
    def frame(self) -> NDArray[np.int64]:
        """Row of each pattern in its source file, int64 (pattern,)."""
        source = self.measured.source_index
        return np.arange(self.measured.n_patterns) if source is None else source

    @property
    def middle_xy_m(self) -> tuple[float, float]:
        """`Picture.middle_yx_px` as (x, y), metres."""
        y_px, x_px = self.object.middle_yx_px
        return x_px * self.known("pixel_size_m"), y_px * self.known("pixel_size_m")


class ChosenPatterns:
    """Some of the patterns of a source, read when they are needed.

    Parameters
    ----------
    source : PatternSource
    index : int64 array (k,)
        Their indices, ascending.
    """

    def __init__(self, source: PatternSource, index: NDArray[np.int64]) -> None:
        self._source, self._index = source, index

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._index), *self._source.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._source.dtype

    def __getitem__(self, index: Any, /) -> NDArray[Any]:
        return self._source[self._index[index]]


def part_of(scan: Scan, index: NDArray[np.int64]) -> Scan:
    """Scan of some of its patterns, which stay where they are.

    Parameters
    ----------
    scan : Scan
    index : int64 array (k,)
        Their indices, ascending.
    """
    if len(index) == scan.n_patterns:
        return scan
    columns: dict[str, Any] = {name: getattr(scan, name) for name in ("flux", "scan_index", "source_index")}
    chosen: dict[str, Any] = {name: None if values is None else values[index] for name, values in columns.items()}
    label = None if scan.label is None else ChosenPatterns(scan.label, index)
    return replace(
        scan,
        diffraction=ChosenPatterns(scan.diffraction, index),
        position_yx_px=scan.position_yx_px[index],
        label=label,
        **chosen,
    )


def pattern_rows(scan: Scan, bar: Progress) -> Iterator[slice]:
    """Consecutive slices over a scan's patterns.

    Each is a whole number of stored chunks, of about `PATTERN_BYTES`.
    """
    per_chunk = scan.diffraction.chunk_patterns if isinstance(scan.diffraction, StoredPatterns) else 1
    step = max(1, PATTERN_BYTES // (scan.n_pixels**2 * 4) // per_chunk) * per_chunk
    for start in range(0, scan.n_patterns, step):
        rows = slice(start, min(start + step, scan.n_patterns))
        yield rows
        bar.advance(rows.stop - rows.start)


def counts(scan: Scan, rows: slice) -> NDArray[Any]:
    """Counts of some patterns (k, N, N).

    As stored, or the squares of stored amplitudes as float32.
    """
    if scan.domain == "counts":
        return np.asarray(scan.diffraction[rows])
    return np.square(scan.diffraction[rows], dtype=np.float32)


def counts_dtype(scan: Scan) -> np.dtype[Any]:
    """Data type of the arrays from `counts`."""
    return scan.diffraction.dtype if scan.domain == "counts" else np.dtype(np.float32)


def check_object(ds: xr.Dataset, network: str | None) -> xr.Dataset:
    """Result of one network, with its object checked.

    Raises
    ------
    PtychodaskError
        If the network does not exist, or there is no object (y, x) of consecutive pixels.
    """
    if "network" in ds.dims:
        networks = [str(label) for label in ds["network"].values]
        if network not in networks:
            problem = "none was chosen" if network is None else f"not {network!r}"
            raise PtychodaskError(
                f"export: the result has the networks {', '.join(networks)}, but {problem}; pass network= (--network)"
            )
        ds = ds.sel(network=network)
    elif network is not None:
        raise PtychodaskError(f"export: the result has only one network; leave out network={network!r}")
    if "object" not in ds or ds["object"].dims != ("y", "x"):
        raise PtychodaskError("export: the Dataset has no object (y, x); pass a result of reconstruct")
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(
                f"export: pixels along {dim} are not consecutive, expected steps of 1; export the complete result"
            )
    return ds
