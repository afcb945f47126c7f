"""Commands that make networks: train."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ptychodask.cli.flags import Overwrite, Quiet, given, numbers_in, progress_option
from ptychodask.progress import quiet_stderr


class ModelKind(StrEnum):
    """The two networks."""

    pinn = "pinn"
    baseline = "baseline"


def train(
    store: Annotated[
        list[Path],
        typer.Argument(help="The scan's store, or several of one N to train on at once.", show_default=False),
    ],
    model: Annotated[ModelKind, typer.Option(help="Which network.")] = ModelKind.pinn,
    out: Annotated[Path | None, typer.Option(help="Bundle to write; by default beside the store.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="Bundle whose weights to start from, or pretrained:NAME.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="Patterns in one group.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Nearest positions that members are drawn from.")] = None,
    oversampling: Annotated[int | None, typer.Option(help="Groups that each pattern seeds.")] = None,
    n_filters_scale: Annotated[int | None, typer.Option(help="Width of the network.")] = None,
    levels: Annotated[int | None, typer.Option(help="How often the U-Net halves its resolution.")] = None,
    projections_before: Annotated[int | None, typer.Option(help="Data-consistent steps before the U-Net.")] = None,
    projections_after: Annotated[int | None, typer.Option(help="Data-consistent steps after the U-Net.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Share of a step that the next one goes on with.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Self-attention at the bottom of the U-Net.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the groups at most.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a lower held-out loss.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches whose gradients make one step.")] = None,
    devices: Annotated[int | None, typer.Option(help="Devices that share each batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or mixed.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Rate at the start.")] = None,
    scale_learning_rate: Annotated[
        bool,
        typer.Option("--scale-learning-rate", help="Scale the rate with the groups in a step; 16 leave it as it is."),
    ] = False,
    schedule: Annotated[str | None, typer.Option(help="Of the rate: cosine, constant or plateau.")] = None,
    loss: Annotated[str | None, typer.Option(help="amplitude, mae, poisson or staged.")] = None,
    tv: Annotated[float | None, typer.Option(help="Weight of the patches' total variation.")] = None,
    real_space: Annotated[
        float | None, typer.Option(help="Weight of the members' disagreement where they overlap.")
    ] = None,
    probe_rate: Annotated[
        float | None, typer.Option(help="Fit the probe too, this many times as fast as the weights.")
    ] = None,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder", help="Keep the way down of the U-Net as in --initial.")
    ] = False,
    validation: Annotated[str | None, typer.Option(help="Held out: random, left, right, top or bottom.")] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Share of the patterns held out.")] = None,
    exclude: Annotated[Path | None, typer.Option(help=".npy of pattern indices that training never sees.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, groups, weights and order.")] = None,
    log_to: Annotated[str | None, typer.Option(help="tensorboard:FOLDER or mlflow:URI.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last epoch of a stopped run.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on one scan or on several at once; each store records it.

    Example: ptychodask train scan.zarr --max-minutes 10

    Example: ptychodask train a.zarr b.zarr --out both.model --epochs 20 --patience 3 --resume
    """
    with quiet_stderr():
        from ptychodask.training import train
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
