"""Result of `inspect`: arrays, findings, problems, and the next command."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptychodask.inspection.arrays import ArrayNote
from ptychodask.io.evidence import Certainty
from ptychodask.io.recipe import as_yaml
from ptychodask.judging.plotting import plot_patterns

WIDTH = 110
"""Characters in a line of text."""

MOST_ARRAYS = 40
"""Arrays that the text lists; the JSON lists all."""


@dataclass(frozen=True)
class Finding:
    """A statement and its basis."""

    topic: str
    statement: str
    certainty: Certainty

    def as_json(self) -> dict[str, str]:
        return {"topic": self.topic, "statement": self.statement, "certainty": self.certainty}


@dataclass(frozen=True, eq=False)
class Preview:
    """Arrays of the preview figure."""

    mean: NDArray[np.float64]
    """Mean counts (h, w), with the beam in the middle."""

    patterns: dict[int, NDArray[np.float64]]
    """Counts (h, w) by row of the file."""

    position_yx: NDArray[np.float64] | None
    """Positions (pattern, 2)."""

    unit: str
    """Unit of the positions."""


def plot_preview(preview: Preview, path: str | Path) -> None:
    """Write the preview figure (see `plot_patterns`)."""
    plot_patterns(
        preview.mean,
        {f"row {row}": pattern for row, pattern in preview.patterns.items()},
        preview.position_yx,
        unit=preview.unit,
        path=path,
    )


@dataclass(frozen=True, eq=False)
class Inspection:
    """Contents of a file or a store; prints as text."""

    label: str
    """The file or store."""

    what: str
    """Kind of file or store, in one line."""

    arrays: Sequence[ArrayNote]
    findings: Sequence[Finding]

    refused: Sequence[str] = ()
    """Reasons why `ingest` would fail."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `IngestSpec` proposed for the file."""

    command: str | None = None
    """Command to run next."""

    preview: Preview | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from (f"{self.label}: {self.what}", "")
        yield from _table(self.arrays[:MOST_ARRAYS])
        if len(self.arrays) > MOST_ARRAYS:
            yield f"  ... and {len(self.arrays) - MOST_ARRAYS} more"
        yield ""
        for finding in self.findings:
            line = f"{finding.topic:<12}{finding.statement} [{finding.certainty}]"
            yield from textwrap.wrap(line, WIDTH, subsequent_indent=" " * 12, break_long_words=False)
        for reason in self.refused:
            yield from textwrap.wrap(f"refused     {reason}", WIDTH, subsequent_indent=" " * 12)
        if self.command:
            yield from ("", *(["after fixing that:"] if self.refused else []), f"  {self.command}")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "where": self.label,
            "what": self.what,
            "arrays": [
                {"key": n.key, "shape": list(n.shape), "dtype": n.dtype, "unit": n.unit, "role": n.role}
                for n in self.arrays
            ],
            "findings": [finding.as_json() for finding in self.findings],
            "refused": list(self.refused),
            "options": {name: list(v) if isinstance(v, tuple) else v for name, v in self.options.items()},
            "command": self.command,
        }

    def as_yaml(self) -> str:
        """The options as a YAML recipe, with the findings as comments."""
        notes = [f"# {finding.topic}: {finding.statement} [{finding.certainty}]" for finding in self.findings]
        notes = [f"# {self.label}", *(line.replace("\n", " ") for line in notes)]
        return "\n".join(notes) + "\n" + (as_yaml(self.options) if self.options else "{}\n")


def _table(notes: Sequence[ArrayNote]) -> Iterator[str]:
    if not notes:
        return
    rows = [(n.key, str(n.shape), n.dtype, n.unit or "", f"-> {n.role}" if n.role else "") for n in notes]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *parts, role in rows:
        yield (
            "  " + "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)) + "  " + role
        ).rstrip()
