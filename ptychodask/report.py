"""HTML report of a result: figures, metrics, methods text and provenance."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ptychodask.compare import align, compare, find_truth, other_data, results_by_label
from ptychodask.errors import PtychodaskError
from ptychodask.html import Markup, tag
from ptychodask.models.description import read_description, read_history
from ptychodask.models.pretrained import bundle_folder, is_pretrained
from ptychodask.plotting import (
    plot,
    plot_comparison,
    plot_complex,
    plot_residuals,
    plot_split_half,
    thinned,
    worst_patterns,
)
from ptychodask.residuals import OUTLIER_MAD, outliers, residuals
from ptychodask.resolution import resolution
from ptychodask.result import recorded
from ptychodask.scan import Scan, Truth
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)

GENERATOR = '<meta name="generator" content="ptychodask">'
"""Marks a page as a report; other pages are not overwritten."""

FIGURE_WIDTH_PX = 1400
"""Width of an embedded figure, pixels."""

RESOLUTION_WINDOW_PX = 64
"""Pixels across a window of the local resolution map; less for a smaller object."""

LONGEST_LIST = 20
"""Maximum entries of a recorded list that are written out."""

METRIC_NAMES = {
    "correlation": "correlation (Pearson)",
    "ratio": "ratio of mean amplitudes",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "frc50": "FRC crosses 1/2 (cycles per pixel)",
    "frc_half_bit": "FRC crosses the half-bit curve (cycles per pixel)",
    "frc_1_7": "FRC crosses 1/7 (cycles per pixel)",
}
"""Display names of metrics; others keep their name."""

NETWORK_NAMES = {
    "pinn": "a physics-informed network (trained through the forward model of diffraction, without known objects)",
    "baseline": "a supervised network that takes one pattern at a time",
}

CALIBRATION_NAMES = {
    "as_given": "The probe was used in the unit of the source, assumed to be that of the patterns.",
    "incident": "The probe was scaled to the known incident flux.",
    "mean_counts": "The probe was scaled to the mean counts per pattern, so the amplitude of the object is relative to "
    "its mean transmission.",
}


@dataclass(frozen=True, kw_only=True)
class Content:
    """Content of a report."""

    title: str
    """Title of the report."""

    label: str
    """Label of the result among the compared ones."""

    result: xr.Dataset
    """Complete result, with lazy arrays if it was lazy."""

    shown: xr.Dataset
    """Result in memory, subsampled for pictures."""

    scan: Scan | None
    """Measured scan."""

    truth: Truth | None
    """Known object."""

    training: Mapping[str, Any]
    """Training record of the network; empty if unknown."""

    aligned_results: Mapping[str, xr.Dataset]
    """All compared results, in common pixel coordinates."""

    comparison: xr.Dataset | None
    """From `compare`."""

    residuals: xr.Dataset | None
    """From `residuals`, with a scan."""


def write_report(
    result: xr.Dataset | str | Path,
    out: str | Path,
    *,
    label: str | None = None,
    scan: Scan | str | Path | None = None,
    truth: Truth | Scan | str | Path | None = None,
    others: Iterable[tuple[str | None, xr.Dataset | str | Path]] = (),
    progress: bool | None = None,
) -> Path:
    """Write a report of a result as one self-contained HTML file.

    It loads nothing from the network and runs no script.

    Parameters
    ----------
    result : xarray.Dataset or path
        From `reconstruct`, `reconstruct_iterative` or `open_result`. If it has several methods, the first is reported
        and compared with the others.
    out : path
        File to write, ending in ``.html``; an existing report is replaced, any other file is not.
    label : str, optional
        Title of the report and label of the result; by default the name of its store, and the label that `compare`
        uses.
    scan : Scan or path, optional
        The scan that the result was made from: adds a description of the measurement, the residual of each pattern and,
        unless `truth` is given, its truth.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one: adds a comparison with it.
    others : pairs of label or None and Dataset or path, optional
        Results to compare with; those without a label are named as in `compare`.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    PtychodaskError
        If `out` cannot be written as a report, `result` is not a result, or it was made from another scan.
    """
    path = Path(out)
    check_report_path(path)
    opened = results_by_label([(label, result), *others])
    store = None if isinstance(result, xr.Dataset) else Path(result).name.removesuffix(".zarr")
    content = _collect(label or store or next(iter(opened)), opened, scan, truth, progress)
    building = path.with_name(f".{path.name}.writing")
    try:
        building.write_text(_page(content), encoding="utf-8")
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)
    logger.info("%s: %d kB", path, path.stat().st_size // 1000)
    return path


def check_report_path(path: Path) -> None:
    """Raise `PtychodaskError` unless a report can be written to this path.

    It must end in .html and be in an existing folder, and a file there must be a report.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise PtychodaskError(f"cannot write {path}: found suffix {path.suffix!r}, expected .html")
    if path.is_dir():
        raise PtychodaskError(f"cannot write {path}: it is a folder; pass a file name")
    if not path.parent.is_dir():
        raise PtychodaskError(f"cannot write {path}: folder {path.parent} does not exist")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise PtychodaskError(
            f"cannot write {path}: it exists and is not a report of ptychodask; pass another name, or remove it"
        )


