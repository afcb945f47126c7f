"""Positions in a second file: joined with the file of the patterns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.arrays import NamedArrays
from ptychodask.io.npy_stream import read_npy
from ptychodask.io.source import Container, Frames

SECOND = "positions/"
"""Before those keys of the second file that the first one has as well."""

TEXT_ENDINGS = (".txt", ".csv", ".dat", ".tsv", ".xyz", ".pos")
"""Endings of files with columns of text."""

LARGEST_TEXT_BYTES = 2**28
"""Largest accepted file of text."""


def is_table(path: Path) -> bool:
    """True for a .npy file, or columns of text."""
    return path.suffix.lower() in (".npy", *TEXT_ENDINGS) and path.is_file()


def open_table(path: Path) -> NamedArrays:
    """Columns of a .npy or text file, as a `Container`.

    Parameters
    ----------
    path : Path
        Two columns are read as "positions" (pattern, 2). Columns with names in the first line are read by these.

    Raises
    ------
    PtychodaskError
        If it does not contain numbers in columns.
    """
    label = str(path)
    if path.suffix.lower() == ".npy":
        return NamedArrays(label, {"positions": read_npy(path)})
    if path.stat().st_size > LARGEST_TEXT_BYTES:
        raise PtychodaskError(f"{label}: has {path.stat().st_size} bytes, too many for a list of positions; save .npy")
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        delimiter = next((mark for mark in ",;\t" if lines and mark in lines[-1]), None)
        names = [] if not lines or _is_numbers(lines[0], delimiter) else _fields(lines[0].lstrip("#% "), delimiter)
        values = np.loadtxt(lines[1:] if names else lines, delimiter=delimiter, ndmin=2, comments=("#", "%"))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PtychodaskError(
            f"{label}: cannot be read as columns of numbers ({reason}); write one line of y and x for every pattern"
        ) from error
    if len(names) == values.shape[1] and len(set(names)) == len(names):
        return NamedArrays(label, {name: values[:, column] for column, name in enumerate(names)})
    if values.shape[1] != 2:
        raise PtychodaskError(
            f"{label}: has {values.shape[1]} columns without names, expected two, y and x; name them in the first line"
        )
    return NamedArrays(label, {"positions": values})


def _fields(line: str, delimiter: str | None) -> list[str]:
    return [re.sub(r"\W+", "_", field.strip()).strip("_") for field in line.split(delimiter)]


def _is_numbers(line: str, delimiter: str | None) -> bool:
    try:
        return bool([float(field) for field in line.split(delimiter)])
    except ValueError:
        return False


class PairedContainer:
    """A `Container` of two files.

    Parameters
    ----------
    first : Container
        The file of the patterns.
    second : Container
        The file of the positions; those of its keys that the first has too come after `SECOND`.
    """

    def __init__(self, first: Container, second: Container) -> None:
        self._first, self._second = first, second
        taken = set(first.keys())
        self._renamed = {(SECOND + key if key in taken else key): key for key in second.keys()}  # noqa: SIM118

    @property
    def label(self) -> str:
        return self._first.label

    def keys(self) -> list[str]:
        return [*self._first.keys(), *self._renamed]

    def shape(self, key: str) -> tuple[int, ...]:
        container, inner = self._of(key)
        return container.shape(inner)

    def dtype(self, key: str) -> np.dtype[Any]:
        container, inner = self._of(key)
        return container.dtype(inner)

    def has(self, key: str) -> bool:
        container, inner = self._of(key)
        return container.has(inner)

    def unit(self, key: str) -> str | None:
        container, inner = self._of(key)
        return container.unit(inner)

    def text(self, key: str) -> str | None:
        container, inner = self._of(key)
        return container.text(inner)

    def numbers(self, key: str) -> dict[str, float]:
        container, inner = self._of(key)
        return container.numbers(inner)

    def array(self, key: str) -> NDArray[Any]:
        container, inner = self._of(key)
        return container.array(inner)

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        container, inner = self._of(key)
        return container.frames(inner, pattern_last=pattern_last, raster=raster)

    def _of(self, key: str) -> tuple[Container, str]:
        return (self._second, self._renamed[key]) if key in self._renamed else (self._first, key)
