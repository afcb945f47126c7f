"""Where an unfinished training is kept: a folder beside its bundle, JSON and NumPy arrays, no pickle."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.folders import from_json, read_json
from ptychodask.io.npy_stream import read_npz
from ptychodask.scan import PtychodaskError

logger = logging.getLogger(__name__)

ARRAY_KINDS = ("network", "optimizer", "best")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that the next epoch depends on."""

    state: dict[str, Any]
    """Where the training stands, plain values; its log as ``log``."""

    network: Sequence[NDArray[Any]]
    """Weights as they are, and fitted probes last."""

    optimizer: Sequence[NDArray[Any]]
    """Variables of the optimizer."""

    best: Sequence[NDArray[Any]]
    """The same of the epoch with the lowest held-out loss."""


class Checkpoint:
    """The folder ``.NAME.training`` of a bundle NAME: ``training.json``, ``state.npz`` and ``log.csv``.

    Parameters
    ----------
    out : Path
        The bundle that is being made.
    identity : dict
        What is trained, on what, how: plain values, in one level of sections.
    """

    def __init__(self, out: Path, identity: dict[str, dict[str, Any]]) -> None:
        self.folder = out.with_name(f".{out.name}.training")
        self._identity = json.loads(json.dumps(identity))

    def begin(self, *, resume: bool, overwrite: bool) -> Snapshot | None:
        """The last epoch of the same training, when it shall go on.

        Parameters
        ----------
        resume : bool
            Go on where a stopped run was.
        overwrite : bool
            Forget a stopped run.

        Returns
        -------
        Snapshot or None
            None where no epoch was finished.

        Raises
        ------
        PtychodaskError
            If there is a stopped run and neither was asked for, or it trained something else, or is damaged.
        """
        if not self.folder.exists():
            return None
        if resume:
            self._check_identity()
            return self._read()
        if overwrite:
            self.remove()
            return None
        raise PtychodaskError(
            f"{self.folder}: another run is training it, or was stopped before its end; pass resume=True (--resume) to "
            "go on from its last epoch, or overwrite=True (--overwrite) to start again"
        )

    def write(self, snapshot: Snapshot) -> None:
        """Keep an epoch; a kill at any time leaves this one or the one before it, whole."""
        arrays: dict[str, Any] = {"state": np.array(json.dumps(snapshot.state))}
        for kind in ARRAY_KINDS:
            arrays |= {f"{kind}{i:04d}": array for i, array in enumerate(getattr(snapshot, kind))}
        try:
            if not self.folder.exists():
                self.folder.mkdir()
                _write_whole(self.folder / "training.json", json.dumps(self._identity, indent=2).encode())
            self._write_log(snapshot.state["log"])
            building = self.folder / "state.writing.npz"
            np.savez(building, **arrays)
            os.replace(building, self.folder / "state.npz")
        except OSError as error:
            raise PtychodaskError(
                f"{self.folder}: cannot be written ({error.strerror or error}); the epoch before is kept: free space "
                "and pass resume=True (--resume)"
            ) from error

    def remove(self) -> None:
        """Forget the training: its bundle is written, or it shall start again."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_log(self, log: list[dict[str, float]]) -> None:
        building = self.folder / "log.writing.csv"
        with building.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(log[0]))
            writer.writeheader()
            writer.writerows(log)
        os.replace(building, self.folder / "log.csv")

    def _check_identity(self) -> None:
        path = self.folder / "training.json"
        if not path.is_file():
            return
        try:
            found = read_json(path)
            differences = _differences(found, self._identity)
        except (OSError, ValueError, AttributeError) as error:
            raise self._damaged(path, error) from error
        if differences:
            raise PtychodaskError(
                f"{self.folder}: is the checkpoint of another training ({'; '.join(differences)}); ask for the same, "
                "or pass overwrite=True (--overwrite) without resume to start again, or another out="
            )

    def _read(self) -> Snapshot | None:
        path = self.folder / "state.npz"
        if not path.is_file():
            return None
        try:
            arrays = read_npz(path)
            state = from_json(str(arrays.pop("state")))
            kinds = {kind: [arrays[n] for n in sorted(arrays) if n.startswith(kind)] for kind in ARRAY_KINDS}
            snapshot = Snapshot(state, **kinds)
            n_epochs = len(state["log"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, error) from error
        logger.info("%s: goes on after epoch %d", self.folder, n_epochs)
        return snapshot

    def _damaged(self, path: Path, error: Exception) -> PtychodaskError:
        return PtychodaskError(
            f"{path}: cannot be read ({error}); pass overwrite=True (--overwrite) without resume to start again"
        )


def _write_whole(path: Path, content: bytes) -> None:
    building = path.with_name(f"{path.name}.writing")
    building.write_bytes(content)
    os.replace(building, path)


def _differences(found: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> list[str]:
    """What differs, in words: "epochs was 10, asked for 20"."""
    return [
        f"{name} was {_brief(found.get(section, {}).get(name))}, asked for {_brief(value)}"
        for section, values in wanted.items()
        for name, value in values.items()
        if found.get(section, {}).get(name) != value
    ]


def _brief(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