def _collect(
    title: str,
    results: Mapping[str, xr.Dataset],
    scan: Scan | str | Path | None,
    truth: Truth | Scan | str | Path | None,
    progress: bool | None,
) -> Content:
    measured = None if scan is None else scan if isinstance(scan, Scan) else open_scan(scan)
    label, result = next(iter(results.items()))
    result = _of_first_method(result)
    _check_same_data(label, result, measured)
    if truth is None and measured is not None:
        truth = measured.truth
    known = None if truth is None else find_truth(truth)
    is_compared = len(results) > 1 or known is not None
    aligned_results = align(results, truth=known) if is_compared else {}
    return Content(
        title=title,
        label=label,
        result=result,
        shown=thinned(result),
        scan=measured,
        truth=known,
        training=_training(result.attrs),
        aligned_results=aligned_results,
        comparison=compare(aligned_results, truth=known, scan=measured) if is_compared else None,
        residuals=None if measured is None else _residuals(result, measured, progress),
    )


def _residuals(result: xr.Dataset, scan: Scan, progress: bool | None) -> xr.Dataset:
    """Residuals of all patterns, with those dropped in the reconstruction flagged."""
    dropped = recorded(result.attrs, "spec", "drop") or []
    if not (isinstance(dropped, list) and all(isinstance(pattern, int) for pattern in dropped)):
        raise PtychodaskError(
            f"report: the result records {str(dropped)[:60]} as dropped, expected indices of patterns"
        )
    return residuals(result, scan, drop=dropped, progress=progress)


def _of_first_method(result: xr.Dataset) -> xr.Dataset:
    """Result with the attributes of its first method only.

    Several methods that were stored together share one record.
    """
    methods = recorded(result.attrs, "methods")
    if not isinstance(methods, list):
        return result
    first = {name: recorded(result.attrs, name, methods[0]) for name in ("model", "plan")}
    return result.assign_attrs({**first, "methods": methods[0]})


def _check_same_data(label: str, result: xr.Dataset, scan: Scan | None) -> None:
    made_from = recorded(result.attrs, "data_hash")
    if scan is not None and made_from is not None and made_from != scan.data_hash:
        raise PtychodaskError(
            f"report: {label} was made from data with hash {str(made_from)[:12]}, but {scan.store or 'the scan'} has "
            f"{scan.data_hash[:12]}; pass the scan that it was made from"
        )


