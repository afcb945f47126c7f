"""A reconstruction into a result on disk, which goes on with what a stopped run left."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import distributed
import xarray as xr

from ptychodask.folders import is_resumable, whole_or_nothing, written_in_place
from ptychodask.locations import Location, ObjectPath
from ptychodask.plan import ReconstructionSpec
from ptychodask.prediction import stage
from ptychodask.reconstruction.following import Following, growing_identity
from ptychodask.reconstruction.ledger import Ledger, check_same, differences
from ptychodask.reconstruction.work import Kept, Places, Work, identity, rates, run_work
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
    path : Path or ObjectPath
    client, progress, overwrite, resume
        As for `reconstruct`.
    started : float
        `time.perf_counter` at the beginning of it.
    following : Following, optional
        For a scan that grows: what is done until it is complete.
    """
    if str(path.resolve()) == work.todo.store:
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another place with out=")
    if isinstance(path, ObjectPath):
        if resume:
            raise PtychodaskError(
                f"{path}: is in a bucket, where nothing is kept of a run that is stopped; leave resume= (--resume) "
                "out, or write to a disk"
            )
        return _write_into_bucket(work, path, client, started, progress, overwrite=overwrite)
    if resume and path.exists() and not is_resumable(path):
        whole = open_result(path)
        if not overwrite:
            check_same(identity(whole.attrs), identity(work.attributes), str(path))
        if not differences(identity(whole.attrs), identity(work.attributes)):
            logger.info("%s: is whole already", path)
            return whole
    with whole_or_nothing(path, overwrite=overwrite, form=RESULT, resume=resume) as building:
        result = building.resolve()
        ledger = Ledger(result.parent, identity(work.attributes) if following is None else growing_identity(work))
        try:
            if following is not None:
                work = following.to_its_end(work, ledger, result.parent / SUMS_FOLDER)
            told = _into(work, result, ledger, client, progress)
        except PtychodaskError as error:
            if not ledger.exists:
                raise
            raise PtychodaskError(
                f"{error}; what is finished is kept: go on with resume=True (--resume), or start again with "
                "overwrite=True (--overwrite)"
            ) from error
        _finish(work, result, told, started)
    return open_result(path)


def _write_into_bucket(
    work: Work,
    path: ObjectPath,
    client: distributed.Client | None,
    started: float,
    progress: bool | None,
    *,
    overwrite: bool,
) -> xr.Dataset:
    """As `write_result`, but the sums of chunks wait for their tiles in the memory of the workers."""
    with written_in_place(path, overwrite=overwrite, form=RESULT) as result:
        _create(work, result)
        told = run_work(work, client, Places(result, None), lambda tile, report: None, show=progress)
        _finish(work, result, told, started)
    return open_result(path)


def _create(work: Work, path: Location) -> None:
    todo = work.todo
    create_result(
        path,
        todo.box.shape,
        todo.box.corner,
        todo.tile,
        pixel_size_m=work.scan.pixel_size_m,
        layers=work.job.layers,
    )


def _finish(work: Work, path: Location, told: dict[str, Any], started: float) -> None:
    if work.spec.pyramid:
        with stage(told["seconds"], "pyramid"):
            write_pyramid(path)
    finish_result(path, work.attributes | rates(work.todo, told, started))


def _into(
    work: Work, result: Path, ledger: Ledger, client: distributed.Client | None, show: bool | None
) -> dict[str, Any]:
    """Run into a result store that is being written, or go on with it; gives what `run_work` gives."""
    stitched = result.parent / STITCHED_FOLDER if work.spec.polish else result
    kept = Kept(stitched, result.parent / SUMS_FOLDER, ledger)
    if ledger.exists:
        ledger.read()
        _check_nothing_skipped(ledger, work.spec)
    if not ledger.tiles:
        for path in {result, stitched}:
            _empty(path)
            _create(work, path)
        kept.sums.mkdir(exist_ok=True)
    if work.spec.pyramid:
        shutil.rmtree(result / PYRAMID, ignore_errors=True)
    return run_work(work, client, Places(result, kept), lambda tile, report: None, show=show)


def _empty(folder: Path) -> None:
    """Leave nothing in a folder, which may not exist."""
    for path in folder.glob("*"):
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
