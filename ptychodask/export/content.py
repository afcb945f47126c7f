"""What the writers of formats get: an object that is read by rows, the scan it was made from, and their optics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.io.geometry import HC_EV_M
from ptychodask.progress import Progress
from ptychodask.result import VARIABLES
from ptychodask.scan import PtychodaskError, Scan
from ptychodask.store import StoredPatterns

ROWS = 256
"""Rows of an object that are read at a time, where its own chunks do not say how many."""

PATTERN_BYTES = 32 * 1024 * 1024
"""Bytes of patterns, as float32, that are read at a time."""

UNSEEN = 0
"""What stands for an unseen pixel in the formats of reconstruction programs, which take NaN for damage."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One method's object, as a result holds it (in memory, on disk or not yet computed), with a margin around it."""

    ds: xr.Dataset
    """Data variables of a result (y, x), ``object`` among them; consecutive pixels."""

    margin: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    """Unseen pixels before and after it along y, and along x."""

    @property
    def shape(self) -> tuple[int, int]:
        """Pixels (y, x), the margin included."""
        return self.ds.sizes["y"] + sum(self.margin[0]), self.ds.sizes["x"] + sum(self.margin[1])

    @property
    def corner_yx_px(self) -> tuple[float, float]:
        """Coordinates (y, x) of pixel [0, 0] in the scan's frame."""
        return float(self.ds["y"][0]) - self.margin[0][0], float(self.ds["x"][0]) - self.margin[1][0]

    @property
    def middle_yx_px(self) -> tuple[float, float]:
        """Where a program that counts from the middle of the array has its origin: corner plus half the size.

        A patch of N pixels at position p begins at pixel p − N/2 − corner, which is p − middle + (size − N)/2.
        """
        (y, x), (height, width) = self.corner_yx_px, self.shape
        return y + height / 2, x + width / 2

    def covering(self, scan: Scan) -> Picture:
        """The picture with the margin that it takes for every patch of a scan to lie inside.

        A patch that lies between pixels meets N + 1 of them. The object may be smaller: of a region of interest, or cut
        where its patches have no light.
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
        """Rows from top to bottom, a block of them in memory at a time.

        Parameters
        ----------
        bar : Progress
            Advances by the rows that were used.
        names : sequence of str
            Data variables that are read.
        multiple : int
            Where there is no margin, each block begins at a multiple of so many rows.

        Yields
        ------
        rows : slice
        arrays : dict of name to array (rows, x)
            As stored: unseen pixels, the margin among them, are NaN in what is float or complex.
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
                    (stop - start, width), VARIABLES[name][1] if name in VARIABLES else 0, self.ds[name].dtype
                )
                if block is not None:
                    arrays[name][:, left : left + inner_width] = block[name].values
            yield slice(start, stop), arrays
            bar.advance(stop - start)

    def seen_rows(self, bar: Progress) -> Iterator[tuple[slice, NDArray[np.complex64], NDArray[np.bool_]]]:
        """Rows of the object with `UNSEEN` in place of NaN, and where a pixel was seen."""
        for rows, arrays in self.rows(bar):
            object_ = arrays["object"]
            seen = np.isfinite(object_)
            yield rows, np.where(seen, object_, np.complex64(UNSEEN)), seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What one file is written from; a writer takes of it what its format has a place for."""

    name: str
    """What the sample is called in formats that have a name for it."""

    picture: Picture | None = None
    """The object, of a result."""

    scan: Scan | None = None
    """The scan: positions, probe and, where it is exported itself, patterns."""

    pixel_size_m: float | None = None
    """Size of an object pixel, metres."""

    energy_ev: float | None = None
    """Photon energy, electronvolts."""

    distance_m: float | None = None
    """Sample to detector, metres."""

    @property
    def object(self) -> Picture:
        """The object of a format that has one; `export` has seen that it is there."""
        assert self.picture is not None
        return self.picture

    @property
    def measured(self) -> Scan:
        """The scan of a format that needs one; `export` has seen that it is there."""
        assert self.scan is not None
        return self.scan

    def known(self, name: str) -> float:
        """An optical quantity that a format needs; `export` has seen that it is there."""
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
        """Size of a pixel of the patterns, metres: an object pixel is λz over the extent of a pattern."""
        extent_m = self.measured.n_pixels * self.known("pixel_size_m")
        return HC_EV_M / self.known("energy_ev") * self.known("distance_m") / extent_m

    @property
    def frame(self) -> NDArray[np.int64]:
        """Row of each pattern in the file that it was ingested from, int64 (pattern,)."""
        source = self.measured.source_index
        return np.arange(self.measured.n_patterns) if source is None else source

    @property
    def middle_xy_m(self) -> tuple[float, float]:
        """`Picture.middle_yx_px` as (x, y), metres."""
        y_px, x_px = self.object.middle_yx_px
        return x_px * self.known("pixel_size_m"), y_px * self.known("pixel_size_m")


def pattern_rows(scan: Scan, bar: Progress) -> Iterator[slice]:
    """Slices that cover a scan's patterns in order, each a whole number of stored chunks of about `PATTERN_BYTES`."""
    per_chunk = scan.diffraction.chunk_patterns if isinstance(scan.diffraction, StoredPatterns) else 1
    step = max(1, PATTERN_BYTES // (scan.n_pixels**2 * 4) // per_chunk) * per_chunk
    for start in range(0, scan.n_patterns, step):
        rows = slice(start, min(start + step, scan.n_patterns))
        yield rows
        bar.advance(rows.stop - rows.start)


def counts(scan: Scan, rows: slice) -> NDArray[Any]:
    """Counts of some patterns (k, N, N): as stored, or the squares of stored amplitudes as float32."""
    if scan.domain == "counts":
        return np.asarray(scan.diffraction[rows])
    return np.square(scan.diffraction[rows], dtype=np.float32)


def counts_dtype(scan: Scan) -> np.dtype[Any]:
    """Type of what `counts` gives."""
    return scan.diffraction.dtype if scan.domain == "counts" else np.dtype(np.float32)


def check_object(ds: xr.Dataset, method: str | None) -> xr.Dataset:
    """The result of one method; raises `PtychodaskError` unless there is an object (y, x) of consecutive pixels."""
    if "method" in ds.dims:
        methods = [str(label) for label in ds["method"].values]
        if method not in methods:
            found = "none is named" if method is None else f"{method!r} is none of them"
            raise PtychodaskError(
                f"export: the result has the methods {', '.join(methods)}, and {found}; pass method= (--method)"
            )
        ds = ds.sel({"method": method})
    elif method is not None:
        raise PtychodaskError(f"export: the result has one method alone; leave method={method!r} out")
    if "object" not in ds or ds["object"].dims != ("y", "x"):
        raise PtychodaskError("export: the Dataset has no object (y, x); pass a result of reconstruct")
    for dim in ("y", "x"):
        if ds.sizes[dim] == 0 or (np.diff(ds[dim]) != 1).any():
            raise PtychodaskError(
                f"export: pixels along {dim} are not consecutive, expected steps of 1; export the whole"
            )
    return ds
