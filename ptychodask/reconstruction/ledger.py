"""Ledger of the finished chunks and tiles of a run.

A text file beside the data, with one line for each of them, from which a stopped run is resumed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ptychodask.errors import PtychodaskError
from ptychodask.storage.atomic import LEDGER, from_json
from ptychodask.storage.location import Location
from ptychodask.storage.records import differences, plain

FORMAT = "ptychodask-ledger"
FORMAT_VERSION = 1

HEADER = "0"
"""Name of the header where lines are objects: it sorts before the others."""


class Ledger:
    """The finished chunks and tiles of a run, with their checksums.

    Parameters
    ----------
    folder : Location
        Beside the data that are being written. The file appears with the first line, so a run that finished nothing
        leaves none.
    made_by : dict
        Everything the run's data depend on: hashes, spec, plan; plain values for JSON.

    Notes
    -----
    Lines are appended one by one, by `Location.add_lines`. Each ends with a checksum, which shows if it was cut short.
    """

    def __init__(self, folder: Location, made_by: dict[str, Any]) -> None:
        self._path = folder / LEDGER
        # As JSON types, like the recorded one: with tuples, nothing that was resumed would compare equal.
        self._made_by = plain(made_by)
        self._has_header = False
        self.chunks: dict[int, dict[str, Any]] = {}
        """Records of finished chunks, by their index."""
        self.tiles: dict[int, dict[str, Any]] = {}
        """Records of finished tiles, by their index."""
        self.stages: dict[int, dict[str, Any]] = {}
        """State of the refinement of each object after its latest stage."""

    @property
    def exists(self) -> bool:
        """True if anything was ever recorded."""
        return self._path.exists()

    def read(self) -> None:
        """Read the records of an earlier run with the same `made_by`.

        Raises
        ------
        PtychodaskError
            If the file is no ledger, or that of another scan, model, spec or plan, which are named.
        """
        header, *records = _valid_records(self._path)
        if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
            raise self._foreign()
        # Sums of another scan, model or plan have the same file names and valid checksums: only this finds them.
        check_same(header.get("made_by"), self._made_by, str(self._path.parent))
        self._has_header = True
        try:
            # The last record of an index counts: one that was found damaged was computed and recorded again.
            for record in records:
                self._records_of(record["kind"])[int(record["index"])] = record
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._foreign() from error

    def recorded_inputs(self) -> dict[str, Any] | None:
        """Recorded inputs of any run; None without a ledger."""
        made_by = _valid_records(self._path)[0].get("made_by") if self.exists else None
        return made_by if isinstance(made_by, dict) else None

    def _records_of(self, kind: str) -> dict[int, dict[str, Any]]:
        return {"tile": self.tiles, "stage": self.stages}.get(kind, self.chunks)

    def _foreign(self) -> PtychodaskError:
        return PtychodaskError(
            f"{self._path}: is no ledger that this ptychodask reads; pass overwrite=True (--overwrite), without "
            "resume, to start again"
        )

    def add(self, kind: str, index: int, record: Mapping[str, Any]) -> None:
        """Record a finished chunk, tile or stage; on disk when this returns."""
        # Called after the task has written its files, never before: a run that is killed in between computes
        # one chunk again, while a line without its data would be a promise that resuming has to find broken.
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "made_by": self._made_by}
        # The header first: records without one are no ledger, and nothing could be resumed.
        lines = {} if self._has_header else {HEADER: _line(header)}
        self._path.add_lines(lines | {f"{kind}-{index}": _line({"kind": kind, "index": index, **record})})
        self._has_header = True

    def begin_anew(self, made_by: dict[str, Any]) -> None:
        """Remove all records, and start with another `made_by`."""
        self.forget()
        for records in (self.chunks, self.tiles, self.stages):
            records.clear()
        self._made_by = plain(made_by)

    def forget(self) -> None:
        """Remove the ledger, so that nothing of the run can be resumed."""
        self._path.remove()
        self._has_header = False


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return f"{text}\t{zlib.crc32(text.encode()):08x}\n"


def _valid_records(path: Location) -> list[dict[str, Any]]:
    """Records of a ledger, the header first.

    Lines that are no JSON object or fail their checksum are left out.
    """
    records = []
    try:
        lines = path.lines()
    except OSError as error:
        raise PtychodaskError(
            f"{path}: cannot be read ({error.strerror or error}); pass overwrite=True (--overwrite), without resume, "
            "to start again"
        ) from error
    # A bad line costs no more than its chunk or tile, which is computed again; a bad header makes it no ledger.
    for line in lines:
        text, _, checksum = line.rpartition("\t")
        if checksum == f"{zlib.crc32(text.encode(errors='replace')):08x}":
            with suppress(ValueError):
                records.append(from_json(text))
    return [record for record in records if isinstance(record, dict)] or [{}]


def check_same(recorded: Any, expected: dict[str, Any], label: str) -> None:
    """Raise `PtychodaskError` if data were made from other inputs.

    Parameters
    ----------
    recorded : dict
        Inputs recorded with the data, as nested plain values.
    expected : dict
        Inputs of this run.
    label : str
        The data, for messages.
    """
    differing = differences(recorded, expected)
    if differing:
        listed = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise PtychodaskError(
            f"{label}: was made by another run: {listed}; repeat the options of that run to resume it, or pass "
            "overwrite=True (--overwrite), without resume, to start again"
        )
