"""Reconstruction of a scan (`reconstruct`): planned, run on Dask, returned as Dataset."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import xarray as xr

from ptychodask.cluster.executor import AnyClient, executor_for_run
from ptychodask.errors import PtychodaskError, with_fields
from ptychodask.models.choose import absolute_path, resolve_model
from ptychodask.models.contract import MinimalModel, PatchModel
from ptychodask.models.training_range import unlike_training
from ptychodask.options import names_where, takes_fields, values_to_record
from ptychodask.plan import Plan, plan_for, plan_together, prediction_job
from ptychodask.plan.chunks import RESULT_PIXEL_BYTES, Tile
from ptychodask.plan.spec import MIB, ReconstructionSpec, in_pixels
from ptychodask.prediction import open_anew
from ptychodask.reconstruction.batch import FailedScansError, make_folder, reconstruct_each, reconstruct_experiments
from ptychodask.reconstruction.flat import ITERATIVE, FlatObject
from ptychodask.reconstruction.follow import FollowedScan, first_run
from ptychodask.reconstruction.lazy import lazy_result
from ptychodask.reconstruction.live import screen_for
from ptychodask.reconstruction.patch_cache import patch_cache
from ptychodask.reconstruction.refine import OF_PATTERNS, stitch_and_refine
from ptychodask.reconstruction.run import Run, RunFolders
from ptychodask.reconstruction.tasks import MethodJob, StitchingJob, TileReport
from ptychodask.reconstruction.to_store import write_result
from ptychodask.result import Layers, TileArrays, make_dataset
from ptychodask.scan import Scan
from ptychodask.storage.location import Location, LocationLike, parse_location
from ptychodask.storage.records import plain
from ptychodask.store import StoredScan

__all__ = ["FailedScansError", "reconstruct"]

logger = logging.getLogger(__name__)

Models = str | Path | MinimalModel | Mapping[str, str | Path | MinimalModel] | None
"""A model, or several by label; None for the one the store records, else a packaged one that fits."""


@overload
def reconstruct(
    store: LocationLike, model: Models = None, spec: ReconstructionSpec = ..., **options: Any
) -> xr.Dataset: ...
@overload
def reconstruct(
    store: list[Any] | tuple[Any, ...], model: Models = None, spec: ReconstructionSpec = ..., **options: Any
) -> dict[str, xr.Dataset]: ...
@takes_fields(ReconstructionSpec)
def reconstruct(
    store: LocationLike | Sequence[LocationLike],
    model: Models = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    out: LocationLike | None = None,
    client: AnyClient | None = None,
    overwrite: bool = False,
    resume: bool = False,
    compute: bool = True,
    progress: bool | None = None,
    **spec_fields: Any,
) -> xr.Dataset | dict[str, xr.Dataset]:
    """Reconstruct the object of a scan.

    The groups are predicted chunk by chunk, and the object is reassembled tile by tile.

    Parameters
    ----------
    store : path, or list of paths
        A store that `ingest` or `simulate` wrote, on a disk or in a bucket (``s3://bucket/scan.zarr``). Several are
        reconstructed one after the other, on one client.
    model : path or model, or dict of label to such, optional
        By default the latest `pinn` that the store records, else the latest `baseline`, else the packaged model for
        patterns of N pixels (``pretrained:<name>``). "iterative": no network, but a flat object that is refined.
        Several models predict from one reading of the patterns, and the result has a dimension ``network``. A warning
        is logged if the scan is outside the training range of a model.
    spec : ReconstructionSpec
        Options. The group table is by default the stored one with the model's members, else made by the default spec.
    out : path, optional
        Store to write the result into, tile by tile, on a disk or in a bucket; by default it stays in memory. For
        several scans a folder, which gets a ``<name>.object.zarr`` for each. For a scan of several experiments also a
        folder, which gets an ``experiment-K.zarr`` for each.
    client : distributed.Client or Executor, optional
        Client to run on; by default the active client, else one in this process.
    overwrite : bool
        Replace what is at `out`, and what a stopped run left of it.
    resume : bool
        Resume a stopped run into `out`: finished tiles and chunks are not computed again. If the result of the same run
        is complete already, it is opened.
    compute : bool
        False returns a lazy Dataset: a region of it predicts only the chunks that meet the tiles it touches.
    progress : bool, optional
        See `progress_bar`.
    **spec_fields
        Fields of `ReconstructionSpec`, by name; they replace those of `spec`.

    Returns
    -------
    xarray.Dataset
        ``object``, ``weight``, ``uncertainty`` and ``count`` (y, x), see `make_dataset`; lazy if `out` is given or
        `compute` is False. With ``keep_stitched`` also ``object_stitched``, the object before refinement; with
        ``split_half`` also ``object_half`` and ``weight_half`` (half, y, x); with several models each array has
        ``network`` as its first axis. For several scans a dict of these by the names of the
        stores, without ``.zarr``; for several experiments by names ``experiment-K``.

    Raises
    ------
    PtychodaskError
        If a field is unknown, no model fits, the plan is refused (see `plan`), a worker has too little memory, a task
        fails, `out` exists, or the run to be resumed had another scan, model, spec or plan; if the scan has several
        experiments, and neither ``experiment`` nor `out` is given.
    FailedScansError
        If some of several scans or experiments failed, once all others are done; its attribute ``results`` has those.

    Notes
    -----
    The same plan gives the same bits for any number of workers: sums are float64 and merged in the order of chunks.
    With `out` the sums of a chunk wait for their tiles in a file beside it, or in an object of the same bucket, so that
    no worker's memory depends on the size of the scan.

    A run into `out` that ends early, however it ends, keeps its finished tiles and the sums of its finished chunks,
    each with its checksum in a ledger. A task that fails is tried once more, on another worker if the first is gone; a
    chunk that crashes its workers is set aside until all others are done, and tried alone before it is given up; a task
    much slower than any other is also started on a second worker. With ``on_error="skip"`` unusable patterns are left
    out as if they were in ``drop``, and the attribute ``skipped`` lists them by reason.

    Each experiment of a scan (its value of ``scan_index``) has an object of its own. With ``experiment=K`` patterns and
    groups of the others are left out, and the result records the number. Without it, each is reconstructed into its own
    store in the folder `out`; each can be resumed.

    The halves take every other pattern as they are stored: the patches of even ones and of odd ones (of a patch per
    group, its seed counts). By default their groups are drawn from one half only (`GroupingSpec.halves`), so that the
    halves share no pattern; members are then farther apart than in the groups that a network was trained on. With a
    table of other groups each patch depends on both halves, and their correlation is meaningless.

    A live picture is assembled from reductions of finished tiles that come with their reports: means over cells of some
    pixels, never more than 512 cells across. It is shown at most twice a second, by the thread that waits for the run.
    An error of the function that shows it is logged as a warning, and the run continues without pictures.

    A growing scan (see `ingest`) is reconstructed from its present segments, or followed: with ``follow=True`` its
    store is polled once a second, the chunks of each new segment are predicted, and the object is stitched when the
    scan is finished. No chunk spans two segments, and chunk sizes follow from the first, so the result is, to the bit,
    that of the finished scan. A run ends if no segment comes for ``follow_timeout_s``; ``follow=True`` with
    ``resume=True`` resumes it.

    A cache stores the patches as float16, 11 bits of each number.

    A network sees few patterns at a time; refinement then fits the stitched object to all of them, with the store's
    probe. One pattern in 16 takes no part and judges each stage by its misfit: the Poisson deviance for counts, else
    Σ(√I_pred − √I)². Scans of fewer than 64 patterns have no judges.

    ``slow_phase`` multiplies the object by exp(i φ), with φ bilinear between nodes as far apart as the probe is wide:
    one Gauss-Newton step of least squares for the amplitudes of a share of the patterns, kept if it lowers the judges'
    misfit. It is solved again after two sweeps that lowered the misfit more than it did.

    ``polish`` lowers Σ(√I_pred − √I)² + Σ h |object − stitched|², where the proximal weight h keeps pixels that
    received little intensity near the network's prediction. All patterns are projected at once in each sweep (their
    contributions are summed), and the step follows the summed change and the step before (`StepProducts.mix`), so the
    result depends on chunks no more than the stitching does. ``polish="auto"`` stops after three sweeps that did not
    lower the judges' misfit, and keeps the object for which it was lowest.

    A task reads the patterns and the part of the object that it needs. With `out` the tiles are in files beside it
    between stages, so that no worker's memory depends on the size of the object, and a stopped run continues with the
    latest stage; without, they are spread over the workers. Each of several models' objects is refined, and each half
    by its own patterns; in a region, patterns that illuminate nothing outside refine it. Pixels that no patch covers
    stay NaN; ``weight``, ``uncertainty`` and ``count`` stay those of the network's patches. The attribute
    ``refinement`` records the judges' misfit after each stage. See `ptychodask.refinement`.
    """
    spec = with_fields(spec, spec_fields)
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "resume": resume,
        "compute": compute,
        "progress": progress,
    }
    if isinstance(store, Sequence) and not isinstance(store, str):
        with executor_for_run(client) if compute else nullcontext(client) as used:
            return reconstruct_each(
                store,
                None if out is None else parse_location(out),
                spec,
                lambda path, result: _reconstruct_store(path, model, spec, out=result, client=used, **options),
            )
    return _reconstruct_store(store, model, spec, out=out, client=client, **options)


def _reconstruct_store(
    store: LocationLike,
    model: Models,
    spec: ReconstructionSpec,
    *,
    out: LocationLike | None,
    client: AnyClient | None,
    compute: bool,
    **options: Any,
) -> xr.Dataset | dict[str, xr.Dataset]:
    """`reconstruct` for one scan, with one experiment or several."""
    _check_options(spec, out, compute=compute, several=isinstance(model, Mapping), resume=bool(options["resume"]))
    stored = open_anew(store)
    experiments = [] if spec.experiment is not None else stored.experiments(tuple(spec.drop))
    if len(experiments) < 2:
        return _reconstruct_one(stored, model, spec, out=out, client=client, compute=compute, **options)
    listed = ", ".join(map(str, experiments[:10])) + (", ..." if len(experiments) > 10 else "")
    if out is None or spec.follow:
        or_out = "" if spec.follow or not compute else ", or out= (--out), a folder with a result for each"
        raise PtychodaskError(
            f"{stored.label}: has {len(experiments)} experiments ({listed}), and each has an object of its own; pass "
            f"experiment= (--experiment) for one of them{or_out}"
        )
    logger.info("%s: %d experiments (%s), reconstructed one by one", stored.label, len(experiments), listed)
    folder = parse_location(out)
    make_folder(folder, "experiments")
    with executor_for_run(client) as used:
        return reconstruct_experiments(
            experiments,
            folder,
            lambda experiment, path: _reconstruct_one(
                stored,
                model,
                replace(spec, experiment=experiment),
                out=path,
                client=used,
                compute=True,
                **options,
            ),
        )


def _reconstruct_one(
    stored: StoredScan,
    model: Models,
    spec: ReconstructionSpec,
    *,
    out: LocationLike | None,
    client: AnyClient | None,
    overwrite: bool,
    resume: bool,
    compute: bool,
    progress: bool | None,
) -> xr.Dataset:
    """`reconstruct` for one experiment of a scan."""
    started = time.perf_counter()
    several = isinstance(model, Mapping)
    scan = stored.first()
    spec = in_pixels(spec, scan.pixel_size_m, stored.label)
    spec, left_out = spec.with_refinement_that_applies(compute=compute)
    if left_out is not None:
        logger.info("%s: refinement left out: %s", stored.label, left_out)
    models = model if isinstance(model, Mapping) else {"": model}
    networks = {str(label): _network_of(scan, given) for label, given in models.items()}
    _warn_outside_training_range(networks, stored)
    result = None if out is None else parse_location(out)
    plan_run = partial(_plan_stored, stored.label, networks, spec, several=several)
    if spec.follow:
        run = first_run(plan_run, stored, spec.follow_timeout_s)
    else:
        run = _plan_run(stored, scan, networks, spec, several=several)
    if left_out is not None:
        run = replace(run, attributes=run.attributes | {"refinement": {"left_out": left_out}})
    scan, plan = run.scan, run.plan
    if plan.outliers:
        logger.warning("%s: %s", stored.label, plan.outliers)
    is_growing = scan.attributes["state"] == "growing"
    # A run that followed the scan may have been stopped after the last segment: its ledger is that of a growing scan.
    is_resumed = resume and "segments" in scan.attributes and result is not None and result.is_resumable()
    if spec.follow and (is_growing or is_resumed):
        path = _check_followed(spec, result, plan.store)
        with executor_for_run(client) as used:
            followed = FollowedScan(plan_run, used, progress)
            return write_result(
                run, path, used, started, progress, overwrite=overwrite, resume=resume, followed=followed
            )
    with patch_cache(scan, networks, plan, spec, result, overwrite=overwrite, resume=resume) as patches:
        run = replace(run, job=replace(run.job, **patches))
        if not compute:
            return lazy_result(run)
        if result is None:
            return _in_memory(run, client, started, progress)
        return write_result(run, result, client, started, progress, overwrite=overwrite, resume=resume)


def _network_of(scan: Scan, given: str | Path | MinimalModel | None) -> PatchModel:
    """Model of a run; a flat object for an iterative reconstruction."""
    is_flat = isinstance(given, str | Path) and str(given) == ITERATIVE
    return FlatObject(scan.n_pixels) if is_flat else resolve_model(scan, given)


def _warn_outside_training_range(networks: Mapping[str, PatchModel], stored: StoredScan) -> None:
    for model in networks.values():
        unlike = unlike_training(model, stored)
        if unlike:
            logger.warning(
                "%s: is outside the training range of %s (%s): check the result with care, and polish it "
                "(polish=10, --polish 10) or train on the scan",
                stored.label,
                model.path or f"the {model.kind}",
                "; ".join(unlike),
            )


def _plan_stored(
    store: LocationLike, networks: Mapping[str, PatchModel], spec: ReconstructionSpec, *, several: bool
) -> Run:
    """Plan the run over the present content of a store."""
    stored = open_anew(store)
    return _plan_run(stored, stored.first(), networks, spec, several=several)


def _plan_run(
    stored: StoredScan, scan: Scan, networks: Mapping[str, PatchModel], spec: ReconstructionSpec, *, several: bool
) -> Run:
    """Plan the run over a stored scan."""
    if spec.cache is not None and len(stored.experiments()) > 1:
        raise PtychodaskError(
            f"{stored.label}: a cache of patches has those of all groups, and the scan has several experiments; leave "
            "out cache= (--cache), or ingest each experiment into a store of its own"
        )
    plans = plan_together(stored, networks, spec) if several else {"": plan_for(stored, networks[""], spec)}
    methods = tuple(
        MethodJob(prediction_job(plans[label], network, scan, spec), plans[label].window, plans[label].crop)
        for label, network in networks.items()
    )
    layers = Layers(tuple(networks) if several else (), spec.split_half, spec.keep_stitched)
    job = StitchingJob(methods, layers, position_yx_px=spec.position_yx_px)
    return Run(scan, job, next(iter(plans.values())), spec, _attributes(networks, stored, plans, spec))


def _check_followed(spec: ReconstructionSpec, result: Location | None, store: str) -> Location:
    """Path of a followed scan's result; raises `PtychodaskError` for incompatible options."""
    if result is None or result.local_path is None:
        raise PtychodaskError(
            f"{store}: is still growing, and its predicted chunks are kept on a disk until it is finished; pass out= "
            "(--out) with a path on a disk"
        )
    for name in names_where(ReconstructionSpec, growing=False):
        if getattr(spec, name) not in (None, 0):
            raise PtychodaskError(
                f"{store}: is followed while it grows, and {name} needs a complete scan; remove it, or reconstruct "
                "again when the scan is finished"
            )
    return result


