"""Cache of patches of a run, read or filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.models.contract import PatchModel
from ptychodask.patches import PATCHES, check_patches, create_patches, finish_patches
from ptychodask.plan import Plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.scan import Scan
from ptychodask.storage.atomic import LEDGER, atomic_folder, is_resumable
from ptychodask.storage.location import Location, on_disk


@contextmanager
def patch_cache(
    scan: Scan,
    networks: Mapping[str, PatchModel],
    plan: Plan,
    spec: ReconstructionSpec,
    result: Location | None,
    *,
    overwrite: bool,
    resume: bool,
) -> Iterator[dict[str, Any]]:
    """Context with the cache of patches of a run.

    A cache that does not exist yet is complete when the block ends.

    Parameters
    ----------
    scan, networks, plan, spec
        Those of the run; one network.
    result : Location or None
        Result that the run writes. If the block fails, a partly filled cache is kept only if the result can be resumed.
    overwrite, resume : bool
        Replace, or complete, a cache that a stopped run left.

    Yields
    ------
    dict
        Fields of `StitchingJob` that concern the cache.

    Raises
    ------
    PtychodaskError
        If the cache is of another scan, model or group table, or would be left with holes.
    """
    if spec.cache is None:
        yield {}
        return
    path, (network,) = on_disk(spec.cache, "a cache of patches"), networks.values()
    made_by = {
        "data_hash": scan.data_hash,
        "model_hash": network.content_hash,
        "groups": plan.groups,
        "groups_hash": plan.groups_hash,
        "precision": spec.precision,
    }
    if path.exists():
        check_patches(path, made_by)
        yield {"patches": str(path.resolve())}
        return
    if spec.roi is not None or len(spec.drop) or spec.position_yx_px is not None:
        raise PtychodaskError(
            f"{path}: no such cache of patches, and roi, drop and position_yx_px would leave it with holes; fill it "
            "with the complete scan first"
        )
    if resume and result is not None and is_resumable(result) and not is_resumable(path):
        raise PtychodaskError(
            f"{path}: the cache that the stopped run was filling is gone; start again with overwrite=True "
            "(--overwrite), without resume"
        )
    shape = (plan.n_pixels, plan.n_pixels)
    with atomic_folder(path, overwrite=overwrite, kind=PATCHES, resume=resume) as building:
        # The name of a ledger makes `atomic_folder` keep an unfinished cache, for the run that is resumed.
        marker = building.parent / LEDGER
        if marker.exists():
            check_patches(building, made_by, finished=False)
        else:
            create_patches(
                building,
                (plan.members, *shape) if plan.output == "member" else shape,
                plan.n_groups,
                (plan.groups_per_chunk, plan.batch_size, *(chunk.start for chunk in plan.chunks)),
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
