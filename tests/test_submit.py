"""Scripts of batch jobs: their directives, their execution, and the refusal of invalid jobs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptychodask.cluster.job import JobSpec, wall_time_s
from ptychodask.cluster.submission import batch_script, submit
from ptychodask.errors import PtychodaskError
from ptychodask.simulate import simulate

HARMFUL = """it's "$(touch canary)" `touch canary` & # ;"""
"""A text that a careless script would run."""

STAND_IN = """#!{python}
# Takes the place of the interpreter of a job: notes what it is called with, and does the least that the script needs.
import json, os, pathlib, signal, sys, time
with open({notes!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
what = sys.argv[2]
if "write_credentials" in what:
    os.mkdir(sys.argv[3])
elif what.endswith("dask_scheduler"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    file = pathlib.Path(sys.argv[sys.argv.index("--scheduler-file") + 1])
    file.write_text("here")
    signal.sigwait([signal.SIGTERM])
    file.unlink()
elif what.endswith("dask_worker"):
    with open({notes!r}, "a") as file:
        file.write(json.dumps(["device", os.environ["CUDA_VISIBLE_DEVICES"]]) + "\\n")
    # Workers end with their scheduler, unless they are lost.
    file = pathlib.Path(sys.argv[sys.argv.index("--scheduler-file") + 1])
    while file.exists() and not {lost}:
        time.sleep(0.01)
elif what == "ptychodask.cli":
    if {signalled} or {lost}:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        if {signalled}:
            os.kill(os.getppid(), signal.SIGTERM)
        signal.sigwait([signal.SIGTERM])
    sys.exit({code})
"""

SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("submit") / "a scan's.zarr"
    simulate(path, n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    return path


def executable(path, content):
    path.write_text(content)
    path.chmod(0o755)
    return path


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run a script of `batch_script` with stand-ins: its exit code and what they were called with."""
    monkeypatch.chdir(tmp_path)

    def call(store, options=(), *, code=0, signalled=False, lost=False, restarts=0, **fields):
        notes = tmp_path / "notes"
        does = {"code": code, "signalled": signalled, "lost": lost}
        python = executable(tmp_path / "python 3", STAND_IN.format(python=sys.executable, notes=str(notes), **does))
        executable(tmp_path / "srun", SRUN)
        executable(
            tmp_path / "scontrol", f'#!/bin/sh\nprintf \'["scontrol", "%s"]\\n\' "$*" >>{shlex.quote(str(notes))}\n'
        )
        script = batch_script(store, JobSpec(python=str(python), folder=str(tmp_path), **fields), options)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "PBS_JOBID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_RESTART_COUNT": str(restarts),
            "CUDA_VISIBLE_DEVICES": "4,2",
        }
        done = subprocess.run(["sh"], input=script, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == (2 if lost else code), done.stderr
        assert ("all workers ended before the run: see" in done.stderr) == lost
        assert not list(tmp_path.glob("canary")), "a value was run"
        assert not (tmp_path / ".ptychodask-7").exists(), "the credentials were left"
        return [json.loads(line) for line in notes.read_text().splitlines()]

    return call


def called(notes, what):
    """Arguments of each call of one module."""
    return [note[2:] for note in notes if note[1].endswith(what)]


def test_a_job_starts_scheduler_workers_and_the_run(ran, store, tmp_path):
    notes = ran(store, ["--polish", "2", "--out", HARMFUL], gpus=2, memory="2GiB")
    folder = tmp_path / ".ptychodask-7"
    tls = ["--tls-ca-file", f"{folder}/ca.pem", "--tls-cert", f"{folder}/cert.pem", "--tls-key", f"{folder}/key.pem"]
    (scheduler,), (worker,), (client,) = (
        called(notes, what) for what in ("scheduler", "dask_worker", "ptychodask.cli")
    )
    for arguments in (scheduler, worker):
        assert " ".join(tls) in " ".join(arguments)
        assert arguments[-2:] == ["--host", "127.0.0.1"]
        assert arguments[arguments.index("--protocol") + 1] == "tls"
    assert worker[worker.index("--memory-limit") + 1] == str(2 * 2**30)
    assert worker[worker.index("--resources") + 1] == "GPU=1"
    reached = ["--scheduler", f"{folder}/scheduler.json", "--tls-folder", str(folder)]
    assert client == ["reconstruct", str(store), *reached, "--polish", "2", "--out", HARMFUL]
    assert not called(notes, "requeue")


@pytest.mark.parametrize("requeue", [True, False])
def test_a_stopped_job_waits_for_its_run_and_is_requeued(ran, store, requeue):
    notes = ran(store, code=143, signalled=True, workers=1, requeue=requeue)
    assert [note for note in notes if note[0] == "scontrol"] == ([["scontrol", "requeue 7"]] if requeue else [])


def test_a_job_whose_run_fails_is_not_requeued(ran, store):
    assert ["scontrol", "requeue 7"] not in ran(store, code=2, workers=1)


@pytest.mark.parametrize("fields", [{"workers": 2}, {"system": "pbs", "gpus": 2}])
def test_a_job_that_loses_all_its_workers_ends_and_is_not_requeued(ran, store, fields):
    assert ["scontrol", "requeue 7"] not in ran(store, code=143, lost=True, **fields)


def test_a_restarted_job_resumes(ran, store):
    notes = ran(store, ["--polish", "2"], restarts=1, workers=1)
    assert called(notes, "ptychodask.cli")[0][-3:] == ["--polish", "2", "--resume"]


def test_the_script_for_pbs_starts_each_worker_on_a_gpu(ran, store):
    notes = ran(store, system="pbs", gpus=2)
    assert len(called(notes, "dask_worker")) == 2
    assert {note[1] for note in notes if note[0] == "device"} == {"4", "2"}
    assert called(notes, "ptychodask.cli")[0][-1] == "--resume"


def directives(script, sign="#SBATCH"):
    """What a batch system reads: its own lines, taken apart as a shell would."""
    return [word for line in script.splitlines() if line.startswith(sign) for word in shlex.split(line)[1:]]


def test_the_directives_contain_the_fields_of_the_spec(store, tmp_path):
    fields = {"account": HARMFUL, "partition": "gpu", "qos": "high", "constraint": "a100|h100", "nodes": 2}
    script = batch_script(
        store, gpus=8, cpus=3, time="00:20", memory="4GiB", name="100%", folder=str(tmp_path), **fields
    )
    found = directives(script)
    for name, value in fields.items():
        assert f"--{name}={value}" in found
    # (4096 MiB and 2048 MiB for scheduler and client) on 3 cores.
    expected = {"--ntasks=8", "--gpus-per-task=1", "--cpus-per-task=3", "--mem-per-cpu=2048M", "--time=00:20:00"}
    assert expected <= set(found)
    assert {"--signal=B:TERM@60", "--requeue", f"--output={tmp_path}/100%%-%j.log"} <= set(found)
    # SLURM stops reading at the first line that is neither a comment nor empty.
    lines = script.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])


def test_modules_lines_and_directives_come_where_they_belong(store):
    script = batch_script(
        store, workers=2, modules=("cuda/12", "gcc"), lines=("export A=1",), directives=("--exclusive",)
    )
    lines = script.splitlines()
    places = [
        lines.index(line) for line in ("#SBATCH --exclusive", "module load cuda/12", "module load gcc", "export A=1")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("fields", [{"gpus": 2, "modules": ("a b",)}, {"workers": 2}, {"gpus": 2, "system": "pbs"}])
def test_scripts_are_clean_posix_shell(store, fields):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (apt-get install shellcheck)")
    script = batch_script(store, JobSpec(**fields), ["--out", "it's & # ;"])
    done = subprocess.run(["shellcheck", "-s", "sh", "-"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_example_in_deploy_is_what_the_command_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulate(tmp_path / "scan.zarr", n_pixels=16, n_patterns=20, step_px=3.0, progress=False)
    spec = JobSpec(gpus=8, nodes=2, time="01:00", partition="gpu", python="/opt/ptychodask/bin/python")
    printed = batch_script("scan.zarr", spec, ["--polish", "2"]).replace(str(tmp_path), "/data")
    assert (Path(__file__).parents[1] / "deploy" / "cluster.sbatch").read_text() == printed


@pytest.mark.parametrize(
    ("text", "seconds"), [("20", 1200), ("00:20", 1200), ("1:00:30", 3630), ("100:00:00", 360_000), ("600", 36_000)]
)
def test_times_are_read_as_hours_first(text, seconds):
    assert wall_time_s(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:70", "1:2:3:4", "-5", "1.5", "1-00", "00:20:0", "٣", "5\n"])
def test_other_times_are_refused(text):
    with pytest.raises(PtychodaskError, match="expected hours:minutes"):
        wall_time_s(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 0}, "gpus is 0, expected 1 to"),
        ({"workers": 10**6}, "workers is 1000000, expected 1 to"),
        ({"gpus": 2, "workers": 2}, "each GPU gets one worker"),
        ({"nodes": 3, "gpus": 2}, "nodes is 3 for 2 workers"),
        ({"time": "2"}, "120 s, expected 3 minutes or more"),
        ({"memory": "16"}, "memory is '16', expected 256MiB or more, with unit"),
        ({"memory": "much"}, "memory is 'much', expected a number with unit"),
        ({"memory": "infGB"}, "expected a number with unit"),
        ({"account": "a\n#SBATCH --uid=0"}, "expected printable text of one line"),
        ({"partition": " "}, "expected printable text of one line"),
        ({"lines": ("ok", "a\rb")}, "lines is 'a\\\\rb', expected printable text of one line"),
        ({"system": "lsf"}, "system is 'lsf', expected one of: slurm, pbs"),
        ({"system": "pbs", "gpus": 2, "nodes": 2}, "nodes is 2, which the script for PBS does not use"),
        ({"system": "pbs", "qos": "high"}, "qos is 'high', which the script for PBS does not use"),
    ],
)
def test_invalid_specs_are_refused(fields, message):
    with pytest.raises(PtychodaskError, match=message):
        JobSpec(**fields)


def test_values_that_cannot_be_used_in_a_script_are_refused(store, tmp_path):
    with pytest.raises(PtychodaskError, match="--workers: set by the job itself"):
        batch_script(store, options=["--workers=2"])
    with pytest.raises(PtychodaskError, match="cannot be used in a script: expected no line breaks"):
        batch_script(store, options=["--out", "a\nb"])
    with pytest.raises(PtychodaskError, match="name is 'a/b', expected no slash"):
        batch_script(store, name="a/b")
    with pytest.raises(PtychodaskError, match="nowhere: the folder does not exist; create it"):
        batch_script(store, folder=str(tmp_path / "nowhere"))
    with pytest.raises(PtychodaskError, match="no such store"):
        batch_script(tmp_path / "no.zarr")
    with pytest.raises(PtychodaskError, match="no field gpu"):
        batch_script(store, gpu=1)


def test_a_machine_without_slurm_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PtychodaskError, match=r"sbatch not found, .*login node.*--dry-run"):
        submit(store, folder=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_script_for_pbs_is_not_submitted(store):
    with pytest.raises(PtychodaskError, match="script for pbs is a template"):
        submit(store, system="pbs")


def test_the_command_prints_the_script(run, store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("submit", store, "--gpus", 2, "--time", "00:20", "--dry-run", "--", "--polish", 2)
    assert code == 0
    assert out == batch_script(store, JobSpec(gpus=2, time="00:20"), ["--polish", "2"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], "time is 'soon'"),
        (["--gpus", "1", "--workers", "1"], "pass only one of them"),
        (["--dry-run", "--", "--scheduler", "tcp://a:1"], "set by the job itself"),
    ],
)
def test_invalid_options_end_in_one_line(refused, store, arguments, message):
    assert message in refused("submit", store, *arguments)


def test_options_unknown_to_reconstruct_are_not_submitted(run, store):
    for options in (["--polish", "often"], ["--nonsense"]):
        code, _, err = run("submit", store, "--dry-run", "--", *options)
        assert code == 2
        assert options[0] in err
        assert "Traceback" not in err
