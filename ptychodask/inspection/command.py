"""`ingest` commands for a file's options and a turn of its positions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.io.formats import open_container, options_of
from ptychodask.io.source import rotation_matrix
from ptychodask.scan import Domain, Scan

DIGITS = 9
"""Significant digits of the numbers in a command."""


@dataclass(frozen=True)
class PositionTurn:
    """Linear map of positions (y, x), such as a rotation or reflection.

    Examples
    --------
    >>> PositionTurn.of(np.array([[0, 1], [-1, 0]])).name
    '--swap-xy --flip-x'
    >>> PositionTurn.by(30, mirrored=True).name
    '--flip-x, then turned by 30 degrees'
    """

    rows: tuple[float, float, float, float]
    """Matrix elements row by row, as in `IngestSpec.affine`."""

    @classmethod
    def of(cls, matrix: NDArray[Any]) -> PositionTurn:
        """From a matrix (2, 2)."""
        # Adding 0 turns -0 into 0.
        a, b, c, d = (float(value) for value in np.round(np.asarray(matrix, np.float64), DIGITS).ravel() + 0.0)
        return cls((a, b, c, d))

    @classmethod
    def by(cls, angle_deg: float, *, mirrored: bool = False) -> PositionTurn:
        """Rotation from +x toward +y, after x -> -x if `mirrored`.

        It is clockwise on a screen, where y points down.
        """
        return cls.of(rotation_matrix(angle_deg) @ np.diag([1.0, -1.0 if mirrored else 1.0]))

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Matrix (2, 2)."""
        return np.reshape(self.rows, (2, 2))

    @property
    def is_mirrored(self) -> bool:
        """True if the transform is a reflection (det < 0)."""
        return bool(np.linalg.det(self.matrix) < 0)

    @property
    def angle_deg(self) -> float:
        """Rotation angle as in `by`, 0 to 360 degrees."""
        sign = -1.0 if self.is_mirrored else 1.0
        return float(np.rad2deg(np.arctan2(sign * self.rows[1], self.rows[0])) % 360)

    @property
    def flags(self) -> dict[str, bool] | None:
        """Equivalent options `swap_xy`, `flip_y`, `flip_x`; None if there are none."""
        size = np.abs(self.matrix)
        for swap, axes in ((False, np.eye(2)), (True, np.eye(2)[::-1])):
            if np.array_equal(size, axes):
                signs = self.matrix.sum(axis=1)
                given = {"swap_xy": swap, "flip_y": signs[0] < 0, "flip_x": signs[1] < 0}
                return {name: True for name, is_set in given.items() if is_set}
        return None

    @property
    def effort(self) -> int:
        """Number of flags needed; 4 if it needs a matrix."""
        return 4 if self.flags is None else len(self.flags)

    @property
    def name(self) -> str:
        """Flags of `ingest`, or a description in words."""
        if self.flags is not None:
            return " ".join(f"--{name.replace('_', '-')}" for name in self.flags) or "as they are"
        mirrored = "--flip-x, then " if self.is_mirrored else ""
        return f"{mirrored}turned by {self.angle_deg:g} degrees"

    def inverts(self, other: PositionTurn) -> bool:
        """True if it equals `other` followed by a rotation of 180°."""
        return bool(np.allclose(self.matrix, -other.matrix, atol=1e-6))


