"""Description and history of a model bundle, read without loading a network."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.storage.atomic import StoreKind, read_json

FORMAT = "ptychodask-model"
FORMAT_VERSION = 1

MODEL = StoreKind(FORMAT, FORMAT_VERSION, "model", "train")


def read_description(path: Path) -> dict[str, Any]:
    """Contents of a bundle's ``model.json``: ``spec``, ``content_hash`` and, if trained, ``trained_on``.

    Raises
    ------
    PtychodaskError
        If it cannot be read, is not a ptychodask bundle, or has a newer format version.
    """
    try:
        description = read_json(path / "model.json")
    except (OSError, ValueError) as error:
        raise PtychodaskError(f"{path}: model.json cannot be read ({error}); train again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PtychodaskError(f"{path}: is not a model bundle of ptychodask; train a model with 'ptychodask train'")
    if not isinstance(description.get("trained_on", {}), dict):
        raise PtychodaskError(f"{path}: trained_on in model.json cannot be read (not a JSON object); train again")
    version = description.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PtychodaskError(
            f"{path}: has format version {version!r}, this ptychodask reads up to {FORMAT_VERSION}; upgrade ptychodask"
        )
    return description


def epochs_of(history: Sequence[Mapping[str, float]]) -> str:
    """Number of epochs of a training, for display.

    Examples
    --------
    >>> epochs_of([{"epoch": 0.5}, {"epoch": 1.0}])
    '1'
    """
    # Bundles of other programs may not number them.
    return f"{history[-1].get('epoch', len(history)):.3g}" if history else "0"


def read_history(path: Path) -> list[dict[str, float]]:
    """One entry per epoch of a bundle's ``history.csv``.

    Empty if there is no such file.

    Raises
    ------
    PtychodaskError
        If it cannot be read.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise PtychodaskError(f"{path}: cannot be read ({error}); train again") from error
