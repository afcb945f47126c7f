"""Reconstruction into a result store on a disk or in a bucket.

A stopped run is resumed from its ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import xarray as xr

from ptychodask.cluster.executor import AnyClient
from ptychodask.errors import PtychodaskError
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.prediction import stage
from ptychodask.pyramid import write_pyramid
from ptychodask.reconstruction.follow import FollowedScan, growing_identity
from ptychodask.reconstruction.ledger import Ledger, check_same
from ptychodask.reconstruction.live import Screen, screen_for
from ptychodask.reconstruction.refine import OF_PATTERNS, stitch_and_refine
from ptychodask.reconstruction.run import Run, RunFolders, identity
from ptychodask.result import PYRAMID, RESULT, create_result, finish_result, open_result
from ptychodask.storage.atomic import Writing
from ptychodask.storage.location import Location
from ptychodask.storage.records import differences

logger = logging.getLogger(__name__)


SUMS_FOLDER = "sums"
"""Folder of the sums of chunks, beside a result that is being written."""


REFINED_FOLDER = "refined"
"""Folder of the tiles that are being refined, beside a result that is being written."""


STITCHED_FOLDER = "stitched"
"""Store of the tiles that are still to be refined, beside a result that is being written."""


def write_result(
    run: Run,
    path: Location,
    client: AnyClient | None,
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
    if resume and path.is_complete() and not path.is_resumable():
        stored = open_result(path)
        run = _as_recorded(run, stored.attrs)
        if not overwrite:
            check_same(identity(stored.attrs), run.identity, str(path))
        if not differences(identity(stored.attrs), run.identity):
            logger.info("%s: is complete already", path)
            return stored
    with path.atomic_store(overwrite=overwrite, kind=RESULT, resume=resume) as writing:
        screen = screen_for(run.spec.live)
        if resume:
            run = _as_recorded(run, Ledger(writing.beside, {}).recorded_inputs())
        made_by = run.identity if followed is None else growing_identity(run)
        ledger = Ledger(writing.beside, made_by)
        try:
            if followed is not None:
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
        of_patterns = report.pop(OF_PATTERNS, {})
        finish_result(writing.whole, run.attributes_of_result(report, started), of_patterns)
    return open_result(path)


def _run_into(
    run: Run,
    writing: Writing[Location],
    ledger: Ledger,
    client: AnyClient | None,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Run, or resume, into a result store; returns the attributes of `stitch_and_refine`."""
    result, beside = writing.whole, writing.beside
    stitched = beside / STITCHED_FOLDER if run.spec.refines else result
    folders = RunFolders(beside / SUMS_FOLDER, ledger, stitched, result, beside / REFINED_FOLDER)
    if ledger.exists:
        ledger.read()
        _check_nothing_skipped(ledger, run.spec)
    if not ledger.tiles:
        for path in {result, stitched}:
            path.remove()
            path.make_folder()
            create_result(
                path,
                run.plan.box.shape,
                run.plan.box.corner,
                run.plan.tile,
                pixel_size_m=run.scan.pixel_size_m,
                layers=run.job.layers,
            )
        (beside / SUMS_FOLDER).make_folder()
    if run.spec.refines:
        (beside / REFINED_FOLDER).make_folder()
    if run.spec.pyramid:
        (result / PYRAMID).remove()
    return stitch_and_refine(run, client, folders, lambda tile, report: None, progress=progress, screen=screen)


def _as_recorded(run: Run, recorded: Mapping[str, Any] | None) -> Run:
    """Run without automatic refinement, if the run that it resumes knew none."""
    # Version 0.1 had no slow phase, and polished only when asked to.
    earlier = (recorded or {}).get("spec")
    if not isinstance(earlier, Mapping) or "slow_phase" in earlier:
        return run
    spec = replace(
        run.spec,
        polish=earlier.get("polish", 0) if run.spec.polish == "auto" else run.spec.polish,
        slow_phase=False if run.spec.slow_phase == "auto" else run.spec.slow_phase,
    )
    named = run.attributes["spec"] | {"polish": spec.polish, "slow_phase": spec.slow_phase}
    if not spec.slow_phase:
        del named["slow_phase"]
    return replace(run, spec=spec, attributes=run.attributes | {"spec": named})


def _check_nothing_skipped(ledger: Ledger, spec: ReconstructionSpec) -> None:
    if spec.on_error == "raise" and any(record["skipped"] for record in ledger.chunks.values()):
        raise PtychodaskError(
            "reconstruct: the stopped run left patterns out with on_error='skip', which on_error='raise' does not; "
            "pass on_error='skip' (--on-error skip) to resume it"
        )
