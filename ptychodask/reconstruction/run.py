"""A planned reconstruction and its execution: stitching, then polishing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import distributed

from ptychodask.cluster.clients import client_for_run
from ptychodask.cluster.preflight import preflight_jobs
from ptychodask.options import names_where
from ptychodask.plan import Plan
from ptychodask.plan.chunks import Tile
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.prediction import stage
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.refine import Polishing, stitch_on_workers, tiles_from_disk
from ptychodask.reconstruction.scheduler import check_workers
from ptychodask.reconstruction.stitching import Stitching, StitchingReport, broadcast_job
from ptychodask.reconstruction.tasks import StitchingJob, TileReport
from ptychodask.scan import Scan
from ptychodask.storage.location import Location
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """A reconstruction that is planned and ready to run."""

    scan: Scan
    """Only its first pattern, with all metadata of the store."""

    job: StitchingJob
    """Inputs that all tasks share."""

    plan: Plan
    spec: ReconstructionSpec

    attributes: dict[str, Any]
    """Provenance attributes of the result."""


@dataclass(frozen=True)
class RunFolders:
    """Paths that a run into a result store writes to."""

    result: Location
    """Store that is being written."""

    stitched: Location
    """Store of the stitched tiles: the result itself, or a store beside it if they are polished afterwards."""

    sums: Location
    """Folder of the sums of chunks."""

    ledger: Ledger


def identity(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a run that its tiles depend on."""
    # All else is left out, so that a stopped run can be resumed with other memory, another device, or patterns skipped.
    # The plan, which memory does change, is compared in full: it decides which sums and tiles there are.
    without_effect = names_where(ReconstructionSpec, changes_result=False)
    spec = {name: value for name, value in attributes["spec"].items() if name not in without_effect}
    return {
        "data_hash": attributes["data_hash"],
        "model": _model_identity(attributes["model"]),
        "spec": spec,
        "plan": attributes["plan"],
    }


def _model_identity(value: Any) -> Any:
    """Descriptions of models without their paths and training ranges."""
    # The hash identifies the weights: a bundle that was moved is the same model. The warning that the scan is outside
    # of the training range follows from model and scan, and its words may change between versions.
    if not isinstance(value, Mapping):
        return value
    return {name: _model_identity(item) for name, item in value.items() if name not in ("path", "unlike_training")}


def run_reconstruction(
    run: Run,
    client: distributed.Client | None,
    folders: RunFolders | None,
    on_tile: Callable[[Tile, TileReport], None],
    *,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Stitch and polish.

    Parameters
    ----------
    run : Run
    client : distributed.Client, optional
        See `client_for_run`.
    folders : RunFolders, optional
        Paths the result is written to; without them tiles are sent to the client.
    on_tile : callable
        Takes each tile of the result, with its report.
    progress : bool, optional
        See `progress_bar`.
    screen : Screen or None
        Shows the live picture.

    Returns
    -------
    dict
        Attributes of the run: wall time of each stage, skipped patterns, verified chunks, R of the sweeps.
    """
    job, plan, spec = run.job, run.plan, run.spec
    n_chunks, n_tiles = len(plan.chunks), len(plan.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", plan.store, plan.n_groups, n_chunks, n_tiles)
    storage: dict[str, Any] = (
        {} if folders is None else {"out": folders.stitched, "folder": folders.sums, "ledger": folders.ledger}
    )
    live = None if screen is None else LivePicture(screen, plan, job.layers, run.scan.pixel_size_m)
    with client_for_run(client) as used, broadcast_job(used, job) as job_reference:
        preflight_jobs(used, [method.prediction for method in job.methods])
        check_workers(used, max(plan.predict_bytes, plan.reassemble_bytes))
        stitching = Stitching(
            used,
            job,
            job_reference,
            plan,
            tolerant=spec.on_error == "skip",
            n_verified=int(spec.verify),
            live=live,
            **storage,
        )
        if not spec.polish:
            stitching.run(on_tile, progress)
            if live is not None:
                live.finish()
            return _report_attributes(stitching.report, plan.store)
        if folders is None:
            stitched = stitch_on_workers(used, stitching, plan, progress)
        else:
            stitching.run(lambda tile, report: None, progress)
            stitched = tiles_from_disk(used, folders.stitched, plan)
        report = _report_attributes(stitching.report, plan.store)
        return report | _polish(
            run, used, stitched, report, None if folders is None else folders.result, on_tile, progress, live
        )


def _polish(
    run: Run,
    client: distributed.Client,
    stitched: list[distributed.Future],
    report: dict[str, Any],
    out: Location | None,
    on_tile: Callable[[Tile, TileReport], None],
    progress: bool | None,
    live: LivePicture | None,
) -> dict[str, Any]:
    """Sweep over the stitched patterns and deliver the tiles; returns R."""
    plan, spec = run.plan, run.spec
    drop = tuple(sorted({*spec.drop, *(index for patterns in report["skipped"].values() for index in patterns)}))
    polishing = Polishing(client, run.job.methods[0].prediction, plan, open_scan(plan.store), stitched, drop)
    with stage(report["seconds"], "polish"):
        r_factors = polishing.sweep(int(spec.polish), progress)
    polishing.deliver(out, on_tile, live)
    if live is not None:
        live.finish()
    logger.info(
        "%s: R %.4f after stitching and %.4f after %d sweeps", plan.store, r_factors[0], r_factors[-1], spec.polish
    )
    return {"polish": {"sweeps": int(spec.polish), "n_patterns": polishing.n_patterns, "r_factor": r_factors}}


def _report_attributes(report: StitchingReport, store: str) -> dict[str, Any]:
    """Attributes of a stitching; skipped patterns are logged too."""
    skipped = report.skipped()
    for reason, patterns in skipped.items():
        logger.warning("%s: left out %d patterns, which %s: %s", store, len(patterns), reason, _first_of(patterns))
    verifications = report.verifications.values()
    verified = {
        "chunks": sorted(report.verifications),
        "same_bits": sum(verification.same_bits for verification in verifications),
        "largest_difference": max((verification.largest_difference for verification in verifications), default=0.0),
        "elsewhere": sum(len(set(verification.workers)) == 2 for verification in verifications),
    }
    return {"seconds": report.seconds(), "skipped": skipped} | ({"verified": verified} if verifications else {})


def _first_of(patterns: list[int]) -> str:
    return ", ".join(map(str, patterns[:20])) + (", ..." if len(patterns) > 20 else "")


def rates(plan: Plan, report: dict[str, Any], started: float) -> dict[str, Any]:
    """Attributes of a run with its total wall time and speed.

    The time is counted from `started` (`time.perf_counter`).
    """
    total = time.perf_counter() - started
    return report | {
        "seconds": {"total": total, **report["seconds"]},
        "groups_per_s": plan.n_groups / total,
        "patterns_per_s": plan.n_patterns / total,
    }
