"""Commands that turn scans into objects: demo, plan, reconstruct, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptychodask.cli.flags import (
    Host,
    Overwrite,
    Quiet,
    Scheduler,
    Store,
    Tls,
    TlsFolder,
    Workers,
    beside,
    check_one_cluster,
    client_for,
    given,
    named,
    numbers,
    numbers_in,
    progress_option,
    whole_numbers,
)
from ptychodask.progress import quiet_stderr
from ptychodask.scan import PtychodaskError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it makes.")] = Path("demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a scan, train both networks on it, reconstruct it and compare with the truth.

    Example: ptychodask demo
    """
    with quiet_stderr():
        import ptychodask.models.model  # noqa: F401
        from ptychodask.demo import run_demo
    typer.echo(run_demo(out, overwrite=overwrite, progress=progress_option(quiet)))


def plan(
    store: Store,
    model: Annotated[
        Path | None, typer.Option(help="Model bundle; by default the store's, else the packaged one.")
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Name of a stored group table.")] = None,
    crop: Annotated[int | None, typer.Option(help="Middle pixels of a patch that are used.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one call of the network.")] = None,
    groups_per_chunk: Annotated[int | None, typer.Option(help="Groups that one task predicts.")] = None,
    tile: Annotated[int | None, typer.Option(help="Pixels across a tile of the object.")] = None,
    roi: Annotated[str | None, typer.Option(help="Part of the object: y0,y1,x0,x1 in pixels.")] = None,
    roi_m: Annotated[
        str | None, typer.Option(help="The same in metres: y0,y1,x0,x1, such as 0,2e-6,1e-6,3e-6.")
    ] = None,
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
        **given(
            groups=groups,
            crop=crop,
            batch_size=batch_size,
            groups_per_chunk=groups_per_chunk,
            tile=tile,
            roi=None if roi is None else whole_numbers("--roi", roi, 4),
            roi_m=None if roi_m is None else numbers("--roi-m", roi_m, 4),
            memory_bytes=memory_bytes,
        )
    )
    typer.echo(str(plan(store, model, spec, measure=measure)))


def reconstruct(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE...",
            help="Scans' stores, folders ending in .zarr, or s3://bucket/name.zarr.",
            show_default=False,
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model; by default the store's, else the packaged one. Several as LABEL=PATH."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Result to write; by default <store>.object.zarr. A folder for several."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Picture to write; by default beside the result.")] = None,
    groups: Annotated[str | None, typer.Option(help="Name of a stored group table.")] = None,
    window: Annotated[str | None, typer.Option(help="illumination, uniform or cosine.")] = None,
    crop: Annotated[int | None, typer.Option(help="Middle pixels of a patch that are used.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Groups in one call of the network.")] = None,
    groups_per_chunk: Annotated[int | None, typer.Option(help="Groups that one task predicts.")] = None,
    tile: Annotated[int | None, typer.Option(help="Pixels across a tile of the object.")] = None,
    roi: Annotated[str | None, typer.Option(help="Part of the object: y0,y1,x0,x1 in pixels.")] = None,
    roi_m: Annotated[
        str | None, typer.Option(help="The same in metres: y0,y1,x0,x1, such as 0,2e-6,1e-6,3e-6.")
    ] = None,
    polish: Annotated[int | None, typer.Option(help="Data-consistent sweeps after stitching.")] = None,
    drop: Annotated[Path | None, typer.Option(help=".npy of pattern indices to leave out.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or mixed (bfloat16 convolutions).")] = None,
    split_half: Annotated[bool, typer.Option("--split-half", help="Stitch every other pattern apart as well.")] = False,
    pyramid: Annotated[bool, typer.Option("--pyramid", help="Add coarser levels to the result.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Patches to keep, or to stitch again without the network.")] = None,
    positions: Annotated[Path | None, typer.Option(help=".npy of corrected positions (y, x) for --cache.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Memory that one task may take.")] = None,
    on_error: Annotated[
        str | None, typer.Option(help="raise, or skip what cannot be used and list it in the result.")
    ] = None,
    verify: Annotated[int | None, typer.Option(help="Chunks that a second worker computes again.")] = None,
    device: Annotated[str | None, typer.Option(help="any, or gpu where nothing else will do.")] = None,
    live: Annotated[Path | None, typer.Option(help="PNG that is replaced while tiles finish.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep up with a scan that grows, until it is whole.")
    ] = False,
    follow_timeout_s: Annotated[
        float | None, typer.Option(help="How long it may go without a new segment, seconds.")
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    host: Host = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a stopped run left.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Turn a scan into an object, and draw it; several scans one after the other.

    Example: ptychodask reconstruct scan.zarr

    Example: ptychodask reconstruct a.zarr b.zarr c.zarr --out results

    Example: ptychodask reconstruct scan.zarr --workers 2 --on-error skip --resume

    Example: ptychodask reconstruct scan.zarr --model PtychoPINN=scan.pinn.model --model Baseline=scan.baseline.model
    """
    several = len(stores) > 1
    if several and (out is None or png is not None):
        raise PtychodaskError(
            f"reconstruct: {len(stores)} scans have a result and a picture each in a folder; pass --out, and not --png"
        )
    goal = named(stores[0].with_name(f"{stores[0].name.removesuffix('.zarr')}.object.zarr") if out is None else out)
    check_one_cluster("reconstruct", workers, scheduler)
    with quiet_stderr():
        import ptychodask.models.model  # noqa: F401
        from ptychodask.plotting import check_figure_path
        from ptychodask.reconstruction import FailedScansError, reconstruct
        from ptychodask.reconstruction.many import result_path
    options = given(
        groups=groups,
        window=window,
        crop=crop,
        batch_size=batch_size,
        groups_per_chunk=groups_per_chunk,
        tile=tile,
        roi=None if roi is None else whole_numbers("--roi", roi, 4),
        roi_m=None if roi_m is None else numbers("--roi-m", roi_m, 4),
        polish=polish,
        drop=None if drop is None else numbers_in("--drop", drop, "pattern indices"),
        memory_bytes=memory_bytes,
        precision=precision,
        split_half=split_half or None,
        pyramid=pyramid or None,
        cache=cache,
        position_yx_px=None if positions is None else numbers_in("--positions", positions, "positions"),
        on_error=on_error,
        verify=verify,
        device=device,
        live=live,
        follow=follow or None,
        follow_timeout_s=follow_timeout_s,
    )
    if not several:
        check_figure_path(png or _picture_beside(goal))
    failed = None
    with client_for(workers, scheduler, tls, tls_folder, host) as client:
        asked: dict[str, Any] = options | {
            "model": _models(model),
            "out": goal,
            "client": client,
            "overwrite": overwrite,
            "resume": resume,
            "progress": progress_option(quiet),
        }
        try:
            results = reconstruct(stores, **asked) if several else {"": reconstruct(stores[0], **asked)}
        except FailedScansError as error:
            results, failed = error.results, error
    for name, result in results.items():
        path = result_path(goal, name) if several else goal
        _draw(result, path, png or _picture_beside(path))
    if failed is not None:
        raise failed


def _picture_beside(result: Any) -> Path:
    return beside(result, f"{result.name.removesuffix('.zarr')}.png")


def _draw(result: Any, out: Any, png: Path) -> None:
    """Draw a result and tell of it."""
    from ptychodask.plotting import plot, plot_comparison

    if "method" in result.dims:
        plot_comparison({label: result.sel({"method": label}) for label in result["method"].values}, path=png)
    else:
        plot(result, path=png)
    height, width = result["object"].shape[-2:]
    rate = result.attrs["patterns_per_s"]
    n_skipped = sum(len(patterns) for patterns in result.attrs["skipped"].values())
    left_out = f", {n_skipped} patterns left out" if n_skipped else ""
    typer.echo(f"{out}: {height} x {width} px, {rate:,.0f} patterns/s{left_out}; picture in {png}")


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
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    host: Host = None,
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

    check_one_cluster("bench", workers, scheduler)
    made = given(
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
        **given(batch_size=batch_size, groups_per_chunk=groups_per_chunk, precision=precision)
    )
    with client_for(workers, scheduler, tls, tls_folder, host) as client:
        report = bench(
            store,
            model,
            spec,
            reconstruction=reconstruction,
            client=client,
            folder=folder,
            progress=progress_option(quiet),
        )
    typer.echo(describe(report))
    if json is not None:
        json.write_text(dumps(report, indent=2) + "\n")


def _check_what_is_made(store: Path | None, model: Path | None, made: dict[str, Any]) -> None:
    """Raise `PtychodaskError` for a flag about a scan or a network that is given and not made."""
    for one, names, what in (
        (store, ("n_groups", "n_pixels"), "scan that is simulated"),
        (model, ("network", "members", "n_filters_scale"), "network that is built"),
    ):
        wrong = [f"--{name.replace('_', '-')}" for name in names if name in made]
        if one is not None and wrong:
            raise PtychodaskError(f"bench: {', '.join(wrong)} describes a {what}, and {one} is given; leave one away")
