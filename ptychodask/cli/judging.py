"""Commands for judging results: compare, residuals, study, report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ptychodask.cli.flags import (
    Quiet,
    Scheduler,
    Store,
    Tls,
    TlsFolder,
    Workers,
    beside,
    check_folders,
    check_one_cluster,
    check_vacant_files,
    client_for,
    given,
    named,
    numbers_or_file,
    progress_option,
)
from ptychodask.errors import PtychodaskError

ReplaceFiles = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Experiment = Annotated[
    int | None,
    typer.Option(help="Experiment of the results, if the scan has several; by default the one that they record."),
]


def compare(
    results: Annotated[list[str], typer.Argument(help="Results to compare, as PATH or LABEL=PATH.")],
    truth: Annotated[
        Path | None, typer.Option(help="Store of a scan with the true object; by default --scan, if it has one.")
    ] = None,
    scan: Annotated[
        Path | None, typer.Option(help="Store of the scan, to compute the R-factor of each result.")
    ] = None,
    experiment: Experiment = None,
    baseline: Annotated[
        str | None, typer.Option(help="Label of the result from which signed differences are computed.")
    ] = None,
    register: Annotated[
        bool, typer.Option("--register", help="Shift each result to the best match with the reference.")
    ] = False,
    scale: Annotated[bool, typer.Option("--scale", help="Remove a constant factor of the amplitude.")] = False,
    peak: Annotated[
        str | None, typer.Option(help="Peak value of the PSNR: range, ptychopinn (255) or a number.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="LABEL=KEY: key of the object in another program's file. Repeatable.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write the table to.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
    png: Annotated[Path | None, typer.Option(help="Figure to write.")] = None,
    *,
    overwrite: ReplaceFiles = False,
) -> None:
    """Compare results with the true object, or with the first result.

    Example: ptychodask compare pinn.object.zarr baseline.object.zarr --scan scan.zarr --baseline Baseline

    Example: ptychodask compare scan.object.zarr PtyChi=ptychi_reconstruction.npz --truth scan.zarr --csv table.csv

    The default label of a result is the name of its model, else of its file.
    Files from Tike, pty-chi and Ptychodus can be read. For one result and no
    true object, only R is computed: how well the result fits the patterns.
    """
    from ptychodask.judging.compare import align, compare, patterns_inside, r_factors, results_by_label
    from ptychodask.judging.figure import check_figure_path
    from ptychodask.judging.plotting import plot_comparison
    from ptychodask.judging.tables import to_csv, to_markdown
    from ptychodask.store import open_scan

    if png is not None:
        check_figure_path(png)
    check_folders(csv, markdown)
    check_vacant_files(overwrite, csv, markdown, png)
    opened = results_by_label(_labelled(results, key))
    measured = None if scan is None else open_scan(scan)
    known = open_scan(truth) if truth is not None else measured if measured and measured.truth is not None else None
    aligned_results = align(opened, truth=known, register=register)
    table = None
    if measured is not None and known is None and len(aligned_results) == 1:
        n_inside = len(patterns_inside(aligned_results, measured, experiment))
        for label, misfit in r_factors(aligned_results, measured, experiment).items():
            typer.echo(f"{label}: R {misfit:.4f} over {n_inside} patterns")
    else:
        options = given(experiment=experiment, baseline=baseline, peak=None if peak is None else _peak(peak))
        table = compare(aligned_results, truth=known, scan=measured, scale=scale, **options)
        typer.echo(to_markdown(table))
        for path, text in ((csv, to_csv(table)), (markdown, to_markdown(table))):
            if path is not None:
                path.write_text(text)
    if png is not None:
        plot_comparison(aligned_results, known, comparison=table, scale=scale, path=png)


def residuals(
    result: Annotated[Path, typer.Argument(help="Result of reconstruct, a folder ending in .zarr.")],
    store: Store,
    drop: Annotated[
        str | None,
        typer.Option(help="Pattern indices that were left out of the result: numbers such as 17,40, or a .npy file."),
    ] = None,
    experiment: Experiment = None,
    n_mad: Annotated[
        float | None, typer.Option(help="Threshold for outliers: standard deviations (1.4826 MAD) above the median R.")
    ] = None,
    save_outliers: Annotated[
        Path | None, typer.Option(help=".npy file to write the outliers to, for reconstruct --drop.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write, one row per pattern.")] = None,
    png: Annotated[Path | None, typer.Option(help="Figure to write.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    overwrite: ReplaceFiles = False,
    quiet: Quiet = False,
) -> None:
    """Compare each measured pattern with the predicted one, and list outliers.

    Example: ptychodask residuals scan.object.zarr scan.zarr --png residuals.png --save-outliers bad.npy
    """
    from ptychodask.judging.figure import check_figure_path
    from ptychodask.judging.plotting import RESIDUALS, plot_residuals
    from ptychodask.judging.residuals import outliers, residuals

    check_one_cluster("residuals", workers, scheduler)
    if png is not None:
        check_figure_path(png)
    check_folders(save_outliers, csv)
    check_vacant_files(overwrite, save_outliers, csv, png)
    dropped = None if drop is None else numbers_or_file("--drop", drop, "pattern indices")
    options = given(drop=dropped, experiment=experiment)
    with client_for(workers, scheduler, tls, tls_folder) as client:
        ds = residuals(result, store, client=client, progress=progress_option(quiet), **options)
    far = outliers(ds, **given(n_mad=n_mad))
    means = "".join(f", {title} {ds.attrs[name]:.4g}" for name, title in RESIDUALS.items() if name in ds.attrs)
    typer.echo(f"{result}: {ds.attrs['n_counted']} patterns{means}; {len(far)} outliers: {far.tolist()}")
    if save_outliers is not None:
        np.save(save_outliers, far)
    if csv is not None:
        ds.to_dataframe().to_csv(csv)
    if png is not None:
        plot_residuals(ds, path=png)


def study(
    study: Annotated[
        Path, typer.Argument(help="TOML file with the parameter matrix and the common settings.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Output folder; by default beside the TOML file.")] = None,
    recompute: Annotated[
        list[str] | None, typer.Option(help="Name of a cell to compute again; * matches any characters. Repeatable.")
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    quiet: Quiet = False,
) -> None:
    """Simulate, train, reconstruct and compare for a matrix of parameters.

    Parameters include dose, overlap, gridsize and network. An interrupted study resumes.

    Example: ptychodask study docs/study.toml --out study
    """
    check_one_cluster("study", workers, scheduler)
    from ptychodask.study import run_study, to_markdown

    folder = study.with_suffix("") if out is None else out
    with client_for(workers, scheduler, tls, tls_folder) as client:
        table = run_study(study, folder, recompute=recompute or (), client=client, progress=progress_option(quiet))
    typer.echo(f"{to_markdown(table)}\n{folder}: table.md, metrics.csv and figures")


def report(
    result: Annotated[str, typer.Argument(help="Result to report on, as PATH or LABEL=PATH.", show_default=False)],
    scan: Annotated[
        Path | None, typer.Option(help="Store of the scan: adds the measured data and the residual of each pattern.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Store of a scan with the true object; by default --scan, if it has one.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another result to compare with, as PATH or LABEL=PATH. Repeatable.")
    ] = None,
    experiment: Experiment = None,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; by default beside the result.")] = None,
    *,
    overwrite: ReplaceFiles = False,
    quiet: Quiet = False,
) -> None:
    """Write a report of a result as one HTML file.

    It contains figures, metrics, methods and provenance, and opens in any browser.

    Example: ptychodask report scan.object.zarr --scan scan.zarr --out report.html

    Example: ptychodask report pinn.object.zarr --scan scan.zarr --compare baseline.object.zarr
    """
    from ptychodask.judging.report import write_report

    ((label, source),) = _labelled([result], None)
    out = beside(named(Path(source)), f"{Path(source).name.removesuffix('.zarr')}.html") if out is None else out
    check_vacant_files(overwrite, out)
    others = _labelled(compare or [], None)
    path = write_report(
        source,
        out,
        label=label,
        scan=scan,
        truth=truth,
        others=others,
        experiment=experiment,
        progress=progress_option(quiet),
    )
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _labelled(results: list[str], keys: list[str] | None) -> Iterator[tuple[str | None, Any]]:
    """Results with their labels; those with a key are read with it."""
    from ptychodask.io import read_foreign_result

    key_of = dict(text.partition("=")[::2] for text in keys or [])
    for text in results:
        name, equals, path = text.partition("=")
        if not equals or text.startswith("s3://") or Path(text).exists():
            yield None, text
        elif name in key_of:
            yield name, read_foreign_result(path, key=key_of.pop(name))
        else:
            yield name, path
    if key_of:
        raise PtychodaskError(
            f"--key {'='.join(key_of.popitem())}: no result has this label; pass the result as LABEL=PATH"
        )


def _peak(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
