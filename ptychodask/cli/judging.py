"""Commands that judge results: compare, residuals, study, report."""

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
    client_for,
    given,
    named,
    numbers_in,
    progress_option,
)
from ptychodask.progress import quiet_stderr
from ptychodask.scan import PtychodaskError


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
    from ptychodask.compare import align, compare, patterns_inside, r_factors, results_by_label, to_csv, to_markdown
    from ptychodask.plotting import check_figure_path, plot_comparison
    from ptychodask.store import open_scan

    if png is not None:
        check_figure_path(png)
    check_folders(csv, markdown)
    opened = results_by_label(_labelled(results, key))
    measured = None if scan is None else open_scan(scan)
    known = open_scan(truth) if truth is not None else measured if measured and measured.truth is not None else None
    aligned_results = align(opened, truth=known, register=register)
    table = None
    if measured is not None and known is None and len(aligned_results) == 1:
        for label, misfit in r_factors(aligned_results, measured).items():
            typer.echo(f"{label}: R {misfit:.4f} over {len(patterns_inside(aligned_results, measured))} patterns")
    else:
        options = given(baseline=baseline, peak=None if peak is None else _peak(peak))
        table = compare(aligned_results, truth=known, scan=measured, scale=scale, **options)
        typer.echo(to_markdown(table))
        for path, text in ((csv, to_csv(table)), (markdown, to_markdown(table))):
            if path is not None:
                path.write_text(text)
    if png is not None:
        plot_comparison(aligned_results, known, comparison=table, scale=scale, path=png)


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
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    quiet: Quiet = False,
) -> None:
    """Judge each measured pattern by the one that a result makes, and name those that stand out.

    Example: ptychodask residuals scan.object.zarr scan.zarr --png residuals.png --save-outliers bad.npy
    """
    from ptychodask.plotting import RESIDUALS, check_figure_path, plot_residuals
    from ptychodask.residuals import outliers, residuals

    check_one_cluster("residuals", workers, scheduler)
    if png is not None:
        check_figure_path(png)
    check_folders(save_outliers, csv)
    options = given(drop=None if drop is None else numbers_in("--drop", drop, "pattern indices"))
    with client_for(workers, scheduler, tls, tls_folder) as client:
        found = residuals(result, store, client=client, progress=progress_option(quiet), **options)
    far = outliers(found, **given(n_mad=n_mad))
    told = "".join(f", {title} {found.attrs[name]:.4g}" for name, title in RESIDUALS.items() if name in found.attrs)
    typer.echo(f"{result}: {found.attrs['n_counted']} patterns{told}; {len(far)} stand out: {far.tolist()}")
    if save_outliers is not None:
        np.save(save_outliers, far)
    if csv is not None:
        found.to_dataframe().to_csv(csv)
    if png is not None:
        plot_residuals(found, path=png)


def study(
    study: Annotated[Path, typer.Argument(help="TOML file: the matrix and what its cells share.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to make; by default beside the file.")] = None,
    recompute: Annotated[list[str] | None, typer.Option(help="Cell to compute again; * for any characters.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    tls: Tls = False,
    tls_folder: TlsFolder = None,
    quiet: Quiet = False,
) -> None:
    """Simulate, train, reconstruct and compare over dose, overlap, gridsize and network. Goes on where it was stopped.

    Example: ptychodask study docs/study.toml --out study
    """
    check_one_cluster("study", workers, scheduler)
    with quiet_stderr():
        from ptychodask.study import run_study, to_markdown
    folder = study.with_suffix("") if out is None else out
    with client_for(workers, scheduler, tls, tls_folder) as client:
        found = run_study(study, folder, recompute=recompute or (), client=client, progress=progress_option(quiet))
    typer.echo(f"{to_markdown(found)}\n{folder}: table.md, metrics.csv and figures")


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
    out = beside(named(Path(source)), f"{Path(source).name.removesuffix('.zarr')}.html") if out is None else out
    others = _labelled(compare or [], None)
    path = write_report(
        source, out, label=label, scan=scan, truth=truth, others=others, progress=progress_option(quiet)
    )
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _labelled(results: list[str], keys: list[str] | None) -> Iterator[tuple[str | None, Any]]:
    """Each result with its label; where the array's key is given, with what was read by it."""
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
        raise PtychodaskError(f"--key {'='.join(key_of.popitem())}: no result has this label; name it with LABEL=PATH")


def _peak(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
