"""Reconstruction that follows a growing scan, segment by segment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import distributed

from ptychodask.cluster.preflight import preflight_jobs
from ptychodask.errors import PtychodaskError
from ptychodask.plan.chunks import RegionNotReachedError
from ptychodask.reconstruction.ledger import Ledger, check_same
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.run import Run, identity
from ptychodask.reconstruction.scheduler import check_workers
from ptychodask.reconstruction.stitching import Stitching, broadcast_job
from ptychodask.storage.location import Location
from ptychodask.store.append import growth

logger = logging.getLogger(__name__)


POLL_S = 1.0
"""Time between two looks at a store for a new segment."""


COMMON_PLAN_FIELDS = ("groups", "window", "crop", "batch_size", "groups_per_chunk")
"""Plan fields that stay the same while a scan grows, so that sums of early chunks stay valid."""


class FollowedScan:
    """A growing scan whose chunks are predicted until it is complete.

    Parameters
    ----------
    plan_run : callable
        Returns the run over the present content of the store.
    client : distributed.Client
    progress : bool, optional
        See `progress_bar`.

    Notes
    -----
    The sums of chunks stay on disk, recorded in the ledger, until the scan is complete: only then are the bounds of the
    object, and with them those of its tiles, known. The live picture is stitched from the same sums.
    """

    def __init__(self, plan_run: Callable[[], Run], client: distributed.Client, progress: bool | None) -> None:
        self._plan_run, self._client, self._progress = plan_run, client, progress

    def complete(self, run: Run, ledger: Ledger, sums: Location, screen: Screen | None) -> Run:
        """Predict segment after segment; returns the run over the complete scan.

        Its chunks are recorded in the ledger.

        Parameters
        ----------
        run : Run
            Over the content of the store a moment ago.
        ledger : Ledger
            Made by `growing_identity`.
        sums : Location
            Folder for the sums of chunks.
        screen : Screen or None
            Shows the live picture.

        Raises
        ------
        PtychodaskError
            If no segment comes for too long, the scan was replaced, or a task fails.
        """
        made_by = growing_identity(run)
        trusted: set[int] = set()
        sums.make_folder()
        while True:
            now = growing_identity(run)
            check_same(made_by | {"plan": now["plan"]}, now, run.plan.store)
            if now != made_by:
                logger.warning("%s: chunks became smaller to fit into memory: all are computed anew", run.plan.store)
                sums.remove()
                sums.make_folder()
                ledger.begin_anew(now)
                trusted, made_by = set(), now
            if ledger.exists:
                ledger.read()
            if run.scan.attributes["state"] != "growing":
                return run
            live = None
            if screen is not None:
                live = LivePicture(screen, run.plan, run.job.layers, run.scan.pixel_size_m)
            self._predict(run, ledger, sums, live, trusted)
            run = self._next(run)

    def _predict(self, run: Run, ledger: Ledger, sums: Location, live: LivePicture | None, trusted: set[int]) -> None:
        """Predict the new chunks, and show them together with the others."""
        plan, client = run.plan, self._client
        with broadcast_job(client, run.job) as job_reference:
            preflight_jobs(client, [method.prediction for method in run.job.methods])
            check_workers(client, max(plan.predict_bytes, plan.reassemble_bytes))
            stitching = Stitching(
                client,
                run.job,
                job_reference,
                plan,
                tolerant=run.spec.on_error == "skip",
                folder=sums,
                ledger=ledger,
                live=live,
                sums_only=True,
                trusted=trusted,
            )
            stitching.run(lambda tile, report: None, self._progress)
        if live is not None:
            live.finish()
        trusted.update(range(len(plan.chunks)))

    def _next(self, run: Run) -> Run:
        """Wait for another segment or the end; returns the next run."""
        attributes = run.scan.attributes
        known = attributes["state"], len(attributes["segments"])
        _wait_for_growth(run.plan.store, known, run.spec.follow_timeout_s)
        return self._plan_run()


def first_run(plan_run: Callable[[], Run], store: str, limit_s: float) -> Run:
    """Run over a store, once its region of interest is reached.

    Parameters
    ----------
    plan_run : callable
    store : str
    limit_s : float
        Longest time without a new segment.

    Raises
    ------
    PtychodaskError
        As `plan_run` does; if the region is not reached, only once no other segment can come.
    """
    while True:
        known = growth(store)
        try:
            return plan_run()
        except RegionNotReachedError as error:
            if known[0] != "growing":
                raise
            logger.info("%s; waiting for a segment that does", error)
        _wait_for_growth(store, known, limit_s)


def _wait_for_growth(store: str, known: tuple[str, int], limit_s: float) -> None:
    """Return once state or number of segments change (see `growth`)."""
    since = time.monotonic()
    while growth(store) == known:
        if time.monotonic() - since > limit_s:
            raise PtychodaskError(
                f"{store}: no new segment within follow_timeout_s={limit_s:g} s after {known[1]} of them, and the "
                f"scan is not finished; follow it again when there are new ones, or after 'ptychodask ingest --finish "
                f"{store}'"
            )
        time.sleep(POLL_S)


def growing_identity(run: Run) -> dict[str, Any]:
    """Attributes that the sums of a growing scan depend on."""
    # Nothing that another segment changes: with the hash of all data, or the plan's sizes, each would be another run.
    recorded = identity(run.attributes)
    first = run.scan.attributes["segments"][0].get("data_hash", recorded["data_hash"])
    plans = recorded.pop("plan")
    common = {label: _common(plan) for label, plan in plans.items()} if "groups" not in plans else _common(plans)
    del recorded["data_hash"]
    return {"first_segment": first, **recorded, "plan": common}


def _common(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plan[name] for name in COMMON_PLAN_FIELDS}
