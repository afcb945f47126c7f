"""Runs that are broken on purpose: each must end with the identical object, at once or after the documented error.

    python -m tests.campaigns.campaign --runs 200

Every run is a process of its own that reconstructs on a scheduler and
two workers, which are processes too. When a share of the chunks is done, drawn at random, a fault is injected. A run
that ends with an error is gone on with by the same command and ``resume=True``. A fault that this machine cannot have
(mounts and network namespaces want root) is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

import ptychodask
from ptychodask.models import ModelSpec, Optics, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.result import open_result
from ptychodask.storage.atomic import LEDGER, building_path
from tests.campaigns.victim import FIELDS, model_of

N_PIXELS = 16
N_PATTERNS = 150
HANGS_AFTER_S = 150.0
"""A run that takes longer than this has failed."""

STRAGGLER_S = 3.0
"""What takes longer is given to a second worker (a minute, and four times the longest, outside of tests)."""

WARM_UP_S = 60.0
"""How long scheduler and workers may take to start."""

DOCUMENTED = (
    "what is finished is kept",
    "its finished parts are kept",
    "the Dask client, its scheduler or its workers ended",
    "no Dask scheduler answers",
    "cannot be read for patterns",
)
"""Parts of the errors that a broken run may end with."""

NAMESPACES = ("sched", "w1", "w2")

HOSTS = f"pty{os.getpid()}"
"""How the names of this campaign's hosts begin: others may be at work beside it."""


class BrokenRunError(Exception):
    """A run did not end as it must."""


@dataclass
class Cluster:
    """A scheduler and two workers with nannies, each a process, or each a host of its own."""

    folder: Path
    hosts: bool = False
    """Each in a network namespace."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""

    def start(self) -> None:
        """Start all, and wait for them."""
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        host = "10.77.0.1" if self.hosts else "127.0.0.1"
        self._run("sched", "distributed.cli.dask_scheduler", "--host", host, "--port", "0", f"--scheduler-file={file}")
        wait_for(file.exists, WARM_UP_S)
        wait_for(lambda: bool(file.read_text()), WARM_UP_S)
        self.address = json.loads(file.read_text())["address"]
        for number, name in enumerate(NAMESPACES[1:], 2):
            place = f"10.77.0.{number}" if self.hosts else "127.0.0.1"
            self._run(
                name, "distributed.cli.dask_worker", self.address, "--host", place, "--nthreads", "2", "--name", name
            )
        wait_for(lambda: len(self.pids()) == 2, WARM_UP_S)

    def _run(self, host: str, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments, "--no-dashboard"]
        if "worker" in module:
            command += ["--local-directory", str(self.folder)]
        with (self.folder / f"{host}.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [*self.inside(host), *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
            )

    def inside(self, host: str) -> list[str]:
        """How a command begins that runs on one of the hosts."""
        return ["ip", "netns", "exec", f"{HOSTS}-{host}"] if self.hosts else []

    def pids(self) -> dict[str, int]:
        """Process of each worker, by its address; none while the scheduler is away."""
        if self.hosts:
            told = subprocess.run(
                [*self.inside("sched"), sys.executable, "-c", ASK_PIDS, self.address], capture_output=True, check=False
            )
            return json.loads(told.stdout or "{}")
        # Dask's handshake asserts that no other message comes with it, which some does at times.
        for _ in range(3):
            with (
                suppress(OSError, ValueError, AssertionError, TimeoutError),
                Client(self.address, timeout="5s", set_as_default=False) as client,
            ):
                return client.run(os.getpid)
        return {}

    def mend(self) -> None:
        """Have all three at work again, whatever was done to them."""
        if len(self.pids()) != 2 or any(process.poll() is not None for process in self.processes):
            self.stop()
            self.start()

    def stop(self) -> None:
        """End all that was started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes.clear()


ASK_PIDS = """
import json, os, sys
from distributed import Client
with Client(sys.argv[1], timeout="5s") as client:
    print(json.dumps(client.run(os.getpid)))
"""


