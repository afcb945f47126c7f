"""Commands for networks: train."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import Overwrite, Quiet, given, numbers_in, progress_option
from ptychodask.progress import quiet_stderr


class ModelKind(StrEnum):
    """Networks that can be trained."""

    pinn = "pinn"
    baseline = "baseline"


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
    members: Annotated[int | None, typer.Option(help="Patterns in one group.")] = None,
    neighbours: Annotated[
        int | None, typer.Option(help="Number of nearest positions from which members are drawn.")
    ] = None,
    oversampling: Annotated[int | None, typer.Option(help="Number of groups drawn for each pattern.")] = None,
    n_filters_scale: Annotated[
        int | None, typer.Option(help="Width of the network: multiplies its number of filters.")
    ] = None,
    levels: Annotated[int | None, typer.Option(help="Number of downsampling steps of the U-Net.")] = None,
    projections_before: Annotated[int | None, typer.Option(help="Data-consistency steps before the U-Net.")] = None,
    projections_after: Annotated[int | None, typer.Option(help="Data-consistency steps after the U-Net.")] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum of the data-consistency steps, 0 to 1 (default 0.8).")
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Add self-attention at the bottom of the U-Net.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Largest number of epochs.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a lower held-out loss.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one batch.")] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Number of batches whose gradients are averaged into one step.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Number of devices that share each batch.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of the convolutions: float32, or mixed (bfloat16).")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    scale_learning_rate: Annotated[
        bool,
        typer.Option("--scale-learning-rate", help="Multiply the learning rate by (groups per step) / 16."),
    ] = False,
    schedule: Annotated[str | None, typer.Option(help="Learning-rate schedule: cosine, constant or plateau.")] = None,
    loss: Annotated[str | None, typer.Option(help="Loss function: amplitude, mae, poisson or staged.")] = None,
    tv: Annotated[float | None, typer.Option(help="Weight of the total variation of the patches.")] = None,
    real_space: Annotated[
        float | None, typer.Option(help="Weight of the mismatch between overlapping patches of a group.")
    ] = None,
    probe_rate: Annotated[
        float | None, typer.Option(help="Also fit the probe, at this multiple of the learning rate; 0 keeps it fixed.")
    ] = None,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder", help="Freeze the U-Net's encoder at the weights of --initial.")
    ] = False,
    validation: Annotated[
        str | None,
        typer.Option(help="Held-out patterns: random, or on one side of the scan (left, right, top, bottom)."),
    ] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Fraction of the patterns held out.")] = None,
    exclude: Annotated[
        Path | None, typer.Option(help=".npy file of pattern indices to exclude from training and validation.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of split, groups, weights and order.")] = None,
    log_to: Annotated[str | None, typer.Option(help="Log metrics to tensorboard:FOLDER or mlflow:URI.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last epoch.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on one or several scans.

    The model is recorded in each store, where reconstruct finds it.

    Example: ptychodask train scan.zarr --max-minutes 10

    Example: ptychodask train a.zarr b.zarr --out both.model --epochs 20 --patience 3 --resume
    """
    with quiet_stderr():
        from ptychodask.training.train import train
    options = given(
        members=members,
        neighbours=neighbours,
        oversampling=oversampling,
        n_filters_scale=n_filters_scale,
        levels=levels,
        projections_before=projections_before,
        projections_after=projections_after,
        momentum=momentum,
        attention=attention or None,
        epochs=epochs,
        max_minutes=max_minutes,
        patience=patience,
        batch_size=batch_size,
        accumulation=accumulation,
        devices=devices,
        precision=precision,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate or None,
        schedule=schedule,
        loss=loss,
        tv=tv,
        real_space=real_space,
        probe_rate=probe_rate,
        freeze_encoder=freeze_encoder or None,
        validation=validation,
        validation_fraction=validation_fraction,
        exclude=None if exclude is None else numbers_in("--exclude", exclude, "pattern indices"),
        seed=seed,
    )
    trained = train(
        store,
        model=model.value,
        out=out,
        initial=initial,
        resume=resume,
        overwrite=overwrite,
        log_to=log_to,
        progress=progress_option(quiet),
        **options,
    )
    last = trained.history[-1]
    best = min(entry["held_out_loss"] for entry in trained.history)
    typer.echo(
        f"{trained.path}: {len(trained.history)} epochs in {last['seconds']:.0f} s, lowest held-out loss {best:.4g}"
    )
