"""Benchmark of a reconstruction, stage by stage, against the bare network."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ptychodask import models
from ptychodask.cluster.clients import client_for_run
from ptychodask.cluster.job import THREAD_VARIABLES
from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.models.choose import recorded_model, resolve_model
from ptychodask.models.contract import MinimalModel, PatchModel
from ptychodask.plan import Plan, plan_for, prediction_job
from ptychodask.plan.spec import MIB, ReconstructionSpec, in_pixels
from ptychodask.prediction import PredictionJob, open_stored
from ptychodask.reconstruction import reconstruct
from ptychodask.scan import Scan
from ptychodask.simulate import simulate
from ptychodask.storage.location import parse_location
from ptychodask.store import StoredScan, open_scan

Network = Literal["pinn", "ptychopinn"]
"""Network that is built if no model is given: ours, or one of PtychoPINN's layer sizes."""

SIMULATED: dict[str, Any] = {"object": "lines", "probe": "zone_plate", "dose": 6e4, "step_px": 6.0}
"""Scan that is simulated if no store is given; counts with photon noise, stored as uint16."""

BARE_SHARE = 1 / 8
"""Fraction of the groups that each of the two bare loops predicts."""

BARE_BATCHES_AT_LEAST = 16
"""Smallest number of batches of a bare loop on each worker."""

DISTINCT_BATCHES = 8
"""Batches that a bare loop keeps in memory and predicts in turn."""

