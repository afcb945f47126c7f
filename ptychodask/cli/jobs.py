"""Commands for batch systems: submit."""

from __future__ import annotations

from typing import Annotated

import typer

from ptychodask.cli.flags import Store, given


def submit(
    store: Store,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of reconstruct, after --.", show_default=False)
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Number of workers with one GPU each.")] = None,
    workers: Annotated[int | None, typer.Option(help="Number of workers without a GPU.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Wall-time limit as HH:MM, HH:MM:SS or minutes; by default 01:00.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPU cores per worker.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per worker, such as 16GB.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes; by default the batch system chooses.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job and its log.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition, or PBS queue.")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Required features of SLURM nodes, such as a100|h100.")] = None,
    module: Annotated[list[str] | None, typer.Option(help="Environment module to load. Repeatable.")] = None,
    line: Annotated[
        list[str] | None, typer.Option(help="Shell line to run at the start, after the modules. Repeatable.")
    ] = None,
    directive: Annotated[
        list[str] | None, typer.Option(help="Further directive, such as --directive=--exclusive. Repeatable.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder for the log, shared by all nodes; by default the folder of the store.")
    ] = None,
    scratch: Annotated[
        str | None, typer.Option(help="Local folder of each node for data that do not fit into memory.")
    ] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface between nodes, such as ib0.")] = None,
    python: Annotated[str | None, typer.Option(help="Python interpreter with ptychodask; by default this one.")] = None,
    requeue: Annotated[
        bool | None,
        typer.Option("--requeue/--no-requeue", help="Put the job back into the queue after its time limit, to resume."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Batch system: slurm, or pbs (a template, only with --dry-run).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script without submitting it.")] = False,
) -> None:
    """Reconstruct a scan in a SLURM job.

    The job starts a scheduler, one worker per GPU, and reconstruct. After its
    time limit it is requeued and resumes.

    Example: ptychodask submit scan.zarr --gpus 8 --time 00:20 --partition gpu -- --polish 2
    """
    from ptychodask.cluster.job import JobSpec
    from ptychodask.cluster.submission import batch_script, submit

    spec = JobSpec(
        **given(
            gpus=gpus,
            workers=workers,
            time=time,
            cpus=cpus,
            memory=memory,
            nodes=nodes,
            name=name,
            account=account,
            partition=partition,
            qos=qos,
            constraint=constraint,
            modules=tuple(module) if module else None,
            lines=tuple(line) if line else None,
            directives=tuple(directive) if directive else None,
            folder=folder,
            scratch=scratch,
            interface=interface,
            python=python,
            requeue=requeue,
            system=system,
        )
    )
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

    app = typer.Typer(add_completion=False)
    app.command()(reconstruct)
    typer.main.get_command(app).make_context("ptychodask reconstruct", [store, *options])