def environment() -> dict[str, str]:
    """Of the processes: they find the package and the networks of the tests."""
    places = [str(folder) for folder in Path(__file__).parents[1:3]]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "11s",
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "6",
        # As in the clusters that ptychodask starts: the client fetches five results at a time, and where all five lie
        # with a worker that hangs, the run waits until the scheduler gives that one up.
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "60s",
    }


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds; raises `BrokenRunError` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BrokenRunError(f"waited {seconds:.0f} s in vain")
        time.sleep(0.02)


@dataclass
class Scene:
    """One run, and what a fault may touch."""

    cluster: Cluster
    rng: np.random.Generator
    store: Path
    out: Path
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    client: subprocess.Popen[bytes] | None = None
    afterwards: list[Callable[[], Any]] = field(default_factory=list)
    """What makes good before the run is gone on with."""

    def start(self, *, resume: bool = False) -> None:
        """Start the client."""
        asked = {
            "scheduler": self.cluster.address,
            "store": str(self.store),
            "out": str(self.out),
            "model": self.model,
            "straggler": STRAGGLER_S,
            "fields": self.fields | {"resume": resume},
        }
        command = [*self.cluster.inside("sched"), sys.executable, "-m", "tests.campaigns.victim", json.dumps(asked)]
        self.client = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def until(self, share: float) -> None:
        """Wait until a share of the chunks is done, or the run ended."""
        assert self.client is not None
        client, n_chunks = self.client, N_PATTERNS // FIELDS["groups_per_chunk"]
        wait_for(lambda: client.poll() is not None or n_noted(self.out) >= share * n_chunks, HANGS_AFTER_S)

    def ended(self) -> tuple[int, str]:
        """Exit code and last line of the client."""
        assert self.client is not None
        try:
            _, told = self.client.communicate(timeout=HANGS_AFTER_S)
        except subprocess.TimeoutExpired:
            self.client.kill()
            _, told = self.client.communicate()
            raise BrokenRunError(f"hung: {told.decode()[-2000:]}") from None
        lines = told.decode().strip().splitlines() or [""]
        # A traceback is looked at whole.
        return self.client.returncode, lines[-1] if self.client.returncode in (0, 2) else told.decode()[-3000:]


def n_noted(out: Path) -> int:
    """Chunks that the ledger of a run says are done."""
    ledger = building_path(out) / LEDGER
    with suppress(OSError):
        return ledger.read_text().count('"kind": "chunk"')
    return 0


def a_worker(scene: Scene) -> int:
    return int(scene.rng.choice(list(scene.cluster.pids().values())))


def kill_a_worker(scene: Scene) -> None:
    """Its nanny starts another one."""
    os.kill(a_worker(scene), signal.SIGKILL)


def stop_a_worker(scene: Scene) -> None:
    """It hangs, and answers nobody."""
    process = a_worker(scene)
    os.kill(process, signal.SIGSTOP)
    scene.afterwards.append(lambda: os.kill(process, signal.SIGKILL))


def drain_a_worker(scene: Scene) -> None:
    """It hands over what it has and leaves, as a node does that is taken away with notice."""
    worker = str(scene.rng.choice(list(scene.cluster.pids())))
    with Client(scene.cluster.address, timeout="5s", set_as_default=False) as client:
        client.retire_workers([worker], close_workers=True)


def kill_the_client(scene: Scene) -> None:
    """SIGKILL."""
    assert scene.client is not None
    scene.client.kill()


def terminate_the_client(scene: Scene) -> None:
    """SIGTERM, as before a wall-time limit."""
    assert scene.client is not None
    scene.client.terminate()


def kill_the_scheduler(scene: Scene) -> None:
    """The workers lose it too."""
    scene.cluster.processes[0].kill()
    scene.afterwards.append(scene.cluster.mend)


def kill_everything(scene: Scene) -> None:
    """As when the machine loses power."""
    assert scene.client is not None
    scene.client.kill()
    scene.cluster.stop()
    scene.afterwards.append(scene.cluster.mend)


