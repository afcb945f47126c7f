"""`inspect` for files of other programs: contents, certainty, and `ingest` command."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.grouping import median_step_px, outlying_positions
from ptychodask.inspection.arrays import (
    LEAST_PIXELS,
    ArrayNote,
    find_aspect,
    find_keys,
    find_object_pixel,
    find_optics,
    find_particle,
    find_patterns,
    find_step,
    note_arrays,
    note_joined,
    wavelength_of,
)
from ptychodask.inspection.command import Origin, store_name
from ptychodask.inspection.findings import Finding, Inspection, Preview
from ptychodask.inspection.stores import inspect_store
from ptychodask.io.evidence import (
    Certainty,
    Sample,
    bad_pixels,
    beam_of,
    domain_of,
    least_probe_diameter_px,
    mean_pattern,
    n_saturated,
    off_centre_px,
    take_sample,
)
from ptychodask.io.folders import is_foreign_folder
from ptychodask.io.formats import detect_format, open_for, options_of, read_source
from ptychodask.io.grid import ELECTRONS_FROM_EV, GriddedSource, on_grid
from ptychodask.io.mapping import positions_of
from ptychodask.io.near_field import near_field
from ptychodask.io.patterns import prepared
from ptychodask.io.pixel_values import MOST_BAD, clipped, no_counts
from ptychodask.io.plausible import overlap_of
from ptychodask.io.recipe import with_recipe
from ptychodask.io.source import MOST_PIXELS, Container, Frames, IngestSpec, SourceScan, frame_axes, raster_shape
from ptychodask.io.units import Unit, metres_in, position_unit
from ptychodask.scan import Domain, as_rows
from ptychodask.storage.location import parse_location

USUAL_STEP = 0.3
"""Step over probe diameter assumed for guessing an unknown pixel size: the overlap of most scans."""

METRES_BELOW = 0.1
"""Extent below which positions are taken as metres: no scan is a tenth of a pixel or of a micrometre wide."""

PREVIEW_PATTERNS = 4
"""Patterns in the preview figure."""

_AMPLITUDE = re.compile(r"amp|sqrt", re.IGNORECASE)


def inspect_file(
    path: str | Path, *, format: str | None = None, recipe: str | Path | None = None, **reader_options: Any
) -> Inspection:
    """Contents of a file or store, and the command to run next.

    Parameters
    ----------
    path : path
        A file that `ingest` can read, or a store.
    format, recipe, **reader_options
        Known facts about a file, as for `ingest`: they are checked, and become part of the command.

    Returns
    -------
    Inspection
        Prints as text; ``command``, ``options`` and ``as_yaml()`` are the proposed `ingest`, ``refused`` the reasons
        why it would fail.

    Raises
    ------
    PtychodaskError
        If there is no such file, it is damaged, or contains no array of numbers.

    Notes
    -----
    A sample of `SAMPLE_FRAMES` patterns is read, all positions, the probe, and no other array. A compressed NPZ has no
    random access, so its sample is taken from the first `STREAM_BYTES`; an archive packed by bzip2 is unpacked into a
    temporary folder (scratch=).
    """
    location = parse_location(path)
    if location.local_path is None or (location.is_dir() and not is_foreign_folder(location.local_path)):
        if format is not None or recipe is not None or reader_options:
            given = {"format": format, "recipe": recipe, **reader_options}
            options = ", ".join(sorted(name for name, value in given.items() if value is not None))
            raise PtychodaskError(
                f"{location}: is a store; options of ingest ({options}) are for files; leave them out"
            )
        return inspect_store(location)
    path = location.local_path
    spec = with_fields(IngestSpec(), with_recipe(recipe, reader_options))
    with tempfile.TemporaryDirectory(prefix="ptychodask-") as folder, ExitStack() as stack:
        container = open_for(spec, path, Path(folder) if spec.scratch is None else Path(spec.scratch), stack)
        inspector = _Inspector(path, container, format, spec, Path(folder), stack)
        inspection = inspector.inspection()
        if inspection.refused and format is None and inspector.is_detected:
            unknown = _Inspector(path, container, None, spec, Path(folder), stack, of_no_format=True).inspection()
            if not unknown.refused:
                reason = f"its keys resemble format {inspector.format!r}, but: {inspection.refused[0]}"
                return replace(unknown, findings=[Finding("format", reason, "measured"), *unknown.findings])
        return inspection


class _Inspector:
    """Inspects a file step by step, adding to options and findings."""

    def __init__(
        self,
        path: Path,
        container: Container,
        format: str | None,
        spec: IngestSpec,
        scratch: Path,
        stack: ExitStack,
        *,
        of_no_format: bool = False,
    ) -> None:
        self.path, self.container, self.scratch, self.stack = path, container, scratch, stack
        self.options = spec.given()
        self.findings: list[Finding] = []
        self.refused: list[str] = []
        self.n_saturated = 0
        self.arrays = note_arrays(container)
        if not self.arrays:
            raise PtychodaskError(f"{container.label}: contains no arrays; name a file with patterns")
        if not any(note.kind for note in self.arrays):
            raise PtychodaskError(
                f"{container.label}: contains no array of numbers: '{self.arrays[0].key}' is {self.arrays[0].dtype}; "
                "save plain numbers"
            )
        is_raw = of_no_format or spec.step is not None or spec.positions is not None
        self.format = format or (None if is_raw else _detected_format(container, spec))
        self.is_detected = format is None and self.format not in (None, "mapping")
        if self.format in (None, "mapping"):
            self.arrays += note_joined(container, self.arrays)

    def inspection(self) -> Inspection:
        patterns = find_patterns(self.arrays)
        keys = {} if patterns is None else find_keys(self.arrays, patterns)
        if "keys" in self.options:
            keys = dict(self.options["keys"])
            patterns = next((note for note in self.arrays if note.key == keys.get("diffraction")), patterns)
        guessed = self.format is None
        if guessed:
            self._propose(patterns, keys)
        self._mark(keys)
        scan = gridded = None
        if "domain" in options_of(str(self.format)):
            sample = None if patterns is None else self._sample(patterns, keys)
            has_positions = "step" in self.options or {"y", "position"} & set(keys)
            if sample is not None and self.format == "mapping" and has_positions:
                self._propose_units(keys, sample)
            scan = None if self.refused else self._read()
        else:
            # Such a format defines all properties of its patterns, and only its reader knows where they are.
            scan = self._read()
            sample = None if scan is None else self._take_sample(scan.frames)
        if scan is not None and not self.refused:
            gridded = self._gridded(scan)
        if sample is not None:
            self._check_patterns(sample, scan)
        if scan is not None and sample is not None:
            self._check_positions(scan, gridded, sample)
        return self._result(guessed, sample, scan)

    def _report(self, topic: str, statement: str, certainty: Certainty) -> None:
        self.findings.append(Finding(topic, statement, certainty))

    def _propose(self, patterns: ArrayNote | None, keys: dict[str, str]) -> None:
        """Propose a mapping for keys that belong to no known format."""
        self.format = "mapping"
        if patterns is None:
            large = [note for note in self.arrays if len(frame_axes(note.shape)) > 3 and note.kind in set("iuf")]
            hint = "".join(f"; '{n.key}' has shape {n.shape}: merge its scan axes into one" for n in large[:1])
            self.refused.append(f"no array of patterns, expected real numbers of shape (pattern, qy, qx){hint}")
            return
        if "step" in self.options:
            for name in ("y", "x", "position"):
                keys.pop(name, None)
        elif not {"y", "position"} & set(keys) and (step := find_step(self.container, self.arrays, patterns)):
            self.options |= {"step": step, "units": "m"}
            statement = f"a raster in steps of {step[0]:.4g} and {step[1]:.4g} m, from the axes of '{patterns.key}'"
            self._report("positions", f"{statement}; the rotation against the detector is not known", "noted")
            self._report("axes", "rows of the raster are taken as y; check it with --check-axes --rotation", "guess")
        elif not {"y", "position"} & set(keys):
            raster = raster_shape(patterns.shape)
            axes = frame_axes(patterns.shape) if raster is None else (raster[0] * raster[1], *patterns.shape[-2:])
            likely = [n for n in self.arrays if n.kind == "f" and axes[0] in n.shape and len(n.shape) == 2]
            hint = "".join(f"; '{n.key}' has shape {n.shape}, which ingest cannot read" for n in likely[:1])
            self.refused.append(
                f"no positions for {axes[0]} patterns, expected two arrays ({axes[0]},) or one ({axes[0]}, 2) "
                f"in the order (y, x){hint}; pass their file with --positions, or the step of a raster with --step Y,X "
                f"--units um{'' if raster else ' --raster ROWS,COLUMNS'}"
            )
        self.options["keys"] = keys
        self._report(
            "mapping", "the keys belong to no known format; roles follow from shapes, types and names", "guess"
        )
        if "position" in keys:
            self._report("axes", f"'{keys['position']}' is taken as (y, x); check it with --check-axes", "guess")
        elif "y" in keys:
            statement = f"y is '{keys['y']}' and x '{keys['x']}', by their names"
            self._report("axes", f"{statement}; check it with --check-axes", "guess")
        self._propose_mask(keys)
        self._propose_attributes(patterns)
        for optic in find_optics(self.container, self.arrays):
            if optic.option not in self.options:
                self.options[optic.option] = optic.value
                statement = f"{optic.option} {optic.value:.6g}, from '{optic.key}' in {optic.unit}"
                self._report("optics", statement, "guess" if optic.is_guess else "noted")

    def _propose_attributes(self, patterns: ArrayNote) -> None:
        """Propose the particle, the shape of pixels and the object pixel, if noted."""
        particle = find_particle(self.container, self.arrays)
        if particle is not None and "particle" not in self.options:
            self.options["particle"] = "electron"
            self._report("optics", f"particle electron, from '{particle}'", "noted")
        aspect = find_aspect(self.container, self.arrays)
        if aspect is not None and "affine" not in self.options:
            self.options["affine"] = (float(f"{aspect:.9g}"), 0.0, 0.0, 1.0)
            statement = f"detector pixels are not square, {aspect:.4g} times as high as wide: y positions are scaled"
            self._report("optics", statement, "noted")
        pixel = find_object_pixel(self.container, frame_axes(patterns.shape)[-1])
        if pixel is not None and "pixel_size_m" not in self.options:
            name, self.options["pixel_size_m"] = pixel
            self._report("optics", f"pixel_size_m {pixel[1]:.6g}, from the attribute '{name}'", "noted")

    def _propose_mask(self, keys: dict[str, str]) -> None:
        """Settle whether a mask marks good or bad pixels: most are good."""
        if "mask" not in keys:
            return
        good = float((self.container.array(keys["mask"]) != 0).mean())
        if good > 0.5:
            self._report(
                "mask", f"'{keys['mask']}' is nonzero on {100 * good:.1f} % of the pixels, so nonzero is good", "guess"
            )
            return
        keys["mask_bad"] = keys.pop("mask")
        statement = f"'{keys['mask_bad']}' is 0 on {100 - 100 * good:.1f} % of the pixels, so 0 is good"
        self._report("mask", statement, "guess")

    def _mark(self, keys: dict[str, str]) -> None:
        roles = {key: name for name, key in keys.items()}
        self.arrays = [replace(note, role=roles.get(note.key)) for note in self.arrays]

    def _sample(self, patterns: ArrayNote, keys: dict[str, str]) -> Sample | None:
        """Sample of the patterns; also settles their unit, axes and size."""
        raster = raster_shape(patterns.shape) if "domain" in options_of(str(self.format)) else None
        axes = frame_axes(patterns.shape) if raster is None else (raster[0] * raster[1], *patterns.shape[-2:])
        positions = next((n for n in self.arrays if n.key == (keys.get("y") or keys.get("position"))), None)
        n_positions = None if positions is None else max(positions.shape)
        if "raster" in self.options:
            n_positions = prod(self.options["raster"])
        last = raster is None and self._pattern_axis_is_last(axes, n_positions)
        try:
            frames = self.container.frames(patterns.key, pattern_last=last, raster=raster is not None)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        sample = self._take_sample(frames)
        if sample is not None:
            self._settle_domain(patterns, sample)
        return sample

    def _take_sample(self, frames: Frames) -> Sample | None:
        """Sample of frames; also settles their size."""
        if max(frames.shape[1:]) > MOST_PIXELS:
            self.refused.append(
                f"patterns have shape {tuple(frames.shape)}, expected at most {MOST_PIXELS} pixels across"
            )
            return None
        try:
            sample = take_sample(frames)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        sample = self._without_flags(sample)
        height, width = sample.frames.shape[1:]
        if min(height, width) < LEAST_PIXELS:
            self.refused.append(f"patterns have {height} x {width} pixels, expected at least {LEAST_PIXELS} across")
            return None
        if "n_pixels" not in self.options and "bin" not in self.options and (height != width or height % 4):
            self.options["n_pixels"] = min(height, width) // 4 * 4
            statement = f"frames are {height} x {width}: cropped to a square with a side divisible by 4"
            self._report("size", statement, "measured")
        return sample

    def _without_flags(self, sample: Sample) -> Sample:
        """Sample without the values that are no counts, which are reported."""
        self.n_saturated = n_saturated(sample.frames)
        frames = clipped(sample.frames, self.options.get("floor"))
        negative = (frames < 0).any(axis=0)
        # Flags are negative in every frame, noise around 0 is not.
        are_flags = frames.dtype.kind == "i" and bool((frames[:, negative] < 0).all())
        flagged = no_counts(frames, negative=are_flags)
        if self.options.get("saturated") == "keep" or not flagged.any():
            return replace(sample, frames=frames)
        always, ever = flagged.all(axis=0), flagged.any(axis=0)
        values = ", ".join(f"{value:.0f}" for value in np.unique(frames[flagged])[-3:])
        statement = f"{always.sum()} pixels hold {values} in all sampled patterns and {(ever & ~always).sum()} in some"
        if ever.mean() <= MOST_BAD:
            self.options["saturated"] = "mask"
            statement += ", which are no counts: --saturated mask marks them as bad in a mask"
        self._report("mask", statement, "measured")
        return replace(sample, frames=np.where(flagged, np.zeros((), frames.dtype), frames), good=np.logical_not(ever))

    def _pattern_axis_is_last(self, axes: tuple[int, ...], n_positions: int | None) -> bool:
        if "axes" in self.options:
            return bool(self.options["axes"] == "qy,qx,pattern")
        first, last = axes[0] == n_positions, axes[-1] == n_positions
        if first and last and "axes" in options_of(str(self.format)):
            self.options["axes"] = "pattern,qy,qx"
            self._report("axes", f"shape {axes} with {n_positions} positions fits two orders of axes", "open")
        return last and not first

    def _settle_domain(self, patterns: ArrayNote, sample: Sample) -> None:
        """Report the unit of the patterns.

        It goes into the options if the format leaves it open.
        """
        detected, certainty, evidence = domain_of(sample.frames)
        if "domain" in self.options:
            self._report("values", f"{self.options['domain']}, as given; the file has {evidence}", "noted")
            return
        if "domain" not in options_of(str(self.format)):
            return  # Reported in _check_patterns, with the unit from the reader.
        of_floats = self.format == "ptychopinn" and sample.frames.dtype.kind == "f"
        if of_floats and detected != "counts":
            self._report("values", f"amplitude, as the format defines for floats; the file has {evidence}", "defined")
            return
        named: Domain = "amplitude" if _AMPLITUDE.search(patterns.name) else "counts"
        self.options["domain"] = detected or named
        if detected is None:
            evidence += f"; undetermined, so the command assumes {named}: check it"
        elif of_floats:
            evidence += "; this contradicts the format, which stores amplitudes as floats"
        self._report("values", f"{self.options['domain']}: {evidence}", certainty)

    def _propose_units(self, keys: dict[str, str], sample: Sample) -> None:
        """Propose the unit of the positions, and a pixel size if needed."""
        key = keys.get("position") or keys.get("y", "")
        recorded = self.container.unit(key) if key else None
        noted = position_unit(recorded)
        if "units" in self.options:
            unit = self.options["units"]
        elif not key:
            return  # the reader asks for the unit of the step
        elif noted is not None:
            unit = noted
            self._report("units", f"positions are in {unit}: the unit of '{key}' is {recorded}", "noted")
        elif recorded is not None:
            self.refused.append(
                f"the unit of '{key}' is {recorded!r}, which is no length; pass --units with the unit of the positions"
            )
            return
        else:
            extent = float(np.nanmax(np.ptp(_finite_rows(self._position_values(key)), axis=0), initial=0.0))
            ending = _unit_by_name(key)
            unit = ending or ("m" if 0 < extent < METRES_BELOW else "px")
            reason = "from the ending of the name" if ending else "no unit recorded; micrometres are possible too"
            reason = "too small for pixels or micrometres" if not ending and unit == "m" else reason
            self.options["units"] = unit
            self._report("units", f"positions are in {unit}: they extend over {extent:.3g}, {reason}", "guess")
        optics = wavelength_of(self.options) and {"distance_m", "detector_pixel_m"} <= set(self.options)
        if unit != "px" and not optics and "pixel_size_m" not in self.options:
            self._guess_pixel_size(keys, unit, sample)

    def _position_values(self, key: str) -> NDArray[Any]:
        """Values of an array of positions, with pairs along the last axis."""
        values = self.container.array(key)
        return values.T if values.ndim == 2 and len(values) == 2 < values.shape[1] else values

    def _guess_pixel_size(self, keys: dict[str, str], unit: Unit, sample: Sample) -> None:
        """Propose a placeholder pixel size, so that the command runs."""
        try:
            options = with_fields(IngestSpec(), {**self.options, "pixel_size_m": 1.0})
            position_yx = positions_of(self.container, keys, options)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return
        step = median_step_px(_finite_rows(position_yx))
        diameter = least_probe_diameter_px(_as_counts(sample, self.options.get("domain", "counts")))
        if not step or not diameter:
            return
        guess = float(f"{step * metres_in(unit) / (USUAL_STEP * diameter):.2g}")
        self.options["pixel_size_m"] = guess
        statement = f"not in the file; with {guess:g} m the step is {USUAL_STEP:g} of the probe diameter, a usual value"
        remedy = "REPLACE it by yours, or pass energy, distance and detector pixel size"
        self._report("pixel size", f"{statement}. {remedy}", "open")

    def _read(self) -> SourceScan | None:
        """Scan as read with the options; an error is added to `refused`."""
        try:
            spec = with_fields(IngestSpec(), self.options)
            source = read_source(self.path, self.container, str(self.format), spec, self.scratch, self.stack)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        if source.companion is not None:
            self._report("files", f"the scan is in two files; the other one is {source.companion}", "defined")
        return source.scan

    def _gridded(self, scan: SourceScan) -> GriddedSource | None:
        """Positions on the pixel grid; an error is added to `refused`."""
        lost = np.flatnonzero(~np.isfinite(scan.position_yx).all(axis=1))
        if scan.rows is not None:
            statement = f"{len(scan.rows)} of {len(scan.position_yx)} patterns have a position; the others are left out"
            self._report("positions", statement, "defined")
        elif 0 < len(lost) < len(scan.position_yx) and "drop_frames" not in self.options:
            self.options["drop_frames"] = as_rows(lost)
            self._report("positions", f"{len(lost)} are not finite: their patterns are left out", "measured")
        try:
            gridded = on_grid(scan, with_fields(IngestSpec(), self.options), self.container.label)
            self._check_near_field(scan, gridded)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        return gridded

    def _check_near_field(self, scan: SourceScan, gridded: GriddedSource) -> None:
        """Refuse near-field patterns; a stream is not checked."""
        if not scan.frames.seekable or gridded.spec.far_field:
            return
        patterns = prepared(scan, gridded, self.container.label)
        reason = near_field(patterns, gridded.position_yx_px, gridded.grid.n_pixels, scan.domain)
        if reason is not None:
            self.refused.append(f"{reason}; --far-field skips this check")

    def _check_patterns(self, sample: Sample, scan: SourceScan | None) -> None:
        frames, domain = sample.frames, self._domain(scan)
        n, height, width = sample.n_frames, *frames.shape[1:]
        mean = mean_pattern(sample, domain)
        if scan is not None and "domain" not in options_of(str(self.format)):
            detected, certainty, evidence = domain_of(frames)
            clash = "; this contradicts the format" if certainty == "measured" and detected != domain else ""
            self._report("values", f"{domain}, as the format defines; the file has {evidence}{clash}", "defined")
        size = f"{n} of {height} x {width} {frames.dtype}"
        statement = f"{size}; {sample.description} sampled; mean counts per pattern {mean.sum():.4g}"
        self._report("patterns", statement, "measured")
        self._check_beam(mean, scan)
        good = np.ones(mean.shape, bool) if scan is None or scan.mask is None else scan.mask
        if good.shape != mean.shape:
            return
        good = good if sample.good is None else good & sample.good
        hot, dead = bad_pixels(sample, mean, good)
        self._report(
            "pixels", f"{hot.sum()} hot, {dead.sum()} dead, {self.n_saturated} saturated in one pattern", "measured"
        )
        values = frames[:, good]
        for invalid, description in ((~np.isfinite(values), "not finite"), (values < 0, "negative")):
            rows = sample.rows[invalid.any(axis=1)]
            if len(rows):
                if description == "negative":
                    self._propose_floor(values, len(rows), len(sample.rows))
                    continue
                self.refused.append(
                    f"values are {description} in {len(rows)} of {len(sample.rows)} sampled patterns "
                    f"(rows {as_rows(rows)}); leave these out with --drop-frames, or mark the pixels as bad with --mask"
                )

    def _propose_floor(self, values: NDArray[Any], n_with: int, n_sampled: int) -> None:
        """Propose to set negative values to 0, as dark subtraction leaves them."""
        self.options["floor"] = 0.0
        share = 100 * float((values < 0).mean())
        statement = (
            f"{share:.2g} % of the values in {n_with} of {n_sampled} sampled patterns, down to {values.min():.4g}"
        )
        self._report("negative", f"{statement}: --floor 0 sets them to 0", "measured")

    def _check_beam(self, mean: NDArray[np.float64], scan: SourceScan | None) -> None:
        detected, evidence = beam_of(mean)
        if self.format == "mapping":
            if "dc" not in self.options and detected == "corner":
                self.options["dc"] = "corner"
            statement = f"in the {self.options.get('dc', 'centre')}"
            self._report("beam", f"{statement}: {evidence}", "measured" if detected else "open")
        elif scan is not None:
            clash = "; this contradicts the format" if detected not in (None, scan.dc) else ""
            self._report("beam", f"in the {scan.dc}, as the format defines; {evidence}{clash}", "defined")
        off = off_centre_px(np.fft.fftshift(mean) if self._dc(scan) == "corner" else mean)
        if off is not None and "centre" not in self.options:
            middle = tuple(n // 2 for n in mean.shape)
            statement = f"the centre of mass is at ({off[0]:.1f}, {off[1]:.1f}), the middle at {middle}"
            self._report("beam", f"{statement}; --centre {off[0]:.0f},{off[1]:.0f} would centre it", "measured")

    def _check_positions(self, scan: SourceScan, gridded: GriddedSource | None, sample: Sample) -> None:
        if scan.probe is not None and not np.any(scan.probe):
            self.options["probe"] = "estimate"
            self._report("probe", "the file's probe is zero everywhere; one is estimated from the patterns", "measured")
        position = scan.position_yx
        finite = np.isfinite(position).all(axis=1)
        repeated = int(finite.sum()) - len(np.unique(position[finite], axis=0))
        if finite.any():
            (y0, x0), (y1, x1) = position[finite].min(axis=0), position[finite].max(axis=0)
            statement = f"{len(position)}: y {y0:.4g} to {y1:.4g}, x {x0:.4g} to {x1:.4g} {scan.unit}"
            statement += f"; {int((~finite).sum())} not finite, {repeated or 'no'} duplicates"
            self._report("positions", statement, "measured")
        self._check_outliers(scan, np.flatnonzero(finite) if gridded is None else gridded.kept)
        if gridded is None:
            return
        if gridded.truth is not None:
            self._report("truth", "the file's object covers the scan and becomes the truth", "defined")
        if any(finding.topic == "pixel size" for finding in self.findings):
            return  # The pixel size was chosen to give a usual overlap, so reporting the overlap means nothing.
        if scan.unit != "px" and gridded.pixel_size_m is not None:
            guessed = any(finding.topic == "optics" and finding.certainty == "guess" for finding in self.findings)
            if gridded.spec.energy_ev and gridded.spec.particle is None and gridded.spec.energy_ev >= ELECTRONS_FROM_EV:
                statement = f"{gridded.spec.energy_ev / 1e3:.4g} keV is taken as of photons; is it of electrons?"
                self._report("energy", f"{statement} Then pass --particle electron", "open")
            self._report("pixel size", f"{gridded.pixel_size_m:.4g} m (object)", "guess" if guessed else "noted")
        self._check_overlap(scan, gridded, sample)

    def _check_outliers(self, scan: SourceScan, kept: NDArray[np.int64]) -> None:
        """Report frames with positions far from all others."""
        scan_index = None if scan.scan_index is None else scan.scan_index[kept]
        outliers = kept[outlying_positions(scan.position_yx[kept], scan_index)]
        if len(outliers):
            rows = as_rows(outliers)
            subject = f"row {rows} is" if len(outliers) == 1 else f"{len(outliers)} positions are"
            self._report("outliers", f"{subject} far from all others; leave out with --drop-frames {rows}", "measured")

    def _check_overlap(self, scan: SourceScan, gridded: GriddedSource, sample: Sample) -> None:
        fits = scan.probe is not None and scan.probe.shape[1:] == sample.frames.shape[1:]
        counts = _as_counts(sample, scan.domain)
        # A hot pixel is the same in all patterns and would dominate their speckles.
        counts[:, bad_pixels(sample, counts.mean(axis=0))[0]] = 0
        scale = gridded.grid.position_scale_yx[0]
        overlap = overlap_of(gridded.position_yx_px, scan.probe if fits else None, counts, scale=scale)
        if overlap is None:
            return
        told = overlap.problem or f"{100 * (1 - overlap.share):.0f} %"
        self._report("overlap", f"{overlap.statement}: {told}", "measured")
        if overlap.is_too_small:
            self.refused.append(
                f"positions in {scan.unit} give a step of {overlap.step_px:.3g} px, which is unlikely; pass --units, "
                "and --pixel-size-m or energy, distance and detector pixel"
            )

    def _domain(self, scan: SourceScan | None) -> Domain:
        return scan.domain if scan is not None else self.options.get("domain", "counts")

    def _dc(self, scan: SourceScan | None) -> str:
        return scan.dc if scan is not None and self.format != "mapping" else self.options.get("dc", "centre")

    def _result(self, guessed: bool, sample: Sample | None, scan: SourceScan | None) -> Inspection:
        what = "unknown format" if guessed else f"format {self.format!r}"
        is_readable = sample is not None and scan is not None
        origin = Origin(self.path, str(self.format), self.options, self._domain(scan))
        return Inspection(
            label=str(self.path),
            what=what,
            arrays=self.arrays,
            findings=self.findings,
            refused=self.refused,
            options=self.options,
            command=origin.command(store_name(self.path)) if is_readable else None,
            preview=None if sample is None else self._preview(sample, scan),
        )

    def _preview(self, sample: Sample, scan: SourceScan | None) -> Preview:
        counts = _as_counts(sample, self._domain(scan))
        centred: Callable[[Any], Any] = np.fft.fftshift if self._dc(scan) == "corner" else np.asarray
        chosen = np.unique(np.linspace(0, len(counts) - 1, PREVIEW_PATTERNS).astype(int))
        return Preview(
            mean=centred(counts.mean(axis=0)),
            patterns={int(sample.rows[k]): centred(counts[k]) for k in chosen},
            position_yx=None if scan is None else scan.position_yx,
            unit="px" if scan is None else scan.unit,
        )


def _detected_format(container: Container, spec: IngestSpec) -> str | None:
    try:
        return detect_format(container, spec)
    except PtychodaskError:
        return None


def _unit_by_name(key: str) -> Unit | None:
    """Unit that a name ends with, after an underscore."""
    ending = key.rsplit("_", 1)[-1] if "_" in key else ""
    return None if ending == "a" else position_unit(ending)


def _finite_rows(position: NDArray[Any]) -> NDArray[np.float64]:
    """Finite positions (k, ...); one row of zeros if there are none."""
    rows = np.squeeze(np.asarray(position, np.float64))
    rows = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
    kept = rows[np.isfinite(rows).all(axis=1)]
    return kept if len(kept) else np.zeros((1, rows.shape[1]))


def _as_counts(sample: Sample, domain: Domain) -> NDArray[np.float64]:
    """Sampled patterns as counts (k, h, w); negative or non-finite are 0."""
    values = np.nan_to_num(sample.frames.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return np.maximum(values, 0) if domain == "counts" else np.square(values)