PACKAGES = ("ptychodask", "keras", "tensorflow", "jax", "torch", "numpy", "numba", "dask", "distributed", "zarr")


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Scan and network that are made if none is given."""

    n_groups: int = 20_000
    """Number of groups, and of patterns, of the simulated scan."""

    n_pixels: int = 64
    """Pixels across a pattern, N, of the simulated scan."""

    network: Network = "pinn"
    """Network that is built, with untrained weights."""

    members: int = 4
    """Patterns in one group, C, of that network."""

    n_filters_scale: int = 2
    """Width of that network."""

    def __post_init__(self) -> None:
        check_choice("network", self.network, get_args(Network), "bench")


@dataclass(frozen=True, eq=False)
class BareJob:
    """Loop over the bare network."""

    prediction: PredictionJob
    """Model, scan, groups and batch size of the reconstruction."""

    n_batches: int


@dataclass(frozen=True)
class BareRun:
    """Times of a bare loop on one worker."""

    start_up_s: float
    """Time to load the model, compile its call and make the first one."""

    seconds: float
    """Time of the loop."""

    n_groups: int


def bench(
    store: str | Path | None = None,
    model: str | Path | MinimalModel | None = None,
    spec: BenchSpec = BenchSpec(),
    *,
    reconstruction: ReconstructionSpec = ReconstructionSpec(),
    client: Any = None,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Time a reconstruction from disk to disk, and the bare network.

    The bare network is timed before and after it, on the same workers.

    Parameters
    ----------
    store : path, optional
        By default a scan is simulated, and removed at the end.
    model : path or model, optional
        By default the one that the store records; if there is none, one is built.
    spec : BenchSpec
        Scan that is simulated and network that is built.
    reconstruction : ReconstructionSpec
        Options of the reconstruction.
    client : distributed.Client, optional
        Client to run on; by default the active client, else one in this process.
    folder : path, optional
        Folder that all workers see, for temporary files; by default that of the system.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    dict
        Plain values for JSON: ``scan``, ``model``, ``plan``, ``workers``, ``start_up_s``, ``bare``, ``end_to_end``
        (its ``seconds`` are the total wall time and, for each stage, the time summed over the tasks) and
        ``memory``; `describe` formats them as a table.

    Raises
    ------
    PtychodaskError
        If there is no worker, or as `reconstruct` does.

    Notes
    -----
    In order: each worker loads the model and makes one call (``start_up_s``); the bare loop; a small part of the
    object as a warm-up; the reconstruction; the bare loop again. A bare loop runs on all workers at once, on arrays in
    memory, with the batch size and in the processes of the reconstruction: if its two rates differ, the machine had
    another load meanwhile. Efficiency is groups/s of the reconstruction over the mean of the two.
    """
    with _scratch_folder(folder) as scratch, client_for_run(client) as used:
        workers = sorted(used.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise PtychodaskError("bench: the cluster has no worker; start some first")
        scan = _scan(store, spec, scratch, progress)
        network = _network(scan, model, spec, scratch)
        started = time.perf_counter()
        # As `reconstruct` plans it, which stores the group table that workers read.
        in_px = in_pixels(reconstruction, scan.pixel_size_m, str(scan.store))
        planned = plan_for(StoredScan(str(scan.store)), network, in_px)
        plan_s = time.perf_counter() - started
        job = _bare_job(prediction_job(planned, network, scan, reconstruction), planned.n_groups, len(workers))
        start_up_s = max(run.start_up_s for run in _bare(used, workers, replace(job, n_batches=1)))
        before = _bare(used, workers, job)
        _warm_up(str(scan.store), network, reconstruction, planned, used, len(workers))
        on_all(used, forget_peak)
        started = time.perf_counter()
        result = reconstruct(
            str(scan.store), network, reconstruction, out=scratch / "object.zarr", client=used, progress=progress
        )
        total = time.perf_counter() - started
        peaks = on_all(used, peak_above_baseline)
        after = _bare(used, workers, job)
        return {
            "scan": _about_scan(scan, simulated=store is None),
            "model": _about_model(network),
            "plan": {"seconds": plan_s, "precision": reconstruction.precision, **planned.summary()},
            "workers": _about_workers(used),
            "start_up_s": start_up_s,
            "bare": {
                "before_groups_per_s": _rate(before),
                "after_groups_per_s": _rate(after),
                "batches": job.n_batches,
                "seconds": [max(run.seconds for run in runs) for runs in (before, after)],
            },
            "end_to_end": _end_to_end(
                planned,
                result.ptycho.records["seconds"] | {"total": total},
                start_up_s,
                (_rate(before) + _rate(after)) / 2,
            ),
            "memory": _about_memory(peaks),
        }


@contextmanager
def _scratch_folder(folder: str | Path | None) -> Iterator[Path]:
    """Temporary folder, removed at the end."""
    if folder is not None and not Path(folder).is_dir():
        raise PtychodaskError(f"{folder}: no such folder; make it first, where all workers see it")
    with tempfile.TemporaryDirectory(prefix="ptychodask-bench-", dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch).resolve()


def _scan(store: str | Path | None, spec: BenchSpec, scratch: Path, progress: bool | None) -> Scan:
    if store is not None:
        return open_scan(store)
    return simulate(
        scratch / "scan.zarr", n_patterns=spec.n_groups, n_pixels=spec.n_pixels, progress=progress, **SIMULATED
    )


def _network(scan: Scan, model: str | Path | MinimalModel | None, spec: BenchSpec, scratch: Path) -> PatchModel:
    """Given or recorded model, else a new one, bound to the scan."""
    network: PatchModel
    if model is not None or recorded_model(scan) is not None:
        network = resolve_model(scan, model)
    elif spec.network == "ptychopinn":
        network = models.untrained_ptychopinn(scan.n_pixels, spec.members, spec.n_filters_scale)
    else:
        model_spec = models.ModelSpec(
            n_pixels=scan.n_pixels, members=spec.members, n_filters_scale=spec.n_filters_scale
        )
        untrained = models.untrained_model(model_spec, models.Optics.of(scan))
        network = models.save_model(untrained, scratch / "bench.model")
    return network.bind(scan)


def _bare_job(prediction: PredictionJob, n_groups: int, n_workers: int) -> BareJob:
    n_batches = n_groups * BARE_SHARE / (prediction.batch_size * n_workers)
    return BareJob(prediction, max(BARE_BATCHES_AT_LEAST, round(n_batches)))


def _bare(client: Any, workers: list[str], job: BareJob) -> list[BareRun]:
    """Run the bare loop on all workers at once."""
    job_reference = client.scatter(job, hash=False, broadcast=True)
    futures = [client.submit(run_bare, job_reference, workers=[worker], pure=False) for worker in workers]
    return list(client.gather(futures))


def run_bare(job: BareJob) -> BareRun:
    """Call a network repeatedly on arrays in memory, in a worker.

    Parameters
    ----------
    job : BareJob

    Returns
    -------
    BareRun
    """
    started = time.perf_counter()
    prediction = job.prediction
    scan = open_stored(prediction).scan
    predict = prediction.model.load().bind(scan).compile(prediction.batch_size, prediction.precision)
    batches = _batches(prediction, scan, min(DISTINCT_BATCHES, job.n_batches))
    np.asarray(predict(*batches[0]))
    ready = time.perf_counter()
    for index in range(job.n_batches):
        np.asarray(predict(*batches[index % len(batches)]))
    return BareRun(ready - started, time.perf_counter() - ready, job.n_batches * prediction.batch_size)


def _batches(job: PredictionJob, scan: Scan, n_batches: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Batches of network input from the first groups of the scan.

    Each is X (batch, N, N, C) and offsets (batch, C, 2), all of full size.
    """
    table = open_stored(job).table(job.groups)
    assert table is not None
    all_members = table.rows(0, len(table))
    batches = []
    for index in range(n_batches):
        rows = np.arange(index * job.batch_size, (index + 1) * job.batch_size) % len(all_members)
        member = all_members[rows]
        patterns = scan.network_input(member.reshape(-1)).reshape(*member.shape, scan.n_pixels, scan.n_pixels)
        position = scan.position_yx_px[member]
        offset = (position - position.mean(axis=1, keepdims=True)).astype(np.float32)
        batches.append((np.ascontiguousarray(np.moveaxis(patterns, 1, -1)), offset))
    return batches


def _rate(runs: list[BareRun]) -> float:
    """Groups/s of all workers together."""
    return sum(run.n_groups / run.seconds for run in runs)


def _warm_up(
    store: str, network: PatchModel, spec: ReconstructionSpec, planned: Plan, client: Any, n_workers: int
) -> None:
    """Reconstruct a small part of the object, a chunk for each worker."""
    middles = np.array([(sum(chunk.box[:2]) // 2, sum(chunk.box[2:]) // 2) for chunk in planned.chunks[:n_workers]])
    (y0, x0), (y1, x1) = middles.min(axis=0).tolist(), middles.max(axis=0).tolist()
    reconstruct(store, network, replace(spec, roi=(y0, y1 + 1, x0, x1 + 1)), client=client, progress=False)


def _end_to_end(planned: Plan, seconds: dict[str, float], start_up_s: float, bare: float) -> dict[str, Any]:
    total = seconds["total"]
    return {
        "seconds": seconds,
        "groups_per_s": planned.n_groups / total,
        "patterns_per_s": planned.n_patterns / total,
        "efficiency": planned.n_groups / total / bare,
        "efficiency_with_start_up": planned.n_groups / (total + start_up_s) / bare,
    }


def _about_scan(scan: Scan, *, simulated: bool) -> dict[str, Any]:
    return {
        "n_patterns": scan.n_patterns,
        "n_pixels": scan.n_pixels,
        "dtype": scan.diffraction.dtype.name,
        "stored_bytes": sum(size for _, size in (parse_location(str(scan.store)) / "diffraction").below()),
        "simulated": simulated,
    }


def _about_model(network: PatchModel) -> dict[str, Any]:
    about = {"kind": network.kind, "members": network.members, "output": network.output, "hash": network.content_hash}
    if not isinstance(network, models.Model | models.PtychoPinnModel):
        return about
    built = network.network()
    return about | {"parameters": built.count_params(), "convolution_flop": _convolution_flop(built)}


def _convolution_flop(network: Any) -> int:
    """Multiplications and additions of a network's convolutions for one group."""
    total = 0
    for layer in network.layers:
        if len(getattr(layer, "kernel", np.empty(0)).shape) == 4:
            height, width = layer.output.shape[1:3]
            total += 2 * int(np.prod(layer.kernel.shape)) * height * width
    return total


def _about_workers(client: Any) -> dict[str, Any]:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    machines = client.run(describe_machine).values()
    different = {str(machine): machine for machine in machines}
    return {
        "n_workers": len(workers),
        "n_threads": sum(worker["nthreads"] for worker in workers),
        "machines": list(different.values()),
    }


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs and package versions of this machine."""
    return {
        "system": platform.platform(),
        "processor": _first_of(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [_first_of(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))],
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _first_of(path: Path, field: str) -> str | None:
    """Value of the first line ``field: value`` of a file, or None."""
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process."""

    process: str
    """Host and process id."""

    peak_above_baseline: int | None
    """Peak resident memory since `forget_peak` minus the resident memory then, bytes; None if not available."""


_BASELINES: dict[int, int] = {}
_STATUS = Path("/proc/self/status")


def forget_peak() -> None:
    """Reset this process's memory peak, and record its baseline."""
    if _STATUS.is_file():
        Path("/proc/self/clear_refs").write_text("5")
        _BASELINES[os.getpid()] = _resident_bytes("VmRSS")


def peak_above_baseline() -> ProcessMemory:
    """Memory peak since `forget_peak`; only on Linux."""
    process = os.getpid()
    baseline = _BASELINES.get(process)
    peak = None if baseline is None else _resident_bytes("VmHWM") - baseline
    return ProcessMemory(f"{socket.gethostname()}:{process}", peak)


def _resident_bytes(field: str) -> int:
    return int(str(_first_of(_STATUS, field)).split()[0]) * 1024


def on_all(client: Any, function: Any) -> dict[str, Any]:
    """Results of a function in client, scheduler and each worker, by role."""
    return {"client": function(), "scheduler": client.run_on_scheduler(function), **client.run(function)}


def _about_memory(peaks: dict[str, ProcessMemory]) -> dict[str, Any]:
    """Memory peaks by role, the largest of the workers.

    One entry if a single process has all roles.
    """
    workers = [memory for role, memory in peaks.items() if role not in ("client", "scheduler")]
    all_peaks = [memory.peak_above_baseline for memory in peaks.values()]
    if None in all_peaks:
        return {}
    if len({memory.process for memory in peaks.values()}) == 1:
        return {"client, scheduler and worker in one process": all_peaks[0]}
    return {
        "client": peaks["client"].peak_above_baseline,
        "scheduler": peaks["scheduler"].peak_above_baseline,
        "worker": max(memory.peak_above_baseline or 0 for memory in workers),
    }


def describe(report: dict[str, Any]) -> str:
    """Report of `bench` as a table for the terminal."""
    scan, plan_, bare, run = (report[name] for name in ("scan", "plan", "bare", "end_to_end"))
    rows = {
        "scan": f"{scan['n_patterns']:,} patterns of {scan['n_pixels']} x {scan['n_pixels']}, {scan['dtype']}, "
        f"{scan['stored_bytes'] / MIB:,.0f} MiB on disk{', simulated' if scan['simulated'] else ''}",
        "model": _model_row(report["model"]),
        "plan": f"{plan_['n_groups']:,} groups in {plan_['n_chunks']:,} chunks of {plan_['groups_per_chunk']:,} onto "
        f"{plan_['n_tiles']:,} tiles, batches of {plan_['batch_size']} in {plan_['precision']}; "
        f"planned in {plan_['seconds']:.1f} s",
        "workers": _workers_row(report["workers"]),
        "start-up": f"{report['start_up_s']:.1f} s to load the model and make the first call",
        "bare": f"{bare['before_groups_per_s']:,.1f} groups/s before and {bare['after_groups_per_s']:,.1f} after, "
        f"{bare['batches']} batches on each worker",
        "end to end": f"{run['groups_per_s']:,.1f} groups/s, {run['patterns_per_s']:,.1f} patterns/s, "
        f"{run['seconds']['total']:.1f} s",
        "efficiency": f"{run['efficiency']:.3f} of the bare network, "
        f"{run['efficiency_with_start_up']:.3f} with start-up",
    }
    lines = [f"{name:<11} {value}" for name, value in rows.items()]
    lines += ["", f"{'stage':<11} {'seconds':>9} {'µs/pattern':>11} {'of the run':>11}"]
    lines += _stage_rows(run["seconds"], plan_["n_patterns"], report["workers"]["n_workers"])
    lines += ["", "peak memory above the loaded model's", *_memory_rows(report["memory"])]
    return "\n".join(lines)


def _model_row(model: dict[str, Any]) -> str:
    row = f"{model['kind']}, groups of {model['members']}, a patch per {model['output']}"
    if "parameters" not in model:
        return row
    return (
        f"{row}, {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['convolution_flop'] / 1e9:.2f} GFLOP per group in convolutions"
    )


def _workers_row(workers: dict[str, Any]) -> str:
    machines = []
    for machine in workers["machines"]:
        gpus = f", {', '.join(map(str, machine['gpus']))}" if machine["gpus"] else ""
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        machines.append(f"{machine['processor']}, {machine['cores']} cores, {memory}{gpus}")
    return f"{workers['n_workers']} with {workers['n_threads']} threads; {'; '.join(machines)}"


def _stage_rows(seconds: dict[str, float], n_patterns: int, n_workers: int) -> list[str]:
    """Rows of the stages, in the order of the run.

    A worker's two threads overlap, so the fractions may sum to more than one.
    """
    total = seconds["total"]
    return [
        f"{name:<11} {value:>9.2f} {1e6 * value / n_patterns:>11.1f} {value / (total * n_workers):>11.3f}"
        for name, value in seconds.items()
        if name != "total"
    ]


def _memory_rows(memory: dict[str, int]) -> list[str]:
    if not memory:
        return ["  not available on this system"]
    return [f"  {role}: {n_bytes / MIB:,.0f} MiB" for role, n_bytes in memory.items()]
