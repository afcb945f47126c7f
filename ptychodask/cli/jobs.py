"""Commands for batch systems: submit."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ptychodask.cli.fields import options_of, typer_command
from ptychodask.cli.flags import Store


@options_of("ptychodask.cluster.job", "JobSpec")
def submit(
    store: Store,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of reconstruct, after --.", show_default=False)
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")] = False,
    **fields: Any,
) -> None:
    """Reconstruct a scan in a SLURM job.

    The job starts a scheduler, one worker per GPU, and reconstruct. After its
    time limit it is requeued and resumes.

    Example: ptychodask submit scan.zarr --gpus 8 --time 00:20 --partition gpu -- --polish 2
    """
    from ptychodask.cluster.job import JobSpec
    from ptychodask.cluster.submission import batch_script, submit

    spec = JobSpec(**fields)
    options = options or []
    _check_options(str(store), options)
    if dry_run:
        typer.echo(batch_script(store, spec, options), nl=False)
        return
    job = submit(store, spec, options)
    typer.echo(f"job {job.number}: log {job.log}, script {job.script}")


def _check_options(store: str, options: list[str]) -> None:
    """Fail for invalid options of `reconstruct` before the job is queued."""
    from ptychodask.cli.runs import reconstruct

    typer_command(reconstruct).make_context("ptychodask reconstruct", [store, *options])
