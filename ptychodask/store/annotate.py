"""Changes to a finished scan: probe, positions, metadata, a trained model."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.scan import Scan
from ptychodask.storage.location import Location, LocationLike, parse_location
from ptychodask.storage.zarr_checks import consolidate, open_root
from ptychodask.store import CHANGING, SCAN, StoredScan, _array, hash_with_positions, hash_with_probe, open_scan
from ptychodask.store.write import _write_array, changing_root, relative_to_mean

logger = logging.getLogger(__name__)


def check_probe_is_free(scan: Scan) -> None:
    """Raise `PtychodaskError` if a scan is growing: its probe is fixed."""
    if scan.attributes["state"] == "growing":
        raise PtychodaskError(
            f"{scan.store}: the scan is still growing, and keeps the probe of its first segment; finish it first with "
            f"'ptychodask ingest --finish {scan.store}'"
        )


def replace_probe(store: LocationLike, probe: NDArray[np.complex64], record: dict[str, Any]) -> Scan:
    """Replace the probe of a store; `probe_initial` and the patterns stay.

    Parameters
    ----------
    store : path or ``s3://`` URL
    probe : complex64 array (mode, N, N)
        Calibrated, with the shape of the stored probe.
    record : dict
        Description of the refinement; stored as the attribute ``probe_refinement``.

    Returns
    -------
    Scan
        The store, opened again, with a new data hash.

    Raises
    ------
    PtychodaskError
        If the shape differs or a value is not finite.
    """
    path = parse_location(store)
    scan = open_scan(path)
    check_probe_is_free(scan)
    if probe.shape != scan.probe.shape or not np.isfinite(probe).all():
        raise PtychodaskError(
            f"{path}: the new probe has shape {probe.shape} or values that are not finite; expected {scan.probe.shape}"
        )
    probe = probe.astype(np.complex64)
    root = open_root(path, SCAN, "r+")
    _array(root, "probe", str(path))[...] = probe
    # Results and models record the data hash, so those of the earlier probe are recognised as such.
    root.attrs.update({"data_hash": hash_with_probe(scan, probe), "probe_refinement": record})
    root.attrs.update(_without_segment_hashes(scan.attributes))
    consolidate(path)
    return open_scan(path)


def _without_segment_hashes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attribute ``segments``, if there is one, without data hashes."""
    if "segments" not in attributes:
        return {}
    # A run planned while the scan grew accepts the store by the hash of an earlier segment; with another probe, or
    # other positions, it must not.
    return {
        "segments": [
            {key: value for key, value in segment.items() if key != "data_hash"} for segment in attributes["segments"]
        ]
    }


def replace_positions(
    store: LocationLike,
    position_yx_px: NDArray[np.float64],
    flux: NDArray[np.float32] | None = None,
) -> Scan:
    """Replace the positions, and the flux, of a store.

    The positions before the first call stay in ``y_measured_px`` and ``x_measured_px``, and a stored flux in
    ``flux_measured``. All group tables are removed: the next run draws its own from the new positions.

    Parameters
    ----------
    store : path or ``s3://`` URL
    position_yx_px : float64 array (pattern, 2)
        New positions (y, x) of all stored patterns, object pixels.
    flux : float array (pattern,), optional
        New incident flux; divided by its mean before it is stored. By default it stays.

    Returns
    -------
    Scan
        The store, opened again, with a new data hash.

    Raises
    ------
    PtychodaskError
        If the scan is growing, a shape differs, or a value is not finite or a flux not positive.

    Notes
    -----
    While the arrays change, an attribute makes readers refuse the store; the data hash changes last. After a stop, the
    same call completes the change.
    """
    path = parse_location(store)
    stored = StoredScan(path)
    if stored.attributes["state"] == "growing":
        raise PtychodaskError(
            f"{path}: the scan is still growing, and keeps its positions until it is complete; finish it first with "
            f"'ptychodask ingest --finish {path}'"
        )
    position = np.ascontiguousarray(position_yx_px, np.float64)
    if position.shape != (stored.n_patterns, 2) or not np.isfinite(position).all():
        raise PtychodaskError(
            f"{path}: the new positions have shape {position.shape} or values that are not finite; expected "
            f"{(stored.n_patterns, 2)}"
        )
    columns: dict[str, NDArray[Any]] = {"y_px": position[:, 0], "x_px": position[:, 1]}
    if flux is not None:
        if np.shape(flux) != (stored.n_patterns,):
            raise PtychodaskError(
                f"{path}: the new flux has shape {np.shape(flux)}, expected {(stored.n_patterns,)}; pass one value for "
                "each pattern"
            )
        columns["flux"] = relative_to_mean(flux, str(path))
    before, new_hash = stored.data_hash, hash_with_positions(stored, position)
    changing = stored.attributes.get(CHANGING)
    if changing is None:
        stored.check()
        _keep_measured(path, list(columns))
        consolidate(path).attrs[CHANGING] = new_hash
    elif changing != new_hash:
        raise PtychodaskError(
            f"{path}: a change to other positions was stopped; complete it first, with the result that it applied"
        )
    root = _plain_root(path)
    for name, values in columns.items():
        if name in root:
            _array(root, name, str(path))[...] = values
        else:
            _write_array(root, name, values, ("pattern",))
    _remove_tables(root, stored)
    attributes: dict[str, Any] = {name: value for name, value in stored.attributes.items() if name != CHANGING}
    earlier = [*stored.attributes.get("earlier_data_hashes", []), before]
    attributes |= {"data_hash": new_hash, "earlier_data_hashes": earlier} | _without_segment_hashes(attributes)
    # One write of the root: readers see the new positions with their hash, or refuse the store.
    consolidate(path).attrs.put(attributes)
    return open_scan(path)


