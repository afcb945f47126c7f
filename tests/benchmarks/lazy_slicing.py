"""What opening a lazy result costs, and what a small region of it predicts.

Counts tasks with Dask's threaded scheduler. A group is needed when its patches reach the region; the share is that of
the needed among the predicted ones.

    python -m tests.benchmarks.lazy_slicing            10^6 patterns, a region of 200 x 200
    python -m tests.benchmarks.lazy_slicing --quick    10^4 patterns
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import numpy as np
from dask.callbacks import Callback

from ptychodask.grouping import GroupingSpec
from ptychodask.plan import plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.reassembly import Box
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Scan
from ptychodask.store import open_scan
from ptychodask.store.groups import group
from tests.benchmarks.measuring import CheapModel, noisy_scan, parser, tell

N_PIXELS = 16
MEMBERS = 4
REGION = 200


class Count(Callback):
    """How many tasks of each name run."""

    def __init__(self) -> None:
        self.tasks: Counter[str] = Counter()
        super().__init__(pretask=self._note)

    def _note(self, key: Any, *_: Any) -> None:
        name = key[0] if isinstance(key, tuple) else key
        self.tasks[str(name).partition("-")[0]] += 1


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--n-patterns", type=int, default=10**6)
    flags.add_argument("--step-px", type=float, default=4.0)
    given = flags.parse_args()
    n_patterns = 10**4 if given.quick else given.n_patterns
    model = CheapModel(n_pixels=N_PIXELS, members=MEMBERS)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "scan.zarr")
        noisy_scan(store, n_patterns, N_PIXELS, step_px=given.step_px)
        started = time.perf_counter()
        groups = group(store, GroupingSpec(members=MEMBERS))
        group_s = time.perf_counter() - started
        started = time.perf_counter()
        todo = plan(store, model, ReconstructionSpec())
        plan_s = time.perf_counter() - started
        with Count() as opening:
            started = time.perf_counter()
            lazy = reconstruct(store, model, compute=False)
            open_s = time.perf_counter() - started
        middle = [side // 2 - REGION // 2 for side in todo.box.shape]
        region = {name: slice(start, start + REGION) for name, start in zip(("y", "x"), middle, strict=True)}
        part = lazy[["object", "weight"]].isel(region)
        # Fused tasks would be counted as one.
        with dask.config.set({"optimization.fuse.active": False, "scheduler": "threads"}):
            with Count() as one:
                started = time.perf_counter()
                part["object"].compute()
                region_s = time.perf_counter() - started
            with Count() as both:
                part.compute()
        corner = todo.box.y0 + middle[0], todo.box.x0 + middle[1]
        box = Box(corner[0], corner[0] + REGION, corner[1], corner[1] + REGION)
        tell(
            "lazy_slicing",
            patterns=n_patterns,
            chunks=len(todo.chunks),
            tiles=len(todo.tiles),
            tile=todo.tile,
            group_s=group_s,
            plan_s=plan_s,
            open_s=open_s,
            tasks_run_by_opening=sum(opening.tasks.values()),
            region_s=region_s,
            chunks_predicted=one.tasks["predict"],
            chunks_predicted_for_object_and_weight=both.tasks["predict"],
            tiles_reassembled=one.tasks["reassemble"],
            share_of_predicted_groups_needed=n_needed(open_scan(store), groups.member, box)
            / (one.tasks["predict"] * todo.groups_per_chunk),
        )


def n_needed(scan: Scan, member: np.ndarray, box: Box) -> int:
    """Groups with a patch that reaches a box."""
    corner = np.floor(scan.position_yx_px[member] - N_PIXELS / 2)
    low, high = np.array([box.y0, box.x0]), np.array([box.y1, box.x1])
    return int(((corner < high) & (corner + N_PIXELS >= low)).all(axis=-1).any(axis=-1).sum())


if __name__ == "__main__":
    main()
