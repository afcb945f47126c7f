"""`ingest`: conversion of a foreign file to a store, block by block."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.io.append import append_source
from ptychodask.io.evidence import SAMPLE_FRAMES, domain_of, spread_rows
from ptychodask.io.formats import Source
from ptychodask.io.geometry import HC_EV_M
from ptychodask.io.grid import GriddedSource, on_grid
from ptychodask.io.initial_probe import initial_probe
from ptychodask.io.patterns import pattern_parts
from ptychodask.io.plausible import overlap_of, sampled_counts
from ptychodask.io.provenance import open_source, provenance_of
from ptychodask.io.recipe import with_recipe
from ptychodask.io.source import IngestSpec, SourceScan
from ptychodask.options import takes_fields
from ptychodask.scan import PatternSource, Scan
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.store import SCAN
from ptychodask.store.write import write_scan

logger = logging.getLogger(__name__)


@takes_fields(IngestSpec)
def ingest(
    source: str | Path,
    store: LocationLike,
    *,
    format: str | None = None,
    recipe: str | Path | None = None,
    append: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **reader_options: Any,
) -> Scan:
    """Convert a foreign file to a store, or append it to one.

    Parameters
    ----------
    source : path
        An NPZ (also .npz.bz2), HDF5 or MATLAB file, or a folder of .npy files or Zarr.
    store : path
        Store to write; it appears when it is complete. With `append`, a segment is added to an existing store.
    format : {"ptychopinn", "tike", "ptychodus", "nexus", "cxi", "hxn", "mapping"}, optional
        Format of the file; by default detected from its keys, or "mapping" if `keys` is given.
    recipe : path, optional
        A YAML file of options, as `inspect` writes it; options passed here take precedence.
    append : bool
        The file is one segment of a growing scan (the first if there is no store yet), until `finish_scan`.
    overwrite : bool
        Replace an existing store.
    progress : bool, optional
        True shows a progress bar, False does not; None shows it in a terminal and in Jupyter.
    **reader_options
        Fields of `IngestSpec`; other names are refused.

    Returns
    -------
    Scan
        The new store, opened.

    Raises
    ------
    PtychodaskError
        If the file or an option is invalid, or the disk cannot be written; no store is written, and an existing one is
        kept.

    Notes
    -----
    A growing scan keeps the properties of its first segment: probe, mask, normalisation, calibration, unit of the
    patterns, pixel size. Options need not be passed again; only `diffraction`, `positions`, `drop_frames` and
    `scratch` may differ between segments. Readers see complete segments only (see `append_segment`).

    Only a few blocks of frames are in memory, however large the file. A file that cannot be read in any order
    (compressed, or with patterns along its last axis) is first written to a scratch file; compressed frames are already
    cropped there.
    """
    source, store = Path(source), parse_location(store)
    folder = store.local_path
    spec = with_fields(IngestSpec(), with_recipe(recipe, reader_options))
    if append and overwrite:
        raise PtychodaskError(f"{store}: append=True adds to the scan, overwrite=True replaces it; pass one of them")
    if append and folder is None:
        raise PtychodaskError(
            f"{store}: append=True needs a store on disk, not in an object store; append to one on disk, and copy it "
            "when the scan is complete"
        )
    if append and folder is not None and folder.exists():
        return append_source(source, folder, format, spec, progress)
    store.check_vacant(overwrite=overwrite, kind=SCAN)
    with open_source(source, store, format, spec) as (opened, scratch, stack):
        gridded = on_grid(opened.scan, spec, opened.container.label)
        scan_parts = _prepare(opened, gridded, scratch, stack, progress)
        provenance = provenance_of(source, opened, spec)
        if append:
            provenance["centre_yx"] = list(gridded.grid.centre_yx)
        return write_scan(
            store, provenance=provenance, growing=append, overwrite=overwrite, progress=progress, **scan_parts
        )


def _prepare(
    opened: Source, gridded: GriddedSource, scratch: Path, stack: ExitStack, progress: bool | None
) -> dict[str, Any]:
    """Keyword arguments of `write_scan` from the content of a file."""
    file_scan, label, spec = opened.scan, opened.container.label, gridded.spec
    parts = pattern_parts(file_scan, gridded, label, scratch, stack, progress)
    probe, calibration = initial_probe(file_scan, spec, gridded.grid, parts["diffraction"], gridded.mask, label)
    _warn_of_overlap(file_scan, gridded, parts["diffraction"], probe, label)
    _warn_of_values(file_scan, parts["diffraction"], gridded.mask, label)
    return parts | {
        "probe": probe,
        "domain": file_scan.domain,
        "calibration": calibration,
        "incident_counts": spec.incident_counts,
        "mask": gridded.mask,
        "truth": gridded.truth,
        "pixel_size_m": gridded.pixel_size_m,
        "energy_ev": _photon_energy_ev(spec),
        "distance_m": spec.distance_m,
    }


def _photon_energy_ev(spec: IngestSpec) -> float | None:
    """Photon energy; None for electrons, whose wavelength does not follow from it."""
    if spec.particle == "electron":
        return None
    return HC_EV_M / spec.wavelength_m if spec.wavelength_m else spec.energy_ev


def _warn_of_values(
    file_scan: SourceScan, diffraction: PatternSource, mask: NDArray[np.bool_] | None, label: str
) -> None:
    """Log a warning if the values contradict their domain."""
    frames = np.asarray(diffraction[spread_rows(diffraction.shape[0], SAMPLE_FRAMES)])
    detected, certainty, evidence = domain_of(frames if mask is None else np.where(mask, frames, 0))
    if certainty == "measured" and detected is not None and detected != file_scan.domain:
        logger.warning(
            "%s: patterns are taken for %s, but look like %s (%s): contrast and R will be wrong; ingest again with "
            "--domain %s, or by the keys of the file (--key diffraction=... --domain %s) if its format has no choice",
            label,
            _PLURAL[file_scan.domain],
            _PLURAL[detected],
            evidence,
            detected,
            detected,
        )


_PLURAL = {"counts": "counts", "amplitude": "amplitudes"}


def _warn_of_overlap(
    file_scan: SourceScan,
    gridded: GriddedSource,
    diffraction: PatternSource,
    probe: NDArray[np.complex64] | None,
    label: str,
) -> None:
    """Log a warning if the step is unlikely for patterns and probe."""
    is_measured = file_scan.probe is not None and gridded.spec.probe in (None, "file")
    counts = None if is_measured else sampled_counts(diffraction, file_scan.domain, gridded.mask)
    overlap = overlap_of(gridded.position_yx_px, probe if is_measured else None, counts)
    if overlap is not None and overlap.problem is not None:
        logger.warning("%s: %s: %s; check them by inspect", label, overlap.statement, overlap.problem)
