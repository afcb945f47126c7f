"""The command line: a thin skin over the public functions. Flags are named like their arguments."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ptychodask.progress import quiet_stderr
from ptychodask.scan import PtychodaskError

app = typer.Typer(
    name="ptychodask",
    help="Reconstruct ptychography scans with neural networks, chunk by chunk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Store = Annotated[Path, typer.Argument(help="The scan's store, a folder ending in .zarr.", show_default=False)]
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped."""

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new one is whole.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]


class ModelKind(StrEnum):
    """The two networks."""

    pinn = "pinn"
    baseline = "baseline"


def main() -> None:
    """Run the command line; bad input ends in one line on standard error and exit code 2."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            typer.echo("ptychodask: stopped", err=True)
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


def _bar(quiet: bool) -> bool | None:
    return False if quiet else None


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given, so that every default stays where it is written."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it makes.")] = Path("demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a scan, train both networks on it, reconstruct it and compare with the truth.

    Example: ptychodask demo
    """
    with quiet_stderr():
        from ptychodask.demo import run_demo
    typer.echo(run_demo(out, overwrite=overwrite, progress=_bar(quiet)))


@app.command()
def ingest(
    source: Annotated[Path, typer.Argument(help="NPZ (or .npz.bz2) or HDF5 file.", show_default=False)],
    store: Store,
    format: Annotated[
        str | None, typer.Option(help="ptychopinn, tike or mapping; by default what the keys say.")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="NAME=KEY: the file's key of diffraction, y, x, position, probe, mask, object, label, flux."),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="counts or amplitude.")] = None,
    axes: Annotated[str | None, typer.Option(help="pattern,qy,qx or qy,qx,pattern.")] = None,
    dc: Annotated[str | None, typer.Option(help="Where the direct beam is: centre or corner.")] = None,
    units: Annotated[str | None, typer.Option(help="Of the positions: px, um or m.")] = None,
    flip_y: Annotated[bool, typer.Option("--flip-y", help="y becomes -y.")] = False,
    flip_x: Annotated[bool, typer.Option("--flip-x", help="x becomes -x.")] = False,
    swap_xy: Annotated[bool, typer.Option("--swap-xy", help="y and x change places.")] = False,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a stored pattern: crops or pads.")] = None,
    bin: Annotated[int | None, typer.Option(help="Detector pixels, along each axis, summed into one.")] = None,
    centre: Annotated[str | None, typer.Option(help="The beam's centre: dc, auto, or y,x in pixels.")] = None,
    energy_ev: Annotated[float | None, typer.Option(help="Photon energy.")] = None,
    wavelength_m: Annotated[float | None, typer.Option(help="Wavelength, in place of the energy.")] = None,
    distance_m: Annotated[float | None, typer.Option(help="Sample to detector.")] = None,
    detector_pixel_m: Annotated[float | None, typer.Option(help="Size of a detector pixel.")] = None,
    pixel_size_m: Annotated[float | None, typer.Option(help="Size of an object pixel, as stored.")] = None,
    probe: Annotated[str | None, typer.Option(help="file, disc, zone_plate, estimate, or a .npy or .npz.")] = None,
    probe_diameter_px: Annotated[float | None, typer.Option(help="Of the disc, or of the zone plate's pupil.")] = None,
    probe_stop_px: Annotated[float | None, typer.Option(help="Diameter of the zone plate's stop.")] = None,
    probe_defocus: Annotated[float | None, typer.Option(help="Defocus at the pupil's rim, radians.")] = None,
    probe_defocus_m: Annotated[float | None, typer.Option(help="Distance from the focus, metres.")] = None,
    calibration: Annotated[str | None, typer.Option(help="as_given, incident or mean_counts.")] = None,
    incident_counts: Annotated[float | None, typer.Option(help="Photons per pattern on the sample.")] = None,
    mask: Annotated[Path | None, typer.Option(help=".npy, True where a detector pixel is good.")] = None,
    drop_frames: Annotated[str | None, typer.Option(help='Rows of the file to leave out: "3,10:20".')] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for unpacked data; beside the store by default.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a store from a file of another program.

    Example: ptychodask ingest scan.npz scan.zarr

    Example: ptychodask ingest raw.h5 scan.zarr --key diffraction=entry/data --key y=pos/y --key x=pos/x --domain counts
    """
    from ptychodask.io import ingest

    options = _given(
        keys=_pairs(key),
        domain=domain,
        axes=axes,
        dc=dc,
        units=units,
        n_pixels=n_pixels,
        bin=bin,
        centre=None if centre is None else _centre(centre),
        energy_ev=energy_ev,
        wavelength_m=wavelength_m,
        distance_m=distance_m,
        detector_pixel_m=detector_pixel_m,
        pixel_size_m=pixel_size_m,
        probe=probe,
        probe_diameter_px=probe_diameter_px,
        probe_stop_px=probe_stop_px,
        probe_defocus=probe_defocus,
        probe_defocus_m=probe_defocus_m,
        calibration=calibration,
        incident_counts=incident_counts,
        mask=mask,
        drop_frames=drop_frames,
        scratch=scratch,
        # A format that fixes its axes refuses these flags, so only those that were set are handed on.
        **{name: True for name, set_ in (("flip_y", flip_y), ("flip_x", flip_x), ("swap_xy", swap_xy)) if set_},
    )
    scan = ingest(source, store, format=format, overwrite=overwrite, progress=_bar(quiet), **options)
    typer.echo(f"{store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, {scan.domain}")


def _pairs(keys: list[str] | None) -> dict[str, str] | None:
    if not keys:
        return None
    for text in keys:
        if "=" not in text:
            raise PtychodaskError(f"--key {text}: expected NAME=KEY, for example --key diffraction=entry/data")
    return dict(text.split("=", 1) for text in keys)


def _centre(text: str) -> str | tuple[float, float]:
    if text in ("dc", "auto"):
        return text
    y, x = _numbers("--centre", text, 2)
    return y, x


def _numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise PtychodaskError(f"{flag} {text}: expected {count} numbers with commas between them")
    return values


def _whole_numbers(flag: str, text: str, count: int) -> tuple[int, ...]:
    values = _numbers(flag, text, count)
    if not all(value.is_integer() for value in values):
        raise PtychodaskError(f"{flag} {text}: expected whole numbers")
    return tuple(int(value) for value in values)


@app.command()
def simulate(
    store: Store,
    object: Annotated[str | None, typer.Option(help="lines, star, field, or a .npy or image file.")] = None,
    probe: Annotated[str | None, typer.Option(help="disc or zone_plate.")] = None,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a pattern.")] = None,
    n_patterns: Annotated[int | None, typer.Option(help="How many patterns.")] = None,
    dose: Annotated[float | None, typer.Option(help="Photons per pattern.")] = None,
    step_px: Annotated[float | None, typer.Option(help="Mean distance of neighbours, object pixels.")] = None,
    path: Annotated[
        str | None, typer.Option(help="raster, spiral, random, or a scan's store for its positions.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of object, path and noise.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a scan of a known object.

    Example: ptychodask simulate lines.zarr --object lines --probe zone_plate --dose 1e6
    """
    from ptychodask.simulate import simulate

    options = _given(
        object=object,
        probe=probe,
        n_pixels=n_pixels,
        n_patterns=n_patterns,
        dose=dose,
        step_px=step_px,
        path=path,
        seed=seed,
    )
    scan = simulate(store, overwrite=overwrite, progress=_bar(quiet), **options)
    typer.echo(f"{store}: {scan.n_patterns} patterns of {scan.n_pixels} x {scan.n_pixels}, with their truth")


