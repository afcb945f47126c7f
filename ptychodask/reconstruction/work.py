"""A reconstruction that is ready to run, and its run: stitching, then polishing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import distributed

from ptychodask.cluster import client_for_run
from ptychodask.cluster.preflight import preflight_jobs
from ptychodask.places import Location
from ptychodask.plan import Plan, ReconstructionSpec, Tile
from ptychodask.prediction import stage
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.polished import Polishing, stitch_on_workers, tiles_from_disk
from ptychodask.reconstruction.running import check_workers
from ptychodask.reconstruction.stitching import Stitching, StitchingReport, broadcast_job
from ptychodask.reconstruction.tasks import StitchingJob, TileReport
from ptychodask.scan import Scan
from ptychodask.store import open_scan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Work:
    """A reconstruction that is ready to run."""

    scan: Scan
    """Its first pattern alone, with all that the store records."""

    job: StitchingJob
    """What its tasks know."""

    plan: Plan
    spec: ReconstructionSpec

    attributes: dict[str, Any]
    """Of the result: what makes it."""


@dataclass(frozen=True)
class RunFolders:
    """Where a run into a result store puts things."""

    result: Location
    """Store that is being written."""

    stitched: Location
    """Store of the tiles as they are stitched: the result, unless they are polished before they come there."""

    sums: Location
    """Folder of the sums of chunks."""

    ledger: Ledger


OF_NO_EFFECT = ("memory_bytes", "on_error", "verify", "device", "pyramid")
"""Fields of a spec that two runs may differ in and give the same tiles."""


def identity(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the tiles of a run depend on, from its attributes."""
    spec = {name: value for name, value in attributes["spec"].items() if name not in OF_NO_EFFECT}
    return {
        "data_hash": attributes["data_hash"],
        "model": _what_predicts(attributes["model"]),
        "spec": spec,
        "plan": attributes["plan"],
    }


def _what_predicts(value: Any) -> Any:
    """Descriptions of models, less where they lie and what is said of their training."""
    if not isinstance(value, Mapping):
        return value
    return {name: _what_predicts(item) for name, item in value.items() if name not in ("path", "unlike_training")}


def run_work(
    work: Work,
    client: distributed.Client | None,
    folders: RunFolders | None,
    take: Callable[[Tile, TileReport], None],
    *,
    progress: bool | None,
    screen: Screen | None,
) -> dict[str, Any]:
    """Stitch and polish.

    Parameters
    ----------
    work : Work
    client : distributed.Client, optional
        See `client_for_run`.
    places : Places, optional
        Where the result is written; without it tiles are sent.
    take : callable
        Gets each tile of the result, with what it gave.
    progress : bool, optional
        See `progress_bar`.
    screen : Screen or None
        Where the live picture is shown.

    Returns
    -------
    dict
        Attributes that tell of it: wall time of each stage, what was left out and verified, R of the sweeps.
    """
    job, plan, spec = work.job, work.plan, work.spec
    n_chunks, n_tiles = len(plan.chunks), len(plan.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", plan.store, plan.n_groups, n_chunks, n_tiles)
    kept: dict[str, Any] = (
        {} if folders is None else {"out": folders.stitched, "folder": folders.sums, "ledger": folders.ledger}
    )
    live = None if screen is None else LivePicture(screen, plan, job.layers, work.scan.pixel_size_m)
    with client_for_run(client) as used, broadcast_job(used, job) as sent:
        preflight_jobs(used, [method.prediction for method in job.methods])
        check_workers(used, max(plan.predict_bytes, plan.reassemble_bytes))
        stitching = Stitching(
            used, job, sent, plan, tolerant=spec.on_error == "skip", n_verified=int(spec.verify), live=live, **kept
        )
        if not spec.polish:
            stitching.run(take, progress)
            if live is not None:
                live.finish()
            return _told(stitching.told, plan.store)
        if folders is None:
            stitched = stitch_on_workers(used, stitching, plan, progress)
        else:
            stitching.run(lambda tile, report: None, progress)
            stitched = tiles_from_disk(used, folders.stitched, plan)
        told = _told(stitching.told, plan.store)
        return told | _polish(
            work, used, stitched, told, None if folders is None else folders.result, take, progress, live
        )


def _polish(
    work: Work,
    client: distributed.Client,
    stitched: list[distributed.Future],
    told: dict[str, Any],
    out: Location | None,
    take: Callable[[Tile, TileReport], None],
    progress: bool | None,
    live: LivePicture | None,
) -> dict[str, Any]:
    """Sweep over the patterns that stitching used, and deliver the tiles; R of the sweeps."""
    plan, spec = work.plan, work.spec
    drop = tuple(sorted({*spec.drop, *(one for patterns in told["skipped"].values() for one in patterns)}))
    polishing = Polishing(client, work.job.methods[0].prediction, plan, open_scan(plan.store), stitched, drop)
    with stage(told["seconds"], "polish"):
        r_factors = polishing.sweep(int(spec.polish), progress)
    polishing.deliver(out, take, live)
    if live is not None:
        live.finish()
    logger.info(
        "%s: R %.4f after stitching and %.4f after %d sweeps", plan.store, r_factors[0], r_factors[-1], spec.polish
    )
    return {"polish": {"sweeps": int(spec.polish), "n_patterns": polishing.n_patterns, "r_factor": r_factors}}


def _told(told: StitchingReport, store: str) -> dict[str, Any]:
    """Attributes that tell of a stitching; what was left out is logged too."""
    skipped = told.skipped()
    for reason, patterns in skipped.items():
        logger.warning("%s: left out %d patterns, which %s: %s", store, len(patterns), reason, _some(patterns))
    verified = {
        "chunks": sorted(told.verifications),
        "same_bits": sum(found.same_bits for found in told.verifications.values()),
        "largest_difference": max((found.largest_difference for found in told.verifications.values()), default=0.0),
        "elsewhere": sum(len(set(found.workers)) == 2 for found in told.verifications.values()),
    }
    return {"seconds": told.seconds(), "skipped": skipped} | ({"verified": verified} if told.verifications else {})


def _some(patterns: list[int]) -> str:
    return ", ".join(map(str, patterns[:20])) + (", ..." if len(patterns) > 20 else "")


def rates(plan: Plan, told: dict[str, Any], started: float) -> dict[str, Any]:
    """What a run told, with its wall time in all since `started` (`time.perf_counter`) and the speed that follows."""
    total = time.perf_counter() - started
    return told | {
        "seconds": {"total": total, **told["seconds"]},
        "groups_per_s": plan.n_groups / total,
        "patterns_per_s": plan.n_patterns / total,
    }
