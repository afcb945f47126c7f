"""Clusters: addresses, credentials, and the check of workers before a run."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dask
import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster
from models_for_tests import LinearModel

from ptychodask.cluster import clients
from ptychodask.cluster import preflight as asking
from ptychodask.cluster import watch as watching
from ptychodask.cluster.clients import connected_client, gpu_client, local_client, slurm_client
from ptychodask.cluster.executor import DaskExecutor, WorkerState
from ptychodask.cluster.job import MIB
from ptychodask.cluster.preflight import preflight, preflight_jobs
from ptychodask.cluster.tls import credentials_in, temporary_credentials, write_credentials
from ptychodask.cluster.watch import Watch
from ptychodask.errors import PtychodaskError
from ptychodask.models import ModelSpec, Optics, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.prediction import ModelReference, PredictionJob
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate
from ptychodask.store import open_scan

IMPORTED_FROM = [str(Path(clients.__file__).parents[2]), str(Path(__file__).parent)]

pytestmark = pytest.mark.usefixtures("empty_caches")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cluster") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=60, step_px=3.0, seed=1, progress=False)
    return path


@pytest.fixture
def job(store):
    """What a run with `LinearModel` tells its tasks."""
    data_hash = open_scan(store).data_hash
    return PredictionJob(str(store), data_hash, "c4", ModelReference.to(LinearModel()), batch_size=8)


@contextmanager
def started_by_hand(folder, *, credentials=None, flags=(), first_on_path=None):
    """A scheduler and a worker as users start them, each a process: a client, and the worker's process."""
    file = folder / "scheduler.json"
    shared = ["--scheduler-file", file, "--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    if credentials is not None:
        shared += ["--protocol", "tls", "--tls-ca-file", credentials / "ca.pem"]
        shared += ["--tls-cert", credentials / "cert.pem", "--tls-key", credentials / "key.pem"]
    own = {
        "scheduler": ["--port", "0"],
        "worker": ["--no-nanny", "--nthreads", "1", "--name", "w1", "--death-timeout", "60", *flags],
    }
    with ExitStack() as started:
        running = {}
        for role, options in own.items():
            first = [str(first_on_path)] if first_on_path is not None and role == "worker" else []
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(first + IMPORTED_FROM)}
            log = started.enter_context((folder / f"{role}.log").open("wb"))
            command = [sys.executable, "-m", f"distributed.cli.dask_{role}", *map(str, [*options, *shared])]
            running[role] = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            started.callback(ended, running[role])
        security = None if credentials is None else credentials_in(credentials)
        client = started.enter_context(Client(scheduler_file=str(file), security=security, timeout="60s"))
        client.wait_for_workers(1, timeout=60)
        yield client, running["worker"]


def ended(process):
    """End a process, stopped or not."""
    process.kill()
    process.wait()


def test_workers_that_are_fit_are_passed(store, tmp_path):
    with started_by_hand(tmp_path) as (client, _):
        preflight(client, store, LinearModel())
        reconstruct(store, LinearModel(), client=client, progress=False)


def test_workers_in_this_process_are_not_asked(job, client):
    preflight_jobs(DaskExecutor(client), [replace(job, store="/nowhere.zarr")])


def test_a_worker_without_the_package_is_named(job, tmp_path):
    (tmp_path / "ptychodask").mkdir()
    (tmp_path / "ptychodask" / "__init__.py").write_text("raise ImportError('installed by halves')")
    with started_by_hand(tmp_path, first_on_path=tmp_path) as (client, _):
        refusal = r"worker w1 on 127\.0\.0\.1 cannot run the check \(.*\)"
        remedy = r"start it with the same Python 3\.\d+ and ptychodask \d"
        with pytest.raises(PtychodaskError, match=f"{refusal}; {remedy}"):
            preflight_jobs(DaskExecutor(client), [job])


def test_a_worker_with_other_versions_is_named(job, tmp_path):
    for name in ("numpy", "keras"):
        folder = tmp_path / f"{name}-0.0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
    with started_by_hand(tmp_path, first_on_path=tmp_path) as (client, _):
        # A network that is no Keras network does not mind Keras.
        message = rf"worker w1 .* has numpy 0\.0\.1 \(here {np.__version__}\); install the same versions"
        with pytest.raises(PtychodaskError, match=message):
            preflight_jobs(DaskExecutor(client), [job])


