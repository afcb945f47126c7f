"""A result as one HTML file: what was found, how well, where it comes from, and how it was made."""

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
from ptychodask.display import Markup, tag
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
from ptychodask.scan import PtychodaskError, Scan, Truth
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)

GENERATOR = '<meta name="generator" content="ptychodask">'
"""What tells a report from another page, which is not overwritten."""

FIGURE_WIDTH_PX = 1400
"""Pixels across an embedded figure."""

RESOLUTION_WINDOW_PX = 64
"""Pixels across a window of the map of the local resolution, where the object is so large."""

LONGEST_LIST = 20
"""Entries of a recorded list that are written out."""

METRIC_NAMES = {
    "correlation": "correlation (Pearson)",
    "ratio": "ratio of the means",
    "mae": "mean absolute error",
    "mse": "mean squared error",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "frc50": "FRC crosses 1/2 (cycles per pixel)",
    "frc_half_bit": "FRC crosses half a bit (cycles per pixel)",
    "frc_1_7": "FRC crosses 1/7 (cycles per pixel)",
}
"""Names of metrics for readers; others go by their own."""

NETWORK_NAMES = {
    "pinn": "a physics-informed network (trained through the diffraction model, without known objects)",
    "baseline": "a supervised network that reads one pattern at a time",
}

CALIBRATION_NAMES = {
    "as_given": "The probe and the patterns were taken to share one unit, as in the source.",
    "incident": "The probe was scaled to the known incident flux.",
    "mean_counts": "The probe was scaled to the mean counts per pattern, so the object's amplitude is relative to its "
    "mean transmission.",
}


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a report tells of a result."""

    title: str
    """What the report is called."""

    label: str
    """What the result is called beside others."""

    result: xr.Dataset
    """All of the result, its arrays where they lie."""

    shown: xr.Dataset
    """The result in memory, thinned for pictures."""

    scan: Scan | None
    """What was measured."""

    truth: Truth | None
    """The known object."""

    training: Mapping[str, Any]
    """How the network was trained; empty where that is not known."""

    aligned_results: Mapping[str, xr.Dataset]
    """All results that are compared, on the pixels of one frame."""

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
    """Write a report of a result: one HTML file that needs no network and runs no script.

    Parameters
    ----------
    result : xarray.Dataset or path
        From `reconstruct`, `reconstruct_iterative` or `open_result`. Of several methods the first is reported, the
        others stand beside it.
    out : path
        The file to write, ending in ``.html``; a report that is there is replaced, another file is not.
    label : str, optional
        What the result is called; by default the report is called as its store, and the result as `compare` names it.
    scan : Scan or path, optional
        The scan that the result was made from: adds what was measured, the residual of each pattern and, where no other
        is given, its truth.
    truth : Truth, Scan or path, optional
        The known object, or a scan (store) that has one: adds a comparison with it.
    others : pairs of label or None and Dataset or path, optional
        Results to compare with; those without a label are named as `compare` names them.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    PtychodaskError
        If the file cannot be a report, the result is none, or was made from another scan.
    """
    path = Path(out)
    check_report_path(path)
    opened = results_by_label([(label, result), *others])
    store = None if isinstance(result, xr.Dataset) else Path(result).name.removesuffix(".zarr")
    found = _find_out(label or store or next(iter(opened)), opened, scan, truth, progress)
    building = path.with_name(f".{path.name}.writing")
    try:
        building.write_text(_page(found), encoding="utf-8")
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)
    logger.info("%s: %d kB", path, path.stat().st_size // 1000)
    return path


def check_report_path(path: Path) -> None:
    """Raise `PtychodaskError` unless a report can be written there: an .html file in a folder, new or a report."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise PtychodaskError(f"{path}: is no name of a report; end it in .html")
    if path.is_dir() or not path.parent.is_dir():
        raise PtychodaskError(f"{path}: is a folder, or lies in none that exists; name a file in a folder")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:4096]:
        raise PtychodaskError(f"{path}: is there and no report of ptychodask; name another file, or remove it")


