"""Export of results and scans to the formats of other programs.

One module per format, listed in `FORMATS`; required quantities are checked here, once. The readers are in `io`; the
writers depend on results and figures, so they are separate.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from ptychodask.errors import PtychodaskError, check_choice
from ptychodask.export.content import Content, Picture, check_object, part_of
from ptychodask.grouping import chosen_patterns
from ptychodask.progress import Progress, progress_bar
from ptychodask.result import RESULT, check_one_result, experiment_of, open_result, recorded
from ptychodask.scan import Scan
from ptychodask.storage.atomic import DAMAGED, StoreKind, atomic_file, atomic_folder
from ptychodask.storage.location import parse_location
from ptychodask.store import SCAN, open_scan

logger = logging.getLogger(__name__)

OPTICS = ("pixel_size_m", "energy_ev", "distance_m")
"""Optional quantities of a scan; `export` requests one that a format needs and the scan does not record."""


@dataclass(frozen=True)
class Format:
    """One format: its writer, sources and file endings."""

    module: str
    """Module with `write(content, path, bar)`."""

    suffixes: tuple[str, ...]
    """File endings that its programs recognise."""

    of_result: tuple[str, ...] | None = ()
    """Requirements beside a result, from `OPTICS` and "scan"; None if the format is not for results."""

    of_scan: tuple[str, ...] | None = None
    """Requirements beside a scan; None if the format is not for scans."""

    folder: str | None = None
    """Name of the `StoreKind` in the module, if the format is a folder."""


FORMATS = {
    "ptychodus": Format(
        "ptychodask.export.ptychodus", (".h5", ".hdf5", ".npz"), of_result=("scan", *OPTICS), of_scan=OPTICS
    ),
    "cxi": Format("ptychodask.export.cxi", (".cxi",), of_result=("scan", "pixel_size_m"), of_scan=("pixel_size_m",)),
    "ptychopinn": Format("ptychodask.export.ptychopinn", (".npz",), of_result=("scan",), of_scan=()),
    "netcdf": Format("ptychodask.export.netcdf", (".nc",)),
    "tiff": Format("ptychodask.export.tiff", (".tif", ".tiff")),
    "ome-zarr": Format("ptychodask.export.ome_zarr", (".zarr",), folder="KIND"),
    "png": Format("ptychodask.export.png", (".png",)),
}
"""Formats by name."""


def export(
    source: str | Path | xr.Dataset | Scan,
    out: str | Path,
    *,
    format: str,
    scan: str | Path | Scan | None = None,
    network: str | None = None,
    experiment: int | None = None,
    method: str | None = None,
    pixel_size_m: float | None = None,
    energy_ev: float | None = None,
    distance_m: float | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write a result or a scan in the format of another program.

    Parameters
    ----------
    source : path, Dataset or Scan
        A result (stored, in memory or lazy) or a scan (its store). Patterns are exported from a scan, the object from a
        result.
    out : path
        File to write; a folder for ``ome-zarr``.
    format : str
        ``ptychodus``: a product of Ptychodus (HDF5, or NPZ by the ending), or the patterns of a scan in its layout;
        ``cxi``: object, probe and positions, or a scan with its patterns, in SI units; ``ptychopinn``: PtychoPINN's
        NPZ, including patterns; ``netcdf``: all arrays of a result, complex ones as two; ``tiff``: amplitude and phase,
        for ImageJ; ``ome-zarr``: the same as a pyramid, for napari; ``png``: the figure of `plot`.
    scan : path or Scan, optional
        Scan of the result, for formats with positions and probe; by default the store that the result records.
    network : str, optional
        Network whose object is exported, if the result has several.
    experiment : int, optional
        Experiment whose patterns and positions are exported, if the scan has several; by default the one that the
        result records. Only ``ptychopinn``, whose files record experiments, takes a scan of several completely.
    method : str, optional
        Former name of `network`.
    pixel_size_m, energy_ev, distance_m : float, optional
        Quantities that the format needs and the scan does not record.
    overwrite : bool
        Replace an existing file, once the new one is complete.
    progress : bool, optional
        See `progress_bar`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    PtychodaskError
        If the format does not support the source, a required quantity is missing, the scan is not that of the result, a
        given quantity contradicts the recorded one, or writing fails; no incomplete file is left.

    Notes
    -----
    Objects are written in blocks of rows, and patterns in blocks, so neither is loaded into memory completely. Unseen
    pixels stay NaN in netcdf, tiff and ome-zarr; they are 0 in ptychodus, cxi and ptychopinn, whose programs compute
    with them.
    """
    check_choice("format", format, tuple(FORMATS), "export")
    path = Path(out)
    chosen = FORMATS[format]
    if path.suffix.lower() not in chosen.suffixes:
        raise PtychodaskError(
            f"{path}: a file of format {format} must end in {' or '.join(chosen.suffixes)}; rename it"
        )
    optics = {"pixel_size_m": pixel_size_m, "energy_ev": energy_ev, "distance_m": distance_m}
    opened = _opened(source)
    network = _network(network, method)
    if isinstance(opened, Scan):
        if scan is not None or network is not None:
            raise PtychodaskError(
                "export: scan= and network= are only for a result, but the source is a scan; leave them out"
            )
        if experiment is not None or format != "ptychopinn":
            opened = part_of(opened, chosen_patterns(opened, experiment))
        content, needs = _of_scan(opened, path, optics), chosen.of_scan
    else:
        ds = check_object(opened, network)
        scan = _scan_of(ds, scan, needed=chosen.of_result is not None and "scan" in chosen.of_result)
        if scan is not None and "scan" in (chosen.of_result or ()):
            scan = part_of(scan, chosen_patterns(scan, experiment_of({"result": ds}, scan, experiment, "export")))
        content, needs = _of_result(ds, scan, path, optics, chosen), chosen.of_result
    _check_requirements(content, needs, format)
    write, target = _writer(chosen, path, format, overwrite)
    total, unit = (content.object.shape[0], "rows") if content.picture else (content.measured.n_patterns, "patterns")
    with target as building, progress_bar("export", total, unit, progress) as bar:
        write(content, building, bar)
    logger.info("%s: wrote %s", path, format)
    return path


