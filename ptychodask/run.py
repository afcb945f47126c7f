"""First reconstruction of a file: inspect, ingest, probe, reconstruct."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.inspection import inspect_file
from ptychodask.inspection.command import store_name
from ptychodask.io.folders import is_foreign_folder
from ptychodask.io.ingest import ingest
from ptychodask.iterative import refine_probe
from ptychodask.judging.plotting import plot
from ptychodask.judging.residuals import residuals
from ptychodask.models.choose import recorded_model
from ptychodask.models.pretrained import pretrained_for
from ptychodask.reconstruction import reconstruct
from ptychodask.reconstruction.flat import ITERATIVE
from ptychodask.scan import Scan
from ptychodask.storage.location import parse_location
from ptychodask.store import open_scan

PROBE_PATTERNS = 2000
"""Patterns that refine the probe, at most: more take longer and add little."""

NOISE_R = 0.3
"""R above which the next steps look for a wrong input; a good probe and object reach half of it or less."""


def run_file(
    source: str | Path,
    store: str | Path | None = None,
    *,
    model: str | None = None,
    format: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **reader_options: Any,
) -> Iterator[str]:
    """Steps from a file to a picture, with a text for each.

    Parameters
    ----------
    source : path
        File that `ingest` can read, or the store of a scan.
    store : path, optional
        Store to write; by default named after the file, in the current folder.
    model : str, optional
        As for `reconstruct`. By default the model recorded in the store or the packaged one for N pixels, else
        "iterative".
    format, **reader_options
        As for `ingest`, in addition to what `inspect_file` proposes.
    overwrite : bool
        Replace an existing store, result and figure.
    progress : bool, optional
        See `progress_bar`.

    Yields
    ------
    str
        What was found or done; the last one gives R, the figure and what to try next.

    Raises
    ------
    PtychodaskError
        If the file cannot be ingested as it is, an output exists, or a step fails.

    Notes
    -----
    Each step is the function of its name with its defaults, so that it can be repeated alone. The probe of a simulated
    scan, or one that was refined before, is kept.
    """
    path = _store_path(source, store)
    out = path.with_name(f"{path.name.removesuffix('.zarr')}.object.zarr")
    # Before any work, since reconstruction comes last.
    if parse_location(out).exists() and not overwrite:
        raise PtychodaskError(f"run: {out} exists already; pass overwrite=True (--overwrite), or move it")
    inspection = inspect_file(source, format=format, **reader_options)
    yield f"{inspection}\n"
    if inspection.refused:
        raise PtychodaskError(
            f"run: {source} cannot be ingested as it is: {'; '.join(inspection.refused)}; add the options that answer "
            "this to run"
        )
    if not _is_store(source):
        scan = ingest(source, path, format=format, overwrite=overwrite, progress=progress, **inspection.options)
        yield f"{path}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, {scan.domain}"
    scan = open_scan(path)
    if scan.truth is None and "probe_refinement" not in scan.attributes:
        fraction = min(1.0, PROBE_PATTERNS / scan.n_patterns)
        refined = refine_probe(path, fraction=fraction, progress=progress)
        outcome = "stored" if refined.stored else f"not stored: {refined.problem}"
        yield f"probe: R {refined.r_before:.4f} -> {refined.r_after:.4f} on held-out patterns; {outcome}"
    chosen = _default_model(scan) if model is None else model
    result = reconstruct(path, chosen, out=out, overwrite=overwrite, progress=progress)
    results = {f"{name}.zarr": ds for name, ds in result.items()} if isinstance(result, dict) else {"": result}
    r_factors = []
    for name, ds in results.items():
        figure = _figure_path(out, name)
        plot(ds, path=figure)
        r_factors.append(float(residuals(ds, path, progress=progress).attrs["r_factor"]))
        yield f"{out / name}: R {r_factors[-1]:.4f}; figure {figure}"
    yield "\n".join(
        ["", "Try next:", *(f"  {line}" for line in _next_steps(path, out / next(iter(results)), chosen, r_factors))]
    )


def _figure_path(out: Path, name: str) -> Path:
    """Figure beside a result; for a bucket, in the current folder."""
    result = parse_location(out / name)
    title = result.name.removesuffix(".zarr")
    return (result.local_path or Path(title)).with_name(f"{title}.png")


def _is_store(source: str | Path) -> bool:
    """True for a store; False for files and folders of other programs."""
    location = parse_location(source)
    return location.local_path is None or (location.is_dir() and not is_foreign_folder(location.local_path))


def _store_path(source: str | Path, store: str | Path | None) -> Path:
    """Path of the store of a run."""
    if store is None:
        return Path(source) if _is_store(source) else Path(store_name(Path(source)))
    if _is_store(source):
        raise PtychodaskError(f"run: {source} is a store itself, but {store} is another; leave it out")
    return Path(store)


def _default_model(scan: Scan) -> str | None:
    """None if `reconstruct` finds a network by itself, else the iterative engine."""
    has_network = recorded_model(scan) is not None or pretrained_for(scan.n_pixels) is not None
    return None if has_network else ITERATIVE


def _next_steps(store: Path, result: Path, model: str | None, r_factors: list[float]) -> Iterator[str]:
    """Commands to try next; if R is high, checks first."""
    scan = shlex.quote(str(store))
    again = scan if model is None else f"{scan} --model {shlex.quote(model)}"
    steps = {
        f"ptychodask report {shlex.quote(str(result))} --scan {scan}": "figures, residuals and methods in one file",
        f"ptychodask reconstruct {again} --refine-positions --overwrite": "refine the positions too",
        f"ptychodask train {scan} --max-minutes 10": "a network for this scan; reconstruct then uses it",
    }
    if max(r_factors) > NOISE_R:
        wrong = {
            f"ptychodask inspect {scan} --check-axes": "are the positions swapped, flipped or rotated?",
            f"ptychodask refine-probe {scan} --search-defocus": "is the probe out of focus?",
        }
        yield f"R is above {NOISE_R:g}: an input may be wrong, see the page 'My picture is noise' of the documentation."
        steps = wrong | steps
    width = max(map(len, steps))
    yield from (f"{command:<{width}}  # {purpose}" for command, purpose in steps.items())
