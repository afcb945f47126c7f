"""A real S3 on this machine: Ceph's RADOS gateway over one object store in memory, its state in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
"""What must be installed: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common."""

STARTS_WITHIN_S = 60.0

BUCKET = "scans"

CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor}
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd objectstore = memstore
memstore device bytes = 1073741824
mon allow pool size one = true
mon data avail crit = 1
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw override bucket index max shards = 1
"""


def missing() -> str | None:
    """Why there can be no S3 here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, for Ceph's daemons"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(absent)}: apt-get install radosgw ceph-mon ceph-osd ceph-common" if absent else None


@dataclass
class Gateway:
    """A gateway that can be stopped and started; what it stores stays."""

    folder: Path
    port: int
    access_key: str
    secret_key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def run(self, *command: str, timeout: float = 60) -> None:
        done = subprocess.run(
            command,
            env={**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")},
            capture_output=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}: {done.stderr.decode()[-500:]}"

    def start(self) -> None:
        self.run("radosgw", "-n", "client.rgw.a", "-c", str(self.folder / "ceph.conf"))
        until = time.monotonic() + STARTS_WITHIN_S
        while not self._answers():
            assert time.monotonic() < until, "the gateway does not start"
            time.sleep(0.1)

    def stop(self) -> None:
        end(self.folder / "run" / "client.rgw.a.pid")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def end(pid_file: Path) -> None:
    """Kill a daemon, if it still runs."""
    with suppress(OSError, ValueError):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        pid_file.unlink()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started_gateway(folder: Path) -> Iterator[Gateway]:
    """A gateway with a user and nothing in it, until the block ends."""
    gateway = Gateway(folder, free_port(), secrets.token_hex(8), secrets.token_hex(16))
    for name in ("run", "log", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    configuration, fsid, monitor = folder / "ceph.conf", str(uuid.uuid4()), free_port()
    configuration.write_text(CONFIGURATION.format(fsid=fsid, monitor=monitor, folder=folder, port=gateway.port))
    address = ("--addv", "a", f"[v1:127.0.0.1:{monitor}]")
    try:
        gateway.run("monmaptool", "--create", "--fsid", fsid, *address, str(folder / "monmap"))
        gateway.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), "-c", str(configuration))
        gateway.run("ceph-mon", "-i", "a", "-c", str(configuration))
        osd = str(uuid.uuid4())
        gateway.run("ceph", "osd", "create", osd)
        gateway.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", str(configuration))
        gateway.run("ceph-osd", "-i", "0", "-c", str(configuration))
        gateway.run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        keys = ("--access-key", gateway.access_key, "--secret-key", gateway.secret_key)
        gateway.run("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests", *keys)
        gateway.start()
        yield gateway
    finally:
        for name in ("client.rgw.a", "osd.0", "mon.a"):
            end(folder / "run" / f"{name}.pid")
