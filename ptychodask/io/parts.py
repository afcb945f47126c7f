"""Arrays that a file stores in numbered parts, joined."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import Container, Frames, missing_key

PART = "*"
"""Stands in a key for the number of a part, as in ``entry/data/data_*``."""


def part_keys(keys: Sequence[str], joined: str) -> list[str]:
    """Keys of the parts of a joined key, by their numbers.

    Examples
    --------
    >>> part_keys(["d_10", "d_9", "d_x"], "d_*")
    ['d_9', 'd_10']
    """
    pattern = re.compile(re.escape(joined).replace(re.escape(PART), r"(\d+)", 1))
    numbered = {int(match.group(1)): key for key in keys if (match := pattern.fullmatch(key))}
    return [numbered[number] for number in sorted(numbered)]


def joined_keys(keys: Sequence[str]) -> list[str]:
    """Joined keys: `PART` in place of the differing number.

    Examples
    --------
    >>> joined_keys(["data_000001", "data_000002", "mask"])
    ['data_*']
    """
    candidates = [
        key[: match.start()] + PART + key[match.end() :]
        for key in keys
        if PART not in key
        for match in re.finditer(r"\d+", key)
    ]
    return sorted({name for name in candidates if candidates.count(name) > 1})


class JoinedContainer:
    """A `Container` with the parts of an array joined.

    Parameters
    ----------
    container : Container
        The file; keys without `PART`, and those that it has itself, are passed on to it.
    """

    def __init__(self, container: Container) -> None:
        self._container = container

    @property
    def label(self) -> str:
        return self._container.label

    def keys(self) -> list[str]:
        return self._container.keys()

    def has(self, key: str) -> bool:
        return self._container.has(key) or (PART in key and bool(part_keys(self.keys(), key)))

    def shape(self, key: str) -> tuple[int, ...]:
        parts = self._parts(key)
        shapes = [self._container.shape(part) for part in parts]
        if len(parts) == 1:
            return shapes[0]
        for part, shape in zip(parts, shapes, strict=True):
            if not shape or shape[1:] != shapes[0][1:] or self._container.dtype(part) != self.dtype(key):
                raise PtychodaskError(
                    f"{self.label}[{key}]: '{parts[0]}' has shape {shapes[0]} and type {self.dtype(key)}, '{part}' has "
                    f"{shape} and {self._container.dtype(part)}, expected parts that differ in their first axis only; "
                    "name one part in place of '*'"
                )
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def dtype(self, key: str) -> np.dtype[Any]:
        return self._container.dtype(self._parts(key)[0])

    def unit(self, key: str) -> str | None:
        return self._container.unit(self._parts(key)[0])

    def text(self, key: str) -> str | None:
        return self._container.text(key)

    def numbers(self, key: str) -> dict[str, float]:
        return self._container.numbers(self._parts(key)[0])

    def array(self, key: str) -> NDArray[Any]:
        parts = self._parts(key)
        if len(parts) == 1:
            return self._container.array(parts[0])
        self.shape(key)  # raises if the parts differ
        return np.concatenate([self._container.array(part) for part in parts])

    def frames(self, key: str, *, pattern_last: bool = False, raster: bool = False) -> Frames:
        parts = self._parts(key)
        if len(parts) == 1:
            return self._container.frames(parts[0], pattern_last=pattern_last, raster=raster)
        if pattern_last:
            raise PtychodaskError(
                f"{self.label}[{key}]: parts are joined along their first axis, but the patterns are along the last; "
                "name one part in place of '*', or pass axes='pattern,qy,qx' (--axes)"
            )
        self.shape(key)  # raises if the parts differ
        return JoinedFrames(tuple(self._container.frames(part, raster=raster) for part in parts))

    def _parts(self, key: str) -> list[str]:
        if PART not in key or self._container.has(key):
            return [key]
        parts = part_keys(self.keys(), key)
        if not parts:
            raise missing_key(self, key)
        prefix = key.index(PART)
        numbers = [int(re.match(r"\d+", part[prefix:]).group()) for part in parts]  # type: ignore[union-attr]
        lost = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
        if lost:
            raise PtychodaskError(
                f"{self.label}[{key}]: part {lost[0]} is missing, found {len(parts)} parts from {numbers[0]} to "
                f"{numbers[-1]}; put the file it is linked to beside this one, or name one part in place of '*'"
            )
        return parts


@dataclass(frozen=True)
class JoinedFrames:
    """Frames of several arrays, one after the other."""

    parts: tuple[Frames, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    @property
    def random_access(self) -> bool:
        return all(part.random_access for part in self.parts)

    @property
    def seekable(self) -> bool:
        return all(part.seekable for part in self.parts)

    def blocks(self) -> Iterator[NDArray[Any]]:
        for part in self.parts:
            yield from part.blocks()

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        frames = np.empty((len(index), *self.shape[1:]), self.dtype)
        first = 0
        for part in self.parts:
            rows = np.flatnonzero((index >= first) & (index < first + part.shape[0]))
            if len(rows):
                frames[rows] = part[index[rows] - first]
            first += part.shape[0]
        return frames