def test_a_worker_without_store_model_or_gpu_is_named(store, job, tmp_path):
    scan = open_scan(store)
    model = untrained_model(ModelSpec(n_pixels=16, levels=1), Optics.of(scan))
    model = save_model(model, tmp_path / "net.model")
    with started_by_hand(tmp_path, flags=["--resources", "GPU=1"]) as (client, _):
        with pytest.raises(PtychodaskError, match=r"worker w1 on .*/nowhere\.zarr: no such store.*all nodes share"):
            preflight_jobs(DaskExecutor(client), [replace(job, store="/nowhere.zarr")])
        with pytest.raises(PtychodaskError, match=r"scan\.zarr has the data hash .* there, and 123 here"):
            preflight_jobs(DaskExecutor(client), [replace(job, data_hash="123")])
        with pytest.raises(
            PtychodaskError, match=r"worker w1 on .*the model's hash is .*, expected 123.*all nodes share"
        ):
            preflight_jobs(
                DaskExecutor(client), [replace(job, model=ModelReference("123", str(tmp_path / "net.model"), None))]
            )
        # It advertises a GPU that TensorFlow does not find.
        with pytest.raises(PtychodaskError, match=r"worker w1 on .*a GPU is required, but .* sees none"):
            preflight(client, store, model)


def test_a_silent_worker_is_reported(job, tmp_path, monkeypatch, told):
    monkeypatch.setattr(asking, "ANSWERS_WITHIN_S", 0.5)
    with started_by_hand(tmp_path) as (client, worker):
        worker.send_signal(signal.SIGSTOP)
        preflight_jobs(DaskExecutor(client), [job])
    assert any("worker w1 on 127.0.0.1 ended or did not answer" in line for line in told)


def test_a_cluster_that_starts_workers_for_tasks_is_not_waited_for(job, tmp_path, told):
    with started_by_hand(tmp_path) as (client, worker):
        ended(worker)
        client.retire_workers(names=["w1"])
        preflight_jobs(DaskExecutor(client), [job])
    assert any("no worker has connected yet: none is checked" in line for line in told)


def test_credentials_are_private(tmp_path):
    folder = tmp_path / "tls"
    write_credentials(folder)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    assert modes == {"tls": 0o700, "ca.pem": 0o600, "cert.pem": 0o600, "key.pem": 0o600}
    with pytest.raises(PtychodaskError, match=r"tls: cannot write credentials .*File exists.*expected a new folder"):
        write_credentials(folder)


def test_a_cluster_with_written_credentials_refuses_strangers(store, tmp_path, client, monkeypatch):
    fields = {"groups_per_chunk": 10, "tile": 24, "progress": False}
    plain = reconstruct(store, LinearModel(), client=client, **fields)
    write_credentials(tmp_path / "tls")
    monkeypatch.setattr(clients, "ANSWER_WITHIN", "2s")
    file = tmp_path / "scheduler.json"
    with started_by_hand(tmp_path, credentials=tmp_path / "tls"):
        with connected_client(str(file), security=credentials_in(tmp_path / "tls")) as known:
            assert known.scheduler.address.startswith("tls://127.0.0.1:")
            found = reconstruct(store, LinearModel(), client=known, **fields)
        for security in (None, temporary_credentials()):
            with (
                pytest.raises(PtychodaskError, match="no Dask scheduler answers"),
                connected_client(str(file), security=security),
            ):
                pass
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(found[name].values, plain[name].values)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"address'])
def test_a_file_that_holds_no_address_is_named(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    message = r"s\.json: contains no address of a Dask scheduler"
    with pytest.raises(PtychodaskError, match=message), connected_client(str(tmp_path / "s.json")):
        pass


def listening():
    """(address, port) where this process and its children accept connections."""
    process = psutil.Process()
    return {
        tuple(connection.laddr)
        for one in [process, *process.children(recursive=True)]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_all_servers_of_a_cluster_are_on_the_loopback_interface():
    before = listening()
    with local_client(1):
        opened = listening() - before
    # Scheduler, nanny and worker, and the dashboards of some of them.
    assert len(opened) >= 3
    assert {address for address, _ in opened} == {"127.0.0.1"}


def test_a_cluster_listens_on_the_given_host_and_its_dashboards_do_not(told):
    with local_client(1, host="0.0.0.0") as client:
        outside = {port for address, port in listening() if address == "0.0.0.0"}
        (worker, about), *_ = client.scheduler_info()["workers"].items()
        spoken_over = (client.scheduler.address, worker, about["nanny"])
        assert outside == {int(address.rpartition(":")[2]) for address in spoken_over}
    assert told == ["anyone who can reach 0.0.0.0 can run code in this cluster; encrypt it (--tls, security=)"]


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "x" * 70])
def test_a_host_that_is_not_this_machine_is_refused(host):
    with pytest.raises(PtychodaskError, match="this machine cannot listen on it"), local_client(1, host=host):
        pass


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(PtychodaskError, match=r"slurm_client: needs dask-jobqueue; pip install 'ptychodask\[hpc\]'"):
        slurm_client(workers=1)