def _network(network: str | None, method: str | None) -> str | None:
    """Label of the network to export, by either name of the option."""
    if method is None:
        return network
    warnings.warn("export(method=) is now export(network=)", DeprecationWarning, stacklevel=3)
    return method if network is None else network


def _opened(source: str | Path | xr.Dataset | Scan) -> xr.Dataset | Scan:
    if isinstance(source, xr.Dataset | Scan):
        return source
    path = parse_location(source)
    check_one_result(path)
    kind = path.recorded_format()
    if kind == SCAN.name:
        return open_scan(path)
    if path.exists() and kind not in (RESULT.name, DAMAGED):
        description = f"a {kind}" if kind else "neither a scan nor a result of ptychodask"
        raise PtychodaskError(f"{path}: is {description}; pass the folder of a scan or of a result")
    return open_result(path)


def _scan_of(ds: xr.Dataset, scan: str | Path | Scan | None, *, needed: bool) -> Scan | None:
    """Scan of a result: the given one, else the recorded one."""
    if scan is None:
        store = recorded(ds.attrs, "store")
        if not needed or not isinstance(store, str) or not parse_location(store).is_dir():
            return None
        scan = store
    opened = scan if isinstance(scan, Scan) else open_scan(scan)
    made_from = recorded(ds.attrs, "data_hash")
    if made_from is not None and opened.data_hash and made_from != opened.data_hash:
        raise PtychodaskError(
            f"export: the result was made from data {str(made_from)[:12]}, but {opened.store or 'the scan'} contains "
            f"{opened.data_hash[:12]}: other patterns, positions or another probe; pass the scan of the result"
        )
    if recorded(ds.attrs, "spec", "position_yx_px") is not None:
        logger.warning(
            "the result was made with corrected positions, which are not stored in it: exporting those of the scan"
        )
    return opened


def _of_scan(scan: Scan, path: Path, optics: dict[str, float | None]) -> Content:
    known: dict[str, Any] = {name: _one_of(name, given, getattr(scan, name)) for name, given in optics.items()}
    return Content(name=parse_location(scan.store or path).stem, scan=scan, **known)


def _of_result(
    ds: xr.Dataset, scan: Scan | None, path: Path, optics: dict[str, float | None], chosen: Format
) -> Content:
    of_scan = {name: None if scan is None else getattr(scan, name) for name in OPTICS}
    of_scan["pixel_size_m"] = of_scan["pixel_size_m"] or recorded(ds.attrs, "pixel_size_m")
    known: dict[str, Any] = {name: _one_of(name, given, of_scan[name]) for name, given in optics.items()}
    name = path.name.split(".")[0] if scan is None or scan.store is None else parse_location(scan.store).stem
    picture = Picture(ds)
    if scan is not None and "scan" in (chosen.of_result or ()):
        # Programs that read object and positions together cut out patches, and fail if a patch exceeds the object.
        picture = picture.covering(scan)
    return Content(name=name, picture=picture, scan=scan, **known)


def _one_of(name: str, given: float | None, stored: float | None) -> float | None:
    """Given or stored value of a quantity, positive and consistent."""
    flag = f"--{name.replace('_', '-')}"
    if given is None:
        return stored
    if not given > 0 or given == float("inf"):
        raise PtychodaskError(f"export: {name} is {given}, expected a positive number ({flag})")
    if stored is not None and abs(given - stored) > 1e-9 * stored:
        raise PtychodaskError(f"export: {name}={given} was passed ({flag}), but {stored} is recorded; leave it out")
    return given


def _check_requirements(content: Content, needs: tuple[str, ...] | None, format: str) -> None:
    """Raise `PtychodaskError` if a source is unsupported or a quantity missing."""
    if needs is None:
        formats = ", ".join(name for name, each in FORMATS.items() if each.of_scan is not None)
        raise PtychodaskError(
            f"export: format {format} is only for results, but the source is a scan; choose one of: {formats}"
        )
    missing = [name for name in needs if getattr(content, name) is None]
    if missing:
        flags = ", ".join(f"{name}= (--{name.replace('_', '-')})" for name in missing)
        raise PtychodaskError(
            f"export: format {format} needs {', '.join(missing)}, which is not recorded; pass {flags}"
        )


Writer = Callable[[Content, Path, Progress], None]


def _writer(chosen: Format, path: Path, format: str, overwrite: bool) -> tuple[Writer, AbstractContextManager[Path]]:
    """Write function of a format, and context of an atomic write."""
    try:
        module: Any = importlib.import_module(chosen.module)
    except ModuleNotFoundError as error:
        raise PtychodaskError(
            f"export: format {format} needs the package {error.name}; install ptychodask with its extra 'export'"
        ) from error
    if chosen.folder is None:
        return module.write, atomic_file(path, overwrite=overwrite)
    kind: StoreKind = getattr(module, chosen.folder)
    return module.write, atomic_folder(path, overwrite=overwrite, kind=kind)