@dataclass(frozen=True)
class Origin:
    """Source of a scan: file, reader and options."""

    source: Path
    reader: str
    options: Mapping[str, Any]
    """Fields of `IngestSpec` that differ from their defaults."""

    domain: Domain
    """Unit of the patterns."""

    @classmethod
    def of(cls, scan: Scan) -> Origin | None:
        """Source recorded in a store; None for a simulated scan."""
        provenance = scan.attributes.get("provenance")
        if not isinstance(provenance, dict) or not {"source", "reader", "options"} <= set(provenance):
            return None
        return cls(Path(provenance["source"]), provenance["reader"], provenance["options"], scan.domain)

    def turned(self, turn: PositionTurn) -> Origin:
        """The same source with its positions turned further."""
        options = dict(self.options)
        before = np.diag([-1.0 if options.pop(name, False) else 1.0 for name in ("flip_y", "flip_x")])
        before = before @ (np.eye(2)[::-1] if options.pop("swap_xy", False) else np.eye(2))
        before = rotation_matrix(options.pop("rotation_deg", 0.0)) @ before
        total = PositionTurn.of(turn.matrix @ np.reshape(options.pop("affine", (1, 0, 0, 1)), (2, 2)) @ before)
        if total.flags == {}:
            return Origin(self.source, self.reader, options, self.domain)
        mapped = self._mapped(options)
        if total.flags is not None and "flip_y" in options_of(mapped.reader):
            return Origin(self.source, mapped.reader, {**mapped.options, **total.flags}, self.domain)
        return Origin(self.source, mapped.reader, {**mapped.options, "affine": total.rows}, self.domain)

    def _mapped(self, options: dict[str, Any]) -> Origin:
        """The same source read by keys, without the object of the file.

        The object of a PtychoPINN file does not fit turned positions.
        """
        if self.reader != "ptychopinn" or not self.source.is_file():
            return Origin(self.source, self.reader, options, self.domain)
        with ExitStack() as stack:
            file_keys = open_container(self.source, self.source.parent, stack).keys()
        if "objectGuess" not in file_keys:
            return Origin(self.source, self.reader, options, self.domain)
        patterns = "diff3d" if "diff3d" in file_keys else "diffraction"
        keys = {
            "diffraction": patterns,
            "y": "ycoords",
            "x": "xcoords",
            "probe": "probeGuess",
            "scan_index": "scan_index",
        }
        keys = {name: key for name, key in keys.items() if key in file_keys}
        scale = {"calibration": "as_given"} if "probe" in keys else {}
        return Origin(
            self.source,
            "mapping",
            {"keys": keys, "domain": self.domain, "units": "px", **scale, **options},
            self.domain,
        )

    def command(self, store: str | None = None) -> str:
        """`ingest` command that makes the store, quoted for a shell."""
        return ingest_command(self.source, store or store_name(self.source), self.options)


def turned_command(origin: Origin | None, turn: PositionTurn) -> str | None:
    """`ingest` command that turns positions further.

    None if the scan was not ingested, or the positions are already right.
    """
    if origin is None or turn.flags == {}:
        return None
    return origin.turned(turn).command()


def store_name(source: Path) -> str:
    """Default name of the store for a file, in the current folder.

    Examples
    --------
    >>> store_name(Path("/data/siemens-star.npz.bz2"))
    'siemens-star.zarr'
    >>> store_name(Path("/data/raw.zarr"))
    'raw-scan.zarr'
    """
    stem = source.name.removesuffix(".bz2").rsplit(".", 1)[0]
    return f"{stem}-scan.zarr" if source.name.endswith(".zarr") else f"{stem}.zarr"


def ingest_command(source: Path, store: str, options: Mapping[str, Any]) -> str:
    """`ingest` command with `IngestSpec` fields as flags, quoted for a shell.

    Examples
    --------
    >>> options = {"keys": {"diffraction": "my dp"}, "flip_y": True, "affine": (0, 1, -1, 0)}
    >>> ingest_command(Path("raw.h5"), "raw.zarr", options)
    "ptychodask ingest raw.h5 raw.zarr --key 'diffraction=my dp' --flip-y --affine=0,1,-1,0"
    """
    return shlex.join(["ptychodask", "ingest", str(source), store, *_flags(options)])


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "keys":
            flags += [part for pair in value.items() for part in ("--key", "=".join(pair))]
        elif value is True:
            flags.append(flag)
        elif name in ("affine", "step", "rotation_deg"):
            # After an equals sign, because the value may begin with a minus.
            flags.append(f"{flag}={_listed(value)}")
        else:
            flags += [flag, value if isinstance(value, str) else _listed(value)]
    return flags


def _listed(value: Any) -> str:
    if isinstance(value, slice):
        return f"{'' if value.start is None else value.start}:{'' if value.stop is None else value.stop}"
    if isinstance(value, float | np.floating):
        return f"{value:.{DIGITS}g}"
    return ",".join(map(_listed, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
