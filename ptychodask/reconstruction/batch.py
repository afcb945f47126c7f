"""Reconstruction of several scans, one after the other on one client."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import xarray as xr

from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.options import names_where
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.storage.location import Location, LocationLike, parse_location

logger = logging.getLogger(__name__)


class FailedScansError(PtychodaskError):
    """Some of several scans could not be reconstructed.

    Parameters
    ----------
    errors : dict of name to exception
    results : dict of name to Dataset
    kept_in : Location or None
        Folder of the results.
    """

    def __init__(self, errors: dict[str, Exception], results: dict[str, xr.Dataset], kept_in: Location | None) -> None:
        failures = "; ".join(f"{name}: {in_brief(error)}" for name, error in errors.items())
        kept = "" if not results else f" (kept: {', '.join(results)}" + (f" in {kept_in})" if kept_in else ")")
        super().__init__(f"reconstruct: {len(errors)} of {len(errors) + len(results)} scans failed{kept}: {failures}")
        self.errors = errors
        """Error of each failed scan."""
        self.results = results
        """Results of the other scans."""

    def __reduce__(self) -> tuple[type[FailedScansError], tuple[dict[str, Exception], dict[str, xr.Dataset], None]]:
        return type(self), (self.errors, self.results, None)


def reconstruct_each(
    stores: Sequence[LocationLike],
    out: Location | None,
    spec: ReconstructionSpec,
    reconstruct_one: Callable[[LocationLike, Location | None], xr.Dataset],
) -> dict[str, xr.Dataset]:
    """Reconstruct one scan after the other.

    Parameters
    ----------
    stores : sequence of path
    out : Location, optional
        Folder for the results, created if missing.
    spec : ReconstructionSpec
    reconstruct_one : callable
        Reconstructs a store into a path, or in memory if that is None.

    Returns
    -------
    dict of name to xarray.Dataset
        By the names of the stores, less ``.zarr``, in their order.

    Raises
    ------
    PtychodaskError
        If there is no scan, two have the same name, a field of `spec` refers to one scan, or `out` is no folder.
    FailedScansError
        After all scans, if some failed; it has the results of the others.
    """
    names = scan_names(stores)
    for field in names_where(ReconstructionSpec, one_scan=True):
        if getattr(spec, field) not in (None, ()):
            raise PtychodaskError(f"reconstruct: {field} refers to one scan, and {len(names)} are given; remove it")
    if out is not None:
        _make_folder(out)
    results: dict[str, xr.Dataset] = {}
    errors: dict[str, Exception] = {}
    for name, store in zip(names, stores, strict=True):
        try:
            results[name] = reconstruct_one(store, None if out is None else result_path(out, name))
        except (PtychodaskError, OSError) as error:
            logger.info("%s failed: %s", store, in_brief(error))
            errors[name] = error
    if errors:
        raise FailedScansError(errors, results, out)
    return results


def scan_names(stores: Sequence[LocationLike]) -> list[str]:
    """Names of scans, from their stores; raises `PtychodaskError` if two agree.

    Examples
    --------
    >>> scan_names(["today/a.zarr", "today/b.zarr"])
    ['a', 'b']
    """
    names = [parse_location(store).name.removesuffix(".zarr") for store in stores]
    if not names:
        raise PtychodaskError("reconstruct: no scan is given, expected the paths of one or more stores")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PtychodaskError(
            f"reconstruct: several scans are called {', '.join(twice)}, and results are named after their scans; "
            "rename stores, or reconstruct them one by one"
        )
    return names


def result_path(folder: Location, name: str) -> Location:
    """Path of the result of one of several scans."""
    return folder / f"{name}.object.zarr"


def _make_folder(out: Location) -> None:
    if (out.exists() and not out.is_dir()) or (out / "zarr.json").exists():
        raise PtychodaskError(f"{out}: is a file or a store, and results of several scans need a folder; name one")
    out.make_folder()
