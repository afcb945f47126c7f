"""`reconstruct`: the tasks of a plan, their run on a Dask client, and the Dataset they give."""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import xarray as xr

from ptychodask.cluster import client_for_run
from ptychodask.folders import LEDGER, is_resumable, whole_or_nothing
from ptychodask.patches import PATCHES, check_patches, create_patches, finish_patches
from ptychodask.plan import (
    MIB,
    RESULT_PIXEL_BYTES,
    Plan,
    ReconstructionSpec,
    Tile,
    plan_for,
    plan_together,
    prediction_job,
)
from ptychodask.prediction import PatchModel, resolve_model, stage
from ptychodask.reconstruction.lazy import lazy_result
from ptychodask.reconstruction.ledger import Ledger, check_same, differences
from ptychodask.reconstruction.polished import Polishing, stitch_on_workers, tiles_from_disk
from ptychodask.reconstruction.running import check_workers
from ptychodask.reconstruction.stitching import Stitching, Told, sent_job, start_yx
from ptychodask.reconstruction.tasks import MethodJob, StitchingJob, TileReport
from ptychodask.result import (
    PYRAMID,
    RESULT,
    Layers,
    TileArrays,
    create_result,
    finish_result,
    make_dataset,
    open_result,
    write_pyramid,
)
from ptychodask.scan import PtychodaskError, Scan, with_fields
from ptychodask.store import ScanReader, open_scan

logger = logging.getLogger(__name__)

__all__ = ["reconstruct"]

SUMS_FOLDER = "sums"
"""Folder beside a result that is being written where sums of chunks wait for their tiles."""

STITCHED_FOLDER = "stitched"
"""Store beside a result that is being written, of the tiles that are still to be polished."""


@dataclass(frozen=True, eq=False)
class _Work:
    """A reconstruction that is ready to run."""

    scan: Scan
    """Its first pattern alone, with all that the store records."""

    job: StitchingJob
    todo: Plan
    spec: ReconstructionSpec
    attributes: dict[str, Any]


