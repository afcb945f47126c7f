"""Worker processes on this machine, forked from one that has loaded the engine: python -m tests.benchmarks.nodes."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from multiprocessing import forkserver
from pathlib import Path

import dask
from distributed import Nanny

THREADS = 2
"""One reads while the other predicts, as on the engine's own clusters."""


async def serve(address: str, n_workers: int, resources: dict[str, float]) -> None:
    """Run the workers until they are ended."""
    nannies = [
        Nanny(address, nthreads=THREADS, resources=resources, host="127.0.0.1", memory_limit=0, dashboard=False)
        for _ in range(n_workers)
    ]
    await asyncio.gather(*nannies)
    await asyncio.gather(*(nanny.finished() for nanny in nannies))


if __name__ == "__main__":
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    multiprocessing.get_context("forkserver").set_forkserver_preload(["distributed", "ptychodask.reconstruction"])
    forkserver.ensure_running()
    file, count, asked = sys.argv[1:]
    asyncio.run(serve(json.loads(Path(file).read_text())["address"], int(count), json.loads(asked)))
