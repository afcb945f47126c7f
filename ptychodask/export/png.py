"""PNG: the figure of `plot`.

Large objects are shown by every k-th pixel."""

from __future__ import annotations

from pathlib import Path

from ptychodask.export.content import Content
from ptychodask.judging.plotting import plot
from ptychodask.progress import Progress


def write(content: Content, path: Path, bar: Progress) -> None:
    """Draw amplitude, phase, weight and uncertainty into a PNG."""
    plot(content.object.ds, path=path)
    bar.advance(content.object.shape[0])
