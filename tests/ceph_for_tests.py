"""A real object store on this machine: Ceph's gateway on one store in memory, its state in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from slurm_for_tests import free_ports

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
"""What must be installed: apt-get install radosgw ceph-mon ceph-osd ceph-common."""

KEY, SECRET = "beamline", "not-a-real-secret"

STARTS_WITHIN_S = 90.0
"""How long the gateway may take to answer, or to end."""

# One monitor, one store, one copy of everything: nothing here outlives the tests.
CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{ports[0]}
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
osd objectstore = memstore
memstore device bytes = 1073741824
mon allow pool size one = true
mon osd full ratio = 0.99
mon data avail crit = 1
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{ports[1]}
rgw thread pool size = 32
rgw override bucket index max shards = 1
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
"""


def missing() -> str | None:
    """Why Ceph cannot be started here, or None."""
    if find_spec("obstore") is None:
        return "needs the package obstore: pip install 'ptychodask[cloud]'"
    if os.geteuid() != 0:
        return "needs root, to start Ceph"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        packages = "radosgw ceph-mon ceph-osd ceph-common"
        return f"needs {', '.join(absent)}: apt-get install --no-install-recommends {packages}"
    return None


@dataclass(frozen=True)
class Gateway:
    """The gateway; it may be sent to other processes."""

    folder: Path
    port: int

    @property
    def settings(self) -> dict[str, str]:
        """What a user of it has in the environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it in the background: it answers some seconds later."""
        self._run("radosgw", "-n", "client.rgw.a")

    def kill(self) -> None:
        """End it as a crash would."""
        pid = int((self.folder / "client.rgw.a.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        (self.folder / "client.rgw.a.pid").unlink(missing_ok=True)

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
            return answer.status == 200
        return False

    def make_bucket(self, name: str) -> None:
        import obstore
        from obstore.store import S3Store

        store = S3Store(
            name,
            endpoint=self.settings["AWS_ENDPOINT_URL"],
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        signed = obstore.sign(store, "PUT", "", timedelta(minutes=1))
        with urllib.request.urlopen(urllib.request.Request(signed, method="PUT")) as answer:
            assert answer.status == 200

    def _run(self, name: str, *arguments: object) -> None:
        # Daemons keep what they were given to write to, so it is a file and no pipe.
        said = self.folder / f"{name}.said"
        with said.open("w") as file:
            done = subprocess.run(
                [name, *map(str, arguments), "-c", str(self.folder / "ceph.conf")],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=120,
            )
        assert done.returncode == 0, f"{name} ended with {done.returncode}: {said.read_text()[-2000:]}"


@contextmanager
def running_gateway(folder: Path) -> Iterator[Gateway]:
    """The gateway while it runs; all of it is ended with the block.

    Parameters
    ----------
    folder : Path
        An empty one, of a short name.
    """
    ports, fsid = free_ports(2), str(uuid.uuid4())
    (folder / "ceph.conf").write_text(CONFIGURATION.format(folder=folder, ports=ports, fsid=fsid))
    gateway = Gateway(folder, ports[1])
    try:
        monitors = folder / "monmap"
        subprocess.run(
            ["monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{ports[0]}]", str(monitors)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        gateway._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        gateway._run("ceph-mon", "-i", "a")
        osd = uuid.uuid4()
        (folder / "osd").mkdir()
        _run_in_the_end(gateway, "ceph", "osd", "create", osd)
        gateway._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        _run_in_the_end(gateway, "ceph-osd", "-i", "0")
        user = ("user", "create", "--uid=beamline", "--display-name=beamline")
        gateway._run("radosgw-admin", *user, f"--access-key={KEY}", f"--secret-key={SECRET}")
        gateway.start()
        _wait_until(gateway.answers, f"the gateway does not answer, see {folder}")
        yield gateway
    finally:
        for path in sorted(folder.glob("*.pid")):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def _run_in_the_end(gateway: Gateway, name: str, *arguments: object) -> None:
    """Run what a monitor that has just begun refuses now and then, until it does not."""

    def done() -> bool:
        with suppress(AssertionError):
            gateway._run(name, *arguments)
            return True
        return False

    _wait_until(done, f"{name} fails each time, see {gateway.folder}")


def _wait_until(done, what: str) -> None:
    ends = time.monotonic() + STARTS_WITHIN_S
    while not done():
        assert time.monotonic() < ends, what
        time.sleep(0.1)
