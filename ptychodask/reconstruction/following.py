"""A reconstruction that keeps up with a scan which grows: each segment's chunks are predicted as they come."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distributed

from ptychodask.cluster.preflight import preflight_jobs
from ptychodask.growing import growth
from ptychodask.plan import RegionNotReachedError
from ptychodask.reconstruction.ledger import Ledger, check_same
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.running import check_workers
from ptychodask.reconstruction.stitching import Stitching, broadcast_job
from ptychodask.reconstruction.work import Work, identity
from ptychodask.scan import PtychodaskError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often a store is looked at for a new segment."""

SAME_FOR_ALL = ("groups", "window", "crop", "batch_size", "groups_per_chunk")
"""What plans of a scan that grows have in common, so that sums of early chunks stay valid."""


class Following:
    """The part of a run that lasts until the scan is complete.

    Parameters
    ----------
    plan_now : callable
        Gives the work on what the store holds now.
    client : distributed.Client
    progress : bool, optional
        See `progress_bar`.

    Notes
    -----
    The sums of chunks stay on disk, noted in the ledger, until the whole object is known: only then is it clear where
    its tiles lie. What is shown meanwhile is stitched from the same sums.
    """

    def __init__(self, plan_now: Callable[[], Work], client: distributed.Client, progress: bool | None) -> None:
        self._plan_now, self._client, self._progress = plan_now, client, progress

    def complete(self, work: Work, ledger: Ledger, sums: Path, screen: Screen | None) -> Work:
        """Predict segment after segment; gives the work on the complete scan, whose chunks are noted in the ledger.

        Parameters
        ----------
        work : Work
            On what the store held a moment ago.
        ledger : Ledger
            Made by `growing_identity`.
        sums : Path
            Folder for the sums of chunks.
        screen : Screen or None
            Where the live picture is shown.

        Raises
        ------
        PtychodaskError
            If no segment comes for too long, the scan was replaced, or a task fails.
        """
        made_by = growing_identity(work)
        sure: set[int] = set()
        sums.mkdir(exist_ok=True)
        while True:
            now = growing_identity(work)
            check_same(made_by | {"plan": now["plan"]}, now, work.plan.store)
            if now != made_by:
                logger.warning("%s: chunks became smaller to fit into the memory: all begin anew", work.plan.store)
                shutil.rmtree(sums)
                sums.mkdir()
                ledger.begin_anew(now)
                sure, made_by = set(), now
            if ledger.exists:
                ledger.read()
            if work.scan.attributes["state"] != "growing":
                return work
            live = None
            if screen is not None:
                live = LivePicture(screen, work.plan, work.job.layers, work.scan.pixel_size_m)
            self._predict(work, ledger, sums, live, sure)
            work = self._next(work)

    def _predict(self, work: Work, ledger: Ledger, sums: Path, live: LivePicture | None, sure: set[int]) -> None:
        """Predict the chunks that are new, and show them with the others."""
        plan, client = work.plan, self._client
        with broadcast_job(client, work.job) as sent:
            preflight_jobs(client, [method.prediction for method in work.job.methods])
            check_workers(client, max(plan.predict_bytes, plan.reassemble_bytes))
            stitching = Stitching(
                client,
                work.job,
                sent,
                plan,
                tolerant=work.spec.on_error == "skip",
                folder=sums,
                ledger=ledger,
                live=live,
                keep=True,
                sure=sure,
            )
            stitching.run(lambda tile, report: None, self._progress)
        if live is not None:
            live.finish()
        sure.update(range(len(plan.chunks)))

    def _next(self, work: Work) -> Work:
        """Wait until the store holds more than this work is on, or is complete; gives the work on that."""
        attributes = work.scan.attributes
        known = attributes["state"], len(attributes["segments"])
        _wait_for_growth(work.plan.store, known, work.spec.follow_timeout_s)
        return self._plan_now()


def first_work(plan_now: Callable[[], Work], store: str, limit_s: float) -> Work:
    """The work on what a store holds now, or as soon as the region of interest is reached.

    Parameters
    ----------
    plan_now : callable
    store : str
    limit_s : float
        How long the store may go without a new segment.

    Raises
    ------
    PtychodaskError
        As `plan_now` does; where the region is not reached, once no other segment can come.
    """
    while True:
        known = growth(store)
        try:
            return plan_now()
        except RegionNotReachedError as error:
            if known[0] != "growing":
                raise
            logger.info("%s; waiting for a segment that does", error)
        _wait_for_growth(store, known, limit_s)


def _wait_for_growth(store: str, known: tuple[str, int], limit_s: float) -> None:
    """Return once a store has another state, or more segments, than is known (see `growth`)."""
    since = time.monotonic()
    while growth(store) == known:
        if time.monotonic() - since > limit_s:
            raise PtychodaskError(
                f"{store}: no segment came for follow_timeout_s={limit_s:g} s after {known[1]} of them, and the "
                f"scan is not finished; when others come, or after 'ptychodask ingest --finish {store}', follow it "
                "again"
            )
        time.sleep(LOOK_EVERY_S)


def growing_identity(work: Work) -> dict[str, Any]:
    """What the sums of a scan's chunks depend on while it grows: nothing that another segment changes."""
    found = identity(work.attributes)
    first = work.scan.attributes["segments"][0].get("data_hash", found["data_hash"])
    plans = found.pop("plan")
    common = {label: _common(plan) for label, plan in plans.items()} if "groups" not in plans else _common(plans)
    del found["data_hash"]
    return {"first_segment": first, **found, "plan": common}


def _common(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plan[name] for name in SAME_FOR_ALL}