@app.command()
def group(
    store: Store,
    members: Annotated[int | None, typer.Option(help="Patterns in one group.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Nearest positions that members are drawn from.")] = None,
    oversampling: Annotated[int | None, typer.Option(help="Groups that each pattern seeds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw.")] = None,
    halves: Annotated[bool, typer.Option("--halves", help="Groups of even patterns and of odd ones.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the table; by default the spec's.")] = None,
) -> None:
    """Store a table of groups; training and reconstruction make theirs when there is none.

    Example: ptychodask group scan.zarr --members 4 --neighbours 7
    """
    from ptychodask.grouping import GroupingSpec
    from ptychodask.store import group

    spec = GroupingSpec(
        **_given(members=members, neighbours=neighbours, oversampling=oversampling, seed=seed, halves=halves or None)
    )
    groups = group(store, spec, name=name)
    typer.echo(f"{store}: {len(groups)} groups of {spec.members} as '{groups.name}'")


@app.command()
def refine_probe(
    store: Store,
    n_sweeps: Annotated[int | None, typer.Option(help="Times that each pattern is visited.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the patterns that is used.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the used patterns that only score.")] = None,
    search_defocus: Annotated[bool, typer.Option("--search-defocus", help="Try starts out of focus as well.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the order and of the held-out patterns.")] = None,
    quiet: Quiet = False,
) -> None:
    """Improve the stored probe by iterative sweeps over the patterns; the probe as ingested is kept.

    Example: ptychodask refine-probe scan.zarr
    """
    from ptychodask.iterative import refine_probe

    options = _given(n_sweeps=n_sweeps, fraction=fraction, held_out=held_out, seed=seed)
    found = refine_probe(store, search_defocus=search_defocus, progress=_bar(quiet), **options)
    kept = "stored" if found.stored else "not better, so the stored probe stays"
    typer.echo(f"{store}: R {found.r_before:.4f} -> {found.r_after:.4f} on {found.n_held_out} unseen patterns; {kept}")


