"""Many reconstructions in one process, for as long as one likes: what grows, and what stays behind.

    python -m tests.campaigns.soak --minutes 120

Each round simulates, reconstructs in memory, to disk, lazily, with
errors and from a stopped run, in the process itself and on worker processes. The table has a line for each tenth of
the time; the last line compares it with the first one after the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

import ptychodask
from ptychodask.cluster.clients import local_client
from ptychodask.errors import PtychodaskError
from ptychodask.models import ModelSpec, Optics, untrained_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from models_for_tests import FailingModel, LinearModel

N_PIXELS = 16


def one_round(folder: Path, number: int, model: Any) -> None:
    """Simulate a scan and reconstruct it in each way."""
    store, out = folder / "scan.zarr", folder / "object.zarr"
    ptychodask.simulate(store, n_pixels=N_PIXELS, n_patterns=200, step_px=3.0, seed=number % 7, progress=False)
    fields = {"groups_per_chunk": 40, "tile": 32, "progress": False}
    memory = ptychodask.reconstruct(store, model, **fields)
    disk = ptychodask.reconstruct(store, model, out=out, verify=1, **fields).compute()
    np.testing.assert_array_equal(memory["object"].values, disk["object"].values)
    lazy = ptychodask.reconstruct(store, model, compute=False, **fields)
    lazy.isel(y=slice(0, 20), x=slice(0, 20)).ptycho.compute()
    for _ in range(2):
        with suppress(PtychodaskError):
            ptychodask.reconstruct(store, FailingModel(), out=folder / "failing.zarr", **fields)
    ptychodask.reconstruct(store, LinearModel(), out=out, overwrite=True, on_error="skip", **fields)
    for path in folder.iterdir():
        shutil.rmtree(path)


def counts(folder: Path) -> dict[str, float]:
    """What this process holds now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "MiB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "processes": len(children),
        "left in the folder": len(list(folder.iterdir())),
    }


def main() -> None:
    """Run rounds and print what is held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=0.1, help="share of the time that the caches take to fill")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0 runs in this process")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    started, seconds = time.monotonic(), 60 * asked.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = ptychodask.simulate(folder / "any.zarr", n_pixels=N_PIXELS, n_patterns=50, step_px=3.0, progress=False)
        model = untrained_model(ModelSpec(kind="pinn", n_pixels=N_PIXELS, levels=2), Optics.of(scan))
        shutil.rmtree(folder / "any.zarr")
        first, number, tenth = None, 0, 0
        with local_client(asked.workers) if asked.workers else nullcontext():
            while (passed := time.monotonic() - started) < seconds:
                if passed >= tenth * seconds / 10:
                    found = counts(folder)
                    print(f"{passed / 60:6.1f} min {number:6d} rounds ", _told(found), flush=True)
                    first = found if first is None and passed >= asked.warm_up * seconds else first
                    tenth += 1
                one_round(folder, number, model)
                number += 1
        last = counts(folder)
    print(f"{(time.monotonic() - started) / 60:6.1f} min {number:6d} rounds ", _told(last))
    assert first is not None
    print(f"memory {last['MiB'] / first['MiB'] - 1:+.1%} since the warm-up")


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{value:.0f} {name}" for name, value in found.items())


if __name__ == "__main__":
    main()
