"""A reconstruction as one job of a batch system: its script, and its submission."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptychodask.cluster import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    LOOPBACK,
    LOOPBACK_HOST,
    THREAD_VARIABLES,
    THREADS_PER_WORKER,
    WORKER_VARIABLES,
)
from ptychodask.cluster.job import MIB, SIGNAL_BEFORE_S, JobSpec, job_folder
from ptychodask.places import Location, parse_location
from ptychodask.scan import PtychodaskError, with_fields
from ptychodask.store import ScanReader

OWN_OPTIONS = ("--scheduler", "--workers", "--tls", "--tls-folder", "--host")
"""Options of `reconstruct` that the script sets itself."""

JOB_VARIABLES = {
    # Why the profiler is off: see `ptychodask.cluster._started`.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "warning",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Environment of workers that outlive the call which starts them, beside that of all workers."""

BESIDE_WORKERS_MIB = 2048
"""Memory that scheduler and client take, which run beside the workers of the first node."""

PATIENCE_S = 20
"""How long workers may take to end when all is done."""

WORKERS_WITHIN_S = 300
"""How long a worker waits for the scheduler before it gives up."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that a batch system took."""

    number: str
    """What the batch system calls it."""

    log: Path
    """File that the run's output goes to; that of scheduler and workers is in one ending in ``.workers.log`` beside."""

    script: Path
    """The script that it runs, as it was submitted."""


def submit(
    store: str | Path, spec: JobSpec = JobSpec(), options: Sequence[str] = (), **spec_fields: Any
) -> SubmittedJob:
    """Submit a reconstruction to SLURM: scheduler, workers and client in one job, which speak TLS to each other.

    Parameters
    ----------
    store : path
        The scan's store, on a file system that all nodes see.
    spec : JobSpec
        What is asked of SLURM.
    options : sequence of str
        Options of ``ptychodask reconstruct``, such as ``("--polish", "2")``.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    SubmittedJob

    Raises
    ------
    PtychodaskError
        If the store cannot be opened, an option is the job's own, there is no ``sbatch``, or SLURM refuses the job.

    Notes
    -----
    A minute before the time limit the run is told to stop. It keeps what is finished, and the job goes back into the
    queue, where it goes on (``reconstruct --resume``), unless ``requeue=False``.
    """
    spec = with_fields(spec, spec_fields)
    if spec.system != "slurm":
        raise PtychodaskError(
            f"submit: a script for {spec.system} is a template to look through; print it with --dry-run "
            "(batch_script) and submit it yourself"
        )
    script = batch_script(store, spec, options)
    number = sbatch(script, "--parsable").split(";")[0]
    folder = job_folder(spec, _beside(parse_location(store).resolve()))
    kept = folder / f"{spec.name}-{number}.sh"
    kept.write_text(script)
    return SubmittedJob(number, folder / f"{spec.name}-{number}.log", kept)


def _beside(store: Location) -> Path:
    """Folder of a store; this one, where the store is in a bucket."""
    return store.parent if isinstance(store, Path) else Path.cwd()


def sbatch(script: str, *options: str) -> str:
    """Hand a script to SLURM; what ``sbatch`` prints.

    Raises
    ------
    PtychodaskError
        If there is no ``sbatch``, or it refuses; what it says, in one line.
    """
    try:
        done = subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=False, errors="replace"
        )
    except FileNotFoundError as error:
        raise PtychodaskError(
            "sbatch: there is none here; go where SLURM's commands are (a login node); submit --dry-run prints the "
            "script without"
        ) from error
    if done.returncode != 0:
        said = "; ".join(line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines())
        raise PtychodaskError(f"sbatch: SLURM refuses the job: {said or f'ended with {done.returncode}'}")
    return done.stdout.strip()


