"""One progress interface for every stage: a bar in a terminal or a notebook, or nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a stage reports to while it works."""

    def advance(self, amount: int = 1) -> None:
        """Say that `amount` more units are done."""

    def expect(self, total: int) -> None:
        """Correct the number of units in all."""

    def note(self, text: str) -> None:
        """Show a short text (a loss, a rate) beside the bar."""


class _Silent:
    def advance(self, amount: int = 1) -> None:
        pass

    def expect(self, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def show_progress(label: str, total: int, unit: str, show: bool | None = None) -> Iterator[Progress]:
    """Show how far a stage has come, with its rate and the time that remains.

    Parameters
    ----------
    label : str
        What is being done.
    total : int
        Units in all.
    unit : str
        Name of one unit, plural ("patterns", "groups").
    show : bool, optional
        True shows the bar, False does not; None shows it in a terminal and in Jupyter only.

    Yields
    ------
    Progress

    Examples
    --------
    >>> with show_progress("read", 3, "patterns", show=False) as progress:
    ...     progress.advance(3)
    """
    from rich.console import Console

    console = Console(stderr=True)
    if show is None:
        show = console.is_jupyter or (console.is_terminal and sys.stderr.isatty())
    if not show:
        yield _Silent()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task):  # type: ignore[no-untyped-def]
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s")

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, note="")

        class Bar:
            def advance(self, amount: int = 1) -> None:
                bar.update(task, advance=amount)

            def expect(self, total: int) -> None:
                bar.update(task, total=total)

            def note(self, text: str) -> None:
                bar.update(task, note=text)

        yield Bar()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what libraries write past Python, as TensorFlow's start-up notes, off the terminal, for all threads."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