def _plain_root(path: Location) -> zarr.Group:
    """Root group with all nodes in storage, without the consolidated metadata."""
    return zarr.open_group(path.zarr_store(), mode="r+", zarr_format=3, use_consolidated=False)


MEASURED = {"y_px": "y_measured_px", "x_px": "x_measured_px", "flux": "flux_measured"}
"""Arrays that keep what was measured."""


def _keep_measured(path: Location, names: list[str]) -> None:
    """Copy the measured arrays of these names, unless they are kept."""
    listed, root = open_root(path, SCAN), _plain_root(path)
    for name in names:
        if MEASURED[name] in listed or name not in listed:
            continue
        # A killed call may have left a part of one, which the consolidated metadata do not list.
        if MEASURED[name] in root:
            del root[MEASURED[name]]
        array = _array(root, name, str(path))
        _write_array(root, MEASURED[name], np.asarray(array[...]), ("pattern",)).attrs.update(dict(array.attrs))


def _remove_tables(root: zarr.Group, stored: StoredScan) -> None:
    """Remove all group tables: they are of the earlier positions."""
    for name in stored.table_names():
        table = stored.table(name)
        if table is not None and name != table.spec.name:
            logger.warning(
                "%s: removed the group table '%s', which was of the earlier positions; draw it again with 'ptychodask "
                "group %s --name %s' and the options of %s",
                stored.label,
                name,
                stored.label,
                name,
                table.spec,
            )
    if "groups" in root:
        del root["groups"]


SET_LATER = "metadata_set"
"""Attribute that names the metadata that were not known at ingest."""


def set_metadata(
    store: LocationLike,
    *,
    pixel_size_m: float | None = None,
    energy_ev: float | None = None,
    distance_m: float | None = None,
) -> Scan:
    """Write metadata that were not known at ingest into a scan.

    Patterns, positions and the data hash stay, so that results and models remain those of this scan. A value that was
    set before can be set again; one from ingest cannot, since positions or the probe may have been computed from it.

    Parameters
    ----------
    store : path or ``s3://`` URL
    pixel_size_m : float, optional
        Size of an object pixel, metres.
    energy_ev : float, optional
        Photon energy, eV.
    distance_m : float, optional
        Distance from sample to detector, metres.

    Returns
    -------
    Scan
        The store, opened again.

    Raises
    ------
    PtychodaskError
        If no value is given, one is not positive or known from ingest, or the scan is growing.
    """
    path = parse_location(store)
    values = {"pixel_size_m": pixel_size_m, "energy_ev": energy_ev, "distance_m": distance_m}
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        raise PtychodaskError(f"{path}: nothing to set; pass one or more of {', '.join(values)}")
    scan = open_scan(path)
    if scan.attributes["state"] == "growing":
        raise PtychodaskError(
            f"{path}: the scan is still growing, and its segments must agree; finish it first with "
            f"'ptychodask ingest --finish {path}'"
        )
    set_later = list(scan.attributes.get(SET_LATER, []))
    for name, value in given.items():
        flag = f"{name}= (--{name.replace('_', '-')})"
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise PtychodaskError(f"{path}: {name} is {value!r} ({type(value).__name__}), expected a number")
        if not (np.isfinite(value) and value > 0):
            raise PtychodaskError(f"{path}: {name} is {value}, expected a positive number")
        known = scan.attributes.get(name)
        if known is not None and name not in set_later and not np.isclose(known, value, rtol=1e-9, atol=0):
            raise PtychodaskError(
                f"{path}: {name} is {known:g} from ingest, so it is not set to {value:g}; ingest again with {flag}"
            )
    attributes: dict[str, Any] = {name: float(value) for name, value in given.items()}
    new = [name for name in given if scan.attributes.get(name) is None]
    root = open_root(path, SCAN, "r+")
    root.attrs.update(attributes | {SET_LATER: [*set_later, *new]})
    consolidate(path)
    logger.info("%s: set %s", path, ", ".join(f"{name}={value:g}" for name, value in attributes.items()))
    return open_scan(path)


def record_model(store: LocationLike, *, kind: str, path: str | Path, content_hash: str) -> None:
    """Record a trained model in a store as its latest of `kind`.

    Parameters
    ----------
    store : path or ``s3://`` URL
    kind : str
        "pinn" or "baseline".
    path : path
        Bundle of the model; recorded relative to the folder of the store, or as an absolute path if the store is in a
        bucket.
    content_hash : str
        Hash of the content of the bundle.
    """
    location, bundle = parse_location(store), Path(path).resolve()
    root = open_root(location, SCAN, "r+")
    folder = location.local_path
    recorded = str(bundle) if folder is None else os.path.relpath(bundle, folder.resolve().parent)
    model = {"kind": kind, "path": recorded, "hash": content_hash, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if folder is not None and root.attrs["state"] == "growing":
        with changing_root(folder) as metadata:
            metadata["attributes"].setdefault("models", []).append(model)
        return
    root.attrs["models"] = [*root.attrs.get("models", []), model]  # type: ignore[misc]
    consolidate(location)