def reconstruct(
    store: str | Path,
    model: str | Path | PatchModel | Mapping[str, str | Path | PatchModel] | None = None,
    spec: ReconstructionSpec = ReconstructionSpec(),
    *,
    out: str | Path | None = None,
    client: distributed.Client | None = None,
    overwrite: bool = False,
    resume: bool = False,
    compute: bool = True,
    progress: bool | None = None,
    **spec_fields: Any,
) -> xr.Dataset:
    """Turn a scan into an object: predict its groups chunk by chunk, and reassemble them tile by tile.

    Parameters
    ----------
    store : path
        A store that `ingest` or `simulate` wrote.
    model : path or model, or dict of label to such, optional
        By default the latest `pinn` that the store records, else the latest `baseline`. Several models predict from
        one reading of the patterns, and the result has a dimension ``method``.
    spec : ReconstructionSpec
        How; its group table is by default the stored one with the model's members, else made by the default spec.
    out : path, optional
        Store to write the result into, tile by tile; by default it stays in memory.
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
        See `show_progress`.
    **spec_fields
        Fields of `spec` to replace, by name.

    Returns
    -------
    xarray.Dataset
        ``object``, ``weight``, ``uncertainty`` and ``count`` (y, x), see `make_dataset`; lazy when `out` is given or
        `compute` is False. With ``split_half`` also ``object_half`` and ``weight_half`` (half, y, x); with several
        models each array has ``method`` as its first axis.

    Raises
    ------
    PtychodaskError
        If a field is unknown, no model fits, the plan is refused (see `plan`), a worker has too little memory, a task
        fails, `out` exists, or what is to be gone on with was made by another scan, model, spec or plan.

    Notes
    -----
    The same plan gives the same bits for any number of workers: sums are float64 and merged in the order of chunks.
    With `out` the sums of a chunk wait for their tiles in a file beside it, so that no worker's memory depends on the
    size of the scan.

    A run into `out` that ends early, however it ends, keeps what it finished: the tiles, and the sums of chunks, each
    with its checksum in a ledger. A task that fails is tried once more, on another worker where the first is gone; a
    chunk that ends its workers is set aside until all others are done, and tried alone before it is given up; a task
    that is out far longer than any other is given to a second worker as well. With ``on_error="skip"`` what cannot be
    used is left out as if it were in ``drop``, and the attribute ``skipped`` lists it by the reason.

    The halves take every other pattern as they are stored: the patches of even ones and of odd ones (of a patch per
    group, its seed counts). By default their groups are drawn from one half alone (`GroupingSpec.halves`), so that the
    halves share no pattern; members are then farther apart than in the groups that a network was trained on. With a
    table of other groups each patch rests on both halves, and their correlation says nothing.

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
    started = time.perf_counter()
    spec = with_fields(spec, spec_fields)
    several = isinstance(model, Mapping)
    _check_asked(spec, out, compute=compute, several=several, resume=resume)
    reader = ScanReader(store)
    reader.check()
    scan = reader.first()
    models = model if isinstance(model, Mapping) else {"": model}
    networks = {str(label): resolve_model(scan, one) for label, one in models.items()}
    plans = plan_together(reader, networks, spec) if several else {"": plan_for(reader, networks[""], spec)}
    todo = next(iter(plans.values()))
    result = None if out is None else Path(out)
    with _patch_cache(scan, networks, todo, spec, result, overwrite=overwrite, resume=resume) as patches:
        job = StitchingJob(
            tuple(
                MethodJob(prediction_job(plans[label], network, scan, spec), plans[label].window, plans[label].crop)
                for label, network in networks.items()
            ),
            Layers(tuple(networks) if several else (), spec.split_half),
            position_yx_px=spec.position_yx_px,
            **patches,
        )
        work = _Work(scan, job, todo, spec, _attributes(networks, plans, spec))
        if not compute:
            return lazy_result(job, todo, scan.pixel_size_m, work.attributes)
        if out is None:
            return _in_memory(work, client, started, progress)
        return _on_disk(work, Path(out), client, started, progress, overwrite=overwrite, resume=resume)


def _check_asked(
    spec: ReconstructionSpec, out: str | Path | None, *, compute: bool, several: bool, resume: bool
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
    if out is not None and not compute:
        raise PtychodaskError("reconstruct: compute=False writes nothing; leave out= away, or compute")
    if spec.pyramid and out is None:
        raise PtychodaskError("reconstruct: pyramid=True is for a result on disk; pass out= (--out)")
    if spec.polish and not compute:
        raise PtychodaskError(
            f"reconstruct: compute=False with polish={spec.polish}: each sweep needs the whole object; compute, "
            "or leave polish away"
        )
    if several and (spec.polish or spec.cache is not None):
        raise PtychodaskError(
            "reconstruct: several models with polish or cache, which go with one; reconstruct with one model at a time"
        )
    if spec.cache is not None and out is not None and Path(spec.cache).resolve() == Path(out).resolve():
        raise PtychodaskError(f"reconstruct: {out} is named as the result and as the cache of patches; name two places")
    if spec.cache is not None and not compute and not Path(spec.cache).exists():
        raise PtychodaskError(f"reconstruct: compute=False cannot fill the cache {spec.cache}; compute first")


def _in_memory(work: _Work, client: distributed.Client | None, started: float, progress: bool | None) -> xr.Dataset:
    todo = work.todo
    _check_in_memory(work)
    arrays: TileArrays = {
        name: np.full(work.job.layers.shape(name, todo.box.shape), fill, dtype)
        for name, (dtype, fill, _) in work.job.layers.variables.items()
    }

    def place(tile: Tile, report: TileReport) -> None:
        assert report.arrays is not None
        y, x = start_yx(todo, tile)
        height, width = tile.box.shape
        for name, part in report.arrays.items():
            arrays[name][..., y : y + height, x : x + width] = part

    told = _run(work, client, None, place, show=progress)
    return make_dataset(
        **arrays,
        corner=todo.box.corner,
        pixel_size_m=work.scan.pixel_size_m,
        attributes=work.attributes | _rates(todo, told, started),
        layers=work.job.layers,
    )


def _on_disk(
    work: _Work,
    path: Path,
    client: distributed.Client | None,
    started: float,
    progress: bool | None,
    *,
    overwrite: bool,
    resume: bool,
) -> xr.Dataset:
    if path.resolve() == Path(work.todo.store):
        raise PtychodaskError(f"{path}: is the store of the scan itself; name another place with out=")
    if resume and path.exists() and not is_resumable(path):
        whole = open_result(path)
        if not overwrite:
            check_same(_identity(whole.attrs), _identity(work.attributes), str(path))
        if not differences(_identity(whole.attrs), _identity(work.attributes)):
            logger.info("%s: is whole already", path)
            return whole
    with whole_or_nothing(path, overwrite=overwrite, form=RESULT, resume=resume) as building:
        result = building.resolve()
        ledger = Ledger(result.parent, _identity(work.attributes))
        try:
            told = _into(work, result, ledger, client, progress)
        except PtychodaskError as error:
            if not ledger.exists:
                raise
            raise PtychodaskError(
                f"{error}; what is finished is kept: go on with resume=True (--resume), or start again with "
                "overwrite=True (--overwrite)"
            ) from error
        if work.spec.pyramid:
            with stage(told["seconds"], "pyramid"):
                write_pyramid(result)
        finish_result(result, work.attributes | _rates(work.todo, told, started))
    return open_result(path)


def _into(
    work: _Work, result: Path, ledger: Ledger, client: distributed.Client | None, show: bool | None
) -> dict[str, Any]:
    """Run into a result store that is being written, or go on with it; gives what `_run` gives."""
    places = _Places(result, result.parent / STITCHED_FOLDER if work.spec.polish else result, ledger)
    if ledger.exists:
        ledger.read()
        _check_nothing_skipped(ledger, work.spec)
    else:
        for path in {result, places.stitched}:
            create_result(
                path,
                work.todo.box.shape,
                work.todo.box.corner,
                work.todo.tile,
                pixel_size_m=work.scan.pixel_size_m,
                layers=work.job.layers,
            )
        places.sums.mkdir()
    if work.spec.pyramid:
        shutil.rmtree(result / PYRAMID, ignore_errors=True)
    return _run(work, client, places, lambda tile, report: None, show=show)


def _check_nothing_skipped(ledger: Ledger, spec: ReconstructionSpec) -> None:
    if spec.on_error == "raise" and any(record["skipped"] for record in ledger.chunks.values()):
        raise PtychodaskError(
            "reconstruct: the stopped run left patterns out with on_error='skip', which on_error='raise' does not; "
            "pass on_error='skip' (--on-error skip) to go on with it"
        )


@dataclass(frozen=True)
class _Places:
    """Where a run into a result store puts things."""

    result: Path
    """Store that is being written."""

    stitched: Path
    """Store of the tiles as they are stitched: the result, unless they are polished before they come there."""

    ledger: Ledger

    @property
    def sums(self) -> Path:
        """Folder of the sums of chunks."""
        return self.result.parent / SUMS_FOLDER


def _run(
    work: _Work,
    client: distributed.Client | None,
    places: _Places | None,
    take: Callable[[Tile, TileReport], None],
    *,
    show: bool | None,
) -> dict[str, Any]:
    """Stitch and polish; attributes that tell of it: wall time of each stage, what was left out, R of the sweeps."""
    job, todo, spec = work.job, work.todo, work.spec
    n_chunks, n_tiles = len(todo.chunks), len(todo.tiles)
    logger.info("%s: %d groups in %d chunks onto %d tiles", todo.store, todo.n_groups, n_chunks, n_tiles)
    kept: dict[str, Any] = (
        {} if places is None else {"out": places.stitched, "folder": places.sums, "ledger": places.ledger}
    )
    with client_for_run(client) as used, sent_job(used, job) as sent:
        check_workers(used, max(todo.predict_bytes, todo.reassemble_bytes))
        stitching = Stitching(
            used, job, sent, todo, tolerant=spec.on_error == "skip", n_verified=int(spec.verify), **kept
        )
        if spec.polish and places is None:
            stitched = stitch_on_workers(used, stitching, todo, show)
        else:
            stitching.run((lambda tile, report: None) if spec.polish else take, show)
            stitched = [] if places is None else tiles_from_disk(used, places.stitched, todo)
        told = _told(stitching.told, todo.store)
        if not spec.polish:
            return told
        drop = tuple(sorted({*spec.drop, *(one for patterns in told["skipped"].values() for one in patterns)}))
        polishing = Polishing(used, job.methods[0].prediction, todo, open_scan(todo.store), stitched, drop)
        with stage(told["seconds"], "polish"):
            r_factors = polishing.sweep(int(spec.polish), show)
        polishing.deliver(None if places is None else places.result, take)
    logger.info(
        "%s: R %.4f after stitching and %.4f after %d sweeps", todo.store, r_factors[0], r_factors[-1], spec.polish
    )
    polished = {"sweeps": int(spec.polish), "n_patterns": polishing.n_patterns, "r_factor": r_factors}
    return told | {"polish": polished}


def _told(told: Told, store: str) -> dict[str, Any]:
    """Attributes that tell of a stitching; what was left out is logged too."""
    skipped = told.skipped()
    for reason, patterns in skipped.items():
        logger.warning("%s: left out %d patterns, which %s: %s", store, len(patterns), reason, _some(patterns))
    verified = {
        "chunks": sorted(told.verifications),
        "same_bits": sum(found.same_bits for found in told.verifications.values()),
        "largest_difference": max((found.largest_difference for found in told.verifications.values()), default=0.0),
        "elsewhere": sum(len(set(found.workers)) == 2 for found in told.verifications.values()),
    }
    return {"seconds": told.seconds(), "skipped": skipped} | ({"verified": verified} if told.verifications else {})


def _some(patterns: list[int]) -> str:
    return ", ".join(map(str, patterns[:20])) + (", ..." if len(patterns) > 20 else "")


OF_NO_EFFECT = ("memory_bytes", "on_error", "verify", "device", "pyramid")
"""Fields of a spec that two runs may differ in and give the same tiles."""


def _identity(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the tiles of a run depend on, from its attributes."""
    spec = {name: value for name, value in attributes["spec"].items() if name not in OF_NO_EFFECT}
    return {
        "data_hash": attributes["data_hash"],
        "model": _without_paths(attributes["model"]),
        "spec": spec,
        "plan": attributes["plan"],
    }


