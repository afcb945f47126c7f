"""Reconstruction of several scans or experiments, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xarray as xr

from ptychodask.errors import PtychodaskError, in_brief
from ptychodask.options import names_where
from ptychodask.plan.spec import ReconstructionSpec
from ptychodask.result import experiment_name
from ptychodask.storage.location import Location, LocationLike, parse_location

logger = logging.getLogger(__name__)


class FailedScansError(PtychodaskError):
    """Some of several scans or experiments could not be reconstructed.

    Parameters
    ----------
    errors : dict of name to exception
    results : dict of name to Dataset
    kept_in : Location or None
        Folder of the results.
    noun : str
        "scans" or "experiments".
    """

    def __init__(
        self,
        errors: dict[str, Exception],
        results: dict[str, xr.Dataset],
        kept_in: Location | None,
        noun: str = "scans",
    ) -> None:
        failures = "; ".join(f"{name}: {in_brief(error)}" for name, error in errors.items())
        kept = "" if not results else f" (kept: {', '.join(results)}" + (f" in {kept_in})" if kept_in else ")")
        super().__init__(f"reconstruct: {len(errors)} of {len(errors) + len(results)} {noun} failed{kept}: {failures}")
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
    reconstruct_one: Callable[[LocationLike, Location | None], xr.Dataset | dict[str, xr.Dataset]],
) -> dict[str, xr.Dataset]:
    """Reconstruct one scan after the other.

    Parameters
    ----------
    stores : sequence of path
    out : Location, optional
        Folder for the results, created if missing.
    spec : ReconstructionSpec
    reconstruct_one : callable
        Reconstructs a store into a path, or in memory if that is None; a dict for several experiments.

    Returns
    -------
    dict of name to xarray.Dataset
        By the names of the stores, less ``.zarr``, in their order; ``<name>/experiment-K`` for experiments.

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
        make_folder(out, "scans")
    paths = {name: None if out is None else result_path(out, name) for name in names}
    return _each(dict(zip(names, stores, strict=True)), paths, out, reconstruct_one)


def reconstruct_experiments(
    experiments: Sequence[int],
    folder: Location,
    reconstruct_one: Callable[[int, Location], xr.Dataset],
) -> dict[str, xr.Dataset]:
    """Reconstruct one experiment of a scan after the other.

    Parameters
    ----------
    experiments : sequence of int
    folder : Location
        Existing folder for the results.
    reconstruct_one : callable
        Reconstructs an experiment into a path.

    Returns
    -------
    dict of name to xarray.Dataset
        By names ``experiment-K``, in the given order.

    Raises
    ------
    FailedScansError
        After all experiments, if some failed; it has the results of the others.
    """
    named = {experiment_name(number): number for number in experiments}
    return _each(named, {name: folder / f"{name}.zarr" for name in named}, folder, reconstruct_one, "experiments")


def _each(
    inputs: Mapping[str, Any],
    paths: Mapping[str, Any],
    folder: Location | None,
    reconstruct_one: Callable[[Any, Any], xr.Dataset | dict[str, xr.Dataset]],
    noun: str = "scans",
) -> dict[str, xr.Dataset]:
    """Results by name; those of several experiments by both names."""
    results: dict[str, xr.Dataset] = {}
    errors: dict[str, Exception] = {}
    for name, given in inputs.items():
        result: xr.Dataset | dict[str, xr.Dataset]
        try:
            result = reconstruct_one(given, paths[name])
        except FailedScansError as error:
            errors |= {f"{name}/{inner}": each for inner, each in error.errors.items()}
            result = error.results
        except (PtychodaskError, OSError) as error:
            logger.info("%s failed: %s", given if isinstance(given, str) else name, in_brief(error))
            errors[name] = error
            continue
        if isinstance(result, dict):
            results |= {f"{name}/{inner}": each for inner, each in result.items()}
        else:
            results[name] = result
    if errors:
        raise FailedScansError(errors, results, folder, noun)
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
    """Path of the result of a scan, or of its experiment.

    Examples
    --------
    >>> [str(result_path(parse_location("out"), name)) for name in ("a", "a/experiment-1")]
    ['out/a.object.zarr', 'out/a.object.zarr/experiment-1.zarr']
    """
    scan, _, experiment = name.partition("/")
    path = folder / f"{scan}.object.zarr"
    return path / f"{experiment}.zarr" if experiment else path


def make_folder(out: Location, several: str) -> None:
    """Make a folder for results; raises `PtychodaskError` if it is a store."""
    if (out.exists() and not out.is_dir()) or (out / "zarr.json").exists():
        raise PtychodaskError(f"{out}: is a file or a store, and results of several {several} need a folder; name one")
    out.make_folder()