def test_each_gpu_has_a_worker_that_sees_it_alone(store, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f2a")
    security, before = temporary_credentials(), listening()
    with gpu_client(security=security) as client:
        workers = client.scheduler_info()["workers"]
        assert [worker["resources"] for worker in workers.values()] == [{"GPU": 1.0}] * 2
        assert set(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == {"3", "GPU-5f2a"}
        assert all(address.startswith("tls://127.0.0.1:") for address in [client.scheduler.address, *workers])
        assert {address for address, _ in listening() - before} == {"127.0.0.1"}
        reconstruct(store, LinearModel(), progress=False)
    assert listening() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "no GPU found or given, expected one or more"), ("1,1", "devices are 1, 1, expected no duplicates")],
)
def test_missing_and_duplicate_gpus_are_refused(monkeypatch, given, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with pytest.raises(PtychodaskError, match=message):
        gpu_client()


def test_without_nvidia_smi_there_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PtychodaskError, match="no GPU found or given, expected one or more"):
        gpu_client()


def test_slurm_client_refuses_invalid_arguments():
    with pytest.raises(PtychodaskError, match="at_most is 2, expected 3 or more"):
        slurm_client(workers=3, at_most=2)
    with pytest.raises(PtychodaskError, match="system is 'pbs', expected 'slurm'"):
        slurm_client(system="pbs")


class Reports:
    """An executor that reports the given states of its workers, one for each look."""

    def __init__(self, *states):
        self._states = list(states)

    def workers(self):
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]


def looks(monkeypatch, reports, n=5, step_s=2.0, **options):
    """A watch that looks `n` times, `step_s` apart."""
    clock = iter(step_s * number for number in itertools.count())
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    watch = Watch(reports, "reconstruct", **options)
    for _ in range(n):
        watch.look()
    return watch


PAUSED = WorkerState("w", 2, 1000 * MIB, {}, 900 * MIB, True, 0)


def test_workers_that_stay_paused_end_a_run(monkeypatch, told):
    needed = f"{(watching.NETWORK_BYTES / MIB + 200) / 0.8:,.0f} MiB or more"
    with pytest.raises(
        PtychodaskError, match=f"worker is paused and stays so.*w uses 900 MiB.*of the 1,000 MiB.*80 %.*{needed}"
    ):
        looks(monkeypatch, Reports({"a": PAUSED}), n=20, task_bytes=100 * MIB)
    assert "\n".join(told).count("worker w is paused") == 1


@pytest.mark.parametrize(
    "workers",
    [
        {"a": PAUSED._replace(n_running=1)},
        {"a": PAUSED, "b": WorkerState("v", 2, 1000 * MIB, {})},
        {"a": WorkerState("w", 2, 0, {}, 10**12, False, 0)},
    ],
    ids=["one still runs a task", "another worker runs", "without a limit"],
)
def test_workers_that_can_go_on_are_waited_for(monkeypatch, told, workers):
    looks(monkeypatch, Reports(workers), n=60)
    assert re.search(
        r"no task has ended for \d+ s; workers: \d.*; threads that run a task, of any client: \d of \d", "\n".join(told)
    )


def test_a_worker_that_is_restarted_for_its_memory_ends_a_run(monkeypatch, told):
    states = [{str(number): PAUSED._replace(is_paused=False)} for number in range(9)]
    with pytest.raises(PtychodaskError, match=r"w was restarted: it uses 900 MiB.*start workers with"):
        looks(monkeypatch, Reports(*states), n=9)
    assert "\n".join(told).count("was restarted") == watching.RESTARTS


def test_a_worker_that_is_lost_for_another_reason_is_replaced(monkeypatch, told):
    states = [{str(number): PAUSED._replace(is_paused=False, used_bytes=MIB)} for number in range(9)]
    looks(monkeypatch, Reports(*states), n=9, restarts=0)
    assert told.count("worker w was restarted") == 8


def test_a_cluster_without_workers_is_reported(monkeypatch, told):
    looks(monkeypatch, Reports({}), n=40)
    assert "no worker for 30 s" in "\n".join(told)