def _without_paths(value: Any) -> Any:
    """Descriptions of models, less where they lie."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_paths(item) for name, item in value.items() if name != "path"}


@contextmanager
def _patch_cache(
    scan: Scan,
    networks: Mapping[str, PatchModel],
    todo: Plan,
    spec: ReconstructionSpec,
    result: Path | None,
    *,
    overwrite: bool,
    resume: bool,
) -> Iterator[dict[str, Any]]:
    """Fields of the job that concern the cache of patches; one that is not there yet becomes whole with the block.

    When the block fails, a cache that a run into `result` was filling is kept as long as what that finished.
    """
    if spec.cache is None:
        yield {}
        return
    path, (network,) = Path(spec.cache), networks.values()
    made_by = {
        "data_hash": scan.data_hash,
        "model_hash": network.content_hash,
        "groups": todo.groups,
        "groups_hash": todo.groups_hash,
        "precision": spec.precision,
    }
    if path.exists():
        check_patches(path, made_by)
        yield {"patches": str(path.resolve())}
        return
    if spec.roi is not None or len(spec.drop) or spec.position_yx_px is not None:
        raise PtychodaskError(
            f"{path}: no such cache of patches, and roi, drop and position_yx_px would leave it with holes; fill it "
            "with the whole scan first"
        )
    if resume and result is not None and is_resumable(result) and not is_resumable(path):
        raise PtychodaskError(
            f"{path}: the cache that the stopped run was filling is gone; start again with overwrite=True "
            "(--overwrite), without resume"
        )
    shape = (todo.n_pixels, todo.n_pixels)
    with whole_or_nothing(path, overwrite=overwrite, form=PATCHES, resume=resume) as building:
        marker = building.parent / LEDGER
        if marker.exists():
            check_patches(building, made_by, finished=False)
        else:
            create_patches(
                building,
                (todo.members, *shape) if todo.output == "member" else shape,
                todo.n_groups,
                (todo.groups_per_chunk, todo.batch_size),
                made_by,
            )
        if result is not None:
            marker.touch()
        try:
            yield {"patches": str(building.resolve()), "fill": True}
        except BaseException:
            if result is None or not is_resumable(result):
                marker.unlink(missing_ok=True)
            raise
        finish_patches(building)


def _attributes(
    networks: Mapping[str, PatchModel], plans: Mapping[str, Plan], spec: ReconstructionSpec
) -> dict[str, Any]:
    packages = ("ptychodask", "numpy", "numba", "dask", "distributed", "xarray", "zarr")
    first = next(iter(plans.values()))
    made_by = {
        label: {"kind": one.kind, "hash": one.content_hash, "path": _whole_path(one)} for label, one in networks.items()
    }
    summaries = {label: one.summary() for label, one in plans.items()}
    return {
        "store": first.store,
        "data_hash": first.data_hash,
        "model": made_by.get("", made_by),
        "spec": {each.name: _plain(getattr(spec, each.name)) for each in fields(spec)},
        "plan": summaries.get("", summaries),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _whole_path(model: PatchModel) -> str | None:
    """Where a model lies, from whatever folder it is looked at."""
    return None if model.path is None else str(Path(model.path).resolve())


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


def _rates(todo: Plan, told: dict[str, Any], started: float) -> dict[str, Any]:
    total = time.perf_counter() - started
    return told | {
        "seconds": {"total": total, **told["seconds"]},
        "groups_per_s": todo.n_groups / total,
        "patterns_per_s": todo.n_patterns / total,
    }


def _check_in_memory(work: _Work) -> None:
    todo, layers = work.todo, work.job.layers
    per_pixel = RESULT_PIXEL_BYTES * max(1, len(layers.methods)) * (2 if layers.split_half else 1)
    n_bytes = todo.box.n_pixels * per_pixel
    if n_bytes > todo.memory_bytes:
        raise PtychodaskError(
            f"reconstruct: the object has {todo.box.shape[0]} x {todo.box.shape[1]} px, {n_bytes / MIB:,.0f} MiB, more "
            f"than memory_bytes={todo.memory_bytes}; pass out= to write it to disk, or roi=, or compute=False"
        )
