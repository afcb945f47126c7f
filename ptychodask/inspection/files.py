"""`inspect`: what a foreign file holds, how sure that is, and the `ingest` that it calls for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.grouping import median_step_px
from ptychodask.inspection.arrays import ArrayNote, find_keys, find_optics, find_patterns, note_arrays, wavelength_of
from ptychodask.inspection.command import Origin, as_rows, store_name
from ptychodask.inspection.evidence import (
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
from ptychodask.inspection.findings import Finding, Inspection, Preview
from ptychodask.inspection.stores import inspect_store
from ptychodask.io import IngestSpec
from ptychodask.io.formats import detect_format, open_container, options_of, read_source
from ptychodask.io.ingestion import GriddedSource, on_grid, prepared
from ptychodask.io.mapping import UNIT_NAMES
from ptychodask.io.near_field import near_field
from ptychodask.io.recipe import with_recipe
from ptychodask.io.source import MOST_PIXELS, Container, Frames, SourceScan, frame_axes
from ptychodask.places import S3Location, parse_location
from ptychodask.scan import Domain, PtychodaskError, probe_diameter_px, with_fields

USUAL_STEP = 0.3
"""Step over diameter of the probe that a pixel size is guessed by where nothing tells it: the overlap of most scans."""

METRES_BELOW = 0.1
"""Extent of positions below which they are taken for metres: no scan is a tenth of a pixel or of a micrometre wide."""

WIDEST_OVERLAPPING = 1.0
"""Step over diameter of the probe from which on neighbours do not overlap."""

PREVIEW_PATTERNS = 4
"""Patterns that a picture shows."""

_AMPLITUDE = re.compile(r"amp|sqrt", re.IGNORECASE)


def inspect_file(
    path: str | Path, *, format: str | None = None, recipe: str | Path | None = None, **reader_options: Any
) -> Inspection:
    """Look at a file of another program, or at a store, and say what it holds and what to run next.

    Parameters
    ----------
    path : path
        A file that `ingest` takes, or a store.
    format, recipe, **reader_options
        As for `ingest`, for what is known of a file: it is checked, and becomes part of the command.

    Returns
    -------
    Inspection
        Prints as text; ``command``, ``options`` and ``as_yaml()`` are the `ingest` that the file calls for, ``refused``
        why it would not succeed.

    Raises
    ------
    PtychodaskError
        If there is no such file, it is damaged, or holds no array of numbers.

    Notes
    -----
    A sample of `SAMPLE_FRAMES` patterns is read, positions and the probe whole, and no other array. Of a compressed
    NPZ, which cannot be read in the middle, it is taken from the first `STREAM_BYTES`; an archive packed by bzip2 is
    unpacked into a temporary folder (scratch=).
    """
    named = parse_location(path)
    if isinstance(named, S3Location) or named.is_dir():
        if format is not None or recipe is not None or reader_options:
            said = {"format": format, "recipe": recipe, **reader_options}
            options = ", ".join(sorted(name for name, value in said.items() if value is not None))
            raise PtychodaskError(f"{named}: is a store, which has no {options} to choose; leave it out")
        return inspect_store(named)
    path = named
    spec = with_fields(IngestSpec(), with_recipe(recipe, reader_options))
    with tempfile.TemporaryDirectory(prefix="ptychodask-") as folder, ExitStack() as stack:
        container = open_container(path, Path(folder) if spec.scratch is None else Path(spec.scratch), stack)
        return _Look(path, container, format, spec, Path(folder), stack).inspection()


class _Look:
    """One look at a file: what is found is added step by step."""

    def __init__(
        self, path: Path, container: Container, format: str | None, spec: IngestSpec, scratch: Path, stack: ExitStack
    ) -> None:
        self.path, self.container, self.scratch, self.stack = path, container, scratch, stack
        self.options = spec.given()
        self.findings: list[Finding] = []
        self.refused: list[str] = []
        self.arrays = note_arrays(container)
        if not self.arrays:
            raise PtychodaskError(f"{container.label}: holds no arrays")
        if not any(note.kind for note in self.arrays):
            raise PtychodaskError(
                f"{container.label}: holds no array of numbers: '{self.arrays[0].key}' is {self.arrays[0].dtype}; "
                "save plain numbers"
            )
        self.format = format or _recognised(container, spec)

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
        found = gridded = None
        if "domain" in options_of(str(self.format)):
            sample = None if patterns is None else self._sample(patterns, keys)
            if sample is not None and self.format == "mapping" and {"y", "position"} & set(keys):
                self._propose_units(keys, sample)
            found = None if self.refused else self._read()
        else:
            # Such a format leaves nothing open of its patterns, and its reader alone knows where they are.
            found = self._read()
            sample = None if found is None else self._taken(found.frames)
        if found is not None and not self.refused:
            gridded = self._gridded(found)
        if sample is not None:
            self._look_at_patterns(sample, found)
        if found is not None and sample is not None:
            self._look_at_positions(found, gridded, sample)
        return self._told(guessed, sample, found)

    def _say(self, topic: str, statement: str, certainty: Certainty) -> None:
        self.findings.append(Finding(topic, statement, certainty))

    def _propose(self, patterns: ArrayNote | None, keys: dict[str, str]) -> None:
        """A mapping for keys that no format knows."""
        self.format = "mapping"
        if patterns is None:
            large = [note for note in self.arrays if len(frame_axes(note.shape)) > 3 and note.kind in set("iuf")]
            hint = "".join(f"; '{n.key}' has shape {n.shape}: make one axis of the scan's" for n in large[:1])
            self.refused.append(f"it holds no array of patterns, real numbers of shape (pattern, qy, qx){hint}")
            return
        if not {"y", "position"} & set(keys):
            axes = frame_axes(patterns.shape)
            likely = [n for n in self.arrays if n.kind == "f" and axes[0] in n.shape and len(n.shape) == 2]
            hint = "".join(f"; '{n.key}' has shape {n.shape}, which ingest does not take" for n in likely[:1])
            self.refused.append(
                f"it holds no positions for {axes[0]} patterns: two arrays ({axes[0]},) or one ({axes[0]}, 2) "
                f"in the order (y, x){hint}"
            )
        self.options["keys"] = keys
        self._say("mapping", "its keys belong to no known format; shapes, types and names fit these", "guess")
        if "position" in keys:
            self._say("axes", f"'{keys['position']}' is taken as (y, x); check it with --check-axes", "guess")
        elif "y" in keys:
            told = f"y is '{keys['y']}' and x '{keys['x']}', by their names"
            self._say("axes", f"{told}; check it with --check-axes", "guess")
        self._propose_mask(keys)
        for optic in find_optics(self.container, self.arrays):
            if optic.option not in self.options:
                self.options[optic.option] = optic.value
                told = f"{optic.option} {optic.value:.6g}, from '{optic.key}' in {optic.unit}"
                self._say("optics", told, "guess" if optic.is_guess else "noted")

    def _propose_mask(self, keys: dict[str, str]) -> None:
        """Take a mask that is True on most pixels; leave out one that is not, since it marks the bad ones."""
        if "mask" not in keys:
            return
        good = float((self.container.array(keys["mask"]) != 0).mean())
        if good > 0.5:
            self._say(
                "mask", f"'{keys['mask']}' is not 0 on {100 * good:.1f} % of the pixels, so not 0 is good", "guess"
            )
            return
        left_out = keys.pop("mask")
        told = f"'{left_out}' is 0 on {100 - 100 * good:.1f} % of the pixels, so 0 seems good: invert it for --mask"
        self._say("mask", f"left out: {told}", "guess")

    def _mark(self, keys: dict[str, str]) -> None:
        roles = {key: name for name, key in keys.items()}
        self.arrays = [replace(note, role=roles.get(note.key)) for note in self.arrays]

    def _sample(self, patterns: ArrayNote, keys: dict[str, str]) -> Sample | None:
        """Some patterns; settles what their values, axes and frames leave open."""
        axes = frame_axes(patterns.shape)
        positions = next((n for n in self.arrays if n.key == (keys.get("y") or keys.get("position"))), None)
        n_positions = None if positions is None else max(positions.shape)
        last = self._pattern_axis_is_last(axes, n_positions)
        try:
            frames = self.container.frames(patterns.key, pattern_last=last)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        sample = self._taken(frames)
        if sample is not None:
            self._settle_domain(patterns, sample)
        return sample

    def _taken(self, frames: Frames) -> Sample | None:
        """Some frames; settles their size."""
        if max(frames.shape[1:]) > MOST_PIXELS:
            self.refused.append(f"patterns have shape {tuple(frames.shape)}, which is wider than any detector")
            return None
        try:
            sample = take_sample(frames)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        height, width = sample.frames.shape[1:]
        if "n_pixels" not in self.options and "bin" not in self.options and (height != width or height % 4):
            self.options["n_pixels"] = min(height, width) // 4 * 4
            told = f"frames are {height} x {width}: cropped to a square whose side 4 divides"
            self._say("size", told, "measured")
        return sample

    def _pattern_axis_is_last(self, axes: tuple[int, ...], n_positions: int | None) -> bool:
        if "axes" in self.options:
            return bool(self.options["axes"] == "qy,qx,pattern")
        first, last = axes[0] == n_positions, axes[-1] == n_positions
        if first and last and "axes" in options_of(str(self.format)):
            self.options["axes"] = "pattern,qy,qx"
            self._say("axes", f"shape {axes} with {n_positions} positions fits two orders of axes", "open")
        return last and not first

    def _settle_domain(self, patterns: ArrayNote, sample: Sample) -> None:
        """Say whether patterns are counts or amplitudes; put it into the options where the format leaves it open."""
        seen, certainty, evidence = domain_of(sample.frames)
        if "domain" in self.options:
            self._say("values", f"{self.options['domain']}, as you say; the file has {evidence}", "noted")
            return
        if "domain" not in options_of(str(self.format)):
            return  # Told once the reader has said it.
        of_floats = self.format == "ptychopinn" and sample.frames.dtype.kind == "f"
        if of_floats and seen != "counts":
            self._say("values", f"amplitude, as the format defines for floats; the file has {evidence}", "defined")
            return
        named: Domain = "amplitude" if _AMPLITUDE.search(patterns.name) else "counts"
        self.options["domain"] = seen or named
        if seen is None:
            evidence += f"; nothing tells, so the command says {named}: check it"
        elif of_floats:
            evidence += "; against the format, which has amplitudes in floats"
        self._say("values", f"{self.options['domain']}: {evidence}", certainty)

    def _propose_units(self, keys: dict[str, str], sample: Sample) -> None:
        """Unit of the positions, and a pixel size where they need one."""
        key = keys.get("position") or keys["y"]
        noted = (self.container.unit(key) or "").strip().lower()
        if "units" in self.options:
            unit = self.options["units"]
        elif noted in UNIT_NAMES:
            unit = UNIT_NAMES[noted]
            self._say("units", f"positions are in {unit}: '{key}' notes {noted}", "noted")
        else:
            extent = float(np.nanmax(np.ptp(_finite_rows(self.container.array(key)), axis=0), initial=0.0))
            ending = UNIT_NAMES.get(key.rsplit("_", 1)[-1].lower()) if "_" in key else None
            unit = ending or ("m" if 0 < extent < METRES_BELOW else "px")
            why = "its name ends so" if ending else "nothing notes a unit; micrometres look the same as pixels"
            why = "so small a number is neither pixels nor micrometres" if not ending and unit == "m" else why
            self.options["units"] = unit
            self._say("units", f"positions are in {unit}: they extend over {extent:.3g}, {why}", "guess")
        optics = wavelength_of(self.options) and {"distance_m", "detector_pixel_m"} <= set(self.options)
        if unit != "px" and not optics and "pixel_size_m" not in self.options:
            self._guess_pixel_size(keys, unit, sample)

    def _guess_pixel_size(self, keys: dict[str, str], unit: str, sample: Sample) -> None:
        """A pixel size that makes the command run; said to be no more than that."""
        chosen = [keys["position"]] if "position" in keys else [keys["y"], keys["x"]]
        columns = [self.container.array(key) for key in chosen]
        step = median_step_px(_finite_rows(np.stack([np.squeeze(c) for c in columns], axis=-1).reshape(-1, 2)))
        diameter = least_probe_diameter_px(_as_counts(sample, self.options.get("domain", "counts")))
        if not step or not diameter:
            return
        guess = float(f"{step * {'um': 1e-6, 'm': 1.0}[unit] / (USUAL_STEP * diameter):.2g}")
        self.options["pixel_size_m"] = guess
        told = (
            f"the file does not say it; {guess:g} m makes the step {USUAL_STEP:g} of the probe's diameter, a usual one"
        )
        self._say("pixel size", f"{told}. REPLACE it by yours, or pass energy, distance and detector pixel", "open")

    def _read(self) -> SourceScan | None:
        """What the reader makes of the options; a refusal is noted."""
        try:
            spec = with_fields(IngestSpec(), self.options)
            source = read_source(self.path, self.container, str(self.format), spec, self.scratch, self.stack)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        if source.companion is not None:
            self._say("files", f"the other one of the two is {source.companion}", "defined")
        return source.scan

    def _gridded(self, found: SourceScan) -> GriddedSource | None:
        """Where the patterns lie; a refusal is noted."""
        lost = np.flatnonzero(~np.isfinite(found.position_yx).all(axis=1))
        if found.rows is not None:
            told = f"{len(found.rows)} of {len(found.position_yx)} patterns have one; the others are left out"
            self._say("positions", told, "defined")
        elif 0 < len(lost) < len(found.position_yx) and "drop_frames" not in self.options:
            self.options["drop_frames"] = as_rows(lost)
            self._say("positions", f"{len(lost)} of them are not finite: their patterns are left out", "measured")
        try:
            gridded = on_grid(found, with_fields(IngestSpec(), self.options), self.container.label)
            self._look_at_shadows(found, gridded)
        except PtychodaskError as error:
            self.refused.append(str(error))
            return None
        return gridded

    def _look_at_shadows(self, found: SourceScan, gridded: GriddedSource) -> None:
        """Refuse patterns of the near field, where a few can be read from all over the file."""
        if not found.frames.seekable or gridded.spec.far_field:
            return
        patterns = prepared(found, gridded, self.container.label)
        reason = near_field(patterns, gridded.position_yx_px, gridded.grid.n_pixels, found.domain)
        if reason is not None:
            self.refused.append(f"{reason}; --far-field takes it as it is")

    def _look_at_patterns(self, sample: Sample, found: SourceScan | None) -> None:
        frames, domain = sample.frames, self._domain(found)
        n, height, width = sample.n_frames, *frames.shape[1:]
        mean = mean_pattern(sample, domain)
        if found is not None and "domain" not in options_of(str(self.format)):
            seen, certainty, evidence = domain_of(frames)
            clash = "; that is against it" if certainty == "measured" and seen != domain else ""
            self._say("values", f"{domain}, as the format defines; the file has {evidence}{clash}", "defined")
        told = f"{n} of {height} x {width} {frames.dtype}; {sample.told} looked at; mean counts of one {mean.sum():.4g}"
        self._say("patterns", told, "measured")
        self._look_at_beam(mean, found)
        good = np.ones(mean.shape, bool) if found is None or found.mask is None else found.mask
        if good.shape != mean.shape:
            return
        hot, dead = bad_pixels(sample, mean, good)
        self._say(
            "pixels", f"{hot.sum()} hot, {dead.sum()} dead, {n_saturated(frames)} saturated in one pattern", "measured"
        )
        values = frames[:, good]
        for wrong, what in ((~np.isfinite(values), "not finite"), (values < 0, "negative")):
            rows = sample.rows[wrong.any(axis=1)]
            if len(rows):
                listed = ",".join(map(str, rows[:5])) + (",..." if len(rows) > 5 else "")
                self.refused.append(
                    f"values that are {what} in {len(rows)} of {len(sample.rows)} patterns looked at (rows {listed}); "
                    "leave them out with --drop-frames, or mark the pixels bad with --mask"
                )

    def _look_at_beam(self, mean: NDArray[np.float64], found: SourceScan | None) -> None:
        seen, evidence = beam_of(mean)
        if self.format == "mapping":
            if "dc" not in self.options and seen == "corner":
                self.options["dc"] = "corner"
            told = f"in the {self.options.get('dc', 'centre')}"
            self._say("beam", f"{told}: {evidence}", "measured" if seen else "open")
        elif found is not None:
            clash = "; that is against it" if seen not in (None, found.dc) else ""
            self._say("beam", f"in the {found.dc}, as the format defines; {evidence}{clash}", "defined")
        off = off_centre_px(np.fft.fftshift(mean) if self._dc(found) == "corner" else mean)
        if off is not None and "centre" not in self.options:
            middle = tuple(n // 2 for n in mean.shape)
            told = f"the centre of mass is at ({off[0]:.1f}, {off[1]:.1f}), the middle at {middle}"
            self._say("beam", f"{told}; --centre {off[0]:.0f},{off[1]:.0f} would bring it there", "measured")

    def _look_at_positions(self, found: SourceScan, gridded: GriddedSource | None, sample: Sample) -> None:
        position = found.position_yx
        finite = np.isfinite(position).all(axis=1)
        repeated = int(finite.sum()) - len(np.unique(position[finite], axis=0))
        if finite.any():
            (y0, x0), (y1, x1) = position[finite].min(axis=0), position[finite].max(axis=0)
            told = f"{len(position)}: y {y0:.4g} to {y1:.4g}, x {x0:.4g} to {x1:.4g} {found.unit}"
            told += f"; {int((~finite).sum())} not finite, {repeated} repeat another"
            self._say("positions", told, "measured")
        if gridded is None:
            return
        if gridded.truth is not None:
            self._say("truth", "its object covers the scan and becomes the truth", "defined")
        if any(finding.topic == "pixel size" for finding in self.findings):
            return  # Made up so that the overlap is a usual one.
        if found.unit != "px" and gridded.pixel_size_m is not None:
            guessed = any(finding.topic == "optics" and finding.certainty == "guess" for finding in self.findings)
            self._say("pixel size", f"{gridded.pixel_size_m:.4g} m in the object", "guess" if guessed else "noted")
        self._look_at_overlap(found, gridded, sample)

    def _look_at_overlap(self, found: SourceScan, gridded: GriddedSource, sample: Sample) -> None:
        step = median_step_px(gridded.position_yx_px)
        scale = gridded.grid.position_scale_yx[0]
        if found.probe is not None and found.probe.shape[1:] == sample.frames.shape[1:]:
            diameter, known = probe_diameter_px(found.probe) * scale, "the file's probe is"
        else:
            counts = _as_counts(sample, found.domain)
            # A hot pixel is the same in all patterns and drowns their speckles.
            counts[:, bad_pixels(sample, counts.mean(axis=0))[0]] = 0
            least = least_probe_diameter_px(counts)
            diameter, known = (least or 0.0) * scale, "judged by its speckles, the probe is at least"
        if not step or not diameter:
            return
        share = step / diameter
        told = f"the median step is {step:.3g} px; {known} {diameter:.3g} px wide"
        if share < WIDEST_OVERLAPPING:
            self._say("overlap", f"{told}: {100 * (1 - share):.0f} %", "measured")
        else:
            self._say(
                "overlap", f"{told}: neighbours do not overlap, or units, pixel size or probe are wrong", "measured"
            )

    def _domain(self, found: SourceScan | None) -> Domain:
        return found.domain if found is not None else self.options.get("domain", "counts")

    def _dc(self, found: SourceScan | None) -> str:
        return found.dc if found is not None and self.format != "mapping" else self.options.get("dc", "centre")

    def _told(self, guessed: bool, sample: Sample | None, found: SourceScan | None) -> Inspection:
        what = "no format that is known by its keys" if guessed else f"format {self.format!r}"
        runs = sample is not None and found is not None
        origin = Origin(self.path, str(self.format), self.options, self._domain(found))
        return Inspection(
            label=str(self.path),
            what=what,
            arrays=self.arrays,
            findings=self.findings,
            refused=self.refused,
            options=self.options,
            command=origin.command(store_name(self.path)) if runs else None,
            preview=None if sample is None else self._preview(sample, found),
        )

    def _preview(self, sample: Sample, found: SourceScan | None) -> Preview:
        counts = _as_counts(sample, self._domain(found))
        turned: Callable[[Any], Any] = np.fft.fftshift if self._dc(found) == "corner" else np.asarray
        chosen = np.unique(np.linspace(0, len(counts) - 1, PREVIEW_PATTERNS).astype(int))
        return Preview(
            mean=turned(counts.mean(axis=0)),
            patterns={int(sample.rows[k]): turned(counts[k]) for k in chosen},
            position_yx=None if found is None else found.position_yx,
            unit="px" if found is None else found.unit,
        )


def _recognised(container: Container, spec: IngestSpec) -> str | None:
    try:
        return detect_format(container, spec)
    except PtychodaskError:
        return None


def _finite_rows(position: NDArray[Any]) -> NDArray[np.float64]:
    """Positions (k, ...) that are finite, at least one."""
    rows = np.squeeze(np.asarray(position, np.float64))
    rows = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
    kept = rows[np.isfinite(rows).all(axis=1)]
    return kept if len(kept) else np.zeros((1, rows.shape[1]))


def _as_counts(sample: Sample, domain: Domain) -> NDArray[np.float64]:
    """Sampled patterns as counts (k, h, w); what is negative or not finite counts as 0."""
    values = np.nan_to_num(sample.frames.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return np.maximum(values, 0) if domain == "counts" else np.square(values)