def _training(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Training record in the bundle of the model.

    Empty if there is no bundle at the recorded path, or it contains another model by now.
    """
    path, content_hash = recorded(attributes, "model", "path"), recorded(attributes, "model", "hash")
    if not isinstance(path, str):
        return {}
    try:
        folder = bundle_folder(path)
        # Unlike Path.is_file, this returns False for impossible paths.
        if not os.path.isfile(os.path.join(folder, "model.json")):
            return {}
        description = read_description(folder)
        history = read_history(folder / "history.csv")
    except PtychodaskError as error:
        logger.warning("the report omits the training: %s", error)
        return {}
    if description.get("content_hash") != content_hash:
        return {}
    return {**description.get("trained_on", {}), "history": history}


# The methods text: each function returns the sentences of one stage, and none for values that were not recorded.


def methods_text(content: Content) -> list[str]:
    """Paragraphs of the methods text.

    Measurement, reconstruction, evaluation, and what is unknown.
    """
    attributes = content.result.attrs
    paragraphs = [
        [*_measured(content.scan), *_probe(content.scan)],
        [*_network(attributes, content.training), *_stitched(attributes, content.result), *_polished(attributes)],
        [*_explained(content), *_compared(content)],
        _unknown(content),
    ]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _measured(scan: Scan | None) -> list[str]:
    if scan is None:
        return []
    stored = {"counts": "photon counts", "amplitude": "amplitudes"}[scan.domain]
    mean = recorded(scan.attributes, "mean_counts")
    brightness = f", with {number(mean)} counts per pattern on average" if isinstance(mean, float) else ""
    sentences = [
        f"The scan consists of {scan.n_patterns} diffraction patterns of {scan.n_pixels} × {scan.n_pixels} pixels, "
        f"stored as {stored}{brightness}."
    ]
    setup = {
        "photon energy": (scan.energy_ev, 1e-3, "keV"),
        "sample-detector distance": (scan.distance_m, 1.0, "m"),
        "object pixel size": (scan.pixel_size_m, 1e9, "nm"),
    }
    known = [f"the {name} is {number(value * factor)} {unit}" for name, (value, factor, unit) in setup.items() if value]
    if known:
        sentences.append(f"According to its metadata, {_listed(known)}.")
    return [*sentences, *_source(scan.attributes)]


def _source(attributes: Mapping[str, Any]) -> list[str]:
    names = ("source", "reader", "object", "probe", "dose", "step_px")
    source, reader, object_, probe, dose, step_px = (recorded(attributes, "provenance", name) for name in names)
    if source == "simulation":
        return [
            f"It was simulated with the object “{object_}”, the probe “{probe}”, {number(dose)} photons per pattern "
            f"and a step of {number(step_px)} pixels."
        ]
    return [] if source is None else [f"It was read from {Path(str(source)).name} in the format “{reader}”."]


def _probe(scan: Scan | None) -> list[str]:
    if scan is None:
        return []
    sentences = [CALIBRATION_NAMES[scan.calibration]]
    refinement = recorded(scan.attributes, "probe_refinement")
    if recorded(scan.attributes, "probe_refinement", "r_after") is not None:
        kept = "kept" if refinement.get("stored", True) else "not kept"
        sentences.append(
            f"Refining the probe with {refinement.get('n_sweeps')} iterations of rPIE changed the R-factor of "
            f"{refinement.get('n_held_out')} held-out patterns from {number(refinement.get('r_before'))} to "
            f"{number(refinement['r_after'])}; the refined probe was {kept}."
        )
    return sentences


def _network(attributes: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    if recorded(attributes, "spec", "engine") == "iterative":
        sweeps, excluded = (recorded(attributes, "spec", name) for name in ("n_sweeps", "n_excluded"))
        left_out = f"; {excluded} patterns were excluded" if excluded else ""
        return [f"The object was reconstructed with {sweeps} iterations of the rPIE algorithm{left_out}."]
    kind, content_hash = recorded(attributes, "model", "kind"), recorded(attributes, "model", "hash")
    if kind is None:
        return []
    name = NETWORK_NAMES.get(str(kind), f"a network of kind “{kind}”")
    sentences = [f"The object was predicted by {name}; the content hash of the model is {str(content_hash)[:12]}."]
    if isinstance(recorded(training, "n_training"), int):
        same = training.get("data_hash") == attributes.get("data_hash")
        source = "this scan" if same else f"another scan ({training.get('store')})"
        sentences.append(
            f"It was trained on {training['n_training']} patterns of {source}, with {training.get('n_held_out')} "
            f"held-out patterns{_epochs(training.get('history') or [])}."
        )
        if recorded(training, "initial", "hash"):
            sentences.append(f"Training started from {recorded(training, 'initial', 'path') or 'another model'}.")
    if is_pretrained(recorded(attributes, "model", "path")) and isinstance(recorded(training, "recipe"), str):
        sentences.append(
            f"It is a model packaged with ptychodask ({training['recipe']}), trained on {training.get('n_patterns')} "
            f"patterns of {training.get('n_scans')} simulated scans{_epochs(training.get('history') or [])}."
        )
    unlike = recorded(attributes, "model", "unlike_training")
    if isinstance(unlike, list) and unlike:
        sentences.append(f"The scan is outside the range of the training scans: {'; '.join(map(str, unlike))}.")
    return sentences


def _epochs(history: Sequence[Mapping[str, float]]) -> str:
    losses = [epoch["held_out_loss"] for epoch in history if "held_out_loss" in epoch]
    return f", for {len(history)} epochs; the lowest held-out loss was {number(min(losses))}" if losses else ""


def _stitched(attributes: Mapping[str, Any], result: xr.Dataset) -> list[str]:
    plan = recorded(attributes, "plan")
    if not isinstance(plan, Mapping):
        return []
    height, width = result.sizes["y"], result.sizes["x"]
    n_groups, n_patterns, groups, n_chunks, crop, window = (
        plan.get(name, "an unknown number of")
        for name in ("n_groups", "n_patterns", "groups", "n_chunks", "crop", "window")
    )
    dropped = recorded(attributes, "spec", "drop")
    chunks = f"{n_chunks} chunks"
    if isinstance(dropped, list) and dropped:
        chunks += f"; {len(dropped)} patterns were excluded"
    return [
        f"The model was applied to {n_groups} groups drawn from {n_patterns} patterns (group table {groups}), in "
        f"{chunks}.",
        f"The central region of each predicted patch ({crop} pixels across), weighted by the window “{window}”, was "
        f"averaged with the others at the measured positions to form an object of {height} × {width} pixels.",
    ]


def _polished(attributes: Mapping[str, Any]) -> list[str]:
    sweeps, r_factors = (recorded(attributes, "polish", name) for name in ("sweeps", "r_factor"))
    if not sweeps or not isinstance(r_factors, Sequence) or not len(r_factors):
        return []
    return [
        f"Polishing with {sweeps} data-consistency iterations over the patterns then changed the R-factor from "
        f"{number(r_factors[0])} to {number(r_factors[-1])}."
    ]


def _explained(content: Content) -> list[str]:
    if content.residuals is None:
        return []
    fit = content.residuals
    r = fit["r_factor"].values
    sentences = [
        f"Diffraction amplitudes calculated from the object were compared with {fit.attrs['n_counted']} measured "
        "patterns. The R-factor, the sum of absolute differences between calculated and measured amplitudes divided by "
        f"the sum of measured amplitudes, is {number(fit.attrs['r_factor'])} over all of them, with a median per "
        f"pattern of {number(float(np.nanmedian(r)))}."
    ]
    if fit.attrs["n_unseen"]:
        sentences.append(
            f"{fit.attrs['n_unseen']} patterns were excluded because they also illuminate pixels outside the "
            "reconstructed object."
        )
    return sentences


def _compared(content: Content) -> list[str]:
    if content.comparison is None:
        return []
    reference, table = content.comparison.attrs["reference"], content.comparison
    names = {"phase": "a global phase offset", "ramp": "a linear phase ramp", "scale": "an amplitude factor"}
    removed = _listed([names.get(name, name) for name in table.attrs["gauge_removed"]])
    sentences = [
        f"The results were compared with “{reference}” over the {table.attrs['seen_pixels']} pixels common to all, "
        f"after removal of {removed}."
    ]
    if content.label != reference:
        for part in table["part"].values:
            values = table["value"].loc[content.label, part]
            correlation, crossing = (number(float(values.loc[name])) for name in ("correlation", "frc50"))
            sentences.append(
                f"For the {part} of “{content.label}” the Pearson correlation is {correlation}, and the Fourier ring "
                f"correlation falls below 0.5 at {crossing} cycles per pixel."
            )
    return sentences


def _unknown(content: Content) -> list[str]:
    missing = []
    if content.scan is None:
        missing.append("the measurement (no scan was passed to this report)")
    else:
        setup = {
            "the photon energy": content.scan.energy_ev,
            "the sample-detector distance": content.scan.distance_m,
            "the pixel size (lengths are in pixels)": content.scan.pixel_size_m,
        }
        missing += [name for name, value in setup.items() if value is None]
    if recorded(content.result.attrs, "model") is not None and not content.training:
        missing.append(
            "the training of the network (no bundle at the recorded path, or it is unreadable or another model by now)"
        )
    sentences = [f"Not recorded: {_listed(missing)}."] if missing else []
    if content.truth is None:
        sentences.append("No known object was available, so the accuracy of the reconstruction is unknown.")
    return [*sentences, "The data do not determine a global phase offset and a linear phase ramp."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def number(value: Any) -> str:
    """Text of a number: four significant digits for floats, integers in full.

    NaN is empty, and other values are converted with `str`.

    Examples
    --------
    >>> number(0.5), number(1277), number(438018.09), number(float("nan"))
    ('0.5000', '1277', '438,018', '')
    """
    if not isinstance(value, float | np.floating):
        return str(value)
    real = float(value)
    if np.isnan(real):
        return ""
    return f"{real:,.0f}" if 1e4 <= abs(real) < 1e9 else f"{real:#.4g}".rstrip(".")


# The page: every text passes through `tag`, which escapes all but `Markup`.


def _page(content: Content) -> str:
    sections = {
        "Summary": _summary(content),
        "Object": _pictures(content),
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
            plot(content.shown),
            "Amplitude, phase, weight (sum of the averaging weights) and uncertainty (weighted standard deviation of "
            "the overlapping estimates). Colours span the 1st to the 99th percentile of the pixels with at least a "
            "tenth of the median weight; light blue pixels were not reconstructed.",
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
            f"{part}: {METRIC_NAMES.get(str(metric), str(metric))}",
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
        f"{other_data(table)}"
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
    rows = [[str(j), f"{y[j]:.1f}", f"{x[j]:.1f}", number(r[j]), number(deviance[j])] for j in worst_patterns(fit)]
    caption = (
        "Residual of each measured pattern with respect to the one calculated from the object, at the scan positions "
        "and by pattern index. Rings mark the worst."
    )
    return [tag("p", text), _picture(plot_residuals(fit), caption), tag("h3", "Worst patterns"), _table(header, rows)]


def _provenance(content: Content) -> list[Markup]:
    tables = [tag("h3", "Result"), _facts_table(content.result.attrs)]
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

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2327; --quiet: #5c666d; --line: #d5dadd; --paper: #fdfdfc; --link: #1f5f8b;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e6; --quiet: #98a2a9; --line: #3a4248; --paper: #16191c; --link: #84bfe6; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 60rem;
  color: var(--ink); background: var(--paper); font: 1.0625rem/1.6 var(--serif);
}
p { max-width: 42rem; margin: 0 0 1rem; overflow-wrap: anywhere; hyphens: auto; }
h1, h2, h3, nav, table, dl, figcaption, .note, header p { font-family: var(--sans); }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 0 0 1rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 1.75rem 0 .5rem; }
header p, figcaption, .note { color: var(--quiet); font-size: .875rem; line-height: 1.5; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .875rem; margin: 1.25rem 0 0; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
section { margin-top: 2.5rem; padding-top: 1.75rem; border-top: 1px solid var(--line); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.1rem 2rem; margin: 0; }
dt { color: var(--quiet); font-size: .8125rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 3px; }
figcaption { max-width: 42rem; margin-top: .6rem; }
.wide { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 0 .35rem 2rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--quiet); vertical-align: bottom; overflow-wrap: anywhere; }
.record { width: 100%; table-layout: fixed; }
.record th { color: var(--quiet); vertical-align: top; width: 11rem; overflow-wrap: anywhere; }
.record td { text-align: left; overflow-wrap: anywhere; padding-left: 1rem; }
.note { margin-top: .75rem; }
@media print {
  :root { --ink: #000; --quiet: #444; --line: #bbb; --paper: #fff; --link: #000; }
  @page { margin: 18mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr, .facts div { break-inside: avoid; }
  .facts { grid-template-columns: repeat(4, 1fr); }
  img { border: 0; max-height: 225mm; object-fit: contain; }
  #object figure:first-of-type img { max-height: 140mm; }
  .wide { overflow: visible; }
}
"""
