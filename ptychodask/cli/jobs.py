"""Commands that hand runs to batch systems: submit."""

from __future__ import annotations

from typing import Annotated

import typer

from ptychodask.cli.flags import Store, given


def submit(
    store: Store,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of reconstruct, behind --.", show_default=False)
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Workers with one GPU each.")] = None,
    workers: Annotated[int | None, typer.Option(help="Workers without a GPU.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit, as HH:MM, HH:MM:SS or minutes; by default 01:00.")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores of one worker.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one worker, such as 16GB.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines that the workers are spread over.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the job and its log.")] = None,
    account: Annotated[str | None, typer.Option(help="Whom the time is charged to.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition, or queue.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    module: Annotated[list[str] | None, typer.Option(help="Environment module to load; several by repeating.")] = None,
    line: Annotated[list[str] | None, typer.Option(help="Shell line to run first; several by repeating.")] = None,
    directive: Annotated[
        list[str] | None, typer.Option(help="Further directive, as --directive=--exclusive; several by repeating.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder that all nodes see, for the log; by default the store's.")
    ] = None,
    scratch: Annotated[str | None, typer.Option(help="Folder of each node for what memory does not hold.")] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface between nodes, such as ib0.")] = None,
    python: Annotated[str | None, typer.Option(help="Interpreter with ptychodask; by default this one.")] = None,
    requeue: Annotated[
        bool | None, typer.Option("--requeue/--no-requeue", help="Whether it goes on after its time limit.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="slurm, or pbs: a template for --dry-run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
) -> None:
    """Reconstruct in one job of SLURM: scheduler, a worker per GPU, and the run, which goes on after its time limit.

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
    typer.echo(f"job {job.number}: its log is {job.log}, its script {job.script}")


def _check_options(store: str, options: list[str]) -> None:
    """End as `reconstruct` would for options that it does not take, before they wait in a queue."""
    from ptychodask.cli.runs import reconstruct

    app = typer.Typer(add_completion=False)
    app.command()(reconstruct)
    typer.main.get_command(app).make_context("ptychodask reconstruct", [store, *options])
