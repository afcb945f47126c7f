"""The command line: a thin skin over the public functions. Flags are named like their arguments."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from ptychodask.cli.formats import export
from ptychodask.cli.jobs import submit
from ptychodask.cli.judging import compare, report, residuals, study
from ptychodask.cli.networks import train
from ptychodask.cli.runs import bench, demo, plan, reconstruct
from ptychodask.cli.scans import group, ingest, inspect, refine_probe, simulate
from ptychodask.scan import PtychodaskError

app = typer.Typer(
    name="ptychodask",
    help="Reconstruct ptychography scans with neural networks, chunk by chunk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped."""

TERMINATED = 143
"""Exit code of a command that SIGTERM stopped."""
COMMANDS = (
    demo,
    inspect,
    ingest,
    simulate,
    group,
    refine_probe,
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
"""In the order that `--help` lists them."""

for command in COMMANDS:
    app.command()(command)


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Leave a block by `SystemExit` when SIGTERM comes, so that it cleans up and keeps what is finished.

    Batch systems send it before a job's time is over.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; bad input ends in one line on standard error and exit code 2."""
    try:
        with stopping_on_sigterm():
            app()
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, TERMINATED):
            typer.echo("ptychodask: stopped; reconstruct and train go on with --resume", err=True)
        raise
    except MemoryError as error:
        typer.echo(f"ptychodask: not enough memory ({error}); ask for less, or crop", err=True)
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
    handler.addFilter(_is_worth_showing)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Whether a log line is ours or an error: Dask's loggers set a level of their own and speak of slow workers.

    What a task raised reaches the user as our own one line, so Dask's account of it stays away.
    """
    if record.name.startswith("ptychodask"):
        return True
    return record.levelno >= logging.ERROR and not str(record.msg).startswith("Compute Failed")
