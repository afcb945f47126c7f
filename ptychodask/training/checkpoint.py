"""Checkpoint of an unfinished training: a folder of JSON and NumPy arrays.

It is beside the bundle, and has no pickle.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.npy_stream import read_npz
from ptychodask.storage.atomic import from_json, read_json, renamed_file
from ptychodask.storage.records import differences, plain

logger = logging.getLogger(__name__)

ARRAY_KINDS = ("network", "optimizer", "best")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """State that the next epoch depends on."""

    state: dict[str, Any]
    """Progress of the training as plain values; its log as ``log``."""

    network: Sequence[NDArray[Any]]
    """Current weights, followed by fitted probes."""

    optimizer: Sequence[NDArray[Any]]
    """Variables of the optimizer."""

    best: Sequence[NDArray[Any]]
    """As `network`, of the epoch with the lowest held-out loss."""


class Checkpoint:
    """Folder ``.NAME.training`` of a bundle NAME.

    It contains ``training.json``, ``state.npz`` and ``log.csv``.

    Parameters
    ----------
    out : Path
        The bundle being trained.
    identity : dict
        Network, data and settings of the training: sections of plain values.
    """

    def __init__(self, out: Path, identity: dict[str, dict[str, Any]]) -> None:
        self.folder = out.with_name(f".{out.name}.training")
        self._identity = plain(identity)

    def begin(self, *, resume: bool, overwrite: bool) -> Snapshot | None:
        """Snapshot to resume from, or None to start at the first epoch.

        Parameters
        ----------
        resume : bool
            Continue a stopped run of the same training.
        overwrite : bool
            Delete a stopped run.

        Returns
        -------
        Snapshot or None
            The last finished epoch of the stopped run, if there is one.

        Raises
        ------
        PtychodaskError
            If there is a stopped run and neither option is set, or it is of another training, or damaged.
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
            f"{self.folder}: is the checkpoint of a run that is active or was stopped; pass resume=True (--resume) to "
            "continue from its last epoch, or overwrite=True (--overwrite) to start again"
        )

    def write(self, snapshot: Snapshot) -> None:
        """Write the state after an epoch.

        If the process is killed, either this epoch or the one before it is complete.
        """
        arrays: dict[str, Any] = {"state": np.array(json.dumps(snapshot.state))}
        for kind in ARRAY_KINDS:
            arrays |= {f"{kind}{i:04d}": array for i, array in enumerate(getattr(snapshot, kind))}
        try:
            if not self.folder.exists():
                self.folder.mkdir()
                with renamed_file(self.folder / "training.json") as building:
                    building.write_text(json.dumps(self._identity, indent=2))
            self._write_log(snapshot.state["log"])
            with renamed_file(self.folder / "state.npz") as building:
                np.savez(building, **arrays)
        except OSError as error:
            raise PtychodaskError(
                f"{self.folder}: cannot be written ({error.strerror or error}); the previous epoch is kept: free space "
                "and pass resume=True (--resume)"
            ) from error

    def remove(self) -> None:
        """Delete the checkpoint folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_log(self, log: list[dict[str, float]]) -> None:
        with renamed_file(self.folder / "log.csv") as building, building.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(log[0]))
            writer.writeheader()
            writer.writerows(log)

    def _check_identity(self) -> None:
        path = self.folder / "training.json"
        if not path.is_file():
            return
        try:
            changed = differences(read_json(path), self._identity)
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        if changed:
            raise PtychodaskError(
                f"{self.folder}: is the checkpoint of another training ({'; '.join(changed)}); pass the same "
                "settings, or overwrite=True (--overwrite) without resume to start again, or another out="
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
        logger.info("%s: resumed after epoch %d", self.folder, n_epochs)
        return snapshot

    def _damaged(self, path: Path, error: Exception) -> PtychodaskError:
        return PtychodaskError(
            f"{path}: cannot be read ({error}); pass overwrite=True (--overwrite) without resume to start again"
        )
