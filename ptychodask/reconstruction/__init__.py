"""`reconstruct`: the tasks of a plan, their run on a Dask client, and the Dataset they give."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import distributed
import numpy as np
import xarray as xr

from ptychodask.cluster import client_for_run
from ptychodask.places import Location, S3Location, is_resumable, parse_location
from ptychodask.plan import (
    MIB,
    NOT_STORED,
    RESULT_PIXEL_BYTES,
    Plan,
    ReconstructionSpec,
    Tile,
    in_pixels,
    plan_for,
    plan_together,
    prediction_job,
)
from ptychodask.prediction import PatchModel, absolute_path, resolve_model, unlike_training
from ptychodask.reconstruction.caching import patch_cache
from ptychodask.reconstruction.following import Following, first_work
from ptychodask.reconstruction.lazy import lazy_result
from ptychodask.reconstruction.live import screen_for
from ptychodask.reconstruction.many import FailedScansError, reconstruct_each
from ptychodask.reconstruction.stitching import start_yx
from ptychodask.reconstruction.tasks import MethodJob, StitchingJob, TileReport
from ptychodask.reconstruction.work import Work, rates, run_work
from ptychodask.reconstruction.written import write_result
from ptychodask.result import (
    Layers,
    TileArrays,
    make_dataset,
)
from ptychodask.scan import PtychodaskError, Scan, with_fields
from ptychodask.store import ScanReader

__all__ = ["FailedScansError", "reconstruct"]

logger = logging.getLogger(__name__)

Models = str | Path | PatchModel | Mapping[str, str | Path | PatchModel] | None
"""A model, or several by their labels; None is what the store records, else the packaged one that fits."""


@overload
def reconstruct(
    store: str | Path | S3Location, model: Models = None, spec: ReconstructionSpec = ..., **options: Any
) -> xr.Dataset: ...
@overload
def reconstruct(
    store: list[Any] | tuple[Any, ...], model: Models = None, spec: ReconstructionSpec = ..., **options: Any
) -> dict[str, xr.Dataset]: ...
def reconstruct(
    store: str | Path | S3Location | Sequence[str | Path | S3Location],
    model: Models = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    out: str | Path | S3Location | None = None,
    client: distributed.Client | None = None,
    overwrite: bool = False,
    resume: bool = False,
    compute: bool = True,
    progress: bool | None = None,
    **spec_fields: Any,
) -> xr.Dataset | dict[str, xr.Dataset]:
    """Turn a scan into an object: predict its groups chunk by chunk, and reassemble them tile by tile.

    Parameters
    ----------
    store : path, or list of paths
        A store that `ingest` or `simulate` wrote, on a disk or in a bucket (``s3://bucket/scan.zarr``). Several are
        reconstructed one after the other, on one client.
    model : path or model, or dict of label to such, optional
        By default the latest `pinn` that the store records, else the latest `baseline`, else the packaged model for
        patterns of N pixels (``pretrained:<name>``). Several models predict from one reading of the patterns, and the
        result has a dimension ``method``. A scan outside of what a model was trained on is warned of.
    spec : ReconstructionSpec
        How; its group table is by default the stored one with the model's members, else made by the default spec.
    out : path, optional
        Store to write the result into, tile by tile, on a disk or in a bucket; by default it stays in memory. For
        several scans a folder, which gets a ``<name>.object.zarr`` for each.
    client : distributed.Client, optional
        Where to run; by default the active client, else one in this process.
    overwrite : bool
        Replace what is at `out`, and what a stopped run left of it.
    resume : bool
        Go on with what a stopped run left of `out`: finished tiles and chunks are not computed again. The result of
        the same run that is whole already is opened.
    compute : bool
        False gives a lazy Dataset: a region of it predicts only the chunks that meet the tiles it touches.
    progress : bool, optional
        See `progress_bar`.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    xarray.Dataset
        ``object``, ``weight``, ``uncertainty`` and ``count`` (y, x), see `make_dataset`; lazy when `out` is given or
        `compute` is False. With ``split_half`` also ``object_half`` and ``weight_half`` (half, y, x); with several
        models each array has ``method`` as its first axis. For several scans a dict of these by the names of the
        stores, less ``.zarr``.

    Raises
    ------
    PtychodaskError
        If a field is unknown, no model fits, the plan is refused (see `plan`), a worker has too little memory, a task
        fails, `out` exists, or what is to be gone on with was made by another scan, model, spec or plan.
    FailedScansError
        If some of several scans failed, once all others are done; its attribute ``results`` has those.

    Notes
    -----
    The same plan gives the same bits for any number of workers: sums are float64 and merged in the order of chunks.
    With `out` the sums of a chunk wait for their tiles in a file beside it, or in an object of the same bucket, so that
    no worker's memory depends on the size of the scan.

    A run into `out` that ends early, however it ends, keeps what it finished: the tiles, and the sums of chunks, each
    with its checksum in a ledger. A task that fails is tried once more, on another worker where the first is gone; a
    chunk that ends its workers is set aside until all others are done, and tried alone before it is given up; a task
    that is out far longer than any other is given to a second worker as well. With ``on_error="skip"`` what cannot be
    used is left out as if it were in ``drop``, and the attribute ``skipped`` lists it by the reason.

    The halves take every other pattern as they are stored: the patches of even ones and of odd ones (of a patch per
    group, its seed counts). By default their groups are drawn from one half alone (`GroupingSpec.halves`), so that the
    halves share no pattern; members are then farther apart than in the groups that a network was trained on. With a
    table of other groups each patch rests on both halves, and their correlation says nothing.

    A live picture is made of what finished tiles hand over with their reports: means over cells of some pixels, never
    more than 512 cells across. It is shown at most twice a second, by the thread that waits for the run. What its
    function raises ends in a warning, and the run goes on.

    A scan that grows (see `ingest`) is reconstructed as it is now, or followed: with ``follow=True`` its store is
    looked at once a second, the chunks of each new segment are predicted, and the object is stitched when the scan is
    finished. Chunks never lie in two segments and their sizes follow from the first, so the result is, to the bit, that
    of the finished scan. A run that hears of no segment for ``follow_timeout_s`` ends, and ``follow=True`` with
    ``resume=True`` goes on with it.

    A cache holds the patches as float16, 11 bits of each number.

    Polishing fits the stitched object to the amplitudes of the patterns, with the store's probe: it lowers
    Σ(√I_pred − √I)² + Σ hold |object − stitched|², where the hold keeps pixels that met less light than the brightest
    of one exposure near the network's answer. All patterns are projected at once in each sweep (their shares are
    summed), and the step follows the summed change and the step before (`StepProducts.mix`), so the result depends on
    chunks no more than the stitching does. A task reads the part of the object that its patterns meet. Between sweeps
    the object's tiles, 68 bytes a pixel in all, are spread over the workers. Pixels that no patch reached stay NaN;
    ``weight``, ``uncertainty`` and ``count`` stay those of the network's patches. The attribute ``polish`` records R of
    the patterns that were not dropped before the first sweep and after each.
    """
    spec = with_fields(spec, spec_fields)
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "resume": resume,
        "compute": compute,
        "progress": progress,
    }
    if isinstance(store, str | Path | S3Location):
        return _reconstruct_one(store, model, spec, out=out, client=client, **options)
    with client_for_run(client) if compute else nullcontext(client) as used:
        return reconstruct_each(
            store,
            None if out is None else parse_location(out),
            spec,
            lambda one, path: _reconstruct_one(one, model, spec, out=path, client=used, **options),
        )


def _reconstruct_one(
    store: str | Path | S3Location,
    model: Models,
    spec: ReconstructionSpec,
    *,
    out: str | Path | S3Location | None,
    client: distributed.Client | None,
    overwrite: bool,
    resume: bool,
    compute: bool,
    progress: bool | None,
) -> xr.Dataset:
    """`reconstruct` for one scan."""
    started = time.perf_counter()
    several = isinstance(model, Mapping)
    _check_asked(spec, out, compute=compute, several=several, resume=resume)
    reader = ScanReader(store)
    reader.check()
    scan = reader.first()
    spec = in_pixels(spec, scan.pixel_size_m, str(store))
    models = model if isinstance(model, Mapping) else {"": model}
    networks = {str(label): resolve_model(scan, one) for label, one in models.items()}
    _warn_of_other_scans(networks, reader)
    result = None if out is None else parse_location(out)
    plan_now = partial(_planned_now, store, networks, spec, several=several)
    if spec.follow:
        work = first_work(plan_now, str(store), spec.follow_timeout_s)
    else:
        work = _planned(reader, scan, networks, spec, several=several)
    scan, plan = work.scan, work.plan
    grows = scan.attributes["state"] == "growing"
    goes_on = resume and "segments" in scan.attributes and result is not None and is_resumable(result)
    if spec.follow and (grows or goes_on):
        where = _check_followed(spec, result, plan.store)
        with client_for_run(client) as used:
            following = Following(plan_now, used, progress)
            return write_result(
                work, where, used, started, progress, overwrite=overwrite, resume=resume, following=following
            )
    with patch_cache(scan, networks, plan, spec, result, overwrite=overwrite, resume=resume) as patches:
        work = replace(work, job=replace(work.job, **patches))
        if not compute:
            return lazy_result(work.job, plan, scan.pixel_size_m, work.attributes)
        if result is None:
            return _in_memory(work, client, started, progress)
        return write_result(work, result, client, started, progress, overwrite=overwrite, resume=resume)


def _warn_of_other_scans(networks: Mapping[str, PatchModel], reader: ScanReader) -> None:
    for model in networks.values():
        unlike = unlike_training(model, reader)
        if unlike:
            logger.warning(
                "%s: lies outside of what %s was trained on (%s): look at the result with care, and polish it "
                "(polish=10, --polish 10) or train on the scan",
                reader.label,
                model.path or f"the {model.kind}",
                "; ".join(unlike),
            )


def _planned_now(
    store: str | Path | S3Location, networks: Mapping[str, PatchModel], spec: ReconstructionSpec, *, several: bool
) -> Work:
    """The work on what a store holds now."""
    reader = ScanReader(store)
    reader.check()
    return _planned(reader, reader.first(), networks, spec, several=several)


def _planned(
    reader: ScanReader, scan: Scan, networks: Mapping[str, PatchModel], spec: ReconstructionSpec, *, several: bool
) -> Work:
    """The work on what a reader sees."""
    plans = plan_together(reader, networks, spec) if several else {"": plan_for(reader, networks[""], spec)}
    methods = tuple(
        MethodJob(prediction_job(plans[label], network, scan, spec), plans[label].window, plans[label].crop)
        for label, network in networks.items()
    )
    layers = Layers(tuple(networks) if several else (), spec.split_half)
    job = StitchingJob(methods, layers, position_yx_px=spec.position_yx_px)
    return Work(scan, job, next(iter(plans.values())), spec, _attributes(networks, reader, plans, spec))


def _check_followed(spec: ReconstructionSpec, result: Location | None, store: str) -> Path:
    """Where the result goes; raises `PtychodaskError` for wishes that a scan which grows cannot be followed with."""
    if not isinstance(result, Path):
        raise PtychodaskError(
            f"{store}: still grows, and what is predicted of it waits on a disk for its end; pass out= (--out) on one"
        )
    for name in ("cache", "verify", "position_yx_px"):
        if getattr(spec, name) not in (None, 0):
            raise PtychodaskError(
                f"{store}: is followed while it grows, and {name} is for a whole scan; leave it away, or reconstruct "
                "once more when the scan is finished"
            )
    return result


def _check_asked(
    spec: ReconstructionSpec, out: str | Path | S3Location | None, *, compute: bool, several: bool, resume: bool
) -> None:
    """Raise `PtychodaskError` for wishes that exclude each other."""
    if resume and out is None:
        raise PtychodaskError("reconstruct: resume=True goes on with a result on disk; pass out= (--out)")
    if not compute and (spec.on_error == "skip" or spec.verify):
        raise PtychodaskError(
            "reconstruct: compute=False cannot list what is skipped or verified; compute, or leave on_error and verify "
            "away"
        )
    if spec.cache is not None and spec.on_error == "skip":
        raise PtychodaskError(
            "reconstruct: on_error='skip' would leave a cache of patches with holes; leave cache or on_error away"
        )
    if spec.follow and not compute:
        raise PtychodaskError("reconstruct: compute=False has nothing to follow; compute, or leave follow away")
    if out is not None and not compute:
        raise PtychodaskError("reconstruct: compute=False writes nothing; leave out= away, or compute")
    if spec.pyramid and out is None:
        raise PtychodaskError("reconstruct: pyramid=True is for a result on disk; pass out= (--out)")
    screen_for(spec.live)
    if spec.live not in (None, False) and not compute:
        raise PtychodaskError("reconstruct: compute=False has nothing to show live; compute, or leave live away")
    if spec.polish and not compute:
        raise PtychodaskError(
            f"reconstruct: compute=False with polish={spec.polish}: each sweep needs the whole object; compute, "
            "or leave polish away"
        )
    if several and (spec.polish or spec.cache is not None):
        raise PtychodaskError(
            "reconstruct: several models with polish or cache, which go with one; reconstruct with one model at a time"
        )
    if (
        spec.cache is not None
        and out is not None
        and parse_location(spec.cache).resolve() == parse_location(out).resolve()
    ):
        raise PtychodaskError(f"reconstruct: {out} is named as the result and as the cache of patches; name two places")
    if spec.cache is not None and not compute and not parse_location(spec.cache).exists():
        raise PtychodaskError(f"reconstruct: compute=False cannot fill the cache {spec.cache}; compute first")


def _in_memory(work: Work, client: distributed.Client | None, started: float, progress: bool | None) -> xr.Dataset:
    plan = work.plan
    _check_in_memory(work)
    arrays: TileArrays = {
        name: np.full(work.job.layers.shape(name, plan.box.shape), fill, dtype)
        for name, (dtype, fill, _) in work.job.layers.variables.items()
    }

    def place(tile: Tile, report: TileReport) -> None:
        assert report.arrays is not None
        y, x = start_yx(plan, tile)
        height, width = tile.box.shape
        for name, part in report.arrays.items():
            arrays[name][..., y : y + height, x : x + width] = part

    told = run_work(work, client, None, place, progress=progress, screen=screen_for(work.spec.live))
    return make_dataset(
        **arrays,
        corner=plan.box.corner,
        pixel_size_m=work.scan.pixel_size_m,
        attributes=work.attributes | rates(plan, told, started),
        layers=work.job.layers,
    )


def _attributes(
    networks: Mapping[str, PatchModel], reader: ScanReader, plans: Mapping[str, Plan], spec: ReconstructionSpec
) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "numba", "dask", "distributed", "xarray", "zarr")
    first = next(iter(plans.values()))
    made_by = {label: _made_by(one, reader) for label, one in networks.items()}
    summaries = {label: one.summary() for label, one in plans.items()}
    return {
        "store": first.store,
        "data_hash": first.data_hash,
        "model": made_by.get("", made_by),
        "spec": {each.name: _plain(getattr(spec, each.name)) for each in fields(spec) if each.name not in NOT_STORED},
        "plan": summaries.get("", summaries),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _made_by(model: PatchModel, reader: ScanReader) -> dict[str, Any]:
    """What a result records of its model; in what the scan lies outside of its training only where it does."""
    found = {"kind": model.kind, "hash": model.content_hash, "path": model.path and absolute_path(model.path)}
    unlike = unlike_training(model, reader)
    return {**found, "unlike_training": unlike} if unlike else found


def _plain(value: Any) -> Any:
    """A spec's values as JSON has them; of an array its hash."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Path):
        return str(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _check_in_memory(work: Work) -> None:
    plan, layers = work.plan, work.job.layers
    per_pixel = RESULT_PIXEL_BYTES * max(1, len(layers.methods)) * (2 if layers.split_half else 1)
    n_bytes = plan.box.n_pixels * per_pixel
    if n_bytes > plan.memory_bytes:
        raise PtychodaskError(
            f"reconstruct: the object has {plan.box.shape[0]} x {plan.box.shape[1]} px, {n_bytes / MIB:,.0f} MiB, more "
            f"than memory_bytes={plan.memory_bytes}; pass out= to write it to disk, or roi=, or compute=False"
        )