def _find_out(
    title: str,
    results: Mapping[str, xr.Dataset],
    scan: Scan | str | Path | None,
    truth: Truth | Scan | str | Path | None,
    progress: bool | None,
) -> Findings:
    measured = None if scan is None else scan if isinstance(scan, Scan) else open_scan(scan)
    label, result = next(iter(results.items()))
    result = _of_first_method(result)
    _check_same_data(label, result, measured)
    if truth is None and measured is not None:
        truth = measured.truth
    known = None if truth is None else find_truth(truth)
    compared = len(results) > 1 or known is not None
    aligned_results = align(results, truth=known) if compared else {}
    return Findings(
        title=title,
        label=label,
        result=result,
        shown=thinned(result),
        scan=measured,
        truth=known,
        training=_training(result.attrs),
        aligned_results=aligned_results,
        comparison=compare(aligned_results, truth=known, scan=measured) if compared else None,
        residuals=None if measured is None else _residuals(result, measured, progress),
    )


def _residuals(result: xr.Dataset, scan: Scan, progress: bool | None) -> xr.Dataset:
    """What each pattern says of the result, with those flagged that it was made without."""
    dropped = recorded(result.attrs, "spec", "drop") or []
    if not (isinstance(dropped, list) and all(isinstance(pattern, int) for pattern in dropped)):
        raise PtychodaskError(f"report: the result records {str(dropped)[:60]} as dropped, expected places of patterns")
    return residuals(result, scan, drop=dropped, progress=progress)


def _of_first_method(result: xr.Dataset) -> xr.Dataset:
    """The result with what was recorded of its own method alone, where several methods were stored together."""
    methods = recorded(result.attrs, "methods")
    if not isinstance(methods, list):
        return result
    own = {name: recorded(result.attrs, name, methods[0]) for name in ("model", "plan")}
    return result.assign_attrs({**own, "methods": methods[0]})


def _check_same_data(label: str, result: xr.Dataset, scan: Scan | None) -> None:
    made_from = recorded(result.attrs, "data_hash")
    if scan is not None and made_from is not None and made_from != scan.data_hash:
        raise PtychodaskError(
            f"report: {label} was made from data {str(made_from)[:12]}, {scan.store or 'the scan'} holds "
            f"{scan.data_hash[:12]}; pass the scan that it was made from"
        )


