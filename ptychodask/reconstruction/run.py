"""A planned reconstruction: scan, job, plan, spec and identity."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptychodask.options import names_where
from ptychodask.plan import Plan
from ptychodask.plan.chunks import Tile
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reconstruction.ledger import Ledger
from ptychodask.reconstruction.live import LivePicture, Screen
from ptychodask.reconstruction.tasks import StitchingJob
from ptychodask.scan import Scan
from ptychodask.storage.location import Location
from ptychodask.storage.records import from_text, plain


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

    @property
    def identity(self) -> dict[str, Any]:
        """Attributes that its tiles depend on (see `identity`)."""
        return identity(self.attributes)

    def start_yx(self, tile: Tile) -> tuple[int, int]:
        """Row and column of a tile's first pixel in the complete object."""
        return tile.box.y0 - self.plan.box.y0, tile.box.x0 - self.plan.box.x0

    def live_picture(self, screen: Screen | None) -> LivePicture | None:
        """Live picture of its object, if there is a screen."""
        return None if screen is None else LivePicture(screen, self.plan, self.job.layers, self.scan.pixel_size_m)

    def attributes_of_result(self, report: dict[str, Any], started: float) -> dict[str, Any]:
        """Attributes of its result: provenance, report, total wall time and speed.

        The time is counted from `started` (`time.perf_counter`).
        """
        total = time.perf_counter() - started
        return {
            **self.attributes,
            **report,
            "seconds": {"total": total, **report["seconds"]},
            "groups_per_s": self.plan.n_groups / total,
            "patterns_per_s": self.plan.n_patterns / total,
        }


@dataclass(frozen=True)
class RunFolders:
    """Paths that a run writes to; without them the client gets tiles."""

    sums: Location | None = None
    """Folder of the sums of chunks; without it they stay in the memory of the workers."""

    ledger: Ledger | None = None
    """Records finished chunks and tiles, and those of earlier runs."""

    stitched: Location | None = None
    """Store of the stitched tiles: the result itself, or a store beside it if they are refined afterwards. None while
    a growing scan is followed: its sums are kept, and tiles are only shown."""

    result: Location | None = None
    """Store that is being written."""

    refined: Location | None = None
    """Folder of tiles while they are refined; without it they stay in the memory of the workers."""


def identity(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a run that its tiles depend on."""
    # All else is left out, so that a stopped run can be resumed with other memory, another device, or patterns skipped.
    # The plan, which memory does change, is compared in full: it decides which sums and tiles there are.
    without_effect = names_where(ReconstructionSpec, changes_result=False)
    attributes = {name: plain(from_text(value)) for name, value in attributes.items()}
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
