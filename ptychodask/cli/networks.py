"""Commands for networks: train."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ptychodask.cli.fields import options_of
from ptychodask.cli.flags import Overwrite, Quiet, progress_option


class ModelKind(StrEnum):
    """Networks that can be trained."""

    pinn = "pinn"
    baseline = "baseline"


@options_of("ptychodask.training.spec", "TrainingSpec")
def train(
    store: Annotated[
        list[Path],
        typer.Argument(
            help="Store of the scan, or several of the same pattern size to train on together.", show_default=False
        ),
    ],
    model: Annotated[ModelKind, typer.Option(help="Network to train.")] = ModelKind.pinn,
    out: Annotated[Path | None, typer.Option(help="Model bundle to write; by default beside the store.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="Model bundle with the initial weights, or pretrained:NAME.")
    ] = None,
    *,
    log_to: Annotated[str | None, typer.Option(help="Log metrics to tensorboard:FOLDER or mlflow:URI.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last epoch.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Train a network on one or several scans.

    The model is recorded in each store, where reconstruct finds it.

    Example: ptychodask train scan.zarr --max-minutes 10

    Example: ptychodask train a.zarr b.zarr --out both.model --epochs 20 --patience 3 --resume
    """
    from ptychodask.training.train import train

    trained = train(
        store,
        model=model.value,
        out=out,
        initial=initial,
        resume=resume,
        overwrite=overwrite,
        log_to=log_to,
        progress=progress_option(quiet),
        **fields,
    )
    from ptychodask.models.description import epochs_of

    last = trained.history[-1]
    best = min(entry["held_out_loss"] for entry in trained.history)
    n_epochs = epochs_of(trained.history)
    typer.echo(f"{trained.path}: {n_epochs} epochs in {last['seconds']:.0f} s, lowest held-out loss {best:.4g}")