@app.command()
def train(
    store: Annotated[
        list[Path],
        typer.Argument(help="The scan's store, or several of one N to train on at once.", show_default=False),
    ],
    model: Annotated[ModelKind, typer.Option(help="Which network.")] = ModelKind.pinn,
    out: Annotated[Path | None, typer.Option(help="Bundle to write; by default beside the store.")] = None,
    initial: Annotated[Path | None, typer.Option(help="Bundle whose weights to start from.")] = None,
    members: Annotated[int | None, typer.Option(help="Patterns in one group.")] = None,
    neighbours: Annotated[int | None, typer.Option(help="Nearest positions that members are drawn from.")] = None,
    oversampling: Annotated[int | None, typer.Option(help="Groups that each pattern seeds.")] = None,
    n_filters_scale: Annotated[int | None, typer.Option(help="Width of the network.")] = None,
    levels: Annotated[int | None, typer.Option(help="How often the U-Net halves its resolution.")] = None,
    projections_before: Annotated[int | None, typer.Option(help="Data-consistent steps before the U-Net.")] = None,
    projections_after: Annotated[int | None, typer.Option(help="Data-consistent steps after the U-Net.")] = None,
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
        from ptychodask.models import load_model
        from ptychodask.training import train
    options = _given(
        members=members,
        neighbours=neighbours,
        oversampling=oversampling,
        n_filters_scale=n_filters_scale,
        levels=levels,
        projections_before=projections_before,
        projections_after=projections_after,
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
        freeze_encoder=freeze_encoder or None,
        validation=validation,
        validation_fraction=validation_fraction,
        exclude=None if exclude is None else _numbers_in("--exclude", exclude, "pattern indices"),
        seed=seed,
    )
    start = None if initial is None else load_model(initial)
    trained = train(
        store,
        model=model.value,
        out=out,
        initial=start,
        resume=resume,
        overwrite=overwrite,
        log_to=log_to,
        progress=_bar(quiet),
        **options,
    )
    last = trained.history[-1]
    best = min(entry["held_out_loss"] for entry in trained.history)
    typer.echo(
        f"{trained.path}: {len(trained.history)} epochs in {last['seconds']:.0f} s, lowest held-out loss {best:.4g}"
    )


def _numbers_in(flag: str, path: Path, what: str) -> NDArray[Any]:
    try:
        return np.atleast_1d(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        told = "it is no array of numbers" if "allow_pickle" in str(error) else str(error)
        raise PtychodaskError(f"{flag} {path}: cannot be read ({told}); expected a .npy of {what}") from error


@app.command()
def plan(
    store: Store,
    model: Annotated[Path | None, typer.Option(help="Model bundle; by default the one that the store records.")] = None,
    groups: Annotated[str | None, typer.Option(help="Name of a stored group table.")] = None,
    crop: Annotated[int | None, typer.Option(help="Middle pixels of a patch that are used.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one call of the network.")] = None,
    groups_per_chunk: Annotated[int | None, typer.Option(help="Groups that one task predicts.")] = None,
    tile: Annotated[int | None, typer.Option(help="Pixels across a tile of the object.")] = None,
    roi: Annotated[str | None, typer.Option(help="Part of the object: y0,y1,x0,x1 in pixels.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Memory that one task may take.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Predict for some seconds to tell the time.")] = False,
) -> None:
    """Show what reconstruct would do: chunks, tiles, memory. Computes nothing, unless the time is measured.

    Example: ptychodask plan scan.zarr --measure
    """
    with quiet_stderr():
        import ptychodask.models.model  # noqa: F401
        from ptychodask.plan import ReconstructionSpec, plan
    spec = ReconstructionSpec(
        **_given(
            groups=groups,
            crop=crop,
            batch_size=batch_size,
            groups_per_chunk=groups_per_chunk,
            tile=tile,
            roi=None if roi is None else _whole_numbers("--roi", roi, 4),
            memory_bytes=memory_bytes,
        )
    )
    typer.echo(str(plan(store, model, spec, measure=measure)))


@app.command()
def reconstruct(
    store: Store,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model; by default the one that the store records. Several as LABEL=PATH."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result to write; by default <store>.object.zarr.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write; by default beside the result.")] = None,
    groups: Annotated[str | None, typer.Option(help="Name of a stored group table.")] = None,
    window: Annotated[str | None, typer.Option(help="illumination, uniform or cosine.")] = None,
    crop: Annotated[int | None, typer.Option(help="Middle pixels of a patch that are used.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one call of the network.")] = None,
    groups_per_chunk: Annotated[int | None, typer.Option(help="Groups that one task predicts.")] = None,
    tile: Annotated[int | None, typer.Option(help="Pixels across a tile of the object.")] = None,
    roi: Annotated[str | None, typer.Option(help="Part of the object: y0,y1,x0,x1 in pixels.")] = None,
    polish: Annotated[int | None, typer.Option(help="Data-consistent sweeps after stitching.")] = None,
    drop: Annotated[Path | None, typer.Option(help=".npy of pattern indices to leave out.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or mixed (bfloat16 convolutions).")] = None,
    split_half: Annotated[bool, typer.Option("--split-half", help="Stitch every other pattern apart as well.")] = False,
    pyramid: Annotated[bool, typer.Option("--pyramid", help="Add coarser levels to the result.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Patches to keep, or to stitch again without the network.")] = None,
    positions: Annotated[Path | None, typer.Option(help=".npy of corrected positions (y, x) for --cache.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Memory that one task may take.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Turn a scan into an object, and draw it.

    Example: ptychodask reconstruct scan.zarr

    Example: ptychodask reconstruct scan.zarr --model PtychoPINN=scan.pinn.model --model Baseline=scan.baseline.model
    """
    out = store.with_name(f"{store.name.removesuffix('.zarr')}.object.zarr") if out is None else out
    png = out.with_name(f"{out.name.removesuffix('.zarr')}.png") if png is None else png
    _check_one_cluster("reconstruct", workers, scheduler)
    with quiet_stderr():
        import ptychodask.models.model  # noqa: F401
        from ptychodask.plotting import check_figure_path, plot, plot_comparison
        from ptychodask.reconstruction import reconstruct
    options = _given(
        groups=groups,
        window=window,
        crop=crop,
        batch_size=batch_size,
        groups_per_chunk=groups_per_chunk,
        tile=tile,
        roi=None if roi is None else _whole_numbers("--roi", roi, 4),
        polish=polish,
        drop=None if drop is None else _numbers_in("--drop", drop, "pattern indices"),
        memory_bytes=memory_bytes,
        precision=precision,
        split_half=split_half or None,
        pyramid=pyramid or None,
        cache=cache,
        position_yx_px=None if positions is None else _numbers_in("--positions", positions, "positions"),
    )
    check_figure_path(png)
    with _client(workers, scheduler) as client:
        result = reconstruct(
            store, _models(model), out=out, client=client, overwrite=overwrite, progress=_bar(quiet), **options
        )
    if "method" in result.dims:
        plot_comparison({label: result.sel({"method": label}) for label in result["method"].values}, path=png)
    else:
        plot(result, path=png)
    height, width = result["object"].shape[-2:]
    rate = result.attrs["patterns_per_s"]
    typer.echo(f"{out}: {height} x {width} px, {rate:,.0f} patterns/s; picture in {png}")


def _models(given: list[str] | None) -> str | dict[str, str] | None:
    """A model's path, or several by their labels."""
    if not given or (len(given) == 1 and "=" not in given[0]):
        return given[0] if given else None
    found = dict(text.split("=", 1) for text in given if "=" in text)
    if len(found) < len(given) or "" in found:
        raise PtychodaskError(
            f"--model {' --model '.join(given)}: several models need a label of their own each; write LABEL=PATH"
        )
    return found


def _check_one_cluster(command: str, workers: int | None, scheduler: str | None) -> None:
    if workers is not None and scheduler is not None:
        raise PtychodaskError(f"{command}: --workers starts a cluster and --scheduler names one; pass one of them")


def _client(workers: int | None, scheduler: str | None) -> AbstractContextManager[Any]:
    """A client of new worker processes or of a running scheduler; None where neither is asked for."""
    from ptychodask.cluster import connected_client, local_client

    if workers is not None:
        return local_client(workers)
    return nullcontext() if scheduler is None else connected_client(scheduler)


@app.command()
def bench(
    store: Annotated[
        Path | None, typer.Argument(help="The scan's store; by default one is simulated.", show_default=False)
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model bundle; by default the recorded one, or one built.")] = None,
    network: Annotated[str | None, typer.Option(help="What is built: pinn or ptychopinn.")] = None,
    n_groups: Annotated[int | None, typer.Option(help="Groups of the simulated scan.")] = None,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a pattern of the simulated scan.")] = None,
    members: Annotated[int | None, typer.Option(help="Patterns in one group of the built network.")] = None,
    n_filters_scale: Annotated[int | None, typer.Option(help="Width of the built network.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one call of the network.")] = None,
    groups_per_chunk: Annotated[int | None, typer.Option(help="Groups that one task predicts.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or mixed.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder that all workers see, for what is made meanwhile.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time a reconstruction from disk to disk, stage by stage, against the bare network on the same workers.

    Example: ptychodask bench --n-groups 2000

    Example: ptychodask bench scan.zarr --model pinn.model --scheduler tcp://127.0.0.1:8786 --json bench.json
    """
    from json import dumps

    _check_one_cluster("bench", workers, scheduler)
    made = _given(
        n_groups=n_groups, n_pixels=n_pixels, network=network, members=members, n_filters_scale=n_filters_scale
    )
    _check_what_is_made(store, model, made)
    if json is not None and not json.parent.is_dir():
        raise PtychodaskError(f"{json}: its folder does not exist; make it first")
    with quiet_stderr():
        import ptychodask.models.model  # noqa: F401
        from ptychodask.bench import BenchSpec, bench, describe
        from ptychodask.plan import ReconstructionSpec
    spec = BenchSpec(**made)
    reconstruction = ReconstructionSpec(
        **_given(batch_size=batch_size, groups_per_chunk=groups_per_chunk, precision=precision)
    )
    with _client(workers, scheduler) as client:
        report = bench(
            store, model, spec, reconstruction=reconstruction, client=client, folder=folder, progress=_bar(quiet)
        )
    typer.echo(describe(report))
    if json is not None:
        json.write_text(dumps(report, indent=2) + "\n")


def _check_what_is_made(store: Path | None, model: Path | None, made: dict[str, Any]) -> None:
    """Raise `PtychodaskError` for a flag about a scan or a network that is given and not made."""
    for given, names, what in (
        (store, ("n_groups", "n_pixels"), "scan that is simulated"),
        (model, ("network", "members", "n_filters_scale"), "network that is built"),
    ):
        wrong = [f"--{name.replace('_', '-')}" for name in names if name in made]
        if given is not None and wrong:
            raise PtychodaskError(f"bench: {', '.join(wrong)} describes a {what}, and {given} is given; leave one away")


@app.command()
def compare(
    results: Annotated[list[str], typer.Argument(help="Results to compare; LABEL=PATH gives a name.")],
    truth: Annotated[Path | None, typer.Option(help="Store of a scan with truth; by default that of --scan.")] = None,
    scan: Annotated[Path | None, typer.Option(help="The scan's store: adds R.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Label of the result to take signed differences from.")] = None,
    register: Annotated[bool, typer.Option("--register", help="Move results to where they fit best.")] = False,
    scale: Annotated[bool, typer.Option("--scale", help="Remove a factor of the amplitude.")] = False,
    peak: Annotated[str | None, typer.Option(help="Of the PSNR: range, ptychopinn (255) or a number.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="LABEL=KEY: the array of another program's file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write as CSV.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Table to write as Markdown.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
) -> None:
    """Compare results with the truth of a simulated scan, or with the first of them.

    Example: ptychodask compare pinn.object.zarr baseline.object.zarr --scan scan.zarr --baseline Baseline

    Example: ptychodask compare scan.object.zarr PtyChi=ptychi_reconstruction.npz --truth scan.zarr --csv table.csv

    Without a label, a result takes the name of the model that made it: PtychoPINN, Baseline; else that of its file.
    Files of Tike, pty-chi and Ptychodus are read. One result of a scan without truth is judged by R alone, how well it
    explains the patterns.
    """
    from ptychodask.compare import compare, patterns_inside, place, r_factors, results_by_label, to_csv, to_markdown
    from ptychodask.plotting import check_figure_path, plot_comparison
    from ptychodask.store import open_scan

    if png is not None:
        check_figure_path(png)
    _check_folders(csv, markdown)
    opened = results_by_label(_labelled(results, key))
    measured = None if scan is None else open_scan(scan)
    known = open_scan(truth) if truth is not None else measured if measured and measured.truth is not None else None
    placed = place(opened, truth=known, register=register)
    table = None
    if measured is not None and known is None and len(placed) == 1:
        for label, misfit in r_factors(placed, measured).items():
            typer.echo(f"{label}: R {misfit:.4f} over {len(patterns_inside(placed, measured))} patterns")
    else:
        options = _given(baseline=baseline, peak=None if peak is None else _peak(peak))
        table = compare(placed, truth=known, scan=measured, scale=scale, **options)
        typer.echo(to_markdown(table))
        for path, text in ((csv, to_csv(table)), (markdown, to_markdown(table))):
            if path is not None:
                path.write_text(text)
    if png is not None:
        plot_comparison(placed, known, comparison=table, scale=scale, path=png)


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise PtychodaskError(f"{path}: is a folder, or lies in no folder that exists; name another file")


def _labelled(results: list[str], keys: list[str] | None) -> Iterator[tuple[str | None, Any]]:
    """Each result with its label; where the array's key is given, with what was read by it."""
    from ptychodask.io import read_foreign_result

    key_of = dict(text.partition("=")[::2] for text in keys or [])
    for text in results:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            yield None, text
        elif name in key_of:
            yield name, read_foreign_result(path, key=key_of.pop(name))
        else:
            yield name, path
    if key_of:
        raise PtychodaskError(f"--key {'='.join(key_of.popitem())}: no result has this label; name it with LABEL=PATH")


def _peak(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@app.command()
def residuals(
    result: Annotated[Path, typer.Argument(help="What reconstruct wrote, a folder ending in .zarr.")],
    store: Store,
    drop: Annotated[Path | None, typer.Option(help=".npy of pattern indices that the result goes without.")] = None,
    n_mad: Annotated[
        float | None, typer.Option(help="Deviations above the median R from which one stands out.")
    ] = None,
    save_outliers: Annotated[Path | None, typer.Option(help=".npy to write those to, for reconstruct --drop.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write, a row for each pattern.")] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    quiet: Quiet = False,
) -> None:
    """Judge each measured pattern by the one that a result makes, and name those that stand out.

    Example: ptychodask residuals scan.object.zarr scan.zarr --png residuals.png --save-outliers bad.npy
    """
    from ptychodask.plotting import RESIDUALS, check_figure_path, plot_residuals
    from ptychodask.residuals import outliers, residuals

    _check_one_cluster("residuals", workers, scheduler)
    if png is not None:
        check_figure_path(png)
    _check_folders(save_outliers, csv)
    options = _given(drop=None if drop is None else _numbers_in("--drop", drop, "pattern indices"))
    with _client(workers, scheduler) as client:
        found = residuals(result, store, client=client, progress=_bar(quiet), **options)
    far = outliers(found, **_given(n_mad=n_mad))
    told = "".join(f", {title} {found.attrs[name]:.4g}" for name, title in RESIDUALS.items() if name in found.attrs)
    typer.echo(f"{result}: {found.attrs['n_counted']} patterns{told}; {len(far)} stand out: {far.tolist()}")
    if save_outliers is not None:
        np.save(save_outliers, far)
    if csv is not None:
        found.to_dataframe().to_csv(csv)
    if png is not None:
        plot_residuals(found, path=png)


@app.command()
def study(
    study: Annotated[Path, typer.Argument(help="TOML file: the matrix and what its cells share.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to make; by default beside the file.")] = None,
    recompute: Annotated[list[str] | None, typer.Option(help="Cell to compute again; * for any characters.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes to start; by default this one.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    quiet: Quiet = False,
) -> None:
    """Simulate, train, reconstruct and compare over dose, overlap, gridsize and network. Goes on where it was stopped.

    Example: ptychodask study docs/study.toml --out study
    """
    _check_one_cluster("study", workers, scheduler)
    with quiet_stderr():
        from ptychodask.study import run_study, to_markdown
    folder = study.with_suffix("") if out is None else out
    with _client(workers, scheduler) as client:
        found = run_study(study, folder, recompute=recompute or (), client=client, progress=_bar(quiet))
    typer.echo(f"{to_markdown(found)}\n{folder}: table.md, metrics.csv and figures")


@app.command()
def report(
    result: Annotated[str, typer.Argument(help="Result to report on; LABEL=PATH gives a name.", show_default=False)],
    scan: Annotated[
        Path | None, typer.Option(help="Store it was made from: adds what was measured and each pattern's residual.")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="Store of a scan with truth; by default that of --scan.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another result to compare with; LABEL=PATH gives a name; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default beside the result.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a report of a result: one HTML file with figures, metrics, methods and provenance, for any browser.

    Example: ptychodask report scan.object.zarr --scan scan.zarr --out report.html

    Example: ptychodask report pinn.object.zarr --scan scan.zarr --compare baseline.object.zarr
    """
    from ptychodask.report import write_report

    ((label, source),) = _labelled([result], None)
    out = Path(source).with_name(f"{Path(source).name.removesuffix('.zarr')}.html") if out is None else out
    others = _labelled(compare or [], None)
    path = write_report(source, out, label=label, scan=scan, truth=truth, others=others, progress=_bar(quiet))
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
