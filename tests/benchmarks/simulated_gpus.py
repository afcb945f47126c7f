"""Share of their time that workers spend at their devices, and what the scheduler takes meanwhile.

Each worker advertises a GPU; its network sleeps, holding the device as a real one does, so that many workers fit on a
few cores; reading and splatting come on top, a few milliseconds. Dask's statistical profiler, which looks at each
worker a hundred times a second, is off: 64 of them would fill the two cores. Every chunk takes one call. Start-up is
left out: the scan is reconstructed once before with a nap of 50 ms.

    python -m tests.benchmarks.simulated_gpus            64 workers, 20 waves of one second
    python -m tests.benchmarks.simulated_gpus --quick    8 workers, 5 waves
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from ptychodask.grouping import GroupingSpec
from ptychodask.reconstruction import reconstruct
from ptychodask.store.groups import group
from tests.benchmarks.measuring import CheapModel, cluster, cpu_seconds, noisy_scan, parser, tell

N_PIXELS = 16
GROUPS_PER_CHUNK = 16
MEMBERS = 4
NO_PROFILER = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--workers", type=int, default=64)
    flags.add_argument("--waves", type=int, default=20)
    flags.add_argument("--task-s", type=float, default=1.0)
    given = flags.parse_args()
    n_workers, waves = (8, 5) if given.quick else (given.workers, given.waves)
    n_chunks = n_workers * waves
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(n_workers, resources={"GPU": 1}, environment=NO_PROFILER) as (client, scheduler),
    ):
        store = Path(folder, "scan.zarr")
        noisy_scan(store, n_chunks * GROUPS_PER_CHUNK, N_PIXELS, step_px=4.0)
        group(store, GroupingSpec(members=MEMBERS))
        sizes = {"batch_size": GROUPS_PER_CHUNK, "groups_per_chunk": GROUPS_PER_CHUNK}
        # A short nap first, so that every process has loaded what it loads once.
        nap, model = (CheapModel(n_pixels=N_PIXELS, members=MEMBERS, sleep_s=s) for s in (0.05, given.task_s))
        reconstruct(store, nap, client=client, progress=False, **sizes)
        before, client_before, started = cpu_seconds(scheduler), cpu_seconds(os.getpid()), time.perf_counter()
        result = reconstruct(store, model, out=Path(folder, "object.zarr"), client=client, progress=False, **sizes)
        seconds = time.perf_counter() - started
        scheduler_s, client_s = cpu_seconds(scheduler) - before, cpu_seconds(os.getpid()) - client_before
        ideal = n_chunks * given.task_s / n_workers
        tell(
            "simulated_gpus",
            workers=n_workers,
            waves=waves,
            chunks=result.ptycho.records["plan"]["n_chunks"],
            tiles=result.ptycho.records["plan"]["n_tiles"],
            groups=result.ptycho.records["plan"]["n_groups"],
            ideal_s=ideal,
            seconds=seconds,
            efficiency=ideal / seconds,
            scheduler_cpu=scheduler_s / seconds,
            client_cpu=client_s / seconds,
            seconds_by_stage={name: value / n_chunks for name, value in result.ptycho.records["seconds"].items()},
        )


if __name__ == "__main__":
    main()
