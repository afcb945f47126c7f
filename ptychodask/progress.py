"""Progress bars in a terminal or a notebook, or none."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ptychodask.html import Markup, tag

NOTEBOOK_REFRESH_S = 0.2
"""Shortest time between two updates of a bar in a notebook, seconds."""


class Progress(Protocol):
    """Interface through which a stage reports its progress."""

    def advance(self, amount: int = 1) -> None:
        """Report that `amount` more units are done."""

    def expect(self, total: int) -> None:
        """Correct the total number of units."""

    def note(self, text: str) -> None:
        """Show a short text (a loss, a rate) beside the bar."""


class _Silent:
    def advance(self, amount: int = 1) -> None:
        pass

    def expect(self, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class NotebookBar:
    """Progress bar in a notebook: an HTML element, replaced at each update.

    Parameters
    ----------
    label, unit : str
    total : int
        As for `progress_bar`.
    show : callable
        Displays the bar, given as HTML, in place of the previous one.
    """

    def __init__(self, label: str, total: int, unit: str, show: Callable[[Markup], None]) -> None:
        self._label, self._total, self._unit, self._show = label, total, unit, show
        self._done, self._note = 0, ""
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._shown = self._started - NOTEBOOK_REFRESH_S

    def advance(self, amount: int = 1) -> None:
        with self._changing():
            self._done += amount

    def expect(self, total: int) -> None:
        with self._changing():
            self._total = total

    def note(self, text: str) -> None:
        with self._changing():
            self._note = text

    def finish(self) -> None:
        """Show the final state, however little time has passed."""
        with self._lock:
            self._show(self.markup())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            yield
            now = time.monotonic()
            if now - self._shown >= NOTEBOOK_REFRESH_S:
                self._shown = now
                self._show(self.markup())

    def markup(self) -> Markup:
        """Bar with amount, rate, time remaining or taken, and note."""
        elapsed = time.monotonic() - self._started
        rate = self._done / elapsed if elapsed else 0.0
        left = (
            f"{(self._total - self._done) / rate:,.0f} s left" if 0 < self._done < self._total else f"{elapsed:,.0f} s"
        )
        text = f"{self._done:,}/{self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s, {left} {self._note}"
        bar = tag("progress", value=str(self._done), max=str(max(self._total, 1)), style="width: 16em")
        style = "display: flex; flex-wrap: wrap; gap: 0.8em; align-items: center"
        return tag("div", tag("span", self._label), bar, tag("span", text), style=style)


def in_notebook() -> bool:
    """True if this process serves a notebook that shows pictures and HTML."""
    from rich.console import Console

    return Console(stderr=True).is_jupyter


@contextmanager
def _notebook_bar(label: str, total: int, unit: str) -> Iterator[Progress]:
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    bar = NotebookBar(label, total, unit, lambda markup: handle.update(HTML(markup)))
    try:
        yield bar
    finally:
        bar.finish()


@contextmanager
def progress_bar(label: str, total: int, unit: str, progress: bool | None = None) -> Iterator[Progress]:
    """Show the progress, rate and remaining time of a stage.

    Parameters
    ----------
    label : str
        Name of the stage.
    total : int
        Total number of units.
    unit : str
        Name of one unit, plural ("patterns", "groups").
    progress : bool, optional
        True shows the bar, False does not; None shows it only in a terminal or a notebook.

    Yields
    ------
    Progress

    Examples
    --------
    >>> with progress_bar("read", 3, "patterns", progress=False) as bar:
    ...     bar.advance(3)
    """
    from rich.console import Console

    console = Console(stderr=True)
    if progress is None:
        progress = console.is_jupyter or (console.is_terminal and sys.stderr.isatty())
    if not progress:
        yield _Silent()
        return
    if console.is_jupyter:
        # The notebook bar of rich stays at its last but one state.
        with _notebook_bar(label, total, unit) as bar:
            yield bar
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
    with RichProgress(*columns, console=console) as shown:
        task = shown.add_task(label, total=total, note="")

        class Bar:
            def advance(self, amount: int = 1) -> None:
                shown.update(task, advance=amount)

            def expect(self, total: int) -> None:
                shown.update(task, total=total)

            def note(self, text: str) -> None:
                shown.update(task, note=text)

        yield Bar()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard stderr output of libraries, for all threads.

    Libraries such as TensorFlow write start-up messages past Python's `sys.stderr`.
    """
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