def test_a_paused_worker_is_named_with_its_limit(store, monkeypatch):
    monkeypatch.setattr(watching, "PAUSED_S", 1.0)
    # Python and Dask alone take more than 5 % of this limit, so that the worker is paused from the start.
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        dask.config.set({"distributed.worker.memory.pause": 0.05}),
        LocalCluster(memory_limit="1GiB", **options) as cluster,
        Client(cluster) as client,
        pytest.raises(
            PtychodaskError, match=r"only worker is paused .* of the 1,024 MiB .* at 5 %; start workers with"
        ),
    ):
        reconstruct(store, LinearModel(), client=client, progress=False)


def test_the_library_of_the_network_counts_for_the_limit():
    worker = WorkerState("w", 2, 1000 * MIB, {})
    asking._check_memory(worker, 790 * MIB, 50 * MIB)
    with pytest.raises(PtychodaskError, match="may use 1,000 MiB, the network and its library take 850 MiB, and its 2"):
        asking._check_memory(worker, 850 * MIB, 50 * MIB)
    with pytest.raises(PtychodaskError, match="its 2 threads need 800 MiB; start workers with 2,500 MiB or more"):
        asking._check_memory(worker, 790 * MIB, 400 * MIB)
    with pytest.raises(PtychodaskError, match=r"pass memory_bytes= below 524288000, start"):
        asking._check_memory(worker, 0, 600 * MIB)


def test_a_worker_in_this_process_is_not_paused_for_what_the_process_holds():
    with clients.in_process_client() as client:
        (worker,) = client.cluster.workers.values()
        assert worker.memory_manager.memory_pause_fraction is False
        assert worker.memory_manager.memory_limit == clients.MEMORY_LIMIT


def test_an_asynchronous_client_is_refused(store):
    async def run(call):
        async with Client(asynchronous=True, processes=False, n_workers=1, dashboard_address=":0") as client:
            call(client)

    calls = [
        lambda client: reconstruct(store, LinearModel()),
        lambda client: reconstruct(store, LinearModel(), client=client),
        lambda client: reconstruct(store, LinearModel(), compute=False),
        lambda client: preflight(client, store, LinearModel()),
    ]
    for call in calls:
        with pytest.raises(PtychodaskError, match=r"the Dask client is asynchronous.*make one without asynchronous"):
            asyncio.run(run(call))


def test_a_run_inside_an_event_loop_needs_no_client(store):
    async def run():
        return reconstruct(store, LinearModel(), progress=False)

    assert asyncio.run(run()).sizes["y"] > 0


def test_a_closed_client_is_refused(store):
    with clients.in_process_client() as client:
        pass
    with pytest.raises(PtychodaskError, match="the Dask client is closed; make a new one"):
        reconstruct(store, LinearModel(), client=client)


CHECK = "from ptychodask.cluster import clients\n"


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("clients._check_main_guard('local_client')\n", 2),
        ("with open(__file__):\n    clients._check_main_guard('local_client')\n", 3),
        ("def main():\n    clients._check_main_guard('local_client')\nmain()\n", 4),
        ("if __name__ == '__main__':\n    clients._check_main_guard('local_client')\n", None),
        ("if '__main__' == __name__ and True:\n    for _ in [1]:\n        clients._check_main_guard('x')\n", None),
        ("def main():\n    clients._check_main_guard('local_client')\nif __name__ == '__main__':\n    main()\n", None),
    ],
)
def test_a_script_without_a_main_guard_is_named_with_the_line(tmp_path, script, line):
    (tmp_path / "script.py").write_text(CHECK + script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if line is None:
        assert done.returncode == 0, done.stderr
    else:
        assert f"line {line} of " in last
        assert last.endswith("put it under if __name__ == '__main__':")


def test_code_that_no_worker_imports_needs_no_guard():
    subprocess.run([sys.executable, "-c", f"{CHECK}clients._check_main_guard('local_client')"], check=True)


@pytest.mark.long
@pytest.mark.parametrize(("limit", "n_workers"), [("1350MB", 1), ("700MB", 1), ("700MB", 2)])
def test_a_memory_limit_below_network_and_library_ends_a_run_within_a_minute(tmp_path, limit, n_workers):
    path = tmp_path / "scan.zarr"
    simulate(path, n_pixels=64, n_patterns=800, step_px=6.0, dose=1e6, seed=1, progress=False)
    options = {"threads_per_worker": 2, "dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=n_workers, memory_limit=limit, **options) as cluster, Client(cluster) as client:
        started = time.monotonic()
        with pytest.raises(PtychodaskError, match=r"uses [\d,]+ MiB.* of the [\d,]+ MiB.*start workers with 1,\d+ MiB"):
            reconstruct(path, client=client, out=tmp_path / "object.zarr", progress=False)
        assert time.monotonic() - started < 60
