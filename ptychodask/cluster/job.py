"""`JobSpec`: what is asked of a batch system, checked before the batch system sees it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from dask.utils import parse_bytes

from ptychodask.scan import PtychodaskError, check_choice

System = Literal["slurm", "pbs"]
"""Batch systems whose scripts are written."""

MIB = 2**20

SIGNAL_BEFORE_S = 60
"""How long before a job's time is over its run is told to stop, and keeps what is finished."""

MOST_WORKERS = 10_000
"""More in one job is taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a run asks of a batch system.

    Examples
    --------
    >>> spec = JobSpec(gpus=8, time="00:20", partition="gpu")
    >>> spec.n_workers, spec.seconds
    (8, 1200)
    """

    gpus: int | None = None
    """Workers with one GPU each; in place of `workers`."""

    workers: int | None = None
    """Workers without a GPU; one where `gpus` is not given either."""

    time: str = "01:00"
    """Wall-time limit, hours:minutes, hours:minutes:seconds, or minutes alone."""

    cpus: int = 4
    """Processor cores of one worker."""

    memory: str = "16GB"
    """Memory of one worker, with its unit."""

    nodes: int | None = None
    """Machines that the workers are spread over; by default the batch system's choice."""

    name: str = "ptychodask"
    """Of the job."""

    account: str | None = None
    """Whom its time is charged to."""

    partition: str | None = None
    """SLURM's partition, or the queue of PBS."""

    qos: str | None = None
    """SLURM's quality of service."""

    constraint: str | None = None
    """Features that SLURM's nodes must have, such as ``a100|h100``."""

    modules: tuple[str, ...] = ()
    """Environment modules that the job loads, in this order."""

    lines: tuple[str, ...] = ()
    """Shell lines that the job runs before anything else, after the modules."""

    directives: tuple[str, ...] = ()
    """Further directives, such as ``--exclusive``."""

    folder: str | None = None
    """Folder that all nodes see, for the log, the certificates and the scheduler's address."""

    scratch: str | None = None
    """Folder of each node where workers put what does not fit into memory; by default a temporary one of the node."""

    interface: str | None = None
    """Network interface that processes on several nodes speak over, such as ``ib0``."""

    python: str = sys.executable
    """Interpreter with ptychodask, at the same path on all nodes."""

    requeue: bool = True
    """Whether a job that meets its time limit, or loses its node, goes back into the queue to go on."""

    system: System = "slurm"
    """Batch system."""

    def __post_init__(self) -> None:
        check_choice("system", self.system, get_args(System), "job")
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    _check_text(field.name, text)
        if self.gpus is not None and self.workers is not None:
            raise PtychodaskError(
                f"job: gpus={self.gpus} (--gpus) and workers={self.workers} (--workers); each GPU has a worker of its "
                "own, so give one of them"
            )
        for name, most in (("gpus", MOST_WORKERS), ("workers", MOST_WORKERS), ("nodes", MOST_WORKERS), ("cpus", 1024)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise PtychodaskError(f"job: {name} is {value}, expected 1 to {most}")
        if self.nodes is not None and self.nodes > self.n_workers:
            raise PtychodaskError(
                f"job: nodes is {self.nodes} for {self.n_workers} workers, expected a worker on each node or more"
            )
        for name in ("qos", "constraint", "interface", "nodes"):
            if self.system == "pbs" and getattr(self, name) not in (None, 1):
                raise PtychodaskError(
                    f"job: {name} is {getattr(self, name)!r}, which the script for PBS does not use: it stays on one "
                    "node; leave it away, or add PBS's own words with directives (--directive)"
                )
        if self.seconds < 3 * SIGNAL_BEFORE_S:
            raise PtychodaskError(
                f"job: time is {self.time!r}, {self.seconds} s, expected 3 minutes or more: a run is told to stop "
                f"{SIGNAL_BEFORE_S} s before its end"
            )
        if self.memory_bytes < 256 * MIB:
            raise PtychodaskError(f"job: memory is {self.memory!r}, expected 256MiB or more, with its unit (16GB)")

    @property
    def n_workers(self) -> int:
        """Workers in all."""
        return self.gpus or self.workers or 1

    @property
    def seconds(self) -> int:
        """The wall-time limit."""
        return wall_time_s(self.time)

    @property
    def clock_time(self) -> str:
        """The wall-time limit as all batch systems read it: hours:minutes:seconds."""
        return f"{self.seconds // 3600:02d}:{self.seconds // 60 % 60:02d}:{self.seconds % 60:02d}"

    @property
    def memory_bytes(self) -> int:
        """Memory of one worker."""
        try:
            return int(parse_bytes(self.memory))
        except (ValueError, AttributeError, OverflowError) as error:
            raise PtychodaskError(f"job: memory is {self.memory!r}, expected a number with its unit (16GB)") from error


def wall_time_s(text: str) -> int:
    """Seconds of a wall-time limit.

    Parameters
    ----------
    text : str
        Minutes, hours:minutes, or hours:minutes:seconds. SLURM itself takes two numbers for minutes and seconds.

    Raises
    ------
    PtychodaskError
        If it is none of them.

    Examples
    --------
    >>> wall_time_s("90"), wall_time_s("00:20"), wall_time_s("36:00:30")
    (5400, 1200, 129630)
    """
    found = re.fullmatch(r"(?:(\d{1,4}):)?(\d{1,2})(?::(\d\d))?|(\d{1,6})", text, re.ASCII)
    hours, minutes, seconds, alone = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    if found is None or (":" in text and max(minutes, seconds) > 59):
        raise PtychodaskError(
            f"job: time is {text!r}, expected hours:minutes (00:20), hours:minutes:seconds (00:20:00), or minutes (20)"
        )
    return 3600 * hours + 60 * (minutes + alone) + seconds


def _check_text(name: str, text: str) -> None:
    """Raise `PtychodaskError` for a text that would end its line in a script, or say nothing there."""
    if not text.strip() or not text.isprintable():
        raise PtychodaskError(f"job: {name} is {text!r}, expected printable text of one line")


def job_folder(spec: JobSpec, default: Path) -> Path:
    """The folder of a spec for what all nodes see; raises `PtychodaskError` where it does not exist.

    Parameters
    ----------
    spec : JobSpec
    default : Path
        Taken where the spec names none.
    """
    folder = (default if spec.folder is None else Path(spec.folder).expanduser()).resolve()
    if not folder.is_dir():
        raise PtychodaskError(
            f"{folder}: is no folder; make it first, where all nodes see it, or name another (--folder)"
        )
    return folder