def _check_options(
    spec: ReconstructionSpec, out: LocationLike | None, *, compute: bool, several: bool, resume: bool
) -> None:
    """Raise `PtychodaskError` for options that exclude each other."""
    if resume and out is None:
        raise PtychodaskError("reconstruct: resume=True needs a result on disk; pass out= (--out)")
    if not compute and (spec.on_error == "skip" or spec.verify):
        raise PtychodaskError(
            "reconstruct: compute=False cannot list what is skipped or verified; compute, or remove on_error and verify"
        )
    if spec.cache is not None and spec.on_error == "skip":
        raise PtychodaskError(
            "reconstruct: on_error='skip' would leave a cache of patches with holes; remove cache or on_error"
        )
    if spec.follow and not compute:
        raise PtychodaskError("reconstruct: compute=False has nothing to follow; compute, or remove follow")
    if out is not None and not compute:
        raise PtychodaskError("reconstruct: compute=False writes nothing; remove out=, or compute")
    if spec.pyramid and out is None:
        raise PtychodaskError("reconstruct: pyramid=True needs a result on disk; pass out= (--out)")
    screen_for(spec.live)
    if spec.live not in (None, False) and not compute:
        raise PtychodaskError("reconstruct: compute=False has nothing to show live; compute, or remove live")
    if several and spec.cache is not None:
        raise PtychodaskError("reconstruct: cache needs a single model, and several are given; pass one at a time")
    if (
        spec.cache is not None
        and out is not None
        and parse_location(spec.cache).resolve() == parse_location(out).resolve()
    ):
        raise PtychodaskError(
            f"reconstruct: {out} is the path of both the result and the cache of patches; name two paths"
        )
    if spec.cache is not None and not compute and not parse_location(spec.cache).exists():
        raise PtychodaskError(f"reconstruct: compute=False cannot fill the cache {spec.cache}; compute first")