def batch_script(store: str | Path, spec: JobSpec = JobSpec(), options: Sequence[str] = (), **spec_fields: Any) -> str:
    """The script that `submit` submits, in POSIX shell.

    Parameters
    ----------
    store, spec, options, **spec_fields
        As for `submit`. For PBS it is a template: it was never run by a PBS.

    Returns
    -------
    str

    Raises
    ------
    PtychodaskError
        If the store cannot be opened, a name does not fit into a script, or an option is the job's own.
    """
    spec = with_fields(spec, spec_fields)
    own = sorted({option.split("=")[0] for option in options} & set(OWN_OPTIONS))
    if own:
        raise PtychodaskError(f"submit: {', '.join(own)}: the job sets this itself; leave it away")
    ScanReader(store)
    path = parse_location(store).resolve()
    folder = job_folder(spec, _beside(path))
    for text in (str(path), str(folder), str(Path.cwd()), *options):
        if not text.isprintable() or "\\" in text:
            raise PtychodaskError(
                f"submit: {text!r} does not fit into a script: expected no line breaks, no backslashes"
            )
    if "/" in spec.name:
        raise PtychodaskError(f"submit: name is {spec.name!r}, expected no slash: the log is named after it")
    parts = _slurm_parts(spec, folder) if spec.system == "slurm" else _pbs_parts(spec, folder)
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Scheduler, workers ({spec.n_workers}) and client in one job: ptychodask submit {version('ptychodask')}",
            *parts.directives,
            *prologue(spec),
            "set -u",
            "",
            f"python={shlex.quote(spec.python)}",
            f"store={shlex.quote(str(path))}",
            f"folder={shlex.quote(str(folder / f'.{spec.name}'))}-{parts.number}",
            f"others={shlex.quote(str(folder / spec.name))}-{parts.number}.workers.log",
            "",
            _BEGINNING,
            parts.hosts,
            _SCHEDULER,
            parts.workers,
            "",
            parts.resume,
            _RUN.replace("@OPTIONS@", " ".join([*map(shlex.quote, options), '${resume:+"$resume"}'])).replace(
                "@PATIENCE@", str(PATIENCE_S)
            ),
            parts.end,
            "",
        ]
    )


@dataclass(frozen=True)
class _Parts:
    """What differs between the scripts of batch systems."""

    directives: list[str]

    number: str
    """The job's number, in shell."""

    hosts: str
    """Sets the options that say where scheduler and workers listen."""

    workers: str
    """Starts the workers, see `_watched`."""

    resume: str
    """Sets `resume` to the option that goes on with an earlier run."""

    end: str
    """What becomes of a job whose run was stopped; ends the script."""


def worker_variables(n_threads: int) -> dict[str, str]:
    """Environment of a worker whose libraries may start some threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(n_threads)) | WORKER_VARIABLES | JOB_VARIABLES


def prologue(spec: JobSpec) -> list[str]:
    """Shell lines that prepare a job: its modules, its own lines, and the environment of its workers."""
    # Plain shells know modules through the profile alone.
    known = ["# shellcheck source=/dev/null", "command -v module >/dev/null || . /etc/profile"] if spec.modules else []
    return [
        *known,
        *(f"module load {shlex.quote(module)}" for module in spec.modules),
        *(f"export {name}={value}" for name, value in worker_variables(spec.cpus).items()),
        *spec.lines,
    ]


_BEGINNING = f"""\
# Whoever has these credentials can run code as this user: the folder is closed to others, and goes in the end.
rm -rf "$folder"
"$python" -c 'import sys; from ptychodask.cluster import write_credentials as write; write(sys.argv[1])' "$folder" ||
  exit 2
trap 'rm -rf "$folder"' EXIT
run=
stopped=
lost=
trap 'stopped=yes; [ -z "$run" ] || kill -TERM "$run"' TERM
trap 'lost=yes; [ -z "$run" ] || kill -TERM "$run"' USR1
set -- --protocol tls --scheduler-file "$folder/scheduler.json" --no-dashboard --dashboard-address {LOOPBACK} \\
  --tls-ca-file "$folder/{AUTHORITY}" --tls-cert "$folder/{CERTIFICATE}" --tls-key "$folder/{KEY}\""""

_SCHEDULER = """
"$python" -m distributed.cli.dask_scheduler --port 0 "$@" >>"$others" 2>&1 &
scheduler=$!
while [ ! -s "$folder/scheduler.json" ]; do
  kill -0 "$scheduler" 2>/dev/null || exit 2
  sleep 1
done"""

_RUN = """\
"$python" -m ptychodask.cli reconstruct "$store" --scheduler "$folder/scheduler.json" --tls-folder "$folder" \\
  @OPTIONS@ &
run=$!
[ -z "$stopped$lost" ] || kill -TERM "$run"
wait "$run"
code=$?
# A signal ends the waiting, and not the run.
while kill -0 "$run" 2>/dev/null; do
  wait "$run"
  code=$?
done
trap '' USR1
# Workers end with their scheduler; what hangs ends with the job.
kill "$scheduler"
patience=@PATIENCE@
while [ ! -e "$folder/over" ] && [ "$patience" -gt 0 ]; do
  sleep 1
  patience=$((patience - 1))
done
rm -rf "$folder"
if [ -n "$lost" ] && [ "$code" -ne 0 ]; then
  echo "all workers ended before the run did: see $others" >&2
  exit 2
fi
"""


def _watched(workers: str) -> str:
    """Shell that runs workers in the background, and tells the script when all have ended."""
    return f'(\n{workers}\n  : >"$folder/over"\n  kill -USR1 "$$"\n) >>"$others" 2>&1 &'