def spoil_a_chunk(scene: Scene) -> None:
    """Patterns cannot be read for a while."""
    shards = [path for path in sorted((scene.store / "diffraction" / "c").rglob("*")) if path.is_file()]
    shard = Path(str(scene.rng.choice([str(path) for path in shards])))
    content = shard.read_bytes()
    place = int(scene.rng.integers(0, len(content) // 2))
    shard.write_bytes(content[:place] + bytes(len(content) - place))
    scene.afterwards.append(lambda: shard.write_bytes(content))


def fill_the_disk(scene: Scene) -> None:
    """Where the result goes; there is room again before the run is gone on with."""
    ballast = scene.out.parent / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    scene.afterwards.append(ballast.unlink)


def cut_a_link(scene: Scene) -> None:
    """A worker's host is away, until the run ended."""
    host = str(scene.rng.choice(NAMESPACES[1:]))
    link = ["ip", "-n", f"{HOSTS}-sw", "link", "set", f"p-{host}"]
    subprocess.run([*link, "down"], check=True)
    scene.afterwards += [lambda: subprocess.run([*link, "up"], check=True), scene.cluster.mend]


FAULTS: dict[str, Callable[[Scene], None]] = {
    "worker killed": kill_a_worker,
    "worker hangs": stop_a_worker,
    "worker drained": drain_a_worker,
    "client killed": kill_the_client,
    "client terminated": terminate_the_client,
    "scheduler killed": kill_the_scheduler,
    "all killed": kill_everything,
    "chunk unreadable": spoil_a_chunk,
    "disk full": fill_the_disk,
    "link cut": cut_a_link,
}


def play(scene: Scene, fault: Callable[[Scene], None], expected: dict[str, Any]) -> str:
    """One run with its fault; says how it ended."""
    scene.start()
    scene.until(scene.rng.uniform(0.05, 0.9))
    fault(scene)
    code, told = scene.ended()
    for make_good in scene.afterwards:
        with suppress(ProcessLookupError):
            make_good()
    outcome = "identical"
    if code != 0:
        if code == 2 and not any(text in told for text in DOCUMENTED):
            raise BrokenRunError(f"undocumented: {told}")
        if code not in (2, 143, -signal.SIGKILL):
            raise BrokenRunError(f"exit code {code}: {told}")
        outcome = "error, then identical" if code == 2 else "stopped, then identical"
        scene.cluster.mend()
        scene.start(resume=True)
        code, told = scene.ended()
        if code != 0:
            raise BrokenRunError(f"the second run: {code} {told}")
    found = open_result(scene.out).compute()
    for name, values in expected.items():
        if not np.array_equal(found[name].values, values, equal_nan=True):
            raise BrokenRunError(f"{name} differs")
    left = {path.name for path in scene.out.parent.iterdir()} - {scene.out.name}
    if left:
        raise BrokenRunError(f"left behind: {sorted(left)}")
    return outcome


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    place = folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


@contextmanager
def namespaces() -> Iterator[None]:
    """Three hosts, joined by a bridge in a fourth."""
    names = [f"{HOSTS}-{name}" for name in ("sw", *NAMESPACES)]
    commands = [f"ip netns add {names[0]}", f"ip -n {names[0]} link add br0 type bridge"]
    commands += [f"ip -n {names[0]} link set br0 up"]
    for number, host in enumerate(NAMESPACES, 1):
        name = f"{HOSTS}-{host}"
        commands += [
            f"ip netns add {name}",
            f"ip link add eth0 netns {name} type veth peer name p-{host} netns {names[0]}",
            f"ip -n {names[0]} link set p-{host} master br0",
            f"ip -n {names[0]} link set p-{host} up",
            f"ip -n {name} addr add 10.77.0.{number}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def impossible(folder: Path) -> dict[str, str]:
    """Faults that this machine cannot have, and why."""
    found = {}
    for name, trial in (("disk full", lambda: small_disk(folder)), ("link cut", namespaces)):
        try:
            with trial():
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            found[name] = str(error)
    return found


def campaign(
    n_runs: int, seed: int = 0, names: list[str] | None = None, keras_every: int = 0
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Play some runs.

    Parameters
    ----------
    n_runs : int
    seed : int
    names : list of str, optional
        Keys of `FAULTS`; by default all that this machine can have. They take turns.
    keras_every : int
        Each so many runs predict with our own network instead of one in NumPy.

    Returns
    -------
    counts : Counter of (fault, outcome)
    broken : list of str
        Of each run that did not end as it must, what was wrong.
    """
    counts: Counter[tuple[str, str]] = Counter()
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ptycampaign-") as text:
        folder = Path(text)
        names = [name for name in names or FAULTS if name not in impossible(folder)]
        stores = Stores(folder)
        with clusters(folder, "link cut" in names) as (here, hosts):
            for number in range(n_runs):
                name = names[number % len(names)]
                rng = np.random.default_rng([seed, number])
                model = "keras" if keras_every and number % keras_every == keras_every - 1 else "slow"
                try:
                    outcome = one_run(folder, hosts if name == "link cut" else here, stores, name, model, rng)
                except BrokenRunError as error:
                    outcome = "BROKEN"
                    broken.append(f"run {number}, {name}: {error}")
                    here.mend()
                counts[name, outcome] += 1
                print(f"{number + 1:4d} {name:18s} {model:6s} {outcome}", flush=True)
    return counts, broken


@contextmanager
def clusters(folder: Path, with_hosts: bool) -> Iterator[tuple[Cluster, Cluster]]:
    """One on this host; and one on hosts of their own, started where it is asked for."""
    (folder / "here").mkdir()
    (folder / "hosts").mkdir()
    here, hosts = Cluster(folder / "here"), Cluster(folder / "hosts", hosts=True)
    with namespaces() if with_hosts else nullcontext():
        try:
            here.start()
            if with_hosts:
                hosts.start()
            yield here, hosts
        finally:
            here.stop()
            hosts.stop()


class Stores:
    """The scan, the models, and the objects that they make where nothing fails."""

    def __init__(self, folder: Path) -> None:
        self.scan = folder / "scan.zarr"
        scan = ptychodask.simulate(
            self.scan, n_pixels=N_PIXELS, n_patterns=N_PATTERNS, step_px=3.0, dose=1e6, seed=1, progress=False
        )
        bundle = folder / "network.model"
        save_model(untrained_model(ModelSpec(n_pixels=N_PIXELS, levels=2), Optics.of(scan)), bundle)
        self.models = {"slow": "slow", "keras": str(bundle)}
        self._expected: dict[str, dict[str, Any]] = {}

    def expected(self, model: str) -> dict[str, Any]:
        """Arrays of the object by the model's name."""
        if model not in self._expected:
            network = model_of("plain" if model == "slow" else self.models[model])
            whole = ptychodask.reconstruct(self.scan, network, progress=False, **FIELDS)
            self._expected[model] = {name: whole[name].values for name in whole.data_vars}
        return self._expected[model]


def one_run(folder: Path, cluster: Cluster, stores: Stores, name: str, model: str, rng: np.random.Generator) -> str:
    """Set the scene of one run and play it."""
    cluster.mend()
    store = folder / "spoilt.zarr" if name == "chunk unreadable" else stores.scan
    if store != stores.scan:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(stores.scan, store)
    expected = stores.expected(model)
    with small_disk(folder) if name == "disk full" else tempfile.TemporaryDirectory(dir=folder) as place:
        scene = Scene(cluster, rng, store, Path(place) / "object.zarr", stores.models[model])
        try:
            return play(scene, FAULTS[name], expected)
        finally:
            if scene.client is not None and scene.client.poll() is None:
                scene.client.kill()
                scene.client.wait()


def table(counts: Counter[tuple[str, str]]) -> str:
    """Counts of outcomes for each fault, in Markdown."""
    outcomes = sorted({outcome for _, outcome in counts})
    faults = sorted({fault for fault, _ in counts})
    lines = ["| fault | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 1) + "|"]
    lines += [
        f"| {fault} | " + " | ".join(str(counts[fault, outcome]) for outcome in outcomes) + " |" for fault in faults
    ]
    totals = [sum(counts[fault, outcome] for fault in faults) for outcome in outcomes]
    return "\n".join([*lines, "| all | " + " | ".join(map(str, totals)) + " |"])


def main() -> None:
    """Play the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="by default all")
    parser.add_argument("--keras-every", type=int, default=20, help="runs until one predicts with our own network")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, why in impossible(Path(folder)).items():
            print(f"left out: {name} ({why})")
    counts, broken = campaign(asked.runs, asked.seed, asked.fault, asked.keras_every)
    print(table(counts))
    for told in broken:
        print(told)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
