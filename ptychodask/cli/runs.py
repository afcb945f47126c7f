"""Commands for reconstruction: demo, run, plan, reconstruct, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptychodask.cli.fields import options_of
from ptychodask.cli.flags import (
    Format,
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
    progress_option,
)
from ptychodask.errors import PtychodaskError

ModelBundle = Annotated[
    Path | None,
    typer.Option(help="Model bundle; by default the last one trained on the scan, else a packaged one."),
]


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Simulate, train both networks, reconstruct, and compare with the true object.

    Example: ptychodask demo
    """
    from ptychodask.demo import run_demo

    typer.echo(run_demo(out, overwrite=overwrite, progress=progress_option(quiet)))


@options_of("ptychodask.io.source", "IngestSpec", inspected=True)
def run(
    source: Annotated[
        Path, typer.Argument(help="File of another program (see ingest), or store of a scan.", show_default=False)
    ],
    store: Annotated[
        Path | None, typer.Argument(help="Store to write; by default named after the file.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model bundle, or iterative; by default a network that fits the scan, else iterative."),
    ] = None,
    format: Format = None,
    *,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Inspect, ingest, refine the probe and reconstruct, with the defaults of each.

    Ends with R, a picture and what to try next.

    Example: ptychodask run scan.npz

    Example: ptychodask run raw.h5 --domain counts --units m --pixel-size-m 12e-9
    """
    from ptychodask.run import run_file

    for text in run_file(
        source,
        store,
        model=model,
        format=format,
        overwrite=overwrite,
        progress=progress_option(quiet),
        **fields,
    ):
        typer.echo(text)


@options_of("ptychodask.plan.spec", "ReconstructionSpec", planned=True)
def plan(
    store: Store,
    model: ModelBundle = None,
    *,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the network for a few seconds to estimate the time.")
    ] = False,
    **fields: Any,
) -> None:
    """Show the chunks, tiles and memory of a reconstruction.

    Nothing is computed, except with --measure.

    Example: ptychodask plan scan.zarr --measure
    """
    from ptychodask.plan import plan
    from ptychodask.prediction import open_anew

    experiments = [] if "experiment" in fields else open_anew(store).experiments(tuple(fields.get("drop", ())))
    if len(experiments) < 2:
        typer.echo(str(plan(store, model, measure=measure, **fields)))
        return
    for number in experiments:
        planned = plan(store, model, measure=measure, experiment=number, **fields)
        typer.echo(f"experiment  {number}\n{planned}\n")


@options_of("ptychodask.plan.spec", "ReconstructionSpec")
def reconstruct(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE...",
            help="Stores of the scans: folders ending in .zarr, or s3://bucket/name.zarr.",
            show_default=False,
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model bundle; by default the last one trained on the scan, else a packaged one. For several, repeat "
            "with LABEL=PATH."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Result to write; by default <store>.object.zarr. For several scans or experiments, a folder."
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Figure to write; by default beside the result.")] = None,
    *,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    host: Host = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Reconstruct the object of a scan, and draw it.

    Several scans are reconstructed one after the other.

    Example: ptychodask reconstruct scan.zarr

    Example: ptychodask reconstruct a.zarr b.zarr c.zarr --out results

    Example: ptychodask reconstruct scan.zarr --workers 2 --on-error skip --resume

    Example: ptychodask reconstruct scan.zarr --model PtychoPINN=scan.pinn.model --model Baseline=scan.baseline.model
    """
    several = len(stores) > 1
    if several and (out is None or png is not None):
        raise PtychodaskError(
            f"reconstruct: {len(stores)} scans need a folder for their results and figures; pass --out, and not --png"
        )
    target = named(stores[0].with_name(f"{stores[0].name.removesuffix('.zarr')}.object.zarr") if out is None else out)
    check_one_cluster("reconstruct", workers, scheduler)
    from ptychodask.judging.figure import check_figure_path
    from ptychodask.reconstruction import FailedScansError, reconstruct
    from ptychodask.reconstruction.batch import result_path

    if not several:
        check_figure_path(png or _figure_beside(target))
    failed = None
    with client_for(workers, scheduler, tls, tls_folder, host) as client:
        arguments: dict[str, Any] = fields | {
            "model": _models(model),
            "out": target,
            "client": client,
            "overwrite": overwrite,
            "resume": resume,
            "progress": progress_option(quiet),
        }
        try:
            results = reconstruct(stores if several else stores[0], **arguments)
        except FailedScansError as error:
            results, failed = error.results, error
    if isinstance(results, dict):
        for name, result in results.items():
            path = result_path(target, name) if several else target / f"{name}.zarr"
            _draw(result, path, png.with_stem(f"{png.stem}-{name}") if png else _figure_beside(path))
    else:
        _draw(results, target, png or _figure_beside(target))
    if failed is not None:
        raise failed


def _figure_beside(result: Any) -> Path:
    return beside(result, f"{result.name.removesuffix('.zarr')}.png")


def _draw(result: Any, out: Any, png: Path) -> None:
    """Draw a result and print a summary line."""
    from ptychodask.judging.plotting import plot, plot_comparison

    if "network" in result.dims:
        plot_comparison({label: result.sel(network=label) for label in result["network"].values}, path=png)
    else:
        plot(result, path=png)
    height, width = result["object"].shape[-2:]
    rate = result.attrs["patterns_per_s"]
    n_skipped = sum(len(patterns) for patterns in result.ptycho.records["skipped"].values())
    left_out = f", {n_skipped} patterns left out" if n_skipped else ""
    typer.echo(f"{out}: {height} x {width} px, {rate:,.0f} patterns/s{left_out}; figure {png}")


def _models(given: list[str] | None) -> str | dict[str, str] | None:
    """Path of one model, or paths of several by label."""
    if not given or (len(given) == 1 and "=" not in given[0]):
        return given[0] if given else None
    models = dict(text.split("=", 1) for text in given if "=" in text)
    if len(models) < len(given) or "" in models:
        raise PtychodaskError(
            f"--model {' --model '.join(given)}: several models need a different label each; write LABEL=PATH"
        )
    return models


@options_of("ptychodask.plan.spec", "ReconstructionSpec", timed=True)
def bench(
    store: Annotated[
        Path | None, typer.Argument(help="Store of the scan; by default one is simulated.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model bundle; by default that of the store, else an untrained network.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="Untrained network to build: pinn or ptychopinn.")] = None,
    n_groups: Annotated[int | None, typer.Option(help="Groups of the simulated scan.")] = None,
    n_pixels: Annotated[int | None, typer.Option(help="Pixels across a pattern of the simulated scan.")] = None,
    members: Annotated[int | None, typer.Option(help="Patterns in one group of the untrained network.")] = None,
    n_filters_scale: Annotated[int | None, typer.Option(help="Width of the untrained network.")] = None,
    *,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    host: Host = None,
    folder: Annotated[Path | None, typer.Option(help="Folder for temporary data, shared by all workers.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write all measurements to.")] = None,
    quiet: Quiet = False,
    **fields: Any,
) -> None:
    """Time each stage of a reconstruction, from disk to disk.

    For comparison, the network alone is timed on the same workers.

    Example: ptychodask bench --n-groups 2000

    Example: ptychodask bench scan.zarr --model pinn.model --scheduler tcp://127.0.0.1:8786 --json bench.json
    """
    from json import dumps

    check_one_cluster("bench", workers, scheduler)
    bench_fields = given(
        n_groups=n_groups, n_pixels=n_pixels, network=network, members=members, n_filters_scale=n_filters_scale
    )
    _check_fields(store, model, bench_fields)
    if json is not None and not json.parent.is_dir():
        raise PtychodaskError(f"cannot write {json}: folder {json.parent} does not exist; make it first")
    import ptychodask.models.backend  # noqa: F401
    from ptychodask.bench import BenchSpec, bench, describe
    from ptychodask.plan.spec import ReconstructionSpec

    spec = BenchSpec(**bench_fields)
    with client_for(workers, scheduler, tls, tls_folder, host) as client:
        report = bench(
            store,
            model,
            spec,
            reconstruction=ReconstructionSpec(**fields),
            client=client,
            folder=folder,
            progress=progress_option(quiet),
        )
    typer.echo(describe(report))
    if json is not None:
        json.write_text(dumps(report, indent=2) + "\n")


def _check_fields(store: Path | None, model: Path | None, fields: dict[str, Any]) -> None:
    """Raise `PtychodaskError` for simulation or network flags without effect."""
    for path, names, subject in (
        (store, ("n_groups", "n_pixels"), "a simulated scan"),
        (model, ("network", "members", "n_filters_scale"), "an untrained network"),
    ):
        unused = [f"--{name.replace('_', '-')}" for name in names if name in fields]
        if path is not None and unused:
            raise PtychodaskError(
                f"bench: {', '.join(unused)} is for {subject}, but {path} was passed; leave out one of them"
            )
