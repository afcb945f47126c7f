"""Reconstruction that follows a growing scan, segment by segment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from ptychodask.cluster.executor import Executor
from ptychodask.errors import PtychodaskError
from ptychodask.plan.chunks import RegionNotReachedError
from ptychodask.prediction import open_stored
from ptychodask.reconstruction.ledger import Ledger, check_same
from ptychodask.reconstruction.live import Screen
from ptychodask.reconstruction.run import Run, RunFolders
from ptychodask.reconstruction.stitching import stitching_of
from ptychodask.storage.location import Location
from ptychodask.store import StoredScan

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
    executor : Executor
    progress : bool, optional
        See `progress_bar`.

    Notes
    -----
    The sums of chunks stay on disk, recorded in the ledger, until the scan is complete: only then are the bounds of the
    object, and with them those of its tiles, known. The live picture is stitched from the same sums.
    """

    def __init__(self, plan_run: Callable[[], Run], executor: Executor, progress: bool | None) -> None:
        self._plan_run, self._executor, self._progress = plan_run, executor, progress

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
            # The new chunks are predicted, and shown together with the others.
            with stitching_of(run, self._executor, RunFolders(sums, ledger), screen, trusted) as stitching:
                stitching.run(lambda tile, report: None, self._progress)
            trusted.update(range(len(run.plan.chunks)))
            known = run.scan.attributes["state"], len(run.scan.attributes["segments"])
            _wait_for_growth(open_stored(run.job.methods[0].prediction), known, run.spec.follow_timeout_s)
            run = self._plan_run()


def first_run(plan_run: Callable[[], Run], stored: StoredScan, limit_s: float) -> Run:
    """Run over a store, once its region of interest is reached.

    Parameters
    ----------
    plan_run : callable
    stored : StoredScan
    limit_s : float
        Longest time without a new segment.

    Raises
    ------
    PtychodaskError
        As `plan_run` does; if the region is not reached, only once no other segment can come.
    """
    while True:
        known = stored.growth()
        try:
            return plan_run()
        except RegionNotReachedError as error:
            if known[0] != "growing":
                raise
            logger.info("%s; waiting for a segment that does", error)
        _wait_for_growth(stored, known, limit_s)


def _wait_for_growth(stored: StoredScan, known: tuple[str, int], limit_s: float) -> None:
    """Return once state or number of segments change (see `StoredScan.growth`)."""
    store, since = stored.label, time.monotonic()
    while stored.growth() == known:
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
    recorded = run.identity
    first = run.scan.attributes["segments"][0].get("data_hash", recorded["data_hash"])
    plans = recorded.pop("plan")
    common = {label: _common(plan) for label, plan in plans.items()} if "groups" not in plans else _common(plans)
    del recorded["data_hash"]
    return {"first_segment": first, **recorded, "plan": common}


def _common(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plan[name] for name in COMMON_PLAN_FIELDS}
