"""Reconstruction into a result store on a disk or in a bucket.

A stopped run is resumed from its ledger.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import distributed
import xarray as xr

from ptychodask.errors import PtychodaskError
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.prediction import stage
from ptychodask.pyramid import write_pyramid
from ptychodask.reconstruction.follow import FollowedScan, growing_identity
from ptychodask.reconstruction.ledger import Ledger, check_same
from ptychodask.reconstruction.live import Screen, screen_for
from ptychodask.reconstruction.run import Run, RunFolders, identity, rates, run_reconstruction
from ptychodask.result import PYRAMID, RESULT, create_result, finish_result, open_result
from ptychodask.storage.atomic import Writing, atomic_store, is_complete, is_resumable
from ptychodask.storage.location import Location, remove
from ptychodask.storage.records import differences

logger = logging.getLogger(__name__)


SUMS_FOLDER = "sums"
"""Folder of the sums of chunks, beside a result that is being written."""


STITCHED_FOLDER = "stitched"
"""Store of the tiles that are still to be polished, beside a result that is being written."""


def write_result(
    run: Run,
    path: Location,
    client: distributed.Client | None,
    started: float,
    progress: bool | None,
    *,
    overwrite: bool,
    resume: bool,
    followed: FollowedScan | None = None,
) -> xr.Dataset:
    """Reconstruct into a result store, tile by tile, and open it.

    Parameters
    ----------
    run : Run
    path : Location
    client, progress, overwrite, resume
        As for `reconstruct`.
    started : float
        `time.perf_counter` at the beginning of the run.
    followed : FollowedScan, optional
        For a growing scan: completes it before the tiles are stitched.
    """
    if str(path.resolve()) == run.plan.store:
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another path with out=")
    if resume and is_complete(path) and not is_resumable(path):
        stored = open_result(path)
        if not overwrite:
            check_same(identity(stored.attrs), identity(run.attributes), str(path))
        if not differences(identity(stored.attrs), identity(run.attributes)):
            logger.info("%s: is complete already", path)
            return stored
    with atomic_store(path, overwrite=overwrite, kind=RESULT, resume=resume) as writing:
        screen = screen_for(run.spec.live)
        made_by = identity(run.attributes) if followed is None else growing_identity(run)
        ledger = Ledger(writing.beside, made_by)
        try:
            if followed is not None:
                assert isinstance(writing.beside, Path)
                run = followed.complete(run, ledger, writing.beside / SUMS_FOLDER, screen)
            report = _run_into(run, writing, ledger, client, progress, screen)
        except PtychodaskError as error:
            if not ledger.exists:
                raise
            raise PtychodaskError(
                f"{error}; what is finished is kept: continue with resume=True (--resume), or start again with "
                "overwrite=True (--overwrite)"
            ) from error
        if run.spec.pyramid:
            with stage(report["seconds"], "pyramid"):
                write_pyramid(writing.whole)
        writing.check_held()
        finish_result(writing.whole, run.attributes | rates(run.plan, report, started))
    return open_result(path)


def _run_into(
    run: Run,
    writing: Writing,
    ledger: Ledger,
    client: distributed.Client | None,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Run, or resume, into a result store; returns the attributes of `run_reconstruction`."""
    result, beside = writing.whole, writing.beside
    stitched = beside / STITCHED_FOLDER if run.spec.polish else result
    folders = RunFolders(result, stitched, beside / SUMS_FOLDER, ledger)
    if ledger.exists:
        ledger.read()
        _check_nothing_skipped(ledger, run.spec)
    if not ledger.tiles:
        for path in {result, stitched}:
            _empty(path)
            create_result(
                path,
                run.plan.box.shape,
                run.plan.box.corner,
                run.plan.tile,
                pixel_size_m=run.scan.pixel_size_m,
                layers=run.job.layers,
            )
        if isinstance(folders.sums, Path):
            folders.sums.mkdir(exist_ok=True)
    if run.spec.pyramid:
        remove(result / PYRAMID)
    return run_reconstruction(run, client, folders, lambda tile, report: None, progress=progress, screen=screen)


def _empty(location: Location) -> None:
    """Remove the content of a location, if any; a folder itself stays."""
    if not isinstance(location, Path):
        location.remove()
        return
    for path in location.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_nothing_skipped(ledger: Ledger, spec: ReconstructionSpec) -> None:
    if spec.on_error == "raise" and any(record["skipped"] for record in ledger.chunks.values()):
        raise PtychodaskError(
            "reconstruct: the stopped run left patterns out with on_error='skip', which on_error='raise' does not; "
            "pass on_error='skip' (--on-error skip) to resume it"
        )