def _worker_command(spec: JobSpec) -> str:
    scratch = '"${TMPDIR:-/tmp}"' if spec.scratch is None else shlex.quote(spec.scratch)
    resources = " --resources GPU=1" if spec.gpus else ""
    return (
        f'"$python" -m distributed.cli.dask_worker --nthreads {THREADS_PER_WORKER} '
        f"--memory-limit {spec.memory_bytes}{resources} \\\n"
        f'      --local-directory {scratch} --death-timeout {WORKERS_WITHIN_S} "$@"'
    )


def _slurm_parts(spec: JobSpec, folder: Path) -> _Parts:
    # A percent sign begins a pattern in the names of logs.
    log = f"{folder}/{spec.name}-".replace("%", "%%")
    named = {
        "job-name": spec.name,
        "output": f"{log}%j.log",
        "chdir": str(Path.cwd()),
        "account": spec.account,
        "partition": spec.partition,
        "qos": spec.qos,
        "constraint": spec.constraint,
        "nodes": spec.nodes,
        "ntasks": spec.n_workers,
        "cpus-per-task": spec.cpus,
        "gpus-per-task": 1 if spec.gpus else None,
        "mem-per-cpu": f"{_mib_per_cpu(spec)}M",
        "time": spec.clock_time,
        "signal": f"B:TERM@{SIGNAL_BEFORE_S}",
        "open-mode": "append",
    }
    directives = [
        *(f"--{name}={shlex.quote(str(value))}" for name, value in named.items() if value is not None),
        "--requeue" if spec.requeue else "--no-requeue",
        *spec.directives,
    ]
    gpu = " --gpus-per-task=1" if spec.gpus else ""
    elsewhere = "" if spec.interface is None else f'\nelse\n  set -- "$@" --interface {shlex.quote(spec.interface)}'
    return _Parts(
        directives=[f"#SBATCH {directive}" for directive in directives],
        number='"$SLURM_JOB_ID"',
        hosts=f'if [ "$SLURM_JOB_NUM_NODES" -eq 1 ]; then\n  set -- "$@" --host {LOOPBACK_HOST}{elsewhere}\nfi',
        workers=_watched(
            f"  srun --ntasks={spec.n_workers} --cpus-per-task={spec.cpus}{gpu} --kill-on-bad-exit=0 --wait=0 \\\n"
            f"    {_worker_command(spec)}"
        ),
        resume='resume=\n[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=--resume',
        end=_SLURM_END if spec.requeue else _LAST_WORDS,
    )


def _mib_per_cpu(spec: JobSpec) -> int:
    """What the job asks for: the workers' memory, and on each of them what runs beside those of the first node."""
    return -(-(spec.memory_bytes // MIB + BESIDE_WORKERS_MIB) // spec.cpus)


_LAST_WORDS = """\
[ "$code" -ne 143 ] || echo "stopped before its end: submit again with --resume behind --" >&2
exit "$code\""""

_SLURM_END = """\
# Stopped before its end: back into the queue, to go on there.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "SLURM did not take it back: submit again with --resume behind --" >&2
fi
exit "$code\""""


def _pbs_parts(spec: JobSpec, folder: Path) -> _Parts:
    """One node, whose GPUs are given to the workers in turn."""
    n = spec.n_workers
    memory_mib = n * (spec.memory_bytes // MIB) + BESIDE_WORKERS_MIB
    gpus = f":ngpus={spec.gpus}" if spec.gpus else ""
    named = {
        "N": spec.name,
        "o": f"{folder}/",
        "j": "oe",
        "A": spec.account,
        "q": spec.partition,
        "l": f"select=1:ncpus={n * spec.cpus}{gpus}:mem={memory_mib}mb",
        "r": "y" if spec.requeue else "n",
    }
    options = [f"-{name} {shlex.quote(value)}" for name, value in named.items() if value is not None]
    options += [f"-l walltime={spec.clock_time}", *spec.directives]
    devices = f"devices=${{CUDA_VISIBLE_DEVICES:-{','.join(map(str, range(n)))}}}\n" if spec.gpus else ""
    own = 'CUDA_VISIBLE_DEVICES=$(echo "$devices" | cut -d, -f "$number") \\\n      ' if spec.gpus else ""
    loop = f'  number=0\n  while [ "$number" -lt {n} ]; do\n    number=$((number + 1))\n'
    return _Parts(
        directives=[f"#PBS {option}" for option in options] + [f"cd {shlex.quote(str(Path.cwd()))} || exit 2"],
        number='"$PBS_JOBID"',
        hosts=f'set -- "$@" --host {LOOPBACK_HOST}',
        workers=devices + _watched(f"{loop}    {own}{_worker_command(spec)} &\n  done\n  wait"),
        resume="# A job that PBS ran again goes on with what is there.\nresume=--resume",
        end=_LAST_WORDS,
    )
