"""Segments added to a growing scan, read as its first one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.io.grid import GriddedSource, on_grid
from ptychodask.io.patterns import pattern_parts
from ptychodask.io.provenance import open_source, provenance_of
from ptychodask.io.source import IngestSpec, SourceScan
from ptychodask.options import names_where
from ptychodask.scan import Scan
from ptychodask.storage.location import LocalLocation
from ptychodask.storage.records import plain
from ptychodask.store import open_scan
from ptychodask.store.append import append_segment

OF_EACH_SEGMENT = names_where(IngestSpec, segment="each")
"""Options that may differ between the segments of a growing scan."""


OF_FIRST_SEGMENT = names_where(IngestSpec, segment="first")
"""Options for properties that all segments of a growing scan have from the first."""


def append_source(
    source: Path, store: LocalLocation, format: str | None, spec: IngestSpec, progress: bool | None
) -> Scan:
    """Append a file to a growing scan, as one more segment."""
    scan = open_scan(store)
    recorded = scan.attributes.get("provenance", {})
    if scan.attributes["state"] != "growing" or not {"options", "reader"} <= recorded.keys():
        raise PtychodaskError(
            f"{store}: the scan is complete, or was not started with append=True (--append), which only adds to "
            "growing scans; pass another store"
        )
    spec = _with_first_options(spec, recorded, str(store))
    with open_source(source, store, format or recorded["reader"], spec) as (opened, scratch, stack):
        label = opened.container.label
        provenance = provenance_of(source, opened, spec)
        file_scan = _without_mask(opened.scan, scan, spec, label)
        gridded = on_grid(file_scan, spec, label)
        _check_same_scan(scan, recorded, file_scan, gridded, opened.format, label)
        if spec.saturated == "mask":
            _check_saturated(scan, gridded, label)
        gridded = replace(gridded, mask=scan.mask)
        return append_segment(
            store,
            **pattern_parts(file_scan, gridded, label, scratch, stack, progress),
            provenance=provenance,
            progress=progress,
        )


def _with_first_options(spec: IngestSpec, recorded: dict[str, Any], label: str) -> IngestSpec:
    """Options of a scan's first segment, with `OF_EACH_SEGMENT` of this one."""
    first, given = recorded["options"], plain(spec.given())
    for name, value in given.items():
        if name not in OF_EACH_SEGMENT and value != first.get(name):
            raise PtychodaskError(
                f"{label}: {name} was {first.get(name, 'not given')!r} for the first segment and is {value!r} now; a "
                "scan keeps the options of its first segment: leave it out, or ingest into another store"
            )
    kept = {name: value for name, value in first.items() if name not in (*OF_EACH_SEGMENT, *OF_FIRST_SEGMENT)}
    of_segment = {name: getattr(spec, name) for name in OF_EACH_SEGMENT}
    # The centre of the first segment is reused: another one would shift the patterns.
    centre = {"centre": tuple(recorded["centre_yx"])} if "centre_yx" in recorded and "centre" in kept else {}
    return with_fields(IngestSpec(), {**kept, **centre, **of_segment})


def _without_mask(file_scan: SourceScan, scan: Scan, spec: IngestSpec, label: str) -> SourceScan:
    """Content of a file without its mask, which must be the scan's."""
    if file_scan.mask is None:
        return file_scan
    mask = on_grid(replace(file_scan, probe=None, label=None), spec, label).mask
    if scan.mask is None or mask is None or not np.array_equal(mask, scan.mask):
        raise PtychodaskError(
            f"{label}: its mask differs from that of the first segment of {scan.store}, which the scan keeps; ingest "
            "into another store"
        )
    return replace(file_scan, mask=None)


def _check_same_scan(
    scan: Scan, recorded: dict[str, Any], file_scan: SourceScan, gridded: GriddedSource, name: str, label: str
) -> None:
    """Raise `PtychodaskError` if a file does not fit a scan's first segment."""
    properties: dict[str, tuple[Any, Any]] = {
        "format": (recorded["reader"], name),
        "domain": (scan.domain, file_scan.domain),
        "n_pixels": (scan.n_pixels, gridded.grid.n_pixels),
        "pixel_size_m": (_rounded(scan.pixel_size_m), _rounded(gridded.pixel_size_m)),
    }
    for property_name, (first, now) in properties.items():
        if first != now:
            raise PtychodaskError(
                f"{label}: {property_name} is {now!r}, expected {first!r} as in the first segment of {scan.store}; "
                "ingest into another store"
            )


def _check_saturated(scan: Scan, gridded: GriddedSource, label: str) -> None:
    """Raise `PtychodaskError` if pixels are saturated that the scan's mask calls good."""
    good = np.ones((scan.n_pixels, scan.n_pixels), bool) if scan.mask is None else scan.mask
    more = 0 if gridded.mask is None else int((good & ~gridded.mask).sum())
    if more:
        raise PtychodaskError(
            f"{label}: {more} pixels hold no counts here but are good in the first segment of {scan.store}, whose mask "
            "the scan keeps; ingest all segments again with a mask= of the detector that covers them"
        )


def _rounded(size_m: float | None) -> str | None:
    """Length as text, so that sizes that differ by rounding are equal."""
    return None if size_m is None else f"{size_m:.9g}"
