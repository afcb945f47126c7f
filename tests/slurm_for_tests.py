"""A real SLURM on this machine: two virtual nodes, its state in one folder, nothing of it elsewhere."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
"""What must be installed: apt-get install slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge."""

NODES = ("node1", "node2")
STARTS_WITHIN_S = 30.0
"""How long all nodes may take to be idle, and daemons to end."""

# One machine plays two nodes, so each has its port; a short folder name keeps sockets under their 107 characters.
CONFIGURATION = """
ClusterName=ptychotest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=120
JobRequeue=1
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 Gres=gpu:fake:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 Gres=gpu:fake:1
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why SLURM cannot be started here, or None."""
    if os.geteuid() != 0:
        return "needs root, to start SLURM"
    absent = [name for name in DAEMONS if _found(name) is None]
    if absent:
        packages = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
        return f"needs {', '.join(absent)}: apt-get install --no-install-recommends {packages}"
    return None


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def running_slurm(folder: Path) -> Iterator[Path]:
    """SLURM's configuration while it runs, two nodes idle; all of it is ended with the block.

    Parameters
    ----------
    folder : Path
        An empty one, of a short name.
    """
    (folder / "state").mkdir()
    file = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    file.write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
    # A GPU that is a file gives jobs their CUDA_VISIBLE_DEVICES.
    lines = [f"NodeName={node} Name=gpu Type=fake File=/dev/null\n" for node in NODES]
    (folder / "gres.conf").write_text("".join(lines))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    named = {name: folder / f"munge.{name}" for name in ("socket", "log", "seed")}
    try:
        _run(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--pid-file={folder}/munged.pid",
            f"--socket={named['socket']}",
            f"--log-file={named['log']}",
            f"--seed-file={named['seed']}",
        )
        _run("slurmctld", "-f", file, "-c")
        for node in NODES:
            (folder / f"spool.{node}").mkdir()
            _run("slurmd", "-f", file, "-N", node)
        _wait_until(lambda: _states(file) == ["idle"] * len(NODES), f"nodes are not idle, see {folder}")
        yield file
    finally:
        _end(folder, file)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _run(name: str, *arguments: object) -> None:
    found = _found(name)
    assert found is not None
    # The daemons stay in the background; what they say goes to their logs.
    subprocess.run([found, *map(str, arguments)], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def asked(file: Path, *command: str) -> str:
    """What a command of SLURM prints."""
    done = subprocess.run(
        command, env=os.environ | {"SLURM_CONF": str(file)}, capture_output=True, text=True, check=True, timeout=240
    )
    return done.stdout.strip()


def _states(file: Path) -> list[str]:
    with suppress(subprocess.CalledProcessError):
        return asked(file, "sinfo", "-h", "-N", "-o", "%t").split()
    return []


def _wait_until(done, what: str) -> None:
    ends = time.monotonic() + STARTS_WITHIN_S
    while not done():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


def _end(folder: Path, file: Path) -> None:
    with suppress(subprocess.SubprocessError):
        jobs = asked(file, "squeue", "-h", "-o", "%i").split()
        if jobs:
            asked(file, "scancel", *jobs)
            _wait_until(lambda: not asked(file, "squeue", "-h", "-o", "%i"), "jobs do not end")
    files = [*folder.glob("slurmd.*.pid"), folder / "slurmctld.pid", folder / "munged.pid"]
    pids = {path: int(path.read_text()) for path in files if path.exists()}
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    # A daemon removes the file of its number when it ends; as a zombie it would still take signals.
    _wait_until(lambda: not any(path.exists() for path in pids), f"daemons do not end, see {folder}")
