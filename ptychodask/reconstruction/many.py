"""Several scans as one job: the same client, one result after the other, and what failed told in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import xarray as xr

from ptychodask.places import Location, S3Location, parse_location
from ptychodask.plan import ReconstructionSpec
from ptychodask.scan import PtychodaskError, in_brief

logger = logging.getLogger(__name__)

OF_ONE_SCAN = ("cache", "position_yx_px", "drop")
"""Fields of a spec that speak of one scan's patterns."""


class FailedScansError(PtychodaskError):
    """Some of several scans could not be reconstructed.

    Parameters
    ----------
    errors : dict of name to exception
    results : dict of name to Dataset
    kept_in : Path, S3Location or None
    """

    def __init__(self, errors: dict[str, Exception], results: dict[str, xr.Dataset], kept_in: Location | None) -> None:
        told = "; ".join(f"{name}: {in_brief(error)}" for name, error in errors.items())
        kept = "" if not results else f" (kept: {', '.join(results)}" + (f" in {kept_in})" if kept_in else ")")
        super().__init__(f"reconstruct: {len(errors)} of {len(errors) + len(results)} scans failed{kept}: {told}")
        self.errors = errors
        """What each of them raised."""
        self.results = results
        """Results of the others."""

    def __reduce__(self) -> tuple[type[FailedScansError], tuple[dict[str, Exception], dict[str, xr.Dataset], None]]:
        return type(self), (self.errors, self.results, None)


def reconstruct_each(
    stores: Sequence[str | Path | S3Location],
    out: Location | None,
    spec: ReconstructionSpec,
    run: Callable[[str | Path | S3Location, Location | None], xr.Dataset],
) -> dict[str, xr.Dataset]:
    """Run one scan after the other.

    Parameters
    ----------
    stores : sequence of path
    out : Path or S3Location, optional
        Folder for the results, made where it is not there.
    spec : ReconstructionSpec
    run : callable
        Reconstructs a store into a path, or in memory where that is None.

    Returns
    -------
    dict of name to xarray.Dataset
        By the names of the stores, less ``.zarr``, in their order.

    Raises
    ------
    PtychodaskError
        If there is no scan, two have one name, a field of `spec` speaks of one scan, or `out` is no folder.
    FailedScansError
        In the end, if some scans failed; it has the results of the others.
    """
    names = scan_names(stores)
    for field in OF_ONE_SCAN:
        if getattr(spec, field) not in (None, ()):
            raise PtychodaskError(f"reconstruct: {field} speaks of one scan, and {len(names)} are given; leave it away")
    if out is not None:
        _make_folder(out)
    results: dict[str, xr.Dataset] = {}
    errors: dict[str, Exception] = {}
    for name, store in zip(names, stores, strict=True):
        try:
            results[name] = run(store, None if out is None else result_path(out, name))
        except (PtychodaskError, OSError) as error:
            logger.info("%s failed: %s", store, in_brief(error))
            errors[name] = error
    if errors:
        raise FailedScansError(errors, results, out)
    return results


def scan_names(stores: Sequence[str | Path | S3Location]) -> list[str]:
    """Names of scans, which tell their results apart; raises `PtychodaskError` where they do not.

    Examples
    --------
    >>> scan_names(["today/a.zarr", "today/b.zarr"])
    ['a', 'b']
    """
    names = [parse_location(store).name.removesuffix(".zarr") for store in stores]
    if not names:
        raise PtychodaskError("reconstruct: no scan is given, expected the path of a store, or several")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PtychodaskError(
            f"reconstruct: several scans are called {', '.join(twice)}, and results take the names of their scans; "
            "rename stores, or reconstruct them one by one"
        )
    return names


def result_path(folder: Location, name: str) -> Location:
    """Where the result of one of several scans lies."""
    return folder / f"{name}.object.zarr"


def _make_folder(out: Location) -> None:
    if isinstance(out, S3Location):
        return  # a bucket has no folders
    if out.is_file() or (out / "zarr.json").exists():
        raise PtychodaskError(f"{out}: is a file or a store, and results of several scans go into a folder; name one")
    if not out.parent.is_dir():
        raise PtychodaskError(f"{out}: its folder {out.parent} does not exist; make it first")
    out.mkdir(exist_ok=True)
