"""The HTML page of a report."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ptychodask.html import Markup, tag
from ptychodask.judging.compare import warnings_of
from ptychodask.judging.metrics import METRICS
from ptychodask.judging.plotting import (
    plot,
    plot_comparison,
    plot_complex,
    plot_refinement,
    plot_residuals,
    plot_split_half,
    refinement_panels,
    worst_patterns,
)
from ptychodask.judging.refinements import refinement_of, refinement_text
from ptychodask.judging.report.content import GENERATOR, Content
from ptychodask.judging.report.methods_text import _listed, methods_text, number
from ptychodask.judging.residuals import OUTLIER_MAD, outliers, stored_indices
from ptychodask.judging.resolution import resolution
from ptychodask.result import recorded

FIGURE_WIDTH_PX = 1400
"""Width of an embedded figure, pixels."""


RESOLUTION_WINDOW_PX = 64
"""Pixels across a window of the local resolution map; less for a smaller object."""


LONGEST_LIST = 20
"""Maximum entries of a recorded list that are written out."""


def _page(content: Content) -> str:
    sections = {
        "Summary": _summary(content),
        "Object": _pictures(content),
        "Refinement": _refinement(content),
        "Comparison": _comparison(content),
        "Patterns": _patterns(content),
        "Methods": [tag("p", paragraph) for paragraph in methods_text(content)],
        "Provenance": _provenance(content),
    }
    present = {title: elements for title, elements in sections.items() if elements}
    links = [tag("a", title, href=f"#{title.lower()}") for title in present]
    generated = f"ptychodask {version('ptychodask')}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    body = tag(
        "body",
        tag("header", tag("h1", content.title), tag("p", f"Report of a ptychographic reconstruction. {generated}")),
        tag("nav", *links),
        *(tag("section", tag("h2", title), *elements, id=title.lower()) for title, elements in present.items()),
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return (
        HEAD.format(style=STYLE, digest=digest, title=html.escape(content.title), generator=GENERATOR)
        + body
        + "\n</html>\n"
    )


def _summary(content: Content) -> list[Markup]:
    ds, attributes = content.shown, content.result.attrs
    height, width = content.result.sizes["y"], content.result.sizes["x"]
    size = f"{height} × {width} px"
    pixel_size_m = attributes.get("pixel_size_m")
    if isinstance(pixel_size_m, float):
        size += f" ({height * pixel_size_m * 1e6:.4g} × {width * pixel_size_m * 1e6:.4g} µm)"
    seen = np.isfinite(ds["object"].values)
    weight = ds["weight"].values
    lit = seen & (weight >= np.median(weight[seen]))
    spread = np.nanmedian(ds["uncertainty"].values[lit] / np.abs(ds["object"].values[lit])) if _has_spread(ds) else None
    facts = {
        "Object": size,
        "Reconstructed pixels": f"{seen.mean():.1%}",
        "Estimates per pixel, median": f"{np.median(ds['count'].values[seen]):.0f}" if "count" in ds else None,
        "Uncertainty, median": None if spread is None else f"{spread:.2%} of the amplitude",
        "Model": recorded(attributes, "model", "kind") or recorded(attributes, "spec", "engine"),
        "Refinement": refinement_text(attributes) if "model" in attributes else None,
        "Patterns": recorded(attributes, "plan", "n_patterns"),
        "Time": _time(attributes),
        "R-factor of the scan": None if content.residuals is None else number(content.residuals.attrs["r_factor"]),
    }
    rows = [tag("div", tag("dt", name), tag("dd", str(value))) for name, value in facts.items() if value is not None]
    return [tag("dl", *rows, class_="facts")]


def _has_spread(ds: xr.Dataset) -> bool:
    return bool(np.isfinite(ds["uncertainty"].values).any())


def _time(attributes: Mapping[str, Any]) -> str | None:
    total, rate = recorded(attributes, "seconds", "total"), recorded(attributes, "patterns_per_s")
    if not isinstance(total, float) or not isinstance(rate, float):
        return None
    return f"{total:.1f} s ({rate:,.0f} patterns/s)"


def _pictures(content: Content) -> list[Markup]:
    pictures = [
        _picture(
            plot(content.shown, refinement=False),
            "Amplitude, phase, weight (sum of the averaging weights) and uncertainty (weighted standard deviation of "
            "the overlapping estimates). Colours span the 1st to the 99th percentile of the pixels with at least a "
            "tenth of the median weight; light blue pixels were not reconstructed. Weight and uncertainty are those of "
            "the stitched patches, before any refinement.",
        ),
        _picture(
            plot_complex(content.shown),
            "The complex object, with phase as hue and amplitude as brightness. Contour lines of the weight mark the "
            "well-illuminated area.",
        ),
    ]
    if "object_half" in content.result:
        window_px = min(RESOLUTION_WINDOW_PX, min(content.result.sizes[dim] for dim in ("y", "x")) // 2 * 2)
        caption = (
            "Two objects, each stitched from one half of the patches, and their correlation at each spatial frequency. "
            "Errors common to both halves, as of a network, do not lower the correlation. It is valid only if each "
            "group was drawn from one half, as by default. "
            f"The map shows the local resolution in windows of {window_px} pixels."
        )
        shown = resolution(content.result, window_px=window_px)
        pictures.append(_picture(plot_split_half(content.result, resolution=shown), caption))
    return pictures


def _refinement(content: Content) -> list[Markup]:
    """Stages of the refinement and their figure."""
    record = refinement_of(content.result.attrs)
    if record.left_out is not None:
        return [tag("p", f"Refinement was left out: {record.left_out}.")]
    if not refinement_panels(content.shown, content.scan):
        return []
    caption = (
        "What is recorded of: the phase before and after; the phase that was added, in radians and in cycles (2π); the "
        "misfit of the judges, patterns that took no part, after each stage, and R; the displacement of each position "
        "from the planned to the refined one, as an enlarged arrow."
    )
    elements = [_picture(plot_refinement(content.shown, scan=content.scan), caption)]
    if record.stages:
        misfit = f"{record.measure} of {record.n_judges} judges" if record.n_judges else "misfit of judges"
        relative = map(number, record.relative_misfit)
        rows = [
            [stage.title, number(stage.misfit), text, number(stage.r_factor), "" if stage.kept else "rejected"]
            for stage, text in zip(record.stages, relative, strict=True)
        ]
        elements.append(_table(["stage", misfit, "relative", "R", ""], rows))
    return elements


def _picture(figure: Figure, caption: str) -> Markup:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FIGURE_WIDTH_PX / figure.get_figwidth())
    data = base64.b64encode(buffer.getvalue()).decode()
    image = Markup(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
    return tag("figure", image, tag("figcaption", caption))


def _comparison(content: Content) -> list[Markup]:
    if content.comparison is None:
        return []
    table = content.comparison
    methods = [str(method) for method in table["method"].values]
    rows = [
        [
            f"{part}: {METRICS[str(metric)].title}",
            *map(number, table["value"].loc[:, part, metric].values),
        ]
        for part in table["part"].values
        for metric in table["metric"].values
        if np.isfinite(table["value"].loc[:, part, metric]).any()
    ]
    if "r_factor" in table:
        rows.append([f"R-factor of {table.attrs['r_patterns']} patterns", *map(number, table["r_factor"].values)])
    peaks = _listed([f"{part} {number(float(table['peak'].loc[part]))}" for part in table["part"].values])
    note = (
        f"Reference: {table.attrs['reference']}, over {table.attrs['seen_pixels']} pixels common to all. Removed "
        f"gauge: {_listed(table.attrs['gauge_removed'])}. PSNR peaks (ranges of the reference): {peaks}. "
        f"{' '.join(warnings_of(table))}"
    )
    figure = plot_comparison(content.aligned_results, content.truth, comparison=table)
    caption = (
        "Results on the colour scales of the reference, their differences from the reference, and their Fourier ring "
        "correlation with it."
    )
    return [_table(["", *methods], rows), tag("p", note, class_="note"), _picture(figure, caption)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Table with text in the first column and numbers in the others."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", head, tag("tbody", *body)), class_="wide")


def _patterns(content: Content) -> list[Markup]:
    if content.residuals is None:
        return []
    fit = content.residuals
    far = outliers(fit)
    text = (
        f"The R-factor is {number(fit.attrs['r_factor'])} over {fit.attrs['n_counted']} patterns. Outliers, more than "
        f"{OUTLIER_MAD:g} standard deviations above the median: {len(far) or 'none'}."
    )
    header = ["pattern, index in the store", "y (px)", "x (px)", "R", "Poisson deviance"]
    y, x, r, deviance = (fit[name].values for name in ("y_px", "x_px", "r_factor", "poisson_deviance"))
    index = stored_indices(fit)
    rows = [
        [str(index[j]), f"{y[j]:.1f}", f"{x[j]:.1f}", number(r[j]), number(deviance[j])] for j in worst_patterns(fit)
    ]
    caption = (
        "Residual of each measured pattern with respect to the one calculated from the object, at the scan positions "
        "and by pattern index. Rings mark the worst."
    )
    return [tag("p", text), _picture(plot_residuals(fit), caption), tag("h3", "Worst patterns"), _table(header, rows)]


def _provenance(content: Content) -> list[Markup]:
    tables = [tag("h3", "Result"), _facts_table(content.result.ptycho.records)]
    if content.scan is not None:
        tables += [tag("h3", "Scan"), _facts_table(content.scan.attributes)]
    if content.training:
        trained_on = {name: value for name, value in content.training.items() if name != "history"}
        tables += [tag("h3", "Training"), _facts_table(trained_on)]
    return tables


def _facts_table(values: Mapping[str, Any]) -> Markup:
    rows = [
        tag("tr", tag("th", str(name), scope="row"), tag("td", _flat_text(value)))
        for name, value in values.items()
        if value is not None
    ]
    return tag("table", tag("tbody", *rows), class_="record")


def _flat_text(value: Any) -> str:
    """One-line text of nested attributes, without None and empty values.

    Examples
    --------
    >>> _flat_text({"tile": 256, "crop": None, "roi": [0, 5]}), _flat_text([{"kind": "pinn"}])
    ('tile 256; roi 0, 5', 'kind pinn')
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_flat_text(item)}" for name, item in value.items() if item not in (None, [], {}))
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)} in all)" if len(value) > LONGEST_LIST else ""
        return ", ".join(map(_flat_text, value[:LONGEST_LIST])) + more
    return f"{value:.6g}" if isinstance(value, float) else str(value)


HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator}
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
"""


STYLE = (files("ptychodask.judging.report") / "style.css").read_text()
