"""Scripts of batch jobs that run a reconstruction, and their submission."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptychodask.cluster.job import (
    LOOPBACK,
    LOOPBACK_HOST,
    MIB,
    SIGNAL_BEFORE_S,
    THREAD_VARIABLES,
    THREADS_PER_WORKER,
    WORKER_VARIABLES,
    JobSpec,
    job_folder,
)
from ptychodask.cluster.tls import AUTHORITY, CERTIFICATE, KEY
from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.options import takes_fields
from ptychodask.storage.location import Location, parse_location
from ptychodask.store import StoredScan

OPTIONS_OF_JOB = ("--scheduler", "--workers", "--tls", "--tls-folder", "--host")
"""Options of `reconstruct` that the script sets itself."""

JOB_VARIABLES = {
    # For the reason why the profiler is off see `ptychodask.cluster.clients._local_cluster`.
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "warning",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""Additional environment of workers that are started without `local_client`."""

BESIDE_WORKERS_MIB = 2048
"""Memory of scheduler and client, which run on the first node with its workers."""

PATIENCE_S = 20
"""Time that workers may take to end after the run."""

WORKERS_WITHIN_S = 300
"""Time that a worker waits for the scheduler before it ends."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job accepted by a batch system."""

    number: str
    """Job number in the batch system."""

    log: Path
    """Log of the run; that of scheduler and workers is next to it and ends in ``.workers.log``."""

    script: Path
    """The script as submitted."""


@takes_fields(JobSpec)
def submit(
    store: str | Path, spec: JobSpec = JobSpec(), options: Sequence[str] = (), **spec_fields: Any
) -> SubmittedJob:
    """Submit a reconstruction to SLURM as one job.

    The job runs scheduler, workers and client, which communicate over TLS.

    Parameters
    ----------
    store : path
        Store of the scan, on a file system that all nodes share.
    spec : JobSpec
        Resources and options of the job.
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
        If the store cannot be opened, an option is set by the job, ``sbatch`` is not found, or SLURM refuses the job.

    Notes
    -----
    A minute before the time limit the run is stopped. Finished parts are kept, and the job is requeued and resumes
    the run (``reconstruct --resume``), unless ``requeue=False``.
    """
    spec = with_fields(spec, spec_fields)
    if spec.system != "slurm":
        raise PtychodaskError(
            f"submit: the script for {spec.system} is a template; print it with --dry-run (batch_script), check it and "
            "submit it yourself"
        )
    script = batch_script(store, spec, options)
    number = sbatch(script, "--parsable").split(";")[0]
    folder = job_folder(spec, _folder_of(parse_location(store).resolve()))
    path = folder / f"{spec.name}-{number}.sh"
    path.write_text(script)
    return SubmittedJob(number, folder / f"{spec.name}-{number}.log", path)


def _folder_of(store: Location) -> Path:
    """Folder of a store, or the current folder for a bucket."""
    return Path.cwd() if store.local_path is None else store.local_path.parent


def sbatch(script: str, *options: str) -> str:
    """Submit a script to SLURM and return the output of ``sbatch``.

    Raises
    ------
    PtychodaskError
        If ``sbatch`` is not found, or SLURM refuses the job, with its message in one line.
    """
    try:
        done = subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=False, errors="replace"
        )
    except FileNotFoundError as error:
        raise PtychodaskError(
            "sbatch not found, expected SLURM's commands; run on a login node, or use submit --dry-run to print the "
            "script"
        ) from error
    if done.returncode != 0:
        report = "; ".join(line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines())
        raise PtychodaskError(
            f"sbatch: SLURM refuses the job: {report or f'sbatch ended with exit code {done.returncode}'}"
        )
    return done.stdout.strip()


@takes_fields(JobSpec)
def batch_script(store: str | Path, spec: JobSpec = JobSpec(), options: Sequence[str] = (), **spec_fields: Any) -> str:
    """Script of a reconstruction as a batch job, in POSIX shell.

    Parameters
    ----------
    store, spec, options, **spec_fields
        As for `submit`. The script for PBS is a template that was never run with PBS.

    Returns
    -------
    str

    Raises
    ------
    PtychodaskError
        If the store cannot be opened, a name cannot be used in a script, or an option is set by the job.
    """
    spec = with_fields(spec, spec_fields)
    reserved = sorted({option.split("=")[0] for option in options} & set(OPTIONS_OF_JOB))
    if reserved:
        raise PtychodaskError(f"submit: {', '.join(reserved)}: set by the job itself; omit it")
    StoredScan(store)
    path = parse_location(store).resolve()
    folder = job_folder(spec, _folder_of(path))
    for text in (str(path), str(folder), str(Path.cwd()), *options):
        if not text.isprintable() or "\\" in text:
            raise PtychodaskError(
                f"submit: {text!r} cannot be used in a script: expected no line breaks and no backslashes"
            )
    if "/" in spec.name:
        raise PtychodaskError(f"submit: name is {spec.name!r}, expected no slash, since the log is named after it")
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
            f"workers_log={shlex.quote(str(folder / spec.name))}-{parts.number}.workers.log",
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
    """Parts of a script that depend on the batch system."""

    directives: list[str]

    number: str
    """Shell expression of the job number."""

    hosts: str
    """Shell lines that set the addresses that scheduler and workers listen on."""

    workers: str
    """Shell lines that start the workers, see `_watched`."""

    resume: str
    """Shell lines that set `resume` to the option that resumes an earlier run."""

    end: str
    """Last shell lines: requeue a job whose run was stopped, and exit."""