def _in_memory(run: Run, client: AnyClient | None, started: float, progress: bool | None) -> xr.Dataset:
    plan = run.plan
    _check_in_memory(run)
    arrays: TileArrays = {
        name: np.full(run.job.layers.shape(name, plan.box.shape), variable.fill, variable.dtype)
        for name, variable in run.job.layers.variables.items()
    }

    def copy_tile(tile: Tile, report: TileReport) -> None:
        assert report.arrays is not None
        y, x = run.start_yx(tile)
        height, width = tile.box.shape
        for name, part in report.arrays.items():
            arrays[name][..., y : y + height, x : x + width] = part

    report = stitch_and_refine(
        run, client, RunFolders(), copy_tile, progress=progress, screen=screen_for(run.spec.live)
    )
    of_patterns = report.pop(OF_PATTERNS, {})
    return make_dataset(
        **arrays,
        **of_patterns,
        corner=plan.box.corner,
        pixel_size_m=run.scan.pixel_size_m,
        attributes=run.attributes_of_result(report, started),
        layers=run.job.layers,
    )


def _attributes(
    networks: Mapping[str, PatchModel], stored: StoredScan, plans: Mapping[str, Plan], spec: ReconstructionSpec
) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "numba", "dask", "distributed", "xarray", "zarr")
    first = next(iter(plans.values()))
    made_by = {label: _made_by(network, stored) for label, network in networks.items()}
    summaries = {label: plan.summary() for label, plan in plans.items()}
    return {
        "store": first.store,
        "data_hash": first.data_hash,
        "model": made_by.get("", made_by),
        "spec": {name: _recorded(value) for name, value in values_to_record(spec).items()},
        "plan": summaries.get("", summaries),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _made_by(model: PatchModel, stored: StoredScan) -> dict[str, Any]:
    """Model attributes of a result.

    With `unlike_training` if the scan is outside the training range.
    """
    recorded = {"kind": model.kind, "hash": model.content_hash, "path": model.path and absolute_path(model.path)}
    unlike = unlike_training(model, stored)
    return {**recorded, "unlike_training": unlike} if unlike else recorded


def _recorded(value: Any) -> Any:
    """Value of a spec for JSON; an array by its hash."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return plain(value)


def _check_in_memory(run: Run) -> None:
    plan, layers = run.plan, run.job.layers
    per_pixel = RESULT_PIXEL_BYTES * max(1, len(layers.networks)) * (2 if layers.split_half else 1)
    n_bytes = plan.box.n_pixels * per_pixel
    if n_bytes > plan.memory_bytes:
        raise PtychodaskError(
            f"reconstruct: the object has {plan.box.shape[0]} x {plan.box.shape[1]} px, {n_bytes / MIB:,.0f} MiB, more "
            f"than memory_bytes={plan.memory_bytes}; pass out= to write it to disk, or roi=, or compute=False"
        )
