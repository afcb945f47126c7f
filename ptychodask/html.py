"""HTML representations for notebooks."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

THUMBNAIL_PX = 128
"""Pixels along the longer side of an image, at most; larger ones are shown with every k-th pixel."""


SHOWN_PX = 160
"""Screen pixels across a picture."""


MOST_DOTS = 600
"""Largest number of points in a map; of more, every k-th is shown."""


GREY_PERCENTILES = (1.0, 99.0)
"""Percentiles of an image's finite pixels that are shown black and white."""


class Markup(str):
    """Text that is already HTML."""


def tag(name: str, *content: str, **attributes: str) -> Markup:
    """HTML element with escaped content.

    Content that is `Markup` is not escaped; attributes always are. In names of attributes, underscores become dashes,
    and one at the end is dropped.

    Examples
    --------
    >>> tag("p", "a < b ", tag("b", "&"), class_="note")
    '<p class="note">a &lt; b <b>&amp;</b></p>'
    """
    inner = "".join(part if isinstance(part, Markup) else html.escape(part) for part in content)
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    given = "".join(f' {key}="{html.escape(value)}"' for key, value in named.items())
    return Markup(f"<{name}{given}>{inner}</{name}>")


def card(title: str, facts: Mapping[str, str | None], pictures: Sequence[Markup] = ()) -> Markup:
    """Notebook representation of an object: title, table, and pictures.

    Parameters
    ----------
    title : str
    facts : dict of name to text
        Rows of the table; None leaves a row out.
    pictures : sequence of Markup
        From `image`, `dots` or `curves`.

    Returns
    -------
    Markup
        In the colours of the page around it.
    """
    cell = "text-align: left; vertical-align: top; padding: 0 0.8em 0 0"
    rows = [
        tag("tr", tag("th", name, scope="row", style=cell), tag("td", value, style=cell))
        for name, value in facts.items()
        if value is not None
    ]
    table = tag("div", tag("strong", title), tag("table", tag("tbody", *rows), style="margin: 0.3em 0; color: inherit"))
    return tag("div", table, *pictures, style="display: flex; flex-wrap: wrap; gap: 1.2em; align-items: flex-start")


def image(values: NDArray[np.floating[Any]], caption: str) -> Markup:
    """Grey-scale picture of an array.

    Parameters
    ----------
    values : float array (y, x)
        Values that are not finite are transparent.
    caption : str

    Returns
    -------
    Markup
        From black to white over `GREY_PERCENTILES` of the finite pixels, +y down.
    """
    step = max(1, -(-max(values.shape) // THUMBNAIL_PX))
    data = base64.b64encode(grey_png(values[::step, ::step])).decode()
    style = f"width: {SHOWN_PX}px; max-width: none; image-rendering: pixelated; margin: 0"
    return _figure(
        Markup(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}" style="{style}">'), caption
    )


def dots(position_yx: NDArray[np.floating[Any]], caption: str) -> Markup:
    """Map of points, in the colour of the text around it.

    Parameters
    ----------
    position_yx : float array (point, 2)
        (y, x), +y down; every k-th is shown if there are more than `MOST_DOTS`.
    caption : str

    Returns
    -------
    Markup
    """
    shown = position_yx[:: -(-len(position_yx) // MOST_DOTS)]
    low, extent = position_yx.min(axis=0), float(np.ptp(position_yx, axis=0).max()) or 1.0
    points = (shown - low) / extent * 96 + 2
    drawn = "".join(f"M{x:.1f} {y:.1f}h0" for y, x in points)
    path = tag("path", d=drawn, stroke_width="2", stroke_linecap="round")
    height, width = np.ptp(position_yx, axis=0) / extent * 96 + 4
    return _figure(_svg(path, width, height), caption)


def curves(lines: Mapping[str, Sequence[float]], caption: str) -> Markup:
    """Curves over their index on a logarithmic scale.

    In the colour of the text: the first solid, others dashed.

    Parameters
    ----------
    lines : dict of name to sequence of float
        Values that are not positive and finite are left out.
    caption : str
        The names and their last values are listed below it.

    Returns
    -------
    Markup
    """
    logs = {name: np.log(np.where(_positive(values), values, np.nan)) for name, values in lines.items()}
    every = np.concatenate(list(logs.values()))
    low, high = (np.nanmin(every), np.nanmax(every)) if np.isfinite(every).any() else (0.0, 1.0)
    paths = [
        tag(
            "path",
            d=_drawn(values, low, high),
            stroke_width="1.5",
            stroke_dasharray="4 2" if number else "none",
        )
        for number, values in enumerate(logs.values())
    ]
    legend = [
        f"{name} {values[-1]:.4g}" + (" (dashed)" if number else "")
        for number, (name, values) in enumerate(lines.items())
    ]
    return _figure(_svg(Markup("".join(paths)), 100, 60), "; ".join([caption, *legend]))


def _positive(values: Sequence[float]) -> NDArray[np.bool_]:
    array = np.asarray(values, np.float64)
    return np.isfinite(array) & (array > 0)


def _drawn(logs: NDArray[np.float64], low: float, high: float) -> str:
    """Path of one curve; a single value is a short stroke."""
    x = np.linspace(2, 98, len(logs)) if len(logs) > 1 else np.array([2.0])
    y = 57 - (logs - low) / ((high - low) or 1.0) * 54
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True) if np.isfinite(b)]
    return f"M{' L'.join(points)}" + (" h4" if len(points) == 1 else "") if points else "M0 0"


def _svg(content: Markup, width: float, height: float) -> Markup:
    """SVG drawing with a full width, `SHOWN_PX`, of 100 units."""
    shown = f'viewBox="0 0 {width:.1f} {height:.1f}" width="{SHOWN_PX * width / 100:.0f}"'
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" {shown} fill="none" stroke="currentColor">{content}</svg>')


def _figure(picture: Markup, caption: str) -> Markup:
    note = tag("figcaption", caption, style=f"font-size: smaller; max-width: {SHOWN_PX}px")
    return tag("figure", picture, note, style="margin: 0")


def grey_png(values: NDArray[np.floating[Any]]) -> bytes:
    """Grey-scale PNG file of an array.

    Parameters
    ----------
    values : float array (y, x)
        Values that are not finite are transparent.

    Returns
    -------
    bytes
        From black to white over `GREY_PERCENTILES` of the finite pixels, +y down.
    """
    seen = np.isfinite(values)
    low, high = np.percentile(values[seen], GREY_PERCENTILES) if seen.any() else (0.0, 1.0)
    grey = np.clip((np.where(seen, values, low) - low) / ((high - low) or 1.0), 0, 1) * 255
    return png(np.stack([grey, seen * 255], axis=-1).astype(np.uint8))


def png(grey_alpha: NDArray[np.uint8]) -> bytes:
    """PNG file of a grey-scale picture with transparency.

    Parameters
    ----------
    grey_alpha : uint8 array (y, x, 2)
        Brightness and opacity.

    Returns
    -------
    bytes

    Notes
    -----
    ISO/IEC 15948: 8 bits a sample, colour type 4, no filter before each row.

    Examples
    --------
    >>> png(np.zeros((1, 1, 2), np.uint8))[:4]
    b'\\x89PNG'
    """
    height, width, _ = grey_alpha.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), grey_alpha.reshape(height, -1)], axis=1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts.items()
    )