def worker_variables(n_threads: int) -> dict[str, str]:
    """Environment of a worker whose libraries use `n_threads` threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(n_threads)) | WORKER_VARIABLES | JOB_VARIABLES


def prologue(spec: JobSpec) -> list[str]:
    """Shell lines that prepare a job: modules, environment of workers, extra lines."""
    # In a plain shell the command `module` is only defined after sourcing the profile.
    profile = (
        ["# shellcheck source=/dev/null", "command -v module >/dev/null || . /etc/profile"] if spec.modules else []
    )
    return [
        *profile,
        *(f"module load {shlex.quote(module)}" for module in spec.modules),
        *(f"export {name}={value}" for name, value in worker_variables(spec.cpus).items()),
        *spec.lines,
    ]


_BEGINNING = f"""\
# Anyone with these credentials can run code as this user: the folder is private, and removed at the end.
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
"$python" -m distributed.cli.dask_scheduler --port 0 "$@" >>"$workers_log" 2>&1 &
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
# A signal interrupts wait, but does not end the run.
while kill -0 "$run" 2>/dev/null; do
  wait "$run"
  code=$?
done
trap '' USR1
# Workers end with their scheduler; hanging ones end with the job.
kill "$scheduler"
patience=@PATIENCE@
while [ ! -e "$folder/over" ] && [ "$patience" -gt 0 ]; do
  sleep 1
  patience=$((patience - 1))
done
rm -rf "$folder"
if [ -n "$lost" ] && [ "$code" -ne 0 ]; then
  echo "all workers ended before the run: see $workers_log" >&2
  exit 2
fi
"""


def _watched(workers: str) -> str:
    """Shell code that runs workers in the background and signals their end."""
    return f'(\n{workers}\n  : >"$folder/over"\n  kill -USR1 "$$"\n) >>"$workers_log" 2>&1 &'


def _worker_command(spec: JobSpec) -> str:
    scratch = '"${TMPDIR:-/tmp}"' if spec.scratch is None else shlex.quote(spec.scratch)
    resources = " --resources GPU=1" if spec.gpus else ""
    return (
        f'"$python" -m distributed.cli.dask_worker --nthreads {THREADS_PER_WORKER} '
        f"--memory-limit {spec.memory_bytes}{resources} \\\n"
        f'      --local-directory {scratch} --death-timeout {WORKERS_WITHIN_S} "$@"'
    )


def _slurm_parts(spec: JobSpec, folder: Path) -> _Parts:
    # In log names a percent sign starts a pattern, so it is doubled.
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
    interface = "" if spec.interface is None else f'\nelse\n  set -- "$@" --interface {shlex.quote(spec.interface)}'
    return _Parts(
        directives=[f"#SBATCH {directive}" for directive in directives],
        number='"$SLURM_JOB_ID"',
        hosts=f'if [ "$SLURM_JOB_NUM_NODES" -eq 1 ]; then\n  set -- "$@" --host {LOOPBACK_HOST}{interface}\nfi',
        workers=_watched(
            f"  srun --ntasks={spec.n_workers} --cpus-per-task={spec.cpus}{gpu} --kill-on-bad-exit=0 --wait=0 \\\n"
            f"    {_worker_command(spec)}"
        ),
        resume='resume=\n[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=--resume',
        end=_SLURM_END if spec.requeue else _FINAL_MESSAGE,
    )


def _mib_per_cpu(spec: JobSpec) -> int:
    """Memory per core, in MiB, including scheduler and client.

    SLURM requests the same memory per core on all nodes, so every worker includes the memory of scheduler and client.
    """
    return -(-(spec.memory_bytes // MIB + BESIDE_WORKERS_MIB) // spec.cpus)


_FINAL_MESSAGE = """\
[ "$code" -ne 143 ] || echo "stopped before completion: submit it again with --resume after --" >&2
exit "$code\""""

_SLURM_END = """\
# Stopped before completion: requeue the job, which then resumes the run.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "SLURM cannot requeue the job: submit it again with --resume after --" >&2
fi
exit "$code\""""


def _pbs_parts(spec: JobSpec, folder: Path) -> _Parts:
    """Parts of a script for PBS, which runs on one node."""
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
    device = 'CUDA_VISIBLE_DEVICES=$(echo "$devices" | cut -d, -f "$number") \\\n      ' if spec.gpus else ""
    loop = f'  number=0\n  while [ "$number" -lt {n} ]; do\n    number=$((number + 1))\n'
    return _Parts(
        directives=[f"#PBS {option}" for option in options] + [f"cd {shlex.quote(str(Path.cwd()))} || exit 2"],
        number='"$PBS_JOBID"',
        hosts=f'set -- "$@" --host {LOOPBACK_HOST}',
        workers=devices + _watched(f"{loop}    {device}{_worker_command(spec)} &\n  done\n  wait"),
        resume="# A job that PBS reruns resumes from the finished parts.\nresume=--resume",
        end=_FINAL_MESSAGE,
    )
