"""Changes to a finished scan: another probe, a trained model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.scan import Scan
from ptychodask.storage.location import LocationLike, parse_location
from ptychodask.storage.zarr_checks import consolidate, open_root
from ptychodask.store import SCAN, _array, hash_with_probe, open_scan
from ptychodask.store.write import changing_root


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
    if "segments" in scan.attributes:
        # A run planned while the scan grew accepts the store by the hash of an earlier segment; with another probe it
        # must not.
        root.attrs["segments"] = [
            {key: value for key, value in segment.items() if key != "data_hash"}
            for segment in scan.attributes["segments"]
        ]
    consolidate(path)
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
