"""The methods paragraph of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ptychodask.judging.refinements import SLOW_PHASE, STITCHED, refinement_of
from ptychodask.judging.report.content import Content
from ptychodask.models.description import epochs_of
from ptychodask.models.pretrained import is_pretrained
from ptychodask.result import recorded
from ptychodask.scan import Scan

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


def methods_text(content: Content) -> list[str]:
    """Paragraphs of the methods text.

    Measurement, reconstruction, evaluation, and what is unknown.
    """
    attributes = content.result.attrs
    paragraphs = [
        [*_measured(content), *_probe(content.scan)],
        [*_network(attributes, content.training), *_stitched(attributes, content.result), *_refined(attributes)],
        [*_explained(content), *_compared(content)],
        _unknown(content),
    ]
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _measured(content: Content) -> list[str]:
    scan, experiment = content.scan, recorded(content.result.attrs, "spec", "experiment")
    if scan is None:
        return []
    n_patterns = scan.n_patterns if content.residuals is None else content.residuals.sizes["pattern"]
    subject = "The scan" if experiment is None else f"Experiment {experiment} of the scan"
    stored = {"counts": "photon counts", "amplitude": "amplitudes"}[scan.domain]
    mean = recorded(scan.attributes, "mean_counts")
    brightness = f", with {number(mean)} counts per pattern on average" if isinstance(mean, float) else ""
    sentences = [
        f"{subject} consists of {n_patterns} diffraction patterns of {scan.n_pixels} × {scan.n_pixels} pixels, "
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
    if kind == "iterative":
        return ["The object was reconstructed iteratively, without a network, from a flat object."]
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
    return f", for {epochs_of(history)} epochs; the lowest held-out loss was {number(min(losses))}" if losses else ""


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


def _refined(attributes: Mapping[str, Any]) -> list[str]:
    record = refinement_of(attributes)
    stages = {stage.name: stage for stage in record.stages if stage.kept}
    sentences = []
    if SLOW_PHASE in stages:
        n_nodes, n_patterns = (
            recorded(attributes, "refinement", SLOW_PHASE, name) for name in ("n_nodes", "n_patterns")
        )
        sentences.append(
            f"The slowly varying part of its phase was corrected by a least-squares fit of {n_nodes} coefficients to "
            f"{n_patterns} patterns."
        )
    sweeps = [stage for name, stage in stages.items() if name not in (STITCHED, SLOW_PHASE)]
    if sweeps:
        before = [stage.r_factor for stage in stages.values() if stage not in sweeps and np.isfinite(stage.r_factor)]
        change = (
            f", which changed the R-factor from {number(before[-1])} to {number(sweeps[-1].r_factor)}" if before else ""
        )
        sentences.append(f"It was polished with {len(sweeps)} data-consistency iterations over the patterns{change}.")
    misfits = [
        relative
        for stage, relative in zip(record.stages, record.relative_misfit, strict=True)
        if stage.kept and np.isfinite(relative)
    ]
    if record.n_judges and len(misfits) > 1:
        sentences.append(
            f"{record.n_judges} patterns that took no part judged the refinement: their {record.measure} fell to "
            f"{misfits[-1]:.1%} of that of the stitched object."
        )
    if record.left_out is not None:
        sentences.append(f"It was not refined: {record.left_out}.")
    return sentences


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
