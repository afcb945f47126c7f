"""Live picture: a coarse object that fills in during a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.html import grey_png
from ptychodask.plan import Plan
from ptychodask.plan.spec import Live
from ptychodask.progress import in_notebook
from ptychodask.result import Layers
from ptychodask.storage.atomic import atomic_file

logger = logging.getLogger(__name__)

ACROSS_PX = 512
"""Largest number of pixels across the picture."""

REFRESH_S = 0.5
"""Shortest time between two pictures; only the last may come sooner."""

WIDTH_PX = 512
"""Screen pixels of a picture's longer side in a notebook."""


@dataclass(frozen=True, eq=False)
class CoarsePart:
    """Part of the object, reduced to means over cells of pixels."""

    start_yx: tuple[int, int]
    """Row and column of its first cell in the picture."""

    object: NDArray[np.complex64]
    """Mean over the pixels of a cell that patches cover (..., y, x); NaN if none is covered."""

    amplitude: NDArray[np.float32]
    """Mean of the modulus of the same pixels (..., y, x)."""


def coarse_part(object: NDArray[np.complex64], start_yx: tuple[int, int], step: int) -> CoarsePart:
    """Reduce a part of the object to means over cells.

    The cells form a grid that begins at the object's first pixel.

    Parameters
    ----------
    object : complex64 array (..., y, x)
        NaN where no patch contributes.
    start_yx : (int, int)
        Row and column of its first pixel in the complete object.
    step : int
        Pixels across a cell.

    Returns
    -------
    CoarsePart
        Cells that it covers in part are means over that part.

    Examples
    --------
    >>> coarse_part(np.array([[1, 3j], [np.nan, np.nan]], np.complex64), (0, 2), 2).amplitude.tolist()
    [[2.0]]
    """
    cells = [(start + np.arange(size)) // step for start, size in zip(start_yx, object.shape[-2:], strict=True)]
    rows, columns = (np.flatnonzero(np.diff(cell, prepend=-1)) for cell in cells)

    def summed(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.add.reduceat(np.add.reduceat(values, rows, axis=-2), columns, axis=-1))

    seen = np.isfinite(object)
    n_seen = summed(seen.astype(np.int64))
    filled = np.where(seen, object, 0)
    with np.errstate(invalid="ignore"):
        # 0/0 is the NaN of a cell that no patch covers.
        means = summed(filled) / n_seen, summed(np.abs(filled)) / n_seen
    start = int(cells[0][0]), int(cells[1][0])
    return CoarsePart(start, means[0].astype(np.complex64), means[1].astype(np.float32))


def cell_size(shape: tuple[int, int]) -> int:
    """Pixels across a cell of the picture, for an object (y, x).

    The smallest power of two (as tiles are) that keeps the picture within `ACROSS_PX`.

    Examples
    --------
    >>> cell_size((512, 40)), cell_size((513, 40)), cell_size((40, 5000))
    (1, 2, 16)
    """
    step = 1
    while -(-max(shape) // step) > ACROSS_PX:
        step *= 2
    return step


class Screen:
    """Output of pictures, at most one each `REFRESH_S`.

    Parameters
    ----------
    live : True, path of a PNG, or callable that takes a Dataset
        True shows them in the notebook that this process serves.

    Raises
    ------
    PtychodaskError
        If this is no notebook, or the path is not that of a PNG in an existing folder.

    Notes
    -----
    An error while a picture is shown is logged as a warning, and the run continues without pictures.
    """

    def __init__(self, live: Live) -> None:
        self._show: Callable[[xr.Dataset], Any] | None = _display_for(live)
        self._shown = -REFRESH_S

    def show(self, picture: Callable[[], xr.Dataset], *, last: bool = False) -> bool:
        """Show the picture that the callable returns.

        False if it was skipped, because the previous one is too recent and this is not the last.
        """
        if self._show is None:
            return True
        if not last and time.monotonic() - self._shown < REFRESH_S:
            return False
        try:
            self._show(picture())
        except Exception as error:  # noqa: BLE001  (no error of the user's function is worth losing the run)
            logger.warning(
                "live: a picture could not be shown (%s: %s); the run continues without pictures",
                type(error).__name__,
                in_brief(error),
            )
            self._show = None
        self._shown = time.monotonic()
        return True


class LivePicture:
    """Picture of one object, filled part by part.

    Parameters
    ----------
    screen : Screen
    plan : Plan
    layers : Layers
    pixel_size_m : float or None
    """

    def __init__(self, screen: Screen, plan: Plan, layers: Layers, pixel_size_m: float | None) -> None:
        self.step = cell_size(plan.box.shape)
        """Pixels across a cell."""
        self._screen, self._plan, self._layers, self._pixel_size_m = screen, plan, layers, pixel_size_m
        cells = tuple(-(-side // self.step) for side in plan.box.shape)
        shape = layers.shape("object", (cells[0], cells[1]))
        self._object = np.full(shape, np.nan, np.complex64)
        self._amplitude = np.full(shape, np.nan, np.float32)
        self._n_parts, self._is_new = 0, False

    def add(self, part: CoarsePart | None) -> None:
        """Put a part into the picture, replacing earlier values, and show it."""
        if part is None:
            return
        y, x = part.start_yx
        height, width = part.amplitude.shape[-2:]
        region = (..., slice(y, y + height), slice(x, x + width))
        # With a tile size set by the user a cell may span two tiles: one without data there leaves it unchanged.
        seen = np.isfinite(part.amplitude)
        self._object[region] = np.where(seen, part.object, self._object[region])
        self._amplitude[region] = np.where(seen, part.amplitude, self._amplitude[region])
        self._n_parts, self._is_new = self._n_parts + 1, True
        self._show()

    def finish(self) -> None:
        """Show the final picture."""
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        if self._is_new:
            self._is_new = not self._screen.show(self._dataset, last=last)

    def _dataset(self) -> xr.Dataset:
        dims = self._layers.dims("object")
        coordinates: dict[str, Any] = {"network": list(self._layers.networks)} if self._layers.networks else {}
        for dim, first, size in zip(("y", "x"), self._plan.box.corner, self._amplitude.shape[-2:], strict=True):
            pixels = first + (self.step - 1) / 2 + self.step * np.arange(size, dtype=np.float64)
            coordinates[dim] = (dim, pixels, {"units": "px"})
            if self._pixel_size_m is not None:
                coordinates[f"{dim}_m"] = (dim, pixels * self._pixel_size_m, {"units": "m"})
        arrays = {"object": (dims, self._object.copy()), "amplitude": (dims, self._amplitude.copy())}
        # Polishing delivers each tile a second time.
        progress = {"n_tiles": len(self._plan.tiles), "tiles_done": min(self._n_parts, len(self._plan.tiles))}
        return xr.Dataset(arrays, coordinates, {"store": self._plan.store, "step_px": self.step, **progress})


def screen_for(live: Live) -> Screen | None:
    """Screen for a spec's `live`, or None; raises `PtychodaskError` as `Screen`."""
    return None if live is None or live is False else Screen(live)


def _display_for(live: Live) -> Callable[[xr.Dataset], Any]:
    if callable(live):
        return live
    if live is True:
        if not in_notebook():
            raise PtychodaskError(
                "reconstruct: live=True needs a notebook, and this is none; pass the path of a PNG, or a function that "
                "takes the picture as a Dataset"
            )
        return _InNotebook()
    path = Path(str(live))
    if path.suffix.lower() != ".png" or path.is_dir() or not path.parent.is_dir():
        raise PtychodaskError(f"{path}: live= must be the path of a .png in an existing folder; name another file")
    return lambda picture: _write(path, picture)


def _write(path: Path, picture: xr.Dataset) -> None:
    with atomic_file(path, overwrite=True) as building:
        building.write_bytes(as_png(picture))


def as_png(picture: xr.Dataset) -> bytes:
    """PNG file of the amplitude of a picture, methods side by side."""
    amplitude = picture["amplitude"].values
    return grey_png(amplitude if amplitude.ndim == 2 else np.concatenate(list(amplitude), axis=1))


class _InNotebook:
    """Output of a notebook cell, updated with each picture."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, picture: xr.Dataset) -> None:
        from IPython.display import Image, display

        height, width = picture["amplitude"].shape[-2:]
        shown = Image(as_png(picture), format="png", width=round(WIDTH_PX * width / max(height, width)))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)
