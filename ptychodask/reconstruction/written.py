"""A reconstruction into a stored result, on a disk or in a bucket, which goes on with what a stopped run left."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import distributed
import xarray as xr

from ptychodask.places import Location, Writing, atomic_store, is_complete, is_resumable, remove
from ptychodask.plan import ReconstructionSpec
from ptychodask.prediction import stage
from ptychodask.reconstruction.following import Following, growing_identity
from ptychodask.reconstruction.ledger import Ledger, check_same, differences
from ptychodask.reconstruction.live import Screen, screen_for
from ptychodask.reconstruction.work import RunFolders, Work, identity, rates, run_work
from ptychodask.result import PYRAMID, RESULT, create_result, finish_result, open_result, write_pyramid
from ptychodask.scan import PtychodaskError

logger = logging.getLogger(__name__)

SUMS_FOLDER = "sums"
"""Folder beside a result that is being written where sums of chunks wait for their tiles."""

STITCHED_FOLDER = "stitched"
"""Store beside a result that is being written, of the tiles that are still to be polished."""


def write_result(
    work: Work,
    path: Location,
    client: distributed.Client | None,
    started: float,
    progress: bool | None,
    *,
    overwrite: bool,
    resume: bool,
    following: Following | None = None,
) -> xr.Dataset:
    """Reconstruct into a result store, tile by tile; gives it, opened.

    Parameters
    ----------
    work : Work
    path : Place
    client, progress, overwrite, resume
        As for `reconstruct`.
    started : float
        `time.perf_counter` at the beginning of it.
    following : Following, optional
        For a scan that grows: what is done until it is complete.
    """
    if str(path.resolve()) == work.plan.store:
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another place with out=")
    if resume and is_complete(path) and not is_resumable(path):
        whole = open_result(path)
        if not overwrite:
            check_same(identity(whole.attrs), identity(work.attributes), str(path))
        if not differences(identity(whole.attrs), identity(work.attributes)):
            logger.info("%s: is whole already", path)
            return whole
    with atomic_store(path, overwrite=overwrite, kind=RESULT, resume=resume) as writing:
        screen = screen_for(work.spec.live)
        made_by = identity(work.attributes) if following is None else growing_identity(work)
        ledger = Ledger(writing.beside, made_by)
        try:
            if following is not None:
                assert isinstance(writing.beside, Path)
                work = following.complete(work, ledger, writing.beside / SUMS_FOLDER, screen)
            told = _into(work, writing, ledger, client, progress, screen)
        except PtychodaskError as error:
            if not ledger.exists:
                raise
            raise PtychodaskError(
                f"{error}; what is finished is kept: go on with resume=True (--resume), or start again with "
                "overwrite=True (--overwrite)"
            ) from error
        if work.spec.pyramid:
            with stage(told["seconds"], "pyramid"):
                write_pyramid(writing.whole)
        writing.check_held()
        finish_result(writing.whole, work.attributes | rates(work.plan, told, started))
    return open_result(path)


def _into(
    work: Work,
    writing: Writing,
    ledger: Ledger,
    client: distributed.Client | None,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Run into a result store that is being written, or go on with it; gives what `run_work` gives."""
    result, beside = writing.whole, writing.beside
    stitched = beside / STITCHED_FOLDER if work.spec.polish else result
    folders = RunFolders(result, stitched, beside / SUMS_FOLDER, ledger)
    if ledger.exists:
        ledger.read()
        _check_nothing_skipped(ledger, work.spec)
    if not ledger.tiles:
        for path in {result, stitched}:
            _empty(path)
            create_result(
                path,
                work.plan.box.shape,
                work.plan.box.corner,
                work.plan.tile,
                pixel_size_m=work.scan.pixel_size_m,
                layers=work.job.layers,
            )
        if isinstance(folders.sums, Path):
            folders.sums.mkdir(exist_ok=True)
    if work.spec.pyramid:
        remove(result / PYRAMID)
    return run_work(work, client, folders, lambda tile, report: None, progress=progress, screen=screen)


def _empty(place: Location) -> None:
    """Leave nothing in a place, which may not exist; a folder itself stays."""
    if not isinstance(place, Path):
        place.remove()
        return
    for path in place.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_nothing_skipped(ledger: Ledger, spec: ReconstructionSpec) -> None:
    if spec.on_error == "raise" and any(record["skipped"] for record in ledger.chunks.values()):
        raise PtychodaskError(
            "reconstruct: the stopped run left patterns out with on_error='skip', which on_error='raise' does not; "
            "pass on_error='skip' (--on-error skip) to go on with it"
        )
