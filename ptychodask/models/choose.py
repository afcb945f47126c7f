"""The model of a reconstruction: given, recorded by the scan, or packaged."""

from __future__ import annotations

import logging
from pathlib import Path

from ptychodask import models
from ptychodask.errors import PtychodaskError
from ptychodask.models.contract import AdaptedModel, MinimalModel, PatchModel
from ptychodask.models.pretrained import is_pretrained, pretrained_for
from ptychodask.scan import Scan
from ptychodask.storage.location import parse_location

logger = logging.getLogger(__name__)


MODEL_ORDER = ("pinn", "baseline")
"""Kinds of recorded models, in order of preference."""


def absolute_path(path: str) -> str:
    """Absolute path of a model; the name of a packaged one."""
    return path if is_pretrained(path) else str(Path(path).resolve())


def resolve_model(scan: Scan, model: str | Path | MinimalModel | None) -> PatchModel:
    """Model given by an argument, recorded in the scan's store, or packaged.

    Parameters
    ----------
    scan : Scan
        Opened from a store.
    model : path, model or None
        None selects the latest recorded `pinn`, else the latest `baseline`, else the packaged model for patterns of N
        pixels. An object with the members of `MinimalModel` only is completed as an `AdaptedModel`.

    Returns
    -------
    PatchModel

    Raises
    ------
    PtychodaskError
        If no model is recorded and none for N pixels is packaged, or the recorded one is missing or was changed.
    """
    if model is None:
        return recorded_or_packaged(scan)
    if isinstance(model, str | Path):
        return models.load_model(model)
    if isinstance(model, PatchModel):
        return model
    if isinstance(model, MinimalModel):
        return AdaptedModel(model)
    raise PtychodaskError(
        f"model: got {type(model).__name__}, expected a path, a model from load_model, or a CallableModel"
    )


def recorded_or_packaged(scan: Scan) -> PatchModel:
    record = recorded_model(scan)
    if record is None:
        packaged = pretrained_for(scan.n_pixels)
        if packaged is not None:
            logger.warning("%s: no model is recorded: using %s", scan.store, packaged)
            return models.load_model(packaged)
        raise PtychodaskError(
            f"{scan.store}: no model is recorded, and none is packaged for patterns of {scan.n_pixels} pixels; "
            f"run 'ptychodask train {scan.store}', or pass model= (--model)"
        )
    store = parse_location(str(scan.store)).resolve()
    # The model of a scan in a bucket is recorded by its absolute path.
    path = (store.local_path or Path()).parent / record["path"]
    if not path.exists():
        raise PtychodaskError(
            f"{scan.store}: no model found at {path}, where its latest {record['kind']} is recorded; "
            "train again, or pass model= (--model)"
        )
    model: PatchModel = models.load_model(path)
    if model.content_hash != record["hash"]:
        raise PtychodaskError(
            f"{scan.store}: its latest {record['kind']} is recorded with hash {record['hash']}, {path} has "
            f"{model.content_hash}; pass model= (--model) to use it as it is, or train again"
        )
    return model


def recorded_model(scan: Scan) -> dict[str, str] | None:
    """Record (kind, path, hash) of the model that `reconstruct` uses, or None."""
    records = scan.attributes.get("models", [])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise PtychodaskError(f"{scan.store}: its list of models cannot be read; pass model= (--model)")
    for kind in MODEL_ORDER:
        for record in reversed(records):
            if record.keys() >= {"kind", "path", "hash"} and record["kind"] == kind:
                return dict(record)
    return None
