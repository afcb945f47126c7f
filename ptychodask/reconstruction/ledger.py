"""What of a run is finished: a file beside the data, a line for each chunk and tile, that a later run goes on from."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ptychodask.folders import LEDGER, from_json
from ptychodask.places import Location, S3Location, remove
from ptychodask.scan import PtychodaskError

FORMAT = "ptychodask-ledger"
FORMAT_VERSION = 1

HEADER = "0"
"""Name of the first line where lines are objects: it sorts before the others."""


class Ledger:
    """The finished chunks and tiles of a run, each with what is needed to check it.

    Parameters
    ----------
    folder : Place
        Beside what is being written. The file appears with the first line, so a run that finished nothing leaves none.
    made_by : dict
        What the run's data depend on: hashes, spec, plan; plain values for JSON.

    Notes
    -----
    Lines are added and reach the disk one by one. Each ends with a checksum, so that one that was cut short is known.
    An object store adds nothing to an object: there each line is one of its own, below the name of the file.
    """

    def __init__(self, folder: Location, made_by: dict[str, Any]) -> None:
        self._path = folder / LEDGER
        self._made_by = json.loads(json.dumps(made_by))
        self._begun = False
        self.chunks: dict[int, dict[str, Any]] = {}
        """Records of finished chunks, by their index."""
        self.tiles: dict[int, dict[str, Any]] = {}
        """Records of finished tiles, by their index."""

    @property
    def exists(self) -> bool:
        """Whether anything was ever noted."""
        return self._path.exists()

    def read(self) -> None:
        """Take what an earlier run of the same kind noted.

        Raises
        ------
        PtychodaskError
            If the file is no ledger, or that of another scan, model, spec or plan, which are named.
        """
        header, *records = _whole_lines(self._path)
        if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
            raise self._foreign()
        check_same(header.get("made_by"), self._made_by, str(self._path.parent))
        try:
            for record in records:
                (self.tiles if record["kind"] == "tile" else self.chunks)[int(record["index"])] = record
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._foreign() from error

    def _foreign(self) -> PtychodaskError:
        return PtychodaskError(
            f"{self._path}: is no ledger that this ptychodask reads; pass overwrite=True (--overwrite), without "
            "resume, to start again"
        )

    def add(self, kind: str, index: int, record: Mapping[str, Any]) -> None:
        """Note that a chunk or a tile is finished; on disk when this returns."""
        if isinstance(self._path, S3Location):
            self._add_object(self._path, kind, index, record)
            return
        # A line before, so that what a full disk cut short does not spoil this one.
        text = "\n" if self.exists else self._header()
        text += _line({"kind": kind, "index": index, **record})
        with self._path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def begin_anew(self, made_by: dict[str, Any]) -> None:
        """Forget all; what follows depends on something else."""
        self.forget()
        self.chunks.clear()
        self.tiles.clear()
        self._made_by = json.loads(json.dumps(made_by))

    def _header(self) -> str:
        return _line({"format": FORMAT, "format_version": FORMAT_VERSION, "made_by": self._made_by})

    def _add_object(self, path: S3Location, kind: str, index: int, record: Mapping[str, Any]) -> None:
        if not self._begun:
            (path / HEADER).write_bytes(self._header().encode())
            self._begun = True
        (path / f"{kind}-{index}").write_bytes(_line({"kind": kind, "index": index, **record}).encode())

    def forget(self) -> None:
        """Remove it: nothing of the run is to be gone on with."""
        if isinstance(self._path, S3Location):
            remove(self._path)
        else:
            self._path.unlink(missing_ok=True)


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return f"{text}\t{zlib.crc32(text.encode()):08x}\n"


def _lines(path: Location) -> list[str]:
    if isinstance(path, S3Location):
        keys = sorted((found for found, _ in path.below()), key=str)
        return [key.read_bytes().decode(errors="replace").strip() for key in keys]
    return path.read_text(errors="replace").splitlines()


def _whole_lines(path: Location) -> list[dict[str, Any]]:
    """Records of a ledger, the header first; lines that are none, or whose checksum is not theirs, are left out."""
    records = []
    try:
        lines = _lines(path)
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be read ({error.strerror or error}); pass overwrite=True (--overwrite), without resume, "
            "to start again"
        ) from error
    for line in lines:
        text, _, checksum = line.rpartition("\t")
        if checksum == f"{zlib.crc32(text.encode(errors='replace')):08x}":
            with suppress(ValueError):
                records.append(from_json(text))
    return [record for record in records if isinstance(record, dict)] or [{}]


def check_same(found: Any, expected: dict[str, Any], label: str) -> None:
    """Raise `PtychodaskError` unless what made some data is what would make them now; the differences are named.

    Parameters
    ----------
    found : dict
        Nested plain values that were recorded.
    expected : dict
    label : str
        The data, for messages.
    """
    differing = differences(found, expected)
    if differing:
        told = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise PtychodaskError(
            f"{label}: was made by another run: {told}; ask as that run did to go on with it, or pass overwrite=True "
            "(--overwrite), without resume, to start again"
        )


def differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Where nested plain values differ, in words.

    Examples
    --------
    >>> differences({"spec": {"tile": 256, "crop": None}}, {"spec": {"tile": 512, "crop": None}})
    ['spec.tile was 256, is 512']
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(found.keys() | expected.keys())
        return [
            told
            for key in names
            for told in differences(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if found == expected else [f"{name} was {_brief(found)}, is {_brief(expected)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
