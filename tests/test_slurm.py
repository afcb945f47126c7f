"""A real SLURM of two virtual nodes: jobs that reconstruct, that are lost, and that meet their time limit."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from slurm_for_tests import asked, missing, running_slurm

from ptychodask import cluster
from ptychodask.cluster.clients import in_process_client, slurm_client
from ptychodask.cluster.job import JobSpec
from ptychodask.cluster.submission import submit
from ptychodask.errors import PtychodaskError
from ptychodask.io import ingest
from ptychodask.models import ModelSpec, Optics, untrained_model
from ptychodask.models.bundle import save_model
from ptychodask.reconstruction import reconstruct
from ptychodask.result import open_result
from ptychodask.storage.atomic import LEDGER, building_path
from ptychodask.store import open_scan

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FIELDS = {"groups_per_chunk": 32, "batch_size": 32}
"""So that there are chunks enough for a worker to be lost in the middle."""

JOB = JobSpec(cpus=1, memory="2GiB", time="30", workers=2)


@pytest.fixture(scope="module")
def slurm():
    """SLURM's configuration, also in the environment."""
    folder = Path(tempfile.mkdtemp(prefix="ptyslurm"))
    before = dict(os.environ)
    try:
        with running_slurm(folder) as file:
            # Jobs take the environment with them: they import the package and the tests' models from here.
            here = [str(Path(cluster.__file__).parents[2]), str(Path(__file__).parent)]
            os.environ |= {"SLURM_CONF": str(file), "PYTHONPATH": os.pathsep.join(here)}
            yield file
    finally:
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def star(shared, tmp_path_factory):
    """Folder with the Siemens star, and a network whose data-consistent steps give a picture without training."""
    folder = tmp_path_factory.mktemp("star")
    ingest(shared / "data" / "siemens-star-small.npz.bz2", folder / "star.zarr", progress=False)
    spec = ModelSpec(n_pixels=128, members=1, levels=1, projections_before=2, projections_after=0)
    save_model(untrained_model(spec, Optics.of(open_scan(folder / "star.zarr"))), folder / "star.model")
    return folder


@pytest.fixture(scope="module")
def plain(star):
    """The object as this process makes it."""
    with in_process_client() as client:
        return reconstruct(star / "star.zarr", star / "star.model", client=client, progress=False, **FIELDS).load()


def assert_same_bits(found, expected):
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(found[name].values, expected[name].values)


def wait_for(condition, seconds=240):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def n_chunks_done(out):
    ledger = building_path(out) / LEDGER
    return ledger.read_text().count('"kind": "chunk"') if ledger.exists() else 0


def cancel_when_begun(slurm, out, what):
    """Call ``scancel`` when a quarter of the chunks is there."""
    wait_for(lambda: n_chunks_done(out) >= 4)
    asked(slurm, "scancel", *what)


def options(out):
    return ["--model", "star.model", "--out", str(out), "--groups-per-chunk", "32", "--batch-size", "32"]


def test_a_submitted_job_makes_the_same_object(slurm, star, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(star)
    job = submit("star.zarr", JOB, options(tmp_path / "o.zarr"), nodes=2, folder=str(tmp_path))
    # Ends when the job has ended, however it did.
    asked(slurm, "srun", "--quiet", f"--dependency=afterany:{job.number}", "true")
    assert "o.zarr: " in job.log.read_text(), job.log.read_text()
    assert_same_bits(open_result(tmp_path / "o.zarr"), plain)
    assert not list(tmp_path.glob(".ptychodask-*")), "the credentials were left"


def test_a_worker_whose_job_is_cancelled_is_replaced(slurm, star, plain, tmp_path):
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install 'ptychodask[hpc]'")
    with slurm_client(JOB, host="127.0.0.1", folder=str(tmp_path)) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        client.wait_for_workers(2, timeout=120)
        before = set(asked(slurm, "squeue", "-h", "-o", "%i").split())
        out = tmp_path / "o.zarr"
        cancelled = threading.Thread(target=cancel_when_begun, args=(slurm, out, (sorted(before)[0],)))
        cancelled.start()
        reconstruct(star / "star.zarr", star / "star.model", out=out, client=client, progress=False, **FIELDS)
        cancelled.join()
        client.wait_for_workers(2, timeout=120)
        after = set(asked(slurm, "squeue", "-h", "-t", "R", "-o", "%i").split())
    assert len(before) == len(after) == 2
    assert len(before & after) == 1
    assert_same_bits(open_result(out), plain)
    assert not list(tmp_path.glob(".ptychodask-*")), "the credentials were left"
    # They end with the client.
    assert not set(asked(slurm, "squeue", "-h", "-t", "R,PD", "-o", "%i").split())


@pytest.mark.long
def test_a_job_that_meets_its_time_limit_goes_on_where_it_was(slurm, star, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(star)
    out = tmp_path / "o.zarr"
    job = submit("star.zarr", JOB, options(out), nodes=2, folder=str(tmp_path))
    # What SLURM does a minute before the limit: the signal goes to the script alone.
    cancel_when_begun(slurm, out, ("--batch", "--signal=TERM", job.number))
    wait_for(lambda: asked(slurm, "squeue", "-h", "-j", job.number, "-o", "%T") == "PENDING")
    assert 4 <= n_chunks_done(out) < plain.ptycho.records["plan"]["n_chunks"]
    # SLURM lets a job that was put back wait for two minutes.
    asked(slurm, "scontrol", "update", f"JobId={job.number}", "StartTime=now")
    wait_for(lambda: not asked(slurm, "squeue", "-h", "-j", job.number, "-o", "%i"))
    said = job.log.read_text()
    assert "ptychodask: stopped" in said
    assert "o.zarr: " in said
    assert_same_bits(open_result(out), plain)


def test_workers_with_a_gpu_say_so_and_see_their_own(slurm, tmp_path):
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install 'ptychodask[hpc]'")
    with slurm_client(JOB, workers=None, gpus=2, host="127.0.0.1", folder=str(tmp_path)) as client:
        client.wait_for_workers(2, timeout=120)
        assert [worker["resources"] for worker in client.scheduler_info()["workers"].values()] == [{"GPU": 1.0}] * 2
        assert set(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == {"0"}


def test_refusals_of_slurm_are_told_in_one_line(slurm, star, tmp_path):
    with pytest.raises(PtychodaskError, match=r"SLURM refuses the job: .*[Ii]nvalid partition"):
        submit(star / "star.zarr", JOB, partition="nowhere", folder=str(tmp_path))
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install 'ptychodask[hpc]'")
    with pytest.raises(PtychodaskError, match=r"SLURM refuses the job: .*[Ii]nvalid partition"):
        slurm_client(JOB, partition="nowhere", host="127.0.0.1", folder=str(tmp_path))
    assert not list(tmp_path.iterdir())
