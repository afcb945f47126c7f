"""Model bundles: folders of JSON and NumPy arrays without pickle, written atomically."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.npy_stream import read_npz
from ptychodask.models.description import FORMAT, FORMAT_VERSION, MODEL, read_description, read_history
from ptychodask.models.model import Model, hash_weights
from ptychodask.models.pretrained import is_pretrained, packaged_folder
from ptychodask.models.spec import ModelSpec, Optics, bottom_weights
from ptychodask.storage.atomic import atomic_folder
from ptychodask.storage.location import on_disk

if TYPE_CHECKING:
    from ptychodask.models.ptychopinn import PtychoPinnModel


def save_model(model: Model, path: str | Path, *, overwrite: bool = False) -> Model:
    """Write a model into a bundle.

    Parameters
    ----------
    model : Model
    path : path
        Folder to create, with ``model.json`` (spec, hash, provenance), ``weights.npz``, ``optics.npz`` and
        ``history.csv``.
    overwrite : bool
        Replace an existing bundle.

    Returns
    -------
    Model
        The same model with its `path` set.

    Raises
    ------
    PtychodaskError
        If the path exists or cannot be written.
    """
    path = on_disk(path, "a model")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": asdict(model.spec),
        "content_hash": model.content_hash,
        "trained_on": model.trained_on,
    }
    with atomic_folder(path, overwrite=overwrite, kind=MODEL) as folder:
        weights: dict[str, Any] = {f"w{i:04d}": array for i, array in enumerate(model.weights)}
        np.savez(folder / "weights.npz", **weights)
        np.savez(
            folder / "optics.npz",
            probe=model.optics.probe,
            normalization=np.float64(model.optics.normalization),
            mask=model.optics.mask,
        )
        _write_history(folder / "history.csv", model.history)
        (folder / "model.json").write_text(json.dumps(description, indent=2))
    return replace(model, path=str(path))


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]) if history else ["epoch"])
        writer.writeheader()
        writer.writerows(history)


def load_model(path: str | Path) -> Model | PtychoPinnModel:
    """Read a trained model.

    Parameters
    ----------
    path : path
        A folder written by `train`; ``pretrained:<name>``, a model packaged with ptychodask; or PtychoPINN's
        ``wts.h5.zip``, the folder that contains it, or its unpacked folder ``diffraction_to_obj``.

    Returns
    -------
    Model or PtychoPinnModel
        A `Model` is bound to the optics it was trained with.

    Raises
    ------
    PtychodaskError
        If there is no model, it is damaged, has a newer format, or is neither a bundle nor a PtychoPINN model.
    """
    if is_pretrained(path):
        return replace(_load_bundle(packaged_folder(path)), path=str(path))
    path = on_disk(path, "a model")
    if not path.exists():
        raise PtychodaskError(f"{path}: no such model; train one with 'ptychodask train'")
    if (path / "model.json").is_file():
        return _load_bundle(path)
    from ptychodask.models.ptychopinn import ARCHIVE, looks_like_ptychopinn, read_ptychopinn

    if looks_like_ptychopinn(path):
        return read_ptychopinn(path)
    raise PtychodaskError(
        f"{path}: is not a model bundle (it has no model.json), nor PtychoPINN's {ARCHIVE}; "
        "train a model with 'ptychodask train'"
    )


def _load_bundle(path: Path) -> Model:
    description = read_description(path)
    try:
        # Bundles older than the field momentum were trained without it.
        spec = ModelSpec(**{"momentum": 0.0, **description["spec"]})
    except (KeyError, TypeError) as error:
        raise PtychodaskError(
            f"{path}: its spec cannot be read ({error}); upgrade ptychodask or train again"
        ) from error
    stored = _read_arrays(path / "weights.npz")
    weights = [stored[name] for name in sorted(stored)]
    if bottom_weights(spec) > sum(weight.size for weight in weights):
        raise PtychodaskError(f"{path}: has fewer weights than its spec needs; train again")
    optics = _read_optics(path / "optics.npz", spec)
    if hash_weights(spec, weights) != description.get("content_hash"):
        raise PtychodaskError(f"{path}: its weights have changed since it was saved (hash differs); train again")
    return Model(
        spec,
        weights,
        optics,
        dict(description.get("trained_on", {})),
        read_history(path / "history.csv"),
        str(path),
        str(description["content_hash"]),
    )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return read_npz(path)
    except PtychodaskError as error:
        raise PtychodaskError(f"{error}; or train again") from error


def _read_optics(path: Path, spec: ModelSpec) -> Optics:
    arrays = _read_arrays(path)
    shape = (spec.n_pixels, spec.n_pixels)
    missing = {"probe", "normalization", "mask"} - set(arrays)
    if (
        missing
        or arrays["probe"].ndim != 3
        or arrays["probe"].shape[1:] != shape
        or arrays["mask"].shape != shape
        or arrays["normalization"].shape != ()
    ):
        raise PtychodaskError(f"{path}: does not contain the optics of a {spec.n_pixels}-pixel model; train again")
    return Optics(
        arrays["probe"].astype(np.complex64), float(arrays["normalization"]), arrays["mask"].astype(np.float32)
    )
