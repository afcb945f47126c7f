"""Command line, a thin layer over the public functions.

Flags are named like the functions' arguments.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ptychodask.cli.fields import typer_command
from ptychodask.cli.formats import export
from ptychodask.cli.jobs import submit
from ptychodask.cli.judging import compare, report, residuals, study
from ptychodask.cli.networks import train
from ptychodask.cli.runs import bench, demo, plan, reconstruct, run
from ptychodask.cli.scans import check, group, ingest, inspect, refine_probe, set, simulate
from ptychodask.errors import PtychodaskError


class Commands(TyperGroup):
    """Commands that get the options of their specs when they are used."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        listed: Any = command and command.callback
        return name, listed and typer_command(listed.__wrapped__), rest


app = typer.Typer(
    cls=Commands,
    name="ptychodask",
    help="Reconstruct ptychography scans with neural networks, chunk by chunk, on one or many workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
"""Exit code of a command stopped by Ctrl-C."""

TERMINATED = 143
"""Exit code of a command stopped by SIGTERM."""
COMMANDS = (
    demo,
    run,
    inspect,
    check,
    ingest,
    simulate,
    group,
    refine_probe,
    set,
    train,
    plan,
    reconstruct,
    submit,
    compare,
    residuals,
    study,
    report,
    export,
    bench,
)
"""Commands in the order of `--help`."""

for command in COMMANDS:
    app.command()(command)


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Raise `SystemExit` on SIGTERM, so that finished work is kept.

    Batch systems send SIGTERM before the time limit of a job.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line.

    Bad input ends with one line on standard error and exit code 2.
    """
    try:
        with stopping_on_sigterm():
            app()
    except SystemExit as stop:
        if stop.code in (INTERRUPTED, TERMINATED):
            typer.echo("ptychodask: stopped; continue reconstruct or train with --resume", err=True)
        raise
    except MemoryError as error:
        typer.echo(f"ptychodask: not enough memory ({error}); use smaller sizes, or crop the patterns", err=True)
        sys.exit(2)
    except PtychodaskError as error:
        typer.echo(f"ptychodask: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"ptychodask: {error.filename or 'the system'}: {error.strerror or error}", err=True)
        sys.exit(2)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(version("ptychodask"))
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log one line per stage.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_is_shown)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def _is_shown(record: logging.LogRecord) -> bool:
    """True for log records of ptychodask, and for errors of other loggers.

    Dask's loggers set their own level and warn of slow workers. Its report of a failed task is left out, since the user
    gets our one-line message instead.
    """
    if record.name.startswith("ptychodask"):
        return True
    return record.levelno >= logging.ERROR and not str(record.msg).startswith("Compute Failed")
