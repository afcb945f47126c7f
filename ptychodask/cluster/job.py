"""`JobSpec`: resources and options of a batch job, checked before submission."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import lazy_loader

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.options import option

# The options of `submit` are read from the spec, also for its help, which needs no Dask.
dask = lazy_loader.load("dask")

System = Literal["slurm", "pbs"]
"""Batch systems that scripts can be written for."""


MIB = 2**20


SIGNAL_BEFORE_S = 60
"""Time before the limit of a job at which its run is stopped; finished parts are kept."""


MOST_WORKERS = 10_000
"""Upper limit of workers in one job; more is treated as a mistake."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Resources and options of a batch job.

    Examples
    --------
    >>> spec = JobSpec(gpus=8, time="00:20", partition="gpu")
    >>> spec.n_workers, spec.seconds
    (8, 1200)
    """

    gpus: int | None = option(None, help="Number of workers with one GPU each.")
    """Workers with one GPU each; instead of `workers`."""

    workers: int | None = option(None, help="Number of workers without a GPU.")
    """Workers without a GPU; one if `gpus` is not given either."""

    time: str = option("01:00", help="Wall-time limit as HH:MM, HH:MM:SS or minutes; by default 01:00.")
    """Wall-time limit: hours:minutes, hours:minutes:seconds, or minutes."""

    cpus: int = option(4, help="CPU cores per worker.")
    """CPU cores of one worker."""

    memory: str = option("16GB", help="Memory per worker, such as 16GB.")
    """Memory of one worker, with unit."""

    nodes: int | None = option(None, help="Number of nodes; by default the batch system chooses.")
    """Nodes that the workers are distributed over; by default chosen by the batch system."""

    name: str = option("ptychodask", help="Name of the job and its log.")
    """Name of the job."""

    account: str | None = option(None, help="Account to charge.")
    """Account that the time is charged to."""

    partition: str | None = option(None, help="SLURM partition, or PBS queue.")
    """Partition of SLURM, or queue of PBS."""

    qos: str | None = option(None, help="SLURM quality of service.")
    """Quality of service in SLURM."""

    constraint: str | None = option(None, help="Required features of SLURM nodes, such as a100|h100.")
    """Features required of nodes in SLURM, such as ``a100|h100``."""

    modules: tuple[str, ...] = option((), help="Environment modules to load.", flag="--module")
    """Environment modules to load, in this order."""

    lines: tuple[str, ...] = option((), help="Shell lines to run at the start, after the modules.", flag="--line")
    """Shell lines to run first, after loading the modules."""

    directives: tuple[str, ...] = option(
        (), help="Further directives, such as --directive=--exclusive.", flag="--directive"
    )
    """Additional directives, such as ``--exclusive``."""

    folder: str | None = option(
        None, help="Folder for the log, shared by all nodes; by default the folder of the store."
    )
    """Folder shared by all nodes, for the log, the certificates and the scheduler's address."""

    scratch: str | None = option(None, help="Local folder of each node for data that do not fit into memory.")
    """Folder on each node for data that workers move out of memory; by default the node's temporary folder."""

    interface: str | None = option(None, help="Network interface between nodes, such as ib0.")
    """Network interface for communication between nodes, such as ``ib0``."""

    python: str = option(sys.executable, help="Python interpreter with ptychodask; by default this one.")
    """Interpreter with ptychodask, at the same path on all nodes."""

    requeue: bool = option(True, help="Put the job back into the queue after its time limit, to resume.")
    """Requeue the job when it reaches its time limit or loses its node, to resume the run."""

    system: System = option("slurm", help="Batch system: slurm, or pbs (a template, only with --dry-run).")
    """Batch system that the script is for."""

    def __post_init__(self) -> None:
        check_choice("system", self.system, get_args(System), "job")
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    _check_text(field.name, text)
        if self.gpus is not None and self.workers is not None:
            raise PtychodaskError(
                f"job: gpus={self.gpus} (--gpus) and workers={self.workers} (--workers); each GPU gets one worker, so "
                "pass only one of them"
            )
        for name, most in (("gpus", MOST_WORKERS), ("workers", MOST_WORKERS), ("nodes", MOST_WORKERS), ("cpus", 1024)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise PtychodaskError(f"job: {name} is {value}, expected 1 to {most}")
        if self.nodes is not None and self.nodes > self.n_workers:
            raise PtychodaskError(
                f"job: nodes is {self.nodes} for {self.n_workers} workers, expected at least one worker per node"
            )
        for name in ("qos", "constraint", "interface", "nodes"):
            if self.system == "pbs" and getattr(self, name) not in (None, 1):
                raise PtychodaskError(
                    f"job: {name} is {getattr(self, name)!r}, which the script for PBS does not use: it runs on one "
                    "node; omit it, or add options of PBS with directives (--directive)"
                )
        if self.seconds < 3 * SIGNAL_BEFORE_S:
            raise PtychodaskError(
                f"job: time is {self.time!r}, {self.seconds} s, expected 3 minutes or more: the run is stopped "
                f"{SIGNAL_BEFORE_S} s before the limit"
            )
        if self.memory_bytes < 256 * MIB:
            raise PtychodaskError(f"job: memory is {self.memory!r}, expected 256MiB or more, with unit (16GB)")

    @property
    def n_workers(self) -> int:
        """Total number of workers."""
        return self.gpus or self.workers or 1

    @property
    def seconds(self) -> int:
        """Wall-time limit in seconds."""
        return wall_time_s(self.time)

    @property
    def clock_time(self) -> str:
        """Wall-time limit as hours:minutes:seconds, which all batch systems accept."""
        return f"{self.seconds // 3600:02d}:{self.seconds // 60 % 60:02d}:{self.seconds % 60:02d}"

    @property
    def memory_bytes(self) -> int:
        """Memory of one worker in bytes."""
        try:
            return int(dask.utils.parse_bytes(self.memory))
        except (ValueError, AttributeError, OverflowError) as error:
            raise PtychodaskError(f"job: memory is {self.memory!r}, expected a number with unit (16GB)") from error


def wall_time_s(text: str) -> int:
    """Wall-time limit in seconds.

    Parameters
    ----------
    text : str
        Minutes, hours:minutes, or hours:minutes:seconds. SLURM itself interprets two numbers as minutes and seconds.

    Raises
    ------
    PtychodaskError
        If the text has another form.

    Examples
    --------
    >>> wall_time_s("90"), wall_time_s("00:20"), wall_time_s("36:00:30")
    (5400, 1200, 129630)
    """
    match = re.fullmatch(r"(?:(\d{1,4}):)?(\d{1,2})(?::(\d\d))?|(\d{1,6})", text, re.ASCII)
    hours, minutes, seconds, only_minutes = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    if match is None or (":" in text and max(minutes, seconds) > 59):
        raise PtychodaskError(
            f"job: time is {text!r}, expected hours:minutes (00:20), hours:minutes:seconds (00:20:00), or minutes (20)"
        )
    return 3600 * hours + 60 * (minutes + only_minutes) + seconds


def _check_text(name: str, text: str) -> None:
    """Raise `PtychodaskError` unless the text is one printable line."""
    if not text.strip() or not text.isprintable():
        raise PtychodaskError(f"job: {name} is {text!r}, expected printable text of one line")


def job_folder(spec: JobSpec, default: Path) -> Path:
    """Absolute path of the folder of a spec that all nodes share.

    Parameters
    ----------
    spec : JobSpec
    default : Path
        Used if the spec names no folder.

    Raises
    ------
    PtychodaskError
        If the folder does not exist.
    """
    folder = (default if spec.folder is None else Path(spec.folder).expanduser()).resolve()
    if not folder.is_dir():
        raise PtychodaskError(
            f"{folder}: the folder does not exist; create it on a file system that all nodes share, or pass "
            "another (--folder)"
        )
    return folder


THREADS_PER_WORKER = 2
"""One thread reads and sums while the other predicts."""


THREAD_VARIABLES = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
"""Environment variables that limit the number of threads of numerical libraries."""


WORKER_VARIABLES = {"MALLOC_ARENA_MAX": "2"}
"""Environment of worker processes: with fewer heaps in the C library, less freed memory stays allocated."""


LOOPBACK_HOST = "127.0.0.1"
"""Default address that clusters listen on: reachable from this machine only."""


LOOPBACK = f"{LOOPBACK_HOST}:0"
"""Address for dashboards: a free port reachable from this machine only; Dask's default is all interfaces."""