def _training(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's bundle says of its training, where it still lies at its path and is the same model."""
    path, content_hash = recorded(attributes, "model", "path"), recorded(attributes, "model", "hash")
    if not isinstance(path, str):
        return {}
    try:
        folder = bundle_folder(path)
        # Unlike Path.is_file, this is False for what is no possible path.
        if not os.path.isfile(os.path.join(folder, "model.json")):
            return {}
        description = read_description(folder)
        history = read_history(folder / "history.csv")
    except PtychodaskError as error:
        logger.warning("the report says nothing of the training: %s", error)
        return {}
    if description.get("content_hash") != content_hash:
        return {}
    return {**description.get("trained_on", {}), "history": history}


# The methods paragraph: each function gives the sentences of one stage, none of what was not recorded.


def methods_text(found: Findings) -> list[str]:
    """Paragraphs of plain English: what was measured, how the object was made, how it was judged, what is not known."""
    attributes = found.result.attrs
    paragraphs = [
        [*_measured(found.scan), *_probe(found.scan)],
        [*_network(attributes, found.training), *_stitched(attributes, found.result), *_polished(attributes)],
        [*_explained(found), *_compared(found)],
        _not_known(found),
    ]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _measured(scan: Scan | None) -> list[str]:
    if scan is None:
        return []
    stored = {"counts": "photon counts", "amplitude": "amplitudes"}[scan.domain]
    mean = recorded(scan.attributes, "mean_counts")
    light = f", with {number(mean)} counts per pattern on average" if isinstance(mean, float) else ""
    sentences = [
        f"The scan holds {scan.n_patterns} diffraction patterns of {scan.n_pixels} × {scan.n_pixels} pixels, stored as "
        f"{stored}{light}."
    ]
    setting = {
        "photon energy": (scan.energy_ev, 1e-3, "keV"),
        "distance from sample to detector": (scan.distance_m, 1.0, "m"),
        "pixel size of the object": (scan.pixel_size_m, 1e9, "nm"),
    }
    known = [f"the {name} {number(value * factor)} {unit}" for name, (value, factor, unit) in setting.items() if value]
    if known:
        sentences.append(f"{_listed(known)[0].upper()}{_listed(known)[1:]} (as recorded in the store).")
    return [*sentences, *_source(scan.attributes)]


def _source(attributes: Mapping[str, Any]) -> list[str]:
    names = ("source", "reader", "object", "probe", "dose", "step_px")
    source, reader, object_, probe, dose, step_px = (recorded(attributes, "provenance", name) for name in names)
    if source == "simulation":
        return [
            f"It was simulated: object “{object_}”, probe “{probe}”, {number(dose)} photons in a pattern, steps of "
            f"{number(step_px)} pixels."
        ]
    return [] if source is None else [f"It was read from {Path(str(source)).name} as the format “{reader}”."]


def _probe(scan: Scan | None) -> list[str]:
    if scan is None:
        return []
    sentences = [CALIBRATION_NAMES[scan.calibration]]
    tried = recorded(scan.attributes, "probe_refinement")
    if recorded(scan.attributes, "probe_refinement", "r_after") is not None:
        kept = "kept" if tried.get("stored", True) else "not kept"
        sentences.append(
            f"A refinement of the probe by {tried.get('n_sweeps')} sweeps of rPIE changed R, on "
            f"{tried.get('n_held_out')} patterns held out, from {number(tried.get('r_before'))} to "
            f"{number(tried['r_after'])}, and was {kept}."
        )
    return sentences


def _network(attributes: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    if recorded(attributes, "spec", "engine") == "iterative":
        sweeps, excluded = (recorded(attributes, "spec", name) for name in ("n_sweeps", "n_excluded"))
        left_out = f", with {excluded} patterns left out" if excluded else ""
        return [f"The object was reconstructed by {sweeps} sweeps of an iterative algorithm (rPIE){left_out}."]
    kind, content_hash = recorded(attributes, "model", "kind"), recorded(attributes, "model", "hash")
    if kind is None:
        return []
    name = NETWORK_NAMES.get(str(kind), f"a network of the kind “{kind}”")
    sentences = [f"The object was predicted by {name}, content hash {str(content_hash)[:12]}."]
    if isinstance(recorded(training, "n_training"), int):
        same = training.get("data_hash") == attributes.get("data_hash")
        where = "of this scan itself" if same else f"of another scan ({training.get('store')})"
        sentences.append(
            f"It was trained on {training['n_training']} patterns {where}, with {training.get('n_held_out')} held out"
            f"{_course(training.get('history') or [])}."
        )
        if recorded(training, "initial", "hash"):
            sentences.append(f"The training started from {recorded(training, 'initial', 'path') or 'another model'}.")
    if is_pretrained(recorded(attributes, "model", "path")) and isinstance(recorded(training, "recipe"), str):
        sentences.append(
            f"It came with the package ({training['recipe']}), trained on {training.get('n_patterns')} patterns of "
            f"{training.get('n_scans')} simulated scans{_course(training.get('history') or [])}."
        )
    unlike = recorded(attributes, "model", "unlike_training")
    if isinstance(unlike, list) and unlike:
        sentences.append(f"The scan lies outside of what it was trained on: {'; '.join(map(str, unlike))}.")
    return sentences


def _course(history: Sequence[Mapping[str, float]]) -> str:
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
        chunks += f"; {len(dropped)} patterns were left out"
    return [
        f"It read {n_groups} groups, made of {n_patterns} patterns (group table {groups}), in {chunks}.",
        f"The middle {crop} pixels of each patch, weighted by the window “{window}”, were averaged at the measured "
        f"positions into an object of {height} × {width} pixels.",
    ]


def _polished(attributes: Mapping[str, Any]) -> list[str]:
    sweeps, r_factors = (recorded(attributes, "polish", name) for name in ("sweeps", "r_factor"))
    if not sweeps or not isinstance(r_factors, Sequence) or not len(r_factors):
        return []
    return [
        f"{sweeps} data-consistent sweeps over the patterns then changed R from {number(r_factors[0])} to "
        f"{number(r_factors[-1])}."
    ]


def _explained(found: Findings) -> list[str]:
    if found.residuals is None:
        return []
    own = found.residuals
    r = own["r_factor"].values
    sentences = [
        f"The object was pushed through the diffraction model and compared with {own.attrs['n_counted']} patterns: R, "
        "the sum of the absolute differences of modelled and measured amplitude over the sum of the measured "
        f"amplitude, is {number(own.attrs['r_factor'])} over all of them and {number(float(np.nanmedian(r)))} for the "
        "median pattern."
    ]
    if own.attrs["n_unseen"]:
        sentences.append(f"{own.attrs['n_unseen']} patterns reach beyond the object and were not judged.")
    return sentences


def _compared(found: Findings) -> list[str]:
    if found.comparison is None:
        return []
    reference, table = found.comparison.attrs["reference"], found.comparison
    names = {"phase": "the global phase", "ramp": "a phase plane", "scale": "the scale of the amplitude"}
    removed = _listed([names.get(name, name) for name in table.attrs["gauge_removed"]])
    sentences = [
        f"The results were compared with “{reference}” over {table.attrs['seen_pixels']} pixels that all have seen, "
        f"after {removed} had been removed."
    ]
    if found.label != reference:
        for part in table["part"].values:
            figures = table["value"].loc[found.label, part]
            correlation, crossing = (number(float(figures.loc[name])) for name in ("correlation", "frc50"))
            sentences.append(
                f"The {part} of “{found.label}” has a correlation of {correlation} with it, and its Fourier ring "
                f"correlation falls below one half at {crossing} cycles per pixel."
            )
    return sentences


def _not_known(found: Findings) -> list[str]:
    missing = []
    if found.scan is None:
        missing.append("the measurement itself (the scan was not given to this report)")
    else:
        setting = {
            "the photon energy": found.scan.energy_ev,
            "the distance to the detector": found.scan.distance_m,
            "the pixel size, so lengths are in pixels": found.scan.pixel_size_m,
        }
        missing += [name for name, value in setting.items() if value is None]
    if recorded(found.result.attrs, "model") is not None and not found.training:
        missing.append(
            "how the network was trained (its bundle is not at the recorded path, is another by now, or cannot be read)"
        )
    sentences = [f"Not recorded, and so not stated here: {_listed(missing)}."] if missing else []
    if found.truth is None:
        sentences.append("No known object was given, so the accuracy of the object is not known.")
    return [*sentences, "The phase is known up to a constant and a plane, which no pattern can tell."]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def number(value: Any) -> str:
    """A number for readers, four digits of it where it is none of things; anything else as it is.

    Examples
    --------
    >>> number(0.5), number(1277), number(438018.09), number(float("nan"))
    ('0.5000', '1277', '438,018', '')
    """
    if not isinstance(value, float | np.floating):
        return str(value)
    found = float(value)
    if np.isnan(found):
        return ""
    return f"{found:,.0f}" if 1e4 <= abs(found) < 1e9 else f"{found:#.4g}".rstrip(".")


# The page: every text passes through `tag`, which escapes what is not markup already.


def _page(found: Findings) -> str:
    sections = {
        "Summary": _summary(found),
        "Object": _pictures(found),
        "Comparison": _comparison(found),
        "Patterns": _patterns(found),
        "Methods": [tag("p", paragraph) for paragraph in methods_text(found)],
        "Provenance": _provenance(found),
    }
    present = {title: content for title, content in sections.items() if content}
    links = [tag("a", title, href=f"#{title.lower()}") for title in present]
    made = f"ptychodask {version('ptychodask')}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    body = tag(
        "body",
        tag("header", tag("h1", found.title), tag("p", f"Report of a ptychographic reconstruction. {made}")),
        tag("nav", *links),
        *(tag("section", tag("h2", title), *content, id=title.lower()) for title, content in present.items()),
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return (
        HEAD.format(style=STYLE, digest=digest, title=html.escape(found.title), generator=GENERATOR)
        + body
        + "\n</html>\n"
    )


def _summary(found: Findings) -> list[Markup]:
    ds, attributes = found.shown, found.result.attrs
    height, width = found.result.sizes["y"], found.result.sizes["x"]
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
        "Pixels seen": f"{seen.mean():.1%}",
        "Estimates per pixel, median": f"{np.median(ds['count'].values[seen]):.0f}" if "count" in ds else None,
        "Spread of the estimates, median": None if spread is None else f"{spread:.2%} of the amplitude",
        "Model": recorded(attributes, "model", "kind") or recorded(attributes, "spec", "engine"),
        "Patterns": recorded(attributes, "plan", "n_patterns"),
        "Time": _time(attributes),
        "R over the scan": None if found.residuals is None else number(found.residuals.attrs["r_factor"]),
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


def _pictures(found: Findings) -> list[Markup]:
    pictures = [
        _picture(
            plot(found.shown),
            "Amplitude, phase, weight (the light that the estimate rests on) and uncertainty (weighted standard "
            "deviation of the overlapping estimates). Colours span the 1st to the 99th percentile of the pixels with a "
            "tenth of the median weight or more; light blue pixels were not seen.",
        ),
        _picture(
            plot_complex(found.shown),
            "The object as complex numbers: phase as hue, amplitude as brightness. Lines of equal weight bound what is "
            "well lit.",
        ),
    ]
    if "object_half" in found.result:
        window_px = min(RESOLUTION_WINDOW_PX, min(found.result.sizes[dim] for dim in ("y", "x")) // 2 * 2)
        caption = (
            "Two objects, each stitched from one half of the patches, and how far they agree at each frequency. What "
            "both get wrong alike, as a network may, does not show; and were the groups not drawn from either half "
            "alone, as they are by default, the agreement says nothing. "
            f"The map has the resolution of each window of {window_px} pixels."
        )
        shown = resolution(found.result, window_px=window_px)
        pictures.append(_picture(plot_split_half(found.result, resolution=shown), caption))
    return pictures


def _picture(figure: Figure, caption: str) -> Markup:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FIGURE_WIDTH_PX / figure.get_figwidth())
    data = base64.b64encode(buffer.getvalue()).decode()
    image = Markup(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
    return tag("figure", image, tag("figcaption", caption))


def _comparison(found: Findings) -> list[Markup]:
    if found.comparison is None:
        return []
    table = found.comparison
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
        rows.append([f"R over {table.attrs['r_patterns']} patterns", *map(number, table["r_factor"].values)])
    peaks = _listed([f"{part} {number(float(table['peak'].loc[part]))}" for part in table["part"].values])
    note = (
        f"Reference: {table.attrs['reference']}, over {table.attrs['seen_pixels']} pixels that all have seen. Removed "
        f"first: {_listed(table.attrs['gauge_removed'])}. Peaks of the PSNR, ranges of the reference: {peaks}. "
        f"{other_data(table)}"
    )
    figure = plot_comparison(found.aligned_results, found.truth, comparison=table)
    caption = (
        "Each result on the scales of the reference, its difference from it, and the Fourier ring correlation with it."
    )
    return [_table(["", *methods], rows), tag("p", note, class_="note"), _picture(figure, caption)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column is text and whose others are numbers."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header)))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", head, tag("tbody", *body)), class_="wide")


def _patterns(found: Findings) -> list[Markup]:
    if found.residuals is None:
        return []
    own = found.residuals
    far = outliers(own)
    words = (
        f"R is {number(own.attrs['r_factor'])} over the {own.attrs['n_counted']} patterns that were judged. Those that "
        f"stand out, by more than {OUTLIER_MAD:g} deviations above the median: {len(far) or 'none'}."
    )
    header = ["pattern, place in the store", "y (px)", "x (px)", "R", "Poisson deviance"]
    y, x, r, deviance = (own[name].values for name in ("y_px", "x_px", "r_factor", "poisson_deviance"))
    rows = [[str(j), f"{y[j]:.1f}", f"{x[j]:.1f}", number(r[j]), number(deviance[j])] for j in worst_patterns(own)]
    caption = (
        "How far each pattern is from the one that the object makes, over the scan and in turn; the worst in rings."
    )
    return [tag("p", words), _picture(plot_residuals(own), caption), tag("h3", "The worst"), _table(header, rows)]


def _provenance(found: Findings) -> list[Markup]:
    tables = [tag("h3", "Result"), _facts_table(found.result.attrs)]
    if found.scan is not None:
        tables += [tag("h3", "Scan"), _facts_table(found.scan.attributes)]
    if found.training:
        trained_on = {name: value for name, value in found.training.items() if name != "history"}
        tables += [tag("h3", "Training"), _facts_table(trained_on)]
    return tables


def _facts_table(values: Mapping[str, Any]) -> Markup:
    rows = [
        tag("tr", tag("th", str(name), scope="row"), tag("td", in_words(value)))
        for name, value in values.items()
        if value is not None
    ]
    return tag("table", tag("tbody", *rows), class_="record")


def in_words(value: Any) -> str:
    """A value of nested attributes in one line, what is None or empty left out.

    Examples
    --------
    >>> in_words({"tile": 256, "crop": None, "roi": [0, 5]}), in_words([{"kind": "pinn"}])
    ('tile 256; roi 0, 5', 'kind pinn')
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {in_words(item)}" for name, item in value.items() if item not in (None, [], {}))
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)} in all)" if len(value) > LONGEST_LIST else ""
        return ", ".join(map(in_words, value[:LONGEST_LIST])) + more
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
