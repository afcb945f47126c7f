"""PtychoPINN's NPZ (hoidn/PtychoPINN, docs/data_contracts.md): amplitudes, positions in object pixels, guesses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.export.content import Content, pattern_rows
from ptychodask.export.npz_stream import NpzWriter
from ptychodask.progress import Progress


def write(content: Content, path: Path, bar: Progress) -> None:
    """Write patterns with the object: result, truth, or flat guess.

    Notes
    -----
    ``diff3d`` is the amplitude, float32, with bad pixels 0, since the format has no mask. ``xcoords`` and ``ycoords``
    are pixels of ``objectGuess``, with the origin at its first pixel. A probe of one mode is (N, N), of several
    (mode, N, N); probe and patterns have the same units. Unseen pixels are 0; for an unknown object, ``objectGuess``
    covers the scan and is 1 everywhere. Patterns are in the order of the store; ``source_index`` is the row of each in
    the file that was ingested. ``_metadata`` is a JSON text with the order of the axes, which cannot be seen if there
    are as many patterns as pixels across one.
    """
    scan = content.measured
    corner_yx_px, shape, blocks = _object(content, bar)
    position_yx_px = scan.position_yx_px - np.array(corner_yx_px)
    with NpzWriter(path) as file:
        amplitudes = (scan.amplitude(rows) for rows in pattern_rows(scan, bar))
        file.put_blocks("diff3d", (scan.n_patterns, scan.n_pixels, scan.n_pixels), np.float32, amplitudes)
        for axis, name in ((1, "xcoords"), (0, "ycoords")):
            file.put(name, position_yx_px[:, axis])
            file.put(f"{name}_start", position_yx_px[:, axis])
        file.put("probeGuess", scan.probe[0] if len(scan.probe) == 1 else scan.probe)
        file.put("scan_index", np.zeros(scan.n_patterns, np.int64) if scan.scan_index is None else scan.scan_index)
        file.put_blocks("objectGuess", shape, np.complex64, blocks)
        file.put("source_index", content.frame)
        file.put("_metadata", json.dumps({"software": f"ptychodask {version('ptychodask')}", "axes": "pattern,qy,qx"}))


def _object(
    content: Content, bar: Progress
) -> tuple[tuple[float, float], tuple[int, int], Iterator[NDArray[np.complex64]]]:
    """Corner, shape and rows of the object written with a scan."""
    if content.picture is not None:
        picture = content.picture
        return picture.corner_yx_px, picture.shape, (values for _, values, _ in picture.seen_rows(bar))
    scan = content.measured
    if scan.truth is not None:
        height, width = scan.truth.object.shape
        return scan.truth.corner_yx_px, (height, width), iter([scan.truth.object])
    low = np.floor(scan.position_yx_px.min(axis=0) - scan.n_pixels / 2)
    size: Any = np.ceil(scan.position_yx_px.max(axis=0) + scan.n_pixels / 2) - low
    height, width = int(size[0]), int(size[1])
    rows = (np.ones((1, width), np.complex64) for _ in range(height))
    return (float(low[0]), float(low[1])), (height, width), rows
