"""`inspect` for stores: contents and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import numpy as np

from ptychodask.grouping import chosen_patterns, experiments_of, median_step_px, named_outliers, outlying_positions
from ptychodask.inspection.arrays import ArrayNote
from ptychodask.inspection.findings import Finding, Inspection, Preview
from ptychodask.io.evidence import SAMPLE_FRAMES, Sample, bad_pixels, beam_of, mean_pattern, spread_rows
from ptychodask.probes import probe_diameter_px
from ptychodask.scan import Scan
from ptychodask.storage.location import Location
from ptychodask.store import StoredScan


def inspect_store(path: Location) -> Inspection:
    """Contents of a store, and the command to run next.

    Patterns and dose, positions and overlap, probe, truth, groups and models.

    Parameters
    ----------
    path : Location

    Returns
    -------
    Inspection
        Its `command` is the next one to run.

    Raises
    ------
    PtychodaskError
        If there is no such store, or it is damaged.
    """
    stored = StoredScan(path)
    scan = stored.scan
    rows = spread_rows(scan.n_patterns, SAMPLE_FRAMES)
    # Amplitude, so that bad pixels are 0.
    sample = Sample(scan.amplitude(rows), rows, scan.n_patterns, scan.n_patterns)
    mean = mean_pattern(sample, "amplitude")
    shown = np.unique(np.linspace(0, len(rows) - 1, 4).astype(int))
    return Inspection(
        label=str(path),
        what=f"a store of {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}",
        arrays=list(_arrays(scan)),
        findings=[
            *_on_data(scan, sample),
            *_on_positions(scan),
            *_on_probe(scan),
            *_on_optics(scan),
            *_on_work(stored),
        ],
        command=_next(scan, path),
        preview=Preview(
            mean=mean,
            patterns={int(rows[k]): np.square(sample.frames[k], dtype=np.float64) for k in shown},
            position_yx=scan.position_yx_px,
            unit="px",
        ),
    )


def _arrays(scan: Scan) -> Iterator[ArrayNote]:
    yield ArrayNote("diffraction", tuple(scan.diffraction.shape), str(scan.diffraction.dtype), scan.domain)
    yield ArrayNote("y_px, x_px", (scan.n_patterns,), "float64", "px")
    if scan.position_measured_yx_px is not None:
        yield ArrayNote("y_measured_px, x_measured_px", (scan.n_patterns,), "float64", "px")
    for name in ("probe", "mask", "flux", "label"):
        values = getattr(scan, name)
        if values is not None:
            yield ArrayNote(name, tuple(values.shape), str(values.dtype))
    if scan.truth is not None:
        yield ArrayNote("truth", scan.truth.object.shape, str(scan.truth.object.dtype))


def _on_data(scan: Scan, sample: Sample) -> Iterator[Finding]:
    attributes = scan.attributes
    mean = mean_pattern(sample, "amplitude")
    hot, dead = bad_pixels(sample, mean, scan.mask)
    yield Finding("values", f"{scan.domain}; mean counts per pattern {float(attributes['mean_counts']):.4g}", "noted")
    yield Finding("beam", f"{sample.description} sampled: {beam_of(mean)[1]}", "measured")
    masked = 0 if scan.mask is None else int((~scan.mask).sum())
    yield Finding("pixels", f"{masked} masked; of the others {hot.sum()} hot, {dead.sum()} dead", "measured")
    provenance = attributes.get("provenance", {})
    if "source" in provenance:
        source = f"{provenance['source']}" + (f", read as {provenance['reader']!r}" if "reader" in provenance else "")
        options = ", ".join(f"{name}={value}" for name, value in provenance.get("options", {}).items())
        yield Finding("source", source + (f" with {options}" if options else ""), "noted")
    if "segments" in attributes:
        yield Finding("segments", f"{len(attributes['segments'])}, the scan is {attributes['state']}", "noted")


def _on_positions(scan: Scan) -> Iterator[Finding]:
    (y0, x0), (y1, x1) = scan.position_yx_px.min(axis=0), scan.position_yx_px.max(axis=0)
    experiments = experiments_of(scan.scan_index)
    parts = [scan.position_yx_px[chosen_patterns(scan, number)] for number in experiments]
    repeated = sum(len(part) - len(np.unique(part, axis=0)) for part in parts)
    size = "" if scan.pixel_size_m is None else f"; pixel size {scan.pixel_size_m:.4g} m"
    statement = f"y {y0:.1f} to {y1:.1f}, x {x0:.1f} to {x1:.1f} px; {repeated or 'no'} duplicates{size}"
    yield Finding("positions", statement, "noted")
    if scan.position_measured_yx_px is not None:
        moved = np.sqrt(((scan.position_yx_px - scan.position_measured_yx_px) ** 2).sum(axis=1))
        statement = (
            f"refined: {np.sqrt((moved**2).mean()):.3g} px (rms) from those measured, at most {moved.max():.3g} px"
        )
        yield Finding("positions", statement, "noted")
    outliers = outlying_positions(scan.position_yx_px, scan.scan_index)
    if len(outliers):
        rows = None if scan.source_index is None else scan.source_index[outliers]
        statement = named_outliers(scan.position_yx_px[outliers], outliers, rows)
        yield Finding("outliers", statement, "measured")
    step, diameter = median_step_px(max(parts, key=len)), probe_diameter_px(scan.probe)
    if step:
        widths = f"the median step is {step:.3g} px, the probe {diameter:.3g} px wide"
        share = step / diameter
        overlap = "neighbours do not overlap" if share >= 1 else f"{100 * (1 - share):.0f} %"
        yield Finding("overlap", f"{widths}: {overlap}", "measured")
    if len(experiments) > 1:
        listed = ", ".join(map(str, experiments[:10])) + (", ..." if len(experiments) > 10 else "")
        statement = (
            f"{len(experiments)} in one store ({listed}): reconstruct writes a result for each, or for --experiment"
        )
        yield Finding("experiments", statement, "noted")


def _on_probe(scan: Scan) -> Iterator[Finding]:
    intensity = float((np.abs(scan.probe) ** 2).sum(dtype=np.float64))
    modes = f"{len(scan.probe)} mode" + "s" * (len(scan.probe) > 1)
    yield Finding("probe", f"{modes}, {scan.calibration}: total intensity {intensity:.4g} counts", "noted")
    refined = scan.attributes.get("probe_refinement")
    if isinstance(refined, dict) and {"r_before", "r_after"} <= set(refined):
        factors = f"R {refined['r_before']:.4f} to {refined['r_after']:.4f} on held-out patterns"
        yield Finding("probe", f"refined: {factors}", "noted")
    elif isinstance(refined, dict) and {"held_out_loss_before", "held_out_loss_after"} <= set(refined):
        losses = [f"{refined[f'held_out_loss_{when}']:.4g}" for when in ("before", "after")]
        yield Finding("probe", f"fitted in training: held-out loss {losses[0]} to {losses[1]}", "noted")
    if scan.truth is not None:
        yield Finding("truth", "the true object is stored, so results can be compared with it", "noted")


def _on_optics(scan: Scan) -> Iterator[Finding]:
    """Energy and distance; missing metadata, with the options that set them."""
    known = {"photon energy": (scan.energy_ev, "eV"), "distance": (scan.distance_m, "m")}
    texts = [f"{name} {value:.6g} {unit}" for name, (value, unit) in known.items() if value is not None]
    if texts:
        yield Finding("optics", ", ".join(texts), "noted")
    missing = {"--pixel-size-m": scan.pixel_size_m, "--energy-ev": scan.energy_ev, "--distance-m": scan.distance_m}
    provenance = scan.attributes.get("provenance", {})
    if provenance.get("options", {}).get("particle") == "electron":
        del missing["--energy-ev"]  # the wavelength of electrons is in the pixel size; no photon energy is stored
    flags = [flag for flag, value in missing.items() if value is None]
    if flags:
        statement = f"not known: {', '.join(flags)}; set them with 'ptychodask set'"
        if scan.pixel_size_m is None:
            statement += " (results have no metres without the pixel size)"
        yield Finding("optics", statement, "noted")


def _on_work(stored: StoredScan) -> Iterator[Finding]:
    tables = [table for name in stored.table_names() if (table := stored.table(name)) is not None]
    names = ", ".join(f"'{table.name}' ({len(table)} of {table.spec.members})" for table in tables)
    yield Finding("groups", names or "none stored; they are made when needed", "noted")
    models = [model for model in stored.attributes.get("models", []) if isinstance(model, dict)]
    paths = ", ".join(f"{model.get('kind')} {model.get('path')}" for model in models)
    yield Finding("models", paths or "none trained on this scan", "noted")


def _next(scan: Scan, path: Location) -> str:
    """Command to run next: refine the probe, train, then reconstruct."""
    grows = scan.attributes["state"] == "growing"
    if scan.attributes.get("models"):
        return shlex.join(["ptychodask", "reconstruct", str(path), *(["--follow"] if grows else [])])
    if grows:
        return shlex.join(["ptychodask", "ingest", "--finish", str(path)])
    simulated = scan.truth is not None
    step = "train" if simulated or "probe_refinement" in scan.attributes else "refine-probe"
    return shlex.join(["ptychodask", step, str(path)])
