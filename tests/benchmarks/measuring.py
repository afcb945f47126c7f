"""What the measurements share: cheap scans, cheap models, clusters of processes, and one line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from distributed import Client

from ptychodask.cluster.job import WORKER_VARIABLES
from ptychodask.scan import Scan
from ptychodask.simulate import PATHS
from ptychodask.store.write import write_scan

DISTINCT_PATTERNS = 4096


class NoisyPatterns:
    """Photon noise around a smooth pattern, as uint16: a few thousand different ones, taken in turn."""

    def __init__(self, n_patterns: int, n_pixels: int, seed: int = 0) -> None:
        self.shape = (n_patterns, n_pixels, n_pixels)
        self.dtype = np.dtype(np.uint16)
        distance = np.hypot(*np.mgrid[-n_pixels // 2 : n_pixels // 2, -n_pixels // 2 : n_pixels // 2])
        mean = 200 * np.exp(-distance / (n_pixels / 8))
        size = (min(DISTINCT_PATTERNS, n_patterns), n_pixels, n_pixels)
        self._made = np.random.default_rng(seed).poisson(mean, size).astype(np.uint16)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self._made[np.arange(self.shape[0])[index] % len(self._made)]


def noisy_scan(store: Path, n_patterns: int, n_pixels: int, *, step_px: float = 2.0, path: str = "raster") -> Scan:
    """A store of patterns that cost nothing to make."""
    return write_scan(
        store,
        diffraction=NoisyPatterns(n_patterns, n_pixels),
        position_yx_px=PATHS[path](n_patterns, step_px, np.random.default_rng(1)),
        probe=np.ones((1, n_pixels, n_pixels), np.complex64),
        domain="counts",
        calibration="as_given",
        progress=False,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class CheapModel:
    """A network that gives constants, each call after a nap; it needs no network library."""

    n_pixels: int
    members: int
    sleep_s: float = 0.0
    kind: str = "cheap"
    output: Literal["member", "group"] = "member"
    path: str | None = None

    @property
    def content_hash(self) -> str:
        return f"constants after {self.sleep_s} s"

    def bind(self, scan: Scan) -> CheapModel:
        return self

    def compile(self, batch_size: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        def call(x: np.ndarray, offset_yx_px: np.ndarray) -> np.ndarray:
            if self.sleep_s:
                time.sleep(self.sleep_s)
            return np.ones((batch_size, self.members, self.n_pixels, self.n_pixels), np.complex64)

        return call


@contextmanager
def cluster(
    n_workers: int, *, resources: dict[str, float] | None = None, environment: dict[str, str] | None = None
) -> Iterator[tuple[Client, int]]:
    """A client, and the process id of its scheduler: scheduler and workers are processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scheduler.json")
        started = []
        try:
            flags = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
            started.append(_start(["distributed.cli.dask_scheduler", *flags], environment))
            while not (file.is_file() and file.read_text()):
                time.sleep(0.1)
            nodes = ["tests.benchmarks.nodes", str(file), str(n_workers), json.dumps(resources or {})]
            started.append(_start(nodes, environment))
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(n_workers, timeout=600)
                yield client, started[0].pid
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait()


def _start(module: list[str], environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    # A nanny that forks its workers cannot give them what Dask's and our own worker processes have from the start.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "MALLOC_TRIM_THRESHOLD_": "65536", **WORKER_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", *module], env=os.environ | quiet | (environment or {}), stderr=subprocess.DEVNULL
    )


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken; from Linux's /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the flag that all measurements have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a small run that shows whether the measurement works")
    return made


def tell(name: str, **figures: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps({"measurement": name, **figures}) + "\n")
    sys.stdout.flush()
