"""PNG: the figure that `plot` draws, which shows an object of any size by every k-th pixel."""

from __future__ import annotations

from pathlib import Path

from ptychodask.export.content import Content
from ptychodask.plotting import DOTS_PER_INCH, plot
from ptychodask.progress import Progress


def write(content: Content, path: Path, bar: Progress) -> None:
    """Draw amplitude, phase, weight and uncertainty."""
    plot(content.object.ds).savefig(path, dpi=DOTS_PER_INCH)
    bar.advance(content.object.shape[0])
