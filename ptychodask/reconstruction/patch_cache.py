"""Cache of patches, from which an object is stitched again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from ptychodask.errors import PtychodaskError
from ptychodask.models.contract import PatchModel
from ptychodask.plan import Plan
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.scan import Scan
from ptychodask.storage.atomic import LEDGER, StoreKind, atomic_folder
from ptychodask.storage.location import Location, on_disk, parse_location
from ptychodask.storage.records import differences
from ptychodask.storage.zarr_checks import check_codecs, damage_errors, open_root


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
        _check_positions(path, scan)
        check_patches(path, made_by)
        yield {"patches": str(path.resolve())}
        return
    if spec.roi is not None or len(spec.drop) or spec.position_yx_px is not None:
        raise PtychodaskError(
            f"{path}: no such cache of patches, and roi, drop and position_yx_px would leave it with holes; fill it "
            "with the complete scan first"
        )
    if resume and result is not None and result.is_resumable() and not path.is_resumable():
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
            if result is None or not result.is_resumable():
                marker.unlink(missing_ok=True)
            raise
        finish_patches(building)


FILL_AGAIN = "remove the cache and fill it again"
"""Remedy for a damaged cache."""


PATCHES = StoreKind("ptychodask-patches", 1, "cache of patches", "reconstruct")


def create_patches(
    path: Path, patch_shape: tuple[int, ...], n_groups: int, rows: tuple[int, ...], made_by: dict[str, Any]
) -> None:
    """Create an empty cache of patches, unfinished until `finish_patches`.

    Parameters
    ----------
    path : Path
        Existing, empty folder (see `atomic_folder`).
    patch_shape : ints
        Shape of the network's output for one group: (C, N, N) or (N, N).
    n_groups : int
        Rows of the group table.
    rows : ints
        Groups in a task and in a batch, and first rows of tasks: writes of different batches never share a file.
    made_by : dict
        All that the patches depend on; plain values for JSON.
    """
    root = zarr.create_group(path, zarr_format=3)
    root.attrs.update({"format": PATCHES.name, "format_version": PATCHES.version, "state": "writing", **made_by})
    root.create_array(
        "patches",
        shape=(n_groups, *patch_shape, 2),
        chunks=(min(math.gcd(*rows), n_groups), *patch_shape, 2),
        dtype=np.float16,
        # Noise-like float16 hardly compresses; a checksum reveals damage.
        compressors=Crc32cCodec(),
        dimension_names=("group", *(("channel",) if len(patch_shape) == 3 else ()), "py", "px", "part"),
    )


def finish_patches(path: Path) -> None:
    """Mark a cache as complete."""
    zarr.open_group(path, mode="r+", zarr_format=3).attrs["state"] = "complete"


def check_patches(path: Path, made_by: dict[str, Any], *, finished: bool = True) -> None:
    """Raise `PtychodaskError` unless a cache is of the same data and model."""
    root = open_root(parse_location(path), PATCHES) if finished else zarr.open_group(path, mode="r", zarr_format=3)
    attributes = dict(root.attrs)
    if changed := differences({name: attributes.get(name) for name in made_by}, made_by):
        raise PtychodaskError(
            f"{path}: contains patches of another run: {'; '.join(changed)}; name another cache=, or repeat the "
            "arguments of that run"
        )


def _check_positions(path: Path, scan: Scan) -> None:
    """Raise `PtychodaskError` for a cache of earlier positions."""
    made_from = open_root(parse_location(path), PATCHES).attrs.get("data_hash")
    if made_from in scan.attributes.get("earlier_data_hashes", ()):
        raise PtychodaskError(
            f"{path}: contains patches of the positions that {scan.store} had before refined ones were applied; name "
            "another cache=, or leave it out"
        )


class StoredPatches:
    """Patches in a cache, by rows of the group table.

    Parameters
    ----------
    path : Path
        Cache made by `create_patches`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with damage_errors(path, "cannot be opened", FILL_AGAIN):
            array = zarr.open_group(path, mode="r+", zarr_format=3)["patches"]
            assert isinstance(array, zarr.Array)
            check_codecs(array, path, FILL_AGAIN)
        self._array = array

    def write(self, start: int, patches: NDArray[np.complex64]) -> int:
        """Write patches of consecutive groups from row `start`.

        Parameters
        ----------
        start : int
        patches : complex64 array (n, N, N)

        Returns
        -------
        int
            The row after the last.

        Raises
        ------
        PtychodaskError
            If a value is too large for float16.
        """
        shape = self._array.shape[1:]
        values = np.ascontiguousarray(patches).view(np.float32).reshape(-1, *shape)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise PtychodaskError(
                f"{self._path}: a patch has the modulus {np.abs(patches).max():.3g}, too large for float16; "
                "reconstruct without cache="
            )
        stop = start + len(values)
        self._array[start:stop] = halves
        return stop

    def read(self, start: int, stop: int) -> NDArray[np.complex64]:
        """Patches of the groups in rows `start` to `stop`.

        Returns
        -------
        complex64 array (group, C, N, N) or (group, N, N)

        Raises
        ------
        PtychodaskError
            If they cannot be read, or their files are missing.
        """
        with damage_errors(self._path, f"patches of groups {start}..{stop - 1} cannot be read", FILL_AGAIN):
            halves = np.asarray(self._array[start:stop])
            # Damaged metadata may give another type or shape than the float16 pairs that were written.
            assert halves.dtype == np.float16 and halves.ndim in (4, 5) and halves.shape[-1] == 2  # noqa: PT018
        # Zarr reads a missing file as zeros; no network predicts zeros in the complete middle row of a patch.
        middle = halves[..., halves.shape[-3] // 2, :, :]
        if not middle.any(axis=tuple(range(1, middle.ndim))).all():
            raise PtychodaskError(
                f"{self._path}: patches of some of groups {start}..{stop - 1} are missing; {FILL_AGAIN}"
            )
        values = halves.astype(np.float32)
        return values.view(np.complex64)[..., 0]
