"""Supervised labels of a file: complex, or amplitudes and phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.errors import PtychodaskError
from ptychodask.io.source import Container, Frames


def labels_of(container: Container, keys: Mapping[str, str], *, pattern_last: bool) -> Frames | None:
    """Labels (pattern, h, w); None if no key names any.

    Parameters
    ----------
    container : Container
        The file.
    keys : mapping
        ``label``, or ``label_amp`` and ``label_phase`` (radians), to keys of the file.
    pattern_last : bool
        True if labels are (h, w, pattern).

    Raises
    ------
    PtychodaskError
        If amplitudes and phases differ in shape, or are not real numbers.
    """
    if "label" in keys:
        return container.frames(keys["label"], pattern_last=pattern_last, raster=True)
    if "label_amp" not in keys:
        return None
    amplitude, phase = (
        container.frames(keys[name], pattern_last=pattern_last, raster=True) for name in ("label_amp", "label_phase")
    )
    if amplitude.shape != phase.shape or {amplitude.dtype.kind, phase.dtype.kind} - set("iuf"):
        raise PtychodaskError(
            f"{container.label}: '{keys['label_amp']}' has shape {amplitude.shape} and type {amplitude.dtype}, "
            f"'{keys['label_phase']}' {phase.shape} and {phase.dtype}, expected real numbers of one shape; "
            "map other keys"
        )
    return _PolarFrames(amplitude, phase)


@dataclass(frozen=True)
class _PolarFrames:
    """Complex frames of amplitudes and phases."""

    amplitude: Frames
    phase: Frames

    @property
    def shape(self) -> tuple[int, ...]:
        return self.amplitude.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.complex64)

    @property
    def random_access(self) -> bool:
        return self.amplitude.random_access and self.phase.random_access

    @property
    def seekable(self) -> bool:
        return self.amplitude.seekable and self.phase.seekable

    def blocks(self) -> Iterator[NDArray[Any]]:
        phases, phase = self.phase.blocks(), np.empty((0, *self.shape[1:]))
        for amplitude in self.amplitude.blocks():
            # The blocks of both differ in length if their types do.
            while len(phase) < len(amplitude):
                phase = np.concatenate([phase, next(phases)])
            yield _complex(amplitude, phase[: len(amplitude)])
            phase = phase[len(amplitude) :]

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        return _complex(self.amplitude[index], self.phase[index])


def _complex(amplitude: NDArray[Any], phase: NDArray[Any]) -> NDArray[np.complex64]:
    return (amplitude * np.exp(1j * phase.astype(np.float64))).astype(np.complex64)
