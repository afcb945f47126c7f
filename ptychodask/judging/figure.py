"""Figures that notebooks show, and files of figures."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ptychodask.errors import PtychodaskError

DOTS_PER_INCH = 120
"""Resolution of figures written to a file."""

SHOWN_DOTS_PER_INCH = 80
"""Resolution of figures in a notebook."""


class ShownFigure(Figure):
    """Figure that notebooks show as a picture.

    Notes
    -----
    It is not managed by pyplot, which would draw it a second time with the inline backend and would keep each figure in
    memory until it is closed. A plain `Figure` outside of pyplot has no picture until some cell selects an inline
    backend; `_repr_png_` needs none, and Jupyter, VS Code and marimo all ask for it.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


def empty_figure(width_in: float, height_in: float) -> Figure:
    """Figure without axes, of a size in inches."""
    figure = ShownFigure(figsize=(width_in, height_in), dpi=SHOWN_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure_path(path: str | Path) -> None:
    """Raise `PtychodaskError` unless the folder exists and the format is known."""
    path = Path(path)
    formats = sorted(FigureCanvasAgg.filetypes)
    if path.suffix.lstrip(".").lower() not in formats:
        raise PtychodaskError(
            f"cannot write {path}: unknown figure format {path.suffix!r}, expected one of: "
            f"{', '.join(f'.{suffix}' for suffix in formats)}"
        )
    if path.is_dir():
        raise PtychodaskError(f"cannot write {path}: it is a folder; pass a file name")
    if not path.parent.is_dir():
        raise PtychodaskError(f"cannot write {path}: folder {path.parent} does not exist")


def saved(figure: Figure, path: str | Path | None, dpi: float | None = None) -> Figure:
    """Figure, after it was written to a path if one is given.

    Parameters
    ----------
    figure : Figure
    path : path or None
    dpi : float, optional
        Dots per inch, by default `DOTS_PER_INCH`.

    Raises
    ------
    PtychodaskError
        If the file cannot be written.
    """
    if path is not None:
        check_figure_path(path)
        try:
            figure.savefig(path, dpi=DOTS_PER_INCH if dpi is None else dpi)
        except (OSError, ValueError) as error:
            raise PtychodaskError(f"cannot write {path} ({error}); pass a .png file in a writable folder") from error
    return figure
